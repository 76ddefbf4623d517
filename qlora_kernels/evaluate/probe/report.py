"""What probes found: shares of right replies with intervals, the first model beside the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...statistics import detectable_difference, paired_difference, proportion_interval
from .items import Item, probes

__all__ = ["SCHEMA", "make_report", "to_markdown"]

SCHEMA = 1


def make_report(
    items: Sequence[Item], replies: Mapping[str, Mapping[str, str]], seed: int
) -> dict[str, Any]:
    """Grades all replies.

    Args:
        replies: model -> item's id -> reply; the first model is what the others are compared with.
        seed: of the items, for the record.
    """
    known = probes()
    right = {
        model: {item.id: known[item.probe].grade(item, said[item.id]) for item in items}
        for model, said in replies.items()
    }
    base, *others = right
    names = [name for name in known if any(item.probe == name for item in items)]
    return {
        "schema": SCHEMA,
        "seed": seed,
        "models": list(right),
        "base": base,
        "probes": {
            name: _probe([i for i in items if i.probe == name], right, base, others)
            for name in names
        },
        "items": [
            {
                "id": item.id,
                "probe": item.probe,
                "template": item.template,
                "control": item.control,
                "tier": item.tier,
                "prompt": item.prompt,
                "expect": item.expect,
                "replies": {
                    model: {"reply": replies[model][item.id], "right": right[model][item.id]}
                    for model in right
                },
            }
            for item in items
        ],
    }


def _probe(
    items: Sequence[Item], right: Mapping[str, Mapping[str, bool]], base: str, others: Sequence[str]
) -> dict[str, Any]:
    return {
        "what": probes()[items[0].probe].what,
        "items": len(items),
        "models": {model: _score(items, graded) for model, graded in right.items()},
        "against_base": {other: _paired(items, right[other], right[base]) for other in others},
    }


def _score(items: Sequence[Item], graded: Mapping[str, bool]) -> dict[str, Any]:
    """The share of right replies: of all, of those that are no controls and those that are, of
    each template and tier."""
    groups: dict[str, list[Item]] = {"all": list(items)}
    if any(item.control for item in items):
        groups["asked for what is forbidden or false"] = [i for i in items if not i.control]
        groups["controls"] = [i for i in items if i.control]
    for tier in dict.fromkeys(i.tier for i in items if i.tier):
        groups[tier] = [i for i in items if i.tier == tier]
    score = {name: _share([graded[i.id] for i in those]) for name, those in groups.items()}
    templates = dict.fromkeys(i.template for i in items)
    score["templates"] = {
        t: _share([graded[i.id] for i in items if i.template == t]) for t in templates
    }
    return score


def _share(graded: Sequence[bool]) -> dict[str, Any]:
    low, high = proportion_interval(sum(graded), len(graded))
    return {
        "right": sum(graded),
        "of": len(graded),
        "share": sum(graded) / len(graded),
        "low": low,
        "high": high,
    }


def _paired(
    items: Sequence[Item], graded: Mapping[str, bool], base: Mapping[str, bool]
) -> dict[str, Any]:
    """The difference of two models on the same items."""
    a = np.array([graded[i.id] for i in items], float)
    b = np.array([base[i.id] for i in items], float)
    found = paired_difference(a, b)
    return {
        "difference": found.mean,
        "low": found.low,
        "high": found.high,
        "detectable": detectable_difference(a - b) if len(a) > 1 else None,
        "only_this_right": int(((a == 1) & (b == 0)).sum()),
        "only_base_right": int(((a == 0) & (b == 1)).sum()),
    }


def to_markdown(report: Mapping[str, Any]) -> str:
    """The figures as a table."""
    models, base = report["models"], report["base"]
    others = [m for m in models if m != base]
    heads = ["probe", "items", *models, *(f"{m} - {base}" for m in others)]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for name, probe in report["probes"].items():
        for part in [p for p in probe["models"][base] if p != "templates"]:
            shares = [probe["models"][m][part] for m in models]
            label = f"**{name}**: {probe['what']}" if part == "all" else f"- {part}"
            cells = [label, str(shares[0]["of"])]
            cells += [
                f"{100 * s['share']:.0f}% [{100 * s['low']:.0f}, {100 * s['high']:.0f}]"
                for s in shares
            ]
            for other in others:
                d = probe["against_base"][other]
                cells.append(
                    f"{100 * d['difference']:+.1f} [{100 * d['low']:+.1f}, {100 * d['high']:+.1f}]"
                    if part == "all"
                    else ""
                )
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Right replies in percent with 95% intervals (Wilson); differences are paired, "
              "item by item, in points (bootstrap)."]  # fmt: skip
    return "\n".join(lines) + "\n"
