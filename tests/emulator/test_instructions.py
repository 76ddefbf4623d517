"""Every instruction against an oracle that is not the emulator (ptx_oracle, ml_dtypes, NumPy)."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import ptx_oracle as oracle
import pytest
from ptx_kernels import inputs, run_elementwise
from ptx_oracle import UINT, WIDTH

pytest.importorskip("qlora_kernels.emulator.engine").library()


def check(
    instruction: str,
    out: str,
    ins: list[str],
    expected,
    n: int = 1024,
    same_nan: bool = False,
    target: str = "sm_90a",
    ranges: dict | None = None,
) -> None:
    arrays = inputs(ins, n)
    for k, f in (ranges or {}).items():
        arrays[k] = f(arrays[k])
    got = run_elementwise(instruction, out, ins, arrays, target)
    want = np.asarray(expected(*arrays)).astype(got.dtype)
    if same_nan:
        f = {64: np.float64, 32: np.float32}[WIDTH[out]]
        both = np.isnan(got.view(f)) & np.isnan(want.view(f))
        got, want = got[~both], want[~both]
        arrays = [a[~both] for a in arrays]
    bad = np.flatnonzero(got != want)
    if bad.size:
        k = bad[0]
        words = ", ".join(f"{int(a[k]):#x}" for a in arrays)
        raise AssertionError(
            f"{instruction}: {bad.size} of {n} differ; ({words}) gave {int(got[k]):#x}, expected "
            f"{int(want[k]):#x}"
        )


def integer_cases():
    i = oracle.integer
    for t in ("u16", "s16", "u32", "s32", "u64", "s64"):
        w = WIDTH[t]
        yield f"add.{t} {{d}}, {{a}}, {{b}};", t, [t, t], i(lambda a, b: a + b, t)
        yield f"sub.{t} {{d}}, {{a}}, {{b}};", t, [t, t], i(lambda a, b: a - b, t)
        yield f"mul.lo.{t} {{d}}, {{a}}, {{b}};", t, [t, t], i(lambda a, b: a * b, t)
        yield f"mul.hi.{t} {{d}}, {{a}}, {{b}};", t, [t, t], i(lambda a, b, w=w: a * b >> w, t)
        yield (
            f"mad.lo.{t} {{d}}, {{a}}, {{b}}, {{c}};",
            t,
            [t, t, t],
            i(lambda a, b, c: a * b + c, t),
        )
        yield (
            f"mad.hi.{t} {{d}}, {{a}}, {{b}}, {{c}};",
            t,
            [t, t, t],
            i(lambda a, b, c, w=w: (a * b >> w) + c, t),
        )
        yield f"min.{t} {{d}}, {{a}}, {{b}};", t, [t, t], i(min, t)
        yield f"max.{t} {{d}}, {{a}}, {{b}};", t, [t, t], i(max, t)
        yield (
            f"sad.{t} {{d}}, {{a}}, {{b}}, {{c}};",
            t,
            [t, t, t],
            i(lambda a, b, c: abs(a - b) + c, t),
        )
        yield (
            f"div.{t} {{d}}, {{a}}, {{b}};",
            t,
            [t, t],
            i(lambda a, b: abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1) if b else -1, t),
        )
        yield (
            f"rem.{t} {{d}}, {{a}}, {{b}};",
            t,
            [t, t],
            i(lambda a, b: (abs(a) % abs(b)) * (-1 if a < 0 else 1) if b else a, t),
        )
        b = "b" + t[1:]
        if t[0] == "u":
            yield f"and.{b} {{d}}, {{a}}, {{b}};", t, [t, t], i(lambda x, y: x & y, t)
            yield f"or.{b} {{d}}, {{a}}, {{b}};", t, [t, t], i(lambda x, y: x | y, t)
            yield f"xor.{b} {{d}}, {{a}}, {{b}};", t, [t, t], i(lambda x, y: x ^ y, t)
            yield f"not.{b} {{d}}, {{a}};", t, [t], i(lambda x: ~x, t)
            yield f"cnot.{b} {{d}}, {{a}};", t, [t], i(lambda x: int(x == 0), t)
        else:
            yield f"abs.{t} {{d}}, {{a}};", t, [t], i(abs, t)
            yield f"neg.{t} {{d}}, {{a}};", t, [t], i(lambda x: -x, t)
        for name in ("eq", "ne", "lt", "le", "gt", "ge"):
            yield f"setp.{name}.{t} {{d}}, {{a}}, {{b}};", "pred", [t, t], oracle.compare(name, t)
    for name in ("lo", "ls", "hi", "hs"):
        yield (
            f"setp.{name}.u32 {{d}}, {{a}}, {{b}};",
            "pred",
            ["u32", "u32"],
            oracle.compare(name, "u32"),
        )
    for t, wide in (("u16", "u32"), ("s16", "s32"), ("u32", "u64"), ("s32", "s64")):
        yield f"mul.wide.{t} {{d}}, {{a}}, {{b}};", wide, [t, t], i(lambda a, b: a * b, t, wide)

        def mad(a, b, c, t=t, wide=wide):
            s = [oracle.signed(v, WIDTH[t]) if t[0] == "s" else v for v in (a, b)]
            return s[0] * s[1] + c

        yield (
            f"mad.wide.{t} {{d}}, {{a}}, {{b}}, {{c}};",
            wide,
            [t, t, wide],
            oracle.lanes(mad, WIDTH[wide]),
        )
    for w in (16, 32, 64):
        for t in (f"b{w}", f"u{w}", f"s{w}"):

            def left(a, n, w=w):
                return a << n if n < w else 0

            def right(a, n, t=t, w=w):
                x = oracle.signed(a, w) if t[0] == "s" else a
                return x >> min(n, w - 1 if t[0] == "s" else 2 * w)

            if t[0] == "b":
                yield f"shl.{t} {{d}}, {{a}}, {{b}};", t, [t, "u32"], oracle.lanes(left, w)
            yield f"shr.{t} {{d}}, {{a}}, {{b}};", t, [t, "u32"], oracle.lanes(right, w)
    for t in ("u32", "s32", "u64", "s64"):
        yield f"bfe.{t} {{d}}, {{a}}, {{b}}, {{c}};", t, [t, "u32", "u32"], oracle.bfe(t)
        yield f"bfind.{t} {{d}}, {{a}};", "u32", [t], oracle.bfind(t, False)
        yield f"bfind.shiftamt.{t} {{d}}, {{a}};", "u32", [t], oracle.bfind(t, True)
    for t in ("b32", "b64"):
        w = WIDTH[t]
        yield f"bfi.{t} {{d}}, {{a}}, {{b}}, {{c}}, {{e}};", t, [t, t, "u32", "u32"], oracle.bfi(t)
        yield f"popc.{t} {{d}}, {{a}};", "u32", [t], i(lambda x: bin(x).count("1"), t, "u32")
        yield f"clz.{t} {{d}}, {{a}};", "u32", [t], i(lambda x, w=w: w - x.bit_length(), t, "u32")
        yield f"brev.{t} {{d}}, {{a}};", t, [t], i(lambda x, w=w: int(f"{x:0{w}b}"[::-1], 2), t)
    for side in "lr":
        for mode in ("wrap", "clamp"):

            def funnel(a, b, n, side=side, mode=mode):
                n = n & 31 if mode == "wrap" else min(n, 32)
                x = b << 32 | a
                return (x << n) >> 32 if side == "l" else x >> n

            yield (
                f"shf.{side}.{mode}.b32 {{d}}, {{a}}, {{b}}, {{c}};",
                "b32",
                ["b32"] * 3,
                oracle.lanes(funnel, 32),
            )
    for mode in ("", "f4e", "b4e", "rc8", "ecl", "ecr", "rc16"):
        name = "prmt.b32" + (f".{mode}" if mode else "")
        yield f"{name} {{d}}, {{a}}, {{b}}, {{c}};", "b32", ["b32"] * 3, oracle.prmt(mode)
    for ta in ("u32", "s32"):
        for tb in ("u32", "s32"):
            yield (
                f"dp4a.{ta}.{tb} {{d}}, {{a}}, {{b}}, {{c}};",
                "b32",
                ["b32"] * 3,
                oracle.dot(ta, tb, 4),
            )
            yield (
                f"dp2a.lo.{ta}.{tb} {{d}}, {{a}}, {{b}}, {{c}};",
                "b32",
                ["b32"] * 3,
                oracle.dot(ta, tb, 2),
            )
            yield (
                f"dp2a.hi.{ta}.{tb} {{d}}, {{a}}, {{b}}, {{c}};",
                "b32",
                ["b32"] * 3,
                oracle.dot(ta, tb, 2, 2),
            )

    def clamp(x):
        return min(max(x, -(2**31)), 2**31 - 1)

    yield "add.sat.s32 {d}, {a}, {b};", "s32", ["s32"] * 2, i(lambda a, b: clamp(a + b), "s32")
    yield "sub.sat.s32 {d}, {a}, {b};", "s32", ["s32"] * 2, i(lambda a, b: clamp(a - b), "s32")
    yield (
        "mul24.lo.u32 {d}, {a}, {b};",
        "u32",
        ["u32"] * 2,
        i(lambda a, b: (a & 0xFFFFFF) * (b & 0xFFFFFF), "u32"),
    )
    yield (
        "mul24.lo.s32 {d}, {a}, {b};",
        "s32",
        ["s32"] * 2,
        i(lambda a, b: oracle.signed(a, 24) * oracle.signed(b, 24), "s32"),
    )
    # 64-bit sums and products from 32-bit halves, through the carry
    yield (
        "{{ .reg .b32 lo, hi, x, y, z, w; mov.b64 {{x, y}}, {a}; mov.b64 {{z, w}}, {b}; "
        "add.cc.u32 lo, x, z; "
        "addc.u32 hi, y, w; mov.b64 {d}, {{lo, hi}}; }}",
        "u64",
        ["u64"] * 2,
        i(lambda a, b: a + b, "u64"),
    )
    yield (
        "{{ .reg .b32 lo, hi, x, y, z, w; mov.b64 {{x, y}}, {a}; mov.b64 {{z, w}}, {b}; "
        "sub.cc.u32 lo, x, z; "
        "subc.u32 hi, y, w; mov.b64 {d}, {{lo, hi}}; }}",
        "u64",
        ["u64"] * 2,
        i(lambda a, b: a - b, "u64"),
    )
    yield (
        "{{ .reg .b32 r0, r1; mul.lo.u32 r0, {a}, {b}; mad.lo.cc.u32 r0, {a}, {b}, {a}; "
        "madc.hi.u32 r1, {a}, {b}, 0; "
        "mov.b64 {d}, {{r0, r1}}; }}",
        "u64",
        ["u32"] * 2,
        oracle.lanes(lambda a, b: a * b + a, 64),
    )
    for op, f in (("min", min), ("max", max)):
        for t in ("u16x2", "s16x2"):
            half = oracle.integer(f, t[:3])
            yield (
                f"{op}.{t} {{d}}, {{a}}, {{b}};".replace("u16x2", "u16x2"),
                "b32",
                ["b32"] * 2,
                oracle.pairs(half),
            )
    yield (
        "mov.b32 {d}, {{{a}, {b}}};",
        "b32",
        ["b16", "b16"],
        lambda a, b: a.astype(np.uint32) | b.astype(np.uint32) << np.uint32(16),
    )
    yield (
        "{{ .reg .b16 x, y; mov.b32 {{x, y}}, {a}; mov.b32 {d}, {{y, x}}; }}",
        "b32",
        ["b32"],
        lambda a: a >> np.uint32(16) | a << np.uint32(16),
    )
    yield (
        "{{ .reg .b16 x, y, z, w; mov.b64 {{x, y, z, w}}, {a}; mov.b64 {d}, {{w, z, y, x}}; }}",
        "b64",
        ["b64"],
        i(lambda a: sum((a >> 16 * k & 0xFFFF) << 16 * (3 - k) for k in range(4)), "b64"),
    )
    yield (
        "slct.u32.s32 {d}, {a}, {b}, {c};",
        "u32",
        ["u32", "u32", "s32"],
        lambda a, b, c: np.where(c >> 31 == 0, a, b),
    )
    yield (
        "{{ .reg .pred p, q; setp.lt.u32 p|q, {a}, {b}; selp.u32 {d}, {a}, {b}, q; }}",
        "u32",
        ["u32"] * 2,
        np.maximum,
    )
    yield (
        "{{ .reg .pred p, q; setp.eq.u32 p, {a}, {b}; setp.lt.and.u32 q, {a}, 100, !p; selp.u32 "
        "{d}, 1, 0, q; }}",
        "u32",
        ["u32"] * 2,
        lambda a, b: ((a < 100) & (a != b)).astype(np.uint32),
    )
    yield (
        "set.lt.u32.s32 {d}, {a}, {b};",
        "u32",
        ["s32"] * 2,
        lambda a, b: np.where(a.view(np.int32) < b.view(np.int32), 0xFFFFFFFF, 0).astype(np.uint32),
    )
    for table in (0x00, 0x01, 0x3C, 0x78, 0x80, 0x96, 0xCA, 0xE8, 0xEA, 0xFF):
        yield (
            f"lop3.b32 {{d}}, {{a}}, {{b}}, {{c}}, {table};",
            "b32",
            ["b32"] * 3,
            oracle.lop3(table),
        )
    for to in ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"):
        for frm in ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"):
            if to == frm:
                continue
            out = {"u8": "u32", "s8": "s32"}.get(to, to)
            inp = {"u8": "u32", "s8": "s32"}.get(frm, frm)

            def cut(a, frm=frm, to=to):
                x = a & (1 << WIDTH[frm]) - 1
                x = oracle.signed(x, WIDTH[frm]) if frm[0] == "s" else x
                x &= (1 << WIDTH[to]) - 1
                return oracle.signed(x, WIDTH[to]) if to[0] == "s" else x

            def sat(a, frm=frm, to=to):
                x = a & (1 << WIDTH[frm]) - 1
                x = oracle.signed(x, WIDTH[frm]) if frm[0] == "s" else x
                lo, hi = (
                    (-(1 << WIDTH[to] - 1), (1 << WIDTH[to] - 1) - 1)
                    if to[0] == "s"
                    else (0, (1 << WIDTH[to]) - 1)
                )
                return min(max(x, lo), hi)

            yield f"cvt.{to}.{frm} {{d}}, {{a}};", out, [inp], oracle.lanes(cut, WIDTH[out])
            yield f"cvt.sat.{to}.{frm} {{d}}, {{a}};", out, [inp], oracle.lanes(sat, WIDTH[out])


def float_cases():
    for op, n in (("add", 2), ("sub", 2), ("mul", 2), ("fma", 3)):
        names = ", ".join(["{a}", "{b}", "{c}"][:n])
        for mode in ("rn", "rz", "rm", "rp"):
            for ftz in (False, True):
                f = ".ftz" if ftz else ""
                yield (
                    f"{op}.{mode}{f}.f32 {{d}}, {names};",
                    "f32",
                    ["f32"] * n,
                    oracle.arithmetic(op, "f32", mode, ftz),
                    False,
                )
            yield (
                f"{op}.{mode}.f64 {{d}}, {names};",
                "f64",
                ["f64"] * n,
                oracle.arithmetic(op, "f64", mode),
                True,
            )
        yield (
            f"{op}.rn.sat.f32 {{d}}, {names};",
            "f32",
            ["f32"] * n,
            oracle.arithmetic(op, "f32", sat=True),
            False,
        )
        rn = ".rn" if op == "fma" else ""
        for t in ("f16", "bf16"):
            one = oracle.arithmetic(op, t)
            yield f"{op}{rn}.{t} {{d}}, {names};", t, [t] * n, one, False
            yield (
                f"{op}{rn}.{t}x2 {{d}}, {names};",
                f"{t}x2",
                [f"{t}x2"] * n,
                oracle.pairs(one),
                False,
            )
        yield (
            f"{op}{rn}.ftz.f16 {{d}}, {names};",
            "f16",
            ["f16"] * n,
            oracle.arithmetic(op, "f16", ftz=True),
            False,
        )
        yield (
            f"{op}{rn}.sat.f16 {{d}}, {names};",
            "f16",
            ["f16"] * n,
            oracle.arithmetic(op, "f16", sat=True),
            False,
        )
        if op != "sub":
            yield (
                f"{op}.rn.f32x2 {{d}}, {names};",
                "f32x2",
                ["f32x2"] * n,
                oracle.pairs(oracle.arithmetic(op, "f32"), 64),
                False,
            )
    yield (
        "fma.rn.relu.f16 {d}, {a}, {b}, {c};",
        "f16",
        ["f16"] * 3,
        oracle.arithmetic("fma", "f16", relu=True),
        False,
    )
    for op in ("min", "max"):
        big = op == "max"
        for nan in (False, True):
            s = ".NaN" if nan else ""
            yield (
                f"{op}{s}.f32 {{d}}, {{a}}, {{b}};",
                "f32",
                ["f32"] * 2,
                oracle.minmax("f32", big, nan),
                True,
            )
            yield (
                f"{op}.ftz{s}.f32 {{d}}, {{a}}, {{b}};",
                "f32",
                ["f32"] * 2,
                oracle.minmax("f32", big, nan, True),
                True,
            )
            for t in ("f16", "bf16"):
                yield (
                    f"{op}{s}.{t} {{d}}, {{a}}, {{b}};",
                    t,
                    [t] * 2,
                    oracle.minmax(t, big, nan),
                    False,
                )
                yield (
                    f"{op}{s}.{t}x2 {{d}}, {{a}}, {{b}};",
                    f"{t}x2",
                    [f"{t}x2"] * 2,
                    oracle.pairs(oracle.minmax(t, big, nan)),
                    False,
                )
        yield f"{op}.f64 {{d}}, {{a}}, {{b}};", "f64", ["f64"] * 2, oracle.minmax("f64", big), True
    for mode in ("rn", "rz", "rm", "rp"):
        yield (
            f"div.{mode}.f32 {{d}}, {{a}}, {{b}};",
            "f32",
            ["f32"] * 2,
            oracle.divide("f32", mode),
            False,
        )
        yield (
            f"div.{mode}.f64 {{d}}, {{a}}, {{b}};",
            "f64",
            ["f64"] * 2,
            oracle.divide("f64", mode),
            True,
        )
        yield (
            f"sqrt.{mode}.f32 {{d}}, {{a}};",
            "f32",
            ["f32"],
            oracle.square_root("f32", mode),
            False,
        )
    yield "div.rn.ftz.f32 {d}, {a}, {b};", "f32", ["f32"] * 2, oracle.divide("f32", ftz=True), False
    yield (
        "sqrt.rn.f64 {d}, {a};",
        "f64",
        ["f64"],
        lambda a: np.sqrt(a.view(np.float64)).view(np.uint64),
        True,
    )
    one = {"f32": 0x3F800000, "f64": 0x3FF0000000000000}
    for t in ("f32", "f64"):
        div = oracle.divide(t)
        yield (
            f"rcp.rn.{t} {{d}}, {{a}};",
            t,
            [t],
            lambda a, t=t, div=div: div(np.full_like(a, one[t]), a),
            t == "f64",
        )
    for t in ("f32", "f64", "f16", "bf16"):
        top = 1 << WIDTH[t] - 1
        yield (
            f"neg.{t} {{d}}, {{a}};",
            t,
            [t],
            oracle.lanes(lambda a, top=top: a ^ top, WIDTH[t]),
            t == "f64" or t == "f32",
        )
        yield (
            f"abs.{t} {{d}}, {{a}};",
            t,
            [t],
            oracle.lanes(lambda a, top=top: a & ~top, WIDTH[t]),
            t == "f64" or t == "f32",
        )
        for name in (
            "eq",
            "ne",
            "lt",
            "le",
            "gt",
            "ge",
            "equ",
            "neu",
            "ltu",
            "leu",
            "gtu",
            "geu",
            "num",
            "nan",
        ):
            yield (
                f"setp.{name}.{t} {{d}}, {{a}}, {{b}};",
                "pred",
                [t, t],
                oracle.compare(name, t),
                False,
            )
    yield (
        "setp.lt.ftz.f32 {d}, {a}, {b};",
        "pred",
        ["f32"] * 2,
        oracle.compare("lt", "f32", True),
        False,
    )
    yield (
        "copysign.f32 {d}, {a}, {b};",
        "f32",
        ["f32"] * 2,
        lambda a, b: (a & np.uint32(1 << 31)) | (b & np.uint32(0x7FFFFFFF)),
        False,
    )


def conversion_cases():
    for to in ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"):
        out = {"u8": "u32", "s8": "s32"}.get(to, to)
        for frm in ("f32", "f64", "f16", "bf16"):
            if frm in ("bf16",) and to in ("u8", "s8"):
                continue
            for mode in ("rni", "rzi", "rmi", "rpi"):
                plain = oracle.to_int(frm, to, mode)

                def wide(a, plain=plain, to=to, out=out):
                    r = plain(a)
                    return (
                        r.astype(f"i{WIDTH[to] // 8}").astype(UINT[WIDTH[out]])
                        if to[0] == "s"
                        else r.astype(UINT[WIDTH[out]])
                    )

                yield f"cvt.{mode}.{to}.{frm} {{d}}, {{a}};", out, [frm], wide, False
    for frm in ("u16", "s16", "u32", "s32", "u64", "s64"):
        for to in ("f32", "f64", "f16", "bf16"):
            for mode in ("rn", "rz", "rm", "rp"):
                yield (
                    f"cvt.{mode}.{to}.{frm} {{d}}, {{a}};",
                    to,
                    [frm],
                    oracle.from_int(frm, to, mode),
                    False,
                )
    for mode in ("rn", "rz", "rm", "rp"):
        yield (
            f"cvt.{mode}.f32.f64 {{d}}, {{a}};",
            "f32",
            ["f64"],
            oracle.convert("f64", "f32", mode),
            False,
        )
        yield (
            f"cvt.{mode}.f16.f64 {{d}}, {{a}};",
            "f16",
            ["f64"],
            oracle.convert("f64", "f16", mode),
            False,
        )
    for to in ("f16", "bf16"):
        for mode in ("rn", "rz"):
            yield (
                f"cvt.{mode}.{to}.f32 {{d}}, {{a}};",
                to,
                ["f32"],
                oracle.convert("f32", to, mode),
                False,
            )
            one = oracle.convert("f32", to, mode)
            yield (
                f"cvt.{mode}.{to}x2.f32 {{d}}, {{a}}, {{b}};",
                "b32",
                ["f32"] * 2,
                lambda a, b, one=one: (
                    one(a).astype(np.uint32) << np.uint32(16) | one(b).astype(np.uint32)
                ),
                False,
            )
            relu = oracle.convert("f32", to, mode, relu=True)
            yield f"cvt.{mode}.relu.{to}.f32 {{d}}, {{a}};", to, ["f32"], relu, False
    yield (
        "cvt.rn.ftz.f16.f32 {d}, {a};",
        "f16",
        ["f32"],
        oracle.convert("f32", "f16", ftz=True),
        False,
    )
    yield "cvt.sat.f32.f32 {d}, {a};", "f32", ["f32"], oracle.convert("f32", "f32", sat=True), False
    for mode in ("rni", "rzi", "rmi", "rpi"):
        yield (
            f"cvt.{mode}.f32.f32 {{d}}, {{a}};",
            "f32",
            ["f32"],
            oracle.integral("f32", mode),
            False,
        )
        yield (
            f"cvt.{mode}.f64.f64 {{d}}, {{a}};",
            "f64",
            ["f64"],
            oracle.integral("f64", mode),
            True,
        )
        yield (
            f"cvt.{mode}.f16.f16 {{d}}, {{a}};",
            "f16",
            ["f16"],
            oracle.integral("f16", mode),
            False,
        )
    yield "cvt.f64.f32 {d}, {a};", "f64", ["f32"], oracle.convert("f32", "f64"), True

    def tf32(mode):
        def one(a):
            r = oracle.round_to(oracle.value(a, "f32"), "tf32", mode, a >> 31 == 1, nan=0x3FFFF)
            return r << 13

        return oracle.lanes(one, 32)

    for mode in ("rna", "rn", "rz"):
        yield f"cvt.{mode}.tf32.f32 {{d}}, {{a}};", "b32", ["f32"], tf32(mode), False

    def fp8(dtype, top, nan):
        """ml_dtypes rounds to nearest even; PTX clamps what is too large and has one NaN."""

        def f(a):
            x = a.view(np.float32)
            with np.errstate(all="ignore"):
                y = np.clip(x, -top, top).astype(dtype).view(np.uint8)
            return np.where(np.isnan(x), np.uint8(nan), y)

        return f

    for name, dtype, top, nan in (
        ("e4m3x2", ml_dtypes.float8_e4m3fn, 448, 0x7F),
        ("e5m2x2", ml_dtypes.float8_e5m2, 57344, 0x7F),
    ):
        one = fp8(dtype, top, nan)
        yield (
            f"cvt.rn.satfinite.{name}.f32 {{d}}, {{a}}, {{b}};",
            "b16",
            ["f32"] * 2,
            lambda a, b, one=one: (
                one(a).astype(np.uint16) << np.uint16(8) | one(b).astype(np.uint16)
            ),
            False,
        )


INTEGER = {c[0]: c for c in integer_cases()}
FLOAT = {c[0]: c for c in [*float_cases(), *conversion_cases()]}


@pytest.mark.parametrize("name", INTEGER)
def test_integer(name: str) -> None:
    instruction, out, ins, expected = INTEGER[name]
    small = {}
    if name.startswith(("bfe", "bfi", "shl", "shr", "shf")):  # the counts: small ones matter most
        first = {"bfi": 2, "shf": 2}.get(name[:3], 1)
        for k in range(first, len(ins)):
            small[k] = lambda x: np.where(np.arange(x.size) % 4 == 0, x, x % np.uint32(70)).astype(
                x.dtype
            )
    check(instruction, out, ins, expected, n=512, ranges=small)


@pytest.mark.parametrize("name", FLOAT)
def test_float(name: str) -> None:
    instruction, out, ins, expected, same_nan = FLOAT[name]
    check(
        instruction,
        out,
        ins,
        expected,
        n=512,
        same_nan=same_nan and out in ("f32", "f64"),
        target="sm_100a" if "f32x2" in name else "sm_90a",
    )


@pytest.mark.parametrize("to", ["f32", "f64"])
@pytest.mark.parametrize("frm,dtype", [("f16", np.float16), ("bf16", ml_dtypes.bfloat16)])
def test_every_half_to_float(frm: str, dtype: type, to: str) -> None:
    a = np.arange(1 << 16, dtype=np.uint16)
    got = run_elementwise(f"cvt.{to}.{frm} {{d}}, {{a}};", to, [frm], [a])
    f = {"f32": np.float32, "f64": np.float64}[to]
    want = a.view(dtype).astype(f)
    nan = np.isnan(want)
    assert np.array_equal(got.view(f)[~nan].view(got.dtype), want[~nan].view(got.dtype))
    assert np.isnan(got.view(f)[nan]).all()


@pytest.mark.parametrize("frm,dtype", [("f16", np.float16), ("bf16", ml_dtypes.bfloat16)])
@pytest.mark.parametrize("op", ["add", "add.rz", "sub.rn", "fma.rn", "fma.rm"])
def test_mixed_precision_is_f32s_on_what_was_converted(op: str, frm: str, dtype: type) -> None:
    narrow = [frm] * (2 if op.startswith("fma") else 1)
    arrays = inputs([*narrow, "f32"], 1024)
    words = ", ".join("{" + x + "}" for x in "dabc"[: len(arrays) + 1])
    mixed = f"{op}.f32.{frm} {words};"
    got = run_elementwise(mixed, "f32", [*narrow, "f32"], arrays, "sm_100a")
    wide = [a.view(dtype).astype(np.float32).view(np.uint32) for a in arrays[:-1]]
    want = run_elementwise(f"{op}.f32 {words};", "f32", ["f32"] * len(arrays), [*wide, arrays[-1]])
    nan = np.isnan(want.view(np.float32))
    assert np.array_equal(got[~nan], want[~nan]) and np.isnan(got.view(np.float32)[nan]).all()
    assert 0 < nan.sum() < 512


@pytest.mark.parametrize(
    "name,dtype", [("e4m3x2", ml_dtypes.float8_e4m3fn), ("e5m2x2", ml_dtypes.float8_e5m2)]
)
def test_every_fp8_to_half(name: str, dtype: type) -> None:
    a = np.arange(1 << 16, dtype=np.uint16)
    got = run_elementwise(f"cvt.rn.f16x2.{name} {{d}}, {{a}};", "b32", ["b16"], [a]).view(
        np.float16
    )
    with np.errstate(all="ignore"):
        want = a.view(np.uint8).view(dtype).astype(np.float16)
    assert np.array_equal(got, want, equal_nan=True)


@pytest.mark.parametrize("name,dtype", [("f16", np.float16), ("bf16", ml_dtypes.bfloat16)])
def test_float_to_half_around_every_value(name: str, dtype: type) -> None:
    """Every half, and what lies just below, on and above the middle to the next."""
    h = (
        np.arange(0x7C00 if name == "f16" else 0x7F80, dtype=np.uint16)
        .view(dtype)
        .astype(np.float32)
    )
    mid = ((h[:-1].astype(np.float64) + h[1:].astype(np.float64)) / 2).astype(np.float32)
    x = np.concatenate(
        [h, mid, np.nextafter(mid, np.float32(0)), np.nextafter(mid, np.float32(np.inf))]
    )
    x = np.concatenate([x, -x])
    x = np.concatenate([x, np.zeros(-x.size % 64, np.float32)])
    got = run_elementwise(f"cvt.rn.{name}.f32 {{d}}, {{a}};", name, ["f32"], [x.view(np.uint32)])
    assert np.array_equal(got, x.astype(dtype).view(np.uint16))


APPROXIMATE = {
    # instruction: (exact function, largest relative error, largest absolute error, smallest and
    # largest input)
    "ex2.approx.f32": (np.exp2, 2.0**-22, 0, -126, 127.9),
    "ex2.approx.ftz.f32": (np.exp2, 2.0**-22, 0, -126, 127.9),
    "rcp.approx.f32": (lambda x: 1 / x, 2.0**-23, 0, 1e-37, 1e37),
    "rsqrt.approx.f32": (lambda x: 1 / np.sqrt(x), 2.0**-22.9, 0, 1e-37, 3e38),
    "sqrt.approx.f32": (np.sqrt, 2.0**-23, 0, 1e-37, 3e38),
    "lg2.approx.f32": (np.log2, 2.0**-22, 2.0**-22, 1e-37, 3e38),
    "sin.approx.f32": (np.sin, 0, 2.0**-20.5, -math.pi, math.pi),
    "cos.approx.f32": (np.cos, 0, 2.0**-20.5, -math.pi, math.pi),
    "tanh.approx.f32": (np.tanh, 2.0**-11, 0, -8, 8),
}


@pytest.mark.parametrize("name", APPROXIMATE)
def test_approximate_within_ptx_bounds(name: str) -> None:
    f, relative, absolute, low, high = APPROXIMATE[name]
    rng = np.random.default_rng(1)
    if low > 0:
        x = np.exp2(rng.uniform(math.log2(low), math.log2(high), 8192))
    else:
        x = rng.uniform(low, high, 8192)
    x = x.astype(np.float32)
    got = run_elementwise(f"{name} {{d}}, {{a}};", "f32", ["f32"], [x.view(np.uint32)]).view(
        np.float32
    )
    want = f(x.astype(np.float64))
    assert (np.abs(got - want) <= relative * np.abs(want) + absolute + 1e-45).all()


@pytest.mark.parametrize(
    "name,x,want",
    [
        (
            "ex2.approx.ftz.f32",
            [-math.inf, math.inf, -0.0, 0.0, -200, 200],
            [0, math.inf, 1, 1, 0, math.inf],
        ),
        (
            "rcp.approx.ftz.f32",
            [-math.inf, math.inf, -0.0, 0.0, 3e38, 1],
            [-0.0, 0.0, -math.inf, math.inf, 0, 1],
        ),
        (
            "rsqrt.approx.f32",
            [math.inf, -1.0, -0.0, 0.0, 4.0, 1.0],
            [0, math.nan, -math.inf, math.inf, 0.5, 1],
        ),
        (
            "lg2.approx.f32",
            [0.0, -1.0, 1.0, math.inf, 8.0, 0.5],
            [-math.inf, math.nan, 0, math.inf, 3, -1],
        ),
    ],
)
def test_approximate_special_values(name: str, x: list[float], want: list[float]) -> None:
    a = np.resize(np.array(x, np.float32), 32)
    got = run_elementwise(f"{name} {{d}}, {{a}};", "f32", ["f32"], [a.view(np.uint32)]).view(
        np.float32
    )
    expected = np.resize(np.array(want, np.float32), 32)
    if ".ftz" in name and "rcp" in name:
        expected[np.isclose(a, 3e38)] = 0
    assert np.array_equal(got, expected, equal_nan=True)
    assert np.array_equal(
        np.signbit(got[~np.isnan(got)]), np.signbit(expected[~np.isnan(expected)])
    )


def test_division_approximations() -> None:
    rng = np.random.default_rng(2)
    a, b = (np.exp2(rng.uniform(-60, 60, 4096)).astype(np.float32) for _ in range(2))
    for name in ("div.approx.f32", "div.full.f32"):
        got = run_elementwise(
            f"{name} {{d}}, {{a}}, {{b}};",
            "f32",
            ["f32"] * 2,
            [a.view(np.uint32), b.view(np.uint32)],
        )
        want = a.astype(np.float64) / b
        assert (np.abs(got.view(np.float32) - want) <= 2 * 2.0**-23 * np.abs(want)).all()


def test_every_lop3_table() -> None:
    a, b, c = inputs(["b32"] * 3, 64)
    for table in range(256):
        got = run_elementwise(
            f"lop3.b32 {{d}}, {{a}}, {{b}}, {{c}}, {table};", "b32", ["b32"] * 3, [a, b, c]
        )
        assert np.array_equal(got, oracle.lop3(table)(a, b, c)), hex(table)
