"""What the control groups of this process leave it: a container's limit is one."""

from __future__ import annotations

from pathlib import Path


def control_group_room(root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Bytes left in each control group that this process is in, as far as they are limited."""
    try:
        membership = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    room = []
    for line in membership:
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2: one tree; a limit may stand at any level
            levels = [root, *(root / p for p in _prefixes(path))]
            names = ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            levels = [root / "memory", *(root / "memory" / p for p in _prefixes(path))]
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        room += [left for level in levels if (left := _room(level, *names)) is not None]
    return room


def _prefixes(path: str) -> list[str]:
    parts = [part for part in path.split("/") if part and part != ".."]
    return ["/".join(parts[: i + 1]) for i in range(len(parts))]


def _room(level: Path, limit_name: str, usage_name: str, cache_name: str) -> int | None:
    try:
        text, usage = (level / limit_name).read_text().strip(), (level / usage_name).read_text()
        stat = dict(s.split() for s in (level / "memory.stat").read_text().splitlines())
        if text == "max" or (limit := int(text)) >= 1 << 60:
            return None
        # Pages of files that nobody maps are given back before anything is refused.
        return limit - int(usage) + int(stat.get(cache_name, 0))
    except (OSError, ValueError):
        return None
