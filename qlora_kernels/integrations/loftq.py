"""LoftQ (arXiv 2310.08659): LoRA adapters that start from what quantization lost.

A 4-bit model begins a finetune with an error, ``W - Q``. LoftQ puts its best approximation of rank
r into the adapter, so that ``Q + s B A`` is nearer to W than Q is; and, with more than one
iteration, quantizes ``W - s B A`` anew, so that both come to meet (its algorithm 1).

PEFT's own way (``replace_lora_weights_loftq``, ``init_lora_weights="loftq"``) is for bitsandbytes'
layers on a GPU, or for dense ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..nn import CheckpointError
from ..tensor_files import TensorReader, weight_files
from .peft import FusedLoraLinear

__all__ = ["LoftQError", "loftq_init"]


class LoftQError(NamedTuple):
    """``|W - what stands for W| / |W|`` of a layer, Frobenius norms."""

    before: float
    """Quantized."""
    after: float
    """Quantized, with the adapter."""


@torch.no_grad()
def loftq_init(
    model: Any,
    original: str | Path | Mapping[str, Tensor],
    *,
    adapter_name: str = "default",
    iterations: int = 1,
) -> dict[str, LoftQError]:
    """Sets A and B of a PEFT model's fused LoRA layers so that they make up for quantization.

    Call it before training, on the model that ``get_peft_model`` gave. One layer at a time, in
    fp32: a dense weight and its singular values are what it takes.

    Args:
        model: PEFT's model over 4-bit layers of ours.
        original: the model as it was, in 16 or 32 bits: its folder (safetensors), or tensors by
            the names that parameters have in the base model.
        adapter_name: whose A and B are set.
        iterations: above 1, the packed weights change as well: the base belongs to the adapter
            from then on, and has to be saved with it.

    Returns:
        The errors before and after, by the layer's name in the base model.

    Raises:
        ValueError: no fused LoRA layer with that adapter, or no iteration.
        CheckpointError: a weight that is missing there, or of another shape; nothing was changed.
    """
    if iterations < 1:
        raise ValueError(f"iterations must be 1 or more, got {iterations}")
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = {
        name: module
        for name, module in base.named_modules()
        if isinstance(module, FusedLoraLinear) and adapter_name in module.lora_A
    }
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no 4-bit layer with an adapter {adapter_name!r}: call "
            "this on what get_peft_model made of a model in 4 bits"
        )
    weight_of = _reader(original, layers)
    return {
        name: _init(layer, weight_of(name), adapter_name, iterations)
        for name, layer in layers.items()
    }


def _reader(
    original: str | Path | Mapping[str, Tensor], layers: Mapping[str, FusedLoraLinear]
) -> Callable[[str], Tensor]:
    """Of a layer's name its dense weight, [out, in] in fp32; all are there and of their shapes."""
    source: Any = original
    if not isinstance(original, Mapping):
        folder = Path(original)
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is no folder: expected the model in 16 bits")
        source = TensorReader(weight_files(folder))
    turned = set()  # layers that lie as [in, out] in the original
    for name, layer in layers.items():
        key = f"{name}.weight"
        if key not in source:
            raise CheckpointError(f"the original model has no {key}: is it the same architecture?")
        found = source.shape(key) if isinstance(source, TensorReader) else source[key].shape
        packed = layer._packed_layer()
        want = [packed.out_features, packed.in_features]
        if getattr(packed, "_is_transposed_in_checkpoint", False):
            turned.add(name)
        if list(found) != (want[::-1] if name in turned else want):
            raise CheckpointError(
                f"{key} of the original model is {list(found)}, the layer is {want}"
            )

    def weight_of(name: str) -> Tensor:
        device = layers[name]._packed_layer().weight.device
        dense = source[f"{name}.weight"].to(device, torch.float32)
        return dense.T if name in turned else dense

    return weight_of


def _init(layer: FusedLoraLinear, weight: Tensor, adapter_name: str, iterations: int) -> LoftQError:
    packed = layer._packed_layer()
    a: Any = layer.lora_A[adapter_name].weight
    b: Any = layer.lora_B[adapter_name].weight
    scaling = layer.scaling[adapter_name]
    rank = a.shape[0]
    size = weight.norm()
    before = (weight - packed.dequantize_weight(torch.float32)).norm() / size
    for i in range(iterations):
        if i > 0:
            packed.set_weight(weight - scaling * (b.float() @ a.float()))
        residual = weight - packed.dequantize_weight(torch.float32)
        u, s, v = torch.linalg.svd(residual, full_matrices=False)
        root = (s[:rank] / scaling).sqrt()  # half to each, the scaling taken out
        some = len(root)  # all that there are, where the rank is higher
        b.zero_()[:, :some] = u[:, :some] * root
        a.zero_()[:some] = root[:, None] * v[:some]
    left = residual - scaling * (b.float() @ a.float())
    return LoftQError(float(before), float(left.norm() / size))
