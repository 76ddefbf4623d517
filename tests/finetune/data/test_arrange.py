"""What is held out, what shares a row, in which order: pure functions of a seed."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_kernels.finetune.data import (
    IGNORE,
    DataError,
    EpochSampler,
    Sample,
    Samples,
    epoch_order,
    hold_out,
    pack,
)


def names(count: int, per_group: int = 1) -> list[str]:
    return [f"group {i // per_group}" for i in range(count)]


# --------------------------------------------------------------------------- held out


@pytest.mark.parametrize(
    "share, count", ((0.1, 20), (17, 17), (1, 1), (0.001, 1), (0, 0), (0.0, 0))
)
def test_as_many_are_held_out_as_were_asked_for(share, count):
    assert hold_out(names(200), share, seed=0).sum() == count


def test_the_split_is_a_function_of_the_seed():
    first = hold_out(names(200), 0.2, seed=1)
    assert (first == hold_out(names(200), 0.2, seed=1)).all()
    assert (first != hold_out(names(200), 0.2, seed=2)).any()


def test_groups_are_never_split():
    groups = names(300, per_group=3)
    held = hold_out(groups, 0.1, seed=0).reshape(-1, 3)
    assert (held.all(1) == held.any(1)).all() and held.sum() == 30


def test_neither_order_nor_other_samples_move_one():
    groups = names(200)
    held = {g for g, out in zip(groups, hold_out(groups, 0.2, 0), strict=True) if out}
    mixed = np.random.default_rng(0).permutation(groups).tolist()
    assert held == {g for g, out in zip(mixed, hold_out(mixed, 0.2, 0), strict=True) if out}
    more = [*groups, *(f"new {i}" for i in range(200))]
    later = {g for g, out in zip(more, hold_out(more, 0.2, 0), strict=True) if out}
    # As many again are held out, so about the same hashes: those at the edge may move.
    assert len(held & later) >= 0.7 * len(held)


def test_something_is_left_to_train_on():
    assert not hold_out(names(2), 0.9, seed=0).all()
    with pytest.raises(DataError, match="asks for 200 samples, and there are 200"):
        hold_out(names(200), 200, seed=0)
    with pytest.raises(DataError, match="all samples are alike"):
        hold_out(["one"] * 10, 0.1, seed=0)


# --------------------------------------------------------------------------- packed


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 64), max_size=200), st.integers(0, 3))
def test_every_sample_is_in_one_row_and_no_row_is_too_long(lengths, seed):
    rows = pack(lengths, 64, seed)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in row) <= 64 for row in rows)
    # Any two rows would not fit into one, and the bound of first fit decreasing.
    assert len(rows) <= 11 / 9 * math.ceil(sum(lengths) / 64) * 1.5 + 1
    sums = sorted(sum(lengths[i] for i in row) for row in rows)
    assert len(sums) < 2 or sums[0] + sums[1] > 64


def test_first_fit_as_by_hand():
    """The same rows as the plainest first fit, a row at a time."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 200, 500)
    rows = pack(lengths, 256, seed=5)
    expected: list[list[int]] = []
    order = [i for row in rows for i in row]  # only to know how ties were drawn
    for sample in sorted(order, key=lambda i: (-lengths[i], order.index(i))):
        for row in expected:
            if sum(lengths[row]) + lengths[sample] <= 256:
                row.append(sample)
                break
        else:
            expected.append([sample])
    assert [sorted(lengths[row]) for row in rows] == [sorted(lengths[row]) for row in expected]
    assert lengths.sum() / (256 * len(rows)) > 0.97


def test_equal_lengths_are_drawn_by_the_seed():
    lengths = [10] * 40
    assert pack(lengths, 40, 0) == pack(lengths, 40, 0) != pack(lengths, 40, 1)


def test_packing_edges():
    assert pack([], 8, 0) == [] and pack([8], 8, 0) == [[0]]
    with pytest.raises(ValueError, match="9 tokens in rows of 8"):
        pack([9], 8, 0)


# --------------------------------------------------------------------------- order


@pytest.mark.parametrize("batch_size", (None, 4))
def test_an_epoch_is_a_permutation_that_seed_and_epoch_decide(batch_size):
    lengths = np.random.default_rng(0).integers(1, 100, 103)
    grouped = {} if batch_size is None else {"lengths": lengths, "batch_size": batch_size}
    orders = {
        (seed, epoch): epoch_order(103, seed, epoch, **grouped).tolist()
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert all(sorted(order) == list(range(103)) for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) == 4
    assert orders[1, 1] == epoch_order(103, 1, 1, **grouped).tolist()


def test_numpys_generator_is_the_one_that_runs_were_made_with():
    """A resume on another machine needs these very numbers."""
    rng = np.random.default_rng([7, 0x0DE2, 3])
    assert epoch_order(50, 7, 3).tolist() == rng.permutation(50).tolist()


def test_batches_of_like_lengths_come_in_random_order():
    lengths = np.random.default_rng(0).integers(1, 1000, 2003)
    order = epoch_order(2003, 0, 0, lengths=lengths, batch_size=8)
    batches = lengths[order[:2000]].reshape(-1, 8)
    spread = (batches.max(1) - batches.min(1)).mean()
    mixed = lengths[epoch_order(2003, 0, 0)[:2000]].reshape(-1, 8)
    assert spread < 0.1 * (mixed.max(1) - mixed.min(1)).mean()
    longest = batches.max(1)
    assert abs(np.corrcoef(np.arange(250), longest)[0, 1]) < 0.3  # not sorted by length


def rows_of(*lengths: int) -> Samples:
    def sample(n: int) -> Sample:
        ids = np.arange(n, dtype=np.int32) + 10 * n
        labels = ids.copy()
        labels[0] = IGNORE
        return Sample(ids, labels)

    return Samples([[sample(n)] for n in lengths])


def test_the_sampler():
    rows = rows_of(*range(1, 31))
    sampler = EpochSampler(rows, seed=3)
    assert len(sampler) == 30
    first = list(sampler)
    assert first == list(sampler) == epoch_order(30, 3, 0).tolist()
    sampler.set_epoch(2)
    assert list(sampler) == epoch_order(30, 3, 2).tolist() != first
    grouped = EpochSampler(rows, seed=3, batch_size=4)
    expected = epoch_order(30, 3, 0, lengths=rows.lengths, batch_size=4)
    assert list(grouped) == expected.tolist()


# --------------------------------------------------------------------------- rows


def test_rows():
    one, two = rows_of(3)._ids, rows_of(5)._ids
    packed = Samples([[Sample(one, one), Sample(two, two)], [Sample(two, two)]], packed=True)
    assert len(packed) == 2 and packed.samples == 3 and packed.tokens == 13
    assert packed.lengths.tolist() == [8, 5]
    row = packed[0]
    assert row["position_ids"].tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    assert row["segments"] == [3, 5] and row["length"] == 8
    assert row["input_ids"].tolist() == [*one, *two] and row["input_ids"].dtype == np.int64
    assert packed[-1]["segments"] == [5] and "position_ids" not in rows_of(3)[0]
    with pytest.raises(IndexError, match="row 2 of 2"):
        packed[2]
    assert [len(r["input_ids"]) for r in packed] == [8, 5]


def test_rows_are_pickled_for_a_worker():
    rows = rows_of(3, 1, 7)
    again = pickle.loads(pickle.dumps(rows))
    assert [r["input_ids"].tolist() for r in again] == [r["input_ids"].tolist() for r in rows]
    assert rows.trained_tokens == 8 and len(Samples([])) == 0 and Samples([]).tokens == 0
