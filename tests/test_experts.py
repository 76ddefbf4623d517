"""A stack of experts in 4 bits: each quantized by itself, values and gradients of the dense stack,
and never a dense copy of it. The stand-ins are laid out as transformers' stacks are."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_kernels import functional as F4
from qlora_kernels.experts import experts_linear_4bit
from qlora_kernels.formats import FORMATS, Format, get_format
from qlora_kernels.nn import (
    Experts4bit,
    Linear4bit,
    expert_parameters,
    footprint,
    replace_linear_layers,
)

E, H, I = 5, 40, 24  # blocks of 64 cross rows, and would cross experts if they could


class Stack(nn.Module):
    """Gated experts ``[E, out, in]``, as most are."""

    has_gate, has_bias, is_transposed, has_post_expert_norm = True, False, False, False

    def __init__(self, experts: int = E, hidden: int = H, inner: int = I) -> None:
        super().__init__()
        self.num_experts = experts
        self.act_fn = nn.SiLU()
        up = "gate_up_proj" if self.has_gate else "up_proj"
        for name, n, k in ((up, (1 + self.has_gate) * inner, hidden), ("down_proj", hidden, inner)):
            size = (experts, k, n) if self.is_transposed else (experts, n, k)
            self.register_parameter(name, nn.Parameter(torch.randn(size) / k**0.5))
            if self.has_bias:
                bias = nn.Parameter(torch.randn(experts, n))
                self.register_parameter(f"{name}_bias", bias)

    def _apply_gate(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return self.act_fn(gate) * up

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        y = []
        for row, experts, w in zip(x, index, weights, strict=True):
            total = torch.zeros_like(row)
            for e, share in zip(experts.tolist(), w, strict=True):
                h = self._one("gate_up_proj" if self.has_gate else "up_proj", row, e)
                h = self._one("down_proj", self._apply_gate(h) if self.has_gate else F.silu(h), e)
                total = total + share * (
                    self.post_expert_norm(h) if self.has_post_expert_norm else h
                )
            y.append(total)
        return torch.stack(y)

    def _one(self, name: str, row: Tensor, e: int) -> Tensor:
        w = getattr(self, name)[e]
        bias = getattr(self, f"{name}_bias")[e] if self.has_bias else None
        return F.linear(row, w.T if self.is_transposed else w, bias)


class Odd(Stack):
    """Turned around, with biases and interleaved gates, as gpt-oss has them."""

    has_bias, is_transposed = True, True

    def _apply_gate(self, x: Tensor) -> Tensor:
        return x[..., ::2].sigmoid() * (x[..., 1::2] + 1)


class Plain(Stack):
    """No gate, and a norm behind."""

    has_gate, has_post_expert_norm = False, True

    def __init__(self) -> None:
        super().__init__()
        self.post_expert_norm = nn.LayerNorm(H)


KINDS = [Stack, Odd, Plain]
E2M1 = Format("experts_e2m1", get_format("fp4_e2m1").codebook, scale="e4m3")  # as NVFP4


@pytest.fixture(autouse=True)
def _forget_formats() -> Iterator[None]:
    known = dict(FORMATS)
    yield
    FORMATS.clear()
    FORMATS.update(known)


def routed(tokens: int = 9, k: int = 2, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """x, index, weights; expert 3 gets nothing."""
    allowed = torch.tensor([0, 1, 2, 4])
    index = torch.stack([allowed[torch.randperm(4)[:k]] for _ in range(tokens)])
    return torch.randn(tokens, H, dtype=dtype), index, torch.rand(tokens, k, dtype=dtype)


# --- what is quantized --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type, blocksize", [("nf4", 64), ("fp4", 32), (E2M1, 16)])
def test_each_expert_is_quantized_as_a_layer_of_its_own(
    kind: type[Stack], nested: bool, quant_type: str | Format, blocksize: int
) -> None:
    nested &= quant_type is not E2M1  # its scales are of one byte already
    dense = kind()
    how = {"quant_type": quant_type, "blocksize": blocksize, "compress_statistics": nested}
    packed = Experts4bit.from_experts(dense, **how)  # type: ignore[arg-type]
    for name in expert_parameters(dense):
        weight = getattr(dense, name).detach()
        for e in range(E):
            one = weight[e].T if kind.is_transposed else weight[e]
            bits, state = F4.quantize_4bit(one.contiguous(), **how)  # type: ignore[arg-type]
            assert torch.equal(getattr(packed, name)[e], bits.view(-1))
            assert torch.equal(packed.get_buffer(f"{name}_absmax")[e], state.absmax)
            want = F4.dequantize_4bit(bits, state)
            assert torch.equal(packed.dequantize_expert(name, e), want)
            assert torch.equal(
                packed.dequantize_weight(name)[e], want.T if kind.is_transposed else want
            )


def test_no_block_crosses_experts() -> None:
    a, b = Stack(), Stack()
    with torch.no_grad():
        for name in ("gate_up_proj", "down_proj"):
            getattr(b, name)[1:] = getattr(a, name)[1:]
    first, second = Experts4bit.from_experts(a), Experts4bit.from_experts(b)
    for key, value in first.state_dict().items():
        other = second.state_dict()[key]
        if not key.endswith("quant_map"):
            assert torch.equal(value[1:], other[1:]), key
            assert not torch.equal(value[0], other[0]), key


def test_it_takes_4_13_bits_a_weight() -> None:
    packed = Experts4bit.from_experts(Stack(8, 256, 128))
    weights = 8 * 3 * 256 * 128
    assert packed.bits_per_weight == pytest.approx(4.127, abs=1e-3)
    # ... and the offset of each stack's experts
    assert 8 * packed.packed_bytes() / weights == pytest.approx(4.127, abs=5e-3)
    told = footprint(packed)
    assert (told.stacks, told.weights, told.packed_bytes) == (1, weights, packed.packed_bytes())
    assert told.kept == []


# --- value and gradient -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_dense_stack_of_its_dequantized_weights(kind: type[Stack]) -> None:
    packed = Experts4bit.from_experts(kind())
    dense = packed.dequantize()
    assert type(dense) is kind
    assert isinstance(packed, kind)
    x, index, weights = routed()
    x.requires_grad_()
    weights.requires_grad_()
    leaves = [x, weights]
    if kind.has_bias:
        assert dense.down_proj_bias is packed.down_proj_bias  # shared, and trained as it was
        leaves += [packed.down_proj_bias, packed.gate_up_proj_bias]
    dy = torch.randn_like(x)
    want, got = dense(x, index, weights), packed(x, index, weights)
    torch.testing.assert_close(got, want)
    for a, b in zip(
        torch.autograd.grad(want, leaves, dy), torch.autograd.grad(got, leaves, dy), strict=True
    ):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)


def adapters(dense: nn.Module, ranks: tuple[int, ...]) -> dict[str, list[tuple]]:
    made: dict[str, list[tuple]] = {}
    for name in expert_parameters(dense):
        _, n, k = getattr(dense, name).shape
        n, k = (k, n) if dense.is_transposed else (n, k)
        made[name] = [
            (
                (torch.randn(E, r, k) / 8).requires_grad_(),
                (torch.randn(E, n, r) / 8).requires_grad_(),
                0.5 * r,
            )
            for r in ranks
        ]
    return made


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [(3,), (2, 5)], ids=["one", "two"])
def test_adapters_are_added_to_the_weight(kind: type[Stack], ranks: tuple[int, ...]) -> None:
    packed = Experts4bit.from_experts(kind())
    lora = adapters(packed.dequantize(), ranks)
    twin = packed.dequantize()
    x, index, weights = routed()
    dy = torch.randn_like(x)
    leaves = [t for pairs in lora.values() for a, b, _ in pairs for t in (a, b)]
    for name, pairs in lora.items():
        dense = getattr(twin, name)
        for a, b, scaling in pairs:
            delta = scaling * (b @ a)
            dense = dense + (delta.transpose(1, 2) if kind.is_transposed else delta)
        del twin._parameters[name]
        setattr(twin, name, dense)
    want, got = twin(x, index, weights), packed(x, index, weights, lora)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    wanted = torch.autograd.grad(want, leaves, dy)
    for a, b in zip(wanted, torch.autograd.grad(got, leaves, dy), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)
        assert b[3].abs().max() == 0  # the expert that got nothing
        assert b[0].abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_other_dtypes(dtype: torch.dtype, autocast: bool) -> None:
    packed = Experts4bit.from_experts(Stack())
    x, index, weights = routed()
    want = packed(x, index, weights)
    with torch.autocast("cpu", dtype, enabled=autocast):
        given = x if autocast else x.to(dtype)
        got = packed(given, index, weights if autocast else weights.to(dtype))
    assert got.dtype == given.dtype
    torch.testing.assert_close(got.float(), want, rtol=0, atol=8 * torch.finfo(dtype).eps)
    narrow = Experts4bit.from_experts(Stack(), compute_dtype=dtype)
    assert narrow(x, index, weights).dtype == x.dtype


def test_the_op_is_linear_4bit_on_each_slice_bit_for_bit() -> None:
    packed = Experts4bit.from_experts(Stack())
    stack = packed._stack("down_proj")
    x = torch.randn(8, I, requires_grad=True)
    ends = torch.tensor([2, 2, 5, 6, 6])  # two experts without rows, two rows of none
    a, b = torch.randn(E, 4, I, requires_grad=True), torch.randn(E, H, 4, requires_grad=True)
    bias = torch.randn(E, H, requires_grad=True)
    y = experts_linear_4bit(x, ends, stack, H, bias, a, b, 0.5)
    dy = torch.randn_like(y)
    grads = torch.autograd.grad(y, (x, bias, a, b), dy)
    assert torch.equal(y[6:], torch.zeros(2, H))
    assert torch.equal(grads[0][6:], torch.zeros(2, I))
    for e, rows in ((0, slice(0, 2)), (2, slice(2, 5)), (3, slice(5, 6))):
        args = [t.detach()[e].clone().requires_grad_() for t in (bias, a, b)]
        xe = x.detach()[rows].requires_grad_()
        layer = Linear4bit(I, H, False, quant_type="nf4", device="meta")
        layer.set_weight(packed.dequantize_expert("down_proj", e))
        w = (stack[0][e], stack[1][e], stack[2], 64, stack[4][e], stack[5], stack[6][e])
        want = F4.run_linear(xe, w, H, args[0], (args[1], args[2], None), 0.5, torch.float32)
        assert torch.equal(y[rows], want)
        told = torch.autograd.grad(want, (xe, *args), dy[rows])
        assert torch.equal(grads[0][rows], told[0])
        torch.testing.assert_close(grads[1][e], told[1])
        assert torch.equal(grads[2][e], told[2])
        assert torch.equal(grads[3][e], told[3])
    for e in (1, 4):
        assert not any(g[e].any() for g in grads[1:])
    torch.library.opcheck(
        torch.ops.qlora_kernels.experts_linear_4bit.default,
        (x, ends, *stack, H, bias, a, b, 0.5, torch.float32),
    )


def test_it_compiles_in_one_graph_and_for_any_routing() -> None:
    packed = Experts4bit.from_experts(Stack())
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        x, index, weights = routed()
        assert torch.equal(compiled(x, index, weights), packed(x, index, weights))


# --- memory -------------------------------------------------------------------------------------


def allocations(run: Callable[[], object]) -> tuple[int, int]:
    """The largest tensor that ``run`` allocates and the most that it holds at once, in bytes: of
    every allocation that torch makes, those inside of ops included."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run()
    sizes = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for size in sizes:
        held += size
        peak = max(peak, held)
    return max(sizes, default=0), peak


@pytest.mark.parametrize("lora", [False, True])
def test_no_pass_holds_more_than_one_dense_expert(lora: bool) -> None:
    """Few rows, so that weights are what memory could go to."""
    experts, hidden, inner = 16, 128, 96
    packed = Experts4bit.from_experts(Stack(experts, hidden, inner))
    dense = packed.dequantize()
    one = 4 * 2 * inner * hidden  # bytes of one expert's gate_up_proj
    index = torch.randperm(experts).view(-1, 2)  # all experts are hit
    x = torch.randn(experts // 2, hidden, requires_grad=True)
    weights = torch.rand(experts // 2, 2)
    made = {}
    if lora:
        a = torch.randn(experts, 2, hidden, requires_grad=True)
        made = {"gate_up_proj": [(a, torch.randn(experts, 2 * inner, 2, requires_grad=True), 1.0)]}

    def step(model: nn.Module, *more: object) -> None:
        model(x, index, weights, *more).sum().backward()

    step(packed, made)  # tables and threads' buffers are there
    largest, peak = allocations(lambda: step(packed, made))
    assert largest <= 1.1 * one
    assert peak < 2 * one < experts * one / 4
    # The instrument sees a dense stack where there is one.
    assert allocations(packed.dequantize)[0] >= experts * one
    assert allocations(lambda: step(dense))[1] < experts * one  # the dense twin makes none either


def test_quantizing_holds_one_expert_at_a_time() -> None:
    experts, hidden, inner = 16, 128, 96
    dense = Stack(experts, hidden, inner)
    packed_bytes = Experts4bit.from_experts(dense).packed_bytes()
    one = 4 * 2 * inner * hidden
    _, peak = allocations(lambda: Experts4bit.from_experts(dense))
    assert peak < packed_bytes + 3 * one


# --- a module as others -------------------------------------------------------------------------


def test_it_moves_without_being_cast() -> None:
    packed = Experts4bit.from_experts(Odd())
    before = {k: v.clone() for k, v in packed.state_dict().items()}
    packed.to(torch.bfloat16).half().float().type(torch.float64)
    for key, value in packed.state_dict().items():
        if "bias" in key:
            assert value.dtype == torch.float64
        else:
            assert torch.equal(value, before[key]), key
    assert all(v.is_meta for v in packed.to("meta").state_dict().values())


def test_copies_pickles_and_state_dicts() -> None:
    packed = Experts4bit.from_experts(Stack())
    args = routed()
    want = packed(*args)
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert type(other) is type(packed)
        assert torch.equal(other(*args), want)
        assert other.down_proj is not packed.down_proj
    other = Experts4bit.from_experts(Stack())
    assert not torch.equal(other(*args), want)
    other.load_state_dict(packed.state_dict())
    assert torch.equal(other(*args), want)


def test_replacing_quantizes_experts_too(capsys: pytest.CaptureFixture[str]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(
                nn.ModuleDict({"q_proj": nn.Linear(H, H), "experts": Stack()}) for _ in range(2)
            )

    model = Model()
    want = Experts4bit.from_experts(model.layers[1]["experts"])  # type: ignore[index]
    report = replace_linear_layers(model)
    got = model.layers[1]["experts"]  # type: ignore[index]
    for key, value in want.state_dict().items():
        assert torch.equal(got.state_dict()[key], value)
    assert report.experts["layers.0.experts"] == {
        "gate_up_proj": (E, 2 * I, H),
        "down_proj": (E, H, I),
    }
    assert report.weights == 2 * (H * H + 3 * E * H * I)
    assert "2 linear layers and 2 layers of experts to nf4" in capsys.readouterr().out
    told = footprint(model)
    assert (told.linears, told.stacks, told.weights) == (2, 2, report.weights)
    assert [(k.name, k.tensors, k.bytes) for k in told.kept] == [
        ("layers.*.q_proj.bias", 2, 2 * 4 * H)
    ]
    assert "layers.*.q_proj.bias x 2" in str(told)

    report = replace_linear_layers(Model(), skip="experts", verbose=False)
    assert report.experts == {}
    assert report.skipped["layers.0.experts"] == "skip 'experts'"
    report = replace_linear_layers(Model(), include="experts", verbose=False)
    assert list(report.experts) == ["layers.0.experts", "layers.1.experts"]
    assert not report.replaced


# --- errors -------------------------------------------------------------------------------------


def test_what_is_no_stack_is_refused() -> None:
    class Unlike(Stack):
        def __init__(self) -> None:
            super().__init__()
            self.down_proj = nn.Parameter(torch.randn(H, I))

    for module in (nn.Linear(2, 2), Unlike(), Experts4bit.from_experts(Stack())):
        with pytest.raises(TypeError, match="is no stack of dense experts"):
            Experts4bit.from_experts(module)
    assert expert_parameters(nn.Linear(2, 2)) == expert_parameters(Unlike()) == []
    with pytest.raises(ValueError, match="gate_up_proj of torch.float64 cannot be quantized"):
        Experts4bit.from_experts(Stack().double())
    with pytest.raises(ValueError, match=r"compute_dtype must be float32, .* got torch.int8"):
        Experts4bit.from_experts(Stack(), compute_dtype=torch.int8)
    with pytest.raises(ValueError, match="blocksize"):
        Experts4bit.from_experts(Stack(), blocksize=48)


@pytest.mark.parametrize(
    "weight, message",
    [
        (torch.zeros(E, H, I + 1), r"must have shape \(5, 40, 24\), got \(5, 40, 25\)"),
        ([torch.zeros(H, I)] * (E - 1), "down_proj has 5 experts, got 4"),
        ([torch.zeros(H, I)] * (E + 1), "down_proj has 5 experts, got more"),
        ([torch.zeros(H, I), torch.zeros(I, H)], r"expert 1 of down_proj must have shape"),
    ],
)
def test_a_weight_that_does_not_fit_changes_nothing(weight, message: str) -> None:  # type: ignore[no-untyped-def]
    packed = Experts4bit.from_experts(Stack())
    before = packed.state_dict()
    before = {k: v.clone() for k, v in before.items()}
    with pytest.raises(ValueError, match=message):
        packed.set_weight("down_proj", weight)
    assert all(torch.equal(v, before[k]) for k, v in packed.state_dict().items())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(2, 2, I)}, r"x must be \[rows, in_features\]"),
        ({"ends": torch.tensor([1, 2])}, r"packed must be \[2, 480\] for 2 weights"),
        ({"ends": torch.zeros(E)}, "ends must be int64"),
        ({"ends": torch.tensor([0, 1, 0, 3, 3])}, r"ends\[2\] is 0, not in 1 ... 4"),
        ({"ends": torch.tensor([0, 1, 2, 3, 5])}, r"ends\[4\] is 5, not in 3 ... 4"),
        ({"bias": torch.zeros(H)}, r"bias must be \[5, 40\], got \[40\]"),
        ({"lora_a": torch.zeros(E, 2, I)}, "both lora_a and lora_b"),
        (
            {"lora_a": torch.zeros(E, 2, I), "lora_b": torch.zeros(E, H, 3)},
            r"lora_b \[5, 40, rank\], got",
        ),
    ],
)
def test_the_op_names_what_does_not_fit(change, message: str) -> None:  # type: ignore[no-untyped-def]
    stack = Experts4bit.from_experts(Stack())._stack("down_proj")
    good = {"x": torch.zeros(4, I), "ends": torch.tensor([0, 1, 2, 3, 4])}
    args = {**good, "weight": stack, "out_features": H, **change}
    with pytest.raises(ValueError, match=message):
        experts_linear_4bit(**args)
