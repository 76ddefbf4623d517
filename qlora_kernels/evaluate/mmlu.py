"""``qlora mmlu``: knowledge, measured by MMLU's multiple choice questions.

A prompt shows five questions of the subject with their answers, then asks; the answer is the letter
that the model finds likeliest. Nothing is generated. A run that is killed goes on with the same
command: every answer is on the disk once its batch is done.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..finetune.errors import BadInput, bad_input

__all__ = ["add_arguments", "measure", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``qlora mmlu``."""
    add = parser.add_argument
    add("--model", help="folder or hub id of the base model (that of the adapter if left out)")
    add("--adapter", help="folder of a PEFT adapter, as `qlora finetune` leaves it")
    add("--data", required=True, help="folder of MMLU's CSV files: dev/, val/, test/")
    add("--split", default="val", help="val, or test for the figure that is reported [%(default)s]")
    add("--shots", type=int, default=5, help="examples before each question [%(default)s]")
    add("--subjects", help="only these, with commas between")
    add("--limit", type=int, help="only the first so many questions of each subject")
    add("--batch", type=int, default=8, help="questions a forward pass [%(default)s]")
    add("--max_length", type=int, default=2048, help="tokens a prompt may have [%(default)s]")
    add("--quant_type", default="nf4", help="4-bit format, or none for 16 bits [%(default)s]")
    add("--dtype", default="auto", help="of what is not quantized [%(default)s]")
    add("--output", default="mmlu.json", help="where the result goes [%(default)s]")
    add("--overwrite", action="store_true", help="replace another run's result there")


def measure(
    model: Any,
    tokenizer: Any,
    data: Any,
    *,
    batch_size: int = 8,
    max_length: int = 2048,
    done: list[Any] | None = None,
    each: Callable[[list[Any]], None] | None = None,
) -> list[Any]:
    """A model's answers to all questions of ``data``, by subject and place.

    Args:
        model, tokenizer: a causal language model, as ``qlora_kernels.chat.load`` gives it.
        data: an ``Mmlu``, from :func:`~.mmlu_data.read_mmlu`.
        done: answers that are there already; they are not asked again.
        each: called with the answers of each batch as they come.

    Returns:
        ``Answer`` for each question (:mod:`.mmlu_score`); ``.correct`` says whether it was right.
    """
    from .mmlu_score import Scorer

    scorer = Scorer(model, tokenizer, batch_size, max_length)
    answers = list(done or [])
    there = {(a.subject, a.index) for a in answers}
    for subject in data.subjects:
        left = [i for i in range(len(subject.items)) if (subject.name, i) not in there]
        batch: list[Any] = []
        for answer in scorer.answers(subject, left):
            batch.append(answer)
            if len(batch) == batch_size:
                if each is not None:
                    each(batch)
                answers += batch
                batch = []
        if batch and each is not None:
            each(batch)
        answers += batch
    return sorted(answers, key=lambda a: (a.subject, a.index))


def run(arguments: argparse.Namespace) -> int:
    """Runs ``qlora mmlu``; returns the exit code."""
    from ..chat import _base_of, load
    from ..finetune.checkpoint import replace_file
    from .mmlu_data import read_mmlu
    from .mmlu_report import items, summarise, table

    names = [s.strip() for s in arguments.subjects.split(",")] if arguments.subjects else None
    data = read_mmlu(arguments.data, arguments.split, arguments.shots, names, arguments.limit)
    adapter = Path(arguments.adapter).expanduser() if arguments.adapter else None
    base = _base_of(adapter, arguments.model) if adapter else arguments.model
    if base is None:
        raise BadInput("give --model, --adapter, or both")
    identity = {
        "model": base,
        "adapter": str(adapter) if adapter else None,
        "weights": _fingerprint(base, adapter),
        "quant_type": arguments.quant_type,
        "dtype": arguments.dtype,
        "max_length": arguments.max_length,
        "split": data.split,
        "shots": data.shots,
        "digest": data.digest,
    }
    output = Path(arguments.output).expanduser()
    if output.is_file() and not arguments.overwrite:
        found = _read_result(output)
        if found.get("run") == identity:
            print("\n".join([*table(found), f"{output} holds this run, finished"]))
            return 0
        raise BadInput(f"{output} holds another run's result: name another, or --overwrite")
    print(f"{len(data)} questions, {len(data.subjects)} subjects of {arguments.data}")
    with _Progress(output, identity, arguments.overwrite) as progress:
        if progress.done:
            print(f"going on after {len(progress.done)} questions")
        model, tokenizer = load(base, arguments.adapter, arguments.quant_type, arguments.dtype)
        answers = measure(
            model,
            tokenizer,
            data,
            batch_size=arguments.batch,
            max_length=arguments.max_length,
            done=progress.done,
            each=progress.keep,
        )
        result = {**summarise(answers, data), "run": identity, "items": items(answers)}
        text = json.dumps(result, indent=1) + "\n"
        replace_file(output, lambda aside: aside.write_text(text, "utf-8"))
        progress.path.unlink()
    print("\n".join([*table(result), f"written to {output}"]))
    return 0


def _fingerprint(base: str, adapter: Path | None) -> str:
    from ..finetune.model import fingerprint_model
    from ..integrations.transformers import _local_folder

    with bad_input("model"):
        marks = [fingerprint_model(_local_folder(base, None, None))]
        if adapter is not None:
            marks.append(fingerprint_model(adapter))
    return " ".join(marks)


def _read_result(path: Path) -> dict[str, Any]:
    from .mmlu_report import SCHEMA

    try:
        found = json.loads(path.read_text("utf-8"))
    except (ValueError, OSError) as error:
        raise BadInput(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict) or found.get("kind") != "mmlu":
        raise BadInput(f"{path} holds something else than a result of MMLU: name another file")
    if found.get("schema") != SCHEMA:
        raise BadInput(f"{path} is of schema {found.get('schema')}, this version reads {SCHEMA}")
    return found


class _Progress:
    """The answers so far, beside the result that they will make: ``<output>.partial.jsonl``.

    Its first line says which run it is of; then a line an answer.
    """

    def __init__(self, output: Path, identity: dict[str, Any], overwrite: bool) -> None:
        from .appender import Appender

        self.path = output.with_name(output.name + ".partial.jsonl")
        if overwrite:
            self.path.unlink(missing_ok=True)
        self._file = Appender(self.path)
        try:
            self.done = self._read(identity)
        except BaseException:
            self._file.close()
            raise

    def _read(self, identity: dict[str, Any]) -> list[Any]:
        from .mmlu_report import SCHEMA
        from .mmlu_score import Answer

        damaged = f"{self.path} is damaged: --overwrite begins anew"
        try:
            lines = [json.loads(line) for line in self.path.read_text("utf-8").splitlines()]
        except ValueError as error:
            raise BadInput(f"{damaged} ({error})") from error
        if not lines:
            self._file.append({"schema": SCHEMA, "run": identity})
            return []
        if lines[0] != {"schema": SCHEMA, "run": identity}:
            raise BadInput(
                f"{self.path} holds the answers of another run that was interrupted: finish that, "
                "name another --output, or --overwrite"
            )
        try:
            return [
                Answer(**{**line, "log_likelihoods": tuple(line["log_likelihoods"])})
                for line in lines[1:]
            ]
        except (TypeError, KeyError) as error:
            raise BadInput(f"{damaged} ({error})") from error

    def keep(self, answers: list[Any]) -> None:
        """Writes answers down."""
        from dataclasses import asdict

        self._file.append(*(asdict(a) for a in answers))

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
