"""What a sweep's results say about its question, with intervals, or why they say nothing.

Two finetuned models are compared on the same held-out samples, seed by seed: ``d[s, i]`` is by how
much the first is better than the second with seed ``s`` on sample ``i``. The mean of ``d`` is
uncertain for two reasons, the samples that happen to be held out and the seeds that happen to be
drawn (the order of training, the start of the adapter, the subset). Each gives an interval, and
their half-widths are added as squares, as variances of independent causes add. What both share is
then counted twice: the intervals are a little too wide rather than too narrow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

import numpy as np

from ..statistics import detectable_difference, mean_interval
from .questions import CHAT, QUALITY
from .results import Measured, Result

__all__ = ["Answer", "Comparison", "answer", "compare", "crossed_interval"]

CONTROL_LEVEL = 0.99
"""Of the twins' interval: sets that are equal miss a 95% interval once in twenty sweeps."""


@dataclass(frozen=True)
class Comparison:
    """By how much ``a`` is better than ``b``; positive is better, in nats a token or as a share.

    Attributes:
        detectable: the smallest true difference that would have been found four times in five, by
            a 95% interval.
    """

    a: str
    b: str
    evaluation: str
    difference: float
    low: float
    high: float
    detectable: float
    seeds: int
    samples: int

    @property
    def better(self) -> bool:
        return self.low > 0

    @property
    def worse(self) -> bool:
        return self.high < 0

    def words(self) -> str:
        return (
            f"{self.a} against {self.b} on {self.evaluation}: {self.difference:+.4f} "
            f"[{self.low:+.4f}, {self.high:+.4f}], smallest detectable {self.detectable:.4f} "
            f"({self.seeds} seeds, {self.samples} samples)"
        )


@dataclass(frozen=True)
class Control:
    """A comparison whose outcome is known beforehand."""

    name: str
    passed: bool
    comparison: Comparison


@dataclass
class Answer:
    """What is said about a question.

    Attributes:
        conclusion: a sentence; empty where none may be drawn.
        why_not: the reason for that.
    """

    question: str
    comparisons: list[Comparison] = field(default_factory=list)
    controls: list[Control] = field(default_factory=list)
    conclusion: str = ""
    why_not: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def crossed_interval(
    differences: np.ndarray, level: float = 0.95
) -> tuple[float, float, float, float]:
    """Mean, interval and smallest detectable difference of ``differences`` ``[seeds, samples]``.

    With one seed, the interval is that over samples alone; with one sample, that over seeds.
    """
    mean = float(differences.mean())
    below = above = found = 0.0
    for axis in (0, 1):  # over samples, with the mean of the seeds; then over seeds
        values = differences.mean(axis)
        if values.size < 2:
            continue
        low, high = mean_interval(values, level)
        below, above = np.hypot(below, mean - low), np.hypot(above, high - mean)
        found = np.hypot(found, _detectable(values))
    if differences.size < 2:
        return mean, float("nan"), float("nan"), float("inf")
    return mean, float(mean - below), float(mean + above), float(found)


def _detectable(values: np.ndarray) -> float:
    """``detectable_difference(values)``: a multiple of the standard error that their number alone
    decides, worked out once a number (half a second each, and a report has hundreds)."""
    return _multiple(values.size) * float(values.std(ddof=1)) / float(np.sqrt(values.size))


@cache
def _multiple(count: int) -> float:
    values = np.arange(count, dtype=np.float64)
    return detectable_difference(values) * float(np.sqrt(count)) / float(values.std(ddof=1))


def by_set(results: Sequence[Result], evaluation: str) -> dict[str, dict[int, Measured]]:
    """Data set -> seed -> what was measured; of results that vary in more than that, the last."""
    found: dict[str, dict[int, Measured]] = {}
    for result in results:
        seeds = found.setdefault(result.data.get("name", ""), {})
        seeds[int(result.point.get("seed", 0))] = result.measured[evaluation]
    return found


def compare(
    a: tuple[str, Mapping[int, Measured]],
    b: tuple[str, Mapping[int, Measured]] | None,
    evaluation: str,
    level: float = 0.95,
) -> Comparison | None:
    """``a`` against ``b`` (against the model before finetuning if None); None without a common
    seed."""
    name, first = a
    other, second = b if b is not None else ("the base model", {})
    seeds = sorted(set(first) & set(second)) if b is not None else sorted(first)
    if not seeds:
        return None
    rows = []
    for seed in seeds:
        sign = -1.0 if first[seed].kind == "loss" else 1.0
        against = second[seed].values if b is not None else first[seed].base
        rows.append(sign * (first[seed].values - against))
    differences = np.stack(rows)
    mean, low, high, found = crossed_interval(differences, level)
    return Comparison(name, other, evaluation, mean, low, high, found, *differences.shape)


# --- the questions ------------------------------------------------------------------------------


def answer(question: str, results: Sequence[Result]) -> Answer:
    """The answer to one of :data:`.questions.QUESTIONS`."""
    return (_quality if question == QUALITY else _chat)(results)


class _Missing(Exception):
    pass


def _against(
    sets: Mapping[str, Mapping[int, Measured]],
    a: str,
    b: str | None,
    evaluation: str,
    level: float = 0.95,
) -> Comparison:
    for name in (a, b):
        if name is not None and name not in sets:
            raise _Missing(f"no finetune on {name} finished")
    found = compare((a, sets[a]), None if b is None else (b, sets[b]), evaluation, level)
    if found is None:
        raise _Missing(f"{a} and {b} have no seed in common that finished")
    return found


def _controls(sets: Any, clean: str, evaluation: str) -> list[Control]:
    twin = _against(sets, clean, f"{clean}-again", evaluation, CONTROL_LEVEL)
    shuffled = _against(sets, clean, f"{clean}-shuffled", evaluation)
    return [
        Control("equal sets under two names tie", not (twin.better or twin.worse), twin),
        Control("shuffled replies lose", shuffled.better, shuffled),
    ]


def _settle(found: Answer) -> bool:
    """Whether a conclusion may be drawn; says why not otherwise."""
    failed = [c for c in found.controls if not c.passed]
    if any(c.seeds < 2 for c in found.comparisons):
        found.why_not = "fewer than two seeds finished, so the luck of training is not seen"
    elif failed:
        words = (f"{c.name} ({c.comparison.words()})" for c in failed)
        found.why_not = (
            f"a control failed: {'; '.join(words)}. Train longer or on more seeds, and look at "
            "the data"
        )
    return not found.why_not


def _quality(results: Sequence[Result]) -> Answer:
    found = Answer(QUALITY)
    name = "held-out"
    sets = by_set(results, name) if results else {}
    try:
        found.controls = _controls(sets, "large", name)
        main = _against(sets, "small", "large-noise", name)
        found.comparisons = [
            main,
            _against(sets, "large", "small", name),
            _against(sets, "large", "large-noise", name),
            _against(sets, "half", "large-half-noise", name),
            _against(sets, "large", None, name),
        ]
    except _Missing as error:
        found.why_not = str(error)
        return found
    if _settle(found):
        found.conclusion = _quality_words(main, found.comparisons[1])
    return found


def _quality_words(main: Comparison, more: Comparison) -> str:
    size = f"{abs(main.difference):.4f} nats a token [{main.low:+.4f}, {main.high:+.4f}]"
    if main.better:
        said = f"Quality beats quantity here: the small clean set is better than the large set that holds the same samples and noise, by {size}"  # noqa: E501
    elif main.worse:
        said = f"Quantity beats quality here: the large set with noise is better than its small clean part, by {size}"  # noqa: E501
    else:
        return (
            f"No difference is seen between the small clean set and the large one with noise: "
            f"{main.difference:+.4f} [{main.low:+.4f}, {main.high:+.4f}]; one of "
            f"{main.detectable:.4f} would have been found four times in five."
        )
    if more.better:
        rest = f"four times the clean samples help as well, by {more.difference:.4f}"
    elif more.worse:
        rest = f"four times the clean samples do harm, by {-more.difference:.4f}"
    else:
        rest = "four times the clean samples make no difference that could be seen"
    return f"{said}; {rest} [{more.low:+.4f}, {more.high:+.4f}]."


def _chat(results: Sequence[Result]) -> Answer:
    found = Answer(CHAT)
    sets = {name: by_set(results, name) if results else {} for name in ("chat", "knowledge")}
    trained = [n for n in ("chat", "knowledge", "both") if n in sets["chat"]]
    try:
        found.controls = _controls(sets["chat"], "chat", "chat")
        found.comparisons = [
            _against(sets["chat"], "chat", "knowledge", "chat"),
            _against(sets["knowledge"], "chat", "knowledge", "knowledge"),
            *(_against(sets[e], name, None, e) for name in trained for e in ("chat", "knowledge")),
        ]
    except _Missing as error:
        found.why_not = str(error)
        return found
    if _settle(found):
        best = max(trained, key=lambda name: _gain(found, name, "chat").difference)
        found.conclusion = _chat_words(best, _gain(found, best, "knowledge"), found.comparisons)
    return found


def _gain(found: Answer, name: str, evaluation: str) -> Comparison:
    return next(
        c
        for c in found.comparisons
        if c.a == name and c.b == "the base model" and c.evaluation == evaluation
    )


def _chat_words(best: str, gain: Comparison, comparisons: Sequence[Comparison]) -> str:
    size = f"{gain.difference:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}]"
    head = f"Of the sets, {best} helps most at chat; at knowledge it"
    if gain.better:
        said = f"{head} helps too ({size} over the base model)"
    elif gain.worse:
        said = f"{head} does harm ({size} against the base model)"
    else:
        said = (
            f"{head} makes no difference that could be seen ({size}; one of {gain.detectable:.4f} "
            "would have been found four times in five)"
        )
    chat, knowledge = comparisons[:2]
    if chat.better and knowledge.worse:
        return f"{said}. Each set is the better one at its own: chat and knowledge are two things."
    if chat.better and knowledge.better:
        return f"{said}. The chat set is the better one at both."
    if chat.worse and knowledge.worse:
        return f"{said}. The knowledge set is the better one at both."
    return f"{said}. Between the chat and the knowledge set the rest is not decided."
