"""Linear4bit, LoraLinear4bit and replace_linear_layers, read as a specification.

Values are held against float64 products of the *dequantized* weight (what the kernels may differ
by from that is their own tests' business), so the tolerance is fp32's: a sum of K terms of
magnitude 1 is off by at most about K * 2**-24, and rounding the result adds half an ulp.
"""

from __future__ import annotations

import copy
import io
import json
import pickle
import re
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from qlora_kernels import formats
from qlora_kernels import nn as qnn
from qlora_kernels.nn import (
    CheckpointError,
    Linear4bit,
    LoraLinear4bit,
    LoraSpec,
    mark_only_lora_as_trainable,
    replace_linear_layers,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(123, 5), (7, 64), (64, 64), (129, 192), (1, 1), (33, 31)]  # out, in: odd on purpose


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def packed(k: int, n: int, **kwargs: object) -> Linear4bit:
    """A layer as it is after ``.to(device)``; NF4 unless another format is given."""
    layer = Linear4bit(k, n, **{"quant_type": "nf4", **kwargs})  # type: ignore[arg-type]
    return layer.to(kwargs.get("device", "cpu"))


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    eps = torch.finfo(dtype).eps
    return {"rtol": 4 * eps, "atol": 8 * eps}


def same_state(a: nn.Module, b: nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return list(x) == list(y) and all(
        x[k].dtype == y[k].dtype and torch.equal(x[k], y[k]) for k in x
    )


def dense64(layer: Linear4bit, dtype: torch.dtype) -> torch.Tensor:
    return layer.dequantize_weight(torch.float32).to(dtype).double()


# --- forward and backward -----------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("nested", [False, True])
def test_it_multiplies_by_the_dequantized_weight(
    device: torch.device, shape: tuple[int, int], nested: bool
) -> None:
    n, k = shape
    layer = Linear4bit.from_linear(nn.Linear(k, n, device=device), compress_statistics=nested)
    x = torch.randn(3, 2, k, device=device)
    want = F.linear(x.double(), dense64(layer, x.dtype), layer.bias.double())
    torch.testing.assert_close(layer(x).double(), want, **tolerance(x.dtype))
    torch.testing.assert_close(layer.dequantize()(x), layer(x), **tolerance(x.dtype))


def test_the_identity_gives_the_weight_exactly(device: torch.device) -> None:
    layer = Linear4bit.from_linear(nn.Linear(96, 40, bias=False, device=device))
    assert torch.equal(layer(torch.eye(96, device=device)).T, layer.dequantize_weight())


@pytest.mark.parametrize("lead", [(), (1,), (4,), (2, 3), (2, 1, 3)])
def test_any_leading_dimensions(device: torch.device, lead: tuple[int, ...]) -> None:
    layer = LoraLinear4bit(10, 6, r=2, device=device)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(*lead, 10, device=device)
    y = layer(x)
    assert y.shape == (*lead, 6)
    torch.testing.assert_close(y.reshape(-1, 6), layer(x.reshape(-1, 10)))


@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("lora_dtype", DTYPES)
@pytest.mark.parametrize("bias_dtype", DTYPES)
@pytest.mark.parametrize("compute", [None, torch.bfloat16])
def test_every_dtype_of_x_lora_and_bias(
    device: torch.device,
    x_dtype: torch.dtype,
    lora_dtype: torch.dtype,
    bias_dtype: torch.dtype,
    compute: torch.dtype | None,
) -> None:
    layer = LoraLinear4bit(
        64, 24, r=3, lora_dtype=lora_dtype, dtype=bias_dtype, compute_dtype=compute, device=device
    )
    nn.init.normal_(layer.lora_B, std=0.1)
    x = torch.randn(5, 64, dtype=x_dtype, requires_grad=True, device=device)
    y = layer(x)
    assert y.dtype == x_dtype
    c = compute or x_dtype
    xc, a, b, bias = (t.to(c).double() for t in (x, layer.lora_A, layer.lora_B, layer.bias))
    want = F.linear(xc, dense64(layer, c), bias) + layer.scaling * (xc @ a.T @ b.T)
    torch.testing.assert_close(
        y.double(),
        want,
        rtol=0.02 if c != torch.float32 else 2e-5,
        atol=0.05 if c != torch.float32 else 2e-5,
    )
    y.sum().backward()
    for t in (x, layer.lora_A, layer.lora_B, layer.bias):
        assert t.grad is not None
        assert t.grad.dtype == t.dtype
        assert t.grad.isfinite().all()
    assert layer.weight.grad is None


def test_autocast_acts_as_for_a_dense_layer(device: torch.device) -> None:
    layer = LoraLinear4bit(64, 24, r=3, device=device)
    x = torch.randn(5, 64, requires_grad=True, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y, dense = layer(x), layer.dequantize()(x)
    assert y.dtype == dense.dtype == torch.bfloat16
    y.sum().backward()
    for t in (x, layer.lora_A, layer.lora_B, layer.bias):
        assert t.grad is not None
        assert t.grad.dtype == torch.float32


def _lora_reference(
    layer: LoraLinear4bit, x: torch.Tensor, seed: int
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Value and gradients in float64, the dropout mask drawn as the layer draws it."""
    w = layer.dequantize_weight(torch.float32).double()
    leaves = [t.detach().double().requires_grad_() for t in (x, layer.lora_A, layer.lora_B)]
    x64, a, b = leaves
    torch.manual_seed(seed)
    mask = F.dropout(torch.ones_like(x), layer.lora_dropout, layer.training).double()
    y = x64 @ w.T + layer.scaling * ((x64 * mask) @ a.T @ b.T)
    y.pow(2).sum().backward()
    return y.detach(), [t.grad for t in leaves]


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("reentrant", [None, False, True], ids=["plain", "ckpt", "ckpt-reentrant"])
def test_dropout_is_exact_in_both_passes(
    device: torch.device, p: float, reentrant: bool | None
) -> None:
    layer = LoraLinear4bit(40, 16, bias=False, r=4, lora_dropout=p, device=device)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(2, 6, 40, requires_grad=True, device=device)
    torch.manual_seed(7)
    if reentrant is None:
        y = layer(x)
    else:
        y = checkpoint(layer, x, use_reentrant=reentrant)
    y.pow(2).sum().backward()
    want, grads = _lora_reference(layer, x, 7)
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-4)
    for got, grad in zip((x, layer.lora_A, layer.lora_B), grads, strict=True):
        assert got.grad is not None
        scale = grad.abs().max().item()
        torch.testing.assert_close(got.grad.double(), grad, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.filterwarnings("ignore:Input #.* requires gradient and is not a double")
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradcheck_by_finite_differences(
    device: torch.device, p: float, checkpointed: bool
) -> None:
    layer = LoraLinear4bit(12, 5, r=2, lora_dropout=p, device=device)

    def forward(x, a, b, bias):  # type: ignore[no-untyped-def]
        given = {"lora_A": a, "lora_B": b, "bias": bias}
        return torch.func.functional_call(layer, given, (x,))

    def seeded(*inputs: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        return (
            checkpoint(forward, *inputs, use_reentrant=False) if checkpointed else forward(*inputs)
        )

    inputs = [
        torch.randn(*s, requires_grad=True, device=device) for s in ((3, 12), (2, 12), (5, 2), (5,))
    ]
    # Linear in each input, so a large step costs nothing; fp32 rounding is what is tolerated.
    assert torch.autograd.gradcheck(seeded, inputs, eps=0.1, atol=1e-3, rtol=1e-3)


def test_eval_and_a_disabled_adapter_draw_no_dropout(device: torch.device) -> None:
    layer = LoraLinear4bit(32, 8, r=2, lora_dropout=0.9, device=device)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(4, 32, device=device)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    y = layer(x)
    assert torch.equal(y, layer(x))
    layer.disable_adapter()
    base = Linear4bit.from_quantized(layer)(x)
    assert torch.equal(layer(x), base)
    layer.enable_adapter()
    assert torch.equal(layer(x), y)


def test_lora_starts_as_peft_does(device: torch.device) -> None:
    layer = LoraLinear4bit(256, 8, r=4, lora_alpha=8, device=device)
    assert not layer.lora_B.any()
    assert layer.lora_A.abs().max() <= 1 / 256**0.5
    assert layer.lora_A.std() > 0.5 / 256**0.5
    assert layer.lora_A.dtype == torch.float32
    assert layer.scaling == 2.0
    assert LoraLinear4bit(8, 8, r=4, lora_alpha=8, use_rslora=True, device=device).scaling == 4.0


# --- compile and export -------------------------------------------------------------------------


def _stack(device: torch.device) -> nn.Module:
    return nn.Sequential(
        packed(24, 40, device=device),
        nn.GELU(),
        LoraLinear4bit(40, 24, r=2, compress_statistics=False, bias=False, device=device),
        LoraLinear4bit(24, 8, r=2, lora_dropout=0.1, device=device),
    )


@pytest.mark.parametrize("training", [False, True])
def test_compiles_without_a_graph_break(device: torch.device, training: bool) -> None:
    model = _stack(device=device).train(training)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 24, requires_grad=True, device=device)
    torch.manual_seed(1)
    want = model(x)
    (grad,) = torch.autograd.grad(want.sum(), x)
    torch.manual_seed(1)
    got = compiled(x)
    if not training:  # the compiled dropout draws its own numbers
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(torch.autograd.grad(got.sum(), x)[0], grad)
    else:
        got.sum().backward()
        assert model[3].lora_A.grad is not None


@pytest.mark.parametrize("strict", [False, True])
def test_exports(device: torch.device, strict: bool) -> None:
    model = _stack(device=device).eval()
    x = torch.randn(2, 24, device=device)
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(model, (x,), dynamic_shapes=shapes, strict=strict)
    more = torch.randn(5, 24, device=device)
    torch.testing.assert_close(program.module()(more), model(more))
    assert "0.absmax" in program.state_dict


# --- moving, copying, pickling, sharing ---------------------------------------------------------


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half(),
        lambda m: m.type(torch.float16),
        lambda m: m.to(torch.float16).float(),
        lambda m: m.to(m.weight.device, torch.bfloat16),
    ],
    ids=["bf16", "half", "type", "half-float", "device-dtype"],
)
@pytest.mark.parametrize("nested", [False, True])
def test_casting_a_model_casts_neither_bytes_nor_scales(
    device: torch.device, cast, nested: bool
) -> None:  # type: ignore[no-untyped-def]
    layer = LoraLinear4bit(64, 32, compress_statistics=nested, device=device)
    before = {k: v.clone() for k, v in layer.state_dict().items() if k.startswith("weight")}
    cast(layer)
    after = layer.state_dict()
    for key, value in before.items():
        assert after[key].dtype == value.dtype, key
        assert torch.equal(after[key], value), key
    assert layer.bias.dtype == layer.lora_A.dtype != torch.float64


def test_it_moves_between_devices_and_meta_keeps_the_layout(device: torch.device) -> None:
    layer = packed(48, 20, blocksize=32, quant_type="fp4", device=device)
    meta = copy.deepcopy(layer).to("meta")
    for t in (meta.weight, meta.absmax, meta.nested_offset, meta.bias):
        assert t is not None
        assert t.is_meta
    assert (meta.weight.shape, meta.blocksize, meta.quant_type) == (layer.weight.shape, 32, "fp4")
    empty = meta.to_empty(device=device)
    empty.load_state_dict(layer.state_dict())
    assert same_state(empty, layer)


def test_deepcopy_shares_nothing(device: torch.device) -> None:
    layer = LoraLinear4bit(48, 20, device=device)
    other = copy.deepcopy(layer)
    assert same_state(layer, other)
    ours = {t.data_ptr() for t in (*layer.parameters(), *layer.buffers())}
    theirs = {t.data_ptr() for t in (*other.parameters(), *other.buffers())}
    assert not ours & theirs
    other.set_weight(torch.ones(20, 48, device=device))
    assert not same_state(layer, other)


@pytest.mark.parametrize("cls", [Linear4bit, LoraLinear4bit])
def test_pickle_and_torch_save(device: torch.device, cls: type[Linear4bit]) -> None:
    layer = cls(48, 20, quant_type="int4", blocksize=16, device=device)
    again = pickle.loads(pickle.dumps(layer))
    assert same_state(layer, again)
    assert again.format is layer.format
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    x = torch.randn(2, 48, device=device)
    assert torch.equal(again(x), layer(x))


class _Embeds(torch.utils.data.Dataset):
    """A dataset that runs a module in the worker."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __len__(self) -> int:
        return 2

    def __getitem__(self, i: int) -> torch.Tensor:
        with torch.no_grad():
            return self.layer(torch.full((48,), float(i)))


def test_a_data_loaders_worker_gets_it() -> None:
    layer = Linear4bit(48, 20)
    loader = torch.utils.data.DataLoader(
        _Embeds(layer), num_workers=1, multiprocessing_context="spawn"
    )
    got = torch.cat(list(loader))
    with torch.no_grad():
        torch.testing.assert_close(got, layer(torch.tensor([[0.0] * 48, [1.0] * 48])))


def _shared(device: torch.device | str = "cpu") -> nn.ModuleList:
    base = packed(64, 32, device=device)
    return nn.ModuleList([base, LoraLinear4bit.from_quantized(base, r=2)])


def _is_shared(a: Linear4bit, b: Linear4bit) -> bool:
    pairs = [(a.weight, b.weight), *((a._buffers[k], b._buffers[k]) for k in a._buffers)]
    return all(s is t and (s is None or s.data_ptr() == t.data_ptr()) for s, t in pairs)


def test_a_shared_weight_is_one_weight(device: torch.device) -> None:
    base, lora = _shared(device=device)
    assert _is_shared(base, lora)
    assert lora.bias is base.bias
    x = torch.randn(3, 64, device=device)
    assert torch.equal(base(x), lora(x))
    base.set_weight(torch.randn(32, 64, device=device))
    assert _is_shared(base, lora)
    assert torch.equal(base(x), lora(x))


@pytest.mark.parametrize(
    "change",
    [
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half().float(),
        lambda m: m.share_memory(),
        lambda m: m[1].half() and m,
        lambda m: m.load_state_dict(_shared().state_dict()) and m,
    ],
    ids=["deepcopy", "pickle", "bf16", "half", "share_memory", "one-of-two", "load"],
)
def test_a_shared_weight_stays_shared(device: torch.device, change) -> None:  # type: ignore[no-untyped-def]
    model = _shared(device=device)
    new = change(model)
    assert _is_shared(new[0], new[1])


def test_loading_another_format_into_one_of_two_reaches_both(device: torch.device) -> None:
    base, lora = _shared(device=device)
    other = packed(
        64, 32, quant_type="fp4", blocksize=128, compress_statistics=False, device=device
    )
    base.load_state_dict(other.state_dict())
    assert _is_shared(base, lora)
    assert (lora.quant_type, lora.blocksize, lora.compress_statistics) == ("fp4", 128, False)
    x = torch.randn(3, 64, device=device)
    assert torch.equal(base(x), other(x))
    lora.disable_adapter()
    assert torch.equal(lora(x), other(x))


# --- state dicts --------------------------------------------------------------------------------


def test_keys_are_those_of_bitsandbytes(device: torch.device) -> None:
    state = packed(256, 128, compress_statistics=True, device=device).state_dict()
    assert [(k, v.dtype, tuple(v.shape)) for k, v in state.items()] == [
        ("weight", torch.uint8, (16384, 1)),
        ("bias", torch.float32, (128,)),
        ("weight.absmax", torch.uint8, (512,)),
        ("weight.quant_map", torch.float32, (16,)),
        ("weight.nested_absmax", torch.float32, (2,)),
        ("weight.nested_quant_map", torch.float32, (256,)),
        (
            "weight.quant_state.bitsandbytes__nf4",
            torch.uint8,
            state["weight.quant_state.bitsandbytes__nf4"].shape,
        ),
    ]
    info = json.loads(bytes(state["weight.quant_state.bitsandbytes__nf4"].tolist()))
    assert list(info) == [
        "quant_type", "blocksize", "dtype", "shape",
        "nested_blocksize", "nested_dtype", "nested_offset",
    ]  # fmt: skip
    assert info["shape"] == [128, 256]


OURS = formats.Format("squares", [(i - 7.5) * abs(i - 7.5) / 56.25 for i in range(16)])
TIES = formats.Format("ties", list(range(-8, 8)), ties=[True] * 15)


@pytest.mark.parametrize("fmt", ["nf4", "fp4", "fp4_e2m1", "int4", OURS, TIES], ids=str)
@pytest.mark.parametrize("blocksize", [16, 64, 4096])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("assign", [False, True])
def test_round_trip_of_every_format(
    device: torch.device, fmt, blocksize: int, nested: bool, assign: bool
) -> None:  # type: ignore[no-untyped-def]
    layer = LoraLinear4bit(
        65,
        33,
        bias=False,
        quant_type=fmt,
        blocksize=blocksize,
        compress_statistics=nested,
        dtype=torch.bfloat16,
        device=device,
    )
    state = layer.state_dict()
    peer = fmt in ("nf4", "fp4") and blocksize >= 32
    kind = "bitsandbytes" if peer else "qlora_kernels"
    assert f"weight.quant_state.{kind}__{layer.quant_type}" in state
    with torch.device("meta" if assign else device):
        other = LoraLinear4bit(
            65, 33, bias=False
        )  # NF4 in blocks of 64: the checkpoint's word counts
    assert str(other.load_state_dict(state, assign=assign)) == "<All keys matched successfully>"
    assert same_state(layer, other)
    assert other.dequantize_weight().dtype == torch.bfloat16
    assert torch.equal(other.dequantize_weight(), layer.dequantize_weight())
    w = torch.randn(33, 65, dtype=torch.bfloat16, device=device)
    layer.set_weight(w)
    other.set_weight(w)  # thresholds and ties came along too
    assert torch.equal(other.weight, layer.weight)


def test_a_format_that_is_not_registered_here_comes_with_its_codebook(
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fmt = formats.Format("elsewhere", [(i / 15) ** 2 for i in range(16)], ties=[True] * 15)
    layer = packed(64, 8, quant_type=fmt, device=device)
    state = layer.state_dict()
    monkeypatch.delitem(formats.FORMATS, "elsewhere")
    other = Linear4bit(64, 8, device=device)
    other.load_state_dict(state)
    assert torch.equal(other.dequantize_weight(), layer.dequantize_weight())
    for mine, theirs in zip(other.format.tables, fmt.tables, strict=True):
        assert (mine == theirs).all()


def test_in_a_container_under_prefixes_and_safetensors(device: torch.device, tmp_path) -> None:  # type: ignore[no-untyped-def]
    from safetensors.torch import load_file, save_file

    model = nn.ModuleDict(
        {
            "a": packed(64, 32, device=device),
            "b": nn.Sequential(packed(32, 16, device=device)),
        }
    )
    save_file(model.state_dict(), tmp_path / "m.safetensors")
    other = nn.ModuleDict(
        {
            "a": Linear4bit(64, 32, device=device),
            "b": nn.Sequential(Linear4bit(32, 16, device=device)),
        }
    )
    other.load_state_dict(load_file(tmp_path / "m.safetensors"))
    assert same_state(model, other)


def test_a_dense_checkpoint_is_quantized_while_it_loads(device: torch.device) -> None:
    dense = nn.Linear(64, 32, device=device)
    layer = packed(64, 32, blocksize=32, device=device)
    layer.load_state_dict(dense.state_dict())
    assert same_state(layer, Linear4bit.from_linear(dense, blocksize=32))
    with torch.device("meta"):
        layer = Linear4bit(64, 32, blocksize=32, quant_type="nf4")
    layer.load_state_dict(dense.state_dict(), assign=True)
    assert same_state(layer, Linear4bit.from_linear(dense, blocksize=32))


def test_loading_copies_and_assigning_takes(device: torch.device) -> None:
    state = packed(64, 32, device=device).state_dict()
    layer = packed(64, 32, device=device)
    parameter = layer.weight
    layer.load_state_dict(state)
    assert layer.weight is parameter
    for key in ("weight", "bias", "absmax", "nested_absmax"):
        given = state.get(key, state.get(f"weight.{key}"))
        assert getattr(layer, key).data_ptr() != given.data_ptr(), key
    layer.load_state_dict(state, assign=True)
    for key in ("weight", "bias", "absmax", "nested_absmax"):
        given = state.get(key, state.get(f"weight.{key}"))
        assert getattr(layer, key).data_ptr() == given.data_ptr(), key


def test_strict_tells_missing_and_unexpected_keys_and_loose_passes_over_them(
    device: torch.device,
) -> None:
    layer = packed(64, 32, device=device)
    state = layer.state_dict()
    del state["bias"]
    state["other"] = torch.zeros(1, device=device)
    with pytest.raises(RuntimeError) as error:
        Linear4bit(64, 32, device=device).load_state_dict(state)
    assert 'Missing key(s) in state_dict: "bias"' in str(error.value)
    assert 'Unexpected key(s) in state_dict: "other"' in str(error.value)
    other = Linear4bit(64, 32, device=device)
    result = other.load_state_dict(state, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (["bias"], ["other"])
    assert torch.equal(other.weight, layer.weight)
    empty = Linear4bit(64, 32, device=device).load_state_dict({}, strict=False)
    assert empty.missing_keys == ["weight", "bias"]


def _edit(key: str, change):  # type: ignore[no-untyped-def]
    def edit(state: dict[str, torch.Tensor]) -> None:
        value = change(state[key])
        if value is None:
            del state[key]
        else:
            state[key] = value

    return edit


def _json(**changes: object):  # type: ignore[no-untyped-def]
    def change(blob: torch.Tensor) -> torch.Tensor:
        info = json.loads(bytes(blob.tolist()))
        info.update(changes)
        return torch.tensor(list(json.dumps(info).encode()), dtype=torch.uint8)

    return _edit("weight.quant_state.bitsandbytes__nf4", change)


BAD = {
    "packed-short": (_edit("weight", lambda t: t[:-1]), "1023 packed bytes.*needs 1024"),
    "packed-long": (_edit("weight", lambda t: torch.cat([t, t[:1]])), "1025 packed bytes"),
    "absmax-gone": (_edit("weight.absmax", lambda t: None), "weight.absmax is missing"),
    "absmax-short": (_edit("weight.absmax", lambda t: t[:-1]), "weight.absmax is 31 x"),
    "absmax-dtype": (_edit("weight.absmax", lambda t: t.float()), "needs 32 x torch.uint8"),
    "nested-gone": (_edit("weight.nested_absmax", lambda t: None), "nested_absmax is missing"),
    "nested-long": (_edit("weight.nested_absmax", lambda t: t.repeat(2)), "nested_absmax is 2 x"),
    "nested-map": (_edit("weight.nested_quant_map", lambda t: None), "nested_quant_map is missing"),
    "map-short": (_edit("weight.quant_map", lambda t: t[:15]), "quant_map is 15 x"),
    "map-other": (_edit("weight.quant_map", lambda t: t.flip(0)), "not the codebook of 'nf4'"),
    "json-gone": (
        _edit("weight.quant_state.bitsandbytes__nf4", lambda t: None),
        "exactly one.*found none",
    ),
    "json-cut": (_edit("weight.quant_state.bitsandbytes__nf4", lambda t: t[:-9]), "is not JSON"),
    "json-bytes": (
        _edit("weight.quant_state.bitsandbytes__nf4", lambda t: t | 0x80),
        "is not JSON",
    ),
    "json-shape": (_json(shape=[64, 32]), r"holds a weight of shape \(64, 32\)"),
    "json-rank": (_json(shape=[2048]), "not two positive integers"),
    "json-blocksize": (_json(blocksize=48), "blocksize must be one of .* got 48"),
    "json-other-blocksize": (_json(blocksize=128), "needs 16 x torch.uint8"),
    "json-dtype": (_json(dtype="float64"), "dtype 'float64'"),
    "json-type": (_json(quant_type="fp4"), "JSON says quant_type 'fp4', its key says 'nf4'"),
    "json-no-offset": (_json(nested_offset=None), "nested_offset = None"),
    "json-nested-block": (_json(nested_blocksize=128), "nested scales in blocks of 128"),
    "surplus": (lambda s: s.update({"weight.SCB": torch.ones(1)}), "belong to no 4-bit.*SCB"),
    "two-states": (
        lambda s: s.update({"weight.quant_state.bitsandbytes__fp4": torch.ones(1)}),
        "exactly one",
    ),
    "weight-gone": (_edit("weight", lambda t: None), "weight is missing, its scales are there"),
    "scales-gone": (
        lambda s: [s.pop(k) for k in list(s) if k.startswith("weight.")],
        "without its scales",
    ),
    "dense-shape": (
        lambda s: [
            *[s.pop(k) for k in list(s) if k.startswith("weight.")],
            s.update(weight=torch.ones(64, 32)),
        ],
        r"must have shape \(32, 64\), got \(64, 32\)",
    ),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("strict", [True, False])
def test_what_does_not_agree_is_named_and_nothing_is_loaded(
    device: torch.device, case: str, strict: bool
) -> None:
    damage, message = BAD[case]
    state = packed(64, 32, device=device).state_dict()
    damage(state)
    model = nn.ModuleDict({"layer": packed(64, 32, device=device)})
    before = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match=r"layer\.weight") as error:
        model.load_state_dict({f"layer.{k}": v for k, v in state.items()}, strict=strict)
    assert re.search(message, str(error.value)), str(error.value)
    for key in ("weight", "absmax", "nested_absmax", "nested_offset"):
        assert torch.equal(getattr(model["layer"], key), getattr(before["layer"], key)), key


def test_reading_entries_raises_checkpoint_error() -> None:
    with pytest.raises(CheckpointError, match=r"^here: needs exactly one entry"):
        qnn.read_checkpoint_entries(torch.zeros(8, dtype=torch.uint8), {}, (4, 4), "here")


# --- bitsandbytes' own modules ------------------------------------------------------------------


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    # bitsandbytes compiles what it does with ragged tails, which takes it half a minute.
    [(128, 256), pytest.param((31, 65), marks=pytest.mark.full)],
)
def test_theirs_to_ours_to_theirs_bit_for_bit(
    quant_type: str, nested: bool, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    n, k = shape
    theirs = bnb.nn.Linear4bit(k, n, quant_type=quant_type, compress_statistics=nested)
    theirs = theirs.to(dtype).to("cpu")
    state = theirs.state_dict()
    ours = Linear4bit(k, n)
    ours.load_state_dict(state)
    again = ours.state_dict()
    assert list(again) == list(state)
    for key, value in state.items():
        if key == "bias":
            continue
        assert again[key].dtype == value.dtype, key
        assert torch.equal(again[key], value), key
    stats = {
        key.removeprefix("weight."): value.clone()
        for key, value in again.items()
        if key.startswith("weight.")
    }
    back = bnb.nn.Params4bit.from_prequantized(again["weight"], stats, device="cpu")
    want = bnb.functional.dequantize_4bit(theirs.weight.data, theirs.weight.quant_state)
    assert torch.equal(bnb.functional.dequantize_4bit(back.data, back.quant_state), want)
    assert torch.equal(ours.dequantize_weight(), want)
    assert ours.dequantize_weight().dtype == dtype


def test_their_packed_bytes_in_another_storage_dtype() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    theirs = bnb.nn.Linear4bit(64, 32, quant_type="nf4", quant_storage=torch.bfloat16).to("cpu")
    state = theirs.state_dict()
    assert state["weight"].dtype == torch.bfloat16
    ours = Linear4bit(64, 32)
    ours.load_state_dict(state)
    want = bnb.functional.dequantize_4bit(theirs.weight.data, theirs.weight.quant_state)
    assert torch.equal(ours.dequantize_weight(), want)


# --- merging ------------------------------------------------------------------------------------


def test_merge_rounds_once_says_by_how_much_and_unmerges_bit_for_bit(device: torch.device) -> None:
    layer = LoraLinear4bit(128, 64, r=4, lora_alpha=4, device=device)
    nn.init.normal_(layer.lora_B, std=0.02)
    before, x = copy.deepcopy(layer), torch.randn(3, 128, device=device)
    y = layer(x)
    exact = layer.dequantize_weight(torch.float32) + layer.delta_weight()
    error = layer.merge()
    assert layer.merged
    want = copy.deepcopy(before)
    want.set_weight(exact)
    assert torch.equal(layer.weight, want.weight)
    merged = layer.dequantize_weight(torch.float32)
    assert error.rounding == pytest.approx((merged - exact).norm().item())
    assert error.update == pytest.approx(layer.delta_weight().norm().item())
    assert 0.05 < error.relative_to_weight < 0.12  # NF4 in blocks of 64 on such weights: 9%
    assert error.relative_to_update > 0.3
    assert "x the update" in str(error)
    torch.testing.assert_close(layer(x), F.linear(x, merged, layer.bias))
    assert same_state(layer, before)  # a state dict holds W, A and B, never the merged W
    layer.unmerge()
    assert not layer.merged
    assert same_state(layer, before)
    assert torch.equal(layer(x), y)
    layer.unmerge()  # nothing to do


@pytest.mark.parametrize(
    ("size", "lost"), [(1e-3, 1.03), (0.01, 1.09), (0.03, 1.08), (0.1, 0.79), (0.3, 0.32)]
)
def test_a_small_update_does_not_survive_the_merge(
    device: torch.device, size: float, lost: float
) -> None:
    """The table in MergeReport: what is small against NF4's steps is rounded away."""
    linear = nn.Linear(512, 512, bias=False, device=device)
    nn.init.normal_(linear.weight, std=0.02)
    layer = LoraLinear4bit.from_linear(linear, r=16)
    nn.init.normal_(layer.lora_B)
    now = layer.delta_weight().norm() / layer.dequantize_weight().norm()
    with torch.no_grad():
        layer.lora_B *= size / now
    assert layer.merge().relative_to_update == pytest.approx(lost, abs=0.1)


def test_merging_leaves_those_who_share_the_weight_alone(device: torch.device) -> None:
    base, lora = _shared(device=device)
    nn.init.normal_(lora.lora_B)
    x = torch.randn(3, 64, device=device)
    y = base(x)
    lora.merge()
    assert torch.equal(base(x), y)
    assert not torch.equal(lora(x), y)
    lora.disable_adapter()
    assert not lora.merged
    assert _is_shared(base, lora)


def test_merging_twice_is_an_error(device: torch.device) -> None:
    layer = LoraLinear4bit(64, 32, device=device)
    layer.merge()
    with pytest.raises(RuntimeError, match="merged already"):
        layer.merge()


# --- replace_linear_layers ----------------------------------------------------------------------


class _Model(nn.Module):
    """An embedding tied to the output, a shared layer, two layers of one weight, odd ones out."""

    def __init__(self, tie: bool = True, device: torch.device | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"q_proj": nn.Linear(64, 64), "up_proj": nn.Linear(64, 96)})
            for _ in range(2)
        )
        self.attention = nn.MultiheadAttention(64, 4)
        self.lm_head = nn.Linear(64, 50, bias=False)
        if tie:
            self.lm_head.weight = self.embed.weight
        self.to(device)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer["up_proj"](layer["q_proj"](x))[..., :64]
        return self.lm_head(x)


def test_it_replaces_all_but_the_output_layer_and_says_so(device: torch.device, capsys) -> None:  # type: ignore[no-untyped-def]
    model = _Model(device=device)
    report = replace_linear_layers(model)
    assert list(report.replaced) == [
        f"layers.{i}.{name}" for i in range(2) for name in ("q_proj", "up_proj")
    ]
    assert report.replaced["layers.0.up_proj"] == (96, 64)
    assert report.skipped["lm_head"] == "skip 'lm_head'"
    assert "NonDynamicallyQuantizableLinear" in report.skipped["attention.out_proj"]
    weights = 2 * (64 * 64 + 64 * 96)
    assert report.weights == weights
    assert report.bytes_before == 4 * weights
    layers = [m for m in model.modules() if isinstance(m, Linear4bit)]
    packed = sum(
        t.numel() * t.element_size()
        for m in layers
        for t in (m.weight, m.absmax, m.nested_absmax, m.nested_offset)
        if t is not None
    )
    assert report.bytes_after == packed
    assert report.bits_per_weight == 8 * packed / weights
    kept = sum(p.numel() for p in model.parameters() if p.dtype == torch.float32)
    assert report.bytes_kept == 4 * kept
    printed = capsys.readouterr().out
    assert printed.strip() == str(report)
    assert "4 linear layers to nf4, blocks of 64, double quantization" in printed
    assert "kept as it is: lm_head (skip 'lm_head')" in printed
    model(torch.tensor([[1, 2, 3]], device=device))
    assert model.lm_head.weight is model.embed.weight


def test_bits_a_weight() -> None:
    assert packed(64, 64).bits_per_weight == pytest.approx(4.127, abs=5e-4)
    assert packed(64, 64, compress_statistics=False).bits_per_weight == 4.5
    model = nn.Sequential(nn.Linear(1024, 1024))
    assert replace_linear_layers(model, verbose=False).bits_per_weight == pytest.approx(
        4.127, abs=5e-4
    )


def test_a_tied_output_layer_stays_even_if_nothing_is_skipped(device: torch.device) -> None:
    report = replace_linear_layers(_Model(device=device), skip=[], verbose=False)
    assert report.skipped["lm_head"] == "its weight is tied to embed"
    report = replace_linear_layers(_Model(tie=False, device=device), skip=[], verbose=False)
    assert "lm_head" in report.replaced


def test_include_and_skip_take_names_components_and_wildcards() -> None:
    def names(**kwargs: object) -> list[str]:
        return list(replace_linear_layers(_Model(), verbose=False, **kwargs).replaced)  # type: ignore[arg-type]

    assert names(include="q_proj") == ["layers.0.q_proj", "layers.1.q_proj"]
    assert names(include=["layers.1"]) == ["layers.1.q_proj", "layers.1.up_proj"]
    assert names(include="layers.*.up*") == ["layers.0.up_proj", "layers.1.up_proj"]
    assert names(skip=["lm_head", "layers.0"]) == ["layers.1.q_proj", "layers.1.up_proj"]
    assert names(include="q_proj", skip="layers.1") == ["layers.0.q_proj"]


def test_a_shared_module_is_replaced_once_and_stays_shared(device: torch.device) -> None:
    model = _Model(device=device)
    model.layers[1]["q_proj"] = model.layers[0]["q_proj"]
    report = replace_linear_layers(model, verbose=False)
    assert model.layers[1]["q_proj"] is model.layers[0]["q_proj"]
    assert isinstance(model.layers[0]["q_proj"], Linear4bit)
    assert {"layers.0.q_proj", "layers.1.q_proj"} <= set(report.replaced)
    assert report.weights == 64 * 64 + 2 * 64 * 96


def test_two_layers_of_one_weight_share_the_packed_one(device: torch.device) -> None:
    model = _Model(device=device)
    model.layers[1]["q_proj"].weight = model.layers[0]["q_proj"].weight
    report = replace_linear_layers(model, verbose=False, lora=LoraSpec(r=2))
    a, b = (layer["q_proj"] for layer in model.layers)
    assert a is not b
    assert _is_shared(a, b)
    assert a.bias is not b.bias
    assert a.lora_A is not b.lora_A
    assert report.weights == 64 * 64 + 2 * 64 * 96


def test_dense_weights_are_freed_one_by_one(device: torch.device) -> None:
    model = _Model(device=device)
    watched = [weakref.ref(layer["q_proj"].weight) for layer in model.layers]
    alive: list[int] = []
    original = Linear4bit.from_linear.__func__  # type: ignore[attr-defined]

    def counted(cls, linear, **kwargs):  # type: ignore[no-untyped-def]
        alive.append(sum(w() is not None for w in watched))
        return original(cls, linear, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Linear4bit, "from_linear", classmethod(counted))
        replace_linear_layers(model, verbose=False)
    assert alive == [2, 1, 1, 0]


def test_lora_on_all_or_on_some_and_what_trains(device: torch.device) -> None:
    model = _Model(device=device)
    spec = LoraSpec(r=2, lora_alpha=4, target_modules="q_proj")
    report = replace_linear_layers(model, lora=spec, verbose=False)
    assert report.adapters == ["layers.0.q_proj", "layers.1.q_proj"]
    assert type(model.layers[0]["up_proj"]) is Linear4bit
    assert model.layers[0]["q_proj"].scaling == 2.0
    trained = mark_only_lora_as_trainable(model)
    assert trained == [f"layers.{i}.q_proj.lora_{m}" for i in range(2) for m in "AB"]
    model(torch.tensor([[1, 2]], device=device)).sum().backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == (name in trained), name
    assert list(qnn.lora_state_dict(model)) == trained


def test_adapters_for_a_model_that_is_quantized_already(device: torch.device) -> None:
    model = _Model(device=device)
    replace_linear_layers(model, verbose=False)
    weight = model.layers[0]["q_proj"].weight
    with pytest.raises(ValueError, match=r"no linear layer to quantize.*4-bit already"):
        replace_linear_layers(model, verbose=False)
    report = replace_linear_layers(model, lora=LoraSpec(r=2), verbose=False)
    assert isinstance(model.layers[0]["q_proj"], LoraLinear4bit)
    assert model.layers[0]["q_proj"].weight is weight
    assert report.weights == 0
    assert str(report).startswith("LoRA on 4 layers")


def test_a_models_dtype_device_and_mode_are_kept(device: torch.device) -> None:
    model = _Model(device=device).to(torch.bfloat16).eval()
    replace_linear_layers(model, verbose=False, compute_dtype=torch.float32)
    layer = model.layers[0]["q_proj"]
    assert not layer.training
    assert layer.bias.dtype == torch.bfloat16
    assert layer.compute_dtype == torch.float32
    assert layer.dequantize_weight().dtype == torch.bfloat16
    with torch.device("meta"):
        meta = _Model()
    replace_linear_layers(meta, verbose=False)
    assert meta.layers[0]["q_proj"].weight.is_meta


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Linear4bit(0, 4), ValueError, "in_features must be a positive integer, got 0"),
        (lambda: Linear4bit(4, 2.0), ValueError, "out_features must be a positive integer"),
        (lambda: Linear4bit(4, 4, blocksize=48), ValueError, "blocksize must be one of 16, 32"),
        (lambda: Linear4bit(4, 4, quant_type="nf5"), ValueError, "did you mean 'nf4'"),
        (lambda: Linear4bit(4, 4, compute_dtype=torch.int8), ValueError, "compute_dtype must be"),
        (lambda: Linear4bit(4, 4, dtype=torch.float64), ValueError, "dtype must be float32"),
        (lambda: Linear4bit.from_linear(nn.Linear(4, 4).double()), ValueError, "float64 cannot be"),
        (lambda: LoraLinear4bit(4, 4, r=0), ValueError, "rank r must be a positive integer"),
        (lambda: LoraLinear4bit(4, 4, lora_dropout=1.0), ValueError, r"lora_dropout must be in"),
        (lambda: LoraLinear4bit(4, 4, lora_dtype=torch.int8), ValueError, "lora_dtype must be"),
        (lambda: Linear4bit(4, 6).set_weight(torch.ones(4, 6)), ValueError, r"shape \(6, 4\)"),
        (lambda: Linear4bit(4, 6)(torch.ones(2, 5)), ValueError, "x has 5 features.*takes 4"),
        # One row: half as many packed bytes would also fit another number of features.
        (lambda: Linear4bit(4, 1)(torch.ones(3)), ValueError, "x has 3 features.*takes 4"),
        (lambda: replace_linear_layers(nn.Linear(4, 4)), TypeError, "Linear4bit.from_linear"),
        (lambda: replace_linear_layers(nn.Sequential()), ValueError, "it has none"),
        (
            lambda: replace_linear_layers(_Model(), include="q_porj"),
            ValueError,
            "include pattern 'q_porj' matches no linear layer; nearest: q_proj",
        ),
        (
            lambda: replace_linear_layers(_Model(), lora=LoraSpec(target_modules=["k_proj"])),
            ValueError,
            "target_modules pattern 'k_proj'.*nearest: q_proj",
        ),
    ],
)
def test_bad_input_is_named_before_any_work(make, error, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        make()


def test_a_skip_that_matches_nothing_is_told() -> None:
    with pytest.warns(UserWarning, match="skip patterns that match no linear layer: lm_haed"):
        report = replace_linear_layers(_Model(), skip=["lm_haed"], verbose=False)
    assert report.unmatched == ["lm_haed"]


def test_repr_says_what_it_is() -> None:
    text = repr(LoraLinear4bit(8, 4, r=2, compute_dtype=torch.bfloat16))
    assert text == (
        "LoraLinear4bit(in_features=8, out_features=4, bias=True, quant_type='nf4', blocksize=64, "
        "compress_statistics=True, compute_dtype=torch.bfloat16, r=2, lora_alpha=16, "
        "lora_dropout=0)"
    )


# --- without gradients --------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_values_are_the_same(
    device: torch.device, mode, autocast: bool
) -> None:  # type: ignore[no-untyped-def]
    layer = LoraLinear4bit(64, 24, r=3, device=device)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(5, 64, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
        y = layer(x)
        with mode():
            z = layer(x)
    assert y.requires_grad
    assert not z.requires_grad
    assert z.dtype == y.dtype == (torch.bfloat16 if autocast else torch.float32)
    assert torch.equal(y, z)


def test_a_result_of_no_grad_can_go_on_into_autograd(device: torch.device) -> None:
    layer = Linear4bit(64, 24, device=device)
    with torch.no_grad():
        y = layer(torch.randn(5, 64, device=device))
    w = torch.randn(24, requires_grad=True, device=device)
    (y * w).sum().backward()
    assert w.grad is not None
