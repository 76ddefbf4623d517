"""transformers: a mixture's experts, quantized while they load.

Most checkpoints hold them expert by expert, in two dimensions, and transformers stacks those of a
layer in two copies. Here each goes from the checkpoint's tensors into its place in the packed
stack, so that the peak is the quantized model and one weight of a layer's experts. Saved, they
stay stacked: a packed parameter and its scales under their own names, which load as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    WeightConverter,
)
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module

from ..nn import CheckpointError, Experts4bit, expert_parameters

__all__ = ["check_loaded", "expert_by_expert", "fill", "makes_experts", "swap"]


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


class _ExpertByExpert(ConversionOps):
    """In place of transformers' stacking: the experts of one weight, one after the other.

    What is not an :class:`Experts4bit`'s is stacked as it was.
    """

    def __init__(self, stacking: list[ConversionOps]) -> None:
        self.stacking = stacking

    def convert(  # type: ignore[override]
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str | None = None,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        assert full_layer_name is not None
        module, key = get_module_from_name(model, full_layer_name)
        if isinstance(module, Experts4bit) and key in module.shapes:
            parts = [input_dict.pop(p) for p in source_patterns if p in input_dict]
            return {target_patterns[0]: _joined(parts)}
        for op in self.stacking:
            input_dict = op.convert(
                input_dict,
                source_patterns=source_patterns,
                target_patterns=target_patterns,
                full_layer_name=full_layer_name,
                model=model,
                **kwargs,
            )
        return input_dict


def _joined(parts: list[list[Tensor]]) -> Iterator[Tensor]:
    """Each expert's gate and up, say, as one weight; the tensors are let go as they are used."""
    for queue in parts:
        queue.reverse()
    while all(parts):
        one = [queue.pop() for queue in parts]
        yield one[0] if len(one) == 1 else torch.cat(one, 0)
    if any(parts):
        raise CheckpointError("the experts' weights are not of one number")


def expert_by_expert(conversions: list[Any], model: nn.Module) -> list[Any]:
    """transformers' conversions of a checkpoint, without its copies of stacks that are packed."""
    changed = []
    for conversion in conversions:
        ops = getattr(conversion, "operations", [])
        # Lists of experts, [out, in] each, stacked and then joined along `out`.
        stacks = [type(op) for op in ops] in ([MergeModulelist], [MergeModulelist, Concatenate])
        if isinstance(conversion, WeightConverter) and stacks and makes_experts(conversion, model):
            if [op.dim for op in ops] == [0, 1][: len(ops)]:
                sources = conversion._original_source_patterns
                targets = conversion._original_target_patterns
                new = conversion.copy(sources, targets, operations=[_ExpertByExpert(ops)])
                conversion = new
        changed.append(conversion)
    return changed


def fill(
    module: Experts4bit, value: Tensor | Iterator[Tensor], name: str, missing: set[str] | None
) -> Tensor:
    """Quantizes a checkpoint's dense experts into ``module``; returns the packed weight.

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
