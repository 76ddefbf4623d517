"""dX = dY W + dS A, with dS = scaling dY B: the linear layer's gradient by x, from the same bytes.

Now rows of W are summed over and its columns are the result's. A scale belongs to a row and a chunk
of columns, so it goes into dY, once for each chunk:

    dX[m, k] = sum over n of  (dY[m, n] scale[n, chunk of k]) * codebook[code[n, k]]

    program   dX [BM, BATCH chunks], of all rows of W or of one of the splits
    step      BN rows of W: BATCH chunks times eight products, one for each code of a word

        packed words  --cp.async-->  shared  -->  lane: its column of two rows, PRMT  -->  B of mma
        dY            --cp.async-->  shared  -->  times the scale, rounded  --shared-->    A of mma

mma's B wants two rows of one column in a register, and a word has eight columns of one row: so a
lane takes words of two rows, merges their nibbles, and looks up pairs (codes.columns). Decoded
values never leave the registers that they are made in; column j of all words is product j, and
columns are put in order at the end. Matrix instructions of other makers' GPUs want 16 columns or
more and hold a row's neighbours: there (GATHER) a chunk is one product, of values that went through
shared memory. LoRA, splits and rounding as in linear.py.

Numerics: codebook values and dY * scale rounded to T, each u = 2^-9 (bf16) or 2^-12 (f16); products
exact, sums in fp32. Against float64:

    |dX - exact| <= (2 u + u^2 + (N + 8) 2^-23) sum |dY w| + (2 u + rank 2^-23) sum |dS A|
                    + ulp(dX) / 2

and in f16 2^-25 for each term whose dY * scale is below 2^-14, where f16 has fewer bits: a few rows
only (configs.py), as in CUDA.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import ops
from . import configs
from .blocks import GATHER, OPTIONS, load_scalar, way, weight_kwargs
from .codes import columns, fetch_scale, load_scale_code, load_table, scale_value, values
from .dequantize import dequantize_4bit
from .launch import launch
from .linear import AOT as _LINEAR_AOT
from .lora_grads import lora_grads, parts_of, sum_parts, thin_product, tile_of


@triton.jit
def input_grad(
    dy, packed, absmax, codebook, nested_absmax, nested_code, nested_offset, ds, lora_a, dx,
    M, N, K, row_words, rank, s_parts,
    SCALES: tl.constexpr, BLOCK_LOG2: tl.constexpr, WAY: tl.constexpr, CHUNK: tl.constexpr,
    BATCH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = dy.dtype.element_ty
    BK: tl.constexpr = BATCH * CHUNK
    G: tl.constexpr = CHUNK // 8
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    part = tl.program_id(2)
    chunk = tl.program_id(0) * BATCH + tl.arange(0, BATCH)
    chunk = tl.minimum(chunk, K // CHUNK - 1)  # chunks beyond the last one repeat it
    steps = tl.cdiv(N, BN)
    first, last = steps * part // SPLITS, steps * (part + 1) // SPLITS
    scalar = load_scalar(nested_offset, SCALES)
    code = load_scale_code(nested_code, SCALES)
    table = load_table(codebook, tl.zeros((1, 1, 1), tl.int32), T, WAY)
    n = first * BN + tl.arange(0, BN)
    if WAY == GATHER:
        byte = chunk[:, None, None] * (CHUNK // 2) + tl.arange(0, CHUNK // 2)[None, None, :]
        bytes_at = packed + byte
    else:
        word = chunk[:, None, None] * G + tl.arange(0, G)[None, None, :]
        words_at = packed.to(tl.pointer_type(tl.uint32)) + word
    dy_at = dy + m.to(tl.int64)[:, None] * N
    row = tl.minimum(n, N - 1).to(tl.int64)
    raw, group = fetch_scale((row[None, :] * K + chunk[:, None] * CHUNK) >> BLOCK_LOG2, absmax,
                             nested_absmax, SCALES, None)  # fmt: skip
    sums = tl.zeros((BATCH, BM, CHUNK), tl.float32)
    s0 = tl.zeros((BATCH, BM, G), tl.float32)
    s1, s2, s3, s4, s5, s6, s7 = s0, s0, s0, s0, s0, s0, s0
    for _ in range(first, last):
        if WAY == GATHER:
            codes = tl.load(bytes_at + row[None, :, None] * (4 * row_words))
        else:
            codes = tl.load(words_at + row[None, :, None] * row_words)
        rows = tl.load(dy_at + n[None, :], mask=(m < M)[:, None] & (n < N)[None, :], other=0.0)
        scale = scale_value(raw, group, code, scalar, SCALES)
        rows = (rows.to(tl.float32)[None, :, :] * scale[:, None, :]).to(T)
        if WAY == GATHER:
            sums = tl.dot(rows, values(codes, table, T, WAY), sums)
        else:
            w = columns(codes, table, T, WAY)
            s0 = tl.dot(rows, w[0], s0)
            s1 = tl.dot(rows, w[1], s1)
            s2 = tl.dot(rows, w[2], s2)
            s3 = tl.dot(rows, w[3], s3)
            s4 = tl.dot(rows, w[4], s4)
            s5 = tl.dot(rows, w[5], s5)
            s6 = tl.dot(rows, w[6], s6)
            s7 = tl.dot(rows, w[7], s7)
        n += BN
        row = tl.minimum(n, N - 1).to(tl.int64)
        raw, group = fetch_scale((row[None, :] * K + chunk[:, None] * CHUNK) >> BLOCK_LOG2, absmax,
                                 nested_absmax, SCALES, None)  # fmt: skip
    if WAY != GATHER:
        even = tl.interleave(tl.interleave(s0, s4), tl.interleave(s2, s6))
        odd = tl.interleave(tl.interleave(s1, s5), tl.interleave(s3, s7))
        sums = tl.interleave(even, odd)  # [BATCH, BM, CHUNK]
    out = tl.permute(sums, (1, 0, 2)).reshape(BM, BK)
    k = tl.program_id(0) * BK + tl.arange(0, BK)
    inside = (m < M)[:, None] & (k < K)[None, :]
    if part == 0:
        if lora_a is not None:
            for r0 in tl.range(0, rank, BR, num_stages=1):
                r = r0 + tl.arange(0, BR)
                a = tl.load(lora_a + r.to(tl.int64)[:, None] * K + k[None, :],
                            mask=(r < rank)[:, None] & (k < K)[None, :], other=0.0)  # fmt: skip
                a = a.to(T)
                t = tl.zeros((BM, BR), tl.float32)
                for p in tl.range(0, s_parts, num_stages=1):
                    at = ds + (p * M + m)[:, None] * rank + r[None, :]
                    t += tl.load(at, mask=(m < M)[:, None] & (r < rank)[None, :], other=0.0)
                out = tl.dot(t.to(T), a, out)
    at = (part * M + m).to(tl.int64)[:, None] * K + k[None, :]
    tl.store(dx + at, out.to(dx.dtype.element_ty), mask=inside)


def product(
    dy: Tensor, weight: ops.WeightArgs, k: int, config: configs.Config, out: torch.dtype,
    ds: Tensor | None = None, lora_a: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``input_grad`` as it is: dy [m, n] in the compute dtype, ds [parts, m, rank] in fp32."""
    m, n = dy.shape
    chunk = configs.chunk_of(n, k, weight[3])
    dx = torch.empty((m, k), dtype=out, device=dy.device)
    parts = parts_of(dx, config.splits)
    rank = 0 if lora_a is None else lora_a.shape[0]
    kernel, tile = input_grad, configs.arguments(config)
    if configs.autotuning():
        kernel, tile = configs.tuned(input_grad, configs.INPUT_GRAD, m), {}

    def grid(t: dict) -> tuple[int, int, int]:
        return triton.cdiv(k, t["BATCH"] * chunk), triton.cdiv(m, t["BM"]), config.splits

    launch(
        kernel, grid, dy=dy, **weight_kwargs(weight), ds=ds, lora_a=lora_a, dx=parts, M=m, N=n,
        K=k, row_words=k // 8, rank=rank, s_parts=0 if ds is None else ds.shape[0],
        WAY=way(dy.dtype), CHUNK=chunk, BR=tile_of(rank), SPLITS=config.splits, **tile, **OPTIONS,
    )  # fmt: skip
    if config.splits > 1:
        sum_parts(parts, dx)
    return dx


def linear_4bit_backward(
    dy: Tensor,
    packed: Tensor,
    absmax: Tensor,
    codebook: Tensor,
    blocksize: int,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    nested_offset: Tensor | None,
    in_features: int,
    x: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    s: Tensor | None,
    scaling: float,
    compute_dtype: torch.dtype,
    dx_dtype: torch.dtype,
    need_dx: bool,
    need_da: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op ``linear_4bit_backward``: dX, dA, dB and dS (fp32), empty where not wanted."""
    weight = (packed, absmax, codebook, blocksize, nested_absmax, nested_code, nested_offset)
    ops.check_float("dy", dy)
    ops.check_dtype("compute_dtype", compute_dtype)
    ops.check_dtype("dx_dtype", dx_dtype)
    n, k = dy.shape[-1], in_features
    ops.check_weight(weight, n * k)
    rows = dy.reshape(-1, n).to(compute_dtype).contiguous()
    m = rows.shape[0]
    rank = 0 if lora_b is None else lora_b.shape[1]
    config = configs.chosen(configs.INPUT_GRAD, m, n, k, blocksize, compute_dtype)
    if packed.storage_offset() % 4 != 0:  # read by words
        config = None
    dx = da = db = ds = None

    parts = None
    if lora_b is not None:
        ds = dy.new_empty([m, rank], dtype=torch.float32)
        if config is None:
            ds.copy_(scaling * (rows @ lora_b.to(compute_dtype)))
        elif rank:
            parts = thin_product(rows, lora_b.contiguous(), scaling, columns=True)
            sum_parts(parts, ds)
            parts = ds[None]
    if need_dx:
        a = lora_a.contiguous() if lora_a is not None and lora_b is not None and rank else None
        if config is None:
            dx = rows @ dequantize_4bit(*weight, [n, k], compute_dtype)
            if a is not None:
                assert ds is not None
                dx = torch.addmm(dx, ds.to(compute_dtype), a.to(compute_dtype))
        else:
            used = parts if a is not None else None
            dx = product(rows, weight, k, config, dx_dtype, used, a)
        dx = dx.to(dx_dtype).view(*dy.shape[:-1], k)
    if lora_b is not None and (need_da or need_db):
        assert ds is not None
        da, db = lora_grads(
            rows, x.reshape(-1, k) if need_da and x is not None else None,
            s.reshape(-1, rank) if need_db and s is not None else None, ds, scaling, compute_dtype,
            lora_a.dtype if need_da and lora_a is not None else None,
            lora_b.dtype if need_db else None,
        )  # fmt: skip
    return tuple(dy.new_empty(0) if t is None else t for t in (dx, da, db, ds))  # type: ignore


def _aot(entry: tuple, bm: int, bn: int) -> tuple:
    """`linear`'s compilation of the same weight."""
    _, given, constants, options = entry
    renamed = {"x": "dy", "y": "dx", "s": "ds", "lora_b": "lora_a", "row_bytes": "row_words"}
    signature = {renamed.get(name, name): type_ for name, type_ in given.items()}
    constants = {renamed.get(name, name): value for name, value in constants.items()}
    for gone in ("bias", "scaling"):
        signature.pop(gone, None), constants.pop(gone, None)
    constants.pop("EVEN")
    constants.update(BATCH=4, BM=bm, BN=bn)
    return input_grad, signature, constants, options


AOT = [_aot(_LINEAR_AOT[0], 16, 32), _aot(_LINEAR_AOT[1], 16, 32), _aot(_LINEAR_AOT[2], 32, 16)]
"""Compilations that stand for the others, for targets that nothing here executes."""
