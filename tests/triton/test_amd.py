"""Kernels for GPUs that nothing here executes: they compile, and what can be read off is right.

gfx942 (MI300, warps of 64) and gfx1100 (RX 7900, warps of 32), and sm_100, whose matrix products
Triton makes of tcgen05. Each module of the package lists what to compile in its ``AOT``.
"""

from __future__ import annotations

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


MATRIX = {"gfx942": "v_mfma_", "gfx1100": "v_wmma_", "sm_100": r"tcgen05\.mma|mma\.sync"}


@pytest.mark.parametrize("target, name", CASES)
def test_it_compiles(target, name) -> None:
    """Without scratch memory on gfx942; products are made of matrix instructions everywhere."""
    asm = compiled(target, name).asm
    text = asm["ptx" if target == "sm_100" else "amdgcn"]
    if target == "gfx942":
        fields = dict(re.findall(r"\.(\w+(?:_count|_size)):\s+(\d+)", text))
        assert fields["private_segment_fixed_size"] == "0", "scratch memory"
        assert fields["vgpr_spill_count"] == fields["sgpr_spill_count"] == "0"
    if "tt.dot" in asm["ttir"]:
        assert re.search(MATRIX[target], text)
    # A product in any other layout is fused multiply-adds of single lanes.
    for line in asm["ttgir"].splitlines():
        if " tt.dot " in line:
            assert line.count("parent = #mma") == 2, line
