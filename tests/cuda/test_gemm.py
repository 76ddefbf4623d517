"""The fused GEMMs, by their launchers, in the emulator, every checker on: exactly on identity
matrices, within the bound of their heads on random ones, whatever the shape or alignment."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qlora_kernels.emulator import toolchain
from qlora_kernels.emulator.devices import DEVICES, occupancy
from qlora_kernels.emulator.runtime import EmulatedRuntime

from . import gemm_launchers as launchers
from .gemm_launchers import Launcher
from .launchers import FORWARD, INPUT_GRAD, OPTIONS, SOURCES, Quantized, moved, quantized

pytestmark = pytest.mark.skipif(
    toolchain.available() is not None, reason=str(toolchain.available())
)

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
GEMMS = ("gemm_linear.cu", "gemm_linear_f16.cu", "gemm_input_grad.cu", "gemm_input_grad_f16.cu")
INVALID_CONFIGURATION = 9


def listed(name: str) -> list[tuple[int, ...]]:
    text = (SOURCES / "gemm_tiles.h").read_text()
    block = re.search(rf"{name}\[\] = \{{(.*?)\n\}};", text, re.DOTALL)
    assert block is not None
    anywhere = re.search(rf"{block.group(1).split()[-1].strip(',')} = (\{{.*?\}})", text)
    assert anywhere is not None
    found = re.findall(r"\{([\d, ]+)\}", block.group(1) + anywhere.group(1))
    return [tuple(map(int, t.split(","))) for t in found]


LINEAR, GRAD = listed("kLinearTiles"), listed("kInputGradTiles")
ANY_LINEAR, ANY_GRAD = LINEAR[-1], GRAD[-1]


@pytest.fixture(scope="module")
def library() -> Path:
    return launchers.library(*GEMMS, "gemm_lora.cu")


@pytest.fixture
def runs(library: Path) -> Callable:
    """``with runs("a100", seed=3) as launcher``: leaving it raises what a checker found."""

    @contextmanager
    def enter(device: str = "a100", **options) -> Iterator[Launcher]:
        with EmulatedRuntime(device, library=library, **options) as rt:
            yield Launcher(rt)

    return enter


def factors(n: int, k: int, rank: int, dtype: torch.dtype = F32) -> tuple[Tensor, Tensor]:
    return (torch.randn(rank, k) * 0.1).to(dtype), (torch.randn(n, rank) * 0.1).to(dtype)


def check_sum(got: Tensor, terms: list[tuple[Tensor, Tensor]], extra: int, bias=None) -> None:
    """``got`` is sum a b^T over ``terms`` (float64) + bias, within one fp32 rounding a product, and
    the rounding to its own dtype. ``extra`` are further additions: splits and bias."""
    exact = sum(a.double() @ b.double().T for a, b in terms)
    size = sum(a.double().abs() @ b.double().abs().T for a, b in terms)
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    products = sum(a.shape[1] for a, _ in terms)
    bound = (products + extra) * 2.0**-23 * size
    last = {F32: 2.0**-24, BF16: 2.0**-8, F16: 2.0**-11}[got.dtype]  # half an ulp
    bound = bound + last * (exact.abs() + bound) + (2.0**-25 if got.dtype == F16 else 0)
    worst = ((got.double() - exact).abs() / bound.clamp(min=1e-300)).max()
    assert worst <= 1, f"{worst:.3g} times the bound"


def check_linear(
    launcher: Launcher, q: Quantized, x: Tensor, tile, splits=1, *, bias=None, a=None, b=None,
    s=None, scaling=0.5, y_dtype=None,
) -> Tensor:  # fmt: skip
    run = launcher.linear(
        q, x, tile, splits, bias=bias, a=a, b=b, s=s, scaling=scaling, y_dtype=y_dtype
    )
    assert launcher.status == 0
    terms = [(x, q.dense(x.dtype))]
    if b is not None:
        if s is None:
            check_sum(run.s, [(x, a.to(x.dtype))], 256)
            s = run.s
        # What the tensor cores saw: the kernel's own S, scaled and rounded once.
        terms.append(((s.float() * scaling).to(x.dtype), b.to(x.dtype)))
    check_sum(run.out, terms, splits + 2, bias)
    return run.out


def check_grad(
    launcher: Launcher, q: Quantized, dy: Tensor, tile, splits=1, *, a=None, b=None, scaling=0.5,
    dx_dtype=None,
) -> Tensor:  # fmt: skip
    run = launcher.input_grad(q, dy, tile, splits, a=a, b=b, scaling=scaling, dx_dtype=dx_dtype)
    assert launcher.status == 0
    terms = [(dy, q.dense(dy.dtype).T)]
    if b is not None:
        check_sum(run.s / scaling, [(dy, b.to(dy.dtype).T)], 256)
        terms.append((run.s.to(dy.dtype), a.to(dy.dtype).T))
    check_sum(run.out, terms, splits + 2)
    return run.out


# --- exactly --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", LINEAR, ids=str)
def test_identity_gives_the_weight(runs, tile):
    """x = I: each product but one is 0, so y is W^T to the bit; the codebook is in no order."""
    run = tile[2] // 4
    n, k = tile[1] + 5, 2 * tile[2] if tile[4] > 1 else 77
    q = quantized(n, k, max(16, run), codebook=torch.randn(16))
    with runs() as launcher:
        y = launcher.linear(q, torch.eye(k, dtype=BF16), tile).out
    assert torch.equal(y, q.dense(BF16).T)


@pytest.mark.parametrize("tile", GRAD, ids=str)
def test_identity_gives_the_weight_of_dx(runs, tile):
    run = tile[2] // 4
    n, k = 2 * tile[1] + 8, tile[2] + 32 * (run <= 32) + 64 * (run > 32)
    if tile == ANY_GRAD:
        n, k = 37, 77
    q = quantized(n, k, max(16, run), nested=True, codebook=torch.randn(16))
    with runs() as launcher:
        dx = launcher.input_grad(q, torch.eye(n, dtype=BF16), tile, 2).out
    assert torch.equal(dx, q.dense(BF16))


# --- within the bound -----------------------------------------------------------------------------

# tile, m, n, k, blocksize, nested, rank, splits, bias
QUICK_LINEAR = [
    (LINEAR[0], 16, 128, 256, 64, False, 0, 1, False),
    (LINEAR[0], 17, 200, 576, 64, True, 8, 2, True),  # rows of tiles, ragged n, a part of a step
    (LINEAR[1], 33, 136, 512, 4096, True, 256, 1, True),  # blocks over many rows
    (LINEAR[2], 9, 72, 416, 32, True, 1, 3, False),  # k a multiple of 32 alone
    (LINEAR[3], 33, 136, 416, 128, False, 24, 2, True),
    (LINEAR[4], 255, 130, 256, 64, True, 64, 2, False),
    (LINEAR[5], 70, 136, 224, 16, True, 64, 1, True),
    (ANY_LINEAR, 17, 11, 77, 16, False, 1, 2, True),  # rows start inside bytes
    (ANY_LINEAR, 1, 11, 101, 64, True, 8, 1, False),
]
QUICK_GRAD = [
    (GRAD[0], 16, 64, 256, 64, False, 0, 1),
    (GRAD[0], 17, 200, 320, 64, True, 8, 2),
    (GRAD[1], 33, 136, 256, 4096, True, 256, 1),
    (GRAD[2], 70, 72, 576, 128, False, 24, 3),
    (GRAD[3], 255, 136, 320, 64, True, 64, 2),
    (GRAD[4], 255, 136, 416, 32, True, 64, 2),
    (GRAD[5], 33, 136, 416, 32, True, 1, 2),
    (GRAD[6], 70, 72, 224, 16, False, 64, 1),
    (ANY_GRAD, 17, 11, 77, 16, True, 1, 2),
]


@pytest.mark.parametrize("case", QUICK_LINEAR, ids=str)
def test_linear(runs, case):
    tile, m, n, k, blocksize, nested, rank, splits, biased = case
    q = quantized(n, k, blocksize, nested)
    a, b = factors(n, k, rank) if rank else (None, None)
    bias = torch.randn(n) if biased else None
    with runs() as launcher:
        check_linear(
            launcher, q, torch.randn(m, k).to(BF16), tile, splits, bias=bias, a=a, b=b,
            y_dtype=F32,
        )  # fmt: skip


@pytest.mark.parametrize("case", QUICK_GRAD, ids=str)
def test_input_grad(runs, case):
    tile, m, n, k, blocksize, nested, rank, splits = case
    q = quantized(n, k, blocksize, nested)
    a, b = factors(n, k, rank) if rank else (None, None)
    with runs() as launcher:
        check_grad(
            launcher, q, torch.randn(m, n).to(BF16), tile, splits, a=a, b=b, dx_dtype=F32
        )  # fmt: skip


@pytest.mark.parametrize("y_dtype", [BF16, F16, F32])
@pytest.mark.parametrize("splits", [1, 3])
def test_rounds_once_to_any_dtype(runs, y_dtype, splits):
    q = quantized(96, 768, nested=True)
    bias = torch.randn(96).to(BF16)
    with runs() as launcher:
        x = torch.randn(16, 768).to(BF16)
        check_linear(launcher, q, x, LINEAR[0], splits, bias=bias, y_dtype=y_dtype)
        dy = torch.randn(16, 96).to(BF16)
        check_grad(launcher, q, dy, GRAD[0], splits, dx_dtype=y_dtype)


@pytest.mark.parametrize("lora", [F32, BF16, F16])
@pytest.mark.parametrize("given", [None, F32, BF16])
def test_factors_of_any_dtype(runs, lora, given):
    """A and B as PEFT keeps them (fp32) or not, S computed or given."""
    q = quantized(64, 256)
    a, b = factors(64, 256, 8, lora)
    x = torch.randn(5, 256).to(BF16)
    s = None if given is None else torch.randn(5, 8).to(given)
    with runs() as launcher:
        check_linear(
            launcher, q, x, LINEAR[0], a=None if given else a, b=b, s=s, y_dtype=F32
        )  # fmt: skip
        if given is None:
            check_grad(launcher, q, torch.randn(5, 64).to(BF16), GRAD[0], a=a, b=b, dx_dtype=F32)


@pytest.mark.parametrize("what", ["x", "packed", "A and B", "rank", "y"])
def test_addresses_that_are_not_aligned(runs, what):
    """A view with a storage offset: the launcher takes narrower accesses, not an error."""
    n, k, rank = 40, 256, 9 if what == "rank" else 8
    q = quantized(n, k)
    a, b = factors(n, k, rank)
    x, dy = torch.randn(16, k).to(BF16), torch.randn(16, n).to(BF16)
    if what == "x":
        x, dy = moved(x, 1), moved(dy, 3)
    elif what == "packed":
        q.packed = moved(q.packed, 1)
    elif what == "A and B":
        a, b = moved(a, 1), moved(b, 1)
    with runs() as launcher:
        launcher.out_offset = 1 if what == "y" else 0
        check_linear(launcher, q, x, LINEAR[0], 1, a=a, b=b, y_dtype=BF16)
        check_grad(launcher, q, dy, GRAD[0], 1, a=a, b=b, dx_dtype=BF16)


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("pass_", [FORWARD, INPUT_GRAD], ids=["linear", "input_grad"])
def test_any_order_of_warps_gives_the_same_bits(runs, pass_, seed):
    torch.manual_seed(0)
    q = quantized(200, 576, nested=True)
    a, b = factors(200, 576, 8)
    results = []
    for s in (0, seed):
        with runs(seed=s) as launcher:
            if pass_ == FORWARD:
                torch.manual_seed(1)
                x = torch.randn(17, 576).to(BF16)
                results.append(launcher.linear(q, x, LINEAR[0], 2, a=a, b=b, y_dtype=F32).out)
            else:
                torch.manual_seed(1)
                dy = torch.randn(17, 200).to(BF16)
                results.append(launcher.input_grad(q, dy, GRAD[0], 2, a=a, b=b).out)
    assert torch.equal(*results)


def test_an_infinite_or_nan_scale_stays_where_it_is(runs):
    """Rows and columns that tiles read beyond the weight must not spread it."""
    q = quantized(40, 320, 64)
    q.absmax[5 * 5 + 4], q.absmax[-1] = float("inf"), float("nan")
    x, dy = torch.randn(16, 320).to(BF16), torch.randn(16, 40).to(BF16)
    with runs() as launcher:
        y = launcher.linear(q, x, LINEAR[0]).out
        dx = launcher.input_grad(q, dy, GRAD[0]).out
    bad_rows = torch.zeros(40, dtype=torch.bool)
    bad_rows[[5, 39]] = True
    assert torch.equal(~y.isfinite().all(0), bad_rows)
    bad_columns = torch.zeros(320, dtype=torch.bool)
    bad_columns[256:] = True
    assert torch.equal(~dx.isfinite().all(0), bad_columns)


# --- what a launcher refuses ----------------------------------------------------------------------


def test_refuses_what_was_not_compiled(runs):
    q = quantized(64, 256, 32)
    with runs(strict=False) as launcher:
        for tile in [(16, 128, 512, 4, 2), LINEAR[0]]:  # not listed; a run longer than a block
            launcher.linear(q, torch.randn(4, 256).to(BF16), tile)
            assert launcher.status == INVALID_CONFIGURATION
        launcher.input_grad(q, torch.randn(4, 64).to(BF16), GRAD[0])
        assert launcher.status == INVALID_CONFIGURATION


# --- what they cost -------------------------------------------------------------------------------


def counted(launches: list, opcodes: str, what: str) -> int:
    total = 0
    for launch in launches:
        for row, i in zip(
            launch.counts.instructions, launch.counts.kernel.instructions, strict=True
        ):
            if re.match(opcodes, i.opcode):
                total += int(row[what])
    return total


@pytest.mark.parametrize("tile", LINEAR[:-1], ids=str)
def test_linear_reads_each_byte_once_and_without_conflicts(runs, tile):
    q = quantized(tile[1], 512, nested=True) if tile[2] // 4 > 16 else quantized(128, 512)
    m = 2 * tile[0]
    with runs() as launcher:
        run = launcher.linear(q, torch.randn(m, 512).to(BF16), tile)
    gemm = [launch for launch in run.launches if "gemm_linear<" in launch.name]
    regions = {r["name"]: r for r in gemm[0].counts.regions}
    packed = q.packed.numel() // 32
    assert regions["packed"]["distinct_read"] == packed
    assert regions["packed"]["sectors_read"] == 2 * packed  # once for each row of tiles
    assert regions["x"]["sectors_read"] == m * 512 * 2 // 32
    assert regions["y"]["sectors_written"] == m * tile[1] * 2 // 32
    for opcodes in (r"ld\.shared", r"cp\.async\.c"):
        passes = counted(gemm, opcodes, "wavefronts")
        assert passes <= 1.02 * counted(gemm, opcodes, "wavefronts_ideal")


@pytest.mark.parametrize("tile", GRAD[:-1], ids=str)
def test_input_grad_reads_each_byte_once_and_without_conflicts(runs, tile):
    q = quantized(128, tile[2], max(16, min(64, tile[2] // 4)))
    m = 2 * tile[0]
    with runs() as launcher:
        run = launcher.input_grad(q, torch.randn(m, 128).to(BF16), tile)
    gemm = [launch for launch in run.launches if "gemm_input_grad<" in launch.name]
    regions = {r["name"]: r for r in gemm[0].counts.regions}
    packed = q.packed.numel() // 32
    assert regions["packed"]["distinct_read"] == packed
    assert regions["packed"]["sectors_read"] == 2 * packed
    assert regions["dy"]["sectors_read"] == m * 128 * 2 // 32
    assert regions["dx"]["sectors_written"] == m * tile[2] * 2 // 32
    for opcodes in (r"ld\.shared", r"st\.shared", r"ldmatrix", r"cp\.async\.c"):
        passes = counted(gemm, opcodes, "wavefronts")
        assert passes <= 1.02 * counted(gemm, opcodes, "wavefronts_ideal")


def shared_bytes(tile, pass_) -> int:
    """gemm_tiles.h's, once more."""
    m, n, k, _, stages = tile
    activations, packed = 2 * m * (k if pass_ == FORWARD else n), n * k // 2
    decoded = 0 if pass_ == FORWARD else 2 * 2 * n * k
    return activations + decoded if stages == 1 else stages * (activations + packed) + decoded


@pytest.mark.full  # half a minute of ptxas each
@pytest.mark.parametrize("source", GEMMS)
@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_90"])
def test_no_spills_and_every_tile_fits_a_multiprocessor(source, target):
    ptx = toolchain.compile_ptx(SOURCES / source, "sm_80", OPTIONS)
    cubin = toolchain.assemble(ptx, target)
    pass_ = FORWARD if "linear" in source else INPUT_GRAD
    tiles = LINEAR if pass_ == FORWARD else GRAD
    gemms = {n: r for n, r in cubin.resources.items() if "gemm_" in n}
    assert len(gemms) == 2 * len(tiles)
    for name, use in gemms.items():
        assert use.spill_stores == use.spill_loads == use.stack == use.local == 0, name
        assert use.registers <= 255
    for tile in tiles:
        need = shared_bytes(tile, pass_)
        for key in ("a100", "h100", "rtx4090"):
            device = DEVICES["a100-80" if key == "a100" else key]
            if need <= device.sm.shared_optin - 1024:
                assert occupancy(device, 32 * tile[3], 255, need + 128).blocks >= 1
        assert need <= DEVICES["a100-80"].sm.shared_optin - 1024


# --- everything -----------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("rank", [0, 1, 8, 24, 64, 256])
@pytest.mark.parametrize("m", [1, 9, 16, 17, 33, 255])
@pytest.mark.parametrize("n, k", [(11, 101), (72, 416), (136, 576)])
def test_matrix(runs, dtype, rank, m, n, k):
    for nested in (False, True):
        for linear, grad in zip(LINEAR, GRAD, strict=True):
            run = linear[2] // 4 if linear != ANY_LINEAR else 1
            run = max(run, grad[2] // 4 if grad != ANY_GRAD else 1)
            if run > 1 and (k % run or k % 32 or n % 8):
                continue
            q = quantized(n, k, max(16, run), nested)
            a, b = factors(n, k, rank) if rank else (None, None)
            bias = torch.randn(n) if rank % 16 else None
            with runs() as launcher:
                x, dy = torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype)
                check_linear(launcher, q, x, linear, 1 + nested, bias=bias, a=a, b=b, y_dtype=F32)
                check_grad(launcher, q, dy, grad, 1 + nested, a=a, b=b, dx_dtype=F32)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(100))
def test_a_hundred_orders(runs, seed):
    test_any_order_of_warps_gives_the_same_bits(runs, FORWARD if seed % 2 else INPUT_GRAD, seed + 1)


@pytest.mark.full
def test_offsets_beyond_two_to_the_31(library):
    """The last CTA of more than 2^31 weights; memory that nothing touches is not there."""
    n, k = (1 << 19) + 128, 4096
    small = quantized(128, k)
    q = Quantized(
        torch.zeros(n * k // 2, dtype=torch.uint8), torch.zeros(n * k // 64), small.codebook, 64,
        (n, k),
    )  # fmt: skip
    q.packed[-small.packed.numel() :] = small.packed
    q.absmax[-small.absmax.numel() :] = small.absmax
    x = torch.randn(16, k).to(BF16)
    with EmulatedRuntime("a100", library, checks=(), blocks=[n // 128 - 1]) as rt:
        y = Launcher(rt).linear(q, x, LINEAR[0], y_dtype=F32).out
    check_sum(y[:, -128:], [(x, small.dense(BF16))], 2)
