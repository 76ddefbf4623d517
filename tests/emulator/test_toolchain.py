"""The compiler tools: found wherever they are, cached, their refusals in words."""

from __future__ import annotations

import shutil
import textwrap
from pathlib import Path

import pytest

from qlora_kernels.emulator import toolchain
from qlora_kernels.emulator.toolchain import CompileError, ToolchainError, ToolNotFound

MISSING = toolchain.available()
needs_tools = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))

SAXPY = textwrap.dedent(
    """
    __global__ void saxpy(const float* x, float* y, float a, int n) {
      int i = blockIdx.x * blockDim.x + threadIdx.x;
      if (i < n) y[i] = a * x[i] + y[i];
    }
    __global__ void staged(float* x) {
      __shared__ float s[300];
      s[threadIdx.x] = x[threadIdx.x];
      __syncthreads();
      x[threadIdx.x] = s[299 - threadIdx.x];
    }
    extern "C" int launch(const float* x, float* y, float a, int n) {
      saxpy<<<(n + 127) / 128, 128>>>(x, y, a, n);
      return cudaGetLastError();
    }
    """
)


@pytest.fixture
def fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PTX_EMULATOR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@needs_tools
def test_all_four_tools_are_found_and_tell_their_version():
    for name in ("nvcc", "ptxas", "cuobjdump", "nvdisasm"):
        assert toolchain.find_tool(name).name == name
        assert len(toolchain.tool_version(name).split(".")) == 3
    with pytest.raises(ValueError, match="nvcc, ptxas"):
        toolchain.find_tool("nvprof")


@pytest.mark.parametrize(
    ("tool", "package"),
    [
        ("nvcc", "nvidia-cuda-nvcc"),
        ("ptxas", "nvidia-cuda-nvcc"),
        ("cuobjdump", "nvidia-cuda-cuobjdump"),
        ("nvdisasm", "nvidia-cuda-nvdisasm"),
    ],
)
def test_a_tool_that_is_nowhere_names_its_package(monkeypatch, tool, package):
    monkeypatch.setattr(toolchain, "_search_path", list)
    with pytest.raises(ToolNotFound, match=f"pip install {package}"):
        toolchain.find_tool(tool)
    assert package in toolchain.available(tool)


def test_tools_are_looked_for_in_cuda_home_then_wheels_then_path(tmp_path, monkeypatch):
    def fake(folder: Path) -> Path:
        folder.mkdir(parents=True)
        tool = folder / "cuobjdump"
        tool.write_text("#!/bin/sh\n")
        tool.chmod(0o755)
        return tool

    home = fake(tmp_path / "home" / "bin")
    wheel = fake(tmp_path / "site" / "nvidia" / "cu13" / "bin")
    path = fake(tmp_path / "path")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setattr(toolchain, "_wheel_roots", lambda: [tmp_path / "site" / "nvidia" / "cu13"])
    for expected in (home, wheel, path):
        assert toolchain.find_tool("cuobjdump") == expected
        expected.unlink()


@pytest.mark.parametrize(("part", "wheel"), toolchain._NVCC_PARTS)
def test_an_nvcc_without_its_other_wheels_names_the_missing_one(tmp_path, monkeypatch, part, wheel):
    root = tmp_path / "nvidia" / "cu13"
    for needed, _ in toolchain._NVCC_PARTS:
        (root / needed).parent.mkdir(parents=True, exist_ok=True)
        if needed != part:
            (root / needed).write_text("")
    (root / "bin").mkdir()
    (root / "bin" / "nvcc.profile").write_text("")
    nvcc = root / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    monkeypatch.setattr(toolchain, "_search_path", lambda: [root / "bin"])
    with pytest.raises(ToolNotFound, match=f"pip install {wheel}`"):
        toolchain.find_tool("nvcc")


@needs_tools
def test_targets_in_any_spelling_and_unknown_ones_refused():
    for spelling in ("sm_80", "compute_80", "80", 80, " SM_80 "):
        assert toolchain.normalize_target(spelling) == "sm_80"
    assert toolchain.normalize_target("sm_90a") == "sm_90a"
    for unknown in ("sm_70", "sm_999", "h100", "", "sm_80b"):
        with pytest.raises(ToolchainError, match="it knows sm_75, sm_80"):
            toolchain.compile_ptx(SAXPY, unknown)


@needs_tools
def test_ptx_has_the_kernels_the_target_and_source_lines(fresh_cache):
    ptx = toolchain.compile_ptx(SAXPY, "sm_89", name="saxpy.cu")
    assert ".target sm_89" in ptx.text
    assert ".visible .entry _Z5saxpyPKfPffi(" in ptx.text
    assert f'.file\t1 "{ptx.source}"' in ptx.text
    assert ptx.source.read_text() == SAXPY
    line = SAXPY.splitlines().index("  if (i < n) y[i] = a * x[i] + y[i];") + 1
    assert f".loc\t1 {line} " in ptx.text
    assert ".loc" not in toolchain.compile_ptx(SAXPY, "sm_89", lineinfo=False).text


@needs_tools
def test_a_second_compile_comes_from_the_cache_until_anything_changes(
    fresh_cache, tmp_path, monkeypatch
):
    runs = []
    real = toolchain._run
    monkeypatch.setattr(toolchain, "_run", lambda c, w: runs.append(w) or real(c, w))
    header, source = tmp_path / "factor.h", tmp_path / "k.cu"
    header.write_text("#define FACTOR 5.0f\n")
    source.write_text('#include "factor.h"\n__global__ void k(float* x) { *x *= FACTOR; }\n')

    first = toolchain.compile_ptx(source)
    assert len(runs) == 1 and "0f40A00000" in first.text
    assert toolchain.compile_ptx(source).text == first.text
    assert len(runs) == 1
    header.write_text("#define FACTOR 3.0f\n")  # a header's change counts
    assert "0f40400000" in toolchain.compile_ptx(source).text
    assert len(runs) == 2
    toolchain.compile_ptx(source, options=["-use_fast_math"])
    toolchain.compile_ptx(source, "sm_90")
    assert len(runs) == 4
    header.write_text("#define FACTOR 5.0f\n")
    toolchain.compile_ptx(source)
    assert len(runs) == 5


@needs_tools
def test_source_that_does_not_compile_is_refused_with_the_compilers_words(tmp_path):
    with pytest.raises(CompileError, match='identifier "missing" is undefined') as caught:
        toolchain.compile_ptx("__global__ void k() { missing(); }")
    assert caught.value.command[0].endswith("nvcc")
    with pytest.raises(ToolchainError, match="no such CUDA source: .*absent.cu"):
        toolchain.compile_ptx(tmp_path / "absent.cu")
    with pytest.raises(CompileError, match="ptxas for sm_80 failed"):
        toolchain.assemble(".version 8.0\n.target sm_80\n.address_size 64\n.entry k() { bogus; }")
    with pytest.raises(ToolchainError, match="no .target"):
        toolchain.assemble("nothing")


@needs_tools
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_120"])
def test_resource_usage_is_what_the_kernel_declares_on_every_target(target):
    used = toolchain.compile_cubin(SAXPY, target).resources
    assert set(used) == {"_Z5saxpyPKfPffi", "_Z6stagedPf"}
    # From sm_90 on the compiler's figure includes 1,024 bytes of the system's: not here.
    assert used["_Z6stagedPf"].shared == 1200
    assert used["_Z5saxpyPKfPffi"].shared == 0
    assert used["_Z6stagedPf"].barriers == 1
    assert all(
        4 <= u.registers <= 32 and u.spill_stores == u.spill_loads == 0 for u in used.values()
    )


@needs_tools
def test_spills_are_seen():
    body = "\n".join(f"  float v{i} = x[{i} * n];" for i in range(64))
    total = " + ".join(f"v{i} * v{63 - i}" for i in range(64))
    source = "__global__ void k(float* x, int n) {\n"
    source += f"{body}\n  __syncthreads();\n  x[0] = {total};\n}}\n"
    tight = toolchain.compile_cubin(source, options=["-maxrregcount", "24"]).resources["_Z1kPfi"]
    roomy = toolchain.compile_cubin(source).resources["_Z1kPfi"]
    assert tight.registers <= 24 < roomy.registers
    assert tight.spill_stores > 0 and tight.spill_loads > 0 and roomy.spill_stores == 0


@needs_tools
def test_ptx_and_cubins_come_out_of_a_library_again():
    library = toolchain.compile_library(SAXPY, ["sm_90", "sm_80"])
    (ptx,) = toolchain.extract_ptx(library)
    assert ptx.target == "sm_80" and ".entry _Z5saxpyPKfPffi" in ptx.text
    cubins = {c.target: c for c in toolchain.extract_cubins(library) if b"saxpy" in c.data}
    assert set(cubins) == {"sm_80", "sm_90"}


@needs_tools
def test_the_same_objects_linked_static_and_shared_carry_the_same_device_code(tmp_path):
    built = toolchain.compile_object(SAXPY, ["sm_80", "sm_90"])
    shared = toolchain.link_library([built], tmp_path / "shared.so", cudart="shared")
    static = toolchain.link_library([built], tmp_path / "static.so", cudart="static")
    assert shared.read_bytes() != static.read_bytes()
    assert toolchain.device_code_digest(shared) == toolchain.device_code_digest(static)
    other = toolchain.compile_library(SAXPY.replace("299", "298"), ["sm_80", "sm_90"])
    assert toolchain.device_code_digest(other) != toolchain.device_code_digest(shared)
    with pytest.raises(ValueError, match="'shared' or 'static'"):
        toolchain.link_library([built], tmp_path / "none.so", cudart="none")


@needs_tools
def test_files_that_are_missing_or_hold_no_device_code(tmp_path):
    with pytest.raises(ToolchainError, match="no such library"):
        toolchain.extract_ptx(tmp_path / "absent.so")
    with pytest.raises(ToolchainError, match="no such cubin"):
        toolchain.resource_usage(tmp_path / "absent.cubin")
    plain = tmp_path / "plain.so"
    shutil.copyfile(shutil.which("true"), plain)
    assert toolchain.extract_ptx(plain) == toolchain.extract_cubins(plain) == []


@needs_tools
def test_an_entry_written_by_two_at_once_is_whole(fresh_cache):
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(4) as pool:
        texts = set(pool.map(lambda _: toolchain.compile_ptx(SAXPY).text, range(4)))
    assert len(texts) == 1
    assert not list(fresh_cache.rglob(".new-*"))
