"""The file of votes: none lost, none counted twice, none for what was not shown."""

from __future__ import annotations

import dataclasses
import sqlite3
import threading

import pytest

from qlora_kernels.arena.store import NotShown, Store, VotedOtherwise
from qlora_kernels.evaluate.records import Reply
from qlora_kernels.finetune.errors import BadInput


def test_a_vote(store):
    shown = store.next("rater a", "ChatGPT")
    assert shown.asked == "ChatGPT" and shown.left != shown.right
    left, right = store.vote("rater a", shown.token, "left", "right")
    (vote,) = store.votes()
    assert (vote.left, vote.right, vote.better, vote.guess) == (left, right, "left", "right")
    assert vote.question_id in (1, 2, 3) and vote.category == "generic"
    assert vote.rater.startswith("rater-") and "rater a" not in vote.rater
    assert store.progress("rater a") == (1, 9) and store.progress("rater b") == (0, 9)


def test_the_same_vote_again_counts_once_and_another_is_refused(store):
    shown = store.next("a", None)
    names = store.vote("a", shown.token, "tie", None)
    assert store.vote("a", shown.token, "tie", None) == names
    with pytest.raises(VotedOtherwise):
        store.vote("a", shown.token, "left", None)
    assert [v.better for v in store.votes()] == ["tie"]


def test_votes_for_what_was_not_shown(store):
    shown = store.next("a", None)
    for rater, token in [("b", shown.token), ("a", "made up"), ("a", "")]:
        with pytest.raises(NotShown):
            store.vote(rater, token, "left", None)
        with pytest.raises(NotShown):
            store.skip(rater, token)
    for better, guess in [("middle", None), ("left", "left"), ("left", "both")]:
        with pytest.raises(ValueError):
            store.vote("a", shown.token, better, guess)
    assert store.votes() == []


def test_a_page_that_is_loaded_again_shows_the_same(store):
    first = store.next("a", None)
    assert store.next("a", None) == first
    assert store.next("b", None).token != first.token
    store.skip("a", first.token)
    with pytest.raises(NotShown):
        store.skip("a", "made up")
    seen = {(first.left, first.right)}
    while (shown := store.next("a", None)) is not None:
        assert {shown.left, shown.right} not in map(set, seen)
        seen.add((shown.left, shown.right))
        store.vote("a", shown.token, "left", None)
    assert len(seen) == 9 and store.progress("a") == (8, 9)
    with pytest.raises(NotShown, match="have voted"):
        store.skip("a", store.db.execute("SELECT token FROM votes").fetchone()[0])


def test_many_raters_at_once(store):
    failures = []

    def rate(name):
        try:
            while (shown := store.next(name, None)) is not None:
                store.vote(name, shown.token, "right", None)
                store.vote(name, shown.token, "right", None)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=rate, args=(f"rater {i}",)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and len(store.votes()) == 6 * 9
    pairs = {(v.rater, v.question_id, frozenset((v.left, v.right))) for v in store.votes()}
    assert len(pairs) == 6 * 9


def test_the_file_keeps_what_was_acknowledged(store):
    shown = store.next("a", None)
    store.vote("a", shown.token, "left", None)
    assert store.db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
    assert store.db.execute("PRAGMA synchronous").fetchone()[0] == 2  # FULL
    # Read by another process's eyes, while this one has the file open.
    other = Store(store.path)
    assert other.votes() == store.votes() and len(other.votes()) == 1
    other.close()


def test_replies_that_are_there_already(store, make_replies):
    before = store.db.execute("SELECT COUNT(*) FROM replies").fetchone()[0]
    store.add(make_replies())
    assert store.db.execute("SELECT COUNT(*) FROM replies").fetchone()[0] == before
    changed = make_replies()
    changed[4] = dataclasses.replace(changed[4], reply="another one")
    with pytest.raises(BadInput, match="another reply of guanaco to question 2"):
        store.add(changed)
    with pytest.raises(BadInput, match="nothing to compare"):
        store.add([r for r in make_replies() if r.model == "plain-llama"])
    # Fewer models: votes stay, the others are no longer shown.
    store.add([r for r in make_replies(1) if r.model != "plain-llama"])
    shown = store.next("a", None)
    assert {"reply number 10", "reply number 11"} == {shown.left, shown.right}
    assert store.progress("a") == (0, 1)


def test_ids_that_are_numbers_and_their_digits(tmp_path):
    store = Store(tmp_path / "v.sqlite", create=True)
    store.add([Reply(q, m, "q", m) for q in (1, "2") for m in ("a", "b")])
    ids = set()
    while (shown := store.next("x", None)) is not None:
        store.vote("x", shown.token, "left", None)
    ids = {v.question_id for v in store.votes()}
    assert ids == {1, "2"}
    store.close()


def test_a_conversation_before_the_question_is_shown(tmp_path):
    history = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."})
    store = Store(tmp_path / "v.sqlite", create=True)
    store.add([Reply(1, m, "And now?", m, history=history) for m in ("a", "b")])
    assert store.next("x", None).question == "user: Hi\n\nassistant: Hello.\n\nuser: And now?"
    store.close()


def test_files_that_are_none_of_ours(tmp_path):
    with pytest.raises(BadInput, match="there is no file .*qlora arena --replies"):
        Store(tmp_path / "absent.sqlite")
    with pytest.raises(BadInput, match="there is no folder"):
        Store(tmp_path / "no" / "votes.sqlite", create=True)
    text = tmp_path / "text.sqlite"
    text.write_text("no database, and longer than the head of one " * 10)
    with pytest.raises(BadInput, match="cannot be used as a file of votes"):
        Store(text, create=True)
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as db:
        db.execute("CREATE TABLE things (x)")
    with pytest.raises(BadInput, match="something else"):
        Store(other, create=True)
    later = tmp_path / "later.sqlite"
    Store(later, create=True).close()
    with sqlite3.connect(later) as db:
        db.execute("UPDATE meta SET value='9' WHERE name='schema'")
    with pytest.raises(BadInput, match="schema 9, this version reads 1"):
        Store(later)
