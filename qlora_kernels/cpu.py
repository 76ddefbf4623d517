"""The CPU kernels' instruction sets: which there are, which one runs, how to force a lower one.

The best that the machine has is chosen when the first kernel runs; the environment variable
``QLORA_KERNELS_ISA`` (``portable``, ``avx2``, ``avx512``, ``avx512_bf16``) names another.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator

from . import ops


@functools.cache
def _library() -> ctypes.CDLL | None:
    if ops.LIBRARY_ERROR:
        return None
    library = ctypes.CDLL(str(ops.library_path()))
    for name in ("qlk_isa", "qlk_choose_isa", "qlk_available_isas"):
        getattr(library, name).restype = ctypes.c_char_p
    library.qlk_choose_isa.argtypes = [ctypes.c_char_p]
    return library


def available_isas() -> tuple[str, ...]:
    """Instruction sets that can run here, lowest first; empty without the native library."""
    library = _library()
    return tuple(library.qlk_available_isas().decode().split(",")) if library else ()


def isa() -> str:
    """The instruction set that runs; ``"torch"`` without the native library."""
    library = _library()
    return library.qlk_isa().decode() if library else "torch"


def choose_isa(name: str | None = None) -> None:
    """Run this instruction set from now on; ``None``: the environment's choice, or the best.

    Raises:
        ValueError: this machine or build does not have it; the message lists what there is.
    """
    library = _library()
    if library is None:
        raise ValueError(f"no instruction set to choose: {ops.LIBRARY_ERROR}")
    error = library.qlk_choose_isa((name or "").encode())
    if error:
        raise ValueError(error.decode())


@contextlib.contextmanager
def use_isa(name: str) -> Iterator[None]:
    """:func:`choose_isa` within a block."""
    before = isa()
    choose_isa(name)
    try:
        yield
    finally:
        choose_isa(before)


def linear_route(m: int, n: int, k: int, blocksize: int = 64, bf16: bool = False) -> str:
    """The kernel that a linear layer ``[n, k]`` gets on ``m`` rows: a pure function.

    Args:
        bf16: whether products are of bf16 pairs in hardware (AVX-512 BF16 and bf16 compute).

    Returns:
        ``"decode"`` (one row), ``"tile"`` (few) or ``"panel"`` (many: torch's matmul on panels
        decoded into cache).
    """
    from . import _host  # type: ignore[attr-defined]

    return _host.linear_route(m, n, k, blocksize, bf16)
