"""An item of a probe, and all items of a seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from ...finetune.errors import BadInput

__all__ = ["PER_PROBE", "Item", "Probe", "make_items", "probes"]

PER_PROBE = 240
"""Items of each probe, where the user does not say."""


@dataclass(frozen=True)
class Item:
    """A question, and what its grader has to know.

    Attributes:
        id: unique over all probes.
        probe: which it belongs to.
        template: which of the probe's; items of one template differ in what is filled in.
        messages: the conversation that is to be answered, the last one the user's.
        expect: for the grader.
        control: it asks for what the probe's items forbid (a secret's public neighbour, a true
            premise), so that a model that always says the same fails half.
        tier: how popular what is asked for is, in recall.
    """

    id: str
    probe: str
    template: str
    messages: tuple[dict[str, str], ...]
    expect: dict[str, Any] = field(default_factory=dict)
    control: bool = False
    tier: str = ""

    @property
    def prompt(self) -> str:
        """All that is said, as one text; what makes two items the same."""
        return "\n".join(f"{m['role']}: {m['content']}" for m in self.messages)


@dataclass(frozen=True)
class Draft:
    """An item without its name: what a probe's generator yields."""

    template: str
    messages: tuple[dict[str, str], ...]
    expect: dict[str, Any]
    control: bool = False
    tier: str = ""


def ask(text: str, system: str | None = None) -> tuple[dict[str, str], ...]:
    """A conversation of one question."""
    question = {"role": "user", "content": text}
    return (question,) if system is None else ({"role": "system", "content": system}, question)


@dataclass(frozen=True)
class Probe:
    """A kind of item.

    Attributes:
        what: what it looks for, for readers.
        templates: name -> one draft from a random generator.
        grade: whether a reply is right.
    """

    name: str
    what: str
    templates: dict[str, Callable[[random.Random], Draft]]
    grade: Callable[[Item, str], bool]
    tokens: int = 96


def probes() -> dict[str, Probe]:
    """All probes, by name."""
    from . import arithmetic, keeping, minds, premises, recall, refusing

    modules = (arithmetic, keeping, premises, minds, recall, refusing)
    return {module.PROBE.name: module.PROBE for module in modules}


def make_items(
    names: Iterable[str] | None = None, count: int = PER_PROBE, seed: int = 0
) -> list[Item]:
    """``count`` distinct items of each probe, its templates in turn.

    The same seed gives the same items; a larger count begins with those of a smaller one.

    Raises:
        BadInput: a probe that there is not, or more items than a probe can make.
    """
    known = probes()
    items: list[Item] = []
    for name in known if names is None else names:
        if name not in known:
            raise BadInput(f"there is no probe {name!r}; there are: {', '.join(known)}")
        items += _items_of(known[name], count, seed)
    return items


def _items_of(probe: Probe, count: int, seed: int) -> list[Item]:
    generator = random.Random(f"{probe.name} {seed}")
    seen: set[str] = set()
    items: list[Item] = []
    dry: set[str] = set()
    while len(items) < count:
        for name, template in probe.templates.items():
            if name in dry or len(items) == count:
                continue
            for _ in range(300):
                draft = template(generator)
                item = Item(
                    f"{probe.name}-{len(items):04d}",
                    probe.name,
                    name,
                    draft.messages,
                    draft.expect,
                    draft.control,
                    draft.tier,
                )
                key = " ".join(item.prompt.casefold().split())
                if key not in seen:
                    seen.add(key)
                    items.append(item)
                    break
            else:  # what can be filled in is used up
                dry.add(name)
        if len(dry) == len(probe.templates):
            raise BadInput(
                f"{count} items of {probe.name} are asked for, and there are {len(items)}"
            )
    return items
