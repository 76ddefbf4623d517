"""The bound that a result must keep: right results keep it, planted mistakes do not."""

from __future__ import annotations

import pytest
import torch

from qlora_kernels.bench import refcheck
from qlora_kernels.bench.refcheck import product, within

N, K, M = 96, 512, 5


@pytest.fixture(scope="module")
def operands():
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(M, K, generator=generator),
        torch.randn(N, K, generator=generator) * 0.02,
        torch.randn(4, K, generator=generator) * K**-0.5,
        torch.randn(N, 4, generator=generator) * 0.1,
    )


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_in_their_dtype_are_within(operands, dtype):
    x, w, a, b = operands
    x = x.to(dtype)
    assert within(product(x, w), dtype)(x @ w.to(dtype).T) is None
    dy = torch.randn(M, N).to(dtype)
    assert within(product(dy, w, transposed=False), dtype)(dy @ w.to(dtype)) is None
    a, b = a.to(dtype), b.to(dtype)
    want = product(x, w) + product(x, a).through(b, 0.5)
    assert within(want, dtype)(x @ w.to(dtype).T + 0.5 * (x @ a.T) @ b.T) is None


def test_the_reference_is_the_product(operands):
    x, w, a, b = operands
    want = product(x, w) + product(x, a).through(b, -2.0)
    y = x.double() @ w.double().T - 2 * (x.double() @ a.double().T) @ b.double().T
    torch.testing.assert_close(want.value, y)
    assert (want.size >= want.value.abs()).all() and (want.variance > 0).all()


MISTAKES = {
    "one value": lambda y, x, w: y.index_put((torch.tensor(2), torch.tensor(7)), y[2, 7] + 0.5),
    "a scale of 2%": lambda y, x, w: y * 1.02,
    "a block of 64 left out": lambda y, x, w: y - x[:, :64] @ w[:, :64].T,
    "two rows exchanged": lambda y, x, w: y[[1, 0, 2, 3, 4]],
    "codes of one column's nibbles swapped": lambda y, x, w: y - x @ (w - w.roll(1, 1)).T,
    "NaN": lambda y, x, w: y.index_fill(1, torch.tensor([3]), float("nan")),
    "zeros": lambda y, x, w: y * 0,
    "another shape": lambda y, x, w: y[:, :-1],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_found_in_every_dtype(operands, dtype, mistake):
    x, w = operands[0].to(dtype).float(), operands[1]
    y = MISTAKES[mistake]((x @ w.T), x, w).to(dtype)
    assert within(product(x, w), dtype)(y) is not None


def test_what_is_wrong_is_said(operands):
    x, w = operands[:2]
    y = x @ w.T
    y[3, 5] += 1
    text = within(product(x, w), torch.float32)(y)
    assert text.startswith(f"1 of {M * N} values beyond the bound; the first at [3, 5]")
    text = within(product(x, w), torch.bfloat16)((x @ w.T * 1.03).to(torch.bfloat16))
    assert "root mean square error 0.03" in text and "K = 512, bfloat16" in text


def test_rows_are_chosen_with_both_ends():
    assert refcheck.chosen_rows(5).tolist() == [0, 1, 2, 3, 4]
    rows = refcheck.chosen_rows(1000)
    assert len(rows) == refcheck.ROWS == len(set(rows.tolist()))
    assert rows[0] == 0 and rows[-1] == 999 and rows.tolist() == sorted(rows.tolist())


def test_only_the_chosen_rows_are_compared(operands):
    x, w = operands[0].repeat(8, 1), operands[1]
    rows = refcheck.chosen_rows(40)
    y = x @ w.T
    check = within(product(x[rows], w), torch.float32, rows)
    assert check(y) is None
    y[rows[4], 0] += 1
    assert f"[{int(rows[4])}, 0]" in check(y)
