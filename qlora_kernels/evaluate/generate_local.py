"""Batched sampling from a model here, a seed a reply.

The draws of a reply come from a generator of its own, seeded by the run's seed and the question's
id: token ``t`` of a reply takes the same random numbers whatever else is in the batch, on any
device. A draw is an argmax over log probabilities with Gumbel noise, which is a draw from the
softmax. What a batch can change is rounding: another number of rows takes another matmul kernel,
and padding moves sums; where two tokens are almost equally likely that decides. Batches are cut
from the whole list of questions, the same ones after a resume, so that a run that was cut off gives
the replies of one that was not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..finetune.errors import BadInput
from .records import Id, Message, Question

__all__ = ["Sampler", "Sampling", "batches", "reply_seed"]


@dataclass(frozen=True)
class Sampling:
    """How replies are drawn; the defaults are the paper's (§5).

    Attributes:
        temperature: 0 takes the likeliest token.
        top_p: draws come from the likeliest tokens that make up this share (nucleus sampling).
        stop: texts that end a reply, and are no part of it.
    """

    temperature: float = 0.7
    top_p: float = 0.9
    max_new_tokens: int = 512
    stop: tuple[str, ...] = ()
    system: str | None = None

    def check(self) -> None:
        """Raises BadInput for what cannot be."""
        if not self.temperature >= 0:
            raise BadInput(f"temperature is {self.temperature}; it must not be negative")
        if not 0 < self.top_p <= 1:
            raise BadInput(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.max_new_tokens < 1:
            raise BadInput(f"max_new_tokens is {self.max_new_tokens}; it must be above 0")
        if not all(self.stop):
            raise BadInput("a stop text is empty; it would end every reply before it begins")


def reply_seed(seed: int, question: Id, turn: int = 0) -> int:
    """The seed of a reply, 32 bits: of the run's seed, the question's id and the turn."""
    digest = hashlib.sha256(f"{seed}\0{question}\0{turn}".encode()).digest()
    return int.from_bytes(digest[:4], "little")


def batches(questions: Sequence[Question], lengths: Sequence[int], size: int) -> list[list[int]]:
    """Indices of questions in batches, the longest first: like numbers of turns, then like lengths,
    so that little is padding, and what does not fit the memory fails at once."""
    order = sorted(range(len(questions)), key=lambda i: (-len(questions[i].turns), -lengths[i], i))
    found: list[list[int]] = []
    for i in order:
        full = not found or len(found[-1]) == size
        if full or len(questions[found[-1][0]].turns) != len(questions[i].turns):
            found.append([])
        found[-1].append(i)
    return found


class _Draw:
    """A logits processor that adds each row's own Gumbel noise."""

    def __init__(self, seeds: Sequence[int]) -> None:
        import torch

        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        import torch

        # Drawn on the CPU: the same numbers whatever the model runs on. 2^-24 keeps log() finite.
        noise = torch.stack(
            [torch.rand(scores.shape[-1], generator=g) for g in self._generators]
        ).clamp_(2.0**-25, 1 - 2.0**-24)
        return scores - noise.log_().neg_().log_().to(scores.device)


class Sampler:
    """A model that replies to questions in batches.

    Args:
        model, tokenizer: as :func:`qlora_kernels.chat.load` gives them.
    """

    def __init__(self, model: Any, tokenizer: Any, sampling: Sampling) -> None:
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        text = model.config.get_text_config()
        self.context: int | None = getattr(text, "max_position_embeddings", None)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        if tokenizer.pad_token_id is None:
            raise BadInput("the tokenizer has neither a pad nor an end token, so no batch is made")

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation that the model is to go on with. Without a chat template it
        is the texts, a line each."""
        messages = list(messages)
        if self.sampling.system is not None:
            messages = [{"role": "system", "content": self.sampling.system}, *messages]
        if not self.tokenizer.chat_template:
            text = "\n".join(m["content"] for m in messages)
            return list(self.tokenizer(text)["input_ids"])
        try:
            encoded = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=True
            )
        except Exception as error:  # of Jinja's; templates raise what they like
            raise BadInput(f"the model's chat template refuses a conversation: {error}") from error
        return list(encoded["input_ids"])

    def lengths(self, questions: Sequence[Question]) -> list[int]:
        """Tokens of each question's first prompt.

        Raises:
            BadInput: one that leaves no room for a reply, named.
        """
        found = []
        for q in questions:
            found.append(len(self.prompt([*q.history, _user(q.turns[0])])))
            if self.context is not None and found[-1] >= self.context:
                raise BadInput(
                    f"question {q.question_id} has {found[-1]} tokens, the model takes "
                    f"{self.context}: leave it out"
                )
        return found

    def reply(
        self, questions: Sequence[Question], seed: int
    ) -> list[tuple[str, str, int, tuple[Message, ...]]]:
        """Replies to the last turns of a batch with equally many turns; earlier ones are asked and
        answered first.

        Returns:
            For each question: reply, why it ended ("stop" or "length"), its tokens, and the
            conversation before its last turn.
        """
        histories = [list(q.history) for q in questions]
        turns = len(questions[0].turns)
        for turn in range(turns):
            prompts = [
                self.prompt([*h, _user(q.turns[turn])])
                for h, q in zip(histories, questions, strict=True)
            ]
            seeds = [reply_seed(seed, q.question_id, turn) for q in questions]
            replies = self._batch(prompts, seeds, questions)
            if turn + 1 == turns:
                break
            for history, q, (text, _, _) in zip(histories, questions, replies, strict=True):
                history += [_user(q.turns[turn]), {"role": "assistant", "content": text}]
        return [(*r, tuple(h)) for r, h in zip(replies, histories, strict=True)]

    def _batch(
        self, prompts: list[list[int]], seeds: list[int], questions: Sequence[Question]
    ) -> list[tuple[str, str, int]]:
        import torch
        from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

        from ..chat import _ends

        s, longest = self.sampling, max(map(len, prompts))
        room = s.max_new_tokens
        if self.context is not None:
            room = min(room, self.context - longest)
        if room < 1:  # only a later turn can come here
            worst = questions[[len(p) for p in prompts].index(longest)].question_id
            raise BadInput(
                f"the conversation of question {worst} has grown to {longest} tokens, the model "
                f"takes {self.context}: lower max_new_tokens, or leave it out"
            )
        pad = self.tokenizer.pad_token_id
        ids = torch.full((len(prompts), longest), pad)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        processors = LogitsProcessorList()
        if s.temperature > 0:
            processors.append(TemperatureLogitsWarper(s.temperature))
            if s.top_p < 1:
                processors.append(TopPLogitsWarper(s.top_p))
            processors.append(_Draw(seeds))
        ends = _ends(self.model, self.tokenizer.eos_token_id) or []
        device = self.model.device
        with torch.inference_mode():
            out = self.model.generate(
                ids.to(device),
                attention_mask=mask.to(device),
                # The draws are in the processors; what a model's own settings add is switched off.
                do_sample=False, temperature=None, top_p=None, top_k=None, num_beams=1,
                repetition_penalty=1.0, no_repeat_ngram_size=0, min_length=0,
                logits_processor=processors,
                max_new_tokens=room,
                eos_token_id=ends or None,
                pad_token_id=pad,
                stop_strings=list(s.stop) or None,
                tokenizer=self.tokenizer if s.stop else None,
                use_cache=True,
            )  # fmt: skip
        return [self._text(row[longest:].tolist(), ends, room) for row in out]

    def _text(self, tokens: list[int], ends: list[int], room: int) -> tuple[str, str, int]:
        """Text, why it ended, and how many tokens it is, of a row up to its end."""
        end = next((i for i, t in enumerate(tokens) if t in ends), None)
        kept = tokens if end is None else tokens[:end]
        text = self.tokenizer.decode(kept, skip_special_tokens=True)
        cuts = [at for at in map(text.find, self.sampling.stop) if at >= 0]
        finish = "stop" if end is not None or cuts else "length"
        if cuts:
            text = text[: min(cuts)]
        return text.strip(), finish, len(kept)


def _user(text: str) -> Message:
    return {"role": "user", "content": text}
