# ruff: noqa: E501 -- a device of the table is a few long lines
"""Public figures of GPUs, with their sources, and the occupancy that follows from them.

Every number is per device at its boost clock unless its name says otherwise. A tag says where it
was read, and how near to its origin:

``[B]`` the results recorded in github.com/te42kyfo/gpu-benches: read.
``[O]`` ``cuda_occupancy.h`` of the CUDA toolkit: read, and a test runs it against ``occupancy``.
``[X]`` properties that the CUDA driver reported, recorded in github.com/openxla/xla
    (xla/backends/gpu/target_config/specs: A100 40 and 80 GB, A6000, H100 SXM and PCIe, B200; H200's
    looks put together from its data sheet), and its cuda_core_info_table.cc (units of a
    multiprocessor, clocks of tensor cores): read.
``[W]`` NVIDIA's architecture whitepapers: A100's in part (text without its tables); of GA102's,
    Ada's, H100's and RTX Blackwell's only the tables that others quote with their page.
``[D]`` NVIDIA's data sheets, as sellers and device databases reprint them.
``[G]`` throughput of native arithmetic instructions in NVIDIA's guides: the column of capability
    7.x in a translation, that of 12.0 (guide 13.4) as quoted; 8.0, 9.0 and 10.0 as far as ``[X]``
    took them (fp16, fp32, fp64, int32). 8.6 and 8.9 are assumed to be 12.0's.
``[H]`` arXiv:2402.13499 and 2501.12084, "Dissecting the NVIDIA Hopper GPU Architecture": their
    tables as quoted, and the logs in github.com/HPMLL/NVIDIA-Hopper-Benchmark, read.
``[N]`` measurements in engineers' notes in public repositories, found by a text search that does
    not name the repository: a survey of B200 with measurements, two of mma.sync on B200 and GB200,
    the SASS latencies of an RTX 4070 Ti and of sm_120.
``[A]`` an assumption, for want of anything that could be read; it says why.

docs/emulator_model.md lists what was looked for and not found. Where no measurement is public for a
device, the value of its nearest relative is scaled by what the data sheets say, and the source says
``from`` whom: that, too, is an assumption.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any

__all__ = ["DEVICES", "Device", "Occupancy", "Sm", "get_device", "occupancy"]


@dataclass(frozen=True)
class Sm:
    """One multiprocessor of a compute capability.

    Rates are warp instructions a clock a multiprocessor: 128 lanes of fp32 are a rate of 4. A pipe
    that is not listed is not modelled.
    """

    threads: int  # resident threads [X] 8.0, 8.6, 9.0, 10.0; as quoted 8.9, 12.0; [A] 7.5
    blocks: int  # resident blocks [O]
    shared: int  # bytes of shared memory at the largest carve-out, as `threads`
    shared_optin: int  # bytes a block may ask for, as `threads`
    shared_reserved: int  # bytes a block gives to the system [O]
    shared_granularity: int  # bytes [O]
    rate: dict[str, float]  # see below
    registers: int = 65536  # [X]
    partitions: int = 4  # [O]
    issue: float = 4.0  # warp instructions a clock: one a scheduler [W] GA102, quoted
    l1_bytes_clk: int = 128  # [B] gpu-cache, hits: A100 126, A40 64.5, L40 63.7
    # Cycles, load to use, L1 hit [B]: A100 36, H100 34.2, L40 36; [H] A100 32.7, H800 32.0, RTX 4090
    # 36.0; [N] B200 39.6.
    l1_latency: int = 34
    shared_latency: int = 29  # cycles [H] 29.0 A100 and H800, 30.1 4090; [N] 29.0 B200
    # Cycles, dependent m16n8k16 HMMA with fp32 accumulation: [N] 33 of the 35 that a chain costs on
    # sm_120, "about 23" on B200; [A] for the others, whose table in [H] could not be read.
    mma_latency: int = 33


# Warp instructions a clock a multiprocessor: [G], with these readings of it. "alu" is logic, shift,
# compare, select, permute (64 lanes) and integer add (128 lanes on 12.0, 64 before); "imul"
# multiplies and multiply-adds of integers (64 lanes); "xu" special functions and conversions (16
# lanes); "half" packed fp16 and bf16 arithmetic, instructions and not results (bf16 at A100's half
# rate is not told apart); "fp64". [A]: "lsu", the issue of one memory instruction (wavefronts are
# counted apart), is 32 load/store units' on A100, H100 and B200 and 16 units' elsewhere, as the
# whitepapers draw them; shuffles are counted with it, though [G] gives them 32 lanes everywhere.
# [A]: "uniform", the scalar datapath, and "control" one instruction in two clocks a partition.
_RATE_75 = {"fma": 2, "imul": 2, "alu": 2, "half": 2, "xu": 0.5, "lsu": 0.5, "uniform": 2,
            "control": 2, "fp64": 0.0625}  # fmt: skip
_RATE_80 = {**_RATE_75, "half": 4, "lsu": 1, "fp64": 1}
_RATE_86 = {**_RATE_75, "fma": 4}
_RATE_90 = {**_RATE_75, "fma": 4, "half": 4, "lsu": 1, "fp64": 2}
_RATE_100 = {**_RATE_90, "half": 2}

_SM = {
    (7, 5): Sm(1024, 16, 65536, 65536, 0, 256, _RATE_75, l1_bytes_clk=64),
    (8, 0): Sm(2048, 32, 167936, 166912, 1024, 128, _RATE_80),
    (8, 6): Sm(1536, 16, 102400, 101376, 1024, 128, _RATE_86, l1_bytes_clk=64, l1_latency=36),
    (8, 9): Sm(1536, 24, 102400, 101376, 1024, 128, _RATE_86, l1_bytes_clk=64, l1_latency=36),
    (9, 0): Sm(2048, 32, 233472, 232448, 1024, 128, _RATE_90),
    (10, 0): Sm(2048, 32, 233472, 232448, 1024, 128, _RATE_100, l1_latency=40, mma_latency=23),
    (12, 0): Sm(1536, 24, 102400, 101376, 1024, 128, _RATE_86, l1_bytes_clk=64, l1_latency=36),
}


@dataclass(frozen=True)
class Device:
    """A GPU as its maker and its measurers describe it.

    Attributes (units): ``clock`` Hz; ``dram_bandwidth`` bytes/s of the data sheet;
    ``dram_read`` bytes/s that a kernel which only reads was measured to get (the ceiling that the
    model uses); ``l2_bytes``; ``l2_bandwidth`` bytes/s, reads, measured; ``tensor`` dense FLOP/s by
    type with fp32 accumulation (integer operations for ``int8``); ``mma_sync`` the share of it that
    warp-wide ``mma.sync`` reaches; latencies in cycles; ``launch`` seconds from one kernel's end to
    the next one's start when both are queued in a stream (a graph's nodes follow each other in some
    0.45 of it); ``block_cycles`` the clocks from the start of one block to that of the next, over
    the whole device; ``block_turnaround`` the clocks that a slot of a multiprocessor needs between
    the end of a block and the first instruction of the next.
    """

    key: str
    name: str
    capability: tuple[int, int]
    sms: int
    clock: float
    memory: int
    dram_bandwidth: float
    dram_read: float
    l2_bytes: int
    l2_bandwidth: float
    tensor: dict[str, float]
    sources: dict[str, str]
    mma_sync: float = 1.0
    l2_latency: int = 265
    dram_latency: int = 630
    # [B] gpu-small-kernels: the period of queued kernels of 64 kB (A100 2.7, H200 2.5, L40 1.6 µs;
    # as a graph 1.36, 1.3, 1.0), less the 0.7, 0.6 and 0.5 µs of the kernel's own latencies.
    launch: float = 2.0e-6
    # [B] gpu-small-kernels: the limit of blocks of one warp (1.34, 1.66, 1.86 blocks a nanosecond).
    block_cycles: float = 1.2
    # [B] gpu-stream, init at 2 blocks of 64 threads a multiprocessor, which do nothing but store:
    # clocks from one block of a slot to the next (A100 376, A40 377, H100 and H200 453, L40 563)
    # less the instructions' own.
    block_turnaround: int = 350
    memory_clock_khz: int = 0
    bus_bits: int = 0
    aliases: tuple[str, ...] = field(default=())

    @property
    def sm(self) -> Sm:
        return _SM[self.capability]

    @property
    def target(self) -> str:
        """The architecture to compile for, such as ``"sm_90"``."""
        return f"sm_{self.capability[0]}{self.capability[1]}"

    @property
    def max_warps(self) -> int:
        return self.sm.threads // 32

    @property
    def fp32_flops(self) -> float:
        return self.sms * self.clock * self.sm.rate["fma"] * 64

    @property
    def issue_slots(self) -> float:
        """Warp instructions a second, over all multiprocessors."""
        return self.sms * self.clock * self.sm.issue

    def slots_per_8_weights(self, bits: float = 4.127, bandwidth: float | None = None) -> float:
        """Issue slots that a lane has for each 8 weights of ``bits`` bits while weights stream at
        the data sheet's DRAM bandwidth (or ``bandwidth``): a decoder that needs more SASS than
        this is bound by issue, not by memory."""
        eights = (bandwidth or self.dram_bandwidth) / bits  # groups of 8 weights a second
        return 32 * self.issue_slots / eights

    def __str__(self) -> str:
        return self.name


def _tensor(sms: int, clock: float, fp16: int, **others: int) -> dict[str, float]:
    """Dense FLOP/s from FLOP a clock a multiprocessor; bf16 as fp16 unless given."""
    rates = {"fp16": fp16, "bf16": fp16, **others}
    return {kind: sms * clock * rate for kind, rate in rates.items() if rate}


GB, MB = 10**9, 2**20
_READ = 0.93  # of the data sheet, where nobody's measurement of the device is at hand: the mean of
#               the measured ones below, rounded (A100-40 .958, A100-80 .92, H100 SXM .964, H100
#               PCIe .975, H200 .81, L40 .977, A40 .976, B200 .88)


def _device(key: str, name: str, capability: tuple[int, int], sms: int, mhz: float, gib: int,
            gbs: float, l2_mb: float, l2_gbs: float, tensor: dict[str, int], sources: dict[str, str],
            read: float | None = None, **more: Any) -> Device:  # fmt: skip
    clock = mhz * 1e6
    pace = _PACE.get(capability, (2.0e-6, 1.2, 350))
    more.update(zip(("launch", "block_cycles", "block_turnaround"), pace, strict=True))
    return Device(
        key=key, name=name, capability=capability, sms=sms, clock=clock, memory=gib * 2**30,
        dram_bandwidth=gbs * GB, dram_read=(gbs * _READ if read is None else read) * GB,
        l2_bytes=int(l2_mb * MB), l2_bandwidth=l2_gbs * GB,
        tensor=_tensor(sms, clock, **tensor), sources=sources, **more,
    )  # fmt: skip


_ADA = "[W] Ada whitepaper, appendix A, quoted"
_PACE = {  # launch, block_cycles, block_turnaround; [A]: 7.5 and 10.0 get rounded means, 12.0 L40's
    (8, 0): (2.0e-6, 1.05, 332), (8, 6): (2.0e-6, 1.2, 332), (8, 9): (1.1e-6, 1.34, 518),
    (9, 0): (1.9e-6, 1.19, 382), (12, 0): (1.1e-6, 1.34, 518),
}  # fmt: skip
_MMA_SYNC_90 = "[H] H800: m16n8k16, fp32 accumulation, 490.7 of the sheet's 756.5 TFLOP/s"
_CLOCK_90 = "; [X] its tensor cores' clock, it boosts to 1,980 MHz"

_TABLE = [
    _device("t4", "Tesla T4", (7, 5), 40, 1590, 16, 320, 4, 1270, {"fp16": 1024, "bf16": 0, "int8": 2048},
            {"figures": "[D]; int8 [A], twice fp16",
             "l2": "[A] arXiv:1903.07486 (Jia et al.), from memory: 1,270 GB/s",
             "dram": "[A] 0.93 of the sheet", "latency": "[A] arXiv:1903.07486, from memory"},
            l2_latency=188, dram_latency=616, bus_bits=256, memory_clock_khz=5001000),
    _device("a10", "A10", (8, 6), 72, 1695, 24, 600, 6, 2200, {"fp16": 1024, "tf32": 512, "int8": 2048},
            {"figures": "[D]; tf32, int8 [A], as A40", "l2": "from A40, by clock and slices",
             "dram": "from A40, its share of its sheet, .976"},
            read=586, bus_bits=384, memory_clock_khz=6251000),
    _device("rtx3090", "GeForce RTX 3090", (8, 6), 82, 1695, 24, 936, 6, 2200,
            {"fp16": 512, "tf32": 256, "int8": 2048},
            {"figures": "[D]; tensor rates [W] GA102 whitepaper, table 9, quoted; tf32 [A], half of fp16",
             "l2": "from A40, by clock", "dram": "from A40, its share of its sheet, .976"},
            read=913, bus_bits=384, memory_clock_khz=9751000, aliases=("3090",)),
    _device("rtx3050-laptop", "GeForce RTX 3050 Laptop", (8, 6), 16, 1500, 4, 192, 1.5, 650,
            {"fp16": 512, "tf32": 256, "int8": 2048},
            {"figures": "github.com/Pupking/01_tiled_gemm: read (16 SMs, 1.5 GHz held, 1.5 MB of L2); "
                        "tensor rates from RTX 3090",
             "l2": "from A40, by bus width and clock", "dram": "from A40, its share of its sheet, .976"},
            read=187, bus_bits=128, memory_clock_khz=6001000),
    _device("a6000", "RTX A6000", (8, 6), 84, 1800, 48, 768, 6, 2300,
            {"fp16": 1024, "tf32": 512, "int8": 2048},
            {"figures": "[X]; fp16 [W] GA102 whitepaper, table 3, quoted; tf32, int8 [A], as A40",
             "l2": "from A40, by clock", "dram": "from A40, its share of its sheet, .976"},
            read=750, bus_bits=384, memory_clock_khz=8001000, aliases=("rtxa6000",)),
    _device("a40", "A40", (8, 6), 84, 1740, 48, 696, 6, 2260,
            {"fp16": 1024, "tf32": 512, "int8": 2048},
            {"figures": "[D]", "l2": "[B] gpu-cache, a40", "dram": "[B] gpu-stream, a40: read 679 GB/s"},
            read=679, bus_bits=384, memory_clock_khz=7251000),
    _device("a100-40", "A100-SXM4-40GB", (8, 0), 108, 1410, 40, 1555, 40, 5400,
            {"fp16": 2048, "tf32": 1024, "int8": 4096},
            {"figures": "[X]; [W] 16 x fp32's rate; tf32, int8 [X] core table", "l2": "[B] gpu-l2-cache, a100_80",
             "dram": "[B] gpu-stream, a100_40: read 1,490 GB/s", "latency": "[B] gpu-latency, a100_40"},
            read=1490, l2_latency=211, dram_latency=574, bus_bits=5120, memory_clock_khz=1215000),
    _device("a100-80", "A100-SXM4-80GB", (8, 0), 108, 1410, 80, 2039, 40, 5400,
            {"fp16": 2048, "tf32": 1024, "int8": 4096},
            {"figures": "[X]; tensor rates as A100-SXM4-40GB", "l2": "[B] gpu-l2-cache, a100_80: 5,415 GB/s",
             "dram": "[B] gpu-l2-cache, a100_80: 1,877 GB/s beyond the cache",
             "latency": "[B] gpu-latency, a100_80"},
            read=1877, l2_latency=211, dram_latency=571, bus_bits=5120, memory_clock_khz=1593000,
            aliases=("a100",)),
    _device("rtx4090", "GeForce RTX 4090", (8, 9), 128, 2520, 24, 1008, 72, 4800,
            {"fp16": 512, "tf32": 256, "int8": 2048, "fp8": 1024},
            {"figures": _ADA + "; tf32 [A], half of fp16", "l2": "from L40, by SMs and clock ([H]: 1,708 "
                        "bytes a clock of an RTX 4090, 4,304 GB/s at this clock)",
             "dram": "from L40, its share of its sheet, .977", "latency": "[B] gpu-latency, l40"},
            read=985, l2_latency=276, dram_latency=632, bus_bits=384, memory_clock_khz=10501000,
            aliases=("4090",)),
    _device("l4", "L4", (8, 9), 58, 2040, 24, 300, 48, 1760,
            {"fp16": 1024, "tf32": 512, "int8": 2048, "fp8": 2048},
            {"figures": "[D]; SMs from its fp32 and fp16 rates, databases disagree", "l2": "from L40, by SMs "
                        "and clock",
             "dram": "from L40, its share of its sheet, .977", "latency": "[B] gpu-latency, l40"},
            read=293, l2_latency=276, dram_latency=632, bus_bits=192, memory_clock_khz=6251000),
    _device("l40", "L40", (8, 9), 142, 2490, 48, 864, 96, 5240,
            {"fp16": 512, "tf32": 256, "int8": 1024, "fp8": 1024},
            {"figures": "[D]", "l2": "[B] gpu-l2-cache, l40",
             "dram": "[B] gpu-stream, l40: read 844 GB/s", "latency": "[B] gpu-latency, l40"},
            read=844, l2_latency=276, dram_latency=632, bus_bits=384, memory_clock_khz=9001000),
    _device("l40s", "L40S", (8, 9), 142, 2520, 48, 864, 96, 5300,
            {"fp16": 1024, "tf32": 512, "int8": 2048, "fp8": 2048},
            {"figures": "[D]", "l2": "from L40, by clock",
             "dram": "from L40, the same memory", "latency": "[B] gpu-latency, l40"},
            read=844, l2_latency=276, dram_latency=632, bus_bits=384, memory_clock_khz=9001000),
    _device("h100", "H100 SXM5 80GB", (9, 0), 132, 1830, 80, 3352, 50, 9000,
            {"fp16": 4096, "tf32": 2048, "int8": 8192, "fp8": 8192},
            {"figures": "[X]" + _CLOCK_90 + "; [W] table 3, quoted: 989.4 TFLOP/s",
             "l2": "from H200, by clock ([H]: 4,472 bytes a clock of an H800, 8,184 GB/s at this one)",
             "dram": "github.com/simveit/effective_reduction: 3,232 GB/s read, as 97.9% of 3,300",
             "mma_sync": _MMA_SYNC_90, "latency": "[B] gpu-latency, h100_pcie"},
            read=3232, mma_sync=0.649, l2_latency=265, dram_latency=658, bus_bits=5120,
            memory_clock_khz=2619000, aliases=("h100-sxm", "h100sxm")),
    _device("h100-pcie", "H100 PCIe 80GB", (9, 0), 114, 1755, 80, 2039, 50, 6950,
            {"fp16": 4096, "tf32": 2048, "int8": 8192, "fp8": 8192},
            {"figures": "[X]; [W] table 3, quoted: 756 TFLOP/s, at 1,620 MHz, for 350 W do not hold the boost",
             "l2": "[B] gpu-l2-cache, h100_pcie", "dram": "[B] gpu-l2-cache, h100_pcie: 1,989 GB/s",
             "mma_sync": _MMA_SYNC_90, "latency": "[B] gpu-latency, h100_pcie"},
            read=1989, mma_sync=0.649, l2_latency=265, dram_latency=658, bus_bits=5120,
            memory_clock_khz=1593000),
    _device("h200", "H200 SXM 141GB", (9, 0), 132, 1830, 141, 4800, 50, 9780,
            {"fp16": 4096, "tf32": 2048, "int8": 8192, "fp8": 8192},
            {"figures": "[X]" + _CLOCK_90 + "; bus [D]; memory clock [A], nvidia-smi's from memory",
             "l2": "[B] gpu-l2-cache, h200",
             "dram": "[B] gpu-l2-cache, h200: 3,888 GB/s beyond the cache", "mma_sync": _MMA_SYNC_90,
             "latency": "[B] gpu-latency, h100_pcie"},
            read=3888, mma_sync=0.649, l2_latency=265, dram_latency=658, bus_bits=6144,
            memory_clock_khz=3201000),
    _device("gh200", "GH200 96GB", (9, 0), 132, 1830, 96, 4000, 50, 9000,
            {"fp16": 4096, "tf32": 2048, "int8": 8192, "fp8": 8192},
            {"figures": "[D] 96 GB, 4 TB/s; the rest from H100", "l2": "from H200, by clock",
             "dram": "[A] 0.93 of the sheet ([N]: 3.6 TB/s copied)", "mma_sync": _MMA_SYNC_90,
             "latency": "[B] gpu-latency, h100_pcie"},
            mma_sync=0.649, l2_latency=265, dram_latency=658, bus_bits=6144, memory_clock_khz=2619000),
    _device("b200", "B200 SXM 180GB", (10, 0), 148, 1850, 180, 7672, 126.5, 21200,
            {"fp16": 8192, "tf32": 4096, "int8": 16384, "fp8": 16384},
            {"figures": "[X]: bandwidth is the bus's, the sheet says 8 TB/s; the clock is that of the sheet's "
                        "2,250 TFLOP/s, it boosts to 1,965 MHz",
             "l2": "[N] 21,237 GB/s at 1,587 MHz, and 21 TB/s by chipsandcheese.com",
             "dram": "[N] 6,753 GB/s read",
             "mma_sync": "[N] an HMMA in 8.17 (GB200) and 8.5 (B200) clocks of a partition; tcgen05 does its "
                         "work in 2",
             "latency": "[N] at 1,587 MHz"},
            read=6753, mma_sync=0.24, l2_latency=305, dram_latency=839, bus_bits=7680,
            memory_clock_khz=3996000),
    _device("rtx5090", "GeForce RTX 5090", (12, 0), 170, 2407, 32, 1792, 96, 6050,
            {"fp16": 512, "tf32": 256, "int8": 2048, "fp8": 1024},
            {"figures": "[W] RTX Blackwell whitepaper, table 3, quoted; L2's size [A], from memory; tf32 [A], "
                        "half of fp16",
             "l2": "from L40, by SMs and clock", "dram": "[A] 0.93 of the sheet", "latency": "from L40"},
            l2_latency=276, dram_latency=632, bus_bits=512, memory_clock_khz=14001000,
            aliases=("5090",)),
]  # fmt: skip

# Its tensor figures are for a lower clock than its boost.
_TABLE = [
    replace(d, tensor={k: v * 1620 / 1755 for k, v in d.tensor.items()})
    if d.key == "h100-pcie"
    else d
    for d in _TABLE
]
DEVICES: dict[str, Device] = {device.key: device for device in _TABLE}
_ALIASES = {alias: d.key for d in _TABLE for alias in (d.key, *d.aliases)}


def get_device(name: str | Device) -> Device:
    """The device called ``name`` (``"h100"``, ``"RTX 4090"``, ``"a100-40"``; case, blanks and dashes
    do not matter). Raises ``ValueError`` with the nearest names for one that is not in the table."""
    if isinstance(name, Device):
        return name

    def plain(text: str) -> str:
        return text.lower().replace(" ", "").replace("-", "").replace("_", "")

    names = {plain(alias): key for alias, key in _ALIASES.items()}
    names.update({plain(d.name): d.key for d in _TABLE})
    key = names.get(plain(str(name)))
    if key is None:
        close = difflib.get_close_matches(plain(str(name)), names, n=3, cutoff=0.4)
        nearest = ", ".join(dict.fromkeys(names[c] for c in close))
        raise ValueError(
            f"no device {name!r}"
            + (f"; did you mean {nearest}?" if nearest else "")
            + f" Known: {', '.join(DEVICES)}."
        )
    return DEVICES[key]


def with_figures(device: str | Device, **changes: Any) -> Device:
    """A device with some figures replaced: what if it had more bandwidth, a lower clock?"""
    return replace(get_device(device), **changes)


@dataclass(frozen=True)
class Occupancy:
    """Resident blocks a multiprocessor, and which resource allows no more.

    ``limits`` maps ``registers``, ``shared``, ``warps``, ``blocks`` (and ``barriers``, where they are
    counted) to the blocks that each alone would allow."""

    blocks: int
    warps: int
    share: float
    limiter: str
    limits: dict[str, float]


def occupancy(
    device: str | Device, threads: int, registers: int, shared: int = 0, barriers: int = 0
) -> Occupancy:
    """How many blocks of a kernel fit on a multiprocessor: the arithmetic of ``cuda_occupancy.h``,
    at the largest shared-memory carve-out.

    ``threads`` a block, ``registers`` a thread as the compiler reports them, ``shared`` bytes a
    block (static and dynamic; the system's share is added here). ``blocks`` is 0 for a kernel that
    cannot be launched.
    """
    device = get_device(device)
    sm = device.sm
    if threads < 1:
        raise ValueError(f"threads={threads}: a block has at least one")
    warps = -(-threads // 32)

    def up(value: int, step: int) -> int:
        return -(-value // step) * step

    per_warp = up(registers * 32, 256)
    if per_warp * up(warps, sm.partitions) > sm.registers or registers > 255:
        by_registers: float = 0
    elif per_warp == 0:
        by_registers = inf
    else:
        by_registers = sm.registers // sm.partitions // per_warp * sm.partitions // warps
    total = up(shared + sm.shared_reserved, sm.shared_granularity)
    if total > sm.shared_optin + sm.shared_reserved:
        by_shared: float = 0
    else:
        by_shared = sm.shared // total if total else inf
    limits = {
        "registers": by_registers,
        "shared": by_shared,
        "warps": device.max_warps // warps if threads <= 1024 else 0,
        "blocks": sm.blocks,
    }
    if barriers and device.capability >= (9, 0):
        per_block = 2 if device.capability in ((9, 0), (10, 0)) else 1
        limits["barriers"] = sm.blocks * per_block // barriers
    limiter = min(limits, key=lambda k: limits[k])
    blocks = int(limits[limiter])
    return Occupancy(blocks, blocks * warps, blocks * warps / device.max_warps, limiter, limits)
