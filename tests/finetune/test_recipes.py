"""Recipes: every setting of the YAML reaches the trainer, PEFT, the quantizer or the data."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch

from qlora_kernels import cli, demo
from qlora_kernels.finetune import trainer
from qlora_kernels.finetune.config import parse_arguments, read_yaml, resolve
from qlora_kernels.finetune.errors import BadInput
from qlora_kernels.nn import Linear4bit
from qlora_kernels.optim import PagedAdamW32bit
from qlora_kernels.recipes import FOLDER, recipe_names, scale_names

# Dettmers et al. 2023, section 5 and appendix B; the authors' scripts where the paper is silent.
PAPER = {
    "r": 64, "lora_alpha": 16, "target_modules": "all-linear", "bias": "none",
    "quant_type": "nf4", "blocksize": 64, "double_quant": True, "dtype": "bfloat16",
    "optim": "paged_adamw_32bit", "adam_beta1": 0.9, "adam_beta2": 0.999, "max_grad_norm": 0.3,
    "weight_decay": 0.0, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 0.03,
    "per_device_train_batch_size": 1, "gradient_accumulation_steps": 16, "max_steps": 1875,
    "train_sampling_strategy": "group_by_length", "train_on": "all", "max_length": 512,
    "dataset_name": "OpenAssistant/oasst1:train",
}  # fmt: skip
OF_SIZE = {
    "guanaco-7b": ("huggyllama/llama-7b", 2e-4, 0.1),
    "guanaco-13b": ("huggyllama/llama-13b", 2e-4, 0.1),
    "guanaco-33b": ("huggyllama/llama-30b", 1e-4, 0.05),
    "guanaco-65b": ("huggyllama/llama-65b", 1e-4, 0.05),
}


def test_the_recipes_are_the_papers():
    assert recipe_names() == list(OF_SIZE) and scale_names() == ["tiny"]
    files = {name: read_yaml(FOLDER / f"{name}.yaml") for name in OF_SIZE}
    for name, (model, rate, dropout) in OF_SIZE.items():
        settings = files[name]
        assert {k: settings.get(k) for k in PAPER} == PAPER
        assert settings["model_name_or_path"] == model
        assert settings["learning_rate"] == rate and settings["lora_dropout"] == dropout
        # Nothing else differs between the sizes.
        alike = {"model_name_or_path", "learning_rate", "lora_dropout"}
        same = {k: v for k, v in settings.items() if k not in alike}
        assert same == {k: v for k, v in files["guanaco-7b"].items() if k not in alike}


# --- what a run gets ----------------------------------------------------------------------------


def trees(path: Path, count: int, first: int = 0) -> Path:
    """OASST1 as published, small."""
    with path.open("w") as file:
        for i in range(first, first + count):
            replies = [
                {"message_id": f"{i}-{rank}", "role": "assistant", "text": f"{i} " * (i % 7 + 1)
                 + f"rank {rank}.", "rank": rank, "replies": []} for rank in (1, 0)
            ]  # fmt: skip
            prompt = {"message_id": str(i), "role": "prompter", "text": f"Count to {i}!",
                      "replies": replies}  # fmt: skip
            file.write(json.dumps({"message_tree_id": str(i), "prompt": prompt}) + "\n")
    return path


@pytest.fixture(scope="module")
def large_model(make_tiny_model, tmp_path_factory) -> Path:
    """A tiny model with a context of 512."""
    return make_tiny_model(tmp_path_factory.mktemp("model"), max_position_embeddings=512)


@pytest.fixture
def reached(_imported, no_plan, monkeypatch, tmp_path, large_model):
    """``reached(recipe)``: the trainer and the options of the data that a run of it made, stopped
    before its first step. Model and data are local; all else is the recipe's."""

    def run(recipe: str):
        found = {}

        class Stop(Exception):
            pass

        def stop(self, trainer, resume):
            found["trainer"], found["config"] = trainer, self.config
            raise Stop

        def prepared(options, tokenizer):
            found["options"] = options
            return prepare(options, tokenizer)

        prepare = trainer.prepare
        monkeypatch.setattr(trainer._Run, "_train", stop)
        monkeypatch.setattr(trainer, "prepare", prepared)
        words = [
            "finetune", "--recipe", recipe, "--model_name_or_path", str(large_model),
            "--dataset_name", str(trees(tmp_path / "train.jsonl", 40)),
            "--eval_dataset", str(trees(tmp_path / "eval.jsonl", 4, first=40)),
            "--output_dir", str(tmp_path / "out"),
        ]  # fmt: skip
        with pytest.raises(Stop):
            cli.main(words)
        return found

    return run


# Who has to have a setting: training arguments, PEFT's configuration, the data's options. What
# is of none of them is looked up below.
TRAINING = """
    optim learning_rate adam_beta1 adam_beta2 weight_decay max_grad_norm lr_scheduler_type
    warmup_steps per_device_train_batch_size gradient_accumulation_steps max_steps
    activation_checkpointing seed data_seed logging_steps save_strategy save_steps eval_strategy
    eval_steps per_device_eval_batch_size train_sampling_strategy
""".split()
LORA = "r lora_alpha lora_dropout bias".split()
DATA = "train_on max_length too_long packing".split()


@pytest.mark.parametrize(
    "recipe", ["guanaco-7b", pytest.param("guanaco-65b", marks=pytest.mark.full)]
)
def test_every_setting_of_a_recipe_reaches_the_run(reached, recipe):
    found = reached(recipe)
    run, options = found["trainer"], found["options"]
    lora = run.model.peft_config["default"]
    settings = read_yaml(FOLDER / f"{recipe}.yaml")

    for name in TRAINING:
        assert getattr(run.args, name) == settings.pop(name), name
    for name in LORA:
        assert getattr(lora, name) == settings.pop(name), name
    for name in DATA:
        assert getattr(options, name) == settings.pop(name), name

    layers = [m for m in run.model.modules() if isinstance(m, Linear4bit)]
    assert len(layers) == 14
    for layer in layers:  # the quantizer: what each layer in fact is
        assert layer.quant_type == settings["quant_type"]
        assert layer.blocksize == settings["blocksize"]
        assert layer.weight.quant_state.nested == settings["double_quant"]
    adapted = {n for n, m in run.model.named_modules() if hasattr(m, "lora_A") and m.lora_A}
    assert settings["target_modules"] == "all-linear" and len(adapted) == len(layers)
    dropouts = {m.p for n, m in run.model.named_modules() if ".lora_dropout." in n}
    assert dropouts == {lora.lora_dropout}
    assert getattr(torch, settings["dtype"]) == run.model.get_input_embeddings().weight.dtype
    template = (FOLDER / settings["chat_template_path"]).read_text()
    assert options.chat_template == template
    assert "### Human: Count to 3!\n### Assistant: 3 3 3 3 rank 0.<|im_end|>" in [
        run.processing_class.decode(row["input_ids"]).removeprefix("<|im_start|>").strip()
        for row in run.train_dataset
    ]
    for name in ("quant_type", "blocksize", "double_quant", "target_modules", "dtype",
                 "chat_template_path"):  # fmt: skip
        del settings[name]
    # These were given otherwise, so that the run needs no network.
    assert set(settings) == {"model_name_or_path", "dataset_name", "eval_dataset"}

    run.create_optimizer_and_scheduler(run.args.max_steps)
    assert isinstance(getattr(run.optimizer, "optimizer", run.optimizer), PagedAdamW32bit)
    (group, *_) = run.optimizer.param_groups
    assert group["betas"] == (0.9, 0.999) and group["weight_decay"] == 0.0
    rates = []
    for _ in range(60):
        rates.append(run.lr_scheduler.get_last_lr()[0])
        run.optimizer.step()  # without gradients: nothing moves but the count
        run.lr_scheduler.step()
    warm = 57  # 0.03 of 1875 steps, rounded up
    assert rates[0] == 0 and rates[warm - 1] < run.args.learning_rate == rates[warm] == rates[-1]


def test_the_template_is_the_default_one_written_out(tiny_model):
    """A base model without a template is trained in the same words as ever."""
    from qlora_kernels.finetune.data.encode import DEFAULT_TEMPLATE
    from qlora_kernels.finetune.model import load_tokenizer

    tokenizer = load_tokenizer(tiny_model)
    talk = [
        {"role": "system", "content": "s"}, {"role": "user", "content": "u\n"},
        {"role": "assistant", "content": "a"}, {"role": "user", "content": "v"},
    ]  # fmt: skip
    ours = (FOLDER / "guanaco.jinja").read_text()
    for opened in (False, True):
        texts = [
            tokenizer.apply_chat_template(
                talk, chat_template=template, tokenize=False, add_generation_prompt=opened
            )
            for template in (ours, DEFAULT_TEMPLATE.replace("{bos}", ""))
        ]
        assert texts[0] == texts[1] != ""


# --- on top of a recipe -------------------------------------------------------------------------


def told(words: str):
    return resolve(parse_arguments(words.split()))


def test_what_is_given_wins_over_the_recipe(tmp_path):
    config = told("--recipe guanaco-7b --learning_rate 5e-5 --lora_r 8")
    assert config.learning_rate == 5e-5 and config.r == 8 and config.max_steps == 1875
    assert config.eval_dataset == "OpenAssistant/oasst1:validation"
    file = tmp_path / "run.yaml"
    file.write_text("recipe: guanaco-33b\nr: 4\nlora_alpha: 8\n")
    config = resolve({"lora_alpha": 32}, read_yaml(file))
    assert (config.r, config.lora_alpha, config.learning_rate) == (4, 32, 1e-4)
    assert config.recipe == "guanaco-33b" and "from the recipe guanaco-33b" in config.to_yaml()


def test_what_replaces_a_part_takes_its_fellows_along():
    """Another data set is not judged on OASST1; epochs are not cut off by the recipe's steps."""
    config = told("--recipe guanaco-7b --dataset_name mine.jsonl --num_train_epochs 2")
    assert config.eval_dataset is None and config.max_steps == -1
    assert any("eval_dataset" in n and "max_steps" in n for n in config.notices)
    kept = told("--recipe guanaco-7b --dataset_name a.jsonl --eval_dataset b.jsonl --max_steps 5")
    assert kept.eval_dataset == "b.jsonl" and kept.max_steps == 5


def test_a_resolved_recipe_is_the_same_run_without_it(tmp_path):
    config = told("--recipe guanaco-13b")
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml())
    again = resolve({}, read_yaml(file))
    assert again.values == config.values and again.recipe is None


def test_a_recipe_of_your_own(tmp_path):
    file = tmp_path / "mine.yaml"
    (tmp_path / "mine.jinja").write_text("{{ messages[0].content }}")
    file.write_text("model: a\ndataset: b.jsonl\nlora_r: 3\nchat_template_path: mine.jinja\n")
    config = told(f"--recipe {file}")
    assert (config.model_name_or_path, config.dataset_name, config.r) == ("a", "b.jsonl", 3)
    assert config.chat_template_path == str(tmp_path / "mine.jinja")
    assert told(f"--recipe {file} --scale tiny --model b").max_steps == 30


@pytest.mark.parametrize(
    "words, message",
    [
        ("--recipe guanaco-8b", "the nearest is guanaco-"),
        ("--recipe guanaco", "guanaco-7b, guanaco-13b, guanaco-33b, guanaco-65b"),
        ("--recipe nowhere.yaml", "no configuration file nowhere.yaml"),
        ("--recipe guanaco-7b --scale tinny", "the nearest is tiny"),
        ("--scale tiny", "needs a recipe"),
        ("--recipe guanaco-7b --lorar 3", "lora_r"),
        ("--recipe guanaco-7b --do_mmlu_eval", "needs mmlu_dataset"),
        ("--recipe guanaco-7b --do_mmlu_eval --mmlu_dataset mmlu-fs", "mmlu_shots"),
    ],
)
def test_recipes_that_cannot_be(words, message):
    with pytest.raises(BadInput) as caught:
        told(words)
    assert message in str(caught.value)


def test_recipes_that_are_none(tmp_path):
    for content, message in (
        ("- a\n", "must hold `name: value` lines"),
        ("recipe: guanaco-7b\n", "a recipe cannot name a recipe"),
        ("lerning_rate: 1\n", "the nearest name is learning_rate"),
        ("a: [\n", "is not YAML"),
    ):
        file = tmp_path / "mine.yaml"
        file.write_text(content)
        with pytest.raises(BadInput, match=message):
            told(f"--recipe {file}")


def test_a_warm_up_that_would_do_nothing_is_told():
    config = told("--recipe guanaco-7b --lr_scheduler_type constant")
    assert any("warmup_steps does nothing" in n for n in config.notices)


# --- --scale tiny -------------------------------------------------------------------------------


def test_scale_tiny_says_what_it_scales_and_keeps_the_method(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "converted_model", lambda cache, *say: tmp_path)
    config = told("--recipe guanaco-33b --scale tiny --max_length 99")
    scale = read_yaml(FOLDER / "tiny.scale.yaml")
    assert config.model_name_or_path == str(tmp_path) and config.dataset_name == "python-docs"
    assert config.max_steps == 30 and config.max_length == 99
    (notice,) = [n for n in config.notices if n.startswith("scale tiny changes of guanaco-33b")]
    for name in scale:
        assert (name in notice) == (name != "max_length"), name
    assert "max_steps 1875 -> 30" in notice
    # The method is the recipe's.
    whole = resolve({"recipe": "guanaco-33b"})
    changed = {k for k, v in config.values.items() if v != whole.values[k]}
    assert changed <= set(scale) | {"eval_dataset"}


def test_scale_tiny_trains(train, no_plan, tiny_model, tmp_path):
    """The whole way, on local trees and a model of two layers."""
    data = trees(tmp_path / "trees.jsonl", 60)
    run = train(
        recipe="guanaco-7b", scale="tiny", dataset_name=str(data), max_steps=6,
        save_steps=4, eval_steps=3, max_samples=50, lora_dropout=0.0,
    )  # fmt: skip
    figures = run.figures
    assert figures["steps"] == 6 and figures["eval_loss_after"] < figures["eval_loss_before"]
    assert [e["step"] for e in figures["evaluations"]] == [0, 3, 6]
    assert (
        "recipe guanaco-7b, scale tiny" in run.text and "Guanaco was trained on 9,846" in run.text
    )
    assert "### Human" in run.text


# --- MMLU while training ------------------------------------------------------------------------


@pytest.fixture
def questions(tmp_path) -> Path:
    folder = tmp_path / "mmlu"
    for split, count in (("dev", 5), ("val", 4), ("test", 6)):
        (folder / split).mkdir(parents=True)
        for subject in ("anatomy", "sociology"):
            with (folder / split / f"{subject}_{split}.csv").open("w", newline="") as file:
                for i in range(count):
                    csv.writer(file).writerow([f"{i}?", "a", "b", "c", "d", "ABCD"[i % 4]])
    return folder


def test_mmlu_is_measured_on_the_way_and_changes_nothing(train, no_plan, questions):
    """Before, at each evaluation, after; the losses are those of a run that asked nothing."""
    settings = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "lora_dropout": 0.1}
    asked = train(
        "asked", do_mmlu_eval=True, mmlu_dataset=str(questions), mmlu_split="eval",
        max_mmlu_samples=3, mmlu_source_max_len=250, **settings
    )  # fmt: skip
    plain = train("plain", **settings)
    assert asked.losses == plain.losses
    result = asked.figures["mmlu"]
    assert result["split"] == "val" and result["questions"] == 6 and result["shots"] == 5
    assert [e["step"] for e in result["evaluations"]] == [0, 2, 4]
    assert json.loads((asked.folder / "mmlu.json").read_text()) == result
    assert asked.text.count("MMLU (split val, 5-shot) after step") == 3
    assert "mmlu" not in plain.figures


def test_mmlu_of_the_trained_model_is_what_the_command_says(train, no_plan, questions, tmp_path):
    run = train(
        do_mmlu_eval=True, mmlu_dataset=str(questions), mmlu_split="test", eval_split=0,
        mmlu_shots=1, max_steps=3, learning_rate=5e-2,
    )  # fmt: skip
    steps = run.figures["mmlu"]["evaluations"]
    assert [e["step"] for e in steps] == [0, 3]
    output = tmp_path / "mmlu.json"
    words = ["mmlu", "--adapter", str(run.folder), "--data", str(questions), "--split", "test",
             "--shots", "1", "--dtype", "float32", "--output", str(output)]  # fmt: skip
    assert cli.main(words) == 0
    result = json.loads(output.read_text())
    assert result["split"] == "test"
    assert result["subjects"] == steps[-1]["subjects"]


def test_mmlu_goes_on_where_a_run_does(train, no_plan, questions, monkeypatch):
    settings = {
        "do_mmlu_eval": True, "mmlu_dataset": str(questions), "max_mmlu_samples": 2,
        "mmlu_shots": 1, "max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2,
    }  # fmt: skip
    whole = train("whole", **settings).figures["mmlu"]
    real, steps = trainer.QLoraTrainer.training_step, []

    def dies(self, *args):
        steps.append(1)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(trainer.QLoraTrainer, "training_step", dies)
    with pytest.raises(KeyboardInterrupt):
        train("killed", **settings)
    run = train("killed", **settings)
    assert run.figures["mmlu"] == whole and len(whole["evaluations"]) == 3
    assert run.text.count("MMLU (split") == 1, "what was measured is measured again"


def test_mmlu_that_is_malformed_ends_the_run_before_it_begins(train, no_plan, questions):
    shutil.rmtree(questions / "dev")
    with pytest.raises(BadInput, match="anatomy_dev.csv"):
        train(do_mmlu_eval=True, mmlu_dataset=str(questions))
