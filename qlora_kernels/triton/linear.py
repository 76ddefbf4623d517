"""y = x W^T + bias + scaling S B^T, with S = x A^T: the quantized linear layer and its LoRA.

W is cut along K into chunks of CHUNK columns that share a scale, so a chunk's scale leaves the
product:

    y[m, n] = sum over chunks c of  scale[n, c] * (sum over k in c of  x[m, k] codebook[code[n, k]])

    program   outputs [BN, BM], of all of K or of one of its splits
    step      BATCH chunks side by side, as a batch of products: warps share the chunks out among
              themselves and add up at the end (a plain product, wgmma's on Hopper, where BATCH = 1)

        packed bytes  --cp.async-->  shared  --ldmatrix-->  lane: PRMT (codes.py)  -->  A of mma
        x             --cp.async-->  shared  ------------------------------------->  B of mma
        scales        fetched a step ahead, looked up in shared memory; an fma of a chunk's sums

W is A because A's registers may be any, so decoded values are where mma wants them; x is read in
pairs that need a move each. LoRA is one more product into the same sums, before the one rounding;
S comes from `thin` (lora_grads.py) in parts that are added where they are loaded. With SPLITS > 1
sums go to a workspace in fp32, and `add_parts` adds them in the order of the splits: the same bits
in every run.

Numerics, variant (c): codebook values rounded to T, products exact, sums in fp32, scales
in fp32. With u = 2^-9 (bf16) or 2^-12 (f16), half an ulp, against float64:

    |y - exact| <= (u + (K + 8) 2^-23) sum |x w| + (2 u + rank 2^-23) scaling sum |S B| + ulp(y) / 2

Taken where K is a multiple of 32, blocks are of 32 or more and x has few rows (configs.py);
otherwise the weight is dequantized and multiplied by torch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import ops
from . import configs
from .blocks import OPTIONS, load_scalar, way, weight_kwargs
from .codes import fetch_scale, load_scale_code, load_table, scale_value, values
from .dequantize import dequantize_4bit
from .launch import launch
from .lora_grads import parts_of, sum_parts, thin_product, tile_of


@triton.jit
def add_chunks(sums, BATCH: tl.constexpr):
    """[BATCH, R, C] added over its first dimension, in a tree: [R, C]."""
    if BATCH == 1:
        return sums
    else:
        R: tl.constexpr = sums.shape[1]
        C: tl.constexpr = sums.shape[2]
        left = tl.permute(sums, (1, 2, 0))
        if BATCH >= 32:
            a, b = tl.split(left.reshape(R, C, 16, 2))
            left = a + b
        if BATCH >= 16:
            a, b = tl.split(left.reshape(R, C, 8, 2))
            left = a + b
        if BATCH >= 8:
            a, b = tl.split(left.reshape(R, C, 4, 2))
            left = a + b
        if BATCH >= 4:
            a, b = tl.split(left.reshape(R, C, 2, 2))
            left = a + b
        a, b = tl.split(left)
        return a + b


@triton.jit
def fetch_scales(
    start, ahead, left, absmax, nested_absmax, SCALES: tl.constexpr, BLOCK_LOG2: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Of the chunks [BATCH, BN] that begin ``ahead`` values after ``start``."""
    block = (start + ahead) >> BLOCK_LOG2
    if EVEN:
        return fetch_scale(block, absmax, nested_absmax, SCALES, None)
    else:
        return fetch_scale(block, absmax, nested_absmax, SCALES, (ahead < left)[:, None])


@triton.jit
def linear(
    x, packed, absmax, codebook, nested_absmax, nested_code, nested_offset, bias, s, lora_b, y,
    M, N, K, row_bytes, rank, s_parts, scaling,
    SCALES: tl.constexpr, BLOCK_LOG2: tl.constexpr, WAY: tl.constexpr, CHUNK: tl.constexpr,
    BATCH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, SPLITS: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = x.dtype.element_ty
    STEP: tl.constexpr = BATCH * CHUNK
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    part = tl.program_id(2)
    chunk = tl.arange(0, BATCH)
    row = tl.minimum(n, N - 1).to(tl.int64)  # rows beyond the last one repeat it
    steps = tl.cdiv(K, STEP)
    first, last = steps * part // SPLITS, steps * (part + 1) // SPLITS

    weights = packed + (
        row[None, :, None] * row_bytes + chunk[:, None, None] * (CHUNK // 2)
        + tl.arange(0, CHUNK // 2)[None, None, :] + first * (STEP // 2)
    )  # fmt: skip
    xs = x + (
        m.to(tl.int64)[None, :, None] * K + chunk[:, None, None] * CHUNK
        + tl.arange(0, CHUNK)[None, None, :] + first * STEP
    )  # fmt: skip
    start = row[None, :] * K + chunk[:, None] * CHUNK  # of a chunk in the weight
    scalar = load_scalar(nested_offset, SCALES)
    code = load_scale_code(nested_code, SCALES)
    table = load_table(codebook, tl.zeros((1, 1, 1), tl.int32), T, WAY)
    left = K - chunk * CHUNK
    raw, group = fetch_scales(start, first * STEP, left, absmax, nested_absmax, SCALES, BLOCK_LOG2,
                              EVEN)  # fmt: skip

    sums = tl.zeros((BN, BM) if BATCH == 1 else (BATCH, BN, BM), tl.float32)
    for step in range(first, last):
        if EVEN:
            codes = tl.load(weights)
            rows = tl.load(xs, mask=(m < M)[None, :, None], other=0.0)
        else:
            inside = (step * STEP < left)[:, None, None]
            codes = tl.load(weights, mask=inside, other=0)
            rows = tl.load(xs, mask=inside & (m < M)[None, :, None], other=0.0)
        w = values(codes, table, T, WAY)
        scale = scale_value(raw, group, code, scalar, SCALES)
        if BATCH == 1:  # a plain product, which is wgmma's on Hopper
            products = tl.dot(w.reshape(BN, CHUNK), rows.reshape(BM, CHUNK).T)
            sums = tl.fma(products, scale.reshape(BN)[:, None], sums)
        else:
            products = tl.dot(w, tl.permute(rows, (0, 2, 1)))
            sums = tl.fma(products, scale[:, :, None], sums)
        ahead = tl.minimum(step + 1, last - 1) * STEP
        raw, group = fetch_scales(start, ahead, left, absmax, nested_absmax, SCALES, BLOCK_LOG2,
                                  EVEN)  # fmt: skip
        weights += STEP // 2
        xs += STEP
    out = add_chunks(sums, BATCH)

    inside = (n < N)[:, None] & (m < M)[None, :]
    if part == 0:
        if lora_b is not None:
            for r0 in tl.range(0, rank, BR, num_stages=1):
                r = r0 + tl.arange(0, BR)
                b = tl.load(lora_b + row[:, None] * rank + r[None, :],
                            mask=(r < rank)[None, :], other=0.0).to(T)  # fmt: skip
                t = tl.zeros((BR, BM), tl.float32)
                for p in tl.range(0, s_parts, num_stages=1):
                    at = s + (p * M + m)[None, :] * rank + r[:, None]
                    t += tl.load(at, mask=(m < M)[None, :] & (r < rank)[:, None], other=0.0)
                out = tl.dot(b, (t * scaling).to(T), out)
        if bias is not None:
            out += tl.load(bias + row).to(T).to(tl.float32)[:, None]
    at = (part * M + m).to(tl.int64)[None, :] * N + n[:, None]
    tl.store(y + at, out.to(y.dtype.element_ty), mask=inside)


def product(
    x: Tensor, weight: ops.WeightArgs, n: int, config: configs.Config, out: torch.dtype,
    bias: Tensor | None = None, s: Tensor | None = None, lora_b: Tensor | None = None,
    scaling: float = 1.0,
) -> Tensor:  # fmt: skip
    """``linear`` as it is: x [m, k] in the compute dtype, s [parts, m, rank] in fp32; [m, n]."""
    m, k = x.shape
    chunk = configs.chunk_of(n, k, weight[3])
    y = torch.empty((m, n), dtype=out, device=x.device)
    parts = parts_of(y, config.splits)
    rank = 0 if lora_b is None else lora_b.shape[1]
    kernel, tile = linear, configs.arguments(config)
    if configs.autotuning():
        kernel, tile = configs.tuned(_linear_even, configs.LINEAR, m), {}
    else:
        tile["EVEN"] = k % (config.tile.batch * chunk) == 0
    launch(
        kernel, lambda t: (triton.cdiv(n, t["BN"]), triton.cdiv(m, t["BM"]), config.splits),
        x=x, **weight_kwargs(weight), bias=bias, s=s, lora_b=lora_b, y=parts, M=m, N=n, K=k,
        row_bytes=k // 2, rank=rank, s_parts=0 if s is None else s.shape[0], scaling=scaling,
        WAY=way(x.dtype), CHUNK=chunk, BR=tile_of(rank), SPLITS=config.splits, **tile, **OPTIONS,
    )  # fmt: skip
    if config.splits > 1:
        sum_parts(parts, y)
    return y


_linear_even = triton.heuristics(
    {"EVEN": lambda a: a["K"] % (a["BATCH"] * a["CHUNK"]) == 0}
)(linear)  # fmt: skip


def linear_4bit(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    codebook: Tensor,
    blocksize: int,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    nested_offset: Tensor | None,
    out_features: int,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    lora_s: Tensor | None,
    scaling: float,
    compute_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The op ``linear_4bit``: y in x's dtype, and S [rows, rank] in fp32 where lora_a is given."""
    weight = (packed, absmax, codebook, blocksize, nested_absmax, nested_code, nested_offset)
    ops.check_linear(x, weight, out_features, bias, lora_a, lora_b, lora_s, compute_dtype)
    n, k = out_features, x.shape[-1]
    rows = x.reshape(-1, k).to(compute_dtype).contiguous()
    m = rows.shape[0]
    rank = 0 if lora_b is None else lora_b.shape[1]
    s = x.new_empty([m, rank] if lora_a is not None else [0], dtype=torch.float32)
    lora_b = lora_b.contiguous() if lora_b is not None and rank else None

    config = configs.chosen(configs.LINEAR, m, n, k, blocksize, compute_dtype)
    if config is None:
        y = _large(rows, weight, n, bias, lora_a, lora_b, lora_s, scaling, s)
    else:
        parts = None
        if lora_b is not None:
            if lora_a is not None:
                parts = thin_product(rows, lora_a.contiguous(), 1.0)
                sum_parts(parts, s)
                parts = parts if parts.shape[0] * m <= _SUMMED_IN_PLACE else s[None]
            else:
                assert lora_s is not None
                parts = lora_s.reshape(1, m, rank).contiguous()
        y = product(rows, weight, n, config, x.dtype, _contiguous(bias), parts, lora_b, scaling)
    return y.to(x.dtype).view(*x.shape[:-1], n), s


# Rows of S times its parts up to which each program adds up the parts itself.
_SUMMED_IN_PLACE = 64


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _large(
    x: Tensor, weight: ops.WeightArgs, n: int, bias: Tensor | None, lora_a: Tensor | None,
    lora_b: Tensor | None, lora_s: Tensor | None, scaling: float, s: Tensor,
) -> Tensor:  # fmt: skip
    """Many rows, fp32 and odd layouts: torch's matmul on the dequantized weight."""
    compute = x.dtype
    w = dequantize_4bit(*weight, [n, x.shape[-1]], compute)
    y = torch.nn.functional.linear(x, w, None if bias is None else bias.to(compute))
    if lora_b is not None:
        if lora_a is not None:
            rounded = x @ lora_a.to(compute).T
            s.copy_(rounded)
        else:
            assert lora_s is not None
            rounded = lora_s.reshape(-1, lora_b.shape[1]).to(compute)
        y = torch.addmm(y, rounded, lora_b.to(compute).T, alpha=scaling)
    return y


def _aot(nested: bool, lora: bool, dtype: str, batch: int, bm: int, bn: int) -> tuple:
    absmax, extra = ("*u8", "*fp32") if nested else ("*fp32", None)
    tensors = {"x": f"*{dtype}", "packed": "*u8", "absmax": absmax, "codebook": "*fp32",
               "nested_absmax": extra, "nested_code": extra, "nested_offset": extra,
               "bias": "*fp32" if lora else None, "s": "*fp32" if lora else None,
               "lora_b": "*fp32" if lora else None, "y": f"*{dtype}"}  # fmt: skip
    numbers = {**dict.fromkeys(("M", "N", "K", "row_bytes", "rank", "s_parts"), "i32"),
               "scaling": "fp32"}  # fmt: skip
    constants = {"SCALES": int(nested), "BLOCK_LOG2": 6, "WAY": 1, "CHUNK": 64, "BATCH": batch,
                 "BM": bm, "BN": bn, "BR": 16, "SPLITS": 1, "EVEN": True}  # fmt: skip
    constants.update({name: None for name, type_ in tensors.items() if type_ is None})
    given = {name: type_ for name, type_ in tensors.items() if type_ is not None}
    return linear, given | numbers, constants, {"num_warps": 4, "num_stages": 2, **OPTIONS}


AOT = [
    _aot(True, False, "bf16", 4, 16, 32),
    _aot(False, True, "fp16", 4, 16, 32),
    _aot(True, True, "bf16", 1, 64, 64),
]
"""Compilations that stand for the others, for targets that nothing here executes."""
