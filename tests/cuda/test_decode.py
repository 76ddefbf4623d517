"""The decode kernels, 1 to 32 rows: from their launchers to PTX, executed with every checker on.

Bounds are those that the kernels' heads derive; ``exact`` is float64 on the fp32 products of code
and scale.
"""

from __future__ import annotations

import ctypes
import functools
import re

import pytest
import torch
from torch import Tensor

from qlora_kernels.emulator import toolchain
from qlora_kernels.emulator.runtime import EmulatedRuntime
from qlora_kernels.formats import Format

from .decode_launchers import MMA, SIMT, Launcher, library
from .launchers import Quantized, moved, quantized

pytestmark = pytest.mark.skipif(
    toolchain.available("nvcc", "ptxas") is not None,
    reason=str(toolchain.available("nvcc", "ptxas")),
)
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
HALF_ULP = {BF16: 2.0**-8, F16: 2.0**-11, F32: 2.0**-24}  # of 1, the unit roundoff
E = 2.0**-24
UNSORTED = Format("unsorted", [0.3, -1.5, 7.25, 0.0, -6.0, 2.5, 1e-5, -0.125, 5.0, 0.0,
                               -3.0, 4.5, -7.0, 1.0, -2.0, 6.5])  # fmt: skip


def rounded_codes(book: Tensor, dtype: torch.dtype) -> Tensor:
    """The codes as PairTable has them: by a power of two into [1, 2), rounded, and back."""
    unit = 2.0 ** -torch.floor(torch.log2(book.abs().max()))
    return ((book * unit).to(dtype).double() / unit).float()


class Layer:
    """A layer and its inputs, random; ``check_*`` runs a launcher and holds it to its bound."""

    def __init__(
        self, m: int, n: int, k: int, rank: int = 0, *, bias: bool = False, nested: bool = True,
        dtype: torch.dtype = BF16, blocksize: int = 64, fmt: Format | str = "nf4",
        lora: torch.dtype = F32,
    ) -> None:  # fmt: skip
        torch.manual_seed(1009 * m + 31 * n + k + rank)
        self.q = quantized(n, k, blocksize, nested, fmt)
        self.x, self.dy = torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype)
        self.bias = torch.randn(n).to(lora) if bias else None
        self.a = (torch.randn(rank, k) / k**0.5).to(lora) if rank else None
        self.b = torch.randn(n, rank).to(lora) if rank else None
        self.scaling = 0.5

    def code_slack(self, route: int, weight_sum: Tensor) -> Tensor:
        """What f16 loses of codes below 2^-14 of the largest, where codes are rounded."""
        if route != MMA or self.x.dtype != F16:
            return torch.zeros(())
        return 2.0**-25 * 2 * self.q.codebook.abs().max() * weight_sum

    def check_forward(
        self, route: int = MMA, device: str = "a100", seed: int = 0, s: Tensor | None = None,
        y_dtype: torch.dtype | None = None, sms: int | None = 3,
    ) -> Tensor:  # fmt: skip
        with EmulatedRuntime(device, library(), seed=seed) as rt:
            run = Launcher(rt).linear(
                self.q, self.x, route, bias=self.bias, a=None if s is not None else self.a,
                b=self.b, s=s, scaling=self.scaling, y_dtype=y_dtype, sms=sms,
            )  # fmt: skip
        self.clean(run)
        w, x, k = self.q.dense().double(), self.x.double(), self.q.shape[1]
        u = HALF_ULP[self.x.dtype] if route == MMA else 0.0
        size = x.abs() @ w.abs().T
        slack = (u + (k + 80) * E) * size
        per_block = self.q.scales().double().repeat_interleave(self.q.blocksize)
        scales = per_block[: w.numel()].view(w.shape)
        slack = slack + self.code_slack(route, x.abs() @ scales.T)
        exact = x @ w.T
        if self.bias is not None:
            exact += self.bias.double()
        if self.b is not None:
            b, rank = self.b.double(), self.b.shape[1]
            if s is not None:
                lora_s, s_slack = s.double(), torch.zeros(())
            else:
                a = self.a.double()
                lora_s = x @ a.T
                s_slack = (u + (k + 80) * E) * (x.abs() @ a.abs().T)
                assert ((run.s.double() - lora_s).abs() <= s_slack).all()
                slack += self.scaling * s_slack @ b.abs().T
            exact += self.scaling * lora_s @ b.T
            slack += self.scaling * (rank + 8) * E * (lora_s.abs() @ b.abs().T)
        return self.close(run.out, exact, slack)

    def check_input_grad(
        self, route: int = MMA, device: str = "a100", seed: int = 0, sms: int | None = 3
    ) -> Tensor:
        with EmulatedRuntime(device, library(), seed=seed) as rt:
            run = Launcher(rt).input_grad(
                self.q, self.dy, route, a=self.a, b=self.b, scaling=self.scaling, sms=sms
            )
        self.clean(run)
        w, dy, n = self.q.dense().double(), self.dy.double(), self.q.shape[0]
        u = HALF_ULP[self.dy.dtype] if route == MMA else 0.0
        slack = (2 * u + u * u + (n + 80) * E) * (dy.abs() @ w.abs())
        per_block = self.q.scales().double().repeat_interleave(self.q.blocksize)
        scales = per_block[: w.numel()].view(w.shape)
        slack = slack + self.code_slack(route, dy.abs() @ scales)
        if route == MMA and self.dy.dtype == F16:  # dy * scale below 2^-14
            slack += n * 2.0**-25 * self.q.codebook.abs().max()
        exact = dy @ w
        if self.b is not None:
            a, b, rank = self.a.double(), self.b.double(), self.b.shape[1]
            ds = self.scaling * dy @ b
            s_slack = self.scaling * (u + (n + 80) * E) * (dy.abs() @ b.abs())
            assert ((run.s.double() - ds).abs() <= s_slack).all()
            exact += ds @ a
            slack += s_slack @ a.abs() + (rank + 8) * E * (ds.abs() @ a.abs())
        return self.close(run.out, exact, slack)

    @staticmethod
    def clean(run) -> None:
        for launch in run.launches:
            assert not launch.reports, f"{launch.name}: {launch.reports[0]}"

    @staticmethod
    def close(out: Tensor, exact: Tensor, slack: Tensor) -> Tensor:
        slack = slack + HALF_ULP[out.dtype] * (exact.abs() + slack) + 1e-30
        off = (out.double() - exact).abs() - slack
        assert (off <= 0).all(), f"{off.max()} beyond a bound of {slack.flatten()[off.argmax()]}"
        return out


# (m, n, k, rank, options). N = 11 and K of an odd number of blocks; several passes of 64 rows.
CASES = [
    (1, 11, 1024, 0, {}),
    (1, 40, 576, 16, {"bias": True}),
    (2, 70, 192, 0, {"nested": False}),
    (3, 36, 2112, 8, {"dtype": F16}),
    (4, 200, 128, 1, {"lora": BF16}),
    (5, 20, 320, 64, {"fmt": "fp4"}),
    (6, 12, 256, 24, {"blocksize": 128, "lora": F16, "bias": True}),
    (7, 33, 256, 0, {"blocksize": 4096}),
    (8, 64, 1088, 16, {"fmt": UNSORTED}),
    (9, 52, 640, 256, {}),
    (15, 100, 448, 24, {"dtype": F16, "nested": False, "bias": True, "fmt": UNSORTED}),
]
# More rows than dX's kernel, whose last case is the first of these, takes.
WIDE_CASES = [
    (16, 36, 192, 8, {"bias": True}),
    (17, 70, 448, 24, {"nested": False, "lora": BF16}),
    (24, 130, 256, 0, {"dtype": F16, "fmt": UNSORTED}),
    (25, 20, 320, 0, {"blocksize": 128}),
    (32, 76, 576, 256, {"bias": True}),
]
# One thread a weight: odd k, blocks that cross rows, small blocks, n that no vector of dy has.
ODD_CASES = [
    (1, 11, 4160 - 32, 8, {}),
    (4, 7, 33, 0, {"bias": True}),
    (9, 6, 129, 3, {"blocksize": 16, "dtype": F16}),
    (15, 5, 64, 16, {"blocksize": 32, "nested": False, "fmt": UNSORTED}),
    (2, 3, 1, 1, {}),
]
WIDE_ODD_CASE = (32, 7, 129, 3, {"blocksize": 16})


def names(case: tuple) -> str:
    m, n, k, rank, options = case
    return f"m{m}-n{n}-k{k}-r{rank}" + "".join(
        f"-{getattr(v, 'name', str(v)).removeprefix('torch.')}" for v in options.values()
    )


@pytest.mark.parametrize("case", [*CASES, *WIDE_CASES, *ODD_CASES, WIDE_ODD_CASE], ids=names)
def test_forward_on_tensor_cores(case):
    m, n, k, rank, options = case
    Layer(m, n, k, rank, **options).check_forward(MMA)


@pytest.mark.parametrize("case", [*CASES, WIDE_CASES[0], *ODD_CASES], ids=names)
def test_input_grad_on_tensor_cores(case):
    m, n, k, rank, options = case
    Layer(m, n, k, rank, **options).check_input_grad(MMA)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[2], CASES[3], ODD_CASES[1]], ids=names)
def test_forward_by_fp32_multiplies(case, dtype):
    m, n, k, rank, options = case
    Layer(m, n, k, rank, **{**options, "dtype": dtype}).check_forward(SIMT)


@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize("case", [CASES[1], ODD_CASES[2]], ids=names)
def test_input_grad_by_fp32_multiplies(case, dtype):
    m, n, k, rank, options = case
    Layer(m, n, k, rank, **{**options, "dtype": dtype}).check_input_grad(SIMT)


# --- identity matrices: exact -------------------------------------------------------------------


def one_hot(m: int, length: int, first: int, dtype: torch.dtype) -> Tensor:
    x = torch.zeros(m, length, dtype=dtype)
    x[torch.arange(m), (first + torch.arange(m)) % length] = 1
    return x


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("nested", [False, True])
def test_identity_gives_the_weights(dtype, nested):
    """Every column of W, in fp32: codes in the dtype times the scale, rounded once."""
    q = quantized(200, 192, nested=nested, fmt="nf4")  # 600 blocks: three groups of scales
    for route in (MMA, SIMT):
        book = rounded_codes(q.codebook, dtype) if route == MMA else q.codebook
        rows = 32 if route == MMA else 3
        for first in range(0, 192, rows if route == MMA else 61):
            with EmulatedRuntime("h100", library()) as rt:
                x = one_hot(rows, 192, first, dtype)
                y = Launcher(rt).linear(q, x, route, y_dtype=F32, sms=2).out
            columns = (first + torch.arange(rows)) % 192
            assert torch.equal(y.double(), q.dense(codebook=book)[:, columns].double().T)


def test_identity_is_dequantization_where_the_codes_fit():
    book = torch.tensor([-8.0, 3, 1, 0, 7, -7, 5, 2, -1, 4, -3, 6, -6, -2, -5, -4])
    q = quantized(20, 128, nested=True, codebook=book)
    with EmulatedRuntime("h100", library()) as rt:
        y = Launcher(rt).linear(q, one_hot(15, 128, 60, BF16), MMA).out
    assert torch.equal(y.float(), q.dense().to(BF16).float()[:, 60:75].T)


def test_identity_of_dy_gives_the_weights():
    q = quantized(16, 64 * 40, nested=True)  # 640 blocks
    scales = q.scales().to(BF16).repeat_interleave(64).view(q.shape)
    codes = quantized_codes(q, rounded_codes(q.codebook, BF16))
    with EmulatedRuntime("h100", library()) as rt:
        dx = Launcher(rt).input_grad(q, one_hot(15, 16, 0, BF16), MMA, dx_dtype=F32).out
    assert torch.equal(dx.double(), (codes.double() * scales.double())[:15])


def quantized_codes(q: Quantized, book: Tensor) -> Tensor:
    nibbles = torch.stack([q.packed >> 4, q.packed & 15], 1).view(q.shape)
    return book[nibbles.long()]


# --- what else a caller may do ------------------------------------------------------------------


@pytest.mark.parametrize("rank", [5, 300])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_given_s(rank, dtype):
    layer = Layer(3, 20, 128, rank)
    layer.check_forward(MMA, s=torch.randn(3, rank).to(dtype))


def test_large_rank():
    Layer(3, 20, 128, 300).check_forward(MMA)
    Layer(3, 20, 128, 300).check_input_grad(MMA)
    Layer(2, 20, 128, 300, dtype=F32).check_forward(SIMT)


@pytest.mark.parametrize("what", ["x", "packed", "a", "b", "bias"])
def test_unaligned_pointers(what):
    layer = Layer(3, 20, 192, 4, bias=True)
    if what == "packed":
        layer.q.packed = moved(layer.q.packed, 1)
    elif what == "x":
        layer.x, layer.dy = moved(layer.x, 1), moved(layer.dy, 1)
    else:
        setattr(layer, what, moved(getattr(layer, what), 1))
    layer.check_forward(MMA)
    layer.check_input_grad(MMA)
    layer.check_forward(SIMT)


@pytest.mark.parametrize("y_dtype", [F32, F16])
def test_results_of_another_type(y_dtype):
    Layer(2, 20, 192, 4).check_forward(MMA, y_dtype=y_dtype)


def test_no_more_rows_than_were_compiled_and_no_fp32_on_tensor_cores():
    layer = Layer(2, 20, 128)
    with EmulatedRuntime("h100", library()) as rt:
        launcher = Launcher(rt)
        with pytest.raises(RuntimeError, match="cudaError 9"):  # invalid configuration
            launcher.linear(layer.q, torch.zeros(33, 128, dtype=BF16), MMA)
        with pytest.raises(RuntimeError, match="cudaError 9"):
            launcher.linear(layer.q, torch.zeros(2, 128), MMA)  # fp32 on tensor cores
        with pytest.raises(RuntimeError, match="cudaError 9"):
            launcher.linear(layer.q, torch.zeros(17, 128, dtype=BF16), SIMT)
        with pytest.raises(RuntimeError, match="cudaError 9"):
            launcher.input_grad(layer.q, torch.zeros(17, 20, dtype=BF16), MMA)


# --- orders, graphs, devices --------------------------------------------------------------------


def same_in_any_order(orders: int) -> None:
    layer = Layer(9, 70, 320, 8, bias=True)
    small = Layer(2, 40, 1088, 8)
    for run in (layer.check_forward, layer.check_input_grad,
                functools.partial(small.check_forward, SIMT)):  # fmt: skip
        first = run(seed=0)
        for seed in range(1, orders):
            assert torch.equal(first, run(seed=seed))


def test_the_same_in_any_order():
    same_in_any_order(3)


@pytest.mark.full
def test_the_same_in_a_hundred_orders():
    same_in_any_order(100)


def test_a_captured_graph_replays():
    layer = Layer(3, 40, 256, 8)
    with EmulatedRuntime("h100", library(), order="deferred") as rt:
        lib, launcher = rt.lib, Launcher(rt)
        stream, graph, ready = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
        assert lib.cudaStreamCreate(ctypes.byref(stream)) == 0
        assert lib.cudaStreamBeginCapture(stream, 0) == 0
        forward = launcher.linear(
            layer.q, layer.x, a=layer.a, b=layer.b, stream=stream.value, sms=2
        )
        back = launcher.input_grad(
            layer.q, layer.dy, a=layer.a, b=layer.b, stream=stream.value, sms=2
        )
        assert lib.cudaStreamEndCapture(stream, ctypes.byref(graph)) == 0
        assert lib.cudaGraphInstantiate(ctypes.byref(ready), graph, 0) == 0
        results = []
        for _ in range(2):
            assert lib.cudaGraphLaunch(ready, stream) == 0
            assert lib.cudaStreamSynchronize(stream) == 0
            results.append((forward.out.clone(), back.out.clone()))
    for one, other in zip(*results, strict=True):
        assert torch.isfinite(one.float()).all() and torch.equal(one, other)
    layer.scaling = 1.0
    assert torch.equal(results[0][0], layer.check_forward(sms=2))


def test_one_block_has_many_passes_and_bands():
    layer = Layer(4, 150, 448)
    layer.check_forward(MMA, sms=1)
    layer.check_forward(SIMT if layer.x.shape[0] <= 3 else MMA, sms=100)
    layer.check_input_grad(MMA, sms=1)
    layer.check_input_grad(MMA, sms=100)


@pytest.mark.full
@pytest.mark.parametrize("case", [*CASES[:4], *ODD_CASES], ids=names)
def test_turing(case):
    m, n, k, rank, options = case
    layer = Layer(m, n, k, rank, **{**options, "dtype": F16})
    with EmulatedRuntime("t4", library("sm_75")) as rt:
        launcher = Launcher(rt)
        y = launcher.linear(layer.q, layer.x, SIMT, a=layer.a, b=layer.b, bias=layer.bias, sms=3)
        dx = launcher.input_grad(layer.q, layer.dy, SIMT, a=layer.a, b=layer.b, sms=3)
        assert all(".target sm_75" in launch.ptx for launch in y.launches + dx.launches)
    for run in (y, dx):
        Layer.clean(run)
    layer.scaling = 1.0
    assert torch.equal(y.out, layer.check_forward(SIMT))
    assert torch.equal(dx.out, layer.check_input_grad(SIMT))


@pytest.mark.full
@pytest.mark.parametrize("case", CASES, ids=names)
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("rank", [0, 1, 8, 24, 64, 256])
def test_full_matrix(case, dtype, nested, rank):
    m, n, k, _, options = case
    layer = Layer(m, n, k, rank, **{**options, "dtype": dtype, "nested": nested})
    layer.check_forward(MMA)
    layer.check_input_grad(MMA)
    layer.check_forward(SIMT)


@pytest.mark.full
def test_beyond_two_to_the_31():
    """The last rows of 4.6 billion weights, 2.3 GB: the last block of the grid alone."""
    n, k, rows = 70_000, 65_536, 4
    packed = torch.empty(n * k // 2, dtype=torch.uint8)
    packed[-rows * k // 2 :] = torch.randint(0, 256, (rows * k // 2,), dtype=torch.uint8)
    absmax = torch.empty(n * k // 64)
    absmax[-rows * k // 64 :] = torch.rand(rows * k // 64)
    book = quantized(2, 128).codebook
    q = Quantized(packed, absmax, book, 64, (n, k))
    x = torch.randn(2, k).to(BF16)
    with EmulatedRuntime("h100", library(), blocks=[n // rows - 1]) as rt:
        y = Launcher(rt).linear(q, x, MMA, sms=n // rows).out
    last = Quantized(packed[-rows * k // 2 :], absmax[-rows * k // 64 :], book, 64, (rows, k))
    w = last.dense().double()
    slack = (2.0**-8 + (k + 80) * E) * (x.double().abs() @ w.abs().T)
    Layer.close(y[:, -rows:], x.double() @ w.T, slack)


# --- what the compiler made of them -------------------------------------------------------------


def budgets(target: str) -> None:
    seen = 0
    for ptx in toolchain.extract_ptx(library()):
        for name, use in toolchain.assemble(ptx.text, target).resources.items():
            seen += 1
            assert use.spill_stores == use.spill_loads == use.local == use.stack == 0, name
            columns = re.search(r"decode_linear_mma\w*Li([234])E", name)  # 8 rows of x each
            most = {"2": 168, "3": 255, "4": 255}[columns[1]] if columns else 128  # 12, 8, 16 warps
            assert use.registers <= most, name
    assert seen > 40


def test_no_spills():
    budgets("sm_80")


@pytest.mark.full
@pytest.mark.parametrize("target", ["sm_86", "sm_89", "sm_90", "sm_100", "sm_120"])
def test_no_spills_elsewhere(target):
    budgets(target)
