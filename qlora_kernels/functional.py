"""quantize, dequantize and 4-bit linear with bitsandbytes' names, signatures and state.

The functions here take and give a :class:`QuantState`, whose fields have bitsandbytes' names; the
torch ops underneath (:mod:`qlora_kernels.ops`) take plain tensors. docs/bnb-api.md has a table of
the names and of what differs.
"""

from __future__ import annotations

import copy
import json
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import formats, ops, reference
from .formats import Format, FormatError, get_format
from .maps import (
    create_dynamic_map,
    create_fp8_map,
    create_linear_map,
    create_normal_map,
    get_4bit_type,
    quantize_codes,
)

_DTYPES = {str(d).removeprefix("torch."): d for d in ops.FLOATS}
# The key of a state's JSON: bitsandbytes' for what bitsandbytes reads, else one of our own.
PEER_STATE, OWN_STATE = "quant_state.bitsandbytes__", "quant_state.qlora_kernels__"
PEER_FORMATS, PEER_BLOCKSIZES = (formats.NF4, formats.FP4), formats.BLOCKSIZES[1:]


@dataclass(eq=False)
class QuantState:
    """What is needed to read a packed weight back; field names are bitsandbytes'.

    Args:
        absmax: fp32 ``[blocks]``; uint8 ``[blocks]`` when nested; int8 ``[blocks]``, the bytes of a
            format whose scales are E8M0 or E4M3.
        shape: the weight's shape.
        code: the codebook, fp32 ``[16]`` (for ``state2``: the 8-bit code, fp32 ``[256]``).
        blocksize: values (for ``state2``: scales) that share one scale.
        quant_type: the format's name; None for what :func:`quantize_blockwise` gives.
        dtype: what the weight was, and what it dequantizes to by default.
        offset: fp32 scalar, the mean that was taken off the scales when nested; the tensor's scale
            with E4M3.
        state2: the nested scales' own state; only when nested.
    """

    absmax: Tensor
    shape: torch.Size | None = None
    code: Tensor | None = None
    blocksize: int = None  # type: ignore[assignment]  # as in bitsandbytes: give it
    quant_type: str | None = None
    dtype: torch.dtype | None = None
    offset: Tensor | None = None
    state2: QuantState | None = None

    @property
    def nested(self) -> bool:
        """Whether the scales are double quantized."""
        return self.state2 is not None

    def __getattr__(self, name: str) -> Any:
        # FSDP looks a state dict's key up by getattr: "weight.quant_state.bitsandbytes__nf4".
        if name.startswith(("bitsandbytes__", "qlora_kernels__")):
            packed = self.as_dict(packed=True)
            if f"quant_state.{name}" in packed:
                return packed[f"quant_state.{name}"]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __getitem__(self, index: Any) -> Any:
        """By place, as when a state was a list: absmax, shape, dtype, blocksize, ``[offset,
        state2]`` or None, quant_type."""
        nested = [self.offset, self.state2] if self.nested else None
        fields = [self.absmax, self.shape, self.dtype, self.blocksize, nested, self.quant_type]
        return fields[index]

    def __eq__(self, other: object) -> bool:
        """Whether both mean the same; scales and codes may differ by 1e-6."""
        if not isinstance(other, QuantState):
            return False

        def close(a: Any, b: Any) -> bool:
            if a is None or b is None:
                return a is b
            return a.shape == b.shape and torch.allclose(a.float(), b.float(), atol=1e-6)

        return (
            (self.shape, self.dtype, self.blocksize, self.quant_type)
            == (other.shape, other.dtype, other.blocksize, other.quant_type)
            and close(self.absmax, other.absmax)
            and close(self.code, other.code)
            and close(self.offset, other.offset)
            and self.state2 == other.state2
        )

    __hash__ = None  # type: ignore[assignment]

    def weight_args(
        self,
    ) -> tuple[Tensor, Tensor, int, Tensor | None, Tensor | None, Tensor | None]:
        """``absmax ... nested_offset``, what every op takes after the packed bytes."""
        assert self.code is not None
        if self.state2 is None:
            return self.absmax, self.code, self.blocksize, None, None, self.offset
        nested = self.state2
        return self.absmax, self.code, self.blocksize, nested.absmax, nested.code, self.offset

    def to(self, device: torch.device | str) -> QuantState:
        """Moves every tensor to ``device``, in place; returns itself."""
        self.absmax = self.absmax.to(device)
        if self.code is not None:
            self.code = self.code.to(device)
        if self.offset is not None:
            self.offset = self.offset.to(device)
        if self.state2 is not None:
            self.state2.to(device)
        return self

    def moved(self, device: torch.device | str) -> QuantState:
        """The same on ``device``; this one stays as it is."""
        new = copy.copy(self)
        new.state2 = copy.copy(self.state2)
        return new.to(device)

    def scales(self) -> Tensor:
        """fp32 ``[blocks]``: the scales, nested ones decoded."""
        _, _, _, nested_absmax, nested_code, offset = self.weight_args()
        return ops._scales(self.absmax, nested_absmax, nested_code, offset)

    def as_dict(self, packed: bool = False) -> dict[str, Any]:
        """The state as bitsandbytes writes it: tensors and, ``packed``, one JSON uint8 tensor (see
        :func:`checkpoint_entries`)."""
        if packed and self.quant_type is not None:
            return dict(checkpoint_entries(self))
        d: dict[str, Any] = {
            "quant_type": self.quant_type,
            "absmax": self.absmax,
            "blocksize": self.blocksize,
            "quant_map": self.code,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": None if self.shape is None else tuple(self.shape),
        }
        if self.state2 is not None:
            assert self.offset is not None and self.state2.code is not None
            d.update(
                nested_absmax=self.state2.absmax,
                nested_blocksize=self.state2.blocksize,
                nested_quant_map=self.state2.code.clone(),
                nested_dtype=str(self.state2.dtype).removeprefix("torch."),
                nested_offset=self.offset.item(),
            )
        elif self.offset is not None:
            d["tensor_scale"] = self.offset.item()
        return d

    @classmethod
    def from_dict(cls, qs_dict: dict[str, Any], device: torch.device | str = "cpu") -> QuantState:
        """The state from :meth:`as_dict`'s form, keys with or without a prefix.

        Raises:
            ValueError: the JSON is missing, is not JSON, lacks a key, names an unknown format,
                dtype or blocksize, or does not agree with the sizes of the tensors.
        """
        d = {}
        for key, value in qs_dict.items():
            marker = max(key.find(PEER_STATE), key.find(OWN_STATE))
            d[key[marker:] if marker >= 0 else key.rsplit(".", 1)[-1]] = value
        packed = [k for k in d if k.startswith((PEER_STATE, OWN_STATE))]
        if packed:
            if len(packed) > 1:
                raise ValueError(f"two quantization states in one weight: {', '.join(packed)}")
            d.update(read_json_entry(packed[0], d.pop(packed[0])))
        if "quant_type" in d and d["quant_type"] is None:
            return cls._from_blockwise(d, device)
        missing = [k for k in ("quant_type", "absmax", "blocksize", "dtype", "shape") if k not in d]
        if missing:
            raise ValueError(f"the quantization state lacks {', '.join(missing)}")
        return cls._from_parts(d, device)

    @classmethod
    def _from_blockwise(cls, d: dict[str, Any], device: torch.device | str) -> QuantState:
        """The state of :func:`quantize_blockwise`: any block size, no shape."""
        missing = [k for k in ("absmax", "blocksize", "quant_map", "dtype") if k not in d]
        if missing:
            raise ValueError(f"the quantization state lacks {', '.join(missing)}")
        state = cls(
            d["absmax"].to(device),
            code=d["quant_map"].to(device),
            blocksize=d["blocksize"],
            dtype=_dtype_of(d["dtype"]),
        )
        if "nested_absmax" in d:
            state.offset = torch.tensor(float(d["nested_offset"]), device=device)
            state.state2 = cls(
                d["nested_absmax"].to(device),
                code=d["nested_quant_map"].to(device),
                blocksize=d["nested_blocksize"],
                dtype=_dtype_of(d["nested_dtype"]),
            )
        return state

    @classmethod
    def _from_parts(cls, d: dict[str, Any], device: torch.device | str) -> QuantState:
        dtype = _dtype_of(d["dtype"])
        blocksize = formats.check_blocksize(d["blocksize"])
        shape = d["shape"]
        if not all(isinstance(s, int) and s > 0 for s in shape):
            raise ValueError(f"shape in the quantization state must be positive, got {shape!r}")
        absmax = d["absmax"].to(device)
        code = d.get("quant_map")
        if code is None:
            code = get_format(d["quant_type"]).tensors()[0]
        code = code.to(device, torch.float32)
        state = cls(absmax, torch.Size(shape), code, blocksize, d["quant_type"], dtype)
        if absmax.dtype == torch.uint8:
            lacking = [
                k for k in ("nested_absmax", "nested_quant_map", "nested_offset") if k not in d
            ]
            if lacking:
                raise ValueError(f"absmax is uint8 (nested), but {', '.join(lacking)} is missing")
            if d.get("nested_blocksize", 256) != formats.NESTED_BLOCKSIZE:
                raise ValueError(
                    f"nested_blocksize must be {formats.NESTED_BLOCKSIZE}, "
                    f"got {d['nested_blocksize']}"
                )
            state.offset = torch.tensor(float(d["nested_offset"]), device=device)
            state.state2 = cls(
                d["nested_absmax"].to(device, torch.float32),
                code=d["nested_quant_map"].to(device, torch.float32),
                blocksize=formats.NESTED_BLOCKSIZE,
                dtype=torch.float32,
            )
        elif "tensor_scale" in d:
            state.offset = torch.tensor(float(d["tensor_scale"]), device=device)
        count = state.shape.numel()  # type: ignore[union-attr]
        need = formats.blocks(count, blocksize)
        if absmax.numel() != need:
            raise ValueError(
                f"shape {list(shape)} in blocks of {blocksize} has {need} scales, but absmax "
                f"holds {absmax.numel()}"
            )
        empty = torch.empty((count + 1) // 2, dtype=torch.uint8, device="meta")
        ops.check_weight((empty, *state.weight_args()), count)
        return state


def _dtype_of(name: Any) -> torch.dtype:
    if name not in _DTYPES:
        raise ValueError(
            f"dtype in the quantization state must be one of {', '.join(_DTYPES)}, got {name!r}"
        )
    return _DTYPES[name]


def format_of(state: QuantState) -> Format:
    """The state's format: by its name, or, if that came with a checkpoint and is not registered
    here, made of the codebook."""
    try:
        return get_format(str(state.quant_type))
    except FormatError:
        assert state.code is not None
        scale = "e8m0" if state.offset is None else "e4m3"
        scale = scale if state.absmax.dtype == torch.int8 else "fp32"
        return Format(str(state.quant_type), state.code.tolist(), scale=scale)


def checkpoint_entries(state: QuantState, fmt: Format | None = None) -> dict[str, Tensor]:
    """The scales of one packed weight as tensors, for a state dict.

    Keys, their order and the JSON's bytes are bitsandbytes' (read in its ``QuantState.as_dict``)::

        absmax            uint8 [blocks] (nested) or fp32 [blocks]
        quant_map         fp32 [16]
        nested_absmax     fp32 [ceil(blocks / 256)]    nested only
        nested_quant_map  fp32 [256]                   nested only
        quant_state.bitsandbytes__nf4                  uint8, JSON in UTF-8: quant_type, blocksize,
                          dtype, shape; nested: nested_blocksize, nested_dtype, nested_offset

    bitsandbytes knows NF4 and FP4 at block sizes of 32 to 4096. Other formats and block sizes are
    written in the same form under ``quant_state.qlora_kernels__<name>``, so that neither package
    mistakes one for the other; a format whose thresholds are not the midpoints of its codebook also
    puts ``thresholds`` (15 values, ties folded in) in the JSON. Dequantization needs ``quant_map``
    alone. Scales of one byte are ``absmax`` int8, and the JSON says of which kind (``scale``), for
    E4M3 with the tensor's (``tensor_scale``). Of a format's own scale code the JSON has the name
    (``scale_code``) and whether the mean was taken off (``scale_code_centered``); its values are
    ``nested_quant_map``.

    Args:
        fmt: the state's format, where more is known of it than its name; by name if None.
    """
    shape, code, state2, offset = state.shape, state.code, state.state2, state.offset
    assert shape is not None and code is not None
    fmt = format_of(state) if fmt is None else fmt
    info: dict[str, Any] = {
        "quant_type": fmt.name,
        "blocksize": state.blocksize,
        "dtype": str(state.dtype).removeprefix("torch."),
        "shape": list(shape),
    }
    # Tables are cloned: layers share them in memory, and safetensors refuses shared storage.
    entries = {"absmax": state.absmax, "quant_map": code.clone()}
    if state2 is not None:
        assert state2.code is not None and offset is not None
        entries["nested_absmax"] = state2.absmax
        entries["nested_quant_map"] = state2.code.clone()
        info["nested_blocksize"] = state2.blocksize
        info["nested_dtype"] = "float32"
        info["nested_offset"] = offset.item()
    prefix = PEER_STATE
    if fmt not in PEER_FORMATS or state.blocksize not in PEER_BLOCKSIZES:
        prefix = OWN_STATE
        if fmt.thresholds is not None or fmt.ties is not None:
            info["thresholds"] = fmt.tables[1].tolist()
    if fmt.scale_code is not None and state2 is not None:
        info["scale_code"] = fmt.scale_code.name
        info["scale_code_centered"] = fmt.scale_code.centered
    if fmt.scale != "fp32":
        info["scale"] = fmt.scale
        if offset is not None:
            info["tensor_scale"] = offset.item()
    text = json.dumps(info).encode()
    entries[prefix + fmt.name] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return entries


def read_json_entry(key: str, entry: Tensor) -> dict[str, Any]:
    """The JSON of :func:`checkpoint_entries`.

    Raises:
        ValueError: it is not uint8, not JSON, or not an object; the message begins with ``key``.
    """
    if entry.dtype != torch.uint8:
        raise ValueError(f"{key} is {entry.dtype}, expected the uint8 of a text")
    try:
        info = json.loads(entry.cpu().numpy().tobytes().decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{key} is not JSON: {error}") from None
    if not isinstance(info, dict):
        raise ValueError(f"{key} holds {type(info).__name__}, not a JSON object")
    return info


def quantize_4bit(
    A: Tensor,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_type: str | Format = "fp4",
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:
    """Blockwise 4-bit quantization (QLoRA, arXiv 2305.14314, section 3).

    Args:
        A: fp32, bf16 or fp16, any shape.
        absmax: when given, the scales are copied into it too.
        out: when given, the packed bytes are copied into it.
        blocksize: values a scale; 64 unless given.
        compress_statistics: double quantization of the scales.
        quant_type: a format's name or a :class:`~qlora_kernels.formats.Format`. The default is
            bitsandbytes' (``fp4``); QLoRA's is ``nf4``. Its ``scale`` decides what absmax is.
        quant_storage: dtype under which the bytes are held; uint8, or another of 1, 2 or 4 bytes.

    Returns:
        ``(packed [(n + 1) // 2, 1], state)``.

    Raises:
        ValueError, TypeError: an empty tensor, a dtype, format or blocksize that is not offered,
            double quantization of scales of one byte.
    """
    if isinstance(quant_type, str):
        fmt = get_format(quant_type)
    else:
        fmt = formats.register_format(quant_type)
    ops.check_float("A", A)
    blocksize = formats.check_blocksize(64 if blocksize is None else blocksize)
    if A.numel() == 0:
        raise ValueError(f"A is empty (shape {list(A.shape)}): nothing to quantize")
    fmt.check_nested(compress_statistics)
    codebook, thresholds, codes = fmt.tensors(A.device)
    if fmt.scale == "fp32":
        packed, scales = torch.ops.qlora_kernels.quantize_4bit(A, thresholds, codes, blocksize)
        state = QuantState(scales, A.shape, codebook, blocksize, fmt.name, A.dtype)
    else:
        tensor_scale = reference.tensor_scale(A) if fmt.scale == "e4m3" else None
        packed, scales = torch.ops.qlora_kernels.quantize_4bit_scaled(
            A, thresholds, codes, blocksize, tensor_scale
        )
        state = QuantState(scales, A.shape, codebook, blocksize, fmt.name, A.dtype, tensor_scale)
    if compress_statistics:
        code, limits = fmt.scale_tensors(A.device)
        centered = fmt.scale_code is None or fmt.scale_code.centered
        state.absmax, nested, state.offset = torch.ops.qlora_kernels.quantize_absmax(
            scales, limits, None if centered else scales.new_zeros([])
        )
        state.state2 = QuantState(
            nested,
            code=code,
            blocksize=formats.NESTED_BLOCKSIZE,
            dtype=torch.float32,
        )
    packed = as_storage(packed, quant_storage)
    if out is not None:
        packed = out.copy_(packed)
    if absmax is not None:
        state.absmax = absmax.copy_(state.absmax)
    return packed, state


def quantize_nf4(
    A: Tensor,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:
    """:func:`quantize_4bit` to NF4."""
    return quantize_4bit(A, absmax, out, blocksize, compress_statistics, "nf4", quant_storage)


def quantize_fp4(
    A: Tensor,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:
    """:func:`quantize_4bit` to bitsandbytes' FP4."""
    return quantize_4bit(A, absmax, out, blocksize, compress_statistics, "fp4", quant_storage)


def as_storage(packed: Tensor, quant_storage: torch.dtype) -> Tensor:
    """Packed bytes as ``[n, 1]`` of a dtype of 1, 2 or 4 bytes; nothing is copied.

    Raises:
        ValueError: they are not a multiple of its size.
    """
    packed, size = packed.reshape(-1), quant_storage.itemsize
    if packed.dtype != quant_storage:
        if packed.numel() * packed.element_size() % size:
            raise ValueError(
                f"{packed.numel() * packed.element_size()} packed bytes cannot be held as "
                f"{quant_storage}: not a multiple of {size}"
            )
        packed = packed.view(quant_storage)
    return packed.unsqueeze(1)


def _bytes(packed: Tensor) -> Tensor:
    if packed.dtype == torch.uint8:
        return packed
    return packed.contiguous().view(torch.uint8)


def dequantize_4bit(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    quant_type: str = "fp4",
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The weight back: ``round(codebook[q] * absmax)``, in ``quant_state.shape``.

    Args:
        A: packed bytes of :func:`quantize_4bit`. Given as one row, ``[1, n]``, the result is
            transposed, as in bitsandbytes.
        absmax, blocksize, quant_type: in place of ``quant_state``; ``out`` must be given then.
        out: a contiguous tensor of that shape to write into; its dtype counts then.
        dtype: fp32, bf16 or fp16; ``quant_state.dtype`` unless given.

    Raises:
        ValueError, TypeError: neither a state nor ``absmax`` and ``out``, sizes that do not belong
            together, a dtype that is not offered.
    """
    if quant_state is None:
        if absmax is None or out is None:
            raise ValueError("dequantize_4bit needs quant_state, or both absmax and out")
        code = get_format(quant_type).tensors(A.device)[0]
        blocksize = 64 if blocksize is None else blocksize
        quant_state = QuantState(absmax, out.shape, code, blocksize, quant_type, out.dtype)
    shape = quant_state.shape
    assert shape is not None
    args = (_bytes(A), *quant_state.weight_args())
    if out is None:
        dtype = dtype or quant_state.dtype or torch.float32
        ops.check_dtype("dtype", dtype)
        if not torch.compiler.is_compiling():
            ops.check_weight(args, shape.numel())
        values = torch.ops.qlora_kernels.dequantize_4bit(*args, list(shape), dtype)
    else:
        if out.shape != shape or not out.is_contiguous():
            raise ValueError(
                f"out must be contiguous with shape {list(shape)}, got {list(out.shape)}"
                f"{'' if out.is_contiguous() else ', not contiguous'}"
            )
        if dtype is not None and dtype != out.dtype:
            raise ValueError(f"dtype is {dtype}, but out is {out.dtype}")
        ops.check_float("out", out)
        if not torch.compiler.is_compiling():
            ops.check_weight(args, shape.numel())
        torch.ops.qlora_kernels.dequantize_4bit.out(*args, out=out)
        values = out
    row = A.dim() == 2 and A.shape[0] == 1 and A.shape[1] > 1
    return values.t() if row and len(shape) == 2 else values


def dequantize_nf4(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
) -> Tensor:
    """:func:`dequantize_4bit`, NF4 where no state says otherwise."""
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "nf4")


def dequantize_fp4(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
) -> Tensor:
    """:func:`dequantize_4bit`, FP4 where no state says otherwise."""
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "fp4")


def linear_4bit(
    x: Tensor,
    packed: Tensor,
    state: QuantState,
    bias: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    lora_s: Tensor | None = None,
    scaling: float = 1.0,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """``x W^T + bias + scaling * S B^T`` on a packed weight ``W [N, K]``; ``S = x A^T``.

    Args:
        x: ``[..., K]``, fp32, bf16 or fp16.
        packed, state: of :func:`quantize_4bit`.
        bias: ``[N]``.
        lora_a, lora_b: ``[r, K]`` and ``[N, r]``, LoRA's matrices, any of the three dtypes.
        lora_s: ``[..., r]``, in place of ``lora_a``: ``dropout(x) @ A.T`` computed by the caller.
        scaling: LoRA's ``alpha / r`` (or rsLoRA's ``alpha / sqrt(r)``).
        compute_dtype: what x, bias, A and B are rounded to; ``x.dtype`` unless given. Sums are
            fp32; the result is rounded once, to ``x.dtype``. Under autocast both are its dtype.

    Returns:
        ``[..., N]`` in ``x.dtype``. Differentiable in x, bias, lora_a, lora_b, lora_s.

    Raises:
        ValueError, TypeError: shapes, ranks or dtypes that do not go together.
    """
    shape = state.shape
    if shape is None or len(shape) != 2:
        raise ValueError(f"linear_4bit needs a weight [N, K], got shape {shape}")
    if x.shape[-1] != shape[1]:
        raise ValueError(
            f"x has {x.shape[-1]} features, but the weight is [{shape[0]}, {shape[1]}]"
        )
    weight = (_bytes(packed), *state.weight_args())
    lora = (lora_a, lora_b, lora_s)
    return run_linear(x, weight, shape[0], bias, lora, scaling, compute_dtype or x.dtype)


def run_linear(
    x: Tensor,
    weight: ops.WeightArgs,
    out_features: int,
    bias: Tensor | None,
    lora: tuple[Tensor | None, Tensor | None, Tensor | None],
    scaling: float,
    compute_dtype: torch.dtype,
) -> Tensor:
    """The op behind :func:`linear_4bit`, on ready arguments: what a module calls for each token.

    ``weight`` is the op's run ``packed ... nested_offset`` (:mod:`qlora_kernels.ops`), ``lora``
    is ``(lora_a, lora_b, lora_s)``. Arguments are checked in words only after the op refused them.
    """
    op = torch.ops.qlora_kernels.linear_4bit.default
    args = (x, *weight, out_features, bias, *lora, scaling, compute_dtype)
    if torch.compiler.is_compiling():
        return op(*args)[0]
    try:
        # Past Params4bit's __torch_function__, and, where there is no graph to build, past
        # autograd's Python layer: each would cost as much as the op.
        with torch._C.DisableTorchFunctionSubclass():
            if torch.is_grad_enabled():
                return op(*args)[0]
            with torch._C._AutoDispatchBelowAutograd():
                return op(*args)[0]
    except RuntimeError:
        ops.check_linear(x, weight, out_features, bias, *lora, compute_dtype)
        raise


def matmul_4bit(
    A: Tensor,
    B: Tensor,
    quant_state: QuantState,
    out: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """``A W^T + bias`` by bitsandbytes' name; :func:`linear_4bit` without LoRA.

    Args:
        A: ``[..., K]``.
        B: packed bytes of a weight ``[N, K]``, or them transposed.
        quant_state: of :func:`quantize_4bit`. Of a weight ``[K, N]``, which is not square, the
            product is ``A W + bias``, computed densely, with a DeprecationWarning.
        out: the result is copied into it.

    Raises:
        ValueError: no state, or one of a weight that is not 2-D or does not go with A.
    """
    if quant_state is None:
        raise ValueError("matmul_4bit needs the quant_state that quantize_4bit gave")
    shape = quant_state.shape
    if shape is None or len(shape) != 2:
        raise ValueError(f"matmul_4bit needs the state of a weight [N, K], got shape {shape}")
    if A.shape[-1] == shape[0] != shape[1]:
        if not torch.compiler.is_compiling():
            warnings.warn(
                f"the weight was quantized as [in, out] = {list(shape)}, which is dequantized for "
                "every product. Re-quantize from the weight in [out_features, in_features] order",
                DeprecationWarning,
                stacklevel=2,
            )
        w = dequantize_4bit(B.reshape(-1, 1), quant_state, dtype=A.dtype)
        y = torch.nn.functional.linear(A, w.t(), bias)
    else:
        y = linear_4bit(A, B, quant_state, bias)
    return y if out is None else out.copy_(y)


def gemv_4bit(
    A: Tensor,
    B: Tensor,
    out: Tensor | None = None,
    transposed_A: bool = False,
    transposed_B: bool = False,
    state: QuantState | None = None,
) -> Tensor:
    """``A W^T`` by bitsandbytes' name for few rows, A ``[..., K]``.

    On a CPU it has bitsandbytes' bits: torch's product with the dequantized weight, which the tests
    of its callers compare to. :func:`matmul_4bit` and the layers never come here: their kernel does
    not write the weight out, and sums fp32 closer.

    ``transposed_A`` and ``transposed_B`` are taken and not read, as there.

    Raises:
        ValueError: no state, or one of a weight that is not 2-D or does not go with A.
    """
    if state is None:
        raise ValueError("gemv_4bit needs the state that quantize_4bit gave")
    shape = state.shape
    if A.device.type == "cpu" and shape is not None and len(shape) == 2 and A.shape[-1] == shape[1]:
        w = dequantize_4bit(B.reshape(-1, 1), state, dtype=A.dtype)
        y = torch.nn.functional.linear(A, w)
    else:
        y = linear_4bit(A, B, state)
    return y if out is None else out.copy_(y)


# --- 8-bit codes, block by block ------------------------------------------------------------------


def quantize_blockwise(
    A: Tensor,
    code: Tensor | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
) -> tuple[Tensor, QuantState]:
    """8-bit codes of values over their block's absmax; the codes are bitsandbytes'.

    In plain torch on every device: what trains and what runs here has kernels of its own.

    Args:
        A: fp32, bf16 or fp16, any shape.
        code: fp32 ``[256]``, ascending; the signed dynamic map unless given (``create_*_map``).
        absmax: when given, the scales are copied into it too.
        out: when given, the codes are copied into it.
        blocksize: values a scale, any positive number.
        nested: the scales, less their mean, are coded as well, by the dynamic map.

    Returns:
        ``(uint8 in A's shape, state)``.

    Raises:
        ValueError: a dtype, a block size or a code that is not offered.
    """
    if blocksize <= 0:
        raise ValueError(f"blocksize must be positive, got {blocksize}")
    if A.dtype not in ops.FLOATS:
        raise ValueError(f"A must be float32, bfloat16 or float16, got {A.dtype}")
    code = formats.nested_code(A.device) if code is None else code.to(A.device)
    if code.dtype != torch.float32 or code.numel() != 256:
        raise ValueError(f"code must be 256 x float32, got {code.numel()} x {code.dtype}")
    values = A.detach().reshape(-1)
    codes = torch.empty(values.numel(), dtype=torch.uint8, device=A.device)
    scales = torch.empty(
        formats.blocks(values.numel(), blocksize), dtype=torch.float32, device=A.device
    )
    many = max(1, _CHUNK // blocksize)  # blocks at a time: what is computed between stays small
    for first in range(0, scales.numel(), many):
        begin, end = first * blocksize, (first + many) * blocksize
        part = values[begin:end].float()
        rows = torch.nn.functional.pad(part, (0, -part.numel() % blocksize)).view(-1, blocksize)
        largest = rows.abs().amax(1)
        scales[first : first + many] = largest
        rows = (rows * (1.0 / largest)[:, None]).clamp_(-1, 1)
        found = quantize_codes(rows, code).masked_fill_((largest == 0)[:, None], 0)
        codes[begin:end] = found.view(-1)[: part.numel()]
    codes = codes.view(A.shape)
    state = QuantState(scales, code=code.clone(), blocksize=blocksize, dtype=A.dtype)
    if nested:
        state.offset = scales.mean()
        state.absmax, state.state2 = quantize_blockwise(scales - state.offset, blocksize=blocksize)
    if absmax is not None:
        state.absmax = absmax.copy_(state.absmax)
    return (codes if out is None else out.copy_(codes)), state


_CHUNK = 1 << 20


def dequantize_blockwise(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    code: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
) -> Tensor:
    """Values back from :func:`quantize_blockwise`: ``round(code[q] * absmax)``.

    Args:
        A: uint8.
        quant_state: what decides; without it ``absmax``, ``code`` (the dynamic map unless given)
            and ``blocksize``, and the result is fp32. ``nested`` is taken and not read.
        out: the result is copied into it.

    Raises:
        ValueError: neither a state nor ``absmax``, or A is not uint8.
    """
    if quant_state is None:
        if absmax is None:
            raise ValueError("dequantize_blockwise needs quant_state or absmax")
        code = formats.nested_code(A.device) if code is None else code
        quant_state = QuantState(absmax, code=code, blocksize=blocksize, dtype=torch.float32)
    if A.dtype != torch.uint8:
        raise ValueError(f"A must be uint8, got {A.dtype}")
    blocksize = quant_state.blocksize
    if blocksize <= 0:
        raise ValueError(f"blocksize must be positive, got {blocksize}")
    scales = quant_state.absmax
    if quant_state.state2 is not None:
        assert quant_state.offset is not None
        scales = dequantize_blockwise(scales, quant_state.state2).float() + quant_state.offset
    assert quant_state.code is not None
    codes = A.reshape(-1)
    values = quant_state.code.to(A.device).index_select(0, codes.int())
    padded = torch.nn.functional.pad(values, (0, -values.numel() % blocksize)).view(-1, blocksize)
    values = (padded * scales[:, None]).to(quant_state.dtype or torch.float32)
    values = values.view(-1)[: codes.numel()].view(A.shape)
    return values if out is None else out.copy_(values)


def has_avx512bf16() -> bool:
    """False: bitsandbytes repacks weights for CPUs with AVX512-BF16, this package has one layout.

    Code that asks before it repacks is answered so that it does not.
    """
    return False


__all__ = [
    "Format",
    "FormatError",
    "QuantState",
    "as_storage",
    "checkpoint_entries",
    "create_dynamic_map",
    "create_fp8_map",
    "create_linear_map",
    "create_normal_map",
    "dequantize_4bit",
    "dequantize_blockwise",
    "dequantize_fp4",
    "dequantize_nf4",
    "gemv_4bit",
    "get_4bit_type",
    "has_avx512bf16",
    "linear_4bit",
    "matmul_4bit",
    "quantize_4bit",
    "quantize_blockwise",
    "quantize_fp4",
    "quantize_nf4",
]
