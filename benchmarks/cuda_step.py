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
at ``--efficiency`` of the tensor cores' data sheet (one figure for all three plans) and its bytes
at the DRAM's measured read bandwidth; what goes over elements takes its bytes; each has a launch.
Our own kernels are counted in the emulator and modelled like any (benchmarks/emulator_model.py says
how far that is to be trusted); the peer's dequantization is granted the full bandwidth.

Bars: >= 1.15 x bitsandbytes' plan on every device; >= 1.0 x dense at 2048 rows on A100, RTX 4090.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import math
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import cuda_gemm
import harness
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qlora_kernels import cuda
from qlora_kernels.emulator import devices, model, sass, toolchain
from qlora_kernels.emulator.devices import Device
from qlora_kernels.emulator.runtime import EmulatedRuntime
from tests.cuda.launchers import OPTIONS, SOURCES, Caller, quantized

LAYER = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]  # LLaMA-7B's, [N, K]
BF16, FP32 = 2, 4
DEVICES = ("a100", "h100", "h200", "rtx4090", "b200")
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
    return cuda_gemm.call(device.key, pass_, m, n, k, tile, plan.splits, rank=r).seconds


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
                Operation("dequantize", seconds=dequantization(n, k, device)),
                matmul("dY W" if backward else "x W^T", m, outs, ins), *casts(n, k, r),
                matmul("S or dS", m, r, ins), Operation("to fp32", bytes=m * r * (BF16 + FP32)),
                matmul("LoRA's part, added", m, outs, r, added=True),
            ]  # fmt: skip
        if backward:
            rounded = Operation("to bf16", bytes=m * r * (BF16 + FP32))  # S; a fused dS too
            found += [rounded] * (2 if plan.route == "gemm" else 1)
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


def dequantization(n: int, k: int, device: Device) -> float:
    """Seconds of the kernel, without its launch: one block counted, scaled to all."""
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
    counts = launch.counts
    use = toolchain.assemble(launch.ptx, device.target).resources[launch.kernel]
    function = sass.load(launch.ptx, device.target)[launch.kernel]
    dynamic = function.dynamic(counts.by_ptx_line(), math.ceil(launch.threads / 32))
    values = out.numel() / launch.blocks  # a block
    blocks = math.ceil(n * k / values)
    work = model.work_of(
        launch.name, dynamic, device, blocks=blocks, threads=launch.threads,
        registers=use.registers, shared=use.shared + launch.shared,
        dram_read=n * k * 4.127 / 8, dram_write=n * k * BF16, l2_bytes=n * k * (BF16 + 4.127 / 8),
        wavefronts=model.wavefronts_of(counts, dynamic) * blocks,
        l1_cycles=model.l1_cycles_of(counts, device) * blocks, emulated=1,
    )  # fmt: skip
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--devices", nargs="+", default=DEVICES)
    parser.add_argument("--rows", nargs="+", type=int, default=[512, 2048])
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument(
        "--efficiency", type=float, default=0.8, help="of the tensor cores, matmuls"
    )
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    missing = toolchain.available()
    if missing:
        print(missing)
        return 0
    args.quick, args.threads = False, 1
    figures, rows, bars = [], [], []
    for key in args.devices:
        device = devices.get_device(key)
        for m in args.rows:
            found = plans(m, args.rank, device)
            total = {
                name: sum(o.time(device, args.efficiency) for o in plan)
                for name, plan in found.items()
            }
            span = [
                sum(o.time(device, e) for o in found["bitsandbytes"])
                / sum(o.time(device, e) for o in found["ours"])
                for e in (0.6, 0.9)
            ]
            ratio = {name: total[name] / total["ours"] for name in ("bitsandbytes", "dense")}
            parts = {}
            for o in found["ours"]:
                name = o.name if o.name in ("fused", "dequantize", "x W^T", "dY W") else "LoRA"
                parts[name] = parts.get(name, 0.0) + o.time(device, args.efficiency)
            bound = ", ".join(f"{n} {t / total['ours']:.0%}" for n, t in parts.items())
            held = ratio["bitsandbytes"] >= 1.15
            bars.append((f"{key}, {m} rows", ">= 1.15 x bitsandbytes", ratio["bitsandbytes"], held))
            if m == 2048 and key in ("a100", "rtx4090"):
                bars.append(
                    (f"{key}, {m} rows", ">= 1.0 x dense", ratio["dense"], ratio["dense"] >= 1)
                )
            rows.append(
                [key, str(m), *(f"{1e3 * total[p]:.3f}" for p in found),
                 f"{ratio['bitsandbytes']:.2f}", f"{span[0]:.2f}-{span[1]:.2f}",
                 f"{ratio['dense']:.2f}", bound]
            )  # fmt: skip
            figures.append({"device": key, "rows": m, "rank": args.rank, "seconds": total, **ratio})
    print("modelled, seven linear layers of LLaMA-7B, forward and backward, bf16, ms a layer")
    harness.print_table(
        ["device", "rows", "ours", "bitsandbytes", "dense", "bnb / ours", "at 0.6-0.9",
         "dense / ours", "ours: what takes the time"], rows,
    )  # fmt: skip
    print()
    harness.print_table(
        ["where", "bar", "modelled", "verdict"],
        [[w, b, f"{v:.2f}", "held" if ok else "missed"] for w, b, v, ok in bars],
    )
    harness.write_json(args, {"figures": figures})
    return 0


if __name__ == "__main__":
    sys.exit(main())
