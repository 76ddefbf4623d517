"""Reads records from JSONL, JSON (also compressed) and Parquet files, a folder, or the hub.

Everything is read and checked before anything else happens, and each record keeps the place
where it stands, so that whatever is wrong with it later can be said with file and line.
"""

from __future__ import annotations

import difflib
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from qlora_kernels.finetune.data.types import DataError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.:\[\]%+-]+)?")


class Record(NamedTuple):
    """One record and where it stands (``my.jsonl:17``, ``my.parquet row 17``)."""

    where: str
    fields: dict[str, Any]


def read_records(source: str, limit: int | None = None) -> list[Record]:
    """All records of a file, a folder, or a data set on the hub, in order.

    Raises:
        DataError: absent, empty, half-written, not UTF-8, not records, of an unknown kind.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if _suffix(p) in READERS)
        if not files:
            raise DataError(f"{source} is a folder without {_kinds()} files")
    elif path.is_file():
        files = [path]
    elif HUB_ID.fullmatch(source) and _suffix(path) not in READERS:
        return _read_hub(source, limit)
    else:
        raise DataError(f"{source} does not exist{_nearby(path)}")
    records: list[Record] = []
    for file in files:
        for record in _reader_of(file)(file):
            records.append(record)
            if len(records) == limit:
                return records
    if not records:
        raise DataError(f"{source} holds no records; expected at least one sample")
    return records


def _kinds() -> str:
    return ".jsonl, .ndjson, .json (each also .gz), .parquet"


def _suffix(path: Path) -> str:
    """How the name ends, as :data:`READERS` has it; of a compressed file both endings."""
    return "".join(s.lower() for s in path.suffixes[-2 if path.suffix.lower() == ".gz" else -1 :])


def _nearby(path: Path) -> str:
    """The files that may have been meant."""
    parent = path.parent
    if not parent.is_dir():
        return f" (nor does the folder {parent})"
    names = [p.name for p in parent.iterdir() if _suffix(p) in READERS]
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {parent / close[0]}?"
    return (
        f"; give a {_kinds()} file, a folder of them, 'python-docs', or the id of a data set on "
        "the hub (owner/name)"
    )


def _reader_of(path: Path) -> Callable[[Path], Iterator[Record]]:
    suffix = _suffix(path)
    if suffix in READERS:
        return READERS[suffix]
    close = difflib.get_close_matches(suffix, READERS, n=1, cutoff=0.4)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise DataError(
        f"{path} is of a kind that cannot be read ({suffix or 'no extension'}){hint} Offered: "
        f"{_kinds()}"
    )


def _read_text(path: Path) -> str:
    data = path.read_bytes()
    if path.suffix.lower() == ".gz" and data:
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(
                f"{path}: not a whole gzip file ({error}); it was copied only in part, or is of "
                "another kind"
            ) from None
    if not data.strip():
        raise DataError(f"{path} is empty")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}:{line}: not UTF-8 (byte {data[error.start]:#04x} at offset {error.start}); "
            "convert the file, for example with iconv -f latin1 -t utf-8"
        ) from None


def _as_record(value: Any, where: str) -> Record:
    if isinstance(value, dict):
        return Record(where, value)
    raise DataError(
        f'{where}: a {_json_kind(value)}; expected an object with named fields, as {{"text": ...}}'
    )


def _json_kind(value: Any) -> str:
    if value is None:
        return "null"
    kinds = {bool: "boolean", int: "number", float: "number", str: "string", list: "list"}
    return kinds.get(type(value), "object")


def _read_jsonl(path: Path) -> Iterator[Record]:
    text = _read_text(path)
    lines = text.split("\n")  # not splitlines(): strings may hold U+2028 and the like
    last = max(i for i, line in enumerate(lines) if line.strip())
    for i, line in enumerate(lines):
        if not line.strip():
            continue
        where = f"{path}:{i + 1}"
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            if i == last and not text.endswith("\n"):
                raise DataError(
                    f"{where}: the last line ends in the middle (character {error.pos}: "
                    f"{error.msg}); the file is half-written or was copied only in part"
                ) from None
            hint = ""
            if i == 0 and line.lstrip()[0] in "[{" and len(line.strip()) < 3:
                hint = "; a file that is one JSON value as a whole is called .json"
            raise DataError(
                f"{where}: not JSON (character {error.pos}: {error.msg}){hint}"
            ) from None
        except RecursionError:
            raise DataError(f"{where}: JSON nested too deeply") from None
        yield _as_record(value, where)


def _read_json(path: Path) -> Iterator[Record]:
    """A list of objects, or an object that holds one such list; JSON lines are taken too."""
    text = _read_text(path)
    decoder = json.JSONDecoder()
    start = _skip(text, 0)
    try:
        if text[start] != "[":
            value, end = decoder.raw_decode(text, start)
            if _skip(text, end) < len(text):
                yield from _read_jsonl(path)
                return
            yield from _only_list(value, path)
            return
        # An item at a time, for the sake of its line number.
        at, line = _skip(text, start + 1), 1 + text.count("\n", 0, start)
        counted = start
        while at < len(text) and text[at] != "]":
            line, counted = line + text.count("\n", counted, at), at
            value, at = decoder.raw_decode(text, at)
            yield _as_record(value, f"{path}:{line}")
            at = _skip(text, at)
            if text[at : at + 1] == ",":
                at = _skip(text, at + 1)
            elif text[at : at + 1] != "]":
                raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
        if at >= len(text):
            raise json.JSONDecodeError("Expecting ']'", text, at)
        if _skip(text, at + 1) < len(text):
            raise json.JSONDecodeError("Extra data", text, at + 1)
    except json.JSONDecodeError as error:
        # What is cut off ends in an open string, or a few characters into a word or an escape.
        cut = error.pos >= len(text.rstrip()) - 6 or error.msg.startswith("Unterminated string")
        what = "; the file is half-written or was copied only in part" if cut else ""
        raise DataError(f"{path}:{error.lineno}: not JSON ({error.msg}){what}") from None
    except RecursionError:
        raise DataError(f"{path}: JSON nested too deeply") from None


def _skip(text: str, at: int) -> int:
    """The next position at or after ``at`` that is not JSON's white space."""
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _only_list(value: Any, path: Path) -> Iterator[Record]:
    lists = (
        {k: v for k, v in value.items() if isinstance(v, list) and v and isinstance(v[0], dict)}
        if isinstance(value, dict)
        else {}
    )
    if len(lists) != 1:
        named = isinstance(value, dict) and value
        fields = f" with the fields {', '.join(map(repr, value))}" if named else ""
        raise DataError(
            f"{path}: one {_json_kind(value)}{fields}; expected a list of objects, or an object "
            "that holds exactly one such list"
        )
    ((name, items),) = lists.items()
    for i, item in enumerate(items):
        yield _as_record(item, f"{path} {name}[{i}]")


def _read_parquet(path: Path) -> Iterator[Record]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(
            f"{path}: reading Parquet needs pyarrow; pip install 'qlora-kernels[finetune]'"
        ) from None
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty")
    try:
        table = pyarrow.parquet.ParquetFile(path).read()
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(
            f"{path}: not a whole Parquet file ({reason}); it was copied only in part, or is of "
            "another kind"
        ) from None
    row = 0
    for batch in table.to_batches(max_chunksize=1024):
        for fields in batch.to_pylist():
            row += 1
            yield Record(f"{path} row {row}", fields)


def _read_hub(source: str, limit: int | None) -> list[Record]:
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{source} is no file here; to read it from the hub, pip install datasets"
        ) from None
    name, _, split = source.partition(":")
    try:
        data = datasets.load_dataset(name, split=split or "train")
    except Exception as error:
        # The library raises a dozen kinds of errors of its own and of its transport's; each one
        # means that there is no data.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"{source} is no file here, and reading it from the hub failed: {reason} (another "
            "split is named owner/name:split)"
        ) from error
    count = len(data) if limit is None else min(limit, len(data))
    if not count:
        raise DataError(f"{source} holds no records")
    return [Record(f"{source} row {i + 1}", dict(data[i])) for i in range(count)]


READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
READERS |= {f"{kind}.gz": READERS[kind] for kind in (".jsonl", ".ndjson", ".json")}
