"""OASST1's message trees in both published forms, made here, whole and broken in every way."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pytest

from qlora_kernels.finetune.data import (
    DataError,
    DataOptions,
    oasst,
    prepare,
    read_records,
    to_examples,
)
from qlora_kernels.finetune.data.oasst import PUBLISHED, conversations_of_trees


def message(name: str, role: str, rank: int | None = None, replies=(), **more) -> dict:
    """A message of a tree, with the fields of the published schema that tell something."""
    return {
        "message_id": name, "role": role, "text": f"text of {name}", "lang": "en", "rank": rank,
        "synthetic": False, "deleted": False, "emojis": {}, "replies": list(replies), **more,
    }  # fmt: skip


def tree(name: str = "t", **more) -> dict:
    """Two replies, the second ranked best; below it two follow-ups, the first ranked best, and so
    on: the best path is t, t-b, t-b-a, t-b-a-b."""
    below = message(f"{name}-b-a", "prompter", 0, [
        message(f"{name}-b-a-a", "assistant", 1), message(f"{name}-b-a-b", "assistant", 0)
    ])  # fmt: skip
    replies = [
        message(f"{name}-a", "assistant", 1),
        message(f"{name}-b", "assistant", 0, [below, message(f"{name}-b-b", "prompter", 1)]),
        message(f"{name}-c", "assistant", 2),
    ]
    prompt = message(name, "prompter", None, replies)
    return {"message_tree_id": name, "tree_state": "ready_for_export", "prompt": prompt, **more}


def flat(*trees: dict) -> list[dict]:
    """The same trees as the file of messages has them, in an order of its own."""
    rows = []
    for one in trees:
        waiting = [(one["prompt"], None)]
        while waiting:
            fields, parent = waiting.pop()
            row = {**fields, "parent_id": parent, "message_tree_id": one["message_tree_id"]}
            waiting += [(reply, row["message_id"]) for reply in row.pop("replies")]
            rows.append(row)
    random.Random(0).shuffle(rows)
    return rows


def said(example) -> list[str]:
    return [m["content"].removeprefix("text of ") for m in example.messages]


BEST = ["t", "t-b", "t-b-a", "t-b-a-b"]


# --- whole trees --------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["trees", "messages"])
@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".parquet"])
def test_the_best_ranked_path_of_each_tree(write, form, ending):
    trees = [tree("t"), tree("u")]
    rows = trees if form == "trees" else flat(*trees)
    if ending == ".parquet":
        if form == "trees":
            pytest.skip("Parquet is published of messages only: a tree has no fixed depth")
        rows = [{k: v for k, v in row.items() if k != "emojis"} for row in rows]
        source = write(f"a{ending}", rows)
    else:
        source = write("a.jsonl", rows)
        if ending.endswith("gz"):
            packed = Path(source).with_name("packed.jsonl.gz")
            packed.write_bytes(gzip.compress(Path(source).read_bytes()))
            source = str(packed)
    examples, found, notes = to_examples(read_records(source))
    assert found.name == f"oasst-{form}"
    assert sorted(map(said, examples)) == [BEST, [w.replace("t", "u") for w in BEST]]
    assert [m["role"] for m in examples[0].messages] == ["user", "assistant"] * 2
    (note,) = notes
    assert note.startswith("2 conversations") and "9,846" in note


def test_the_papers_number_of_conversations_is_checked(write, monkeypatch):
    assert PUBLISHED == 9846
    monkeypatch.setattr(oasst, "PUBLISHED", 3)
    for form in (list, lambda trees: flat(*trees)):
        records = read_records(write("a.jsonl", form([tree("t"), tree("u"), tree("v")])))
        assert to_examples(records)[2] == ["3 conversations, as many as Guanaco was trained on"]
    two = read_records(write("b.jsonl", [tree("t"), tree("u")]))
    (note,) = to_examples(two)[2]
    assert note.startswith("2 conversations") and "trained on 3" in note and "another set" in note


def test_the_real_file_has_as_many_conversations_as_the_paper(shared_data):
    files = sorted(shared_data.glob("*oasst*"))
    if not files:
        pytest.skip("OASST1 is not there")
    examples, _, _ = to_examples(read_records(str(files[0])))
    # All ready trees: the train split and its validation split, of 518 trees.
    assert len(examples) in (PUBLISHED, PUBLISHED + 518)


def test_trained_on_all_of_it_or_on_the_replies(write, tokenizer):
    source = write("a.jsonl", [tree("t"), tree("u")])

    def trained(train_on: str, **more) -> str:
        options = DataOptions(source, train_on=train_on, eval_split=0, **more)
        data = prepare(options, tokenizer)
        assert any("Guanaco was trained on 9,846" in line for line in data.report.lines())
        row = data.train[0]
        return tokenizer.decode(row["input_ids"][row["labels"] != -100])

    whole, replies = trained("all"), trained("replies")
    assert all(f"text of {name}" in whole for name in BEST)
    assert "text of t-b<" in replies and "text of t-b-a-b" in replies
    assert "text of t-b-a<" not in replies and "user" not in replies


def test_a_limit_counts_conversations_not_messages(write, tokenizer):
    source = write("a.jsonl", flat(tree("t"), tree("u"), tree("v")))
    data = prepare(DataOptions(source, limit=2, eval_split=0), tokenizer)
    assert data.report.train == 2 and data.report.read == 2


def test_a_last_question_that_nobody_answered_stays(write):
    unanswered = tree()
    unanswered["prompt"]["replies"][1]["replies"][0]["replies"] = []
    (example,), _, _ = to_examples(read_records(write("a.jsonl", [unanswered])))
    assert said(example) == BEST[:3] and example.answered


def test_what_was_deleted_is_passed_over(write):
    rows = [tree()]
    rows[0]["prompt"]["replies"][1]["deleted"] = True
    (example,), _, _ = to_examples(read_records(write("a.jsonl", rows)))
    assert said(example) == ["t", "t-a"]
    rows[0]["prompt"]["replies"][0]["text"] = " \n"
    (example,), _, _ = to_examples(read_records(write("b.jsonl", rows)))
    assert said(example) == ["t", "t-c"]


# --- ranks --------------------------------------------------------------------------------------


def ranked(*ranks) -> list[str]:
    replies = [message(f"t-{i}", "assistant", rank) for i, rank in enumerate(ranks)]
    one = {"message_tree_id": "t", "prompt": message("t", "prompter", None, replies)}
    from qlora_kernels.finetune.data.files import Record

    ((_, path),), notes = conversations_of_trees([Record("f:1", one)])
    return [path[1]["content"].removeprefix("text of t-"), *notes[:-1]]


def test_missing_ranks():
    assert ranked(None) == ["0"]  # the only one: nobody had to rank it
    assert ranked(None, 3, None, 1) == ["3"]
    assert ranked(2, 2) == ["0"]
    assert ranked(1.0, 0.0) == ["1"]  # as tables with holes have them
    first, note = ranked(None, None)
    assert first == "0"
    assert (
        note
        == "1 trees with replies that nobody ranked, the first of which is taken (the first: f:1)"
    )
    assert ranked("best", True)[0] == "0"


# --- malformed ----------------------------------------------------------------------------------


def broken(change) -> dict:
    one = tree("x")
    return change(one) or one


TREES = {
    "a cycle": lambda t: t["prompt"]["replies"][1]["replies"][0].update(message_id="x"),
    "a copy": lambda t: t["prompt"]["replies"][0].update(message_id="x-b"),
    "a parent_id that is not": lambda t: t["prompt"]["replies"][0].update(parent_id="elsewhere"),
    "something else than a message": lambda t: t["prompt"]["replies"].append("a reply"),
    "no message_id": lambda t: t["prompt"]["replies"][0].pop("message_id") and None,
    "a role that is neither": lambda t: t["prompt"]["replies"][0].update(role="system"),
    "a text that is none": lambda t: t["prompt"]["replies"][0].update(text=None),
    "replies that are no list": lambda t: t["prompt"].update(replies={"a": 1}),
    "nobody answered": lambda t: t["prompt"].update(replies=[]),
    "empty or deleted": lambda t: t["prompt"].update(text=""),
    "do not begin with a prompter": lambda t: t["prompt"].update(role="assistant"),
    "two messages of one role": lambda t: t["prompt"]["replies"][1].update(role="prompter"),
    "there already": lambda t: tree("t"),
}


@pytest.mark.parametrize("why", TREES)
def test_a_malformed_tree_is_named_counted_and_left_out(write, why):
    source = write("a.jsonl", [tree("t"), broken(TREES[why]), broken(TREES[why])])
    examples, _, notes = to_examples(read_records(source))
    assert [said(e) for e in examples] == [BEST]
    assert why.replace("a cycle", "cycle").replace("a copy", "copy") in notes[0]
    assert notes[0].startswith("2 trees") and f"(the first: {source}:2)" in notes[0]
    if why != "there already":
        alone = write("b.jsonl", [broken(TREES[why])])
        with pytest.raises(DataError, match=r"b\.jsonl:1: no tree can be used: 1 trees"):
            to_examples(read_records(alone))


def test_malformed_messages_are_named_counted_and_left_out(write):
    rows = [
        *flat(tree("t")),
        message("orphan", "assistant", parent_id="nowhere"),
        message("below", "prompter", parent_id="orphan"),
        message("round", "prompter", parent_id="round-a"),
        message("round-a", "assistant", parent_id="round"),
        message("own", "prompter", parent_id="own"),
        message("t-a", "assistant", 0, parent_id="t", text="again"),
        message("wrong", "moderator", parent_id="t"),
        message("", "assistant", parent_id="t"),
        message("alone", "prompter", parent_id=None),
    ]
    source = write("a.jsonl", rows)
    examples, _, notes = to_examples(read_records(source))
    assert [said(e) for e in examples] == [BEST]
    at = {row["message_id"]: f"(the first: {source}:{i + 1})" for i, row in enumerate(rows)}
    expected = {
        "1 messages whose message_id was there already": f"(the first: {source}:{len(rows) - 3})",
        "1 messages with a role": at["wrong"],
        "1 messages with no message_id": at[""],
        "1 trees with a prompt that nobody answered": at["alone"],
        "2 orphans": at["orphan"],
        "3 messages in a cycle": at["round"],
    }
    for what, where in expected.items():
        assert any(n.startswith(what) and n.endswith(where) for n in notes), (what, notes)
    assert len(notes) == len(expected) + 1


def test_only_orphans_or_cycles_are_an_error(write):
    rows = [message("a", "assistant", parent_id="b"), message("b", "prompter", parent_id="a")]
    with pytest.raises(DataError, match="2 messages in a cycle"):
        to_examples(read_records(write("a.jsonl", rows)))
    with pytest.raises(DataError, match="1 orphans"):
        to_examples(read_records(write("b.jsonl", rows[:1])))


def test_a_very_deep_tree_is_no_recursion(write):
    """Two thousand messages deep, as messages: the form in which JSON can hold it."""
    rows = [
        message(str(i), "assistant" if i % 2 else "prompter", 0,
                parent_id=str(i - 1) if i else None)
        for i in range(2_000)
    ]  # fmt: skip
    (example,), _, _ = to_examples(read_records(write("a.jsonl", rows)))
    assert len(example.messages) == 2_000


@pytest.mark.parametrize(
    "content, told",
    [
        (b"", "is empty"),
        (b"\n", "is empty"),
        (b"not JSON\n", "not JSON"),
        (json.dumps(tree()).encode() + b'\n{"message_tree_id": "u", "pro', "half-written"),
        (b"[]\n", "expected an object"),
    ],
)
def test_files_that_are_no_trees(write, content, told):
    with pytest.raises(DataError, match=told):
        to_examples(read_records(write("a.jsonl", content)))


def test_a_damaged_archive(write):
    whole = gzip.compress(json.dumps(tree()).encode() + b"\n")
    for content in (whole[:-9], b"\x1f\x8b nothing of the kind", whole[:40] + b"\0" * 40):
        with pytest.raises(DataError, match=r"a\.jsonl\.gz: not a whole gzip file"):
            read_records(write("a.jsonl.gz", content))
    with pytest.raises(DataError, match="is empty"):
        read_records(write("a.jsonl.gz", b""))
