"""What a format loses of weights: the weights to try it on, and the errors.

Weights are quantized by ``quantize_4bit`` and read back by ``dequantize_4bit``, in fp32, so that an
error is the format's and not that of a 16-bit result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .. import functional as F4
from ..finetune.errors import BadInput
from ..statistics import detectable_difference, mean_interval, paired_difference
from .contenders import Contender

__all__ = [
    "SYNTHETIC",
    "WeightError",
    "errors_of",
    "measure",
    "q4_1_sqnr",
    "summarize",
    "synthetic",
]


def _normal(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator)


def _student(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    # Five degrees of freedom: a normal value over the root of a mean of five squared ones.
    squares = torch.randn((5, *shape), generator=generator).square().mean(0)
    return torch.randn(shape, generator=generator) / squares.sqrt()


def _outliers(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    values = torch.randn(shape, generator=generator)
    return torch.where(torch.rand(shape, generator=generator) < 1e-3, 10 * values, values)


SYNTHETIC: dict[str, Callable[[tuple[int, int], torch.Generator], torch.Tensor]] = {
    "normal": _normal,
    "student-t": _student,
    "outliers": _outliers,
}
"""Kinds of weights that are drawn: normal; Student's t with 5 degrees of freedom; normal, one value
in
a thousand ten times as large."""


def synthetic(
    kind: str, layers: int = 12, shape: tuple[int, int] = (256, 1024), seed: int = 0
) -> dict[str, torch.Tensor]:
    """Drawn weights, fp32, of standard deviation 0.02 or about that, each layer from its own seed.

    Raises:
        BadInput: a kind that is not offered.
    """
    if kind not in SYNTHETIC:
        raise BadInput(f"there are no {kind!r} weights; {', '.join(SYNTHETIC)} can be drawn")
    return {
        f"{kind}.{i}": 0.02
        * SYNTHETIC[kind](shape, torch.Generator().manual_seed(seed * 1_000_003 + i))
        for i in range(layers)
    }


@dataclass(frozen=True)
class WeightError:
    """Of one weight in one format.

    Attributes:
        layer: the weight's name.
        values: how many.
        power: the sum of its squares.
        squared, absolute: sums of squared and of absolute errors.
        largest: the largest error.
    """

    layer: str
    values: int
    power: float
    squared: float
    absolute: float
    largest: float

    @property
    def mse(self) -> float:
        return self.squared / self.values

    @property
    def mae(self) -> float:
        return self.absolute / self.values

    @property
    def sqnr(self) -> float:
        """Signal over noise in decibels; infinite where nothing is lost."""
        return decibels(self.power, self.squared)


def decibels(power: float, noise: float) -> float:
    """``10 log10(power / noise)``; infinite without noise."""
    return 10 * math.log10(power / noise) if noise > 0 and power > 0 else math.inf


def errors_of(layer: str, weights: torch.Tensor, restored: torch.Tensor) -> WeightError:
    """The errors of ``restored`` against ``weights``, of one shape; sums in float64."""
    error = (restored.float() - weights.float()).abs()
    return WeightError(
        layer,
        weights.numel(),
        float(weights.double().square().sum()),
        float(error.double().square().sum()),
        float(error.double().sum()),
        float(error.max()),
    )


def measure(
    contender: Contender,
    weights: Iterable[tuple[str, torch.Tensor]],
    energies: Mapping[str, torch.Tensor] | None = None,
) -> list[WeightError]:
    """Each weight ``[N, K]`` quantized and read back, on the device that it is on.

    Args:
        energies: the mean square of each input of each layer, for designs that learn.
    """
    found = []
    for name, weight in weights:
        fmt = contender.format_for(weight, None if energies is None else energies.get(name))
        packed, state = F4.quantize_4bit(
            weight,
            blocksize=contender.blocksize,
            compress_statistics=contender.nested,
            quant_type=fmt,
        )
        found.append(
            errors_of(name, weight, F4.dequantize_4bit(packed, state, dtype=torch.float32))
        )
    return found


def summarize(
    errors: Sequence[WeightError], reference: Sequence[WeightError] | None = None
) -> dict[str, Any]:
    """All layers in one row: errors of all values together, and the layers' SQNR with its interval.

    Args:
        reference: the same layers in the format to compare with: adds the mean difference of SQNR
            in dB, paired by layer, its interval, and the smallest one that was to be seen.

    Returns:
        plain values: ``mse``, ``mae``, ``largest``, ``sqnr`` (of all values), ``sqnr_mean`` with
        ``sqnr_low`` and ``sqnr_high`` (of layers), and ``versus``.
    """
    values = sum(e.values for e in errors)
    layers = [e.sqnr for e in errors]
    finite = all(map(math.isfinite, layers))
    low, high = mean_interval(layers) if finite else (math.nan, math.nan)
    row: dict[str, Any] = {
        "values": values,
        "mse": sum(e.squared for e in errors) / values,
        "mae": sum(e.absolute for e in errors) / values,
        "largest": max(e.largest for e in errors),
        "sqnr": decibels(sum(e.power for e in errors), sum(e.squared for e in errors)),
        "sqnr_mean": sum(layers) / len(layers),
        "sqnr_low": low,
        "sqnr_high": high,
    }
    if reference is not None and finite and all(math.isfinite(e.sqnr) for e in reference):
        theirs = [e.sqnr for e in reference]
        mean, low, high = paired_difference(layers, theirs)
        seen = detectable_difference([a - b for a, b in zip(layers, theirs, strict=True)])
        row["versus"] = {"mean": mean, "low": low, "high": high, "detectable": seen}
    return row


def q4_1_sqnr(weight: torch.Tensor) -> float:
    """How near a weight is to a Q4_1 grid, as the SQNR in dB of 16 even levels from the smallest to
    the largest value of each block of 32: beyond 40 says that it came from one (what is left is the
    rounding of 16-bit values), normal weights give 21.
    """
    rows = weight.detach().float().reshape(-1)
    rows = rows[: rows.numel() // 32 * 32].view(-1, 32)
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    step = ((high - low) / 15).clamp(min=1e-30)
    restored = ((rows - low) / step).round() * step + low
    return errors_of("", rows, restored).sqnr
