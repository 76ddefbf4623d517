"""A run: rounds over all lines, kept on disk line by line: what was broken off goes on."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..emulator.devices import Device
from . import modelled, results, work
from .contenders import Weight
from .limits import limit_samples
from .machine import describe_machine, differences
from .work import Case, Pace

__all__ = ["measure", "model", "start"]


def entry(case: Case, packed_bytes: float) -> dict[str, Any]:
    """A line of the result, without samples."""
    flops, moved = work.cost(case, packed_bytes)
    compute = str(case.compute()).removeprefix("torch.")
    return {
        "key": case.key, "op": case.op, "layer": case.layer.name, "n": case.layer.n,
        "k": case.layer.k, "m": case.m, "dtype": case.dtype, "compute": compute,
        "blocksize": case.blocksize, "rank": case.rank, "format": case.format,
        "double_quant": case.nested, "cold": work.is_cold(case), "flops": flops, "bytes": moved,
        "contenders": {}, "failed": {},
    }  # fmt: skip


def start(
    path: Path, kind: str, device: str, clock: str, threads: int, settings: dict[str, Any],
    gpu: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """An empty result, or the one at ``path`` where it is of the same run and was not finished."""
    fresh = {
        "schema": results.SCHEMA, "tool": results.TOOL, "kind": kind, "device": device,
        "clock": clock, "complete": False, "machine": describe_machine(threads, gpu),
        "settings": settings, "limits": {}, "lines": [],
    }  # fmt: skip
    if not path.exists():
        return fresh
    try:
        old = results.read(path)
    except ValueError:
        return fresh
    same = all(old.get(k) == fresh[k] for k in ("kind", "device", "clock", "settings"))
    if not same or old.get("complete") or differences(old["machine"], fresh["machine"])[0]:
        return fresh
    print(f"going on with {path}: {len(old['lines'])} lines are there", file=sys.stderr)
    return old


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def measure(
    result: dict[str, Any], path: Path, cases: Sequence[Case], device: torch.device,
    backends: Sequence[str], peers: Sequence[str], pace: Pace, rounds: int, threads: int,
    check: bool,
) -> None:  # fmt: skip
    """Fills the result with ``rounds`` rounds of all lines."""
    by_key = {line["key"]: line for line in result["lines"]}
    dtypes = list(dict.fromkeys([torch.float32, *(c.compute() for c in cases if c.m)]))
    weight: Weight | None = None
    for r in range(rounds):
        if all(len(limit["rounds"]) <= r for limit in result["limits"].values()):
            for name, found in limit_samples(device, dtypes, pace, threads).items():
                kept = result["limits"].setdefault(name, {"amount": found["amount"], "rounds": []})
                kept["rounds"].append(found["seconds"])
        for case in cases:
            line = by_key.get(case.key)
            done = 0 if line is None else line["rounds_done"]
            if done > r:
                continue
            of = (case.layer.size, case.blocksize)
            if weight is None or of != (f"{weight.n}x{weight.k}", weight.blocksize):
                weight = None  # the old one is freed before the new one is made
                weight = Weight(
                    case.layer.n, case.layer.k, device, blocksize=case.blocksize,
                    format=case.format, nested=case.nested,
                )  # fmt: skip
            if line is None:
                line = by_key[case.key] = entry(case, weight.packed_bytes)
                result["lines"].append(line)
            # A contender that was wrong is not run again; one that was right is not checked again.
            race = work.run(
                case, weight, device, backends, peers, pace, check and r == 0,
                skip=frozenset(line["failed"]),
            )  # fmt: skip
            line["failed"] |= race.failed
            for name in race.samples:
                rounds_of = line["contenders"].setdefault(name, {"rounds": []})["rounds"]
                rounds_of.append(race.values(name))
            for name in race.failed:
                line["contenders"].pop(name, None)
            line["rounds_done"] = r + 1
            times = ", ".join(f"{n} {1e3 * race.time(n).median:.3f}" for n in race.samples)
            wrong = "".join(f"; {n} FAILED" for n in race.failed)
            _say(f"round {r + 1}/{rounds}  {case.key}: {times} ms{wrong}")
            results.write(path, result)
    results.summarise(result["lines"], result["limits"])
    result["complete"] = True
    results.write(path, result)


def model(result: dict[str, Any], path: Path, cases: Sequence[Case], device: Device) -> None:
    """Fills the result with modelled lines."""
    result["limits"] = modelled.limits(device)
    result["lines"] = []
    for case in cases:
        bits = 4 + (0.127 if case.nested else 32 / case.blocksize)
        line = entry(case, case.layer.n * case.layer.k * bits / 8)
        line["contenders"], line["failed"] = modelled.line(case, device)
        result["lines"].append(line)
    results.summarise(result["lines"], result["limits"])
    result["complete"] = True
    results.write(path, result)
