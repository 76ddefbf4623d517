"""Draws: what temperature, top_p and a seed mean."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")
import torch

from qlora_kernels.serve import sampling
from qlora_kernels.serve.sampling import Sampling, choose

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, -8.0])


def frequencies(settings: Sampling, n: int = 4000) -> torch.Tensor:
    tokens = torch.stack([choose(LOGITS, settings) for _ in range(n)])
    return torch.bincount(tokens, minlength=5) / n


def test_temperature_0_takes_the_likeliest():
    assert choose(LOGITS, Sampling()).item() == 0


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature):
    want = (LOGITS / temperature).softmax(-1)
    # Four standard deviations of a share at n = 4000.
    assert (frequencies(Sampling(temperature, 1.0, 7)) - want).abs().max() < 4 * 0.5 / 4000**0.5


@pytest.mark.parametrize("nucleus", [1024, 2])  # in full, and where the nucleus is larger
def test_top_p_keeps_the_fewest_that_hold_it(nucleus, monkeypatch):
    monkeypatch.setattr(sampling, "_NUCLEUS", nucleus)
    p = LOGITS.softmax(-1)  # .643 .237 .087 .032 .00003
    for top_p, kept in [(0.5, 1), (0.65, 2), (0.9, 3), (0.99, 4)]:
        want = torch.cat([p[:kept] / p[:kept].sum(), torch.zeros(5 - kept)])
        got = frequencies(Sampling(1.0, top_p, 3), 2000)
        assert (got - want).abs().max() < 4 * 0.5 / 2000**0.5
        assert got[kept:].sum() == 0


def test_a_seed_gives_the_same_draws_and_none_gives_others():
    def row(seed):
        settings = Sampling(1.0, 1.0, seed)
        return [choose(torch.zeros(1000), settings).item() for _ in range(8)]

    assert row(5) == row(5) != row(6)
    assert row(-(2**63)) == row(-(2**63))
    assert row(None) != row(None)


def test_a_tiny_temperature_does_not_overflow():
    assert choose(LOGITS * 1e4, Sampling(1e-9, 1.0, 0)).item() == 0
