"""``qlora formats``: number formats compared, on this package's kernels."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from ..finetune.errors import BadInput
from .contenders import CONTROLS, Design, designs, find_design, grid
from .userfiles import SUFFIXES, read_designs
from .weights import SYNTHETIC

__all__ = ["add_arguments", "run"]


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _numbers(kind: Any) -> Any:
    def read(text: str) -> list[Any]:
        try:
            return [kind(word) for word in _words(text)]
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers") from error

    return read


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``qlora formats``."""
    add = parser.add_argument
    add(
        "--formats",
        type=_words,
        metavar="A,B,FILE",
        help="formats by name, or files that define some (.py, .json, .yaml); all by default",
    )
    add("--list", action="store_true", help="say which formats there are, and stop")
    add(
        "--blocksizes",
        type=_numbers(int),
        default=[64],
        metavar="N,M",
        help="values a scale; formats that fix theirs keep it [64]",
    )
    add(
        "--double_quant",
        choices=("both", "yes", "no"),
        default="both",
        help="of the scales [%(default)s]",
    )
    add(
        "--weights",
        type=_words,
        metavar="KIND,...",
        help=f"drawn weights: {', '.join(SYNTHETIC)}; all where no model is given",
    )
    add("--layers", type=int, default=12, help="drawn weights of a kind [%(default)s]")
    add(
        "--model",
        metavar="MODEL",
        help="a folder of 16-bit weights, a hub id, smollm2, or self-trained",
    )
    add(
        "--text",
        default="python-docs",
        metavar="FILE",
        help="for perplexity and finetunes: a text file [%(default)s]",
    )
    add("--windows", type=int, default=16, help="of text that is measured on [%(default)s]")
    add("--length", type=int, default=128, help="tokens a window [%(default)s]")
    add(
        "--tokens",
        type=int,
        default=256,
        help="inputs of each layer that outputs are compared on [%(default)s]",
    )
    add("--finetune", action="store_true", help="also finetune each of --finetune_formats")
    add(
        "--finetune_formats",
        type=_words,
        default=["nf4", "nf4-dq", "fp4", "int4", *CONTROLS],
        metavar="A,B",
        help="bases beside the 16-bit one: nf4, nf4-dq, nf4-128 "
        "[nf4,nf4-dq,fp4,int4 and the controls]",
    )
    add(
        "--lora-where",
        action="store_true",
        help="also compare full finetuning with LoRA on some layers and at several ranks, then "
        "formats on the fully finetuned model",
    )
    add(
        "--where_base",
        default="nf4-dq",
        help="the base under those adapters, or 16-bit [%(default)s]",
    )
    add(
        "--ranks",
        type=_numbers(int),
        default=[8, 16, 64, 256],
        metavar="R,S",
        help="of LoRA on all layers [8,16,64,256]",
    )
    add("--seeds", type=int, default=3, help="of each finetune [%(default)s]")
    add("--steps", type=int, default=24, help="of each finetune [%(default)s]")
    add("--batch", type=int, default=4, help="windows a step [%(default)s]")
    add("--rank", type=int, default=16, help="of LoRA elsewhere [%(default)s]")
    add(
        "--learning_rates",
        type=_numbers(float),
        default=[1e-3],
        metavar="X,Y",
        help="of LoRA; of several each method of --lora-where gets its best [0.001]",
    )
    add(
        "--full_learning_rates",
        type=_numbers(float),
        default=[1e-4],
        metavar="X,Y",
        help="of full finetuning [0.0001]",
    )
    add(
        "--output_dir",
        default="qlora-formats",
        help="tables, plots and finished cells [%(default)s]",
    )
    add("--from_json", metavar="FILE", help="print and draw these results, measure nothing")


def run(arguments: argparse.Namespace) -> int:
    """Runs ``qlora formats``; returns the exit code."""
    from rich.console import Console

    from . import report
    from .plots import draw_all

    console = Console(highlight=False)
    folder = Path(arguments.output_dir).expanduser()
    if arguments.from_json:
        results = report.read_results(arguments.from_json)
    else:
        chosen, known = _designs(arguments.formats)
        if arguments.list:
            for design in known.values():
                console.print(f"{design.name:10} {design.about}", markup=False)
            return 0
        _check(arguments)
        results = _measure(arguments, chosen, known, folder, console)
    report.write(results, folder)
    draw_all(results, folder)
    console.print(report.markdown(results), markup=False, soft_wrap=True)
    console.print(f"results.json, table.md and plots are in {folder}", markup=False)
    return 0


def _designs(given: list[str] | None) -> tuple[list[Design], dict[str, Design]]:
    """What is to be compared, and everything that there is to name."""
    known, chosen = designs(), []
    for name in given or []:
        if name.endswith(SUFFIXES) or "/" in name:
            found = read_designs(name)
            known |= {design.name: design for design in found}
            chosen += found
        else:
            chosen.append(find_design(name, known))
    if given is None:
        return list(known.values()), known
    # The controls, and what all is compared with, are always there.
    for name in ("nf4", *CONTROLS):
        if all(design.name != name for design in chosen):
            chosen.append(known[name])
    return chosen, known


def _check(arguments: argparse.Namespace) -> None:
    for name in ("layers", "windows", "seeds"):
        if getattr(arguments, name) < 2:
            raise BadInput(f"--{name} must be at least 2: one value has no interval")
    for name in ("length", "tokens", "steps", "batch", "rank"):
        if getattr(arguments, name) < 1:
            raise BadInput(f"--{name} must be at least 1")
    for name in ("learning_rates", "full_learning_rates", "ranks", "blocksizes"):
        if not getattr(arguments, name) or min(getattr(arguments, name)) <= 0:
            raise BadInput(f"--{name} must be numbers above 0")
    if arguments.model is None and (arguments.finetune or arguments.lora_where):
        raise BadInput("--finetune and --lora-where need a --model")
    unknown = [kind for kind in arguments.weights or [] if kind not in SYNTHETIC]
    if unknown:
        raise BadInput(f"there are no {unknown[0]!r} weights: {', '.join(SYNTHETIC)} can be drawn")


def _measure(
    arguments: argparse.Namespace,
    chosen: list[Design],
    known: dict[str, Design],
    folder: Path,
    console: Any,
) -> dict[str, Any]:
    import torch

    from ..finetune.trainer import describe_machine
    from . import report
    from .cells import Cells
    from .models import model_folder
    from .recover import Recipe
    from .study import ModelStudy, finetune_contenders, study_synthetic

    def say(text: str) -> None:
        console.print(text, markup=False)

    contenders = grid(chosen, arguments.blocksizes, arguments.double_quant)
    bases = finetune_contenders(arguments.finetune_formats, known)
    under = None
    if arguments.where_base != "16-bit":
        (under,) = finetune_contenders([arguments.where_base], known)
    cells = Cells(folder / "cells.jsonl")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results: dict[str, Any] = {
        "schema": report.SCHEMA,
        "kind": "qlora formats",
        "command": _command(arguments),
        "machine": describe_machine(torch.device(device)),
        "sources": [],
    }
    drawn = arguments.weights
    if drawn is None:
        drawn = [] if arguments.model else list(SYNTHETIC)
    if not drawn and not arguments.model:
        raise BadInput("nothing to compare on: give --weights or --model")
    for kind in drawn:
        results["sources"].append(study_synthetic(kind, contenders, cells, arguments.layers, say))
    if arguments.model:
        path = model_folder(arguments.model, folder, say)
        options = {
            "text": arguments.text,
            "length": arguments.length,
            "test": arguments.windows,
            "validation": max(2, arguments.windows // 2),
            "tokens": arguments.tokens,
        }
        name = Path(arguments.model).name
        study = ModelStudy(path, name, cells, say, **options)
        results["sources"].append(study.formats(contenders))
        recipe = Recipe(arguments.steps, arguments.batch)
        if arguments.finetune:
            results["finetune"] = study.finetune(
                bases, recipe, arguments.seeds, arguments.rank, arguments.learning_rates[0]
            )
        if arguments.lora_where:
            full = folder / "fully-finetuned"
            results["where"] = study.where(
                under, recipe, arguments.seeds, arguments.rank, arguments.ranks,
                arguments.learning_rates, arguments.full_learning_rates, full,
            )  # fmt: skip
            again = ModelStudy(full, f"{name}, fully finetuned", cells, say, **options)
            results["sources"].append(again.formats(contenders))
    if cells.found:
        say(f"{cells.found} finished cells were taken from {cells.path}")
    return results


def _command(arguments: argparse.Namespace) -> str:
    """The command that gives these results again, without what is as by default."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = ["qlora", "formats"]
    for name, value in vars(arguments).items():
        if not hasattr(parser.parse_args([]), name) or value == parser.get_default(name):
            continue
        flag = "--lora-where" if name == "lora_where" else f"--{name}"
        if value is True:
            words.append(flag)
        else:
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            words += [flag, shlex.quote(text)]
    return " ".join(words)
