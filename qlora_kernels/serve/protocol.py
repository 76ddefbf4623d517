"""OpenAI's chat completions: what a request may say, and the shapes of what comes back."""

from __future__ import annotations

import difflib
import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from .guard import openai_error

__all__ = ["ChatRequest", "Reply", "request_error", "usage"]

# What other servers have and this one has not; a value that asks for nothing is taken.
_WITHOUT: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "frequency_penalty": (None, 0, 0.0),
    "function_call": (None, "none"),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "logprobs": (None, False),
    "modalities": (None, ["text"]),
    "n": (None, 1),
    "prediction": (None,),
    "presence_penalty": (None, 0, 0.0),
    "reasoning_effort": (None, "none"),
    "response_format": (None, {"type": "text"}),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "top_logprobs": (None, 0),
    "verbosity": (None,),
    "web_search_options": (None,),
}
# What says nothing about the reply.
_IGNORED = (
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        text = self.content
        if not isinstance(text, str):
            text = "".join(part.text for part in text)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(_Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


Stop = Annotated[str, Field(min_length=1, max_length=200)]


class ChatRequest(_Strict):
    """The body of ``POST /v1/chat/completions``."""

    model: str
    messages: list[Message] = Field(min_length=1, max_length=2000)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: Stop | list[Stop] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @field_validator("stop")
    @classmethod
    def _few(cls, stop: Any) -> Any:
        if isinstance(stop, list) and len(stop) > 4:
            raise ValueError(f"{len(stop)} stop sequences; at most 4")
        return stop

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def limit(self) -> int | None:
        """Most tokens of the reply, where the request says so."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


def strip_known(body: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The body without what asks for nothing, and an error for what this server has not."""
    rest = {}
    for key, value in body.items():
        if key in _IGNORED:
            continue
        if key in _WITHOUT:
            if not any(type(value) is type(v) and value == v for v in _WITHOUT[key]):
                what = f"{key} is not supported by this server; leave it out"
                return {}, openai_error(what, param=key, code="unsupported_parameter")
            continue
        if key not in ChatRequest.model_fields:
            near = difflib.get_close_matches(key, ChatRequest.model_fields, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            what = f"there is no parameter {key[:60]!r}{hint}"
            return {}, openai_error(what, param=key[:60], code="unknown_parameter")
        rest[key] = value
    return rest, None


def request_error(errors: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """pydantic's first error in OpenAI's shape."""
    first = errors[0]
    # Of a union, the part of the place that names the alternative says nothing to the client.
    where = [str(p) for p in first["loc"] if not str(p).startswith(("list[", "constrained", "str"))]
    param = ".".join(where) or None
    words = str(first["msg"]).removeprefix("Value error, ")
    return openai_error(f"{param}: {words}" if param else words, param=param, code=None)


class Reply:
    """The answer to one request, in its two shapes."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self.created = int(time.time())

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def whole(self, text: str, finish: str, counts: dict[str, int]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
        return {**self._head("chat.completion"), "choices": [choice], "usage": counts}

    def chunk(self, delta: dict[str, str], finish: str | None = None) -> dict[str, Any]:
        """An event of a stream."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def last(self, counts: dict[str, int]) -> dict[str, Any]:
        """The event with the counts, after the last of the text."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": counts}


def usage(prompt: int, completion: int) -> dict[str, int]:
    """Tokens read and made."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }
