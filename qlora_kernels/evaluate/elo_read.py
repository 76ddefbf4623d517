"""Reads judgments of pairs: our own form, and those in which others have published theirs.

======================== ==========================================================================
form                     recognised by
======================== ==========================================================================
ours                     ``schema`` and ``kind`` (:mod:`.records`); points out of ten only if there
                         are no pairs: more points win, equal ones tie
FastChat, model judges   ``model_1``, ``model_2``, ``g1_winner``, ``g2_winner`` (``model_1``,
                         ``model_2``, ``tie``, ``error``): two games a line, one in each order
Chatbot Arena, people    ``model_a``, ``model_b``, ``winner`` (``tie (bothbad)`` and the like are
                         ties); JSON, JSONL, CSV or Parquet. Without ``question_id`` each battle is
                         a question of its own
Kaggle's LMSYS CSV       ``winner_model_a``, ``winner_model_b``, ``winner_tie``
QLoRA's own ratings      ``review_id`` and ``score`` (1, 2, 3 for a tie, -1 for none; or two
                         points); the file is named ``MODEL-vs-MODEL-JUDGE-reviewer…jsonl``
======================== ==========================================================================
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..finetune.errors import BadInput, bad_input
from .records import Pair, Score, _Fields, read_judgments

__all__ = ["pairs_of_scores", "read_pairs"]

_TIES = ("tie", "tie (bothbad)", "tie (inconsistent)", "both_bad", "bothbad")


def read_pairs(*paths: str | os.PathLike[str]) -> tuple[list[Pair], list[str]]:
    """The judgments of pairs in files of any form, and what there is to say about them.

    Files of our own form are checked together, for judgments that are there twice or contradict
    each other; others publish repeated judgments, which count as such.

    Raises:
        BadInput: a file of no known form, a line that breaks its form (named), nothing in it.
    """
    pairs: list[Pair] = []
    ours: list[str | os.PathLike[str]] = []
    notes: list[str] = []
    for path in paths:
        lines = list(_rows(Path(path)))
        form = _form(lines[0])
        if form is None:
            ours.append(path)
            continue
        for line in lines:
            read = list(form(line))
            if read[0].model_a == read[0].model_b:
                raise line.wrong(f"both models are {read[0].model_a}")
            pairs += read
    if ours:
        judgments = read_judgments(*ours)
        pairs += judgments.pairs
        if judgments.scores and not judgments.pairs:
            pairs += pairs_of_scores(judgments.scores)
            notes.append("there are only points out of ten: more of them count as a win")
        elif judgments.scores:
            notes.append(
                f"{len(judgments.scores)} judgments in points are left out: there are pairs"
            )
    if not pairs:
        raise BadInput("there are no judgments of pairs")
    return pairs, notes


def pairs_of_scores(scores: list[Score]) -> list[Pair]:
    """Points beside the baseline's as pairs: more win, equal ones tie."""

    def winner(s: Score) -> str | None:
        if s.score is None or s.baseline_score is None:
            return None
        if s.score == s.baseline_score:
            return "tie"
        return "model_a" if s.score > s.baseline_score else "model_b"

    return [
        Pair(s.question_id, s.model, s.baseline, winner(s), s.judge, s.order, s.category)
        for s in scores
    ]


class _Row(_Fields):
    """A record of a file, and which one it is."""

    def __init__(self, where: str, fields: dict[str, Any], number: int, path: Path) -> None:
        super().__init__(where, fields)
        self.number, self.path = number, path


def _rows(path: Path) -> Iterator[_Row]:
    if path.suffix.lower() == ".csv":
        yield from _csv(path)
        return
    from ..finetune.data.files import read_records

    with bad_input():
        records = read_records(os.fspath(path))
    for number, record in enumerate(records):
        yield _Row(record.where, record.fields, number, path)


def _csv(path: Path) -> Iterator[_Row]:
    csv.field_size_limit(1 << 27)
    number = -1
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            for number, row in enumerate(reader):
                where = f"{path}:{reader.line_num}"
                if None in row or None in row.values():
                    raise BadInput(f"{where}: not as many columns as the first line names")
                yield _Row(where, dict(row), number, path)
    except FileNotFoundError:
        raise BadInput(f"{path} does not exist") from None
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 (byte {error.start})") from error
    except (csv.Error, OSError) as error:
        raise BadInput(f"{path}: not CSV ({error})") from error
    if number < 0:
        raise BadInput(f"{path} is empty")


Form = Callable[[_Row], Iterator[Pair]]


def _form(line: _Row) -> Form | None:
    """The reader of a published form, None for our own."""
    names = line.fields.keys()
    if {"schema", "kind"} <= names:
        return None
    for needed, form in _FORMS:
        if needed <= names:
            return form
    raise line.wrong(
        f"judgments of no known form; there is {', '.join(names)}. Known: ours (schema, kind), "
        + ", or ".join("(" + ", ".join(sorted(needed)) + ")" for needed, _ in _FORMS)
    )


def _question(line: _Row, *names: str) -> Any:
    """The question's id, or the record itself where there is none."""
    for name in names:
        if line.fields.get(name) not in (None, ""):
            return line.id(name)
    return f"{line.path.name} {line.number}"


def _judge(line: _Row) -> str:
    judge = line.fields.get("judge")
    if isinstance(judge, (list, tuple)) and judge:  # FastChat: model and prompt
        judge = judge[0]
    return judge if isinstance(judge, str) and judge else "people"


def _fastchat(line: _Row) -> Iterator[Pair]:
    winners = {"model_1": "model_a", "model_2": "model_b", "tie": "tie", "error": None}
    question, judge = _question(line, "question_id"), _judge(line)
    models = line.text("model_1"), line.text("model_2")
    for order, name in enumerate(("g1_winner", "g2_winner")):
        winner = winners[line.choice(name, tuple(winners))]
        yield Pair(question, *models, winner, judge, order)


def _arena(line: _Row) -> Iterator[Pair]:
    winner = line.choice("winner", ("model_a", "model_b", *_TIES))
    winner = "tie" if winner in _TIES else winner
    question = _question(line, "question_id")
    yield Pair(question, line.text("model_a"), line.text("model_b"), winner, _judge(line), 0)


def _kaggle(line: _Row) -> Iterator[Pair]:
    names = {"winner_model_a": "model_a", "winner_model_b": "model_b", "winner_tie": "tie"}
    won = [w for n, w in names.items() if str(line.need(n)).strip() in ("1", "1.0", "True", "true")]
    if len(won) != 1:
        raise line.wrong(f"one of {', '.join(names)} must be 1, and the others 0")
    models = line.text("model_a"), line.text("model_b")
    yield Pair(_question(line, "id"), *models, won[0], "people", 0)


def _review(line: _Row) -> Iterator[Pair]:
    """A line of the ratings that came with QLoRA (and, before it, with Vicuna)."""
    file = line.path.name
    match = re.fullmatch(r"(.+)-vs-(.+?)-?(gpt-?4|gpt-?3\.5\S*?|human)?-reviewer.*", file)
    if match is None:
        raise line.wrong(
            "such ratings name their models in the file's name, MODEL-vs-MODEL-JUDGE-reviewer"
            f"….jsonl; this one is {file}"
        )
    # What generated the replies is in the name as well; it is the same for every pair of a list.
    models = [
        re.sub(r"^answer-|-(vicuna|oa)-generations.*$|-generations.*$", "", match[i])
        for i in (1, 2)
    ]
    score = line.need("score")
    if isinstance(score, list):
        if len(score) != 2 or not all(isinstance(s, (int, float)) for s in score):
            raise line.wrong(f"score must be two numbers, it is {score}")
        first, second = score
        winner = (
            None if -1 in score else "tie" if first == second
            else "model_a" if first > second else "model_b"
        )  # fmt: skip
    else:
        kinds = {1: "model_a", 2: "model_b", 3: "tie", -1: None}
        winner = kinds[int(line.choice("score", (1, 2, 3, -1)))]
    question = _question(line, "question_id", "message_id")
    judge = (match[3] or "gpt-4").replace("gpt4", "gpt-4")
    pair = Pair(question, models[0], models[1], winner, judge, 0)
    # Under one name for both orders: who was shown first is then the order's to say.
    yield pair if models[0] < models[1] else pair.flipped()


_FORMS: tuple[tuple[frozenset[str], Form], ...] = (
    (frozenset({"model_1", "model_2", "g1_winner", "g2_winner"}), _fastchat),
    (frozenset({"model_a", "model_b", "winner_model_a", "winner_model_b", "winner_tie"}), _kaggle),
    (frozenset({"model_a", "model_b", "winner"}), _arena),
    (frozenset({"review_id", "score"}), _review),
)
