"""A stand-in for a judge: a small local server that speaks OpenAI's chat completions over HTTP.

    python -m qlora_kernels.evaluate.stand_in --port 8399

It reads ``qlora judge``'s prompts and gives verdicts by a stated, silly rule, so that the whole way
from replies to a ladder can be tried without a judge and without money. **Its verdicts mean
nothing.** To anything else it says what it is.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import threading
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

__all__ = ["RULES", "StandIn", "main", "verdict"]

NAME = "stand-in"
MOST = 16 << 20  # bytes of a request


def _distinct(reply: str) -> float:
    return float(len(set(re.findall(r"\w+", reply.lower()))))


def _longer(reply: str) -> float:
    return float(len(reply))


RULES: dict[str, tuple[str, Callable[[str], float]]] = {
    "distinct": ("more different words are better, within a twentieth is a tie", _distinct),
    "longer": ("more characters are better", _longer),
    "first": ("whatever is shown first is better", lambda reply: 0.0),
}


_REPLY = re.compile(r"\[(reply (?:1|2)) (\w+)\]\n(.*?)\n\[end of \1 \2\]", re.DOTALL)


def verdict(prompt: str, rule: str = "distinct") -> str | None:
    """The answer to a prompt of ``qlora judge``; None if it is none."""
    replies = [m[3] for m in _REPLY.finditer(prompt)]
    if len(replies) != 2:
        return None
    what, measure = RULES[rule]
    first, second = map(measure, replies)
    if rule == "first":
        first = second + 1
    margin = 0.05 * max(first, second) if rule == "distinct" else 0.0
    word = "1" if first > second + margin else "2" if second > first + margin else "TIE"
    best = max(first, second, 1.0)
    points = " ".join(f"{round(20 * value / best) / 2:g}" for value in (first, second))
    last = f"SCORES: {points}" if "SCORES:" in prompt else f"VERDICT: {word}"
    return f"A stand-in's rule, which says nothing about the replies: {what}.\n{last}"


class StandIn(ThreadingHTTPServer):
    """The server; ``with StandIn(...) as server`` runs it in a thread.

    Args:
        answer: from the request's body to the message's text.
        port: 0 takes a free one.
    """

    daemon_threads = True

    def __init__(self, answer: Callable[[dict[str, Any]], str], port: int = 0) -> None:
        self.answer = answer
        super().__init__(("127.0.0.1", port), _Handler)

    @property
    def url(self) -> str:
        """The base URL."""
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def __enter__(self) -> StandIn:
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: StandIn

    def do_GET(self) -> None:
        if self.path.rstrip("/").endswith("/models"):
            self.reply(200, {"object": "list", "data": [{"id": NAME, "object": "model"}]})
        else:
            self.reply(404, _error(f"there is no {self.path} here"))

    def do_POST(self) -> None:
        try:
            length = int(self.headers.get("Content-Length", ""))
        except ValueError:
            length = -1
        if not 0 <= length <= MOST:
            self.close_connection = True  # what follows is not read
            self.reply(413, _error(f"a request has a Content-Length of at most {MOST}"))
            return
        data = self.rfile.read(length)
        if not self.path.endswith("/chat/completions"):
            self.reply(404, _error(f"there is no {self.path} here"))
            return
        try:
            body = json.loads(data)
            if not all(isinstance(m["content"], str) for m in body["messages"]):
                raise ValueError("content is no text")
        except (ValueError, KeyError, TypeError) as error:
            self.reply(400, _error(f"not a chat completion's request: {error!r}"))
            return
        self.complete(body)

    def complete(self, body: dict[str, Any]) -> None:
        """Answers a well-formed request."""
        text = self.server.answer(body)
        words = sum(len(m["content"].split()) for m in body["messages"])
        self.reply(200, completion(text, words, str(body.get("model", NAME))))

    def reply(self, status: int, value: dict[str, Any]) -> None:
        """Sends JSON."""
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a thousand lines of it help nobody."""


def completion(text: str, prompt_words: int = 0, model: str = NAME) -> dict[str, Any]:
    """A chat completion's JSON; words stand for tokens in its counts."""
    said = len(text.split())
    usage = {
        "prompt_tokens": prompt_words,
        "completion_tokens": said,
        "total_tokens": prompt_words + said,
    }
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return {
        "id": "stand-in", "object": "chat.completion", "created": 0, "model": model,
        "choices": [choice], "usage": usage,
    }  # fmt: skip


def _error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error"}}


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until it is stopped."""
    parser = argparse.ArgumentParser(
        prog="python -m qlora_kernels.evaluate.stand_in", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--port", type=int, default=8399, help="0 takes a free one [%(default)s]")
    rules = "; ".join(f"{name}: {what}" for name, (what, _) in RULES.items())
    parser.add_argument("--rule", choices=RULES, default="distinct", help=f"{rules} [%(default)s]")
    arguments = parser.parse_args(argv)

    def answer(body: dict[str, Any]) -> str:
        judged = verdict(body["messages"][-1]["content"], arguments.rule)
        return judged or "I am a stand-in, a rule of a few lines. What I say means nothing."

    try:
        server = StandIn(answer, arguments.port)
    except (OSError, OverflowError) as error:
        print(f"port {arguments.port} cannot be had: {error}", file=sys.stderr)
        return 1
    print(
        f"{server.url}  (model {NAME}; {RULES[arguments.rule][0]}; its verdicts mean nothing)",
        flush=True,
    )
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        return 0
    finally:
        server.server_close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
