"""How the next token of each request is chosen, inside transformers' continuous batching.

Its own sampling draws all rows of a batch from one generator: what one client gets would depend on
who else asks. Here each request draws from a generator of its own, seeded by it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)

__all__ = ["Sampling", "choose", "draws"]

_NUCLEUS = 1024  # most nuclei are smaller: sorting a whole vocabulary costs ten times as much


@dataclass
class Sampling:
    """One request's.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_p: draws from the fewest likeliest tokens that hold this much probability together.
        seed: of the draws; None for one that nobody knows.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    _generator: torch.Generator | None = field(default=None, repr=False)

    def generator(self, device: torch.device) -> torch.Generator:
        """The request's own; made at its first draw."""
        if self._generator is None:
            self._generator = torch.Generator(device)
            if self.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(self.seed)
        return self._generator


def choose(logits: Tensor, sampling: Sampling) -> Tensor:
    """The next token, of shape ``[]``, given its logits ``[vocabulary]`` in fp32."""
    if sampling.temperature == 0:
        return logits.argmax()
    # In fp32 a temperature near 0 would overflow; the largest logit at 0 keeps that finite.
    probabilities = ((logits - logits.max()) / max(sampling.temperature, 1e-4)).softmax(-1)
    generator = sampling.generator(logits.device)
    if sampling.top_p >= 1:
        return torch.multinomial(probabilities, 1, generator=generator)[0]
    values, tokens = probabilities.topk(min(_NUCLEUS, probabilities.numel()))
    if values.sum() < sampling.top_p:
        values, tokens = probabilities.sort(descending=True)
    # A token is in as long as those before it hold less than top_p; the first always is.
    values = values * (values.cumsum(0) - values < sampling.top_p)
    return tokens[torch.multinomial(values, 1, generator=generator)[0]]


class _Draw(ContinuousBatchingLogitsProcessor):
    """Chooses each row's token, and leaves it alone possible: the argmax that follows takes it."""

    supported_kwargs: dict[str, type] = {}  # noqa: RUF012  as the base class declares it
    ignored_kwargs: tuple[str, ...] = ()

    def __init__(self, sampling_of: Callable[[str], Sampling | None]) -> None:
        self.sampling_of = sampling_of
        self.rows: list[Sampling | None] = []

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> Tensor:
        # Called right before the forward pass whose rows these are, in the same thread.
        self.rows = [self.sampling_of(r.state.request_id) for r in requests_with_new_token]
        return torch.zeros(len(self.rows), dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        for row, sampling in enumerate(self.rows):
            if sampling is not None and sampling.temperature > 0:
                token = choose(scores[row], sampling)
                scores[row].fill_(float("-inf"))
                scores[row, token] = 0.0
        return scores


def draws(sampling_of: Callable[[str], Sampling | None]) -> ContinuousBatchingLogitsProcessorList:
    """The logits processors of a batch in which ``sampling_of(request_id)`` says how a request's
    tokens are chosen; None (a request that is gone) takes the likeliest."""
    processors = ContinuousBatchingLogitsProcessorList(
        LogitsProcessorList([_Draw(sampling_of)])  # type: ignore[list-item]
    )
    processors.tensors_required = 1
    return processors
