"""The thin products of LoRA in Triton, against float64, each within one rounding a product."""

from __future__ import annotations

import pytest
import torch

from qlora_kernels.triton import lora_grads

from .test_linear import BF16, F16, F32


def bounded(got, exact, size, terms: int, last: float = 2.0**-24) -> None:
    assert ((got.double() - exact).abs() <= terms * 2.0**-23 * size + last * exact.abs()).all()


@pytest.mark.parametrize("m, k, rank, columns, dtype", [
    (1, 1088, 1, False, BF16), (17, 200, 24, False, F16), (70, 1030, 8, True, BF16),
    pytest.param(255, 4128, 256, False, BF16, marks=pytest.mark.full),
    pytest.param(33, 2000, 64, True, F16, marks=pytest.mark.full),
], ids=str)  # fmt: skip
def test_thin(triton_gpu, m, k, rank, columns, dtype) -> None:
    x = torch.randn(m, k).to(dtype)
    a = torch.randn(k, rank) if columns else torch.randn(rank, k)
    parts = lora_grads.thin_product(x, a, 0.5, columns)
    total = torch.empty(m, rank)
    lora_grads.sum_parts(parts, total)
    a = (a if columns else a.T).to(dtype).double()
    bounded(total, 0.5 * x.double() @ a, 0.5 * x.double().abs() @ a.abs(), k)


@pytest.mark.parametrize("m, n, k, rank", [
    (5, 72, 96, 24), (70, 40, 33, 1), pytest.param(255, 129, 4128, 256, marks=pytest.mark.full),
])  # fmt: skip
def test_gradients_of_a_and_b(triton_gpu, m, n, k, rank) -> None:
    dy, x = torch.randn(m, n).to(BF16), torch.randn(m, k).to(BF16)
    s, ds = torch.randn(m, rank), torch.randn(m, rank)
    da, db = lora_grads.lora_grads(dy, x, s, ds, 0.25, BF16, F32, BF16)
    rounded, u = ds.to(BF16).double(), 2.0**-8
    bounded(da, rounded.T @ x.double(), rounded.abs().T @ x.double().abs(), m)
    rounded = s.to(BF16).double()
    exact, size = 0.25 * dy.double().T @ rounded, 0.25 * dy.double().abs().T @ rounded.abs()
    bounded(db, exact, size, m, u)
    assert da.dtype == F32 and db.dtype == BF16


def test_parts_are_added_in_their_order(triton_gpu) -> None:
    parts = torch.tensor([1e8, 1.0, -1e8]).reshape(3, 1, 1).repeat(1, 5, 301)
    out = torch.empty(5, 301)
    lora_grads.sum_parts(parts, out)
    assert torch.equal(out, torch.zeros(5, 301))  # 1e8 + 1 is 1e8 in fp32


def test_many_rows_and_fp32_are_torchs(make_triton_gpu) -> None:
    gpu = make_triton_gpu("a100")
    for m, compute in ((lora_grads._OUTER_ROWS + 1, BF16), (4, F32)):
        dy, x = torch.randn(m, 16).to(compute), torch.randn(m, 24).to(compute)
        da, db = lora_grads.lora_grads(
            dy, x, torch.randn(m, 4), torch.randn(m, 4), 1.0, compute, F32, None
        )
        assert da.shape == (4, 24) and db is None
    assert gpu.launches == []
