"""`qlora generate`: seeds a question, batches, resumes, endpoints, files, forms of questions."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch

from qlora_kernels import chat, cli
from qlora_kernels.evaluate import (
    generate_local,
    generate_questions,
    generate_sources,
    judge_client,
    records,
    stand_in,
)
from qlora_kernels.evaluate.generate_local import Sampler, Sampling
from qlora_kernels.evaluate.records import Question
from qlora_kernels.finetune.errors import BadInput

VICUNA = Path(__file__).resolve().parents[3] / "shared" / "data" / "vicuna_questions.jsonl"


def ask(n=7):
    return [Question(i, ("why? " * (1 + 3 * i % 11),), "general") for i in range(n)]


@pytest.fixture(scope="module")
def loaded(tiny_model):
    return chat.load(str(tiny_model), dtype="float32")


@pytest.fixture
def sampler(loaded):
    return lambda **settings: Sampler(*loaded, Sampling(**{"max_new_tokens": 10, **settings}))


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    records.write_records(path, ask())
    return path


@pytest.fixture
def run(questions, tmp_path, tiny_model, capsys, monkeypatch):
    """``run(*words, model=...)``: the exit code; ``run.text`` what it said."""
    monkeypatch.setattr(judge_client.Endpoint, "backoff", 0.01)
    output = tmp_path / "replies.jsonl"

    def call(*words, model=f"ours={tiny_model},dtype=float32"):
        models = [model] if isinstance(model, str) else model
        code = cli.main(["generate", *(w for m in models for w in ("--model", m)),
                         "--questions", str(questions), "--output", str(output),
                         "--max_new_tokens", "6", "--batch_size", "3", *words])  # fmt: skip
        out, err = capsys.readouterr()
        call.text = out + err
        return code

    call.output = output
    call.read = lambda: records.read_replies(output)
    return call


# --- draws --------------------------------------------------------------------------------------


def test_gumbel_draws_are_draws_from_the_softmax():
    """Each row has its own generator; frequencies are the probabilities."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -float("inf")])
    n = 4000
    drawn = generate_local._Draw(range(n))(None, logits.expand(n, -1)).argmax(1)
    share = torch.bincount(drawn, minlength=5) / n
    want = logits.softmax(0)
    error = (want * (1 - want) / n).sqrt()
    assert ((share - want).abs() <= 4 * error + 1e-9).all() and share[4] == 0


def test_a_replys_draws_do_not_depend_on_the_batch(sampler):
    """fp32 on a tiny model: alone, among others, in another order, the same words."""
    questions = ask(5)
    s = sampler()
    together = [r[0] for r in s.reply(questions, seed=3)]
    alone = [s.reply([q], seed=3)[0][0] for q in questions]
    backwards = [r[0] for r in s.reply(questions[::-1], seed=3)][::-1]
    assert together == alone == backwards
    assert together != [r[0] for r in s.reply(questions, seed=4)]
    assert len(set(together)) > 1


def test_temperature_zero_is_chats_likeliest_reply(sampler, loaded):
    questions = [Question(i, (text,)) for i, text in enumerate(["hello", "what is this?"])]
    got = [r[0] for r in sampler(temperature=0, max_new_tokens=12).reply(questions, 0)]
    assert got == chat.answers(*loaded, [q.turns[0] for q in questions], 12)


def test_the_nucleus_is_cut(sampler):
    """With a nucleus of next to nothing only the likeliest token is left, whatever the noise."""
    questions = ask(3)
    greedy = sampler(temperature=0).reply(questions, 0)
    assert sampler(top_p=1e-6).reply(questions, 5) == greedy
    assert sampler(top_p=1.0).reply(questions, 5) != greedy


def test_replies_end_at_the_end_token_a_stop_text_or_their_longest(sampler, loaded):
    s = sampler()
    end = loaded[1].eos_token_id
    ids = loaded[1]("abcdef")["input_ids"]
    assert s._text([*ids, end, end], [end], 9) == ("abcdef", "stop", 6)
    assert s._text(ids, [end], 6) == ("abcdef", "length", 6)
    stopped = sampler(stop=("cd", "e"))
    assert stopped._text(ids, [end], 6) == ("ab", "stop", 6)
    full = sampler().reply(ask(2), 1)
    assert all(r[1] == "length" and r[2] == 10 for r in full)
    text = full[0][0]
    middle = text[len(text) // 2]
    cut = sampler(stop=(middle,)).reply(ask(2), 1)[0]
    assert cut[0] == text[: text.index(middle)].strip() and cut[1] == "stop"


def test_turns_are_asked_one_after_another(sampler):
    question = Question("t", ("first", "second"), history=({"role": "user", "content": "hm"},))
    s = sampler()
    ((text, _, _, history),) = s.reply([question], 0)
    first = history[2]["content"]
    assert [m["role"] for m in history] == ["user", "user", "assistant"]
    # The second turn's reply is that to the whole conversation.
    prompt = s.prompt([*history, {"role": "user", "content": "second"}])
    seed = generate_local.reply_seed(0, "t", 1)
    assert s._batch([prompt], [seed], [question])[0][0] == text
    assert first == s._batch(
        [s.prompt([*question.history, {"role": "user", "content": "first"}])],
        [generate_local.reply_seed(0, "t", 0)], [question],
    )[0][0]  # fmt: skip


def test_the_system_message_and_a_model_without_a_template(sampler, loaded, monkeypatch):
    user = [{"role": "user", "content": "hi"}]
    with_system = loaded[1].decode(sampler(system="Be brief.").prompt(user))
    assert "system\nBe brief." in with_system and with_system.endswith("assistant\n")
    monkeypatch.setattr(loaded[1], "chat_template", None)
    assert loaded[1].decode(sampler(system="Be brief.").prompt(user)) == "Be brief.\nhi"


def test_batches_are_of_like_lengths_and_turns():
    questions = [Question(i, ("a",) * (1 + (i == 2))) for i in range(6)]
    got = generate_local.batches(questions, [5, 9, 3, 7, 5, 1], 2)
    assert got == [[2], [1, 3], [0, 4], [5]]


def test_what_is_too_long_is_named_before_anything_starts(sampler):
    long = Question("big", ("x" * 300,))
    with pytest.raises(BadInput, match="question big has .* tokens, the model takes 256"):
        sampler().lengths([*ask(2), long])
    # A long prompt leaves less room than was asked for.
    q = Question(1, ("x" * 220,))
    s = sampler(max_new_tokens=100)
    (reply,) = s.reply([q], 0)
    assert reply[1:3] == ("length", 256 - s.lengths([q])[0])


def test_seeds_differ_and_say_which_question():
    seeds = {generate_local.reply_seed(s, q, t) for s in (0, 1) for q in (1, "2") for t in (0, 1)}
    assert len(seeds) == 8 and all(0 <= s < 2**32 for s in seeds)
    assert generate_local.reply_seed(0, 1) == generate_local.reply_seed(0, "1")


# --- the command --------------------------------------------------------------------------------


def test_a_whole_run_and_its_record(run, tiny_model):
    assert run() == 0
    replies = run.read()
    assert sorted(r.question_id for r in replies) == list(range(7))
    first = replies[0]
    assert first.model == "ours" and first.category == "general"
    assert first.seed == generate_local.reply_seed(0, first.question_id)
    assert first.sampling == {
        "temperature": 0.7, "top_p": 0.9, "max_new_tokens": 6, "run_seed": 0, "batch_size": 3,
        "source": str(tiny_model), "quant_type": "nf4", "dtype": "float32", "finish": "length",
        "tokens": 6,
    }  # fmt: skip
    assert "of 7 replies 7 cut off" in run.text
    before = run.output.read_bytes()
    assert run() == 0 and "7 of 7 there" in run.text
    assert run.output.read_bytes() == before


def test_a_killed_run_resumes_to_the_same_file(run, monkeypatch):
    """Killed between batches, within one, and within a line."""
    monkeypatch.setattr(chat, "load", functools.cache(chat.load))
    assert run() == 0
    whole = run.output.read_bytes()
    for lines in (1, 3, 4, 6):
        kept = b"".join(whole.splitlines(keepends=True)[:lines])
        run.output.write_bytes(kept + b'{"schema": 1, "question_id": 99, "mod')
        assert run() == 0 and "half-written" in run.text
        assert run.output.read_bytes() == whole


def test_two_models_and_an_adapter(run, tiny_model, tmp_path):
    from peft import LoraConfig, get_peft_model

    from qlora_kernels.integrations.transformers import load_quantized_model

    torch.manual_seed(1)
    base = load_quantized_model(tiny_model, dtype=torch.float32)
    base.name_or_path = str(tiny_model)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM",
                      init_lora_weights=False)  # fmt: skip
    get_peft_model(base, lora).save_pretrained(tmp_path / "adapter")
    tuned = f"tuned={tiny_model},adapter={tmp_path / 'adapter'},dtype=float32"
    alone = f"alone=adapter={tmp_path / 'adapter'},dtype=float32"
    assert run("--limit", "2", model=[f"base={tiny_model},dtype=float32", tuned, alone]) == 0
    by_model = {}
    for r in run.read():
        by_model.setdefault(r.model, []).append(r.reply)
    assert by_model["base"] != by_model["tuned"] == by_model["alone"]
    assert run.read()[-1].sampling["adapter"] == str(tmp_path / "adapter")


def test_replies_drawn_in_another_way_are_not_mixed(run, tiny_model):
    assert run("--limit", "2") == 0
    before = run.output.read_bytes()
    assert run("--temperature", "1") == 2
    assert "replies of ours with temperature 0.7, now it is 1.0" in run.text
    assert run("--seed", "5") == 2 and "run_seed 0, now it is 5" in run.text
    assert run.output.read_bytes() == before
    assert run("--seed", "5", "--overwrite", "--limit", "1") == 0
    assert len(run.read()) == 1 and run.read()[0].sampling["run_seed"] == 5


def test_another_list_of_questions_is_noticed(run, questions):
    assert run("--limit", "2") == 0
    records.write_records(questions, [Question(0, ("something else",))])
    assert run() == 2 and "another question 0 than the list" in run.text


def test_a_template_of_the_users(run, tmp_path):
    template = tmp_path / "t.jinja"
    template.write_text("{{ raise_exception('no such thing') }}")
    assert run("--chat_template", str(template)) == 2
    assert "template refuses a conversation: no such thing" in run.text
    template.write_text("{% for m in messages %}### {{ m.content }}{% endfor %}")
    assert run("--chat_template", str(template), "--limit", "1") == 0
    assert run("--chat_template", str(tmp_path / "none")) == 2 and "cannot be read" in run.text


# --- endpoints ----------------------------------------------------------------------------------


def test_replies_of_an_endpoint(run, questions):
    bodies = []

    def answer(body):
        bodies.append(body)
        return f" reply to {body['messages'][-1]['content']} "

    two_turns = Question("t", ("first", "second"))
    records.write_records(questions, [*ask(3), two_turns])
    with stand_in.StandIn(answer) as server:
        words = ("--system", "Be kind.", "--stop", "###", "--seed", "4")
        assert run(*words, model=f"far={server.url},model=big") == 0
        assert len(bodies) == 5
        assert run(*words, model=f"far={server.url},model=big") == 0 and len(bodies) == 5
    body = next(b for b in bodies if b["messages"][-1]["content"] == "second")
    assert [m["content"] for m in body["messages"]] == [
        "Be kind.", "first", "reply to first", "second",
    ]  # fmt: skip
    assert (body["model"], body["temperature"], body["top_p"]) == ("big", 0.7, 0.9)
    assert body["seed"] == generate_local.reply_seed(4, "t", 1) and body["stop"] == ["###"]
    last = next(r for r in run.read() if r.question_id == "t")
    assert (last.reply, last.question) == ("reply to second", "second")
    assert [m["content"] for m in last.history] == ["first", "reply to first"]
    assert last.sampling["served_as"] == "big" and last.sampling["finish"] == "stop"


def test_an_endpoint_that_fails_once_and_for_all(run, questions):
    refused = []

    class Picky(stand_in._Handler):
        def complete(self, body):
            if len(refused) < 1 and body["messages"][-1]["content"].count("why?") == 4:
                refused.append(body)
                self.reply(400, {"error": {"message": "bad words"}})
            else:
                super().complete(body)

    with stand_in.StandIn(lambda body: "fine") as server:
        server.RequestHandlerClass = Picky
        assert run(model=f"far={server.url}") == 1
        assert "1 of 7 questions have no reply" in run.text and "bad words" in run.text
        assert len(run.read()) == 6
        assert run(model=f"far={server.url}") == 0 and len(run.read()) == 7


# --- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        {"question_id": 0, "model_id": "m", "choices": [{"index": 0, "turns": ["hm", "said"]}]},
        {"question_id": "0", "text": "why? ", "prompt": "…", "generation": "said"},
        {"question_id": 0, "text": "said", "answer_id": "x", "model_id": "m"},
        {"question_id": 0, "output": "said"},
    ],
)
def test_files_of_replies_in_every_form(run, tmp_path, row):
    path = tmp_path / "theirs.jsonl"
    path.write_text(json.dumps(row) + "\n")
    assert run("--limit", "1", model=f"theirs={path}") == 0
    (reply,) = run.read()
    assert (reply.reply, reply.model, reply.question) == ("said", "theirs", "why? ")
    assert reply.question_id == 0 and reply.sampling == {"source": "theirs.jsonl"}


def test_one_models_replies_out_of_a_file_of_ours(run, tmp_path):
    path = tmp_path / "theirs.jsonl"
    rows = [
        records.Reply(q.question_id, m, q.turns[0], f"{m} {q.question_id}", q.category, 7, {"a": 1})
        for q in ask(2)
        for m in ("x", "y")
    ]
    records.write_records(path, rows)
    assert run("--limit", "2", model=f"y={path}") == 0
    assert [(r.reply, r.seed, r.sampling["a"]) for r in run.read()] == [
        ("y 0", 7, 1),
        ("y 1", 7, 1),
    ]
    assert run("--limit", "2", model=f"z={path}") == 2 and "replies of x, y; none is" in run.text
    assert run(model=[f"y={path}", f"x={path}"]) == 2
    assert "has no reply to 5 of 7 questions: 2, 3, 4, 5, 6" in run.text
    records.write_records(path, [records.Reply(0, "x", "another", "r")])
    assert run("--limit", "1", model=f"x={path}") == 2
    assert "another one than in the list" in run.text
    path.write_text('{"question_id": 0, "foo": 1}\n')
    assert run("--limit", "1", model=f"w={path}") == 2 and "no reply (reply, gene" in run.text
    path.write_text('{"question_id": 0, "reply": "a"}\n' * 2)
    assert run("--limit", "1", model=f"w={path}") == 2
    assert "a second reply to question 0" in run.text


# --- forms of questions -------------------------------------------------------------------------


def message(name, parent, role, text, **more):
    return {"message_id": name, "parent_id": parent, "role": role, "text": text, **more}


FLAT = [
    message("a", None, "prompter", "Hi"),
    message("b", "a", "assistant", "Hello"),
    message("c", "b", "prompter", "And?"),
    message("d", "a", "assistant", "Go", deleted=True),
    message("e", "d", "prompter", "Why?"),
]


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def test_open_assistants_trees_and_messages_are_the_same_questions(tmp_path):
    c, e = ({k: v for k, v in m.items() if k != "parent_id"} for m in (FLAT[2], FLAT[4]))
    tree = {
        "message_tree_id": "a",
        "prompt": {
            **FLAT[0],
            "replies": [{**FLAT[1], "replies": [c]}, {**FLAT[3], "replies": [e]}],
        },
    }
    want = [
        Question("a", ("Hi",)),
        Question("c", ("And?",), None, ({"role": "user", "content": "Hi"},
                                        {"role": "assistant", "content": "Hello"})),
    ]  # fmt: skip
    assert generate_questions.read(write(tmp_path / "flat.jsonl", FLAT)) == want
    assert generate_questions.read(write(tmp_path / "trees.jsonl", [tree])) == want
    assert generate_questions.read(tmp_path / "flat.jsonl", limit=1) == want[:1]


def test_qloras_open_assistant_questions(tmp_path):
    text = "### Human: Hi ### Assistant: Hello\n### there ### Human: And? ### Assistant:"
    row = {"question_id": "q", "category": "generic", "text": text, "message_id": "q"}
    (question,) = generate_questions.read(write(tmp_path / "q.jsonl", [row]))
    assert question.turns == ("And?",) and question.category == "generic"
    assert [m["content"] for m in question.history] == ["Hi", "Hello\n### there"]
    with pytest.raises(BadInput, match="question q: no turn of the user"):
        row["text"] = "### Human: ### Assistant: x"
        generate_questions.read(write(tmp_path / "q.jsonl", [row]))


@pytest.mark.skipif(not VICUNA.is_file(), reason="Vicuna's questions are not beside the repository")
def test_vicunas_questions():
    assert len(generate_questions.read(VICUNA)) == 80


@pytest.mark.parametrize(
    "rows, told",
    [
        (
            [message("a", "x", "prompter", "t")],
            "q.jsonl:1: message a follows x, which is not",
        ),
        ([message("a", "b", "prompter", "t"), message("b", "a", "assistant", "t")], "in a circle"),
        ([message("a", None, "bot", "t")], "role is 'bot'"),
        ([message("a", None, "prompter", 3)], "needs message_id and text"),
        ([FLAT[0], FLAT[0]], "q.jsonl:2: message a is there already"),
        ([message("a", None, "assistant", "t")], "holds no question"),
        ([message("a", None, "prompter", " ")], "message a is empty"),
        ([{"prompt": {"message_id": "a"}}], "needs message_id and text"),
        ([{"question_id": 1, "text": "a"}, {"question_id": 1, "text": "b"}], "there already"),
    ],
)
def test_questions_that_cannot_be(tmp_path, rows, told):
    with pytest.raises(BadInput) as caught:
        generate_questions.read(write(tmp_path / "q.jsonl", rows))
    assert told in str(caught.value)


# --- words --------------------------------------------------------------------------------------


def test_models_are_named_in_three_ways(tmp_path):
    parse = generate_sources.parse
    assert parse("a=/m,adapter=/x,quant_type=fp4") == generate_sources.Source(
        "a", "local", "/m", "/x", "fp4"
    )
    assert parse("a=/m\\,n").place == "/m,n"
    assert parse("a=http://h/v1").model == "a" and parse("a=http://h/v1,model=b").model == "b"
    assert parse("a=r.jsonl").kind == "file"
    folder = tmp_path / "odd.json"
    folder.mkdir()
    assert parse(f"a={folder}").kind == "local"
    assert parse("a=adapter=/x") == generate_sources.Source("a", "local", "", "/x")


@pytest.mark.parametrize(
    "word, told",
    [
        ("model", "expected NAME=FOLDER"),
        ("=x", "expected NAME=FOLDER"),
        ("a=x,adaptor=y", "no option 'adaptor'; did you mean adapter?"),
        ("a=x,adapter=y,adapter=z", "adapter is given twice"),
        ("a=x,model=y", "model says nothing about a model here"),
        ("a=http://h/v1,adapter=y", "adapter says nothing about a model behind an endpoint"),
        ("a=r.jsonl,dtype=bf16", "dtype says nothing about a file of replies"),
    ],
)
def test_words_for_models_that_cannot_be(run, word, told):
    assert run(model=word) == 2 and told in run.text and not run.output.exists()


@pytest.mark.parametrize(
    "words, told",
    [
        (["--temperature", "-1"], "temperature is -1"),
        (["--top_p", "0"], "top_p is 0"),
        (["--max_new_tokens", "0"], "max_new_tokens is 0"),
        (["--batch_size", "0"], "batch_size is 0"),
        (["--stop", ""], "a stop text is empty"),
        (["--model", "ours=/x"], "two models are called ours"),
        (["--questions", "/nowhere.jsonl"], "/nowhere.jsonl does not exist"),
    ],
)
def test_words_that_cannot_be(run, words, told):
    assert run(*words) == 2
    assert told in run.text and len(run.text.splitlines()) == 1 and not run.output.exists()


def test_a_model_that_is_not_there(run, tmp_path):
    assert run(model=f"a={tmp_path / 'none'}") == 2 and str(tmp_path / "none") in run.text
