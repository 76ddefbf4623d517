"""Starts a kernel, or writes its launch into the graph that a compiler is making."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import is_fake

# What the graph's node cannot carry: there the compiler's own setting holds, and a product and a
# sum may be one fma. So ops whose bits are promised are never traced into.
_NOT_IN_GRAPHS = ("enable_fp_fusion",)


def launch(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    """``kernel[grid](**arguments)``, launch options included."""
    if any(is_fake(a) for a in arguments.values() if isinstance(a, torch.Tensor)):
        kept = {k: v for k, v in arguments.items() if k not in _NOT_IN_GRAPHS}
        torch.library.wrap_triton(kernel)[grid](**kept)
    else:
        kernel[grid](**arguments)
