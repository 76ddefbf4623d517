"""From a source to rows of tokens: the one function that the trainer calls."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qlora_kernels.finetune.data.arrange import hold_out, pack
from qlora_kernels.finetune.data.encode import Encoder
from qlora_kernels.finetune.data.files import read_records
from qlora_kernels.finetune.data.formats import Example, takes_several, to_examples
from qlora_kernels.finetune.data.types import (
    IGNORE,
    DataError,
    DataOptions,
    DataReport,
    Prepared,
    Sample,
    Samples,
)

PYTHON_DOCS = "python-docs"


def prepare(options: DataOptions, tokenizer: Any) -> Prepared:
    """Reads, recognises, tokenizes, masks, splits and packs a data set.

    Deterministic: the same source, options and tokenizer give the same rows.

    Args:
        options: see :class:`DataOptions`.
        tokenizer: a transformers tokenizer, fast or not.

    Raises:
        DataError: anything that is wrong with the data, its template, or the options for it.
    """
    report = DataReport(source=options.source)
    encoder = Encoder(tokenizer, options.train_on, options.chat_template)
    samples = _load(options.source, options, encoder, report)
    if options.eval_source is not None:
        # Its long or empty samples are its own: only the training set's are reported.
        evaluation = _load(options.eval_source, options, encoder, DataReport())
        theirs = {s.key for s in evaluation}
        train = [s for s in samples if s.key not in theirs]
        report.eval_overlap = len(samples) - len(train)
        if not train:
            raise DataError(f"every sample of {options.source} is in {options.eval_source} too")
    else:
        held = hold_out([s.group for s in samples], options.eval_split, options.seed)
        train = [s for s, out in zip(samples, held, strict=True) if not out]
        evaluation = [s for s, out in zip(samples, held, strict=True) if out]
    keys = {s.key for s in samples}
    report.duplicates = len(samples) - len(keys)

    rows = Samples(_rows(train, options), packed=options.packing)
    # The evaluation set is not packed: its loss is that of samples, in the order of the source.
    eval_rows = Samples([[s.sample] for s in evaluation])
    report.train, report.eval = len(train), len(evaluation)
    report.rows = len(rows) if options.packing else 0
    report.tokens, report.trained_tokens = rows.tokens, rows.trained_tokens
    return Prepared(
        rows,
        eval_rows,
        report,
        _fingerprint(rows, eval_rows, options.seed),
        encoder.template if report.template else None,
    )


@dataclass
class _Keyed:
    """A sample, what it is compared by, and what it is held out with."""

    sample: Sample
    key: str
    group: str


def _read(source: str, options: DataOptions, report: DataReport) -> list[Example]:
    if source == PYTHON_DOCS:
        from qlora_kernels.finetune.python_docs import examples

        found = examples()
        report.format = "questions and answers about the installed Python"
        return found[: options.limit]
    records = read_records(source, options.limit)
    if options.limit is not None and takes_several(records[0], options.format):
        records = read_records(source)  # of which a limited number of conversations is made
    found, chosen, notes = to_examples(records, options.format, options.columns)
    report.format = chosen.name
    report.notes += notes
    return found[: options.limit]


def _load(source: str, options: DataOptions, encoder: Encoder, report: DataReport) -> list[_Keyed]:
    """The samples of a source that can be trained on; the others are counted."""
    read = _read(source, options, report)
    report.read = len(read)
    found = [example for example in read if example.answered or _is_open(example, options)]
    report.empty_replies = len(read) - len(found)
    if not found:
        raise DataError(
            f"{read[0].where}: the reply is empty, and so is each of the {len(read):,}; there is "
            "nothing to learn"
        )
    samples = []
    masked: Example | None = None
    for example, coded in zip(found, encoder.encode(found), strict=True):
        count = len(coded.input_ids)
        report.longest = max(report.longest, count)
        report.bos_fixed += coded.bos_fixed
        cut = count > options.max_length
        if cut and options.too_long == "drop":
            report.dropped_too_long += 1
            continue
        sample = Sample(coded.input_ids[: options.max_length], coded.labels[: options.max_length])
        if not (sample.labels != IGNORE).any():
            report.fully_masked += 1
            masked = masked or example
            continue
        report.truncated += cut
        key = _key(example)
        samples.append(_Keyed(sample, key, example.group or key))
    if any(example.messages for example in found):
        report.template = encoder.origin
    if not samples:
        why = (
            f"{report.fully_masked:,} have no trained token within max_length "
            f"{options.max_length} (the first: {masked.where})"
            if masked
            else ""
        )
        dropped = (
            f"{report.dropped_too_long:,} are longer than max_length {options.max_length}"
            if report.dropped_too_long
            else ""
        )
        raise DataError(
            f"{source}: no sample is left to train on: "
            f"{' and '.join(part for part in (why, dropped) if part)}. Raise max_length, or set "
            "train_on: all"
        )
    return samples


def _is_open(example: Example, options: DataOptions) -> bool:
    """A conversation without any reply is worth its tokens if all tokens are trained."""
    return (
        options.train_on == "all"
        and any(m["content"].strip() for m in example.messages)
        and all(m["role"] != "assistant" for m in example.messages)
    )


def _key(example: Example) -> str:
    """What makes two examples the same: all that is said, but for case and white space."""
    said = [f"{m['role']}: {m['content']}" for m in example.messages]
    said += [example.prompt, example.completion or "", example.text or ""]
    words = " ".join("\n".join(said).split()).casefold()
    return hashlib.sha256(words.encode("utf-8", "surrogatepass")).hexdigest()


def _rows(samples: Sequence[_Keyed], options: DataOptions) -> list[list[Sample]]:
    if not options.packing:
        return [[s.sample] for s in samples]
    lengths = [len(s.sample.input_ids) for s in samples]
    packed = pack(lengths, options.max_length, options.seed)
    return [[samples[i].sample for i in row] for row in packed]


def _fingerprint(train: Samples, evaluation: Samples, seed: int) -> str:
    digest = hashlib.sha256(f"data 1, seed {seed}".encode())
    for part in (train, evaluation):
        for array in part.arrays:
            digest.update(np.ascontiguousarray(array).view(np.uint8).data)
            digest.update(b"|")
    return digest.hexdigest()
