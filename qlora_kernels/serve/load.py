"""Measures a server: total tokens a second with so many clients at once.

    python -m qlora_kernels.serve.load --url http://127.0.0.1:8000 --clients 1,8 --max_tokens 128

Each client asks its questions one after the other and reads the streamed reply. The total is of all
tokens over the time from the first question to the last reply's end. Any OpenAI-compatible server
will do that counts tokens in its last event.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import statistics
import sys
import threading
import time
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit

__all__ = ["Measured", "ask", "measure"]

QUESTIONS = (
    "Tell a long story about a lighthouse keeper.",
    "Explain in detail how bread is made.",
    "Describe a day in the life of a bee.",
    "Write about the history of the bicycle.",
    "Explain how a car's engine works, step by step.",
    "Describe the water cycle in detail.",
    "Write a long letter to a friend about a journey by train.",
    "Explain how to plan a garden.",
)


@dataclass
class Measured:
    """One number of clients.

    Attributes:
        clients: at once.
        tokens: made for all of them.
        seconds: from the first question to the end of the last reply.
        tokens_per_second: their ratio.
        first_seconds: the median time to a reply's first text.
    """

    clients: int
    tokens: int
    seconds: float
    tokens_per_second: float
    first_seconds: float


def ask(url: str, body: dict[str, Any], key: str | None = None) -> tuple[int, float]:
    """Streams one reply; its tokens, and the seconds until its first text.

    Raises:
        RuntimeError: the server answered with an error.
    """
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "localhost", parts.port, timeout=600)
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    begun = time.perf_counter()
    first, tokens = 0.0, 0
    try:
        path = f"{parts.path.rstrip('/')}/v1/chat/completions"
        connection.request("POST", path, json.dumps(body), headers)
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"{response.status}: {response.read(1000).decode()}")
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(event["error"]["message"])
            if not first and any(c["delta"].get("content") for c in event["choices"]):
                first = time.perf_counter() - begun
            if event.get("usage"):
                tokens = event["usage"]["completion_tokens"]
    finally:
        connection.close()
    return tokens, first


def measure(
    url: str,
    model: str,
    clients: int,
    *,
    questions: int = 2,
    max_tokens: int = 128,
    key: str | None = None,
) -> Measured:
    """Asks ``questions`` of each of ``clients`` at once."""
    tokens: list[int] = []
    firsts: list[float] = []
    failures: list[BaseException] = []

    def client(number: int) -> None:
        try:
            for turn in range(questions):
                text = QUESTIONS[(number + turn * clients) % len(QUESTIONS)]
                body = {
                    "model": model,
                    "messages": [{"role": "user", "content": text}],
                    "max_tokens": max_tokens,
                    "temperature": 0.7,
                    "seed": number,
                }
                count, first = ask(url, body, key)
                tokens.append(count)
                firsts.append(first)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=client, args=(i,)) for i in range(clients)]
    begun = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - begun
    if failures:
        raise failures[0]
    total = sum(tokens)
    return Measured(clients, total, seconds, total / seconds, statistics.median(firsts))


def _model(url: str, key: str | None) -> str:
    from urllib.request import Request, urlopen

    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with urlopen(Request(f"{url.rstrip('/')}/v1/models", headers=headers), timeout=30) as answer:
        return json.load(answer)["data"][0]["id"]


def main(argv: list[str] | None = None) -> int:
    """The command line; prints a table, and JSON with ``--output``."""
    parser = argparse.ArgumentParser(prog="python -m qlora_kernels.serve.load")
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:8000")
    add("--model", help="[the first that the server lists]")
    add("--clients", default="1,8", help="numbers of clients, one after the other [%(default)s]")
    add("--questions", type=int, default=2, help="of each client [%(default)s]")
    add("--max_tokens", type=int, default=128)
    add("--output", help="a file for the numbers, JSON")
    given = parser.parse_args(argv)
    key = os.environ.get("QLORA_API_KEY")
    model = given.model or _model(given.url, key)
    settings = {"questions": given.questions, "max_tokens": given.max_tokens, "key": key}
    measure(given.url, model, 1, **{**settings, "questions": 1, "max_tokens": 8})  # warms up
    rows = []
    print("clients  tokens  seconds  tokens/s first text  ratio")
    for number in map(int, given.clients.split(",")):
        row = measure(given.url, model, number, **settings)
        rows.append(row)
        ratio = row.tokens_per_second / rows[0].tokens_per_second
        print(
            f"{row.clients:7d} {row.tokens:7d} {row.seconds:8.1f} {row.tokens_per_second:9.1f} "
            f"{row.first_seconds:9.2f}s {ratio:6.2f}"
        )
    if given.output:
        with open(given.output, "w") as file:
            json.dump(
                {"schema": 1, "model": model, "rows": [asdict(r) for r in rows]}, file, indent=1
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
