"""Blockwise 4-bit quantization, and the double quantization of its scales: the reference's bits.

    scale   the block's largest magnitude, compared as integers: a NaN is the largest of all
    rank    how many of 15 thresholds v / scale is above: v * (1 / scale), clamped to [-1, 1]
    code    codes[rank]; a byte has the earlier value's code in its high nibble

A program takes 4096 values, whole blocks, as a tile of [blocks, values]:

    DRAM    16 bytes a lane; values stay in registers, so that each is read once
      |     the block's maximum, across lanes and warps (tl.max)
    lane    four steps of a binary search in thresholds of shared memory (tl.gather), so with codes
      v
    DRAM    packed bytes, turned around in shared memory to 16 bytes a lane

The tile that the tensor ends in has masks. Its last block, if ragged, is divided by its scale, not
multiplied by the reciprocal, as the format says.

Double quantization takes 256 scales a row. Their mean is reference.mean_in_order's halving tree in
float64, a level of 256 at a time; it is subtracted, and the rest is quantized as above to 8 bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import ops
from ..formats import MIN_ABSMAX, NESTED_BLOCKSIZE, blocks
from .blocks import E4M3, E8M0, FP32, OPTIONS, e4m3_value, e8m0_value
from .launch import launch

TILE = 4096
WARPS = 8
GROUPS = 1  # of 256 scales: a program's, of one warp
_TILE = tl.constexpr(TILE)
_GROUPS = tl.constexpr(GROUPS)
_GROUP = tl.constexpr(NESTED_BLOCKSIZE)
_MIN_ABSMAX = tl.constexpr(MIN_ABSMAX)


@triton.jit
def load_table(table, COUNT: tl.constexpr):
    """COUNT values, the last repeated, 256 in all: as many as a program has threads, or more, so
    that each thread of a tl.gather writes its own part of shared memory."""
    return tl.load(table + tl.minimum(tl.arange(0, 256), COUNT - 1))


@triton.jit
def look_up(table, index):
    return tl.gather(table, index.reshape([index.numel]), 0).reshape(index.shape)


@triton.jit
def rank_of(v, limits, LOG2: tl.constexpr):
    """How many of 2**LOG2 - 1 ascending limits v is above; a NaN is above all."""
    rank = tl.zeros(v.shape, tl.int32)
    for i in tl.static_range(LOG2):
        step = 1 << (LOG2 - 1 - i)
        rank += tl.where(v <= look_up(limits, rank + (step - 1)), 0, step)
    return rank


@triton.jit
def clamp_unit(v):
    """torch.clamp(-1, 1): a NaN stays one."""
    return tl.where(v < -1.0, -1.0, tl.where(v > 1.0, 1.0, v))


@triton.jit
def reciprocal(v):
    return tl.div_rn(tl.full(v.shape, 1.0, tl.float32), v)


@triton.jit
def magnitude(v):
    """The bits of |v|, which compare as |v| does; a NaN's are above infinity's."""
    return v.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def e4m3_byte(v):
    """Of v >= 0, rounded to nearest even; 464 and more (and NaN) give NaN."""
    bits = v.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    # Multiples of 2^-9: adding 2^23 leaves them, rounded, in the low bits.
    denormal = (v * 512.0 + 8388608.0).to(tl.int32, bitcast=True) & 0xF
    byte = tl.where(v < 0.015625, denormal, normal)
    return tl.where(v < 464.0, byte, 0x7F)


@triton.jit
def block_scale(bits, tensor_scale, ragged, SCALES: tl.constexpr):
    """The scale of a block from its largest magnitude's bits, and what is stored of it."""
    absmax = bits.to(tl.float32, bitcast=True)
    if SCALES == E8M0:  # the smallest power of two that is not below absmax
        byte = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.int32)
        byte = tl.where(bits <= 0x00400000, 0, byte)  # 2^-127 and below
        byte = tl.where(bits >= 0x7F800000, 255, tl.minimum(byte, 254))
        return e8m0_value(byte), byte.to(tl.int8)
    elif SCALES == E4M3:
        factor = tl.load(tensor_scale)
        byte = e4m3_byte(tl.div_rn(absmax, factor + tl.zeros(absmax.shape, tl.float32)))
        return e4m3_value(byte) * factor, byte.to(tl.int8)
    else:
        kept = tl.where(ragged & (absmax < _MIN_ABSMAX), _MIN_ABSMAX, absmax)
        return kept, kept


@triton.jit
def quantize_tile(
    values, limits, codes, packed, absmax, left, tensor_scale,
    SCALES: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = _TILE // BLOCK
    row = tl.arange(0, ROWS)
    at = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    byte = row[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    other: tl.constexpr = 0 if MASKED else None
    v = tl.load(values + at, mask=at < left if MASKED else None, other=other).to(tl.float32)
    ragged = (row + 1) * BLOCK > left if MASKED else row < 0
    scale, stored = block_scale(tl.max(magnitude(v), 1), tensor_scale, ragged, SCALES)
    divisor = tl.where(scale < _MIN_ABSMAX, _MIN_ABSMAX, scale)
    normalized = v * reciprocal(divisor)[:, None]
    if MASKED:
        divided = tl.div_rn(v, divisor[:, None] + tl.zeros(v.shape, tl.float32))
        normalized = tl.where(ragged[:, None], divided, normalized)
        normalized = tl.where(at < left, normalized, 0.0)  # the unused nibble of an odd count
    code = look_up(codes, rank_of(clamp_unit(normalized), limits, 4))
    earlier, later = tl.split(code.reshape([ROWS, BLOCK // 2, 2]))
    both = (earlier << 4 | later).to(tl.uint8)
    tl.store(packed + byte, both, mask=2 * byte < left if MASKED else None)
    tl.store(absmax + row, stored, mask=row * BLOCK < left if MASKED else None)


@triton.jit(do_not_specialize=["count"])
def quantize(
    values, thresholds, codes, packed, absmax, tensor_scale, count,
    SCALES: tl.constexpr, BLOCK_LOG2: tl.constexpr,
):  # fmt: skip
    BLOCK: tl.constexpr = 1 << BLOCK_LOG2
    tile = tl.program_id(0).to(tl.int64)
    values += tile * _TILE
    packed += tile * (_TILE // 2)
    absmax += tile * (_TILE // BLOCK)
    left = count - tile * _TILE
    limits = load_table(thresholds, 15)
    table = load_table(codes, 16).to(tl.int32)
    if left >= _TILE:
        quantize_tile(
            values, limits, table, packed, absmax, left, tensor_scale, SCALES, BLOCK, False
        )
    else:
        quantize_tile(
            values, limits, table, packed, absmax, left, tensor_scale, SCALES, BLOCK, True
        )


# --- double quantization --------------------------------------------------------------------------


@triton.jit
def groups_here():
    """A program's groups of 256, and where their values are."""
    group = tl.program_id(0).to(tl.int64) * _GROUPS + tl.arange(0, _GROUPS)
    return group, group[:, None] * _GROUP + tl.arange(0, _GROUP)[None, :]


@triton.jit(do_not_specialize=["count", "total"])
def sum_groups(values, sums, mean, count, total):
    """A level of reference.mean_in_order: each group's sum, and of the last one the mean."""
    group, at = groups_here()
    s = tl.load(values + at, mask=at < count, other=0.0).to(tl.float64)
    for _ in tl.static_range(8):
        lower, upper = tl.split(s.reshape([_GROUPS, 2, s.shape[1] // 2]).permute(0, 2, 1))
        s = lower + upper
    s = s.reshape([_GROUPS])
    tl.store(sums + group, s, mask=group * _GROUP < count)
    if count <= _GROUP:
        tl.store(mean + group, (s / total.to(tl.float64)).to(tl.float32), mask=group == 0)


@triton.jit(do_not_specialize=["count"])
def quantize_scales(absmax, thresholds, offset, codes, nested_absmax, count):
    group, at = groups_here()
    scales = tl.load(absmax + at, mask=at < count, other=0.0)
    centred = tl.where(at < count, scales - tl.load(offset), 0.0)
    bits = tl.where(centred == centred, magnitude(centred), 0)  # passes over a NaN
    nested = tl.max(bits, 1).to(tl.float32, bitcast=True)
    tl.store(nested_absmax + group, nested, mask=group * _GROUP < count)
    v = clamp_unit(centred * reciprocal(nested)[:, None])
    rank = rank_of(v, load_table(thresholds, 255), 8)
    nothing = (nested == 0.0)[:, None] | (v != v)  # a group of zeros, a NaN: code 0
    tl.store(codes + at, tl.where(nothing, 0, rank).to(tl.uint8), mask=at < count)


# --- the ops --------------------------------------------------------------------------------------


def _check_table(name: str, table: Tensor, dtype: torch.dtype, count: int) -> Tensor:
    if table.dtype != dtype or table.numel() != count:
        raise ValueError(
            f"{name} must be {dtype} with {count} values, got {table.dtype} with {table.numel()}"
        )
    return table.contiguous()


def _quantize(
    a: Tensor,
    thresholds: Tensor,
    codes: Tensor,
    blocksize: int,
    scales: tl.constexpr,
    tensor_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    ops._check_quantize(a, blocksize)
    count = a.numel()
    stored = torch.float32 if scales is FP32 else torch.int8
    packed = torch.empty((count + 1) // 2, dtype=torch.uint8, device=a.device)
    absmax = torch.empty(blocks(count, blocksize), dtype=stored, device=a.device)
    launch(
        quantize, (triton.cdiv(count, TILE),), values=a.detach().contiguous(),
        thresholds=_check_table("thresholds", thresholds, torch.float32, 15),
        codes=_check_table("codes", codes, torch.uint8, 16), packed=packed, absmax=absmax,
        tensor_scale=tensor_scale, count=count, SCALES=scales.value,
        BLOCK_LOG2=blocksize.bit_length() - 1, num_warps=WARPS, **OPTIONS,
    )  # fmt: skip
    return packed, absmax


def quantize_4bit(
    A: Tensor, thresholds: Tensor, codes: Tensor, blocksize: int
) -> tuple[Tensor, Tensor]:
    """The op ``quantize_4bit``: packed codes and fp32 scales."""
    return _quantize(A, thresholds, codes, blocksize, FP32, None)


def quantize_4bit_scaled(
    A: Tensor, thresholds: Tensor, codes: Tensor, blocksize: int, tensor_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The op ``quantize_4bit_scaled``: packed codes and scales of a byte, E8M0 without a
    ``tensor_scale``, E4M3 times that with one."""
    if tensor_scale is None:
        return _quantize(A, thresholds, codes, blocksize, E8M0, None)
    factor = _check_table("tensor_scale", tensor_scale, torch.float32, 1)
    return _quantize(A, thresholds, codes, blocksize, E4M3, factor)


def quantize_absmax(
    absmax: Tensor, thresholds: Tensor, offset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The op ``quantize_absmax``: 8-bit codes, a nested absmax for 256 of them, the offset."""
    if absmax.dtype != torch.float32 or absmax.dim() != 1 or absmax.numel() == 0:
        raise ValueError(
            f"absmax must be float32 [blocks], got {absmax.dtype} {list(absmax.shape)}"
        )
    absmax, count = absmax.contiguous(), absmax.numel()
    limits = _check_table("thresholds", thresholds, torch.float32, 255)
    codes = torch.empty(count, dtype=torch.uint8, device=absmax.device)
    nested = absmax.new_empty(blocks(count, NESTED_BLOCKSIZE))
    if offset is not None:
        mean = _check_table("offset", offset, torch.float32, 1).reshape(()).clone()
    else:
        mean, values, left = absmax.new_empty([]), absmax, count
        while True:
            sums = torch.empty(
                blocks(left, NESTED_BLOCKSIZE), dtype=torch.float64, device=absmax.device
            )
            launch(
                sum_groups, _grid(left), values=values, sums=sums, mean=mean, count=left,
                total=count, num_warps=1, **OPTIONS,
            )  # fmt: skip
            if sums.numel() == 1:
                break
            values, left = sums, sums.numel()
    launch(
        quantize_scales, _grid(count), absmax=absmax, thresholds=limits, offset=mean, codes=codes,
        nested_absmax=nested, count=count, num_warps=1, **OPTIONS,
    )  # fmt: skip
    return codes, nested, mean


def _grid(count: int) -> tuple[int]:
    return (triton.cdiv(count, GROUPS * NESTED_BLOCKSIZE),)


AOT = [
    (
        quantize,
        {"values": "*bf16", "thresholds": "*fp32", "codes": "*u8", "packed": "*u8",
         "absmax": "*fp32", "count": "i64"},
        {"tensor_scale": None, "SCALES": FP32, "BLOCK_LOG2": 6}, {"num_warps": WARPS, **OPTIONS},
    ),
    (
        sum_groups,
        {"values": "*fp32", "sums": "*fp64", "mean": "*fp32", "count": "i64", "total": "i64"},
        {}, {"num_warps": 1, **OPTIONS},
    ),
    (
        quantize_scales,
        {"absmax": "*fp32", "thresholds": "*fp32", "offset": "*fp32", "codes": "*u8",
         "nested_absmax": "*fp32", "count": "i64"},
        {}, {"num_warps": 1, **OPTIONS},
    ),
]  # fmt: skip
