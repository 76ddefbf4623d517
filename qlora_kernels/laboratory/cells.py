"""Finished cells of a long run, in a JSON-lines file: what is there is not computed again.

A line is ``{"schema": 1, "key": {...}, "value": {...}}``, written whole and synced when its cell is
done. The key holds everything that the value depends on, so that other settings find nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..finetune.checkpoint import replace_file
from ..finetune.errors import BadInput

__all__ = ["SCHEMA", "Cells"]

SCHEMA = 1


def _canonical(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)


class Cells:
    """The cells in a file.

    Args:
        path: read now, if it is there; written to as cells are done.

    Raises:
        BadInput: a line of another schema, or that is no JSON, other than a last one that was cut
            off (which is taken away).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found = 0
        self._values: dict[str, Any] = {}
        if not path.is_file():
            return
        lines = path.read_text("utf-8").split("\n")
        for i, line in enumerate(lines):
            if not line:
                continue
            try:
                cell = json.loads(line)
                value = cell["value"]
            except (ValueError, KeyError, TypeError) as error:
                if i == len(lines) - 1:  # a run that was killed while it wrote
                    kept = "".join(text + "\n" for text in lines[:-1])
                    replace_file(path, lambda p, kept=kept: p.write_text(kept, "utf-8"))
                    break
                raise BadInput(f"{path}, line {i + 1}, is not a cell: {error}") from error
            if cell.get("schema") != SCHEMA:
                raise BadInput(
                    f"{path}, line {i + 1}, is of schema {cell.get('schema')!r}; this version "
                    f"reads schema {SCHEMA}: give another --output_dir"
                )
            self._values[_canonical(cell["key"])] = value

    def get(self, key: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
        """The value of ``key``: from the file, or computed and written to it."""
        text = _canonical(key)
        if text in self._values:
            self.found += 1
            return self._values[text]
        # As it will be read: the same numbers whether a run was interrupted or not.
        value = json.loads(json.dumps(compute()))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"schema": SCHEMA, "key": json.loads(text), "value": value}) + "\n"
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._values[text] = value
        return value
