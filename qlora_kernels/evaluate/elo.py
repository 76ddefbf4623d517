"""``qlora elo``: ratings from judgments, with intervals, the judges' agreement, and a ladder."""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..finetune.errors import BadInput, RunError
from .elo_agreement import kappa_of_pairs, tau_of_judges
from .elo_ratings import SCALE, Games, beats, bradley_terry, elo, resampled_wins, win_matrix
from .elo_read import read_pairs
from .judge_statistics import as_json, bias_of_pairs
from .records import Pair

__all__ = ["SCHEMA", "add_arguments", "ladder", "run"]

SCHEMA = 1
PRIOR = 1.0
"""Games that each model is taken to have tied with an average one, where ratings would else be
infinite."""

_POINTS = {"model_a": 1.0, "tie": 0.5, "model_b": 0.0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``qlora elo``."""
    add = parser.add_argument
    add("judgments", nargs="+", help="files of judgments: ours, FastChat's, Chatbot Arena's (docs)")
    add("--output", help="JSON file for everything that is shown")
    add("--plot", help="PNG file for the ladder")
    add("--judge", action="append", help="only judgments of this judge (again for several)")
    add("--group", action="append", metavar="NAME=PATTERN",
        help="for Kendall's tau, take judges that match as one, as people='rater-*'")  # fmt: skip
    add("--orders", type=int, default=10_000, help="random orders for Elo [%(default)s]")
    add("--start", type=float, default=1000.0, help="Elo before the first game [%(default)s]")
    add("--k", type=float, default=32.0, help="the most that a game moves Elo [%(default)s]")
    add("--resamples", type=int, default=1000, help="of the questions, for intervals [%(default)s]")
    add("--level", type=float, default=0.95, help="of the intervals [%(default)s]")
    add("--seed", type=int, default=0, help="of orders and resamples [%(default)s]")


def run(arguments: argparse.Namespace) -> int:
    """Runs ``qlora elo``; returns the exit code."""
    if arguments.orders < 1:
        raise BadInput(f"orders is {arguments.orders}; it must be above 0")
    if arguments.resamples < 2:
        raise BadInput(f"resamples is {arguments.resamples}; it must be at least 2")
    if not 0 < arguments.level < 1:
        raise BadInput(f"level is {arguments.level}; it must be between 0 and 1, as 0.95")
    if not arguments.k > 0:
        raise BadInput(f"k is {arguments.k}; it must be above 0")
    groups = _groups(arguments.group or [])
    for name in ("output", "plot"):
        path = getattr(arguments, name)
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise BadInput(f"the folder of --{name} {path} does not exist")
    pairs, notes = read_pairs(*arguments.judgments)
    if arguments.judge:
        known = {p.judge for p in pairs}
        for judge in arguments.judge:
            if judge not in known:
                raise BadInput(f"no judgment is by {judge}; there are {', '.join(sorted(known))}")
        pairs = [p for p in pairs if p.judge in arguments.judge]
    found = ladder(
        pairs,
        orders=arguments.orders,
        start=arguments.start,
        k=arguments.k,
        resamples=arguments.resamples,
        level=arguments.level,
        seed=arguments.seed,
        groups=groups,
    )
    found["notes"] = notes + found["notes"]
    _show(found)
    if arguments.output:
        _write(
            Path(arguments.output), json.dumps(found, indent=1, allow_nan=False).encode() + b"\n"
        )
    if arguments.plot:
        from .elo_plot import draw

        _write(Path(arguments.plot), draw(found))
    return 0


def _groups(words: Sequence[str]) -> dict[str, str]:
    groups = {}
    for word in words:
        name, sign, pattern = word.partition("=")
        if not (name and sign and pattern):
            raise BadInput(f"--group {word}: expected NAME=PATTERN, as people='rater-*'")
        groups[name] = pattern
    return groups


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def ladder(
    pairs: Sequence[Pair],
    *,
    orders: int = 10_000,
    start: float = 1000.0,
    k: float = 32.0,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    groups: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Everything that ``qlora elo`` says of judgments, as its JSON has it (docs/elo.md).

    Raises:
        BadInput: no verdict among the judgments.
    """
    read = [p for p in pairs if p.winner is not None]
    if not read:
        raise BadInput(f"none of the {len(pairs)} judgments holds a verdict")
    games = Games.of(
        [(p.model_a, p.model_b, _POINTS[p.winner or ""], str(p.question_id)) for p in read]
    )
    notes: list[str] = []
    strengths, drawn, open_high, open_low = _bradley_terry(games, resamples, seed, notes)
    tail = (1 - level) / 2
    played = elo(games, orders, seed, start, k)
    low, high = np.quantile(drawn, [tail, 1 - tail], axis=0)
    elo_low, elo_high = np.quantile(played, [tail, 1 - tail], axis=0)
    ranks = 1 + (drawn[:, None, :] > drawn[:, :, None] + 1e-9).sum(2)
    rank_low, rank_high = np.quantile(ranks, [tail, 1 - tail], axis=0, method="nearest")
    counts = _counts(pairs)
    order = sorted(range(len(games.models)), key=lambda i: (-strengths[i], games.models[i]))
    from scipy.special import ndtri

    error = float(ndtri(1 - tail)) * played.std(0) / np.sqrt(orders)
    models = []
    for place, i in enumerate(order):
        name = games.models[i]
        below = order[place + 1] if place + 1 < len(order) else None
        models.append(
            {
                "model": name,
                "bt": round(float(strengths[i]), 2),
                "bt_low": None if open_low[i] > tail else round(float(low[i]), 2),
                "bt_high": None if open_high[i] > tail else round(float(high[i]), 2),
                "rank_low": int(rank_low[i]),
                "rank_high": int(rank_high[i]),
                "above_next": None
                if below is None
                else round(float((drawn[:, i] > drawn[:, below] + 1e-9).mean()), 4),
                "elo": round(float(played[:, i].mean()), 2),
                "elo_error": round(float(error[i]), 2),
                "elo_low": round(float(elo_low[i]), 2),
                "elo_high": round(float(elo_high[i]), 2),
                **counts[name],
            }
        )
    unread = len(pairs) - len(read)
    if unread:
        notes.append(
            f"{unread} of {len(pairs)} judgments hold no verdict: ratings are without them"
        )
    if games.questions < 20:
        notes.append(
            f"intervals over {games.questions} question{'s' * (games.questions != 1)} are rough, "
            "and too narrow"
        )
    return {
        "schema": SCHEMA,
        "kind": "ladder",
        "judgments": len(pairs),
        "unparsed": unread,
        "questions": games.questions,
        "judges": dict(Counter(p.judge for p in pairs).most_common()),
        "settings": {
            "start": start, "k": k, "orders": orders, "resamples": resamples, "level": level,
            "seed": seed,
        },
        "models": models,
        "agreement": _agreement(pairs, groups or {}, level, resamples, seed),
        "position_bias": as_json(bias_of_pairs(pairs, level)),
        "notes": notes,
    }  # fmt: skip


def _bradley_terry(
    games: Games, resamples: int, seed: int, notes: list[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Ratings ``[M]``, resampled ones ``[resamples, M]``, and the share of the resamples in which
    a model has no upper, no lower bound ``[M]``. What was done about it goes into ``notes``."""
    wins = win_matrix(games)
    reach = beats(wins)
    _explain(games.models, wins, reach, notes)
    whole = bool(reach.all())
    drawn = resampled_wins(games, resamples, seed)
    reaches = beats(drawn)
    bounded = reaches.all((1, 2))
    if whole and not bounded.all():
        notes.append(
            f"in {(~bounded).mean():.1%} of the resamples a model won or lost everything, or was "
            f"not drawn; there {PRIOR:g} tie of each with an average model keeps ratings finite"
        )
    one_way = reaches & ~reaches.transpose(0, 2, 1)
    strengths = bradley_terry(wins, 0.0 if whole else PRIOR)
    fits = bradley_terry(drawn, np.where(bounded, 0.0, PRIOR))
    return (
        1000 + SCALE * strengths,
        1000 + SCALE * fits,
        one_way.any(2).mean(0),
        one_way.any(1).mean(0),
    )


def _explain(models: Sequence[str], wins: np.ndarray, reach: np.ndarray, notes: list[str]) -> None:
    """What keeps the likelihood from having a maximum, in words."""
    if reach.all():
        return
    met = beats(wins + wins.T)
    groups = sorted({tuple(np.flatnonzero(row)) for row in met}, key=lambda g: (-len(g), g))
    if len(groups) > 1:
        named = "; ".join(", ".join(models[i] for i in group) for group in groups)
        notes.append(
            f"there are {len(groups)} groups of models that never met, whose ratings cannot be "
            f"compared with each other's: {named}"
        )
    above = reach & ~reach.T
    top = [models[i] for i in range(len(models)) if above[i].any() and not above[:, i].any()]
    bottom = [models[i] for i in range(len(models)) if above[:, i].any() and not above[i].any()]
    if top:
        notes.append(
            f"no win or tie of the others leads back to {', '.join(top)}: undefeated, so the "
            f"rating has no upper bound, nor that of {', '.join(bottom)} a lower one"
        )
    notes.append(
        f"Bradley-Terry's ratings would be infinite; each model is given {PRIOR:g} tie with an "
        "average one, so that they are finite and lean to the middle"
    )


def _counts(pairs: Sequence[Pair]) -> dict[str, dict[str, int]]:
    counts: dict[str, dict[str, int]] = {}
    for pair in pairs:
        for name in ("model_a", "model_b"):
            zero = {"games": 0, "wins": 0, "ties": 0, "losses": 0, "unparsed": 0}
            row = counts.setdefault(getattr(pair, name), zero)
            row["games"] += 1
            ends = {None: "unparsed", "tie": "ties", name: "wins"}
            row[ends.get(pair.winner, "losses")] += 1
    return counts


def _agreement(
    pairs: Sequence[Pair], groups: dict[str, str], level: float, resamples: int, seed: int
) -> dict[str, Any]:
    kappa = kappa_of_pairs(pairs, level, resamples, seed)

    def group(judge: str) -> str:
        return next((n for n, p in groups.items() if fnmatch.fnmatchcase(judge, p)), judge)

    taus = tau_of_judges(
        [replace(p, judge=group(p.judge)) for p in pairs] if groups else pairs,
        level,
        resamples,
        seed,
    )

    def row(a: Any) -> dict[str, Any]:
        numbers = {"value": a.value, "low": a.interval.low, "high": a.interval.high}
        finite = {n: round(v, 4) if np.isfinite(v) else None for n, v in numbers.items()}
        return {**finite, "items": a.items}

    return {
        "fleiss_kappa": None if kappa is None else row(kappa),
        "kendall_tau": [{"judges": list(judges), **row(a)} for judges, a in taus.items()],
    }


def _show(found: dict[str, Any]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    percent = f"{found['settings']['level']:.0%}"
    title = f"{found['judgments']} judgments of {found['questions']} questions"
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("")
    table.add_column("model", overflow="fold")
    for name in ("Bradley-Terry", percent, "rank", "Elo", "won/tied/lost"):
        table.add_column(name, justify="right", no_wrap=True)
    for place, m in enumerate(found["models"], 1):
        low = "-inf" if m["bt_low"] is None else f"{m['bt_low']:.0f}"
        high = "+inf" if m["bt_high"] is None else f"{m['bt_high']:.0f}"
        table.add_row(
            str(place),
            Text(m["model"]),
            f"{m['bt']:.0f}",
            f"{low} … {high}",
            f"{m['rank_low']}–{m['rank_high']}",
            f"{m['elo']:.0f}",
            "/".join(str(m[n]) for n in ("wins", "ties", "losses")),
        )
    console.print(table)
    for line in _words(found):
        console.print(line, markup=False)


def _words(found: dict[str, Any]) -> list[str]:
    def interval(row: dict[str, Any]) -> str:
        if row["low"] is None:
            return "no interval"
        return f"{row['low']:.2f} … {row['high']:.2f}"

    lines = []
    kappa = found["agreement"]["fleiss_kappa"]
    if kappa is not None and kappa["value"] is not None:
        lines.append(
            f"Fleiss' kappa over {kappa['items']} pairs of replies that several judged: "
            f"{kappa['value']:.2f} ({interval(kappa)})"
        )
    for row in found["agreement"]["kendall_tau"]:
        if row["value"] is not None:
            lines.append(
                f"Kendall's tau of {row['judges'][0]} and {row['judges'][1]} over {row['items']} "
                f"models: {row['value']:.2f} ({interval(row)})"
            )
    for row in sorted(found["position_bias"], key=lambda r: -r["items"])[:6]:
        lines.append(
            f"{row['judge']} favours the reply shown first by {row['value']:+.2f} of verdicts "
            f"({interval(row)}); {row['consistent']:.0%} of {row['items']} pairs are judged alike "
            "in both orders"
        )
    return lines + [f"note: {note}" for note in found["notes"]]
