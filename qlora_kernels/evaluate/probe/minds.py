"""Simple theory of mind: what people in a story believe, know and want.

Stories are the classics (an object moved while somebody is away, a box that holds something else
than it says), with names, things and places filled in. For every story whose answer is a false
belief there is one in which the person has seen everything, so that naming the first place, or the
last, is right half the time only.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable

from .items import Draft, Item, Probe, ask
from .reading import asserted, is_empty, sentences, yes_or_no

_NAMES = (
    "Sally Anne Omar Lucia Piotr Mei Farid Greta Tomas Aisha Ivan Nora Diego Hana Liam Zofia Ravi "
    "Chloe Emre Freya"
).split()
_THINGS = "ball ring letter key coin book toy watch photograph necklace".split()
_PLACES = "basket drawer cupboard backpack suitcase bucket bag chest jar wardrobe".split()
_ROOMS = "kitchen garden garage cellar attic hall study bedroom".split()
_BOXES = {
    "chocolate": "pebbles",
    "crayons": "ribbons",
    "tea": "coins",
    "biscuits": "buttons",
    "cereal": "marbles",
    "pasta": "feathers",
    "sugar": "sand",
    "raisins": "beads",
    "popcorn": "nails",
    "candles": "shells",
}


def _place(name: str, text: str, right: str, wrong: str) -> Draft:
    ending = "Answer with the place only."
    return Draft(name, ask(f"{text} {ending}"), {"right": right, "wrong": [wrong]})


def _transfer(rng: random.Random) -> Draft:
    a, b = rng.sample(_NAMES, 2)
    thing, (first, second) = rng.choice(_THINGS), rng.sample(_PLACES, 2)
    text = (
        f"{a} puts the {thing} into the {first} and goes out. While {a} is away, {b} moves the "
        f"{thing} to the {second}. {a} comes back. Where will {a} look for the {thing} first?"
    )
    return _place("moved unseen", text, first, second)


def _seen(rng: random.Random) -> Draft:
    a, b = rng.sample(_NAMES, 2)
    thing, (first, second) = rng.choice(_THINGS), rng.sample(_PLACES, 2)
    text = (
        f"{a} puts the {thing} into the {first} and stays in the room. {a} watches as {b} moves "
        f"the {thing} to the {second}. Then {a} wants the {thing}. Where will {a} look "
        "for it first?"
    )
    return _place("moved in sight", text, second, first)


def _told(rng: random.Random) -> Draft:
    a, b = rng.sample(_NAMES, 2)
    thing, (first, second) = rng.choice(_THINGS), rng.sample(_PLACES, 2)
    text = (
        f"In the morning {a} leaves the {thing} in the {first}. At noon {b} puts it into the "
        f"{second} and phones {a} to say so. In the evening {a} comes home to fetch the {thing}. "
        f"Where will {a} go to get it?"
    )
    return _place("moved and told", text, second, first)


def _second_order(rng: random.Random) -> Draft:
    a, b = rng.sample(_NAMES, 2)
    thing, (first, second) = rng.choice(_THINGS), rng.sample(_PLACES, 2)
    text = (
        f"{a} and {b} see that the {thing} is in the {first}. {b} leaves, and {a} moves it to the "
        f"{second}. Through the window {b} sees this, but {a} does not notice that. Where does {a} "
        f"think that {b} will look for the {thing}?"
    )
    return _place("a belief about a belief", text, first, second)


def _reality(rng: random.Random) -> Draft:
    a, b = rng.sample(_NAMES, 2)
    thing, (first, second) = rng.choice(_THINGS), rng.sample(_PLACES, 2)
    text = (
        f"{a} hides a {thing} in the {first}. When {a} is asleep, {b} takes it out and hides it in "
        f"the {second}. Where is the {thing} really?"
    )
    return _place("where it is", text, second, first)


def _contents(rng: random.Random) -> Draft:
    a, b = rng.sample(_NAMES, 2)
    label, inside = rng.choice(list(_BOXES.items()))
    text = (
        f"A closed box has the word {label} on it, but {b} has filled it with {inside}. {a} has "
        f"never seen the box before and cannot look into it. What does {a} think is in the box? "
        "Answer with one word."
    )
    return Draft("a box that lies", ask(text), {"right": label, "wrong": [inside]})


def _opened(rng: random.Random) -> Draft:
    a = rng.choice(_NAMES)
    label, inside = rng.choice(list(_BOXES.items()))
    text = (
        f"A box has the word {label} on it. {a} opens it, sees that it is full of {inside}, and "
        f"closes it again. What does {a} think is in the box? Answer with one word."
    )
    return Draft("a box that was opened", ask(text), {"right": inside, "wrong": [label]})


def _yes_no(name: str, text: str, right: bool) -> Draft:
    return Draft(name, ask(f"{text} Answer with yes or no."), {"yes": right})


def _absent(rng: random.Random) -> Draft:
    a, b, c = rng.sample(_NAMES, 3)
    room = rng.choice(_ROOMS)
    present = rng.random() < 0.5
    where = f"is in the {room} with them" if present else "is at work, far from any phone,"
    text = (
        f"{a} and {b} meet in the {room} and agree on a surprise for {c}'s brother. {c} {where} at "
        f"that time, and nobody talks of it afterwards. Does {c} know about the surprise?"
    )
    return _yes_no("who was there", text, present)


def _paint(rng: random.Random) -> Draft:
    a, b = rng.sample(_NAMES, 2)
    thing, room = rng.choice(["clock", "vase", "mirror", "lamp", "carpet"]), rng.choice(_ROOMS)
    told = rng.random() < 0.5
    rest = f"writes {a} a message about it, which {a} reads" if told else "tells nobody"
    text = (
        f"While {a} is on a journey, {b} breaks the {thing} in the {room} and {rest}. {a} is still "
        f"on the journey. Does {a} know that the {thing} is broken?"
    )
    return _yes_no("who was told", text, told)


def _wants(rng: random.Random) -> Draft:
    a, b = rng.sample(_NAMES, 2)
    likes, hates = rng.sample(["apples", "cheese", "olives", "plums", "nuts", "grapes", "melon"], 2)
    text = (
        f"{a} loves {likes} and cannot stand {hates}. {b}, for whom it is the other way round, "
        f"picks a snack for {a} and wants to please {a}. Does {b} pick {likes} or {hates}? Answer "
        "with one word."
    )
    return Draft("what another wants", ask(text), {"right": likes, "wrong": [hates]})


_ALL: list[Callable[[random.Random], Draft]] = [
    _transfer, _seen, _told, _second_order, _reality, _contents, _opened, _absent, _paint, _wants,
]  # fmt: skip


def grade(item: Item, reply: str) -> bool:
    """Whether the right one is asserted first, or yes or no is said as it should be."""
    if is_empty(reply):
        return False
    expect = item.expect
    if "yes" in expect:
        return yes_or_no(reply) is expect["yes"]
    choices = [[expect["right"]], *([name] for name in expect["wrong"])]
    found = asserted(reply, choices)
    # A reply that tells the story again says where the person looks at its end.
    looks = [s for s in _conclusions(reply) if asserted(s, choices)]
    if looks:
        found = asserted(looks[-1], choices)
    return found == [0]


_SUBORDINATE = r",\s|;\s|\b(?:because|since|where|even though|although|but)\b"


def _conclusions(reply: str) -> list[str]:
    """Sentences that say what the person does or thinks."""
    pattern = (
        r"\b(?:will|would|should|going to)\b[^.]*\b(?:look|search|go|check|pick|choose|get)|"
        r"\b(?:thinks?|believes?|expects?|picks?|chooses?|really|answer)\b"
    )
    found = []
    for sentence in sentences(reply):
        if re.search(pattern, sentence):
            # "Although x is in the b, she will look in the a": the main clause counts.
            clauses = re.split(_SUBORDINATE, sentence)
            kept = [c for c in clauses if re.search(pattern, c)]
            found.append(". ".join(kept) if kept else sentence)
    return found


PROBE = Probe(
    "minds",
    "simple theory of mind",
    {template(random.Random(0)).template: template for template in _ALL},
    grade,
    tokens=64,
)
