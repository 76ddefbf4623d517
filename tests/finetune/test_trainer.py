"""A finetune from its configuration to its folder: what it leaves, refuses and survives."""

from __future__ import annotations

import json
import math
import os
import re
import resource
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from qlora_kernels.finetune import trainer
from qlora_kernels.finetune.checkpoint import CheckpointStore, DamagedCheckpoint
from qlora_kernels.finetune.errors import BadInput, RunError

pytestmark = pytest.mark.usefixtures("no_plan")


def refusal(train, **settings) -> str:
    with pytest.raises(BadInput) as caught:
        train(**settings)
    return str(caught.value)


def steps(folder: Path) -> list[int]:
    return CheckpointStore(folder).steps()


# --- what a run leaves and says -----------------------------------------------------------------


def test_a_run_leaves_its_adapter_figures_and_configuration(train, tiny_model):
    run = train(save_steps=2, train_on="all")
    names = {p.name for p in run.folder.iterdir()}
    assert {
        "adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "curves.png",
        "figures.json", "config.yaml", "identity.json", "log.jsonl", "checkpoint-2",
    } <= names  # fmt: skip
    assert json.loads((run.folder / "figures.json").read_text()) == run.figures
    figures = run.figures
    assert figures["finished"] and figures["steps"] == 3
    assert figures["eval_loss_after"] < figures["eval_loss_before"]
    assert figures["fused_losses"] > 0, "the loss that holds no logits did not run"
    assert figures["memory"]["measured_peak"] > 0
    log = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
    assert log == figures["history"] and [line["step"] for line in log] == [1, 2, 3]
    assert figures["tokens"] == sum(line["tokens"] for line in log)
    # Blocks of 64 in NF4, double quantized, and what is rounded up in layers as small as these.
    assert 4.12 < figures["bits_per_weight"] < 4.3


def test_what_it_says_and_when(train):
    said = train().text
    places = [
        said.index(part)
        for part in (
            "40 samples",  # what the data are,
            "one sample",  # one of them, before
            "memory plan",  # the plan, before
            "held-out loss before",
            "step 1/3",  # the first step.
            "tokens/s",
            "left",
            "tokens in ",
            "after",
            "peak memory",
        )
    ]
    assert places == sorted(places)


def test_no_file_of_a_run_could_hold_a_pickle(train):
    folder = train(save_steps=1).folder
    kinds = {p.suffix for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}
    assert kinds <= {".json", ".jsonl", ".safetensors", ".yaml", ".jinja", ".png", ".md"}


def test_the_saved_adapter_is_the_trained_one_for_peft_too(train, tiny_model, tiny_data):
    """Loaded again through PEFT's own way it has the loss that the run ended with."""
    from peft import PeftModel

    from qlora_kernels.finetune.config import resolve
    from qlora_kernels.finetune.data import Collator, prepare
    from qlora_kernels.finetune.model import load_tokenizer
    from qlora_kernels.integrations.transformers import load_quantized_model

    run = train(max_steps=4)
    config = resolve({}, yaml.safe_load((run.folder / "config.yaml").read_text()))
    tokenizer = load_tokenizer(run.folder)
    rows = prepare(config.data_options(256), tokenizer).eval
    base = load_quantized_model(tiny_model, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(base, str(run.folder)).eval()
    total = count = 0
    for row in [rows[i] for i in range(len(rows))]:  # each alone: nothing to pad
        batch = Collator(tokenizer)([row])
        logits = tuned(input_ids=batch["input_ids"]).logits.double()
        labels = batch["labels"]
        # Labels may be padded with -100 to a round length; so are the ids.
        losses = torch.nn.functional.cross_entropy(
            logits[0, :-1], labels[0, 1:], reduction="none", ignore_index=-100
        )
        total += losses.sum().item()
        count += int((labels[0, 1:] != -100).sum())
    # A mean over tokens, not over samples of unequal lengths.
    assert run.figures["eval_loss_after"] == pytest.approx(total / count, abs=2e-5)


def test_its_configuration_is_the_same_run(train, tmp_path):
    from rich.console import Console

    from qlora_kernels.finetune.config import read_yaml, resolve

    first = train(lr_scheduler_type="cosine", lora_dropout=0.1, r=4)
    file = first.folder / "config.yaml"
    config = resolve({"output_dir": str(tmp_path / "again")}, read_yaml(file))
    figures = trainer.finetune(config, Console(quiet=True))
    assert [line["loss"] for line in figures["history"]] == first.losses
    assert load_file(tmp_path / "again" / "adapter_model.safetensors").keys()
    for name, value in first.adapter().items():
        assert torch.equal(load_file(tmp_path / "again" / "adapter_model.safetensors")[name], value)


# --- the silent errors of the field ---------------------------------------------------------------


@pytest.mark.parametrize("train_on", ["replies", "all"])
def test_accumulated_batches_are_one_batch(train, train_on):
    """36 samples of unequal lengths, 10 a step: the last step of an epoch has six."""
    settings = {
        "max_steps": 6, "train_on": train_on, "lora_dropout": 0.0, "learning_rate": 1e-3,
        "save_strategy": "no",
    }  # fmt: skip
    whole = train("whole", per_device_train_batch_size=10, **settings)
    parts = train("parts", per_device_train_batch_size=2, gradient_accumulation_steps=5, **settings)
    uneven = train(
        "uneven", per_device_train_batch_size=4, gradient_accumulation_steps=3, **settings
    )
    keys = ("step", "tokens", "trained")
    lines = [[h[k] for k in keys] for h in whole.figures["history"]]
    assert lines == [[h[k] for k in keys] for h in parts.figures["history"]]
    assert lines[3][1] < lines[0][1] and whole.figures["history"][4]["epoch"] > 1
    for name in ("loss", "grad_norm"):
        want = [h[name] for h in whole.figures["history"]]
        # fp32 sums in another order, six steps of Adam.
        assert [h[name] for h in parts.figures["history"]] == pytest.approx(want, rel=1e-4)
    assert uneven.losses[0] != pytest.approx(whole.losses[0], rel=1e-6), "other samples"


def test_losses_do_not_depend_on_evaluations(train):
    """Dropout's masks are those of the step, whatever was drawn in between."""
    settings = {"lora_dropout": 0.3, "save_strategy": "no", "max_steps": 4}
    plain = train("plain", **settings)
    often = train("often", eval_strategy="steps", eval_steps=1, **settings)
    assert often.losses == plain.losses
    assert len(often.figures["evaluations"]) == 5
    other = train("other", seed=1, **settings)
    assert other.losses != plain.losses


def test_packing_trains_the_same_tokens(train):
    epoch = {"max_steps": -1, "num_train_epochs": 1, "save_strategy": "no", "max_length": 128}
    packed = train("packed", packing=True, **epoch).figures
    loose = train("loose", **epoch).figures
    # A sample's first token follows nothing and has no loss; nor has it within a packed row.
    assert packed["trained_tokens"] == loose["trained_tokens"]
    assert packed["steps"] < loose["steps"]


def test_samples_longer_than_the_context_are_counted(train, tmp_path):
    data = tmp_path / "long.jsonl"
    lines = [{"prompt": f"{i}?", "completion": "yes " * (100 if i % 4 == 0 else 3)}
             for i in range(20)]  # fmt: skip
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = train(dataset_name=str(data), max_steps=1).text
    assert "\n5 longer than max_length, cut\n" in said
    assert "longest 404" in said  # as it was read: what max_length would take it whole


# --- a loss that is no number ---------------------------------------------------------------------


def poisoned(monkeypatch, step: int, value: float, what: str = "loss"):
    """From ``step`` on the model gives ``value`` for a loss, or a gradient of it."""
    real = trainer.QLoraTrainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        loss = real(self, *args, **kwargs)
        if self.model.training and self.state.global_step + 1 >= step:
            if what == "loss":
                return loss * value
            loss.register_hook(lambda grad: grad * value)
        return loss

    monkeypatch.setattr(trainer.QLoraTrainer, "compute_loss", compute_loss)


@pytest.mark.parametrize(
    "value, what", [(math.nan, "loss"), (math.inf, "loss"), (math.nan, "gradient")]
)
def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_state(
    train, monkeypatch, value, what
):
    settings = {"max_steps": 5, "save_steps": 2}
    straight = train("straight", **settings)
    with monkeypatch.context() as patch:
        poisoned(patch, 4, value, what)
        with pytest.raises(RunError) as caught:
            train(**settings)
    told = str(caught.value)
    assert f"step 4 is {value}" in told and "checkpoint-3" in told and "learning_rate" in told
    folder = straight.folder.with_name("out")
    assert steps(folder) == [2, 3]  # 3 is the state before, which no save_steps asked for
    for tensor in load_file(folder / "checkpoint-3" / "adapter_model.safetensors").values():
        assert tensor.isfinite().all()
    # The same command goes on from there, and is the run that nothing happened to.
    assert train(**settings).losses == straight.losses


def test_parameters_that_are_no_numbers_are_not_kept(train, monkeypatch):
    """A step with a learning rate beyond all bounds spoils the parameters; the loss of the next
    tells. Nothing of that is a last good state."""
    real = trainer.QLoraTrainer.end_step

    def spoil(self):
        real(self)
        if self.state.global_step == 3:
            with torch.no_grad():
                self._trained[0].fill_(math.nan)

    monkeypatch.setattr(trainer.QLoraTrainer, "end_step", spoil)
    with pytest.raises(RunError, match="last good state is .*checkpoint-2"):
        train(max_steps=5, save_steps=2)


def test_a_loss_that_is_no_number_at_once(train, monkeypatch):
    poisoned(monkeypatch, 1, math.nan)
    with pytest.raises(RunError, match="no step had been taken"):
        train()


# --- optimizers by name -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["paged_adamw_32bit", pytest.param("paged_adamw_8bit", marks=pytest.mark.full)]
)
def test_a_paged_optimizer_is_ours_and_resumes_to_the_bit(train, monkeypatch, name):
    """Whether bitsandbytes is installed or not."""
    from qlora_kernels.integrations.optimizers import OURS

    settings = {"max_steps": 4, "save_steps": 2, "optim": name}
    straight = train("straight", **settings)
    found = []

    def stop(self, *args, **kwargs):
        found.append(type(self.optimizer.optimizer))
        if self.state.global_step == 3:
            raise ArithmeticError("stopped here")
        return end_step(self, *args, **kwargs)

    end_step = trainer.QLoraTrainer.end_step
    with monkeypatch.context() as patch:
        patch.setattr(trainer.QLoraTrainer, "end_step", stop)
        with pytest.raises(ArithmeticError, match="stopped here"):
            train(**settings)
    assert set(found) == {OURS[name]}
    again = train(**settings)
    assert "checkpoint-2" in again.text and again.losses == straight.losses


# --- a full disk --------------------------------------------------------------------------------


def test_a_full_disk_keeps_the_last_good_checkpoint(train, monkeypatch):
    settings = {"max_steps": 5, "save_steps": 2}
    straight = train("straight", **settings)
    real = CheckpointStore.write

    def write(self, step, fill):
        if step < 4:
            return real(self, step, fill)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # the kernel refuses
        try:
            return real(self, step, fill)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointStore, "write", write)
        with pytest.raises(RunError, match=r"checkpoint-4 .* the disk is full") as caught:
            train(**settings)
    folder = straight.folder.with_name("out")
    assert "goes on from" in str(caught.value) and "checkpoint-2" in str(caught.value)
    assert steps(folder) == [2] and CheckpointStore(folder).latest() == (2, [])
    assert not list(folder.glob(".writing*"))
    again = train(**settings)
    assert again.losses == straight.losses


def test_a_disk_that_will_be_full_is_told_before(train, monkeypatch, tmp_path):
    usage = shutil.disk_usage(tmp_path)._replace(free=3)
    monkeypatch.setattr(trainer.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(
        trainer,
        "plan_memory",
        lambda *a, **k: trainer.MemoryPlan(
            {"trained parameters": 10**6, "optimizer states": 2 * 10**6}, {"now": 1}
        ),
    )
    message = refusal(train, save_total_limit=2)
    assert "checkpoints need 10.0 MB" in message and "save_total_limit" in message
    assert not (tmp_path / "out").exists()
    assert train(force=True).figures["finished"]


# --- the plan's verdict --------------------------------------------------------------------------


def test_a_plan_that_exceeds_the_machine_is_refused_and_force_goes_on(train, monkeypatch):
    plan = trainer.MemoryPlan(
        {"trained parameters": 1, "optimizer states": 1},
        {"in a training step": 3 * 10**9},
        limit=10**9,
        limit_from="a small machine",
    )
    asked = []

    def plan_memory(config, shape, **settings):
        asked.append((shape, settings))
        small = settings["checkpointing"] or shape.batch == 1
        return plan if not small else trainer.MemoryPlan({}, {"x": 7 * 10**8}, limit=10**9)

    monkeypatch.setattr(trainer, "plan_memory", plan_memory)
    message = refusal(train)
    assert "needs 3.00 GB, 2.00 GB more than there is (1.00 GB, a small machine)" in message
    for advice in (
        "activation_checkpointing true (700 MB, fits)",
        "per_device_train_batch_size 1",
        "dtype bfloat16 (3.00 GB)",  # tried, and does not fit
        "--force",
    ):
        assert advice in message
    assert train(force=True).figures["finished"]
    assert "going on, as force says" in train.text


# --- output folders that are not empty ------------------------------------------------------------


def test_a_finished_run_is_not_run_again(train):
    first = train()
    before = {p: p.stat().st_mtime_ns for p in first.folder.iterdir() if p.name != ".lock"}
    again = train()
    assert again.figures == first.figures and "finished after step 3" in again.text
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_a_folder_that_holds_another_run_is_refused(train, tmp_path):
    train()
    message = refusal(train, learning_rate=1e-4)
    assert "holds another run" in message and "learning_rate: 0.01, now 0.0001" in message
    assert "overwrite" in message and "output_dir" in message
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "adapter_model.safetensors").write_bytes(b"somebody's")
    message = refusal(train, output="foreign")
    assert "files of another run (adapter_model.safetensors)" in message
    assert (tmp_path / "foreign" / "adapter_model.safetensors").read_bytes() == b"somebody's"
    replaced = train(learning_rate=1e-4, lr_scheduler_type="constant", overwrite=True)
    assert replaced.figures["history"][0]["learning_rate"] == pytest.approx(1e-4)


def test_a_folder_that_holds_files_of_others_is_used_beside_them(train, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    refusal(train, dataset_name=str(tmp_path / "absent.jsonl"))
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    train()
    train(overwrite=True)
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_other_data_and_another_model_are_refused(train, tmp_path, tiny_model, tiny_data):
    mine = tmp_path / "mine.jsonl"
    lines = tiny_data.read_text().splitlines(keepends=True)
    mine.write_text("".join(lines))
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    settings = {"dataset_name": str(mine), "model_name_or_path": str(model), "save_steps": 2}
    stopped_before_the_end(train, **settings)
    mine.write_text("".join(lines[::-1]))
    assert "the data of the run" in refusal(train, **settings)
    going_on = train(**settings, resume_from_checkpoint=True)
    assert "not exact" in going_on.text and "the data are others" in going_on.text
    shutil.rmtree(going_on.folder)
    stopped_before_the_end(train, **settings)
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * 2
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    assert "the base model of the run" in refusal(train, **settings)


def stopped_before_the_end(train, **settings):
    """A run of three steps that stopped in its third."""
    with pytest.MonkeyPatch.context() as patch:
        poisoned(patch, 3, math.nan)
        with pytest.raises(RunError):
            train(**settings)


def test_other_threads_are_told_and_other_settings_need_a_word(train):
    if (os.cpu_count() or 1) < 2:
        pytest.skip("one processor")
    settings = {"save_steps": 2}
    stopped_before_the_end(train, **settings)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        run = train(**settings)
    finally:
        torch.set_num_threads(threads)
    assert "not exact" in run.text and f"threads: {threads}, now {threads + 1}" in run.text
    (resumed,) = run.figures["resumes"]
    assert resumed["exact"] is False and resumed["step"] == 2 and "threads" in resumed["because"][0]


def test_another_instruction_set_is_told(train, monkeypatch):
    stopped_before_the_end(train, save_steps=2)
    monkeypatch.setattr(trainer.cpu, "isa", lambda: "another")
    assert "instruction set of qlora-kernels" in train(save_steps=2).text


def test_settings_that_change_what_is_trained_cannot_be_resumed(train):
    stopped_before_the_end(train, save_steps=2)
    assert "learning_rate" in refusal(train, save_steps=2, learning_rate=1e-3)
    message = refusal(train, save_steps=2, r=4, resume_from_checkpoint=True)
    assert "cannot be loaded with other settings of r" in message
    run = train(save_steps=2, learning_rate=1e-3, resume_from_checkpoint=True)
    assert "not exact" in run.text and run.figures["steps"] == 3


def test_a_checkpoint_by_name(train, tmp_path):
    settings = {"max_steps": 4, "save_steps": 1, "save_total_limit": None}
    full = train(**settings)
    assert steps(full.folder) == [1, 2, 3, 4]
    back = train(**settings, resume_from_checkpoint="checkpoint-2")
    assert back.losses == full.losses
    assert "now superseded-checkpoint-3" in back.text
    elsewhere = train(
        "elsewhere", **settings, resume_from_checkpoint=str(full.folder / "checkpoint-3")
    )
    assert elsewhere.losses == full.losses
    for wrong, told in (
        ("checkpoint-9", "there is no checkpoint"),
        (str(tmp_path), "is not a checkpoint"),
    ):
        assert told in refusal(train, **settings, resume_from_checkpoint=wrong)
    assert "no checkpoint to resume" in refusal(train, output="new", resume_from_checkpoint=True)
    assert not (tmp_path / "new").exists()


def test_a_finished_run_goes_on_with_more_steps(train, monkeypatch):
    settings = {"lr_scheduler_type": "constant", "save_steps": 2}
    full = train("full", max_steps=6, **settings)
    train(max_steps=3, **settings)
    more = {"max_steps": 6, "resume_from_checkpoint": True, **settings}
    with monkeypatch.context() as patch:
        poisoned(patch, 6, math.nan)
        with pytest.raises(RunError):
            train(**more)
    assert not json.loads((full.folder.with_name("out") / "figures.json").read_text())["finished"]
    run = train(**more)
    assert run.losses == full.losses  # at a constant rate the number of steps decides nothing
    assert run.figures["steps"] == 6 and run.figures["finished"]
    # The first was told to be not exact, the second went on with the same settings.
    assert [(r["step"], r["exact"]) for r in run.figures["resumes"]] == [(3, False), (5, True)]
    assert "max_steps" in run.figures["resumes"][0]["because"][0]


def test_damaged_checkpoints_are_put_aside(train):
    settings = {"max_steps": 5, "save_steps": 1}
    straight = train("straight", **settings)
    with pytest.MonkeyPatch.context() as patch:
        poisoned(patch, 4, math.nan)
        with pytest.raises(RunError):
            train(**settings)
    folder = straight.folder.with_name("out")
    file = folder / "checkpoint-3" / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    run = train(**settings)
    assert run.losses == straight.losses
    assert "damaged checkpoint, not used" in run.text and "optimizer.safetensors" in run.text
    assert (folder / "damaged-checkpoint-3").is_dir()


@pytest.mark.parametrize("name", ["identity.json", "config.yaml", "log.jsonl", "figures.json"])
def test_killed_at_the_first_files_of_a_run(train, monkeypatch, name):
    """Whatever is there and whatever is not, the same command is the same run."""
    real = trainer.replace_file

    def killed(path, write):
        real(path, write)
        if path.name == name:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "replace_file", killed)
        with pytest.raises(KeyboardInterrupt):
            train(max_steps=1)
    assert train(max_steps=1).figures["finished"]


@pytest.mark.parametrize("length", [{"max_steps": 3}, {"max_steps": -1, "num_train_epochs": 1}])
def test_killed_after_the_last_step_no_step_is_left(train, monkeypatch, length):
    settings = {**length, "per_device_train_batch_size": 13, "save_steps": 1}
    straight = train("straight", **settings)
    assert straight.figures["steps"] == 3

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer._Run, "_save_result", killed)
        with pytest.raises(KeyboardInterrupt):
            train(**settings)
    run = train(**settings)
    assert run.losses == straight.losses
    assert run.figures["eval_loss_after"] == straight.figures["eval_loss_after"]
    for name, value in straight.adapter().items():
        assert torch.equal(run.adapter()[name], value)


def test_nothing_but_damaged_checkpoints(train, tmp_path):
    stopped_before_the_end(train, save_steps=2)
    for path in (tmp_path / "out").glob("checkpoint-*"):
        (path / "adapter_model.safetensors").unlink()
    with pytest.raises(DamagedCheckpoint, match="no checkpoint in .* is intact; overwrite"):
        train(save_steps=2)


# --- bad input ----------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path, tiny_model):
    """A copy of the tiny model, to be broken."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def without_weights(model):
    (model / "model.safetensors").unlink()


def truncated(model):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def truncated_header(model):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])


def without_tokenizer(model):
    for path in model.glob("*token*"):
        path.unlink()


def broken_tokenizer(model):
    (model / "tokenizer.json").write_text("{")


def without_configuration(model):
    (model / "config.json").unlink()


def fewer_words(model):
    """The tokenizer of another model: it has words that this model lacks."""
    file = model / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "vocab_size": 100}))


@pytest.mark.parametrize(
    "break_it, told",
    [
        (without_weights, "weights"),
        (truncated, "model.safetensors"),
        (truncated_header, "model.safetensors"),
        (without_tokenizer, "holds no tokenizer"),
        (broken_tokenizer, "the tokenizer in .* cannot be read"),
        (without_configuration, "config.json"),
        (fewer_words, "belongs to another model"),
    ],
)
def test_a_model_folder_that_cannot_be_used(train, model, tmp_path, break_it, told):
    break_it(model)
    message = refusal(train, model_name_or_path=str(model))
    assert str(model) in message or "another model" in message
    assert re.search(told, message), message
    assert not (tmp_path / "out").exists(), "an error of input leaves nothing"


@pytest.mark.parametrize(
    "settings, told",
    [
        ({"model_name_or_path": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"max_length": 1000}, "takes 256 tokens at most"),
        ({"target_modules": ["q_prj"]}, "q_prj"),
        ({"eval_split": 0, "eval_dataset": "absent.jsonl"}, "absent.jsonl"),
        ({"dataloader_drop_last": True, "per_device_train_batch_size": 50}, "make no batch of 50"),
    ],
)
def test_settings_that_do_not_fit_the_model_or_the_data(train, tmp_path, settings, told):
    assert told in refusal(train, **settings)


@pytest.mark.parametrize(
    "content, told",
    [
        (None, "data.jsonl"),
        (b"", "empty"),
        (b'{"prompt": "a", "completion": "b"}\n{"prompt": "a", "compl', "data.jsonl:2"),
        (b'{"prompt": "a", "completion": "b"}\n{"prompt": "\xff"}\n', "data.jsonl:2"),
        (b'{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n', "data.jsonl:2"),
        (b'{"foo": "a"}\n', "foo"),
    ],
    ids=["absent", "empty", "half-written", "not UTF-8", "lacks a field", "unknown fields"],
)
def test_a_data_file_that_cannot_be_used(train, tmp_path, content, told):
    file = tmp_path / "data.jsonl"
    if content is not None:
        file.write_bytes(content)
    message = refusal(train, dataset_name=str(file))
    assert told in message and "data.jsonl" in message
    assert not (tmp_path / "out").exists()
