"""Races: contenders that are checked, then timed in turn.

A **contender** is one way to do the work of a line. Before it is timed its result is checked; one
that is wrong is not timed. A **race** times contenders in turn (A B C, A B C, ...), so that what
else the machine does falls on all of them, and goes on beyond the wanted number of pairs until the
pairs agree or patience ends. A **ratio** is the median of the ratios of pairs, with the smallest
and the largest.

Two clocks are kept. Wall time is what a user waits for. CPU time of the calling thread leaves out
the time in which other processes had the core; it is what to compare by on a shared machine, and
means something only with one thread and no GPU.

**Cold** runs rotate over copies of the weights that exceed the last-level cache; runs **in cache**
repeat on one copy, after one call that is not timed.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

__all__ = ["Contender", "Race", "Sample", "Settings", "Spread", "race", "sample"]


class Settings(Protocol):
    """How long a race goes on: an argparse namespace, or :class:`qlora_kernels.bench.work.Pace`."""

    clock: str  # "wall" or "cpu"
    pairs: int  # interleaved pairs at least
    patience: float  # seconds that a race may take
    quick: bool  # proves nothing


@dataclass(frozen=True)
class Contender:
    """One way to do a line's work.

    Args:
        name: how the table calls it.
        run: one call; its argument counts calls and picks the copy of the weights.
        check: what is wrong with a result, or None. Called once, before anything is timed.
        around: a context in which it runs (a backend that is switched on), entered outside of what
            is timed.
    """

    name: str
    run: Callable[[int], Any]
    check: Callable[[Any], str | None] | None = None
    around: Callable[[], AbstractContextManager] = nullcontext


@dataclass(frozen=True)
class Sample:
    """Seconds a call, the mean over the calls of one turn."""

    wall: float
    cpu: float


@dataclass(frozen=True)
class Spread:
    """A median with the smallest and the largest value, of ``count``."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values), len(values))

    def text(self, digits: int = 2) -> str:
        return f"{self.median:.{digits}f} ({self.low:.{digits}f}-{self.high:.{digits}f})"


@dataclass
class Race:
    """What :func:`race` measured."""

    clock: str
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def values(self, name: str) -> list[float]:
        return [getattr(s, self.clock) for s in self.samples[name]]

    def has(self, *names: str) -> bool:
        return all(self.samples.get(name) for name in names)

    def time(self, name: str) -> Spread:
        """Seconds a call."""
        return Spread.of(self.values(name))

    def ratio(self, name: str, other: str) -> Spread:
        """How many times as fast as ``other`` ``name`` is, pair by pair."""
        pairs = zip(self.values(name), self.values(other), strict=True)
        return Spread.of([theirs / ours for ours, theirs in pairs])

    def as_json(self) -> dict[str, Any]:
        return {
            "samples": {
                name: {"wall": [s.wall for s in all_], "cpu": [s.cpu for s in all_]}
                for name, all_ in self.samples.items()
            },
            "failed": self.failed,
        }


def _nothing() -> None:
    pass


def _timed(
    run: Callable[[int], Any], first: int, calls: int, wait: Callable[[], None] = _nothing
) -> Sample:
    wall, cpu = time.perf_counter(), time.thread_time()
    for i in range(first, first + calls):
        run(i)
    wait()
    return Sample((time.perf_counter() - wall) / calls, (time.thread_time() - cpu) / calls)


def _agree(race: Race) -> bool:
    """Whether the middle half of the pairs lies within a tenth of the median, for every pairing."""
    first, *rest = race.samples
    for other in rest:
        pairs = zip(race.values(other), race.values(first), strict=True)
        low, middle, high = statistics.quantiles([a / b for a, b in pairs], n=4)
        if high - low > 0.1 * middle:
            return False
    return True


def race(
    contenders: Iterable[Contender],
    args: Settings,
    *,
    cold: bool = False,
    turn: float = 0.02,
    most: int = 31,
    check: bool = True,
    wait: Callable[[], None] = _nothing,
) -> Race:
    """Checks the contenders, then times those that are right in turn.

    Args:
        args: at least ``args.pairs`` pairs, fewer (but three) only where they would take longer
            than ``args.patience`` seconds.
        cold: leaves out the call before a turn that brings the weights into cache.
        turn: seconds that one contender's turn takes at least; short calls are repeated in it.
        most: pairs at most, where they do not agree.
        check: False leaves the checks out; a contender that raises still fails.
        wait: returns when the device has done what was queued; called at the end of a turn.
    """
    found = Race(args.clock)
    running: list[tuple[Contender, int]] = []  # and how many calls make a turn
    counts: dict[str, int] = {}
    turn = 0.002 if args.quick else turn
    for c in contenders:
        start = time.perf_counter()
        try:
            with c.around():
                result = c.run(0)
                wait()
                once = time.perf_counter() - start
                wrong = c.check(result) if check and c.check is not None else None
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"
        if wrong:
            found.failed[c.name] = wrong
            continue
        del result
        if once < 1.0:  # the first call pays for much that later ones do not
            with c.around():
                once = _timed(c.run, 1, 1, wait).wall
        running.append((c, max(1, math.ceil(turn / once)) if once else 1))
        counts[c.name], found.samples[c.name] = 2, []
    if not running:
        return found
    begun, pairs = time.perf_counter(), args.pairs
    done = 0
    while done < most:
        for c, calls in running:
            with c.around():
                if not cold:
                    c.run(counts[c.name])
                    wait()
                found.samples[c.name].append(_timed(c.run, counts[c.name] + 1, calls, wait))
            counts[c.name] += calls + 1
        done += 1
        spent = time.perf_counter() - begun
        tired = spent * (done + 1) / done > args.patience
        if (done >= min(pairs, 3) and tired) or (done >= pairs and (args.quick or _agree(found))):
            break
    return found


def sample(
    run: Callable[[int], Any],
    seconds: float = 0.02,
    count: int = 7,
    clock: str = "wall",
    wait: Callable[[], None] = _nothing,
) -> list[float]:
    """Seconds a call of one thing alone, ``count`` turns of at least ``seconds``."""
    run(0)
    wait()
    calls = max(1, math.ceil(seconds / _timed(run, 1, 1, wait).wall))
    return [getattr(_timed(run, 2 + i * calls, calls, wait), clock) for i in range(count)]
