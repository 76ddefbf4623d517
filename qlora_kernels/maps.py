"""bitsandbytes' tables by name: what the codes of 8 and fewer bits mean, and the code of a value.

A map is fp32 ``[256]``, ascending; one of fewer bits is padded with zeros. ``quantize_blockwise``
takes them, and any other 256 ascending values.
"""

from __future__ import annotations

import functools
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from .formats import FP4, NF4, constant, dynamic_code

SIZE = 256

# AbnormalFloat for blocks of 64 (arXiv 2306.06965, table of code values), from the largest down.
_AF4_64 = (
    1.0, 0.72424863, 0.55496234, 0.42563882, 0.31675666, 0.21961274, 0.12934483, 0.04273164,
    0.0, -0.04934812, -0.14982478, -0.25607552, -0.3736951, -0.51243739, -0.69441008, -1.0,
)  # fmt: skip


def _padded(values: np.ndarray) -> Tensor:
    """Ascending fp32, zeros added up to 256."""
    zeros = np.zeros(SIZE - values.size, np.float32)
    return torch.from_numpy(np.sort(np.concatenate([values.astype(np.float32), zeros])))


def create_linear_map(signed: bool = True, total_bits: int = 8, add_zero: bool = True) -> Tensor:
    """Evenly spaced values of [-1, 1], or of [0, 1] unsigned.

    Signed ones lose a code where zero is to be among them (``add_zero``, or fewer than 8 bits).
    """
    count = 2**total_bits
    if signed and (add_zero or total_bits < 8):
        count -= 1
    values = torch.linspace(-1.0 if signed else 0.0, 1.0, count)
    below = count // 2
    return torch.cat([values[:below], torch.zeros(SIZE - count), values[below:]])


def create_dynamic_map(
    signed: bool = True, max_exponent_bits: int = 7, total_bits: int = 8
) -> Tensor:
    """The dynamic code: :func:`~qlora_kernels.formats.dynamic_code`.

    Args:
        max_exponent_bits: how many decades.
        total_bits: codes are ``2 ** total_bits``.

    Raises:
        ValueError: the two do not give that many codes.
    """
    values = dynamic_code(signed, max_exponent_bits, total_bits)
    if values.size != 2**total_bits:
        raise ValueError(
            f"max_exponent_bits={max_exponent_bits} gives {values.size} values, not the "
            f"{2**total_bits} of total_bits={total_bits}"
        )
    return _padded(values)


def create_fp8_map(
    signed: bool = True, exponent_bits: int = 5, precision_bits: int = 2, total_bits: int = 8
) -> Tensor:
    """A small float's values over its largest: a sign, an exponent, a fraction, subnormals.

    As bitsandbytes has it, whose exponents count down: exponent field ``e`` above 0 stands for
    ``2 ** (2 ** (exponent_bits - 1) + 1 - e)``, field 0 for subnormals in units of
    ``2 ** -(2 ** (exponent_bits - 1))``.

    Raises:
        ValueError: the bits do not add up to ``total_bits``.
    """
    if exponent_bits + precision_bits + bool(signed) != total_bits:
        raise ValueError(
            f"{int(signed)} sign, {exponent_bits} exponent and {precision_bits} precision bits do "
            f"not add up to total_bits={total_bits}"
        )
    bias = 2 ** (exponent_bits - 1)
    fractions = np.arange(2**precision_bits) / 2**precision_bits
    values = [fractions * 2.0**-bias]
    values += [(1 + fractions) * 2.0 ** (bias + 1 - e) for e in range(1, 2**exponent_bits)]
    if signed:
        values += [-v for v in values]
    flat = np.concatenate(values).astype(np.float32)
    return _padded(flat / flat.max())


def create_normal_map(offset: float = 0.9677083, use_extra_value: bool = True) -> Tensor:
    """NormalFloat's values (QLoRA, section 3), computed anew: within 1e-6 of the table of NF4.

    Quantiles of a normal distribution, evenly spaced in probability from ``offset`` to one half,
    over the largest: eight above zero (seven without ``use_extra_value``), seven below.
    """
    quantile = NormalDist().inv_cdf
    upper = torch.linspace(offset, 0.5, 9 if use_extra_value else 8)[:-1].tolist()
    lower = torch.linspace(offset, 0.5, 8)[:-1].tolist()
    values = np.array([*map(quantile, upper), *(-quantile(p) for p in lower)])
    values = values.astype(np.float32)
    return _padded(values / values.max())


def get_4bit_type(
    typename: str, device: torch.device | str | None = None, blocksize: int = 64
) -> Tensor:
    """fp32 ``[16]``: what the codes of ``nf4``, ``fp4``, ``int4`` or ``af4`` mean.

    Args:
        device: the GPU where there is one, else the CPU, unless given.
        blocksize: of ``af4``, whose values depend on it; only 64 is known.

    Raises:
        NotImplementedError: another name, or ``af4`` with another block size.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if typename == "af4" and blocksize != 64:
        raise NotImplementedError(f"af4 is known for a blocksize of 64, not {blocksize}")
    known = {
        "nf4": NF4.codebook,
        "fp4": FP4.codebook,
        "int4": [v / 7 for v in (*range(7, -1, -1), *range(0, -8, -1))],
        "af4": _AF4_64,
    }
    if typename not in known:
        raise NotImplementedError(f"typename must be one of {', '.join(known)}, got {typename!r}")
    return torch.tensor(list(known[typename]), dtype=torch.float32, device=device)


# --- the code of a value --------------------------------------------------------------------------

_GRID = 65536


@functools.lru_cache(maxsize=16)
def _codes_of_grid(values: bytes) -> np.ndarray:
    """uint8 [65536]: for each point of a grid over [-1, 1] the code whose value is nearest."""
    code = np.frombuffer(values, np.float32)
    middles = np.float32(0.5) * (code[:-1] + code[1:])
    points = np.arange(0, 2 * _GRID, 2, dtype=np.float32) / np.float32(_GRID - 1) - np.float32(1)
    return np.searchsorted(middles, points, side="left").astype(np.uint8)


def quantize_codes(values: Tensor, code: Tensor) -> Tensor:
    """uint8: for each of ``values``, fp32 in [-1, 1], the code that bitsandbytes gives it.

    It goes by the nearest of 65,536 points over [-1, 1], then by the code nearest to that point,
    the lower one of two: within 2^-16 of a boundary between codes it may be the other neighbour.
    """
    table = np.ascontiguousarray(code.detach().cpu().numpy(), dtype=np.float32)
    codes = constant(("grid", table.tobytes()), _codes_of_grid(table.tobytes()), values.device)
    half = (values + 1) * 0.5
    point = (half.double() * (_GRID - 1) + 0.5).float()  # the last two steps round once
    return codes[point.nan_to_num(0.0).long().clamp_(0, _GRID - 1)]
