"""The data sets of a sweep: subsets, noise mixed in, replies shuffled, samples held out.

Each set becomes a JSONL file of its own under ``data/``, named by its content, so that a finetune
of the sweep can be looked at and repeated with plain ``qlora finetune``.

Sets of one source and one seed are nested: a source is put into one order a seed, clean samples are
taken from its front and noise from behind them. So a set of 500 is part of the set of 1,000, and
two sets of 500 clean samples are the same 500, whatever noise is beside them: differences between
finetunes are those of the sets, not of the luck of the drawing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..finetune.checkpoint import replace_file
from ..finetune.data import Example, read_records, to_examples
from ..finetune.data.arrange import hold_out
from ..finetune.data.prepare import PYTHON_DOCS, _key
from ..finetune.errors import BadInput, bad_input
from .spec import DataSet, Evaluation, Spec

__all__ = ["Library", "Made", "shuffle_replies"]


@dataclass(frozen=True)
class Made:
    """A set that was written: where, how it is told from others, and what is in it."""

    path: Path
    digest: str
    samples: int
    noise: int = 0


@dataclass
class Library:
    """Makes the sets of a sweep, each once.

    Args:
        spec: the sweep.
        folder: where the files go.
    """

    spec: Spec
    folder: Path
    _read: dict[tuple[Any, ...], list[Example]] = field(default_factory=dict)
    _pools: dict[tuple[Any, ...], list[Example]] = field(default_factory=dict)
    _made: dict[tuple[str, int], Made] = field(default_factory=dict)
    _held: dict[str, list[Example]] = field(default_factory=dict)

    def evaluation(self, name: str) -> Made:
        """The held-out samples of an evaluation of kind ``loss``.

        Raises:
            BadInput: a source that cannot be read, or that is too small.
        """
        evaluation = self.spec.evaluations[name]
        return self._write(f"eval-{name}", self._held_out(evaluation))

    def training(self, name: str, seed: int) -> Made:
        """The training set ``name`` as a finetune with ``seed`` gets it.

        Raises:
            BadInput: a source that cannot be read, or that has fewer samples than are asked for.
        """
        dataset = self.spec.datasets[name]
        drawn = dataset.size is not None or dataset.noise > 0 or dataset.shuffle_replies
        seed = seed if dataset.seed is None else dataset.seed
        seed = seed if drawn else 0
        if (name, seed) not in self._made:
            with _about(f"data set {name}"):
                examples, noise = self._draw(dataset, seed)
                made = self._write(f"{name}-{seed}" if drawn else name, examples)
            self._made[name, seed] = replace(made, noise=noise)
        return self._made[name, seed]

    def available(self, name: str) -> int:
        """How many samples a training set's source has that no evaluation holds."""
        dataset = self.spec.datasets[name]
        with _about(f"data set {name}"):
            return len(self._pool(dataset.source, dataset.format, dataset.columns))

    # -- reading --

    def _examples(self, source: str, format: str | None, columns: Any) -> list[Example]:
        key = (source, format, json.dumps(columns, sort_keys=True))
        if key not in self._read:
            with bad_input():
                if source == PYTHON_DOCS:
                    from ..finetune.python_docs import examples

                    found = examples()
                else:
                    found = to_examples(read_records(source), format, columns)[0]
            self._read[key] = [example for example in found if example.answered]
            if not self._read[key]:
                raise BadInput(f"{source}: every reply is empty; there is nothing to learn")
        return self._read[key]

    def _held_out(self, evaluation: Evaluation) -> list[Example]:
        if evaluation.name not in self._held:
            with _about(f"evaluation {evaluation.name}"):
                found = self._examples(evaluation.source, evaluation.format, evaluation.columns)
                if evaluation.held_out is not None:
                    groups = [example.group or _key(example) for example in found]
                    out = hold_out(groups, evaluation.held_out, self.spec.seed)
                    found = [e for e, chosen in zip(found, out, strict=True) if chosen]
                    found = found[: evaluation.held_out]  # whole groups may be some more
            self._held[evaluation.name] = found
        return self._held[evaluation.name]

    def _pool(self, source: str, format: str | None, columns: Any) -> list[Example]:
        """The samples of a source without those that an evaluation holds, or their groups."""
        key = (source, format, json.dumps(columns, sort_keys=True))
        if key not in self._pools:
            held: set[str] = set()
            for evaluation in self.spec.evaluations.values():
                if evaluation.kind != "loss":
                    continue
                examples = self._held_out(evaluation)
                held |= {_key(e) for e in examples} | {_asked(e) for e in examples}
                if evaluation.source == source:
                    held |= {f"group {e.group}" for e in examples if e.group is not None}
            found = self._examples(source, format, columns)
            left = [
                e
                for e in found
                if not {_key(e), _asked(e), f"group {e.group}"} & held
            ]  # fmt: skip
            if not left:
                raise BadInput(f"every sample of {source} is held out for an evaluation")
            self._pools[key] = left
        return self._pools[key]

    # -- drawing --

    def _draw(self, dataset: DataSet, seed: int) -> tuple[list[Example], int]:
        pool = self._pool(dataset.source, dataset.format, dataset.columns)
        total = len(pool) if dataset.size is None else dataset.size
        noisy = round(dataset.noise * total)
        own = total if dataset.noise_from is None else total - noisy
        _enough(dataset.source, own, len(pool))
        order = [pool[i] for i in np.random.default_rng(seed).permutation(len(pool))]
        clean, noise = order[: total - noisy], order[total - noisy : total]
        if noisy and dataset.noise_from is not None:
            other = dataset.noise_from
            others = self._pool(other.source, other.format, other.columns)
            _enough(other.source, noisy, len(others))
            drawn = np.random.default_rng(seed).permutation(len(others))[:noisy]
            noise = [others[i] for i in drawn]
        elif noisy:
            noise = shuffle_replies(noise, seed) if noisy > 1 else _borrow(noise, order)
        if dataset.shuffle_replies:
            clean = shuffle_replies(clean, seed)
        together = [*clean, *noise]
        if total == len(pool) and not noisy and not dataset.shuffle_replies:
            return together, 0
        mixed = np.random.default_rng([seed, 1]).permutation(len(together))
        return [together[i] for i in mixed], noisy

    def _write(self, name: str, examples: Sequence[Example]) -> Made:
        lines = "".join(
            json.dumps(record, ensure_ascii=False) + "\n" for record in _records(examples)
        )
        digest = hashlib.sha256(lines.encode("utf-8", "surrogatepass")).hexdigest()[:12]
        path = self.folder / f"{_file_name(name)}-{digest}.jsonl"
        if not path.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            data = lines.encode("utf-8", "surrogatepass")
            replace_file(path, lambda aside: aside.write_bytes(data))
        return Made(path, digest, len(examples))


@contextmanager
def _about(what: str) -> Iterator[None]:
    """Names the set that an error is about."""
    try:
        with bad_input():
            yield
    except BadInput as error:
        raise BadInput(f"{what}: {error}") from error


def _enough(source: str, wanted: int, there: int) -> None:
    if wanted > there:
        raise BadInput(
            f"{wanted:,} samples are asked for, and {source} has {there:,} that no evaluation "
            "holds: lower size, or noise"
        )


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)


def _asked(example: Example) -> str:
    """What is asked, without what is answered: a held-out question is not trained on with another
    reply either."""
    said = [m["content"] for m in example.messages if m["role"] != "assistant"]
    words = " ".join("\n".join([*said, example.prompt]).split()).casefold()
    return f"asked {words}" if words else f"text {_key(example)}"


# --- replies ------------------------------------------------------------------------------------


def shuffle_replies(examples: Sequence[Example], seed: int) -> list[Example]:
    """Every question with the reply of another: no reply stays where it was.

    One turn along a random circle of the samples. Of a conversation the replies go along together,
    turn by turn; the circle's next conversation lends its last reply again where it has fewer.

    Raises:
        BadInput: fewer than two samples, or plain texts, which have no replies.
    """
    if len(examples) < 2:
        raise BadInput("replies of fewer than two samples cannot be shuffled")
    circle = np.random.default_rng([seed, 2]).permutation(len(examples)).tolist()
    out: list[Example | None] = [None] * len(examples)
    for here, there in zip(circle, [*circle[1:], circle[0]], strict=True):
        out[here] = _with_replies(examples[here], _replies(examples[there]))
    return [e for e in out if e is not None]


def _borrow(examples: Sequence[Example], order: Sequence[Example]) -> list[Example]:
    """One sample with the reply of the source's first."""
    return [_with_replies(examples[0], _replies(order[0]))]


def _replies(example: Example) -> list[str]:
    if example.text is not None:
        raise BadInput(
            f"{example.where}: a plain text has no reply to shuffle; give noise_from, or samples "
            "with prompts and replies"
        )
    if example.completion is not None:
        return [example.completion]
    return [m["content"] for m in example.messages if m["role"] == "assistant"]


def _with_replies(example: Example, replies: Sequence[str]) -> Example:
    _replies(example)  # refuses plain texts
    if example.completion is not None:
        return replace(example, completion=replies[0])
    left = list(replies)
    messages = []
    for message in example.messages:
        if message["role"] == "assistant":
            message = {**message, "content": left.pop(0) if len(left) > 1 else left[0]}
        messages.append(message)
    return replace(example, messages=messages)


def _records(examples: Sequence[Example]) -> list[dict[str, Any]]:
    """Examples as records of one format that ``qlora finetune`` recognises.

    Raises:
        BadInput: plain texts and conversations in one set.
    """
    kinds = {_kind(e) for e in examples}
    if "text" in kinds and len(kinds) > 1:
        raise BadInput("plain texts and conversations cannot be mixed in one set")
    if kinds == {"text"}:
        return [{"text": e.text} for e in examples]
    if kinds == {"completion"}:
        return [{"prompt": e.prompt, "completion": e.completion} for e in examples]
    return [{"messages": _as_messages(e)} for e in examples]


def _kind(example: Example) -> str:
    if example.text is not None:
        return "text"
    return "completion" if example.completion is not None else "messages"


def _as_messages(example: Example) -> list[dict[str, str]]:
    if example.completion is None:
        return example.messages
    return [
        {"role": "user", "content": example.prompt},
        {"role": "assistant", "content": example.completion},
    ]
