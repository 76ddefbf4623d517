"""From a parsed kernel to the engine's program.

Calls are inlined (device code has no recursion worth the name), control flow is cut into basic
blocks
and these are put in an order in which lanes that parted meet again, virtual registers are packed
into few slots by their live ranges, and every operand becomes an offset into a warp's register
file. `isa` says what each instruction is to the engine.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import ptx
from .errors import PtxError
from .isa import Const, Emitted, Emitter, Reg

__all__ = ["Decoded", "Kernel", "Param", "Row", "decode"]

PARAM_BASE = 3 << 56  # where a kernel's parameters lie if their address is taken

INST = np.dtype(
    [
        ("op", "<u4"),
        ("guard", "<i4"),
        ("guard_xor", "<u4"),
        ("flags", "<u4"),
        ("o", "<i4", 6),
        ("id", "<u4"),
        ("n", "<u4"),
        ("list", "<i4"),
        ("taint", "<i4"),
        ("imm", "<i8"),
        ("imm2", "<i8"),
    ]
)
BLOCK = np.dtype([("first", "<i4"), ("last", "<i4"), ("next", "<i4"), ("sync", "<i4")])

TAINT, CONTROL, STRONG, ACQUIRE, RELEASE, CONST, CHECK = 1, 2, 4, 8, 16, 32, 64
UNCOUNTED = 128

SPECIALS = {
    "%tid.x": 0,
    "%tid.y": 1,
    "%tid.z": 2,
    "%ntid.x": 3,
    "%ntid.y": 4,
    "%ntid.z": 5,
    "%ctaid.x": 6,
    "%ctaid.y": 7,
    "%ctaid.z": 8,
    "%nctaid.x": 9,
    "%nctaid.y": 10,
    "%nctaid.z": 11,
    "%laneid": 12,
    "%warpid": 13,
    "%nwarpid": 14,
    "%smid": 15,
    "%nsmid": 16,
    "%gridid": 17,
    "%lanemask_eq": 18,
    "%lanemask_lt": 19,
    "%lanemask_le": 20,
    "%lanemask_gt": 21,
    "%lanemask_ge": 22,
    "%dynamic_smem_size": 23,
    "%total_smem_size": 24,
    "%clusterid.x": 6,
    "%clusterid.y": 7,
    "%clusterid.z": 8,
    "%nclusterid.x": 9,
    "%nclusterid.y": 10,
    "%nclusterid.z": 11,
}
# Where the driver keeps a cooperative grid's barrier; %envreg1 and 2 hold the address's halves.
GRID_WORKSPACE = 1 << 50
FIXED = {
    "%envreg1": GRID_WORKSPACE >> 32,
    "%envreg2": GRID_WORKSPACE & 0xFFFFFFFF,
    "%cluster_ctaid.x": 0,
    "%cluster_ctaid.y": 0,
    "%cluster_ctaid.z": 0,
    "%cluster_nctaid.x": 1,
    "%cluster_nctaid.y": 1,
    "%cluster_nctaid.z": 1,
    "%cluster_ctarank": 0,
    "%cluster_nctarank": 1,
}


@dataclass(frozen=True)
class Param:
    """A kernel's parameter. ``pointer``: declared with ``.ptr`` (Triton does, nvcc does not)."""

    name: str
    offset: int
    size: int
    align: int
    type: str
    pointer: bool


@dataclass
class Row:
    """One PTX instruction that may run: what reports and counts refer to."""

    index: int
    opcode: str
    text: str
    ptx_line: int
    loc: ptx.Location | None
    block: int = -1
    function: str = ""
    engine: str = ""


@dataclass
class Decoded:
    """The program in the engine's form; see csrc/emulator/engine.h."""

    inst: np.ndarray
    block: np.ndarray
    lists: np.ndarray
    constants: np.ndarray
    special: np.ndarray
    relocations: list[tuple[int, str, int]]
    register_bytes: int
    n_pred: int
    local_bytes: int
    shared_granule: int
    has_taint: bool
    followed: np.ndarray | None  # inst, undefined values followed from loads of shared memory on
    taint_init: np.ndarray
    shared_variables: list[tuple[str, int, int]]  # name, offset, size
    dynamic_offset: int
    static_shared: int
    writes: set[str] | None
    uses_dynamic: bool


@dataclass
class Kernel:
    """A kernel of a module, ready to run. See the package's docstring."""

    module: Any
    name: str
    function: ptx.Function
    params: list[Param]
    param_bytes: int
    rows: list[Row] = field(default_factory=list)
    decoded: Decoded | None = None

    @property
    def instructions(self) -> list[Row]:
        self.program  # noqa: B018  (decoding fills the rows)
        return self.rows

    @property
    def program(self) -> Decoded:
        if self.decoded is None:
            self.decoded = decode(self)
        return self.decoded

    @property
    def blocks(self) -> list[tuple[int, int]]:
        return [(int(b["first"]), int(b["last"])) for b in self.program.block]

    @property
    def target(self) -> str:
        return self.module.target

    @property
    def static_shared(self) -> int:
        """Bytes of the ``.shared`` variables with a size."""
        return self.program.static_shared

    @property
    def uses_dynamic_shared(self) -> bool:
        return self.program.uses_dynamic

    def _directive(self, name: str) -> list[int] | None:
        return self.function.directives.get(name)

    @property
    def max_threads(self) -> int | None:
        value = self._directive("maxntid")
        return int(np.prod(value)) if value else None

    @property
    def required_threads(self) -> tuple[int, int, int] | None:
        value = self._directive("reqntid")
        return tuple((value + [1, 1])[:3]) if value else None  # type: ignore[return-value]

    @property
    def min_blocks(self) -> int | None:
        value = self._directive("minnctapersm")
        return value[0] if value else None

    def __repr__(self) -> str:
        return f"<Kernel {self.name}: {len(self.params)} parameters, {self.target}>"


def make_kernel(module: Any, function: ptx.Function) -> Kernel:
    offset, params = 0, []
    for v in function.params:
        offset = -(-offset // v.align) * v.align
        params.append(Param(v.name, offset, v.size, v.align, v.type, v.pointer))
        offset += v.size
    return Kernel(module, function.name, function, params, offset)


# ------------------------------------------------------------------------------------------------
# Flattening: calls inlined, names made unique


@dataclass
class _Item:
    """An instruction in the flat program, with the names of its instance."""

    ins: ptx.Instruction
    prefix: str
    function: ptx.Function
    row: int


@dataclass
class _Mark:
    label: str


class _Flat:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel, self.module = kernel, kernel.module.parsed
        self.items: list[_Item | _Mark] = []
        self.targets: dict[str, list[str]] = {}
        self.types: dict[str, str] = {}
        self.local: dict[str, int] = {}
        self.local_bytes = 0
        self.shared: dict[str, ptx.Variable] = {}
        self.alias: dict[str, str] = {}
        self.rows: dict[tuple[str, int, int], int] = {}
        self.lines = kernel.module.text.split("\n")
        self.instances = 0
        self.return_label: dict[str, str] = {}
        self.walk(kernel.function, "", [])

    def local_variable(self, name: str, size: int, align: int) -> None:
        at = -(-self.local_bytes // align) * align
        self.local[name] = at
        self.local_bytes = at + size

    def row(self, function: ptx.Function, ins: ptx.Instruction) -> int:
        key = (function.name, ins.line, ins.column)
        if key not in self.rows:
            text = self.lines[ins.line - 1].strip()
            index = len(self.kernel.rows)
            self.kernel.rows.append(
                Row(index, ins.opcode, text, ins.line, ins.loc, -1, function.name)
            )
            self.rows[key] = index
        return self.rows[key]

    def walk(self, f: ptx.Function, prefix: str, stack: list[str]) -> None:
        if f.body is None:
            raise PtxError(
                f"{f.name} has no body: it is defined in another file, which must be linked "
                "in (nvcc without -rdc=true puts everything into one)",
                f.line,
            )
        for name, v in f.variables.items():
            if v.space == "shared":
                self.shared[name] = v
            elif v.space in ("local", "param"):
                self.local_variable(
                    prefix + name, v.size, max(v.align, 8 if v.space == "param" else 1)
                )
        exit_label = prefix + "<return>"
        body = f.body
        k = 0
        while k < len(body):
            x = body[k]
            k += 1
            if isinstance(x, ptx.Label):
                self.items.append(_Mark(prefix + x.name))
            elif isinstance(x, ptx.BranchTargets):
                self.targets[prefix + x.name] = [prefix + n for n in x.labels]
            elif x.base == "call":
                self.call(f, x, prefix, stack)
            elif x.base == "ret" and stack:
                jump = ptx.Instruction(
                    "bra", [ptx.Symbol("<return>")], x.guard, x.line, x.column, x.loc
                )
                self.items.append(_Item(jump, prefix, f, self.row(f, x)))
            else:
                self.items.append(_Item(x, prefix, f, self.row(f, x)))
        if stack:
            self.items.append(_Mark(exit_label))

    def call(self, f: ptx.Function, x: ptx.Instruction, prefix: str, stack: list[str]) -> None:
        parts = list(x.operands)
        returns = parts.pop(0).items if isinstance(parts[0], ptx.Group) and len(parts) > 1 else ()
        target = parts.pop(0)
        given = parts.pop(0).items if parts and isinstance(parts[0], ptx.Group) else ()
        name = getattr(target, "name", "?")
        if isinstance(target, ptx.Register) or f.register_type(name):
            raise self.error(x, "an indirect call (through a register): not executed")
        callee = self.module.functions.get(name)
        if name in ("vprintf", "__assertfail", "malloc", "free"):
            if name in ("malloc", "free"):
                raise self.error(x, f"{name} on the device: not executed")
            row = self.row(f, x)
            call = ptx.Instruction(
                f"<{name}>", [*returns, *given], x.guard, x.line, x.column, x.loc
            )
            self.items.append(_Item(call, prefix, f, row))
            return
        if callee is None:
            raise self.error(x, f"a call of {name}, which the module does not have")
        if name in stack or name == self.kernel.name:
            raise self.error(x, f"{name} calls itself: recursion is not executed")
        if len(given) != len(callee.params) or len(returns) != len(callee.returns):
            raise self.error(
                x,
                f"{name} takes {len(callee.params)} arguments and returns "
                f"{len(callee.returns)}, not {len(given)} and {len(returns)}",
            )
        self.instances += 1
        inner = f"{name}#{self.instances}:"
        row = self.row(f, x)
        skip = None
        if x.guard is not None:
            skip = f"{inner}<skip>"
            guard = ptx.Register(x.guard.name, not x.guard.negated)
            jump = ptx.Instruction(
                "bra", [ptx.Symbol("<label>" + skip)], guard, x.line, x.column, x.loc
            )
            self.items.append(_Item(jump, prefix, f, row))
        before = []
        for formal, actual in zip(callee.params, given, strict=True):
            if isinstance(actual, ptx.Symbol) and not f.register_type(actual.name):
                self.alias[inner + formal.name] = self.alias.get(
                    prefix + actual.name, prefix + actual.name
                )
            else:  # a register or a constant
                if formal.space == "reg":
                    raise self.error(x, "a call with .reg parameters: not executed")
                self.local_variable(inner + formal.name, formal.size, 8)
                op = f"st.param.b{8 * formal.size}"
                before.append(
                    ptx.Instruction(
                        op,
                        [ptx.Memory(ptx.Symbol("<name>" + inner + formal.name)), actual],
                        None,
                        x.line,
                        x.column,
                        x.loc,
                    )
                )
        after = []
        for formal, actual in zip(callee.returns, returns, strict=True):
            if isinstance(actual, ptx.Symbol) and not f.register_type(actual.name):
                self.alias[inner + formal.name] = self.alias.get(
                    prefix + actual.name, prefix + actual.name
                )
            else:
                self.local_variable(inner + formal.name, formal.size, 8)
                op = f"ld.param.b{8 * formal.size}"
                after.append(
                    ptx.Instruction(
                        op,
                        [actual, ptx.Memory(ptx.Symbol("<name>" + inner + formal.name))],
                        None,
                        x.line,
                        x.column,
                        x.loc,
                    )
                )
        self.items += [_Item(i, prefix, f, row) for i in before]
        self.walk(callee, inner, [*stack, name])
        self.items += [_Item(i, prefix, f, row) for i in after]
        if skip:
            self.items.append(_Mark(skip))

    def error(self, x: ptx.Instruction, message: str) -> PtxError:
        return PtxError(message, x.line, x.column, self.lines[x.line - 1])


# ------------------------------------------------------------------------------------------------
# Blocks


@dataclass
class _Block:
    start: int  # first emitted instruction
    end: int
    sync: bool = False
    succ: list[int] = field(default_factory=list)
    next: int = -1
    target: str | None = None
    labels: list[str] = field(default_factory=list)


def _order(blocks: list[_Block]) -> list[int]:
    """A topological order in which every loop is contiguous and begins with its head."""
    reachable: set[int] = set()
    todo = [0]
    while todo:
        b = todo.pop()
        if b in reachable:
            continue
        reachable.add(b)
        todo += blocks[b].succ

    out: list[int] = []

    def components(nodes: set[int], root: int) -> Iterable[list[int]]:
        """Strongly connected components, those that come first first (Tarjan, without
        recursion)."""
        index: dict[int, int] = {}
        low: dict[int, int] = {}
        on: set[int] = set()
        stack: list[int] = []
        found: list[list[int]] = []
        for start in [root, *sorted(nodes)]:
            if start in index:
                continue
            work = [
                (start, iter(sorted((s for s in blocks[start].succ if s in nodes), reverse=True)))
            ]
            index[start] = low[start] = len(index)
            stack.append(start)
            on.add(start)
            while work:
                v, edges = work[-1]
                for w in edges:
                    if w not in index:
                        index[w] = low[w] = len(index)
                        stack.append(w)
                        on.add(w)
                        work.append(
                            (
                                w,
                                iter(
                                    sorted((s for s in blocks[w].succ if s in nodes), reverse=True)
                                ),
                            )
                        )
                        break
                    if w in on:
                        low[v] = min(low[v], index[w])
                else:
                    work.pop()
                    if work:
                        low[work[-1][0]] = min(low[work[-1][0]], low[v])
                    if low[v] == index[v]:
                        part = []
                        while True:
                            w = stack.pop()
                            on.discard(w)
                            part.append(w)
                            if w == v:
                                break
                        found.append(part)
        return reversed(found)

    def arrange(nodes: set[int], root: int) -> None:
        for part in components(nodes, root):
            head = part[-1]
            if len(part) == 1:
                out.append(head)
                continue
            out.append(head)
            rest = set(part) - {head}
            inside = [s for s in blocks[head].succ if s in rest]
            arrange(rest, inside[0] if inside else min(rest))

    arrange(reachable, 0)
    return out


# ------------------------------------------------------------------------------------------------
# Decoding


def decode(kernel: Kernel) -> Decoded:
    kernel.rows.clear()
    flat = _Flat(kernel)
    emitter = Emitter(flat, kernel)
    labels: dict[str, int] = {}
    for item in flat.items:
        if isinstance(item, _Mark):
            labels[item.label] = len(emitter.out)
            emitter.leaders.add(len(emitter.out))
        else:
            emitter.emit(item)
    code = emitter.out
    if not code or not code[-1].ends:
        emitter.implicit_exit(kernel.function)
        code = emitter.out

    # Blocks
    leaders = {0} | {k for k in emitter.leaders if k < len(code)}
    for k, e in enumerate(code):
        if e.branch is not None or e.ends or e.stops:
            leaders.add(k + 1)
        if e.sync:
            leaders.add(k)
    starts = sorted(k for k in leaders if k < len(code))
    at = {k: n for n, k in enumerate(starts)}
    blocks = [
        _Block(s, e, code[s].sync) for s, e in zip(starts, [*starts[1:], len(code)], strict=True)
    ]

    def block_of(label: str, e: Emitted) -> int:
        if label not in labels:
            row = kernel.rows[e.row]
            raise PtxError(
                f"a branch to {label}, which the function does not have", row.ptx_line, 0, row.text
            )
        return at[labels[label]] if labels[label] in at else len(blocks)

    for n, b in enumerate(blocks):
        last = code[b.end - 1]
        follows = n + 1 if n + 1 < len(blocks) else -1
        if last.branch is not None:
            b.succ = [block_of(t, last) for t in last.branch]
            last.targets = b.succ[:]
            if last.guard is not None:
                b.next = follows
        elif last.ends:
            b.next = follows if last.guard is not None else -1
        else:
            b.next = follows
        if b.next >= 0:
            b.succ = [*b.succ, b.next]
    order = _order(blocks)
    position = {b: k for k, b in enumerate(order)}
    code = emitter.out = watch_wgmma(code, blocks, order)

    # Liveness, by blocks, as bit sets
    regs: dict[str, int] = {}

    def bit(name: str) -> int:
        return 1 << regs.setdefault(name, len(regs))

    def mask(names: Iterable[str]) -> int:
        m = 0
        for name in names:
            m |= bit(name)
        return m

    use, kill = {}, {}
    for b in order:
        u = k_ = 0
        for e in code[blocks[b].start : blocks[b].end]:
            u |= mask(e.uses) & ~k_
            if e.guard is not None:
                u |= bit(e.guard[0]) & ~k_
            else:
                k_ |= mask(e.defs)
        use[b], kill[b] = u, k_
    live_in = dict.fromkeys(order, 0)
    live_out = dict.fromkeys(order, 0)
    changed = True
    while changed:
        changed = False
        for b in reversed(order):
            o = 0
            for s in blocks[b].succ:
                o |= live_in.get(s, 0)
            i = use[b] | (o & ~kill[b])
            if i != live_in[b] or o != live_out[b]:
                live_in[b], live_out[b] = i, o
                changed = True
    names = list(regs)
    undefined = [n for n in names if live_in[0] >> regs[n] & 1] if order else []

    # Live ranges over the final order
    first: dict[str, int] = {}
    final: dict[str, int] = {}
    where = 0
    spans = {}
    for b in order:
        spans[b] = (where, where + blocks[b].end - blocks[b].start)
        where = spans[b][1]

    def touch(name: str, at_: int) -> None:
        if name not in first:
            first[name] = final[name] = at_
        else:
            first[name] = min(first[name], at_)
            final[name] = max(final[name], at_)

    def each(bits: int) -> Iterable[str]:
        while bits:
            low = bits & -bits
            yield names[low.bit_length() - 1]
            bits ^= low

    for b in order:
        s, t = spans[b]
        for name in each(live_in[b]):
            touch(name, s)
        for name in each(live_out[b]):
            touch(name, t)
        for k, e in enumerate(code[blocks[b].start : blocks[b].end]):
            for name in e.defs:
                touch(name, s + k)
                if e.early:
                    touch(name, s + k - 0)
            for name in e.uses:
                touch(name, s + k)
            if e.guard is not None:
                touch(e.guard[0], s + k)

    # Slots: 128 bytes for 32-bit lanes, 256 for 64-bit ones; predicates apart
    slots: dict[str, int] = {}
    preds: dict[str, int] = {}
    free32: list[int] = []
    free64: list[int] = []
    top = 0
    special_names = [n for n in names if n in emitter.specials]
    special = []
    for n in special_names:
        wide = emitter.types[n] == 64
        slots[n] = top
        special.append((emitter.specials[n], top))
        top += 256 if wide else 128
    # A destination never shares its slot with a source of the same instruction that dies there:
    # some
    # operations write before they have read everything. So a slot is free after the last use.
    active: list[tuple[int, str]] = []
    import heapq

    for name in sorted(first, key=lambda n: first[n]):
        if name in slots:
            continue
        width = emitter.types[name]
        if width == 1:
            preds[name] = len(preds)
            continue
        while active and active[0][0] < first[name]:
            _, old = heapq.heappop(active)
            (free64 if emitter.types[old] == 64 else free32).append(slots[old])
        pool = free64 if width == 64 else free32
        if pool:
            slots[name] = pool.pop()
        else:
            slots[name] = top
            top += 256 if width == 64 else 128
        heapq.heappush(active, (final[name], name))
    register_bytes = max(top, 128)

    # What may be undefined, and all that is computed from it: from registers that may be read
    # before they are written; and, once a kernel has read shared memory that nobody wrote, from
    # loads of that as well.
    every = [e for b in order for e in code[blocks[b].start : blocks[b].end]]
    doubtful = spread(every, set(undefined) - set(special_names), False)
    loads = [e for e in every if reads_shared(e)]
    followed = spread(every, doubtful | {d for e in loads for d in e.defs}, True) if loads else None

    def taint_index(name: str) -> int:
        return register_bytes // 128 + preds[name] if name in preds else slots[name] // 128

    # Encoding
    n_code = sum(blocks[b].end - blocks[b].start for b in order)
    inst = np.zeros(n_code, INST)
    lists: list[int] = [0]
    constant_at: dict[Any, int] = {}
    data = bytearray()
    relocations: list[tuple[int, str, int]] = []

    def constant(c: Const) -> int:
        key = (c.bits, c.width, c.symbol)
        if key not in constant_at:
            constant_at[key] = len(data)
            size = 8 if c.width == 64 else 4
            if c.symbol is not None:
                relocations.append((len(data), c.symbol, c.bits))
                data.extend(bytes(32 * size))
            else:
                data.extend((c.bits & ((1 << 8 * size) - 1)).to_bytes(size, "little") * 32)
        return constant_at[key] | 1

    def operand(x: Any) -> int:
        if x is None:
            return -1
        if isinstance(x, Reg):
            return preds[x.name] if emitter.types[x.name] == 1 else slots[x.name]
        if isinstance(x, Const):
            return constant(x)
        return int(x)

    block_array = np.zeros(len(order), BLOCK)
    at_ = 0
    op_ids = emitter.op_ids
    for n, b in enumerate(order):
        blk = blocks[b]
        block_array[n] = (
            at_,
            at_ + blk.end - blk.start,
            position.get(blk.next, -1) if blk.next >= 0 else -1,
            blk.sync,
        )
        for e in code[blk.start : blk.end]:
            r = inst[at_]
            r["op"] = op_ids[e.op]
            row = kernel.rows[e.row]
            if row.block < 0:
                row.block, row.engine = n, e.op
            r["id"] = e.row
            r["guard"] = -1
            if e.guard is not None:
                r["guard"] = preds[e.guard[0]]
                r["guard_xor"] = 0xFFFFFFFF if e.guard[1] else 0
            flags = e.flags | (CONTROL if e.branch is not None or e.ends else 0)
            o = [operand(x) for x in e.o]
            r["o"] = o + [-1] * (6 - len(o))
            r["n"] = e.n
            r["imm"], r["imm2"] = e.imm, e.imm2
            if e.branch is not None:
                if len(e.branch) == 1 and e.op == "bra":
                    r["imm"] = position[e.targets[0]]
                else:
                    r["list"] = len(lists)
                    r["n"] = len(e.targets)
                    lists += [position[t] for t in e.targets]
            elif e.items is not None:
                r["list"] = len(lists)
                lists += [operand(x) for x in e.items]
            elif e.list_values is not None:
                r["list"] = len(lists)
                lists += e.list_values
            r["taint"] = -1
            r["flags"] = flags
            at_ += 1

    def halves(name: str) -> list[int]:
        first = taint_index(name)
        return [first, first + 1] if emitter.types[name] == 64 else [first]

    def mark(array: np.ndarray, names: set[str]) -> np.ndarray:
        for e, r in zip(every, array, strict=True):
            taint(e, r, names, halves, lists)
            if r["taint"] >= 0:
                r["flags"] |= TAINT | (CHECK if e.memory else 0)
            elif e.branch is not None and e.guard is not None and e.guard[0] in names:
                r["flags"] |= TAINT
        return array

    followed_inst = mark(inst.copy(), followed) if followed is not None else None
    if doubtful:
        mark(inst, doubtful)
    taint_init = [k for n in undefined if n in doubtful for k in halves(n)]
    layout, static, dynamic = emitter.shared_layout()
    result = Decoded(
        inst=inst,
        block=block_array,
        lists=np.array(lists, np.int32),
        constants=np.frombuffer(bytes(data) or bytes(8), np.uint8).copy(),
        special=np.array(special or [(25, 0)], np.int32).reshape(-1, 2)[: len(special)].copy(),
        relocations=relocations,
        register_bytes=register_bytes,
        n_pred=max(1, len(preds)),
        local_bytes=-(-flat.local_bytes // 16) * 16,
        shared_granule=1 if emitter.narrow_shared else 4,
        has_taint=bool(doubtful),
        followed=followed_inst,
        taint_init=np.array(taint_init, np.int32),
        shared_variables=layout,
        dynamic_offset=dynamic,
        static_shared=static,
        writes=emitter.written(code, kernel),
        uses_dynamic=emitter.uses_dynamic,
    )
    return result


def watch_wgmma(code: list[Emitted], blocks: list[_Block], order: list[int]) -> list[Emitted]:
    """Checks, put in where a register could be touched that a wgmma in flight uses, or where a
    wgmma could use one that was touched since the last wgmma.fence. Along some path, that is: the
    checks run with the kernel and find out. A kernel without such a place is returned as it is.

    A state is (touched, flight): registers touched since the last fence, as bits; and those in use
    by a wgmma after which so many groups were committed, flight[n] for n, the last for as many or
    more."""
    most = 9  # wait_group's operand is at most 7
    number: dict[str, int] = {}
    for e in code:
        if e.op == "wgmma":
            for x in e.items or ():
                if isinstance(x, Reg):
                    number.setdefault(x.name, len(number))
    if not number:
        return code

    def registers(e: Emitted) -> int:
        names = [x.name for x in e.items if isinstance(x, Reg)] if e.op == "wgmma" else None
        m = 0
        for name in names if names is not None else [*e.defs, *e.uses]:
            if name in number:
                m |= 1 << number[name]
        return m

    mine = [registers(e) for e in code]
    State = tuple[int, tuple[int, ...]]

    def step(k: int, state: State) -> State:
        touched, flight = state
        op = code[k].op
        if op == "wgmma":
            return touched, (flight[0] | mine[k], *flight[1:])
        if op == "wgmma.fence":
            return 0, flight
        if op == "wgmma.commit":
            return touched, (0, *flight[: most - 2], flight[most - 2] | flight[most - 1])
        if op == "wgmma.wait":
            return touched, tuple(f if n <= code[k].imm else 0 for n, f in enumerate(flight))
        return touched | mine[k], flight

    nothing: State = (0, (0,) * most)
    entry: dict[int, State] = dict.fromkeys(order, nothing)
    entry[order[0]] = ((1 << len(number)) - 1, nothing[1])
    todo = list(order)
    while todo:
        b = todo.pop(0)
        state = entry[b]
        for k in range(blocks[b].start, blocks[b].end):
            state = step(k, state)
        for s in blocks[b].succ:
            if s not in entry:
                continue
            old = entry[s]
            new = (
                old[0] | state[0],
                tuple(x | y for x, y in zip(old[1], state[1], strict=True)),
            )
            if new != old:
                entry[s] = new
                if s not in todo:
                    todo.append(s)

    early, unfenced = set(), set()
    for b in order:
        state = entry[b]
        for k in range(blocks[b].start, blocks[b].end):
            flying = 0
            for f in state[1]:
                flying |= f
            if code[k].op == "wgmma":
                if state[0] & mine[k]:
                    unfenced.add(k)
            elif flying & mine[k]:
                early.add(k)
            state = step(k, state)
    if not early and not unfenced:
        return code

    def watch(op: str, k: int) -> Emitted:
        numbers = [n for n in range(len(number)) if mine[k] >> n & 1]
        e = Emitted(op, code[k].row, list_values=numbers, n=len(numbers))
        e.flags, e.guard, e.sync = UNCOUNTED, code[k].guard, code[k].sync
        return e

    out: list[Emitted] = []
    for b in blocks:
        start = len(out)
        for k in range(b.start, b.end):
            e = code[k]
            if k in early:
                out.append(watch("wgmma.check_wait", k))
            if k in unfenced:
                out.append(watch("wgmma.check_fence", k))
            if e.op == "wgmma":
                out.append(watch("wgmma.issue", k))
            elif mine[k] and unfenced:
                out.append(watch("wgmma.touch", k))
            out.append(e)
        b.start, b.end = start, len(out)
    return out


def reads_shared(e: Emitted) -> bool:
    """A load whose address is, or may be, in shared memory."""
    return e.memory == "load" and (e.op == "ldmatrix" or (e.imm2 >> 1) & 3 in (1, 3))


def spread(code: Iterable[Emitted], names: set[str], shared: bool) -> set[str]:
    """The names, and those of what is computed from them; through memory too, if one is stored."""
    out = set(names)
    changed, reads_memory = bool(out), False
    while changed:
        changed = False
        for e in code:
            dirty = any(u in out for u in e.uses) or (e.guard is not None and e.guard[0] in out)
            if e.memory == "store" and not reads_memory and dirty:
                reads_memory = changed = True
            if dirty or (e.memory == "load" and (reads_memory or (shared and reads_shared(e)))):
                for d in e.defs:
                    if d not in out:
                        out.add(d)
                        changed = True
    return out


def taint(e: Emitted, r: Any, doubtful: set[str], halves: Any, lists: list[int]) -> None:
    """The description that csrc/emulator/machine.h's taint_step reads: kind, destinations, sources.
    ``halves`` gives a register's indices, two for 64 bits."""

    def indices(names: Iterable[str]) -> list[int]:
        return [k for n in names for k in halves(n)]

    def one(x: Any, half: int = 0) -> int:
        """The index of an operand's half, or -1 if it cannot be undefined."""
        name = x.name if isinstance(x, Reg) else x
        return halves(name)[half] if isinstance(name, str) and name in doubtful else -1

    sources = [u for u in e.uses if u in doubtful]
    targets = [d for d in e.defs if d in doubtful]
    guard = e.guard is not None and e.guard[0] in doubtful
    if not sources and not targets and not guard:
        return
    if e.branch is not None or e.ends:
        return
    r["taint"] = len(lists)

    def width(x: Any) -> int:
        """How many indices an operand has."""
        return len(halves(x.name)) if isinstance(x, Reg) else 1

    def say(kind: int, to: list[int], of: list[int], more: Iterable[int] = ()) -> None:
        lists.extend([kind, len(to), *to, len(of), *of, *more])

    if e.memory:
        # (address, guard, values...), -1 for none
        g = one(e.guard[0]) if e.guard is not None else -1
        # by position, since what is undefined goes through memory word by word
        by_place = e.memory in ("load", "store") and e.items is not None
        stored = (e.items or []) if e.memory == "store" else []
        values = (
            [one(x, half) for x in stored for half in range(width(x))]
            if by_place
            else indices(u for u in e.values if u in doubtful)
        )
        to = indices(targets)
        if by_place and e.memory == "load":
            to = [one(x, half) for x in e.items or [] for half in range(width(x))]
        say(0, to, [one(e.address), g, *values])
    elif e.op.startswith("shfl"):
        a = one(e.o[2])
        say(2 if a < 0 else 5, indices(targets), [] if a < 0 else [a])
    elif e.op.startswith("selp"):
        a, b, p = e.o[1], e.o[2], e.o[3]
        of = [one(a), one(b), one(p)]
        to = indices(targets)
        if len(to) == 2:
            of += [one(a, 1), one(b, 1)]
        say(1, to, of)
    elif (how := bytewise(e)) is not None:
        words = [one(x, half) if half < width(x) else -1 for x in how.data for half in (0, 1)]
        words += [-1] * (6 - len(words))
        of = [*words, *([one(x) for x in how.amounts] + [-1, -1])[:2]]
        to = [one(e.defs[0], half) for half in range(len(halves(e.defs[0])))]
        say(8, to, of, (how.what, how.bits, how.table, 1 + len(how.data)))
    elif "f32x2" in e.op:
        of = [one(x, half) for x in e.o[1:4] for half in (0, 1)]
        say(7, [one(e.defs[0], 0), one(e.defs[0], 1)], of)
    elif e.op == "mma":
        nd, na, nb = e.parts
        regs = e.items or []
        ix = [halves(x.name)[0] if isinstance(x, Reg) else -1 for x in regs]
        if any(i < 0 for i in ix):  # constants among the operands
            say(0, indices(targets), indices(sources))
        else:
            say(3, ix[:nd], ix[nd:], (na, nb))
    elif e.op == "wgmma":
        say(6, indices(targets), indices(u for u in sources if u not in e.defs))
    elif e.op.startswith(("vote", "match", "redux")):
        say(4, indices(targets), indices(sources))
    else:
        say(0, indices(targets), indices(sources))


@dataclass
class _Bytewise:
    """An operation that moves bits about, so that of what is undefined some bytes may be left."""

    what: int  # machine.h's ByteOp
    bits: int  # of the result
    table: int
    data: list[Any]
    amounts: list[Any]


def bytewise(e: Emitted) -> _Bytewise | None:
    """How machine.h's taint_bytes is to follow an instruction, or None: as a whole."""
    logic, shl, shr, sar, permute, insert, extract_u, extract_s, pack, extract, carry = range(11)
    name, _, kind = e.op.rpartition(".")
    bits = int(kind[1:]) if re.fullmatch(r"[usb](16|32|64)", kind) else 0
    o = e.o

    def of(what: int, data: int, amounts: int = 0, width: int = bits, table: int = 0) -> _Bytewise:
        return _Bytewise(what, width, table, o[1 : 1 + data], o[1 + data : 1 + data + amounts])

    tables = {"and": (0xC0, 2), "or": (0xFC, 2), "xor": (0x3C, 2), "not": (0x0F, 1)}
    if name in tables and bits:
        table, n = tables[name]
        return of(logic, n, table=table)
    if e.op in ("mov.32", "mov.64"):
        return of(logic, 1, width=int(kind), table=0xF0)
    if e.op == "lop3.b32":
        return of(logic, 3, table=e.imm & 255)
    if name in ("shl", "shr") and not (kind == "s16"):
        return of({"b": shl, "u": shr, "s": sar}[kind[0]], 1, 1)
    if e.op == "prmt.b32":
        return of(permute, 2, 1)
    if name == "bfi":
        return of(insert, 2, 2)
    if name == "bfe":
        return of(extract_s if kind[0] == "s" else extract_u, 1, 2)
    if e.op in ("pack.32", "pack.64"):
        return of(pack, 2, width=int(kind), table=int(kind) // 2)
    if e.op in ("extract.32", "extract.64"):
        return of(extract, 1, width=32)
    if name in ("add", "sub", "mul.lo") and bits:
        return of(carry, 2)
    if name == "mad.lo" and bits:
        return of(carry, 3)
    if name == "mul.wide" and bits:
        return of(carry, 2, width=2 * bits)
    convert = re.fullmatch(r"cvt\.[us](8|16|32|64)\.([us])(8|16|32|64)", e.op)
    if convert:
        to, frm = int(convert[1]), int(convert[3])
        if to <= frm or convert[2] == "u":
            return of(logic, 1, width=min(to, frm), table=0xF0)
    return None


def is_identifier(name: str) -> bool:
    return re.fullmatch(r"[\w$%.~#:<>]+", name) is not None
