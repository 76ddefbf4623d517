"""Quantize and dequantize in Triton beside the CUDA half's: counted, and modelled from the counts.

    python benchmarks/triton_quantize.py [--devices a100 rtx4090 ...] [--shape 4096 11008]

**Modelled, never measured.** One block of each kernel is run in the emulator, every access counted,
and its SASS (by ptxas, for the device) is scaled to the whole weight; the model's time follows from
that and from the bytes that must move (docs/emulator_model.md says how far to trust it).

The bar: dequantize, 1.1 x the CUDA kernel's modelled time.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import itertools
import math
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qlora_kernels.emulator import devices, model, sass, toolchain
from qlora_kernels.emulator.devices import Device
from qlora_kernels.emulator.runtime import EmulatedRuntime
from qlora_kernels.emulator.triton_driver import EmulatedTriton
from qlora_kernels.formats import get_format
from qlora_kernels.triton.dequantize import dequantize_4bit
from qlora_kernels.triton.quantize import quantize_4bit
from tests.cuda.launchers import DTYPES, OPTIONS, SOURCES, Caller, quantized
from tests.cuda.test_offsets import QuantizeProblem

DEVICES = ("a100", "rtx4090", "h100", "h200", "rtx5090")
BAR = 1.1
DOOR = """
#include "{folder}/launchers.h"
using namespace qlk;
using namespace qlk::cuda;
extern "C" int dequantize(const Weight* w, long long count, void* out, int dtype) {{
  return launch_dequantize(*w, 0, count, out, static_cast<DType>(dtype), nullptr);
}}
extern "C" int quantize(const QuantizeProblem* p) {{ return launch_quantize(*p, nullptr); }}
"""


@dataclass(frozen=True)
class Counted:
    """One block of a launch."""

    name: str
    ptx: str
    threads: int
    shared: int  # dynamic, bytes
    values: int  # that a block makes
    counts: Any


@functools.cache
def library() -> Path:
    objects = [
        toolchain.compile_object(source, ["sm_80"], OPTIONS)
        for source in (
            SOURCES / "quantize.cu",
            SOURCES / "dequantize.cu",
            DOOR.format(folder=SOURCES),
        )
    ]
    folder = Path(tempfile.mkdtemp(prefix="qlk-quantize-"))
    return toolchain.link_library(objects, folder / "quantize.so")


def cuda_half(device: Device, op: str, w: torch.Tensor, dtype: torch.dtype) -> Counted:
    count = ctypes.c_longlong(w.numel())
    with EmulatedRuntime(device.key, library(), checks=("counts",), blocks=[0]) as rt:
        if op == "dequantize":
            q, out = quantized(*w.shape, nested=True), torch.empty(w.shape, dtype=dtype)
            weight = Caller(rt).weight(q)
            status = rt.lib.dequantize(
                ctypes.byref(weight), count, rt.pointer(out, "out"), DTYPES[dtype]
            )
        else:
            values = w.to(dtype)
            _, thresholds, codes = (t.clone() for t in get_format("nf4").tensors())
            packed = torch.empty(w.numel() // 2, dtype=torch.uint8)
            absmax = torch.empty(w.numel() // 64)
            tensors = (values, thresholds, codes, packed, absmax)
            v, t, c, p, a = (rt.pointer(x, str(i)).value for i, x in enumerate(tensors))
            problem = QuantizeProblem(v, DTYPES[dtype], count, t, c, 6, 0, None, p, a)
            status = rt.lib.quantize(ctypes.byref(problem))
        assert status == 0
        launch = rt.launches[-1]
    values_here = w.numel() // launch.blocks
    return Counted(
        launch.kernel, launch.ptx, launch.threads, launch.shared, values_here, launch.counts
    )


def in_triton(device: Device, op: str, w: torch.Tensor, dtype: torch.dtype) -> Counted:
    with EmulatedTriton(device.key, checks=("counts",), blocks=[0]) as gpu:
        if op == "dequantize":
            q = quantized(*w.shape, nested=True)
            dequantize_4bit(
                q.packed, q.absmax, q.codebook, 64, q.nested_absmax, q.nested_code, q.offset,
                list(w.shape), dtype,
            )  # fmt: skip
        else:
            quantize_4bit(w.to(dtype), *get_format("nf4").tensors()[1:], 64)
    launch = gpu.launches[-1]
    kernel, meta = launch.result.kernel, launch.metadata
    values = w.numel() // math.prod(launch.grid)
    return Counted(
        kernel.name, kernel.module.text, 32 * meta.num_warps, meta.shared, values,
        launch.result.counts,
    )  # fmt: skip


def modelled(found: Counted, op: str, device: Device, count: int, size: int):
    """The whole weight's time, and the block's SASS."""
    packed = count * (4.127 if op == "dequantize" else 4.5) / 8
    read, written = (packed, count * size) if op == "dequantize" else (count * size, packed)
    # Triton's PTX is for the device already; the library's is for sm_80 and later.
    cubin = toolchain.assemble(found.ptx, None if found.name == op else device.target)
    use = cubin.resources[found.name]
    function = sass.parse(toolchain.disassemble(cubin, lines="ptx"), found.ptx)[found.name]
    dynamic = function.dynamic(found.counts.by_ptx_line(), math.ceil(found.threads / 32))
    blocks = math.ceil(count / found.values)
    work = model.work_of(
        found.name, dynamic, device, blocks=blocks, threads=found.threads,
        registers=use.registers, shared=use.shared + found.shared,
        dram_read=read, dram_write=written, l2_bytes=read + written,
        wavefronts=model.wavefronts_of(found.counts, dynamic) * blocks,
        l1_cycles=model.l1_cycles_of(found.counts, device) * blocks, emulated=1,
    )  # fmt: skip
    return model.model(work, device, launch=False), dynamic, use


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--devices", nargs="+", default=DEVICES)
    parser.add_argument("--shape", nargs=2, type=int, default=[4096, 11008])
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    missing = toolchain.available()
    if missing:
        print(missing)
        return 0
    args.quick, args.threads = False, 1
    halves: dict[str, Callable[..., Counted]] = {"CUDA": cuda_half, "Triton": in_triton}
    rows, figures, count = [], [], math.prod(args.shape)
    torch.manual_seed(0)
    w = torch.randn(64, 4096)
    cases = itertools.product(args.devices, ("dequantize", "quantize"), DTYPES)
    for key, op, dtype in cases:
        if dtype == torch.float16:
            continue
        device = devices.get_device(key)
        seconds = {}
        for half, run in halves.items():
            found = run(device, op, w, dtype)
            m, dynamic, use = modelled(found, op, device, count, dtype.itemsize)
            seconds[half] = m.kernel
            eights = found.values / 8
            total = found.counts.total
            ratio = m.kernel / seconds["CUDA"]
            verdict = "" if op == "quantize" or half == "CUDA" else "held" if ratio <= BAR else "no"
            rows.append(
                [key, op, str(dtype).removeprefix("torch."), half,
                 f"{dynamic.per_item(eights):.1f}",
                 *(f"{32 * total[k] / eights:.1f}" for k in ("wavefronts", "sectors")),
                 f"{use.registers}", f"{m.occupancy.share:.0%}", f"{m.kernel * 1e6:.1f}",
                 m.bottleneck, f"{ratio:.2f}", verdict]
            )  # fmt: skip
            figures.append(
                {"device": key, "op": op, "dtype": str(dtype), "half": half, "seconds": m.kernel,
                 "sass_for_8": dynamic.per_item(eights), "registers": use.registers}
            )  # fmt: skip
    print(f"modelled, {args.shape[0]} x {args.shape[1]}, blocks of 64; dequantize: nested scales")
    harness.print_table(
        ["device", "op", "values", "half", "SASS / 8", "wavefronts", "bytes / 8", "registers",
         "occupancy", "us", "bound by", "x CUDA", "bar"], rows,
    )  # fmt: skip
    harness.write_json(args, {"figures": figures})
    return 0


if __name__ == "__main__":
    sys.exit(main())
