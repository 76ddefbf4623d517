"""Records to examples: which format a file has, and what is said in each record.

    chat               messages: [{role, content}, ...]
    sharegpt           conversations: [{from, value}, ...], optional system
    prompt-completion  prompt, completion: two texts, or two lists of messages
    alpaca             instruction, optional input, output
    flan               inputs, targets
    hh-rlhf            chosen, rejected: the chosen one is learned
    oasst-trees        message_tree_id, prompt with replies inside each other: a tree a record
    oasst-messages     message_id, parent_id, role, text: a message a record
    text               text

A format is recognised by its fields, in all records of the file. Other names are given as
``columns``: role -> column, where a column may be a path (``instances.0.output``).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qlora_kernels.finetune.data import oasst
from qlora_kernels.finetune.data.files import Record
from qlora_kernels.finetune.data.types import DataError

Message = dict[str, str]


@dataclass
class Example:
    """What one record says: a conversation, or a prompt with its completion, or a text."""

    where: str
    messages: list[Message] = field(default_factory=list)
    prompt: str = ""
    completion: str | None = None
    text: str | None = None
    group: str | None = None
    """Examples of one group are held out together; None: only with their duplicates."""

    @property
    def answered(self) -> bool:
        """Whether there is anything to learn: a reply that is not empty, or a text."""
        if self.text is not None:
            return bool(self.text.strip())
        if self.completion is not None:
            return bool(self.completion.strip())
        return any(m["role"] == "assistant" and m["content"].strip() for m in self.messages)


Convert = Callable[[Record], Example]
Gather = Callable[[Sequence[Record]], tuple[list[Example], list[str]]]


@dataclass(frozen=True)
class Format:
    """How the records of a format look, and how one becomes an example."""

    name: str
    needs: tuple[str, ...]
    takes: tuple[str, ...]  # what may be there besides
    convert: Convert | None = None
    gather: Gather | None = None
    """In place of ``convert``: all records to examples and notes, where they are not one to one."""


# --------------------------------------------------------------------------- fields


def _text(record: Record, name: str, *, optional: bool = False) -> str:
    value = record.fields.get(name)
    if isinstance(value, str):
        return value
    if value is None and optional:
        return ""
    raise DataError(f"{record.where}: {name!r} is {_kind(value)}; expected a text")


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return "an object"
    return f"{value!r}"


ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "bard": "assistant",
    "bing": "assistant",
}


def _messages(record: Record, name: str) -> list[Message]:
    turns = record.fields.get(name)
    if not isinstance(turns, (list, tuple)) or not turns:
        raise DataError(f"{record.where}: {name!r} is {_kind(turns)}; expected a list of messages")
    messages = []
    for i, turn in enumerate(turns):
        where = f"{record.where}: {name}[{i}]"
        if not isinstance(turn, Mapping):
            raise DataError(f"{where} is {_kind(turn)}; expected an object with role and content")
        keys = ("role", "content") if "role" in turn else ("from", "value")
        missing = [key for key in keys if key not in turn]
        if missing:
            raise DataError(
                f"{where} lacks {missing[0]!r} (it has {_names(turn)}); expected role and content, "
                "or from and value"
            )
        role, content = turn[keys[0]], turn[keys[1]]
        if not isinstance(role, str) or role.lower() not in ROLES:
            close = difflib.get_close_matches(str(role).lower(), ROLES, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise DataError(
                f"{where}: the role is {role!r}{hint}; offered: {', '.join(ROLES)}. Calls of tools "
                "are not"
            )
        if turn.get("tool_calls"):
            raise DataError(f"{where} calls a tool, which is not offered; take such samples out")
        messages.append({"role": ROLES[role.lower()], "content": _content(content, where)})
    return messages


def _content(content: Any, where: str) -> str:
    """A message's text; the parts of OpenAI's list form joined."""
    if isinstance(content, str):
        return content
    if isinstance(content, (list, tuple)):
        parts = []
        for part in content:
            if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, Mapping) else _kind(part)
                raise DataError(f"{where}: a part of its content is {kind}; only text is offered")
            parts.append(part["text"])
        return "".join(parts)
    raise DataError(f"{where}: the content is {_kind(content)}; expected a text")


def _names(fields: Mapping[str, Any]) -> str:
    return ", ".join(repr(name) for name in fields) or "no fields"


def _with_system(record: Record, messages: list[Message]) -> list[Message]:
    system = _text(record, "system", optional=True)
    if system.strip() and messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    return messages


# --------------------------------------------------------------------------- formats


def _chat(name: str) -> Callable[[Record], Example]:
    def convert(record: Record) -> Example:
        return Example(record.where, _with_system(record, _messages(record, name)))

    return convert


def _prompt_completion(record: Record) -> Example:
    if not isinstance(record.fields["prompt"], str):  # both are lists of messages
        both = [*_messages(record, "prompt"), *_messages(record, "completion")]
        return Example(record.where, _with_system(record, both))
    prompt, completion = _text(record, "prompt"), _text(record, "completion")
    if _text(record, "system", optional=True).strip():
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        return Example(record.where, _with_system(record, turns))
    return Example(record.where, prompt=prompt, completion=completion)


def _alpaca(record: Record) -> Example:
    question, extra = _text(record, "instruction"), _text(record, "input", optional=True)
    if extra.strip():
        question = f"{question}\n\n{extra}"
    turns = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": _text(record, "output")},
    ]
    return Example(record.where, _with_system(record, turns))


def _flan(record: Record) -> Example:
    turns = [
        {"role": "user", "content": _text(record, "inputs")},
        {"role": "assistant", "content": _text(record, "targets")},
    ]
    return Example(record.where, _with_system(record, turns))


_HH_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


def _hh_rlhf(record: Record) -> Example:
    """The chosen of two conversations; as one text with turns (HH-RLHF), or as messages."""
    if not isinstance(record.fields["chosen"], str):
        asked = record.fields.get("prompt")
        before = _messages(record, "prompt") if isinstance(asked, (list, tuple)) else []
        return Example(record.where, _with_system(record, before + _messages(record, "chosen")))
    text = _text(record, "chosen")
    before, *parts = _HH_TURN.split(text)
    if not parts or before.strip() or parts[0] != "Human":
        raise DataError(
            f"{record.where}: 'chosen' does not begin with 'Human:'; expected turns as "
            "'\\n\\nHuman: ...\\n\\nAssistant: ...' (for other forms give columns, as in "
            "columns: {prompt: prompt, completion: chosen})"
        )
    messages: list[Message] = []
    for speaker, said in zip(parts[::2], parts[1::2], strict=True):
        role = ROLES[speaker.lower()]
        if messages and messages[-1]["role"] == role:  # some speak twice in a row
            messages[-1]["content"] += f"\n\n{said.strip()}"
        else:
            messages.append({"role": role, "content": said.strip()})
    return Example(record.where, messages)


def _oasst(read: Callable[..., tuple[list[Any], list[str]]]) -> Gather:
    def gather(records: Sequence[Record]) -> tuple[list[Example], list[str]]:
        found, notes = read(records)
        return [Example(where, messages) for where, messages in found], notes

    return gather


def _plain_text(record: Record) -> Example:
    return Example(record.where, text=_text(record, "text"))


# In the order of preference where a file has the fields of several: alpaca's published file has
# a rendered `text` beside its columns, for one.
FORMATS = {
    f.name: f
    for f in (
        Format("chat", ("messages",), ("system",), _chat("messages")),
        Format("sharegpt", ("conversations",), ("system",), _chat("conversations")),
        Format("prompt-completion", ("prompt", "completion"), ("system",), _prompt_completion),
        Format("alpaca", ("instruction", "output"), ("input", "system"), _alpaca),
        Format("flan", ("inputs", "targets"), ("system",), _flan),
        Format("hh-rlhf", ("chosen", "rejected"), ("prompt", "system"), _hh_rlhf),
        Format(
            "oasst-trees",
            ("message_tree_id", "prompt"),
            (),
            gather=_oasst(oasst.conversations_of_trees),
        ),
        Format(
            "oasst-messages",
            ("message_id", "role", "text"),
            ("parent_id", "rank", "deleted"),
            gather=_oasst(oasst.conversations_of_messages),
        ),
        Format("text", ("text",), (), _plain_text),
    )
}


def _describe() -> str:
    return "; ".join(f"{f.name}: {' + '.join(f.needs)}" for f in FORMATS.values())


# --------------------------------------------------------------------------- recognition


def to_examples(
    records: Sequence[Record],
    format_name: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> tuple[list[Example], Format, list[str]]:
    """Examples of all records, the format that they have, and notes for the report.

    Raises:
        DataError: fields that are missing (with the place), formats that are mixed, values of a
            wrong type, names that are unknown.
    """
    if format_name is not None and format_name not in FORMATS:
        close = difflib.get_close_matches(format_name, FORMATS, n=1, cutoff=0.4)
        raise DataError(
            f"format {format_name!r} is not offered"
            + (f" (did you mean {close[0]!r}?)" if close else "")
            + f"; offered: {', '.join(FORMATS)}"
        )
    if columns:
        records = _rename(records, columns)
        wanted = set(columns)
        fits = [f for f in FORMATS.values() if set(f.needs) <= wanted]
        if format_name is None and not fits:
            raise DataError(
                f"columns name {_names(dict(columns))}; a format needs one of these sets: "
                f"{_describe()}"
            )
        chosen = FORMATS[format_name] if format_name else fits[0]
    else:
        chosen = FORMATS[format_name] if format_name else _recognise(records)
    notes: list[str] = []
    if chosen.gather is not None:
        examples, notes = chosen.gather(records)
        return examples, chosen, notes
    for record in records:
        missing = [name for name in chosen.needs if name not in record.fields]
        if missing:
            raise DataError(
                f"{record.where} lacks the field{'s' if len(missing) > 1 else ''} "
                f"{' and '.join(map(repr, missing))} of the format {chosen.name}; it has "
                f"{_names(record.fields)}"
            )
    others = [
        f.name
        for f in FORMATS.values()
        if f is not chosen and not format_name and not columns and _has(records[0], f)
    ]
    if others:
        notes.append(
            f"the fields of {', '.join(others)} are there too; {chosen.name} is used (name the "
            "format to choose)"
        )
    assert chosen.convert is not None
    return [chosen.convert(record) for record in records], chosen, notes


def takes_several(record: Record, format_name: str | None = None) -> bool:
    """Whether an example takes more than one record like this, so that all have to be read."""
    if format_name is not None:
        known = FORMATS.get(format_name)
        return known is not None and known.gather is not None
    return next((f.gather is not None for f in FORMATS.values() if _has(record, f)), False)


def _has(record: Record, fmt: Format) -> bool:
    return all(record.fields.get(name) is not None for name in fmt.needs)


def _recognise(records: Sequence[Record]) -> Format:
    """The first format whose fields the first record has; the others have to follow."""
    first = records[0]
    chosen = next((f for f in FORMATS.values() if _has(first, f)), None)
    if chosen is None:
        # A record that lacks one field of a format is more likely that than another format.
        raise DataError(
            f"{first.where}: the format is not recognised from the fields {_names(first.fields)}."
            f"{_guess(first)} Known are {_describe()}. For other names give columns, as in "
            "columns: {prompt: question, completion: answer}"
        )
    for record in records:
        if all(name in record.fields for name in chosen.needs):
            continue
        other = next((f for f in FORMATS.values() if _has(record, f)), None)
        if other is not None:
            raise DataError(
                f"mixed formats: {first.where} is {chosen.name}, {record.where} is {other.name}; "
                "put them into files of their own, or name the format"
            )
    return chosen


_USUAL = {
    "prompt": ("question", "query", "instruction", "input", "problem", "user"),
    "completion": ("answer", "response", "output", "reply", "chosen", "solution", "assistant"),
}


def _guess(record: Record) -> str:
    """A suggestion of columns where their names are telling."""
    guess = {
        role: next((c for c in usual if isinstance(record.fields.get(c), str)), None)
        for role, usual in _USUAL.items()
    }
    if all(guess.values()):
        pairs = ", ".join(f"{role}: {column}" for role, column in guess.items())
        return f" Do you mean columns: {{{pairs}}}?"
    return ""


# --------------------------------------------------------------------------- columns


def _rename(records: Sequence[Record], columns: Mapping[str, str]) -> list[Record]:
    known = sorted({name for f in FORMATS.values() for name in (*f.needs, *f.takes)})
    for role in columns:
        if role not in known:
            close = difflib.get_close_matches(role, known, n=1)
            raise DataError(
                f"columns: {role!r} is no role"
                + (f" (did you mean {close[0]!r}?)" if close else "")
                + f"; offered: {', '.join(known)}"
            )
    optional = {name for f in FORMATS.values() for name in f.takes}
    renamed = []
    for record in records:
        fields = {}
        for role, path in columns.items():
            found, value = _follow(record.fields, path)
            if not found and role in optional:
                continue
            if not found:
                raise DataError(
                    f"{record.where} lacks the column {path!r} (for {role}); it has "
                    f"{_names(record.fields)}"
                )
            fields[role] = value
        renamed.append(Record(record.where, fields))
    return renamed


def _follow(value: Any, path: str) -> tuple[bool, Any]:
    """The value at ``path``: a name, or names and list positions with dots between."""
    if isinstance(value, Mapping) and path in value:
        return True, value[path]
    for part in path.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, (list, tuple)) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            return False, None
    return True, value
