"""``qlora probe``: the arguments, the asking, the figures. A run that is killed goes on."""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...finetune.errors import BadInput
from .items import PER_PROBE, Item, make_items
from .responders import Model, make_responder, parse_model

__all__ = ["add_arguments", "probe", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``qlora probe``."""
    add = parser.add_argument
    add(
        "--model",
        action="append",
        default=[],
        metavar="NAME=SOURCE",
        help="a folder or hub id, with ,adapter=FOLDER where there is one; or the URL of an "
        "OpenAI-compatible endpoint, with ,model=ID; the others are compared with the first",
    )
    add("--output", default="probe.json", help="where the result goes [%(default)s]")
    add("--probes", help="only these, with commas between")
    add("--items", type=int, default=PER_PROBE, help="of each probe [%(default)s]")
    add("--seed", type=int, default=0, help="of the items [%(default)s]")
    add("--batch", type=int, default=16, help="replies at a time [%(default)s]")
    add("--quant_type", default="nf4", help="4-bit format, or none for 16 bits [%(default)s]")
    add("--dtype", default="auto", help="of what is not quantized [%(default)s]")


def run(arguments: argparse.Namespace) -> int:
    """Runs ``qlora probe``; returns the exit code."""
    from ...finetune.checkpoint import replace_file
    from .report import make_report, to_markdown

    models = [parse_model(text) for text in arguments.model]
    if not models:
        raise BadInput("give --model NAME=FOLDER, once for each model")
    names = [model.name for model in models]
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice is not None:
        raise BadInput(f"two models are called {twice}")
    for name in ("items", "batch"):
        if getattr(arguments, name) < 1:
            raise BadInput(f"--{name} is {getattr(arguments, name)}; it must be at least 1")
    chosen = [p.strip() for p in arguments.probes.split(",")] if arguments.probes else None
    items = make_items(chosen, arguments.items, arguments.seed)
    output = Path(arguments.output).expanduser()
    settings = {"quant_type": arguments.quant_type, "dtype": arguments.dtype}
    replies = probe(models, items, output, arguments.batch, arguments.seed, settings)
    report = make_report(items, replies, arguments.seed)
    page = to_markdown(report)
    text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
    replace_file(output, lambda path: path.write_text(text, "utf-8"))
    replace_file(output.with_suffix(".md"), lambda path: path.write_text(page, "utf-8"))
    print(page)
    print(f"{output} has each item with its replies; {output.with_suffix('.md')} this table")
    return 0


def probe(
    models: Sequence[Model],
    items: Sequence[Item],
    output: Path,
    batch: int = 16,
    seed: int = 0,
    settings: dict[str, Any] | None = None,
) -> dict[str, dict[str, str]]:
    """All replies of all models: name -> item's id -> reply.

    Each group of replies is on the disk (``<output>.replies.jsonl``) before the next is asked for;
    what is there is not asked again.

    Raises:
        BadInput: a model that cannot be loaded, or a file of replies of something else.
    """
    from ..appender import Appender
    from ..records import Reply, read_replies

    settings = settings or {}
    path = output.with_name(output.name + ".replies.jsonl")
    with Appender(path) as file:
        there = [] if file.empty() else read_replies(path)
        found = _sorted_out(there, models, items, settings, path)
        for model in models:
            left = [item for item in items if item.id not in found[model.name]]
            if not left:
                continue
            print(f"{model.name}: {len(left)} of {len(items)} items to ask", flush=True)
            responder = make_responder(model, batch=batch, **settings)
            for group in responder.replies(left):
                file.append(
                    *(
                        Reply(
                            item.id,
                            model.name,
                            item.prompt,
                            said,
                            item.probe,
                            seed,
                            _sampling(model, settings),
                        )
                        for item, said in group
                    )
                )
                found[model.name] |= {item.id: said for item, said in group}
            del responder
            gc.collect()
    return found


def _sampling(model: Model, settings: dict[str, Any]) -> dict[str, Any]:
    source = {"source": model.source, "adapter": model.adapter, "served": model.served}
    return {"temperature": 0, **source, **settings}


def _sorted_out(
    there: Sequence[Any],
    models: Sequence[Model],
    items: Sequence[Item],
    settings: dict[str, Any],
    path: Path,
) -> dict[str, dict[str, str]]:
    """Replies that are there already, of these models to these items."""
    asked = {item.id: item.prompt for item in items}
    by_name = {model.name: model for model in models}
    found: dict[str, dict[str, str]] = {model.name: {} for model in models}
    for reply in there:
        model = by_name.get(reply.model)
        if model is None or reply.question_id not in asked:
            continue
        same = reply.question == asked[reply.question_id]
        if not same or reply.sampling != _sampling(model, settings):
            what = "another seed's items" if not same else f"another {model.name}"
            raise BadInput(
                f"{path} holds replies of {what}: name another --output, or delete that file"
            )
        found[reply.model][str(reply.question_id)] = reply.reply
    return found
