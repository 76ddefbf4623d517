"""What the votes say: who wins, whether people can tell, and how sure that is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ..evaluate.records import Pair
from ..finetune.errors import BadInput
from ..statistics import Interval, bootstrap_interval, mean_interval, proportion_interval
from .store import Vote

__all__ = ["as_judgments", "summarize", "table"]

SCHEMA = 1


def as_judgments(votes: Sequence[Vote]) -> Iterator[Pair]:
    """The votes as ``qlora elo`` reads them; the models of a pair in alphabetical order, the rater
    as judge."""
    for vote in votes:
        a, b = sorted((vote.left, vote.right))
        order = 0 if vote.left == a else 1
        if vote.better == "tie":
            winner = "tie"
        else:
            won = vote.left if vote.better == "left" else vote.right
            winner = "model_a" if won == a else "model_b"
        raw = vote.better if vote.guess is None else f"{vote.better}; {vote.asked}: {vote.guess}"
        yield Pair(vote.question_id, a, b, winner, vote.rater, order, vote.category, raw=raw)


def _interval(interval: Interval) -> list[float] | None:
    return None if np.isnan(interval.low) else [float(interval.low), float(interval.high)]


def _share(points: Sequence[tuple[Any, float]]) -> dict[str, Any]:
    """A share of points with an interval. Votes on one question are not independent of each other,
    so whole questions are resampled."""
    groups: dict[Any, list[float]] = {}
    for question, point in points:
        groups.setdefault(question, []).append(point)
    values = [p for _, p in points]
    sums = [float(sum(g)) for g in groups.values()]
    sizes = [len(g) for g in groups.values()]
    if len(set(sizes)) == 1:
        interval = mean_interval(np.array(sums) / sizes[0])
    else:
        # The same seed resamples both rows alike; their ratio is the share.
        both = np.array(sums) + 1j * np.array(sizes)
        interval = _ratio_interval(both)
    clipped = Interval(*np.clip(interval, 0.0, 1.0))  # NaN stays
    return {"share": float(np.mean(values)), "interval": _interval(clipped), "votes": len(values)}


def _ratio_interval(both: np.ndarray) -> Interval:
    numbers = np.arange(both.size, dtype=float)

    def ratio(rows: np.ndarray, axis: int) -> np.ndarray:
        total = both[rows.astype(int)].sum(axis)
        return total.real / total.imag

    return bootstrap_interval(numbers, ratio)


def _proportion(successes: int, n: int) -> dict[str, Any]:
    if n == 0:
        return {"share": None, "interval": None, "votes": 0}
    return {
        "share": successes / n,
        "interval": _interval(proportion_interval(successes, n)),
        "votes": n,
    }


def summarize(votes: Sequence[Vote]) -> dict[str, Any]:
    """Everything that ``qlora arena report`` says, as JSON has it.

    A win counts 1, a tie one half. Intervals are of 95 %: of shares of wins by resampling
    questions, of guesses by Wilson's formula.

    Raises:
        BadInput: there are no votes.
    """
    if not votes:
        raise BadInput("there are no votes yet")
    points: dict[str, list[tuple[Any, float]]] = {}
    counts: dict[str, Counter[str]] = {}
    pairs: dict[tuple[str, str], list[tuple[Any, float]]] = {}
    for pair in as_judgments(votes):
        a = {"model_a": 1.0, "model_b": 0.0}.get(str(pair.winner), 0.5)
        for model, point in ((pair.model_a, a), (pair.model_b, 1 - a)):
            points.setdefault(model, []).append((pair.question_id, point))
            word = {1.0: "wins", 0.0: "losses"}.get(point, "ties")
            counts.setdefault(model, Counter())[word] += 1
        pairs.setdefault((pair.model_a, pair.model_b), []).append((pair.question_id, a))
    models = [
        {"model": m, **{w: counts[m][w] for w in ("wins", "ties", "losses")}, **_share(p)}
        for m, p in points.items()
    ]
    models.sort(key=lambda row: (-row["share"], row["model"]))
    decided = [v for v in votes if v.better != "tie"]
    return {
        "schema": SCHEMA,
        "kind": "arena report",
        "votes": len(votes),
        "raters": len({v.rater for v in votes}),
        "questions": len({v.question_id for v in votes}),
        "models": models,
        "pairs": [{"model_a": a, "model_b": b, **_share(p)} for (a, b), p in sorted(pairs.items())],
        "left": _proportion(sum(v.better == "left" for v in decided), len(decided)),
        "telling": _telling(votes),
    }


def _telling(votes: Sequence[Vote]) -> list[dict[str, Any]]:
    """Whether people can tell a model's reply from another's: a row for each model asked for.

    Of pairs that hold its reply, those votes count that name one of the two; guessing gives half.
    """
    rows = []
    for target in sorted({v.asked for v in votes if v.asked is not None}):
        asked = [v for v in votes if v.asked == target and v.guess is not None]
        within = [v for v in asked if target in (v.left, v.right)]
        named = [v for v in within if v.guess in ("left", "right")]
        right = sum((v.left if v.guess == "left" else v.right) == target for v in named)
        row = {
            "model": target,
            **_proportion(right, len(named)),
            "said_neither": sum(v.guess == "neither" for v in within),
            "said_unsure": sum(v.guess == "unsure" for v in within),
            "false_alarms": _proportion(
                sum(v.guess in ("left", "right") for v in asked if target not in (v.left, v.right)),
                sum(target not in (v.left, v.right) for v in asked),
            ),
        }
        low, high = row["interval"] or (0.0, 1.0)
        row["verdict"] = (
            "people can tell" if low > 0.5 else "people mistake it" if high < 0.5 else "not shown"
        )
        rows.append(row)
    return rows


def _shown(row: dict[str, Any]) -> tuple[str, str]:
    share = "–" if row["share"] is None else f"{100 * row['share']:.1f} %"
    if row["interval"] is None:
        return share, "–"
    return share, f"{100 * row['interval'][0]:.1f} to {100 * row['interval'][1]:.1f}"


def table(summary: dict[str, Any]) -> list[Any]:
    """The summary for people, as rich renders it."""
    from rich.table import Table

    parts: list[Any] = [
        f"{summary['votes']} votes of {summary['raters']} raters, {summary['questions']} questions"
    ]
    models = Table(title="who wins", title_justify="left")
    for name in ("model", "wins", "ties", "losses", "share", "95 %"):
        models.add_column(name, justify="left" if name == "model" else "right")
    for row in summary["models"]:
        counts = (str(row[word]) for word in ("wins", "ties", "losses"))
        models.add_row(row["model"], *counts, *_shown(row))
    parts.append(models)
    if len(summary["pairs"]) > 1:
        pairs = Table(title="pair by pair", title_justify="left")
        for name in ("first", "second", "votes", "first's share", "95 %"):
            pairs.add_column(name, justify="left" if name in ("first", "second") else "right")
        for row in summary["pairs"]:
            pairs.add_row(row["model_a"], row["model_b"], str(row["votes"]), *_shown(row))
        parts.append(pairs)
    share, interval = _shown(summary["left"])
    parts.append(f"the left reply won {share} of the votes that were no ties ({interval})")
    for row in summary["telling"]:
        share, interval = _shown(row)
        parts.append(
            f"which is {row['model']}'s: {share} right of {row['votes']} that named one "
            f"({interval}; guessing gives 50 %): {row['verdict']}; {row['said_unsure']} could not "
            f"tell, {row['said_neither']} said neither"
        )
    return parts
