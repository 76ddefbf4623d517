"""AdamW with 32-bit or 8-bit states, in memory or paged: bitsandbytes' names and formulas.

==================  ======  =====================================================================
class               states  where they are
==================  ======  =====================================================================
``AdamW``           32-bit  beside the parameters
``AdamW8bit``       8-bit   beside the parameters
``PagedAdamW``      32-bit  on a CPU in a mapped file, which the system pages in and out; a CUDA
``PagedAdamW32bit``         parameter's in pinned host memory, copied for its update
``PagedAdamW8bit``  8-bit   the same
==================  ======  =====================================================================

One step, ``t`` counted from 1, in fp32::

    p = p (1 - lr weight_decay)
    m = beta1 m + (1 - beta1) g             v = beta2 v + (1 - beta2) g^2
    p = p - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

8-bit states (arXiv 2110.02861) are codes of the dynamic map (formats.nested_code; for v its
unsigned kin) and one fp32 absmax for each 256 values. They are decoded, updated, and rounded to the
nearest code; a code does not change the sign of its value, so that a small m keeps its direction.
Tensors of fewer than 4096 values keep 32-bit states, as bitsandbytes', and a gradient that is not
finite leaves 8-bit states of its values at zero and the parameter alone.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor

from .formats import nested_code, unsigned_code

BLOCK = 256
"""Values of an 8-bit state that share one absmax."""

MIN_8BIT_SIZE = 4096
"""Tensors with fewer values keep 32-bit states."""

_CHUNK = 1 << 20  # values updated at a time: what is decoded beside the state stays small


class PagedFile:
    """Memory of a file that has no name any more: the system writes its pages out when memory is
    short, and gives it back when the last tensor on it is gone."""

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self.folder = folder

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A CPU tensor of zeros on the file.

        Raises:
            OSError: the folder cannot be written to, or is full; it is named.
        """
        size = math.prod(shape) * dtype.itemsize
        if size == 0:
            return torch.zeros(shape, dtype=dtype)
        folder: Any = self.folder or os.environ.get("QLORA_KERNELS_PAGING") or tempfile.gettempdir()
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                # Reserved now: a full disk is an error here and not a crash at some later step.
                os.posix_fallocate(file.fileno(), 0, size)
                memory = mmap.mmap(file.fileno(), size)
        except OSError as error:
            raise OSError(
                error.errno,
                f"no room for {size / 2**20:.0f} MiB of paged optimizer states in {folder} "
                f"({error.strerror}); QLORA_KERNELS_PAGING names another folder",
            ) from None
        return torch.frombuffer(memory, dtype=dtype, count=math.prod(shape)).view(shape)


def quantize_state(values: Tensor, code: Tensor, codes: Tensor, absmax: Tensor) -> None:
    """fp32 ``values [n]`` into ``codes`` uint8 ``[n]`` and ``absmax`` fp32 ``[ceil(n / 256)]``."""
    n = values.numel()
    rows = torch.nn.functional.pad(values, (0, -n % BLOCK)).view(-1, BLOCK)
    absmax.copy_(rows.abs().amax(1))
    normalized = rows / absmax.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    middles = (code[1:] + code[:-1]) / 2
    q = torch.bucketize(normalized, middles)
    q += ((code[q] >= 0) & (normalized < 0)).to(q.dtype) * -1  # a negative value keeps its sign
    q += ((code[q] < 0) & (normalized >= 0)).to(q.dtype)
    codes.copy_(q.view(-1)[:n].to(torch.uint8))


def dequantize_state(codes: Tensor, code: Tensor, absmax: Tensor) -> Tensor:
    """What :func:`quantize_state` kept, fp32 ``[n]``."""
    scale = absmax.repeat_interleave(BLOCK)[: codes.numel()]
    return code[codes.long()] * scale


class AdamW(torch.optim.Optimizer):
    """AdamW; see the module for its formulas. Arguments are ``torch.optim.AdamW``'s.

    Args:
        optim_bits: 32 or 8.
        is_paged: states on pages that the system may write out.
        paging_folder: where, for parameters on a CPU; ``QLORA_KERNELS_PAGING`` or the system's
            folder for temporary files unless given. Choose one on a disk: ``/tmp`` may be memory.

    Raises:
        ValueError: a learning rate, beta, eps or decay that is out of range; the message says what
            it may be.
    """

    bits, paged = 32, False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        optim_bits: int | None = None,
        is_paged: bool | None = None,
        paging_folder: str | os.PathLike[str] | None = None,
    ) -> None:
        self.bits = self.bits if optim_bits is None else optim_bits
        self.paged = self.paged if is_paged is None else is_paged
        if self.bits not in (8, 32):
            raise ValueError(f"optim_bits must be 8 or 32, got {self.bits}")
        if not float(lr) >= 0:
            raise ValueError(f"lr must be at least 0, got {lr}")
        if not all(0 <= b < 1 for b in betas):
            raise ValueError(f"betas must be in [0, 1), got {betas}")
        if not eps >= 0:
            raise ValueError(f"eps must be at least 0, got {eps}")
        if not weight_decay >= 0:
            raise ValueError(f"weight_decay must be at least 0, got {weight_decay}")
        self._file = PagedFile(paging_folder)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    def _zeros(self, p: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if not self.paged:
            return torch.zeros(shape, dtype=dtype, device=p.device)
        if p.device.type == "cpu":
            return self._file.zeros(shape, dtype)
        return torch.zeros(shape, dtype=dtype, pin_memory=p.device.type == "cuda")

    def _start(self, p: Tensor, state: dict[str, Any]) -> None:
        state["step"] = 0
        n = p.numel()
        if self.bits == 8 and n >= MIN_8BIT_SIZE:
            for name in ("state1", "state2"):
                state[name] = self._zeros(p, (n,), torch.uint8)
                # The code of zero, so that an untouched state decodes to what it is.
                code = nested_code() if name == "state1" else unsigned_code()
                state[name].fill_(int((code == 0).nonzero()[0]))
            for name in ("absmax1", "absmax2"):
                state[name] = self._zeros(p, (-(-n // BLOCK),), torch.float32)
        else:
            for name in ("state1", "state2"):
                state[name] = self._zeros(p, (n,), torch.float32)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.is_sparse:
                    raise ValueError("AdamW takes no sparse gradients; use torch.optim.SparseAdam")
                state = self.state[p]
                if not state:
                    self._start(p, state)
                state["step"] += 1
                self._update(p, state, group)
        return loss

    def _update(self, p: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        values = p.data.reshape(-1)
        grads = p.grad.reshape(-1)  # type: ignore[union-attr]
        for begin in range(0, p.numel(), _CHUNK):
            part = slice(begin, begin + _CHUNK)
            blocks = slice(begin // BLOCK, -(-min(begin + _CHUNK, p.numel()) // BLOCK))
            _update_chunk(values[part], grads[part], state, part, blocks, group)
        if not p.is_contiguous():
            p.data.copy_(values.view(p.shape))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but states keep their dtype and their place, paged ones included."""
        super().load_state_dict(state_dict)
        ids = [i for g in state_dict["param_groups"] for i in g["params"]]
        own = [p for g in self.param_groups for p in g["params"]]
        for i, p in zip(ids, own, strict=True):
            saved = state_dict["state"].get(i)
            if saved is None:
                continue
            state = self.state[p] = {}
            for name, value in saved.items():
                if isinstance(value, Tensor):
                    state[name] = self._zeros(p, tuple(value.shape), value.dtype)
                    state[name].copy_(value)
                else:
                    state[name] = value


def _update_chunk(
    p: Tensor,
    grad: Tensor,
    state: dict[str, Any],
    part: slice,
    blocks: slice,
    group: dict[str, Any],
) -> None:
    """The module's formulas on some values; ``p`` and the states are written."""
    device, (beta1, beta2), lr = p.device, group["betas"], float(group["lr"])
    g = grad.float()
    kept1, kept2 = state["state1"][part], state["state2"][part]
    eight = kept1.dtype == torch.uint8
    if eight:
        codes = nested_code(device), unsigned_code(device)
        absmax = [state[name][blocks].to(device) for name in ("absmax1", "absmax2")]
        m = dequantize_state(kept1.to(device), codes[0], absmax[0])
        v = dequantize_state(kept2.to(device), codes[1], absmax[1])
        finite = g.isfinite()
        g = torch.where(finite, g, 0)
    else:
        m, v = kept1.to(device), kept2.to(device)
    m = m.mul(beta1).add_(g, alpha=1 - beta1)
    v = v.mul(beta2).addcmul_(g, g, value=1 - beta2)
    if eight:
        m, v = torch.where(finite, m, 0), torch.where(finite, v, 0)
    t = state["step"]
    denominator = v.sqrt().div_(math.sqrt(1 - beta2**t)).add_(group["eps"])
    updated = p.float() * (1 - lr * group["weight_decay"])
    updated.addcdiv_(m, denominator, value=-lr / (1 - beta1**t))
    p.copy_(torch.where(finite, updated, p.float()) if eight else updated)
    if eight:
        for values, code, kept, name, scale in (
            (m, codes[0], kept1, "absmax1", absmax[0]),
            (v, codes[1], kept2, "absmax2", absmax[1]),
        ):
            quantized = torch.empty_like(kept, device=device)
            quantize_state(values, code, quantized, scale)
            kept.copy_(quantized)
            state[name][blocks].copy_(scale)
    else:
        kept1.copy_(m)
        kept2.copy_(v)


class AdamW8bit(AdamW):
    """:class:`AdamW` with 8-bit states: 2 bytes a parameter instead of 8."""

    bits = 8


class PagedAdamW(AdamW):
    """:class:`AdamW` with paged states."""

    paged = True


class PagedAdamW32bit(PagedAdamW):
    """:class:`PagedAdamW` by bitsandbytes' other name."""


class PagedAdamW8bit(AdamW8bit):
    """:class:`AdamW8bit` with paged states."""

    paged = True


__all__ = ["AdamW", "AdamW8bit", "PagedAdamW", "PagedAdamW8bit", "PagedAdamW32bit"]
