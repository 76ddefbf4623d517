"""What a sweep is told: a YAML file, checked before anything runs.

::

    settings:                    # of every finetune, as `qlora finetune` takes them
      model_name_or_path: ./SmolLM2
      max_steps: 200
    vary:                        # names of `qlora finetune`, each with its values
      r: [8, 16, 64]
      quant_type: [nf4, fp4]
      seed: [0, 1, 2]
    datasets:                    # data sets by name; varied like a setting called `dataset`
      all: {source: chat.jsonl}
      few: {source: chat.jsonl, size: 500}
      noisy: {source: chat.jsonl, size: 1000, noise: 0.5, noise_from: junk.jsonl}
      shuffled: {source: chat.jsonl, shuffle_replies: true}
    evaluations:                 # what each finetuned model is measured on
      chat: {source: chat.jsonl, held_out: 200}
      facts: facts.jsonl

The whole schema is in ``docs/sweep.md``.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ..finetune.errors import BadInput

__all__ = ["DataSet", "Evaluation", "Range", "Spec", "nearest", "read_spec"]

DATASET = "dataset"
"""The name under which data sets are varied."""

# Set by the sweep itself, for each finetune.
_RESERVED = {
    "output_dir": "each finetune gets a folder of its own under the sweep's output_dir",
    "overwrite": "a finetune that is there already is not run again",
    "resume_from_checkpoint": "an unfinished finetune goes on by itself",
}
_OF_DATA = ("dataset_name", "dataset_format", "dataset_columns", "eval_dataset")


def nearest(name: str, known: Iterable[str]) -> str:
    """``"; the nearest name is x"``, or nothing where none is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; the nearest name is {near[0]}" if near else ""


@dataclass(frozen=True)
class DataSet:
    """A training set by name: a source, and what is made of it (:mod:`.datasets`).

    Attributes:
        source: as ``dataset_name`` of ``qlora finetune``.
        format, columns: as ``dataset_format`` and ``dataset_columns``.
        size: samples in the finished set; all if None.
        noise: the share of the finished set that is noise, 0 to 1.
        noise_from: the source that noise comes from; replies of other questions of the same source
            if None. In YAML a file, or its own source, format and columns.
        shuffle_replies: give every question another question's reply.
        seed: of the drawing; the finetune's own seed if None, so that another seed draws another
            subset and intervals over seeds hold that as well.
        seed_shift: added to the finetune's seed in training, not in drawing: an equal set under
            another name is then trained in another order.
    """

    name: str
    source: str
    format: str | None = None
    columns: Mapping[str, str] | None = None
    size: int | None = None
    noise: float = 0.0
    noise_from: DataSet | None = None
    shuffle_replies: bool = False
    seed: int | None = None
    seed_shift: int = 0


@dataclass(frozen=True)
class Evaluation:
    """What a finetuned model is measured on.

    Attributes:
        kind: ``"loss"``, nats a token of each sample's reply, or ``"mmlu"``, the share of right
            answers.
        source, format, columns: as for a :class:`DataSet`; of ``mmlu`` the folder of its CSV files.
        held_out: this many samples of ``source`` are drawn for it and kept out of every training
            set; None takes all of them. Of ``mmlu``: this many questions of each subject.
        split, shots: of ``mmlu``.
    """

    name: str
    source: str
    kind: str = "loss"
    format: str | None = None
    columns: Mapping[str, str] | None = None
    held_out: int | None = None
    split: str = "test"
    shots: int = 5

    @property
    def smaller_is_better(self) -> bool:
        return self.kind == "loss"


@dataclass(frozen=True)
class Range:
    """Numbers to draw from, in a random search."""

    low: float
    high: float
    log: bool = False
    whole: bool = False


@dataclass(frozen=True)
class Spec:
    """A checked sweep."""

    settings: Mapping[str, Any]
    vary: Mapping[str, tuple[Any, ...] | Range]
    datasets: Mapping[str, DataSet] = field(default_factory=dict)
    evaluations: Mapping[str, Evaluation] = field(default_factory=dict)
    output_dir: str = "qlora-sweep"
    search: str = "grid"
    trials: int | None = None
    seed: int = 0
    retries: int = 1
    objective: str | None = None
    question: str | None = None
    keep: str = "adapters"
    title: str = ""

    @property
    def goal(self) -> Evaluation | None:
        """The evaluation that ranks the finetunes; None: the finetune's own held-out loss."""
        return self.evaluations[self.objective] if self.objective else None


# --- reading ------------------------------------------------------------------------------------


def read_spec(values: Mapping[str, Any], where: str = "the sweep") -> Spec:
    """The :class:`Spec` in a YAML file's values.

    Args:
        values: as ``read_yaml`` gives them.
        where: what messages call it.

    Raises:
        BadInput: an unknown name (with the nearest known one), a value of a wrong kind, nothing to
            vary, or a set, evaluation or objective that is not there.
    """
    _known(values, [f.name for f in fields(Spec)], where)
    settings = _mapping(values.get("settings"), f"{where}: settings")
    varied = _mapping(values.get("vary"), f"{where}: vary")
    datasets = {
        name: _dataset(name, value, f"{where}: datasets: {name}")
        for name, value in _mapping(values.get("datasets"), f"{where}: datasets").items()
    }
    evaluations = {
        name: _evaluation(name, value, f"{where}: evaluations: {name}")
        for name, value in _mapping(values.get("evaluations"), f"{where}: evaluations").items()
    }
    search = values.get("search", "grid")
    if search not in ("grid", "random"):
        raise BadInput(
            f"{where}: search is {search!r}; it may be grid or random"
            f"{nearest(str(search), ['grid', 'random'])}"
        )
    vary = {
        name: _choices(name, value, search, f"{where}: vary: {name}")
        for name, value in varied.items()
    }
    _check_names(settings, vary, datasets, where)
    if datasets and DATASET not in vary and DATASET not in settings:
        vary = {DATASET: tuple(datasets), **vary}
    if not vary:
        raise BadInput(
            f"{where} varies nothing: give `vary` at least one name with its values, as in "
            "`vary: {r: [8, 16]}`, or several `datasets`"
        )
    for name in vary.get(DATASET, ()) if datasets else ():
        if name not in datasets:
            raise BadInput(
                f"{where}: vary: there is no data set {name!r}{nearest(str(name), datasets)}"
            )
    trials = _whole(values.get("trials"), f"{where}: trials", 1)
    if search == "random" and trials is None:
        raise BadInput(f"{where}: a random search needs `trials`, the number of finetunes")
    if search == "grid" and trials is not None:
        raise BadInput(f"{where}: trials belongs to `search: random`; a grid takes every point")
    objective = values.get("objective", next(iter(evaluations), None))
    if objective is not None and objective not in evaluations:
        raise BadInput(
            f"{where}: objective: there is no evaluation {objective!r}"
            f"{nearest(str(objective), evaluations)}; there are: "
            f"{', '.join(evaluations) or 'none'}"
        )
    keep = values.get("keep", "adapters")
    if keep not in ("adapters", "checkpoints", "nothing"):
        raise BadInput(f"{where}: keep is {keep!r}; it may be adapters, checkpoints or nothing")
    return Spec(
        settings=settings,
        vary=vary,
        datasets=datasets,
        evaluations=evaluations,
        output_dir=str(values.get("output_dir", "qlora-sweep")),
        search=search,
        trials=trials,
        seed=_whole(values.get("seed"), f"{where}: seed", 0) or 0,
        retries=_or(_whole(values.get("retries"), f"{where}: retries", 0), 1),
        objective=objective,
        question=_question(values.get("question"), where),
        keep=keep,
        title=str(values.get("title", "")),
    )


def _or(value: int | None, default: int) -> int:
    return default if value is None else value


def _question(value: Any, where: str) -> str | None:
    from .questions import QUESTIONS

    if value is not None and value not in QUESTIONS:
        raise BadInput(
            f"{where}: there is no question {value!r}{nearest(str(value), QUESTIONS)}; there are: "
            f"{', '.join(QUESTIONS)}"
        )
    return value


def _known(values: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    known = list(known)
    for name in values:
        if name not in known:
            raise BadInput(
                f"{where} has no {name!r}{nearest(str(name), known)}; known are {', '.join(known)}"
            )


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(k, str) for k in value):
        raise BadInput(f"{where} must hold `name: value` lines, it is {_kind(value)}")
    return dict(value)


def _kind(value: Any) -> str:
    if value is None:
        return "empty"
    return f"a {type(value).__name__} ({value!r})" if not isinstance(value, list) else "a list"


def _whole(value: Any, where: str, least: int) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise BadInput(f"{where} is {value!r}; it must be a whole number of at least {least}")
    return value


def _choices(name: str, value: Any, search: str, where: str) -> tuple[Any, ...] | Range:
    if isinstance(value, Mapping):
        if search != "random":
            raise BadInput(f"{where}: a range can be drawn from with `search: random` only; "
                           "a grid needs a list of values")  # fmt: skip
        _known(value, [f.name for f in fields(Range)], where)
        try:
            found = Range(**value)
            low, high = float(found.low), float(found.high)
        except (TypeError, ValueError) as error:
            raise BadInput(f"{where}: a range has low and high, two numbers ({error})") from None
        if not low < high or (found.log and low <= 0):
            raise BadInput(
                f"{where}: low must be below high{', and above 0 for log' if found.log else ''}; "
                f"they are {found.low} and {found.high}"
            )
        return found
    if not isinstance(value, list):
        raise BadInput(f"{where} must be a list of values, it is {_kind(value)}")
    if not value:
        raise BadInput(f"{where} is an empty list: give it at least one value, or leave it out")
    seen: list[Any] = []
    for choice in value:
        if any(choice == other and type(choice) is type(other) for other in seen):
            raise BadInput(f"{where} holds {choice!r} twice")
        seen.append(choice)
    return tuple(value)


def _check_names(
    settings: Mapping[str, Any],
    vary: Mapping[str, Any],
    datasets: Mapping[str, DataSet],
    where: str,
) -> None:
    """Names in ``settings`` and ``vary`` must be those of `qlora finetune`."""
    from ..finetune.config import known_keys
    from ..finetune.names import TRANSLATED

    known = [*known_keys(), *TRANSLATED, "recipe", "scale", *([DATASET] if datasets else [])]
    for part, names in (("settings", settings), ("vary", vary)):
        for name in names:
            if name in _RESERVED:
                raise BadInput(f"{where}: {part}: {name} cannot be given: {_RESERVED[name]}")
            if datasets and name in _OF_DATA:
                raise BadInput(
                    f"{where}: {part}: {name} and `datasets` contradict each other: give the data "
                    "in one of the two"
                )
            if name == DATASET and not datasets:
                raise BadInput(f"{where}: {part}: dataset needs `datasets` to choose from "
                               "(dataset_name takes a file)")  # fmt: skip
            if name not in known:
                raise BadInput(
                    f"{where}: {part}: `qlora finetune` has no option {name}{nearest(name, known)}"
                )
    both = sorted(set(settings) & set(vary))
    if both:
        raise BadInput(f"{where}: {both[0]} is in settings and in vary: keep one of the two")


def _dataset(name: str, value: Any, where: str) -> DataSet:
    if isinstance(value, str):
        value = {"source": value}
    value = _mapping(value, where)
    _known(value, [f.name for f in fields(DataSet) if f.name != "name"], where)
    source = _source(value.get("source"), where)
    noise = value.get("noise", 0.0)
    if isinstance(noise, bool) or not isinstance(noise, (int, float)) or not 0 <= noise <= 1:
        raise BadInput(f"{where}: noise is {noise!r}; it is a share, from 0 to 1")
    if value.get("noise_from") is not None and not noise:
        raise BadInput(f"{where}: noise_from is given, but noise is 0: say how large its share is")
    shuffle = value.get("shuffle_replies", False)
    if not isinstance(shuffle, bool):
        raise BadInput(f"{where}: shuffle_replies is {shuffle!r}; it is true or false")
    noise_from = value.get("noise_from")
    return DataSet(
        name=name,
        source=source,
        format=value.get("format"),
        columns=_mapping(value.get("columns"), f"{where}: columns") or None,
        size=_whole(value.get("size"), f"{where}: size", 2),
        noise=float(noise),
        noise_from=None if noise_from is None else _noise(noise_from, f"{where}: noise_from"),
        shuffle_replies=shuffle,
        seed=_whole(value.get("seed"), f"{where}: seed", 0),
        seed_shift=_whole(value.get("seed_shift"), f"{where}: seed_shift", 0) or 0,
    )


def _noise(value: Any, where: str) -> DataSet:
    if isinstance(value, str):
        value = {"source": value}
    value = _mapping(value, where)
    _known(value, ["source", "format", "columns"], where)
    return _dataset("noise", value, where)


def _evaluation(name: str, value: Any, where: str) -> Evaluation:
    if isinstance(value, str):
        value = {"source": value}
    value = _mapping(value, where)
    _known(value, [f.name for f in fields(Evaluation) if f.name != "name"], where)
    kind = value.get("kind", "loss")
    if kind not in ("loss", "mmlu"):
        raise BadInput(f"{where}: kind is {kind!r}; it may be loss or mmlu")
    if kind == "loss" and ("split" in value or "shots" in value):
        raise BadInput(f"{where}: split and shots belong to `kind: mmlu`")
    return Evaluation(
        name=name,
        source=_source(value.get("source"), where),
        kind=kind,
        format=value.get("format"),
        columns=_mapping(value.get("columns"), f"{where}: columns") or None,
        held_out=_whole(value.get("held_out"), f"{where}: held_out", 1),
        split=str(value.get("split", "test")),
        shots=_or(_whole(value.get("shots"), f"{where}: shots", 0), 5),
    )


def _source(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise BadInput(f"{where}: source is missing: a file, a folder, python-docs or a hub id")
    return os.path.expanduser(value)
