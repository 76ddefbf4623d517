"""Number formats as data: 16 codebook values, 15 thresholds, the order of the codes.

A 4-bit format is an object, never a branch in a kernel. Every kernel (CPU, CUDA, Triton) and the
reference take the same three small tables:

``codebook``
    16 fp32 values, indexed by code; any order, repeats allowed (bitsandbytes' FP4 is unsorted and
    holds zero twice).
``thresholds``
    15 fp32 values, ascending. A normalized value ``v = w / absmax`` has
    ``rank = number of thresholds t with v > t``.
``codes``
    16 uint8: the code of each rank.

By default a threshold is the midpoint of neighbouring values, computed in fp32, and the *lower*
neighbour wins a tie. A format may give its own thresholds and say which ties the upper one wins;
that side is folded into the threshold (moved down by one ulp), so that kernels know one rule only.

Scales stand beside the codes, one a block: ``fp32`` absmax, or ``nested`` (double quantization,
QLoRA section 3): an 8-bit code, one fp32 nested absmax per 256 blocks and one fp32 offset. What the
256 codes mean is data too, a `ScaleCode`; QLoRA's is the dynamic code.
"""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch
from torch.utils._python_dispatch import _disable_current_modes

BLOCKSIZES: tuple[int, ...] = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Values that share one scale. Powers of two: a block's index is a shift in every kernel."""

NESTED_BLOCKSIZE = 256
"""Scales that share one nested absmax in double quantization."""

# The divisor of a block whose absmax is zero or below this; part of the format (facts: the peer's).
MIN_ABSMAX = 1e-38


SCALES: tuple[str, ...] = ("fp32", "e8m0", "e4m3")
"""Kinds of a block's scale: fp32 (which may be double-quantized), a power of two in one byte, and
an 8-bit float times one fp32 scale of the whole tensor."""


class FormatError(ValueError):
    """A codebook, threshold list or format name that cannot be used."""


def _f32(values: Sequence[float], what: str, count: int) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64).reshape(-1)
    if array.size != count:
        raise FormatError(f"{what} needs {count} values, got {array.size}")
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    if not np.isfinite(array).all():
        bad = int(np.flatnonzero(~np.isfinite(array))[0])
        raise FormatError(f"{what} must be finite in fp32; value {bad} is {array[bad]}")
    return array


@dataclass(frozen=True, eq=False)
class ScaleCode:
    """What the 256 codes of double-quantized scales mean.

    A block's scale is ``float32(values[code] * nested_absmax) + offset``: with values of your own a
    scale is any number of 8 bits that you like, in every kernel.

    Args:
        name: how it is called, in checkpoints too.
        values: 256 finite values, ascending. A scale (less the offset) is divided by the largest
            magnitude among its group of 256 first, so that values in [-1, 1] are of use, and in
            [0, 1] where nothing is taken off. It gets the nearest one; the lower wins a tie.
        centered: take the mean of all scales off them first, as QLoRA does; the offset is 0 if not.

    Raises:
        FormatError: a wrong count, NaN or infinities, values that do not ascend.
    """

    name: str
    values: Sequence[float]
    centered: bool = True

    def __post_init__(self) -> None:
        values = _f32(self.values, f"the scale code {self.name!r}", 256)
        if np.any(np.diff(values) < 0) or values[0] == values[-1]:
            raise FormatError(f"the values of the scale code {self.name!r} must ascend")
        limits = np.float32(0.5) * values[:-1] + np.float32(0.5) * values[1:]
        object.__setattr__(self, "_tables", (values, limits))

    @property
    def tables(self) -> tuple[np.ndarray, np.ndarray]:
        """``(values fp32[256], thresholds fp32[255])``."""
        return self._tables  # type: ignore[attr-defined, no-any-return]

    def same(self, other: ScaleCode | None) -> bool:
        """Whether it gives the same codes and the same scales."""
        return other is not None and (
            self.centered == other.centered
            and all(np.array_equal(a, b) for a, b in zip(self.tables, other.tables, strict=True))
        )


@dataclass(frozen=True, eq=False)
class Format:
    """A 4-bit format: what each of the 16 codes means and which code a value gets.

    Args:
        name: how it is called, in checkpoints too.
        codebook: 16 finite values indexed by code, not all alike. By convention their largest
            magnitude is 1, so that ``absmax`` is the block's largest magnitude; others work (the
            normalized value is clamped to [-1, 1] first).
        thresholds: 15 ascending values between the *sorted* codebook values; derived as fp32
            midpoints when not given.
        ties: 15 flags, ``True`` where a value equal to the threshold takes the upper neighbour.
            The default is the lower one everywhere.
        scale: the kind of its blocks' scales, one of :data:`SCALES`; the last two, chosen as
            reference.normalize_scaled says, are one byte and not double-quantized.
        scale_code: what double quantization writes its scales with; None is QLoRA's dynamic code.

    Raises:
        FormatError: a wrong count, NaN or infinities, all values alike, unsorted thresholds, a kind
            of scale that is not offered, a scale code for scales that are one byte already.
    """

    name: str
    codebook: Sequence[float]
    thresholds: Sequence[float] | None = None
    ties: Sequence[bool] | None = None
    description: str = ""
    scale: str = "fp32"
    scale_code: ScaleCode | None = None

    def __post_init__(self) -> None:
        if self.scale_code is not None and self.scale != "fp32":
            raise FormatError(
                f"{self.name!r} has {self.scale} scales of one byte, so scale_code must be None"
            )
        if not self.name or not all(c.isalnum() or c in "_-." for c in self.name):
            raise FormatError(
                f"a format's name is letters, digits, '_', '-' or '.', got {self.name!r}"
            )
        if self.scale not in SCALES:
            raise FormatError(
                f"the scale of {self.name!r} must be one of {', '.join(SCALES)}, got {self.scale!r}"
            )
        book = _f32(self.codebook, f"the codebook of {self.name!r}", 16)
        if np.all(book == book[0]):
            raise FormatError(f"the codebook of {self.name!r} has 16 equal values ({book[0]})")
        codes = np.argsort(book, kind="stable").astype(np.uint8)
        if self.thresholds is None:
            ranked = book[codes]
            limits = (ranked[:-1] + ranked[1:]) / np.float32(2)
        else:
            limits = _f32(self.thresholds, f"the thresholds of {self.name!r}", 15)
            if np.any(np.diff(limits) < 0):
                raise FormatError(f"the thresholds of {self.name!r} must be ascending")
        if self.ties is not None:
            if len(self.ties) != 15:
                raise FormatError(f"ties of {self.name!r} needs 15 flags, got {len(self.ties)}")
            upper = np.asarray(self.ties, dtype=bool)
            below = np.nextafter(limits, np.float32(-np.inf), dtype=np.float32)
            limits = np.where(upper, below, limits)
        object.__setattr__(self, "_tables", (book, limits, codes))

    @property
    def tables(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """``(codebook fp32[16], thresholds fp32[15] with ties folded in, codes uint8[16])``."""
        return self._tables  # type: ignore[attr-defined, no-any-return]

    def tensors(
        self, device: torch.device | str = "cpu"
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The same three tables as tensors on ``device``, made once a device."""
        return tuple(  # type: ignore[return-value]
            constant((self, i), table, device) for i, table in enumerate(self.tables)
        )

    def scale_tensors(
        self, device: torch.device | str = "cpu"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``(values fp32[256], thresholds fp32[255])`` of the scale code, on ``device``."""
        if self.scale_code is None:
            return nested_code(device), nested_thresholds(device)
        tables = self.scale_code.tables
        return (
            constant((self.scale_code, 0), tables[0], device),
            constant((self.scale_code, 1), tables[1], device),
        )

    def bits_per_weight(self, blocksize: int, nested: bool) -> float:
        """Bits a weight, constants included: 4.127 for nested scales at a blocksize of 64."""
        check_blocksize(blocksize)
        self.check_nested(nested)
        if self.scale != "fp32":
            return 4 + 8 / blocksize
        if nested:
            return 4 + 8 / blocksize + 32 / (blocksize * NESTED_BLOCKSIZE)
        return 4 + 32 / blocksize

    def check_nested(self, nested: bool) -> None:
        """Raises FormatError where scales of one byte were to be double-quantized."""
        if nested and self.scale != "fp32":
            raise FormatError(
                f"{self.name!r} has {self.scale} scales of one byte, which double quantization "
                "does not apply to: compress_statistics must be False"
            )

    def __repr__(self) -> str:
        return f"Format({self.name!r})"

    def __reduce__(self) -> tuple:
        # By name where that means the same, so that copies and workers share the cached tables.
        if FORMATS.get(self.name) is self:
            return get_format, (self.name,)
        args = (
            self.name, self.codebook, self.thresholds, self.ties, self.description, self.scale,
            self.scale_code,
        )  # fmt: skip
        return Format, args


_KEPT: dict[tuple[object, torch.device], torch.Tensor] = {}


def constant(key: object, table: np.ndarray, device: torch.device | str) -> torch.Tensor:
    """``table`` as a tensor on ``device``, made once for each ``key`` and device.

    An ordinary tensor whatever is going on around: under inference mode too (it may be saved for a
    later backward), and under a dispatch mode, fake tensors say, one of that mode, not kept.
    """
    device = torch.device(device)
    if torch._C._len_torch_dispatch_stack():
        return torch.from_numpy(table.copy()).to(device)
    kept = _KEPT.get((key, device))
    if kept is None:
        with torch.inference_mode(False):
            kept = _KEPT[key, device] = torch.from_numpy(table.copy()).to(device)
    return kept


def derive_nf4(offset: float = 0.5 * ((1 - 1 / 30) + (1 - 1 / 32))) -> list[float]:
    """NormalFloat's 16 values (QLoRA section 3): quantiles of a standard normal, zero exact.

    Eight quantiles above zero, seven below, each half spaced evenly in probability from ``offset``
    (the mean of the outermost bins' middles for 15 and 16 bins) to one half, divided by the
    largest. The table in use (``NF4.codebook``) was once computed in lower precision and differs
    from this by about 1e-7; checkpoints need the table, so the table is the format.
    """
    ppf = NormalDist().inv_cdf
    upper = [ppf(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    lower = [-ppf(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    values = sorted([*upper, 0.0, *lower])
    return [v / values[-1] for v in values]


def _minifloat(exponent_bits: int, mantissa_bits: int) -> list[float]:
    """Magnitudes of a sign-exponent-mantissa format by code, sign bit on top, largest scaled to 1.

    Subnormals as IEEE 754; no infinities or NaN, as OCP Microscaling's E2M1.
    """
    bias = (1 << (exponent_bits - 1)) - 1
    values = []
    for code in range(8):
        exponent, mantissa = code >> mantissa_bits, code & ((1 << mantissa_bits) - 1)
        fraction = mantissa / (1 << mantissa_bits)
        value = fraction * 2.0 ** (1 - bias) if exponent == 0 else (1 + fraction) * 2.0**exponent
        values.append(value if exponent == 0 else value * 2.0**-bias)
    top = max(values)
    return [v / top for v in values] + [-v / top for v in values]


NF4 = Format(
    "nf4",
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    description="4-bit NormalFloat of QLoRA: quantiles of a normal distribution, zero exact",
)

# Twelfths, by bitsandbytes' code order: 0, 1/192, 2/3, 1, 1/3, 1/2, 1/6, 1/4, then negated. Code 8
# is a second +0: a normalized value in (0, 1/384] takes it.
_FP4 = [0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4]
FP4 = Format(
    "fp4",
    _FP4 + [0.0] + [-v for v in _FP4[1:]],
    description="bitsandbytes' FP4; not the standard E2M1, which is fp4_e2m1",
)
FP4_E2M1 = Format("fp4_e2m1", _minifloat(2, 1), description="OCP Microscaling's E2M1, scaled to 1")
FP4_E3M0 = Format(
    "fp4_e3m0", _minifloat(3, 0), description="sign and three exponent bits, scaled to 1"
)
INT4 = Format(
    "int4",
    [(code if code < 8 else code - 16) / 7 if code != 8 else -1.0 for code in range(16)],
    description="symmetric two's complement -7..7 over 7; code 8 repeats -1",
)

FORMATS: dict[str, Format] = {f.name: f for f in (NF4, FP4, FP4_E2M1, FP4_E3M0, INT4)}


def register_format(fmt: Format) -> Format:
    """Make a format known by its name (for checkpoints, command lines, ``quant_type=...``).

    Raises:
        FormatError: another format has that name already.
    """
    known = FORMATS.get(fmt.name)
    if known is not None and known is not fmt:
        same = all(np.array_equal(a, b) for a, b in zip(known.tables, fmt.tables, strict=True))
        codes = known.scale_code, fmt.scale_code
        same_code = codes[0] is codes[1] or (codes[0] is not None and codes[0].same(codes[1]))
        if not same or known.scale != fmt.scale or not same_code:
            raise FormatError(f"a different format is already registered as {fmt.name!r}")
        return known
    FORMATS[fmt.name] = fmt
    return fmt


def get_format(fmt: str | Format) -> Format:
    """A format by name (or itself).

    Raises:
        FormatError: an unknown name; the nearest one is suggested.
    """
    if isinstance(fmt, Format):
        return fmt
    if fmt in FORMATS:
        return FORMATS[fmt]
    near = difflib.get_close_matches(str(fmt), FORMATS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise FormatError(f"unknown 4-bit format {fmt!r}: known are {', '.join(FORMATS)}{hint}")


def check_blocksize(blocksize: int) -> int:
    """``blocksize`` if it is offered, else a ValueError that says what is."""
    if blocksize not in BLOCKSIZES:
        raise ValueError(
            f"blocksize must be one of {', '.join(map(str, BLOCKSIZES))}, got {blocksize!r}"
        )
    return int(blocksize)


@functools.lru_cache(maxsize=16)
def dynamic_code(signed: bool = True, decades: int = 7, bits: int = 8) -> np.ndarray:
    """fp32, ascending: the dynamic code (arXiv 1511.04561), precise near 1, far-reaching near 0.

    The decade that ends at 1 has the most values, each one below it half as many; a value is the
    middle of one of its decade's equal steps, or its negative. Zero and 1 are added. Without a sign
    its bit is spent on twice the steps. ``2 ** bits`` values, if ``decades`` goes with that.
    """
    fraction_bits = bits - 1 - decades
    parts: list[np.ndarray] = [np.array([0.0, 1.0], np.float32)]

    def add(steps: int, decade: int) -> None:
        with _disable_current_modes():  # real numbers, whatever tensors are around
            edges = torch.linspace(0.1, 1, steps + 1, dtype=torch.float32).numpy()
        # fp32 middles; the power of ten in float64, rounded.
        middles = np.float32(10.0**decade) * ((edges[:-1] + edges[1:]) / np.float32(2))
        parts.extend([middles, -middles] if signed else [middles])

    for i in range(decades):
        add(int(2.0 ** (i + fraction_bits + (not signed))), i + 1 - decades)
    if fraction_bits > 0:  # what is left goes to the last decade once more
        add(2**fraction_bits - 1, 0)
    return np.sort(np.concatenate(parts))


def nested_code(device: torch.device | str = "cpu") -> torch.Tensor:
    """fp32[256], ascending: the signed dynamic 8-bit code of the nested scales."""
    return constant("nested_code", dynamic_code(), device)


def unsigned_code(device: torch.device | str = "cpu") -> torch.Tensor:
    """fp32[256], ascending: the dynamic 8-bit code of values that are never negative."""
    return constant("unsigned_code", dynamic_code(signed=False), device)


def nested_thresholds(device: torch.device | str = "cpu") -> torch.Tensor:
    """fp32[255]: the code of a nested scale ``v`` is the number of thresholds t with ``v > t``."""
    return constant("nested_thresholds", _nested_thresholds(), device)


@functools.lru_cache(maxsize=1)
def _nested_thresholds() -> np.ndarray:
    """The thresholds that give the peer's codes.

    The peer looks ``v`` up on a grid of 65,536 points over [-1, 1]: nearest grid point, then the
    code whose cell holds that *point*. That is the same as moving each midpoint up to the
    smallest fp32 value whose grid point lies above it, which is done here once; kernels then
    compare, as for 4-bit codes, and agree with the peer bit for bit.
    """
    code = dynamic_code()
    middle = np.float32(0.5) * (code[:-1] + code[1:])
    return np.array([_grid_threshold(float(m)) for m in middle], np.float32)


def _grid_point(v: np.float32) -> int:
    # ((v + 1) * 0.5) * 65535 + 0.5 in fp32, the last two steps one fma, truncated.
    half = np.float32(np.float32(v + np.float32(1)) * np.float32(0.5))
    return int(np.float32(np.float64(half) * 65535.0 + 0.5))


def _grid_threshold(middle: float) -> np.float32:
    """Largest fp32 v whose grid point's value is at or below ``middle``."""

    def above(v: np.float32) -> bool:
        i = np.float32(2 * _grid_point(v)) / np.float32(65535)
        return bool(np.float32(middle) < np.float32(-1) + i)

    low, high = _ordinal(np.float32(-1)), _ordinal(np.float32(1))
    while high - low > 1:
        probe = (low + high) // 2
        if above(_from_ordinal(probe)):
            high = probe
        else:
            low = probe
    return _from_ordinal(low)


def _ordinal(v: np.float32) -> int:
    bits = int(np.float32(v).view(np.int32))
    return bits if bits >= 0 else -(bits & 0x7FFFFFFF)


def _from_ordinal(i: int) -> np.float32:
    return np.int32(i).view(np.float32) if i >= 0 else -np.int32(-i).view(np.float32)


def blocks(count: int, blocksize: int) -> int:
    """Blocks, the last one possibly ragged, that hold ``count`` values."""
    return math.ceil(count / blocksize)


def scale_dtype(scale: str, nested: bool) -> torch.dtype:
    """What a block's scale is stored as: int8 holds the byte of an E8M0 or E4M3 value."""
    if scale != "fp32":
        return torch.int8
    return torch.uint8 if nested else torch.float32
