"""MMLU during a finetune: before the first step, at each evaluation, after the last step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..finetune.checkpoint import replace_file, write_json
from .mmlu import measure
from .mmlu_data import Mmlu
from .mmlu_report import SCHEMA, summarise

__all__ = ["MmluCallback"]


class MmluCallback(TrainerCallback):
    """Asks the model that is being trained, and keeps what came out.

    Training is not changed by it: it draws no random numbers, and the model is put back as it was.

    Args:
        data: the questions.
        tokenizer: the model's.
        file: where the results are kept, complete after each; those of an earlier part of the same
            run are taken up.
        batch_size, max_length: as :func:`.mmlu.measure` has them.
        say: told each result in a line.
    """

    def __init__(
        self,
        data: Mmlu,
        tokenizer: Any,
        file: Path,
        batch_size: int,
        max_length: int,
        say: Callable[[str], Any],
    ) -> None:
        self.data, self.tokenizer, self.file = data, tokenizer, file
        self.batch_size, self.max_length, self.say = batch_size, max_length, say
        self.evaluations: list[dict[str, Any]] = []

    def take_up(self, step: int) -> None:
        """The results up to ``step`` of a run that goes on, if they are of these questions."""
        try:
            kept = json.loads(self.file.read_text("utf-8"))
        except (OSError, ValueError):
            return
        if all(kept.get(name) == value for name, value in self._head().items()):
            self.evaluations = [e for e in kept["evaluations"] if e["step"] <= step]

    def _head(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "kind": "mmlu of a finetune",
            "split": self.data.split,
            "shots": self.data.shots,
            "questions": len(self.data),
            "digest": self.data.digest,
        }

    def on_evaluate(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        self.measure(model, state.global_step)

    def measure(self, model: Any, step: int) -> None:
        """Asks ``model`` as it is after ``step``, unless that has been done."""
        if any(e["step"] == step for e in self.evaluations):
            return
        answers = measure(
            model,
            self.tokenizer,
            self.data,
            batch_size=self.batch_size,
            max_length=self.max_length,
        )
        found = summarise(answers, self.data)
        found = {"step": step, **{k: v for k, v in found.items() if k not in self._head()}}
        self.evaluations = sorted([*self.evaluations, found], key=lambda e: e["step"])
        replace_file(self.file, lambda aside: write_json(aside, self.result()))
        self.say(
            f"MMLU (split {self.data.split}, {self.data.shots}-shot) after step {step}: "
            f"{100 * found['accuracy']:.1f}%, 95% interval {100 * found['low']:.1f} to "
            f"{100 * found['high']:.1f}% ({found['correct']} of {len(self.data)})"
        )

    def result(self) -> dict[str, Any]:
        """All that was measured; the split is in it."""
        return {**self._head(), "evaluations": self.evaluations}
