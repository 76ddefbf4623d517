"""Kernels with one bug each: found, on the right line. Their corrected twins: silent."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from qlora_kernels.emulator import KernelError, Module, emulate, toolchain, uninitialized

SOURCE = Path(__file__).parent / "kernels" / "bugs.cu"
missing = toolchain.available("nvcc")
pytestmark = pytest.mark.skipif(missing is not None, reason=str(missing))
pytest.importorskip("qlora_kernels.emulator.engine").library()


def planted() -> dict[str, tuple[str, int]]:
    """Kernel: (kind of report, line)."""
    out, kernel = {}, ""
    for number, text in enumerate(SOURCE.read_text().splitlines(), 1):
        if match := re.match(r"KERNEL (\w+)\(", text):
            kernel = match.group(1)
        if (match := re.search(r"// FOUND: (.*)", text)) and kernel:
            out[kernel] = (match.group(1), number)
    return out


BUGS = planted()
ALL = re.findall(r"^KERNEL (\w+)\(", SOURCE.read_text(), re.M)


@pytest.fixture(scope="module")
def module() -> Module:
    return Module.from_cuda(SOURCE, "sm_80")


def run(module: Module, name: str, seed: int = 0):
    rng = np.random.default_rng(0)
    n = 1000
    x, y = (rng.standard_normal(n).astype(np.float32) for _ in range(2))
    if "flag" in name:
        x[-1] = 0
    if "constant" in name:
        x.flags.writeable = False
    block = {"ldmatrix_row": 32}.get(name.split("_", 1)[1], 256)
    grid = 1 if "shared" in name or ("barrier" in name and "flag" not in name) else 4
    if name.endswith("early_exit"):
        grid = 4
    single = (
        "no_barrier",
        "no_second_barrier",
        "reduction_step",
        "bytes",
        "warp_exchange",
        "same_slot",
        "plain_count",
        "copy_without_wait",
        "copy_without_barrier",
        "copy_overwritten",
        "waits_for_too_few",
        "ldmatrix_row",
        "shuffle_in_branch",
        "full_mask_in_branch",
        "ballot_mask",
        "half_at_barrier",
        "dynamic_too_small",
        "barrier_in_branch",
        "named_barrier",
        "accumulator",
    )
    if name.split("_", 1)[1] in single:
        grid = 1
    args = [x, uninitialized(y) if "output_read" in name else y, n]
    return emulate(
        module.kernel(name),
        grid,
        block,
        args,
        device="a100",
        shared_bytes=512 if "dynamic" in name else 0,
        seed=seed,
        budget=3_000_000,
        registers=32,
    )


def test_there_are_many() -> None:
    assert len(BUGS) >= 40
    assert len({kind for kind, _ in BUGS.values()}) >= 17
    twins = {n[3:] for n in ALL if n.startswith("ok_")}
    assert {n[4:] for n in BUGS} - twins <= {"trap", "flag_without_barrier"}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", BUGS)
def test_found(module: Module, name: str, seed: int) -> None:
    kind, line = BUGS[name]
    with pytest.raises(KernelError) as caught:
        run(module, name, seed)
    reports = caught.value.result.reports
    match = [r for r in reports if r.kind == kind]
    assert match, f"{kind} expected, found: {caught.value.result}"
    lines = {r.line for r in match} | {r.other_loc.outermost.line for r in match if r.other_loc}
    assert line in lines, f"line {line} expected:\n{caught.value.result}"
    first = match[0]
    assert name in first.kernel and first.loc.outermost.file.endswith("bugs.cu")
    assert module.text.splitlines()[first.ptx_line - 1].strip() == first.ptx_text


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", [n for n in ALL if n.startswith("ok_")])
def test_silent(module: Module, name: str, seed: int) -> None:
    assert run(module, name, seed).reports == []


def test_a_report_names_argument_index_and_thread(module: Module) -> None:
    with pytest.raises(KernelError) as caught:
        run(module, "bug_write_past_end")
    (report,) = caught.value.result.reports
    assert report.argument == "argument 1" and report.index == 1000 and report.space == "global"
    assert report.block == (3, 0, 0) and report.thread == (1000 - 3 * 256, 0, 0)
    assert (
        "argument 1[1000], 0 bytes after the end of argument 1 of shape (1000,) (4000 bytes)"
        in str(report)
    )
