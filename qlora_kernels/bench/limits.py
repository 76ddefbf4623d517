"""What the machine allows, measured in the same run: reads, copies, dense products; its caches."""

from __future__ import annotations

import ctypes
import functools
import math
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from .race import sample

__all__ = [
    "cache_sizes",
    "clock_ghz",
    "copies_for_cold",
    "last_level_cache",
    "limit_samples",
    "matmul_peak",
    "peak_resident",
    "read_bandwidth",
    "read_memory",
    "wait_for",
]


# --- memory and caches --------------------------------------------------------------------------


def cache_sizes() -> dict[str, int]:
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
    return max(cache_sizes().values(), default=64 << 20)


def copies_for_cold(size: int, args: Any, cache: int | None = None) -> int:
    """Copies of ``size`` bytes to rotate over, so that each is out of cache in its turn."""
    if args.quick:
        return 2
    return max(2, math.ceil(1.5 * (cache or last_level_cache()) / size) + 1)


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


# --- limits of a CPU ----------------------------------------------------------------------------

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
def native() -> ctypes.CDLL | None:
    """The loops above, compiled here; None where there is no C compiler."""
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


def read_memory(tensor: torch.Tensor, threads: int) -> None:
    """Reads every byte of a contiguous tensor and does nothing with them: the limit of a kernel
    that must read them. By compiled code, or where there is no compiler by ``torch.sum``."""
    size = tensor.numel() * tensor.element_size()
    library = native()
    if library is None:
        tensor.view(-1).view(torch.int64).sum()
        return
    library.read_words(tensor.data_ptr(), size // 8, threads)


def matmul_peak(dtype: torch.dtype, args: Any, n: int | None = None) -> float:
    """FLOP/s of torch's matmul on square matrices that fit it well: the best of a few turns."""
    n = n or (128 if args.quick else 1536)
    run = _square_product(n, dtype, torch.device("cpu"))
    return 2 * n**3 / min(sample(run, count=2 if args.quick else 5, clock=args.clock))


def read_bandwidth(args: Any) -> float:
    """Bytes/s of :func:`read_memory` on memory that is not in cache: the best of a few turns."""
    size = (1 << 24) if args.quick else max(256 << 20, 4 * last_level_cache())
    data = torch.ones(size // 8, dtype=torch.int64)
    times = sample(lambda _: read_memory(data, args.threads), count=5, clock=args.clock)
    return size / min(times)


def clock_ghz() -> float | None:
    """The clock of a busy core, from a chain of additions; None where it cannot be told."""
    library = native()
    if library is None or not hasattr(library, "add_chain"):
        return None
    rounds = 2_000_000
    best = min(sample(lambda _: library.add_chain(ctypes.c_int64(rounds)), 0.02, 9, "cpu"))
    return rounds * 16 / best / 1e9


# --- limits of any device -----------------------------------------------------------------------


def wait_for(device: torch.device) -> Any:
    """A function that returns when the device has done what was queued."""
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return lambda: None


def _square_product(n: int, dtype: torch.dtype, device: torch.device) -> Any:
    a = torch.randn(n, n, device=device).to(dtype)
    b = torch.randn(n, n, device=device).to(dtype).T  # as a linear layer has its weight
    out = torch.empty_like(a)
    return lambda _: torch.mm(a, b, out=out)


def limit_samples(
    device: torch.device, dtypes: list[torch.dtype], settings: Any, threads: int
) -> dict[str, dict[str, Any]]:
    """The device's own limits, a few turns each.

    Returns:
        ``{"read": ..., "copy": ..., "matmul float32": ...}``: ``amount`` (bytes, both ways for
        ``copy``; floating-point operations) of a call and ``seconds``, one a turn. ``read`` is left
        out on a GPU, where nothing reads without a result.
    """
    cpu = device.type == "cpu"
    wait = wait_for(device)
    cache = last_level_cache() if cpu else 64 << 20
    size = (1 << 24) if settings.quick else max(256 << 20, 4 * cache)
    count = 2 if settings.quick else 5
    source = torch.ones(size // 8, dtype=torch.int64, device=device)
    target = torch.empty_like(source)
    found: dict[str, dict[str, Any]] = {}

    def keep(name: str, amount: float, run: Any) -> None:
        times = sample(run, count=count, clock=settings.clock, wait=wait)
        found[name] = {"amount": amount, "seconds": times}

    if cpu:
        keep("read", size, lambda _: read_memory(source, threads))
    keep("copy", 2 * size, lambda _: target.copy_(source))
    for dtype in dtypes:
        n = 128 if settings.quick else (1536 if cpu else 8192)
        name = f"matmul {str(dtype).removeprefix('torch.')}"
        keep(name, 2.0 * n**3, _square_product(n, dtype, device))
    return found
