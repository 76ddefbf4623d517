""":class:`Linear4bit`: a linear layer whose weight is 4-bit, by bitsandbytes' name and signature.

It is dense as it is constructed, so that a checkpoint can be copied in, and packed from the moment
that it is moved (``.to(device)``, the device it is on included) or first computes. What is made by
:meth:`Linear4bit.from_linear`, by ``from_pretrained`` or on the meta device is packed at once.

Packed, it keeps

===================  =========================  =================================================
``weight``           ``Params4bit``, frozen     uint8: two values a byte, the earlier in the high
                                                nibble; or these bytes under another dtype
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
``weight.quant_state`` holds the same tensors as the buffers: whoever replaces the one (a parameter
assigned to ``layer.weight``, a state assigned to it) has replaced the other.

In a state dict they take bitsandbytes' key names (see :func:`~.functional.checkpoint_entries`).

Several processes: ``DistributedDataParallel`` takes a model of these layers as it is, and so does
``fully_shard`` (FSDP2): the packed bytes are cut along dimension 0 and gathered a layer at a time;
scales are buffers, whole on each process (0.13 bits a weight when nested, 0.5 otherwise). Save and
load ``model.state_dict()``, then of DTensors, by ``torch.distributed.checkpoint``, whose
``get_model_state_dict`` refuses keys that name neither a parameter nor a buffer, such as
``weight.absmax``.
"""

from __future__ import annotations

import logging
import math
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .. import functional as F4
from ..formats import (
    NESTED_BLOCKSIZE,
    Format,
    blocks,
    check_blocksize,
    get_format,
    register_format,
    scale_dtype,
)
from .checkpoint import COMPUTE_DTYPES, CheckpointError, read_checkpoint_entries
from .params import Params4bit

__all__ = ["Linear4bit", "LinearFP4", "LinearNF4"]

logger = logging.getLogger("qlora_kernels.nn")

_BUFFERS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "nested_offset")


class _Layout:
    """What the bytes mean, beside the tensors. One object for all modules that share a weight."""

    __slots__ = ("blocksize", "dtype", "fmt", "nested", "state", "storage")

    def __init__(
        self,
        fmt: Format,
        blocksize: int,
        nested: bool,
        dtype: torch.dtype,
        storage: torch.dtype = torch.uint8,
    ) -> None:
        self.fmt, self.blocksize, self.nested, self.dtype = fmt, blocksize, nested, dtype
        self.storage = storage
        # The scales, as the weight's quant_state; None while the weight is dense.
        self.state: F4.QuantState | None = None

    def take(self, fmt: Format, state: F4.QuantState) -> None:
        self.fmt, self.blocksize, self.nested = fmt, state.blocksize, state.nested
        self.dtype = state.dtype or self.dtype

    def fresh(self) -> _Layout:
        return _Layout(self.fmt, self.blocksize, self.nested, self.dtype, self.storage)


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


def _plain(t: Tensor) -> Tensor:
    return t.data if isinstance(t, Params4bit) else t


class Linear4bit(nn.Linear):
    """``y = x W^T + b`` with ``W`` frozen, in 4 bits a value and one scale a block.

    The constructor draws ``W`` as ``nn.Linear`` does; it is quantized when the layer is moved to a
    device or first computes. :meth:`from_linear` quantizes a layer that exists. On the meta device
    nothing is drawn, and the weight has its packed shape.

    Args:
        input_features, output_features, bias: as in ``nn.Linear``.
        compute_dtype: x, bias and weights are rounded to it for the product (sums are fp32, the
            result has x's dtype). None takes x's dtype.
        compress_statistics: double quantization of the scales.
        quant_type: a format or its name ("nf4", "fp4", ...; see :mod:`qlora_kernels.formats`).
            The default is bitsandbytes'; QLoRA's is "nf4".
        quant_storage: dtype under which the packed bytes are held; FSDP1 wants the model's.
        device, dtype: of weight and bias, and what the weight dequantizes to.
        blocksize: values a scale, 16 to 4096, a power of two.

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

    _quant_type: ClassVar[str | None] = None  # of a class that has one format only

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_type: str | Format = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | int | None = None,
        *,
        blocksize: int = 64,
        dtype: torch.dtype | None = None,
    ) -> None:
        # Not nn.Linear.__init__, which would allocate the dense weight on meta too.
        nn.Module.__init__(self)
        for name, size in (("in_features", input_features), ("out_features", output_features)):
            if not isinstance(size, int) or size <= 0:
                raise ValueError(f"{name} must be a positive integer, got {size!r}")
        if compute_dtype is not None and compute_dtype not in COMPUTE_DTYPES:
            raise ValueError(
                f"compute_dtype must be float32, bfloat16, float16 or None, got {compute_dtype}"
            )
        dtype = dtype or torch.get_default_dtype()
        if dtype not in COMPUTE_DTYPES:
            raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
        self.in_features, self.out_features = input_features, output_features
        self.compute_dtype = compute_dtype
        fmt, nested = get_format(quant_type), bool(compress_statistics)
        fmt.check_nested(nested)
        self._layout = _Layout(fmt, check_blocksize(blocksize), nested, dtype, quant_storage)
        for name in _BUFFERS:
            self.register_buffer(name, None)
        like = torch.empty(0, dtype=dtype, device=device)
        # What bitsandbytes does when a layer first computes is done for layers that were
        # constructed as there, and not for those that load or convert: see _first_forward.
        self._first_forward_is_due = not like.is_meta
        self.compute_type_is_set = compute_dtype is not None
        if like.is_meta:
            self._put_weight(self._packed_on_meta(like.device))
        else:
            if isinstance(quant_type, Format):
                register_format(quant_type)  # the parameter knows it by name
            self._put_weight(self._dense(like.new_empty(output_features, input_features)))
        self.register_parameter(
            "bias", nn.Parameter(like.new_empty(output_features)) if bias else None
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
        if cls._quant_type is None:
            kwargs["quant_type"] = quant_type
        new = cls(
            linear.in_features,
            linear.out_features,
            bias=False,
            compute_dtype=compute_dtype,
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
        A layer that is still dense is quantized first, where it is.
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
        """Draws weight and bias as ``nn.Linear`` does; nothing on meta. A packed weight stays
        packed: what is drawn is quantized."""
        if self.weight.device.type == "meta":
            return
        shape, device = (self.out_features, self.in_features), self.weight.device
        with torch.no_grad():
            dense = self._is_dense
            weight = (
                self.weight.data
                if dense
                else torch.empty(shape, dtype=self._layout.dtype, device=device)
            )
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
            if not dense:
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

    # -- dense and packed --

    @property
    def _is_dense(self) -> bool:
        return self._buffers["absmax"] is None

    def _put_weight(self, weight: nn.Parameter) -> None:
        """Sets the parameter, and nothing else."""
        super().__setattr__("weight", weight)

    def _dense(self, data: Tensor) -> Params4bit:
        layout = self._layout
        return Params4bit(
            data,
            blocksize=layout.blocksize,
            compress_statistics=layout.nested,
            quant_type=layout.fmt.name,
            quant_storage=layout.storage,
        )

    def _packed(self, data: Tensor, state: F4.QuantState | None) -> Params4bit:
        weight = self._dense(data)
        weight.quant_state, weight.bnb_quantized = state, True
        return weight

    def _packed_on_meta(self, device: torch.device) -> Params4bit:
        """Weight and scales of their final shapes, without values."""
        layout = self._layout
        count = self.in_features * self.out_features
        n_blocks = blocks(count, layout.blocksize)

        def floats(*size: int) -> Tensor:
            return torch.empty(size, dtype=torch.float32, device=device)

        dtype = scale_dtype(layout.fmt.scale, layout.nested)
        buffers: dict[str, Tensor | None] = dict.fromkeys(_BUFFERS)
        buffers["absmax"] = torch.empty(n_blocks, dtype=dtype, device=device)
        buffers["quant_map"] = floats(16)
        if layout.nested:
            buffers["nested_absmax"] = floats(blocks(n_blocks, NESTED_BLOCKSIZE))
            buffers["nested_quant_map"] = floats(256)
        if layout.nested or layout.fmt.scale == "e4m3":
            buffers["nested_offset"] = floats()
        self._buffers.update(buffers)
        layout.state = self._state_of_buffers()
        packed = torch.empty((count + 1) // 2, dtype=torch.uint8, device=device)
        return self._packed(F4.as_storage(packed, layout.storage), layout.state)

    def _state_of_buffers(self) -> F4.QuantState:
        b, layout = self._buffers, self._layout
        state2 = None
        if b["nested_absmax"] is not None:
            state2 = F4.QuantState(
                absmax=b["nested_absmax"],
                code=b["nested_quant_map"],
                blocksize=NESTED_BLOCKSIZE,
                dtype=torch.float32,
            )
        assert b["absmax"] is not None
        return F4.QuantState(
            absmax=b["absmax"],
            shape=torch.Size((self.out_features, self.in_features)),
            code=b["quant_map"],
            blocksize=layout.blocksize,
            quant_type=layout.fmt.name,
            dtype=layout.dtype,
            offset=b["nested_offset"],
            state2=state2,
        )

    def _refresh(self) -> None:
        """``quant_state`` says what the buffers say: after they were moved or replaced."""
        if self._is_dense:
            return
        layout, new = self._layout, self._state_of_buffers()
        if layout.state is None:
            layout.state = new
        else:
            layout.state.__dict__.update(new.__dict__)
        weight = self._parameters.get("weight")
        if isinstance(weight, Params4bit):
            weight._become(layout.state, weight.dtype)

    def _pack(self) -> None:
        """Quantizes a weight that is still dense, where it is."""
        self._sync()
        if not self._is_dense:
            return
        weight = self._parameters.get("weight")
        if not isinstance(weight, Params4bit) or torch.compiler.is_compiling():
            raise RuntimeError(
                "the layer's weight is still dense, and what is traced or replicated quantizes "
                "nothing: move the layer to its device first, model.to(device)"
            )
        if weight.is_meta:
            raise RuntimeError("the layer's weight is on meta: load a checkpoint first")
        weight._quantize(weight.device)
        self._sync()

    def _sync(self) -> None:
        """Takes note of what happened to the parameter by itself: it was quantized, was given
        another ``quant_state``, or lost it."""
        weight, layout = self._parameters.get("weight"), self._layout
        if not isinstance(weight, Params4bit) or weight.quant_state is layout.state:
            return
        if weight.quant_state is not None:
            self._claim(weight)
        elif not self._is_dense:
            weight._become(self._state_of_buffers(), weight.dtype)
            layout.state = weight.quant_state

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and "_layout" in self.__dict__:
            value = self._claim(value)
        super().__setattr__(name, value)

    def _claim(self, weight: Any) -> Any:
        """Makes a parameter that is set as ``weight`` this layer's own, scales and all.

        Returns:
            what is to be set: the parameter itself, or, for a plain dense one, and for packed bytes
            that fill a layer on meta, a ``Params4bit`` of its data.
        """
        shape, old = (self.out_features, self.in_features), self._parameters.get("weight")
        layout = self._layout
        if type(weight) is nn.Parameter and tuple(weight.shape) == shape:
            if weight.dtype in COMPUTE_DTYPES:
                new = self._dense(weight.detach())
                new.__dict__.update(weight.__dict__)
                weight = new
        elif type(weight) is nn.Parameter and old is not None and old.is_meta:
            layout.storage = weight.dtype
            new = self._packed(weight.detach(), layout.state)
            new.__dict__.update(weight.__dict__)
            return new
        if not isinstance(weight, Params4bit):
            return weight  # packed bytes by other means: shards, replicas. The scales stay.
        state = weight.quant_state
        if state is not None:
            if state.shape is not None and tuple(state.shape) != shape:
                raise ValueError(
                    f"the weight has shape {tuple(state.shape)}, the layer needs {shape}"
                )
            fmt = layout.fmt if state.quant_type == layout.fmt.name else F4.format_of(state)
            self._leave_group(fmt, state, weight.dtype)
        elif weight.is_dense:
            if tuple(weight.shape) != shape:
                raise ValueError(
                    f"the weight has shape {tuple(weight.shape)}, the layer needs {shape}"
                )
            fmt = get_format(weight.quant_type)
            new_layout = _Layout(
                fmt,
                check_blocksize(weight.blocksize),
                bool(weight.compress_statistics),
                weight.dtype if weight.dtype in COMPUTE_DTYPES else layout.dtype,
                weight.quant_storage,
            )
            self._buffers = {**self._buffers, **dict.fromkeys(_BUFFERS)}
            self._layout = new_layout
        else:  # packed bytes that lost their state: the layer's scales are theirs
            weight.quant_state = self.quant_state
        return weight

    def _leave_group(self, fmt: Format, state: F4.QuantState, storage: torch.dtype) -> None:
        """Takes a state's scales; layers that shared the weight of before keep that."""
        layout = self._layout.fresh()
        layout.take(fmt, state)
        layout.storage, layout.state = storage, state
        self._layout = layout
        self._buffers = {**self._buffers, **_buffers_of(state)}

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
            quant_storage=layout.storage,
        )

    def _store(self, packed: Tensor, state: F4.QuantState) -> None:
        if self.weight.is_meta and not packed.is_meta:
            self._put_weight(self._packed(packed, state))
        else:
            self.weight.data = packed  # in place: modules that share the parameter see it
        self._layout.dtype = state.dtype or self._layout.dtype
        self._buffers.update(_buffers_of(state))
        self._refresh()

    def _group(self) -> _Group:
        self._pack()
        return _Group(self.weight, self._buffers, self._layout)

    def _set_group(self, group: _Group) -> None:
        self._put_weight(group.weight)
        self._buffers, self._layout = group.buffers, group.layout

    def _fresh_group(self, weight: Tensor) -> _Group:
        """``weight`` quantized as this layer is, in tensors that nobody shares."""
        packed, state = self._quantize(weight)
        layout = self._layout.fresh()
        layout.state = state
        return _Group(self._packed(packed, state), _buffers_of(state), layout)

    # -- ways out --

    @property
    def quant_state(self) -> F4.QuantState | None:
        """The scales as :class:`qlora_kernels.functional.QuantState`, the weight's; tensors are not
        copied. None while the weight is dense."""
        self._sync()
        if self._is_dense:
            return None
        state = self._layout.state
        if state is None or state.absmax is not self._buffers["absmax"]:
            state = self._state_of_buffers()  # a replica's
        return state

    @quant_state.setter
    def quant_state(self, state: F4.QuantState | None) -> None:
        if state is not None:
            fmt = self._layout.fmt
            fmt = fmt if state.quant_type == fmt.name else F4.format_of(state)
            self._leave_group(fmt, state, self._layout.storage)
            weight = self._parameters.get("weight")
            if isinstance(weight, Params4bit):
                weight.quant_state = state

    @property
    def format(self) -> Format:
        """The 4-bit format of the weight."""
        return self._layout.fmt

    @property
    def quant_type(self) -> str:
        """The name of the format."""
        return self._layout.fmt.name

    @property
    def quant_storage(self) -> torch.dtype:
        """The dtype under which the packed bytes are held."""
        return self._layout.storage

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
        self._pack()
        return F4.dequantize_4bit(_plain(self.weight), self.quant_state, dtype=dtype)

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
        # A dense weight is quantized by `fn` itself, if that moves it: see Params4bit.to. Of a
        # packed one .to(bfloat16) and .half() would cast what is floating point, .type()
        # everything. Bytes and scales only ever move.
        self._sync()
        weight = self._parameters.get("weight")
        packed = set() if self._is_dense else {id(weight), *map(id, self._buffers.values())}

        def move(t: Tensor) -> Tensor:
            if id(t) not in packed:
                return _plain(fn(t))
            t = _plain(t)
            new = fn(t)
            return new if new.dtype == t.dtype else t.to(new.device)

        super()._apply(move, recurse)
        now = self._parameters.get("weight")
        if isinstance(weight, Params4bit) and type(now) is nn.Parameter:  # to meta, or from it
            self._parameters["weight"] = weight._like(now.data, weight.quant_state)
        self._sync()
        self._refresh()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self._sync()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in _BUFFERS:
            destination.pop(prefix + name, None)
        key = prefix + "weight"
        if not keep_vars and key in destination:
            destination[key] = _plain(destination[key])
        # On meta there is no offset to write into the JSON: weight and bias stand for the rest.
        if not self._is_dense and self.weight.device.type != "meta":
            state = self.quant_state
            assert state is not None
            for name, value in F4.checkpoint_entries(state, self._layout.fmt).items():
                destination[f"{key}.{name}"] = value

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
        self._sync()
        key, start = prefix + "weight", prefix + "weight."
        entries = {k[len(start) :]: v for k, v in state_dict.items() if k.startswith(start)}
        rest = {k: v for k, v in state_dict.items() if not k.startswith(start)}
        weight = rest.get(key)
        loaded: tuple[F4.QuantState, Format] | None = None
        stays_dense = False
        if weight is None:
            if entries:
                names = ", ".join(sorted(start + k for k in entries))
                error_msgs.append(f"{key} is missing, its scales are there: {names}")
        else:
            try:
                stays_dense = self._is_dense and not entries and self._is_dense_weight(weight, key)
                if not stays_dense:
                    packed, state, fmt = self._read(weight, entries, key)
                    packed = F4.as_storage(packed, self._layout.storage)
                    rest[key], loaded = packed, (state, fmt)
            except ValueError as error:
                error_msgs.append(str(error))
                del rest[key]

        errors, own = len(error_msgs), self._parameters["weight"]
        assert own is not None
        meta = own.is_meta
        becomes_packed = loaded is not None and self._is_dense
        if becomes_packed:  # a place of the packed shape for the base class to copy to
            self._parameters["weight"] = nn.Parameter(
                torch.empty_like(rest[key], device=own.device), requires_grad=False
            )
        # The base class would look for our buffers under their own names.
        non_persistent = self._non_persistent_buffers_set
        self._non_persistent_buffers_set = non_persistent | set(_BUFFERS)
        try:
            super()._load_from_state_dict(
                rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
        finally:
            self._non_persistent_buffers_set = non_persistent
        failed = len(error_msgs) > errors
        if becomes_packed:
            place, self._parameters["weight"] = self._parameters["weight"], own
            assert place is not None
            if not failed and own.is_meta:
                self._parameters["weight"] = self._packed(_plain(place).data, None)
            elif not failed:
                own.data = _plain(place).data
        if weight is None or stays_dense:
            return
        if loaded is None and key in missing_keys:
            missing_keys.remove(key)  # it was there; the error says what is wrong
        if loaded is None or failed:
            return
        if meta and self.weight.is_meta and not weight.is_meta:
            return  # without assign=True nothing can be copied there; torch warns
        self._adopt(*loaded, self.weight.device, local_metadata.get("assign_to_params_buffers"))

    def _is_dense_weight(self, weight: Tensor, where: str) -> bool:
        if weight.dtype not in COMPUTE_DTYPES:
            return False
        shape = (self.out_features, self.in_features)
        if tuple(weight.shape) != shape:
            raise CheckpointError(
                f"{where}: the weight must have shape {shape}, got {tuple(weight.shape)}"
            )
        return True

    def _adopt(
        self, state: F4.QuantState, fmt: Format, device: torch.device, assign: bool | None = True
    ) -> None:
        """Takes the layout of ``state`` and its scales, or copies of them."""
        self._layout.take(fmt, state)
        for name, value in _buffers_of(state).items():
            if value is not None:
                value = value.to(device, copy=not assign)
            self._buffers[name] = value
        weight = self._parameters["weight"]
        if type(weight) is nn.Parameter and not weight.is_meta:
            new = self._packed(weight.data, None)
            new.__dict__.update(weight.__dict__)
            self._parameters["weight"] = new
        self._refresh()

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
        if self._first_forward_is_due and not torch.compiler.is_compiling():
            self._first_forward(x)
        return self.linear(x)

    def _first_forward(self, x: Tensor) -> None:
        """As in bitsandbytes: the bias takes the dtype that is computed in, and a layer that got no
        ``compute_dtype`` says what that means for fp16."""
        self._first_forward_is_due = False
        dtype = self.compute_dtype or x.dtype
        if dtype in COMPUTE_DTYPES and self.bias is not None:
            self.bias.data = self.bias.data.to(dtype)
        if not self.compute_type_is_set and x.dtype == torch.float16:
            rows = "" if x.numel() == x.shape[-1] else " or training"
            logger.warning(
                "A Linear4bit without compute_dtype computes in float16, the dtype of its input: "
                "on CPUs that lack it that is slow inference%s. compute_dtype=torch.bfloat16 or "
                "torch.float32 is what can be given instead.",
                rows,
            )
        self.compute_type_is_set = True

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
        weight: Any
        bias: Any
        try:
            weight, bias = self._parameters["weight"], self._parameters["bias"]
        except KeyError:  # a replica of nn.DataParallel has plain attributes
            weight, bias = self.weight, self.bias
        layout = self._layout
        if self._buffers["absmax"] is None:
            self._pack()
        elif not torch.compiler.is_compiling():
            # The weight may have got another state behind the layer's back.
            if weight.__dict__.get("quant_state", layout.state) is not layout.state:
                self._sync()
        b, layout = self._buffers, self._layout
        if layout.storage is not torch.uint8:
            weight = weight.view(torch.uint8)
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


class _OneFormat(Linear4bit):
    _quant_type: ClassVar[str]

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            input_features,
            output_features,
            bias,
            compute_dtype,
            compress_statistics,
            self._quant_type,
            quant_storage,
            device,
            **kwargs,
        )


class LinearFP4(_OneFormat):
    """:class:`Linear4bit` of bitsandbytes' FP4; ``blocksize`` and ``dtype`` as there."""

    _quant_type = "fp4"


class LinearNF4(_OneFormat):
    """:class:`Linear4bit` of NF4; ``blocksize`` and ``dtype`` as there."""

    _quant_type = "nf4"
