"""The thin products of LoRA: S = x A^T and dS = s dY B before the large ones, dA and dB after.

    thin     out[m, r] = scaling * sum over k of  x[m, k] a[r, k]      rank columns, long sums
    outer    out[p, q] = scaling * sum over m of  u[m, p] v[m, q]      sums over the rows
             dA = dS^T x,  dB = scaling dY^T S

`thin` would keep a few programs busy, so the sum is cut into PARTS, each a layer [M, rank] of fp32
that whoever needs S adds up as it loads it: as many bytes as A has, at most.

A, B and S may be fp32, as PEFT keeps them; they are rounded to T where they are loaded. Products
are exact, sums in fp32: |error| <= (K + parts) 2^-24 sum |x a|, with dS or S rounded once more (u
of it) where `outer` takes it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import OPTIONS
from .launch import launch


@triton.jit
def thin(
    x, a, out, M, K, rank, stride_r, stride_k, scaling,
    BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = x.dtype.element_ty
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    part = tl.program_id(2)
    steps = tl.cdiv(K, BK)
    sums = tl.zeros((BM, BR), tl.float32)
    for step in range(steps * part // PARTS, steps * (part + 1) // PARTS):
        k = step * BK + tl.arange(0, BK)
        rows = tl.load(x + m.to(tl.int64)[:, None] * K + k[None, :],
                       mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)  # fmt: skip
        at = r.to(tl.int64)[None, :] * stride_r + k.to(tl.int64)[:, None] * stride_k
        columns = tl.load(a + at,
                          mask=(r < rank)[None, :] & (k < K)[:, None], other=0.0)  # fmt: skip
        sums = tl.dot(rows, columns.to(T), sums)
    at = (part * M + m).to(tl.int64)[:, None] * rank + r[None, :]
    tl.store(out + at, sums * scaling, mask=(m < M)[:, None] & (r < rank)[None, :])


@triton.jit
def outer(
    u, v, out, M, P, Q, scaling, T: tl.constexpr,
    BM: tl.constexpr, BP: tl.constexpr, BQ: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0) * BP + tl.arange(0, BP)
    q = tl.program_id(1) * BQ + tl.arange(0, BQ)
    sums = tl.zeros((BP, BQ), tl.float32)
    for m0 in range(0, M, BM):
        m = m0 + tl.arange(0, BM)
        left = tl.load(u + m.to(tl.int64)[:, None] * P + p[None, :],
                       mask=(m < M)[:, None] & (p < P)[None, :], other=0.0).to(T)  # fmt: skip
        right = tl.load(v + m.to(tl.int64)[:, None] * Q + q[None, :],
                        mask=(m < M)[:, None] & (q < Q)[None, :], other=0.0).to(T)  # fmt: skip
        sums = tl.dot(left.T, right, sums)
    at = p.to(tl.int64)[:, None] * Q + q[None, :]
    inside = (p < P)[:, None] & (q < Q)[None, :]
    tl.store(out + at, (sums * scaling).to(out.dtype.element_ty), mask=inside)


@triton.jit
def add_parts(parts, out, size, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Layers of a split product, in their order, rounded once."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float32)
    for part in range(PARTS):
        sums += tl.load(parts + part * size + at, mask=at < size, other=0.0)
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=at < size)


_BLOCK = 1024


def parts_of(out: Tensor, splits: int) -> Tensor:
    """Where a product writes that is cut into ``splits``: a layer of fp32 each, for `sum_parts`;
    ``out`` itself where it is whole."""
    if splits == 1:
        return out
    return torch.empty((splits, *out.shape), dtype=torch.float32, device=out.device)


def sum_parts(parts: Tensor, out: Tensor) -> None:
    """``out`` = the sum of ``parts`` [parts, ...] over its first dimension."""
    launch(
        add_parts, (triton.cdiv(out.numel(), _BLOCK),), parts=parts, out=out, size=out.numel(),
        PARTS=parts.shape[0], BLOCK=_BLOCK, num_warps=4, **OPTIONS,
    )  # fmt: skip


def tile_of(size: int, most: int = 64) -> int:
    """The power of two, 16 at least, that covers ``size`` or ``most`` of it."""
    return min(most, max(16, triton.next_power_of_2(size)))


def _warps(outputs: int) -> int:
    """A warp for 16 x 16 outputs: with more, Triton has several compute, and store, the same."""
    return max(1, min(4, outputs // 256))


def thin_parts(m: int, k: int, rank: int) -> int:
    """Sixteen programs in all, each with 512 of the sum or more."""
    tiles = triton.cdiv(rank, tile_of(rank, 16)) * triton.cdiv(m, tile_of(m))
    return max(1, min(triton.cdiv(16, tiles), triton.cdiv(k, 512)))


def thin_product(x: Tensor, a: Tensor, scaling: float, columns: bool = False) -> Tensor:
    """Parts [parts, m, rank] of ``scaling * x a^T`` in fp32; ``columns``: of ``scaling * x a``."""
    m, k = x.shape
    rank = a.shape[1] if columns else a.shape[0]
    parts = thin_parts(m, k, rank)
    out = torch.empty((parts, m, rank), dtype=torch.float32, device=x.device)
    if out.numel():
        bm, br = tile_of(m), tile_of(rank, 16)
        launch(
            thin, (triton.cdiv(rank, br), triton.cdiv(m, bm), parts), x=x, a=a, out=out, M=m, K=k,
            rank=rank, stride_r=1 if columns else k, stride_k=rank if columns else 1,
            scaling=scaling, BM=bm, BR=br, BK=64, PARTS=parts, num_warps=_warps(bm * br),
            num_stages=3, **OPTIONS,
        )  # fmt: skip
    return out


def _outer(u: Tensor, v: Tensor, scaling: float, compute: torch.dtype, out: torch.dtype) -> Tensor:
    (m, p), q = u.shape, v.shape[1]
    product = torch.empty((p, q), dtype=out, device=u.device)
    if product.numel():
        bp, bq = tile_of(p), tile_of(q)
        launch(
            outer, (triton.cdiv(p, bp), triton.cdiv(q, bq)), u=u, v=v, out=product, M=m, P=p, Q=q,
            scaling=scaling, T=_TYPES[compute], BM=32, BP=bp, BQ=bq, num_warps=_warps(bp * bq),
            num_stages=2, **OPTIONS,
        )  # fmt: skip
    return product


_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_OUTER_ROWS = 1024  # `outer` does not cut its sum; from here on torch's matmul, which does


def lora_grads(
    dy: Tensor, x: Tensor | None, s: Tensor | None, ds: Tensor, scaling: float,
    compute: torch.dtype, a_dtype: torch.dtype | None, b_dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """dA [rank, k] of rows x and dS, dB [n, rank] of rows dy and S; a dtype of None: not wanted."""

    def product(u: Tensor | None, v: Tensor | None, scale: float, dtype: torch.dtype) -> Tensor:
        assert u is not None and v is not None
        if compute != torch.float32 and u.shape[0] <= _OUTER_ROWS:
            return _outer(u.contiguous(), v.contiguous(), scale, compute, dtype)
        return (scale * (u.to(compute).T @ v.to(compute))).to(dtype)

    da = None if a_dtype is None else product(ds, x, 1.0, a_dtype)
    db = None if b_dtype is None else product(dy, s, scaling, b_dtype)
    return da, db


def _aot(
    kernel: triton.JITFunction, tensors: dict, numbers: str, scaling: bool, **constants
) -> tuple:
    signature = tensors | dict.fromkeys(numbers.split(), "i32")
    if scaling:
        signature["scaling"] = "fp32"
    return kernel, signature, constants, {"num_warps": 4, "num_stages": 2, **OPTIONS}


AOT = [
    _aot(thin, {"x": "*bf16", "a": "*fp32", "out": "*fp32"}, "M K rank stride_r stride_k", True,
         BM=16, BR=16, BK=64, PARTS=8),
    _aot(outer, {"u": "*fp32", "v": "*bf16", "out": "*fp32"}, "M P Q", True, T=tl.bfloat16, BM=32,
         BP=16, BQ=64),
    _aot(add_parts, {"parts": "*fp32", "out": "*bf16"}, "size", False, PARTS=4, BLOCK=_BLOCK),
]  # fmt: skip
"""Compilations that stand for the others, for targets that nothing here executes."""
