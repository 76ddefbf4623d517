"""What a run found, as tables and pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from .machine import machine_line
from .results import pace
from .table import print_table

__all__ = ["draw", "print_result"]

_PICTURED = ("forward", "lora", "dx", "train")


def _rate(line: dict[str, Any], seconds: float) -> str:
    compute = line["flops"] and line["m"] > 4
    return _per_second(line["flops" if compute else "bytes"] / seconds, compute)


def _per_second(amount: float, compute: bool) -> str:
    unit = "FLOP/s" if compute else "B/s"
    return f"{amount / 1e12:.3g} T{unit}" if amount >= 1e12 else f"{amount / 1e9:.3g} G{unit}"


def _first(line: dict[str, Any]) -> str | None:
    """The contender that others are compared with: the first of this package's."""
    return next((n for n in line["contenders"] if n.startswith("qlora")), None)


def ratio(line: dict[str, Any], name: str, other: str) -> float:
    """How many times as fast as ``other`` ``name`` is: the median of their interleaved pairs."""
    pairs = zip(
        *(line["contenders"][n]["rounds"] for n in (name, other)), strict=True
    )  # fmt: skip
    return median(y / x for xs, ys in pairs for x, y in zip(xs, ys, strict=True))


def _rows(result: dict[str, Any], op: str) -> Iterator[list[str]]:
    modelled = result["kind"] == "modelled"
    for line in result["lines"]:
        if line["op"] != op:
            continue
        title, first = line["key"].removeprefix(f"{op} "), _first(line)
        for name, entry in line["contenders"].items():
            s = entry["seconds"]
            share = line["limit_seconds"] / s["median"] if "limit_seconds" in line else None
            times = [f"{1e3 * s['median']:.4g}"]
            if not modelled:
                times += [f"{1e3 * s['min']:.4g}", f"{1e3 * s['p10']:.4g}-{1e3 * s['p90']:.4g}"]
            yield [
                title, name, *times, _rate(line, s["median"]),
                "" if share is None else f"{share:.0%}",
                f"{ratio(line, first, name):.2f}" if first not in (None, name) else "",
                *([entry.get("bound", ""), entry.get("route", "")] if modelled else []),
            ]  # fmt: skip
            title = ""


def print_result(result: dict[str, Any]) -> None:
    """A table for each op, what bounds it, and who failed."""
    modelled = result["kind"] == "modelled"
    limits = ", ".join(
        f"{name} {_per_second(pace(result['limits'], name) or 0.0, 'matmul' in name)}"
        for name in result["limits"]
    )
    if modelled:
        print(f"\n{result['device']}: MODELLED from the emulator's counts, never measured\n"
              f"limits, by data sheet and others' measurements: {limits}")  # fmt: skip
    else:
        print(f"\n{machine_line(result['machine'])}\nclock: {result['clock']}; limits measured in "
              f"this run: {limits}")  # fmt: skip
    head = ["line", "contender", "ms"]
    head += [] if modelled else ["min", "p10-p90"]
    head += ["rate", "of limit", "qlora is x as fast"]
    head += ["bound by", "how"] if modelled else []
    for op in dict.fromkeys(line["op"] for line in result["lines"]):
        rows = list(_rows(result, op))
        if rows:
            print(f"\n{op}{' (modelled)' if modelled else ''}")
            print_table(head, rows)
    print()
    reasons: dict[tuple[str, str], list[str]] = {}
    for line in result["lines"]:
        for name, why in line["failed"].items():
            reasons.setdefault((name, why.splitlines()[0][:200]), []).append(line["key"])
    for (name, why), keys in reasons.items():
        where = keys[0] + (f" and {len(keys) - 1} more" if len(keys) > 1 else "")
        print(f"{'no time' if modelled else 'FAILED, not timed'}: {name}, {where}: {why}")


def draw(result: dict[str, Any], path: Path) -> list[Path]:
    """Roofline and M sweep of each op and layer that has rows, beside ``path``.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from . import plots

    drawn = []
    note = "modelled" if result["kind"] == "modelled" else "measured"
    limits = result["limits"]
    bandwidth = pace(limits, "read") or pace(limits, "copy")
    peaks = {n: pace(limits, n) for n in limits if n.startswith("matmul")}
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for line in result["lines"]:
        if line["op"] in _PICTURED and line["contenders"]:
            key = (line["op"], line["layer"], line["dtype"], line["blocksize"])
            groups.setdefault(key, []).append(line)
    for (op, layer, dtype, blocksize), lines in groups.items():
        lines.sort(key=lambda line: line["m"])
        size = f"{lines[0]['n']}x{lines[0]['k']}"
        title = f"{op}, {layer} [{size}], {lines[0]['format']}/{blocksize}, {dtype}: {note}, "
        title += result["device"]
        stem = f"{path.stem}-{op}-{layer}-{dtype}" + (f"-{blocksize}" if blocksize != 64 else "")
        names = list(dict.fromkeys(n for line in lines for n in line["contenders"]))
        if len(lines) > 1:
            curves = []
            for name in names:
                of = [(line["m"], line["contenders"][name]["seconds"]) for line in lines
                      if name in line["contenders"]]  # fmt: skip
                curves.append((name, [(m, s["median"], s["p10"], s["p90"]) for m, s in of]))
            limit = [
                (line["m"], line["limit_seconds"]) for line in lines if "limit_seconds" in line
            ]
            drawn.append(path.with_name(f"{stem}-sweep.png"))
            plots.sweep(drawn[-1], curves, limit, title)
        if bandwidth and peaks:
            points = [
                (name, f"M = {line['m']}", line["flops"] / line["bytes"],
                 line["flops"] / line["contenders"][name]["seconds"]["median"])
                for name in names for line in lines if name in line["contenders"]
            ]  # fmt: skip
            drawn.append(path.with_name(f"{stem}-roofline.png"))
            plots.roofline(drawn[-1], points, bandwidth, peaks, title)
    return drawn
