"""`qlora formats`, whole: tables, JSON, plots, what it takes up again and what it refuses."""

from __future__ import annotations

import argparse
import json
import os

import pytest

from qlora_kernels.finetune.errors import BadInput
from qlora_kernels.laboratory import command, report

PNG = b"\x89PNG"


def formats(*words: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(list(words)))


def test_drawn_weights(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    out = tmp_path / "out"
    words = ("--weights", "normal", "--layers", "2", "--formats", "int4,fp4_e2m1,learned")
    assert formats(*words, "--output_dir", str(out)) == 0
    said = capsys.readouterr().out
    results = report.read_results(out / "results.json")
    assert results["schema"] == 1 and results["machine"]["torch"]
    assert results["command"].startswith("qlora formats --formats int4,fp4_e2m1,learned --weights")
    (source,) = results["sources"]
    names = [row["name"] for row in source["rows"]]
    # What all is compared with, and both controls, are there unasked.
    assert {"nf4-64", "nf4-64-dq", "two_bits-64", "repeat-64", "learned-64-dq"} <= set(names)
    assert len(source["verdicts"]) == 4 and all(source["verdicts"].values())
    table = (out / "table.md").read_text()
    assert table in said and "| nf4-64-dq | 4.127 |" in table
    drawn = sorted(path.name for path in out.glob("*.png"))
    assert drawn == [f"{k}-normal-weights.png" for k in ("codebooks", "error", "layers")]
    assert all((out / name).read_bytes().startswith(PNG) for name in drawn)

    # Again: everything is there already; from the JSON alone: the same table elsewhere.
    assert formats(*words, "--output_dir", str(out)) == 0
    assert f"{len(names)} finished cells" in capsys.readouterr().out
    assert report.read_results(out / "results.json") == results
    assert (
        formats("--from_json", str(out / "results.json"), "--output_dir", str(tmp_path / "b")) == 0
    )
    assert (tmp_path / "b" / "table.md").read_text() == table


def words_for(trained, pages, *more: str) -> list[str]:
    return [
        "--model", str(trained), "--text", str(pages), "--windows", "3", "--length", "32",
        "--tokens", "16", "--formats", "nf4,mxfp4", "--double_quant", "no",
        "--seeds", "2", "--steps", "2", "--batch", "2", "--rank", "2", *more,
    ]  # fmt: skip


@pytest.mark.full
def test_a_model_and_its_finetunes(tmp_path, capsys, trained, pages) -> None:
    out = tmp_path / "out"
    words = words_for(
        trained, pages, "--finetune", "--finetune_formats", "nf4,repeat", "--output_dir", str(out)
    )
    assert formats(*words) == 0
    results = report.read_results(out / "results.json")
    (source,) = results["sources"]
    assert 15 < source["q4_1_sqnr"] < 30 and "off the Q4_1 grid" in source["about"]
    for row in source["rows"]:
        assert row["perplexity"]["low"] < row["perplexity"]["value"] < row["perplexity"]["high"]
        assert row["divergence"]["value"] > 0 and row["outputs"]["sqnr"] > 5
        assert len(row["layers"]) == 14
    assert all(so for what, so in source["verdicts"].items() if what.startswith("control"))
    finetuned = {row["name"]: row for row in results["finetune"]["rows"]}
    assert list(finetuned) == ["16-bit", "nf4-64", "repeat-64"]
    assert finetuned["nf4-64"]["seeds"] == finetuned["repeat-64"]["seeds"]
    assert results["finetune"]["verdicts"]["control repeat-64 ties with nf4-64 in every digit"]
    assert "### After a finetune" in (out / "table.md").read_text()
    assert (out / "curves-finetune.png").read_bytes().startswith(PNG)

    # A run that was cut off in its last cell goes on from there, to the same results.
    cells = out / "cells.jsonl"
    text = cells.read_text()
    cells.write_text(text[: -len(text.splitlines()[-1]) // 2])
    capsys.readouterr()
    assert formats(*words) == 0
    assert report.read_results(out / "results.json") == results


@pytest.mark.full
def test_where_lora_goes(tmp_path, trained, pages) -> None:
    out = tmp_path / "out"
    words = words_for(trained, pages, "--lora-where", "--ranks", "4", "--output_dir", str(out))
    assert formats(*words) == 0
    results = report.read_results(out / "results.json")
    assert results["sources"][1]["name"].endswith("fully finetuned")
    where = {row["name"]: row["trained"] for row in results["where"]["rows"]}
    assert list(where) == [
        "full, 16-bit", "q+v, r=2", "attention, r=2", "mlp, r=2", "all, r=2", "all, r=4",
    ]  # fmt: skip
    assert where["all, r=4"] == 2 * where["all, r=2"] > where["mlp, r=2"] > where["q+v, r=2"]
    assert "### LoRA where?" in (out / "table.md").read_text()
    assert (out / "curves-where.png").read_bytes().startswith(PNG)
    assert (out / "fully-finetuned" / "model.safetensors").is_file()


def test_the_list(capsys) -> None:
    assert formats("--list") == 0
    assert "nf4" in (said := capsys.readouterr().out) and "must lose" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--formats", "nf5"], "did you mean nf4"),
        (["--formats", "no.json"], "no file"),
        (["--blocksizes", "48"], "48"),
        (["--blocksizes", "0"], "above 0"),
        (["--weights", "gamma"], "student-t"),
        (["--weights", "", "--formats", "nf4"], "nothing to compare on"),
        (["--layers", "1"], "no interval"),
        (["--seeds", "1", "--model", "x"], "no interval"),
        (["--finetune"], "need a --model"),
        (["--model", "smolm2"], "did you mean smollm2"),
        (["--model", "smollm2", "--where_base", "nf9"], "did you mean"),
        (["--from_json", "no.json"], "cannot be read"),
    ],
)
def test_bad_input_is_named(tmp_path, words: list[str], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        formats(*words, "--output_dir", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[]", "does not hold results"),
        (
            json.dumps({"kind": "qlora formats", "schema": 2}),
            "schema 2; this version reads schema 1",
        ),
    ],
)
def test_results_of_something_else_are_named(tmp_path, content: str, message: str) -> None:
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(BadInput, match=message):
        formats("--from_json", str(tmp_path / "r.json"), "--output_dir", str(tmp_path / "out"))


@pytest.mark.full
def test_plots_need_no_display(tmp_path) -> None:
    """In a process whose backend is one with windows, on a machine that has none."""
    import subprocess
    import sys

    code = (
        "from pathlib import Path\n"
        "from qlora_kernels.laboratory.plots import draw_curves\n"
        "rows = [{'name': 'a', 'history': [[2.0, 1.0], [2.5, 1.5]]}]\n"
        f"draw_curves(Path({str(tmp_path / 'c.png')!r}), rows, 'title')\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY")}
    environment["MPLBACKEND"] = "TkAgg"
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    assert (tmp_path / "c.png").read_bytes().startswith(PNG)
