"""``model.generate`` without the Python between the kernels.

A token of a small model costs more in Python than in kernels: transformers calls some 30 modules a
layer, and each of them torch. :func:`compile_generation` has transformers' own ``generate`` trace
that once, into one compiled step over a static cache, which is what it does by itself on a GPU with
``cache_implementation="static"``; on a CPU it must be asked for.
"""

from __future__ import annotations

from typing import Any

__all__ = ["compile_generation"]


def compile_generation(
    model: Any,
    *,
    max_cache_len: int | None = None,
    backend: str = "inductor",
    mode: str | None = None,
) -> Any:
    """Makes ``model.generate`` run a compiled step with a static cache, on any device.

    It sets defaults of ``model.generation_config``; what is passed to ``generate`` still wins, and
    nothing else of the model changes. The first token after the prompt then pays for compilation
    (half a minute and more for thirty layers; torch keeps what it compiled on disk), later calls
    whose cache has the same length do not. The prompt itself runs uncompiled. Tokens are those of
    the same cache uncompiled, up to the rounding that fusing operations saves.

    Args:
        model: a transformers causal language model, in PEFT's wrapping or bare.
        max_cache_len: tokens, prompt included, that the cache has at least. Without it the cache is
            as long as each call needs (prompt and new tokens), and another length compiles anew.
        backend, mode: as in ``torch.compile``; ``inductor`` needs a C++ compiler for a CPU. On a
            GPU ``mode="reduce-overhead"`` captures the step as a CUDA graph.

    Returns:
        The model, so that the call can stand around ``from_pretrained``.

    Raises:
        TypeError: no transformers model that generates.
        ValueError: ``max_cache_len`` below 1.
    """
    from transformers.generation import CompileConfig

    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = getattr(bare, "generation_config", None)
    if config is None:
        raise TypeError(
            f"compile_generation() takes a transformers model that generates; "
            f"{type(model).__name__} has no generation_config"
        )
    if max_cache_len is not None and max_cache_len < 1:
        raise ValueError(f"max_cache_len is {max_cache_len}; it must be at least 1")
    compiled = CompileConfig(fullgraph=False, dynamic=None, backend=backend, mode=mode)  # type: ignore[arg-type]
    compiled._compile_all_devices = True  # type: ignore[assignment]
    config.cache_implementation = "static"
    config.max_cache_len = max_cache_len
    config.compile_config = compiled
    return model
