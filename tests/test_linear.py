"""linear_4bit, forward and backward: every device, instruction set and route, in derived bounds."""

from __future__ import annotations

import itertools

import pytest
import torch

from qlora_kernels import cpu, ops, reference
from qlora_kernels import functional as F4

from .conftest import runs_cuda

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# Rows that reach each route of the CPU: decode (1-4), tile (5-64), panels (more). CUDA's have tests
# of their own.
ROWS = (1, 2, 3, 4, 5, 9, 16, 17, 33, 64, 65, 130)
# [N, K]: aligned, K not a multiple of 64 (no decode route), of 32, odd, one row, blocks over rows.
SHAPES = ((128, 256), (37, 192), (11, 4160 - 32), (33, 100), (5, 123), (1, 64), (64, 576))


def unit(dtype: torch.dtype) -> float:
    """Half an ulp, relative."""
    return {F32: 2.0**-24, BF16: 2.0**-8, F16: 2.0**-11}[dtype]


class Problem:
    """A layer, its exact (float64) results, and how far a kernel may be from them."""

    def __init__(self, n, k, m, device, *, rank=0, bias=False, blocksize=64, nested=True, fmt="nf4",
                 x_dtype=F32, lora_dtype=F32, compute=None, scaling=0.5):  # fmt: skip
        self.device = device
        w = self.randn(n, k) / k**0.5
        self.packed, self.state = F4.quantize_4bit(
            w, blocksize=blocksize, quant_type=fmt, compress_statistics=nested
        )
        self.compute = compute or x_dtype
        self.scaling, self.rank = scaling, rank
        self.x = self.randn(m, k).to(x_dtype).requires_grad_()
        self.bias = self.randn(n).to(lora_dtype).requires_grad_() if bias else None
        self.a = self.b = None
        if rank:
            self.a = (self.randn(rank, k) / k**0.5).to(lora_dtype).requires_grad_()
            self.b = self.randn(n, rank).to(lora_dtype).requires_grad_()
        self.w = F4.dequantize_4bit(self.packed, self.state, dtype=F32).double()

    def randn(self, *shape):
        return torch.randn(shape, device=self.device)

    @property
    def roundings(self):
        """To the compute dtype, at most, of what a term is made of (and so of a whole sum).

        On the CPU an operand, or a sum before more is added. On CUDA, as the kernels' heads say:
        the codes or the weight, and in dX dy times its scale; LoRA's operands, which count as
        rounded here and may be taken as they are; a sum of torch's matmul, which cuBLAS may have
        made of parts that it rounded, before LoRA is added to it.
        """
        return 4 if runs_cuda(self.device) else 1

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
        k, u, eps = self.x.shape[1], 2.0**-24, self.roundings * unit(self.compute)
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
        k, u, eps = self.x.shape[1], 2.0**-24, self.roundings * unit(self.compute)
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
def test_forward_and_backward_at_every_number_of_rows(kernels, shape):
    for m, rank in itertools.product(ROWS, (0, 5)):
        p = Problem(*shape, m, kernels, rank=rank, bias=bool(m % 2))
        y = p.run()
        p.check_forward(y)
        dy = torch.randn_like(y)
        y.backward(dy)
        p.check_backward(dy)


DTYPE_CASES = list(itertools.product((F32, BF16, F16), repeat=3))


@pytest.mark.parametrize("m", [1, 7, 70])
def test_every_mixture_of_dtypes(kernels, m):
    # x, LoRA and bias, compute: what scripts really send (PEFT keeps A and B in fp32).
    for x_dtype, lora_dtype, compute in DTYPE_CASES:
        p = Problem(48, 128, m, kernels, rank=8, bias=True, x_dtype=x_dtype,
                    lora_dtype=lora_dtype, compute=compute)  # fmt: skip
        y = p.run()
        p.check_forward(y)
        dy = torch.randn_like(y)
        y.backward(dy)
        p.check_backward(dy)


@pytest.mark.parametrize("blocksize", [16, 32, 64, 128, 512, 4096])
def test_every_blocksize_format_and_scale_kind(kernels, blocksize):
    for fmt, nested, m in itertools.product(("nf4", "fp4", "int4"), (True, False), (1, 6, 66)):
        p = Problem(24, 320, m, kernels, blocksize=blocksize, fmt=fmt, nested=nested, rank=3)
        y = p.run()
        p.check_forward(y)
        y.sum().backward()
        p.check_backward(torch.ones_like(y))


@pytest.mark.parametrize("rank", [1, 8, 24, 64, 256, 700])
def test_every_rank(kernels, rank):
    for m in (1, 4, 20, 80):
        p = Problem(40, 128, m, kernels, rank=rank)
        y = p.run()
        p.check_forward(y)
        y.sum().backward()
        p.check_backward(torch.ones_like(y))


@pytest.mark.parametrize("k", [64, 96, 100])
def test_identity_gives_the_weight_exactly(kernels, k):
    # fp32 weights and unit vectors: no rounding is left, whatever the route. 1 + K rows: panels.
    packed, state = F4.quantize_4bit(torch.randn(48, k, device=kernels), quant_type="nf4")
    w = F4.dequantize_4bit(packed, state)
    eye = torch.eye(k, device=kernels)
    for rows in (eye[:1], eye[:4], eye[:30], eye, torch.cat([eye, eye])):
        y = F4.linear_4bit(rows, packed, state)
        assert torch.equal(y, (rows @ w.T))
    dy = torch.eye(48, device=kernels)
    x = torch.zeros(48, k, device=kernels, requires_grad=True)
    F4.linear_4bit(x, packed, state).backward(dy)
    assert torch.equal(x.grad, w)


def test_leading_dimensions_and_strides(kernels):
    p = Problem(32, 64, 24, kernels, rank=4, bias=True)
    y = p.run()
    for shape in ((2, 3, 4), (24, 1), (1, 24), (4, 6)):
        x = p.x.detach().view(*shape, 64)
        again = F4.linear_4bit(x, p.packed, p.state, p.bias, p.a, p.b, scaling=0.5)
        assert again.shape == (*shape, 32) and torch.equal(again.view(24, 32), y)
    wide = p.randn(24, 128)
    got = F4.linear_4bit(wide[:, ::2], p.packed, p.state)
    assert torch.equal(got, F4.linear_4bit(wide[:, ::2].contiguous(), p.packed, p.state))
    vector = F4.linear_4bit(p.x.detach()[0], p.packed, p.state)
    assert vector.shape == (32,)
    assert F4.linear_4bit(p.randn(0, 64), p.packed, p.state).shape == (0, 32)


def test_outside_s_is_inside_s(kernels):
    for m in (1, 3, 20, 90):
        p = Problem(48, 128, m, kernels, rank=6)
        y = p.run()
        s = (p.x @ p.a.T).detach().requires_grad_()
        z = F4.linear_4bit(p.x, p.packed, p.state, None, None, p.b, s, scaling=0.5)
        torch.testing.assert_close(z, y, rtol=1e-5, atol=1e-5)
        dy = torch.randn_like(z)
        (ds,) = torch.autograd.grad(z, s, dy)
        torch.testing.assert_close(ds, 0.5 * dy @ p.b, rtol=1e-5, atol=1e-5)


def test_only_asked_gradients(device):
    p = Problem(32, 64, 5, device, rank=4, bias=True)
    for frozen in ("x", "a", "b", "bias"):
        q = Problem(32, 64, 5, device, rank=4, bias=True)
        getattr(q, frozen).requires_grad_(False)
        q.run().sum().backward()
        assert getattr(q, frozen).grad is None
        others = {"x", "a", "b", "bias"} - {frozen}
        assert all(getattr(q, name).grad is not None for name in others)
    with torch.no_grad():
        assert not p.run().requires_grad
    with torch.inference_mode():
        p.check_forward(p.run())


def test_gradcheck_against_finite_differences(device):
    # fp32 kernels: a coarse step, exact enough for products that are linear in each input.
    p = Problem(8, 64, 3, device, rank=2, bias=True)

    def f(x, a, b, bias):
        return F4.linear_4bit(x, p.packed, p.state, bias, a, b, scaling=0.5).double()

    inputs = (p.x, p.a, p.b, p.bias)
    assert torch.autograd.gradcheck(
        f, inputs, eps=1e-1, atol=5e-3, rtol=5e-3, nondet_tol=0.0, raise_exception=True
    )


def test_same_bits_every_time_and_whatever_the_threads(device):
    p = Problem(96, 256, 100, device, rank=8)
    first = p.run()
    assert all(torch.equal(first, p.run()) for _ in range(3))
    # A row's result does not depend on how many threads share the layer out.
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append([F4.linear_4bit(p.x[:m], p.packed, p.state) for m in (1, 4, 50)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_plain_torch_agrees(kernels):
    # What any other device runs: same rounding rules, same gradients.
    for m, rank in ((1, 0), (5, 4), (70, 4)):
        p = Problem(48, 96, m, kernels, rank=rank, bias=True)
        weight = (p.packed, *p.state.weight_args())
        y, s = ops._plain_linear(p.x, *weight, 48, p.bias, p.a, p.b, None, 0.5, F32)
        p.check_forward(y)
        dy = p.randn(m, 48)
        dx, da, db, _ = ops._plain_linear_backward(
            dy, *weight, 96, p.x, p.a, p.b, s, 0.5, F32, F32, True, rank > 0, rank > 0
        )
        p.x.grad, p.bias.grad = dx.detach(), dy.sum(0)
        if rank:
            p.a.grad, p.b.grad = da.detach(), db.detach()
        p.check_backward(dy)
    w = p.randn(77)
    _, thresholds, codes = reference.get_format("nf4").tensors(kernels)
    got = ops._plain_quantize(w, thresholds, codes, 16)
    want = reference.quantize(w.cpu(), "nf4", 16)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(got, want, strict=True))


# --- torch's machinery --------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 4])
def test_opcheck(device, rank):
    p = Problem(32, 64, 6, device, rank=rank, bias=True)
    lib = torch.ops.qlora_kernels
    weight = (p.packed, *p.state.weight_args())
    torch.library.opcheck(
        lib.linear_4bit.default, (p.x, *weight, 32, p.bias, p.a, p.b, None, 0.5, F32)
    )
    s = p.randn(6, rank) if rank else None
    grads = (p.randn(6, 32), *weight, 64, p.x.detach())
    lora = (p.a.detach(), p.b.detach(), s) if rank else (None, None, None)
    torch.library.opcheck(
        lib.linear_4bit_backward.default,
        (*grads, *lora, 0.5, F32, BF16, True, rank > 0, rank > 0),
    )
    torch.library.opcheck(lib.dequantize_4bit.default, (*weight, [32, 64], BF16))
    torch.library.opcheck(lib.dequantize_4bit.out, weight, {"out": p.randn(32, 64)})
    _, thresholds, codes = reference.get_format("nf4").tensors(device)
    torch.library.opcheck(lib.quantize_4bit.default, (p.randn(70), thresholds, codes, 16))
    limits = reference.nested_thresholds(device)
    torch.library.opcheck(lib.quantize_absmax.default, (p.randn(300).abs(), limits, None))


class Layer(torch.nn.Module):
    def __init__(self, device):
        super().__init__()
        p = Problem(64, 64, 4, device, rank=4)
        self.register_buffer("packed", p.packed)
        self.state = p.state
        self.a, self.b = torch.nn.Parameter(p.a.detach()), torch.nn.Parameter(p.b.detach())

    def forward(self, x):
        y = F4.linear_4bit(x, self.packed, self.state, None, self.a, self.b, scaling=0.5)
        return torch.nn.functional.silu(y) + x


def test_compile_fullgraph_forward_and_backward(device):
    layer = Layer(device)
    compiled = torch.compile(layer, fullgraph=True)
    for m in (1, 5, 70):
        x = torch.randn(m, 64, device=device, requires_grad=True)
        y, z = layer(x), compiled(x)
        torch.testing.assert_close(y, z)
        grads = torch.autograd.grad(y.sum(), (x, layer.a, layer.b))
        torch.testing.assert_close(grads, torch.autograd.grad(z.sum(), (x, layer.a, layer.b)))


def test_export(device):
    layer = Layer(device).eval()
    rows = torch.export.Dim("rows", min=2, max=512)
    x = torch.randn(8, 64, device=device)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: rows},))
    for m in (2, 8, 100):
        x = torch.randn(m, 64, device=device)
        torch.testing.assert_close(program.module()(x), layer(x))


def test_autocast_acts_as_linear(device):
    p = Problem(32, 64, 6, device, rank=4, bias=True)
    dense = torch.nn.Linear(64, 32, device=device)
    with torch.autocast(device.type, BF16):
        y = F4.linear_4bit(p.x, p.packed, p.state, p.bias, p.a, p.b, scaling=0.5)
        assert y.dtype == dense(p.x).dtype == BF16
    want = F4.linear_4bit(p.x.detach().to(BF16), p.packed, p.state, p.bias, p.a, p.b, scaling=0.5)
    assert torch.equal(y, want)
    y.float().sum().backward()
    assert p.x.grad.dtype == p.a.grad.dtype == p.b.grad.dtype == p.bias.grad.dtype == F32
    with torch.autocast(device.type, BF16, enabled=False):
        assert F4.linear_4bit(p.x, p.packed, p.state).dtype == F32


def test_checkpointing_and_dropout_see_the_same_mask(device):
    from torch.utils.checkpoint import checkpoint

    p = Problem(32, 64, 6, device, rank=4)

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


def test_bad_input(device):
    p = Problem(32, 64, 6, device, rank=4, bias=True)
    where = str(p.x.device)

    def run(**changes):
        args = {
            "x": p.x, "packed": p.packed, "state": p.state, "bias": p.bias, "lora_a": p.a,
            "lora_b": p.b, "lora_s": None, "compute_dtype": None, **changes,
        }  # fmt: skip
        return F4.linear_4bit(**args)

    cases = [
        (ValueError, "x has 63 features", {"x": p.randn(6, 63)}),
        (TypeError, "x must be .* torch.float64", {"x": p.randn(6, 64).double()}),
        (ValueError, r"bias must be \[32\], got \[31\]", {"bias": p.randn(31)}),
        (TypeError, "bias must be .* torch.int64", {"bias": p.randn(32).long()}),
        (ValueError, r"lora_a must be .* \[4, 64\]", {"lora_a": p.randn(5, 64)}),
        (ValueError, r"lora_b must be \[32, rank\]", {"lora_b": p.randn(4, 32)}),
        (ValueError, "without lora_b", {"lora_b": None}),
        (ValueError, "exactly one", {"lora_s": p.randn(6, 4)}),
        (ValueError, "exactly one", {"lora_a": None}),
        (ValueError, "lora_s must be", {"lora_a": None, "lora_s": p.randn(5, 4)}),
        (TypeError, "compute_dtype must be .* torch.float64", {"compute_dtype": torch.float64}),
        (ValueError, "packed weight holds", {"packed": p.packed[:-1]}),
        (
            ValueError,
            f"lora_b is on meta, but x is on {where}",
            {"lora_b": p.b.detach().to("meta")},
        ),
        (ValueError, f"packed is on meta, but x is on {where}", {"packed": p.packed.to("meta")}),
    ]
    for error, message, changes in cases:
        with pytest.raises(error, match=message):
            run(**changes)
    if device.type != "cpu":  # what a kernel would read as an address of its own device
        for name in ("x", "bias", "lora_a", "lora_b"):
            other = getattr(p, name.removeprefix("lora_")).detach().cpu()
            message = "is on cpu" if name != "x" else "but x is on cpu"
            with pytest.raises(ValueError, match=message):
                run(**{name: other})
        with pytest.raises(ValueError, match="packed is on cpu"):
            run(packed=p.packed.cpu())
    _, flat = F4.quantize_4bit(p.randn(4096), quant_type="nf4")
    with pytest.raises(ValueError, match=r"weight \[N, K\]"):
        run(state=flat)
