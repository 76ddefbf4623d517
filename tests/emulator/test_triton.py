"""Kernels of the kinds that Triton's tutorials have, compiled for several targets and executed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
pytest.importorskip("qlora_kernels.emulator.engine").library()

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from qlora_kernels.emulator import Module, emulate  # noqa: E402

DEVICES = {80: "a100", 89: "rtx4090", 90: "h100", 120: "rtx5090"}
TARGETS = [80, 89, 90, 120]
pytestmark = pytest.mark.filterwarnings("ignore")


@triton.jit
def add(x, y, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    tl.store(out + at, tl.load(x + at, mask=mask) + tl.load(y + at, mask=mask), mask=mask)


@triton.jit
def softmax(out, x, stride, rows, columns, BLOCK: tl.constexpr):
    for row in tl.range(tl.program_id(0), rows, tl.num_programs(0)):
        at = tl.arange(0, BLOCK)
        v = tl.load(x + row * stride + at, mask=at < columns, other=-float("inf"))
        e = tl.exp(v - tl.max(v, axis=0))
        tl.store(out + row * stride + at, e / tl.sum(e, axis=0), mask=at < columns)


@triton.jit
def layer_norm(x, out, w, b, columns, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    mask = at < columns
    v = tl.load(x + row * columns + at, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(v, axis=0) / columns
    d = tl.where(mask, v - mean, 0.0)
    scale = 1 / tl.sqrt(tl.sum(d * d, axis=0) / columns + eps)
    y = d * scale * tl.load(w + at, mask=mask) + tl.load(b + at, mask=mask)
    tl.store(out + row * columns + at, y, mask=mask)


@triton.jit
def matmul(a, b, c, M, N, K, sa, sb, sc, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    pa = a + (rm % M)[:, None] * sa + rk[None, :]
    pb = b + rk[:, None] * sb + (rn % N)[None, :]
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for k in range(tl.cdiv(K, BK)):
        x = tl.load(pa, mask=rk[None, :] < K - k * BK, other=0.0)
        y = tl.load(pb, mask=rk[:, None] < K - k * BK, other=0.0)
        acc = tl.dot(x, y, acc)
        pa += BK
        pb += BK * sb
    mask = (rm[:, None] < M) & (rn[None, :] < N)
    tl.store(c + rm[:, None] * sc + rn[None, :], acc.to(c.dtype.element_ty), mask=mask)


@triton.jit
def attention(q, k, v, out, L, scale, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    d = tl.arange(0, D)
    base = tl.program_id(1) * L * D
    x = tl.load(q + base + rows[:, None] * D + d[None, :], mask=rows[:, None] < L, other=0.0)
    top = tl.full((BM,), -1e30, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, D), tl.float32)
    for start in range(0, (tl.program_id(0) + 1) * BM, BN):
        cols = start + tl.arange(0, BN)
        kk = tl.load(k + base + cols[None, :] * D + d[:, None], mask=cols[None, :] < L, other=0.0)
        s = tl.dot(x, kk) * scale
        s = tl.where((rows[:, None] >= cols[None, :]) & (cols[None, :] < L), s, -1e30)
        new = tl.maximum(top, tl.max(s, axis=1))
        p = tl.exp2((s - new[:, None]) * 1.44269504)
        shrink = tl.exp2((top - new) * 1.44269504)
        total = total * shrink + tl.sum(p, axis=1)
        vv = tl.load(v + base + cols[:, None] * D + d[None, :], mask=cols[:, None] < L, other=0.0)
        acc = acc * shrink[:, None] + tl.dot(p.to(vv.dtype), vv)
        top = new
    acc = acc / total[:, None]
    tl.store(
        out + base + rows[:, None] * D + d[None, :],
        acc.to(out.dtype.element_ty),
        mask=rows[:, None] < L,
    )


@pytest.mark.parametrize("target", TARGETS)
def test_add(target: int) -> None:
    module = Module.from_triton(
        add, {"x": "*fp32", "y": "*fp32", "out": "*fp32", "n": "i32"}, {"BLOCK": 1024}, target
    )
    x, y = torch.randn(2500), torch.randn(2500)
    out = torch.zeros(2500)
    result = emulate(module, 3, args=[x, y, out, 2500], device=DEVICES[target])
    assert torch.equal(out, x + y)
    assert (
        result.counts.total["distinct_read"] == 2 * 313
        and result.counts.total["distinct_written"] == 313
    )


@pytest.mark.parametrize("target", TARGETS)
def test_softmax(target: int) -> None:
    types = {"out": "*fp32", "x": "*fp32", "stride": "i32", "rows": "i32", "columns": "i32"}
    module = Module.from_triton(softmax, types, {"BLOCK": 1024}, target)
    x = torch.randn(9, 781)
    out = torch.zeros_like(x)
    emulate(module, 4, args=[out, x, 781, 9, 781], device=DEVICES[target])
    torch.testing.assert_close(out, torch.softmax(x, 1), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("target", TARGETS)
def test_layer_norm(target: int) -> None:
    types = {
        "x": "*bf16",
        "out": "*fp32",
        "w": "*fp32",
        "b": "*fp32",
        "columns": "i32",
        "eps": "fp32",
    }
    module = Module.from_triton(layer_norm, types, {"BLOCK": 512}, target)
    x, w, b = torch.randn(5, 300).bfloat16(), torch.randn(300), torch.randn(300)
    out = torch.zeros(5, 300)
    emulate(module, 5, args=[x, out, w, b, 300, 1e-5], device=DEVICES[target])
    torch.testing.assert_close(
        out, torch.nn.functional.layer_norm(x.float(), (300,), w, b, 1e-5), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("target", TARGETS)
def test_matmul(target: int, dtype: str) -> None:
    """mma.sync, and wgmma on sm_90; pipelined by cp.async; ragged M, N and K."""
    types = {
        "a": f"*{dtype}",
        "b": f"*{dtype}",
        "c": "*fp32",
        "M": "i32",
        "N": "i32",
        "K": "i32",
        "sa": "i32",
        "sb": "i32",
        "sc": "i32",
    }
    module = Module.from_triton(
        matmul,
        types,
        {"BM": 64, "BN": 64, "BK": 32},
        target,
        num_warps=4,
        num_stages=3,
        aligned=["a", "b", "c", "sa", "sb", "sc", "K"],
    )
    M, N, K = 100, 96, 112
    t = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    a = torch.randint(-8, 9, (M, K)).to(t)
    b = torch.randint(-8, 9, (K, N)).to(t)
    c = torch.zeros(M, N)
    result = emulate(module, (2, 2), args=[a, b, c, M, N, K, K, N, N], device=DEVICES[target])
    assert torch.equal(c, a.float() @ b.float())  # small integers: exact
    names = result.counts.by_class()
    assert "wgmma" in names if target == 90 else "mma" in names
    assert "cp" in names


@pytest.mark.parametrize("target", TARGETS)
def test_flash_attention(target: int) -> None:
    types = {"q": "*fp16", "k": "*fp16", "v": "*fp16", "out": "*fp32", "L": "i32", "scale": "fp32"}
    module = Module.from_triton(
        attention, types, {"D": 64, "BM": 64, "BN": 32}, target, num_warps=4, num_stages=2
    )
    heads, length = 2, 100
    q, k, v = (torch.randn(heads, length, 64).half() for _ in range(3))
    out = torch.zeros(heads, length, 64)
    emulate(module, (2, heads), args=[q, k, v, out, length, 0.125], device=DEVICES[target])
    want = torch.nn.functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), is_causal=True
    )
    # Probabilities are rounded to fp16 before the second product.
    torch.testing.assert_close(out.double(), want, rtol=2e-3, atol=2e-3)


MATMUL_TYPES = {
    "a": "*bf16",
    "b": "*bf16",
    "c": "*fp32",
    "M": "i32",
    "N": "i32",
    "K": "i32",
    "sa": "i32",
    "sb": "i32",
    "sc": "i32",
}


def test_many_orders_of_a_matmul() -> None:
    module = Module.from_triton(
        matmul,
        MATMUL_TYPES,
        {"BM": 64, "BN": 64, "BK": 32},
        80,
        num_stages=3,
        aligned=["a", "b", "c", "sa", "sb", "sc", "K"],
    )
    from qlora_kernels.emulator import emulate_orders

    a, b, c = torch.randn(64, 64).bfloat16(), torch.randn(64, 64).bfloat16(), torch.zeros(64, 64)
    assert emulate_orders(
        module, (1, 1), args=[a, b, c, 64, 64, 64, 64, 64, 64], orders=6, device="a100", checks=True
    ).same
    np.testing.assert_allclose(c.numpy(), (a.double() @ b.double()).numpy(), rtol=1e-4, atol=1e-4)


def test_what_sm_100_needs_is_named() -> None:
    from qlora_kernels.emulator import PtxError

    module = Module.from_triton(
        matmul,
        MATMUL_TYPES,
        {"BM": 128, "BN": 64, "BK": 64},
        100,
        num_warps=4,
        num_stages=2,
        aligned=["a", "b", "c", "sa", "sb", "sc", "K"],
    )
    with pytest.raises(PtxError, match="tcgen05"):
        module.kernel().program  # noqa: B018
