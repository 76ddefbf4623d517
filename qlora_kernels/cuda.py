"""The CUDA kernels: what runs for a shape on a device, and what is switched off.

Which kernel a linear layer gets is a pure function of device and shape, written down in
``csrc/cuda/dispatch.cpp``; :func:`choose` asks it anywhere, of any device in the emulator's table
or of a GPU that is here.

Environment:

``QLORA_KERNELS_DISABLE``
    routes to leave out, by name (``decode_simt``, ``decode_mma``, ``gemm``), with commas between;
    ``all`` leaves everything to dequantization and torch's matmul.
``QLORA_KERNELS_SELF_CHECK``
    ``0`` skips the check of each kernel at its first use on a device.
``QLORA_KERNELS_CACHE``
    the folder of what the check and ``qlora tune`` found; ``~/.cache/qlora-kernels`` by default.
"""

from __future__ import annotations

import ctypes
import functools
import os
from dataclasses import dataclass
from typing import Any

import torch

from . import ops
from .emulator.devices import Device, get_device

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
SCALES = ("fp32", "nested", "e8m0", "e4m3")


@dataclass(frozen=True)
class Plan:
    """How a linear layer's matmul runs; see ``csrc/cuda/dispatch.h``."""

    route: str
    tile_m: int
    tile_n: int
    tile_k: int
    warps: int
    stages: int
    splits: int
    shared_bytes: int
    workspace_bytes: int

    def __str__(self) -> str:
        if self.route == "large":
            return "large"
        return (
            f"{self.route} {self.tile_m}x{self.tile_n}x{self.tile_k}, {self.warps} warps, "
            f"{self.stages} stages, {self.splits} splits"
        )


def _host() -> Any:
    from . import _host  # type: ignore[attr-defined]

    return _host


def routes() -> tuple[str, ...]:
    """The routes that this version has compiled kernels for, the fewest rows first."""
    return tuple(_host().cuda_routes_built)


def limits(device: str | Device | int) -> Any:
    """What a choice depends on: of a device by name, or of a GPU here by its index."""
    if isinstance(device, int):
        p = torch.cuda.get_device_properties(device)
        return _host().CudaDevice(
            p.major,
            p.minor,
            p.multi_processor_count,
            getattr(p, "shared_memory_per_block_optin", 0),
            getattr(p, "shared_memory_per_multiprocessor", 0),
            getattr(p, "max_threads_per_multi_processor", 0),
            getattr(p, "L2_cache_size", 0),
        )
    d = get_device(device)
    return _host().CudaDevice(
        *d.capability, d.sms, d.sm.shared_optin, d.sm.shared, d.sm.threads, d.l2_bytes
    )


def _shape(
    m: int,
    n: int,
    k: int,
    rank: int,
    dtype: torch.dtype,
    blocksize: int,
    scales: str,
    backward: bool,
    s_given: bool,
) -> Any:
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
    if scales not in SCALES:
        raise ValueError(f"scales must be one of {', '.join(SCALES)}, got {scales!r}")
    for name, value in (("m", m), ("n", n), ("k", k)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    return _host().CudaShape(
        backward, m, n, k, rank, s_given, DTYPES[dtype], blocksize.bit_length() - 1,
        SCALES.index(scales),
    )  # fmt: skip


def choose(
    device: str | Device | int,
    m: int,
    n: int,
    k: int,
    *,
    rank: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    blocksize: int = 64,
    scales: str = "nested",
    backward: bool = False,
    s_given: bool = False,
    disabled: str = "",
) -> tuple[Plan, str]:
    """The plan of a layer ``[n, k]`` on ``m`` rows, and why.

    Args:
        device: a name (``"h100"``), or the index of a GPU that is here.
        dtype: the compute dtype.
        backward: for the gradient of x instead of y.
        s_given: LoRA's S comes from outside (dropout).
        disabled: routes to leave out, as in ``QLORA_KERNELS_DISABLE``.

    Raises:
        ValueError: an unknown device, dtype, kind of scales or route.
    """
    shape = _shape(m, n, k, rank, dtype, blocksize, scales, backward, s_given)
    plan, why = _host().cuda_choose(limits(device), shape, disabled_mask(disabled))
    return Plan(**plan), why


def candidates(device: str | Device | int, m: int, n: int, k: int, **options: Any) -> list[Plan]:
    """Every plan that is compiled and that the device can hold; options as :func:`choose`'s."""
    given = {
        "rank": 0, "dtype": torch.bfloat16, "blocksize": 64, "scales": "nested",
        "backward": False, "s_given": False, **options,
    }  # fmt: skip
    found = _host().cuda_candidates(limits(device), _shape(m, n, k, **given))
    return [Plan(**plan) for plan in found]


def disabled_mask(names: str) -> int:
    """A bit a route. Raises ValueError for a name that is none."""
    known = tuple(_host().cuda_routes)
    mask = 0
    for name in names.replace(",", " ").split():
        if name == "all":
            mask |= (1 << known.index("large")) - 1
        elif name in known[:-1]:
            mask |= 1 << known.index(name)
        else:
            raise ValueError(
                f"QLORA_KERNELS_DISABLE: there is no kernel {name!r}; there are "
                f"{', '.join(known[:-1])}, and all"
            )
    return mask


@functools.cache
def library() -> ctypes.CDLL | None:
    """The CUDA half, or None where it is not loaded."""
    if ops.CUDA_LIBRARY_ERROR is not None:
        return None
    return bind(ctypes.CDLL(str(ops.cuda_library_path())))


def bind(lib: ctypes.CDLL) -> ctypes.CDLL:
    """Says the types of what the library exports besides its ops."""
    i64 = ctypes.c_int64
    lib.qlk_cuda_disable.argtypes = [ctypes.c_int, ctypes.c_uint]
    lib.qlk_cuda_tuned.argtypes = [
        ctypes.c_int, ctypes.c_int, i64, i64, i64, i64, ctypes.POINTER(ctypes.c_int)
    ]  # fmt: skip
    lib.qlk_cuda_forget_tuned.argtypes = [ctypes.c_int]
    lib.qlk_cuda_workspace_cap.argtypes = [i64]
    lib.qlk_cuda_versions.argtypes = [ctypes.POINTER(ctypes.c_int)] * 2
    return lib


def disabled_by_user() -> int:
    """The routes that ``QLORA_KERNELS_DISABLE`` names."""
    return disabled_mask(os.environ.get("QLORA_KERNELS_DISABLE", ""))
