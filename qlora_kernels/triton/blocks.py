"""A packed weight as Triton kernels read it: scales of four kinds, codes to values.

``csrc/block_format.h`` has the layout, ``docs/triton.md`` what the compiler makes of each look-up::

    packed   uint8: byte i holds value 2i in its high nibble, 2i + 1 in its low one
    scale    one a block of 2**BLOCK_LOG2 values:
             FP32     absmax[b]
             NESTED   float32(nested_code[absmax[b]] * nested_absmax[b / 256]) + nested_offset
             E8M0     2^(absmax[b] - 127), NaN for 255
             E4M3     float32(e4m3(absmax[b]) * nested_offset)
    value    round_to_dtype(codebook[q] * scale), rounded once

A kernel calls, in this order::

    scalar = load_scalar(nested_offset, SCALES)                     # once
    book = load_codebook(codebook, WAY)                             # once
    scale = load_scale(block, absmax, ..., scalar, SCALES, mask)    # fp32, the shape of `block`
    w = decode(words, scale, book, DTYPE, WAY)                      # [..., n] words: [..., 8n]

Nothing of it reads global memory for each weight. Launch with ``OPTIONS``: without them the
compiler makes an fma of the nested scale, and two roundings become one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..cuda import SCALES as SCALE_KINDS
from ..formats import NESTED_BLOCKSIZE
from ..ops import WeightArgs

FP32, NESTED, E8M0, E4M3 = (tl.constexpr(SCALE_KINDS.index(k)) for k in SCALE_KINDS)
_GROUP_LOG2 = tl.constexpr(NESTED_BLOCKSIZE.bit_length() - 1)

GATHER = tl.constexpr(0)
"""A look-up is a load from 16 floats in shared memory; any target, any element type, any scales."""
PRMT = tl.constexpr(1)
"""A look-up is byte permutes in registers, of a table made for each scale; NVIDIA, bf16 and f16."""

OPTIONS = {"enable_fp_fusion": False}
"""Launch options of every kernel here: a product and a sum are two roundings."""


# --- scales ---------------------------------------------------------------------------------------


@triton.jit
def load_scalar(nested_offset, SCALES: tl.constexpr):
    """What a weight has one of: the nested scales' offset, the E4M3 scales' tensor scale."""
    if SCALES == NESTED or SCALES == E4M3:
        return tl.load(nested_offset)
    else:
        return 0.0


@triton.jit
def e8m0_value(byte):
    bits = tl.where(byte == 0, 0x00400000, byte << 23)
    return tl.where(byte == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def e4m3_value(byte):
    magnitude = byte & 0x7F
    normal = (magnitude << 20) + ((127 - 7) << 23)
    denormal = (magnitude.to(tl.float32) * 0.001953125).to(tl.int32, bitcast=True)  # 2^-9
    bits = tl.where(magnitude < 8, denormal, normal)
    bits = tl.where(magnitude == 0x7F, 0x7FC00000, bits)
    return (bits | (byte & 0x80) << 24).to(tl.float32, bitcast=True)


@triton.jit
def load_scale(
    block, absmax, nested_absmax, nested_code, scalar, SCALES: tl.constexpr, mask
):  # fmt: skip
    """The fp32 scales of blocks, in the shape of ``block``; of no meaning where masked off.

    ``mask`` may be None.
    """
    other: tl.constexpr = None if mask is None else 0
    if SCALES == FP32:
        return tl.load(absmax + block, mask=mask, other=other)
    else:
        byte = tl.load(absmax + block, mask=mask, other=other).to(tl.int32) & 255
        if SCALES == NESTED:
            group = tl.load(nested_absmax + (block >> _GROUP_LOG2), mask=mask, other=other)
            return tl.load(nested_code + byte) * group + scalar
        elif SCALES == E8M0:
            return e8m0_value(byte)
        else:
            return e4m3_value(byte) * scalar


# --- codes to values ------------------------------------------------------------------------------


@triton.jit
def load_codebook(codebook, WAY: tl.constexpr):
    """What ``decode`` looks up in, made once: 16 floats in registers, or a tensor of copies.

    The gather's table is as long as a program has threads (256), so that each thread puts another
    part of it into shared memory.
    """
    if WAY == GATHER:
        return tl.load(codebook + tl.arange(0, 256) % 16)
    else:
        book = ()
        for i in tl.static_range(16):
            book = book + (tl.load(codebook + i),)
        return book


@triton.jit
def lookup(codes, book):
    """fp32 values of codes (int32, any shape), by the book of the GATHER way."""
    return tl.gather(book, codes.reshape([codes.numel]), 0).reshape(codes.shape)


@triton.jit
def decode_bytes(packed, scale, book, DTYPE: tl.constexpr):
    """``round_to_DTYPE(codebook[q] * scale)``: ``[..., 2n]`` from uint8 ``[..., n]``, by GATHER.

    ``scale`` is of a shape that broadcasts to that of ``packed``.
    """
    codes = packed.to(tl.int32)
    earlier = (lookup(codes >> 4, book) * scale).to(DTYPE)
    later = (lookup(codes & 15, book) * scale).to(DTYPE)
    return tl.interleave(earlier, later)


# One block's values, rounded, as two planes of bytes: $0 ... $3 the low bytes of values 0-3, 4-7,
# ..., $4 ... $7 the high ones; $8 is the scale, $9 ... $24 the codebook. 32 instructions.
def _table_asm(dtype: str) -> str:
    lines = [".reg .b32 first, second;", ".reg .f32 a, b;"]
    for j in range(4):
        for k, pair in enumerate(("first", "second")):
            i = 9 + 4 * j + 2 * k
            lines += [
                f"mul.rn.f32 a, ${i}, $8;",
                f"mul.rn.f32 b, ${i + 1}, $8;",
                f"cvt.rn.{dtype}x2.f32 {pair}, b, a;",
            ]
        lines += [
            f"prmt.b32 ${j}, first, second, 0x6420;",
            f"prmt.b32 ${4 + j}, first, second, 0x7531;",
        ]
    return "{\n" + "\n".join(lines) + "\n}"


# Eight codes, $4, to four pairs of values, $0 ... $3, by a table, $5 ... $12. The earlier of a pair
# is in its low half. PRMT picks 4 bytes out of 8 by 4 selectors of 3 bits; a mask of the codes' top
# bits chooses between the two halves of the table. 21 instructions.
def _decode_asm() -> str:
    lines = [
        ".reg .b32 bits, shifted, picks, top, a, b, l, h;",
        "and.b32 bits, $4, 0x77777777;",
        "shl.b32 shifted, $4, 4;",
    ]
    for half, tops in enumerate((0x9D8C, 0xBFAE)):  # bit 3 of a selector: a byte of the top bit
        lines += [
            f"shr.u32 picks, bits, {16 * half};",
            f"prmt.b32 top, $4, shifted, {tops:#x};",
        ]
        for plane, first in (("l", 5), ("h", 9)):
            lines += [
                f"prmt.b32 a, ${first + 2}, ${first + 3}, picks;",
                f"prmt.b32 b, ${first}, ${first + 1}, picks;",
                f"lop3.b32 {plane}, top, a, b, 0xca;",
            ]
        lines += [
            f"prmt.b32 ${2 * half}, l, h, 0x4051;",
            f"prmt.b32 ${2 * half + 1}, l, h, 0x6273;",
        ]
    return "{\n" + "\n".join(lines) + "\n}"


_TABLE_BF16 = tl.constexpr(_table_asm("bf16"))
_TABLE_F16 = tl.constexpr(_table_asm("f16"))
_TABLE_OPERANDS = tl.constexpr(",".join(["=&r"] * 8 + ["f"] * 17))
_DECODE = tl.constexpr(_decode_asm())
_DECODE_OPERANDS = tl.constexpr(",".join(["=&r"] * 4 + ["r"] * 9))


@triton.jit
def decode(words, scale, book, DTYPE: tl.constexpr, WAY: tl.constexpr):
    """``round_to_DTYPE(codebook[q] * scale)``: ``[..., 8n]`` from uint32 ``[..., n]``, read from
    packed bytes at a multiple of 4.

    ``scale`` is of a shape that broadcasts to that of ``words``. With PRMT a table is made for each
    of its elements, so make it ``[..., 1]``: one a block.
    """
    if WAY == GATHER:
        halves = tl.interleave(words.to(tl.uint16), (words >> 16).to(tl.uint16))
        packed = tl.interleave(halves.to(tl.uint8), (halves >> 8).to(tl.uint8))
        codes = packed.to(tl.int32)
        earlier, later = lookup(codes >> 4, book), lookup(codes & 15, book)
        values = tl.interleave(earlier, later)
        rows: tl.constexpr = words.shape[:-1]
        values = values.reshape(rows + [words.shape[-1], 8]) * tl.expand_dims(scale, -1)
        return values.to(DTYPE).reshape(rows + [words.shape[-1] * 8])
    else:
        planes = tl.inline_asm_elementwise(
            _TABLE_BF16 if DTYPE == tl.bfloat16 else _TABLE_F16, _TABLE_OPERANDS, (scale,) + book,
            (tl.uint32, tl.uint32, tl.uint32, tl.uint32,
             tl.uint32, tl.uint32, tl.uint32, tl.uint32), is_pure=True, pack=1,
        )  # fmt: skip
        p0, p1, p2, p3 = tl.inline_asm_elementwise(
            _DECODE, _DECODE_OPERANDS, (words,) + planes,
            (tl.uint32, tl.uint32, tl.uint32, tl.uint32), is_pure=True, pack=1,
        )  # fmt: skip
        pairs = tl.interleave(tl.interleave(p0, p2), tl.interleave(p1, p3))
        earlier = pairs.to(tl.uint16).to(DTYPE, bitcast=True)
        later = (pairs >> 16).to(tl.uint16).to(DTYPE, bitcast=True)
        return tl.interleave(earlier, later)


# --- the host's side ------------------------------------------------------------------------------


def scale_kind(weight: WeightArgs) -> int:
    """SCALES of a weight, one of the indices of ``SCALE_KINDS``."""
    absmax, offset = weight[1], weight[6]
    names = {torch.float32: "fp32", torch.uint8: "nested"}
    return SCALE_KINDS.index(names.get(absmax.dtype, "e8m0" if offset is None else "e4m3"))


def way(dtype: torch.dtype) -> int:
    """WAY of a kernel whose values are ``dtype``, on this machine."""
    narrow = dtype in (torch.bfloat16, torch.float16)
    return int(PRMT.value if narrow and torch.version.hip is None else GATHER.value)


def weight_kwargs(weight: WeightArgs) -> dict:
    """A kernel's arguments ``packed ... nested_offset``, and SCALES and BLOCK_LOG2.

    Absent tensors are None, which a kernel takes as a constant that it never looks at.
    """
    names = ("packed", "absmax", "codebook", "", "nested_absmax", "nested_code", "nested_offset")
    tensors = {
        name: t.contiguous() if isinstance(t, Tensor) else None
        for name, t in zip(names, weight, strict=True)
        if name
    }
    return {**tensors, "SCALES": scale_kind(weight), "BLOCK_LOG2": weight[3].bit_length() - 1}


NESTED_SIGNATURE = {
    "packed": "*u8", "absmax": "*u8", "codebook": "*fp32", "nested_absmax": "*fp32",
    "nested_code": "*fp32", "nested_offset": "*fp32",
}  # fmt: skip
"""Types of a weight's arguments, for compilations ahead of time. Each module's ``AOT`` is a list of
``(kernel, signature, constants, options)``: what is compiled for targets that nothing runs."""
