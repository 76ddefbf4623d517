"""How fast a finetune goes on a GPU: **modelled**, from public figures of the device.

A micro-batch is a list of operations, each as long as the longest of what it computes, at a share
of the tensor cores' data sheet, and what it moves, at the measured read bandwidth of the device
(:mod:`qlora_kernels.emulator.devices` has both, with sources):

- each linear layer by the kernel that the dispatch chooses (:func:`qlora_kernels.cuda.choose`): a
  fused GEMM, or dequantization and a matmul; forward, again in the backward pass where activations
  are checkpointed, and the gradient of the input. No gradient of the weight: it is frozen
- LoRA's matmuls, and its parts through memory where they are not fused
- attention, half of the square, for the mask is causal; the norms, SwiGLU, rotations and residuals
  by their bytes
- the output layer, forward and backward, in tiles
- the optimizer's step, by its bytes, once in ``gradient_accumulation_steps``

Beside that goes the host: eager torch needs some 10 µs to launch an operation, so that small
batches on a fast GPU are bound by it. A micro-batch takes the longer of both.

The two shares below are all that is assumed. Nothing is fitted to anybody's measurement, and no GPU
has confirmed it; 20% either way would be no surprise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..emulator.devices import Device
from .models import linear_shapes
from .recipe import Recipe

__all__ = ["ARTICLE_HOURS", "Forecast", "gpu_forecast"]

MATMUL = 0.8
"""Of the tensor cores' data sheet that cuBLAS reaches in large products, as in the benchmarks."""
ATTENTION = 0.5
"""The same of fused attention, forward and backward (an assumption; FlashAttention 2's authors
report 50 to 73% on an A100)."""
HOST = 10e-6
"""Seconds that eager torch takes for one operation, autograd included (an assumption)."""

BF16, FP32 = 2, 4
WORDS_A_TOKEN = 0.75
NIGHT = 8 * 3600.0

ARTICLE_HOURS = {"llama-65b": (24.0, "48 GB"), "llama-33b": (12.0, "24 GB")}
"""Guanaco's training times in the article: 1,875 steps of 16 conversations of up to 512 tokens."""
ARTICLE_STEPS, ARTICLE_BATCH = 1875, 16
ARTICLE_A_DAY = 100
"""Finetunes a day, which the article says its small setups made possible."""


@dataclass
class Forecast:
    """Seconds of a micro-batch, what they are made of, and what follows."""

    seconds: float
    tokens: int
    source: str
    """``"modelled"`` or ``"measured"``, and of what."""
    parts: dict[str, float] = field(default_factory=dict)
    bound: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    def hours(self, tokens: float) -> float:
        """To train on that many tokens."""
        return tokens / self.tokens_per_second / 3600

    @property
    def words_a_night(self) -> float:
        """English words in eight hours, at three words for four tokens."""
        return self.tokens_per_second * NIGHT * WORDS_A_TOKEN

    def finetunes_a_day(self, tokens: float) -> float:
        return 24 / self.hours(tokens)


class _Clock:
    """Adds up operations on a device."""

    def __init__(self, device: Device, dtype: str) -> None:
        kind = {"bfloat16": "bf16", "float16": "fp16", "float32": "tf32"}[dtype]
        if kind not in device.tensor:
            kind = "fp16"
        self.device, self.peak = device, device.tensor[kind]
        self.parts: dict[str, float] = {}
        self.operations = 0

    def add(
        self, part: str, flops: float = 0.0, moved: float = 0.0, *, share: float = MATMUL,
        times: float = 1, launches: int = 1,
    ) -> None:  # fmt: skip
        one = max(flops / (share * self.peak), moved / self.device.dram_read)
        one += launches * self.device.launch
        self.parts[part] = self.parts.get(part, 0.0) + times * one
        self.operations += round(times * launches)

    def matmul(self, part: str, m: int, n: int, k: int, size: int, times: float = 1) -> None:
        self.add(part, 2.0 * m * n * k, size * (m * k + n * k + m * n), times=times)


def _route(device: Device, m: int, n: int, k: int, recipe: Recipe, backward: bool) -> str:
    import torch

    from .. import cuda

    scales = "nested" if recipe.double_quant else "fp32"
    try:
        plan, _ = cuda.choose(
            device, m, n, k, rank=recipe.r, dtype=getattr(torch, recipe.dtype),
            blocksize=recipe.blocksize, scales=scales, backward=backward,
        )  # fmt: skip
    except (ImportError, ValueError):  # not built, or no kernel for it
        return "large"
    return plan.route


def _linear(clock: _Clock, m: int, n: int, k: int, recipe: Recipe, lora: bool, size: int) -> None:
    """One linear layer of ``m`` rows in a step: forward (again, if checkpointed), backward."""
    r = recipe.r if lora else 0
    forwards = 2 if recipe.activation_checkpointing else 1
    for backward, times in ((False, forwards), (True, 1)):
        outs, ins = (k, n) if backward else (n, k)
        fused = recipe.quant_type != "none" and (
            _route(clock.device, m, n, k, recipe, backward) != "large"
        )
        if fused:
            moved = n * k * recipe.bits / 8 + size * m * (n + k)
            flops, share = 2.0 * m * n * k + 2.0 * m * r * (n + k), MATMUL * clock.device.mma_sync
            clock.add("linear layers", flops, moved, share=share, times=times, launches=2)
            continue
        if recipe.quant_type != "none":
            clock.add("dequantization", moved=n * k * (recipe.bits / 8 + size), times=times)
        clock.matmul("linear layers", m, outs, ins, size, times)
        if r:
            clock.matmul("LoRA", m, r, ins, size, times)
            clock.add("LoRA", 2.0 * m * outs * r, size * m * (2 * outs + r), times=times)
    if r:
        clock.matmul("LoRA", r, k, m, size)
        clock.matmul("LoRA", n, r, m, size)


def gpu_forecast(config: Any, recipe: Recipe, device: Device) -> Forecast:
    """The modelled speed of a recipe on a GPU of the table."""
    import torch

    text = config.get_text_config()
    shapes = linear_shapes(config)
    depth, hidden, words = text.num_hidden_layers, text.hidden_size, text.vocab_size
    size = getattr(torch, recipe.dtype).itemsize
    m, length = recipe.shape.tokens, recipe.max_length
    head = getattr(text, "head_dim", None) or hidden // text.num_attention_heads
    attention = text.num_attention_heads * head
    clock = _Clock(device, recipe.dtype)
    passes = 2 if recipe.activation_checkpointing else 1

    trained = 0
    for name, n, k in shapes:
        lora = recipe.target_modules == "all-linear" or name in recipe.target_modules
        _linear(clock, m, n, k, recipe, lora, size)
        trained += recipe.r * (n + k) if lora else 0
    # Two products forward, five backward, half of the square each.
    square = 2.0 * m * length * attention / 2
    moved = 4.0 * size * m * attention
    clock.add("attention", 2 * square, moved, share=ATTENTION, times=passes)
    clock.add("attention", 5 * square, 2 * moved, share=ATTENTION)
    # Norms read and write, rotations and residuals too, SwiGLU reads two and writes one.
    inner = max((n for _, n, _ in shapes), default=hidden)
    elements = size * m * (4 * hidden + 4 * attention + 6 * hidden + 3 * inner)
    clock.add("norms and the like", moved=elements, times=passes, launches=8)
    clock.add("norms and the like", moved=1.5 * elements, launches=12)
    layers = {part: depth * seconds for part, seconds in clock.parts.items()}
    operations = depth * clock.operations
    clock.parts, clock.operations = layers, 0

    clock.matmul("output layer and loss", m, words, hidden, size, times=2)
    states = 8 if "8bit" not in recipe.optim else 2
    update = depth * trained * (2 * states + 3 * FP32)
    each = 1 / recipe.gradient_accumulation_steps
    clock.add("optimizer", moved=update, times=each)
    gpu = sum(clock.parts.values())
    host = HOST * (operations + clock.operations + 2 * each * depth * len(shapes))
    bound = max(clock.parts, key=lambda part: clock.parts[part]) if gpu >= host else "the host"
    found = Forecast(
        max(gpu, host), m, f"modelled, {device.name}, from public figures", dict(clock.parts), bound
    )
    if host > gpu:
        found.parts["waiting for the host"] = host - gpu
    return found
