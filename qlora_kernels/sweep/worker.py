"""Runs finetunes from the queue, each in a process of its own.

A crash, a kill or a lack of memory ends one finetune and nothing else. ``crew`` has a thread a
worker, each of which takes a finetune, starts its process and waits for it; with GPUs, each worker
shows its processes one of them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..finetune.checkpoint import replace_file, write_json
from ..finetune.errors import BadInput, Interrupted
from .queue import Claim, Queue
from .results import Result, read_result

__all__ = ["Crew", "Process", "visible_devices"]

SCHEMA = 1
_COMMAND = ("-m", "qlora_kernels.cli")
_POLL = 0.2  # seconds between looks at a process, or at a queue that others work on


def visible_devices() -> list[str]:
    """The GPUs that there are, as ``CUDA_VISIBLE_DEVICES`` names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name.strip() for name in given.split(",") if name.strip() not in ("", "-1")]
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]


@dataclass
class Outcome:
    """How a process ended."""

    code: int  # its exit code; minus a signal's number if one killed it
    words: str  # the last of what it said


class Process:
    """Starts ``qlora sweep --trial FOLDER``; the one thing here that tests replace."""

    def __init__(self, folder: Path, lock: int, environment: Mapping[str, str]) -> None:
        self._log = folder / "output.txt"
        with self._log.open("ab") as output:
            self._from = output.tell()
            self._process = subprocess.Popen(
                [sys.executable, "-W", "ignore", *_COMMAND, "sweep", "--trial",
                 str(folder)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                pass_fds=(lock,),  # the claim lives as long as either of us
                start_new_session=True,  # Ctrl-C in the terminal comes through us, once
            )  # fmt: skip

    def poll(self) -> Outcome | None:
        """How it ended; None while it runs."""
        code = self._process.poll()
        return None if code is None else Outcome(code, _last_words(self._log, self._from))

    def send(self, number: int) -> None:
        self._process.send_signal(number)


def _last_words(path: Path, start: int) -> str:
    with path.open("rb") as file:
        file.seek(start)
        text = file.read().decode("utf-8", "replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].removeprefix("qlora sweep: ") if lines else "it said nothing"


class Crew:
    """Workers of this machine.

    Args:
        queue: of the sweep.
        workers: how many finetunes run at a time.
        devices: GPUs, dealt out to the workers in turn; none for the CPU.
        value: the sweep's objective in a result.
        keep: what stays of a finetune: adapters, checkpoints or nothing.
        say: gets a line a finetune.
        wait: stay until other machines' finetunes are done as well.
        start: makes a process, as :class:`Process`.
    """

    def __init__(
        self,
        queue: Queue,
        workers: int,
        devices: Sequence[str],
        value: Callable[[Result], float],
        *,
        keep: str = "adapters",
        say: Callable[[str], None] = print,
        wait: bool = True,
        start: Callable[[Path, int, Mapping[str, str]], Any] = Process,
    ) -> None:
        self.queue, self.workers, self.devices = queue, workers, list(devices)
        self.value, self.keep, self.say = value, keep, say
        self.wait, self.start = wait, start
        self._stop: int | None = None
        self._now = False
        self._running: dict[int, Any] = {}
        self._errors: list[BaseException] = []

    def run(self) -> None:
        """Works until nothing is left to do.

        Raises:
            Interrupted: SIGINT or SIGTERM came; what ran has kept its place.
        """
        threads = [
            threading.Thread(target=self._work, args=(i,), name=f"worker {i}", daemon=True)
            for i in range(self.workers)
        ]
        before = {n: signal.signal(n, self._signal) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():
                    thread.join(_POLL)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self._errors:
            raise self._errors[0]
        if self._stop is not None:
            raise Interrupted("stopped; the same command goes on from here", self._stop)

    def _signal(self, number: int, frame: Any) -> None:
        # The first lets each finetune end its step and keep its place, the second does not wait.
        again, self._stop = self._stop is not None, number
        self._now = again
        for process in list(self._running.values()):
            process.send(signal.SIGKILL if again else signal.SIGTERM)
        if not again:
            self.say("stopping after this step (once more: at once)")

    def _work(self, worker: int) -> None:
        try:
            while self._stop is None and not self._errors:
                claim = self.queue.take()
                if claim is not None:
                    self._run(claim, worker)
                elif not self.queue.pending() or (not self.wait and not self._running):
                    return
                else:
                    time.sleep(_POLL)
        except BaseException as error:  # seen by the main thread
            self._errors.append(error)

    def _environment(self, worker: int) -> dict[str, str]:
        if self.devices:
            return {"CUDA_VISIBLE_DEVICES": self.devices[worker % len(self.devices)]}
        if self.workers > 1 and "OMP_NUM_THREADS" not in os.environ:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
            return {"OMP_NUM_THREADS": str(max(1, cores // self.workers))}
        return {}

    def _run(self, claim: Claim, worker: int) -> None:
        folder = self.queue.path(claim.planned.key)
        request = {
            "schema": SCHEMA,
            "key": claim.planned.key,
            "point": claim.planned.point,
            "settings": claim.planned.settings,
            "evaluations": claim.planned.evaluations,
            "data": claim.planned.data,
            "keep": self.keep,
            "workers": self.workers,
            "parent": os.getpid(),
        }
        replace_file(folder / "trial.json", lambda path: write_json(path, request))
        process = self.start(folder, claim.lock, self._environment(worker))
        self._running[worker] = process
        if self._stop is not None:  # it came while the process was being started
            process.send(signal.SIGTERM)
        try:
            while (outcome := process.poll()) is None:
                time.sleep(_POLL)
        finally:
            del self._running[worker]
        self._ended(claim, outcome, folder)

    def _ended(self, claim: Claim, outcome: Outcome, folder: Path) -> None:
        what = ", ".join(f"{k} {v}" for k, v in claim.planned.point.items())
        if outcome.code == 0:
            try:
                result = read_result(folder / "result.json")
                value = self.value(result)
            except BadInput as error:
                # Else it would count as there, and be neither reported nor measured again.
                (folder / "result.json").replace(folder / "result.unusable.json")
                outcome = Outcome(1, str(error))
            else:
                self.queue.complete(claim, value)
                self.say(f"done: {what}: {value:.4f} in {result.seconds:,.0f} s")
                return
        stopped = {128 + signal.SIGINT, 128 + signal.SIGTERM, -signal.SIGTERM, -signal.SIGKILL}
        if self._stop is not None and outcome.code in stopped:
            self.queue.put_back(claim)
            return
        why = outcome.words
        if outcome.code < 0:
            name = signal.Signals(-outcome.code).name
            memory = ", as the system does when memory is short" if name == "SIGKILL" else ""
            why = f"killed by {name}{memory}; it said last: {why}"
        # Exit code 2 is what was given, which another try gives again.
        again = self.queue.fail(claim, why, final=outcome.code == 2)
        self.say(f"failed: {what}: {why}" + (" (will be tried again)" if again else ""))
