"""Who is shown what: every pair gets its votes, on both sides."""

from __future__ import annotations

import random
from collections import Counter

from qlora_kernels.arena.pairing import Shown, choose

# Three questions, three models: reply 10 q + m of model m.
REPLIES = {str(q): [(10 * q + m, "abc"[m]) for m in range(3)] for q in (1, 2, 3)}


def shown_to(raters: int, each: int, seed: int):
    draw = random.Random(seed)
    past: list[tuple[int, tuple[int, int]]] = []
    for turn in range(each):
        for rater in range(raters):
            told = [Shown(*pair, who == rater, True) for who, pair in past]
            pair = choose(REPLIES, told, draw)
            assert pair is not None, (turn, rater)
            past.append((rater, pair))
    return past


def test_pairs_of_models_questions_and_sides_are_balanced():
    for seed in range(5):
        past = shown_to(raters=8, each=9, seed=seed)
        models = Counter(frozenset(n % 10 for n in pair) for _, pair in past)
        replies = Counter(frozenset(pair) for _, pair in past)
        left = Counter(tuple(n % 10 for n in pair) for _, pair in past)
        assert set(models.values()) == {24} and set(replies.values()) == {8}
        assert set(left.values()) == {12}


def test_balance_holds_at_any_time():
    """With few votes as well: no pair of models is more than one ahead."""
    for seed in range(5):
        past = shown_to(raters=20, each=1, seed=seed)
        models = Counter(frozenset(n % 10 for n in pair) for _, pair in past)
        assert len(models) == 3 and max(models.values()) - min(models.values()) <= 1


def test_nobody_sees_a_pair_twice_and_then_nothing_is_left():
    past = shown_to(raters=1, each=9, seed=0)
    assert len({frozenset(pair) for _, pair in past}) == 9
    assert choose(REPLIES, [Shown(*pair, True, True) for _, pair in past]) is None


def test_what_counts_and_what_does_not():
    # A pair of models that was shown, and skipped, has no vote yet: it comes before one that has.
    voted = [Shown(10, 11, False, True), Shown(11, 12, False, True)]
    skipped = [Shown(10, 12, False, False)] * 5
    for seed in range(10):
        pair = choose(REPLIES, voted + skipped, random.Random(seed))
        assert pair is not None and {n % 10 for n in pair} == {0, 2}
    # Replies that are no longer shown are nobody's concern.
    assert choose(REPLIES, [Shown(98, 99, True, True)]) is not None


def test_questions_with_one_reply_have_no_pair():
    assert choose({"1": [(1, "a")], "2": []}, []) is None
