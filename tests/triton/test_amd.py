"""Kernels for GPUs that nothing here executes: they compile, and what can be read off is right.

gfx942 (MI300, warps of 64) and gfx1100 (RX 7900, warps of 32), and sm_100, whose matrix products
Triton makes of tcgen05. Each module of the package lists what to compile in its ``AOT``.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
import re
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from qlora_kernels import triton as package  # noqa: E402
from qlora_kernels.triton.blocks import GATHER  # noqa: E402

MODULES = [module.name for module in pkgutil.iter_modules(package.__path__)]
TARGETS = {
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx1100": GPUTarget("hip", "gfx1100", 32),
    "sm_100": GPUTarget("cuda", 100, 32),
}
QUICK = ("gfx942",)


def listed() -> dict[str, tuple]:
    """By a name, all that the modules list; a kernel's second entry has a number, and so on."""
    found: dict[str, tuple] = {}
    for name in MODULES:
        module = importlib.import_module(f"qlora_kernels.triton.{name}")
        for entry in getattr(module, "AOT", []):
            base = f"{name}.{entry[0].__name__}"
            same = sum(known.split("-")[0] == base for known in found)
            found[f"{base}-{same + 1}" if same else base] = entry
    return found


KERNELS = listed()
CASES = [
    (target, name) if target in QUICK else pytest.param(target, name, marks=pytest.mark.full)
    for target in TARGETS
    for name in KERNELS
]


@functools.cache
def compiled(target: str, name: str) -> Any:
    kernel, signature, constants, options = KERNELS[name]
    where = TARGETS[target]
    values = {k: getattr(v, "value", v) for k, v in constants.items()}
    if where.backend == "hip" and "WAY" in values:
        values["WAY"] = GATHER.value
    names = kernel.arg_names
    types = {n: signature.get(n, "constexpr") for n in names}
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n in names if "*" in types[n]}
    return triton.compile(ASTSource(kernel, types, values, aligned), where, options)


def test_every_function_is_compiled_here() -> None:
    """Listed as a kernel, or called by one that is."""
    from triton.runtime.jit import JITFunction

    found = {}
    for name in MODULES:
        module = importlib.import_module(f"qlora_kernels.triton.{name}")
        found.update({k: f for k, f in vars(module).items() if isinstance(f, JITFunction)})
    named = {entry[0].__name__ for entry in KERNELS.values()}
    for name in set(found) - named:
        called = re.compile(rf"\b{name}\(")
        callers = {k for k, f in found.items() if k != name and called.search(f.src)}
        assert callers, f"{name} is in no module's AOT, and nothing calls it"


@pytest.mark.parametrize("target, name", CASES)
def test_it_compiles_without_scratch_memory(target, name) -> None:
    text = compiled(target, name).asm["amdgcn" if "gfx" in target else "ptx"]
    if target == "gfx942":
        fields = dict(re.findall(r"\.(\w+(?:_count|_size)):\s+(\d+)", text))
        assert fields["private_segment_fixed_size"] == "0", "scratch memory"
        assert fields["vgpr_spill_count"] == fields["sgpr_spill_count"] == "0"
    elif target == "sm_100":
        assert ".target sm_100" in text


@pytest.mark.parametrize("target, name", CASES)
def test_products_are_made_of_matrix_instructions(target, name) -> None:
    done = compiled(target, name)
    if "tt.dot" not in done.asm["ttir"]:
        pytest.skip("no matrix product")
    if target == "gfx942":
        assert "v_mfma_" in done.asm["amdgcn"]
    elif target == "gfx1100":
        assert "v_wmma_" in done.asm["amdgcn"]
    else:
        assert "tcgen05.mma" in done.asm["ptx"]
