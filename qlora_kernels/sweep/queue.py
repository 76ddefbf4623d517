"""Who runs which finetune: the plan in an Optuna study, handed out to any number of workers.

Optuna's storage (a journal file in the sweep's folder, or any database that SQLAlchemy speaks)
keeps what is waiting, running, complete and failed; it is what workers on many machines agree by.
Two things are added to it:

- a *claim*: a lock (``flock``) on the finetune's folder, held by the worker and by the process that
  it started. The kernel lets go of it when both are dead, however they died. So a finetune that the
  storage calls running and whose claim is free was interrupted, and is put back at once; no clock
  and no heartbeat decides.
- a lock on the queue, so that taking a finetune and claiming it are one step.

Both need a file system with working locks that all machines share (local disks, NFS 4, Lustre
mounted with ``flock``, GPFS); so does the sweep's folder itself, which holds the results.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..finetune.errors import BadInput, RunError
from .plan import Planned

__all__ = ["Claim", "Failure", "Queue"]

STUDY = "qlora-sweep"


@dataclass
class Claim:
    """A finetune that is this worker's to run.

    Attributes:
        planned: which.
        attempt: 1 for the first, 2 for the first retry, ...
        lock: the file descriptor of the claim; the process that runs it inherits it.
    """

    planned: Planned
    attempt: int
    lock: int
    trial: Any


@dataclass(frozen=True)
class Failure:
    """A finetune that failed as often as it may."""

    key: str
    attempts: int
    why: str


class Queue:
    """The queue of a sweep's folder.

    Args:
        folder: of the sweep.
        planned: the finetunes that there are to be.
        retries: how often a failed one is tried again.
        storage: an Optuna storage URL; a journal file in the folder if None.

    Raises:
        BadInput: the storage cannot be opened.
    """

    def __init__(
        self,
        folder: Path,
        planned: Sequence[Planned],
        retries: int = 1,
        storage: str | None = None,
        *,
        minimize: bool = True,
    ) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.folder, self.retries = folder, retries
        self.planned = {p.key: p for p in planned}
        self._states = optuna.trial.TrialState
        folder.mkdir(parents=True, exist_ok=True)
        with self._locked():
            try:
                where: Any = storage
                if storage is None:
                    from optuna.storages import JournalStorage
                    from optuna.storages.journal import JournalFileBackend

                    where = JournalStorage(JournalFileBackend(str(folder / "journal.log")))
                self.study = optuna.create_study(
                    storage=where,
                    study_name=STUDY,
                    load_if_exists=True,
                    direction="minimize" if minimize else "maximize",
                )
            except Exception as error:  # of Optuna, SQLAlchemy, or a database's driver
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                told = storage or folder / "journal.log"
                raise BadInput(f"the storage {told} cannot be opened: {reason}") from error

    # -- locks --

    @contextmanager
    def _locked(self) -> Iterator[None]:
        lock = _lock(self.folder / "queue.lock", wait=True)
        assert lock is not None
        try:
            yield
        finally:
            os.close(lock)

    def path(self, key: str) -> Path:
        """The folder of a finetune."""
        return self.folder / "trials" / key

    def _claim(self, key: str) -> int | None:
        self.path(key).mkdir(parents=True, exist_ok=True)
        return _lock(self.path(key) / ".claim", wait=False)

    # -- what is there --

    def _trials(self, *states: Any) -> list[Any]:
        return self.study.get_trials(deepcopy=False, states=states or None)

    def _last(self) -> dict[str, Any]:
        """The latest trial of each key."""
        return {t.user_attrs["key"]: t for t in self._trials() if "key" in t.user_attrs}

    def finished(self, key: str) -> bool:
        """Whether its result is there."""
        return (self.path(key) / "result.json").is_file()

    def pending(self) -> int:
        """How many are waiting or running, anywhere."""
        with self._locked():
            live = self._trials(self._states.WAITING, self._states.RUNNING)
        return sum(t.user_attrs.get("key") in self.planned for t in live)

    def failures(self) -> list[Failure]:
        """Those that failed and will not be tried again."""
        with self._locked():
            last = self._last()
        return [
            Failure(key, t.user_attrs["attempt"], t.user_attrs["why"])
            for key, t in last.items()
            if key in self.planned
            and t.state == self._states.FAIL
            and "why" in t.user_attrs
            and not self.finished(key)
        ]

    # -- changes --

    def fill(self, retry_failed: bool = False) -> int:
        """Puts what is neither there, waiting nor running into the queue; returns how many.

        Args:
            retry_failed: those that failed as often as they may begin to count anew.
        """
        added = 0
        with self._locked():
            last = self._last()
            for key in self.planned:
                before = last.get(key)
                if before is not None and not before.state.is_finished():
                    continue
                if self.finished(key):
                    continue
                attempt = 1
                if before is not None and "why" in before.user_attrs:
                    attempt = before.user_attrs["attempt"] + 1
                    final = before.user_attrs.get("final", False)
                    if retry_failed:
                        attempt = 1
                    elif final or attempt > self.retries + 1:
                        continue
                self._enqueue(key, attempt)
                added += 1
        return added

    def _enqueue(self, key: str, attempt: int) -> None:
        planned = self.planned.get(key)
        attributes = {"key": key, "attempt": attempt}
        if planned is not None:
            attributes["point"] = planned.point
        self.study.enqueue_trial({}, user_attrs=attributes)

    def take(self) -> Claim | None:
        """The next finetune, claimed; None where none is waiting now."""
        with self._locked():
            self._put_back_interrupted()
            while self._trials(self._states.WAITING):
                trial = self.study.ask()
                key = trial.user_attrs["key"]
                if key not in self.planned:  # of an older version of the sweep
                    self.study.tell(trial, state=self._states.FAIL)
                    continue
                attempt = trial.user_attrs["attempt"]
                lock = self._claim(key)
                if lock is None:  # its last process is still ending
                    self.study.tell(trial, state=self._states.FAIL)
                    self._enqueue(key, attempt)
                    return None
                trial.set_user_attr("host", socket.gethostname())
                return Claim(self.planned[key], attempt, lock, trial)
        return None

    def _put_back_interrupted(self) -> None:
        for trial in self._trials(self._states.RUNNING):
            key = trial.user_attrs.get("key")
            if key not in self.planned:
                continue
            lock = self._claim(key)
            if lock is not None:  # nobody runs it any more
                self.study.tell(trial.number, state=self._states.FAIL)
                self._enqueue(key, trial.user_attrs["attempt"])
                os.close(lock)

    def complete(self, claim: Claim, value: float) -> None:
        """It is done; ``value`` is what the sweep is about."""
        with self._locked():
            self.study.tell(claim.trial, value)
        os.close(claim.lock)

    def fail(self, claim: Claim, why: str, *, final: bool = False) -> bool:
        """It failed; returns whether it will be tried again.

        Args:
            final: trying again cannot help.
        """
        again = not final and claim.attempt <= self.retries
        with self._locked():
            claim.trial.set_user_attr("why", why)
            claim.trial.set_user_attr("final", final)
            self.study.tell(claim.trial, state=self._states.FAIL)
            if again:
                self._enqueue(claim.planned.key, claim.attempt + 1)
        os.close(claim.lock)
        return again

    def put_back(self, claim: Claim) -> None:
        """It was interrupted, which is no failure; the next worker goes on with it."""
        with self._locked():
            self.study.tell(claim.trial, state=self._states.FAIL)
            self._enqueue(claim.planned.key, claim.attempt)
        os.close(claim.lock)


def _lock(path: Path, *, wait: bool) -> int | None:
    """An open file that holds ``path``'s lock; None if another does and ``wait`` is false.

    Raises:
        RunError: the file system has no locks.
    """
    import fcntl

    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        # Of the open file, not of the process: threads exclude each other, and a child that
        # inherits it keeps it.
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        os.close(file)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return None
        raise RunError(
            f"{path} cannot be locked ({error.strerror}): a sweep needs a file system with locks; "
            "Lustre has them when mounted with -o flock"
        ) from error
    return file


def summary(queue: Queue) -> Mapping[str, int]:
    """How many finetunes are complete, running, waiting and failed."""
    with queue._locked():
        last = queue._last()
    counts = {"complete": 0, "running": 0, "waiting": 0, "failed": 0}
    for key in queue.planned:
        state = last[key].state if key in last else None
        if queue.finished(key):
            counts["complete"] += 1
        elif state == queue._states.RUNNING:
            counts["running"] += 1
        elif state == queue._states.FAIL and "why" in last[key].user_attrs:
            counts["failed"] += 1
        else:
            counts["waiting"] += 1
    return counts
