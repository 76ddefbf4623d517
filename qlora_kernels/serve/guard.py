"""What every request passes before a route sees it: host, key, size, time; and the page's headers.

A server on the local address is still reachable from any web page that the user has open: by a form
or a script that posts to it, or by a name that is pointed at 127.0.0.1 while the page is open (DNS
rebinding). The first is stopped by taking JSON only, which a browser does not send elsewhere
without asking; the second by the Host header.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
from collections.abc import Iterable
from typing import Any

from ..finetune.errors import BadInput

__all__ = ["Guard", "is_local", "listen", "make_server", "openai_error"]

BODY_SECONDS = 30.0
"""How long the body of a request may take to arrive."""

_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}


def openai_error(
    message: str, kind: str = "invalid_request_error", param: str | None = None, code: Any = None
) -> dict[str, Any]:
    """The body of an error, in OpenAI's shape."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def is_local(host: str) -> bool:
    """Whether an address to bind to is reachable from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Guard:
    """ASGI middleware around an application.

    Args:
        app: the application.
        api_key: what ``Authorization: Bearer`` must hold on ``protected`` paths; None asks nothing.
        local: bound to a local address: without a key, the Host header must be a local name.
        max_body: bytes of a body; more is answered with 413.
        protected: prefixes of paths that need the key.
        body_seconds: how long a body may take.
    """

    def __init__(
        self,
        app: Any,
        *,
        api_key: str | None = None,
        local: bool = True,
        max_body: int = 1 << 20,
        protected: Iterable[str] = ("/v1/",),
        body_seconds: float = BODY_SECONDS,
    ) -> None:
        self.app, self.api_key, self.local = app, api_key, local
        self.max_body, self.protected, self.body_seconds = max_body, tuple(protected), body_seconds

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {k.lower(): v for k, v in scope["headers"]}

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                have = {k.lower() for k, _ in message["headers"]}
                message["headers"] = list(message["headers"]) + [
                    (k.encode(), v.encode()) for k, v in _HEADERS.items() if k.encode() not in have
                ]
            await send(message)

        refusal = self._refuse(scope, headers)
        body = b""
        if refusal is None and scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            body, refusal = await self._body(headers, receive)
        if refusal is not None:
            await _answer(send_with_headers, *refusal)
            return
        given = False

        async def receive_again() -> Any:
            nonlocal given
            if not given:
                given = True
                return {"type": "http.request", "body": body, "more_body": False}
            return await receive()  # that the client has gone

        await self.app(scope, receive_again, send_with_headers)

    def _refuse(self, scope: Any, headers: dict[bytes, bytes]) -> tuple[int, dict[str, Any]] | None:
        if self.local and self.api_key is None:
            host = headers.get(b"host", b"").decode("latin-1")
            name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
            if not is_local(name.strip("[]").lower()):
                return 421, openai_error(
                    f"this server answers to localhost, not to {host[:100]!r}", code="wrong_host"
                )
        if self.api_key is not None and scope["path"].startswith(self.protected):
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, b"Bearer " + self.api_key.encode()):
                what = "is not the server's" if given else "is missing"
                return 401, openai_error(
                    f"the API key {what}: send Authorization: Bearer KEY",
                    "authentication_error",
                    code="invalid_api_key",
                )
        return None

    async def _body(
        self, headers: dict[bytes, bytes], receive: Any
    ) -> tuple[bytes, tuple[int, dict[str, Any]] | None]:
        too_large = (
            413,
            openai_error(
                f"the request's body is over {self.max_body} bytes", code="request_too_large"
            ),
        )
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.max_body:
            return b"", too_large
        kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        if kind != b"application/json":
            return b"", (
                415,
                openai_error("send Content-Type: application/json", code="unsupported_media_type"),
            )
        parts: list[bytes] = []
        size = 0
        until = asyncio.get_running_loop().time() + self.body_seconds
        while True:
            left = until - asyncio.get_running_loop().time()
            try:
                message = await asyncio.wait_for(receive(), left)
            except asyncio.TimeoutError:
                words = f"the body did not arrive within {self.body_seconds:g} s"
                return b"", (408, openai_error(words, code="request_timeout"))
            if message["type"] == "http.disconnect":
                return b"", (400, openai_error("the body ended early"))
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self.max_body:
                return b"", too_large
            if not message.get("more_body", False):
                return b"".join(parts), None


async def _answer(send: Any, status: int, body: dict[str, Any]) -> None:
    data = json.dumps(body).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(data)).encode()),
        # What is left of a body that was refused is not read.
        (b"connection", b"close"),
    ]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": data})


def listen(host: str, port: int) -> Any:
    """A socket that listens on ``host``:``port`` (0: any free one).

    Raises:
        BadInput: the port is taken or not allowed, or the address is not this machine's.
    """
    import socket

    if not 0 <= port <= 65535:
        raise BadInput(f"port is {port}; it must be from 0 (any free one) to 65535")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, proto, _, address = found[0]
        listener = socket.socket(family, kind, proto)
    except OSError as error:
        raise BadInput(f"host {host} is no address: {error.strerror or error}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise BadInput(
            f"{host}:{port} cannot be used: {error.strerror or error}; give another --port, or "
            "--port 0 for any free one"
        ) from error
    return listener


def make_server(app: Any) -> Any:
    """uvicorn for an ASGI application; ``run(sockets=[...])`` lasts until SIGINT, SIGTERM, or until
    its ``should_exit`` is set."""
    import uvicorn

    config = uvicorn.Config(
        app,
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=3,
        ws="none",
        h11_max_incomplete_event_size=64 << 10,
    )
    return uvicorn.Server(config)
