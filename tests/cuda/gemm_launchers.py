"""The GEMM launchers, called as C++ calls them: launchers.h's structs through ctypes, driven by the
emulator's runtime. What the tests and benchmarks/cuda_gemm.py share."""

from __future__ import annotations

import ctypes
import functools
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from qlora_kernels import formats, reference
from qlora_kernels.emulator import toolchain
from qlora_kernels.emulator.runtime import EmulatedRuntime

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
OPTIONS = ("-std=c++20", "-O3")
FORWARD, INPUT_GRAD = 0, 1
GEMM = 2  # Route::gemm
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


class Plan(ctypes.Structure):
    _fields_ = [
        ("route", _i), ("tile_m", _i), ("tile_n", _i), ("tile_k", _i), ("warps", _i),
        ("stages", _i), ("splits", _i), ("shared_bytes", _i), ("workspace_bytes", _l),
    ]  # fmt: skip


@functools.cache
def library(*sources: str) -> Path:
    """A library of these sources of csrc/cuda, the runtime left to the emulator."""
    objects = [toolchain.compile_object(SOURCES / s, ["sm_80"], OPTIONS) for s in sources]
    folder = Path(tempfile.mkdtemp(prefix="qlk-gemm-"))
    return toolchain.link_library(objects, folder / "gemm.so")


@dataclass
class Quantized:
    """A packed weight and everything that a kernel reads of it."""

    packed: torch.Tensor
    absmax: torch.Tensor  # fp32, or uint8 where nested
    codebook: torch.Tensor
    blocksize: int
    shape: tuple[int, int]
    nested_absmax: torch.Tensor | None = None
    nested_code: torch.Tensor | None = None
    offset: torch.Tensor | None = None

    def scales(self) -> torch.Tensor:
        if self.nested_absmax is None:
            return self.absmax
        return reference.dequantize_absmax(self.absmax, self.nested_absmax, self.offset)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        return reference.dequantize(
            self.packed, self.scales(), self.codebook, self.blocksize, self.shape, dtype
        )


def quantized(
    n: int, k: int, blocksize: int = 64, nested: bool = False, codebook: torch.Tensor | None = None,
    w: torch.Tensor | None = None,
) -> Quantized:  # fmt: skip
    """A random weight, or ``w``, quantized; with ``codebook`` the codes stand for its values."""
    w = torch.randn(n, k) * 0.05 if w is None else w
    packed, absmax = reference.quantize(w, "nf4", blocksize)
    book = formats.get_format("nf4").tensors()[0] if codebook is None else codebook
    q = Quantized(packed, absmax, book.clone(), blocksize, (n, k))
    if nested:
        q.absmax, q.nested_absmax, q.offset = reference.quantize_absmax(absmax)
        q.nested_code = formats.nested_code().clone()
    return q


@dataclass
class Run:
    """One launch: what came out, and what the emulator saw."""

    out: torch.Tensor
    extra: torch.Tensor | None  # S or dS
    launches: list = field(default_factory=list)


def offset_copy(t: torch.Tensor, elements: int) -> torch.Tensor:
    """The same values at an address that many elements further from an aligned one."""
    room = torch.empty(t.numel() + elements, dtype=t.dtype)
    view = room[elements:].view(t.shape)
    view.copy_(t)
    return view


class Launcher:
    """Calls one of the launchers in an `EmulatedRuntime`."""

    def __init__(self, rt: EmulatedRuntime, lib: ctypes.CDLL) -> None:
        self.rt, self.lib = rt, lib
        self.status = 0  # of the last call
        self.out_offset = 0  # elements that results lie beyond an aligned address

    def _pointer(self, t: torch.Tensor | None, name: str) -> int | None:
        return None if t is None else self.rt.pointer(t, name).value

    def _matrix(self, t: torch.Tensor | None, name: str) -> Matrix:
        return Matrix(self._pointer(t, name), 0 if t is None else DTYPES[t.dtype])

    def _weight(self, q: Quantized) -> Weight:
        return Weight(
            self._pointer(q.packed, "packed"), self._pointer(q.codebook, "codebook"),
            FP32 if q.nested_absmax is None else NESTED, self._pointer(q.absmax, "absmax"),
            self._pointer(q.nested_absmax, "nested_absmax"),
            self._pointer(q.nested_code, "nested_code"), self._pointer(q.offset, "offset"),
            q.blocksize.bit_length() - 1, *q.shape,
        )  # fmt: skip

    def _empty(self, shape: Sequence[int], dtype: torch.dtype, offset: int = 0) -> torch.Tensor:
        """Device memory that the checker takes for uninitialised."""
        size = dtype.itemsize
        count = math.prod(shape)
        raw = self.rt.empty(max(1, (offset + count) * size), "uint8")
        flat = torch.from_numpy(raw)[offset * size :][: count * size]
        return flat.view(dtype).view(tuple(shape))

    def _plan(self, tile: Sequence[int], splits: int, workspace: int) -> Plan:
        return Plan(GEMM, *tile, splits, 0, workspace)

    def linear(
        self, q: Quantized, x: torch.Tensor, tile: Sequence[int], splits: int = 1, *,
        bias: torch.Tensor | None = None, a: torch.Tensor | None = None,
        b: torch.Tensor | None = None, s: torch.Tensor | None = None, scaling: float = 1.0,
        y_dtype: torch.dtype | None = None, want_s: bool = True,
    ) -> Run:  # fmt: skip
        m, (n, k) = x.shape[0], q.shape
        rank = 0 if b is None else b.shape[1]
        y = self._empty((m, n), y_dtype or x.dtype, self.out_offset)
        s_out = self._empty((m, rank), torch.float32) if a is not None and want_s else None
        room = workspace_bytes(FORWARD, m, n, k, rank, s is not None, splits)
        workspace = self._empty((room,), torch.uint8)
        problem = LinearProblem(
            self._weight(q), m, rank, self._pointer(x, "x"), DTYPES[x.dtype],
            self._matrix(bias, "bias"), self._matrix(a, "A"), self._matrix(s, "S"),
            self._matrix(b, "B"), scaling, self._pointer(s_out, "s_out"), self._pointer(y, "y"),
            DTYPES[y.dtype], self._pointer(workspace, "workspace"),
        )  # fmt: skip
        return self._run("launch_gemm_linear", problem, tile, splits, room, y, s_out)

    def input_grad(
        self, q: Quantized, dy: torch.Tensor, tile: Sequence[int], splits: int = 1, *,
        a: torch.Tensor | None = None, b: torch.Tensor | None = None, scaling: float = 1.0,
        dx_dtype: torch.dtype | None = None,
    ) -> Run:  # fmt: skip
        m, (n, k) = dy.shape[0], q.shape
        rank = 0 if b is None else b.shape[1]
        dx = self._empty((m, k), dx_dtype or dy.dtype, self.out_offset)
        ds = self._empty((m, rank), torch.float32) if rank else None
        room = workspace_bytes(INPUT_GRAD, m, n, k, rank, False, splits)
        workspace = self._empty((room,), torch.uint8)
        problem = InputGradProblem(
            self._weight(q), m, rank, self._pointer(dy, "dy"), DTYPES[dy.dtype],
            self._matrix(a, "A"), self._matrix(b, "B"), scaling, self._pointer(ds, "dS"),
            self._pointer(dx, "dx"), DTYPES[dx.dtype], self._pointer(workspace, "workspace"),
        )  # fmt: skip
        return self._run("launch_gemm_input_grad", problem, tile, splits, room, dx, ds)

    def _run(self, name, problem, tile, splits, room, out, extra) -> Run:
        kind = type(problem).__name__
        mangled = (
            f"_ZN3qlk4cuda{len(name)}{name}ERKNS0_{len(kind)}{kind}ERKNS0_4PlanEP11CUstream_st"
        )
        before = len(self.rt.launches)
        plan = self._plan(tile, splits, room)
        status = getattr(self.lib, mangled)(ctypes.byref(problem), ctypes.byref(plan), None)
        self.status = status
        return Run(out, extra, self.rt.launches[before:])


def _round_up(x: int, to: int) -> int:
    return -(-x // to) * to


def workspace_bytes(pass_: int, m: int, n: int, k: int, rank: int, given: bool, splits: int) -> int:
    """gemm_tiles.h's arithmetic, once more: the bytes beyond are out of bounds to the checker."""
    out, contraction = (n, k) if pass_ == FORWARD else (k, n)
    total = _round_up(splits * m * out * 4, 256) if splits > 1 else 0
    if rank and not given:
        total += _round_up(-(-contraction // 256) * m * rank * 4, 256)
    if rank:
        total += _round_up(m * _round_up(rank, 64) * 2, 256)
    return total
