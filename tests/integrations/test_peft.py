"""PEFT on Linear4bit: which layers it makes, and that they compute, train, merge and save rightly.

The judge is PEFT itself on the *dense twin*: the same model with each 4-bit layer replaced by an
``nn.Linear`` of its dequantized weight. fp32 throughout differs from it by rounding alone.
"""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from peft.tuners.lora.layer import Linear as PeftLinear  # noqa: E402

import qlora_kernels  # noqa: E402
from qlora_kernels import nn as qnn  # noqa: E402
from qlora_kernels.integrations.peft import FusedLoraLinear, install  # noqa: E402
from qlora_kernels.nn import (  # noqa: E402
    CheckpointError,
    Linear4bit,
    LoraLinear4bit,
    replace_linear_layers,
)

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def tiny_llama(**changes: object) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **changes,
    )
    return transformers.LlamaForCausalLM(config)


@pytest.fixture
def model() -> nn.Module:
    model = tiny_llama()
    replace_linear_layers(model, verbose=False)
    return model


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 96, (2, 7))


def dense_twin(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model)
    for name, module in list(twin.named_modules()):
        if isinstance(module, Linear4bit):
            twin.set_submodule(name, module.dequantize(torch.float32))
    return twin


def randomize(model: nn.Module) -> None:
    """B is zero at first, and would hide what is wrong with A."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)


def lora_layers(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, PeftLinear)]


def copy_adapter(source: nn.Module, target: nn.Module) -> None:
    state = peft.get_peft_model_state_dict(source)
    result = peft.set_peft_model_state_dict(target, state)
    assert not result.unexpected_keys


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What the forward op was called with: 'plain', 'a' (A and B) or 's' (S and B)."""
    seen: list[str] = []
    run = qnn.F4.run_linear

    def counted(x, weight, out_features, bias, lora, *rest):  # type: ignore[no-untyped-def]
        _, b, s = lora
        seen.append("plain" if b is None else "a" if s is None else "s")
        return run(x, weight, out_features, bias, lora, *rest)

    monkeypatch.setattr(qnn.F4, "run_linear", counted)
    return seen


# --- which layers -------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", ["all-linear", TARGETS, ["q_proj"]], ids=str)
def test_a_plain_config_gives_fused_layers(model, ids, calls, targets) -> None:  # type: ignore[no-untyped-def]
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=targets))
    layers = lora_layers(tuned)
    assert len(layers) == (2 if targets == ["q_proj"] else 14)
    assert all(type(layer) is FusedLoraLinear for layer in layers)
    assert all(p.dtype == torch.float32 for n, p in tuned.named_parameters() if "lora_" in n)
    tuned(ids)
    assert calls.count("a") == len(layers)  # one op a layer, LoRA in it
    assert len(calls) == 14


def test_layers_of_others_are_peft_s_own() -> None:
    tuned = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules="all-linear"))
    assert all(type(layer) is PeftLinear for layer in lora_layers(tuned))


def test_installing_again_wraps_nothing_twice() -> None:
    import peft.tuners.lora.model as lora_model

    before = lora_model.dispatch_default
    install()
    assert lora_model.dispatch_default is before


def test_our_own_lora_layer_is_not_taken_for_a_plain_one() -> None:
    model = nn.Sequential(LoraLinear4bit(64, 32, r=2))
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["0"]))
    x = torch.randn(3, 64)
    nn.init.normal_(model[0].base_layer.lora_B)
    assert type(model[0]) is PeftLinear
    torch.testing.assert_close(tuned(x), model[0].base_layer(x))


ORDERS = {
    "peft-first": "import peft, qlora_kernels.integrations.peft",
    "install-first": "import qlora_kernels.integrations as i; i.install(); import peft",
    "in-between": "import peft; import qlora_kernels.integrations as i; i.install()",
}


@pytest.mark.parametrize(
    "order",
    [pytest.param(o, marks=[] if o == "install-first" else pytest.mark.full) for o in ORDERS],
)
def test_the_order_of_imports_does_not_matter(order: str) -> None:
    code = f"""
import sys
{ORDERS[order]}
import torch
from qlora_kernels.nn import Linear4bit
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = Linear4bit(16, 16)
tuned = peft.get_peft_model(Model(), peft.LoraConfig(r=2, target_modules="all-linear"))
print(type(tuned.base_model.model.proj).__name__)
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
print("qlora_kernels" in AUTO_QUANTIZER_MAPPING or "{order}" == "peft-first")
"""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=root
    )
    assert done.stdout.split() == ["FusedLoraLinear", "True"], done.stderr


# --- the same numbers as PEFT's -----------------------------------------------------------------


CONFIGS: dict[str, dict[str, object]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "lora_alpha": 4},
    "rank-pattern": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 32}},
    "dora": {"use_dora": True},
    "bias": {"lora_bias": True},
    "gaussian": {"init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_value_and_gradients_are_those_of_the_dense_twin(name: str, ids) -> None:  # type: ignore[no-untyped-def]
    model = tiny_llama(attention_bias=True, mlp_bias=True)
    replace_linear_layers(model, verbose=False)
    config = LoraConfig(r=4, target_modules="all-linear", **CONFIGS[name])  # type: ignore[arg-type]
    twin = get_peft_model(dense_twin(model), copy.deepcopy(config))
    tuned = get_peft_model(model, config)
    randomize(tuned)
    copy_adapter(tuned, twin)
    out, want = tuned(ids, labels=ids), twin(ids, labels=ids)
    torch.testing.assert_close(out.logits, want.logits, rtol=1e-4, atol=1e-5)
    out.loss.backward()
    want.loss.backward()
    theirs = dict(twin.named_parameters())
    trained = [n for n, p in tuned.named_parameters() if p.requires_grad]
    assert trained == [n for n, p in twin.named_parameters() if p.requires_grad]
    for key, parameter in tuned.named_parameters():
        if parameter.requires_grad:
            grad = theirs[key].grad
            atol = 1e-4 * grad.abs().max().item()
            torch.testing.assert_close(parameter.grad, grad, rtol=1e-3, atol=atol, msg=key)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_sees_the_same_masks_in_both_passes(model, ids, calls, checkpointing: bool) -> None:  # type: ignore[no-untyped-def]
    config = LoraConfig(r=4, lora_dropout=0.4, target_modules="all-linear")
    twin = get_peft_model(dense_twin(model), copy.deepcopy(config))
    tuned = get_peft_model(model, config)
    randomize(tuned)
    copy_adapter(tuned, twin)
    losses = []
    for each in (tuned, twin):
        each.train()
        if checkpointing:
            each.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(5)
        loss = each(ids, labels=ids).loss
        loss.backward()
        losses.append(loss.item())
    assert set(calls) == {"s"}
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    theirs = dict(twin.named_parameters())
    for key, parameter in tuned.named_parameters():
        if parameter.requires_grad:
            grad = theirs[key].grad
            atol = 1e-4 * grad.abs().max().item()
            torch.testing.assert_close(parameter.grad, grad, rtol=1e-3, atol=atol, msg=key)
    calls.clear()
    tuned.eval()(ids)
    assert set(calls) == {"a"}


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lora_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_every_dtype_that_scripts_send(
    x_dtype: torch.dtype, lora_dtype: torch.dtype, autocast: bool, dropout: float
) -> None:
    model = nn.Sequential(Linear4bit(64, 32, dtype=torch.bfloat16))
    config = LoraConfig(r=4, target_modules=["0"], lora_dropout=dropout)
    tuned = get_peft_model(model, config)
    randomize(tuned)
    layer = model[0]
    layer.lora_A.to(lora_dtype)
    layer.lora_B.to(lora_dtype)
    x = torch.randn(5, 64, dtype=x_dtype, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        torch.manual_seed(2)
        y = tuned(x)
        torch.manual_seed(2)
        want = PeftLinear.forward(layer, x)  # PEFT's own, unfused, on the same layer
    assert y.dtype == want.dtype
    torch.testing.assert_close(y.float(), want.float(), rtol=0.03, atol=0.03)
    y.float().pow(2).sum().backward()
    for t in (x, layer.lora_A["default"].weight, layer.lora_B["default"].weight):
        assert t.grad is not None
        assert t.grad.dtype == t.dtype
        assert t.grad.isfinite().all()
        assert t.grad.any()


def test_after_prepare_model_for_kbit_training(model, ids) -> None:  # type: ignore[no-untyped-def]
    model = model.to(torch.bfloat16)
    model.is_loaded_in_4bit = True
    scales = {n: b.dtype for n, b in model.named_buffers()}
    bytes_before = model.model.layers[0].mlp.up_proj.weight.clone()
    model = peft.prepare_model_for_kbit_training(model)
    assert {n: b.dtype for n, b in model.named_buffers()} == scales
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, bytes_before)
    assert all(
        m.gradient_checkpointing for m in model.modules() if hasattr(m, "gradient_checkpointing")
    )
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear")).train()
    randomize(tuned)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tuned(ids, labels=ids).loss.backward()
    for name, p in tuned.named_parameters():
        assert (p.grad is not None) == p.requires_grad == ("lora_" in name), name


# --- several adapters, switching, disabling -----------------------------------------------------


def test_switching_and_disabling_adapters(model, ids, calls) -> None:  # type: ignore[no-untyped-def]
    base = model(ids).logits
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"), "one")
    tuned.add_adapter("two", LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    randomize(tuned)
    tuned.set_adapter("one")
    one = tuned(ids).logits
    calls.clear()
    tuned.set_adapter("two")
    two = tuned(ids).logits
    assert (calls.count("a"), calls.count("plain")) == (4, 10)  # "two" is on 4 of the 14
    with tuned.disable_adapter():
        assert torch.equal(tuned(ids).logits, base)
    assert torch.equal(tuned(ids).logits, two)
    tuned.set_adapter("one")
    assert torch.equal(tuned(ids).logits, one)
    tuned.delete_adapter("two")
    assert torch.equal(tuned(ids).logits, one)
    assert torch.equal(tuned.unload()(ids).logits, base)


def test_two_active_adapters_run_unfused_and_right(model, ids, calls) -> None:  # type: ignore[no-untyped-def]
    config = LoraConfig(r=4, target_modules="all-linear")
    twin = get_peft_model(dense_twin(model), config, "one")
    tuned = get_peft_model(model, config, "one")
    for each in (tuned, twin):
        each.add_adapter("two", LoraConfig(r=2, target_modules=["q_proj"]))
    randomize(tuned)
    for name in ("one", "two"):
        state = peft.get_peft_model_state_dict(tuned, adapter_name=name)
        peft.set_peft_model_state_dict(twin, state, adapter_name=name)
    for each in (tuned, twin):
        each.base_model.set_adapter(["one", "two"])
    torch.testing.assert_close(tuned(ids).logits, twin(ids).logits, rtol=1e-4, atol=1e-5)
    assert set(calls) == {"plain"}


def test_adapters_mixed_in_one_batch(model, ids) -> None:  # type: ignore[no-untyped-def]
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"), "one").eval()
    tuned.add_adapter("two", LoraConfig(r=2, target_modules="all-linear"))
    randomize(tuned)
    tuned.set_adapter("two")
    two = tuned(ids[1:]).logits
    mixed = tuned(ids, adapter_names=["__base__", "two"]).logits
    with tuned.disable_adapter():
        base = tuned(ids[:1]).logits
    torch.testing.assert_close(mixed, torch.cat([base, two]), rtol=1e-4, atol=1e-5)


def test_hooks_on_inner_layers_are_called(model, ids, calls) -> None:  # type: ignore[no-untyped-def]
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"]))
    randomize(tuned)
    want = tuned(ids).logits
    layer = lora_layers(tuned)[0]
    for inner in (layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]):
        seen: list[torch.Tensor] = []
        hook = inner.register_forward_hook(lambda m, i, o, seen=seen: seen.append(o))
        torch.testing.assert_close(tuned(ids).logits, want, rtol=1e-4, atol=1e-5)
        assert len(seen) == 1
        hook.remove()
    calls.clear()
    tuned(ids)
    assert calls.count("a") == 2


# --- initialisations that read the base weight --------------------------------------------------


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "orthogonal"])
def test_initialisations_see_the_dense_weight(init: str, model, ids) -> None:  # type: ignore[no-untyped-def]
    base = model(ids).logits
    weights = {n: m.dequantize_weight() for n, m in model.named_modules() if type(m) is Linear4bit}
    config = LoraConfig(
        r=4,
        lora_alpha=4,
        target_modules="all-linear",
        init_lora_weights=init,
    )
    tuned = get_peft_model(model, config)
    for name, module in tuned.base_model.model.named_modules():
        if isinstance(module, FusedLoraLinear):
            whole = module.base_layer.dequantize_weight() + module.get_delta_weight("default")
            # W - s B A is quantized again: the sum is W up to NF4's rounding of the residual.
            error = (whole - weights[name]).norm() / weights[name].norm()
            assert error < 0.15, (name, error)
    assert (tuned(ids).logits - base).norm() < 0.3 * base.norm()
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            assert parameter.dtype == torch.float32
            assert parameter.isfinite().all()
            assert init == "orthogonal" or parameter.any(), name


class TestLoftQ:
    """What quantization lost, by the singular values of it."""

    @pytest.fixture
    def dense(self) -> nn.Module:
        return tiny_llama()

    @pytest.fixture
    def tuned(self, dense: nn.Module) -> nn.Module:
        model = copy.deepcopy(dense)
        replace_linear_layers(model, verbose=False)
        return get_peft_model(model, LoraConfig(r=8, lora_alpha=4, target_modules="all-linear"))

    def test_the_adapter_is_the_best_approximation(self, dense, tuned, ids) -> None:  # type: ignore[no-untyped-def]
        packed = {n: m.weight.clone() for n, m in tuned.named_modules() if type(m) is Linear4bit}
        before = (tuned(ids).logits - dense(ids).logits).norm()
        errors = qlora_kernels.loftq_init(tuned, dense.state_dict())
        assert (tuned(ids).logits - dense(ids).logits).norm() < 0.9 * before
        layers = {n: m for n, m in tuned.base_model.model.named_modules() if n in errors}
        assert len(errors) == 14 and all(type(m) is FusedLoraLinear for m in layers.values())
        for name, layer in layers.items():
            weight = dense.get_submodule(name).weight.detach()
            residual = weight - layer.base_layer.dequantize_weight(torch.float32)
            values = torch.linalg.svdvals(residual)  # Eckart and Young
            best = values[8:].square().sum().sqrt() / weight.norm()
            left = residual - layer.get_delta_weight("default").detach()
            assert errors[name].before == pytest.approx(float(residual.norm() / weight.norm()))
            assert errors[name].after == pytest.approx(float(best), rel=1e-4)
            assert errors[name].after == pytest.approx(float(left.norm() / weight.norm()), rel=1e-4)
        now = {n: m.weight for n, m in tuned.named_modules() if type(m) is Linear4bit}
        assert all(torch.equal(packed[n], now[n]) for n in packed)

    def test_more_iterations_come_nearer(self, dense, tuned, tmp_path) -> None:  # type: ignore[no-untyped-def]
        dense.save_pretrained(tmp_path, max_shard_size="100KB")
        once = qlora_kernels.loftq_init(copy.deepcopy(tuned), tmp_path)
        often = qlora_kernels.loftq_init(tuned, str(tmp_path), iterations=5)
        mean = [sum(e.after for e in errors.values()) for errors in (once, often)]
        assert mean[1] < mean[0]

    def test_a_rank_beyond_the_weights(self, dense) -> None:  # type: ignore[no-untyped-def]
        model = copy.deepcopy(dense)
        replace_linear_layers(model, verbose=False)
        tuned = get_peft_model(model, LoraConfig(r=80, target_modules=["k_proj"]))
        for error in qlora_kernels.loftq_init(tuned, dense.state_dict()).values():
            assert error.after < 1e-5 < error.before

    def test_bad_input_is_named_and_changes_nothing(self, dense, tuned, tmp_path) -> None:  # type: ignore[no-untyped-def]
        before = {
            n: t.clone() for n, t in tuned.state_dict().items() if isinstance(t, torch.Tensor)
        }
        good = dense.state_dict()
        last = "model.layers.1.mlp.down_proj.weight"
        bad = [
            ({**good, last: good[last].T}, {}, CheckpointError, "down_proj.weight of the original"),
            ({n: t for n, t in good.items() if n != last}, {}, CheckpointError, f"has no {last}"),
            (tmp_path / "none", {}, CheckpointError, "is no folder"),
            (good, {"adapter_name": "other"}, ValueError, "no 4-bit layer with an adapter 'other'"),
            (good, {"iterations": 0}, ValueError, "iterations must be 1 or more, got 0"),
        ]
        for original, kwargs, error, message in bad:
            with pytest.raises(error, match=message):
                qlora_kernels.loftq_init(tuned, original, **kwargs)
        with pytest.raises(ValueError, match="no 4-bit layer"):
            qlora_kernels.loftq_init(dense, good)
        after = tuned.state_dict()
        assert all(torch.equal(t, after[n]) for n, t in before.items())

    def test_peft_s_own_name_says_what_to_do(self, model) -> None:  # type: ignore[no-untyped-def]
        config = LoraConfig(r=4, target_modules=["q_proj"])
        config.init_lora_weights = "loftq"  # PEFT's own check of it wants SciPy
        with pytest.raises(ValueError, match="qlora_kernels.loftq_init"):
            get_peft_model(model, config)


# --- merging ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:merging a LoRA adapter")
class TestMerging:
    def tuned(self, model: nn.Module, **kwargs: object) -> nn.Module:
        config = LoraConfig(r=4, target_modules="all-linear", **kwargs)  # type: ignore[arg-type]
        tuned = get_peft_model(model, config).eval()
        randomize(tuned)
        return tuned

    def test_it_warns_and_rounds_the_exact_sum_once(self, model, ids) -> None:  # type: ignore[no-untyped-def]
        tuned = self.tuned(model)
        layer = lora_layers(tuned)[0]
        exact = layer.base_layer.dequantize_weight() + layer.get_delta_weight("default")
        with pytest.warns(UserWarning, match="merging a LoRA adapter into a 4-bit weight"):
            tuned.merge_adapter()
        want = Linear4bit(64, 64, bias=False, quant_type="nf4")
        want.set_weight(exact.detach())
        assert torch.equal(layer.base_layer.weight, want.weight)
        assert torch.equal(layer.base_layer.absmax, want.absmax)

    @pytest.mark.parametrize("kwargs", [{}, {"use_dora": True}], ids=["plain", "dora"])
    def test_unmerging_restores_every_bit(self, model, ids, kwargs) -> None:  # type: ignore[no-untyped-def]
        tuned = self.tuned(model, **kwargs)
        y = tuned(ids).logits
        state = {k: v.clone() for k, v in tuned.state_dict().items()}
        tuned.merge_adapter()
        assert not torch.equal(tuned(ids).logits, y)
        assert (tuned(ids).logits - y).norm() < 0.3 * y.norm()
        tuned.unmerge_adapter()
        for key, value in tuned.state_dict().items():
            assert torch.equal(value, state[key]), key
        assert torch.equal(tuned(ids).logits, y)

    def test_one_after_another_rounds_as_both_at_once(self, model, ids) -> None:  # type: ignore[no-untyped-def]
        tuned = self.tuned(model)
        tuned.add_adapter("two", LoraConfig(r=2, target_modules="all-linear"))
        randomize(tuned)
        other = copy.deepcopy(tuned)
        tuned.merge_adapter(["default"])
        tuned.merge_adapter(["two"])
        other.merge_adapter(["default", "two"])
        a, b = lora_layers(tuned)[3], lora_layers(other)[3]
        assert a.merged_adapters == b.merged_adapters == ["default", "two"]
        assert torch.equal(a.base_layer.weight, b.base_layer.weight)
        y = copy.deepcopy(other)
        tuned.unmerge_adapter()
        assert not torch.equal(lora_layers(tuned)[3].base_layer.weight, b.base_layer.weight)
        assert torch.equal(lora_layers(y)[3].base_layer.weight, b.base_layer.weight)

    def test_merge_and_unload_gives_4_bit_layers(self, model, ids) -> None:  # type: ignore[no-untyped-def]
        tuned = self.tuned(model)
        y = tuned(ids).logits
        merged = tuned.merge_and_unload()
        assert not lora_layers(merged)
        assert sum(isinstance(m, Linear4bit) for m in merged.modules()) == 14
        assert (merged(ids).logits - y).norm() < 0.3 * y.norm()

    def test_disabling_while_merged_unmerges(self, model, ids) -> None:  # type: ignore[no-untyped-def]
        base = model(ids).logits
        tuned = self.tuned(model)
        tuned.merge_adapter()
        with tuned.disable_adapter():
            assert torch.equal(tuned(ids).logits, base)

    def test_a_bias_is_merged_and_restored(self, ids) -> None:  # type: ignore[no-untyped-def]
        model = tiny_llama(attention_bias=True, mlp_bias=True)
        replace_linear_layers(model, verbose=False)
        tuned = self.tuned(model, lora_bias=True)
        y = tuned(ids).logits
        layer = lora_layers(tuned)[0]
        bias = layer.base_layer.bias.clone()
        tuned.merge_adapter()
        want = bias + layer.lora_B["default"].bias * layer.scaling["default"]
        torch.testing.assert_close(layer.base_layer.bias, want)
        tuned.unmerge_adapter()
        assert torch.equal(layer.base_layer.bias, bias)
        assert torch.equal(tuned(ids).logits, y)

    def test_a_broken_adapter_is_refused_and_changes_nothing(self, model, ids) -> None:  # type: ignore[no-untyped-def]
        tuned = self.tuned(model)
        layer = lora_layers(tuned)[0]
        before = layer.base_layer.weight.clone()
        with torch.no_grad():
            layer.lora_B["default"].weight[0, 0] = torch.nan
        with pytest.raises(ValueError, match="NaNs detected"):
            layer.merge(safe_merge=True)
        assert torch.equal(layer.base_layer.weight, before)
        assert not layer.merged

    def test_a_model_that_moves_while_merged(self, model, ids) -> None:  # type: ignore[no-untyped-def]
        tuned = self.tuned(model)
        y = tuned(ids).logits
        tuned.merge_adapter()
        tuned = copy.deepcopy(tuned)
        tuned.unmerge_adapter()
        assert torch.equal(tuned(ids).logits, y)


# --- files --------------------------------------------------------------------------------------


def test_an_adapters_files_are_peft_s_own(model, ids, tmp_path) -> None:  # type: ignore[no-untyped-def]
    twin = dense_twin(model)
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear")).eval()
    randomize(tuned)
    tuned.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "qlora_kernels" not in json.dumps(config)
    assert {name.split(".")[-1] for name in config["target_modules"]} == set(TARGETS)
    assert all(re.search(r"\.lora_[AB]\.weight$", k) for k in peft.load_peft_weights(str(tmp_path)))
    # Into PEFT on a dense model, without our layers ...
    dense = PeftModel.from_pretrained(twin, tmp_path).eval()
    assert {type(m) for m in lora_layers(dense)} == {PeftLinear}
    torch.testing.assert_close(dense(ids).logits, tuned(ids).logits, rtol=1e-4, atol=1e-5)
    # ... and what that saves, into ours.
    dense.save_pretrained(tmp_path / "again")
    base = tuned.unload()
    ours = PeftModel.from_pretrained(base, tmp_path / "again").eval()
    assert {type(m) for m in lora_layers(ours)} == {FusedLoraLinear}
    torch.testing.assert_close(ours(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-5)


def test_low_memory_loading(model, ids, tmp_path) -> None:  # type: ignore[no-untyped-def]
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear")).eval()
    randomize(tuned)
    tuned.save_pretrained(tmp_path)
    y = tuned(ids).logits
    again = PeftModel.from_pretrained(tuned.unload(), tmp_path, low_cpu_mem_usage=True).eval()
    assert torch.equal(again(ids).logits, y)


def test_compiles_without_a_graph_break(model, ids) -> None:  # type: ignore[no-untyped-def]
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    randomize(tuned)
    layer = tuned.base_model.model.model.layers[0].mlp
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 64, requires_grad=True)
    torch.testing.assert_close(compiled(x), layer(x))
    compiled(x).sum().backward()
    assert layer.up_proj.lora_A["default"].weight.grad is not None


def test_a_deepcopy_is_on_its_own(model, ids) -> None:  # type: ignore[no-untyped-def]
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    other = copy.deepcopy(tuned)
    randomize(other)
    assert torch.equal(tuned(ids).logits, model(ids).logits)
    assert not torch.equal(other(ids).logits, tuned(ids).logits)


@pytest.mark.parametrize(
    "first",
    [
        "qlora_kernels",
        pytest.param("qlora_kernels.integrations.peft", marks=pytest.mark.full),
        pytest.param("qlora_kernels.integrations.transformers", marks=pytest.mark.full),
    ],
)
def test_any_module_may_be_imported_first(first):
    code = (
        f"import {first}, peft.tuners.lora.model as m, transformers.quantizers.auto as a; "
        "import qlora_kernels.integrations.transformers as t; "
        "assert m.dispatch_default._qlora_kernels and t.METHOD in a.AUTO_QUANTIZER_MAPPING"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-2000:]


# --- new words, several tasks, other optimizers ---------------------------------------------------


WORDS = {
    "rows": {"trainable_token_indices": [96, 97, 98]},
    "whole": {"modules_to_save": ["embed_tokens"]},
}


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("how", WORDS)
@pytest.mark.filterwarnings("ignore:.*embedding.*", "ignore:.*tie.*")
def test_new_words_are_trained_beside_the_adapter(how: str, tie: bool, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """Packed layers, three words more, their rows trained; the files are right on a dense base."""
    model = tiny_llama(tie_word_embeddings=tie)
    replace_linear_layers(model, verbose=False)
    model.resize_token_embeddings(99)
    twin = dense_twin(model)
    before = model.get_input_embeddings().weight.detach().clone()
    config = LoraConfig(r=4, target_modules=TARGETS, ensure_weight_tying=tie, **WORDS[how])  # type: ignore[arg-type]
    tuned = get_peft_model(model, config)
    assert sum(type(m) is FusedLoraLinear for m in tuned.modules()) == 14
    ids = torch.tensor([[1, 96, 2, 97, 3, 98, 4]])
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = tuned(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    tuned.eval().save_pretrained(tmp_path)
    y = tuned(ids).logits
    dense = PeftModel.from_pretrained(twin, tmp_path).eval()
    torch.testing.assert_close(dense(ids).logits, y, rtol=1e-4, atol=1e-5)
    merged = dense.merge_and_unload()
    after = merged.get_input_embeddings().weight
    moved = [i for i in range(99) if not torch.equal(after[i], before[i])]
    assert set(moved) >= {96, 97, 98} and (how == "whole" or moved == [96, 97, 98])
    if tie:
        assert merged.get_output_embeddings().weight.data_ptr() == after.data_ptr()


@pytest.mark.parametrize("kind", ["AdamW", "AdamW8bit", "PagedAdamW8bit", "PagedAdamW32bit"])
def test_lora_plus_by_pefts_own_means(kind: str, model, ids, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    from peft.optimizers import create_loraplus_optimizer

    from qlora_kernels import optim

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    randomize(tuned)
    cls = getattr(optim, kind)
    optimizer = create_loraplus_optimizer(tuned, cls, lr=1e-4, loraplus_lr_ratio=16)
    assert type(optimizer) is cls
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    before = {n: p.detach().clone() for n, p in tuned.named_parameters() if p.requires_grad}
    tuned(ids, labels=ids).loss.backward()
    optimizer.step()
    for name, p in tuned.named_parameters():
        if p.requires_grad:
            rate = 16e-4 if "lora_B" in name else 1e-4
            assert rates[id(p)] == pytest.approx(rate), name
            moved = (p - before[name]).abs().max().item()  # Adam's first step is its rate
            assert moved == pytest.approx(rate, rel=0.05), name


def test_an_adapter_opens_in_a_plain_peft_without_this_package(model, ids, tmp_path) -> None:  # type: ignore[no-untyped-def]
    twin = dense_twin(model)
    twin.save_pretrained(tmp_path / "dense")
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear")).eval()
    randomize(tuned)
    tuned.save_pretrained(tmp_path / "adapter")
    torch.save({"ids": ids, "logits": tuned(ids).logits.detach()}, tmp_path / "want.pt")
    code = """
import sys; sys.modules["qlora_kernels"] = None
import torch, transformers, peft
model = transformers.AutoModelForCausalLM.from_pretrained("dense", dtype=torch.float32)
model = peft.PeftModel.from_pretrained(model, "adapter").eval()
want = torch.load("want.pt")
torch.testing.assert_close(model(want["ids"]).logits, want["logits"], rtol=1e-4, atol=1e-5)
"""
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]


def test_an_adapter_that_is_loaded_again_keeps_its_dtype(model, ids, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """As Trainer loads it to resume, of a model whose adapter TRL has made bf16."""
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    randomize(tuned)
    for name, p in tuned.named_parameters():
        if "lora_" in name:
            p.data = p.data.to(torch.bfloat16)
    tuned.save_pretrained(tmp_path)
    want = {n: p.detach().clone() for n, p in tuned.named_parameters() if "lora_" in n}
    tuned.load_adapter(str(tmp_path), "default", is_trainable=True)
    got = dict(tuned.named_parameters())
    assert all(torch.equal(got[n], p) and got[n].dtype == p.dtype for n, p in want.items())
    tuned.load_adapter(str(tmp_path), "another")
    assert {p.dtype for n, p in tuned.named_parameters() if "another" in n} == {torch.float32}
