""":class:`Experts4bit`: a mixture's experts in 4 bits, each quantized by itself.

transformers holds the experts of a layer as parameters of three dimensions, ``gate_up_proj``
``[E, 2 I, H]`` and ``down_proj`` ``[E, H, I]``, which are no linear layers: what replaces those
leaves them in 16 bits, and they are nine tenths of such a model. Here a parameter keeps its name
and holds packed bytes, its scales are buffers beside it (E experts, n values in each):

=========================  ==================  ===================================================
``<name>``                 uint8 [E, n / 2]    the packed weight of each, as in ``Linear4bit``
``<name>_absmax``          [E, blocks]         one scale a block; no block crosses experts
``<name>_quant_map``       fp32 [16]           the codebook
``<name>_nested_absmax``   fp32 [E, groups]    double quantization: one scale per 256 scales
``<name>_nested_quant_map``  fp32 [256]        ... and what the 8-bit codes mean
``<name>_nested_offset``   fp32 [E]            ... and what is added; of E4M3 scales the tensor's
=========================  ==================  ===================================================

The forward pass sorts the rows by expert and computes each expert that got some with
``linear_4bit`` on its slice, so that neither pass writes out a dense copy of the stack. Everything
else of the class is the model's own (its gate, its activation, biases): an ``Experts4bit`` is a
subclass of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import functional as F4
from ..experts import experts_linear_4bit
from ..formats import NESTED_BLOCKSIZE, Format, blocks, check_blocksize, get_format, scale_dtype
from .checkpoint import COMPUTE_DTYPES, CheckpointError

__all__ = ["Experts4bit", "expert_parameters"]

_SCALES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "nested_offset")
_FLAGS = ("num_experts", "has_gate", "has_bias", "is_transposed", "has_post_expert_norm")

Adapter = tuple[Tensor, Tensor, float]
"""LoRA of a stack: A ``[E, r, in]``, B ``[E, out, r]``, scaling."""


class _Shape(NamedTuple):
    """One weight of an expert, as it is multiplied with."""

    experts: int
    out_features: int
    in_features: int

    @property
    def size(self) -> int:
        """Values an expert."""
        return self.out_features * self.in_features


def expert_parameters(module: nn.Module) -> list[str]:
    """The names of the weights of ``module``, if it is one of transformers' stacks of experts.

    That is a module of a class that transformers lets choose how its experts are computed, which
    says how it is laid out (``has_gate``, ``is_transposed``, ...): two weights, one into the hidden
    dimension of the experts and ``down_proj`` out of it. Of any other module: none.
    """
    if not all(hasattr(module, name) for name in _FLAGS):
        return []
    names = ["gate_up_proj" if module.has_gate else "up_proj", "down_proj"]
    for name in names:
        weight = module._parameters.get(name)
        if weight is None or (weight.dim() != 3 and not isinstance(module, Experts4bit)):
            return []
    return names


class Experts4bit(nn.Module):
    """A stack of experts with frozen weights in 4 bits; made by :meth:`from_experts`.

    Shapes: ``hidden_states [T, H]`` fp32, bf16 or fp16, ``top_k_index [T, k]``, ``top_k_weights
    [T, k]``; the result is ``[T, H]``. T times k rows go through the experts, as in transformers'
    ``grouped_mm``; a token's k results are summed in fp32.

    Attributes:
        shapes: by a weight's name, ``(experts, out_features, in_features)``.
        format, blocksize, compress_statistics, compute_dtype: as in
            :class:`~qlora_kernels.nn.Linear4bit`.
    """

    shapes: dict[str, _Shape]
    format: Format
    blocksize: int
    compress_statistics: bool
    compute_dtype: torch.dtype | None
    dtype: torch.dtype
    num_experts: int
    has_gate: bool
    has_bias: bool
    has_post_expert_norm: bool
    is_transposed: bool

    # -- ways in --

    @classmethod
    def from_experts(
        cls,
        module: nn.Module,
        *,
        compute_dtype: torch.dtype | None = None,
        quant_type: str | Format = "nf4",
        blocksize: int = 64,
        compress_statistics: bool = True,
    ) -> Experts4bit:
        """``module`` with its experts quantized; all else in it is taken over, not copied.

        A module on meta gives one on meta, of packed shapes.

        Raises:
            TypeError: not a stack of experts: see :func:`expert_parameters`.
            ValueError: weights that are not fp32, bf16 or fp16, a block size or compute dtype that
                is not offered.
            FormatError: an unknown format.
        """
        names = expert_parameters(module)
        if not names or isinstance(module, Experts4bit):
            raise TypeError(
                f"{type(module).__name__} is no stack of dense experts: expected parameters "
                "[experts, out, in] of a class under transformers' use_experts_implementation"
            )
        if compute_dtype is not None and compute_dtype not in COMPUTE_DTYPES:
            raise ValueError(
                f"compute_dtype must be float32, bfloat16, float16 or None, got {compute_dtype}"
            )
        fmt = get_format(quant_type)
        fmt.check_nested(bool(compress_statistics))
        kind = _quantized_class(type(module))
        new = kind.__new__(kind)
        new.__dict__.update(module.__dict__)
        for held in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            new.__dict__[held] = module.__dict__[held].copy()
        own = new.__dict__
        own["shapes"], own["format"], own["blocksize"] = {}, fmt, check_blocksize(blocksize)
        own["compress_statistics"], own["compute_dtype"] = bool(compress_statistics), compute_dtype
        for name in names:
            weight = module._parameters[name]
            assert weight is not None
            if weight.dtype not in COMPUTE_DTYPES:
                raise ValueError(f"{name} of {weight.dtype} cannot be quantized to 4 bits")
            own["dtype"] = weight.dtype
            experts, n, k = weight.shape
            new.shapes[name] = _Shape(experts, *((k, n) if new.is_transposed else (n, k)))
            del new._parameters[name]
            new.give(name, new._empty(name, torch.device("meta")))
            if not weight.is_meta:
                new.set_weight(name, weight)
        return new

    def _empty(self, name: str, device: torch.device) -> dict[str, Tensor | None]:
        """Weight and scales of their final shapes, without values; see :meth:`take`."""
        shape, fmt, nested = self.shapes[name], self.format, self.compress_statistics
        n_blocks = blocks(shape.size, self.blocksize)

        def empty(dtype: torch.dtype, *size: int) -> Tensor:
            return torch.empty(size, dtype=dtype, device=device)

        new: dict[str, Tensor | None] = {f"{name}_{key}": None for key in _SCALES}
        new[name] = empty(torch.uint8, shape.experts, (shape.size + 1) // 2)
        dtype = scale_dtype(fmt.scale, nested)
        new[f"{name}_absmax"] = empty(dtype, shape.experts, n_blocks)
        new[f"{name}_quant_map"] = empty(torch.float32, 16)
        if nested:
            groups = blocks(n_blocks, NESTED_BLOCKSIZE)
            new[f"{name}_nested_absmax"] = empty(torch.float32, shape.experts, groups)
            new[f"{name}_nested_quant_map"] = empty(torch.float32, 256)
        if nested or fmt.scale == "e4m3":
            new[f"{name}_nested_offset"] = empty(torch.float32, shape.experts)
        return new

    def set_weight(self, name: str, weight: Tensor | Iterable[Tensor]) -> None:
        """Quantizes a dense weight, as the model holds it, into this one: see :meth:`quantized`."""
        self.give(name, self.quantized(name, weight))

    @torch.no_grad()
    def quantized(self, name: str, weight: Tensor | Iterable[Tensor]) -> dict[str, Tensor | None]:
        """A dense weight, as the model holds it, in this stack's format, for :meth:`give`.

        It is quantized on this stack's device, or on its own if the stack is on meta.

        Args:
            weight: ``[E, out, in]``, or ``[E, in, out]`` where ``is_transposed``; or its experts
                one after the other, so that they need not be in memory together.

        Raises:
            ValueError: another shape or number of experts.
            TypeError: a dtype that is not offered.
        """
        shape = self.shapes[name]
        want = (shape.out_features, shape.in_features)
        want = want[::-1] if self.is_transposed else want
        if isinstance(weight, Tensor) and tuple(weight.shape) != (shape.experts, *want):
            raise ValueError(
                f"{name} must have shape {(shape.experts, *want)}, got {tuple(weight.shape)}"
            )
        own, new, count = self._parameters[name], None, 0
        assert own is not None
        for dense in weight:
            e, count = count, count + 1
            if count > shape.experts:
                break
            if tuple(dense.shape) != want:
                raise ValueError(
                    f"expert {e} of {name} must have shape {want}, got {tuple(dense.shape)}"
                )
            dense = dense.detach().T if self.is_transposed else dense.detach()
            packed, state = F4.quantize_4bit(
                (dense if own.is_meta else dense.to(own.device)).contiguous(),
                blocksize=self.blocksize,
                quant_type=self.format,
                compress_statistics=self.compress_statistics,
            )
            if new is None:
                new = self._empty(name, packed.device)
            new[name][e] = packed.view(-1)  # type: ignore[index]
            parts = {"absmax": state.absmax, "nested_offset": state.offset}
            if state.state2 is not None:
                parts["nested_absmax"] = state.state2.absmax
            for key, value in parts.items():
                if value is not None:
                    new[f"{name}_{key}"][e] = value  # type: ignore[index]
            if e == 0:  # copies: safetensors refuses tensors that share their storage
                new[f"{name}_quant_map"].copy_(state.code)  # type: ignore[union-attr, arg-type]
                if state.state2 is not None:
                    table: Any = state.state2.code
                    new[f"{name}_nested_quant_map"].copy_(table)  # type: ignore[union-attr]
        if count != shape.experts or new is None:
            got = "more" if count > shape.experts else count
            raise ValueError(f"{name} has {shape.experts} experts, got {got}")
        return new

    def take(self, name: str) -> dict[str, Tensor | None]:
        """Weight and scales as they are, by parameter's and buffers' names; not copied."""
        scales = {f"{name}_{key}": self._buffers[f"{name}_{key}"] for key in _SCALES}
        return {name: self._parameters[name], **scales}

    def give(self, name: str, taken: dict[str, Tensor | None]) -> None:
        """Sets what :meth:`take` or :meth:`quantized` gave, on the device where the weight is."""
        own = self._parameters.get(name)
        for key, value in taken.items():
            if value is not None and own is not None and not own.is_meta:
                value = value.to(own.device)
            if key == name:
                assert value is not None
                packed = nn.Parameter(value.detach(), requires_grad=False)
                if own is not None:  # what tools have left on it
                    packed.__dict__.update(own.__dict__)
                self.register_parameter(name, packed)
            else:
                self.register_buffer(key, value)

    def check_loaded(self, where: str) -> None:
        """Raises CheckpointError unless all tensors are of this format: sizes, dtypes, tables.

        Args:
            where: this module's full name, for the error.
        """
        for name in self.shapes:
            now = self.take(name)
            for key, want in self._empty(name, torch.device("meta")).items():
                got = now[key]
                if want is None or got is None:
                    continue
                if got.shape != want.shape or got.dtype != want.dtype:
                    raise CheckpointError(
                        f"{where}.{key} is {list(got.shape)} x {got.dtype}, expected "
                        f"{list(want.shape)} x {want.dtype}"
                    )
            for key, table in (
                ("quant_map", self.format.tensors("cpu")[0]),
                ("nested_quant_map", self._scale_table()),
            ):
                own = now[f"{name}_{key}"]
                if own is None or table is None or own.is_meta:
                    continue
                if not torch.allclose(own.cpu(), table.cpu(), rtol=0, atol=1e-5):
                    raise CheckpointError(
                        f"{where}.{name}_{key} is not the table of {self.format.name!r} that is "
                        "known here"
                    )

    def _scale_table(self) -> Tensor | None:
        return self.format.scale_tensors("cpu")[0] if self.compress_statistics else None

    # -- ways out --

    def _stack(self, name: str) -> tuple[Any, ...]:
        """``packed ... nested_offset``, as :mod:`qlora_kernels.experts` takes them."""
        b = self._buffers
        return (
            self._parameters[name],
            b[f"{name}_absmax"],
            b[f"{name}_quant_map"],
            self.blocksize,
            b[f"{name}_nested_absmax"],
            b[f"{name}_nested_quant_map"],
            b[f"{name}_nested_offset"],
        )

    def dequantize_expert(self, name: str, expert: int, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight ``[out_features, in_features]`` of one expert.

        Args:
            dtype: fp32, bf16 or fp16; what it was before it was quantized by default.
        """
        shape = self.shapes[name]
        packed, absmax, code, blocksize, nested, nested_code, offset = self._stack(name)
        return torch.ops.qlora_kernels.dequantize_4bit(
            packed[expert],
            absmax[expert],
            code,
            blocksize,
            None if nested is None else nested[expert],
            nested_code,
            None if offset is None else offset[expert],
            [shape.out_features, shape.in_features],
            dtype or self.dtype,
        )

    def dequantized_experts(self, name: str, dtype: torch.dtype | None = None) -> Iterator[Tensor]:
        """Each expert's dense weight as the model holds it: ``[out, in]``, or turned."""
        for e in range(self.shapes[name].experts):
            dense = self.dequantize_expert(name, e, dtype)
            yield dense.T if self.is_transposed else dense

    def dequantize_weight(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """All experts' weights, dense, as the model holds them: ``[E, out, in]``, or turned."""
        experts, n, k = self.shapes[name]
        size = (experts, k, n) if self.is_transposed else (experts, n, k)
        device = self._parameters[name].device  # type: ignore[union-attr]
        out = torch.empty(size, dtype=dtype or self.dtype, device=device)
        for e, dense in enumerate(self.dequantized_experts(name, out.dtype)):
            out[e] = dense
        return out

    def dequantize(self, dtype: torch.dtype | None = None) -> nn.Module:
        """A module of the model's own class with dense experts; what else it holds is shared."""
        base = type(self)._base
        new = base.__new__(base)
        gone = {"shapes", "format", "blocksize", "compress_statistics", "compute_dtype", "dtype"}
        new.__dict__.update({k: v for k, v in self.__dict__.items() if k not in gone})
        for held in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            new.__dict__[held] = self.__dict__[held].copy()
        for name in self.shapes:
            for key in _SCALES:
                del new._buffers[f"{name}_{key}"]
            dense = self.dequantize_weight(name, dtype)
            new.register_parameter(name, nn.Parameter(dense, requires_grad=False))
        return new

    @property
    def bits_per_weight(self) -> float:
        """Bits a weight, scales included."""
        return self.format.bits_per_weight(self.blocksize, self.compress_statistics)

    def packed_bytes(self) -> int:
        """Bytes of the weights and their scales; tables of 16 and 256 values are not counted."""
        tensors: list[Tensor | None] = [self._parameters[n] for n in self.shapes]
        tensors += [
            self._buffers[f"{n}_{key}"]
            for n in self.shapes
            for key in ("absmax", "nested_absmax", "nested_offset")
        ]
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    # -- what nn.Module does to modules --

    def _apply(self, fn: Any, recurse: bool = True) -> Experts4bit:
        # .to(bfloat16) and .half() would cast the scales, .type() the bytes too: they only move.
        packed = {id(self._parameters[n]) for n in self.shapes}
        packed |= {id(self._buffers[f"{n}_{key}"]) for n in self.shapes for key in _SCALES}

        def move(t: Tensor) -> Tensor:
            new = fn(t)
            return t.to(new.device) if id(t) in packed and new.dtype != t.dtype else new

        super()._apply(move, recurse)
        return self

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # Its class was made at run time: pickle finds it by the class that it was made of.
        return _rebuild, (type(self)._base,), self.__dict__

    def extra_repr(self) -> str:
        shapes = ", ".join(f"{n}={list(s)}" for n, s in self.shapes.items())
        return (
            f"{shapes}, quant_type={self.format.name!r}, blocksize={self.blocksize}, "
            f"compress_statistics={self.compress_statistics}"
        )

    # -- forward --

    _base: type[nn.Module] = nn.Module

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        lora: dict[str, list[Adapter]] | None = None,
    ) -> Tensor:
        """See the class.

        Args:
            lora: adapters by the weight's name; several on one weight are added up.
        """
        tokens, k = top_k_index.shape
        ids, order = torch.sort(top_k_index.reshape(-1), stable=True)
        experts = torch.arange(1, self.num_experts + 1, device=ids.device, dtype=ids.dtype)
        ends = torch.searchsorted(ids, experts)  # how many ids are below each

        x = hidden_states[order // k]
        x = self._linear("gate_up_proj" if self.has_gate else "up_proj", x, ends, lora)
        x = self._apply_gate(x) if self.has_gate else self.act_fn(x)  # type: ignore[operator]
        x = self._linear("down_proj", x, ends, lora)
        if self.has_post_expert_norm:
            x = self.post_expert_norm(x)  # type: ignore[operator]
        x = x * top_k_weights.reshape(-1)[order].unsqueeze(-1)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.shape[0], device=order.device)
        x = x[back].view(tokens, k, -1).sum(1)
        return x.to(hidden_states.dtype)

    def _linear(
        self, name: str, x: Tensor, ends: Tensor, lora: dict[str, list[Adapter]] | None
    ) -> Tensor:
        adapters = (lora or {}).get(name, [])
        a, b, scaling = _joined(adapters) if adapters else (None, None, 1.0)
        bias = getattr(self, f"{name}_bias") if self.has_bias else None
        n = self.shapes[name].out_features
        return experts_linear_4bit(
            x, ends, self._stack(name), n, bias, a, b, scaling, self.compute_dtype
        )


def _joined(adapters: list[Adapter]) -> Adapter:
    """Several adapters as one of their ranks together."""
    if len(adapters) == 1:
        return adapters[0]
    a = torch.cat([a for a, _, _ in adapters], 1)
    b = torch.cat([b * scaling for _, b, scaling in adapters], 2)
    return a, b, 1.0


_classes: dict[type[nn.Module], type[Experts4bit]] = {}


def _quantized_class(base: type[nn.Module]) -> type[Experts4bit]:
    """The class of ``base``'s experts in 4 bits: ours in front, the model's behind."""
    if base not in _classes:
        body = {"_base": base, "__module__": base.__module__}
        _classes[base] = type(f"{base.__name__}4bit", (Experts4bit, base), body)
    return _classes[base]


def _rebuild(base: type[nn.Module]) -> Experts4bit:
    kind = _quantized_class(base)
    return kind.__new__(kind)
