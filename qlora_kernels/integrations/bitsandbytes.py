"""``swap()``: bitsandbytes' 4-bit layers of a model in memory to this package's, and back.

Packed bytes and scales are not touched: the new layers hold the old ones' tensors, so a swap costs
neither time nor memory, and dequantizes to the same bits. PEFT's LoRA layers stay the objects that
they are (an optimizer's parameters, hooks and references hold), and change their class::

    bitsandbytes.nn.Linear4bit       <->  qlora_kernels.nn.Linear4bit
    peft.tuners.lora.bnb.Linear4bit  <->  FusedLoraLinear
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .. import functional as F4
from ..formats import get_format
from ..nn import Linear4bit, Params4bit

__all__ = ["SwapReport", "swap"]

_WAYS = ("qlora_kernels", "bitsandbytes")
# What somebody has hung on a module: the dicts are handed on, so that handles still remove.
_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_backward_hooks",
    "_backward_pre_hooks",
)  # fmt: skip


@dataclass
class SwapReport:
    """What :func:`swap` did; ``print`` it."""

    to: str
    layers: list[str] = field(default_factory=list)
    """Names of the 4-bit layers that were swapped."""
    adapters: list[str] = field(default_factory=list)
    """Names of PEFT's layers that changed their class."""
    bytes_shared: int = 0
    """Packed bytes and scales that both have held."""
    left: dict[str, str] = field(default_factory=dict)
    """Name to class, of bitsandbytes' other layers, which stay."""

    def __str__(self) -> str:
        lines = [
            f"{len(self.layers)} 4-bit layers are {self.to}' now, {self.bytes_shared / 1e6:.1f} MB "
            "shared, none copied"
        ]
        if self.adapters:
            lines.append(f"LoRA on {len(self.adapters)} of them goes with them")
        if self.left:
            kinds = ", ".join(sorted(set(self.left.values())))
            lines.append(f"{len(self.left)} layers stay bitsandbytes': {kinds}")
        return "\n".join(lines)


def swap(model: nn.Module, to: str = "qlora_kernels", *, verbose: bool = False) -> SwapReport:
    """Swaps the 4-bit layers of ``model``, in place, without quantizing anything anew.

    Args:
        model: any module; of transformers, in PEFT's wrapping or not, in training or not. A
            transformers model trains under Trainer and saves afterwards as before.
        to: "qlora_kernels", or "bitsandbytes" for the way back.
        verbose: print the report.

    Returns:
        Which layers, and how many bytes are shared.

    Raises:
        ValueError: no such layer in it; a layer that is not quantized yet; an adapter that is
            merged (unmerge it first); a format that bitsandbytes does not know. Nothing has been
            changed then.
        ImportError: the way back, and no bitsandbytes.
    """
    if to not in _WAYS:
        raise ValueError(f"to is {to!r}; it may be {' or '.join(map(repr, _WAYS))}")
    if isinstance(model, _source_class(to)):
        raise ValueError("the model is a layer itself: swap the module that holds it")
    back = to == "bitsandbytes"
    source = _source_class(to)
    report = SwapReport(to)
    found: dict[int, tuple[Any, list[str]]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, source):
            found.setdefault(id(module), (module, []))[1].append(name)
        elif not back and type(module).__module__.startswith("bitsandbytes."):
            report.left[name] = type(module).__name__
    if not found:
        raise ValueError(f"{type(model).__name__} holds no 4-bit layer of {_other(to)}")
    for module, names in found.values():
        _check(module, names[0], back)
    tuned = _tuned_layers(model, back)
    for name, layer in tuned.items():
        if layer.merged_adapters:
            raise ValueError(f"{name} has adapters merged into it: unmerge_adapter() first")

    made: dict[int, Any] = {}  # by weight: layers of one weight stay of one weight
    for module, names in found.values():
        new = (_to_theirs if back else _to_ours)(module, made)
        _hand_over(module, new)
        for name in names:
            model.set_submodule(name, new)
            report.layers.append(name)
    report.bytes_shared = sum(
        _bytes_of(layer) for layer in {id(v): v for v in made.values()}.values()
    )
    for name, layer in tuned.items():
        _change_class(layer, back)
        report.adapters.append(name)
    for part in model.modules():
        if vars(part).get("hf_quantizer") is not None:
            _change_quantizer(part, back)
    if verbose:
        print(report)
    return report


def _other(to: str) -> str:
    return _WAYS[1 - _WAYS.index(to)]


def _source_class(to: str) -> type:
    if to == "bitsandbytes":
        return Linear4bit
    theirs = sys.modules.get("bitsandbytes")
    return type("Absent", (), {}) if theirs is None else theirs.nn.Linear4bit


def _check(module: Any, name: str, back: bool) -> None:
    if getattr(module.weight, "quant_state", None) is None:
        raise ValueError(f"{name} is not quantized yet: move the model to its device first")
    if not back:
        return
    fmt, size = module.format, module.blocksize
    if fmt not in F4.PEER_FORMATS or size not in F4.PEER_BLOCKSIZES:
        raise ValueError(f"{name} is {fmt.name} in blocks of {size}, which bitsandbytes lacks")
    if type(module) is not Linear4bit and not hasattr(module, "_quant_type"):
        raise ValueError(f"{name} is a {type(module).__name__}, which bitsandbytes lacks")


# --- one layer ------------------------------------------------------------------------------------


def _to_ours(old: Any, made: dict[int, Any]) -> Linear4bit:
    new = Linear4bit(
        old.in_features,
        old.out_features,
        bias=False,
        compute_dtype=old.compute_dtype,
        quant_type=old.weight.quant_state.quant_type,
        device="meta",
    )
    first = made.get(id(old.weight))
    if first is not None:
        new._set_group(first._group())
    else:
        data, state = _plainly_packed(old)
        new.weight = _our_parameter(data, state)
        made[id(old.weight)] = new
    new.compute_type_is_set = old.compute_type_is_set
    new.bias = old.bias
    return new


def _plainly_packed(old: Any) -> tuple[torch.Tensor, Any]:
    """Bytes in the order of the checkpoint: on some CPUs bitsandbytes has them in its own."""
    data, state = old.weight.data, old.weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

        data, state = _convert_weight_packed_for_cpu_inverse(data, state)
    return data, state


def _our_parameter(data: torch.Tensor, theirs: Any) -> Params4bit:
    state2 = None
    if theirs.state2 is not None:
        state2 = F4.QuantState(
            absmax=theirs.state2.absmax,
            code=theirs.state2.code,
            blocksize=theirs.state2.blocksize,
            dtype=torch.float32,
        )
    state = F4.QuantState(
        absmax=theirs.absmax,
        shape=torch.Size(theirs.shape),
        # As when reading a checkpoint: the table that bitsandbytes' kernels compute with.
        code=get_format(theirs.quant_type).tensors(data.device)[0],
        blocksize=theirs.blocksize,
        quant_type=theirs.quant_type,
        dtype=theirs.dtype,
        offset=theirs.offset,
        state2=state2,
    )
    weight = Params4bit(data, quant_state=state, bnb_quantized=True)
    weight._become(state, data.dtype)
    return weight


def _to_theirs(old: Linear4bit, made: dict[int, Any]) -> Any:
    import bitsandbytes as bnb

    new = bnb.nn.Linear4bit(
        old.in_features,
        old.out_features,
        bias=False,
        compute_dtype=old.compute_dtype,
        compress_statistics=old.compress_statistics,
        quant_type=old.quant_type,
        quant_storage=old.quant_storage,
        device="meta",
    )
    weight = made.get(id(old.weight))
    if weight is None:
        ours = old.quant_state
        assert ours is not None
        nested = None
        if ours.state2 is not None:
            nested = bnb.functional.QuantState(
                absmax=ours.state2.absmax, code=ours.state2.code,
                blocksize=ours.state2.blocksize, dtype=torch.float32,
            )  # fmt: skip
        state = bnb.functional.QuantState(
            absmax=ours.absmax, shape=ours.shape, code=ours.code, blocksize=ours.blocksize,
            quant_type=ours.quant_type, dtype=ours.dtype, offset=ours.offset, state2=nested,
        )  # fmt: skip
        weight = bnb.nn.Params4bit(
            old.weight.data, requires_grad=False, quant_state=state, blocksize=ours.blocksize,
            compress_statistics=ours.nested, quant_type=ours.quant_type,  # type: ignore[arg-type]
            quant_storage=old.quant_storage, module=new, bnb_quantized=True,
        )  # fmt: skip
        made[id(old.weight)] = weight
    new.weight = weight
    new.quant_state = weight.quant_state
    new.compute_type_is_set = old.compute_type_is_set
    new.bias = old.bias
    return new


def _hand_over(old: Any, new: Any) -> None:
    """Mode, hooks, and accelerate's wrapping, from the old layer to the new one."""
    new.train(old.training)
    hook = getattr(old, "_hf_hook", None)
    if hook is not None:
        from accelerate.hooks import add_hook_to_module, remove_hook_from_module

        remove_hook_from_module(old)
        add_hook_to_module(new, hook)
    for name in _HOOKS:
        new.__dict__[name] = old.__dict__[name]


def _bytes_of(layer: Any) -> int:
    weight: Any = layer.weight if isinstance(layer, nn.Module) else layer
    state = weight.quant_state
    tensors = [weight.data, state.absmax]
    if state.state2 is not None:
        tensors.append(state.state2.absmax)
    return sum(t.numel() * t.element_size() for t in tensors)


# --- what is around the layers --------------------------------------------------------------------


def _tuned_layers(model: nn.Module, back: bool) -> dict[str, Any]:
    """PEFT's LoRA layers over the source's, by name."""
    kind = _lora_class(not back)
    if kind is None:
        return {}
    return {name: m for name, m in model.named_modules() if type(m) is kind}


def _lora_class(theirs: bool) -> type | None:
    if "peft.tuners.lora" not in sys.modules:
        return None
    if theirs:
        from peft.tuners.lora import bnb

        return getattr(bnb, "Linear4bit", None)
    from .peft import FusedLoraLinear

    return FusedLoraLinear


def _change_class(layer: Any, back: bool) -> None:
    kind = _lora_class(back)
    if kind is None:
        raise ImportError("PEFT has no LoRA layer for bitsandbytes: is bitsandbytes installed?")
    layer.__class__ = kind
    layer.fan_in_fan_out = False
    if not back:
        layer.is_target_conv_1d_layer = False


def _change_quantizer(model: Any, back: bool) -> None:
    """transformers' record of who quantized the model: it saves, counts and validates by that."""
    from . import transformers as bridge

    config = model.hf_quantizer.quantization_config
    if back:
        model.hf_quantizer = bridge._THEIR_QUANTIZER(config, pre_quantized=True)
        return
    ours = (
        bridge.QLoRAKernelsQuantizer
        if isinstance(config, bridge.QLoRAKernelsConfig)
        else bridge.BitsAndBytesQuantizer
    )
    model.hf_quantizer = ours(config, pre_quantized=True)
    # Their loading left how to convert back, which their own saving fails at; ours writes as it is.
    kept = getattr(model, "_weight_conversions", None) or []
    model._weight_conversions = [
        c
        for c in kept
        if not any(
            "Deserialize" in type(op).__name__ or "Quantize" in type(op).__name__
            for op in getattr(c, "operations", ())
        )
    ]
    bridge._count_packed_weights()
    model.is_loaded_in_4bit = True
