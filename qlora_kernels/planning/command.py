"""``qlora plan``: the arguments, the model and the place that they name, the call."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from ..emulator.devices import DEVICES, get_device
from ..finetune.errors import BadInput, RunError, bad_input
from .recipe import OPTIMIZERS, Place, Recipe

_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_RECIPE = Recipe()


def memory_size(text: str) -> int:
    """``24GB``, ``24GiB``, ``500 MB`` or a number of bytes. Raises BadInput for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text.lower())
    if not found or float(found[1]) <= 0:
        raise BadInput(f"--memory: {text!r} is no amount of memory, such as 24GB or 24GiB")
    unit = _UNITS[found[2]]
    if found[3]:
        unit = {10**3: 2**10, 10**6: 2**20, 10**9: 2**30, 10**12: 2**40}.get(unit, unit)
    return int(float(found[1]) * unit)


def _truth(text: str) -> bool:
    if text.lower() in ("true", "yes", "1", "on"):
        return True
    if text.lower() in ("false", "no", "0", "off"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "model", nargs="?",
        help="a name (llama-13b, Qwen/Qwen3-8B), a size (13b), a model's folder or config.json",
    )  # fmt: skip
    place = parser.add_mutually_exclusive_group()
    place.add_argument(
        "--device", help=f"a GPU: {', '.join(DEVICES)}; or cpu. Without: what is here"
    )
    place.add_argument("--memory", help="a GPU's memory, such as 24GB")
    add("--max_length", "--length", type=_positive, default=_RECIPE.max_length, help="tokens a row")
    add(
        "--per_device_train_batch_size", "--batch", type=_positive, metavar="ROWS",
        default=_RECIPE.per_device_train_batch_size, help="rows of a micro-batch",
    )  # fmt: skip
    add(
        "--gradient_accumulation_steps", type=_positive, metavar="N",
        default=_RECIPE.gradient_accumulation_steps, help="micro-batches a step",
    )  # fmt: skip
    add("--r", "--rank", type=_positive, default=_RECIPE.r, help="LoRA's rank")
    add(
        "--target_modules", "--targets", default=_RECIPE.target_modules,
        help="all-linear, or names with commas between: q_proj,v_proj",
    )  # fmt: skip
    add("--optim", default=_RECIPE.optim, help=", ".join(OPTIMIZERS))
    add("--activation_checkpointing", "--checkpointing", type=_truth, default=True, metavar="BOOL")
    add("--dtype", default=_RECIPE.dtype, help="of what is not quantized: bf16, fp16 or fp32")
    add("--quant_type", default=_RECIPE.quant_type, help="nf4, fp4, int4, ...; none for 16 bits")
    add("--blocksize", type=_positive, default=_RECIPE.blocksize)
    add("--double_quant", type=_truth, default=True, metavar="BOOL")
    add("--attn_implementation", default=_RECIPE.attn_implementation)
    add("--tokens", type=float, help="of the whole run; Guanaco's 1,875 steps of 16 rows without")
    add("--explain", action="store_true", help="what it would take without each saving")
    add("--no-speed", action="store_true", help="memory alone; nothing is measured")
    add("--json", metavar="FILE", help="the plan as JSON; - prints it and nothing else")
    add("--plot", metavar="PNG", help="the plan as a picture; needs no display")
    add("--from", dest="saved", metavar="FILE", help="draw a plan that --json wrote")
    add("--article", action="store_true", help="the QLoRA article's memory table, recomputed")


# --- what the arguments name ----------------------------------------------------------------------


def find_place(device: str | None, memory: str | None) -> Place:
    """The GPU or machine that is planned for.

    Raises:
        BadInput: an unknown GPU (the nearest are told), or no amount of memory.
    """
    import torch

    from .machine import available_memory

    if memory is not None:
        return Place(f"a GPU of {memory}", memory_size(memory))
    if device is not None and device.lower() != "cpu":
        with bad_input("--device"):
            known = get_device(device)
        return Place(known.name, known.memory, known)
    if device is None and torch.cuda.is_available():
        limit, name = available_memory("cuda")
        try:
            here = get_device(name)
        except ValueError:
            return Place(name, limit, notes=(f"{name} is not in the table: no speed is modelled",))
        return Place(name, limit, here)
    limit, who = available_memory()
    return Place(who, limit, gpu=False)


def find_recipe(arguments: argparse.Namespace) -> Recipe:
    """The recipe of the arguments.

    Raises:
        BadInput: an unknown dtype, format, blocksize or optimizer.
    """
    from ..formats import check_blocksize, get_format

    dtype = _DTYPES.get(arguments.dtype, arguments.dtype)
    if dtype not in _DTYPES.values():
        raise BadInput(f"--dtype: {arguments.dtype!r} is none of {', '.join(_DTYPES)}")
    if arguments.quant_type != "none":
        with bad_input("--quant_type"):
            get_format(arguments.quant_type)
    with bad_input("--blocksize"):
        check_blocksize(arguments.blocksize)
    targets = arguments.target_modules
    if targets != "all-linear":
        targets = tuple(name.strip() for name in targets.split(",") if name.strip())
    recipe = Recipe(
        arguments.max_length, arguments.per_device_train_batch_size,
        arguments.gradient_accumulation_steps, arguments.r, targets, arguments.optim,
        arguments.activation_checkpointing, dtype, arguments.quant_type, arguments.blocksize,
        arguments.double_quant, arguments.attn_implementation,
    )  # fmt: skip
    recipe.optimizer()  # a name that is unknown is told now
    return recipe


def check_targets(config: Any, targets: str | tuple[str, ...]) -> None:
    """Raises BadInput for names that no linear layer of the model has; the nearest is told."""
    import difflib

    from .models import linear_shapes

    if targets == "all-linear":
        return
    known = list(dict.fromkeys(name for name, _, _ in linear_shapes(config)))
    for name in targets:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise BadInput(
                f"--target_modules: no linear layer is called {name!r}{hint} ({', '.join(known)})"
            )


# --- the call -----------------------------------------------------------------------------------


def make(arguments: argparse.Namespace, say: Any = lambda text: None) -> dict[str, Any]:
    """The plan that the arguments ask for, as JSON has it."""
    from .advice import frozen, what_makes_it_fit, what_to_change
    from .calibrate import calibrate
    from .models import find_model
    from .recipe import make_plan
    from .render import plan_json, size
    from .speed import ARTICLE_BATCH, ARTICLE_STEPS, gpu_forecast

    if not arguments.model:
        raise BadInput("which model? A name, a size (13b), a folder or a config.json")
    if arguments.tokens is not None and not arguments.tokens > 0:
        raise BadInput(f"--tokens is {arguments.tokens}; it must be above 0")
    recipe = find_recipe(arguments)
    place = find_place(arguments.device, arguments.memory)
    name, config = find_model(arguments.model)
    check_targets(config, recipe.target_modules)
    plan = make_plan(config, recipe, place)

    def plan_of(other: Recipe) -> Any:
        say(f"planning {other.optim}, {other.max_length} tokens, r={other.r}")
        return make_plan(config, other, place)

    advice = what_to_change(recipe, plan_of) if plan.excess else []
    if plan.excess and not advice:
        plan.notes.append(
            f"the base model alone takes {size(frozen(plan))}: no setting makes it fit, but more "
            "memory or a smaller model"
        )
    without = what_makes_it_fit(recipe, plan_of) if arguments.explain else []
    speed = None
    if not arguments.no_speed:
        if place.device is not None:
            speed = gpu_forecast(config, recipe, place.device)
        elif not place.gpu and not plan.excess:
            try:
                speed = calibrate(config, recipe, say=say)
            except RunError as error:
                plan.notes.append(str(error))
    tokens = arguments.tokens or ARTICLE_STEPS * ARTICLE_BATCH * recipe.max_length
    return plan_json(
        name, recipe, place, plan, advice=advice, without=without, speed=speed, tokens=tokens
    )


def run(arguments: argparse.Namespace) -> int:
    """Prints, writes and draws what was asked for."""
    from rich.console import Console

    from .article import article_table, full_finetuning
    from .render import article_lines, draw, plot, read_plan

    quiet = arguments.json == "-"
    console, progress = Console(quiet=quiet), Console(stderr=True)
    if arguments.article:
        rows = article_table()
        if arguments.json:
            data = {"schema": 1, "kind": "article", "rows": [row.to_json() for row in rows]}
            return _leave(data, arguments.json)
        console.print(article_lines(rows, full_finetuning()))
        return 0
    if arguments.saved:
        data = read_plan(Path(arguments.saved).expanduser())
    else:
        data = make(arguments, lambda text: progress.print(f"[dim]{text}[/]"))
    if not quiet:
        draw(data, console)
    if arguments.plot:
        plot(data, Path(arguments.plot).expanduser())
    if arguments.json:
        _leave(data, arguments.json)
    return 0


def _leave(data: dict[str, Any], where: str) -> int:
    from ..finetune.checkpoint import replace_file

    text = json.dumps(data, indent=2) + "\n"
    if where == "-":
        print(text, end="")
    else:
        path = Path(where).expanduser()
        with bad_input(f"--json {where}"):
            replace_file(path, lambda p: p.write_text(text, "utf-8"))
    return 0
