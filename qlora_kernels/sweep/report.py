"""What a sweep leaves for its reader: ``sweep.json``, ``sweep.md`` and ``sweep.png``."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..finetune.checkpoint import replace_file
from .answers import Answer, answer, compare
from .plan import Planned
from .queue import Failure, Queue
from .results import Result, read_result
from .spec import Spec

__all__ = ["SCHEMA", "collect", "finetunes_a_day", "make_report", "write_report"]

SCHEMA = 1
_OWN = "held-out loss of the finetune"


def collect(queue: Queue, planned: Sequence[Planned]) -> list[Result]:
    """The results that there are, in the order of the plan."""
    return [
        read_result(queue.path(p.key) / "result.json") for p in planned if queue.finished(p.key)
    ]


def finetunes_a_day(results: Sequence[Result]) -> dict[str, dict[str, float]]:
    """Host -> how many of these finetunes it makes in 24 hours, with as many workers as it had.

    From the mean time of those that were not interrupted, measuring included.
    """
    hosts: dict[str, list[Result]] = {}
    for result in results:
        if not result.continued:
            hosts.setdefault(result.host, []).append(result)
    found = {}
    for host, those in hosts.items():
        seconds = statistics.fmean(r.seconds for r in those)
        workers = those[-1].workers
        found[host] = {
            "seconds": seconds,
            "workers": workers,
            "finetunes": len(those),
            "a_day": 86400 * workers / seconds,
        }
    return found


def _groups(results: Sequence[Result]) -> list[tuple[dict[str, Any], list[Result]]]:
    """Results that differ in their seed alone, together."""
    groups: dict[str, tuple[dict[str, Any], list[Result]]] = {}
    for result in results:
        point = {k: v for k, v in result.point.items() if k != "seed"}
        key = json.dumps(point, sort_keys=True, default=str)
        groups.setdefault(key, (point, []))[1].append(result)
    return list(groups.values())


def _row(point: Mapping[str, Any], those: Sequence[Result], spec: Spec) -> dict[str, Any]:
    row: dict[str, Any] = {
        "point": dict(point),
        "seeds": [r.point["seed"] for r in those if "seed" in r.point],
        "finetunes": [r.key for r in those],
        "samples": those[0].data.get("samples"),
        "noise": those[0].data.get("noise"),
        "steps": those[0].steps,
        "seconds": statistics.fmean(r.seconds for r in those),
        "measured": {},
    }
    for name in spec.evaluations:
        seeds = {i: r.measured[name] for i, r in enumerate(those)}
        gain = compare(("", seeds), None, name)
        assert gain is not None
        row["measured"][name] = {
            "mean": statistics.fmean(m.mean for m in seeds.values()),
            "each": [m.mean for m in seeds.values()],
            "base": float(next(iter(seeds.values())).base.mean()),
            "gain": gain.difference,
            "low": gain.low,
            "high": gain.high,
            "detectable": gain.detectable,
        }
    if not spec.evaluations:
        losses = [r.value(None) for r in those]
        row["measured"][_OWN] = {"mean": statistics.fmean(losses), "each": losses}
    return row


def make_report(
    spec: Spec, planned: Sequence[Planned], results: Sequence[Result], failures: Sequence[Failure]
) -> dict[str, Any]:
    """All that is to be said about a sweep, as ``sweep.json`` has it."""
    rows = [_row(point, those, spec) for point, those in _groups(results)]
    goal = spec.objective or _OWN
    sign = -1 if spec.goal is not None and not spec.goal.smaller_is_better else 1
    rows.sort(key=lambda row: sign * row["measured"][goal]["mean"])
    points = {p.key: p.point for p in planned}
    said: Answer | None = answer(spec.question, results) if spec.question else None
    return {
        "schema": SCHEMA,
        "title": spec.title,
        "question": spec.question,
        "objective": goal,
        "planned": len(planned),
        "complete": len(results),
        "rows": rows,
        "failed": [
            {"point": points[f.key], "key": f.key, "attempts": f.attempts, "why": f.why}
            for f in failures
        ],
        "rate": finetunes_a_day(results),
        "answer": None if said is None else said.to_json(),
        "notes": _notes(spec, results),
    }


def _notes(spec: Spec, results: Sequence[Result]) -> list[str]:
    notes = []
    if "model_name_or_path" in spec.vary:
        notes.append(
            "Losses of models with different tokenizers are of different tokens: compare gains."
        )
    if "seed" not in spec.vary and spec.evaluations:
        notes.append(
            "One seed: the intervals are over held-out samples alone, and the luck of training is "
            "not in them."
        )
    continued = sum(r.continued for r in results)
    if continued:
        notes.append(
            f"{continued} of the finetunes were interrupted and went on from a checkpoint."
        )
    return notes


# --- Markdown -----------------------------------------------------------------------------------


def to_markdown(report: Mapping[str, Any]) -> str:
    """The report as a page."""
    lines = [f"# {report['title'] or 'A sweep of finetunes'}", ""]
    said = report["answer"]
    if said is not None:
        lines += _answer_lines(said)
    lines += [
        f"{report['complete']} of {report['planned']} finetunes are complete, "
        f"{len(report['failed'])} failed. Best first, by {report['objective']}.",
        "",
        *_table(report["rows"]),
        "",
        "A gain is over the model before finetuning, on the same held-out samples, with its 95% "
        "interval; positive is better.",
        "",
    ]
    for host, rate in report["rate"].items():
        lines.append(
            f"- On {host}: {rate['a_day']:,.0f} such finetunes a day ({rate['seconds']:,.0f} s "
            f"each, {rate['workers']:.0f} at a time; from {rate['finetunes']:.0f} of them)."
        )
    lines += [f"- {note}" for note in report["notes"]]
    if report["failed"]:
        lines += ["", "## Failed", ""]
        lines += [
            f"- {_point(f['point'])} ({f['attempts']} attempt{'s' * (f['attempts'] != 1)}): "
            f"{f['why']}"
            for f in report["failed"]
        ]
    lines += ["", "![](sweep.png)"]
    return "\n".join(lines) + "\n"


def _point(point: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {v}" for k, v in point.items())


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not rows:
        return ["(nothing is complete yet)"]
    names, measured = list(rows[0]["point"]), list(rows[0]["measured"])
    sized = any(row["samples"] is not None for row in rows)
    heads = [*names, *(["samples", "noise"] if sized else []), "seeds"]
    for name in measured:
        heads += [name, "gain"] if "gain" in rows[0]["measured"][name] else [name]
    heads.append("seconds")
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for row in rows:
        cells = [str(row["point"].get(name, "")) for name in names]
        cells += [str(row["samples"]), str(row["noise"])] if sized else []
        cells.append(str(max(1, len(row["seeds"]))))
        for name in measured:
            m = row["measured"][name]
            cells.append(f"{m['mean']:.4f}")
            if "gain" in m:
                cells.append(f"{m['gain']:+.4f} [{m['low']:+.4f}, {m['high']:+.4f}]")
        lines.append(f"| {' | '.join([*cells, format(row['seconds'], ',.0f')])} |")
    return lines


def _answer_lines(said: Mapping[str, Any]) -> list[str]:
    lines = ["## Answer", ""]
    if said["conclusion"]:
        lines += [f"**{said['conclusion']}**", ""]
    else:
        lines += [f"**No conclusion:** {said['why_not']}.", ""]
    lines += ["| | | on | difference | 95% interval | smallest detectable |", "|" + "---|" * 6]
    for c in said["comparisons"]:
        lines.append(_comparison_line(c))
    lines += ["", "Positive: the first is better than the second.", "", "Controls:", ""]
    for control in said["controls"]:
        c = control["comparison"]
        lines.append(
            f"- {control['name']}: **{'yes' if control['passed'] else 'NO'}** ({c['a']} against "
            f"{c['b']}: {c['difference']:+.4f} [{c['low']:+.4f}, {c['high']:+.4f}])"
        )
    return [*lines, "", "## Finetunes", ""]


def _comparison_line(c: Mapping[str, Any]) -> str:
    return (
        f"| {c['a']} | {c['b']} | {c['evaluation']} | {c['difference']:+.4f} | "
        f"{c['low']:+.4f} to {c['high']:+.4f} | {c['detectable']:.4f} |"
    )


# --- the plot -----------------------------------------------------------------------------------


def draw(report: Mapping[str, Any], path: Path) -> None:
    """A row a point of the search, a panel an evaluation: the mean, each seed, the base model."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # needs no display
    from matplotlib.figure import Figure

    rows = report["rows"][:40]  # more cannot be read
    measured = list(rows[0]["measured"])
    size = (3 + 4 * len(measured), 1.2 + 0.32 * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(measured), sharey=True, squeeze=False)[0]
    places = list(range(len(rows)))[::-1]
    for panel, name in zip(panels, measured, strict=True):
        for place, row in zip(places, rows, strict=True):
            m = row["measured"][name]
            panel.plot(m["each"], [place] * len(m["each"]), "o", color="0.7", markersize=4)
            if "low" in m:
                # The gain's interval, about the mean: what it is compared with is the base's line.
                half = [[m["high"] - m["gain"]], [m["gain"] - m["low"]]]
                panel.errorbar(m["mean"], place, xerr=half, fmt="o", color="C0", capsize=3)
            else:
                panel.plot(m["mean"], place, "o", color="C0")
        base = rows[0]["measured"][name].get("base")
        if base is not None:
            panel.axvline(base, color="C1", linestyle="--", linewidth=1, label="before finetuning")
            panel.legend(fontsize="small")
        panel.set_xlabel(name)
        panel.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(places, [_point(row["point"]) for row in rows], fontsize="small")
    figure.savefig(path, dpi=130)


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    """``sweep.json``, ``sweep.md`` and, where anything is complete, ``sweep.png``."""
    if report["rows"]:
        replace_file(folder / "sweep.png", lambda path: draw(report, path))
    page = to_markdown(report)
    replace_file(folder / "sweep.md", lambda path: path.write_text(page, "utf-8"))
    # NaN is no JSON: an interval that there is not is null.
    text = json.dumps(_finite(report), indent=1, default=str) + "\n"
    replace_file(folder / "sweep.json", lambda path: path.write_text(text, "utf-8"))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value
