"""The plots of ``qlora formats``, drawn by matplotlib's Agg, which needs no display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..finetune.checkpoint import replace_file

__all__ = ["draw_all", "draw_codebooks", "draw_curves", "draw_heat_map", "draw_tradeoff"]


def _figure(width: float, height: float, *shape: int) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(*shape)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda p: figure.savefig(p, dpi=130))


def normalized_histogram(weights: torch.Tensor, blocksize: int = 64) -> tuple[list, list]:
    """Density of the weights over their block's absmax: ``(edges [121], density [120])``."""
    flat = weights.detach().float().reshape(-1)
    blocks = flat[: flat.numel() // blocksize * blocksize].view(-1, blocksize)
    values = blocks / blocks.abs().amax(1, keepdim=True).clamp(min=1e-38)
    density, edges = np.histogram(values.cpu().numpy(), bins=120, range=(-1, 1), density=True)
    return edges.tolist(), density.tolist()


def draw_codebooks(
    path: Path, histogram: tuple[list, list], codebooks: Mapping[str, Sequence[float]], title: str
) -> None:
    """Each format's levels under the histogram of the blockwise normalized weights."""
    figure, (top, bottom) = _figure(9, 3.2 + 0.28 * len(codebooks), 2, 1)
    edges, density = histogram
    top.stairs(density, edges, fill=True, color="0.8")
    top.set_title(title)
    top.set_ylabel("density")
    for place, levels in enumerate(codebooks.values()):
        bottom.plot(levels, [place] * len(levels), "|", markersize=11, color=f"C{place % 10}")
    bottom.set_yticks(range(len(codebooks)), list(codebooks))
    bottom.invert_yaxis()
    bottom.set_xlabel("value over the block's scale")
    for axis in (top, bottom):
        axis.set_xlim(-1.03, 1.03)
        axis.grid(axis="x", alpha=0.3)
    _save(figure, path)


def draw_tradeoff(path: Path, rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """Error against bits a weight: SQNR of the weights, and KL divergence where it was measured."""
    known = "divergence" in rows[0]
    figure, axes = _figure(12 if known else 7, 5, 1, 2 if known else 1)
    axes = list(np.atleast_1d(axes))
    names = list(dict.fromkeys(row["design"] for row in rows))
    for axis, key in zip(axes, ("weights", "divergence"), strict=False):
        for row in rows:
            color = f"C{names.index(row['design']) % 10}"
            value = row["weights"]["sqnr"] if key == "weights" else row["divergence"]["value"]
            axis.plot(row["bits"], value, "o" if not row["nested"] else "s", color=color)
            if not row["nested"]:
                axis.annotate(row["name"], (row["bits"], value), fontsize=7, xytext=(4, 2),
                              textcoords="offset points")  # fmt: skip
        axis.set_xlabel("bits a weight (squares: double quantization)")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("SQNR of the weights, dB")
    axes[0].set_title(title)
    if known:
        axes[1].set_yscale("log")
        axes[1].set_ylabel("KL divergence from the 16-bit model, nats a token")
    _save(figure, path)


def draw_heat_map(path: Path, rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """SQNR by layer and format, in dB."""
    layers = list(rows[0]["layers"])
    values = np.array([[row["layers"][layer] for layer in layers] for row in rows], float)
    values[~np.isfinite(values)] = np.nan
    figure, axis = _figure(max(8, min(24, 0.09 * len(layers) + 4)), 1.8 + 0.26 * len(rows))
    image = axis.imshow(values, aspect="auto", cmap="viridis", interpolation="nearest")
    axis.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=7)
    step = max(1, len(layers) // 40)
    short = [layer.removeprefix("model.layers.").removesuffix("_proj") for layer in layers]
    axis.set_xticks(range(0, len(layers), step), short[::step], rotation=90, fontsize=6)
    axis.set_title(title)
    figure.colorbar(image, label="SQNR, dB")
    _save(figure, path)


def draw_curves(path: Path, rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """Training loss by step: the mean of the seeds, and from the least to the largest."""
    figure, axis = _figure(8, 5)
    for place, row in enumerate(rows):
        history = np.array(row["history"])
        steps = np.arange(1, history.shape[1] + 1)
        axis.plot(steps, history.mean(0), color=f"C{place % 10}", label=row["name"])
        axis.fill_between(steps, history.min(0), history.max(0), color=f"C{place % 10}", alpha=0.12)
    axis.set_xlabel("step")
    axis.set_ylabel("training loss, nats a token")
    axis.set_title(title)
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    _save(figure, path)


def draw_all(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Every plot of these results; the files."""
    drawn = []
    for source in results["sources"]:
        label = "".join(c if c.isalnum() else "-" for c in source["name"])
        rows = source["rows"]
        for kind, draw in (("error", draw_tradeoff), ("layers", draw_heat_map)):
            drawn.append(folder / f"{kind}-{label}.png")
            draw(drawn[-1], rows, source["name"])
        drawn.append(folder / f"codebooks-{label}.png")
        draw_codebooks(drawn[-1], source["histogram"], source["codebooks"], source["name"])
    for key in ("finetune", "where"):
        if key in results:
            drawn.append(folder / f"curves-{key}.png")
            draw_curves(drawn[-1], results[key]["rows"], results[key]["about"].split(".")[0])
    return drawn
