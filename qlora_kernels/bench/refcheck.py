"""How far a result may be from the float64 reference: by K and the dtype, not fitted.

Of a product y = x W^T, with |x| |W|^T = A (what an error of each term may add up to) and
(x²) (W²)^T = V (what independent errors add up to, squared):

    each value   |y - y64| <= (r u + K v) A + w |y64|
    their RMS    rms(y - y64) <= 3 sqrt(mean((r u² / 3 + K v²) V + w² y64² / 3))

``u`` and ``w`` are half an ulp of the compute dtype and of the result's, ``v = 2^-24`` of fp32,
in which sums are kept. ``r`` counts roundings that a term may see: of x, of the code, of its scale
and of their product (4), and as many for LoRA's factors. The first bound holds whatever the values
are, and is loose: it finds single values that are wrong. The second takes roundings for
independent: a scale that is 2% off, a block left out or a row that was exchanged exceeds it in
every dtype. Its factor 3 leaves room for the partial sums that some libraries keep in bf16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ROWS", "Terms", "chosen_rows", "product", "within"]

ROWS = 16
"""Rows of x that are checked, all outputs of each; the first and the last are among them."""

_CHUNK = 1024  # rows of W in float64 at a time
_U32 = 2.0**-24


@dataclass
class Terms:
    """float64 ``[rows, outputs]``: the result, and what errors of its terms may add up to."""

    value: Tensor
    size: Tensor
    variance: Tensor
    length: int  # terms of a sum
    roundings: int = 4  # that a term may see

    def __add__(self, other: Terms) -> Terms:
        return Terms(
            self.value + other.value, self.size + other.size, self.variance + other.variance,
            self.length + other.length, max(self.roundings, other.roundings),
        )  # fmt: skip

    def through(self, b: Tensor, scaling: float = 1.0) -> Terms:
        """``scaling * self b^T`` for ``b [outputs, length]``: the second factor of LoRA."""
        b = b.double()
        return Terms(
            scaling * (self.value @ b.T), abs(scaling) * (self.size @ b.abs().T),
            scaling**2 * (self.variance @ b.square().T), self.length + b.shape[1],
            2 * self.roundings,
        )  # fmt: skip

    def transposed(self) -> Terms:
        return Terms(self.value.T, self.size.T, self.variance.T, self.length, self.roundings)


def chosen_rows(m: int, most: int = ROWS) -> Tensor:
    """Which rows of m are checked: all, or the first, the last and some between."""
    if m <= most:
        return torch.arange(m)
    generator = torch.Generator().manual_seed(m)
    between = 1 + torch.randperm(m - 2, generator=generator)[: most - 2]
    return torch.cat([torch.tensor([0]), between.sort().values, torch.tensor([m - 1])])


def product(x: Tensor, w: Tensor, *, transposed: bool = True) -> Terms:
    """``x w^T`` in float64 (``x w`` with ``transposed=False``), for ``w [n, k]``."""
    x = x.double()
    size = (x.shape[0], w.shape[0] if transposed else w.shape[1])
    value, bound, variance = (torch.zeros(size, dtype=torch.float64) for _ in range(3))
    for first in range(0, w.shape[0], _CHUNK):
        at = slice(first, first + _CHUNK)
        part = w[at].double()
        for out, a, b in (
            (value, x, part),
            (bound, x.abs(), part.abs()),
            (variance, x.square(), part.square()),
        ):
            if transposed:
                out[:, at] = a @ b.T
            else:
                out += a[:, at] @ b
    return Terms(value, bound, variance, w.shape[1] if transposed else w.shape[0])


def _u(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def within(want: Terms, compute: torch.dtype, rows: Tensor | None = None) -> Callable:
    """A check of results against ``want``.

    Args:
        compute: the dtype that operands are rounded to.
        rows: of the result; all of them unless given.

    Returns:
        A function of a result (any float dtype and device) that says what is wrong, or None.
    """

    def check(got: Tensor) -> str | None:
        mine = got.reshape(-1, got.shape[-1])
        mine = mine if rows is None else mine[rows.to(got.device)]
        if mine.shape != want.value.shape:
            return f"shape {list(mine.shape)}, not {list(want.value.shape)}"
        u, out = _u(compute), _u(got.dtype)
        error = (mine.detach().cpu().double() - want.value).abs()
        r, length = want.roundings, want.length
        bound = (r * u + length * _U32) * want.size + out * want.value.abs()
        bad = ~(error <= bound)  # NaN too
        if bad.any():
            i, j = (int(v) for v in bad.nonzero()[0])
            return (
                f"{int(bad.sum())} of {bad.numel()} values beyond the bound; the first at "
                f"[{i if rows is None else int(rows[i])}, {j}]: {mine[i, j].item():.6g}, "
                f"expected {want.value[i, j].item():.6g} +- {bound[i, j].item():.2g}"
            )
        spread = (r * u**2 / 3 + length * _U32**2) * want.variance
        limit = 3 * (spread + (out * want.value).square() / 3).mean().sqrt().item()
        rms = error.square().mean().sqrt().item()
        scale = want.value.square().mean().sqrt().item()
        if not rms <= limit:
            return (
                f"root mean square error {rms / scale:.2g} of the result, "
                f"at most {limit / scale:.2g} (K = {length}, {str(compute).removeprefix('torch.')})"
            )
        return None

    return check
