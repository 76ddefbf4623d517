"""quantize and dequantize on CUDA: bit for bit the reference's, for every input and layout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qlora_kernels import formats, ops, reference
from qlora_kernels.formats import get_format

FLOATS = ops.FLOATS
BLOCKSIZES = formats.BLOCKSIZES
CTA = 8192  # values that a CTA of quantize takes; dequantize's takes 16384


def same_bits(got: Tensor, want: Tensor) -> bool:
    """Equal, the sign of zero included; a NaN equals a NaN."""
    assert got.dtype == want.dtype and got.shape == want.shape
    if not got.is_floating_point():
        return torch.equal(got, want)
    kind = torch.int32 if got.dtype == torch.float32 else torch.int16
    differ = (got.view(kind) != want.view(kind)) & ~(got.isnan() & want.isnan())
    return not differ.any()


def hard_values(count: int, dtype: torch.dtype, blocksize: int) -> Tensor:
    """Blocks of each kind that people forget: zeros, denormals, infinities, NaN."""
    torch.manual_seed(count)
    w = torch.randn(count)
    kinds: list[Tensor] = [
        torch.zeros(()), torch.tensor(1e-39), torch.tensor(float("inf")),
        torch.tensor(float("-inf")), torch.tensor(float("nan")), torch.tensor(-0.0),
    ]  # fmt: skip
    for i, value in enumerate(kinds):
        start = (3 * i + 1) * blocksize
        if start >= count:
            break
        if i in (0, 1, 5):
            w[start : start + blocksize] = value  # the whole block
        else:
            w[min(start + 3, count - 1)] = value
    w[:blocksize] *= 1e30 if dtype == torch.float32 else 1
    return w.to(dtype)


def quantized(w: Tensor, fmt: str, blocksize: int) -> tuple[Tensor, Tensor]:
    return reference.quantize(w, fmt, blocksize)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_quantize(gpu, dtype, blocksize) -> None:
    for count in (CTA + 5 * blocksize + 7, 2 * blocksize, 1, blocksize - 1):
        w = hard_values(count, dtype, blocksize)
        tables = get_format("nf4").tensors()[1:]
        packed, absmax = gpu.ops.quantize_4bit(*gpu(w, *tables), blocksize)
        want_packed, want_absmax = quantized(w, "nf4", blocksize)
        assert same_bits(packed.cpu(), want_packed), count
        assert same_bits(absmax.cpu(), want_absmax), count


@pytest.mark.parametrize("fmt", list(formats.FORMATS))
def test_quantize_any_codebook(gpu, fmt) -> None:
    w = torch.cat([hard_values(3000, torch.float32, 64), torch.linspace(-1, 1, 4096)])
    packed, absmax = gpu.ops.quantize_4bit(*gpu(w, *get_format(fmt).tensors()[1:]), 64)
    want_packed, want_absmax = quantized(w, fmt, 64)
    assert same_bits(packed.cpu(), want_packed) and same_bits(absmax.cpu(), want_absmax)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("offset", [1, 3, 8])
def test_unaligned_views(gpu, dtype, offset) -> None:
    """Tensors that start anywhere: elements are read and written one by one, to the same bits."""
    w = hard_values(CTA + 1000, dtype, 64)
    where = gpu(torch.zeros(w.numel() + offset, dtype=dtype))
    where[offset:] = gpu(w)
    packed, absmax = gpu.ops.quantize_4bit(
        where[offset:], *gpu(*get_format("nf4").tensors()[1:]), 64
    )
    want_packed, want_absmax = quantized(w, "nf4", 64)
    assert same_bits(packed.cpu(), want_packed) and same_bits(absmax.cpu(), want_absmax)

    codebook = get_format("nf4").tensors()[0]
    moved = gpu(torch.zeros(packed.numel() + offset, dtype=torch.uint8))
    moved[offset:] = packed
    out = gpu(torch.zeros(w.numel() + offset, dtype=dtype))
    gpu.ops.dequantize_4bit.out(
        moved[offset:], absmax, gpu(codebook), 64, None, None, None, out=out[offset:]
    )
    want = reference.dequantize(want_packed, want_absmax, codebook, 64, tuple(w.shape), dtype)
    assert same_bits(out[offset:].cpu(), want)
    assert not out[:offset].any()


@pytest.mark.parametrize("count", [1, 255, 256, 257, 65536 + 1, 70000])
def test_quantize_absmax(gpu, count) -> None:
    """Nested scales, the mean in its one order of summation: 70,000 scales are three levels."""
    torch.manual_seed(count)
    absmax = torch.rand(count) * torch.logspace(-3, 3, count)
    limits = formats.nested_thresholds()
    got = gpu.ops.quantize_absmax(*gpu(absmax, limits), None)
    for g, want in zip(got, reference.quantize_absmax(absmax), strict=True):
        assert same_bits(g.cpu(), want)


def test_quantize_absmax_by_a_code_of_ones_own(gpu) -> None:
    values = torch.linspace(0.02, 1, 256) ** 3
    code = formats.ScaleCode("cubes", values.tolist(), centered=False)
    limits = torch.from_numpy(code.tables[1])
    absmax, zero = torch.rand(700), torch.zeros(())
    got = gpu.ops.quantize_absmax(*gpu(absmax, limits, zero))
    for g, want in zip(got, reference.quantize_absmax(absmax, zero, limits), strict=True):
        assert torch.equal(g.cpu(), want)


def test_quantize_absmax_of_hard_scales(gpu) -> None:
    limits = formats.nested_thresholds()
    for values in (
        torch.zeros(300), torch.full((300,), 1e-39), torch.tensor([1.0, float("nan"), 2.0]),
        torch.tensor([1.0, float("inf"), 2.0]), torch.full((512,), 0.25),
    ):  # fmt: skip
        for offset in (None, torch.tensor(0.125)):
            got = gpu.ops.quantize_absmax(*gpu(values, limits, offset))
            for g, want in zip(got, reference.quantize_absmax(values, offset), strict=True):
                assert same_bits(g.cpu(), want)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["fp32", "nested"])
@pytest.mark.parametrize("blocksize", [16, 64, pytest.param(4096), pytest.param(256)])
def test_dequantize(gpu, dtype, nested, blocksize) -> None:
    codebook = get_format("nf4").tensors()[0]
    for count in (2 * CTA + 3 * blocksize + 5, 1, 33, 1024):
        w = hard_values(count, torch.float32, blocksize)
        packed, absmax = quantized(w, "nf4", blocksize)
        scales, more = absmax, (None, None, None)
        if nested:
            q, nested_absmax, mean = reference.quantize_absmax(absmax)
            more = (nested_absmax, formats.nested_code(), mean)
            scales = reference.dequantize_absmax(q, nested_absmax, mean)
            absmax = q
        out = gpu.ops.dequantize_4bit(
            *gpu(packed, absmax, codebook), blocksize, *gpu(*more), [count], dtype
        )
        want = reference.dequantize(packed, scales, codebook, blocksize, (count,), dtype)
        assert same_bits(out.cpu(), want), count


@pytest.mark.parametrize("scale", ["e8m0", "e4m3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("blocksize", [16, 32, 2048])
def test_scales_of_one_byte(gpu, scale, dtype, blocksize) -> None:
    """E8M0 (MXFP4's) and E4M3 with a tensor's scale (NVFP4's), there and back."""
    codebook, thresholds, codes = get_format("fp4_e2m1").tensors()
    for count in (CTA + 3 * blocksize + 5, blocksize):
        w = hard_values(count, dtype, blocksize)
        tensor_scale = None
        if scale == "e4m3":
            largest = w[w.isfinite()].abs().max().float()
            tensor_scale = (largest / 448).clamp(min=formats.MIN_ABSMAX)
        args = (w, thresholds, codes, blocksize, tensor_scale)
        packed, stored = gpu.ops.quantize_4bit_scaled(
            *gpu(w, thresholds, codes), blocksize, gpu(tensor_scale)
        )
        want_packed, want_stored = ops._plain_quantize_scaled(*args)
        assert same_bits(stored.cpu(), want_stored)
        assert same_bits(packed.cpu(), want_packed)

        weight = (packed, stored, gpu(codebook), blocksize, None, None, gpu(tensor_scale))
        out = gpu.ops.dequantize_4bit(*weight, [count], dtype)
        scales = reference.byte_scales(want_stored, tensor_scale)
        want = reference.dequantize(want_packed, scales, codebook, blocksize, (count,), dtype)
        assert same_bits(out.cpu(), want)


@pytest.mark.parametrize("scale", [torch.float8_e8m0fnu, torch.float8_e4m3fn], ids=str)
def test_every_byte_means_what_torch_says(gpu, scale) -> None:
    codebook = get_format("nf4").tensors()[0]
    packed = torch.full((256 * 8,), 0xFF, dtype=torch.uint8)  # code 15, the value 1, blocks of 16
    stored = torch.arange(256, dtype=torch.uint8).view(torch.int8)
    one = torch.ones(1) if scale == torch.float8_e4m3fn else None
    weight = (*gpu(packed, stored, codebook), 16, None, None, gpu(one))
    out = gpu.ops.dequantize_4bit(*weight, [4096], torch.float32)
    assert same_bits(out.cpu()[::16].contiguous(), stored.view(scale).float())


def test_results_do_not_depend_on_the_order_of_warps_and_blocks(make_gpu) -> None:
    w = hard_values(3 * CTA + 100, torch.float32, 4096)
    tables = get_format("nf4").tensors()[1:]
    for seed in range(4):
        gpu = make_gpu(seed=seed)
        packed, absmax = gpu.ops.quantize_4bit(*gpu(w, *tables), 4096)
        assert same_bits(packed.cpu(), quantized(w, "nf4", 4096)[0])
        assert same_bits(absmax.cpu(), quantized(w, "nf4", 4096)[1])


@pytest.mark.parametrize("device", ["a100", "rtx4090", "b200"])  # the T4: test_turing.py
def test_every_device_has_the_simple_kernels(make_gpu, device) -> None:
    gpu = make_gpu(device)
    w = torch.randn(5000)
    packed, _ = gpu.ops.quantize_4bit(*gpu(w, *get_format("nf4").tensors()[1:]), 64)
    assert same_bits(packed.cpu(), quantized(w, "nf4", 64)[0])
