"""Where replies come from: a model here, an endpoint, or a file; as ``--model`` names them."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..finetune.errors import BadInput
from .elo_read import _rows
from .records import Question, Reply

__all__ = ["Source", "parse", "replies_of_file"]

_OPTIONS = ("adapter", "quant_type", "dtype", "model", "base_url")
_FILES = (".jsonl", ".json", ".parquet", ".ndjson", ".csv")


@dataclass(frozen=True)
class Source:
    """One model and where its replies come from.

    Attributes:
        kind: "local", "endpoint" or "file".
        place: a folder, hub id or GGUF; a base URL; a file. "" for an adapter's own base.
        adapter, quant_type, dtype: of a local one, as ``qlora chat`` takes them.
        model: an endpoint's name for it.
    """

    name: str
    kind: str
    place: str
    adapter: str | None = None
    quant_type: str = "nf4"
    dtype: str = "auto"
    model: str = ""


def parse(word: str) -> Source:
    """``NAME=FOLDER[,adapter=FOLDER][,quant_type=…][,dtype=…]``, ``NAME=URL[,model=…]`` or
    ``NAME=FILE``. Commas in a path must be escaped: ``\\,``.

    Raises:
        BadInput: another form, an unknown option.
    """
    name, sign, rest = word.partition("=")
    if not (sign and name.strip() and rest):
        raise BadInput(
            f"--model {word}: expected NAME=FOLDER[,adapter=FOLDER], NAME=http://…[,model=…] or "
            "NAME=replies.jsonl"
        )
    place, *options = (p.replace("\0", ",") for p in rest.replace("\\,", "\0").split(","))
    given: dict[str, str] = {}
    if place.startswith("adapter="):  # its base is the one that it was trained on
        options, place = [place, *options], ""
    for option in options:
        key, sign, value = option.partition("=")
        if not sign or key not in _OPTIONS[:4]:
            near = difflib.get_close_matches(key, _OPTIONS[:4], n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise BadInput(
                f"--model {word}: there is no option {key!r}{hint} (adapter, quant_type, dtype; "
                "model of an endpoint)"
            )
        if key in given:
            raise BadInput(f"--model {word}: {key} is given twice")
        given[key] = value
    name = name.strip()
    if place.startswith(("http://", "https://")):
        kind, fits = "endpoint", ("model",)
    elif place.lower().endswith(_FILES) and not Path(place).is_dir():
        kind, fits = "file", ()
    else:
        kind, fits = "local", ("adapter", "quant_type", "dtype")
    for key in given:
        if key not in fits:
            raise BadInput(f"--model {word}: {key} says nothing about a {_KINDS[kind]}")
    if kind == "endpoint":
        given.setdefault("model", name)
    return Source(name, kind, place, **given)


_KINDS = {"local": "model here", "endpoint": "model behind an endpoint", "file": "file of replies"}


def replies_of_file(source: Source, questions: Sequence[Question]) -> list[Reply]:
    """The replies that a file holds to ``questions``, in their order.

    Forms: ours (those of model ``source.name``; of any, if the file has one model only), FastChat's
    (``choices``, ``model_id``), QLoRA's (``generation``), and any with ``question_id`` and
    ``reply``, ``text``, ``output`` or ``answer``.

    Raises:
        BadInput: no reply in a line, two to one question, or none to some question.
    """
    rows = list(_rows(Path(source.place)))
    models = {_model(r.fields) for r in rows} - {None}
    if len(models) > 1 and source.name not in models:
        raise BadInput(
            f"{source.place} has replies of {', '.join(sorted(map(str, models)))}; none is called "
            f"{source.name}"
        )
    found: dict[str, tuple[str, str, dict[str, object]]] = {}
    for row in rows:
        if len(models) > 1 and _model(row.fields) != source.name:
            continue
        name = str(row.id("question_id"))
        if name in found:
            raise row.wrong(f"a second reply to question {name}; the first is in {found[name][1]}")
        found[name] = _said(row), row.where, row.fields
    lacking = [q.question_id for q in questions if str(q.question_id) not in found]
    if lacking:
        shown = ", ".join(map(str, lacking[:5])) + (" …" if len(lacking) > 5 else "")
        raise BadInput(
            f"{source.place} has no reply to {len(lacking)} of {len(questions)} questions: {shown}"
        )
    replies = []
    for q in questions:
        text, where, fields = found[str(q.question_id)]
        asked = fields.get("question")
        if isinstance(asked, str) and "schema" in fields and asked != q.turns[-1]:
            raise BadInput(f"{where}: question {q.question_id} is another one than in the list")
        seed, sampling = fields.get("seed"), fields.get("sampling")
        history = fields.get("history")
        kept = sampling if isinstance(sampling, dict) else {}
        reply = Reply(
            q.question_id,
            source.name,
            q.turns[-1],
            text,
            q.category,
            seed if isinstance(seed, int) else None,
            {**kept, "source": os.path.basename(source.place)},
            tuple(history) if isinstance(history, list) else q.history,
        )
        replies.append(reply)
    return replies


def _model(fields: dict[str, object]) -> str | None:
    value = fields.get("model", fields.get("model_id"))
    return value if isinstance(value, str) else None


def _said(row: object) -> str:
    fields = row.fields  # type: ignore[attr-defined]
    choices = fields.get("choices")
    if isinstance(choices, list):  # FastChat: the first sample's last turn
        try:
            value = choices[0]["turns"][-1]
        except (IndexError, KeyError, TypeError):
            value = None
        if isinstance(value, str):
            return value
    # QLoRA's files repeat the question as text beside their generation.
    for name in ("reply", "generation", "output", "answer", "text"):
        if isinstance(fields.get(name), str):
            return str(fields[name])
    names = ", ".join(fields)
    raise row.wrong(f"no reply (reply, generation, output, answer, text); there is {names}")  # type: ignore[attr-defined]
