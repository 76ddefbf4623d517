"""Examples to tokens and labels: which tokens are trained, exactly one BOS, EOS after replies.

A conversation is written out by the chat template, and the replies have to be found again in the
text that comes out. That is done by writing it out a second time with a marker in the place of
each reply: what stands between the markers is the template's own text, and the first text has to
be that with the replies filled in, letter by letter; else the template changes its replies, and
is refused rather than mislabelled. Trained is what a model has to produce by itself: from the end
of the generation prompt to the token that ends the turn, that token included.

Labels are laid on tokens by their places in the text, so no text is tokenized in pieces: pieces
merge differently at their edges.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qlora_kernels.finetune.data.formats import Example, Message
from qlora_kernels.finetune.data.types import IGNORE, DataError

# For models without a chat template: the conversation as the paper of QLoRA writes it. `{bos}`
# is filled in where the tokenizer puts a BOS in front by itself.
DEFAULT_TEMPLATE = (
    "{bos}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}{{ '### Human: ' + message['content'] + '\\n' }}"
    "{% else %}{{ '### Assistant: ' + message['content'] + eos_token + '\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '### Assistant:' }}{% endif %}"
)
_MARKER = "\ue000{}\ue001"  # private use: in no sensible text, and no template strips it
_BATCH = 1000


@dataclass
class Encoded:
    """One example in tokens: int32 arrays ``[n]``; ``bos_fixed`` if its BOS was wrong."""

    input_ids: np.ndarray
    labels: np.ndarray
    bos_fixed: bool


class Encoder:
    """Turns examples into tokens and labels for one tokenizer.

    Args:
        tokenizer: a transformers tokenizer.
        train_on: ``"replies"`` or ``"all"``.
        chat_template: used in place of the tokenizer's own.

    Raises:
        DataError: the tokenizer has no EOS and the template no other end of a turn; the template
            cannot be split into replies and the rest.
    """

    def __init__(self, tokenizer: Any, train_on: str = "replies", chat_template: str | None = None):
        self.tokenizer = tokenizer
        self.train_on = train_on
        self.bos: int | None = tokenizer.bos_token_id
        self.eos: int | None = tokenizer.eos_token_id
        probe = tokenizer("a").input_ids
        self.adds_bos = self.bos is not None and len(probe) > 0 and probe[0] == self.bos
        self._specials = sorted(
            {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
            | {token for token in tokenizer.all_special_tokens if token},
            key=len,
            reverse=True,
        )
        self.template, self.origin = self._choose_template(chat_template)
        self._turn: _Turn | None = None
        self._bos_checked = False

    def _choose_template(self, given: str | None) -> tuple[str, str]:
        own = self.tokenizer.chat_template
        if isinstance(own, dict):  # several by name
            own = own.get("default")
        if given is not None:
            template, origin = given, "the given one"
        elif own:
            template, origin = own, "the tokenizer's"
        else:
            bos = "{{ bos_token }}" if self.adds_bos else ""
            return DEFAULT_TEMPLATE.replace("{bos}", bos), "the default (### Human / ### Assistant)"
        return template, origin

    # ----------------------------------------------------------------- conversations

    def render(self, messages: Sequence[Message], where: str = "", **kwargs: Any) -> str:
        """The conversation in the template's words; ``where`` is named if it refuses them."""
        if not self._bos_checked:
            self._check_bos()
        return self._render(messages, where, **kwargs)

    def _render(self, messages: Sequence[Message], where: str, **kwargs: Any) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), chat_template=self.template, tokenize=False, **kwargs
            )
        except Exception as error:  # jinja's, or the template's own raise_exception
            place = f"{where}: " if where else ""
            raise DataError(
                f"{place}the chat template ({self.origin}) refuses the conversation: {error}"
            ) from error

    def _check_bos(self) -> None:
        """A model that has always seen a BOS gets one, where its template forgets it.

        It is put into the template, so that a chat with the model gets it too.
        """
        self._bos_checked = True
        text = self._render([{"role": "user", "content": "a"}], "")
        if self.adds_bos and not text.lstrip().startswith(self.tokenizer.bos_token):
            self.template = "{{ bos_token }}" + self.template
            self.origin += ", a BOS put in front"

    @property
    def turn(self) -> _Turn:
        """How a turn of the assistant begins and ends under this template."""
        if self._turn is None:
            self._turn = self._probe()
        return self._turn

    def _probe(self) -> _Turn:
        ask: list[Message] = [{"role": "user", "content": _MARKER.format("ask")}]
        reply: Message = {"role": "assistant", "content": _MARKER.format("reply")}
        prompt = self.render(ask)
        opened = self.render(ask, add_generation_prompt=True)
        whole = self.render([*ask, reply])
        if whole.count(reply["content"]) != 1:
            raise DataError(
                f"the chat template ({self.origin}) does not write a reply out as it is, so the "
                "tokens to train cannot be told; give another with chat_template, or train_on: all"
            )
        header = opened[_shared(prompt, opened) :]
        before, _, tail = whole.partition(reply["content"])
        opening = before.rpartition(ask[0]["content"])[2]
        ends = [0, *self._special_ends(tail)]
        last_end = ends[-1] or len(tail)  # without any: all of it, and the EOS that is added
        return _Turn(header, opening, tail, tail[: ends[min(1, len(ends) - 1)]], last_end)

    def _special_ends(self, text: str) -> Iterator[int]:
        """Where special tokens end in ``text``, as long as only blanks are between them."""
        at = 0
        while True:
            at += len(text[at:]) - len(text[at:].lstrip())
            found = next((s for s in self._specials if text.startswith(s, at)), None)
            if found is None:
                return
            at += len(found)
            yield at

    def _chat_spans(self, example: Example) -> tuple[str, list[tuple[int, int]], bool]:
        """The text, its trained places, and whether the end of the last turn is still missing."""
        messages = example.messages
        turn = self.turn
        text = self.render(messages, example.where)
        replies = [m for m in messages if m["role"] == "assistant"]
        if replies == messages[-1:]:
            # One reply, at the end: it stands before the template's own end, or it was changed.
            place = turn.opening + replies[0]["content"] + turn.tail
            if turn.opening and text.endswith(place):
                begin = len(text) - len(place) + len(turn.opening)
                start = begin - (len(turn.opening) - turn.given)
                return text, [(start, len(text) - len(turn.tail) + turn.last_end)], not turn.end
        marked = self.render(
            [
                {**m, "content": _MARKER.format(i)} if m["role"] == "assistant" else m
                for i, m in enumerate(messages)
            ],
            example.where,
        )
        spans = []
        at, rest = 0, marked
        last = len(messages) - 1
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, found, rest = rest.partition(_MARKER.format(i))
            begin = at + len(before)
            # Some templates strip what they are given.
            content = next(
                (
                    c
                    for c in (message["content"], message["content"].strip())
                    if found and text.startswith(before + c, at)
                ),
                None,
            )
            if content is None:
                raise DataError(
                    f"{example.where}: the chat template ({self.origin}) changes the reply in "
                    f"message {i + 1}, so the tokens to train cannot be told; give another with "
                    "chat_template, or train_on: all"
                )
            # What the template writes between the generation prompt and the reply (a blank, an
            # empty chain of thought) is the model's to produce.
            opened = before.rfind(turn.header) if turn.header else -1
            start = begin if opened < 0 else at + opened + len(turn.header)
            end = at = begin + len(content)
            if i == last:
                # Up to the EOS that is added, where the template has no end of its own.
                end += max(self._special_ends(rest), default=0) if turn.end else len(rest)
            elif turn.end and rest.startswith(turn.end):
                end += len(turn.end)
            spans.append((start, end))
        if text[at:] != rest:
            raise DataError(
                f"{example.where}: the chat template ({self.origin}) writes the end of the "
                "conversation otherwise with other replies; give another with chat_template, or "
                "train_on: all"
            )
        unended = messages[last]["role"] == "assistant" and not turn.end
        return text, spans, unended

    # ----------------------------------------------------------------- all of them

    def encode(self, examples: Iterable[Example]) -> Iterator[Encoded]:
        """Tokens and labels of each example, in order and uncut."""
        batch: list[tuple[str, list[tuple[int, int]], bool, bool]] = []
        for example in examples:
            batch.append(self._spans(example))
            if len(batch) == _BATCH:
                yield from self._encode(batch)
                batch = []
        yield from self._encode(batch)

    def _spans(self, example: Example) -> tuple[str, list[tuple[int, int]], bool, bool]:
        """Text, trained places, whether an EOS is to be added, whether a BOS is expected."""
        if example.messages:
            if self.train_on == "all":
                text = self.render(example.messages, example.where)
                ended = text.rstrip().endswith(tuple(self._specials)) or (
                    example.messages[-1]["role"] != "assistant"
                )
                self._need_eos(ended)
                return text, [(0, len(text))], not ended, False
            text, spans, unended = self._chat_spans(example)
            self._need_eos(not unended)
            return text, spans, unended, False
        if example.completion is not None:
            self._need_eos(False)
            text = example.prompt + example.completion
            start = 0 if self.train_on == "all" else len(example.prompt)
            return text, [(start, len(text))], True, self.adds_bos
        assert example.text is not None
        return example.text, [(0, len(example.text))], self.eos is not None, self.adds_bos

    def _need_eos(self, ended: bool) -> None:
        if not ended and self.eos is None:
            raise DataError(
                "the tokenizer has no EOS token and the chat template no other end of a reply, so "
                "replies would never stop; set tokenizer.eos_token"
            )

    def _encode(self, batch: list) -> Iterator[Encoded]:
        if not batch:
            return
        texts = [text for text, *_ in batch]
        if self.tokenizer.is_fast:
            coded = self.tokenizer(
                texts,
                add_special_tokens=False,
                return_offsets_mapping=True,
                return_attention_mask=False,
                verbose=False,  # "longer than the model's maximum" is counted, not printed
            )
            placed = zip(coded["input_ids"], coded["offset_mapping"], strict=True)
        else:
            placed = (self._place(text, spans) for text, spans, *_ in batch)
        for (ids, offsets), (_, spans, add_eos, want_bos) in zip(placed, batch, strict=True):
            yield self._label(ids, offsets, spans, add_eos, want_bos)

    def _place(self, text: str, spans: list[tuple[int, int]]) -> tuple[list[int], list]:
        """Places of tokens for a tokenizer that does not tell: right at the edges of spans.

        The tokens of ``text[:edge]`` that are also the first tokens of ``text`` lie before the
        edge.
        """

        def ids_of(part: str) -> list[int]:
            return self.tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]

        ids = ids_of(text)
        edges = sorted({0, len(text), *(edge for span in spans for edge in span)})
        counts = []
        for edge in edges:
            head = ids_of(text[:edge]) if edge < len(text) else ids
            same = next(
                (i for i, (a, b) in enumerate(zip(head, ids, strict=False)) if a != b),
                min(len(head), len(ids)),
            )
            counts.append(same)
        offsets = []
        for a, b, first, past in zip(edges, edges[1:], counts, counts[1:], strict=False):
            offsets += [(a, b)] * max(0, past - max(first, len(offsets)))
        return ids, offsets + [(len(text), len(text))] * (len(ids) - len(offsets))

    def _label(
        self, ids: list[int], offsets: list, spans: list, add_eos: bool, want_bos: bool
    ) -> Encoded:
        tokens = np.array(ids, np.int32)
        places = np.array(offsets, np.int64).reshape(-1, 2)
        begin, end = places[:, 0], places[:, 1]
        trained = np.zeros(len(tokens), bool)
        for start, stop in spans:
            # A token across the edge of a span holds a piece of the reply: trained.
            trained |= (begin < stop) & (end > start)
        leading = 0
        while self.bos is not None and leading < len(tokens) and tokens[leading] == self.bos:
            leading += 1
        # Where a text's own tokens begin with a BOS (a template's, mostly), it counts.
        fixed = leading > 1
        if leading > 1:
            tokens, trained = tokens[leading - 1 :], trained[leading - 1 :]
        elif want_bos and not leading:
            assert self.bos is not None
            tokens = np.concatenate([[self.bos], tokens]).astype(np.int32)
            trained = np.concatenate([[False], trained])
        if add_eos:
            if not len(tokens) or tokens[-1] != self.eos:
                assert self.eos is not None
                tokens = np.append(tokens, np.int32(self.eos))
                trained = np.append(trained, True)
            trained[-1] = True
        labels = np.where(trained, tokens, IGNORE).astype(np.int32)
        labels[:1] = IGNORE  # nothing predicts the first token
        return Encoded(tokens, labels, fixed)


@dataclass(frozen=True)
class _Turn:
    """A template's turn of the assistant."""

    header: str  # its generation prompt
    opening: str  # all that stands between a question and its reply
    tail: str  # all that stands behind the last reply
    end: str  # what of it ends a turn: up to the first special token; empty if there is none
    last_end: int  # and what ends the conversation: up to the last special token

    @property
    def given(self) -> int:
        """How much of the opening the model is given; the rest it has to produce."""
        at = self.opening.rfind(self.header) if self.header else -1
        return len(self.opening) if at < 0 else at + len(self.header)


def _shared(a: str, b: str) -> int:
    """How many characters two texts have in common at their beginnings."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
