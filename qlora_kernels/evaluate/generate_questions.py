"""Questions in the forms in which they are published.

======================= ===========================================================================
form                    recognised by
======================= ===========================================================================
ours, Vicuna's          ``turns``, or ``text`` (:mod:`.records`)
QLoRA's Open Assistant  ``text`` that begins ``### Human:``: turns before the last are its history
OASST's trees           ``prompt`` with ``replies`` inside each other
OASST's messages        ``message_id``, ``parent_id``, ``role``, ``text``
======================= ===========================================================================

Of Open Assistant's trees and messages every user's message is a question, as in the paper's
benchmark, with the conversation that leads to it as its history. Deleted messages, and what follows
them, are left out.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ..finetune.errors import BadInput, bad_input
from .records import Question, read_questions

__all__ = ["read"]

_TURN = re.compile(r"\s*### (Human|Assistant):\s*")
_ROLES = {"prompter": "user", "assistant": "assistant"}


def read(path: str | os.PathLike[str], limit: int | None = None) -> list[Question]:
    """The questions of a file, in order; the first ``limit`` of them.

    Raises:
        BadInput: as :func:`.records.read_questions`; a message without a parent, or on a cycle.
    """
    from ..finetune.data.files import read_records

    with bad_input():
        found = read_records(os.fspath(path))
    first = found[0].fields
    if isinstance(first.get("prompt"), dict):
        questions = _of_messages((m, r.where) for r in found for m in _flat(r.fields, r.where))
    elif {"message_id", "role", "text"} <= first.keys() and "question_id" not in first:
        questions = _of_messages((r.fields, r.where) for r in found)
    else:
        questions = [_unfold(q) for q in read_questions(path)]
    if not questions:
        raise BadInput(f"{path} holds no question: no user's message is in its trees")
    return questions if limit is None else questions[:limit]


def _unfold(question: Question) -> Question:
    """A text of ``### Human: … ### Assistant: …`` as history and last turn."""
    if len(question.turns) != 1 or not question.turns[0].lstrip().startswith("### Human:"):
        return question
    parts = _TURN.split(question.turns[0])[1:]
    turns = [
        {"role": "user" if role == "Human" else "assistant", "content": text.strip()}
        for role, text in zip(parts[::2], parts[1::2], strict=True)
    ]
    while turns and turns[-1]["role"] == "assistant":  # the place for the reply
        turns.pop()
    if not turns or not turns[-1]["content"]:
        raise BadInput(f"question {question.question_id}: no turn of the user stands in its text")
    return replace(question, turns=(turns[-1]["content"],), history=tuple(turns[:-1]))


def _flat(tree: dict[str, Any], where: str) -> Iterator[dict[str, Any]]:
    """A tree's messages, parents first; parents are given by where they stand."""
    waiting = [(tree["prompt"], None)]
    while waiting:
        message, parent = waiting.pop()
        if not isinstance(message, dict):
            raise BadInput(f"{where}: a message of the tree is no object")
        yield {**message, "parent_id": parent}
        replies = message.get("replies") or []
        waiting += [(reply, message.get("message_id")) for reply in reversed(replies)]


def _of_messages(messages: Iterator[tuple[dict[str, Any], str]]) -> list[Question]:
    by_id: dict[str, tuple[dict[str, Any], str]] = {}
    for message, where in messages:
        name = message.get("message_id")
        if not isinstance(name, str) or not isinstance(message.get("text"), str):
            raise BadInput(f"{where}: a message needs message_id and text")
        if message.get("role") not in _ROLES:
            raise BadInput(
                f"{where}: role is {message.get('role')!r}, not one of {', '.join(_ROLES)}"
            )
        if name in by_id:
            raise BadInput(f"{where}: message {name} is there already, in {by_id[name][1]}")
        by_id[name] = message, where
    questions = []
    for name, (message, where) in by_id.items():
        path, at = [], message
        while True:
            path.append(at)
            parent = at.get("parent_id")
            if parent is None:
                break
            if parent not in by_id:
                raise BadInput(f"{where}: message {name} follows {parent}, which is not there")
            if len(path) > len(by_id):
                raise BadInput(f"{where}: message {name} follows itself, in a circle")
            at = by_id[parent][0]
        if message["role"] != "prompter" or any(m.get("deleted") for m in path):
            continue
        if not message["text"].strip():
            raise BadInput(f"{where}: message {name} is empty")
        history = tuple({"role": _ROLES[m["role"]], "content": m["text"]} for m in path[:0:-1])
        questions.append(Question(name, (message["text"],), None, history))
    return questions
