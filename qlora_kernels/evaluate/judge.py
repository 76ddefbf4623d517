"""``qlora judge``: a model that judges replies, through any OpenAI-compatible endpoint.

Every answer is kept in the cache before it is looked at; the file of judgments is made of the cache
as a whole. So a run that was cut off asks only for what is missing, and the same replies, judge and
cache give the same file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from ..finetune.errors import BadInput, Interrupted, RunError
from . import judge_prompts as prompts
from .judge_cache import Cache, request_key
from .judge_client import Answer, CallFailed, Endpoint, Stopped, check_endpoint, is_local, run_calls
from .records import Judgment, Pair, Reply, Score, read_judgments, read_replies, write_records

__all__ = ["Task", "add_arguments", "run", "tasks"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``qlora judge``."""
    add = parser.add_argument
    add("--replies", required=True, nargs="+", help="files of `qlora generate`, all models in them")
    add("--endpoint", required=True, help="base URL, as http://127.0.0.1:8000/v1")
    add("--judge", required=True, help="the judge model's name at the endpoint")
    add("--output", required=True, help="JSONL file for the judgments")
    add("--baseline", help="model that the others are scored against")
    add("--pairs", action="store_true", help="also judge every pair of models: better, worse, tie")
    add("--no_scores", action="store_true", help="pairs alone, no points against the baseline")
    add("--limit", type=int, help="only the first so many questions")
    add("--temperature", type=float, default=0.0, help="of the judge [%(default)s]")
    add("--max_tokens", type=int, default=600, help="longest answer of the judge [%(default)s]")
    add("--seed", type=int, default=0, help="sent along; endpoints may ignore it [%(default)s]")
    add("--request", metavar="JSON", default="{}",
        help='more fields of each request; null takes one out: {"temperature": null}')  # fmt: skip
    add("--concurrency", type=int, default=4, help="requests at a time [%(default)s]")
    add("--per_minute", type=int, help="most requests a minute")
    add("--timeout", type=float, default=60.0, help="seconds to wait for a byte [%(default)s]")
    add("--retries", type=int, default=5, help="further tries of a request [%(default)s]")
    add("--key_env", default="OPENAI_API_KEY", help="variable with the API key [%(default)s]")
    add("--cache", help="JSONL file for the answers [OUTPUT with .calls.jsonl]")
    add("--summary", help="JSON file for the figures [OUTPUT with .summary.json]")
    add("--price-in", "--price_in", type=float, dest="price_in", help="of a million input tokens")
    add("--price-out", "--price_out", type=float, dest="price_out", help="of a million output ones")
    add("--level", type=float, default=0.95, help="of the intervals [%(default)s]")
    add("--yes", action="store_true", help="start without asking")


@dataclass(frozen=True)
class Task:
    """One question to the judge: two replies in one order."""

    kind: str  # "score" or "pair"
    named: Reply  # model or model_a
    other: Reply  # baseline or model_b
    order: int  # 0: ``named`` is shown first

    @property
    def shown(self) -> tuple[Reply, Reply]:
        return (self.named, self.other) if self.order == 0 else (self.other, self.named)

    def body(self, judge: str, settings: dict[str, Any]) -> dict[str, Any]:
        """The request."""
        ask = prompts.score_messages if self.kind == "score" else prompts.pair_messages
        return prompts.body(judge, ask(*self.shown), settings)

    def judgment(self, judge: str, answer: str) -> Judgment:
        """What the judge's words mean."""
        q = self.named
        if self.kind == "score":
            first, second = prompts.read_scores(answer) or (None, None)
            mine, others = (first, second) if self.order == 0 else (second, first)
            return Score(q.question_id, q.model, self.other.model, mine, others, judge,
                         self.order, q.category, answer)  # fmt: skip
        word = prompts.read_winner(answer)
        names = ("model_a", "model_b")[:: 1 if self.order == 0 else -1]
        winner = {"1": names[0], "2": names[1], "tie": "tie"}.get(word or "")
        return Pair(q.question_id, q.model, self.other.model, winner, judge, self.order,
                    q.category, prompts.without_verdict(answer), answer)  # fmt: skip


def tasks(
    replies: Sequence[Reply], baseline: str | None, scores: bool = True, pairs: bool = False
) -> list[Task]:
    """All that is to be asked, question by question: each model but the baseline scored against it,
    each pair of models compared, all in both orders.

    A question that a model has no reply to is left out for that model; :func:`missing` counts them.
    """
    by_question: dict[str, dict[str, Reply]] = {}
    for reply in replies:
        by_question.setdefault(str(reply.question_id), {})[reply.model] = reply
    found = []
    for models in by_question.values():
        if scores and baseline in models:
            found += [
                Task("score", models[name], models[baseline], order)
                for name in sorted(models)
                if name != baseline
                for order in (0, 1)
            ]
        if pairs:
            found += [
                Task("pair", models[a], models[b], order)
                for a, b in combinations(sorted(models), 2)
                for order in (0, 1)
            ]
    return found


def missing(replies: Sequence[Reply]) -> dict[str, int]:
    """How many of the questions a model has no reply to, for models that lack some."""
    questions = {str(r.question_id) for r in replies}
    counts = Counter(r.model for r in replies)
    return {m: len(questions) - n for m, n in sorted(counts.items()) if n < len(questions)}


# --- the command --------------------------------------------------------------------------------


def run(arguments: argparse.Namespace) -> int:
    """Runs ``qlora judge``; returns the exit code."""
    _check(arguments)
    settings = _settings(arguments)
    replies = _replies(arguments)
    todo = tasks(replies, arguments.baseline, not arguments.no_scores, arguments.pairs)
    bodies = [task.body(arguments.judge, settings) for task in todo]
    output = Path(arguments.output)
    cache_path = arguments.cache or output.with_suffix(".calls.jsonl")
    kept = _of_other_judges(output, arguments.judge)
    with Cache(cache_path) as cache:
        if cache.mended:
            print(
                f"{cache.path}: an answer that was half-written has been cut off", file=sys.stderr
            )
        endpoint = Endpoint(
            arguments.endpoint,
            arguments.key_env,
            arguments.timeout,
            arguments.retries,
            arguments.per_minute,
            cache,
        )
        keys = [request_key(arguments.endpoint, body) for body in bodies]
        asked: dict[str, int] = {}  # two tasks with the same request (equal replies) ask once
        for i, key in enumerate(keys):
            if cache.get(key) is None:
                asked.setdefault(key, i)
        open_ = list(asked.values())
        for line in _estimate([bodies[i] for i in open_], len(todo), arguments):
            print(line)
        if open_:
            _confirm(arguments)
        failed: list[str] = []
        spent: list[Answer] = []
        end: RunError | None = None
        try:
            with progress(len(open_)) as advance:

                def done(index: int, answer: Answer | CallFailed) -> None:
                    advance()
                    if isinstance(answer, CallFailed):
                        task = todo[open_[index]]
                        failed.append(f"question {task.named.question_id}: {answer}")
                    else:
                        spent.append(answer)

                run_calls(endpoint, [bodies[i] for i in open_], arguments.concurrency, done)
        except (Stopped, Interrupted) as error:
            end = error
        finally:
            endpoint.close()
        answers = [endpoint.cached(body) for body in bodies]
        judgments = [
            task.judgment(arguments.judge, answer.text)
            for task, answer in zip(todo, answers, strict=True)
            if answer is not None
        ]
    if judgments or kept:
        write_records(output, [*kept, *judgments])
    from .judge_report import report

    report(judgments, len(todo), spent, missing(replies), arguments)
    return _finish(end, failed, len(todo) - len(judgments), output)


def _finish(end: RunError | None, failed: list[str], lacking: int, output: Path) -> int:
    if end is None and not lacking:
        return 0
    kinds = Counter(f.partition(": ")[2] for f in failed).most_common(3)
    why = "; ".join(f"{n} × {kind}" for kind, n in kinds)
    words = f"{lacking} judgments are missing" + (f" ({why})" if why else "")
    words += f"; the others are in {output}, and the same command asks for what is missing"
    if isinstance(end, Interrupted):
        raise Interrupted(f"interrupted: {words}", end.signal)
    raise RunError(words if end is None else f"{end}: {words}")


def _check(arguments: argparse.Namespace) -> None:
    for name, lowest in (("concurrency", 1), ("max_tokens", 1), ("retries", 0), ("limit", 1),
                         ("per_minute", 1)):  # fmt: skip
        value = getattr(arguments, name)
        if value is not None and value < lowest:
            raise BadInput(f"{name} is {value}; it must be at least {lowest}")
    if not arguments.timeout > 0:
        raise BadInput(f"timeout is {arguments.timeout}; it must be above 0")
    if not arguments.temperature >= 0:
        raise BadInput(f"temperature is {arguments.temperature}; it must not be negative")
    if not 0 < arguments.level < 1:
        raise BadInput(f"level is {arguments.level}; it must be between 0 and 1, as 0.95")
    for name in ("price_in", "price_out"):
        value = getattr(arguments, name)
        if value is not None and not value >= 0:
            raise BadInput(f"{name} is {value}; it must not be negative")
    if arguments.no_scores and not arguments.pairs:
        raise BadInput("no_scores without --pairs leaves nothing to judge")
    if arguments.baseline is None and not arguments.no_scores:
        raise BadInput("give the --baseline that points are set against, or --pairs --no_scores")
    check_endpoint(arguments.endpoint, arguments.key_env)


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    try:
        more = json.loads(arguments.request)
    except ValueError as error:
        raise BadInput(f"request is not JSON: {error}") from error
    if not isinstance(more, dict):
        raise BadInput(f'request must be an object, as {{"top_p": 1}}; it is {arguments.request}')
    for name in ("model", "messages", "stream", "n"):
        if name in more:
            raise BadInput(f"request may not hold {name}: it is for this command to set")
    return {
        "temperature": arguments.temperature,
        "max_tokens": arguments.max_tokens,
        "seed": arguments.seed,
        **more,
    }


def _replies(arguments: argparse.Namespace) -> list[Reply]:
    import difflib

    replies = read_replies(*arguments.replies)
    models = sorted({r.model for r in replies})
    if arguments.baseline is not None and arguments.baseline not in models:
        near = difflib.get_close_matches(arguments.baseline, models, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(models)}"
        raise BadInput(f"no reply is by the baseline {arguments.baseline}{hint}")
    if len(models) < 2:
        raise BadInput(f"all replies are by {models[0]}; judging takes two models and more")
    if arguments.limit is not None:
        questions = list(dict.fromkeys(str(r.question_id) for r in replies))[: arguments.limit]
        replies = [r for r in replies if str(r.question_id) in set(questions)]
    return replies


def _of_other_judges(output: Path, judge: str) -> list[Judgment]:
    """What is in the output already and not this judge's; that is made anew from the cache."""
    if not output.is_file() or not output.stat().st_size:
        return []
    there = read_judgments(output)
    mine = sum(j.judge == judge for j in (*there.pairs, *there.scores))
    if mine:
        print(f"{output} holds {mine} judgments of {judge}, which are replaced", file=sys.stderr)
    return [j for j in (*there.pairs, *there.scores) if j.judge != judge]


def _tokens(body: dict[str, Any]) -> int:
    """About: four characters a token, and a few for each message's frame."""
    return sum(len(m["content"]) // 4 + 8 for m in body["messages"])


def _money(arguments: argparse.Namespace, tokens_in: int, tokens_out: int) -> float | None:
    if arguments.price_in is None and arguments.price_out is None:
        return None
    prices = arguments.price_in or 0.0, arguments.price_out or 0.0
    return (tokens_in * prices[0] + tokens_out * prices[1]) / 1e6


def _estimate(
    bodies: Sequence[dict[str, Any]], total: int, arguments: argparse.Namespace
) -> Iterator[str]:
    """What it will take, before it starts."""
    tokens_in = sum(map(_tokens, bodies))
    most_out = len(bodies) * arguments.max_tokens
    yield f"{total} judgments, {len(bodies)} requests to send (the others are answered already)"
    if not bodies:
        return
    yield (
        f"about {tokens_in:,} tokens in (four characters a token), at most {most_out:,} out "
        f"({arguments.max_tokens} each)"
    )
    money = _money(arguments, tokens_in, most_out)
    if money is None:
        yield "cost: unknown without --price-in and --price-out (of a million tokens)"
    else:
        yield f"cost: at most about {money:.2f}"


def _confirm(arguments: argparse.Namespace) -> None:
    priced = arguments.price_in or arguments.price_out
    if arguments.yes or (is_local(arguments.endpoint) and not priced):
        return
    if not sys.stdin.isatty():
        raise BadInput("nobody is here to agree to that; --yes starts without asking")
    if input("start? [y/N] ").strip().lower() not in ("y", "yes"):
        raise BadInput("not started")


class progress:
    """A bar on a terminal; nothing elsewhere. Gives a function to call for each step."""

    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

        console = Console(stderr=True)
        self._bar = Progress(
            BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console,
            disable=not console.is_terminal or not total,
        )  # fmt: skip
        self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> Any:
        self._bar.start()
        return lambda: self._bar.advance(self._task)

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
