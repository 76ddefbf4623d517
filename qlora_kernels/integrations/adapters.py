"""A LoRA adapter's files, held against a model before PEFT changes anything of it.

PEFT puts its layers into the model first and reads the file then: an adapter of another model stops
half way, in torch's words, and one of a model with fewer layers loads with a warning.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from torch import nn

from ..nn import CheckpointError
from .checkpoint_files import check_safetensors, read_json_object

__all__ = ["check_adapter", "load_adapter"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_LORA = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


def load_adapter(model: nn.Module, folder: str | os.PathLike[str], **kwargs: Any) -> Any:
    """``PeftModel.from_pretrained(model, folder, **kwargs)``, after :func:`check_adapter`."""
    from peft import PeftModel

    check_adapter(model, folder)
    return PeftModel.from_pretrained(model, os.fspath(folder), **kwargs)


def check_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Raises unless the LoRA adapter in ``folder`` fits ``model`` in every tensor.

    Args:
        model: the base, without adapters.
        folder: as PEFT's ``save_pretrained`` leaves it. Adapters of other types than LoRA have
            their files checked, and nothing more.

    Raises:
        FileNotFoundError: configuration or safetensors are missing; a pickle in their place is
            named and not read.
        CheckpointError: one of them is damaged, the adapter is of another rank than its
            configuration says, of another model, or lacks a module that it was made for.
    """
    folder = Path(folder).expanduser()
    config = _read_config(folder)
    header = check_safetensors(folder / WEIGHTS)
    if config.get("peft_type") != "LORA":
        return
    modules = dict(model.named_modules())
    found: dict[str, dict[str, list[int]]] = {}
    for name, entry in header.items():
        if match := _LORA.fullmatch(name):
            found.setdefault(match[1], {})[match[2]] = entry["shape"]
    for path, shapes in found.items():
        _check_module(folder, path, shapes, modules.get(path), _rank(config, path))
    if not config.get("target_parameters"):
        lacking = [name for name in _targets(folder, model) if name not in found]
        if lacking and found:
            raise CheckpointError(
                f"{folder} adapts {', '.join(lacking[:3])} by its {CONFIG}, and has no tensors for "
                f"them ({len(lacking)} modules): it is of a model with fewer layers, or not whole"
            )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {CONFIG}: not a PEFT adapter")
    if not (folder / WEIGHTS).is_file():
        pickles = sorted(p.name for p in folder.glob("*.bin"))
        hint = f"; it has {pickles[0]}, not read here (a pickle can run code)" if pickles else ""
        raise FileNotFoundError(f"{folder} holds no {WEIGHTS}{hint}")
    return read_json_object(path)


def _targets(folder: Path, model: nn.Module) -> list[str]:
    """Modules that PEFT would adapt."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    try:
        config = LoraConfig.from_pretrained(str(folder))
        if config.target_modules == "all-linear" or not config.target_modules:
            return []
        return [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and check_target_module_exists(config, name)
        ]
    except (ValueError, TypeError, re.error) as error:
        raise CheckpointError(f"{folder / CONFIG} cannot be used: {error}") from error


def _rank(config: dict[str, Any], path: str) -> Any:
    """The rank that PEFT gives the module: of the pattern that matches it, else ``r``."""
    pattern = config.get("rank_pattern") or {}
    for key, rank in pattern.items() if isinstance(pattern, dict) else ():
        if re.match(rf"(.*\.)?({key})$", path):
            return rank
    return config.get("r")


def _check_module(
    folder: Path, path: str, shapes: dict[str, list[int]], module: nn.Module | None, rank: Any
) -> None:
    if module is None:
        raise CheckpointError(
            f"{folder} adapts {path}, which the model does not have: it is of another model"
        )
    if len(shapes) != 2:
        raise CheckpointError(f"{folder} lacks lora_{'AB'.strip(*shapes)} of {path}")
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if None in sizes:
        return  # a convolution, say: PEFT knows
    want = {"A": [rank, sizes[0]], "B": [sizes[1], rank]}
    for part, shape in shapes.items():
        if shape == want[part]:
            continue
        got = shape[0] if part == "A" else shape[-1]
        if got != rank:
            raise CheckpointError(
                f"{folder}: lora_{part} of {path} has shape {shape}, rank {got}; {CONFIG} says "
                f"{rank}"
            )
        raise CheckpointError(
            f"{folder}: lora_{part} of {path} has shape {shape}, the model's layer takes "
            f"{want[part]}: it is of another model"
        )
