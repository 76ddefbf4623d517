"""Sweeps whose finetunes are played: what each leaves is a function of its point."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from qlora_kernels.sweep import worker
from qlora_kernels.sweep.plan import Planned
from qlora_kernels.sweep.results import SCHEMA


def make_result(planned: Planned, losses: dict[str, np.ndarray], base: float = 3.0, **changes):
    """A ``result.json`` for a planned finetune: evaluation -> a loss for each sample."""
    return {
        "schema": SCHEMA,
        "key": planned.key,
        "point": planned.point,
        "data": planned.data,
        "measured": {
            name: {
                "kind": "loss",
                "digest": "d",
                "values": values.tolist(),
                "base": [base] * len(values),
            }
            for name, values in losses.items()
        },
        "steps": 10,
        "tokens": 1000,
        "train_loss": 1.0,
        "held_out_loss": 2.0,
        "seconds": 30.0,
        "host": "here",
        "workers": 2,
        "continued": False,
        **changes,
    }


@dataclass
class Played:
    """Processes that are none: ``ends`` says for each start, by key, how it ends."""

    ends: dict[str, list[int | str]] = field(default_factory=dict)
    started: list[str] = field(default_factory=list)
    environments: list[dict[str, str]] = field(default_factory=list)
    signals: list[int] = field(default_factory=list)

    def __call__(self, folder: Path, lock: int, environment):
        request = json.loads((folder / "trial.json").read_text())
        key = request["key"]
        self.started.append(key)
        self.environments.append(dict(environment))
        end = self.ends.get(key, [0])
        code = end.pop(0) if len(end) > 1 else end[0]
        if code == 0:
            planned = Planned(key, request["point"], {}, [], request["data"])
            (folder / "result.json").write_text(json.dumps(make_result(planned, {})))
        return self._Process(code, self.signals)

    @dataclass
    class _Process:
        code: int | str
        signals: list[int]

        def poll(self):
            if self.code == "runs" and not self.signals:
                return None
            if self.code == "runs":
                return worker.Outcome(128 + self.signals[0], "stopped")
            return worker.Outcome(self.code, f"words of {self.code}")

        def send(self, number):
            self.signals.append(number)


@pytest.fixture
def played(monkeypatch):
    """Plays the processes of a crew, without waiting between looks."""
    monkeypatch.setattr(worker, "_POLL", 0.005)
    return Played()


@pytest.fixture
def planned():
    """Four finetunes of nothing."""
    return [Planned(f"k{i}", {"r": 4 * i, "seed": 0}, {"r": 4 * i}, [], {}) for i in range(4)]


@pytest.fixture
def conversations(tmp_path):
    """``conversations(name, count, word)``: a file of questions, each with its own reply."""

    def make(name: str, count: int, word: str = "is") -> Path:
        path = tmp_path / name
        with path.open("w") as file:
            for i in range(count):
                turn = {"prompt": f"{word} question {i}?", "completion": f"{word} reply {i}"}
                file.write(json.dumps(turn) + "\n")
        return path

    return make
