"""The arena over HTTP: what a rater can learn, and what is refused; and a kill."""

from __future__ import annotations

import http.client
import json
import os
import signal
import sqlite3
import sys
import threading
import time

import pytest
from starlette.testclient import TestClient

from qlora_kernels.arena.app import create_app
from qlora_kernels.arena.store import Store
from qlora_kernels.serve.guard import Guard, listen, make_server

NAMES = ("guanaco", "plain-llama")


@pytest.fixture
def rater(store):
    """``rater()``: a new browser."""

    def make(target="ChatGPT"):
        return TestClient(Guard(create_app(store, target)), base_url="http://localhost")

    return make


def code(answer):
    return answer.status_code, answer.json()["error"]["code"]


def test_a_vote_and_what_it_reveals(rater):
    one = rater()
    answer = one.post("/api/next", json={})
    state = answer.json()
    pair = state["pair"]
    assert set(pair) == {"token", "question", "left", "right", "find"}
    assert (pair["find"], state["votes"], state["pairs"]) == ("ChatGPT", 0, 9)
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie
    ballot = {"token": pair["token"], "better": "left", "guess": "left"}
    told = one.post("/api/vote", json=ballot).json()
    assert {told["left"], told["right"]} <= {"ChatGPT", *NAMES}
    assert told["correct"] == (told["left"] == "ChatGPT")
    assert one.post("/api/vote", json=ballot).json() == told
    assert one.post("/api/next", json={}).json()["votes"] == 1
    otherwise = one.post("/api/vote", json={**ballot, "better": "right"})
    assert code(otherwise) == (409, "voted_already")


def test_no_name_before_the_vote(rater):
    one = rater()
    for _ in range(9):
        answer = one.post("/api/next", json={})
        page = "".join(one.get(p).text for p in ("/", "/arena.js", "/arena.css", "/health"))
        heads = json.dumps(dict(answer.headers))
        for name in NAMES:
            assert name not in answer.text + page + heads
        token = answer.json()["pair"]["token"]
        one.post("/api/vote", json={"token": token, "better": "tie", "guess": "unsure"})
    assert one.post("/api/next", json={}).json()["pair"] is None


def test_guesses(rater, store):
    one = rater()
    seen = set()
    while (pair := one.post("/api/next", json={}).json()["pair"]) is not None:
        ballot = {"token": pair["token"], "better": "tie", "guess": "neither"}
        told = one.post("/api/vote", json=ballot).json()
        assert told["correct"] == ("ChatGPT" not in (told["left"], told["right"]))
        seen.add(told["correct"])
    assert seen == {True, False}


def test_without_a_model_to_find_nothing_is_asked(rater):
    one = rater(None)
    pair = one.post("/api/next", json={}).json()["pair"]
    assert pair["find"] is None
    refused = one.post(
        "/api/vote", json={"token": pair["token"], "better": "left", "guess": "left"}
    )
    assert refused.status_code == 400
    told = one.post("/api/vote", json={"token": pair["token"], "better": "left"}).json()
    assert told["correct"] is None


def test_what_is_refused(rater, store):
    one, two = rater(), rater()
    token = one.post("/api/next", json={}).json()["pair"]["token"]
    good = {"token": token, "better": "left", "guess": "unsure"}
    assert code(two.post("/api/vote", json=good)) == (403, "not_shown")  # without a cookie
    two.post("/api/next", json={})
    assert code(two.post("/api/vote", json=good)) == (403, "not_shown")  # another's
    assert code(one.post("/api/vote", json={**good, "token": "never-shown"})) == (403, "not_shown")
    assert code(two.post("/api/skip", json={"token": token})) == (403, "not_shown")
    for wrong in (
        {**good, "better": "both"}, {**good, "better": None}, {**good, "better": ["left"]},
        {**good, "guess": "maybe"}, {**good, "guess": {}}, {**good, "token": 5},
        {**good, "token": ""}, {**good, "token": "x" * 101}, {}, {"token": token},
    ):  # fmt: skip
        answer = one.post("/api/vote", json=wrong)
        assert answer.status_code == 400, wrong
    kind = {"content-type": "application/json"}
    assert one.post("/api/vote", content=b"{", headers=kind).status_code == 400
    assert one.post("/api/vote", content=b"[]", headers=kind).status_code == 400
    form = {"content-type": "application/x-www-form-urlencoded"}
    assert one.post("/api/vote", content=b"a=b", headers=form).status_code == 415
    assert one.get("/api/vote").status_code == 405 and one.get("/votes.sqlite").status_code == 404
    assert store.votes() == []
    assert one.post("/api/vote", json=good).status_code == 200


def test_skip(rater, store):
    one = rater()
    first = one.post("/api/next", json={}).json()["pair"]
    assert one.post("/api/next", json={}).json()["pair"] == first
    assert one.post("/api/skip", json={"token": first["token"]}).json() == {"skipped": True}
    assert one.post("/api/next", json={}).json()["pair"]["token"] != first["token"]
    assert store.votes() == []


@pytest.mark.skipif(sys.platform != "linux", reason="forks a server and kills it")
def test_a_kill_loses_no_acknowledged_vote(tmp_path, make_replies):
    """Eight raters vote without pause; the server is killed (-9) among it, and again."""
    path = tmp_path / "votes.sqlite"
    acknowledged: dict[str, tuple[str, str]] = {}

    def rate(port, stop):
        cookie = ""
        try:
            while not stop.is_set():
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
                heads = {"Content-Type": "application/json", "Cookie": cookie}
                connection.request("POST", "/api/next", "{}", heads)
                answer = connection.getresponse()
                cookie = (answer.headers["set-cookie"] or cookie).split(";")[0]
                pair = json.loads(answer.read())["pair"]
                if pair is None:
                    cookie = ""
                    continue
                token, better = pair["token"], ("left", "right", "tie")[len(acknowledged) % 3]
                ballot = json.dumps({"token": token, "better": better})
                heads["Cookie"] = cookie
                connection.request("POST", "/api/vote", ballot, heads)
                answer = connection.getresponse()
                answer.read()
                if answer.status == 200:
                    acknowledged[token] = better
        except (OSError, http.client.HTTPException):
            pass  # the kill

    for _ in range(2):
        listener = listen("127.0.0.1", 0)
        port = listener.getsockname()[1]
        child = os.fork()
        if child == 0:
            try:
                store = Store(path, create=True)
                store.add(make_replies(30))
                make_server(Guard(create_app(store, None))).run(sockets=[listener])
            finally:
                os._exit(1)
        listener.close()
        stop = threading.Event()
        before = len(acknowledged)
        threads = [threading.Thread(target=rate, args=(port, stop)) for _ in range(8)]
        for thread in threads:
            thread.start()
        until = time.monotonic() + 30
        while len(acknowledged) < before + 40 and time.monotonic() < until:
            time.sleep(0.005)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        stop.set()
        for thread in threads:
            thread.join()
        assert len(acknowledged) >= before + 40
    with sqlite3.connect(path) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        rows = db.execute("SELECT token, better FROM votes").fetchall()
    assert len(rows) == len({token for token, _ in rows}), "a vote was counted twice"
    assert acknowledged.items() <= dict(rows).items(), "a vote was lost"
    # What was written and not yet acknowledged when the kill came: one a rater at most.
    assert len(rows) <= len(acknowledged) + 16
