"""The GEMM launchers, for test_gemm.py and benchmarks/cuda_gemm.py."""

from __future__ import annotations

import ctypes
import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from qlora_kernels.emulator import toolchain

from .launchers import (
    FORWARD,
    INPUT_GRAD,
    OPTIONS,
    SOURCES,
    Caller,
    LinearProblem,
    Plan,
    Quantized,
    Run,
)

GEMM = 2  # Route::gemm


@functools.cache
def library(*sources: str) -> Path:
    """A library of these sources of csrc/cuda, the runtime left to the emulator."""
    objects = [toolchain.compile_object(SOURCES / s, ["sm_80"], OPTIONS) for s in sources]
    folder = Path(tempfile.mkdtemp(prefix="qlk-gemm-"))
    return toolchain.link_library(objects, folder / "gemm.so")


class Launcher(Caller):
    """Calls the GEMM launchers with a tile and a number of splits."""

    def plan(
        self, pass_: int, q: Quantized, m: int, b: Tensor | None, given: bool, tile: Sequence[int],
        splits: int,
    ) -> Plan:  # fmt: skip
        rank = 0 if b is None else b.shape[1]
        room = workspace_bytes(pass_, m, *q.shape, rank, given, splits)
        return Plan(GEMM, *tile, splits, 0, room)

    def linear(
        self, q: Quantized, x: Tensor, tile: Sequence[int], splits: int = 1, **options: Any
    ) -> Run:
        """Options are ``run_linear``'s."""
        given = options.get("s") is not None
        plan = self.plan(FORWARD, q, x.shape[0], options.get("b"), given, tile, splits)
        return self.run_linear(q, x, plan, **options)

    def input_grad(
        self, q: Quantized, dy: Tensor, tile: Sequence[int], splits: int = 1, **options: Any
    ) -> Run:
        """Options are ``run_input_grad``'s."""
        plan = self.plan(INPUT_GRAD, q, dy.shape[0], options.get("b"), False, tile, splits)
        return self.run_input_grad(q, dy, plan, **options)

    def launch(self, problem: ctypes.Structure, plan: Plan, stream: int | None) -> int:
        kind = type(problem).__name__
        forward = isinstance(problem, LinearProblem)
        name = "launch_gemm_linear" if forward else "launch_gemm_input_grad"
        mangled = (
            f"_ZN3qlk4cuda{len(name)}{name}ERKNS0_{len(kind)}{kind}ERKNS0_4PlanEP11CUstream_st"
        )
        return getattr(self.rt.lib, mangled)(
            ctypes.byref(problem), ctypes.byref(plan), ctypes.c_void_p(stream)
        )


def _round_up(x: int, to: int) -> int:
    return -(-x // to) * to


def workspace_bytes(pass_: int, m: int, n: int, k: int, rank: int, given: bool, splits: int) -> int:
    """gemm_tiles.h's arithmetic, once more: the bytes beyond are out of bounds to the checker."""
    out, contraction = (n, k) if pass_ == FORWARD else (k, n)
    total = _round_up(splits * m * out * 4, 256) if splits > 1 else 0
    if rank and not given:
        total += _round_up(-(-contraction // 256) * m * rank * 4, 256)
    if rank:
        total += _round_up(m * _round_up(rank, 64) * 2, 256)
    return total
