"""The gradient by x in Triton: exactly on identity matrices, within input_grad.py's bound."""

from __future__ import annotations

import pytest
import torch

from qlora_kernels import reference
from qlora_kernels.triton import input_grad, linear
from qlora_kernels.triton.blocks import GATHER

from .test_linear import (
    BF16,
    F16,
    F32,
    ROWS,
    SHAPES,
    Gpu,
    TritonCase,
    full_matrix,
    names,
    on_devices,
)

QUICK = [
    {"m": 2, "n": 75, "k": 320, "rank": 1},
    {"m": 16, "n": 40, "k": 96, "nested": False, "compute": F16, "rank": 8},
    {"m": 17, "n": 33, "k": 256, "rank": 24, "x_dtype": F32},
    {"m": 40, "n": 48, "k": 128, "ab": BF16, "rank": 8},
]


@pytest.mark.parametrize("device, case", on_devices(QUICK))
def test_within_the_bound(make_triton_gpu, device, case) -> None:
    gpu = make_triton_gpu(device)
    TritonCase(**case).check_backward(Gpu())
    assert "input_grad" in names(gpu)


@pytest.mark.full
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("m", ROWS)
def test_within_the_bound_in_full(triton_gpu, shape, m) -> None:
    for case in full_matrix(m, shape):
        case.check_backward(Gpu())


@pytest.mark.parametrize("m, n, k", [(2, 40, 320), (16, 96, 128)])
def test_identity_exactly(triton_gpu, m, n, k) -> None:
    """dy of unit vectors picks rows of W: rounded code times rounded scale, to the bit."""
    case = TritonCase(m, n, k)
    codebook, scales = (t.bfloat16().float() for t in (case.state.code, case.state.scales()))
    w = reference.dequantize(case.packed.reshape(-1), scales, codebook, 64, (n, k), BF16)
    for first in (0, 21, n - m):
        case.dy = torch.eye(n)[first : first + m].to(BF16)
        assert torch.equal(case.backward(Gpu())[0], w[first : first + m])
    assert set(names(triton_gpu)) <= {"input_grad", "add_parts"}


@pytest.mark.parametrize(
    "case",
    [{"n": 7, "k": 33}, {"n": 8, "k": 64, "compute": F32}, {"n": 8, "k": 64, "m": 70},
     {"n": 8, "k": 64, "m": 17, "compute": F16}],
    ids=str,
)  # fmt: skip
def test_what_has_no_kernel_is_dequantized_and_multiplied(make_triton_gpu, case) -> None:
    gpu = make_triton_gpu("a100")
    TritonCase(**{"m": 5, "rank": 0, **case}).check_backward(Gpu())
    assert names(gpu) == ["dequantize"]


@pytest.mark.parametrize("case", QUICK[:3], ids=str)
def test_the_way_of_other_makers_gpus(make_triton_gpu, monkeypatch, case) -> None:
    """GATHER, which no NVIDIA device takes by itself, computes the same there."""
    for module in (linear, input_grad):
        monkeypatch.setattr(module, "way", lambda dtype: GATHER.value)
    gpu = make_triton_gpu("a100")
    TritonCase(**case).check_backward(Gpu())
    TritonCase(**case).check_forward(Gpu())
    assert {"input_grad", "linear"} <= set(names(gpu))


def test_only_what_is_needed(make_triton_gpu) -> None:
    gpu = make_triton_gpu("a100")
    case = TritonCase(4, 32, 64, 8)
    dx, da, db, ds = case.backward(Gpu(), (False, False, False))
    assert dx.numel() == da.numel() == db.numel() == 0 and ds.shape == (4, 8)
    assert "input_grad" not in names(gpu) and "outer" not in names(gpu)
    dx, da, db, _ = case.backward(Gpu(), (True, False, False))
    assert dx.shape == (4, 64) and da.numel() == db.numel() == 0


def test_no_rows(make_triton_gpu) -> None:
    make_triton_gpu("a100")
    dx, da, db, ds = TritonCase(0, 32, 64, 8).backward(Gpu())
    assert dx.shape == (0, 64) and ds.shape == (0, 8)
    assert da.shape == (8, 64) and not da.any() and db.shape == (32, 8) and not db.any()


@pytest.mark.parametrize("m", [pytest.param(3, marks=pytest.mark.full), 33])
def test_the_same_bits_in_every_order_of_warps_and_blocks(make_triton_gpu, m) -> None:
    make_triton_gpu("a100", orders=4)  # raises where they differ
    TritonCase(m, 72, 256, 8).check_backward(Gpu())


def test_packed_bytes_that_are_not_words(make_triton_gpu) -> None:
    """A view that begins at an odd byte cannot be read by words."""
    gpu = make_triton_gpu("a100")
    case = TritonCase(4, 32, 64)
    case.packed = torch.cat([torch.zeros(1, dtype=torch.uint8), case.packed.reshape(-1)])[1:]
    case.check_backward(Gpu())
    case.check_forward(Gpu())
    assert names(gpu)[0] == "dequantize" and "linear" in names(gpu)
    assert "input_grad" not in names(gpu)
