"""Control flow, memory, lanes, atomics, barriers, asynchronous copies, and what orders do to
results."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from ptx_kernels import kernel_text

from qlora_kernels.emulator import KernelError, Module, emulate, emulate_orders, uninitialized

pytest.importorskip("qlora_kernels.emulator.engine").library()

LANES = (
    ".reg .b64 %rd<16>; .reg .b32 %r<32>; .reg .f32 %f<16>; .reg .pred %p<16>; mov.u32 %r1, "
    "%tid.x;\n"
)
OUT = "ld.param.u64 %rd1, [p0]; mul.wide.u32 %rd2, %r1, 4; add.s64 %rd3, %rd1, %rd2;\n"


def module(body: str, n: int = 1, extra: str = "", more: str = "") -> Module:
    params = ", ".join([f".param .u64 p{k}" for k in range(n)] + ([more] if more else []))
    return Module.from_ptx(kernel_text(LANES + OUT + body + "\nret;", params, extra=extra))


def out(
    body: str, *args, threads: int = 32, grid: int = 1, extra: str = "", **options
) -> np.ndarray:
    y = np.zeros(threads * grid if grid > 1 else threads, np.uint32)
    emulate(module(body, 1 + len(args), extra), grid, threads, [y, *args], **options)
    return y


# -- control flow
# -----------------------------------------------------------------------------------


def test_nested_divergence_and_loops() -> None:
    y = out("""mov.u32 %r2, 0; mov.u32 %r3, 0;
    L1: setp.ge.u32 %p1, %r3, %r1; @%p1 bra L4;
        and.b32 %r4, %r3, 1; setp.eq.u32 %p2, %r4, 0; @%p2 bra L2;
        add.u32 %r2, %r2, 100; bra L3;
    L2: add.u32 %r2, %r2, 1;
    L3: add.u32 %r3, %r3, 1; bra L1;
    L4: st.global.u32 [%rd3], %r2;""")
    assert y.tolist() == [(t + 1) // 2 + t // 2 * 100 for t in range(32)]


def test_lanes_meet_again_after_a_loop() -> None:
    """Lanes leave a loop at different times; after it all take part in a vote at once."""
    y = out("""mov.u32 %r2, 0;
    L1: add.u32 %r2, %r2, 1; setp.lt.u32 %p1, %r2, %r1; @%p1 bra L1;
    activemask.b32 %r3; st.global.u32 [%rd3], %r3;""")
    assert (y == 0xFFFFFFFF).all()


def test_unstructured_flow() -> None:
    """Two entries into a loop, as goto makes them."""
    y = out("""mov.u32 %r2, 0; and.b32 %r3, %r1, 1; setp.eq.u32 %p1, %r3, 0; @%p1 bra B;
    A: add.u32 %r2, %r2, 1;
    B: add.u32 %r2, %r2, 16; setp.lt.u32 %p2, %r2, 40; @%p2 bra A;
    setp.gt.u32 %p3, %r2, 60; @%p3 bra B;
    st.global.u32 [%rd3], %r2;""")

    def run(t):
        r, at = 0, "A" if t & 1 else "B"
        while True:
            if at == "A":
                r += 1
            r += 16
            if r < 40:
                at = "A"
            elif r > 60:
                at = "B"
            else:
                return r

    assert y.tolist() == [run(t) for t in range(32)]


def test_switch_by_branch_table() -> None:
    y = out("""and.b32 %r2, %r1, 3; T: .branchtargets L0, L1, L2, L3; brx.idx %r2, T;
    L0: mov.u32 %r3, 10; bra E; L1: mov.u32 %r3, 11; bra E; L2: mov.u32 %r3, 12; bra E;
    L3: mov.u32 %r3, 13;
    E: st.global.u32 [%rd3], %r3;""")
    assert y.tolist() == [10 + t % 4 for t in range(32)]


def test_a_lane_may_wait_for_another_of_its_warp() -> None:
    """A spin lock taken by every lane in turn: forward progress of lanes that parted."""
    y, lock = np.zeros(1, np.uint32), np.zeros(1, np.uint32)
    body = """ld.param.u64 %rd5, [p1];
    TRY: atom.acquire.gpu.global.cas.b32 %r2, [%rd5], 0, 1; setp.ne.u32 %p1, %r2, 0; @%p1 bra TRY;
    ld.global.u32 %r3, [%rd1]; add.u32 %r3, %r3, 1; st.global.u32 [%rd1], %r3;
    atom.release.gpu.global.exch.b32 %r2, [%rd5], 0;"""
    emulate(module(body, 2), 3, 64, [y, lock])
    assert y[0] == 192


def test_predicated_exit_and_partial_warps() -> None:
    y = np.zeros(64, np.uint32)
    emulate(module("setp.ge.u32 %p1, %r1, 20; @%p1 ret; st.global.u32 [%rd3], 7;"), 1, 45, [y])
    assert y.tolist() == [7] * 20 + [0] * 44


def test_device_functions_are_called() -> None:
    extra = """.func (.param .b32 r0) twice (.param .b32 a0) { .reg .b32 %r<4>; .reg .pred %p<2>;
      ld.param.b32 %r1, [a0]; setp.gt.u32 %p1, %r1, 15; @%p1 bra BIG; add.u32 %r2, %r1, %r1;
      st.param.b32 [r0], %r2; ret;
      BIG: st.param.b32 [r0], 1000; ret; }
    .func (.param .b32 r0) both (.param .b32 a0, .param .b32 b0) { .reg .b32 %r<6>;
      ld.param.b32 %r1, [a0]; ld.param.b32 %r2, [b0];
      { .param .b32 x; .param .b32 y; st.param.b32 [x], %r1; call (y), twice, (x);
      ld.param.b32 %r3, [y]; }
      { .param .b32 x; .param .b32 y; st.param.b32 [x], %r2; call (y), twice, (x);
      ld.param.b32 %r4, [y]; }
      add.u32 %r5, %r3, %r4; st.param.b32 [r0], %r5; ret; }"""
    y = out(
        """add.u32 %r2, %r1, 3; { .param .b32 x; .param .b32 y; .param .b32 z;
        st.param.b32 [x], %r1; st.param.b32 [y], %r2;
    call (z), both, (x, y); ld.param.b32 %r4, [z]; } st.global.u32 [%rd3], %r4;""",
        extra=extra,
    )
    f = lambda x: 2 * x if x <= 15 else 1000  # noqa: E731
    assert y.tolist() == [f(t) + f(t + 3) for t in range(32)]


def test_special_registers() -> None:
    y = np.zeros((2 * 3 * 2, 4 * 4 * 2, 8), np.uint32)
    names = ["%tid.x", "%tid.y", "%tid.z", "%ctaid.x", "%ctaid.y", "%ctaid.z", "%laneid", "%warpid"]
    body = """mov.u32 %r2, %tid.y; mov.u32 %r3, %tid.z; mad.lo.u32 %r1, %r2, 4, %r1;
    mad.lo.u32 %r1, %r3, 16, %r1;
    mov.u32 %r4, %ctaid.x; mov.u32 %r5, %ctaid.y; mov.u32 %r6, %ctaid.z;
    mad.lo.u32 %r4, %r5, 2, %r4; mad.lo.u32 %r4, %r6, 6, %r4;
    mad.lo.u32 %r1, %r4, 32, %r1; mul.wide.u32 %rd2, %r1, 32; add.s64 %rd3, %rd1, %rd2;
    """ + "".join(
        f"mov.u32 %r7, {n}; st.global.u32 [%rd3+{4 * k}], %r7;\n" for k, n in enumerate(names)
    )
    emulate(module(body), (2, 3, 2), (4, 4, 2), [y])
    for b in range(12):
        for t in range(32):
            assert y[b, t].tolist() == [t % 4, t // 4 % 4, t // 16, b % 2, b // 2 % 3, b // 6, t, 0]


# -- memory
# -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind,dtype", [("u8", np.uint8), ("s8", np.int8), ("u16", np.uint16), ("s16", np.int16)]
)
def test_narrow_loads_extend(kind: str, dtype: type) -> None:
    x = np.arange(32).astype(dtype) - np.array(16).astype(dtype)
    size = x.itemsize
    y = out(
        f"ld.param.u64 %rd5, [p1]; mad.wide.u32 %rd6, %r1, {size}, %rd5; ld.global.{kind} %r2, "
        f"[%rd6]; st.global.u32 [%rd3], %r2;",
        x,
    )
    assert np.array_equal(y.view(np.int32), x.astype(np.int32))


def test_vectors_and_the_sink() -> None:
    x = np.arange(128, dtype=np.uint32)
    y = out(
        """ld.param.u64 %rd5, [p1]; mad.wide.u32 %rd6, %r1, 16, %rd5;
        ld.global.nc.L1::no_allocate.v4.u32 {%r2, _, %r3, %r4}, [%rd6];
    mad.lo.u32 %r5, %r3, 1000, %r2; add.u32 %r5, %r5, %r4; st.global.u32 [%rd3], %r5;""",
        x,
    )
    assert y.tolist() == [(4 * t + 2) * 1000 + 8 * t + 3 for t in range(32)]


def test_generic_addresses_reach_every_space() -> None:
    extra = ".global .align 4 .u32 g[2] = {11, 22}; .const .align 4 .u32 c = 33;"
    y = out(
        """.shared .align 4 .u32 s; .local .align 4 .b8 l[8]; .reg .b64 %q<8>;
    mov.u64 %q1, s; cvta.shared.u64 %q1, %q1; mov.u64 %q2, l; cvta.local.u64 %q2, %q2;
    mov.u64 %q3, g; cvta.global.u64 %q3, %q3;
    setp.eq.u32 %p1, %r1, 0; @%p1 st.u32 [%q1], 44; st.u32 [%q2+4], %r1; bar.sync 0;
    ld.u32 %r2, [%q1]; ld.u32 %r3, [%q2+4]; ld.u32 %r4, [%q3+4]; ld.const.u32 %r5, [c];
    add.u32 %r2, %r2, %r3; add.u32 %r2, %r2, %r4; add.u32 %r2, %r2, %r5;
    isspacep.shared %p2, %q1; isspacep.local %p3, %q2; isspacep.global %p4, %q3;
    isspacep.global %p5, %q1;
    and.pred %p2, %p2, %p3; and.pred %p2, %p2, %p4; not.pred %p5, %p5; and.pred %p2, %p2, %p5;
    selp.u32 %r6, 100000, 0, %p2; add.u32 %r2, %r2, %r6; st.global.u32 [%rd3], %r2;""",
        extra=extra,
    )
    assert y.tolist() == [100000 + 44 + t + 22 + 33 for t in range(32)]


def test_one_access_in_three_spaces() -> None:
    y = out(""".shared .align 4 .u32 s[32]; .local .align 4 .b8 l[4]; .reg .b64 %q<8>; .reg .b32 %m;
    mov.u64 %q1, s; cvta.shared.u64 %q1, %q1; add.s64 %q1, %q1, %rd2; mov.u64 %q2, l;
    cvta.local.u64 %q2, %q2;
    rem.u32 %m, %r1, 3; setp.eq.u32 %p1, %m, 0; setp.eq.u32 %p2, %m, 1;
    selp.b64 %q3, %q1, %rd3, %p1; selp.b64 %q3, %q2, %q3, %p2; st.u32 [%q3], %r1;
    ld.u32 %r2, [%q3]; st.global.u32 [%rd3], %r2;""")
    assert y.tolist() == list(range(32))


def test_module_variables_keep_their_value() -> None:
    m = module(
        "mov.u64 %rd5, n; atom.global.add.u32 %r2, [%rd5], 1; st.global.u32 [%rd3], %r2;",
        extra=".global .u32 n = 5;",
    )
    y = np.zeros(32, np.uint32)
    emulate(m, 1, 32, [y])
    assert sorted(y) == list(range(5, 37))
    emulate(m, 1, 32, [y])
    assert sorted(y) == list(range(37, 69))


def test_structures_by_value_and_their_address() -> None:
    class Pair(ctypes.Structure):
        _fields_ = [("a", ctypes.c_int), ("b", ctypes.c_int * 3)]

    body = (
        LANES
        + OUT
        + """ld.param.v2.u32 {%r2, %r3}, [q+8]; mov.b64 %rd5, q; and.b32 %r4, %r1, 3;
        mad.wide.u32 %rd5, %r4, 4, %rd5;
    ld.param.u32 %r5, [%rd5]; mad.lo.u32 %r2, %r2, 100, %r3; mad.lo.u32 %r2, %r5, 10000, %r2;
    st.global.u32 [%rd3], %r2; ret;"""
    )
    m = Module.from_ptx(kernel_text(body, ".param .u64 p0, .param .align 4 .b8 q[16]"))
    y = np.zeros(32, np.uint32)
    emulate(m, 1, 32, [y, Pair(1, (2, 3, 4))])
    assert y.tolist() == [10000 * (1 + t % 4) + 304 for t in range(32)]


# -- lanes
# ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("width", [32, 16, 8])
def test_shuffles(mode: str, width: int) -> None:
    for delta in (0, 1, 3, 5):
        clamp = (32 - width) << 8 | (0 if mode == "up" else 31)
        y = out(
            f"mul.lo.u32 %r2, %r1, 10; shfl.sync.{mode}.b32 %r3|%p1, %r2, {delta}, {clamp}, -1; "
            "selp.u32 %r4, 1000, 0, %p1; add.u32 %r3, %r3, %r4; st.global.u32 [%rd3], %r3;"
        )
        for t in range(32):
            base = t // width * width
            j = {
                "up": t - delta,
                "down": t + delta,
                "bfly": t ^ delta,
                "idx": base + delta % width,
            }[mode]
            inside = j >= base if mode == "up" else j < base + width
            assert y[t] == (10 * j + 1000 if inside else 10 * t), (t, delta)


def test_votes_matches_reductions() -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 4, 32).astype(np.uint32)
    load = "ld.param.u64 %rd5, [p1]; add.s64 %rd6, %rd5, %rd2; ld.global.u32 %r2, [%rd6]; "
    store = "st.global.u32 [%rd3], %r3;"
    ballot = out(load + "setp.gt.u32 %p1, %r2, 1; vote.sync.ballot.b32 %r3, %p1, -1; " + store, x)
    assert (ballot == sum(1 << t for t in range(32) if x[t] > 1)).all()
    match = out(load + "match.any.sync.b32 %r3, %r2, -1; " + store, x)
    assert match.tolist() == [sum(1 << k for k in range(32) if x[k] == x[t]) for t in range(32)]
    for op, f in (("add", np.sum), ("min", np.min), ("max", np.max)):
        assert (out(load + f"redux.sync.{op}.u32 %r3, %r2, -1; " + store, x) == f(x)).all()
    assert (
        out(load + "redux.sync.xor.b32 %r3, %r2, -1; " + store, x) == np.bitwise_xor.reduce(x)
    ).all()
    for mode, want in (("all", 0), ("any", 1), ("uni", 0)):
        got = out(
            load
            + f"setp.gt.u32 %p1, %r2, 1; vote.sync.{mode}.pred %p2, %p1, -1; selp.u32 %r3, 1, 0, "
            f"%p2; " + store,
            x,
        )
        assert (got == want).all()
    elected = out(
        "elect.sync %r2|%p1, -1; selp.u32 %r3, 1, 0, %p1; add.u32 %r3, %r3, %r2; " + store
    )
    assert elected.tolist() == [1] + [0] * 31


# -- atomics
# ----------------------------------------------------------------------------------------

ATOMICS = {
    "add.u32": lambda a, b: a + b,
    "min.u32": min,
    "max.u32": max,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "exch.b32": lambda a, b: b,
    "inc.u32": lambda a, b: 0 if a >= b else a + 1,
    "dec.u32": lambda a, b: b if a == 0 or a > b else a - 1,
}


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize("op", ATOMICS)
def test_atomics(op: str, space: str) -> None:
    x = np.array([5, 0, 7, 2**32 - 1] * 8, np.uint32)
    where = "%rd6" if space == "global" else "s"
    y = out(
        f""".shared .u32 s; ld.param.u64 %rd6, [p1]; ld.param.u64 %rd7, [p2];
        add.s64 %rd7, %rd7, %rd2; ld.global.u32 %r2, [%rd7];
    setp.eq.u32 %p1, %r1, 0; @%p1 st.shared.u32 [s], 3; bar.sync 0;
    atom.{space}.{op.replace(".", ".", 1)} %r3, [{where}], %r2; st.global.u32 [%rd3], %r3;""",
        np.array([3], np.uint32),
        x,
    )
    state = 3
    for t in range(32):  # lanes in order
        assert y[t] == state
        state = ATOMICS[op](state, int(x[t])) % 2**32


def test_atomics_on_floats_and_pairs() -> None:
    total = np.zeros(1, np.float32)
    emulate(
        module(
            "ld.param.u64 %rd5, [p1]; cvt.rn.f32.u32 %f1, %r1; red.global.add.f32 [%rd5], %f1;", 2
        ),
        4,
        64,
        [np.zeros(64, np.uint32), total],
    )
    assert total[0] == 4 * sum(range(64))
    pair = np.zeros(2, np.float16)
    emulate(
        module(
            "ld.param.u64 %rd5, [p1]; mov.b32 %r2, 0x40003C00; red.global.add.noftz.f16x2 "
            "[%rd5], %r2;",
            2,
        ),
        1,
        32,
        [np.zeros(32, np.uint32), pair],
    )
    assert pair.tolist() == [32, 64]
    four = np.zeros(4, np.float32)
    emulate(
        module(
            "ld.param.u64 %rd5, [p1]; mov.f32 %f1, 0f3F800000; red.global.add.v4.f32 [%rd5], "
            "{%f1, %f1, %f1, %f1};",
            2,
        ),
        1,
        32,
        [np.zeros(32, np.uint32), four],
    )
    assert four.tolist() == [32] * 4


# -- barriers, asynchronous copies
# ------------------------------------------------------------------


def test_barrier_reductions() -> None:
    y = out(
        """setp.lt.u32 %p1, %r1, 40; bar.red.popc.u32 %r2, 0, %p1; bar.red.and.pred %p2, 0, %p1;
        bar.red.or.pred %p3, 0, !%p1;
    selp.u32 %r3, 1000, 0, %p2; selp.u32 %r4, 2000, 0, %p3; add.u32 %r2, %r2, %r3;
    add.u32 %r2, %r2, %r4; st.global.u32 [%rd3], %r2;""",
        threads=96,
    )
    assert (y == 2040).all()


def test_producers_and_consumers_by_named_barriers() -> None:
    """Two warps fill a buffer and arrive; two wait for it: nothing else orders them."""
    body = """.shared .u32 s[64]; setp.ge.u32 %p1, %r1, 64; @%p1 bra CONSUME;
    mov.u32 %r2, s; mad.lo.u32 %r3, %r1, 4, %r2; mul.lo.u32 %r4, %r1, %r1;
    st.shared.u32 [%r3], %r4; bar.arrive 1, 128; bra DONE;
    CONSUME: bar.sync 1, 128; sub.u32 %r5, 127, %r1; mov.u32 %r2, s; mad.lo.u32 %r3, %r5, 4, %r2;
    ld.shared.u32 %r4, [%r3];
    st.global.u32 [%rd3], %r4; DONE:"""
    for seed in range(4):
        y = out(body, threads=128, seed=seed)
        assert y[64:].tolist() == [(127 - t) ** 2 for t in range(64, 128)]


MBARRIER = """.shared .align 8 .b64 bar; .shared .align 16 .u32 s[256]; .reg .b32 %b;
    mov.u32 %b, bar;
    setp.eq.u32 %p1, %r1, 0; @%p1 mbarrier.init.shared.b64 [%b], 64; bar.sync 0;
    ld.param.u64 %rd5, [p1]; mad.wide.u32 %rd6, %r1, 16, %rd5; mov.u32 %r2, s;
    mad.lo.u32 %r3, %r1, 16, %r2;
    cp.async.cg.shared.global [%r3], [%rd6], 16; {arrive}
    {{ .reg .pred p; W: mbarrier.try_wait.parity.shared.b64 p, [%b], 0; @p bra D; bra W; D: }}
    xor.b32 %r4, %r1, 33; mad.lo.u32 %r3, %r4, 16, %r2; ld.shared.u32 %r5, [%r3+4];
    st.global.u32 [%rd3], %r5;"""


def test_mbarrier_and_cp_async() -> None:
    x = np.arange(256, dtype=np.uint32)
    body = MBARRIER.format(arrive="cp.async.mbarrier.arrive.noinc.shared.b64 [%b];")
    for seed in range(3):
        y = out(body, x, threads=64, seed=seed)
        assert y.tolist() == [4 * (t ^ 33) + 1 for t in range(64)]
    # Arriving without the copies: the barrier opens, the data has not landed.
    body = MBARRIER.format(arrive=".reg .b64 %t; mbarrier.arrive.shared.b64 %t, [%b];")
    with pytest.raises(KernelError, match="cp.async"):
        out(body, x, threads=64)


def test_cp_async_zero_fill_and_groups() -> None:
    x = np.arange(1, 129, dtype=np.uint32)
    body = """.shared .align 16 .u32 s[256]; ld.param.u64 %rd5, [p1];
    mad.wide.u32 %rd6, %r1, 16, %rd5; mov.u32 %r2, s; mad.lo.u32 %r3, %r1, 16, %r2;
    and.b32 %r4, %r1, 3; shl.b32 %r4, %r4, 2; cp.async.ca.shared.global [%r3], [%rd6], 16, %r4;
    cp.async.commit_group;
    cp.async.cg.shared.global [%r3+512], [%rd6], 16; cp.async.commit_group; cp.async.wait_group 1;
    ld.shared.v4.u32 {%r5, %r6, %r7, %r8}, [%r3]; add.u32 %r5, %r5, %r6; add.u32 %r5, %r5, %r7;
    add.u32 %r5, %r5, %r8;
    cp.async.wait_all; ld.shared.u32 %r9, [%r3+512]; mad.lo.u32 %r5, %r9, 1000, %r5;
    st.global.u32 [%rd3], %r5;"""
    y = out(body, x)
    assert y.tolist() == [
        (4 * t + 1) * 1000 + sum(int(v) for v in x[4 * t : 4 * t + t % 4]) for t in range(32)
    ]


def test_a_block_waits_for_a_later_one() -> None:
    """Block 0 spins on what the last block writes: blocks advance fairly, whatever their number."""
    body = """mov.u32 %r2, %ctaid.x; mov.u32 %r3, %nctaid.x; sub.u32 %r3, %r3, 1;
    setp.eq.u32 %p1, %r2, %r3; @%p1 bra SET;
    setp.ne.u32 %p2, %r2, 0; @%p2 bra DONE;
    W: ld.acquire.gpu.global.u32 %r4, [%rd1]; setp.eq.u32 %p3, %r4, 0; @%p3 bra W;
    st.global.u32 [%rd1+4], 9; bra DONE;
    SET: st.release.gpu.global.u32 [%rd1], 1; DONE:"""
    y = np.zeros(2, np.uint32)
    emulate(module(body), 200, 1, [y])
    assert y.tolist() == [1, 9]


# -- orders
# -----------------------------------------------------------------------------------------

LAST_WINS = "mov.u32 %r2, %ctaid.x; st.relaxed.gpu.global.u32 [%rd1], %r2;"


def test_results_that_depend_on_the_schedule_are_reported() -> None:
    y = np.zeros(1, np.uint32)
    found = emulate_orders(module(LAST_WINS), 8, 32, [y], orders=12, strict=False)
    assert not found.same and found.differences[0][1].startswith("argument 0")
    with pytest.raises(KernelError, match="results depend on the schedule"):
        emulate_orders(module(LAST_WINS), 8, 32, [y], orders=12)


def test_results_that_do_not_depend_on_the_schedule() -> None:
    y = np.zeros(64, np.uint32)
    r = emulate_orders(
        module("red.relaxed.gpu.global.add.u32 [%rd3], 1;"), 8, 64, [y], orders=12, checks=True
    )
    assert r.same and (y == 8).all() and "12 orders" in str(r)


def test_a_seed_is_an_order() -> None:
    def run(seed):
        y = np.zeros(1, np.uint32)
        emulate(module(LAST_WINS), 64, 32, [y], seed=seed)
        return int(y[0])

    assert [run(s) for s in range(8)] == [run(s) for s in range(8)]
    assert len({run(s) for s in range(8)}) > 1


def test_uninitialised_output_that_is_written_first_is_fine() -> None:
    y = uninitialized(np.zeros(32, np.uint32))
    emulate(module("st.global.u32 [%rd3], 1; ld.global.u32 %r2, [%rd3];"), 1, 32, [y])


def test_undefined_lanes_that_do_not_matter_are_silent() -> None:
    """As Triton masks a load: undefined where the guard fails, computed with, never stored."""
    body = """setp.lt.u32 %p1, %r1, 20; @%p1 ld.global.u32 %r2, [%rd3]; add.u32 %r3, %r2, 1;
    @%p1 st.global.u32 [%rd3], %r3;"""
    y = out(body)
    assert y.tolist() == [1] * 20 + [0] * 12
    with pytest.raises(KernelError, match="never written"):
        out(body.replace("@%p1 st", "st"))


FILL = {  # byte 1 is left out: of a register that nothing wrote, by each way of putting bytes in
    "and or": "and.b32 %r1, %r1, 0x0000ff00; or.b32 %r1, %r1, 0x44330011;",
    "lop3": "lop3.b32 %r1, %r1, 0x0000ff00, 0x44330011, 0xea;",
    "prmt": "prmt.b32 %r1, %r1, %r3, 0x7614;",
    "bfi": "bfi.b32 %r1, %r3, %r1, 0, 8; bfi.b32 %r1, %r3, %r1, 16, 16;",
    "halves": "and.b32 %r1, %r1, 0xff00; cvt.u16.u32 %h0, %r1; mov.b32 %r1, {%h0, %h1};",
    "selp": "and.b32 %r1, %r1, 0xff00; setp.eq.u32 %p1, %r3, 0; selp.b32 %r1, %r3, %r1, %p1;",
    "shift": "shl.b32 %r1, %r1, 24; shr.u32 %r1, %r1, 16;",
    "64 bits": "mov.b64 %rd1, {%r1, %r3}; and.b64 %rd1, %rd1, 0xff00; cvt.u32.u64 %r1, %rd1;",
}
USE = {  # what is read of the register afterwards, and whether byte 1 is among it
    "its byte": ("bfe.u32 %r2, %r1, 8, 8;", True),
    "all": ("mov.b32 %r2, %r1;", True),
    "a sum": ("add.u32 %r2, %r1, 1; shr.u32 %r2, %r2, 16;", True),
    "byte 0": ("and.b32 %r2, %r1, 0xff;", False),
    "bytes 2 and 3": ("shr.u32 %r2, %r1, 16;", False),
    "high half": ("mov.b32 {%h2, %h3}, %r1; cvt.u32.u16 %r2, %h3;", False),
    "filled": ("and.b32 %r2, %r1, 0xffff00ff; or.b32 %r2, %r2, 0x2200;", False),
    "filled, permuted": ("prmt.b32 %r2, %r1, %r3, 0x3240;", False),
}


@pytest.mark.parametrize("use", USE)
@pytest.mark.parametrize("fill", FILL)
def test_bytes_of_a_register_are_defined_one_by_one(fill: str, use: str) -> None:
    read, bad = USE[use]
    text = kernel_text(
        f""".reg .b64 %rd<4>; .reg .b32 %r<8>; .reg .b16 %h<4>; .reg .pred %p<2>;
        ld.param.u64 %rd2, [p0]; mov.u32 %r3, %tid.x; mov.u16 %h1, 7;
        {FILL[fill]}
        {read}
        st.global.u32 [%rd2], %r2; ret;""",
        ".param .u64 p0",
    )
    out = np.zeros(1, np.uint32)
    result = emulate(Module.from_ptx(text), 1, 1, [out], strict=False)
    kinds = [r.kind for r in result.reports]
    # with thread 0, selp takes the register that is defined
    assert kinds == (["uninitialised register"] if bad and fill != "selp" else [])


@pytest.mark.parametrize("stored,bad", [("u8", False), ("u16", True), ("u32", True)])
def test_of_a_stored_register_only_the_stored_bytes_count(stored: str, bad: bool) -> None:
    text = kernel_text(
        f""".reg .b64 %rd<4>; .reg .b32 %r<8>;
        ld.param.u64 %rd2, [p0]; and.b32 %r1, %r1, 0xffffff00;
        st.global.{stored} [%rd2], %r1; ret;""",
        ".param .u64 p0",
    )
    result = emulate(Module.from_ptx(text), 1, 32, [np.zeros(1, np.uint32)], strict=False)
    assert bool(result.reports) == bad


@pytest.mark.parametrize(
    "part,bad",
    [
        ("mov.b64 {%r2, %r3}, %rd1; mov.u32 %r4, %r2;", False),
        ("mov.b64 {%r2, %r3}, %rd1; mov.u32 %r4, %r3;", True),
        ("cvt.u32.u64 %r4, %rd1;", False),
        ("shr.u64 %rd1, %rd1, 32; cvt.u32.u64 %r4, %rd1;", True),
        ("shl.b64 %rd1, %rd1, 32; shr.u64 %rd1, %rd1, 32; cvt.u32.u64 %r4, %rd1;", False),
        ("bfi.b64 %rd1, 5, %rd1, 32, 32; shr.u64 %rd1, %rd1, 16; cvt.u32.u64 %r4, %rd1;", False),
    ],
)
def test_halves_of_a_64_bit_register_are_defined_apart(part: str, bad: bool) -> None:
    text = kernel_text(
        f""".reg .b64 %rd<4>; .reg .b32 %r<8>;
        ld.param.u64 %rd2, [p0]; mov.u32 %r1, 5; mov.b64 %rd1, {{%r1, %r7}};
        {part}
        st.global.u32 [%rd2], %r4; ret;""",
        ".param .u64 p0",
    )
    result = emulate(Module.from_ptx(text), 1, 1, [np.zeros(1, np.uint32)], strict=False)
    assert [r.kind for r in result.reports] == (["uninitialised register"] if bad else [])
