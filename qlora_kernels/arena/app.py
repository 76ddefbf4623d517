"""The routes of ``qlora arena``."""

from __future__ import annotations

import re
import secrets
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from ..serve.app import Failure, add_errors, json_body, page
from ..serve.guard import openai_error
from .store import BETTER, GUESSES, NotShown, Store, VotedOtherwise

__all__ = ["create_app"]

COOKIE = "qlora_rater"


def _fail(status: int, message: str, param: str | None = None, code: str | None = None) -> Failure:
    return Failure(status, openai_error(message, param=param, code=code))


def _rater(request: Request) -> str | None:
    given = request.cookies.get(COOKIE, "")
    return given if re.fullmatch(r"[A-Za-z0-9_-]{22,64}", given) else None


def _text(body: dict[str, Any], name: str, choices: tuple[Any, ...] | None = None) -> Any:
    value = body.get(name)
    if choices is None:
        if not isinstance(value, str) or not 0 < len(value) <= 100:
            raise _fail(400, f"{name} must be text", name)
    elif (value is not None and not isinstance(value, str)) or value not in choices:
        raise _fail(400, f"{name} must be one of {', '.join(map(str, choices))}", name)
    return value


def create_app(store: Store, target: str | None) -> FastAPI:
    """The application.

    Args:
        store: open, with the replies added.
        target: the model whose reply raters are asked to find; None does not ask.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> Any:
        yield
        store.close()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    add_errors(app)

    def state(rater: str) -> dict[str, Any]:
        """What a rater may know: nothing of whose replies these are."""
        showing = store.next(rater, target)
        done, whole = store.progress(rater)
        pair = None
        if showing is not None:
            pair = {
                "token": showing.token,
                "question": showing.question,
                "left": showing.left,
                "right": showing.right,
                "find": showing.asked,
            }
        return {"pair": pair, "votes": done, "pairs": whole}

    @app.post("/api/next")
    async def next_pair(request: Request) -> Response:
        await json_body(request)
        rater = _rater(request)
        new = rater is None
        rater = rater or secrets.token_urlsafe(24)
        answer = JSONResponse(await run_in_threadpool(state, rater))
        if new:
            answer.set_cookie(
                COOKIE, rater, max_age=400 * 86400, httponly=True, samesite="strict", path="/"
            )
        return answer

    @app.post("/api/vote")
    async def vote(request: Request) -> dict[str, Any]:
        body = await json_body(request)
        token = _text(body, "token")
        better = _text(body, "better", BETTER)
        guess = _text(body, "guess", (*GUESSES, None))
        rater = _rater(request)
        if rater is None:
            raise _fail(403, "you were not shown such a pair", code="not_shown")
        try:
            left, right = await run_in_threadpool(store.vote, rater, token, better, guess)
        except NotShown as error:
            raise _fail(403, str(error), "token", "not_shown") from error
        except VotedOtherwise as error:
            raise _fail(409, str(error), "token", "voted_already") from error
        except ValueError as error:
            raise _fail(400, str(error), "guess") from error
        correct = None
        if guess is not None:
            truth = "left" if left == target else "right" if right == target else "neither"
            correct = None if guess == "unsure" else guess == truth
        return {"left": left, "right": right, "correct": correct}

    @app.post("/api/skip")
    async def skip(request: Request) -> dict[str, Any]:
        body = await json_body(request)
        token, rater = _text(body, "token"), _rater(request)
        try:
            if rater is None:
                raise NotShown("you were not shown such a pair")
            await run_in_threadpool(store.skip, rater, token)
        except NotShown as error:
            raise _fail(403, str(error), "token", "not_shown") from error
        return {"skipped": True}

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok"}

    @app.get("/")
    async def index() -> Response:
        return page(__package__, "arena.html")

    @app.get("/arena.{kind}")
    async def part(kind: str) -> Response:
        if kind not in ("css", "js", "svg"):
            raise HTTPException(404, "there is no such page")
        return page(__package__, f"arena.{kind}")

    return app
