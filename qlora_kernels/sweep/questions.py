"""The two questions of the QLoRA paper, as sweeps.

*quality-or-quantity*: at equal steps, is a small clean set better than a large one with noise in
it? *chat-or-knowledge*: does the set that helps most at chat help at knowledge too?

Each preset is an ordinary sweep (it is written out as ``sweep.yaml``) with two controls: an equal
set under another name, trained in another order, must tie with its twin, and a set whose replies
are shuffled must lose. :mod:`.answers` draws no conclusion where one of them fails.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..finetune.errors import BadInput

__all__ = ["CHAT", "QUALITY", "QUESTIONS", "Sources", "preset"]

QUALITY, CHAT = "quality-or-quantity", "chat-or-knowledge"
QUESTIONS: dict[str, str] = {
    QUALITY: "at equal steps, is a small clean set better than a large one with noise in it?",
    CHAT: "does the set that helps most at chat help at knowledge too?",
}

AGAIN = 1000
"""What the control's twin adds to its seeds."""

# Short enough for a laptop; `--set` and a YAML file's `settings` say otherwise.
_SETTINGS: dict[str, Any] = {
    "max_steps": 60,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "max_length": 256,
    "learning_rate": 5e-4,
    "r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.0,
    "activation_checkpointing": False,
}
_PARTS = 4  # the large set is this many times the small one
_MOST = 4000  # samples of the large set, where the user does not say


@dataclass(frozen=True)
class Sources:
    """Where a preset's data come from; each is a data set's entry of a YAML file.

    Attributes:
        data, noise: of quality-or-quantity.
        chat, knowledge: of chat-or-knowledge; ``mmlu`` is a folder of MMLU's CSV files, which then
            measure knowledge in place of held-out samples.
        held_out: samples that measure, of each source.
        size: of the largest set; as large as the source allows if None.
        seeds: finetunes of each set.
    """

    data: Mapping[str, Any] | None = None
    noise: Mapping[str, Any] | None = None
    chat: Mapping[str, Any] | None = None
    knowledge: Mapping[str, Any] | None = None
    mmlu: str | None = None
    held_out: int = 100
    size: int | None = None
    seeds: int = 3


def preset(question: str, sources: Sources, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a sweep's YAML file for a question.

    Raises:
        BadInput: a source that is missing, or that has too few samples.
    """
    if sources.seeds < 2:
        raise BadInput("--seeds must be at least 2: with one, the luck of training is not seen")
    make = _quality if question == QUALITY else _chat
    values = make(sources)
    # Equal steps for every set, so that none is trained more than another.
    values["settings"] = {**_SETTINGS, **settings}
    if values["settings"]["max_steps"] < 1:
        raise BadInput(f"{question} compares sets at equal steps: give max_steps")
    values["vary"] = {
        "dataset": list(values["datasets"]),
        "seed": list(range(sources.seeds)),
    }
    return {"title": QUESTIONS[question], "question": question, **values}


def _quality(sources: Sources) -> dict[str, Any]:
    data = sources.data or {"source": "python-docs"}
    size = _size(sources, data) // _PARTS * _PARTS
    small = size // _PARTS
    noise = {"noise_from": dict(sources.noise)} if sources.noise else {}
    return {
        "datasets": {
            "small": {**data, "size": small},
            "half": {**data, "size": size // 2},
            "large": {**data, "size": size},
            # The same clean samples as in `half` and in `small`, and noise up to the same size.
            "large-half-noise": {**data, "size": size, "noise": 0.5, **noise},
            "large-noise": {**data, "size": size, "noise": 1 - 1 / _PARTS, **noise},
            "large-again": {**data, "size": size, "seed_shift": AGAIN},
            "large-shuffled": {**data, "size": size, "shuffle_replies": True},
        },
        "evaluations": {"held-out": {**data, "held_out": sources.held_out}},
    }


def _chat(sources: Sources) -> dict[str, Any]:
    if sources.chat is None:
        raise BadInput(
            f"{CHAT} needs --chat, a file of conversations, and --knowledge, one of questions and "
            "facts (python-docs if left out); --mmlu FOLDER measures knowledge by MMLU"
        )
    knowledge = sources.knowledge or {"source": "python-docs"}
    size = min(_size(sources, sources.chat), _size(sources, knowledge)) // 2 * 2
    if sources.mmlu is not None:
        measure: dict[str, Any] = {"kind": "mmlu", "source": sources.mmlu}
    else:
        measure = {**knowledge, "held_out": sources.held_out}
    return {
        "datasets": {
            "chat": {**sources.chat, "size": size},
            "knowledge": {**knowledge, "size": size},
            "both": {**sources.chat, "size": size, "noise": 0.5, "noise_from": dict(knowledge)},
            "chat-again": {**sources.chat, "size": size, "seed_shift": AGAIN},
            "chat-shuffled": {**sources.chat, "size": size, "shuffle_replies": True},
        },
        "evaluations": {
            "chat": {**sources.chat, "held_out": sources.held_out},
            "knowledge": measure,
        },
    }


def _size(sources: Sources, data: Mapping[str, Any]) -> int:
    if sources.size is not None:
        if sources.size < 2 * _PARTS:
            raise BadInput(f"--size is {sources.size}; it must be at least {2 * _PARTS}")
        return sources.size
    from .datasets import Library
    from .spec import read_spec

    values = {"datasets": {"all": dict(data)}, "evaluations": {},
              "vary": {"dataset": ["all"]}}  # fmt: skip
    there = Library(read_spec(values), Path()).available("all") - 2 * sources.held_out
    if there < 2 * _PARTS:
        raise BadInput(
            f"{data['source']} has too few samples to hold {sources.held_out} out and train on the "
            "rest: lower --held_out, or give more data"
        )
    return min(there, _MOST)
