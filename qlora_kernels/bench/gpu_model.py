"""Modelled times of the kernels on a GPU that is not here, from counts of the emulator.

``gpu_counts.json`` holds what ``benchmarks/gpu_counts.py`` counted with the emulator: of each GEMM
tile what one block does, as a line over the length of its contraction (exact but for its first and
last steps), and of the decode kernels the modelled time of each layer that it was asked of. A
GPU's figures turn them into times (docs/emulator_model.md). What neither has counted has no time:
:class:`NotCounted` says what is missing.

Everything here is *modelled*, never measured.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import asdict, dataclass, replace
from importlib import resources
from typing import Any

from .. import cuda
from ..emulator.devices import DEVICES, Device, get_device
from ..emulator.model import Work, model, occupancy

__all__ = ["EFFICIENCY", "Line", "NotCounted", "Time", "dense", "dequantize", "gemm", "linear"]

BITS = {False: 4.5, True: 4.127}  # a weight, blocks of 64: fp32 scales, nested ones
EFFICIENCY = 0.8
"""Of the tensor cores' data sheet that a large dense product reaches: 75 to 85% on an A100."""
FOLLOWS = 0.45
"""Of a launch's cost, for a launch behind another one."""
SCHEMA = 1


class NotCounted(LookupError):
    """The emulator was not asked about this kernel on this device and shape."""


@dataclass(frozen=True)
class Time:
    """A modelled time in seconds, what bounds it, and how it came about."""

    seconds: float
    bound: str
    route: str

    def then(self, other: Time) -> Time:
        """One after the other."""
        longer = max(self, other, key=lambda t: t.seconds)
        return Time(self.seconds + other.seconds, longer.bound, f"{self.route}, {other.route}")


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

    def as_json(self) -> dict[str, Any]:
        return {"at": self.at, "value": asdict(self.value), "slope": asdict(self.slope)}

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> Line:
        return cls(entry["at"], Work(**entry["value"]), Work(**entry["slope"]))

    @classmethod
    def through(cls, short: Work, long: Work, at: float, until: float) -> Line:
        """The line through the work of one block at two lengths."""
        a, b = (w.scaled(1) for w in (short, long))
        span = until - at

        def rise(x: dict[str, float], y: dict[str, float]) -> dict[str, float]:
            return {key: (y.get(key, 0.0) - v) / span for key, v in x.items()}

        slope = replace(
            a, pipes=rise(a.pipes, b.pipes), tensor=rise(a.tensor, b.tensor),
            l2_bytes=(b.l2_bytes - a.l2_bytes) / span,
            wavefronts=(b.wavefronts - a.wavefronts) / span,
            l1_cycles=(b.l1_cycles - a.l1_cycles) / span, cycles=(b.cycles - a.cycles) / span,
        )  # fmt: skip
        return cls(at, a, slope)


# --- what was counted -----------------------------------------------------------------------------


@functools.cache
def counts() -> dict[str, Any]:
    """The package's own counts, indexed for look-up."""
    text = resources.files(__package__).joinpath("gpu_counts.json").read_text()
    found = json.loads(text)
    if found.get("schema") != SCHEMA:
        raise RuntimeError(f"gpu_counts.json: schema {found.get('schema')}, expected {SCHEMA}")
    for entries in (found[kind] for kind in ("gemm", "sums", "decode", "adamw")):
        for e in entries:
            e["device"] = get_device(e["device"]).key  # "a100" is one of two
    return {
        "gemm": {
            (e["device"], e["pass"], tuple(e["tile"])): Line.from_json(e) for e in found["gemm"]
        },
        "sums": {e["device"]: Line.from_json(e) for e in found["sums"]},
        "decode": {
            (e["device"], e["pass"], e["route"], e["m"], e["n"], e["k"], e["rank"]): e
            for e in found["decode"]
        },
        "adamw": {(e["device"], e["bits"]): e for e in found["adamw"]},
    }


def counted_as(device: Device) -> str:
    """The device whose GEMM counts stand for ``device``'s: the same architecture's.

    Raises:
        NotCounted: of this architecture nothing was counted.
    """
    having = {key for key, _, _ in counts()["gemm"]}
    if device.key in having:
        return device.key
    for key in sorted(having):
        if DEVICES[key].capability == device.capability:
            return key
    raise NotCounted(
        f"the GEMM was not counted for {device.target} (counted: {', '.join(sorted(having))})"
    )


# --- kernels --------------------------------------------------------------------------------------


def dense(
    device: Device, m: int, n: int, k: int, efficiency: float = EFFICIENCY, launch: float = 1.0
) -> Time:
    """A dense bf16 product: its bytes at DRAM's pace or its products at cuBLAS's."""
    moved = 2.0 * (n * k + m * k + m * n) / device.dram_read
    products = 2.0 * m * n * k / (efficiency * (device.tensor.get("bf16") or device.tensor["fp16"]))
    bound = "tensor cores" if products > moved else "DRAM"
    return Time(max(moved, products) + launch * device.launch, bound, "dense")


def dequantize(device: Device, n: int, k: int, nested: bool = True, launch: float = 1.0) -> Time:
    """4 bits in, 16 out, at DRAM's pace."""
    moved = n * k * (BITS[nested] / 8 + 2.0)
    return Time(moved / device.dram_read + launch * device.launch, "DRAM", "dequantize")


def gemm(
    device: Device,
    backward: bool,
    m: int,
    n: int,
    k: int,
    tile: tuple[int, ...],
    splits: int,
    line: Line,
    sums: Line | None,
    nested: bool = True,
) -> Time:
    """The fused GEMM: a tile ``(m, n, k, warps, stages)``, the contraction cut in ``splits``."""
    tm, tn, tk = tile[:3]
    ins, outs, width, step = (n, k, tk, tn) if backward else (k, n, tn, tk)
    tiles = math.ceil(m / tm) * math.ceil(outs / width)
    steps = math.ceil(ins / step) / splits
    work = line.work(steps, tiles * splits)
    partial = splits * m * outs * 4.0 if splits > 1 else 0.0
    spilled = partial if partial > device.l2_bytes / 2 else 0.0
    # Rows are the grid's fastest index: x passes once, or, where L2 does not hold it beside the
    # weights, once for each of the columns of tiles that run at a time.
    x = m * ins * 2.0
    at_once = occupancy(device, work.threads, work.registers, work.shared, work.barriers).blocks
    columns = max(1, at_once * device.sms // math.ceil(m / tm))
    passes = math.ceil(math.ceil(outs / width) * splits / columns)
    work.dram_read = n * k * BITS[nested] / 8 + x * (passes if x > 0.75 * device.l2_bytes else 1)
    work.dram_write = spilled if splits > 1 else m * outs * 2.0
    found = model(work, device)
    seconds = found.time
    if splits > 1:
        assert sums is not None
        after = sums.work(splits, math.ceil(m * outs / 1024))
        after.l2_bytes = partial + m * outs * 2.0
        after.dram_read, after.dram_write = spilled, m * outs * 2.0
        seconds += model(after, device, launch=FOLLOWS).time
    text = f"gemm {'x'.join(map(str, tile[:3]))} / {splits}"
    return Time(seconds, found.bottleneck, text)


def decode(device: Device, backward: bool, route: str, m: int, n: int, k: int, rank: int) -> Time:
    """A decode kernel, as counted on that very layer.

    Between the numbers of rows that were counted the next one stands: a matrix instruction takes
    8 rows as it takes one.
    """
    pass_ = "dX" if backward else "forward"
    table = counts()["decode"]
    rows = [
        key[3] for key in table
        if key[:3] == (device.key, pass_, route) and key[4:] == (n, k, rank) and key[3] >= m
    ]  # fmt: skip
    if not rows or -(-min(rows) // 8) != -(-m // 8):
        with_rank = f", LoRA r = {rank}" if rank else ""
        raise NotCounted(
            f"{route} was not counted on {device.key} for {pass_}, M = {m}, {n}x{k}{with_rank} "
            "(benchmarks/gpu_counts.py counts it)"
        )
    entry = table[device.key, pass_, route, min(rows), n, k, rank]
    return Time(entry["us"] * 1e-6, entry["bound"], route)


def linear(
    device: str | Device,
    m: int,
    n: int,
    k: int,
    *,
    rank: int = 0,
    backward: bool = False,
    nested: bool = True,
) -> Time:
    """``y = x W^T`` (or dX), by the kernel that the dispatch chooses, in bf16, blocks of 64.

    With LoRA on the fused GEMM nothing was counted; where torch's matmul runs it is priced as the
    matmuls that it is.

    Raises:
        NotCounted: of what the dispatch chooses nothing was counted.
    """
    gpu = get_device(device)
    scales = "nested" if nested else "fp32"
    plan, _ = cuda.choose(gpu, m, n, k, rank=rank, scales=scales, backward=backward)
    if plan.route == "large":
        outs, ins = (k, n) if backward else (n, k)
        whole = dequantize(gpu, n, k, nested).then(dense(gpu, m, outs, ins, launch=FOLLOWS))
        return whole.then(lora(gpu, m, outs, ins, rank)) if rank else whole
    if plan.route != "gemm":
        return decode(gpu, backward, plan.route, m, n, k, rank)
    if rank:
        raise NotCounted("LoRA in the fused GEMM's accumulator was not counted")
    tile = (plan.tile_m, plan.tile_n, plan.tile_k, plan.warps, plan.stages)
    key = counted_as(gpu)
    pass_ = "dX" if backward else "forward"
    line = counts()["gemm"].get((key, pass_, tile))
    if line is None:
        raise NotCounted(f"the GEMM's tile {tile} was not counted on {key}")
    sums = counts()["sums"].get(key)
    return gemm(gpu, backward, m, n, k, tile, plan.splits, line, sums, nested)


def lora(device: Device, m: int, outs: int, ins: int, rank: int) -> Time:
    """What LoRA adds to dequantization and a matmul: casts of A and B, S, and ``addmm_``."""
    casts = 6.0 * rank * (ins + outs)
    s = 2.0 * (m * ins + rank * ins + m * rank) + 6.0 * m * rank
    added = 2.0 * (m * rank + rank * outs + 2 * m * outs)
    moved = (casts + s + added) / device.dram_read
    return Time(moved + 5 * FOLLOWS * device.launch, "DRAM", "LoRA by addmm_")


def adamw(device: str | Device, count: int, bits: int) -> Time:
    """A step on ``count`` fp32 parameters: bytes at DRAM's pace, or the counted issue slots.

    Raises:
        NotCounted: on this device the kernel was not counted.
    """
    gpu = get_device(device)
    entry = counts()["adamw"].get((gpu.key, bits))
    if entry is None:
        raise NotCounted(f"AdamW with {bits}-bit states was not counted on {gpu.key}")
    moved = count * entry["bytes"] / gpu.dram_read
    issued = count * entry["bytes"] / gpu.dram_bandwidth * entry["slots"]
    bound = "DRAM" if moved >= issued else "issue slots"
    return Time(max(moved, issued) + gpu.launch, bound, f"adamw, {bits}-bit states")
