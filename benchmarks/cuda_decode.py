"""What the decode kernels cost, counted in the emulator, and the times that a model makes of it.

One block of each launch is executed on the shapes of LLaMA 7B and 70B, by the real launcher, and
stands for the others. Issue slots are what a lane has for 8 weights while the weights stream at the
data sheet's bandwidth. For each number of rows and pass:

    loop     SASS of the main loop for 8 weights, everything in it counted
    all      SASS of all launches of the step (LoRA's, the prologue, sums) for 8 weights
    slots    all over the issue slots, and loop% the loop alone; beyond the bar marked !
    shared   passes of shared memory and L1 cycles for 8 weights, over what there is time for
    again    sectors of the weight that a block asked for over those that it needs
    L2       bytes between blocks and L2 (L1 serving what a block reads again) / the weight's
    us       modelled time, limit the weight's at the data sheet's bandwidth

    python benchmarks/cuda_decode.py [--quick] [--devices a100 h100 ...]
"""

from __future__ import annotations

import functools
import math
import sys
from types import SimpleNamespace

import cuda_common
import harness
import torch
from cuda_common import SHAPES, Bar

from qlora_kernels import formats
from qlora_kernels.emulator import devices, model
from qlora_kernels.emulator.listing import listing
from qlora_kernels.emulator.runtime import EmulatedRuntime
from tests.cuda.decode_launchers import MMA, SIMT, Launcher, library
from tests.cuda.launchers import Quantized

# (rows, route, dx, rank)
CASES = [
    (1, SIMT, False, 0), (1, MMA, False, 0), (2, MMA, False, 0), (4, MMA, False, 0),
    (8, MMA, False, 0), (15, MMA, False, 0), (32, MMA, False, 0), (1, MMA, False, 16),
    (8, MMA, False, 16), (15, MMA, False, 16), (1, MMA, True, 0), (8, MMA, True, 0),
    (15, MMA, True, 0),
]  # fmt: skip
BAR = 0.75  # of the issue slots


def weight(n: int, k: int) -> Quantized:
    """Random bytes: counts do not depend on the values."""
    blocks = n * k // 64
    return Quantized(
        torch.randint(0, 256, (n * k // 2,), dtype=torch.uint8),
        torch.randint(0, 256, (blocks,), dtype=torch.uint8),
        formats.get_format("nf4").tensors()[0].clone(), 64, (n, k),
        torch.rand(-(-blocks // 256)), formats.nested_code().clone(), torch.tensor([0.1]),
    )  # fmt: skip


def run(
    q: Quantized, device: str, rows: int, route: int, dx: bool, rank: int, lines: bool = False
) -> list:
    """The launches of one step, block 0 of each executed; `lines`: with their source's lines."""
    n, k = q.shape
    a = torch.randn(rank, k) if rank else None
    b = torch.randn(n, rank) if rank else None
    built = library(options=("-lineinfo",)) if lines else library()
    with EmulatedRuntime(device, built, checks=("counts",), blocks=[0]) as rt:
        launcher = Launcher(rt)
        x = torch.randn(rows, n if dx else k).to(torch.bfloat16)
        step = launcher.input_grad if dx else launcher.linear
        return step(q, x, route, a=a, b=b).launches


def measure(q: Quantized, key: str, rows: int, route: int, dx: bool, rank: int) -> dict:
    device, (n, k) = devices.get_device(key), q.shape
    eights = n * k / 8
    loop = total = shared = l2 = seconds = kernel = 0.0
    bound = ""
    for launch in run(q, key, rows, route, dx, rank):
        found = cuda_common.counted(device, launch)
        work, dynamic = found.work, found.dynamic
        main = "decode_linear<" in launch.name or "decode_input_grad<" in launch.name
        if main:
            work.dram_read = n * k / 2 * (4.127 / 4)  # x, A, B and sums stay in L2
            if dynamic.main_loop is not None:
                loop = dynamic.per_item(eights, dynamic.main_loop.blocks)
            packed = next(r for r in launch.counts.regions if r["name"] == "packed")
            again = read_again(packed)
            unexplained = dynamic.unexplained
        total += dynamic.per_item(eights)
        shared += (work.wavefronts + work.l1_cycles) / (eights / 32)
        l2 += work.l2_bytes
        # Queued launches follow each other; a kernel without its weight is all latency.
        modelled = model.model(work, device)
        seconds += modelled.time
        if main:
            kernel, bound = modelled.kernel, modelled.bottleneck
    slots = device.slots_per_8_weights()
    return {
        "loop": loop, "all": total, "slots": total / slots, "loop_slots": loop / slots,
        "shared": shared / (slots / device.sm.issue), "again": again,
        "l2": l2 / (n * k / 2), "microseconds": seconds * 1e6, "kernel": kernel * 1e6,
        "limit": n * k * 4.127 / 8 / device.dram_bandwidth * 1e6, "bound": bound,
        "unexplained": unexplained,
    }  # fmt: skip


def remembered(q: Quantized, *question) -> dict:
    """:func:`measure`, once."""
    make = functools.partial(measure, q, *question)
    return cuda_common.remembered(library(), make, "decode", q.shape, *question)


def read_again(region: dict) -> float:
    """Sectors of the packed weight that a block asked for, over those that it needs."""
    return region["sectors_read"] / max(region["distinct_read"], 1)


def fewest_l2(n: int, k: int, m: int, sms: int) -> float:
    """Bytes between L2 and `sms` CTAs over the weight's, at best: a CTA has a part [a, b] of it,
    all of the same area, reads m b values of x, and, where b < k, m a sums go out and back."""
    area = n * k / sms
    whole = 4.0 * m * k / area  # b = k: x alone
    b = math.sqrt(4.0 * area)  # where both terms of cut rows are equal: 2 m b and 8 m area / b
    cut = (2.0 * m * b + 8.0 * m * area / b) / (area / 2)
    return 1 + 32 / 1024 + min(whole, cut if b < k else whole)


def verdicts(figures: list[dict]) -> list[Bar]:
    """The bars of decode, each with its worst case and what bounds it there."""
    found: list[Bar] = []

    def bar(what: str, value: float, limit: float, why: str = "") -> None:
        found.append(Bar(what, value, limit, why))

    by = {(f["shape"], f["device"], f["case"]): f for f in figures}
    devices_here = list(dict.fromkeys(f["device"] for f in figures))
    cases = list(dict.fromkeys(f["case"] for f in figures if "r=" not in f["case"]))
    for key in devices_here:
        ones = [f["loop"] for f in figures if f["device"] == key and f["case"] == "y m=1 mma"]
        bar(f"{key}: y m=1, SASS of the loop for 8 weights", max(ones), 30)
        for case in cases:
            worst = max((f for f in figures if f["device"] == key and f["case"] == case),
                        key=lambda f: f["loop_slots"])  # fmt: skip
            why = f"{worst['shape']}: {worst['loop']:.1f} SASS; bound by {worst['bound']}, "
            why += f"shared memory and L1 {worst['shared']:.2f} of the time that DRAM takes"
            bar(f"{key}: {case}, loop / issue slots", worst["loop_slots"], BAR, why)
        for m in (1, 8, 15):
            for shape in dict.fromkeys(f["shape"] for f in figures):
                lora, plain = by[shape, key, f"y m={m} mma r=16"], by[shape, key, f"y m={m} mma"]
                more = f"+{lora['all'] - plain['all']:.1f} for 8 weights: S in each CTA, S B a y"
                bar(f"{key} {shape}: y m={m}, all SASS with LoRA r=16 / without",
                    lora["all"] / plain["all"], 1.10, more)  # fmt: skip
        for f in figures:
            if f["device"] == key and f["case"] in [f"y m={m} mma" for m in (1, 2, 4, 8, 15)]:
                m = int(f["case"].split("m=")[1].split()[0])
                least = fewest_l2(f["n"], f["k"], m, devices.get_device(key).sms)
                what = f"{key} {f['shape']}: {f['case']}, L2 requests / the weight's bytes"
                why = f"x for each CTA: {least:.2f} at least, however the weight is cut"
                bar(what, f["l2"], 1.3, why)
    return found


def print_listing() -> None:
    """docs/kernels.md's: block 0 of y = x W^T, 8 rows, [4096, 4096], each source line's counts."""
    launch = run(weight(4096, 4096), "a100", 8, MMA, False, 0, lines=True)[-1]
    print(listing(SimpleNamespace(kernel=launch.counts.kernel, counts=launch.counts, reports=[])))


def main() -> int:
    parser = cuda_common.parser(__doc__)
    parser.add_argument("--listing", action="store_true", help="docs/kernels.md's, and no more")
    args = cuda_common.parse(parser)
    if args.listing:
        print_listing()
        return 0
    head = [
        "case",
        "loop",
        "all",
        "slots",
        "loop%",
        "shared",
        "again",
        "L2",
        "us",
        "limit",
        "bound by",
    ]
    figures = []
    for name in args.shapes:
        n, k = SHAPES[name]
        q = weight(n, k)
        for key in args.devices:
            print(f"\n{name} {n} x {k} on {devices.get_device(key)} (modelled)")
            rows = []
            for m, route, dx, rank in CASES:
                f = remembered(q, key, m, route, dx, rank)
                label = f"{'dx' if dx else 'y'} m={m} {'mma' if route == MMA else 'simt'}"
                label += f" r={rank}" if rank else ""
                figures.append({"shape": name, "n": n, "k": k, "device": key, "case": label, **f})
                rows.append(
                    [label, f"{f['loop']:.1f}", f"{f['all']:.1f}", f"{f['slots']:.0%}",
                     f"{f['loop_slots']:.0%}" + ("!" if f["loop_slots"] > BAR else ""),
                     f"{f['shared']:.0%}", f"{f['again']:.2f}", f"{f['l2']:.2f}",
                     f"{f['microseconds']:.1f}", f"{f['limit']:.1f}", f["bound"]]
                )  # fmt: skip
            harness.print_table(head, rows)
    bars = verdicts(figures)
    cuda_common.print_bars(bars, met=False)
    cuda_common.write(args, bars, figures=figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
