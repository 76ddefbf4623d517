"""A modelled time for a kernel, from what it was counted to do and what a device is said to do.

Nothing here is measured, and every figure that comes out is labelled *modelled*.

**Throughput.** Each resource needs a time if it alone has to do its work: DRAM, L2 and the starting
of blocks over the whole device; the port to L2, shared memory and L1, issue slots, each arithmetic
pipe and the tensor cores on the multiprocessor that gets the most blocks (so the tail is in them).

**Latency.** One warp's path from its first instruction to its last, each waiting for its operands
and for nobody else (``warp_cycles``), and the turnaround between a block and its successor.

**Both together.** A multiprocessor is a closed queueing network: its resident warps (or blocks,
where a barrier in a loop makes their warps march in step) take turns between the resource that is
needed longest, where they queue, and the rest of their path, where they do not. Mean value analysis
(Reiser and Lavenberg, 1980) gives the exact throughput of such a network; it has no parameter to
fit. It approaches 1 / demand when there are many warps and warps / path when there are few, and
bends between: the bottleneck that is named is the resource from where on more warps would bring
nothing, and latency below.

The kernel's time is the rounds of resident blocks at that throughput, the last and smaller one at
its own, and a ramp, the first round's path; a launch comes before it.

No constant is fitted to the measurements that ``benchmarks/emulator_model.py`` compares with: they
are the device table's, and the latencies below with their sources. The structure was settled with
that table in view, so it is no blind test (docs/emulator_model.md). Known to be wrong:

- one resource queues, the others overlap with it perfectly. Where two are nearly balanced, a real
  kernel is slower than the model; register bank conflicts, dispatch stalls, the instruction cache
  and the reuse of register ports are unknown to it.
- DRAM has no banks, rows or directions: reads and writes cost the same, and mixed streams reach
  some 5 to 15% less than pure reads on HBM.
- L2 is one cache of one bandwidth for reads and writes. A100 and H100 have two halves, and an
  access to the far one costs more. Partition camping and set conflicts do not exist, and a store
  of a part of a sector costs what a whole one does: a transpose that scatters its stores by 16 KB
  is modelled 43 to 83% too fast, one that gathers its loads 36%.
- clocks are the table's: tensor kernels on 350 to 450 W parts throttle below them, GeForce parts
  run above theirs (products and attention on an RTX 5090: up to 24% too slow).
- register-tiled fp32 products that load, wait and compute in turn are modelled 35 to 40% too fast
  on an A6000, where cuBLAS itself reaches but 60% of the data sheet's peak; sums folded in shared
  memory by every second, fourth, ... thread 40% too fast.
- caches: L1 serves what a block reads again, whatever its size (a softmax that reads rows of 256 KB
  twice is modelled 31% too fast, a norm with a row a thread 57 to 67%); L2 keeps a buffer that fits
  in it, else what a wave of blocks shares while it runs (``wave_bytes``), and nothing from launch
  to launch (a copy of 64 MB that is repeated on an A100 with 40 MB of L2: 42% too slow).
- atomics to one address do not queue.
- warps of one block that do different things (producers and consumers) are averaged.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import sass, toolchain
from .devices import Device, Occupancy, get_device, occupancy
from .sass import Dynamic, Instruction, Loop, tensor_kind

__all__ = [
    "Modelled",
    "Work",
    "model",
    "profile",
    "warp_cycles",
    "wave_bytes",
    "work_of",
    "work_of_launch",
]

# Cycles until a result can be used, the same on every target. Read, in the notes that devices.py
# calls [N] and in Accel-Sim's configurations for A100 and H100: arithmetic 4 to 4.5; "xu" 17.6 for
# ex2, which is what softmaxes need (23 in Accel-Sim, 23.5 for sin, some 40 for rcp and rsq on Ada);
# fp64 8 on H100; a shuffle 24 to 25. The rest are assumptions of the size that arXiv:1804.06826
# and 1903.07486 report for Volta and Turing, entered from memory.
_LATENCY = {
    "fma": 4, "alu": 4, "imul": 4, "half": 4, "fp64": 8, "xu": 18, "uniform": 6, "const": 28,
    "control": 0, "unknown": 4, "tma": 0, "tcgen05": 20,
}  # fmt: skip
_SHUFFLE, _SPECIAL_REGISTER, _BARRIER, _BRANCH, _SHARED_ATOMIC = 24, 20, 22, 8, 60


@dataclass
class Work:
    """What one launch does, summed over the whole grid unless it says otherwise.

    ``pipes`` are warp instructions of SASS by pipe; ``dram_read``, ``dram_write`` and ``l2_bytes``
    bytes (the latter both ways between multiprocessors and L2); ``wavefronts`` passes through the
    data path of shared memory, ``l1_cycles`` clocks that global accesses take L1 (on the modelled
    device, see ``l1_cycles_of``); ``tensor`` operations by type of warp-wide matrix
    instructions, ``tensor_async`` of wgmma's and tcgen05's; ``cycles`` one warp's path on the
    modelled device, if it is known; ``lockstep`` whether a barrier in a loop makes a block's warps
    march together. ``blocks``, ``threads``, ``registers`` and ``shared`` (bytes a
    block, static and dynamic) are the launch's.
    """

    name: str
    blocks: int
    threads: int
    registers: int
    shared: int
    pipes: dict[str, float] = field(default_factory=dict)
    dram_read: float = 0.0
    dram_write: float = 0.0
    l2_bytes: float = 0.0
    wavefronts: float = 0.0
    l1_cycles: float = 0.0
    tensor: dict[str, float] = field(default_factory=dict)
    tensor_async: dict[str, float] = field(default_factory=dict)
    cycles: float = 0.0
    lockstep: bool = False
    barriers: int = 0

    def scaled(self, blocks: int, **changes: float) -> Work:
        """The same work in each block, for another number of blocks."""
        k = blocks / self.blocks
        out = Work(
            self.name, blocks, self.threads, self.registers, self.shared,
            {p: c * k for p, c in self.pipes.items()}, self.dram_read * k, self.dram_write * k,
            self.l2_bytes * k, self.wavefronts * k, self.l1_cycles * k,
            {t: c * k for t, c in self.tensor.items()},
            {t: c * k for t, c in self.tensor_async.items()}, self.cycles, self.lockstep,
            self.barriers,
        )  # fmt: skip
        for name, value in changes.items():
            setattr(out, name, value)
        return out


@dataclass
class Modelled:
    """A modelled time in seconds, and what it is made of.

    ``terms`` maps each resource to the time it alone would need, and ``latency`` to the time if
    nothing ever queued; ``bottleneck`` is the name of what decides. Of ``time``, ``launch`` seconds
    lie before the kernel, ``ramp`` are the first round's path, and ``tail`` are lost because the
    blocks do not divide evenly. ``waves`` is blocks over resident blocks.
    """

    name: str
    device: Device
    time: float
    bottleneck: str
    terms: dict[str, float]
    launch: float
    ramp: float
    tail: float
    occupancy: Occupancy
    waves: float

    @property
    def kernel(self) -> float:
        """Seconds without the launch: what a profiler calls the kernel's duration."""
        return self.time - self.launch

    def utilisation(self, term: str) -> float:
        """The share of the modelled kernel time that a resource is busy."""
        return self.terms.get(term, 0.0) / self.kernel

    def __str__(self) -> str:
        rows = [
            f"{self.name} on {self.device}: modelled {self.time * 1e6:.2f} µs, bound by "
            f"{self.bottleneck}",
            f"  occupancy {self.occupancy.share:.0%} ({self.occupancy.blocks} blocks a "
            f"multiprocessor, limited by {self.occupancy.limiter}), {self.waves:.2f} waves",
            f"  launch {self.launch * 1e6:.2f} µs, ramp {self.ramp * 1e6:.2f} µs, "
            f"tail {self.tail * 1e6:.2f} µs",
        ]
        for name, seconds in sorted(self.terms.items(), key=lambda t: -t[1]):
            if seconds:
                rows.append(f"  {name:24} {seconds * 1e6:10.2f} µs  {self.utilisation(name):6.1%}")
        return "\n".join(rows)


#: Resources of the whole device, which an uneven last round does not leave idle.
_SHARED = ("DRAM", "L2", "block launch")


def model(work: Work, device: str | Device, *, launch: bool | float = True) -> Modelled:
    """The modelled time of ``work`` on a device. ``launch=False`` leaves the launch's overhead out
    (the kernel's own duration); a number is that many times the device's.

    Raises ``ValueError`` for a launch that the device refuses.
    """
    device = get_device(device)
    sm = device.sm
    fit = occupancy(device, work.threads, work.registers, work.shared, work.barriers)
    if fit.blocks == 0:
        raise ValueError(
            f"{work.name} does not fit a multiprocessor of {device}: {work.threads} threads, "
            f"{work.registers} registers, {work.shared} bytes of shared memory ({fit.limiter})"
        )
    busiest = math.ceil(work.blocks / device.sms)  # blocks of the multiprocessor with the most
    share = busiest / work.blocks  # of the whole work
    clock = device.clock
    terms: dict[str, float] = {
        "DRAM": (work.dram_read + work.dram_write) / device.dram_read,
        "L2": work.l2_bytes / device.l2_bandwidth,
        # 64 bytes a clock between a multiprocessor and L2: an assumption, Volta's figure. What L2s
        # are measured to give with all multiprocessors reading is 35 each (A100, H100) or less.
        "L2 port": work.l2_bytes * share / (64 * clock),
        "shared memory and L1": (work.wavefronts + work.l1_cycles) * share / clock,  # one data path
        "issue slots": sum(work.pipes.values()) * share / (sm.issue * clock),
        "block launch": work.blocks * device.block_cycles / clock,
    }
    for pipe, count in work.pipes.items():
        if pipe in sm.rate:
            terms[f"issue slots ({pipe})"] = count * share / (sm.rate[pipe] * clock)
    tensor = 0.0
    for kind, flops in work.tensor.items():
        tensor += flops / (_tensor_rate(device, kind) * device.mma_sync)
    for kind, flops in work.tensor_async.items():
        tensor += flops / _tensor_rate(device, kind)
    terms["tensor cores"] = tensor * share * device.sms

    longest = max(terms, key=lambda name: terms[name])
    warps = -(-work.threads // 32)
    # Issue slots, arithmetic and tensor cores are a partition's own: a warp is served by a quarter
    # of them, and so for four times as long. Loads and stores, and all that lies behind them, are
    # the multiprocessor's.
    own = longest == "tensor cores" or longest.startswith("issue slots")
    servers = sm.partitions if own and longest != "issue slots (lsu)" else 1
    service = servers * terms[longest] / (busiest * warps)  # of one warp
    path = (work.cycles + device.block_turnaround) / clock if work.cycles else 0.0
    delay = max(0.0, path - service)

    def speed_of(blocks: int) -> float:
        """Blocks a second when that many are resident."""
        if work.lockstep:
            return _throughput(blocks, service * math.ceil(warps / servers), delay)
        customers = blocks * warps
        queue = max(1, customers // servers)  # on each server
        return _throughput(queue, service, delay) * customers / queue / warps

    resident = min(fit.blocks, busiest)
    rounds, rest = divmod(busiest, resident)
    speed = speed_of(resident)
    seconds = rounds * resident / speed + (rest / speed_of(rest) if rest else 0.0)
    demand = terms[longest] / busiest
    ramp = delay * demand * speed if rounds + (rest > 0) > 1 else 0.0
    terms["latency"] = math.ceil(busiest / resident) * path
    queued = resident * (1 if work.lockstep else warps / servers)
    each = service * (math.ceil(warps / servers) if work.lockstep else 1)
    saturated = queued * each >= delay + each
    bottleneck = longest if saturated or not path else "latency"
    even = work.blocks / (busiest * device.sms)
    tail = 0.0 if bottleneck in _SHARED else (seconds + ramp) * (1 - even)
    overhead = device.launch * float(launch)
    return Modelled(
        work.name, device, seconds + ramp + overhead, bottleneck, terms, overhead, ramp, tail, fit,
        work.blocks / (fit.blocks * device.sms),
    )  # fmt: skip


def _throughput(customers: int, demand: float, delay: float) -> float:
    """Customers a second through a closed network of one queue and one delay, by exact mean value
    analysis: who arrives finds the queue that the network with one customer fewer has."""
    queue = speed = 0.0
    for n in range(1, customers + 1):
        response = demand * (1 + queue)
        speed = n / max(delay + response, 1e-30)
        queue = speed * response
    return speed


def _tensor_rate(device: Device, kind: str) -> float:
    if kind in device.tensor:
        return device.tensor[kind]
    if kind == "fp16_acc16":
        # GeForce parts halve fp16 with fp32 accumulation; elsewhere both are the same.
        geforce = device.tensor.get("fp16", 0) < device.sms * device.clock * 1000
        return device.tensor["fp16"] * (2 if geforce else 1)
    raise ValueError(f"{device} has no tensor rate for {kind}: it has {', '.join(device.tensor)}")


# ------------------------------------------------------------------------------------------------
# One warp's path


class _Schedule:
    """In-order issue of one warp: when each instruction's operands are there, and its pipe free."""

    def __init__(self, device: Device, memory: Mapping[str, float]) -> None:
        self.device = device
        self.memory = memory
        self.time = 0.0
        self.ready: dict[str, float] = {}
        self.free: dict[str, float] = {}
        self.open: float = 0.0  # completion of the cp.async issued since the last commit
        self.groups: list[float] = []
        self.tensor_groups: list[float] = []

    def shift(self, cycles: float) -> None:
        self.time += cycles
        for table in (self.ready, self.free):
            for key in table:
                table[key] += cycles
        self.groups = [g + cycles for g in self.groups]
        self.tensor_groups = [g + cycles for g in self.tensor_groups]
        self.open += cycles

    def latency(self, i: Instruction) -> float:
        base, sm = i.base, self.device.sm
        if base in ("LDG", "LD", "LDL", "LDGSTS"):
            return self.memory["global"]
        if base in ("ATOM", "ATOMG"):
            return self.device.l2_latency
        if base in ("LDS", "LDSM", "ST", "STS"):
            return sm.shared_latency
        if base == "ATOMS":
            return _SHARED_ATOMIC
        if base in ("SHFL", "REDUX", "MATCH", "CREDUX"):
            return _SHUFFLE
        if base in ("S2R", "S2UR"):
            return _SPECIAL_REGISTER
        if i.pipe == "tensor":
            k = (i.tensor_shape or (0, 0, 16))[2]
            return sm.mma_latency if k >= 16 else sm.mma_latency * 0.55
        return _LATENCY.get(i.pipe, 4)

    def interval(self, i: Instruction) -> float:
        """Cycles for which the instruction's pipe in one partition takes no other."""
        sm = self.device.sm
        if i.pipe == "tensor" and i.tensor_flops:
            rate = _tensor_rate(self.device, tensor_kind(i))
            if "GMMA" not in i.base:
                rate *= self.device.mma_sync
            return i.tensor_flops * 4 * self.device.sms * self.device.clock / rate / 1.0
        return sm.partitions / sm.rate[i.pipe] if i.pipe in sm.rate else 1.0

    def issue(self, i: Instruction) -> None:
        reads, writes = i.registers
        start = self.time
        for name in reads:
            start = max(start, self.ready.get(name, 0.0))
        for name in writes:  # a pending load must not overtake
            start = max(start, self.ready.get(name, 0.0) - 1)
        start = max(start, self.free.get(i.pipe, 0.0))
        if i.base == "DEPBAR" and i.operands and i.operands[0].startswith("SB"):
            keep = int(i.operands[1], 16) if len(i.operands) > 1 else 0
            done = self.groups[: len(self.groups) - keep] if keep else self.groups
            start = max([start, *done])
        elif i.base == "WARPGROUP" and "DEPBAR" in i.opcode:
            keep = int(i.operands[-1], 16) if i.operands else 0
            done = self.tensor_groups[: len(self.tensor_groups) - keep]
            start = max([start, *done])
        elif i.base in ("MEMBAR", "FENCE"):
            start += self.device.l2_latency
        self.free[i.pipe] = start + self.interval(i)
        end = start + self.latency(i)
        if i.base == "LDGSTS":
            self.open = max(self.open, end)
        elif i.base == "LDGDEPBAR":
            self.groups.append(self.open)
        elif "GMMA" in i.base:
            self.tensor_groups.append(end + self.interval(i))
        elif i.base == "BAR":
            start += _BARRIER
        for name in writes:
            self.ready[name] = end
        self.time = start + 1
        if i.base in ("BRA", "BRX", "CALL", "RET", "BSYNC"):
            self.time += _BRANCH if not i.predicated else _BRANCH / 2


def warp_cycles(dynamic: Dynamic, device: str | Device, *, global_latency: float) -> float:
    """Cycles from a warp's first instruction to its last if it never waits for another warp.

    Blocks that at least every second pass runs are walked in the order of their addresses; a loop
    is walked up to four times, and the last pass stands for the rest of its trips.
    ``global_latency`` is what a load from global memory takes (``work_of`` mixes it).
    """
    device = get_device(device)
    function = dynamic.function
    loops = function.loops
    state = _Schedule(device, {"global": global_latency})

    def parent(inner: Loop) -> Loop | None:
        around = [x for x in loops if inner.blocks < x.blocks]
        return min(around, key=lambda x: len(x.blocks), default=None)

    children: dict[int | None, list[Loop]] = {}
    for loop in loops:
        around = parent(loop)
        children.setdefault(around.header if around else None, []).append(loop)

    def walk(region: frozenset[int], header: int | None, passes: float) -> None:
        inner = {x.header: x for x in children.get(header, [])}
        inside = {b for x in inner.values() for b in x.blocks}
        for b in sorted(region):
            if b in inner:
                repeat(inner[b], passes)
            elif b not in inside and dynamic.trips[b] >= 0.5 * passes:
                for instruction in function.blocks[b].instructions:
                    state.issue(instruction)

    def repeat(loop: Loop, passes: float) -> None:
        entries = dynamic.entries.get(loop.header, 0.0)
        trips = dynamic.trips[loop.header] / max(entries, 1e-30)
        if entries < 0.5 * passes or trips < 0.5:
            return
        # How often the loop is entered in one pass of what surrounds it.
        times = max(1.0, entries / passes)
        before = state.time
        last = 0.0
        for _ in range(min(4, round(trips))):
            start = state.time
            walk(loop.blocks, loop.header, dynamic.trips[loop.header])
            last = state.time - start
        state.shift(last * max(0.0, trips - 4))
        if times > 1:
            state.shift((state.time - before) * (times - 1))

    walk(frozenset(range(len(function.blocks))), None, dynamic.warps)
    return state.time


def lockstep_of(dynamic: Dynamic) -> bool:
    """Whether a block's warps meet at a barrier in every trip of some loop that runs."""
    for loop in dynamic.function.loops:
        for b in loop.blocks:
            if dynamic.trips[b] >= 2 * dynamic.warps:
                if any(i.base == "BAR" for i in dynamic.function.blocks[b].instructions):
                    return True
    return False


# ------------------------------------------------------------------------------------------------
# From counts to work


def wave_bytes(
    footprint: float,
    fresh: Sequence[float],
    grid: Sequence[int],
    wave: int,
    cache: float = 0.0,
) -> float:
    """Bytes of one buffer that a grid of blocks fetches from DRAM, ``wave`` blocks at a time.

    ``footprint`` is what one block touches of it, ``fresh[i]`` the share of that which the next
    block along dimension i does not touch (1: a part of its own, 0: the same). Blocks of a wave
    share what they have in common, as if they marched in step; of an earlier wave nothing is left,
    unless the buffer fits in ``cache`` bytes as a whole: then each byte is fetched once.
    """
    gx, gy, gz = grid
    fx, fy, fz = fresh

    def union(nx: int, ny: int, nz: int) -> float:
        if min(nx, ny, nz) < 1:
            return 0.0
        return footprint * (1 + (nx - 1) * fx) * (1 + (ny - 1) * fy) * (1 + (nz - 1) * fz)

    whole = union(gx, gy, gz)
    if whole <= cache:
        return whole
    wave = max(1, wave)
    # A wave is whole rows of x, or a part of one; whole planes of x and y, or a part of one.
    if wave <= gx:
        total = (gx // wave) * union(wave, 1, 1) + union(gx % wave, 1, 1) * (gx % wave > 0)
        return total * gy * gz
    rows = wave / gx
    if rows <= gy:
        waves = gy / rows
        return waves * footprint * (1 + (gx - 1) * fx) * (1 + (rows - 1) * fy) * gz
    planes = rows / gy
    waves = gz / planes
    return waves * union(gx, gy, 1) * (1 + (planes - 1) * fz)


def work_of(
    name: str,
    dynamic: Dynamic,
    device: str | Device,
    *,
    blocks: int,
    threads: int,
    registers: int,
    shared: int,
    dram_read: float,
    dram_write: float,
    l2_bytes: float,
    wavefronts: float,
    l1_cycles: float,
    emulated: int | None = None,
    l1_hits: float = 0.0,
) -> Work:
    """Put a launch's work together: SASS from ``dynamic`` (of ``emulated`` blocks, all by default),
    scaled to ``blocks``; bytes and wavefronts as the caller has them for all ``blocks``.

    ``l1_hits`` is the share of loads served by L1; of the rest, those that DRAM serves are the
    share of L2's bytes that came from there.
    """
    device = get_device(device)
    scale = blocks / (emulated or blocks)
    from_dram = min(1.0, (dram_read + dram_write) / l2_bytes) if l2_bytes else 0.0
    beyond = device.l2_latency + from_dram * (device.dram_latency - device.l2_latency)
    latency = l1_hits * device.sm.l1_latency + (1 - l1_hits) * beyond
    warp_wide: dict[str, float] = {}
    asynchronous: dict[str, float] = {}
    for block, trips in zip(dynamic.function.blocks, dynamic.trips, strict=True):
        for i in block.instructions:
            if i.tensor_flops:
                table = asynchronous if re.search("GMMA|UTC", i.base) else warp_wide
                kind = tensor_kind(i)
                table[kind] = table.get(kind, 0.0) + i.tensor_flops * float(trips) * scale
    return Work(
        name, blocks, threads, registers, shared,
        {p: float(c) * scale for p, c in dynamic.pipes().items()}, dram_read, dram_write, l2_bytes,
        wavefronts, l1_cycles, warp_wide, asynchronous,
        warp_cycles(dynamic, device, global_latency=latency), lockstep_of(dynamic),
    )  # fmt: skip


def _rows(counts: Any) -> dict[str, Any]:
    table = counts.instructions
    return {name: table[name] for name in table.dtype.names}


def l1_cycles_of(counts: Any, device: str | Device) -> float:
    """Clocks for which a launch's global accesses occupy the L1s of a device, added up.

    A request looks up one line of 128 bytes a clock, and moves ``l1_bytes_clk`` bytes a clock: it
    takes the longer. How many lines it touches is read off its sectors: four to a line, unless it
    moves more than twice the sectors that its bytes need; then its lanes lie in lines of their own.
    """
    rows = _rows(counts)
    sectors = rows["sectors"].astype(float)
    scattered = sectors > 2.0 * rows["sectors_ideal"]
    tags = np.where(scattered, sectors, sectors / 4.0)
    data = sectors * 32.0 / get_device(device).sm.l1_bytes_clk
    return float(np.maximum(tags, data).sum())


_SHARED_ACCESS = ("LDS", "STS", "LDSM", "STSM", "ATOMS")


def wavefronts_of(counts: Any, dynamic: Dynamic) -> float:
    """Passes through shared memory's data path, for the accesses that ptxas left.

    ptxas joins scalar accesses of neighbouring words, even of several trips of a loop, into vector
    ones: fewer instructions, each of which takes as many passes as one of those it joins did (its
    words lie in other banks than theirs; lanes that are v words apart conflict v times already). So
    the passes of an access are those that the emulator counted for its line, and how often it runs
    is SASS. What moves through cp.async and atomics is the emulator's count.
    """
    rows = _rows(counts)
    lines = np.array([row.ptx_line for row in counts.kernel.instructions])
    runs = dynamic.by_line(_SHARED_ACCESS)
    total = 0.0
    for line in np.unique(lines[rows["wavefronts"] > 0]):
        here = lines == line
        passes, times = float(rows["wavefronts"][here].sum()), float(rows["warps"][here].sum())
        opcode = counts.kernel.instructions[int(np.flatnonzero(here)[0])].opcode
        if re.match(r"(ld|st|ldmatrix|stmatrix)\b", opcode):
            # A line without SASS of its own was joined to a neighbour's.
            total += passes / times * min(runs.get(int(line), 0.0), times)
        else:
            total += passes
    return total


def profile(
    kernel: Any,
    grid: Sequence[int] | int,
    block: Sequence[int] | int,
    args: Sequence[Any],
    device: str | Device,
    *,
    shared_bytes: int = 0,
    target: str | None = None,
    dram_read: float | None = None,
    dram_write: float | None = None,
    **options: Any,
) -> tuple[Work, Dynamic]:
    """Run representative blocks of a launch and put together what all of it does.

    The first block is emulated, and for each dimension of the grid the first two along it: a
    kernel whose blocks do the same work wherever they are is known by them (tiles, not edges; a
    grid-stride loop sees the whole grid). The first gives instructions (SASS for ``target``, the
    device's own by default, times trips), sectors and wavefronts; the pairs show which bytes
    neighbours share, from which ``wave_bytes`` has the traffic of DRAM; ``dram_read`` and
    ``dram_write`` (bytes) overrule it. L1 is taken to serve what a block reads again.

    Returns the `Work` for ``model`` and the `Dynamic` for reports.
    """
    device = get_device(device)
    shape = tuple(grid) if isinstance(grid, Sequence) else (int(grid),)
    full = (*shape, 1, 1)[:3]

    def run(*blocks: int) -> Any:
        from . import emulate

        return emulate(
            kernel, full, block, args, device=device, checks=("counts",),
            shared_bytes=shared_bytes, blocks=blocks, **options,
        ).counts  # fmt: skip

    single = run(0)
    steps = (1, full[0], full[0] * full[1])
    pairs = [run(0, s) if n > 1 else None for n, s in zip(full, steps, strict=True)]

    text = kernel.module.text
    functions = sass.load(text, target or device.target)
    cubin = toolchain.assemble(text, target or device.target)
    use = cubin.resources[kernel.name]
    sides = tuple(block) if isinstance(block, Sequence) else (int(block),)
    threads = math.prod(sides)
    blocks = math.prod(full)
    warps = math.ceil(threads / 32)
    executions = single.by_ptx_line()
    dynamic = functions[kernel.name].dynamic(executions, warps)
    shared = use.shared + shared_bytes
    fit = occupancy(device, threads, use.registers, shared)
    wave = max(1, fit.blocks) * device.sms

    read = write = 0.0
    sectors = distinct = 0.0
    for index, region in enumerate(single.regions):
        for kind in ("read", "written"):
            own = 32.0 * region[f"distinct_{kind}"]
            if own == 0:
                continue
            fresh = []
            for pair in pairs:
                both = 32.0 * pair.regions[index][f"distinct_{kind}"] if pair else own
                fresh.append(min(1.0, max(0.0, both / own - 1.0)))
            moved = wave_bytes(own, fresh, full, wave, device.l2_bytes)
            if kind == "read":
                read += moved
            else:
                write += moved
        sectors += region["sectors_read"]
        distinct += region["distinct_read"]
    written = sum(region["sectors_written"] for region in single.regions)
    hits = 1.0 - distinct / sectors if sectors else 0.0
    work = work_of(
        kernel.name, dynamic, device, blocks=blocks, threads=threads, registers=use.registers,
        shared=shared, dram_read=read if dram_read is None else dram_read,
        dram_write=write if dram_write is None else dram_write,
        l2_bytes=32.0 * (distinct + written) * blocks,
        wavefronts=wavefronts_of(single, dynamic) * blocks,
        l1_cycles=l1_cycles_of(single, device) * blocks,
        emulated=1, l1_hits=hits,
    )  # fmt: skip
    work.barriers = use.barriers
    return work, dynamic


def work_of_launch(launch: Any, device: str | Device) -> tuple[Work, Dynamic]:
    """The work of a launch that ran whole, as ``EmulatedRuntime.launches`` holds it.

    Every block was emulated, so nothing is scaled: each distinct sector is fetched from DRAM once,
    and every sector that a request asked for moves from L2 (what L1 saves is not known here:
    ``profile`` looks at one block for that).
    """
    device = get_device(device)
    counts = launch.counts
    cubin = toolchain.assemble(launch.ptx, device.target)
    use = cubin.resources[launch.kernel]
    function = sass.load(launch.ptx, device.target)[launch.kernel]
    warps = launch.blocks * math.ceil(launch.threads / 32)
    dynamic = function.dynamic(counts.by_ptx_line(), warps)
    regions = list(counts.regions)
    work = work_of(
        launch.name, dynamic, device, blocks=launch.blocks, threads=launch.threads,
        registers=use.registers, shared=use.shared + launch.shared,
        dram_read=32.0 * sum(r["distinct_read"] for r in regions),
        dram_write=32.0 * sum(r["distinct_written"] for r in regions),
        l2_bytes=32.0 * sum(r["sectors_read"] + r["sectors_written"] for r in regions),
        wavefronts=wavefronts_of(counts, dynamic), l1_cycles=l1_cycles_of(counts, device),
    )  # fmt: skip
    work.barriers = use.barriers
    return work, dynamic
