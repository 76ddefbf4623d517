"""A seeded walk through every CPU op at awkward sizes, against the reference, in one process.

    QLORA_KERNELS_OPS=<library> python tests/native/sweep.py [--isa NAME ...] [--rounds N]

For builds that a test process should not load into itself: with sanitizers, and with AVX-512 done
in software. Each tensor is an allocation of its own with no slack, so that under AddressSanitizer
a kernel that reads or writes one element too far is stopped. Bytes are compared exactly; linear
layers within a bound that no wrong element passes (the tight ones are the kernels' own tests').
"""

from __future__ import annotations

import argparse
import ctypes
import os
import random
import sys

import numpy as np
import torch

from qlora_kernels import cpu, formats, reference
from qlora_kernels import functional as F4
from qlora_kernels.activations import rms_norm, swiglu

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Odd counts, one block more or less, one value more: where tails begin and end.
COUNTS = (1, 2, 15, 31, 63, 64, 65, 127, 129, 255, 1023, 4096, 4097, 256 * 64 + 1, 70001)
LINEARS = ((1, 16), (3, 64), (17, 96), (16, 128), (33, 256), (64, 320), (5, 123), (70, 576))
ROWS = (1, 2, 3, 4, 5, 16, 31, 33, 64, 65, 130)


def same_bits(got: torch.Tensor, want: torch.Tensor, what: str) -> None:
    # NaN equals NaN whatever its payload.
    equal = (got == want) | (got.isnan() & want.isnan()) if got.is_floating_point() else got == want
    if got.is_floating_point():
        equal &= got.signbit() == want.signbit() if not want.isnan().any() else equal
    if got.shape != want.shape or not bool(equal.all()):
        raise AssertionError(f"{what}: {int((~equal).sum())} of {want.numel()} differ")


def within(got: torch.Tensor, want: torch.Tensor, bound: torch.Tensor, what: str) -> None:
    error = (got.double() - want).abs()
    if not bool((error <= bound).all()):
        worst = (error / bound.clamp(min=1e-300)).max().item()
        raise AssertionError(f"{what}: off by {worst:.3g} times the bound")


def weight(rng: random.Random, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    w = torch.randn(shape)
    flat = w.view(-1)
    for value in (0.0, -0.0, 1e-40, 3e4):
        flat[rng.randrange(flat.numel())] = value
    return w.to(dtype)


def quantize_and_back(rng: random.Random) -> None:
    count, dtype = rng.choice(COUNTS), rng.choice(FLOATS)
    blocksize = rng.choice(formats.BLOCKSIZES)
    fmt = rng.choice((formats.NF4, formats.FP4, formats.FP4_E2M1, formats.INT4))
    nested = rng.random() < 0.5
    what = f"{fmt.name} {count} {dtype} block {blocksize} nested {nested}"
    w = weight(rng, (count,), dtype)
    if rng.random() < 0.2:
        w[rng.randrange(count)] = rng.choice((float("inf"), float("-inf"), float("nan")))

    packed, state = F4.quantize_4bit(w, None, None, blocksize, nested, fmt)
    want_packed, absmax = reference.quantize(w, fmt, blocksize)
    same_bits(packed.view(-1), want_packed, "packed " + what)
    if nested:
        codes, nested_absmax, offset = reference.quantize_absmax(absmax)
        same_bits(state.absmax, codes, "nested codes " + what)
        same_bits(state.state2.absmax, nested_absmax, "nested absmax " + what)
        same_bits(state.offset.view(()), offset.view(()), "offset " + what)
        absmax = reference.dequantize_absmax(codes, nested_absmax, offset)
    else:
        same_bits(state.absmax, absmax, "absmax " + what)
    out_dtype = rng.choice(FLOATS)
    want = reference.dequantize(want_packed, absmax, state.code, blocksize, (count,), out_dtype)
    same_bits(F4.dequantize_4bit(packed, state, dtype=out_dtype), want, "dequantize " + what)
    out = torch.full((count,), 7.0, dtype=out_dtype)
    F4.dequantize_4bit(packed, state, out=out)
    same_bits(out, want, "dequantize into out " + what)


def linear_both_ways(rng: random.Random) -> None:
    (n, k), m, rank = rng.choice(LINEARS), rng.choice(ROWS), rng.choice((0, 1, 8, 13, 64))
    blocksize = rng.choice((16, 32, 64, 128, 1024))
    x_dtype, lora_dtype, compute = (rng.choice(FLOATS) for _ in range(3))
    what = f"[{m}, {k}] x [{n}, {k}] rank {rank} block {blocksize} {x_dtype} {lora_dtype} {compute}"
    packed, state = F4.quantize_4bit(
        torch.randn(n, k) / k**0.5, None, None, blocksize, rng.random() < 0.5, "nf4"
    )
    w = F4.dequantize_4bit(packed, state, dtype=torch.float32).double()
    leaf = {"x": torch.randn(m, k).to(x_dtype).requires_grad_()}
    if rng.random() < 0.5:
        leaf["bias"] = torch.randn(n).to(lora_dtype).requires_grad_()
    if rank:
        leaf["lora_a"] = (torch.randn(rank, k) / k**0.5).to(lora_dtype).requires_grad_()
        leaf["lora_b"] = torch.randn(n, rank).to(lora_dtype).requires_grad_()
    y = F4.linear_4bit(
        packed=packed, state=state, scaling=0.5 if rank else 1.0, compute_dtype=compute, **leaf
    )
    dy = torch.randn(m, n).to(x_dtype)
    y.backward(dy)

    # Sums of magnitudes times the roundings on the way: inputs, weight, S, dS and the result.
    steps = 8 * max(torch.finfo(compute).eps, torch.finfo(x_dtype).eps) + (k + n + m) * 2.0**-23
    value = {name: t.detach().double() for name, t in leaf.items()}
    args = [value.get(name) for name in ("bias", "lora_a", "lora_b")]
    sizes_in = [t if t is None else t.abs() for t in args]
    want = reference.linear(value["x"], w, *args, 0.5, torch.float64)
    size = reference.linear(value["x"].abs(), w.abs(), *sizes_in, 0.5, torch.float64)
    within(y.detach(), want, steps * size + 1e-6, "linear " + what)
    want_grads = reference.linear_backward(dy, value["x"], w, args[1], args[2], 0.5)
    sizes = reference.linear_backward(dy.abs(), value["x"].abs(), w.abs(), *sizes_in[1:], 0.5)
    for name, t in leaf.items():
        rounding = torch.finfo(t.dtype).eps * sizes[name]
        within(t.grad, want_grads[name], steps * sizes[name] + rounding + 1e-6, f"d{name} {what}")


def between_layers(rng: random.Random) -> None:
    """RMSNorm and SwiGLU: against the plain chains in float64, forward and backward."""
    m, k, dtype = rng.choice((1, 2, 3, 40)), rng.choice(COUNTS[:-2]), rng.choice(FLOATS)
    what = f"[{m}, {k}] {dtype}"
    a, b = (torch.randn(m, k).to(dtype).requires_grad_() for _ in range(2))
    w, dy = torch.randn(k).to(dtype), torch.randn(m, k).to(dtype)
    a64, b64 = (t.detach().double().requires_grad_() for t in (a, b))
    eps = 4 * torch.finfo(dtype).eps
    for name, got, want, leaf in (
        ("norm", rms_norm(a, w, 1e-2), w * a64 / (a64.pow(2).mean(-1, True) + 1e-2).sqrt(), "a"),
        ("swiglu", swiglu(a, b), torch.nn.functional.silu(a64) * b64, "ab"),
    ):
        within(got.detach(), want.detach(), eps * (want.detach().abs() + 1), f"{name} {what}")
        leaves, wide = ([a, b], [a64, b64]) if leaf == "ab" else ([a], [a64])
        grads = torch.autograd.grad(got, leaves, dy)
        wants = torch.autograd.grad(want, wide, dy.double())
        for i, (g, g64) in enumerate(zip(grads, wants, strict=True)):
            size = 100 * (1 + dy.double().abs().max() * (1 + w.double().abs().max()))
            within(g, g64, eps * size * torch.ones_like(g64), f"gradient {i} of {name} {what}")


def overrun() -> None:
    """Lets a kernel write one value too far: a sanitizer that is at work ends the process here."""
    packed, state = F4.quantize_4bit(torch.randn(65), blocksize=64, quant_type="nf4")
    short = torch.empty(64)
    start = ctypes.cast(short.data_ptr(), ctypes.POINTER(ctypes.c_float))
    F4.dequantize_4bit(packed, state, out=torch.from_numpy(np.ctypeslib.as_array(start, (65,))))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--isa", nargs="*", default=None, help="instead of all that can run here")
    parser.add_argument("--rounds", type=int, default=60, help="of each op and instruction set")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overrun", action="store_true", help="plant one error, and no more")
    options = parser.parse_args()
    if not os.environ.get("QLORA_KERNELS_OPS"):
        parser.error("QLORA_KERNELS_OPS must name the library to walk through")
    torch.set_num_threads(2)
    if options.overrun:
        overrun()
        return 0
    for isa in options.isa or cpu.available_isas():
        cpu.choose_isa(isa)
        rng = random.Random(f"{options.seed} {isa}")
        torch.manual_seed(options.seed)
        for _ in range(options.rounds):
            quantize_and_back(rng)
            linear_both_ways(rng)
            between_layers(rng)
        print(f"{isa}: {options.rounds} rounds", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
