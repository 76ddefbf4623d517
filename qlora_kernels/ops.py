"""The torch ops, namespace ``qlora_kernels``: schemas, fakes, autograd, autocast, plain fallback.

Schemas are defined here, once, so that they exist whether or not the native libraries do. These
add kernels to them, for the CPU (``csrc/torch_ops.cpp``) and for CUDA (``csrc/torch_ops_cuda.cpp``,
loaded where torch has CUDA); every other device, and a machine without them, runs the plain torch
implementations below, with one notice.

A packed weight is always the same run of arguments, in this order::

    packed         uint8, any shape, (n + 1) // 2 elements: two codes a byte, earlier value high
    absmax         fp32 [blocks], or uint8 [blocks] when the scales are nested; for research
                   int8 [blocks]: bytes of E8M0, or, with nested_offset, of E4M3 times that
    codebook       fp32 [16]
    blocksize      16 ... 4096
    nested_absmax  fp32 [ceil(blocks / 256)] | None
    nested_code    fp32 [256] | None
    nested_offset  fp32 [1] or [] | None
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import reference
from .formats import NESTED_BLOCKSIZE, blocks, check_blocksize

NAMESPACE = "qlora_kernels"
_WEIGHT = (
    "Tensor packed, Tensor absmax, Tensor codebook, int blocksize, "
    "Tensor? nested_absmax, Tensor? nested_code, Tensor? nested_offset"
)
SCHEMAS = (
    "quantize_4bit(Tensor A, Tensor thresholds, Tensor codes, int blocksize) -> (Tensor, Tensor)",
    # Scales of one byte: E4M3 times tensor_scale, or, without one, E8M0.
    "quantize_4bit_scaled(Tensor A, Tensor thresholds, Tensor codes, int blocksize, "
    "Tensor? tensor_scale) -> (Tensor, Tensor)",
    "quantize_absmax(Tensor absmax, Tensor thresholds, Tensor? offset) -> (Tensor, Tensor, Tensor)",
    f"dequantize_4bit({_WEIGHT}, SymInt[] shape, ScalarType dtype) -> Tensor",
    f"dequantize_4bit.out({_WEIGHT}, *, Tensor(a!) out) -> ()",
    f"linear_4bit(Tensor x, {_WEIGHT}, SymInt out_features, Tensor? bias, Tensor? lora_a, "
    "Tensor? lora_b, Tensor? lora_s, float scaling, ScalarType compute_dtype) -> (Tensor, Tensor)",
    f"linear_4bit_backward(Tensor dy, {_WEIGHT}, SymInt in_features, Tensor? x, Tensor? lora_a, "
    "Tensor? lora_b, Tensor? s, float scaling, ScalarType compute_dtype, ScalarType dx_dtype, "
    "bool need_dx, bool need_da, bool need_db) -> (Tensor, Tensor, Tensor, Tensor)",
    # One step of AdamW in place (optim.py has its formulas, and calls this on CUDA). States are
    # fp32, or uint8 with `maps` and an absmax for each 256 values. Scalars: beta1, 1 - beta1,
    # beta2, 1 - beta2, decay, step_size, scale_v, eps. `paged`: states lie in managed memory.
    "adamw_(Tensor(a!)[] p, Tensor[] grad, Tensor(b!)[] state1, Tensor(c!)[] state2, "
    "Tensor(d!)[] absmax1, Tensor(e!)[] absmax2, Tensor? maps, float[] scalars, bool paged) -> ()",
)
_LIB = torch.library.Library(NAMESPACE, "DEF")
for _schema in SCHEMAS:
    _LIB.define(_schema)

FLOATS = (torch.float32, torch.bfloat16, torch.float16)

WeightArgs = tuple[
    Tensor, Tensor, Tensor, int, Tensor | None, Tensor | None, Tensor | None
]  # packed ... nested_offset


# --- argument checks: before any work, in words -------------------------------------------------


def check_dtype(name: str, dtype: torch.dtype) -> None:
    if dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, bfloat16 or float16, got {dtype}")


def check_float(name: str, t: Tensor) -> None:
    check_dtype(name, t.dtype)


def check_weight(weight: WeightArgs, count: int) -> None:
    """Raise unless ``weight`` (``packed ... nested_offset``) holds exactly ``count`` values."""
    packed, absmax, codebook, blocksize, nested_absmax, nested_code, nested_offset = weight
    check_blocksize(blocksize)
    if packed.dtype != torch.uint8:
        raise TypeError(f"packed must be uint8, got {packed.dtype}")
    if packed.numel() != (count + 1) // 2:
        raise ValueError(
            f"packed holds {packed.numel()} bytes, but {count} values need {(count + 1) // 2}: "
            "the shape does not belong to these bytes"
        )
    if codebook.dtype != torch.float32 or codebook.numel() != 16:
        raise ValueError(
            f"codebook must be float32 with 16 values, got {codebook.dtype} with {codebook.numel()}"
        )
    need = blocks(count, blocksize)
    if absmax.numel() != need:
        raise ValueError(
            f"absmax holds {absmax.numel()} scales, but {count} values in blocks of {blocksize} "
            f"need {need}"
        )
    if absmax.dtype == torch.float32:
        return
    if absmax.dtype == torch.int8:
        if nested_offset is not None and nested_offset.dtype != torch.float32:
            raise ValueError(f"nested_offset must be float32, got {nested_offset.dtype}")
        return
    if absmax.dtype != torch.uint8:
        raise TypeError(
            "absmax must be float32, uint8 with nested scales, or int8 (E8M0 bytes; E4M3 bytes "
            f"with nested_offset), got {absmax.dtype}"
        )
    if nested_absmax is None or nested_code is None or nested_offset is None:
        raise ValueError(
            "absmax is uint8 (double quantized), so nested_absmax, nested_code and nested_offset "
            "must be given"
        )
    groups = blocks(need, NESTED_BLOCKSIZE)
    for name, t, size in (
        ("nested_absmax", nested_absmax, groups),
        ("nested_code", nested_code, 256),
        ("nested_offset", nested_offset, 1),
    ):
        if t.dtype != torch.float32 or t.numel() != size:
            raise ValueError(
                f"{name} must be float32 with {size} values, got {t.dtype} with {t.numel()}"
            )


def _check_devices(x: Tensor, **tensors: Tensor | None) -> None:
    for name, t in tensors.items():
        if t is not None and t.device != x.device:
            raise ValueError(f"{name} is on {t.device}, but x is on {x.device}")


def _check_linear(x: Tensor, n: int, bias, lora_a, lora_b, lora_s, compute_dtype) -> None:
    check_float("x", x)
    check_dtype("compute_dtype", compute_dtype)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have a last dimension of in_features, got {tuple(x.shape)}")
    _check_devices(x, bias=bias, lora_a=lora_a, lora_b=lora_b, lora_s=lora_s)
    k = x.shape[-1]
    if bias is not None:
        check_float("bias", bias)
        if tuple(bias.shape) != (n,):
            raise ValueError(f"bias must be [{n}], got {list(bias.shape)}")
    if lora_b is None:
        if lora_a is not None or lora_s is not None:
            raise ValueError("lora_a or lora_s was given without lora_b")
        return
    if (lora_a is None) == (lora_s is None):
        raise ValueError("with lora_b, give exactly one of lora_a and lora_s")
    check_float("lora_b", lora_b)
    if lora_b.dim() != 2 or lora_b.shape[0] != n:
        raise ValueError(f"lora_b must be [{n}, rank], got {list(lora_b.shape)}")
    rank = lora_b.shape[1]
    if lora_a is not None:
        check_float("lora_a", lora_a)
        if lora_a.dim() != 2 or tuple(lora_a.shape) != (rank, k):
            raise ValueError(
                f"lora_a must be [rank, in_features] = [{rank}, {k}] to go with lora_b "
                f"{list(lora_b.shape)}, got {list(lora_a.shape)}"
            )
    else:
        check_float("lora_s", lora_s)
        if tuple(lora_s.shape) != (*x.shape[:-1], rank):
            raise ValueError(
                f"lora_s must be {[*x.shape[:-1], rank]} (x's leading dimensions, rank), "
                f"got {list(lora_s.shape)}"
            )


def check_linear(
    x: Tensor, weight: WeightArgs, n: int, bias, lora_a, lora_b, lora_s, compute_dtype: torch.dtype
) -> None:
    """Raise, naming the argument, unless a linear layer's arguments go together.

    ``weight`` is ``(packed, ..., nested_offset)``; devices are compared too.
    """
    _check_linear(x, n, bias, lora_a, lora_b, lora_s, compute_dtype)
    _check_devices(x, packed=weight[0], absmax=weight[1])
    packed, count = weight[0], n * x.shape[-1]
    if packed.numel() != (count + 1) // 2:
        raise ValueError(
            f"x has {x.shape[-1]} features, but the packed weight holds {packed.numel()} bytes, "
            f"not the {(count + 1) // 2} of a [{n}, {x.shape[-1]}] weight"
        )
    check_weight(weight, count)


# --- plain torch: any device, and the shape of every result -------------------------------------


def _scales(absmax, nested_absmax, nested_code, nested_offset) -> Tensor:
    if absmax.dtype == torch.float32:
        return absmax
    if absmax.dtype == torch.int8:
        return reference.byte_scales(absmax, nested_offset)
    return reference.dequantize_absmax(
        absmax, nested_absmax, nested_offset.reshape(()), nested_code
    )


def _plain_dequantize(
    packed, absmax, codebook, blocksize, nested_absmax, nested_code, nested_offset, shape, dtype
) -> Tensor:
    count = torch.Size(shape).numel()
    weight = (packed, absmax, codebook, blocksize, nested_absmax, nested_code, nested_offset)
    check_weight(weight, count)
    check_dtype("dtype", dtype)
    _notice(packed)
    packed = packed.reshape(-1)
    q = torch.stack([packed >> 4, packed & 15], 1).view(-1)
    scales = _scales(absmax.reshape(-1), nested_absmax, nested_code, nested_offset)
    values = codebook[q.long()]
    pad = blocks(count, blocksize) * blocksize - values.numel()
    values = torch.nn.functional.pad(values, (0, max(pad, 0)))[: scales.numel() * blocksize]
    values = values.view(-1, blocksize) * scales[:, None]
    return values.to(dtype).view(-1)[:count].view(list(shape))


def _plain_dequantize_out(
    packed, absmax, codebook, blocksize, nested_absmax, nested_code, nested_offset, *, out
) -> None:
    out.copy_(
        _plain_dequantize(
            packed,
            absmax,
            codebook,
            blocksize,
            nested_absmax,
            nested_code,
            nested_offset,
            out.shape,
            out.dtype,
        )
    )


def _check_quantize(a: Tensor, blocksize: int) -> None:
    check_float("A", a)
    check_blocksize(blocksize)
    if a.numel() == 0:
        raise ValueError(f"A is empty (shape {list(a.shape)}): nothing to quantize")


def _plain_quantize(a, thresholds, codes, blocksize) -> tuple[Tensor, Tensor]:
    _check_quantize(a, blocksize)
    _notice(a)
    normalized, absmax = reference.normalize(a, blocksize)
    return reference.pack(codes[torch.bucketize(normalized, thresholds)]), absmax


def _plain_quantize_scaled(a, thresholds, codes, blocksize, tensor_scale) -> tuple[Tensor, Tensor]:
    _check_quantize(a, blocksize)
    normalized, scales = reference.normalize_scaled(a, blocksize, tensor_scale)
    return reference.pack(codes[torch.bucketize(normalized, thresholds)]), scales


def _plain_quantize_absmax(absmax, thresholds, offset) -> tuple[Tensor, Tensor, Tensor]:
    if absmax.dtype != torch.float32 or absmax.dim() != 1 or absmax.numel() == 0:
        raise ValueError(
            f"absmax must be float32 [blocks], got {absmax.dtype} {list(absmax.shape)}"
        )
    given = None if offset is None else offset.cpu().reshape(())
    q, nested, mean = reference.quantize_absmax(absmax.cpu(), given, thresholds.cpu())
    out = (q.to(absmax.device), nested.to(absmax.device), mean.to(absmax.device))
    return (out[0], out[1], out[2].clone())


def _plain_linear(
    x,
    packed,
    absmax,
    codebook,
    blocksize,
    nested_absmax,
    nested_code,
    nested_offset,
    out_features,
    bias,
    lora_a,
    lora_b,
    lora_s,
    scaling,
    compute_dtype,
) -> tuple[Tensor, Tensor]:
    weight = (packed, absmax, codebook, blocksize, nested_absmax, nested_code, nested_offset)
    check_linear(x, weight, out_features, bias, lora_a, lora_b, lora_s, compute_dtype)
    k = x.shape[-1]
    w = _plain_dequantize(*weight, [out_features, k], compute_dtype)
    xc = x.reshape(-1, k).to(compute_dtype)
    y = torch.nn.functional.linear(xc, w, None if bias is None else bias.to(compute_dtype))
    s = x.new_empty(0, dtype=torch.float32)
    if lora_b is not None:
        if lora_a is not None:
            s = (xc @ lora_a.to(compute_dtype).T).float()
            lora_s = s
        y = y + scaling * (
            lora_s.reshape(-1, lora_b.shape[1]).to(compute_dtype) @ lora_b.to(compute_dtype).T
        )
    return y.to(x.dtype).view(*x.shape[:-1], out_features), s


def _plain_linear_backward(
    dy,
    packed,
    absmax,
    codebook,
    blocksize,
    nested_absmax,
    nested_code,
    nested_offset,
    in_features,
    x,
    lora_a,
    lora_b,
    s,
    scaling,
    compute_dtype,
    dx_dtype,
    need_dx,
    need_da,
    need_db,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weight = (packed, absmax, codebook, blocksize, nested_absmax, nested_code, nested_offset)
    n = dy.shape[-1]
    dyc = dy.reshape(-1, n).to(compute_dtype)
    dx = da = db = ds = None
    if need_dx:
        dx = dyc @ _plain_dequantize(*weight, [n, in_features], compute_dtype)
    if lora_b is not None:
        ds = scaling * (dyc @ lora_b.to(compute_dtype))
        if need_dx and lora_a is not None:
            dx = dx + ds @ lora_a.to(compute_dtype)
        if need_da:
            xc = x.reshape(-1, in_features).to(compute_dtype)
            da = (ds.T @ xc).to(lora_a.dtype)
        if need_db:
            rank = lora_b.shape[1]
            db = (scaling * (dyc.T @ s.reshape(-1, rank).to(compute_dtype))).to(lora_b.dtype)
        ds = ds.float()
    empty = dy.new_empty(0)
    if dx is not None:
        dx = dx.to(dx_dtype).view(*dy.shape[:-1], in_features)
    return tuple(empty.clone() if t is None else t for t in (dx, da, db, ds))  # type: ignore


_NOTICED: set[str] = set()


def _notice(t: Tensor) -> None:
    """Say once a device type that its kernels are plain torch here."""
    kind = t.device.type
    if kind in _NOTICED or kind == "meta" or torch.compiler.is_compiling():
        return
    _NOTICED.add(kind)
    if kind == "cpu":
        why = f"the native library is not there ({LIBRARY_ERROR or 'not built'})"
    elif kind == "cuda":
        why = f"the CUDA kernels are not there ({CUDA_LIBRARY_ERROR or 'not built'})"
    else:
        why = f"there are no kernels for '{kind}' devices"
    warnings.warn(f"qlora_kernels runs in plain torch: {why}; correct, but slow", stacklevel=3)


PLAIN: dict[str, Callable[..., Any]] = {
    "quantize_4bit": _plain_quantize,
    "quantize_4bit_scaled": _plain_quantize_scaled,
    "quantize_absmax": _plain_quantize_absmax,
    "dequantize_4bit": _plain_dequantize,
    "dequantize_4bit.out": _plain_dequantize_out,
    "linear_4bit": _plain_linear,
    "linear_4bit_backward": _plain_linear_backward,
}
"""The ops that every backend has, by name, in plain torch."""
for _name, _fn in PLAIN.items():
    _LIB.impl(_name, _fn, "CompositeExplicitAutograd")


# --- the native library -------------------------------------------------------------------------

LIBRARY_ERROR: str | None = None
"""Why the native library was not loaded, or None when it was."""


def library_path() -> Path:
    """Where the native library is, or would be; ``QLORA_KERNELS_OPS`` names another file."""
    chosen = os.environ.get("QLORA_KERNELS_OPS")
    return Path(chosen) if chosen else Path(__file__).with_name("_ops.abi3.so")


def _load(path: Path, build: str) -> str | None:
    """Why a library of ops could not be loaded, or None; ``build``: the command that makes it."""
    if not path.exists():
        return f"{path} does not exist; build it with `{build}`"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path}: {error}"
    return None


LIBRARY_ERROR = _load(library_path(), "pip install .")
if LIBRARY_ERROR and os.environ.get("QLORA_KERNELS_OPS"):
    raise ImportError(f"QLORA_KERNELS_OPS: {LIBRARY_ERROR}")


CUDA_LIBRARY_ERROR: str | None = None
"""Why the CUDA kernels were not loaded, or None when they were."""


def cuda_library_path() -> Path:
    """Where the CUDA half is, or would be; ``QLORA_KERNELS_CUDA_OPS`` names another file."""
    chosen = os.environ.get("QLORA_KERNELS_CUDA_OPS")
    return Path(chosen) if chosen else Path(__file__).with_name("_ops_cuda.abi3.so")


def _load_cuda_library() -> str | None:
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    return _load(cuda_library_path(), "QLORA_KERNELS_CUDA=1 pip install --no-build-isolation .")


CUDA_LIBRARY_ERROR = _load_cuda_library()
if CUDA_LIBRARY_ERROR is None:
    from . import cuda

    cuda.watch()


# --- fakes: shapes and dtypes without data ------------------------------------------------------


@torch.library.register_fake(f"{NAMESPACE}::quantize_4bit")
def _(a, thresholds, codes, blocksize):
    n = a.numel()
    return (
        a.new_empty([(n + 1) // 2], dtype=torch.uint8),
        a.new_empty([(n + blocksize - 1) // blocksize], dtype=torch.float32),
    )


@torch.library.register_fake(f"{NAMESPACE}::quantize_4bit_scaled")
def _(a, thresholds, codes, blocksize, tensor_scale):
    n = a.numel()
    return (
        a.new_empty([(n + 1) // 2], dtype=torch.uint8),
        a.new_empty([(n + blocksize - 1) // blocksize], dtype=torch.int8),
    )


@torch.library.register_fake(f"{NAMESPACE}::quantize_absmax")
def _(absmax, thresholds, offset):
    n = absmax.numel()
    return (
        absmax.new_empty([n], dtype=torch.uint8),
        absmax.new_empty([(n + NESTED_BLOCKSIZE - 1) // NESTED_BLOCKSIZE]),
        absmax.new_empty([]),
    )


@torch.library.register_fake(f"{NAMESPACE}::dequantize_4bit")
def _(packed, absmax, codebook, blocksize, nested_absmax, nested_code, nested_offset, shape, dtype):
    return packed.new_empty(shape, dtype=dtype)


@torch.library.register_fake(f"{NAMESPACE}::dequantize_4bit.out")
def _(packed, absmax, codebook, blocksize, nested_absmax, nested_code, nested_offset, *, out):
    return None


@torch.library.register_fake(f"{NAMESPACE}::adamw_")
def _(p, grad, state1, state2, absmax1, absmax2, maps, scalars, paged):
    return None


@torch.library.register_fake(f"{NAMESPACE}::linear_4bit")
def _(
    x,
    packed,
    absmax,
    codebook,
    blocksize,
    nested_absmax,
    nested_code,
    nested_offset,
    out_features,
    bias,
    lora_a,
    lora_b,
    lora_s,
    scaling,
    compute_dtype,
):
    _check_linear(x, out_features, bias, lora_a, lora_b, lora_s, compute_dtype)
    _check_devices(x, packed=packed, absmax=absmax)  # a weight left on meta would give no values
    y = x.new_empty([*x.shape[:-1], out_features])
    rows = y.numel() // out_features
    size = [rows, lora_a.shape[0]] if lora_a is not None else [0]
    return y, x.new_empty(size, dtype=torch.float32)


@torch.library.register_fake(f"{NAMESPACE}::linear_4bit_backward")
def _(
    dy,
    packed,
    absmax,
    codebook,
    blocksize,
    nested_absmax,
    nested_code,
    nested_offset,
    in_features,
    x,
    lora_a,
    lora_b,
    s,
    scaling,
    compute_dtype,
    dx_dtype,
    need_dx,
    need_da,
    need_db,
):
    n = dy.shape[-1]
    rows = dy.numel() // n
    lora = lora_b is not None
    dx = dy.new_empty([*dy.shape[:-1], in_features] if need_dx else [0], dtype=dx_dtype)
    if not need_dx:
        dx = dy.new_empty([0])
    da = torch.empty_like(lora_a) if lora and need_da else dy.new_empty([0])
    db = torch.empty_like(lora_b) if lora and need_db else dy.new_empty([0])
    if lora:
        ds = dy.new_empty([rows, lora_b.shape[1]], dtype=torch.float32)
    else:
        ds = dy.new_empty([0])
    return dx, da, db, ds


# --- autograd, by formula -----------------------------------------------------------------------

_N_WEIGHT = 7  # packed ... nested_offset


def _setup_context(ctx, inputs, output) -> None:
    x, weight = inputs[0], inputs[1 : 1 + _N_WEIGHT]
    _, bias, lora_a, lora_b, lora_s, scaling, compute_dtype = inputs[1 + _N_WEIGHT :]
    _, s = output
    ctx.set_materialize_grads(False)
    need_a = lora_a is not None and lora_a.requires_grad
    need_b = lora_b is not None and lora_b.requires_grad
    kept_s = (s if lora_a is not None else lora_s) if need_b else None
    ctx.save_for_backward(
        x if need_a else None,
        *(w for w in weight if isinstance(w, Tensor) or w is None),
        lora_a,
        lora_b,
        kept_s,
    )
    ctx.mark_non_differentiable(s)
    ctx.blocksize, ctx.scaling, ctx.compute_dtype = weight[3], scaling, compute_dtype
    ctx.x_dtype, ctx.in_features = x.dtype, x.shape[-1]
    ctx.bias_dtype = bias.dtype if bias is not None else None
    ctx.s_meta = (lora_s.dtype, lora_s.shape) if lora_s is not None else None
    ctx.need = (
        x.requires_grad,
        need_a,
        need_b,
        bias is not None and bias.requires_grad,
        lora_s is not None and lora_s.requires_grad,
    )


def _backward(ctx, dy, _ds):
    none = (None,) * (1 + _N_WEIGHT + 7)
    if dy is None:
        return none
    x, packed, absmax, codebook, n_absmax, n_code, n_offset, lora_a, lora_b, s = ctx.saved_tensors
    need_x, need_a, need_b, need_bias, need_s = ctx.need
    dx = da = db = ds = dbias = None
    if need_x or need_a or need_b or need_s:
        lora = lora_b is not None
        dx, da, db, ds = torch.ops.qlora_kernels.linear_4bit_backward(
            dy,
            packed,
            absmax,
            codebook,
            ctx.blocksize,
            n_absmax,
            n_code,
            n_offset,
            ctx.in_features,
            x,
            lora_a,
            lora_b,
            s,
            ctx.scaling,
            ctx.compute_dtype,
            ctx.x_dtype,
            need_x,
            lora and need_a,
            lora and need_b,
        )
    if need_bias:
        rows = dy.reshape(-1, dy.shape[-1])
        dbias = rows.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    if need_s and ds is not None:
        dtype, shape = ctx.s_meta
        ds = ds.to(dtype).view(shape)
    return (
        dx if need_x else None,
        *(None,) * _N_WEIGHT,
        None,
        dbias,
        da if need_a else None,
        db if need_b else None,
        ds if need_s else None,
        None,
        None,
    )


torch.library.register_autograd(
    f"{NAMESPACE}::linear_4bit", _backward, setup_context=_setup_context
)


# --- autocast: as torch.nn.functional.linear ----------------------------------------------------


def _autocast(device_type: str):
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
        torch._C.DispatchKey.AutocastCUDA
    )

    def linear(x, *args):
        # What F.linear would cast is cast: x (so the result), and the dtype of the sums. bias, A
        # and B are rounded to it inside the op, and keep their own dtype for their gradients.
        *rest, _compute_dtype = args
        dtype = torch.get_autocast_dtype(device_type)
        if x.dtype != torch.float64:
            x = x.to(dtype)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return torch.ops.qlora_kernels.linear_4bit(x, *rest, dtype)

    return linear


_LIB.impl("linear_4bit", _autocast("cpu"), "AutocastCPU")
_LIB.impl("linear_4bit", _autocast("cuda"), "AutocastCUDA")
