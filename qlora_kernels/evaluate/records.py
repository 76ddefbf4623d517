"""The files that pass between ``qlora generate``, ``judge``, ``arena`` and ``elo``, all JSONL.

- *questions*: ``question_id`` (whole number or text, each once), ``category`` (optional) and
  ``turns`` (Vicuna's form: what the user says, turn by turn) or ``text`` (one turn, Open
  Assistant's); ``history`` (optional) is a conversation before them.
- *replies*: one of a model to a question a line; :class:`Reply`.
- *judgments*: one a line, of two replies (:class:`Pair`) or of a reply's points beside the
  baseline's (:class:`Score`), in any mixture.

In every judgment ``order`` is 0 if the model named first (``model_a``, ``model``) was shown first,
1 if it was shown second; ``winner`` is a name of a field, whichever was shown where.

Readers check everything before they return, and name file and line. What grows line by line, and
survives a kill, is an :class:`~.appender.Appender`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from ..finetune.errors import BadInput, bad_input

__all__ = [
    "SCHEMA",
    "WINNERS",
    "Judgment",
    "Judgments",
    "Pair",
    "Question",
    "Reply",
    "Score",
    "check_judgments",
    "check_replies",
    "read_judgments",
    "read_questions",
    "read_replies",
    "to_json",
    "write_records",
]

SCHEMA = 1
WINNERS = ("model_a", "model_b", "tie", None)
"""What a pair's ``winner`` may be; None where the judge's words held no verdict."""

Id: TypeAlias = int | str
Message: TypeAlias = dict[str, str]  # {"role": "user" or "assistant", "content": ...}


@dataclass(frozen=True)
class Question:
    """What is asked: ``turns`` of the user, after ``history`` (a conversation so far)."""

    question_id: Id
    turns: tuple[str, ...]
    category: str | None = None
    history: tuple[Message, ...] = ()


@dataclass(frozen=True)
class Reply:
    """What ``model`` said to ``question``, the last thing that the user says after ``history``.

    Attributes:
        seed: of the draws; None where they had none (a file of replies, an endpoint without).
        sampling: how it was drawn and how it ended, as the writer recorded it.
    """

    question_id: Id
    model: str
    question: str
    reply: str
    category: str | None = None
    seed: int | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    history: tuple[Message, ...] = ()

    @property
    def key(self) -> tuple[str, str]:
        """What a file of replies holds once."""
        return str(self.question_id), self.model


@dataclass(frozen=True)
class Pair:
    """``judge`` compared two replies; ``winner`` is one of :data:`WINNERS`."""

    question_id: Id
    model_a: str
    model_b: str
    winner: str | None
    judge: str
    order: int
    category: str | None = None
    why: str = ""
    raw: str = ""

    @property
    def key(self) -> tuple[Any, ...]:
        """What a file of judgments holds once: the models whichever is called a, and who of them
        was shown first."""
        first = self.model_a if self.order == 0 else self.model_b
        models = tuple(sorted((self.model_a, self.model_b)))
        return "pair", str(self.question_id), self.judge, models, first

    def flipped(self) -> Pair:
        """The same judgment with the names a and b exchanged."""
        swap = {"model_a": "model_b", "model_b": "model_a"}
        return dataclasses.replace(
            self,
            model_a=self.model_b,
            model_b=self.model_a,
            winner=swap.get(self.winner or "", self.winner),
            order=1 - self.order,
        )


@dataclass(frozen=True)
class Score:
    """``judge`` gave points out of ten to a model's reply and to the baseline's; both are None
    where its words held none."""

    question_id: Id
    model: str
    baseline: str
    score: float | None
    baseline_score: float | None
    judge: str
    order: int
    category: str | None = None
    raw: str = ""

    @property
    def key(self) -> tuple[Any, ...]:
        """What a file of judgments holds once."""
        first = self.model if self.order == 0 else self.baseline
        models = tuple(sorted((self.model, self.baseline)))
        return "score", str(self.question_id), self.judge, models, first


Judgment: TypeAlias = Pair | Score


class Judgments(NamedTuple):
    """All that a file, or several, hold."""

    pairs: list[Pair]
    scores: list[Score]


# --- reading ------------------------------------------------------------------------------------


class _Fields:
    """The fields of one line, taken by name and type; what is wrong names the line."""

    def __init__(self, where: str, fields: dict[str, Any]) -> None:
        self.where, self.fields = where, fields

    def wrong(self, message: str) -> BadInput:
        return BadInput(f"{self.where}: {message}")

    def need(self, name: str) -> Any:
        if name not in self.fields:
            raise self.wrong(f"{name} is missing; there is {_listed(self.fields)}")
        return self.fields[name]

    def text(self, name: str, empty: bool = False) -> str:
        value = self.need(name)
        if not isinstance(value, str):
            raise self.wrong(f"{name} must be text, it is {_shown(value)}")
        if not empty and not value.strip():
            raise self.wrong(f"{name} is empty")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise self.wrong(f"{name} holds half of a surrogate pair, which is no text") from None
        return value

    def free(self, name: str) -> str:
        """Text that may be empty or absent."""
        return "" if self.fields.get(name) is None else self.text(name, empty=True)

    def category(self) -> str | None:
        return None if self.fields.get("category") is None else self.text("category")

    def id(self, name: str = "question_id") -> Id:
        value = self.need(name)
        if isinstance(value, bool) or not isinstance(value, (int, str)) or value == "":
            raise self.wrong(f"{name} must be a whole number or text, it is {_shown(value)}")
        return value if isinstance(value, int) else self.text(name)

    def choice(self, name: str, choices: Sequence[Any]) -> Any:
        value = self.need(name)
        # 1 == True and 1.0 == 1: the type is part of what a JSON value is.
        if not any(value == c and type(value) is type(c) for c in choices):
            offered = ", ".join(json.dumps(c) for c in choices)
            raise self.wrong(f"{name} must be one of {offered}; it is {_shown(value)}")
        return value

    def points(self, name: str) -> float | None:
        value = self.need(name)
        if value is None:
            return None
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or not 0 <= value <= 10:
            raise self.wrong(f"{name} must be 0 to 10, or null; it is {_shown(value)}")
        return float(value)

    def schema(self) -> None:
        value = self.need("schema")
        if value != SCHEMA or isinstance(value, bool):
            newer = isinstance(value, int) and value > SCHEMA
            hint = "; it was written by a newer version, update this one" if newer else ""
            raise self.wrong(f"schema is {_shown(value)}, this version reads {SCHEMA}{hint}")

    def history(self) -> tuple[Message, ...]:
        value = self.fields.get("history")
        if value is None:
            return ()
        if not isinstance(value, list):
            raise self.wrong(f"history must be a list of messages, it is {_shown(value)}")
        messages = []
        for i, message in enumerate(value):
            if not isinstance(message, dict):
                raise self.wrong(f"history[{i}] must be a message, it is {_shown(message)}")
            part = _Fields(f"{self.where}: history[{i}]", message)
            role = part.choice("role", ("system", "user", "assistant"))
            messages.append({"role": role, "content": part.text("content", empty=True)})
        return tuple(messages)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) < 60 else text[:56] + " ..."


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "nothing"


def _lines(path: str | os.PathLike[str]) -> Iterator[_Fields]:
    from ..finetune.data.files import read_records

    with bad_input():
        records = read_records(os.fspath(path))
    for record in records:
        yield _Fields(record.where, record.fields)


def read_questions(path: str | os.PathLike[str], limit: int | None = None) -> list[Question]:
    """The questions of a JSONL (also JSON, Parquet) file, in order; the first ``limit`` of them.

    Raises:
        BadInput: no such file, a line that is not JSON, no question in it, an id twice.
    """
    questions: list[Question] = []
    seen: dict[str, str] = {}
    for line in _lines(path):
        question = _question(line)
        name = str(question.question_id)
        if name in seen:
            raise line.wrong(f"question_id {name} is there already, in {seen[name]}")
        seen[name] = line.where
        questions.append(question)
    return questions if limit is None else questions[:limit]


def _question(line: _Fields) -> Question:
    fields = line.fields
    if "turns" not in fields and "text" not in fields:
        near = [n for n in ("question", "prompt", "instruction", "turn") if n in fields]
        hint = f"; call {near[0]} text" if near else ""
        raise line.wrong(f"neither turns nor text; there is {_listed(fields)}{hint}")
    if "turns" in fields:
        turns = fields["turns"]
        if not isinstance(turns, list) or not turns:
            raise line.wrong(f"turns must be a list of texts, it is {_shown(turns)}")
        part = _Fields(line.where, {f"turns[{i}]": turn for i, turn in enumerate(turns)})
        said = tuple(part.text(name) for name in part.fields)
    else:
        said = (line.text("text"),)
    return Question(line.id(), said, line.category(), line.history())


def read_replies(*paths: str | os.PathLike[str]) -> list[Reply]:
    """The replies of one or more files.

    Raises:
        BadInput: as :func:`read_questions`, or another schema, a field missing or of another type,
            a model's reply to a question twice, a question that differs between models.
    """
    found = [(line.where, _reply(line)) for path in paths for line in _lines(path)]
    check_replies([r for _, r in found], [w for w, _ in found])
    return [reply for _, reply in found]


def _reply(line: _Fields) -> Reply:
    line.schema()
    seed, sampling = line.fields.get("seed"), line.fields.get("sampling") or {}
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise line.wrong(f"seed must be a whole number or null, it is {_shown(seed)}")
    if not isinstance(sampling, dict):
        raise line.wrong(f"sampling must be an object, it is {_shown(sampling)}")
    return Reply(
        line.id(),
        line.text("model"),
        line.text("question"),
        line.text("reply", empty=True),
        line.category(),
        seed,
        sampling,
        line.history(),
    )


def check_replies(replies: Sequence[Reply], places: Sequence[str] | None = None) -> None:
    """Raises BadInput unless each model replied once to a question, and all to the same one.

    ``places`` says where each stands.
    """
    seen: dict[tuple[str, str], str] = {}
    asked: dict[str, tuple[str, Reply]] = {}
    for i, reply in enumerate(replies):
        place = places[i] if places else f"reply {i + 1}"
        if reply.key in seen:
            raise BadInput(
                f"{place}: a reply of {reply.model} to question {reply.question_id} is there "
                f"already, in {seen[reply.key]}"
            )
        seen[reply.key] = place
        where, other = asked.setdefault(reply.key[0], (place, reply))
        if (other.question, other.category) != (reply.question, reply.category):
            raise BadInput(
                f"{place}: question {reply.question_id} is another one than in {where} (or of "
                "another category); the replies are not to the same list of questions"
            )


def read_judgments(*paths: str | os.PathLike[str]) -> Judgments:
    """The judgments of one or more files.

    Raises:
        BadInput: as :func:`read_replies`, or judgments that contradict each other about which model
            is which.
    """
    found = [(line.where, _judgment(line)) for path in paths for line in _lines(path)]
    check_judgments([j for _, j in found], [w for w, _ in found])
    pairs = [j for _, j in found if isinstance(j, Pair)]
    return Judgments(pairs, [j for _, j in found if isinstance(j, Score)])


def _judgment(line: _Fields) -> Judgment:
    if "schema" not in line.fields and "kind" not in line.fields:
        raise line.wrong(
            f"no judgment of ours (schema, kind); there is {_listed(line.fields)}. `qlora elo` "
            "reads FastChat's and Chatbot Arena's files by itself"
        )
    line.schema()
    if line.choice("kind", ("pair", "score")) == "pair":
        pair = Pair(
            line.id(),
            line.text("model_a"),
            line.text("model_b"),
            line.choice("winner", WINNERS),
            line.text("judge"),
            line.choice("order", (0, 1)),
            line.category(),
            line.free("why"),
            line.free("raw"),
        )
        if pair.model_a == pair.model_b:
            raise line.wrong(f"model_a and model_b are both {pair.model_a}")
        return pair
    score = Score(
        line.id(),
        line.text("model"),
        line.text("baseline"),
        line.points("score"),
        line.points("baseline_score"),
        line.text("judge"),
        line.choice("order", (0, 1)),
        line.category(),
        line.free("raw"),
    )
    if score.model == score.baseline:
        raise line.wrong(f"model and baseline are both {score.model}")
    if (score.score is None) != (score.baseline_score is None):
        raise line.wrong("only one of score and baseline_score is null; a verdict has both or none")
    return score


def check_judgments(judgments: Sequence[Judgment], places: Sequence[str] | None = None) -> None:
    """Raises BadInput for a judgment that is there twice, and for two that cannot both be right
    about which model is which: the same judge, question, models and place of each, under exchanged
    names, or a model scored against a baseline that elsewhere is scored against it."""
    seen: dict[tuple[Any, ...], tuple[str, Judgment]] = {}
    roles: dict[tuple[str, str], tuple[str, str]] = {}
    categories: dict[str, tuple[str, str]] = {}
    for i, judgment in enumerate(judgments):
        place = places[i] if places else f"judgment {i + 1}"
        what = f"question {judgment.question_id}, judge {judgment.judge}"
        where, other = seen.setdefault(judgment.key, (place, judgment))
        if other is not judgment:
            named = (other.model_a, judgment.model_a) if isinstance(judgment, Pair) else ("", "")
            if named[0] != named[1]:
                raise BadInput(
                    f"{place} and {where} disagree about which model is which ({what}): model_a "
                    f"is {named[1]} in one and {named[0]} in the other, and by their order both "
                    f"show {judgment.key[-1]} first. order is 0 where model_a is shown first, 1 "
                    "where model_b is"
                )
            raise BadInput(f"{place}: the same judgment as in {where} ({what})")
        if isinstance(judgment, Score):
            role = judgment.model, judgment.baseline
            roles[role] = roles.get(role, (place, what))
            if role[::-1] in roles:
                raise BadInput(
                    f"{place} and {roles[role[::-1]][0]} disagree about which model is the "
                    f"baseline: {role[1]} or {role[0]}"
                )
        name = str(judgment.question_id)
        if judgment.category is None:  # people's votes may have none
            continue
        where_category = categories.setdefault(name, (place, judgment.category))
        if where_category[1] != judgment.category:
            raise BadInput(
                f"{place}: question {name} is of category {judgment.category}, in "
                f"{where_category[0]} of {where_category[1]}"
            )


# --- writing ------------------------------------------------------------------------------------


def to_json(record: Question | Reply | Judgment) -> str:
    """A record as its line, without the end of line."""
    values = dataclasses.asdict(record)
    if not values.get("history", True):
        del values["history"]
    if isinstance(record, Pair):
        values = {"schema": SCHEMA, "kind": "pair", **values}
    elif isinstance(record, Score):
        values = {"schema": SCHEMA, "kind": "score", **values}
    elif isinstance(record, Reply):
        values = {"schema": SCHEMA, **values}
    text = json.dumps(values, ensure_ascii=False, allow_nan=False)
    # Ends of lines that JSON allows inside a string and line-wise tools take for ends of records.
    return re.sub("[\x85\u2028\u2029]", lambda m: f"\\u{ord(m[0]):04x}", text)


def write_records(
    path: str | os.PathLike[str], records: Iterable[Question | Reply | Judgment]
) -> None:
    """Writes a whole file: under another name first, so that a kill leaves the old one."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            for record in records:
                file.write(to_json(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
