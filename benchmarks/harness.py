"""What every benchmark here shares: races between contenders, limits, the machine, the report.

A **contender** is one way to do the work of a line. Before it is timed, its result is checked; one
that is wrong is not timed and fails the run. A **race** times contenders in turn (A B C, A B C,
...), so that whatever else the machine does falls on all of them, and goes on beyond the wanted
number of pairs until the pairs agree or patience ends. A **ratio** is the median of the ratios of
pairs, with the smallest and the largest.

Two clocks are kept. Wall time is what a user waits for. CPU time of the calling thread leaves out
the time in which other processes had the core; it is what to compare by on a shared machine, and
means something only with one thread.

**Cold** runs rotate over copies of the weights that exceed the last-level cache; runs **in cache**
repeat on one copy, after one call that is not timed.

Nothing here imports torch before :func:`begin` has set how many threads there are.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"

__all__ = [
    "Contender",
    "Race",
    "Sample",
    "Spread",
    "add_arguments",
    "add_child_arguments",
    "begin",
    "clock_ghz",
    "copies_for_cold",
    "describe_machine",
    "last_level_cache",
    "matmul_peak",
    "peak_resident",
    "print_table",
    "race",
    "read_memory",
    "roofline",
    "run_child",
    "sample",
    "write_json",
]


# --- arguments and set-up -----------------------------------------------------------------------


def add_child_arguments(parser: argparse.ArgumentParser) -> None:
    """What a benchmark tells the processes that it starts of itself; help does not name them."""
    for name in ("child", "turn", "done", "data", "steps"):
        kind = {"child": str, "data": Path}.get(name, int)
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that every script takes."""
    group = parser.add_argument_group("measurement")
    group.add_argument("--quick", action="store_true", help="tiny sizes, seconds, proves nothing")
    group.add_argument("--threads", type=int, default=None, help="all cores unless given")
    group.add_argument("--pairs", type=int, default=7, help="interleaved pairs at least")
    group.add_argument("--patience", type=float, default=150.0, help="seconds a line may take")
    group.add_argument(
        "--clock",
        choices=("auto", "wall", "cpu"),
        default="auto",
        help="what ratios are of; auto: wall, with one thread the CPU time of the thread",
    )
    group.add_argument("--out", type=Path, default=None, help="JSON file to write")


def begin(args: argparse.Namespace, threads: int | None = None) -> None:
    """Settles threads and clock, before torch or a peer is imported.

    Args:
        threads: overrides ``args.threads``.
    """
    args.threads = threads or args.threads or (os.cpu_count() or 1)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(args.threads)  # peers link OpenMP runtimes of their own
    if args.clock == "auto":
        args.clock = "cpu" if args.threads == 1 else "wall"
    if args.clock == "cpu" and args.threads != 1:
        raise SystemExit("--clock cpu is the time of one thread: it needs --threads 1")
    if args.quick:
        args.pairs, args.patience = min(args.pairs, 2), min(args.patience, 2.0)
    # Packages of this folder's parent, also where the package is not installed.
    sys.path.insert(0, str(HERE.parent))
    import torch

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)


# --- races --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contender:
    """One way to do a line's work.

    Args:
        name: how the table calls it.
        run: one call; its argument counts calls and picks the copy of the weights.
        check: what is wrong with a result, or None. Called once, before anything is timed.
    """

    name: str
    run: Callable[[int], Any]
    check: Callable[[Any], str | None] | None = None


@dataclass(frozen=True)
class Sample:
    """Seconds a call, the mean over the calls of one turn."""

    wall: float
    cpu: float


@dataclass(frozen=True)
class Spread:
    """A median with the smallest and the largest value, of ``count``."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values), len(values))

    def text(self, digits: int = 2) -> str:
        return f"{self.median:.{digits}f} ({self.low:.{digits}f}-{self.high:.{digits}f})"


@dataclass
class Race:
    """What :func:`race` measured."""

    clock: str
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def values(self, name: str) -> list[float]:
        return [getattr(s, self.clock) for s in self.samples[name]]

    def has(self, *names: str) -> bool:
        return all(self.samples.get(name) for name in names)

    def time(self, name: str) -> Spread:
        """Seconds a call."""
        return Spread.of(self.values(name))

    def ratio(self, name: str, other: str) -> Spread:
        """How many times as fast as ``other`` ``name`` is, pair by pair."""
        pairs = zip(self.values(name), self.values(other), strict=True)
        return Spread.of([theirs / ours for ours, theirs in pairs])

    def as_json(self) -> dict[str, Any]:
        return {
            "samples": {
                name: {"wall": [s.wall for s in all_], "cpu": [s.cpu for s in all_]}
                for name, all_ in self.samples.items()
            },
            "failed": self.failed,
        }


def _timed(run: Callable[[int], Any], first: int, calls: int) -> Sample:
    wall, cpu = time.perf_counter(), time.thread_time()
    for i in range(first, first + calls):
        run(i)
    return Sample((time.perf_counter() - wall) / calls, (time.thread_time() - cpu) / calls)


def _agree(race: Race) -> bool:
    """Whether the middle half of the pairs lies within a tenth of the median, for every pairing."""
    first, *rest = race.samples
    for other in rest:
        pairs = zip(race.values(other), race.values(first), strict=True)
        low, middle, high = statistics.quantiles([a / b for a, b in pairs], n=4)
        if high - low > 0.1 * middle:
            return False
    return True


def race(
    contenders: Iterable[Contender],
    args: argparse.Namespace,
    *,
    cold: bool = False,
    turn: float = 0.02,
    most: int = 31,
) -> Race:
    """Checks the contenders, then times those that are right in turn.

    Args:
        args: of :func:`add_arguments`; at least ``args.pairs`` pairs, fewer (but three) only where
            they would take longer than ``args.patience`` seconds.
        cold: leaves out the call before a turn that brings the weights into cache.
        turn: seconds that one contender's turn takes at least; short calls are repeated in it.
        most: pairs at most, where they do not agree.
    """
    found = Race(args.clock)
    running: list[tuple[Contender, int]] = []  # and how many calls make a turn
    counts: dict[str, int] = {}
    turn = 0.002 if args.quick else turn
    for c in contenders:
        start = time.perf_counter()
        try:
            result = c.run(0)
            wrong = c.check(result) if c.check is not None else None
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"
        if wrong:
            found.failed[c.name] = wrong
            continue
        del result
        once = time.perf_counter() - start
        if once < 1.0:  # the first call pays for much that later ones do not
            once = _timed(c.run, 1, 1).wall
        running.append((c, max(1, math.ceil(turn / once))))
        counts[c.name], found.samples[c.name] = 2, []
    if not running:
        return found
    begun, pairs = time.perf_counter(), args.pairs
    done = 0
    while done < most:
        for c, calls in running:
            if not cold:
                c.run(counts[c.name])
            found.samples[c.name].append(_timed(c.run, counts[c.name] + 1, calls))
            counts[c.name] += calls + 1
        done += 1
        spent = time.perf_counter() - begun
        tired = spent * (done + 1) / done > args.patience
        if (done >= min(pairs, 3) and tired) or (done >= pairs and (args.quick or _agree(found))):
            break
    return found


def sample(
    run: Callable[[int], Any], seconds: float = 0.02, count: int = 7, clock: str = "wall"
) -> list[float]:
    """Seconds a call of one thing alone, ``count`` turns of at least ``seconds``."""
    run(0)
    calls = max(1, math.ceil(seconds / _timed(run, 1, 1).wall))
    return [getattr(_timed(run, 2 + i * calls, calls), clock) for i in range(count)]


# --- memory and caches --------------------------------------------------------------------------


def _cache_sizes() -> dict[str, int]:
    """``{"L1d": bytes, "L2": ..., "L3": ...}`` of the first core, as Linux tells it."""
    sizes: dict[str, int] = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            kind = (folder / "type").read_text().strip()
            level = (folder / "level").read_text().strip()
            text = (folder / "size").read_text().strip()
        except OSError:
            continue
        if kind == "Instruction":
            continue
        unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1], 1)
        sizes[f"L{level}" + ("d" if kind == "Data" else "")] = int(text.rstrip("KMG")) * unit
    return sizes


def last_level_cache() -> int:
    """Bytes of the last-level cache; 64 MiB where the machine does not tell."""
    return max(_cache_sizes().values(), default=64 << 20)


def copies_for_cold(size: int, args: argparse.Namespace) -> int:
    """Copies of ``size`` bytes to rotate over, so that each is out of cache in its turn."""
    if args.quick:
        return 2
    return max(2, math.ceil(1.5 * last_level_cache() / size) + 1)


def peak_resident() -> int:
    """Largest resident set that this process has had, in bytes (shared libraries included)."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# --- limits -------------------------------------------------------------------------------------

_NATIVE = r"""
#include <stddef.h>
#include <stdint.h>
uint64_t read_words(const uint64_t* p, int64_t n, int threads) {
  uint64_t all = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(^ : all)
  for (int64_t i = 0; i < n; ++i) all ^= p[i];
  return all;
}
#if defined(__x86_64__)
void add_chain(int64_t rounds) { /* 16 additions that wait for each other: a cycle each */
  uint64_t x = 0;
  for (int64_t i = 0; i < rounds; ++i)
    __asm__ volatile("add $1,%0\n add $1,%0\n add $1,%0\n add $1,%0\n"
                     "add $1,%0\n add $1,%0\n add $1,%0\n add $1,%0\n"
                     "add $1,%0\n add $1,%0\n add $1,%0\n add $1,%0\n"
                     "add $1,%0\n add $1,%0\n add $1,%0\n add $1,%0\n" : "+r"(x));
}
#endif
"""


@functools.cache
def _native() -> ctypes.CDLL | None:
    compiler = next((c for c in ("cc", "gcc", "clang") if shutil.which(c)), None)
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "limits.c", Path(folder) / "limits.so"
        source.write_text(_NATIVE)
        command = [compiler, "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", str(source)]
        if subprocess.run([*command, "-o", str(library)], capture_output=True).returncode:
            return None
        loaded = ctypes.CDLL(str(library))
    loaded.read_words.restype = ctypes.c_uint64
    loaded.read_words.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
    return loaded


def read_memory(tensor: Any, threads: int) -> None:
    """Reads every byte of a contiguous tensor and does nothing with them: the limit of a kernel
    that must read them. By compiled code, or where there is no compiler by ``torch.sum``."""
    size = tensor.numel() * tensor.element_size()
    native = _native()
    if native is None:
        tensor.view(-1).view(_torch().int64).sum()
        return
    native.read_words(tensor.data_ptr(), size // 8, threads)


def _torch() -> Any:
    import torch

    return torch


def matmul_peak(dtype: Any, args: argparse.Namespace, n: int | None = None) -> float:
    """FLOP/s of torch's matmul on square matrices that fit it well: the best of a few turns."""
    torch = _torch()
    n = n or (128 if args.quick else 1536)
    a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
    out, b = torch.empty_like(a), b.T  # as a linear layer has its weight
    return (
        2
        * n**3
        / min(
            sample(
                lambda _: torch.mm(a, b, out=out), count=2 if args.quick else 5, clock=args.clock
            )
        )
    )


def read_bandwidth(args: argparse.Namespace) -> float:
    """Bytes/s of :func:`read_memory` on memory that is not in cache: the best of a few turns."""
    torch = _torch()
    size = (1 << 24) if args.quick else max(256 << 20, 4 * last_level_cache())
    data = torch.ones(size // 8, dtype=torch.int64)
    times = sample(lambda _: read_memory(data, args.threads), count=5, clock=args.clock)
    return size / min(times)


def clock_ghz() -> float | None:
    """The clock of a busy core, from a chain of additions; None where it cannot be told."""
    native = _native()
    if native is None or not hasattr(native, "add_chain"):
        return None
    rounds = 2_000_000
    best = min(sample(lambda _: native.add_chain(ctypes.c_int64(rounds)), 0.02, 9, "cpu"))
    return rounds * 16 / best / 1e9


# --- the machine --------------------------------------------------------------------------------

_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16",
          "amx_tile", "amx_bf16", "asimd", "bf16", "sve")  # fmt: skip
_PACKAGES = ("bitsandbytes", "transformers", "peft", "trl", "accelerate", "numpy")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def describe_machine(threads: int) -> dict[str, Any]:
    """What a figure depends on: processor, caches, threads, versions, and how busy it was."""
    torch = _torch()
    from qlora_kernels import cpu

    info: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            info.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    flags = set((info.get("flags") or info.get("Features") or "").split())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": info.get("model name") or platform.processor() or platform.machine(),
        "family_model": f"{info.get('cpu family', '?')}/{info.get('model', '?')}",
        "virtual": "hypervisor" in flags,
        "flags": [f for f in _FLAGS if f in flags],
        "caches": _cache_sizes(),
        "cores": os.cpu_count(),
        "memory": memory,
        "threads": threads,
        "load": list(os.getloadavg()),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "kernels_isa": cpu.isa(),
        "packages": {p: _version(p) for p in _PACKAGES},
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def machine_line(machine: dict[str, Any]) -> str:
    caches = ", ".join(f"{k} {v >> 10} KiB" for k, v in machine["caches"].items())
    return (
        f"{machine['processor']} (family/model {machine['family_model']}"
        f"{', virtual' if machine['virtual'] else ''}), {machine['cores']} cores, "
        f"{machine['threads']} thread(s), {caches}; kernels {machine['kernels_isa']}, "
        f"torch {machine['torch']} {machine['torch_isa']}; "
        f"load {machine['load'][0]:.1f}"
    )


def has_bf16_products(machine: dict[str, Any]) -> bool:
    """Whether the processor multiplies bf16 in hardware."""
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(machine["flags"]))


# --- processes of their own ---------------------------------------------------------------------


def run_child(
    script: str | Path, arguments: Sequence[str], env: dict[str, str] | None = None
) -> dict[str, Any]:
    """Runs a script with ``--out <file>`` in a process of its own; the JSON that it wrote.

    For peak memory, which is a process's, and for settings that are read once at its start.

    Raises:
        RuntimeError: it failed; the message ends with what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, str(script), *arguments, "--out", str(out)]
        run = subprocess.run(
            command, env={**os.environ, **(env or {})}, capture_output=True, text=True
        )
        if run.returncode or not out.exists():
            raise RuntimeError(
                f"{' '.join(command[1:])} failed ({run.returncode}):\n"
                + (run.stdout + run.stderr)[-3000:]
            )
        return json.loads(out.read_text())


# --- the report ---------------------------------------------------------------------------------


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns aligned, the first left and the others right."""
    widths = [max(len(r[i]) for r in [head, *rows]) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(c.rjust(w) for c, w in rest)]).rstrip()

    print(line(head))
    print("  ".join("-" * w for w in widths))
    for row in rows:
        print(line(row))
    sys.stdout.flush()


def result_path(args: argparse.Namespace) -> Path:
    """``--out``, or ``results/<script>.json`` (``<script>-quick.json`` of a quick run)."""
    if args.out is not None:
        return args.out
    return RESULTS / (Path(sys.argv[0]).stem + ("-quick" if args.quick else "") + ".json")


def write_json(args: argparse.Namespace, figures: dict[str, Any]) -> Path:
    """Writes the figures with what they depend on, and says where."""
    path = result_path(args)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Names without their folders: where things lay on this machine says nothing on another.
    paths = ("model", "out", "data")
    settings = {
        k: Path(v).name if k in paths or isinstance(v, Path) else v
        for k, v in vars(args).items()
        if v is not None
    }
    everything = {
        "benchmark": Path(sys.argv[0]).stem,
        "machine": describe_machine(args.threads),
        "settings": settings,
        **figures,
    }
    path.write_text(json.dumps(everything, indent=1) + "\n")
    print(f"\nwrote {path}")
    return path


def roofline(
    path: Path,
    points: Sequence[tuple[str, str, float, float]],
    bandwidth: float,
    peaks: dict[str, float],
    title: str,
) -> None:
    """Draws attained FLOP/s over FLOP a byte, under what memory and matmul allow.

    Args:
        points: ``(series, label, FLOP a byte of compulsory traffic, FLOP/s)``.
        bandwidth: bytes/s.
        peaks: name of a roof to FLOP/s.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5.5), layout="constrained")
    low = min(p[2] for p in points) / 2
    high = max(p[2] for p in points) * 2
    for i, (name, peak) in enumerate(sorted(peaks.items(), key=lambda item: item[1])):
        ridge = peak / bandwidth
        style = ("--", "-")[i == len(peaks) - 1]
        axes.plot([max(low, ridge), high], [peak / 1e9] * 2, f"k{style}", lw=1)
        axes.text(high, peak / 1e9, f"{name}: {peak / 1e9:.0f} GFLOP/s", ha="right", va="bottom",
                  fontsize=8)  # fmt: skip
    top = max(peaks.values())
    ridge = min(high, top / bandwidth)
    axes.plot([low, ridge], [low * bandwidth / 1e9, ridge * bandwidth / 1e9], "k-", lw=1)
    axes.text(low, low * bandwidth / 1e9, f" memory: {bandwidth / 1e9:.1f} GB/s", fontsize=8,
              rotation=35, rotation_mode="anchor", va="bottom")  # fmt: skip
    markers = iter("osD^vP*X")
    for name in dict.fromkeys(p[0] for p in points):
        mine = [p for p in points if p[0] == name]
        axes.plot([p[2] for p in mine], [p[3] / 1e9 for p in mine], next(markers), label=name,
                  ms=5, alpha=0.85)  # fmt: skip
        for _, label, x, y in mine if name == points[0][0] else ():
            axes.annotate(label, (x, y / 1e9), xytext=(4, -10), textcoords="offset points",
                          fontsize=7)  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="FLOP a byte of compulsory traffic",
             ylabel="GFLOP/s", title=title)  # fmt: skip
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(loc="lower right", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    print(f"drew {path}")
