"""A mixture's experts through transformers and PEFT: loaded, adapted, saved, reloaded, taken over.

Training and a new process: test_architectures.py. The stack by itself: tests/test_experts.py.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from peft.tuners.lora.layer import ParamWrapper as TheirWrapper  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoModelForCausalLM, BitsAndBytesConfig  # noqa: E402

import qlora_kernels  # noqa: E402
from qlora_kernels.integrations import experts as bridge  # noqa: E402
from qlora_kernels.integrations.peft import ParamWrapper  # noqa: E402
from qlora_kernels.integrations.transformers import (  # noqa: E402
    QLoRAKernelsConfig,
    load_quantized_model,
)
from qlora_kernels.nn import (  # noqa: E402
    CheckpointError,
    Experts4bit,
    Linear4bit,
    replace_linear_layers,
)

ROOT = Path(__file__).parents[2]
SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
}
MODELS: dict[str, dict[str, Any]] = {
    "Qwen3Moe": {"moe_intermediate_size": 24, "num_experts": 5, "num_experts_per_tok": 2},
    "Mixtral": {"num_local_experts": 4},
    # Turned around, with biases, gates interleaved and clamped.
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4},
}
# With what else a family has: shared experts, a first block that is dense, groups, other routers.
FURTHER: dict[str, dict[str, Any]] = {
    "Qwen2Moe": {
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "Olmoe": {"head_dim": 12, "num_experts": 4, "num_experts_per_tok": 2},
    "DeepseekV3": {
        "head_dim": 8,
        "moe_intermediate_size": 24,
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
        "num_key_value_heads": 4,
    },
    "Phimoe": {"num_local_experts": 4},
    "GraniteMoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Glm4Moe": {
        "moe_intermediate_size": 24,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    },
}
TARGETS = ["experts.gate_up_proj", "experts.down_proj"]


def tiny(name: str = "Qwen3Moe") -> nn.Module:
    torch.manual_seed(0)
    changes = MODELS.get(name) or FURTHER[name]
    config = getattr(transformers, f"{name}Config")(**{**SHAPE, **changes})
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name in MODELS:
        made[name] = tmp_path_factory.mktemp(name)
        tiny(name).save_pretrained(made[name])
    return made


@pytest.fixture
def folder(folders: dict[str, Path]) -> Path:
    return folders["Qwen3Moe"]


@pytest.fixture
def ids() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randint(3, 96, (2, 9))


def load(path: Path, **kwargs: Any) -> Any:
    kwargs.setdefault("dtype", torch.float32)
    return AutoModelForCausalLM.from_pretrained(path, **kwargs)


def quantized(path: Path, **config: Any) -> Any:
    return load(path, quantization_config=QLoRAKernelsConfig(**config))


def stacks(model: nn.Module) -> dict[str, Experts4bit]:
    return {n: m for n, m in model.named_modules() if isinstance(m, Experts4bit)}


def told_config(path: Path) -> dict[str, Any]:
    return json.loads((path / "config.json").read_text())["quantization_config"]


# --- loading and saving -------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_loading_is_quantizing_each_expert(name: str, folders: dict[str, Path], ids) -> None:  # type: ignore[no-untyped-def]
    """Checkpoints hold Qwen3-MoE's and Mixtral's experts one by one; gpt-oss's are stacked."""
    if name != "GptOss":
        keys = load_file(folders[name] / "model.safetensors")
        assert any(".experts.3." in key for key in keys)
    model = quantized(folders[name])
    want = tiny(name)
    replace_linear_layers(want, verbose=False)
    assert len(stacks(model)) == 2
    theirs = want.state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(value, theirs[key]), key
    with torch.no_grad():
        got = model(ids).logits
        assert torch.equal(got, want(ids).logits)
        dense = copy.deepcopy(model).dequantize()
        for implementation in ("eager", "grouped_mm", "batched_mm"):
            dense.set_experts_implementation(implementation)
            torch.testing.assert_close(got, dense(ids).logits, rtol=1e-4, atol=1e-5)
    assert model.num_parameters() == tiny(name).num_parameters()


@pytest.mark.parametrize("how", [{}, {"bnb_4bit_quant_type": "int4", "bnb_4bit_blocksize": 32,
                                      "bnb_4bit_use_double_quant": False}], ids=str)  # fmt: skip
def test_save_and_reload_by_name(how: dict[str, Any], folder: Path, tmp_path: Path, ids) -> None:  # type: ignore[no-untyped-def]
    model = quantized(folder, **how)
    model.save_pretrained(tmp_path)
    assert told_config(tmp_path)["quant_method"] == "qlora_kernels"
    assert told_config(tmp_path)["quantize_experts"] is True
    saved = load_file(tmp_path / "model.safetensors")
    assert set(saved) == set(model.state_dict())
    for again in (load(tmp_path), load_quantized_model(tmp_path, dtype=torch.float32)):
        for key, value in model.state_dict().items():
            assert torch.equal(value, again.state_dict()[key]), key
        assert torch.equal(again(ids).logits, model(ids).logits)
    # ... in another dtype, the scales as they were; and saved once more
    narrow = load(tmp_path, dtype=torch.bfloat16)
    narrow.save_pretrained(tmp_path / "again")
    for key, value in load_file(tmp_path / "again" / "model.safetensors").items():
        if ".experts." in key:
            assert torch.equal(value, saved[key]), key
    experts = next(iter(stacks(narrow).values()))
    assert experts.dequantize_weight("down_proj").dtype == torch.bfloat16


def allocations(run: Callable[[], object]) -> tuple[int, int]:
    """The largest tensor that ``run`` allocates, and the most that it holds at once, in bytes."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run()
    events = profile.profiler.kineto_results.events()
    sizes = [e.nbytes() for e in events if e.name() == "[memory]"]
    return max(sizes), max(itertools.accumulate(sizes))


def many_experts() -> nn.Module:
    changes = {**MODELS["Qwen3Moe"], "num_experts": 32, "moe_intermediate_size": 64}
    config = transformers.Qwen3MoeConfig(**{**SHAPE, **changes, "num_hidden_layers": 1})
    torch.manual_seed(0)
    return transformers.Qwen3MoeForCausalLM(config)


STACK = 4 * 32 * 2 * 64 * 48  # bytes of gate_up_proj in many_experts(), dense


def test_loading_makes_no_dense_stack(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Experts go from the checkpoint's tensors into the packed stack one by one."""
    many_experts().save_pretrained(tmp_path)

    def run() -> None:
        load_quantized_model(tmp_path, dtype=torch.float32)

    run()  # tables are there
    assert allocations(run)[0] < STACK / 4
    monkeypatch.setattr(bridge, "expert_by_expert", lambda conversions, model: conversions)
    assert allocations(run)[0] >= STACK


@pytest.mark.parametrize("name", ["Qwen3Moe", "Mixtral"])
def test_dequantized_it_saves_expert_by_expert_again(name: str, folders, tmp_path, ids) -> None:  # type: ignore[no-untyped-def]
    dense = quantized(folders[name]).dequantize()
    assert not stacks(dense)
    dense.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == set(
        load_file(folders[name] / "model.safetensors")
    )
    assert torch.equal(load(tmp_path)(ids).logits, dense(ids).logits)


def test_a_skipped_stack_stays_dense_and_bitsandbytes_form(folder: Path, tmp_path, ids) -> None:  # type: ignore[no-untyped-def]
    model = quantized(folder, quantize_experts=False)
    skipped = quantized(folder, llm_int8_skip_modules=["experts", "lm_head"])
    for one in (model, skipped):
        assert not stacks(one)
        assert any(isinstance(m, Linear4bit) for m in one.modules())
    assert torch.equal(model(ids).logits, skipped(ids).logits)
    model.save_pretrained(tmp_path)
    assert told_config(tmp_path)["quant_method"] == "bitsandbytes"
    assert torch.equal(load(tmp_path)(ids).logits, model(ids).logits)
    # One layer's stack in 4 bits, the other's not: saved each in its form.
    mixed = quantized(folder, llm_int8_skip_modules=["layers.0.mlp.experts", "lm_head"])
    assert list(stacks(mixed)) == ["model.layers.1.mlp.experts"]
    mixed.save_pretrained(tmp_path / "mixed")
    assert torch.equal(load(tmp_path / "mixed")(ids).logits, mixed(ids).logits)


def test_what_stays_dense_is_printed_with_its_bytes(folder: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    capsys.readouterr()
    quantized(folder)
    said = capsys.readouterr().err
    assert "in 4 bits: 8 linear layers and 2 layers of experts" in said
    assert "18.4 kB  float32   lm_head.weight" in said  # 4 * 96 * 48 bytes
    assert "1.9 kB  float32   model.layers.*.mlp.gate.weight x 2" in said
    assert "gate_up_proj" not in said
    quantized(folder, quantize_experts=False)
    said = capsys.readouterr().err
    assert "92.2 kB  float32   model.layers.*.mlp.experts.gate_up_proj x 2" in said
    transformers.logging.set_verbosity_error()
    try:
        quantized(folder)
    finally:
        transformers.logging.set_verbosity_warning()
    assert "in 4 bits" not in capsys.readouterr().err


# --- bitsandbytes' configuration ----------------------------------------------------------------


@pytest.fixture
def taken_over() -> Iterator[None]:
    qlora_kernels.enable(verbose=False)
    yield
    qlora_kernels.disable()


THEIRS = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


def test_taken_over_experts_are_quantized_and_the_checkpoint_says_whose_it_is(
    folder: Path, tmp_path: Path, ids, taken_over
) -> None:  # type: ignore[no-untyped-def]
    model = load(folder, quantization_config=BitsAndBytesConfig(**THEIRS))
    assert len(stacks(model)) == 2
    ours = quantized(folder, bnb_4bit_compute_dtype="float32")
    assert torch.equal(model(ids).logits, ours(ids).logits)
    model.save_pretrained(tmp_path)
    # bitsandbytes loads no packed experts: nothing says that it could.
    assert told_config(tmp_path)["quant_method"] == "qlora_kernels"
    assert "load_in_4bit" not in told_config(tmp_path)
    assert torch.equal(load(tmp_path)(ids).logits, model(ids).logits)


def test_a_checkpoint_of_theirs_keeps_its_dense_experts(
    folder: Path, tmp_path: Path, ids, taken_over
) -> None:  # type: ignore[no-untyped-def]
    config = BitsAndBytesConfig(**THEIRS, llm_int8_skip_modules=["experts", "lm_head"])
    model = load(folder, quantization_config=config)
    assert not stacks(model)
    model.save_pretrained(tmp_path)
    told = told_config(tmp_path)
    assert told["quant_method"] == "bitsandbytes"
    assert "qlora_kernels" not in told  # theirs, as far as anyone can tell
    told.pop("llm_int8_skip_modules")  # and they never had to skip experts
    config_file = tmp_path / "config.json"
    whole = {**json.loads(config_file.read_text()), "quantization_config": told}
    config_file.write_text(json.dumps(whole))
    again = load(tmp_path)
    assert not stacks(again)
    assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.full
@pytest.mark.parametrize("method", ["qlora_kernels", "bitsandbytes"])
def test_without_this_package_it_is_refused(method: str, folder: Path, tmp_path: Path) -> None:
    """With whatever is in its configuration: nothing is drawn in the experts' place."""
    quantized(folder).save_pretrained(tmp_path)
    if method == "bitsandbytes":
        pytest.importorskip("bitsandbytes")
        path = tmp_path / "config.json"
        whole = json.loads(path.read_text())
        whole["quantization_config"] = {"quant_method": "bitsandbytes", **THEIRS}
        path.write_text(json.dumps(whole))
    code = f"""
import transformers
transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=tmp_path
    )
    assert done.returncode != 0
    assert "experts.gate_up_proj" in done.stderr
    assert "MISMATCH" in done.stderr


@pytest.mark.full
def test_bitsandbytes_loads_what_has_dense_experts(folder: Path, tmp_path: Path, ids) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("bitsandbytes")
    model = quantized(folder, quantize_experts=False)
    model.save_pretrained(tmp_path)
    code = f"""
import torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, dtype=torch.float32)
assert "bitsandbytes" in type(model.model.layers[0].self_attn.q_proj).__module__
torch.save(model(torch.tensor({ids.tolist()})).logits, {str(tmp_path / "logits.pt")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300, cwd=tmp_path,
                   env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), model(ids).logits.detach())


# --- PEFT ---------------------------------------------------------------------------------------


def adapted(model: nn.Module, **changes: Any) -> Any:
    how = {"r": 3, "lora_alpha": 6, "target_modules": [], "target_parameters": TARGETS, **changes}
    torch.manual_seed(2)
    model = peft.get_peft_model(model, peft.LoraConfig(**how))
    randomize(model)
    return model


def randomize(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)


def wrappers(model: nn.Module) -> list[ParamWrapper]:
    return [m for m in model.modules() if isinstance(m, ParamWrapper)]


@pytest.mark.parametrize("name", MODELS)
def test_value_and_gradients_are_those_of_peft_s_own(name: str, folders, ids) -> None:  # type: ignore[no-untyped-def]
    """The same adapter on the dequantized model, through PEFT's and transformers' code."""
    packed = quantized(folders[name])
    dense = adapted(copy.deepcopy(packed).dequantize().train(), use_rslora=True)
    packed = adapted(packed.train(), use_rslora=True)
    assert len(wrappers(packed)) == 4
    assert not wrappers(dense)
    assert any(isinstance(m, TheirWrapper) for m in dense.modules())
    theirs, ours = (dict(m.named_parameters()) for m in (dense, packed))
    names = [n for n, p in theirs.items() if p.requires_grad]
    assert names == [n for n, p in ours.items() if p.requires_grad]
    assert all(theirs[n].shape == ours[n].shape for n in names)
    with torch.no_grad():
        for n in names:
            ours[n].copy_(theirs[n])
    values, grads = [], []
    for model, parameters in ((dense, theirs), (packed, ours)):
        loss = model(ids, labels=ids).loss
        values.append(loss.detach())
        grads.append(torch.autograd.grad(loss, [parameters[n] for n in names]))
    torch.testing.assert_close(values[1], values[0], rtol=1e-5, atol=0)
    for n, want, got in zip(names, *grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-6, msg=n)
        assert want.abs().max() > 0


def test_adapters_are_switched_added_and_disabled(folder: Path, ids) -> None:
    base = quantized(folder)
    plain = base(ids).logits
    model = adapted(base).eval()
    one = model(ids).logits
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=[], target_parameters=TARGETS))
    model.set_adapter("second")
    randomize(model)
    second = model(ids).logits
    assert not torch.equal(one, second)
    model.base_model.set_adapter(["default", "second"])
    both = model(ids).logits
    dense = copy.deepcopy(model).unload().dequantize()
    for name, experts in stacks(model.get_base_model()).items():
        place = dense.get_submodule(name.replace("base_layer.", "").removesuffix(".base_layer"))
        for key in experts.shapes:
            wrapper = next(
                w for w in wrappers(model) if w._experts() is experts and w.parameter_name == key
            )
            weight = place.get_parameter(key)
            for adapter in ("default", "second"):
                weight.data += wrapper.get_delta_weight(adapter)
    torch.testing.assert_close(both, dense(ids).logits, rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, plain)


@pytest.mark.filterwarnings("ignore:merging a LoRA adapter")
@pytest.mark.parametrize("name", ["Qwen3Moe", "GptOss"])
def test_merging_rounds_once_and_unmerging_is_exact(name: str, folders, ids) -> None:  # type: ignore[no-untyped-def]
    model = adapted(quantized(folders[name])).eval()
    plain = {k: v.clone() for k, v in model.state_dict().items()}
    before = model(ids).logits
    sums = {
        (w._experts(), w.parameter_name): w._experts().dequantize_weight(
            w.parameter_name, torch.float32
        )
        + w.get_delta_weight("default")
        for w in wrappers(model)
    }
    model.merge_adapter()
    for (experts, key), dense in sums.items():
        for buffer, value in experts.quantized(key, dense).items():
            assert torch.equal(getattr(experts, buffer), value), buffer
    merged = model(ids).logits
    assert not torch.equal(merged, before)
    model.unmerge_adapter()
    for key, value in model.state_dict().items():
        assert torch.equal(value, plain[key]), key
    assert torch.equal(model(ids).logits, before)
    out = model.merge_and_unload()
    assert len(stacks(out)) == 2
    assert not wrappers(out)
    assert torch.equal(out(ids).logits, merged)


def test_a_broken_adapter_merges_nothing(folder: Path, ids) -> None:
    model = adapted(quantized(folder)).eval()
    wrapper = wrappers(model)[0]
    wrapper.lora_B["default"].weight.data[0, 0] = torch.nan
    before = {k: v.clone() for k, v in wrapper._experts().state_dict().items()}
    with (
        pytest.warns(UserWarning, match="merging"),
        pytest.raises(ValueError, match="NaNs in the merged weight of expert"),
    ):
        wrapper.merge(safe_merge=True)
    assert not wrapper.merged
    for key, value in wrapper._experts().state_dict().items():
        assert torch.equal(value, before[key])


def test_an_adapter_s_files_are_peft_s_own(folder: Path, tmp_path: Path, ids) -> None:
    packed = adapted(quantized(folder)).eval()
    packed.save_pretrained(tmp_path)
    base = quantized(folder)
    again = peft.PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(again(ids).logits, packed(ids).logits)
    dense = peft.PeftModel.from_pretrained(quantized(folder).dequantize(), tmp_path)
    assert not wrappers(dense)
    torch.testing.assert_close(dense(ids).logits, packed(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_as_scripts_prepare_and_train_it(folder: Path, ids, autocast, checkpointing) -> None:  # type: ignore[no-untyped-def]
    model = load(folder, quantization_config=QLoRAKernelsConfig(), dtype=torch.bfloat16)
    before = {n: copy.deepcopy(m.state_dict()) for n, m in stacks(model).items()}
    model = peft.prepare_model_for_kbit_training(
        model,
        use_gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    for name, experts in stacks(model).items():
        for key, value in experts.state_dict().items():
            assert torch.equal(value, before[name][key])
            assert value.dtype == before[name][key].dtype
    model = adapted(model).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5)
    losses = []
    for _ in range(6):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(ids, labels=ids, output_router_logits=True).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_training_holds_no_dense_stack() -> None:
    """The largest allocation of a step, with PEFT's own wrapper for scale."""
    dense = many_experts()
    packed = copy.deepcopy(dense)
    replace_linear_layers(packed, verbose=False)
    ids = torch.randint(3, 96, (1, 4))

    def largest(model: nn.Module) -> int:
        def step() -> None:
            model(ids, labels=ids).loss.backward()

        step()
        return allocations(step)[0]

    assert largest(adapted(packed).train()) < STACK / 8
    assert largest(adapted(dense).train()) >= STACK


def test_the_page_s_code_runs(folder: Path, ids) -> None:  # type: ignore[no-untyped-def]
    page = (ROOT / "docs" / "experts.md").read_text()
    code = page.partition("```python\n")[2].partition("```")[0]
    assert "Qwen/Qwen3-30B-A3B" in code
    names: dict[str, Any] = {}
    exec(code.replace("Qwen/Qwen3-30B-A3B", str(folder)), names)
    assert len(wrappers(names["model"])) == 4
    names["model"](ids, labels=ids).loss.backward()


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key, message",
    [
        ("down_proj_absmax", "lacks model.layers.0.mlp.experts.down_proj_absmax"),
        ("down_proj_nested_offset", "lacks model.layers.0.mlp.experts.down_proj_nested_offset"),
        ("gate_up_proj", "lacks model.layers.0.mlp.experts.gate_up_proj"),
    ],
)
def test_what_a_checkpoint_lacks_is_named(key: str, message: str, folder, tmp_path) -> None:  # type: ignore[no-untyped-def]
    quantized(folder).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[f"model.layers.0.mlp.experts.{key}"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("which", ["down_proj", "up_proj"])
def test_a_dense_checkpoint_that_lacks_an_expert_is_named(
    which: str, folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[f"model.layers.0.mlp.experts.4.{which}.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    message = "down_proj has 5 experts, got 4" if which == "down_proj" else "not of one number"
    with pytest.raises(CheckpointError, match=message):
        load_quantized_model(tmp_path)


@pytest.mark.parametrize("table", ["quant_map", "nested_quant_map"])
def test_another_codebook_is_named(table: str, folder: Path, tmp_path: Path) -> None:
    quantized(folder).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[f"model.layers.1.mlp.experts.down_proj_{table}"] *= 2
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"down_proj_{table} is not the table of 'nf4'"):
        load(tmp_path)


def test_a_tensor_that_does_not_fit_is_refused(folder: Path, tmp_path: Path) -> None:
    quantized(folder).save_pretrained(tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    where = "model.layers.1.mlp.experts"

    def refused(**changes: torch.Tensor) -> str:
        changed = {**whole, **{f"{where}.{key}": value for key, value in changes.items()}}
        save_file(changed, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises((CheckpointError, RuntimeError)) as error:
            load(tmp_path)
        return str(error.value)

    packed = whole[f"{where}.down_proj"]
    refused(down_proj=packed[:, 1:].clone())
    refused(down_proj_absmax=whole[f"{where}.down_proj_absmax"][:1].clone())
    said = refused(down_proj=packed.view(torch.int8))
    assert f"{where}.down_proj is [5, 576] x torch.int8, expected" in said
    assert "x torch.uint8" in said


# --- other families -----------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize("name", FURTHER)
def test_other_families(name: str, tmp_path: Path, ids) -> None:  # type: ignore[no-untyped-def]
    tiny(name).save_pretrained(tmp_path)
    model = quantized(tmp_path)
    assert stacks(model)
    dense = copy.deepcopy(model).dequantize()
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(load(tmp_path / "again")(ids).logits, model(ids).logits)
    trained = adapted(model).train()
    trained(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in trained.parameters() if p.requires_grad)


def test_the_code_of_the_page(folder: Path) -> None:
    """docs/experts.md, as it stands there, on a tiny model."""
    page = (ROOT / "docs" / "experts.md").read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len(blocks) == 1 and '"Qwen/Qwen3-30B-A3B"' in blocks[0]
    names: dict = {}
    exec(blocks[0].replace('"Qwen/Qwen3-30B-A3B"', repr(str(folder))), names)
    assert any(isinstance(m, Experts4bit) for m in names["model"].modules())
