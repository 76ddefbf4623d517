"""``qlora bench``: what the kernels take here, beside their peers and the machine's own limits.

    qlora bench                                   measure; JSON, tables, plots
    qlora bench --device h100                     modelled for a GPU that is not here
    qlora bench compare before.json after.json    what changed beyond the noise
    qlora bench list                              the names that are understood

docs/bench.md says how to read what is printed.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .. import backend as backends_module
from .. import formats
from ..emulator.devices import DEVICES
from ..finetune.errors import BadInput
from . import compare as comparing
from . import contenders, measure, modelled, report, results, shapes, table, work
from .machine import describe_machine, has_bf16_products

__all__ = ["run"]

ROWS = {"measured": (1, 4, 16, 128, 512),
        "modelled": (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)}  # fmt: skip


def _run_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qlora bench",
        description=__doc__.split("\n\n")[0].replace("``", "") + "\n\n" + __doc__.split("\n\n")[1],
        epilog="example: qlora bench --shapes 7b.q --ops forward train --threads 1",
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    add = parser.add_argument
    what = parser.add_argument_group("what").add_argument
    what("--ops", nargs="+", metavar="OP", help=f"of {', '.join(work.OPS)}; all unless given")
    what("--shapes", nargs="+", metavar="SHAPE", help="7b (all its layers), 7b.q, 70b.down, "
         "4096x11008 (out x in); 7b unless given")  # fmt: skip
    what("--model", metavar="FOLDER", help="the linear layers of a transformers model")
    what("--rows", "-M", nargs="+", type=int, metavar="M", help="rows of x")
    what("--dtypes", nargs="+", metavar="DTYPE", help=f"of {', '.join(work.DTYPES)}; what the "
         "hardware is for unless given")  # fmt: skip
    what("--blocksizes", nargs="+", type=int, default=[64], metavar="B")
    what("--format", default="nf4", help="of the weights: nf4, fp4, ...")
    what("--no-double-quant", action="store_true", help="fp32 scales")
    what("--rank", type=int, default=16, help="LoRA's rank")
    who = parser.add_argument_group("where and against whom").add_argument
    who("--device", help="cpu; cuda: the GPU here; a GPU's name (h100, 4090, ...): modelled. The "
        "GPU here, else the CPU, unless given")  # fmt: skip
    who("--backends", nargs="+", metavar="NAME", help="this package's: cpu, cuda, triton")
    who("--peers", nargs="+", metavar="NAME", help=f"of {', '.join(contenders.PEERS)}; those that "
        "are installed unless given; none")  # fmt: skip
    who("--threads", type=int, help="all cores unless given")
    how = parser.add_argument_group("how").add_argument
    how("--refcheck", action=argparse.BooleanOptionalAction, default=True, help="check every "
        "contender against float64 before it is timed; one that fails is not timed")  # fmt: skip
    how("--rounds", type=int, default=3, help="passes over all lines")
    how("--pairs", type=int, default=7, help="interleaved samples of a line in a round, at least")
    how("--patience", type=float, default=60.0, help="seconds that a line may take in a round")
    how("--clock", choices=("auto", "wall", "cpu"), default="auto", help="auto: wall; with one "
        "thread on a CPU the time of that thread")  # fmt: skip
    how(
        "--quick", action="store_true", help="few short samples: shows that it runs, proves nothing"
    )
    add("--output", type=Path, metavar="FILE.json", help="bench-<device>.json unless given; a "
        "run that was broken off goes on")  # fmt: skip
    add("--overwrite", action="store_true", help="replace a finished result")
    add("--no-plots", action="store_true")
    return parser


def _among(what: str, given: Sequence[str], known: Sequence[str]) -> list[str]:
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise BadInput(f"there is no {what} {name!r}{hint} (there are {', '.join(known)})")
    return list(dict.fromkeys(given))


def _check_numbers(arguments: argparse.Namespace) -> None:
    least = {"rounds": 1, "pairs": 2, "rank": 1, "threads": 1}
    for name, low in least.items():
        value = getattr(arguments, name)
        if value is not None and value < low:
            raise BadInput(f"--{name} must be at least {low}, got {value}")
    if arguments.patience <= 0:
        raise BadInput(f"--patience must be positive, got {arguments.patience:g}")
    for m in arguments.rows or ():
        if m < 1:
            raise BadInput(f"--rows must be positive, got {m}")
    for blocksize in arguments.blocksizes:
        try:
            formats.check_blocksize(blocksize)
        except ValueError as error:
            raise BadInput(f"--blocksizes: {error}") from None
    try:
        arguments.format = formats.get_format(arguments.format).name
        formats.get_format(arguments.format).check_nested(not arguments.no_double_quant)
    except ValueError as error:
        raise BadInput(f"--format: {error}") from None


def _device(name: str | None) -> tuple[str, Any]:
    """``("measured", torch.device)`` or ``("modelled", emulator's Device)``."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return "measured", torch.device("cpu")
    if name.partition(":")[0] == "cuda":
        if not torch.cuda.is_available():
            raise BadInput(
                f"--device {name}: there is no GPU here that torch can use; --device h100 (or "
                "another's name) models one"
            )
        try:
            device = torch.device(name)
            index = torch.cuda.current_device() if device.index is None else device.index
            torch.cuda.get_device_properties(index)
        except (RuntimeError, AssertionError) as error:
            raise BadInput(f"--device {name}: {str(error).splitlines()[0]}") from None
        return "measured", torch.device("cuda", index)
    return "modelled", modelled.device_of(name)


def _layers(arguments: argparse.Namespace) -> list[shapes.Layer]:
    found = shapes.layers(arguments.shapes) if arguments.shapes else []
    if arguments.model:
        found += shapes.model_layers(arguments.model)
    return found or shapes.layers(["7b"])


def _bench(argv: Sequence[str]) -> int:
    arguments = _run_parser().parse_args(argv)
    _check_numbers(arguments)
    kind, device = _device(arguments.device)
    name = device.key if kind == "modelled" else str(device)
    path = arguments.output or Path(f"bench-{name.replace(':', '')}.json")
    if path.exists() and not arguments.overwrite and _finished(path):
        raise BadInput(
            f"{path} is there and finished: --overwrite replaces it, --output names another"
        )
    ops = _among("op", arguments.ops or work.OPS, work.OPS)
    layers = _layers(arguments)
    measured = kind == "measured"
    cpu = measured and device.type == "cpu"
    threads = arguments.threads or os.cpu_count() or 1
    torch.set_num_threads(threads)
    if arguments.dtypes:
        dtypes = _among("dtype", arguments.dtypes, work.DTYPES)
    else:
        dtypes = ["bf16"]
        if cpu and not has_bf16_products(describe_machine(threads)):
            dtypes = ["fp32"]  # bf16 in software takes minutes a line
    clock = arguments.clock
    if clock == "auto":
        clock = "cpu" if cpu and threads == 1 else "wall"
    if clock == "cpu" and not (cpu and threads == 1):
        raise BadInput("--clock cpu is the time of one thread: it needs --threads 1 and the CPU")
    cases = list(
        work.cases(
            ops,
            layers,
            sorted(set(arguments.rows or ROWS[kind])),
            dtypes,
            arguments.blocksizes,
            arguments.rank,
            arguments.format,
            not arguments.no_double_quant,
        )
    )
    settings: dict[str, Any] = {"cases": [c.key for c in cases], "refcheck": arguments.refcheck}
    if measured:
        backends = contenders.choose_backends(device, arguments.backends)
        peers, missing = contenders.choose_peers(arguments.peers)
        for peer, why in missing.items():
            print(f"left out: {peer}: {why}", file=sys.stderr)
        rounds = 1 if arguments.quick else arguments.rounds
        pace = work.Pace(clock, arguments.pairs, arguments.patience)
        if arguments.quick:
            pace = work.Pace(clock, 2, min(arguments.patience, 2.0), quick=True)
        settings |= {"backends": backends, "peers": peers, "rounds": rounds, "pairs": pace.pairs,
                     "patience": pace.patience, "quick": pace.quick}  # fmt: skip
        index = device.index if device.type == "cuda" else None
        result = measure.start(path, kind, name, clock, threads, settings, index)
        measure.measure(
            result, path, cases, device, backends, peers, pace, rounds, threads,
            arguments.refcheck,
        )  # fmt: skip
    else:
        if arguments.backends or arguments.peers:
            raise BadInput("--backends and --peers are of a machine that is measured")
        result = measure.start(path, kind, name, "model", threads, settings)
        measure.model(result, path, cases, device)
    report.print_result(result)
    print(f"\nwrote {path}")
    if not arguments.no_plots:
        try:
            report.draw(result, path)
        except ModuleNotFoundError as error:
            print(f"no plots: {error.name} is not installed: pip install 'qlora-kernels[bench]'")
    ours_failed = measured and any(
        n.startswith("qlora") for line in result["lines"] for n in line["failed"]
    )
    return 1 if ours_failed else 0


def _finished(path: Path) -> bool:
    try:
        return bool(results.read(path).get("complete"))
    except BadInput:
        raise BadInput(
            f"{path} is there and is no result of this version: --overwrite replaces it"
        ) from None


def _compare(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="qlora bench compare",
        description="What changed between two results, beyond the noise.",
        epilog="example: qlora bench compare before.json after.json --fail-on-regression",
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--tolerance", type=float, default=0.05,
                        help="changes up to this share are none")  # fmt: skip
    parser.add_argument("--level", type=float, default=0.95, help="of the intervals")
    parser.add_argument("--all", action="store_true", help="unchanged lines too")
    parser.add_argument("--across-machines", action="store_true")
    parser.add_argument("--fail-on-regression", action="store_true", help="exit code 1 if any line "
                        "of this package became slower")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="the changes, as JSON")
    arguments = parser.parse_args(argv)
    if not 0 <= arguments.tolerance < 10:
        raise BadInput(f"--tolerance must be 0 or more (0.05: 5%), got {arguments.tolerance:g}")
    if not 0 < arguments.level < 1:
        raise BadInput(f"--level must be between 0 and 1, got {arguments.level:g}")
    a, b = results.read(arguments.before), results.read(arguments.after)
    machine, software = comparing.check_comparable(a, b, arguments.across_machines)
    for line in machine:
        print(f"DIFFERENT MACHINES  {line}")
    for line in software:
        print(f"differs  {line}")
    for result, path in ((a, arguments.before), (b, arguments.after)):
        if not result.get("complete"):
            print(f"{path} is not finished: what it has is compared")
    changes = comparing.compare(a, b, tolerance=arguments.tolerance, level=arguments.level)
    if not changes:
        raise BadInput("the results have no line in common")
    kept = [c for c in changes if arguments.all or c.verdict != "as before"]
    if kept:
        head = ["line", "contender", "after / before", f"{arguments.level:.0%} interval",
                "of limit", "verdict"]  # fmt: skip
        table.print_table(head, [comparing.text(c) for c in kept])
    for name, one, other in (("before", a, b), ("after", b, a)):
        for key in comparing.only_in(one, other):
            print(f"only {name}: {key}")
    counts = {v: sum(c.verdict == v for c in changes) for v in
              ("slower", "quicker", "as before", "unclear", "the machine")}  # fmt: skip
    print(", ".join(f"{n} {v}" for v, n in counts.items()) + f", of {len(changes)}")
    if arguments.json:
        results.write(
            arguments.json,
            {"schema": results.SCHEMA, "tool": f"{results.TOOL} compare",
             "tolerance": arguments.tolerance, "level": arguments.level,
             "machines_differ": machine, "changes": [vars(c) for c in changes]},
        )  # fmt: skip
    regressed = [c for c in changes if c.verdict == "slower" and c.contender.startswith("qlora")]
    if regressed:
        print(f"slower: {', '.join(sorted({c.key for c in regressed}))}")
    return 1 if regressed and arguments.fail_on_regression else 0


def _list() -> int:
    print("ops      " + " ".join(work.OPS))
    print("dtypes   " + " ".join(work.DTYPES))
    print("shapes   " + "; ".join(
        ", ".join(f"{layer.name} {layer.size}" for layer in all_)
        for all_ in shapes.LLAMA.values()))  # fmt: skip
    print("devices  cpu cuda; modelled: " + " ".join(DEVICES))
    for name, why in backends_module.backends().items():
        if name != "auto":
            print(f"backend  {name}: {why or 'runs here'}")
    for name, why_not in contenders.PEERS.items():
        print(f"peer     {name}: {why_not() or 'is here'}")
    return 0


def run(argv: Sequence[str]) -> int:
    """Measures, or compares, or lists; returns the exit code.

    Raises:
        BadInput: names that are none, numbers out of range, results that cannot be read.
    """
    if argv and argv[0] == "compare":
        return _compare(argv[1:])
    if argv and argv[0] == "list":
        if argv[1:]:
            raise BadInput(f"list takes no arguments, got {' '.join(argv[1:])}")
        return _list()
    return _bench(argv)
