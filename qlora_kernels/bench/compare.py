"""Two results of ``qlora bench``: what changed beyond the noise of both.

For each line and contender the ratio of medians, b over a, gets an interval by bootstrap: rounds
are drawn with replacement, then samples within each, so that samples of one moment do not count as
independent (with a single round only the samples are drawn). A change is **flagged** where the
whole interval lies beyond the tolerance,

- in seconds, and
- relative to the machine's own limit in the same run (its read or copy bandwidth, or its dense
  products, whichever bounds the line): where both became slower, the machine did.

Results of different machines are refused unless asked for, measured and modelled ones always.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..finetune.errors import BadInput
from .machine import differences

__all__ = ["Change", "check_comparable", "compare", "ratio_interval", "text"]


@dataclass(frozen=True)
class Change:
    """A line's contender in both results; ratios are b's time over a's."""

    key: str
    contender: str
    ratio: float
    low: float
    high: float
    relative: float | None  # to the machine's limit; None where none was measured
    verdict: str  # "slower", "quicker", "as before", "the machine", "unclear"


def _draw(rounds: Sequence[Sequence[float]], count: int, rng: np.random.Generator) -> np.ndarray:
    """``count`` medians of resampled samples: rounds first, then samples within each."""
    rows = [np.asarray(r, float) for r in rounds if len(r)]
    width = max(map(len, rows))
    # Rounds count alike, however many samples each has.
    picked = rng.integers(0, len(rows), (count, len(rows)))
    table = np.stack([np.resize(r, width) for r in rows])
    lengths = np.array([len(r) for r in rows])[picked]
    at = (rng.random((count, len(rows), width)) * lengths[..., None]).astype(int)
    return np.median(table[picked[..., None], at].reshape(count, -1), axis=1)


def ratio_interval(
    a: Sequence[Sequence[float]], b: Sequence[Sequence[float]], *, level: float = 0.95,
    resamples: int = 2000, seed: int = 0, control: tuple | None = None,
) -> tuple[float, float, float]:  # fmt: skip
    """The ratio of medians, b over a, with its interval.

    Args:
        a, b: seconds, a list for each round.
        control: the same two of the machine's limit, by which the ratio is divided.
    """

    found, drawn = _ratios(a, b, resamples, seed)
    if control is not None:
        other, others = _ratios(control[0], control[1], resamples, seed + 1)
        found, drawn = found / other, drawn / others
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return found, float(low), float(high)


def _ratios(a: Any, b: Any, resamples: int, seed: int) -> tuple[float, np.ndarray]:
    """The ratio of medians, b over a, and those of resampled samples."""
    rng = np.random.default_rng(seed)
    below, above = (
        float(np.median(np.concatenate([np.asarray(r, float) for r in rounds])))
        for rounds in (a, b)
    )
    return above / below, _draw(b, resamples, rng) / _draw(a, resamples, rng)


def check_comparable(
    a: dict[str, Any], b: dict[str, Any], across: bool = False
) -> tuple[list[str], list[str]]:
    """What differs of the machines and of the software.

    Raises:
        BadInput: one was measured and one modelled, or (unless ``across``) they are of different
            machines, devices or clocks.
    """
    if a["kind"] != b["kind"]:
        raise BadInput(
            f"one result is {a['kind']} and the other {b['kind']}: a model's error is not a change"
        )
    machine, software = differences(a["machine"], b["machine"])
    if a["kind"] == "modelled":  # nothing of this machine is in it
        machine = []
    for name in ("device", "clock"):
        if a.get(name) != b.get(name):
            machine.append(f"{name}: {a.get(name)} and {b.get(name)}")
    if machine and not across:
        raise BadInput(
            "the results are of different machines (" + "; ".join(machine) + "): their times say "
            "nothing about the code. --across-machines compares them all the same"
        )
    return machine, software


def _verdict(raw: tuple, relative: tuple | None, tolerance: float) -> str:
    def beyond(interval: tuple) -> int:
        return (interval[1] > 1 + tolerance) - (interval[2] < 1 / (1 + tolerance))

    seconds = beyond(raw)
    if seconds == 0:
        inside = raw[1] >= 1 / (1 + tolerance) and raw[2] <= 1 + tolerance
        return "as before" if inside else "unclear"
    if relative is not None and beyond(relative) != seconds:
        return "the machine"
    return "slower" if seconds > 0 else "quicker"


def compare(
    a: dict[str, Any], b: dict[str, Any], *, tolerance: float = 0.05, level: float = 0.95,
    resamples: int = 2000, seed: int = 0,
) -> list[Change]:  # fmt: skip
    """Every contender of every line that both results have."""
    others = {line["key"]: line for line in b["lines"]}
    found = []
    for line in a["lines"]:
        other = others.get(line["key"])
        if other is None:
            continue
        name = line.get("control")
        control = None
        if name in a["limits"] and name in b["limits"]:
            control = tuple(r["limits"][name]["rounds"] for r in (a, b))
        for contender, entry in line["contenders"].items():
            if contender not in other["contenders"]:
                continue
            rounds = entry["rounds"], other["contenders"][contender]["rounds"]
            options = {"level": level, "resamples": resamples, "seed": seed}
            raw = ratio_interval(*rounds, **options)
            relative = None
            if control is not None:
                relative = ratio_interval(*rounds, control=control, **options)
            found.append(
                Change(
                    line["key"],
                    contender,
                    *raw,
                    None if relative is None else relative[0],
                    _verdict(raw, relative, tolerance),
                )
            )
    return found


def only_in(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Lines, and contenders of lines, that the second result lacks."""
    others = {line["key"]: line for line in b["lines"]}
    found = []
    for line in a["lines"]:
        other = others.get(line["key"])
        if other is None:
            found.append(line["key"])
            continue
        for name in line["contenders"]:
            if name not in other["contenders"]:
                why = other.get("failed", {}).get(name)
                found.append(f"{line['key']}: {name}" + (f" ({why})" if why else ""))
    return found


def text(change: Change) -> list[str]:
    """A row of the table."""
    return [
        change.key, change.contender, f"{change.ratio:.3f}", f"{change.low:.3f}-{change.high:.3f}",
        "" if change.relative is None else f"{change.relative:.3f}", change.verdict,
    ]  # fmt: skip
