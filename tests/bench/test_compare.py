"""Comparing two results: a true change is flagged, noise and a slower machine are not."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from qlora_kernels.bench import compare as comparing
from qlora_kernels.bench import results
from qlora_kernels.finetune.errors import BadInput

MACHINE = {"processor": "P", "family_model": "1/2", "cores": 2, "threads": 1, "kernels_isa": "avx2",
           "torch_isa": "AVX2", "torch": "2.13", "python": "3.11", "qlora_kernels": "0.1.0",
           "packages": {"numpy": "2"}}  # fmt: skip


def noisy(seconds, seed, rounds=3, samples=7, noise=0.08, drift=0.02):
    """Samples as machines give them: long-tailed, and with a pace of its own in each round."""
    rng = np.random.default_rng(seed)
    return [
        (seconds * rng.normal(1, drift) * (1 + noise * rng.exponential(1, samples))).tolist()
        for _ in range(rounds)
    ]


def result(times, seed, *, machine_pace=1.0, kind="measured"):
    """A result whose contender ``qlora cpu`` takes ``times[key]`` seconds."""
    limit = {"amount": 1e9, "rounds": noisy(0.05 * machine_pace, seed + 999)}
    lines = [
        {"key": key, "op": "forward", "control": "read", "failed": {},
         "contenders": {"qlora cpu": {"rounds": noisy(s * machine_pace, seed + i)}}}
        for i, (key, s) in enumerate(times.items())
    ]  # fmt: skip
    return {"schema": 1, "tool": results.TOOL, "kind": kind, "device": "cpu", "clock": "wall",
            "complete": True, "machine": copy.deepcopy(MACHINE), "settings": {},
            "limits": {"read": limit}, "lines": lines}  # fmt: skip


def verdicts(a, b, **options):
    return {c.key: c.verdict for c in comparing.compare(a, b, resamples=500, **options)}


LINES = {f"line {i}": 0.001 * (i + 1) for i in range(20)}


def test_noise_is_not_flagged():
    found = verdicts(result(LINES, 1), result(LINES, 5000))
    assert len(found) == 20
    assert not {"slower", "quicker"} & set(found.values())


def test_a_regression_of_30_percent_is_flagged_and_an_improvement_too():
    after = dict(LINES) | {"line 3": LINES["line 3"] * 1.3, "line 8": LINES["line 8"] / 1.3}
    found = verdicts(result(LINES, 2), result(after, 6000))
    assert found.pop("line 3") == "slower" and found.pop("line 8") == "quicker"
    assert not {"slower", "quicker"} & set(found.values())
    (change,) = [c for c in comparing.compare(result(LINES, 2), result(after, 6000), resamples=200)
                 if c.key == "line 3"]  # fmt: skip
    assert change.low > 1.05 and change.low < change.ratio < change.high
    assert change.low < 1.3 < change.high


def test_a_slower_machine_is_not_a_regression():
    found = verdicts(result(LINES, 3), result(LINES, 7000, machine_pace=1.4))
    assert not {"slower", "quicker"} & set(found.values())
    assert "the machine" in found.values()


def test_the_tolerance_is_what_it_says():
    after = {k: s * 1.3 for k, s in LINES.items()}
    found = verdicts(result(LINES, 4), result(after, 8000), tolerance=0.5)
    assert "slower" not in found.values()


def test_intervals_hold_the_true_ratio():
    """95% intervals of a known ratio, rounds drifting: near their level, and never degenerate."""
    held = 0
    for seed in range(60):
        a, b = noisy(1, seed, rounds=5), noisy(1.1, 10_000 + seed, rounds=5)
        ratio, low, high = comparing.ratio_interval(a, b, resamples=400)
        assert low < ratio < high
        held += low <= 1.1 <= high
    assert held >= 51  # binomial: 95% of 60 is 57; 51 has a chance of 2% at 90%


def test_resampling_counts_rounds_and_not_samples():
    """Samples of one round say little more than one of them: many make no narrower interval."""
    few = [noisy(1, s, samples=7, noise=0.0, drift=0.05) for s in (1, 2)]
    many = [noisy(1, s, samples=200, noise=0.0, drift=0.05) for s in (1, 2)]
    widths = [high - low for _, low, high in
              (comparing.ratio_interval(*pair, resamples=200) for pair in (few, many))]  # fmt: skip
    assert widths[1] > 0.5 * widths[0] > 0


def test_the_same_seed_gives_the_same_interval():
    a, b = noisy(1, 1), noisy(1, 2)
    assert comparing.ratio_interval(a, b) == comparing.ratio_interval(a, b)


def test_one_round_and_one_sample_work():
    assert comparing.ratio_interval([[2.0]], [[3.0]]) == (1.5, 1.5, 1.5)
    ratio, low, high = comparing.ratio_interval(noisy(1, 1, rounds=1), noisy(2, 2, rounds=1))
    assert low < ratio < high and 1.5 < low and high < 2.6


def test_different_machines_are_refused_and_said():
    a, b = result(LINES, 1), result(LINES, 2)
    b["machine"]["processor"] = "Q"
    with pytest.raises(BadInput, match="processor: P and Q.*--across-machines"):
        comparing.check_comparable(a, b)
    machine, software = comparing.check_comparable(a, b, across=True)
    assert machine == ["processor: P and Q"] and software == []


def test_other_software_is_said_and_compared():
    a, b = result(LINES, 1), result(LINES, 2)
    b["machine"]["torch"] = "2.14"
    b["machine"]["packages"]["bitsandbytes"] = "1"
    assert comparing.check_comparable(a, b) == (
        [], ["torch: 2.13 and 2.14", "bitsandbytes: None and 1"]
    )  # fmt: skip


def test_measured_and_modelled_are_never_compared():
    a, b = result(LINES, 1), result(LINES, 1, kind="modelled")
    with pytest.raises(BadInput, match="one result is measured and the other modelled"):
        comparing.check_comparable(a, b, across=True)
    b["machine"]["processor"] = "Q"  # of which nothing is in a model's figure
    assert comparing.check_comparable(b, result(LINES, 1, kind="modelled")) == ([], [])


def test_what_one_result_lacks_is_listed():
    a, b = result(LINES, 1), result(LINES, 1)
    del b["lines"][0]
    b["lines"][0]["contenders"] = {}
    b["lines"][0]["failed"] = {"qlora cpu": "wrong"}
    assert comparing.only_in(a, b) == ["line 0", "line 1: qlora cpu (wrong)"]
    assert comparing.only_in(b, a) == []
