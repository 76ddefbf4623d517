"""How much memory a finetune will take, before any of it is taken.

Sizes of what is held throughout (packed weights, constants, other weights, adapters) are counted on
a model without storage. What comes and goes within a step is *traced* (:mod:`.trace`), not put in a
formula. Two traces with two and three decoder layers give both the part that grows with depth and
the part that does not. So every architecture that transformers has, gradient checkpointing, packing
and LoRA on whichever layers are predicted by the code that will run.

What a trace does not see is listed in :data:`MemoryPlan.parts` by name: the program itself (as it
is resident now, or a GPU's context) and the buffers inside the kernels.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..nn import Linear4bit
from .allocator import CachingAllocator
from .buffers import linear_buffers
from .machine import available_memory, resident_memory
from .trace import LAYER, STRETCHES, StepShape, StepTrace, trace_step

__all__ = ["LOADING", "MemoryPlan", "StepShape", "plan_memory"]

LOADING = "while loading"

GPU_CONTEXT = 500 * 10**6
"""Of a GPU's memory, what a process has before its first tensor: the context and the kernels of
torch and cuBLAS. An assumption: 300 to 600 MB are reported, by driver and device."""

MIB = 2**20


@dataclass
class MemoryPlan:
    """Bytes, predicted. ``parts`` add up to the peak of a training step."""

    parts: dict[str, int] = field(default_factory=dict)
    """What there is at the moment of the peak of a step."""
    phases: dict[str, int] = field(default_factory=dict)
    """The most that there is while loading, and in each stretch of a training step."""
    limit: int | None = None
    """What this process may have; None where it is not known."""
    limit_from: str = ""
    notes: list[str] = field(default_factory=list)
    compositions: dict[str, dict[str, int]] = field(default_factory=dict)
    """The parts of each phase, at its peak."""
    paged: int = 0
    """Of the optimizer's states, what may lie outside of this memory."""
    activations: int = 0
    """What is kept between forward and backward pass, all layers."""
    activations_a_layer: int = 0
    """What one decoder layer keeps of that."""
    layers: int = 0
    full_logits: int = 0
    """What logits in fp32 would take, if the loss held them at once; it does not."""

    @property
    def peak(self) -> int:
        return max(self.phases.values(), default=0)

    @property
    def needed(self) -> int:
        """The least that this memory must hold: the peak, less paged states that are elsewhere."""
        return max(
            (
                size - (min(self.paged, self.compositions.get(phase, {}).get(_STATES, 0)))
                for phase, size in self.phases.items()
            ),
            default=0,
        )

    @property
    def when(self) -> str:
        """The phase of the peak."""
        return max(self.phases, key=lambda name: self.phases[name], default="")

    @property
    def excess(self) -> int:
        """Bytes by which the need exceeds the limit; 0 where it fits or no limit is known."""
        return 0 if self.limit is None else max(0, self.needed - self.limit)


_STATES = "optimizer states"


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


def _scales(layer: Linear4bit) -> list[Any]:
    # The tables of 16 and 256 values are shared by all layers, and are nothing.
    return [layer.absmax, layer.nested_absmax, layer.nested_offset]


def _standing(model: Any) -> dict[str, int]:
    """Bytes of weights and adapters, by part."""
    quantized = [m for m in model.modules() if isinstance(m, Linear4bit)]
    packed = {id(m.weight): m.weight for m in quantized}
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    words = [p for m in ends if m is not None for p in m.parameters()]
    words = [p for p in words if not p.requires_grad and id(p) not in packed]
    known = packed.keys() | {id(p) for p in words}
    return {
        "packed 4-bit weights": _bytes(packed.values()),
        "their constants": _bytes(s for m in quantized for s in _scales(m)),
        "embeddings and output layer": _bytes(words),
        "other weights": _bytes(
            p for p in model.parameters() if not p.requires_grad and id(p) not in known
        ),
        "trained parameters": _bytes(p for p in model.parameters() if p.requires_grad),
    }


def _largest_weight(model: nn.Module) -> int:
    """Values of the largest single weight in the checkpoint."""
    sizes = [p.numel() for p in model.parameters() if p.dtype != torch.uint8]
    sizes += [m.in_features * m.out_features for m in model.modules() if isinstance(m, Linear4bit)]
    return max(sizes, default=0)


def _largest_packed(model: nn.Module) -> int:
    """Values of the largest weight in 4 bits."""
    found = [m.in_features * m.out_features for m in model.modules() if isinstance(m, Linear4bit)]
    return max(found, default=0)


def loading_holes(model: nn.Module, dtype: torch.dtype, depth: int) -> int:
    """Bytes that torch's allocator on a GPU has taken and does not use, once the model is there:
    each weight came whole, became codes and scales, and went.

    Of a model with two layers or three, the second one stands for all that it lacks of ``depth``.
    """
    before: list[tuple[int, list[int]]] = []  # a weight's bytes as it came, and what stays of it
    layers: dict[int, list[tuple[int, list[int]]]] = {}
    after: list[tuple[int, list[int]]] = []
    seen: set[int] = set()
    for name, module in model.named_modules():
        found = LAYER.search(f"{name}.")
        rest = after if layers else before
        steps = layers.setdefault(int(found[1]), []) if found else rest
        if isinstance(module, Linear4bit):
            seen.add(id(module.weight))
            kept = [t.nbytes for t in (module.weight, *_scales(module)) if t is not None]
            steps.append((module.in_features * module.out_features * dtype.itemsize, kept))
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                steps.append((0, [parameter.nbytes]))
    device = CachingAllocator()
    ordered = [layers[i] for i in sorted(layers)]
    if 1 < len(ordered) < depth:
        ordered[1:2] = [ordered[1]] * (depth - len(ordered) + 1)
    for steps in (before, *ordered, after):
        for whole, kept in steps:
            block = device.allocate(whole) if whole else None
            for size in kept:
                device.allocate(size)
            if block is not None:
                device.free(block)
    return device.reserved - device.allocated


def _alike(config: Any) -> bool:
    """Whether a decoder's layers are all of one kind, as far as its configuration tells."""
    text = config.get_text_config()
    values = vars(text)
    mixed = [v for v in values.values() if isinstance(v, list) and len(v) == text.num_hidden_layers]
    experts = any("experts" in name for name in values)
    return not experts and all(len({str(one) for one in v}) == 1 for v in mixed)


# --- buffers that no trace sees -----------------------------------------------------------------


def inside_loss(tokens: int, width: int, words: int, dtype: torch.dtype, device: str) -> int:
    """Bytes of the fused loss's buffers at their most, besides its results (qlora_kernels.loss
    has them): a tile of logits, a panel of the output layer in another dtype, and of a block of
    rows the hidden states, the gradient in fp32, and the output layer's rows of their labels."""
    from ..loss.cross_entropy import _MAX_ROWS, _cpu_multiplies, _sum_dtype, _tile

    slow = (
        device == "cpu" and dtype in (torch.bfloat16, torch.float16) and not _cpu_multiplies(dtype)
    )
    compute = torch.float32 if slow else dtype
    sums = _sum_dtype(compute).itemsize
    rows = -(-tokens // -(-tokens // _MAX_ROWS))
    tile = min(_tile(rows, width, device), words)
    buffers = rows * tile * sums + (tile * width * compute.itemsize if compute != dtype else 0)
    if compute.itemsize != sums:  # results of 16-bit matmuls, before they become fp32
        buffers += compute.itemsize * (rows * tile + (rows * width if device == "cpu" else 0))
    labelled = sums + (dtype.itemsize if dtype.itemsize != sums else 0)
    return buffers + rows * width * (compute.itemsize + sums + labelled)


def _workspace(largest: int, dtype: torch.dtype, capability: tuple[int, int]) -> int:
    """On a GPU: the buffer that a weight is dequantized into before a matmul of many rows, and what
    torch gives cuBLAS (8 MiB, 32 MiB on capability 9.0 and later)."""
    return largest * dtype.itemsize + (32 * MIB if capability >= (9, 0) else 8 * MIB)


# --- the plan -----------------------------------------------------------------------------------


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


def _compositions(
    held: Mapping[str, int], trace: StepTrace, a_layer: int, depth: int
) -> dict[str, dict[str, int]]:
    """The parts of each stretch of a step; ``held`` are those of all of it, the states aside."""
    before = trace.gradients if trace.accumulated else 0
    at_the_end = max(0, trace.saved - (depth - 1) * a_layer)
    there = {  # gradients and activations at the peak of each stretch
        "forward": (before, trace.saved),
        "loss": (before, trace.saved),
        "last layer": (before, trace.saved),
        "first layer": (trace.gradients, at_the_end),
        "update": (trace.gradients, 0),
    }
    found = {}
    for stretch, peak in trace.peaks.items():
        rest = peak - (trace.states if stretch == "update" else 0)
        gradients = max(0, min(there[stretch][0], rest))
        activations = max(0, min(there[stretch][1], rest - gradients))
        found[STRETCHES[stretch]] = {
            **held,
            _STATES: trace.states,
            "gradients": gradients,
            "activations": activations,
            "temporaries": max(0, rest - gradients - activations),
        }
    return found


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
    gpu: tuple[int, int] | None = None,
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
        gpu: the compute capability of a GPU to plan for, with its workspace and the holes that
            torch's allocator leaves; None for what is used alone.

    Returns:
        The plan. Where a model cannot be traced, its activations are missing and ``notes`` says so.
    """
    program = resident_memory() if program is None else program
    limit, who = available_memory() if limit is None else limit
    plan = MemoryPlan(limit=limit, limit_from=who)
    optimizer = optimizer or (torch.optim.AdamW, {})

    def build(layers: int) -> Any:
        part = config if layers == depth else _with_layers(config, layers)
        return _meta_model(part, dtype, quant, lora, attention)

    text = config.get_text_config()
    depth = text.num_hidden_layers
    deep = build(min(depth, 3))
    shallow = build(min(depth, 3) - 1) if depth > 1 else None
    if depth > 3 and _alike(config):
        more = _standing(shallow)
        standing = {n: size + (depth - 3) * (size - more[n]) for n, size in _standing(deep).items()}
        counted = deep
    else:
        counted = deep if depth <= 3 else build(depth)
        standing = _standing(counted)
    # The largest weight as it comes from the file, and as it becomes fp32 to be quantized.
    largest, packed = _largest_weight(counted), _largest_packed(counted)
    holes = loading_holes(counted, dtype, depth) if gpu else 0
    a_layer = 0
    kernels = linear_buffers if gpu is None else None  # a GPU's workspace is a part of its own
    try:
        trace = trace_step(deep, shape, checkpointing, accumulation > 1, optimizer, fused, kernels)
        if shallow is not None:
            less = trace_step(
                shallow, shape, checkpointing, accumulation > 1, optimizer, fused, kernels
            )
            a_layer = trace.saved - less.saved
            trace = trace.extended(less, max(0, depth - 3))
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        plan.notes.append(
            f"activations could not be predicted for {type(config).__name__} ({reason}): the peak "
            "is higher than this"
        )
        trained = standing["trained parameters"]
        guess = dict.fromkeys(STRETCHES, trained) | {"update": 3 * trained}
        trace = StepTrace(guess, 0, trained, 2 * trained, 0)
    held = {"program and libraries" if gpu is None else "the GPU's context": program, **standing}
    inside: dict[str, int] = {}
    if gpu is not None:
        inside["workspace"] = _workspace(packed, dtype, gpu)
        inside["holes of the allocator"] = holes + max(0, trace.reserved - trace.peak)
    plan.compositions = {
        phase: {**parts, **inside}
        for phase, parts in _compositions(held, trace, a_layer, depth).items()
    }
    # The loss has its gradient ready with it, and needs no buffer in the backward pass.
    loss = {
        "the loss, a tile of logits": inside_loss(
            shape.tokens, text.hidden_size, text.vocab_size, dtype, "cpu" if gpu is None else "cuda"
        )
    }
    if trace.peaks["loss"]:
        plan.compositions[STRETCHES["loss"]].update(loss)
    else:
        del plan.compositions[STRETCHES["loss"]]  # not the fused one
    plan.phases = {phase: sum(parts.values()) for phase, parts in plan.compositions.items()}
    plan.parts = plan.compositions[plan.when]
    loading = {"a weight while it is quantized": 2 * 4 * largest}
    plan.compositions[LOADING] = {**held, **loading}
    plan.phases[LOADING] = sum(plan.compositions[LOADING].values())
    plan.paged = trace.states if getattr(optimizer[0], "paged", False) else 0
    plan.activations, plan.activations_a_layer, plan.layers = trace.saved, a_layer, depth
    plan.full_logits = 4 * shape.tokens * text.vocab_size
    return plan
