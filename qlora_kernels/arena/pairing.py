"""Which pair a rater is shown next, so that all pairs of models and all questions get votes.

The pair of models with the fewest votes comes first; of its questions the one with the fewest; the
model that stood left less often stands left. Chance decides what is left undecided.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

__all__ = ["Shown", "choose"]


class Shown(NamedTuple):
    """A pair of replies that was on somebody's screen.

    Attributes:
        left, right: the replies' numbers.
        own: it was this rater's screen.
        counts: it has a vote, or may get one yet.
    """

    left: int
    right: int
    own: bool
    counts: bool


def choose(
    replies: Mapping[str, Sequence[tuple[int, str]]],
    past: Iterable[Shown],
    draw: random.Random | None = None,
) -> tuple[int, int] | None:
    """The replies to show left and right; None if the rater has seen every pair.

    Args:
        replies: number and model of each question's replies.
        past: everything that was shown so far.
        draw: of what is undecided.
    """
    draw = draw or random.Random()
    model_of = {number: model for group in replies.values() for number, model in group}
    seen: set[frozenset[int]] = set()
    of_models: Counter[frozenset[str]] = Counter()
    of_replies: Counter[frozenset[int]] = Counter()
    left: Counter[tuple[str, str]] = Counter()  # how often the first stood left of the second
    for shown in past:
        pair = frozenset((shown.left, shown.right))
        if shown.own:
            seen.add(pair)
        if shown.counts and pair <= model_of.keys():
            names = model_of[shown.left], model_of[shown.right]
            of_models[frozenset(names)] += 1
            of_replies[pair] += 1
            left[names] += 1
    fewest: tuple[int, int] | None = None
    best: list[tuple[int, int]] = []
    for group in replies.values():
        for (a, model_a), (b, model_b) in combinations(group, 2):
            if frozenset((a, b)) in seen or model_a == model_b:
                continue
            count = of_models[frozenset((model_a, model_b))], of_replies[frozenset((a, b))]
            if fewest is None or count < fewest:
                fewest, best = count, []
            if count == fewest:
                best.append((a, b))
    if not best:
        return None
    a, b = draw.choice(best)
    names = model_of[a], model_of[b]
    balance = left[names] - left[names[::-1]]
    turned = balance > 0 or (balance == 0 and draw.random() < 0.5)
    return (b, a) if turned else (a, b)
