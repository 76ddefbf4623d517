"""The fused cross entropy in the place of a transformers model's own loss, and of TRL's."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import sys
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kernels.loss.cross_entropy import _calls, _reduce, _reduced, head_cross_entropy

__all__ = ["LossHandle", "install", "uninstall"]


class _Logits:
    """Stands for the logits inside a model's forward until something asks for their values.

    What models do to their logits before the loss (a factor, a soft cap, a cast) is recorded,
    ``z = a * tanh(b * x)`` or ``z = b * x`` with x the output layer's own product, and handed to
    the loss. Anything else computes the logits after all, by the model's own layer, and goes on
    with them: slower, never wrong.
    """

    def __init__(
        self,
        hidden: Tensor,
        head: Any,
        call: Callable[[Tensor], Tensor],
        per_token: dict[str, Tensor] | None = None,
    ):
        self.hidden, self.head, self.call = hidden, head, call
        self.per_token = per_token  # where the loss leaves its figures, if they are wanted
        self.inner = 1.0  # b
        self.outer: float | None = None  # a
        self._values: Tensor | None = None
        self.asked = ""  # the first thing that needed the values

    # What keeps them deferred.

    def _scaled(self, factor: float) -> _Logits:
        new = _Logits(self.hidden, self.head, self.call, self.per_token)
        new.inner, new.outer = self.inner, self.outer
        if new.outer is None:
            new.inner *= factor
        else:
            new.outer *= factor
        return new

    def __mul__(self, other: Any) -> Any:
        if self._values is None and isinstance(other, (int, float)) and other:
            return self._scaled(float(other))
        return self.values("*") * other

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        if self._values is None and isinstance(other, (int, float)) and other:
            return self._scaled(1.0 / float(other))
        return self.values("/") / other

    def tanh(self) -> Any:
        if self._values is not None or self.outer is not None:
            return self.values("tanh").tanh()
        new = self._scaled(1.0)
        new.outer = 1.0
        return new

    def float(self) -> Any:
        return self if self._values is None else self._values.float()

    def contiguous(self) -> Any:
        return self if self._values is None else self._values.contiguous()

    def to(self, *args: Any, **kwargs: Any) -> Any:
        wanted = [*args, *kwargs.values()]
        same = (torch.float32, torch.float64, self.hidden.device, str(self.hidden.device))
        if self._values is None and all(w in same for w in wanted):
            return self
        return self.values("to").to(*args, **kwargs)

    @property
    def shape(self) -> torch.Size:
        return torch.Size([*self.hidden.shape[:-1], self.head.weight.shape[0]])

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def dtype(self) -> torch.dtype:
        return self.hidden.dtype

    # What does not.

    def values(self, asked: str) -> Tensor:
        """The logits."""
        if self._values is None:
            self.asked = asked
            z = self.call(self.hidden)
            z = z if self.inner == 1.0 else z * self.inner
            self._values = z if self.outer is None else torch.tanh(z) * self.outer
        return self._values

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copy, pickle and the like ask for what is not there
            raise AttributeError(name)
        return getattr(self.values(name), name)

    def __getitem__(self, index: Any) -> Any:
        return self.values("[]")[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        self.values("[]")[index] = value

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in (torch.tanh, torch.Tensor.tanh) and not kwargs:
            return args[0].tanh()
        name = getattr(func, "__name__", str(func))

        def resolve(x: Any) -> Any:
            if isinstance(x, _Logits):
                return x.values(name)
            if isinstance(x, (list, tuple)):
                return type(x)(resolve(v) for v in x)
            return x

        return func(*resolve(args), **{k: resolve(v) for k, v in (kwargs or {}).items()})


def _through_values(name: str) -> Callable[..., Any]:
    def method(self: _Logits, *args: Any) -> Any:
        return getattr(self.values(name), name)(*args)

    return method


for _name in (
    "add radd sub rsub rtruediv pow matmul neg eq ne lt le gt ge iadd isub imul itruediv len iter"
).split():
    setattr(_Logits, f"__{_name}__", _through_values(f"__{_name}__"))
_Logits.__hash__ = object.__hash__  # type: ignore[method-assign]


_numbers = itertools.count(1)


@dataclass
class LossHandle:
    """What :func:`install` leaves on a model: its settings, and proof that the loss is ours."""

    eval_logits: bool = False
    chunk_tokens: int | None = None
    chunk_vocab: int | None = None
    fallbacks: int = 0
    """Losses that were left to the model (or to TRL)."""
    reason: str = ""
    """Why, the first time."""
    _number: int = field(default_factory=lambda: next(_numbers))
    _enabled: bool = True
    _own_forward: Callable[..., Any] | None = None  # what ours calls
    _own_loss: Callable[..., Tensor] | None = None
    _trl_forward: Callable[..., Any] | None = None  # what TRL put on the model, if it did
    _heads: list[nn.Module] = field(default_factory=list)  # the output layers that we patched
    # During one forward: the layer that defers, what it gave, where per-token figures go.
    _deferring: nn.Module | None = None
    _logits: _Logits | None = None
    _per_token: dict[str, Tensor] | None = None

    @property
    def calls(self) -> int:
        """Losses that were computed here, from the hidden states."""
        return _calls[self._number]

    def _leave(self, model: nn.Module, reason: str, whose: str = "its own loss") -> None:
        """Notes that a loss is left to somebody else, and says so once."""
        self.fallbacks += 1
        if not self.reason:
            self.reason = reason
            warnings.warn(
                f"{type(model).__name__}: {reason}, so {whose} is used in place of the fused one",
                stacklevel=4,
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> LossHandle:
        new = LossHandle(self.eval_logits, self.chunk_tokens, self.chunk_vocab)
        memo[id(self)] = new
        # Methods bound to the old model, and its modules: those of the new one.
        for name in ("_own_forward", "_own_loss", "_trl_forward", "_heads"):
            setattr(new, name, copy.deepcopy(getattr(self, name), memo))
        return new


def _is_plain(head: nn.Module) -> bool:
    """Whether the layer is nothing but ``x @ weight.T + bias``."""
    return (
        type(head) is nn.Linear
        and head.weight.is_floating_point()
        and not hasattr(head, "_hf_hook")  # accelerate's, which moves weights and inputs
        and not head._forward_pre_hooks
    )


def _loss(
    handle: LossHandle,
    logits: Any,
    labels: Tensor | None,
    vocab_size: int | None = None,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """In the place of transformers' ``ForCausalLMLoss``: the same, from deferred logits."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    if isinstance(logits, _Logits):
        if handle._own_loss is not ForCausalLMLoss:
            logits.values(getattr(handle._own_loss, "__name__", "its loss function"))
        elif _MEAN in (logits.per_token or ()) and logits.outer is not None:
            logits.values("their mean, and they are capped")
        elif vocab_size not in (None, logits.shape[-1]):
            logits.values("view")
    if not isinstance(logits, _Logits) or logits._values is not None:
        assert handle._own_loss is not None
        return handle._own_loss(
            logits._values if isinstance(logits, _Logits) else logits, labels, vocab_size,
            num_items_in_batch=num_items_in_batch, ignore_index=ignore_index,
            shift_labels=shift_labels, **kwargs,
        )  # fmt: skip
    if shift_labels is None:
        assert labels is not None
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    shift_labels = shift_labels.to(logits.hidden.device)
    scale, softcap = logits.inner, logits.outer
    if softcap is not None:  # a * tanh(b * x) = a * tanh((a * b) * x / a)
        scale *= softcap
    if not _is_plain(logits.head):
        if not torch.compiler.is_compiling():
            _calls[handle._number] += 1
        return head_cross_entropy(
            logits.hidden, logits.call, shift_labels, ignore_index=ignore_index,
            num_items=num_items_in_batch, softcap=softcap, logit_scale=scale,
            chunk_tokens=handle.chunk_tokens,
        )  # fmt: skip
    per_token = logits.per_token is not None
    loss, margin, entropy = _reduced(
        logits.hidden, logits.head.weight, shift_labels, logits.head.bias, ignore_index,
        "none" if per_token else "mean", num_items_in_batch, softcap, scale,
        handle.chunk_tokens, handle.chunk_vocab, per_token, handle._number,
    )  # fmt: skip
    if logits.per_token is None:
        return loss
    if _MEAN in logits.per_token:
        logits.per_token[_MEAN] = _mean_of(logits)
    logits.per_token.update(loss=loss, margin=margin, entropy=entropy, labels=shift_labels)
    return _reduce(loss, shift_labels, ignore_index, "mean", num_items_in_batch)


_MEAN = "mean_logits"


@torch.no_grad()
def _mean_of(logits: _Logits) -> Tensor:
    """The mean of each token's logits, fp32 ``[batch, tokens]``: the product with the mean word."""
    head = logits.head
    mean = logits.hidden.float() @ head.weight.mean(0, dtype=torch.float32)
    if head.bias is not None:
        mean += head.bias.float().mean()
    return mean * logits.inner


def _settled(value: Any) -> Any:
    """Deferred logits to their values, or to None if nobody has asked for them."""
    return value._values if isinstance(value, _Logits) else value


def _without_deferred(output: Any) -> Any:
    if isinstance(output, dict):  # a ModelOutput
        return type(output)(**{key: _settled(value) for key, value in output.items()})
    if isinstance(output, tuple):
        return tuple(_settled(v) for v in output if v is None or _settled(v) is not None)
    return output


def _head_forward(
    handle: LossHandle, head: nn.Module, call: Callable[..., Tensor], hidden: Tensor, *args: Any
) -> Any:
    if handle._deferring is not head or args:
        return call(hidden, *args)
    handle._logits = _Logits(hidden, head, call, handle._per_token)
    return handle._logits


def _put_head(handle: LossHandle, head: nn.Module) -> None:
    head.forward = functools.partial(_head_forward, handle, head, head.forward)
    handle._heads.append(head)


def _run(
    model: Any, handle: LossHandle, args: tuple, kwargs: dict, per_token: dict | None = None
) -> tuple[Any, str]:
    """The model's own forward with deferred logits; why they were not deferred, if so."""
    own = handle._own_forward
    assert own is not None
    head = model.get_output_embeddings()
    if head is None or head._forward_hooks or not hasattr(head, "weight"):
        why = "no output layer was found" if head is None else "its output layer has hooks"
        return own(*args, **kwargs), why
    if all(head is not known for known in handle._heads):  # replaced since, by PEFT for one
        _put_head(handle, head)
    handle._deferring, handle._logits, handle._per_token = head, None, per_token
    try:
        output = own(*args, **kwargs)
        logits = handle._logits
    finally:
        handle._deferring = handle._logits = handle._per_token = None
    if logits is None:
        return output, "its output layer is not called as others' are"
    return _without_deferred(output), f"it uses its logits ({logits.asked})" if logits.asked else ""


def _forward(model: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
    handle: LossHandle = model._qlora_loss
    assert handle._own_forward is not None
    if fused_lm_head and not handle._enabled:
        assert handle._trl_forward is not None
        return handle._trl_forward(*args, fused_lm_head=True, **kwargs)
    if fused_lm_head:
        return _forward_for_trl(model, handle, args, kwargs)
    if (
        not handle._enabled
        or (kwargs.get("labels") is None and kwargs.get("shift_labels") is None)
        or not isinstance(kwargs.get("logits_to_keep", 0), int)
        or kwargs.get("logits_to_keep", 0) != 0
        or (handle.eval_logits and not model.training)
    ):
        return handle._own_forward(*args, **kwargs)
    output, why = _run(model, handle, args, kwargs)
    if why:
        handle._leave(model, why)
    return output


def _forward_for_trl(model: Any, handle: LossHandle, args: tuple, kwargs: dict) -> Any:
    """What TRL's trainers ask of their models: per-token figures in place of logits."""
    trl = handle._trl_forward
    assert trl is not None
    settings = inspect.getclosurevars(trl.__func__).nonlocals  # type: ignore[attr-defined]
    head = model.get_output_embeddings()
    asked = set(settings.get("outputs", ()))
    if (
        settings.get("temperature", 1.0) != 1.0
        or settings.get("cast_lm_head_to_fp32", False)
        or not asked <= {"log_probs", "entropy", "is_top1", _MEAN}
        or not _is_plain(head)
        or (torch.is_grad_enabled() and any(p.requires_grad for p in head.parameters()))
    ):
        why = "TRL asks for more than losses, or trains the output layer"
        handle._leave(model, why, "TRL's own loss")
        return trl(*args, fused_lm_head=True, **kwargs)
    found: dict[str, Any] = {_MEAN: None} if _MEAN in asked else {}
    output, why = _run(model, handle, args, {**kwargs, "use_cache": False}, found)
    if "loss" not in found:
        why = why or "TRL asks for the mean of logits that are capped"
        handle._leave(model, why, "TRL's own loss")
        return trl(*args, fused_lm_head=True, **kwargs)
    from trl.trainer.utils import FusedCausalLMOutput

    # TRL's figures have no place for the last token, which predicts nothing.
    end = None if kwargs.get("shift_labels") is not None else -1
    at = (slice(None), slice(None, end))
    mask = found["labels"][at] != -100
    return FusedCausalLMOutput(
        loss=output.loss,
        log_probs=-found["loss"][at],
        entropy=found["entropy"][at],
        is_top1=(found["margin"][at] >= 0) & mask,
        mean_logits=found[_MEAN][at] * mask if _MEAN in asked else None,
        label_mask=mask,
        aux_loss=getattr(output, "aux_loss", None),
    )


def _is_trl(forward: Any) -> bool:
    function = getattr(forward, "__func__", forward)
    return getattr(function, "__code__", None) is not None and (
        function.__code__.co_name == "_fused_forward"
    )


def _put_forward(model: Any) -> None:
    @functools.wraps(type(model).forward)  # Trainer and generate() read the signature
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _forward(self, *args, **kwargs)

    forward._qlora_loss = True  # type: ignore[attr-defined]
    model.forward = types.MethodType(forward, model)


def _is_ours(forward: Any) -> bool:
    return getattr(getattr(forward, "__func__", None), "_qlora_loss", False)


def _follow_trl() -> None:
    """Makes a later ``SFTTrainer(model)`` leave our forward outermost."""
    module = sys.modules.get("trl.trainer.sft_trainer")
    add = getattr(module, "add_fused_lm_head", None)
    if module is None or add is None or hasattr(add, "_qlora_loss"):
        return

    @functools.wraps(add)
    def add_and_install(model: Any, *args: Any, **kwargs: Any) -> None:
        add(model, *args, **kwargs)
        if hasattr(model, "_qlora_loss"):
            install(model)

    add_and_install._qlora_loss = True  # type: ignore[attr-defined]
    module.add_fused_lm_head = add_and_install  # type: ignore[attr-defined]


def _bare(model: Any) -> Any:
    """The transformers model inside a Trainer, a PEFT model or a parallel wrapper."""
    from transformers import PreTrainedModel

    outer = model
    if not isinstance(model, nn.Module) and isinstance(getattr(model, "model", None), nn.Module):
        model = model.model
    while not isinstance(model, PreTrainedModel):
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif isinstance(getattr(model, "module", None), nn.Module):
            model = model.module
        else:
            raise TypeError(
                f"install() takes a transformers causal language model, bare, in PEFT's wrapping "
                f"or in a Trainer; {type(outer).__name__} holds none"
            )
    return model


def install(
    model: Any,
    *,
    eval_logits: bool = False,
    chunk_tokens: int | None = None,
    chunk_vocab: int | None = None,
) -> LossHandle:
    """Makes a causal language model compute its loss by :func:`linear_cross_entropy`.

    The model's own forward runs as before. Where it calls its output layer with labels given, it
    gets a stand-in for the logits that records what the model does to them (Gemma's soft cap,
    Cohere's and Granite's factor), and its loss function takes loss and gradient from the hidden
    states. So auxiliary losses, ``num_items_in_batch`` and ``shift_labels`` keep their meaning.
    ``outputs.logits`` is None then. Calls without labels (generation) are untouched. A model that
    does something else with its logits gets them, with one notice: ``handle.fallbacks``.

    Output layers that are more than one matrix (quantized, with LoRA, with hooks of accelerate)
    go through :func:`head_cross_entropy`.

    Args:
        model: a transformers model, before or after PEFT has wrapped it, or a ``Trainer``. For
            TRL's ``SFTTrainer``, whose own chunked loss goes past the model's forward, pass the
            trainer once it is made (or the model, after TRL was imported and before the trainer
            is made).
        eval_logits: in ``eval()`` mode leave the loss to the model, for ``compute_metrics`` that
            need logits.
        chunk_tokens, chunk_vocab: as for :func:`linear_cross_entropy`.

    Returns:
        A handle that counts: ``handle.calls`` rises with each loss that is computed here.

    Raises:
        TypeError: no transformers model in it.
    """
    model = _bare(model)
    handle = getattr(model, "_qlora_loss", None)
    if handle is None:
        handle = LossHandle(_own_forward=model.forward, _own_loss=model.loss_function)
        model._qlora_loss = handle
        _put_forward(model)
    model.loss_function = functools.partial(_loss, handle)
    handle._enabled, handle.eval_logits = True, eval_logits
    handle.chunk_tokens, handle.chunk_vocab = chunk_tokens, chunk_vocab
    for forward in (handle._own_forward, model.forward):
        if _is_trl(forward):
            handle._trl_forward = forward
    if _is_trl(model.forward):  # TRL came later: outermost again
        _put_forward(model)
    _follow_trl()
    return handle


def _restore(module: Any, forward: Any) -> None:
    """Gives a module ``forward`` back, which is its class's own or was put on it by somebody."""
    if getattr(forward, "__func__", None) is type(module).forward:
        del module.forward
    else:
        module.forward = forward


def uninstall(model: Any) -> None:
    """Gives a model its own loss back. Does nothing where :func:`install` was not called."""
    model = _bare(model)
    handle = getattr(model, "_qlora_loss", None)
    if handle is None:
        return
    handle._enabled = False
    for head in handle._heads:
        patched = vars(head).get("forward")
        if getattr(patched, "func", None) is _head_forward:
            _restore(head, patched.args[2])
    handle._heads.clear()
    model.loss_function = handle._own_loss
    if _is_ours(model.forward) and handle._trl_forward in (None, handle._own_forward):
        _restore(model, handle._own_forward)
        del model._qlora_loss
    # Else somebody wrapped our forward in theirs: it stays, and only passes through.
