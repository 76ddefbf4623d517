"""Linear layers by name: LLaMA's, a model folder's own, or ``NxK``."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..finetune.errors import BadInput

__all__ = ["LLAMA", "Layer", "layers", "model_layers"]


@dataclass(frozen=True)
class Layer:
    """A weight ``[n, k]``, out x in features, and what it is called."""

    name: str
    n: int
    k: int

    @property
    def size(self) -> str:
        return f"{self.n}x{self.k}"


def _llama(size: str, hidden: int, intermediate: int, kv: int) -> list[Layer]:
    """Layers of one size have one name: what a kernel does depends on nothing else."""
    square = [("qkvo", hidden)] if kv == hidden else [("qo", hidden), ("kv", kv)]
    return [
        *(Layer(f"{size}.{name}", n, hidden) for name, n in square),
        Layer(f"{size}.gate_up", intermediate, hidden),
        Layer(f"{size}.down", hidden, intermediate),
    ]


LLAMA: dict[str, list[Layer]] = {
    "7b": _llama("7b", 4096, 11008, 4096),
    "13b": _llama("13b", 5120, 13824, 5120),
    "33b": _llama("33b", 6656, 17920, 6656),
    "65b": _llama("65b", 8192, 22016, 8192),
    "70b": _llama("70b", 8192, 28672, 1024),
}
"""LLaMA's decoder layers by size (70B is LLaMA 2's, with 8 groups of queries)."""

_ALIASES = {"q": "q", "k": "k", "v": "v", "o": "o", "gate": "gate_up", "up": "gate_up"}


def _names() -> dict[str, list[Layer]]:
    """Every name that is understood."""
    found: dict[str, list[Layer]] = {}
    for size, all_ in LLAMA.items():
        found[size] = all_
        for layer in all_:
            found[layer.name] = [layer]
            part = layer.name.partition(".")[2]
            for alias, full in _ALIASES.items():
                if part == full or (
                    len(alias) == 1 and alias in part and part in ("qkvo", "qo", "kv")
                ):
                    found[f"{size}.{alias}"] = [layer]
    return found


def layers(names: Sequence[str]) -> list[Layer]:
    """The layers of those names, each size once.

    Args:
        names: a LLaMA size (``7b``: all layers of it), ``7b.q``, ``70b.down``, or ``4096x11008``,
            out x in features.

    Raises:
        BadInput: a name that is none; the nearest ones are suggested.
    """
    known = _names()
    found: list[Layer] = []
    for name in names:
        plain = name.lower().removeprefix("llama").strip("-_ ")
        numbers = re.fullmatch(r"(\d+)x(\d+)", plain)
        if numbers is not None:
            n, k = map(int, numbers.groups())
            if n < 1 or k < 1:
                raise BadInput(f"shape {name!r}: both numbers must be positive")
            found.append(Layer(plain, n, k))
        elif plain in known:
            found += known[plain]
        else:
            near = difflib.get_close_matches(plain, known, n=3, cutoff=0.4)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise BadInput(
                f"there is no shape {name!r}{hint} (a LLaMA size: {', '.join(LLAMA)}; one of its "
                "layers: 7b.q, 7b.gate, 70b.down; or OUTxIN, as 4096x11008)"
            )
    return list({layer.size: layer for layer in reversed(found)}.values())[::-1]


def model_layers(folder: str | Path) -> list[Layer]:
    """The linear layers of a transformers model, from its configuration alone.

    The model is built without its weights. Output layers and embeddings, which QLoRA leaves in 16
    bits, are not among them. Layers of one size are named together after what they are called.

    Raises:
        BadInput: no folder, no ``config.json`` that can be read, an architecture that transformers
            does not know, no linear layers.
    """
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise BadInput(f"{folder}: no config.json is there; --model takes a transformers folder")
    try:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM
    except ModuleNotFoundError as error:
        raise BadInput(
            f"--model needs {error.name}: pip install 'qlora-kernels[finetune]'"
        ) from None
    try:
        config = AutoConfig.from_pretrained(path)
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # shapes of the layers, not of what packs them
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BadInput(f"{folder}/config.json: {reason}") from error
    head = model.get_output_embeddings()
    groups: dict[tuple[int, int], list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            last = name.rpartition(".")[2].removesuffix("_proj")
            names = groups.setdefault((module.out_features, module.in_features), [])
            if last not in names:
                names.append(last)
    if not groups:
        raise BadInput(f"{folder}: the model has no linear layers besides its output")
    title = path.resolve().name
    return [Layer(f"{title}.{'_'.join(names)}", n, k) for (n, k), names in groups.items()]
