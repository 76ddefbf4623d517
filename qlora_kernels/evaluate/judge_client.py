"""Calls an OpenAI-compatible endpoint, many at once, patiently, and none twice.

The official client sends the requests; the patience is here, where all threads share it: one that
is told to wait makes all wait. What is tried again: 408, 409, 425, 429, every 5xx, a connection
that fails or says nothing, a body that is no chat completion (half of one, HTML, other JSON). What
ends the run at once: a key or model that is refused (401, 403, 404), a quota that is used up.
Anything else ends one call.
"""

from __future__ import annotations

import contextlib
import email.utils
import ipaddress
import json
import os
import random
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, ClassVar
from urllib.parse import urlsplit

from ..finetune.errors import BadInput, Interrupted, RunError
from .judge_cache import Cache, request_key

__all__ = ["Answer", "CallFailed", "Endpoint", "Stopped", "is_local", "run_calls"]

_AGAIN = {408, 409, 425, 429}
_ENDS_THE_RUN = {401, 403, 404}
_LONGEST_WAIT = 60.0  # of a backoff; Retry-After may ask for more
_LONGEST_ASKED = 3600.0  # a Retry-After beyond it ends the run
_IN_A_ROW = 5  # calls that fail for good, one after another, before a run gives up


class CallFailed(RuntimeError):
    """One call has no answer; the others may."""


class Stopped(RunError):
    """No further call has a chance, and what there is has been kept."""


@dataclass(frozen=True)
class Answer:
    """What came back.

    Attributes:
        text: the message, possibly empty.
        finish: why it ended, "stop", "length", ... or "" if it was not said.
        prompt_tokens, completion_tokens: what the endpoint counted, None if it did not say.
        cached: whether it was on the disk already.
    """

    text: str
    finish: str
    prompt_tokens: int | None
    completion_tokens: int | None
    cached: bool


def is_local(base_url: str) -> bool:
    """Whether an endpoint is on this machine."""
    host = urlsplit(base_url).hostname or ""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_endpoint(base_url: str, key_env: str) -> str:
    """The API key for an endpoint; a local one needs none.

    Raises:
        BadInput: no URL of HTTP, or the environment holds no key.
    """
    parts = urlsplit(base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise BadInput(f"{base_url!r} is no endpoint; expected a URL as http://127.0.0.1:8000/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise BadInput("an endpoint's URL is kept in files: no user, password, query or fragment")
    key = os.environ.get(key_env, "").strip()
    if not key and not is_local(base_url):
        raise BadInput(f"{base_url} needs an API key: put it into the environment as {key_env}")
    return key or "none"


@dataclass
class Endpoint:
    """An endpoint and how it is to be treated.

    Attributes:
        base_url: as ``http://127.0.0.1:8000/v1``.
        key_env: the environment's variable with the API key.
        timeout: seconds without a byte before a try is given up.
        retries: further tries after the first; being rate-limited (429) counts as a quarter.
        per_minute: most requests a minute, None for no limit of ours.
        cache: where answers are kept; None keeps none.
        backoff: seconds before the second try; doubled each time, plus up to as much by chance.
        stop: set to end all waiting.
        tries: requests sent, counted.
        waits: seconds that Retry-After asked for, one entry each.
    """

    base_url: str
    key_env: str = "OPENAI_API_KEY"
    timeout: float = 60.0
    retries: int = 5
    per_minute: float | None = None
    cache: Cache | None = None
    backoff: ClassVar[float] = 1.0
    stop: threading.Event = field(default_factory=threading.Event)
    tries: int = 0
    waits: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        import openai

        key = check_endpoint(self.base_url, self.key_env)
        self._lock = threading.Lock()
        self._not_before = 0.0  # all threads, after a Retry-After
        self._sent: deque[float] = deque()
        # A proxy of the environment cannot reach this machine's own server. Without TLS there are
        # no certificates to load (a fifth of a second), and no way from there to a TLS server.
        tls = self.base_url.startswith("https:")
        http = openai.DefaultHttpxClient(
            trust_env=not is_local(self.base_url), verify=tls, follow_redirects=tls
        )
        self._client = openai.OpenAI(
            base_url=self.base_url,
            api_key=key,
            max_retries=0,
            timeout=self.timeout,
            http_client=http,
        )

    def close(self) -> None:
        """Closes connections."""
        self._client.close()

    def cached(self, body: dict[str, Any]) -> Answer | None:
        """The answer that is on the disk."""
        if self.cache is None:
            return None
        response = self.cache.get(request_key(self.base_url, body))
        return None if response is None else _answer(response, cached=True)

    def complete(self, body: dict[str, Any]) -> Answer:
        """The answer to a chat completion's request body, from the cache or the endpoint; kept
        before it is returned.

        Raises:
            CallFailed: no answer after all tries, or the request itself is refused.
            Stopped: the run cannot go on, or ``stop`` was set.
        """
        known = self.cached(body)
        if known is not None:
            return known
        left, failures = self.retries + 1.0, 0
        while True:
            self._take_turn()
            try:
                response = self._send(body)
                break
            except _TryAgain as error:
                left -= 0.25 if error.limited else 1.0
                if left <= 0:
                    raise CallFailed(f"no answer, for the last time: {error}") from None
                if error.wait is not None:
                    self._hold(error.wait)
                    continue
                pause = min(self.backoff * 2**failures, _LONGEST_WAIT)
                failures += 1
                self._sleep(time.monotonic() + pause * (1 + random.random()))
        if self.cache is not None:
            self.cache.put(request_key(self.base_url, body), body, response)
        return _answer(response, cached=False)

    def _take_turn(self) -> None:
        """Waits until this thread may send."""
        while True:
            with self._lock:
                now = time.monotonic()
                while self._sent and self._sent[0] <= now - 60:
                    self._sent.popleft()
                until = self._not_before
                if self.per_minute is not None and len(self._sent) >= max(1, self.per_minute):
                    until = max(until, self._sent[0] + 60)
                if until <= now and not self.stop.is_set():
                    self._sent.append(now)
                    self.tries += 1
                    return
            self._sleep(until)

    def _hold(self, seconds: float) -> None:
        if seconds > _LONGEST_ASKED:
            raise Stopped(f"the endpoint asks to wait {seconds:.0f} s; run again then")
        with self._lock:
            self.waits.append(seconds)
            self._not_before = max(self._not_before, time.monotonic() + seconds)

    def _sleep(self, until: float) -> None:
        if self.stop.wait(max(0.0, until - time.monotonic())):
            raise Stopped("stopped")

    def _send(self, body: dict[str, Any]) -> dict[str, Any]:
        """The response's JSON. Raises _TryAgain, CallFailed, Stopped."""
        import openai

        # What the official client does not name as an argument goes along all the same.
        try:
            raw = self._client.chat.completions.with_raw_response.create(
                model=body["model"],
                messages=body["messages"],
                extra_body={k: v for k, v in body.items() if k not in ("model", "messages")},
            )
            content = raw.http_response.content
        except openai.APITimeoutError:
            raise _TryAgain(f"nothing came for {self.timeout:g} s") from None
        except openai.APIConnectionError as error:
            raise _TryAgain(f"the connection failed ({error.__cause__ or error})") from None
        except openai.APIStatusError as error:
            raise self._status(error) from None
        except Exception as error:  # a body that broke off, a header that is none: the transport's
            if not type(error).__module__.startswith(("httpx", "httpcore", "h11", "openai")):
                raise
            raise _TryAgain(f"the answer broke off ({error})") from None
        try:
            response = json.loads(content)
            _answer(response, cached=False)
        except (ValueError, KeyError, TypeError, IndexError):
            start = content[:60].decode("utf-8", "replace").strip()
            raise _TryAgain(f"the answer is no chat completion, it begins {start!r}") from None
        return response

    def _status(self, error: Any) -> Exception:
        code, words = error.status_code, _error_words(error)
        if code == 429 and "insufficient_quota" in words:
            return Stopped(f"the endpoint says that the quota is used up: {words}")
        if code in _AGAIN or code >= 500:
            wait = _retry_after(error.response.headers)
            return _TryAgain(f"HTTP {code}: {words}", wait, limited=code == 429)
        if code in _ENDS_THE_RUN:
            hint = f" (the key is taken from {self.key_env})" if code != 404 else ""
            return Stopped(f"the endpoint refuses with HTTP {code}{hint}: {words}")
        return CallFailed(f"HTTP {code}: {words}")


class _TryAgain(Exception):
    """``wait``: seconds that the endpoint asks for; ``limited``: it was a rate limit."""

    def __init__(self, message: str, wait: float | None = None, limited: bool = False) -> None:
        super().__init__(message)
        self.wait, self.limited = wait, limited


def _error_words(error: Any) -> str:
    text = " ".join(error.response.text.split())
    return text if len(text) <= 200 else text[:197] + "..."


def _retry_after(headers: Any) -> float | None:
    """Seconds that a response asks to wait: a number, or a date."""
    value = headers.get("retry-after-ms")
    with contextlib.suppress(TypeError, ValueError):
        return max(0.0, float(value) / 1000)
    value = headers.get("retry-after")
    with contextlib.suppress(TypeError, ValueError):
        return max(0.0, float(value))
    with contextlib.suppress(TypeError, ValueError):
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    return None


def _answer(response: dict[str, Any], cached: bool) -> Answer:
    """Raises KeyError, TypeError or IndexError where it is no chat completion."""
    choice = response["choices"][0]
    text = choice["message"].get("content")
    if text is None:  # a refusal, or a reply that is all tool calls
        text = ""
    if not isinstance(text, str):
        raise TypeError("content is no text")
    usage = response.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    count = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    # A lone half of a surrogate pair is legal in JSON, and no text.
    text = text.encode("utf-8", "replace").decode()
    counts = [c if isinstance(c, int) else None for c in count]
    return Answer(text, str(choice.get("finish_reason") or ""), counts[0], counts[1], cached)


def run_calls(
    endpoint: Endpoint,
    bodies: Sequence[dict[str, Any]],
    concurrency: int,
    done: Callable[[int, Answer | CallFailed], None],
) -> None:
    """All of ``bodies``, ``concurrency`` at a time; ``done(index, what came)`` in this thread, in
    the order in which they end.

    Ctrl-C and SIGTERM send nothing more and wait for what is under way, since it is paid for.

    Raises:
        Stopped: the run cannot go on (see the module), or several calls in a row have failed.
        Interrupted: by a signal.
    """
    failures = 0
    stopped: Stopped | None = None
    with _signals(endpoint.stop) as caught, ThreadPoolExecutor(concurrency) as pool:
        waiting = iter(range(len(bodies)))
        running: dict[Future[Answer], int] = {}
        while True:
            while len(running) < concurrency and not endpoint.stop.is_set():
                index = next(waiting, None)
                if index is None:
                    break
                running[pool.submit(endpoint.complete, bodies[index])] = index
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                index = running.pop(future)
                try:
                    answer: Answer | CallFailed = future.result()
                    failures = 0
                except CallFailed as error:
                    answer = error
                    failures += 1
                    if failures == _IN_A_ROW and len(bodies) > _IN_A_ROW and stopped is None:
                        stopped = Stopped(f"{failures} calls in a row failed; the last: {error}")
                        endpoint.stop.set()
                except Stopped as error:
                    stopped = stopped or error
                    endpoint.stop.set()
                    continue
                done(index, answer)
    if caught:
        raise Interrupted("stopped; what was answered is kept, run again to go on", caught[0])
    if stopped is not None:
        raise stopped


@contextlib.contextmanager
def _signals(stop: threading.Event) -> Iterator[list[int]]:
    """SIGINT and SIGTERM set ``stop`` once, then act as before. In other threads, nothing."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def handle(number: int, frame: Any) -> None:
        caught.append(number)
        stop.set()
        for n, old in before.items():
            signal.signal(n, old)

    before = {n: signal.signal(n, handle) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for n, old in before.items():
            signal.signal(n, old)
