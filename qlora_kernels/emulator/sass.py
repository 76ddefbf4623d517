"""SASS: what a kernel's PTX becomes, and how often each instruction of it runs.

PTX is what the emulator executes; SASS is what a GPU issues. ``load`` assembles PTX with ptxas and
reads nvdisasm's listing back as functions, basic blocks, loops and instructions by issue pipe.
Every instruction carries the line of PTX it was made from (ptxas writes that with ``-lineinfo``).

``Function.dynamic`` turns the emulator's count of warp executions per line of PTX into executions
of each SASS block, so that instruction figures for cost are SASS × trips. ptxas unrolls,
predicates, hoists and merges, so no line maps to a block one to one; the trips are the solution of
a small linear program:

- a block is entered no more often than its predecessors' edges are taken, an edge is taken no more
  often than its block is entered, and what enters a block leaves it (a warp that diverges takes
  both sides, so these are inequalities);
- for every line of PTX with side effects (memory, barriers, shuffles, matrix instructions) the
  executions of the SASS made from it add up to the line's count, in all unrolled copies together;
  arithmetic lines say the same with less weight, and predicated SASS only bounds it from below;
- of what is left, flow that is conserved is preferred, and then the fewest instructions.

``Dynamic.unexplained`` is the share of counted executions that the solution misses: near zero for a
kernel that the map fits.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from . import toolchain

__all__ = [
    "Block",
    "Dynamic",
    "Function",
    "Instruction",
    "Loop",
    "executions_by_hand",
    "load",
    "load_cubin",
    "parse",
    "pipe_of",
    "tensor_kind",
]

# ------------------------------------------------------------------------------------------------
# Instructions

_PIPES = {
    "fma": "FFMA FMUL FADD FFMA32I FMUL32I FADD32I FFMA2 FMUL2 FADD2 FSWZADD",
    "imul": "IMAD IMUL IDP IDP4A XMAD IMAD32I",
    "half": "HFMA2 HADD2 HMUL2 HFMA2_MMA HADD2_32I HMUL2_32I HFMA2_32I HMNMX2 HSET2 HSETP2 HMNMX",
    "alu": """IADD3 IADD IADD32I IADD64 LOP3 LOP LOP32I PLOP3 LEA SHF SHL SHR PRMT SEL SELP
        FSEL ISETP FSETP ISET FSET FMNMX FMNMX3 IMNMX VIMNMX VIMNMX3 VIADD VIADDMNMX VABSDIFF
        VABSDIFF4 IABS ICMP FCMP BMSK SGXT MOV MOV32I MOV64IUR CSEL P2R R2P F2FP I2FP F2IP I2IP
        CS2R VOTE VHMNMX
        PSETP SCADD BFE BFI FCHK VMNMX VSETP ISCADD VIADD64 ISETP64 LOP64 MOVM LEPC""",
    "xu": "MUFU F2I I2F F2F FRND I2I POPC FLO BREV F2I_I2I DMUFU",
    "lsu": """LDG STG LD ST LDS STS LDSM STSM LDL STL LDGSTS ATOM ATOMG ATOMS RED REDG REDS REDAS
        SHFL S2R MATCH REDUX LDGDEPBAR ARRIVES LDTRAM CREDUX STAS MEMSET SUATOM SULD SUST SURED TEX
        TLD TLD4 TXQ LDGMC""",
    "const": "LDC LDCU",
    "tensor": "HMMA IMMA BMMA DMMA QMMA OMMA HGMMA IGMMA BGMMA QGMMA",
    "tcgen05": "UTCHMMA UTCIMMA UTCQMMA UTCOMMA UTCCP UTCBAR UTCATOMSWS UTCSHIFT LDT STT LDTM STTM",
    "tma": "UBLKCP UBLKRED UBLKPF UTMALDG UTMASTG UTMAREDG UTMAPF UTMACCTL UTMACMDFLUSH",
    "fp64": "DADD DMUL DFMA DSETP DMNMX",
    "uniform": "R2UR S2UR VOTEU REDUX_U R2B B2R REDUXU",
    "control": """BRA BRX BRXU JMP JMX JMXU EXIT RET CALL BSSY BSYNC BREAK WARPSYNC NOP BAR YIELD
        NANOSLEEP DEPBAR KILL BPT ELECT ACQBULK SYNCS BMOV RPCMOV CCTL CCTLL MEMBAR ERRBAR
        PREEXIT SETCTAID WARPGROUP WARPGROUPSET ENDCOLLECTIVE COLLECTIVE WARPSYNC_ALL FENCE RTT
        SETLMEMBASE GETLMEMBASE PMTRIG CGAERRBAR UCGABAR_ARV UCGABAR_WAIT UCGABAR_SET USETMAXREG
        ACQSHMINIT PLOP3_CTRL BMOV32 IDE TTUCCTL CCTLT QSPC ISBEWR STP SGXT_CTRL USTGR""",
}
_PIPE_OF = {op: pipe for pipe, names in _PIPES.items() for op in names.split()}
#: The pipes, in the order of reports.
PIPES = tuple(_PIPES) + ("unknown",)

# Instructions that no compiler removes, moves out of a loop or merges: where a count is certain.
_ANCHORS = frozenset(
    """LDG STG LD ST LDS STS LDSM STSM LDGSTS ATOM ATOMG ATOMS RED REDG REDS SHFL BAR HMMA IMMA BMMA
    DMMA QMMA HGMMA IGMMA QGMMA BGMMA MATCH REDUX SYNCS UBLKCP UTMALDG UTMASTG STL""".split()
)
_NO_DESTINATION = frozenset(
    """STG ST STS STSM STL RED REDG REDS BAR BRA BRX EXIT RET CALL BSSY BSYNC BREAK WARPSYNC NOP
    YIELD DEPBAR LDGDEPBAR LDGSTS MEMBAR ERRBAR CCTL KILL NANOSLEEP ARRIVES FENCE
    WARPGROUP""".split()
)
_SETS_PREDICATE = frozenset("ISETP FSETP DSETP HSETP2 PSETP PLOP3 UISETP UPLOP3 VSETP".split())


def pipe_of(opcode: str) -> str:
    """The issue pipe of an opcode such as ``"LDG.E.128"``; ``"unknown"`` for one that is not in
    the table (it still takes an issue slot, and reports name it)."""
    base = opcode.split(".")[0]
    if base in _PIPE_OF:
        return _PIPE_OF[base]
    return "uniform" if base.startswith("U") else "unknown"


def _width(opcode: str) -> int:
    """Registers of the data that a memory instruction moves for one lane."""
    if ".256" in opcode:
        return 8
    if ".128" in opcode:
        return 4
    if ".64" in opcode:
        return 2
    return 1


@dataclass(frozen=True)
class Instruction:
    """One SASS instruction. ``line`` is the line of PTX that it was made from, from 1 (0: none)."""

    address: int
    opcode: str
    operands: tuple[str, ...]
    predicate: str = ""
    line: int = 0

    @property
    def base(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def pipe(self) -> str:
        return pipe_of(self.opcode)

    @property
    def predicated(self) -> bool:
        return bool(self.predicate) and self.predicate not in ("@PT", "@UPT")

    @functools.cached_property
    def tensor_shape(self) -> tuple[int, int, int] | None:
        """(m, n, k) of a matrix instruction."""
        if match := re.search(r"\.(\d+)x(\d+)x(\d+)", self.opcode):
            return tuple(map(int, match.groups()))  # type: ignore[return-value]
        if self.pipe == "tensor" and (match := re.search(r"\.(16|8)(8)(\d+)(?:\.|$)", self.opcode)):
            return tuple(map(int, match.groups()))  # type: ignore[return-value]
        return None

    @property
    def tensor_flops(self) -> int:
        """Floating-point (or integer) operations of one execution by a warp (a warpgroup's
        instruction is executed by four warps, each of which counts a quarter)."""
        shape = self.tensor_shape
        if shape is None:
            return 0
        flops = 2 * shape[0] * shape[1] * shape[2]
        return flops // 4 if "GMMA" in self.base else flops

    @functools.cached_property
    def registers(self) -> tuple[frozenset[str], frozenset[str]]:
        """Names read and written, 64- and 128-bit operands expanded: for the latency estimate, not
        for a proof."""
        base, ops = self.base, self.operands
        outs = 0
        if ops and base not in _NO_DESTINATION:
            outs = 2 if base in _SETS_PREDICATE else 1
            if outs == 1 and re.fullmatch(r"U?P(\d|T)", ops[0]):
                outs = 2  # a carry or validity predicate before the register
        reads: set[str] = set()
        writes: set[str] = set()
        if self.predicated:
            reads.add(self.predicate.lstrip("@!"))
        for index, op in enumerate(ops):
            names = re.findall(r"(?<![\w.])(U?[RPB]\d+)((?:\.\w+)*)", op)
            for name, suffix in names:
                kind = name.rstrip("0123456789")
                count = 1
                if kind in ("R", "UR"):
                    count = self._operand_width(index, outs, op, suffix)
                number = int(name[len(kind) :])
                target = writes if index < outs and "[" not in op else reads
                target.update(f"{kind}{number + i}" for i in range(count))
        return frozenset(reads), frozenset(writes)

    def _operand_width(self, index: int, outs: int, op: str, suffix: str) -> int:
        base = self.base
        if "[" in op:
            return 2 if ".64" in suffix or "desc" in op else 1
        if base == "HMMA":
            k16 = (self.tensor_shape or (0, 0, 16))[2] == 16
            wide = 4 if ".F32" in self.opcode else 2
            return (wide, 4 if k16 else 2, 2 if k16 else 1, wide)[min(index, 3)]
        if base in ("LDSM", "STSM"):
            return int(self.opcode[-1]) if self.opcode[-1] in "124" else 1
        if base in ("LDG", "LDS", "LD", "LDL", "STG", "STS", "ST", "STL", "LDC", "ULDC", "LDCU"):
            return _width(self.opcode)
        if base in ("DADD", "DMUL", "DFMA") or ".64" in suffix:
            return 2
        if ".WIDE" in self.opcode and index in (0, 3):
            return 2
        return 1

    def __str__(self) -> str:
        head = f"{self.predicate} " if self.predicate else ""
        return f"{head}{self.opcode} {', '.join(self.operands)}".rstrip()


@dataclass
class Block:
    """A basic block: ``successors`` and ``predecessors`` are indices; ``calls`` the entries of
    subroutines called from its end (control comes back to the successor)."""

    index: int
    instructions: list[Instruction]
    successors: list[int] = field(default_factory=list)
    predecessors: list[int] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)
    exits: bool = False

    @property
    def address(self) -> int:
        return self.instructions[0].address

    @property
    def lines(self) -> set[int]:
        return {i.line for i in self.instructions if i.line}

    def pipes(self) -> Counter[str]:
        return Counter(i.pipe for i in self.instructions)


@dataclass(frozen=True)
class Loop:
    """A natural loop: the block it is entered by, all its blocks, and how many loops enclose it."""

    header: int
    blocks: frozenset[int]
    depth: int

    def __contains__(self, block: int) -> bool:
        return block in self.blocks


# ------------------------------------------------------------------------------------------------
# Functions


@dataclass
class Function:
    """One kernel's SASS for one target. ``blocks[0]`` is the entry."""

    name: str
    target: str
    blocks: list[Block]
    ptx: str = ""

    @property
    def instructions(self) -> list[Instruction]:
        return [i for b in self.blocks for i in b.instructions]

    def pipes(self) -> Counter[str]:
        """Static instructions by pipe."""
        return Counter(i.pipe for i in self.instructions)

    @functools.cached_property
    def loops(self) -> list[Loop]:
        """All natural loops, outermost first."""
        dominators = _dominators(self.blocks)
        bodies: dict[int, set[int]] = {}
        for block in self.blocks:
            for succ in block.successors:
                if succ in dominators[block.index]:  # a back edge
                    body = bodies.setdefault(succ, {succ})
                    stack = [block.index]
                    while stack:
                        node = stack.pop()
                        if node not in body:
                            body.add(node)
                            stack += self.blocks[node].predecessors
        found = []
        for header, body in bodies.items():
            depth = sum(1 for h, b in bodies.items() if h != header and body < b)
            found.append(Loop(header, frozenset(body), depth))
        return sorted(found, key=lambda loop: (loop.depth, loop.header))

    def innermost(self) -> list[Loop]:
        return [a for a in self.loops if not any(b.blocks < a.blocks for b in self.loops)]

    def dynamic(self, executions: Mapping[int, float], warps: float) -> Dynamic:
        """Executions of every block, from the emulator's counts.

        ``executions`` maps lines of PTX (from 1) to the warp executions of the instruction there;
        lines that are absent were not executed. ``warps`` is the number of warps that entered the
        kernel. Raises ``ValueError`` for a count that is negative.
        """
        return _solve(self, executions, warps)

    def listing(self, dynamic: Dynamic | None = None) -> str:
        """The code with block boundaries, and executions a warp in the margin if given."""
        out = []
        for block in self.blocks:
            trips = (
                f"  × {dynamic.trips[block.index] / dynamic.warps:.4g} a warp" if dynamic else ""
            )
            depth = sum(block.index in loop for loop in self.loops)
            out.append(f"block {block.index}  -> {block.successors}  loop depth {depth}{trips}")
            for i in block.instructions:
                out.append(f"  {i.address:06x}  {i.pipe:8} {i!s:70} ptx {i.line or '-'}")
        return "\n".join(out)


def _dominators(blocks: list[Block]) -> list[set[int]]:
    everything = set(range(len(blocks)))
    dom = [everything.copy() for _ in blocks]
    entries = {0} | {c for b in blocks for c in b.calls}
    for entry in entries:
        dom[entry] = {entry}
    changed = True
    while changed:
        changed = False
        for block in blocks:
            if block.index in entries:
                continue
            preds = [dom[p] for p in block.predecessors]
            new = {block.index} | (set.intersection(*preds) if preds else set())
            if new != dom[block.index]:
                dom[block.index] = new
                changed = True
    return dom


_TEXT = re.compile(r"^\.text\.(\S+):\s*$")
_LABEL = re.compile(r"^([.$\w]+):\s*$")
_LINE = re.compile(r'^\s*//## File "\.nv_debug_ptx_txt[^"]*", line (\d+)')
_INSN = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P[\dT]+)\s+)?([A-Z0-9_]+(?:\.[\w:]+)*)\s*(.*?)\s*;"
)


def _split(text: str) -> tuple[str, ...]:
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "([{") - (c in ")]}")
        if c == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    if text[start:].strip():
        parts.append(text[start:].strip())
    return tuple(parts)


def parse(listing: str, ptx: str = "") -> dict[str, Function]:
    """nvdisasm's listing (``-c -gp``) as functions by mangled name.

    Raises ``ValueError`` for a listing without code, naming the line for one that is not SASS.
    """
    match = re.search(r"\.target\s+(sm_\w+)", listing)
    target = match.group(1) if match else ""
    functions: dict[str, Function] = {}
    name = ""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    pending: list[str] = []
    line = 0

    def finish() -> None:
        if name and instructions:
            for label in pending:
                labels[label] = instructions[-1].address + 16
            functions[name] = _build(name, target, instructions, labels, ptx)

    for text in listing.splitlines():
        if match := _TEXT.match(text):
            finish()
            name, instructions, labels, pending, line = match.group(1), [], {}, [], 0
        elif not name:
            continue
        elif match := _LINE.match(text):
            line = int(match.group(1))
        elif match := _LABEL.match(text):
            pending.append(match.group(1))
        elif match := _INSN.match(text):
            address = int(match.group(1), 16)
            for label in pending:
                labels[label] = address
            pending = []
            operands = _split(match.group(4))
            instructions.append(
                Instruction(address, match.group(3), operands, match.group(2) or "", line)
            )
        elif re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+\S", text):
            raise ValueError(f"cannot read this line of SASS: {text.strip()!r}")
    finish()
    if not functions:
        raise ValueError("the listing has no code in it")
    return functions


def _target_of(instruction: Instruction, labels: Mapping[str, int]) -> int | None:
    for op in reversed(instruction.operands):
        if match := re.search(r"`\(([^)]+)\)", op):
            return labels.get(match.group(1))
        if re.fullmatch(r"0x[0-9a-f]+", op):
            return int(op, 16)
    return None


def _build(
    name: str, target: str, code: list[Instruction], labels: Mapping[str, int], ptx: str
) -> Function:
    # nvdisasm pads a function with a branch to itself and NOPs: not code.
    while code and code[-1].base == "NOP":
        code = code[:-1]
    if len(code) > 1 and code[-1].base == "BRA" and not code[-1].predicated:
        if _target_of(code[-1], labels) == code[-1].address:
            code = code[:-1]
    index = {i.address: n for n, i in enumerate(code)}
    leaders = {0}
    reconverge: dict[int, int] = {}  # a BSYNC's address to the address its BSSY named
    open_syncs: dict[str, int] = {}
    for n, i in enumerate(code):
        if i.base == "BSSY":
            goal = _target_of(i, labels)
            if goal is not None:
                open_syncs[i.operands[0]] = goal
        elif i.base == "BSYNC" and i.operands and i.operands[0] in open_syncs:
            reconverge[i.address] = open_syncs[i.operands[0]]
        if i.base in (
            "BRA",
            "BRX",
            "BRXU",
            "JMP",
            "JMX",
            "EXIT",
            "RET",
            "CALL",
            "BSYNC",
            "BREAK",
            "KILL",
        ):
            leaders.add(n + 1)
            goal = reconverge.get(i.address, _target_of(i, labels))
            if goal in index and i.base not in ("BREAK",):
                leaders.add(index[goal])
    starts = sorted(s for s in leaders if s < len(code))
    block_at = {code[s].address: b for b, s in enumerate(starts)}
    blocks = []
    for b, s in enumerate(starts):
        end = starts[b + 1] if b + 1 < len(starts) else len(code)
        blocks.append(Block(b, code[s:end]))
    tables = [labels[x] for x in labels if labels[x] in block_at]
    for block in blocks:
        last = block.instructions[-1]
        goal = reconverge.get(last.address, _target_of(last, labels))
        to = block_at.get(goal) if goal is not None else None
        falls = block.index + 1 if block.index + 1 < len(blocks) else None
        next_: list[int | None] = []
        # BRA.DIV is taken only by a warp that has not converged, BRA.U and plain BRA with a
        # predicate operand (BRA P1, `(x)`) are conditional as well.
        conditional = last.predicated or (
            last.base == "BRA" and (".DIV" in last.opcode or len(last.operands) > 1)
        )
        if last.base in ("BRA", "JMP"):
            next_ = [to, falls] if conditional else [to]
        elif last.base in ("BRX", "BRXU", "JMX"):
            next_ = [block_at[a] for a in sorted(set(tables))]
        elif last.base in ("EXIT", "KILL", "RET"):
            block.exits = True
            next_ = [falls] if conditional else []
        elif last.base == "CALL" and ".L_" in last.operands[-1]:
            # ptxas also leaves loops by a CALL of a label in the same function, for good.
            next_ = [to, falls] if last.predicated else [to]
        elif last.base == "CALL":
            if to is not None:
                block.calls.append(to)
            next_ = [falls]
        elif last.base == "BSYNC":
            next_ = [to if to is not None else falls, *([falls] if conditional else [])]
        else:
            next_ = [falls]
        block.successors = list(dict.fromkeys(n for n in next_ if n is not None))
    for block in blocks:
        for succ in block.successors:
            blocks[succ].predecessors.append(block.index)
    return Function(name, target, blocks, ptx)


def load(ptx: str | toolchain.Ptx, target: str | int | None = None) -> dict[str, Function]:
    """Assemble PTX for ``target`` (its own by default) and read the SASS back, by mangled name."""
    text = ptx.text if isinstance(ptx, toolchain.Ptx) else ptx
    cubin = toolchain.assemble(text, target)
    return parse(toolchain.disassemble(cubin, lines="ptx"), text)


def load_cubin(path: str | Path | toolchain.Cubin) -> dict[str, Function]:
    """The SASS of a cubin (built with ``-lineinfo``, if lines are to be known)."""
    return parse(toolchain.disassemble(path, lines="ptx"))


def executions_by_hand(ptx: str, kernel: str, trips: Callable[[str], float]) -> dict[int, float]:
    """Warp executions by line of PTX for a kernel whose loops are known, without running it.

    ``trips(text)`` says how often each straight-line piece of the kernel's PTX runs: a piece is
    what lies between labels and branches. Raises ``ValueError`` if there is no such kernel.
    """
    lines = ptx.splitlines()
    starts = [i for i, t in enumerate(lines) if re.search(rf"\.entry {re.escape(kernel)}\(", t)]
    if not starts:
        raise ValueError(f"no kernel {kernel} in this PTX")
    body = next(i for i in range(starts[0], len(lines)) if lines[i].startswith("{"))
    end = next(i for i in range(body, len(lines)) if lines[i].startswith("}"))
    counts: dict[int, float] = {}
    piece: list[int] = []
    for i in range(body + 1, end + 1):
        ended = piece and re.search(r"\bbra\b", lines[piece[-1]])
        if piece and (ended or lines[i].startswith(("$", "}"))):
            count = trips("\n".join(lines[p] for p in piece))
            counts.update({p + 1: count for p in piece})
            piece = []
        text = lines[i].strip()
        if re.match(r"\s+@?!?%?\w+[\w.]*\s", lines[i]) and not text.startswith("."):
            piece.append(i)
    return counts


# ------------------------------------------------------------------------------------------------
# Trips


@dataclass
class Dynamic:
    """Executions of a function's SASS over a launch. ``trips[b]`` is how often warps entered block
    ``b``; counts are warp instructions."""

    function: Function
    trips: np.ndarray
    warps: float
    unexplained: float
    entries: dict[int, float] = field(default_factory=dict)  # by loop header, from outside

    def total(self, blocks: Iterable[int] | None = None) -> float:
        """Warp instructions issued, in all blocks or in some."""
        which = range(len(self.trips)) if blocks is None else blocks
        return float(sum(self.trips[b] * len(self.function.blocks[b].instructions) for b in which))

    def pipes(self, blocks: Iterable[int] | None = None) -> Counter[str]:
        """Warp instructions by pipe."""
        out: Counter[str] = Counter()
        for b in range(len(self.trips)) if blocks is None else blocks:
            for pipe, count in self.function.blocks[b].pipes().items():
                out[pipe] += self.trips[b] * count
        return out

    def opcodes(self, blocks: Iterable[int] | None = None) -> Counter[str]:
        """Warp instructions by opcode."""
        out: Counter[str] = Counter()
        for b in range(len(self.trips)) if blocks is None else blocks:
            for i in self.function.blocks[b].instructions:
                out[i.opcode] += self.trips[b]
        return out

    def by_line(self, bases: Iterable[str]) -> Counter[int]:
        """Warp executions of the instructions with these base opcodes, by the line of PTX that
        they were made from."""
        wanted = frozenset(bases)
        out: Counter[int] = Counter()
        for block, trips in zip(self.function.blocks, self.trips, strict=True):
            for i in block.instructions:
                if i.base in wanted:
                    out[i.line] += trips
        return out

    def tensor_flops(self) -> dict[str, float]:
        """Tensor-core operations by base opcode and type: ``{"HMMA bf16": …}``."""
        out: dict[str, float] = {}
        for block, trips in zip(self.function.blocks, self.trips, strict=True):
            for i in block.instructions:
                if i.tensor_flops:
                    out[tensor_kind(i)] = out.get(tensor_kind(i), 0.0) + i.tensor_flops * trips
        return out

    @functools.cached_property
    def main_loop(self) -> Loop | None:
        """The innermost loop in which most instructions are issued."""
        loops = self.function.innermost()
        return max(loops, key=lambda loop: self.total(loop.blocks), default=None)

    def per_item(self, items: float, blocks: Iterable[int] | None = None) -> float:
        """SASS a lane for each item, if the launch handles ``items`` items one to a lane: with
        ``items = weights / 8`` and the main loop's blocks, "SASS for 8 weights"."""
        return self.total(blocks) * 32 / items

    def report(self, items: float | None = None, unit: str = "8 weights") -> str:
        """A table of loops and pipes: trips a warp, instructions a trip, share of the issue."""
        total = max(self.total(), 1e-30)
        head = (
            f"{self.function.name} on {self.function.target}: {total / self.warps:.1f} SASS a warp"
        )
        rows = [head + f" ({self.unexplained:.1%} of counted executions not explained)"]
        for loop in self.function.loops:
            issued = self.total(loop.blocks)
            trips = self.trips[loop.header] / self.warps
            each = issued / max(self.trips[loop.header], 1e-30)
            row = f"  {'  ' * loop.depth}loop at block {loop.header}: {trips:.4g} trips a warp, "
            row += f"{each:.1f} SASS a trip, {issued / total:.1%} of issue"
            if items:
                row += f", {self.per_item(items, loop.blocks):.1f} SASS for {unit}"
            rows.append(row)
        rows.append("  " + ", ".join(f"{p} {c / total:.1%}" for p, c in self.pipes().most_common()))
        return "\n".join(rows)


def tensor_kind(instruction: Instruction) -> str:
    """``bf16``, ``fp16``, ``fp16_acc16``, ``tf32``, ``int8``, ``int4``, ``fp8``, ``fp64``."""
    op = instruction.opcode
    if instruction.base.startswith("D"):
        return "fp64"
    if instruction.base.startswith("I"):
        return "int4" if ".S4" in op or ".U4" in op else "int8"
    if instruction.base.startswith(("Q", "O")):
        return "fp8"
    if ".TF32" in op:
        return "tf32"
    if ".BF16" in op:
        return "bf16"
    return "fp16" if ".F32" in op else "fp16_acc16"


def _solve(function: Function, executions: Mapping[int, float], warps: float) -> Dynamic:
    from scipy.optimize import linprog
    from scipy.sparse import coo_matrix

    if any(c < 0 for c in executions.values()) or warps <= 0:
        raise ValueError("counts of executions must not be negative, and warps must be positive")
    blocks = function.blocks
    nb = len(blocks)
    edges = [(b.index, s) for b in blocks for s in b.successors]
    ne = len(edges)
    # Lines to the (block, weight) of the SASS made from them.
    anchors: dict[int, Counter[int]] = {}
    softer: dict[int, Counter[int]] = {}
    partial: dict[int, bool] = {}
    ptx_lines = function.ptx.splitlines()
    for block in blocks:
        for i in block.instructions:
            if not i.line:
                continue
            share = 1.0
            if i.base in _ANCHORS:
                shape = i.tensor_shape
                if shape and i.line <= len(ptx_lines):  # one mma split into several along k
                    wanted = re.search(r"\.m\d+n\d+k(\d+)", ptx_lines[i.line - 1])
                    share = shape[2] / int(wanted.group(1)) if wanted else 1.0
                where = anchors
            elif i.pipe in ("fma", "half", "imul", "xu", "alu", "fp64"):
                where = softer
            else:
                continue
            # Only the first kind of instruction made from a line stands for it: the address
            # arithmetic before a store and the predicate after a shuffle do not.
            where.setdefault(i.line, Counter())[block.index] += share
            partial[i.line] = partial.get(i.line, False) or i.predicated
    equations: list[tuple[dict[int, float], float, float, bool]] = []
    for line, where in anchors.items():
        count = executions.get(line, 0.0) / warps
        equations.append((dict(where), count, 10.0, partial[line]))
    looped = {b for loop in function.loops for b in loop.blocks}
    for line, where in softer.items():
        if line in anchors or line not in executions:
            continue
        count = executions[line] / warps
        # An arithmetic line may have become several instructions, or one of several. Where each
        # block holds one instruction of it, the sum is plain; outside loops several in a block
        # are one line's; inside, they may be unrolled copies or not, and say nothing.
        if max(where.values()) == 1:
            equations.append((dict(where), count, 0.2, partial[line]))
        elif not looped & set(where):
            equations.append((dict.fromkeys(where, 1.0), count, 0.1, partial[line]))
    # Variables: n[blocks], f[edges], slack pairs for equations, loss[blocks] of conservation.
    nq = len(equations)
    n0, f0, up0, down0, loss0 = 0, nb, nb + ne, nb + ne + nq, nb + ne + 2 * nq
    both0 = loss0 + nb
    total = both0 + nb
    cost = np.zeros(total)
    for b in blocks:
        cost[n0 + b.index] = 1e-6 * len(b.instructions)
    cost[loss0:] = 1e-2
    rows: list[int] = []
    cols: list[int] = []
    vals: list[float] = []
    rhs: list[float] = []

    def below(terms: list[tuple[int, float]], bound: float) -> None:
        row = len(rhs)
        for col, val in terms:
            rows.append(row)
            cols.append(col)
            vals.append(val)
        rhs.append(bound)

    erows: list[int] = []
    ecols: list[int] = []
    evals: list[float] = []
    erhs: list[float] = []

    def equal(terms: list[tuple[int, float]], bound: float) -> None:
        row = len(erhs)
        for col, val in terms:
            erows.append(row)
            ecols.append(col)
            evals.append(val)
        erhs.append(bound)

    incoming: dict[int, list[int]] = {b.index: [] for b in blocks}
    outgoing: dict[int, list[int]] = {b.index: [] for b in blocks}
    for e, (a, b) in enumerate(edges):
        outgoing[a].append(e)
        incoming[b].append(e)
        below([(f0 + e, 1), (n0 + a, -1)], 0)  # taken no more often than its block is entered
        below([(f0 + e, 1), (n0 + b, -1)], 0)  # and what it carries arrives
    callers = {c: [b.index for b in blocks if c in b.calls] for b in blocks for c in b.calls}
    for b in blocks:
        at = b.index
        inflow = [(f0 + e, -1.0) for e in incoming[at]]
        if at == 0:
            # The entry may be a loop's header too.
            equal([(n0, 1.0), (loss0, 1.0)] + [(f0 + e, -1.0) for e in incoming[0]], 1.0)
        elif at in callers:
            equal(
                [(n0 + at, 1.0), (loss0 + at, 1.0)]
                + [(n0 + c, -1.0) for c in callers[at]]
                + inflow,
                0,
            )
        else:
            equal([(n0 + at, 1.0), (loss0 + at, 1.0)] + inflow, 0)
        if outgoing[at]:
            # What enters leaves, or ends; more than entered leaves only by divergence.
            terms = [(n0 + at, 1.0), (both0 + at, 1.0)] + [(f0 + e, -1.0) for e in outgoing[at]]
            if b.exits:
                below([(col, -val) for col, val in terms], 0)
            else:
                equal(terms, 0)
    # A loop is entered from outside, at the least once for as many trips as any line was counted.
    most = max([1.0, *(c / warps for c in executions.values())])
    for loop in function.loops:
        outside = [e for e in incoming[loop.header] if edges[e][0] not in loop]
        if outside and loop.header != 0:
            below([(n0 + loop.header, 1 / most)] + [(f0 + e, -1.0) for e in outside], 0)
    for q, (where, count, weight, at_least) in enumerate(equations):
        terms = [(n0 + b, w) for b, w in where.items()]
        equal([*terms, (up0 + q, -1.0), (down0 + q, 1.0)], count)
        scale = weight / max(count, 1.0)
        # up: SASS runs more often than its line was counted (free for predicated SASS, which a
        # warp issues whether or not a lane wants it); down: less often.
        cost[up0 + q] = scale * (1e-4 if at_least else 1.0)
        cost[down0 + q] = scale
    solution = linprog(
        cost,
        A_ub=coo_matrix((vals, (rows, cols)), shape=(len(rhs), total)) if rhs else None,
        b_ub=rhs or None,
        A_eq=coo_matrix((evals, (erows, ecols)), shape=(len(erhs), total)),
        b_eq=erhs,
        bounds=[(0, None)] * total,
        method="highs",
    )
    if solution.x is None:
        raise RuntimeError(f"no trips fit {function.name}: {solution.message}")
    missed = counted = 0.0
    for q, (_, count, weight, at_least) in enumerate(equations):
        if weight >= 1:
            counted += count
            missed += solution.x[down0 + q] + (0.0 if at_least else solution.x[up0 + q])
    trips = np.maximum(solution.x[:nb], 0.0) * warps
    flows = np.maximum(solution.x[f0 : f0 + ne], 0.0) * warps
    entries = {}
    for loop in function.loops:
        outside = sum(flows[e] for e in incoming[loop.header] if edges[e][0] not in loop)
        entries[loop.header] = float(outside + (warps if loop.header == 0 else 0.0))
    unexplained = missed / counted if counted else 0.0
    return Dynamic(function, trips, float(warps), unexplained, entries)
