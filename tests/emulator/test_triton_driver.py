"""Triton's own launches, on the emulator: what the stand-in driver relies on, piece by piece."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
pytest.importorskip("qlora_kernels.emulator.engine").library()

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from qlora_kernels.emulator import KernelError  # noqa: E402
from qlora_kernels.emulator.triton_driver import EmulatedTriton  # noqa: E402

CAPABILITY = {"a100": 80, "rtx4090": 89, "h100": 90, "rtx5090": 120}


@triton.jit
def scale(x, out, n, factor, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n if MASKED else None
    tl.store(out + i, tl.load(x + i, mask=inside) * factor, mask=inside)


@triton.jit
def maybe_add(x, y, out, step, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    value = tl.load(x + i * step)
    if y is not None:
        value += tl.load(y + i)
    tl.store(out + i, value)


@triton.jit
def matmul(a, b, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    at = i[:, None] * BLOCK + i[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at)))


def run(grid, *args, **more) -> None:
    scale[grid](*args, enable_fp_fusion=True, **{"BLOCK": 256, "MASKED": True, **more})


@pytest.mark.parametrize("device", CAPABILITY)
def test_a_launch_goes_through_triton_for_each_target(device: str) -> None:
    x = torch.randn(1000)
    out = torch.zeros(1000)
    with EmulatedTriton(device, orders=3) as gpu:
        run((4,), x, out, 1000, 2.5)
    (launch,) = gpu.launches
    assert torch.equal(out, x * 2.5)
    assert launch.metadata.target.arch == CAPABILITY[device]
    assert (launch.name, launch.grid, launch.spilled) == ("scale", (4, 1, 1), 0)
    assert launch.registers > 0
    assert launch.result.counts.total["distinct_written"] == 125


def test_arguments_that_triton_compiles_in_are_not_passed() -> None:
    """An integer of 1 and None become constants of the kernel."""
    x, y = torch.randn(128), torch.randn(128)
    with EmulatedTriton() as gpu:
        for step, other in ((1, y), (2, None), (1, None), (2, y)):
            n = 128 // step
            out = torch.zeros(n)
            maybe_add[(1,)](x, other, out, step, BLOCK=n, enable_fp_fusion=True)
            assert torch.equal(out, x[::step] + (0 if other is None else other[:n]))
    assert len({launch.result.kernel.param_bytes for launch in gpu.launches}) > 1


def test_a_grid_may_be_a_function_and_may_be_empty() -> None:
    x, out = torch.randn(600), torch.zeros(600)
    with EmulatedTriton() as gpu:
        run(lambda meta: (triton.cdiv(600, meta["BLOCK"]),), x, out, 600, 1.0)
        run((0,), x, out, 600, 1.0)
    assert torch.equal(out, x)
    assert [launch.grid for launch in gpu.launches] == [(3, 1, 1)]


def test_what_a_checker_finds_is_raised_at_the_launch() -> None:
    x, out = torch.randn(250), torch.zeros(250)
    with EmulatedTriton(), pytest.raises(KernelError, match="argument|out of bounds"):
        run((1,), x, out, 250, 2.0, MASKED=False)


def test_a_kernel_beyond_the_devices_shared_memory_is_refused_by_triton() -> None:
    from triton.runtime.errors import OutOfResources

    a = torch.zeros(128, 128)
    with EmulatedTriton("rtx4090") as gpu, pytest.raises(OutOfResources, match="shared memory"):
        matmul[(1,)](a, a, torch.empty_like(a), BLOCK=128, num_warps=8, enable_fp_fusion=True)
    assert not gpu.launches


def test_devices_do_not_share_compilations_and_the_driver_is_put_back() -> None:
    from triton.runtime import driver

    before = driver._active
    x, out = torch.randn(256), torch.zeros(256)
    seen = []
    for device in ("a100", "h100", "a100"):
        with EmulatedTriton(device) as gpu:
            run((1,), x, out, 256, 3.0)
        seen.append(gpu.launches[0].metadata.target.arch)
    assert seen == [80, 90, 80]
    assert driver._active is before


def test_autotune_takes_the_candidate_of_fewest_instructions() -> None:
    tuned = triton.autotune(
        [triton.Config({"BLOCK": 256}, num_warps=w) for w in (8, 1)], key=["n"]
    )(scale)
    x, out = torch.randn(1024), torch.zeros(1024)
    with EmulatedTriton():
        tuned[lambda meta: (triton.cdiv(1024, meta["BLOCK"]),)](
            x, out, 1024, 2.0, MASKED=True, enable_fp_fusion=True
        )
    assert torch.equal(out, x * 2)
    assert tuned.best_config.num_warps == 1
