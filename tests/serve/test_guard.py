"""What is refused before a route sees it."""

from __future__ import annotations

import asyncio
import json
import socket

import pytest

pytest.importorskip("fastapi")
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from qlora_kernels.finetune.errors import BadInput
from qlora_kernels.serve.guard import Guard, is_local, listen


async def echo(request):
    return JSONResponse(await request.json() if request.method == "POST" else {})


APP = Starlette(routes=[Route("/v1/echo", echo, methods=["GET", "POST"]), Route("/", echo)])


def client(host="localhost", **settings) -> TestClient:
    return TestClient(Guard(APP, **settings), base_url=f"http://{host}")


def test_a_request_goes_through_with_headers_on_its_answer():
    answer = client().post("/v1/echo", json={"a": 1})
    assert answer.json() == {"a": 1}
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.0.0.1:8000", "[::1]:8000"])
def test_local_names_are_answered(host):
    assert client(host).get("/").status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost.x:8000", ""])
def test_a_name_that_is_pointed_here_is_not(host):
    answer = client().get("/", headers={"host": host})
    assert answer.status_code == 421 and answer.json()["error"]["code"] == "wrong_host"
    # With a key a page elsewhere cannot ask anything, and a proxy may call us what it likes.
    assert client(api_key="k").get("/", headers={"host": host}).status_code == 200


def test_the_key():
    keyed = client("example.org", api_key="secret", local=False)
    assert keyed.get("/").status_code == 200  # the page, which asks for the key
    for given in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}):
        answer = keyed.get("/v1/echo", headers=given)
        assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
    assert keyed.get("/v1/echo", headers={"authorization": "Bearer secret"}).status_code == 200


def test_what_a_form_on_another_page_can_send_is_refused():
    for kind in (
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
    ):
        answer = client().post("/v1/echo", content=b"{}", headers={"content-type": kind})
        assert answer.status_code == 415


def test_an_oversized_body_is_refused_by_what_it_says_and_by_what_comes():
    large = json.dumps({"a": "x" * 2000}).encode()
    kind = {"content-type": "application/json"}
    told = client(max_body=1000).post("/v1/echo", content=large, headers=kind)

    def parts():
        for _ in range(20):
            yield b" " * 100

    untold = client(max_body=1000).post("/v1/echo", content=parts(), headers=kind)
    for answer in (told, untold):
        assert answer.status_code == 413 and "1000 bytes" in answer.json()["error"]["message"]
    assert client(max_body=3000).post("/v1/echo", content=large, headers=kind).status_code == 200


def by_hand(guard, messages):
    """The status that a guard answers with to these messages, which are followed by silence."""
    sent = []

    async def receive():
        if messages:
            return messages.pop(0)
        await asyncio.sleep(60)

    async def send(message):
        sent.append(message)

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/echo", "headers": headers}
    asyncio.run(asyncio.wait_for(guard(scope, receive, send), 20))
    return sent[0]["status"]


def test_a_body_that_does_not_arrive():
    part = {"type": "http.request", "body": b"{", "more_body": True}
    assert by_hand(Guard(APP, body_seconds=0.05), [part]) == 408
    assert by_hand(Guard(APP), [part, {"type": "http.disconnect"}]) == 400


def test_addresses():
    assert all(map(is_local, ["localhost", "127.0.0.1", "127.8.8.8", "::1"]))
    assert not any(map(is_local, ["0.0.0.0", "::", "192.168.1.5", "example.org", ""]))


def test_a_port_that_cannot_be_had():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(BadInput, match=rf"127\.0\.0\.1:{port} cannot be used.*--port 0"):
            listen("127.0.0.1", port)
    with pytest.raises(BadInput, match="port is 70000"):
        listen("127.0.0.1", 70000)
    with pytest.raises(BadInput, match="no address"):
        listen("no.such.host.invalid", 0)
