"""A pytest fixture: kernels as functions that are checked whenever they run.

In ``conftest.py``: ``pytest_plugins = ["qlora_kernels.emulator.testing"]``. See docs/emulator.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from . import toolchain
from .engine import library
from .errors import EmulatorError
from .launch import Module, Result, emulate, emulate_orders

__all__ = ["Emulator", "emulator"]


class Emulator:
    """What the fixture gives. ``device`` and ``checks`` hold for all that it runs."""

    def __init__(self, device: str = "h100", checks: Any = True) -> None:
        self.device, self.checks = device, checks
        self.results: list[Result] = []

    def cuda(
        self, source: str | Path, kernel: str | None = None, target: str | int = "sm_80"
    ) -> EmulatedKernel:
        """A kernel of CUDA C++ source (text or path). Skips the test where there is no nvcc."""
        missing = toolchain.available("nvcc")
        if missing:
            pytest.skip(missing)
        return EmulatedKernel(self, Module.from_cuda(source, target).kernel(kernel))

    def ptx(self, text: str | Path, kernel: str | None = None) -> EmulatedKernel:
        return EmulatedKernel(self, Module.from_ptx(text).kernel(kernel))

    def library(self, path: str | Path, kernel: str) -> EmulatedKernel:
        return EmulatedKernel(self, Module.from_library(path, self.device).kernel(kernel))

    def triton(
        self,
        function: Any,
        signature: Mapping[str, str],
        constants: Mapping[str, Any] | None = None,
        target: str | int = 80,
        aligned: Iterable[str] | None = None,
        **options: Any,
    ) -> EmulatedKernel:
        """A ``@triton.jit`` function; see `Module.from_triton`. Skips the test without Triton."""
        pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
        return EmulatedKernel(
            self,
            Module.from_triton(function, signature, constants, target, aligned, **options).kernel(),
        )


class EmulatedKernel:
    """``kernel[grid, block](*args)`` or ``kernel[grid, block, shared_bytes](*args)`` runs it,
    checked,
    and returns the `Result`; whatever the checkers find fails the test."""

    def __init__(self, owner: Emulator, kernel: Any) -> None:
        self.owner, self.kernel = owner, kernel

    def __getitem__(self, launch: Any) -> Any:
        if not isinstance(launch, tuple):
            launch = (launch,)
        grid, block, shared = (*launch, None, None)[:3]

        def run(*args: Any, **options: Any) -> Result:
            result = emulate(
                self.kernel,
                grid,
                block,
                args,
                shared_bytes=shared,
                **{"device": self.owner.device, "checks": self.owner.checks, **options},
            )
            self.owner.results.append(result)
            return result

        return run

    def orders(
        self, grid: Any, block: Any, args: Sequence[Any], orders: int = 20, **options: Any
    ) -> None:
        """Runs it in many orders of warps and blocks; fails if results differ."""
        emulate_orders(
            self.kernel,
            grid,
            block,
            args,
            orders=orders,
            **{"device": self.owner.device, "checks": self.owner.checks, **options},
        )


@pytest.fixture
def emulator() -> Emulator:
    """An `Emulator` of an H100; the test is skipped where the engine was not built."""
    try:
        library()
    except EmulatorError as e:
        pytest.skip(str(e))
    return Emulator()
