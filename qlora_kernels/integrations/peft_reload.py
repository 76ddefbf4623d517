"""PEFT: an adapter that is loaded where it is already, as Trainer does to resume, keeps its dtype.

PEFT makes fp32 of what it loads; TRL trains the adapters of quantized models in bf16, so that a
resumed run would be another than the one that was interrupted. Models that hold none of our layers
are not touched.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from peft.peft_model import PeftModel

__all__ = ["install"]


def install() -> None:
    """Wraps ``PeftModel.load_adapter``. Idempotent."""
    original = PeftModel.load_adapter
    if getattr(original, "_qlora_kernels", False):
        return

    @functools.wraps(original)
    def load_adapter(self: Any, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        from .peft import FusedLoraLinear

        before: dict[str, torch.dtype] = {}
        if adapter_name in self.peft_config and any(
            isinstance(m, FusedLoraLinear) for m in self.modules()
        ):
            before = {name: p.dtype for name, p in self.named_parameters()}
        result = original(self, model_id, adapter_name, *args, **kwargs)
        for name, p in self.named_parameters():
            if p.is_floating_point() and p.dtype != before.get(name, p.dtype):
                p.data = p.data.to(before[name])
        return result

    load_adapter._qlora_kernels = True  # type: ignore[attr-defined]
    PeftModel.load_adapter = load_adapter  # type: ignore[method-assign]


install()
