"""One line of a benchmark: an op on a layer, its inputs, its reference, who races, what it costs.

==========  ========================================================================================
quantize    the weight from bf16 to 4 bits
dequantize  and back to bf16
forward     y = x W^T on M rows; up to 4 rows cold: each call finds its weight out of cache
lora        y = x W^T + s (x A^T) B^T
dx          dX = dY W, the gradient alone
train       forward and backward of a layer with LoRA: y, dX, dA, dB
optimizer   AdamW on the layer's A and B
==========  ========================================================================================

====== ======================================== ==========================
dtype  of x, A, B, y                            of the products
====== ======================================== ==========================
fp32   fp32                                     fp32
mixed  fp32, what PEFT sends by default         bf16
bf16   bf16                                     bf16
fp16   fp16                                     fp16
====== ======================================== ==========================
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import limits, optimizers, refcheck, weights
from .contenders import FLOATS, Kept, Weight, attempt, ways
from .race import Contender, Race, race
from .shapes import Layer

__all__ = ["DTYPES", "OPS", "Case", "Pace", "cases", "contenders", "cost", "run"]

OPS = ("quantize", "dequantize", "forward", "lora", "dx", "train", "optimizer")
DTYPES = ("fp32", "mixed", "bf16", "fp16")
SCALING = 0.5  # LoRA's
COLD_ROWS = 4


@dataclass(frozen=True)
class Pace:
    """How long a race goes on (``race.Settings``)."""

    clock: str
    pairs: int
    patience: float
    quick: bool = False


@dataclass(frozen=True)
class Case:
    """What a line is of; lines of two runs with the same ``key`` are the same work."""

    op: str
    layer: Layer
    m: int = 0  # rows of x; 0 where there are none
    dtype: str = "bf16"
    blocksize: int = 64
    rank: int = 0
    format: str = "nf4"
    nested: bool = True

    @property
    def key(self) -> str:
        parts = [self.op, self.layer.size]
        parts += [f"M={self.m}"] if self.m else []
        parts += [f"r={self.rank}"] if self.rank else []
        parts += [self.dtype, f"{self.format}/{self.blocksize}"]
        return " ".join(parts + ([] if self.nested else ["fp32 scales"]))

    def x_dtype(self) -> torch.dtype:
        return FLOATS["fp32" if self.dtype == "mixed" else self.dtype]

    def compute(self) -> torch.dtype:
        return FLOATS["bf16" if self.dtype == "mixed" else self.dtype]


def cases(
    ops: Sequence[str], layers: Sequence[Layer], rows: Sequence[int], dtypes: Sequence[str],
    blocksizes: Sequence[int], rank: int, format: str, nested: bool,
) -> Iterator[Case]:  # fmt: skip
    """Every line, those of one weight after another.

    Training's ops (dx, train) are timed on the rows beyond decoding's, or on the most there are.
    """
    many = [m for m in rows if m > COLD_ROWS] or [max(rows)]
    for layer in layers:
        for blocksize in blocksizes:
            of = functools.partial(
                Case, layer=layer, blocksize=blocksize, format=format, nested=nested
            )
            for op in ("quantize", "dequantize"):
                if op in ops:
                    yield of(op)
            for dtype in dtypes:
                for op in ops:
                    if op in ("forward", "lora"):
                        ms = list(rows)
                    elif op in ("dx", "train"):
                        ms = many
                    else:
                        continue
                    r = rank if op in ("lora", "train") else 0
                    yield from (of(op, m=m, dtype=dtype, rank=r) for m in ms)
        if "optimizer" in ops:
            # Neither the weight's format nor its dtype matter to LoRA's parameters.
            yield Case("optimizer", layer, dtype="fp32", rank=rank)


def cost(case: Case, packed_bytes: float) -> tuple[float, float]:
    """``(flops, bytes)`` that the op cannot do without; bytes as if each were moved once."""
    n, k, m, r = case.layer.n, case.layer.k, case.m, case.rank
    size = case.x_dtype().itemsize
    rows = m * (n + k) * size
    if case.op in ("quantize", "dequantize"):
        return 0.0, 2.0 * n * k + packed_bytes
    if case.op == "optimizer":
        return 0.0, 28.0 * r * (n + k)  # fp32: p, m and v read and written, the gradient read
    lora_bytes = r * (n + k) * size
    if case.op == "train":
        flops = 4.0 * m * n * k + 6.0 * m * r * (n + k)
        return flops, 2 * (packed_bytes + rows + lora_bytes) + lora_bytes
    return 2.0 * m * n * k + 2.0 * m * r * (n + k), packed_bytes + rows + lora_bytes


# --- the contenders of a line ---------------------------------------------------------------------


def _places(kept: Kept, cold: bool, pace: Pace, device: torch.device) -> list[Any]:
    cache = None
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
    return kept.copies(limits.copies_for_cold(kept.copy_bytes, pace, cache) if cold else 1)


def _grad(x: Tensor, y: Tensor, dy: Tensor) -> Tensor:
    return torch.autograd.grad(y, x, dy, retain_graph=True)[0]


class Inputs:
    """Random x, dY, A and B of a case, on the device, the same in every round."""

    def __init__(self, case: Case, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(case.m + case.rank)
        n, k, m, r = case.layer.n, case.layer.k, case.m, case.rank

        def random(*size: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*size, generator=generator) * scale).to(device, case.x_dtype())

        self.x, self.dy = random(m, k), random(m, n)
        self.a = random(r, k, scale=k**-0.5) if r else None
        self.b = random(n, r, scale=0.1) if r else None
        self.rows = refcheck.chosen_rows(m)

    def of(self, t: Tensor) -> Tensor:
        """The rows that are checked, on the CPU."""
        return t[self.rows.to(t.device)].cpu()

    def forward(self, values: Tensor) -> refcheck.Terms:
        """y of the checked rows, in float64."""
        x = self.of(self.x)
        plain = refcheck.product(x, values)
        if self.a is None or self.b is None:
            return plain
        return plain + refcheck.product(x, self.a.cpu()).through(self.b.cpu(), SCALING)

    def backward(self, values: Tensor) -> refcheck.Terms:
        """dX of the checked rows, in float64."""
        dy = self.of(self.dy)
        plain = refcheck.product(dy, values, transposed=False)
        if self.a is None or self.b is None:
            return plain
        ds = refcheck.product(dy, self.b.cpu(), transposed=False)
        return plain + ds.through(self.a.cpu().T, SCALING)

    @functools.cached_property
    def lora_grads(self) -> tuple[refcheck.Terms, refcheck.Terms]:
        """dA and dB, in float64, of all rows."""
        assert self.a is not None and self.b is not None
        x, dy, a, b = (t.cpu() for t in (self.x, self.dy, self.a, self.b))
        ds = refcheck.product(dy, b, transposed=False)
        da = ds.transposed().through(x.T, SCALING)
        s = refcheck.product(x, a)
        return da, s.transposed().through(dy.T, SCALING).transposed()


def contenders(
    case: Case, weight: Weight, inputs: Inputs, backends: Sequence[str], peers: Sequence[str],
    pace: Pace, check: bool = True,
) -> Iterator[Contender]:  # fmt: skip
    """Everybody who can do this line's work, built one after another."""
    if case.op in ("quantize", "dequantize"):
        yield from weights.contenders(case.op, weight, backends, peers)
        return
    if case.op == "optimizer":
        device = weight.packed.device
        yield from optimizers.contenders(case.layer, case.rank, device, peers)
        return
    compute = case.compute()
    known: dict[int, Any] = {}  # references, by the values that they are of

    def reference(kept: Kept, of: Callable[[Tensor], Any]) -> Any:
        if id(kept.values) not in known:
            known[id(kept.values)] = (of(kept.values), kept.values)
        return known[id(kept.values)][0]

    for name, make in ways(weight, case.x_dtype(), compute, backends, peers):

        def contender(make: Callable[[], Kept] = make) -> Contender:
            kept = make()
            with kept.around():
                return _contender(case, kept, inputs, pace, reference, compute, check)

        yield attempt(name, contender)


def _contender(
    case: Case, kept: Kept, inputs: Inputs, pace: Pace, reference: Callable, compute: torch.dtype,
    check: bool,
) -> Contender:  # fmt: skip
    cold = is_cold(case)
    copies = _places(kept, cold, pace, inputs.x.device)
    x, a, b = inputs.x, inputs.a, inputs.b
    run: Callable[[int], Any]
    if case.op == "forward":

        def run(i: int) -> Any:
            return kept.linear(x, copies[i % len(copies)])

    elif case.op == "lora":

        def run(i: int) -> Any:
            return kept.lora(x, copies[i % len(copies)], a, b, SCALING)

    elif case.op == "dx":
        with torch.enable_grad():
            wanted = x.detach().requires_grad_()
            y = kept.linear(wanted, copies[0])
        dy = inputs.dy.to(y.dtype)

        def run(i: int) -> Any:
            return _grad(wanted, y, dy)

    else:
        leaves = [t.detach().clone().requires_grad_() for t in (x, a, b)]

        def run(i: int) -> Any:
            with torch.enable_grad():
                out = kept.lora(leaves[0], copies[0], leaves[1], leaves[2], SCALING)
                return torch.autograd.grad(out, leaves, inputs.dy.to(out.dtype))

    if not check:
        return Contender(kept.name, run, None, kept.around)
    if case.op == "train":
        dx = reference(kept, inputs.backward)

        def right(result: Any) -> str | None:
            da, db = inputs.lora_grads
            whats = (("dX", dx, inputs.rows), ("dA", da, None), ("dB", db, None))
            for (what, want, rows), got in zip(whats, result, strict=True):
                wrong = refcheck.within(want, compute, rows)(got)
                if wrong:
                    return f"{what}: {wrong}"
            return None

    else:
        want = reference(kept, inputs.backward if case.op == "dx" else inputs.forward)
        right = refcheck.within(want, compute, inputs.rows)
    return Contender(kept.name, run, right, kept.around)


def is_cold(case: Case) -> bool:
    return case.op in ("forward", "lora") and case.m <= COLD_ROWS


def run(
    case: Case, weight: Weight, device: torch.device, backends: Sequence[str],
    peers: Sequence[str], pace: Pace, check: bool = True, skip: frozenset[str] = frozenset(),
) -> Race:  # fmt: skip
    """Checks and times a line; ``skip`` names contenders that are left out."""
    inputs = Inputs(case, device)
    with torch.no_grad():
        everybody = contenders(case, weight, inputs, backends, peers, pace, check)
        field = (c for c in everybody if c.name not in skip)
        return race(field, pace, cold=is_cold(case), check=check, wait=limits.wait_for(device))
