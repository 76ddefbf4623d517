"""Runs small finetunes in forked children and kills them. A process of its own, one thread:

    python kill_harness.py <request.json>

The imports and the tiny model are paid for once; each run is a fork. The request has ``settings``
(of the finetune), ``folder``, and ``cases``: lists of attempts, each of which is how one process
ends; after the last attempt the run is left to finish. Prints one JSON line a case.

An attempt is ``{"at": n, "when": "before" | "after"}`` (killed at the n-th change of the file
system), ``{"signal": s, "after": seconds}`` (a signal, that long after the first step), or
``{"count": true}`` (not killed; reports how many changes there are).
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

import peft.utils.save_and_load  # noqa: F401  paid for once
import torch
import transformers.models.llama.modeling_llama
import transformers.tokenization_utils_tokenizers  # noqa: F401
from rich.console import Console

from qlora_kernels.finetune import checkpoint, trainer
from qlora_kernels.finetune.config import resolve
from qlora_kernels.finetune.errors import Interrupted

torch.set_num_threads(1)

# Everything that changes the file system on the way to a checkpoint or a result.
POINTS = ("_sync", "_rename", "_replace", "_delete", "write_json", "save_file")


class Killer:
    def __init__(self, at: int | None, when: str | None):
        self.at, self.when, self.count = at, when, 0

    def wrap(self, module, name):
        original = getattr(module, name)

        def point(*args, **kwargs):
            self.count += 1
            if self.count == self.at and self.when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*args, **kwargs)
            if self.count == self.at:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return point

    def install(self):
        for name in POINTS:
            for module in (checkpoint, trainer):
                if hasattr(module, name):
                    setattr(module, name, self.wrap(module, name))


def in_child(settings: dict, attempt: dict, report: Path) -> None:
    killer = Killer(attempt.get("at"), attempt.get("when"))
    killer.install()
    with open(report.with_suffix(".txt"), "a") as sink:
        sink.write(f"--- {attempt}\n")
        with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
            try:
                trainer.finetune(resolve(settings), Console(file=sink, width=200))
            except Interrupted as error:
                sink.write(f"{error}\n")
                os._exit(128 + error.signal)
            except BaseException:
                traceback.print_exc(file=sink)
                sink.flush()
                os._exit(9)
    report.write_text(json.dumps({"count": killer.count}))
    os._exit(0)


def attempt_run(settings: dict, attempt: dict, report: Path) -> int:
    """One process; its exit code, or minus the signal that ended it."""
    log = Path(settings["output_dir"]) / "log.jsonl"
    before = log.read_text().count("\n") if log.exists() else 0
    child = os.fork()
    if child == 0:
        in_child(settings, attempt, report)
    if "signal" in attempt:
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            with contextlib.suppress(OSError):
                if log.read_text().count("\n") > before:
                    time.sleep(attempt["after"])
                    os.kill(child, attempt["signal"])
                    break
            time.sleep(0.005)
        else:
            return 0
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def intact(folder: Path) -> bool:
    """Whether every checkpoint that is there is whole."""
    store = checkpoint.CheckpointStore(folder)
    for step in store.steps():
        store.verify(step)
    return True


def run_case(settings: dict, attempts: list[dict], folder: Path, name: str) -> dict:
    settings = {**settings, "output_dir": str(folder / name)}
    report = folder / f"{name}.json"
    codes, steps = [], []
    for attempt in [*attempts, {}]:
        codes.append(attempt_run(settings, attempt, report))
        intact(Path(settings["output_dir"]))
        steps.append(checkpoint.CheckpointStore(settings["output_dir"]).steps())
        if codes[-1] == 0:
            break
    lines = (Path(settings["output_dir"]) / "log.jsonl").read_text().splitlines()
    keys = ("step", "epoch", "loss", "grad_norm", "learning_rate", "tokens", "trained")
    out = Path(settings["output_dir"])
    return {
        "codes": codes,
        "steps": steps,
        "log": [[json.loads(line)[k] for k in keys] for line in lines],
        "adapter": (out / "adapter_model.safetensors").read_bytes().hex(),
        "litter": sorted(p.name for p in out.iterdir() if p.name.startswith((".w", ".d"))),
        "count": json.loads(report.read_text())["count"],
        "evaluations": json.loads((out / "figures.json").read_text())["evaluations"],
    }


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    folder = Path(request["folder"])
    # The plan and the plot take longer than the run, and are tested elsewhere.
    empty = trainer.MemoryPlan({"trained parameters": 1, "optimizer states": 1}, {"now": 1})
    trainer.plan_memory = lambda *args, **kwargs: empty
    trainer.draw_curves = lambda path, *args: path.write_bytes(b"PNG")
    gc.collect()
    gc.freeze()  # nothing of the parent's is garbage in a child
    for number, attempts in enumerate(request["cases"]):
        print(json.dumps(run_case(request["settings"], attempts, folder, f"run{number}")))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
