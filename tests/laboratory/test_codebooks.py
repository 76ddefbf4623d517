"""Codebooks from distributions and weights, against published tables and against their promise."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qlora_kernels.formats import NF4
from qlora_kernels.laboratory.codebooks import (
    block_density,
    derive_af4,
    derive_bof4,
    derive_levels,
    learn_codebook,
    lloyd,
)
from qlora_kernels.maps import get_4bit_type


def error(weights: torch.Tensor, levels, blocksize: int = 64, power: float = 2) -> float:
    blocks = weights.view(-1, blocksize)
    absmax = blocks.abs().amax(1, keepdim=True)
    book = torch.tensor(sorted(levels))
    nearest = book[torch.bucketize(blocks / absmax, (book[1:] + book[:-1]) / 2)]
    return float(((nearest * absmax - blocks).abs() ** power).mean())


def test_af4_is_its_papers_table() -> None:
    published = get_4bit_type("af4", device="cpu").sort().values
    assert torch.tensor(derive_af4(64)).sub(published).abs().max() < 1e-6


@pytest.mark.parametrize("blocksize", [16, 64, 4096])
def test_derived_codebooks_keep_their_ends_and_zero(blocksize: int) -> None:
    for levels in (derive_af4(blocksize), derive_bof4(blocksize), derive_bof4(blocksize, True)):
        assert len(levels) == 16 and list(levels) == sorted(set(levels))
        assert levels[0] == -1 and levels[7] == 0 and levels[-1] == 1


def test_the_density_is_that_of_drawn_weights() -> None:
    x, mass = block_density(64)
    blocks = torch.randn(20_000, 64)
    drawn = (blocks / blocks.abs().amax(1, keepdim=True)).flatten().numpy()
    drawn = drawn[np.abs(drawn) < 1]
    for limit in (0.1, 0.3, 0.7):
        assert mass[np.abs(x) < limit].sum() == pytest.approx(
            (np.abs(drawn) < limit).mean(), abs=3e-3
        )


def test_each_is_best_at_what_it_minimizes() -> None:
    weights = torch.randn(512, 2048)
    known = {
        "nf4": NF4.codebook,
        "bof4": derive_bof4(64),
        "mae": derive_bof4(64, absolute=True),
        "af4": derive_af4(64),
    }
    squared = {name: error(weights, levels) for name, levels in known.items()}
    absolute = {name: error(weights, levels, power=1) for name, levels in known.items()}
    assert min(squared, key=squared.get) == "bof4"
    assert min(absolute, key=absolute.get) == "mae"


def test_lloyd_never_makes_it_worse() -> None:
    values = np.sort(np.random.default_rng(0).laplace(size=4000))
    mass = np.random.default_rng(1).random(4000)
    levels = np.linspace(-3, 3, 16)

    def loss(levels) -> float:
        return float((mass * np.abs(values[:, None] - levels[None]).min(1) ** 2).sum())

    before = loss(levels)
    for _ in range(5):
        levels = lloyd(values, mass, levels, density=False, rounds=1)
        assert loss(levels) <= before
        before = loss(levels)


def test_a_level_that_nothing_is_near_stays() -> None:
    values = np.linspace(0, 1, 100)
    found = lloyd(values, np.ones(100), [-5.0, 0.2, 0.8], density=False)
    assert found[0] == -5 and found[1:] == pytest.approx([0.25, 0.75], abs=0.02)


def test_learning_beats_every_fixed_codebook_on_its_weights() -> None:
    weights = torch.distributions.StudentT(4.0).sample((256, 512))
    learned = error(weights, learn_codebook(weights, 64))
    assert learned < min(error(weights, levels) for levels in (NF4.codebook, derive_bof4(64)))


def test_learning_spends_levels_where_the_inputs_are_large() -> None:
    weights = torch.randn(256, 128)
    weights[:, 64:] *= 0.2  # every second block is small ...
    weights = weights[:, torch.arange(128).view(2, 64).T.flatten()]  # ... no: every second column
    energy = torch.tensor([1e-4, 1.0]).repeat(64)  # and the small columns are what matters
    small = weights[:, 1::2]

    def loss(levels) -> float:
        blocks = weights.view(-1, 64)
        absmax = blocks.abs().amax(1, keepdim=True)
        book = torch.tensor(levels)
        near = book[torch.bucketize(blocks / absmax, (book[1:] + book[:-1]) / 2)] * absmax
        return float((near.view_as(weights)[:, 1::2] - small).square().mean())

    assert loss(learn_codebook(weights, 64, energy)) < 0.7 * loss(learn_codebook(weights, 64))


def test_a_ragged_last_block_does_not_pull_levels_to_zero() -> None:
    weights = torch.rand(1, 65) + 1.0
    assert min(learn_codebook(weights, 64, begin=np.linspace(0.4, 1, 16))) > 0.39


def test_two_bits_are_the_textbooks_at_large_blocks() -> None:
    # Four levels for a normal distribution: ±0.4528 and ±1.510 standard deviations (Max, 1960).
    levels = np.array(derive_levels(4, 4096))
    assert levels[3] / levels[2] == pytest.approx(1.510 / 0.4528, rel=0.01)


@pytest.mark.parametrize(
    ("weights", "energy", "words"),
    [
        (torch.full((2, 64), torch.nan), None, "NaN"),
        (torch.zeros(2, 64), None, "all zero"),
        (torch.ones(2, 64), torch.ones(3), "64 values"),
    ],
)
def test_what_cannot_be_learned_from_is_named(weights, energy, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        learn_codebook(weights, 64, energy)
