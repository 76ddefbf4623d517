"""``qlora finetune``: the arguments, the help, the call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_USAGE = "qlora finetune [config.yaml] [--recipe name] [--name value ...]"

_INTRO = """\
Names are those of transformers' TrainingArguments, TRL's SFTConfig and PEFT's LoraConfig, in a YAML
file, on the command line (which wins), or both. Names of the original QLoRA script are understood.
A run that was interrupted goes on with the same command, to the bit."""

# The names that most runs set, in the order in which one thinks of them.
_COMMON = (
    "recipe scale model_name_or_path dataset_name output_dir max_steps num_train_epochs "
    "learning_rate per_device_train_batch_size gradient_accumulation_steps max_length packing r "
    "lora_alpha lora_dropout target_modules activation_checkpointing train_sampling_strategy "
    "eval_strategy save_steps resume_from_checkpoint seed"
).split()


def run(arguments: Sequence[str]) -> int:
    """Runs ``qlora finetune`` with the words after it; returns the exit code."""
    words = list(arguments)
    if any(word in ("-h", "--help", "--help-all") for word in words):
        print(help_text(everything="--help-all" in words), end="")
        return 0
    from .config import parse_arguments, read_yaml, resolve

    file = words.pop(0) if words and not words[0].startswith("-") else None
    overrides = parse_arguments(words)
    file = overrides.pop("config", file)
    config = resolve(overrides, read_yaml(file) if file else None)
    from .trainer import finetune

    finetune(config)
    return 0


def help_text(everything: bool) -> str:
    """What ``--help`` prints: the names that most runs set and this command's own; or all."""
    from .config import known_keys
    from .names import REFUSED

    keys = known_keys()
    own = [n for n, k in keys.items() if k.section == "run"]
    groups: dict[str, list[str]] = {
        "what most runs set": _COMMON,
        "this command's own": [n for n in own if n not in _COMMON],
    }
    if everything:
        groups = {
            "this command's own": own,
            "training (transformers' TrainingArguments)": _of(keys, "training"),
            "samples (TRL's SFTConfig)": _of(keys, "sft"),
            "adapters (PEFT's LoraConfig)": _of(keys, "lora"),
        }
    lines = [f"usage: {_USAGE}", "", _INTRO]
    for title, names in groups.items():
        lines += ["", f"{title}:"]
        for name in names:
            if name not in REFUSED:
                lines += _entry(keys[name])
    if not everything:
        lines += ["", "--help-all lists every name."]
    else:
        lines += ["", "names that cannot be honoured, and why:"]
        lines += [f"  {name}: {why}" for name, why in REFUSED.items()]
    lines += [
        "",
        "example: qlora finetune --model_name_or_path ./SmolLM2 --dataset_name my.jsonl "
        "--max_steps 100",
    ]
    return "\n".join(lines) + "\n"


def _of(keys: dict[str, Any], section: str) -> list[str]:
    return [name for name, key in keys.items() if key.section == section]


def _entry(key: Any) -> list[str]:
    help = " ".join(key.help.split())
    # The dataclasses of others explain at length: their first sentence has to do.
    first, stop, _ = help.partition(". ")
    text = first + ("." if stop else "")
    if len(text) > 200:
        text = text[:197] + "..."
    default = "" if key.default in (None, "", {}, []) else f"  [{key.default}]"
    return [f"  --{key.name}{default}"] + ([f"        {text}"] if text else [])
