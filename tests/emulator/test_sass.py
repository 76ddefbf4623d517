"""SASS read back from nvdisasm: blocks, loops, pipes; and trips that follow from PTX counts.

Counts of PTX are made by hand here, for kernels whose loops are known; test_model.py takes them
from the emulator.
"""

from __future__ import annotations

import pytest

from qlora_kernels.emulator import sass, toolchain

MISSING = toolchain.available()
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))

TARGETS = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"]

SOURCE = r"""
#include <cuda_bf16.h>
extern "C" __global__ void sum(const float* x, float* y, int n, int stride) {
  float s = 0;
#pragma unroll 1
  for (int i = 0; i < n; ++i) s += x[i * stride + threadIdx.x];
  y[threadIdx.x] = s;
}
extern "C" __global__ void tree(const float* x, float* y) {
  __shared__ float s[256];
  s[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
#pragma unroll 1
  for (int o = 128; o > 0; o /= 2) {
    if (threadIdx.x < o) s[threadIdx.x] += s[threadIdx.x + o];
    __syncthreads();
  }
  if (threadIdx.x == 0) *y = s[0];
}
extern "C" __global__ void nested(float* y, int n, int m) {
  float s = 0;
#pragma unroll 1
  for (int i = 0; i < n; ++i) {
    float t = y[i];
#pragma unroll 1
    for (int j = 0; j < m; ++j) t += y[i * m + j] * s;
    s += t;
    y[i] = s;
  }
}
extern "C" __global__ void mma_loop(float* c, const unsigned* a, int k) {
  float d[4] = {};
#pragma unroll 1
  for (int i = 0; i < k; ++i) {
    unsigned f[6];
    for (int j = 0; j < 6; ++j) f[j] = a[(i * 6 + j) * 32 + threadIdx.x];
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(f[0]), "r"(f[1]), "r"(f[2]), "r"(f[3]), "r"(f[4]), "r"(f[5]));
  }
  for (int j = 0; j < 4; ++j) c[j * 32 + threadIdx.x] = d[j];
}
extern "C" __global__ void divides(const float* x, float* y, int n) {
  float s = 0;
#pragma unroll 1
  for (int i = 0; i < n; ++i) s += x[threadIdx.x] / (x[i] + 1);
  y[threadIdx.x] = s;
}
extern "C" __global__ void either(const int* flag, float* y) {
  float v = y[threadIdx.x];
  if (flag[blockIdx.x]) {
    for (int i = 0; i < 3; ++i) v = __expf(v) + __shfl_xor_sync(~0u, v, 1 << i);
  } else {
    __syncthreads();
    v = sqrtf(v);
  }
  y[threadIdx.x] = v;
}
"""


@pytest.fixture(scope="module")
def ptx() -> str:
    return toolchain.compile_ptx(SOURCE, "sm_80").text


@pytest.mark.parametrize("target", TARGETS)
def test_every_instruction_is_known_and_every_block_is_reached(ptx, target):
    functions = sass.load(ptx, target)
    assert set(functions) == {"sum", "tree", "nested", "mma_loop", "divides", "either"}
    for function in functions.values():
        assert function.target == target
        unknown = {i.opcode for i in function.instructions if i.pipe == "unknown"}
        assert not unknown
        seen, stack = set(), [0]
        while stack:
            block = stack.pop()
            if block not in seen:
                seen.add(block)
                stack += function.blocks[block].successors + function.blocks[block].calls
        assert seen == set(range(len(function.blocks))), function.listing()
        for block in function.blocks:
            for succ in block.successors:
                assert block.index in function.blocks[succ].predecessors
            assert block.successors or block.exits, function.listing()


def test_lines_of_ptx_are_those_of_the_text_that_was_assembled(ptx):
    lines = ptx.splitlines()
    function = sass.load(ptx, "sm_90")["tree"]
    for i in function.instructions:
        text = lines[i.line - 1] if i.line else ""
        if i.base == "LDG":
            assert "ld.global" in text
        if i.base == "STS":
            assert "st.shared" in text
        if i.base == "BAR":
            assert "bar.sync" in text


@pytest.mark.parametrize("target", TARGETS)
def test_loops_and_their_nesting(ptx, target):
    functions = sass.load(ptx, target)
    assert [loop.depth for loop in functions["tree"].loops] == [0]
    assert max(loop.depth for loop in functions["nested"].loops) == 1
    deep = [loop for loop in functions["nested"].loops if loop.depth == 1]
    assert all(
        any(loop.blocks < outer.blocks for outer in functions["nested"].loops) for loop in deep
    )
    (loop,) = functions["mma_loop"].innermost()
    assert any(
        i.base == "HMMA" for b in loop.blocks for i in functions["mma_loop"].blocks[b].instructions
    )


@pytest.mark.parametrize("target", TARGETS)
def test_trips_of_a_tree_reduction_in_shared_memory(ptx, target):
    """8 warps; the loop runs 8 times in each; its body for ceil(o / 32) of the warps."""
    active = sum(-(-(128 >> step) // 32) for step in range(8))

    def trips(text):
        if "ld.global" in text:
            return 8
        if "ld.shared" in text and "add" in text:
            return active
        if "st.global" in text:
            return 1
        return 8 if "ret" in text else 64

    function = sass.load(ptx, target)["tree"]
    dynamic = function.dynamic(sass.executions_by_hand(ptx, "tree", trips), 8)
    (loop,) = function.loops
    assert dynamic.trips[loop.header] == pytest.approx(64)
    assert dynamic.main_loop == loop
    counted = dynamic.opcodes()
    assert sum(c for o, c in counted.items() if o.startswith("LDG")) == pytest.approx(8)
    assert sum(c for o, c in counted.items() if o.startswith("BAR")) == pytest.approx(8 + 64)
    assert sum(c for o, c in counted.items() if o.startswith("STG")) == pytest.approx(1)
    assert dynamic.unexplained < 0.01


@pytest.mark.parametrize("target", TARGETS)
def test_a_loop_that_ptxas_unrolls_runs_as_often_as_it_was_counted(ptx, target):
    """Whatever ptxas makes of it (four copies, a remainder of two and of one), the loads and the
    additions add up to the loop's trips."""
    free = ptx.replace('.pragma "nounroll";', "")
    function = sass.load(free, target)["sum"]
    static = sum(i.base == "LDG" for i in function.instructions)
    assert static == 7  # 4 + 2 + 1

    def trips(text):
        return 1000 * 4 if "ld.global" in text else 4

    counts = sass.executions_by_hand(free, "sum", trips)
    dynamic = function.dynamic(counts, 4)
    opcodes = dynamic.opcodes()
    assert sum(c for o, c in opcodes.items() if o.startswith("LDG")) == pytest.approx(
        4000, rel=1e-3
    )
    assert opcodes["FADD"] == pytest.approx(4000, rel=1e-3)
    (loop,) = function.loops
    # All but a remainder of at most three are done four at a time.
    assert dynamic.trips[loop.header] == pytest.approx(1000, rel=4e-3)


def test_nested_loops(ptx):
    """10 outer trips of 30 inner ones; the path for m <= 0, without an inner loop, is not taken."""

    def trips(text):
        if "fma" in text:
            return 10 * 30
        if "ld.global" in text and "st.global" in text:
            return 0
        return 10 if "st.global" in text or "ld.global" in text else 1

    function = sass.load(ptx, "sm_80")["nested"]
    dynamic = function.dynamic(sass.executions_by_hand(ptx, "nested", trips), 1)
    inner = function.innermost()
    assert sum(dynamic.total(loop.blocks) for loop in inner) > 0.5 * dynamic.total()
    stores = sum(c for o, c in dynamic.opcodes().items() if o.startswith("STG"))
    loads = sum(c for o, c in dynamic.opcodes().items() if o.startswith("LDG"))
    assert (stores, loads) == (pytest.approx(10, rel=0.02), pytest.approx(310, rel=0.02))


@pytest.mark.parametrize("target", TARGETS)
def test_matrix_instructions_their_shape_and_operations(ptx, target):
    def trips(text):
        return 100 if "mma.sync" in text else 1

    function = sass.load(ptx, target)["mma_loop"]
    (hmma,) = (i for i in function.instructions if i.base == "HMMA")
    assert hmma.tensor_shape == (16, 8, 16) and hmma.tensor_flops == 2 * 16 * 8 * 16
    assert sass.tensor_kind(hmma) == "bf16"
    dynamic = function.dynamic(sass.executions_by_hand(ptx, "mma_loop", trips), 1)
    assert dynamic.tensor_flops() == {"bf16": pytest.approx(100 * 4096)}
    # One lane's SASS for each trip: 6 loads, one mma, addresses and the loop.
    per_trip = dynamic.per_item(100 * 32, dynamic.main_loop.blocks)
    assert 8 <= per_trip <= 30
    assert "SASS for 8 weights" in dynamic.report(items=100)


def test_an_mma_that_old_hardware_does_in_two_is_counted_once():
    source = SOURCE.replace("m16n8k16", "m16n8k16").replace("bf16.bf16", "f16.f16")
    old = toolchain.compile_ptx(source, "sm_80").text.replace(".target sm_80", ".target sm_80")
    function = sass.load(old, "sm_80")["mma_loop"]
    assert sass.tensor_kind(next(i for i in function.instructions if i.base == "HMMA")) == "fp16"


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_120"])
def test_a_subroutine_runs_as_often_as_it_is_called(ptx, target):
    """Division's slow path is called; PTX knows nothing of it, so it is not counted as run."""
    function = sass.load(ptx, target)["divides"]
    assert any(block.calls for block in function.blocks)

    def trips(text):
        return 50 if "div.rn" in text else 1

    dynamic = function.dynamic(sass.executions_by_hand(ptx, "divides", trips), 1)
    xu = sum(c for o, c in dynamic.opcodes().items() if o.startswith("MUFU.RCP"))
    assert 50 <= xu <= 101
    calls = [b for b in function.blocks if b.calls]
    for block in calls:
        for entry in block.calls:
            assert dynamic.trips[entry] <= dynamic.trips[block.index] + 1e-6


@pytest.mark.parametrize("taken", [True, False])
def test_only_the_side_that_was_counted_runs(ptx, taken):
    def trips(text):
        if "shfl" in text:
            return 6.0 if taken else 0.0
        if "bar.sync" in text or "sqrt" in text:
            return 0.0 if taken else 6.0
        return 6.0

    function = sass.load(ptx, "sm_80")["either"]
    dynamic = function.dynamic(sass.executions_by_hand(ptx, "either", trips), 6)
    opcodes = dynamic.opcodes()
    shuffles = sum(c for o, c in opcodes.items() if o.startswith("SHFL"))
    barriers = sum(c for o, c in opcodes.items() if o.startswith("BAR"))
    assert (shuffles, barriers) == pytest.approx((18, 0) if taken else (0, 6))


def test_counts_that_cannot_be_are_refused(ptx):
    function = sass.load(ptx, "sm_80")["sum"]
    with pytest.raises(ValueError, match="negative"):
        function.dynamic({1: -1.0}, 1)
    with pytest.raises(ValueError, match="positive"):
        function.dynamic({}, 0)


def test_listings_that_are_none_are_refused():
    with pytest.raises(ValueError, match="no code"):
        sass.parse("\t.target\tsm_80\n")
    broken = "\t.target\tsm_80\n.text.k:\n        /*0000*/   ??? what ;\n"
    with pytest.raises(ValueError, match=r"cannot read this line of SASS.*\?\?\?"):
        sass.parse(broken)


def test_a_loop_left_by_a_call_of_a_label_is_a_loop():
    """ptxas ends far loops so: nothing returns, and what follows is no function of its own."""
    code = ["S2R R0, SR_TID.X", "IADD3 R0, R0, 0x1, RZ", "@P0 CALL.REL.NOINC `(.L_x_1)",
            "BRA `(.L_x_0)", "EXIT"]  # fmt: skip
    labels = {1: ".L_x_0", 4: ".L_x_1"}
    listing = "\t.target\tsm_80\n.text.k:\n"
    for i, text in enumerate(code):
        listing += f"{labels[i]}:\n" if i in labels else ""
        listing += f"        /*{16 * i:04x}*/   {text} ;\n"
    function = sass.parse(listing)["k"]
    (loop,) = function.loops
    assert [len(b.instructions) for b in function.blocks] == [1, 2, 1, 1]
    assert loop.header == 1 and loop.blocks == {1, 2}
    assert not any(block.calls for block in function.blocks)


@pytest.mark.parametrize(("target", "opcode"), [("sm_80", "HMMA"), ("sm_90", "HGMMA")])
def test_tritons_matrix_product_on_each_generation(target, opcode):
    triton = pytest.importorskip("triton")
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    def tile(a, b, c, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
        rows, cols, ks = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
        total = tl.zeros((BM, BN), tl.float32)
        for k in range(0, K, BK):
            x = tl.load(a + rows[:, None] * K + (k + ks)[None, :])
            y = tl.load(b + (k + ks)[:, None] * BN + cols[None, :])
            total = tl.dot(x, y, total)
        tl.store(c + rows[:, None] * BN + cols[None, :], total)

    tile.__globals__["tl"] = tl
    kinds = {"a": "*fp16", "b": "*fp16", "c": "*fp32", "K": "i32"}
    kinds.update(dict.fromkeys(("BM", "BN", "BK"), "constexpr"))
    source = ASTSource(triton.jit(tile), kinds, constexprs={"BM": 64, "BN": 64, "BK": 32})
    built = triton.compile(source, target=GPUTarget("cuda", int(target[3:]), 32))
    function = sass.load(built.asm["ptx"])["tile"]
    matrix = [i for i in function.instructions if i.pipe == "tensor"]
    assert matrix and {i.base for i in matrix} == {opcode}
    assert not {i.opcode for i in function.instructions if i.pipe == "unknown"}
    (loop,) = function.innermost()
    # Four warps, one trip: 2 · 64 · 64 · 32 operations, whichever instruction does them.
    each = sum(i.tensor_flops for b in loop.blocks for i in function.blocks[b].instructions)
    assert 4 * each == 2 * 64 * 64 * 32


@pytest.mark.parametrize(
    ("opcode", "pipe"),
    [
        ("FFMA", "fma"), ("IMAD.MOV.U32", "imul"), ("HFMA2.BF16_V2", "half"), ("PRMT", "alu"),
        ("LOP3.LUT", "alu"), ("MUFU.EX2", "xu"), ("LDG.E.128.CONSTANT", "lsu"), ("SHFL.IDX", "lsu"),
        ("HMMA.16816.F32.BF16", "tensor"), ("HGMMA.64x128x16.F32.BF16", "tensor"),
        ("UIADD3", "uniform"), ("BRA", "control"), ("LDC.64", "const"), ("DFMA", "fp64"),
        ("NEWOP.X", "unknown"),
    ],
)  # fmt: skip
def test_pipes(opcode, pipe):
    assert sass.pipe_of(opcode) == pipe


def test_registers_read_and_written():
    def make(opcode, *operands, predicate=""):
        return sass.Instruction(0, opcode, operands, predicate).registers

    assert make("FFMA", "R1", "R2", "R3", "R4") == ({"R2", "R3", "R4"}, {"R1"})
    assert make("LDG.E.128", "R4", "[R2.64]") == ({"R2", "R3"}, {"R4", "R5", "R6", "R7"})
    reads, writes = make("STG.E.64", "[R2.64]", "R6")
    assert reads == {"R2", "R3", "R6", "R7"} and not writes
    reads, writes = make("ISETP.GE.AND", "P0", "PT", "R3", "R5", "PT", predicate="@!P1")
    assert reads == {"R3", "R5", "P1"} and writes == {"P0"}
    reads, writes = make("HMMA.16816.F32.BF16", "R0", "R4", "R8", "R0")
    assert writes == {f"R{i}" for i in range(4)}
    assert reads == {f"R{i}" for i in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)}
    assert make("IMAD.WIDE", "R2", "R4", "R5", "c[0x0][0x160]")[1] == {"R2", "R3"}
    assert make("LDSM.16.M88.4", "R8", "[R4]")[1] == {"R8", "R9", "R10", "R11"}
