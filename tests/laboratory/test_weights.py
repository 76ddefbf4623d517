"""The paper's order of formats on weights, and the two controls, with the kernels at hand."""

from __future__ import annotations

import math

import pytest
import torch

from qlora_kernels.finetune.errors import BadInput
from qlora_kernels.laboratory.contenders import designs, find_design, grid
from qlora_kernels.laboratory.models import linear_layers, load_dense
from qlora_kernels.laboratory.weights import (
    SYNTHETIC,
    errors_of,
    measure,
    q4_1_sqnr,
    summarize,
    synthetic,
)

PAPERS = ("int4", "fp4_e2m1", "nf4")  # from the largest error to the smallest


def paper_rows(weights: dict[str, torch.Tensor]) -> dict:
    names = (*PAPERS, "two_bits", "repeat")
    contenders = grid([find_design(name) for name in names])
    errors = {c.name: measure(c, weights.items()) for c in contenders}
    return {name: summarize(found, errors["nf4-64"]) for name, found in errors.items()}


def check_the_papers_order(weights: dict[str, torch.Tensor]) -> None:
    rows = paper_rows(weights)
    mse = {name: row["mse"] for name, row in rows.items()}
    assert mse["int4-64"] > mse["fp4_e2m1-64"] > mse["nf4-64"]
    # By more than these layers' spread could fake.
    for name in PAPERS[:2]:
        found = rows[f"{name}-64"]["versus"]
        assert found["high"] < 0 and abs(found["mean"]) > found["detectable"]
    # Double quantization: a fiftieth of the smallest difference between formats, or less.
    gap = abs(rows["fp4_e2m1-64"]["versus"]["mean"])
    assert abs(rows["nf4-64-dq"]["versus"]["mean"]) < gap / 20
    assert rows["two_bits-64"]["mse"] > 5 * mse["int4-64"]
    assert rows["repeat-64"] == rows["nf4-64"]


@pytest.mark.parametrize("kind", SYNTHETIC)
def test_the_papers_order_on_drawn_weights(kind: str) -> None:
    check_the_papers_order(synthetic(kind, layers=4))


def test_the_papers_order_on_a_model_trained_here(trained) -> None:
    layers = linear_layers(load_dense(trained))
    assert len(layers) == 14
    check_the_papers_order({name: layer.weight.detach() for name, layer in layers.items()})


def test_sqnr_of_normal_weights_is_known() -> None:
    """To 0.05 dB, 4 × 262,144 values, blocks of 64: the figures in this project's notes."""
    weights = synthetic("normal", layers=4)
    known = {"nf4": 20.73, "fp4_e2m1": 19.52, "int4": 19.36, "fp4": 18.28}
    for name, decibel in known.items():
        (contender,) = grid([find_design(name)], double_quant="no")
        assert summarize(measure(contender, weights.items()))["sqnr"] == pytest.approx(
            decibel, abs=0.05
        )


def test_smaller_blocks_lose_less() -> None:
    weights = synthetic("normal", layers=2)
    contenders = grid([designs()["nf4"]], (32, 64, 256), "no")
    found = [summarize(measure(c, weights.items()))["mse"] for c in contenders]
    assert found == sorted(found)


def test_a_summary_is_of_all_values_together() -> None:
    a = errors_of("a", torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.0]))
    b = errors_of("b", torch.tensor([1.0]), torch.tensor([-1.0]))
    row = summarize([a, b])
    assert row["mse"] == pytest.approx(5 / 3) and row["mae"] == pytest.approx(1.0)
    assert row["largest"] == 2 and row["values"] == 3
    assert row["sqnr"] == pytest.approx(10 * math.log10(26 / 5))
    assert errors_of("c", torch.ones(2), torch.ones(2)).sqnr == math.inf


def test_weights_of_a_q4_1_grid_are_recognised() -> None:
    codes = torch.randint(0, 16, (64, 32)).float()
    codes[:, 0], codes[:, 1] = 0, 15
    from_grid = (codes * torch.rand(64, 1) + torch.randn(64, 1)).bfloat16()
    assert q4_1_sqnr(from_grid) > 40 > 23 > q4_1_sqnr(torch.randn(64, 32)) > 20


def test_kinds_that_are_not_drawn_are_named() -> None:
    with pytest.raises(BadInput, match="student-t"):
        synthetic("gamma")
