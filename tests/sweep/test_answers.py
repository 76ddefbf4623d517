"""What results say: intervals that hold the truth, controls that fail, conclusions not drawn."""

from __future__ import annotations

import json

import numpy as np
import pytest

from qlora_kernels.finetune.errors import BadInput
from qlora_kernels.statistics import detectable_difference
from qlora_kernels.sweep.answers import _detectable, answer, compare, crossed_interval
from qlora_kernels.sweep.plan import Planned
from qlora_kernels.sweep.questions import CHAT, QUALITY
from qlora_kernels.sweep.queue import Failure
from qlora_kernels.sweep.report import finetunes_a_day, make_report, to_markdown, write_report
from qlora_kernels.sweep.results import Measured, read_result
from qlora_kernels.sweep.spec import DataSet, Evaluation, Spec

from .conftest import make_result

SAMPLES = 60


def results_of(tmp_path, means, evaluations=("held-out",), seeds=3, noise=0.02):
    """Results by data set: each sample has its own difficulty, each seed its own luck."""
    rng = np.random.default_rng(0)
    hard = {e: rng.normal(0, 0.5, SAMPLES) for e in evaluations}
    found = []
    for name, mean in means.items():
        for seed in range(seeds):
            point = {"dataset": name, "seed": seed}
            planned = Planned(
                f"{name}{seed}", point, {}, [], {"name": name, "samples": 10, "noise": 0}
            )
            values = mean if isinstance(mean, tuple) else (mean,)
            losses = {
                e: value + hard[e] + rng.normal(0, noise) + rng.normal(0, noise, SAMPLES)
                for e, value in zip(evaluations, values, strict=True)
            }
            path = tmp_path / f"{planned.key}.json"
            path.write_text(json.dumps(make_result(planned, losses)))
            found.append(read_result(path))
    return found


QUALITY_MEANS = {
    "small": 2.0, "half": 1.95, "large": 1.9, "large-half-noise": 2.2, "large-noise": 2.4,
    "large-again": 1.9, "large-shuffled": 2.9,
}  # fmt: skip


def test_the_interval_holds_the_truth_as_often_as_it_says():
    # Variances of seeds, of samples and of what is neither, each in turn the largest.
    rng = np.random.default_rng(1)
    for seeds, samples, rest in (
        (0.3, 0.3, 0.1),
        (0.05, 1.0, 0.1),
        (0.5, 0.1, 0.1),
        (0.0, 0.3, 0.9),
    ):
        inside = 0
        for _ in range(120):
            d = rng.normal(0, seeds, (4, 1)) + rng.normal(0, samples, (1, 7))
            d = d + rng.normal(0, rest, (4, 7))
            _, low, high, _ = crossed_interval(d)
            inside += low <= 0 <= high
        assert inside / 120 >= 0.9, (seeds, samples, rest)


def test_a_difference_that_shows_and_one_that_does_not():
    rng = np.random.default_rng(2)
    base = rng.normal(3, 1, 50)
    a = {s: Measured("loss", base - 0.2 + rng.normal(0, 0.05, 50), base, "d") for s in range(3)}
    b = {s: Measured("loss", base + rng.normal(0, 0.05, 50), base, "d") for s in range(3)}
    found = compare(("a", a), ("b", b), "chat")
    assert found.better and abs(found.difference - 0.2) < 0.05  # lower loss is better
    assert compare(("b", b), ("a", a), "chat").worse
    # An accuracy is better when it is larger.
    right = {0: Measured("mmlu", np.array([1.0, 1, 1, 0]), np.array([0.0, 0, 1, 0]), "d")}
    assert compare(("a", right), None, "mmlu").difference == 0.5
    assert compare(("a", a), ("c", {9: a[0]}), "chat") is None


def test_one_seed_has_an_interval_over_samples_alone():
    d = np.random.default_rng(0).normal(1, 0.1, (1, 30))
    mean, low, high, found = crossed_interval(d)
    assert low < mean < high and 0 < found < 1
    assert np.isnan(crossed_interval(np.ones((1, 1)))[1])


def test_the_smallest_detectable_difference_is_the_one_of_statistics():
    for values in (np.array([0.1, 0.4, -0.2]), np.random.default_rng(0).normal(3, 2, 60)):
        assert np.isclose(_detectable(values), detectable_difference(values), rtol=1e-6)


def test_quality_beats_quantity(tmp_path):
    said = answer(QUALITY, results_of(tmp_path, QUALITY_MEANS))
    assert [c.passed for c in said.controls] == [True, True]
    assert said.conclusion.startswith("Quality beats quantity") and not said.why_not
    main = said.comparisons[0]
    assert (main.a, main.b) == ("small", "large-noise") and abs(main.difference - 0.4) < 0.1
    assert main.detectable < main.difference


def test_quantity_beats_quality(tmp_path):
    means = {**QUALITY_MEANS, "large-noise": 1.6, "large-half-noise": 1.7}
    said = answer(QUALITY, results_of(tmp_path, means))
    assert said.conclusion.startswith("Quantity beats quality")


def test_no_difference_is_no_conclusion_of_one(tmp_path):
    said = answer(QUALITY, results_of(tmp_path, {**QUALITY_MEANS, "large-noise": 2.0}))
    assert (
        said.conclusion.startswith("No difference is seen")
        and "four times in five" in said.conclusion
    )


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"large-again": 2.3}, "equal sets under two names tie"),
        ({"large-shuffled": 1.9}, "shuffled replies lose"),
        ({"large-shuffled": 1.2}, "shuffled replies lose"),
    ],
)
def test_a_control_that_fails_leaves_no_conclusion(tmp_path, changes, told):
    said = answer(QUALITY, results_of(tmp_path, {**QUALITY_MEANS, **changes}))
    assert said.conclusion == "" and told in said.why_not
    assert [c.passed for c in said.controls].count(False) >= 1


def test_what_has_not_finished_leaves_no_conclusion(tmp_path):
    means = dict(QUALITY_MEANS)
    del means["small"]
    assert "no finetune on small" in answer(QUALITY, results_of(tmp_path, means)).why_not
    assert answer(QUALITY, []).why_not
    alone = answer(QUALITY, results_of(tmp_path, QUALITY_MEANS, seeds=1))
    assert "fewer than two seeds" in alone.why_not and not alone.conclusion


@pytest.mark.parametrize(
    "chat, told",
    [
        ((2.0, 2.7), "Of the sets, chat helps most at chat; at knowledge it helps too"),
        ((2.0, 3.4), "at knowledge it does harm"),
        ((2.0, 3.0), "makes no difference that could be seen"),
    ],
)
def test_chat_or_knowledge(tmp_path, chat, told):
    means = {"chat": chat, "chat-again": chat, "knowledge": (2.9, 2.0), "both": (2.3, 2.4),
             "chat-shuffled": (3.3, 3.3)}  # fmt: skip
    said = answer(CHAT, results_of(tmp_path, means, ("chat", "knowledge"), noise=0.01))
    if "no difference" in told:  # the base's loss is 3 on each sample, and samples differ by 0.5
        assert said.comparisons
    assert told in said.conclusion
    assert "Each set is the better one at its own" in said.conclusion


# --- the report ---------------------------------------------------------------------------------


def spec_of(**values):
    return Spec(
        settings={},
        vary={"dataset": tuple(QUALITY_MEANS), "seed": (0, 1, 2)},
        datasets={name: DataSet(name, "x.jsonl") for name in QUALITY_MEANS},
        evaluations={"held-out": Evaluation("held-out", "y.jsonl")},
        objective="held-out",
        **values,
    )


def test_the_report_ranks_and_says_what_failed(tmp_path):
    results = results_of(tmp_path, QUALITY_MEANS)
    planned = [Planned(r.key, r.point, {}, [], r.data) for r in results]
    planned.append(Planned("bad", {"dataset": "small", "seed": 9}, {}, [], {}))
    failures = [Failure("bad", 2, "killed by SIGKILL")]
    report = make_report(spec_of(question=QUALITY), planned, results, failures)
    assert (report["planned"], report["complete"]) == (22, 21)
    assert report["rows"][0]["point"]["dataset"] in ("large", "large-again")
    assert report["rows"][-1]["point"]["dataset"] == "large-shuffled"
    row = report["rows"][0]["measured"]["held-out"]
    assert row["low"] < row["gain"] < row["high"] and abs(row["gain"] - 1.1) < 0.2
    write_report(tmp_path, report)
    page = (tmp_path / "sweep.md").read_text()
    assert "**Quality beats quantity here" in page and "killed by SIGKILL" in page
    assert "equal sets under two names tie: **yes**" in page
    found = json.loads((tmp_path / "sweep.json").read_text())
    assert found["schema"] == 1 and found["answer"]["controls"][0]["passed"] is True
    assert (tmp_path / "sweep.png").read_bytes()[:4] == b"\x89PNG"


def test_a_failed_control_is_in_the_page(tmp_path):
    results = results_of(tmp_path, {**QUALITY_MEANS, "large-again": 2.3})
    planned = [Planned(r.key, r.point, {}, [], r.data) for r in results]
    page = to_markdown(make_report(spec_of(question=QUALITY), planned, results, []))
    assert "**No conclusion:**" in page and "tie: **NO**" in page
    assert "Quality beats" not in page


def test_a_report_of_nothing(tmp_path):
    report = make_report(spec_of(), [], [], [])
    write_report(tmp_path, report)
    assert "nothing is complete yet" in (tmp_path / "sweep.md").read_text()
    assert not (tmp_path / "sweep.png").exists()


def test_finetunes_a_day(tmp_path):
    results = results_of(tmp_path, {"a": 1.0})
    rate = finetunes_a_day(results)["here"]
    assert rate["a_day"] == 86400 * 2 / 30 and rate["finetunes"] == 3


def test_results_of_another_schema_or_not_whole(tmp_path):
    planned = Planned("k", {}, {}, [], {})
    path = tmp_path / "result.json"
    path.write_text(json.dumps(make_result(planned, {}, schema=2)))
    with pytest.raises(BadInput, match="schema 2"):
        read_result(path)
    values = make_result(planned, {})
    del values["seconds"]
    path.write_text(json.dumps(values))
    with pytest.raises(BadInput, match="not a whole result"):
        read_result(path)
    path.write_text("{")
    with pytest.raises(BadInput, match="cannot be read"):
        read_result(path)
