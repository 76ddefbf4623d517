"""A kernel's source with what each line did in the margin, for the terminal and as HTML."""

from __future__ import annotations

import html
from collections.abc import Callable
from pathlib import Path

from .launch import Result

__all__ = ["listing", "listing_html"]

_COLUMNS: list[tuple[str, str, Callable[[dict[str, float]], str]]] = [
    ("warps", "PTX instructions × warps", lambda c: f"{int(c['warps']):,}"),
    (
        "lanes",
        "active lanes of 32, on average",
        lambda c: f"{c['threads'] / c['warps']:.1f}" if c["warps"] else "",
    ),
    (
        "sectors",
        "32-byte sectors of global memory",
        lambda c: f"{int(c['sectors']):,}" if c["sectors"] else "",
    ),
    (
        "÷ideal",
        "sectors over the fewest for those bytes",
        lambda c: f"{c['sectors'] / c['sectors_ideal']:.2f}" if c["sectors_ideal"] else "",
    ),
    (
        "wavefr.",
        "shared-memory wavefronts",
        lambda c: f"{int(c['wavefronts']):,}" if c["wavefronts"] else "",
    ),
    (
        "÷ideal",
        "wavefronts over those without conflicts",
        lambda c: f"{c['wavefronts'] / c['wavefronts_ideal']:.2f}" if c["wavefronts_ideal"] else "",
    ),
    ("MFLOP", "of matrix instructions", lambda c: f"{c['flops'] / 1e6:.2f}" if c["flops"] else ""),
]


def _rows(result: Result) -> list[tuple[str, list[tuple[int, str, dict[str, float] | None]]]]:
    """(file, [(line, text, counts or None)]) for each source file that the kernel has code of."""
    kernel, counts = result.kernel, result.counts
    sums: dict[str, dict[int, dict[str, float]]] = {}
    for row, count in zip(kernel.instructions, counts.instructions, strict=True):
        # Inlined functions of other files count for the line that calls them.
        place = row.loc.outermost if row.loc else None
        file, line = (place.file, place.line) if place else ("PTX", row.ptx_line)
        entry = sums.setdefault(file, {}).setdefault(
            line, dict.fromkeys(counts.instructions.dtype.names or (), 0.0)
        )
        for name in entry:
            entry[name] += float(count[name])
    out = []
    for file, lines in sums.items():
        if file == "PTX":
            text = kernel.module.text.split("\n")
        elif Path(file).is_file():
            text = Path(file).read_text(errors="replace").split("\n")
        else:
            text = []
        first, last = max(1, min(lines) - 3), max(lines) + 2
        if text:
            last = min(last, len(text))
        shown = [
            (n, text[n - 1] if n <= len(text) else "", lines.get(n)) for n in range(first, last + 1)
        ]
        if not text:
            shown = [(n, "(the source is not here)", c) for n, _, c in shown if c]
        out.append((file, shown))
    return out


def listing(result: Result, width: int = 120) -> str:
    """Plain text, a line of the source a line; only what ran has figures."""
    out = []
    for file, rows in _rows(result):
        cells = [[f(c) if c else "" for _, _, f in _COLUMNS] for _, _, c in rows]
        used = [k for k in range(len(_COLUMNS)) if any(r[k] for r in cells)]
        widths = {k: max(len(_COLUMNS[k][0]), *(len(r[k]) for r in cells)) for k in used}
        out.append(file)
        out.append("  ".join(f"{_COLUMNS[k][0]:>{widths[k]}}" for k in used) + "   line")
        for (n, text, _), r in zip(rows, cells, strict=True):
            left = "  ".join(f"{r[k]:>{widths[k]}}" for k in used)
            out.append(f"{left}  {n:>5}  {text.rstrip()}"[:width].rstrip())
        out.append("")
    found = "\n".join(str(r) for r in result.reports)
    return "\n".join(out) + found


def listing_html(result: Result) -> str:
    """The same as one self-contained page; lines are shaded by their share of what was issued."""
    parts = [
        "<!doctype html><meta charset=utf-8><title>",
        html.escape(result.kernel.name),
        "</title><style>",
        "body{font:13px/1.45 ui-monospace,monospace;margin:2em;color:#222;background:#fff}",
        "table{border-collapse:collapse}td,th{padding:0 .7em;text-align:right;white-space:pre}",
        "td:last-child{text-align:left}th{font-weight:600;border-bottom:1px solid #999}",
        ".r{color:#b00020;white-space:pre-wrap}</style>",
    ]
    for file, rows in _rows(result):
        most = max((c["warps"] for _, _, c in rows if c), default=1) or 1
        parts.append(f"<h3>{html.escape(file)}</h3><table><tr>")
        parts += [f'<th title="{html.escape(title)}">{name}</th>' for name, title, _ in _COLUMNS]
        parts.append("<th>line</th><th></th></tr>")
        for n, text, c in rows:
            share = c["warps"] / most if c else 0
            style = f' style="background:rgba(255,140,0,{0.45 * share:.3f})"' if share else ""
            parts.append(f"<tr{style}>")
            parts += [f"<td>{f(c) if c else ''}</td>" for _, _, f in _COLUMNS]
            parts.append(f"<td>{n}</td><td>{html.escape(text.rstrip())}</td></tr>")
        parts.append("</table>")
    if result.reports:
        parts.append(
            "<h3>Findings</h3>"
            + "".join(f'<p class="r">{html.escape(str(r))}</p>' for r in result.reports)
        )
    return "".join(parts)
