"""A plan as JSON, and what is drawn of it: tables and bars in a terminal, a PNG."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..finetune.errors import BadInput, bad_input
from .advice import Advice
from .memory import MemoryPlan
from .recipe import Place, Recipe
from .speed import (
    ARTICLE_A_DAY,
    ARTICLE_BATCH,
    ARTICLE_HOURS,
    ARTICLE_STEPS,
    Forecast,
)

__all__ = ["SCHEMA", "article_lines", "draw", "plan_json", "plot", "read_plan", "size"]

SCHEMA = 1
_COLOURS = (
    "grey50", "dark_blue", "blue", "deep_sky_blue3", "cyan", "green", "yellow", "orange3",
    "red", "magenta", "purple", "plum3", "grey70",
)  # fmt: skip


def size(n: float) -> str:
    """Bytes for a reader: ``1.53 GB``, ``54.9 MB``."""
    return f"{n / 1e9:,.2f} GB" if abs(n) >= 1e9 else f"{n / 1e6:,.1f} MB"


# --- the plan as JSON -----------------------------------------------------------------------------


def plan_json(
    model: str,
    recipe: Recipe,
    place: Place,
    plan: MemoryPlan,
    *,
    advice: Sequence[Advice] = (),
    without: Sequence[Advice] = (),
    speed: Forecast | None = None,
    tokens: float,
) -> dict[str, Any]:
    """All of a plan in plain types; what is drawn is drawn from it. ``tokens`` are the run's."""

    def advised(one: Advice) -> dict[str, Any]:
        return {"change": one.flags, "needed": one.plan.needed, "fits": one.fits}

    found: dict[str, Any] = {
        "schema": SCHEMA,
        "kind": "plan",
        "model": model,
        "place": {"name": place.name, "limit": place.limit, "gpu": place.gpu},
        "recipe": dataclasses.asdict(recipe),
        "memory": {
            "label": "modelled" if place.gpu else "predicted",
            "peak": plan.peak,
            "needed": plan.needed,
            "when": plan.when,
            "excess": plan.excess,
            "paged": plan.paged,
            "phases": plan.phases,
            "parts": plan.parts,
            "compositions": plan.compositions,
            "activations": plan.activations,
            "activations_a_layer": plan.activations_a_layer,
            "layers": plan.layers,
            "full_logits": plan.full_logits,
        },
        "advice": [advised(one) for one in advice],
        "without": [advised(one) for one in without],
        "notes": [*place.notes, *plan.notes],
        "speed": None,
    }
    if speed is not None:
        found["speed"] = {
            "source": speed.source,
            "tokens_per_second": speed.tokens_per_second,
            "seconds_a_microbatch": speed.seconds,
            "parts": speed.parts,
            "bound": speed.bound,
            "run_tokens": tokens,
            "hours": speed.hours(tokens),
            "words_a_night": speed.words_a_night,
            "finetunes_a_day": speed.finetunes_a_day(tokens),
            "notes": speed.notes,
        }
    return found


def read_plan(path: Path) -> dict[str, Any]:
    """A plan that ``--json`` wrote.

    Raises:
        BadInput: it is missing, no JSON, no plan, or of another version.
    """
    from ..integrations.checkpoint_files import read_json_object

    with bad_input():
        found = read_json_object(path)
    if found.get("kind") != "plan":
        raise BadInput(f"{path} is not a plan of `qlora plan --json`")
    if found.get("schema") != SCHEMA:
        raise BadInput(
            f"{path} has schema {found.get('schema')!r}, and this version reads {SCHEMA}: make the "
            "plan anew"
        )
    missing = [k for k in ("model", "place", "recipe", "memory", "speed") if k not in found]
    if missing:
        raise BadInput(f"{path} lacks {', '.join(missing)}: it is not whole; make the plan anew")
    return found


# --- in a terminal ------------------------------------------------------------------------------


def draw(data: Mapping[str, Any], console: Console) -> None:
    """Prints a plan."""
    recipe, memory, place = data["recipe"], data["memory"], data["place"]
    console.print(
        f"[bold]{data['model']}[/], {recipe['per_device_train_batch_size']} x "
        f"{recipe['max_length']} tokens, {recipe['quant_type']}, LoRA r={recipe['r']} on "
        f"{_targets(recipe['target_modules'])}, {recipe['optim']}, {recipe['dtype']}"
        + (", activations checkpointed" if recipe["activation_checkpointing"] else ""),
        highlight=False,
    )
    console.print(_parts_table(memory), highlight=False)
    console.print(_phases_table(memory, place, console.width), highlight=False)
    console.print(_verdict(memory, place), highlight=False)
    for line in data.get("notes", ()):
        console.print(f"[yellow]note:[/] {line}", highlight=False)
    for title, key in (("to make it fit:", "advice"), ("it would take with", "without")):
        if data.get(key):
            console.print(f"\n[bold]{title}[/]")
            for one in data[key]:
                fits = "" if place["limit"] is None else (" fits" if one["fits"] else " too much")
                colour = "green" if one["fits"] else "red"
                console.print(
                    f"  {one['change']}: {size(one['needed'])}[{colour}]{fits}[/]", highlight=False
                )
    if data["speed"]:
        _draw_speed(data, console)


def _targets(targets: Any) -> str:
    return targets if isinstance(targets, str) else ", ".join(targets)


def _parts_table(memory: Mapping[str, Any]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    parts = memory["parts"]
    total = max(1, sum(parts.values()))
    for (name, taken), colour in zip(parts.items(), _COLOURS, strict=False):
        more = ""
        if name == "activations" and memory["activations_a_layer"]:
            each = size(memory["activations_a_layer"])
            more = f" {memory['layers']} layers of {each}; {size(memory['activations'])} at most"
        bar = f"[{colour}]{'█' * round(30 * taken / total)}[/]"
        table.add_row(name, size(taken), bar + more)
    return table


def _phases_table(memory: Mapping[str, Any], place: Mapping[str, Any], width: int) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, title_justify="left")
    for justify in ("left", "right", "left"):
        table.add_column(justify=justify, no_wrap=True)  # type: ignore[arg-type]
    scale = max(memory["peak"], place["limit"] or 0, 1)
    cells = max(10, min(60, width - 58))
    colours = dict(zip(memory["parts"], _COLOURS, strict=False))
    for phase, taken in memory["phases"].items():
        bar, drawn = Text(), 0.0
        for name, part in memory["compositions"].get(phase, {}).items():
            upto = drawn + part
            count = round(cells * upto / scale) - round(cells * drawn / scale)
            bar.append("█" * count, style=colours.get(name, "grey70"))
            drawn = upto
        if place["limit"]:
            at = round(cells * place["limit"] / scale)
            bar.append(" " * max(0, at - len(bar)))
            bar.append("│", style="bold red")
        style = "bold" if phase == memory["when"] else ""
        table.add_row(Text(phase, style=style), Text(size(taken), style=style), bar)
    return table


def _verdict(memory: Mapping[str, Any], place: Mapping[str, Any]) -> str:
    told = f"peak [bold]{size(memory['peak'])}[/] {memory['label']}, {memory['when']}"
    if memory["needed"] < memory["peak"]:
        told += f"; {size(memory['needed'])} with the optimizer's states paged out"
    if place["limit"] is None:
        return told
    room = f"{place['name']} has {size(place['limit'])}"
    if memory["excess"]:
        return f"{told}\n[red]does not fit[/]: {room}, {size(memory['excess'])} too little"
    return f"{told}\n[green]fits[/]: {room}, {size(place['limit'] - memory['needed'])} to spare"


def _draw_speed(data: Mapping[str, Any], console: Console) -> None:
    speed = data["speed"]
    console.print(f"\n[bold]speed[/] ({speed['source']})")
    total = sum(speed["parts"].values()) or 1.0
    shares = ", ".join(
        f"{name} {seconds / total:.0%}"
        for name, seconds in sorted(speed["parts"].items(), key=lambda part: -part[1])
        if seconds / total >= 0.01
    )
    hours = speed["hours"]
    console.print(
        f"  {speed['tokens_per_second']:,.0f} tokens/s: {shares}\n"
        f"  {speed['run_tokens']:,.0f} tokens take {_hours(hours)}; "
        f"{speed['finetunes_a_day']:,.1f} such finetunes a day (the article: {ARTICLE_A_DAY} a day "
        f"on its small setups)\n"
        f"  {speed['words_a_night'] / 1e6:,.2f} million words a night of 8 hours",
        highlight=False,
    )
    for line in speed["notes"]:
        console.print(f"  [yellow]note:[/] {line}", highlight=False)
    if data["model"] in ARTICLE_HOURS:
        told, gpu = ARTICLE_HOURS[data["model"]]
        most = ARTICLE_STEPS * ARTICLE_BATCH * 512 / speed["tokens_per_second"] / 3600
        console.print(
            f"  Guanaco's recipe, {ARTICLE_STEPS} x {ARTICLE_BATCH} conversations: at most "
            f"{_hours(most)} here, were each of them 512 tokens; the article: {told:.0f} hours on "
            f"a GPU of {gpu}",
            highlight=False,
        )


def _hours(hours: float) -> str:
    if hours < 1 / 60:
        return f"{hours * 3600:.0f} s"
    return f"{hours * 60:.0f} min" if hours < 2 else f"{hours:,.1f} hours"


def article_lines(rows: Sequence[Any], all_of_65b: int) -> Table:
    """The article's table beside what is recomputed."""
    table = Table(title="QLoRA, figure 6: batch 1, 512 tokens, r=64", title_justify="left")
    for name in ("model", "base, MiB", "article", "", "in all, GiB", "article", ""):
        table.add_column(name, justify="left" if name == "model" else "right")
    for row in rows:
        table.add_row(
            row.name, f"{row.base / 2**20:,.0f}", f"{row.article_base_mb:,}",
            f"{row.base_error:+.1%}", f"{row.total / 2**30:.1f}", f"{row.article_total_gb}",
            f"{row.total_error:+.1%}",
        )  # fmt: skip
    table.caption = f"65B in 16 bits, all of it trained: {all_of_65b / 1e9:,.0f} GB (article: 780)"
    return table


# --- as a picture -------------------------------------------------------------------------------


def plot(data: Mapping[str, Any], path: Path) -> None:
    """The phases as stacked bars, with the limit, as a PNG; needs no display.

    Raises:
        BadInput: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from ..finetune.checkpoint import replace_file

    memory, place = data["memory"], data["place"]
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    names: list[str] = []
    for parts in memory["compositions"].values():
        names += [name for name in parts if name not in names]
    phases = list(memory["phases"])
    left = [0.0] * len(phases)
    for i, name in enumerate(names):
        widths = [memory["compositions"][phase].get(name, 0) / 1e9 for phase in phases]
        if max(widths) > 0.004 * memory["peak"] / 1e9:
            colour = f"C{i}" if i < 10 else ("gold", "navy", "0.7", "0.85")[i % 4]
            axes.barh(phases, widths, left=left, label=name, color=colour)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    if place["limit"]:
        axes.axvline(place["limit"] / 1e9, color="red", linestyle="--", label=place["name"])
    axes.invert_yaxis()
    axes.set_xlabel(f"GB, {memory['label']}")
    axes.set_title(f"{data['model']}: {memory['peak'] / 1e9:.2f} GB {memory['when']}", loc="left")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    with bad_input(f"--plot {path}"):
        replace_file(path, lambda p: figure.savefig(p, dpi=130, format="png"))
