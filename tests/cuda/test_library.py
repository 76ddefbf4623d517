"""The libraries that ship: the same device code in both, within the compiler budgets."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from qlora_kernels import cuda
from qlora_kernels.emulator import toolchain
from qlora_kernels.emulator.devices import DEVICES, Device, get_device, occupancy
from qlora_kernels.emulator.runtime import demangle

ROOT = Path(__file__).resolve().parents[2]
EVERY = "75 80 86 89 90 100 120"

# Kernels bound by memory, of which 1024 threads reside on a multiprocessor (64 registers each); the
# matmuls trade threads for registers (gemm_tiles.h, decode_tiles.h).
BY_MEMORY = ("quantize", "quantize_absmax", "dequantize", "dequantize_unaligned", "sum_groups")


@dataclass
class Compiled:
    """One kernel for one target: what the compiler used, and what its source promised."""

    name: str  # without namespaces and parameters
    use: toolchain.Resources
    threads: int  # __launch_bounds__
    blocks: int  # ... and how many a multiprocessor

    @property
    def family(self) -> str:
        return self.name.partition("<")[0].removeprefix("void ")

    @property
    def tile(self) -> tuple[int, ...]:
        """Of a GEMM's template arguments m, n, k and the stages."""
        _, *numbers = (int(n) for n in re.findall(r", (\d+)(?=[,>])", self.name))
        return (*numbers[:3], numbers[-1])


@pytest.fixture(scope="module", params=["", pytest.param(EVERY, marks=pytest.mark.full)],
                ids=["built", "every"])  # fmt: skip
def architectures(request) -> str:
    """Those of the quick build; in the full run every one that there is."""
    return request.param or os.environ.get("QLORA_KERNELS_CUDA_ARCHITECTURES", "80")


@pytest.fixture(scope="module")
def libraries(native_variant, architectures) -> tuple[Path, Path]:
    emulated = native_variant("cuda", architectures)
    return emulated.with_name("_ops_cuda.abi3.so"), emulated


def short_name(mangled: str) -> str:
    name = re.sub(
        r"qlk::cuda::|\(anonymous namespace\)::|\(qlk::ScaleKind\)", "", demangle(mangled)
    )
    return name.partition("(")[0]


@pytest.fixture(scope="module")
def compiled(libraries, tmp_path_factory) -> dict[str, list[Compiled]]:
    """By target, every kernel of the library that ships."""
    shipped, _ = libraries
    bounds: dict[str, tuple[int, int]] = {}
    for code in toolchain.extract_ptx(shipped):
        for entry in re.finditer(r"\.entry\s+(\w+)\s*\([^)]*\)([^{]*)\{", code.text):
            threads = re.search(r"\.maxntid\s+(\d+)", entry[2])
            blocks = re.search(r"\.minnctapersm\s+(\d+)", entry[2])
            bounds[entry[1]] = (
                int(threads[1]) if threads else 1024, int(blocks[1]) if blocks else 1
            )  # fmt: skip
    found: dict[str, list[Compiled]] = {}
    file = tmp_path_factory.mktemp("budget") / "budget.cubin"
    for code in toolchain.extract_cubins(shipped):
        file.write_bytes(code.data)
        for name, use in toolchain.resource_usage(file).items():
            kernel = Compiled(short_name(name), use, *bounds[name])
            found.setdefault(code.target, []).append(kernel)
    return found


def devices_of(target: str) -> list[Device]:
    return [d for d in map(get_device, DEVICES) if d.target == target]


def test_what_is_tested_is_what_ships(libraries) -> None:
    shipped, emulated = libraries
    assert toolchain.device_code_digest(shipped) == toolchain.device_code_digest(emulated)


def test_code_for_the_built_architectures_and_ptx_of_the_lowest(libraries, architectures) -> None:
    shipped, _ = libraries
    wanted = {f"sm_{a}" for a in architectures.split()}
    assert {c.target for c in toolchain.extract_cubins(shipped)} == wanted
    assert {c.target for c in toolchain.extract_ptx(shipped)} == {"sm_80"} | (wanted & {"sm_75"})


def test_compiler_budgets(compiled) -> None:
    """No stack, so no spill and no local memory; as many blocks reside as the source promised."""
    for target, kernels in compiled.items():
        assert len(kernels) >= 24
        for k in kernels:
            where = f"{k.name} on {target}"
            assert k.use.stack == 0 and k.use.local == 0, f"{where} spills"
            for device in devices_of(target):
                resident = occupancy(device, k.threads, k.use.registers, k.use.shared).blocks
                wanted = -(-1024 // k.threads) if k.family in BY_MEMORY else k.blocks
                assert resident >= wanted, f"{where}: {resident} blocks on {device}"


# Shapes that reach every tile: aligned and not, few rows and many.
OFFERED = [
    (m, n, k, backward, rank)
    for m, (n, k), backward, rank in itertools.product(
        (1, 3, 4, 9, 15, 16, 33, 64, 96, 256), ((4096, 4096), (11008, 4128), (33, 100)),
        (False, True), (0, 256),
    )
]  # fmt: skip


def test_plans_are_compiled_and_fit(compiled) -> None:
    """What dispatch offers has its kernel, of as many threads, and a multiprocessor has the room:
    registers, and shared memory, the kernel's own and what the plan asks for."""
    for target, kernels in compiled.items():
        gemms: dict[tuple, list[Compiled]] = {}
        for k in kernels:
            if k.family in ("gemm_linear", "gemm_linear_pairs", "gemm_input_grad"):
                gemms.setdefault((k.family.removesuffix("_pairs"), k.tile), []).append(k)
        for device in devices_of(target):
            dtype = torch.bfloat16 if device.capability >= (8, 0) else torch.float16
            seen = set()
            for m, n, k, backward, rank in OFFERED:
                for plan in cuda.candidates(device, m, n, k, backward=backward, rank=rank,
                                            dtype=dtype):  # fmt: skip
                    seen.add((backward, plan))
            tried = 0
            for backward, plan in seen:
                if plan.route == "large":
                    continue
                name = "input_grad" if backward else "linear"
                if plan.route == "gemm":
                    tile = (plan.tile_m, plan.tile_n, plan.tile_k, plan.stages)
                    found = gemms[f"gemm_{name}", tile]
                    assert all(k.threads == plan.warps * 32 for k in found), plan
                else:  # instances by rows and dtype: the one that needs most counts
                    found = [k for k in kernels if k.family == f"decode_{name}"
                             and k.threads >= plan.warps * 32]  # fmt: skip
                for kernel in found:
                    shared = kernel.use.shared + plan.shared_bytes
                    fit = occupancy(device, plan.warps * 32, kernel.use.registers, shared)
                    assert fit.blocks >= 1, f"{plan} by {kernel.name} on {device}: {fit.limiter}"
                    tried += 1
            assert tried >= 4


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
