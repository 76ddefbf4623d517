"""What the votes say, and how `qlora elo` reads them."""

from __future__ import annotations

import argparse
import json
import re

import numpy as np
import pytest

from qlora_kernels.arena import command
from qlora_kernels.arena.report import as_judgments, summarize
from qlora_kernels.arena.store import Store, Vote
from qlora_kernels.evaluate.records import read_judgments, to_json
from qlora_kernels.finetune.errors import BadInput
from qlora_kernels.statistics import proportion_interval


def vote(question=1, left="a", right="b", better="left", guess=None, rater="r", asked=None):
    return Vote(question, None, left, right, rater, better, asked, guess, 0.0)


def test_judgments_say_who_won_and_who_was_shown_first():
    votes = [
        vote(1, "a", "b", "left"), vote(2, "b", "a", "left"),
        vote(3, "b", "a", "right"), vote(4, "a", "b", "tie", "unsure", asked="a"),
    ]  # fmt: skip
    got = [(j.model_a, j.model_b, j.winner, j.order) for j in as_judgments(votes)]
    assert got == [
        ("a", "b", "model_a", 0), ("a", "b", "model_b", 1),
        ("a", "b", "model_a", 1), ("a", "b", "tie", 0),
    ]  # fmt: skip
    assert next(as_judgments(votes[3:])).raw == "tie; a: unsure"


def test_shares_and_their_intervals():
    votes = [vote(q, better="left" if q % 4 else "right") for q in range(40)]
    votes += [vote(q, "b", "a", "tie", rater="s") for q in range(0, 40, 2)]
    summary = summarize(votes)
    first, second = summary["models"]
    assert (first["model"], first["wins"], first["ties"], first["losses"]) == ("a", 30, 20, 10)
    assert first["share"] == pytest.approx(40 / 60) and second["share"] == pytest.approx(20 / 60)
    low, high = first["interval"]
    assert low < 40 / 60 < high and second["interval"] == pytest.approx(
        [1 - high, 1 - low], abs=0.01
    )
    assert (summary["votes"], summary["raters"], summary["questions"]) == (60, 2, 40)
    assert summary["left"]["share"] == 0.75 and summary["left"]["votes"] == 40


@pytest.mark.full
def test_intervals_cover_the_truth():
    """Votes on a question share its difficulty: whole questions are resampled."""
    draw = np.random.default_rng(0)
    covered = 0
    for _ in range(25):
        votes = []
        for question in range(30):
            p = draw.beta(1.2, 0.8)  # mean .6, and far apart
            for rater in range(draw.integers(1, 8)):
                better = "left" if draw.random() < p else "right"
                votes.append(vote(question, better=better, rater=str(rater)))
        low, high = next(m for m in summarize(votes)["models"] if m["model"] == "a")["interval"]
        covered += low <= 0.6 <= high
    assert covered >= 20  # 23 or 24 expected; fewer than 20 once in a thousand times


@pytest.mark.parametrize(
    "right, wrong, verdict",
    [(40, 10, "people can tell"), (10, 40, "people mistake it"), (12, 10, "not shown")],
)
def test_whether_people_can_tell(right, wrong, verdict):
    votes = [vote(1, guess="left", asked="a")] * right + [vote(1, guess="right", asked="a")] * wrong
    votes += [vote(1, guess="unsure", asked="a")] * 3 + [vote(1, guess="neither", asked="a")] * 2
    votes += [
        vote(1, "c", "b", guess="neither", asked="a"),
        vote(1, "c", "b", guess="left", asked="a"),
    ]
    (row,) = summarize(votes)["telling"]
    assert row["share"] == right / (right + wrong) and row["votes"] == right + wrong
    assert row["interval"] == list(proportion_interval(right, right + wrong))
    assert (row["said_unsure"], row["said_neither"], row["verdict"]) == (3, 2, verdict)
    assert row["false_alarms"]["share"] == 0.5


def test_one_vote_and_none():
    summary = summarize([vote()])
    assert summary["models"][0]["interval"] is None and summary["telling"] == []
    json.dumps(summary, allow_nan=False)
    with pytest.raises(BadInput, match="no votes yet"):
        summarize([])


# --- the command --------------------------------------------------------------------------------


def run(*words):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(w) for w in words]))


def test_report_and_export(store, tmp_path, capsys):
    for rater in ("x", "y"):
        while (shown := store.next(rater, "ChatGPT")) is not None:
            store.vote(rater, shown.token, "left", "left")
    report, judgments = tmp_path / "report.json", tmp_path / "judgments.jsonl"
    assert run("report", "--votes", store.path, "--output", report) == 0
    said = capsys.readouterr().out
    assert "18 votes of 2 raters, 3 questions" in said and "which is ChatGPT's" in said
    assert json.loads(report.read_text())["schema"] == 1
    assert run("export", "--votes", store.path, "--output", judgments) == 0
    pairs = read_judgments(judgments).pairs
    assert [to_json(p) for p in pairs] == [to_json(p) for p in as_judgments(store.votes())]
    assert len({p.judge for p in pairs}) == 2
    assert all((p.winner == "model_a") == (p.order == 0) for p in pairs)


@pytest.mark.parametrize(
    "words, told",
    [
        (["--votes", "v.sqlite"], "give --replies"),
        (["--votes", "v.sqlite", "--replies", "absent.jsonl"], "absent.jsonl"),
        (["report", "--votes", "absent.sqlite"], "there is no file"),
        (["export", "--votes", "absent.sqlite"], "give --output"),
        (
            ["--votes", "v.sqlite", "--replies", "r.jsonl", "--find", "GPT-4"],
            "replies of a, b only",
        ),
        (["--votes", "v.sqlite", "--replies", "r.jsonl", "--port", "99999"], "port is 99999"),
    ],
)
def test_what_cannot_be(tmp_path, monkeypatch, words, told):
    from qlora_kernels.evaluate.records import Reply, write_records

    monkeypatch.chdir(tmp_path)
    write_records("r.jsonl", [Reply(1, m, "q", m) for m in "ab"])
    with pytest.raises(BadInput, match=re.escape(told)):
        run(*words)


def test_whose_reply_is_looked_for():
    assert command.find_target(["base", "ChatGPT"], None) == "ChatGPT"
    assert command.find_target(["base", "chat-gpt-3.5"], None) == "chat-gpt-3.5"
    assert command.find_target(["gpt2-base", "guanaco"], None) is None
    assert command.find_target(["gpt-3.5", "gpt-4"], None) is None
    assert command.find_target(["a", "b"], "b") == "b"


def test_the_command_serves(tmp_path, monkeypatch, capsys):
    from qlora_kernels.evaluate.records import Reply, write_records
    from qlora_kernels.serve import guard

    class Server:
        def __init__(self, app):
            assert app.local and app.max_body == 16 << 10

        def run(self, sockets):
            assert sockets[0].getsockname()[0] == "127.0.0.1"

    monkeypatch.setattr(guard, "make_server", Server)
    write_records(tmp_path / "r.jsonl", [Reply(1, m, "q", m) for m in "ab"])
    words = ["--replies", tmp_path / "r.jsonl", "--votes", tmp_path / "v.sqlite", "--port", "0"]
    assert run(*words) == 0
    said = capsys.readouterr().out
    assert "2 models, 1 pairs at http://127.0.0.1:" in said and "--find" in said
    assert Store(tmp_path / "v.sqlite").votes() == []
