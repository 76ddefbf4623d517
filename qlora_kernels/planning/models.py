"""Configurations of public models, by name or by size; or of yours, from its ``config.json``.

Sizes as their makers publish them in the models' own ``config.json``; nothing is downloaded.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..finetune.errors import BadInput, bad_input

__all__ = ["MODELS", "Model", "find_model", "linear_shapes", "parameters_of"]


@dataclass(frozen=True)
class Model:
    """A decoder of gated MLPs, as nearly all are today."""

    kind: str  # transformers' model_type
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    words: int
    tied: bool = False
    head_size: int | None = None

    def config(self) -> Any:
        """transformers' configuration of it."""
        from transformers import AutoConfig

        values: dict[str, Any] = {
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.words,
            "tie_word_embeddings": self.tied,
            "head_dim": self.head_size or self.hidden // self.heads,
        }
        return AutoConfig.for_model(self.kind, **values)


MODELS: dict[str, Model] = {
    "llama-7b": Model("llama", 4096, 11008, 32, 32, 32, 32000),
    "llama-13b": Model("llama", 5120, 13824, 40, 40, 40, 32000),
    "llama-33b": Model("llama", 6656, 17920, 60, 52, 52, 32000),
    "llama-65b": Model("llama", 8192, 22016, 80, 64, 64, 32000),
    "llama-2-7b": Model("llama", 4096, 11008, 32, 32, 32, 32000),
    "llama-2-13b": Model("llama", 5120, 13824, 40, 40, 40, 32000),
    "llama-2-70b": Model("llama", 8192, 28672, 80, 64, 8, 32000),
    "llama-3-8b": Model("llama", 4096, 14336, 32, 32, 8, 128256),
    "llama-3-70b": Model("llama", 8192, 28672, 80, 64, 8, 128256),
    "llama-3.2-1b": Model("llama", 2048, 8192, 16, 32, 8, 128256, True),
    "llama-3.2-3b": Model("llama", 3072, 8192, 28, 24, 8, 128256, True),
    "tinyllama-1.1b": Model("llama", 2048, 5632, 22, 32, 4, 32000),
    "smollm2-135m": Model("llama", 576, 1536, 30, 9, 3, 49152, True),
    "smollm2-360m": Model("llama", 960, 2560, 32, 15, 5, 49152, True),
    "smollm2-1.7b": Model("llama", 2048, 8192, 24, 32, 32, 49152, True),
    "mistral-7b": Model("mistral", 4096, 14336, 32, 32, 8, 32000),
    "mistral-7b-v0.3": Model("mistral", 4096, 14336, 32, 32, 8, 32768),
    "qwen2.5-0.5b": Model("qwen2", 896, 4864, 24, 14, 2, 151936, True),
    "qwen2.5-1.5b": Model("qwen2", 1536, 8960, 28, 12, 2, 151936, True),
    "qwen2.5-3b": Model("qwen2", 2048, 11008, 36, 16, 2, 151936, True),
    "qwen2.5-7b": Model("qwen2", 3584, 18944, 28, 28, 4, 152064),
    "qwen2.5-14b": Model("qwen2", 5120, 13824, 48, 40, 8, 152064),
    "qwen2.5-32b": Model("qwen2", 5120, 27648, 64, 40, 8, 152064),
    "qwen2.5-72b": Model("qwen2", 8192, 29568, 80, 64, 8, 152064),
    "qwen3-0.6b": Model("qwen3", 1024, 3072, 28, 16, 8, 151936, True, 128),
    "qwen3-1.7b": Model("qwen3", 2048, 6144, 28, 16, 8, 151936, True, 128),
    "qwen3-4b": Model("qwen3", 2560, 9728, 36, 32, 8, 151936, True, 128),
    "qwen3-8b": Model("qwen3", 4096, 12288, 36, 32, 8, 151936, False, 128),
    "qwen3-14b": Model("qwen3", 5120, 17408, 40, 40, 8, 151936, False, 128),
    "qwen3-32b": Model("qwen3", 5120, 25600, 64, 64, 8, 151936, False, 128),
    "gemma-2b": Model("gemma", 2048, 16384, 18, 8, 1, 256000, True, 256),
    "gemma-7b": Model("gemma", 3072, 24576, 28, 16, 16, 256000, True, 256),
    "gemma-2-2b": Model("gemma2", 2304, 9216, 26, 8, 4, 256000, True, 256),
    "gemma-2-9b": Model("gemma2", 3584, 14336, 42, 16, 8, 256000, True, 256),
    "gemma-2-27b": Model("gemma2", 4608, 36864, 46, 32, 16, 256000, True, 128),
}

_SAME = {"llama-30b": "llama-33b", "llama-3.1-8b": "llama-3-8b", "llama-3.1-70b": "llama-3-70b",
         "llama-3.3-70b": "llama-3-70b", "llama-8b": "llama-3-8b",
         "llama-70b": "llama-2-70b"}  # fmt: skip
# What is said beside a model's name and changes none of its sizes.
_BESIDE = re.compile(r"-(hf|it|instruct|chat|base|bnb|4bit|meta|v0\.1|v0\.2)(?=-|$)")


def linear_shapes(config: Any) -> list[tuple[str, int, int]]:
    """``(name, out features, in features)`` of a decoder layer's linear layers, in order, asked of
    the model that transformers makes."""
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM

    from .memory import _with_layers

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(_with_layers(config, 1))
    return [
        (name.rpartition(".")[2], m.out_features, m.in_features)
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and m is not model.get_output_embeddings()
    ]


def parameters_of(model: Model) -> int:
    """Parameters, norms and biases aside (less than a thousandth)."""
    heads = (model.head_size or model.hidden // model.heads) * (model.heads + model.kv_heads)
    layer = 2 * model.hidden * heads + 3 * model.hidden * model.inner
    return model.layers * layer + (1 if model.tied else 2) * model.words * model.hidden


def _plain(name: str) -> str:
    text = name.strip().lower().rpartition("/")[2].replace("_", "-").replace(" ", "-")
    text = re.sub(
        r"^(meta-)?llama-?(\d)(?=-|$|\.)", r"llama-\2", text.replace("meta-llama", "llama")
    )
    return _BESIDE.sub("", text)


def _by_size(text: str) -> str | None:
    """The name of the model of a size such as ``13b`` or ``135m``, LLaMA's first."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([bm])", text)
    if not found:
        return None
    same = _SAME.get(f"llama-{text}", f"llama-{text}")
    if same in MODELS:
        return same
    wanted = float(found[1]) * (1e9 if found[2] == "b" else 1e6)
    nearest = min(MODELS, key=lambda name: abs(parameters_of(MODELS[name]) / wanted - 1))
    return nearest if abs(parameters_of(MODELS[nearest]) / wanted - 1) < 0.15 else None


def find_model(what: str) -> tuple[str, Any]:
    """A name for people and transformers' configuration, of a name, a size, a folder or a file.

    Raises:
        BadInput: there is none of that name (the nearest are told), or the file is none.
    """
    path = Path(what).expanduser()
    if path.is_dir() or path.is_file():
        return _from_file(path)
    if what.endswith(".json") or what.startswith((".", "/", "~")):
        raise BadInput(f"there is no file or folder {what}")
    plain = _plain(what)
    name = _SAME.get(plain, plain)
    if name not in MODELS:
        name = _by_size(plain) or ""
    if not name:
        known = [*MODELS, *_SAME]
        near = difflib.get_close_matches(plain, known, n=3, cutoff=0.4)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise BadInput(
            f"there is no model {what!r}{hint} Known: {', '.join(MODELS)}; or a model's folder, "
            "its config.json, or a size such as 13b"
        )
    return name, MODELS[name].config()


def _from_file(path: Path) -> tuple[str, Any]:
    from transformers import AutoConfig

    from ..integrations.checkpoint_files import read_json_object

    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise BadInput(f"{path} holds no config.json: not a transformers model's folder")
    with bad_input():
        values = read_json_object(file)
    kind = values.pop("model_type", None)
    if kind is None:
        raise BadInput(f"{file} names no model_type: not a transformers configuration")
    try:
        config = AutoConfig.for_model(kind, **values)
        text = config.get_text_config()
        depth, width = text.num_hidden_layers, text.hidden_size
    except Exception as error:  # transformers raises many kinds, and attributes may be missing
        raise BadInput(f"{file} is no configuration of a causal language model: {error}") from None
    if not (isinstance(depth, int) and depth > 0 and isinstance(width, int) and width > 0):
        raise BadInput(f"{file}: num_hidden_layers is {depth!r} and hidden_size is {width!r}")
    return (path.name if path.is_dir() else path.stem), config
