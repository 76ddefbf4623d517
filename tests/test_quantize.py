"""quantize and dequantize: every device, the reference and bitsandbytes, bit for bit.

Values are made on the CPU and moved, and results moved back: the reference runs there.
"""

from __future__ import annotations

import math

import pytest
import torch

from qlora_kernels import cpu, formats, ops, reference
from qlora_kernels import functional as F4

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit, wherever they are; NaN equals NaN whatever its payload."""
    a, b = a.cpu(), b.cpu()
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    ints = {4: torch.int32, 2: torch.int16}[a.element_size()]
    equal = a.contiguous().view(ints) == b.contiguous().view(ints)
    return bool((equal | (a.isnan() & b.isnan())).all())


def hard_values(n: int) -> torch.Tensor:
    """Normal values with zeros, denormals, infinities, NaN and huge and tiny blocks among them."""
    w = torch.randn(n)
    for i, v in enumerate(
        [0.0, -0.0, 1e-39, -1e-45, 3.4e38, -3.4e38, 1e-38, math.inf, -math.inf, math.nan]
    ):
        w[(i * 97) % n] = v
    if n > 700:
        w[256:320] = 0.0  # an all-zero block
        w[320:384] *= 1e-40  # a block of denormals
        w[512] = math.nan
        w[576] = math.inf
    return w


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", ["nf4", "fp4", "fp4_e2m1", "int4"])
def test_kernels_equal_the_reference(kernels, fmt, dtype):
    for blocksize in formats.BLOCKSIZES:
        for n in (1, 2, 15, 16, 17, 33, 64, 1000, 5 * 4096 + 33):
            w = hard_values(n).to(dtype)
            packed, state = F4.quantize_4bit(w.to(kernels), blocksize=blocksize, quant_type=fmt)
            bytes_, absmax = reference.quantize(w, fmt, blocksize)
            assert same(packed.view(-1), bytes_), (blocksize, n)
            assert same(state.absmax, absmax), (blocksize, n)
            code = state.code.cpu()
            for out in DTYPES:
                got = F4.dequantize_4bit(packed, state, dtype=out)
                want = reference.dequantize(bytes_, absmax, code, blocksize, w.shape, out)
                assert got.device.type == kernels.type and same(got, want), (blocksize, n, out)


def test_double_quantization_equals_the_reference(kernels):
    for n in (1, 64, 64 * 255, 64 * 256, 64 * 257, 64 * 256 * 3 + 17):
        w = torch.randn(n) * torch.rand(1)
        packed, state = F4.quantize_4bit(w.to(kernels), quant_type="nf4", compress_statistics=True)
        codes, nested, offset = reference.quantize_absmax(reference.quantize(w)[1])
        assert same(state.absmax, codes) and same(state.state2.absmax, nested)
        assert same(state.offset, offset)
        scales = reference.dequantize_absmax(codes, nested, offset)
        assert same(state.scales(), scales)
        for dtype in DTYPES:
            got = F4.dequantize_4bit(packed, state, dtype=dtype)
            bytes_, code = packed.view(-1).cpu(), state.code.cpu()
            want = reference.dequantize(bytes_, scales, code, 64, w.shape, dtype)
            assert same(got, want), (n, dtype)


def test_double_quantization_of_hard_scales(kernels):
    limits = formats.nested_thresholds(kernels)
    for scales in (
        torch.zeros(300),  # a group of zeros has no reciprocal
        torch.full((256,), 1e-40),
        torch.cat([torch.rand(256), torch.tensor([math.nan, 1.0])]),
        torch.cat([torch.rand(256), torch.tensor([math.inf, 1.0])]),
    ):
        got = torch.ops.qlora_kernels.quantize_absmax(scales.to(kernels), limits, None)
        want = reference.quantize_absmax(scales)
        for a, b in zip(got, want, strict=True):
            assert same(a, b)


def test_mean_in_order_is_the_mean():
    for n in (1, 255, 256, 257, 70_000):
        values = torch.rand(n) + 0.5
        exact = math.fsum(values.tolist()) / n
        bound = 8 * 3 * 2.0**-53 * exact + 2.0**-24 * exact
        assert abs(reference.mean_in_order(values).item() - exact) <= bound


def test_every_code_times_every_kind_of_scale(kernels):
    # All 256 bytes, scales from denormal to infinite, all results.
    packed = torch.arange(256, dtype=torch.uint8).repeat(9)
    scales = torch.tensor([0.0, 1e-45, 1e-39, 1e-30, 0.1, 1.0, 3e38, math.inf, math.nan])
    absmax = scales.repeat_interleave(2)  # 512 values a scale, blocks of 256
    for name in ("nf4", "fp4"):
        code = formats.get_format(name).tensors()[0]
        there = absmax.to(kernels), torch.Size([4608]), code.to(kernels)
        state = F4.QuantState(*there, 256, name, torch.float32)
        for dtype in DTYPES:
            got = F4.dequantize_4bit(packed.to(kernels), state, dtype=dtype)
            want = reference.dequantize(packed, absmax, code, 256, (4608,), dtype)
            assert same(got, want)


def test_out_and_views(kernels):
    w = torch.randn(96, 80, device=kernels)
    packed, state = F4.quantize_4bit(w.t(), quant_type="nf4")  # read row-major as it is seen
    again, _ = F4.quantize_4bit(w.t().contiguous(), quant_type="nf4")
    assert same(packed, again)
    for dtype in DTYPES:
        out = torch.empty(80, 96, dtype=dtype, device=kernels)
        assert F4.dequantize_4bit(packed, state, out=out) is out
        assert same(out, F4.dequantize_4bit(packed, state, dtype=dtype))
    big, big_state = F4.quantize_4bit(torch.randn(3000, 3001, device=kernels), quant_type="nf4")
    out = torch.empty(3000, 3001, device=kernels)  # larger than the threshold of streaming stores
    assert same(F4.dequantize_4bit(big, big_state, out=out), F4.dequantize_4bit(big, big_state))


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
def test_storage_dtypes_hold_the_same_bytes(device, storage):
    w = torch.randn(64, 64, device=device)
    packed, state = F4.quantize_4bit(w, quant_type="nf4", quant_storage=storage)
    plain, _ = F4.quantize_4bit(w, quant_type="nf4")
    assert packed.dtype == storage and same(packed.view(torch.uint8).view(-1, 1), plain)
    assert same(F4.dequantize_4bit(packed, state), F4.dequantize_4bit(plain, state))


def test_threads_do_not_change_a_bit():
    w = torch.randn(1 << 20)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        packed, state = F4.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
        results.append((packed, state.absmax, state.state2.absmax, state.offset))
    assert all(same(a, b) for a, b in zip(*results, strict=True))


# --- the peer -----------------------------------------------------------------------------------


# On the CPU, where the peer is bit for bit the same; that ours are the same on every device is
# what the tests above say.
def compare_with_peer(w: torch.Tensor, quant_type: str, blocksize: int, nested: bool) -> None:
    from bitsandbytes import functional as peer

    packed, state = F4.quantize_4bit(
        w, blocksize=blocksize, quant_type=quant_type, compress_statistics=nested
    )
    theirs, their_state = peer.quantize_4bit(
        w, blocksize=blocksize, quant_type=quant_type, compress_statistics=nested
    )
    assert same(packed, theirs)
    if nested:
        # The one exception: the peer's offset is a mean whose order depends on its threads. It is
        # bounded, and given the same offset everything else is identical.
        scales = reference.quantize(w, quant_type, blocksize)[1] if w.numel() < 1e5 else None
        blocks = state.absmax.numel()
        bound = 2.0**-24 * max(8, math.ceil(math.log2(blocks + 1)) + 4) * abs(state.offset)
        assert abs(state.offset - their_state.offset) <= bound
        if scales is None:
            _, plain = F4.quantize_4bit(w, blocksize=blocksize, quant_type=quant_type)
            scales = plain.absmax
        codes, nested_absmax, _ = torch.ops.qlora_kernels.quantize_absmax(
            scales, formats.nested_thresholds(), their_state.offset
        )
        assert same(codes, their_state.absmax)
        assert same(nested_absmax, their_state.state2.absmax)
        state.absmax, state.state2.absmax = codes, nested_absmax
        state.offset = their_state.offset
    else:
        assert same(state.absmax, their_state.absmax)
    for dtype in DTYPES:
        their_state.dtype = dtype
        got = F4.dequantize_4bit(packed, state, dtype=dtype)
        want = peer.dequantize_4bit(theirs, their_state).reshape(w.shape)
        # The sign of zero: the peer's portable path gives -0 for FP4's second zero, its AVX-512
        # path and its own table give +0, as ours does.
        assert same(got + 0.0, want + 0.0)


CASES = [
    (quant_type, blocksize, nested)
    for quant_type in ("nf4", "fp4")
    for blocksize in (32, 64, 128, 256, 512, 1024, 2048, 4096)
    for nested in (False, True)
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_peer_small_and_hard(dtype):
    pytest.importorskip("bitsandbytes")
    for quant_type, blocksize, nested in CASES:
        for n in (2, 64, 1000, 64 * 256 + 34, 64 * 700):
            compare_with_peer(torch.randn(n).to(dtype), quant_type, blocksize, nested)
        hard = hard_values(5 * 4096 + 2).to(dtype)
        if not nested:
            compare_with_peer(hard, quant_type, blocksize, nested)


def run_peer_volume(total: int) -> int:
    """Compare at least ``total`` values in all, spread over dtypes, formats and block sizes."""
    pytest.importorskip("bitsandbytes")
    done, chunk = 0, 1 << 21
    cases = [(c, d) for c in CASES for d in DTYPES]
    while done < total:
        for (quant_type, blocksize, nested), dtype in cases:
            scale = 10 ** (torch.rand(1).item() * 6 - 4)
            w = (torch.randn(chunk) * scale).to(dtype)
            compare_with_peer(w, quant_type, blocksize, nested)
            done += chunk
            if done >= total:
                break
    return done


def test_peer_at_volume():
    torch.manual_seed(1)
    assert run_peer_volume(100_000_000) >= 100_000_000


@pytest.mark.full
def test_peer_at_ten_times_the_volume():
    torch.manual_seed(2)
    assert run_peer_volume(1_000_000_000) >= 1_000_000_000


# --- bad input ----------------------------------------------------------------------------------


def test_bad_input(device):
    w = torch.randn(64, 64, device=device)
    packed, state = F4.quantize_4bit(w, quant_type="nf4")
    with pytest.raises(ValueError, match="empty"):
        F4.quantize_4bit(torch.empty(0, device=device), quant_type="nf4")
    with pytest.raises(TypeError, match="float64"):
        F4.quantize_4bit(w.double(), quant_type="nf4")
    with pytest.raises(TypeError, match="int32"):
        F4.quantize_4bit(w.int(), quant_type="nf4")
    with pytest.raises(ValueError, match="blocksize must be one of .* got 8"):
        F4.quantize_4bit(w, blocksize=8, quant_type="nf4")
    with pytest.raises(formats.FormatError, match="nf3"):
        F4.quantize_4bit(w, quant_type="nf3")
    with pytest.raises(ValueError, match="multiple of 4"):
        F4.quantize_4bit(w[0, :34], quant_type="nf4", quant_storage=torch.float32)
    for wrong in (packed[:-1], torch.cat([packed, packed[:1]])):
        with pytest.raises(ValueError, match="bytes"):
            F4.dequantize_4bit(wrong, state)
    with pytest.raises(TypeError, match="float64"):
        F4.dequantize_4bit(packed, state, dtype=torch.float64)
    with pytest.raises(ValueError, match="contiguous with shape"):
        F4.dequantize_4bit(packed, state, out=torch.empty(64, 65, device=device))
    with pytest.raises(ValueError, match="not contiguous"):
        F4.dequantize_4bit(packed, state, out=torch.empty(64, 128, device=device)[:, ::2])
    short = F4.QuantState(state.absmax[:-1], state.shape, state.code, 64, "nf4", torch.float32)
    with pytest.raises(ValueError, match="63 scales"):
        F4.dequantize_4bit(packed, short)


def test_bad_quant_states(device):
    w = torch.randn(64, 64, device=device)
    _, state = F4.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
    good = state.as_dict(packed=True)
    key = "quant_state.bitsandbytes__nf4"
    assert F4.QuantState.from_dict(good).shape == torch.Size([64, 64])

    def broken(**changes):
        d = state.as_dict()
        d.update(changes)
        return {k: v for k, v in d.items() if v is not None}

    for changes, message in (
        ({"shape": (64, 65)}, "65 scales"),
        ({"shape": (-64, 64)}, "positive"),
        ({"blocksize": 63}, "blocksize"),
        ({"dtype": "float64"}, "float64"),
        ({"absmax": None}, "lacks absmax"),
        ({"nested_offset": None}, "nested_offset is missing"),
        ({"nested_blocksize": 128}, "nested_blocksize"),
        ({"nested_absmax": torch.zeros(3, device=device)}, "nested_absmax must be"),
        ({"quant_map": torch.zeros(15, device=device)}, "codebook must be"),
        ({"quant_type": "nope", "quant_map": None}, "nope"),
    ):
        with pytest.raises(ValueError, match=message):
            F4.QuantState.from_dict(broken(**changes))
    with pytest.raises(ValueError, match="JSON"):
        F4.QuantState.from_dict({**good, key: torch.zeros(5, dtype=torch.uint8)})
    with pytest.raises(ValueError, match="object"):
        text = torch.tensor(list(b"[1, 2]"), dtype=torch.uint8)
        F4.QuantState.from_dict({**good, key: text})


def test_the_native_library_is_there():
    assert ops.LIBRARY_ERROR is None, "the tests below would only test plain torch"
    assert cpu.isa() in cpu.available_isas()
    with pytest.raises(ValueError, match="avx9000"):
        cpu.choose_isa("avx9000")
