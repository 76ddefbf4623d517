"""``qlora serve``: the command line."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path

from ..finetune.errors import BadInput

__all__ = ["add_arguments", "run"]

KEY = "QLORA_API_KEY"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``qlora serve``."""
    add = parser.add_argument
    add("--model", help="folder or hub id of the base model [that of the first adapter]")
    add(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="a PEFT adapter and the name that clients ask for; can be given again",
    )
    add("--name", help="the base model's name for clients [its folder's]")
    add("--host", default="127.0.0.1", help="address to bind to [%(default)s]")
    add("--port", type=int, default=8000, help="0 takes any free one [%(default)s]")
    add(
        "--api-key",
        "--api_key",
        dest="api_key",
        help=f"what clients must send; also from the environment's {KEY}. Any other than the local "
        "address needs one",
    )
    add("--quant_type", default="nf4", help="4-bit format, or none for 16 bits [%(default)s]")
    add("--dtype", default="auto", help="of what is not quantized [%(default)s]")
    add("--max_batch", type=int, default=16, help="requests generated together [%(default)s]")
    add("--max_queue", type=int, default=64, help="requests that may wait [%(default)s]")
    add("--context", type=int, help="longest prompt and reply together [the model's, up to 8192]")
    add("--cache_tokens", type=int, help="tokens that the key-value cache holds in all")
    add("--max_body", type=int, default=1 << 20, help="bytes of a request's body [%(default)s]")


def parse_adapters(words: Sequence[str], base: str) -> dict[str, str]:
    """Folders by name, of ``NAME=FOLDER`` words.

    Raises:
        BadInput: a word of another form, a name twice, or the base's.
    """
    adapters: dict[str, str] = {}
    for word in words:
        name, mark, folder = word.partition("=")
        if not mark:
            name, folder = Path(word).name, word
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,63}", name) or not folder:
            raise BadInput(
                f"--adapter {word} is not NAME=FOLDER, with a name of letters, digits, . _ : and -"
            )
        if name in adapters or name == base:
            raise BadInput(f"--adapter {word}: the name {name} is taken; give another")
        adapters[name] = folder
    return adapters


def base_name(model: str | None, adapters: Sequence[str], name: str | None) -> str:
    """The name that clients ask the base by."""
    if name is not None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,63}", name):
            raise BadInput(f"--name {name} may hold letters, digits, . _ : / and -")
        return name
    if model is None:
        return "base"
    folder = Path(model).expanduser()
    word = (folder.parent if folder.is_file() else folder.absolute()).name
    return re.sub(r"[^A-Za-z0-9._:-]+", "-", word).strip("-._:")[:64] or "base"


def run(arguments: argparse.Namespace) -> int:
    """Runs ``qlora serve`` until it is interrupted."""
    from rich.console import Console

    from .engine import Engine, check_limits
    from .guard import Guard, is_local, listen, make_server

    local = is_local(arguments.host)
    key = arguments.api_key if arguments.api_key is not None else os.environ.get(KEY)
    if key is not None and (not key.isascii() or not key.isprintable() or not key.strip()):
        raise BadInput("the API key must be of printable ASCII characters, and not empty")
    if key is None and not local:
        raise BadInput(
            f"host {arguments.host} can be reached by others: give --api-key, or {KEY} in the "
            "environment"
        )
    check_limits(
        max_batch=arguments.max_batch,
        max_queue=arguments.max_queue,
        context=arguments.context,
        cache_tokens=arguments.cache_tokens,
        max_body=arguments.max_body,
    )
    name = base_name(arguments.model, arguments.adapter, arguments.name)
    adapters = parse_adapters(arguments.adapter, name)
    # Before a model is loaded: minutes later is late to hear of a port that is taken.
    listener = listen(arguments.host, arguments.port)
    try:
        from .adapters import load_served
        from .app import Server, create_app

        console = Console(highlight=False)
        served = load_served(arguments.model, adapters, arguments.quant_type, arguments.dtype)
        engine = Engine(
            served.model,
            served.mixer,
            max_batch=arguments.max_batch,
            max_queue=arguments.max_queue,
            context=arguments.context,
            cache_tokens=arguments.cache_tokens,
        )
        engine.start()
        app = create_app(Server(engine, name, served.adapters, served.tokenizers))
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        console.print(f"{', '.join([name, *adapters])} at http://{shown}:{port}")
        console.print(
            f"[dim]chat in the browser there; OpenAI's API at http://{shown}:{port}/v1[/]"
        )
        guarded = Guard(app, api_key=key, local=local, max_body=arguments.max_body)
        try:
            make_server(guarded).run(sockets=[listener])
        finally:
            engine.stop()
    finally:
        listener.close()
    return 0
