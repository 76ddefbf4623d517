"""What a finetune is told: names, defaults, translations and checks.

There is one flat space of names, for YAML files and command lines alike, in four sections:

- ``run``: this command's own (:class:`Options`); where TRL's ``ModelConfig`` and
  ``ScriptArguments`` have a name for the same thing, it is that one;
- ``training``: transformers' ``TrainingArguments``; ``sft``: what TRL's ``SFTConfig`` adds to it;
- ``lora``: PEFT's ``LoraConfig``.

The last three are read off the installed dataclasses, so that names, types and defaults are those
of the versions at hand. Names that moved, and those of the original QLoRA script, are translated
and the translation is told (:data:`TRANSLATED`). What cannot be honoured is refused with the
reason (:data:`REFUSED`), and an unknown name is an error with the nearest known one: nothing that
the user says is dropped in silence.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import json
import os
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from .errors import BadInput, bad_input

__all__ = [
    "FinetuneConfig",
    "Key",
    "Options",
    "known_keys",
    "parse_arguments",
    "read_yaml",
    "resolve",
]


def _opt(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class Options:
    """This command's own names. ``help`` of each is what ``qlora finetune --help`` prints."""

    model_name_or_path: str | None = _opt(None, "folder or hub id of the base model (required)")
    dataset_name: str | None = _opt(
        None, "JSONL or Parquet file, folder, hub id (owner/name:split) or python-docs (required)"
    )
    model_revision: str | None = _opt(None, "revision of a hub model")
    cache_dir: str | None = _opt(None, "where hub files are kept")
    dtype: str = _opt(
        "auto", "of what is not quantized: auto (bf16 where the hardware has it), float32, ..."
    )
    attn_implementation: str = _opt("sdpa", "attention implementation of transformers")
    quant_type: str = _opt("nf4", "4-bit format (nf4, fp4, fp4_e2m1, int4); none leaves 16 bits")
    blocksize: int = _opt(64, "weights a scale, 16 to 4096")
    double_quant: bool = _opt(True, "quantize the scales as well")
    compute_dtype: str | None = _opt(None, "of the 4-bit products; that of their input if left out")
    skip_modules: list[str] | None = _opt(
        None, "modules that stay as they are (the output layer if left out)"
    )
    dataset_format: str | None = _opt(None, "alpaca, chat, sharegpt, ...; recognised if left out")
    dataset_columns: dict[str, str] | None = _opt(
        None, "role: column, where columns have other names; on the command line prompt=q,..."
    )
    eval_dataset: str | None = _opt(None, "held-out data of its own")
    eval_split: float | int = _opt(
        0.05, "share (below 1) or number of samples held out; 0 for none"
    )
    train_on: str = _opt("replies", "tokens that are trained: replies, or all")
    too_long: str = _opt("truncate", "samples longer than max_length: truncate or drop")
    max_samples: int | None = _opt(None, "read no more samples than this")
    loss_chunk: int = _opt(
        0, "tokens whose logits are held at once by the fused loss; 0 lets it choose"
    )
    max_memory_mb: int | None = _opt(None, "memory that the plan may use; the machine's if left out")
    force: bool = _opt(False, "go on although the memory plan says that it will not fit")
    overwrite: bool = _opt(False, "delete another run that is in output_dir")


# Where this command differs from the installed defaults, with the reason. Everything else keeps
# the default of its dataclass.
DEFAULTS: dict[str, Any] = {
    # Dettmers et al. 2023, appendix B: what 4-bit finetuning was shown to work with.
    "learning_rate": 2e-4,
    "max_grad_norm": 0.3,
    "warmup_steps": 0.03,
    "target_modules": "all-linear",
    "r": 16,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    # 16 samples a step, as there, in a size that fits a laptop.
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 4,
    "per_device_eval_batch_size": 4,
    "num_train_epochs": 1.0,
    "activation_checkpointing": True,
    "output_dir": "qlora-out",
    "logging_steps": 1,
    "save_steps": 100,
    "save_total_limit": 2,
    "report_to": "none",
    # dtype decides, not autocast: see Options.dtype.
    "bf16": False,
}

_ONE_PROCESS = "one process on one device is trained here, and its checkpoints are exact on that"
_LOSS_ALONE = "evaluation computes the loss on the held-out samples, token by token, and no more"
_UPLOAD = "this command uploads nothing; `hf upload <repo> <output_dir>` does"
_PEFT_SETS = "PEFT sets it by itself"
_OWN_LOADER = "the data loader is this command's own"

# Known names that cannot be honoured, and why. Their default is taken in silence (a resolved
# configuration or a shared file may hold it), any other value is an error.
REFUSED: dict[str, str] = {
    "fsdp": _ONE_PROCESS,
    "fsdp_config": _ONE_PROCESS,
    "deepspeed": _ONE_PROCESS,
    "parallelism_config": _ONE_PROCESS,
    "local_rank": _ONE_PROCESS,
    "use_liger_kernel": "the loss is fused already, and the linear layers are this package's",
    "liger_kernel_config": "see use_liger_kernel",
    "label_smoothing_factor": "the fused loss computes the plain cross entropy",
    "save_only_model": "a checkpoint without the optimizer's state could not be resumed exactly",
    "ignore_data_skip": "a resume that repeats data is not exact",
    "enable_jit_checkpoint": "SIGTERM and SIGINT save a checkpoint here always",
    "auto_find_batch_size": "the memory plan says what fits; a batch size found by failing would "
    "change the run",
    "use_cache": "keys and values are not cached while training",
    "label_names": _LOSS_ALONE,
    "include_for_metrics": _LOSS_ALONE,
    "prediction_loss_only": _LOSS_ALONE,
    "batch_eval_metrics": _LOSS_ALONE,
    "eval_do_concat_batches": _LOSS_ALONE,
    "eval_use_gather_object": _LOSS_ALONE,
    "eval_accumulation_steps": _LOSS_ALONE,
    "do_predict": _LOSS_ALONE,
    "eval_on_start": "the held-out loss is always measured before the first step",
    "length_column_name": _OWN_LOADER,
    "remove_unused_columns": _OWN_LOADER,
    "accelerator_config": _OWN_LOADER,
    "push_to_hub": _UPLOAD,
    "hub_model_id": _UPLOAD,
    "hub_strategy": _UPLOAD,
    "hub_private_repo": _UPLOAD,
    "hub_always_push": _UPLOAD,
    "hub_revision": _UPLOAD,
    "restore_callback_states_from_checkpoint": "callbacks hold nothing that a resume needs",
    # SFTConfig
    "model_init_kwargs": "give dtype, attn_implementation and model_revision by their names",
    "router_aux_loss_coef": "mixture-of-experts models are not trained here yet",
    "dataset_kwargs": "samples are tokenized by this command",
    "dataset_num_proc": "samples are tokenized in one process",
    "shuffle_dataset": "the order is random already; train_sampling_strategy changes it",
    "truncation_mode": "a sample that is too long loses its end, or is left out (too_long: drop)",
    "pad_to_multiple_of": "a batch is padded to its longest sample",
    "padding_free": "use packing: packed rows hold no padding and do not see each other",
    "packing_strategy": "rows are packed by best fit, and no sample is split",
    "eval_packing": "held-out samples are packed as the training set is",
    "eos_token": "the tokenizer's and its chat template's own end token is trained",
    "pad_token": "padding is masked whatever its token is",
    "activation_offloading": "use activation_checkpointing",
    # LoraConfig
    "task_type": "models are causal language models here (CAUSAL_LM)",
    "peft_type": "adapters are LoRA here",
    "auto_mapping": _PEFT_SETS,
    "peft_version": _PEFT_SETS,
    "base_model_name_or_path": _PEFT_SETS,
    "revision": "use model_revision",
    "inference_mode": "this command trains",
    "runtime_config": _PEFT_SETS,
    "megatron_config": _ONE_PROCESS,
    "megatron_core": _ONE_PROCESS,
    "fan_in_fan_out": "the layers' own layout decides",
}
# Values of refused names that say what is done anyway.
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "task_type": ("CAUSAL_LM",),
    "peft_type": ("LORA",),
    "loss_type": ("nll",),
    "remove_unused_columns": (True, False),
    "prediction_loss_only": (True, False),
    "local_rank": (-1, 0),
    "eval_on_start": (True, False),
    "shuffle_dataset": (True, False),
    "padding_free": (False,),
    "dataset_num_proc": (1, None),
}


# --- names that moved, and names of others ------------------------------------------------------


@dataclass(frozen=True)
class _Translation:
    """``to(value)`` gives the settings that ``name: value`` stands for; ``note`` is told."""

    to: Callable[[Any], Mapping[str, Any]]
    note: str = ""


def _renamed(new: str, note: str = "") -> _Translation:
    return _Translation(lambda value: {new: value}, note or f"is {new}")


def _meaningless(why: str) -> _Translation:
    return _Translation(lambda value: {}, f"has no meaning here: {why}")


def _only_false(why: str) -> _Translation:
    def to(value: Any) -> Mapping[str, Any]:
        if _bool(value):
            raise BadInput(why)
        return {}

    return _Translation(to, "false is how it always is here")


def _bits(value: Any) -> Mapping[str, Any]:
    if str(value) not in ("4", "16"):
        raise BadInput(f"bits is {value}; 4 (quantized) and 16 (quant_type none) are offered")
    return {} if str(value) == "4" else {"quant_type": "none"}


def _load_in_4bit(value: Any) -> Mapping[str, Any]:
    return {} if _bool(value) else {"quant_type": "none"}


def _train_on_replies(value: Any) -> Mapping[str, Any]:
    return {} if value is None else {"train_on": "replies" if _bool(value) else "all"}


def _columns_text(value: Any) -> Mapping[str, Any]:
    # TRL's default is what is recognised anyway.
    return {} if value in (None, "text") else {"dataset_columns": {"text": str(value)}}


def _task(value: Any) -> Mapping[str, Any]:
    if str(value) != "CAUSAL_LM":
        raise BadInput(f"lora_task_type is {value!r}; models are CAUSAL_LM here")
    return {}


def _loss_type(value: Any) -> Mapping[str, Any]:
    if value not in (None, "nll", "chunked_nll"):
        raise BadInput(f"loss_type is {value!r}; the fused loss computes nll")
    return {}


def _mmlu(value: Any) -> Mapping[str, Any]:
    if _bool(value):
        raise BadInput("do_mmlu_eval: this command measures the held-out loss and no benchmark; "
                       "take the flag away")
    return {}


def _full_finetune(value: Any) -> Mapping[str, Any]:
    if _bool(value):
        raise BadInput("full_finetune trains all weights, which 4-bit weights cannot be; this "
                       "command trains LoRA adapters")
    return {}


_GENERATION = (
    "max_new_tokens min_new_tokens do_sample num_beams num_beam_groups penalty_alpha temperature "
    "top_k top_p typical_p diversity_penalty repetition_penalty length_penalty no_repeat_ngram_size "
    "predict_with_generate"
).split()

TRANSLATED: dict[str, _Translation] = {
    # transformers: names of earlier versions
    "torch_dtype": _renamed("dtype"),
    "gradient_checkpointing": _renamed("activation_checkpointing"),
    "gradient_checkpointing_kwargs": _renamed("activation_checkpointing_kwargs"),
    "evaluation_strategy": _renamed("eval_strategy"),
    "warmup_ratio": _renamed("warmup_steps", "is warmup_steps, where a number below 1 is a share"),
    "group_by_length": _Translation(
        lambda v: {"train_sampling_strategy": "group_by_length" if _bool(v) else "random"},
        "is train_sampling_strategy",
    ),
    "overwrite_output_dir": _renamed("overwrite"),
    "no_cuda": _renamed("use_cpu"),
    "per_gpu_train_batch_size": _renamed("per_device_train_batch_size"),
    "per_gpu_eval_batch_size": _renamed("per_device_eval_batch_size"),
    "tokenizer_name": _meaningless("the tokenizer is the model's own"),
    "do_train": _meaningless("this command always trains"),
    "do_eval": _meaningless("the held-out loss is always measured, before and after"),
    "jit_mode_eval": _meaningless("it is gone from transformers"),
    "save_safetensors": _meaningless("everything is written as safetensors and JSON"),
    "logging_dir": _meaningless("curves and figures are written to output_dir"),
    # TRL
    "max_seq_length": _renamed("max_length"),
    "dataset_text_field": _Translation(_columns_text, "is dataset_columns: {text: ...}"),
    "completion_only_loss": _Translation(_train_on_replies, "is train_on: replies or all"),
    "assistant_only_loss": _Translation(_train_on_replies, "is train_on: replies or all"),
    "loss_type": _Translation(_loss_type, "nll, computed in chunks, is how the loss always is"),
    "lora_r": _renamed("r"),
    "lora_target_modules": _renamed("target_modules"),
    "lora_target_parameters": _renamed("target_parameters"),
    "lora_modules_to_save": _renamed("modules_to_save"),
    "lora_task_type": _Translation(_task, "CAUSAL_LM is how it always is here"),
    "use_peft": _Translation(
        lambda v: {} if _bool(v) else _full_finetune(True), "true is how it always is here"
    ),
    "load_in_4bit": _Translation(_load_in_4bit, "is quant_type"),
    "load_in_8bit": _only_false("load_in_8bit: 8-bit weights are not offered; 4-bit ones are"),
    "bnb_4bit_quant_type": _renamed("quant_type"),
    "bnb_4bit_compute_dtype": _renamed("compute_dtype"),
    "bnb_4bit_use_double_quant": _renamed("double_quant"),
    "use_bnb_nested_quant": _renamed("double_quant"),
    "bnb_4bit_quant_storage": _meaningless("packed weights are bytes, two weights each"),
    "llm_int8_skip_modules": _renamed("skip_modules"),
    "dataset_train_split": _Translation(lambda v: {"_train_split": v}, "goes into dataset_name"),
    "dataset_test_split": _Translation(lambda v: {"_test_split": v}, "goes into eval_dataset"),
    "dataset_streaming": _only_false("dataset_streaming: samples are read before training starts, "
                                     "so that all that is wrong with them is known by then"),
    "ignore_bias_buffers": _meaningless("one process trains"),
    "model": _renamed("model_name_or_path"),
    # the original QLoRA script
    "dataset": _renamed("dataset_name"),
    "lora_modules": _renamed("target_modules"),
    "bits": _Translation(_bits, "4 is how it always is here, 16 is quant_type none"),
    "source_max_len": _Translation(
        lambda v: {"_source_max_len": int(v)},
        "and target_max_len add up to max_length; the whole is cut, not each part",
    ),
    "target_max_len": _Translation(
        lambda v: {"_target_max_len": int(v)},
        "and source_max_len add up to max_length; the whole is cut, not each part",
    ),
    "train_on_source": _Translation(
        lambda v: {"train_on": "all" if _bool(v) else "replies"}, "is train_on: all or replies"
    ),
    "eval_dataset_size": _Translation(
        lambda v: {"eval_split": _number(v)}, "is eval_split"
    ),
    "max_train_samples": _renamed("max_samples", "is max_samples, held-out ones included"),
    "max_eval_samples": _Translation(
        lambda v: {} if v is None else {"eval_split": int(v)}, "is eval_split"
    ),
    "max_memory_MB": _renamed("max_memory_mb", "is max_memory_mb, the limit of the memory plan"),
    "adam8bit": _Translation(
        lambda v: {"optim": "adamw_bnb_8bit"} if _bool(v) else {}, "is optim: adamw_bnb_8bit"
    ),
    "full_finetune": _Translation(_full_finetune, "false is how it always is here"),
    "use_auth_token": _meaningless("log in once with `hf auth login`, or set HF_TOKEN"),
    "do_mmlu_eval": _Translation(_mmlu, "false is how it always is here"),
    **{
        name: _meaningless("this command runs no MMLU")
        for name in ("mmlu_split", "mmlu_dataset", "max_mmlu_samples", "mmlu_source_max_len")
    },
    **{name: _meaningless("generation belongs to `qlora chat`") for name in _GENERATION},
}

# Names that no result depends on: a run may be resumed with others.
FREE = frozenset(
    """
    output_dir overwrite force max_memory_mb cache_dir resume_from_checkpoint hub_token
    model_name_or_path model_revision dataset_name eval_dataset dataset_format dataset_columns
    logging_strategy logging_steps logging_first_step log_level log_level_replica log_on_each_node
    logging_nan_inf_filter disable_tqdm report_to run_name project trackio_space_id
    trackio_bucket_id trackio_static_space_id include_num_input_tokens_seen skip_memory_metrics
    save_strategy save_steps save_total_limit save_on_each_node eval_strategy eval_steps eval_delay
    per_device_eval_batch_size dataloader_num_workers dataloader_pin_memory
    dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context
    torch_empty_cache_steps debug
    """.split()
)
# ... unless one of these makes training look at evaluations or at which checkpoints there are.
_LOOKS_AT_EVALUATIONS = (
    ("load_best_model_at_end", (True,)),
    ("lr_scheduler_type", ("reduce_lr_on_plateau", "greedy")),
)


# --- the names that there are -------------------------------------------------------------------


@dataclass(frozen=True)
class Key:
    """A name that may be given: its section, type, default and help."""

    name: str
    section: str  # "run", "training", "sft" or "lora"
    hint: Any
    default: Any
    help: str


def _fields(cls: Any, section: str, skip: Iterable[str] = ()) -> dict[str, Key]:
    hints = typing.get_type_hints(cls)
    keys = {}
    for f in dataclasses.fields(cls):
        if f.name in skip or not f.init:
            continue
        default = f.default
        if default is dataclasses.MISSING and f.default_factory is not dataclasses.MISSING:
            default = f.default_factory()
        help = str(f.metadata.get("help", "")).replace("%%", "%")
        keys[f.name] = Key(f.name, section, hints.get(f.name, Any), _plain(default), help)
    return keys


@cache
def known_keys() -> dict[str, Key]:
    """Every name that may be given, in the order of the sections.

    A name of two sections belongs to the first of run, lora, training, sft. Translated names are
    not among them (:data:`TRANSLATED`); refused ones are (:data:`REFUSED`).
    """
    from peft import LoraConfig
    from transformers import TrainingArguments
    from trl import SFTConfig

    keys = _fields(Options, "run")
    keys |= _fields(LoraConfig, "lora", keys)
    keys |= _fields(TrainingArguments, "training", keys)
    keys |= _fields(SFTConfig, "sft", keys)
    for name in TRANSLATED:  # still in a dataclass, but better known by another name
        keys.pop(name, None)
    for name, value in DEFAULTS.items():
        keys[name] = dataclasses.replace(keys[name], default=value)
    return keys


def _plain(value: Any) -> Any:
    """``value`` as YAML and JSON have it."""
    if isinstance(value, enum.Enum):
        return _plain(value.value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        items = [_plain(v) for v in value]
        return sorted(items, key=str) if isinstance(value, (set, frozenset)) else items
    return value


# --- values -------------------------------------------------------------------------------------

_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def _bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    text = str(value).strip().lower()
    if text in _TRUE or text in _FALSE:
        return text in _TRUE
    raise ValueError(f"{value!r} is not true or false")


def _number(value: Any) -> int | float:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value
    try:
        return int(str(value))
    except ValueError:
        return float(str(value))


def _list(value: Any) -> list[Any]:
    if isinstance(value, str):
        value = [v.strip() for v in value.split(",")]
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{value!r} is not a list")
    return list(value)


def _dict(value: Any) -> dict[str, Any]:
    if isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value):
        value = ",".join(value)
    if isinstance(value, str):
        text = value.strip()
        if text.startswith("{"):
            value = yaml.safe_load(text)
        else:  # a=b,c=d
            pairs = [pair.partition("=") for pair in text.split(",")]
            if not all(sign and key.strip() for key, sign, _ in pairs):
                raise ValueError(f"{value!r} is not JSON in braces, nor name=value,...")
            value = {key.strip(): yaml.safe_load(v) for key, _, v in pairs}
    if not isinstance(value, Mapping):
        raise ValueError(f"{value!r} is not a mapping")
    return dict(value)


def _one_of(hint: Any, value: Any) -> Any:
    """``value`` as the one type ``hint`` has it. Raises ValueError where it is not one."""
    origin = typing.get_origin(hint)
    if hint is types.NoneType:
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null", "")):
            return None
        raise ValueError("not none")
    if hint is Any:
        return value
    if origin is typing.Literal:
        choices = typing.get_args(hint)
        if value in choices:
            return value
        # PEFT's Literal of initialisations holds one with a number to fill in.
        patterns = [re.sub(r"\\\[.*?\\\]", r"\\d+", re.escape(str(c))) for c in choices]
        if any(re.fullmatch(p, str(value)) for p in patterns):
            return value
        raise ValueError(f"{value!r} is not one of {', '.join(map(str, choices))}")
    if hint is bool:
        return _bool(value)
    if hint is int:
        if isinstance(value, bool):
            raise ValueError(f"{value!r} is not a whole number")
        number = float(value) if not isinstance(value, int) else value
        if number != int(number):
            raise ValueError(f"{value!r} is not a whole number")
        return int(number)
    if hint is float:
        if isinstance(value, bool):
            raise ValueError(f"{value!r} is not a number")
        return float(value)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return hint(_text(value)).value
    if hint is str:
        return _text(value)
    if origin is list or hint is list:
        (item,) = typing.get_args(hint) or (Any,)
        return [_coerce(item, v) for v in _list(value)]
    if origin is tuple:
        return tuple(_list(value))
    if origin is dict or hint is dict:
        return _dict(value)
    if dataclasses.is_dataclass(hint):
        return hint(**_dict(value))
    raise ValueError(f"a value of {hint} cannot be given here")


def _text(value: Any) -> str:
    if isinstance(value, bool):  # YAML reads a bare no as false
        return "yes" if value else "no"
    if isinstance(value, (Mapping, list, tuple)):
        raise ValueError(f"{value!r} is not one text")
    if value is None:
        raise ValueError("nothing is given")
    return str(value)


# Of the types of a union, those that accept less come first; str accepts everything.
_ORDER = (types.NoneType, bool, int, float)


def _coerce(hint: Any, value: Any) -> Any:
    """``value`` (of YAML or a command line) as ``hint`` has it.

    Raises:
        ValueError: it is none of the types of ``hint``.
    """
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        choices = list(typing.get_args(hint))
    else:
        choices = [hint]
    if value is None and types.NoneType not in choices:
        raise ValueError("nothing is given")

    def rank(choice: Any) -> tuple[int, int]:
        exact = isinstance(choice, type) and type(value) is choice
        simple = _ORDER.index(choice) if choice in _ORDER else len(_ORDER)
        enumeration = isinstance(choice, type) and issubclass(choice, enum.Enum)
        return (0 if exact and choice is not str else 1), (
            simple if choice is not str else 2 * len(_ORDER) + (1 if enumeration else 0)
        )

    errors = []
    enums = [c for c in choices if isinstance(c, type) and issubclass(c, enum.Enum)]
    if enums:  # "OptimizerNames | str": the plain str is there for its subclass only
        choices = [c for c in choices if c is not str]
    for choice in sorted(choices, key=rank):
        try:
            return _one_of(choice, value)
        except (ValueError, TypeError, yaml.YAMLError) as error:
            errors.append(str(error))
    raise ValueError(errors[-1])


# --- reading ------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML in which a name given twice is an error, not the second one in silence."""


def _no_duplicates(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    seen: dict[Any, int] = {}
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        line = key_node.start_mark.line + 1
        if key in seen:
            raise BadInput(f"{key!r} is given twice, in line {seen[key]} and in line {line}")
        seen[key] = line
    return yaml.SafeLoader.construct_mapping(loader, node, deep)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _no_duplicates)


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings in a YAML file.

    Raises:
        BadInput: no such file, not UTF-8, not YAML (with its line), not a mapping, a name twice.
    """
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"there is no configuration file {path}")
    try:
        settings = yaml.load(path.read_text("utf-8"), _Loader)
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 (byte {error.start})") from error
    except yaml.YAMLError as error:
        raise BadInput(f"{path} is not YAML: {error}") from error
    if settings is None:
        return {}
    if not isinstance(settings, dict) or not all(isinstance(k, str) for k in settings):
        raise BadInput(f"{path} must hold `name: value` lines, it holds a {type(settings).__name__}")
    return settings


def parse_arguments(arguments: Sequence[str]) -> dict[str, Any]:
    """``--name value``, ``--name=value``, ``--name a b`` (a list), ``--name`` (true) and
    ``--no_name`` (false) as settings; dashes in names may stand for underscores.

    Raises:
        BadInput: a value without a name, or a name given twice.
    """
    settings: dict[str, Any] = {}
    name = None
    for argument in arguments:
        if re.match(r"--?[A-Za-z]", argument):
            flag, sign, value = argument.lstrip("-").partition("=")
            name = flag.replace("-", "_")
            if name in settings:
                raise BadInput(f"--{name} is given twice")
            settings[name] = [value] if sign else []
        elif name is None:
            raise BadInput(f"{argument!r} stands alone; options are given as --name value")
        else:
            settings[name].append(argument)
    for name, values in list(settings.items()):
        if len(values) == 1:
            settings[name] = values[0]
        elif not values:
            del settings[name]
            off = name.startswith("no_") and not _is_known(name)
            settings[name[3:] if off else name] = not off
    return settings


def _is_known(name: str) -> bool:
    return name in TRANSLATED or name in known_keys()


# What people call these elsewhere: not taken, but suggested.
_CALLED: dict[str, str] = {
    "rank": "r",
    "lora_rank": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "lr": "learning_rate",
    "scheduler": "lr_scheduler_type",
    "optimizer": "optim",
    "batch_size": "per_device_train_batch_size",
    "micro_batch_size": "per_device_train_batch_size",
    "grad_accum": "gradient_accumulation_steps",
    "accumulation": "gradient_accumulation_steps",
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "steps": "max_steps",
    "base_model": "model_name_or_path",
    "datasets": "dataset_name",
    "data": "dataset_name",
    "data_path": "dataset_name",
    "output": "output_dir",
    "cutoff_len": "max_length",
    "sequence_len": "max_length",
    "seq_len": "max_length",
    "max_len": "max_length",
    "sample_packing": "packing",
    "lora_target_linear": "target_modules",
    "val_set_size": "eval_split",
    "resume": "resume_from_checkpoint",
    "block_size": "blocksize",
}


def _unknown(name: str) -> BadInput:
    known = [n for n in known_keys() if n not in REFUSED]
    near = _CALLED.get(name) or next(
        iter(
            difflib.get_close_matches(name, known, n=1)
            or difflib.get_close_matches(name, [*TRANSLATED, *REFUSED], n=1)
        ),
        None,
    )
    hint = f"; the nearest name is {near}" if near else ""
    return BadInput(f"there is no option {name}{hint} (`qlora finetune --help-all` lists them all)")


def _translate(given: Mapping[str, Any], notices: list[str]) -> dict[str, Any]:
    """``given`` in known names. Raises BadInput for unknown ones, and for contradictions."""
    settings: dict[str, Any] = {}
    came_from: dict[str, str] = {}

    def put(name: str, value: Any, said: str) -> None:
        if name in settings and settings[name] != value:
            raise BadInput(
                f"{came_from[name]} and {said} say different things: {name} would be "
                f"{settings[name]!r} and {value!r}"
            )
        settings[name], came_from[name] = value, said

    for name, value in given.items():
        translation = TRANSLATED.get(name)
        if translation is None:
            if name not in known_keys():
                raise _unknown(name)
            put(name, value, name)
            continue
        try:
            translated = translation.to(value)
        except BadInput:
            raise
        except (ValueError, TypeError) as error:
            raise BadInput(f"{name}: {error}") from error
        for new, v in translated.items():
            put(new, v, name)
        notices.append(f"{name} {translation.note}")
    return settings


def _join_parts(settings: dict[str, Any], notices: list[str]) -> None:
    """What takes more than one of the given names to translate."""
    source, target = settings.pop("_source_max_len", None), settings.pop("_target_max_len", None)
    if source is not None or target is not None:
        # The script's own defaults stand in for the one that is not given.
        length = (1024 if source is None else source) + (256 if target is None else target)
        if settings.setdefault("max_length", length) != length:
            raise BadInput(
                f"max_length {settings['max_length']} and source_max_len + target_max_len "
                f"({length}) say different things"
            )
    train, test = settings.pop("_train_split", None), settings.pop("_test_split", None)
    name = settings.get("dataset_name")
    hub = isinstance(name, str) and name.count("/") == 1 and not Path(name).exists()
    hub = hub and not re.search(r"\.(jsonl?|parquet)$", name or "")
    for split, key in ((train, "dataset_name"), (test, "eval_dataset")):
        if split is None:
            continue
        if not hub or ":" in str(name):
            raise BadInput(
                f"a split ({split!r}) can be named for a data set of the hub; dataset_name is "
                f"{name!r}"
            )
        if key == "dataset_name" or settings.get(key) is None:
            settings[key] = f"{name}:{split}"


# --- the result ---------------------------------------------------------------------------------


@dataclass
class FinetuneConfig:
    """A checked configuration: every name with its value, and what has to be told about it."""

    values: dict[str, Any]
    """Every known name that is not refused, with its value in plain types."""
    given: frozenset[str]
    """Names that the user set, translated."""
    notices: list[str] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["values"][name]
        except KeyError:
            raise AttributeError(name) from None

    def section(self, *sections: str) -> dict[str, Any]:
        """The values of one or more sections."""
        keys = known_keys()
        return {k: v for k, v in self.values.items() if keys[k].section in sections}

    def training_args(self) -> Any:
        """An ``SFTConfig``, which is a ``TrainingArguments``.

        Raises:
            BadInput: a combination of values that it does not take.
        """
        from trl import SFTConfig

        changed = {
            k: v
            for k, v in self.section("training", "sft").items()
            if v != _untouched_default(k) or k in self.given or k in DEFAULTS
        }
        with bad_input("training options"):
            args = SFTConfig(**changed, remove_unused_columns=False)
        args._n_gpu = min(args.n_gpu, 1)  # DataParallel would split batches of a packed row
        return args

    def lora_config(self) -> Any:
        """PEFT's ``LoraConfig``.

        Raises:
            BadInput: a combination of values that it does not take.
        """
        from peft import LoraConfig

        values = self.section("lora")
        changed = {
            k: _as_field(k, v)
            for k, v in values.items()
            if v != _untouched_default(k) or k in self.given or k in DEFAULTS
        }
        with bad_input("LoRA options"):
            return LoraConfig(**changed, task_type="CAUSAL_LM")

    def data_options(self, context: int | None = None) -> Any:
        """``DataOptions``; ``context`` is the longest sequence that the model takes.

        Raises:
            BadInput: a value that is not offered.
        """
        from .data import DataOptions

        template = None
        if self.chat_template_path is not None:
            with bad_input("chat_template_path"):
                template = Path(self.chat_template_path).read_text("utf-8")
        length = self.max_length
        if length is None:
            if context is None:
                raise BadInput("max_length: the model does not say how long a sequence it takes; "
                               "give a number")
            length = context
        seed = self.seed if self.data_seed is None else self.data_seed
        with bad_input():
            return DataOptions(
                source=self.dataset_name,
                format=self.dataset_format,
                columns=self.dataset_columns,
                eval_source=self.eval_dataset,
                eval_split=self.eval_split,
                train_on=self.train_on,
                max_length=length,
                too_long=self.too_long,
                packing=self.packing,
                chat_template=template,
                seed=seed,
                limit=self.max_samples,
            )

    @property
    def decisive(self) -> dict[str, Any]:
        """The settings that the losses depend on (:data:`FREE` names the others)."""
        looks = any(self.values.get(name) in values for name, values in _LOOKS_AT_EVALUATIONS)
        looks = looks or self.values.get("save_strategy") == "best"
        watched = ("eval_strategy", "eval_steps", "eval_delay", "save_strategy", "save_steps")
        return {
            k: v for k, v in self.values.items() if k not in FREE or (looks and k in watched)
        }

    def to_yaml(self) -> str:
        """All of it, as a file that gives the same run again."""
        from importlib.metadata import version

        titles = {
            "run": "qlora finetune",
            "training": f"TrainingArguments of transformers {version('transformers')}",
            "sft": f"SFTConfig of trl {version('trl')}",
            "lora": f"LoraConfig of peft {version('peft')}",
        }
        blocks = []
        for section, title in titles.items():
            values = {k: v for k, v in self.section(section).items() if k != "hub_token"}
            dumped = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
            blocks.append(f"# {title}\n{dumped}")
        return "\n".join(blocks)


@cache
def _untouched(section: str) -> dict[str, Any]:
    from peft import LoraConfig
    from trl import SFTConfig

    return {k: key.default for k, key in _fields(LoraConfig if section == "lora" else SFTConfig,
                                                 section).items()}


def _untouched_default(name: str) -> Any:
    return _untouched("lora" if known_keys()[name].section == "lora" else "sft").get(name)


def _as_field(name: str, value: Any) -> Any:
    """A plain value as its dataclass field takes it (a mapping may stand for a nested config)."""
    return _coerce(known_keys()[name].hint, value) if isinstance(value, dict) else value


def resolve(
    overrides: Mapping[str, Any], file: Mapping[str, Any] | None = None
) -> FinetuneConfig:
    """The configuration that ``file`` (a YAML file's settings) and ``overrides`` (the command
    line's, which win) make, with defaults for the rest.

    Raises:
        BadInput: an unknown name, a value of another type, settings that cannot be honoured or
            that contradict each other, or no model or data set.
    """
    notices: list[str] = []
    given: dict[str, Any] = {}
    for settings in (file or {}, overrides):
        translated = _translate(settings, notices)
        _join_parts(translated, notices)
        given.update(translated)

    keys = known_keys()
    values = {k: key.default for k, key in keys.items() if k not in REFUSED}
    for name, value in given.items():
        try:
            if str(value) == keys[name].default:  # "none" of report_to is a word, not nothing
                value = keys[name].default
            else:
                value = _plain(_coerce(keys[name].hint, value))
        except (ValueError, TypeError) as error:
            raise BadInput(f"{name}: {error}") from error
        if name in REFUSED:
            if value != keys[name].default and value not in _HARMLESS.get(name, ()):
                raise BadInput(f"{name} cannot be honoured: {REFUSED[name]}")
            continue
        values[name] = value

    values["target_modules"] = _module_names(values["target_modules"])
    values["exclude_modules"] = _module_names(values["exclude_modules"])
    for name in ("model_name_or_path", "dataset_name"):
        if not values[name]:
            raise BadInput(f"{name} is missing: {keys[name].help}")
    _check(values)
    return FinetuneConfig(values, frozenset(given) - frozenset(REFUSED), _unique(notices))


def _module_names(value: Any) -> Any:
    # For PEFT a string is a pattern for whole names; who gives one name means the layers called so.
    if isinstance(value, str) and value != "all-linear":
        parts = [part.strip() for part in value.split(",")]
        if all(re.fullmatch(r"\w+", part) for part in parts):
            return parts
    return value


def _unique(lines: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(lines))


def _check(values: Mapping[str, Any]) -> None:
    """Values that neither dataclass checks, or only once work has begun."""
    from ..formats import FORMATS, check_blocksize, get_format

    def positive(*names: str) -> None:
        for name in names:
            if values[name] is not None and values[name] <= 0:
                raise BadInput(f"{name} is {values[name]}; it must be above 0")

    positive(
        "r",
        "lora_alpha",
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "gradient_accumulation_steps",
        "max_memory_mb",
    )
    if values["max_steps"] == 0 or (values["max_steps"] < 0 and values["num_train_epochs"] <= 0):
        raise BadInput("nothing to do: give max_steps or num_train_epochs above 0")
    if not 0 <= values["lora_dropout"] < 1:
        raise BadInput(f"lora_dropout is {values['lora_dropout']}; it must be 0 or more, below 1")
    if values["learning_rate"] < 0:
        raise BadInput(f"learning_rate is {values['learning_rate']}; it must not be negative")
    if values["loss_chunk"] < 0:
        raise BadInput(f"loss_chunk is {values['loss_chunk']}; it must be 0 or more tokens")
    if values["quant_type"] != "none":
        with bad_input("quant_type"):
            get_format(values["quant_type"])
    with bad_input("blocksize"):
        check_blocksize(values["blocksize"])
    dtypes = ("float32", "bfloat16", "float16")
    short = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
    for name in ("dtype", "compute_dtype"):
        value = values[name]
        if value is None or (name == "dtype" and value == "auto"):
            continue
        value = short.get(value, value).removeprefix("torch.")
        if value not in dtypes:
            auto = "auto, " if name == "dtype" else ""
            raise BadInput(f"{name} is {values[name]!r}; it may be {auto}{', '.join(dtypes)}")
        values[name] = value  # type: ignore[index]
    if values["train_sampling_strategy"] not in ("random", "sequential", "group_by_length"):
        raise BadInput(
            f"train_sampling_strategy is {values['train_sampling_strategy']!r}; it may be random, "
            "sequential or group_by_length"
        )
    if values["bf16"] and values["fp16"]:
        raise BadInput("bf16 and fp16 cannot both be true")
    if values["eval_split"] == 0 and not values["eval_dataset"]:
        wants = [
            name
            for name, idle in (("eval_strategy", "no"), ("load_best_model_at_end", False))
            if values[name] != idle
        ]
        if wants:
            raise BadInput(f"{wants[0]} needs held-out samples, but eval_split is 0")
    assert FORMATS  # the formats are registered on import


def to_json(value: Any) -> str:
    """JSON of plain values, with all digits of a float."""
    return json.dumps(_plain(value), indent=2, ensure_ascii=False) + "\n"
