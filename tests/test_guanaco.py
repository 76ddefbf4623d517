"""``qlora guanaco``: its words, its report; the whole way in the full run."""

from __future__ import annotations

import argparse
import base64
import json
from pathlib import Path

import pytest

for package in ("transformers", "openai"):
    pytest.importorskip(package)

from qlora_kernels import cli, guanaco  # noqa: E402
from qlora_kernels.evaluate.records import Reply, read_questions, write_records  # noqa: E402

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


@pytest.mark.parametrize(
    "words, told",
    [
        (["--limit", "0"], "at least 1"),
        (["--steps", "5"], "--steps must be at least 6"),
        (["--endpoint", "http://127.0.0.1:1/v1"], "--endpoint and --judge go together"),
        (["--questions", "none.jsonl"], "there is no file none.jsonl"),
    ],
)
def test_bad_words(words, told, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["guanaco", *words]) == 2
    assert told in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_its_questions_are_questions():
    asked = read_questions(guanaco.QUESTIONS)
    assert len(asked) == 8 and len({q.turns for q in asked}) == 8


def test_a_stage_that_fails_ends_it_and_says_how_to_go_on(tmp_path, capfd):
    stages = guanaco.Stages(tmp_path)
    with pytest.raises(guanaco.RunError, match="qlora elo .*none.jsonl.* exit code 2"):
        stages.run("Elo", "elo", tmp_path / "none.jsonl")
    assert "none.jsonl" in capfd.readouterr().err


SHARE = {"all": {"share": 0.25, "low": 0.09, "high": 0.53}}
PROBE = {
    "probes": {
        "secrets": {"what": "keeps <secrets>", "models": dict.fromkeys(guanaco.RIVALS, SHARE)}
    }
}


def folder(root: Path) -> None:
    """What the stages leave, by hand."""
    figures = {
        "steps": 30, "tokens": 9000, "eval_loss_before": 3.1, "eval_loss_after": None,
        "tokens_per_second": 99.6, "bits_per_weight": 4.127,
    }  # fmt: skip
    for name in guanaco.RIVALS[1:]:
        (root / name).mkdir()
        (root / name / "figures.json").write_text(json.dumps(figures))
        (root / name / "curves.png").write_bytes(PNG)
    (root / "ladder.png").write_bytes(PNG)
    replies = [
        Reply(q, name, f"question <{q}>", f"<script>alert({q})</script> of {name}")
        for q in range(5)
        for name in guanaco.RIVALS
    ]
    write_records(root / "replies.jsonl", replies)
    score = {
        "model": "guanaco", "baseline": "base", "percent": 98.76, "low": None, "high": 120.0,
        "judgments": 10, "unparsed": 3,
    }  # fmt: skip
    bias = {"kind": "pair", "value": 0.5, "low": 0.4, "high": 0.6}
    (root / "judgments.summary.json").write_text(
        json.dumps({"scores": [score], "position_bias": [bias]})
    )
    row = {"model": "base", "elo": 1010.4, "elo_low": 1000.0, "elo_high": 1020.0}
    row |= {"bt": 1009.0, "bt_low": None, "bt_high": 1030.0}
    (root / "elo.json").write_text(json.dumps({"models": [row], "notes": ["a <note>"]}))


def test_the_report_holds_the_figures_and_shows_replies_as_text(tmp_path, capsys):
    folder(tmp_path)
    (tmp_path / "probe.json").write_text(json.dumps(PROBE))
    stages = guanaco.Stages(tmp_path)
    stages.shown("Arena", "arena", "--replies", "it's.jsonl")
    file = tmp_path / "report.html"
    guanaco.write_report(file, tmp_path, stages, stand_in=True, minutes=3.25)
    html = file.read_text("utf-8")
    assert "<script" not in html and "&lt;script&gt;alert(2)&lt;/script&gt; of base" in html
    assert "alert(3)" not in html and "2 more in" in html
    assert "a &lt;note&gt;" in html and "mean nothing" in html
    for figure in (
        "98.8",
        "– to 120.0",
        "1010",
        "4.127",
        "3.2 minutes",
        "base64,iVBOR",
        "25% (9% to 53%)",
    ):
        assert figure in html, figure
    real = tmp_path / "real.html"
    guanaco.write_report(real, tmp_path, stages, stand_in=False, minutes=3.25)
    assert "stand-in" not in real.read_text("utf-8")


@pytest.mark.full
def test_the_whole_way(tmp_path, tiny_model, capfd):
    words = ["--output_dir", str(tmp_path), "--model", str(tiny_model), "--limit", "2"]
    words += ["--steps", "6", "--new_tokens", "8", "--probe_items", "2"]
    assert cli.main(["guanaco", *words]) == 0
    html = (tmp_path / "report.html").read_text("utf-8")
    assert all(name in html for name in guanaco.RIVALS) and "qlora arena" in html
    parser = argparse.ArgumentParser()
    guanaco.add_arguments(parser)
    before = (tmp_path / "replies.jsonl").read_bytes()
    assert cli.main(["guanaco", *words]) == 0  # goes on from what is there: nothing left to do
    assert (tmp_path / "replies.jsonl").read_bytes() == before
