"""Which kernel a shape gets: every branch of csrc/cuda/dispatch.cpp, on every device."""

from __future__ import annotations

import itertools

import pytest
import torch

from qlora_kernels import cli, cuda
from qlora_kernels.emulator.devices import DEVICES, get_device

ROWS = [*range(1, 18), 32, 33, 64, 65, 128, 255, 256, 257, 512, 4096]
SHAPES = [(4096, 4096), (11008, 4096), (28672, 8192), (1024, 8192), (11, 4128), (7, 33)]
BUILT = cuda.routes()
# Rows up to which a route is taken, where benchmarks/cuda_dispatch.py ranks it first; [dX].
LAST_MMA = {"a100": (32, 16), "h100": (32, 16), "h200": (32, 16), "rtx4090": (16, 16),
            "rtx5090": (16, 16), "b200": (32, 16)}  # fmt: skip
LAST_GEMM = {"a100": 256, "h100": 256, "rtx4090": 256, "b200": 64}


def choose(device="h100", m=16, n=4096, k=4096, **options):
    return cuda.choose(device, m, n, k, **options)


@pytest.mark.parametrize("device", DEVICES)
def test_every_choice_fits_the_device(device: str) -> None:
    """Shared memory, threads and code: of every plan that is chosen or offered, on every shape."""
    d = get_device(device)
    for (n, k), m, backward, rank, blocksize in itertools.product(
        SHAPES, ROWS, (False, True), (0, 24), (16, 64, 4096)
    ):
        options = {"rank": rank, "backward": backward, "blocksize": blocksize}
        dtype = torch.bfloat16 if d.capability >= (8, 0) else torch.float16
        plan, why = cuda.choose(device, m, n, k, dtype=dtype, **options)
        assert why and plan.route in BUILT
        offered = cuda.candidates(device, m, n, k, dtype=dtype, **options)
        assert plan in offered or plan.route == "gemm"
        if plan.route == "gemm":  # any number of splits; none without steps
            contraction, step = (n, plan.tile_n) if backward else (k, plan.tile_k)
            assert plan.splits == 1 or plan.splits * step <= contraction
        for p in {plan, *offered} if m in (1, 16, 256) else {plan}:
            assert 0 <= p.shared_bytes <= d.sm.shared_optin
            assert p.workspace_bytes >= 0 and p.warps * 32 <= 1024
            if p.route != "large":
                assert p.splits >= 1 and p.stages >= 1 and p.tile_n >= 1
            if d.capability < (8, 0):
                assert p.route in ("decode_simt", "large"), "mma.sync of 16 rows starts with Ampere"


def test_research_scales_have_no_fused_kernel() -> None:
    for scales in ("e8m0", "e4m3"):
        plan, why = choose(scales=scales)
        assert plan.route == "large" and "research" in why
    assert choose(scales="fp32")[0] == choose(scales="nested")[0]


def test_turing_has_no_bf16_whatever_torch_says() -> None:
    plan, why = choose("t4", dtype=torch.bfloat16)
    assert plan.route == "large" and "fp16" in why
    plan, why = choose("t4", 16, dtype=torch.float16)
    assert plan.route == "large" and "sm_75" in why


def test_fp32_is_torchs() -> None:
    plan, why = choose(m=16, dtype=torch.float32)
    assert plan.route == "large" and "fp32" in why


@pytest.mark.skipif("gemm" not in BUILT, reason="not compiled in")
def test_rows_between_decode_and_torch() -> None:
    for backward in (False, True):
        for device, last in LAST_GEMM.items():
            first = LAST_MMA[device][backward] + 1
            assert choose(device, first, backward=backward)[0].route == "gemm"
            assert choose(device, last, backward=backward)[0].route == "gemm"
            plan, why = choose(device, last + 1, backward=backward)
            assert plan.route == "large" and f"more than {last} rows" in why
        # Taller tiles for more rows, and never a run of weights that crosses blocks or rows.
        few, many = (choose(n=28672, k=8192, m=m, backward=backward)[0] for m in (33, 128))
        assert few.tile_m <= many.tile_m
    plan, _ = choose(k=4128)
    assert (plan.route == "gemm" and 4128 % (plan.tile_k // 4) == 0) or plan.stages == 1
    # Few tiles: the contraction is cut until the device is full; many rows of them: it is not.
    assert choose(m=64, n=1024, k=8192)[0].splits > 4
    assert choose("a100", m=256, n=28672, k=8192)[0].splits == 1


@pytest.mark.skipif("decode_mma" not in BUILT, reason="not compiled in")
def test_few_rows_decode() -> None:
    for device, simt in (("a100", 0), ("h100", 0), ("rtx4090", 3), ("rtx5090", 3), ("b200", 0)):
        for backward in (False, True):
            for m in range(1, LAST_MMA[device][backward] + 1):
                want = "decode_simt" if m <= simt else "decode_mma"
                assert choose(device, m, backward=backward)[0].route == want, (device, m)
    # fp32 has no tensor cores, and where those are off the next best is taken.
    for device, simt in (("a100", 1), ("rtx4090", 3)):
        assert choose(device, simt, disabled="decode_mma")[0].route == "decode_simt"
        assert choose(device, simt + 1, disabled="decode_mma")[0].route == "gemm"
        assert choose(device, simt, dtype=torch.float32)[0].route == "decode_simt"
        assert choose(device, simt + 1, dtype=torch.float32)[0].route == "large"
    # Nothing aligned: one thread a weight for some rows, then the GEMM that takes anything.
    assert choose(m=4, k=33, n=7)[0].route == "decode_simt"
    assert choose(m=5, k=33, n=7)[0].route == "gemm"
    assert choose("t4", 2, dtype=torch.float16)[0].route == "decode_simt"


def test_what_is_switched_off_is_said() -> None:
    plan, why = choose(m=64, disabled="gemm")
    assert plan.route == "large" and "gemm is switched off" in why
    assert choose(m=1, disabled="all")[0].route == "large"
    with pytest.raises(ValueError, match="there is no kernel 'gem'"):
        choose(disabled="gem")


def test_bad_questions_are_named() -> None:
    with pytest.raises(ValueError, match="did you mean"):
        choose("h101")
    with pytest.raises(ValueError, match="m must be at least 1"):
        choose(m=0)
    with pytest.raises(ValueError, match="dtype must be"):
        choose(dtype=torch.int8)
    with pytest.raises(ValueError, match="scales must be one of"):
        choose(scales="fp8")


def test_command(capsys) -> None:
    words = "kernels --device h100 -M 64 300 -N 11008 -K 4096".split()
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert "M=64    " + str(choose(m=64, n=11008)[0]) in out
    assert "M=300   large" in out and "repaid by torch's matmul" in out
    assert cli.main(["kernels", "--device", "h101"]) == 2
    if not torch.cuda.is_available():
        assert cli.main(["kernels"]) == 2
        assert "no GPU here" in capsys.readouterr().err
        assert cli.main(["tune"]) == 1
        assert "no GPU is here" in capsys.readouterr().err
