"""What of Triton the package relies on, one test each, named for it: where a version of Triton
breaks a kernel, the test that fails here says what changed (docs/triton.md lists the same)."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

import triton.language as tl  # noqa: E402

OPTIONS = {"enable_fp_fusion": False}
_ASM = tl.constexpr("{\nprmt.b32 $0, $2, $3, 0x5410;\nprmt.b32 $1, $2, $3, 0x7632;\n}")


@triton.jit
def product_and_sum(x, out):
    a, b, c = tl.load(x), tl.load(x + 1), tl.load(x + 2)
    tl.store(out, a * b + c)


def test_enable_fp_fusion_is_a_launch_option(triton_gpu) -> None:
    """Off, a product and a sum are two roundings: (1 + 2^-12)^2 - (1 + 2^-11) is 0, not 2^-24."""
    x = torch.tensor([1 + 2.0**-12, 1 + 2.0**-12, -(1 + 2.0**-11)])
    out = torch.ones(1)
    product_and_sum[(1,)](x, out, **OPTIONS)
    text = triton_gpu.launches[-1].result.kernel.module.text
    assert "fma.rn.f32" not in text and "mul.rn.f32" in text
    assert out.item() == 0.0
    product_and_sum[(1,)](x, out, enable_fp_fusion=True)
    assert out.item() == 2.0**-24


@triton.jit
def divide(x, out):
    tl.store(out, tl.div_rn(tl.load(x), tl.load(x + 1)))


def test_div_rn_is_ieee_and_keeps_denormals(triton_gpu) -> None:
    x, out = torch.tensor([1e-38, 3.0]), torch.ones(1)
    divide[(1,)](x, out, **OPTIONS)
    assert out.item() == (x[0] / x[1]).item() != 0.0


@triton.jit
def gather(table, index, out):
    i = tl.load(index + tl.arange(0, 128))
    t = tl.load(table + tl.arange(0, 256))
    tl.store(out + tl.arange(0, 128), tl.gather(t, i, 0))


def test_gather_is_a_load_from_shared_memory(triton_gpu) -> None:
    table, out = torch.randn(256), torch.zeros(128)
    index = torch.randint(256, (128,), dtype=torch.int32)
    gather[(1,)](table, index, out, **OPTIONS)
    assert torch.equal(out, table[index.long()])
    regions = triton_gpu.launches[-1].result.counts.regions
    assert regions[0]["sectors_read"] == 256 * 4 / 32  # the table once, whatever the index


@triton.jit
def interleave(x, out):
    words = tl.load(x + tl.arange(0, 128))
    halves = tl.interleave(words.to(tl.uint16), (words >> 16).to(tl.uint16))
    tl.store(out + tl.arange(0, 256), halves)


def test_interleave_puts_the_first_first_and_moves_nothing(triton_gpu) -> None:
    """Halves that become words again cost no instruction: stores are of whole words."""
    x = torch.randint(2**31 - 1, (128,), dtype=torch.int32)
    out = torch.zeros(256, dtype=torch.int16)
    interleave[(1,)](x, out, **OPTIONS)
    assert torch.equal(out.view(torch.int32), x)
    text = triton_gpu.launches[-1].result.kernel.module.text
    assert "st.global.b32" in text and "shared" not in text.split("{", 1)[1]


@triton.jit
def halves(x, out):
    s = tl.load(x + tl.arange(0, 64)).to(tl.float64).reshape([1, 64])
    for _ in tl.static_range(6):  # another shape each time
        low, high = tl.split(s.reshape([1, 2, s.shape[1] // 2]).permute(0, 2, 1))
        s = low + high
    tl.store(out + tl.arange(0, 1), s.reshape([1]))


def test_static_range_unrolls_to_other_shapes_and_split_halves(triton_gpu) -> None:
    x, out = torch.randn(64), torch.zeros(1, dtype=torch.float64)
    halves[(1,)](x, out, num_warps=1, **OPTIONS)
    want = x.double()
    while want.numel() > 1:
        want = want[: want.numel() // 2] + want[want.numel() // 2 :]
    assert torch.equal(out, want)


@triton.jit
def make_table(x, N: tl.constexpr):
    table = ()
    for i in tl.static_range(N):
        table = table + (tl.load(x + i),)
    return table


@triton.jit
def assembly(x, out):
    at = tl.arange(0, 128)
    table = make_table(x, 1)
    a, b = tl.inline_asm_elementwise(
        _ASM, "=&r,=&r,r,r", (tl.load(x + at),) + table, (tl.uint32, tl.uint32), True, 1
    )
    tl.store(out + at, a)
    tl.store(out + 128 + at, b)


def test_inline_assembly_takes_tuples_and_scalars_and_returns_tuples(triton_gpu) -> None:
    x = torch.arange(128, dtype=torch.int32) * 0x10001 + 0x70000
    out = torch.zeros(2, 128, dtype=torch.int32)
    assembly[(1,)](x, out, **OPTIONS)
    assert torch.equal(out[0], x & 0xFFFF | (x[0] & 0xFFFF) << 16)
    assert torch.equal(out[1], x >> 16 | x[0] >> 16 << 16)


@triton.jit(do_not_specialize=["n"])
def optional(x, n, out, WIDE: tl.constexpr):
    if x is None:
        tl.store(out, n)
    else:
        tl.store(out, tl.load(x.to(tl.pointer_type(tl.int64)) if WIDE else x))


def test_none_is_a_constant_and_pointers_are_cast(triton_gpu) -> None:
    x, out = torch.tensor([7, 1], dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    optional[(1,)](None, 1, out, WIDE=False, **OPTIONS)
    assert out.item() == 1
    optional[(1,)](None, 2**40, out, WIDE=False, **OPTIONS)
    assert out.item() == 2**40
    optional[(1,)](x, 1, out, WIDE=True, **OPTIONS)
    assert out.item() == 2**32 + 7


def test_compilation_ahead_of_time() -> None:
    """``triton.compile`` for a target that is not here, and the names of what comes out."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {"x": "*i32", "n": "i64", "out": "*i64", "WIDE": "constexpr"}
    source = ASTSource(optional, types, {"WIDE": True}, {(0,): [["tt.divisibility", 16]]})
    amd = triton.compile(source, GPUTarget("hip", "gfx942", 64), {"num_warps": 4, **OPTIONS})
    assert {"ttir", "amdgcn"} <= set(amd.asm)
    nvidia = triton.compile(source, GPUTarget("cuda", 80, 32), {"num_warps": 4, **OPTIONS})
    assert {"ttir", "ptx", "cubin"} <= set(nvidia.asm)
