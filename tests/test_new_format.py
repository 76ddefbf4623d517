"""The steps of docs/new-format.md, as they stand there, on each backend's kernels."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from qlora_kernels.formats import FORMATS

PAGE = Path(__file__).parents[1] / "docs" / "new-format.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)


@pytest.fixture(autouse=True)
def _forget():
    known = dict(FORMATS)
    yield
    FORMATS.clear()
    FORMATS.update(known)


def run(*parts: str, **names: object) -> dict:
    for text in parts:
        exec(compile(text, str(PAGE), "exec"), names)
    return names


def block(*words: str) -> list[str]:
    """The blocks of the page that hold the words, one each."""
    found = [[text for text in BLOCKS if word in text] for word in words]
    assert all(len(texts) == 1 for texts in found), words
    return [texts[0] for texts in found]


DEFINED = block("import math", "def ue5m3")


def test_the_page_has_these_steps() -> None:
    assert len(BLOCKS) == 6


def test_its_error_is_below_nf4s_on_the_weights_that_it_is_for(capsys) -> None:
    names = run(*DEFINED, *block("def error"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "4.127 bits a weight" and len(lines) == 4
    assert names["error"]("logistic4") < names["error"]("nf4") < names["error"]("int4")


def test_the_backends_that_run_here(capsys) -> None:
    run(*DEFINED, *block("def error", "def check"))
    assert "auto:" not in capsys.readouterr().out


def test_cudas_kernels(_cuda_ops_on_the_cpu) -> None:
    few = "weights = weights[:64]\n"
    run(*DEFINED, block("def error")[0] + few, block("def check")[0].partition("for backend")[0],
        "check('cpu')\n")  # fmt: skip


def test_tritons_kernels() -> None:
    pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
    run(*DEFINED, *block("def error", "def check", "EmulatedTriton"))


def test_a_model_is_finetuned(tiny_model, tiny_data, tmp_path) -> None:
    (text,) = block("finetune(resolve")
    paths = {
        "path/to/model": tiny_model, "path/to/questions.jsonl": tiny_data, "out": tmp_path / "out"
    }  # fmt: skip
    for name, path in paths.items():
        assert f'"{name}"' in text
        text = text.replace(f'"{name}"', repr(str(path)))
    names = run(*DEFINED, text)
    figures = names["figures"]
    assert figures["finished"] and figures["eval_loss_after"] < figures["eval_loss_before"]
    assert 4.12 < figures["bits_per_weight"] < 4.3
    assert torch.isfinite(torch.tensor(figures["eval_loss_after"]))
