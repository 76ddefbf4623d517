"""The decode launchers, called as C++ calls them: launchers.h's structs through ctypes, driven by
the emulator's runtime. What test_decode.py and benchmarks/cuda_decode.py share."""

from __future__ import annotations

import ctypes
import functools
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from qlora_kernels import formats, reference
from qlora_kernels.emulator import toolchain
from qlora_kernels.emulator.runtime import EmulatedRuntime, Launch

SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
OPTIONS = ("-std=c++20", "-O3")
TENSOR_CORES = ("decode_linear_mma", "decode_input_grad_mma", "decode_lora_mma")  # from sm_80 on
SIMPLE = ("decode_launch", "decode_lora", "decode_any", "decode_linear_simt")
FORWARD, INPUT_GRAD = 0, 1  # Pass
SIMT, MMA = 0, 1  # Route
FP32, NESTED = 0, 1  # ScaleKind
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
#: dispatch.h's plan is a constexpr function: a door to it.
DOOR = """
#include "{folder}/decode_tiles.h"
#include "{folder}/launchers.h"
using namespace qlk::cuda;
extern "C" void decode_plan_of(int route, const Shape* shape, int sms, Plan* plan) {{
  *plan = decode_plan(static_cast<Route>(route), *shape, sms);
}}
extern "C" int decode_linear(const LinearProblem* p, const Plan* plan, cudaStream_t stream) {{
  return launch_decode_linear(*p, *plan, stream);
}}
extern "C" int decode_input_grad(const InputGradProblem* p, const Plan* plan,
                                 cudaStream_t stream) {{
  return launch_decode_input_grad(*p, *plan, stream);
}}
"""

_p, _i, _l, _f = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float


class Weight(ctypes.Structure):
    _fields_ = [
        ("packed", _p), ("codebook", _p), ("kind", _i), ("absmax", _p), ("nested_absmax", _p),
        ("nested_code", _p), ("offset", _p), ("block_log2", _i), ("n", _l), ("k", _l),
    ]  # fmt: skip


class Matrix(ctypes.Structure):
    _fields_ = [("data", _p), ("dtype", _i)]


class LinearProblem(ctypes.Structure):
    _fields_ = [
        ("w", Weight), ("m", _l), ("rank", _l), ("x", _p), ("dtype", _i), ("bias", Matrix),
        ("a", Matrix), ("s", Matrix), ("b", Matrix), ("scaling", _f), ("s_out", _p), ("y", _p),
        ("y_dtype", _i), ("workspace", _p),
    ]  # fmt: skip


class InputGradProblem(ctypes.Structure):
    _fields_ = [
        ("w", Weight), ("m", _l), ("rank", _l), ("dy", _p), ("dtype", _i), ("a", Matrix),
        ("b", Matrix), ("scaling", _f), ("ds_out", _p), ("dx", _p), ("dx_dtype", _i),
        ("workspace", _p),
    ]  # fmt: skip


class Shape(ctypes.Structure):
    _fields_ = [
        ("pass_", _i), ("m", _l), ("n", _l), ("k", _l), ("rank", _l), ("s_given", ctypes.c_bool),
        ("dtype", _i), ("block_log2", _i), ("scales", _i),
    ]  # fmt: skip


class Plan(ctypes.Structure):
    _fields_ = [
        ("route", _i), ("tile_m", _i), ("tile_n", _i), ("tile_k", _i), ("warps", _i),
        ("stages", _i), ("splits", _i), ("shared_bytes", _i), ("workspace_bytes", _l),
    ]  # fmt: skip


@functools.cache
def library(target: str = "sm_80") -> Path:
    """All decode kernels in one library, those that Turing has too for ``target``."""
    wanted = [(SOURCES / f"{name}.cu", "sm_80") for name in TENSOR_CORES]
    wanted += [(SOURCES / f"{name}.cu", target) for name in SIMPLE]
    wanted += [(DOOR.format(folder=SOURCES), "sm_80")]

    def compiled(source: tuple) -> Path:
        return toolchain.compile_object(source[0], [source[1]], OPTIONS)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, wanted))
    folder = Path(tempfile.mkdtemp(prefix="qlk-decode-"))
    return toolchain.link_library(objects, folder / "decode.so")


@dataclass
class Quantized:
    """A packed weight and everything that a kernel reads of it."""

    packed: Tensor
    absmax: Tensor  # fp32, or uint8 where nested
    codebook: Tensor
    blocksize: int
    shape: tuple[int, int]
    nested_absmax: Tensor | None = None
    nested_code: Tensor | None = None
    offset: Tensor | None = None

    def scales(self) -> Tensor:
        if self.nested_absmax is None:
            return self.absmax
        return reference.dequantize_absmax(self.absmax, self.nested_absmax, self.offset)

    def dense(self, codebook: Tensor | None = None) -> Tensor:
        """float64 of the fp32 product code * scale; of other codes, where given."""
        book = self.codebook if codebook is None else codebook
        return reference.dequantize(
            self.packed, self.scales(), book, self.blocksize, self.shape
        ).double()


def quantized(
    n: int, k: int, blocksize: int = 64, nested: bool = True, fmt: str | formats.Format = "nf4",
    codebook: Tensor | None = None,
) -> Quantized:  # fmt: skip
    """A random weight; with ``codebook`` its codes stand for those values instead."""
    packed, absmax = reference.quantize(torch.randn(n, k) * 0.05, fmt, blocksize)
    book = formats.get_format(fmt).tensors()[0] if codebook is None else codebook
    q = Quantized(packed, absmax, book.clone(), blocksize, (n, k))
    if nested:
        q.absmax, q.nested_absmax, q.offset = reference.quantize_absmax(absmax)
        q.offset = q.offset.reshape(1).clone()
        q.nested_code = formats.nested_code().clone()
    return q


def moved(t: Tensor, elements: int) -> Tensor:
    """The same values at an address that many elements further from an aligned one."""
    room = torch.empty(t.numel() + elements, dtype=t.dtype)
    view = room[elements:].view(t.shape)
    view.copy_(t)
    return view


@dataclass
class Run:
    """What came out of a launcher, and what the emulator saw."""

    out: Tensor
    s: Tensor | None  # S, or dS
    launches: list[Launch] = field(default_factory=list)


class Launcher:
    """Calls the launchers in an `EmulatedRuntime`, results and workspace uninitialised before."""

    def __init__(self, rt: EmulatedRuntime) -> None:
        self.rt = rt

    def pointer(self, t: Tensor | None, name: str) -> int | None:
        return None if t is None else self.rt.pointer(t, name).value

    def matrix(self, t: Tensor | None, name: str) -> Matrix:
        return Matrix(self.pointer(t, name), 0 if t is None else DTYPES[t.dtype])

    def weight(self, q: Quantized) -> Weight:
        return Weight(
            self.pointer(q.packed, "packed"), self.pointer(q.codebook, "codebook"),
            FP32 if q.nested_absmax is None else NESTED, self.pointer(q.absmax, "absmax"),
            self.pointer(q.nested_absmax, "nested_absmax"),
            self.pointer(q.nested_code, "nested_code"), self.pointer(q.offset, "offset"),
            q.blocksize.bit_length() - 1, *q.shape,
        )  # fmt: skip

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        size, count = torch.empty(0, dtype=dtype).element_size(), 1
        for s in shape:
            count *= s
        raw = self.rt.empty(max(1, count * size), "uint8")
        return torch.from_numpy(raw)[: count * size].view(dtype).view(tuple(shape))

    def plan(self, route: int, shape: Shape, sms: int | None) -> Plan:
        plan = Plan()
        self.rt.lib.decode_plan_of(
            route, ctypes.byref(shape), sms or self.rt.device.sms, ctypes.byref(plan)
        )
        return plan

    def linear(
        self, q: Quantized, x: Tensor, route: int = MMA, *, bias: Tensor | None = None,
        a: Tensor | None = None, b: Tensor | None = None, s: Tensor | None = None,
        scaling: float = 1.0, y_dtype: torch.dtype | None = None, want_s: bool = True,
        sms: int | None = None, stream: int | None = None,
    ) -> Run:  # fmt: skip
        m, rank = x.shape[0], 0 if b is None else b.shape[1]
        y = self.empty((m, q.shape[0]), y_dtype or x.dtype)
        s_out = self.empty((m, rank), torch.float32) if a is not None and want_s else None
        log2, kind = q.blocksize.bit_length() - 1, NESTED if q.nested_absmax is not None else FP32
        plan = self.plan(
            route,
            Shape(FORWARD, m, *q.shape, rank, s is not None, DTYPES[x.dtype], log2, kind),
            sms,
        )
        workspace = self.empty((plan.workspace_bytes,), torch.uint8)
        problem = LinearProblem(
            self.weight(q), m, rank, self.pointer(x, "x"), DTYPES[x.dtype],
            self.matrix(bias, "bias"), self.matrix(a, "A"), self.matrix(s, "S"),
            self.matrix(b, "B"), scaling, self.pointer(s_out, "s_out"), self.pointer(y, "y"),
            DTYPES[y.dtype], self.pointer(workspace, "workspace"),
        )  # fmt: skip
        return self.run("decode_linear", problem, plan, y, s_out, stream)

    def input_grad(
        self, q: Quantized, dy: Tensor, route: int = MMA, *, a: Tensor | None = None,
        b: Tensor | None = None, scaling: float = 1.0, dx_dtype: torch.dtype | None = None,
        sms: int | None = None, stream: int | None = None,
    ) -> Run:  # fmt: skip
        m, rank = dy.shape[0], 0 if b is None else b.shape[1]
        dx = self.empty((m, q.shape[1]), dx_dtype or dy.dtype)
        ds = self.empty((m, rank), torch.float32) if rank else None
        log2, kind = q.blocksize.bit_length() - 1, NESTED if q.nested_absmax is not None else FP32
        plan = self.plan(
            route, Shape(INPUT_GRAD, m, *q.shape, rank, False, DTYPES[dy.dtype], log2, kind), sms
        )
        workspace = self.empty((plan.workspace_bytes,), torch.uint8)
        problem = InputGradProblem(
            self.weight(q), m, rank, self.pointer(dy, "dy"), DTYPES[dy.dtype],
            self.matrix(a, "A"), self.matrix(b, "B"), scaling, self.pointer(ds, "dS"),
            self.pointer(dx, "dx"), DTYPES[dx.dtype], self.pointer(workspace, "workspace"),
        )  # fmt: skip
        return self.run("decode_input_grad", problem, plan, dx, ds, stream)

    def run(self, name, problem, plan, out, s, stream) -> Run:
        before = len(self.rt.launches)
        status = getattr(self.rt.lib, name)(
            ctypes.byref(problem), ctypes.byref(plan), ctypes.c_void_p(stream)
        )
        self.plan_used = plan
        if status != 0:
            raise RuntimeError(f"{name}: cudaError {status}")
        return Run(out, s, self.rt.launches[before:])
