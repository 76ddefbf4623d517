"""The CUDA kernels: what runs for a shape on a device, and what is switched off.

Which kernel a linear layer gets is a pure function of device and shape, written down in
``csrc/cuda/dispatch.cpp``; :func:`choose` asks it anywhere, of any device in the emulator's table
or of a GPU that is here.

Environment:

``QLORA_KERNELS_DISABLE``
    routes to leave out, by name (``decode_simt``, ``decode_mma``, ``gemm``), with commas between;
    ``all`` leaves everything to dequantization and torch's matmul. ``adamw``, which ``all`` names
    too, leaves optimizer steps to torch's arithmetic.
``QLORA_KERNELS_SELF_CHECK``
    ``0`` skips the check of each kernel at its first use on a device, AdamW's among them.
``QLORA_KERNELS_CACHE``
    the folder of what the check and ``qlora tune`` found; ``~/.cache/qlora-kernels`` by default.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import ops, reference
from .emulator.devices import Device, get_device
from .formats import get_format, nested_code

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
    rank: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    blocksize: int = 64,
    scales: str = "nested",
    backward: bool = False,
    s_given: bool = False,
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
    found = _host().cuda_candidates(limits(device), _shape(m, n, k, **options))
    return [Plan(**plan) for plan in found]


_OTHERS = ("adamw",)  # kernels that no linear layer chooses among


def disabled_mask(names: str) -> int:
    """A bit a route. Raises ValueError for a name that is none."""
    known = tuple(_host().cuda_routes)
    mask = 0
    for name in names.replace(",", " ").split():
        if name in _OTHERS:
            continue
        if name == "all":
            mask |= (1 << known.index("large")) - 1
        elif name in known[:-1]:
            mask |= 1 << known.index(name)
        else:
            raise ValueError(
                f"QLORA_KERNELS_DISABLE: there is no kernel {name!r}; there are "
                f"{', '.join((*known[:-1], *_OTHERS))}, and all"
            )
    return mask


def enabled(kernel: str) -> bool:
    """Whether ``QLORA_KERNELS_DISABLE`` leaves on a kernel that is no linear layer's."""
    names = os.environ.get("QLORA_KERNELS_DISABLE", "").replace(",", " ").split()
    return kernel not in names and "all" not in names


@functools.cache
def library() -> ctypes.CDLL | None:
    """The CUDA half, or None where it is not loaded."""
    if ops.CUDA_LIBRARY_ERROR is not None:
        return None
    return bind(ctypes.CDLL(str(ops.cuda_library_path())))


def bind(lib: ctypes.CDLL) -> ctypes.CDLL:
    """Says the types of what the library exports besides its ops."""
    i64 = ctypes.c_int64
    lib.qlk_cuda_on_first_use.argtypes = [ctypes.c_void_p]
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


# --- the check at first use ---------------------------------------------------------------------

# Rows that the route is asked for on some device (dispatch.cpp); "triton" is all of that backend.
_CHECKED_ROWS = {
    "decode_simt": (1, 3), "decode_mma": (1, 15, 32), "gemm": (16, 70), "triton": (1, 17, 70)
}  # fmt: skip
_CHECK_SHAPES = ((144, 512), (40, 100))  # [n, k]; the second one aligned to nothing
_CHECK_RANK = 16


def _packed(n: int, k: int, device: torch.device) -> tuple[tuple, Tensor]:
    """Random codes and nested scales as the ops take them, and the weight in fp32."""
    generator = torch.Generator().manual_seed(n + k)
    codebook = get_format("nf4").tensors()[0]
    packed = torch.randint(0, 256, (n * k // 2,), dtype=torch.uint8, generator=generator)
    blocks = -(-n * k // 64)
    absmax = torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=generator)
    nested = torch.rand(-(-blocks // 256), generator=generator) * 0.1
    offset = torch.tensor(0.2)
    scales = reference.dequantize_absmax(absmax, nested, offset)
    w = reference.dequantize(packed, scales, codebook, 64, (n, k))
    weight = (packed, absmax, codebook, 64, nested, nested_code(), offset)
    moved = tuple(t.to(device) if isinstance(t, Tensor) else t for t in weight)
    return moved, w


def _mismatch(got: Tensor, want: Tensor, size: Tensor, dtype: torch.dtype) -> str | None:
    """What is wrong with a result, or None: within the roundings of operands, sums and result."""
    u = torch.finfo(dtype).eps / 2
    error = (got.cpu().double() - want).abs()
    bad = ~(error <= 4 * u * size)
    if not bad.any():
        return None
    at = tuple(int(i) for i in bad.nonzero()[0])
    return (
        f"{int(bad.sum())} of {bad.numel()} values differ; the first at {list(at)}: "
        f"{got.cpu()[at].item():.6g}, expected {want[at].item():.6g}"
    )


def check_route(namespace: Any, device: torch.device, route: str, dtype: torch.dtype) -> list[str]:
    """Runs one route, forward and backward, against dequantization and a matmul in float64.

    The other routes must be off. Returns what was wrong, a line each.
    """
    wrong = []
    for n, k in _CHECK_SHAPES:
        weight, w = _packed(n, k, device)
        got = namespace.dequantize_4bit(*weight, [n, k], torch.float32)
        if not torch.equal(got.cpu(), w):
            wrong.append(f"dequantize [{n}, {k}]: {int((got.cpu() != w).sum())} values differ")
            continue
        for m in _CHECKED_ROWS[route]:
            generator = torch.Generator().manual_seed(m)
            shapes = ((m, k), (m, n), (_CHECK_RANK, k), (n, _CHECK_RANK))
            x, dy, a, b = (torch.randn(s, generator=generator) for s in shapes)
            a /= k**0.5
            x, dy = x.to(dtype), dy.to(dtype)
            xd, dyd, wd = x.double(), dy.double(), w.to(dtype).double()
            ad, bd = a.to(dtype).double(), b.to(dtype).double()
            on = [t.to(device) for t in (x, dy, a, b)]
            y, s = namespace.linear_4bit(on[0], *weight, n, None, on[2], on[3], None, 0.5, dtype)
            dx, _, _, ds = namespace.linear_4bit_backward(
                on[1], *weight, k, None, on[2], on[3], s, 0.5, dtype, dtype, True, False, False
            )
            lora_s, lora_ds = xd @ ad.T, 0.5 * dyd @ bd
            results = {
                "y": (y, xd @ wd.T + 0.5 * lora_s @ bd.T,
                      xd.abs() @ wd.abs().T + 0.5 * (xd.abs() @ ad.abs().T) @ bd.abs().T),
                "S": (s, lora_s, xd.abs() @ ad.abs().T),
                "dx": (dx, dyd @ wd + lora_ds @ ad,
                       dyd.abs() @ wd.abs() + 0.5 * (dyd.abs() @ bd.abs()) @ ad.abs()),
                "dS": (ds, lora_ds, 0.5 * dyd.abs() @ bd.abs()),
            }  # fmt: skip
            for name, (result, want, size) in results.items():
                problem = _mismatch(result, want, size, dtype)
                if problem:
                    wrong.append(f"{route} {name}, m={m}, [{n}, {k}], {dtype}: {problem}")
    return wrong


def check_kernels(
    namespace: Any, lib: ctypes.CDLL, device: torch.device, dtypes: tuple[torch.dtype, ...]
) -> dict[str, list[str]]:
    """Each route that is compiled in, and what was wrong with it; leaves all routes on."""
    index = device.index or 0
    everything = disabled_mask("all")
    found = {}
    for route in routes()[:-1]:
        lib.qlk_cuda_disable(index, everything & ~disabled_mask(route))
        wrong: list[str] = []
        for dtype in dtypes:
            try:
                wrong += check_route(namespace, device, route, dtype)
            except RuntimeError as error:
                wrong.append(f"{route}, {dtype}: {str(error).splitlines()[0]}")
        found[route] = wrong
    lib.qlk_cuda_disable(index, 0)
    return found


def cache_folder() -> Path:
    chosen = os.environ.get("QLORA_KERNELS_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "qlora-kernels"


def read_cache(name: str) -> dict[str, Any]:
    """A file of the cache; empty where there is none that can be read."""
    try:
        found = json.loads((cache_folder() / name).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_cache(name: str, content: dict[str, Any]) -> None:
    """Whole or not at all; a cache that cannot be written costs the check at the next start."""
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=cache_folder(), delete=False) as file:
            json.dump(content, file, indent=1)
        os.replace(file.name, cache_folder() / name)
    except OSError:
        pass


def identity_of(lib: ctypes.CDLL, index: int) -> str:
    """:func:`identity` of a GPU that is here."""
    runtime, driver = ctypes.c_int(), ctypes.c_int()
    lib.qlk_cuda_versions(ctypes.byref(runtime), ctypes.byref(driver))
    return identity(torch.cuda.get_device_name(index), driver.value, ops.cuda_library_path())


def identity(device_name: str, driver: int, library_path: Path) -> str:
    """What a check's result holds for: this GPU, this driver, this build."""
    stat = library_path.stat()
    return f"{device_name}, driver {driver}, build {stat.st_size}-{stat.st_mtime_ns}"


def report(
    who: str,
    found: dict[str, list[str]],
    reference: str = "dequantization and matmul; layers go on without them",
) -> str:
    """The words of the warning about kernels that do not compute what they should."""
    failed = {route: wrong for route, wrong in found.items() if wrong}
    lines = [f"  {line}" for wrong in failed.values() for line in wrong[:8]]
    return (
        f"qlora_kernels: switched off on this GPU: {', '.join(failed)}. Their results differ from "
        f"{reference}, correct but slower. Please report:\n"
        f"  {who}\n  torch {torch.__version__}\n" + "\n".join(lines)
    )


def checked(
    who: str, kernels: tuple[str, ...], check: Callable[[], dict[str, list[str]]]
) -> dict[str, list[str]]:
    """Those kernels, and what was wrong with each: of the cache where it has them for the same GPU,
    driver and build, else of the check, which the cache then keeps."""
    kept = read_cache("checks.json").get(who, {})
    if not all(kernel in kept for kernel in kernels):
        found = check()
        cache = read_cache("checks.json")
        kept = {**cache.get(who, {}), **found}
        write_cache("checks.json", {**cache, who: kept})
    return {kernel: kept[kernel] for kernel in kernels}


def _checks() -> bool:
    return os.environ.get("QLORA_KERNELS_SELF_CHECK", "1") != "0"


def settle(
    namespace: Any,
    lib: ctypes.CDLL,
    device: torch.device,
    who: str,
    dtypes: tuple[torch.dtype, ...],
) -> int:
    """Switches off on a device what the user or the check says; returns the mask."""
    mask = disabled_by_user()
    if _checks():
        found = checked(who, routes()[:-1], lambda: check_kernels(namespace, lib, device, dtypes))
        failed = [route for route, wrong in found.items() if wrong]
        if failed:
            warnings.warn(report(who, found), stacklevel=2)
        mask |= disabled_mask(",".join(failed))
    lib.qlk_cuda_disable(device.index or 0, mask)
    return mask


Check = Callable[[Any, torch.device], list[str]]
"""Of the kernels in a namespace of ops, on a device: what is wrong, a line each."""


def settle_other(kernel: str, check: Check, namespace: Any, device: torch.device, who: str) -> bool:
    """Whether the check passes of a kernel that is no linear layer's; it is kept as theirs are."""
    if not _checks():
        return True
    found = checked(who, (kernel,), lambda: {kernel: check(namespace, device)})
    if found[kernel]:
        reference = "torch's arithmetic; steps go on with that"
        warnings.warn(report(who, found, reference), stacklevel=2)
    return not found[kernel]


_PASSED: dict[tuple[str, int], bool] = {}


def passes(kernel: str, check: Check, device: torch.device) -> bool:
    """:func:`settle_other` on a GPU that is here, asked once in a process."""
    index = torch.cuda.current_device() if device.index is None else device.index
    lib = library()
    if (kernel, index) not in _PASSED and lib is not None:
        if torch.cuda.is_current_stream_capturing():
            return True  # not now: the check waits
        try:
            with torch.no_grad():
                who, namespace = identity_of(lib, index), getattr(torch.ops, ops.NAMESPACE)
                passed = settle_other(kernel, check, namespace, torch.device("cuda", index), who)
        except Exception as error:  # as with the linear layers' kernels
            warnings.warn(f"qlora_kernels: {kernel} was not checked: {error}", stacklevel=2)
            passed = True
        _PASSED[kernel, index] = passed
    return _PASSED.get((kernel, index), True)


_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)


def _first_use(index: int) -> int:
    """What the library calls before the first linear layer on a device; 0: call again."""
    lib = library()
    if lib is None or torch.cuda.is_current_stream_capturing():
        return 0
    try:
        device = torch.device("cuda", index)
        capability = torch.cuda.get_device_capability(index)
        who = identity_of(lib, index)
        dtypes = (torch.bfloat16, torch.float16) if capability >= (8, 0) else (torch.float16,)
        with torch.no_grad():
            settle(getattr(torch.ops, ops.NAMESPACE), lib, device, who, dtypes)
        apply_tuned(lib, index, who)
    except Exception as error:  # a check that fails to run must not end a run without it
        warnings.warn(f"qlora_kernels: the CUDA kernels were not checked: {error}", stacklevel=2)
    return 1


_first_use_callback = _CALLBACK(_first_use)


def watch() -> None:
    """Has the library call the check at the first use of each device."""
    lib = library()
    if lib is not None:
        lib.qlk_cuda_on_first_use(ctypes.cast(_first_use_callback, ctypes.c_void_p))


# --- what `qlora tune` found --------------------------------------------------------------------


def tuned_entry(
    backward: bool, m: int, n: int, k: int, rank: int, plan: Plan, seconds: float
) -> dict[str, Any]:
    """One line of tuned.json."""
    fields = {f: getattr(plan, f) for f in _PLAN_FIELDS}
    shape = {"backward": backward, "m": m, "n": n, "k": k, "rank": rank}
    return {**shape, "plan": fields, "seconds": seconds}


_PLAN_FIELDS = ("route", "tile_m", "tile_n", "tile_k", "warps", "stages", "splits")


def apply_entry(lib: ctypes.CDLL, index: int, entry: dict[str, Any]) -> None:
    """Has a shape run on a device as it was tuned; what was not compiled any more is passed over by
    the library."""
    plan = entry["plan"]
    values = [_host().cuda_routes.index(plan["route"]), *(plan[f] for f in _PLAN_FIELDS[1:])]
    lib.qlk_cuda_tuned(
        index, int(entry["backward"]), entry["m"], entry["n"], entry["k"], entry["rank"],
        (ctypes.c_int * len(values))(*values),
    )  # fmt: skip


def apply_tuned(lib: ctypes.CDLL, index: int, who: str) -> int:
    """What `qlora tune` kept for this GPU, driver and build; returns how many shapes."""
    lib.qlk_cuda_forget_tuned(index)
    entries = read_cache("tuned.json").get(who, [])
    for entry in entries:
        apply_entry(lib, index, entry)
    return len(entries)
