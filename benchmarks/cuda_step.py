"""What the linear layers of a LLaMA layer's training step cost: ours, bitsandbytes' plan, dense.

    python benchmarks/cuda_step.py [--devices a100 rtx4090 ...] [--rows 512 2048] [--rank 64]

**Modelled, never measured.** Forward and backward of the seven linear layers, LoRA on each, bf16:

    ours          what the dispatch chooses. A fused GEMM (S before it, LoRA in its accumulator), or
                  dequantize (one kernel), x W^T, S = x A^T, y += s S B^T by the matmul. Backward on
                  the same bytes: dX = dY W + dS A likewise, dA, dB
    bitsandbytes  dequantize (three kernels: scales, their offset, weights), x W^T, and LoRA as PEFT
                  writes it: S B^T, times s, plus, each through memory; backward its transposes
    dense         the same on a bf16 weight

Each plan is a list of operations. A dense matmul takes the longer of its floating-point operations
at 0.8 of the tensor cores' data sheet (one figure for all three plans) and its bytes
at the DRAM's measured read bandwidth; what goes over elements takes its bytes; each has a launch.
Our own kernels are counted in the emulator and modelled like any (benchmarks/emulator_model.py says
how far that is to be trusted); the peer's dequantization is granted the full bandwidth.

Bars: >= 1.15 x bitsandbytes' plan on every device; >= 1.0 x dense at 2048 rows on A100, RTX 4090.
"""

from __future__ import annotations

import ctypes
import functools
import math
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import cuda_common
import cuda_gemm
import harness
import torch
from cuda_common import EFFICIENCY, Bar

from qlora_kernels import cuda
from qlora_kernels.emulator import devices, model, toolchain
from qlora_kernels.emulator.devices import Device
from qlora_kernels.emulator.runtime import EmulatedRuntime
from tests.cuda.launchers import OPTIONS, SOURCES, Caller, quantized

LAYER = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]  # LLaMA-7B's, [N, K]
BF16, FP32 = 2, 4
DEVICES = ("a100", "h100", "h200", "rtx4090", "b200", "rtx3090", "a6000")
DOOR = """
#include "{folder}/launchers.h"
using namespace qlk;
using namespace qlk::cuda;
extern "C" int dequantize(const Weight* w, long long count, void* out, cudaStream_t stream) {{
  return launch_dequantize(*w, 0, count, out, DType::bf16, stream);
}}
"""


@dataclass(frozen=True)
class Operation:
    """One kernel: floating-point operations of a bf16 matmul, bytes through memory, or a time that
    was modelled already."""

    name: str
    flops: float = 0.0
    bytes: float = 0.0
    seconds: float = 0.0

    def time(self, device: Device, efficiency: float) -> float:
        compute = self.flops / (efficiency * device.tensor["bf16"])
        return device.launch + max(compute, self.bytes / device.dram_read, self.seconds)


def matmul(name: str, m: float, n: float, k: float, *, added: bool = False) -> Operation:
    """``[m, k] x [k, n]``, its result added to what is there or written."""
    return Operation(name, 2 * m * n * k, BF16 * (m * k + n * k + m * n * (2 if added else 1)))


def elements(name: str, count: float, reads: int, *, size: int = BF16) -> Operation:
    return Operation(name, bytes=size * count * (reads + 1))


def casts(n: int, k: int, r: int) -> list[Operation]:
    """A and B, which PEFT keeps in fp32, to bf16: everybody's."""
    return [Operation(name, bytes=c * (FP32 + BF16)) for name, c in (("A", r * k), ("B", n * r))]


def gradients(m: int, n: int, k: int, r: int) -> list[Operation]:
    return [matmul("dA", r, k, m), matmul("dB", n, r, m)]


def fused(device: Device, pass_: int, m: int, n: int, k: int, r: int, plan: cuda.Plan) -> float:
    """Seconds of a fused GEMM's launches, its LoRA's included."""
    tile = (plan.tile_m, plan.tile_n, plan.tile_k, plan.warps, plan.stages)
    question = (device.key, pass_, m, n, k, tile, plan.splits, r)
    return cuda_common.remembered(
        cuda_gemm.library(pass_), lambda: cuda_gemm.call(*question).seconds, "call", *question
    )


def ours(m: int, n: int, k: int, r: int, device: Device) -> list[Operation]:
    found = []
    for backward in (False, True):
        plan, _ = cuda.choose(device.key, m, n, k, rank=r, backward=backward)
        if plan.route == "gemm":
            seconds = fused(device, int(backward), m, n, k, r, plan)
            found.append(Operation("fused", seconds=seconds - device.launch))
        else:
            outs, ins = (k, n) if backward else (n, k)
            found += [
                Operation("dequantize", seconds=dequantization(n, k, device.key)),
                matmul("dY W" if backward else "x W^T", m, outs, ins), *casts(n, k, r),
                matmul("S or dS", m, r, ins), Operation("to fp32", bytes=m * r * (BF16 + FP32)),
                matmul("LoRA's part, added", m, outs, r, added=True),
            ]  # fmt: skip
        if backward:
            found.append(Operation("S to bf16", bytes=m * r * (BF16 + FP32)))
    return found + gradients(m, n, k, r)


def unfused(m: int, n: int, k: int, r: int, weight: list[Operation]) -> list[Operation]:
    """PEFT's ``result + lora_B(lora_A(x)) * scaling`` and what autograd makes of it."""
    forward = [
        *weight, matmul("x W^T", m, n, k), *casts(n, k, r), matmul("S", m, r, k),
        matmul("S B^T", m, n, r), elements("* scaling", m * n, 1), elements("+", m * n, 2),
    ]  # fmt: skip
    backward = [
        *weight, matmul("dY W", m, k, n), elements("dY * scaling", m * n, 1),
        matmul("dS", m, r, n), matmul("dS A", m, k, r), elements("dX +", m * k, 2),
        *gradients(m, n, k, r),
    ]  # fmt: skip
    return forward + backward


def peer_dequantization(n: int, k: int) -> list[Operation]:
    scales = n * k / 64
    return [
        Operation("scales", bytes=scales * (1 + FP32)),
        Operation("offset", bytes=scales * 2 * FP32),
        Operation("dequantize", bytes=n * k * (0.5 + BF16) + scales * FP32),
    ]


# --- our dequantization, counted ------------------------------------------------------------------


@functools.cache
def library() -> Path:
    objects = [
        toolchain.compile_object(source, ["sm_80"], OPTIONS)
        for source in (SOURCES / "dequantize.cu", DOOR.format(folder=SOURCES))
    ]
    folder = Path(tempfile.mkdtemp(prefix="qlk-step-"))
    return toolchain.link_library(objects, folder / "dequantize.so")


@functools.cache
def dequantization(n: int, k: int, key: str) -> float:
    """Seconds of the kernel, without its launch: one block counted, scaled to all."""
    device = devices.get_device(key)
    q = quantized(64, 4096, nested=True)
    out = torch.empty(q.shape, dtype=torch.bfloat16)
    with EmulatedRuntime(device.key, library(), checks=("counts",), blocks=[0]) as rt:
        caller = Caller(rt)
        weight = caller.weight(q)
        status = rt.lib.dequantize(
            ctypes.byref(weight), ctypes.c_longlong(out.numel()), rt.pointer(out, "out"), None
        )
        assert status == 0
        launch = rt.launches[-1]
    values = out.numel() / launch.blocks  # a block
    read, write = n * k * 4.127 / 8, n * k * BF16
    work = cuda_common.counted(
        device, launch, blocks=math.ceil(n * k / values), dram_read=read, dram_write=write,
        l2_bytes=read + write,
    ).work  # fmt: skip
    return model.model(work, device, launch=False).time


# --- the table ------------------------------------------------------------------------------------


def plans(m: int, r: int, device: Device) -> dict[str, list[Operation]]:
    found: dict[str, list[Operation]] = {"ours": [], "bitsandbytes": [], "dense": []}
    own = {shape: ours(m, *shape, r, device) for shape in set(LAYER)}
    for n, k in LAYER:
        found["ours"] += own[n, k]
        found["bitsandbytes"] += unfused(m, n, k, r, peer_dequantization(n, k))
        found["dense"] += unfused(m, n, k, r, [])
    return found


def shares(plan: list[Operation], device: Device) -> dict[str, float]:
    """What part of a plan's time its matmuls, dequantizations, fused kernels and the rest take."""
    large = ("fused", "dequantize", "x W^T", "dY W", "dA", "dB")
    parts: dict[str, float] = {}
    for o in plan:
        name = o.name if o.name in large else "LoRA and casts"
        parts[name] = parts.get(name, 0.0) + o.time(device, EFFICIENCY)
    whole = sum(parts.values())
    return {name: t / whole for name, t in sorted(parts.items(), key=lambda i: -i[1])}


def main() -> int:
    parser = cuda_common.parser(__doc__, DEVICES, shapes=())
    parser.add_argument("--rows", nargs="+", type=int, default=[512, 2048])
    parser.add_argument("--rank", type=int, default=64)
    args = cuda_common.parse(parser)
    figures, rows, bars = [], [], []
    for key in args.devices:
        device = devices.get_device(key)
        for m in args.rows:
            found = plans(m, args.rank, device)

            def total(name: str, efficiency: float, found=found, device=device) -> float:
                return sum(o.time(device, efficiency) for o in found[name])

            ours = total("ours", EFFICIENCY)
            ratios = {n: total(n, EFFICIENCY) / ours for n in ("bitsandbytes", "dense")}
            spans = {
                n: [total(n, e) / total("ours", e) for e in (0.6, 1.0)]
                for n in ("bitsandbytes", "dense")
            }
            parts = shares(found["ours"], device)
            launches = {name: len(plan) for name, plan in found.items()}
            bound = ", ".join(f"{n} {t:.0%}" for n, t in parts.items())
            why = f"{bound}; launches: {launches['ours']}, theirs {launches['bitsandbytes']}"
            where = f"{key}, {m} rows: "
            bars.append(
                Bar(f"{where}bitsandbytes' time / ours", ratios["bitsandbytes"], 1.15, why, True)
            )
            if m == 2048 and key in ("a100", "rtx4090"):
                bars.append(Bar(f"{where}dense time / ours", ratios["dense"], 1.0, why, True))
            rows.append(
                [key, str(m), *(f"{1e3 * total(p, EFFICIENCY):.3f}" for p in found),
                 *(t for n in ratios for t in
                   (f"{ratios[n]:.2f}", f"{spans[n][0]:.2f}-{spans[n][1]:.2f}")), bound]
            )  # fmt: skip
            figures.append({
                "device": key, "rows": m, "rank": args.rank, "ms": {
                    p: 1e3 * total(p, EFFICIENCY) for p in found},
                "over_ours": ratios, "over_ours_at_0.6_and_1.0": spans, "our_shares": parts,
                "launches": launches,
            })  # fmt: skip
            sys.stdout.flush()
    print("modelled, seven linear layers of LLaMA-7B, forward and backward, bf16, ms a layer")
    harness.print_table(
        ["device", "rows", "ours", "bitsandbytes", "dense", "bnb / ours", "at 0.6-1.0",
         "dense / ours", "at 0.6-1.0", "ours: what takes the time"], rows,
    )  # fmt: skip
    cuda_common.print_bars(bars)
    cuda_common.write(args, bars, figures=figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
