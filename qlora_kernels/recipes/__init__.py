"""Recipes: settings of ``qlora finetune`` that belong together, a YAML file each.

``<name>.yaml`` is a recipe; ``<name>.scale.yaml`` is what changes in any recipe to run it smaller.
Both hold names of ``qlora finetune`` and nothing else, so a copy of one is a recipe of your own.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..finetune.errors import BadInput

__all__ = ["FOLDER", "Recipe", "lay_under", "read_recipe", "recipe_names", "scale_names"]

FOLDER = Path(__file__).parent
_SCALE = ".scale.yaml"

# What an upper layer's setting makes meaningless in a lower one.
_SUPERSEDES = {
    "dataset_name": ("eval_dataset", "dataset_format", "dataset_columns"),
    "eval_split": ("eval_dataset",),
    "num_train_epochs": ("max_steps",),
}
# The model that `qlora demo` finds without a network.
_DEMO_MODEL = "SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class Recipe:
    """A recipe as it was read.

    Attributes:
        name: as it was asked for, with the scale: ``guanaco-7b, scale tiny``.
        settings: of the recipe itself.
        scale: of the scale; these win.
    """

    name: str
    settings: Mapping[str, Any]
    scale: Mapping[str, Any] = field(default_factory=dict)


def recipe_names() -> list[str]:
    """The recipes of this package."""
    files = FOLDER.glob("*.yaml")
    return sorted((p.stem for p in files if not p.name.endswith(_SCALE)), key=_by_number)


def scale_names() -> list[str]:
    """The scales of this package."""
    return sorted(p.name.removesuffix(_SCALE) for p in FOLDER.glob(f"*{_SCALE}"))


def _by_number(name: str) -> tuple[str, int]:
    word, _, size = name.partition("-")
    return word, int("".join(c for c in size if c.isdigit()) or 0)


def read_recipe(recipe: str, scale: str | None = None) -> Recipe:
    """A recipe of this package by its name, or a YAML file of your own by its path.

    A relative ``chat_template_path`` is looked for beside the recipe first.

    Raises:
        BadInput: no such recipe, file or scale; a file that cannot be read.
    """
    from ..finetune.config import read_yaml

    named = FOLDER / f"{recipe}.yaml"
    if recipe in recipe_names():
        path = named
    else:
        path = Path(recipe).expanduser()
        if path.suffix not in (".yaml", ".yml") and not path.is_file():
            raise _unknown("recipe", recipe, recipe_names(), "; a file of your own ends in .yaml")
    settings = read_yaml(path)
    for name in ("recipe", "scale"):
        if name in settings:
            raise BadInput(f"{path}: a recipe cannot name a {name}: copy its settings")
    template = settings.get("chat_template_path")
    if isinstance(template, str) and (path.parent / template).is_file():
        settings["chat_template_path"] = str((path.parent / template).resolve())
    if scale is None:
        return Recipe(recipe, settings)
    if scale not in scale_names():
        raise _unknown("scale", scale, scale_names())
    return Recipe(f"{recipe}, scale {scale}", settings, read_yaml(FOLDER / f"{scale}{_SCALE}"))


def _unknown(what: str, name: str, known: list[str], more: str = "") -> BadInput:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.3)
    hint = f"; the nearest is {near[0]}" if near else ""
    return BadInput(f"there is no {what} {name!r}{hint} (there is {', '.join(known)}){more}")


def lay_under(
    given: dict[str, Any],
    notices: list[str],
    translate: Callable[[Mapping[str, Any], list[str]], dict[str, Any]],
) -> tuple[str | None, dict[str, Any]]:
    """``given`` on top of the recipe that it names, and that recipe's name (None without one).

    Args:
        given: settings in known names; ``recipe`` and ``scale`` are taken out.
        notices: gets what has to be told: the recipe, what was scaled, what does not apply.
        translate: settings in whatever names to known names.

    Raises:
        BadInput: a recipe or scale that is not there, or a scale without a recipe.
    """
    name, scale = given.pop("recipe", None), given.pop("scale", None)
    if name is None:
        if scale is not None:
            raise BadInput(f"scale {scale} needs a recipe to scale: --recipe guanaco-7b, or a file")
        return None, given
    recipe = read_recipe(str(name), None if scale is None else str(scale))
    own = translate(recipe.settings, notices)
    scaled = _left(translate(recipe.scale, notices), given)
    kept = _left(_left(own, scaled), given)
    notices.append(f"recipe {recipe.name}")
    changes = [f"{n} {own.get(n, 'unset')} -> {v}" for n, v in scaled.items() if own.get(n) != v]
    if changes:
        notices.append(f"scale {scale} changes of {name}: {'; '.join(changes)}")
    gone = [n for n in own if n not in kept and n not in scaled and n not in given]
    if gone:
        notices.append(f"of {name}, {', '.join(gone)} does not apply to what is given instead")
    if "model_name_or_path" in scaled:
        scaled["model_name_or_path"] = _find_model(str(scaled["model_name_or_path"]))
    return recipe.name, {**kept, **scaled, **given}


def _left(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """``lower`` without what ``upper`` sets, and without what means nothing under it."""
    gone = set(upper)
    for name, others in _SUPERSEDES.items():
        if name in upper:
            gone |= set(others)
    return {name: value for name, value in lower.items() if name not in gone}


def _find_model(name: str) -> str:
    """``name``, or the folder of the model that ``qlora demo`` finds if it is that one's.

    Raises:
        BadInput: it is that one's, and the package that holds it is not installed.
    """
    if name != _DEMO_MODEL or Path(name).is_dir():
        return name
    from ..demo import converted_model

    return str(converted_model(None))
