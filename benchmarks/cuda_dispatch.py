"""Which kernel, tile and splits win for a shape: the ranking that csrc/cuda/dispatch.cpp is from.

For each device, pass, LLaMA shape and number of rows, every plan of `cuda.candidates` is modelled,
and the GEMM's with more splits than those. Decode kernels are emulated on the shape itself, one
block of each launch. A GEMM's block does the same in every step, so it is emulated at two lengths
of the contraction, and its work taken as linear between and beyond them (exact but for the first
and last steps; SASS by the device's own ptxas). `large` is dequantization at DRAM's pace, then a
dense product at 0.8 of the tensor cores' data sheet (cuda_common.EFFICIENCY); what it would take at
the whole sheet, with nothing lost, stands beside it.

The table has, for each case, the best plan, the plan that dispatch.cpp chooses, the choice's time
over the best's ("regret"), and the best time of each route. At the end, for each device and pass,
the rows up to which a fused GEMM beats `large`. All times are modelled (docs/emulator_model.md).
`--tiles` prints what dispatch.cpp's table of step cycles was taken from.

    python benchmarks/cuda_dispatch.py                       # some 5 minutes of one core
    python benchmarks/cuda_dispatch.py --devices a100 --shapes "7B down" -M 512 --tiles
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import Any

import cuda_common
import cuda_decode
import cuda_gemm
import harness
from cuda_common import SHAPES, Bar
from cuda_gemm import FORWARD, INPUT_GRAD

from qlora_kernels import cuda
from qlora_kernels.bench import gpu_model
from qlora_kernels.bench.gpu_model import Line
from qlora_kernels.emulator.devices import Device, get_device
from qlora_kernels.emulator.model import model

DEVICES = ("a100", "h100", "rtx4090", "a6000")  # an H200's SM is an H100's
RANKED_SHAPES = ("7B q k v o", "7B gate up", "7B down", "70B gate up")
ROWS = (64, 128, 192, 256, 384, 512, 1024, 2048, 4096)  # fewer are decode's, if asked for
SPLITS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 32)
PASSES = {FORWARD: "forward", INPUT_GRAD: "dX"}


class Gemm:
    """Modelled times of every GEMM tile on one device."""

    SHORT, LONG = 6, 14  # steps

    def __init__(self, device: str) -> None:
        self.device = get_device(device)
        self.lines: dict[tuple[int, tuple[int, ...]], Line] = {}
        self.sums: Line | None = None

    def tiles(self, pass_: int) -> list[tuple[int, ...]]:
        """Those that the device can hold, without the one for any shape."""
        room = self.device.sm.shared_optin - 1024
        found = [t for t in cuda_gemm.tiles(pass_) if t[-1] > 1]
        return [t for t in found if cuda_gemm.shared_bytes(t, pass_) <= room]

    def line(self, pass_: int, tile: tuple[int, ...]) -> Line:
        def make() -> Line:
            tm, tn, tk = tile[:3]
            works = []
            for steps in (self.SHORT, self.LONG):
                n, k = (tn, steps * tk) if pass_ == FORWARD else (steps * tn, tk)
                works.append(cuda_gemm.call(self.device.key, pass_, tm, n, k, tile, 1).gemm.work)
            return Line.through(*works, self.SHORT, self.LONG)

        if (pass_, tile) not in self.lines:
            question = ("line", self.device.key, pass_, tile, self.SHORT, self.LONG)
            kernels = cuda_gemm.library(pass_)
            self.lines[pass_, tile] = cuda_common.remembered(kernels, make, *question)
        return self.lines[pass_, tile]

    def sum_line(self) -> Line:
        """Of `sum_splits`, over the splits."""

        def make() -> Line:
            tile = cuda_gemm.tiles(FORWARD)[0]
            works = []
            for splits in (2, 8):
                c = cuda_gemm.call(self.device.key, FORWARD, 16, 1024, 2048, tile, splits)
                works.append(next(k.work for k in c.kernels if "sum_splits" in k.name))
            return Line.through(*works, 2, 8)

        if self.sums is None:
            kernels = cuda_gemm.library(FORWARD)
            self.sums = cuda_common.remembered(kernels, make, "sums", self.device.key)
        return self.sums

    def seconds(self, pass_: int, m: int, n: int, k: int, tile: tuple[int, ...], splits: int):
        """(seconds, what bounds it)."""
        found = gpu_model.gemm(
            self.device, pass_ == INPUT_GRAD, m, n, k, tile, splits, self.line(pass_, tile),
            self.sum_line() if splits > 1 else None,
        )  # fmt: skip
        return found.seconds, found.bound


def print_tiles(device: str) -> None:
    """Cycles of a multiprocessor for one step of each tile: with six CTAs to each, and with one."""
    gemm = Gemm(device)
    gpu = gemm.device
    for pass_, name in PASSES.items():
        for tile in gemm.tiles(pass_):
            cost = gemm.line(pass_, tile)
            for w in (cost.value, cost.slope):
                w.dram_read = w.dram_write = 0.0  # of the whole layer, not of a tile
            few, many = (
                model(cost.work(steps, 6 * gpu.sms), gpu, launch=False).kernel for steps in (8, 24)
            )
            alone = model(cost.work(16, gpu.sms), gpu, launch=False).kernel
            print(f"{device:8} {name:8} {tile!s:24} shared {(many - few) / 96 * gpu.clock:6.0f}"
                  f"  alone {alone / 16 * gpu.clock:6.0f}", flush=True)  # fmt: skip


def decode_seconds(
    device: Device, weight: Any, route: str, pass_: int, m: int
) -> tuple[float, str]:
    kind = cuda_decode.SIMT if route == "decode_simt" else cuda_decode.MMA
    f = cuda_decode.remembered(weight, device.key, m, kind, pass_ == INPUT_GRAD, 0)
    return f["microseconds"] * 1e-6, f["bound"]


def plans(
    gpu: Device, gemm: Gemm, weight: Any, pass_: int, m: int, n: int, k: int
) -> Iterator[dict[str, Any]]:
    """Every plan with its modelled time."""
    seen = set()
    for plan in cuda.candidates(gpu.key, m, n, k, backward=pass_ == INPUT_GRAD):
        if plan.route == "large":
            seconds = cuda_common.dequantized_seconds(gpu, m, n, k)
            whole = cuda_common.dequantized_seconds(gpu, m, n, k, efficiency=1.0)
            yield {"route": "large", "us": seconds * 1e6, "us_at_the_sheet": whole * 1e6,
                   "bound_by": "dequantize and dense"}  # fmt: skip
        elif plan.route == "gemm":
            tile = (plan.tile_m, plan.tile_n, plan.tile_k, plan.warps, plan.stages)
            if (
                plan.stages == 1
                or plan.tile_k < 128
                or tile in seen
                or plan.tile_m > 2 * max(16, m)
            ):
                continue
            seen.add(tile)
            step = plan.tile_k if pass_ == FORWARD else plan.tile_n
            for splits in SPLITS:
                if splits * step * 2 > (k if pass_ == FORWARD else n) and splits > 1:
                    continue
                seconds, bound = gemm.seconds(pass_, m, n, k, tile, splits)
                yield {"route": "gemm", "tile": tile, "splits": splits, "us": seconds * 1e6,
                       "bound_by": bound}  # fmt: skip
        elif plan.route == "decode_mma" or (pass_ == FORWARD and m <= 3):
            seconds, bound = decode_seconds(gpu, weight, plan.route, pass_, m)
            yield {"route": plan.route, "us": seconds * 1e6, "bound_by": bound}


def chosen(found: list[dict[str, Any]], gpu: Device, gemm: Gemm, pass_: int, m: int, n: int,
           k: int) -> dict[str, Any]:  # fmt: skip
    """dispatch.cpp's choice, with its modelled time."""
    plan, _ = cuda.choose(gpu.key, m, n, k, backward=pass_ == INPUT_GRAD)
    if plan.route == "gemm":
        tile = (plan.tile_m, plan.tile_n, plan.tile_k, plan.warps, plan.stages)
        seconds, bound = gemm.seconds(pass_, m, n, k, tile, plan.splits)
        return {"route": "gemm", "tile": tile, "splits": plan.splits, "us": seconds * 1e6,
                "bound_by": bound}  # fmt: skip
    return next(f for f in found if f["route"] == plan.route)


def text(plan: dict[str, Any]) -> str:
    if plan["route"] != "gemm":
        return plan["route"]
    return f"gemm {'x'.join(map(str, plan['tile'][:3]))} / {plan['splits']}"


def last_rows(cases: list[dict[str, Any]], device: str, pass_: str) -> dict[str, int]:
    """By shape: the most rows of the ranking up to which the GEMM beats `large` at every one."""
    found: dict[str, int] = {}
    for shape in dict.fromkeys(c["shape"] for c in cases):
        rows = [c for c in cases if (c["device"], c["pass"], c["shape"]) == (device, pass_, shape)]
        found[shape] = 0
        for c in sorted(rows, key=lambda c: c["m"]):
            by = c["best_us_by_route"]
            if by.get("gemm", math.inf) > by["large"]:
                break
            found[shape] = c["m"]
    return found


def main() -> int:
    parser = cuda_common.parser(__doc__, DEVICES, RANKED_SHAPES)
    parser.add_argument("-M", type=int, nargs="+", default=list(ROWS), help="rows")
    parser.add_argument("--tiles", action="store_true", help="cycles of a step of each tile alone")
    args = cuda_common.parse(parser)
    if args.tiles:
        for device in args.devices:
            print_tiles(device)
        return 0
    results: list[dict[str, Any]] = []
    for device in args.devices:
        gpu, gemm = get_device(device), Gemm(device)
        for pass_, pass_name in PASSES.items():
            for shape in args.shapes:
                n, k = SHAPES[shape]
                weight = cuda_decode.weight(n, k) if min(args.M) <= 32 else None
                rows = []
                for m in args.M:
                    found = sorted(plans(gpu, gemm, weight, pass_, m, n, k), key=lambda f: f["us"])
                    choice = chosen(found, gpu, gemm, pass_, m, n, k)
                    regret = choice["us"] / found[0]["us"]
                    by_route = {f["route"]: f["us"] for f in reversed(found)}
                    results.append({
                        "device": device, "pass": pass_name, "shape": shape, "n": n, "k": k,
                        "m": m, "best": found[0], "chosen": choice, "regret": regret,
                        "best_us_by_route": by_route, "ranking": found[:4],
                    })  # fmt: skip
                    rows.append([
                        str(m), text(found[0]), f"{found[0]['us']:.1f}", found[0]["bound_by"],
                        text(choice), f"{regret:.2f}",
                        " ".join(f"{r} {us:.1f}" for r, us in by_route.items()),
                    ])  # fmt: skip
                print(f"\n{device} {pass_name} {shape} {n} x {k} (modelled)")
                harness.print_table(
                    ["M", "best", "us", "bound by", "chosen", "regret", "routes, us"], rows
                )
    lasts = [
        {"device": d, "pass": p, **last_rows(results, d, p)}
        for d in args.devices for p in PASSES.values()
    ]  # fmt: skip
    print("\nrows up to which a fused GEMM beats dequantization and matmul (modelled)")
    harness.print_table(list(lasts[0]), [[str(v) for v in row.values()] for row in lasts])
    mean = math.exp(sum(math.log(r["regret"]) for r in results) / len(results))
    worst = max(results, key=lambda r: r["regret"])
    where = f"{worst['device']} {worst['pass']} {worst['shape']} M={worst['m']}"
    bars = [
        Bar("the choice's time over the best plan's, geometric mean", mean, 1.05),
        Bar("the same, worst case", worst["regret"], 1.25, where),
    ]
    cuda_common.print_bars(bars)
    cuda_common.write(args, bars, last_rows=lasts, cases=results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
