"""Which finetunes a sweep has: Optuna's samplers draw them all, before the first one starts.

Drawn in advance, they are the same however many workers there are and however often the sweep is
interrupted (samplers that draw as they go give different workers the same point, and say so). The
plan is kept in the study's storage, which hands it out (:mod:`.queue`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..finetune.errors import BadInput, bad_input
from .datasets import Library
from .spec import DATASET, Range, Spec

__all__ = ["Planned", "draw_points", "make_plan"]

# What a finetune of a sweep gets where the user says nothing: it keeps its place five times (so
# that a kill costs a fifth), and one checkpoint at a time.
_DEFAULTS = {"save_strategy": "steps", "save_steps": 0.2, "save_total_limit": 1}

_NOT_OF_RECIPES = {
    "eval_dataset": None,
    "eval_strategy": "no",
    "max_samples": None,
    "dataset_format": None,
    "dataset_columns": None,
}


@dataclass(frozen=True)
class Planned:
    """A finetune to be run.

    Attributes:
        key: names it, and its folder: a digest of everything that its result depends on.
        point: what is varied, by name; for people and tables.
        settings: for ``qlora finetune``.
        evaluations: what it is measured on, for :mod:`.measure`.
        data: facts about its training set.
    """

    key: str
    point: dict[str, Any]
    settings: dict[str, Any]
    evaluations: list[dict[str, Any]]
    data: dict[str, Any]


def draw_points(spec: Spec) -> list[dict[str, Any]]:
    """The points of the search, without repetitions, in the order in which they are run.

    A grid's order is random, so that a sweep that is stopped half way has seen all corners.

    Raises:
        BadInput: a random search asks for more points than there are.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    choices = {n: v for n, v in spec.vary.items() if not isinstance(v, Range)}
    if spec.search == "grid":
        # Optuna's grids take words and numbers only: positions stand for the values.
        space = {name: list(range(len(values))) for name, values in choices.items()}
        sampler: Any = optuna.samplers.GridSampler(space, seed=spec.seed)
        count = 1
        for values in choices.values():
            count *= len(values)
    else:
        sampler = optuna.samplers.RandomSampler(seed=spec.seed)
        count = spec.trials or 0
    points: list[dict[str, Any]] = []
    seen: set[str] = set()

    def objective(trial: Any) -> float:
        point: dict[str, Any] = {}
        for name, values in spec.vary.items():
            if isinstance(values, Range):
                point[name] = _suggest(trial, name, values)
            else:
                at = trial.suggest_int(name, 0, len(values) - 1)
                point[name] = values[at]
        text = json.dumps(point, sort_keys=True, default=str)
        if text not in seen and len(points) < count:
            seen.add(text)
            points.append(point)
            if len(points) == count:
                trial.study.stop()
        return 0.0

    # Some draws of a random search repeat others: a hundred a point are enough for all but those
    # that ask for nearly every point there is.
    study = optuna.create_study(sampler=sampler)
    study.optimize(objective, n_trials=count if spec.search == "grid" else 100 * count + 100)
    if len(points) < count:
        raise BadInput(
            f"trials is {count}, and only {len(points)} different points were found: lower trials, "
            "or use `search: grid`"
        )
    return points


def _suggest(trial: Any, name: str, values: Range) -> int | float:
    if values.whole:
        return trial.suggest_int(name, int(values.low), int(values.high), log=values.log)
    return trial.suggest_float(name, float(values.low), float(values.high), log=values.log)


def make_plan(
    spec: Spec, folder: Path, check: Callable[[Mapping[str, Any]], None] | None = None
) -> list[Planned]:
    """The finetunes of ``spec``; writes its data sets to ``folder/data``.

    Args:
        check: called with the settings of each finetune; raises BadInput for those that
            `qlora finetune` would refuse.

    Raises:
        BadInput: data that cannot be read, or settings that contradict each other.
    """
    library = Library(spec, folder / "data")
    evaluations = [_evaluation(spec, library, name) for name in spec.evaluations]
    planned = []
    for point in draw_points(spec):
        settings = {**_DEFAULTS, **spec.settings, **point}
        data: dict[str, Any] = {}
        if spec.datasets:
            name = settings.pop(DATASET)
            seed = int(settings.get("seed", 0))
            dataset = spec.datasets[name]
            made = library.training(name, seed)
            settings["dataset_name"] = str(made.path)
            settings["seed"] = seed + dataset.seed_shift
            data = {
                "name": name,
                "samples": made.samples,
                "noise": made.noise,
                "digest": made.digest,
            }
            if "recipe" in settings:  # what it says of its own data is not of these
                settings = {**_NOT_OF_RECIPES, "data_seed": settings["seed"], **settings}
        if spec.evaluations:  # what is held out is held out already
            settings.setdefault("eval_split", 0)
        if check is not None:
            check({**settings, "output_dir": str(folder)})
        planned.append(
            Planned(_key(settings, data, evaluations), point, settings, evaluations, data)
        )
    return planned


def _evaluation(spec: Spec, library: Library, name: str) -> dict[str, Any]:
    evaluation = spec.evaluations[name]
    if evaluation.kind == "mmlu":
        from ..evaluate.mmlu_data import read_mmlu

        with bad_input(f"evaluation {name}"):
            questions = read_mmlu(
                evaluation.source, evaluation.split, evaluation.shots, limit=evaluation.held_out
            )
        return {
            "name": name,
            "kind": "mmlu",
            "source": evaluation.source,
            "split": evaluation.split,
            "shots": evaluation.shots,
            "limit": evaluation.held_out,
            "digest": f"{questions.digest} {evaluation.shots} {evaluation.held_out}",
        }
    made = library.evaluation(name)
    return {
        "name": name,
        "kind": "loss",
        "source": str(made.path),
        "samples": made.samples,
        "digest": made.digest,
    }


def _key(
    settings: Mapping[str, Any], data: Mapping[str, Any], evaluations: list[dict[str, Any]]
) -> str:
    """Twelve hexadecimal digits that change with anything that changes the result, and not with
    where the sweep's folder is."""
    told = {k: v for k, v in settings.items() if not (data and k == "dataset_name")}
    told["data"] = data
    told["evaluations"] = [[e["name"], e["kind"], e["digest"]] for e in evaluations]
    text = json.dumps(told, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
