"""transformers: a mixture's experts, quantized while they load.

A checkpoint holds them expert by expert, in two dimensions; transformers stacks those of a layer,
and what comes of that is quantized at once, expert by expert again. So the peak is the quantized
model and one layer's dense stack (with transformers' own copies of it while it stacks). Saved, they
stay stacked: a packed parameter and its scales under their own names, which load as they are.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.quantizers.quantizers_utils import should_convert_module

from ..nn import Experts4bit, expert_parameters

__all__ = ["check_loaded", "fill", "makes_experts", "swap"]


def swap(model: nn.Module, skipped: list[str], kwargs: dict[str, Any]) -> None:
    """Puts an :class:`Experts4bit` in the place of every stack of a model on meta.

    Args:
        skipped: names of modules to leave, by transformers' rules.
        kwargs: to :meth:`Experts4bit.from_experts`.
    """
    for name, module in list(model.named_modules()):
        if expert_parameters(module) and should_convert_module(name, skipped):
            new = Experts4bit.from_experts(module, **kwargs)
            # transformers would draw what a checkpoint lacks; here that is an error.
            new.__dict__["_is_hf_initialized"] = True
            model.set_submodule(name, new)


def fill(module: Experts4bit, value: Tensor, name: str, missing: set[str] | None) -> Tensor:
    """Quantizes a dense stack of a checkpoint into ``module``; returns the packed weight.

    Args:
        name: the parameter's full name.
        missing: names that the checkpoint still owes; the scales are no more among them.
    """
    prefix, _, key = name.rpartition(".")
    new = module.quantized(key, value)
    module.give(key, new)
    if missing is not None:
        missing -= {f"{prefix}.{buffer}" for buffer in new}
    packed = new[key]
    assert packed is not None
    return packed


def check_loaded(model: nn.Module, packed: bool) -> list[str]:
    """The names of expert tensors that a checkpoint did not give.

    Args:
        packed: the checkpoint was in 4 bits, so the scales were to come from it too.

    Raises:
        CheckpointError: what it gave is not of the format.
    """
    lacking = []
    for name, module in model.named_modules():
        if isinstance(module, Experts4bit):
            tensors = dict(module.named_parameters(recurse=False))
            if packed:
                tensors |= dict(module.named_buffers(recurse=False))  # type: ignore[arg-type]
            lacking += [
                f"{name}.{key}"
                for key, tensor in tensors.items()
                if tensor.is_meta or not getattr(tensor, "_is_hf_initialized", False)
            ]
            if packed and not lacking:
                module.check_loaded(name)
    return lacking


def makes_experts(conversion: Any, model: nn.Module) -> bool:
    """Whether a conversion of transformers' stacks what is packed now: saving must not undo it."""
    if not hasattr(conversion, "operations"):
        return False
    packed = [
        f"{name}.{key}"
        for name, module in model.named_modules()
        if isinstance(module, Experts4bit)
        for key in module.shapes
    ]
    return any(target in name for target in conversion.target_patterns for name in packed)
