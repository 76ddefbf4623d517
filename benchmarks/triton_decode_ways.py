"""What Triton's compiler makes of each way to look a 4-bit code up: the table of docs/triton.md.

    python benchmarks/triton_decode_ways.py [--devices a100 h100 ...]

One kernel, a loop over tiles of [64 blocks, 64 values]: words of eight codes in, and in bf16 out
round(codebook[q] * scale). The ways give the same bits, which is checked; all else in the kernel is
the same, so a way costs what it takes beyond `copy`, which stores the words themselves four times.

Counted in the emulator: SASS for 8 weights (the loop's, as ptxas makes it for the device), passes
of shared memory and sectors of global memory asked for, by a warp for 8 weights of each lane. Of
AMD's targets, where nothing is executed, the instructions of the loop are counted in the assembly.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import harness
import torch
import triton
import triton.language as tl

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qlora_kernels import reference
from qlora_kernels.emulator import sass, toolchain
from qlora_kernels.emulator.triton_driver import EmulatedTriton
from qlora_kernels.formats import get_format
from qlora_kernels.triton.blocks import GATHER, OPTIONS, PRMT, decode, load_codebook

BLOCK, ROWS, STEPS, WARPS = 64, 64, 4, 4
_BLOCK, _ROWS = tl.constexpr(BLOCK), tl.constexpr(ROWS)
WAYS = {
    "copy": "no look-up: the words are stored",
    "load": "tl.load(codebook + code)",
    "where": "a tree of tl.where over 16 scalars",
    "sum": "16 comparisons, each adding its value",
    "gather": "tl.gather of 16 floats (blocks.GATHER)",
    "pairs": "tl.gather of 256 pairs of bf16, times the scale",
    "prmt": "byte permutes of a table made for each block (blocks.PRMT)",
}
NAMES = tl.constexpr(tuple(WAYS))
AMD = {"gfx942": 64, "gfx1100": 32}


@triton.jit
def nibbles(words):
    """[..., 8n] codes of [..., n] words, in the order of their values."""
    halves = tl.interleave(words.to(tl.uint16), (words >> 16).to(tl.uint16))
    packed = tl.interleave(halves.to(tl.uint8), (halves >> 8).to(tl.uint8)).to(tl.int32)
    return tl.interleave(packed >> 4, packed & 15)


@triton.jit
def select(codes, values):
    """16 values to one, a bit of the code after the other: 15 times tl.where."""
    for bit in tl.static_range(4):
        odd = (codes & (1 << bit)) != 0
        halved = ()
        for i in tl.static_range(8 >> bit):
            halved = halved + (tl.where(odd, values[2 * i + 1], values[2 * i]),)
        values = halved
    return values[0]


@triton.jit
def scalars(codebook):
    values = ()
    for i in tl.static_range(16):
        values = values + (tl.load(codebook + i),)
    return values


@triton.jit
def pair_table(codebook):
    """256 words: the two values of a byte, in bf16."""
    byte = tl.arange(0, 256)
    earlier = tl.load(codebook + (byte >> 4)).to(tl.bfloat16).to(tl.uint16, bitcast=True)
    later = tl.load(codebook + (byte & 15)).to(tl.bfloat16).to(tl.uint16, bitcast=True)
    return earlier.to(tl.uint32) | (later.to(tl.uint32) << 16)


@triton.jit
def kernel(packed, absmax, codebook, out, steps, WAY: tl.constexpr):
    row = tl.arange(0, _ROWS)
    word = row[:, None] * (_BLOCK // 8) + tl.arange(0, _BLOCK // 8)[None, :]
    to = row[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    if WAY == "where" or WAY == "sum" or WAY == "prmt":
        book = scalars(codebook)
    elif WAY == "gather":
        book = load_codebook(codebook, GATHER)
    elif WAY == "pairs":
        book = pair_table(codebook)
    for step in range(steps):
        first = (tl.program_id(0) * steps + step) * _ROWS
        words = tl.load(packed.to(tl.pointer_type(tl.uint32)) + first * (_BLOCK // 8) + word)
        scale = tl.load(absmax + first + row)[:, None]
        if WAY == "copy":
            wide = tl.interleave(words.to(tl.uint16), (words >> 16).to(tl.uint16))
            twice = tl.interleave(tl.interleave(wide, wide), tl.interleave(wide, wide))
            values = twice.to(tl.bfloat16, bitcast=True)
        elif WAY == "gather":
            values = decode(words, scale, book, tl.bfloat16, GATHER)
        elif WAY == "prmt":
            values = decode(words, scale, book, tl.bfloat16, PRMT)
        elif WAY == "pairs":
            halves = tl.interleave(words.to(tl.uint16), (words >> 16).to(tl.uint16))
            both = tl.interleave(halves & 255, halves >> 8).to(tl.int32)
            pairs = tl.gather(book, both.reshape([both.numel]), 0).reshape(both.shape)
            floats = tl.interleave(pairs << 16, pairs & 0xFFFF0000).to(tl.float32, bitcast=True)
            values = (floats * scale).to(tl.bfloat16)
        else:
            codes = nibbles(words)
            if WAY == "load":
                looked_up = tl.load(codebook + codes)
            elif WAY == "where":
                looked_up = select(codes, book)
            else:
                looked_up = tl.zeros(codes.shape, tl.float32)
                for i in tl.static_range(16):
                    looked_up = tl.where(codes == i, book[i], looked_up)
            values = (looked_up * scale).to(tl.bfloat16)
        tl.store(out + first * _BLOCK + to, values)


def counted(key: str, way: str) -> dict[str, float]:
    torch.manual_seed(0)
    count = STEPS * ROWS * BLOCK
    packed, absmax = reference.quantize(torch.randn(count), "nf4", BLOCK)
    codebook = get_format("nf4").tensors()[0]
    if way == "pairs":  # rounds twice: the same bits only of values that bf16 has
        codebook = codebook.bfloat16().float()
    out = torch.empty(count, dtype=torch.bfloat16)
    with EmulatedTriton(key) as gpu:
        kernel[(1,)](packed, absmax, codebook, out, STEPS, WAY=way, num_warps=WARPS, **OPTIONS)
    want = reference.dequantize(packed, absmax, codebook, BLOCK, (count,), torch.bfloat16)
    assert way == "copy" or torch.equal(out, want), way
    launch = gpu.launches[-1]
    text = launch.result.kernel.module.text
    cubin = toolchain.assemble(text)
    function = sass.parse(toolchain.disassemble(cubin, lines="ptx"), text)[launch.name]
    dynamic = function.dynamic(launch.result.counts.by_ptx_line(), WARPS)
    loop, eights = dynamic.main_loop, count / 8
    total = launch.result.counts.total
    return {
        "sass": dynamic.per_item(eights, loop.blocks),
        "memory": dynamic.pipes(loop.blocks)["lsu"] * 32 / eights,
        "wavefronts": 32 * float(total["wavefronts"]) / eights,
        "sectors": 32 * float(total["sectors_read"]) / eights,
        "registers": float(launch.registers),
    }


def static(target: str, way: str) -> dict[str, float]:
    """The loop of AMD's assembly: from its label to the branch back."""
    signature = {
        "packed": "*u8", "absmax": "*fp32", "codebook": "*fp32", "out": "*bf16", "steps": "i32",
        "WAY": "constexpr",
    }  # fmt: skip
    source = ASTSource(
        kernel, signature, {"WAY": way},
        {(i,): [["tt.divisibility", 16]] for i in range(4)},
    )  # fmt: skip
    options = {"num_warps": WARPS, **OPTIONS}
    text = triton.compile(source, GPUTarget("hip", target, AMD[target]), options).asm["amdgcn"]
    body = text.split("s_endpgm")[0].splitlines()
    labels = {line.split(":")[0]: i for i, line in enumerate(body) if line.startswith(".LBB")}
    loops = [
        (labels[m.group(1)], i)
        for i, line in enumerate(body)
        if (m := re.search(r"s_c?branch\w*\s+(\.LBB\w+)", line)) and labels.get(m.group(1), i) < i
    ]
    begin, end = max(loops, key=lambda pair: pair[1] - pair[0])
    names = [m.group(1) for line in body[begin:end] if (m := re.match(r"\s+([a-z]\w+)", line))]
    threads = WARPS * AMD[target]
    eights = ROWS * BLOCK / 8 / threads  # a lane's, in one step
    return {
        "instructions": len(names) / eights,
        "memory": sum(n.startswith(("ds_", "global_", "buffer_")) for n in names) / eights,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--devices", nargs="+", default=["a100", "h100", "rtx5090"])
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    args.quick, args.threads = False, 1
    missing = toolchain.available()
    if missing:
        print(missing)
        return 0
    figures, rows = [], []
    for key in args.devices:
        base = 0.0
        for way, words in WAYS.items():
            c = counted(key, way)
            base = base or c["sass"]
            rows.append(
                [key, way, words, f"{c['sass']:.1f}", f"{c['sass'] - base:.1f}",
                 *(f"{c[k]:.1f}" for k in ("memory", "wavefronts", "sectors")),
                 f"{c['registers']:.0f}"]
            )  # fmt: skip
            figures.append({"device": key, "way": way, **c})
    print("for 8 weights of each of a warp's lanes")
    harness.print_table(
        ["device", "way", "what it is", "SASS", "beyond copy", "of it memory", "shared passes",
         "sectors read", "registers"], rows,
    )  # fmt: skip
    rows = []
    for target in AMD:
        for way in WAYS:
            if way == "prmt":
                continue
            c = static(target, way)
            rows.append([target, way, f"{c['instructions']:.1f}", f"{c['memory']:.1f}"])
            figures.append({"device": target, "way": way, **c})
    print("\ncompiled only, for 8 weights of each lane")
    harness.print_table(["target", "way", "instructions", "of it memory"], rows)
    harness.write_json(args, {"figures": figures})
    return 0


if __name__ == "__main__":
    sys.exit(main())
