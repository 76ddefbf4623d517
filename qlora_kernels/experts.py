"""The ops of a stack of 4-bit weights, one an expert, on rows that are sorted by expert.

``experts_linear_4bit`` is ``linear_4bit`` on the slice of each expert that got rows, in one node of
the graph: nothing is saved for an expert that got none, and a compiler sees one op whatever the
router decides. No expert's weight is written out here; what a device's ``linear_4bit`` does with
one (large M on CUDA decodes it into a buffer) is done for one expert at a time.

A stack is the run ``packed ... nested_offset`` of :mod:`qlora_kernels.ops` with a dimension more in
front, E experts, each quantized by itself::

    packed         uint8 [E, (N K + 1) // 2]
    absmax         fp32, uint8 or int8 [E, blocks]
    codebook       fp32 [16], of all
    nested_absmax  fp32 [E, ceil(blocks / 256)] | None
    nested_code    fp32 [256] | None, of all
    nested_offset  fp32 [E] | None

Rows ``ends[e - 1] ... ends[e]`` of x belong to expert e. Rows from ``ends[-1]`` on belong to none
(expert parallelism sends such): their y and dx are 0. The host reads ``ends``: one wait a call.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import ops
from .ops import NAMESPACE

_WEIGHT = ops._WEIGHT
SCHEMAS = (
    f"experts_linear_4bit(Tensor x, Tensor ends, {_WEIGHT}, SymInt out_features, Tensor? bias, "
    "Tensor? lora_a, Tensor? lora_b, float scaling, ScalarType compute_dtype) -> (Tensor, Tensor)",
    f"experts_linear_4bit_backward(Tensor dy, Tensor ends, {_WEIGHT}, SymInt in_features, "
    "Tensor? x, Tensor? lora_a, Tensor? lora_b, Tensor? s, float scaling, "
    "ScalarType compute_dtype, ScalarType dx_dtype, bool need_dx, bool need_da, bool need_db) "
    "-> (Tensor, Tensor, Tensor)",
)
_LIB = torch.library.Library(NAMESPACE, "FRAGMENT")
for _schema in SCHEMAS:
    _LIB.define(_schema)


def experts_linear_4bit(
    x: Tensor,
    ends: Tensor,
    weight: ops.WeightArgs,
    out_features: int,
    bias: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scaling: float = 1.0,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """``y = x W_e^T + b_e + scaling (x A_e^T) B_e^T``, e the expert of each row.

    Args:
        x: ``[S, K]`` fp32, bf16 or fp16, sorted by expert.
        ends: int64 ``[E]``, where each expert's rows end; not decreasing, at most S.
        weight: the stack, ``packed ... nested_offset``; see the module.
        bias: ``[E, N]``.
        lora_a, lora_b: ``[E, r, K]`` and ``[E, N, r]``, both or neither.
        compute_dtype: as in :class:`~qlora_kernels.nn.Linear4bit`; x's dtype by default.

    Returns:
        ``[S, N]`` in x's dtype. Gradients go to x, bias, A and B; an expert without rows gets 0.

    Raises:
        ValueError: shapes that do not go together; the argument is named.
        TypeError: a dtype that is not offered.
    """
    dtype = compute_dtype or x.dtype
    args = (x, ends, *weight, out_features, bias, lora_a, lora_b, scaling, dtype)
    return torch.ops.qlora_kernels.experts_linear_4bit.default(*args)[0]


# --- argument checks ----------------------------------------------------------------------------


def _check(x, ends, packed, n, bias, lora_a, lora_b, compute_dtype) -> None:
    ops.check_float("x", x)
    ops.check_dtype("compute_dtype", compute_dtype)
    if x.dim() != 2:
        raise ValueError(f"x must be [rows, in_features], got {list(x.shape)}")
    if ends.dtype != torch.int64 or ends.dim() != 1:
        raise ValueError(f"ends must be int64 [experts], got {ends.dtype} {list(ends.shape)}")
    experts, k = ends.shape[0], x.shape[1]
    size = (n * k + 1) // 2
    if packed.dim() != 2 or packed.shape[0] != experts or packed.shape[1] != size:
        raise ValueError(
            f"packed must be [{experts}, {size}] for {experts} weights [{n}, {k}], "
            f"got {list(packed.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (experts, n):
        raise ValueError(f"bias must be [{experts}, {n}], got {list(bias.shape)}")
    if (lora_a is None) != (lora_b is None):
        raise ValueError("give both lora_a and lora_b, or neither")
    if lora_a is not None:
        rank = lora_a.shape[1] if lora_a.dim() == 3 else 0
        if tuple(lora_a.shape) != (experts, rank, k) or tuple(lora_b.shape) != (experts, n, rank):
            raise ValueError(
                f"lora_a must be [{experts}, rank, {k}] and lora_b [{experts}, {n}, rank], got "
                f"{list(lora_a.shape)} and {list(lora_b.shape)}"
            )


def _ranges(ends: Tensor, rows: int) -> Iterator[tuple[int, int, int]]:
    """``(expert, first row, last row + 1)`` of every expert that got rows."""
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if not start <= end <= rows:
            raise ValueError(f"ends[{expert}] is {end}, not in {start} ... {rows}")
        if start < end:
            yield expert, start, end
        start = end


def _of(stack: tuple[Any, ...], e: int) -> tuple[Any, ...]:
    """The weight of expert ``e``."""
    packed, absmax, codebook, blocksize, nested_absmax, nested_code, nested_offset = stack
    return (
        packed[e],
        absmax[e],
        codebook,
        blocksize,
        None if nested_absmax is None else nested_absmax[e],
        nested_code,
        None if nested_offset is None else nested_offset[e],
    )


# --- forward and backward: a loop over linear_4bit ----------------------------------------------


def _forward(x, ends, *args) -> tuple[Tensor, Tensor]:
    stack, (n, bias, lora_a, lora_b, scaling, compute_dtype) = args[:7], args[7:]
    _check(x, ends, stack[0], n, bias, lora_a, lora_b, compute_dtype)
    linear = torch.ops.qlora_kernels.linear_4bit.default
    y = x.new_empty([x.shape[0], n])
    rank = 0 if lora_a is None else lora_a.shape[1]
    s = x.new_empty([x.shape[0], rank], dtype=torch.float32)
    end = 0
    for e, start, end in _ranges(ends, x.shape[0]):
        lora = (None, None) if lora_a is None else (lora_a[e], lora_b[e])
        b = None if bias is None else bias[e]
        y_e, s_e = linear(x[start:end], *_of(stack, e), n, b, *lora, None, scaling, compute_dtype)
        y[start:end] = y_e
        if rank:
            s[start:end] = s_e
    y[end:] = 0
    s[end:] = 0
    return y, s


def _backward_op(dy, ends, *args) -> tuple[Tensor, Tensor, Tensor]:
    stack, (k, x, lora_a, lora_b, s, scaling, compute_dtype, dx_dtype, *need) = args[:7], args[7:]
    need_dx, need_da, need_db = need
    linear_backward = torch.ops.qlora_kernels.linear_4bit_backward.default
    dx = dy.new_empty([dy.shape[0], k] if need_dx else [0], dtype=dx_dtype)
    da = torch.zeros_like(lora_a) if need_da else dy.new_empty([0])
    db = torch.zeros_like(lora_b) if need_db else dy.new_empty([0])
    end = 0
    for e, start, end in _ranges(ends, dy.shape[0]):
        rows = slice(start, end)
        dx_e, da_e, db_e, _ = linear_backward(
            dy[rows],
            *_of(stack, e),
            k,
            None if x is None else x[rows],
            None if lora_a is None else lora_a[e],
            None if lora_b is None else lora_b[e],
            None if s is None else s[rows],
            scaling,
            compute_dtype,
            dx_dtype,
            need_dx,
            need_da,
            need_db,
        )
        if need_dx:
            dx[rows] = dx_e
        if need_da:
            da[e] = da_e
        if need_db:
            db[e] = db_e
    if need_dx:
        dx[end:] = 0
    return dx, da, db


_LIB.impl("experts_linear_4bit", _forward, "CompositeExplicitAutograd")
_LIB.impl("experts_linear_4bit_backward", _backward_op, "CompositeExplicitAutograd")


@torch.library.register_fake(f"{NAMESPACE}::experts_linear_4bit")
def _(x, ends, *args):
    n, bias, lora_a, lora_b, _, compute_dtype = args[7:]
    _check(x, ends, args[0], n, bias, lora_a, lora_b, compute_dtype)
    rank = 0 if lora_a is None else lora_a.shape[1]
    rows = x.shape[0]
    return x.new_empty([rows, n]), x.new_empty([rows, rank], dtype=torch.float32)


@torch.library.register_fake(f"{NAMESPACE}::experts_linear_4bit_backward")
def _(dy, ends, *args):
    k, _, lora_a, lora_b, _, _, _, dx_dtype, need_dx, need_da, need_db = args[7:]
    return (
        dy.new_empty([dy.shape[0], k] if need_dx else [0], dtype=dx_dtype),
        torch.empty_like(lora_a) if need_da else dy.new_empty([0]),
        torch.empty_like(lora_b) if need_db else dy.new_empty([0]),
    )


# --- autograd, by formula -----------------------------------------------------------------------


def _setup_context(ctx, inputs, output) -> None:
    x, ends, stack = inputs[0], inputs[1], inputs[2:9]
    _, bias, lora_a, lora_b, scaling, compute_dtype = inputs[9:]
    _, s = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(s)
    need_a = lora_a is not None and lora_a.requires_grad
    need_b = lora_b is not None and lora_b.requires_grad
    ctx.save_for_backward(
        ends,
        *(t for i, t in enumerate(stack) if i != 3),
        x if need_a else None,
        lora_a,
        lora_b,
        s if need_b else None,
    )
    ctx.blocksize, ctx.scaling, ctx.compute_dtype = stack[3], scaling, compute_dtype
    ctx.x_dtype, ctx.in_features = x.dtype, x.shape[1]
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.need = (
        x.requires_grad,
        need_a,
        need_b,
        bias is not None and bias.requires_grad,
    )


def _backward(ctx, dy, _ds):
    ends, packed, absmax, codebook, *nested, x, lora_a, lora_b, s = ctx.saved_tensors
    need_x, need_a, need_b, need_bias = ctx.need
    dx = da = db = dbias = None
    if dy is not None and (need_x or need_a or need_b):
        stack = (packed, absmax, codebook, ctx.blocksize, *nested)
        args = (ctx.in_features, x, lora_a, lora_b, s, ctx.scaling, ctx.compute_dtype, ctx.x_dtype)
        dx, da, db = torch.ops.qlora_kernels.experts_linear_4bit_backward(
            dy, ends, *stack, *args, need_x, need_a, need_b
        )
    if dy is not None and need_bias:
        expert = torch.searchsorted(ends, torch.arange(dy.shape[0], device=dy.device), right=True)
        sums = dy.new_zeros([ends.shape[0] + 1, dy.shape[1]], dtype=torch.float32)
        dbias = sums.index_add(0, expert, dy.float())[:-1].to(ctx.bias_dtype)
    return (
        dx if need_x else None,
        *(None,) * 9,
        dbias,
        da if need_a else None,
        db if need_b else None,
        None,
        None,
    )


torch.library.register_autograd(
    f"{NAMESPACE}::experts_linear_4bit", _backward, setup_context=_setup_context
)


# --- autocast: as linear_4bit's -----------------------------------------------------------------

_AUTOCAST_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | (
    torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)
)


def _autocast(device_type: str) -> Any:
    def forward(x, *args):
        *rest, _compute_dtype = args
        dtype = torch.get_autocast_dtype(device_type)
        x = x if x.dtype == torch.float64 else x.to(dtype)
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
            return torch.ops.qlora_kernels.experts_linear_4bit(x, *rest, dtype)

    return forward


_LIB.impl("experts_linear_4bit", _autocast("cpu"), "AutocastCPU")
_LIB.impl("experts_linear_4bit", _autocast("cuda"), "AutocastCUDA")
