"""A file of lines that grows, survives a kill, and belongs to one process at a time."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..finetune.errors import BadInput, bad_input
from .records import Judgment, Question, Reply, to_json

__all__ = ["Appender"]


class Appender:
    """A JSONL file that grows by whole, synced lines, and is one process's at a time.

    Opening it mends what a kill left: a last line without its end is finished if it is whole JSON,
    and cut off if it is not. A context manager; ``append`` may be called by several threads only
    under their own lock.

    Attributes:
        path: the file, made with its folder if absent.
        mended: bytes of a torn last line that were cut off.

    Raises:
        BadInput: another process has it open, or it cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        with bad_input(str(self.path)):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+b")
        try:
            _lock(self._file, self.path)
            self.mended = self._mend()
        except BaseException:
            self._file.close()
            raise

    def _mend(self) -> int:
        self._file.seek(0)
        data = self._file.read()
        start = data.rfind(b"\n") + 1
        tail = data[start:]
        if not tail:
            return 0
        try:
            whole = isinstance(json.loads(tail), dict)
        except ValueError:
            whole = False
        if whole:
            self._write(b"\n")
            return 0
        self._file.truncate(start)
        os.fsync(self._file.fileno())
        return len(tail)

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._file.flush()
        os.fsync(self._file.fileno())

    def append(self, *records: Question | Reply | Judgment | dict[str, Any]) -> None:
        """Adds lines; they are on the disk when it returns."""
        lines = [
            json.dumps(r, ensure_ascii=False, allow_nan=False)
            if isinstance(r, dict)
            else to_json(r)
            for r in records
        ]
        self._write("".join(line + "\n" for line in lines).encode())

    def empty(self) -> bool:
        """Whether it holds no line yet."""
        return os.fstat(self._file.fileno()).st_size == 0

    def clear(self) -> None:
        """Takes everything out."""
        self._file.truncate(0)
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file and gives it free."""
        self._file.close()

    def __enter__(self) -> Appender:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _lock(file: Any, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows: two runs at once are then the user's to avoid
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BadInput(f"{path} is being written by another run; wait, or name another") from None
