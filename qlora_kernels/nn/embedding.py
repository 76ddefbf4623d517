""":class:`Embedding4bit`: an embedding in 4 bits, by bitsandbytes' name and signature."""

from __future__ import annotations

import logging
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional as F4
from ..formats import get_format
from .checkpoint import CheckpointError, read_checkpoint_entries
from .params import Params4bit

__all__ = ["Embedding4bit", "EmbeddingFP4", "EmbeddingNF4"]

logger = logging.getLogger("qlora_kernels.nn")


class Embedding4bit(nn.Embedding):
    """``nn.Embedding`` with a frozen weight in 4 bits, dense until it is moved or first used.

    A lookup reads the packed rows and their scales alone, if a row is whole blocks of 64; else the
    whole weight is dequantized, which is slow, and said once.

    Args:
        num_embeddings, embedding_dim, device, dtype: as in ``nn.Embedding``.
        quant_type: a format's name; the default is bitsandbytes', QLoRA's is "nf4".
        quant_storage: dtype under which the packed bytes are held.

    Unlike bitsandbytes', it can be saved once it is packed; before that ``state_dict()`` raises
    NotImplementedError, as there.
    """

    weight: Params4bit

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | int | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, device=device, dtype=dtype)
        self.dtype = self.weight.dtype
        self.quant_state: F4.QuantState | None = None
        self.quant_storage = quant_storage
        self.weight = Params4bit(
            self.weight.data,
            compress_statistics=False,
            quant_type=get_format(quant_type).name,
            quant_storage=quant_storage,
        )
        blocksize = self.weight.blocksize
        if embedding_dim % blocksize:
            logger.warning(
                "embedding_dim %d is not a multiple of the block size %d: every lookup dequantizes "
                "the whole weight, so this will be slow in training and inference",
                embedding_dim,
                blocksize,
            )

    def _state(self) -> F4.QuantState:
        """The weight's scales; quantizes it where it is, if that was not done."""
        weight = self.weight
        if not isinstance(weight, Params4bit):  # converted by a tool: shards put together again
            weight = Params4bit(weight, quant_storage=self.quant_storage, bnb_quantized=True)
            self.weight = weight
        if weight.is_dense:
            weight._quantize(weight.device)
        if weight.quant_state is None:
            weight.quant_state = self.quant_state
        self.quant_state = weight.quant_state
        if self.quant_state is None:
            raise RuntimeError("the embedding's packed weight has no quant_state")
        return self.quant_state

    def forward(self, input: Tensor) -> Tensor:
        state, dim = self._state(), self.embedding_dim
        packed = self.weight.detach().data
        if dim % state.blocksize or not input.numel():
            return F.embedding(input, F4.dequantize_4bit(packed, state)).to(self.dtype)
        rows = F.embedding(input, packed.view(torch.uint8).view(self.num_embeddings, dim // 2))
        scales = F.embedding(input, state.scales().view(self.num_embeddings, -1))
        part = F4.QuantState(
            scales.reshape(-1),
            torch.Size((*input.shape, dim)),
            state.code,
            state.blocksize,
            state.quant_type,
            state.dtype,
        )
        return F4.dequantize_4bit(rows.reshape(-1, 1), part).to(self.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Embedding4bit:
        weight = self.weight
        if not isinstance(weight, Params4bit) or weight.is_dense:
            super()._apply(lambda t: fn(t).data, recurse)
            now: Any = self._parameters["weight"]
            if isinstance(weight, Params4bit) and type(now) is nn.Parameter:  # to meta
                self._parameters["weight"] = weight._like(now.data, weight.quant_state)
            elif isinstance(weight, Params4bit) and not weight.is_dense:
                self.quant_state = weight.quant_state
            return self
        # Bytes and scales move and keep their dtype.
        packed = weight.data
        moved = fn(packed)
        moved = moved if moved.dtype == packed.dtype else packed.to(moved.device)
        if moved.device != packed.device:
            state = self._state().moved(moved.device)
            self._parameters["weight"] = weight._like(moved, state)
            self.quant_state = state
        elif moved is not packed:
            weight.data = moved
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self.weight.is_dense:
            raise NotImplementedError(
                "an Embedding4bit that was not quantized is not saved: move it to its device "
                "(.to('cpu') will do) first"
            )
        state = self._state()
        weight = self.weight
        destination[prefix + "weight"] = weight if keep_vars else weight.data
        for key, value in F4.checkpoint_entries(state).items():
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
        key, start = prefix + "weight", prefix + "weight."
        entries = {k[len(start) :]: v for k, v in state_dict.items() if k.startswith(start)}
        weight, own = state_dict.get(key), self.weight
        if weight is None or (own.is_dense and not entries):
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys,
                error_msgs,
            )  # fmt: skip
            now: Any = self._parameters["weight"]
            if not isinstance(now, Params4bit):  # assigned: dense, as it came
                self._parameters["weight"] = own._like(now.data, None)
            return
        shape = (self.num_embeddings, self.embedding_dim)
        try:
            if entries:
                packed, state, _ = read_checkpoint_entries(weight, entries, shape, key)
                packed = F4.as_storage(packed, self.quant_storage)
            elif tuple(weight.shape) == shape and weight.is_floating_point():
                packed, state = F4.quantize_4bit(
                    weight.to(own.device),
                    blocksize=own.blocksize,
                    compress_statistics=bool(own.compress_statistics),
                    quant_type=own.quant_type,
                    quant_storage=self.quant_storage,
                )
            else:
                raise CheckpointError(
                    f"{key} is {list(weight.shape)} of {weight.dtype}, without scales; expected a "
                    f"dense {list(shape)} or packed bytes with {key}.absmax and its kin"
                )
        except ValueError as error:
            error_msgs.append(str(error))
            return
        # Its own tensors, unless the caller gives his away.
        device = packed.device if own.is_meta else own.device
        copied = not local_metadata.get("assign_to_params_buffers")
        state = state.moved(device)
        if copied:
            state.absmax = state.absmax.clone()
        new = own._like(packed.to(device, copy=copied), None)
        new._become(state, packed.dtype)
        self._parameters["weight"], self.quant_state = new, state


class _OneFormat(Embedding4bit):
    _quant_type: ClassVar[str]

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | int | None = None,
    ) -> None:
        super().__init__(
            num_embeddings, embedding_dim, dtype, self._quant_type, quant_storage, device
        )


class EmbeddingFP4(_OneFormat):
    """:class:`Embedding4bit` of bitsandbytes' FP4."""

    _quant_type = "fp4"


class EmbeddingNF4(_OneFormat):
    """:class:`Embedding4bit` of NF4."""

    _quant_type = "nf4"
