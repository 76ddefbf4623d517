"""What an endpoint has answered, on disk: an answer that was paid for is never asked for again."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any

from ..finetune.errors import BadInput
from .appender import Appender

__all__ = ["Cache", "request_key"]

SCHEMA = 1


def request_key(base_url: str, body: dict[str, Any]) -> str:
    """The name of a request: of everything that is sent, and where to. The API key is no part."""
    whole = json.dumps([base_url.rstrip("/"), body], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(whole.encode()).hexdigest()


class Cache:
    """Answers by :func:`request_key`, in a JSONL file; what is put is on the disk at once.

    A line holds ``schema``, ``key``, ``request`` and ``response`` as they went over the wire. Any
    thread may use it; one process at a time may have it open. A context manager.

    Attributes:
        path: the file.
        mended: bytes of a torn last line that a kill had left, now cut off.

    Raises:
        BadInput: the file is another run's at the moment, or holds a line that is no answer.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        self._file = Appender(self.path)
        self.mended = self._file.mended
        try:
            self._answers = self._read()
        except BaseException:
            self._file.close()
            raise

    def _read(self) -> dict[str, dict[str, Any]]:
        answers: dict[str, dict[str, Any]] = {}
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    record = json.loads(line)
                    schema, key, response = record["schema"], record["key"], record["response"]
                    if schema != SCHEMA or not isinstance(response, dict):
                        raise ValueError(f"schema is {schema!r}, this version reads {SCHEMA}")
                except (ValueError, TypeError, KeyError) as error:
                    raise BadInput(
                        f"{self.path}:{number} is no answer of an endpoint ({error!r}); name "
                        "another cache, or take the line out"
                    ) from error
                answers[key] = response
        return answers

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, key: str) -> dict[str, Any] | None:
        """The response to a request, None if there is none yet."""
        return self._answers.get(key)

    def put(self, key: str, request: dict[str, Any], response: dict[str, Any]) -> None:
        """Keeps a response."""
        record = {"schema": SCHEMA, "key": key, "request": request, "response": response}
        with self._lock:
            self._file.append(record)
            self._answers[key] = response

    def close(self) -> None:
        """Gives the file free."""
        self._file.close()

    def __enter__(self) -> Cache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
