"""The ladder as a picture."""

from __future__ import annotations

import io
from typing import Any

__all__ = ["draw"]


def draw(found: dict[str, Any]) -> bytes:
    """The PNG of what :func:`.elo.ladder` found: Bradley-Terry's ratings with their intervals over
    questions, Elo's beside them. An open end is an arrow to the edge."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    models = found["models"][::-1]
    figure = Figure(figsize=(8, 1.5 + 0.42 * len(models)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    ends = [m[n] for m in models for n in ("bt", "bt_low", "bt_high", "elo") if m[n] is not None]
    margin = 0.08 * (max(ends) - min(ends)) or 50.0
    left, right = min(ends) - margin, max(ends) + margin
    for y, m in enumerate(models):
        low = left if m["bt_low"] is None else m["bt_low"]
        high = right if m["bt_high"] is None else m["bt_high"]
        axes.plot([low, high], [y, y], color="#3b6ea5", linewidth=2, solid_capstyle="butt")
        if m["bt_low"] is None:
            axes.plot(left, y, "<", color="#3b6ea5", clip_on=False)
        if m["bt_high"] is None:
            axes.plot(right, y, ">", color="#3b6ea5", clip_on=False)
    rows = range(len(models))
    axes.plot([m["bt"] for m in models], rows, "o", color="#3b6ea5", label="Bradley-Terry")
    axes.plot([m["elo"] for m in models], rows, "D", color="#c8622c", markersize=5,
              markerfacecolor="none", label="Elo, mean over orders")  # fmt: skip
    # A name is text, not matplotlib's mathematics.
    axes.set_yticks(list(rows), [m["model"].replace("$", r"\$") for m in models])
    axes.set_xlim(left, right)
    axes.set_ylim(-0.6, len(models) - 0.4)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(
        f"rating; bars: {found['settings']['level']:.0%} over {found['questions']} questions "
        f"({found['judgments']} judgments)"
    )
    axes.legend(loc="lower right", frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()
