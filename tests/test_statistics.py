"""Intervals and paired differences, against published values and against their own promise."""

from __future__ import annotations

import math

import numpy as np
import pytest

from qlora_kernels import statistics as S


def test_bootstrap_of_a_mean_is_the_normal_interval_for_many_values() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    low, high = S.bootstrap_interval(values)
    half = 1.96 * values.std(ddof=1) / 20
    assert low == pytest.approx(values.mean() - half, abs=0.02)
    assert high == pytest.approx(values.mean() + half, abs=0.02)


def test_bootstrap_takes_other_statistics_levels_and_seeds() -> None:
    values = np.random.default_rng(1).exponential(size=200)
    wide = S.bootstrap_interval(values, np.median, level=0.99, resamples=2000)
    narrow = S.bootstrap_interval(values, np.median, level=0.5, resamples=2000)
    assert wide.low < narrow.low < np.median(values) < narrow.high < wide.high
    again = S.bootstrap_interval(values, np.median, level=0.99, resamples=2000)
    assert again == wide != S.bootstrap_interval(values, np.median, 0.99, 2000, seed=1)


def test_resampling_in_chunks_draws_the_same_rows(monkeypatch) -> None:
    values = np.arange(50.0)
    want = S.bootstrap_interval(values, resamples=100)
    monkeypatch.setattr(S, "_CHUNK", 500)
    assert S.bootstrap_interval(values, resamples=100) == want


def test_three_values_get_students_t() -> None:
    # Mean 2, standard error 1 / sqrt(3), t(0.975, 2) = 4.302653 from the tables.
    low, high = S.mean_interval([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5), abs=1e-5)


@pytest.mark.parametrize("count", [3, 30])
def test_intervals_hold_the_true_mean_as_often_as_they_say(count: int) -> None:
    generator = np.random.default_rng(5)
    held = 0
    for _ in range(200):
        low, high = S.mean_interval(generator.normal(1.0, 1.0, count), level=0.9, resamples=200)
        held += low <= 1.0 <= high
    assert 0.84 <= held / 200 <= 0.95


def test_pairs_see_what_their_spread_hides() -> None:
    generator = np.random.default_rng(2)
    texts = generator.normal(0, 10, 100)
    a = texts + 0.1 + generator.normal(0, 0.05, 100)
    found = S.paired_difference(a, texts)
    assert found.low < 0.1 < found.high and found.excludes_zero
    assert found.high - found.low < 0.05
    assert not S.paired_difference(texts, texts).excludes_zero


def test_a_difference_as_large_as_detectable_is_found_as_often_as_said() -> None:
    from scipy import stats

    generator = np.random.default_rng(3)
    spread = generator.normal(0, 1, 12)
    spread /= spread.std(ddof=1)
    shift = S.detectable_difference(spread, level=0.95, power=0.8)
    runs = generator.normal(shift, 1, (4000, 12))
    assert (stats.ttest_1samp(runs, 0.0, axis=1).pvalue < 0.05).mean() == pytest.approx(
        0.8, abs=0.03
    )


def test_detectable_difference_of_three_seeds() -> None:
    assert S.detectable_difference([-1.0, 0.0, 1.0]) * 3**0.5 == pytest.approx(5.66, abs=0.35)
    # Two differences: t(0.975, 1) is 12.7, and a power of 0.8 takes more than that.
    assert 12.7 < S.detectable_difference([0.0, 2.0]) < 20
    assert S.detectable_difference([0.5, 0.5]) == 0.0
    assert math.isinf(S.detectable_difference([0.5]))


def test_wilson_on_the_textbook_values() -> None:
    assert S.proportion_interval(0, 10) == pytest.approx((0.0, 0.27753), abs=1e-4)
    assert S.proportion_interval(7, 10) == pytest.approx((0.39678, 0.89221), abs=1e-4)
    assert S.proportion_interval(10, 10).high == 1.0


def test_one_value_has_no_interval() -> None:
    assert all(math.isnan(v) for v in S.bootstrap_interval([1.0]))
    assert all(math.isnan(v) for v in S.mean_interval([1.0]))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: S.bootstrap_interval([]), "at least one"),
        (lambda: S.bootstrap_interval([[1.0, 2.0]]), "one row"),
        (lambda: S.bootstrap_interval([1.0, math.nan]), "value 1 is not"),
        (lambda: S.bootstrap_interval([1.0, 2.0], level=95), "between 0 and 1"),
        (lambda: S.bootstrap_interval([1.0, 2.0], resamples=0), "positive"),
        (lambda: S.paired_difference([1.0], [1.0, 2.0]), "pairs"),
        (lambda: S.detectable_difference([1.0, 2.0], power=0.01), "above 1 - level"),
        (lambda: S.proportion_interval(3, 2), "0 to n"),
        (lambda: S.proportion_interval(0, 0), "n positive"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
