"""What a command tells its user instead of a traceback, and with which exit code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["BadInput", "Interrupted", "RunError", "bad_input"]


class BadInput(ValueError):
    """Something the user gave cannot be used; nothing has been done yet. Exit code 2."""


class RunError(RuntimeError):
    """Work that had begun could not go on; what is kept is said in the message. Exit code 1."""


class Interrupted(RunError):
    """A signal ended the run; its state is where the message says.

    Attributes:
        signal: its number; the exit code is 128 more, as shells have it.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


@contextmanager
def bad_input(what: str = "") -> Iterator[None]:
    """Turns the errors by which readers and libraries refuse their input into :class:`BadInput`.

    Only around the reading of what the user gave: a ``ValueError`` of later work is a defect, and
    keeps its traceback. ``what`` goes in front of the message.
    """
    try:
        yield
    except BadInput:
        raise
    except (ValueError, OSError) as error:
        message = str(error).strip() or type(error).__name__
        raise BadInput(f"{what}: {message}" if what else message) from error
