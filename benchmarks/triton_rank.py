"""Which tile wins for the linear layer in Triton, and what it costs beside the CUDA half.

For each device, pass, shape and number of rows every candidate of ``qlora_kernels.triton.configs``
is launched through Triton in the emulator, the first program of each launch executed, and its
counts made a modelled time (docs/emulator_model.md): the weight from DRAM, SASS by the device's own
ptxas. The ranking is what the table of ``configs.py`` was taken from; ``regret`` is the time of the
table's choice over the best candidate's. ``large`` is dequantization at DRAM's pace and a dense
product (cuda_common.py).

The second table sets the table's choice beside the CUDA half, whose times are those of
``results/cuda_decode.json`` (a few rows) and ``results/cuda_dispatch.json`` (its GEMMs): run
``cuda_decode.py`` and ``cuda_dispatch.py`` first. The bars: 1.3 x for a few rows, 1.5 x for the
fused GEMM and for dX; where they are missed, what the counts say is beside it:

    SASS     instructions for 8 weights of a lane, all launches, and the issue slots that there are
    alu      those of the pipe that PRMT runs on, and the slots of that pipe
    shared   passes of shared memory and clocks of L1, and the clocks that there are
             (slots and clocks while the weight streams at the data sheet's bandwidth)

    python benchmarks/triton_rank.py                     # some 15 minutes of one core
    python benchmarks/triton_rank.py --devices a100 --shapes "7B q k v o" -M 1 16
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import cuda_common
import harness
import torch
from cuda_common import BITS, SHAPES, Bar

from qlora_kernels import formats
from qlora_kernels.emulator import model, sass, toolchain
from qlora_kernels.emulator.devices import Device, get_device
from qlora_kernels.emulator.triton_driver import EmulatedTriton
from qlora_kernels.triton import configs, input_grad, linear
from qlora_kernels.triton.configs import INPUT_GRAD, LINEAR, Config, Tile

ROWS = {LINEAR: (1, 2, 8, 16, 32, 64, 128), INPUT_GRAD: (1, 8, 16, 32, 64)}
FOLLOWS = 0.45  # of a launch's cost, for a launch behind another one in a graph
FEW = 16
_PASSES = {LINEAR: "forward", INPUT_GRAD: "dX"}


def weight_of(n: int, k: int) -> tuple:
    """Random bytes, nested scales: which code it is decides nothing but conflicts of look-ups."""
    blocks = n * k // 64
    return (
        torch.randint(0, 256, (n * k // 2,), dtype=torch.uint8),
        torch.randint(0, 256, (blocks,), dtype=torch.uint8),
        formats.get_format("nf4").tensors()[0].clone(), 64, torch.rand(-(-blocks // 256)),
        formats.nested_code().clone(), torch.tensor([0.1]),
    )  # fmt: skip


@dataclass
class Cost:
    """One way to do a product, modelled."""

    tile: tuple[int, ...] = ()
    splits: int = 1
    us: float = 0.0
    bound: str = ""
    sass: float = 0.0  # for 8 weights of a lane
    alu: float = 0.0
    shared: float = 0.0
    registers: int = 0
    spilled: int = 0
    parts: list[float] = field(default_factory=list)  # of `us`, launch by launch


def _work(launch: Any, device: Device) -> model.Work:
    counts = launch.result.counts
    kernel = launch.result.kernel
    cubin = toolchain.assemble(kernel.module.text, None)  # Triton compiled for this device
    use = cubin.resources[kernel.name]
    listing = toolchain.disassemble(cubin, lines="ptx")
    function = sass.parse(listing, kernel.module.text)[kernel.name]
    threads, blocks = 32 * launch.metadata.num_warps, math.prod(launch.grid)
    dynamic = function.dynamic(counts.by_ptx_line(), math.ceil(threads / 32))
    moved = sum(32.0 * (r["distinct_read"] + r["sectors_written"]) for r in counts.regions)
    work = model.work_of(
        kernel.name, dynamic, device, blocks=blocks, threads=threads, registers=use.registers,
        shared=use.shared + launch.metadata.shared, dram_read=0.0, dram_write=0.0,
        l2_bytes=moved * blocks, wavefronts=model.wavefronts_of(counts, dynamic) * blocks,
        l1_cycles=model.l1_cycles_of(counts, device) * blocks, emulated=1,
    )  # fmt: skip
    work.barriers = use.barriers
    return work


def cost(device: Device, op: str, m: int, weight: tuple, n: int, k: int, config: Config) -> Cost:
    """Of one product without LoRA, as the package launches it."""
    ins, outs = (k, n) if op == LINEAR else (n, k)
    x = torch.zeros(m, ins, dtype=torch.bfloat16)
    with EmulatedTriton(device.key, checks=("counts",), blocks=[0]) as gpu:
        if op == LINEAR:
            linear.product(x, weight, n, config, torch.bfloat16)
        else:
            input_grad.product(x, weight, k, config, torch.bfloat16)
    partial = 4.0 * config.splits * m * outs if config.splits > 1 else 0.0
    spilled = partial if partial > device.l2_bytes / 2 else 0.0
    found = Cost(tuple(config.tile), config.splits)
    eights = n * k / 8 / 32  # groups of 8 weights a lane
    for i, launch in enumerate(gpu.launches):
        work = _work(launch, device)
        if launch.name == "add_parts":
            work.dram_read, work.dram_write = spilled, 2.0 * m * outs
        else:
            work.dram_read = n * k * BITS[True] / 8 + 2.0 * m * ins
            work.dram_write = spilled if config.splits > 1 else 2.0 * m * outs
        time = model.model(work, device, launch=FOLLOWS if i else 1.0)
        found.us += time.time * 1e6
        found.parts.append(time.time * 1e6)
        found.sass += sum(work.pipes.values()) / eights
        found.alu += work.pipes.get("alu", 0.0) / eights
        found.shared += (work.wavefronts + work.l1_cycles) / eights
        if i == 0:
            found.bound, found.registers = time.bottleneck, work.registers
        found.spilled += launch.spilled
    return found


def large(device: Device, m: int, n: int, k: int) -> Cost:
    return Cost(us=cuda_common.dequantized_seconds(device, m, n, k) * 1e6, bound="large")


def splits_to_try(op: str, tile: Tile, m: int, n: int, k: int, device: Device) -> list[int]:
    """The rule's number; none, and half and twice of it."""
    rule = configs.splits_of(op, tile, m, n, k, device.sms)
    most = max(1, configs.steps_of(op, tile, n, k, 64) // configs.MIN_STEPS)
    return sorted(
        {1, max(1, rule // 2), rule, min(2 * rule, most)} if rule < 8 else {rule // 2, rule}
    )


def ranking(device: Device, op: str, m: int, weight: tuple, n: int, k: int) -> list[Cost]:
    """All candidates for the rows, the cheapest first."""
    found = [large(device, m, n, k)]
    for tile in configs.candidates(op, m):
        if tile.bm > 2 * max(m, 16):
            continue
        for splits in splits_to_try(op, tile, m, n, k, device):
            try:
                found.append(cost(device, op, m, weight, n, k, Config(tile, splits)))
            except ValueError:  # does not fit the device
                continue
    return sorted(found, key=lambda c: c.us)


# --- the CUDA half --------------------------------------------------------------------------------


def cuda_times(folder: Path) -> dict[tuple[str, str, int, int, int], tuple[float, str]]:
    """(device, pass, n, k, m): microseconds and route, without LoRA, of the kernel that runs."""
    found: dict[tuple[str, str, int, int, int], tuple[float, str]] = {}
    for f in json.loads((folder / "cuda_decode.json").read_text())["figures"]:
        which, rows, route, *lora = f["case"].split()
        if lora:
            continue
        key = (f["device"], LINEAR if which == "y" else INPUT_GRAD, f["n"], f["k"], int(rows[2:]))
        if key not in found or f["microseconds"] < found[key][0]:
            found[key] = (f["microseconds"], route)
    for c in json.loads((folder / "cuda_dispatch.json").read_text())["cases"]:
        op = LINEAR if c["pass"] == "forward" else INPUT_GRAD
        chosen = c["chosen"]
        found[c["device"], op, c["n"], c["k"], c["m"]] = (chosen["us"], chosen["route"])
    return found


def bar_of(op: str, m: int) -> float:
    return 1.3 if op == LINEAR and m <= FEW else 1.5


def nearest(times: dict, device: str, op: str, n: int, k: int, m: int) -> tuple[float, str] | None:
    """At m rows, or at 15 for 16: the CUDA half's gradient takes 15 by decoding."""
    return times.get((device, op, n, k, m)) or (
        times.get((device, op, n, k, 15)) if m == 16 else None
    )


# --- the report -----------------------------------------------------------------------------------


def main() -> int:
    parser = cuda_common.parser(__doc__, ("a100", "h100", "rtx4090"), ("7B q k v o", "70B gate up"))
    parser.add_argument("-M", type=int, nargs="+", help="rows")
    parser.add_argument("--cost", action="store_true", help="the table's choices alone")
    args = cuda_common.parse(parser)
    torch.manual_seed(0)
    theirs = cuda_times(Path(__file__).parent / "results")
    cases: list[dict[str, Any]] = []
    bars: list[Bar] = []
    for name in args.devices:
        device = get_device(name)
        slots = device.slots_per_8_weights()
        for shape in args.shapes:
            n, k = SHAPES[shape]
            weight = weight_of(n, k)
            rows = []
            for op in ROWS:
                for m in args.M or ROWS[op]:
                    ranked = [] if args.cost else ranking(device, op, m, weight, n, k)
                    config = configs.choose(
                        device.capability, op, m, n, k, torch.bfloat16, device.sms
                    )
                    if config is None:
                        chosen = large(device, m, n, k)
                    else:
                        chosen = cost(device, op, m, weight, n, k, config)
                    best = ranked[0] if ranked else chosen
                    regret = chosen.us / best.us
                    cuda = nearest(theirs, name, op, n, k, m)
                    why = (
                        f"SASS {chosen.sass:.0f} of {slots:.0f}, alu {chosen.alu:.0f} of "
                        f"{slots * device.sm.rate['alu'] / device.sm.issue:.0f}, shared "
                        f"{chosen.shared:.0f} of {slots / device.sm.issue:.0f}; {chosen.bound}"
                    )
                    ratio = math.nan
                    if cuda is not None and config is not None:
                        ratio = chosen.us / cuda[0]
                        what = f"{name} {shape}: {_PASSES[op]} M = {m} / CUDA's ({cuda[1]})"
                        bars.append(Bar(what, ratio, bar_of(op, m), why))
                    cases.append({
                        "device": name, "pass": _PASSES[op], "shape": shape, "n": n, "k": k, "m": m,
                        "chosen": asdict(chosen), "regret": regret,
                        "cuda_us": cuda[0] if cuda else None, "ratio": ratio if cuda else None,
                        "ranking": [asdict(c) for c in ranked[:6]],
                    })  # fmt: skip
                    rows.append([
                        _PASSES[op], str(m), _text(best), f"{best.us:.1f}", _text(chosen),
                        f"{chosen.us:.1f}", f"{regret:.2f}",
                        f"{cuda[0]:.1f} {cuda[1]}" if cuda else "", f"{ratio:.2f}", why,
                    ])  # fmt: skip
            print(f"\n{shape} {n} x {k} on {device} (modelled)")
            harness.print_table(
                [
                    "pass",
                    "M",
                    "best",
                    "us",
                    "chosen",
                    "us",
                    "regret",
                    "CUDA, us",
                    "x CUDA",
                    "counts",
                ],
                rows,
            )
    regrets = [c["regret"] for c in cases]
    mean = math.exp(sum(map(math.log, regrets)) / len(regrets))
    print(f"\nregret of the table: mean {mean:.3f}, worst {max(regrets):.2f}")
    cuda_common.print_bars(bars, met=False)
    cuda_common.write(args, bars, cases=cases)
    return 0


def _text(c: Cost) -> str:
    return f"{','.join(map(str, c.tile))} / {c.splits}" if c.tile else "large"


if __name__ == "__main__":
    raise SystemExit(main())
