"""The table of tiles: every branch, and every tile within the devices' limits, by the assembler."""

from __future__ import annotations

import importlib
import itertools
import json
import re
from pathlib import Path

import pytest
import torch

from qlora_kernels.emulator.devices import DEVICES, get_device, occupancy
from qlora_kernels.triton import configs, input_grad, linear
from qlora_kernels.triton.configs import INPUT_GRAD, LINEAR, Config, Tile

from .test_linear import BF16, F16, F32, Gpu, TritonCase, names

ROWS = {
    (8, 0): "a100",
    (8, 6): "a6000",
    (9, 0): "h100",
    (12, 0): "rtx5090",
}  # of the table that NVIDIA's devices take
SHAPE = (4096, 4096)


def choose(capability, op, m, dtype=BF16, shape=SHAPE, **more):  # type: ignore[no-untyped-def]
    return configs.choose(capability, op, m, *shape, dtype, **more)


@pytest.mark.parametrize("row", configs._TABLE, ids=str)
@pytest.mark.parametrize("op", [LINEAR, INPUT_GRAD])
def test_every_branch(row, op) -> None:
    """Each tile from its first number of rows to its last, and nothing beyond the last one."""
    first = 1
    for most, tile in configs._TABLE[row][op]:
        assert first <= most
        assert choose(row, op, first).tile == choose(row, op, most).tile == tile
        first = most + 1
    assert choose(row, op, first) is None


@pytest.mark.parametrize(
    "capability, row",
    [((8, 0), (8, 0)), ((8, 6), (8, 6)), ((8, 9), (8, 6)), ((9, 0), (9, 0)), ((10, 0), (9, 0)),
     ((12, 0), (8, 6)), ((12, 1), (8, 6)), ((0, 0), (0, 0))],
)  # fmt: skip
def test_a_device_takes_the_nearest_row_below(capability, row) -> None:
    for op, m in itertools.product((LINEAR, INPUT_GRAD), (1, 16, 64)):
        assert choose(capability, op, m) == choose(row, op, m)


def test_what_has_no_tile() -> None:
    assert choose((7, 5), LINEAR, 4) is None  # before mma of bf16 and cp.async
    assert choose((8, 0), LINEAR, 0) is None
    assert choose((8, 0), LINEAR, 4, F32) is None
    assert choose((8, 0), LINEAR, 4, chunk=None) is None
    assert choose((8, 0), INPUT_GRAD, 16, F16) and choose((8, 0), INPUT_GRAD, 17, F16) is None


@pytest.mark.parametrize(
    "n, k, blocksize, chunk",
    [(8, 128, 64, 64), (8, 128, 4096, 64), (8, 96, 64, 32), (8, 128, 32, 32), (8, 128, 16, None),
     (8, 100, 64, None)],
)  # fmt: skip
def test_a_chunk_shares_a_scale_wherever_it_starts(n, k, blocksize, chunk) -> None:
    assert configs.chunk_of(n, k, blocksize) == chunk


def tiles_of(row: tuple[int, int]) -> set[tuple[str, Tile]]:
    return {(op, tile) for op, taken in configs._TABLE[row].items() for _, tile in taken}


def all_tiles() -> set[tuple[str, Tile]]:
    found = set().union(*map(tiles_of, configs._TABLE))
    by_op = configs.CANDIDATES.items()
    return found | {(op, tile) for op, by in by_op for tiles in by.values() for tile in tiles}


@pytest.mark.parametrize("sms", [16, 108, 170])
def test_splits_are_never_empty(sms) -> None:
    shapes = [(8, 64), (75, 320), (4096, 4096), (1024, 8192), (28672, 8192), (152064, 5120)]
    for (op, tile), (n, k), m in itertools.product(all_tiles(), shapes, (1, 16, 100)):
        splits = configs.splits_of(op, tile, m, n, k, sms)
        steps = configs.steps_of(op, tile, n, k, 64)
        assert 1 <= splits <= configs.MOST_SPLITS
        assert splits == 1 or steps // splits >= configs.MIN_STEPS


def test_splits_fill_the_device() -> None:
    """No part where there are programs enough; as many as it holds where there are few."""
    tile = Tile(4, 16, 64, 4, 3, 4)
    assert configs.splits_of(LINEAR, tile, 16, 64 * 108 * 8, 8192, 108) == 1
    few = configs.splits_of(LINEAR, tile, 16, 64 * 27, 8192, 108)  # of the 432 that it holds
    assert 0.5 < 27 * few / 432 <= 1


def cases() -> list:
    """A tile and a device: those that a device takes, and what autotuning may choose."""
    found = {}
    for row, device in ROWS.items():
        for op, taken in configs._TABLE[row].items():
            for _, tile in taken:
                found[op, tile, device] = device != "a100"
    for op, by in configs.CANDIDATES.items():
        for tile, device in itertools.product(itertools.chain(*by.values()), ("a100", "rtx5090")):
            found.setdefault((op, tile, device), True)
    return [
        pytest.param(*case, id=f"{case[2]}-{case[0]}-{','.join(map(str, case[1]))}",
                     marks=pytest.mark.full if full else [])
        for case, full in found.items()
    ]  # fmt: skip


@pytest.mark.parametrize("op, tile, device", cases())
def test_a_tile_fits_and_spills_nothing(make_triton_gpu, op, tile, device) -> None:
    """With LoRA, nested scales, a bias and splits: the most that it ever does."""
    gpu = make_triton_gpu(device, checks=(), blocks=[0])
    case = TritonCase(tile.bm, 64, 1024, 8, True)
    weight = Gpu().weight(case.packed, case.state)
    config = Config(tile, 2)
    s = torch.zeros(1, tile.bm, 8)
    if op == LINEAR:
        linear.product(case.x, weight, 64, config, BF16, case.bias, s, case.b, 1.0)
    else:
        input_grad.product(case.dy, weight, 1024, config, BF16, s, case.a)
    launch = next(x for x in gpu.launches if x.name == op)
    assert launch.spilled == 0
    assert launch.metadata.num_warps == tile.warps and launch.metadata.num_stages == tile.stages
    assert held(device, tile, launch) >= 1


def held(device, tile, launch) -> int:  # type: ignore[no-untyped-def]
    """Programs that a multiprocessor holds."""
    shared = launch.metadata.shared
    return occupancy(device, 32 * tile.warps, launch.registers, shared).blocks


@pytest.mark.full
@pytest.mark.parametrize(
    "device, op, tile",
    [(ROWS[row], op, tile) for row in list(ROWS)[:3] for op, tile in sorted(tiles_of(row))],
    ids=str,
)
def test_as_many_are_resident_as_the_table_says(make_triton_gpu, device, op, tile) -> None:
    """On a row's first device, without LoRA; elsewhere, and with it, one or two fewer."""
    gpu = make_triton_gpu(device, checks=(), blocks=[0])
    case = TritonCase(tile.bm, 64, 1024)
    weight = Gpu().weight(case.packed, case.state)
    if op == LINEAR:
        linear.product(case.x, weight, 64, Config(tile, 2), BF16)
    else:
        input_grad.product(case.dy, weight, 1024, Config(tile, 2), BF16)
    assert held(device, tile, gpu.launches[0]) == tile.resident


def test_every_device_here_has_a_row() -> None:
    for device in DEVICES.values():
        taken = choose(device.capability, LINEAR, 1, sms=device.sms)
        assert (taken is None) == (device.capability < (8, 0))


@pytest.mark.parametrize(
    "op, m", [(LINEAR, 5), pytest.param(INPUT_GRAD, 5, marks=pytest.mark.full)]
)
def test_autotuning_is_a_switch(make_triton_gpu, monkeypatch, op, m) -> None:
    """Every candidate is run, the cheapest kept for the shape, and the result is as ever."""
    gpu = make_triton_gpu("a100")
    case = TritonCase(m, 40, 1024, 8)
    check = case.check_forward if op == LINEAR else case.check_backward
    monkeypatch.setenv("QLORA_KERNELS_TRITON_AUTOTUNE", "1")
    check(Gpu())
    tried = {x.metadata.hash for x in gpu.launches if x.name == op}
    assert len(tried) == len(configs.candidates(op, m)) > 1
    before = len(names(gpu))
    check(Gpu())
    assert names(gpu)[before:].count(op) == 1
    monkeypatch.delenv("QLORA_KERNELS_TRITON_AUTOTUNE")
    check(Gpu())
    assert not configs.autotuning()


def test_candidates_hold_what_the_table_takes() -> None:
    """What a device takes is among what autotuning tries for those rows."""
    for row in set(configs._TABLE) - {(0, 0)}:
        for op, taken in configs._TABLE[row].items():
            for most, tile in taken:
                tried = [t[:-1] for t in configs.candidates(op, most)]
                assert tile[:-1] in tried, (row, op, most)


@pytest.fixture
def triton_rank(monkeypatch):  # type: ignore[no-untyped-def]
    """The benchmark that the table is from."""
    (named,) = set(re.findall(r"benchmarks/(\w+)\.py", Path(configs.__file__).read_text()))
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module(named)


def test_the_ranking_of_a_small_layer(triton_rank, monkeypatch) -> None:
    """Sorted, with the dense way among them; what it says of a tile is the tile's."""
    monkeypatch.setitem(configs.CANDIDATES[LINEAR], 2, configs.CANDIDATES[LINEAR][2][:1])
    n, k = 256, 2048
    device = get_device("a100")
    found = triton_rank.ranking(device, LINEAR, 1, triton_rank.weight_of(n, k), n, k)
    assert [c.us for c in found] == sorted(c.us for c in found)
    dense = [c for c in found if not c.tile]
    assert len(dense) == 1 and dense[0].us == pytest.approx(triton_rank.large(device, 1, n, k).us)
    for c in found:
        if c.tile:
            assert c.tile == tuple(configs.CANDIDATES[LINEAR][2][0])
            assert c.spilled == 0 and 0 < c.registers < 256
            assert c.sass > c.alu > 16 / 2  # half a PRMT a weight at the least
            assert c.us == pytest.approx(sum(c.parts))
            assert len(c.parts) == (1 if c.splits == 1 else 2)


def test_the_results_are_the_tables(triton_rank) -> None:
    """The JSON's choices are those that the table makes now."""
    results = Path(triton_rank.__file__).parent / "results" / "triton_rank.json"
    cases = json.loads(results.read_text())["cases"]
    assert {c["device"] for c in cases} == {"a100", "h100", "rtx4090"}
    for c in cases:
        device = get_device(c["device"])
        op = LINEAR if c["pass"] == "forward" else INPUT_GRAD
        now = choose(device.capability, op, c["m"], shape=(c["n"], c["k"]), sms=device.sms)
        assert now is not None, c
        assert [*now.tile, now.splits] == [*c["chosen"]["tile"], c["chosen"]["splits"]], c
        assert c["regret"] <= 1.25, c
