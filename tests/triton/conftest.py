"""The GPU of these tests: Triton's own launches, run from its PTX in the emulator.

``triton_gpu`` is an `EmulatedTriton` of each device; kernels are called on CPU tensors. The quick
run has a device with mma.sync and one with wgmma, the full one sm_89 and sm_120 too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
pytest.importorskip("qlora_kernels.emulator.engine").library()

from qlora_kernels.emulator.triton_driver import EmulatedTriton  # noqa: E402

DEVICES = [
    "a100",
    "h100",
    pytest.param("rtx4090", marks=pytest.mark.full),
    pytest.param("rtx5090", marks=pytest.mark.full),
]


@pytest.fixture
def make_triton_gpu() -> Iterator[Callable[..., EmulatedTriton]]:
    """``make_triton_gpu("a100", orders=4, ...)``: Triton's GPU until the test's end."""
    made: list[EmulatedTriton] = []

    def make(device: str = "a100", **options: Any) -> EmulatedTriton:
        while made:
            made.pop().__exit__(None, None, None)
        made.append(EmulatedTriton(device, **options).__enter__())
        return made[0]

    yield make
    for gpu in made:
        gpu.__exit__(None, None, None)


@pytest.fixture(params=DEVICES)
def triton_gpu(
    request: pytest.FixtureRequest, make_triton_gpu: Callable[..., EmulatedTriton]
) -> EmulatedTriton:
    return make_triton_gpu(request.param)
