"""The contenders of an optimizer step on LoRA's A and B, fp32, and what the step must give."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import optim
from .contenders import attempt
from .race import Contender
from .shapes import Layer

__all__ = ["contenders"]

_LR, _BETAS, _EPS, _STEPS = 2e-4, (0.9, 0.999), 1e-8, 3


def _reference(p: Tensor, grad: Tensor) -> Tensor:
    """p after ``_STEPS`` steps of AdamW with the same gradient, in float64."""
    p, g = p.double(), grad.double()
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for t in range(1, _STEPS + 1):
        m = _BETAS[0] * m + (1 - _BETAS[0]) * g
        v = _BETAS[1] * v + (1 - _BETAS[1]) * g * g
        root = (v / (1 - _BETAS[1] ** t)).sqrt() + _EPS
        p = p - _LR * (m / (1 - _BETAS[0] ** t)) / root
    return p


class _Step:
    """A step that is checked on the way: the first call makes ``_STEPS`` of them."""

    def __init__(self, make: Callable[..., Any], starts: Sequence[Tensor], eight: bool) -> None:
        self.params = [torch.nn.Parameter(p.clone()) for p in starts]
        generator = torch.Generator().manual_seed(0)
        for p in self.params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.device)
        self.optimizer = make(self.params, lr=_LR, betas=_BETAS, eps=_EPS, weight_decay=0.0)
        self.wants = [
            _reference(s.cpu(), p.grad.cpu()) for s, p in zip(starts, self.params, strict=True)
        ]
        self.eight = eight
        self.made = 0

    def __call__(self, i: int) -> Sequence[Tensor]:
        for _ in range(_STEPS if self.made == 0 else 1):
            self.optimizer.step()
            self.made += 1
        return self.params

    def check(self, result: Sequence[Tensor]) -> str | None:
        # A step is some lr. fp32 arithmetic is within 2^-18 of it. With codes of 8 bits a small
        # value's v may round to zero, which can cost a whole step; in the mean 5% are left.
        worst, mean = (1.0, 0.05) if self.eight else (2.0**-18, 2.0**-18)
        for p, want in zip(result, self.wants, strict=True):
            error = (p.detach().cpu().double() - want).abs()
            u = 4 * _STEPS * 2.0**-24 * want.abs()
            if not (error <= worst * _LR * _STEPS + u).all():
                return f"{error.max() / _LR:.2g} of a step from AdamW's in float64"
            if not error.mean() <= mean * _LR * _STEPS + u.mean():
                return f"{error.mean() / _LR:.2g} of a step from AdamW's in the mean"
        return None


def contenders(
    layer: Layer, rank: int, device: torch.device, peers: Sequence[str]
) -> Iterator[Contender]:
    """AdamW with states of 32 and 8 bits."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((rank, layer.k), (layer.n, rank))
    starts = [(torch.randn(s, generator=generator) * 0.1).to(device) for s in sizes]
    makers: list[tuple[str, Callable[..., Any], bool]] = [
        ("qlora 32-bit", optim.AdamW, False),
        ("qlora 8-bit", optim.AdamW8bit, True),
    ]
    if "torch" in peers:
        makers.append(("torch", torch.optim.AdamW, False))
    if "bitsandbytes" in peers:
        import bitsandbytes as bnb

        makers.append(("bitsandbytes 32-bit", bnb.optim.AdamW32bit, False))
        makers.append(("bitsandbytes 8-bit", bnb.optim.AdamW8bit, True))
    for name, make, eight in makers:

        def contender(name=name, make=make, eight=eight) -> Contender:
            step = _Step(make, starts, eight)
            return Contender(name, step, step.check)

        yield attempt(name, contender)
