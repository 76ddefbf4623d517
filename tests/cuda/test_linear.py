"""linear_4bit and its gradients on CUDA, by every route, against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qlora_kernels import cuda, functional, reference

ROUTES = ("decode_simt", "decode_mma", "gemm", "large")


class Case:
    """A layer with random values, packed; ``x`` and ``dy`` in ``x_dtype``, A and B in ``ab``."""

    def __init__(
        self,
        m: int,
        n: int,
        k: int,
        rank: int = 0,
        bias: bool = False,
        nested: bool = True,
        compute: torch.dtype = torch.bfloat16,
        x_dtype: torch.dtype | None = None,
        ab: torch.dtype = torch.float32,
        blocksize: int = 64,
        s_given: bool = False,
        scaling: float = 0.5,
    ) -> None:
        torch.manual_seed(m * 7919 + n * 31 + k)
        self.m, self.n, self.k, self.rank, self.compute = m, n, k, rank, compute
        self.scaling = scaling
        dtype = x_dtype or compute
        self.x = torch.randn(m, k).to(dtype)
        self.dy = torch.randn(m, n).to(dtype)
        self.packed, self.state = functional.quantize_4bit(
            torch.randn(n, k) / k**0.5,
            blocksize=blocksize,
            quant_type="nf4",
            compress_statistics=nested,
        )
        self.w = functional.dequantize_4bit(self.packed, self.state, dtype=compute).double()
        self.bias = torch.randn(n) if bias else None
        self.a = torch.randn(rank, k).to(ab) / k**0.5 if rank else None
        self.b = torch.randn(n, rank).to(ab) if rank else None
        self.s = torch.randn(m, rank) if s_given else None

    def round(self, t: Tensor) -> Tensor:
        return t.to(self.compute).double()

    def forward(self, gpu) -> tuple[Tensor, Tensor]:
        a = None if self.s is not None else self.a
        lora = gpu(a, self.b, self.s)
        y, s = gpu.ops.linear_4bit(
            gpu(self.x), *gpu.weight(self.packed, self.state), self.n, gpu(self.bias), *lora,
            self.scaling, self.compute,
        )  # fmt: skip
        return y.cpu(), s.cpu()

    def check_forward(self, gpu) -> None:
        """|y - exact| within the roundings of the route that rounds most (see its bound below)."""
        y, s = self.forward(gpu)
        assert y.dtype == self.x.dtype and y.shape == (self.m, self.n)
        x, u = self.round(self.x), torch.finfo(self.compute).eps / 2
        exact = x @ self.w.T
        size = x.abs() @ self.w.abs().T
        slack = size * (self.k * 2.0**-24) + u * exact.abs()  # fp32 sums, one rounding
        if self.bias is not None:
            exact += self.round(self.bias)
        if self.b is not None:
            b = self.round(self.b)
            if self.s is not None:
                lora_s = self.round(self.s)
                s_slack = torch.zeros_like(lora_s)
                assert s.numel() == 0
            else:
                a = self.round(self.a)
                lora_s = x @ a.T
                # S is rounded once, after sums in fp32.
                s_slack = u * lora_s.abs() + self.k * 2.0**-24 * (x.abs() @ a.abs().T)
                s_slack += u * self.in_decode * (x.abs() @ a.abs().T)  # A as it is
                assert s.shape == (self.m, self.rank) and s.dtype == torch.float32
                assert ((s - lora_s).abs() <= s_slack + 1e-30).all()
            part = self.scaling * lora_s @ b.T
            slack = slack + self.scaling * (s_slack @ b.abs().T)
            slack += self.scaling * (lora_s.abs() @ b.abs().T) * (self.rank * 2.0**-24 + u)
            exact += part
            # A, B and S may also be taken as they are (decode).
            slack += 3 * u * self.scaling * self.in_decode * (self.size_of_s(x, lora_s) @ b.abs().T)
        # Decode takes codes rounded, or weights not rounded at all.
        slack = slack + 2 * u * self.in_decode * size
        # y itself is rounded before LoRA is added (large), and after; then to x's dtype.
        slack = slack + 2 * u * exact.abs()
        assert ((y.double() - exact).abs() <= slack).all(), (y.double() - exact).abs().max()

    @property
    def in_decode(self) -> bool:
        """Whether a decode kernel may run, with the numeric variants (b) and (c) of its head."""
        return self.m <= 15

    def size_of_s(self, x: Tensor, s: Tensor) -> Tensor:
        return s.abs() if self.s is not None else x.abs() @ self.round(self.a).abs().T

    def saved_s(self) -> Tensor:
        """What the forward pass keeps for the gradient of B."""
        if self.s is not None:
            return self.s
        return (self.round(self.x) @ self.round(self.a).T).float()

    def backward(self, gpu, need=(True, True, True)) -> tuple[Tensor, ...]:
        s = None
        if self.rank:
            s = (
                self.s
                if self.s is not None
                else (self.round(self.x) @ self.round(self.a).T).float()
            )
        a = None if self.s is not None else self.a
        da = need[1] and a is not None
        grads = gpu.ops.linear_4bit_backward(
            gpu(self.dy), *gpu.weight(self.packed, self.state), self.k, *gpu(self.x, a, self.b, s),
            self.scaling, self.compute, self.x.dtype, need[0], da, need[2] and self.rank > 0,
        )  # fmt: skip
        return tuple(g.cpu() for g in grads)

    def check_backward(self, gpu) -> None:
        dx, da, db, ds = self.backward(gpu)
        u, dy, x = torch.finfo(self.compute).eps / 2, self.round(self.dy), self.round(self.x)
        exact, size = dy @ self.w, dy.abs() @ self.w.abs()
        slack = size * (self.n * 2.0**-24) + u * exact.abs()
        if self.rank:
            b = self.round(self.b)
            exact_ds = self.scaling * dy @ b
            ds_slack = self.scaling * (dy.abs() @ b.abs()) * (self.n * 2.0**-24)
            ds_slack = ds_slack + u * exact_ds.abs()
            ds_slack += u * self.in_decode * self.scaling * (dy.abs() @ b.abs())  # B as it is
            assert ((ds - exact_ds).abs() <= ds_slack + 1e-30).all()
            s = (
                self.round(self.s)
                if self.s is not None
                else self.round((x @ self.round(self.a).T).float())
            )
            exact_db = self.scaling * dy.T @ s
            slack_db = self.scaling * (dy.abs().T @ s.abs()) * (self.m * 2.0**-24 + u)
            assert db.shape == self.b.shape and db.dtype == self.b.dtype
            slack_db += 2.0**-24 * (self.compute == torch.float16)  # fp16's denormals
            assert ((db - exact_db).abs() <= slack_db + 2 * u * exact_db.abs()).all()
            if self.s is None:
                a = self.round(self.a)
                exact = exact + exact_ds @ a
                slack = slack + ds_slack @ a.abs()
                slack += (exact_ds.abs() @ a.abs()) * (self.rank * 2.0**-24 + u)
                exact_da = exact_ds.T @ x
                slack_da = ds_slack.T @ x.abs() + (exact_ds.abs().T @ x.abs()) * (
                    self.m * 2.0**-24 + u
                )
                assert da.shape == self.a.shape and da.dtype == self.a.dtype
                assert ((da - exact_da).abs() <= slack_da + 2 * u * exact_da.abs()).all()
                size_ds = self.scaling * dy.abs() @ b.abs()
                slack += 3 * u * self.in_decode * (size_ds @ a.abs())
        # Decode: dy times the scale is rounded, codes are, or weights are not.
        slack = slack + 3 * u * self.in_decode * size
        slack = slack + 2 * u * exact.abs()
        assert dx.dtype == self.x.dtype and dx.shape == self.x.shape
        assert ((dx.double() - exact).abs() <= slack).all(), (dx.double() - exact).abs().max()


def only(gpu, *routes: str) -> None:
    """Switches the other routes off (`large` never is)."""
    off = sum(1 << i for i, r in enumerate(ROUTES) if r not in routes and r != "large")
    gpu.lib.qlk_cuda_disable(0, off)


COMPUTE = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("compute", [*COMPUTE, torch.float32], ids=str)
@pytest.mark.parametrize("rank", [0, 8])
def test_large(gpu, compute, rank) -> None:
    only(gpu)
    for m, n, k, bias in ((300, 11, 96, True), (17, 64, 4160 - 32, False), (1, 40, 64, True)):
        case = Case(m, n, k, rank, bias, compute=compute)
        case.check_forward(gpu)
        case.check_backward(gpu)
    assert not gpu.kernels or all("dequantize" in name for name in gpu.kernels)


@pytest.mark.parametrize("s_given", [False, True])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ab", [torch.float32, torch.bfloat16], ids=str)
def test_dtypes_of_x_a_and_b(gpu, s_given, x_dtype, ab) -> None:
    for m in (1, 5, 40):
        case = Case(m, 48, 128, 8, True, x_dtype=x_dtype, ab=ab, s_given=s_given)
        case.check_forward(gpu)
        case.check_backward(gpu)


def test_large_in_panels(gpu) -> None:
    """A weight beyond the workspace's cap is dequantized and multiplied some rows at a time."""
    only(gpu)
    case = Case(20, 50, 96, 8, True)
    whole, _ = case.forward(gpu)
    gpu.lib.qlk_cuda_workspace_cap(7 * 96 * 2)  # seven rows: 50 is no multiple of it
    before = len(gpu.kernels)
    y, _ = case.forward(gpu)
    assert not gpu.kernels or len(gpu.kernels) - before == 8
    assert torch.equal(y, whole)
    dx = case.backward(gpu)[0].double()
    exact = reference.linear_backward(
        case.round(case.dy), case.round(case.x), case.w, case.round(case.a), case.round(case.b),
        case.scaling,
    )["x"]  # fmt: skip
    # A rounding to bf16 a panel.
    scale = (case.round(case.dy).abs() @ case.w.abs()) + (
        exact - case.round(case.dy) @ case.w
    ).abs()
    assert ((dx - exact).abs() <= 10 * 2.0**-9 * scale).all()


def test_nothing_asked_and_no_rows(gpu) -> None:
    case = Case(4, 32, 64, 8)
    assert all(g.numel() == 0 for g in case.backward(gpu, (False, False, False))[:3])
    empty = Case(0, 32, 64, 8, True)
    y, s = empty.forward(gpu)
    assert y.shape == (0, 32) and s.shape == (0, 8)
    dx, da, db, ds = empty.backward(gpu)
    assert dx.shape == (0, 64) and ds.shape == (0, 8)
    assert da.shape == (8, 64) and not da.any() and db.shape == (32, 8) and not db.any()


# Odd shapes on purpose: n that no tile divides, k that is no multiple of 64, of 32, of 2.
SHAPES = [(11, 256), (129, 4160 - 32), (40, 100), (7, 33)]
ROWS = {
    "decode_simt": (1, 2, 3, 4),
    "decode_mma": (1, 2, 4, 8, 9, 15, 32),
    "gemm": (16, 17, 33, 1),
}


def launched(gpu, route: str) -> bool:
    """Whether a kernel of that route ran; a real GPU does not tell."""
    return gpu.runtime is None or any(route.split("_")[0] in name for name in gpu.kernels)


@pytest.fixture(params=[r for r in cuda.routes() if r != "large"])
def route(request, gpu) -> str:
    only(gpu, request.param)
    return request.param


@pytest.mark.parametrize("rank", [0, 1, 24])
@pytest.mark.parametrize("nested", [False, True], ids=["fp32", "nested"])
def test_fused(gpu, route, rank, nested) -> None:
    for i, m in enumerate(ROWS[route]):
        n, k = SHAPES[i % len(SHAPES)]
        case = Case(m, n, k, rank, bias=rank == 24, nested=nested)
        case.check_forward(gpu)
        case.check_backward(gpu)


@pytest.mark.parametrize("rank", [0, 24])
def test_many_rows_in_the_gemm(make_gpu, rank) -> None:
    """Where mma.sync reaches the tensor cores' peak the GEMM has no last row; gradients of A take
    dS as the kernel has rounded it."""
    gpu = make_gpu("rtx4090")
    case = Case(600, 136, 256, rank, True)  # tiles' last rows and columns are not whole
    case.check_forward(gpu)
    case.check_backward(gpu)
    if gpu.runtime is not None:
        assert any("gemm_linear" in name for name in gpu.kernels)
        assert any("gemm_input_grad" in name for name in gpu.kernels)
        assert not any("dequantize" in name for name in gpu.kernels)


@pytest.mark.full
@pytest.mark.parametrize("compute", COMPUTE, ids=str)
@pytest.mark.parametrize("rank", [0, 1, 8, 24, 64, 256])
@pytest.mark.parametrize("shape", [*SHAPES, (64, 512), (300, 192)], ids=str)
@pytest.mark.parametrize("m", [*range(1, 10), 15, 16, 17, 33, 255])
def test_fused_in_full(gpu, route, compute, rank, shape, m) -> None:
    if route.startswith("decode") and m > 15:
        pytest.skip("decode kernels take up to 15 rows")
    for nested, blocksize in ((True, 64), (False, 32), (True, 128)):
        case = Case(m, *shape, rank, True, nested, compute, blocksize=blocksize)
        case.check_forward(gpu)
        case.check_backward(gpu)


@pytest.mark.parametrize("m", [1, 4, 16])
def test_identity_exactly(gpu, route, m) -> None:
    """x of unit vectors picks rows of the dequantized weight, dy of unit vectors its columns."""
    if m not in {"decode_simt": (1,), "decode_mma": (1, 4), "gemm": (1, 4, 16)}[route]:
        pytest.skip(f"{route} does not take {m} aligned rows on this device")
    case = Case(m, 96, 128)
    w = w_dx = case.w.to(torch.bfloat16)
    if (
        route == "decode_mma"
    ):  # variant (c): the matrix is one of rounded codes; dx's scales are, too
        codebook, scales = case.state.code.bfloat16().float(), case.state.scales()
        args = (case.packed.reshape(-1), scales, codebook, 64, (96, 128), torch.bfloat16)
        w = reference.dequantize(*args)
        w_dx = reference.dequantize(args[0], scales.bfloat16().float(), *args[2:])
    for first in (0, 50, 96 - m):
        case.x = torch.eye(128)[first : first + m].to(torch.bfloat16)
        assert torch.equal(case.forward(gpu)[0], w[:, first : first + m].T)
        case.dy = torch.eye(96)[first : first + m].to(torch.bfloat16)
        assert torch.equal(case.backward(gpu)[0], w_dx[first : first + m])
    assert launched(gpu, route)


def test_same_bits_in_every_order_of_warps_and_blocks(make_gpu, request) -> None:
    """A few orders here, a hundred in the full run; results and gradients."""
    for route in (r for r in cuda.routes() if r != "large"):
        case = Case(ROWS[route][-1], 200, 512, 16, True)
        results = []
        for seed in range(3):
            gpu = make_gpu(seed=seed)
            only(gpu, route)
            results.append((*case.forward(gpu), *case.backward(gpu)))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_leading_dimensions(gpu) -> None:
    case = Case(6, 32, 64, 8)
    flat, _ = case.forward(gpu)
    case.x = case.x.view(2, 3, 64)
    y, _ = case.forward(gpu)
    assert y.shape == (2, 3, 32) and torch.equal(y.view(6, 32), flat)


def test_bad_arguments_are_named_before_anything_runs(gpu) -> None:
    case = Case(4, 32, 64, 8)
    weight = gpu.weight(case.packed, case.state)

    def call(x=case.x, weight=weight, n=32, bias=None, a=case.a, b=case.b, s=None):
        return gpu.ops.linear_4bit(gpu(x), *weight, n, *gpu(bias, a, b, s), 1.0, torch.bfloat16)

    bad = {
        "packed holds": {"n": 48},
        "bias must be": {"bias": torch.zeros(31)},
        "lora_a must be": {"a": torch.zeros(8, 63)},
        "lora_b must be": {"b": torch.zeros(31, 8)},
        "exactly one of": {"s": torch.zeros(4, 8)},
        "without lora_b": {"b": None},
        "x must be float32": {"x": case.x.double()},
        "blocksize must be": {"weight": (*weight[:3], 48, *weight[4:])},
        "absmax must be float32": {"weight": (weight[0], weight[1].short(), *weight[2:])},
    }
    for words, arguments in bad.items():
        with pytest.raises(RuntimeError, match=words):
            call(**arguments)
    assert gpu.kernels == []
