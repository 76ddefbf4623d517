"""The libraries that ship: the same device code in both, within the compiler budgets."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from qlora_kernels.emulator import toolchain
from qlora_kernels.emulator.runtime import demangle

ROOT = Path(__file__).resolve().parents[2]

# Registers a thread that a kernel may have: 64 let 1024 threads reside on a multiprocessor, which
# memory-bound kernels need; the matmuls trade threads for registers (gemm_tiles.h, decode_tiles.h).
BUDGETS = {"quantize": 64, "dequantize": 40, "sum_groups": 40}
MOST = 255


@pytest.fixture(scope="module")
def libraries(native_variant) -> tuple[Path, Path]:
    emulated = native_variant("cuda")
    return emulated.with_name("_ops_cuda.abi3.so"), emulated


def test_what_is_tested_is_what_ships(libraries) -> None:
    shipped, emulated = libraries
    assert toolchain.device_code_digest(shipped) == toolchain.device_code_digest(emulated)


def test_code_for_the_built_architectures_and_ptx_of_the_lowest(libraries) -> None:
    shipped, _ = libraries
    assert {c.target for c in toolchain.extract_ptx(shipped)} <= {"sm_80", "sm_75"}
    assert "sm_80" in {c.target for c in toolchain.extract_cubins(shipped)}


def test_compiler_budgets(libraries) -> None:
    """No stack, so no spill and no local memory; registers as the plans assume."""
    shipped, _ = libraries
    seen = 0
    for code in toolchain.extract_cubins(shipped):
        file = ROOT / "build" / "budget.cubin"
        file.write_bytes(code.data)
        for name, use in toolchain.resource_usage(file).items():
            kernel = demangle(name)
            short = re.split(r"[<(]", kernel.split("(anonymous namespace)::")[-1])[0]
            assert use.stack == 0 and use.local == 0, f"{kernel} on {code.target} spills"
            assert use.registers <= BUDGETS.get(short, MOST), f"{kernel} on {code.target}"
            seen += 1
        file.unlink()
    assert seen >= 24


@pytest.mark.skipif(shutil.which("readelf") is None, reason="no readelf")
def test_shipped_library_brings_its_runtime_and_names_torchs(libraries) -> None:
    def needed(path: Path) -> set[str]:
        out = subprocess.run(["readelf", "-d", path], capture_output=True, text=True, check=True)
        return set(re.findall(r"\(NEEDED\).*\[(.*)\]", out.stdout))

    shipped, emulated = libraries
    assert "libtorch_cuda.so" in needed(shipped), "or its symbols would not be looked for there"
    assert not [n for n in needed(shipped) if "cudart" in n]
    assert "libcudart.so.13" in needed(emulated)


def test_kernels_have_no_branch_on_the_architecture() -> None:
    """The emulator runs compute_80's PTX: no other architecture may have code of its own."""
    for path in (ROOT / "csrc" / "cuda").glob("*"):
        assert "__CUDA_ARCH__" not in path.read_text(), path
