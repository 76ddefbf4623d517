"""dequantize in Triton: bit for bit the reference's, for all kinds of scales, every layout."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from qlora_kernels import formats, ops, reference
from qlora_kernels.emulator.triton_driver import EmulatedTriton
from qlora_kernels.formats import get_format
from qlora_kernels.triton.dequantize import TILE, dequantize_4bit, dequantize_4bit_out

from ..cuda.test_quantize import hard_values, same_bits

QUICK = [
    (torch.bfloat16, "nested", 64), (torch.float16, "nested", 16), (torch.float32, "nested", 4096),
    (torch.bfloat16, "e8m0", 32), (torch.bfloat16, "e4m3", 16),
]  # fmt: skip
CASES = [
    case if case in QUICK else pytest.param(*case, marks=pytest.mark.full)
    for case in itertools.product(
        ops.FLOATS, ["fp32", "nested", "e8m0", "e4m3"], formats.BLOCKSIZES
    )
]


def lazy_zeros(count: int, dtype: torch.dtype) -> Tensor:
    """As torch.zeros, but of pages that the system makes when they are touched."""
    return torch.from_numpy(np.zeros(count * dtype.itemsize, np.uint8)).view(dtype)


def quantized(w: Tensor, scales: str, blocksize: int) -> tuple[ops.WeightArgs, Tensor]:
    """A weight's arguments, and its fp32 scales."""
    codebook, thresholds, codes = get_format("nf4").tensors()
    if scales in ("e8m0", "e4m3"):
        factor = None if scales == "e8m0" else reference.tensor_scale(w)
        packed, stored = ops._plain_quantize_scaled(w, thresholds, codes, blocksize, factor)
        full = reference.byte_scales(stored, factor)
        return (packed, stored, codebook, blocksize, None, None, factor), full
    packed, absmax = reference.quantize(w, "nf4", blocksize)
    if scales == "fp32":
        return (packed, absmax, codebook, blocksize, None, None, None), absmax
    q, nested_absmax, offset = reference.quantize_absmax(absmax)
    full = reference.dequantize_absmax(q, nested_absmax, offset)
    return (packed, q, codebook, blocksize, nested_absmax, formats.nested_code(), offset), full


def check(w: Tensor, scales: str, blocksize: int, dtype: torch.dtype) -> None:
    weight, full = quantized(w, scales, blocksize)
    out = dequantize_4bit(*weight, list(w.shape), dtype)
    want = reference.dequantize(weight[0], full, weight[2], blocksize, tuple(w.shape), dtype)
    assert same_bits(out, want), w.shape


@pytest.mark.parametrize("dtype, scales, blocksize", CASES, ids=str)
def test_dequantize(triton_gpu: EmulatedTriton, dtype, scales, blocksize) -> None:
    for count in (2 * TILE, TILE + 3 * blocksize + 5, 1, 33):
        check(hard_values(count, torch.float32, blocksize), scales, blocksize, dtype)
    # There are no loops: ptxas may put a value aside, once (e4m3 to fp32 in blocks of 64 on sm_80).
    assert all(launch.spilled <= 8 for launch in triton_gpu.launches)


def test_accesses_are_of_16_bytes(triton_gpu: EmulatedTriton) -> None:
    """All packed bytes and all results, in the sectors that they lie in and no more."""
    check(torch.randn(2, TILE), "fp32", 64, torch.bfloat16)
    launch = triton_gpu.launches[-1]
    text = launch.result.kernel.module.text
    assert "ld.global.v4.b32" in text and "st.global.v4.b32" in text
    packed, _, _, out = launch.result.counts.regions
    assert packed["sectors_read"] == packed["distinct_read"] == 2 * TILE / 2 / 32
    assert out["sectors_written"] == out["distinct_written"] == 2 * TILE * 2 / 32


def test_nothing_is_gathered_from_global_memory(triton_gpu: EmulatedTriton) -> None:
    """The codebook is read once a program, by no more instructions than it has values."""
    for dtype in (torch.bfloat16, torch.float32):
        check(torch.randn(TILE), "fp32", 64, dtype)
        launch = triton_gpu.launches[-1]
        _, _, codebook, _ = launch.result.counts.regions
        assert codebook["sectors_read"] <= 16 * 4 and codebook["distinct_read"] == 2


@pytest.mark.parametrize("offset", [1, pytest.param(4, marks=pytest.mark.full)])
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.full)], ids=str
)
def test_unaligned_views(triton_gpu, dtype, offset) -> None:
    """Tensors that start anywhere, and nothing written outside them."""
    w = torch.randn(TILE + 1000)
    weight, full = quantized(w, "fp32", 64)
    room = torch.zeros(weight[0].numel() + offset, dtype=torch.uint8)
    room[offset:] = weight[0]
    out = torch.zeros(w.numel() + 2 * offset, dtype=dtype)
    dequantize_4bit_out(room[offset:], *weight[1:], out=out[offset:-offset])
    want = reference.dequantize(weight[0], full, weight[2], 64, (w.numel(),), dtype)
    assert same_bits(out[offset:-offset], want)
    assert not out[:offset].any() and not out[-offset:].any()


@pytest.mark.parametrize("scale", [torch.float8_e8m0fnu, torch.float8_e4m3fn], ids=str)
def test_every_byte_means_what_torch_says(triton_gpu, scale) -> None:
    packed = torch.full((256 * 8,), 0xFF, dtype=torch.uint8)  # code 15, the value 1, blocks of 16
    stored = torch.arange(256, dtype=torch.uint8).view(torch.int8)
    one = torch.ones(1) if scale == torch.float8_e4m3fn else None
    weight = (packed, stored, get_format("nf4").tensors()[0], 16, None, None, one)
    out = dequantize_4bit(*weight, [4096], torch.float32)
    assert same_bits(out[::16].contiguous(), stored.view(scale).float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_code_of_any_codebook_and_scale(triton_gpu, dtype) -> None:
    """Byte permutes of tables with all that a table may hold: infinities, NaN, denormals."""
    torch.manual_seed(0)
    codebook = torch.randn(16) * torch.logspace(-6, 6, 16)
    absmax = torch.tensor([1.0, 0.0, -0.0, float("inf"), float("nan"), 1e-40, 3e38, 7e-5]).repeat(8)
    packed = torch.randint(256, (TILE // 2,), dtype=torch.uint8)
    out = dequantize_4bit(packed, absmax, codebook, 64, None, None, None, [TILE], dtype)
    want = reference.dequantize(packed, absmax, codebook, 64, (TILE,), dtype)
    assert same_bits(out, want)


@pytest.mark.parametrize("tail", [TILE, 33])
def test_beyond_2_to_the_31(make_triton_gpu, tail) -> None:
    """The last program of a weight that is there only where it is touched."""
    count = (1 << 32) + tail
    (small, absmax, codebook, *_), _ = quantized(torch.randn(tail), "fp32", 64)
    packed = lazy_zeros((count + 1) // 2, torch.uint8)
    scales = lazy_zeros(-(-count // 64), torch.float32)
    packed[-small.numel() :], scales[-absmax.numel() :] = small, absmax
    out = lazy_zeros(count, torch.bfloat16)
    make_triton_gpu("h100", checks=(), blocks=[count // TILE - (count % TILE == 0)])
    dequantize_4bit_out(packed, scales, codebook, 64, None, None, None, out=out)
    want = reference.dequantize(small, absmax, codebook, 64, (tail,), torch.bfloat16)
    assert same_bits(out[-tail:], want)
    assert not out[-tail - 100 : -tail].any()


def test_sm_100_executes_what_has_no_matrix_product(make_triton_gpu) -> None:
    make_triton_gpu("b200")
    check(torch.randn(TILE + 100), "nested", 64, torch.bfloat16)


def test_results_do_not_depend_on_the_order_of_warps_and_blocks(make_triton_gpu) -> None:
    make_triton_gpu("a100", orders=4)
    for dtype in (torch.bfloat16, torch.float32):
        check(torch.randn(2 * TILE + 100), "nested", 64, dtype)


def test_a_scale_is_rounded_twice_in_the_ptx(triton_gpu: EmulatedTriton) -> None:
    check(torch.randn(100), "nested", 64, torch.bfloat16)
    check(torch.randn(100), "nested", 64, torch.float32)
    for launch in triton_gpu.launches:
        text = launch.result.kernel.module.text
        assert "fma.rn.f" not in text and ".ftz" not in text


def test_nothing_to_do() -> None:
    weight, _ = quantized(torch.randn(64), "fp32", 64)
    empty = (weight[0][:0], weight[1][:0], *weight[2:])
    assert dequantize_4bit(*empty, [0, 5], torch.float32).shape == (0, 5)


def test_bad_input_has_the_other_backends_words() -> None:
    weight, _ = quantized(torch.randn(128), "nested", 64)
    packed, absmax, codebook, blocksize, *nested = weight
    wrong = [
        (weight, [129], torch.float32), (weight, [128], torch.int32),
        ((packed.int(), *weight[1:]), [128], torch.float32),
        ((packed, absmax[:1], *weight[2:]), [128], torch.float32),
        ((packed, absmax, codebook[:8], *weight[3:]), [128], torch.float32),
        ((packed, absmax, codebook, 65, *nested), [128], torch.float32),
        ((packed, absmax, codebook, blocksize, None, None, None), [128], torch.float32),
    ]  # fmt: skip
    for args, shape, dtype in wrong:
        with pytest.raises((TypeError, ValueError)) as ours:
            dequantize_4bit(*args, shape, dtype)
        with pytest.raises((TypeError, ValueError)) as plain:
            ops._plain_dequantize(*args, shape, dtype)
        assert str(ours.value) == str(plain.value) and ours.type is plain.type


def test_out_must_be_contiguous() -> None:
    weight, _ = quantized(torch.randn(128), "fp32", 64)
    with pytest.raises(ValueError, match="out must be contiguous"):
        dequantize_4bit_out(*weight, out=torch.zeros(16, 8).T)
