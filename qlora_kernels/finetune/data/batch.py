"""Rows to batches, and the check that a model keeps packed samples apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from qlora_kernels.finetune.data.types import IGNORE


class Collator:
    """Makes a batch of rows: what is returned goes to the model as it is.

    Plain rows are padded at the right and get an ``attention_mask``. Packed rows get
    ``position_ids`` that start at 0 with each sample, **no** ``attention_mask`` and
    ``use_cache=False``: that is how transformers (5.24, eager and sdpa attention) knows to let
    each sample see itself alone. A mask, or a cache, would silently let it see its neighbours
    (:func:`packing_is_exact` checks a model).

    Which token pads is of no consequence (it is neither seen nor trained), so a tokenizer without
    a pad token is fine, and one whose pad is its EOS loses no EOS: labels go by place.

    Args:
        tokenizer: for its pad token; EOS, then 0, stand in.
        pad_to_multiple_of: tokens.
    """

    def __init__(self, tokenizer: Any, pad_to_multiple_of: int = 1):
        pad = tokenizer.pad_token_id
        pad = tokenizer.eos_token_id if pad is None else pad
        self.pad: int = 0 if pad is None else pad
        self.multiple = pad_to_multiple_of

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """int64 ``[rows, length]`` each; see the class."""
        packed = "position_ids" in rows[0]
        length = max(len(row["input_ids"]) for row in rows)
        length = -(-length // self.multiple) * self.multiple
        shape = (len(rows), length)
        batch: dict[str, Any] = {
            "input_ids": torch.full(shape, self.pad),
            "labels": torch.full(shape, IGNORE),
        }
        extra = torch.arange(length).repeat(len(rows), 1) if packed else torch.zeros(shape).long()
        for i, row in enumerate(rows):
            n = len(row["input_ids"])
            batch["input_ids"][i, :n] = torch.as_tensor(row["input_ids"])
            batch["labels"][i, :n] = torch.as_tensor(row["labels"])
            if packed:
                extra[i, :n] = torch.as_tensor(row["position_ids"])
                extra[i, n:] = torch.arange(length - n)  # padding is a sample by itself
            else:
                extra[i, :n] = 1
        if packed:
            return {**batch, "position_ids": extra, "use_cache": False}
        return {**batch, "attention_mask": extra}


@torch.no_grad()
def packing_is_exact(model: torch.nn.Module) -> bool:
    """Whether a model gives packed samples the logits that they get alone.

    Two samples of a few tokens go through the model, packed and apart (models that ignore
    ``position_ids``, or carry a state along the row, mix them). Takes three short forward passes.
    """
    config: Any = model.config
    vocab = config.get_text_config().vocab_size
    first = torch.arange(1, 6) * 7919 % vocab
    second = torch.arange(6, 10) * 7919 % vocab
    device = model.get_input_embeddings().weight.device  # type: ignore[operator, union-attr]
    row = {
        "input_ids": torch.cat([first, second]),
        "position_ids": torch.cat([torch.arange(5), torch.arange(4)]),
    }
    was_training = model.training
    model.eval()
    try:
        together = model(**{k: v[None].to(device) for k, v in row.items()}, use_cache=False).logits[
            0
        ]
        apart = [
            model(input_ids=ids[None].to(device), use_cache=False).logits[0]
            for ids in (first, second)
        ]
    finally:
        model.train(was_training)
    expected = torch.cat(apart).float()
    # Rounding (some 8 bits in 16-bit dtypes) against an effect of the size of the logits.
    bound = 0.1 if together.element_size() == 2 else 1e-3
    error = (together.float() - expected).abs().max()
    return bool(error <= bound * (expected.max() - expected.min()))
