""":class:`Params4bit`: a parameter that is dense until it is moved, and 4-bit from then on.

bitsandbytes' class by name, signature and behaviour: ``.to(device)`` quantizes it in place,
``copy``, ``deepcopy``, ``pickle``, ``torch.chunk`` and ``torch.split`` keep what it knows, and the
scales are read as its attributes. Two things differ: bytes are never cast (there ``.to(dtype)``
reads packed values of ``quant_storage=bfloat16`` as numbers), and moving it leaves the state of the
one that was moved where it is.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional as F4

__all__ = ["Params4bit"]


def _of_state(name: str, *path: str) -> property:
    """An attribute that is read from ``quant_state``: FSDP looks a state dict's keys up so."""

    def get(self: Params4bit) -> Any:
        value: Any = self.__dict__.get("quant_state")
        for part in path:
            value = None if value is None else getattr(value, part)
        if value is None and (self.__dict__.get("quant_state") is None or len(path) > 1):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return value

    return property(get)


_KEPT_BY = (torch.chunk, torch.split, Tensor.chunk, Tensor.split, Tensor.detach)


class Params4bit(nn.Parameter):
    """A weight that becomes 4-bit where it is moved to.

    Args:
        data: the dense weight, or packed bytes with ``quant_state`` or ``bnb_quantized``.
        requires_grad: False; packed bytes have no gradient.
        quant_state: the scales of packed bytes.
        blocksize: values a scale; 64 unless given.
        compress_statistics: double quantization of the scales.
        quant_type: a format's name.
        quant_storage: dtype under which the packed bytes are held.
        module: told of the scales (its ``quant_state`` is set) when this is quantized.
        bnb_quantized: whether ``data`` is packed.
        kwargs: taken and dropped: other libraries pass a parameter's ``__dict__`` here.
    """

    blocksize: int
    compress_statistics: bool
    quant_type: str
    quant_state: F4.QuantState | None
    quant_storage: torch.dtype
    bnb_quantized: bool
    module: Any

    def __new__(
        cls,
        data: Tensor | None = None,
        requires_grad: bool = False,
        quant_state: F4.QuantState | None = None,
        blocksize: int | None = None,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        module: Any = None,
        bnb_quantized: bool = False,
        **kwargs: Any,
    ) -> Params4bit:
        data = torch.empty(0) if data is None else data
        self = torch.Tensor._make_subclass(cls, data, requires_grad)
        self.blocksize = 64 if blocksize is None else blocksize
        self.compress_statistics = compress_statistics
        self.quant_type = quant_type
        self.quant_state = quant_state
        self.quant_storage = quant_storage
        self.bnb_quantized = bnb_quantized
        self.module = module
        return self

    @classmethod
    def from_prequantized(
        cls,
        data: Tensor,
        quantized_stats: dict[str, Any],
        requires_grad: bool = False,
        device: torch.device | str = "cuda",
        module: Any = None,
        **kwargs: Any,
    ) -> Params4bit:
        """From packed bytes and what ``QuantState.as_dict(packed=True)`` gave.

        Raises:
            ValueError: the state does not agree with itself; see ``QuantState.from_dict``.
        """
        state = F4.QuantState.from_dict(quantized_stats, device=device)
        self = cls(data.to(device), requires_grad, module=module)
        self._become(state, data.dtype)
        if module is not None:
            module.quant_state = state
        return self

    @property
    def is_dense(self) -> bool:
        """Whether it was not quantized yet."""
        return not self.bnb_quantized and self.quant_state is None

    absmax = _of_state("absmax", "absmax")
    code = _of_state("code", "code")
    quant_map = _of_state("quant_map", "code")
    offset = _of_state("offset", "offset")
    state2 = _of_state("state2", "state2")
    nested_absmax = _of_state("nested_absmax", "state2", "absmax")
    nested_blocksize = _of_state("nested_blocksize", "state2", "blocksize")
    nested_quant_map = _of_state("nested_quant_map", "state2", "code")
    nested_dtype = _of_state("nested_dtype", "state2", "dtype")
    nested_offset = _of_state("nested_offset", "offset")

    # -- quantizing and moving --

    def _become(self, state: F4.QuantState, storage: torch.dtype) -> None:
        """Says that the data are ``state``'s packed bytes now."""
        self.blocksize, self.compress_statistics = state.blocksize, state.nested
        self.quant_type = str(state.quant_type)
        self.quant_storage, self.quant_state, self.bnb_quantized = storage, state, True

    def _quantize(self, device: torch.device | str) -> Params4bit:
        """Packs the dense data, in place."""
        # Ordinary tensors whatever is going on around: they outlive it, and a backward saves them.
        with torch.inference_mode(False), torch.no_grad():
            packed, state = F4.quantize_4bit(
                self.data.contiguous().to(device),
                blocksize=self.blocksize,
                compress_statistics=bool(self.compress_statistics),
                quant_type=self.quant_type,
                quant_storage=self.quant_storage,
            )
        self.data = packed
        self.quant_state = state
        self.bnb_quantized = True
        if self.module is not None:
            self.module.quant_state = state
        return self

    def to(self, *args: Any, **kwargs: Any) -> Params4bit:  # type: ignore[override]
        """As ``Tensor.to``. A dense weight that is given a device is quantized there, in place.

        Packed bytes move with their scales, into a new parameter, and keep their dtype.
        """
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        if self.is_dense:
            if device is not None and device.type != "meta":
                return self._quantize(device)
            data = self.data.to(device=device, dtype=dtype, non_blocking=non_blocking)
            return self._like(data, None)
        state = self.quant_state
        if device is not None and state is not None:
            state = state.moved(device)
        return self._like(self.data.to(device=device, non_blocking=non_blocking), state)

    def cpu(self, *args: Any, **kwargs: Any) -> Params4bit:  # type: ignore[override]
        return self.to(device="cpu")

    def cuda(  # type: ignore[override]
        self, device: torch.device | str | int | None = None, non_blocking: bool = False
    ) -> Params4bit:
        return self.to(device="cuda" if device is None else device, non_blocking=non_blocking)

    def xpu(  # type: ignore[override]
        self, device: torch.device | str | int | None = None, non_blocking: bool = False
    ) -> Params4bit:
        return self.to(device="xpu" if device is None else device, non_blocking=non_blocking)

    # -- copies, and parts --

    def _like(self, data: Tensor, state: F4.QuantState | None) -> Params4bit:
        """A parameter of ``data`` that knows all that this one knows, but for ``state``."""
        new = torch.Tensor._make_subclass(type(self), data, self.requires_grad)
        new.__dict__.update(self.__dict__)
        new.quant_state = state
        return new

    def __copy__(self) -> Params4bit:
        return self._like(self.data, self.quant_state)

    def __deepcopy__(self, memo: dict[int, Any]) -> Params4bit:
        if id(self) in memo:
            return memo[id(self)]
        new = self._like(copy.deepcopy(self.data, memo), None)
        memo[id(self)] = new
        module = self.module
        for name, value in self.__dict__.items():
            if name != "module":
                new.__dict__[name] = copy.deepcopy(value, memo)
        # The copy of its module, if that is being copied; else it stays with the one it has.
        new.module = memo.get(id(module), module)
        return new

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.data, self.requires_grad), dict(self.__dict__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Plain tensors come out of every function but those that cut the parameter or detach it.
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        if func in _KEPT_BY and isinstance(args[0], Params4bit):
            one = args[0]
            if isinstance(result, (tuple, list)):
                return tuple(one._like(part, one.quant_state) for part in result)
            return one._like(result, one.quant_state)
        return result


def _rebuild(cls: type[Params4bit], data: Tensor, requires_grad: bool) -> Params4bit:
    return torch.Tensor._make_subclass(cls, data, requires_grad)
