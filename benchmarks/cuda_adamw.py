"""What the AdamW kernel costs, counted in the emulator, beside what memory allows.

    python benchmarks/cuda_adamw.py [--quick] [--devices a100 h100 ...]

**Counted and modelled, never measured.** One CTA of a launch is executed, by the real launcher, on
gradients and states after some steps, and stands for the others. For each dtype and kind of states:

    bytes   that a value must move: p twice, its gradient, both states twice
    sass    instructions for a value, everything counted (tables, the search for the tensor)
    slots   those over the issue slots that a lane has for a value while its bytes stream at the
            data sheet's bandwidth; beyond the bar of 75% marked !
    shared  clocks of shared memory for a value over the clocks there are
    sectors that were moved over those that hold the values
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import cuda_common
import harness
import torch
from cuda_common import Bar

from qlora_kernels import optim
from qlora_kernels.emulator import devices, toolchain
from qlora_kernels.emulator.runtime import EmulatedRuntime
from tests.cuda.launchers import DTYPES, OPTIONS, SOURCES

BAR = 0.75
TILE = 4096
LAUNCH = "_ZN3qlk4cuda12launch_adamwENS0_10AdamWGroupEiP11CUstream_st"


class AdamWTensor(ctypes.Structure):
    _fields_ = [
        *[(n, ctypes.c_void_p) for n in ("p", "grad", "state1", "state2", "absmax1", "absmax2")],
        ("count", ctypes.c_int64), ("first_tile", ctypes.c_uint), ("wide", ctypes.c_uint),
    ]  # fmt: skip


class AdamWGroup(ctypes.Structure):
    _fields_ = [
        ("tensors", AdamWTensor * 60), ("count", ctypes.c_int), ("dtype", ctypes.c_int),
        ("eight", ctypes.c_bool), ("step", ctypes.c_float * 8), ("maps", ctypes.c_void_p),
    ]  # fmt: skip


def measure(library: Path, key: str, dtype: torch.dtype, bits: int, tiles: int = 8) -> dict:
    """One CTA that walks over that many tiles: of a launch whose other CTAs do the same."""
    device = devices.get_device(key)
    n = tiles * TILE
    torch.manual_seed(0)
    p = torch.randn(n, dtype=torch.float32).to(dtype).requires_grad_()
    optimizer = optim.AdamW([p], optim_bits=bits)
    for _ in range(3):
        p.grad = torch.randn(n).to(dtype)
        optimizer.step()
    state = optimizer.state[p]
    with EmulatedRuntime(key, library, checks=("counts",), blocks=[0]) as rt:

        def at(t: torch.Tensor | None, name: str) -> int | None:
            if t is None:
                return None
            copy = torch.from_numpy(rt.empty(t.numel() * t.element_size(), "uint8"))
            copy.copy_(t.detach().contiguous().view(torch.uint8))
            kept.append(copy)
            return rt.pointer(copy, name).value

        kept: list[torch.Tensor] = []
        group = AdamWGroup(count=1, dtype=DTYPES[dtype], eight=bits == 8)
        names = ("state1", "state2", "absmax1", "absmax2")
        group.tensors[0] = AdamWTensor(
            at(p, "p"), at(p.grad, "grad"), *(at(state.get(n), n) for n in names), n
        )
        group.step[:] = optim._scalars(optimizer.param_groups[0], 4)
        group.maps = at(optim.state_maps(), "maps")
        launch = getattr(rt.lib, LAUNCH)
        # By value in C++; the ABI passes it on the stack, as ctypes does.
        launch.argtypes = [AdamWGroup, ctypes.c_int, ctypes.c_void_p]
        assert launch(group, 0, None) == 0, rt.errors
        (done,) = rt.launches
    # The one CTA that ran, by itself.
    found = cuda_common.counted(device, done, blocks=1)
    work, dynamic = found.work, found.dynamic
    size = dtype.itemsize
    needed = 3 * size + (16 if bits == 32 else 4 + 16 / 256)
    moved = sum(32.0 * (r["distinct_read"] + r["sectors_written"])
                for r in done.counts.regions if r["name"] != "maps")  # fmt: skip
    values_s = device.dram_bandwidth / needed
    slots = 32 * device.issue_slots / values_s
    clocks = device.sms * device.clock / values_s
    return {
        "bytes": needed, "sass": dynamic.per_item(n),
        "slots": dynamic.per_item(n) / slots,
        "shared": (work.wavefronts + work.l1_cycles) / n / clocks,
        "sectors": moved / (needed * n), "unexplained": dynamic.unexplained,
        "registers": found.registers,
    }  # fmt: skip


def main() -> int:
    args = cuda_common.parse(cuda_common.parser(__doc__, shapes=()))
    cubin = toolchain.compile_object(SOURCES / "adamw.cu", ["sm_80"], OPTIONS)
    library = toolchain.link_library([cubin], toolchain.cache_dir() / "adamw_benchmark.so")
    figures = []
    head = ["p", "states", "bytes", "sass", "slots", "shared", "sectors"]
    for key in args.devices:
        print(f"\n{devices.get_device(key)} (counted)")
        rows = []
        for bits in (32, 8):
            for dtype in (torch.float32, torch.bfloat16):
                f = measure(library, key, dtype, bits)
                figures.append({"device": key, "dtype": str(dtype), "bits": bits, **f})
                rows.append(
                    [str(dtype).removeprefix("torch."), f"{bits}-bit", f"{f['bytes']:.2f}",
                     f"{f['sass']:.1f}",
                     f"{f['slots']:.0%}" + ("!" if f["slots"] > BAR else ""),
                     f"{f['shared']:.0%}", f"{f['sectors']:.3f}"]
                )  # fmt: skip
        harness.print_table(head, rows)
    bars = []
    for f in figures:
        who = f"{f['device']}, p {f['dtype'].removeprefix('torch.')}, {f['bits']}-bit states"
        why = f"{f['sass']:.1f} SASS for {f['bytes']:.1f} bytes a value"
        bars.append(Bar(f"{who}: SASS / issue slots", f["slots"], BAR, why))
        bars.append(Bar(f"{who}: sectors moved / needed", f["sectors"], 1.02))
    cuda_common.print_bars(bars, met=False)
    cuda_common.write(args, bars, figures=figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
