"""Beyond 2^31 elements: the last CTA of a kernel's grid, on memory that is there only where it is
touched. (The forward of the fused GEMM and of decode_mma: test_gemm.py and test_decode.py.)"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from qlora_kernels import optim, reference
from qlora_kernels.emulator import runtime, toolchain
from qlora_kernels.emulator.runtime import EmulatedRuntime, LaunchRequest
from qlora_kernels.formats import get_format

from . import decode_launchers, gemm_launchers
from .launchers import DTYPES, OPTIONS, SOURCES, Quantized, Weight, quantized

pytestmark = pytest.mark.skipif(
    toolchain.available() is not None, reason=str(toolchain.available())
)

BF16 = torch.bfloat16
BLOCK = 64
NS = "_ZN3qlk4cuda"  # the launchers' namespace, mangled


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """As torch.zeros, but of pages that the system makes when they are touched."""
    storage = np.zeros(int(np.prod(shape)) * dtype.itemsize, np.uint8)
    return torch.from_numpy(storage).view(dtype).view(shape)


class QuantizeProblem(ctypes.Structure):
    _fields_ = [
        ("values", ctypes.c_void_p), ("dtype", ctypes.c_int), ("count", ctypes.c_int64),
        ("thresholds", ctypes.c_void_p), ("codes", ctypes.c_void_p), ("block_log2", ctypes.c_int),
        ("kind", ctypes.c_int), ("tensor_scale", ctypes.c_void_p), ("packed", ctypes.c_void_p),
        ("absmax", ctypes.c_void_p),
    ]  # fmt: skip


def last_block(request: LaunchRequest):
    """The emulator, of each grid the last block alone; of small blocks that sum splits, more."""
    blocks = request.grid[0] * request.grid[1] * request.grid[2]
    first = blocks - 1 if "finish" not in request.kernel else max(0, blocks - 64)
    options = {**request.options, "blocks": list(range(first, blocks))}
    return runtime._emulate(replace(request, options=options))


def emulated(library: Path) -> EmulatedRuntime:
    # Without checks: what they keep of each byte would make the memory real.
    return EmulatedRuntime("h100", library, checks=(), engine=last_block)


@pytest.fixture(scope="module")
def blockwise(tmp_path_factory) -> Path:
    sources = ("quantize.cu", "dequantize.cu")
    objects = [toolchain.compile_object(SOURCES / s, ["sm_80"], OPTIONS) for s in sources]
    return toolchain.link_library(objects, tmp_path_factory.mktemp("blockwise") / "blockwise.so")


@pytest.mark.parametrize("tail", [16384, 5000 + 33], ids=["aligned", "ragged"])
def test_dequantize(blockwise, tail) -> None:
    """A whole weight, and a panel of it as the large path takes them."""
    count = (1 << 32) + tail
    packed, absmax = zeros((count + 1) // 2, dtype=torch.uint8), zeros(-(-count // 64))
    values = torch.randn(tail)
    small = reference.quantize(values, "nf4", BLOCK)
    packed[-small[0].numel() :], absmax[-small[1].numel() :] = small
    codebook = get_format("nf4").tensors()[0].clone()
    want = reference.dequantize(*small, codebook, BLOCK, (tail,), BF16)
    for begin in (0, 1 << 32, (1 << 32) + 32):
        out = zeros(count - begin, dtype=BF16)
        with emulated(blockwise) as rt:
            at = [rt.pointer(t).value for t in (packed, codebook, absmax, out)]
            weight = Weight(at[0], at[1], 0, at[2], None, None, None, 6, 1, count)
            launch = getattr(
                rt.lib, f"{NS}17launch_dequantizeERKNS0_6WeightEllPvNS_5DTypeEP11CUstream_st"
            )
            args = ctypes.byref(weight), *map(ctypes.c_int64, (begin, count - begin))
            assert launch(*args, ctypes.c_void_p(at[3]), DTYPES[BF16], None) == 0
            (grid,) = {one.grid for one in rt.launches}
        assert grid[0] == -(-(count - begin) // 16384)
        done = min(tail, (count - begin - 1) % 16384 + 1)  # by the last block
        assert torch.equal(out[-done:].view(torch.int16), want[-done:].view(torch.int16))
        assert not out[:-done][-100_000:].any()


@pytest.mark.parametrize("blocksize", [64, 4096])
def test_quantize(blockwise, blocksize) -> None:
    tail = 8192 - 4096 + 77  # of a CTA's 8192 values: whole blocks, and a ragged one
    count = (1 << 32) + tail
    values = zeros(count, dtype=BF16)
    values[-tail:] = torch.randn(tail)
    want = reference.quantize(values[-tail:], "nf4", blocksize)
    packed = zeros((count + 1) // 2, dtype=torch.uint8)
    absmax = zeros(-(-count // blocksize))
    tables = [t.clone() for t in get_format("nf4").tensors()[1:]]
    with emulated(blockwise) as rt:
        at = [rt.pointer(t).value for t in (values, *tables, packed, absmax)]
        log2 = blocksize.bit_length() - 1
        problem = QuantizeProblem(
            at[0], DTYPES[BF16], count, at[1], at[2], log2, 0, None, at[3], at[4]
        )
        name = f"{NS}15launch_quantizeERKNS0_15QuantizeProblemEP11CUstream_st"
        assert getattr(rt.lib, name)(ctypes.byref(problem), None) == 0
    assert torch.equal(packed[-want[0].numel() :], want[0])
    assert torch.equal(absmax[-want[1].numel() :], want[1])


# --- AdamW: the last CTA of as many as there are tiles, which has the last 2033 values ------------


class AdamWTensor(ctypes.Structure):
    _fields_ = [
        *[(n, ctypes.c_void_p) for n in ("p", "grad", "state1", "state2", "absmax1", "absmax2")],
        ("count", ctypes.c_int64), ("first_tile", ctypes.c_uint), ("wide", ctypes.c_uint),
    ]  # fmt: skip


class AdamWGroup(ctypes.Structure):
    _fields_ = [
        ("tensors", AdamWTensor * 60), ("count", ctypes.c_int), ("dtype", ctypes.c_int),
        ("eight", ctypes.c_bool), ("step", ctypes.c_float * 8), ("maps", ctypes.c_void_p),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def adamw(tmp_path_factory) -> Path:
    compiled = toolchain.compile_object(SOURCES / "adamw.cu", ["sm_80"], OPTIONS)
    return toolchain.link_library([compiled], tmp_path_factory.mktemp("adamw") / "adamw.so")


@pytest.mark.parametrize("bits", [32, 8])
def test_adamw(adamw, bits) -> None:
    """The whole of a tensor's last tile, and its ragged end: with 32-bit states 8.6 GB each."""
    tile, done = 4096, 2033
    tail = tile + done
    count = (1 << 31) + tail
    # Tensors as the optimizer has them after a step, and after the next one.
    small = torch.randn(tail).to(BF16).requires_grad_()
    optimizer = optim.AdamW([small], lr=1e-2, optim_bits=bits)
    small.grad = torch.randn(tail).to(BF16)
    optimizer.step()
    states = {n: t for n, t in optimizer.state[small].items() if isinstance(t, Tensor)}
    values = {"p": small.detach().clone(), "grad": small.grad, **states}
    large = {}
    for name, t in values.items():
        blockwise = name.startswith("absmax")
        large[name] = zeros(-(-count // 256) if blockwise else count, dtype=t.dtype)
        large[name][-t.numel() :] = t
    optimizer.step()
    with emulated(adamw) as rt:
        group = AdamWGroup(count=1, dtype=DTYPES[BF16], eight=bits == 8)
        at = {name: rt.pointer(t).value for name, t in large.items()}
        group.tensors[0] = AdamWTensor(**at, count=count)
        group.step[:] = optim._scalars(optimizer.param_groups[0], 2)
        group.maps = rt.pointer(optim.state_maps()).value
        launch = getattr(rt.lib, f"{NS}12launch_adamwENS0_10AdamWGroupEiP11CUstream_st")
        launch.argtypes = [AdamWGroup, ctypes.c_int, ctypes.c_void_p]  # by value, as in C++
        assert launch(group, count // tile, None) == 0
        (grid,) = {one.grid for one in rt.launches}
    assert grid[0] == count // tile + 1
    want = {"p": small.detach(), **states}
    for name, t in large.items():
        if name == "grad":
            continue
        part = -(-done // 256) if name.startswith("absmax") else done
        got, whole = t[-part:], want[name][-part:]
        if name == "p":  # the root on a CPU, and 8-bit states' quotient, are not IEEE's
            assert ((got - whole).abs() <= 2.0**-7 * whole.abs()).all() and not got.equal(
                values["p"][-part:]
            )
        else:
            assert torch.equal(got, whole), name
        assert not t[:100_000].any(), f"{name}: an offset was cut to 32 bits"


# --- the gradient of x: of 1024 rows by almost 2^22 columns a CTA has the last columns ------------

N, K, COLUMNS = 1024, (1 << 22) - 256, 256


@pytest.fixture
def wide() -> Iterator[tuple[Quantized, Tensor]]:
    """A weight of 4.3 billion values, zero but for its last columns; and those."""
    small = quantized(N, COLUMNS)
    packed = zeros(N, K // 2, dtype=torch.uint8)
    packed[:, -COLUMNS // 2 :] = small.packed.view(N, -1)
    absmax = zeros(N, K // BLOCK)
    absmax[:, -COLUMNS // BLOCK :] = small.absmax.view(N, -1)
    yield Quantized(packed.view(-1), absmax.view(-1), small.codebook, BLOCK, (N, K)), small.dense()


def check(dx: Tensor, dy: Tensor, w: Tensor, columns: int, roundings: int) -> None:
    """Of the last row: roundings to bf16 of each product's terms, sums in fp32, the result."""
    dx, dy, w = dx[-1, -columns:].double(), dy[-1].double(), w.double()[:, -columns:]
    bound = (roundings * 2.0**-8 + 2 * N * 2.0**-24) * (dy.abs() @ w.abs())
    assert dx.any() and ((dx - dy @ w).abs() <= bound).all()


# As many CTAs as bands of columns on tensor cores; one thread a weight does not cut rows for one.
@pytest.mark.full
@pytest.mark.parametrize(
    ("route", "m", "sms"), [(decode_launchers.SIMT, 1, 1), (decode_launchers.MMA, 9, K // 128)]
)
def test_decode_input_grad(wide, route, m, sms) -> None:
    q, w = wide
    dy = torch.randn(m, N).to(BF16)
    with emulated(decode_launchers.library()) as rt:
        dx = decode_launchers.Launcher(rt).input_grad(q, dy, route, sms=sms).out
    check(dx, dy, w, 128, 4)


@pytest.mark.full
def test_gemm_input_grad(wide) -> None:
    q, w = wide
    dy = torch.randn(16, N).to(BF16)
    sources = ("gemm_input_grad.cu", "gemm_input_grad_f16.cu", "gemm_lora.cu")
    library = gemm_launchers.library(*sources)
    for tile in ((64, 32, 256, 4, 4), (64, 32, 64, 4, 1)):
        with emulated(library) as rt:
            dx = gemm_launchers.Launcher(rt).input_grad(q, dy, tile).out
        check(dx, dy, w, 64, 2)


@pytest.mark.full
def test_decode_linear_by_one_thread_a_weight() -> None:
    """SIMT: the last rows of 70,000 x 65,536."""
    n, k, rows = 70_000, 65_536, 4
    small = quantized(rows, k)
    packed, absmax = zeros(n * k // 2, dtype=torch.uint8), zeros(n * k // BLOCK)
    packed[-small.packed.numel() :], absmax[-small.absmax.numel() :] = small.packed, small.absmax
    x = torch.randn(1, k).to(BF16)
    with emulated(decode_launchers.library()) as rt:
        q = Quantized(packed, absmax, small.codebook, BLOCK, (n, k))
        y = decode_launchers.Launcher(rt).linear(q, x, decode_launchers.SIMT, sms=n // rows).out
    x64, w = x.double(), small.dense().double()
    bound = (2.0**-8 + 2 * k * 2.0**-24) * (x64.abs() @ w.abs().T)
    assert ((y[:, -rows:].double() - x64 @ w.T).abs() <= bound).all() and y[:, -rows:].any()
