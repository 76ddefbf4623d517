"""The article's memory table from configurations alone, and torch's allocator in a page."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from qlora_kernels.planning.allocator import MIB, CachingAllocator
from qlora_kernels.planning.article import ARTICLE, article_table, full_finetuning
from qlora_kernels.planning.models import MODELS


@pytest.fixture(scope="module")
def rows():
    return {row.name: row for row in article_table()}


@pytest.mark.parametrize("name", ARTICLE)
def test_the_table_of_the_article(rows, name):
    row = rows[name]
    assert abs(row.base_error) < 0.01 and abs(row.total_error) < 0.05


def test_its_parts_are_what_the_configuration_says(rows):
    for name, row in rows.items():
        m = MODELS[name]
        values = m.layers * (4 * m.hidden**2 + 3 * m.hidden * m.inner)
        assert row.weights == pytest.approx(values * (4 + 8 / 64 + 32 / 64 / 256) / 8, rel=1e-3)
        rank = 64 * m.layers * (8 * m.hidden + 3 * (m.hidden + m.inner))
        assert row.adapters == row.gradients == row.optimizer / 2 == 4 * rank
        assert row.embeddings == 4 * m.hidden * (2 * m.words + 2 * m.layers)


def test_65b_fits_48_gb_and_would_take_780(rows):
    assert rows["llama-65b"].total < 48 * 10**9 * 1.0737  # 48 GiB, what such a card has
    assert full_finetuning() == pytest.approx(780e9, rel=0.05)


# --- the allocator ------------------------------------------------------------------------------


def test_segments_are_of_three_kinds():
    for request, segment in (
        (1, 2 * MIB), (MIB, 2 * MIB), (MIB + 1, 20 * MIB), (10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB), (11 * MIB + 1, 12 * MIB),
    ):  # fmt: skip
        device = CachingAllocator()
        block = device.allocate(request)
        assert device.reserved == segment
        assert request <= block.size < request + MIB + 512  # a rest of 1 MiB is not split off


def test_the_smallest_fitting_block_is_taken_and_neighbours_join():
    device = CachingAllocator()
    a, b, c = (device.allocate(6 * MIB) for _ in range(3))
    assert device.reserved == 20 * MIB
    device.free(a)
    device.free(c)  # joins the 2 MiB behind it
    assert device.allocate(5 * MIB).begin == a.begin
    assert device.allocate(8 * MIB).begin == c.begin
    assert device.reserved == 20 * MIB
    device.free(b)
    assert device.allocate(7 * MIB).segment != b.segment  # 6 MiB were free, not 7
    assert device.reserved == 40 * MIB == device.peak_reserved


def test_all_given_back_is_all_free_again():
    random.seed(0)
    device, live = CachingAllocator(), []
    for _ in range(500):
        if live and random.random() < 0.5:
            device.free(live.pop(random.randrange(len(live))))
        else:
            live.append(device.allocate(random.choice((300, 70_000, 3 * MIB, 13 * MIB))))
        assert device.allocated == sum(block.size for block in live) <= device.reserved
        spans = sorted((b.segment, b.begin, b.size) for b in live)
        for (s, begin, size), (t, later, _) in pairwise(spans):
            assert s != t or begin + size <= later
    for block in live:
        device.free(block)
    assert device.allocated == 0
    free = [b for pool in device._free.values() for b in pool]
    assert all(b.begin == 0 for b in free) and sum(b.size for b in free) == device.reserved
