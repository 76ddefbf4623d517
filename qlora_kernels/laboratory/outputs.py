"""What a format loses of a layer's output, on inputs that a model really computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .weights import WeightError, errors_of

__all__ = ["Activations", "output_errors", "record"]


@dataclass(frozen=True)
class Activations:
    """What went into each layer.

    Attributes:
        rows: by layer, ``[tokens, K]`` in the model's dtype: evenly spread tokens.
        energies: by layer, fp32 ``[K]``: the mean square of each input over all tokens.
    """

    rows: dict[str, Tensor]
    energies: dict[str, Tensor]


@torch.no_grad()
def record(
    model: Any, layers: Mapping[str, nn.Linear], windows: Tensor, tokens: int = 256
) -> Activations:
    """Runs the 16-bit model on ``windows`` ``[n, length]`` and keeps the inputs of ``layers``.

    Args:
        tokens: rows to keep of each layer's input, out of all windows.
    """
    kept: dict[str, list[Tensor]] = {name: [] for name in layers}
    squares: dict[str, Tensor] = {}
    each = max(1, tokens // len(windows))

    def hook(name: str) -> Any:
        def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1])
            step = max(1, len(x) // each)
            kept[name].append(x[::step][:each].clone())
            total = x.float().square().sum(0)
            squares[name] = squares[name] + total if name in squares else total

        return look

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        for row in windows:
            model(input_ids=row[None].to(model.device), logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    count = windows.numel()
    return Activations(
        {name: torch.cat(rows) for name, rows in kept.items() if rows},
        {name: total / count for name, total in squares.items()},
    )


@torch.no_grad()
def output_errors(
    packed: Mapping[str, nn.Module], dense: Mapping[str, nn.Linear], activations: Activations
) -> list[WeightError]:
    """The error of each layer's output: the 4-bit layer, by its kernel, against the 16-bit one."""
    return [
        errors_of(name, dense[name](rows), packed[name](rows))
        for name, rows in activations.rows.items()
    ]
