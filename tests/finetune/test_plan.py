"""The memory plan: parts counted by hand, traces that extrapolate, limits of the machine."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from qlora_kernels import control_group
from qlora_kernels.finetune.errors import BadInput
from qlora_kernels.finetune.plan import (
    MemoryPlan,
    StepShape,
    available_memory,
    peak_memory,
    peak_resident_memory,
    plan_memory,
    resident_memory,
)
from qlora_kernels.finetune.report import plan_table
from qlora_kernels.optim import PagedAdamW8bit
from qlora_kernels.planning import machine, memory
from qlora_kernels.planning.memory import LOADING
from qlora_kernels.planning.trace import STRETCHES

SHAPES = [(64, 64), (32, 64), (32, 64), (64, 64), (128, 64), (128, 64), (64, 128)]
QUANT = {"quant_type": "nf4", "blocksize": 64, "double_quant": True}
HIDDEN, INNER, WORDS = 64, 128, 272


def config(layers=2, **changes) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=WORDS, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, **changes,
    )  # fmt: skip


def lora(**changes) -> LoraConfig:
    return LoraConfig(**{"r": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM",
                         **changes})  # fmt: skip


def plan(shape=StepShape(2, 64), layers=2, **settings) -> MemoryPlan:  # noqa: B008
    return plain_plan(shape, layers) if not settings else make(shape, layers, **settings)


def make(shape, layers, **settings) -> MemoryPlan:
    settings = {"quant": QUANT, "lora": lora(), "program": 0, "limit": (None, ""), **settings}
    return plan_memory(config(layers), shape, **settings)


plain_plan = functools.cache(make)  # which several tests look at, and none changes


# --- what stands --------------------------------------------------------------------------------


def test_what_is_held_throughout_is_counted():
    layers = 3
    parts = plan(layers=layers).parts
    values = [n * k for n, k in SHAPES]
    assert parts["packed 4-bit weights"] == layers * sum(values) // 2
    # A byte a block of 64; for each matrix 4 bytes a 256 of these, and an offset of 4.
    constants = sum(v // 64 + 4 * -(-v // 64 // 256) + 4 for v in values)
    assert parts["their constants"] == layers * constants
    norms = (2 * layers + 1) * HIDDEN
    assert parts["embeddings and output layer"] == 4 * WORDS * HIDDEN  # tied: once
    assert parts["other weights"] == 4 * norms
    trained = layers * 8 * sum(n + k for n, k in SHAPES)
    assert parts["trained parameters"] == 4 * trained
    # Adam: two moments and a step each; 14 matrices a layer.
    assert parts["optimizer states"] == 8 * trained + 4 * 14 * layers


def test_the_same_bytes_as_the_model_that_is_trained(tiny_model):
    from qlora_kernels.integrations.transformers import load_quantized_model
    from qlora_kernels.nn import Linear4bit

    model = load_quantized_model(tiny_model, dtype=torch.bfloat16)
    model.requires_grad_(False)
    tuned = get_peft_model(model, lora())
    parts = plan(dtype=torch.bfloat16).parts
    layers = [m for m in tuned.modules() if isinstance(m, Linear4bit)]
    assert parts["packed 4-bit weights"] == sum(m.weight.nbytes for m in layers)
    trained = [p for p in tuned.parameters() if p.requires_grad]
    assert parts["trained parameters"] == sum(p.nbytes for p in trained)
    rest = {id(p): p.nbytes for p in tuned.parameters() if not p.requires_grad}
    for m in layers:
        rest.pop(id(m.weight))
    assert parts["other weights"] + parts["embeddings and output layer"] == sum(rest.values())


def test_dense_models_and_formats():
    dense = plan(quant=None).parts
    nested, flat = plan().parts, plan(quant={**QUANT, "double_quant": False}).parts
    assert dense["packed 4-bit weights"] == dense["their constants"] == 0
    assert dense["other weights"] == nested["other weights"] + 8 * nested["packed 4-bit weights"]
    assert flat["their constants"] == 4 * flat["packed 4-bit weights"] * 2 // 64
    skipped = plan(quant={**QUANT, "skip_modules": ["mlp", "lm_head"]}).parts
    assert skipped["packed 4-bit weights"] == 2 * (64 * 64 * 2 + 32 * 64 * 2) // 2


# --- what comes and goes ------------------------------------------------------------------------


def test_parts_add_up_to_the_step():
    found = plan(program=1000)
    assert found.parts["program and libraries"] == 1000
    assert set(found.phases) == {LOADING, *STRETCHES.values()} == set(found.compositions)
    for phase, parts in found.compositions.items():
        assert found.phases[phase] == sum(parts.values())
        assert all(size >= 0 for size in parts.values())
    assert found.peak == max(found.phases.values()) and found.when in found.phases
    assert found.parts in found.compositions.values()


@pytest.mark.parametrize("checkpointing, accumulation", [(False, 1), (True, 4)])
def test_depth_is_extrapolated_to_what_tracing_all_of_it_gives(
    monkeypatch, checkpointing, accumulation
):
    """Two traces predict a model of five layers; here all five are traced as well."""
    shape = StepShape(2, 48)
    real, called = memory.trace_step, []

    def trace(model, *rest):
        called.append(rest)
        return real(model, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(memory, "trace_step", trace)
        found = plan(shape, layers=5, checkpointing=checkpointing, accumulation=accumulation)
    assert len(called) == 2 and called[0] == called[1]
    model = memory._meta_model(config(5), torch.float32, QUANT, lora(), "sdpa")
    whole = real(model, *called[0])
    assert found.activations == whole.saved
    assert found.parts["optimizer states"] == whole.states
    inside = memory.inside_loss(96, HIDDEN, WORDS, torch.float32, "cpu")
    standing = sum(memory._standing(model).values())
    for stretch, phase in STRETCHES.items():
        states = 0 if stretch == "update" else whole.states
        loss = inside if stretch == "loss" else 0  # whose gradient is ready with it
        predicted = found.phases[phase] - standing - states - loss
        assert predicted == pytest.approx(whole.peaks[stretch], rel=0.005), phase


def test_activations_grow_with_the_batch_and_shrink_by_checkpointing():
    two, four = plan(), plan(StepShape(4, 64))
    assert four.activations == pytest.approx(2 * two.activations, rel=0.05)
    alone = plan(StepShape(1, 128))  # as many tokens as two, without a mask
    assert 0.7 * two.activations < alone.activations < two.activations
    saving = plan(layers=8, checkpointing=True)
    assert saving.activations_a_layer < 0.3 * two.activations_a_layer


def test_accumulation_holds_the_gradients_while_activations_are_there():
    alone, accumulated = plan(), plan(accumulation=4)
    forward = STRETCHES["forward"]
    gradients = alone.parts["trained parameters"]
    assert accumulated.phases[forward] == alone.phases[forward] + gradients
    assert accumulated.compositions[forward]["gradients"] == gradients
    assert 0 <= accumulated.peak - alone.peak <= gradients * 1.01


def test_other_optimizers_hold_less():
    adam = plan().parts["optimizer states"]
    eight = plan(optimizer=(PagedAdamW8bit, {}), lora=lora(r=64))
    large = plan(lora=lora(r=64)).parts["trained parameters"] // 4
    shapes = [s for n, k in SHAPES for s in (64 * n, 64 * k)]
    kept = sum(2 * n + 8 * -(-n // 256) if n >= 4096 else 8 * n for n in shapes)
    assert eight.notes == [] and sum(shapes) * 2 == large
    assert eight.parts["optimizer states"] == 2 * kept == eight.paged
    assert plan(optimizer=(torch.optim.SGD, {"lr": 0.1})).parts["optimizer states"] == 0
    assert plan(optimizer=(torch.optim.SGD, {"momentum": 0.9})).parts["optimizer states"] < adam


@pytest.mark.parametrize("tokens, dtype", [(300, torch.float32), (2100, torch.float32),
                                           (300, torch.bfloat16)])  # fmt: skip
def test_the_buffers_of_the_loss_are_those_that_it_makes(tokens, dtype):
    """Its own code on real tensors, with the storages counted that are alive."""
    from qlora_kernels.loss.cross_entropy import _compute_dtype, _linear_cross_entropy
    from qlora_kernels.planning.trace import _Live

    width, words = 96, 1000
    hidden, weight = torch.randn(tokens, width).to(dtype), torch.randn(words, width).to(dtype)
    labels = torch.randint(0, words, (tokens,))
    compute = _compute_dtype(hidden, weight)
    with _Live([hidden, weight, labels]) as live:
        results = _linear_cross_entropy._init_fn(
            hidden,
            weight,
            None,
            labels,
            -100,
            0.0,
            1.0,
            compute,
            0,
            0,
            True,
            False,
            False,
            False,
            0,
        )
    held = sum(t.untyped_storage().nbytes() for t in results)
    predicted = memory.inside_loss(tokens, width, words, dtype, "cpu")
    # The rest is a few numbers a row: labels, their order, sums.
    assert predicted <= live.peak - held <= predicted + 150 * tokens


def test_logits_are_not_part_of_it():
    """The loss never holds them, and the plan knows: 100,000 words, 512 tokens, 200 MB of them."""
    wide = LlamaConfig(**{**config().to_dict(), "vocab_size": 100_000})
    found = plan_memory(wide, StepShape(1, 512), quant=QUANT, lora=lora(), program=0,
                        limit=(None, ""))  # fmt: skip
    passing = sum(found.parts[n] for n in ("activations", "temporaries", "gradients"))
    assert found.full_logits == 100_000 * 512 * 4
    assert passing < found.full_logits / 3


def test_a_model_that_cannot_be_traced_is_told(monkeypatch):
    def broken(*args):
        raise RuntimeError("no fake tensors here\nand more")

    monkeypatch.setattr(memory, "trace_step", broken)
    found = make(StepShape(2, 64), 2)
    (note,) = found.notes
    assert "LlamaConfig" in note and "no fake tensors here)" in note and "higher" in note
    assert found.parts["optimizer states"] == 2 * found.parts["trained parameters"]


def test_planning_touches_no_weights_and_leaves_the_configuration():
    before = config(4)
    text = json.dumps(before.to_dict(), default=str)
    plan_memory(before, StepShape(1, 16), quant=QUANT, lora=lora(), program=0, limit=(None, ""))
    assert json.dumps(before.to_dict(), default=str) == text


# --- what the machine has -------------------------------------------------------------------------


def test_excess():
    assert MemoryPlan(phases={"a": 5}, limit=3).excess == 2
    assert MemoryPlan(phases={"a": 5}, limit=5).excess == 0
    assert MemoryPlan(phases={"a": 5}, limit=None).excess == 0


def test_the_table_names_the_parts_the_peak_and_what_there_is(capsys):
    from rich.console import Console

    found = MemoryPlan({"activations": 3 * 10**9}, {"x": 3 * 10**9}, 10**9, "a container")
    Console(width=100).print(plan_table(found))
    text = capsys.readouterr().out
    for part in ("activations", "3.00 GB", "peak predicted", "there is", "1.00 GB", "a container"):
        assert part in text


def test_memory_of_this_process():
    room, who = available_memory()
    assert room > resident_memory() > 10**6 and who
    assert peak_resident_memory() >= resident_memory() * 0.99


def test_the_peak_is_of_the_device_that_trains(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 123)
    assert peak_memory("cuda") == 123
    assert peak_memory(torch.device("cpu")) == peak_resident_memory()


def group(folder, limit, usage, inactive, names=("memory.max", "memory.current", "inactive_file")):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {inactive}\n")


def test_limits_of_control_groups(tmp_path, monkeypatch):
    group(tmp_path / "a", 1000, 300, 100)  # a limit may stand at any level
    group(tmp_path / "a" / "b", "max", 10, 0)
    group(tmp_path / "a" / "b" / "c", 900, 850, 0)
    old = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    group(tmp_path / "memory" / "x", 500, 100, 50, old)
    group(tmp_path / "memory", 1 << 62, 1, 0, old)  # how version 1 says that there is none
    members = "0::/a/b/c\n3:cpu:/x\n4:memory:/x\n"
    real = control_group.Path.read_text

    def read_text(self, *args, **kwargs):
        if str(self) == "/proc/self/cgroup":
            return members
        return real(self, *args, **kwargs)

    monkeypatch.setattr(control_group.Path, "read_text", read_text)
    assert sorted(control_group.control_group_room(tmp_path)) == [50, 450, 800]
    group(tmp_path / "a" / "b" / "c", "nonsense", 850, 0)
    assert sorted(control_group.control_group_room(tmp_path)) == [450, 800]


def test_the_smallest_room_is_the_limit(monkeypatch):
    monkeypatch.setattr(machine, "control_group_room", lambda: [123, 77])
    room, who = available_memory()
    assert who == "the control group's limit"
    assert room == pytest.approx(resident_memory() + 77, abs=50 << 20)


# --- the plan and the run -------------------------------------------------------------------------


def test_a_plan_that_exceeds_what_may_be_had_stops_the_run_and_force_goes_on(train, tmp_path):
    with pytest.raises(BadInput) as caught:
        train(max_memory_mb=50, max_steps=1)
    message = str(caught.value)
    assert "more than there is (50.0 MB, max_memory_mb)" in message
    assert "Lower: activation_checkpointing true (" in message and "--force" in message
    assert not (tmp_path / "out").exists()
    run = train(max_memory_mb=50, max_steps=1, force=True)
    assert run.figures["finished"] and "going on, as force says" in run.text
    parts = run.figures["memory"]["predicted_parts"]
    assert parts["trained parameters"] == sum(t.nbytes for t in run.adapter().values())
    assert run.figures["memory"]["predicted_peak"] > 50 * 10**6


@pytest.mark.full
@pytest.mark.parametrize("checkpointing", ["true", "false"])
def test_the_predicted_peak_is_the_measured_one(tmp_path, tiny_model, checkpointing):
    """A model large enough for its step to show beside the program, in a process of its own.

    glibc is told to give large blocks back: what is predicted is what is held, not its holes.
    """
    model, data, out = tmp_path / "model", tmp_path / "d.jsonl", tmp_path / "out"
    shutil.copytree(tiny_model, model)  # for its tokenizer
    large = LlamaConfig(**{**config(6).to_dict(), "hidden_size": 512, "intermediate_size": 1536})
    LlamaForCausalLM(large).save_pretrained(model)
    lines = [json.dumps({"text": f"{i} " + "many words " * 60}) for i in range(20)]
    data.write_text("\n".join(lines))
    command = [sys.executable, "-m", "qlora_kernels.cli", "finetune"]
    for name, value in {
        "model_name_or_path": model, "dataset_name": data, "output_dir": out, "max_steps": 2,
        "per_device_train_batch_size": 8, "max_length": 512, "gradient_accumulation_steps": 1,
        "activation_checkpointing": checkpointing, "eval_split": 2, "save_strategy": "no",
    }.items():  # fmt: skip
        command += [f"--{name}", str(value)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    memory = json.loads((out / "figures.json").read_text())["memory"]
    program = memory["predicted_parts"]["program and libraries"]
    predicted, measured = memory["predicted_peak"] - program, memory["measured_peak"] - program
    assert measured == pytest.approx(predicted, rel=0.15)
