"""Which kernel, tile and splits win for a shape: the ranking that csrc/cuda/dispatch.cpp is from.

For each device, pass, LLaMA shape and number of rows, every plan of `cuda.candidates` is modelled,
and the GEMM's with more splits than those. Decode kernels are emulated on the shape itself, one
block of each launch. A GEMM's block does the same in every step, so it is emulated at two lengths
of the contraction, and its work taken as linear between and beyond them (exact but for the first
and last steps; SASS by the device's own ptxas). `large` is dequantization at DRAM speed followed by
a dense product at the tensor cores' peak, with nothing lost: a rival that flatters.

The table has, for each case, the best plan, the plan that dispatch.cpp chooses, the choice's time
over the best's ("regret"), and the best time of each route. All times are modelled
(docs/emulator_model.md). `--tiles` prints what dispatch.cpp's table of step cycles was taken from.

    python benchmarks/cuda_dispatch.py                       # some 10 minutes of one core
    python benchmarks/cuda_dispatch.py --devices a100 --shapes 0
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cuda_decode
import cuda_gemm
import harness
import torch
from cuda_gemm import BITS, FORWARD, INPUT_GRAD, SHAPES

from qlora_kernels import cuda
from qlora_kernels.emulator.devices import Device, get_device
from qlora_kernels.emulator.model import Work, model

DEVICES = ("a100", "h100", "h200", "rtx4090", "b200")
ROWS = (1, 2, 3, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024)
SPLITS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 32)
PASSES = {FORWARD: "forward", INPUT_GRAD: "dX"}
FOLLOWS = 0.45  # of a launch's cost, for a launch behind another one in a graph


@dataclass
class Line:
    """The work of a kernel's block (or of its whole grid, for sums) as a line over some length."""

    at: float
    value: Work
    slope: Work  # a unit of length; what no length changes is in `value`

    def work(self, length: float, blocks: int) -> Work:
        """Of that many blocks, each of that length."""
        d = length - self.at

        def mix(a: dict[str, float], b: dict[str, float]) -> dict[str, float]:
            return {key: max(0.0, v + d * b.get(key, 0.0)) for key, v in a.items()}

        a, b = self.value, self.slope
        one = replace(
            a, pipes=mix(a.pipes, b.pipes), tensor=mix(a.tensor, b.tensor),
            l2_bytes=a.l2_bytes + d * b.l2_bytes, wavefronts=a.wavefronts + d * b.wavefronts,
            l1_cycles=a.l1_cycles + d * b.l1_cycles, cycles=a.cycles + d * b.cycles,
        )  # fmt: skip
        return one.scaled(blocks)


def line(short: Work, long: Work, at: float, until: float) -> Line:
    """Through the work of one block at two lengths."""
    a, b = (w.scaled(1) for w in (short, long))
    span = until - at

    def rise(x: dict[str, float], y: dict[str, float]) -> dict[str, float]:
        return {key: (y.get(key, 0.0) - v) / span for key, v in x.items()}

    slope = replace(
        a, pipes=rise(a.pipes, b.pipes), tensor=rise(a.tensor, b.tensor),
        l2_bytes=(b.l2_bytes - a.l2_bytes) / span, wavefronts=(b.wavefronts - a.wavefronts) / span,
        l1_cycles=(b.l1_cycles - a.l1_cycles) / span, cycles=(b.cycles - a.cycles) / span,
    )  # fmt: skip
    return Line(at, a, slope)


class Gemm:
    """Modelled times of every GEMM tile on one device."""

    SHORT, LONG = 6, 14  # steps

    def __init__(self, device: str) -> None:
        self.device = get_device(device)
        self.lines: dict[tuple[int, tuple[int, ...]], Line] = {}
        self.sums: Line | None = None

    def line(self, pass_: int, tile: tuple[int, ...]) -> Line:
        if (pass_, tile) not in self.lines:
            tm, tn, tk = tile[:3]
            works = []
            for steps in (self.SHORT, self.LONG):
                n, k = (tn, steps * tk) if pass_ == FORWARD else (steps * tn, tk)
                works.append(cuda_gemm.call(self.device.key, pass_, tm, n, k, tile, 1).gemm.work)
            self.lines[pass_, tile] = line(*works, self.SHORT, self.LONG)
        return self.lines[pass_, tile]

    def sum_line(self) -> Line:
        """Of `sum_splits`, over the splits."""
        if self.sums is None:
            tile = cuda_gemm.tiles(FORWARD)[0]
            works = []
            for splits in (2, 8):
                c = cuda_gemm.call(self.device.key, FORWARD, 16, 1024, 2048, tile, splits)
                works.append(next(k.work for k in c.kernels if "sum_splits" in k.name))
            self.sums = line(*works, 2, 8)
        return self.sums

    def seconds(self, pass_: int, m: int, n: int, k: int, tile: tuple[int, ...], splits: int):
        """(seconds, what bounds it)."""
        gpu = self.device
        tm, tn, tk = tile[:3]
        ins, outs, width, step = (k, n, tn, tk) if pass_ == FORWARD else (n, k, tk, tn)
        tiles = math.ceil(m / tm) * math.ceil(outs / width)
        steps = math.ceil(ins / step) / splits
        work = self.line(pass_, tile).work(steps, tiles * splits)
        partial = splits * m * outs * 4.0 if splits > 1 else 0.0
        spilled = partial if partial > gpu.l2_bytes / 2 else 0.0
        work.dram_read = n * k * BITS[True] / 8 + m * ins * 2.0
        work.dram_write = spilled if splits > 1 else m * outs * 2.0
        found = model(work, gpu)
        seconds = found.time
        if splits > 1:
            blocks = math.ceil(m * outs / 1024)
            after = self.sum_line().work(splits, blocks)
            after.l2_bytes = partial + m * outs * 2.0
            after.dram_read, after.dram_write = spilled, m * outs * 2.0
            seconds += model(after, gpu, launch=FOLLOWS).time
        return seconds, found.bottleneck


def print_tiles(device: str) -> None:
    """Cycles of a multiprocessor for one step of each tile: with six CTAs to each, and with one."""
    gemm = Gemm(device)
    gpu = gemm.device
    for pass_, name in PASSES.items():
        for tile in cuda_gemm.tiles(pass_):
            cost = gemm.line(pass_, tile)
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
    f = cuda_decode.measure(weight, device.key, m, kind, pass_ == INPUT_GRAD, 0)
    return f["microseconds"] * 1e-6, f["bound"]


def plans(
    gpu: Device, gemm: Gemm, weight: Any, pass_: int, m: int, n: int, k: int
) -> Iterator[dict[str, Any]]:
    """Every plan with its modelled time."""
    seen = set()
    for plan in cuda.candidates(gpu.key, m, n, k, backward=pass_ == INPUT_GRAD):
        if plan.route == "large":
            seconds, bound = cuda_gemm.unfused_seconds(gpu, m, n, k, True), "dequantize and dense"
            yield {"route": "large", "us": seconds * 1e6, "bound_by": bound}
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--devices", nargs="+", choices=DEVICES, default=list(DEVICES))
    parser.add_argument("--shapes", nargs="+", type=int, help="by number; all by default")
    parser.add_argument("-M", type=int, nargs="+", default=list(ROWS), help="rows")
    parser.add_argument("--tiles", action="store_true", help="cycles of a step of each tile alone")
    parser.add_argument(
        "--json", type=Path, default=Path(__file__).parent / "results/cuda_dispatch.json"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.tiles:
        for device in args.devices:
            print_tiles(device)
        return 0
    shapes = list(SHAPES.items())
    if args.shapes:
        shapes = [shapes[i] for i in args.shapes]
    results: list[dict[str, Any]] = []
    for device in args.devices:
        gpu, gemm = get_device(device), Gemm(device)
        gpu_name = device
        for pass_, pass_name in PASSES.items():
            for shape, (n, k) in shapes:
                weight = cuda_decode.weight(n, k)
                rows = []
                for m in args.M:
                    found = sorted(plans(gpu, gemm, weight, pass_, m, n, k), key=lambda f: f["us"])
                    choice = chosen(found, gpu, gemm, pass_, m, n, k)
                    regret = choice["us"] / found[0]["us"]
                    by_route = {}
                    for f in reversed(found):
                        by_route[f["route"]] = round(f["us"], 2)
                    results.append({
                        "device": gpu_name, "pass": pass_name, "shape": shape, "n": n, "k": k,
                        "m": m, "best": found[0], "chosen": choice, "regret": round(regret, 3),
                        "best_us_by_route": by_route, "ranking": found[:6],
                    })  # fmt: skip
                    rows.append([
                        str(m), text(found[0]), f"{found[0]['us']:.1f}", found[0]["bound_by"],
                        text(choice), f"{regret:.2f}",
                        " ".join(f"{r} {us:.1f}" for r, us in by_route.items()),
                    ])  # fmt: skip
                print(f"\n{gpu_name} {pass_name} {shape} {n} x {k} (modelled)")
                harness.print_table(
                    ["M", "best", "us", "bound by", "chosen", "regret", "routes, us"], rows
                )
                sys.stdout.flush()
                args.json.parent.mkdir(parents=True, exist_ok=True)
                args.json.write_text(json.dumps({"modelled": True, "cases": results}) + "\n")
    worst = max(results, key=lambda r: r["regret"])
    mean = math.exp(sum(math.log(r["regret"]) for r in results) / len(results))
    print(f"\nregret: mean {mean:.3f}, worst {worst['regret']:.2f} ({worst['device']} "
          f"{worst['pass']} {worst['shape']} M={worst['m']})")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
