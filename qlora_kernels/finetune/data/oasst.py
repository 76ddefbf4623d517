"""OASST1's message trees to conversations: of each tree the path of best-ranked replies.

Published are two forms of the same trees: a tree a line (``prompt`` with ``replies`` inside each
other), and a message a line (``message_id``, ``parent_id``), as the hub has it. A prompt has
several replies, each of those several follow-ups; people ranked those that share a parent, 0 the
best. QLoRA was trained on one conversation a tree: the path that takes the best at every level.

A tree that is malformed is left out and counted, and its first place named; where none is left it
is an error. Köpf et al. 2023, "OpenAssistant Conversations".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_kernels.finetune.data.files import Record
from qlora_kernels.finetune.data.types import DataError

__all__ = ["PUBLISHED", "conversations_of_messages", "conversations_of_trees"]

PUBLISHED = 9_846
"""Conversations that Guanaco was trained on: the trees of the published train split."""

_ROLES = {"prompter": "user", "assistant": "assistant"}
Conversation = tuple[str, list[dict[str, str]]]  # where its tree stands, its messages


@dataclass
class _Message:
    """A message as its file has it, checked one by one."""

    id: str
    parent: str | None
    role: str
    text: str
    rank: int | None
    deleted: bool
    where: str


class _Malformed(Exception):
    """A tree cannot be used; says why, as in "trees whose ...", and where."""

    def __init__(self, why: str, where: str) -> None:
        super().__init__(why)
        self.why, self.where = why, where


class _Counts:
    """What was left out or guessed, how often, and where first."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[int, str]] = {}

    def add(self, what: str, where: str) -> None:
        count, first = self._found.get(what, (0, where))
        self._found[what] = (count + 1, first)

    def notes(self) -> list[str]:
        return [
            f"{count:,} {what} (the first: {first})" for what, (count, first) in self._found.items()
        ]


def conversations_of_trees(records: Sequence[Record]) -> tuple[list[Conversation], list[str]]:
    """A conversation of each tree, and notes for the report.

    Raises:
        DataError: no tree can be used.
    """
    counts = _Counts()
    found: list[Conversation] = []
    seen: set[str] = set()
    for record in records:
        try:
            messages = _flatten(record)
            name = str(record.fields.get("message_tree_id") or messages[0].id)
            if name in seen:
                raise _Malformed("trees that were there already, left out", record.where)
            path = _best_path(messages[0], _children(messages), counts)
            seen.add(name)
            found.append((record.where, path))
        except _Malformed as fault:
            counts.add(fault.why, fault.where)
    return _all(found, counts, records)


def conversations_of_messages(records: Sequence[Record]) -> tuple[list[Conversation], list[str]]:
    """The same of a message a line, in any order; trees come in the order of their prompts.

    Raises:
        DataError: no tree can be used.
    """
    counts = _Counts()
    messages: dict[str, _Message] = {}
    for record in records:
        try:
            message = _message(record.fields, record.where, "messages")
            if message.id in messages:
                raise _Malformed(
                    "messages whose message_id was there already, left out", message.where
                )
            messages[message.id] = message
        except _Malformed as fault:
            counts.add(fault.why, fault.where)
    children = _children(messages.values())
    roots = [m for m in messages.values() if m.parent is None]
    reached: set[str] = set()
    found: list[Conversation] = []
    for root in roots:
        reached |= _below(root, children)
        try:
            found.append((root.where, _best_path(root, children, counts)))
        except _Malformed as fault:
            counts.add(fault.why, fault.where)
    lost = [m for m in messages.values() if m.id not in reached]
    cyclic = _on_cycles(lost, messages)
    for message in lost:
        if message.id in cyclic:
            counts.add("messages in a cycle of parents or below one, left out", message.where)
        else:
            counts.add("orphans, whose parent (or its) is not there, left out", message.where)
    return _all(found, counts, records)


def _all(
    found: list[Conversation], counts: _Counts, records: Sequence[Record]
) -> tuple[list[Conversation], list[str]]:
    notes = counts.notes()
    if not found:
        raise DataError(f"{records[0].where}: no tree can be used: {'; '.join(notes)}")
    if len(found) == PUBLISHED:
        notes.append(f"{PUBLISHED:,} conversations, as many as Guanaco was trained on")
    else:
        notes.append(
            f"{len(found):,} conversations of as many trees; Guanaco was trained on {PUBLISHED:,} "
            "(OpenAssistant/oasst1, its train split), so this is another set"
        )
    return found, notes


# --- messages -----------------------------------------------------------------------------------


def _message(fields: Any, where: str, records: str = "trees") -> _Message:
    """``fields`` checked; ``records`` are what is left out if they are wrong."""

    def wrong(what: str) -> _Malformed:
        return _Malformed(f"{records} with {what}, left out", where)

    if not isinstance(fields, Mapping):
        raise wrong("something else than a message")
    name, parent = fields.get("message_id"), fields.get("parent_id")
    if not isinstance(name, str) or not name:
        raise wrong("no message_id")
    if parent is not None and not isinstance(parent, str):
        raise wrong("a parent_id that is no text")
    if fields.get("role") not in _ROLES:
        raise wrong("a role that is neither prompter nor assistant")
    text, rank = fields.get("text"), fields.get("rank")
    if not isinstance(text, str):
        raise wrong("a text that is none")
    if isinstance(rank, float) and rank.is_integer():  # tables have no missing whole numbers
        rank = int(rank)
    if isinstance(rank, bool) or not isinstance(rank, int):
        rank = None
    deleted = bool(fields.get("deleted")) or not text.strip()
    return _Message(name, parent or None, fields["role"], text, rank, deleted, where)


def _flatten(record: Record) -> list[_Message]:
    """All messages of a nested tree, its prompt first."""
    messages: list[_Message] = []
    ids: set[str] = set()
    waiting: list[tuple[Any, str | None]] = [(record.fields.get("prompt"), None)]
    while waiting:  # not by recursion: a tree may be as deep as its author likes
        fields, parent = waiting.pop()
        message = _message(fields, record.where)
        if message.id in ids:
            raise _Malformed(
                "trees with one message_id twice (a cycle, or a copy), left out", record.where
            )
        if message.parent not in (None, parent):
            raise _Malformed(
                "trees with a parent_id that is not the message above, left out", record.where
            )
        ids.add(message.id)
        message.parent = parent
        messages.append(message)
        replies = fields.get("replies")
        if replies is not None and not isinstance(replies, list):
            raise _Malformed("trees with replies that are no list, left out", record.where)
        waiting += [(reply, message.id) for reply in reversed(replies or [])]
    return messages


def _children(messages: Iterable[_Message]) -> dict[str, list[_Message]]:
    children: dict[str, list[_Message]] = {}
    for message in messages:
        if message.parent is not None:
            children.setdefault(message.parent, []).append(message)
    return children


def _below(root: _Message, children: Mapping[str, list[_Message]]) -> set[str]:
    """The ids of a message and of all below it."""
    found: set[str] = set()
    waiting = [root]
    while waiting:
        message = waiting.pop()
        found.add(message.id)
        waiting += children.get(message.id, [])
    return found


def _on_cycles(lost: Sequence[_Message], messages: Mapping[str, _Message]) -> set[str]:
    """Of messages that no prompt leads to, those whose parents go round in a circle."""
    endless: dict[str, bool] = {}
    for message in lost:
        walk: list[str] = []
        at: str | None = message.id
        while at is not None and at in messages and at not in endless and at not in walk:
            walk.append(at)
            at = messages[at].parent
        circle = at is not None and (at in walk or endless.get(at, False))
        endless.update(dict.fromkeys(walk, circle))
    return {name for name, circle in endless.items() if circle}


# --- the path -----------------------------------------------------------------------------------


def _best_path(
    root: _Message, children: Mapping[str, list[_Message]], counts: _Counts
) -> list[dict[str, str]]:
    """From the prompt down, the best-ranked message of each level, as chat messages.

    It may end with a message of the prompter that nobody answered, as the published set does.
    """
    if root.role != "prompter":
        raise _Malformed("trees that do not begin with a prompter, left out", root.where)
    if root.deleted:
        raise _Malformed("trees with a prompt that is empty or deleted, left out", root.where)
    path, unranked = [root], False
    while True:
        choices = [m for m in children.get(path[-1].id, []) if not m.deleted]
        if not choices:
            break
        ranked = [m for m in choices if m.rank is not None]
        unranked |= len(choices) > 1 and not ranked
        best = min(ranked, key=lambda m: m.rank or 0) if ranked else choices[0]
        if best.role == path[-1].role:
            raise _Malformed("trees with two messages of one role in a row, left out", best.where)
        path.append(best)
    if len(path) == 1:
        raise _Malformed("trees with a prompt that nobody answered, left out", root.where)
    if unranked:
        counts.add("trees with replies that nobody ranked, the first of which is taken", root.where)
    return [{"role": _ROLES[m.role], "content": m.text} for m in path]
