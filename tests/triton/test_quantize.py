"""quantize in Triton: bit for bit the reference's, for every input and layout."""

from __future__ import annotations

import itertools

import pytest
import torch

from qlora_kernels import formats, ops, reference
from qlora_kernels.formats import BLOCKSIZES, get_format
from qlora_kernels.triton.quantize import (
    TILE,
    quantize_4bit,
    quantize_4bit_scaled,
    quantize_absmax,
)

from ..cuda.test_quantize import hard_values, same_bits
from .test_dequantize import lazy_zeros

QUICK = [(torch.float32, 4096), (torch.bfloat16, 64), (torch.float16, 16)]


def with_full(quick: list, *everything) -> list:
    """The product of ``everything``, all but ``quick`` left to the full run."""
    return [
        case if case in quick else pytest.param(*case, marks=pytest.mark.full)
        for case in itertools.product(*everything)
    ]


def check(w: torch.Tensor, fmt: str, blocksize: int) -> None:
    packed, absmax = quantize_4bit(w, *get_format(fmt).tensors()[1:], blocksize)
    want_packed, want_absmax = reference.quantize(w, fmt, blocksize)
    assert same_bits(packed, want_packed) and same_bits(absmax, want_absmax), w.numel()


@pytest.mark.parametrize("dtype, blocksize", with_full(QUICK, ops.FLOATS, BLOCKSIZES), ids=str)
def test_quantize(triton_gpu, dtype, blocksize) -> None:
    for count in (2 * TILE, TILE + 5 * blocksize + 7, 2 * blocksize, 1, blocksize - 1):
        check(hard_values(count, dtype, blocksize), "nf4", blocksize)
    assert not any(launch.spilled for launch in triton_gpu.launches)


@pytest.mark.parametrize("fmt", list(formats.FORMATS))
def test_any_codebook(triton_gpu, fmt) -> None:
    w = torch.cat([hard_values(3000, torch.float32, 64), torch.linspace(-1, 1, 4096)])
    check(w, fmt, 64)


@pytest.mark.parametrize("offset", [1, pytest.param(8, marks=pytest.mark.full)])
def test_unaligned_views(triton_gpu, offset) -> None:
    w = hard_values(TILE + 1000, torch.bfloat16, 64)
    where = torch.zeros(w.numel() + offset, dtype=w.dtype)
    where[offset:] = w
    check(where[offset:], "nf4", 64)


def test_strided_views(triton_gpu) -> None:
    """Read in their own row-major order, as the other backends do."""
    check(torch.randn(64, 48, dtype=torch.bfloat16).T, "nf4", 64)


@pytest.mark.parametrize("scale", ["e8m0", "e4m3"])
@pytest.mark.parametrize(
    "dtype, blocksize",
    with_full([(torch.float32, 16)], [torch.float32, torch.bfloat16], [16, 32, 2048]),
    ids=str,
)
def test_scales_of_one_byte(triton_gpu, scale, dtype, blocksize) -> None:
    _, thresholds, codes = get_format("fp4_e2m1").tensors()
    for count in (TILE + 3 * blocksize + 5, blocksize):
        w = hard_values(count, dtype, blocksize)
        tensor_scale = None if scale == "e8m0" else reference.tensor_scale(w)
        args = (w, thresholds, codes, blocksize, tensor_scale)
        for got, want in zip(
            quantize_4bit_scaled(*args), ops._plain_quantize_scaled(*args), strict=True
        ):
            assert same_bits(got, want)


def test_every_scale_of_one_byte_is_rounded_as_torch_does(triton_gpu) -> None:
    """Each byte's value, its neighbours half way and just beside that, and far beyond the range."""
    e4m3 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (e4m3[1:] + e4m3[:-1]) / 2
    more = torch.tensor([464.0, 463.99, 500.0, 1e30, 2.0**-127, 2.0**-128, 2.0**127, 3e38, 1e-45])
    powers = 2.0 ** torch.arange(-126, 128).float()
    nearby = [
        torch.nextafter(t, torch.full_like(t, limit))
        for t in (middles, powers)
        for limit in (0.0, 1e38)
    ]
    absmax = torch.cat([e4m3, middles, powers, more, *nearby])
    w = torch.zeros(absmax.numel(), 16)
    w[:, 3] = absmax
    _, thresholds, codes = get_format("fp4_e2m1").tensors()
    for tensor_scale in (None, torch.ones(1)):
        args = (w, thresholds, codes, 16, tensor_scale)
        got, want = quantize_4bit_scaled(*args), ops._plain_quantize_scaled(*args)
        assert same_bits(got[1], want[1]) and same_bits(got[0], want[0])


@pytest.mark.parametrize("count", [1, 257, 65536 + 1])
def test_quantize_absmax(triton_gpu, count) -> None:
    """Nested scales, the mean in its one order of summation: 65,537 scales are three levels."""
    torch.manual_seed(count)
    absmax = torch.rand(count) * torch.logspace(-3, 3, count)
    got = quantize_absmax(absmax, formats.nested_thresholds(), None)
    for g, want in zip(got, reference.quantize_absmax(absmax), strict=True):
        assert same_bits(g, want)


def test_quantize_absmax_of_hard_scales(triton_gpu) -> None:
    for values in (
        torch.zeros(300), torch.full((300,), 1e-39), torch.tensor([1.0, float("nan"), 2.0]),
        torch.tensor([1.0, float("inf"), 2.0]), torch.full((512,), 0.25),
    ):  # fmt: skip
        for offset in (None, torch.tensor(0.125)):
            got = quantize_absmax(values, formats.nested_thresholds(), offset)
            for g, want in zip(got, reference.quantize_absmax(values, offset), strict=True):
                assert same_bits(g, want)


def test_a_scale_code_of_your_own(triton_gpu) -> None:
    values = torch.rand(600)
    limits = torch.linspace(-1, 1, 255) ** 3
    offset = torch.zeros(())
    got = quantize_absmax(values, limits, offset)
    for g, want in zip(got, reference.quantize_absmax(values, offset, limits), strict=True):
        assert same_bits(g, want)


@pytest.mark.parametrize("tail", [TILE, 33])
def test_beyond_2_to_the_31(make_triton_gpu, tail) -> None:
    """The last program of a tensor that is there only where it is touched."""
    count = (1 << 32) + tail
    w = lazy_zeros(count, torch.bfloat16)
    w[-tail:] = torch.randn(tail)
    make_triton_gpu("h100", checks=(), blocks=[count // TILE - (count % TILE == 0)])
    packed, absmax = quantize_4bit(w, *get_format("nf4").tensors()[1:], 64)
    want = reference.quantize(w[-tail:], "nf4", 64)
    assert same_bits(packed[-want[0].numel() :], want[0])
    assert same_bits(absmax[-want[1].numel() :], want[1])


def test_sm_100_executes_what_has_no_matrix_product(make_triton_gpu) -> None:
    make_triton_gpu("b200")
    check(torch.randn(TILE + 100).bfloat16(), "nf4", 64)


def test_results_do_not_depend_on_the_order_of_warps_and_blocks(make_triton_gpu) -> None:
    gpu = make_triton_gpu("a100", orders=4)
    check(hard_values(2 * TILE + 100, torch.float32, 4096), "nf4", 4096)
    absmax = torch.rand(3000)
    got = quantize_absmax(absmax, formats.nested_thresholds(), None)
    for g, want in zip(got, reference.quantize_absmax(absmax), strict=True):
        assert same_bits(g, want)
    assert len(gpu.launches) == 4


def test_arithmetic_is_ieee_in_the_ptx(make_triton_gpu) -> None:
    """Nothing contracted, flushed or approximated, whatever the emulator makes of it."""
    gpu = make_triton_gpu("a100")
    w = torch.randn(100)
    tables = get_format("nf4").tensors()[1:]
    quantize_4bit(w, *tables, 4096)
    quantize_4bit_scaled(w, *tables, 16, None)
    quantize_4bit_scaled(w, *tables, 16, torch.ones(1))
    quantize_absmax(w.abs(), formats.nested_thresholds(), None)
    assert len(gpu.launches) == 5
    for launch in gpu.launches:
        text = launch.result.kernel.module.text
        for wrong in (".ftz", "fma.rn.f", ".approx", "div.full"):
            assert wrong not in text, (launch.name, wrong)


WRONG = {
    "dtype": (lambda w, t, c: quantize_4bit(w.long(), t, c, 64), TypeError, "A must be float32"),
    "blocksize": (lambda w, t, c: quantize_4bit(w, t, c, 48), ValueError, "blocksize must be one"),
    "empty": (lambda w, t, c: quantize_4bit(w[:0], t, c, 64), ValueError, "A is empty"),
    "thresholds": (lambda w, t, c: quantize_4bit(w, t[:3], c, 64), ValueError, "thresholds must"),
    "codes": (lambda w, t, c: quantize_4bit(w, t, c.int(), 64), ValueError, "codes must be"),
    "factor": (
        lambda w, t, c: quantize_4bit_scaled(w, t, c, 64, w), ValueError, "tensor_scale must be"
    ),
    "absmax": (lambda w, t, c: quantize_absmax(w.half(), t, None), ValueError, "absmax must be"),
    "limits": (lambda w, t, c: quantize_absmax(w, t, None), ValueError, "thresholds must be"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_named(case) -> None:
    call, error, words = WRONG[case]
    with pytest.raises(error, match=words):
        call(torch.randn(100), *get_format("nf4").tensors()[1:])
