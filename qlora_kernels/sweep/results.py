"""What a finetune of a sweep leaves, read back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..finetune.errors import BadInput

__all__ = ["SCHEMA", "Measured", "Result", "read_result"]

SCHEMA = 1


@dataclass(frozen=True)
class Measured:
    """One evaluation of one finetuned model.

    Attributes:
        kind: ``loss`` (smaller is better) or ``mmlu`` (larger is).
        values: float64 ``[n]``, one a sample or question: nats a token, or 1 for a right answer.
        base: the same of the model before finetuning.
        digest: of the samples; values of equal digests are pairs.
    """

    kind: str
    values: np.ndarray
    base: np.ndarray
    digest: str

    @property
    def mean(self) -> float:
        return float(self.values.mean())


@dataclass(frozen=True)
class Result:
    """What is in ``result.json``.

    Attributes:
        held_out_loss: the finetune's own, where it holds samples out.
        seconds: of training and measuring together.
        continued: it was interrupted on the way, so that ``seconds`` are not all of it.
    """

    key: str
    point: dict[str, Any]
    data: dict[str, Any]
    measured: dict[str, Measured]
    steps: int
    tokens: int
    train_loss: float | None
    held_out_loss: float | None
    seconds: float
    host: str
    workers: int
    continued: bool

    def value(self, objective: str | None) -> float:
        """The mean of an evaluation; the finetune's own held-out loss if None.

        Raises:
            BadInput: it is not finite, or there is none.
        """
        value = self.held_out_loss if objective is None else self.measured[objective].mean
        if value is None:
            raise BadInput("nothing was measured: give `evaluations`, or leave eval_split above 0")
        if not math.isfinite(value):
            raise BadInput(f"{objective or 'the held-out loss'} is {value}")
        return float(value)


def read_result(path: Path) -> Result:
    """Raises BadInput where the file is absent, no JSON, of another schema or incomplete."""
    try:
        values = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read: {error}") from error
    schema = values.get("schema") if isinstance(values, Mapping) else None
    if schema != SCHEMA:
        raise BadInput(f"{path} is of schema {schema!r}; this version reads {SCHEMA}")
    try:
        measured = {
            name: Measured(
                entry["kind"],
                np.asarray(entry["values"], np.float64),
                np.asarray(entry["base"], np.float64),
                entry["digest"],
            )
            for name, entry in values["measured"].items()
        }
        names = [f for f in Result.__dataclass_fields__ if f != "measured"]
        return Result(measured=measured, **{name: values[name] for name in names})
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{path} is not a whole result ({error!r})") from error
