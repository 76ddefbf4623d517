"""Pictures of a run: roofline and M sweep. Drawn without a display.

Needs matplotlib (the extra ``bench``).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

__all__ = ["roofline", "sweep"]


def roofline(
    path: Path,
    points: Sequence[tuple[str, str, float, float]],
    bandwidth: float,
    peaks: dict[str, float],
    title: str,
) -> None:
    """Draws attained FLOP/s over FLOP a byte, under what memory and matmul allow.

    Args:
        points: ``(series, label, FLOP a byte of compulsory traffic, FLOP/s)``.
        bandwidth: bytes/s.
        peaks: name of a roof to FLOP/s.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5.5), layout="constrained")
    low = min(p[2] for p in points) / 2
    high = max(p[2] for p in points) * 2
    for i, (name, peak) in enumerate(sorted(peaks.items(), key=lambda item: item[1])):
        ridge = peak / bandwidth
        style = ("--", "-")[i == len(peaks) - 1]
        axes.plot([max(low, ridge), high], [peak / 1e9] * 2, f"k{style}", lw=1)
        axes.text(high, peak / 1e9, f"{name}: {peak / 1e9:.0f} GFLOP/s", ha="right", va="bottom",
                  fontsize=8)  # fmt: skip
    top = max(peaks.values())
    ridge = min(high, top / bandwidth)
    axes.plot([low, ridge], [low * bandwidth / 1e9, ridge * bandwidth / 1e9], "k-", lw=1)
    axes.text(low, low * bandwidth / 1e9, f" memory: {bandwidth / 1e9:.1f} GB/s", fontsize=8,
              rotation=35, rotation_mode="anchor", va="bottom")  # fmt: skip
    markers = iter("osD^vP*X")
    for name in dict.fromkeys(p[0] for p in points):
        mine = [p for p in points if p[0] == name]
        axes.plot([p[2] for p in mine], [p[3] / 1e9 for p in mine], next(markers), label=name,
                  ms=5, alpha=0.85)  # fmt: skip
        for _, label, x, y in mine if name == points[0][0] else ():
            axes.annotate(label, (x, y / 1e9), xytext=(4, -10), textcoords="offset points",
                          fontsize=7)  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="FLOP a byte of compulsory traffic",
             ylabel="GFLOP/s", title=title)  # fmt: skip
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(loc="lower right", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    print(f"drew {path}")


def sweep(
    path: Path,
    lines: Sequence[tuple[str, Sequence[tuple[int, float, float, float]]]],
    limit: Sequence[tuple[int, float]],
    title: str,
) -> None:
    """Draws time over rows M, a line a contender with its band, above what the machine allows.

    Args:
        lines: ``(contender, [(M, seconds, low, high), ...])``.
        limit: ``(M, seconds)``.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5.5), layout="constrained")
    markers = iter("osD^vP*Xh<>" * 2)
    for name, points in lines:
        rows = [p[0] for p in points]
        (drawn,) = axes.plot(rows, [1e3 * p[1] for p in points], marker=next(markers), ms=5, lw=1.2,
                             label=name)  # fmt: skip
        axes.fill_between(rows, [1e3 * p[2] for p in points], [1e3 * p[3] for p in points],
                          alpha=0.2, color=drawn.get_color())  # fmt: skip
    if limit:
        axes.plot([m for m, _ in limit], [1e3 * s for _, s in limit], "k--", lw=1, label="limit")
    axes.set(xscale="log", yscale="log", xlabel="rows M", ylabel="ms a call (p10 to p90)",
             title=title)  # fmt: skip
    ticks = sorted({m for _, points in lines for m, *_ in points})
    axes.set_xticks(ticks, [str(m) for m in ticks], fontsize=8)
    axes.minorticks_off()
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    print(f"drew {path}")
