"""Formats in a model: put in and taken out, outputs, language; on a model trained here."""

from __future__ import annotations

import math

import pytest
import torch

from qlora_kernels.finetune.errors import BadInput
from qlora_kernels.finetune.model import load_tokenizer
from qlora_kernels.laboratory import language
from qlora_kernels.laboratory.contenders import find_design, grid
from qlora_kernels.laboratory.models import (
    in_format,
    linear_layers,
    load_dense,
    model_folder,
    pack,
)
from qlora_kernels.laboratory.outputs import output_errors, record
from qlora_kernels.laboratory.text import read_windows
from qlora_kernels.laboratory.weights import decibels
from qlora_kernels.nn import Linear4bit


def contender(name: str, nested: bool = False):
    return grid([find_design(name)], double_quant="yes" if nested else "no")[0]


@pytest.fixture(scope="module")
def model(trained):
    return load_dense(trained)


@pytest.fixture(scope="module")
def windows(trained, pages):
    return read_windows(str(pages), load_tokenizer(trained), length=64, test=8, validation=2)


def test_the_model_learned(model, windows) -> None:
    # Bytes of these pages at random would cost log(257) = 5.5 nats each.
    assert language.perplexity(language.losses(model, windows.test))["high"] < 40


def test_a_format_goes_in_and_comes_out(model, windows) -> None:
    layers = linear_layers(model)
    before = language.losses(model, windows.test[:2])
    with in_format(model, pack(contender("two_bits"), layers)):
        inside = [m for m in model.modules() if isinstance(m, Linear4bit)]
        assert len(inside) == len(layers) == 14
        assert language.losses(model, windows.test[:2]) != before
    assert language.losses(model, windows.test[:2]) == before
    assert linear_layers(model) == layers


def test_divergence_and_losses_against_their_definition(model, windows) -> None:
    rows = windows.test[:2]
    reference = language.Reference(model, rows)
    with in_format(model, pack(contender("two_bits"), linear_layers(model))):
        losses, divergence = reference.compare(model)
        with torch.no_grad():
            q = model(input_ids=rows).logits[:, :-1].double().log_softmax(-1)
            want = model(input_ids=rows[:1], labels=rows[:1]).loss.item()
    with torch.no_grad():
        p = model(input_ids=rows).logits[:, :-1].double().log_softmax(-1)
    assert divergence == pytest.approx((p.exp() * (p - q)).sum(-1).mean(1).tolist(), rel=1e-4)
    assert losses[0] == pytest.approx(want, rel=1e-5)
    same = reference.compare(model)
    assert same == (reference.losses, [0.0, 0.0])
    reference.close()


def test_the_controls_in_a_model(model, windows) -> None:
    reference = language.Reference(model, windows.test)
    found = {}
    for name in ("nf4", "repeat", "two_bits"):
        with in_format(model, pack(contender(name), linear_layers(model))):
            found[name] = reference.compare(model)
    assert found["repeat"] == found["nf4"]
    lost = language.versus(found["two_bits"][1], found["nf4"][1])
    assert lost["low"] > 0 and lost["mean"] > lost["detectable"]


def test_double_quantization_is_within_the_noise_of_the_language(model, windows) -> None:
    reference = language.Reference(model, windows.test)
    losses = []
    for nested in (False, True):
        with in_format(model, pack(contender("nf4", nested), linear_layers(model))):
            losses.append(reference.compare(model)[0])
    found = language.versus(losses[1], losses[0])
    # Less than a tenth of a percent of a nat; the 2-bit control costs more than that.
    assert abs(found["mean"]) < max(1e-3, found["detectable"])


def test_outputs_are_of_real_inputs_and_the_kernel(model, windows) -> None:
    layers = linear_layers(model)
    activations = record(model, layers, windows.train[:4], tokens=16)
    name = next(n for n in layers if n.endswith("down_proj"))
    rows = activations.rows[name]
    assert rows.shape == (16, layers[name].in_features)
    packed = pack(contender("nf4"), layers)
    found = {e.layer: e for e in output_errors(packed, layers, activations)}
    with torch.no_grad():
        exact = rows.double() @ layers[name].weight.double().T
        rough = rows.double() @ packed[name].dequantize_weight(torch.float32).double().T
    want = decibels(float(exact.square().sum()), float((exact - rough).square().sum()))
    assert found[name].sqnr == pytest.approx(want, abs=0.01)
    seen = []
    handle = layers[name].register_forward_pre_hook(lambda m, x: seen.append(x[0].detach()))
    with torch.no_grad():
        model(input_ids=windows.train[:4])
    handle.remove()
    energy = seen[0].flatten(0, 1).square().mean(0)
    assert torch.allclose(activations.energies[name], energy, rtol=1e-4)


def test_windows_do_not_overlap_and_are_the_files(trained, pages, windows) -> None:
    tokenizer = load_tokenizer(trained)
    text = pages.read_text()
    held = {tokenizer.decode(row) for row in windows.test}
    assert len(held) == 8 and all(words in text for words in held if "�" not in words)
    train = "".join(tokenizer.decode(row) for row in windows.train[-3:])
    assert not any(words in train for words in held)
    both = torch.cat([windows.test, windows.validation])
    assert len(both.unique(dim=0)) == 10


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("smolm2", "did you mean smollm2"),
        ("self-traind", "did you mean self-trained"),
        ("./no/such/folder", "no folder"),
    ],
)
def test_unknown_models_suggest_the_nearest(tmp_path, name: str, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        model_folder(name, tmp_path)


def test_a_folder_beside_is_suggested(tmp_path, trained) -> None:
    (tmp_path / "llama-tiny").symlink_to(trained)
    assert model_folder(str(tmp_path / "llama-tiny"), tmp_path).is_dir()
    with pytest.raises(BadInput, match="did you mean .*llama-tiny"):
        model_folder(str(tmp_path / "lama-tiny"), tmp_path)


def test_a_folder_of_results_does_not_hide_a_name(tmp_path, trained, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "self-trained").mkdir()
    assert model_folder("self-trained", trained.parent) == trained


@pytest.mark.parametrize(
    ("source", "words"),
    [("no-such.txt", "no file"), ("short.txt", "lower --windows"), ("latin.txt", "not UTF-8")],
)
def test_texts_that_cannot_be_used_are_named(tmp_path, trained, source: str, words: str) -> None:
    (tmp_path / "short.txt").write_text("a few words\n" * 4)
    (tmp_path / "latin.txt").write_bytes("Grüße".encode("latin-1"))
    with pytest.raises(BadInput, match=words):
        read_windows(str(tmp_path / source), load_tokenizer(trained))


@pytest.mark.full
def test_python_docs_in_windows(trained) -> None:
    windows = read_windows("python-docs", load_tokenizer(trained))
    assert len(windows.train) > 1000 and windows.test.shape == (16, 128)
    assert math.isfinite(language.losses(load_dense(trained), windows.test[:2])[0])
