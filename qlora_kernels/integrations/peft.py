"""PEFT: a plain ``LoraConfig`` on a model of ours gives LoRA layers that are one op.

:func:`install` wraps the last of PEFT's dispatchers, once; it acts on :class:`Linear4bit` alone.
What the fused op does not cover (several active adapters, DoRA and the other variants, adapters
mixed in a batch, hooks on the inner layers) runs PEFT's own code on the same weights.

Experts in 4 bits take ``LoraConfig(target_parameters=[...])``, as dense ones do:
:class:`ParamWrapper`.

An adapter's files are PEFT's: what is trained here opens in a PEFT without this package, and the
other way round.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import peft.tuners.lora.model as lora_model
import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.layer import ParamWrapper as PeftParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ..nn import Experts4bit, Linear4bit, _Group, lora_projection

__all__ = ["FusedLoraLinear", "ParamWrapper", "install"]

# Initialisations that read nothing of the base weight. All others (PiSSA, OLoRA, LoftQ, ...) get it
# dense, and what they leave of it is quantized again.
_WEIGHT_FREE_INITS = (True, False, "gaussian", "eva")

_MERGE_WARNING = (
    "merging a LoRA adapter into a 4-bit weight quantizes the sum anew: an update of a few percent "
    "of the weight is mostly rounded away; merge into a 16-bit model to keep it"
)


class FusedLoraLinear(PeftLinear):
    """PEFT's LoRA layer over a :class:`~qlora_kernels.nn.Linear4bit`.

    The forward pass of one active, plain LoRA adapter is one op: ``x W^T + b + s (x A^T) B^T`` with
    one rounding. With dropout, ``S = dropout(x) A^T`` is computed first and goes into that op.

    Merging adds all merged adapters to the exact dequantized weight and quantizes once; the packed
    weight of before is kept, so that unmerging restores it bit for bit.
    """

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: Any, **kwargs: Any
    ) -> None:
        super().__init__(base_layer, adapter_name, config=config, **kwargs)

    # -- forward --

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not (args or kwargs or self.merged_adapters):
            base: Any = self._modules["base_layer"]
            if self._disable_adapters:
                return base(x)
            names = self._active_adapter
            active = names if isinstance(names, str) else names[0] if len(names) == 1 else None
            if active is not None and not _overridden(base):
                a = self._modules["lora_A"]._modules.get(active)  # type: ignore[union-attr]
                if a is None:
                    return base(x)
                b: Any = self._modules["lora_B"]._modules[active]  # type: ignore[union-attr]
                if (
                    active not in self.lora_variant
                    and not self.lora_bias[active]
                    and not _overridden(a)
                    and not _overridden(b)
                ):
                    return self._fused(x, base, active, a, b)
        if self.lora_variant and not self._disable_adapters and not self.merged_adapters:
            # DoRA and kin ask the base layer for a dense weight.
            with self._dense_base():
                return super().forward(x, *args, **kwargs)
        return super().forward(x, *args, **kwargs)

    def _fused(self, x: Tensor, base: Linear4bit, active: str, a: Any, b: Any) -> Tensor:
        a_weight, b_weight = a._parameters["weight"], b._parameters["weight"]
        scaling = self.scaling[active]
        if self.training:
            dropout = self.lora_dropout[active]
            if not isinstance(dropout, nn.Identity):
                s = lora_projection(dropout(x), a_weight, base.compute_dtype)
                return base.linear(x, None, b_weight, s, scaling)
        return base.linear(x, a_weight, b_weight, None, scaling)

    # -- a dense base weight, for a while --

    def get_base_layer(self) -> nn.Module:
        dense: nn.Module | None = self.__dict__.get("_dense")
        return super().get_base_layer() if dense is None else dense

    def _packed_layer(self) -> Linear4bit:
        layer = super().get_base_layer()
        assert isinstance(layer, Linear4bit)
        return layer

    @contextmanager
    def _dense_base(self, group: _Group | None = None) -> Iterator[nn.Linear]:
        """``get_base_layer()`` is a dense fp32 ``nn.Linear`` inside; nests (the outer one stays).

        ``group`` is the packed weight that it is made of, the base layer's own by default. Nothing
        is written back.
        """
        if "_dense" in self.__dict__:
            yield self.__dict__["_dense"]
            return
        base = self._packed_layer()
        own = base._group()
        try:
            if group is not None:
                base._set_group(group)
            dense = base.dequantize(torch.float32)
        finally:
            base._set_group(own)
        for name in ("eigens", "_peft_loraga_grad"):  # what CorDA and LoRA-GA leave there
            if hasattr(base, name):
                setattr(dense, name, getattr(base, name))
        self.__dict__["_dense"] = dense  # not a submodule
        try:
            yield dense
        finally:
            del self.__dict__["_dense"]

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any):
        init = config.init_lora_weights
        if init in _WEIGHT_FREE_INITS and self.resolve_lora_variant(config=config) is None:
            return super().update_layer(adapter_name, r, lora_alpha, config=config, **kwargs)
        base = self._packed_layer()
        with self._dense_base() as dense:
            before = dense.weight.detach().clone()
            super().update_layer(adapter_name, r, lora_alpha, config=config, **kwargs)
            if not torch.equal(before, dense.weight):
                base.set_weight(dense.weight.detach())

    def loftq_init(self, adapter_name: str, config: Any) -> None:
        """Refused, by name."""
        raise ValueError(
            "init_lora_weights='loftq' makes up for what quantization lost, which a layer in 4 "
            "bits no longer knows: leave init_lora_weights as it is, and call "
            "qlora_kernels.loftq_init(model, original) with the 16-bit model's folder afterwards"
        )

    # -- merging --

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Puts adapters into the packed weight, which rounds.

        ``W + sum of s B A`` is formed in fp32 from the exact dequantized ``W`` and quantized once,
        however many adapters are merged one after another. An update of a few percent of ``W``, as
        finetuning makes, is small against the 4-bit steps and is mostly rounded away (figures in
        :class:`qlora_kernels.nn.MergeReport`); merge into a 16-bit model to keep it.
        """
        names = check_adapters_to_merge(self, adapter_names)
        if not names:
            return
        if "_dense" in self.__dict__:  # a variant replays merges on the dense weight
            super().merge(safe_merge, names)
            return
        warnings.warn(_MERGE_WARNING, stacklevel=2)
        base = self._packed_layer()
        merged, before = self.merged_adapters, self.__dict__.get("_unmerged")
        if before is None:
            before = (base._group(), base.bias)
        group, bias = before
        own_bias = base.bias
        base.bias = bias
        try:
            with self._dense_base(group) as dense:
                self.merged_adapters = []
                super().merge(safe_merge, [*merged, *names])
                after = base._fresh_group(dense.weight.detach())
        except BaseException:
            self.merged_adapters = merged
            base.bias = own_bias
            raise
        base._set_group(after)
        if any(self.lora_bias[name] for name in self.merged_adapters):
            base.bias = nn.Parameter(dense.bias.detach().to(bias.dtype), bias.requires_grad)
        self.__dict__["_unmerged"] = before

    def unmerge(self) -> None:
        """Restores the packed weight (and bias) of before the first merge, bit for bit."""
        if "_dense" in self.__dict__ or not self.merged:
            super().unmerge()
            return
        base = self._packed_layer()
        device = base.weight.device
        group, base.bias = self.__dict__.pop("_unmerged")
        base._set_group(group)
        if base.weight.device != device:  # the model was moved while it was merged
            base.to(device)
        for name in self.merged_adapters:
            self._caches.pop(f"{name}-weight_norm", None)
        self.merged_adapters = []


class ParamWrapper(PeftParamWrapper):
    """PEFT's LoRA on one weight of an :class:`~qlora_kernels.nn.Experts4bit`.

    PEFT's own adds ``s B A`` to the weight for the time of a forward pass, which makes a dense copy
    of all experts. This one hands A and B on to the experts, as the argument ``lora``, and they go
    into the op of each expert that got rows. A and B are PEFT's in shape, name and meaning.

    PEFT tells wrappers of parameters by their class's name, so this has that name.

    Merging adds the adapters to the exact dequantized weight of one expert after the other and
    quantizes once; the packed weight of before is kept for unmerging.
    """

    def _experts(self) -> Experts4bit:
        base = self.get_base_layer()
        assert isinstance(base, Experts4bit)
        return base

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        experts = self._experts()
        self.num_experts, n, k = experts.shapes[self.parameter_name]
        self._param_ndim = 3
        # As PEFT reads it off the dense parameter, which it turns around where it has to.
        return (k, n) if experts.is_transposed else (n, k)

    def _factors(self, name: str) -> tuple[Tensor, Tensor, float]:
        """An adapter as the experts take it: A ``[E, r, in]``, B ``[E, out, r]``, scaling."""
        a: Any = self.lora_A[name].weight
        b: Any = self.lora_B[name].weight
        a = a.view(self.num_experts, -1, a.shape[-1])
        b = b.view(b.shape[0], -1, self.num_experts).permute(2, 0, 1).contiguous()
        return a, b, self.scaling[name]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self._check_forward_args(x, *args, **kwargs)
        if kwargs.pop("adapter_names", None) is not None:
            raise ValueError("adapters mixed in a batch cannot be used on experts")
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = [n for n in self.active_adapters if n in self.lora_A]
        if names and not self.disable_adapters and not self.merged:
            own = {self.parameter_name: [self._factors(n) for n in names]}
            kwargs["lora"] = {**kwargs.get("lora", {}), **own}
        return self.base_layer(x, *args, **kwargs)

    def get_delta_weight(self, adapter_name: str, *args: Any, **kwargs: Any) -> Tensor:
        """``s B A`` of all experts in fp32, as the model holds the weight."""
        a, b, scaling = self._factors(adapter_name)
        delta = (b.detach().float() @ a.detach().float()).mul_(scaling)
        return delta.transpose(1, 2) if self._experts().is_transposed else delta

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Puts adapters into the packed weights; rounds as :meth:`FusedLoraLinear.merge` does."""
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.lora_A]
        if not names:
            return
        warnings.warn(_MERGE_WARNING, stacklevel=2)
        experts, weight = self._experts(), self.parameter_name
        merged = [*self.merged_adapters, *names]
        factors = [self._factors(n) for n in merged]

        def sums() -> Iterator[Tensor]:
            for e in range(self.num_experts):
                dense = experts.dequantize_expert(weight, e, torch.float32)
                for a, b, scaling in factors:
                    dense.addmm_(b[e].float(), a[e].float(), alpha=scaling)
                if safe_merge and not torch.isfinite(dense).all():
                    raise ValueError(
                        f"NaNs in the merged weight of expert {e}: one of the adapters "
                        f"{', '.join(merged)} is broken"
                    )
                yield dense.T if experts.is_transposed else dense

        now = experts.take(weight)
        before = self.__dict__.get("_unmerged", now)
        experts.give(weight, before)  # the sum starts from the exact weight
        try:
            after = experts.quantized(weight, sums())
        except BaseException:
            experts.give(weight, now)
            raise
        experts.give(weight, after)
        self.__dict__["_unmerged"], self.merged_adapters = before, merged

    def unmerge(self) -> None:
        """Restores the packed weights of before the first merge, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._experts().give(self.parameter_name, self.__dict__.pop("_unmerged"))
        self.merged_adapters = []


def _overridden(layer: nn.Module) -> bool:
    """Whether calling ``layer`` does more than its class says: hooks, or a replaced forward."""
    d = layer.__dict__
    return bool(
        d["_forward_hooks"] or d["_forward_pre_hooks"] or d["_backward_hooks"] or "forward" in d
    )


def _dispatch(
    target: nn.Module, adapter_name: str, config: Any, parameter_name: str | None, **kwargs: Any
) -> nn.Module | None:
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if isinstance(base, Experts4bit) and parameter_name in base.shapes:
        return ParamWrapper(target, adapter_name, parameter_name, config=config, **kwargs)
    if parameter_name is not None or not isinstance(base, Linear4bit):
        return None
    if type(base).forward is not Linear4bit.forward:  # as our own LoRA layer: not to be skipped
        return None
    if config.fan_in_fan_out:
        warnings.warn("fan_in_fan_out is for Conv1D; set to False for a 4-bit linear", stacklevel=2)
        config.fan_in_fan_out = False
    return FusedLoraLinear(target, adapter_name, config=config, **kwargs)


def install() -> None:
    """Makes PEFT's LoRA use :class:`FusedLoraLinear` and :class:`ParamWrapper` for our layers.
    Idempotent."""
    original = lora_model.dispatch_default  # type: ignore[attr-defined]
    if getattr(original, "_qlora_kernels", False):
        return

    @functools.wraps(original)
    def dispatch_default(target, adapter_name, config, parameter_name=None, **kwargs):
        new = _dispatch(target, adapter_name, config, parameter_name, **kwargs)
        if new is None:
            new = original(target, adapter_name, config, parameter_name=parameter_name, **kwargs)
        return new

    dispatch_default._qlora_kernels = True  # type: ignore[attr-defined]
    lora_model.dispatch_default = dispatch_default  # type: ignore[attr-defined]


install()
