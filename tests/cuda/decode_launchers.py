"""The decode launchers, for test_decode.py and benchmarks/cuda_decode.py."""

from __future__ import annotations

import ctypes
import functools
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from qlora_kernels.emulator import toolchain

from .launchers import (
    DTYPES,
    FORWARD,
    INPUT_GRAD,
    OPTIONS,
    SOURCES,
    Caller,
    LinearProblem,
    Plan,
    Quantized,
    Run,
    Shape,
)

TENSOR_CORES = ("decode_linear_mma", "decode_input_grad_mma", "decode_lora_mma")  # from sm_80 on
SIMPLE = ("decode_launch", "decode_lora", "decode_any", "decode_linear_simt")
SIMT, MMA = 0, 1  # Route
#: dispatch.h's plan is a constexpr function: a door to it.
DOOR = """
#include "{folder}/decode_tiles.h"
#include "{folder}/launchers.h"
using namespace qlk::cuda;
extern "C" void decode_plan_of(int route, const Shape* shape, int sms, Plan* plan) {{
  *plan = decode_plan(static_cast<Route>(route), *shape, sms);
}}
extern "C" int decode_linear(const LinearProblem* p, const Plan* plan, cudaStream_t stream) {{
  return launch_decode_linear(*p, *plan, stream);
}}
extern "C" int decode_input_grad(const InputGradProblem* p, const Plan* plan,
                                 cudaStream_t stream) {{
  return launch_decode_input_grad(*p, *plan, stream);
}}
"""


@functools.cache
def library(target: str = "sm_80", options: tuple[str, ...] = ()) -> Path:
    """All decode kernels in one library, those that Turing has too for ``target``."""
    wanted = [(SOURCES / f"{name}.cu", "sm_80") for name in TENSOR_CORES]
    wanted += [(SOURCES / f"{name}.cu", target) for name in SIMPLE]
    wanted += [(DOOR.format(folder=SOURCES), "sm_80")]

    def compiled(source: tuple) -> Path:
        return toolchain.compile_object(source[0], [source[1]], (*OPTIONS, *options))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, wanted))
    folder = Path(tempfile.mkdtemp(prefix="qlk-decode-"))
    return toolchain.link_library(objects, folder / "decode.so")


class Launcher(Caller):
    """Calls the decode launchers with the plans of `decode_plan`."""

    def plan(
        self, pass_: int, route: int, q: Quantized, x: Tensor, b: Tensor | None, given: bool,
        sms: int | None,
    ) -> Plan:  # fmt: skip
        """``sms``: of a device with so many; the runtime's own if None."""
        rank = 0 if b is None else b.shape[1]
        shape = Shape(
            pass_, x.shape[0], *q.shape, rank, given, DTYPES[x.dtype], q.block_log2, q.kind
        )
        plan = Plan()
        self.rt.lib.decode_plan_of(
            route, ctypes.byref(shape), sms or self.rt.device.sms, ctypes.byref(plan)
        )
        return plan

    def linear(
        self, q: Quantized, x: Tensor, route: int = MMA, *, sms: int | None = None, **options: Any
    ) -> Run:
        """Options are ``run_linear``'s."""
        given = options.get("s") is not None
        plan = self.plan(FORWARD, route, q, x, options.get("b"), given, sms)
        return self.run_linear(q, x, plan, **options)

    def input_grad(
        self, q: Quantized, dy: Tensor, route: int = MMA, *, sms: int | None = None, **options: Any
    ) -> Run:
        """Options are ``run_input_grad``'s."""
        plan = self.plan(INPUT_GRAD, route, q, dy, options.get("b"), False, sms)
        return self.run_input_grad(q, dy, plan, **options)

    def launch(self, problem: ctypes.Structure, plan: Plan, stream: int | None) -> int:
        forward = isinstance(problem, LinearProblem)
        name = "decode_linear" if forward else "decode_input_grad"
        status = getattr(self.rt.lib, name)(
            ctypes.byref(problem), ctypes.byref(plan), ctypes.c_void_p(stream)
        )
        self.plan_used = plan
        if status != 0:
            raise RuntimeError(f"{name}: cudaError {status}")
        return status
