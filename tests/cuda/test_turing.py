"""Turing (sm_75, the free T4): quantize, dequantize, SIMT decode and the large path, in fp16.

The quick build has code from sm_80 on. So these tests run in a process of their own, on a build for
75 that the one below makes: what executes is compute_75's PTX, as a T4's driver would choose.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qlora_kernels import cuda, formats, optim, reference
from qlora_kernels.formats import get_format

from . import test_adamw as adamw
from .test_adamw import _nearest_roots, on_gpu  # noqa: F401
from .test_linear import Case
from .test_quantize import hard_values, same_bits

BUILT = "QLORA_KERNELS_BUILT_FOR_TURING"
inside = pytest.mark.skipif(BUILT not in os.environ, reason=f"run by {__name__}.test_on_a_t4")


def runs_what_a_t4_would(gpu) -> None:
    assert gpu.runtime.launches
    for launch in gpu.runtime.launches:
        assert re.search(r"^\.target sm_75", launch.ptx, re.MULTILINE), launch.name


@pytest.fixture
def t4(make_gpu):
    gpu = make_gpu("t4")
    yield gpu
    runs_what_a_t4_would(gpu)


@pytest.mark.full
@pytest.mark.skipif(torch.cuda.is_available(), reason="the emulator stands aside for a real GPU")
def test_on_a_t4(native_variant: Callable[..., Path]) -> None:
    library = native_variant("cuda", "75")
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, BUILT: "1", "QLORA_KERNELS_CUDA_EMULATED": str(library)}
    ran = subprocess.run(
        [*command, "-k", "not test_on_a_t4"], env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout[-4000:]
    count = re.search(r"(\d+) passed", ran.stdout)
    assert count and int(count[1]) >= 20 and "skipped" not in ran.stdout, ran.stdout[-400:]


@inside
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["fp32", "nested"])
def test_quantize_and_dequantize(t4, dtype, nested) -> None:
    codebook, *tables = get_format("nf4").tensors()
    for count, blocksize in ((8192 + 64 * 5 + 7, 64), (40000, 128), (33, 16)):
        w = hard_values(count, dtype, blocksize)
        packed, absmax = t4.ops.quantize_4bit(*t4(w, *tables), blocksize)
        want_packed, want_absmax = reference.quantize(w, "nf4", blocksize)
        assert same_bits(packed, want_packed) and same_bits(absmax, want_absmax)
        more: tuple = (None, None, None)
        if nested:
            absmax = torch.rand(absmax.numel()) * 0.1
            got = t4.ops.quantize_absmax(*t4(absmax, formats.nested_thresholds()), None)
            for mine, theirs in zip(got, reference.quantize_absmax(absmax), strict=True):
                assert same_bits(mine, theirs)
            want_absmax = reference.dequantize_absmax(*got)
            absmax, more = got[0], (got[1], formats.nested_code(), got[2])
        out = t4.ops.dequantize_4bit(packed, absmax, codebook, blocksize, *more, [count], dtype)
        want = reference.dequantize(packed, want_absmax, codebook, blocksize, (count,), dtype)
        assert same_bits(out, want)


@inside
@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 17])
def test_linear_in_fp16(t4, m, rank) -> None:
    """Few rows by one thread a weight, of aligned shapes and of others; more by torch's matmul."""
    for n, k, most in ((48, 256, 3), (33, 100, 4)):
        for nested in (False, True):
            case = Case(m, n, k, rank, bias=rank > 0, nested=nested, compute=torch.float16)
            before = len(t4.kernels)
            case.check_forward(t4)
            case.check_backward(t4)
            names = t4.kernels[before:]
            plan, why = cuda.choose("t4", m, n, k, rank=rank, dtype=torch.float16)
            assert plan.route == ("decode_simt" if m <= most else "large"), why
            dequantized = ["dequantize" in name for name in names]
            assert all(dequantized) if plan.route == "large" else not any(dequantized), names


@inside
@pytest.mark.parametrize("m", [1, 4])
def test_fp32_and_bf16(t4, m) -> None:
    """bf16 is not in Turing's hardware, whatever torch says: its decode kernels are left out, and
    the values are right by dequantization."""
    case = Case(m, 48, 256, 8, bias=True, compute=torch.bfloat16)
    case.check_forward(t4)
    case.check_backward(t4)
    assert t4.kernels and all("dequantize" in name for name in t4.kernels)
    case = Case(m, 48, 256, 8, bias=True, compute=torch.float32)
    case.check_forward(t4)
    case.check_backward(t4)


@inside
def test_same_bits_in_every_order_of_warps_and_blocks(make_gpu) -> None:
    case, results = Case(2, 200, 512, 16, True, compute=torch.float16), []
    for seed in range(3):
        gpu = make_gpu("t4", seed=seed)
        results.append((*case.forward(gpu), *case.backward(gpu)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@inside
def test_first_use_passes_its_check(t4) -> None:
    """What a T4 meets first: each route that it has, against dequantization and a matmul."""
    lib = cuda.bind(t4.lib)
    everything = cuda.disabled_mask("all")
    lib.qlk_cuda_disable(0, everything & ~cuda.disabled_mask("decode_simt"))
    try:
        assert cuda.check_route(t4.ops, t4.device, "decode_simt", torch.float16) == []
    finally:
        lib.qlk_cuda_disable(0, 0)


@inside
@pytest.mark.parametrize("capturable", [False, True], ids=["", "capturable"])
@pytest.mark.parametrize("paged", [False, True], ids=["", "paged"])
@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16], ids=str)
def test_adamw(on_gpu, dtype, bits, paged, capturable) -> None:  # noqa: F811
    """bf16 too: it is converted, which a T4 does in a few instructions more."""
    gpu = on_gpu(device="t4")
    sizes = [5000, 4096, 300]
    params = adamw.pair(gpu, adamw.random(sizes, dtype))
    kind = optim.PagedAdamW if paged else optim.AdamW
    optimizers = [
        kind(p, optim_bits=bits, capturable=on, **adamw.OPTIONS)
        for p, on in zip(params, (capturable, False), strict=True)
    ]
    for t in range(2):
        before = [p.detach().clone() for p in params[1]]
        adamw.train(gpu, optimizers, params, adamw.random(sizes, dtype, seed=t))
        adamw.check(optimizers, params, before)
        with torch.no_grad():
            for a, b in zip(*params, strict=True):
                a.copy_(b)
    runs_what_a_t4_would(gpu)


@inside
def test_adamws_first_use(on_gpu) -> None:  # noqa: F811
    gpu = on_gpu(device="t4")
    assert optim.check(gpu.ops, gpu.device) == []
    runs_what_a_t4_would(gpu)
