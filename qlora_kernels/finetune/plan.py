"""How much memory a finetune will take, before any of it is taken.

Sizes of what is held throughout (packed weights, constants, other weights, adapters, gradients,
optimizer) are counted on a model without storage. What comes and goes within a step is *traced*,
not put in a formula: forward, loss, backward and optimizer step run on fake tensors, which have
shapes and lifetimes but no data, through the same modules and ops as the real step; a dispatch
mode adds up what is alive. Two traces with one and two decoder layers give both the part that
grows with depth and the part that does not. So every architecture that transformers has, gradient
checkpointing, packing and LoRA on whichever layers are predicted by the code that will run.

What a trace does not see is listed in :data:`MemoryPlan.parts` by name: the program itself (as it
is resident now) and the buffers inside the kernels.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..control_group import control_group_room
from ..nn import Linear4bit

__all__ = ["MemoryPlan", "StepShape", "available_memory", "plan_memory", "resident_memory"]


@dataclass(frozen=True)
class StepShape:
    """One forward and backward pass: what its memory depends on besides the model."""

    batch: int
    """Rows."""
    length: int
    """Tokens of the longest row."""
    packed: bool = False
    """Whether rows hold several samples, told apart by their positions."""


@dataclass
class MemoryPlan:
    """Bytes, predicted. ``parts`` add up to the peak of a training step."""

    parts: dict[str, int] = field(default_factory=dict)
    """What there is at the moment of the peak of a step."""
    phases: dict[str, int] = field(default_factory=dict)
    """The most that there is while loading, and in a training step."""
    limit: int | None = None
    """What this process may have; None where it is not known."""
    limit_from: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def peak(self) -> int:
        return max(self.phases.values(), default=0)

    @property
    def when(self) -> str:
        """The phase of the peak."""
        return max(self.phases, key=lambda name: self.phases[name], default="")

    @property
    def excess(self) -> int:
        """Bytes by which the peak exceeds the limit; 0 where it fits or no limit is known."""
        return 0 if self.limit is None else max(0, self.peak - self.limit)


# --- what the machine has -----------------------------------------------------------------------


def resident_memory() -> int:
    """Bytes of this process that are resident now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak_resident_memory() -> int:
    """The most bytes that were ever resident in this process.

    On Linux this is ``VmHWM``, which starts anew with each program; ``getrusage`` would report the
    parent's peak as well.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
        import sys

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    except ImportError:  # Windows
        import psutil

        return int(psutil.Process().memory_info().peak_wset)


def peak_memory(device: torch.device | str) -> int:
    """The most bytes that a run on this device ever held: of the GPU by torch's allocator, else
    :func:`peak_resident_memory`."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident_memory()


def available_memory(device: torch.device | str = "cpu") -> tuple[int | None, str]:
    """Bytes that this process may have in all, with what it has already, and who says so.

    On a CPU the least of what the system has left and of the limits of the control groups that the
    process is in (a container's limit is one), each plus what is resident now.
    """
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device), torch.cuda.get_device_name(device)
    import psutil

    found = [(psutil.virtual_memory().available, "the machine's free memory")]
    found += [(free, "the control group's limit") for free in control_group_room()]
    room, who = min(found)
    return room + resident_memory(), who


# --- what is held throughout --------------------------------------------------------------------


def _meta_model(
    config: Any, dtype: torch.dtype, quant: Mapping[str, Any] | None, lora: Any, attention: str
) -> Any:
    """The model that will be trained, on the meta device."""
    from accelerate import init_empty_weights
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    if quant is not None:
        output = model.get_output_embeddings()
        skip = quant.get("skip_modules")
        for name, module in list(model.named_modules()):
            dense = isinstance(module, nn.Linear) and not isinstance(module, Linear4bit)
            skipped = module is output if skip is None else any(s in name for s in skip)
            if dense and not skipped:
                new = Linear4bit(
                    module.in_features,
                    module.out_features,
                    module.bias is not None,
                    blocksize=quant.get("blocksize", 64),
                    compress_statistics=quant.get("double_quant", True),
                    quant_type=quant.get("quant_type", "nf4"),
                    device="meta",
                    dtype=dtype,
                )
                model.set_submodule(name, new)
    model.requires_grad_(False)
    if lora is None:
        return model
    lora = copy.deepcopy(lora)
    # Initialisations that decompose a weight would run on nothing; the shapes are the same.
    if isinstance(lora.init_lora_weights, str):
        lora.init_lora_weights = True
    with init_empty_weights(include_buffers=True), torch.device("meta"):
        return get_peft_model(model, lora)


def _bytes(tensors: Any) -> int:
    seen: dict[int, int] = {id(t): t.nbytes for t in tensors if t is not None}
    return sum(seen.values())


def _standing(model: nn.Module) -> dict[str, int]:
    """Bytes of weights and adapters, by part."""
    quantized = [m for m in model.modules() if isinstance(m, Linear4bit)]
    packed = {id(m.weight): m.weight for m in quantized}
    # The tables of 16 and 256 values are shared by all layers, and are nothing.
    scales = [s for m in quantized for s in (m.absmax, m.nested_absmax, m.nested_offset)]
    trained = [p for p in model.parameters() if p.requires_grad]
    rest = [p for p in model.parameters() if not p.requires_grad and id(p) not in packed]
    return {
        "packed 4-bit weights": _bytes(packed.values()),
        "their constants": _bytes(scales),
        "other weights": _bytes(rest),
        "trained parameters": _bytes(trained),
        "gradients": _bytes(trained),
    }


def _largest_weight(model: nn.Module) -> int:
    """Values of the largest single weight in the checkpoint."""
    sizes = [p.numel() for p in model.parameters() if p.dtype != torch.uint8]
    sizes += [m.in_features * m.out_features for m in model.modules() if isinstance(m, Linear4bit)]
    return max(sizes, default=0)


# --- what comes and goes ------------------------------------------------------------------------


class _Live(TorchDispatchMode):
    """Adds up the storages that ops make while it is on, as long as anybody holds them."""

    def __init__(self, known: Any) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: Any = weakref.WeakKeyDictionary()
        for tensor in known:
            self._seen[tensor.untyped_storage()] = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage not in self._seen:
                    size = storage.nbytes()
                    self._seen[storage] = True
                    self.live += size
                    weakref.finalize(storage, self._freed, size)
                    self.peak = max(self.peak, self.live)
        return out

    def _freed(self, size: int) -> None:
        self.live -= size


@dataclass
class _Trace:
    saved: int  # alive between forward and backward, gradients of earlier micro-batches aside
    peak: int  # the most that is alive in a step, gradients included
    states: int  # of the optimizer

    def extended(self, other: _Trace, times: int) -> _Trace:
        """``self`` and ``times`` times what it has more than ``other``."""
        return _Trace(
            *(
                a + times * (a - b)
                for a, b in (
                    (self.saved, other.saved),
                    (self.peak, other.peak),
                    (self.states, other.states),
                )
            )
        )


def _trace(
    model: Any,
    shape: StepShape,
    checkpointing: bool,
    accumulated: bool,
    optimizer: Any,
    fused: bool,
) -> _Trace:
    """One optimizer step of ``model`` (on meta, spent afterwards) on fake tensors."""
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
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        getattr(model, "tie_weights", lambda: None)()
        trained = [p for p in model.parameters() if p.requires_grad]
        ids = torch.zeros(shape.batch, shape.length, dtype=torch.long)
        batch: dict[str, Any] = {"input_ids": ids, "labels": ids.clone(), "use_cache": False}
        if shape.packed:
            batch["position_ids"] = ids.clone()
        else:
            batch["attention_mask"] = torch.ones_like(ids)
        inputs = [t for t in batch.values() if isinstance(t, Tensor)]
        with _Live([*model.parameters(), *model.buffers(), *inputs]) as live:
            for _ in range(2 if accumulated else 1):
                before = live.live
                with nullcontext() if checkpointing else recompute():
                    loss = model(**batch).loss
                saved = live.live - before
                loss.backward()
                del loss
            peak, held, states = live.peak, live.live, 0
            if optimizer is not None:
                cls, kwargs = optimizer
                stepper = cls(trained, **kwargs)
                stepper.step()
                states = live.live - held
                del stepper
    return _Trace(saved, peak, states)


def _with_layers(config: Any, count: int) -> Any:
    """``config`` with its first ``count`` decoder layers."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    depth = text.num_hidden_layers
    text.num_hidden_layers = count
    for name, value in list(vars(text).items()):  # layer_types and the like: one entry a layer
        if isinstance(value, list) and len(value) == depth:
            setattr(text, name, value[:count])
    return config


def _inside_kernels(shape: StepShape, hidden: int) -> int:
    """Buffers that no trace sees, of the fused loss: a tile of logits and a panel of words (a few
    MB, see qlora_kernels.loss), and for 2048 rows at a time their hidden states in fp32, a copy,
    and their gradient."""
    return 8 * 2**20 + 3 * 4 * min(shape.batch * shape.length, 2048) * hidden


# --- the plan -----------------------------------------------------------------------------------


def plan_memory(
    config: Any,
    shape: StepShape,
    *,
    dtype: torch.dtype = torch.float32,
    quant: Mapping[str, Any] | None = None,
    lora: Any = None,
    checkpointing: bool = False,
    accumulation: int = 1,
    optimizer: tuple[Any, dict[str, Any]] | None = None,
    attention: str = "sdpa",
    fused: bool = True,
    program: int | None = None,
    limit: tuple[int | None, str] | None = None,
) -> MemoryPlan:
    """Predicts the memory of a finetune. Touches no weights and no data.

    Args:
        config: a transformers configuration of a causal language model.
        shape: of the largest micro-batch.
        dtype: of what is not quantized.
        quant: ``quant_type``, ``blocksize``, ``double_quant``, ``skip_modules`` of the 4-bit
            layers; None for none.
        lora: PEFT's ``LoraConfig``.
        checkpointing: whether activations are computed again in the backward pass.
        accumulation: micro-batches a step; with more than one, gradients are held throughout.
        optimizer: its class and keyword arguments; AdamW if None.
        attention: transformers' name of the implementation.
        fused: whether :func:`qlora_kernels.activations.fuse` is applied.
        program: bytes of the process before; what is resident now if None.
        limit: what :func:`available_memory` says if None.

    Returns:
        The plan. Where a model cannot be traced, its activations are missing and ``notes`` says so.
    """
    program = resident_memory() if program is None else program
    limit, who = available_memory() if limit is None else limit
    plan = MemoryPlan(limit=limit, limit_from=who)
    optimizer = optimizer or (torch.optim.AdamW, {})

    def build(layers: int | None = None) -> Any:
        part = config if layers is None else _with_layers(config, layers)
        return _meta_model(part, dtype, quant, lora, attention)

    whole = build()
    standing = _standing(whole)
    # The largest weight as it comes from the file, and as it becomes fp32 to be quantized.
    largest = _largest_weight(whole)
    del whole
    text = config.get_text_config()
    depth = text.num_hidden_layers
    try:
        traces = [
            _trace(build(n), shape, checkpointing, accumulation > 1, optimizer, fused)
            for n in range(min(depth, 2), 0, -1)
        ]
        trace = traces[0] if depth <= 2 else traces[0].extended(traces[1], depth - 2)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        plan.notes.append(
            f"activations could not be predicted for {type(config).__name__} ({reason}): the peak "
            "is higher than this"
        )
        trace = _Trace(0, 0, 2 * standing["gradients"])
    gradients = min(standing.pop("gradients"), max(0, trace.peak - trace.saved))
    kernels = _inside_kernels(shape, text.hidden_size)
    parts = {"program and libraries": program, **standing}
    parts["optimizer states"] = trace.states
    parts["gradients"] = gradients
    parts["activations"] = trace.saved
    parts["temporaries"] = trace.peak - trace.saved - gradients + kernels
    plan.parts = parts
    weights = sum(standing.values())
    plan.phases = {
        "while loading": program + weights + 2 * 4 * largest,
        "in a training step": sum(parts.values()),
    }
    return plan
