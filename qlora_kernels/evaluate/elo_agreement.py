"""Whether judges agree: Fleiss' kappa over verdicts, Kendall's tau over rankings.

Both are given with an interval from a bootstrap over questions: what two judges say about one
question is not independent of what they say about it in the other order.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from ..statistics import Interval
from .elo_ratings import SCALE, Games, bradley_terry, resampled_wins, win_matrix
from .records import Pair

__all__ = ["Agreement", "fleiss_kappa", "kappa_of_pairs", "kendall_tau", "tau_of_judges"]

VERDICTS = ("model_a", "model_b", "tie")
_POINTS = {"model_a": 1.0, "tie": 0.5, "model_b": 0.0}
_PRIOR = 0.1  # ranks of a judge's few verdicts are wanted even where one model won them all


class Agreement(NamedTuple):
    """A coefficient, its interval, and how many items (verdicts, models) it rests on."""

    value: float
    interval: Interval
    items: int


def fleiss_kappa(counts: np.ndarray) -> float:
    """Fleiss' kappa: how far raters agree beyond what their habits alone would bring; 1 is always.

    Items may have different numbers of raters, as long as two: an item's agreement then counts once
    whatever its raters, a verdict's share is that of all verdicts. With equally many raters it is
    Fleiss' (1971) own.

    Args:
        counts: how many raters gave an item each verdict, ``[items, verdicts]``.

    Returns:
        NaN where all raters gave the same verdict always: chance alone would agree as well.

    Raises:
        ValueError: no items, or one with fewer than two raters.
    """
    counts = np.asarray(counts, np.float64)
    if counts.ndim != 2 or not len(counts) or (counts.sum(1) < 2).any():
        raise ValueError("kappa takes items that two raters and more have judged")
    raters = counts.sum(1)
    agreed = (counts * (counts - 1)).sum(1) / (raters * (raters - 1))
    return float(_kappa(len(counts), agreed.sum(), counts.sum(0)))


def _kappa(items: Any, agreed: Any, verdicts: np.ndarray) -> Any:
    """Of sums over items: their number ``[...]``, agreement ``[...]``, verdicts ``[..., v]``."""
    chance = ((verdicts / verdicts.sum(-1, keepdims=True)) ** 2).sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(chance < 1 - 1e-12, (agreed / items - chance) / (1 - chance), np.nan)


def kappa_of_pairs(
    pairs: Sequence[Pair], level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Agreement | None:
    """Fleiss' kappa over the verdicts of pairs; None where no two judges saw the same pair.

    An item is a question and two models. A judge who saw it in both orders counts once: with a
    verdict that changes with the order, as a tie.
    """
    said: dict[tuple[Any, ...], dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for pair in pairs:
        p = pair if pair.model_a < pair.model_b else pair.flipped()
        if p.winner is not None:
            said[str(p.question_id), p.model_a, p.model_b][p.judge].add(p.winner)
    items = {key: judges for key, judges in said.items() if len(judges) > 1}
    if not items:
        return None
    counts = np.zeros((len(items), len(VERDICTS)))
    questions: dict[str, int] = {}
    of = np.empty(len(items), np.int64)
    for i, (key, judges) in enumerate(items.items()):
        of[i] = questions.setdefault(key[0], len(questions))
        for verdicts in judges.values():
            counts[i, VERDICTS.index(next(iter(verdicts)) if len(verdicts) == 1 else "tie")] += 1
    raters = counts.sum(1)
    agreed = (counts * (counts - 1)).sum(1) / (raters * (raters - 1))
    sums = np.zeros((len(questions), 2 + len(VERDICTS)))
    np.add.at(sums, of, np.column_stack([np.ones(len(items)), agreed, counts]))
    drawn = _times(len(questions), resamples, seed) @ sums
    found = _kappa(drawn[:, 0], drawn[:, 1], drawn[:, 2:])
    return Agreement(fleiss_kappa(counts), _interval(found, level, len(questions)), len(items))


def _times(questions: int, resamples: int, seed: int) -> np.ndarray:
    """How often each question is drawn in each resample: ``[resamples, questions]``."""
    generator = np.random.default_rng(seed)
    drawn = generator.integers(0, questions, (resamples, questions))
    drawn += np.arange(resamples)[:, None] * questions
    return np.bincount(drawn.ravel(), minlength=resamples * questions).reshape(resamples, -1)


def _interval(found: np.ndarray, level: float, questions: int) -> Interval:
    found = found[np.isfinite(found)]
    if questions < 2 or not len(found):
        return Interval(float("nan"), float("nan"))
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def kendall_tau(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Kendall's tau-b of the rows of two arrays ``[..., n]``: 1 the same order, -1 the reverse.

    NaN where a row is constant.
    """
    upper = np.triu_indices(np.shape(a)[-1], 1)
    x = np.sign(a[..., upper[0]] - a[..., upper[1]])
    y = np.sign(b[..., upper[0]] - b[..., upper[1]])
    with np.errstate(invalid="ignore", divide="ignore"):
        return (x * y).sum(-1) / np.sqrt((x * x).sum(-1) * (y * y).sum(-1))


def tau_of_judges(
    pairs: Sequence[Pair], level: float = 0.95, resamples: int = 1000, seed: int = 0, most: int = 6
) -> dict[tuple[str, str], Agreement]:
    """Kendall's tau between the ladders of each two judges, over the models that both have judged.

    A judge's ladder is Bradley-Terry's on their verdicts alone (with a slight pull to the middle,
    so that it exists). Of many judges the ``most`` with the most verdicts are compared.
    """
    verdicts: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        if pair.winner is not None:
            verdicts[pair.judge].append(pair)
    judges = sorted(verdicts, key=lambda j: (-len(verdicts[j]), j))[:most]
    found = {}
    for one, other in combinations(judges, 2):
        models = [
            {m for p in verdicts[judge] for m in (p.model_a, p.model_b)} for judge in (one, other)
        ]
        shared = sorted(models[0] & models[1])
        if len(shared) < 3:
            continue
        games = [_games(verdicts[judge], shared, verdicts) for judge in (one, other)]
        if not all(map(len, games)):
            continue
        ladders = [bradley_terry(win_matrix(g), _PRIOR) * SCALE for g in games]
        # The same questions are drawn for both.
        drawn = [
            np.round(bradley_terry(resampled_wins(g, resamples, seed), _PRIOR) * SCALE, 6)
            for g in games
        ]
        value = float(kendall_tau(*(np.round(x, 6) for x in ladders)))
        interval = _interval(kendall_tau(*drawn), level, games[0].questions)
        found[one, other] = Agreement(value, interval, len(shared))
    return found


def _games(pairs: list[Pair], models: list[str], every: dict[str, list[Pair]]) -> Games:
    """A judge's games between ``models``; questions are numbered alike for all judges."""
    number: dict[str, int] = {}
    for judged in every.values():
        for pair in judged:
            number.setdefault(str(pair.question_id), len(number))
    kept = [p for p in pairs if p.model_a in models and p.model_b in models]
    index = {name: i for i, name in enumerate(models)}
    return Games(
        tuple(models),
        np.array([index[p.model_a] for p in kept], np.int64),
        np.array([index[p.model_b] for p in kept], np.int64),
        np.array([_POINTS[p.winner or "tie"] for p in kept]),
        np.array([number[str(p.question_id)] for p in kept], np.int64),
        len(number),
    )
