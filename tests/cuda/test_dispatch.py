"""Which kernel a shape gets: every branch of csrc/cuda/dispatch.cpp, on every device."""

from __future__ import annotations

import ctypes
import itertools
import threading

import pytest
import torch

from qlora_kernels import cli, cuda
from qlora_kernels.emulator.devices import DEVICES, get_device

ROWS = [*range(1, 18), 32, 33, 64, 65, 128, 255, 256, 257, 512, 4096]
SHAPES = [(4096, 4096), (11008, 4096), (28672, 8192), (1024, 8192), (11, 4128), (7, 33)]
BUILT = cuda.routes()
# Rows up to which a route is taken, where benchmarks/cuda_dispatch.py ranks it first; [dX].
LAST_MMA = {"a100": (32, 16), "h100": (32, 16), "h200": (32, 16), "rtx4090": (16, 16),
            "rtx5090": (16, 16), "a6000": (16, 16), "b200": (32, 16)}  # fmt: skip
ANY = 10**6
LAST_GEMM = {"a100": (ANY, 256), "h100": (192, 128), "rtx4090": (2048, ANY), "a6000": (384, 512),
             "rtx5090": (2048, ANY), "b200": (64, 64)}  # fmt: skip


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
        for device, lasts in LAST_GEMM.items():
            last, first = lasts[backward], LAST_MMA[device][backward] + 1
            assert choose(device, first, backward=backward)[0].route == "gemm"
            plan, why = choose(device, last, backward=backward)
            assert plan.route == "gemm"
            if last == ANY:
                assert "any number of rows" in why
                continue
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


@pytest.mark.skipif("gemm" not in BUILT, reason="not compiled in")
def test_grids_end() -> None:
    """The GEMM takes as many rows and outputs as a grid has blocks, in y and z 65535."""
    rows = 65535 * 64  # of which LoRA's S is formed 64 at a time
    for device, backward in (("a100", False), ("rtx4090", True)):
        assert choose(device, rows, rank=8, backward=backward)[0].route == "gemm"
        plan, why = choose(device, rows + 1, rank=8, backward=backward)
        assert plan.route == "large" and "no gemm tile fits" in why
    assert choose("rtx4090", 64, n=65535 * 128, k=64)[0].route == "gemm"
    assert choose("rtx4090", 64, n=65535 * 128 + 8, k=64)[0].route == "large"
    widest = max(p.tile_k for p in cuda.candidates("rtx4090", 64, 64, 65536, backward=True))
    assert choose("rtx4090", 64, n=64, k=65535 * widest, backward=True)[0].route == "gemm"
    assert choose("rtx4090", 64, n=64, k=65536 * widest, backward=True)[0].route == "large"


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


# --- plans are kept -------------------------------------------------------------------------------


class Kept:
    """The library's plans of layers with nested scales, and how many of them it keeps."""

    def __init__(self, gpu) -> None:
        self.lib = cuda.bind(gpu.lib)
        self.lib.qlk_cuda_kept_plans.restype = ctypes.c_int64
        self.lib.qlk_cuda_kept_plans.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_int64)]
        i64 = ctypes.c_int64
        self.lib.qlk_cuda_plan.argtypes = [
            ctypes.c_int, ctypes.c_int, i64, i64, i64, i64, ctypes.POINTER(ctypes.c_int)
        ]  # fmt: skip
        self.lib.qlk_cuda_forget_tuned(0)  # and so what tests before have left

    def plan(self, m=64, n=4096, k=4096, rank=0, backward=False) -> tuple[int, ...]:
        fields = (ctypes.c_int * 7)()
        self.lib.qlk_cuda_plan(0, int(backward), m, n, k, rank, fields)
        return tuple(fields)

    def count(self) -> tuple[int, int]:
        hits = ctypes.c_int64()
        return self.lib.qlk_cuda_kept_plans(0, ctypes.byref(hits)), hits.value


def fields(plan: cuda.Plan) -> tuple[int, ...]:
    return (cuda._host().cuda_routes.index(plan.route), plan.tile_m, plan.tile_n, plan.tile_k,
            plan.warps, plan.stages, plan.splits)  # fmt: skip


@pytest.fixture
def kept(make_gpu) -> Kept:
    gpu = make_gpu("a100")
    if gpu.runtime is None:
        pytest.skip("asks what the emulated A100 would run")
    return Kept(gpu)


def test_a_shape_is_priced_once(kept: Kept) -> None:
    assert kept.count()[0] == 0
    hits = kept.count()[1]
    for again in range(3):
        assert kept.plan() == fields(choose("a100", 64)[0])
        assert kept.count() == (1, hits + again)
    # Whatever a choice depends on is part of the question.
    for other in ({"m": 65}, {"n": 4224}, {"k": 8192}, {"rank": 8}, {"backward": True}):
        before = kept.count()[0]
        kept.plan(**other)
        assert kept.count() == (before + 1, hits + 2), other
    backward = choose("a100", 64, backward=True)[0]
    assert kept.plan(backward=True) == fields(backward) != kept.plan()


def test_kept_plans_follow_what_is_switched_off_and_tuned(kept: Kept, make_gpu) -> None:
    gemm = kept.plan()
    assert gemm == fields(choose("a100", 64)[0])
    kept.lib.qlk_cuda_disable(0, cuda.disabled_mask("gemm"))
    assert kept.count()[0] == 0
    assert kept.plan() == fields(choose("a100", 64, disabled="gemm")[0]) != gemm
    kept.lib.qlk_cuda_disable(0, 0)
    assert kept.plan() == gemm
    tuned = next(p for p in cuda.candidates("a100", 64, 4096, 4096) if fields(p) != gemm)
    chosen = (ctypes.c_int * 7)(*fields(tuned))
    kept.lib.qlk_cuda_tuned(0, 0, 64, 4096, 4096, 0, chosen)
    assert kept.count()[0] == 0 and kept.plan() == kept.plan() == fields(tuned)
    kept.lib.qlk_cuda_forget_tuned(0)
    assert kept.count()[0] == 0 and kept.plan() == gemm
    # Another device in the same place, as between tests: nothing of the first one's is left.
    other = Kept(make_gpu("rtx4090"))
    assert other.plan(m=3) == fields(choose("rtx4090", 3)[0]) != fields(choose("a100", 3)[0])


def test_kept_plans_have_an_end(kept: Kept) -> None:
    for m in range(33, 33 + 1100):
        kept.plan(m=m, n=128, k=128)
    assert 0 < kept.count()[0] <= 1024
    assert kept.plan(m=64) == fields(choose("a100", 64)[0])


def test_kept_plans_are_for_any_thread(kept: Kept) -> None:
    want = [fields(choose("a100", 64, disabled=off)[0]) for off in ("", "gemm")]
    wrong = []

    def ask(rank: int) -> None:
        for _ in range(300):
            found = kept.plan(rank=rank)
            if found not in want:
                wrong.append(found)

    threads = [threading.Thread(target=ask, args=(i % 2,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for i in range(60):
        kept.lib.qlk_cuda_disable(0, cuda.disabled_mask("gemm" if i % 2 else ""))
    for thread in threads:
        thread.join()
    assert not wrong
    assert kept.plan() == want[1], "the last word was that the GEMM is off"
    kept.lib.qlk_cuda_disable(0, 0)
