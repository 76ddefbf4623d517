"""AdamW with 32-bit or 8-bit states, in memory or paged: bitsandbytes' names and formulas.

==================  ======  =====================================================================
class               states  where they are
==================  ======  =====================================================================
``AdamW``           32-bit  beside the parameters
``AdamW8bit``       8-bit   beside the parameters
``PagedAdamW``      32-bit  on a CPU in a mapped file, which the system pages in and out; a CUDA
``PagedAdamW32bit``         parameter's in managed memory, fetched ahead of its update, or, where
                            the driver could not hold that, in pinned host memory and copied for it
                            (``paging.py``)
``PagedAdamW8bit``  8-bit   the same
==================  ======  =====================================================================

``AdamW32bit`` is ``AdamW``. ``Adam`` and its kin are the same classes with a weight decay of 0 by
default: in bitsandbytes, too, decay is decoupled under both names.

One step, ``t`` counted from 1, in fp32::

    m = beta1 m + (1 - beta1) g             v = beta2 v + (1 - beta2) (g g)
    p = (1 - lr weight_decay) p - (m / (sqrt(v) (1 / sqrt(1 - beta2^t)) + eps)) (lr / (1 - beta1^t))

Each operation is rounded once, without fma, and what is made of ``t`` and the options is rounded
to fp32 once: so states have the same bits on every device. p may differ by 2^-21 of its change, and
its own rounding: torch's root on a CPU is not always the nearest (MKL's), and with 8-bit states a
GPU's quotient and root are approximations.

8-bit states (arXiv 2110.02861) are codes of the dynamic map (formats.nested_code; for v its
unsigned kin) and one fp32 absmax for each 256 values. They are decoded, updated, and rounded to the
code nearest to the value times 1 / absmax; a code does not change the sign of its value, so that a
small m keeps its direction. Tensors of fewer than 4096 values keep 32-bit states, as bitsandbytes',
and a gradient that is not finite, or whose square is not, leaves 8-bit states of its values at zero
and the parameter alone.

On CUDA one kernel updates a group of parameters (``csrc/cuda/adamw.cu``); elsewhere, and for
parameters that are not contiguous or have a gradient of another dtype, it is torch's arithmetic.
``QLORA_KERNELS_DISABLE=adamw`` switches the kernel off, and so does its check at first use on a
device (``cuda.py``).

A captured step (``torch.cuda.graph``) needs ``capturable=True``, as torch's: then t is a tensor
beside the states and the scalars are made of it on the device, so that each replay takes the next
step; without it every replay would take the captured one, which is refused. The learning rate is
read at each replay where it is a tensor on the device.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from . import cuda, ops, paging
from .formats import constant, nested_code, unsigned_code
from .overrides import GlobalOptimManager

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
    normalized = rows * absmax.clamp(min=torch.finfo(torch.float32).tiny).reciprocal()[:, None]
    q = torch.bucketize(normalized, _middles(code))
    q -= ((code[q] >= 0) & (rows < 0)).to(q.dtype)  # a negative value keeps its sign
    q += ((code[q] < 0) & (rows >= 0)).to(q.dtype)
    codes.copy_(q.view(-1)[:n].to(torch.uint8))


def _middles(code: Tensor) -> Tensor:
    return (code[1:] + code[:-1]) / 2


def dequantize_state(codes: Tensor, code: Tensor, absmax: Tensor) -> Tensor:
    """What :func:`quantize_state` kept, fp32 ``[n]``."""
    scale = absmax.repeat_interleave(BLOCK)[: codes.numel()]
    return code[codes.long()] * scale


# --- the same on CUDA: tables, and what calls the kernel -----------------------------------------

_SMALLEST = 2.0**-23  # values below it, absmax being 1, have the code of zero or the one beside it
_SEARCH = 2948  # words of a search table: kStateSearch of csrc/cuda/adamw.h


def search_table(code: np.ndarray, dropped: int, signed: bool) -> np.ndarray:
    """How csrc/cuda/adamw.cu finds the nearest code: a word for each bucket of values.

    A value in [2^-23, 1] without its lowest ``dropped`` bits is its bucket; negative ones have
    buckets of their own, and count backwards in theirs. Adding the value, shifted so that those
    bits end below the top byte, to the word leaves its code there.

    Raises:
        ValueError: two boundaries between codes in one bucket.
    """
    edges = ((code[1:] + code[:-1]) / np.float32(2)).astype(np.float64)
    zero = int(np.searchsorted(code, 0.0))
    if zero > 0:
        edges[zero - 1] = -(2.0**-149)  # a code does not change its value's sign
    near = np.abs(edges[np.abs(edges) > 2.0**-149])
    if (near <= _SMALLEST).any():
        raise ValueError("a code's boundary lies below 2^-23 of the largest")
    first, last = (int(np.float32(v).view(np.uint32)) >> dropped for v in (_SMALLEST, 1.0))
    mask = (1 << dropped) - 1
    table = np.zeros(_SEARCH, np.uint32)
    for negative in (False, True)[: 1 + signed]:
        keys = np.arange(first, last + 1, dtype=np.int64)
        ends = [((keys << dropped) | low).astype(np.uint32).view(np.float32) for low in (0, mask)]
        lowest, highest = (e.astype(np.float64) for e in (ends if not negative else ends[::-1]))
        if negative:
            lowest, highest = -lowest, -highest
        below, above = (np.searchsorted(edges, v) for v in (lowest, highest))
        if (above - below > 1)[:-1].any():
            raise ValueError("two boundaries between codes lie in one bucket: drop fewer bits")
        # The last value of a bucket that keeps the lower code.
        bits = np.abs(edges[np.minimum(below, edges.size - 1)]).astype(np.float32).view(np.uint32)
        kept = bits.astype(np.int64) & mask
        if negative:
            kept, keys = mask - kept, ~keys
        carry = np.where(above > below, mask - kept, 0)
        words = (((below - keys) & 0xFF) << 24) | (carry << (24 - dropped))
        begin = _SEARCH // 2 if negative else 0
        table[begin : begin + keys.size] = words.astype(np.uint32)
    return table


def state_maps(device: torch.device | str = "cpu") -> Tensor:
    """What the kernel needs to know of both maps, int32: for each its values and its search."""
    words = []
    for code, dropped, signed in ((nested_code(), 17, True), (unsigned_code(), 16, False)):
        values = code.numpy()
        words += [values.view(np.uint32), search_table(values, dropped, signed)]
    return constant("state_maps", np.concatenate(words).view(np.int32), device)


SCHEMA = (
    "adamw_capturable_(Tensor(a!)[] p, Tensor[] grad, Tensor(b!)[] state1, Tensor(c!)[] state2, "
    "Tensor(d!)[] absmax1, Tensor(e!)[] absmax2, Tensor? maps, Tensor(f!)[] t, Tensor? lr, "
    "float[] options, Tensor(g!) scratch, bool paged) -> ()"
)
"""adamw_ (``ops.py``) where a graph may replay it. ``t``: fp32, the steps that each p has taken,
counted up. Options: lr, for want of a tensor of it, beta1, beta2, eps, weight_decay. ``scratch``:
fp32 [len(p), 8], for the scalars."""
_LIB = torch.library.Library(ops.NAMESPACE, "FRAGMENT")
_LIB.define(SCHEMA)


@torch.library.register_fake(f"{ops.NAMESPACE}::adamw_capturable_", lib=_LIB)
def _(p, grad, state1, state2, absmax1, absmax2, maps, t, lr, options, scratch, paged):
    return None


@dataclass(frozen=True)
class Kernel:
    """The ops that update parameters of a device, and the device's managed memory."""

    op: Callable[..., None]
    capturable: Callable[..., None]
    driver: paging.Driver


def kernel_for(p: Tensor) -> Kernel | None:
    """What updates ``p``, or None: torch's arithmetic."""
    if p.device.type != "cuda":
        return None
    lib = cuda.library()
    if lib is None or not cuda.enabled("adamw") or not cuda.passes("adamw", check, p.device):
        return None
    space = torch.ops.qlora_kernels
    return Kernel(space.adamw_, space.adamw_capturable_, paging.driver_of(lib, p.device))


def _capturing(p: Tensor) -> bool:
    """Whether what is done to ``p`` now goes into a graph."""
    return p.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class AdamW(torch.optim.Optimizer):
    """AdamW; see the module for its formulas. Arguments are bitsandbytes', and stand where they do.

    Args:
        amsgrad: must be False.
        optim_bits: 32 or 8. A class with 8-bit states has them whatever is given here.
        args: an object that says ``optim_bits`` and ``min_8bit_size`` in place of the arguments.
        min_8bit_size: tensors with fewer values keep 32-bit states.
        is_paged: states on pages that the system may write out; a paged class has them so anyway.
        paging_folder: where, for parameters on a CPU; ``QLORA_KERNELS_PAGING`` or the system's
            folder for temporary files unless given. Choose one on a disk: ``/tmp`` may be memory.
        capturable: whether a CUDA graph may capture :meth:`step`, after a first step outside of it.
            A learning rate that is to change between replays is a fp32 tensor on the device.

    Raises:
        ValueError: a learning rate, beta, eps or decay that is out of range; the message says what
            it may be.
    """

    bits, paged, min_8bit_size = 32, False, MIN_8BIT_SIZE

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = MIN_8BIT_SIZE,
        is_paged: bool = False,
        *,
        paging_folder: str | os.PathLike[str] | None = None,
        capturable: bool = False,
    ) -> None:
        if amsgrad:
            raise ValueError("amsgrad must be False: its third state is not offered")
        if args is not None:
            optim_bits = getattr(args, "optim_bits", optim_bits)
            min_8bit_size = getattr(args, "min_8bit_size", min_8bit_size)
            for name in ("max_unorm", "skip_zeros"):
                if getattr(args, name, None):
                    raise ValueError(f"args.{name} is not offered, got {getattr(args, name)}")
        if optim_bits not in (8, 32):
            raise ValueError(f"optim_bits must be 8 or 32, got {optim_bits}")
        self.bits = min(self.bits, optim_bits)
        self.paged = self.paged or is_paged
        self.min_8bit_size = min_8bit_size
        if not float(lr) >= 0:
            raise ValueError(f"lr must be at least 0, got {lr}")
        if not all(0 <= b < 1 for b in betas):
            raise ValueError(f"betas must be in [0, 1), got {betas}")
        if not eps >= 0:
            raise ValueError(f"eps must be at least 0, got {eps}")
        if not weight_decay >= 0:
            raise ValueError(f"weight_decay must be at least 0, got {weight_decay}")
        self._file = PagedFile(paging_folder)
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
            "capturable": capturable,
        }  # fmt: skip
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("capturable", False)  # of an older checkpoint

    def _allocate(self, p: Tensor, layout: paging.Layout) -> dict[str, Tensor]:
        kernel = kernel_for(p)
        if not self.paged:
            return {
                name: torch.zeros(shape, dtype=dtype, device=p.device)
                for name, (shape, dtype) in layout.items()
            }
        if kernel is not None:
            return paging.zeros(layout, kernel.driver)
        if p.device.type == "cpu":
            return {name: self._file.zeros(*one) for name, one in layout.items()}
        return paging.zeros(layout, None, pin=p.device.type == "cuda")

    def _start(self, p: Tensor, group: dict[str, Any] | None = None) -> dict[str, Any]:
        group = group or {}
        n = p.numel()
        bits, smallest = group.get("optim_bits", self.bits), group.get("min_8bit_size")
        eight = bits == 8 and n >= (self.min_8bit_size if smallest is None else smallest)
        dtype = torch.uint8 if eight else torch.float32
        layout: paging.Layout = dict.fromkeys(("state1", "state2"), ((n,), dtype))
        if eight:
            for name in ("absmax1", "absmax2"):
                layout[name] = ((-(-n // BLOCK),), torch.float32)
        states = self._allocate(p, layout)
        if eight:
            # The code of zero, so that an untouched state decodes to what it is.
            states["state1"].fill_(int((nested_code() == 0).nonzero()[0]))
            states["state2"].fill_(int((unsigned_code() == 0).nonzero()[0]))
        return {"step": 0, **states}

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
        for group, members in self._settings():
            together: dict[tuple, list[Tensor]] = {}
            for p in members:
                if p.grad is None:
                    continue
                if p.grad.is_sparse:
                    raise ValueError("AdamW takes no sparse gradients; use torch.optim.SparseAdam")
                state = self._ready(p, group)
                t = state["step"]
                if self._kernel_takes(p, state):
                    key: tuple = (p.device, p.dtype, state["state1"].dtype)
                    if not group["capturable"]:  # of one step, whose scalars are a launch's
                        state["step"] = t = t + 1
                        key = (*key, t)
                    together.setdefault(key, []).append(p)
                else:
                    state["step"] += 1  # a tensor stays where it is
                    self._update(p, state, group)
            for params in together.values():
                self._update_together(params, group)
        return loss

    def _settings(self) -> Iterator[tuple[dict[str, Any], list[Tensor]]]:
        """Hyperparameters, and the parameters that they are for: groups, and apart from them what
        GlobalOptimManager overrides."""
        configs = GlobalOptimManager.get_instance().configs()
        for group in self.param_groups:
            if not configs:
                yield group, group["params"]
                continue
            yield group, [p for p in group["params"] if p not in configs]
            for p in group["params"]:
                if p in configs:
                    yield {**group, **configs[p]}, [p]

    def _ready(self, p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """The states of ``p``, made where there are none, its step as the group wants it.

        Raises:
            RuntimeError: a graph captures what it could not replay.
        """
        state, capturable = self.state[p], group["capturable"]
        if _capturing(p):
            if not capturable:
                raise RuntimeError(
                    "a CUDA graph captures AdamW.step(), and every replay would take the step that "
                    "was captured, with its learning rate and bias correction: "
                    "AdamW(..., capturable=True) counts steps on the device"
                )
            if not state or not isinstance(state["step"], Tensor):
                raise RuntimeError(
                    "a CUDA graph captures AdamW's first step, and every replay would make its "
                    "states anew: take a step before the capture"
                )
            if state["state1"].device != p.device or state["state1"].is_pinned():
                raise RuntimeError(
                    "a CUDA graph captures AdamW.step() of states that lie in the host's memory "
                    "and are copied for each update: a class that is not Paged keeps them on the "
                    "device"
                )
        if not state:
            self.state[p] = state = self._start(p, group)
        if capturable != isinstance(state["step"], Tensor):
            t = float(state["step"])
            state["step"] = (
                torch.tensor(t, dtype=torch.float32, device=p.device) if capturable else int(t)
            )
        lr = group["lr"]
        if capturable and isinstance(lr, Tensor) and (lr.device, lr.numel()) != (p.device, 1):
            raise ValueError(
                f"with capturable=True, lr must be a number or a tensor of one on the parameter's "
                f"device, {p.device}; got {lr.numel()} values on {lr.device}"
            )
        return state

    def _kernel_takes(self, p: Tensor, state: dict[str, Any]) -> bool:
        return (
            kernel_for(p) is not None
            and p.dtype in ops.FLOATS
            and p.is_contiguous()
            and p.grad is not None
            and p.grad.dtype == p.dtype
            and state["state1"].device == p.device
            and not state["state1"].is_pinned()
        )

    def _update_together(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Parameters of one device, one dtype, one kind of states and, not capturable, one step."""
        kernel = kernel_for(params[0])
        assert kernel is not None
        states = [self.state[p] for p in params]
        eight = states[0]["state1"].dtype == torch.uint8
        lists = (
            [p.data for p in params],
            [p.grad.contiguous() for p in params],  # type: ignore[union-attr]
            [s["state1"] for s in states],
            [s["state2"] for s in states],
            *([s[n] for s in states] if eight else [] for n in ("absmax1", "absmax2")),
            state_maps(params[0].device) if eight else None,
        )
        if not group["capturable"]:
            kernel.op(*lists, _scalars(group, states[0]["step"]), self.paged)
            return
        lr = group["lr"]
        on_device = isinstance(lr, Tensor)
        options = [0.0 if on_device else lr, *group["betas"], group["eps"], group["weight_decay"]]
        kernel.capturable(
            *lists,
            [s["step"] for s in states],
            lr.detach().float() if on_device else None,
            [float(v) for v in options],
            torch.empty(len(params), 8, dtype=torch.float32, device=params[0].device),
            self.paged,
        )

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
            tensors = {n: t for n, t in saved.items() if isinstance(t, Tensor) and n != "step"}
            state = self._allocate(p, {n: (tuple(t.shape), t.dtype) for n, t in tensors.items()})
            for name, value in tensors.items():
                state[name].copy_(value)
            self.state[p] = {**saved, **state, "step": int(saved["step"])}


def _update_chunk(
    p: Tensor,
    grad: Tensor,
    state: dict[str, Any],
    part: slice,
    blocks: slice,
    group: dict[str, Any],
) -> None:
    """The module's formulas on some values; ``p`` and the states are written."""
    device = p.device
    beta1, rest1, beta2, rest2, decay, step_size, scale_v, eps = _scalars(group, state["step"])
    g = grad.float()
    kept1, kept2 = state["state1"][part], state["state2"][part]
    eight = kept1.dtype == torch.uint8
    if eight:
        codes = nested_code(device), unsigned_code(device)
        absmax = [state[name][blocks].to(device) for name in ("absmax1", "absmax2")]
        m = dequantize_state(kept1.to(device), codes[0], absmax[0])
        v = dequantize_state(kept2.to(device), codes[1], absmax[1])
        finite = (g * g).isfinite()
        g = torch.where(finite, g, 0)
    else:
        m, v = kept1.to(device), kept2.to(device)
    m = m.mul(beta1).add_(g.mul(rest1))
    v = v.mul(beta2).add_((g * g).mul_(rest2))
    if eight:
        m, v = torch.where(finite, m, 0), torch.where(finite, v, 0)
    ratio = m / _root(v).mul_(scale_v).add_(eps)
    updated = (p.float() * decay).sub_(ratio.mul_(step_size))
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


def _root(v: Tensor) -> Tensor:
    return v.sqrt()


def power(base: float, n: int) -> float:
    """``base ** n`` by squaring: csrc/cuda/adamw.cu has the same products in the same order."""
    result = 1.0
    while n > 0:
        if n % 2 == 1:
            result *= base
        base *= base
        n //= 2
    return result


def _scalars(group: dict[str, Any], t: int | Tensor) -> list[Any]:
    """beta1, 1 - beta1, beta2, 1 - beta2, decay, step_size, scale_v, eps, each rounded to fp32.

    Of ``t`` in a tensor those that depend on it, or on a learning rate in one, are tensors beside
    it: nothing waits for the device.
    """
    (beta1, beta2), lr = group["betas"], group["lr"]
    if isinstance(t, Tensor):
        lr, n = lr.double() if isinstance(lr, Tensor) else lr, t.double()
        unbiased1, root = 1 - beta1**n, (1 - beta2**n).sqrt()
    else:
        lr = float(lr)
        unbiased1, root = 1 - power(beta1, t), math.sqrt(1 - power(beta2, t))
    values = [
        beta1, 1 - beta1, beta2, 1 - beta2, 1 - lr * group["weight_decay"], lr / unbiased1,
        1 / root, group["eps"],
    ]  # fmt: skip
    return [v.float() if isinstance(v, Tensor) else float(np.float32(v)) for v in values]


# --- the check at first use on a device ----------------------------------------------------------

_CHECK_SIZES = (9000, 4099)  # two tiles and more, and a tail, at an address aligned to nothing


def check(namespace: Any, device: torch.device) -> list[str]:
    """A step of a few tensors by the kernels in ``namespace``, captured and not, against torch's
    arithmetic on the CPU; returns what differs, a line each."""
    wrong = []
    for dtype in ops.FLOATS:
        for bits in (32, 8):
            for capturable in (False, True):
                where = f"adamw of {dtype}, {bits}-bit states{', captured' * capturable}"
                try:
                    found = _check_step(namespace, device, dtype, bits, capturable)
                except RuntimeError as error:
                    found = [str(error).splitlines()[0]]
                wrong += [f"{where}: {what}" for what in found]
    return wrong


def _check_step(
    namespace: Any, device: torch.device, dtype: torch.dtype, bits: int, capturable: bool
) -> list[str]:
    generator = torch.Generator().manual_seed(bits)

    def random(n: int) -> Tensor:
        return torch.randn(n, dtype=torch.float32, generator=generator).to(dtype)

    params = [random(n) for n in _CHECK_SIZES]
    optimizer = AdamW(params, lr=1e-2, weight_decay=0.1, optim_bits=bits)

    def moved(t: Tensor) -> Tensor:
        room = torch.empty(t.numel() + 1, dtype=t.dtype, device=device)
        view = room[t.numel() % 2 :][: t.numel()]
        return view.copy_(t)

    for _ in range(2):
        on = [moved(p) for p in params]
        states = [
            {n: moved(s) for n, s in optimizer.state[p].items() if isinstance(s, Tensor)}
            for p in params
        ]
        before = [p.clone() for p in params]
        for p in params:
            p.grad = random(p.numel())
            p.grad[::7] = 0
        optimizer.step()
    names = ("state1", "state2", "absmax1", "absmax2")
    group = optimizer.param_groups[0]
    lists = (
        on,
        [moved(p.grad) for p in params],  # type: ignore[arg-type]
        *([s[n] for s in states if n in s] for n in names),
        state_maps(device) if bits == 8 else None,
    )
    if capturable:
        steps = [torch.ones((), dtype=torch.float32, device=device) for _ in params]
        options = [group["lr"], *group["betas"], group["eps"], group["weight_decay"]]
        scratch = torch.empty(len(params), 8, dtype=torch.float32, device=device)
        namespace.adamw_capturable_(*lists, steps, None, options, scratch, False)
    else:
        namespace.adamw_(*lists, _scalars(group, 2), False)

    wrong = []
    for p, old, mine, state in zip(params, before, on, states, strict=True):
        bad = {n: state[n].cpu() != optimizer.state[p][n] for n in names if n in state}
        got, want, old = (t.cpu().double() for t in (mine, p, old))
        change = (want - old).abs() + group["lr"] * group["weight_decay"] * old.abs()
        kind = torch.finfo(dtype)
        rounding = kind.eps * want.abs().clamp(min=kind.smallest_normal)
        bad["p"] = ~((got - want).abs() <= 2.0**-21 * change + rounding)
        wrong += [
            f"{n} of {p.numel()}: {int(b.sum())} of {b.numel()} values differ"
            for n, b in bad.items()
            if b.any()
        ]
    return wrong


class AdamW8bit(AdamW):
    """:class:`AdamW` with 8-bit states: 2 bytes a parameter instead of 8."""

    bits = 8


class AdamW32bit(AdamW):
    """:class:`AdamW` by bitsandbytes' other name."""


class PagedAdamW(AdamW):
    """:class:`AdamW` with paged states."""

    paged = True


class PagedAdamW32bit(PagedAdamW):
    """:class:`PagedAdamW` by bitsandbytes' other name."""


class PagedAdamW8bit(AdamW8bit):
    """:class:`AdamW8bit` with paged states."""

    paged = True


class Adam(AdamW):
    """:class:`AdamW` without weight decay, unless it is given: then it is decoupled, as there."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = MIN_8BIT_SIZE,
        is_paged: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, optim_bits, args, min_8bit_size,
            is_paged, **kwargs,
        )  # fmt: skip


class Adam8bit(Adam):
    """:class:`Adam` with 8-bit states."""

    bits = 8


class Adam32bit(Adam):
    """:class:`Adam` by bitsandbytes' other name."""


class PagedAdam(Adam):
    """:class:`Adam` with paged states."""

    paged = True


class PagedAdam32bit(PagedAdam):
    """:class:`PagedAdam` by bitsandbytes' other name."""


class PagedAdam8bit(Adam8bit):
    """:class:`Adam8bit` with paged states."""

    paged = True


__all__ = [
    "Adam",
    "Adam8bit",
    "Adam32bit",
    "AdamW",
    "AdamW8bit",
    "AdamW32bit",
    "GlobalOptimManager",
    "PagedAdam",
    "PagedAdam8bit",
    "PagedAdam32bit",
    "PagedAdamW",
    "PagedAdamW8bit",
    "PagedAdamW32bit",
]
