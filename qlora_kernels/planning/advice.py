"""What to change so that a finetune fits: changes, alone and together, each planned anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from .memory import LOADING, MemoryPlan
from .recipe import Recipe

__all__ = ["Advice", "frozen", "what_makes_it_fit", "what_to_change"]


@dataclass(frozen=True)
class Advice:
    """Flags of ``qlora finetune``, and the plan that they give."""

    flags: str
    recipe: Recipe
    plan: MemoryPlan

    @property
    def fits(self) -> bool:
        return not self.plan.excess


def frozen(plan: MemoryPlan) -> int:
    """Bytes that no setting of the adapters or the step changes: the base model's."""
    trained = ("trained parameters", "a weight while it is quantized")
    return sum(size for name, size in plan.compositions[LOADING].items() if name not in trained)


def _changes(recipe: Recipe) -> Iterator[tuple[str, dict[str, Any]]]:
    """Changes in the order of what they cost: nothing first, then time, then quality."""
    if recipe.quant_type == "none":
        yield "--quant_type nf4", {"quant_type": "nf4"}
    elif not recipe.double_quant:
        yield "--double_quant true", {"double_quant": True}
    if recipe.dtype == "float32":
        yield "--dtype bfloat16", {"dtype": "bfloat16"}
    if recipe.per_device_train_batch_size > 1:
        rows = recipe.per_device_train_batch_size * recipe.gradient_accumulation_steps
        yield (
            f"--per_device_train_batch_size 1 --gradient_accumulation_steps {rows}",
            {"per_device_train_batch_size": 1, "gradient_accumulation_steps": rows},
        )
    if not recipe.activation_checkpointing:
        yield "--activation_checkpointing true", {"activation_checkpointing": True}
    if not recipe.optim.startswith("paged") and recipe.optim != "sgd":
        eight = "8bit" in recipe.optim
        name = "paged_adamw_8bit" if eight else "paged_adamw_32bit"
        yield f"--optim {name}", {"optim": name}
    if "8bit" not in recipe.optim and recipe.optim != "sgd":
        yield "--optim paged_adamw_8bit", {"optim": "paged_adamw_8bit"}
    length = recipe.max_length
    while length > 128:
        length //= 2
        yield f"--max_length {length}", {"max_length": length}
    rank = recipe.r
    while rank > 8:
        rank //= 2
        yield f"--r {rank}", {"r": rank}


def what_to_change(
    recipe: Recipe, plan_of: Callable[[Recipe], MemoryPlan], most: int = 12
) -> list[Advice]:
    """The first single change that fits, if one does; and changes added up, cheapest first, until
    they fit. Each was planned, not estimated. Empty where nothing that is known here helps.

    Args:
        plan_of: the plan of a recipe, such as :func:`~.recipe.make_plan` with model and place.
        most: how many changes are tried.
    """
    found: list[Advice] = []
    together: dict[str, Any] = {}
    flags: dict[str, str] = {}
    plan = plan_of(recipe)
    have = plan.needed
    if recipe.quant_type != "none" and recipe.double_quant and recipe.dtype != "float32":
        if plan.limit is not None and frozen(plan) > plan.limit:
            return []  # no setting makes the weights smaller
    for flag, change in list(_changes(recipe))[:most]:
        alone = Advice(flag, replace(recipe, **change), plan_of(replace(recipe, **change)))
        if alone.fits:
            return [alone, *found]
        added = {**together, **change}
        sum_ = replace(recipe, **added)
        plan = alone.plan if added == change else plan_of(sum_)
        if plan.needed >= have:
            continue
        together, have = added, plan.needed
        flags[next(iter(change))] = flag  # a later one of the same setting replaces the earlier
        both = Advice(" ".join(flags.values()), sum_, plan)
        found = [both]
        if both.fits:
            return found
    return found


def what_makes_it_fit(recipe: Recipe, plan_of: Callable[[Recipe], MemoryPlan]) -> list[Advice]:
    """The recipe without each of what saves memory in it, planned: which of these would not fit."""
    without: list[tuple[str, dict[str, Any]]] = []
    if recipe.optim.startswith("paged"):
        eight = "8bit" in recipe.optim
        name = "adamw_8bit" if eight else "adamw_torch"
        without.append((f"an optimizer that is not paged (--optim {name})", {"optim": name}))
    if recipe.activation_checkpointing:
        without.append(("no activation checkpointing", {"activation_checkpointing": False}))
    length = 4 * recipe.max_length
    without.append((f"sequences of {length} tokens", {"max_length": length}))
    if recipe.quant_type != "none":
        without.append(("a base in 16 bits", {"quant_type": "none"}))
        if recipe.double_quant:
            without.append(("no double quantization", {"double_quant": False}))
    found = []
    for what, change in without:
        changed = replace(recipe, **change)
        found.append(Advice(what, changed, plan_of(changed)))
    return found
