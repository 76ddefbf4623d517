"""Builds, wheels and installs: what they contain, reuse, survive, and say when a thing is missing.

Builds of the whole package are marked ``full``: they take a minute each. They run in a copy of the
sources, in environments that see the torch of this one through a ``.pth`` file, so that nothing
large is downloaded and a second torch would be noticed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch

import qlora_kernels
from qlora_kernels import ops

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("setup.py", "pyproject.toml", "CMakeLists.txt", "MANIFEST.in", "LICENSE", "README.md")
SOABI = sysconfig.get_config_var("SOABI")
QUICK = {"CMAKE_ARGS": "-DCMAKE_CXX_FLAGS_RELEASE=-O0"}

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files")


def run(
    *command: str | Path, cwd: Path = ROOT, check: bool = True, **environment: str
) -> subprocess.CompletedProcess[str]:
    """The command's result; stdout and stderr together, shown when it fails."""
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={
            **os.environ,
            "PYTHONPATH": "",
            "QLORA_KERNELS_WERROR": "0",
            "QLORA_KERNELS_CUDA": "0",  # whatever CI asks for: minutes a build, and tested apart
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert result.returncode == 0 or not check, result.stdout[-6000:]
    return result


# --- what was built in place ---------------------------------------------------------------------


def native(name: str) -> Path:
    path = Path(qlora_kernels.__file__).with_name(name)
    if not path.is_file():
        pytest.skip(f"{name} is not built here")
    return path


def nm(path: Path, *flags: str) -> list[str]:
    if shutil.which("nm") is None:
        pytest.skip("no nm")
    return run("nm", *flags, path).stdout.splitlines()


@linux
def test_torch_library_needs_only_the_stable_abi() -> None:
    wanted = [line.split()[-1] for line in nm(native("_ops.abi3.so"), "-D", "--undefined-only")]
    cpp = [s for s in wanted if re.match(r"_ZN?K?(2at|3c10|5torch)", s)]
    assert cpp == [], "C++ symbols of torch: they change from one torch to the next"
    python = [s for s in wanted if s.startswith(("Py", "_Py"))]
    assert python == [], "symbols of Python: the library is one for all of them"
    of_torch = {s for s in wanted if s.startswith(("aoti_torch_", "torch_"))}
    assert "torch_parallel_for" in of_torch, "kernels run on torch's own threads"


@linux
def test_torch_library_has_no_path_to_one_torch() -> None:
    if shutil.which("readelf") is None:
        pytest.skip("no readelf")
    dynamic = run("readelf", "-d", native("_ops.abi3.so")).stdout
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
    assert "libtorch_cpu.so" in needed
    assert not [n for n in needed if n.startswith(("libc10", "libtorch_python", "libpython"))]


@linux
def test_kernels_define_nothing_that_other_files_could_pick_up() -> None:
    """An inline function compiled for AVX-512 may be the copy that the linker keeps for everybody.

    The portable objects stand first on the link line, and the others define no such symbol.
    """
    folder = ROOT / "build" / f"native-{SOABI}"
    objects = sorted(folder.glob("CMakeFiles/cpu_avx*.dir/**/*.o"))
    if not objects:
        pytest.skip("the package was not built in this checkout, or not on x86")
    weak = [line for path in objects for line in nm(path) if re.search(r" [VWu] \S+$", line)]
    assert weak == []
    (link,) = re.findall(r"^build _ops\.abi3\.so: (.*)", (folder / "build.ninja").read_text(), re.M)
    order = list(dict.fromkeys(re.findall(r"cpu_(\w+)\.dir", link)))
    assert order == [s for s in ("portable", "avx2", "avx512", "avx512_bf16") if s in order]
    assert order[0] == "portable"


def test_native_library_is_loaded_and_another_can_be_named(tmp_path: Path) -> None:
    native("_ops.abi3.so")
    assert ops.LIBRARY_ERROR is None
    code = "import qlora_kernels.ops"
    result = run(
        sys.executable, "-c", code, check=False, QLORA_KERNELS_OPS=str(tmp_path / "none.so")
    )
    assert result.returncode != 0
    assert "QLORA_KERNELS_OPS" in result.stdout and "none.so" in result.stdout


def test_package_works_without_the_native_library(tmp_path: Path) -> None:
    """A copy of the Python files alone: the ops run in plain torch."""
    shutil.copytree(
        Path(qlora_kernels.__file__).parent,
        tmp_path / "qlora_kernels",
        ignore=shutil.ignore_patterns("*.so", "__pycache__"),
    )
    code = """
import torch
from qlora_kernels import functional as F4, ops
assert "does not exist" in ops.LIBRARY_ERROR, ops.LIBRARY_ERROR
w = torch.randn(8, 64)
packed, state = F4.quantize_4bit(w, quant_type="nf4")
x = torch.randn(3, 64)
want = x @ F4.dequantize_4bit(packed, state).T
torch.testing.assert_close(F4.linear_4bit(x, packed, state), want)
"""
    run(sys.executable, "-c", code, cwd=tmp_path)


# --- what the files promise ----------------------------------------------------------------------


def test_torch_is_no_build_requirement() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    names = {re.match(r"[\w-]+", r).group() for r in project["build-system"]["requires"]}  # type: ignore[union-attr]
    assert "torch" not in names, "an isolated build would download gigabytes"
    assert {"setuptools", "cmake", "ninja", "pybind11"} <= names


def requirement_names(file: Path) -> set[str]:
    lines = (line.split("#")[0].strip() for line in file.read_text().splitlines())
    names = (re.match(r"[\w.-]+", line) for line in lines if line and not line.startswith("-"))
    return {re.sub(r"[-_.]+", "-", match.group()).lower() for match in names if match}


def test_every_requirement_is_pinned() -> None:
    pins = (ROOT / "requirements" / "constraints.txt").read_text()
    assert re.search(r"^torch==\d+\.\d+\.\d+$", pins, re.M)
    loose = [line for line in pins.splitlines() if line and not re.match(r"#|[\w.-]+==", line)]
    assert loose == []
    pinned = requirement_names(ROOT / "requirements" / "constraints.txt")
    for name in ("demo", "dev"):
        file = ROOT / "requirements" / f"{name}.txt"
        assert "-c constraints.txt" in file.read_text()
        assert requirement_names(file) - pinned == set()


# --- messages for what is missing ----------------------------------------------------------------


def build_in_place(cwd: Path = ROOT, prelude: str = "", **environment: str) -> str:
    """The output of a build that fails, run as ``python setup.py`` with lines of Python before."""
    code = (
        f"import runpy, sys\n{prelude}\nsys.argv = ['setup.py', '-q', 'build_ext', '--inplace']\n"
    )
    code += "runpy.run_path('setup.py', run_name='__main__')"
    result = run(sys.executable, "-c", code, cwd=cwd, check=False, **environment)
    assert result.returncode != 0
    assert "Traceback" not in result.stdout
    return result.stdout


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """What setup.py reads before it calls any tool, away from this checkout's build folder."""
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "qlora_kernels").mkdir()
    (tmp_path / "qlora_kernels" / "__init__.py").write_text('__version__ = "0"\n')
    return tmp_path


def test_missing_compiler_is_named(bare: Path) -> None:
    assert "no C++ compiler found" in build_in_place(bare, PATH="/nowhere", CXX="")
    assert "looked for no-such-c++" in build_in_place(bare, CXX="no-such-c++")


@pytest.mark.parametrize("tool", ["cmake", "ninja", "pybind11"])
def test_missing_build_tool_is_named(bare: Path, tool: str) -> None:
    output = build_in_place(bare, prelude=f"sys.modules[{tool!r}] = None", PATH="/nowhere")
    assert f"{tool} is missing: pip install {tool}" in output


def test_old_cmake_is_named(bare: Path) -> None:
    fake = bare / "bin" / "cmake"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\necho cmake version 3.10.2\n")
    fake.chmod(0o755)
    output = build_in_place(bare, prelude="sys.modules['cmake'] = None", PATH=str(fake.parent))
    assert "too old (cmake version 3.10.2); 3.22 or newer is needed: pip install cmake" in output


def test_missing_torch_says_what_to_do(bare: Path) -> None:
    output = build_in_place(bare, QLORA_KERNELS_TORCH=str(bare / "nothing"))
    assert "Install torch first" in output and str(bare / "nothing") in output


def test_old_torch_is_refused(bare: Path) -> None:
    old = bare / "torch"
    old.mkdir()
    (old / "version.py").write_text("__version__ = '2.9.1+cpu'\n")
    output = build_in_place(bare, QLORA_KERNELS_TORCH=str(old))
    assert "is torch 2.9.1+cpu; qlora-kernels needs torch 2.10 or newer" in output


def test_old_setuptools_is_named(bare: Path) -> None:
    old = "import setuptools; setuptools.__version__ = '65.5.0'"
    output = build_in_place(bare, prelude=old)
    assert "setuptools 65.5.0 is too old; 77 or newer is needed" in output


def test_cuda_without_its_compiler(bare: Path) -> None:
    """Asked for, it is an error that says what to install; a wish that is none is one too."""
    toolchain = Path("qlora_kernels") / "emulator" / "toolchain.py"
    (bare / toolchain).parent.mkdir()
    shutil.copy(ROOT / toolchain, bare / toolchain)
    no_programs = "import os; os.access = lambda *_, **__: False"
    words = build_in_place(bare, no_programs, QLORA_KERNELS_CUDA="1")
    assert "nvcc was found neither" in words and "nvidia-cuda-nvcc" in words
    assert "may be 0, 1 or auto" in build_in_place(bare, QLORA_KERNELS_CUDA="yes")


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
@pytest.mark.parametrize(
    "gpu, nvcc, wish, fetched",
    [
        (False, False, None, False),
        (True, False, None, True),
        (True, True, None, False),
        (True, False, "0", False),
        (False, False, "1", True),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="CUDA is Linux only")
def test_setup_fetches_a_cuda_compiler_where_a_gpu_lacks_one(
    tmp_path: Path, gpu: bool, nvcc: bool, wish: str | None, fetched: bool
) -> None:
    """scripts/setup_venv.sh with a Python that only writes down what it is asked."""
    log, venv, tools = tmp_path / "log", tmp_path / "venv", tmp_path / "tools"
    (venv / "bin").mkdir(parents=True)
    tools.mkdir()
    pinned = dict(
        line.split("==")
        for line in (ROOT / "requirements" / "constraints.txt").read_text().splitlines()
        if "==" in line
    )["torch"]
    programs = {
        venv / "bin" / "python": f'[ "$1" = -c ] && echo {pinned} || echo "$@" >> {log}',
        tools / "nvidia-smi": f"exit {int(not gpu)}",
    }
    if nvcc:
        programs[tools / "nvcc"] = "exit 0"
    for path, body in programs.items():
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)
    env = {"PATH": f"{tools}:/usr/bin:/bin", "CUDA_HOME": str(tmp_path / "none")}
    if wish is not None:
        env["QLORA_KERNELS_CUDA"] = wish
    command = ["bash", str(ROOT / "scripts" / "setup_venv.sh"), str(venv), "demo"]
    subprocess.run(command, env=env, check=True, capture_output=True)
    asked = log.read_text()
    assert "-r requirements/demo.txt" in asked
    assert ("--no-deps nvidia-cuda-nvcc==" in asked) == fetched
    assert "triton" not in asked


def test_without_a_gpu_no_compiler_is_looked_for() -> None:
    """What `make demo` relies on: neither a GPU nor a CUDA torch, so nothing is fetched."""
    code = """
import sys
import setuptools
setuptools.setup = lambda **_: None
import setup
setup.find_nvcc = lambda: sys.exit("looked for nvcc")
print(setup.cuda_wanted())
"""
    if shutil.which("nvidia-smi") is not None:
        pytest.skip("there may be a GPU")
    assert run(sys.executable, "-c", code, QLORA_KERNELS_CUDA="auto").stdout.strip() == "None"


# --- whole builds --------------------------------------------------------------------------------


def copy_sources(to: Path) -> Path:
    to.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, to)
    skip = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("csrc", "qlora_kernels"):
        shutil.copytree(ROOT / name, to / name, ignore=skip)
    return to


def compiled(output: str) -> set[str]:
    """Source files that a build compiled, by ninja's lines."""
    return {Path(p).name for p in re.findall(r"Building CXX object (\S+)\.o\b", output)}


PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built without isolation, at the optimisation that compiles quickest."""
    folder = tmp_path_factory.mktemp("wheel")
    sources = copy_sources(folder / "src")
    stale = sources / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    (stale / "qlora_kernels").mkdir(parents=True)
    (stale / "qlora_kernels" / "deleted_since.py").write_text("raise ImportError\n")
    run(*PIP, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, sources, **QUICK)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """The Python of a new virtual environment that sees this one's packages."""
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(run(python, "-c", code).stdout.strip())
    # After the environment's own packages; the finder of an editable install is not taken along.
    # An older Python's venv has an older setuptools; the newer one is to be found.
    run(python, "-m", "pip", "uninstall", "--yes", "--quiet", "setuptools")
    (site / "outer.pth").write_text(str(Path(torch.__file__).parent.parent) + "\n")
    return python


SMOKE = """
import sys, torch, qlora_kernels
from qlora_kernels import _host, cpu, ops, functional as F4
assert ops.LIBRARY_ERROR is None, ops.LIBRARY_ERROR
assert cpu.isa() == cpu.available_isas()[-1]
packed, state = F4.quantize_4bit(torch.randn(8, 64), quant_type="nf4")
F4.linear_4bit(torch.randn(3, 64), packed, state)
print(qlora_kernels.__file__, torch.__file__, sep="\\n")
"""


@pytest.mark.full
def test_wheel_contents(wheel: Path) -> None:
    tag = sys.implementation.cache_tag.replace("cpython-", "cp")
    # As a whole for one Python: pybind11 has no limited API. _ops alone is for all.
    assert re.fullmatch(rf"qlora_kernels-[\d.]+-{tag}-{tag}-\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(n for n in names if n.endswith("METADATA"))).decode()
    package = {n.removeprefix("qlora_kernels/") for n in names if n.startswith("qlora_kernels/")}
    assert {"_ops.abi3.so", f"_host{sysconfig.get_config_var('EXT_SUFFIX')}"} <= package
    assert {"py.typed", "__init__.py", "emulator/__init__.py"} <= package
    assert "deleted_since.py" not in package, "a stale build/lib reached the wheel"
    on_disk = {
        str(p.relative_to(ROOT / "qlora_kernels")) for p in ROOT.glob("qlora_kernels/**/*.py")
    }
    assert {n for n in package if n.endswith(".py")} == on_disk
    assert {n.split("/")[0] for n in names} == {
        "qlora_kernels",
        f"qlora_kernels-{qlora_kernels.__version__}.dist-info",
    }
    assert "Requires-Dist: torch>=2.10" in metadata
    assert any(n.endswith("licenses/LICENSE") for n in names)


@pytest.mark.full
def test_wheel_installs_beside_the_torch_that_is_there(
    wheel: Path, environment: Path, tmp_path: Path
) -> None:
    report = tmp_path / "report.json"
    run(
        *(environment, "-m", "pip", "--disable-pip-version-check", "install"),
        *("--report", report, wheel),
    )
    installed = {i["metadata"]["name"] for i in json.loads(report.read_text())["install"]}
    assert installed == {"qlora-kernels"}, "its dependencies were there"
    ours, theirs = run(environment, "-c", SMOKE, cwd=tmp_path).stdout.splitlines()[-2:]
    assert Path(ours).is_relative_to(environment.parent.parent)
    assert theirs == torch.__file__
    assert (environment.parent / "qlora").is_file()


@pytest.mark.full
@pytest.mark.parametrize("isolation", [True, False], ids=["isolated", "not isolated"])
def test_install_and_editable_install(environment: Path, tmp_path: Path, isolation: bool) -> None:
    """``pip install .``, then ``-e .`` in one checkout: the second reuses the first's objects."""
    sources = copy_sources(tmp_path / "src")
    command = [environment, "-m", "pip", "-v", "--disable-pip-version-check", "install"]
    command += [] if isolation else ["--no-build-isolation"]
    first = run(*command, sources, **QUICK).stdout
    assert compiled(first) >= {"torch_ops.cpp", "dispatch.cpp", "host_module.cpp"}
    ours, _ = run(environment, "-c", SMOKE, cwd=tmp_path).stdout.splitlines()[-2:]
    assert not Path(ours).is_relative_to(sources)

    second = run(*command, "--editable", sources, **QUICK).stdout
    # An isolated build brings pybind11 at another path, and so its module is compiled again.
    assert compiled(second) <= ({"host_module.cpp", "dispatch.cpp"} if isolation else set())
    assert "Successfully installed qlora-kernels" in second
    for output in (first, second):
        assert not re.search(r"(Downloading|Collecting|Using cached) torch\b", output)
    ours, _ = run(environment, "-c", SMOKE, cwd=tmp_path).stdout.splitlines()[-2:]
    assert Path(ours).is_relative_to(sources)


@pytest.mark.full
def test_stale_build_folders_do_not_break_a_build(tmp_path: Path) -> None:
    def build(sources: Path, **environment: str) -> str:
        command = (sys.executable, "setup.py", "-q", "build_ext", "--inplace")
        output = run(*command, cwd=sources, **QUICK, **environment).stdout
        library = sources / "qlora_kernels" / "_ops.abi3.so"
        run(sys.executable, "-c", SMOKE, cwd=sources, QLORA_KERNELS_OPS=str(library))
        return output

    sources = copy_sources(tmp_path / "first")
    everything = compiled(build(sources))
    assert len(everything) > 5
    assert compiled(build(sources)) == set(), "a second build reuses the first"

    # One source changed: that one is compiled, for each instruction set.
    touched = sources / "csrc" / "cpu" / "quantize.cpp"
    touched.write_text(touched.read_text() + "\n// changed\n")
    assert compiled(build(sources)) == {"quantize.cpp"}

    # A cache that CMake cannot read, as a full disk or a kill leaves it.
    cache = sources / "build" / f"native-{SOABI}" / "CMakeCache.txt"
    cache.write_text("CMAKE_GENERATOR:INTERNAL=Unix Makefiles\n")
    assert compiled(build(sources)) == everything

    # Tools of an isolated build that is gone.
    cache.write_text(re.sub(r"(?m)^(pybind11_DIR:\w+=).*", r"\1/gone", cache.read_text()))
    record = cache.with_name("made_with.json")
    made_with = json.loads(record.read_text())
    made_with["tools"]["ninja"] = "/gone/ninja"
    record.write_text(json.dumps(made_with))
    assert compiled(build(sources)) == set(), "another ninja is no reason to compile"

    # A torch at another path.
    link = tmp_path / "torch"
    link.symlink_to(Path(torch.__file__).parent)
    assert "torch_ops.cpp" in compiled(build(sources, QLORA_KERNELS_TORCH=str(link)))

    # The checkout moved, its build folder with it.
    moved = tmp_path / "second"
    sources.rename(moved)
    assert compiled(build(moved)) == everything
