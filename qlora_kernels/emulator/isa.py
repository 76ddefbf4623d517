"""What each PTX instruction is to the engine.

One method a family, ``do_<opcode>``; it takes the modifiers it knows off the instruction's list,
and one that is left over is an error that names it: nothing is ignored for not being understood.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from . import engine, ptx
from .errors import PtxError
from .ptx import SIZES

if TYPE_CHECKING:
    from .decode import Kernel, _Flat, _Item

__all__ = ["Const", "Emitted", "Emitter", "Reg"]

STRONG, ACQUIRE, RELEASE, CONST = 4, 8, 16, 32
SHARED_WINDOW, LOCAL_WINDOW = 1 << 56, 2 << 56


@dataclass(frozen=True)
class Reg:
    name: str


@dataclass(frozen=True)
class Const:
    bits: int
    width: int
    symbol: str | None = None


Source = Reg | Const


@dataclass
class Emitted:
    """One engine instruction before registers have slots. ``branch``: labels it may go to."""

    op: str
    row: int
    o: list[Any] = field(default_factory=list)
    items: list[Any] | None = None
    list_values: list[int] | None = None
    defs: list[str] = field(default_factory=list)
    uses: list[str] = field(default_factory=list)
    guard: tuple[str, bool] | None = None
    n: int = 0
    imm: int = 0
    imm2: int = 0
    flags: int = 0
    branch: list[str] | None = None
    targets: list[int] = field(default_factory=list)
    ends: bool = False  # the lanes are done
    stops: bool = False  # ends its basic block
    sync: bool = False  # begins its basic block
    memory: str = ""  # load, store, atomic
    address: str | None = None
    values: list[str] = field(default_factory=list)
    parts: tuple[int, int, int] = (0, 0, 0)
    early: bool = False
    line: str = ""


def width_of(kind: str) -> int:
    """Bits of a register's lanes: 1 (predicate), 32 or 64."""
    if kind == "pred":
        return 1
    return 64 if SIZES[kind] == 8 else 32


ELEMENTS = {"f16": 0, "bf16": 1, "tf32": 2, "e4m3": 3, "e5m2": 4, "s8": 5, "u8": 6}
_CACHE = (
    "ca",
    "cg",
    "cs",
    "lu",
    "cv",
    "wb",
    "wt",
    "evict_normal",
    "evict_first",
    "evict_last",
    "evict_unchanged",
    "no_allocate",
    "L1::evict_normal",
    "L1::evict_first",
    "L1::evict_last",
    "L1::evict_unchanged",
    "L1::no_allocate",
    "L2::evict_normal",
    "L2::evict_first",
    "L2::evict_last",
    "L2::cache_hint",
    "L2::64B",
    "L2::128B",
    "L2::256B",
)
_SCOPES = ("cta", "cluster", "gpu", "sys")
_ROUND = ("rn", "rz", "rm", "rp")
_COMPARE = (
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "lo",
    "ls",
    "hi",
    "hs",
    "equ",
    "neu",
    "ltu",
    "leu",
    "gtu",
    "geu",
    "num",
    "nan",
)


class Emitter:
    def __init__(self, flat: _Flat, kernel: Kernel) -> None:
        self.flat, self.kernel = flat, kernel
        self.out: list[Emitted] = []
        self.leaders: set[int] = set()
        self.types: dict[str, int] = {}  # width of each register
        self.kinds: dict[str, str] = {}
        self.specials: dict[str, int] = {}
        self.op_ids = engine.op_ids()
        self.narrow_shared = False
        self.uses_dynamic = False
        self.temporaries = 0
        self.item: _Item
        self.mods: list[str] = []
        self.params = {p.name: p for p in kernel.params}
        self._layout: dict[str, int] | None = None

    # -- errors, modifiers -------------------------------------------------------------------------

    def error(self, message: str) -> PtxError:
        x = self.item.ins
        loc = f" (from {x.loc})" if x.loc else ""
        return PtxError(message + loc, x.line, x.column, self.flat.lines[x.line - 1])

    def take(self, *options: str) -> str | None:
        """The first modifier that is one of the options, taken off the list."""
        for k, m in enumerate(self.mods):
            if m in options:
                del self.mods[k]
                return m
        return None

    def has(self, option: str) -> bool:
        return self.take(option) is not None

    def type(self) -> str:
        """The last modifier, which must be a type."""
        if not self.mods or self.mods[-1] not in SIZES:
            raise self.error(f"{self.item.ins.opcode} has no type that the emulator knows")
        return self.mods.pop()

    # -- operands ----------------------------------------------------------------------------------

    def register(self, name: str) -> Reg | None:
        """A name as a register of this instance, or None if it is none."""
        from .decode import FIXED, SPECIALS

        if name in SPECIALS:
            self.specials[name] = SPECIALS[name]
            self.types[name], self.kinds[name] = 32, "u32"
            return Reg(name)
        if name in FIXED:
            return None
        kind = self.item.function.register_type(name)
        if kind is None:
            if name.startswith("%") and name not in (
                "%clock",
                "%clock64",
                "%globaltimer",
                "%globaltimer_lo",
            ):
                raise self.error(
                    f"register {name} was not declared, or is a special register "
                    "that the emulator does not have"
                )
            return None
        unique = self.item.prefix + name
        self.types[unique], self.kinds[unique] = width_of(kind), kind
        return Reg(unique)

    def temporary(self, width: int) -> Reg:
        self.temporaries += 1
        name = f"<t{self.temporaries}>"
        self.types[name], self.kinds[name] = width, "b64" if width == 64 else "b32"
        return Reg(name)

    def is_reg(self, x: Any) -> bool:
        return isinstance(x, ptx.Register | ptx.Symbol) and self.register(x.name) is not None

    def dst(self, x: Any, kind: str) -> Reg:
        if not isinstance(x, ptx.Register | ptx.Symbol) or getattr(x, "negated", False):
            raise self.error(f"{self.item.ins.opcode}: the destination must be a register")
        r = self.register(x.name)
        if r is None:
            raise self.error(f"{self.item.ins.opcode}: {x.name} is not a register")
        if self.types[r.name] != width_of(kind):
            raise self.error(
                f"{self.item.ins.opcode}: {x.name} is .{self.kinds[r.name]}, not .{kind}"
            )
        return r

    def sink(self, x: Any) -> bool:
        return isinstance(x, ptx.Symbol) and x.name == "_"

    def src(self, x: Any, kind: str) -> Source:
        width = width_of(kind)
        if isinstance(x, ptx.Immediate):
            return Const(self.immediate(x, kind), width)
        if isinstance(x, ptx.Register | ptx.Symbol):
            from .decode import FIXED

            if x.name in FIXED:
                return Const(FIXED[x.name], width)
            r = self.register(x.name)
            if r is not None:
                if getattr(x, "negated", False):
                    raise self.error(f"! before {x.name}, which is no predicate")
                if self.types[r.name] != width:
                    raise self.error(
                        f"{self.item.ins.opcode}: {x.name} is .{self.kinds[r.name]}, not .{kind}"
                    )
                return r
            if isinstance(x, ptx.Symbol):
                return self.symbol(x, width)
        raise self.error(f"{self.item.ins.opcode}: an operand that the emulator does not know: {x}")

    def immediate(self, x: ptx.Immediate, kind: str) -> int:
        size = 8 * SIZES[kind]
        if kind in ("f32", "f64", "f16", "bf16") and x.kind != "int":
            if x.kind == kind or kind in ("f16", "bf16"):
                return x.value
            value = struct.unpack(
                "<d" if x.kind == "f64" else "<f",
                x.value.to_bytes(8 if x.kind == "f64" else 4, "little"),
            )[0]
            code = "<f" if kind == "f32" else "<d"
            return int.from_bytes(struct.pack(code, value), "little")
        if kind in ("f32", "f64") and x.kind == "int":
            code = "<f" if kind == "f32" else "<d"
            return int.from_bytes(struct.pack(code, float(x.value)), "little")
        return x.value & ((1 << size) - 1)

    def symbol(self, x: ptx.Symbol, width: int) -> Const:
        """The address of a variable, in its own space."""
        from .decode import PARAM_BASE

        name, prefix = x.name, self.item.prefix
        local = self.flat.alias.get(prefix + name, prefix + name)
        if local in self.flat.local:
            return Const(self.flat.local[local] + x.offset, width)
        if name in self.flat.shared or (
            name in self.flat.module.variables
            and self.flat.module.variables[name].space == "shared"
        ):
            return Const(self.shared_offset(name) + x.offset, width)
        if not prefix and name in self.params:
            return Const(PARAM_BASE + self.params[name].offset + x.offset, width)
        if name in self.flat.module.variables:
            if width != 64:
                raise self.error(f"the address of {name} in a 32-bit register")
            return Const(x.offset, 64, name)
        if name in self.flat.module.functions:
            raise self.error(f"the address of function {name}: indirect calls are not executed")
        raise self.error(f"{name} was not declared")

    def shared_offset(self, name: str) -> int:
        v = self.flat.shared.get(name) or self.flat.module.variables[name]
        if v.unsized:
            self.uses_dynamic = True
        if self._layout is None:
            self._lay_out()
        assert self._layout is not None
        return self._layout[name]

    def _lay_out(self) -> None:
        """Static variables with gaps between them, so that an index too far is seen; then the
        rest."""
        self._layout, at = {}, 0
        self.static_bytes = 0
        self.shared_list: list[tuple[str, int, int]] = []
        used = dict(self.flat.shared)
        for v in self.flat.module.variables.values():
            if v.space == "shared" and self._mentioned(v.name):
                used[v.name] = v
        sized = [v for v in used.values() if not v.unsized]
        for v in sized:
            self.static_bytes = -(-self.static_bytes // v.align) * v.align + v.size
            at = -(-at // max(v.align, 128)) * max(v.align, 128)
            self._layout[v.name] = at
            self.shared_list.append((v.name, at, v.size))
            at += v.size + 128
        align = max([16, *(v.align for v in used.values() if v.unsized)])
        if sized:
            align = max(align, 1024)
        self.dynamic = -(-at // align) * align
        for v in used.values():
            if v.unsized:
                self._layout[v.name] = self.dynamic

    def _mentioned(self, name: str) -> bool:
        if not hasattr(self, "_names"):
            self._names: set[str] = set()
            for item in self.flat.items:
                ins = getattr(item, "ins", None)
                todo: list[Any] = list(ins.operands) if ins else []
                while todo:
                    x = todo.pop()
                    if isinstance(x, ptx.Symbol):
                        self._names.add(x.name)
                    elif isinstance(x, ptx.Memory):
                        todo.append(x.base)
                    elif isinstance(x, ptx.Vector | ptx.Group):
                        todo += x.items
        return name in self._names

    def shared_layout(self) -> tuple[list[tuple[str, int, int]], int, int]:
        if self._layout is None:
            self._lay_out()
        return self.shared_list, self.static_bytes, self.dynamic

    def pred(self, x: Any) -> tuple[Any, bool]:
        """A predicate source: engine operand (Reg, or -1 true, -2 false) and whether negated."""
        if isinstance(x, ptx.Immediate):
            return (-1 if x.value else -2), False
        if not isinstance(x, ptx.Register | ptx.Symbol):
            raise self.error(f"{self.item.ins.opcode}: expected a predicate")
        if x.name == "%is_explicit_cluster":
            return -2, getattr(x, "negated", False)
        r = self.register(x.name)
        if r is None or self.types[r.name] != 1:
            raise self.error(f"{self.item.ins.opcode}: {x.name} is not a predicate")
        return r, getattr(x, "negated", False)

    def address(self, x: Any, space: str) -> tuple[Source, int, int]:
        """(base operand, offset, imm2 bits) of ``[base+offset]``."""
        if not isinstance(x, ptx.Memory):
            raise self.error(f"{self.item.ins.opcode}: expected an address in brackets")
        code = {"global": 0, "const": 0, "shared": 1, "local": 2, "generic": 3}[space]
        base = x.base
        if base is None:
            return Const(x.offset & (2**64 - 1), 64), 0, 1 | code << 1
        if isinstance(base, ptx.Symbol) and base.name.startswith("<name>"):
            return Const(self.flat.local[base.name[6:]] + x.offset, 32), 0, code << 1
        r = self.register(base.name)
        if r is None:
            assert isinstance(base, ptx.Symbol)
            wide = space in ("global", "const", "generic")
            c = self.symbol(ptx.Symbol(base.name, base.offset + x.offset), 64 if wide else 32)
            if space == "generic":
                kind = self.space_of(base.name)
                code = {"global": 0, "const": 0, "shared": 1, "local": 2, "param": 0}[kind]
            return c, 0, (1 if wide else 0) | code << 1
        wide = self.types[r.name] == 64
        return r, x.offset, (1 if wide else 0) | code << 1

    def space_of(self, name: str) -> str:
        if name in self.flat.shared:
            return "shared"
        if self.flat.alias.get(self.item.prefix + name, self.item.prefix + name) in self.flat.local:
            return "local"
        v = self.flat.module.variables.get(name)
        return v.space if v else "param"

    # -- emitting ----------------------------------------------------------------------------------

    def put(self, op: str, o: Sequence[Any] = (), **more: Any) -> Emitted:
        if op not in self.op_ids:
            raise self.error(f"{self.item.ins.opcode}: not executed by the emulator (no {op})")
        e = Emitted(op, self.item.row, list(o), **more)
        x = self.item.ins
        if x.guard is not None:
            r, _ = self.pred(x.guard)
            if not isinstance(r, Reg):
                raise self.error("a guard that is no predicate")
            e.guard = (r.name, x.guard.negated)
        e.line = x.opcode
        self.out.append(e)
        return e

    def alu(self, op: str, d: Reg | None, *sources: Any, **more: Any) -> Emitted:
        """d = op(sources): the common shape."""
        e = self.put(op, [d if d is not None else -1, *sources], **more)
        if d is not None:
            e.defs = [d.name]
            if d.name.startswith("<t"):
                e.guard = None  # a temporary of this instruction: computed for all lanes
        e.uses = [s.name for s in sources if isinstance(s, Reg)]
        return e

    def emit(self, item: _Item) -> None:
        self.item = item
        x = item.ins
        self.mods = x.modifiers
        method: Callable[[], None] | None = getattr(self, "do_" + x.base.strip("<>"), None)
        if method is None or x.base.startswith("_"):
            raise self.error(f"{x.opcode}: an instruction that the emulator does not know")
        before = len(self.out)
        method()
        if self.mods:
            raise self.error(f"{x.opcode}: modifier .{self.mods[0]} is not known to the emulator")
        for e in self.out[before:-1]:
            e.flags |= 128  # counted once, by the last
        # A guard is a use of its predicate; destinations keep their old value where it fails.

    def implicit_exit(self, function: ptx.Function) -> None:
        from .decode import _Item

        ins = ptx.Instruction("ret", [], None, function.line, 1, None)
        self.item = _Item(ins, "", function, self.flat.row(function, ins))
        self.put("exit", ends=True)

    @property
    def ops(self) -> list[Any]:
        return self.item.ins.operands

    def need(self, *counts: int) -> list[Any]:
        if len(self.ops) not in counts:
            raise self.error(
                f"{self.item.ins.opcode}: {len(self.ops)} operands, expected "
                + " or ".join(map(str, counts))
            )
        return self.ops

    # -- arithmetic --------------------------------------------------------------------------------

    def float_name(self, base: str, kind: str, rounded: bool = True) -> str:
        ftz, sat, relu = self.has("ftz"), self.has("sat"), self.has("relu")
        rnd = self.take(*_ROUND)
        name = base
        if kind in ("f16", "f16x2", "bf16", "bf16x2"):
            if rnd not in (None, "rn"):
                raise self.error(f"{self.item.ins.opcode}: rounding .{rnd} of .{kind}")
            return (
                base
                + (".ftz" if ftz else "")
                + (".sat" if sat else "")
                + (".relu" if relu else "")
                + "."
                + kind
            )
        if relu:
            self.mods.append("relu")
        if rounded:
            name += "." + (rnd or "rn")
        if kind == "f32x2":
            if ftz:
                self.mods.append("ftz")  # re-read by the caller
            return name + "." + kind
        return name + (".ftz" if ftz else "") + (".sat" if sat else "") + "." + kind

    def widened(self, kind: str) -> tuple[str, Callable[[Any], Source]]:
        """add, sub and fma of mixed precision, ``.f32.f16`` and ``.f32.bf16`` (sm_100 on): all but
        the last source are converted, exactly, and the rest is f32's. The type that is computed
        in, and what reads such a source."""
        if kind not in ("f16", "bf16") or not self.mods or self.mods[-1] != "f32":
            return kind, lambda x: self.src(x, kind)

        def read(x: Any) -> Source:
            wide = self.temporary(32)
            self.alu(f"cvt.f32.{kind}", wide, self.src(x, kind))
            return wide

        return self.type(), read

    def binary(self, base: str) -> None:
        kind, first = self.widened(self.type())
        d, a, b = self.need(3)
        if kind[0] == "f" or kind.startswith("bf"):
            name = self.float_name(base, kind)
            imm = 16 if kind == "f32x2" and self.has("ftz") else 0
            self.alu(name, self.dst(d, kind), first(a), self.src(b, kind), imm=imm)
            return
        if self.take("cc"):
            self.carry(kind, 2 | (4 if base == "sub" else 0))
            return
        if self.has("sat"):
            name = f"{base}.sat.{kind}"
        elif kind.endswith("x2"):
            name = f"{base}.u16x2"
        else:
            name = f"{base}.u{kind[1:]}"
        self.alu(name, self.dst(d, kind), self.src(a, kind), self.src(b, kind))

    def carry(self, kind: str, imm: int) -> None:
        d, a, b = self.need(3)
        width = SIZES[kind] * 8
        e = self.alu(
            f"addc.{width}", self.dst(d, kind), self.src(a, kind), self.src(b, kind), imm=imm
        )
        e.early = True

    def do_add(self) -> None:
        self.binary("add")

    def do_sub(self) -> None:
        self.binary("sub")

    def do_addc(self) -> None:
        kind = self.type()
        self.carry(kind, 1 | (2 if self.take("cc") else 0))

    def do_subc(self) -> None:
        kind = self.type()
        self.carry(kind, 1 | 4 | (2 if self.take("cc") else 0))

    def do_mul(self) -> None:
        kind = self.type()
        if kind[0] == "f" or kind.startswith("bf"):
            d, a, b = self.need(3)
            name = self.float_name("mul", kind)
            imm = 16 if kind == "f32x2" and self.has("ftz") else 0
            self.alu(name, self.dst(d, kind), self.src(a, kind), self.src(b, kind), imm=imm)
            return
        how = self.take("lo", "hi", "wide")
        d, a, b = self.need(3)
        self.multiply("mul", how, kind, d, [self.src(a, kind), self.src(b, kind)])

    def multiply(
        self, base: str, how: str | None, kind: str, d: Any, sources: list[Source]
    ) -> None:
        if how is None:
            raise self.error(f"{self.item.ins.opcode}: .lo, .hi or .wide is missing")
        bits = int(kind[1:])
        wide = {16: "b32", 32: "b64"}.get(bits)
        if how == "wide":
            if wide is None:
                raise self.error(f"{self.item.ins.opcode}: .wide of 64 bits")
            self.alu(f"{base}.wide.{kind}", self.dst(d, wide), *sources)
        elif how == "lo":
            self.alu(f"{base}.lo.u{bits}", self.dst(d, kind), *sources)
        else:
            self.alu(f"{base}.hi.{kind}", self.dst(d, kind), *sources)

    def do_mad(self) -> None:
        kind = self.type()
        if kind[0] == "f":
            self.mods.append(kind)
            self.do_fma()
            return
        how = self.take("lo", "hi", "wide")
        d, a, b, c = self.need(4)
        ckind = kind if how != "wide" else {"16": "b32", "32": "b64"}.get(kind[1:], "b64")
        cc = self.take("cc")
        if cc:  # the product, then an addition that sets the carry
            t = self.temporary(width_of(kind))
            self.multiply_into(how, kind, t, a, b)
            self.alu(f"addc.{kind[1:]}", self.dst(d, kind), t, self.src(c, kind), imm=2)
            return
        self.multiply(
            "mad", how, kind, d, [self.src(a, kind), self.src(b, kind), self.src(c, ckind)]
        )

    def multiply_into(self, how: str | None, kind: str, t: Reg, a: Any, b: Any) -> None:
        name = f"mul.lo.u{kind[1:]}" if how == "lo" else f"mul.hi.{kind}"
        self.alu(name, t, self.src(a, kind), self.src(b, kind))

    def do_madc(self) -> None:
        kind = self.type()
        how = self.take("lo", "hi")
        cc = self.take("cc")
        d, a, b, c = self.need(4)
        t = self.temporary(width_of(kind))
        self.multiply_into(how, kind, t, a, b)
        self.alu(
            f"addc.{kind[1:]}", self.dst(d, kind), t, self.src(c, kind), imm=1 | (2 if cc else 0)
        )

    def do_mul24(self) -> None:
        kind = self.type()
        if self.take("lo") is None:
            raise self.error(f"{self.item.ins.opcode}: only .lo is executed")
        d, a, b = self.need(3)
        self.alu(f"mul24.lo.{kind}", self.dst(d, kind), self.src(a, kind), self.src(b, kind))

    def do_mad24(self) -> None:
        kind = self.type()
        if self.take("lo") is None:
            raise self.error(f"{self.item.ins.opcode}: only .lo is executed")
        d, a, b, c = self.need(4)
        t = self.temporary(32)
        self.alu(f"mul24.lo.{kind}", t, self.src(a, kind), self.src(b, kind))
        self.alu("add.u32", self.dst(d, kind), t, self.src(c, kind))

    def do_fma(self) -> None:
        kind, factor = self.widened(self.type())
        d, a, b, c = self.need(4)
        name = self.float_name("fma", kind)
        imm = 16 if kind == "f32x2" and self.has("ftz") else 0
        self.alu(
            name,
            self.dst(d, kind),
            factor(a),
            factor(b),
            self.src(c, kind),
            imm=imm,
        )

    def do_div(self) -> None:
        kind = self.type()
        d, a, b = self.need(3)
        if kind in ("f32", "f64"):
            how = self.take("approx", "full")
            ftz = ".ftz" if self.has("ftz") else ""
            rnd = self.take(*_ROUND)
            name = f"div.{how}{ftz}.{kind}" if how else f"div.{rnd or 'rn'}{ftz}.{kind}"
            self.alu(name, self.dst(d, kind), self.src(a, kind), self.src(b, kind))
        else:
            self.alu(f"div.{kind}", self.dst(d, kind), self.src(a, kind), self.src(b, kind))

    def do_rem(self) -> None:
        kind = self.type()
        d, a, b = self.need(3)
        self.alu(f"rem.{kind}", self.dst(d, kind), self.src(a, kind), self.src(b, kind))

    def root(self, base: str) -> None:
        kind = self.type()
        d, a = self.need(2)
        approx = self.has("approx")
        ftz = ".ftz" if self.has("ftz") else ""
        rnd = self.take(*_ROUND)
        if kind in ("f16", "f16x2", "bf16", "bf16x2"):
            if kind.startswith("bf"):
                ftz = ""
            name = f"{base}{ftz}.{kind}"
        elif approx or rnd is None:
            name = f"{base}.approx{ftz}.{kind}"
        else:
            name = f"{base}.{rnd}{ftz}.{kind}"
        self.alu(name, self.dst(d, kind), self.src(a, kind))

    def do_rcp(self) -> None:
        self.root("rcp")

    def do_sqrt(self) -> None:
        self.root("sqrt")

    def do_rsqrt(self) -> None:
        self.root("rsqrt")

    def do_ex2(self) -> None:
        self.root("ex2")

    def do_lg2(self) -> None:
        self.root("lg2")

    def do_sin(self) -> None:
        self.root("sin")

    def do_cos(self) -> None:
        self.root("cos")

    def do_tanh(self) -> None:
        self.root("tanh")

    def minmax(self, base: str) -> None:
        kind = self.type()
        ops = self.need(3, 4)
        ftz = ".ftz" if self.has("ftz") else ""
        nan = ".nan" if self.has("NaN") else ""
        xor = ".xorsign.abs" if self.has("xorsign") and self.has("abs") else ""
        relu = self.has("relu")
        d, sources = self.dst(ops[0], kind), [self.src(s, kind) for s in ops[1:]]
        if kind in ("f16", "f16x2", "bf16", "bf16x2"):
            if xor or len(sources) == 3:
                raise self.error(f"{self.item.ins.opcode}: not executed")
            name = f"{base}{nan}{ftz}.{kind}" if not nan else f"{base}.nan{ftz}.{kind}"
            self.alu(name, d, *sources)
        elif kind == "f32":
            self.alu(f"{base}{'3' if len(sources) == 3 else ''}{nan}{xor}{ftz}.f32", d, *sources)
        elif kind == "f64":
            self.alu(f"{base}.f64", d, *sources)
        elif kind[0] in "us":
            self.alu(f"{base}.{kind}", d, *sources)
        else:
            raise self.error(f"{self.item.ins.opcode}: not executed")
        if relu:
            if kind == "s32":
                self.alu("max.s32", d, d, Const(0, 32))
            else:
                raise self.error(f"{self.item.ins.opcode}: .relu is not executed")

    def do_min(self) -> None:
        self.minmax("min")

    def do_max(self) -> None:
        self.minmax("max")

    def sign(self, base: str) -> None:
        kind = self.type()
        d, a = self.need(2)
        ftz = ".ftz" if self.has("ftz") else ""
        self.alu(f"{base}{ftz}.{kind}", self.dst(d, kind), self.src(a, kind))

    def do_neg(self) -> None:
        self.sign("neg")

    def do_abs(self) -> None:
        self.sign("abs")

    def do_copysign(self) -> None:
        kind = self.type()
        d, a, b = self.need(3)
        self.alu(f"copysign.{kind}", self.dst(d, kind), self.src(a, kind), self.src(b, kind))

    def do_testp(self) -> None:
        kind = self.type()
        d, a = self.need(2)
        what = self.take("finite", "infinite", "number", "notanumber", "normal", "subnormal")
        code = ["finite", "infinite", "number", "notanumber", "normal", "subnormal"].index(
            what or "finite"
        )
        p, _ = self.pred(d)
        s = self.src(a, kind)
        e = self.put("testp", [p, s], imm=code, imm2=64 if kind == "f64" else 32)
        e.defs, e.uses = [p.name], [s.name] if isinstance(s, Reg) else []

    # -- bits --------------------------------------------------------------------------------------

    def logic(self, base: str, unary: bool = False) -> None:
        kind = self.type()
        ops = self.need(2 if unary else 3)
        if kind == "pred":
            d, _ = self.pred(ops[0])
            sources = [self.pred(s) for s in ops[1:]]
            imm = sum(1 << k for k, (_, negated) in enumerate(sources) if negated)
            e = self.put(f"{base}.pred", [d, *(s for s, _ in sources)], imm=imm)
            e.defs, e.uses = [d.name], [s.name for s, _ in sources if isinstance(s, Reg)]
            return
        self.alu(
            f"{base}.b{kind[1:]}", self.dst(ops[0], kind), *(self.src(s, kind) for s in ops[1:])
        )

    def do_and(self) -> None:
        self.logic("and")

    def do_or(self) -> None:
        self.logic("or")

    def do_xor(self) -> None:
        self.logic("xor")

    def do_not(self) -> None:
        self.logic("not", True)

    def do_cnot(self) -> None:
        self.logic("cnot", True)

    def shift(self, base: str) -> None:
        kind = self.type()
        d, a, n = self.need(3)
        letter = "s" if base == "shr" and kind[0] == "s" else "u" if base == "shr" else "b"
        self.alu(
            f"{base}.{letter}{kind[1:]}", self.dst(d, kind), self.src(a, kind), self.src(n, "u32")
        )

    def do_shl(self) -> None:
        self.shift("shl")

    def do_shr(self) -> None:
        self.shift("shr")

    def do_shf(self) -> None:
        self.type()
        side, mode = self.take("l", "r"), self.take("wrap", "clamp")
        d, a, b, n = self.need(4)
        self.alu(
            f"shf.{side}.{mode}.b32",
            self.dst(d, "b32"),
            self.src(a, "b32"),
            self.src(b, "b32"),
            self.src(n, "u32"),
        )

    def do_bfe(self) -> None:
        kind = self.type()
        d, a, b, c = self.need(4)
        self.alu(
            f"bfe.{kind}",
            self.dst(d, kind),
            self.src(a, kind),
            self.src(b, "u32"),
            self.src(c, "u32"),
        )

    def do_bfi(self) -> None:
        kind = self.type()
        d, a, b, c, n = self.need(5)
        self.alu(
            f"bfi.{kind}",
            self.dst(d, kind),
            self.src(a, kind),
            self.src(b, kind),
            self.src(c, "u32"),
            self.src(n, "u32"),
        )

    def do_bfind(self) -> None:
        kind = self.type()
        d, a = self.need(2)
        shift = ".shiftamt" if self.has("shiftamt") else ""
        self.alu(f"bfind{shift}.{kind}", self.dst(d, "u32"), self.src(a, kind))

    def counted(self, base: str, same: bool = False) -> None:
        kind = self.type()
        d, a = self.need(2)
        self.alu(f"{base}.{kind}", self.dst(d, kind if same else "u32"), self.src(a, kind))

    def do_popc(self) -> None:
        self.counted("popc")

    def do_clz(self) -> None:
        self.counted("clz")

    def do_brev(self) -> None:
        self.counted("brev", True)

    def do_lop3(self) -> None:
        self.type()
        combine = self.take("and", "or")
        if combine:
            pair, a, b, c, table, q = self.need(6)
            if not isinstance(pair, ptx.Pair):
                raise self.error("lop3 with a predicate: expected d|p")
            d = None if self.sink(pair.first) else self.dst(pair.first, "b32")
            p, _ = self.pred(pair.second)
            qr, negated = self.pred(q)
            sources = [self.src(s, "b32") for s in (a, b, c)]
            imm = table.value & 255 | (0x100 if combine == "and" else 0) | (0x200 if negated else 0)
            e = self.put("lop3.bool.b32", [d if d else -1, *sources, p, qr], imm=imm)
            e.defs = [p.name] + ([d.name] if d else [])
            e.uses = [s.name for s in [*sources, qr] if isinstance(s, Reg)]
            return
        d, a, b, c, table = self.need(5)
        self.alu(
            "lop3.b32",
            self.dst(d, "b32"),
            *(self.src(s, "b32") for s in (a, b, c)),
            imm=table.value & 255,
        )

    def do_prmt(self) -> None:
        mode = self.take("f4e", "b4e", "rc8", "ecl", "ecr", "rc16")
        self.type()
        d, a, b, c = self.need(4)
        self.alu(
            "prmt.b32" + (f".{mode}" if mode else ""),
            self.dst(d, "b32"),
            *(self.src(s, "b32") for s in (a, b, c)),
        )

    def do_sad(self) -> None:
        kind = self.type()
        d, a, b, c = self.need(4)
        self.alu(f"sad.{kind}", self.dst(d, kind), *(self.src(s, kind) for s in (a, b, c)))

    def do_dp4a(self) -> None:
        tb, ta = self.mods.pop(), self.mods.pop()
        d, a, b, c = self.need(4)
        self.alu(f"dp4a.{ta}.{tb}", self.dst(d, "b32"), *(self.src(s, "b32") for s in (a, b, c)))

    def do_dp2a(self) -> None:
        tb, ta = self.mods.pop(), self.mods.pop()
        half = self.take("lo", "hi")
        d, a, b, c = self.need(4)
        self.alu(
            f"dp2a.{half}.{ta}.{tb}", self.dst(d, "b32"), *(self.src(s, "b32") for s in (a, b, c))
        )

    def do_fns(self) -> None:
        self.type()
        d, a, b, c = self.need(4)
        self.alu("fns.b32", self.dst(d, "b32"), *(self.src(s, "b32") for s in (a, b, c)))

    def do_bmsk(self) -> None:
        self.type()
        mode = self.take("clamp", "wrap")
        d, a, b = self.need(3)
        self.alu(f"bmsk.{mode}.b32", self.dst(d, "b32"), self.src(a, "b32"), self.src(b, "b32"))

    # -- comparison, selection ---------------------------------------------------------------------

    def comparison(self, kind: str) -> str:
        compare = self.take(*_COMPARE)
        if compare is None:
            raise self.error(f"{self.item.ins.opcode}: no comparison")
        compare = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(compare, compare)
        if kind[0] == "b" and not kind.startswith("bf"):
            kind = "u" + kind[1:]
        ftz = ".ftz" if self.has("ftz") else ""
        return f"{compare}{ftz}.{kind}"

    def do_setp(self) -> None:
        kind = self.type()
        name = "setp." + self.comparison(kind)
        combine = self.take("and", "or", "xor")
        ops = self.need(4 if combine else 3)
        first, second = (
            (ops[0].first, ops[0].second) if isinstance(ops[0], ptx.Pair) else (ops[0], None)
        )
        p = -1 if self.sink(first) else self.pred(first)[0]
        q = -1 if second is None or self.sink(second) else self.pred(second)[0]
        a, b = self.src(ops[1], kind), self.src(ops[2], kind)
        c, imm = -1, 0
        if combine:
            c, negated = self.pred(ops[3])
            imm = {"and": 1, "or": 2, "xor": 3}[combine] | (4 if negated else 0)
        e = self.put(name, [p, q, a, b, c], imm=imm)
        e.defs = [x.name for x in (p, q) if isinstance(x, Reg)]
        e.uses = [x.name for x in (a, b, c) if isinstance(x, Reg)]

    def do_set(self) -> None:
        kind = self.type()
        to = self.mods.pop() if self.mods and self.mods[-1] in SIZES else "u32"
        if kind in ("f16", "f16x2", "bf16", "bf16x2") and to == kind:
            name = "set." + self.comparison(kind)
            d, a, b = self.need(3)
            one = 0x3C00 if kind.startswith("f16") else 0x3F80
            self.alu(name, self.dst(d, kind), self.src(a, kind), self.src(b, kind), imm2=one)
            return
        if kind in ("f16x2", "bf16x2") and to[1:] == "32":
            name = "set." + self.comparison(kind)
            d, a, b = self.need(3)
            self.alu(name, self.dst(d, to), self.src(a, kind), self.src(b, kind), imm2=0xFFFF)
            return
        name = "setp." + self.comparison(kind)
        combine = self.take("and", "or", "xor")
        ops = self.need(4 if combine else 3)
        a, b = self.src(ops[1], kind), self.src(ops[2], kind)
        c, imm = -1, 0
        if combine:
            c, negated = self.pred(ops[3])
            imm = {"and": 1, "or": 2, "xor": 3}[combine] | (4 if negated else 0)
        t = self.temporary(1)
        e = self.put(name, [t, -1, a, b, c], imm=imm)
        e.defs, e.uses = [t.name], [x.name for x in (a, b, c) if isinstance(x, Reg)]
        true = {"f32": 0x3F800000, "f16": 0x3C00, "bf16": 0x3F80, "u16": 0xFFFF, "s16": 0xFFFF}.get(
            to, 0xFFFFFFFF
        )
        e = self.put("set.pred", [self.dst(ops[0], to), t], imm2=true)
        e.defs, e.uses = [self.dst(ops[0], to).name], [t.name]

    def do_selp(self) -> None:
        kind = self.type()
        d, a, b, p = self.need(4)
        pr, negated = self.pred(p)
        dr, ar, br = self.dst(d, kind), self.src(a, kind), self.src(b, kind)
        e = self.put(f"selp.{width_of(kind)}", [dr, ar, br, pr], imm=int(negated))
        e.defs, e.uses = [dr.name], [x.name for x in (ar, br, pr) if isinstance(x, Reg)]

    def do_slct(self) -> None:
        by = self.type()
        kind = self.type()
        d, a, b, c = self.need(4)
        self.has("ftz")
        self.alu(
            f"slct.{width_of(kind)}.{by}",
            self.dst(d, kind),
            self.src(a, kind),
            self.src(b, kind),
            self.src(c, by),
        )

    # -- moves and conversions ---------------------------------------------------------------------

    def do_mov(self) -> None:
        kind = self.type()
        d, a = self.need(2)
        if kind == "pred":
            p, (s, negated) = self.pred(d)[0], self.pred(a)
            e = self.put("mov.pred", [p, s], imm=int(negated))
            e.defs, e.uses = [p.name], [s.name] if isinstance(s, Reg) else []
            return
        if isinstance(a, ptx.Register) and a.name in (
            "%clock",
            "%clock64",
            "%globaltimer",
            "%globaltimer_lo",
        ):
            wide = SIZES[kind] == 8
            self.alu("clock.64" if wide else "clock.32", self.dst(d, kind))
            return
        if isinstance(a, ptx.Vector):
            self.pack(kind, d, a.items)
        elif isinstance(d, ptx.Vector):
            self.unpack(kind, d.items, a)
        else:
            from .decode import SPECIALS

            dr = self.dst(d, kind)
            if getattr(a, "name", None) in SPECIALS and self.types[dr.name] == 64:
                s = self.src(a, "u32")
                self.alu("cvt.u64.u32", dr, s)
                return
            self.alu(f"mov.{width_of(kind)}", dr, self.src(a, kind))

    def pack(self, kind: str, d: Any, items: tuple[Any, ...]) -> None:
        size, n = SIZES[kind], len(items)
        part = size * 8 // n
        if size == 16:
            raise self.error("128-bit registers are not executed")
        sources = [self.src(s, f"b{part}") for s in items]
        name = {(4, 2): "pack.32", (8, 2): "pack.64", (8, 4): "pack.64.16"}.get((size, n))
        if name is None and part == 8:
            name = "pack.bytes"
        if name is None:
            raise self.error(f"{self.item.ins.opcode} of {n} parts")
        self.alu(name, self.dst(d, kind), *sources, n=n)

    def unpack(self, kind: str, items: tuple[Any, ...], a: Any) -> None:
        size, n = SIZES[kind], len(items)
        part = size * 8 // n
        if size == 16:
            raise self.error("128-bit registers are not executed")
        s = self.src(a, kind)
        name = "extract.64" if size == 8 else "extract.32"
        # The source may be one of the destinations.
        if isinstance(s, Reg) and any(
            isinstance(x, ptx.Register) and self.item.prefix + x.name == s.name for x in items
        ):
            t = self.temporary(width_of(kind))
            self.alu(f"mov.{width_of(kind)}", t, s)
            s = t
        for k, x in enumerate(items):
            if not self.sink(x):
                self.alu(name, self.dst(x, f"b{part}"), s, imm=part * k, imm2=(1 << part) - 1)

    def do_cvt(self) -> None:
        ops = self.need(2, 3, 4)
        fmts = (
            "e4m3x2",
            "e5m2x2",
            "e2m1x2",
            "e2m3x2",
            "e3m2x2",
            "ue8m0x2",
            "bf16x2",
            "f16x2",
            "tf32",
        )
        names = (*SIZES, *fmts)
        types = [m for m in self.mods if m in names]
        if len(types) != 2:
            raise self.error(f"{self.item.ins.opcode}: two types expected")
        for t in types:
            self.mods.remove(t)
        to, frm = types
        imm, integral = 0, False
        rnd = self.take("rn", "rz", "rm", "rp", "rna", "rni", "rzi", "rmi", "rpi")
        if rnd:
            integral = len(rnd) == 3 and rnd[2] == "i"
            imm |= {
                "rn": 0,
                "rz": 1,
                "rm": 2,
                "rp": 3,
                "rna": 4,
                "rni": 0,
                "rzi": 1,
                "rmi": 2,
                "rpi": 3,
            }[rnd]
        floats = ("f16", "bf16", "f32", "f64")
        if to in floats and frm in floats and (integral or (to == frm and rnd is not None)):
            imm |= 128
        if (
            to not in floats
            and frm in floats
            and to in ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64")
            and rnd is None
        ):
            raise self.error(f"{self.item.ins.opcode}: a rounding is required")
        imm |= (16 if self.has("ftz") else 0) | (32 if self.has("sat") else 0)
        imm |= (64 if self.has("relu") else 0) | (256 if self.has("satfinite") else 0)
        name = f"cvt.{to}.{frm}"
        wide = {
            "e4m3x2": "b16",
            "e5m2x2": "b16",
            "e2m1x2": "b8",
            "e2m3x2": "b16",
            "e3m2x2": "b16",
            "ue8m0x2": "b16",
            "tf32": "b32",
        }
        tk, fk = wide.get(to, to), wide.get(frm, frm)
        if len(ops) == 3:
            self.alu(
                name, self.dst(ops[0], tk), self.src(ops[1], fk), self.src(ops[2], fk), imm=imm
            )
            return
        if len(ops) == 4:
            raise self.error(f"{self.item.ins.opcode}: stochastic rounding is not executed")
        # Registers may be wider than the types.
        d, a = ops
        dr = self.register(d.name) if isinstance(d, ptx.Register | ptx.Symbol) else None
        if dr is None:
            raise self.error(f"{self.item.ins.opcode}: the destination must be a register")
        s: Source
        if self.is_reg(a):
            r = self.register(a.name)
            assert r is not None
            s = r
            if self.types[r.name] == 64 and width_of(fk) == 32:
                t = self.temporary(32)
                self.alu("extract.64", t, r, imm=0, imm2=0xFFFFFFFF)
                s = t
            elif self.types[r.name] != width_of(fk):
                raise self.error(f"{self.item.ins.opcode}: {a.name} is .{self.kinds[r.name]}")
        else:
            s = self.src(a, fk)
        if self.types[dr.name] == 64 and width_of(tk) == 32:
            t = self.temporary(32)
            self.alu(name, t, s, imm=imm)
            signed = to[0] == "s"
            self.alu(f"cvt.{'s64' if signed else 'u64'}.{to if to[0] in 'us' else 'u32'}", dr, t)
            return
        if self.types[dr.name] != width_of(tk):
            raise self.error(f"{self.item.ins.opcode}: {d.name} is .{self.kinds[dr.name]}")
        e = self.alu(name, dr, s, imm=imm)
        # A signed 8- or 16-bit result in a wider register is sign-extended to it.
        register = SIZES[self.kinds[dr.name]]
        if to in ("s8", "s16") and register > SIZES[to]:
            self.alu(f"cvt.s{8 * register}.{to}", dr, dr)
        del e

    def do_szext(self) -> None:
        raise self.error("szext is not executed")

    def do_cvta(self) -> None:
        kind = self.type()
        to = self.has("to")
        space = self.take(
            "global", "shared", "shared::cta", "shared::cluster", "local", "const", "param"
        )
        d, a = self.need(2)
        window = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW}.get(
            (space or "").split("::")[0], 0
        )
        if isinstance(a, ptx.Symbol) and not self.is_reg(a):
            c = self.symbol(a, 64)
            s: Source = c
        else:
            s = self.src(a, kind)
        if SIZES[kind] == 4:
            if window:
                raise self.error("generic addresses in 32 bits")
            self.alu("mov.32", self.dst(d, kind), s)
            return
        if not window:
            self.alu("mov.64", self.dst(d, kind), s)
            return
        imm = -window if to else window
        self.alu("cvta", self.dst(d, kind), s, imm=imm)

    def do_isspacep(self) -> None:
        space = self.take(
            "global", "shared", "shared::cta", "shared::cluster", "local", "const", "param"
        )
        d, a = self.need(2)
        p, s = self.pred(d)[0], self.src(a, "u64")
        window = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW}.get(
            (space or "").split("::")[0], 0
        )
        e = self.put("isspacep", [p, s], imm=window)
        e.defs, e.uses = [p.name], [s.name] if isinstance(s, Reg) else []

    def do_mapa(self) -> None:
        space = self.take("shared::cluster", "shared")
        kind = self.type()
        d, a, rank = self.need(3)
        self.src(rank, "u32")
        del space
        if isinstance(a, ptx.Symbol) and not self.is_reg(a):
            self.alu(f"mov.{width_of(kind)}", self.dst(d, kind), self.symbol(a, width_of(kind)))
        else:
            self.alu(f"mov.{width_of(kind)}", self.dst(d, kind), self.src(a, kind))

    # -- memory ------------------------------------------------------------------------------------

    def semantics(self) -> int:
        flags = 0
        how = self.take("weak", "volatile", "relaxed", "acquire", "release", "acq_rel", "mmio")
        if how and how != "weak":
            flags |= STRONG
        if how in ("acquire", "acq_rel"):
            flags |= ACQUIRE
        if how in ("release", "acq_rel"):
            flags |= RELEASE
        self.take(*_SCOPES)
        return flags

    def cache(self, operands: list[Any], most: int) -> list[Any]:
        """Takes hints off, and the operand of a cache policy."""
        policy = False
        while (hint := self.take(*_CACHE)) is not None:
            policy = policy or hint == "L2::cache_hint"
        if policy and len(operands) > most:
            operands = operands[:most]
        return operands

    def space(self, default: str = "generic") -> str:
        s = self.take(
            "global",
            "shared",
            "shared::cta",
            "shared::cluster",
            "local",
            "const",
            "param",
            "param::entry",
            "param::func",
        )
        return (s or default).split("::")[0]

    def memory_type(self, kind: str) -> str:
        """An element type as the engine names loads."""
        if kind in ("f16", "bf16"):
            kind = "b16"
        elif kind in ("f32", "f16x2", "bf16x2"):
            kind = "b32"
        elif kind in ("f64", "f32x2"):
            kind = "b64"
        return "u" + kind[1:] if kind[0] == "b" else kind

    def do_ld(self) -> None:
        kind = self.type()
        if kind == "b128":
            raise self.error("128-bit registers are not executed")
        flags = self.semantics()
        read_only = self.has("nc")
        self.has("unified")
        vector = self.take("v2", "v4", "v8")
        space = self.space()
        d, a = self.cache(self.ops, 2)[:2]
        regs = list(d.items) if isinstance(d, ptx.Vector) else [d]
        if vector and len(regs) != int(vector[1:]):
            raise self.error(f"{self.item.ins.opcode}: {len(regs)} registers")
        element = self.memory_type(kind)
        if space == "param":
            if self.kernel_param(a):
                self.load_param(kind, element, regs, a)
                return
            space = "local"
            if isinstance(a.base, ptx.Register) and not self.item.prefix:
                space = "global"  # the address of a kernel's parameter
                flags |= CONST
        if space == "const":
            flags |= CONST
        self.access_shared(space, SIZES[kind])
        base, offset, bits = self.address(a, space)
        targets: list[Any] = []
        widths = set()
        for r in regs:
            if self.sink(r):
                targets.append(-1)
                continue
            t = self.register(r.name)
            if t is None:
                raise self.error(f"{self.item.ins.opcode}: {r} is not a register")
            targets.append(t)
            widths.add(self.types[t.name])
        if len(widths) > 1:
            raise self.error(f"{self.item.ins.opcode}: registers of different widths")
        width = widths.pop() if widths else width_of(kind)
        if width == 32 and SIZES[kind] == 8:
            raise self.error(f"{self.item.ins.opcode}: a register that is too narrow")
        if kind[0] != "s" or (SIZES[kind] >= 4 and width == 32):
            element = "u" + element[1:]
        e = self.put(
            f"ld.{element}.{width}",
            [-1, base],
            items=targets,
            n=len(regs),
            imm=offset,
            imm2=bits,
            flags=flags,
            memory="load",
        )
        e.defs = [t.name for t in targets if isinstance(t, Reg)]
        e.uses = [base.name] if isinstance(base, Reg) else []
        e.address = base.name if isinstance(base, Reg) else None
        del read_only
        # A signed load into a 16-bit register: extended to that, not further.
        for t in targets:
            if isinstance(t, Reg) and kind == "s8" and SIZES[self.kinds[t.name]] == 2:
                self.alu("cvt.s16.s16", t, t)

    def access_shared(self, space: str, size: int) -> None:
        if size < 4 and space in ("shared", "generic"):
            self.narrow_shared = True

    def kernel_param(self, a: Any) -> bool:
        return (
            isinstance(a, ptx.Memory)
            and isinstance(a.base, ptx.Symbol)
            and not self.item.prefix
            and a.base.name in self.params
        )

    def load_param(self, kind: str, element: str, regs: list[Any], a: ptx.Memory) -> None:
        assert isinstance(a.base, ptx.Symbol)
        p = self.params[a.base.name]
        size = SIZES[kind]
        at = a.offset + a.base.offset
        if at < 0 or at + size * len(regs) > p.size:
            raise self.error(
                f"bytes {at} to {at + size * len(regs)} of parameter {p.name}, which has {p.size}"
            )
        for k, r in enumerate(regs):
            if self.sink(r):
                continue
            t = self.register(r.name)
            if t is None:
                raise self.error(f"{r} is not a register")
            signed = kind[0] == "s" and size < 4
            e = self.put(
                f"ldparam.{element if signed else 'u' + element[1:]}.{self.types[t.name]}",
                [t],
                imm=p.offset + at + k * size,
            )
            e.defs = [t.name]

    def do_ldu(self) -> None:
        self.do_ld()

    def do_st(self) -> None:
        kind = self.type()
        if kind == "b128":
            raise self.error("128-bit registers are not executed")
        flags = self.semantics()
        vector = self.take("v2", "v4", "v8")
        space = self.space()
        a, v = self.cache(self.ops, 2)[:2]
        values = list(v.items) if isinstance(v, ptx.Vector) else [v]
        if vector and len(values) != int(vector[1:]):
            raise self.error(f"{self.item.ins.opcode}: {len(values)} values")
        if space == "param":
            space = "local"
        self.access_shared(space, SIZES[kind])
        base, offset, bits = self.address(a, space)
        sources: list[Source] = []
        for x in values:
            r = self.register(x.name) if isinstance(x, ptx.Register | ptx.Symbol) else None
            if r is None:
                sources.append(self.src(x, kind))
            elif self.types[r.name] == 64 and SIZES[kind] < 8:
                t = self.temporary(32)
                self.alu("extract.64", t, r, imm=0, imm2=0xFFFFFFFF)
                sources.append(t)
            elif self.types[r.name] == 32 and SIZES[kind] == 8:
                raise self.error(f"{self.item.ins.opcode}: a register that is too narrow")
            else:
                sources.append(r)
        element = "u" + self.memory_type(kind)[1:]
        e = self.put(
            f"st.{element}.{width_of(kind)}",
            [-1, base],
            items=sources,
            n=len(sources),
            imm=offset,
            imm2=bits,
            flags=flags,
            memory="store",
        )
        e.uses = [x.name for x in [base, *sources] if isinstance(x, Reg)]
        e.address = base.name if isinstance(base, Reg) else None
        e.values = [x.name for x in sources if isinstance(x, Reg)]

    def do_atom(self) -> None:
        self.atomic(False)

    def do_red(self) -> None:
        if self.mods and self.mods[0] == "async":
            raise self.error("red.async is not executed")
        self.atomic(True)

    def atomic(self, red: bool) -> None:
        kind = self.type()
        flags = self.semantics() | STRONG
        vector = self.take("v2", "v4", "v8")
        space = self.space()
        self.has("noftz")
        op = self.take("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")
        if op is None:
            raise self.error(f"{self.item.ins.opcode}: no operation")
        most = (1 if red else 2) + (2 if op == "cas" else 1)
        ops = self.cache(list(self.ops), most)
        if vector:
            if not red:
                raise self.error(f"{self.item.ins.opcode}: vector atom is not executed")
            base, offset, bits = self.address(ops[0], space)
            sources = [self.src(x, kind) for x in ops[1].items]
            e = self.put(
                f"redv.{op}.{kind}",
                [-1, base],
                items=sources,
                n=len(sources),
                imm=offset,
                imm2=bits,
                flags=flags,
                memory="atomic",
            )
            e.uses = [x.name for x in [base, *sources] if isinstance(x, Reg)]
            e.address = base.name if isinstance(base, Reg) else None
            e.values = [x.name for x in sources if isinstance(x, Reg)]
            return
        d: Any = -1
        if not red:
            d = -1 if self.sink(ops[0]) else self.dst(ops[0], kind)
            ops = ops[1:]
        self.access_shared(space, SIZES[kind])
        base, offset, bits = self.address(ops[0], space)
        sources = [self.src(x, kind) for x in ops[1:]]
        width = 8 * SIZES[kind]
        if kind in ("f16", "bf16", "f16x2", "bf16x2", "f32", "f64") and op != "exch":
            name = f"atom.{op}.{kind}"
        elif op in ("min", "max"):
            name = f"atom.{op}.{kind}"
        else:
            name = f"atom.{op}.{width}"
        e = self.put(name, [d, base, *sources], imm=offset, imm2=bits, flags=flags, memory="atomic")
        e.defs = [d.name] if isinstance(d, Reg) else []
        e.uses = [x.name for x in [base, *sources] if isinstance(x, Reg)]
        e.address = base.name if isinstance(base, Reg) else None
        e.values = [x.name for x in sources if isinstance(x, Reg)]

    def nothing(self) -> None:
        """A hint: its registers are read, nothing happens."""
        e = self.put("nop")
        self.mods.clear()
        for x in self.ops:
            base = x.base if isinstance(x, ptx.Memory) else x
            if isinstance(base, ptx.Register | ptx.Symbol):
                r = self.register(base.name)
                if r is not None and e.op == "nop":
                    e.uses.append(r.name)

    def do_prefetch(self) -> None:
        self.nothing()

    def do_prefetchu(self) -> None:
        self.nothing()

    def do_applypriority(self) -> None:
        self.nothing()

    def do_discard(self) -> None:
        self.nothing()

    def do_createpolicy(self) -> None:
        self.mods.clear()
        self.alu("mov.64", self.dst(self.ops[0], "b64"), Const(0, 64))

    def do_pmevent(self) -> None:
        self.nothing()

    def do_griddepcontrol(self) -> None:
        self.nothing()

    def do_setmaxnreg(self) -> None:
        self.nothing()

    # -- asynchronous copies, matrices -------------------------------------------------------------

    def do_cp(self) -> None:
        if self.take("async") is None:
            raise self.error(f"{self.item.ins.opcode}: not executed")
        if self.has("commit_group"):
            self.put("cp.async.commit_group")
            return
        if self.has("wait_group"):
            (n,) = self.need(1)
            self.put("cp.async.wait_group", imm=n.value).memory = ""
            return
        if self.has("wait_all"):
            self.put("cp.async.wait_all")
            return
        if self.has("mbarrier"):
            if not self.has("arrive"):
                raise self.error(f"{self.item.ins.opcode}: not executed")
            noinc = self.has("noinc")
            self.take("shared", "shared::cta")
            self.take("b64")
            (a,) = self.need(1)
            base, offset, bits = self.address(a, "shared")
            e = self.put(
                "mbarrier",
                [-1, base, -1, -1, int(noinc)],
                n=12,
                imm=offset,
                imm2=bits,
                memory="atomic",
            )
            e.uses = [base.name] if isinstance(base, Reg) else []
            e.address = base.name if isinstance(base, Reg) else None
            return
        if self.has("bulk"):
            raise self.error(f"{self.item.ins.opcode}: bulk copies (TMA) are not executed")
        self.take("shared", "shared::cta", "shared::cluster")
        self.take("global")
        policy = "L2::cache_hint" in self.mods
        ops = list(self.ops)
        while self.take(*_CACHE):
            pass
        if policy:
            ops.pop()
        dst, src, size = ops[:3]
        take: Any = -1
        ignore: Any = -1
        if len(ops) > 3:
            x = ops[3]
            if (
                isinstance(x, ptx.Register | ptx.Symbol)
                and self.is_reg(x)
                and self.types[self.register(x.name).name] == 1
            ):  # type: ignore[union-attr]
                ignore, negated = self.pred(x)
                if negated:
                    raise self.error("a negated ignore-src")
            else:
                take = self.src(x, "u32")
        base, offset, bits = self.address(dst, "shared")
        gbase, goffset, gbits = self.address(src, "global")
        if not gbits & 1:
            raise self.error("a global address of 32 bits")
        e = self.put(
            "cp.async",
            [-1, base, gbase, take, -1, ignore],
            list_values=[goffset],
            n=size.value,
            imm=offset,
            imm2=bits,
            memory="copy",
        )
        e.uses = [x.name for x in (base, gbase, take, ignore) if isinstance(x, Reg)]
        e.address = gbase.name if isinstance(gbase, Reg) else None
        e.values = [base.name] if isinstance(base, Reg) else []

    def do_ldmatrix(self) -> None:
        self.matrix("ldmatrix")

    def do_stmatrix(self) -> None:
        self.matrix("stmatrix")

    def matrix(self, op: str) -> None:
        self.take("sync")
        self.take("aligned")
        shape = self.take("m8n8", "m16n16", "m8n16", "m16n8")
        number = self.take("x1", "x2", "x4")
        trans = self.has("trans")
        self.take("shared", "shared::cta")
        kind = self.take("b16", "b8")
        if shape != "m8n8" or kind != "b16":
            raise self.error(f"{self.item.ins.opcode}: only m8n8 of b16 is executed")
        store = op == "stmatrix"
        a, v = self.need(2) if store else reversed(self.need(2))
        regs = list(v.items) if isinstance(v, ptx.Vector) else [v]
        if len(regs) != int((number or "x1")[1:]):
            raise self.error(f"{self.item.ins.opcode}: {len(regs)} registers")
        base, offset, bits = self.address(a, "shared")
        items = [self.src(r, "b32") if store else self.dst(r, "b32") for r in regs]
        e = self.put(
            op,
            [-1, base, -1, -1, -1, int(trans)],
            items=items,
            n=len(items),
            imm=offset,
            imm2=bits,
            memory="store" if store else "load",
        )
        e.uses = [base.name] if isinstance(base, Reg) else []
        e.address = base.name if isinstance(base, Reg) else None
        if store:
            e.uses += [x.name for x in items if isinstance(x, Reg)]
            e.values = [x.name for x in items if isinstance(x, Reg)]
        else:
            e.defs = [x.name for x in items if isinstance(x, Reg)]

    def do_movmatrix(self) -> None:
        raise self.error("movmatrix is not executed")

    def do_mma(self) -> None:
        self.take("sync")
        self.take("aligned")
        shape = self.take("m16n8k4", "m16n8k8", "m16n8k16", "m16n8k32", "m8n8k4")
        if shape is None:
            raise self.error(f"{self.item.ins.opcode}: a shape that is not executed")
        for layout in ("row", "col"):
            if self.take(layout) is None:
                raise self.error(f"{self.item.ins.opcode}: only .row.col is executed")
        sat = self.has("satfinite")
        if self.has("kind::f8f6f4"):
            pass
        types, self.mods = self.mods, []
        d, a, b, c = self.need(4)
        if shape == "m8n8k4":
            if types != ["f64"] * 4:
                raise self.error(f"{self.item.ins.opcode}: not executed")
            ds = [self.dst(x, "f64") for x in d.items]
            srcs = [
                self.src(x, "f64")
                for v in (a, b, c)
                for x in (v.items if isinstance(v, ptx.Vector) else (v,))
            ]
            e = self.put("mma.f64", [], items=[*ds, *srcs], n=4)
            e.defs, e.uses = [x.name for x in ds], [x.name for x in srcs if isinstance(x, Reg)]
            return
        if (
            len(types) != 4
            or types[1] not in ELEMENTS
            or types[2] not in ELEMENTS
            or types[0] != types[3]
        ):
            raise self.error(f"{self.item.ins.opcode}: types that are not executed")
        depth = int(shape.split("k")[1])
        ea, eb = ELEMENTS[types[1]], ELEMENTS[types[2]]
        per = 1 if ea == 2 else 2 if ea <= 1 else 4
        acc = {"f32": 0, "f16": 1, "s32": 2}.get(types[0])
        fits = {1: (4, 8), 2: (8, 16), 4: (16, 32)}[per]
        if acc is None or depth not in fits or (acc == 2) != (ea >= 5) or (eb >= 5) != (ea >= 5):
            raise self.error(f"{self.item.ins.opcode}: not executed")
        nd = 2 if acc == 1 else 4
        na, nb = 2 * (depth // (4 * per)), depth // (4 * per)
        kind = "b32"
        lists = [list(v.items) if isinstance(v, ptx.Vector) else [v] for v in (d, a, b, c)]
        if [len(v) for v in lists] != [nd, na, nb, nd]:
            raise self.error(
                f"{self.item.ins.opcode}: {[len(v) for v in lists]} registers, expected "
                f"{[nd, na, nb, nd]}"
            )
        ds = [self.dst(x, kind) for x in lists[0]]
        srcs = [
            self.src(x, "f32" if isinstance(x, ptx.Immediate) and x.kind != "int" else kind)
            for v in lists[1:]
            for x in v
        ]
        e = self.put(
            "mma",
            [],
            items=[*ds, *srcs],
            n=depth,
            imm=ea | eb << 4 | acc << 8 | (0x1000 if sat else 0),
        )
        e.defs, e.uses = [x.name for x in ds], [x.name for x in srcs if isinstance(x, Reg)]
        e.parts = (nd, na, nb)

    def do_wgmma(self) -> None:
        how = self.take("fence", "commit_group", "wait_group")
        if how:
            self.take("sync")
            self.take("aligned")
            engine = {"fence": "fence", "commit_group": "commit", "wait_group": "wait"}[how]
            self.put(f"wgmma.{engine}", imm=self.ops[0].value if how == "wait_group" else 0)
            return
        if not self.has("mma_async"):
            raise self.error(f"{self.item.ins.opcode}: not executed")
        self.take("sync")
        self.take("aligned")
        saturates = self.has("satfinite")
        shape = next((m for m in self.mods if m.startswith("m64n")), None)
        if shape is None:
            raise self.error(f"{self.item.ins.opcode}: no shape")
        self.mods.remove(shape)
        n = int(shape[4:].split("k")[0])
        types, self.mods = self.mods, []
        acc = {"f32": 0, "f16": 1, "s32": 2}.get(types[0])
        if acc is None or len(types) != 3 or types[1] not in ELEMENTS or types[2] not in ELEMENTS:
            raise self.error(f"{self.item.ins.opcode}: types that are not executed")
        ea, eb = ELEMENTS[types[1]], ELEMENTS[types[2]]
        ops = self.ops
        ds = [self.dst(x, "b32") for x in ops[0].items]
        in_registers = isinstance(ops[1], ptx.Vector)
        a = [self.src(x, "b32") for x in ops[1].items] if in_registers else []
        da = -1 if in_registers else self.src(ops[1], "b64")
        db = self.src(ops[2], "b64")
        p, negated = self.pred(ops[3])
        numbers = [x.value for x in ops[4:]]
        imm = ea | acc << 8 | (0x10000 if negated else 0) | (0x20000 if saturates else 0)
        if acc != 2:
            if numbers[0] == -1:
                imm |= 0x1000
            if numbers[1] == -1:
                imm |= 0x2000
            rest = numbers[2:]
            if in_registers:
                rest = [0, *rest]
            if len(rest) > 0 and rest[0]:
                imm |= 0x4000
            if len(rest) > 1 and rest[1]:
                imm |= 0x8000
        e = self.put("wgmma", [-1, da, db, p], items=[*ds, *a], n=n, imm=imm, imm2=eb)
        e.defs = [x.name for x in ds]
        e.uses = [x.name for x in [*ds, *a, da, db, p] if isinstance(x, Reg)]

    # -- lanes, barriers ---------------------------------------------------------------------------

    def do_shfl(self) -> None:
        self.type()
        if not self.has("sync"):
            raise self.error("shfl without .sync is not in PTX for sm_70 and later")
        mode = self.take("up", "down", "bfly", "idx")
        first, a, b, c, members = self.need(5)
        d, p = (first.first, first.second) if isinstance(first, ptx.Pair) else (first, None)
        dr: Any = -1 if self.sink(d) else self.dst(d, "b32")
        pr: Any = -1 if p is None or self.sink(p) else self.pred(p)[0]
        sources = [self.src(s, "b32") for s in (a, b, c, members)]
        e = self.put(f"shfl.{mode}", [dr, pr, *sources], sync=True)
        e.defs = [x.name for x in (dr, pr) if isinstance(x, Reg)]
        e.uses = [s.name for s in sources if isinstance(s, Reg)]

    def do_vote(self) -> None:
        self.type()
        if not self.has("sync"):
            raise self.error("vote without .sync is not in PTX for sm_70 and later")
        mode = self.take("all", "any", "uni", "ballot")
        d, p, members = self.need(3)
        s, negated = self.pred(p)
        m = self.src(members, "b32")
        dr = self.dst(d, "b32") if mode == "ballot" else self.pred(d)[0]
        e = self.put(f"vote.{mode}", [dr, s, m], imm=int(negated), sync=True)
        e.defs, e.uses = [dr.name], [x.name for x in (s, m) if isinstance(x, Reg)]

    def do_match(self) -> None:
        kind = self.type()
        mode = self.take("any", "all")
        self.has("sync")
        first, a, members = self.need(3)
        d, p = (first.first, first.second) if isinstance(first, ptx.Pair) else (first, None)
        dr = self.dst(d, "b32")
        pr: Any = -1 if p is None else self.pred(p)[0]
        sources = [self.src(a, kind), self.src(members, "b32")]
        e = self.put(f"match.{mode}.{kind}", [dr, pr, *sources], sync=True)
        e.defs = [x.name for x in (dr, pr) if isinstance(x, Reg)]
        e.uses = [s.name for s in sources if isinstance(s, Reg)]

    def do_redux(self) -> None:
        kind = self.type()
        self.has("sync")
        op = self.take("add", "min", "max", "and", "or", "xor")
        nan = ".nan" if self.has("NaN") else ""
        d, a, members = self.need(3)
        e = self.alu(
            f"redux.{op}{nan}.{kind}",
            self.dst(d, kind),
            self.src(a, kind),
            self.src(members, "b32"),
        )
        e.sync = True

    def do_elect(self) -> None:
        self.has("sync")
        first, members = self.need(2)
        d, p = (first.first, first.second) if isinstance(first, ptx.Pair) else (first, None)
        if p is None:
            raise self.error("elect: expected d|p")
        dr: Any = -1 if self.sink(d) else self.dst(d, "b32")
        pr, m = self.pred(p)[0], self.src(members, "b32")
        e = self.put("elect", [dr, pr, m], sync=True)
        e.defs = [x.name for x in (dr, pr) if isinstance(x, Reg)]
        e.uses = [m.name] if isinstance(m, Reg) else []

    def do_activemask(self) -> None:
        self.type()
        self.alu("activemask", self.dst(self.ops[0], "b32"))

    def do_bar(self) -> None:
        if self.has("warp"):
            self.has("sync")
            m = self.src(self.ops[0], "b32")
            e = self.put("bar.warp", [m], sync=True)
            e.uses = [m.name] if isinstance(m, Reg) else []
            return
        self.barrier(True)

    def do_barrier(self) -> None:
        if self.has("cluster"):
            how = self.take("arrive", "wait")
            self.take("release", "relaxed", "acquire")
            self.has("aligned")
            # A cluster of one block: all of its warps meet.
            if how == "wait":
                self.put("barrier", [Const(15, 32), -1], imm=2, sync=True, stops=True)
            else:
                self.put("nop")
            return
        self.barrier(self.has("aligned"))

    def barrier(self, aligned: bool) -> None:
        self.has("cta")
        how = self.take("sync", "arrive", "red")
        imm = (1 if how == "arrive" else 0) | (2 if aligned else 0)
        ops = list(self.ops)
        if how == "red":
            what = self.take("popc", "and", "or")
            self.take("pred", "u32")
            imm |= {"and": 1, "or": 2, "popc": 3}[what or "and"] << 4
            d, number = ops[0], self.src(ops[1], "u32")
            threads: Any = self.src(ops[2], "u32") if len(ops) == 4 else -1
            p, negated = self.pred(ops[-1])
            imm |= 4 if negated else 0
            dr = self.dst(d, "u32") if what == "popc" else self.pred(d)[0]
            e = self.put("barrier", [number, threads, p, dr], imm=imm, sync=True, stops=True)
            e.defs = [dr.name]
            e.uses = [x.name for x in (number, threads, p) if isinstance(x, Reg)]
            return
        number = self.src(ops[0], "u32")
        threads = self.src(ops[1], "u32") if len(ops) > 1 else -1
        if how == "arrive" and len(ops) < 2:
            raise self.error("bar.arrive needs a number of threads")
        e = self.put("barrier", [number, threads], imm=imm, sync=True, stops=True)
        e.uses = [x.name for x in (number, threads) if isinstance(x, Reg)]

    def do_membar(self) -> None:
        level = self.take("cta", "gl", "sys")
        self.put("fence", imm=0 if level == "cta" else 1)

    def do_fence(self) -> None:
        if self.take("proxy", "mbarrier_init"):
            shows = any(m.split("::")[0] == "async" for m in self.mods)
            self.mods.clear()
            self.put("fence.proxy" if shows else "nop")
            return
        self.take("sc", "acq_rel", "acquire", "release")
        scope = self.take(*_SCOPES)
        self.put("fence", imm=0 if scope == "cta" else 1)

    def do_mbarrier(self) -> None:
        how = self.mods.pop(0)
        self.take("shared", "shared::cta", "shared::cluster")
        self.take("b64")
        self.take("release", "acquire", "relaxed")
        self.take(*_SCOPES)
        ops = list(self.ops)
        d: Any = -1
        if how == "pending_count":
            self.alu("mbarrier", self.dst(ops[0], "b32"), self.src(ops[1], "b64"), n=11)
            return
        if how == "init":
            code, address, value = 0, ops[0], self.src(ops[1], "u32")
        elif how == "inval":
            code, address, value = 1, ops[0], -1
        elif how in ("arrive", "arrive_drop"):
            expect = self.has("expect_tx")
            self.has("noComplete")
            code = 9 if expect else 2 if how == "arrive" else 3
            if isinstance(ops[0], ptx.Memory):
                address, rest = ops[0], ops[1:]
            else:
                d = -1 if self.sink(ops[0]) else self.dst(ops[0], "b64")
                address, rest = ops[1], ops[2:]
            value = self.src(rest[0], "u32") if rest else -1
        elif how in ("test_wait", "try_wait"):
            parity = self.has("parity")
            code = {"test_wait": 4, "try_wait": 5}[how] + (2 if parity else 0)
            d, address = self.pred(ops[0])[0], ops[1]
            value = self.src(ops[2], "u32" if parity else "b64")
            if len(ops) > 3:
                self.src(ops[3], "u32")
        elif how == "expect_tx":
            code, address, value = 8, ops[0], self.src(ops[1], "u32")
        elif how == "complete_tx":
            code, address, value = 10, ops[0], self.src(ops[1], "u32")
        else:
            raise self.error(f"{self.item.ins.opcode}: not executed")
        base, offset, bits = self.address(address, "shared")
        e = self.put(
            "mbarrier",
            [d, base, value],
            n=code,
            imm=offset,
            imm2=bits,
            memory="atomic",
            stops=code in (4, 5, 6, 7),
        )
        e.defs = [d.name] if isinstance(d, Reg) else []
        e.uses = [x.name for x in (base, value) if isinstance(x, Reg)]
        e.address = base.name if isinstance(base, Reg) else None

    # -- control -----------------------------------------------------------------------------------

    def label(self, x: Any) -> str:
        if isinstance(x, ptx.Symbol):
            if x.name.startswith("<label>"):
                return x.name[7:]
            return self.item.prefix + x.name
        raise self.error(f"{self.item.ins.opcode}: expected a label")

    def do_bra(self) -> None:
        self.has("uni")
        (target,) = self.need(1)
        self.put("bra", branch=[self.label(target)])

    def do_brx(self) -> None:
        self.has("idx")
        self.has("uni")
        i, targets = self.need(2)
        name = self.item.prefix + targets.name
        if name not in self.flat.targets:
            raise self.error(f"no .branchtargets {targets.name}")
        r = self.src(i, "u32")
        e = self.put("brx", [r], branch=list(self.flat.targets[name]))
        e.uses = [r.name] if isinstance(r, Reg) else []

    def do_ret(self) -> None:
        self.has("uni")
        self.put("exit", ends=True)

    def do_exit(self) -> None:
        self.put("exit", ends=True)

    def do_trap(self) -> None:
        self.put("trap", ends=True)

    def do_brkpt(self) -> None:
        self.put("trap", ends=True)

    def do_nanosleep(self) -> None:
        self.type()
        self.put("yield", stops=True)

    def do_vprintf(self) -> None:
        d, f, a = self.need(3)
        values = []
        for x in (f, a):
            t = self.temporary(64)
            at = self.flat.local[
                self.flat.alias.get(self.item.prefix + x.name, self.item.prefix + x.name)
            ]
            e = self.put(
                "ld.u64.64", [-1, Const(at, 32)], items=[t], n=1, imm2=2 << 1, memory="load"
            )
            e.defs = [t.name]
            values.append(t)
        r = self.temporary(32)
        e = self.put("printf", [r, *values])
        e.defs, e.uses = [r.name], [v.name for v in values]
        at = self.flat.local[
            self.flat.alias.get(self.item.prefix + d.name, self.item.prefix + d.name)
        ]
        e = self.put("st.u32.32", [-1, Const(at, 32)], items=[r], n=1, imm2=2 << 1, memory="store")
        e.uses = e.values = [r.name]

    def do___assertfail(self) -> None:
        self.put("assertfail")

    # -- which parameters are written
    # ----------------------------------------------------------------

    def written(self, code: list[Emitted], kernel: Kernel) -> set[str] | None:
        """Names of pointer parameters that stores may go through, or None if that cannot be told.

        Follows which parameters each register's value can come from, ignoring control flow."""
        origin: dict[str, set[str]] = {}
        by_offset = [(p.offset, p.offset + p.size, p.name) for p in kernel.params]
        changed = True
        while changed:
            changed = False
            for e in code:
                found: set[str] = set()
                if e.op.startswith("ldparam"):
                    found = {n for a, b, n in by_offset if a <= e.imm < b}
                elif e.memory in ("load", "atomic"):
                    found = {"*"} if "64" in e.op else set()
                else:
                    for u in e.uses:
                        found |= origin.get(u, set())
                for d in e.defs:
                    old = origin.setdefault(d, set())
                    if not found <= old:
                        old |= found
                        changed = True
        out: set[str] = set()
        for e in code:
            if (
                e.memory in ("store", "atomic")
                and (e.imm2 >> 1) & 3 in (0, 3)
                and e.op != "mbarrier"
            ):
                if e.address is None:
                    return None
                out |= origin.get(e.address, set())
        return None if "*" in out else out
