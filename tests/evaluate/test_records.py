"""The files between the commands: what is read comes back, what is wrong is named by its line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from qlora_kernels.evaluate import records
from qlora_kernels.evaluate.appender import Appender
from qlora_kernels.evaluate.records import Pair, Question, Reply, Score
from qlora_kernels.finetune.errors import BadInput

VICUNA = Path(__file__).resolve().parents[3] / "shared" / "data" / "vicuna_questions.jsonl"

QUESTION = {"question_id": 1, "category": "maths", "turns": ["What is 2 + 2?"]}
REPLY = {
    "schema": 1, "question_id": 1, "category": "maths", "question": "What is 2 + 2?",
    "model": "ours", "reply": "4", "seed": 7, "sampling": {"top_p": 0.9},
}  # fmt: skip
PAIR = {
    "schema": 1, "kind": "pair", "question_id": 1, "category": "maths", "model_a": "ours",
    "model_b": "theirs", "winner": "model_a", "judge": "j", "order": 0, "why": "", "raw": "[[A]]",
}  # fmt: skip
SCORE = {
    "schema": 1, "kind": "score", "question_id": 1, "category": "maths", "model": "ours",
    "baseline": "theirs", "score": 8.5, "baseline_score": 9, "judge": "j", "order": 1, "raw": "",
}  # fmt: skip
READERS = {
    "question": records.read_questions,
    "reply": records.read_replies,
    "judgment": records.read_judgments,
}


@pytest.fixture
def lines(tmp_path):
    """``lines(*records)``: a JSONL file of them; texts go in as they are."""

    def make(*values, name="file.jsonl", end="\n"):
        path = tmp_path / name
        text = "\n".join(v if isinstance(v, str) else json.dumps(v) for v in values)
        path.write_text(text + end, "utf-8")
        return path

    return make


# --- what is right ------------------------------------------------------------------------------


def test_questions_in_both_forms(lines):
    history = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": ""}]
    open_assistant = {"question_id": "a-1", "text": "And then?", "history": history}
    read = records.read_questions(lines(QUESTION, "", open_assistant))
    assert read[0] == Question(1, ("What is 2 + 2?",), "maths")
    assert read[1] == Question("a-1", ("And then?",), None, tuple(history))
    assert records.read_questions(lines(QUESTION, open_assistant), limit=1) == read[:1]


@pytest.mark.skipif(not VICUNA.is_file(), reason="Vicuna's questions are not beside the repository")
def test_vicunas_questions():
    read = records.read_questions(VICUNA)
    assert [q.question_id for q in read] == list(range(1, 81))
    assert {len(q.turns) for q in read} == {1} and read[0].category == "generic"


@pytest.mark.parametrize(
    "value, kind",
    [(QUESTION, "question"), (REPLY, "reply"), (PAIR, "judgment"), (SCORE, "judgment")],
)
def test_what_is_written_is_read_again_and_equal(lines, tmp_path, value, kind):
    def read(path):
        found = READERS[kind](path)
        return list(found) if kind != "judgment" else found.pairs + found.scores

    before = read(lines(value))
    records.write_records(tmp_path / "again.jsonl", before)
    assert read(tmp_path / "again.jsonl") == before and len(before) == 1
    assert json.loads((tmp_path / "again.jsonl").read_text()).keys() >= value.keys()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.jsonl", "file.jsonl"]


def test_every_character_survives(tmp_path):
    said = "a\u2028b\u0085c\r\nd\x00 <b>\"'\\ 𝔘 \u202e"
    records.write_records(tmp_path / "r.jsonl", [Reply("q\u2029", "m", said, said)])
    assert len((tmp_path / "r.jsonl").read_text("utf-8").splitlines()) == 1
    (read,) = records.read_replies(tmp_path / "r.jsonl")
    assert read.reply == read.question == said


def test_a_kill_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "r.jsonl"
    records.write_records(path, [Reply(1, "m", "q", "old")])

    def broken():
        yield Reply(1, "m", "q", "new")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        records.write_records(path, broken())
    assert records.read_replies(path)[0].reply == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["r.jsonl"]


def test_several_files_are_read_as_one(lines):
    other = {**REPLY, "model": "theirs"}
    read = records.read_replies(lines(REPLY), lines(other, name="b.jsonl"))
    assert [r.model for r in read] == ["ours", "theirs"]
    with pytest.raises(BadInput, match=r"b.jsonl:1: a reply of ours to question 1 .*file.jsonl:1"):
        records.read_replies(lines(REPLY), lines(REPLY, name="b.jsonl"))


def test_a_pair_flipped_says_the_same():
    for winner, other in (("model_a", "model_b"), ("tie", "tie"), (None, None)):
        pair = Pair(1, "x", "y", winner, "j", 0)
        assert pair.flipped() == Pair(1, "y", "x", other, "j", 1)
        assert pair.flipped().key == pair.key and pair.flipped().flipped() == pair
    assert Pair(1, "x", "y", None, "j", 1).key != Pair(1, "x", "y", None, "j", 0).key


# --- what is wrong ------------------------------------------------------------------------------


def without(value, name):
    return {k: v for k, v in value.items() if k != name}


WRONG = [
    ("question", [{"turns": ["a"]}], ":1: question_id is missing; there is turns"),
    ("question", [{"question_id": 1}], ":1: neither turns nor text"),
    ("question", [{"question_id": 1, "prompt": "a"}], "call prompt text"),
    ("question", [{"question_id": 1, "turns": []}], "turns must be a list"),
    ("question", [{"question_id": 1, "turns": "a"}], "turns must be a list"),
    ("question", [{"question_id": 1, "turns": ["a", 3]}], "turns[1] must be text, it is 3"),
    ("question", [{"question_id": 1, "text": "  "}], "text is empty"),
    ("question", [{"question_id": True, "text": "a"}], "question_id must be a whole number"),
    ("question", [{"question_id": 1.5, "text": "a"}], "question_id must be a whole number"),
    ("question", [{"question_id": "", "text": "a"}], "question_id must be a whole number"),
    ("question", [{"question_id": None, "text": "a"}], "question_id must be a whole number"),
    ("question", [{"question_id": 1, "text": "\ud800"}], "half of a surrogate pair"),
    ("question", [QUESTION, "", QUESTION], ":3: question_id 1 is there already, in "),
    ("question", [QUESTION, {**QUESTION, "question_id": "1"}], ":2: question_id 1 is there"),
    ("question", [QUESTION, "[1]"], ":2: a list"),
    ("question", [QUESTION, "{]", QUESTION], ":2: not JSON"),
    ("question", [{**QUESTION, "history": "no"}], "history must be a list"),
    ("question", [{**QUESTION, "history": [3]}], "history[0] must be a message"),
    ("question", [{**QUESTION, "history": [{"role": "bot", "content": ""}]}], "role must be"),
    ("reply", [without(REPLY, "schema")], ":1: schema is missing"),
    ("reply", [{**REPLY, "schema": 2}], "schema is 2, this version reads 1; it was written by a n"),
    ("reply", [{**REPLY, "schema": True}], "schema is true"),
    ("reply", [without(REPLY, "model")], "model is missing"),
    ("reply", [without(REPLY, "reply")], "reply is missing"),
    ("reply", [{**REPLY, "reply": None}], "reply must be text, it is null"),
    ("reply", [{**REPLY, "seed": "x"}], "seed must be a whole number or null"),
    ("reply", [{**REPLY, "sampling": [1]}], "sampling must be an object"),
    ("reply", [REPLY, REPLY], ":2: a reply of ours to question 1 is there already"),
    ("reply", [REPLY, {**REPLY, "model": "b", "question": "?"}], ":2: question 1 is another one"),
    ("reply", [REPLY, {**REPLY, "model": "b", "category": "x"}], ":2: question 1 is another one"),
    ("judgment", [QUESTION], ":1: no judgment of ours"),
    ("judgment", [{**PAIR, "kind": "triple"}], 'kind must be one of "pair", "score"'),
    ("judgment", [{**PAIR, "winner": "ours"}], "winner must be one of"),
    ("judgment", [without(PAIR, "winner")], "winner is missing"),
    ("judgment", [{**PAIR, "order": True}], "order must be one of 0, 1; it is true"),
    ("judgment", [{**PAIR, "order": 2}], "order must be one of 0, 1; it is 2"),
    ("judgment", [{**PAIR, "model_b": "ours"}], "model_a and model_b are both ours"),
    ("judgment", [{**PAIR, "judge": ""}], "judge is empty"),
    ("judgment", [PAIR, PAIR], ":2: the same judgment as in"),
    ("judgment", [{**SCORE, "score": 11}], "score must be 0 to 10, or null; it is 11"),
    ("judgment", [{**SCORE, "score": "8"}], "score must be 0 to 10"),
    ("judgment", ['{"schema": 1, "kind": "score", "score": NaN, "question_id": 1, "model": "a", '
                  '"baseline": "b"}'], "score must be 0 to 10, or null; it is NaN"),
    ("judgment", [{**SCORE, "score": None}], "only one of score and baseline_score is null"),
    ("judgment", [{**SCORE, "baseline": "ours"}], "model and baseline are both ours"),
    ("judgment", [SCORE, SCORE], ":2: the same judgment as in"),
    ("judgment", [PAIR, {**SCORE, "category": "x"}], ":2: question 1 is of category x, in "),
]  # fmt: skip


@pytest.mark.parametrize("kind, values, told", WRONG)
def test_what_is_wrong_names_its_line(lines, kind, values, told):
    with pytest.raises(BadInput) as caught:
        READERS[kind](lines(*values))
    assert told in str(caught.value) and "file.jsonl" in str(caught.value)


@pytest.mark.parametrize("read", READERS.values())
def test_files_that_are_none(lines, tmp_path, read):
    with pytest.raises(BadInput, match="nowhere.jsonl does not exist"):
        read(tmp_path / "nowhere.jsonl")
    with pytest.raises(BadInput, match="is empty"):
        read(lines("", end=""))
    with pytest.raises(BadInput, match="file.jsonl:2.*half-written"):
        read(lines(QUESTION, '{"question_id": 2, "tur', end=""))


def test_judgments_that_disagree_about_which_model_is_which(lines):
    """Shown in exchanged places under exchanged names is the same thing twice."""
    other = {**PAIR, "model_a": "theirs", "model_b": "ours", "order": 1}
    with pytest.raises(BadInput, match=r":2 and .*:1 disagree about which model is which"):
        records.read_judgments(lines(PAIR, other))
    # The same under its own names is the other order, and people see what they see.
    both = records.read_judgments(lines(PAIR, {**other, "order": 0}, {**other, "judge": "k"}))
    assert len(both.pairs) == 3
    exchanged = {**SCORE, "question_id": 2, "model": "theirs", "baseline": "ours"}
    with pytest.raises(BadInput, match="disagree about which model is the baseline"):
        records.read_judgments(lines(SCORE, exchanged))


def test_null_is_a_verdict_that_could_not_be_read(lines):
    unscored = {**SCORE, "score": None, "baseline_score": None}
    read = records.read_judgments(lines({**PAIR, "winner": None, "category": None}, unscored))
    assert read.pairs[0].winner is None
    assert read.scores == [Score(1, "ours", "theirs", None, None, "j", 1, "maths", "")]


# --- growing files ------------------------------------------------------------------------------


def test_appending_and_reopening(tmp_path):
    path = tmp_path / "new" / "r.jsonl"
    with Appender(path) as file:
        assert file.empty() and file.mended == 0
        file.append(Reply(1, "m", "q", "a"))
        assert len(records.read_replies(path)) == 1  # on the disk at once
    with Appender(path) as file:
        assert not file.empty()
        file.append(Reply(2, "m", "q", "b"), Reply(3, "m", "q", "c"))
    assert [r.reply for r in records.read_replies(path)] == ["a", "b", "c"]


def test_a_torn_line_is_mended_wherever_it_was_torn(tmp_path):
    path = tmp_path / "r.jsonl"
    first, second = (records.to_json(Reply(i, "m", "q", "ä")).encode() for i in (1, 2))
    for cut in range(len(second) + 1):
        path.write_bytes(first + b"\n" + second[:cut])
        whole = cut == len(second)
        with Appender(path) as file:
            assert file.mended == (0 if whole else cut)
            file.append(Reply(3, "m", "q", "z"))
        read = [r.question_id for r in records.read_replies(path)]
        assert read == ([1, 2, 3] if whole else [1, 3])


def test_one_writer_at_a_time(tmp_path):
    path = tmp_path / "r.jsonl"
    with Appender(path), pytest.raises(BadInput, match="being written by another run"):
        Appender(path)
    Appender(path).close()
    with pytest.raises(BadInput, match=os.fspath(tmp_path)):
        Appender(tmp_path)
