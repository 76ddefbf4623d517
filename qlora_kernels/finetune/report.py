"""What a finetune shows and leaves: the memory plan, the progress, the curves, the figures."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from transformers import TrainerCallback

from .plan import MemoryPlan

__all__ = ["ProgressReport", "draw_curves", "megabytes", "plan_table", "throughput"]


def megabytes(size: float) -> str:
    """Bytes for a reader: ``1.53 GB``, ``54.9 MB``."""
    if abs(size) >= 1e9:
        return f"{size / 1e9:,.2f} GB"
    if abs(size) >= 1e8:
        return f"{size / 1e6:,.0f} MB"
    return f"{size / 1e6:,.1f} MB"


def plan_table(plan: MemoryPlan) -> Table:
    """The memory plan for a terminal, with a bar to each part."""
    table = Table(title="memory plan", title_justify="left", box=None, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    total = max(1, sum(plan.parts.values()))
    for name, size in plan.parts.items():
        table.add_row(name, megabytes(size), "█" * round(30 * size / total))
    table.add_row("[bold]peak predicted[/]", f"[bold]{megabytes(plan.peak)}[/]", plan.when)
    if plan.limit is not None:
        table.add_row("there is", megabytes(plan.limit), plan.limit_from)
    return table


def throughput(history: Sequence[Mapping[str, Any]]) -> float | None:
    """Tokens a second, from the median step; the first step, which warms up, is left out.

    Steps differ in their number of tokens, so the median is of seconds a token.
    """
    steps = [h for h in history if h["tokens"] and h["seconds"]]
    steps = steps[1:] or steps
    if not steps:
        return None
    return 1 / statistics.median(h["seconds"] / h["tokens"] for h in steps)


class ProgressReport(TrainerCallback):
    """A bar with loss, tokens a second and the time left; on something that is no terminal, a line
    now and then."""

    def __init__(self, console: Console, latest: Callable[[], Sequence[Mapping[str, Any]]]) -> None:
        self._console, self._latest = console, latest
        self._bar: Progress | None = None
        self._task: Any = None
        self._lines = not console.is_terminal

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._lines:
            return
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._task = self._bar.add_task(
            "training", total=state.max_steps, completed=state.global_step
        )
        self._bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        history = self._latest()
        if not history:
            return
        recent = history[-10:]
        seconds = sum(h["seconds"] for h in recent)
        rate = sum(h["tokens"] for h in recent) / seconds if seconds else 0.0
        text = f"loss {history[-1]['loss']:.4f}  {rate:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step, description=text)
        elif self._due(state.global_step, state.max_steps):
            left = (state.max_steps - state.global_step) * seconds / len(recent)
            self._console.print(
                f"step {state.global_step}/{state.max_steps}  {text}  {clock(left)} left"
            )

    @staticmethod
    def _due(step: int, total: int) -> bool:
        return step == total or step % max(1, total // 20) == 0 or step == 1

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Takes the bar away; also after an error, which on_train_end never sees."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def clock(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def draw_curves(
    path: Path, history: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]
) -> None:
    """Loss (training, its running mean, held out) and learning rate by step, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # needs no display
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    steps, losses = [h["step"] for h in history], [h["loss"] for h in history]
    top.plot(steps, losses, color="0.75", linewidth=1, label="training, each step")
    window = max(1, len(losses) // 20)
    if window > 1:
        means = [
            statistics.fmean(losses[max(0, i + 1 - window) : i + 1]) for i in range(len(losses))
        ]
        top.plot(steps, means, color="C0", label=f"training, mean of {window} steps")
    if evaluations:
        top.plot(
            [e["step"] for e in evaluations],
            [e["loss"] for e in evaluations],
            "o-",
            color="C1",
            label="held out",
        )
    top.set_ylabel("loss (nats a token)")
    top.legend()
    top.grid(alpha=0.3)
    bottom.plot(steps, [h["learning_rate"] for h in history], color="C2")
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("step")
    bottom.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
