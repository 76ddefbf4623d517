"""Replies to compare, and a file of votes."""

from __future__ import annotations

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("scipy")


@pytest.fixture(scope="session")
def make_replies():
    """``make_replies(questions=3, models=(...))``: a reply of each model to each question."""
    from qlora_kernels.evaluate.records import Reply

    def make(questions=3, models=("ChatGPT", "guanaco", "plain-llama")):
        return [
            Reply(q, m, f"question {q}?", f"reply number {q * 10 + i}", "generic")
            for q in range(1, questions + 1)
            for i, m in enumerate(models)
        ]

    return make


@pytest.fixture
def store(tmp_path, make_replies):
    from qlora_kernels.arena.store import Store

    store = Store(tmp_path / "votes.sqlite", create=True)
    store.add(make_replies())
    yield store
    store.close()
