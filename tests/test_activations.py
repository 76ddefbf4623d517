"""RMSNorm and SwiGLU in one pass on every device, and what autograd keeps of a fused model."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import Tensor, nn

from qlora_kernels import activations
from qlora_kernels.activations import fuse, recompute, rms_norm, swiglu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((3, 5, 576), (7, 33), (1, 1), (2, 515), (0, 8))
# Of a value rounded once, and of fp32 sums of up to 576 terms that came before.
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def rand(
    *shape: int,
    dtype: torch.dtype,
    seed: int,
    scale: float = 1.0,
    device: torch.device | str = "cpu",
) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (scale * values).to(device, dtype)


def close(got: Tensor, want: Tensor, size: Tensor, dtype: torch.dtype) -> None:
    """Within one rounding to dtype, and 600 roundings in fp32 of terms of the given size."""
    bound = UNIT[dtype] * want.abs() + 600 * 2.0**-24 * size
    if dtype == torch.float16:
        bound = bound + 6 * 2.0**-25  # subnormals: of y, and of what is handed on times up to 5
    assert got.dtype == dtype
    assert ((got.double() - want).abs() <= bound).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_against_float64(kernels, shape, dtype):
    x = rand(*shape, dtype=dtype, seed=1, scale=3.0, device=kernels).requires_grad_()
    w = rand(shape[-1], dtype=dtype, seed=2, device=kernels)
    dy = rand(*shape, dtype=dtype, seed=3, device=kernels)
    y = rms_norm(x, w, 1e-5)
    x64 = x.detach().double().requires_grad_()
    h = x64 * torch.rsqrt(x64.pow(2).mean(-1, keepdim=True) + 1e-5)
    want = w.double() * h
    # Two roundings: of the normalized value, and of its product with the weight.
    close(y, want.detach(), (1 + UNIT[dtype] * 2**24 / 600) * want.detach().abs(), dtype)
    (dx,) = torch.autograd.grad(y, x, dy)
    (want,) = torch.autograd.grad(want, x64, dy.double())
    rstd = torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + 1e-5)
    g = dy.double() * w.double()
    size = rstd * (g.abs() + h.abs() * (g * h).abs().mean(-1, keepdim=True))
    close(dx, want, size.detach(), dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swiglu_against_float64(kernels, shape, dtype):
    gate = rand(*shape, dtype=dtype, seed=1, scale=6.0, device=kernels).requires_grad_()
    up = rand(*shape, dtype=dtype, seed=2, device=kernels).requires_grad_()
    dy = rand(*shape, dtype=dtype, seed=3, device=kernels)
    y = swiglu(gate, up)
    g, u = (t.detach().double().requires_grad_() for t in (gate, up))
    want = nn.functional.silu(g) * u
    close(y, want.detach(), (1 + UNIT[dtype] * 2**24 / 600) * want.detach().abs(), dtype)
    grads = torch.autograd.grad(y, (gate, up), dy)
    wants = torch.autograd.grad(want, (g, u), dy.double())
    for got, w, size in zip(grads, wants, ((dy * up).double(), (dy * gate).double()), strict=True):
        close(got, w, size.detach().abs(), dtype)


def test_swiglu_at_the_ends(kernels):
    """Exact to four units over the whole range of silu (CUDA's exp has one more), and NaN stays."""
    units = 4 if kernels.type == "cpu" else 6
    x = torch.linspace(-87, 200, 100_001, device=kernels)
    want = x.double() * torch.sigmoid(x.double())
    y = swiglu(x, torch.ones_like(x)).double()
    assert ((y - want).abs() <= units * 2**-24 * want.abs()).all()
    ends = torch.tensor([float("nan"), float("inf"), 0.0, -0.0, -1e30], device=kernels)
    y = swiglu(ends, torch.ones(5, device=kernels))
    assert y[0].isnan() and y[1] == float("inf") and y[2:4].eq(0).all() and abs(y[4]) < 1e-7


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_as_plain_torch(kernels, dtype):
    """The forward rounds where transformers' chains do: in 16 bits the same values, but where a
    sum's order moves a value across the middle between two."""
    x, w = (
        rand(40, 576, dtype=dtype, seed=1, device=kernels),
        rand(576, dtype=dtype, seed=2, device=kernels),
    )
    for got, want in (
        (rms_norm(x, w, 1e-6), activations._plain_rms_norm(x, w, 1e-6)[0]),
        (swiglu(x, x.flip(0)), activations._plain_swiglu(x, x.flip(0))),
    ):
        if dtype == torch.float32:
            assert torch.allclose(got, want, rtol=1e-5, atol=1e-6)
        else:
            assert (got != want).float().mean() < 1e-3


def test_strided_inputs(kernels):
    x = rand(64, 48, dtype=torch.float32, seed=1, device=kernels)
    w = rand(64, dtype=torch.float32, seed=2, device=kernels)
    assert torch.equal(rms_norm(x.T, w, 1e-6), rms_norm(x.T.contiguous(), w, 1e-6))
    assert torch.equal(swiglu(x.T, x.T), swiglu(x.T.contiguous(), x.T.contiguous()))


def test_threads_do_not_change_the_bits():
    x, w = rand(515, 576, dtype=torch.float32, seed=1), rand(576, dtype=torch.float32, seed=2)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append((rms_norm(x, w, 1e-6), swiglu(x, x)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_ops_are_what_torch_expects(device):
    x = rand(4, 32, dtype=torch.float32, seed=1, device=device).requires_grad_()
    w = rand(32, dtype=torch.float32, seed=2, device=device).requires_grad_()
    torch.library.opcheck(torch.ops.qlora_kernels.rms_norm.default, (x, w, 1e-6))
    torch.library.opcheck(torch.ops.qlora_kernels.swiglu.default, (x, x.detach().clone()))
    dy = rand(4, 32, dtype=torch.float32, seed=3, device=device)
    (dw,) = torch.autograd.grad(rms_norm(x, w, 1e-6), w, dy)
    (want,) = torch.autograd.grad(activations._plain_rms_norm(x, w, 1e-6)[0], w, dy)
    assert torch.allclose(dw, want, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "error", "word"),
    [
        (lambda: rms_norm(torch.ones(2, 8), torch.ones(9), 1e-6), ValueError, "weight"),
        (lambda: rms_norm(torch.ones(2, 8), torch.ones(8).half(), 1e-6), ValueError, "float16"),
        (lambda: rms_norm(torch.ones(2, 8).long(), torch.ones(8), 1e-6), TypeError, "int64"),
        (lambda: swiglu(torch.ones(2, 8), torch.ones(8, 2)), ValueError, r"\[8, 2\]"),
        (lambda: swiglu(torch.ones(2).double(), torch.ones(2).double()), TypeError, "float64"),
    ],
)
def test_bad_input(call, error, word):
    with pytest.raises(error, match=word):
        call()


# --- a fused model ------------------------------------------------------------------------------


def tiny(kind: str = "Llama", device: torch.device | str = "cpu", **options) -> nn.Module:
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        head_dim=16, pad_token_id=0, **options,
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    for name, p in model.named_parameters():  # norms of ones would hide a factor
        if "norm" in name:
            p.data = rand(*p.shape, dtype=p.dtype, seed=len(name))
    return model.to(device)


def kept_by_autograd(model: nn.Module, ids: Tensor) -> int:
    """Bytes of the storages that a forward pass leaves for the backward pass, parameters aside."""
    found: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        found[t.untyped_storage()._cdata] = t
        return t

    inner = activations._RECOMPUTED
    hook = pack if inner is None else lambda t: _count(inner.pack(t), pack)
    unpack = (lambda t: t) if inner is None else inner.unpack
    with torch.autograd.graph.saved_tensors_hooks(hook, unpack):
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    own = {p.untyped_storage()._cdata for p in [*model.parameters(), *model.buffers()]}
    return sum(t.untyped_storage().nbytes() for k, t in found.items() if k not in own)


def _count(packed, pack):
    return pack(packed) if isinstance(packed, Tensor) else packed


@pytest.mark.parametrize(
    ("kind", "norms", "mlps"),
    # Gemma's norms add one to their weight, and its MLPs use a GELU; Phi's gate and up are one.
    [("Llama", 5, 2), ("Mistral", 5, 2), ("Qwen2", 5, 2), ("Qwen3", 9, 2), ("Gemma", 0, 0),
     ("Phi3", 5, 0)],
)  # fmt: skip
def test_a_fused_model_is_the_same_model(device, kind, norms, mlps):
    plain = tiny(kind, device=device)
    fused = copy.deepcopy(plain)
    done = fuse(fused)
    assert (done.norms, done.mlps) == (norms, mlps)
    assert fused.state_dict().keys() == plain.state_dict().keys()
    ids = torch.arange(24, device=device).view(2, 12)
    grads = []
    for model in (plain, fused):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        grads.append((loss, *[p.grad for p in model.parameters()]))
    for got, want in zip(grads[1], grads[0], strict=True):
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))
    done.undo()
    assert torch.equal(fused(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_recompute_keeps_less_and_gives_the_same_bits(device):
    """Adapters, so that each projection keeps its input; everything else frozen."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(tiny(device=device), LoraConfig(r=4, target_modules="all-linear"))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_()
    ids = torch.arange(24, device=device).view(2, 12)
    kept, grads = [], []

    def step() -> None:
        model.zero_grad()
        kept.append(kept_by_autograd(model, ids))
        grads.append([p.grad for p in model.parameters() if p.requires_grad])

    step()
    fuse(model)
    step()
    with recompute():
        step()
    assert kept[0] > kept[1] > kept[2]
    # A token's worth in a layer, in numbers: two norms' and one SwiGLU's results.
    assert kept[1] - kept[2] >= 4 * ids.numel() * 2 * (2 * 64 + 128)
    for a, b in zip(grads[1], grads[2], strict=True):
        assert torch.equal(a, b)
    assert activations._RECOMPUTED is None


def test_recompute_does_not_take_a_changed_or_another_tensor(device):
    x = rand(4, 32, dtype=torch.float32, seed=1, device=device).requires_grad_()
    w, a = (
        rand(32, dtype=torch.float32, seed=2, device=device),
        rand(32, dtype=torch.float32, seed=3, device=device),
    )
    a.requires_grad_()
    with recompute():
        y = rms_norm(x, w, 1e-6)
        changed = y.detach().mul_(2)  # in place: y's memory now holds something else
        out = (changed * a).sum()  # keeps `changed` for a's gradient
        first = rms_norm(x, w, 1e-6)
        part = (first[:, ::2] * a[::2]).sum()  # keeps a part only
        del y, first
    da = torch.autograd.grad(out + part, a)[0]
    plain = rms_norm(x.detach(), w, 1e-6)
    want = 2 * plain.sum(0)
    want[::2] += plain[:, ::2].sum(0)
    assert torch.allclose(da, want, atol=1e-5)


def test_backward_twice_and_second_forward(device):
    x = rand(4, 32, dtype=torch.float32, seed=1, device=device).requires_grad_()
    w = rand(32, dtype=torch.float32, seed=2, device=device)
    a = rand(32, dtype=torch.float32, seed=3, device=device).requires_grad_()
    with recompute():
        loss = (rms_norm(x, w, 1e-6) * a).sum()
        other = (swiglu(x, x * 2) * a).sum()
    one = torch.autograd.grad(loss, (x, a), retain_graph=True)
    two = torch.autograd.grad(loss, (x, a))
    assert all(torch.equal(p, q) for p, q in zip(one, two, strict=True))
    (da,) = torch.autograd.grad(other, a)
    assert torch.equal(da, swiglu(x, x * 2).sum(0))
