"""LoRA on a 4-bit linear layer, in one op."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checkpoint import COMPUTE_DTYPES
from .linear import Linear4bit, _Group

__all__ = [
    "LoraLinear4bit",
    "LoraSpec",
    "MergeReport",
    "lora_projection",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
]


def lora_projection(x: Tensor, a: Tensor, compute_dtype: torch.dtype | None = None) -> Tensor:
    """``S = x A^T`` outside the fused op, for LoRA with dropout: x is the dropped input.

    x ``[..., K]``, a ``[r, K]``, S ``[..., r]``. Computed in ``compute_dtype`` (x's dtype if None),
    or in fp32 on a CPU that has no matrix product in that dtype, where it is both faster and
    closer. Under autocast it is what autocast makes of ``F.linear``.
    """
    if torch.is_autocast_enabled(x.device.type):
        return F.linear(x, a)
    dtype = compute_dtype or x.dtype
    if x.device.type == "cpu" and dtype not in _CPU_GEMMS:
        dtype = torch.float32
    return F.linear(x.to(dtype), a.to(dtype))


_CPU_GEMMS = {torch.float32}
if torch.ops.mkldnn._is_mkldnn_bf16_supported():
    _CPU_GEMMS.add(torch.bfloat16)
if torch.ops.mkldnn._is_mkldnn_fp16_supported():
    _CPU_GEMMS.add(torch.float16)


@dataclass(frozen=True)
class LoraSpec:
    """LoRA for :func:`replace_linear_layers`; names as in PEFT's ``LoraConfig``.

    ``target_modules`` (patterns as :func:`replace_linear_layers` takes them) picks the layers that
    get adapters among those that are quantized; None means all.
    """

    r: int = 16
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    use_rslora: bool = False
    target_modules: str | Sequence[str] | None = None
    dtype: torch.dtype = torch.float32

    def layer_kwargs(self) -> dict[str, Any]:
        """The keyword arguments of :class:`LoraLinear4bit` that this stands for."""
        return {
            "r": self.r,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "use_rslora": self.use_rslora,
            "lora_dtype": self.dtype,
        }


@dataclass(frozen=True)
class MergeReport:
    """What merging an adapter into a 4-bit weight lost: Frobenius norms, in fp32.

    ``W + s B A`` is quantized again. The old weight lies on the format's grid, so an update that is
    small against the grid's steps is rounded away, and one that is not adds rounding of its own.
    Measured on NF4 in blocks of 64, Gaussian weights, rank 16:

    ====================  =====  =====  =====  =====  =====
    ``|s B A| / |W|``     0.001   0.01   0.03    0.1    0.3
    relative_to_update     1.03   1.09   1.08   0.79   0.32
    relative_to_weight    0.001  0.011  0.032  0.079  0.092
    ====================  =====  =====  =====  =====  =====

    So what finetuning usually changes (a few percent) is lost by merging into 4 bits; merge into
    the dequantized or the original 16-bit weight (:meth:`LoraLinear4bit.dequantize` and
    :meth:`LoraLinear4bit.delta_weight`) to keep it.
    """

    rounding: float
    """``|quantized(W + s B A) - (W + s B A)|``."""
    update: float
    """``|s B A|``."""
    weight: float
    """``|W + s B A|``."""

    @property
    def relative_to_update(self) -> float:
        return self.rounding / self.update if self.update else math.inf

    @property
    def relative_to_weight(self) -> float:
        return self.rounding / self.weight if self.weight else 0.0

    def __str__(self) -> str:
        return (
            f"rounding is {self.relative_to_weight:.2%} of the weight and "
            f"{self.relative_to_update:.2f} x the update that was merged"
        )


class LoraLinear4bit(Linear4bit):
    """``y = x W^T + b + s (dropout(x) A^T) B^T``, with ``W`` 4-bit and frozen, in one op.

    Without dropout (or in ``eval()``) the op takes A and B. With dropout it is split at
    ``S = dropout(x) A^T``, which the op adds in; the gradient of A then sees the dropped x.

    Args:
        r: the rank. ``lora_alpha``: ``s = lora_alpha / r``, or ``/ sqrt(r)`` with ``use_rslora``.
        lora_dropout: probability, 0 to below 1.
        lora_dtype: of A ``[r, in_features]`` and B ``[out_features, r]``; fp32 by default, whatever
            is computed in.
        kwargs: those of :class:`Linear4bit`; ``quant_type`` is "nf4" unless given.

    The weight is packed at once. A is drawn as PEFT does (Kaiming uniform, a = sqrt(5)), B is zero.

    Raises:
        ValueError: a rank or a dropout that cannot be.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        r: int = 16,
        lora_alpha: float = 16.0,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        lora_dtype: torch.dtype = torch.float32,
        device: torch.device | str | int | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(r, int) or r <= 0:
            raise ValueError(f"the LoRA rank r must be a positive integer, got {r!r}")
        if not 0.0 <= lora_dropout < 1.0:
            raise ValueError(f"lora_dropout must be in [0, 1), got {lora_dropout!r}")
        if lora_dtype not in COMPUTE_DTYPES:
            raise ValueError(f"lora_dtype must be float32, bfloat16 or float16, got {lora_dtype}")
        kwargs.setdefault("quant_type", "nf4")
        super().__init__(in_features, out_features, bias, device=device, **kwargs)
        self._first_forward_is_due = False  # a layer of this package's own: nothing to imitate
        self._pack()
        self.r, self.lora_alpha, self.lora_dropout = r, float(lora_alpha), float(lora_dropout)
        self.use_rslora = bool(use_rslora)
        self.scaling = self.lora_alpha / (math.sqrt(r) if use_rslora else r)
        self.adapter_enabled = True
        self._unmerged: _Group | None = None
        like = torch.empty(0, device=self.weight.device, dtype=lora_dtype)
        self.lora_A = nn.Parameter(like.new_empty(r, in_features))
        self.lora_B = nn.Parameter(like.new_empty(out_features, r))
        self.reset_lora_parameters()

    def reset_lora_parameters(self) -> None:
        """Draws A anew and zeroes B; nothing on meta."""
        if self.lora_A.device.type != "meta":
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
            nn.init.zeros_(self.lora_B)

    def _materialize(self, device: torch.device) -> None:
        if device.type != "meta":
            for name in ("lora_A", "lora_B"):
                empty = torch.empty_like(getattr(self, name), device=device)
                setattr(self, name, nn.Parameter(empty))
            self.reset_lora_parameters()

    def forward(self, x: Tensor) -> Tensor:
        if self._unmerged is not None or not self.adapter_enabled:
            return self.linear(x)
        p: dict[str, Any] = self._parameters
        if self.training and self.lora_dropout > 0.0:
            dropped = F.dropout(x, self.lora_dropout)
            s = lora_projection(dropped, p["lora_A"], self.compute_dtype)
            return self.linear(x, None, p["lora_B"], s, self.scaling)
        return self.linear(x, p["lora_A"], p["lora_B"], None, self.scaling)

    def enable_adapter(self) -> None:
        """Puts the adapter back after :meth:`disable_adapter`."""
        self.adapter_enabled = True

    def disable_adapter(self) -> None:
        """Leaves the base layer alone in the forward pass; a merged adapter is unmerged first."""
        self.unmerge()
        self.adapter_enabled = False

    @property
    def merged(self) -> bool:
        """Whether the adapter is in the packed weight now."""
        return self._unmerged is not None

    def delta_weight(self) -> Tensor:
        """``s B A`` in fp32, ``[out_features, in_features]``."""
        return self.scaling * (self.lora_B.detach().float() @ self.lora_A.detach().float())

    @torch.no_grad()
    def merge(self) -> MergeReport:
        """Puts the adapter into the packed weight, *which rounds*, and says by how much.

        ``W + s B A`` is formed in fp32 from the exact dequantized ``W`` and quantized once. Small
        updates do not survive that: see :class:`MergeReport`. The packed weight of before is kept
        aside for :meth:`unmerge`, and other layers that share it keep it. A state dict saved while
        merged holds that unmerged weight, A and B.

        Raises:
            RuntimeError: it is merged already.
        """
        if self._unmerged is not None:
            raise RuntimeError("the adapter is merged already: unmerge() first")
        delta = self.delta_weight()
        exact = self.dequantize_weight(torch.float32).add_(delta)
        before, after = self._group(), self._fresh_group(exact)
        self._set_group(after)
        self._unmerged = before
        lost = self.dequantize_weight(torch.float32).sub_(exact)
        return MergeReport(lost.norm().item(), delta.norm().item(), exact.norm().item())

    def unmerge(self) -> None:
        """Puts back the packed weight of before :meth:`merge`, bit for bit; else does nothing."""
        if self._unmerged is not None:
            group, device = self._unmerged, self.weight.device
            self._unmerged = None
            self._set_group(group)
            if self.weight.device != device:  # the layer was moved while it was merged
                self.to(device)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        merged, unmerged = self._group(), self._unmerged
        try:
            if unmerged is not None:
                self._set_group(unmerged)
            super()._save_to_state_dict(destination, prefix, keep_vars)
        finally:
            self._set_group(merged)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unmerge()
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        rs = ", use_rslora=True" if self.use_rslora else ""
        return (
            f"{super().extra_repr()}, r={self.r}, lora_alpha={self.lora_alpha:g}, "
            f"lora_dropout={self.lora_dropout:g}{rs}"
        )


def mark_only_lora_as_trainable(model: nn.Module) -> list[str]:
    """Freezes every parameter but A and B of :class:`LoraLinear4bit`; returns their names."""
    trained = []
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(prefix=name, recurse=False):
            lora = isinstance(module, LoraLinear4bit) and key.endswith(("lora_A", "lora_B"))
            if parameter.is_floating_point():
                parameter.requires_grad_(lora)
            if lora:
                trained.append(key)
    return trained


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """A and B of every :class:`LoraLinear4bit` in ``model``, by their names in its state dict."""
    return {
        f"{name}.{key}" if name else key: getattr(module, key).detach()
        for name, module in model.named_modules()
        if isinstance(module, LoraLinear4bit)
        for key in ("lora_A", "lora_B")
    }
