"""linear_4bit, forward and backward: every instruction set and route, within derived bounds."""

from __future__ import annotations

import itertools

import pytest
import torch

from qlora_kernels import cpu, ops, reference
from qlora_kernels import functional as F4

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ISAS = cpu.available_isas() or (None,)
# Rows that reach each route: decode (1-4), tile (5-64), panels (more).
ROWS = (1, 2, 3, 4, 5, 9, 16, 17, 33, 64, 65, 130)
# [N, K]: aligned, K not a multiple of 64 (no decode route), of 32, odd, one row, blocks over rows.
SHAPES = ((128, 256), (37, 192), (11, 4160 - 32), (33, 100), (5, 123), (1, 64), (64, 576))


@pytest.fixture(params=ISAS)
def isa(request):
    if request.param is None:
        yield "torch"
        return
    with cpu.use_isa(request.param):
        yield request.param


def unit(dtype: torch.dtype) -> float:
    """Half an ulp, relative."""
    return {F32: 2.0**-24, BF16: 2.0**-8, F16: 2.0**-11}[dtype]


class Problem:
    """A layer, its exact (float64) results, and how far a kernel may be from them."""

    def __init__(self, n, k, m, *, rank=0, bias=False, blocksize=64, nested=True, fmt="nf4",
                 x_dtype=F32, lora_dtype=F32, compute=None, scaling=0.5):  # fmt: skip
        w = torch.randn(n, k) / k**0.5
        self.packed, self.state = F4.quantize_4bit(
            w, blocksize=blocksize, quant_type=fmt, compress_statistics=nested
        )
        self.compute = compute or x_dtype
        self.scaling, self.rank = scaling, rank
        self.x = torch.randn(m, k).to(x_dtype).requires_grad_()
        self.bias = torch.randn(n).to(lora_dtype).requires_grad_() if bias else None
        self.a = self.b = None
        if rank:
            self.a = (torch.randn(rank, k) / k**0.5).to(lora_dtype).requires_grad_()
            self.b = torch.randn(n, rank).to(lora_dtype).requires_grad_()
        self.w = F4.dequantize_4bit(self.packed, self.state, dtype=F32).double()

    def run(self):
        return F4.linear_4bit(
            self.x, self.packed, self.state, self.bias, self.a, self.b,
            scaling=self.scaling, compute_dtype=self.compute,
        )  # fmt: skip

    def rounded(self, t):
        return t.detach().to(self.compute).double()

    def check_forward(self, y):
        """|error| <= eps_w sum|x w| + (eps + 2 (K + r) u)(...) + the rounding of y.

        eps_w: a kernel may take weights exactly, rounded to the compute dtype, or as rounded codes
        times an exact scale. eps: S, and with bf16 matrix hardware the product before bias, are
        rounded to the compute dtype.
        """
        k, u, eps = self.x.shape[1], 2.0**-24, unit(self.compute)
        x = self.rounded(self.x)
        want, size = x @ self.w.T, x.abs() @ self.w.abs().T
        bound = (eps + 2 * (k + self.rank + 16) * u) * size
        if self.rank:
            a, b = self.rounded(self.a), self.rounded(self.b)
            want = want + self.scaling * (x @ a.T) @ b.T
            lora = self.scaling * (x.abs() @ a.abs().T) @ b.abs().T
            bound = bound + (2 * eps + 4 * (k + self.rank + 16) * u) * lora
        bound = bound + eps * want.abs()
        if self.bias is not None:
            want = want + self.rounded(self.bias)
            bound = bound + 2 * u * want.abs()
        bound = bound + unit(y.dtype) * (want.abs() + bound) + 1e-7
        assert y.dtype == self.x.dtype
        error = (y.detach().double() - want).abs()
        assert (error <= bound).all(), (error / bound).max()

    def check_backward(self, dy):
        k, u, eps = self.x.shape[1], 2.0**-24, unit(self.compute)
        n = dy.shape[1]
        g, x = self.rounded(dy), self.rounded(self.x)
        exact = {"x": (g @ self.w, g.abs() @ self.w.abs())}
        if self.bias is not None:
            exact["bias"] = (dy.double().sum(0), dy.double().abs().sum(0))
        if self.rank:
            a, b, s = self.rounded(self.a), self.rounded(self.b), self.scaling
            ds, ds_size = s * (g @ b), abs(s) * (g.abs() @ b.abs())
            exact["x"] = (exact["x"][0] + ds @ a, exact["x"][1] + ds_size @ a.abs())
            exact["a"] = (ds.T @ x, ds_size.T @ x.abs())
            exact["b"] = (s * (g.T @ (x @ a.T)), abs(s) * (g.abs().T @ (x.abs() @ a.abs().T)))
        for name, (want, size) in exact.items():
            tensor = getattr(self, name)
            got = tensor.grad
            assert got.dtype == tensor.dtype and got.shape == tensor.shape
            bound = (2 * eps + 4 * (n + k + dy.shape[0] + 16) * u) * size
            bound = bound + unit(got.dtype) * (want.abs() + bound) + 1e-7
            error = (got.double() - want).abs()
            assert (error <= bound).all(), (name, (error / bound).max())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward_at_every_number_of_rows(isa, shape):
    for m, rank in itertools.product(ROWS, (0, 5)):
        p = Problem(*shape, m, rank=rank, bias=bool(m % 2))
        y = p.run()
        p.check_forward(y)
        dy = torch.randn_like(y)
        y.backward(dy)
        p.check_backward(dy)


DTYPE_CASES = list(itertools.product((F32, BF16, F16), repeat=3))


@pytest.mark.parametrize("m", [1, 7, 70])
def test_every_mixture_of_dtypes(isa, m):
    # x, LoRA and bias, compute: what scripts really send (PEFT keeps A and B in fp32).
    for x_dtype, lora_dtype, compute in DTYPE_CASES:
        p = Problem(48, 128, m, rank=8, bias=True, x_dtype=x_dtype, lora_dtype=lora_dtype,
                    compute=compute)  # fmt: skip
        y = p.run()
        p.check_forward(y)
        dy = torch.randn_like(y)
        y.backward(dy)
        p.check_backward(dy)


@pytest.mark.parametrize("blocksize", [16, 32, 64, 128, 512, 4096])
def test_every_blocksize_format_and_scale_kind(isa, blocksize):
    for fmt, nested, m in itertools.product(("nf4", "fp4", "int4"), (True, False), (1, 6, 66)):
        p = Problem(24, 320, m, blocksize=blocksize, fmt=fmt, nested=nested, rank=3)
        y = p.run()
        p.check_forward(y)
        y.sum().backward()
        p.check_backward(torch.ones_like(y))


@pytest.mark.parametrize("rank", [1, 8, 24, 64, 256, 700])
def test_every_rank(isa, rank):
    for m in (1, 4, 20, 80):
        p = Problem(40, 128, m, rank=rank)
        y = p.run()
        p.check_forward(y)
        y.sum().backward()
        p.check_backward(torch.ones_like(y))


@pytest.mark.parametrize("k", [64, 96, 100])
def test_identity_gives_the_weight_exactly(isa, k):
    # fp32 weights and unit vectors: no rounding is left, whatever the route. 1 + K rows: panels.
    packed, state = F4.quantize_4bit(torch.randn(48, k), quant_type="nf4")
    w = F4.dequantize_4bit(packed, state)
    eye = torch.eye(k)
    for rows in (eye[:1], eye[:4], eye[:30], eye, torch.cat([eye, eye])):
        y = F4.linear_4bit(rows, packed, state)
        assert torch.equal(y, (rows @ w.T))
    dy = torch.eye(48, requires_grad=False)
    x = torch.zeros(48, k, requires_grad=True)
    F4.linear_4bit(x, packed, state).backward(dy)
    assert torch.equal(x.grad, w)


def test_leading_dimensions_and_strides(isa):
    p = Problem(32, 64, 24, rank=4, bias=True)
    y = p.run()
    for shape in ((2, 3, 4), (24, 1), (1, 24), (4, 6)):
        x = p.x.detach().view(*shape, 64)
        again = F4.linear_4bit(x, p.packed, p.state, p.bias, p.a, p.b, scaling=0.5)
        assert again.shape == (*shape, 32) and torch.equal(again.view(24, 32), y)
    wide = torch.randn(24, 128)
    got = F4.linear_4bit(wide[:, ::2], p.packed, p.state)
    assert torch.equal(got, F4.linear_4bit(wide[:, ::2].contiguous(), p.packed, p.state))
    vector = F4.linear_4bit(p.x.detach()[0], p.packed, p.state)
    assert vector.shape == (32,)
    assert F4.linear_4bit(torch.empty(0, 64), p.packed, p.state).shape == (0, 32)


def test_outside_s_is_inside_s(isa):
    for m in (1, 3, 20, 90):
        p = Problem(48, 128, m, rank=6)
        y = p.run()
        s = (p.x @ p.a.T).detach().requires_grad_()
        z = F4.linear_4bit(p.x, p.packed, p.state, None, None, p.b, s, scaling=0.5)
        torch.testing.assert_close(z, y, rtol=1e-5, atol=1e-5)
        dy = torch.randn_like(z)
        (ds,) = torch.autograd.grad(z, s, dy)
        torch.testing.assert_close(ds, 0.5 * dy @ p.b, rtol=1e-5, atol=1e-5)


def test_only_asked_gradients():
    p = Problem(32, 64, 5, rank=4, bias=True)
    for frozen in ("x", "a", "b", "bias"):
        q = Problem(32, 64, 5, rank=4, bias=True)
        getattr(q, frozen).requires_grad_(False)
        q.run().sum().backward()
        assert getattr(q, frozen).grad is None
        others = {"x", "a", "b", "bias"} - {frozen}
        assert all(getattr(q, name).grad is not None for name in others)
    with torch.no_grad():
        assert not p.run().requires_grad
    with torch.inference_mode():
        p.check_forward(p.run())


def test_gradcheck_against_finite_differences():
    # fp32 kernels: a coarse step, exact enough for products that are linear in each input.
    p = Problem(8, 64, 3, rank=2, bias=True)

    def f(x, a, b, bias):
        return F4.linear_4bit(x, p.packed, p.state, bias, a, b, scaling=0.5).double()

    inputs = (p.x, p.a, p.b, p.bias)
    assert torch.autograd.gradcheck(
        f, inputs, eps=1e-1, atol=5e-3, rtol=5e-3, nondet_tol=0.0, raise_exception=True
    )


def test_same_bits_every_time_and_whatever_the_batch():
    p = Problem(96, 256, 100, rank=8)
    first = p.run()
    assert all(torch.equal(first, p.run()) for _ in range(3))
    # A row's result does not depend on how many threads share the layer out.
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append([F4.linear_4bit(p.x[:m], p.packed, p.state) for m in (1, 4, 50)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_plain_torch_agrees(isa):
    # What any other device runs: same rounding rules, same gradients.
    for m, rank in ((1, 0), (5, 4), (70, 4)):
        p = Problem(48, 96, m, rank=rank, bias=True)
        weight = (p.packed, *p.state.weight_args())
        y, s = ops._plain_linear(p.x, *weight, 48, p.bias, p.a, p.b, None, 0.5, F32)
        p.check_forward(y)
        dy = torch.randn(m, 48)
        dx, da, db, _ = ops._plain_linear_backward(
            dy, *weight, 96, p.x, p.a, p.b, s, 0.5, F32, F32, True, rank > 0, rank > 0
        )
        p.x.grad, p.bias.grad = dx.detach(), dy.sum(0)
        if rank:
            p.a.grad, p.b.grad = da.detach(), db.detach()
        p.check_backward(dy)
    w = torch.randn(77)
    limits = reference.get_format("nf4").tensors()
    got = ops._plain_quantize(w, limits[1], limits[2], 16)
    assert all(
        torch.equal(a, b) for a, b in zip(got, reference.quantize(w, "nf4", 16), strict=True)
    )


# --- torch's machinery --------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 4])
def test_opcheck(rank):
    p = Problem(32, 64, 6, rank=rank, bias=True)
    lib = torch.ops.qlora_kernels
    weight = (p.packed, *p.state.weight_args())
    torch.library.opcheck(
        lib.linear_4bit.default, (p.x, *weight, 32, p.bias, p.a, p.b, None, 0.5, F32)
    )
    s = torch.randn(6, rank) if rank else None
    grads = (torch.randn(6, 32), *weight, 64, p.x.detach())
    lora = (p.a.detach(), p.b.detach(), s) if rank else (None, None, None)
    torch.library.opcheck(
        lib.linear_4bit_backward.default,
        (*grads, *lora, 0.5, F32, BF16, True, rank > 0, rank > 0),
    )
    torch.library.opcheck(lib.dequantize_4bit.default, (*weight, [32, 64], BF16))
    torch.library.opcheck(lib.dequantize_4bit.out, weight, {"out": torch.empty(32, 64)})
    _, thresholds, codes = reference.get_format("nf4").tensors()
    torch.library.opcheck(lib.quantize_4bit.default, (torch.randn(70), thresholds, codes, 16))
    limits = reference.nested_thresholds()
    torch.library.opcheck(lib.quantize_absmax.default, (torch.rand(300), limits, None))


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        p = Problem(64, 64, 4, rank=4)
        self.register_buffer("packed", p.packed)
        self.state = p.state
        self.a, self.b = torch.nn.Parameter(p.a.detach()), torch.nn.Parameter(p.b.detach())

    def forward(self, x):
        y = F4.linear_4bit(x, self.packed, self.state, None, self.a, self.b, scaling=0.5)
        return torch.nn.functional.silu(y) + x


def test_compile_fullgraph_forward_and_backward():
    layer = Layer()
    compiled = torch.compile(layer, fullgraph=True)
    for m in (1, 5, 70):
        x = torch.randn(m, 64, requires_grad=True)
        y, z = layer(x), compiled(x)
        torch.testing.assert_close(y, z)
        grads = torch.autograd.grad(y.sum(), (x, layer.a, layer.b))
        torch.testing.assert_close(grads, torch.autograd.grad(z.sum(), (x, layer.a, layer.b)))


def test_export():
    layer = Layer().eval()
    rows = torch.export.Dim("rows", min=2, max=512)
    program = torch.export.export(layer, (torch.randn(8, 64),), dynamic_shapes=({0: rows},))
    for m in (2, 8, 100):
        x = torch.randn(m, 64)
        torch.testing.assert_close(program.module()(x), layer(x))


def test_autocast_acts_as_linear():
    p = Problem(32, 64, 6, rank=4, bias=True)
    dense = torch.nn.Linear(64, 32)
    with torch.autocast("cpu", BF16):
        y = F4.linear_4bit(p.x, p.packed, p.state, p.bias, p.a, p.b, scaling=0.5)
        assert y.dtype == dense(p.x).dtype == BF16
    want = F4.linear_4bit(p.x.detach().to(BF16), p.packed, p.state, p.bias, p.a, p.b, scaling=0.5)
    assert torch.equal(y, want)
    y.float().sum().backward()
    assert p.x.grad.dtype == p.a.grad.dtype == p.b.grad.dtype == p.bias.grad.dtype == F32
    with torch.autocast("cpu", BF16, enabled=False):
        assert F4.linear_4bit(p.x, p.packed, p.state).dtype == F32


def test_checkpointing_and_dropout_see_the_same_mask():
    from torch.utils.checkpoint import checkpoint

    p = Problem(32, 64, 6, rank=4)

    def layer(x):
        s = torch.nn.functional.dropout(x, 0.5) @ p.a.T
        return F4.linear_4bit(x, p.packed, p.state, None, None, p.b, s, scaling=0.5)

    grads = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(3)
        grads.append(torch.autograd.grad(run(p.x).square().sum(), (p.x, p.a, p.b)))
    for plain, recomputed in zip(*grads, strict=True):
        assert torch.equal(plain, recomputed)
    # The gradient of A sees the dropped x: by formula, with the same mask.
    torch.manual_seed(3)
    dropped = torch.nn.functional.dropout(p.x.detach(), 0.5)
    dy = 2 * layer_output(p, dropped)
    torch.testing.assert_close(grads[0][1], 0.5 * (dy @ p.b).T @ dropped, rtol=1e-4, atol=1e-4)


def layer_output(p, dropped):
    s = dropped @ p.a.T
    with torch.no_grad():
        return F4.linear_4bit(p.x, p.packed, p.state, None, None, p.b, s, scaling=0.5)


def test_routes_are_a_pure_function():
    if not cpu.available_isas():
        pytest.skip("the native library is not there")
    assert [cpu.linear_route(m, 64, 64) for m in (1, 4, 5, 64, 65)] == [
        "decode", "decode", "tile", "tile", "panel",
    ]  # fmt: skip
    assert cpu.linear_route(1, 64, 96) == "tile"  # rows that do not hold whole groups of 64
    assert cpu.linear_route(1, 64, 64, blocksize=32) == "tile"  # two scales to a group


# --- bad input ----------------------------------------------------------------------------------


def test_bad_input():
    p = Problem(32, 64, 6, rank=4, bias=True)

    def run(**changes):
        args = {
            "x": p.x, "packed": p.packed, "state": p.state, "bias": p.bias, "lora_a": p.a,
            "lora_b": p.b, "lora_s": None, "compute_dtype": None, **changes,
        }  # fmt: skip
        return F4.linear_4bit(**args)

    cases = [
        (ValueError, "x has 63 features", {"x": torch.randn(6, 63)}),
        (TypeError, "x must be .* torch.float64", {"x": torch.randn(6, 64).double()}),
        (ValueError, r"bias must be \[32\], got \[31\]", {"bias": torch.randn(31)}),
        (TypeError, "bias must be .* torch.int64", {"bias": torch.ones(32, dtype=torch.int64)}),
        (ValueError, r"lora_a must be .* \[4, 64\]", {"lora_a": torch.randn(5, 64)}),
        (ValueError, r"lora_b must be \[32, rank\]", {"lora_b": torch.randn(4, 32)}),
        (ValueError, "without lora_b", {"lora_b": None}),
        (ValueError, "exactly one", {"lora_s": torch.randn(6, 4)}),
        (ValueError, "exactly one", {"lora_a": None}),
        (ValueError, "lora_s must be", {"lora_a": None, "lora_s": torch.randn(5, 4)}),
        (TypeError, "compute_dtype must be .* torch.float64", {"compute_dtype": torch.float64}),
        (ValueError, "packed weight holds", {"packed": p.packed[:-1]}),
        (ValueError, "on meta, but x is on cpu", {"lora_b": p.b.detach().to("meta")}),
    ]
    for error, message, changes in cases:
        with pytest.raises(error, match=message):
            run(**changes)
    _, flat = F4.quantize_4bit(torch.randn(4096), quant_type="nf4")
    with pytest.raises(ValueError, match=r"weight \[N, K\]"):
        run(state=flat)
