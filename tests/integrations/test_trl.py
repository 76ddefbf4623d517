"""TRL's trainers on 4-bit models, with no wrapper: one frozen base, nothing packed twice, resume.

SFT, DPO and GRPO train a tiny model by a plain ``LoraConfig``. DPO and GRPO take the base with the
adapter switched off as their reference. What ran, and what was allocated, is counted by torch's
profiler; that the fused loss ran by its handle.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

trl = pytest.importorskip("trl")
peft = pytest.importorskip("peft")
datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")

from torch.profiler import ProfilerActivity, profile  # noqa: E402

from qlora_kernels.integrations.peft import FusedLoraLinear  # noqa: E402
from qlora_kernels.integrations.transformers import load_quantized_model  # noqa: E402
from qlora_kernels.loss import install  # noqa: E402
from qlora_kernels.nn import Linear4bit  # noqa: E402

COMMON = {
    "max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1,
    "learning_rate": 5e-3, "logging_steps": 1, "report_to": [], "use_cpu": True, "bf16": False,
    "disable_tqdm": True, "gradient_checkpointing": False, "save_strategy": "no", "seed": 3,
    "lr_scheduler_type": "constant",
}  # fmt: skip


def kinds(*quick: str) -> list[Any]:
    return [pytest.param(k, marks=[] if k in quick else pytest.mark.full)
            for k in ("sft", "dpo", "grpo")]  # fmt: skip


QUESTIONS = [f"What is {i} plus {i % 3}?" for i in range(12)]


@pytest.fixture(scope="module")
def wide(make_tiny_model, tmp_path_factory) -> Path:
    """Weights that outweigh what a step keeps of a row or two: 7.9 MB in fp32."""
    folder = tmp_path_factory.mktemp("wide")
    return make_tiny_model(folder, hidden_size=256, intermediate_size=1024)


@pytest.fixture(autouse=True)
def _quiet():
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    yield


def trainer_of(kind: str, base: Path, folder: Path, fused: bool = True, **changes: Any) -> Any:
    """A trainer as a script makes it, and the fused loss on it."""
    torch.manual_seed(0)
    model = load_quantized_model(base, dtype=torch.float32)
    settings = {**COMMON, "output_dir": str(folder), **changes}
    common = {
        "processing_class": transformers.AutoTokenizer.from_pretrained(base),
        "peft_config": peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    }
    if kind == "sft":
        rows = [{"prompt": q, "completion": " It is so."} for q in QUESTIONS]
        config = trl.SFTConfig(**settings, max_length=32)
        trainer = trl.SFTTrainer(
            model, config, train_dataset=datasets.Dataset.from_list(rows), **common
        )
    elif kind == "dpo":
        rows = [{"prompt": q, "chosen": " It is so.", "rejected": " No idea."} for q in QUESTIONS]
        config = trl.DPOConfig(**settings, max_length=32)
        trainer = trl.DPOTrainer(
            model, args=config, train_dataset=datasets.Dataset.from_list(rows), **common
        )
    else:
        rows = [{"prompt": q} for q in QUESTIONS]
        config = trl.GRPOConfig(
            **settings, num_generations=2, max_completion_length=6, beta=0.1, temperature=1.0
        )
        trainer = trl.GRPOTrainer(
            model, reward_funcs=_vowels, args=config,
            train_dataset=datasets.Dataset.from_list(rows), **common,
        )  # fmt: skip
    if fused:
        trainer.fused_loss = install(trainer)
    return trainer


def _vowels(completions: list[str], **_: Any) -> list[float]:
    return [sum(c.count(v) for v in "aeiou") + 0.01 * len(set(c)) for c in completions]


def packed_layers(trainer: Any) -> dict[str, Linear4bit]:
    return {n: m for n, m in trainer.model.named_modules() if isinstance(m, Linear4bit)}


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def pointers(trainer: Any) -> dict[str, tuple[int, ...]]:
    return {
        name: tuple(t.data_ptr() for t in (m.weight, m.absmax, m.nested_absmax))
        for name, m in packed_layers(trainer).items()
    }


@pytest.mark.parametrize("kind", kinds("dpo", "grpo"))
def test_one_frozen_base_that_nothing_packs_again(kind, wide, tmp_path) -> None:
    rows = 2 if kind == "grpo" else 1
    trainer = trainer_of(kind, wide, tmp_path, max_steps=2, per_device_train_batch_size=rows)
    layers = packed_layers(trainer)
    assert len(layers) == 14
    assert sum(type(m) is FusedLoraLinear for m in trainer.model.modules()) == 14
    before, packed = pointers(trainer), {n: m.weight.clone() for n, m in layers.items()}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        trainer.train()

    # The packed tensors are where they were, and what they were; nothing was quantized.
    assert getattr(trainer, "ref_model", None) is None and "ref" not in trainer.model.peft_config
    assert pointers(trainer) == before
    assert all(torch.equal(m.weight, packed[n]) for n, m in layers.items())
    events = record.profiler.kineto_results.events()
    ran = Counter(e.name() for e in events if e.name().startswith("qlora_kernels::"))
    assert not [name for name in ran if "quantize_4bit" in name and "dequantize" not in name], ran
    # 14 layers; a reference besides, without the adapter; 6 tokens that are generated.
    linears = sum(n for name, n in ran.items() if name == "qlora_kernels::linear_4bit")
    assert linears >= 14 * 2 * {"sft": 1, "dpo": 2, "grpo": 2 + 6}[kind], ran

    # What a step allocates never comes near a dense copy of the base.
    dense = sum(4 * m.in_features * m.out_features for m in layers.values())
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    assert 0 < peak < dense, (peak, dense)


@pytest.mark.parametrize("kind", kinds("dpo"))
def test_the_fused_loss_is_the_one_that_runs(kind, tiny_model, tmp_path, monkeypatch) -> None:
    """And gives TRL's own losses, gradients and figures."""
    want = trainer_of(kind, tiny_model, tmp_path, fused=False)
    want.train()
    import trl.trainer.utils as utils

    class Never:
        @staticmethod
        def apply(*args: Any) -> None:
            raise AssertionError("TRL's own loss ran")

    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", Never)
    trainer = trainer_of(kind, tiny_model, tmp_path)
    trainer.train()
    handle = trainer.fused_loss
    # DPO: the policy's rows and the reference's. GRPO: the same, generation besides.
    assert handle.calls >= 4 * {"sft": 1, "dpo": 2, "grpo": 2}[kind] and not handle.fallbacks
    torch.testing.assert_close(losses(trainer), losses(want), rtol=1e-3, atol=1e-4)
    norms = [[e["grad_norm"] for e in t.state.log_history if "grad_norm" in e]
             for t in (trainer, want)]  # fmt: skip
    torch.testing.assert_close(*norms, rtol=2e-2, atol=1e-4)
    with pytest.raises(AssertionError, match="TRL's own loss ran"):
        trainer_of(kind, tiny_model, tmp_path, fused=False, max_steps=1).train()


@pytest.mark.parametrize("kind", kinds("sft", "grpo"))
@pytest.mark.parametrize(
    "optim", ["adamw_torch", pytest.param("paged_adamw_8bit", marks=pytest.mark.full)]
)
def test_a_resumed_run_has_the_same_losses(kind, optim, tiny_model, tmp_path) -> None:
    save = {"save_strategy": "steps", "save_steps": 2, "optim": optim}
    whole = trainer_of(kind, tiny_model, tmp_path, **save)
    whole.train()
    again = trainer_of(kind, tiny_model, tmp_path, **save)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert len(losses(whole)) == 4 and again.state.global_step == 4
    assert losses(again)[-2:] == pytest.approx(losses(whole)[-2:], rel=1e-6, abs=1e-7)
    trained = dict(whole.model.named_parameters())
    for name, p in again.model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p, trained[name], rtol=1e-5, atol=1e-7)
    files = {p.name for p in (tmp_path / "checkpoint-4").iterdir()}
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files
    config = json.loads((tmp_path / "checkpoint-4" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"


def test_the_reference_is_the_base_with_the_adapter_off(tiny_model, tmp_path) -> None:
    """DPO's first loss is log 2, with any adapter that is zero; its rewards move from there."""
    trainer = trainer_of("dpo", tiny_model, tmp_path)
    trainer.train()
    first, *rest = losses(trainer)
    assert first == pytest.approx(0.6931, abs=1e-3) and rest[-1] < first - 1e-3
