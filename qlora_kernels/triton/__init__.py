"""The ops in Triton: quantize, dequantize, the linear layer forward and backward.

``qlora_kernels.set_backend("triton")`` has the ops of ``torch.ops.qlora_kernels`` run by these
functions, which have the ops' own signatures and checks. Importing this package imports Triton.

``torch.compile`` sees into the linear layer's two ops, down to each kernel's launch: they are also
``torch.library.triton_op``s, in the namespace ``qlora_kernels_triton``. Quantize and dequantize
stay closed to it, because a graph cannot carry the launch option that keeps their bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

try:
    import triton  # noqa: F401
except ImportError as error:
    raise ImportError(
        "qlora_kernels.triton needs Triton, which is not installed: pip install triton (torch's "
        "GPU builds for Linux bring it)"
    ) from error

import torch
from torch import Tensor

from .. import ops
from .dequantize import dequantize_4bit, dequantize_4bit_out
from .input_grad import linear_4bit_backward
from .linear import linear_4bit
from .quantize import quantize_4bit, quantize_4bit_scaled, quantize_absmax

NAMESPACE = "qlora_kernels_triton"
_TRACED = {
    "linear_4bit": torch.library.triton_op(
        f"{NAMESPACE}::linear_4bit", linear_4bit, mutates_args=()
    ),
    "linear_4bit_backward": torch.library.triton_op(
        f"{NAMESPACE}::linear_4bit_backward", linear_4bit_backward, mutates_args=()
    ),
}
OPS: dict[str, Callable[..., Any]] = {
    "quantize_4bit": quantize_4bit,
    "quantize_4bit_scaled": quantize_4bit_scaled,
    "quantize_absmax": quantize_absmax,
    "dequantize_4bit": dequantize_4bit,
    "dequantize_4bit.out": dequantize_4bit_out,
    "linear_4bit": linear_4bit,
    "linear_4bit_backward": linear_4bit_backward,
}
"""By the ops' names; what ``set_backend("triton")`` registers."""


def show_to_compiler(library: torch.library.Library, kind: str) -> None:
    """Has a compiler's trace of the ops, on devices of a kind, go into their Triton kernels for as
    long as ``library`` lives."""
    from torch._subclasses.functional_tensor import FunctionalTensorMode

    for name, traced in _TRACED.items():

        def rule(mode: Any, op: Any, types: Any, args: Any, kwargs: Any, traced=traced) -> Any:
            first = next(a for a in args if isinstance(a, Tensor))
            if first.device.type != kind:
                return mode.__torch_dispatch__(op, types, args, kwargs)
            with mode:
                return traced(*args, **kwargs)

        torch.library.register_torch_dispatch(
            f"{ops.NAMESPACE}::{name}", FunctionalTensorMode, rule, lib=library
        )
