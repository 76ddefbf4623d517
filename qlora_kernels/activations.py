"""What lies between a block's linear layers, in one pass each: RMSNorm and SwiGLU.

    rms_norm(x, weight, eps)   y = round(weight * round(x * rsqrt(mean(x^2) + eps)))
    swiglu(gate, up)           y = round(round(gate * sigmoid(gate)) * up)

fp32 inside, rounded to the element type where the chains of transformers (``LlamaRMSNorm``,
``LlamaMLP``) round, so that a fused model's forward agrees with the plain one to the order of the
sums. Backward keeps only the inputs (and one fp32 a row); the chains keep every intermediate.

Most of a finetune's memory is what autograd saves: for a LLaMA block of hidden size h and
intermediate size i, 12 h + 4 i numbers a token. :func:`fuse` brings that to 6 h + 2 i: fused ops
save half, and :func:`recompute` has autograd save, in place of an op's result that the next
projection keeps for the gradient of its adapter, how to compute it again: one cheap pass.

CPU kernels: ``csrc/cpu/activations.cpp``. Any other device computes the same in plain torch.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from . import ops

__all__ = ["FusedLayers", "fuse", "recompute", "rms_norm", "swiglu"]

_LIB = torch.library.Library(ops.NAMESPACE, "FRAGMENT")
_LIB.define("rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)")
_LIB.define("rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor rstd) -> Tensor")
_LIB.define("swiglu(Tensor gate, Tensor up) -> Tensor")
_LIB.define("swiglu_backward(Tensor dy, Tensor gate, Tensor up) -> (Tensor, Tensor)")


# --- plain torch: any device, and the meaning ---------------------------------------------------


def _plain_rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = x.float()
    rstd = torch.rsqrt(wide.pow(2).mean(-1) + eps)
    return weight * (wide * rstd[..., None]).to(x.dtype), rstd.reshape(-1)


def _plain_rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    rstd = rstd.view(*x.shape[:-1], 1)
    h, g = x.float() * rstd, dy.float() * weight.float()
    return (rstd * (g - h * (g * h).mean(-1, keepdim=True))).to(x.dtype)


def _plain_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return torch.nn.functional.silu(gate) * up


def _plain_swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    d, g, u = dy.float(), gate.float(), up.float()
    s = torch.sigmoid(g)
    return (d * u * s * (1 + g * (1 - s))).to(gate.dtype), (d * g * s).to(up.dtype)


for _name, _fn in (
    ("rms_norm", _plain_rms_norm),
    ("rms_norm_backward", _plain_rms_norm_backward),
    ("swiglu", _plain_swiglu),
    ("swiglu_backward", _plain_swiglu_backward),
):
    _LIB.impl(_name, _fn, "CompositeExplicitAutograd")

torch.library.register_fake(f"{ops.NAMESPACE}::rms_norm")(
    lambda x, weight, eps: (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        x.new_empty([x.numel() // x.shape[-1]], dtype=torch.float32),
    )
)
torch.library.register_fake(f"{ops.NAMESPACE}::rms_norm_backward")(
    lambda dy, x, weight, rstd: torch.empty_like(x, memory_format=torch.contiguous_format)
)
torch.library.register_fake(f"{ops.NAMESPACE}::swiglu")(
    lambda gate, up: torch.empty_like(gate, memory_format=torch.contiguous_format)
)
torch.library.register_fake(f"{ops.NAMESPACE}::swiglu_backward")(
    lambda dy, gate, up: (
        torch.empty_like(gate, memory_format=torch.contiguous_format),
        torch.empty_like(up, memory_format=torch.contiguous_format),
    )
)


def _save_norm(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.set_materialize_grads(False)


def _norm_backward(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return None, None, None
    x, weight, rstd = ctx.saved_tensors
    dx = dweight = None
    if ctx.needs_input_grad[0]:
        dx = torch.ops.qlora_kernels.rms_norm_backward(dy, x, weight, rstd)
    if ctx.needs_input_grad[1]:  # seldom trained: plain torch will do
        h = (x.float() * rstd.view(*x.shape[:-1], 1)).to(x.dtype)
        dweight = (dy.float() * h.float()).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
    return dx, dweight, None


def _save_swiglu(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _swiglu_backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
    dgate, dup = torch.ops.qlora_kernels.swiglu_backward(dy, *ctx.saved_tensors)
    return dgate, dup


torch.library.register_autograd(
    f"{ops.NAMESPACE}::rms_norm", _norm_backward, setup_context=_save_norm
)
torch.library.register_autograd(
    f"{ops.NAMESPACE}::swiglu", _swiglu_backward, setup_context=_save_swiglu
)


def _check(what: str, a: Tensor, b: Tensor, same_shape: bool) -> None:
    ops.check_float(what, a)
    if a.dtype != b.dtype or a.device != b.device or (same_shape and a.shape != b.shape):
        raise ValueError(
            f"{what} is {a.dtype} {list(a.shape)} on {a.device}, but what goes with it is "
            f"{b.dtype} {list(b.shape)} on {b.device}"
        )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square normalization over the last dimension (arXiv 1910.07467), fused.

    Args:
        x: ``[..., k]`` fp32, bf16 or fp16.
        weight: ``[k]`` in x's dtype.
        eps: added to the mean square.

    Raises:
        ValueError: shapes, dtypes or devices that do not go together.
        TypeError: another dtype.
    """
    _check("x", x, weight, same_shape=False)
    if weight.dim() != 1 or x.dim() == 0 or x.shape[-1] != weight.numel():
        raise ValueError(
            f"weight must be [k], k the last dimension of x {list(x.shape)}, got "
            f"{list(weight.shape)}"
        )
    y = torch.ops.qlora_kernels.rms_norm(x, weight, eps)[0]
    if _RECOMPUTED is not None:
        kept, w = x.detach(), weight.detach()
        _RECOMPUTED.offer(y, lambda: torch.ops.qlora_kernels.rms_norm(kept, w, eps)[0])
    return y


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up`` (arXiv 2002.05202), fused; both of one shape, fp32, bf16 or fp16.

    Raises:
        ValueError: shapes, dtypes or devices that do not go together.
        TypeError: another dtype.
    """
    _check("gate", gate, up, same_shape=True)
    y = torch.ops.qlora_kernels.swiglu(gate, up)
    if _RECOMPUTED is not None:
        g, u = gate.detach(), up.detach()
        _RECOMPUTED.offer(y, lambda: torch.ops.qlora_kernels.swiglu(g, u))
    return y


# --- results that are computed again instead of kept --------------------------------------------


class _Recipe:
    """Stands for a saved tensor; what several backward nodes need is computed for the first of
    them and kept until the last has had it."""

    def __init__(self, compute: Callable[[], Tensor]) -> None:
        self._compute = compute
        self._value: Tensor | None = None
        self.users = 0

    def take(self) -> Tensor:
        value = self._compute() if self._value is None else self._value
        self.users -= 1
        self._value = value if self.users > 0 else None
        return value


class _Recomputed:
    """Which live tensors can be computed again, by the storage that they are all of."""

    def __init__(self) -> None:
        self._offers: dict[int, tuple[weakref.ref[Tensor], int, _Recipe]] = {}

    def offer(self, y: Tensor, compute: Callable[[], Tensor]) -> None:
        if torch.is_grad_enabled():  # y may need no gradient, and an adapter still keep it
            self._offers[y.untyped_storage()._cdata] = (
                weakref.ref(y),
                y._version,
                _Recipe(compute),
            )

    def pack(self, t: Tensor) -> Any:
        found = self._offers.get(t.untyped_storage()._cdata)
        if found is None:
            return t
        reference, version, recipe = found
        y = reference()
        # Alive, so the storage is still its own; unchanged; and t is all of it, in order.
        if y is None or y._version != version:
            return t
        if t.numel() != y.numel() or t.dtype != y.dtype or not t.is_contiguous():
            return t
        recipe.users += 1
        return recipe, t.shape

    @staticmethod
    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        recipe, shape = packed
        return recipe.take().view(shape)


_RECOMPUTED: _Recomputed | None = None


@contextmanager
def recompute() -> Iterator[None]:
    """Within it, autograd does not keep the results of :func:`rms_norm` and :func:`swiglu` for
    others' backward passes, but computes them again: the same bits, a pass over memory more.

    The forward pass of a training step belongs inside. Not together with activation checkpointing,
    which keeps less still; there this does nothing.
    """
    global _RECOMPUTED
    before, _RECOMPUTED = _RECOMPUTED, _Recomputed()
    try:
        with torch.autograd.graph.saved_tensors_hooks(_RECOMPUTED.pack, _RECOMPUTED.unpack):
            yield
    finally:
        _RECOMPUTED = before


# --- in the place of a model's own layers -------------------------------------------------------


@dataclass
class FusedLayers:
    """What :func:`fuse` did; :meth:`undo` takes it back."""

    norms: int = 0
    mlps: int = 0
    _touched: list[nn.Module] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        for module in self._touched:
            module.__dict__.pop("forward", None)
        self._touched.clear()


def _norm_forward(self: Any, hidden_states: Tensor) -> Tensor:
    weight = self.weight
    if hidden_states.dtype != weight.dtype or weight.device != hidden_states.device:
        return type(self).forward(self, hidden_states)
    return rms_norm(hidden_states, weight, self.variance_epsilon)


def _mlp_forward(self: Any, x: Tensor) -> Tensor:
    gate, up = self.gate_proj(x), self.up_proj(x)
    return self.down_proj(swiglu(gate, up))


def _agrees(module: nn.Module, forward: Callable[..., Tensor], small: dict[str, Any]) -> bool:
    """Whether ``forward`` gives the values of a module's own, asked of the module and not of its
    name: of a shallow copy of it, with small random layers in the place of its own."""
    probe = copy.copy(module)
    probe._modules = {**module._modules, **small.get("modules", {})}
    probe._parameters = {**module._parameters, **small.get("parameters", {})}
    x = torch.randn(5, _SMALL, generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():
            want, got = type(module).forward(probe, x), forward(probe, x)  # type: ignore[arg-type]
        return got.shape == want.shape and torch.allclose(got, want, rtol=1e-4, atol=1e-5)
    except Exception:
        return False  # not a layer of this kind


_SMALL = 24  # features of the probes, not a multiple of what kernels like


def _norm_agrees(module: nn.Module) -> bool:
    weight = torch.randn(_SMALL, generator=torch.Generator().manual_seed(1))
    return _agrees(
        module, _norm_forward, {"parameters": {"weight": nn.Parameter(weight, requires_grad=False)}}
    )


def _mlp_agrees(module: nn.Module) -> bool:
    def linear(i: int, o: int, seed: int) -> nn.Linear:
        layer = nn.Linear(i, o, bias=False)
        layer.weight.data = (
            torch.randn(o, i, generator=torch.Generator().manual_seed(seed)) / i**0.5
        )
        return layer

    with torch.device("cpu"):
        layers = {
            "gate_proj": linear(_SMALL, 40, 1),
            "up_proj": linear(_SMALL, 40, 2),
            "down_proj": linear(40, _SMALL, 3),
        }
    return _agrees(module, _mlp_forward, {"modules": layers})


def fuse(model: nn.Module) -> FusedLayers:
    """Put :func:`rms_norm` and :func:`swiglu` in the place of a model's own.

    A module is taken if it is of the kind by its attributes (``weight`` and ``variance_epsilon``;
    ``gate_proj``, ``up_proj``, ``down_proj``) and if, asked with random input, its own forward
    gives the same values (a copy of it with small random weights is): a norm that adds one to its
    weight, or an MLP with another activation, is left as it is. Parameters, names and state dicts
    stay; only ``forward`` is replaced, in the instance.
    """
    done = FusedLayers()
    for module in model.modules():
        if "forward" in module.__dict__:  # somebody's hook or patch: theirs
            continue
        children = dict(module.named_children())
        weight = getattr(module, "weight", None)
        forward: Callable[..., Tensor] | None = None
        if {"gate_proj", "up_proj", "down_proj"} <= children.keys():
            if _mlp_agrees(module):
                forward, done.mlps = _mlp_forward, done.mlps + 1
        elif not children and hasattr(module, "variance_epsilon") and isinstance(weight, Tensor):
            if weight.dim() == 1 and _norm_agrees(module):
                forward, done.norms = _norm_forward, done.norms + 1
        if forward is not None:
            module.forward = MethodType(forward, module)  # type: ignore[method-assign]
            done._touched.append(module)
    return done
