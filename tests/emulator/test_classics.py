"""Reductions, scans, transposes and grids that meet, as everybody writes them: right and silent in
any order of warps and blocks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qlora_kernels.emulator import (
    LaunchError,
    Module,
    emulate,
    emulate_orders,
    toolchain,
    uninitialized,
)

SOURCE = Path(__file__).parent / "kernels" / "classics.cu"
missing = toolchain.available("nvcc")
pytestmark = pytest.mark.skipif(missing is not None, reason=str(missing))
pytest.importorskip("qlora_kernels.emulator.engine").library()
TARGETS = {"sm_80": "a100", "sm_89": "rtx4090"}
ORDERS = {"orders": 6, "checks": True}


@pytest.fixture(scope="module", params=TARGETS)
def module(request) -> Module:
    built = Module.from_cuda(SOURCE, request.param)
    built.device = TARGETS[request.param]
    return built


def test_a_sum_by_the_last_block(module: Module) -> None:
    x = np.random.default_rng(0).integers(-9, 10, 5000).astype(np.float32)
    out, arrived = np.zeros(1, np.float32), np.zeros(1, np.uint32)
    args = [x, uninitialized(np.zeros(7, np.float32)), out, arrived, len(x)]
    emulate_orders(module.kernel("sum_last_block"), 7, 128, args, device=module.device, **ORDERS)
    assert out[0] == x.sum() and arrived[0] == 7


def test_a_scan_in_shared_memory(module: Module) -> None:
    x = np.random.default_rng(0).integers(-99, 99, (3, 256)).astype(np.int32)
    y = np.zeros_like(x)
    emulate_orders(module.kernel("scan_block"), 3, 256, [x, uninitialized(y)],
                   device=module.device, shared_bytes=1024, **ORDERS)  # fmt: skip
    assert (y == x.cumsum(1)).all()


def test_a_scan_that_looks_back(module: Module) -> None:
    x = np.random.default_rng(0).integers(-99, 99, 12 * 128).astype(np.int32)
    y, state = np.zeros_like(x), np.zeros(12, np.uint64)
    for seed in range(6):
        y[:], state[:] = 0, 0
        emulate(module.kernel("scan_look_back"), 12, 128,
                [x, uninitialized(y), np.zeros(1, np.uint32), state],
                device=module.device, seed=seed, quantum=1 + seed)  # fmt: skip
        assert (y == x.cumsum()).all()


def test_a_transpose(module: Module) -> None:
    x = np.random.default_rng(0).standard_normal((50, 70)).astype(np.float32)
    y = np.zeros((70, 50), np.float32)
    emulate_orders(module.kernel("transpose"), (3, 2), (32, 8), [x, uninitialized(y), 50, 70],
                   device=module.device, **ORDERS)  # fmt: skip
    assert (y == x.T).all()


def test_a_grid_that_meets(module: Module) -> None:
    """cooperative_groups' grid.sync(), as the toolkit's own headers have it."""
    x = np.random.default_rng(0).standard_normal(512).astype(np.float32)
    want, args = x.copy(), [x, np.zeros_like(x), 512, 4]
    emulate_orders(
        module.kernel("ring"), 4, 128, args, device=module.device, cooperative=True, **ORDERS
    )
    for _ in range(4):
        want = np.float32(0.5) * (np.roll(want, -1) + np.roll(want, 1))
    assert np.array_equal(args[0], want)


def test_a_grid_that_would_meet_must_be_launched_so(module: Module) -> None:
    x = np.zeros(512, np.float32)
    with pytest.raises(LaunchError, match="cooperative=True"):
        emulate(module.kernel("ring"), 4, 128, [x, x.copy(), 512, 4], device=module.device)


def test_shared_memory_that_is_read_to_no_effect(module: Module) -> None:
    x, y = np.ones((4, 32), np.float32), np.zeros((4, 32), np.float32)
    kernel = module.kernel("reads_too_much")
    emulate(kernel, 1, 128, [x, y, 3], device=module.device)
    assert y.sum() == 3 * 32 * 2


def test_a_lock_reset_by_its_last_holder(module: Module) -> None:
    lock, total = np.zeros(1, np.int32), np.zeros(64, np.int32)
    emulate_orders(module.kernel("locked"), 5, 64, [lock, total], device=module.device, **ORDERS)
    assert lock[0] == 0 and (total == 10).all()
