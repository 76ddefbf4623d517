"""``qlora guanaco``: the paper's way of working, small, from a recipe to a report.

The recipe ``guanaco-7b --scale tiny`` is trained on SmolLM2-135M, twice: once as it stands, and
once for a sixth of its steps. With the untrained model that makes three rivals. They answer
questions, a judge compares the answers, an Elo ladder is drawn, probes are run, a blind test for
people is prepared, and one HTML page says what came out.

Every stage is a `qlora` command in a process of its own, printed before it starts: what is done
here can be done by hand. Each goes on where it was when it is started again, and so does the whole.

The judge is a stand-in: a rule of a few lines behind the real HTTP interface. **Its verdicts mean
nothing**, neither about the models nor about ChatGPT; with ``--endpoint`` and ``--judge`` a real
one takes its place.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .finetune.errors import BadInput, RunError

RECIPE = "guanaco-7b"
BRIEF = 6  # the rival that was trained briefly has this share of the steps
PORT = 8399  # the stand-in judge's, if it is free
RIVALS = ("base", "brief", "guanaco")
_HERE = Path(__file__).parent
QUESTIONS = _HERE / "evaluate" / "questions.jsonl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``qlora guanaco``."""
    add = parser.add_argument
    add("--output_dir", default="qlora-guanaco", help="what it leaves [%(default)s]")
    add("--model", help="base model [SmolLM2-135M-Instruct, as in qlora demo]")
    add("--questions", help="JSONL, as Vicuna's [eight of this project's]")
    add("--limit", type=int, default=8, help="questions that are asked, at most [%(default)s]")
    add("--steps", type=int, default=30, help="of the finetune [%(default)s]")
    add("--new_tokens", type=int, default=64, help="longest reply [%(default)s]")
    add("--probe_items", type=int, default=8, help="items a probe [%(default)s]")
    add("--endpoint", help="base URL of a judge [a stand-in, started here]")
    add("--judge", help="the judge model's name there")
    add("--arena", action="store_true", help="open the blind test when all is done")


def run(arguments: argparse.Namespace) -> int:
    """Runs ``qlora guanaco``; returns the exit code."""
    if min(arguments.limit, arguments.new_tokens, arguments.probe_items) < 1:
        raise BadInput("--limit, --new_tokens and --probe_items must be at least 1")
    if arguments.steps < BRIEF:
        raise BadInput(f"--steps must be at least {BRIEF}: a rival has a sixth of them")
    if (arguments.endpoint is None) != (arguments.judge is None):
        raise BadInput("--endpoint and --judge go together: where the judge is, and its name there")
    questions = Path(arguments.questions or QUESTIONS)
    if not questions.is_file():
        raise BadInput(f"--questions: there is no file {questions}")
    from .demo import converted_model

    begin = time.monotonic()
    out = Path(arguments.output_dir).expanduser()
    out.mkdir(parents=True, exist_ok=True)
    base = Path(arguments.model) if arguments.model else converted_model(None)
    stages = Stages(out)
    for name, steps in (("guanaco", arguments.steps), ("brief", arguments.steps // BRIEF)):
        stages.run(
            f"Finetune: the recipe {RECIPE} at the scale tiny, {steps} steps",
            "finetune", "--recipe", RECIPE, "--scale", "tiny", "--model_name_or_path", base,
            "--output_dir", out / name, "--max_steps", steps,
        )  # fmt: skip
    models = {"base": str(base)}
    models |= {name: f"{base},adapter={out / name}" for name in ("brief", "guanaco")}
    rivals = [word for name in RIVALS for word in ("--model", f"{name}={models[name]}")]
    replies, judgments = out / "replies.jsonl", out / "judgments.jsonl"
    stages.run(
        "Replies: three models, the same questions, the paper's sampling",
        "generate", *rivals, "--questions", questions, "--limit", arguments.limit,
        "--max_new_tokens", arguments.new_tokens, "--output", replies,
    )  # fmt: skip
    with judge_endpoint(arguments.endpoint, arguments.judge) as (url, judge):
        stages.run(
            "Judge: points against the base's reply, and every pair, in both orders",
            "judge", "--replies", replies, "--baseline", "base", "--endpoint", url,
            "--judge", judge, "--output", judgments, "--pairs", "--yes",
        )  # fmt: skip
    stages.run(
        "Elo: the ladder, with intervals",
        "elo", judgments, "--output", out / "elo.json", "--plot", out / "ladder.png",
    )  # fmt: skip
    stages.run(
        "Probes: what the paper found its models good and bad at",
        "probe", *rivals, "--items", arguments.probe_items, "--output", out / "probe.json",
    )  # fmt: skip
    arena = ["arena", "--replies", replies, "--votes", out / "votes.sqlite"]
    stages.shown("Arena: the blind test for people, ready to be opened", *arena)
    report = out / "report.html"
    minutes = (time.monotonic() - begin) / 60
    write_report(report, out, stages, arguments.endpoint is None, minutes)
    print(f"\n{report}: the report, after {minutes:.1f} minutes\n{stages.told[-1]}: the arena")
    if arguments.arena:
        stages.run("Arena", *arena)
    return 0


class Stages:
    """Runs `qlora` commands in turn; ``told`` keeps them, ``said`` what they printed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.titles: list[str] = []
        self.told: list[str] = []
        self.said: list[str] = []

    def shown(self, title: str, *words: Any) -> list[str]:
        """Names a command without running it."""
        command = ["qlora", *map(str, words)]
        self.titles.append(title)
        self.told.append(shlex.join(command))
        self.said.append("")
        print(f"\n== {title}\n{self.told[-1]}", flush=True)
        return command

    def run(self, title: str, *words: Any) -> None:
        """Runs a command.

        Raises:
            RunError: it did not end well; what it said stands above.
        """
        command = [sys.executable, "-m", "qlora_kernels.cli", *self.shown(title, *words)[1:]]
        lines = []
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)
                lines.append(line)
        self.said[-1] = "".join(lines)
        if process.returncode != 0:
            raise RunError(
                f"`{self.told[-1]}` ended with exit code {process.returncode}; what it said stands "
                "above. The same command goes on from here"
            )


@contextlib.contextmanager
def judge_endpoint(url: str | None, judge: str | None) -> Iterator[tuple[str, str]]:
    """The judge's base URL and name: the one that was given, or a stand-in for as long."""
    if url is not None:
        yield url, str(judge)
        return
    from .evaluate.stand_in import NAME, StandIn, verdict

    def answer(body: dict[str, Any]) -> str:
        return verdict(body["messages"][-1]["content"]) or ""

    try:  # the same port again: answers are kept by the whole request, the URL in it
        server = StandIn(answer, PORT)
    except OSError:
        server = StandIn(answer)
    with server:
        yield server.url, NAME


# --- the report ---------------------------------------------------------------------------------


def write_report(
    file: Path, out: Path, stages: Stages, stand_in: bool, minutes: float, replies_shown: int = 3
) -> None:
    """Writes the HTML page: figures, pictures inside, every command; replies as text."""
    import jinja2

    from .evaluate.records import read_replies
    from .finetune.checkpoint import replace_file

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["figure"] = figure
    template = environment.from_string((_HERE / "guanaco.html").read_text("utf-8"))
    asked: dict[Any, dict[str, Any]] = {}
    for reply in read_replies(out / "replies.jsonl"):
        entry = asked.setdefault(reply.question_id, {"question": reply.question, "replies": {}})
        entry["replies"][reply.model] = reply.reply
    runs = {name: json.loads((out / name / "figures.json").read_text()) for name in RIVALS[1:]}
    html = template.render(
        recipe=RECIPE,
        stand_in=stand_in,
        minutes=minutes,
        rivals=RIVALS,
        runs=runs,
        summary=_json(out / "judgments.summary.json"),
        elo=_json(out / "elo.json"),
        probes=_probes(_json(out / "probe.json")),
        asked=list(asked.values())[:replies_shown],
        more=max(0, len(asked) - replies_shown),
        ladder=_picture(out / "ladder.png"),
        curves={name: _picture(out / name / "curves.png") for name in RIVALS[1:]},
        stages=list(zip(stages.titles, stages.told, stages.said, strict=True)),
        arena=stages.told[-1],
    )
    replace_file(file, lambda p: p.write_text(html, "utf-8"))


def figure(value: float | None, digits: int) -> str:
    """A number for a reader; a dash for one that there is not."""
    return "–" if value is None else f"{value:.{digits}f}"


def _json(file: Path) -> Any:
    return json.loads(file.read_text("utf-8"))


def _probes(result: dict[str, Any]) -> list[dict[str, Any]]:
    """A row a probe: the share of each rival, with its interval."""

    def cell(score: dict[str, float]) -> str:
        return f"{score['share']:.0%} ({score['low']:.0%} to {score['high']:.0%})"

    return [
        {"probe": probe["what"], "cells": [cell(probe["models"][r]["all"]) for r in RIVALS]}
        for probe in result["probes"].values()
    ]


def _picture(file: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()
