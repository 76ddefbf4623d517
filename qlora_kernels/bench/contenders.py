"""Who can do an op here: this package on each backend, and the peers that are installed.

A way of keeping a weight (:class:`Ours`, :class:`Peer`, ...) knows how to quantize, dequantize and
multiply with it. Everything else (LoRA as PEFT writes it, gradients by autograd) is made of that.
"""

from __future__ import annotations

import copy
import difflib
import functools
import importlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .. import backend as backends_module
from .. import functional as F4
from .. import reference
from ..finetune.errors import BadInput
from .machine import version
from .race import Contender

__all__ = ["PEERS", "Kept", "Weight", "attempt", "choose_backends", "choose_peers", "ways"]

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# --- who is here ----------------------------------------------------------------------------------

_TORCHAO = ("torchao.dtypes.nf4tensor", "torchao.quantization.quantize_.workflows.nf4.nf4_tensor")


@functools.cache
def _torchao() -> Any:
    """torchao's NF4, wherever its version has it."""
    last: Exception | None = None
    for name in _TORCHAO:
        try:
            return importlib.import_module(name)
        except Exception as error:  # what a library for another torch raises is its own
            last = error
    raise ImportError(f"{type(last).__name__}: {last}")


def _why_not_bitsandbytes() -> str | None:
    if version("bitsandbytes") is None:
        return "not installed"
    try:
        importlib.import_module("bitsandbytes")
    except Exception as error:
        return str(error).splitlines()[0]
    return None


def _why_not_torchao() -> str | None:
    if version("torchao") is None:
        return "not installed"
    try:
        _torchao()
    except ImportError as error:
        return str(error).splitlines()[0]
    return None


PEERS: dict[str, Callable[[], str | None]] = {
    "bitsandbytes": _why_not_bitsandbytes,
    "torch": lambda: None,
    "torchao": _why_not_torchao,
}
"""Each peer, and what says why it cannot run here, or None."""


def choose_peers(names: Sequence[str] | None) -> tuple[list[str], dict[str, str]]:
    """The peers to race against, and of those that are not here the reason.

    Args:
        names: those that are wanted; all unless given; ``["none"]`` for none.

    Raises:
        BadInput: a name that is none, or a peer asked for by name that cannot run here.
    """
    if names is not None and list(names) == ["none"]:
        return [], {}
    for name in names or ():
        if name not in PEERS:
            near = difflib.get_close_matches(name, PEERS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise BadInput(f"there is no peer {name!r}{hint} (there are {', '.join(PEERS)}, none)")
    missing = {n: why for n in names or PEERS if (why := PEERS[n]()) is not None}
    if names and missing:
        raise BadInput("; ".join(f"{n} cannot run here: {why}" for n, why in missing.items()))
    return [n for n in names or PEERS if n not in missing], missing


def choose_backends(device: torch.device, names: Sequence[str] | None) -> list[str]:
    """This package's backends for a device.

    Raises:
        BadInput: one that is not for this device, or that cannot run here; says why.
    """
    offered = ("cpu",) if device.type == "cpu" else ("cuda", "triton")
    can = backends_module.backends()
    for name in names or ():
        if name not in offered:
            raise BadInput(f"backend {name!r} is not for {device}: {' or '.join(offered)}")
        if can[name] is not None:
            raise BadInput(f"backend {name!r} cannot run here: {can[name]}")
    return [n for n in names or offered if can[n] is None]


def attempt(name: str, make: Callable[[], Contender]) -> Contender:
    """The contender; or, where a peer that is installed does not run here, one that says why."""
    try:
        return make()
    except Exception as error:  # a library's own kinds too
        failure = error

        def run(_: int) -> None:
            raise failure

        return Contender(name, run)


# --- ways of keeping a weight ---------------------------------------------------------------------


class Kept:
    """A weight ``[n, k]`` as somebody keeps it, in as many copies as a cold run needs.

    Attributes:
        name: of the contender.
        values: fp32 ``[n, k]`` on the CPU: what its products are checked against.
        copy_bytes: what one copy takes.
    """

    name: str
    values: Tensor
    copy_bytes: int

    def __init__(self) -> None:
        self._copies: list[Any] = []

    def around(self) -> AbstractContextManager:
        return nullcontext()

    def copies(self, count: int) -> list[Any]:
        while len(self._copies) < count:
            self._copies.append(self.another())
        return self._copies[:count]

    def another(self) -> Any:
        raise NotImplementedError

    def linear(self, x: Tensor, kept: Any) -> Tensor:
        raise NotImplementedError

    def lora(self, x: Tensor, kept: Any, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        """As PEFT writes it around a base layer."""
        return self.linear(x, kept) + torch.nn.functional.linear(
            torch.nn.functional.linear(x, a), b
        ) * scaling  # fmt: skip


class Ours(Kept):
    """This package's ops on a backend."""

    def __init__(self, weight: Any, compute: torch.dtype, backend: str) -> None:
        super().__init__()
        self.name, self.compute, self.backend = f"qlora {backend}", compute, backend
        self.packed, self.state = weight.packed, weight.state
        self.values, self.copy_bytes = weight.values, weight.packed_bytes

    def around(self) -> AbstractContextManager:
        if self.packed.device.type == "cpu":
            return nullcontext()
        return backends_module.set_backend(self.backend)

    def another(self) -> Any:
        return self.packed.clone(), copy.deepcopy(self.state)

    def linear(self, x: Tensor, kept: Any) -> Tensor:
        return F4.linear_4bit(x, *kept, compute_dtype=self.compute)

    def lora(self, x: Tensor, kept: Any, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        packed, state = kept
        return F4.linear_4bit(
            x, packed, state, None, a, b, scaling=scaling, compute_dtype=self.compute
        )


class Dense(Kept):
    """torch's linear layer of one dtype on the dequantized weight."""

    def __init__(self, weight: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.name = f"torch {next(k for k, v in FLOATS.items() if v == dtype)}"
        self.dtype, self.device = dtype, weight.packed.device
        self.values = weight.values
        self.copy_bytes = weight.values.numel() * dtype.itemsize

    def another(self) -> Any:
        return self.values.to(self.device, self.dtype, copy=True)

    def linear(self, x: Tensor, kept: Any) -> Tensor:
        return torch.nn.functional.linear(x.to(self.dtype), kept)

    def lora(self, x: Tensor, kept: Any, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        x, a, b = (t.to(self.dtype) for t in (x, a, b))
        return super().lora(x, kept, a, b, scaling)


class Peer(Kept):
    """bitsandbytes' Linear4bit as it is trained, or as ``eval()`` repacks it."""

    def __init__(self, weight: Any, compute: torch.dtype, repacked: bool = False) -> None:
        super().__init__()
        self.name = "bitsandbytes" + (" repacked" if repacked else "")
        self.weight, self.compute, self.repacked = weight, compute, repacked
        self.values, self.copy_bytes = weight.values, weight.packed_bytes

    def another(self) -> Any:
        import bitsandbytes as bnb

        w = self.weight
        layer = bnb.nn.Linear4bit(
            w.k, w.n, bias=False, compute_dtype=self.compute, quant_type=w.format,
            compress_statistics=w.nested,
        )  # fmt: skip
        layer.weight = bnb.nn.Params4bit(
            w.original.to(self.compute, copy=True), requires_grad=False, quant_type=w.format,
            blocksize=w.blocksize, compress_statistics=w.nested,
        )  # fmt: skip
        return layer.to(w.packed.device).train(not self.repacked)

    def linear(self, x: Tensor, kept: Any) -> Tensor:
        return kept(x)


class TorchAo(Kept):
    """torchao's NF4: its own scales, and a codebook of four digits, so that its values differ."""

    name = "torchao"

    def __init__(self, weight: Any, compute: torch.dtype) -> None:
        super().__init__()
        self.original = weight.original.to(compute)
        self.kept = _torchao().to_nf4(self.original, weight.blocksize, 256)
        self.values = self.kept.get_original_weight().float().cpu()
        wrong = weight.as_near(self.values)
        if wrong:
            raise ValueError(wrong)
        self.copy_bytes = weight.packed_bytes
        self._copies = [self.kept]

    def another(self) -> Any:
        return self.kept.clone()

    def linear(self, x: Tensor, kept: Any) -> Tensor:
        # Its op takes x in the dtype of the weight that it was made of.
        return _torchao().linear_nf4(x.to(self.original.dtype), kept)


def can_repack() -> bool:
    """Whether bitsandbytes repacks weights for this processor."""
    try:
        from bitsandbytes.functional import has_avx512bf16
    except ImportError:
        return False
    return bool(has_avx512bf16())


def ways(
    weight: Any, x_dtype: torch.dtype, compute: torch.dtype, backends: Sequence[str],
    peers: Sequence[str],
) -> list[tuple[str, Callable[[], Kept]]]:  # fmt: skip
    """Everybody's way of keeping a weight, made when it is asked for: ``(name, make)``."""
    found: list[tuple[str, Callable[[], Kept]]] = [
        (f"qlora {b}", functools.partial(Ours, weight, compute, b)) for b in backends
    ]
    if "bitsandbytes" in peers:
        found.append(("bitsandbytes", lambda: Peer(weight, compute)))
        if weight.packed.device.type == "cpu" and compute != torch.float32 and can_repack():
            found.append(("bitsandbytes repacked", lambda: Peer(weight, compute, repacked=True)))
    if "torch" in peers:
        for dtype in dict.fromkeys((x_dtype, compute)):
            name = next(k for k, v in FLOATS.items() if v == dtype)
            found.append((f"torch {name}", functools.partial(Dense, weight, dtype)))
    # One format, one size of block, one kind of scales.
    if "torchao" in peers and weight.format == "nf4" and weight.nested:
        found.append(("torchao", lambda: TorchAo(weight, compute)))
    return found


# --- a weight -------------------------------------------------------------------------------------


class Weight:
    """One quantized weight ``[n, k]``: random, of the spread that trained layers have.

    Attributes:
        original: bf16, on the device.
        packed, state: quantized by this package; ``values``: dequantized by ``reference``, fp32,
            on the CPU.
    """

    def __init__(
        self, n: int, k: int, device: torch.device, *, blocksize: int = 64, format: str = "nf4",
        nested: bool = True,
    ) -> None:  # fmt: skip
        self.n, self.k, self.blocksize, self.format, self.nested = n, k, blocksize, format, nested
        generator = torch.Generator().manual_seed(n * 31 + k)
        original = (torch.randn(n, k, generator=generator) * 0.02).to(torch.bfloat16)
        self.original = original.to(device)
        self.packed, self.state = F4.quantize_4bit(
            self.original, blocksize=blocksize, quant_type=format, compress_statistics=nested
        )
        packed, state = self.packed.cpu().view(-1), self.state.moved("cpu")
        scales = (
            reference.dequantize_absmax(state.absmax, state.state2.absmax, state.offset)
            if nested
            else state.absmax
        )
        self.scales = scales
        self.values = reference.dequantize(packed, scales, state.code, blocksize, (n, k))
        tensors = [packed, state.absmax, state.code]
        if nested:
            tensors += [state.state2.absmax, state.state2.code]
        self.packed_bytes = sum(t.numel() * t.element_size() for t in tensors)

    def as_near(self, values: Tensor) -> str | None:
        """Whether another's NF4, with scales and rounding of its own, is as near to the original as
        the format allows: 10% beyond the reference's error at most. What is wrong, or None."""
        original = self.original.cpu().float()
        ours = (self.values - original).norm().item()
        theirs = (values.cpu().float() - original).norm().item()
        if theirs <= 1.1 * ours:
            return None
        return f"its error is {theirs / ours:.2f} times that of {self.format}, at most 1.10"
