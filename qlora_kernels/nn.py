"""Modules: a linear layer whose weight is 4-bit, the same with LoRA in one op, and their way in.

:class:`Linear4bit` is an ``nn.Linear`` to whoever asks (PEFT's ``all-linear`` does), but keeps

===================  =========================  =================================================
``weight``           parameter, uint8, frozen   two values a byte, the earlier in the high nibble
``absmax``           buffer, uint8 or fp32      one scale a block: an 8-bit code, or the scale
                     or int8                    ... or the byte of an E8M0 or E4M3 scale
``quant_map``        buffer, fp32 [16]          the codebook
``nested_absmax``    buffer, fp32               double quantization: one scale per 256 scales
``nested_quant_map`` buffer, fp32 [256]         ... and what the 8-bit codes mean
``nested_offset``    buffer, fp32 []            ... and what is added; of E4M3 scales the tensor's
``bias``             parameter                  as in ``nn.Linear``
===================  =========================  =================================================

The weight is a *parameter*, so that tools which move, count and save parameters see it; the scales
are *buffers*, so that ``prepare_model_for_kbit_training``, which casts parameters up, leaves them;
and ``_apply`` keeps both in their dtype through ``.to(bfloat16)`` and ``.half()``. Modules that
share a weight share the parameter *and the dict of buffers*, so that moving one moves all.

In a state dict they take bitsandbytes' key names (see :func:`~.functional.checkpoint_entries`).

Several processes: ``DistributedDataParallel`` takes a model of these layers as it is, and so does
``fully_shard`` (FSDP2): the packed bytes are cut along dimension 0 and gathered a layer at a time;
scales are buffers, whole on each process (0.13 bits a weight when nested, 0.5 otherwise). Save and
load ``model.state_dict()``, then of DTensors, by ``torch.distributed.checkpoint``, whose
``get_model_state_dict`` refuses keys that name neither a parameter nor a buffer, such as
``weight.absmax``.
"""

from __future__ import annotations

import difflib
import fnmatch
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import functional as F4
from .formats import (
    NESTED_BLOCKSIZE,
    SCALES,
    Format,
    FormatError,
    ScaleCode,
    blocks,
    check_blocksize,
    get_format,
    scale_dtype,
)
from .ops import FLOATS

__all__ = [
    "CheckpointError",
    "Linear4bit",
    "LoraLinear4bit",
    "LoraSpec",
    "MergeReport",
    "ReplacementReport",
    "lora_projection",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
    "read_checkpoint_entries",
    "replace_linear_layers",
]

COMPUTE_DTYPES = FLOATS

_BUFFERS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "nested_offset")


class CheckpointError(ValueError):
    """A state dict whose packed weight, scales and JSON do not agree."""


# --- the checkpoint form ------------------------------------------------------------------------

_TENSOR_KEYS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


def read_checkpoint_entries(
    packed: Tensor, entries: dict[str, Tensor], shape: Sequence[int] | None, where: str
) -> tuple[Tensor, F4.QuantState, Format]:
    """What :func:`~.functional.checkpoint_entries` or bitsandbytes wrote, checked and taken apart.

    Args:
        packed: the packed weight, of any shape and storage dtype: its bytes are what counts.
        entries: tensors by key, without the ``weight.`` in front.
        shape: ``(out_features, in_features)`` of the layer, or None to take the JSON's word.
        where: the weight's full name, for the errors.

    Returns:
        ``(packed uint8 [(n + 1) // 2, 1], state, format)``; tensors stay where they are.

    Raises:
        CheckpointError: an entry is missing, surplus, of the wrong dtype or size, or the JSON is
            not JSON, lies about the shape, or names what is not offered.
    """

    def fail(message: str) -> CheckpointError:
        return CheckpointError(f"{where}: {message}")

    keys = [k for k in entries if k.startswith((F4.PEER_STATE, F4.OWN_STATE))]
    if len(keys) != 1:
        found = ", ".join(keys) if keys else "none"
        raise fail(f"needs exactly one entry 'weight.quant_state.<kind>__<format>', found {found}")
    surplus = sorted(set(entries) - {*_TENSOR_KEYS, *keys})
    if surplus:
        raise fail(f"has entries that belong to no 4-bit weight: {', '.join(surplus)}")
    key = keys[0]
    try:
        info = F4.read_json_entry(f"weight.{key}", entries[key])
    except ValueError as error:
        raise fail(str(error)) from None

    nested = "nested_absmax" in entries
    if "nested_offset" in info and not nested:
        raise fail("weight.nested_absmax is missing, the JSON tells of nested scales")
    needed: dict[str, Any] = {"quant_type": str, "blocksize": int, "dtype": str, "shape": list}
    if nested:
        needed |= {"nested_blocksize": int, "nested_dtype": str, "nested_offset": (int, float)}
    for name, kind in needed.items():
        if not isinstance(info.get(name), kind) or isinstance(info.get(name), bool):
            raise fail(f"the JSON of weight.{key} has {name} = {info.get(name)!r}")
    scale = info.get("scale", "fp32")
    if scale not in SCALES or (nested and scale != "fp32"):
        raise fail(
            f"the JSON of weight.{key} has scale = {scale!r}{' and nested' if nested else ''}"
        )
    if scale == "e4m3" and not isinstance(info.get("tensor_scale"), float):
        raise fail(f"the JSON of weight.{key} has tensor_scale = {info.get('tensor_scale')!r}")
    for name in ("absmax", "quant_map", *(("nested_quant_map",) if nested else ())):
        if name not in entries:
            raise fail(f"weight.{name} is missing")

    name = info["quant_type"]
    if name != key.partition("__")[2]:
        raise fail(f"the JSON says quant_type {name!r}, its key says {key.partition('__')[2]!r}")
    try:
        blocksize = check_blocksize(info["blocksize"])
    except ValueError as error:
        raise fail(str(error)) from None
    dtype = getattr(torch, info["dtype"], None)
    if dtype not in COMPUTE_DTYPES:
        raise fail(f"the JSON has dtype {info['dtype']!r}; offered: float32, bfloat16, float16")
    told = info["shape"]
    if len(told) != 2 or not all(isinstance(n, int) and n > 0 for n in told):
        raise fail(f"the JSON has shape {told}, not two positive integers")
    if shape is not None and tuple(told) != tuple(shape):
        raise fail(f"holds a weight of shape {tuple(told)}, the layer needs {tuple(shape)}")

    count = told[0] * told[1]
    if packed.numel() * packed.element_size() != (count + 1) // 2:
        raise fail(
            f"{packed.numel() * packed.element_size()} packed bytes; shape {tuple(told)} needs "
            f"{(count + 1) // 2}"
        )
    n_blocks = blocks(count, blocksize)
    sizes = {
        "absmax": (scale_dtype(scale, nested), n_blocks),
        "quant_map": (torch.float32, 16),
    }
    if nested:
        sizes["nested_absmax"] = (torch.float32, blocks(n_blocks, NESTED_BLOCKSIZE))
        sizes["nested_quant_map"] = (torch.float32, 256)
        if info["nested_blocksize"] != NESTED_BLOCKSIZE or info["nested_dtype"] != "float32":
            raise fail(
                f"nested scales in blocks of {info['nested_blocksize']} as {info['nested_dtype']}; "
                f"offered: {NESTED_BLOCKSIZE}, float32"
            )
    for entry, (want, size) in sizes.items():
        got = entries[entry]
        if got.dtype != want or got.numel() != size:
            raise fail(
                f"weight.{entry} is {got.numel()} x {got.dtype}; {tuple(told)} at a blocksize of "
                f"{blocksize} needs {size} x {want}"
            )

    scale_code = None
    if nested and "scale_code" in info:
        values = entries["nested_quant_map"].reshape(-1).tolist()
        try:
            scale_code = ScaleCode(
                str(info["scale_code"]), values, bool(info.get("scale_code_centered", True))
            )
        except FormatError as error:
            raise fail(str(error)) from None
    fmt = _read_format(
        name, key, entries["quant_map"], info.get("thresholds"), scale, scale_code, fail
    )
    device = packed.device
    # bitsandbytes computes with its own table, whatever quant_map's last bit says: so do we.
    code = fmt.tensors(device)[0] if device.type != "meta" else entries["quant_map"]
    state2 = offset = None
    if nested:
        state2 = F4.QuantState(
            absmax=entries["nested_absmax"].reshape(-1),
            code=entries["nested_quant_map"].reshape(-1),
            blocksize=NESTED_BLOCKSIZE,
            dtype=torch.float32,
        )
        offset = torch.tensor(float(info["nested_offset"]), dtype=torch.float32, device=device)
    elif scale == "e4m3":
        offset = torch.tensor(info["tensor_scale"], dtype=torch.float32, device=device)
    state = F4.QuantState(
        absmax=entries["absmax"].reshape(-1),
        shape=torch.Size(told),
        code=code,
        blocksize=blocksize,
        quant_type=fmt.name,
        dtype=dtype,
        offset=offset,
        state2=state2,
    )
    return packed.contiguous().view(torch.uint8).reshape(-1, 1), state, fmt


def _read_format(
    name: str,
    key: str,
    quant_map: Tensor,
    thresholds: Any,
    scale: str,
    scale_code: ScaleCode | None,
    fail: Any,
) -> Format:
    book = quant_map.cpu().reshape(-1)
    try:
        fmt = get_format(name)
    except ValueError:
        if key.startswith(F4.PEER_STATE):
            raise fail(f"bitsandbytes has no 4-bit format {name!r}") from None
        try:
            return Format(name, book.tolist(), thresholds, scale=scale, scale_code=scale_code)
        except (ValueError, TypeError) as error:
            raise fail(str(error)) from None
    if not torch.allclose(book, torch.from_numpy(fmt.tables[0]), rtol=0, atol=1e-5):
        raise fail(f"weight.quant_map is not the codebook of {name!r} that is known here")
    if scale != fmt.scale:
        raise fail(f"has {scale} scales, but {name!r} is known here with {fmt.scale}")
    if scale_code is not None and not scale_code.same(fmt.scale_code):
        raise fail(
            f"its scales are of the code {scale_code.name!r}, which is not the one that {name!r} "
            "is known with here"
        )
    return fmt


# --- Linear4bit ---------------------------------------------------------------------------------


class _Layout:
    """What the bytes mean, beside the tensors. One object for all modules that share a weight."""

    __slots__ = ("blocksize", "dtype", "fmt", "nested")

    def __init__(self, fmt: Format, blocksize: int, nested: bool, dtype: torch.dtype) -> None:
        self.fmt, self.blocksize, self.nested, self.dtype = fmt, blocksize, nested, dtype

    def take(self, other: _Layout) -> None:
        self.fmt, self.blocksize = other.fmt, other.blocksize
        self.nested, self.dtype = other.nested, other.dtype


class _Group(NamedTuple):
    """All that modules share when they share a weight: see :meth:`Linear4bit.from_quantized`."""

    weight: nn.Parameter
    buffers: dict[str, Tensor | None]
    layout: _Layout


def _buffers_of(state: F4.QuantState) -> dict[str, Tensor | None]:
    state2 = state.state2
    return {
        "absmax": state.absmax,
        "quant_map": state.code,
        "nested_absmax": None if state2 is None else state2.absmax,
        "nested_quant_map": None if state2 is None else state2.code,
        "nested_offset": state.offset,
    }


class Linear4bit(nn.Linear):
    """``y = x W^T + b`` with ``W`` frozen, in 4 bits a value and one scale a block.

    The constructor draws ``W`` as ``nn.Linear`` does and quantizes it; :meth:`from_linear`
    quantizes a layer that exists. On the meta device nothing is drawn.

    Args:
        in_features, out_features, bias: as in ``nn.Linear``.
        compute_dtype: x, bias and weights are rounded to it for the product (sums are fp32, the
            result has x's dtype). None takes x's dtype.
        quant_type: a format or its name ("nf4", "fp4", ...; see :mod:`qlora_kernels.formats`).
        blocksize: values a scale, 16 to 4096, a power of two.
        compress_statistics: double quantization of the scales.
        device, dtype: of the bias, and what the weight was before it was quantized.

    Shapes: x ``[..., in_features]`` fp32, bf16 or fp16; y ``[..., out_features]`` in x's dtype.

    Raises:
        ValueError: a block size, a compute dtype or a size that is not offered.
        FormatError: an unknown format.
    """

    # By name, for readers and type checkers.
    weight: nn.Parameter
    absmax: Tensor
    quant_map: Tensor
    nested_absmax: Tensor | None
    nested_quant_map: Tensor | None
    nested_offset: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        compute_dtype: torch.dtype | None = None,
        quant_type: str | Format = "nf4",
        blocksize: int = 64,
        compress_statistics: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        # Not nn.Linear.__init__, which would allocate the dense weight.
        nn.Module.__init__(self)
        for name, size in (("in_features", in_features), ("out_features", out_features)):
            if not isinstance(size, int) or size <= 0:
                raise ValueError(f"{name} must be a positive integer, got {size!r}")
        if compute_dtype is not None and compute_dtype not in COMPUTE_DTYPES:
            raise ValueError(
                f"compute_dtype must be float32, bfloat16, float16 or None, got {compute_dtype}"
            )
        dtype = dtype or torch.get_default_dtype()
        if dtype not in COMPUTE_DTYPES:
            raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
        self.in_features, self.out_features = in_features, out_features
        self.compute_dtype = compute_dtype
        fmt, nested = get_format(quant_type), bool(compress_statistics)
        fmt.check_nested(nested)
        self._layout = _Layout(fmt, check_blocksize(blocksize), nested, dtype)

        count = in_features * out_features
        n_blocks = blocks(count, blocksize)
        packed = torch.empty((count + 1) // 2, 1, dtype=torch.uint8, device=device)
        self.weight = nn.Parameter(packed, requires_grad=False)

        def floats(*size: int) -> Tensor:
            return torch.empty(size, dtype=torch.float32, device=device)

        scales = torch.empty(n_blocks, dtype=scale_dtype(fmt.scale, nested), device=device)
        self.register_buffer("absmax", scales)
        self.register_buffer("quant_map", floats(16))
        n_nested = blocks(n_blocks, NESTED_BLOCKSIZE)
        self.register_buffer("nested_absmax", floats(n_nested) if nested else None)
        self.register_buffer("nested_quant_map", floats(256) if nested else None)
        offset = nested or fmt.scale == "e4m3"
        self.register_buffer("nested_offset", floats() if offset else None)
        self.register_parameter(
            "bias",
            nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None,
        )
        self.reset_parameters()

    # -- ways in --

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        compute_dtype: torch.dtype | None = None,
        quant_type: str | Format = "nf4",
        blocksize: int = 64,
        compress_statistics: bool = True,
        device: torch.device | str | int | None = None,
        **kwargs: Any,
    ) -> Linear4bit:
        """``linear`` quantized; its bias is taken over as it is (the same parameter).

        Args:
            device: where the new layer lives, ``linear``'s device by default. From a layer on meta
                comes a layer on meta.
            kwargs: passed to the constructor of a subclass.

        Raises:
            ValueError: the weight is not ``[out_features, in_features]`` in fp32, bf16 or fp16.
        """
        weight = linear.weight
        if weight.dtype not in COMPUTE_DTYPES:
            raise ValueError(f"a weight of {weight.dtype} cannot be quantized to 4 bits")
        new = cls(
            linear.in_features,
            linear.out_features,
            bias=False,
            compute_dtype=compute_dtype,
            quant_type=quant_type,
            blocksize=blocksize,
            compress_statistics=compress_statistics,
            device="meta",
            dtype=weight.dtype,
            **kwargs,
        )
        device = torch.device(weight.device if device is None else device)
        if weight.device.type != "meta" and device.type != "meta":
            new.set_weight(weight.detach().to(device))
        bias = linear.bias
        if bias is not None and bias.device != device:
            bias = nn.Parameter(bias.detach().to(device), requires_grad=bias.requires_grad)
        new.bias = bias
        new._materialize(new.weight.device)
        return new.train(linear.training)

    @classmethod
    def from_quantized(cls, other: Linear4bit, **kwargs: Any) -> Linear4bit:
        """A new layer on ``other``'s packed weight, scales and bias: shared, not copied.

        Moving one layer moves the weight of all; ``copy.deepcopy`` of a container keeps what is
        inside shared, as it does for tied ``nn`` parameters. ``kwargs`` go to the constructor.
        """
        kwargs.setdefault("compute_dtype", other.compute_dtype)
        new = cls(other.in_features, other.out_features, bias=False, device="meta", **kwargs)
        new._set_group(other._group())
        new.bias = other.bias
        new._materialize(new.weight.device)
        return new.train(other.training)

    def _materialize(self, device: torch.device) -> None:
        """Gives what a subclass adds its place; the base class has nothing more."""

    def reset_parameters(self) -> None:
        """Draws weight and bias as ``nn.Linear`` does and quantizes the weight; nothing on meta."""
        if self.weight.device.type == "meta":
            return
        shape, device = (self.out_features, self.in_features), self.weight.device
        with torch.no_grad():
            weight = torch.empty(shape, dtype=self._layout.dtype, device=device)
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
            self.set_weight(weight)
            if self.bias is not None:
                bound = 1 / math.sqrt(self.in_features)
                nn.init.uniform_(self.bias, -bound, bound)

    @torch.no_grad()
    def set_weight(self, weight: Tensor) -> None:
        """Quantizes a dense ``[out_features, in_features]`` weight into this layer.

        It is quantized on this layer's device, or on its own if the layer is on meta. Layers that
        share this weight get it too.

        Raises:
            ValueError: another shape or a dtype that is not offered.
        """
        self._store(*self._quantize(weight))

    def _quantize(self, weight: Tensor) -> tuple[Tensor, F4.QuantState]:
        shape = (self.out_features, self.in_features)
        if tuple(weight.shape) != shape:
            raise ValueError(f"the weight must have shape {shape}, got {tuple(weight.shape)}")
        layout, own = self._layout, self.weight
        return F4.quantize_4bit(
            weight.detach() if own.is_meta else weight.detach().to(own.device),
            blocksize=layout.blocksize,
            quant_type=layout.fmt,
            compress_statistics=layout.nested,
        )

    def _store(self, packed: Tensor, state: F4.QuantState) -> None:
        if self.weight.is_meta and not packed.is_meta:
            self.weight = nn.Parameter(packed, requires_grad=False)
        else:
            self.weight.data = packed  # in place: modules that share the parameter see it
        self._buffers.update(_buffers_of(state))

    def _group(self) -> _Group:
        return _Group(self.weight, self._buffers, self._layout)

    def _set_group(self, group: _Group) -> None:
        self.weight = group.weight
        self._buffers, self._layout = group.buffers, group.layout

    def _fresh_group(self, weight: Tensor) -> _Group:
        """``weight`` quantized as this layer is, in tensors that nobody shares."""
        packed, state = self._quantize(weight)
        old = self._layout
        layout = _Layout(old.fmt, old.blocksize, old.nested, old.dtype)
        return _Group(nn.Parameter(packed, requires_grad=False), _buffers_of(state), layout)

    # -- ways out --

    @property
    def quant_state(self) -> F4.QuantState:
        """The scales as :class:`qlora_kernels.functional.QuantState`; tensors are not copied."""
        b, layout = self._buffers, self._layout
        state2 = None
        if self.nested_absmax is not None:
            state2 = F4.QuantState(
                absmax=self.nested_absmax,
                code=b["nested_quant_map"],
                blocksize=NESTED_BLOCKSIZE,
                dtype=torch.float32,
            )
        return F4.QuantState(
            absmax=self.absmax,
            shape=torch.Size((self.out_features, self.in_features)),
            code=b["quant_map"],
            blocksize=layout.blocksize,
            quant_type=layout.fmt.name,
            dtype=layout.dtype,
            offset=b["nested_offset"],
            state2=state2,
        )

    @property
    def format(self) -> Format:
        """The 4-bit format of the weight."""
        return self._layout.fmt

    @property
    def quant_type(self) -> str:
        """The name of the format."""
        return self._layout.fmt.name

    @property
    def blocksize(self) -> int:
        """Values a scale."""
        return self._layout.blocksize

    @property
    def compress_statistics(self) -> bool:
        """Whether the scales are quantized themselves."""
        return self._layout.nested

    @property
    def bits_per_weight(self) -> float:
        """Bits a weight, scales included: 4.127 for double quantization at a blocksize of 64."""
        return self._layout.fmt.bits_per_weight(self._layout.blocksize, self._layout.nested)

    def dequantize_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight as a dense ``[out_features, in_features]`` tensor.

        Args:
            dtype: fp32, bf16 or fp16; what it was before it was quantized by default.
        """
        return F4.dequantize_4bit(self.weight, self.quant_state, dtype=dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """An ``nn.Linear`` of the dequantized weight and a copy of this layer's bias.

        Args:
            dtype: of both; what the weight was before it was quantized by default.
        """
        new = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        weight = self.dequantize_weight(dtype)
        new.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            bias = self.bias.detach().to(weight.dtype, copy=True)
            new.bias = nn.Parameter(bias, requires_grad=self.bias.requires_grad)
        return new.train(self.training)

    # -- what nn.Module does to modules --

    def _apply(self, fn: Any, recurse: bool = True) -> Linear4bit:
        # .to(bfloat16) and .half() cast what is floating point, .type() casts everything. Bytes
        # and scales only ever move.
        frozen = {id(self.weight), *map(id, self._buffers.values())}

        def move(t: Tensor) -> Tensor:
            new = fn(t)
            if new.dtype != t.dtype and id(t) in frozen:
                return t.to(new.device)
            return new

        return super()._apply(move, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in _BUFFERS:
            destination.pop(prefix + name, None)
        # On meta there is no offset to write into the JSON: weight and bias stand for the rest.
        if self.weight.device.type != "meta":
            for key, value in F4.checkpoint_entries(self.quant_state, self._layout.fmt).items():
                destination[f"{prefix}weight.{key}"] = value

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        start = prefix + "weight."
        entries = {k[len(start) :]: v for k, v in state_dict.items() if k.startswith(start)}
        rest = {k: v for k, v in state_dict.items() if not k.startswith(start)}
        weight = rest.get(prefix + "weight")
        loaded: tuple[F4.QuantState, Format] | None = None
        if weight is None:
            if entries:
                names = ", ".join(sorted(start + k for k in entries))
                error_msgs.append(f"{prefix}weight is missing, its scales are there: {names}")
        else:
            try:
                packed, state, fmt = self._read(weight, entries, prefix + "weight")
                rest[prefix + "weight"], loaded = packed, (state, fmt)
            except ValueError as error:
                error_msgs.append(str(error))
                del rest[prefix + "weight"]

        errors, meta = len(error_msgs), self.weight.device.type == "meta"
        # The base class would look for our buffers under their own names.
        non_persistent = self._non_persistent_buffers_set
        self._non_persistent_buffers_set = non_persistent | set(_BUFFERS)
        try:
            super()._load_from_state_dict(
                rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
        finally:
            self._non_persistent_buffers_set = non_persistent
        if weight is not None and loaded is None and prefix + "weight" in missing_keys:
            missing_keys.remove(prefix + "weight")  # it was there; the error says what is wrong
        if loaded is None or weight is None or len(error_msgs) > errors:
            return
        if meta and self.weight.is_meta and not weight.is_meta:
            return  # without assign=True nothing can be copied there; torch warns
        self._adopt(*loaded, self.weight.device, local_metadata.get("assign_to_params_buffers"))

    def _adopt(
        self, state: F4.QuantState, fmt: Format, device: torch.device, assign: bool | None = True
    ) -> None:
        """Takes the layout of ``state`` and its scales, or copies of them."""
        dtype = state.dtype or self._layout.dtype
        self._layout.take(_Layout(fmt, state.blocksize, state.nested, dtype))
        for name, value in _buffers_of(state).items():
            if value is not None:
                value = value.to(device, copy=not assign)
            self._buffers[name] = value

    def _read(
        self, weight: Tensor, entries: dict[str, Tensor], where: str
    ) -> tuple[Tensor, F4.QuantState, Format]:
        """A weight of a state dict: packed with its scales, or dense and quantized here."""
        shape = (self.out_features, self.in_features)
        if entries:
            return read_checkpoint_entries(weight, entries, shape, where)
        if weight.dtype in COMPUTE_DTYPES:
            try:
                packed, state = self._quantize(weight)
            except ValueError as error:
                raise CheckpointError(f"{where}: {error}") from None
            return packed, state, self._layout.fmt
        raise CheckpointError(
            f"{where} is {weight.dtype} without its scales: expected {where}.absmax, "
            f"{where}.quant_map and {where}.quant_state.<kind>__<format>, or a dense weight"
        )

    def extra_repr(self) -> str:
        parts = [
            f"in_features={self.in_features}",
            f"out_features={self.out_features}",
            f"bias={self.bias is not None}",
            f"quant_type={self.quant_type!r}",
            f"blocksize={self.blocksize}",
            f"compress_statistics={self.compress_statistics}",
        ]
        if self.compute_dtype is not None:
            parts.append(f"compute_dtype={self.compute_dtype}")
        return ", ".join(parts)

    # -- forward --

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)

    def linear(
        self,
        x: Tensor,
        lora_a: Tensor | None = None,
        lora_b: Tensor | None = None,
        lora_s: Tensor | None = None,
        scaling: float = 1.0,
    ) -> Tensor:
        """The forward op with optional LoRA operands: see :func:`functional.linear_4bit`.

        Calls the op with what the module holds at this moment, read from its dicts: attribute
        access of ``nn.Module`` would cost as much as the op's own dispatch.
        """
        if x.size(-1) != self.in_features:
            raise ValueError(
                f"x has {x.shape[-1]} features in its last dimension ({list(x.shape)}), the layer "
                f"takes {self.in_features}"
            )
        b, layout = self._buffers, self._layout
        weight: Tensor | None
        bias: Tensor | None
        try:
            weight, bias = self._parameters["weight"], self._parameters["bias"]
        except KeyError:  # a replica of nn.DataParallel has plain attributes
            weight, bias = self.weight, self.bias
        packed = (
            weight,
            b["absmax"],
            b["quant_map"],
            layout.blocksize,
            b["nested_absmax"],
            b["nested_quant_map"],
            b["nested_offset"],
        )
        lora = (lora_a, lora_b, lora_s)
        dtype = self.compute_dtype or x.dtype
        return F4.run_linear(x, packed, self.out_features, bias, lora, scaling, dtype)  # type: ignore[arg-type]


# --- LoRA ---------------------------------------------------------------------------------------


def lora_projection(x: Tensor, a: Tensor, compute_dtype: torch.dtype | None = None) -> Tensor:
    """``S = x A^T`` outside the fused op, for LoRA with dropout: x is the dropped input.

    x ``[..., K]``, a ``[r, K]``, S ``[..., r]``. Computed in ``compute_dtype`` (x's dtype if None),
    or in fp32 on a CPU that has no matrix product in that dtype, where it is both faster and
    closer. Under autocast it is what autocast makes of ``F.linear``.
    """
    if torch.is_autocast_enabled(x.device.type):
        return F.linear(x, a)
    dtype = compute_dtype or x.dtype
    if x.device.type == "cpu" and dtype not in _CPU_GEMMS:
        dtype = torch.float32
    return F.linear(x.to(dtype), a.to(dtype))


_CPU_GEMMS = {torch.float32}
if torch.ops.mkldnn._is_mkldnn_bf16_supported():
    _CPU_GEMMS.add(torch.bfloat16)
if torch.ops.mkldnn._is_mkldnn_fp16_supported():
    _CPU_GEMMS.add(torch.float16)


@dataclass(frozen=True)
class LoraSpec:
    """LoRA for :func:`replace_linear_layers`; names as in PEFT's ``LoraConfig``.

    ``target_modules`` (patterns as :func:`replace_linear_layers` takes them) picks the layers that
    get adapters among those that are quantized; None means all.
    """

    r: int = 16
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    use_rslora: bool = False
    target_modules: str | Sequence[str] | None = None
    dtype: torch.dtype = torch.float32

    def layer_kwargs(self) -> dict[str, Any]:
        """The keyword arguments of :class:`LoraLinear4bit` that this stands for."""
        return {
            "r": self.r,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "use_rslora": self.use_rslora,
            "lora_dtype": self.dtype,
        }


@dataclass(frozen=True)
class MergeReport:
    """What merging an adapter into a 4-bit weight lost: Frobenius norms, in fp32.

    ``W + s B A`` is quantized again. The old weight lies on the format's grid, so an update that is
    small against the grid's steps is rounded away, and one that is not adds rounding of its own.
    Measured on NF4 in blocks of 64, Gaussian weights, rank 16:

    ====================  =====  =====  =====  =====  =====
    ``|s B A| / |W|``     0.001   0.01   0.03    0.1    0.3
    relative_to_update     1.03   1.09   1.08   0.79   0.32
    relative_to_weight    0.001  0.011  0.032  0.079  0.092
    ====================  =====  =====  =====  =====  =====

    So what finetuning usually changes (a few percent) is lost by merging into 4 bits; merge into
    the dequantized or the original 16-bit weight (:meth:`LoraLinear4bit.dequantize` and
    :meth:`LoraLinear4bit.delta_weight`) to keep it.
    """

    rounding: float
    """``|quantized(W + s B A) - (W + s B A)|``."""
    update: float
    """``|s B A|``."""
    weight: float
    """``|W + s B A|``."""

    @property
    def relative_to_update(self) -> float:
        return self.rounding / self.update if self.update else math.inf

    @property
    def relative_to_weight(self) -> float:
        return self.rounding / self.weight if self.weight else 0.0

    def __str__(self) -> str:
        return (
            f"rounding is {self.relative_to_weight:.2%} of the weight and "
            f"{self.relative_to_update:.2f} x the update that was merged"
        )


class LoraLinear4bit(Linear4bit):
    """``y = x W^T + b + s (dropout(x) A^T) B^T``, with ``W`` 4-bit and frozen, in one op.

    Without dropout (or in ``eval()``) the op takes A and B. With dropout it is split at
    ``S = dropout(x) A^T``, which the op adds in; the gradient of A then sees the dropped x.

    Args:
        r: the rank. ``lora_alpha``: ``s = lora_alpha / r``, or ``/ sqrt(r)`` with ``use_rslora``.
        lora_dropout: probability, 0 to below 1.
        lora_dtype: of A ``[r, in_features]`` and B ``[out_features, r]``; fp32 by default, whatever
            is computed in.
        kwargs: those of :class:`Linear4bit`.

    A is drawn as PEFT does (Kaiming uniform, a = sqrt(5)), B is zero.

    Raises:
        ValueError: a rank or a dropout that cannot be.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        r: int = 16,
        lora_alpha: float = 16.0,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        lora_dtype: torch.dtype = torch.float32,
        device: torch.device | str | int | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(r, int) or r <= 0:
            raise ValueError(f"the LoRA rank r must be a positive integer, got {r!r}")
        if not 0.0 <= lora_dropout < 1.0:
            raise ValueError(f"lora_dropout must be in [0, 1), got {lora_dropout!r}")
        if lora_dtype not in COMPUTE_DTYPES:
            raise ValueError(f"lora_dtype must be float32, bfloat16 or float16, got {lora_dtype}")
        super().__init__(in_features, out_features, bias, device=device, **kwargs)
        self.r, self.lora_alpha, self.lora_dropout = r, float(lora_alpha), float(lora_dropout)
        self.use_rslora = bool(use_rslora)
        self.scaling = self.lora_alpha / (math.sqrt(r) if use_rslora else r)
        self.adapter_enabled = True
        self._unmerged: _Group | None = None
        like = torch.empty(0, device=self.weight.device, dtype=lora_dtype)
        self.lora_A = nn.Parameter(like.new_empty(r, in_features))
        self.lora_B = nn.Parameter(like.new_empty(out_features, r))
        self.reset_lora_parameters()

    def reset_lora_parameters(self) -> None:
        """Draws A anew and zeroes B; nothing on meta."""
        if self.lora_A.device.type != "meta":
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
            nn.init.zeros_(self.lora_B)

    def _materialize(self, device: torch.device) -> None:
        if device.type != "meta":
            for name in ("lora_A", "lora_B"):
                empty = torch.empty_like(getattr(self, name), device=device)
                setattr(self, name, nn.Parameter(empty))
            self.reset_lora_parameters()

    def forward(self, x: Tensor) -> Tensor:
        if self._unmerged is not None or not self.adapter_enabled:
            return self.linear(x)
        p: dict[str, Any] = self._parameters
        if self.training and self.lora_dropout > 0.0:
            dropped = F.dropout(x, self.lora_dropout)
            s = lora_projection(dropped, p["lora_A"], self.compute_dtype)
            return self.linear(x, None, p["lora_B"], s, self.scaling)
        return self.linear(x, p["lora_A"], p["lora_B"], None, self.scaling)

    def enable_adapter(self) -> None:
        """Puts the adapter back after :meth:`disable_adapter`."""
        self.adapter_enabled = True

    def disable_adapter(self) -> None:
        """Leaves the base layer alone in the forward pass; a merged adapter is unmerged first."""
        self.unmerge()
        self.adapter_enabled = False

    @property
    def merged(self) -> bool:
        """Whether the adapter is in the packed weight now."""
        return self._unmerged is not None

    def delta_weight(self) -> Tensor:
        """``s B A`` in fp32, ``[out_features, in_features]``."""
        return self.scaling * (self.lora_B.detach().float() @ self.lora_A.detach().float())

    @torch.no_grad()
    def merge(self) -> MergeReport:
        """Puts the adapter into the packed weight, *which rounds*, and says by how much.

        ``W + s B A`` is formed in fp32 from the exact dequantized ``W`` and quantized once. Small
        updates do not survive that: see :class:`MergeReport`. The packed weight of before is kept
        aside for :meth:`unmerge`, and other layers that share it keep it. A state dict saved while
        merged holds that unmerged weight, A and B.

        Raises:
            RuntimeError: it is merged already.
        """
        if self._unmerged is not None:
            raise RuntimeError("the adapter is merged already: unmerge() first")
        delta = self.delta_weight()
        exact = self.dequantize_weight(torch.float32).add_(delta)
        before, after = self._group(), self._fresh_group(exact)
        self._set_group(after)
        self._unmerged = before
        lost = self.dequantize_weight(torch.float32).sub_(exact)
        return MergeReport(lost.norm().item(), delta.norm().item(), exact.norm().item())

    def unmerge(self) -> None:
        """Puts back the packed weight of before :meth:`merge`, bit for bit; else does nothing."""
        if self._unmerged is not None:
            group, device = self._unmerged, self.weight.device
            self._unmerged = None
            self._set_group(group)
            if self.weight.device != device:  # the layer was moved while it was merged
                self.to(device)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        merged, unmerged = self._group(), self._unmerged
        try:
            if unmerged is not None:
                self._set_group(unmerged)
            super()._save_to_state_dict(destination, prefix, keep_vars)
        finally:
            self._set_group(merged)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unmerge()
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        rs = ", use_rslora=True" if self.use_rslora else ""
        return (
            f"{super().extra_repr()}, r={self.r}, lora_alpha={self.lora_alpha:g}, "
            f"lora_dropout={self.lora_dropout:g}{rs}"
        )


def mark_only_lora_as_trainable(model: nn.Module) -> list[str]:
    """Freezes every parameter but A and B of :class:`LoraLinear4bit`; returns their names."""
    trained = []
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(prefix=name, recurse=False):
            lora = isinstance(module, LoraLinear4bit) and key.endswith(("lora_A", "lora_B"))
            if parameter.is_floating_point():
                parameter.requires_grad_(lora)
            if lora:
                trained.append(key)
    return trained


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """A and B of every :class:`LoraLinear4bit` in ``model``, by their names in its state dict."""
    return {
        f"{name}.{key}" if name else key: getattr(module, key).detach()
        for name, module in model.named_modules()
        if isinstance(module, LoraLinear4bit)
        for key in ("lora_A", "lora_B")
    }


# --- replace_linear_layers ----------------------------------------------------------------------

DEFAULT_SKIP: tuple[str, ...] = ("lm_head", "embed_out", "score", "classifier")
"""Output layers by their usual names; the one that a model itself names is skipped as well."""


@dataclass
class ReplacementReport:
    """What :func:`replace_linear_layers` did; ``print`` it."""

    quant_type: str
    blocksize: int
    compress_statistics: bool
    replaced: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Name to ``(out_features, in_features)``, in the model's order; a layer that appears under
    two names, or two layers of one weight, are listed under both."""
    adapters: list[str] = field(default_factory=list)
    """Names of the layers that got LoRA."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Name to reason, for every linear layer that stays as it was."""
    unmatched: list[str] = field(default_factory=list)
    """Patterns given as ``skip`` that matched nothing."""
    weights: int = 0
    """Weights that are 4-bit now."""
    bytes_before: int = 0
    """Bytes of those weights before."""
    bytes_after: int = 0
    """... and after, scales included (the two tables of 16 and 256 values, which layers share, are
    not)."""
    bytes_kept: int = 0
    """Bytes of all other parameters, adapters included."""

    @property
    def bits_per_weight(self) -> float:
        """Bits a replaced weight, measured: packed bytes and scales over weights."""
        return 8 * self.bytes_after / self.weights if self.weights else 0.0

    def __str__(self) -> str:
        nested = ", double quantization" if self.compress_statistics else ""
        lines = []
        if self.weights:
            lines.append(
                f"{len(self.replaced)} linear layers to {self.quant_type}, blocks of "
                f"{self.blocksize}{nested}: {self.bytes_before / 1e6:.1f} MB to "
                f"{self.bytes_after / 1e6:.1f} MB ({self.bits_per_weight:.3f} bits a weight); "
                f"other parameters {self.bytes_kept / 1e6:.1f} MB"
            )
        if self.adapters:
            lines.append(f"LoRA on {len(self.adapters)} layers")
        reasons: dict[str, list[str]] = {}
        for name, reason in self.skipped.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"kept as it is: {', '.join(names[:3])}{more} ({reason})")
        return "\n".join(lines)


def replace_linear_layers(
    model: nn.Module,
    *,
    include: str | Iterable[str] | None = None,
    skip: str | Iterable[str] | None = None,
    quant_type: str | Format = "nf4",
    blocksize: int = 64,
    compress_statistics: bool = True,
    compute_dtype: torch.dtype | None = None,
    lora: LoraSpec | None = None,
    verbose: bool = True,
) -> ReplacementReport:
    """Quantizes the linear layers of ``model`` in place and says what it did.

    One layer at a time, each dense weight freed before the next is read. Layers that appear twice
    are quantized once and stay one; two layers of one weight share the packed one. Layers that
    this package quantized already are kept, and get adapters with ``lora``.

    Args:
        include: which layers; all by default. A pattern matches whole components anywhere in the
            dotted name ("q_proj", "layers.0.mlp"), with ``*`` and ``?`` as in shells.
        skip: which not. By default the output layer: what ``get_output_embeddings()`` names, and
            :data:`DEFAULT_SKIP`. An empty list quantizes it too, unless its weight is tied to an
            embedding, which reads it as it is.
        lora: adapters for the new layers, as :class:`LoraLinear4bit`. Nothing else is frozen or
            thawed here: see :func:`mark_only_lora_as_trainable`.
        quant_type, blocksize, compress_statistics, compute_dtype: as in :class:`Linear4bit`.
        verbose: prints the report.

    Raises:
        TypeError: ``model`` is a linear layer itself.
        ValueError: no layer is left to replace, or an ``include`` or ``target_modules`` pattern
            matches none (the nearest names are told), or a block size is not offered.
    """
    fmt = get_format(quant_type)
    report = ReplacementReport(fmt.name, check_blocksize(blocksize), compress_statistics)
    if isinstance(model, nn.Linear):
        raise TypeError("the model is a linear layer itself: use Linear4bit.from_linear")
    modules = _linear_modules(model)
    every_name = [name for group in modules for name in group]
    wanted = _patterns(include)
    unwanted = _patterns(DEFAULT_SKIP if skip is None else skip)
    targets = _patterns(lora.target_modules) if lora else []
    _check_patterns("include", wanted, every_name)
    _check_patterns("target_modules", targets, every_name)
    if skip is not None:
        report.unmatched = [p for p in unwanted if not _matched(every_name, p)]
        if report.unmatched:
            warnings.warn(
                f"skip patterns that match no linear layer: {', '.join(report.unmatched)}",
                stacklevel=2,
            )
    output = getattr(model, "get_output_embeddings", lambda: None)() if skip is None else None
    owners = _weight_owners(model)

    chosen: list[tuple[list[str], bool]] = []
    for names in modules:
        adapted = lora is not None and (not targets or any(_matched(names, t) for t in targets))
        module = model.get_submodule(names[0])
        reason = _reason_to_skip(names, module, wanted, unwanted, output, owners, adapted)
        if reason is None:
            chosen.append((names, adapted))
        else:
            report.skipped.update(dict.fromkeys(names, reason))
    if not chosen:
        told = "; ".join(f"{n}: {r}" for n, r in list(report.skipped.items())[:5])
        raise ValueError(
            f"no linear layer to quantize in {type(model).__name__}: {told or 'it has none'}"
        )

    kwargs: dict[str, Any] = {
        "compute_dtype": compute_dtype,
        "quant_type": fmt,
        "blocksize": blocksize,
        "compress_statistics": compress_statistics,
    }
    # Names, not modules: a reference kept here would keep a dense weight alive.
    first_of_weight = {
        names[0]: owners[id(model.get_submodule(names[0]).weight)][0][0] for names, _ in chosen
    }
    del module
    output = None
    for names, adapted in chosen:
        linear: Any = model.get_submodule(names[0])
        extra = lora.layer_kwargs() if lora is not None and adapted else {}
        cls = LoraLinear4bit if extra else Linear4bit
        owner = model.get_submodule(first_of_weight[names[0]])
        if isinstance(owner, Linear4bit):  # its weight is packed already, here or before
            new = cls.from_quantized(owner, **extra)
            new.bias = linear.bias
        else:
            new = cls.from_linear(linear, **kwargs, **extra)
            report.weights += linear.weight.numel()
            report.bytes_before += linear.weight.numel() * linear.weight.element_size()
            report.bytes_after += _packed_bytes(new)
        for name in names:
            model.set_submodule(name, new)
            report.replaced[name] = (new.out_features, new.in_features)
            if extra:
                report.adapters.append(name)
        del linear, owner, new
    report.bytes_kept = sum(
        p.numel() * p.element_size() for p in model.parameters() if p.dtype != torch.uint8
    )
    if verbose:
        print(report)
    return report


def _linear_modules(model: nn.Module) -> list[list[str]]:
    """Every linear layer once, with all names that it has, in the model's order."""
    by_module: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear):
            by_module.setdefault(id(module), []).append(name)
    return list(by_module.values())


def _weight_owners(model: nn.Module) -> dict[int, list[tuple[str, bool]]]:
    """By a parameter's id: the modules that hold it, and whether each is a linear layer."""
    owners: dict[int, list[tuple[str, bool]]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                held = owners.setdefault(id(parameter), [])
                held.append((name, isinstance(module, nn.Linear)))
    return owners


def _reason_to_skip(
    names: list[str],
    module: Any,
    wanted: list[str],
    unwanted: list[str],
    output: nn.Module | None,
    owners: dict[int, list[tuple[str, bool]]],
    adapted: bool,
) -> str | None:
    for pattern in unwanted:
        if _matched(names, pattern):
            return f"skip {pattern!r}"
    if module is output:
        return "the output layer"
    if wanted and not any(_matched(names, pattern) for pattern in wanted):
        return "not in include"
    components = names[0].split(".")
    if any(c.startswith("lora_") or c == "modules_to_save" for c in components):
        return "belongs to an adapter"
    if isinstance(module, Linear4bit):
        return None if adapted and type(module) is Linear4bit else "4-bit already"
    if type(module) is not nn.Linear:
        return f"a {type(module).__name__}, not a plain nn.Linear"
    if module.weight.dtype not in COMPUTE_DTYPES:
        return f"its weight is {module.weight.dtype}"
    if module.weight.numel() == 0:
        return "its weight is empty"
    others = [owner for owner, linear in owners[id(module.weight)] if not linear]
    if others:
        return f"its weight is tied to {others[0]}"
    return None


def _patterns(given: str | Iterable[str] | None) -> list[str]:
    return [given] if isinstance(given, str) else list(given or ())


def _matched(names: Iterable[str], pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(f".{name}.", f"*.{pattern}.*") for name in names)


def _check_patterns(argument: str, patterns: list[str], names: list[str]) -> None:
    for pattern in patterns:
        if not _matched(names, pattern):
            known = dict.fromkeys(part for name in names for part in (name.split(".")[-1], name))
            near = difflib.get_close_matches(pattern, known, n=3, cutoff=0.5)
            hint = f"; nearest: {', '.join(near)}" if near else ""
            raise ValueError(f"{argument} pattern {pattern!r} matches no linear layer{hint}")


def _packed_bytes(layer: Linear4bit) -> int:
    tensors = [layer.weight, layer.absmax, layer.nested_absmax, layer.nested_offset]
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
