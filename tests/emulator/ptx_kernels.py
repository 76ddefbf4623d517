"""Small kernels around one instruction, and inputs that find what is wrong with it."""

from __future__ import annotations

import numpy as np
from ptx_oracle import UINT, WIDTH

from qlora_kernels.emulator import Module, Result, emulate

HEADER = ".version 9.0\n.target {target}\n.address_size 64\n"
REGISTER = {8: "b16", 16: "b16", 32: "b32", 64: "b64"}


def kernel_text(
    body: str, params: str, target: str = "sm_90a", extra: str = "", name: str = "k"
) -> str:
    """PTX of a kernel with 64-bit parameters p0, p1, ... given as ``params`` declarations."""
    return (
        f"{HEADER.format(target=target)}{extra}\n.visible .entry {name}({params})\n{{\n{body}\n}}\n"
    )


def elementwise(instruction: str, out: str, ins: list[str], target: str = "sm_90a") -> Module:
    """A kernel ``out[i] = instruction(in0[i], in1[i], ...)``; ``{d}``, ``{a}``, ``{b}``, ... in
    the text
    are the registers, of the types given. ``out`` may be ``pred`` (stored as 0 or 1)."""
    letters = "abcef"
    n = len(ins)
    lines = [
        ".reg .b64 %rd<8>;",
        ".reg .b32 %r<8>;",
        ".reg .pred %p<4>;",
        "mov.u32 %r1, %ctaid.x;",
        "mov.u32 %r2, %ntid.x;",
        "mov.u32 %r3, %tid.x;",
        "mad.lo.s32 %r4, %r1, %r2, %r3;",
        "cvt.u64.u32 %rd1, %r4;",
    ]
    names = {}
    for k, kind in enumerate(ins):
        width = max(WIDTH[kind], 8)
        lines.append(f".reg .{REGISTER[width]} %{letters[k]};")
        lines.append(f"ld.param.u64 %rd2, [p{k + 1}];")
        lines.append(f"mad.lo.s64 %rd3, %rd1, {width // 8}, %rd2;")
        lines.append(f"ld.global.b{width} %{letters[k]}, [%rd3];")
        names[letters[k]] = f"%{letters[k]}"
    width = WIDTH[out]
    if out == "pred":
        lines.append(".reg .pred %d;")
    else:
        lines.append(f".reg .{REGISTER[width]} %d;")
    lines.append(instruction.format(d="%d", **names))
    if out == "pred":
        lines.append("selp.u32 %r5, 1, 0, %d;")
    lines.append("ld.param.u64 %rd4, [p0];")
    lines.append(f"mad.lo.s64 %rd5, %rd1, {width // 8}, %rd4;")
    lines.append(f"st.global.b{width} [%rd5], {'%r5' if out == 'pred' else '%d'};")
    lines.append("ret;")
    params = ", ".join(f".param .u64 p{k}" for k in range(n + 1))
    return Module.from_ptx(kernel_text("\n".join(lines), params, target))


def run_elementwise(
    instruction: str, out: str, ins: list[str], arrays: list[np.ndarray], target: str = "sm_90a"
) -> np.ndarray:
    module = elementwise(instruction, out, ins, target)
    n = arrays[0].size
    assert n % 32 == 0
    y = np.zeros(n, UINT[WIDTH[out]])
    block = 64 if n % 64 == 0 else 32
    emulate(
        module,
        n // block,
        block,
        [y, *arrays],
        checks=False,
        device="b200" if target.startswith("sm_100") else "h100",
    )
    return y


SPECIAL = {
    "f32": [
        0,
        1 << 31,
        0x3F800000,
        0xBF800000,
        0x7F800000,
        0xFF800000,
        0x7FC00000,
        0xFFC12345,
        1,
        0x80000001,
        0x007FFFFF,
        0x00800000,
        0x80800000,
        0x7F7FFFFF,
        0xFF7FFFFF,
        0x3F000000,
        0x34000000,
        0x4B000000,
        0x4B7FFFFF,
        0x4F000000,
        0xCF000000,
        0x5F000000,
        0x3F7FFFFF,
        0x3EFFFFFF,
        0x3FC00000,
        0x40200000,
        0x477FE000,
        0x477FF000,
        0x33000000,
        0x33800001,
        0x38800000,
        0x387FFFFF,
    ],
    "f64": [
        0,
        1 << 63,
        0x3FF0000000000000,
        0xBFF0000000000000,
        0x7FF0000000000000,
        0xFFF0000000000000,
        1,
        0x000FFFFFFFFFFFFF,
        0x0010000000000000,
        0x7FEFFFFFFFFFFFFF,
        0x3FE0000000000000,
        0x36A0000000000000,
        0x47EFFFFFF0000000,
        0x43E0000000000000,
        0xC3E0000000000000,
        0x41EFFFFFFFE00000,
    ],
    "f16": [
        0,
        0x8000,
        0x3C00,
        0xBC00,
        0x7C00,
        0xFC00,
        0x7E00,
        0x7D55,
        1,
        0x8001,
        0x03FF,
        0x0400,
        0x7BFF,
        0xFBFF,
        0x3800,
        0x3BFF,
        0x1400,
    ],
    "bf16": [
        0,
        0x8000,
        0x3F80,
        0xBF80,
        0x7F80,
        0xFF80,
        0x7FC0,
        0x7F95,
        1,
        0x8001,
        0x007F,
        0x0080,
        0x7F7F,
        0xFF7F,
        0x3F00,
        0x3F7F,
        0x3400,
    ],
}


def inputs(kinds: list[str], n: int = 1024, seed: int = 0) -> list[np.ndarray]:
    """Bit patterns: every pair of special values first, then ordinary numbers, then random bits."""
    rng = np.random.default_rng(seed)
    arrays = []
    for k, kind in enumerate(kinds):
        width = WIDTH[kind]
        base = kind[:-2] if kind.endswith("x2") and kind[:-2] in SPECIAL else kind
        if base in SPECIAL:
            special = SPECIAL[base]
        else:
            top = 1 << width - 1
            special = [
                0,
                1,
                2,
                3,
                31,
                32,
                33,
                63,
                64,
                255,
                top - 1,
                top,
                top + 1,
                2 * top - 1,
                2 * top - 2,
                0x55,
                0xAA,
            ]
        s = np.array([v & (1 << WIDTH[base]) - 1 for v in special], UINT[WIDTH[base]])
        count = n * width // WIDTH[base]
        idx = np.arange(count)
        x = s[(idx // (len(s) ** k if k < 3 else 1)) % len(s)] if k else s[idx % len(s)]
        x = x.copy()
        start = min(count, len(s) ** 2)
        start = min(start, count // 2)
        rest = count - start
        if base in ("f32", "f64", "f16", "bf16"):
            import ml_dtypes

            dtype = {
                "f32": np.float32,
                "f64": np.float64,
                "f16": np.float16,
                "bf16": ml_dtypes.bfloat16,
            }[base]
            usual = (rng.standard_normal(rest) * 2.0 ** rng.integers(-12, 12, rest)).astype(dtype)
            x[start:] = usual.view(UINT[WIDTH[base]])
            bits = (
                rng.integers(0, 1 << WIDTH[base], rest, dtype=np.uint64, endpoint=False)
                if WIDTH[base] < 64
                else rng.integers(0, 1 << 63, rest, dtype=np.uint64) * np.uint64(2)
                + rng.integers(0, 2, rest, dtype=np.uint64)
            )
            wild = rng.random(rest) < 0.5
            x[start:][wild] = bits[wild].astype(UINT[WIDTH[base]])
        else:
            bits = rng.integers(0, 1 << 32, rest, dtype=np.uint64) << np.uint64(32) | rng.integers(
                0, 1 << 32, rest, dtype=np.uint64
            )
            x[start:] = (bits >> rng.integers(0, 64, rest).astype(np.uint64)).astype(UINT[width])
            wild = rng.random(rest) < 0.5
            x[start:][wild] = bits[wild].astype(UINT[width])
        arrays.append(x.view(UINT[width]).copy())
    return arrays


def run(text: str, grid: object, block: object, args: list[object], **options: object) -> Result:
    return emulate(Module.from_ptx(text), grid, block, args, **options)
