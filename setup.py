"""Builds the native libraries with CMake and ninja; everything else is in pyproject.toml.

What it takes care of, beyond calling CMake:

- torch is not a build requirement, or an isolated build would download one (gigabytes, and perhaps
  another one than runs later). Only its headers are needed, and they are found where the package
  will live, without importing anything.
- the build folder is reused. Isolated builds bring CMake, ninja and pybind11 in a temporary folder
  whose path is gone the next time: when a tool moves, CMake's cache is dropped, the objects stay.
- one build at a time in one checkout, and libraries are replaced whole, so that a process that has
  an old one loaded keeps it.

Environment: QLORA_KERNELS_TORCH (folder of the torch to build for), QLORA_KERNELS_WERROR=1,
CMAKE_ARGS, CXX, MAX_JOBS, and for the CUDA half:

QLORA_KERNELS_CUDA                0: without; 1: with, or fail; auto (default): with, where nvcc is
                                  found and there is a GPU or the torch built for has CUDA
QLORA_KERNELS_CUDA_ARCHITECTURES  "80", "80 90", "all"; by default those of the GPUs here, else all
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import setuptools
from setuptools import Command, Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import OptionError, PlatformError

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 10)  # the first stable ABI with all that csrc/torch_ops.cpp calls
OLDEST_CMAKE = (3, 22)
OLDEST_SETUPTOOLS = 77  # reads the license in pyproject.toml

if int(setuptools.__version__.split(".")[0]) < OLDEST_SETUPTOOLS:
    sys.exit(
        f"error: setuptools {setuptools.__version__} is too old; {OLDEST_SETUPTOOLS} or newer is "
        "needed: pip install --upgrade setuptools"
    )


class Native(Extension):
    """A library of the package, made by the CMake target of the same name."""

    def __init__(self, target: str, suffix: str) -> None:
        super().__init__(f"qlora_kernels.{target}", sources=[])
        self.target = target
        self.filename = target + suffix


LIBRARIES = [
    Native("_ops", ".abi3.so"),  # torch's stable ABI, and nothing of Python's
    Native("_host", sysconfig.get_config_var("EXT_SUFFIX")),  # pybind11: for one Python
]
if list((ROOT / "csrc" / "emulator").glob("*.cpp")):
    LIBRARIES.append(Native("_emulator", ".so"))
if sys.platform == "linux":
    LIBRARIES += [Native("_cudart_stub", ".so"), Native("_cudart_stub12", ".so")]
CUDA_LIBRARY = Native("_ops_cuda", ".abi3.so")
ARCHITECTURES = ("75", "80", "86", "89", "90", "100", "120")


# --- what the build needs, found and checked ----------------------------------------------------


def version_tuple(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


def torch_folders() -> Iterator[Path]:
    """Where torch may be: what this Python sees, then what it sees when nobody isolates it."""
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        yield Path(spec.origin).parent
    # Build isolation is made of environment variables (pip) or a virtual environment of its own.
    outside = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    code = "import importlib.util as u; s = u.find_spec('torch'); print(s.origin if s else '')"
    pythons = [sys.executable]
    if os.environ.get("VIRTUAL_ENV"):
        pythons.append(str(Path(os.environ["VIRTUAL_ENV"]) / "bin" / "python"))
    for python in pythons:
        with contextlib.suppress(OSError):
            result = subprocess.run(
                [python, "-c", code], env=outside, cwd=os.path.sep, capture_output=True, text=True
            )
            if result.stdout.strip():
                yield Path(result.stdout.strip()).parent


def find_torch() -> tuple[Path, str]:
    """Folder and version of the torch to build for."""
    chosen = os.environ.get("QLORA_KERNELS_TORCH")
    folders = [Path(chosen)] if chosen else list(torch_folders())
    for folder in folders:
        version_file = folder / "version.py"
        if not version_file.is_file():
            continue
        match = re.search(r"__version__ *= *['\"]([^'\"]+)", version_file.read_text())
        version = match.group(1) if match else "0"
        if version_tuple(version)[:2] < OLDEST_TORCH:
            raise PlatformError(
                f"{folder} is torch {version}; qlora-kernels needs torch "
                f"{'.'.join(map(str, OLDEST_TORCH))} or newer"
            )
        return folder, version
    looked = f"in {chosen}" if chosen else f"with {sys.executable}"
    raise PlatformError(
        f"no torch found to build for (looked {looked}). Install torch first (pip install torch), "
        "then qlora-kernels, if need be with --no-build-isolation; or set QLORA_KERNELS_TORCH to "
        "the folder of an installed one (.../site-packages/torch)"
    )


def find_tool(name: str) -> str:
    """cmake or ninja: the PyPI package's own binary, else the one on PATH."""
    try:
        module = __import__(name)
        folder = getattr(module, "CMAKE_BIN_DIR", None) or module.BIN_DIR
        binary = Path(folder) / name
        if binary.is_file():
            return str(binary)
    except (ImportError, AttributeError):
        pass
    binary_on_path = shutil.which(name)
    if binary_on_path is None:
        raise PlatformError(
            f"{name} is missing: pip install {name}, or install it with the system's packages"
        )
    return binary_on_path


def first_line(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0 or not result.stdout:
        raise PlatformError(f"{shlex.join(command)} failed:\n{result.stdout}{result.stderr}")
    return result.stdout.splitlines()[0]


def find_cmake() -> tuple[str, str]:
    cmake = find_tool("cmake")
    version = first_line(cmake, "--version")
    if version_tuple(version)[:2] < OLDEST_CMAKE:
        raise PlatformError(
            f"{cmake} is too old ({version}); "
            f"{'.'.join(map(str, OLDEST_CMAKE))} or newer is needed: pip install cmake"
        )
    return cmake, version


def find_compiler() -> tuple[str, str]:
    """The C++ compiler's path and its version line."""
    wanted = os.environ.get("CXX")
    names = [wanted] if wanted else ["c++", "g++", "clang++"]
    for name in names:
        parts = shlex.split(name)
        path = shutil.which(parts[-1] if "ccache" in parts[0] else parts[0])
        if path is not None:
            return name, first_line(path, "--version")
    raise PlatformError(
        f"no C++ compiler found (looked for {', '.join(names)}): install one, for example "
        "g++ (Debian and Ubuntu: apt-get install g++), or name it in the variable CXX"
    )


def find_pybind11() -> str:
    try:
        import pybind11
    except ImportError:
        raise PlatformError("pybind11 is missing: pip install pybind11") from None
    return str(pybind11.get_cmake_dir())


# --- CUDA: whether, with what, for what -----------------------------------------------------------


def find_nvcc() -> Path:
    """nvcc where the emulator's tests look for it too: CUDA_HOME, NVIDIA's wheels, PATH."""
    file = ROOT / "qlora_kernels" / "emulator" / "toolchain.py"
    spec = importlib.util.spec_from_file_location("_qlora_toolchain", file)
    assert spec is not None and spec.loader is not None
    toolchain = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = toolchain
    spec.loader.exec_module(toolchain)
    try:
        return Path(toolchain.find_tool("nvcc"))
    except toolchain.ToolNotFound as error:
        raise PlatformError(str(error)) from None


def gpu_architectures() -> list[str]:
    """Compute capabilities of the GPUs here; none where the driver does not answer."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    with contextlib.suppress(OSError):
        result = subprocess.run(query, capture_output=True, text=True)
        if result.returncode == 0:
            return sorted({c.strip().replace(".", "") for c in result.stdout.split()}, key=int)
    return []


def wanted_architectures() -> list[str]:
    """What to build for. A GPU that is newer than all we know runs the PTX."""
    chosen = os.environ.get("QLORA_KERNELS_CUDA_ARCHITECTURES", "").replace(",", " ").split()
    if chosen and chosen != ["all"]:
        unknown = [a for a in chosen if a not in ARCHITECTURES]
        if unknown:
            raise PlatformError(
                f"QLORA_KERNELS_CUDA_ARCHITECTURES has {' '.join(unknown)}; it may have "
                f"{' '.join(ARCHITECTURES)}, or be all"
            )
        return chosen
    here = [] if chosen else [a for a in gpu_architectures() if a in ARCHITECTURES]
    return here or list(ARCHITECTURES)


def torch_has_cuda() -> bool:
    folder, _ = find_torch()
    return (folder / "lib" / "libtorch_cuda.so").is_file()


def cuda_wanted() -> Path | None:
    """The nvcc to build the CUDA half with, or None for a build without it."""
    wish = os.environ.get("QLORA_KERNELS_CUDA", "") or "auto"
    if wish not in ("0", "1", "auto"):
        raise PlatformError(f"QLORA_KERNELS_CUDA={wish}: it may be 0, 1 or auto")
    if wish == "0" or sys.platform != "linux":
        if wish == "1":
            raise PlatformError("QLORA_KERNELS_CUDA=1: the CUDA kernels are built on Linux only")
        return None
    if wish == "1":
        return find_nvcc()
    if not gpu_architectures() and not torch_has_cuda():
        return None  # and no compiler is looked for
    try:
        return find_nvcc()
    except PlatformError as error:
        print(f"qlora-kernels: no CUDA kernels are built: {error}", file=sys.stderr)
        return None


def cuda_options(nvcc: Path, architectures: list[str]) -> list[str]:
    return [
        "-DQLK_CUDA=ON",
        f"-DQLK_NVCC={nvcc}",
        f"-DQLK_CUDA_ARCHITECTURES={';'.join(architectures)}",
    ]


# --- the build ----------------------------------------------------------------------------------


def build_folder(kind: str) -> Path:
    """One for each Python, since the pybind11 module is compiled for one."""
    folder = ROOT / "build" / f"{kind}-{sysconfig.get_config_var('SOABI')}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Waits for another build in the same folder to end."""
    try:
        import fcntl
    except ImportError:  # no such locks on Windows
        yield
        return
    with open(folder.with_name(folder.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def forget_configuration(folder: Path) -> None:
    """Drops CMake's cache but keeps ninja's log and the objects."""
    (folder / "CMakeCache.txt").unlink(missing_ok=True)
    for found in (folder / "CMakeFiles").glob("[0-9]*"):
        shutil.rmtree(found, ignore_errors=True)


def start_over(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)


def read_record(record: Path) -> dict[str, object]:
    try:
        found = json.loads(record.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def compile_targets(folder: Path, targets: list[str], *options: str) -> None:
    """Configures ``folder`` as far as needed and builds these CMake targets in it."""
    torch, torch_version = find_torch()
    cmake, cmake_version = find_cmake()
    ninja, pybind11 = find_tool("ninja"), find_pybind11()
    compiler, compiler_version = find_compiler()

    # A changed compiler or a moved checkout makes all objects useless; a changed tool does not, and
    # ninja sees itself which objects a changed option is for.
    identity = {"source": str(ROOT), "compiler": [compiler, compiler_version]}
    tools = {
        "cmake": [cmake, cmake_version],
        "ninja": ninja,
        "pybind11": pybind11,
        "python": sys.executable,
        "torch": [str(torch), torch_version],
        "options": [*options, *shlex.split(os.environ.get("CMAKE_ARGS", ""))],
    }
    record = folder / "made_with.json"
    before = read_record(record)
    if before.get("identity") != identity:
        start_over(folder)
    elif before.get("tools") != tools:
        forget_configuration(folder)

    def configure() -> subprocess.CompletedProcess[str]:
        command = [
            cmake,
            *("-S", str(ROOT), "-B", str(folder), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11}",
            f"-DQLK_TORCH_DIR={torch}",
            f"-DQLK_WERROR={'ON' if os.environ.get('QLORA_KERNELS_WERROR') == '1' else 'OFF'}",
            *tools["options"],
        ]
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    had_cache = (folder / "CMakeCache.txt").is_file()
    result = configure()
    if result.returncode != 0 and had_cache:  # a cache that CMake cannot digest
        start_over(folder)
        result = configure()
    if result.returncode != 0:
        raise PlatformError(f"CMake could not configure the build:\n{result.stdout}")
    record.write_text(json.dumps({"identity": identity, "tools": tools}, indent=1))

    jobs = os.environ.get("MAX_JOBS")
    build = [cmake, "--build", str(folder), *(["-j", jobs] if jobs else []), "--target", *targets]
    if subprocess.call(build) != 0:
        raise PlatformError("the native libraries could not be compiled; see above")


def replace_if_changed(built: Path, target: Path) -> None:
    """Copies, in one step for whoever looks; an equal file stays as it is."""
    if target.is_file() and target.read_bytes() == built.read_bytes():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(dir=target.parent, prefix=target.name)
    os.close(handle)
    shutil.copy(built, aside)
    os.replace(aside, target)


class BuildNative(build_ext):
    """build_ext by CMake. Takes --inplace and editable installs as setuptools means them."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.nvcc = cuda_wanted()
        if self.nvcc is not None and CUDA_LIBRARY not in self.extensions:
            self.extensions.append(CUDA_LIBRARY)

    def get_ext_filename(self, fullname: str) -> str:
        for ext in self.extensions:
            if fullname in (ext.name, ext.target):
                package = ext.name.split(".")[:-1] if fullname == ext.name else []
                return os.path.join(*package, ext.filename)
        return str(super().get_ext_filename(fullname))

    def run(self) -> None:
        self.build("native", [e for e in self.extensions if e is not CUDA_LIBRARY], [])
        if self.nvcc is not None:
            architectures = wanted_architectures()
            options = cuda_options(self.nvcc, architectures)
            self.build("cuda" + "-".join(architectures), [CUDA_LIBRARY], options)

    def build(self, kind: str, extensions: list[Native], options: list[str]) -> None:
        folder = build_folder(kind)
        with one_at_a_time(folder):
            compile_targets(folder, [ext.target for ext in extensions], *options)
            for ext in extensions:
                replace_if_changed(folder / ext.filename, Path(self.get_ext_fullpath(ext.name)))


class BuildVariant(Command):
    """Builds the torch library in a way that only tests want."""

    description = "build build/<kind>/_ops*.so for the tests; load it through QLORA_KERNELS_OPS"
    user_options: ClassVar = [("kind=", None, "sanitize, emulated or cuda")]

    def initialize_options(self) -> None:
        self.kind = ""

    def finalize_options(self) -> None:
        if self.kind not in ("sanitize", "emulated", "cuda"):
            raise OptionError(f"--kind is {self.kind!r}; it may be sanitize, emulated or cuda")

    def run(self) -> None:
        if (
            self.kind == "cuda"
        ):  # the CUDA half and its emulated twin, where nvcc is; see tests/cuda
            architectures = wanted_architectures()
            folder = build_folder("cuda" + "-".join(architectures))
            options = cuda_options(find_nvcc(), architectures)
            with one_at_a_time(folder):
                compile_targets(folder, ["_ops_cuda", "_ops_cuda_emulated"], *options)
            return
        folder = build_folder(self.kind)
        with one_at_a_time(folder):
            if self.kind == "sanitize":
                compile_targets(folder, ["_ops"], "-DQLK_SANITIZE=ON")
                return
            simde = Path(sysconfig.get_path("purelib")) / "cmeel.prefix" / "include"
            options = [f"-DQLK_SIMDE_INCLUDE={simde}"] if simde.is_dir() else []
            compile_targets(folder, ["_ops_emulated"], "-DQLK_EMULATE_AVX512=ON", *options)


class BuildPython(build_py):
    """build_py from nothing: modules deleted since the last build must not reach a wheel."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


setup(
    ext_modules=LIBRARIES,
    cmdclass={"build_ext": BuildNative, "build_py": BuildPython, "build_variant": BuildVariant},
)
