"""The GPU of these tests: a real one where there is one, else the emulator under the launchers.

Without a GPU an op goes the whole way that it goes with one: schema, binding, dispatch, launcher,
``<<<>>>``, and the PTX out of the library that ships (`docs/emulator_runtime.md`), every checker
on. Only torch's allocator and stream are stood in for (`csrc/cuda/call_emulated.h`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_kernels import functional, ops
from qlora_kernels.emulator.runtime import EmulatedRuntime

from ..conftest import EMULATED

REAL = torch.cuda.is_available() and ops.CUDA_LIBRARY_ERROR is None


class Gpu:
    """What a test asks of a GPU. ``runtime`` and ``lib`` are the emulator's, None on a real one."""

    def __init__(self, runtime: EmulatedRuntime | None) -> None:
        self.runtime = runtime
        self.device = torch.device("cpu" if runtime else "cuda")
        self.ops: Any = getattr(torch.ops, EMULATED if runtime else ops.NAMESPACE)
        self.lib: Any = runtime.lib if runtime else ctypes.CDLL(str(ops.cuda_library_path()))

    def __call__(self, *tensors: Tensor | None) -> Any:
        """The tensors on the device; one alone is not in a tuple."""
        moved = tuple(None if t is None else t.to(self.device) for t in tensors)
        return moved[0] if len(moved) == 1 else moved

    def weight(self, packed: Tensor, state: functional.QuantState) -> tuple:
        """The run of arguments ``packed ... nested_offset``, on the device."""
        args = (packed.reshape(-1), *state.weight_args())
        return tuple(a.to(self.device) if isinstance(a, Tensor) else a for a in args)

    @property
    def kernels(self) -> list[str]:
        """Names of the kernels launched so far; empty on a real GPU, which does not tell."""
        return [launch.name for launch in self.runtime.launches] if self.runtime else []


def fresh(gpu: Gpu) -> Gpu:
    """All routes on and the usual cap: the library is one for the whole process, and remembers what
    a test before has set."""
    for index in (0, 1):
        gpu.lib.qlk_cuda_disable(index, 0)
    gpu.lib.qlk_cuda_workspace_cap(ctypes.c_int64(0))
    return gpu


@pytest.fixture
def make_gpu(request: pytest.FixtureRequest) -> Iterator[Callable[..., Gpu]]:
    """``make_gpu("a100", order="deferred", ...)``: a GPU; the arguments are the emulator's."""
    made: list[EmulatedRuntime] = []

    def make(device: str = "h100", **options: Any) -> Gpu:
        if REAL:
            return fresh(Gpu(None))
        library = request.getfixturevalue("emulated_library")
        while made:
            made.pop().__exit__(None, None, None)
        runtime = EmulatedRuntime(device, library, **options).__enter__()
        made.append(runtime)
        return fresh(Gpu(runtime))

    yield make
    for runtime in made:
        runtime.__exit__(None, None, None)


@pytest.fixture
def gpu(make_gpu: Callable[..., Gpu]) -> Gpu:
    return make_gpu()
