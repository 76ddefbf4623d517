"""Any parameter of any module in 4 bits: dequantized whenever the module reads it.

For weights that are no linear layer's, the 3-D ones of experts say. The parameter keeps its name in
the module and in state dicts, where its scales stand beside it under bitsandbytes' keys.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.utils.parametrize as P
from torch import Tensor, nn

from .. import functional as F4

__all__ = [
    "Bnb4bitParametrization",
    "replace_parameter_4bit",
    "replace_parameter_4bit_prequantized",
]


class Bnb4bitParametrization(nn.Module):
    """``parametrizations.<name>[0]`` of a 4-bit parameter: packed bytes in, dense weight out."""

    def __init__(self, quant_state: F4.QuantState) -> None:
        super().__init__()
        self.quant_state = quant_state

    @torch.no_grad()
    def forward(self, quantized_param: Tensor) -> Tensor:
        return F4.dequantize_4bit(quantized_param, self.quant_state)

    def _apply(self, fn: Any, recurse: bool = True) -> Bnb4bitParametrization:
        # The scales go where the bytes go, and keep their dtype.
        self.quant_state = self.quant_state.moved(fn(self.quant_state.absmax).device)
        return super()._apply(fn, recurse)


def _parameter(module: nn.Module, param_name: str) -> nn.Parameter:
    if not hasattr(module, param_name):
        raise AttributeError(f"Module does not have parameter '{param_name}'")
    parameter = getattr(module, param_name)
    if not isinstance(parameter, nn.Parameter):
        raise TypeError(f"Parameter '{param_name}' is not an instance of nn.Parameter")
    return parameter


def replace_parameter_4bit(
    module: nn.Module,
    param_name: str,
    compress_statistics: bool = False,
    quant_type: str = "nf4",
    blocksize: int | None = None,
) -> None:
    """Quantizes ``module.<param_name>``, of any shape; reading it dequantizes it from now on.

    The parameter is frozen. Inside one ``forward`` of the module it is dequantized once.

    Args:
        compress_statistics: double quantization of the scales.
        quant_type: a format's name.
        blocksize: values a scale; 64 unless given. Blocks run over the flattened parameter.

    Raises:
        AttributeError: the module has no such attribute.
        TypeError: it is not a parameter.
    """
    parameter = _parameter(module, param_name)
    packed, state = F4.quantize_4bit(
        parameter.data,
        blocksize=blocksize,
        compress_statistics=compress_statistics,
        quant_type=quant_type,
    )
    setattr(module, param_name, nn.Parameter(packed, requires_grad=False))
    _parametrize(module, param_name, state)


def replace_parameter_4bit_prequantized(
    module: nn.Module,
    param_name: str,
    qs_dict: dict[str, Any],
    device: torch.device | str,
) -> None:
    """The same for a parameter that holds packed bytes already.

    Args:
        qs_dict: what ``QuantState.as_dict(packed=True)`` gave.
        device: where the scales go.

    Raises:
        AttributeError, TypeError: as :func:`replace_parameter_4bit`.
        ValueError: the state does not agree with itself.
    """
    _parameter(module, param_name)
    _parametrize(module, param_name, F4.QuantState.from_dict(qs_dict, device=device))


def _parametrize(module: nn.Module, name: str, state: F4.QuantState) -> None:
    # unsafe: the packed bytes have neither shape nor dtype of what is read.
    P.register_parametrization(module, name, Bnb4bitParametrization(state), unsafe=True)
    _register_parametrization_hooks(module, name)


def _register_parametrization_hooks(module: nn.Module, param_name: str) -> None:
    module.register_state_dict_post_hook(functools.partial(_after_saving, param_name))
    module.register_load_state_dict_pre_hook(functools.partial(_before_loading, param_name))
    # always_call: a checkpointed forward that is computed again ends by an exception, and what was
    # counted up must be counted down.
    module.register_forward_pre_hook(_enable_parametrization_cache)
    module.register_forward_hook(_disable_parametrization_cache, always_call=True)


def _enable_parametrization_cache(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    P._cache_enabled += 1


def _disable_parametrization_cache(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
    # It is called for a forward that failed before it was counted, too.
    P._cache_enabled = max(0, P._cache_enabled - 1)
    if not P._cache_enabled:
        P._cache = {}


def _found(module: nn.Module, name: str) -> Bnb4bitParametrization | None:
    if not P.is_parametrized(module, name):
        return None
    steps = module.parametrizations[name]  # type: ignore[index]
    return next((s for s in steps if isinstance(s, Bnb4bitParametrization)), None)


def _after_saving(
    name: str, module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any
) -> None:
    """``parametrizations.<name>.original`` under the parameter's own name, and its scales."""
    step, original = _found(module, name), f"{prefix}parametrizations.{name}.original"
    if step is not None and original in state_dict:
        state_dict[prefix + name] = state_dict.pop(original)
        for key, value in step.quant_state.as_dict(packed=True).items():
            state_dict[f"{prefix}{name}.{key}"] = value


def _before_loading(
    name: str, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any
) -> None:
    """The other way round; the scales are taken over."""
    step, start = _found(module, name), f"{prefix}{name}."
    entries = {k[len(start) :]: v for k, v in state_dict.items() if k.startswith(start)}
    if step is None or not entries or prefix + name not in state_dict:
        return
    original = module.parametrizations[name].original  # type: ignore[index, union-attr]
    state = F4.QuantState.from_dict(entries, device=original.device)
    if state.shape != step.quant_state.shape:
        raise ValueError(
            f"{prefix}{name} is {list(state.shape or ())} in the checkpoint, here "
            f"{list(step.quant_state.shape or ())}"
        )
    for key in entries:
        del state_dict[start + key]
    state_dict[f"{prefix}parametrizations.{name}.original"] = state_dict.pop(prefix + name)
    step.quant_state = state
