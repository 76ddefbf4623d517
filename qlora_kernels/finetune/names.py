"""The names that a finetune understands besides those of transformers, TRL and PEFT, as tables.

:class:`Options` are this command's own; :data:`DEFAULTS` are values that differ from the installed
dataclasses'; :data:`TRANSLATED` are names that moved, or that others use; :data:`REFUSED` cannot be
honoured, each with the reason; :data:`FREE` have no influence on the result. What they mean
together is in :mod:`.config`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import BadInput

__all__ = ["CALLED", "DEFAULTS", "FREE", "HARMLESS", "REFUSED", "TRANSLATED", "Options"]


def _opt(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class Options:
    """This command's own names. ``help`` of each is what ``qlora finetune --help`` prints."""

    recipe: str | None = _opt(None, "settings that belong together: guanaco-7b, or a YAML file")
    scale: str | None = _opt(
        None, "tiny runs the recipe small, on SmolLM2, and says what it scaled"
    )
    model_name_or_path: str | None = _opt(None, "folder or hub id of the base model (required)")
    dataset_name: str | None = _opt(
        None, "JSONL or Parquet file, folder, hub id (owner/name:split) or python-docs (required)"
    )
    model_revision: str | None = _opt(None, "revision of a hub model")
    dtype: str = _opt(
        "auto", "of what is not quantized: auto (bf16 where the hardware has it), float32, ..."
    )
    attn_implementation: str = _opt("sdpa", "attention implementation of transformers")
    quant_type: str = _opt("nf4", "4-bit format (nf4, fp4, fp4_e2m1, int4); none leaves 16 bits")
    blocksize: int = _opt(64, "weights a scale, 16 to 4096")
    double_quant: bool = _opt(True, "quantize the scales as well")
    compute_dtype: str | None = _opt(None, "of the 4-bit products; that of their input if left out")
    skip_modules: list[str] | None = _opt(  # noqa: RUF009
        None, "modules that stay as they are (the output layer if left out)"
    )
    dataset_format: str | None = _opt(None, "alpaca, chat, sharegpt, ...; recognised if left out")
    dataset_columns: dict[str, str] | None = _opt(  # noqa: RUF009
        None, "role: column, where columns have other names; on the command line prompt=q,..."
    )
    eval_dataset: str | None = _opt(None, "held-out data of its own")
    eval_split: float | int = _opt(
        0.05, "share (below 1) or number of samples held out; 0 for none"
    )
    train_on: str = _opt("replies", "tokens that are trained: replies, or all")
    too_long: str = _opt("truncate", "samples longer than max_length: truncate or drop")
    max_samples: int | None = _opt(None, "read no more samples than this")
    loss_chunk: int = _opt(0, "rows that the fused loss takes together; 0 lets it choose")
    fuse_layers: bool = _opt(True, "RMSNorm and SwiGLU in one pass each, half their memory")
    max_memory_mb: int | None = _opt(None, "memory that the plan may use; all there is if left out")
    force: bool = _opt(False, "go on although the memory plan says that it will not fit")
    overwrite: bool = _opt(False, "delete another run that is in output_dir")
    do_mmlu_eval: bool = _opt(False, "measure MMLU before, at each evaluation and after")
    mmlu_dataset: str | None = _opt(None, "folder of MMLU's CSV files: dev/, val/, test/")
    mmlu_split: str = _opt("val", "of MMLU: val (eval is understood) or test")
    mmlu_shots: int = _opt(5, "examples before each question of MMLU")
    max_mmlu_samples: int | None = _opt(None, "questions of each subject; all if left out")
    mmlu_source_max_len: int = _opt(2048, "tokens a prompt of MMLU may have")


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
_LOSS_ALONE = "evaluation computes the loss on the held-out samples, token by token (and MMLU)"
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
    "eval_packing": "held-out samples are never packed, so that their loss is that of samples",
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
HARMLESS: dict[str, tuple[Any, ...]] = {
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


_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def to_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    text = str(value).strip().lower()
    if text in _TRUE or text in _FALSE:
        return text in _TRUE
    raise ValueError(f"{value!r} is not true or false")


def to_number(value: Any) -> int | float:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value
    try:
        return int(str(value))
    except ValueError:
        return float(str(value))


@dataclass(frozen=True)
class Translation:
    """``to(value)`` gives the settings that ``name: value`` stands for; ``note`` is told."""

    to: Callable[[Any], Mapping[str, Any]]
    note: str = ""


def _renamed(new: str, note: str = "") -> Translation:
    return Translation(lambda value: {new: value}, note or f"is {new}")


def _meaningless(why: str) -> Translation:
    return Translation(lambda value: {}, f"has no meaning here: {why}")


def _only_false(why: str) -> Translation:
    def to(value: Any) -> Mapping[str, Any]:
        if to_bool(value):
            raise BadInput(why)
        return {}

    return Translation(to, "false is how it always is here")


def _bits(value: Any) -> Mapping[str, Any]:
    if str(value) not in ("4", "16"):
        raise BadInput(f"bits is {value}; 4 (quantized) and 16 (quant_type none) are offered")
    return {} if str(value) == "4" else {"quant_type": "none"}


def _load_in_4bit(value: Any) -> Mapping[str, Any]:
    return {} if to_bool(value) else {"quant_type": "none"}


def _train_on_replies(value: Any) -> Mapping[str, Any]:
    return {} if value is None else {"train_on": "replies" if to_bool(value) else "all"}


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


def _full_finetune(value: Any) -> Mapping[str, Any]:
    if to_bool(value):
        raise BadInput(
            "full_finetune (use_peft false) trains all weights, which 4-bit ones cannot be; this "
            "command trains LoRA adapters"
        )
    return {}


def _use_peft(value: Any) -> Mapping[str, Any]:
    return _full_finetune(not to_bool(value))


_GENERATION = (
    "max_new_tokens min_new_tokens do_sample num_beams num_beam_groups penalty_alpha temperature "
    "top_k top_p typical_p diversity_penalty repetition_penalty length_penalty "
    "no_repeat_ngram_size predict_with_generate"
).split()

TRANSLATED: dict[str, Translation] = {
    # transformers: names of earlier versions
    "torch_dtype": _renamed("dtype"),
    "gradient_checkpointing": _renamed("activation_checkpointing"),
    "gradient_checkpointing_kwargs": _renamed("activation_checkpointing_kwargs"),
    "evaluation_strategy": _renamed("eval_strategy"),
    "warmup_ratio": _renamed("warmup_steps", "is warmup_steps, where a number below 1 is a share"),
    "group_by_length": Translation(
        lambda v: {"train_sampling_strategy": "group_by_length" if to_bool(v) else "random"},
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
    "dataset_text_field": Translation(_columns_text, "is dataset_columns: {text: ...}"),
    "completion_only_loss": Translation(_train_on_replies, "is train_on: replies or all"),
    "assistant_only_loss": Translation(_train_on_replies, "is train_on: replies or all"),
    "loss_type": Translation(_loss_type, "nll, computed in chunks, is how the loss always is"),
    "lora_r": _renamed("r"),
    "lora_target_modules": _renamed("target_modules"),
    "lora_target_parameters": _renamed("target_parameters"),
    "lora_modules_to_save": _renamed("modules_to_save"),
    "lora_task_type": Translation(_task, "CAUSAL_LM is how it always is here"),
    "use_peft": Translation(_use_peft, "true is how it always is here"),
    "load_in_4bit": Translation(_load_in_4bit, "is quant_type"),
    "load_in_8bit": _only_false("load_in_8bit: 8-bit weights are not offered; 4-bit ones are"),
    "bnb_4bit_quant_type": _renamed("quant_type"),
    "bnb_4bit_compute_dtype": _renamed("compute_dtype"),
    "bnb_4bit_use_double_quant": _renamed("double_quant"),
    "use_bnb_nested_quant": _renamed("double_quant"),
    "bnb_4bit_quant_storage": _meaningless("packed weights are bytes, two weights each"),
    "llm_int8_skip_modules": _renamed("skip_modules"),
    "dataset_train_split": Translation(lambda v: {"_train_split": v}, "goes into dataset_name"),
    "dataset_test_split": Translation(lambda v: {"_test_split": v}, "goes into eval_dataset"),
    "dataset_streaming": _only_false(
        "dataset_streaming: samples are read before training starts, "
        "so that all that is wrong with them is known by then"
    ),
    "ignore_bias_buffers": _meaningless("one process trains"),
    "model": _renamed("model_name_or_path"),
    # the original QLoRA script
    "dataset": _renamed("dataset_name"),
    "lora_modules": _renamed("target_modules"),
    "bits": Translation(_bits, "4 is how it always is here, 16 is quant_type none"),
    "source_max_len": Translation(
        lambda v: {"_source_max_len": int(v)},
        "and target_max_len add up to max_length; the whole is cut, not each part",
    ),
    "target_max_len": Translation(
        lambda v: {"_target_max_len": int(v)},
        "and source_max_len add up to max_length; the whole is cut, not each part",
    ),
    "train_on_source": Translation(
        lambda v: {"train_on": "all" if to_bool(v) else "replies"}, "is train_on: all or replies"
    ),
    "eval_dataset_size": Translation(lambda v: {"eval_split": to_number(v)}, "is eval_split"),
    "max_train_samples": _renamed("max_samples", "is max_samples, held-out ones included"),
    "max_eval_samples": Translation(
        lambda v: {} if v is None else {"eval_split": int(v)}, "is eval_split"
    ),
    "max_memory_MB": _renamed("max_memory_mb", "is max_memory_mb, the limit of the memory plan"),
    "adam8bit": Translation(
        lambda v: {"optim": "adamw_bnb_8bit"} if to_bool(v) else {}, "is optim: adamw_bnb_8bit"
    ),
    "full_finetune": Translation(_full_finetune, "false is how it always is here"),
    "cache_dir": _meaningless("set HF_HOME, which all tools that read the hub's cache obey"),
    "use_auth_token": _meaningless("log in once with `hf auth login`, or set HF_TOKEN"),
    **{name: _meaningless("generation belongs to `qlora chat`") for name in _GENERATION},
}

# Names that no result depends on: a run may be resumed with others.
FREE = frozenset(
    """
    output_dir overwrite force max_memory_mb resume_from_checkpoint hub_token
    model_name_or_path model_revision dataset_name eval_dataset dataset_format dataset_columns
    logging_strategy logging_steps logging_first_step log_level log_level_replica log_on_each_node
    logging_nan_inf_filter disable_tqdm report_to run_name project trackio_space_id
    trackio_bucket_id trackio_static_space_id include_num_input_tokens_seen skip_memory_metrics
    save_strategy save_steps save_total_limit save_on_each_node eval_strategy eval_steps eval_delay
    per_device_eval_batch_size dataloader_num_workers dataloader_pin_memory
    dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context
    torch_empty_cache_steps debug do_mmlu_eval mmlu_dataset mmlu_split mmlu_shots max_mmlu_samples
    mmlu_source_max_len
    """.split()
)
# ... unless one of these makes training look at evaluations or at which checkpoints there are.
LOOKS_AT_EVALUATIONS = (
    ("load_best_model_at_end", (True,)),
    ("lr_scheduler_type", ("reduce_lr_on_plateau", "greedy")),
)


# What people call these elsewhere: not taken, but suggested.
CALLED: dict[str, str] = {
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
    "preset": "recipe",
    "mmlu": "do_mmlu_eval",
    "mmlu_path": "mmlu_dataset",
    "block_size": "blocksize",
}
