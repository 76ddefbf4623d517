"""How likely a model finds each letter after a question of MMLU: batched, the examples read once.

The questions of a subject share a long beginning, its examples. Their keys and values are computed
once and copied into each batch, so that only the questions themselves go through the layers each
time. Shared is what the *tokens* have in common: no text is cut where a tokenizer would merge it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch

from ..finetune.errors import BadInput
from .mmlu_data import LETTERS, Subject, prompt

__all__ = ["Answer", "Scorer"]

_WORTH = 16  # a common beginning of fewer tokens is not worth a pass of its own


@dataclass(frozen=True)
class Answer:
    """What a model made of one question.

    Attributes:
        log_likelihoods: of the letters A to D, natural logarithms, given the prompt.
        answer: the right letter's number.
        shots: how many examples it was shown: fewer where they were too long together.
        cut: whether the question alone was too long, so that its beginning was left out.
    """

    subject: str
    index: int
    log_likelihoods: tuple[float, float, float, float]
    answer: int
    shots: int
    cut: bool = False

    @property
    def chosen(self) -> int:
        """The likeliest letter's number; the first of equals."""
        return max(range(4), key=lambda i: self.log_likelihoods[i])

    @property
    def correct(self) -> bool:
        return self.chosen == self.answer


class Scorer:
    """Asks a model MMLU's questions.

    Args:
        model: a causal language model with attention caches.
        tokenizer: its tokenizer.
        batch_size: questions of one forward pass.
        max_length: tokens a prompt may have; the model's context if it is shorter.

    Raises:
        BadInput: the tokenizer does not tell the four letters apart by one token.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int = 8, max_length: int = 2048):
        if batch_size < 1 or max_length < 16:
            raise BadInput("the batch must hold 1 question or more, a prompt 16 tokens or more")
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.max_length = min(max_length, context or max_length)
        self._cache = _cache_name(model)
        probe = tokenizer("a").input_ids
        bos = tokenizer.bos_token_id
        self._bos = [bos] if bos is not None and probe[:1] == [bos] else []
        self.letters = self._letter_tokens()

    def _encode(self, text: str) -> list[int]:
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return self._bos + list(ids)

    def _letter_tokens(self) -> list[int]:
        rows = [self._encode(f"?\nAnswer: {letter}") for letter in LETTERS]
        if len({tuple(row[:-1]) for row in rows}) != 1 or len({row[-1] for row in rows}) != 4:
            raise BadInput(
                "the tokenizer does not end `Answer: A` to `Answer: D` in one token each, so the "
                "letters' likelihoods cannot be compared"
            )
        return [row[-1] for row in rows]

    def _fit(self, subject: Subject, index: int) -> tuple[list[int], int, bool]:
        """The prompt's tokens, the number of examples in it, and whether it was cut."""
        item = subject.items[index]
        tokens: list[int] = []
        for shots in range(len(subject.examples), -1, -1):
            # With a letter, which is taken away again: the blank before it may be its token's.
            tokens = self._encode(f"{prompt(subject, item, shots)} A")[:-1]
            if len(tokens) <= self.max_length:
                return tokens, shots, False
        kept = self.max_length - len(self._bos)
        return self._bos + tokens[-kept:], 0, True

    def answers(self, subject: Subject, indices: Sequence[int] | None = None) -> Iterator[Answer]:
        """The model's answers to a subject's questions, batch by batch, the longest first.

        Args:
            indices: which questions; all if None.
        """
        wanted = range(len(subject.items)) if indices is None else indices
        fitted = {i: self._fit(subject, i) for i in wanted}
        groups: dict[int, list[int]] = {}
        for i in wanted:
            groups.setdefault(fitted[i][1], []).append(i)
        for group in groups.values():
            rows = [fitted[i][0] for i in group]
            for k, values in self._log_likelihoods(rows):
                i = group[k]
                _, shots, cut = fitted[i]
                yield Answer(subject.name, i, values, subject.items[i].answer, shots, cut)

    def _log_likelihoods(
        self, rows: Sequence[Sequence[int]]
    ) -> Iterator[tuple[int, tuple[float, float, float, float]]]:
        """Each row's number, and the letters' log-likelihoods after it."""
        shared = _shared(rows)
        past = None
        if len(rows) > 1 and shared >= _WORTH:
            past = self._read(rows[0][:shared])
        else:
            shared = 0
        order = sorted(range(len(rows)), key=lambda k: -len(rows[k]))
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            values = self._batch([rows[k][shared:] for k in batch], past, shared)
            for k, row in zip(batch, values, strict=True):
                a, b, c, d = row
                yield k, (a, b, c, d)

    def _read(self, tokens: Sequence[int]) -> Any:
        """The model's cache after ``tokens``."""
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        ids = torch.tensor([list(tokens)], device=self.model.device)
        with _asking(self.model):
            self.model(input_ids=ids, use_cache=True, logits_to_keep=1, **{self._cache: cache})
        return cache

    def _batch(self, rows: list[Sequence[int]], past: Any, shared: int) -> list[list[float]]:
        """Log-likelihoods of the letters after each row, which follows ``past``."""
        device = self.model.device
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), self.letters[0])
        mask = torch.ones(len(rows), shared + width, dtype=torch.long)
        for i, row in enumerate(rows):
            pad = width - len(row)  # on the left, so that all rows end together
            ids[i, pad:] = torch.tensor(list(row))
            mask[i, shared : shared + pad] = 0
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, shared:]
        given: dict[str, Any] = {"use_cache": False}
        if past is not None:
            cache = copy.deepcopy(past)
            cache.batch_repeat_interleave(len(rows))
            given = {"use_cache": True, self._cache: cache}
        with _asking(self.model):
            logits = self.model(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                position_ids=positions.to(device),
                logits_to_keep=1,
                **given,
            ).logits[:, -1]
        found = torch.log_softmax(logits.float(), -1)[:, self.letters]
        return found.cpu().tolist()


def _cache_name(model: Any) -> str:
    """What the model's forward calls its cache: transformers renamed it."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "cache" if "cache" in signature(type(base).forward).parameters else "past_key_values"


@contextmanager
def _asking(model: Any) -> Iterator[None]:
    """The model in evaluation mode and without gradients; as it was, afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def _shared(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with together; each keeps one that is its own."""
    first, last = min(map(tuple, rows)), max(map(tuple, rows))  # what these share, all share
    most = min(map(len, rows)) - 1
    same = next(
        (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first)
    )
    return max(0, min(same, most))
