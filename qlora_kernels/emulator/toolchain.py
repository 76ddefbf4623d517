"""NVIDIA's compiler tools: where they are, and what we ask of them.

Four programs are used, all of which PyPI has as wheels, so that nothing here needs a CUDA
installation, a driver or a GPU:

=========== ============================ ==============================================
tool        wheel                        used for
=========== ============================ ==============================================
nvcc        nvidia-cuda-nvcc             ``.cu`` to PTX, cubin, shared library
ptxas       nvidia-cuda-nvcc             PTX to cubin, registers and spills
cuobjdump   nvidia-cuda-cuobjdump        PTX and cubins out of a compiled library
nvdisasm    nvidia-cuda-nvdisasm         SASS, with the line of PTX each instruction is from
=========== ============================ ==============================================

``find_tool`` looks in ``CUDA_HOME`` (or ``CUDA_PATH``), then in the wheels of this Python, then on
``PATH``, then in ``/usr/local/cuda``, last in Triton's wheel, which bundles all but nvcc. The
wheels come before ``PATH`` because they are what a requirements file pins.

Results are cached on disk under a hash of everything that decides them: the tool's version, the
options, the source's text and path (debug information names it), and the text of every header of
the user's that was included. ``PTX_EMULATOR_CACHE`` moves the cache.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = [
    "CompileError",
    "Cubin",
    "EmbeddedCode",
    "Ptx",
    "Resources",
    "ToolNotFound",
    "ToolchainError",
    "assemble",
    "available",
    "cache_dir",
    "compile_cubin",
    "compile_library",
    "compile_object",
    "compile_ptx",
    "device_code_digest",
    "disassemble",
    "extract_cubins",
    "extract_ptx",
    "find_tool",
    "known_targets",
    "link_library",
    "normalize_target",
    "resource_usage",
    "tool_version",
]

# The wheel that brings each tool, for CUDA 13 and (with a suffix) before it.
_WHEELS = {
    "nvcc": "nvidia-cuda-nvcc",
    "ptxas": "nvidia-cuda-nvcc",
    "cuobjdump": "nvidia-cuda-cuobjdump",
    "nvdisasm": "nvidia-cuda-nvdisasm",
}
# What nvcc needs beside itself: (a file below its root, the wheel that brings it).
_NVCC_PARTS = (
    ("nvvm/bin/cicc", "nvidia-nvvm"),
    ("include/crt/host_config.h", "nvidia-cuda-crt"),
    ("include/cuda_runtime.h", "nvidia-cuda-runtime"),
    ("include/nv/target", "nvidia-cuda-cccl"),
)


class ToolchainError(RuntimeError):
    """Something is wrong with the compiler tools, or with what was asked of them."""


class ToolNotFound(ToolchainError):
    """A tool is not on this machine; the message names the package that brings it."""


class CompileError(ToolchainError):
    """A tool refused its input. ``command`` and ``log`` are what was run and what it said."""

    def __init__(self, message: str, command: Sequence[str], log: str) -> None:
        super().__init__(message)
        self.command = list(command)
        self.log = log


@dataclass(frozen=True)
class Resources:
    """What the compiler gave one kernel on one target. Bytes are bytes a thread for ``stack``,
    ``spill_*`` and ``local``, and bytes a block for ``shared``. Spills are ``None`` where they
    are not known (a cubin taken out of a library does not record them)."""

    registers: int
    shared: int = 0
    stack: int = 0
    local: int = 0
    barriers: int = 0
    constant: int = 0
    spill_stores: int | None = None
    spill_loads: int | None = None


@dataclass(frozen=True)
class Ptx:
    """PTX text and where it came from. ``source`` is the ``.cu`` file, if there was one."""

    text: str
    target: str
    source: Path | None = None
    log: str = ""


@dataclass(frozen=True)
class Cubin:
    """An assembled module. ``resources`` maps mangled kernel names to what each uses."""

    path: Path
    target: str
    resources: dict[str, Resources] = field(default_factory=dict)
    log: str = ""

    @property
    def data(self) -> bytes:
        return self.path.read_bytes()


@dataclass(frozen=True)
class EmbeddedCode:
    """PTX (``text`` set) or a cubin (``data`` set) that was inside a library."""

    target: str
    name: str
    text: str = ""
    data: bytes = b""


# ------------------------------------------------------------------------------------------------
# Finding the tools


def _wheel_roots() -> list[Path]:
    """``nvidia/cu13``-like folders (CUDA 13) and ``nvidia/cuda_nvcc``-like ones (CUDA 12)."""
    places = {sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"]}
    places.update(site.getsitepackages() if hasattr(site, "getsitepackages") else [])
    places.add(site.getusersitepackages())
    places.update(p for p in sys.path if p.endswith("site-packages"))
    roots: list[Path] = []
    for place in sorted(places):
        base = Path(place) / "nvidia"
        if base.is_dir():
            cu = sorted(base.glob("cu[0-9]*"), key=lambda p: int(p.name[2:] or 0), reverse=True)
            roots += [*cu, *sorted(base.glob("cuda_*"))]
    return roots


def _triton_bin() -> list[Path]:
    for place in (sysconfig.get_paths()["purelib"], *sys.path):
        folder = Path(place) / "triton" / "backends" / "nvidia" / "bin"
        if folder.is_dir():
            return [folder]
    return []


def _search_path() -> list[Path]:
    folders: list[Path] = []
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            folders.append(Path(os.environ[variable]) / "bin")
    folders += [root / "bin" for root in _wheel_roots()]
    folders += [Path(p) for p in os.environ.get("PATH", "").split(os.pathsep) if p]
    folders.append(Path("/usr/local/cuda/bin"))
    return folders + _triton_bin()


def find_tool(name: str) -> Path:
    """The path of ``nvcc``, ``ptxas``, ``cuobjdump`` or ``nvdisasm``.

    Raises ``ToolNotFound``, naming the package to install, if it is nowhere, or if it is an nvcc
    that lacks the wheels it needs beside it; ``ValueError`` for a tool that is not one of the four.
    """
    if name not in _WHEELS:
        raise ValueError(f"unknown tool {name!r}: expected one of {', '.join(_WHEELS)}")
    for folder in _search_path():
        path = folder / name
        if path.is_file() and os.access(path, os.X_OK):
            if name == "nvcc":
                _check_nvcc(path)
            return path
    raise ToolNotFound(
        f"{name} was found neither in CUDA_HOME, nor in the NVIDIA wheels of this Python, nor on "
        f"PATH. `pip install {_WHEELS[name]}` brings it"
        + (
            " (with nvidia-cuda-runtime and nvidia-cuda-cccl for the headers)."
            if name == "nvcc"
            else "."
        )
    )


def _check_nvcc(nvcc: Path) -> None:
    root = nvcc.resolve().parent.parent
    if not (root / "bin" / "nvcc.profile").is_file():
        return  # a wrapper script; it knows where its parts are
    if root.parent.name != "nvidia":
        return  # a full toolkit
    for part, wheel in _NVCC_PARTS:
        if not (root / part).exists():
            raise ToolNotFound(
                f"{nvcc} is installed without {part}, which it needs: `pip install {wheel}` "
                "(the version of the other nvidia-cuda-* packages) brings it."
            )
    if shutil.which("g++") is None and not os.environ.get("NVCC_CCBIN"):
        raise ToolNotFound(
            "nvcc needs a host C++ compiler: install g++ (Debian: g++), or set NVCC_CCBIN."
        )


def available(*names: str) -> str | None:
    """``None`` if all the named tools (default: all four) can be had, else why not: what a test
    that needs them gives as its reason to skip."""
    for name in names or tuple(_WHEELS):
        try:
            find_tool(name)
        except ToolNotFound as error:
            return str(error)
    return None


@functools.cache
def _version_of(path: str) -> str:
    text = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    match = re.search(r"\bV(\d+\.\d+\.\d+)", text)
    return match.group(1) if match else text.strip()


def tool_version(name: str) -> str:
    """The tool's version, such as ``"13.5.37"``."""
    return _version_of(str(find_tool(name)))


@functools.cache
def _known_targets(nvcc: str) -> tuple[str, ...]:
    text = subprocess.run(
        [nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=False
    ).stdout
    numbers = sorted({int(n) for n in re.findall(r"compute_(\d+)", text)})
    return tuple(f"sm_{n}" for n in numbers)


def known_targets() -> tuple[str, ...]:
    """The real architectures that this nvcc compiles for, ascending: ``("sm_75", "sm_80", …)``."""
    return _known_targets(str(find_tool("nvcc")))


def normalize_target(target: str | int) -> str:
    """``80``, ``"80"``, ``"compute_80"`` and ``"sm_80"`` to ``"sm_80"``; suffixes ``a`` and ``f``
    (features of one architecture or family) stay. Raises ``ToolchainError`` for what this nvcc
    does not know."""
    match = re.fullmatch(r"(?:sm_|compute_)?(\d+)([af]?)", str(target).strip().lower())
    known = known_targets()
    if match is None or f"sm_{match.group(1)}" not in known:
        raise ToolchainError(
            f"target {target!r} is not one that nvcc {tool_version('nvcc')} compiles for; "
            f"it knows {', '.join(known)}."
        )
    return f"sm_{match.group(1)}{match.group(2)}"


# ------------------------------------------------------------------------------------------------
# The cache


def cache_dir() -> Path:
    """Where results are kept; made if it is not there."""
    base = os.environ.get("PTX_EMULATOR_CACHE")
    if base:
        path = Path(base)
    else:
        root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        path = Path(root) / "ptx-emulator"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError:  # a read-only home
        path = Path(tempfile.gettempdir()) / f"ptx-emulator-{os.getuid()}"
        path.mkdir(parents=True, exist_ok=True)
    return path


def _digest(*parts: object) -> str:
    h = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode()
        h.update(len(data).to_bytes(8, "little"))
        h.update(data)
    return h.hexdigest()[:32]


def _file_digest(path: str | Path) -> str:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError:
        return "missing"


class _Entry:
    """One folder of the cache. Written whole under a temporary name and renamed, so that
    processes side by side see either nothing or all of it."""

    def __init__(self, kind: str, key: str) -> None:
        self.folder = cache_dir() / kind / key[:2] / key

    def load(self) -> dict[str, Any] | None:
        try:
            meta: dict[str, Any] = json.loads((self.folder / "meta.json").read_text())
        except (OSError, ValueError):
            return None
        for path, digest in meta.get("dependencies", {}).items():
            if _file_digest(path) != digest:
                return None
        return meta

    def store(self, files: dict[str, Path], meta: dict[str, Any]) -> None:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=self.folder.parent, prefix=".new-"))
        temporary.chmod(0o755)
        for name, path in files.items():
            shutil.copyfile(path, temporary / name)
        (temporary / "meta.json").write_text(json.dumps(meta))
        try:
            temporary.rename(self.folder)
        except OSError:  # stale, or another process was first: replace what is there
            old = Path(tempfile.mkdtemp(dir=self.folder.parent, prefix=".old-"))
            try:
                self.folder.rename(old / "entry")
                temporary.rename(self.folder)
            except OSError:
                shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)


def _run(command: Sequence[str], what: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    log = done.stdout + done.stderr
    if done.returncode != 0:
        tail = "\n".join(line for line in log.splitlines() if line.strip())[-4000:]
        raise CompileError(f"{what} failed (exit code {done.returncode}):\n{tail}", command, log)
    return log


# ------------------------------------------------------------------------------------------------
# Compiling


def _put(path: Path, write: Callable[[Path], object]) -> None:
    """Makes ``path`` by ``write(temporary)``: whole, whatever other threads and processes make."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".new-") as folder:
        temporary = Path(folder) / path.name
        write(temporary)
        temporary.replace(path)


def _source_file(source: str | Path, name: str, folder: Path) -> tuple[Path, str]:
    """A path that holds the source. A string with a newline or a brace in it is source text; it is
    written below the cache under its own hash, so that debug information names a file that
    stays."""
    if isinstance(source, Path) or not re.search(r"[\n{;]", source):
        path = Path(source).expanduser()
        if not path.is_file():
            raise ToolchainError(f"no such CUDA source: {path}")
        return path.resolve(), path.read_text()
    folder = folder / "sources" / _digest(source)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    if not path.is_file() or path.read_text() != source:
        _put(path, lambda temporary: temporary.write_text(source))
    return path, source


def _dependencies(makefile: Path) -> dict[str, str]:
    """The headers of a make rule, with their digests, less those of the toolkit and the system
    (their version is in the key)."""
    text = makefile.read_text().replace("\\\n", " ")
    names = re.split(r"(?<!\\)\s+", text.split(": ", 1)[-1].strip())
    return {n: _file_digest(n) for n in (x.replace("\\ ", " ") for x in names) if n}


def _nvcc(
    kind: str, source: str | Path, arch_flags: list[str], options: Sequence[str], name: str
) -> tuple[Path, dict[str, Any], Path]:
    nvcc = find_tool("nvcc")
    path, text = _source_file(source, name, cache_dir())
    suffix = {"ptx": ".ptx", "cubin": ".cubin", "object": ".o"}[kind]
    key = _digest(_version_of(str(nvcc)), kind, path, text, *arch_flags, "|", *options)
    entry = _Entry(kind, key)
    meta = entry.load()
    if meta is None:
        with tempfile.TemporaryDirectory(prefix="ptx-emulator-") as folder:
            out = Path(folder) / f"out{suffix}"
            deps = Path(folder) / "deps.mk"
            stage = {"ptx": ["-ptx"], "cubin": ["-cubin", "-Xptxas", "-v"], "object": ["-c"]}[kind]
            command = [str(nvcc), *stage, *arch_flags, *options, "-MMD", "-MF", str(deps)]
            command += [str(path), "-o", str(out)]
            log = _run(command, f"nvcc on {path}")
            meta = {"log": log, "dependencies": _dependencies(deps)}
            entry.store({f"out{suffix}": out}, meta)
    return entry.folder / f"out{suffix}", meta, path


def compile_ptx(
    source: str | Path,
    target: str | int = "sm_80",
    options: Sequence[str] = (),
    *,
    lineinfo: bool = True,
    name: str = "kernel.cu",
) -> Ptx:
    """Compile CUDA C++ (a path, or source text, called ``name`` in reports) to PTX.

    ``target`` is the virtual architecture (``"sm_80"`` and ``"compute_80"`` mean the same here),
    ``options`` go to nvcc as they are. Raises ``CompileError`` with nvcc's words for source that
    does not compile, ``ToolchainError`` for a target that nvcc does not know, ``ToolNotFound``.
    """
    target = normalize_target(target)
    flags = [f"-arch={target.replace('sm_', 'compute_')}"] + (["-lineinfo"] if lineinfo else [])
    out, meta, path = _nvcc("ptx", source, flags, options, name)
    return Ptx(out.read_text(), target, path, meta["log"])


def compile_cubin(
    source: str | Path,
    target: str | int = "sm_80",
    options: Sequence[str] = (),
    *,
    lineinfo: bool = True,
    name: str = "kernel.cu",
) -> Cubin:
    """Compile CUDA C++ to a cubin for ``target``, with its resource usage. As ``compile_ptx``."""
    target = normalize_target(target)
    flags = [f"-arch={target}"] + (["-lineinfo"] if lineinfo else [])
    out, meta, _ = _nvcc("cubin", source, flags, options, name)
    return Cubin(out, target, _merge(resource_usage(out), _parse_verbose(meta["log"])), meta["log"])


def assemble(
    ptx: str | Ptx,
    target: str | int | None = None,
    options: Sequence[str] = (),
    *,
    lineinfo: bool = True,
) -> Cubin:
    """PTX text to a cubin for ``target`` (its own by default), by ptxas, with resource usage.

    With ``lineinfo`` the cubin carries its PTX and, for each instruction, the line in it that the
    instruction was made from: what ``sass`` reads.
    """
    text = ptx.text if isinstance(ptx, Ptx) else ptx
    ptxas = find_tool("ptxas")
    if target is None:
        match = re.search(r"^\s*\.target\s+(sm_\w+)", text, re.MULTILINE)
        if match is None:
            raise ToolchainError("this PTX has no .target line; say which target to assemble for")
        target = match.group(1)
    target = str(target) if str(target).startswith("sm_") else f"sm_{target}"
    entry = _Entry("assembled", _digest(_version_of(str(ptxas)), target, lineinfo, text, *options))
    meta = entry.load()
    if meta is None:
        with tempfile.TemporaryDirectory(prefix="ptx-emulator-") as folder:
            source, out = Path(folder) / "in.ptx", Path(folder) / "out.cubin"
            source.write_text(text)
            command = [str(ptxas), f"-arch={target}", "-v", *options]
            command += [*(["-lineinfo"] if lineinfo else []), str(source), "-o", str(out)]
            meta = {"log": _run(command, f"ptxas for {target}")}
            entry.store({"out.cubin": out}, meta)
    out = entry.folder / "out.cubin"
    return Cubin(out, target, _merge(resource_usage(out), _parse_verbose(meta["log"])), meta["log"])


def compile_object(
    source: str | Path,
    targets: Iterable[str | int] = ("sm_80",),
    options: Sequence[str] = (),
    *,
    lineinfo: bool = True,
    name: str = "kernel.cu",
) -> Path:
    """Compile CUDA C++ with its host code to a position-independent object file that holds, for
    each target, its cubin, and PTX of the lowest."""
    names = sorted((normalize_target(t) for t in targets), key=lambda t: int(re.sub(r"\D", "", t)))
    flags: list[str] = ["-lineinfo"] if lineinfo else []
    for index, target in enumerate(names):
        virtual = target.replace("sm_", "compute_")
        code = f"[{target},{virtual}]" if index == 0 else target
        flags += ["-gencode", f"arch={virtual},code={code}"]
    return _nvcc("object", source, [*flags, "-Xcompiler", "-fPIC"], options, name)[0]


def _symlink(target: Path, link: Path) -> None:
    link.symlink_to(target)


def _cudart_link_folder() -> list[str]:
    """``-L`` for a folder with a ``libcudart.so``: the wheels have only ``libcudart.so.13``."""
    root = find_tool("nvcc").resolve().parent.parent
    for folder in (root / "lib", root / "lib64"):
        real = sorted(folder.glob("libcudart.so.*"))
        if real and not (folder / "libcudart.so").exists():
            links = cache_dir() / "link" / _digest(real[-1])
            links.mkdir(parents=True, exist_ok=True)
            link = links / "libcudart.so"
            if not link.exists():
                _put(link, functools.partial(_symlink, real[-1]))
            return [f"-L{links}"]
    return []


def link_library(
    objects: Sequence[Path], out: Path, *, cudart: str = "shared", options: Sequence[str] = ()
) -> Path:
    """Link objects that nvcc made into a shared library at ``out``.

    ``cudart="shared"`` leaves the runtime to whoever is loaded under its name, which is how
    ``runtime.EmulatedRuntime`` steps in; ``"static"`` is what products ship, and device code is
    the same in both (``device_code_digest``).
    """
    if cudart not in ("shared", "static"):
        raise ValueError(f"cudart={cudart!r}: expected 'shared' or 'static'")
    command = [str(find_tool("nvcc")), "-shared", "-cudart", cudart, *options]
    command += [*_cudart_link_folder(), *map(str, objects), "-o", str(out)]
    _run(command, f"linking {out}")
    return out


def compile_library(
    source: str | Path,
    targets: Iterable[str | int] = ("sm_80",),
    options: Sequence[str] = (),
    *,
    lineinfo: bool = True,
    name: str = "kernel.cu",
) -> Path:
    """A shared library (``-cudart shared``) of one CUDA source, host launchers included; cached."""
    built = compile_object(source, targets, options, lineinfo=lineinfo, name=name)
    entry = _Entry("library", _digest(tool_version("nvcc"), _file_digest(built)))
    if entry.load() is None:
        with tempfile.TemporaryDirectory(prefix="ptx-emulator-") as folder:
            out = link_library([built], Path(folder) / "out.so")
            entry.store({"out.so": out}, {})
    return entry.folder / "out.so"


# ------------------------------------------------------------------------------------------------
# Taking things out of binaries


def _extract(library: str | Path, flag: str, pattern: str) -> list[Path]:
    path = Path(library)
    if not path.is_file():
        raise ToolchainError(f"no such library: {path}")
    cuobjdump = find_tool("cuobjdump")
    key = _digest(_version_of(str(cuobjdump)), flag, _file_digest(path))
    entry = _Entry("extracted", key)
    meta = entry.load()
    if meta is None:
        with tempfile.TemporaryDirectory(prefix="ptx-emulator-") as folder:
            done = subprocess.run(
                [str(cuobjdump), flag, "all", str(path.resolve())],
                cwd=folder, capture_output=True, text=True, check=False,
            )  # fmt: skip
            found = sorted(Path(folder).glob(pattern), key=_natural)
            empty = re.search(r"No (PTX|ELF|cubin) file found|does not contain device code",
                              done.stdout + done.stderr, re.IGNORECASE)  # fmt: skip
            if done.returncode != 0 and not found and not empty:
                raise ToolchainError(
                    f"cuobjdump cannot read {path}: {(done.stderr or done.stdout).strip()}"
                )
            meta = {"files": [p.name for p in found]}
            entry.store({p.name: p for p in found}, meta)
    return [entry.folder / name for name in meta["files"]]


def _natural(path: Path) -> list[object]:
    return [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", path.name)]


def extract_ptx(library: str | Path) -> list[EmbeddedCode]:
    """All PTX inside a library, executable, object or fatbin, in the binary's order; empty if
    there is none. Raises ``ToolchainError`` for a file that is missing or cannot be read."""
    found = []
    for path in _extract(library, "-xptx", "*.ptx"):
        text = path.read_text()
        match = re.search(r"^\s*\.target\s+(sm_\w+)", text, re.MULTILINE)
        found.append(EmbeddedCode(match.group(1) if match else "", path.name, text=text))
    return found


def extract_cubins(library: str | Path) -> list[EmbeddedCode]:
    """All cubins inside a library, executable, object or fatbin, in the binary's order."""
    found = []
    for path in _extract(library, "-xelf", "*.cubin"):
        match = re.search(r"\.(sm_\w+)\.cubin$", path.name)
        found.append(
            EmbeddedCode(match.group(1) if match else "", path.name, data=path.read_bytes())
        )
    return found


def device_code_digest(library: str | Path) -> str:
    """One hash over all device code in a library, file names left out: equal for two libraries
    that carry the same kernels, however their host halves were linked."""
    parts = sorted(
        _digest(c.target, c.text, c.data) for c in extract_ptx(library) + extract_cubins(library)
    )
    return _digest(*parts)


def resource_usage(cubin: str | Path) -> dict[str, Resources]:
    """Registers, shared memory and stack of every kernel in a cubin, by mangled name."""
    path = Path(cubin)
    if not path.is_file():
        raise ToolchainError(f"no such cubin: {path}")
    tool = find_tool("cuobjdump")
    entry = _Entry("resources", _digest(_version_of(str(tool)), _file_digest(path)))
    meta = entry.load()
    if meta is None:
        meta = {"log": _run([str(tool), "-res-usage", str(path)], f"cuobjdump on {path}")}
        entry.store({}, meta)
    # From sm_90 on the figure includes the kilobyte that every block gives to the system; it is no
    # part of what the kernel declares, and occupancy adds it for all targets alike.
    reserved = 1024 if b".nv.shared.reserved" in path.read_bytes() else 0
    found: dict[str, Resources] = {}
    for name, line in re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", meta["log"]):
        use = dict(re.findall(r"([A-Z]+(?:\[\d+\])?):(\d+)", line))
        found[name] = Resources(
            registers=int(use["REG"]),
            shared=max(0, int(use.get("SHARED", 0)) - reserved),
            stack=int(use.get("STACK", 0)),
            local=int(use.get("LOCAL", 0)),
            constant=int(use.get("CONSTANT[0]", 0)),
        )
    return found


def _parse_verbose(log: str) -> dict[str, dict[str, int]]:
    """Spills and barriers from ``ptxas -v``."""
    found: dict[str, dict[str, int]] = {}
    current: dict[str, int] = {}
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)' for", line):
            current = found.setdefault(match.group(1), {})
        elif match := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            current["spill_stores"], current["spill_loads"] = map(int, match.groups())
        elif match := re.search(r"used (\d+) barriers", line):
            current["barriers"] = int(match.group(1))
    return found


def _merge(usage: dict[str, Resources], verbose: dict[str, dict[str, int]]) -> dict[str, Resources]:
    return {
        name: Resources(**{**vars(use), **verbose.get(name, {})}) for name, use in usage.items()
    }


def disassemble(cubin: str | Path | Cubin, *, lines: str = "ptx") -> str:
    """nvdisasm's listing of a cubin's code. ``lines`` chooses the annotation: ``"ptx"`` (line in
    the embedded PTX), ``"source"`` (file and line of the CUDA source, with inlining) or
    ``"none"``."""
    path = cubin.path if isinstance(cubin, Cubin) else Path(cubin)
    flags = {"ptx": ["-gp"], "source": ["-gi"], "none": []}
    if lines not in flags:
        raise ValueError(f"lines={lines!r}: expected one of {', '.join(flags)}")
    if not path.is_file():
        raise ToolchainError(f"no such cubin: {path}")
    tool = find_tool("nvdisasm")
    entry = _Entry("disassembled", _digest(_version_of(str(tool)), lines, _file_digest(path)))
    meta = entry.load()
    if meta is None:
        meta = {"text": _run([str(tool), "-c", *flags[lines], str(path)], f"nvdisasm on {path}")}
        entry.store({}, meta)
    return str(meta["text"])
