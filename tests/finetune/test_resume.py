"""A run that was killed and started again is the run that was not, to the bit."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SETTINGS = {
    "max_steps": 11,
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 2,  # 37 rows: the last step of an epoch has one row
    "save_steps": 2,
    "save_total_limit": 2,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "eval_split": 3,
    "lora_dropout": 0.1,
    "lr_scheduler_type": "cosine",
    "learning_rate": 1e-2,
    "activation_checkpointing": False,
    "max_length": 64,
    "dtype": "float32",
}


def run_cases(tmp_path: Path, model: Path, data: Path, cases, **settings) -> list[dict]:
    settings = {**SETTINGS, "model_name_or_path": str(model), "dataset_name": str(data), **settings}
    request = tmp_path / "request.json"
    request.write_text(json.dumps({"settings": settings, "folder": str(tmp_path), "cases": cases}))
    harness = Path(__file__).with_name("kill_harness.py")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", harness, request], capture_output=True, text=True
    )
    told = "\n".join(p.read_text()[-3000:] for p in sorted(tmp_path.glob("run*.txt")))
    assert done.returncode == 0, f"{done.stderr[-3000:]}\n{told}"
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(cases: list[dict]) -> None:
    """Every case is the first, which was not interrupted."""
    reference = cases[0]
    assert reference["codes"] == [0]
    assert [line[0] for line in reference["log"]] == list(range(1, 12))
    losses = [line[2] for line in reference["log"]]
    assert len(set(losses)) == len(losses) and losses[-1] < losses[0]
    for case in cases[1:]:
        assert case["codes"][-1] == 0
        assert case["log"] == reference["log"]
        assert case["adapter"] == reference["adapter"]
        assert case["evaluations"] == reference["evaluations"]
        assert case["litter"] == []


def kill_points(count: int, number: int, seed: int) -> list[list[dict]]:
    """``number`` places out of ``count``, among them the first and the last."""
    rng = random.Random(seed)
    places = {1, count, *rng.sample(range(2, count), number - 2)}
    return [[{"at": at, "when": rng.choice(["before", "after"])}] for at in sorted(places)]


def count_points(tmp_path: Path, model: Path, data: Path, **settings) -> int:
    (tmp_path / "count").mkdir()
    (case,) = run_cases(tmp_path / "count", model, data, [[]], **settings)
    assert case["count"] > 100
    return case["count"]


def test_killed_at_a_few_points(tmp_path, tiny_model, tiny_data):
    # Inside the first checkpoint, inside a rotation, between two, while the result is written; and
    # twice in one run. SIGTERM and SIGINT save what they interrupt.
    cases = [
        [],
        [{"at": 40, "when": "before"}],
        [{"at": 150, "when": "after"}, {"at": 60, "when": "before"}],
        [{"signal": signal.SIGKILL, "after": 0.1}],
        [{"signal": signal.SIGTERM, "after": 0.1}],
        [{"signal": signal.SIGINT, "after": 0.0}, {"signal": signal.SIGINT, "after": 0.0}],
    ]
    results = run_cases(tmp_path, tiny_model, tiny_data, cases)
    check(results)
    for result in results[1:4]:
        assert result["codes"][0] in (-signal.SIGKILL, 0)
    assert results[1]["codes"] == [-signal.SIGKILL, 0]
    assert results[2]["codes"][0] == -signal.SIGKILL
    assert results[4]["codes"][0] in (128 + signal.SIGTERM, 0)
    assert results[5]["codes"][0] in (128 + signal.SIGINT, 0)
    if results[4]["codes"][0]:
        assert results[4]["steps"][0], "SIGTERM left no checkpoint"


@pytest.mark.full
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train_sampling_strategy": "group_by_length", "activation_checkpointing": True},
        {"packing": True, "optim": "adafactor", "bias": "all", "train_on": "all"},
        {
            "load_best_model_at_end": True,
            "eval_steps": 2,
            "modules_to_save": ["embed_tokens"],
            "max_steps": 11,
        },
    ],
    ids=["plain", "grouped", "packed", "best"],
)
def test_killed_at_thirty_seeded_points(tmp_path, tiny_model, tiny_data, changes):
    count = count_points(tmp_path, tiny_model, tiny_data, **changes)
    cases = [[], *kill_points(count, 30, seed=len(str(changes)))]
    results = run_cases(tmp_path, tiny_model, tiny_data, cases, **changes)
    check(results)
    assert all(r["codes"] == [-signal.SIGKILL, 0] for r in results[1:])


@pytest.mark.full
def test_killed_at_any_moment(tmp_path, tiny_model, tiny_data):
    rng = random.Random(7)
    cases: list[list[dict]] = [[]]
    for _ in range(20):
        number = rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        cases.append([{"signal": number, "after": rng.random()} for _ in range(2)])
    check(run_cases(tmp_path, tiny_model, tiny_data, cases))
