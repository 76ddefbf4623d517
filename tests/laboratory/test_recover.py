"""Finetunes that are compared: paired by seed, on the kernels, resumed cell by cell."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from qlora_kernels.finetune.errors import BadInput, RunError
from qlora_kernels.finetune.model import load_tokenizer
from qlora_kernels.laboratory import recover
from qlora_kernels.laboratory.cells import Cells
from qlora_kernels.laboratory.contenders import designs
from qlora_kernels.laboratory.models import load_dense
from qlora_kernels.laboratory.recover import Method, Recipe, run_cell, target_layers
from qlora_kernels.laboratory.report import finetune_rows, finetune_verdicts
from qlora_kernels.laboratory.study import finetune_contenders
from qlora_kernels.laboratory.text import read_windows
from qlora_kernels.laboratory.where import FULL, best_rates, where_methods

RECIPE = Recipe(steps=4, batch=2)


def base(name: str):
    return finetune_contenders([name], designs())[0]


@pytest.fixture(scope="module")
def windows(trained, pages):
    return read_windows(str(pages), load_tokenizer(trained), length=48, test=4, validation=2)


@pytest.fixture
def run(trained, windows):
    return lambda method, seed=0, **more: run_cell(
        lambda: load_dense(trained), method, RECIPE, windows, seed, **more
    )


def test_the_same_seed_is_the_same_run_and_the_repeat_ties(run) -> None:
    first = run(Method("nf4", base("nf4"), rank=4, learning_rate=1e-2))
    assert run(Method("repeat", base("repeat"), rank=4, learning_rate=1e-2)) == first
    other = run(Method("nf4", base("nf4"), rank=4, learning_rate=1e-2), seed=1)
    assert other["history"] != first["history"]
    assert len(first["history"]) == 4 and len(first["after"]) == 4
    # Adapters on all 14 layers of hidden 128: q, o 4·256; k, v 4·192; the MLP 4·384 each.
    assert first["trained"] == 2 * 4 * (2 * 256 + 2 * 192 + 3 * 384)


def test_the_adapters_are_the_fused_op_and_begin_alike(run, monkeypatch) -> None:
    from qlora_kernels.integrations.peft import FusedLoraLinear

    begun = []
    monkeypatch.setattr(recover, "_train", lambda model, *a: begun.append(model) or [0.0])
    run(Method("16-bit", None, rank=4))
    run(Method("nf4", base("nf4-dq"), rank=4))
    dense, packed = (
        {n: p for n, p in m.named_parameters() if "lora_" in n} for m in begun
    )  # fmt: skip
    assert dense.keys() == packed.keys() and len(dense) == 28
    assert all(torch.equal(dense[n], packed[n]) for n in dense)
    fused = [m for m in begun[1].modules() if isinstance(m, FusedLoraLinear)]
    assert len(fused) == 14 and not any(isinstance(m, FusedLoraLinear) for m in begun[0].modules())


@pytest.mark.parametrize("method", [Method("16-bit", None), Method("nf4", base("nf4-dq"))])
def test_a_batch_that_comes_again_costs_less(trained, windows, method: Method) -> None:
    two = dataclasses.replace(windows, train=windows.train[:2])
    method = dataclasses.replace(method, rank=8, learning_rate=5e-3)
    history = run_cell(lambda: load_dense(trained), method, Recipe(4, 2), two, 0)["history"]
    assert history[3] < history[2] < history[1]


def test_full_finetuning_trains_everything_and_ends_in_16_bits(trained, windows) -> None:
    two, kept = dataclasses.replace(windows, train=windows.train[:2]), []
    method = Method(FULL, None, rank=0, learning_rate=1e-3)
    full = run_cell(lambda: load_dense(trained), method, Recipe(4, 2), two, 0, keep=kept.append)
    assert full["history"][3] < full["history"][2] < full["history"][1]
    (model,) = kept
    parameters = list(model.parameters())
    assert full["trained"] == sum(p.numel() for p in parameters)
    assert all(torch.equal(p, p.bfloat16().to(p.dtype)) for p in parameters)


def test_a_loss_that_is_not_finite_ends_it(run, monkeypatch, trained) -> None:
    broken = load_dense(trained)
    broken.lm_head.weight.data[:] = torch.nan
    monkeypatch.setattr(recover, "pack", lambda contender, layers: {})
    with pytest.raises(RunError, match="loss of step 1 is nan"):
        run_cell(lambda: broken, Method("x", None, rank=2), RECIPE, _tiny_windows(), 0)


def _tiny_windows():
    from qlora_kernels.laboratory.text import Windows

    rows = torch.randint(0, 200, (8, 16))
    return Windows(rows, rows[:2], rows[:2], "drawn", "digest")


def test_where(trained) -> None:
    methods = where_methods(base("nf4-dq"), [8, 64], 16)
    assert [m.name for m in methods] == [
        FULL, "q+v, r=16", "attention, r=16", "mlp, r=16", "all, r=8", "all, r=16", "all, r=64",
    ]  # fmt: skip
    assert methods[0].base is None and methods[0].rank == 0 and methods[5].rank == 16
    model = load_dense(trained)
    assert len(target_layers(model, "q+v")) == 4 and len(target_layers(model, "all")) == 14
    assert {n.rpartition(".")[2] for n in target_layers(model, "mlp")} == {
        "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    with pytest.raises(BadInput, match="its layers are called c"):
        target_layers(torch.nn.ModuleDict({"c": torch.nn.Linear(4, 4)}), "q+v")


def test_each_method_gets_its_best_learning_rate() -> None:
    tried = []

    def run(method, seed):
        tried.append((method.name, method.learning_rate))
        return {"after": [abs(method.learning_rate - (3.0 if method.rank else 20.0))]}

    methods = where_methods(None, [8], 8)
    found = best_rates(methods, [1.0, 3.0, 9.0], [20.0], run)
    assert {m.learning_rate for m in found[1:]} == {3.0} and found[0].learning_rate == 20.0
    assert len(tried) == 3 * (len(methods) - 1)


def test_rows_are_paired_by_seed() -> None:
    def runs(*after):
        return [
            {"after": list(a), "history": [2.0, 1.0], "trained": 5, "learning_rate": 1e-3}
            for a in after
        ]

    rows = finetune_rows(
        {
            "16-bit": runs((1.0, 2.0), (3.0, 4.0), (2.0, 3.0)),
            "nf4-64": runs((1.1, 2.1), (3.1, 4.1), (2.1, 3.1)),
            "repeat-64": runs((1.1, 2.1), (3.1, 4.1), (2.1, 3.1)),
            "two_bits-64": runs((3.0, 4.0), (5.0, 6.0), (4.1, 5.0)),
        },
        {"16-bit": [2.0], "nf4-64": [2.2], "repeat-64": [2.2], "two_bits-64": [4.0]},
        "16-bit",
    )
    row = rows[1]
    assert row["versus"]["mean"] == pytest.approx(0.1) and row["versus"]["high"] < 0.11
    assert row["after"]["high"] - row["after"]["low"] > 1 and row["before"] == 2.2
    assert finetune_verdicts(rows) == {
        "control two_bits-64 loses": True,
        "nf4-64 within the noise of 16-bit": False,
        "control repeat-64 ties with nf4-64 in every digit": True,
    }


# --- cells ---------------------------------------------------------------------------------------


def test_finished_cells_are_not_computed_again(tmp_path) -> None:
    path = tmp_path / "cells.jsonl"
    computed = []

    def compute(x):
        return lambda: computed.append(x) or {"x": x}

    assert Cells(path).get({"a": 1}, compute(0.1)) == {"x": 0.1}
    again = Cells(path)
    assert again.get({"a": 1}, compute(9)) == {"x": 0.1} and again.found == 1
    assert again.get({"a": 2}, compute(2)) == {"x": 2} and computed == [0.1, 2]


def test_a_cell_that_was_cut_off_is_computed_again(tmp_path) -> None:
    path = tmp_path / "cells.jsonl"
    for a in (1, 2):
        Cells(path).get({"a": a}, lambda a=a: a)
    whole = path.read_text()
    path.write_text(whole[:-9])
    cells = Cells(path)
    assert cells.get({"a": 1}, lambda: 0) == 1 and cells.get({"a": 2}, lambda: 2) == 2
    assert path.read_text() == whole


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (json.dumps({"schema": 7, "key": {}, "value": 1}), "schema 7; this version reads schema 1"),
        ("{", "line 1, is not a cell"),
    ],
)
def test_cells_that_cannot_be_read_are_named(tmp_path, line: str, words: str) -> None:
    path = tmp_path / "cells.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(BadInput, match=words):
        Cells(path)
