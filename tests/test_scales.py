"""Formats whose blocks have scales of one byte: E8M0 and E4M3 times the tensor's."""

from __future__ import annotations

import copy

import pytest
import torch

from qlora_kernels import functional as F4
from qlora_kernels import reference
from qlora_kernels.formats import (
    FORMATS,
    FP4_E2M1,
    NF4,
    SCALES,
    Format,
    FormatError,
    ScaleCode,
    get_format,
    scale_dtype,
)
from qlora_kernels.nn import CheckpointError, Linear4bit, LoraLinear4bit

KINDS = [kind for kind in SCALES if kind != "fp32"]


@pytest.fixture(params=KINDS)
def fmt(request) -> Format:
    return Format(f"e2m1-{request.param}", FP4_E2M1.codebook, scale=request.param)


@pytest.fixture(autouse=True)
def _forget_formats():
    known = dict(FORMATS)
    yield
    FORMATS.clear()
    FORMATS.update(known)


def test_values_and_scales_are_the_references(fmt) -> None:
    w = torch.randn(37, 96) * torch.logspace(-1, 1, 37)[:, None]
    packed, state = F4.quantize_4bit(w, quant_type=fmt, blocksize=32)
    one = reference.tensor_scale(w) if fmt.scale == "e4m3" else None
    normalized, stored = reference.normalize_scaled(w, 32, one)
    _, thresholds, codes = fmt.tensors()
    assert torch.equal(state.absmax, stored)
    assert torch.equal(
        packed.view(-1), reference.pack(codes[torch.bucketize(normalized, thresholds)])
    )
    scales = reference.byte_scales(stored, one)
    assert torch.equal(state.scales(), scales)
    back = F4.dequantize_4bit(packed, state)
    assert torch.equal(back, reference.dequantize(packed, scales, state.code, 32, (37, 96)))
    # Half a step of E2M1 is a sixth of the scale. E8M0's is at most twice the absmax; E4M3's is
    # within 1/16 of it, and values beyond are clamped.
    blocks = w.reshape(-1, 32).abs().amax(1)
    error = (back - w).reshape(-1, 32).abs().amax(1)
    assert (error <= blocks * (2 / 6 if fmt.scale == "e8m0" else 1 / 6 + 1 / 8)).all()


def test_the_largest_block_takes_e4m3s_largest_scale() -> None:
    w = torch.randn(8, 64)
    w[3, 5], w[2, 7] = -9, float("inf")
    assert reference.tensor_scale(w).item() == pytest.approx(9 / 448)
    assert reference.tensor_scale(torch.zeros(4)).item() > 0


def test_bits_a_weight(fmt) -> None:
    assert fmt.bits_per_weight(32, nested=False) == 4.25
    layer = Linear4bit(64, 32, quant_type=fmt, blocksize=16, compress_statistics=False)
    assert layer.bits_per_weight == 4.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("m", [1, 3, 40, 80])
def test_a_layer_multiplies_by_the_dequantized_weight(fmt, dtype, m) -> None:
    dense = torch.nn.Linear(128, 48).to(dtype)
    layer = LoraLinear4bit.from_linear(
        dense, quant_type=fmt, blocksize=32, compress_statistics=False, r=4
    )
    assert layer.absmax.dtype == torch.int8 == scale_dtype(fmt.scale, False)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(m, 128, dtype=dtype, requires_grad=True)
    y = layer(x)
    w = layer.dequantize_weight(torch.float32)
    whole = w + layer.scaling * layer.lora_B.float() @ layer.lora_A.float()
    want = torch.nn.functional.linear(x.float(), whole, layer.bias.float())
    tolerance = (
        {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.1}
    )
    torch.testing.assert_close(y.float(), want, **tolerance)
    dy = torch.randn_like(y)
    y.backward(dy)
    torch.testing.assert_close(x.grad.float(), dy.float() @ whole, **tolerance)


def test_state_dicts_copies_and_states_keep_the_kind(fmt) -> None:
    layer = Linear4bit(64, 32, quant_type=fmt, blocksize=32, compress_statistics=False).to("cpu")
    state = layer.state_dict()
    key = f"weight.quant_state.qlora_kernels__{fmt.name}"
    assert key in state and state["weight.absmax"].dtype == torch.int8
    FORMATS.pop(fmt.name, None)  # as in a process that has not made it
    other = Linear4bit(64, 32)
    other.load_state_dict(state)
    assert other.format.scale == fmt.scale
    for twin in (other, copy.deepcopy(layer)):
        assert torch.equal(twin.dequantize_weight(), layer.dequantize_weight())
    again = F4.QuantState.from_dict(layer.quant_state.as_dict(packed=True))
    assert torch.equal(again.scales(), layer.quant_state.scales())
    again = F4.QuantState.from_dict(layer.quant_state.as_dict())
    assert torch.equal(again.scales(), layer.quant_state.scales())
    moved = copy.deepcopy(layer).to(torch.bfloat16)
    assert moved.absmax.dtype == torch.int8
    assert torch.equal(moved.quant_state.scales(), layer.quant_state.scales())


def test_bad_input(fmt) -> None:
    with pytest.raises(FormatError, match="compress_statistics must be False"):
        F4.quantize_4bit(torch.randn(64), quant_type=fmt, compress_statistics=True)
    with pytest.raises(FormatError, match="compress_statistics must be False"):
        Linear4bit(64, 32, quant_type=fmt, compress_statistics=True)
    with pytest.raises(FormatError, match="must be one of fp32, e8m0, e4m3, got 'e5m2'"):
        Format("x", FP4_E2M1.codebook, scale="e5m2")
    F4.quantize_4bit(torch.randn(64), quant_type=fmt)  # registers it
    with pytest.raises(FormatError, match="already registered"):
        F4.quantize_4bit(torch.randn(64), quant_type=Format(fmt.name, fmt.codebook))
    assert get_format(fmt.name) is fmt


def test_a_checkpoint_of_another_kind_of_scale_is_named(fmt) -> None:
    layer = Linear4bit(64, 32, quant_type=fmt, blocksize=32, compress_statistics=False).to("cpu")
    state = layer.state_dict()
    FORMATS[fmt.name] = Format(fmt.name, fmt.codebook)
    with pytest.raises((CheckpointError, RuntimeError), match=f"has {fmt.scale} scales"):
        Linear4bit(64, 32).load_state_dict(state)


# --- scale codes: what the bytes of double-quantized scales mean ----------------------------------


def _ue5m3() -> list[float]:
    """An unsigned 8-bit float of 5 bits of exponent and 3 of mantissa, its largest scaled to 1."""
    values = [
        (m / 8) * 2.0**-14 if e == 0 else (1 + m / 8) * 2.0 ** (e - 15)
        for e in range(32)
        for m in range(8)
    ]
    return [v / values[-1] for v in values]


UE5M3 = ScaleCode("ue5m3", _ue5m3(), centered=False)


@pytest.fixture
def own_code() -> Format:
    return Format("nf4-ue5m3", NF4.codebook, scale_code=UE5M3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_scale_code_of_ones_own_is_the_references(kernels, own_code, dtype) -> None:
    w = (torch.randn(37, 1312) * torch.logspace(-2, 1, 37)[:, None]).to(dtype)
    packed, state = F4.quantize_4bit(
        w.to(kernels), quant_type=own_code, blocksize=32, compress_statistics=True
    )
    zero = torch.zeros(())
    values, thresholds = own_code.scale_tensors()
    plain, absmax = reference.quantize(w, own_code, 32)
    codes, nested, offset = reference.quantize_absmax(absmax, zero, thresholds)
    for got, want in (
        (state.absmax, codes),
        (state.state2.absmax, nested),
        (packed.view(-1), plain),
    ):
        assert torch.equal(got.cpu(), want)
    assert offset == state.offset.cpu() == 0
    scales = reference.dequantize_absmax(codes, nested, zero, values)
    back = F4.dequantize_4bit(packed, state)
    want = reference.dequantize(plain, scales, values_of(own_code), 32, (37, 1312), dtype)
    assert torch.equal(back.cpu(), want)
    # Three bits of mantissa: scales of a normal exponent are within half a step, 1/16, or 1/17 of
    # what they were.
    assert ((scales - absmax).abs() <= absmax / 16).all()


def values_of(fmt: Format) -> torch.Tensor:
    return fmt.tensors()[0]


def test_a_layer_with_a_scale_code_of_ones_own(kernels, own_code) -> None:
    dense = torch.nn.Linear(512, 64).to(kernels)
    layer = LoraLinear4bit.from_linear(dense, quant_type=own_code, r=4)
    w = layer.dequantize_weight(torch.float32)
    assert (w - dense.weight).abs().max() < 0.3 * dense.weight.abs().max()
    x = torch.randn(5, 512, device=kernels)
    torch.testing.assert_close(
        layer(x), torch.nn.functional.linear(x, w, dense.bias), rtol=1e-2, atol=1e-3
    )


def test_checkpoints_keep_the_scale_code(own_code) -> None:
    layer = Linear4bit(64, 32, quant_type=own_code).to("cpu")
    state = layer.state_dict()
    assert "weight.quant_state.qlora_kernels__nf4-ue5m3" in state
    FORMATS.pop("nf4-ue5m3", None)  # as in a process that has not made it
    other = Linear4bit(64, 32)
    other.load_state_dict(state)
    assert other.format.scale_code.same(UE5M3) and not other.format.scale_code.centered
    for twin in (other, copy.deepcopy(layer)):
        assert torch.equal(twin.dequantize_weight(), layer.dequantize_weight())
    w = torch.randn(32, 64)
    for module in (layer, other):  # what is quantized later gets it too
        module.load_state_dict({"weight": w}, strict=False)
    assert torch.equal(layer.absmax, other.absmax) and other.nested_offset == 0
    FORMATS["nf4-ue5m3"] = Format("nf4-ue5m3", NF4.codebook)
    with pytest.raises((CheckpointError, RuntimeError), match="the code 'ue5m3'"):
        Linear4bit(64, 32).load_state_dict(state)


def test_bad_scale_codes() -> None:
    with pytest.raises(FormatError, match="needs 256 values, got 3"):
        ScaleCode("short", [0, 0.5, 1])
    with pytest.raises(FormatError, match="must ascend"):
        ScaleCode("down", list(reversed(_ue5m3())))
    with pytest.raises(FormatError, match="must ascend"):
        ScaleCode("flat", [1.0] * 256)
    with pytest.raises(FormatError, match="finite in fp32; value 255 is inf"):
        ScaleCode("far", [*_ue5m3()[:-1], float("inf")])
    with pytest.raises(FormatError, match="scale_code must be None"):
        Format("x", NF4.codebook, scale="e8m0", scale_code=UE5M3)
    F4.quantize_4bit(torch.randn(64), quant_type=Format("twice", NF4.codebook, scale_code=UE5M3))
    with pytest.raises(FormatError, match="already registered"):
        F4.quantize_4bit(torch.randn(64), quant_type=Format("twice", NF4.codebook))
