"""``import qlora_kernels as bnb``: bitsandbytes' 4-bit names, signatures and semantics.

Where bitsandbytes is installed both are asked, side by side: signatures, bytes, states, keys.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import importlib
import inspect
import io
import logging
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.parametrize as P
from torch import nn
from torch.utils.checkpoint import checkpoint

import qlora_kernels as bnb
from qlora_kernels import functional as F4
from qlora_kernels.nn import parametrize

TYPES = ["nf4", "fp4"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STORAGES = [torch.uint8, torch.bfloat16, torch.float32]


@pytest.fixture
def peer() -> Any:
    return pytest.importorskip("bitsandbytes")


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    # Bytes under a float dtype may read NaN.
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a, b) or (a.dim() > 0 and torch.equal(a.view(bits), b.view(bits)))


# --- names and signatures -------------------------------------------------------------------------

NAMES = """
nn.Linear4bit nn.LinearNF4 nn.LinearFP4 nn.Linear8bitLt
nn.Params4bit nn.Params4bit.from_prequantized
nn.Int8Params nn.Embedding4bit nn.EmbeddingNF4 nn.EmbeddingFP4 nn.Embedding8bit
nn.parametrize.replace_parameter_4bit nn.parametrize.replace_parameter_4bit_prequantized
nn.parametrize.Bnb4bitParametrization nn.modules.Linear4bit nn.modules.Params4bit
functional.QuantState functional.QuantState.as_dict functional.QuantState.to
functional.quantize_4bit functional.quantize_nf4 functional.quantize_fp4
functional.dequantize_4bit functional.dequantize_nf4 functional.dequantize_fp4
functional.quantize_blockwise functional.dequantize_blockwise functional.gemv_4bit
functional.create_dynamic_map functional.create_normal_map functional.create_fp8_map
functional.create_linear_map functional.get_4bit_type functional.has_avx512bf16
matmul_4bit matmul MatmulLtState
optim.Adam optim.Adam8bit optim.Adam32bit optim.AdamW optim.AdamW8bit optim.AdamW32bit
optim.PagedAdam optim.PagedAdam8bit optim.PagedAdam32bit
optim.PagedAdamW optim.PagedAdamW8bit optim.PagedAdamW32bit
optim.GlobalOptimManager.override_config optim.GlobalOptimManager.register_parameters
optim.GlobalOptimManager.register_module_override
""".split()


def found(package: Any, path: str) -> Any:
    for part in path.split("."):
        if inspect.ismodule(package) and not hasattr(package, part):
            importlib.import_module(f"{package.__name__}.{part}")  # theirs has to be asked for
        package = getattr(package, part)
    return package


@pytest.mark.parametrize("path", NAMES)
def test_signatures_are_theirs(path: str, peer: Any) -> None:
    """Every parameter of theirs, in order, by name, kind and default; what is ours comes after them
    and by keyword."""
    if path == "MatmulLtState":
        assert isinstance(found(bnb, path), type)
        return
    theirs = list(inspect.signature(found(peer, path)).parameters.values())
    ours = list(inspect.signature(found(bnb, path)).parameters.values())
    more = [p for p in ours if p.name not in {t.name for t in theirs}]
    assert all(p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in more) or (
        "Paged" in path and [p.name for p in more][:1] == ["is_paged"]
    )
    kept = [p for p in ours if p.name in {t.name for t in theirs}]
    assert [(p.name, p.kind, p.default) for p in kept] == [
        (t.name, t.kind, t.default) for t in theirs
    ]


def test_unknown_names_are_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Linear5bit'"):
        bnb.Linear5bit  # noqa: B018


# --- maps, and codes of 8 bits --------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("signed", [True, False])
def test_maps_are_theirs(bits: int, signed: bool, peer: Any) -> None:
    theirs, half = peer.functional, (bits + 1) // 2
    assert same(F4.create_linear_map(signed, bits), theirs.create_linear_map(signed, bits))
    args = (signed, half, bits - half - signed, bits)
    assert same(F4.create_fp8_map(*args), theirs.create_fp8_map(*args))
    if signed:
        args = (True, bits, bits)
        assert same(F4.create_dynamic_map(*args), theirs.create_dynamic_map(*args))
    assert same(F4.create_dynamic_map(signed), theirs.create_dynamic_map(signed))


def test_types_of_16_values(peer: Any) -> None:
    for name in ("nf4", "fp4", "af4"):
        assert same(F4.get_4bit_type(name, "cpu"), peer.functional.get_4bit_type(name, "cpu"))
    assert F4.get_4bit_type("int4", "cpu").tolist() == pytest.approx(
        [v / 7 for v in (7, 6, 5, 4, 3, 2, 1, 0, 0, -1, -2, -3, -4, -5, -6, -7)]
    )
    normal = F4.create_normal_map()
    assert torch.allclose(normal[normal != 0].sort()[0], F4.get_4bit_type("nf4", "cpu")[
        torch.arange(16) != 7], rtol=0, atol=1e-6)  # fmt: skip
    with pytest.raises(NotImplementedError, match="blocksize of 64"):
        F4.get_4bit_type("af4", "cpu", 128)
    with pytest.raises(NotImplementedError, match="got 'nf5'"):
        F4.get_4bit_type("nf5", "cpu")
    with pytest.raises(ValueError, match="do not add up to total_bits=8"):
        F4.create_fp8_map(True, 5, 5)
    with pytest.raises(ValueError, match="not the 256"):
        F4.create_dynamic_map(False, 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("blocksize", [64, 256, 4096, 16384])
def test_blockwise_codes_and_values_are_theirs(
    dtype: torch.dtype, nested: bool, blocksize: int, peer: Any
) -> None:
    w = torch.randn(37, 613).to(dtype)
    w.view(-1)[:blocksize] = 0
    for code in (None, F4.create_fp8_map(True, 4, 3), F4.create_linear_map()):
        want, theirs = peer.functional.quantize_blockwise(w, code, None, None, blocksize, nested)
        got, state = F4.quantize_blockwise(w, code, None, None, blocksize, nested)
        assert same(got, want)
        assert same(state.absmax, theirs.absmax)
        assert (state.shape, state.dtype, state.nested) == (None, dtype, nested)
        back = F4.dequantize_blockwise(got, state)
        assert same(back, peer.functional.dequantize_blockwise(want, theirs))
        again = F4.QuantState.from_dict(state.as_dict(packed=True), device="cpu")
        assert same(F4.dequantize_blockwise(got, again), back)
        out = torch.empty_like(back)
        assert F4.dequantize_blockwise(got, state, out=out) is out and same(out, back)
    got, state = F4.quantize_blockwise(w, out=(codes := torch.empty_like(w, dtype=torch.uint8)))
    assert got is codes
    assert (
        same(
            F4.dequantize_blockwise(got, absmax=state.absmax),
            F4.dequantize_blockwise(got, state).float(),
        )
        or dtype != torch.float32
    )


def test_blockwise_bad_input() -> None:
    w = torch.ones(4)
    for call, words in (
        (lambda: F4.quantize_blockwise(w, blocksize=0), "blocksize must be positive, got 0"),
        (lambda: F4.quantize_blockwise(w.double()), "got torch.float64"),
        (lambda: F4.quantize_blockwise(w, torch.ones(16)), "256 x float32, got 16"),
        (lambda: F4.dequantize_blockwise(w.byte()), "needs quant_state or absmax"),
        (lambda: F4.dequantize_blockwise(w, absmax=w), "uint8, got torch.float32"),
        (lambda: F4.dequantize_4bit(w.byte()), "needs quant_state, or both absmax and out"),
        (lambda: F4.gemv_4bit(w, w), "needs the state"),
        (lambda: bnb.matmul_4bit(w, w, None), "needs the quant_state"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


# --- 4-bit functions and their state --------------------------------------------------------------


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_a_state_is_theirs(kind: str, nested: bool, storage: torch.dtype, peer: Any) -> None:
    w = torch.randn(64, 96, dtype=torch.bfloat16)
    args = (w, None, None, 64, nested)
    packed, state = getattr(F4, f"quantize_{kind}")(*args, storage)
    want, theirs = getattr(peer.functional, f"quantize_{kind}")(*args, storage)
    assert same(packed, want)
    for is_packed in (False, True):
        a, b = state.as_dict(packed=is_packed), theirs.as_dict(packed=is_packed)
        assert list(a) == list(b)
        for key in a:
            ours, other = a[key], b[key]
            assert same(ours, other) if torch.is_tensor(ours) else ours == other, key
        assert F4.QuantState.from_dict(a, device="cpu") == state
        assert F4.QuantState.from_dict(b, device="cpu") == state
    for index in (0, 1, 2, 3, 5):
        got, other = state[index], theirs[index]
        assert same(got, other) if torch.is_tensor(got) else got == other
    assert state[4] == ([state.offset, state.state2] if nested else None)
    blob = getattr(state, f"bitsandbytes__{kind}")
    assert same(blob, getattr(theirs, f"bitsandbytes__{kind}"))
    assert not hasattr(state, "bitsandbytes__int4")
    dequantize = getattr(F4, f"dequantize_{kind}")
    back = dequantize(packed, state)
    assert same(back, getattr(peer.functional, f"dequantize_{kind}")(want, theirs))
    assert same(dequantize(packed.t(), state), back.t()), "a row of bytes: transposed"
    if not nested:
        out = torch.empty_like(w)
        assert dequantize(packed, absmax=state.absmax, out=out, blocksize=64) is out
        assert same(out, back)


def test_states_compare_and_move() -> None:
    _, state = F4.quantize_4bit(torch.randn(8, 64), compress_statistics=True)
    other = copy.deepcopy(state)
    assert state == other and state != "state"
    meta = state.moved("meta")
    assert meta.absmax.is_meta and meta.state2.code.is_meta and not state.state2.code.is_meta
    assert state.to("cpu") is state
    other.offset = other.offset + 1
    assert state != other
    other = copy.deepcopy(state)
    other.state2 = None
    assert state != other


@pytest.mark.parametrize("kind", TYPES)
def test_matmul_takes_what_theirs_takes(kind: str) -> None:
    w, x = torch.randn(24, 64), torch.randn(2, 3, 64)
    packed, state = F4.quantize_4bit(w, quant_type=kind)
    dense = F4.dequantize_4bit(packed, state)
    y = bnb.matmul_4bit(x, packed, state)
    torch.testing.assert_close(y, x @ dense.T)
    assert same(bnb.matmul_4bit(x, packed.t(), state), y)
    torch.testing.assert_close(F4.gemv_4bit(x, packed.t(), state=state), y)
    out = torch.empty_like(y)
    assert bnb.matmul_4bit(x, packed, state, out) is out and same(out, y)
    assert F4.gemv_4bit(x, packed, out=out, state=state) is out

    packed, state = F4.quantize_4bit(w.T.contiguous(), quant_type=kind)
    dense, bias = F4.dequantize_4bit(packed, state), torch.randn(24)
    with pytest.warns(DeprecationWarning, match="Re-quantize from the weight"):
        torch.testing.assert_close(bnb.matmul_4bit(x, packed, state, bias=bias), x @ dense + bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", TYPES)
def test_gemv_has_their_bits(kind: str, dtype: torch.dtype, peer: Any) -> None:
    w, x = torch.randn(256, 512, dtype=dtype), torch.randn(1, 512, dtype=dtype)
    packed, state = F4.quantize_4bit(w, quant_type=kind)
    want = peer.functional.gemv_4bit(
        x, packed.t(), state=peer.functional.quantize_4bit(w, quant_type=kind)[1]
    )
    assert same(F4.gemv_4bit(x, packed.t(), state=state), want)
    with pytest.raises(ValueError, match="x has 5 features"):
        F4.gemv_4bit(torch.ones(1, 5), packed, state=state)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_rows_are_rows(dtype: torch.dtype) -> None:
    packed, state = F4.quantize_4bit(torch.randn(24, 64, dtype=dtype))
    x = torch.randn(0, 64, dtype=dtype, requires_grad=True)
    bias = torch.randn(24, dtype=dtype, requires_grad=True)
    y = bnb.matmul_4bit(x, packed, state, bias=bias)
    assert y.shape == (0, 24) and y.dtype == dtype
    y.sum().backward()
    assert x.grad.shape == x.shape and same(bias.grad, torch.zeros_like(bias))


# --- Params4bit -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("blocksize", [None, 128])
@pytest.mark.parametrize("nested", [False, True])
def test_a_parameter_is_dense_until_it_is_moved(
    kind: str, blocksize: int | None, nested: bool
) -> None:
    w = torch.randn(30, 40)
    p = bnb.nn.Params4bit(w, quant_type=kind, blocksize=blocksize, compress_statistics=nested)
    assert isinstance(p, nn.Parameter) and not p.requires_grad and p.is_dense
    assert p.to(torch.bfloat16).dtype == torch.bfloat16 and p.to("meta").is_dense
    assert p.quant_state is None and not hasattr(p, "absmax") and not p.bnb_quantized
    keys = set(p.__dict__)
    assert p.to("cpu") is p and p.bnb_quantized, "in place"
    want, state = F4.quantize_4bit(w, None, None, blocksize, nested, kind)
    assert same(p.data, want) and p.quant_state == state
    assert set(p.__dict__) == keys
    assert p.absmax is p.quant_state.absmax and p.code is p.quant_map is p.quant_state.code
    assert hasattr(p, "nested_absmax") == hasattr(p, "nested_dtype") == nested
    for key in state.as_dict(packed=True):  # as FSDP looks them up
        value: Any = p
        for part in key.split("."):
            value = getattr(value, part)
        assert torch.is_tensor(value)
    with pytest.raises(AttributeError, match="no attribute 'nonexistent'"):
        p.nonexistent  # noqa: B018

    twin = copy.copy(p)
    assert twin.quant_state is p.quant_state and twin.data_ptr() == p.data_ptr()
    deep = copy.deepcopy(p)
    assert deep.quant_state == state and deep.absmax is not p.absmax
    assert deep.data_ptr() != p.data_ptr()
    buffer = io.BytesIO()
    torch.save(p, buffer)
    buffer.seek(0)
    for again in (
        twin,
        deep,
        pickle.loads(pickle.dumps(p)),
        torch.load(buffer, weights_only=False),
    ):
        assert type(again) is type(p) and set(again.__dict__) == keys
        assert same(again.data, want) and again.quant_state == state
        assert not again.requires_grad

    assert p.to(torch.float16).dtype == torch.uint8, "bytes are not cast"
    moved = p.to("meta")
    assert moved.absmax.is_meta and not p.absmax.is_meta
    stats = state.as_dict(packed=True)
    again = bnb.nn.Params4bit.from_prequantized(want, stats, device="cpu")
    assert again.quant_state == state and again.bnb_quantized
    assert (again.blocksize, again.quant_type) == (blocksize or 64, kind)


def test_parts_of_a_parameter_know_what_it_knows() -> None:
    p = bnb.nn.Params4bit(torch.randn(8, 4), quant_type="nf4")
    for q in (p, copy.deepcopy(p).to("cpu")):
        for parts in (torch.chunk(q, 2), torch.split(q, 4), q.chunk(2), q.split(4)):
            assert isinstance(parts, tuple)
            for part in parts:
                assert type(part) is bnb.nn.Params4bit
                assert (part.quant_type, part.quant_state) == ("nf4", q.quant_state)
        assert same(torch.cat(torch.chunk(q, 2)), q.data)
        assert type(q + q) is torch.Tensor, "what is computed is a plain tensor"
        assert type(nn.Parameter(q, requires_grad=False)) is bnb.nn.Params4bit


class Holder(nn.Module):
    quant_state = None


def test_its_module_is_told() -> None:
    holder = Holder()
    p = bnb.nn.Params4bit(torch.randn(8, 64), module=holder).to("cpu")
    assert holder.quant_state is p.quant_state
    holder.weight = p
    twin = copy.deepcopy(holder)
    assert twin.weight.module is twin and twin.weight.quant_state == p.quant_state
    twin = pickle.loads(pickle.dumps(p))
    assert twin.module.quant_state == p.quant_state


# --- Linear4bit -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_a_layer_is_theirs(kind: str, nested: bool, storage: torch.dtype, peer: Any) -> None:
    """The same draws, the same dense state dict, the same bytes and packed state dict."""
    args = (96, 64, True, None, nested, kind, storage)
    torch.manual_seed(1)
    theirs = peer.nn.Linear4bit(*args)
    torch.manual_seed(1)
    ours = bnb.nn.Linear4bit(*args)
    for move in (lambda m: m, lambda m: m.to(torch.bfloat16), lambda m: m.to("cpu")):
        a, b = move(ours).state_dict(), move(theirs).state_dict()
        assert list(a) == list(b)
        assert all(same(a[k], b[k]) for k in a), [k for k in a if not same(a[k], b[k])]
        assert (ours.quant_state is None) == (theirs.weight.quant_state is None)
    assert ours.quant_state is ours.weight.quant_state
    assert type(a["weight"]) is torch.Tensor, "loads with weights_only"
    x = torch.randn(3, 96, dtype=torch.bfloat16)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0.02, atol=0.02)
    assert same(ours(x), bnb.matmul_4bit(x, ours.weight, ours.quant_state, bias=ours.bias))
    before = ours.weight.data.clone()
    ours.half().float()
    assert same(ours.weight.data, before), "bytes under a float dtype are not cast"


def test_what_makes_it_packed() -> None:
    torch.manual_seed(0)
    first = bnb.nn.LinearNF4(64, 32)
    want = copy.deepcopy(first).to("cpu").state_dict()

    def moved(how: Any) -> bnb.nn.Linear4bit:
        layer = copy.deepcopy(first)
        assert layer.weight.is_dense and layer.absmax is None
        how(layer)
        return layer

    for how in (
        lambda m: m.cpu(),
        lambda m: m(torch.randn(1, 64)),
        lambda m: m.dequantize_weight(),
        lambda m: m.weight.to("cpu"),  # the parameter by itself
        lambda m: setattr(m, "weight", m.weight.cpu()),
        lambda m: bnb.nn.Linear4bit.from_quantized(m),
    ):
        layer = moved(how)
        got = layer.state_dict()
        assert list(got) == list(want) and all(same(got[k], want[k]) for k in want)
        assert layer.weight.quant_state is layer.quant_state
        assert layer.absmax is layer.weight.absmax
    for how in (copy.deepcopy, lambda m: m.to(torch.bfloat16), lambda m: m.to("meta")):
        layer = moved(how)
        assert layer.weight.is_dense and list(layer.state_dict()) == ["weight", "bias"]


def test_used_first_without_gradients_it_trains_afterwards() -> None:
    layer = bnb.nn.Linear4bit(64, 32)
    with torch.inference_mode():
        y = layer(torch.ones(2, 64))
    x = torch.ones(2, 64, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None and same(layer(x).detach(), y)


def test_a_dense_checkpoint_goes_in_and_is_quantized_on_the_way() -> None:
    dense = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 16))
    for assign in (False, True):
        model = nn.Sequential(bnb.nn.Linear4bit(64, 32, quant_type="nf4"), bnb.nn.LinearNF4(32, 16))
        model.load_state_dict(dense.state_dict(), assign=assign)
        assert same(model[0].weight.data, dense[0].weight.data), "still dense"
        model.to("cpu")
        want = bnb.nn.Linear4bit.from_linear(dense[1])
        assert same(model[1].weight.data, want.weight.data)
        assert model[1].quant_state == want.quant_state
        packed = model.state_dict()
        other = nn.Sequential(bnb.nn.Linear4bit(64, 32), bnb.nn.Linear4bit(32, 16))
        other.load_state_dict(packed, assign=assign)  # packed into dense ones
        assert all(same(v, packed[k]) for k, v in other.state_dict().items())
        assert type(other[0].weight) is bnb.nn.Params4bit
    with pytest.raises(RuntimeError, match=r"0\.weight: the weight must have shape \(32, 64\)"):
        bad = {**dense.state_dict(), "0.weight": torch.ones(64, 32)}
        nn.Sequential(bnb.nn.Linear4bit(64, 32), nn.Linear(32, 16)).load_state_dict(bad)


def test_a_parameter_that_is_set_brings_its_scales() -> None:
    layer = bnb.nn.Linear4bit(64, 32, bias=False, quant_type="nf4").to("cpu")
    x, old = torch.randn(2, 64), layer.state_dict()
    sharer = bnb.nn.Linear4bit.from_quantized(layer)
    y = layer(x)
    w = torch.randn(32, 64)
    want = x @ F4.dequantize_4bit(*F4.quantize_4bit(w, None, None, 128, True, "fp4")).T

    def parameter() -> bnb.nn.Params4bit:
        return bnb.nn.Params4bit(w, quant_type="fp4", blocksize=128)

    for new in (parameter(), parameter().to("cpu")):
        layer.weight = new
        assert layer.weight is new and same(layer(x), layer(x))
        torch.testing.assert_close(layer(x), want)
        assert (layer.quant_type, layer.blocksize) == ("fp4", 128)
        assert layer.absmax is layer.quant_state.absmax is new.absmax
        assert same(sharer(x), y), "who shared the weight of before keeps it"
    layer.weight = nn.Parameter(w)  # dense, and no Params4bit: in the layer's format
    torch.testing.assert_close(layer(x), want)
    layer.set_weight(torch.ones(32, 64))
    packed, state = F4.quantize_4bit(w, quant_type="nf4")
    layer.weight.data, layer.weight.quant_state = packed, state  # behind the layer's back
    torch.testing.assert_close(layer(x), x @ F4.dequantize_4bit(packed, state).T)
    layer.weight.quant_state = None  # as after FSDP
    torch.testing.assert_close(layer(x), x @ F4.dequantize_4bit(packed, state).T)
    assert layer.weight.quant_state == state
    with pytest.raises(ValueError, match=r"shape \(8, 64\), the layer needs \(32, 64\)"):
        layer.weight = bnb.nn.Params4bit(torch.randn(8, 64)).to("cpu")
    with pytest.raises(ValueError, match=r"shape \(8, 64\), the layer needs \(32, 64\)"):
        layer.weight = bnb.nn.Params4bit(torch.randn(8, 64))
    sharer.load_state_dict(old)
    assert same(sharer(x), y)


def test_a_layer_on_meta_is_filled_by_setting_its_weight() -> None:
    """As fsdp_qlora and the like do: ``Params4bit(data, **old.__dict__)``, or from a state dict."""
    w, x = torch.randn(32, 64), torch.randn(2, 64)
    want = bnb.nn.Linear4bit.from_linear(nn.Linear(64, 32, bias=False))
    want.set_weight(w)
    layer = bnb.nn.Linear4bit(64, 32, bias=False, quant_type="nf4", device="meta")
    layer.weight = bnb.nn.Params4bit(w, quant_type="nf4").to("cpu")
    assert same(layer(x), want(x))

    layer = bnb.nn.Linear4bit(64, 32, bias=False, quant_type="nf4", device="meta")
    state = want.state_dict()
    data = state.pop("weight")
    layer.weight = bnb.nn.Params4bit.from_prequantized(data, state, device="cpu", module=layer)
    assert same(layer(x), want(x))
    layer = bnb.nn.LinearNF4(64, 32, bias=False)
    layer.weight = bnb.nn.Params4bit(w, **layer.weight.__dict__)
    assert same(layer.to("cpu")(x), want(x))


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_bytes_survive_being_flattened_cut_and_put_together(storage: torch.dtype) -> None:
    layer = bnb.nn.LinearNF4(64, 32, quant_storage=storage).to("cpu")
    x = torch.randn(2, 64)
    y = layer(x)
    assert layer.weight.dtype == layer.quant_storage == storage
    whole = torch.cat(list(layer.weight.data.flatten().chunk(4))).reshape(layer.weight.shape)
    layer.weight = nn.Parameter(whole, requires_grad=False)  # class and state are lost on the way
    assert same(layer(x), y)
    state = layer.state_dict()
    assert state["weight"].dtype == storage
    for other in (bnb.nn.Linear4bit(64, 32), bnb.nn.Linear4bit(64, 32, quant_storage=storage)):
        other.load_state_dict(state)
        assert same(other(x), y)
        assert other.weight.dtype == other.quant_storage


def test_bytes_that_do_not_fit_their_storage_are_named() -> None:
    layer = bnb.nn.Linear4bit(3, 5, quant_storage=torch.float32)
    with pytest.raises(ValueError, match="8 packed bytes .*|not a multiple of 4"):
        bnb.nn.Linear4bit(3, 6, quant_storage=torch.float32).to("cpu")
    layer.to("cpu")


def test_the_first_forward_settles_the_bias_and_says_what_fp16_means(
    caplog: pytest.LogCaptureFixture,
) -> None:
    layer = bnb.nn.LinearNF4(64, 32).to("cpu")
    assert layer.bias.dtype == torch.float32
    with caplog.at_level(logging.WARNING):
        layer(torch.randn(2, 64, dtype=torch.float16))
        assert layer.bias.dtype == torch.float16
        layer(torch.randn(2, 64, dtype=torch.float16))
    assert ["slow inference or training" in m for m in caplog.messages] == [True], "once"
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        bnb.nn.LinearNF4(64, 32)(torch.randn(64, dtype=torch.float16))
        assert ["slow inference." in m for m in caplog.messages] == [True]
        caplog.clear()
        bnb.nn.LinearNF4(64, 32, compute_dtype=torch.bfloat16)(torch.randn(2, 64).half())
        bnb.nn.LinearNF4(64, 32)(torch.randn(2, 64))
        kept = bnb.nn.Linear4bit.from_linear(nn.Linear(64, 32))
        kept(torch.randn(2, 64).half())
    assert not caplog.messages
    assert kept.bias.dtype == torch.float32, "what was converted keeps its bias as it is"


def test_classes_of_one_format() -> None:
    dense = nn.Linear(64, 32)
    for cls, kind in ((bnb.nn.LinearNF4, "nf4"), (bnb.nn.LinearFP4, "fp4")):
        assert cls(64, 32).quant_type == cls.from_linear(dense).quant_type == kind
        assert isinstance(cls(64, 32), bnb.nn.Linear4bit)
    assert not issubclass(bnb.nn.LinearNF4, bnb.nn.LinearFP4)
    assert bnb.nn.Linear4bit(64, 32).quant_type == "fp4"


def test_a_layer_is_freed_when_it_is_dropped() -> None:
    gc.collect()
    gc.disable()
    try:
        layer = bnb.nn.Linear4bit(64, 32).to("cpu")
        layer(torch.ones(1, 64))
        storage = torch.UntypedStorage._weak_ref(layer.weight.untyped_storage())
        del layer
        assert torch.UntypedStorage._expired(storage), "no cycle keeps it"
        torch.UntypedStorage._free_weak_ref(storage)
    finally:
        gc.enable()


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
def test_it_compiles_whole_checkpointed_too(nested: bool, storage: torch.dtype) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            kwargs = {"compress_statistics": nested, "quant_storage": storage}
            self.layers = nn.ModuleList(bnb.nn.Linear4bit(64, 64, **kwargs) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=False)
            return x

    torch.compiler.reset()
    net = Net().to("cpu")
    x = torch.randn(4, 64, requires_grad=True)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    y = compiled(x)
    torch.testing.assert_close(y, net(x))
    (got,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(got, torch.autograd.grad(net(x).sum(), x)[0])


def test_what_is_traced_quantizes_nothing_and_says_so() -> None:
    with pytest.raises(Exception, match="still dense"):
        torch.export.export(bnb.nn.Linear4bit(64, 32), (torch.ones(1, 64),), strict=False)


# --- Embedding4bit --------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", ["EmbeddingNF4", "EmbeddingFP4"])
@pytest.mark.parametrize("dim", [64, 65, 128])
@pytest.mark.parametrize("storage", [torch.uint8, torch.float32], ids=str)
def test_an_embedding_is_theirs(cls: str, dim: int, storage: torch.dtype, peer: Any) -> None:
    dense = nn.Embedding(32, dim)
    ours, theirs = (
        getattr(package.nn, cls)(32, dim, quant_storage=storage) for package in (bnb, peer)
    )
    for module in (ours, theirs):
        module.load_state_dict(dense.state_dict())
        module.to("cpu")
    assert same(ours.weight.data, theirs.weight.data)
    for shape in ((5,), (2, 3), (0,)):
        ids = torch.randint(0, 32, shape)
        if ids.numel():
            assert same(ours(ids), theirs(ids))
        assert ours(ids).shape == (*shape, dim)
    state = ours.state_dict()
    assert list(state)[:2] == ["weight", "weight.absmax"]
    for assign in (False, True):
        again = getattr(bnb.nn, cls)(32, dim, quant_storage=storage)
        assert str(again.load_state_dict(state, assign=assign)) == "<All keys matched successfully>"
        ids = torch.arange(32)
        assert same(again(ids), ours(ids)) and again.weight.dtype == storage
    assert same(copy.deepcopy(ours)(ids), ours(ids))
    assert same(pickle.loads(pickle.dumps(ours))(ids), ours(ids))
    before = ours.weight.data.clone()
    assert same(ours.half().weight.data, before)
    ours.weight.quant_state = None  # as after FSDP
    assert same(ours(ids), again(ids)) and ours.weight.quant_state is not None


def test_an_embedding_says_what_is_wrong(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        bnb.nn.Embedding4bit(8, 65)
    assert "65 is not a multiple of the block size 64" in caplog.text
    fresh = bnb.nn.Embedding4bit(8, 64)
    with pytest.raises(NotImplementedError, match="move it to its device"):
        fresh.state_dict()
    fresh.to("cpu")
    state = fresh.state_dict()
    with pytest.raises(RuntimeError, match=r"needs exactly one entry"):
        fresh.load_state_dict({k: v for k, v in state.items() if "quant_state" not in k})
    with pytest.raises(RuntimeError, match=r"without scales; expected a dense \[8, 64\]"):
        fresh.load_state_dict({"weight": state["weight"]})
    dense = nn.Embedding(8, 64)
    fresh.load_state_dict(dense.state_dict())  # into a packed one: quantized as it comes
    assert (fresh(torch.arange(8)) - dense.weight).abs().max() < 0.6


# --- parameters that are no layer's ---------------------------------------------------------------


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 64, 32))
        self.other = torch.randn(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.up[0] + (x @ self.up[1])


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("nested", [False, True])
def test_a_replaced_parameter_is_theirs(kind: str, nested: bool, peer: Any) -> None:
    replace = importlib.import_module("bitsandbytes.nn.parametrize").replace_parameter_4bit
    ours = Experts()
    theirs = copy.deepcopy(ours)
    parametrize.replace_parameter_4bit(ours, "up", nested, kind, 128)
    replace(theirs, "up", nested, kind, 128)
    assert same(ours.up, theirs.up) and not ours.up.requires_grad
    a, b = ours.state_dict(), theirs.state_dict()
    assert list(a) == list(b) and all(same(a[k], b[k]) for k in a if nested is False)
    again = Experts()
    parametrize.replace_parameter_4bit(again, "up", nested, kind, 128)
    again.load_state_dict(a)
    assert same(again.up, ours.up)
    again.to(torch.bfloat16)
    assert same(again.up, ours.up), "bytes and scales are not cast"
    assert again.to("meta").up.is_meta
    third = Experts()
    packed = dict(a)
    third.up = nn.Parameter(packed.pop("up"), requires_grad=False)
    stats = {k.removeprefix("up."): v for k, v in packed.items()}
    parametrize.replace_parameter_4bit_prequantized(third, "up", stats, torch.device("cpu"))
    assert same(third.up, ours.up)


def test_a_forward_dequantizes_once_and_nothing_is_left_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = Experts()
    parametrize.replace_parameter_4bit(module, "up")
    calls = []
    original = F4.dequantize_4bit
    monkeypatch.setattr(F4, "dequantize_4bit", lambda *a, **k: calls.append(1) or original(*a, **k))
    x = torch.randn(2, 64, requires_grad=True)
    module(x)
    assert len(calls) == 1
    checkpoint(module, x, use_reentrant=False).sum().backward()
    assert P._cache_enabled == 0 and P._cache == {}
    with contextlib.suppress(RuntimeError):
        module(torch.ones(2, 5))
    assert P._cache_enabled == 0 and P._cache == {}


def test_replacing_says_what_is_wrong() -> None:
    for call in (
        lambda name: parametrize.replace_parameter_4bit(Experts(), name),
        lambda name: parametrize.replace_parameter_4bit_prequantized(Experts(), name, {}, "cpu"),
    ):
        with pytest.raises(AttributeError, match="does not have parameter 'down'"):
            call("down")
        with pytest.raises(TypeError, match="'other' is not an instance of nn.Parameter"):
            call("other")
    one, two = Experts(), Experts()
    two.up = nn.Parameter(torch.randn(2, 64, 32))
    for module in (one, two):
        parametrize.replace_parameter_4bit(module, "up")
    with pytest.raises(ValueError, match=r"up is \[2, 64, 32\] in the checkpoint, here \[3"):
        one.load_state_dict(two.state_dict())


# --- what is out of scope -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: bnb.nn.Linear8bitLt(4, 4),
        lambda: bnb.nn.Embedding8bit(4, 4),
        lambda: bnb.nn.Int8Params(torch.ones(4)),
        lambda: bnb.matmul(torch.ones(4, 4), torch.ones(4, 4)),
        lambda: bnb.MatmulLtState(),
    ],
)
def test_8_bit_products_say_that_they_are_out_of_scope(make: Any) -> None:
    with pytest.raises(bnb.nn.OutOfScopeError, match="out of qlora_kernels' scope. Use .*4bit"):
        make()


def test_8_bit_classes_are_there_to_be_asked_for() -> None:
    assert not isinstance(nn.Linear(4, 4), bnb.nn.Linear8bitLt)
    assert not isinstance(bnb.nn.Linear4bit(4, 4), (bnb.nn.Linear8bitLt, bnb.nn.Int8Params))
    assert issubclass(bnb.nn.OutOfScopeError, NotImplementedError)
    assert F4.has_avx512bf16() is False


# --- optimizers -----------------------------------------------------------------------------------


@pytest.fixture
def manager() -> Any:
    manager = bnb.optim.GlobalOptimManager.get_instance()
    manager.initialize()
    yield manager
    manager.initialize()


def _step(optimizer: torch.optim.Optimizer, params: list[nn.Parameter]) -> None:
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()


def test_single_parameters_have_settings_of_their_own(manager: Any) -> None:
    assert bnb.optim.GlobalOptimManager.get_instance() is manager
    embed = nn.Embedding(100, 64)
    a, b, c = (nn.Parameter(torch.ones(5000)) for _ in range(3))
    params = [a, b, c, embed.weight]
    manager.register_parameters(params)
    manager.override_config(b, "optim_bits", 32)
    optimizer = bnb.optim.AdamW8bit(params, lr=0.1, weight_decay=0.0)
    manager.override_config([c], key_value_dict={"lr": 0.5, "betas": (0.5, 0.5)})
    manager.register_module_override(embed, "weight", {"optim_bits": 32})
    _step(optimizer, params)
    kinds = [optimizer.state[p]["state1"].dtype for p in params]
    assert kinds == [torch.uint8, torch.float32, torch.uint8, torch.float32]
    assert a[0].item() == pytest.approx(0.9, abs=1e-3)
    assert c[0].item() == pytest.approx(0.5, abs=1e-3)
    again = bnb.optim.AdamW(params, lr=0.1, optim_bits=8, min_8bit_size=6000)
    _step(again, params)
    assert all(again.state[p]["state1"].dtype == torch.float32 for p in params)
    del embed
    params.pop()
    gc.collect()
    assert len(manager.configs()) == 2, "what is gone is forgotten"


def test_overrides_say_what_is_wrong(manager: Any) -> None:
    p = nn.Parameter(torch.ones(3))
    with pytest.raises(RuntimeError, match="get_instance"):
        bnb.optim.GlobalOptimManager()
    with pytest.raises(ValueError, match="momentum cannot be overridden .*: lr, betas"):
        manager.override_config(p, "momentum", 0.9)
    with pytest.raises(ValueError, match="either key and value, or key_value_dict"):
        manager.override_config(p)
    with pytest.raises(ValueError, match="optim_bits must be 8 or 32, got 4"):
        manager.override_config(p, "optim_bits", 4)
    for options, words in (
        ({"amsgrad": True}, "amsgrad must be False"),
        ({"args": type("Args", (), {"max_unorm": 1.0})}, "args.max_unorm is not offered"),
    ):
        with pytest.raises(ValueError, match=words):
            bnb.optim.AdamW([p], **options)


@pytest.mark.parametrize("name", ["Adam", "Adam8bit", "PagedAdam", "AdamW32bit", "PagedAdamW8bit"])
def test_positional_arguments_stand_where_theirs_do(name: str) -> None:
    p = nn.Parameter(torch.ones(5000))
    optimizer = getattr(bnb.optim, name)([p], 0.1, (0.9, 0.99), 1e-8, 0.0, False, 32, None, 4096)
    _step(optimizer, [p])
    eight = "8bit" in name
    assert optimizer.state[p]["state1"].dtype == (torch.uint8 if eight else torch.float32)
    assert optimizer.paged == name.startswith("Paged")
    args = type("Args", (), {"optim_bits": 8, "min_8bit_size": 10})
    other = getattr(bnb.optim, name)([p], args=args)
    assert (other.bits, other.min_8bit_size) == (8, 10)
    assert other.param_groups[0]["weight_decay"] == (0.01 if "W" in name else 0)


def test_adam_is_torchs() -> None:
    mine, theirs = nn.Parameter(torch.ones(100)), nn.Parameter(torch.ones(100))
    a, b = bnb.optim.Adam([mine], lr=0.1), torch.optim.Adam([theirs], lr=0.1)
    for _ in range(5):
        for p in (mine, theirs):
            p.grad = p.detach() * torch.linspace(-1, 1, 100)
        a.step()
        b.step()
    torch.testing.assert_close(mine, theirs, rtol=2e-6, atol=2e-7)


# --- a script, whole ------------------------------------------------------------------------------


def test_a_script_of_theirs_runs_with_the_import_changed() -> None:
    """The example of their documentation, and a step of training around the frozen layers."""
    dense = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    model = nn.Sequential(
        bnb.nn.Linear4bit(64, 64, compute_dtype=torch.bfloat16, quant_type="nf4"),
        nn.ReLU(),
        bnb.nn.Linear4bit(64, 64, compute_dtype=torch.bfloat16, quant_type="nf4"),
    )
    model.load_state_dict(dense.state_dict())
    model = model.to("cpu")
    assert [m.weight.dtype for m in (model[0], model[2])] == [torch.uint8] * 2
    names = [n for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert names == ["0", "2"]
    x = torch.randn(8, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = model(x)
    assert F.cosine_similarity(y.flatten(), dense(x).flatten(), dim=0) > 0.98
    optimizer = bnb.optim.PagedAdamW8bit([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = y.pow(2).mean()
    before.backward()
    optimizer.step()
    assert model(x).pow(2).mean() < before
