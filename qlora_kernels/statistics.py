"""How sure a measured number is: intervals, paired differences, the smallest difference visible.

Everything takes plain sequences or NumPy arrays and an explicit seed. One entry is one
*independent* measurement (a window of text, a question, a training seed), never a token of the same
text: intervals over dependent values come out too narrow.

Needs SciPy (the extras ``finetune`` and ``judge``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize, special, stats

__all__ = [
    "FEW",
    "Difference",
    "Interval",
    "bootstrap_interval",
    "detectable_difference",
    "mean_interval",
    "paired_difference",
    "proportion_interval",
]

FEW = 8
"""Below this many values resampling them gives intervals that are too narrow (three values have ten
different resamples), and a mean gets Student's t instead."""

_CHUNK = 1 << 22  # resampled values held at once


class Interval(NamedTuple):
    """From ``low`` to ``high``; both NaN where the values cannot say."""

    low: float
    high: float


class Difference(NamedTuple):
    """A mean difference and its interval."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero."""
        return self.low > 0 or self.high < 0


def _values(values: Sequence[float] | np.ndarray, what: str = "values") -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{what} must be one row of at least one number, got {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(
            f"{what} must be finite; value {np.flatnonzero(~np.isfinite(array))[0]} is not"
        )
    return array


def _check_level(level: float, what: str = "level") -> None:
    if not 0 < level < 1:
        raise ValueError(f"{what} must be between 0 and 1, got {level}")


def bootstrap_interval(
    values: Sequence[float] | np.ndarray,
    statistic: Callable[..., Any] = np.mean,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """The percentile bootstrap's interval of a statistic.

    Args:
        values: one row; one entry an independent measurement.
        statistic: of a row; it must take ``axis=`` as NumPy's do, and is called on many resampled
            rows at once.
        level: the share of such intervals that should hold the true value.
        resamples: rows drawn, with replacement.
        seed: of the drawing. The same seed draws the same rows for any row of that length, so that
            two statistics over the same measurements are resampled together.

    Returns:
        low and high. Both are NaN for a single value. With fewer than :data:`FEW` values it is too
        narrow; for a mean, :func:`mean_interval` is better there.

    Raises:
        ValueError: no values, NaN or infinities, a level outside (0, 1), no resamples.
    """
    array = _values(values)
    _check_level(level)
    if resamples < 1:
        raise ValueError(f"resamples must be positive, got {resamples}")
    if array.size == 1:
        return Interval(float("nan"), float("nan"))
    generator = np.random.default_rng(seed)
    found = np.empty(resamples)
    rows = max(1, _CHUNK // array.size)
    for first in range(0, resamples, rows):
        part = found[first : first + rows]
        drawn = generator.integers(0, array.size, (part.size, array.size))
        part[:] = statistic(array[drawn], axis=-1)
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def mean_interval(
    values: Sequence[float] | np.ndarray,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """The interval of a mean: bootstrap, and Student's t for fewer than :data:`FEW` values.

    Raises:
        ValueError: as :func:`bootstrap_interval`.
    """
    array = _values(values)
    if array.size >= FEW:
        return bootstrap_interval(array, np.mean, level, resamples, seed)
    _check_level(level)
    if array.size == 1:
        return Interval(float("nan"), float("nan"))
    half = stats.t.ppf((1 + level) / 2, array.size - 1) * stats.sem(array)
    return Interval(float(array.mean() - half), float(array.mean() + half))


def paired_difference(
    a: Sequence[float] | np.ndarray,
    b: Sequence[float] | np.ndarray,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Difference:
    """The mean of ``a - b`` with its interval, where ``a[i]`` and ``b[i]`` are of the same thing.

    Pairing takes out what both share (a text that is hard for every model), so that a difference
    far below the spread of either is visible. Fewer than :data:`FEW` pairs: Student's t.

    Raises:
        ValueError: rows of different length, or as :func:`bootstrap_interval`.
    """
    first, second = _values(a, "a"), _values(b, "b")
    if first.size != second.size:
        raise ValueError(f"a and b must be pairs, got {first.size} and {second.size} values")
    differences = first - second
    return Difference(
        float(differences.mean()), *mean_interval(differences, level, resamples, seed)
    )


@functools.cache
def _quadrature() -> tuple[np.ndarray, np.ndarray]:
    """Nodes in (-1, 1) and weights; half a second to make."""
    return np.polynomial.legendre.leggauss(400)


def detectable_difference(
    differences: Sequence[float] | np.ndarray, level: float = 0.95, power: float = 0.8
) -> float:
    """The smallest true mean difference that a test of such differences would find.

    How far from zero the true mean must be for a two-sided t test at ``level`` to call it different
    with probability ``power``, given as many differences as these, spread as these are. In the unit
    of the differences; infinite for one difference, 0 where all are alike.

    Raises:
        ValueError: no values, NaN or infinities, a level or power outside (0, 1), or a power that
            chance alone reaches (at most ``1 - level``).
    """
    array = _values(differences, "differences")
    _check_level(level)
    _check_level(power, "power")
    if power <= 1 - level:
        raise ValueError(f"power must be above 1 - level = {1 - level:.3g}, got {power}")
    if array.size == 1:
        return float("inf")
    error = float(stats.sem(array))
    if error == 0.0:
        return 0.0
    freedom = array.size - 1
    limit = stats.t.ppf((1 + level) / 2, freedom)
    # Given the sample's spread the mean is normal: averaged over the spread's quantiles, the power
    # has no tail that a noncentral t's own function loses.
    nodes, shares = _quadrature()
    spread = np.sqrt(stats.chi2.ppf((nodes + 1) / 2, freedom) / freedom)

    def short(shift: float) -> float:
        beyond = special.ndtr(shift - limit * spread) + special.ndtr(-shift - limit * spread)
        return power - float((shares / 2) @ beyond)

    top = 1.0
    while short(top) > 0:
        top *= 2
    return float(optimize.brentq(short, 0.0, top)) * error


def proportion_interval(successes: int, n: int, level: float = 0.95) -> Interval:
    """Wilson's interval of a proportion: within [0, 1], sensible at 0 and n successes too.

    Raises:
        ValueError: ``n`` not positive, ``successes`` outside 0 … n, a level outside (0, 1).
    """
    _check_level(level)
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"successes must be 0 to n and n positive, got {successes} of {n}")
    found = stats.binomtest(int(successes), int(n)).proportion_ci(level, method="wilson")
    return Interval(float(found.low), float(found.high))
