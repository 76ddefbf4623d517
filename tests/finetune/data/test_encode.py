"""Which tokens are trained: said by hand for every kind of template, token by token."""

from __future__ import annotations

import re

import numpy as np
import pytest

from qlora_kernels.finetune.data import IGNORE, DataError, Example
from qlora_kernels.finetune.data.encode import Encoder


def chat(*turns: str, system: str | None = None) -> Example:
    """User and assistant in turn."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return Example("d.jsonl:7", messages)


def encode(encoder: Encoder, example: Example):
    (coded,) = encoder.encode([example])
    return coded


def trained(encoder: Encoder, example: Example) -> list[str]:
    """The trained stretches of an example, as text."""
    coded = encode(encoder, example)
    assert coded.input_ids.dtype == coded.labels.dtype == np.int32
    on = coded.labels != IGNORE
    assert (coded.labels[on] == coded.input_ids[on]).all()
    edges = np.flatnonzero(np.diff(np.concatenate([[False], on, [False]]).astype(int)))
    return [
        encoder.tokenizer.decode(coded.input_ids[a:b], clean_up_tokenization_spaces=False)
        for a, b in edges.reshape(-1, 2)
    ]


def whole(encoder: Encoder, example: Example) -> str:
    return encoder.tokenizer.decode(
        encode(encoder, example).input_ids, clean_up_tokenization_spaces=False
    )


# --------------------------------------------------------------------------- replies

# template, tokenizer settings, what is trained of "Hi"/"Hello" and then "And you?"/"Fine."
TURNS = {
    "chatml": ({"eos": "<|im_end|>"}, ["Hello<|im_end|>", "Fine.<|im_end|>"]),
    "llama2": ({"bos": "<s>", "adds_bos": True}, ["Hello </s>", "Fine. </s>"]),
    "llama3": (
        {"bos": "<s>", "eos": "<|eot_id|>", "adds_bos": True},
        ["Hello<|eot_id|>", "Fine.<|eot_id|>"],
    ),
    "gemma": ({"bos": "<s>", "adds_bos": True}, ["Hello<end_of_turn>", "Fine.<end_of_turn>"]),
    # The last reply closes the conversation too.
    "phi3": ({}, ["Hello<|end|>", "Fine.<|end|>\n</s>"]),
    # The model opens its last reply with (empty) thoughts; earlier ones have lost them.
    "qwen3": (
        {"eos": "<|im_end|>"},
        ["Hello<|im_end|>", "<think>\n\n</think>\n\nFine.<|im_end|>"],
    ),
    # What does not end by itself is ended; the blank belongs to the first token of a reply.
    "plain": ({}, [" Hello", " Fine.\n</s>"]),
}


@pytest.mark.parametrize("template", TURNS)
def test_replies_and_what_ends_them(make_tokenizer, template):
    settings, expected = TURNS[template]
    encoder = Encoder(make_tokenizer(template, **settings))
    assert trained(encoder, chat("Hi", "Hello", "And you?", "Fine.")) == expected
    assert trained(encoder, chat("And you?", "Fine.")) == expected[1:]


@pytest.mark.parametrize("template", TURNS)
def test_both_ways_of_finding_a_reply_agree(make_tokenizer, template, monkeypatch):
    """One reply at the end is found in place, others by markers: the same labels."""
    encoder = Encoder(make_tokenizer(template, **TURNS[template][0]))
    for example in (chat("Hi", "Hello"), chat("Hello", "Hello"), chat(" Hi ", "a\nb: Hi")):
        direct = encode(encoder, example)
        turn = encoder.turn
        monkeypatch.setattr(encoder, "_turn", type(turn)(**{**vars(turn), "tail": "\0"}))
        marked = encode(encoder, example)
        monkeypatch.setattr(encoder, "_turn", turn)
        assert (direct.input_ids == marked.input_ids).all()
        assert (direct.labels == marked.labels).all()


@pytest.mark.parametrize("template", [t for t in TURNS if t != "llama2"])
def test_a_system_message_is_not_trained(make_tokenizer, template):
    settings, expected = TURNS[template]
    encoder = Encoder(make_tokenizer(template, **settings))
    example = chat("And you?", "Fine.", system="Be brief")
    assert trained(encoder, example) == expected[1:] and "Be brief" in whole(encoder, example)


def test_replies_that_repeat_what_was_asked(tokenizer):
    """A reply is told by its place, not by its words."""
    encoder = Encoder(tokenizer)
    example = chat("Hi", "Hi", "assistant\nHi", "user\nHi")
    assert trained(encoder, example) == ["Hi<|im_end|>", "user\nHi<|im_end|>"]
    assert whole(encoder, example).count("Hi") == 4


def test_blanks_around_a_reply(make_tokenizer, tokenizer):
    kept = Encoder(tokenizer)
    assert trained(kept, chat("Hi", " Hello \n")) == [" Hello \n<|im_end|>"]
    assert trained(kept, chat("a", " b ", "c", " d ")) == [" b <|im_end|>", " d <|im_end|>"]
    stripped = Encoder(make_tokenizer("llama2", bos="<s>", adds_bos=True))
    assert trained(stripped, chat("Hi", " Hello \n")) == ["Hello </s>"]
    assert trained(stripped, chat("a", " b ", "c", " d ")) == ["b </s>", "d </s>"]


def test_an_emoji_of_several_tokens_is_trained_whole(tokenizer):
    encoder = Encoder(tokenizer)
    assert trained(encoder, chat("🙂", "🙃é")) == ["🙃é<|im_end|>"]


def test_a_last_question_without_a_reply(tokenizer):
    encoder = Encoder(tokenizer)
    assert trained(encoder, chat("Hi", "Hello", "And you?")) == ["Hello<|im_end|>"]
    assert trained(encoder, chat("Hi")) == []


def test_an_empty_reply_among_others_is_trained_to_end(tokenizer):
    encoder = Encoder(tokenizer)
    assert trained(encoder, chat("Hi", "", "So?", "Yes")) == ["<|im_end|>", "Yes<|im_end|>"]


def test_thoughts_of_earlier_turns_cannot_be_told(make_tokenizer):
    """The template drops them, so what would be trained is not what the data says."""
    encoder = Encoder(make_tokenizer("qwen3", eos="<|im_end|>"))
    thinking = "<think>hm</think>\n\nHello"
    with pytest.raises(DataError, match=r"d\.jsonl:7: the chat template .* changes the reply in"):
        encode(encoder, chat("Hi", thinking, "And you?", "Fine."))


def test_a_template_that_changes_every_reply(make_tokenizer):
    tokenizer = make_tokenizer("shouts")
    with pytest.raises(DataError, match="changes the reply|does not write a reply out as it is"):
        encode(Encoder(tokenizer), chat("Hi", "Hello"))
    assert trained(Encoder(tokenizer, "all"), chat("Hi", "Hello"))[0].count("HELLO") == 1


def test_a_template_that_refuses_a_conversation(make_tokenizer):
    encoder = Encoder(make_tokenizer("llama2", bos="<s>", adds_bos=True))
    with pytest.raises(DataError, match=r"d\.jsonl:7: the chat template .* refuses.*no system"):
        encode(encoder, chat("Hi", "Hello", system="Be brief"))


def test_a_template_that_is_no_template(make_tokenizer):
    with pytest.raises(DataError, match="refuses the conversation"):
        encode(Encoder(make_tokenizer(None), chat_template="{% for %}"), chat("Hi", "Hello"))


# --------------------------------------------------------------------------- all tokens, texts


def test_all_tokens(tokenizer):
    encoder = Encoder(tokenizer, "all")
    example = chat("Hi", "Hello")
    coded = encode(encoder, example)
    assert (coded.labels[1:] == coded.input_ids[1:]).all() and coded.labels[0] == IGNORE
    assert whole(encoder, example).endswith("Hello<|im_end|>\n")


def test_all_tokens_end_with_eos_where_the_template_has_none(make_tokenizer):
    encoder = Encoder(make_tokenizer("plain"), "all")
    assert whole(encoder, chat("Hi", "Hello")) == "User: Hi\nAssistant: Hello\n</s>"
    assert whole(encoder, chat("Hi")) == "User: Hi\n"  # nobody has answered yet


def test_texts_are_trained_whole_and_end(make_tokenizer):
    encoder = Encoder(make_tokenizer(None))
    coded = encode(encoder, Example("", text="Once upon a time"))
    assert coded.input_ids[-1] == coded.labels[-1] == encoder.eos
    assert coded.labels[0] == IGNORE and (coded.labels[1:] == coded.input_ids[1:]).all()
    ended = encode(encoder, Example("", text="Once</s>"))  # not twice
    assert (ended.input_ids == encoder.eos).sum() == 1 and ended.labels[-1] == encoder.eos


def test_completions(make_tokenizer):
    tokenizer = make_tokenizer(None, bos="<s>", adds_bos=True)
    example = Example("", prompt="The capital is", completion=" Paris")
    assert trained(Encoder(tokenizer), example) == [" Paris</s>"]
    assert trained(Encoder(tokenizer, "all"), example) == ["The capital is Paris</s>"]
    assert whole(Encoder(tokenizer), example) == "<s>The capital is Paris</s>"


def test_a_token_across_the_edge_of_a_reply_is_trained(make_tokenizer):
    """Merged over the edge, the first piece of the reply would be lost otherwise."""
    tokenizer = make_tokenizer(None, merges=200)
    assert tokenizer.tokenize("The capital") == ["The", "Ġcapital"]
    example = Example("", prompt="The ", completion="capital")
    assert trained(Encoder(tokenizer), example) == [" capital</s>"]


# --------------------------------------------------------------------------- EOS


@pytest.mark.parametrize("pad", (None, "<|im_end|>", "<pad>"))
def test_eos_is_trained_whatever_pads(make_tokenizer, pad):
    tokenizer = make_tokenizer("chatml", eos="<|im_end|>", pad=pad)
    coded = encode(Encoder(tokenizer), chat("Hi", "Hello", "And you?", "Fine."))
    ends = coded.input_ids == tokenizer.eos_token_id
    assert ends.sum() == 4 and (coded.labels[ends] != IGNORE).sum() == 2


def test_without_any_end_replies_are_refused(make_tokenizer):
    tokenizer = make_tokenizer("plain", eos=None)
    for encoder in (Encoder(tokenizer), Encoder(tokenizer, "all")):
        with pytest.raises(DataError, match=r"no EOS.*never stop; set tokenizer\.eos_token"):
            encode(encoder, chat("Hi", "Hello"))
        with pytest.raises(DataError, match="no EOS"):
            encode(encoder, Example("", prompt="a", completion="b"))
    # A plain text may go without; a template's own end will do for a reply.
    assert trained(Encoder(tokenizer), Example("", text="abc")) == ["bc"]
    ended = Encoder(make_tokenizer("chatml", eos=None))
    assert trained(ended, chat("Hi", "Hello")) == ["Hello<|im_end|>"]


# --------------------------------------------------------------------------- BOS


def leading(coded, bos: int) -> int:
    return int(np.argmin(np.concatenate([coded.input_ids == bos, [False]])))


@pytest.mark.parametrize("adds_bos", (False, True))
@pytest.mark.parametrize("template", ("llama2", "llama3", "gemma"))
def test_exactly_one_bos_where_template_and_tokenizer_both_add_one(
    make_tokenizer, template, adds_bos
):
    tokenizer = make_tokenizer(template, bos="<s>", adds_bos=adds_bos)
    # The trap: the rendered text, tokenized as any text, has two.
    text = tokenizer.apply_chat_template(chat("Hi", "Hello").messages, tokenize=False)
    twice = np.array(tokenizer(text).input_ids[:2]) == tokenizer.bos_token_id
    assert twice.all() == adds_bos
    encoder = Encoder(tokenizer)
    coded = encode(encoder, chat("Hi", "Hello"))
    assert leading(coded, tokenizer.bos_token_id) == 1 and not coded.bos_fixed
    assert encoder.template == tokenizer.chat_template


def test_a_template_that_forgets_the_bos_gets_one_also_for_chats(make_tokenizer):
    tokenizer = make_tokenizer("chatml", bos="<s>", eos="<|im_end|>", adds_bos=True)
    encoder = Encoder(tokenizer)
    coded = encode(encoder, chat("Hi", "Hello"))
    assert leading(coded, tokenizer.bos_token_id) == 1
    assert trained(encoder, chat("Hi", "Hello")) == ["Hello<|im_end|>"]
    prompt = tokenizer.apply_chat_template(
        chat("Hi").messages, chat_template=encoder.template, add_generation_prompt=True
    )["input_ids"]
    assert prompt == coded.input_ids[: len(prompt)].tolist()  # what a chat will send


def test_a_bos_that_begins_a_turn_is_not_one_too_many(make_tokenizer):
    """SmolLM2's BOS is the token that opens every turn, and its tokenizer adds none."""
    tokenizer = make_tokenizer("chatml", bos="<|im_start|>", eos="<|im_end|>")
    coded = encode(Encoder(tokenizer), chat("Hi", "Hello"))
    assert leading(coded, tokenizer.bos_token_id) == 1
    assert (coded.input_ids == tokenizer.bos_token_id).sum() == 2 and not coded.bos_fixed


@pytest.mark.parametrize("text", ("abc", "<s>abc", "<s><s><s>abc"))
def test_exactly_one_bos_before_a_text(make_tokenizer, text):
    tokenizer = make_tokenizer(None, bos="<s>", adds_bos=True)
    coded = encode(Encoder(tokenizer), Example("", text=text))
    assert leading(coded, tokenizer.bos_token_id) == 1
    assert coded.bos_fixed == text.startswith("<s><s>")
    assert trained(Encoder(tokenizer), Example("", text=text)) == ["abc</s>"]


def test_no_bos_for_tokenizers_that_add_none(make_tokenizer):
    tokenizer = make_tokenizer(None, bos="<s>")
    coded = encode(Encoder(tokenizer), Example("", text="abc"))
    assert leading(coded, tokenizer.bos_token_id) == 0


# --------------------------------------------------------------------------- default template


@pytest.mark.parametrize("adds_bos", (False, True))
def test_models_without_a_template_get_one(make_tokenizer, adds_bos):
    tokenizer = make_tokenizer(None, bos="<s>" if adds_bos else None, adds_bos=adds_bos)
    encoder = Encoder(tokenizer)
    example = chat("Hi", "Hello", "And you?", "Fine.", system="Be brief")
    bos = "<s>" if adds_bos else ""
    assert whole(encoder, example) == (
        f"{bos}Be brief\n\n### Human: Hi\n### Assistant: Hello</s>\n"
        "### Human: And you?\n### Assistant: Fine.</s>\n"
    )
    assert trained(encoder, example) == [" Hello</s>", " Fine.</s>"]
    assert "default" in encoder.origin


def test_what_a_chat_sends_is_what_was_trained(make_tokenizer):
    """The prompt's tokens are the first tokens of the sample, and the reply follows at once."""
    for template in (None, *TURNS):
        settings = TURNS.get(template, ({"bos": "<s>", "adds_bos": True}, 0))[0]
        tokenizer = make_tokenizer(template, **settings)
        encoder = Encoder(tokenizer)
        coded = encode(encoder, chat("Hi", "Hello"))
        prompt = tokenizer.apply_chat_template(
            chat("Hi").messages, chat_template=encoder.template, add_generation_prompt=True
        )["input_ids"]
        assert coded.input_ids[: len(prompt)].tolist() == prompt, template
        first = int(np.argmax(coded.labels != IGNORE))
        between = tokenizer.decode(coded.input_ids[len(prompt) : first])
        assert between.strip() == "", template


def test_a_given_template_replaces_the_tokenizers(make_tokenizer, tokenizer):
    encoder = Encoder(tokenizer, chat_template=make_tokenizer("plain").chat_template)
    assert trained(encoder, chat("Hi", "Hello")) == [" Hello\n<|im_end|>"]
    assert encoder.origin == "the given one"


# --------------------------------------------------------------------------- tokenizers


class Slow:
    """A tokenizer that does not tell where its tokens stand."""

    is_fast = False

    def __init__(self, fast):
        self.fast = fast

    def __getattr__(self, name):
        return getattr(self.fast, name)

    def __call__(self, text, **kwargs):
        assert not kwargs.pop("return_offsets_mapping", False)
        return self.fast(text, **kwargs)


@pytest.mark.parametrize("template", TURNS)
def test_tokenizers_without_places(make_tokenizer, template):
    fast = make_tokenizer(template, **TURNS[template][0])
    for example in (chat("Hi", "Hello"), chat("Hi", "Hello", "And you?", "Fine."), chat("Hi")):
        expected, got = encode(Encoder(fast), example), encode(Encoder(Slow(fast)), example)
        assert (got.input_ids == expected.input_ids).all()
        assert (got.labels == expected.labels).all()


def test_many_are_encoded_as_each_alone(tokenizer):
    encoder = Encoder(tokenizer)
    examples = [chat(f"Say {i}", f"Word {i} " * (i % 5 + 1)) for i in range(2100)]
    for example, coded in zip(examples, encoder.encode(examples), strict=True):
        if int(re.findall(r"\d+", example.messages[0]["content"])[0]) % 300 == 0:
            alone = encode(encoder, example)
            assert (coded.input_ids == alone.input_ids).all()
            assert (coded.labels == alone.labels).all()
