"""``qlora sweep``: the arguments, the presets, the run."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..finetune.checkpoint import replace_file
from ..finetune.errors import BadInput, RunError, bad_input
from .questions import QUESTIONS, Sources, preset

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``qlora sweep``."""
    parser.usage = "qlora sweep [sweep.yaml] [--question NAME] [options]"
    add = parser.add_argument
    add("config", nargs="?", help="YAML file: settings, vary, datasets, evaluations, ...")
    add("--question", metavar="NAME", help=f"a preset: {', '.join(QUESTIONS)}")
    add("--output_dir", help="the sweep's folder, on every machine the same [qlora-sweep]")
    add("--workers", type=int, help="finetunes at a time on this machine [one a GPU, else 1]")
    add("--storage", metavar="URL", help="Optuna storage in place of the journal in output_dir: "
        "sqlite:///FILE, postgresql://..., mysql://...")  # fmt: skip
    add("--retries", type=int, help="how often a failed finetune is tried again [1]")
    add("--retry_failed", action="store_true", help="try those again that failed for good")
    add("--no_wait", action="store_true", help="leave when other machines run the last finetunes")
    add("--dry_run", action="store_true", help="show what would be run, and stop")
    add("--report", action="store_true", help="write table and plot of what is there, and stop")
    add("--trial", help=argparse.SUPPRESS)
    group = parser.add_argument_group("presets")
    add = group.add_argument
    add("--model_name_or_path", help="the base model [SmolLM2-135M, as in qlora demo]")
    add("--data", metavar="FILE", help="quality-or-quantity: the clean source [python-docs]")
    add("--noise", metavar="FILE", help="quality-or-quantity: where noise comes from [replies of "
        "other questions]")  # fmt: skip
    add("--chat", metavar="FILE", help="chat-or-knowledge: conversations")
    add("--knowledge", metavar="FILE", help="chat-or-knowledge: questions and facts [python-docs]")
    add("--mmlu", metavar="FOLDER", help="chat-or-knowledge: MMLU's CSV files, to measure by")
    add("--size", type=int, help="samples of the largest set [as many as there are]")
    add("--held_out", type=int, help="samples that measure [100]")
    add("--seeds", type=int, help="finetunes of each set [3]")
    add("--set", metavar="NAME=VALUE", action="append", default=[],
        help="a setting of `qlora finetune`, as max_steps=100")  # fmt: skip


_OF_PRESETS = "model_name_or_path data noise chat knowledge mmlu size held_out seeds".split()


def run(arguments: argparse.Namespace) -> int:
    """Runs ``qlora sweep``; returns the exit code."""
    if arguments.trial:
        from .trial import run_trial

        run_trial(Path(arguments.trial))
        return 0
    from .spec import read_spec

    values, where = _values(arguments)
    for name in ("output_dir", "retries"):
        if getattr(arguments, name) is not None:
            values[name] = getattr(arguments, name)
    spec = read_spec(values, where)
    if arguments.workers is not None and arguments.workers < 1:
        raise BadInput(f"--workers is {arguments.workers}; it must be at least 1")
    folder = Path(spec.output_dir).expanduser()
    return _sweep(arguments, spec, values, folder)


def _values(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The YAML file's values, the preset's beneath them, and what messages call them."""
    from ..finetune.config import read_yaml

    given = read_yaml(arguments.config) if arguments.config else {}
    question = arguments.question or given.get("question")
    if question is None:
        used = [n for n in _OF_PRESETS if getattr(arguments, n) is not None]
        if used or arguments.set:
            raise BadInput(f"--{(used or ['set'])[0]} belongs to --question")
        if not arguments.config:
            raise BadInput(f"give a YAML file, or --question with one of: {', '.join(QUESTIONS)}")
        return given, str(arguments.config)
    if question not in QUESTIONS:
        from .spec import nearest

        raise BadInput(
            f"there is no question {question!r}{nearest(str(question), QUESTIONS)}; there are: "
            f"{', '.join(QUESTIONS)}"
        )
    if given.get("datasets"):  # written out by this command, perhaps changed: the whole of it
        return {**given, "question": question}, str(arguments.config)
    settings = dict(given.get("settings") or {})
    settings |= _settings(arguments.set)
    model = arguments.model_name_or_path or settings.get("model_name_or_path")
    if model is None and "recipe" not in settings:
        from ..demo import converted_model

        model = str(converted_model(None))
    if model is not None:
        settings["model_name_or_path"] = model
    found = preset(question, _sources(arguments), settings)
    return {
        **found,
        **{k: v for k, v in given.items() if k != "settings"},
    }, f"--question {question}"


def _settings(words: Sequence[str]) -> dict[str, Any]:
    found = {}
    for word in words:
        name, sign, value = word.partition("=")
        if not sign or not name.strip():
            raise BadInput(f"--set {word!r} is not NAME=VALUE")
        try:
            found[name.strip().replace("-", "_")] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise BadInput(f"--set {word!r}: {value!r} cannot be read") from error
    return found


def _sources(arguments: argparse.Namespace) -> Sources:
    given: dict[str, Any] = {
        name: _source(name, getattr(arguments, name))
        for name in ("data", "noise", "chat", "knowledge")
        if getattr(arguments, name) is not None
    }
    for name in ("mmlu", "size", "held_out", "seeds"):
        if getattr(arguments, name) is not None:
            given[name] = getattr(arguments, name)
    if given.get("held_out", 1) < 1:
        raise BadInput(f"--held_out is {given['held_out']}; it must be at least 1")
    return Sources(**given)


def _source(name: str, text: str) -> dict[str, Any]:
    """A file's name, or in braces source, format and columns."""
    if not text.lstrip().startswith("{"):
        return {"source": text}
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise BadInput(f"--{name}: {text!r} is not a mapping: {error}") from error
    if not isinstance(value, dict) or "source" not in value:
        raise BadInput(f"--{name}: {text!r} needs a source, as in {{source: a.jsonl}}")
    return value


def _sweep(
    arguments: argparse.Namespace, spec: Any, values: Mapping[str, Any], folder: Path
) -> int:
    from rich.console import Console
    from rich.markup import escape

    from .plan import make_plan
    from .queue import Queue, summary
    from .report import collect, make_report, to_markdown, write_report
    from .worker import Crew, visible_devices

    console = Console(highlight=False, soft_wrap=True)
    say = lambda text: console.print(escape(text))  # noqa: E731
    planned = make_plan(spec, folder, _check)
    if arguments.dry_run:
        for p in planned:
            say(f"{p.key}  " + ", ".join(f"{k} {v}" for k, v in p.point.items()))
        say(f"{len(planned)} finetunes")
        return 0
    goal = spec.goal
    minimize = goal is None or goal.smaller_is_better
    queue = Queue(folder, planned, spec.retries, arguments.storage, minimize=minimize)
    _write_out(folder, values, arguments.config)
    if not arguments.report:
        queue.fill(arguments.retry_failed)
        counts = ", ".join(f"{n} {what}" for what, n in summary(queue).items() if n)
        devices = visible_devices()
        workers = arguments.workers or max(1, len(devices))
        say(f"{len(planned)} finetunes in {folder}: {counts}; {workers} at a time here")
        Crew(
            queue,
            workers,
            devices,
            lambda result: result.value(spec.objective),
            keep=spec.keep,
            say=say,
            wait=not arguments.no_wait,
        ).run()
    results, failures = collect(queue, planned), queue.failures()
    if failures and not results and not queue.pending():
        raise RunError(_all_failed(planned, failures))
    report = make_report(spec, planned, results, failures)
    write_report(folder, report)
    console.print(escape(to_markdown(report)))
    say(f"sweep.md, sweep.json and sweep.png are in {folder}")
    return 0


def _all_failed(planned: Sequence[Any], failures: Sequence[Any]) -> str:
    """Each reason once, with how many failed of it and one of them by name."""
    points = {p.key: p.point for p in planned}
    reasons: dict[str, list[Any]] = {}
    for failure in failures:
        reasons.setdefault(failure.why, []).append(failure)
    told = []
    for why, those in reasons.items():
        first = ", ".join(f"{k} {v}" for k, v in points[those[0].key].items())
        more = f" and {len(those) - 1} more" if len(those) > 1 else ""
        told.append(f"  {first}{more}: {why}")
    return (
        f"all {len(failures)} finetunes failed; nothing to report. Mend the cause and give "
        "--retry_failed. What each said (all of it is in output.txt of its folder in trials/):\n"
        + "\n".join(told)
    )


def _check(settings: Mapping[str, Any]) -> None:
    """What `qlora finetune` would refuse is refused before the first one starts."""
    from ..finetune.config import resolve
    from ..finetune.data import read_records
    from ..finetune.data.files import READERS

    config = resolve(settings)
    for name in (config.dataset_name, config.eval_dataset):
        if name and Path(name).suffix.lower() in READERS and not Path(name).exists():
            with bad_input():
                read_records(name, 1)  # which says so, with the nearest name


def _write_out(folder: Path, values: Mapping[str, Any], config: str | None) -> None:
    """The sweep as a file of its own: what a preset has set can be read and changed there."""
    path = folder / "sweep.yaml"
    if config and path.exists() and os.path.samefile(config, path):
        return
    text = yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)
    replace_file(path, lambda aside: aside.write_text(text, "utf-8"))
