"""What goes into the preparation of a data set and what comes out: options, samples, report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

IGNORE = -100
"""The label of a token that is not trained, as in torch's and transformers' losses."""


class DataError(ValueError):
    """The data cannot be used; the message names the place, what was wrong and what to do."""


TrainOn = Literal["replies", "all"]
TooLong = Literal["truncate", "drop"]


@dataclass(frozen=True)
class DataOptions:
    """Everything that decides which tokens are trained, and in which order.

    Attributes:
        source: a ``.jsonl``, ``.json`` (also ``.gz``) or ``.parquet`` file, a folder of them,
            ``"python-docs"``, or the id of a data set on the hub (``owner/name``, optionally
            ``owner/name:split``).
        format: one of ``qlora_kernels.finetune.data.FORMATS``; ``None`` recognises it.
        columns: role -> column of the file, where the file has names of its own. Roles:
            ``text`` | ``prompt``, ``completion`` | ``instruction``, ``input``, ``output`` |
            ``messages``; ``system`` goes with any but ``text``. A column may be a path through
            nested fields and lists (``instances.0.output``).
        eval_source: a file of its own for the evaluation; ``eval_split`` is then ignored.
        eval_split: the share (a float below 1) or number (an int) of samples held out.
        train_on: ``"replies"`` (the assistant's turns, the completion) or ``"all"`` tokens. Plain
            text has no replies and is trained whole.
        max_length: tokens a sample (a packed row) may have.
        too_long: whether a longer sample is cut to ``max_length`` or left out.
        packing: put several samples into one row of at most ``max_length`` tokens.
        chat_template: a Jinja template used in place of the tokenizer's own.
        seed: decides the split and the order.
        limit: read no more than this many samples.
    """

    source: str
    format: str | None = None
    columns: Mapping[str, str] | None = None
    eval_source: str | None = None
    eval_split: float | int = 0.05
    train_on: TrainOn = "replies"
    max_length: int = 1024
    too_long: TooLong = "truncate"
    packing: bool = False
    chat_template: str | None = None
    seed: int = 0
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.train_on not in ("replies", "all"):
            raise DataError(f"train_on is {self.train_on!r}; it may be 'replies' or 'all'")
        if self.too_long not in ("truncate", "drop"):
            raise DataError(f"too_long is {self.too_long!r}; it may be 'truncate' or 'drop'")
        if self.max_length < 2:
            raise DataError(
                f"max_length is {self.max_length}; a token is predicted from the one before it, so "
                "at least 2 are needed"
            )
        if isinstance(self.eval_split, bool) or self.eval_split < 0:
            raise DataError(
                f"eval_split is {self.eval_split!r}; it may be 0, a share below 1, or "
                "a number of samples"
            )
        if isinstance(self.eval_split, float) and self.eval_split >= 1:
            raise DataError(
                f"eval_split is {self.eval_split}; a share is below 1.0 (for a number of samples "
                f"give an integer: {int(self.eval_split)})"
            )
        if self.limit is not None and self.limit < 1:
            raise DataError(f"limit is {self.limit}; it may be 1 or more, or left out")


@dataclass(frozen=True)
class Sample:
    """One tokenized sample. ``labels[0]`` is always ``IGNORE``: nothing comes before it."""

    input_ids: np.ndarray  # int32 [n]
    labels: np.ndarray  # int32 [n], IGNORE where not trained


class Samples(Sequence[dict[str, Any]]):
    """Tokenized samples in three flat arrays: little memory, cheap to pickle for a worker.

    Item ``i`` is a row for the collator: ``input_ids``, ``labels`` (int64 arrays ``[n]``),
    ``length`` (n), and for packed rows ``position_ids`` (int64 ``[n]``, starting at 0 again with
    each sample) and ``segments`` (the lengths of the samples in it).
    """

    def __init__(self, rows: Sequence[Sequence[Sample]], *, packed: bool = False) -> None:
        """``rows`` holds the samples of each row; one each unless ``packed``."""
        flat = [sample for row in rows for sample in row]
        empty = np.zeros(0, np.int32)
        self.packed = packed
        self._ids = np.concatenate([s.input_ids for s in flat] or [empty]).astype(np.int32)
        self._labels = np.concatenate([s.labels for s in flat] or [empty]).astype(np.int32)
        sizes = np.array([len(s.input_ids) for s in flat], np.int64)
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self._rows = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)

    def __len__(self) -> int:
        return len(self._rows) - 1

    @property
    def lengths(self) -> np.ndarray:
        """int64 ``[len(self)]``: tokens in each row."""
        return np.diff(self._starts[self._rows])

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """All of it: tokens, labels, where samples start, which sample starts each row."""
        return self._ids, self._labels, self._starts, self._rows

    @property
    def tokens(self) -> int:
        """Tokens in all rows together."""
        return len(self._ids)

    @property
    def trained_tokens(self) -> int:
        """Tokens with a label, in all rows together."""
        return int((self._labels != IGNORE).sum())

    @property
    def samples(self) -> int:
        """Samples in all rows together; ``len(self)`` where nothing is packed."""
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> dict[str, Any]:  # type: ignore[override]
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index %= len(self)
        bounds = self._starts[self._rows[index] : self._rows[index + 1] + 1]
        start, end = int(bounds[0]), int(bounds[-1])
        row: dict[str, Any] = {
            "input_ids": self._ids[start:end].astype(np.int64),
            "labels": self._labels[start:end].astype(np.int64),
            "length": end - start,
        }
        if self.packed:
            segments = np.diff(bounds)
            row["segments"] = segments.tolist()
            row["position_ids"] = np.concatenate([np.arange(n) for n in segments])
        return row

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))


@dataclass
class DataReport:
    """What became of the records of a source. Counts are of samples where not said otherwise."""

    source: str = ""
    format: str = ""
    template: str = ""  # where the chat template came from; empty where none was used
    read: int = 0
    train: int = 0
    eval: int = 0
    rows: int = 0  # packed rows of the training set
    tokens: int = 0  # in the training set
    trained_tokens: int = 0  # in the training set
    longest: int = 0  # tokens of the longest sample as it was read
    truncated: int = 0
    dropped_too_long: int = 0
    fully_masked: int = 0  # left out: they have no trained token (within max_length)
    empty_replies: int = 0  # left out: nothing is answered
    duplicates: int = 0  # kept, on one side of the split with their likes
    eval_overlap: int = 0  # left out of training: they are in eval_source too
    bos_fixed: int = 0  # a second BOS was taken away, or a missing one put in front
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The report for a terminal, one fact a line; counts that are nought are left out."""
        lines = [f"{self.source}: {self.read:,} samples, format {self.format}"]
        if self.template:
            lines.append(f"chat template: {self.template}")
        packed = f" in {self.rows:,} packed rows" if self.rows else ""
        share = 100 * self.trained_tokens / max(1, self.tokens)
        lines.append(
            f"train {self.train:,}{packed}, held out {self.eval:,}; {self.tokens:,} tokens, "
            f"{self.trained_tokens:,} trained ({share:.0f}%), longest {self.longest:,}"
        )
        for count, what in (
            (self.truncated, "longer than max_length, cut"),
            (self.dropped_too_long, "longer than max_length, left out"),
            (self.fully_masked, "without a trained token, left out"),
            (self.empty_replies, "with an empty reply, left out"),
            (self.duplicates, "duplicates, kept on one side of the split"),
            (self.eval_overlap, "also in the evaluation set, left out of training"),
            (self.bos_fixed, "with none or several BOS, set to exactly one"),
        ):
            if count:
                lines.append(f"{count:,} {what}")
        return lines + self.notes


@dataclass
class Prepared:
    """A data set ready to train on."""

    train: Samples
    eval: Samples
    report: DataReport
    fingerprint: str
    """Hex SHA-256 of tokens, labels, rows and seed: equal fingerprints mean the same batches at
    every step, given the same batch size and order."""
    chat_template: str | None = None
    """The template that was used; a chat with the model has to use it too. None: none was."""
