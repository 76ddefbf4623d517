"""``qlora arena``: the command line."""

from __future__ import annotations

import argparse
import json
import os
import re
from pathlib import Path
from typing import Any

from ..finetune.errors import BadInput

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``qlora arena``."""
    add = parser.add_argument
    add(
        "action",
        nargs="?",
        default="serve",
        choices=("serve", "report", "export"),
        help="serve: show pairs in the browser; report: say what the votes say; export: write them "
        "as judgments [%(default)s]",
    )
    add("--replies", action="append", help="file of replies, JSONL; can be given again")
    add("--votes", required=True, help="SQLite file that the votes are kept in")
    add("--find", metavar="MODEL", help="whose reply raters try to find [the one named ChatGPT]")
    add("--output", help="of report (JSON) and export (JSONL)")
    add("--host", default="127.0.0.1", help="address to bind to [%(default)s]")
    add("--port", type=int, default=8001, help="0 takes any free one [%(default)s]")


def find_target(models: list[str], asked: str | None) -> str | None:
    """The model that raters try to find.

    Raises:
        BadInput: it has no replies.
    """
    if asked is not None:
        if asked not in models:
            raise BadInput(f"--find {asked}: there are replies of {', '.join(models)} only")
        return asked
    named = [m for m in models if re.match(r"chat-?gpt|gpt-?[345]", m, re.IGNORECASE)]
    return named[0] if len(named) == 1 else None


def run(arguments: argparse.Namespace) -> int:
    """Runs ``qlora arena``; returns the exit code."""
    from rich.console import Console

    console = Console(highlight=False)
    action = {"serve": _serve, "report": _report, "export": _export}[arguments.action]
    action(arguments, console)
    return 0


def _serve(arguments: argparse.Namespace, console: Any) -> None:
    from ..evaluate.records import read_replies
    from ..serve.guard import Guard, is_local, listen, make_server
    from .app import create_app
    from .store import Store

    if not arguments.replies:
        raise BadInput("give --replies, as `qlora generate` writes them")
    replies = read_replies(*arguments.replies)
    models = sorted({r.model for r in replies})
    target = find_target(models, arguments.find)
    store = Store(arguments.votes, create=True)
    try:
        store.add(replies)
        listener = listen(arguments.host, arguments.port)
    except BaseException:
        store.close()
        raise
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    console.print(f"{len(models)} models, {store.progress('')[1]} pairs at http://{shown}:{port}")
    if target is None:
        console.print("[dim]no model is named ChatGPT: raters are asked to find none (--find)[/]")
    local = is_local(arguments.host)
    if not local:
        console.print("[dim]anybody who reaches this address can vote, there is no key[/]")
    try:
        app = Guard(create_app(store, target), local=local, max_body=16 << 10)
        make_server(app).run(sockets=[listener])
    finally:
        listener.close()


def _votes(arguments: argparse.Namespace) -> list[Any]:
    from .store import Store

    store = Store(arguments.votes)
    try:
        return store.votes()
    finally:
        store.close()


def _report(arguments: argparse.Namespace, console: Any) -> None:
    from .report import summarize, table

    summary = summarize(_votes(arguments))
    for part in table(summary):
        console.print(part)
    if arguments.output:
        path = Path(arguments.output)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", "utf-8")
        os.replace(temporary, path)


def _export(arguments: argparse.Namespace, console: Any) -> None:
    from ..evaluate.records import write_records
    from .report import as_judgments

    if not arguments.output:
        raise BadInput("give --output, the file of judgments to write")
    votes = _votes(arguments)
    write_records(arguments.output, as_judgments(votes))
    console.print(f"{len(votes)} judgments in {arguments.output}")
