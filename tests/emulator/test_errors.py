"""What is refused, and in which words."""

from __future__ import annotations

import numpy as np
import pytest
from ptx_kernels import kernel_text

from qlora_kernels.emulator import KernelError, LaunchError, Module, PtxError, emulate, toolchain

pytest.importorskip("qlora_kernels.emulator.engine").library()

GOOD = kernel_text(
    """.reg .b64 %rd<4>; .reg .b32 %r<4>; ld.param.u64 %rd1, [p0]; ld.param.u32 %r2, [p1];
    mov.u32 %r1, %tid.x; mad.wide.u32 %rd2, %r1, 4, %rd1; st.global.u32 [%rd2], %r2; ret;""",
    ".param .u64 p0, .param .u32 p1",
)


def bad(body: str, **options) -> str:
    text = kernel_text(
        f".reg .b32 %r<4>; .reg .b64 %rd<4>; .reg .pred %p<2>;\n{body}\nret;", ".param .u64 p0"
    )
    with pytest.raises(PtxError) as caught:
        Module.from_ptx(text).kernel().program  # noqa: B018
    return str(caught.value)


@pytest.mark.parametrize(
    "text,words",
    [
        ("", "empty"),
        ("hello", "expected a directive"),
        (".version 9.0\n", "no .target"),
        ("int main() {}", "expected"),
        (GOOD[: len(GOOD) // 2], "PTX line"),
        (GOOD.replace("ret;", "ret"), "found }"),
        (GOOD.replace(".param .u32 p1", ".param .u37 p1"), "u37"),
        (GOOD.replace("%tid.x;", "%tid.x"), "PTX line 8:25"),
        (GOOD.replace("mov.u32", "mov.u32 `"), "unexpected character"),
        (GOOD.replace(".address_size 64", ".address_size 32"), "64-bit"),
    ],
)
def test_what_is_not_ptx(text: str, words: str) -> None:
    with pytest.raises(PtxError) as caught:
        Module.from_ptx(text)
    assert words in str(caught.value)


def test_every_truncation_is_an_error_or_has_no_kernel() -> None:
    for end in range(0, len(GOOD) - 2, 3):
        try:
            module = Module.from_ptx(GOOD[:end])
        except PtxError:
            continue
        assert not module.kernels


@pytest.mark.parametrize(
    "body,words",
    [
        (
            "frobnicate.u32 %r1, %r2;",
            "frobnicate.u32: an instruction that the emulator does not know",
        ),
        ("add.fast.u32 %r1, %r2, %r3;", "modifier .fast is not known"),
        ("add.u32 %r1, %r2;", "2 operands, expected 3"),
        ("tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r1], 32;", "tcgen05"),
        ("add.u32 %r9, %r2, %r3;", "%r9 was not declared"),
        ("add.u32 %r1, %rd1, %r3;", "%rd1 is .b64, not .u32"),
        ("bra NOWHERE;", "NOWHERE"),
        ("mul.f32.bf16 %r1, %r2, %r3;", "modifier .f32"),
        ("call (%r1), nothing, (%r2);", "nothing"),
        ("mov.u32 %r1, %pm0;", "%pm0"),
        (
            "mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32 {%r1}, {%r1}, {%r1}, {%r1};",
            "shape that is not executed",
        ),
        (
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd1], "
            "16, [%r2];",
            "bulk copies",
        ),
    ],
)
def test_an_unknown_instruction_is_named_with_its_line(body: str, words: str) -> None:
    message = bad(body)
    assert words in message and "PTX line 8" in message and body.split()[0] in message


def test_recursion_is_refused() -> None:
    text = kernel_text("call f, ();\nret;", "", extra=".func f () { call f, (); ret; }")
    with pytest.raises(PtxError, match="recursion"):
        Module.from_ptx(text).kernel().program  # noqa: B018


def test_kernel_names() -> None:
    module = Module.from_ptx(GOOD + GOOD.split("64\n", 1)[1].replace(" k(", " other("))
    assert module.kernel("oth").name == "other"
    with pytest.raises(KeyError, match="no kernel missing"):
        module.kernel("missing")
    with pytest.raises(KeyError, match="2 kernels"):
        module.kernel()


@pytest.mark.parametrize(
    "args,words",
    [
        ([], "takes 2 arguments, 0 were given"),
        ([np.zeros(32, np.uint32)], "takes 2 arguments, 1 were given"),
        ([np.zeros(64, np.uint32)[::2], 1], "not contiguous"),
        ([np.zeros(32, np.uint32), np.zeros(4)], "an array was given"),
        ([np.zeros(32, np.uint32), 2**40], "does not fit"),
        ([np.zeros(32, np.uint32), "x"], "cannot be made of str"),
        ([np.zeros(32, np.uint32), b"abc"], "3 bytes were given"),
        ([1.5, 1], "a float was given"),
    ],
)
def test_arguments(args: list, words: str) -> None:
    with pytest.raises(LaunchError) as caught:
        emulate(Module.from_ptx(GOOD), 1, 32, args)
    assert words in str(caught.value)


def test_an_array_that_is_too_small_is_out_of_bounds() -> None:
    with pytest.raises(
        KernelError, match=r"p0\[16\], 0 bytes after the end of p0 of shape \(16,\)"
    ):
        emulate(Module.from_ptx(GOOD), 1, 32, [np.zeros(16, np.uint32), 1])


@pytest.mark.parametrize(
    "options,words",
    [
        ({"block": 1025}, "1024"),
        ({"grid": (1, 70000)}, "grid.y"),
        ({"grid": 0}, "positive"),
        ({"block": (1, 1, 65)}, "block.z"),
        ({"shared_bytes": 300000}, "bytes of shared memory"),
        ({"registers": 256}, "registers a thread"),
        ({"registers": 128, "block": 1024}, "1024 threads need 131072"),
        ({"device": "a100"}, "compiled for sm_90a"),
        ({"checks": ["everything"]}, "checks='everything'"),
        ({"cooperative": True, "grid": 100000}, "launched together"),
    ],
)
def test_launches_that_the_target_refuses(options: dict, words: str) -> None:
    with pytest.raises(LaunchError) as caught:
        emulate(
            Module.from_ptx(GOOD),
            **{"grid": 1, "block": 32, "args": [np.zeros(32, np.uint32), 1], **options},
        )
    assert words in str(caught.value)


def test_launch_bounds_of_the_kernel() -> None:
    module = Module.from_ptx(
        GOOD.replace(".param .u32 p1)", ".param .u32 p1)\n.maxntid 64, 1, 1\n")
    )
    with pytest.raises(LaunchError, match="compiled for at most 64"):
        emulate(module, 1, 96, [np.zeros(96, np.uint32), 1])
    exact = Module.from_ptx(GOOD.replace(".param .u32 p1)", ".param .u32 p1)\n.reqntid 64\n"))
    with pytest.raises(LaunchError, match="exactly"):
        emulate(exact, 1, 32, [np.zeros(96, np.uint32), 1])


def test_a_kernel_that_never_ends_says_where_it_loops() -> None:
    text = kernel_text("L: bra L;", "")
    with pytest.raises(KernelError, match="budget exceeded") as caught:
        emulate(Module.from_ptx(text), 1, 32, [], budget=10000)
    assert caught.value.result.reports[0].ptx_text == "L: bra L;"


LOOPS = """
.reg .b32 %r<4>; .reg .pred %p<4>; .reg .b64 %rd<2>;
.file 1 "/src" "loops.cu"
mov.u32 %r1, 0;
OUTER:
.loc 1 10 0
mov.u32 %r2, 0;
INNER:
.loc 1 12 0
add.u32 %r2, %r2, {step};
.loc 1 13 0
setp.lt.u32 %p1, %r2, 4;
@%p1 bra INNER;
.loc 1 20 0
add.u32 %r1, %r1, 1;
setp.ne.u32 %p2, %r1, {rounds};
@%p2 bra OUTER;
ret;"""


@pytest.mark.parametrize(
    "step,rounds,extent",
    [
        (1, 0, "in the loop of PTX lines 13 to 23, lines 10 to 20 of /src/loops.cu"),
        (0, 9, "in the loop of PTX lines 16 to 19, lines 12 to 13 of /src/loops.cu"),
    ],
)
def test_of_two_loops_the_one_is_named_that_does_not_end(
    step: int, rounds: int, extent: str
) -> None:
    """The inner loop of an endless outer one is only a part of it, and the reverse."""
    text = kernel_text(LOOPS.format(step=step, rounds=rounds), "")
    with pytest.raises(KernelError, match="budget exceeded") as caught:
        emulate(Module.from_ptx(text), 1, 64, [], budget=10000)
    assert extent in caught.value.result.reports[0].message


def test_a_budget_too_small_for_code_without_a_loop_names_none() -> None:
    text = kernel_text(".reg .b32 %r<2>;" + "mov.u32 %r1, %tid.x;\nbar.sync 0;\n" * 50 + "ret;", "")
    with pytest.raises(KernelError, match="budget exceeded") as caught:
        emulate(Module.from_ptx(text), 1, 64, [], budget=50)
    message = caught.value.result.reports[0].message
    assert "it was here" in message and "loop" not in message


@pytest.mark.parametrize(
    "declared,name",
    [
        ('.file 1 "/src/k.cu"', "/src/k.cu"),
        ('.file 1 "/src" "k.cu"', "/src/k.cu"),
        ('.file 1 "/src" "/else/k.cu"', "/else/k.cu"),
        ('.file 1 "/src/k.cu", 1699999999, 1234', "/src/k.cu"),
    ],
)
def test_source_files_by_one_string_or_by_folder_and_name(declared: str, name: str) -> None:
    text = kernel_text(".loc 1 7 0\nL: bra L;", "", extra=declared)
    with pytest.raises(KernelError) as caught:
        emulate(Module.from_ptx(text), 1, 32, [], budget=1000)
    (report,) = caught.value.result.reports
    assert (report.loc.file, report.line) == (name, 7)


def test_a_target_that_nvcc_does_not_know() -> None:
    missing = toolchain.available("nvcc")
    if missing:
        pytest.skip(missing)
    with pytest.raises((toolchain.ToolchainError, ValueError), match="sm_12345|12345"):
        Module.from_cuda("__global__ void k() {}", "sm_12345")
    with pytest.raises(toolchain.CompileError, match="nonsense"):
        Module.from_cuda("__global__ void k() { nonsense; }", "sm_80")
