"""`qlora chat`: a tiny random model and an adapter that answer, piece by piece."""

from __future__ import annotations

import io
import itertools
import json
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch
from rich.console import Console

from qlora_kernels import chat, cli
from qlora_kernels.finetune.errors import BadInput, RunError


def make_adapter(model: Path, folder: Path, r: int = 4, seed: int = 1) -> Path:
    """An adapter of ``model`` that changes what it says."""
    from peft import LoraConfig, get_peft_model

    from qlora_kernels.integrations.transformers import load_quantized_model

    torch.manual_seed(seed)
    base = load_quantized_model(model, dtype=torch.float32)
    base.name_or_path = str(model)
    lora = LoraConfig(r=r, target_modules="all-linear", task_type="CAUSAL_LM",
                      init_lora_weights=False)  # fmt: skip
    get_peft_model(base, lora).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tiny_model, tmp_path_factory) -> Path:
    return make_adapter(tiny_model, tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module")
def loaded(adapter):
    return chat.load(None, str(adapter), dtype="float32")


@pytest.fixture
def talk(loaded):
    """``talk(**settings)``: a conversation with the model and the adapter."""

    def make(system=None, **settings):
        return chat.Conversation(*loaded, system, **{"max_new_tokens": 12, **settings})

    return make


# --- loading ------------------------------------------------------------------------------------


def test_the_base_model_is_the_adapters_and_is_quantized(loaded, tiny_model):
    from qlora_kernels.nn import Linear4bit

    model, tokenizer = loaded
    quantized = [m for m in model.modules() if isinstance(m, Linear4bit)]
    assert len(quantized) == 14 and not model.training
    assert tokenizer.chat_template


def test_a_model_alone_dense_or_in_a_format(tiny_model):
    from qlora_kernels.nn import Linear4bit

    dense, _ = chat.load(str(tiny_model), quant_type="none", dtype="float32")
    assert not [m for m in dense.modules() if isinstance(m, Linear4bit)]
    fp4, _ = chat.load(str(tiny_model), quant_type="fp4", dtype="float32")
    assert {m.quant_type for m in fp4.modules() if isinstance(m, Linear4bit)} == {"fp4"}


def test_the_adapters_own_tokenizer_and_template_are_used(adapter, tiny_model, tmp_path):
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    for path in tiny_model.glob("*token*"):
        shutil.copy(path, folder)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    _, tokenizer = chat.load(None, str(folder), dtype="float32")
    words = [{"role": "user", "content": "abc"}]
    assert tokenizer.apply_chat_template(words, tokenize=False) == "abc"


def break_adapter(folder, how):
    config = folder / "adapter_config.json"
    if how == "absent":
        shutil.rmtree(folder)
    elif how == "no configuration":
        config.unlink()
    elif how == "no weights":
        (folder / "adapter_model.safetensors").unlink()
    elif how == "half a configuration":
        config.write_text(config.read_text()[:40])
    elif how == "truncated":
        file = folder / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:-50])
    elif how == "another rank":
        values = json.loads(config.read_text())
        config.write_text(json.dumps({**values, "r": 9}))
    elif how == "a run that is not finished":
        (folder / "checkpoint-3").mkdir()
        config.rename(folder / "checkpoint-3" / config.name)


@pytest.mark.parametrize(
    "how, told",
    [
        ("absent", "holds no adapter_config.json"),
        ("no configuration", "holds no adapter_config.json"),
        ("no weights", "holds no adapter_model.safetensors"),
        ("half a configuration", "adapter_config.json cannot be read"),
        ("truncated", "the adapter"),
        ("another rank", "the adapter"),
        ("a run that is not finished", "there is checkpoint-3 in it"),
    ],
)
def test_an_adapter_that_cannot_be_used(adapter, tmp_path, how, told):
    folder = Path(shutil.copytree(adapter, tmp_path / "broken"))
    break_adapter(folder, how)
    with pytest.raises(BadInput) as caught:
        chat.load(None, str(folder), dtype="float32")
    assert told in str(caught.value) and str(folder) in str(caught.value)


def test_an_adapter_of_another_model(adapter, tmp_path, make_tiny_model):
    other = make_tiny_model(tmp_path / "other", hidden_size=32)
    with pytest.raises(BadInput, match="the adapter"):
        chat.load(str(other), str(adapter), dtype="float32")


def test_models_that_cannot_be_used(tiny_model, tmp_path):
    with pytest.raises(BadInput, match="--model, --adapter, or both"):
        chat.load(None, None)
    with pytest.raises(BadInput, match="/nowhere/at/all"):
        chat.load("/nowhere/at/all")
    with pytest.raises(BadInput, match="nf5"):
        chat.load(str(tiny_model), quant_type="nf5")
    with pytest.raises(BadInput, match="float17"):
        chat.load(str(tiny_model), dtype="float17")
    with pytest.raises(BadInput, match="float17"):
        chat.load(str(tiny_model), quant_type="none", dtype="float17")
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (folder / "model.safetensors").unlink()
    for quant_type in ("nf4", "none"):
        with pytest.raises(BadInput, match=str(folder)):
            chat.load(str(folder), quant_type=quant_type)


# --- a conversation -----------------------------------------------------------------------------


def greedy(model, tokenizer, messages, count):
    """The likeliest reply, token by token without a cache."""
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    start = ids.shape[1]
    for _ in range(count):
        with torch.no_grad():
            word = model(input_ids=ids).logits[0, -1].argmax()
        ids = torch.cat([ids, word.view(1, 1)], 1)
        if word == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True)


def test_a_reply_is_the_likeliest_one_and_is_remembered(talk, loaded):
    conversation = talk()
    first = "".join(conversation.reply("What is it?"))
    question = [{"role": "user", "content": "What is it?"}]
    assert first == greedy(*loaded, question, 12) != ""
    assert conversation.messages == [*question, {"role": "assistant", "content": first}]
    second = "".join(conversation.reply("And now?"))
    whole = [*conversation.messages[:2], {"role": "user", "content": "And now?"}]
    assert second == greedy(*loaded, whole, 12)


def test_pieces_come_while_it_is_generated(talk, loaded, monkeypatch):
    """The first piece is there before the last token is made."""
    model, tokenizer = loaded
    made = []
    real = type(model).generate
    first_piece = threading.Event()

    def generate(self, *args, stopping_criteria, **kwargs):
        def count(ids, scores, **more):
            made.append(ids.shape[1])
            if len(made) == 40:
                first_piece.wait(20)
            return torch.zeros(1, dtype=torch.bool)

        return real(self, *args, stopping_criteria=[*stopping_criteria, count], **kwargs)

    monkeypatch.setattr(type(model), "generate", generate)
    # Nothing ends the reply, and every token prints: bytes of ASCII letters, split at blanks.
    letters = [tokenizer.convert_tokens_to_ids(c) for c in "abĠ"]
    turn = itertools.cycle(letters)
    monkeypatch.setattr(
        type(model.get_output_embeddings()),
        "forward",
        lambda self, x: torch.nn.functional.one_hot(
            torch.full(x.shape[:-1], next(turn)), 272
        ).float(),
    )
    reply = talk(max_new_tokens=60).reply("go on")
    pieces = [next(reply)]
    first_piece.set()
    assert len(made) <= 40
    pieces += list(reply)
    assert "".join(pieces) == "ab " * 20 and len(pieces) > 10


def test_a_reply_that_is_left_early_is_kept_as_far_as_it_came(talk):
    conversation = talk(max_new_tokens=200)
    before = threading.active_count()
    reply = conversation.reply("go on")
    said = next(piece for piece in reply if piece)
    reply.close()
    assert threading.active_count() == before, "generation goes on"
    (_, last) = conversation.messages
    assert last["role"] == "assistant" and last["content"].endswith(said)


def test_with_and_without_the_adapter(talk, loaded, tiny_model):
    conversation = talk()
    on = "".join(conversation.reply("hello"))
    conversation.reset()
    conversation.adapter_on = False
    off = "".join(conversation.reply("hello"))
    base, tokenizer = chat.load(str(tiny_model), dtype="float32")
    alone = chat.Conversation(base, tokenizer, max_new_tokens=12)
    assert off == "".join(alone.reply("hello")) != on
    assert chat.answers(*loaded, ["hello", "hello"], 12) == [on.strip()] * 2


def test_a_system_message_and_a_model_without_a_template(talk, loaded):
    with_system = talk("Be brief.")
    text = "".join(with_system.reply("hello"))
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    assert text == greedy(*loaded, messages, 12)
    _, tokenizer = loaded
    template, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        conversation = talk()
        conversation.messages.append({"role": "user", "content": "abc"})
        ids, dropped = conversation._prompt()
        assert tokenizer.decode(ids[0]) == "abc" and dropped == 0
        assert isinstance("".join(talk().reply("abc")), str)
    finally:
        tokenizer.chat_template = template


def test_old_turns_leave_so_that_the_reply_fits(talk):
    """The model takes 256 tokens."""
    conversation = talk(max_new_tokens=40)
    for number in range(8):
        conversation.messages += [
            {"role": "user", "content": f"question {number} " + "x" * 20},
            {"role": "assistant", "content": "y" * 20},
        ]
    conversation.messages.append({"role": "user", "content": "the last"})
    ids, dropped = conversation._prompt()
    assert ids.shape[1] <= 256 - 40 and dropped % 2 == 0 and dropped > 0
    text = conversation.tokenizer.decode(ids[0])
    assert f"question {dropped // 2} " in text and "question 0" not in text
    assert text.endswith("assistant\n") and "the last" in text


def test_draws_are_seeded_and_a_temperature_draws(talk):
    replies = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        replies.append("".join(talk(temperature=5.0, top_p=1.0).reply("hello")))
    assert replies[0] == replies[1] != replies[2]


def test_a_generation_that_fails_is_told_where_somebody_sees_it(talk, monkeypatch, loaded):
    def generate(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(type(loaded[0]), "generate", generate)
    with pytest.raises(RunError, match="generation failed: out of memory"):
        list(talk().reply("hello"))


# --- in the terminal ----------------------------------------------------------------------------


def session(conversation, *lines) -> str:
    screen = io.StringIO()
    assert chat._talk(conversation, Console(file=screen, width=200), iter(lines)) == 0
    return screen.getvalue()


def test_what_is_typed(talk):
    conversation = talk()
    said = session(conversation, "", "hello", "/retry", "/adapter off", "/help", "/bogus", "/exit",
                   "not reached")  # fmt: skip
    assert [m["content"] for m in conversation.messages if m["role"] == "user"] == ["hello"]
    reply = conversation.messages[1]["content"]
    assert said.count(reply) == 2  # and again
    assert "adapter off" in said and conversation.adapter_on is False
    assert "there is no command /bogus" in said
    for command in ("/reset", "/system", "/adapter", "/retry", "/help", "/exit"):
        assert command in chat._COMMANDS and command in said
    session(conversation, "/system Be brief.")
    assert conversation.system == "Be brief." and conversation.messages == []
    session(conversation, "/system", "/adapter on")
    assert conversation.system is None and conversation.adapter_on
    assert "nothing has been asked yet" in session(talk(), "/retry")


def test_markup_in_a_reply_is_text(talk, monkeypatch):
    conversation = talk()
    monkeypatch.setattr(conversation, "reply", lambda message: iter(["[bold]a[/bold]", " [/x]"]))
    assert session(conversation, "hello") == "[bold]a[/bold] [/x]\n"


def test_ctrl_c_stops_a_reply_and_not_the_chat(talk, monkeypatch):
    conversation = talk()

    def reply(message):
        yield "so far"
        raise KeyboardInterrupt

    monkeypatch.setattr(conversation, "reply", reply)
    assert session(conversation, "one", "two").count("so far (stopped)\n") == 2


def test_one_message_from_the_command_line(adapter, capsys, talk):
    words = ["--adapter", str(adapter), "--dtype", "float32", "--max_new_tokens", "12"]
    assert cli.main(["chat", *words, "--prompt", "hello"]) == 0
    assert capsys.readouterr().out == "".join(talk().reply("hello")) + "\n"


def test_lines_from_a_pipe(adapter, capsys, monkeypatch, talk):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n/reset\nhello\n"))
    words = ["--adapter", str(adapter), "--dtype", "float32", "--max_new_tokens", "12"]
    assert cli.main(["chat", *words]) == 0
    assert capsys.readouterr().out == ("".join(talk().reply("hello")) + "\n") * 2


@pytest.mark.parametrize(
    "words, told",
    [
        ([], "give --model, --adapter, or both"),
        (["--model", "m", "--max_new_tokens", "0"], "max_new_tokens is 0"),
        (["--model", "m", "--temperature", "-1"], "temperature is -1"),
        (["--model", "m", "--top_p", "0"], "top_p is 0"),
        (["--model", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--adapter", "/nowhere/at/all"], "/nowhere/at/all"),
    ],
)
def test_words_that_cannot_be(capsys, words, told):
    assert cli.main(["chat", *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and told in err and len(err.splitlines()) == 1


def test_signals_are_left_as_they_were(talk):
    before = signal.getsignal(signal.SIGINT)
    list(talk().reply("hello"))
    assert signal.getsignal(signal.SIGINT) is before
