"""Where the states of a paged optimizer on a GPU lie, and the memory itself.

======== ==============================================================================
managed  ``cudaMallocManaged``: the device reads and writes it, its pages wander between device and
         host; fetched to the device ahead of each update
pinned   the host's, locked, copied for each update
host     the host's, copied for each update
======== ==============================================================================

:func:`choose` says which, from figures alone; :func:`zeros` tries them in that order, so that an
allocation that fails falls to the next. A parameter's states are one block: one allocation, one
fetch, all of it in one place.
"""

from __future__ import annotations

import ctypes
import math
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .control_group import control_group_room

SHARE = 0.9
"""Of the memory that is free, how much states may take: kernels, the allocator and the system take
some too."""

ALIGNMENT = 256
"""Of each state in its block, as cudaMalloc's."""

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""A parameter's states: shape and dtype of each."""


def choose(size: int, *, managed: bool, concurrent: bool, device_free: int, host_free: int) -> str:
    """``"managed"`` or ``"pinned"``, for ``size`` bytes more.

    Args:
        managed: whether the device has managed memory at all.
        concurrent: whether host and device may touch it at once (Linux): then its pages may lie on
            either, and both together hold it. Where not (Windows, WSL), all of it must fit the
            device at every launch.
        device_free: bytes free on the device now.
        host_free: bytes of the host's memory that may be taken now.
    """
    room = device_free + host_free if concurrent else device_free
    return "managed" if managed and size <= SHARE * room else "pinned"


def host_free() -> int:
    """Bytes of the host's memory that may be taken, within its control groups' limits."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
                return max(0, min([free, *control_group_room()]))
    except OSError:
        pass
    return 0


class Block:
    """Managed memory, freed when the last tensor on it is gone."""

    def __init__(self, address: int, size: int, free: Callable[[], None]) -> None:
        self.address, self.size = address, size
        # Not at the interpreter's end: the driver takes the memory back, and may be gone.
        weakref.finalize(self, free).atexit = False


@dataclass(frozen=True)
class Driver:
    """Managed memory of one device, by the exports of the CUDA library (``csrc/cuda/paging.cpp``).

    ``wrap(block, begin, size)`` makes a tensor of those bytes, which keeps the block; ``stream()``
    is the stream to write the first zeros on.
    """

    lib: Any
    index: int
    wrap: Callable[[Block, int, int], Tensor]
    stream: Callable[[], int | None]

    def limits(self) -> dict[str, Any]:
        """What :func:`choose` wants to know of the device."""
        managed, concurrent, free = ctypes.c_int(), ctypes.c_int(), ctypes.c_int64()
        refs = (ctypes.byref(managed), ctypes.byref(concurrent), ctypes.byref(free))
        if self.lib.qlk_cuda_managed_limits(ctypes.c_int(self.index), *refs) != 0:
            return {"managed": False, "concurrent": False, "device_free": 0}
        return {
            "managed": bool(managed.value),
            "concurrent": bool(concurrent.value),
            "device_free": free.value,
        }

    def zeros(self, size: int) -> Block | None:
        """That many bytes, or None where the driver has them not."""
        address = ctypes.c_void_p()
        error = self.lib.qlk_cuda_managed_allocate(
            ctypes.c_int(self.index), ctypes.c_int64(size), ctypes.byref(address),
            ctypes.c_void_p(self.stream()),
        )  # fmt: skip
        if error != 0 or not address.value:
            return None
        where = address.value

        def free() -> None:
            self.lib.qlk_cuda_managed_free(ctypes.c_int(self.index), ctypes.c_void_p(where))

        return Block(where, size, free)


class _OnDevice:
    """Device memory as ``torch.as_tensor`` takes it; the tensor keeps this, and this the block."""

    def __init__(self, block: Block, begin: int, size: int) -> None:
        self.block = block
        self.__cuda_array_interface__ = {
            "shape": (size,), "typestr": "|u1", "data": (block.address + begin, False),
            "version": 3,
        }  # fmt: skip


def driver_of(lib: Any, device: torch.device) -> Driver:
    """The managed memory of a CUDA device that torch has."""
    index = torch.cuda.current_device() if device.index is None else device.index

    def wrap(block: Block, begin: int, size: int) -> Tensor:
        return torch.as_tensor(_OnDevice(block, begin, size), device=f"cuda:{index}")

    return Driver(lib, index, wrap, lambda: torch.cuda.current_stream(index).cuda_stream)


def _bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _managed(layout: Layout, driver: Driver) -> dict[str, Tensor] | None:
    begins, size = {}, 0
    for name, one in layout.items():
        begins[name] = size
        size += -(-_bytes(*one) // ALIGNMENT) * ALIGNMENT
    block = None
    if choose(size, host_free=host_free(), **driver.limits()) == "managed":
        block = driver.zeros(size)
    if block is None:
        _notice(size)
        return None
    # Tensors with storages of their own: torch saves none that view one memory as several types.
    return {
        name: driver.wrap(block, begins[name], _bytes(shape, dtype)).view(dtype).view(shape)
        for name, (shape, dtype) in layout.items()
    }


def zeros(layout: Layout, driver: Driver | None, pin: bool = True) -> dict[str, Tensor]:
    """States of zeros, all of them in one place; ``driver`` is None where there is no library."""
    if driver is not None and all(_bytes(*one) > 0 for one in layout.values()):
        states = _managed(layout, driver)
        if states is not None:
            return states
    if pin:
        try:
            return _on_host(layout, pin=True)
        except RuntimeError:  # no more memory may be locked
            pass
    return _on_host(layout)


def _on_host(layout: Layout, pin: bool = False) -> dict[str, Tensor]:
    return {
        name: torch.zeros(shape, dtype=dtype, pin_memory=pin)
        for name, (shape, dtype) in layout.items()
    }


_NOTICED = False


def _notice(size: int) -> None:
    global _NOTICED
    if not _NOTICED:
        _NOTICED = True
        warnings.warn(
            f"qlora_kernels: {size / 2**20:.1f} MiB more of managed memory for paged optimizer "
            "states are not to be had; these and others that do not fit stay in the host's memory "
            "and are copied for each update: correct, but slower. An optimizer that is not "
            "paged keeps states on the device",
            stacklevel=2,
        )
