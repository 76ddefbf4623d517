"""What PTX instructions mean, in plain NumPy: slow, and written without a look at the engine.

Each function takes bit patterns (unsigned integers of the operand's width, a lane an element) and
returns bit patterns. Floating point goes through float64, whose results are rounded once by
`round_to`, or through integers; `ml_dtypes` is the second opinion on bf16 and the 8-bit formats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np

WIDTH = {
    "b8": 8,
    "u8": 8,
    "s8": 8,
    "b16": 16,
    "u16": 16,
    "s16": 16,
    "f16": 16,
    "bf16": 16,
    "b32": 32,
    "u32": 32,
    "s32": 32,
    "f32": 32,
    "f16x2": 32,
    "bf16x2": 32,
    "tf32": 32,
    "b64": 64,
    "u64": 64,
    "s64": 64,
    "f64": 64,
    "f32x2": 64,
    "e4m3x2": 16,
    "e5m2x2": 16,
    "pred": 32,
}
UINT = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
FORMATS = {
    "f16": (11, -14, 15, 16),
    "bf16": (8, -126, 127, 16),
    "f32": (24, -126, 127, 32),
    "f64": (53, -1022, 1023, 64),
    "tf32": (11, -126, 127, 19),
    "e5m2": (3, -14, 15, 8),
}
NAN = {"f32": 0x7FFFFFFF, "f16": 0x7FFF, "bf16": 0x7FFF}


def signed(x: int, width: int) -> int:
    x &= (1 << width) - 1
    return x - (1 << width) if x >> (width - 1) else x


def value(bits: int, kind: str) -> float | Fraction:
    """A floating-point bit pattern exactly, as a Fraction; NaN and infinities as floats."""
    p, emin, _, width = FORMATS[kind]
    sign = -1 if bits >> (width - 1) else 1
    e = (bits >> (p - 1)) & ((1 << (width - p)) - 1)
    m = bits & ((1 << (p - 1)) - 1)
    if e == (1 << (width - p)) - 1:
        return math.nan if m else sign * math.inf
    if e == 0:
        return sign * Fraction(m) * Fraction(2) ** (emin - p + 1)
    return sign * Fraction(m | 1 << (p - 1)) * Fraction(2) ** (e - 1 + emin - p + 1)


def is_negative(bits: int, kind: str) -> bool:
    return bool(bits >> (FORMATS[kind][3] - 1))


def round_to(
    x: Fraction | float,
    kind: str,
    mode: str = "rn",
    negative_zero: bool = False,
    nan: int | None = None,
) -> int:
    """The bits of an exact value rounded once."""
    p, emin, emax, width = FORMATS[kind]
    if isinstance(x, float) and math.isnan(x):
        return NAN.get(kind, 0x7FF8000000000000) if nan is None else nan
    infinity = ((1 << (width - p)) - 1) << (p - 1)
    if isinstance(x, float) and math.isinf(x):
        return infinity | (1 << (width - 1) if x < 0 else 0)
    x = Fraction(x)
    sign = 1 << (width - 1) if x < 0 or (x == 0 and negative_zero) else 0
    negative, x = x < 0, abs(x)
    if x == 0:
        return sign
    e = max(x.numerator.bit_length() - x.denominator.bit_length(), emin - 1)
    while Fraction(2) ** (e + 1) <= x:
        e += 1
    while e > emin and Fraction(2) ** e > x:
        e -= 1
    e = max(e, emin)
    scaled = x / Fraction(2) ** (e - p + 1)
    q, rest = divmod(scaled.numerator, scaled.denominator)
    rest = Fraction(rest, scaled.denominator)
    up = {
        "rn": rest > Fraction(1, 2) or (rest == Fraction(1, 2) and q & 1),
        "rz": False,
        "rm": negative and rest > 0,
        "rp": not negative and rest > 0,
        "rna": rest >= Fraction(1, 2),
    }[mode]
    q += up
    if q == 1 << p:
        q, e = q >> 1, e + 1
    if e > emax:
        keep = mode == "rz" or (mode == "rm" and not negative) or (mode == "rp" and negative)
        return sign | (infinity - 1 if keep else infinity)
    if q < 1 << (p - 1):
        return sign | q
    return sign | ((e - emin + 1) << (p - 1)) + q - (1 << (p - 1))


def flush(bits: int, kind: str = "f32") -> int:
    p, _, _, width = FORMATS[kind]
    exponent = (bits >> (p - 1)) & ((1 << (width - p)) - 1)
    return bits & 1 << (width - 1) if exponent == 0 else bits


def saturate(bits: int, kind: str = "f32") -> int:
    v = value(bits, kind)
    if isinstance(v, float) and math.isnan(v):
        return 0
    if v <= 0:
        return 0
    return round_to(Fraction(1), kind) if v >= 1 else bits


def _arith(
    op: str, values: list[float | Fraction], bits: list[int], kind: str, mode: str
) -> tuple[float | Fraction, bool]:
    """The exact result of an operation, and whether a zero result is negative."""
    neg = [is_negative(b, kind) for b in bits]
    special = any(isinstance(v, float) for v in values)
    if op == "sub":
        values = [values[0], -values[1]]
        neg = [neg[0], not neg[1]]
        op = "add"
    if op == "add":
        a, b = values
        if special:
            return float(a if isinstance(a, float) else 0) + float(
                b if isinstance(b, float) else 0
            ), False
        r = a + b
        return r, (neg[0] and neg[1]) or (
            r == 0 and mode == "rm" and (neg[0] or neg[1] or a != 0)
        ) if r == 0 else False
    if op == "mul":
        a, b = values
        if special:
            if any(isinstance(v, float) and math.isnan(v) for v in values) or any(
                v == 0 for v in values
            ):
                return math.nan, False
            return -math.inf if neg[0] != neg[1] else math.inf, False
        return a * b, neg[0] != neg[1]
    if op == "fma":
        p, pneg = _arith("mul", values[:2], bits[:2], kind, mode)
        c = values[2]
        if isinstance(p, float) or isinstance(c, float):
            x = (p if isinstance(p, float) else 0.0) + (c if isinstance(c, float) else 0.0)
            return x, False
        r = p + c
        if r == 0:
            return r, (pneg and neg[2]) or (mode == "rm" and not (not pneg and not neg[2]))
        return r, False
    raise KeyError(op)


def arithmetic(
    op: str, kind: str, mode: str = "rn", ftz: bool = False, sat: bool = False, relu: bool = False
) -> Callable:
    """add, sub, mul, fma of one floating-point type, elementwise on bit patterns."""

    def one(*bits: int) -> int:
        bits = tuple(flush(b, kind) for b in bits) if ftz else bits
        values = [value(b, kind) for b in bits]
        x, negative = _arith(op, values, list(bits), kind, mode)
        r = round_to(x, kind, mode, negative)
        if ftz:
            r = flush(r, kind)
        if sat:
            r = saturate(r, kind)
        if relu and r >> (FORMATS[kind][3] - 1):
            r = 0
        return r

    return lanes(one, WIDTH[kind])


def lanes(one: Callable[..., int], width: int) -> Callable:
    def f(*arrays: np.ndarray) -> np.ndarray:
        mask = (1 << width) - 1
        return np.array(
            [one(*(int(v) for v in row)) & mask for row in zip(*arrays, strict=True)], UINT[width]
        )

    return f


def pairs(f: Callable, width: int = 32) -> Callable:
    """A function of halves, applied to both halves of a register."""
    h = UINT[width // 2]

    def g(*arrays: np.ndarray) -> np.ndarray:
        lo = f(*((a & ((1 << width // 2) - 1)).astype(h) for a in arrays))
        hi = f(*((a >> UINT[width](width // 2)).astype(h) for a in arrays))
        return lo.astype(UINT[width]) | hi.astype(UINT[width]) << UINT[width](width // 2)

    return g


def minmax(kind: str, biggest: bool, nan: bool = False, ftz: bool = False) -> Callable:
    def one(a: int, b: int) -> int:
        if ftz:
            a, b = flush(a, kind), flush(b, kind)
        x, y = value(a, kind), value(b, kind)
        na, nb = (isinstance(v, float) and math.isnan(v) for v in (x, y))
        if (na and nb) or (nan and (na or nb)):
            return NAN.get(kind, 0x7FF8000000000000)
        if na:
            return b
        if nb:
            return a
        if x == y:  # zeros of two signs
            first = a if is_negative(a, kind) else b
            second = b if first == a else a
            return second if biggest else first
        return a if (x > y) == biggest else b

    return lanes(one, WIDTH[kind])


def divide(kind: str, mode: str = "rn", ftz: bool = False) -> Callable:
    def one(a: int, b: int) -> int:
        if ftz:
            a, b = flush(a), flush(b)
        x, y = value(a, kind), value(b, kind)
        negative = is_negative(a, kind) != is_negative(b, kind)
        inf = -math.inf if negative else math.inf
        if any(isinstance(v, float) and math.isnan(v) for v in (x, y)):
            r: float | Fraction = math.nan
        elif isinstance(x, float):
            r = math.nan if isinstance(y, float) else inf
        elif isinstance(y, float):
            r = Fraction(0)
        elif y == 0:
            r = math.nan if x == 0 else inf
        else:
            r = x / y
        out = round_to(r, kind, mode, negative)
        return flush(out) if ftz else out

    return lanes(one, WIDTH[kind])


def square_root(kind: str, mode: str = "rn") -> Callable:
    def one(a: int) -> int:
        x = value(a, kind)
        if isinstance(x, float):
            return round_to(x if x > 0 else math.nan, kind)
        if x < 0:
            return round_to(math.nan, kind)
        if x == 0:
            return a
        # 2 ** -400 is far below any rounding's last bit, and the bit that is left says "inexact"
        k = 400
        root = math.isqrt(int(x * Fraction(4) ** k)) if x.denominator <= 4**k else 0
        exact = Fraction(root) / Fraction(2) ** k
        if exact * exact != x:
            exact += Fraction(1, 2 ** (k + 3))
        return round_to(exact, kind, mode)

    return lanes(one, WIDTH[kind])


COMPARE = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}


def compare(name: str, kind: str, ftz: bool = False) -> Callable:
    def one(a: int, b: int) -> int:
        if kind in FORMATS:
            if ftz:
                a, b = flush(a, kind), flush(b, kind)
            x, y = value(a, kind), value(b, kind)
            nan = any(isinstance(v, float) and math.isnan(v) for v in (x, y))
            if name == "num":
                return int(not nan)
            if name == "nan":
                return int(nan)
            if name.endswith("u") and name[:-1] in COMPARE:
                return int(nan or COMPARE[name[:-1]](x, y))
            return int(not nan and COMPARE[name](x, y))
        width = WIDTH[kind]
        x, y = (signed(v, width) if kind[0] == "s" else v for v in (a, b))
        plain = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(name, name)
        return int(COMPARE[plain](x, y))

    return lanes(one, 32)


def to_int(frm: str, to: str, mode: str, ftz: bool = False) -> Callable:
    width = WIDTH[to]
    low, high = (-(1 << width - 1), (1 << width - 1) - 1) if to[0] == "s" else (0, (1 << width) - 1)

    def one(a: int) -> int:
        x = value(flush(a, frm) if ftz else a, frm)
        if isinstance(x, float):
            return 0 if math.isnan(x) else high if x > 0 else low
        n = {"rni": round(x), "rzi": math.trunc(x), "rmi": math.floor(x), "rpi": math.ceil(x)}[mode]
        return min(max(n, low), high)

    return lanes(one, width)


def from_int(frm: str, to: str, mode: str = "rn") -> Callable:
    def one(a: int) -> int:
        n = signed(a, WIDTH[frm]) if frm[0] == "s" else a & (1 << WIDTH[frm]) - 1
        return round_to(Fraction(n), to, mode)

    return lanes(one, WIDTH[to])


def convert(
    frm: str, to: str, mode: str = "rn", ftz: bool = False, sat: bool = False, relu: bool = False
) -> Callable:
    def one(a: int) -> int:
        if ftz:
            a = flush(a, "f32") if frm == "f32" else a
        r = round_to(value(a, frm), to, mode, is_negative(a, frm))
        if (
            relu
            and is_negative(r, to)
            and not (isinstance(value(r, to), float) and math.isnan(value(r, to)))
        ):
            r = 0
        if sat:
            r = saturate(r, to)
        return flush(r, to) if ftz and to == "f32" else r

    return lanes(one, WIDTH[to])


def integral(kind: str, mode: str) -> Callable:
    """cvt.rni.f32.f32 and kin: to an integral value of the same type."""

    def one(a: int) -> int:
        x = value(a, kind)
        if isinstance(x, float):
            return round_to(x, kind)
        n = {"rni": round(x), "rzi": math.trunc(x), "rmi": math.floor(x), "rpi": math.ceil(x)}[mode]
        return round_to(Fraction(n), kind, "rn", is_negative(a, kind))

    return lanes(one, WIDTH[kind])


# -- integers
# ---------------------------------------------------------------------------------------


def integer(f: Callable[..., int], kind: str, out: str | None = None) -> Callable:
    """f on Python integers, signed if the type is; the result is cut to its width."""
    width, wide = WIDTH[kind], WIDTH[out or kind]

    def one(*bits: int) -> int:
        return f(*(signed(b, width) if kind[0] == "s" else b for b in bits)) & ((1 << wide) - 1)

    return lanes(one, wide)


def bfe(kind: str) -> Callable:
    width = WIDTH[kind]

    def one(a: int, b: int, c: int) -> int:
        """PTX's pseudo code, bit by bit."""
        pos, length = b & 0xFF, c & 0xFF
        msb = width - 1
        a_bits = [a >> k & 1 for k in range(width)]
        sbit = 0 if kind[0] == "u" or length == 0 else a_bits[min(pos + length - 1, msb)]
        d = 0
        for i in range(msb + 1):
            bit = a_bits[pos + i] if i < length and pos + i <= msb else sbit
            d |= bit << i
        return d

    return lanes(one, width)


def bfi(kind: str) -> Callable:
    width = WIDTH[kind]

    def one(a: int, b: int, c: int, d: int) -> int:
        pos, length = c & 0xFF, d & 0xFF
        f = b
        for i in range(length):
            if pos + i > width - 1:
                break
            f = f & ~(1 << pos + i) | (a >> i & 1) << pos + i
        return f

    return lanes(one, width)


def lop3(table: int) -> Callable:
    def one(a: int, b: int, c: int) -> int:
        r = 0
        for k in range(32):
            at = (a >> k & 1) << 2 | (b >> k & 1) << 1 | (c >> k & 1)
            r |= (table >> at & 1) << k
        return r

    return lanes(one, 32)


def prmt(mode: str = "") -> Callable:
    def one(a: int, b: int, c: int) -> int:
        data = [(b << 32 | a) >> 8 * k & 0xFF for k in range(8)]
        if not mode:
            out = []
            for k in range(4):
                n = c >> 4 * k & 0xF
                byte = data[n & 7]
                out.append((0xFF if byte >> 7 else 0) if n & 8 else byte)
        else:
            s = c & 3
            out = {
                "f4e": [data[s + k] for k in range(4)],
                "b4e": [data[(s - k) % 8] for k in range(4)],
                "rc8": [data[s]] * 4,
                "ecl": [data[max(s, k)] for k in range(4)],
                "ecr": [data[min(s, k)] for k in range(4)],
                "rc16": [data[2 * (s & 1) + (k & 1)] for k in range(4)],
            }[mode]
        return sum(x << 8 * k for k, x in enumerate(out))

    return lanes(one, 32)


def bfind(kind: str, shift: bool) -> Callable:
    width = WIDTH[kind]

    def one(a: int) -> int:
        x = signed(a, width) if kind[0] == "s" else a
        x = ~x if x < 0 else x
        if x == 0:
            return 0xFFFFFFFF
        n = x.bit_length() - 1
        return width - 1 - n if shift else n

    return lanes(one, 32)


def dot(ta: str, tb: str, n: int, half: int = 0) -> Callable:
    def one(a: int, b: int, c: int) -> int:
        r = c
        for k in range(n):
            wa = 32 // n
            x = a >> wa * k & (1 << wa) - 1
            y = b >> 8 * (k + half) & 0xFF
            r += (signed(x, wa) if ta[0] == "s" else x) * (signed(y, 8) if tb[0] == "s" else y)
        return r

    return lanes(one, 32)
