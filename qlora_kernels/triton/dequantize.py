"""Dequantization: a packed weight to fp32, bf16 or f16, its scales decoded on the way, one kernel.

    out[i] = round_to_dtype(float32(codebook[code(i)] * scale[i / blocksize]))       bit for bit

A program takes 4096 values, whole blocks of any size, as a tile of [blocks, words of 8 codes]:

    DRAM    16 bytes a lane, neighbouring lanes neighbouring: 32 values of one block
      |     scales once a block, in the layout of the tile's rows
    lane    bf16, f16: the block's 16 values, scaled and rounded, are 8 registers that PRMT picks
      |     from (blocks.decode); fp32, and other GPUs': from 16 floats in shared memory
      v
    DRAM    turned around in shared memory, so that stores are 16 bytes a lane, neighbouring too

The tile that the weight ends in, and tensors that are not aligned, go by bytes and with masks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import ops
from .blocks import (
    GATHER,
    NESTED,
    NESTED_SIGNATURE,
    OPTIONS,
    PRMT,
    decode,
    decode_bytes,
    load_codebook,
    load_scalar,
    load_scale,
    way,
    weight_kwargs,
)
from .launch import launch

TILE = 4096
WARPS = 4
_TILE = tl.constexpr(TILE)


@triton.jit(do_not_specialize=["count"])
def dequantize(
    packed, absmax, codebook, nested_absmax, nested_code, nested_offset, out, count,
    SCALES: tl.constexpr, BLOCK_LOG2: tl.constexpr, WAY: tl.constexpr,
):  # fmt: skip
    BLOCK: tl.constexpr = 1 << BLOCK_LOG2
    ROWS: tl.constexpr = _TILE // BLOCK
    tile = tl.program_id(0).to(tl.int64)
    packed += tile * (_TILE // 2)
    out += tile * _TILE
    row = tl.arange(0, ROWS)
    block = tile * ROWS + row
    to = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    left = count - tile * _TILE
    scalar = load_scalar(nested_offset, SCALES)
    words_at_4 = packed.to(tl.int64) % 4 == 0
    if words_at_4 & (left >= _TILE):
        book = load_codebook(codebook, WAY)
        word = row[:, None] * (BLOCK // 8) + tl.arange(0, BLOCK // 8)[None, :]
        words = tl.load(packed.to(tl.pointer_type(tl.uint32)) + word)
        scale = load_scale(block, absmax, nested_absmax, nested_code, scalar, SCALES, None)
        tl.store(out + to, decode(words, scale[:, None], book, out.dtype.element_ty, WAY))
    else:
        floats = load_codebook(codebook, GATHER)
        byte = row[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
        codes = tl.load(packed + byte, mask=2 * byte < left, other=0)
        within = row * BLOCK < left
        scale = load_scale(block, absmax, nested_absmax, nested_code, scalar, SCALES, within)
        values = decode_bytes(codes, scale[:, None], floats, out.dtype.element_ty)
        tl.store(out + to, values, mask=to < left)


def _launch(weight: ops.WeightArgs, out: Tensor) -> None:
    count = out.numel()
    if count == 0:
        return
    launch(
        dequantize, (triton.cdiv(count, TILE),), **weight_kwargs(weight), out=out, count=count,
        WAY=way(out.dtype), num_warps=WARPS, **OPTIONS,
    )  # fmt: skip


def dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    codebook: Tensor,
    blocksize: int,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    nested_offset: Tensor | None,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """The op ``dequantize_4bit``: values of ``dtype`` in ``shape``."""
    weight = (packed, absmax, codebook, blocksize, nested_absmax, nested_code, nested_offset)
    ops.check_weight(weight, math.prod(shape))
    ops.check_dtype("dtype", dtype)
    out = torch.empty(tuple(shape), dtype=dtype, device=packed.device)
    _launch(weight, out)
    return out


def dequantize_4bit_out(
    packed: Tensor,
    absmax: Tensor,
    codebook: Tensor,
    blocksize: int,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    nested_offset: Tensor | None,
    *,
    out: Tensor,
) -> None:
    """The op ``dequantize_4bit.out``: as many values as ``out`` holds, in its dtype."""
    weight = (packed, absmax, codebook, blocksize, nested_absmax, nested_code, nested_offset)
    ops.check_weight(weight, out.numel())
    ops.check_float("out", out)
    if not out.is_contiguous():
        raise ValueError(f"out must be contiguous, got strides {out.stride()} for {out.shape}")
    _launch(weight, out)


AOT = [
    (
        dequantize, {**NESTED_SIGNATURE, "out": out, "count": "i64"},
        {"SCALES": NESTED, "BLOCK_LOG2": 6, "WAY": lookup}, {"num_warps": WARPS, **OPTIONS},
    )
    for out, lookup in (("*bf16", PRMT), ("*fp32", GATHER))
]  # fmt: skip
