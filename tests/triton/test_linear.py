"""linear_4bit in Triton, from its PTX: exactly on identity matrices, within the bound of linear.py
on random ones, every checker silent, whatever the shape."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_kernels import ops, reference
from qlora_kernels.triton import configs, linear
from qlora_kernels.triton.configs import Config, Tile
from qlora_kernels.triton.input_grad import linear_4bit_backward
from qlora_kernels.triton.linear import linear_4bit

from ..cuda.test_linear import Case

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


class Gpu:
    """What `Case` asks of a GPU: the ops in Triton, on tensors in host memory."""

    ops: Any = SimpleNamespace(linear_4bit=linear_4bit, linear_4bit_backward=linear_4bit_backward)

    def __call__(self, *tensors: Tensor | None) -> Any:
        return tensors[0] if len(tensors) == 1 else tensors

    def weight(self, packed: Tensor, state: Any) -> tuple:
        return (packed.reshape(-1), *state.weight_args())


class TritonCase(Case):
    """`Case`, whose bound has the codebook rounded (and dy * scale) at any number of rows."""

    @property
    def in_decode(self) -> bool:
        return True


def names(gpu: Any) -> list[str]:
    return [launch.name for launch in gpu.launches]


# A case a tile, each with something odd: n that no tile divides, k of an odd number of chunks, of
# chunks of 32, a rank of 1, of more than a tile, bf16 A and B, x in fp32.
QUICK = [
    {"m": 2, "n": 11, "k": 192, "rank": 1, "bias": True},
    {"m": 7, "n": 40, "k": 576, "nested": False, "compute": F16},
    {"m": 9, "n": 65, "k": 288, "rank": 24, "x_dtype": F32},
    {"m": 33, "n": 72, "k": 128, "rank": 8, "bias": True, "s_given": True},
]


def on_devices(cases: list[dict]) -> list[Any]:
    """Each case on each device; the quick run takes mma.sync's and wgmma's in turn."""
    return [
        pytest.param(device, case, id=f"{device}-{case}",
                     marks=[] if j == i % 2 else pytest.mark.full)
        for i, case in enumerate(cases)
        for j, device in enumerate(("a100", "h100", "rtx4090", "rtx5090"))
    ]  # fmt: skip


@pytest.mark.parametrize("device, case", on_devices(QUICK))
def test_within_the_bound(make_triton_gpu, device, case) -> None:
    gpu = make_triton_gpu(device)
    TritonCase(**case).check_forward(Gpu())
    assert "linear" in names(gpu)


RANKS = [0, 1, 8, 24, 64, 256]
ROWS = [*range(1, 10), 16, 17, 33, 255]
SHAPES = [(11, 4160 - 32), (129, 256), (40, 1024), (300, 192)]
WEIGHTS = [(True, 64), (False, 32), (True, 256)]  # nested, blocksize


def full_matrix(m: int, shape: tuple[int, int]) -> list[TritonCase]:
    """Each kind of weight, in both dtypes, with ranks that take turns."""
    turn = ROWS.index(m) + 2 * SHAPES.index(shape)
    found = []
    for i, (nested, blocksize) in enumerate(WEIGHTS):
        for j, compute in enumerate((BF16, F16)):
            rank = RANKS[(turn + 2 * i + j) % len(RANKS)]
            more = {"compute": compute, "blocksize": blocksize}
            found.append(TritonCase(m, *shape, rank, rank % 16 == 8, nested, **more))
    return found


@pytest.mark.full
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("m", ROWS)
def test_within_the_bound_in_full(triton_gpu, shape, m) -> None:
    for case in full_matrix(m, shape):
        case.check_forward(Gpu())


def rounded_weight(case: Case) -> Tensor:
    """W of the codebook rounded to the compute dtype, which the kernel multiplies by."""
    codebook = case.state.code.to(case.compute).float()
    args = (case.packed.reshape(-1), case.state.scales(), codebook, case.state.blocksize)
    return reference.dequantize(*args, (case.n, case.k), case.compute)


@pytest.mark.parametrize("m, n, k, nested", [(2, 40, 192, True), (16, 33, 128, False)])
def test_identity_exactly(triton_gpu, m, n, k, nested) -> None:
    """x of unit vectors picks columns of W: rounded code times scale, to the bit."""
    case = TritonCase(m, n, k, nested=nested)
    w = rounded_weight(case)
    for first in (0, 65, k - m):
        case.x = torch.eye(k)[first : first + m].to(case.compute)
        assert torch.equal(case.forward(Gpu())[0], w[:, first : first + m].T)
    assert set(names(triton_gpu)) <= {"linear", "add_parts"}


@pytest.mark.parametrize("tile", [Tile(1, 64, 64, 4, 2, 2)], ids=str)
def test_a_plain_product_is_wgmma_on_hopper(triton_gpu, tile) -> None:
    """Three splits, the rows beyond the tile's and the columns beyond n."""
    case = TritonCase(70, 72, 448)
    weight = Gpu().weight(case.packed, case.state)
    y = linear.product(case.x, weight, case.n, Config(tile, 3), F32)
    launch = triton_gpu.launches[0]
    hopper = triton_gpu.device.capability == (9, 0)
    assert ("wgmma" if hopper else "mma") in launch.result.counts.by_class()
    w = rounded_weight(case).double()
    exact, size = case.x.double() @ w.T, case.x.double().abs() @ w.abs().T
    # w is rounded to bf16 once more than what the kernel takes: codes times fp32 scales.
    assert ((y - exact).abs() <= (2.0**-8 + case.k * 2.0**-23) * size).all()


def test_scales_of_one_byte(triton_gpu) -> None:
    """E8M0 and E4M3 go the same way: their scales are exact in fp32."""
    from .test_dequantize import quantized

    x = torch.randn(3, 128).to(BF16)
    for kind in ("e8m0", "e4m3"):
        weight, _ = quantized(torch.randn(24, 128), kind, 32)
        y, _ = linear_4bit(x, *weight, 24, None, None, None, None, 1.0, BF16)
        w = ops._plain_dequantize(*weight, [24, 128], F32).double()
        exact, size = x.double() @ w.T, x.double().abs() @ w.abs().T
        assert ((y - exact).abs() <= 2.0**-8 * (size + exact.abs()) * 1.01).all()
    assert set(names(triton_gpu)) <= {"linear", "add_parts"}


@pytest.mark.parametrize(
    "case", [{"n": 7, "k": 33}, {"n": 8, "k": 64, "compute": F32}, {"n": 8, "k": 64, "m": 300},
             {"n": 8, "k": 64, "blocksize": 16}], ids=str,
)  # fmt: skip
def test_what_has_no_kernel_is_dequantized_and_multiplied(make_triton_gpu, case) -> None:
    gpu = make_triton_gpu("a100")
    for rank in (0, 4):
        TritonCase(**{"m": 5, "rank": rank, "bias": True, **case}).check_forward(Gpu())
    assert names(gpu) == ["dequantize", "dequantize"]


def test_no_rows_no_rank_and_leading_dimensions(make_triton_gpu) -> None:
    make_triton_gpu("a100")
    y, s = TritonCase(0, 32, 64, 8, True).forward(Gpu())
    assert y.shape == (0, 32) and s.shape == (0, 8)
    case = TritonCase(6, 40, 128, 8)
    flat, flat_s = case.forward(Gpu())
    case.x = case.x.view(2, 3, 128)
    y, s = case.forward(Gpu())
    assert y.shape == (2, 3, 40) and torch.equal(y.view(6, 40), flat) and torch.equal(s, flat_s)
    weight = Gpu().weight(case.packed, case.state)
    a, b = torch.zeros(0, 128), torch.zeros(40, 0)
    y, s = linear_4bit(case.x, *weight, 40, None, a, b, None, 1.0, BF16)
    plain, _ = linear_4bit(case.x, *weight, 40, None, None, None, None, 1.0, BF16)
    assert torch.equal(y, plain) and s.shape == (6, 0)


@pytest.mark.parametrize("m", [pytest.param(2, marks=pytest.mark.full), 33])
def test_the_same_bits_in_every_order_of_warps_and_blocks(make_triton_gpu, m) -> None:
    make_triton_gpu("a100", orders=4)  # raises where they differ
    TritonCase(m, 72, 256, 8, True).check_forward(Gpu())


def test_a_weight_is_read_once_and_nothing_conflicts(make_triton_gpu) -> None:
    """One sector of packed bytes a sector of them, for few rows; products, not gathers."""
    gpu = make_triton_gpu("a100")
    case = TritonCase(8, 64, 1024)
    case.forward(Gpu())
    regions = {r["name"]: r for r in gpu.launches[0].result.counts.regions}
    packed = regions["argument 1"]
    assert packed["sectors_read"] == packed["distinct_read"] == 64 * 1024 // 2 // 32
    assert regions["argument 3"]["distinct_read"] == 2
    assert regions["argument 5"]["distinct_read"] == 32


def test_the_errors_are_the_other_backends(make_triton_gpu) -> None:
    gpu = make_triton_gpu("a100")
    case = TritonCase(4, 32, 64, 8)
    weight = Gpu().weight(case.packed, case.state)
    good = {
        "x": case.x,
        "weight": weight,
        "n": 32,
        "bias": None,
        "a": case.a,
        "b": case.b,
        "s": None,
    }
    bad = [
        {"n": 48}, {"bias": torch.zeros(31)}, {"a": torch.zeros(8, 63)}, {"b": torch.zeros(31, 8)},
        {"s": torch.zeros(4, 8)}, {"b": None}, {"x": case.x.double()},
        {"weight": (*weight[:3], 48, *weight[4:])},
        {"weight": (weight[0], weight[1].short(), *weight[2:])},
    ]  # fmt: skip

    def call(op, x, weight, n, bias, a, b, s):
        return op(x, *weight, n, bias, a, b, s, 1.0, BF16)

    for change in bad:
        with pytest.raises((ValueError, TypeError)) as plain:
            call(ops._plain_linear, **{**good, **change})
        with pytest.raises(type(plain.value)) as ours:
            call(linear_4bit, **{**good, **change})
        assert str(ours.value) == str(plain.value)
    assert gpu.launches == []


@pytest.mark.full
def test_offsets_beyond_two_to_the_31(make_triton_gpu) -> None:
    """The last program of more than 2^31 weights; memory that nothing touches is not there."""
    from .test_dequantize import lazy_zeros

    k, small = 4096, TritonCase(4, 64, 4096, nested=False)
    n = (1 << 19) + 64
    packed, absmax = lazy_zeros(n * k // 2, torch.uint8), lazy_zeros(n * k // 64, F32)
    packed[-64 * k // 2 :] = small.packed.reshape(-1)
    absmax[-64 * k // 64 :] = small.state.absmax
    make_triton_gpu("a100", checks=(), blocks=[n // 32 - 1])
    weight = (packed, absmax, small.state.code, 64, None, None, None)
    config = Config(configs.candidates(configs.LINEAR, 4)[1], 1)
    y = linear.product(small.x, weight, n, config, F32)[:, -32:]
    w = rounded_weight(small)[-32:].double()
    size = small.x.double().abs() @ w.abs().T
    assert ((y - small.x.double() @ w.T).abs() <= (2.0**-8 + k * 2.0**-23) * size).all()
