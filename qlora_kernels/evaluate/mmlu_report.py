"""From answers to MMLU questions to shares with intervals: in all, by category, by subject."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..statistics import proportion_interval
from .mmlu_data import CATEGORIES, LETTERS, Mmlu
from .mmlu_score import Answer

__all__ = ["CHANCE", "SCHEMA", "summarise", "table"]

SCHEMA = 1
CHANCE = 0.25


def _share(answers: Sequence[Answer]) -> dict[str, Any]:
    """Right answers among all, with Wilson's 95% interval."""
    correct, count = sum(a.correct for a in answers), len(answers)
    low, high = proportion_interval(correct, count)
    return {
        "accuracy": correct / count,
        "low": low,
        "high": high,
        "correct": correct,
        "questions": count,
    }


def summarise(answers: Sequence[Answer], data: Mmlu) -> dict[str, Any]:
    """The result as ``qlora mmlu`` writes it, without what says which model it is of.

    ``accuracy`` is the share of all questions, as the authors report it; ``mean_of_subjects``
    weighs a subject of a hundred questions like one of a thousand. Intervals are Wilson's, 95%:
    how the figure would vary with other questions of the same kind.
    """
    by_subject = {s.name: [a for a in answers if a.subject == s.name] for s in data.subjects}
    categories = {
        name: [a for s in data.subjects if s.category == name for a in by_subject[s.name]]
        for name in CATEGORIES
    }
    subjects = {
        s.name: {"category": s.category, **_share(by_subject[s.name])} for s in data.subjects
    }
    return {
        "schema": SCHEMA,
        "kind": "mmlu",
        "split": data.split,
        "shots": data.shots,
        "digest": data.digest,
        **_share(answers),
        "mean_of_subjects": sum(s["accuracy"] for s in subjects.values()) / len(subjects),
        "chance": CHANCE,
        "fewer_shots": sum(a.shots < data.shots for a in answers),
        "cut": sum(a.cut for a in answers),
        "categories": {name: _share(found) for name, found in categories.items() if found},
        "subjects": subjects,
    }


def items(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """A record a question, in the order of subjects and their files, for paired comparisons."""
    return [
        {
            "subject": a.subject,
            "index": a.index,
            "answer": LETTERS[a.answer],
            "chosen": LETTERS[a.chosen],
            "log_likelihoods": list(a.log_likelihoods),
        }
        for a in sorted(answers, key=lambda a: (a.subject, a.index))
    ]


def table(result: dict[str, Any], subjects: bool = True) -> list[str]:
    """A result for a terminal, a line each; the split is in the first."""
    width = max([24, *(len(name) for name in result["subjects"])] if subjects else [24])

    def line(name: str, share: dict[str, Any]) -> str:
        return (
            f"{name:<{width}} {100 * share['accuracy']:5.1f}%  "
            f"{100 * share['low']:5.1f} to {100 * share['high']:5.1f}%  "
            f"({share['correct']} of {share['questions']})"
        )

    lines = [f"MMLU, split {result['split']}, {result['shots']}-shot; 95% intervals (Wilson)"]
    if subjects:
        lines += [line(name, share) for name, share in result["subjects"].items()] + [""]
    lines += [line(name, share) for name, share in result["categories"].items()]
    lines += [line("all questions", result)]
    lines += [
        f"mean of {len(result['subjects'])} subjects: {100 * result['mean_of_subjects']:.1f}%"
    ]
    if result["low"] <= CHANCE <= result["high"]:
        lines.append("guessing gives 25%, which the interval holds")
    if result["fewer_shots"]:
        lines.append(
            f"{result['fewer_shots']} questions had fewer than {result['shots']} examples before "
            "them: all of them do not fit the prompt's length"
        )
    if result["cut"]:
        lines.append(
            f"{result['cut']} questions were longer than a prompt may be and lost their beginning"
        )
    return lines
