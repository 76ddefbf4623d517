"""LoRA where? Full finetuning against LoRA on some layers or all, at several ranks.

The paper says that adapters on all linear layers close the gap to full finetuning, and that their
rank hardly matters. Each method gets the learning rate that does best for it among those offered,
on windows and a seed that nothing is reported on: one rate for all would decide the comparison.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from .contenders import Contender
from .recover import Method

__all__ = ["FULL", "RANKS", "best_rates", "where_methods"]

FULL = "full, 16-bit"
RANKS = (8, 16, 64, 256)
_SEARCH_SEED = 1_000_003
"""Of the runs that only choose a learning rate."""


def where_methods(base: Contender | None, ranks: Sequence[int], rank: int) -> list[Method]:
    """Full finetuning; LoRA of ``rank`` on q and v, attention and MLP; LoRA on all layers at each
    of ``ranks``.

    Args:
        base: the format under the adapters; None for 16 bits.
    """
    few = [Method(f"{t}, r={rank}", base, t, rank) for t in ("q+v", "attention", "mlp")]
    every = [Method(f"all, r={r}", base, "all", r) for r in sorted({*ranks, rank})]
    return [Method(FULL, None, "all", 0), *few, *every]


def best_rates(
    methods: Sequence[Method],
    rates: Sequence[float],
    full_rates: Sequence[float],
    run: Callable[[Method, int], dict[str, Any]],
) -> list[Method]:
    """Each method with its best learning rate; nothing is run where one is offered.

    Args:
        run: gives the result of a method with a seed, on the windows to choose by.
    """
    chosen = []
    for method in methods:
        offered = full_rates if method.rank == 0 else rates
        tried = [dataclasses.replace(method, learning_rate=rate) for rate in offered]
        if len(tried) > 1:
            tried.sort(key=lambda m: sum(run(m, _SEARCH_SEED)["after"]))
        chosen.append(tried[0])
    return chosen
