"""How fast a finetune goes on this machine: steps of the first layers of the model, measured.

A real step (quantized layers with random weights, LoRA, loss, backward, clipping, optimizer) of the
model with three decoder layers and with one, taken in turns: half the difference is a layer, and
what is left is the rest (embedding, output layer, loss). Their sum over the model's depth is
the step. The weights' values do not matter to speed; their shapes, kernels and dtypes are the
run's own.

A micro-batch of more than :data:`MOST_TOKENS` tokens is calibrated with fewer rows, and one that
would take longer than a few seconds a step with shorter ones; time is then taken to be proportional
to tokens, and ``notes`` says so.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from ..finetune.errors import RunError
from .recipe import Recipe
from .speed import Forecast
from .trace import StepShape

__all__ = ["calibrate", "small_model"]

MOST_TOKENS = 2048
REPEATS = 5
MORE = 3
"""Layers of the deeper of the two models."""


def small_model(config: Any, recipe: Recipe, layers: int) -> Any:
    """The first layers of the model with random weights, quantized, with LoRA, ready to train."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from ..activations import fuse
    from ..loss import install
    from ..nn.replace import replace_linear_layers
    from .memory import _with_layers

    dtype = getattr(torch, recipe.dtype)
    model = AutoModelForCausalLM.from_config(
        _with_layers(config, layers), dtype=dtype, attn_implementation=recipe.attn_implementation
    )
    if recipe.quant_type != "none":
        replace_linear_layers(
            model,
            quant_type=recipe.quant_type,
            blocksize=recipe.blocksize,
            compress_statistics=recipe.double_quant,
            verbose=False,
        )
    model.requires_grad_(False)
    model = get_peft_model(model, recipe.plan_settings()["lora"])
    if recipe.activation_checkpointing:
        model.activation_checkpointing_enable()
        model.enable_input_require_grads()
    install(model)
    if recipe.fuse_layers:
        fuse(model)
    return model.train()


def stepper(model: Any, recipe: Recipe, shape: StepShape) -> Callable[[], None]:
    """A function that takes one training step, without accumulation."""
    import torch

    from ..activations import recompute

    cls, kwargs = recipe.optimizer()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = cls(trained, **kwargs)
    words = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, words, (shape.batch, shape.length), generator=generator)
    mask, labels = torch.ones_like(ids), ids.clone()
    if shape.batch > 1:  # as in real batches, in which one row is the longest
        mask[-1, -1], labels[-1, -1] = 0, -100
    batch = {"input_ids": ids, "labels": labels, "attention_mask": mask}

    def step() -> None:
        if recipe.activation_checkpointing:
            loss = model(**batch, use_cache=False).loss
        else:
            with recompute():
                loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.3)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _timed(step: Callable[[], None]) -> float:
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def calibrate(
    config: Any, recipe: Recipe, budget: float = 60.0, say: Callable[[str], None] = lambda _: None
) -> Forecast:
    """The speed of a recipe on the CPU here, from a few steps of one and of three layers.

    Args:
        budget: seconds that the steps may take together, roughly.

    Raises:
        RunError: three layers of the model do not run here (memory, most likely).
    """
    depth = config.get_text_config().num_hidden_layers
    shape, notes = recipe.shape, []
    if shape.tokens > MOST_TOKENS and shape.batch > 1:
        shape = StepShape(max(1, MOST_TOKENS // shape.length), shape.length)
    try:
        say("calibrating: the first layers of the model are quantized")
        models = [small_model(config, recipe, layers) for layers in (1, MORE)]
        steps = [stepper(model, recipe, shape) for model in models]
        first = _timed(steps[0])
        while (1 + MORE) * (REPEATS + 1) * first > budget and shape.length > 64:
            shape = StepShape(1, max(64, shape.length // 2))
            steps = [stepper(model, recipe, shape) for model in models]
            first = _timed(steps[0])
        steps[1]()
        say(f"calibrating: {REPEATS} steps of 1 and {MORE} layers, {shape.tokens} tokens each")
        seconds: list[list[float]] = [[], []]
        for _ in range(REPEATS):
            for one, times in zip(steps, seconds, strict=True):
                times.append(_timed(one))
    except (MemoryError, RuntimeError) as error:
        raise RunError(f"the calibration did not run: {str(error).splitlines()[0]}") from error
    one, more = (statistics.median(times) for times in seconds)
    layer = max((more - one) / (MORE - 1), 0.0)
    rest = max(one - layer, 0.0)
    factor = recipe.shape.tokens / shape.tokens
    if factor != 1:
        notes.append(
            f"calibrated with {shape.batch} x {shape.length} tokens; time is taken to be "
            "proportional to tokens"
        )
    spread = max(max(times) / min(times) for times in seconds)
    if spread > 1.3:
        notes.append(
            f"the steps of the calibration differ by a factor of {spread:.1f}: the machine is busy"
        )
    return Forecast(
        factor * (rest + depth * layer),
        recipe.shape.tokens,
        "calibrated here, on the CPU",
        {f"{depth} layers": factor * depth * layer, "output layer, loss, the rest": factor * rest},
        "",
        notes,
    )
