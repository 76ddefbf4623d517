"""What ``qlora judge`` shows in the end, and its JSON."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .judge_client import Answer
from .judge_statistics import as_json, bias_of_pairs, bias_of_scores, percents, wins
from .records import Judgment, Pair, Score

__all__ = ["SCHEMA", "report", "summary"]

SCHEMA = 1


def summary(judgments: Sequence[Judgment], planned: int, level: float = 0.95) -> dict[str, Any]:
    """All figures of one judge's judgments, as the JSON file has them (docs/judge.md)."""
    scores = [j for j in judgments if isinstance(j, Score)]
    pairs = [j for j in judgments if isinstance(j, Pair)]
    unread = sum(s.score is None for s in scores) + sum(p.winner is None for p in pairs)
    return {
        "schema": SCHEMA,
        "kind": "judge",
        "level": level,
        "planned": planned,
        "judgments": len(judgments),
        "unparsed": unread,
        "scores": as_json(percents(scores, level)),
        "pairs": as_json(wins(pairs, level)),
        "position_bias": as_json([*bias_of_scores(scores, level), *bias_of_pairs(pairs, level)]),
    }


def report(
    judgments: Sequence[Judgment],
    planned: int,
    spent: Sequence[Answer],
    missing: dict[str, int],
    arguments: argparse.Namespace,
) -> None:
    """Shows the figures and writes them beside the judgments."""
    found = summary(judgments, planned, arguments.level)
    found["missing_replies"] = missing
    tokens = [
        sum(a.prompt_tokens or 0 for a in spent),
        sum(a.completion_tokens or 0 for a in spent),
    ]
    cut = sum(a.finish == "length" for a in spent)
    found["spent"] = {
        "requests": len(spent),
        "prompt_tokens": tokens[0],
        "completion_tokens": tokens[1],
        "cut_off": cut,
    }
    path = Path(arguments.summary or Path(arguments.output).with_suffix(".summary.json"))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", "utf-8")
    os.replace(temporary, path)
    _show(found, arguments)


def _show(found: dict[str, Any], arguments: argparse.Namespace) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    percent = f"{found['level']:.0%}"

    def table(title: str, *columns: str) -> Any:
        made = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        made.add_column("model", overflow="fold")
        for name in columns:
            made.add_column(name, justify="right", no_wrap=True)
        return made

    if found["scores"]:
        title = f"points as a percentage of {arguments.baseline}'s, judged by {arguments.judge}"
        shown = table(title, "percent", percent, "shown 1st", "shown 2nd", "questions", "unparsed")
        for row in found["scores"]:
            interval = _interval(row["low"], row["high"], ".1f")
            numbers = [_number(row[n], ".1f") for n in ("first", "second")]
            shown.add_row(
                Text(row["model"]), _number(row["percent"], ".1f"), interval, *numbers,
                str(row["questions"]), f"{row['unparsed']} of {row['judgments']}",
            )  # fmt: skip
        console.print(shown)
    if found["pairs"]:
        shown = table(f"pairs, judged by {arguments.judge}", "against", "won/tied/lost", "share",
                      percent, "unparsed")  # fmt: skip
        for row in found["pairs"]:
            count = "/".join(str(row[n]) for n in ("wins", "ties", "losses"))
            shown.add_row(
                Text(row["model"]), Text(row["other"]), count, _number(row["share"], ".2f"),
                _interval(row["low"], row["high"], ".2f"), str(row["unparsed"]),
            )  # fmt: skip
        console.print(shown)
    for line in _words(found, arguments):
        console.print(line, markup=False)


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _interval(low: float | None, high: float | None, form: str) -> str:
    return "–" if low is None or high is None else f"{low:{form}} … {high:{form}}"


def _words(found: dict[str, Any], arguments: argparse.Namespace) -> list[str]:
    lines = []
    for row in found["position_bias"]:
        what = "points" if row["kind"] == "score" else "of verdicts"
        lines.append(
            f"position bias ({row['kind']}s): the reply shown first gets {row['value']:+.2f} "
            f"{what} ({_interval(row['low'], row['high'], '+.2f')}); {row['consistent']:.0%} of "
            f"{row['items']} are judged alike in both orders"
        )
    if found["unparsed"]:
        lines.append(
            f"{found['unparsed']} of {found['judgments']} answers held no verdict; they are in the "
            "file as null, with the judge's words"
        )
    for model, count in found["missing_replies"].items():
        lines.append(f"{model} has no reply to {count} questions, which are left out for it")
    spent = found["spent"]
    if spent["cut_off"]:
        lines.append(f"{spent['cut_off']} answers were cut off at --max_tokens")
    if spent["requests"]:
        money = ""
        if arguments.price_in is not None or arguments.price_out is not None:
            paid = spent["prompt_tokens"] * (arguments.price_in or 0)
            paid += spent["completion_tokens"] * (arguments.price_out or 0)
            money = f", {paid / 1e6:.2f} in money"
        lines.append(
            f"{spent['requests']} answers came, {spent['prompt_tokens']:,} tokens in and "
            f"{spent['completion_tokens']:,} out as the endpoint counts{money}"
        )
    return lines
