"""What judgments say: points as a percentage of the baseline's, wins and ties, position bias.

Every interval is a bootstrap over questions: the judgments of one question (both orders, every
pair) are drawn together, as they are not independent. Verdicts that could not be read are counted,
and their number stands beside every figure that is made without them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..statistics import Interval, bootstrap_interval
from .records import Pair, Score

__all__ = ["Bias", "Percent", "Wins", "bias_of_pairs", "bias_of_scores", "percents", "wins"]

_POINTS = {"model_a": 1.0, "tie": 0.5, "model_b": 0.0}


def _ratio_interval(above: Sequence[float], below: Sequence[float], level: float) -> Interval:
    """Of ``sum(above) / sum(below)``, an entry of each a question."""
    a, b = np.asarray(above, np.float64), np.asarray(below, np.float64)

    def ratio(drawn: np.ndarray, axis: int) -> np.ndarray:
        index = drawn.astype(np.intp)
        with np.errstate(invalid="ignore", divide="ignore"):
            return a[index].sum(axis) / b[index].sum(axis)

    return bootstrap_interval(np.arange(len(a)), ratio, level)


def _by_question(rows: Iterable[tuple[Any, float, float]]) -> tuple[list[float], list[float]]:
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for question, above, below in rows:
        sums[str(question)][0] += above
        sums[str(question)][1] += below
    return [a for a, _ in sums.values()], [b for _, b in sums.values()]


@dataclass(frozen=True)
class Percent:
    """A model's points as a percentage of the baseline's, over the questions scored in both orders.

    Attributes:
        percent, low, high: None without any such question (low and high: fewer than two).
        first, second: the percentage where the model was shown first, and second.
        questions: how many it rests on.
        half: questions left out because only one order's verdict could be read.
        judgments, unparsed: all that there are, and those without a verdict.
    """

    model: str
    baseline: str
    judge: str
    percent: float | None
    low: float | None
    high: float | None
    first: float | None
    second: float | None
    questions: int
    half: int
    judgments: int
    unparsed: int


def percents(scores: Sequence[Score], level: float = 0.95) -> list[Percent]:
    """One a model, baseline and judge, the best first."""
    groups: dict[tuple[str, str, str], list[Score]] = defaultdict(list)
    for score in scores:
        groups[score.model, score.baseline, score.judge].append(score)
    found = []
    for (model, baseline, judge), group in groups.items():
        by_question: dict[str, dict[int, Score]] = defaultdict(dict)
        for s in group:
            if s.score is not None:
                by_question[str(s.question_id)][s.order] = s
        whole = [q for q in by_question.values() if len(q) == 2]
        both = [s for q in whole for s in q.values()]
        above, below = _by_question(
            (s.question_id, s.score or 0, s.baseline_score or 0) for s in both
        )
        interval = _ratio_interval(above, below, level) if above else Interval(np.nan, np.nan)
        found.append(
            Percent(
                model,
                baseline,
                judge,
                _percent(both),
                _or_none(100 * interval.low),
                _or_none(100 * interval.high),
                _percent([s for s in both if s.order == 0]),
                _percent([s for s in both if s.order == 1]),
                len(whole),
                len(by_question) - len(whole),
                len(group),
                sum(s.score is None for s in group),
            )
        )
    return sorted(found, key=lambda p: (p.judge, -(p.percent or 0), p.model))


def _percent(scores: Sequence[Score]) -> float | None:
    below = sum(s.baseline_score or 0 for s in scores)
    return None if not below else 100 * sum(s.score or 0 for s in scores) / below


def _or_none(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


@dataclass(frozen=True)
class Wins:
    """One model against another: wins, ties and losses of ``model``, and its share of the points
    (a tie is half a win), with an interval."""

    model: str
    other: str
    judge: str
    wins: int
    ties: int
    losses: int
    unparsed: int
    share: float | None
    low: float | None
    high: float | None


def wins(pairs: Sequence[Pair], level: float = 0.95) -> list[Wins]:
    """One a pair of models and judge."""
    groups: dict[tuple[str, str, str], list[Pair]] = defaultdict(list)
    for pair in pairs:
        p = pair if pair.model_a < pair.model_b else pair.flipped()
        groups[p.model_a, p.model_b, p.judge].append(p)
    found = []
    for (model, other, judge), group in sorted(groups.items()):
        read = [p for p in group if p.winner is not None]
        above, below = _by_question((p.question_id, _POINTS[p.winner or ""], 1) for p in read)
        interval = _ratio_interval(above, below, level) if read else Interval(np.nan, np.nan)
        won, tied, lost = (sum(p.winner == w for p in read) for w in ("model_a", "tie", "model_b"))
        share = sum(above) / len(read) if read else None
        low, high = _or_none(interval.low), _or_none(interval.high)
        unread = len(group) - len(read)
        found.append(Wins(model, other, judge, won, tied, lost, unread, share, low, high))
    return found


@dataclass(frozen=True)
class Bias:
    """How far a judge favours the place, over the verdicts that were read in both orders.

    Attributes:
        kind: "pair": the share of verdicts for the reply shown first less that for the second, -1
            to 1; "score": the points of the first less those of the second, -10 to 10.
        value, low, high: 0 is no bias; each is None where there is nothing to tell it by.
        consistent: the share of pairs with the same verdict in both orders.
        items: pairs of replies that were judged in both orders.
        one_sided: pairs whose verdict was read in one order only, left out.
    """

    judge: str
    kind: str
    value: float | None
    low: float | None
    high: float | None
    consistent: float | None
    items: int
    one_sided: int


_Items = dict[Any, dict[int, tuple[float, Any]]]
"""Key (the question first) to order to (gain of the reply shown first, verdict)."""


def _bias(judge: str, kind: str, items: _Items, level: float) -> Bias:
    whole = {key: orders for key, orders in items.items() if len(orders) == 2}
    gains = [(key[0], gain, 1.0) for key, orders in whole.items() for gain, _ in orders.values()]
    above, below = _by_question(gains)
    interval = _ratio_interval(above, below, level) if gains else Interval(np.nan, np.nan)
    same = [len({verdict for _, verdict in orders.values()}) == 1 for orders in whole.values()]
    return Bias(
        judge,
        kind,
        sum(above) / sum(below) if gains else None,
        _or_none(interval.low),
        _or_none(interval.high),
        sum(same) / len(same) if same else None,
        len(whole),
        len(items) - len(whole),
    )


def bias_of_pairs(pairs: Sequence[Pair], level: float = 0.95) -> list[Bias]:
    """One a judge who saw pairs in both orders."""
    judges: dict[str, _Items] = defaultdict(dict)
    for pair in pairs:
        p = pair if pair.model_a < pair.model_b else pair.flipped()
        if p.winner is not None:
            gain = 2 * _POINTS[p.winner] - 1
            item = judges[p.judge].setdefault((str(p.question_id), p.model_a, p.model_b), {})
            item[p.order] = (gain if p.order == 0 else -gain, p.winner)
    found = [_bias(judge, "pair", items, level) for judge, items in sorted(judges.items())]
    return [b for b in found if b.items]


def bias_of_scores(scores: Sequence[Score], level: float = 0.95) -> list[Bias]:
    """One a judge who scored in both orders; the verdict is who got more points."""
    judges: dict[str, _Items] = defaultdict(dict)
    for s in scores:
        if s.score is not None and s.baseline_score is not None:
            gain = s.score - s.baseline_score
            item = judges[s.judge].setdefault((str(s.question_id), s.model, s.baseline), {})
            item[s.order] = (gain if s.order == 0 else -gain, float(np.sign(gain)))
    found = [_bias(judge, "score", items, level) for judge, items in sorted(judges.items())]
    return [b for b in found if b.items]


def as_json(rows: Sequence[Percent | Wins | Bias]) -> list[dict[str, Any]]:
    """Rows as JSON has them."""
    return [asdict(row) for row in rows]
