"""Codebooks computed from a distribution or from weights: AF4, BOF4, a learned one, two bits.

All of them are Lloyd's algorithm in one dimension: levels are moved to the mean (for squared error)
or median (for absolute error) of what is nearest to them, until nothing moves. They differ in the
density that is fitted and in which levels stay where they are.

For weights drawn from a normal distribution and divided by the largest magnitude ``m`` of their
block of ``B``, the density is known. One value in ``B`` is ±1. Given ``m``, the others are a normal
distribution cut off at ±m; and ``m`` itself has the density of the largest of ``B`` half-normal
values. An error of a normalized value is ``m`` times as large in the weight, which is the
difference between the two formats from papers:

- **AF4** (Yoshida, arXiv 2306.06965) minimizes the absolute error of the *normalized* values;
- **BOF4** (Blumenberg et al., arXiv 2505.06653) minimizes the squared (or absolute) error of the
  *weights*, so blocks count by ``m²`` (or ``m``). Its signed variant, BOF4-S, needs a scale with a
  sign, which ``quantize_4bit`` does not write.

Both keep -1, 0 and 1. Values here are computed, not copied; AF4's are its paper's table for
blocks of 64 to 1e-7 (a test).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy import special

from ..formats import check_blocksize

__all__ = ["block_density", "derive_af4", "derive_bof4", "derive_levels", "learn_codebook", "lloyd"]

_GRID = 8001  # points of the density over [-1, 1]


@functools.lru_cache(maxsize=32)
def block_density(blocksize: int, power: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Normal weights over their block's absmax, the one that is ±1 left out.

    Args:
        blocksize: values that share an absmax.
        power: blocks count by ``absmax ** power``: 0 for errors of normalized values, 1 for
            absolute and 2 for squared errors of the weights themselves.

    Returns:
        float64 ``(points [8001], mass [8001])`` over [-1, 1]; the masses add up to 1.
    """
    check_blocksize(blocksize)
    # Where the largest of B half-normals is: between its quantiles of 1e-12 and 1 - 1e-12.
    tails = np.array([1e-12, 1 - 1e-12])
    low, high = special.ndtri((1 + tails ** (1 / blocksize)) / 2)
    m = np.linspace(max(low, 1e-3), high, 600)
    inside = 2 * special.ndtr(m) - 1
    weight = inside ** (blocksize - 1) * np.exp(-(m**2) / 2) * m**power
    x = np.linspace(-1, 1, _GRID)
    mass = ((weight * m / inside)[:, None] * np.exp(-((x[None] * m[:, None]) ** 2) / 2)).sum(0)
    return x, mass / mass.sum()


def lloyd(
    values: np.ndarray,
    mass: np.ndarray,
    levels: Sequence[float] | np.ndarray,
    *,
    density: bool = True,
    absolute: bool = False,
    fixed: Sequence[float] = (),
    rounds: int = 5000,
) -> np.ndarray:
    """Lloyd's algorithm on weighted values in one dimension.

    Args:
        values: float64 ``[n]``, ascending.
        mass: float64 ``[n]``, what each counts.
        levels: where to begin.
        density: the values are points of a density, so that cells end between them; False for
            values that are all there is (means only).
        absolute: medians, for the absolute error; means, for the squared error, otherwise.
        fixed: levels (of those to begin with) that stay where they are.
        rounds: at most; it ends when no level moves by more than 1e-9.

    Returns:
        float64 levels, ascending. A level that nothing is nearest to stays where it was. No round
        makes the error larger.
    """
    levels = np.sort(np.asarray(levels, np.float64))
    stays = np.isin(levels, np.asarray(fixed, np.float64))
    below = np.concatenate([[0.0], np.cumsum(mass)])
    moment = np.concatenate([[0.0], np.cumsum(mass * values)])
    if density:  # half of a point's mass lies on each side of it
        below, moment = (below[1:] + below[:-1]) / 2, (moment[1:] + moment[:-1]) / 2
    for _ in range(rounds):
        cuts = (levels[:-1] + levels[1:]) / 2
        if density:
            cuts = np.concatenate([values[:1], cuts, values[-1:]])
            mass_at, moment_at = np.interp(cuts, values, below), np.interp(cuts, values, moment)
        else:
            at = np.searchsorted(values, cuts, side="right")
            at = np.concatenate([[0], at, [values.size]])
            mass_at, moment_at = below[at], moment[at]
        held = np.diff(mass_at)
        if absolute:
            middle = np.interp(mass_at[:-1] + held / 2, below, values)
        else:
            middle = np.diff(moment_at) / np.where(held > 0, held, 1)
        moved = np.where(stays | (held <= 0), levels, middle)
        done = np.abs(moved - levels).max() <= 1e-9
        levels = np.sort(moved)
        if done:
            break
    return levels


def _start(count: int) -> np.ndarray:
    """Evenly spread quantiles of a normal distribution over [-1, 1], -1, 0 and 1 among them."""
    above = special.ndtri(np.linspace(0.5, 0.97, count // 2 + 1)[1:])
    under = special.ndtri(np.linspace(0.5, 0.97, (count - 1) // 2 + 1)[1:])
    return np.concatenate([-under[::-1] / under[-1], [0.0], above / above[-1]])


@functools.lru_cache(maxsize=32)
def derive_af4(blocksize: int = 64) -> tuple[float, ...]:
    """AbnormalFloat for a block size: least absolute error of normalized values; -1, 0, 1 kept.

    As in its paper's table, 0 is where the two halves' cells meet while they are fitted, eight
    levels above it and seven below, and is put between them afterwards. (Fitted with 0 as a level
    like the others the error would be 3% lower, but that would not be AF4.)
    """
    x, mass = block_density(blocksize)
    half = x.size // 2
    start = _start(16)
    above = lloyd(x[half:], mass[half:], start[8:], absolute=True, fixed=(1.0,))
    below = lloyd(x[: half + 1], mass[: half + 1], start[:7], absolute=True, fixed=(-1.0,))
    return (*below.tolist(), 0.0, *above.tolist())


@functools.lru_cache(maxsize=32)
def derive_bof4(blocksize: int = 64, absolute: bool = False) -> tuple[float, ...]:
    """Block-wise Optimal Float: least squared (or absolute) error of the weights; -1, 0, 1 kept."""
    density = block_density(blocksize, 1 if absolute else 2)
    found = lloyd(*density, _start(16), absolute=absolute, fixed=(-1.0, 0.0, 1.0))
    return tuple(found.tolist())


@functools.lru_cache(maxsize=32)
def derive_levels(count: int, blocksize: int = 64) -> tuple[float, ...]:
    """``count`` levels of least squared error of normal weights, none of them kept.

    The value that is the block's largest, ±1, counts here: with few levels it matters.
    """
    x, mass = block_density(blocksize, 2)
    mass = mass * (blocksize - 1) / blocksize
    mass[[0, -1]] += 1 / (2 * blocksize)
    begin = np.linspace(-1, 1, 2 * count + 1)[1::2]
    return tuple(lloyd(x, mass, begin).tolist())


_SAMPLE = 1 << 18


def learn_codebook(
    weights: torch.Tensor,
    blocksize: int,
    energy: torch.Tensor | None = None,
    begin: Sequence[float] | None = None,
) -> list[float]:
    """16 levels for one weight: k-means of its blockwise normalized values.

    The idea of any4 (arXiv 2507.04610), which learns one codebook a *row*; a kernel here takes one
    a weight. Values count by the square of their block's absmax, because that is what their error
    is multiplied with, and by the mean square of the activation that multiplies their column. Of
    more than 262,144 values evenly spread blocks are taken.

    Args:
        weights: ``[N, K]``, any float.
        blocksize: values a scale.
        energy: fp32 ``[K]``, the mean square of each input; all alike if None.
        begin: 16 levels to begin with; those of BOF4 if None.

    Returns:
        16 floats, ascending. On these values (of a sample, on the sample) their error is never
        above that of ``begin``.

    Raises:
        ValueError: an energy of another length; weights that are not finite, or all zero.
    """
    flat = weights.detach().reshape(-1).double().cpu()
    if not torch.isfinite(flat).all():
        raise ValueError("the weights hold NaN or infinities: nothing can be learned from them")
    columns = weights.shape[-1]
    importance = torch.ones_like(flat)
    if energy is not None:
        if energy.numel() != columns:
            raise ValueError(
                f"energy must have {columns} values, one a column, got {energy.numel()}"
            )
        importance = energy.detach().double().cpu().repeat(flat.numel() // columns)
    pad = -flat.numel() % blocksize
    blocks = torch.nn.functional.pad(flat, (0, pad)).view(-1, blocksize)
    # What pads a ragged last block counts nothing.
    importance = torch.nn.functional.pad(importance, (0, pad)).view(-1, blocksize)
    step = max(1, math.ceil(flat.numel() / _SAMPLE))
    blocks, importance = blocks[::step], importance[::step]
    absmax = blocks.abs().amax(1, keepdim=True)
    if not absmax.any():
        raise ValueError("the weights are all zero: nothing can be learned from them")
    values = (blocks / absmax.clamp(min=1e-38)).reshape(-1).numpy()
    mass = (importance * absmax**2).reshape(-1).numpy()
    order = np.argsort(values, kind="stable")
    start = derive_bof4(blocksize) if begin is None else begin
    found = lloyd(values[order], mass[order] / mass.sum(), start, density=False, rounds=100)
    return found.tolist()
