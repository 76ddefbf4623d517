"""What the AVX-512 kernels should cost on machines that have it: a model, not a measurement.

    python benchmarks/avx512_model.py [--cpu znver4 sapphirerapids icelake-server] [--ghz 3.0]

Each inner loop of csrc/cpu is compiled with the flags of CMakeLists.txt (avx512_loops.cpp), cut
out of the assembly and given to llvm-mca, which simulates it on a model of each processor with
every load a hit in L1. Printed are cycles for 64 weights and the memory traffic that one core
could keep up with at a stated clock, beside the 18 GB/s that each of two cores gets of a memory of
36 GB/s. A loop that sustains more than that is bound by memory, as it should be. What is left out:
cache misses, tails, the once-a-row work, and clocks that sink under AVX-512. Two things are
corrected, since llvm-mca is known to be wrong there (SUBSTITUTES).

The same model of the AVX2 loops on the machine at hand is printed beside their measured time: how
far the model can be trusted.
"""

from __future__ import annotations

import argparse
import functools
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness

HERE = Path(__file__).resolve().parent
BYTES = 64 * 4.127 / 8  # packed codes and nested scales of 64 weights
ITERATIONS = 200
# What is assumed where --ghz says nothing.
CLOCKS = {"znver4": 3.7, "sapphirerapids": 3.0, "icelake-server": 2.9}
# Instructions that stand in for others in the simulation: (processor, instruction) -> another.
# A store past the cache is modelled with the latency of memory and blocks everything; here it is a
# store. On Zen 4 LLVM 19 has a vdpbf16ps every 3 cycles, but bf16 matmuls there reach twice the
# FLOP/s of fp32 ones (iree-org/iree#15089; 58 FLOP a cycle and core measured for this project), so
# it starts every cycle, as an fma does.
SUBSTITUTES = {
    ("", "vmovntdq"): "vmovdqu64",
    ("", "vmovntps"): "vmovups",
    ("znver4", "vdpbf16ps"): "vfmadd231ps",
    ("znver5", "vdpbf16ps"): "vfmadd231ps",
}


@dataclass(frozen=True)
class Work:
    """A kernel as a sum of loops: ``(loop, weights it takes a trip, times it is run)``."""

    name: str
    isa: str
    loops: tuple[tuple[str, float, float], ...]


def _tile(isa: str, kind: str, m: int) -> Work:
    """The tile kernel on m rows: a strip is decoded once and multiplied with all rows of x."""
    width = {"avx2": 8, "avx512": 16, "avx512_bf16": 32 if kind == "bf16" else 16}[isa]
    full = 3 if isa == "avx2" else 6
    loops, left = [(f"strip_{kind}", 64, 1.0)], m
    loops.append((f"dot_{kind}_full", 4 * width, left // full))
    left %= full
    for size in (4, 2, 1) if isa != "avx2" else (2, 1):
        while left >= size:
            loops.append((f"dot_{kind}_{size}", 4 * width, 1))
            left -= size
    return Work(f"tile {kind}, M = {m}", isa, tuple(loop for loop in loops if loop[2]))


def _decode(isa: str, kind: str, m: int) -> Work:
    loops = ((f"decode_{kind}_{m}", 64, 1.0), ("scales", 64, 1.0))
    return Work(f"decode {kind}, M = {m}", isa, loops)


def works(isa: str) -> list[Work]:
    kinds = ("f32", "bf16") if isa == "avx512_bf16" else ("f32",)
    found = [_decode(isa, kind, m) for kind in kinds for m in (1, 4)]
    found += [_tile(isa, kind, 16) for kind in kinds]
    return [*found, Work("dequantize to bf16", isa, (("dequantize_bf16", 64, 1.0),))]


# --- the loops ----------------------------------------------------------------------------------


def cmake_flags(isa: str) -> list[str]:
    """The flags of one instruction set, read from CMakeLists.txt."""
    text = (HERE.parent / "CMakeLists.txt").read_text()
    found = dict(re.findall(r"set\(QLK_FLAGS_(\w+) ([^)]*)\)", text))

    def expand(value: str) -> str:
        return re.sub(r"\$\{QLK_FLAGS_(\w+)\}", lambda m: expand(found[m[1]]), value)

    return expand(found[isa]).split()


def compile_loops(isa: str, compiler: str, folder: Path) -> dict[str, list[str]]:
    """Each function of avx512_loops.cpp to the instructions of its one loop, labels included."""
    out = folder / f"{isa}.s"
    command = [compiler, "-std=c++20", "-O3", "-DNDEBUG", "-fPIC", "-fvisibility=hidden",
               "-ffp-contract=off", "-w", f"-DQLK_ISA={isa}", *cmake_flags(isa),
               "-S", str(HERE / "avx512_loops.cpp"), "-o", str(out)]  # fmt: skip
    subprocess.run(command, check=True)
    loops: dict[str, list[str]] = {}
    body: list[str] = []
    name = ""
    for line in out.read_text().splitlines():
        label = re.match(r"^([A-Za-z_]\w*):$", line)
        if label:
            name, body = label[1], []
        elif line.strip().startswith(".size") and name:
            if re.match(r"(decode_(f32|bf16)|scales|strip|dequantize_bf16|dot_)", name):
                loops[name] = innermost_loop(body, name)
            name = ""
        elif name:
            body.append(line)
    return loops


def innermost_loop(lines: list[str], name: str) -> list[str]:
    """The instructions between a label and the jump back to it that holds no other such pair."""
    labels: dict[str, int] = {}
    code: list[str] = []
    for line in lines:
        text = line.strip()
        label = re.match(r"^(\.L\w+):", text)
        if label:
            labels[label[1]] = len(code)
        elif text and not text.startswith((".", "#")):
            code.append(text)
    spans = []
    for i, text in enumerate(code):
        jump = re.match(r"j\w+\s+(\.L\w+)", text)
        begin = labels.get(jump[1], i + 1) if jump else i + 1
        if begin <= i and "ret" not in code[begin:i]:  # else a jump back to the way out
            spans.append((begin, i))
    inner = [s for s in spans if not any(s != t and s[0] <= t[0] and t[1] <= s[1] for t in spans)]
    if len(inner) != 1:
        raise RuntimeError(f"{name} should hold one innermost loop, found {len(inner)}")
    begin, end = inner[0]
    return code[begin : end + 1]


# --- the model ----------------------------------------------------------------------------------


def find_mca() -> str | None:
    """The newest llvm-mca: models of newer processors come with newer versions."""
    for name in [f"llvm-mca-{v}" for v in range(29, 13, -1)] + ["llvm-mca"]:
        if shutil.which(name):
            return name
    return None


def mca_cpus(mca: str) -> set[str]:
    text = subprocess.run([mca, "-mcpu=help"], input="", capture_output=True, text=True).stderr
    return set(re.findall(r"^\s+([\w-]+)\s+- Select the", text, re.MULTILINE))


def simulate(mca: str, cpu: str, loop: list[str]) -> tuple[float, str]:
    """Cycles a trip, and the unit that is busiest."""
    lines = [re.sub(r"^(j\w+\s+)\.L\w+", r"\g<1>1b", text) for text in loop]
    for (where, old), new in SUBSTITUTES.items():
        if where in ("", cpu):
            # vmovdqu64 has no form without AVX-512
            new = "vmovdqu" if new == "vmovdqu64" and "zmm" not in "".join(lines) else new
            lines = [re.sub(rf"^{old}\b", new, text) for text in lines]
    source = "\n".join(["1:", *lines])
    command = [mca, f"-mcpu={cpu}", f"-iterations={ITERATIONS}", "-instruction-info=0"]
    run = subprocess.run(command, input=source + "\n", capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{mca} failed: {run.stderr.strip()[:500]}")
    cycles = int(re.search(r"Total Cycles:\s+(\d+)", run.stdout)[1]) / ITERATIONS
    names = dict(re.findall(r"^\[([\d.]+)\]\s+-\s+(\S+)", run.stdout, re.MULTILINE))
    table = run.stdout.split("Resource pressure per iteration:")[1].splitlines()
    heads, values = re.findall(r"\[([\d.]+)\]", table[1]), table[2].split()
    busy = max((float(v), names.get(h, h)) for h, v in zip(heads, values, strict=True) if v != "-")
    width = float(re.search(r"Dispatch Width:\s+(\d+)", run.stdout)[1])
    uops = int(re.search(r"Total uOps:\s+(\d+)", run.stdout)[1]) / ITERATIONS
    return cycles, max((uops / width, "dispatch"), busy)[1]


def model(mca: str, cpu: str, work: Work, loops: dict[str, list[str]]) -> tuple[float, str]:
    """Cycles for 64 weights, and the busiest unit of the loop that takes most of them."""
    parts = []
    for name, weights, times in work.loops:
        cycles, unit = simulate(mca, cpu, loops[name])
        parts.append((cycles * times * 64 / weights, unit))
    return sum(c for c, _ in parts), max(parts)[1]


# --- how far to trust it ------------------------------------------------------------------------


def measured_cycles(m: int, kind: str, clock: float) -> float:
    """Cycles for 64 weights of the kernel that runs here, one thread, weights in its L2 cache.

    From the difference between two sizes, which leaves out what a call costs whatever its size.
    """
    import torch

    from qlora_kernels import cpu
    from qlora_kernels import functional as F4

    k, rows, times = 4096, (64, 192), []
    x = torch.randn(max(m, 1), k)
    with cpu.use_isa("avx2"), torch.no_grad():
        for n in rows:
            packed, state = F4.quantize_4bit(
                torch.randn(n, k), quant_type="nf4", compress_statistics=True
            )
            out = torch.empty(n, k, dtype=torch.bfloat16)
            if kind == "dequantize":
                run = functools.partial(_dequantize, packed, state, out)
            else:
                run = functools.partial(_linear, x, packed, state)
            times.append(min(harness.sample(run, seconds=0.02, count=25, clock="cpu")))
    return (times[1] - times[0]) * clock * 1e9 / ((rows[1] - rows[0]) * k / 64)


def _dequantize(packed: Any, state: Any, out: Any, _: int) -> None:
    from qlora_kernels import functional as F4

    F4.dequantize_4bit(packed, state, out=out)


def _linear(x: Any, packed: Any, state: Any, _: int) -> None:
    from qlora_kernels import functional as F4

    F4.linear_4bit(x, packed, state)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--cpu", nargs="*", default=["znver4", "sapphirerapids", "icelake-server"])
    parser.add_argument("--ghz", type=float, help=f"clock of all of them; else {CLOCKS}")
    parser.add_argument("--bandwidth", type=float, default=36.0, help="GB/s of two cores together")
    parser.add_argument("--compiler", default="g++")
    parser.add_argument("--no-check", action="store_true", help="measure nothing on this machine")
    harness.add_arguments(parser)
    args = parser.parse_args()
    harness.begin(args, threads=1)
    mca = find_mca()
    if mca is None or shutil.which(args.compiler) is None:
        what = "llvm-mca (Debian: llvm-19, or llvm)" if mca is None else args.compiler
        print(f"skipped: {what} is not installed")
        return 0
    known = mca_cpus(mca)
    cpus = [c for c in args.cpu if c in known]
    for cpu in sorted(set(args.cpu) - known):
        print(f"note: {mca} knows no {cpu}; a newer LLVM does")

    lines = []
    with tempfile.TemporaryDirectory() as folder:
        loops = {}
        for isa in ("avx2", "avx512", "avx512_bf16"):
            loops[isa] = compile_loops(isa, args.compiler, Path(folder))
        for cpu in cpus:
            for isa in ("avx512", "avx512_bf16"):
                if isa == "avx512_bf16" and cpu == "icelake-server":
                    continue  # has no bf16 products
                for work in works(isa):
                    if isa == "avx512_bf16" and "f32" in work.name:
                        continue  # the same code as avx512
                    cycles, unit = model(mca, cpu, work, loops[isa])
                    ghz = args.ghz or CLOCKS.get(cpu, 3.0)
                    gb_s = BYTES / cycles * ghz
                    lines.append({"cpu": cpu, "isa": isa, "work": work.name, "cycles": cycles,
                                  "bound": unit, "gb_s": gb_s, "clock_ghz": ghz})  # fmt: skip
        checks = [] if args.no_check else check(mca, known, loops["avx2"])

    share = args.bandwidth / 2
    print(f"\nMODELLED by {mca}, not measured: every load hits L1")
    print(f"GB/s and cycles: of one core, whose share of the memory is {share:g} GB/s")
    print("ms: a 4096 x 4096 weight on two cores, by the core alone\n")
    rows = [
        [f"{r['cpu']} {r['clock_ghz']:g} GHz", r["isa"], r["work"], f"{r['cycles']:.1f}",
         r["bound"], f"{r['gb_s']:.1f}", f"{100 * r['gb_s'] / share:.0f}%",
         f"{4096 * 4096 / 64 / 2 * r['cycles'] / r['clock_ghz'] / 1e6:.2f}"]
        for r in lines
    ]  # fmt: skip
    head = [
        "processor",
        "set",
        "kernel",
        "cycles / 64 weights",
        "busiest",
        "GB/s",
        "of memory",
        "ms",
    ]
    harness.print_table(head, rows)
    if checks:
        print(f"\nThe model against this machine: {checks[0]['cpu']}, AVX2, one thread, in cache\n")
        harness.print_table(
            ["kernel", "modelled", "measured", "measured / modelled"],
            [[c["work"], f"{c['modelled']:.1f}", f"{c['measured']:.1f}",
              f"{c['measured'] / c['modelled']:.2f}"] for c in checks],
        )  # fmt: skip
    harness.write_json(args, {"label": "modelled", "tool": mca,
                              "lines": lines, "checks": checks})  # fmt: skip
    return 0


def check(mca: str, known: set[str], loops: dict[str, list[str]]) -> list[dict]:
    """Modelled and measured cycles of the AVX2 kernels, where this machine's model is known."""
    from qlora_kernels import cpu as kernels

    text = subprocess.run([mca, "--version"], capture_output=True, text=True).stdout
    host = re.search(r"Host CPU:\s+(\S+)", text)
    if not host or host[1] not in known or "avx2" not in kernels.available_isas():
        return []
    clock = harness.clock_ghz()
    if clock is None:
        return []
    found = []
    for work in works("avx2"):
        kind = "dequantize" if "dequantize" in work.name else "linear"
        m = int(work.name.rsplit(" ", 1)[1]) if kind == "linear" else 0
        found.append({"cpu": host[1], "work": work.name, "clock_ghz": clock,
                      "modelled": model(mca, host[1], work, loops)[0],
                      "measured": measured_cycles(m, kind, clock)})  # fmt: skip
    return found


if __name__ == "__main__":
    sys.exit(main())
