"""mma, ldmatrix and wgmma: fragment layouts as PTX documents them, and products against matmuls."""

from __future__ import annotations

import re

import ml_dtypes
import numpy as np
import pytest
from ptx_kernels import kernel_text

from qlora_kernels.emulator import KernelError, Module, emulate

pytest.importorskip("qlora_kernels.emulator.engine").library()

DTYPES = {
    "f16": np.float16,
    "bf16": ml_dtypes.bfloat16,
    "tf32": np.float32,
    "s8": np.int8,
    "u8": np.uint8,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
}


def a_index(lane: int, i: int, per: int, regs: int) -> tuple[int, int]:
    """Row and column of value i of a lane's A fragment (PTX ISA, "Matrix Fragments for
    mma.m16n8k*"):
    register r = i / per holds row groupID + 8 for odd r, columns beyond 4 * per for r >= 2."""
    r, h = divmod(i, per)
    return lane // 4 + 8 * (r % 2), (lane % 4) * per + h + 4 * per * (r // 2)


def b_index(lane: int, i: int, per: int) -> tuple[int, int]:
    r, h = divmod(i, per)
    return (lane % 4) * per + h + 4 * per * r, lane // 4


def c_index(lane: int, i: int) -> tuple[int, int]:
    return lane // 4 + 8 * (i // 2), 2 * (lane % 4) + i % 2


def mma_kernel(shape: str, ta: str, tb: str, acc: str, na: int, nb: int, nc: int) -> Module:
    load = lambda p, n, base: "".join(  # noqa: E731
        f"mad.lo.s64 %rd2, %rd1, {4 * n}, %rd{p + 10}; ld.global.b32 %{base}{k}, [%rd2+{4 * k}];\n"
        for k in range(n)
    )
    regs = lambda base, n: "{" + ", ".join(f"%{base}{k}" for k in range(n)) + "}"  # noqa: E731
    body = (
        f""".reg .b64 %rd<16>; .reg .b32 %r<2>; .reg .b32 %a<4>; .reg .b32 %b<2>; .reg .b32 %c<4>;
        .reg .b32 %d<4>;
    mov.u32 %r1, %tid.x; cvt.u64.u32 %rd1, %r1;
    ld.param.u64 %rd10, [p0]; ld.param.u64 %rd11, [p1]; ld.param.u64 %rd12, [p2];
    ld.param.u64 %rd13, [p3];
    {load(1, na, "a")}{load(2, nb, "b")}{load(3, nc, "c")}
    mma.sync.aligned.{shape}.row.col.{acc}.{ta}.{tb}.{acc} {regs("d", nc)},
        {regs("a", na)}, {regs("b", nb)}, {regs("c", nc)};
    mad.lo.s64 %rd2, %rd1, {4 * nc}, %rd10;
    """
        + "".join(f"st.global.b32 [%rd2+{4 * k}], %d{k};\n" for k in range(nc))
        + "ret;"
    )
    return Module.from_ptx(kernel_text(body, ", ".join(f".param .u64 p{k}" for k in range(4))))


CASES = [
    ("m16n8k16", "f16", "f16", "f32"),
    ("m16n8k8", "f16", "f16", "f32"),
    ("m16n8k16", "bf16", "bf16", "f32"),
    ("m16n8k8", "bf16", "bf16", "f32"),
    ("m16n8k8", "tf32", "tf32", "f32"),
    ("m16n8k4", "tf32", "tf32", "f32"),
    ("m16n8k16", "f16", "f16", "f16"),
    ("m16n8k8", "f16", "f16", "f16"),
    ("m16n8k32", "s8", "s8", "s32"),
    ("m16n8k16", "s8", "s8", "s32"),
    ("m16n8k32", "u8", "s8", "s32"),
    ("m16n8k32", "u8", "u8", "s32"),
    ("m16n8k32", "e4m3", "e4m3", "f32"),
    ("m16n8k32", "e5m2", "e4m3", "f32"),
]


@pytest.mark.parametrize("shape,ta,tb,acc", CASES)
def test_mma_against_matmul(shape: str, ta: str, tb: str, acc: str) -> None:
    k = int(shape.split("k")[1])
    rng = np.random.default_rng(0)
    per = {4: 1, 2: 2, 1: 4}[np.dtype(DTYPES[ta]).itemsize]
    na, nb = 16 * k // 32 // per, 8 * k // 32 // per
    nc = 2 if acc == "f16" else 4

    def operand(rows: int, cols: int, t: str) -> np.ndarray:
        if t in ("s8", "u8"):
            info = np.iinfo(DTYPES[t])
            return rng.integers(info.min, info.max + 1, (rows, cols)).astype(DTYPES[t])
        return rng.integers(-8, 9, (rows, cols)).astype(DTYPES[t])

    A, B = operand(16, k, ta), operand(k, 8, tb)
    C = rng.integers(-50, 50, (16, 8)).astype(
        {"f32": np.float32, "f16": np.float16, "s32": np.int32}[acc]
    )
    fa = np.array(
        [[A[a_index(lane, i, per, na)] for i in range(na * per)] for lane in range(32)], DTYPES[ta]
    )
    fb = np.array(
        [[B[b_index(lane, i, per)] for i in range(nb * per)] for lane in range(32)], DTYPES[tb]
    )
    fc = np.array([[C[c_index(lane, i)] for i in range(4)] for lane in range(32)], C.dtype)
    out = np.zeros_like(fc)
    result = emulate(mma_kernel(shape, ta, tb, acc, na, nb, nc), 1, 32, [out, fa, fb, fc])
    D = np.zeros((16, 8), np.float64)
    for lane in range(32):
        for i in range(4):
            D[c_index(lane, i)] = out[lane, i]
    want = A.astype(np.float64) @ B.astype(np.float64) + C
    assert np.array_equal(D, want.astype(C.dtype).astype(np.float64))  # small integers: exact
    assert result.counts.total["flops"] == 2 * 16 * 8 * k


@pytest.mark.parametrize("t", ["bf16", "f16"])
def test_mma_rounding_bound(t: str) -> None:
    """Sixteen products into fp32: within 16 roundings of the exact sum."""
    rng = np.random.default_rng(3)
    A, B = (
        rng.standard_normal((16, 16)).astype(DTYPES[t]),
        rng.standard_normal((16, 8)).astype(DTYPES[t]),
    )
    fa = np.array([[A[a_index(lane, i, 2, 4)] for i in range(8)] for lane in range(32)], DTYPES[t])
    fb = np.array([[B[b_index(lane, i, 2)] for i in range(4)] for lane in range(32)], DTYPES[t])
    out = np.zeros((32, 4), np.float32)
    emulate(
        mma_kernel("m16n8k16", t, t, "f32", 4, 2, 4),
        1,
        32,
        [out, fa, fb, np.zeros((32, 4), np.float32)],
    )
    a, b = A.astype(np.float64), B.astype(np.float64)
    want, size = a @ b, np.abs(a) @ np.abs(b)
    for lane in range(32):
        for i in range(4):
            r, c = c_index(lane, i)
            assert abs(out[lane, i] - want[r, c]) <= 16 * 2.0**-24 * size[r, c]


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c with one rounding to fp32, for a product that is exact in float64: the sum's error
    (Knuth's two-sum) is put into its last bit, which the rounding to fp32 then sees."""
    p = a.astype(np.float64) * b
    s = p + c
    t = s - p
    error = (p - (s - t)) + (c - t)
    inexact = (error != 0) & np.isfinite(s)
    toward = np.where(error > 0, np.inf, -np.inf)
    odd = s.view(np.int64) & 1 == 1
    return np.where(inexact & ~odd, np.nextafter(s, toward), s).astype(np.float32)


def products(A: np.ndarray, B: np.ndarray, C: np.ndarray) -> np.ndarray:
    """C + A B as the emulator defines it: one fma a product, in the order of k."""
    D = C.astype(np.float32)
    for k in range(A.shape[1]):
        D = fma(A[:, k, None].astype(np.float32), B[None, k].astype(np.float32), D)
    return D


def bits(x: np.ndarray) -> np.ndarray:
    """All NaNs are one: PTX's."""
    return np.where(np.isnan(x), np.uint32(0x7FFFFFFF), x.view(np.uint32))


def wild(rng: np.random.Generator, shape: tuple[int, ...], t: str) -> np.ndarray:
    """Values of all sizes whose products stay within fp32; some zeros, infinities and NaNs."""
    spread = {"bf16": 40, "tf32": 40, "f16": 14, "e4m3": 6, "e5m2": 12}[t]
    x = rng.standard_normal(shape) * 2.0 ** rng.integers(-spread, spread, shape)
    x[rng.random(shape) < 0.05] = 0
    x[rng.random(shape) < 0.002] = np.nan
    if t in ("bf16", "f16", "tf32"):
        x[rng.random(shape) < 0.002] = np.inf
    x = x.astype(DTYPES[t])
    return (x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32) if t == "tf32" else x


@pytest.mark.parametrize(
    "shape,ta,tb", [c[:3] for c in CASES if c[3] == "f32"], ids=lambda x: x if len(x) < 9 else ""
)
def test_mma_bit_for_bit(shape: str, ta: str, tb: str) -> None:
    k = int(shape.split("k")[1])
    per = {4: 1, 2: 2, 1: 4}[np.dtype(DTYPES[ta]).itemsize]
    na, nb = 16 * k // 32 // per, 8 * k // 32 // per
    module = mma_kernel(shape, ta, tb, "f32", na, nb, 4)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        A, B = wild(rng, (16, k), ta), wild(rng, (k, 8), tb)
        C = rng.standard_normal((16, 8)).astype(np.float32)
        fa, fb = np.zeros((32, na * per), A.dtype), np.zeros((32, nb * per), B.dtype)
        fc, out, D = (np.zeros(s, np.float32) for s in ((32, 4), (32, 4), (16, 8)))
        for lane in range(32):
            fa[lane] = [A[a_index(lane, i, per, na)] for i in range(na * per)]
            fb[lane] = [B[b_index(lane, i, per)] for i in range(nb * per)]
            fc[lane] = [C[c_index(lane, i)] for i in range(4)]
        emulate(module, 1, 32, [out, fa, fb, fc])
        for lane in range(32):
            for i in range(4):
                D[c_index(lane, i)] = out[lane, i]
        with np.errstate(all="ignore"):
            assert np.array_equal(bits(D), bits(products(A, B, C)))


def test_satfinite() -> None:
    module = mma_kernel("m16n8k32", "s8", "s8", "s32", 4, 2, 4)
    clamped = Module.from_ptx(module.text.replace(".row.col.s32", ".row.col.satfinite.s32"))
    fa, fb = np.full((32, 16), 127, np.int8), np.full((32, 8), 127, np.int8)
    c = np.full((32, 4), 2**31 - 1, np.int32)
    out = np.zeros((32, 4), np.int32)
    emulate(clamped, 1, 32, [out, fa, fb, c])
    assert (out == 2**31 - 1).all()
    emulate(module, 1, 32, [out, fa, fb, c])
    assert (out == np.int64(2**31 - 1 + 32 * 127 * 127 - 2**32).astype(np.int32)).all()


@pytest.mark.parametrize("sat", ["", ".satfinite"])
def test_wgmma_satfinite(sat: str) -> None:
    """All elements are 127, so the layout is no matter; the sum goes past the largest integer."""
    text = wgmma_kernel(64, "bf16", 128, False, False)
    for old, new in (
        ("k16.f32.bf16.bf16", f"k32{sat}.s32.s8.s8"),
        ("%rd7, 1, 1, 1, 0, 0;", "%rd7, 1;"),
        ("0f3F800000", "0f7FFFFFFF"),
    ):
        assert old in text
        text = text.replace(old, new)
    full = [np.full(64 * 128, 127, np.int8) for _ in range(2)]
    out = np.zeros((128, 32), np.int32)
    emulate(Module.from_ptx(text), 1, 128, [out, *full])
    wrapped = 2**31 - 1 + 32 * 127 * 127 - 2**32
    assert (out == (2**31 - 1 if sat else wrapped)).all()


def ldmatrix_kernel(op: str, n: int, trans: bool, stride: int) -> Module:
    regs = "{" + ", ".join(f"%v{k}" for k in range(n)) + "}"
    t = ".trans" if trans else ""
    move = (
        f"ldmatrix.sync.aligned.m8n8.x{n}{t}.shared.b16 {regs}, [%r3];"
        if op == "ldmatrix"
        else f"stmatrix.sync.aligned.m8n8.x{n}{t}.shared.b16 [%r3], {regs};"
    )
    copy_in = "".join(f"ld.global.b32 %v{k}, [%rd2+{4 * k}];\n" for k in range(n))
    copy_out = "".join(f"st.global.b32 [%rd2+{4 * k}], %v{k};\n" for k in range(n))
    body = (
        f""".reg .b64 %rd<8>; .reg .b32 %r<8>; .reg .b32 %v<4>; .reg .pred %p<2>;
    .shared .align 16 .b8 tile[{32 * stride}];
    mov.u32 %r1, %tid.x; cvt.u64.u32 %rd1, %r1; ld.param.u64 %rd3, [p0]; ld.param.u64 %rd4, [p1];
    mad.lo.s64 %rd2, %rd1, {4 * n}, %rd{"3" if op == "ldmatrix" else "4"};
    mov.u32 %r2, tile; mad.lo.s32 %r3, %r1, {stride}, %r2;
    mad.lo.s64 %rd5, %rd1, 16, %rd{"4" if op == "ldmatrix" else "3"};
    .reg .b32 %w<4>;
    """
        + (
            f"ld.global.v4.b32 {{%w0,%w1,%w2,%w3}}, [%rd5]; st.shared.v4.b32 [%r3], "
            f"{{%w0,%w1,%w2,%w3}}; bar.sync 0;\n{move}\n{copy_out}"
            if op == "ldmatrix"
            else f"mov.b32 %w0, 0; st.shared.v4.b32 [%r3], {{%w0,%w0,%w0,%w0}};\n{copy_in} "
            f"bar.sync 0; {move} bar.sync 0;\n"
            f"ld.shared.v4.b32 {{%w0,%w1,%w2,%w3}}, [%r3]; st.global.v4.b32 [%rd5], "
            f"{{%w0,%w1,%w2,%w3}};\n"
        )
        + "ret;"
    )
    return Module.from_ptx(kernel_text(body, ".param .u64 p0, .param .u64 p1"))


@pytest.mark.parametrize("trans", [False, True])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_ldmatrix_and_stmatrix(n: int, trans: bool) -> None:
    """Lane l gets row l / 4, columns 2 (l % 4) and the next, of each matrix;
    of its transpose with .trans."""
    tiles = np.arange(32 * 8, dtype=np.uint16).reshape(4, 8, 8)
    want = np.zeros((32, n, 2), np.uint16)
    for lane in range(32):
        for k in range(n):
            m = tiles[k].T if trans else tiles[k]
            want[lane, k] = m[lane // 4, 2 * (lane % 4) : 2 * (lane % 4) + 2]
    out = np.zeros_like(want)
    result = emulate(ldmatrix_kernel("ldmatrix", n, trans, 16), 1, 32, [out, tiles.reshape(32, 8)])
    assert np.array_equal(out, want)
    # Rows of 16 bytes side by side: eight rows are one wavefront
    assert result.counts.sum("wavefronts", "ldmatrix") == n
    back = np.zeros((32, 8), np.uint16)
    emulate(ldmatrix_kernel("stmatrix", n, trans, 16), 1, 32, [back, want])
    assert np.array_equal(back[: 8 * n], tiles.reshape(32, 8)[: 8 * n])


def test_ldmatrix_conflicts() -> None:
    """Rows 128 bytes apart are all in the same banks: eight wavefronts a matrix."""
    tiles = np.zeros((32, 8), np.uint16)
    result = emulate(
        ldmatrix_kernel("ldmatrix", 4, False, 128), 1, 32, [np.zeros((32, 4, 2), np.uint16), tiles]
    )
    assert result.counts.sum("wavefronts", "ldmatrix") == 32
    assert result.counts.sum("wavefronts_ideal", "ldmatrix") == 4


def wgmma_kernel(n: int, t: str, swizzle: int, mn_b: bool, a_in_registers: bool) -> str:
    """D[64, n] = A[64, 16] B[16, n] from tiles that lie in global memory as they shall in
    shared."""
    mode = {128: 1, 64: 2, 32: 3, 0: 0}[swizzle]
    nd = n // 2
    d = "{" + ", ".join(f"%d{k}" for k in range(nd)) + "}"
    rows = swizzle or 16
    # leading and stride offsets of A and of B, in bytes; see CanonicalTile below
    lead_a, stride_a = (16, 8 * rows) if swizzle else (1024, 128)
    per = rows // 2
    if mn_b:
        lead_b, stride_b = (16 * rows, 8 * rows) if swizzle else ((n // per) * 128, 128)
    else:
        lead_b, stride_b = (16, 8 * rows) if swizzle else (n * 16, 128)
    size_a, size_b = 64 * max(rows, 32), n * 32 if mn_b else n * max(rows, 32)

    def descriptor(reg: str, at: str, lead: int, stride: int) -> str:
        high = (stride >> 4) | mode << 30
        return (
            f"shr.u32 %r5, {at}, 4; and.b32 %r5, %r5, 16383; or.b32 %r5, %r5, "
            f"{(lead >> 4) << 16};\n"
            f"mov.b32 %r6, {high - 2**32 if high >> 31 else high}; mov.b64 {reg}, {{%r5, %r6}};\n"
        )

    a = "{%a0, %a1, %a2, %a3}" if a_in_registers else "%rd6"
    trans = f"{'' if a_in_registers else '0, '}{int(mn_b)}" if t in ("f16", "bf16") else ""
    fragment = "".join(f"ld.global.b32 %a{k}, [%rd8+{4 * k}];\n" for k in range(4))
    body = (
        f""".reg .b64 %rd<16>; .reg .b32 %r<16>; .reg .b32 %d<{nd}>; .reg .b32 %a<4>;
        .reg .pred %p<3>;
    .shared .align 1024 .b8 sa[{size_a}]; .shared .align 1024 .b8 sb[{size_b}];
    mov.u32 %r1, %tid.x; cvt.u64.u32 %rd1, %r1;
    ld.param.u64 %rd2, [p0]; ld.param.u64 %rd3, [p1]; ld.param.u64 %rd4, [p2];
    mov.u32 %r2, sa; mov.u32 %r3, sb;
    shl.b32 %r7, %r1, 2; add.u32 %r8, %r7, %r2; add.u32 %r9, %r7, %r3;
    mad.lo.s64 %rd8, %rd1, 16, %rd3; {fragment if a_in_registers else ""}
    mov.u32 %r10, %r7; cvt.u64.u32 %rd9, %r7; add.s64 %rd10, %rd9, %rd3; add.s64 %rd11, %rd9, %rd4;
    """
        + (
            ""
            if a_in_registers
            else f"""
LA: setp.ge.u32 %p1, %r10, {size_a}; @%p1 bra LB0;
    ld.global.b32 %r11, [%rd10]; st.shared.b32 [%r8], %r11; add.s64 %rd10, %rd10, 512;
    add.u32 %r8, %r8, 512; add.u32 %r10, %r10, 512; bra LA;
LB0: mov.u32 %r10, %r7;
    """
        )
        + f"""
LB: setp.ge.u32 %p1, %r10, {size_b}; @%p1 bra LC;
    ld.global.b32 %r11, [%rd11]; st.shared.b32 [%r9], %r11; add.s64 %rd11, %rd11, 512;
    add.u32 %r9, %r9, 512; add.u32 %r10, %r10, 512; bra LB;
LC: bar.sync 0; fence.proxy.async.shared::cta;
    {descriptor("%rd6", "%r2", lead_a, stride_a)}{descriptor("%rd7", "%r3", lead_b, stride_b)}
    """
        + "".join(f"mov.b32 %d{k}, 0f3F800000;\n" for k in range(nd))
        + f"""
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{t}.{t} {d}, {a}, %rd7, 1, 1, 1, {trans};
    wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
    mad.lo.s64 %rd2, %rd1, {4 * nd}, %rd2;
    """
        + "".join(f"st.global.b32 [%rd2+{4 * k}], %d{k};\n" for k in range(nd))
        + "ret;"
    )
    return kernel_text(body, ", ".join(f".param .u64 p{k}" for k in range(3)))


def place(x: np.ndarray, swizzle: int, size: int, mn: bool, lead: int, stride: int) -> np.ndarray:
    """x[r, k] laid out as wgmma's canonical layouts have it (CUTLASS's notation, in 16-bit
    elements):
    K-major Swizzle o ((8, m), (8, 2)) : ((row, stride), (1, lead)), or the same with M or N
    contiguous."""
    out = np.zeros(size // 2, x.dtype)
    row = (swizzle or 16) // 2
    for r in range(x.shape[0]):
        for k in range(x.shape[1]):
            if not mn:
                if swizzle:
                    at = (r // 8) * stride // 2 + (r % 8) * row + k
                else:
                    at = (r // 8) * stride // 2 + (r % 8) * 8 + (k // 8) * lead // 2 + k % 8
            elif swizzle:
                at = (r // row) * lead // 2 + (k // 8) * stride // 2 + (k % 8) * row + r % row
            else:
                at = (r // 8) * stride // 2 + (k // 8) * lead // 2 + (k % 8) * 8 + r % 8
            byte = 2 * at
            byte ^= (byte >> 7 & {128: 7, 64: 3, 32: 1, 0: 0}[swizzle]) << 4
            out[byte // 2] = x[r, k]
    return out


def wgmma_tiles(
    A: np.ndarray, B: np.ndarray, swizzle: int, mn_b: bool, a_in_registers: bool
) -> list[np.ndarray]:
    """The kernel's arguments: A as tile or fragments, B as a tile."""
    n, rows = B.shape[1], swizzle or 16
    per = rows // 2
    lead_a, stride_a = (16, 8 * rows) if swizzle else (1024, 128)
    if mn_b:
        lead_b, stride_b = (16 * rows, 8 * rows) if swizzle else ((n // per) * 128, 128)
    else:
        lead_b, stride_b = (16, 8 * rows) if swizzle else (n * 16, 128)
    size_a, size_b = 64 * max(rows, 32), n * 32 if mn_b else n * max(rows, 32)
    if a_in_registers:
        a = np.zeros((128, 8), A.dtype)
        for lane in range(128):
            for i in range(8):
                r, k = a_index(lane % 32, i, 2, 4)
                a[lane, i] = A[16 * (lane // 32) + r, k]
    else:
        a = place(A, swizzle, size_a, False, lead_a, stride_a)
    return [a, place(B.T, swizzle, size_b, mn_b, lead_b, stride_b)]


def wgmma_result(out: np.ndarray, n: int) -> np.ndarray:
    D = np.zeros((64, n), np.float32)
    for lane in range(128):
        for i in range(n // 2):
            r, c = c_index(lane % 32, i % 4)
            D[16 * (lane // 32) + r, 8 * (i // 4) + c] = out[lane, i]
    return D


@pytest.mark.parametrize("a_in_registers", [False, True])
@pytest.mark.parametrize("mn_b", [False, True])
@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
@pytest.mark.parametrize("n,t", [(64, "bf16"), (128, "f16")])
def test_wgmma_against_matmul(
    n: int, t: str, swizzle: int, mn_b: bool, a_in_registers: bool
) -> None:
    rng = np.random.default_rng(0)
    A = rng.integers(-8, 9, (64, 16)).astype(DTYPES[t])
    B = rng.integers(-8, 9, (16, n)).astype(DTYPES[t])
    module = Module.from_ptx(wgmma_kernel(n, t, swizzle, mn_b, a_in_registers))
    out = np.zeros((128, n // 2), np.float32)
    emulate(module, 1, 128, [out, *wgmma_tiles(A, B, swizzle, mn_b, a_in_registers)])
    D = wgmma_result(out, n)
    assert np.array_equal(D, A.astype(np.float64) @ B.astype(np.float64) + 1)


@pytest.mark.parametrize(
    "n,t,mn_b",
    [(8, "f16", False), (64, "bf16", False), (64, "f16", True), (128, "f16", False),
     (256, "bf16", True)],
)  # fmt: skip
def test_wgmma_bit_for_bit(n: int, t: str, mn_b: bool) -> None:
    rng = np.random.default_rng(n)
    A, B = wild(rng, (64, 16), t), wild(rng, (16, n), t)
    swizzle = 128 if n >= 64 else 32
    module = Module.from_ptx(wgmma_kernel(n, t, swizzle, mn_b, n == 64))
    out = np.zeros((128, n // 2), np.float32)
    emulate(module, 1, 128, [out, *wgmma_tiles(A, B, swizzle, mn_b, n == 64)])
    with np.errstate(all="ignore"):
        want = products(A, B, np.ones((64, n), np.float32))
    assert np.array_equal(bits(wgmma_result(out, n)), bits(want))


FENCE = "wgmma.fence.sync.aligned;"
WAIT = "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"
MMA = r"wgmma.mma_async.*"
PENDING, UNFENCED = "wgmma registers touched before wgmma.wait_group", "wgmma without wgmma.fence"
PROXY = "wgmma reads without fence.proxy.async"
# What is wrong, the text that is replaced and by what, the report and the start of its PTX line
DISORDER = [
    ("no wait", WAIT, "wgmma.commit_group.sync.aligned;", PENDING, "st.global"),
    ("no commit", WAIT, "wgmma.wait_group.sync.aligned 0;", PENDING, "st.global"),
    ("one group left", WAIT, WAIT.replace(" 0;", " 1;"), PENDING, "st.global"),
    ("result moved", WAIT, "mov.b32 %d0, %d1; " + WAIT, PENDING, "mov.b32 %d0"),
    ("no fence", FENCE, "", UNFENCED, "wgmma.mma"),
    ("fence before the accumulators", "mov.b32 %d0, ", FENCE + "mov.b32 %d0, ", None, ""),
    ("accumulator set after the fence", FENCE, FENCE + " mov.b32 %d5, 0;", UNFENCED, "wgmma.mma"),
    ("no proxy fence", "fence.proxy.async.shared::cta;", "", PROXY, "wgmma.mma"),
    ("proxy fence too early", "LC: bar.sync 0; fence.proxy.async.shared::cta;",
     "LC: bar.sync 0; st.shared.b32 [%r2], 0; bar.sync 0;", PROXY, "wgmma.mma"),
    ("no barrier", "bar.sync 0; fence", "fence", "race on shared memory", "wgmma.mma"),
    ("tile overwritten in flight", WAIT, "wgmma.commit_group.sync.aligned; bar.sync 0;"
     " st.shared.b32 [%r3], 0; wgmma.wait_group.sync.aligned 0;", "race on shared memory",
     "wgmma.mma"),
    ("tile overwritten after the wait", WAIT, WAIT + " st.shared.b32 [%r3], 0;",
     "race on shared memory", "st.shared"),
    ("tile overwritten after a barrier", WAIT, WAIT + " bar.sync 0; @%p2 st.shared.b32 [%r3], 0;",
     None, ""),
]  # fmt: skip


@pytest.mark.parametrize("what,old,new,kind,line", DISORDER, ids=[d[0] for d in DISORDER])
def test_wgmma_out_of_order_is_reported(
    what: str, old: str, new: str, kind: str | None, line: str
) -> None:
    text = wgmma_kernel(64, "bf16", 128, False, False).replace(
        "mov.u32 %r1, %tid.x;", "mov.u32 %r1, %tid.x; setp.eq.u32 %p2, %r1, 0;"
    )
    assert old in text
    A, B = np.ones((64, 16), ml_dtypes.bfloat16), np.ones((16, 64), ml_dtypes.bfloat16)
    args = [np.zeros((128, 32), np.float32), *wgmma_tiles(A, B, 128, False, False)]
    assert emulate(Module.from_ptx(text), 1, 128, args).ok
    for seed in range(3):
        result = emulate(
            Module.from_ptx(text.replace(old, new)), 1, 128, args, strict=False, seed=seed
        )
        if kind is None:
            assert result.ok, str(result)
        else:
            found = [r for r in result.reports if r.kind == kind]
            # A race has two ends, and which of them comes second is the order's choice.
            source = text.replace(old, new).split("\n")
            ends = [int(x) for r in found for x in re.findall(r"PTX line (\d+)", str(r))]
            assert any(line in source[x - 1] for x in ends), f"{what}: {result}"


def test_mma_of_part_of_a_warp_is_reported() -> None:
    module = mma_kernel("m16n8k16", "f16", "f16", "f32", 4, 2, 4)
    half = [
        np.zeros((32, 8), np.float16),
        np.zeros((32, 4), np.float16),
        np.zeros((32, 4), np.float32),
    ]
    with pytest.raises(KernelError, match="not all lanes of the warp"):
        emulate(module, 1, 16, [np.zeros((32, 4), np.float32), *half])
