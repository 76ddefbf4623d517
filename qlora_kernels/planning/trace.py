"""What comes and goes within a training step, found by running one on tensors without data.

Forward, loss, backward and optimizer step run on fake tensors, which have shapes and lifetimes,
through the same modules and ops as the real step; a dispatch mode adds up the storages that are
alive. The peaks of five stretches of the step are kept apart, because each grows with the model's
depth at a pace of its own (:meth:`StepTrace.extended`):

==========  ==========================================  ========================================
stretch     what it is                                  what grows
==========  ==========================================  ========================================
forward     until the loss is there                     what layers keep for the backward pass
loss        the fused loss (its own buffers, which no   the same
            trace sees, are not in it)
last layer  backward, until the gradients of the last   the same
            decoder layer are there
first       backward, that of the first layer           gradients
layer
update      the optimizer's step                        gradients, and what the optimizer adds
==========  ==========================================  ========================================

Between last and first layer memory goes linearly from the one to the other, so the peak is at an
end.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .allocator import CachingAllocator

__all__ = ["LAYER", "STRETCHES", "StepShape", "StepTrace", "trace_step"]

STRETCHES = {
    "forward": "in the forward pass",
    "loss": "while the loss is computed",
    "last layer": "in the backward pass, at the last layer",
    "first layer": "in the backward pass, at the first layer",
    "update": "in the optimizer's step",
}
"""The stretches of a step, in their order, and how they are told."""


@dataclass(frozen=True)
class StepShape:
    """One forward and backward pass: what its memory depends on besides the model."""

    batch: int
    """Rows."""
    length: int
    """Tokens of the longest row."""
    packed: bool = False
    """Whether rows hold several samples, told apart by their positions."""

    @property
    def tokens(self) -> int:
        return self.batch * self.length


@dataclass(frozen=True)
class StepTrace:
    """Bytes of a step beyond what is held throughout (weights, adapters).

    ``peaks`` by stretch; of the optimizer's states, only ``update`` holds them (they are made
    there). ``reserved`` is the same as torch's allocator on a GPU would have it, of the whole step.
    """

    peaks: dict[str, int]
    saved: int  # alive between forward and backward, gradients of earlier micro-batches aside
    gradients: int  # alive after the backward pass
    states: int  # of the optimizer
    reserved: int
    accumulated: bool = False

    @property
    def peak(self) -> int:
        return max(self.peaks.values())

    def extended(self, shallower: StepTrace, times: int) -> StepTrace:
        """With ``times`` more layers, each as the last one, by which ``shallower`` has fewer."""

        def more(name: str) -> int:
            value: int = getattr(self, name)
            return value + times * (value - getattr(shallower, name))

        return StepTrace(
            {n: peak + times * (peak - shallower.peaks[n]) for n, peak in self.peaks.items()},
            more("saved"),
            more("gradients"),
            more("states"),
            more("reserved"),
            self.accumulated,
        )


class _Live(TorchDispatchMode):
    """Adds up the storages that ops make while it is on, as long as anybody holds them."""

    def __init__(self, known: Any, inside: Callable[[Any, Any], int] | None = None) -> None:
        super().__init__()
        self._inside = inside
        self.live = self.peak = self.at_loss = 0
        self.device = CachingAllocator()
        self._seen: Any = weakref.WeakKeyDictionary()
        for tensor in known:
            self._seen[tensor.untyped_storage()] = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        self._add(out)
        if self._inside is not None:
            self.peak = max(self.peak, self.live + self._inside(func, args))
        if func is torch.ops.qlora_kernels.linear_cross_entropy.default:
            self.at_loss = max(self.at_loss, self.live)
        return out

    def _add(self, out: Any) -> None:
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage not in self._seen:
                    size = storage.nbytes()
                    self._seen[storage] = True
                    self.live += size
                    weakref.finalize(storage, self._freed, size, self.device.allocate(size))
                    self.peak = max(self.peak, self.live)

    def _freed(self, size: int, block: Any) -> None:
        self.live -= size
        self.device.free(block)

    def stretch(self) -> int:
        """The peak since the last call."""
        peak, self.peak = self.peak, self.live
        return peak


LAYER = re.compile(r"\.(?:layers|h|blocks|layer)\.(\d+)\.")
"""A decoder layer's number in the name of what is inside of it."""


def _when_layer_is_done(model: nn.Module, call: Callable[[int, int], None]) -> list[Any]:
    """Has ``call(layer, layers)`` called when all gradients of a decoder layer are there; the
    hooks."""
    by_layer: dict[int, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        found = LAYER.search(name)
        if found and parameter.requires_grad:
            by_layer.setdefault(int(found[1]), []).append(parameter)
    hooks = []
    for layer, parameters in by_layer.items():
        waiting = {id(p) for p in parameters}

        def arrived(
            parameter: Tensor,
            layer: int = layer,
            waiting: set[int] = waiting,
            all_: Any = parameters,
        ) -> None:
            waiting.discard(id(parameter))
            if not waiting:
                call(layer, max(by_layer) + 1)
                waiting.update(id(p) for p in all_)  # for the next micro-batch

        hooks += [p.register_post_accumulate_grad_hook(arrived) for p in parameters]
    return hooks


def traceable(cls: Any) -> Any:
    """The optimizer's class without what fake tensors cannot do: this package's looks a code up to
    begin 8-bit states with, and may keep them in a file. Shapes and dtypes stay its own."""
    from torch.utils._python_dispatch import _disable_current_modes

    from ..optim import AdamW

    if not (isinstance(cls, type) and issubclass(cls, AdamW)):
        return cls

    def start(self: Any, p: Tensor, group: dict[str, Any] | None = None) -> dict[str, Any]:
        with _disable_current_modes():
            states = cls._start(self, torch.empty(p.shape, dtype=p.dtype, device="meta"), group)
        return {
            name: torch.zeros(s.shape, dtype=s.dtype, device=p.device)
            if isinstance(s, Tensor)
            else s
            for name, s in states.items()
        }

    return type(cls.__name__, (cls,), {"paged": False, "_start": start})


@contextmanager
def _no_row_is_packed(sure: bool) -> Iterator[None]:
    """transformers asks the values of positions whether a row is packed, and takes fake tensors,
    which have none, for packed ones: a mask for every layer. Where we are sure, it is told."""
    from transformers import masking_utils

    name = "find_packed_sequence_indices"
    before = getattr(masking_utils, name, None)
    if not sure or before is None:
        yield
        return
    setattr(masking_utils, name, lambda position_ids: None)
    try:
        yield
    finally:
        setattr(masking_utils, name, before)


def trace_step(
    model: Any,
    shape: StepShape,
    checkpointing: bool,
    accumulated: bool,
    optimizer: tuple[Any, dict[str, Any]],
    fused: bool,
    inside: Callable[[Any, Any], int] | None = None,
) -> StepTrace:
    """One optimizer step of ``model`` (on meta, spent afterwards) on fake tensors.

    ``inside(op, arguments)`` says how many bytes an op allocates for itself while it runs.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    from ..activations import fuse, recompute
    from ..loss import install

    if checkpointing:
        model.activation_checkpointing_enable()
        model.enable_input_require_grads()
    install(model)
    if fused:
        fuse(model)
    model.train()
    peaks = dict.fromkeys(STRETCHES, 0)
    alone = shape.batch == 1 and not shape.packed
    with FakeTensorMode(allow_non_fake_inputs=True), _no_row_is_packed(alone):
        model.to_empty(device="cpu")
        getattr(model, "tie_weights", lambda: None)()
        trained = [p for p in model.parameters() if p.requires_grad]
        ids = torch.zeros(shape.batch, shape.length, dtype=torch.long)
        batch: dict[str, Any] = {"input_ids": ids, "labels": ids.clone(), "use_cache": False}
        if shape.packed:
            batch["position_ids"] = ids.clone()
        elif shape.batch > 1:  # rows are padded to the longest; a row alone needs no mask
            batch["attention_mask"] = torch.ones_like(ids)
        inputs = [t for t in batch.values() if isinstance(t, Tensor)]
        with _Live([*model.parameters(), *model.buffers(), *inputs], inside) as live:

            def note(stretch: str) -> None:
                peaks[stretch] = max(peaks[stretch], live.stretch())

            def layer_done(layer: int, layers: int) -> None:
                if layer == layers - 1:
                    note("last layer")
                elif layer == 1:
                    live.stretch()  # of the layers in between, on the line from end to end

            hooks = _when_layer_is_done(model, layer_done)
            for _ in range(2 if accumulated else 1):
                before = live.live
                with nullcontext() if checkpointing else recompute():
                    loss = model(**batch).loss
                saved = live.live - before
                note("forward")
                loss.backward()
                note("first layer")
                del loss
            for hook in hooks:
                hook.remove()
            gradients = live.live
            cls, kwargs = optimizer
            stepper = traceable(cls)(trained, **kwargs)
            stepper.step()
            states = live.live - gradients
            note("update")
            reserved = live.device.peak_reserved
            peaks["loss"] = live.at_loss
            del stepper
    return StepTrace(peaks, saved, gradients, states, reserved, accumulated)
