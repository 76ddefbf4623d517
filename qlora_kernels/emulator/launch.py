"""Launching kernels: modules, arguments, checks, reports and counts."""

from __future__ import annotations

import ctypes
import itertools
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from . import engine, ptx
from .decode import GRID_WORKSPACE, PARAM_BASE, Kernel, Row, make_kernel
from .devices import Device, get_device, occupancy
from .errors import EmulatorError, KernelError, LaunchError, PtxError

__all__ = [
    "CHECKS",
    "Counts",
    "Module",
    "Region",
    "Report",
    "Result",
    "emulate",
    "emulate_orders",
    "launch",
    "uninitialized",
]

CHECKS = {"uninit": 1, "races": 2, "sync": 4, "counts": 8}
ALWAYS = ("bounds", "align")
COUNT = np.dtype(
    [
        (n, "<u8")
        for n in (
            "warps",
            "threads",
            "bytes",
            "requests",
            "sectors",
            "sectors_ideal",
            "wavefronts",
            "wavefronts_ideal",
            "flops",
            "taken",
        )
    ]
)
REPORT = np.dtype(
    [
        ("kind", "<u4"),
        ("inst", "<u4"),
        ("block", "<u4"),
        ("thread", "<u4"),
        ("address", "<u8"),
        ("space", "<u4"),
        ("size", "<u4"),
        ("write", "<u4"),
        ("other_inst", "<u4"),
        ("other_block", "<u4"),
        ("other_thread", "<u4"),
        ("count", "<u8"),
        ("extra", "<u8"),
    ]
)
KINDS = [
    "",
    "out of bounds",
    "misaligned",
    "read-only memory written",
    "uninitialised global memory read",
    "uninitialised shared memory read",
    "uninitialised local memory read",
    "uninitialised register",
    "race on shared memory",
    "race on global memory",
    "race within a warp",
    "cp.async data read before its wait",
    "barrier in divergent code",
    "barrier not reached by all threads",
    "deadlock",
    "shuffle from an inactive lane",
    "lanes missing at a warp-wide instruction",
    "budget exceeded",
    "trap",
    "ldmatrix row misaligned",
    "invalid barrier",
    "assertion failed",
    "invalid operand",
    "cp.async data overwritten before its wait",
    "wgmma registers touched before wgmma.wait_group",
    "wgmma without wgmma.fence",
    "wgmma reads without fence.proxy.async",
]
FATAL = {14, 17, 18, 20, 21}
SPACES = ["global", "shared", "local", "parameter"]


# ------------------------------------------------------------------------------------------------
# Modules


class Module:
    """PTX, parsed: kernels by name. Variables of the module keep their values between launches."""

    def __init__(self, text: str, origin: str = "PTX text") -> None:
        self.text, self.origin = text, origin
        self.parsed = ptx.parse(text)
        self.kernels: dict[str, Kernel] = {
            n: make_kernel(self, f) for n, f in self.parsed.entries.items() if f.body is not None
        }
        self._memory: dict[str, np.ndarray] = {}
        self._addresses: dict[str, int] = {}

    @classmethod
    def from_ptx(cls, text: str | Path) -> Module:
        """PTX as a string, or a ``Path`` to a file of it."""
        if isinstance(text, Path):
            return cls(text.read_text(), str(text))
        return cls(text)

    @classmethod
    def from_cuda(cls, source: str | Path, target: str | int = "sm_80", **options: Any) -> Module:
        """CUDA C++ source, as text or a path, compiled by nvcc with ``-lineinfo``.

        ``options`` go to `toolchain.compile_ptx`. Raises `ToolNotFound` without nvcc (it says which
        package brings it) and `CompileError` with the compiler's words.
        """
        from . import toolchain

        compiled = toolchain.compile_ptx(source, target, **options)
        return cls(compiled.text, str(source)[:80] if "\n" not in str(source) else "CUDA source")

    @classmethod
    def from_library(cls, path: str | Path, device: str | Device = "h100") -> Module:
        """The newest PTX in a compiled library that the device can run."""
        from . import toolchain

        major, minor = get_device(device).capability
        best, seen = None, []
        for code in toolchain.extract_ptx(path):
            seen.append(code.target)
            match = re.fullmatch(r"sm_(\d+)([af]?)", code.target)
            if match is None:
                continue
            version = int(match.group(1))
            fits = (
                version == 10 * major + minor if match.group(2) else version <= 10 * major + minor
            )
            if fits and (best is None or version > best[0]):
                best = (version, code)
        if best is None:
            raise EmulatorError(
                f"{path} has no PTX that {device} can run: it has {', '.join(seen) or 'none'}"
            )
        return cls(best[1].text, str(path))

    @classmethod
    def from_triton(
        cls,
        function: Any,
        signature: Mapping[str, str],
        constants: Mapping[str, Any] | None = None,
        target: str | int = "sm_80",
        aligned: Iterable[str] | None = None,
        **options: Any,
    ) -> Module:
        """A ``@triton.jit`` function compiled for a target, without a GPU.

        Args:
            signature: types of the arguments that are passed, as Triton writes them
                (``{"x": "*fp32", "n": "i32"}``).
            constants: values of the ``tl.constexpr`` arguments.
            aligned: arguments that are multiples of 16 (pointers: all, by default).
            options: ``num_warps``, ``num_stages`` and what else ``triton.compile`` takes.

        The kernel's metadata is in ``module.triton`` (``shared``, ``num_warps``).
        """
        try:
            import triton
            from triton.backends.compiler import GPUTarget
            from triton.compiler import ASTSource
        except ImportError as e:
            raise EmulatorError("Triton is not installed: pip install triton") from e
        number = int(re.sub(r"\D", "", str(target)))
        constants = dict(constants or {})
        if aligned is None:
            aligned = [n for n, t in signature.items() if t.startswith("*")]
        names = list(function.arg_names)
        full = {n: signature.get(n, "constexpr") for n in names}
        attrs = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
        source = ASTSource(function, signature=full, constexprs=constants, attrs=attrs)
        compiled = triton.compile(source, target=GPUTarget("cuda", number, 32), options=options)
        module = cls(compiled.asm["ptx"], f"Triton kernel {function.__name__}")
        module.triton = compiled.metadata  # type: ignore[attr-defined]
        for kernel in module.kernels.values():
            kernel.triton = compiled.metadata  # type: ignore[attr-defined]
        return module

    @property
    def target(self) -> str:
        return self.parsed.target

    def kernel(self, name: str | None = None) -> Kernel:
        """By its mangled name, its C++ name, or a part that only one kernel has."""
        if name is None:
            if len(self.kernels) == 1:
                return next(iter(self.kernels.values()))
            raise KeyError(
                f"{self.origin} has {len(self.kernels)} kernels: name one of {sorted(self.kernels)}"
            )
        if name in self.kernels:
            return self.kernels[name]
        plain = {n: demangle(n) for n in self.kernels}
        for test in (
            lambda n: re.split(r"[<(]", plain[n])[0].split(" ")[-1] == name,
            lambda n: name in plain[n],
            lambda n: name in n,
        ):
            found = [n for n in self.kernels if test(n)]
            if len(found) == 1:
                return self.kernels[found[0]]
            if len(found) > 1:
                raise KeyError(f"{name} could be any of {sorted(plain[n] for n in found)}")
        raise KeyError(
            f"{self.origin} has no kernel {name}: it has {sorted(plain.values()) or 'none'}"
        )

    def variables(
        self, symbols: Mapping[str, int] | None = None
    ) -> tuple[dict[str, int], list[Region]]:
        """Addresses and regions of the module's variables; ``symbols`` gives some addresses."""
        symbols = symbols or {}
        given = [v for v in self.parsed.variables.values() if v.space in ("global", "const")]
        for k, v in enumerate(given):
            if v.name in symbols:
                self._addresses[v.name] = symbols[v.name]
            elif v.name not in self._memory:
                if v.extern or v.unsized:
                    raise PtxError(f"variable {v.name} is defined in another file", v.line)
                self._memory[v.name] = np.frombuffer(bytearray(v.data or bytes(v.size)), np.uint8)
                self._addresses[v.name] = (2 << 40) + (k << 28)
        for v in given:
            for at, name, addend in v.symbols:
                if v.name in self._memory:
                    size = 8
                    value = self._addresses.get(name, 0) + addend
                    self._memory[v.name][at : at + size] = np.frombuffer(
                        struct.pack("<Q", value), np.uint8
                    )
        regions = []
        for v in given:
            if v.name in self._memory and v.name not in symbols:
                m = self._memory[v.name]
                regions.append(
                    Region(
                        self._addresses[v.name],
                        max(1, m.nbytes),
                        m.ctypes.data,
                        f"variable {v.name}",
                        writable=v.space == "global",
                        dtype=_DTYPES.get(v.type, "u1"),
                        shape=(v.count,),
                        owner=m,
                    )
                )
        return dict(self._addresses), regions


_DTYPES = {
    "f32": "f4",
    "f64": "f8",
    "s32": "i4",
    "u32": "u4",
    "b32": "u4",
    "u64": "u8",
    "s64": "i8",
    "b64": "u8",
    "u16": "u2",
    "s16": "i2",
    "b16": "u2",
}


def demangle(name: str) -> str:
    from .runtime import demangle as plain

    try:
        return plain(name)
    except OSError:
        return name


# ------------------------------------------------------------------------------------------------
# Memory


@dataclass
class Region:
    """Memory that a kernel may touch. ``base`` is where the kernel sees it, ``host`` where it
    is."""

    base: int
    size: int
    host: int
    name: str
    writable: bool = True
    dtype: Any = "u1"
    shape: tuple[int, ...] | None = None
    initialized: np.ndarray | None = None
    index: int | None = None
    owner: Any = None
    tracked: bool = True

    def element(self, address: int) -> str:
        """``x[3, 5]`` for an address in or near the region."""
        size = np.dtype(self.dtype).itemsize if not isinstance(self.dtype, int) else self.dtype
        offset = address - self.base
        flat, rest = divmod(offset, size)
        shape = self.shape if self.shape is not None else (self.size // size,)
        text = f"{flat}"
        if len(shape) > 1 and 0 <= offset < self.size:
            text = ", ".join(str(int(i)) for i in np.unravel_index(flat, shape))
        return f"{self.name}[{text}]" + (f" + {rest} bytes" if rest else "")


class uninitialized:
    """Marks an argument whose contents count as never written: ``emulate(k, ...,
    [uninitialized(y)])``."""

    def __init__(self, array: Any) -> None:
        self.array = array


def _array(x: Any) -> tuple[int, int, Any, tuple[int, ...], bool, int] | None:
    """(address, bytes, dtype, shape, writable, element size) of an array or tensor, or None."""
    if isinstance(x, np.ndarray):
        if not x.flags.c_contiguous:
            raise LaunchError(
                f"an array of shape {x.shape} that is not contiguous: pass np.ascontiguousarray "
                f"of it"
            )
        return x.ctypes.data, x.nbytes, x.dtype, x.shape, bool(x.flags.writeable), x.dtype.itemsize
    if hasattr(x, "data_ptr") and hasattr(x, "is_contiguous"):
        if x.device.type != "cpu":
            raise LaunchError(f"a tensor on {x.device}: the emulator takes tensors in host memory")
        if not x.is_contiguous():
            raise LaunchError(
                f"a tensor of shape {tuple(x.shape)} that is not contiguous: pass .contiguous()"
            )
        size = x.element_size()
        return x.data_ptr(), x.numel() * size, f"V{size}", tuple(x.shape), True, size
    return None


_PACK = {
    "f32": "<f",
    "f64": "<d",
    "s8": "<b",
    "s16": "<h",
    "s32": "<i",
    "s64": "<q",
    "u8": "<B",
    "u16": "<H",
    "u32": "<I",
    "u64": "<Q",
}


def marshal(kernel: Kernel, args: Sequence[Any]) -> tuple[bytes, list[Region]]:
    """Argument bytes and regions. Each array gets addresses of its own, 64 GiB from all others."""
    params = kernel.params
    args = list(args)
    if hasattr(kernel, "triton") and len(args) == len(params) - 2:
        args += [None, None]  # Triton's scratch pointers
    if len(args) != len(params):
        raise LaunchError(
            f"{demangle(kernel.name)} takes {len(params)} arguments, {len(args)} were given"
        )
    data = bytearray(kernel.param_bytes)
    regions: list[Region] = []
    seen: dict[tuple[int, int], int] = {}
    for k, (p, x) in enumerate(zip(params, args, strict=True)):
        fresh = isinstance(x, uninitialized)
        if fresh:
            x = x.array
        found = _array(x)
        if found is not None and not (isinstance(x, np.ndarray) and x.ndim == 0):
            host, nbytes, dtype, shape, writable, _ = found
            if p.size != 8:
                raise LaunchError(
                    f"argument {k} of {demangle(kernel.name)} has {p.size} bytes (.{p.type}): an "
                    f"array was given"
                )
            key = (host, nbytes)
            if key in seen and nbytes:
                base = seen[key]
            else:
                # Views keep how they are aligned within their storage.
                origin = (
                    x.base if isinstance(x, np.ndarray) and isinstance(x.base, np.ndarray) else None
                )
                start = host - origin.ctypes.data if origin is not None else 0
                if origin is None and hasattr(x, "storage_offset"):
                    start = x.storage_offset() * x.element_size()
                base = ((k + 1) << 36) + 4096 + start % 256
                seen[key] = base
                state = np.zeros(max(1, nbytes), np.uint8) if fresh else None
                if nbytes:
                    regions.append(
                        Region(
                            base,
                            nbytes,
                            host,
                            p.name
                            if p.name.isidentifier() and "_param_" not in p.name
                            else f"argument {k}",
                            writable,
                            dtype,
                            shape,
                            state,
                            k,
                            x,
                        )
                    )
            data[p.offset : p.offset + 8] = struct.pack("<Q", base)
            continue
        if fresh:
            raise LaunchError(f"argument {k}: uninitialized() takes an array")
        data[p.offset : p.offset + p.size] = _scalar(kernel, k, x)
    return bytes(data), regions


def _scalar(kernel: Kernel, k: int, x: Any) -> bytes:
    p = kernel.params[k]
    what = f"argument {k} of {demangle(kernel.name)} ({p.size} bytes, .{p.type})"
    if x is None:
        return bytes(p.size)
    if isinstance(x, bytes | bytearray | ctypes.Structure):
        raw = bytes(x)
        if len(raw) != p.size:
            raise LaunchError(f"{what}: {len(raw)} bytes were given")
        return raw
    if hasattr(x, "item") and getattr(x, "ndim", 0) == 0:
        if (
            isinstance(x, np.generic | np.ndarray)
            and x.dtype.itemsize == p.size
            and p.type[0] == "b"
        ):
            return x.tobytes()
        x = x.item()
    if isinstance(x, bool):
        x = int(x)
    if p.type in ("f32", "f64"):
        if not isinstance(x, int | float):
            raise LaunchError(f"{what}: a number was expected, not {type(x).__name__}")
        return struct.pack(_PACK[p.type], x)
    if isinstance(x, float):
        if p.type in ("b32", "u32") and p.size == 4:
            return struct.pack("<f", x)  # nvcc writes .f32, Triton .b32 for some
        if p.size == 8 and p.type[0] == "b":
            return struct.pack("<d", x)
        raise LaunchError(f"{what}: a float was given")
    if not isinstance(x, int):
        raise LaunchError(f"{what}: cannot be made of {type(x).__name__}")
    low, high = -(1 << (8 * p.size - 1)), (1 << (8 * p.size)) - 1
    if p.size > 8 or not low <= x <= high:
        raise LaunchError(f"{what}: {x} does not fit")
    return (x & high).to_bytes(p.size, "little")


# ------------------------------------------------------------------------------------------------
# Results


@dataclass
class Report:
    """One finding. ``str(report)`` says all of it; ``count`` is how often it happened there."""

    kind: str
    message: str
    kernel: str
    ptx_line: int
    ptx_text: str
    loc: ptx.Location | None
    block: tuple[int, int, int]
    thread: tuple[int, int, int]
    address: int | None = None
    space: str | None = None
    argument: str | None = None
    index: int | None = None
    other_loc: ptx.Location | None = None
    other_ptx_line: int | None = None
    count: int = 1
    fatal: bool = False

    @property
    def line(self) -> int | None:
        """The line of the kernel's source, through inlined functions to the kernel itself."""
        return self.loc.outermost.line if self.loc else None

    def __str__(self) -> str:
        where = f"{self.loc}" if self.loc else f"PTX line {self.ptx_line}"
        if self.loc and self.loc.inlined_at:
            where += f" (inlined at {self.loc.outermost})"
        text = (
            f"{self.kind}: {self.message}\n    in {self.kernel} at {where}, block {self.block}, "
            f"thread {self.thread}"
            f"\n    PTX line {self.ptx_line}: {self.ptx_text}"
        )
        return text + (f"\n    ({self.count} times in all)" if self.count > 1 else "")


class Counts:
    """What a launch did; see the package's docstring. ``scale`` is how many blocks one stands
    for."""

    def __init__(
        self,
        kernel: Kernel,
        table: np.ndarray,
        regions: list[dict[str, Any]],
        total: dict[str, Any],
    ) -> None:
        self.kernel, self.instructions, self.regions, self.total = kernel, table, regions, total

    def by_line(self) -> dict[tuple[str, int], dict[str, int]]:
        """Sums over source lines: {(file, line): {field: sum}}."""
        out: dict[tuple[str, int], dict[str, int]] = {}
        for row, count in zip(self.kernel.instructions, self.instructions, strict=True):
            key = (row.loc.file, row.loc.line) if row.loc else ("PTX", row.ptx_line)
            entry = out.setdefault(key, dict.fromkeys(COUNT.names or (), 0))
            for name in COUNT.names or ():
                entry[name] += int(count[name])
        return out

    def by_ptx_line(self) -> dict[int, int]:
        """Warp executions by line of the PTX text."""
        out: dict[int, int] = {}
        for row, count in zip(self.kernel.instructions, self.instructions, strict=True):
            out[row.ptx_line] = out.get(row.ptx_line, 0) + int(count["warps"])
        return out

    def by_class(self) -> dict[str, int]:
        """Warp executions by the instruction's first word."""
        out: dict[str, int] = {}
        for row, count in zip(self.kernel.instructions, self.instructions, strict=True):
            name = row.opcode.split(".")[0]
            out[name] = out.get(name, 0) + int(count["warps"])
        return dict(sorted(out.items(), key=lambda kv: -kv[1]))

    def sum(self, field_: str, opcode: str = "") -> int:
        """The sum of a field over instructions whose opcode begins with ``opcode``."""
        return int(
            sum(
                int(c[field_])
                for r, c in zip(self.kernel.instructions, self.instructions, strict=True)
                if r.opcode.startswith(opcode)
            )
        )


@dataclass
class Result:
    kernel: Kernel
    reports: list[Report]
    counts: Counts
    printed: str
    seconds: float
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    arguments: list[Any] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.reports

    def kinds(self) -> set[str]:
        return {r.kind for r in self.reports}

    def __str__(self) -> str:
        return "\n".join(map(str, self.reports)) or "no findings"


def _three(x: int | Sequence[int], what: str) -> tuple[int, int, int]:
    values = (x,) if isinstance(x, int | np.integer) else tuple(x)
    if not 1 <= len(values) <= 3 or any(int(v) < 1 for v in values):
        raise LaunchError(f"{what}={x}: one to three positive numbers were expected")
    return tuple([int(v) for v in values] + [1] * (3 - len(values)))  # type: ignore[return-value]


def check_mask(checks: Any) -> int:
    if checks is True or checks is None:
        return sum(CHECKS.values())
    if checks is False:
        return 0
    names = [checks] if isinstance(checks, str) else list(checks)
    mask = 0
    for name in names:
        if name in ALWAYS:
            continue
        if name not in CHECKS:
            raise LaunchError(
                f"checks={name!r}: expected some of {[*ALWAYS, *CHECKS]}, True or False"
            )
        mask |= CHECKS[name]
    return mask


def _refuse(
    kernel: Kernel,
    device: Device,
    grid: Sequence[int],
    block: Sequence[int],
    dynamic: int,
    registers: int | None,
) -> None:
    """What the target would refuse to launch."""
    name = demangle(kernel.name)
    threads = block[0] * block[1] * block[2]
    for value, limit, what in [
        (block[0], 1024, "block.x"),
        (block[1], 1024, "block.y"),
        (block[2], 64, "block.z"),
        (grid[0], 2**31 - 1, "grid.x"),
        (grid[1], 65535, "grid.y"),
        (grid[2], 65535, "grid.z"),
        (threads, 1024, "threads a block"),
    ]:
        if value > limit:
            raise LaunchError(f"{name}: {what} is {value}, at most {limit} are allowed")
    if kernel.max_threads is not None and threads > kernel.max_threads:
        raise LaunchError(
            f"{name}: {threads} threads a block, it was compiled for at most "
            f"{kernel.max_threads} (__launch_bounds__)"
        )
    if kernel.required_threads is not None and tuple(block) != kernel.required_threads:
        raise LaunchError(
            f"{name}: block is {tuple(block)}, it was compiled for exactly "
            f"{kernel.required_threads}"
        )
    static = kernel.static_shared
    if static > 49152:
        raise LaunchError(
            f"{name}: {static} bytes of static shared memory, at most 49152 are allowed"
        )
    if static + dynamic > device.sm.shared_optin:
        raise LaunchError(
            f"{name}: {static + dynamic} bytes of shared memory ({static} static, {dynamic} "
            f"dynamic), "
            f"{device} allows a block {device.sm.shared_optin}"
        )
    if registers is not None:
        need = -(-threads // 32) * -(-registers * 32 // 256) * 256
        if registers > 255 or need > device.sm.registers:
            raise LaunchError(
                f"{name}: {registers} registers a thread, {threads} threads need {need}, "
                f"{device} has {device.sm.registers}"
            )
    match = re.fullmatch(r"sm_(\d+)([af]?)", kernel.target)
    if match:
        version, own = int(match.group(1)), 10 * device.capability[0] + device.capability[1]
        if version > own or (match.group(2) and version != own):
            raise LaunchError(
                f"{name}: compiled for {kernel.target}, which {device} (sm_{own}) cannot run"
            )


def launch(
    kernel: Kernel,
    grid: int | Sequence[int],
    block: int | Sequence[int],
    arguments: bytes,
    regions: Sequence[Region],
    *,
    shared_bytes: int = 0,
    device: str | Device = "h100",
    checks: Any = True,
    seed: int = 0,
    budget: int | None = 2_000_000_000,
    cooperative: bool = False,
    symbols: Mapping[str, int] | None = None,
    registers: int | None = None,
    quantum: int = 64,
    window: int = 0,
    blocks: Sequence[int] | None = None,
    max_reports: int = 100,
    trust_regions: bool = False,
) -> Result:
    """Runs a kernel on raw argument bytes and regions; see `emulate`. Raises nothing for
    findings."""
    import time

    device = get_device(device)
    grid3, block3 = _three(grid, "grid"), _three(block, "block")
    program = kernel.program
    if shared_bytes < 0:
        raise LaunchError(f"shared_bytes={shared_bytes}")
    _refuse(kernel, device, grid3, block3, shared_bytes, registers)
    if len(arguments) < kernel.param_bytes:
        raise LaunchError(
            f"{len(arguments)} bytes of arguments, {demangle(kernel.name)} has {kernel.param_bytes}"
        )
    n_blocks = grid3[0] * grid3[1] * grid3[2]
    threads = block3[0] * block3[1] * block3[2]
    per_sm = occupancy(
        device, threads, registers or 32, program.static_shared + shared_bytes
    ).blocks
    most = max(1, per_sm * device.sms)
    if cooperative and n_blocks > most:
        raise LaunchError(
            f"{demangle(kernel.name)}: {n_blocks} blocks launched together, {device} holds {most}"
        )
    mask = check_mask(checks)
    keep: list[Any] = []

    addresses, own = kernel.module.variables(symbols)
    constants = program.constants
    if program.relocations:
        constants = constants.copy()
        for at, name, addend in program.relocations:
            if name not in addresses:
                raise LaunchError(f"variable {name} has no address")
            constants[at : at + 256] = np.frombuffer(
                struct.pack("<Q", (addresses[name] + addend) & (2**64 - 1)) * 32, np.uint8
            )
    params = np.frombuffer(bytes(arguments) + bytes(16), np.uint8).copy()
    everything = [*regions, *own]
    if any("%envreg" in row.text for row in kernel.instructions):
        if not cooperative:
            raise LaunchError(
                f"{demangle(kernel.name)} synchronises its grid: launch it with cooperative=True "
                "(cudaLaunchCooperativeKernel)"
            )
        workspace = np.array([64] + [0] * 15, np.uint32)
        everything.append(
            Region(GRID_WORKSPACE, 64, workspace.ctypes.data, "grid barrier", owner=workspace)
        )
    if kernel.param_bytes:
        everything.append(
            Region(
                PARAM_BASE,
                kernel.param_bytes,
                params.ctypes.data,
                "kernel parameters",
                False,
                tracked=False,
            )
        )
    everything.sort(key=lambda r: r.base)
    for a, b in itertools.pairwise(everything):
        if a.base + a.size > b.base:
            raise LaunchError(f"{a.name} and {b.name} overlap in memory")
    table = (engine.Region * max(1, len(everything)))()
    bitmaps = []
    written = program.writes
    for k, r in enumerate(everything):
        t = table[k]
        t.base, t.size, t.host, t.writable = r.base, r.size, r.host, int(r.writable)
        tracked = r.tracked and r.writable
        if tracked and written is not None and r.index is not None and not trust_regions:
            tracked = kernel.params[r.index].name in written
        t.tracked = int(tracked)
        if r.initialized is not None:
            if r.initialized.nbytes < r.size:
                raise LaunchError(
                    f"{r.name}: initialized has {r.initialized.nbytes} bytes for {r.size}"
                )
            t.initialized = r.initialized.ctypes.data
        pair = None
        if mask & CHECKS["counts"]:
            words = (r.size + (r.base & 31)) // 2048 + 2
            pair = (np.zeros(words, np.uint64), np.zeros(words, np.uint64))
            t.read_sectors, t.written_sectors = pair[0].ctypes.data, pair[1].ctypes.data
        bitmaps.append(pair)

    dynamic_at = program.dynamic_offset
    total = dynamic_at + shared_bytes if (program.uses_dynamic or shared_bytes) else dynamic_at
    shared_map = np.zeros(total + 16, np.uint8)
    for _, at, size in program.shared_variables:
        shared_map[at : at + size] = 1
    if total > dynamic_at:
        shared_map[dynamic_at:total] = 1

    rows = kernel.instructions
    counts = np.zeros(len(rows), COUNT)
    reports = np.zeros(max_reports, REPORT)
    text = ctypes.create_string_buffer(1 << 20)
    p = engine.Program()
    for name in ("inst", "block", "lists", "special"):
        setattr(p, name, getattr(program, name).ctypes.data)
    p.constants = constants.ctypes.data
    p.n_inst, p.n_block, p.n_special, p.n_lists = (
        len(program.inst),
        len(program.block),
        len(program.special),
        len(program.lists),
    )
    p.register_bytes, p.n_pred, p.n_rows = program.register_bytes, program.n_pred, len(rows)
    p.local_bytes, p.shared_granule, p.constant_bytes = (
        program.local_bytes,
        program.shared_granule,
        len(constants),
    )
    # Undefined registers are followed only where they are looked for.
    p.has_taint = int(program.has_taint)
    p.n_taint_init, p.taint_init = len(program.taint_init), program.taint_init.ctypes.data
    inst = program.inst
    if not mask & CHECKS["uninit"]:
        if program.has_taint:
            inst = inst.copy()
            inst["flags"] &= ~np.uint32(1)
            p.inst, p.has_taint = inst.ctypes.data, 0
    elif program.followed is not None:
        p.followed, p.has_taint = program.followed.ctypes.data, 1
    keep += [constants, params, inst]
    g = engine.Launch()
    g.grid[:], g.block[:], g.cluster[:] = grid3, block3, (1, 1, 1)
    g.checks, g.params, g.param_bytes, g.param_base = (
        mask,
        params.ctypes.data,
        kernel.param_bytes,
        PARAM_BASE,
    )
    g.regions, g.n_regions = ctypes.addressof(table), len(everything)
    g.static_shared, g.dynamic_shared = program.static_shared, shared_bytes
    g.shared_map, g.shared_total = shared_map.ctypes.data, total
    g.max_resident, g.seed, g.budget = min(most, 2**31), seed, budget or 0
    g.quantum, g.cooperative, g.window, g.smid_count = quantum, int(cooperative), window, device.sms
    if blocks is not None:
        chosen = np.array(list(blocks), np.uint32)
        if len(chosen) == 0 or chosen.max() >= n_blocks:
            raise LaunchError(f"blocks={list(blocks)[:4]}...: the grid has {n_blocks}")
        g.block_list, g.n_blocks = chosen.ctypes.data, len(chosen)
    g.counts, g.reports, g.max_reports = counts.ctypes.data, reports.ctypes.data, max_reports
    late = np.zeros(max(1, len(program.block)), np.uint8)
    g.late = late.ctypes.data
    g.print, g.print_size = ctypes.addressof(text), len(text)
    start = time.perf_counter()
    engine.library().emu_launch(ctypes.byref(p), ctypes.byref(g))
    seconds = time.perf_counter() - start

    moved = []
    for k, r in enumerate(everything):
        entry = {
            "name": r.name,
            "size": r.size,
            "sectors_read": int(table[k].sectors_read),
            "sectors_written": int(table[k].sectors_written),
        }
        pair = bitmaps[k]
        if pair is not None:
            entry["distinct_read"] = (
                int(np.bitwise_count(pair[0]).sum())
                if hasattr(np, "bitwise_count")
                else _bits(pair[0])
            )
            entry["distinct_written"] = (
                int(np.bitwise_count(pair[1]).sum())
                if hasattr(np, "bitwise_count")
                else _bits(pair[1])
            )
        if r.name != "kernel parameters":
            moved.append(entry)
    totals = {
        "blocks": int(g.totals[0]),
        "threads_launched": int(g.totals[1]),
        "barriers": int(g.totals[2]),
        "thread_instructions": int(g.totals[3]),
        "warp_instructions": int(g.totals[4]),
    }
    for name in COUNT.names or ():
        totals[name] = int(counts[name].sum())
    for name in ("sectors_read", "sectors_written", "distinct_read", "distinct_written"):
        totals[name] = sum(m.get(name, 0) for m in moved)
    found = [
        _explain(kernel, r, rows, everything, grid3, block3, program, late)
        for r in reports[: g.n_reports]
        # shared memory that was read without having been written, to no effect
        if not (r["kind"] == KINDS.index("uninitialised shared memory read") and r["extra"])
    ]
    return Result(
        kernel,
        found,
        Counts(kernel, counts, moved, totals),
        text.raw[: g.print_used].decode(errors="replace"),
        seconds,
        grid3,
        block3,
    )


def _bits(words: np.ndarray) -> int:
    return int(np.unpackbits(words.view(np.uint8)).sum())


def _loop(program: Any, late: np.ndarray, row: int) -> list[int]:
    """Rows of the loop around ``row`` in which a launch spent the second half of its budget, or
    none: ``late`` tells which basic blocks were entered then, so an outer loop counts if it went
    round, and not if its inner one never ended."""
    bra, brx = engine.op_ids()["bra"], engine.op_ids()["brx"]
    edges: dict[int, set[int]] = {}
    start = -1
    for n, b in enumerate(program.block):
        edges[n] = {int(b["next"])} if b["next"] >= 0 else set()
        for i in program.inst[b["first"] : b["last"]]:
            if i["op"] == bra:
                edges[n].add(int(i["imm"]))
            elif i["op"] == brx:
                edges[n].update(int(t) for t in program.lists[i["list"] : i["list"] + i["n"]])
            if i["id"] == row and start < 0 and late[n]:
                start = n

    def reached(graph: dict[int, set[int]]) -> set[int]:
        out: set[int] = set()
        todo = list(graph.get(start, ()))
        while todo:
            n = todo.pop()
            if n not in out and late[n]:
                out.add(n)
                todo += graph.get(n, ())
        return out

    back: dict[int, set[int]] = {}
    for n, targets in edges.items():
        for t in targets:
            back.setdefault(t, set()).add(n)
    loop = reached(edges) & reached(back)
    return sorted(
        {
            int(i["id"])
            for n in loop
            for i in program.inst[program.block[n]["first"] : program.block[n]["last"]]
        }
    )


def _extent(rows: list[Row], loop: list[int]) -> str:
    """``PTX lines 12 to 40, lines 5 to 9 of k.cu``."""

    def lines(numbers: Iterable[int]) -> str:
        first, last = min(some := list(numbers)), max(some)
        return f"line {first}" if first == last else f"lines {first} to {last}"

    text = f"PTX {lines(rows[k].ptx_line for k in loop)}"
    places = [place.outermost for k in loop if (place := rows[k].loc) is not None]
    for file in dict.fromkeys(p.file for p in places):
        text += f", {lines(p.line for p in places if p.file == file)} of {file}"
    return text


def _explain(
    kernel: Kernel,
    r: Any,
    rows: list[Row],
    regions: Sequence[Region],
    grid: Sequence[int],
    block: Sequence[int],
    program: Any,
    late: np.ndarray,
) -> Report:
    row = rows[int(r["inst"])]
    code, address, size, space = int(r["kind"]), int(r["address"]), int(r["size"]), int(r["space"])
    kind = KINDS[code]
    b, t, extra = int(r["block"]), int(r["thread"]), int(r["extra"])
    none = 0xFFFFFFFF

    def block_of(n: int) -> tuple[int, int, int]:
        return (n % grid[0], n // grid[0] % grid[1], n // (grid[0] * grid[1]))

    def thread_of(n: int) -> tuple[int, int, int]:
        return (n % block[0], n // block[0] % block[1], n // (block[0] * block[1]))

    argument, index, place = None, None, ""
    if space == 0 and code in (1, 2, 3, 4, 9, 10):
        near = None
        for region in regions:
            if region.base <= address < region.base + region.size:
                near = region
                break
        outside = near is None
        if near is None and regions:

            def gap(region: Region) -> int:
                return (
                    region.base - address
                    if address < region.base
                    else address - (region.base + region.size) + 1
                )

            near = min(regions, key=gap)
            if gap(near) > 1 << 35:
                near = None
        if near is not None:
            argument = near.name
            each = np.dtype(near.dtype).itemsize if not isinstance(near.dtype, int) else near.dtype
            index = (address - near.base) // each
            place = near.element(address)
            if outside or address + size > near.base + near.size:
                shape = f" of shape {near.shape}" if near.shape is not None else ""
                beyond = address - (near.base + near.size)
                place += (
                    f", {beyond} bytes after the end of {near.name}{shape} ({near.size} bytes)"
                    if beyond >= 0
                    else f", {near.base - address} bytes before {near.name}{shape}"
                    if address < near.base
                    else f", across the end of {near.name}{shape} ({near.size} bytes)"
                )
        else:
            place = f"address {address:#x}, near no argument"
    elif space == 1:
        place = f"shared memory at {address}"
        for name, at, length in program.shared_variables:
            if at <= address < at + length:
                place = f"{name} + {address - at} bytes (shared)"
                argument, index = name, address - at
                break
            if at + length <= address < at + length + 128:
                place = f"{name} + {address - at} bytes: it has {length} (shared)"
                argument, index = name, address - at
        else:
            if address >= program.dynamic_offset:
                place = f"dynamic shared memory + {address - program.dynamic_offset} bytes"
                argument, index = "dynamic shared memory", address - program.dynamic_offset
    elif space == 2:
        place = f"local memory + {address} bytes (a thread has {program.local_bytes})"

    verb = "write" if int(r["write"]) else "read"
    other_row = rows[int(r["other_inst"])] if int(r["other_inst"]) != none else None
    other = ""
    if int(r["other_block"]) != none:
        other = (
            f"block {block_of(int(r['other_block']))}, thread {thread_of(int(r['other_thread']))}"
        )
        if other_row is not None:
            other += f", at {other_row.loc or f'PTX line {other_row.ptx_line}'}"
    if code in (1, 2, 3, 4, 5, 6):
        message = f"{verb} of {size} bytes at {place}"
        if code == 2:
            message += f": the address {address:#x} is not a multiple of {size}"
    elif code == 7:
        message = "a value that was never written decides a branch, an address or what is stored"
    elif code in (8, 9, 10):
        message = (
            f"{verb} of {size} bytes at {place}, not ordered with the access of {other}"
            if other
            else f"lanes of one instruction write different values to {place}"
        )
    elif code == 11:
        message = f"{verb} of {size} bytes at {place}, which a cp.async still writes"
    elif code == 23:
        message = f"write at {place}, to which a cp.async has not finished writing"
    elif code == 24:
        message = (
            "a register that a wgmma.mma_async before still reads or writes: its group must be "
            "committed and waited for (wgmma.commit_group, wgmma.wait_group)"
        )
    elif code == 25:
        message = (
            "a wgmma.fence must come before the first one, and between any other access of its "
            "registers and it: there is none"
        )
    elif code == 26:
        message = (
            f"its operand at {place} was written by {other}, and no fence.proxy.async since lets "
            "the tensor core see that"
        )
    elif code == 12:
        message = "other threads of the warp are not at this barrier"
    elif code == 13:
        message = f"{extra} threads have left the kernel without coming to this barrier"
    elif code == 14:
        if extra == (1 << 64) - 1:
            message = "waits for lanes that do not come"
        else:
            message = (
                f"waits at barrier {extra >> 40}: {extra >> 20 & 0xFFFFF} of "
                f"{extra & 0xFFFFF} threads have come"
            )
    elif code == 15:
        message = f"reads lane {extra}, which does not execute the shuffle"
    elif code == 16:
        message = (
            f"not all lanes of its mask {extra:#010x} are here"
            if extra
            else "not all lanes of the warp are here"
        )
    elif code == 17:
        message = "the kernel was still running after its budget of instructions"
        loop = _loop(program, late, int(r["inst"]))
        message += f", in the loop of {_extent(rows, loop)}" if loop else "; it was here"
    elif code == 19:
        message = f"a row's address ({place}) is not a multiple of 16"
    elif code == 20:
        message = (
            f"barrier {address} with {extra} threads: numbers are 0 to 15, threads multiples of 32"
        )
    elif code == 18:
        message = "the kernel trapped"
    elif code == 21:
        message = "an assert in the kernel failed"
    else:
        message = kind
    return Report(
        kind,
        message,
        demangle(kernel.name),
        row.ptx_line,
        row.text,
        row.loc,
        block_of(b),
        thread_of(t),
        address or None,
        SPACES[space] if place else None,
        argument,
        index,
        other_row.loc if other_row else None,
        other_row.ptx_line if other_row else None,
        int(r["count"]),
        code in FATAL,
    )


def emulate(
    kernel: Kernel | Module,
    grid: int | Sequence[int],
    block: int | Sequence[int] | None = None,
    args: Sequence[Any] = (),
    *,
    device: str | Device = "h100",
    checks: Any = True,
    seed: int = 0,
    shared_bytes: int | None = None,
    strict: bool = True,
    **options: Any,
) -> Result:
    """Runs a kernel.

    Args:
        kernel: of a `Module`; a module with one kernel will do.
        grid, block: as in ``<<<grid, block>>>``; a Triton kernel knows its ``block``.
        args: NumPy arrays and torch tensors (contiguous, written in place), numbers, ``bytes`` or
            ctypes structures for parameters passed by value, None for a null pointer.
        device: what it runs on: decides what a launch is refused for. See `devices.DEVICES`.
        checks: True (all), False (bounds and alignment, which are always checked), or some of
            ``uninit``, ``races``, ``sync``, ``counts``.
        seed: decides the order of warps and blocks.
        shared_bytes: of dynamic shared memory; for a Triton kernel known.
        strict: raise `KernelError` if anything was found.
        options: ``budget`` (most warp instructions), ``quantum`` (most basic blocks that a warp
        runs
            at a stretch), ``window`` (blocks resident at once), ``cooperative``, ``registers``
            (by the
            compiler's count, checked against the device), ``blocks`` (numbers of those to run).

    Raises `LaunchError` for what CUDA would refuse, `PtxError` for an instruction that is not
    executed.
    """
    if isinstance(kernel, Module):
        kernel = kernel.kernel()
    metadata = getattr(kernel, "triton", None)
    if metadata is not None:
        block = 32 * metadata.num_warps if block is None else block
        shared_bytes = metadata.shared if shared_bytes is None else shared_bytes
    if block is None:
        raise LaunchError("block is missing")
    data, regions = marshal(kernel, args)
    result = launch(
        kernel,
        grid,
        block,
        data,
        regions,
        shared_bytes=shared_bytes or 0,
        device=device,
        checks=checks,
        seed=seed,
        **options,
    )
    result.arguments = list(args)
    if (strict and result.reports) or any(r.fatal for r in result.reports):
        first = [r for r in result.reports if r.fatal] or result.reports
        more = f"\n({len(result.reports)} findings in all)" if len(result.reports) > 1 else ""
        raise KernelError(f"{first[0]}{more}", result)
    return result


@dataclass
class Orders:
    """Results of one kernel under several orders. ``same``: all were equal, bit for bit."""

    seeds: list[int]
    same: bool
    differences: list[tuple[int, str, int]]  # seed, argument, first element that differs
    results: list[Result]

    def __str__(self) -> str:
        if self.same:
            return f"the same results in {len(self.seeds)} orders"
        seed, name, at = self.differences[0]
        return (
            f"results depend on the schedule: with seed {seed}, {name} differs from seed "
            f"{self.seeds[0]}'s "
            f"from element {at} on ({len(self.differences)} of {len(self.seeds)} orders differ)"
        )


def emulate_orders(
    kernel: Kernel | Module,
    grid: Any,
    block: Any = None,
    args: Sequence[Any] = (),
    *,
    orders: int | Sequence[int] = 20,
    checks: Any = (),
    strict: bool = True,
    **options: Any,
) -> Orders:
    """Runs a kernel under many orders of warps and blocks, each time on the same inputs.

    Some run a warp for long, some change after every basic block; the arguments hold the first
    order's results afterwards. With ``strict`` raises `KernelError` where results differ.
    """
    seeds = list(range(orders)) if isinstance(orders, int) else list(orders)
    before = [_copy(a) for a in args]
    reference: list[Any] = []
    results, differences = [], []
    for k, seed in enumerate(seeds):
        fresh = [_copy(a) for a in before]
        quantum = [64, 1, 4, 1000, 1, 16][k % 6]
        passed = [
            uninitialized(f) if isinstance(a, uninitialized) else f
            for a, f in zip(args, fresh, strict=True)
        ]
        r = emulate(
            kernel,
            grid,
            block,
            passed,
            checks=checks,
            seed=seed,
            strict=strict,
            **{"quantum": quantum, **options},
        )
        results.append(r)
        if not reference:
            reference = fresh
        else:
            names = [p.name for p in r.kernel.params]
            for j, (x, y) in enumerate(zip(reference, fresh, strict=True)):
                at = _differs(x, y)
                if at is not None:
                    differences.append((seed, f"argument {j} ({names[j]})", at))
                    break
    for a, x in zip(args, reference, strict=True):
        _assign(a.array if isinstance(a, uninitialized) else a, x)
    out = Orders(seeds, not differences, differences, results)
    if strict and differences:
        raise KernelError(str(out), out)
    return out


def _copy(x: Any) -> Any:
    if isinstance(x, uninitialized):
        x = x.array
    if isinstance(x, np.ndarray):
        return x.copy()
    return x.clone() if hasattr(x, "data_ptr") else x


def _bytes(x: Any) -> np.ndarray | None:
    if isinstance(x, np.ndarray):
        return x.reshape(-1).view(np.uint8)
    if hasattr(x, "data_ptr"):
        size = x.numel() * x.element_size()
        return (
            np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(x.data_ptr()))
            if size
            else np.zeros(0, np.uint8)
        )
    return None


def _differs(x: Any, y: Any) -> int | None:
    a, b = _bytes(x), _bytes(y)
    if a is None or b is None or np.array_equal(a, b):
        return None
    size = x.dtype.itemsize
    return int(np.flatnonzero(a != b)[0]) // size


def _assign(a: Any, x: Any) -> None:
    to, frm = _bytes(a), _bytes(x)
    if to is not None and frm is not None:
        to[:] = frm
