"""One finetune of a sweep, in its own process: train, measure, leave ``result.json``.

The folder of a finetune::

    trial.json      what the worker asked for
    finetune.yaml   the settings: `qlora finetune finetune.yaml` repeats it
    output.txt      all that the process said
    run/            as `qlora finetune` leaves it
    result.json     last: it is done
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import shutil
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from ..finetune.checkpoint import CheckpointStore, replace_file, write_json
from ..finetune.errors import BadInput, Interrupted
from .results import SCHEMA

__all__ = ["run_trial"]


def run_trial(folder: Path) -> None:
    """Runs the finetune that ``folder/trial.json`` asks for, or goes on with it.

    Raises:
        BadInput, RunError, Interrupted: as a finetune.
    """
    from ..finetune.command import run as finetune

    try:
        request = json.loads((folder / "trial.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{folder / 'trial.json'} cannot be read: {error}") from error
    _end_with(request["parent"])
    if (folder / "result.json").is_file():  # killed between this and the worker's notice of it
        return
    begin = time.monotonic()
    run = folder / "run"
    settings = {**request["settings"], "output_dir": str(run)}
    continued = (run / "identity.json").is_file()
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    replace_file(folder / "finetune.yaml", lambda path: path.write_text(text, "utf-8"))
    finetune([str(folder / "finetune.yaml")])
    figures = json.loads((run / "figures.json").read_text("utf-8"))
    gc.collect()
    measured: dict[str, Any] = {}
    if request["evaluations"]:
        from .measure import measure

        signal.signal(signal.SIGTERM, _stop)
        measured = measure(run, request["evaluations"], folder.parent.parent / "base")
    result = {
        "schema": SCHEMA,
        "key": request["key"],
        "point": request["point"],
        "data": request["data"],
        "measured": measured,
        "steps": figures["steps"],
        "tokens": figures["tokens"],
        "train_loss": figures["train_loss"],
        "held_out_loss": figures.get("eval_loss_after"),
        "seconds": time.monotonic() - begin,
        "host": socket.gethostname(),
        "workers": request["workers"],
        "continued": continued,
    }
    _tidy(run, request["keep"])
    replace_file(folder / "result.json", lambda path: write_json(path, result))


def _stop(number: int, frame: Any) -> None:
    raise Interrupted("stopped while measuring; the training is done and stays", number)


def _tidy(run: Path, keep: str) -> None:
    """A thousand finetunes need not keep their optimizers' states."""
    if keep == "checkpoints":
        return
    store = CheckpointStore(run)
    for step in store.steps():
        store.remove(step)
    if keep == "nothing":
        for name in ("adapter_model.safetensors", "trained_besides.safetensors", "tokenizer.json"):
            (run / name).unlink(missing_ok=True)
    shutil.rmtree(run / "logs", ignore_errors=True)


def _end_with(parent: int) -> None:
    """SIGTERM to this process when the worker dies: a finetune nobody waits for keeps its place and
    ends. (Linux; elsewhere it runs to its end, and the next sweep waits for it.)"""
    if sys.platform == "linux":
        death = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None, use_errno=True).prctl(death, signal.SIGTERM)
    if os.getppid() != parent:
        raise Interrupted("the sweep that started this is gone", signal.SIGTERM)
