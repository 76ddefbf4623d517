"""Trainer's ``optim="paged_adamw_8bit"`` and its kin: our optimizers behind those names.

transformers gets them from bitsandbytes. Here they are this package's where bitsandbytes is not
installed, where ``qlora_kernels.enable()`` has taken over, and inside ``ours()``; else
bitsandbytes', as before.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from transformers import trainer_optimizer

from .. import optim, takeover

__all__ = ["OURS", "install", "ours"]

OURS: dict[str, type[optim.AdamW]] = {
    "adamw_bnb_8bit": optim.AdamW8bit,
    "adamw_8bit": optim.AdamW8bit,
    "paged_adamw_32bit": optim.PagedAdamW32bit,
    "paged_adamw": optim.PagedAdamW32bit,
    "paged_adamw_8bit": optim.PagedAdamW8bit,
}
"""By Trainer's names; ``paged_adamw`` is understood wherever transformers knows it."""


_asked: ContextVar[bool] = ContextVar("ours", default=False)


@contextlib.contextmanager
def ours() -> Iterator[None]:
    """What Trainer is asked for by name inside is this package's, whatever else is installed."""
    token = _asked.set(True)
    try:
        yield
    finally:
        _asked.reset(token)


def _takes_over() -> bool:
    return _asked.get() or takeover.enabled() or importlib.util.find_spec("bitsandbytes") is None


def install() -> None:
    """Puts our handler before bitsandbytes'. Idempotent."""
    handlers: dict[Any, Any] = trainer_optimizer._OPTIMIZER_HANDLERS
    for name, theirs in list(handlers.items()):
        ours = OURS.get(getattr(name, "value", name))
        if ours is None or getattr(theirs, "_qlora_kernels", False):
            continue

        def handler(
            ctx: Any, ours: type = ours, theirs: Any = theirs
        ) -> tuple[Any, dict[str, Any]]:
            if not _takes_over():
                return theirs(ctx)
            ctx.optimizer_kwargs.update(ctx.adam_kwargs)
            return ours, ctx.optimizer_kwargs

        handler._qlora_kernels = True  # type: ignore[attr-defined]
        handlers[name] = handler


install()
