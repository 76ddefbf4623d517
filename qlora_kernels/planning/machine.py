"""How much memory this machine has, and how much of it this process has taken."""

from __future__ import annotations

from pathlib import Path

import torch

from ..control_group import control_group_room

__all__ = ["available_memory", "peak_memory", "peak_resident_memory", "resident_memory"]


def resident_memory() -> int:
    """Bytes of this process that are resident now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak_resident_memory() -> int:
    """The most bytes that were ever resident in this process.

    On Linux this is ``VmHWM``, which starts anew with each program; ``getrusage`` would report the
    parent's peak as well.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
        import sys

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    except ImportError:  # Windows
        import psutil

        return int(psutil.Process().memory_info().peak_wset)


def peak_memory(device: torch.device | str) -> int:
    """The most bytes that a run on this device ever held: of the GPU by torch's allocator, else
    :func:`peak_resident_memory`."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident_memory()


def available_memory(device: torch.device | str = "cpu") -> tuple[int | None, str]:
    """Bytes that this process may have in all, with what it has already, and who says so.

    On a CPU the least of what the system has left and of the limits of the control groups that the
    process is in (a container's limit is one), each plus what is resident now.
    """
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device), torch.cuda.get_device_name(device)
    import psutil

    found = [(psutil.virtual_memory().available, "the machine's free memory")]
    found += [(free, "the control group's limit") for free in control_group_room()]
    room, who = min(found)
    return room + resident_memory(), who
