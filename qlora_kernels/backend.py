"""Which kernels a GPU's tensors get: ``set_backend("auto" | "cuda" | "triton" | "cpu")``.

    qlora_kernels.set_backend("triton")            # from here on
    with qlora_kernels.set_backend("triton"):      # or for a while
        ...

========  =====================================================================================
auto      the CUDA kernels where they are loaded; else Triton's, where they can run, after a check
          at their first use; else plain torch
cuda      the CUDA kernels
triton    the kernels of ``qlora_kernels.triton``, on whatever device Triton's driver serves:
          NVIDIA's, AMD's (which torch calls "cuda" too), or another
cpu       the CPU's kernels, and none on a GPU: an op that is given a GPU's tensor raises
========  =====================================================================================

Tensors on the CPU get the CPU's kernels in each of them. The setting is the process's, not a
thread's: gradients are computed on other threads. ``QLORA_KERNELS_BACKEND`` chooses it from
outside. A graph that ``torch.compile`` has traced keeps the backend that it was traced under.
"""

from __future__ import annotations

import functools
import importlib
import os
import threading
import warnings
from collections.abc import Callable
from types import SimpleNamespace, TracebackType
from typing import Any

import torch
from torch import Tensor

from . import ops

__all__ = ["BackendError", "backends", "get_backend", "set_backend"]

OPS = tuple(ops.PLAIN)
_KEYS = {"cuda": "CUDA", "cpu": "CPU", "xpu": "XPU"}


class BackendError(RuntimeError):
    """A backend that this machine cannot run was asked for."""


# --- what can run here --------------------------------------------------------------------------


def _why_not_cuda() -> str | None:
    if ops.CUDA_LIBRARY_ERROR is not None:
        return ops.CUDA_LIBRARY_ERROR
    return None if torch.cuda.is_available() else "there is no GPU that torch can use"


def triton_device() -> str:
    """The kind of device (torch's name) that Triton's driver serves. Raises `BackendError`."""
    try:
        runtime = importlib.import_module("triton.runtime")
    except ImportError as error:
        raise BackendError(
            f"Triton is not installed (pip install triton): {error}"
            if isinstance(error, ModuleNotFoundError)
            else f"Triton cannot be imported: {error}"
        ) from None
    try:
        kind = runtime.driver.active.get_active_torch_device().type
    except Exception as error:  # Triton raises RuntimeError, and what a driver's own library does
        raise BackendError(f"Triton finds no GPU: {str(error).splitlines()[0]}") from None
    if kind not in _KEYS:
        raise BackendError(f"Triton's GPU is a {kind!r} to torch, which these ops do not know")
    return kind


def _why_not_triton() -> str | None:
    try:
        triton_device()
    except BackendError as error:
        return str(error)
    return None


_WHY_NOT: dict[str, Callable[[], str | None]] = {
    "auto": lambda: None,
    "cuda": _why_not_cuda,
    "triton": _why_not_triton,
    "cpu": lambda: None,
}


def backends() -> dict[str, str | None]:
    """Each backend, and why it cannot run here, or None where it can."""
    return {name: why_not() for name, why_not in _WHY_NOT.items()}


# --- Triton's kernels as the ops ----------------------------------------------------------------


@functools.cache
def _triton_ops() -> dict[str, Callable[..., Any]]:
    return importlib.import_module("qlora_kernels.triton").OPS


def executed_on(capability: tuple[int, int]) -> bool:
    """Whether Triton's code for an NVIDIA GPU is of a kind that the emulator executes: mma.sync
    (8.0 to 8.9, 12.0) and wgmma (9.0), but not tcgen05 (10, 11)."""
    return capability[0] in (8, 9, 12)


@functools.cache
def _auto_takes_triton(kind: str, index: int) -> bool:
    """Decides for a GPU without CUDA kernels, once; says so where the answer is no."""
    why = _why_not_triton()
    if why is None and torch.version.hip is None and kind == "cuda":
        capability = torch.cuda.get_device_capability(index)
        if not executed_on(capability):
            why = f"Triton's kernels have not been executed on sm_{capability[0]}{capability[1]}"
    if why is None:
        with torch.no_grad():
            wrong = check_triton(torch.device(kind, index))
        if not wrong:
            return True
        why = "Triton's kernels do not compute what they should; please report:\n  " + "\n  ".join(
            wrong[:8]
        )
    warnings.warn(
        f"qlora_kernels: plain torch on {kind}:{index}, correct, but slow. CUDA kernels: "
        f"{ops.CUDA_LIBRARY_ERROR}. {why}",
        stacklevel=2,
    )
    return False


def check_triton(device: torch.device) -> list[str]:
    """Triton's kernels against dequantization and a matmul in float64; what was wrong, a line
    each."""
    from . import cuda

    namespace = SimpleNamespace(**_triton_ops())
    wrong: list[str] = []
    for dtype in (torch.bfloat16, torch.float16):
        try:
            wrong += cuda.check_route(namespace, device, "triton", dtype)
        except Exception as error:  # a compiler's own kinds of error too
            wrong.append(f"{dtype}: {type(error).__name__}: {str(error).splitlines()[0]}")
    return wrong


def _auto(name: str) -> Callable[..., Any]:
    """An op of a GPU that has no CUDA kernels."""

    def op(*args: Any, **kwargs: Any) -> Any:
        device = next(a.device for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
        takes = _auto_takes_triton(device.type, device.index or 0)
        return (_triton_ops() if takes else ops.PLAIN)[name](*args, **kwargs)

    return op


def _refused(name: str) -> Callable[..., Any]:
    def op(*args: Any, **kwargs: Any) -> Any:
        raise BackendError(
            f"{name} was given a tensor on a GPU, and set_backend('cpu') leaves GPUs without "
            "kernels: move the tensors to the CPU, or set_backend('auto')"
        )

    return op


# --- the switch ---------------------------------------------------------------------------------

_lock = threading.RLock()
_current = "auto"
_overrides: torch.library.Library | None = None


def _register(table: dict[str, Callable[..., Any]], key: str) -> torch.library.Library:
    library = torch.library.Library(ops.NAMESPACE, "IMPL")
    with warnings.catch_warnings():  # torch tells of overrides, which are meant
        warnings.filterwarnings("ignore", message=".*[Oo]verrid")
        for name, fn in table.items():
            library.impl(name, fn, key, allow_override=True)
    return library


def _apply(name: str) -> None:
    """Puts a backend's kernels where the dispatcher finds them, and takes the last one's away."""
    global _current, _overrides
    made = None
    if name == "triton":
        kind = triton_device()
        made = _register(_triton_ops(), _KEYS[kind])
        importlib.import_module("qlora_kernels.triton").show_to_compiler(made, kind)
    elif name == "cpu":
        made = _register({op: _refused(op) for op in OPS}, "CUDA")
    elif name == "auto" and ops.CUDA_LIBRARY_ERROR is not None and _torch_has_gpus():
        made = _register({op: _auto(op) for op in OPS}, "CUDA")
    if _overrides is not None:
        _overrides._destroy()
    _overrides, _current = made, name


def _torch_has_gpus() -> bool:
    return torch.version.cuda is not None or torch.version.hip is not None


class set_backend:
    """Chooses the kernels of GPU tensors, at once; as a context manager, until the end of it.

    Args:
        name: ``"auto"``, ``"cuda"``, ``"triton"`` or ``"cpu"``.

    Raises:
        ValueError: another name.
        BackendError: this machine cannot run it; says why, and what can run.
    """

    def __init__(self, name: str) -> None:
        if name not in _WHY_NOT:
            raise ValueError(f"backend must be one of {', '.join(_WHY_NOT)}, got {name!r}")
        with _lock:
            why = _WHY_NOT[name]()
            if why is not None:
                can = ", ".join(n for n, reason in backends().items() if reason is None)
                raise BackendError(f"backend {name!r} cannot run here: {why}. What can: {can}")
            self._before = _current
            _apply(name)

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with _lock:
            _apply(self._before)


def get_backend() -> str:
    """The backend that was set; ``"auto"`` at the start."""
    return _current


def start() -> None:
    """At import: ``QLORA_KERNELS_BACKEND``, or what ``auto`` needs."""
    chosen = os.environ.get("QLORA_KERNELS_BACKEND", "auto")
    try:
        set_backend(chosen)
    except (ValueError, BackendError) as error:
        raise type(error)(f"QLORA_KERNELS_BACKEND: {error}") from None
