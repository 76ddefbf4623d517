"""Tokens to characters, and where a reply stops."""

from __future__ import annotations

import random

import pytest

from qlora_kernels.serve.text import Detokenizer, StopAt


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.mark.parametrize(
    "text",
    [
        "plain words, and more of them " * 4,
        "日本語の文章 and naïve café 🙂🙃 " * 5,
        "👩‍👩‍👧 a family of four code points",
        "",
    ],
)
@pytest.mark.parametrize("step", [1, 3])
def test_pieces_make_the_whole_text(tokenizer, text, step):
    tokens = tokenizer(text)["input_ids"]
    words = Detokenizer(tokenizer)
    pieces = [words.push(tokens[i : i + step]) for i in range(0, len(tokens), step)]
    assert "".join([*pieces, words.push([], final=True)]) == text
    assert not any("\ufffd" in piece for piece in pieces)  # a byte here is a token


def test_bytes_that_are_no_text_come_out_as_a_decoder_has_them(tokenizer):
    draw = random.Random(0)
    for _ in range(20):
        tokens = [draw.randrange(3, 259) for _ in range(draw.randrange(1, 90))]
        words = Detokenizer(tokenizer)
        text = "".join([words.push([t]) for t in tokens]) + words.push([], final=True)
        assert text == tokenizer.decode(tokens, skip_special_tokens=True)


def test_special_tokens_are_no_text(tokenizer):
    words = Detokenizer(tokenizer)
    assert words.push([*tokenizer("ab")["input_ids"], tokenizer.eos_token_id]) == "ab"


def through(stops, pieces):
    stop = StopAt(stops)
    out = [stop.push(piece) for piece in pieces]
    return [*out, stop.push("", final=True)], stop.hit


def test_nothing_of_a_stop_sequence_is_passed_on():
    assert through(["END"], ["one E", "N", "D two"]) == (["one ", "", "", ""], True)
    assert through(["END"], ["one E", "N", "E two"]) == (["one ", "", "ENE two", ""], False)
    assert through(["END"], ["one EN"]) == (["one ", "EN"], False)
    assert through([], ["a", "b"]) == (["a", "b", ""], False)


def test_the_first_of_several_wins():
    assert through(["yz", "\n\n"], ["x\n", "\nyz"]) == (["x", "", ""], True)
    assert through(["aab", "b"], ["aaa", "b"]) == (["a", "", ""], True)


def test_any_cut_into_pieces_gives_the_same():
    draw = random.Random(1)
    text, stops = "abcabdabcabeabcabf", ["abe", "cabf"]
    for _ in range(50):
        at = sorted(draw.sample(range(len(text)), 6))
        pieces = [text[a:b] for a, b in zip([0, *at], [*at, len(text)], strict=True)]
        out, hit = through(stops, pieces)
        assert hit and "".join(out) == "abcabdabc"
