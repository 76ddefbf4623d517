"""A stand-in for the CUDA runtime: shipped launchers drive the emulator.

A library that was linked with ``nvcc -cudart shared`` is loaded after a small shared library of the
runtime's name (``csrc/emulator/cudart_stub.cc``), and so every call it makes, ``<<<>>>`` launches
among them, arrives here::

    with EmulatedRuntime("h100", library="build/libkernels.so") as rt:
        x = torch.randn(1000)
        status = rt.lib.launch_scale(rt.pointer(x), 1000, rt.stream())
    rt.launches[0].name, rt.launches[0].grid, rt.launches[0].counts

Host memory stands for the device's: ``pointer`` tells the runtime of a tensor and its bounds and
returns its address. The PTX that runs is taken out of the library that was loaded, the newest that
the device could run, as the driver would choose; arguments are sized from its ``.param`` list;
registers, and so what a launch may ask for, are those of the library's cubin for the device, or
ptxas's for that PTX.

``order="eager"`` runs each operation when it is submitted. ``order="deferred"`` queues them and, at
each synchronisation, runs what is due in an order that the seed decides and that only streams,
events and the legacy default stream constrain: what was not ordered may run in the other order.

Errors come back to the launcher as CUDA's codes. Each is also kept in ``rt.errors`` with what was
wrong in words, and leaving the ``with`` raises the first of them unless ``strict=False``.
"""

from __future__ import annotations

import ctypes
import functools
import os
import random
import re
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from . import model, toolchain
from .devices import Device, get_device, occupancy

__all__ = ["Buffer", "EmulatedRuntime", "Graph", "Launch", "LaunchRequest", "RuntimeFailure"]

SUCCESS, INVALID_VALUE, OUT_OF_MEMORY, INVALID_CONFIGURATION = 0, 1, 2, 9
INVALID_SYMBOL, INVALID_DEVICE_FUNCTION, INVALID_DEVICE, NO_KERNEL_IMAGE = 13, 98, 101, 209
INVALID_HANDLE, NOT_READY, LAUNCH_OUT_OF_RESOURCES, LAUNCH_FAILURE = 400, 600, 701, 719
COOPERATIVE_TOO_LARGE, NOT_SUPPORTED = 720, 801
CAPTURE_UNSUPPORTED, CAPTURE_UNMATCHED, CAPTURE_UNJOINED, CAPTURE_IMPLICIT = 900, 903, 904, 906


class RuntimeFailure(RuntimeError):
    """A call that CUDA would have refused, or a kernel that failed.

    ``code`` is the cudaError_t that the caller was given, ``call`` the function."""

    def __init__(self, call: str, code: int, message: str) -> None:
        super().__init__(f"{call}: {message} (cudaError {code})")
        self.call, self.code, self.message = call, code, message


@dataclass
class Buffer:
    """A stretch of memory that kernels may touch: a registered tensor, an allocation, a variable.

    ``initialized`` is a byte (0 or 1) for each byte, or None where all of it is; ``dtype`` and
    ``shape`` let reports name an element."""

    address: int
    size: int
    name: str
    initialized: np.ndarray | None = None
    owner: Any = None
    kind: str = "tensor"
    dtype: Any = "u1"
    shape: tuple[int, ...] | None = None

    def __contains__(self, address: int) -> bool:
        return self.address <= address < self.address + self.size


@dataclass
class LaunchRequest:
    """What an engine is asked to run. ``arguments`` holds the bytes of each kernel parameter,
    ``symbols`` the addresses of the module's variables."""

    ptx: str
    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    arguments: list[bytes]
    buffers: list[Buffer]
    device: Device
    checks: Any
    seed: int
    cooperative: bool
    registers: int = 0
    symbols: dict[str, int] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Launch:
    """One kernel launch. ``arguments`` are the raw bytes; ``counts`` and ``reports`` come from the
    engine and are None until the launch has run."""

    kernel: str
    name: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    stream: int
    arguments: list[bytes]
    resources: toolchain.Resources
    blocks_per_sm: int
    ptx: str
    cooperative: bool = False
    counts: Any = None
    reports: Any = None
    result: Any = None

    @property
    def blocks(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def threads(self) -> int:
        return self.block[0] * self.block[1] * self.block[2]

    def argument(self, index: int, kind: str = "<u8") -> Any:
        """Argument ``index`` read as a NumPy type: ``launch.argument(3, "<i4")``."""
        return np.frombuffer(self.arguments[index], dtype=kind)[0]


# ------------------------------------------------------------------------------------------------
# The stub


def _stub_path(major: int) -> Path:
    """The built stub, beside the package or in the cache; built from source where it is neither."""
    here = Path(__file__).resolve()
    name = "cudart_stub" + ("" if major == 13 else str(major))
    for folder in (here.parent.parent, here.parent):
        built = folder / f"_{name}.so"
        if built.is_file():
            return built
    source = here.parents[2] / "csrc" / "emulator" / "cudart_stub.cc"
    if not source.is_file():
        raise toolchain.ToolchainError(
            f"the CUDA runtime's stand-in, _{name}.so, is neither beside {here.parent.parent} "
            "nor can it be built, its source is not here; reinstall the package"
        )
    version_map = source.with_name(f"{name}.map")
    key = toolchain._digest(source.read_text(), version_map.read_text())
    built = toolchain.cache_dir() / "stub" / key / f"_{name}.so"
    if not built.is_file():
        built.parent.mkdir(parents=True, exist_ok=True)
        temporary = built.with_name(f".{os.getpid()}.so")
        command = ["g++", "-std=c++20", "-O2", "-fPIC", "-shared", "-fvisibility=hidden"]
        command += [
            str(source),
            f"-DCUDART_MAJOR={major}",
            f"-Wl,-soname,libcudart.so.{major}",
            f"-Wl,--version-script={version_map}",
        ]
        toolchain._run([*command, "-o", str(temporary)], "g++ on the CUDA runtime's stand-in")
        temporary.replace(built)
    return built


_HANDLER = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint64))
MAJORS = (13, 12)  # of the CUDA runtimes that there are stand-ins for
_stubs: dict[int, ctypes.CDLL] = {}
_active: EmulatedRuntime | None = None
_lock = threading.RLock()


def _load_stub(major: int = MAJORS[0]) -> ctypes.CDLL:
    if major not in _stubs:
        for line in Path("/proc/self/maps").read_text().splitlines():
            if re.search(rf"/libcudart\.so\.{major}[\d.]*$", line):
                raise toolchain.ToolchainError(
                    f"this process has loaded a real CUDA runtime ({line.split()[-1]}); "
                    "the stand-in has to come first: use it in a process of its own"
                )
        stub = ctypes.CDLL(str(_stub_path(major)), mode=ctypes.RTLD_GLOBAL)
        stub.cudart_stub_set_handler.argtypes = [ctypes.c_void_p]
        stub.cudart_stub_function.restype = ctypes.c_char_p
        stub.cudart_stub_function.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        stub.cudart_stub_variable.restype = ctypes.c_char_p
        stub.cudart_stub_variable.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
        _stubs[major] = stub
    return _stubs[major]


def _registered(what: str, host: int, *more: Any) -> bytes | None:
    """The mangled name under which a library registered a host symbol with one of the stubs."""
    for stub in _stubs.values():
        if name := getattr(stub, f"cudart_stub_{what}")(host, *more):
            return name
    return None


class _DlInfo(ctypes.Structure):
    _fields_ = [
        ("path", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    ]


def _library_of(address: int) -> Path:
    info = _DlInfo()
    if not ctypes.CDLL(None).dladdr(ctypes.c_void_p(address), ctypes.byref(info)):
        raise toolchain.ToolchainError(f"address {address:#x} is in no loaded library")
    return Path(os.fsdecode(info.path)).resolve()


def demangle(name: str) -> str:
    """A kernel's C++ name, or the name itself if it is not mangled."""
    if not name.startswith("_Z"):
        return name
    library = ctypes.CDLL("libstdc++.so.6")
    library.__cxa_demangle.restype = ctypes.c_void_p
    status = ctypes.c_int()
    pointer = library.__cxa_demangle(name.encode(), None, None, ctypes.byref(status))
    if not pointer:
        return name
    text = ctypes.string_at(pointer).decode()
    ctypes.CDLL(None).free(ctypes.c_void_p(pointer))
    return text


# ------------------------------------------------------------------------------------------------
# Modules: PTX and cubins of a library

_SIZES = {"8": 1, "16": 2, "32": 4, "64": 8, "128": 16}


def parameters_of(ptx: str, kernel: str) -> list[int]:
    """Sizes in bytes of a kernel's parameters, read off its ``.param`` list.

    Raises ``KeyError`` if the PTX has no such entry.
    """
    head = rf"\.entry\s+{re.escape(kernel)}\s*(\(.*?\))?\s*(?:\.\w+[^{{;]*)?[{{;]"
    match = re.search(head, ptx, re.DOTALL)
    if match is None:
        raise KeyError(kernel)
    text = re.sub(r"//[^\n]*", "", match.group(1) or "")
    sizes = []
    for item in re.findall(r"\.param\s+([^,)]*)", text):
        kind = re.search(r"\.([busf]|pred|bf|tf)(8|16|32|64|128)(x2)?\b", item)
        count = re.search(r"\[(\d+)\]", item)
        if kind is None:
            raise ValueError(f"parameter of {kernel} without a type: .param {item.strip()}")
        size = _SIZES[kind.group(2)] * (2 if kind.group(3) else 1)
        sizes.append(size * (int(count.group(1)) if count else 1))
    return sizes


_BRACES = re.compile(r"[{};]")


@functools.lru_cache(maxsize=8)
def _entries(ptx: str) -> list[tuple[str, int, int]]:
    """Name, begin and end of each kernel, from its ``.entry`` to the brace that closes its body."""
    found = []
    end = 0
    for entry in re.finditer(r"(?:\.(?:visible|weak|extern)\s+)*\.entry\s+([\w$]+)", ptx):
        if entry.start() < end:
            continue
        depth = 0
        for brace in _BRACES.finditer(ptx, entry.end()):
            depth += {"{": 1, "}": -1, ";": 0}[brace[0]]
            if depth == 0:  # the end of the body, or of a declaration
                break
        end = brace.end()
        found.append((entry[1], entry.start(), end))
    return found


def only_kernel(ptx: str, kernel: str) -> str:
    """The module without the other kernels: a library's PTX may be megabytes, of which a launch
    needs a hundredth. What is left out becomes empty lines, so that a line keeps its number."""
    parts, end = [], 0
    for name, start, stop in _entries(ptx):
        if name != kernel:
            parts += [ptx[end:start], "\n" * ptx.count("\n", start, stop)]
            end = stop
    return "".join([*parts, ptx[end:]])


def _compute(target: str) -> tuple[int, str]:
    match = re.fullmatch(r"sm_(\d+)([af]?)", target)
    return (int(match.group(1)), match.group(2)) if match else (0, "")


@dataclass
class _Module:
    """The device code of one library, as one device sees it."""

    path: Path
    device: Device
    resources: dict[str, toolchain.Resources] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)

    def _newest(self, pattern: str) -> tuple[str, list[str]]:
        """The newest PTX with a match that the device can run ("" if none), all targets seen."""
        number = self.device.capability[0] * 10 + self.device.capability[1]
        best: tuple[int, str] = (-1, "")
        seen = []
        for code in toolchain.extract_ptx(self.path):
            if not re.search(pattern, code.text):
                continue
            version, suffix = _compute(code.target)
            seen.append(code.target)
            # Code for "a" runs on that architecture alone.
            fits = version == number if suffix == "a" else version <= number
            if fits and version > best[0]:
                best = (version, code.text)
        return best[1], sorted(set(seen))

    def ptx_for(self, kernel: str) -> str:
        """The newest PTX with this kernel that the device can run."""
        if kernel not in self.texts:
            text, seen = self._newest(rf"\.entry\s+{re.escape(kernel)}\b(?!\$)")
            if not text:
                number = self.device.capability[0] * 10 + self.device.capability[1]
                raise RuntimeFailure(
                    "launch",
                    NO_KERNEL_IMAGE,
                    f"{self.path} has no PTX of {demangle(kernel)} that {self.device} can run: "
                    + (f"it has {', '.join(seen)}" if seen else "none at all")
                    + f"; compile with -gencode arch=compute_{number},code=compute_{number} "
                    "or lower",
                )
            self.texts[kernel] = only_kernel(text, kernel)
        return self.texts[kernel]

    def initial(self, variable: str, size: int) -> bytes:
        """What a __device__ or __constant__ variable starts as, or holds by now."""
        text, _ = self._newest(rf"\.(global|const)\b[^;]*\b{re.escape(variable)}\b")
        if not text:
            return bytes(size)
        module = _parsed(text)
        if variable in module._memory:
            return bytes(module._memory[variable])
        data = module.parsed.variables[variable].data
        return bytes(data) if data else bytes(size)

    def resources_for(self, kernel: str) -> toolchain.Resources:
        """By the cubin that the driver would take, or by ptxas for the PTX if there is none."""
        if kernel not in self.resources:
            major, minor = self.device.capability
            best = -1
            for code in toolchain.extract_cubins(self.path):
                version, suffix = _compute(code.target)
                exact = version == major * 10 + minor
                fits = exact if suffix == "a" else version // 10 == major and version % 10 <= minor
                if not fits or version <= best:
                    continue
                with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                    file.write(code.data)
                    file.flush()
                    found = toolchain.resource_usage(file.name)
                if kernel in found:
                    self.resources[kernel] = found[kernel]
                    best = version
            if best < 0:
                cubin = toolchain.assemble(self.ptx_for(kernel), self.device.target)
                self.resources[kernel] = cubin.resources[kernel]
        return self.resources[kernel]


# ------------------------------------------------------------------------------------------------
# Streams, events, graphs


@dataclass(eq=False)
class _Op:
    run: Callable[[], None]
    after: set[_Op]
    what: str
    done: bool = False


@dataclass(eq=False)
class Graph:
    """Captured operations, in the order of capture; each with the ones that it waits for."""

    ops: list[_Op] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        return [op.what for op in self.ops]


@dataclass(eq=False)
class _Stream:
    handle: int
    blocking: bool = True
    device: int = 0
    priority: int = 0
    tail: set[_Op] = field(default_factory=set)
    capture: Graph | None = None
    origin: bool = False


@dataclass(eq=False)
class _Event:
    recorded: set[_Op] | None = None
    capture: Graph | None = None
    clock: float = 0.0
    timing: bool = True


class _Refused(Exception):
    """Raised inside a handler: the call returns this code."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


Engine = Callable[[LaunchRequest], Any]


class EmulatedRuntime:
    """The CUDA runtime over emulated kernels; a context manager, one at a time in a process.

    Args:
        device: a name from ``devices.DEVICES`` or a ``Device``.
        library: a shared library (or several) to load; the first is ``rt.lib``.
        checks: passed to the emulator (see ``emulate``).
        seed: decides the order of warps, blocks and, when deferred, of streams.
        order: ``"eager"`` or ``"deferred"``.
        strict: raise the first of ``errors`` when the context is left.
        devices: how many such devices the machine has.
        engine: what runs a ``LaunchRequest`` and returns an object with ``counts`` and ``reports``;
            the emulator by default.
        options: further keyword arguments for the emulator.

    ``launches`` lists every launch in the order of execution, ``calls`` the name of every call.
    """

    def __init__(
        self,
        device: str | Device = "h100",
        library: str | Path | Sequence[str | Path] | None = None,
        *,
        checks: Any = True,
        seed: int = 0,
        order: str = "eager",
        strict: bool = True,
        devices: int = 1,
        engine: Engine | None = None,
        **options: Any,
    ) -> None:
        if order not in ("eager", "deferred"):
            raise ValueError(f"order={order!r}: expected 'eager' or 'deferred'")
        self.device = get_device(device)
        self.checks, self.seed, self.order, self.strict = checks, seed, order, strict
        self.device_count, self.current = devices, 0
        self.options = options
        self.launches: list[Launch] = []
        self.calls: list[str] = []
        self.errors: list[RuntimeFailure] = []
        self.lib: Any = None
        self._libraries = [library] if isinstance(library, (str, Path)) else list(library or [])
        self._engine = engine or _emulate
        self._random = random.Random(seed)
        self._buffers: dict[int, Buffer] = {}
        self._modules: dict[Path, _Module] = {}
        self._optin: dict[tuple[int, int], int] = {}  # by device and kernel
        self._objects: dict[int, Any] = {}
        self._next_handle = 0x1000
        self._default = _Stream(0)
        self._pending: list[_Op] = []
        self._clock = 0.0
        self._callback = _HANDLER(self._dispatch)

    # -- the context ------------------------------------------------------------------------------

    def __enter__(self) -> EmulatedRuntime:
        global _active
        with _lock:
            if _active is not None:
                raise RuntimeError("another EmulatedRuntime is active in this process")
            _load_stub()
            _active = self
            self._listen()
        try:
            for path in self._libraries:
                loaded = self.load(path)
                self.lib = self.lib or loaded
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(self, kind: Any, value: Any, traceback: Any) -> None:
        try:
            self._drain()
        finally:
            self._leave()
        if self.errors and self.strict and kind is None:
            raise self.errors[0]

    def _listen(self) -> None:
        for stub in _stubs.values():
            stub.cudart_stub_set_handler(ctypes.cast(self._callback, ctypes.c_void_p))

    def _leave(self) -> None:
        global _active
        with _lock:
            for stub in _stubs.values():
                stub.cudart_stub_set_handler(None)
            _active = None

    def load(self, path: str | Path) -> ctypes.CDLL:
        """Load a library linked with ``-cudart shared``. Raises ``ToolchainError`` for one that is
        not there, or that carries its own runtime and so could not be watched."""
        path = Path(path).resolve()
        if not path.is_file():
            raise toolchain.ToolchainError(f"no such library: {path}")
        needs = re.search(rb"\0libcudart\.so\.(\d+)\0", path.read_bytes())
        if needs is None:
            raise toolchain.ToolchainError(
                f"{path} does not ask for libcudart.so: it was linked with a static CUDA runtime, "
                "which nothing can stand in for. Link the same objects with `nvcc -cudart shared`."
            )
        major = int(needs.group(1))
        if major not in MAJORS:
            raise toolchain.ToolchainError(
                f"{path} asks for libcudart.so.{major}; there are stand-ins for "
                f"libcudart.so.{' and .'.join(map(str, MAJORS))}: build it with one of those."
            )
        with _lock:
            if major not in _stubs:
                _load_stub(major)
                if _active is self:
                    self._listen()
        try:
            return ctypes.CDLL(str(path))
        except OSError as error:
            missing = re.search(r"undefined symbol: (cuda\w+|__cuda\w+)", str(error))
            if missing is None:
                raise
            raise toolchain.ToolchainError(
                f"{path} calls {missing.group(1)}, which the stand-in CUDA runtime does not have"
            ) from None

    def modelled(self, device: str | Device | None = None) -> list[model.Modelled]:
        """The *modelled* time of every launch so far, on this device or another (``model.model``;
        the launches must have been counted)."""
        on = get_device(device or self.device)
        return [model.model(model.work_of_launch(one, on)[0], on) for one in self.launches]

    # -- memory -----------------------------------------------------------------------------------

    def pointer(self, array: Any, name: str | None = None) -> ctypes.c_void_p:
        """Make a tensor or array known, and return its address for a launcher.

        All of it counts as initialised. Raises ``TypeError`` for what has no memory on the host,
        ``ValueError`` for an array that is not contiguous.
        """
        if hasattr(array, "data_ptr"):
            if array.device.type != "cpu":
                raise TypeError(f"tensor on {array.device}: the emulator's memory is the host's")
            if not array.is_contiguous():
                raise ValueError(f"tensor of shape {tuple(array.shape)} is not contiguous")
            address, size = array.data_ptr(), array.numel() * array.element_size()
            dtype = {1: "u1", 2: "u2", 4: "u4", 8: "u8", 16: "V16"}[array.element_size()]
        elif isinstance(array, np.ndarray):
            if not array.flags.c_contiguous:
                raise ValueError(f"array of shape {array.shape} is not contiguous")
            address, size, dtype = array.ctypes.data, array.nbytes, array.dtype
        else:
            raise TypeError(f"{type(array).__name__}: expected a torch tensor or a NumPy array")
        if size:
            name = name or f"tensor@{address:#x}"
            buffer = Buffer(address, size, name, None, array, "tensor", dtype, tuple(array.shape))
            self._remember(buffer)
        return ctypes.c_void_p(address)

    def _remember(self, new: Buffer) -> None:
        """Add a tensor's buffer. Views of one memory that are given apart are one buffer."""
        end = new.address + new.size
        for old in list(self._buffers.values()):
            if old.address < end and new.address < old.address + old.size:
                if old.address <= new.address and end <= old.address + old.size:
                    if (old.address, old.size) != (new.address, new.size):
                        return  # a part of what is known
                    continue
                start = min(old.address, new.address)
                end = max(old.address + old.size, end)
                names = f"{old.name} and {new.name}"
                owner = (old.owner, new.owner)
                del self._buffers[old.address]
                new = Buffer(start, end - start, names, None, owner)
        self._buffers[new.address] = new

    def empty(self, shape: int | Sequence[int], dtype: Any = np.float32) -> np.ndarray:
        """An array of zeros at a multiple of 256 bytes, as the device's allocator gives it: on one
        that NumPy places, sectors and alignment are counted from wherever it lies."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        storage = np.zeros(size + 256, np.uint8)
        start = -storage.ctypes.data % 256
        out: np.ndarray = storage[start : start + size].view(dtype).reshape(shape)
        return out

    def forget(self, array: Any) -> None:
        """The counterpart of ``pointer``: touching the array from now on is out of bounds."""
        address = array.data_ptr() if hasattr(array, "data_ptr") else array.ctypes.data
        self._buffers.pop(address, None)

    @property
    def buffers(self) -> list[Buffer]:
        return sorted(self._buffers.values(), key=lambda b: b.address)

    def _find(self, address: int) -> Buffer | None:
        for buffer in self._buffers.values():
            if address in buffer:
                return buffer
        return None

    def _allocate(self, size: int, kind: str) -> int:
        used = sum(b.size for b in self._buffers.values() if b.kind == "device")
        if kind == "device" and used + size > self.device.memory:
            raise _Refused(
                OUT_OF_MEMORY,
                f"{size} bytes more than {used} do not fit the {self.device.memory} "
                f"of {self.device}",
            )
        if size == 0:
            return 0
        try:
            storage = np.full(size + 256, 0xA5, np.uint8)
        except MemoryError:
            raise _Refused(OUT_OF_MEMORY, f"the host has no {size} bytes") from None
        address = storage.ctypes.data + (-storage.ctypes.data) % 256
        initialized = np.zeros(size, np.uint8) if kind != "host" else None
        count = sum(b.kind == kind for b in self._buffers.values())
        name = f"{kind} allocation {count} ({size} bytes)"
        self._buffers[address] = Buffer(address, size, name, initialized, storage, kind)
        return address

    def _release(self, address: int) -> None:
        if address == 0:
            return
        buffer = self._buffers.get(address)
        if buffer is None or buffer.kind == "tensor":
            raise _Refused(INVALID_VALUE, f"{address:#x} was not allocated by this runtime")
        del self._buffers[address]

    def _range(self, address: int, size: int, role: str, device: bool) -> Buffer | None:
        """The buffer of a range, checked; None for plain host memory where that is allowed."""
        buffer = self._find(address)
        if buffer is None:
            if device:
                raise _Refused(
                    INVALID_VALUE,
                    f"{role} {address:#x} is said to be on the device, but lies in no allocation "
                    "and in no tensor that was given to pointer()",
                )
            return None
        end = buffer.address + buffer.size
        if address + size > end:
            raise _Refused(
                INVALID_VALUE,
                f"{role} of {size} bytes at {address:#x} runs {address + size - end} bytes past "
                f"the end of {buffer.name}",
            )
        return buffer

    def _copy(self, to: int, source: int, size: int, kind: int) -> Callable[[], None]:
        # 0 host to host, 1 host to device, 2 device to host, 3 device to device, 4 by address
        if kind not in range(5):
            raise _Refused(INVALID_VALUE, f"kind {kind} is no cudaMemcpyKind")
        target = self._range(to, size, "destination", kind in (1, 3))
        origin = self._range(source, size, "source", kind in (2, 3))

        def run() -> None:
            ctypes.memmove(to, source, size)
            if target is not None and target.initialized is not None:
                at = to - target.address
                known: Any = 1
                if origin is not None and origin.initialized is not None:
                    start = source - origin.address
                    known = origin.initialized[start : start + size].copy()
                target.initialized[at : at + size] = known

        return run

    def _fill(self, to: int, value: int, size: int) -> Callable[[], None]:
        target = self._range(to, size, "destination", True)

        def run() -> None:
            ctypes.memset(to, value & 0xFF, size)
            if target is not None and target.initialized is not None:
                at = to - target.address
                target.initialized[at : at + size] = 1

        return run

    # -- streams ----------------------------------------------------------------------------------

    def stream(self, *, blocking: bool = True) -> ctypes.c_void_p:
        """A new stream, for a launcher's stream argument."""
        return ctypes.c_void_p(self._new(_Stream(self._next_handle, blocking)))

    def synchronize(self) -> None:
        """Run all that was submitted, and raise the first error if there was one and ``strict``."""
        self._drain()
        if self.errors and self.strict:
            raise self.errors[0]

    def _new(self, thing: Any) -> int:
        handle = self._next_handle
        self._next_handle += 0x10
        if isinstance(thing, _Stream):
            thing.handle, thing.device = handle, self.current
        self._objects[handle] = thing
        return handle

    def _get(self, handle: int, kind: type, what: str) -> Any:
        if kind is _Stream and handle in (0, 1, 2):  # the default stream, legacy or of the thread
            return self._default
        thing = self._objects.get(handle)
        if not isinstance(thing, kind):
            raise _Refused(INVALID_HANDLE, f"{handle:#x} is no {what}")
        return thing

    def _streams(self) -> list[_Stream]:
        return [self._default, *(o for o in self._objects.values() if isinstance(o, _Stream))]

    def _submit(self, stream: _Stream, what: str, run: Callable[[], None]) -> None:
        if stream.capture is not None:
            op = _Op(run, set(stream.tail), what)
            stream.capture.ops.append(op)
            stream.tail = {op}
            return
        after = set(stream.tail)
        if stream is self._default:  # waits for all blocking streams, and they for it
            for other in self._streams():
                if other.blocking:
                    if other.capture is not None:
                        raise _Refused(
                            CAPTURE_IMPLICIT,
                            f"{what} in the default stream, which waits for a stream that is "
                            "capturing: give the launcher that stream",
                        )
                    after |= other.tail
        elif stream.blocking:
            after |= self._default.tail
        op = _Op(run, {a for a in after if not a.done}, what)
        stream.tail = {op}
        self._pending.append(op)
        if self.order == "eager":
            self._drain({op})

    def _drain(self, until: set[_Op] | None = None) -> None:
        """Run what is pending until ``until`` (or all) is done, in a permitted order."""
        while self._pending and (until is None or any(not op.done for op in until)):
            ready = [op for op in self._pending if all(a.done for a in op.after)]
            op = ready[0] if self.order == "eager" else self._random.choice(ready)
            self._pending.remove(op)
            op.done = True  # even if it fails: what waits for it goes on, as after a failed kernel
            op.after = set()
            op.run()
            self._clock += 1.0

    def _refuse_capture(self, what: str) -> None:
        if any(s.capture is not None for s in self._streams()):
            raise _Refused(
                CAPTURE_UNSUPPORTED,
                f"{what} while a stream is capturing: a launcher to be captured must neither "
                "allocate nor synchronise",
            )

    # -- kernels ----------------------------------------------------------------------------------

    def _kernel(self, host: int) -> tuple[str, _Module]:
        name = _registered("function", host, None)
        if name is None:
            raise _Refused(INVALID_DEVICE_FUNCTION, f"{host:#x} is not a __global__ function")
        path = _library_of(host)
        module = self._modules.setdefault(path, _Module(path, self.device))
        return name.decode(), module

    def _launch(
        self, words: Any, cooperative: bool = False, attributes: Sequence[tuple[int, int]] = ()
    ) -> None:
        host = words[0]
        grid, block = tuple(words[1:4]), tuple(words[4:7])
        array, shared, stream_handle = words[7], words[8], words[9]
        kernel, module = self._kernel(host)
        readable = demangle(kernel)
        stream = self._get(stream_handle, _Stream, "stream")
        if stream is not self._default and stream.device != self.current:
            raise _Refused(
                INVALID_HANDLE,
                f"{readable}: the stream is device {stream.device}'s, the current device is "
                f"{self.current}",
            )
        threads = block[0] * block[1] * block[2]
        if 0 in grid or 0 in block:
            raise _Refused(INVALID_CONFIGURATION, f"{readable}: empty grid {grid} or block {block}")
        if threads > 1024 or block[0] > 1024 or block[1] > 1024 or block[2] > 64:
            raise _Refused(
                INVALID_CONFIGURATION,
                f"{readable}: a block of {block} has {threads} threads; at most 1024, and "
                "(1024, 1024, 64) along its sides",
            )
        if grid[0] > 2**31 - 1 or grid[1] > 65535 or grid[2] > 65535:
            raise _Refused(
                INVALID_CONFIGURATION,
                f"{readable}: a grid of {grid}; at most (2147483647, 65535, 65535)",
            )
        ptx = module.ptx_for(kernel)
        use = module.resources_for(kernel)
        opted_in = (self.current, host) in self._optin
        allowed = self._optin.get((self.current, host), max(0, 49152 - use.shared))
        if shared > allowed:
            raise _Refused(
                INVALID_VALUE,
                f"{readable}: {shared} bytes of dynamic shared memory, {allowed} allowed"
                + (" by" if opted_in else " without")
                + " cudaFuncSetAttribute(cudaFuncAttributeMaxDynamicSharedMemorySize)",
            )
        bounds = re.search(
            rf"\.entry\s+{re.escape(kernel)}\s*\([^)]*\)[^{{]*\.maxntid\s+(\d+)(?:,\s*(\d+))?(?:,\s*(\d+))?",
            ptx,
        )
        if bounds:
            most = int(np.prod([int(b or 1) for b in bounds.groups()]))
            if threads > most:
                raise _Refused(
                    LAUNCH_OUT_OF_RESOURCES,
                    f"{readable}: {threads} threads, but it was compiled for at most {most} "
                    "(__launch_bounds__)",
                )
        fit = occupancy(self.device, threads, use.registers, use.shared + shared)
        if fit.blocks == 0:
            raise _Refused(
                LAUNCH_OUT_OF_RESOURCES,
                f"{readable}: {threads} threads of {use.registers} registers and "
                f"{use.shared + shared} bytes of shared memory do not fit a multiprocessor of "
                f"{self.device}: {fit.limiter}",
            )
        if cooperative and grid[0] * grid[1] * grid[2] > fit.blocks * self.device.sms:
            raise _Refused(
                COOPERATIVE_TOO_LARGE,
                f"{readable}: a cooperative grid of {grid} needs all blocks resident; "
                f"{self.device} holds {fit.blocks} on each of {self.device.sms} multiprocessors",
            )
        sizes = parameters_of(ptx, kernel)
        pointers = (ctypes.c_uint64 * max(1, len(sizes))).from_address(array) if sizes else []
        arguments = [
            ctypes.string_at(pointer, size) for pointer, size in zip(pointers, sizes, strict=True)
        ]

        def run() -> None:
            # A fresh record each time: a graph's node runs more than once.
            launch = Launch(
                kernel, readable, grid, block, shared, stream_handle, arguments, use,
                fit.blocks, ptx, cooperative,
            )  # fmt: skip
            self.launches.append(launch)
            symbols = {
                b.name: b.address
                for b in self._buffers.values()
                if b.kind == f"symbol:{module.path}"
            }
            text = self._with_workspace(ptx) if "%envreg" in ptx else ptx
            request = LaunchRequest(
                text, kernel, grid, block, shared, arguments, self.buffers, self.device,
                self.checks, self.seed + len(self.launches), cooperative, use.registers, symbols,
                self.options,
            )  # fmt: skip
            try:
                launch.result = self._engine(request)
            except Exception as error:
                failure = RuntimeFailure("launch", LAUNCH_FAILURE, f"{readable}: {error}")
                failure.__cause__ = error
                self.errors.append(failure)
                if self.order == "eager" and stream.capture is None:
                    raise _Reported(LAUNCH_FAILURE) from error
                return
            launch.counts = getattr(launch.result, "counts", None)
            launch.reports = getattr(launch.result, "reports", None)
            for report in launch.reports or ():
                code = LAUNCH_FAILURE if report.fatal else SUCCESS
                self.errors.append(RuntimeFailure("launch", code, f"{readable}: {report}"))
            if any(r.fatal for r in launch.reports or ()) and self.order == "eager":
                raise _Reported(LAUNCH_FAILURE)

        self._submit(stream, readable, run)

    def _with_workspace(self, ptx: str) -> str:
        """PTX whose grid-wide barrier finds its memory.

        The driver passes the address of a workspace (a size and a counter) in the environment
        registers 1 and 2, high half first, to ``grid.sync()``. Here they are constants; the lines
        stay where they are.
        """
        known = [b for b in self._buffers.values() if b.kind == "workspace"]
        address = known[0].address if known else self._allocate(256, "workspace")
        buffer = self._buffers[address]
        buffer.name, buffer.initialized = "the grid's workspace", None
        ctypes.memset(address, 0, 256)
        _write(address, ctypes.c_uint, 256)
        halves = {"1": address >> 32, "2": address & 0xFFFFFFFF}
        return re.sub(r"%envreg([12])\b", lambda m: str(halves[m.group(1)]), ptx)

    # -- dispatch ---------------------------------------------------------------------------------

    def _dispatch(self, name: bytes, words: Any) -> int:
        call = name.decode()
        with _lock:
            self.calls.append(call)
            try:
                return getattr(self, "_do_" + call)(words) or SUCCESS
            except _Refused as refusal:
                self.errors.append(RuntimeFailure(call, refusal.code, str(refusal)))
                return refusal.code
            except RuntimeFailure as failure:
                self.errors.append(failure)
                return failure.code
            except _Reported as reported:
                return reported.code
            except Exception as error:  # a mistake here must not unwind through the launcher's C++
                failure = RuntimeFailure(call, 999, f"{type(error).__name__}: {error}")
                failure.__cause__ = error
                self.errors.append(failure)
                return 999

    def _do_launch(self, w: Any) -> None:
        self._launch(w)

    def _do_launch_cooperative(self, w: Any) -> None:
        self._launch(w, cooperative=True)

    def _do_launch_ex(self, w: Any) -> None:
        # cudaLaunchAttribute: an id, four bytes of padding, 64 bytes of value.
        attributes = []
        for index in range(w[11]):
            base = w[10] + 72 * index
            attributes.append((_read(base, ctypes.c_int), _read(base + 8, ctypes.c_int)))
        for index, (kind, _) in enumerate(attributes):
            sides = (_read(w[10] + 72 * index + 8 + 4 * j, ctypes.c_uint) for j in range(3))
            if kind != 4 or max(sides) <= 1:
                continue
            raise _Refused(NOT_SUPPORTED, "clusters of more than one block are not emulated")
        self._launch(w, cooperative=any(a == (2, 1) for a in attributes), attributes=attributes)

    # Devices

    def _do_cudaGetDeviceCount(self, w: Any) -> None:
        _write(w[0], ctypes.c_int, self.device_count)

    def _do_cudaGetDevice(self, w: Any) -> None:
        _write(w[0], ctypes.c_int, self.current)

    def _do_cudaSetDevice(self, w: Any) -> None:
        number = _signed(w[0])
        if not 0 <= number < self.device_count:
            raise _Refused(INVALID_DEVICE, f"device {number} of {self.device_count}")
        self.current = number

    def _do_cudaDeviceGetAttribute(self, w: Any) -> None:
        value = device_attribute(self.device, w[1])
        if value is None:
            raise _Refused(INVALID_VALUE, f"device attribute {w[1]} is not in the table")
        _write(w[0], ctypes.c_int, value)

    def _do_cudaGetDeviceProperties(self, w: Any) -> None:
        properties = device_properties(self.device)
        ctypes.memmove(w[0], ctypes.byref(properties), ctypes.sizeof(properties))

    def _do_cudaGetDeviceProperties_12(self, w: Any) -> None:
        properties = device_properties(self.device, 12)
        ctypes.memmove(w[0], ctypes.byref(properties), ctypes.sizeof(properties))

    def _do_cudaDeviceSynchronize(self, w: Any) -> None:
        self._refuse_capture("cudaDeviceSynchronize")
        self._drain()

    _do_cudaDeviceReset = _do_cudaDeviceSynchronize

    def _do_cudaDriverGetVersion(self, w: Any) -> None:
        _write(w[0], ctypes.c_int, 13000)

    _do_cudaRuntimeGetVersion = _do_cudaDriverGetVersion

    def _do_cudaRuntimeGetVersion_12(self, w: Any) -> None:
        _write(w[0], ctypes.c_int, 12080)

    def _do_cudaMemGetInfo(self, w: Any) -> None:
        used = sum(b.size for b in self._buffers.values() if b.kind == "device")
        _write(w[0], ctypes.c_size_t, self.device.memory - used)
        _write(w[1], ctypes.c_size_t, self.device.memory)

    def _do_cudaDeviceGetStreamPriorityRange(self, w: Any) -> None:
        _write(w[0], ctypes.c_int, 0)
        _write(w[1], ctypes.c_int, -5)

    def _do_cudaDeviceSetLimit(self, w: Any) -> None:
        pass

    def _do_cudaDeviceGetLimit(self, w: Any) -> None:
        _write(w[0], ctypes.c_size_t, 0)

    _do_cudaDeviceSetCacheConfig = _do_cudaDeviceSetLimit
    _do_cudaFuncSetCacheConfig = _do_cudaDeviceSetLimit

    def _do_cudaDeviceCanAccessPeer(self, w: Any) -> None:
        _write(w[0], ctypes.c_int, 1)

    # Memory

    def _do_cudaMalloc(self, w: Any) -> None:
        self._refuse_capture("cudaMalloc")
        _write(w[0], ctypes.c_void_p, self._allocate(w[1], "device"))

    def _do_cudaMallocManaged(self, w: Any) -> None:
        self._refuse_capture("cudaMallocManaged")
        _write(w[0], ctypes.c_void_p, self._allocate(w[1], "managed"))

    def _do_cudaMallocPitch(self, w: Any) -> None:
        self._refuse_capture("cudaMallocPitch")
        pitch = -(-w[2] // 512) * 512
        _write(w[0], ctypes.c_void_p, self._allocate(pitch * w[3], "device"))
        _write(w[1], ctypes.c_size_t, pitch)

    def _do_cudaFree(self, w: Any) -> None:
        self._refuse_capture("cudaFree")
        self._drain()  # cudaFree synchronises
        self._release(w[0])

    def _do_cudaMallocAsync(self, w: Any) -> None:
        self._get(w[2], _Stream, "stream")
        self._refuse_capture("cudaMallocAsync")
        _write(w[0], ctypes.c_void_p, self._allocate(w[1], "device"))

    def _do_cudaFreeAsync(self, w: Any) -> None:
        address = w[0]
        self._refuse_capture("cudaFreeAsync")
        self._submit(
            self._get(w[1], _Stream, "stream"), "cudaFreeAsync", lambda: self._release(address)
        )

    def _do_cudaMallocHost(self, w: Any) -> None:
        _write(w[0], ctypes.c_void_p, self._allocate(w[1], "host"))

    _do_cudaHostAlloc = _do_cudaMallocHost

    def _do_cudaFreeHost(self, w: Any) -> None:
        self._drain()
        self._release(w[0])

    def _do_cudaHostRegister(self, w: Any) -> None:
        name = f"host memory {w[0]:#x}"
        self._remember(Buffer(w[0], w[1], name, None, None, "registered"))

    def _do_cudart_stub_uninitialized(self, w: Any) -> None:
        buffer = self._find(w[0])
        if buffer is None:
            raise _Refused(INVALID_VALUE, f"{w[0]:#x} was not registered with cudaHostRegister")
        if buffer.initialized is None:
            buffer.initialized = np.ones(buffer.size, np.uint8)
        start = w[0] - buffer.address
        buffer.initialized[start : start + w[1]] = 0

    def _do_cudaHostUnregister(self, w: Any) -> None:
        self._release(w[0])

    def _do_cudaHostGetDevicePointer(self, w: Any) -> None:
        _write(w[0], ctypes.c_void_p, w[1])

    def _do_cudaPointerGetAttributes_12(self, w: Any) -> None:
        self._do_cudaPointerGetAttributes(w, 24)

    def _do_cudaPointerGetAttributes(self, w: Any, size: int = 88) -> None:
        buffer = self._find(w[1])
        kinds = {"host": 1, "registered": 1, "managed": 3}
        kind = 0 if buffer is None else kinds.get(buffer.kind, 2)
        ctypes.memset(w[0], 0, size)
        _write(w[0], ctypes.c_int, kind)
        _write(w[0] + 4, ctypes.c_int, 0 if kind else -2)
        _write(w[0] + 8, ctypes.c_void_p, w[1] if kind else 0)
        _write(w[0] + 16, ctypes.c_void_p, w[1] if kind in (0, 1, 3) else 0)

    def _do_cudaMemcpy(self, w: Any) -> None:
        self._refuse_capture("cudaMemcpy")
        self._submit(self._default, "cudaMemcpy", self._copy(w[0], w[1], w[2], _signed(w[3])))
        self._drain(self._default.tail)

    def _do_cudaMemcpyAsync(self, w: Any) -> None:
        copy = self._copy(w[0], w[1], w[2], _signed(w[3]))
        self._submit(self._get(w[4], _Stream, "stream"), "cudaMemcpyAsync", copy)

    def _copy_2d(self, w: Any) -> Callable[[], None]:
        to, to_pitch, source, pitch, width, height, kind = (*w[0:6], _signed(w[6]))
        rows = [
            self._copy(to + r * to_pitch, source + r * pitch, width, kind) for r in range(height)
        ]

        def run() -> None:
            for row in rows:
                row()

        return run

    def _do_cudaMemcpy2D(self, w: Any) -> None:
        self._refuse_capture("cudaMemcpy2D")
        self._submit(self._default, "cudaMemcpy2D", self._copy_2d(w))
        self._drain(self._default.tail)

    def _do_cudaMemcpy2DAsync(self, w: Any) -> None:
        self._submit(self._get(w[7], _Stream, "stream"), "cudaMemcpy2DAsync", self._copy_2d(w))

    def _do_cudaMemset(self, w: Any) -> None:
        self._refuse_capture("cudaMemset")
        self._submit(self._default, "cudaMemset", self._fill(w[0], w[1], w[2]))

    def _do_cudaMemsetAsync(self, w: Any) -> None:
        fill = self._fill(w[0], w[1], w[2])
        self._submit(self._get(w[3], _Stream, "stream"), "cudaMemsetAsync", fill)

    def _symbol(self, host: int) -> Buffer:
        """A __device__ or __constant__ variable: the host's shadow of it is its memory."""
        size = ctypes.c_uint64()
        name = _registered("variable", host, ctypes.byref(size), None)
        if name is None:
            raise _Refused(INVALID_SYMBOL, f"{host:#x} is no device variable")
        kind = f"symbol:{_library_of(host)}"
        for buffer in self._buffers.values():
            if buffer.kind == kind and buffer.name == name.decode():
                return buffer
        address = self._allocate(size.value, kind)
        buffer = self._buffers[address]
        buffer.name = name.decode()
        path = _library_of(host)
        module = self._modules.setdefault(path, _Module(path, self.device))
        ctypes.memmove(address, module.initial(buffer.name, size.value)[: size.value], size.value)
        buffer.initialized = None
        return buffer

    def _do_cudaMemcpyToSymbol(self, w: Any) -> None:
        to = self._symbol(w[0]).address + w[3]
        self._submit(self._default, "cudaMemcpyToSymbol", self._copy(to, w[1], w[2], _signed(w[4])))
        self._drain(self._default.tail)

    def _do_cudaMemcpyToSymbolAsync(self, w: Any) -> None:
        copy = self._copy(self._symbol(w[0]).address + w[3], w[1], w[2], _signed(w[4]))
        self._submit(self._get(w[5], _Stream, "stream"), "cudaMemcpyToSymbolAsync", copy)

    def _do_cudaMemcpyFromSymbol(self, w: Any) -> None:
        source = self._symbol(w[1]).address + w[3]
        copy = self._copy(w[0], source, w[2], _signed(w[4]))
        self._submit(self._default, "cudaMemcpyFromSymbol", copy)
        self._drain(self._default.tail)

    def _do_cudaMemcpyFromSymbolAsync(self, w: Any) -> None:
        copy = self._copy(w[0], self._symbol(w[1]).address + w[3], w[2], _signed(w[4]))
        self._submit(self._get(w[5], _Stream, "stream"), "cudaMemcpyFromSymbolAsync", copy)

    def _do_cudaGetSymbolAddress(self, w: Any) -> None:
        _write(w[0], ctypes.c_void_p, self._symbol(w[1]).address)

    def _do_cudaGetSymbolSize(self, w: Any) -> None:
        _write(w[0], ctypes.c_size_t, self._symbol(w[1]).size)

    def _do_cudaMemPrefetchAsync(self, w: Any) -> None:
        self._range(w[0], w[1], "prefetch", True)
        self._submit(self._get(w[4], _Stream, "stream"), "cudaMemPrefetchAsync", lambda: None)

    def _do_cudaMemAdvise(self, w: Any) -> None:
        self._range(w[0], w[1], "advice", True)

    # Streams and events

    def _do_cudaStreamCreate(self, w: Any) -> None:
        _write(w[0], ctypes.c_void_p, self._new(_Stream(0)))

    def _do_cudaStreamCreateWithFlags(self, w: Any) -> None:
        _write(w[0], ctypes.c_void_p, self._new(_Stream(0, blocking=w[1] != 1)))

    def _do_cudaStreamCreateWithPriority(self, w: Any) -> None:
        stream = _Stream(0, blocking=w[1] != 1, priority=_signed(w[2]))
        _write(w[0], ctypes.c_void_p, self._new(stream))

    def _do_cudaStreamDestroy(self, w: Any) -> None:
        stream = self._get(w[0], _Stream, "stream")
        if stream is self._default:
            raise _Refused(INVALID_HANDLE, "the default stream cannot be destroyed")
        self._drain(stream.tail)
        del self._objects[w[0]]

    def _do_cudaStreamSynchronize(self, w: Any) -> None:
        self._refuse_capture("cudaStreamSynchronize")
        stream = self._get(w[0], _Stream, "stream")
        self._drain(stream.tail if stream is not self._default else None)

    def _do_cudaStreamQuery(self, w: Any) -> int:
        stream = self._get(w[0], _Stream, "stream")
        return SUCCESS if all(op.done for op in stream.tail) else NOT_READY

    def _do_cudaStreamWaitEvent(self, w: Any) -> None:
        stream = self._get(w[0], _Stream, "stream")
        event = self._get(w[1], _Event, "event")
        if event.capture is not None and stream.capture is None:
            stream.capture, stream.tail = event.capture, set()  # the stream joins the capture
        if event.recorded is not None:
            waits = event.recorded
            self._submit(stream, "cudaStreamWaitEvent", lambda: None)
            (op,) = stream.tail
            op.after |= {a for a in waits if not a.done}

    def _do_cudaStreamGetFlags(self, w: Any) -> None:
        stream = self._get(w[0], _Stream, "stream")
        _write(w[1], ctypes.c_uint, 0 if stream.blocking else 1)

    def _do_cudaStreamGetPriority(self, w: Any) -> None:
        _write(w[1], ctypes.c_int, self._get(w[0], _Stream, "stream").priority)

    def _do_cudaLaunchHostFunc(self, w: Any) -> None:
        function, data = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(w[1]), w[2]
        self._submit(self._get(w[0], _Stream, "stream"), "host function", lambda: function(data))

    def _do_cudaStreamAddCallback(self, w: Any) -> None:
        kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
        function, handle, data = kind(w[1]), w[0], w[2]
        stream = self._get(handle, _Stream, "stream")
        self._submit(stream, "callback", lambda: function(handle, 0, data))

    def _do_cudaEventCreate(self, w: Any) -> None:
        _write(w[0], ctypes.c_void_p, self._new(_Event()))

    def _do_cudaEventCreateWithFlags(self, w: Any) -> None:
        _write(w[0], ctypes.c_void_p, self._new(_Event(timing=not w[1] & 2)))

    def _do_cudaEventRecord(self, w: Any) -> None:
        event = self._get(w[0], _Event, "event")
        stream = self._get(w[1], _Stream, "stream")

        def run() -> None:
            event.clock = self._clock

        self._submit(stream, "cudaEventRecord", run)
        event.recorded, event.capture = set(stream.tail), stream.capture

    _do_cudaEventRecordWithFlags = _do_cudaEventRecord

    def _do_cudaEventSynchronize(self, w: Any) -> None:
        self._refuse_capture("cudaEventSynchronize")
        self._drain(self._get(w[0], _Event, "event").recorded or set())

    def _do_cudaEventQuery(self, w: Any) -> int:
        recorded = self._get(w[0], _Event, "event").recorded or set()
        return SUCCESS if all(op.done for op in recorded) else NOT_READY

    def _do_cudaEventElapsedTime(self, w: Any) -> None:
        first, second = self._get(w[1], _Event, "event"), self._get(w[2], _Event, "event")
        if not all(e.timing and e.recorded is not None for e in (first, second)):
            raise _Refused(INVALID_HANDLE, "an event without a time: not recorded, or timing off")
        # No time passes here. What is returned is the number of operations between the two, so
        # that it is positive and ordered, and useless as a measurement.
        _write(w[0], ctypes.c_float, max(second.clock - first.clock, 0.0))

    def _do_cudaEventDestroy(self, w: Any) -> None:
        self._get(w[0], _Event, "event")
        del self._objects[w[0]]

    # Capture and graphs

    def _do_cudaStreamBeginCapture(self, w: Any) -> None:
        stream = self._get(w[0], _Stream, "stream")
        if stream is self._default:
            raise _Refused(CAPTURE_UNSUPPORTED, "the default stream cannot be captured")
        if stream.capture is not None:
            raise _Refused(CAPTURE_UNSUPPORTED, "the stream is capturing already")
        stream.capture, stream.origin, stream.tail = Graph(), True, set()

    def _do_cudaStreamEndCapture(self, w: Any) -> None:
        stream = self._get(w[0], _Stream, "stream")
        if stream.capture is None or not stream.origin:
            raise _Refused(CAPTURE_UNMATCHED, "the stream did not begin a capture")
        graph = stream.capture
        joined = [s for s in self._streams() if s.capture is graph and s is not stream]
        ends = set(stream.tail)
        for op in stream.tail:
            stack = [op]
            while stack:
                for before in stack.pop().after:
                    if before not in ends:
                        ends.add(before)
                        stack.append(before)
        loose = [s for s in joined if not s.tail <= ends]
        for s in (stream, *joined):
            s.capture, s.origin, s.tail = None, False, set()
        for event in self._objects.values():
            if isinstance(event, _Event) and event.capture is graph:
                event.recorded = event.capture = None
        if loose:
            _write(w[1], ctypes.c_void_p, 0)
            raise _Refused(
                CAPTURE_UNJOINED, "a stream that joined the capture was not joined back by an event"
            )
        _write(w[1], ctypes.c_void_p, self._new(graph))

    def _do_cudaStreamIsCapturing(self, w: Any) -> None:
        _write(w[1], ctypes.c_int, 1 if self._get(w[0], _Stream, "stream").capture else 0)

    def _do_cudaStreamGetCaptureInfo(self, w: Any) -> None:
        capture = self._get(w[0], _Stream, "stream").capture
        _write(w[1], ctypes.c_int, 1 if capture is not None else 0)
        if w[2]:
            _write(w[2], ctypes.c_uint64, id(capture) if capture is not None else 0)

    def _do_cudaThreadExchangeStreamCaptureMode(self, w: Any) -> None:
        pass

    def _do_cudaGraphInstantiate(self, w: Any) -> None:
        graph = self._get(w[1], Graph, "graph")
        _write(w[0], ctypes.c_void_p, self._new(Graph(list(graph.ops))))

    _do_cudaGraphInstantiateWithFlags = _do_cudaGraphInstantiate

    def _do_cudaGraphUpload(self, w: Any) -> None:
        self._get(w[0], Graph, "graph")

    def _do_cudaGraphLaunch(self, w: Any) -> None:
        graph = self._get(w[0], Graph, "graph")
        stream = self._get(w[1], _Stream, "stream")
        self._submit(stream, "graph begins", lambda: None)
        begins = set(stream.tail)
        copies: dict[_Op, _Op] = {}
        for op in graph.ops:
            copy = _Op(op.run, {copies[a] for a in op.after} or set(begins), op.what)
            copies[op] = copy
            if stream.capture is not None:
                stream.capture.ops.append(copy)
            else:
                self._pending.append(copy)
        if copies:
            stream.tail = set(copies.values())
        if self.order == "eager" and stream.capture is None:
            self._drain(stream.tail)

    def _do_cudaGraphDestroy(self, w: Any) -> None:
        self._get(w[0], Graph, "graph")
        del self._objects[w[0]]

    _do_cudaGraphExecDestroy = _do_cudaGraphDestroy

    def _do_cudaGraphGetNodes(self, w: Any) -> None:
        graph = self._get(w[0], Graph, "graph")
        if w[1]:
            raise _Refused(NOT_SUPPORTED, "a graph's nodes can be counted, not listed")
        _write(w[2], ctypes.c_size_t, len(graph.ops))

    # Functions

    def _do_cudaFuncGetAttributes(self, w: Any) -> None:
        kernel, module = self._kernel(w[1])
        use = module.resources_for(kernel)
        attributes = _FuncAttributes()
        attributes.sharedSizeBytes = use.shared
        attributes.constSizeBytes = 0
        attributes.localSizeBytes = use.stack
        attributes.numRegs = use.registers
        attributes.maxThreadsPerBlock = max(
            (t for t in range(32, 1025, 32) if occupancy(self.device, t, use.registers).blocks),
            default=0,
        )
        attributes.ptxVersion = _compute(
            (re.search(r"\.target\s+(sm_\w+)", module.ptx_for(kernel)) or [""] * 2)[1]
        )[0]
        attributes.binaryVersion = self.device.capability[0] * 10 + self.device.capability[1]
        attributes.maxDynamicSharedSizeBytes = self._optin.get(
            (self.current, w[1]), 49152 - use.shared
        )
        attributes.preferredShmemCarveout = -1
        ctypes.memmove(w[0], ctypes.byref(attributes), ctypes.sizeof(attributes))

    def _do_cudaFuncSetAttribute(self, w: Any) -> None:
        kernel, module = self._kernel(w[0])
        attribute, value = _signed(w[1]), _signed(w[2])
        if attribute == 8:  # cudaFuncAttributeMaxDynamicSharedMemorySize
            static = module.resources_for(kernel).shared
            most = self.device.sm.shared_optin - static
            if not 0 <= value <= most:
                raise _Refused(
                    INVALID_VALUE,
                    f"{demangle(kernel)}: {value} bytes of dynamic shared memory; {self.device} "
                    f"allows {self.device.sm.shared_optin} a block, of which {static} are static",
                )
            self._optin[self.current, w[0]] = value
        elif attribute not in (9, 10, 11, 12, 13, 14, 15):
            raise _Refused(INVALID_VALUE, f"function attribute {attribute} is unknown")

    def _blocks(self, host: int, threads: int, shared: int) -> int:
        kernel, module = self._kernel(host)
        use = module.resources_for(kernel)
        if shared > self._optin.get((self.current, host), max(0, 49152 - use.shared)):
            return 0
        return occupancy(self.device, threads, use.registers, use.shared + shared).blocks

    def _do_cudaOccupancyMaxActiveBlocksPerMultiprocessor(self, w: Any) -> None:
        _write(w[0], ctypes.c_int, self._blocks(w[1], _signed(w[2]), w[3]))

    _do_cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags = (
        _do_cudaOccupancyMaxActiveBlocksPerMultiprocessor
    )

    def _do_cudaOccupancyAvailableDynamicSMemPerBlock(self, w: Any) -> None:
        kernel, module = self._kernel(w[1])
        sm, use = self.device.sm, module.resources_for(kernel)
        each = min(sm.shared // max(1, _signed(w[2])), sm.shared_optin + sm.shared_reserved)
        each = each // sm.shared_granularity * sm.shared_granularity
        _write(w[0], ctypes.c_size_t, max(0, each - sm.shared_reserved - use.shared))


class _Reported(Exception):
    """A failure that is in ``errors`` already; the call returns this code."""

    def __init__(self, code: int) -> None:
        super().__init__()
        self.code = code


@functools.lru_cache(maxsize=64)
def _parsed(ptx: str) -> Any:
    from .launch import Module

    return Module.from_ptx(ptx)


def _emulate(request: LaunchRequest) -> Any:
    """Hand a launch to the emulator."""
    from .launch import Region, launch

    kernel = _parsed(request.ptx).kernel(request.kernel)
    packed = bytearray(kernel.param_bytes)
    for param, value in zip(kernel.params, request.arguments, strict=True):
        packed[param.offset : param.offset + param.size] = value
    given = {int.from_bytes(a, "little"): k for k, a in enumerate(request.arguments) if len(a) == 8}
    regions = [
        Region(
            b.address, b.size, b.address, b.name, dtype=b.dtype, shape=b.shape,
            initialized=b.initialized, index=given.get(b.address), owner=b.owner,
        )
        for b in request.buffers
    ]  # fmt: skip
    return launch(
        kernel, request.grid, request.block, bytes(packed), regions, shared_bytes=request.shared,
        device=request.device, checks=request.checks, seed=request.seed,
        cooperative=request.cooperative, symbols=request.symbols, registers=request.registers,
        # Which argument points where is not known: launchers pass what they like.
        trust_regions=True, **request.options,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------
# The ABI's words and structures


def _signed(word: int) -> int:
    return ctypes.c_int32(word & 0xFFFFFFFF).value


def _write(address: int, kind: Any, value: Any) -> None:
    if not address:
        raise _Refused(INVALID_VALUE, "a null pointer for a result")
    kind.from_address(address).value = value


def _read(address: int, kind: Any) -> Any:
    return kind.from_address(address).value


class _FuncAttributes(ctypes.Structure):
    _fields_ = [
        ("sharedSizeBytes", ctypes.c_size_t),
        ("constSizeBytes", ctypes.c_size_t),
        ("localSizeBytes", ctypes.c_size_t),
        *[(n, ctypes.c_int) for n in (
            "maxThreadsPerBlock", "numRegs", "ptxVersion", "binaryVersion", "cacheModeCA",
            "maxDynamicSharedSizeBytes", "preferredShmemCarveout", "clusterDimMustBeSet",
            "requiredClusterWidth", "requiredClusterHeight", "requiredClusterDepth",
            "clusterSchedulingPolicyPreference", "nonPortableClusterSizeAllowed",
        )],
        ("reserved", ctypes.c_int * 16),
    ]  # fmt: skip


_I, _Z = ctypes.c_int, ctypes.c_size_t


class _DeviceProp(ctypes.Structure):
    """cudaDeviceProp of CUDA 13."""

    _fields_ = [
        ("name", ctypes.c_char * 256), ("uuid", ctypes.c_char * 16), ("luid", ctypes.c_char * 8),
        ("luidDeviceNodeMask", ctypes.c_uint), ("totalGlobalMem", _Z), ("sharedMemPerBlock", _Z),
        ("regsPerBlock", _I), ("warpSize", _I), ("memPitch", _Z), ("maxThreadsPerBlock", _I),
        ("maxThreadsDim", _I * 3), ("maxGridSize", _I * 3), ("totalConstMem", _Z), ("major", _I),
        ("minor", _I), ("textureAlignment", _Z), ("texturePitchAlignment", _Z),
        ("multiProcessorCount", _I), ("integrated", _I), ("canMapHostMemory", _I),
        ("textures", _I * 39), ("surfaceAlignment", _Z), ("concurrentKernels", _I),
        ("ECCEnabled", _I), ("pciBusID", _I), ("pciDeviceID", _I), ("pciDomainID", _I),
        ("tccDriver", _I), ("asyncEngineCount", _I), ("unifiedAddressing", _I),
        ("memoryBusWidth", _I), ("l2CacheSize", _I), ("persistingL2CacheMaxSize", _I),
        ("maxThreadsPerMultiProcessor", _I), ("streamPrioritiesSupported", _I),
        ("globalL1CacheSupported", _I), ("localL1CacheSupported", _I),
        ("sharedMemPerMultiprocessor", _Z), ("regsPerMultiprocessor", _I), ("managedMemory", _I),
        ("isMultiGpuBoard", _I), ("multiGpuBoardGroupID", _I), ("hostNativeAtomicSupported", _I),
        ("pageableMemoryAccess", _I), ("concurrentManagedAccess", _I),
        ("computePreemptionSupported", _I), ("canUseHostPointerForRegisteredMem", _I),
        ("cooperativeLaunch", _I), ("sharedMemPerBlockOptin", _Z),
        ("pageableMemoryAccessUsesHostPageTables", _I), ("directManagedMemAccessFromHost", _I),
        ("maxBlocksPerMultiProcessor", _I), ("accessPolicyMaxWindowSize", _I),
        ("reservedSharedMemPerBlock", _Z), ("hostRegisterSupported", _I),
        ("sparseCudaArraySupported", _I), ("hostRegisterReadOnlySupported", _I),
        ("timelineSemaphoreInteropSupported", _I), ("memoryPoolsSupported", _I),
        ("gpuDirectRDMASupported", _I), ("gpuDirectRDMAFlushWritesOptions", ctypes.c_uint),
        ("gpuDirectRDMAWritesOrdering", _I), ("memoryPoolSupportedHandleTypes", ctypes.c_uint),
        ("deferredMappingCudaArraySupported", _I), ("ipcEventSupported", _I),
        ("clusterLaunch", _I), ("unifiedFunctionPointers", _I), ("deviceNumaConfig", _I),
        ("deviceNumaId", _I), ("mpsEnabled", _I), ("hostNumaId", _I),
        ("gpuPciDeviceID", ctypes.c_uint), ("gpuPciSubsystemID", ctypes.c_uint),
        ("hostNumaMultinodeIpcSupported", _I), ("reserved", _I * 56),
    ]  # fmt: skip


def _with_removed(fields: Sequence[Any]) -> list[Any]:
    """cudaDeviceProp's fields as CUDA 12 had them: with those that CUDA 13 took out."""
    removed = {
        "totalConstMem": ["clockRate"],
        "multiProcessorCount": ["deviceOverlap"],
        "integrated": ["kernelExecTimeoutEnabled"],
        "textures": ["computeMode", "maxTexture1DLinear"],  # the second lay among the textures
        "memoryBusWidth": ["memoryClockRate"],
        "pageableMemoryAccess": ["singleToDoublePrecisionPerfRatio"],
        "sharedMemPerBlockOptin": ["cooperativeMultiDeviceLaunch"],
    }
    return [
        entry
        for field_ in fields
        for entry in [*((name, ctypes.c_int) for name in removed.get(field_[0], ())), field_]
    ]


class _DeviceProp12(ctypes.Structure):
    _fields_ = _with_removed(_DeviceProp._fields_)


def device_properties(device: Device, major: int = 13) -> Any:
    """cudaDeviceProp of a device in the table, as CUDA 13 or 12 lays it out."""
    p: Any = _DeviceProp() if major == 13 else _DeviceProp12()
    sm = device.sm
    if major == 12:
        p.clockRate, p.memoryClockRate = int(device.clock / 1000), device.memory_clock_khz
        p.deviceOverlap = 1
    p.name = device.name.encode()
    p.totalGlobalMem = device.memory
    p.sharedMemPerBlock = 49152
    p.regsPerBlock = p.regsPerMultiprocessor = sm.registers
    p.warpSize, p.memPitch = 32, 2**31 - 1
    p.maxThreadsPerBlock = 1024
    p.maxThreadsDim[:] = (1024, 1024, 64)
    p.maxGridSize[:] = (2**31 - 1, 65535, 65535)
    p.totalConstMem = 65536
    p.major, p.minor = device.capability
    p.textureAlignment, p.texturePitchAlignment, p.surfaceAlignment = 512, 32, 512
    p.multiProcessorCount = device.sms
    p.canMapHostMemory = p.concurrentKernels = p.unifiedAddressing = p.managedMemory = 1
    p.concurrentManagedAccess = p.computePreemptionSupported = p.cooperativeLaunch = 1
    p.streamPrioritiesSupported = p.globalL1CacheSupported = p.localL1CacheSupported = 1
    p.hostRegisterSupported = p.memoryPoolsSupported = p.unifiedFunctionPointers = 1
    p.asyncEngineCount = 2
    p.memoryBusWidth = device.bus_bits
    p.l2CacheSize = device.l2_bytes
    p.maxThreadsPerMultiProcessor = sm.threads
    p.sharedMemPerMultiprocessor = sm.shared
    p.sharedMemPerBlockOptin = sm.shared_optin
    p.maxBlocksPerMultiProcessor = sm.blocks
    p.reservedSharedMemPerBlock = sm.shared_reserved
    p.clusterLaunch = int(device.capability >= (9, 0))
    return p


def device_attribute(device: Device, attribute: int) -> int | None:
    """A cudaDeviceAttr's value, or None for one that is not in the table."""
    p = device_properties(device)
    values = {
        1: 1024, 2: 1024, 3: 1024, 4: 64, 5: 2**31 - 1, 6: 65535, 7: 65535,
        8: p.sharedMemPerBlock, 9: p.totalConstMem, 10: 32, 11: p.memPitch, 12: p.regsPerBlock,
        13: int(device.clock / 1000), 14: 512, 15: 1, 16: p.multiProcessorCount, 17: 0, 18: 0,
        19: 1, 20: 0, 31: 1, 32: 0, 33: 0, 34: 0, 35: 0, 36: device.memory_clock_khz,
        37: p.memoryBusWidth, 38: p.l2CacheSize, 39: p.maxThreadsPerMultiProcessor,
        40: p.asyncEngineCount, 41: 1, 75: p.major, 76: p.minor, 78: 1, 79: 1, 80: 1,
        81: p.sharedMemPerMultiprocessor, 82: p.regsPerMultiprocessor, 83: 1, 84: 0, 85: 0, 86: 0,
        88: 0, 89: 1, 90: 1, 91: 0, 95: 1, 97: p.sharedMemPerBlockOptin, 99: 1, 100: 0, 101: 0,
        106: p.maxBlocksPerMultiProcessor, 108: 0, 109: 0, 111: p.reservedSharedMemPerBlock,
        115: 1, 120: p.clusterLaunch,
    }  # fmt: skip
    return values.get(attribute)
