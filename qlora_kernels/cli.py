"""The command ``qlora``.

Each command is a module, imported only when it is called, with ``add_arguments(parser)`` and
``run(arguments)``; one without ``add_arguments`` gets its words as they are. What is wrong with
what the user gave ends in one line and exit code 2, a run that could not go on in 1, an interrupted
one in 128 and the signal's number; only defects have a traceback.
"""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple


class Command(NamedTuple):
    module: str
    what: str
    example: str
    extra: str = "finetune"  # the optional dependencies that it needs: qlora-kernels[extra]


# What there is, in the groups that `qlora --help` shows.
GROUPS: dict[str, dict[str, Command]] = {
    "training": {
        "finetune": Command(
            "qlora_kernels.finetune.command",
            "train LoRA adapters on a model in 4 bits",
            "qlora finetune --model_name_or_path ./SmolLM2 --dataset_name my.jsonl",
        ),
        "plan": Command(
            "qlora_kernels.planning.command",
            "say what memory and time a finetune takes, before it is run",
            "qlora plan 33b --device rtx3090",
        ),
        "sweep": Command(
            "qlora_kernels.sweep.command",
            "run many finetunes, on as many GPUs as there are, and compare them",
            "qlora sweep --question quality-or-quantity --data my.jsonl",
            "sweep",
        ),
        "chat": Command(
            "qlora_kernels.chat",
            "talk with a model and an adapter in the terminal",
            "qlora chat --adapter qlora-out",
        ),
        "merge": Command(
            "qlora_kernels.merging",
            "put an adapter into its base: a plain transformers folder",
            "qlora merge qlora-out --output merged",
        ),
        "guanaco": Command(
            "qlora_kernels.guanaco",
            "the paper's way, small: recipe, rivals, judge, ladder, probes, a report",
            "qlora guanaco",
            "judge",
        ),
        "demo": Command(
            "qlora_kernels.demo",
            "finetune SmolLM2-135M here and now, beside bitsandbytes",
            "qlora demo",
        ),
    },
    "judging": {
        "generate": Command(
            "qlora_kernels.evaluate.generate",
            "have models reply to a list of questions",
            "qlora generate --model mine=adapter=qlora-out --questions q.jsonl --output r.jsonl",
            "judge",
        ),
        "judge": Command(
            "qlora_kernels.evaluate.judge",
            "have a model judge replies, beside a baseline and in pairs",
            "qlora judge --replies replies.jsonl --baseline gpt --endpoint URL --judge gpt-4 ...",
            "judge",
        ),
        "elo": Command(
            "qlora_kernels.evaluate.elo",
            "make ratings of judgments, with intervals",
            "qlora elo judgments.jsonl --plot ladder.png",
            "judge",
        ),
        "arena": Command(
            "qlora_kernels.arena.command",
            "have people judge replies in the browser, without names",
            "qlora arena --replies replies.jsonl --votes votes.sqlite",
            "serve",
        ),
        "mmlu": Command(
            "qlora_kernels.evaluate.mmlu",
            "measure knowledge by multiple choice questions",
            "qlora mmlu --adapter qlora-out --data mmlu --split val",
            "judge",
        ),
        "harness": Command(
            "qlora_kernels.evaluate.harness",
            "run any task of lm-evaluation-harness",
            "qlora harness --model_args adapter=qlora-out --tasks crows_pairs_english",
            "harness",
        ),
        "probe": Command(
            "qlora_kernels.evaluate.probe.command",
            "check for strengths and weaknesses: secrets, false premises, facts, ...",
            "qlora probe --model base=./SmolLM2 --model tuned=./SmolLM2,adapter=qlora-out",
            "judge",
        ),
    },
    "serving": {
        "serve": Command(
            "qlora_kernels.serve.command",
            "serve a model and adapters: OpenAI's API and a chat page",
            "qlora serve --model ./SmolLM2 --adapter mine=qlora-out",
            "serve",
        ),
    },
    "research": {
        "formats": Command(
            "qlora_kernels.laboratory.command",
            "compare number formats: error, perplexity, what a finetune wins back",
            "qlora formats --model smollm2 --formats nf4,int4,mine.json",
        ),
    },
    "kernels": {
        "kernels": Command(
            "qlora_kernels.kernels",
            "say which CUDA kernel a layer gets on a device, and why",
            "qlora kernels --device h100 -M 16 -N 11008 -K 4096",
        ),
        "doctor": Command(
            "qlora_kernels.doctor",
            "say what this machine can do, what is missing and how to get it",
            "qlora doctor",
        ),
        "tune": Command(
            "qlora_kernels.tune",
            "measure the CUDA kernels on the GPU here and keep the quickest",
            "qlora tune --shapes 11008x4096",
        ),
        "bench": Command(
            "qlora_kernels.bench.command",
            "measure the kernels beside their peers and the machine's limits; compare two runs",
            "qlora bench --shapes 7b.q",
            "bench",
        ),
    },
}
COMMANDS: dict[str, Command] = {
    name: command for group in GROUPS.values() for name, command in group.items()
}


def _parser() -> argparse.ArgumentParser:
    lines = "\n\n".join(
        "\n".join(
            [f"{title}:"]
            + [f"  {name:<10} {c.what}\n{'':13}{c.example}" for name, c in group.items()]
        )
        for title, group in GROUPS.items()
        if group
    )
    parser = argparse.ArgumentParser(
        prog="qlora",
        usage="qlora [--version] <command> ...",
        description="4-bit finetuning (QLoRA) with hand-written kernels.",
        epilog=f"{lines}\n\n`qlora <command> --help` tells more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="say the version and stop")
    parser.add_argument("command", nargs="?", help=argparse.SUPPRESS)
    return parser


def _command_parser(name: str, module: ModuleType) -> argparse.ArgumentParser:
    """The parser of a command that has ``add_arguments``."""
    what, example = COMMANDS[name].what, COMMANDS[name].example
    parser = argparse.ArgumentParser(
        prog=f"qlora {name}",
        description=f"{what[0].upper()}{what[1:]}.",
        epilog=f"example: {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    # What belongs to the command starts after its name.
    at = next((i for i, a in enumerate(argv) if not a.startswith("-")), len(argv))
    own = parser.parse_args(argv[: at + 1])
    if own.version:
        from . import __version__

        print(__version__)
        return 0
    if own.command is None:
        parser.print_help()
        return 0 if not argv else 2
    if own.command not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(own.command, COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        print(f"qlora: there is no command {own.command}{hint}", file=sys.stderr)
        return 2
    return _run(own.command, argv[at + 1 :])


def _run(name: str, arguments: Sequence[str]) -> int:
    from .finetune.errors import BadInput, Interrupted, RunError

    # PEFT asks transformers by a name that transformers calls deprecated.
    warnings.filterwarnings("ignore", ".*_gradient_checkpointing` is deprecated", FutureWarning)
    command = COMMANDS[name]
    try:
        module = importlib.import_module(command.module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "qlora_kernels":
            raise
        print(
            f"qlora {name}: {error.name} is not installed: "
            f"pip install 'qlora-kernels[{command.extra}]'",
            file=sys.stderr,
        )
        return 2
    try:
        if not hasattr(module, "add_arguments"):
            return module.run(list(arguments)) or 0
        parser = _command_parser(name, module)
        return module.run(parser.parse_args(arguments)) or 0
    except BadInput as error:
        print(f"qlora {name}: {error}", file=sys.stderr)
        return 2
    except Interrupted as error:
        print(f"qlora {name}: {error}", file=sys.stderr)
        return 128 + error.signal
    except RunError as error:
        print(f"qlora {name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:  # | head
        return 128 + signal.SIGPIPE


if __name__ == "__main__":
    sys.exit(main())
