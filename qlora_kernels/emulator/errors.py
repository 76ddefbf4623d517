"""What the emulator raises."""

from __future__ import annotations

from typing import Any

__all__ = ["EmulatorError", "KernelError", "LaunchError", "PtxError"]


class EmulatorError(Exception):
    """Base of all errors of the emulator."""


class PtxError(EmulatorError):
    """PTX that cannot be read, or an instruction that the emulator does not execute.

    ``line`` and ``column`` are places in the PTX text, from 1."""

    def __init__(self, message: str, line: int = 0, column: int = 0, source: str = "") -> None:
        self.line, self.column, self.source = line, column, source
        where = f"PTX line {line}" + (f":{column}" if column else "") if line else "PTX"
        text = f"\n    {source.strip()}" if source.strip() else ""
        super().__init__(f"{where}: {message}{text}")


class LaunchError(EmulatorError, ValueError):
    """A launch that the target or the kernel refuses: arguments, grid, block, shared memory."""


class KernelError(EmulatorError):
    """A kernel that was stopped, or in which the checkers found something. ``result`` has all
    of it."""

    def __init__(self, message: str, result: Any = None) -> None:
        super().__init__(message)
        self.result = result
