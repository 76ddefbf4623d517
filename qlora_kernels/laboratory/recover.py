"""Short finetunes of the same model, data and seeds, to see what a format loses and LoRA wins back.

A plain loop, so that nothing differs between two runs but what is compared. The base is packed by
:func:`~.models.pack` and adapted by PEFT, whose layers on it are this package's fused op; the
16-bit base is adapted by the same PEFT configuration. A seed decides the adapters' first values and
the order of the data, alike for all methods, so that differences are paired.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..finetune.errors import BadInput, RunError
from .contenders import Contender
from .language import losses
from .models import linear_layers, pack, swap
from .text import Windows

__all__ = ["TARGETS", "Method", "Recipe", "finetune_methods", "run_cell", "target_layers"]

TARGETS: dict[str, tuple[str, ...] | None] = {
    "q+v": ("q_proj", "v_proj"),
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
    "all": None,
}
"""Which linear layers get adapters, by the names that LLaMA and its kin have."""


@dataclass(frozen=True)
class Recipe:
    """What all methods share.

    Attributes:
        steps, batch: of training; ``batch`` windows a step.
        alpha: of LoRA; None is twice the rank.
        warmup: steps in which the learning rate rises to its constant value.
        clip: the largest norm of the gradient, as in QLoRA's runs.
    """

    steps: int = 24
    batch: int = 4
    alpha: float | None = None
    warmup: int = 3
    clip: float = 0.3


@dataclass(frozen=True)
class Method:
    """One way to finetune.

    Attributes:
        name: in tables.
        base: the format of the base; None leaves it in 16 bits.
        targets: a key of :data:`TARGETS`; ignored by full finetuning.
        rank: of LoRA; 0 is full finetuning, all parameters, of a 16-bit base.
        learning_rate: constant after the warm-up.
    """

    name: str
    base: Contender | None
    targets: str = "all"
    rank: int = 16
    learning_rate: float = 1e-3

    def key(self) -> dict[str, Any]:
        """What of it decides a result."""
        return {
            "base": None if self.base is None else self.base.name,
            "targets": self.targets,
            "rank": self.rank,
            "learning_rate": self.learning_rate,
        }


def finetune_methods(
    contenders: Sequence[Contender], rank: int, learning_rate: float
) -> list[Method]:
    """LoRA on the 16-bit model and on each contender."""
    bases: list[Contender | None] = [None, *contenders]
    return [
        Method("16-bit" if base is None else base.name, base, "all", rank, learning_rate)
        for base in bases
    ]


def target_layers(model: nn.Module, targets: str) -> list[str]:
    """The names of the layers that get adapters.

    Raises:
        BadInput: the model has no layers of such names.
    """
    names, wanted = list(linear_layers(model)), TARGETS[targets]
    found = [n for n in names if wanted is None or n.rpartition(".")[2] in wanted]
    if not found:
        raise BadInput(
            f"LoRA on {targets}: the model has no layer called {', '.join(wanted or ())}; its "
            f"layers are called {', '.join(sorted({n.rpartition('.')[2] for n in names}))}"
        )
    return found


def run_cell(
    load: Callable[[], Any],
    method: Method,
    recipe: Recipe,
    windows: Windows,
    seed: int,
    *,
    validate: bool = False,
    keep: Callable[[Any], None] | None = None,
) -> dict[str, Any]:
    """One finetune of one method with one seed.

    Args:
        load: the 16-bit model, anew.
        validate: measure on the windows that a learning rate is chosen by, and not on the others.
        keep: called with the model after full finetuning, whose weights are 16-bit values then.

    Returns:
        ``history`` (the loss of each step), ``after`` (the loss of each held-out window),
        ``trained`` (parameters); nats a token.

    Raises:
        RunError: the loss became NaN or infinite.
    """
    model = load()
    layers = linear_layers(model)
    targets = target_layers(model, method.targets)
    if method.base is not None:
        swap(model, pack(method.base, layers))
    del layers
    model.requires_grad_(method.rank == 0)
    torch.manual_seed(seed)
    if method.rank:
        model = _adapted(model, targets, method.rank, recipe.alpha)
    else:
        model.float()  # updates are far below a bf16 weight's last bit
    history = _train(model, method.learning_rate, recipe, windows.train, seed)
    model.eval()
    if not method.rank:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.bfloat16())
    result = {
        "history": history,
        "after": losses(model, windows.validation if validate else windows.test),
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }
    if keep is not None and not method.rank:
        keep(model)
    return result


def _adapted(model: Any, targets: list[str], rank: int, alpha: float | None) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        lora_dropout=0.0,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
        return get_peft_model(model, config)


def _train(
    model: Any, learning_rate: float, recipe: Recipe, windows: torch.Tensor, seed: int
) -> list[float]:
    need = recipe.steps * recipe.batch
    generator = torch.Generator().manual_seed(seed)
    rounds = math.ceil(need / len(windows))
    order = torch.cat([torch.randperm(len(windows), generator=generator) for _ in range(rounds)])
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    history = []
    model.train()
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / max(1, recipe.warmup))
        rows = windows[order[step * recipe.batch : (step + 1) * recipe.batch]].to(model.device)
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        value = loss.item()
        if not math.isfinite(value):
            raise RunError(
                f"the loss of step {step + 1} is {value}: lower the learning rate; finished cells "
                "are kept"
            )
        torch.nn.utils.clip_grad_norm_(trained, recipe.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        history.append(value)
    return history
