"""Questions about the installed Python: many, clean, repeatable, and without side effects."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys

import pytest

from qlora_kernels.finetune import python_docs
from qlora_kernels.finetune.data import DataError
from qlora_kernels.finetune.data.arrange import hold_out


@pytest.fixture(scope="module")
def examples():
    return python_docs.examples()


def question(example) -> str:
    return example.messages[0]["content"]


def answer(example) -> str:
    return example.messages[1]["content"]


def test_some_thousands_of_questions_with_answers(examples):
    assert 3000 < len(examples) < 20_000
    assert len({question(e) for e in examples}) == len(examples)
    for e in examples:
        assert [m["role"] for m in e.messages] == ["user", "assistant"]
        assert question(e)[-1] in "?." and 40 <= len(answer(e)) <= 600


@pytest.mark.parametrize(
    "name, says",
    (
        ("textwrap.dedent", "is a function in the module `textwrap`. Remove any common leading"),
        ("collections.OrderedDict", "is a class in the module `collections`. Dictionary that rem"),
        ("json", "`json` is a module of Python's standard library. JSON"),
        ("str.split", "is a method built into Python. Return a list of the substrings"),
        ("math.gcd", "is a function in the module `math`. Greatest"),
        ("KeyError", "is an exception built into Python. Mapping key not found."),
        ("os.listdir", "Return a list containing the names of the files in the directory."),
    ),
)
def test_what_well_known_objects_are_for(examples, name, says):
    about = [e for e in examples if e.where == f"python-docs {name}"]
    assert len(about) == 2 and len({question(e) for e in about}) == 2
    assert all(says in answer(e) for e in about)


def test_every_kind_is_asked_about_in_several_ways(examples):
    kinds = {entry.kind for entry in python_docs._entries()}
    assert kinds == set(python_docs._WAYS)
    starts = {" ".join(question(e).split()[:2]) for e in examples}
    assert {"What does", "What is", "When would", "Explain Python's"} <= starts


def test_answers_are_plain_sentences(examples):
    for e in examples:
        # Behind the signature, in which a default may be a blank or a line end.
        text = answer(e).partition("` is a")[2]
        assert text[-1] in ".!?" and "\n" not in text and "  " not in text
        assert not re.search(r">>>|:func:|:class:|:mod:|\.\. \w+::|``", text), text


def test_the_same_samples_in_another_process_and_nothing_imported():
    """Another hash seed; no window, browser or joke is imported, no network asked."""
    code = """
import hashlib, json, socket, sys
import qlora_kernels.finetune.data.formats
def refuse(*args): raise AssertionError("the network was asked")
socket.socket.connect = refuse
before = set(sys.modules)
from qlora_kernels.finetune.python_docs import examples
made = json.dumps([e.messages for e in examples()])
print(json.dumps([hashlib.sha256(made.encode()).hexdigest(), sorted(set(sys.modules) - before)]))
"""
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "1"},
    )
    assert run.stderr == ""
    digest, loaded = json.loads(run.stdout)
    made = json.dumps([e.messages for e in python_docs.examples()])
    assert digest == hashlib.sha256(made.encode()).hexdigest()
    forbidden = ("antigravity", "this", "turtle", "tkinter", "idlelib", "webbrowser", "readline")
    assert not [m for m in loaded if m.partition(".")[0] in forbidden]
    known = {"qlora_kernels", "sysconfig", *python_docs._BUILT_IN}
    assert {m.partition(".")[0] for m in loaded if not m.startswith("_sysconfig")} <= known


def test_held_out_objects_are_never_asked_about_in_training(examples):
    held = hold_out([e.group for e in examples], 200, seed=0)
    sides = [{e.where for e, out in zip(examples, held, strict=True) if out == s} for s in (0, 1)]
    answers = [
        {answer(e).partition(". ")[2] for e, out in zip(examples, held, strict=True) if out == s}
        for s in (0, 1)
    ]
    assert sides[1] and not sides[0] & sides[1] and not answers[0] & answers[1]


@pytest.mark.parametrize(
    "doc, words",
    (
        (None, ""),
        ("Short.", ""),
        (
            "f(x) -> int\n\nReturn the number of ``x`` in *seq*",
            "Return the number of `x` in `seq`.",
        ),
        ("Use :func:`~os.path.join` here, always", "Use `os.path.join` here, always."),
        (">>> f(1)\n2\n\nGives one more than it got.", "Gives one more than it got."),
        (
            "Title of the thing\n==================\n\nWhat it is really for.",
            "What it is really for.",
        ),
        ("name -- tools for working with names", "Tools for working with names."),
        ("Internal: do not call this, ever, at all.", ""),
        ("The options are as follows here:", ""),
        ("One sentence of words. " * 40, "One sentence of words. " * 16 + "One sentence of words."),
    ),
)
def test_first_words(doc, words):
    assert python_docs._first_words(doc) == words


def test_a_python_without_sources_is_told(monkeypatch):
    python_docs._entries.cache_clear()
    monkeypatch.setattr(python_docs, "_from_sources", lambda: iter(()))
    monkeypatch.setattr(python_docs, "_from_built_ins", lambda: iter(()))
    with pytest.raises(DataError, match="only 0 questions.*without the sources"):
        python_docs.examples()
    python_docs._entries.cache_clear()
