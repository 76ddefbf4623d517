"""Codes to the codebook's values as a matrix product wants them: unscaled, in bf16 or f16.

A block's scale is taken out of the product, so the 16 values are the same for every weight, and
their bytes stay in registers for the whole kernel: eight words, the low bytes of values 0-3, 4-7,
8-11, 12-15, then the high ones. PRMT picks 4 bytes out of 8 by selectors of 3 bits; a second PRMT
takes the code's top bit. 21 instructions for 8 weights, no memory. GATHER is the way of other GPUs
(blocks.py): 16 floats in shared memory.

Everything here is elementwise on bytes, so that Triton may do it in whatever layout the product
wants its operand in: packed bytes go through shared memory, decoded values never do. That is also
why the table is loaded as tensors of one element and not as scalars: Triton moves the layout back
through loads and broadcasts, not through splats.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import (
    _GROUP_LOG2,
    E8M0,
    FP32,
    GATHER,
    NESTED,
    e4m3_value,
    e8m0_value,
    load_codebook,
    lookup,
)


def _look_up(codes: str, table: list[int], zips: tuple[str, str], out: list[int]) -> list[str]:
    """Of a word of eight codes the values, in four words ``out``: of each half of the codes its low
    and high bytes, zipped in two ways. ``table``: its eight operands."""
    lines = [
        f"and.b32 picks, {codes}, 0x77777777;",
        f"shr.u32 tops, {codes}, 1;",
        "lop3.b32 tops, tops, 0x44444444, 0x32103210, 0xea;",  # tops & 0x4444 | 0x3210
    ]
    for half in range(2):
        for plane, (a, b, c, d) in (("l", table[:4]), ("h", table[4:])):
            lines += [
                f"prmt.b32 a, ${a}, ${b}, picks;",
                f"prmt.b32 b, ${c}, ${d}, picks;",
                f"prmt.b32 {plane}, a, b, tops;",
            ]
        for word, order in zip(out[2 * half :], zips, strict=False):
            lines.append(f"prmt.b32 ${word}, l, h, {order};")
        if half == 0:
            lines += ["shr.u32 picks, picks, 16;", "shr.u32 tops, tops, 16;"]
    return lines


# $4: four bytes. $0 ... $3: their pairs of values, the earlier (the high nibble) in the low half.
# Operands that are the same for the four bytes are four operands each: $5, $9, ... are the table.
def _asm() -> str:
    lines = [".reg .b32 picks, tops, a, b, l, h;"]
    lines += _look_up("$4", list(range(5, 37, 4)), ("0x4051", "0x6273"), [0, 1, 2, 3])
    return "{\n" + "\n".join(lines) + "\n}"


# $8, $9: eight codes each, of two rows. $0 ... $7: pairs of values, a pair a column, the first
# row's in the low half. Nibbles of the two rows are merged first, so that pairs come out as
# neighbours.
# $10, $12, ... are the table, each twice.
def _columns_asm() -> str:
    lines = [".reg .b32 picks, tops, code, other, a, b, l, h;"]
    merged = (  # bytes have the later column in the low nibble
        ["shr.u32 other, $8, 4;", "lop3.b32 code, other, $9, 0x0f0f0f0f, 0xe4;"],
        ["shl.b32 other, $9, 4;", "lop3.b32 code, $8, other, 0x0f0f0f0f, 0xe4;"],
    )
    for odd in range(2):
        lines += merged[odd]
        out = [odd, 2 + odd, 4 + odd, 6 + odd]
        lines += _look_up("code", list(range(10, 26, 2)), ("0x5140", "0x7362"), out)
    return "{\n" + "\n".join(lines) + "\n}"


# $8 ... $23: the 16 floats. $0 ... $7: their table.
def _table_asm(dtype: str) -> str:
    lines = [".reg .b32 first, second;"]
    for i in range(4):
        for k, word in enumerate(("first", "second")):
            at = 8 + 4 * i + 2 * k
            lines.append(f"cvt.rn.{dtype}x2.f32 {word}, ${at + 1}, ${at};")
        lines += [
            f"prmt.b32 ${i}, first, second, 0x6420;",
            f"prmt.b32 ${4 + i}, first, second, 0x7531;",
        ]
    return "{\n" + "\n".join(lines) + "\n}"


_ASM = tl.constexpr(_asm())
_COLUMNS = tl.constexpr(_columns_asm())
_COLUMNS_OPERANDS = tl.constexpr(",".join(["=&r"] * 8 + ["r"] * 18))
_TABLE_BF16 = tl.constexpr(_table_asm("bf16"))
_TABLE_F16 = tl.constexpr(_table_asm("f16"))
_ZERO = tl.constexpr(
    "{ .reg .b32 a, b; mov.u32 a, %lanemask_lt; mov.u32 b, %lanemask_eq; and.b32 $0, a, b; }"
)
_TABLE_OPERANDS = tl.constexpr(",".join(["=&r"] * 8 + ["f"] * 16))
_OPERANDS = tl.constexpr(",".join(["=&r"] * 4 + ["r"] * 33))


@triton.jit
def load_table(codebook, zero, T: tl.constexpr, WAY: tl.constexpr):
    """The codebook rounded to ``T``, for ``values``; ``zero`` is a tensor of one zero (int32) with
    as many dimensions as the bytes that will be decoded."""
    if WAY == GATHER:
        return load_codebook(codebook, WAY)
    else:
        # A zero that ptxas takes for a lane's own: what all lanes have alike it keeps in uniform
        # registers, which PRMT cannot read, and copies at each use.
        own = tl.inline_asm_elementwise(_ZERO, "=r,r", (zero,), tl.int32, is_pure=True, pack=1)
        book = ()
        for i in tl.static_range(16):
            book = book + (tl.load(codebook + i + own),)
        return tl.inline_asm_elementwise(
            _TABLE_BF16 if T == tl.bfloat16 else _TABLE_F16, _TABLE_OPERANDS, book,
            (tl.uint32, tl.uint32, tl.uint32, tl.uint32,
             tl.uint32, tl.uint32, tl.uint32, tl.uint32), is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def pairs(packed, table, T: tl.constexpr, WAY: tl.constexpr):
    """Of each byte its two values of ``T``, as one int32: the earlier in the low half."""
    if WAY == GATHER:
        codes = packed.to(tl.int32)
        earlier = lookup(codes >> 4, table).to(T).to(tl.uint16, bitcast=True).to(tl.uint32)
        later = lookup(codes & 15, table).to(T).to(tl.uint16, bitcast=True).to(tl.uint32)
        return earlier | (later << 16)
    else:
        return tl.inline_asm_elementwise(
            _ASM, _OPERANDS, (packed,) + table, tl.uint32, is_pure=True, pack=4
        )


@triton.jit
def columns(words, table, T: tl.constexpr, WAY: tl.constexpr):
    """The eight values of ``T`` of each word of eight codes, as eight tensors."""
    if WAY == GATHER:
        found = ()
        for i in tl.static_range(8):
            codes = (words >> (8 * (i // 2) + 4 - 4 * (i % 2))).to(tl.int32) & 15
            found = found + (lookup(codes, table).to(T),)
        return found
    else:
        bits = tl.inline_asm_elementwise(
            _COLUMNS, _COLUMNS_OPERANDS, (words,) + table,
            (tl.uint16, tl.uint16, tl.uint16, tl.uint16,
             tl.uint16, tl.uint16, tl.uint16, tl.uint16), is_pure=True, pack=2,
        )  # fmt: skip
        found = ()
        for i in tl.static_range(8):
            found = found + (bits[i].to(T, bitcast=True),)
        return found


@triton.jit
def values(packed, table, T: tl.constexpr, WAY: tl.constexpr):
    """``[..., 2n]`` of ``T`` from uint8 ``[..., n]``."""
    both = pairs(packed, table, T, WAY)
    earlier = both.to(tl.uint16).to(T, bitcast=True)
    later = (both >> 16).to(tl.uint16).to(T, bitcast=True)
    return tl.interleave(earlier, later)


# blocks.load_scale in two steps, the first of which a kernel takes a step ahead. What it takes in
# the second, the code of double-quantized scales, lies in shared memory: from global memory each
# lane's value is a sector of its own, 2 to 4 clocks of L1 for the 256 weights of a warp.


@triton.jit
def fetch_scale(block, absmax, nested_absmax, SCALES: tl.constexpr, mask):
    """What DRAM has of the scales of blocks: the scale or its byte, and its group's absmax."""
    other: tl.constexpr = None if mask is None else 0
    raw = tl.load(absmax + block, mask=mask, other=other)
    if SCALES == NESTED:
        return raw, tl.load(nested_absmax + (block >> _GROUP_LOG2), mask=mask, other=other)
    else:
        return raw, raw


@triton.jit
def load_scale_code(nested_code, SCALES: tl.constexpr):
    """The 256 values of a nested scale's byte."""
    if SCALES == NESTED:
        return tl.load(nested_code + tl.arange(0, 256))
    else:
        return 0


@triton.jit
def scale_value(raw, group, code, scalar, SCALES: tl.constexpr):
    """The fp32 scales of what ``fetch_scale`` fetched."""
    if SCALES == FP32:
        return raw
    elif SCALES == NESTED:
        bytes = raw.to(tl.int32).reshape([raw.numel])
        return tl.gather(code, bytes, 0).reshape(raw.shape) * group + scalar
    elif SCALES == E8M0:
        return e8m0_value(raw.to(tl.int32) & 255)
    else:
        return e4m3_value(raw.to(tl.int32) & 255) * scalar
