"""PTX as text, and what it says: a tokenizer and a recursive-descent parser.

The grammar is that of PTX ISA 9, less what a compiler does not write into a kernel. Every token
knows
its place, so an error says where. Instructions are kept as they stand (opcode, guard, operands);
what they mean is `decode`'s business.
"""

from __future__ import annotations

import bisect
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from .errors import PtxError

__all__ = [
    "Function",
    "Immediate",
    "Instruction",
    "Label",
    "Location",
    "Memory",
    "Module",
    "Register",
    "Symbol",
    "Variable",
    "Vector",
    "parse",
]

SIZES = {
    "b8": 1,
    "u8": 1,
    "s8": 1,
    "b16": 2,
    "u16": 2,
    "s16": 2,
    "f16": 2,
    "bf16": 2,
    "b32": 4,
    "u32": 4,
    "s32": 4,
    "f32": 4,
    "f16x2": 4,
    "bf16x2": 4,
    "tf32": 4,
    "b64": 8,
    "u64": 8,
    "s64": 8,
    "f64": 8,
    "b128": 16,
    "pred": 0,
    "f32x2": 8,
    "u16x2": 4,
    "s16x2": 4,
}


@dataclass(frozen=True)
class Location:
    """A place in a source file; ``inlined_at`` is the call, if the code was inlined."""

    file: str
    line: int
    column: int = 0
    inlined_at: Location | None = None

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"

    @property
    def outermost(self) -> Location:
        """The line of the kernel itself, wherever the inlined function is from."""
        place = self
        while place.inlined_at is not None:
            place = place.inlined_at
        return place


# Operands ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Register:
    """``%r1``, also with a minus sign or ``!`` before it (negated predicates)."""

    name: str
    negated: bool = False


@dataclass(frozen=True)
class Immediate:
    """A constant. ``value`` is an int; for ``0f``/``0d`` constants it is the bits and ``kind``
    says so."""

    value: int
    kind: str = "int"  # int, f32, f64


@dataclass(frozen=True)
class Symbol:
    """The address of a variable or a label's name, plus an offset."""

    name: str
    offset: int = 0


@dataclass(frozen=True)
class Memory:
    """``[base+offset]``; base is a Register, a Symbol, an Immediate or None."""

    base: Register | Symbol | None
    offset: int = 0


@dataclass(frozen=True)
class Vector:
    """``{a, b, ...}``."""

    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Pair:
    """``p|q``: two results."""

    first: Operand
    second: Operand


@dataclass(frozen=True)
class Group:
    """``(a, b)``: the arguments of a call."""

    items: tuple[Operand, ...]


Operand = Register | Immediate | Symbol | Memory | Vector | Pair | Group


@dataclass
class Instruction:
    """One instruction as written. ``opcode`` includes all modifiers."""

    opcode: str
    operands: list[Operand]
    guard: Register | None
    line: int
    column: int
    loc: Location | None = None
    scope: dict[str, str] | None = None

    @property
    def base(self) -> str:
        return self.opcode.split(".", 1)[0]

    @property
    def modifiers(self) -> list[str]:
        return self.opcode.split(".")[1:]


@dataclass
class Label:
    name: str
    line: int


@dataclass
class BranchTargets:
    name: str
    labels: list[str]
    line: int


@dataclass
class Variable:
    """A module's or function's variable, or a parameter. ``count`` elements of ``type``."""

    name: str
    space: str
    type: str
    align: int
    count: int
    extern: bool = False
    unsized: bool = False
    data: bytes | None = None
    symbols: list[tuple[int, str, int]] = field(default_factory=list)  # offset, name, addend
    pointer: bool = False
    line: int = 0

    @property
    def size(self) -> int:
        return SIZES[self.type] * self.count


@dataclass
class Function:
    name: str
    entry: bool
    params: list[Variable]
    returns: list[Variable]
    directives: dict[str, list[int]] = field(default_factory=dict)
    registers: dict[str, str] = field(default_factory=dict)
    ranges: dict[str, tuple[int, str]] = field(default_factory=dict)
    variables: dict[str, Variable] = field(default_factory=dict)
    body: list[Instruction | Label | BranchTargets] | None = None
    line: int = 0

    def register_type(self, name: str) -> str | None:
        found = self.registers.get(name)
        if found is not None:
            return found
        match = re.fullmatch(r"(.*?)(\d+)", name)
        if match:
            declared = self.ranges.get(match.group(1))
            if declared and int(match.group(2)) < declared[0]:
                return declared[1]
            # %r10 may also be declared as %r1<..>
            for cut in range(len(match.group(1)) + 1, len(name)):
                declared = self.ranges.get(name[:cut])
                if declared and int(name[cut:]) < declared[0]:
                    return declared[1]
        return None


@dataclass
class Module:
    text: str
    version: str
    target: str
    address_size: int
    files: dict[int, str]
    variables: dict[str, Variable]
    functions: dict[str, Function]

    @property
    def entries(self) -> dict[str, Function]:
        return {n: f for n, f in self.functions.items() if f.entry}


# Tokens -----------------------------------------------------------------------------------------

_TOKEN = re.compile(
    r"""
    (?P<space>\s+|//[^\n]*|/\*.*?\*/)
  | (?P<float>0[fF][0-9a-fA-F]{8}\b|0[dD][0-9a-fA-F]{16}\b)
  | (?P<decimal>\d+\.\d*(?:[eE][+-]?\d+)?|\d+[eE][+-]?\d+)
  | (?P<int>0[xX][0-9a-fA-F]+U?|0[bB][01]+U?|\d+U?)
  | (?P<string>"[^"\n]*")
  | (?P<directive>\.[A-Za-z_][\w$]*(?:::\w+)*)
  | (?P<name>[A-Za-z_$%][\w$]*(?:(?:\.|::)[\w$]+)*)
  | (?P<mark><<|>>|==|!=|<=|>=|&&|\|\||[][(){}<>,;:=@!|+\-*/%&^~.?])
    """,
    re.X | re.S,
)


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    at: int


def _path(first: str, second: str) -> str:
    return os.path.normpath(os.path.join(first, second))


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.starts = [0] + [m.end() for m in re.finditer("\n", text)]
        self.tokens = list(self._tokenize())
        self.i = 0
        # nvcc lists its files at the end, after the lines that refer to them
        self.files = {
            int(n): _path(first, second)
            for n, first, second in re.findall(
                r'^[ \t]*\.file\s+(\d+)\s+"([^"\n]*)"(?:[ \t]+"([^"\n]*)")?', text, re.M
            )
        }
        self.strings: dict[str, str] = {}
        self.version, self.target, self.address_size = "", "", 64
        self.variables: dict[str, Variable] = {}
        self.functions: dict[str, Function] = {}
        self.loc: Location | None = None
        self.scopes = self.depth = 0

    def _tokenize(self) -> Iterator[_Token]:
        at, match, end = 0, _TOKEN.match, len(self.text)
        while at < end:
            m = match(self.text, at)
            if m is None:
                if self.text[at] == '"':
                    raise self.error("a string that does not end", at)
                if self.text.startswith("/*", at):
                    raise self.error("a comment that does not end", at)
                raise self.error(f"unexpected character {self.text[at]!r}", at)
            if m.lastgroup != "space":
                yield _Token(m.lastgroup or "", m.group(), at)
            at = m.end()
        yield _Token("end", "the end of the text", end)

    # -- places ------------------------------------------------------------------------------------

    def place(self, at: int) -> tuple[int, int]:
        line = bisect.bisect_right(self.starts, at)
        return line, at - self.starts[line - 1] + 1

    def error(self, message: str, at: int | None = None) -> PtxError:
        if at is None:
            at = self.tokens[self.i].at
        line, column = self.place(at)
        end = self.text.find("\n", at)
        source = self.text[self.starts[line - 1] : end if end >= 0 else len(self.text)]
        return PtxError(message, line, column, source)

    # -- tokens ------------------------------------------------------------------------------------

    @property
    def token(self) -> _Token:
        return self.tokens[self.i]

    @property
    def following(self) -> _Token:
        return self.tokens[min(self.i + 1, len(self.tokens) - 1)]

    def take(self, text: str | None = None, kind: str | None = None) -> _Token:
        token = self.tokens[self.i]
        if token.kind == "end":
            raise self.error(f"the text ends where {text or kind or 'more'} was expected")
        if (text is not None and token.text != text) or (kind is not None and token.kind != kind):
            raise self.error(f"expected {text or kind}, found {token.text}")
        self.i += 1
        return token

    def accept(self, text: str) -> bool:
        if self.tokens[self.i].text == text:
            self.i += 1
            return True
        return False

    def integer(self) -> int:
        value = self.expression()
        if value.kind != "int":
            raise self.error("expected an integer")
        return value.value

    def expression(self, level: int = 0) -> Immediate:
        """Constant expressions: integers with + - * and parentheses; floating constants alone."""
        left = self._unary()
        while True:
            op = self.token.text
            if left.kind != "int" or op not in ("+", "-", "*", "<<", ">>", "|", "&"):
                return left
            if level and op in ("+", "-"):
                return left
            self.i += 1
            right = self.expression(1)
            a, b = left.value, right.value
            left = Immediate(
                {
                    "+": a + b,
                    "-": a - b,
                    "*": a * b,
                    "<<": a << b,
                    ">>": a >> b,
                    "|": a | b,
                    "&": a & b,
                }[op]
            )

    def _unary(self) -> Immediate:
        token = self.token
        if self.accept("-"):
            value = self._unary()
            if value.kind != "int":
                bit = 31 if value.kind == "f32" else 63
                return Immediate(value.value ^ (1 << bit), value.kind)
            return Immediate(-value.value)
        if self.accept("+"):
            return self._unary()
        if self.accept("~"):
            return Immediate(~self._unary().value)
        if self.accept("("):
            if self.token.kind == "directive":  # a cast, (.s64) or (.u64)
                self.i += 1
                self.take(")")
                return self._unary()
            value = self.expression()
            self.take(")")
            return value
        if token.kind == "int":
            self.i += 1
            return Immediate(_integer(token.text))
        if token.kind == "float":
            self.i += 1
            return Immediate(int(token.text[2:], 16), "f32" if token.text[1] in "fF" else "f64")
        if token.kind == "decimal":
            self.i += 1
            return Immediate(int.from_bytes(struct.pack("<d", float(token.text)), "little"), "f64")
        if token.text == "WARP_SZ":
            self.i += 1
            return Immediate(32)
        raise self.error(f"expected a constant, found {token.text}")

    # -- the module --------------------------------------------------------------------------------

    def module(self) -> Module:
        while self.token.kind != "end":
            token = self.token
            if token.text == ".version":
                self.i += 1
                self.version = self.take().text
            elif token.text == ".target":
                self.i += 1
                names = [self.take(kind="name").text]
                while self.accept(","):
                    names.append(self.take(kind="name").text)
                self.target = names[0]
            elif token.text == ".address_size":
                self.i += 1
                self.address_size = self.integer()
                if self.address_size != 64:
                    raise self.error("only 64-bit PTX is executed", token.at)
            elif token.text == ".file":
                self.file()
            elif token.text == ".section":
                self.section()
            elif token.text == ".pragma":
                self.skip(";")
            elif token.text == ".alias":
                self.skip(";")
            elif token.kind == "directive":
                self.declaration()
            elif token.text == ";":
                self.i += 1
            else:
                raise self.error(f"expected a directive, found {token.text}")
        if not self.version:
            raise PtxError("no .version directive: this is not PTX")
        if not self.target:
            raise PtxError("no .target directive: this is not PTX")
        return Module(
            self.text,
            self.version,
            self.target,
            self.address_size,
            self.files,
            self.variables,
            self.functions,
        )

    def skip(self, text: str) -> None:
        while self.token.text != text:
            if self.token.kind == "end":
                raise self.error(f"expected {text} before the end of the text")
            self.i += 1
        self.i += 1

    def file(self) -> None:
        self.take(".file")
        number = self.integer()
        first, second = self.take(kind="string").text[1:-1], ""
        if self.token.kind == "string":  # folder and name apart, as LLVM writes them in DWARF 5
            second = self.take().text[1:-1]
        self.files[number] = _path(first, second)
        while self.accept(","):
            self.take()

    def section(self) -> None:
        self.take(".section")
        self.take()
        self.take("{")
        depth = 1
        while depth:
            if self.token.kind == "end":
                raise self.error("a .section that does not end")
            depth += {"{": 1, "}": -1}.get(self.token.text, 0)
            self.i += 1

    def declaration(self) -> None:
        extern = False
        while self.token.text in (".visible", ".extern", ".weak", ".common"):
            extern = extern or self.token.text == ".extern"
            self.i += 1
        if self.token.text in (".entry", ".func"):
            self.function()
        elif self.token.text in (".global", ".const", ".shared", ".tex"):
            for variable in self.variable(extern):
                self.variables[variable.name] = variable
        else:
            raise self.error(f"unknown directive {self.token.text}")

    # -- variables ---------------------------------------------------------------------------------

    def variable(self, extern: bool = False) -> list[Variable]:
        """``.space .align n .type name[dims] = {...}, name...;``"""
        space = self.take(kind="directive").text[1:].split("::")[0]
        align, kind, vector = 0, "", 1
        while self.token.kind == "directive":
            text = self.token.text
            if text == ".align":
                self.i += 1
                align = self.integer()
            elif text in (".v2", ".v4"):
                vector = int(text[2:])
                self.i += 1
            elif text[1:] in SIZES:
                kind = text[1:]
                self.i += 1
            elif text.startswith(".attribute"):
                self.i += 1
                self.take("(")
                self.skip(")")
            else:
                raise self.error(f"unexpected {text} in a declaration")
        if not kind:
            raise self.error("expected a type")
        out = []
        while True:
            token = self.take(kind="name")
            count, unsized = vector, False
            if self.token.text == "<":
                self.take("<")
                number = self.integer()
                self.take(">")
                out += [
                    Variable(f"{token.text}{k}", space, kind, align or SIZES[kind], vector)
                    for k in range(number)
                ]
            else:
                while self.accept("["):
                    if self.token.text == "]":
                        unsized, count = True, 0
                    else:
                        count *= self.integer()
                    self.take("]")
                v = Variable(
                    token.text,
                    space,
                    kind,
                    align or max(1, SIZES[kind] * vector),
                    count,
                    extern,
                    unsized,
                    line=self.place(token.at)[0],
                )
                if self.accept("="):
                    self.initializer(v)
                out.append(v)
            if not self.accept(","):
                break
        self.take(";")
        return out

    def initializer(self, v: Variable) -> None:
        size = SIZES[v.type]
        items: list[Immediate | tuple[str, int]] = []

        def value() -> None:
            if self.accept("{"):
                while self.token.text != "}":
                    value()
                    if not self.accept(","):
                        break
                self.take("}")
            elif self.token.kind == "name" and self.token.text != "WARP_SZ":
                name = self.take().text
                offset = 0
                if name in ("generic", "mask") or self.token.text == "(":
                    self.take("(")
                    name = self.take(kind="name").text
                    if self.accept("+"):
                        offset = self.integer()
                    self.take(")")
                if self.accept("+"):
                    offset += self.integer()
                items.append((name, offset))
            else:
                items.append(self.expression())

        value()
        if v.unsized:
            v.count, v.unsized = len(items), False
        if len(items) > v.count:
            raise self.error(f"{len(items)} values for the {v.count} elements of {v.name}")
        data = bytearray(v.size)
        for k, item in enumerate(items):
            at = k * size
            if isinstance(item, tuple):
                v.symbols.append((at, *item))
            else:
                bits = item.value
                if item.kind == "f64" and v.type == "f32":
                    number = struct.unpack("<d", item.value.to_bytes(8, "little"))[0]
                    bits = int.from_bytes(struct.pack("<f", number), "little")
                data[at : at + size] = (bits & ((1 << 8 * size) - 1)).to_bytes(size, "little")
        v.data = bytes(data)

    def parameters(self) -> list[Variable]:
        out: list[Variable] = []
        if not self.accept("("):
            return out
        while self.token.text != ")":
            token = self.take(kind="directive")
            if token.text not in (".param", ".reg"):
                raise self.error(f"expected .param, found {token.text}", token.at)
            align, kind, pointer = 0, "", False
            while self.token.kind == "directive":
                text = self.take().text
                if text == ".align":
                    align = self.integer()
                elif text[1:] in SIZES:
                    kind = text[1:]
                elif text == ".ptr":
                    pointer = True
                elif text not in (".global", ".shared", ".const", ".local", ".param"):
                    raise self.error(f"unexpected {text} in a parameter")
            if not kind:
                raise self.error("a parameter without a type")
            name = self.take(kind="name").text
            count = 1
            if self.accept("["):
                count = 0 if self.token.text == "]" else self.integer()
                self.take("]")
            # .ptr's .align is that of what is pointed to
            natural = SIZES[kind]
            out.append(
                Variable(
                    name,
                    "param" if token.text == ".param" else "reg",
                    kind,
                    natural if pointer or not align else align,
                    count,
                    pointer=pointer,
                )
            )
            if not self.accept(","):
                break
        self.take(")")
        return out

    # -- functions ---------------------------------------------------------------------------------

    def function(self) -> None:
        token = self.take()
        entry = token.text == ".entry"
        returns = [] if entry else self.parameters()
        name = self.take(kind="name").text
        f = Function(name, entry, self.parameters(), returns, line=self.place(token.at)[0])
        while self.token.kind == "directive":
            text = self.take().text
            numbers = []
            if text == ".pragma":
                self.skip(";")
                continue
            while self.token.kind == "int":
                numbers.append(self.integer())
                if not self.accept(","):
                    break
            f.directives[text[1:]] = numbers
        if self.accept(";"):
            self.functions.setdefault(name, f)
            return
        self.loc = None
        self.depth = 0
        f.body = []
        self.block(f, {})
        self.functions[name] = f

    def block(self, f: Function, names: dict[str, str]) -> None:
        """``{ ... }``: declarations belong to the scope, so names are made unique."""
        opening = self.take("{")
        assert f.body is not None
        outer = not self.depth
        names, first, labels = dict(names), len(f.body), {}
        self.depth += 1
        while True:
            token = self.token
            text = token.text
            if text == "}":
                self.i += 1
                self.depth -= 1
                for k in range(
                    first, len(f.body) if labels else 0
                ):  # labels used before they stand
                    item = f.body[k]
                    if isinstance(item, Instruction) and item.base in ("bra", "brx"):
                        item.operands = [
                            Symbol(labels[x.name])
                            if isinstance(x, Symbol) and x.name in labels
                            else x
                            for x in item.operands
                        ]
                return
            if token.kind == "end":
                raise self.error("a function that does not end", opening.at)
            if text == "{":
                self.scopes += 1
                inner = dict(names)
                self.block(f, inner)
            elif text == ".reg":
                self.registers(f, names, outer)
            elif text in (".local", ".shared", ".param", ".const", ".global"):
                for v in self.variable():
                    if not outer or text == ".param":
                        unique = f"{v.name}~{self.scopes}"
                        names[v.name] = unique
                        v.name = unique
                    f.variables[v.name] = v
            elif text == ".loc":
                self.location()
            elif text in (".pragma",):
                self.skip(";")
            elif text == ".file":
                self.file()
            elif token.kind == "name" and self.following.text == ":":
                self.i += 2
                if self.token.text == ".branchtargets":
                    self.i += 1
                    labels = [self.take(kind="name").text]
                    while self.accept(","):
                        labels.append(self.take(kind="name").text)
                    self.take(";")
                    f.body.append(BranchTargets(text, labels, self.place(token.at)[0]))
                elif self.token.text == ".callprototype":
                    self.skip(";")
                elif self.token.text == ".calltargets":
                    self.skip(";")
                else:
                    unique = text if outer else f"{text}~{self.scopes}"
                    if not outer:
                        names[text] = labels[text] = unique
                    f.body.append(Label(unique, self.place(token.at)[0]))
            elif text == ";":
                self.i += 1
            elif token.kind == "directive":
                raise self.error(f"unknown directive {text}")
            else:
                f.body.append(self.instruction(names))

    def registers(self, f: Function, names: dict[str, str], outer: bool) -> None:
        self.take(".reg")
        kind, vector = "", 1
        while self.token.kind == "directive":
            text = self.take().text
            if text in (".v2", ".v4"):
                vector = int(text[2:])
            elif text[1:] in SIZES:
                kind = text[1:]
            else:
                raise self.error(f"unexpected {text} in a register declaration")
        if not kind or vector != 1:
            raise self.error("expected a scalar register type")
        while True:
            name = self.take(kind="name").text
            if self.accept("<"):
                count = self.integer()
                self.take(">")
                f.ranges[name] = (count, kind)
            else:
                if not outer:
                    unique = f"{name}~{self.scopes}"
                    names[name] = unique
                    name = unique
                f.registers[name] = kind
            if not self.accept(","):
                break
        self.take(";")

    def location(self) -> None:
        self.take(".loc")
        file, line, column = self.integer(), self.integer(), self.integer()
        inlined = None
        while self.accept(","):
            what = self.take(kind="name").text
            if what == "function_name":
                self.take(kind="name")
                if self.accept("+"):
                    self.integer()
            elif what == "inlined_at":
                at = (self.integer(), self.integer(), self.integer())
                inlined = self._calls.get(at) or Location(
                    self.files.get(at[0], f"file {at[0]}"), at[1], at[2]
                )
            else:
                raise self.error(f"unexpected {what} in .loc")
        name = self.files.get(file, f"file {file}")
        if line:  # 0: code of the compiler's own, which stays with the line before
            self.loc = Location(name, line, column, inlined)
            self._calls[file, line, column] = self.loc

    @property
    def _calls(self) -> dict[tuple[int, int, int], Location]:
        if not hasattr(self, "_calls_"):
            self._calls_: dict[tuple[int, int, int], Location] = {}
        return self._calls_

    def instruction(self, names: dict[str, str]) -> Instruction:
        start = self.token
        guard = None
        if self.accept("@"):
            negated = self.accept("!")
            name = self.take(kind="name").text
            guard = Register(names.get(name, name), negated)
        token = self.take(kind="name")
        operands: list[Operand] = []
        while self.token.text != ";":
            operands.append(self.operand(names))
            if not self.accept(","):
                break
        if self.token.text != ";":
            raise self.error(f"expected ; after {token.text}, found {self.token.text}")
        self.i += 1
        line, column = self.place(start.at)
        return Instruction(token.text, operands, guard, line, column, self.loc)

    def operand(self, names: dict[str, str]) -> Operand:
        token = self.token
        if self.accept("{"):
            items = []
            while self.token.text != "}":
                items.append(self.operand(names))
                if not self.accept(","):
                    break
            self.take("}")
            return Vector(tuple(items))
        if token.text == "(" and self.following.kind in ("name",):
            self.i += 1
            items = []
            while self.token.text != ")":
                items.append(self.operand(names))
                if not self.accept(","):
                    break
            self.take(")")
            return Group(tuple(items))
        if token.text == "(" and self.following.text == ")":
            self.i += 2
            return Group(())
        if self.accept("["):
            base: Register | Symbol | None = None
            offset = 0
            if self.token.kind == "name":
                name = self.take().text
                base = self._name(names.get(name, name))
                if self.token.text in ("+", "-"):
                    sign = 1 if self.take().text == "+" else -1
                    offset = sign * self.integer()
            else:
                offset = self.integer()
            if self.token.text == ",":
                raise self.error(
                    "tensor addresses (a tensor map with coordinates) are not executed"
                )
            self.take("]")
            return Memory(base, offset)
        if self.accept("!"):
            name = self.take(kind="name").text
            return Register(names.get(name, name), True)
        if token.kind == "name" and token.text != "WARP_SZ":
            self.i += 1
            first = self._name(names.get(token.text, token.text))
            if self.accept("|"):
                name = self.take(kind="name").text
                return Pair(first, self._name(names.get(name, name)))
            if isinstance(first, Symbol) and self.token.text in ("+", "-"):
                sign = 1 if self.take().text == "+" else -1
                return Symbol(first.name, sign * self.integer())
            return first
        if token.text == "-" and self.following.kind == "name":
            raise self.error("a minus sign before a register")
        return self.expression()

    @staticmethod
    def _name(name: str) -> Register | Symbol:
        return Register(name) if name.startswith("%") else Symbol(name)


def _integer(text: str) -> int:
    text = text.rstrip("U")
    if text[:2] in ("0x", "0X", "0b", "0B"):
        return int(text, 0)
    if len(text) > 1 and text[0] == "0":
        return int(text, 8)
    return int(text)


def parse(text: str) -> Module:
    """Reads PTX. Raises `PtxError` with line and column for what is not PTX."""
    if not text.strip():
        raise PtxError("the text is empty")
    return _Parser(text).module()
