"""Which tile a shape gets on a device, and when torch's matmul is better: a table.

``choose(capability, op, m, n, k, dtype)`` is a pure function of its arguments, so it can be read,
printed and tested anywhere. The table is from ``benchmarks/triton_rank.py``, which models every
candidate from what the emulator counts (docs/triton.md); ``QLORA_KERNELS_TRITON_AUTOTUNE=1`` lets
``triton.autotune`` time the same candidates instead, for those who have the device.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton

LINEAR, INPUT_GRAD = "linear", "input_grad"


class Tile(NamedTuple):
    """``batch`` products side by side (linear: chunks of K; input_grad: chunks of dx's columns),
    each [bn, bm] over one chunk's columns, or [bm, columns of a chunk] over bn rows of W."""

    batch: int
    bm: int
    bn: int
    warps: int
    stages: int
    resident: int  # programs that a multiprocessor holds at once, by registers and shared memory


@dataclass(frozen=True)
class Config:
    """A tile, and into how many parts the contraction is cut so that the device is filled."""

    tile: Tile
    splits: int


# Rows of x (or dy) up to which a tile is taken; past the last one the weight is written out in full
# and multiplied by torch. By compute capability, the nearest one that is not above. 10.0 has what
# 9.0 has (mma.sync alone, tcgen05 is of no use to it: sums leave its memory for a scale each chunk)
# and is never executed here; 12.0 has no wgmma, and GDDR like 8.6; 0.0 stands for other makers'.
_FEW, _SOME = Tile(16, 2, 16, 4, 2, 5), Tile(8, 8, 32, 4, 3, 4)
_GDDR: dict[str, list[tuple[int, Tile]]] = {
    LINEAR: [(2, _FEW), (8, Tile(16, 8, 16, 4, 2, 3)), (16, Tile(4, 16, 32, 4, 3, 3)),
             (128, Tile(2, 32, 64, 4, 3, 3))],
    INPUT_GRAD: [(16, Tile(4, 16, 64, 4, 2, 3)), (32, Tile(4, 32, 16, 4, 3, 4)),
                 (64, Tile(4, 32, 32, 4, 3, 3))],
}  # fmt: skip
_TABLE: dict[tuple[int, int], dict[str, list[tuple[int, Tile]]]] = {
    (0, 0): {
        LINEAR: [(16, Tile(4, 16, 32, 4, 2, 2)), (64, Tile(2, 32, 64, 4, 2, 2))],
        INPUT_GRAD: [(16, Tile(4, 16, 32, 4, 2, 4)), (32, Tile(4, 32, 16, 4, 2, 2))],
    },
    (8, 0): {
        LINEAR: [(2, _FEW), (8, _SOME), (16, Tile(4, 16, 64, 4, 3, 4)),
                 (32, Tile(2, 32, 64, 4, 3, 3)), (128, Tile(1, 64, 128, 4, 3, 2))],
        INPUT_GRAD: [(16, Tile(4, 16, 32, 4, 3, 5)), (32, Tile(4, 32, 16, 4, 3, 4)),
                     (64, Tile(4, 64, 16, 4, 3, 2))],
    },
    (8, 6): _GDDR,
    (9, 0): {
        LINEAR: [(2, _FEW), (8, Tile(4, 8, 32, 4, 4, 7)), (16, Tile(4, 16, 64, 4, 2, 3)),
                 (32, Tile(2, 32, 64, 4, 3, 3)), (128, Tile(1, 64, 128, 8, 3, 2))],
        INPUT_GRAD: [(16, Tile(4, 16, 32, 4, 3, 4)), (32, Tile(4, 32, 16, 4, 3, 4)),
                     (64, Tile(4, 64, 16, 4, 2, 2))],
    },
    (12, 0): _GDDR,
}  # fmt: skip

#: What the ranking and autotuning choose from, by the most rows that a candidate is for.
CANDIDATES: dict[str, dict[int, list[Tile]]] = {
    LINEAR: {
        2: [_FEW, Tile(16, 2, 16, 4, 3, 4), Tile(8, 2, 32, 4, 3, 4), Tile(4, 2, 32, 4, 4, 6),
            Tile(16, 2, 32, 8, 3, 2)],
        8: [Tile(16, 8, 16, 4, 2, 5), _SOME, Tile(4, 8, 32, 4, 4, 6), Tile(8, 8, 64, 8, 3, 2)],
        16: [Tile(4, 16, 64, 4, 3, 4), Tile(4, 16, 32, 4, 3, 4), Tile(8, 16, 16, 4, 3, 3),
             Tile(4, 16, 64, 4, 2, 2), Tile(4, 16, 128, 8, 3, 1)],
        1 << 20: [Tile(2, 32, 64, 4, 3, 3), Tile(1, 32, 128, 4, 3, 3), Tile(1, 64, 128, 4, 3, 2),
                  Tile(1, 64, 128, 8, 3, 1)],
    },
    INPUT_GRAD: {
        16: [Tile(4, 16, 32, 4, 3, 5), Tile(4, 16, 32, 4, 2, 4), Tile(8, 16, 32, 8, 2, 2),
             Tile(4, 16, 64, 4, 2, 3)],
        1 << 20: [Tile(4, 32, 16, 4, 3, 4), Tile(4, 64, 16, 4, 3, 2), Tile(4, 32, 32, 4, 3, 3),
                  Tile(4, 64, 16, 4, 2, 2), Tile(4, 64, 32, 8, 2, 1)],
    },
}  # fmt: skip

START, SUM = 1, 1  # steps' worth of time before a program's first one, and to add up the parts
ENOUGH = 0.6  # of the programs that a device holds at once keep it busy: more share it
MIN_STEPS, MOST_SPLITS = 2, 32  # steps of a split; parts
LEEWAY = 1.03  # a split more must be worth so much


def chunk_of(n: int, k: int, blocksize: int) -> int | None:
    """Columns that share a scale wherever they start: 64, 32, or None where there are none."""
    for chunk in (64, 32):
        if k % chunk == 0 and blocksize >= chunk:
            return chunk
    return None


def steps_of(op: str, tile: Tile, n: int, k: int, chunk: int) -> int:
    """Steps of the contraction."""
    return triton.cdiv(k, tile.batch * chunk) if op == LINEAR else triton.cdiv(n, tile.bn)


def programs_of(op: str, tile: Tile, m: int, n: int, k: int, chunk: int) -> int:
    """Programs of one split."""
    width = triton.cdiv(n, tile.bn) if op == LINEAR else triton.cdiv(k, tile.batch * chunk)
    return width * triton.cdiv(m, tile.bm)


def splits_of(op: str, tile: Tile, m: int, n: int, k: int, sms: int, chunk: int = 64) -> int:
    """The fewest parts that come near the shortest time. Programs run in waves of as many as the
    device holds; what the last wave leaves empty is lost, but for what ``ENOUGH`` says."""
    programs, steps = programs_of(op, tile, m, n, k, chunk), steps_of(op, tile, n, k, chunk)

    def time(splits: int) -> float:
        whole, rest = divmod(programs * splits / (tile.resident * sms), 1)
        waves = whole + (max(rest, ENOUGH) if rest else 0)
        return waves * (steps / splits + START) + (SUM if splits > 1 else 0)

    times = [time(splits) for splits in range(1, max(1, min(steps // MIN_STEPS, MOST_SPLITS)) + 1)]
    return next(i for i, t in enumerate(times, 1) if t <= LEEWAY * min(times))


def choose(
    capability: tuple[int, int], op: str, m: int, n: int, k: int, dtype: torch.dtype,
    sms: int = 108, chunk: int | None = 64,
) -> Config | None:  # fmt: skip
    """The tile and splits for ``m`` rows of a weight [n, k], or None: dequantize and multiply."""
    if chunk is None or dtype not in (torch.bfloat16, torch.float16) or m == 0:
        return None
    # f16 loses the low bits of small dy * scale (input_grad.py): a few rows only, as in CUDA.
    if op == INPUT_GRAD and dtype == torch.float16 and m > 16:
        return None
    row = max((c for c in _TABLE if c <= tuple(capability)), default=(0, 0))
    if row == (0, 0) and tuple(capability) != (0, 0):
        return None  # before sm_80
    for most, tile in _TABLE[row][op]:
        if m <= most:
            return Config(tile, splits_of(op, tile, m, n, k, sms, chunk))
    return None


# --- the device in use ----------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def _device(driver: Any, index: int) -> tuple[tuple[int, int], int]:
    target = driver.get_current_target()
    arch = int(target.arch) if target.backend == "cuda" else 0
    properties = driver.utils.get_device_properties(index)
    return (arch // 10, arch % 10), int(properties.get("multiprocessor_count", 108))


def device() -> tuple[tuple[int, int], int]:
    """Compute capability ((0, 0): not NVIDIA's) and multiprocessors of Triton's current GPU."""
    driver = triton.runtime.driver.active
    return _device(driver, driver.get_current_device())


def chosen(op: str, m: int, n: int, k: int, blocksize: int, dtype: torch.dtype) -> Config | None:
    """`choose` for the device in use."""
    capability, sms = device()
    return choose(capability, op, m, n, k, dtype, sms, chunk_of(n, k, blocksize))


# --- autotuning -----------------------------------------------------------------------------------


def autotuning() -> bool:
    return os.environ.get("QLORA_KERNELS_TRITON_AUTOTUNE", "") == "1"


def candidates(op: str, m: int) -> list[Tile]:
    """For ``m`` rows."""
    return next(tiles for most, tiles in CANDIDATES[op].items() if m <= most)


def tuned(kernel: Any, op: str, m: int) -> Any:
    """``kernel`` with `triton.autotune` over the candidates for ``m`` rows; the splits, which the
    workspace is allocated for, stay the table's."""
    return _tuned(kernel, op, next(most for most in CANDIDATES[op] if m <= most))


@functools.cache
def _tuned(kernel: Any, op: str, most: int) -> Any:
    found = [
        triton.Config({"BATCH": t.batch, "BM": t.bm, "BN": t.bn}, num_warps=t.warps,
                      num_stages=t.stages)
        for t in CANDIDATES[op][most]
    ]  # fmt: skip
    return triton.autotune(found, key=["M", "N", "K"])(kernel)


def arguments(config: Config) -> dict[str, Any]:
    """A tile as a kernel's arguments."""
    t = config.tile
    return {
        "BATCH": t.batch, "BM": t.bm, "BN": t.bn, "num_warps": t.warps, "num_stages": t.stages,
    }  # fmt: skip
