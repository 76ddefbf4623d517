"""``qlora generate``: replies of several models to a list of questions, in one file.

A batch is on the disk before the next one begins. A run that was cut off goes on where it was; it
refuses to mix replies that were drawn in another way.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..finetune.errors import BadInput, RunError
from . import generate_questions
from .appender import Appender
from .generate_local import Sampler, Sampling, batches, reply_seed
from .generate_sources import Source, parse, replies_of_file
from .records import Question, Reply, read_replies

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``qlora generate``."""
    add = parser.add_argument
    add("--model", action="append", required=True, metavar="NAME=WHERE",
        help="NAME=FOLDER[,adapter=FOLDER][,quant_type=T], NAME=http://…[,model=M] or "
             "NAME=replies.jsonl; again for several")  # fmt: skip
    add("--questions", required=True, help="JSONL: Vicuna's, Open Assistant's, your own (docs)")
    add("--output", required=True, help="JSONL file for the replies; an unfinished one is resumed")
    add("--limit", type=int, help="only the first so many questions")
    add("--temperature", type=float, default=0.7, help="0 takes the likeliest word [%(default)s]")
    add("--top_p", type=float, default=0.9, help="nucleus sampling [%(default)s]")
    add("--max_new_tokens", type=int, default=512, help="longest reply [%(default)s]")
    add("--seed", type=int, default=0, help="each question's own is made of it [%(default)s]")
    add("--system", help="a system message")
    add("--stop", action="append", default=[], help="a text that ends a reply; again for several")
    add("--chat_template", help="Jinja file, for a model without one (or instead of its own)")
    add("--batch_size", type=int, default=8, help="replies at a time, models here [%(default)s]")
    add("--concurrency", type=int, default=4, help="requests at a time, endpoints [%(default)s]")
    add("--per_minute", type=int, help="most requests a minute, endpoints")
    add("--timeout", type=float, default=120.0, help="seconds to wait for a byte [%(default)s]")
    add("--retries", type=int, default=5, help="further tries of a request [%(default)s]")
    add("--key_env", default="OPENAI_API_KEY", help="variable with the API key [%(default)s]")
    add("--overwrite", action="store_true", help="begin anew, whatever the output holds")


def run(arguments: argparse.Namespace) -> int:
    """Runs ``qlora generate``; returns the exit code."""
    sampling = Sampling(
        arguments.temperature,
        arguments.top_p,
        arguments.max_new_tokens,
        tuple(arguments.stop),
        arguments.system,
    )
    sampling.check()
    for name, lowest in (("batch_size", 1), ("concurrency", 1), ("retries", 0), ("limit", 1)):
        value = getattr(arguments, name)
        if value is not None and value < lowest:
            raise BadInput(f"{name} is {value}; it must be at least {lowest}")
    sources = [parse(word) for word in arguments.model]
    names = [s.name for s in sources]
    for name in names:
        if names.count(name) > 1:
            raise BadInput(f"two models are called {name}")
    template = _template(arguments.chat_template)
    questions = generate_questions.read(arguments.questions, arguments.limit)
    with Appender(arguments.output) as file:
        if file.mended:
            print(f"{file.path}: a half-written reply has been cut off", file=sys.stderr)
        if arguments.overwrite:
            file.clear()
        there = [] if file.empty() else read_replies(file.path)
        _check_there(there, questions, {s.name: _settings(s, sampling, arguments) for s in sources})
        for source in sources:
            done = {str(r.question_id) for r in there if r.model == source.name}
            missing = [q for q in questions if str(q.question_id) not in done]
            print(f"{source.name}: {len(questions) - len(missing)} of {len(questions)} there")
            if missing:
                _generate(source, questions, done, sampling, template, arguments, file)
    _say_how_many_were_cut(arguments.output, names)
    return 0


def _template(path: str | None) -> str | None:
    if path is None:
        return None
    try:
        return Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"the chat template {path} cannot be read: {error}") from error


def _settings(source: Source, sampling: Sampling, arguments: argparse.Namespace) -> dict[str, Any]:
    """What is recorded beside each reply of a source, and must be the same for a resume."""
    if source.kind == "file":
        return {}
    found: dict[str, Any] = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_new_tokens": sampling.max_new_tokens,
        "run_seed": arguments.seed,
        "source": source.place,
    }
    if source.kind == "endpoint":
        found["served_as"] = source.model
    else:
        found |= {"quant_type": source.quant_type, "dtype": source.dtype}
        found["batch_size"] = arguments.batch_size
        if source.adapter is not None:
            found["adapter"] = source.adapter
        if arguments.chat_template is not None:
            found["chat_template"] = arguments.chat_template
    if sampling.stop:
        found["stop"] = list(sampling.stop)
    if sampling.system is not None:
        found["system"] = sampling.system
    return found


_PER_REPLY = ("finish", "tokens")


def _check_there(
    there: Sequence[Reply], questions: Sequence[Question], settings: dict[str, dict[str, Any]]
) -> None:
    """Raises BadInput where the output's replies are others than this run would write."""
    asked = {str(q.question_id): q for q in questions}
    for reply in there:
        question = asked.get(str(reply.question_id))
        if question is not None and reply.question != question.turns[-1]:
            raise BadInput(
                f"the output holds another question {reply.question_id} than the list; name "
                "another output, or --overwrite"
            )
        wanted = settings.get(reply.model)
        if not wanted:
            continue
        was = {k: v for k, v in reply.sampling.items() if k not in _PER_REPLY}
        for name in sorted(was.keys() | wanted.keys()):
            if was.get(name) != wanted.get(name):
                raise BadInput(
                    f"the output holds replies of {reply.model} with {name} {was.get(name)!r}, now "
                    f"it is {wanted.get(name)!r}; name another output, or --overwrite"
                )


def _generate(
    source: Source,
    questions: Sequence[Question],
    done: set[str],
    sampling: Sampling,
    template: str | None,
    arguments: argparse.Namespace,
    file: Appender,
) -> None:
    settings = _settings(source, sampling, arguments)
    if source.kind == "file":
        replies = replies_of_file(source, questions)
        file.append(*(r for r in replies if str(r.question_id) not in done))
    elif source.kind == "endpoint":
        _from_endpoint(source, questions, done, sampling, settings, arguments, file)
    else:
        _from_model(source, questions, done, sampling, template, settings, arguments, file)


def _from_model(
    source: Source,
    questions: Sequence[Question],
    done: set[str],
    sampling: Sampling,
    template: str | None,
    settings: dict[str, Any],
    arguments: argparse.Namespace,
    file: Appender,
) -> None:
    from .. import chat
    from .judge import progress

    model, tokenizer = chat.load(
        source.place or None, source.adapter, source.quant_type, source.dtype
    )
    if template is not None:
        tokenizer.chat_template = template
    sampler = Sampler(model, tokenizer, sampling)
    # Whole batches are made again where a kill left some of their rows: the same rows together.
    todo = [
        [questions[i] for i in batch]
        for batch in batches(questions, sampler.lengths(questions), arguments.batch_size)
        if any(str(questions[i].question_id) not in done for i in batch)
    ]
    with progress(len(todo)) as advance:
        for batch in todo:
            replies = sampler.reply(batch, arguments.seed)
            file.append(
                *(
                    Reply(
                        q.question_id, source.name, q.turns[-1], text, q.category,
                        reply_seed(arguments.seed, q.question_id, len(q.turns) - 1),
                        {**settings, "finish": finish, "tokens": tokens}, history,
                    )
                    for q, (text, finish, tokens, history) in zip(batch, replies, strict=True)
                    if str(q.question_id) not in done
                )
            )  # fmt: skip
            advance()
    del model, sampler
    gc.collect()


def _from_endpoint(
    source: Source,
    questions: Sequence[Question],
    done: set[str],
    sampling: Sampling,
    settings: dict[str, Any],
    arguments: argparse.Namespace,
    file: Appender,
) -> None:
    """One conversation a question; its turns one after another."""
    from .judge import progress
    from .judge_cache import Cache
    from .judge_client import Answer, CallFailed, Endpoint, run_calls

    todo = [q for q in questions if str(q.question_id) not in done]
    histories = {str(q.question_id): list(q.history) for q in todo}
    failed: list[str] = []
    with Cache(Path(arguments.output).with_suffix(".calls.jsonl")) as cache:
        endpoint = Endpoint(
            source.place, arguments.key_env, arguments.timeout, arguments.retries,
            arguments.per_minute, cache,
        )  # fmt: skip
        try:
            for turn in range(max(len(q.turns) for q in todo)):
                asking = [
                    q for q in todo if len(q.turns) > turn and str(q.question_id) in histories
                ]
                bodies = [
                    _body(source, q, histories[str(q.question_id)], turn, sampling, arguments.seed)
                    for q in asking
                ]

                def ended(
                    index: int,
                    answer: Answer | CallFailed,
                    asking: list[Question] = asking,
                    turn: int = turn,
                ) -> None:
                    q = asking[index]
                    name = str(q.question_id)
                    advance()
                    if isinstance(answer, CallFailed):
                        failed.append(f"question {name}: {answer}")
                        del histories[name]
                        return
                    text, finish = answer.text.strip(), answer.finish
                    if turn + 1 < len(q.turns):
                        histories[name] += [
                            {"role": "user", "content": q.turns[turn]},
                            {"role": "assistant", "content": text},
                        ]
                        return
                    seed = reply_seed(arguments.seed, q.question_id, turn)
                    more = {"finish": finish, "tokens": answer.completion_tokens}
                    file.append(
                        Reply(q.question_id, source.name, q.turns[turn], text, q.category, seed,
                              {**settings, **more}, tuple(histories[name]))
                    )  # fmt: skip

                with progress(len(asking)) as advance:
                    run_calls(endpoint, bodies, arguments.concurrency, ended)
        finally:
            endpoint.close()
    if failed:
        raise RunError(
            f"{source.name}: {len(failed)} of {len(todo)} questions have no reply ({failed[0]}); "
            "the others are kept, and the same command asks for what is missing"
        )


def _body(
    source: Source,
    question: Question,
    history: Iterable[dict[str, str]],
    turn: int,
    sampling: Sampling,
    seed: int,
) -> dict[str, Any]:
    system = [] if sampling.system is None else [{"role": "system", "content": sampling.system}]
    body: dict[str, Any] = {
        "model": source.model,
        "messages": [*system, *history, {"role": "user", "content": question.turns[turn]}],
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_new_tokens,
        "seed": reply_seed(seed, question.question_id, turn),
    }
    if sampling.stop:
        body["stop"] = list(sampling.stop)
    return body


def _say_how_many_were_cut(output: str, names: Sequence[str]) -> None:
    """What a judge would hold against a model unjustly, or would be right to."""
    replies = read_replies(output)
    for name in names:
        mine = [r for r in replies if r.model == name]
        cut = sum(r.sampling.get("finish") == "length" for r in mine)
        empty = sum(not r.reply.strip() for r in mine)
        words = [f"{cut} cut off at their longest"] * bool(cut) + [f"{empty} empty"] * bool(empty)
        if words:
            print(f"{name}: of {len(mine)} replies {' and '.join(words)}")
