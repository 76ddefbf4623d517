"""The routes of ``qlora serve``."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from .adapters import BASE
from .engine import Busy, Engine, EngineDown
from .guard import openai_error
from .protocol import ChatRequest, Reply, request_error, strip_known, usage
from .sampling import Sampling
from .text import Detokenizer, StopAt

__all__ = ["create_app", "page"]

DEFAULT_TOKENS = 1024
"""Longest reply where the request does not say."""

_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}


def page(package: str, name: str) -> Response:
    """A file of a package's ``pages``."""
    data = resources.files(f"{package}.pages").joinpath(name).read_bytes()
    return Response(data, media_type=f"{_TYPES[name.rpartition('.')[2]]}; charset=utf-8")


class Failure(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, body: dict[str, Any], headers: Mapping[str, str] = {}) -> None:
        super().__init__(body["error"]["message"])
        self.status, self.body, self.headers = status, body, dict(headers)

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


def add_errors(app: FastAPI) -> None:
    """Every error of an application in OpenAI's shape, defects included."""

    @app.exception_handler(Failure)
    async def failure(request: Request, error: Failure) -> Response:
        return error.response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        words = f"{request.method} {request.url.path[:100]}: {error.detail}"
        return JSONResponse(openai_error(words), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def defect(request: Request, error: Exception) -> Response:
        return JSONResponse(
            openai_error("the server failed; its log says why", "server_error"), 500
        )


async def json_body(request: Request) -> dict[str, Any]:
    """The body of a request, an object.

    Raises:
        Failure: it is no JSON, or something else than an object.
    """
    try:
        body = json.loads(await request.body())
    except (ValueError, RecursionError) as error:
        words = "nested too deep" if isinstance(error, RecursionError) else str(error)
        raise Failure(400, openai_error(f"the body is no JSON: {words}")) from error
    if not isinstance(body, dict):
        raise Failure(400, openai_error("the body must be a JSON object"))
    return body


class Chat:
    """One request, checked and turned into tokens; then its reply."""

    def __init__(self, server: Server, asked: ChatRequest) -> None:
        self.engine = server.engine
        self.asked = asked
        self.adapter = server.adapter_of(asked.model)
        self.tokenizer = server.tokenizers["" if self.adapter == BASE else asked.model]
        self.prompt = self._prompt()
        room = self.engine.context - len(self.prompt)
        limit = asked.limit if asked.limit is not None else min(DEFAULT_TOKENS, max(room, 1))
        if limit > room:
            raise Failure(
                400,
                openai_error(
                    f"the context holds {self.engine.context} tokens; the messages take "
                    f"{len(self.prompt)}, the reply was to have {limit}",
                    param="messages",
                    code="context_length_exceeded",
                ),
            )
        self.limit = limit
        self.sampling = Sampling(
            1.0 if asked.temperature is None else asked.temperature,
            1.0 if asked.top_p is None else asked.top_p,
            asked.seed,
        )
        self.ends = server.ends(self.tokenizer)
        self.made = 0
        self.finish = "length"

    def _prompt(self) -> list[int]:
        messages = [m.plain() for m in self.asked.messages]
        if not self.tokenizer.chat_template:  # a base model goes on with a text
            text = "\n".join(m["content"] for m in messages)
            return self.tokenizer(text)["input_ids"] or [self.tokenizer.bos_token_id or 0]
        try:
            return self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=True
            )["input_ids"]
        except Exception as error:  # a template refuses roles in an order that it does not know
            words = f"the model's chat template refuses these messages: {error}"
            raise Failure(400, openai_error(words, param="messages")) from error

    async def pieces(self, place: str) -> AsyncGenerator[str]:
        """The reply's text as it comes."""
        words, stop = Detokenizer(self.tokenizer), StopAt(self.asked.stops)
        tokens = self.engine.generate(
            place,
            self.prompt,
            adapter=self.adapter,
            sampling=self.sampling,
            max_tokens=self.limit,
            ends=self.ends,
        )
        async with aclosing(tokens):
            async for new in tokens:
                self.made += len(new)
                if new[-1] in self.ends:
                    self.finish = "stop"
                piece = stop.push(words.push(new))
                if stop.hit:
                    self.finish = "stop"
                    self.engine.complete(place)
                if piece:
                    yield piece
                if stop.hit:
                    return
        last = stop.push(words.push([], final=True), final=True)
        if stop.hit:
            self.finish = "stop"
        if last:
            yield last

    @property
    def counts(self) -> dict[str, int]:
        return usage(len(self.prompt), self.made)


class Server:
    """What the routes share.

    Args:
        engine: started with the application and stopped with it.
        name: the base's, as clients ask for it.
        adapters: PEFT's name of each adapter, by the clients'.
        tokenizers: by the clients' names; the base's by "".
    """

    def __init__(
        self,
        engine: Engine,
        name: str,
        adapters: Mapping[str, str],
        tokenizers: Mapping[str, Any],
    ) -> None:
        self.engine, self.name = engine, name
        self.adapters, self.tokenizers = dict(adapters), tokenizers
        self.begun = time.time()

    def adapter_of(self, model: str) -> str:
        """PEFT's name of what a client asked for.

        Raises:
            Failure: 404, there is no such model.
        """
        if model == self.name:
            return BASE
        if model in self.adapters:
            return self.adapters[model]
        names = ", ".join([self.name, *self.adapters])
        words = f"the model {model[:100]!r} does not exist; there is {names}"
        raise Failure(404, openai_error(words, param="model", code="model_not_found"))

    def ends(self, tokenizer: Any) -> list[int]:
        """Every token that ends a reply."""
        from ..chat import _ends

        return _ends(self.engine.model, tokenizer.eos_token_id) or []

    def models(self) -> list[dict[str, Any]]:
        """The base first, then its adapters."""
        return [
            {
                "id": name,
                "object": "model",
                "created": int(self.begun),
                "owned_by": "qlora-kernels",
                "root": self.name,
                "parent": None if name == self.name else self.name,
            }
            for name in (self.name, *self.adapters)
        ]


def create_app(server: Server) -> FastAPI:
    """The application; it starts the engine, and stops it at its end."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if not server.engine.alive:
            await asyncio.to_thread(server.engine.start)
        yield
        await asyncio.to_thread(server.engine.stop)

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    add_errors(app)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        body, error = strip_known(await json_body(request))
        if error is not None:
            raise Failure(400, error)
        try:
            asked = ChatRequest.model_validate(body)
        except ValidationError as wrong:
            raise Failure(400, request_error(wrong.errors(include_url=False))) from wrong
        place = _place(server.engine)
        try:
            # A long conversation takes its time to become tokens.
            talk = await asyncio.to_thread(Chat, server, asked)
        except BaseException:
            server.engine.leave(place)
            raise
        reply = Reply(asked.model)
        if asked.stream:
            return StreamingResponse(_events(talk, reply, place), media_type="text/event-stream")
        return await _whole(request, talk, reply, place)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": server.models()}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        server.adapter_of(name)
        return next(m for m in server.models() if m["id"] == name)

    @app.get("/health")
    async def health() -> Response:
        alive = server.engine.alive
        body = {
            "status": "ok" if alive else "down",
            "uptime_seconds": round(time.time() - server.begun, 1),
            "requests": server.engine.state(),
        }
        return JSONResponse(body, 200 if alive else 503)

    @app.get("/")
    async def index() -> Response:
        return page(__package__, "chat.html")

    @app.get("/chat.{kind}")
    async def part(kind: str) -> Response:
        if kind not in ("css", "js", "svg"):
            raise HTTPException(404, "there is no such page")
        return page(__package__, f"chat.{kind}")

    return app


def _place(engine: Engine) -> str:
    try:
        return engine.admit()
    except Busy as busy:
        error = openai_error(str(busy), "rate_limit_error", code="queue_full")
        raise Failure(429, error, {"Retry-After": str(busy.retry_after)}) from busy
    except EngineDown as down:
        raise Failure(503, openai_error(str(down), "server_error")) from down


async def _events(talk: Chat, reply: Reply, place: str) -> AsyncIterator[str]:
    """Server-sent events. Closed early (the client has gone), it cancels the request."""

    def event(body: dict[str, Any]) -> str:
        return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"

    pieces = talk.pieces(place)
    try:
        async with aclosing(pieces):
            yield event(reply.chunk({"role": "assistant", "content": ""}))
            async for piece in pieces:
                yield event(reply.chunk({"content": piece}))
        yield event(reply.chunk({}, talk.finish))
        options = talk.asked.stream_options
        if options is not None and options.include_usage:
            yield event(reply.last(talk.counts))
    except EngineDown as down:
        yield event(openai_error(str(down), "server_error"))
    finally:
        talk.engine.leave(place)
    yield "data: [DONE]\n\n"


async def _whole(request: Request, talk: Chat, reply: Reply, place: str) -> Response:
    """The whole reply; given up when the client goes."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    async def collect() -> str:
        pieces = talk.pieces(place)
        async with aclosing(pieces):
            return "".join([piece async for piece in pieces])

    work, leaving = asyncio.create_task(collect()), asyncio.create_task(gone())
    try:
        await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            return Response(status_code=499)  # nobody reads it
        return JSONResponse(reply.whole(work.result(), talk.finish, talk.counts))
    except EngineDown as down:
        raise Failure(500, openai_error(str(down), "server_error")) from down
    finally:
        for task in (work, leaving):
            task.cancel()
        await asyncio.gather(work, leaving, return_exceptions=True)
        talk.engine.leave(place)
