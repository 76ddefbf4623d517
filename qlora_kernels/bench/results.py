"""The JSON of a run: what was measured (or modelled), where, and every sample of it.

    {"schema": 1, "tool": "qlora bench", "kind": "measured" or "modelled", "complete": true,
     "device": ..., "clock": ..., "machine": {...}, "settings": {...},
     "limits": {"read": {"amount": bytes, "rounds": [[seconds, ...], ...]}, ...},
     "lines": [{"key": ..., "op": ..., "flops": ..., "bytes": ..., "control": "read",
                "contenders": {"qlora cpu": {"rounds": [[seconds, ...], ...]}},
                "failed": {"torchao": "why"}}, ...]}

A **round** is one pass over all lines: samples of one round share what the machine did in those
seconds, those of different rounds lie minutes apart.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..finetune.errors import BadInput

__all__ = ["SCHEMA", "TOOL", "limit_of", "read", "spread", "summarise", "write"]

SCHEMA, TOOL = 1, "qlora bench"


def write(path: Path, result: dict[str, Any]) -> None:
    """Whole or not at all.

    Raises:
        BadInput: the folder cannot be written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(result, file, indent=1)
            file.write("\n")
        os.chmod(file.name, 0o644)
        os.replace(file.name, path)
    except OSError as error:
        raise BadInput(f"cannot write {path}: {error.strerror}") from None


def read(path: str | Path) -> dict[str, Any]:
    """A result of ``qlora bench``.

    Raises:
        BadInput: no such file, not JSON, of something else, of another version, or incomplete in
            what every reader needs; the message says which.
    """
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise BadInput(f"cannot read {path}: {reason}") from None
    try:
        found = json.loads(text)
    except ValueError as error:
        raise BadInput(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict) or found.get("tool") != TOOL:
        raise BadInput(f"{path} is not a result of `{TOOL}`")
    if found.get("schema") != SCHEMA:
        raise BadInput(
            f"{path} has schema {found.get('schema')}, this version reads {SCHEMA}: "
            "measure again with this version, or compare with the one that wrote it"
        )
    for name, kind in (("machine", dict), ("limits", dict), ("lines", list), ("kind", str)):
        if not isinstance(found.get(name), kind):
            raise BadInput(f"{path}: {name!r} is missing or no {kind.__name__}")
    for line in found["lines"]:
        if not isinstance(line, dict) or not {"key", "contenders"} <= set(line):
            raise BadInput(f"{path}: a line without key and contenders")
        for name, entry in line["contenders"].items():
            if not _are_rounds(entry.get("rounds") if isinstance(entry, dict) else None):
                raise BadInput(f"{path}: {line['key']}, {name}: no samples, or not all positive")
    return found


def _are_rounds(rounds: Any) -> bool:
    if not isinstance(rounds, list) or not any(rounds):
        return False
    return all(
        isinstance(r, list) and all(isinstance(s, (int, float)) and 0 < s < 1e9 for s in r)
        for r in rounds
    )


def spread(rounds: Sequence[Sequence[float]]) -> dict[str, float]:
    """min, p10, median, p90 and count of all samples."""
    values = np.concatenate([np.asarray(r, float) for r in rounds if len(r)])
    p10, median, p90 = np.quantile(values, [0.1, 0.5, 0.9])
    return {"min": float(values.min()), "p10": float(p10), "median": float(median),
            "p90": float(p90), "count": len(values)}  # fmt: skip


def pace(limits: dict[str, Any], name: str) -> float | None:
    """Bytes or floating-point operations a second of a limit: its best; None if not measured."""
    entry = limits.get(name)
    if not entry or not any(entry["rounds"]):
        return None
    return entry["amount"] / min(s for r in entry["rounds"] for s in r)


def limit_of(line: dict[str, Any], limits: dict[str, Any]) -> tuple[float, str] | None:
    """``(seconds, which limit)``: moving the line's bytes or making its products, the longer."""
    moving = "copy" if line["op"] in ("quantize", "dequantize", "optimizer") else "read"
    moving = moving if moving in limits else "copy"
    found = []
    if (bandwidth := pace(limits, moving)) is not None:
        found.append((line["bytes"] / bandwidth, moving))
    products = [n for n in limits if n.startswith("matmul ")]
    if line["flops"] and products:
        # Where bf16 is multiplied in software, fp32 is the limit of both.
        own = f"matmul {line['compute']}"
        name = max(
            {own, "matmul float32"} & set(products) or set(products),
            key=lambda n: pace(limits, n) or 0.0,
        )
        found.append((line["flops"] / (pace(limits, name) or float("inf")), name))
    return max(found) if found else None


def summarise(lines: Iterable[dict[str, Any]], limits: dict[str, Any]) -> None:
    """Adds what follows from the samples: each contender's spread, each line's limit."""
    for line in lines:
        for entry in line["contenders"].values():
            entry["seconds"] = spread(entry["rounds"])
        limit = limit_of(line, limits)
        if limit is not None:
            line["limit_seconds"], line["control"] = limit
