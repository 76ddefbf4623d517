"""Arithmetic, bare and in words; graded by the number that a reply ends with."""

from __future__ import annotations

import random
from collections.abc import Callable

from .items import Draft, Item, Probe, ask
from .reading import final_number

_NAMES = (
    "Amira Ben Chen Dora Elif Femi Greta Hugo Ines Jonas Kofi Lena Marek Nadia Otto Priya Quinn "
    "Rosa Samir Tove Umar Vera Wanda Xavier Yuki Zoe"
).split()
_THINGS = "apples pencils stickers marbles books oranges cards shells buttons stamps".split()
_GOODS = "notebook mug ticket lamp scarf sandwich poster plant candle basket".split()


def _draft(name: str, text: str, answer: int, ending: str = "") -> Draft:
    return Draft(name, ask(f"{text} {ending}".strip()), {"number": answer})


def _add(rng: random.Random) -> Draft:
    a, b = rng.randint(12, 999), rng.randint(12, 999)
    return _draft("addition", f"What is {a} + {b}?", a + b)


def _subtract(rng: random.Random) -> Draft:
    a, b = sorted((rng.randint(100, 999), rng.randint(12, 999)), reverse=True)
    return _draft("subtraction", f"Calculate {a} - {b}.", a - b)


def _multiply(rng: random.Random) -> Draft:
    a, b = rng.randint(3, 19), rng.randint(6, 49)
    return _draft("multiplication", f"How much is {a} times {b}?", a * b)


def _divide(rng: random.Random) -> Draft:
    b, answer = rng.randint(3, 15), rng.randint(4, 40)
    return _draft("division", f"Divide {b * answer} by {b}.", answer)


def _chain(rng: random.Random) -> Draft:
    a, b, c = rng.randint(2, 12), rng.randint(2, 12), rng.randint(5, 60)
    return _draft("order of operations", f"Work out {c} + {a} * {b}.", c + a * b)


def _give_away(rng: random.Random) -> Draft:
    name, other = rng.sample(_NAMES, 2)
    thing, have = rng.choice(_THINGS), rng.randint(20, 90)
    give = rng.randint(3, have - 5)
    more = rng.randint(2, 30)
    text = (
        f"{name} has {have} {thing}, gives {give} of them to {other} and then finds {more} more. "
        f"How many {thing} does {name} have now?"
    )
    return _draft("giving away", text, have - give + more)


def _shopping(rng: random.Random) -> Draft:
    name = rng.choice(_NAMES)
    first, second = rng.sample(_GOODS, 2)
    n, p, q = rng.randint(2, 9), rng.randint(2, 15), rng.randint(2, 15)
    text = (
        f"A {first} costs {p} dollars and a {second} costs {q} dollars. {name} buys {n} of the "
        f"first kind and one of the second. How many dollars does {name} pay?"
    )
    return _draft("shopping", text, n * p + q)


def _sharing(rng: random.Random) -> Draft:
    people, each = rng.randint(3, 12), rng.randint(3, 20)
    thing = rng.choice(_THINGS)
    text = (
        f"{people * each} {thing} are shared equally among {people} children. How many does each "
        "child get?"
    )
    return _draft("sharing", text, each)


def _speed(rng: random.Random) -> Draft:
    speed, hours = rng.randint(4, 24) * 5, rng.randint(2, 9)
    vehicle = rng.choice(["train", "bus", "car", "ship", "cyclist"])
    text = f"A {vehicle} goes {speed} km an hour. How many km does it cover in {hours} hours?"
    return _draft("speed", text, speed * hours)


def _ages(rng: random.Random) -> Draft:
    older, younger = rng.sample(_NAMES, 2)
    age, gap, years = rng.randint(5, 40), rng.randint(2, 20), rng.randint(2, 15)
    text = (
        f"{younger} is {age} years old, and {older} is {gap} years older. How old will {older} be "
        f"in {years} years?"
    )
    return _draft("ages", text, age + gap + years)


def _percent(rng: random.Random) -> Draft:
    percent, whole = rng.choice([5, 10, 20, 25, 40, 50, 75]), rng.randint(2, 60) * 20
    what = rng.choice(
        ["members of a club", "trees in a park", "seats in a hall", "pages of a book"]
    )
    text = f"There are {whole} {what}, and {percent} percent of them are new. How many are new?"
    return _draft("percent", text, whole * percent // 100)


def _rows(rng: random.Random) -> Draft:
    rows, seats, empty = rng.randint(4, 20), rng.randint(5, 20), rng.randint(2, 18)
    text = (
        f"A theatre has {rows} rows of {seats} seats. {empty} seats stay empty. How many people "
        "sit there?"
    )
    return _draft("rows", text, rows * seats - empty)


_ALL: list[Callable[[random.Random], Draft]] = [
    _add, _subtract, _multiply, _divide, _chain, _give_away, _shopping, _sharing, _speed, _ages,
    _percent, _rows,
]  # fmt: skip


def grade(item: Item, reply: str) -> bool:
    """Whether the last number of the reply, or the one that it calls its answer, is right."""
    return final_number(reply) == item.expect["number"]


PROBE = Probe(
    "arithmetic",
    "arithmetic and word problems",
    {template(random.Random(0)).template: template for template in _ALL},
    grade,
    tokens=160,
)
