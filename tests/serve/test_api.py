"""The server over HTTP: by OpenAI's client, by hand, and by what is no HTTP at all."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import socket
import threading
import time
from urllib.parse import urlsplit

import pytest

openai = pytest.importorskip("openai")

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def client(live):
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0, timeout=60) as c:
        yield c


def ask(client, model="tiny", messages=HELLO, max_tokens=12, temperature=0, **settings):
    return client.chat.completions.create(
        model=model, messages=messages, max_tokens=max_tokens, temperature=temperature, **settings
    )


def text_of(answer) -> str:
    return answer.choices[0].message.content


@pytest.fixture(scope="module")
def expected(tiny_model, adapters):
    """The likeliest 12 tokens' text, by model, as `qlora chat` gives it."""
    from qlora_kernels import chat

    texts = {}
    for name in ("tiny", *adapters):
        folder = str(adapters[name]) if name in adapters else None
        talk = chat.Conversation(
            *chat.load(str(tiny_model), folder, dtype="float32"), max_new_tokens=12
        )
        texts[name] = "".join(talk.reply("hello"))
    assert texts["tiny"] != texts["one"] != texts["two.b"]
    return texts


# --- by OpenAI's client -------------------------------------------------------------------------


def test_a_reply_is_the_one_that_qlora_chat_gives(client, expected, idle):
    answer = ask(client)
    assert text_of(answer) == expected["tiny"]
    choice = answer.choices[0]
    assert (choice.finish_reason, choice.message.role, answer.model) == (
        "length",
        "assistant",
        "tiny",
    )
    prompt = len("<im>user\nhello<im>\n<im>assistant\n") - 3 * 3  # <im> is one token
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt, 12)
    assert answer.usage.total_tokens == prompt + 12


def test_a_stream_gives_the_same_in_pieces(client, expected, idle):
    events = list(ask(client, stream=True, stream_options={"include_usage": True}))
    assert events[0].choices[0].delta.role == "assistant"
    pieces = [e.choices[0].delta.content for e in events[1:-2]]
    assert "".join(pieces) == expected["tiny"] and len(pieces) > 3
    assert events[-2].choices[0].finish_reason == "length"
    assert events[-1].choices == [] and events[-1].usage.completion_tokens == 12
    assert len({e.id for e in events}) == 1
    assert all(e.usage is None for e in list(ask(client, stream=True)))


def test_models(client):
    models = {m.id: m.model_dump() for m in client.models.list()}
    assert list(models) == ["tiny", "one", "two.b"]
    assert models["one"]["parent"] == "tiny" and models["tiny"]["parent"] is None
    assert client.models.retrieve("two.b").id == "two.b"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("three")


def test_adapters_are_mixed_in_a_batch(client, live, expected, idle, slow, monkeypatch):
    kinds = []
    real = live.mixer.set_rows
    monkeypatch.setattr(live.mixer, "set_rows", lambda n: (kinds.append(set(n)), real(n))[1])
    names = ["tiny", "one", "two.b", "one"]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(lambda name: text_of(ask(client, name)), names))
    assert replies == [expected[name] for name in names]
    assert max(map(len, kinds)) == 3, "they took turns"
    # And alone again, through the fused op.
    assert text_of(ask(client, "one")) == expected["one"]


def test_a_model_that_is_not_there(client):
    with pytest.raises(openai.NotFoundError, match="there is tiny, one, two.b") as caught:
        ask(client, "gpt-4")
    assert caught.value.code == "model_not_found" and caught.value.param == "model"


def test_a_seed_gives_the_same_reply_whoever_else_asks(client, idle, slow):
    def draw(seed, **more):
        return text_of(ask(client, temperature=1.0, top_p=0.9, seed=seed, **more))

    alone = draw(11)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        together = list(pool.map(draw, [11, 12, 11, 13]))
    assert together[0] == together[2] == alone
    assert len(set(together)) == 3


def test_a_reply_ends_at_a_token_that_ends_replies(client, live, idle, monkeypatch):
    from qlora_kernels.serve.sampling import Sampling

    async def tokens():
        prompt = live.app.tokenizers[""].apply_chat_template(
            HELLO, add_generation_prompt=True, return_dict=True
        )["input_ids"]
        settings = {"sampling": Sampling(1.0, 1.0, 4), "max_tokens": 12}
        parts = live.engine.generate(live.engine.admit(), prompt, **settings)
        return [token async for part in parts for token in part]

    drawn = asyncio.run(tokens())
    monkeypatch.setattr(live.app, "ends", lambda tokenizer: [drawn[7]])
    answer = ask(client, temperature=1.0, seed=4)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == drawn.index(drawn[7]) + 1


def test_stop_sequences(client, live, idle, slow):
    whole = text_of(ask(client, max_tokens=40, temperature=1.0, seed=1))
    stop = whole[15:18]
    before = idle()
    answer = ask(client, max_tokens=40, temperature=1.0, seed=1, stop=[stop, "\0never"])
    assert text_of(answer) == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop" and answer.usage.completion_tokens < 40
    events = ask(client, max_tokens=40, temperature=1.0, seed=1, stop=stop, stream=True)
    streamed = "".join(e.choices[0].delta.content or "" for e in events)
    assert streamed == text_of(answer)
    after = idle()
    assert after["cancelled"] == before["cancelled"] and after["done"] == before["done"] + 2


def test_parts_of_text_and_a_system_message(client, expected, idle):
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    assert text_of(ask(client, messages=[{"role": "user", "content": parts}])) == expected["tiny"]
    with_system = [{"role": "developer", "content": "Be brief."}, *HELLO]
    answer = ask(client, messages=with_system)
    same = ask(client, messages=[{"role": "system", "content": "Be brief."}, *HELLO])
    assert text_of(answer) == text_of(same)
    assert answer.usage.prompt_tokens > ask(client).usage.prompt_tokens


# --- limits -------------------------------------------------------------------------------------


def test_a_client_that_goes_is_cancelled(client, live, idle, slow):
    before = idle()
    stream = ask(client, max_tokens=200, stream=True, temperature=1.0)
    next(iter(stream))
    stream.close()
    after = idle()
    assert after["cancelled"] == before["cancelled"] + 1 and after["done"] == before["done"]
    assert after["generated_tokens"] < before["generated_tokens"] + 200
    scheduler = live.engine._manager.batch_processor.scheduler
    until = time.monotonic() + 10
    while scheduler.has_pending_requests() and time.monotonic() < until:
        time.sleep(0.01)
    assert not scheduler.has_pending_requests(), "it is generated still"


def test_a_client_that_goes_without_streaming(live, idle, slow):
    before = idle()
    impatient = openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0, timeout=0.5)
    with impatient, pytest.raises(openai.APITimeoutError):
        ask(impatient, max_tokens=200, temperature=1.0)
    after = idle()
    assert after["cancelled"] == before["cancelled"] + 1 and after["done"] == before["done"]


def test_a_full_queue_says_when_to_come_again(client, live, idle, slow, monkeypatch):
    monkeypatch.setattr(live.engine, "max_queue", 1)
    monkeypatch.setattr(live.engine, "max_batch", 1)
    streams = [ask(client, max_tokens=200, stream=True, temperature=1.0) for _ in range(2)]
    with pytest.raises(openai.RateLimitError, match="the queue is full") as caught:
        ask(client)
    assert caught.value.code == "queue_full"
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60
    for stream in streams:
        stream.close()
    idle()
    assert text_of(ask(client))


def test_more_requests_than_a_batch_holds_wait_their_turn(client, live, expected, idle):
    seen = []
    stop = threading.Event()

    def look():
        while not stop.is_set():
            seen.append(live.engine.state()["waiting"])
            time.sleep(0.002)

    watcher = threading.Thread(target=look)
    watcher.start()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda _: text_of(ask(client)), range(8)))
    stop.set()
    watcher.join()
    assert replies == [expected["tiny"]] * 8
    assert max(seen) > 0


def test_a_context_that_is_too_small(client, idle):
    for messages, limit in [(HELLO, 250), ([{"role": "user", "content": "x" * 300}], None)]:
        with pytest.raises(openai.BadRequestError, match="the context holds 256") as caught:
            client.chat.completions.create(model="tiny", messages=messages, max_tokens=limit)
        assert caught.value.code == "context_length_exceeded"
    # Without a limit a reply goes on to the end of the context.
    answer = client.chat.completions.create(model="tiny", messages=HELLO, temperature=0)
    assert answer.usage.total_tokens == 256 and answer.choices[0].finish_reason == "length"


# --- by hand ------------------------------------------------------------------------------------


def post(live, body, **headers):
    import httpx2

    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json", **headers}
    return httpx2.post(f"{live.url}/v1/chat/completions", content=data, headers=headers, timeout=60)


GOOD = {"model": "tiny", "messages": HELLO, "max_tokens": 2}


@pytest.mark.parametrize(
    "change, param",
    [
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages.0.content",
        ),
        ({"model": 5}, "model"),
        ({"model": None}, "model"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"seed": 2**64}, "seed"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"n": 2}, "n"),
        ({"n": True}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"frequency_penalty": 1}, "frequency_penalty"),
    ],
)
def test_what_a_request_may_not_say(live, change, param):
    answer = post(live, {**GOOD, **change})
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["type"] == "invalid_request_error"
    assert str(error["param"]).startswith(param) and param.split(".")[-1] in error["message"]


def test_a_name_that_is_nearly_right(live):
    answer = post(live, {**GOOD, "temprature": 1})
    assert answer.status_code == 400 and "did you mean temperature?" in answer.text


def test_what_says_nothing_about_the_reply_is_taken(live, idle):
    more = {
        "user": "me",
        "n": 1,
        "tools": [],
        "logprobs": False,
        "presence_penalty": 0,
        "stop": None,
    }
    assert post(live, {**GOOD, **more}).status_code == 200


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[1]", b'"x"', b"\xff\xfe", b"[" * 15_000, b'{"temperature": NaN}', b"null"],
)
def test_a_body_that_is_no_request(live, body):
    answer = post(live, body)
    assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"


def test_an_oversized_request(live):
    messages = [{"role": "user", "content": "x" * 30_000}]
    answer = post(live, {**GOOD, "messages": messages})
    assert answer.status_code == 413 and answer.json()["error"]["code"] == "request_too_large"


def raw(live, data: bytes) -> bytes:
    with socket.create_connection((urlsplit(live.url).hostname, urlsplit(live.url).port), 20) as s:
        s.settimeout(20)
        try:
            s.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            pass
        answer = b""
        try:
            while part := s.recv(4096):
                answer += part
        except ConnectionResetError:
            pass
        return answer


@pytest.mark.parametrize(
    "data",
    [
        b"HELO there\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 TLS\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json"
        b"\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 200_000,
    ],
)
def test_what_is_no_http_is_refused_and_the_server_lives(live, data):
    answer = raw(live, data)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 400")
    assert raw(live, b"GET /health HTTP/1.0\r\nHost: localhost\r\n\r\n").startswith(b"HTTP/1.1 200")


def test_paths_and_methods(live):
    import httpx2

    for path, status in [("/v1/nothing", 404), ("/chat.py", 404), ("/chat.js/../app.py", 404)]:
        answer = httpx2.get(live.url + path)
        assert answer.status_code == status and "message" in answer.json()["error"]
    assert httpx2.get(f"{live.url}/v1/chat/completions").status_code == 405
    for path, kind in [("/", "html"), ("/chat.css", "css"), ("/chat.js", "javascript")]:
        answer = httpx2.get(live.url + path)
        assert kind in answer.headers["content-type"]
        assert "script-src 'self'" in answer.headers["content-security-policy"]


def test_health(live, idle, monkeypatch):
    import httpx2

    body = httpx2.get(f"{live.url}/health").json()
    assert body["status"] == "ok" and body["requests"]["running"] == 0
    monkeypatch.setattr(type(live.engine), "alive", False)
    assert httpx2.get(f"{live.url}/health").status_code == 503
    answer = post(live, GOOD)
    assert answer.status_code == 503 and answer.json()["error"]["type"] == "server_error"


# --- failures inside ----------------------------------------------------------------------------


def test_a_batch_that_fails_is_told_to_those_in_it_and_stops_the_server(served):
    """In an engine of its own: a model that failed once is not trusted again."""
    from qlora_kernels.serve.engine import Engine, EngineDown
    from qlora_kernels.serve.sampling import Sampling

    engine = Engine(served.model, None, max_batch=2, cache_tokens=512)
    engine.start()
    handle = served.model.register_forward_pre_hook(lambda *a: 1 / 0)

    async def one():
        place = engine.admit()
        async for _ in engine.generate(place, [5, 6], sampling=Sampling(), max_tokens=3):
            pass

    try:
        with pytest.raises(EngineDown, match="division by zero"):
            asyncio.run(asyncio.wait_for(one(), 20))
    finally:
        handle.remove()
    until = time.monotonic() + 10
    while engine.alive and time.monotonic() < until:
        time.sleep(0.01)
    assert not engine.alive and not engine.jobs and engine.failed == 1
    with pytest.raises(EngineDown, match="restart"):
        engine.admit()
    engine.stop()
