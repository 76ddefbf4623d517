"""What of a model is in 4 bits, and what is not, with its bytes."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn

from .experts import Experts4bit
from .linear import Linear4bit
from .replace import _packed_bytes

__all__ = ["Footprint", "Kept", "footprint"]

_SHOWN = 0.02  # of the kept bytes; what has less is summed up in one line


class Kept(NamedTuple):
    """Parameters of one name, layers' numbers aside, that are not in 4 bits."""

    name: str
    tensors: int
    bytes: int
    dtype: torch.dtype


@dataclass
class Footprint:
    """Made by :func:`footprint`; ``print`` it."""

    linears: int = 0
    stacks: int = 0
    weights: int = 0
    """Weights in 4 bits, and what they take, scales included."""
    packed_bytes: int = 0
    kept: list[Kept] = field(default_factory=list)
    """All other parameters, the largest first."""

    @property
    def kept_bytes(self) -> int:
        return sum(k.bytes for k in self.kept)

    def __str__(self) -> str:
        bits = 8 * self.packed_bytes / self.weights if self.weights else 0.0
        what = [f"{self.linears} linear layers"] if self.linears else []
        what += [f"{self.stacks} layers of experts"] if self.stacks else []
        lines = [
            f"in 4 bits: {' and '.join(what) or 'nothing'}, {_size(self.packed_bytes)} "
            f"({bits:.3f} bits a weight)",
            f"not in 4 bits: {_size(self.kept_bytes)}",
        ]
        shown = [k for k in self.kept if k.bytes >= _SHOWN * self.kept_bytes]
        for k in shown:
            times = f" x {k.tensors}" if k.tensors > 1 else ""
            dtype = str(k.dtype).removeprefix("torch.")
            lines.append(f"  {_size(k.bytes):>10}  {dtype:<8}  {k.name}{times}")
        rest = [k for k in self.kept if k not in shown]
        if rest:
            count = sum(k.tensors for k in rest)
            lines.append(f"  {_size(sum(k.bytes for k in rest)):>10}  {count} smaller ones")
        return "\n".join(lines)


def _size(n: int) -> str:
    return f"{n / 1e6:.1f} MB" if n >= 100_000 else f"{n / 1e3:.1f} kB"


def footprint(model: nn.Module) -> Footprint:
    """What ``model`` holds in 4 bits, and all that it does not.

    Shared parameters count once, under their first name. Numbers in names stand together as ``*``.
    """
    found, packed = Footprint(), set()
    kept: dict[tuple[str, torch.dtype], tuple[int, int]] = {}
    for module in model.modules():
        if isinstance(module, Linear4bit) and not module._is_dense:
            if id(module.weight) not in packed:
                found.linears += 1
                found.weights += module.in_features * module.out_features
                found.packed_bytes += _packed_bytes(module)
            packed.add(id(module.weight))
        elif isinstance(module, Experts4bit):
            found.stacks += 1
            found.weights += sum(s.experts * s.size for s in module.shapes.values())
            found.packed_bytes += module.packed_bytes()
            packed |= {id(module._parameters[name]) for name in module.shapes}
    for name, parameter in model.named_parameters():
        if id(parameter) not in packed:
            key = (re.sub(r"\.\d+(?=\.)", ".*", name), parameter.dtype)
            count, size = kept.get(key, (0, 0))
            kept[key] = (count + 1, size + parameter.numel() * parameter.element_size())
    found.kept = sorted(
        (Kept(name, count, size, dtype) for (name, dtype), (count, size) in kept.items()),
        key=lambda k: -k.bytes,
    )
    return found
