"""Counts derived by hand equal the emulator's."""

from __future__ import annotations

import numpy as np
import pytest
from ptx_kernels import kernel_text

from qlora_kernels.emulator import Counts, Module, emulate

pytest.importorskip("qlora_kernels.emulator.engine").library()

REGS = ".reg .b64 %rd<16>; .reg .b32 %r<32>; .reg .pred %p<8>;\n"


def kernel(body: str, n: int = 2) -> Module:
    return Module.from_ptx(
        kernel_text(REGS + body + "\nret;", ", ".join(f".param .u64 p{k}" for k in range(n)))
    )


def copy(stride: int, offset: int, width: int, n: int = 4096) -> Counts:
    """Each of 1024 threads reads ``width`` bytes at (thread * stride + offset) * width of x,
    writes y in order."""
    t = {4: ("b32", "%r4"), 8: ("v2.b32", "{%r4, %r5}"), 16: ("v4.b32", "{%r4, %r5, %r6, %r7}")}[
        width
    ]
    body = f"""ld.param.u64 %rd1, [p0]; ld.param.u64 %rd2, [p1]; mov.u32 %r1, %tid.x;
    mov.u32 %r2, %ctaid.x; mad.lo.u32 %r1, %r2, 256, %r1;
    mul.lo.u32 %r3, %r1, {stride}; add.u32 %r3, %r3, {offset};
    mad.wide.u32 %rd3, %r3, {width}, %rd1; ld.global.{t[0]} {t[1]}, [%rd3];
    mad.wide.u32 %rd4, %r1, {width}, %rd2; st.global.{t[0]} [%rd4], {t[1]};"""
    x = np.zeros(1024 * stride * width + offset * width, np.uint8)
    y = np.zeros(1024 * width, np.uint8)
    return emulate(kernel(body), 4, 256, [x, y]).counts


@pytest.mark.parametrize("width", [4, 8, 16])
def test_coalesced_copy(width: int) -> None:
    c = copy(1, 0, width)
    assert (
        c.sum("sectors", "ld.global") == c.sum("sectors_ideal", "ld.global") == 1024 * width // 32
    )
    assert c.sum("sectors", "st") == 1024 * width // 32
    assert c.sum("requests", "ld.global") == 32 and c.sum("bytes", "ld.global") == 1024 * width
    x, y = c.regions
    assert (x["distinct_read"], x["distinct_written"]) == (1024 * width // 32, 0)
    assert (y["distinct_read"], y["distinct_written"]) == (0, 1024 * width // 32)


@pytest.mark.parametrize("stride,sectors", [(2, 256), (3, 384), (8, 1024), (32, 1024)])
def test_strided_copy(stride: int, sectors: int) -> None:
    """4-byte reads: a warp touches 32 * 4 * stride bytes, at most a sector a lane."""
    c = copy(stride, 0, 4)
    assert c.sum("sectors", "ld.global") == sectors
    assert c.sum("sectors_ideal", "ld.global") == 128


def test_shifted_copy() -> None:
    """One element off: each warp needs a fifth sector, half of which its neighbour needs as
    well."""
    c = copy(1, 1, 4)
    assert c.sum("sectors", "ld.global") == 32 * 5
    assert c.regions[0]["distinct_read"] == 129


def test_broadcast() -> None:
    c = emulate(
        kernel("ld.param.u64 %rd1, [p0]; ld.global.u32 %r1, [%rd1];", 1),
        1,
        64,
        [np.zeros(8, np.uint32)],
    ).counts
    assert c.sum("sectors", "ld.global") == c.sum("sectors_ideal", "ld.global") == 2
    assert c.total["distinct_read"] == 1


@pytest.mark.parametrize("pitch,wavefronts", [(32, 32), (33, 1), (34, 2), (36, 4), (40, 8)])
def test_transpose_through_shared_memory(pitch: int, wavefronts: int) -> None:
    """A 32 x 32 tile written by rows, read by columns: column reads hit 32 / gcd(pitch, 32)
    banks."""
    body = f""".shared .align 4 .b8 s[{32 * pitch * 4}];
    ld.param.u64 %rd1, [p0]; ld.param.u64 %rd2, [p1]; mov.u32 %r1, %tid.x; mov.u32 %r2, %tid.y;
    mad.lo.u32 %r3, %r2, 32, %r1;
    mul.wide.u32 %rd3, %r3, 4; add.s64 %rd4, %rd1, %rd3; add.s64 %rd5, %rd2, %rd3;
    ld.global.u32 %r4, [%rd4]; mov.u32 %r5, s;
    mad.lo.u32 %r6, %r2, {pitch}, %r1; mad.lo.u32 %r6, %r6, 4, %r5; st.shared.u32 [%r6], %r4;
    bar.sync 0;
    mad.lo.u32 %r6, %r1, {pitch}, %r2; mad.lo.u32 %r6, %r6, 4, %r5; ld.shared.u32 %r4, [%r6];
    st.global.u32 [%rd5], %r4;"""
    x = np.arange(1024, dtype=np.uint32).reshape(32, 32)
    y = np.zeros_like(x)
    c = emulate(kernel(body), 1, (32, 32), [x, y]).counts
    assert np.array_equal(y, x.T)
    assert c.sum("wavefronts", "st.shared") == c.sum("wavefronts_ideal", "st.shared") == 32
    assert c.sum("wavefronts", "ld.shared") == 32 * wavefronts
    assert c.sum("wavefronts_ideal", "ld.shared") == 32
    assert c.total["barriers"] == 1


@pytest.mark.parametrize("width,ideal", [(4, 1), (8, 2), (16, 4)])
def test_wide_shared_accesses(width: int, ideal: int) -> None:
    t = {4: ("b32", "%r4"), 8: ("v2.b32", "{%r4, %r5}"), 16: ("v4.b32", "{%r4, %r5, %r6, %r7}")}[
        width
    ]
    zero = "mov.u32 %r4, 0; mov.u32 %r5, 0; mov.u32 %r6, 0; mov.u32 %r7, 0;"
    body = (
        f".shared .align 16 .b8 s[4096]; mov.u32 %r1, %tid.x; mov.u32 %r2, s; mad.lo.u32 %r3, "
        f"%r1, STRIDE, %r2; {zero} st.shared.{t[0]} [%r3], {t[1]};"
    )
    straight = emulate(
        kernel(body.replace("STRIDE", str(width)), 1), 1, 32, [np.zeros(1, np.uint32)]
    ).counts
    assert (
        straight.sum("wavefronts", "st.shared")
        == straight.sum("wavefronts_ideal", "st.shared")
        == ideal
    )
    spread = emulate(
        kernel(body.replace("STRIDE", "128"), 1), 1, 32, [np.zeros(1, np.uint32)]
    ).counts
    assert spread.sum("wavefronts", "st.shared") == 32  # every lane in the same banks


def test_executions_and_divergence() -> None:
    body = """mov.u32 %r1, %tid.x; mov.u32 %r2, 0;
    L: add.u32 %r2, %r2, 1;
    setp.lt.u32 %p1, %r2, %r1;
    @%p1 bra L;
    @%p1 add.u32 %r2, %r2, 1;"""
    c = emulate(kernel(body, 1), 3, 40, [np.zeros(1, np.uint32)]).counts
    rows = {r.text: k for k, r in enumerate(c.kernel.instructions)}
    add = c.instructions[rows["L: add.u32 %r2, %r2, 1;"]]
    # A warp's trips are its largest thread number's (at least one), a thread's are its own.
    assert add["warps"] == 3 * (31 + 39) and add["threads"] == 3 * sum(max(1, t) for t in range(40))
    branch = c.instructions[rows["@%p1 bra L;"]]
    assert branch["taken"] == 3 * sum(max(1, t) - 1 for t in range(40))
    assert c.instructions[rows["@%p1 add.u32 %r2, %r2, 1;"]]["threads"] == 0
    assert c.total["blocks"] == 3 and c.total["threads_launched"] == 120
    assert (
        c.by_ptx_line()[c.kernel.instructions[rows["L: add.u32 %r2, %r2, 1;"]].ptx_line] == 3 * 70
    )


def test_counts_do_not_depend_on_the_order() -> None:
    seeds = []
    for seed in range(3):
        x, y = np.zeros(4096, np.uint8), np.zeros(4096, np.uint8)
        body = (
            "ld.param.u64 %rd1, [p0]; mov.u32 %r1, %tid.x; mad.wide.u32 %rd2, %r1, 4, %rd1; "
            "ld.global.u32 %r2, [%rd2]; bar.sync 0;"
        )
        seeds.append(emulate(kernel(body), 5, 96, [x, y], seed=seed, quantum=1 + seed).counts.total)
    assert seeds[0] == seeds[1] == seeds[2]
