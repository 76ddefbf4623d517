"""launchers.h's structs through ctypes, and what it takes to call a launcher as C++ does, driven by
the emulator's runtime: what decode_launchers.py and gemm_launchers.py share."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from qlora_kernels import formats, reference
from qlora_kernels.emulator.runtime import EmulatedRuntime, Launch

SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
OPTIONS = ("-std=c++20", "-O3")
FORWARD, INPUT_GRAD = 0, 1  # Pass
FP32, NESTED = 0, 1  # ScaleKind
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

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

    @property
    def kind(self) -> int:
        return FP32 if self.nested_absmax is None else NESTED

    @property
    def block_log2(self) -> int:
        return self.blocksize.bit_length() - 1

    def scales(self) -> Tensor:
        if self.nested_absmax is None:
            return self.absmax
        return reference.dequantize_absmax(self.absmax, self.nested_absmax, self.offset)

    def dense(self, dtype: torch.dtype = torch.float32, codebook: Tensor | None = None) -> Tensor:
        """The product code * scale, rounded to ``dtype``; of other codes, where given."""
        book = self.codebook if codebook is None else codebook
        return reference.dequantize(
            self.packed, self.scales(), book, self.blocksize, self.shape, dtype
        )


def quantized(
    n: int, k: int, blocksize: int = 64, nested: bool = False, fmt: str | formats.Format = "nf4",
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


class Caller:
    """Calls launchers in an `EmulatedRuntime`, results and workspace uninitialised before.

    A subclass makes the plans and says, in ``launch``, which function takes a problem.
    """

    def __init__(self, rt: EmulatedRuntime) -> None:
        self.rt = rt
        self.status = 0  # of the last call
        self.out_offset = 0  # elements that results lie beyond an aligned address

    def launch(self, problem: ctypes.Structure, plan: Plan, stream: int | None) -> int:
        raise NotImplementedError

    def pointer(self, t: Tensor | None, name: str) -> int | None:
        return None if t is None else self.rt.pointer(t, name).value

    def matrix(self, t: Tensor | None, name: str) -> Matrix:
        return Matrix(self.pointer(t, name), 0 if t is None else DTYPES[t.dtype])

    def weight(self, q: Quantized) -> Weight:
        return Weight(
            self.pointer(q.packed, "packed"), self.pointer(q.codebook, "codebook"), q.kind,
            self.pointer(q.absmax, "absmax"), self.pointer(q.nested_absmax, "nested_absmax"),
            self.pointer(q.nested_code, "nested_code"), self.pointer(q.offset, "offset"),
            q.block_log2, *q.shape,
        )  # fmt: skip

    def empty(self, shape: Sequence[int], dtype: torch.dtype, offset: int = 0) -> Tensor:
        """Device memory that the checker takes for uninitialised."""
        size, count = dtype.itemsize, math.prod(shape)
        raw = self.rt.empty(max(1, (offset + count) * size), "uint8")
        flat = torch.from_numpy(raw)[offset * size :][: count * size]
        return flat.view(dtype).view(tuple(shape))

    def run_linear(
        self, q: Quantized, x: Tensor, plan: Plan, *, bias: Tensor | None = None,
        a: Tensor | None = None, b: Tensor | None = None, s: Tensor | None = None,
        scaling: float = 1.0, y_dtype: torch.dtype | None = None, want_s: bool = True,
        stream: int | None = None,
    ) -> Run:  # fmt: skip
        m, rank = x.shape[0], 0 if b is None else b.shape[1]
        y = self.empty((m, q.shape[0]), y_dtype or x.dtype, self.out_offset)
        s_out = self.empty((m, rank), torch.float32) if a is not None and want_s else None
        workspace = self.empty((plan.workspace_bytes,), torch.uint8)
        problem = LinearProblem(
            self.weight(q), m, rank, self.pointer(x, "x"), DTYPES[x.dtype],
            self.matrix(bias, "bias"), self.matrix(a, "A"), self.matrix(s, "S"),
            self.matrix(b, "B"), scaling, self.pointer(s_out, "s_out"), self.pointer(y, "y"),
            DTYPES[y.dtype], self.pointer(workspace, "workspace"),
        )  # fmt: skip
        return self._run(problem, plan, y, s_out, stream)

    def run_input_grad(
        self, q: Quantized, dy: Tensor, plan: Plan, *, a: Tensor | None = None,
        b: Tensor | None = None, scaling: float = 1.0, dx_dtype: torch.dtype | None = None,
        stream: int | None = None,
    ) -> Run:  # fmt: skip
        m, rank = dy.shape[0], 0 if b is None else b.shape[1]
        dx = self.empty((m, q.shape[1]), dx_dtype or dy.dtype, self.out_offset)
        ds = self.empty((m, rank), torch.float32) if rank else None
        workspace = self.empty((plan.workspace_bytes,), torch.uint8)
        problem = InputGradProblem(
            self.weight(q), m, rank, self.pointer(dy, "dy"), DTYPES[dy.dtype],
            self.matrix(a, "A"), self.matrix(b, "B"), scaling, self.pointer(ds, "dS"),
            self.pointer(dx, "dx"), DTYPES[dx.dtype], self.pointer(workspace, "workspace"),
        )  # fmt: skip
        return self._run(problem, plan, dx, ds, stream)

    def _run(self, problem, plan: Plan, out: Tensor, s: Tensor | None, stream) -> Run:
        before = len(self.rt.launches)
        self.status = self.launch(problem, plan, stream)
        return Run(out, s, self.rt.launches[before:])
