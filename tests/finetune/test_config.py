"""The names that a finetune takes: every one known, translated, refused or an error."""

from __future__ import annotations

import dataclasses

import pytest
import yaml
from peft import LoraConfig
from transformers import TrainingArguments
from trl import SFTConfig

from qlora_kernels.finetune.command import help_text
from qlora_kernels.finetune.config import (
    known_keys,
    parse_arguments,
    read_yaml,
    resolve,
)
from qlora_kernels.finetune.errors import BadInput
from qlora_kernels.finetune.names import DEFAULTS, FREE, HARMLESS, REFUSED, TRANSLATED

NEEDED = {"model_name_or_path": "m", "dataset_name": "d.jsonl"}


def resolved(**settings):
    return resolve({**NEEDED, **settings})


def refusal(**settings) -> str:
    with pytest.raises(BadInput) as caught:
        resolved(**settings)
    return str(caught.value)


# --- every name has a fate ------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [TrainingArguments, SFTConfig, LoraConfig])
def test_every_field_of_the_installed_dataclasses_is_known(cls):
    for field in dataclasses.fields(cls):
        if field.init:
            assert field.name in known_keys() or field.name in TRANSLATED, field.name


def test_tables_name_nothing_that_does_not_exist():
    keys = known_keys()
    for table in (DEFAULTS, FREE, REFUSED):
        assert not [name for name in table if name not in keys]
    for name in HARMLESS:
        assert name in REFUSED or name in TRANSLATED
    assert not set(REFUSED) & set(TRANSLATED)
    assert not set(REFUSED) & set(DEFAULTS)


def test_defaults_are_those_of_the_installed_dataclasses_unless_listed():
    config = resolved()
    args = config.training_args()
    for field in dataclasses.fields(TrainingArguments):
        key = known_keys().get(field.name)
        if key is None or key.section != "training" or field.name in {*REFUSED, *DEFAULTS}:
            continue
        if field.default is not dataclasses.MISSING:
            # Compared before __post_init__ derives other values from it.
            assert config.values[field.name] == known_keys()[field.name].default
    assert args.learning_rate == 2e-4
    assert args.activation_checkpointing is True
    assert args.bf16 is False  # SFTConfig would turn autocast on
    assert args.report_to == []


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_refused_name_is_an_error_with_its_reason_and_its_default_is_not(name):
    key = known_keys()[name]
    resolved(**{name: key.default})
    others = [
        value
        for value in (True, False, 7, "other", {"a": 1})
        if value != key.default and value not in HARMLESS.get(name, ())
    ]
    assert others
    for value in others:
        message = refusal(**{name: value})
        assert name in message and REFUSED[name] in message


# --- names that moved, and names of others --------------------------------------------------------


@pytest.mark.parametrize(
    "given, name, value",
    [
        ({"torch_dtype": "bfloat16"}, "dtype", "bfloat16"),
        ({"dtype": "fp16"}, "dtype", "float16"),
        ({"gradient_checkpointing": False}, "activation_checkpointing", False),
        ({"evaluation_strategy": "steps"}, "eval_strategy", "steps"),
        ({"warmup_ratio": 0.1}, "warmup_steps", 0.1),
        ({"group_by_length": True}, "train_sampling_strategy", "group_by_length"),
        ({"group_by_length": False}, "train_sampling_strategy", "random"),
        ({"max_seq_length": 77}, "max_length", 77),
        ({"lora_r": 64}, "r", 64),
        ({"lora_target_modules": ["q_proj"]}, "target_modules", ["q_proj"]),
        ({"bnb_4bit_quant_type": "fp4"}, "quant_type", "fp4"),
        ({"use_bnb_nested_quant": False}, "double_quant", False),
        ({"bnb_4bit_compute_dtype": "float32"}, "compute_dtype", "float32"),
        ({"load_in_4bit": True}, "quant_type", "nf4"),
        ({"load_in_4bit": False}, "quant_type", "none"),
        ({"bits": 16}, "quant_type", "none"),
        ({"bits": 4}, "quant_type", "nf4"),
        ({"source_max_len": 512, "target_max_len": 128}, "max_length", 640),
        ({"source_max_len": 512}, "max_length", 768),  # the script's own target_max_len is 256
        ({"train_on_source": True}, "train_on", "all"),
        ({"completion_only_loss": True}, "train_on", "replies"),
        ({"assistant_only_loss": False}, "train_on", "all"),
        ({"eval_dataset_size": 100}, "eval_split", 100),
        ({"eval_dataset_size": "0.1"}, "eval_split", 0.1),
        ({"max_train_samples": 10}, "max_samples", 10),
        ({"max_memory_MB": 8000}, "max_memory_mb", 8000),
        ({"adam8bit": True}, "optim", "adamw_bnb_8bit"),
        ({"dataset_text_field": "body"}, "dataset_columns", {"text": "body"}),
        ({"overwrite_output_dir": True}, "overwrite", True),
        ({"double_quant": False}, "double_quant", False),
    ],
)
def test_a_name_of_others_is_translated_and_the_translation_told(given, name, value):
    config = resolved(**given)
    assert config.values[name] == value
    assert type(config.values[name]) is type(value)
    translated = [n for n in given if n in TRANSLATED]
    assert all(any(n in notice for notice in config.notices) for n in translated)


@pytest.mark.parametrize(
    "given",
    [
        {"load_in_8bit": True},
        {"bits": 8},
        {"full_finetune": True},
        {"use_peft": False},
        {"do_mmlu_eval": True},
        {"loss_type": "dft"},
        {"lora_task_type": "SEQ_CLS"},
        {"dataset_streaming": True},
    ],
)
def test_what_translates_into_nothing_here_is_refused(given):
    assert next(iter(given)) in refusal(**given) or "8-bit" in refusal(**given)


@pytest.mark.parametrize("name", ["num_beams", "temperature", "tokenizer_name", "cache_dir"])
def test_a_name_without_meaning_is_explained(name):
    config = resolved(**{name: 1})
    assert any(notice.startswith(name) for notice in config.notices)


def test_two_names_for_one_thing_that_disagree_are_an_error():
    message = refusal(r=8, lora_r=16)
    assert "r" in message and "lora_r" in message and "8" in message and "16" in message
    assert resolved(r=16, lora_r=16).r == 16
    assert "max_length" in refusal(max_length=100, source_max_len=64)


def test_splits_of_a_hub_data_set():
    config = resolve(
        {"model": "m", "dataset": "a/b", "dataset_train_split": "x", "dataset_test_split": "y"}
    )
    assert (config.dataset_name, config.eval_dataset) == ("a/b:x", "a/b:y")
    assert "split" in refusal(dataset_train_split="x")


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong, right",
    [
        ("learnig_rate", "learning_rate"),
        ("lora_rank", "r"),
        ("max_sequence_length", "max_length"),
        ("lora_dropuot", "lora_dropout"),
        ("batch_size", "per_device_train_batch_size"),
        ("epochs", "num_train_epochs"),
        ("quant_typ", "quant_type"),
        ("targetmodules", "target_modules"),
    ],
)
def test_an_unknown_name_is_an_error_with_the_nearest_one(wrong, right):
    message = refusal(**{wrong: 1})
    assert wrong in message
    assert f"the nearest name is {right} " in message


@pytest.mark.parametrize(
    "given, told",
    [
        ({"max_steps": "ten"}, "ten"),
        ({"max_steps": 1.5}, "1.5"),
        ({"learning_rate": "fast"}, "fast"),
        ({"packing": "perhaps"}, "perhaps"),
        ({"eval_strategy": "never"}, "steps"),
        ({"optim": "adamm"}, "adamm"),
        ({"lr_scheduler_type": "cosin"}, "cosin"),
        ({"bias": "some"}, "lora_only"),
        ({"init_lora_weights": "piss"}, "pissa"),
        ({"quant_type": "nf5"}, "nf5"),
        ({"blocksize": 100}, "100"),
        ({"dtype": "int8"}, "float32"),
        ({"dtype": None}, "nothing is given"),
        ({"r": 0}, "r is 0"),
        ({"lora_dropout": 1.0}, "below 1"),
        ({"learning_rate": -1}, "negative"),
        ({"per_device_train_batch_size": 0}, "above 0"),
        ({"max_steps": 0}, "nothing to do"),
        ({"num_train_epochs": 0}, "nothing to do"),
        ({"train_sampling_strategy": "batch_rebalance"}, "group_by_length"),
        ({"bf16": True, "fp16": True}, "both"),
        ({"eval_split": 0, "eval_strategy": "steps"}, "held-out"),
        ({"dataset_columns": "text"}, "name=value"),
        ({"max_memory_mb": -5}, "above 0"),
    ],
)
def test_a_value_that_cannot_be_is_named(given, told):
    message = refusal(**given)
    assert told in message
    assert any(name in message for name in given) or "nothing to do" in message


def test_model_and_data_are_required():
    with pytest.raises(BadInput, match="model_name_or_path is missing"):
        resolve({"dataset_name": "d"})
    with pytest.raises(BadInput, match="dataset_name is missing"):
        resolve({"model_name_or_path": "m"})


def test_what_the_dataclasses_refuse_is_an_error_of_input():
    with pytest.raises(BadInput, match="LoRA options"):
        resolved(use_dora=True, lora_bias=True, init_lora_weights="loftq").lora_config()
    with pytest.raises(BadInput, match="training options"):
        resolved(load_best_model_at_end=True, eval_strategy="epoch").training_args()


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, text, value",
    [
        ("learning_rate", "1e-4", 1e-4),
        ("max_steps", "10", 10),
        ("packing", "true", True),
        ("packing", "no", False),
        ("target_modules", "q_proj,v_proj", ["q_proj", "v_proj"]),
        ("target_modules", "q_proj", ["q_proj"]),
        ("target_modules", "all-linear", "all-linear"),
        ("target_modules", r".*\.(q|v)_proj", r".*\.(q|v)_proj"),
        ("target_modules", ["q_proj", "k_proj"], ["q_proj", "k_proj"]),
        ("eval_strategy", False, "no"),  # YAML reads a bare no as false
        ("report_to", "none", "none"),
        ("save_total_limit", "null", None),
        ("optim_args", "a=1", "a=1"),
        ("dataset_columns", "prompt=q,completion=a.0", {"prompt": "q", "completion": "a.0"}),
        ("lr_scheduler_kwargs", '{"num_cycles": 2}', {"num_cycles": 2}),
        ("rank_pattern", {"q_proj": 4}, {"q_proj": 4}),
        ("init_lora_weights", "false", False),
        ("init_lora_weights", "gaussian", "gaussian"),
        ("init_lora_weights", "pissa_niter_4", "pissa_niter_4"),
        ("eval_split", "32", 32),
        ("eval_split", "0.25", 0.25),
        ("warmup_steps", "0.03", 0.03),
        ("layers_to_transform", "1,2", [1, 2]),
        ("layers_to_transform", "3", 3),
    ],
)
def test_words_become_values_of_the_declared_type(name, text, value):
    found = resolved(**{name: text}).values[name]
    assert found == value
    assert type(found) is type(value)


def test_the_command_line_as_settings():
    line = "--lr-scheduler-type cosine --max_steps -1 --packing --no_double_quant --r=8"
    assert parse_arguments([*line.split(), "--target_modules", "q_proj", "v_proj"]) == {
        "lr_scheduler_type": "cosine",
        "max_steps": "-1",
        "packing": True,
        "double_quant": False,
        "r": "8",
        "target_modules": ["q_proj", "v_proj"],
    }
    assert parse_arguments(["--no_cuda"]) == {"no_cuda": True}  # a name of its own
    with pytest.raises(BadInput, match="stands alone"):
        parse_arguments(["yes", "--packing"])
    with pytest.raises(BadInput, match="given twice"):
        parse_arguments(["--r", "8", "--r=9"])


def test_the_command_line_wins_over_the_file():
    config = resolve({"lora_r": "8"}, {**NEEDED, "r": 64, "max_steps": 5})
    assert (config.r, config.max_steps) == (8, 5)


@pytest.mark.parametrize(
    "text, told",
    [
        ("r: 8\nr: 9\n", "line 1 and in line 2"),
        ("- a\n- b\n", "list"),
        ("r: [8\n", "not YAML"),
        (b"r: \xff\n", "not UTF-8"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path, text, told):
    path = tmp_path / "c.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(BadInput, match=told) as caught:
        read_yaml(path)
    assert str(path) in str(caught.value)
    with pytest.raises(BadInput, match="no configuration file"):
        read_yaml(tmp_path / "absent.yaml")


def test_the_resolved_configuration_gives_itself_again():
    config = resolved(
        lora_r=64,
        target_modules="q_proj",
        lr_scheduler_type="cosine",
        dataset_columns="prompt=q",
        eval_strategy="steps",
        learning_rate="3e-5",
        hub_token="secret",
    )
    text = config.to_yaml()
    assert "secret" not in text
    again = resolve({}, yaml.safe_load(text))
    assert {**again.values, "hub_token": "secret"} == config.values
    assert not again.notices


def test_what_is_decisive():
    base = resolved().decisive
    assert resolved(save_steps=7, logging_steps=3, output_dir="x", eval_steps=5).decisive == base
    for changed in (
        {"learning_rate": 1e-5},
        {"seed": 1},
        {"r": 8},
        {"train_on": "all"},
        {"max_length": 99},
        {"loss_chunk": 64},
        {"dataset_columns": "prompt=q"},
    ):
        differs = resolved(**changed).decisive != base
        assert differs == (next(iter(changed)) not in FREE)
    # Where training looks at evaluations, when they come matters.
    plateau = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"}
    assert resolved(**plateau, eval_steps=5).decisive != resolved(**plateau, eval_steps=6).decisive


def test_help_lists_every_name_once_or_says_why_not():
    text = help_text(everything=True)
    for name in known_keys():
        wanted = f"  {name}: " if name in REFUSED else f"  --{name}"
        count = sum(
            line.split("  [")[0] == wanted
            or line.startswith(wanted + ": ")
            or (name in REFUSED and line.startswith(wanted))
            for line in text.splitlines()
        )
        assert count == 1, name
    assert max(map(len, help_text(everything=False).splitlines())) < 220
