"""LoRA+ by PEFT's ``create_loraplus_optimizer`` with an optimizer of ours.

PEFT tells *bitsandbytes'* manager that embeddings keep 32-bit states if the class is called
``AdamW8bit`` or alike, and imports bitsandbytes for it. Ours has a manager of its own.
"""

from __future__ import annotations

import functools
from typing import Any

from peft.optimizers import loraplus
from torch import nn

__all__ = ["install"]


def install() -> None:
    """Wraps ``create_loraplus_optimizer``: PEFT's own for all other optimizers. Idempotent."""
    original = loraplus.create_loraplus_optimizer
    if getattr(original, "_qlora_kernels", False):
        return

    @functools.wraps(original)
    def create_loraplus_optimizer(model: Any, optimizer_cls: Any, **kwargs: Any) -> Any:
        from .. import optim

        if not (isinstance(optimizer_cls, type) and issubclass(optimizer_cls, optim.AdamW)):
            return original(model, optimizer_cls, **kwargs)

        def make(*args: Any, **settings: Any) -> Any:  # a name that PEFT does not know
            return optimizer_cls(*args, **settings)

        optimizer = original(model, make, **kwargs)  # type: ignore[arg-type]
        manager = optim.GlobalOptimManager.get_instance()
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                manager.register_module_override(module, "weight", {"optim_bits": 32})
        return optimizer

    create_loraplus_optimizer._qlora_kernels = True  # type: ignore[attr-defined]
    loraplus.create_loraplus_optimizer = create_loraplus_optimizer


install()
