"""Who answers a probe: a model of ours, an OpenAI-compatible endpoint, or a script."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ...finetune.errors import BadInput, RunError
from . import scripted
from .items import Item, probes

__all__ = ["Model", "Responder", "make_responder", "parse_model"]


@dataclass(frozen=True)
class Model:
    """``NAME=FOLDER[,adapter=FOLDER]``, ``NAME=http://...[,model=ID]`` or ``NAME=scripted:good``.

    Attributes:
        served: of an endpoint, the model's name there.
    """

    name: str
    source: str
    adapter: str | None = None
    served: str | None = None

    @property
    def is_endpoint(self) -> bool:
        return self.source.startswith(("http://", "https://"))


def parse_model(text: str) -> Model:
    """Raises BadInput where it is not one of the three forms."""
    name, sign, rest = text.partition("=")
    parts = rest.split(",")
    source = parts[0].strip()
    if not sign or not name.strip() or not source:
        raise BadInput(
            f"--model {text!r} is not NAME=FOLDER[,adapter=FOLDER], NAME=http://...[,model=ID] or "
            "NAME=scripted:good"
        )
    further: dict[str, str] = {}
    for part in parts[1:]:
        key, equals, value = part.partition("=")
        if key.strip() not in ("adapter", "model") or not equals or not value.strip():
            raise BadInput(f"--model {text!r}: {part!r} is neither adapter=FOLDER nor model=ID")
        further[key.strip()] = value.strip()
    model = Model(name.strip(), source, further.get("adapter"), further.get("model"))
    if source.startswith("scripted:") and source not in ("scripted:good", "scripted:bad"):
        raise BadInput(f"--model {text!r}: there are scripted:good and scripted:bad")
    if model.served and not model.is_endpoint:
        raise BadInput(f"--model {text!r}: model=ID goes with an endpoint's URL")
    if model.adapter and (model.is_endpoint or source.startswith("scripted:")):
        raise BadInput(f"--model {text!r}: an adapter goes with a model's folder")
    return model


class Responder(Protocol):
    """Answers items, some at a time."""

    def replies(self, items: Sequence[Item]) -> Iterator[list[tuple[Item, str]]]:
        """Yields replies in groups, each to be kept before the next is made."""
        ...


def make_responder(
    model: Model, *, batch: int = 16, quant_type: str = "nf4", dtype: str = "auto"
) -> Responder:
    """Loads what answers for ``model``.

    Raises:
        BadInput: files that are missing or do not fit, or no endpoint.
    """
    if model.source.startswith("scripted:"):
        return _Scripted(model.source.removeprefix("scripted:"))
    if model.is_endpoint:
        return _Endpoint(model, batch)
    return _Local(model, batch, quant_type, dtype)


@dataclass
class _Scripted:
    kind: str

    def replies(self, items: Sequence[Item]) -> Iterator[list[tuple[Item, str]]]:
        yield [(item, scripted.reply(self.kind, item)) for item in items]


class _Endpoint:
    def __init__(self, model: Model, concurrency: int) -> None:
        from ..judge_client import Endpoint

        self._endpoint = Endpoint(model.source)
        self._model, self._concurrency = model.served or model.name, concurrency

    def replies(self, items: Sequence[Item]) -> Iterator[list[tuple[Item, str]]]:
        from ..judge_client import run_calls

        known = probes()
        for start in range(0, len(items), 4 * self._concurrency):
            part = items[start : start + 4 * self._concurrency]
            bodies = [
                {
                    "model": self._model,
                    "messages": [dict(m) for m in item.messages],
                    "temperature": 0,
                    "max_tokens": known[item.probe].tokens,
                }
                for item in part
            ]
            came: dict[int, Any] = {}
            run_calls(self._endpoint, bodies, self._concurrency, came.__setitem__)
            failed = [answer for answer in came.values() if isinstance(answer, Exception)]
            yield [
                (part[i], a.text) for i, a in sorted(came.items()) if not isinstance(a, Exception)
            ]
            if failed:
                raise RunError(f"{len(failed)} items have no reply: {failed[0]}; run it again")


class _Local:
    """Batched greedy generation; prompts of like length go together."""

    def __init__(self, model: Model, batch: int, quant_type: str, dtype: str) -> None:
        from ...chat import load

        if not Path(model.source).expanduser().exists() and "/" not in model.source:
            raise BadInput(f"--model {model.name}: there is no folder {model.source}")
        self.model, self.tokenizer = load(model.source, model.adapter, quant_type, dtype)
        self.tokenizer.padding_side = "left"  # replies begin where prompts end
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.batch = batch

    def _prompt(self, item: Item) -> str:
        messages = [dict(m) for m in item.messages]
        if not self.tokenizer.chat_template:  # a base model goes on with a text
            return "\n".join(m["content"] for m in messages) + "\n"
        try:
            return self._templated(messages)
        except Exception as error:  # templates raise in their own ways where no system is taken
            if messages[0]["role"] != "system":
                raise BadInput(f"the chat template cannot be used: {error}") from error
            system, first, *rest = messages
            joined = {"role": "user", "content": f"{system['content']}\n\n{first['content']}"}
            return self._templated([joined, *rest])

    def _templated(self, messages: Sequence[dict[str, str]]) -> str:
        return self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )

    def replies(self, items: Sequence[Item]) -> Iterator[list[tuple[Item, str]]]:
        import torch

        from ...chat import _ends

        known = probes()
        prompts = [self._prompt(item) for item in items]
        templated = bool(self.tokenizer.chat_template)
        encode: Callable[..., Any] = self.tokenizer
        lengths = [len(encode(p, add_special_tokens=not templated)["input_ids"]) for p in prompts]
        order = sorted(
            range(len(items)),
            key=lambda i: (known[items[i].probe].tokens, lengths[i]),
            reverse=True,
        )
        at = 0
        while at < len(order):
            tokens = known[items[order[at]].probe].tokens
            here = [
                i for i in order[at : at + self.batch] if known[items[i].probe].tokens == tokens
            ]
            at += len(here)
            rows = encode(
                [prompts[i] for i in here],
                padding=True,
                return_tensors="pt",
                add_special_tokens=not templated,
            )
            ids, mask = (rows[k].to(self.model.device) for k in ("input_ids", "attention_mask"))
            with torch.inference_mode():
                made = self.model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    max_new_tokens=tokens,
                    do_sample=False,
                    temperature=None,
                    top_p=None,
                    top_k=None,
                    eos_token_id=_ends(self.model, self.tokenizer.eos_token_id),
                    pad_token_id=self.tokenizer.pad_token_id,
                    use_cache=True,
                )
            texts = self.tokenizer.batch_decode(made[:, ids.shape[1] :], skip_special_tokens=True)
            yield [(items[i], text.strip()) for i, text in zip(here, texts, strict=True)]
