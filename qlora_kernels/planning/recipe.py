"""A finetune's settings as far as memory and time depend on them, and the plan that they give."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..emulator.devices import Device
from ..finetune.errors import BadInput, bad_input
from .memory import GPU_CONTEXT, MemoryPlan, StepShape, plan_memory

__all__ = ["OPTIMIZERS", "Place", "Recipe", "make_plan"]

OPTIMIZERS = (
    "adamw_torch", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit", "paged_adamw",
    "adamw_bnb_8bit", "sgd",
)  # fmt: skip
"""Trainer's names."""


@dataclass(frozen=True)
class Recipe:
    """Named as ``qlora finetune`` names them."""

    max_length: int = 512
    per_device_train_batch_size: int = 1
    gradient_accumulation_steps: int = 16
    r: int = 64
    target_modules: str | tuple[str, ...] = "all-linear"
    optim: str = "paged_adamw_32bit"
    activation_checkpointing: bool = True
    dtype: str = "bfloat16"
    quant_type: str = "nf4"
    blocksize: int = 64
    double_quant: bool = True
    attn_implementation: str = "sdpa"
    fuse_layers: bool = True

    @property
    def shape(self) -> StepShape:
        return StepShape(self.per_device_train_batch_size, self.max_length)

    @property
    def bits(self) -> float:
        """Bits a quantized weight takes; those of ``dtype`` where nothing is quantized."""
        if self.quant_type == "none":
            return 8 * self._dtype().itemsize
        scale = 8 + 32 / 256 if self.double_quant else 32
        return 4 + scale / self.blocksize

    def _dtype(self) -> Any:
        import torch

        return getattr(torch, self.dtype)

    def optimizer(self) -> tuple[Any, dict[str, Any]]:
        """The class behind the name, and its arguments.

        Raises:
            BadInput: there is none of that name.
        """
        import torch

        from ..integrations.optimizers import OURS

        plain = {"adamw_torch": torch.optim.AdamW, "sgd": torch.optim.SGD}
        cls = plain.get(self.optim, OURS.get(self.optim))
        if cls is None:
            import difflib

            near = difflib.get_close_matches(self.optim, OPTIMIZERS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise BadInput(
                f"optim {self.optim!r} is not known here{hint} ({', '.join(OPTIMIZERS)})"
            )
        return cls, {"lr": 1e-3} if self.optim == "sgd" else {}

    def plan_settings(self) -> dict[str, Any]:
        """Arguments of :func:`~.memory.plan_memory` that come from the recipe."""
        from peft import LoraConfig

        quant: Mapping[str, Any] | None = None
        if self.quant_type != "none":
            quant = {
                "quant_type": self.quant_type,
                "blocksize": self.blocksize,
                "double_quant": self.double_quant,
            }
        targets: Any = self.target_modules
        if not isinstance(targets, str):
            targets = list(targets)
        return {
            "dtype": self._dtype(),
            "quant": quant,
            "lora": LoraConfig(r=self.r, target_modules=targets, task_type="CAUSAL_LM"),
            "checkpointing": self.activation_checkpointing,
            "accumulation": self.gradient_accumulation_steps,
            "optimizer": self.optimizer(),
            "attention": self.attn_implementation,
            "fused": self.fuse_layers,
        }


@dataclass(frozen=True)
class Place:
    """Where a finetune is to run: a GPU of the table, an amount of memory, or this machine."""

    name: str
    limit: int | None
    device: Device | None = None
    gpu: bool = True
    notes: tuple[str, ...] = field(default=())


def make_plan(config: Any, recipe: Recipe, place: Place, program: int | None = None) -> MemoryPlan:
    """The memory plan of a recipe at a place.

    Raises:
        BadInput: target_modules that the model does not have, or an unknown optimizer.
    """
    capability = None
    if place.gpu:
        capability = place.device.capability if place.device else (8, 0)
        program = GPU_CONTEXT if program is None else program
    with bad_input("the recipe"):
        return plan_memory(
            config,
            recipe.shape,
            program=program,
            limit=(place.limit, place.name),
            gpu=capability,
            **recipe.plan_settings(),
        )
