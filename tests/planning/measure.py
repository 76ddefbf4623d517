"""Steps of small models, planned and run: their peaks of memory.

    python tests/planning/measure.py

prints a line a configuration. glibc is told to give large blocks back, so that what is measured is
what is held and not its holes; the kernel counts the peak anew for each (``clear_refs``).
"""

from __future__ import annotations

import ctypes
import gc
from dataclasses import dataclass
from pathlib import Path

from transformers import LlamaConfig

from qlora_kernels.planning.calibrate import small_model, stepper
from qlora_kernels.planning.machine import peak_resident_memory, resident_memory
from qlora_kernels.planning.memory import LOADING
from qlora_kernels.planning.recipe import Place, Recipe, make_plan


def llama(hidden=384, inner=1024, layers=8, heads=6, kv=6, words=4096, tied=True) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, vocab_size=words,
        num_attention_heads=heads, num_key_value_heads=kv, tie_word_embeddings=tied,
    )  # fmt: skip


def recipe(**changes) -> Recipe:
    plain = Recipe(
        max_length=384, per_device_train_batch_size=4, gradient_accumulation_steps=1, r=16,
        optim="adamw_torch", activation_checkpointing=False, dtype="float32",
    )  # fmt: skip
    from dataclasses import replace

    return replace(plain, **changes)


CASES = {
    "plain": (llama(), recipe()),
    "checkpointed": (llama(layers=16), recipe(activation_checkpointing=True)),
    "long": (llama(), recipe(max_length=1024, per_device_train_batch_size=1)),
    "wide batch": (llama(), recipe(max_length=128, per_device_train_batch_size=16)),
    "rank 128": (llama(), recipe(r=128)),
    "rank 256, checkpointed": (llama(layers=16), recipe(r=256, activation_checkpointing=True)),
    "query and value": (llama(), recipe(target_modules=("q_proj", "v_proj"))),
    "bfloat16": (llama(), recipe(dtype="bfloat16", per_device_train_batch_size=6)),
    "grouped queries": (llama(hidden=512, heads=8, kv=2), recipe()),
    "many words": (llama(words=60_000), recipe()),
    "eight bits": (llama(), recipe(optim="adamw_8bit", r=128)),
    "not quantized": (llama(), recipe(quant_type="none")),
    "not nested": (llama(hidden=512, heads=8, kv=8), recipe(double_quant=False)),
    "layers not fused": (llama(), recipe(fuse_layers=False)),
}


@dataclass
class Peak:
    predicted: int
    measured: int

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


def _settle() -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return resident_memory()


def measured_peak(config: LlamaConfig, settings: Recipe) -> Peak:
    """The peak of a step beyond the process itself, as planned and as it was."""
    ctypes.CDLL(None).mallopt(-3, 1 << 17)  # M_MMAP_THRESHOLD
    plan = make_plan(config, settings, Place("here", None, gpu=False), program=0)
    # What the first call of each kernel loads is the program's, not the step's.
    small = LlamaConfig(**{**config.to_dict(), "num_hidden_layers": 1})
    stepper(small_model(small, settings, 1), settings, settings.shape)()
    before = _settle()
    model = small_model(config, settings, config.num_hidden_layers)
    step = stepper(model, settings, settings.shape)
    step()  # from here on there are states
    _settle()
    Path("/proc/self/clear_refs").write_text("5")
    step()
    measured = peak_resident_memory() - before
    predicted = max(taken for phase, taken in plan.phases.items() if phase != LOADING)
    return Peak(predicted, measured)


if __name__ == "__main__":
    for name, (config, settings) in CASES.items():
        peak = measured_peak(config, settings)
        print(
            f"{name:24} {peak.predicted / 1e6:8.1f} MB planned {peak.measured / 1e6:8.1f} measured "
            f"{peak.error:+.1%}",
            flush=True,
        )
