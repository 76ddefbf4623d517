"""Facts recalled, by how popular they are; graded by the names that a reply asserts."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

from .facts import AUTHORS, CAPITALS, ELEMENTS
from .items import Draft, Item, Probe, ask
from .reading import asserted, mentions, sentences

Table = Mapping[str, Mapping[str, tuple[str, ...]]]

_TABLES: dict[str, tuple[Table, tuple[str, ...]]] = {
    "capital": (
        CAPITALS,
        (
            "What is the capital of {}?",
            "Name the capital city of {}.",
            "Which city is the seat of government and capital of {}?",
        ),
    ),
    "element": (
        ELEMENTS,
        (
            "Which chemical element has the symbol {}?",
            "In the periodic table, {} stands for which element?",
        ),
    ),
    "author": (
        AUTHORS,
        ("Who wrote {}?", "Name the author of {}.", "By whom is {}?"),
    ),
}


def _template(kind: str, tier: str) -> Callable[[random.Random], Draft]:
    table, wordings = _TABLES[kind]
    entries = list(table[tier])

    def make(rng: random.Random) -> Draft:
        entry = rng.choice(entries)
        # One wording an entry: asked twice in other words, a fact would count twice.
        wording = wordings[sum(entry.encode()) % len(wordings)]
        expect = {"kind": kind, "answer": entry}
        return Draft(f"{kind}, {tier}", ask(wording.format(entry)), expect, tier=tier)

    return make


def names_of(kind: str) -> dict[str, tuple[str, ...]]:
    """What is asked about -> the accepted names, of all tiers."""
    return {entry: names for tier in _TABLES[kind][0].values() for entry, names in tier.items()}


def grade(item: Item, reply: str) -> bool:
    """Whether the right name is asserted, and no other of its kind before it or beside it with
    "or"."""
    entries = names_of(item.expect["kind"])
    right, choices = list(entries).index(item.expect["answer"]), list(entries.values())
    # What is asked about may name another of its kind (Andorra's capital, "Washington").
    found = [
        i
        for i in asserted(reply, choices)
        if i == right or not set(choices[i]) & set(choices[right])
    ]
    return found[:1] == [right] and not _hedged(reply, choices, right, found)


def _hedged(reply: str, choices: list[tuple[str, ...]], right: int, found: list[int]) -> bool:
    for sentence in sentences(reply):
        if not any(mentions(sentence, name) for name in choices[right]):
            continue
        others = any(mentions(sentence, n) for i in found if i != right for n in choices[i])
        if others and mentions(sentence, "or"):
            return True
    return False


PROBE = Probe(
    "recall",
    "facts recalled, by how popular they are",
    {
        f"{kind}, {tier}": _template(kind, tier)
        for tier in ("popular", "known", "obscure")
        for kind in _TABLES
    },
    grade,
    tokens=64,
)
