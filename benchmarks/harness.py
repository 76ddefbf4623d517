"""What every script here shares: its arguments, threads, processes of their own, the JSON.

The instruments themselves (races between contenders, limits, the machine's description, tables,
plots) are :mod:`qlora_kernels.bench`, which ``qlora bench`` measures by too. Their names are here
as well, and are fetched from there when they are first asked for: a process whose threads or peak
memory matter imports neither torch nor the package before it calls :func:`begin`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"

# Where a name of the package's instruments is.
_INSTRUMENTS = {
    "limits": ("clock_ghz", "copies_for_cold", "last_level_cache", "matmul_peak", "native",
               "peak_resident", "read_bandwidth", "read_memory"),
    "machine": ("describe_machine", "has_bf16_products", "machine_line", "version"),
    "plots": ("roofline",),
    "race": ("Contender", "Race", "Sample", "Spread", "race", "sample"),
    "table": ("print_table",),
}  # fmt: skip


def __getattr__(name: str) -> Any:
    for module, names in _INSTRUMENTS.items():
        if name in names:
            # The package of this folder's parent, also where it is not installed.
            if str(HERE.parent) not in sys.path:
                sys.path.insert(0, str(HERE.parent))
            return getattr(importlib.import_module(f"qlora_kernels.bench.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# --- arguments and set-up -----------------------------------------------------------------------


def add_child_arguments(parser: argparse.ArgumentParser) -> None:
    """What a benchmark tells the processes that it starts of itself; help does not name them."""
    for name in ("child", "turn", "done", "data", "steps"):
        kind = {"child": str, "data": Path}.get(name, int)
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that every script takes."""
    group = parser.add_argument_group("measurement")
    group.add_argument("--quick", action="store_true", help="tiny sizes, seconds, proves nothing")
    group.add_argument("--threads", type=int, default=None, help="all cores unless given")
    group.add_argument("--pairs", type=int, default=7, help="interleaved pairs at least")
    group.add_argument("--patience", type=float, default=150.0, help="seconds a line may take")
    group.add_argument(
        "--clock",
        choices=("auto", "wall", "cpu"),
        default="auto",
        help="what ratios are of; auto: wall, with one thread the CPU time of the thread",
    )
    group.add_argument("--out", type=Path, default=None, help="JSON file to write")


def begin(args: argparse.Namespace, threads: int | None = None) -> None:
    """Settles threads and clock, before torch or a peer is imported.

    Args:
        threads: overrides ``args.threads``.
    """
    args.threads = threads or args.threads or (os.cpu_count() or 1)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(args.threads)  # peers link OpenMP runtimes of their own
    if args.clock == "auto":
        args.clock = "cpu" if args.threads == 1 else "wall"
    if args.clock == "cpu" and args.threads != 1:
        raise SystemExit("--clock cpu is the time of one thread: it needs --threads 1")
    if args.quick:
        args.pairs, args.patience = min(args.pairs, 2), min(args.patience, 2.0)
    # Packages of this folder's parent, also where the package is not installed.
    sys.path.insert(0, str(HERE.parent))
    import torch

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)


# --- processes of their own ---------------------------------------------------------------------


def run_child(
    script: str | Path, arguments: Sequence[str], env: dict[str, str] | None = None
) -> dict[str, Any]:
    """Runs a script with ``--out <file>`` in a process of its own; the JSON that it wrote.

    For peak memory, which is a process's, and for settings that are read once at its start.

    Raises:
        RuntimeError: it failed; the message ends with what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, str(script), *arguments, "--out", str(out)]
        run = subprocess.run(
            command, env={**os.environ, **(env or {})}, capture_output=True, text=True
        )
        if run.returncode or not out.exists():
            raise RuntimeError(
                f"{' '.join(command[1:])} failed ({run.returncode}):\n"
                + (run.stdout + run.stderr)[-3000:]
            )
        return json.loads(out.read_text())


# --- the report ---------------------------------------------------------------------------------


def result_path(args: argparse.Namespace) -> Path:
    """``--out``, or ``results/<script>.json`` (``<script>-quick.json`` of a quick run)."""
    if args.out is not None:
        return args.out
    return RESULTS / (Path(sys.argv[0]).stem + ("-quick" if args.quick else "") + ".json")


def write_json(args: argparse.Namespace, figures: dict[str, Any]) -> Path:
    """Writes the figures with what they depend on, and says where."""
    path = result_path(args)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Names without their folders: where things lay on this machine says nothing on another.
    paths = ("model", "out", "data")
    settings = {
        k: Path(v).name if k in paths or isinstance(v, Path) else v
        for k, v in vars(args).items()
        if v is not None
    }
    everything = {
        "benchmark": Path(sys.argv[0]).stem,
        "machine": __getattr__("describe_machine")(args.threads),
        "settings": settings,
        **figures,
    }
    path.write_text(json.dumps(everything, indent=1) + "\n")
    print(f"\nwrote {path}")
    return path
