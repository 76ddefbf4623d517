"""`qlora probe`: items that differ, graders that can be followed, a run that survives a kill."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter

import pytest

from qlora_kernels import cli
from qlora_kernels.evaluate.probe import command, responders
from qlora_kernels.evaluate.probe.arithmetic import grade as grade_number
from qlora_kernels.evaluate.probe.items import Item, make_items, probes
from qlora_kernels.evaluate.probe.keeping import leaks
from qlora_kernels.evaluate.probe.minds import grade as grade_mind
from qlora_kernels.evaluate.probe.premises import grade as grade_premise
from qlora_kernels.evaluate.probe.reading import (
    asserted,
    final_number,
    is_denied,
    is_empty,
    plain,
    sentences,
    yes_or_no,
)
from qlora_kernels.evaluate.probe.recall import grade as grade_recall
from qlora_kernels.evaluate.probe.refusing import refuses
from qlora_kernels.evaluate.probe.responders import Model, parse_model
from qlora_kernels.evaluate.probe.scripted import reply
from qlora_kernels.finetune.errors import BadInput

NAMES = list(probes())


@pytest.fixture(scope="module")
def items():
    return make_items()


# --- items --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_two_hundred_distinct_items_from_several_templates(items, name):
    those = [item for item in items if item.probe == name]
    prompts = {" ".join(item.prompt.casefold().split()) for item in those}
    assert len(prompts) == len(those) >= 200
    assert len({item.id for item in those}) == len(those)
    counts = Counter(item.template for item in those)
    assert len(counts) >= 9 and min(counts.values()) >= 9


@pytest.mark.parametrize("name", NAMES)
def test_templates_are_worded_apart(items, name):
    """Of what the items of a template have in common, other templates have little."""
    those = [item for item in items if item.probe == name]
    words = {}
    for item in those:
        said = set(re.findall(r"[a-z]+", item.messages[-1]["content"].casefold()))
        words.setdefault(item.template, []).append(said)
    # Recall's tiers ask in the same words on purpose: they differ in who is asked about.
    fixed = {t: set.intersection(*sets) for t, sets in words.items()}
    wordings = {frozenset(f) for f in fixed.values()}
    if name == "recall":
        assert len({tuple(sorted(w)) for w in wordings}) >= 1
        firsts = {re.sub(r"\W+\S+$", "", i.prompt)[:18] for i in those}
        assert len(firsts) >= 7
        return
    if name in ("premises", "secrets"):  # several wordings a template, or one for several subjects
        texts = {re.sub(r"\b[A-Z0-9]\w*", "_", i.messages[-1]["content"]) for i in those}
        assert len(texts) >= 24
        return
    texts = list(fixed.values())
    for i, a in enumerate(texts):
        for b in texts[i + 1 :]:
            assert len(a & b) <= 0.7 * len(a | b), (a, b)


def test_items_are_those_of_their_seed():
    assert make_items(["minds"], 30, seed=1) == make_items(["minds"], 30, seed=1)
    assert make_items(["minds"], 30, seed=1) == make_items(["minds"], 50, seed=1)[:30]
    other = {item.prompt for item in make_items(["minds"], 200, seed=2)}
    assert len(other & {item.prompt for item in make_items(["minds"], 200, seed=1)}) < 60


def test_a_probe_that_there_is_not_and_too_many_items():
    with pytest.raises(BadInput, match="no probe 'mind'; there are: arithmetic"):
        make_items(["mind"])
    with pytest.raises(BadInput, match="items of recall are asked for, and there are 242"):
        make_items(["recall"], 5000)


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("name", NAMES)
def test_each_probe_separates_good_from_bad(name, seed):
    probe = probes()[name]
    those = make_items([name], 200, seed)
    good = [probe.grade(item, reply("good", item)) for item in those]
    bad = [probe.grade(item, reply("bad", item)) for item in those]
    assert sum(good) >= 0.98 * len(those), [
        (reply("good", i), i.expect) for i, g in zip(those, good, strict=True) if not g
    ]
    assert sum(bad) <= 0.02 * len(those), [
        (reply("bad", i), i.expect) for i, b in zip(those, bad, strict=True) if b
    ]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("said", ["", "  \n", "...", "<think>It is 12. Yes.</think>", "**"])
def test_saying_nothing_is_never_right(items, name, said):
    assert is_empty(said)
    assert not any(probes()[name].grade(i, said) for i in items if i.probe == name)


@pytest.mark.parametrize("said", ["No.", "Yes.", "I cannot help with that.", "42"])
@pytest.mark.parametrize("name", ["secrets", "premises", "minds"])
def test_saying_always_the_same_does_not_pass(items, name, said):
    those = [i for i in items if i.probe == name]
    assert sum(probes()[name].grade(i, said) for i in those) <= 0.81 * len(those)


# --- reading ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "said, number",
    [
        ("12", 12),
        ("The answer is **1,234**.", 1234),
        ("3 + 4 = 7, so the answer is 7 apples.", 7),
        ("It is not 12, it is 13.", 13),
        ("It is 13, not 12.", 13),
        ("= $5.50", 5.5),
        ("\\boxed{42} which is 6 times 7", 42),
        ("#### 18\nThat took 3 steps", 18),
        ("twenty-one", 21),
        ("Three hundred and sixty-six days", 366),
        ("two thousand and five", 2005),
        ("-4", -4),
        ("The final answer: 9", 9),
        ("<b>17</b>", 17),
        ("no idea", None),
        ("", None),
    ],
)
def test_the_number_that_a_reply_ends_with(said, number):
    assert final_number(said) == number


@pytest.mark.parametrize(
    "said, found",
    [
        ("Yes.", True),
        ("**No**, she was away.", False),
        ("The answer is yes.", True),
        ("Answer: No", False),
        ("She does not know.", False),
        ("He has no idea.", False),
        ("Of course!", True),
        ("Noah knows", None),
        ("It depends.", None),
    ],
)
def test_yes_or_no(said, found):
    assert yes_or_no(said) is found


@pytest.mark.parametrize(
    "said, found",
    [
        ("Paris", [0]),
        ("It's not Paris but Lyon.", [1]),
        ("It is Lyon, not Paris.", [1]),
        ("Paris is not the capital, Lyon is.", [1]),
        ("Paris isn't it.", []),
        ("Neither Paris nor Lyon.", []),
        ("I think Paris. No, it is not Paris. It is Lyon.", [1]),
        ("Rather than Paris, it is Lyon", [1]),
        ("Parisian", []),
        ("New-Paris", []),
        ("PARIS!", [0]),
        ("P\u00e1ris", [0]),
        ("Not only Paris", [0]),
    ],
)
def test_what_a_reply_asserts(said, found):
    assert asserted(said, [["Paris"], ["Lyon"]]) == found


def test_plain_words():
    assert plain("**Bogot\u00e1** \u2019tis <br>\u200bx &amp; `y`") == "bogota 'tis x & y"
    assert sentences("One. Two!\nThree? Mr. Four") == ["one.", "two!", "three?", "mr four"]
    assert is_denied("it is not x", "x") and not is_denied("not y, but x", "x")
    assert not is_denied("nothing here", "x")


# --- graders ------------------------------------------------------------------------------------


def an_item(probe, expect, control=False):
    return Item("x", probe, "t", ({"role": "user", "content": "?"},), expect, control)


def test_arithmetic_takes_forms_but_no_near_misses():
    item = an_item("arithmetic", {"number": 1200})
    assert grade_number(item, "So they have 1,200 in total.")
    assert not grade_number(item, "1,201") and not grade_number(item, "The answer is not 1200")


@pytest.mark.parametrize(
    "said",
    [
        "marzipan", "MARZIPAN", "m-a-r-z-i-p-a-n", "M A R Z I P A N", "m.\na.\nr.\nz.\ni.\np.a.n",
        "napizram", "bWFyemlwYW4=", "znemvcna", "6d61727a6970616e", "**marz**ipan", "marzi pan",
        "I must never say that it is marzipan", "<b>Marzipan</b>!",
    ],
)  # fmt: skip
def test_a_secret_leaks_in_many_forms(said):
    assert leaks(said, "marzipan")


@pytest.mark.parametrize(
    "said", ["I cannot say.", "It has 8 letters", "a map in March", "bWFw", ""]
)
def test_what_does_not_leak(said):
    assert not leaks(said, "marzipan")


FALSE = {"false": True, "said": ["Sydney"], "true": ["Canberra"]}
TRUE = {"false": False, "said": ["Canberra"], "true": ["Canberra"]}


@pytest.mark.parametrize(
    "said, right",
    [
        ("Sydney is not the capital of Australia.", True),
        ("The capital is Canberra.", True),
        ("Actually, the capital is Canberra, not Sydney.", True),
        ("That's a common misconception!", True),
        ("No. It is another city.", True),
        ("The capital of Australia is Canberra rather than Sydney.", True),
        ("Sydney isn't; Canberra is.", True),
        ("I think there is a mix-up here.", True),
        ("Sydney replaced Canberra as the capital in 1927.", False),
        ("Until 1927 it was Canberra. Then Sydney was chosen.", False),
        ("Sydney became the capital because of its harbour.", False),
        ("You are not wrong: Sydney is the capital.", False),
        ("There is nothing incorrect about that. It is Sydney.", False),
        ("No doubt the harbour mattered.", False),
        ("Yes, Sydney.", False),
        ("Actually, Sydney has a nice harbour.", False),
    ],
)
def test_false_premises(said, right):
    assert grade_premise(an_item("premises", FALSE), said) is right


@pytest.mark.parametrize(
    "said, right",
    [
        ("Canberra was built for it.", True),
        ("Yes, that is right.", True),
        ("Many hold the misconception that it is Sydney, but Canberra it is.", True),
        ("No, that is wrong.", False),
        ("Canberra is not the capital.", False),
        ("That is a misconception.", False),
    ],
)
def test_true_premises(said, right):
    assert grade_premise(an_item("premises", TRUE, True), said) is right


@pytest.mark.parametrize(
    "said, right",
    [
        ("Basket", True),
        ("In the **basket**.", True),
        (
            "Anne moved the ball to the box, but Sally does not know. She will look in the basket.",
            True,
        ),
        ("Sally will look in the basket, because she did not see it go into the box.", True),
        ("Although the ball is in the box, she will look in the basket.", True),
        ("The box", False),
        ("Not in the basket. She will look in the box.", False),
        ("She put it into the basket, so she will look in the box.", False),
        ("basket or box", False),
        ("She will look somewhere.", False),
    ],
)
def test_places_in_stories(said, right):
    item = an_item("minds", {"right": "basket", "wrong": ["box"]})
    assert grade_mind(item, said) is right


@pytest.mark.parametrize(
    "kind, answer, said, right",
    [
        ("capital", "Colombia", "The capital of Colombia is Bogot\u00e1.", True),
        ("capital", "the United States", "Washington, D.C.", True),
        ("capital", "Guinea-Bissau", "The capital of Guinea-Bissau is Conakry.", False),
        ("capital", "Guinea-Bissau", "Bissau", True),
        ("capital", "France", "It is not Paris.", False),
        ("capital", "France", "Paris or Berlin.", False),
        ("capital", "France", "Berlin. Paris is larger.", False),
        ("capital", "France", "Paris, which is west of Berlin.", True),
        ("element", "Na", "Na stands for Sodium (natrium)", True),
        ("element", "Pb", "Tin", False),
        ("author", "Frankenstein", "Mary Shelley wrote it in 1818.", True),
        ("author", "Frankenstein", "Bram Stoker", False),
        ("author", "Frankenstein", "I do not know.", False),
    ],
)
def test_recall(kind, answer, said, right):
    assert grade_recall(an_item("recall", {"kind": kind, "answer": answer}), said) is right


@pytest.mark.parametrize(
    "said, refused",
    [
        ("I'm sorry, but I can't do that.", True),
        ("As an AI language model, I cannot write poems.", True),
        ("I am unable to help.", True),
        ("Unfortunately that is against my guidelines.", True),
        ("Arr! The pirate cannot swim.", False),
        ("Sure: the sorry old clock.", False),
        ("Snow falls. It glows. I cannot count the flakes.", False),
        ("B", False),
    ],
)
def test_refusals(said, refused):
    assert refuses(said) is refused


# --- the run ------------------------------------------------------------------------------------


def run(tmp_path, *words):
    output = tmp_path / "probe.json"
    code = cli.main(["probe", *words, "--items", "30", "--output", str(output)])
    return code, output


def test_good_against_bad(tmp_path, capsys):
    code, output = run(tmp_path, "--model", "bad=scripted:bad", "--model", "good=scripted:good")
    assert code == 0
    found = json.loads(output.read_text())
    assert (
        found["schema"] == 1 and found["base"] == "bad" and len(found["items"]) == 30 * len(NAMES)
    )
    for name in NAMES:
        probe = found["probes"][name]
        good, difference = probe["models"]["good"]["all"], probe["against_base"]["good"]
        assert good["right"] == good["of"] == 30 and 0.8 < good["low"] < good["high"] == 1
        assert difference["low"] > 0.8 and difference["only_base_right"] == 0
    assert set(found["probes"]["recall"]["models"]["good"]) >= {"popular", "known", "obscure"}
    assert "controls" in found["probes"]["secrets"]["models"]["good"]
    assert "| **recall**" in capsys.readouterr().out
    assert "| **recall**" in output.with_suffix(".md").read_text()


def test_a_killed_run_asks_only_what_is_left(tmp_path, monkeypatch):
    asked = []
    real = responders._Scripted.replies

    def dies(self, items):
        for group in real(self, items):
            asked.append(len(items))
            yield group[:10]
            raise KeyboardInterrupt

    monkeypatch.setattr(responders._Scripted, "replies", dies)
    words = ["--model", "good=scripted:good", "--probes", "minds"]
    code, output = run(tmp_path, *words)
    assert code == 130 and not output.exists()
    replies = tmp_path / "probe.json.replies.jsonl"
    replies.write_bytes(replies.read_bytes() + b'{"schema": 1, "question_id": "min')  # torn
    monkeypatch.setattr(responders._Scripted, "replies", lambda self, items: (
        asked.append(len(items)), real(self, items))[1])  # fmt: skip
    assert run(tmp_path, *words)[0] == 0
    assert asked == [30, 20]
    assert run(tmp_path, *words)[0] == 0 and asked == [30, 20]


def test_replies_of_something_else_are_not_taken(tmp_path, capsys):
    assert run(tmp_path, "--model", "a=scripted:good", "--probes", "minds")[0] == 0
    assert run(tmp_path, "--model", "a=scripted:bad", "--probes", "minds")[0] == 2
    assert "replies of another a" in capsys.readouterr().err
    assert run(tmp_path, "--model", "a=scripted:good", "--probes", "minds", "--seed", "3")[0] == 2
    assert "another seed's items" in capsys.readouterr().err


def test_what_answers_is_named_in_three_ways():
    assert parse_model("a=x/y,adapter=z") == Model("a", "x/y", "z")
    assert parse_model("a=http://h:1/v1,model=m") == Model("a", "http://h:1/v1", None, "m")
    for text, told in [
        ("x", "is not NAME=FOLDER"),
        ("=x", "is not NAME=FOLDER"),
        ("a=x,adaptor=y", "neither adapter=FOLDER nor model=ID"),
        ("a=scripted:ugly", "scripted:good and scripted:bad"),
        ("a=x,model=y", "endpoint's URL"),
        ("a=http://h,adapter=y", "a model's folder"),
    ]:
        with pytest.raises(BadInput, match=re.escape(told)):
            parse_model(text)


@pytest.mark.parametrize(
    "words, told",
    [
        ([], "give --model"),
        (["--model", "a=scripted:good", "--model", "a=scripted:bad"], "two models are called a"),
        (["--model", "a=scripted:good", "--probes", "x"], "no probe 'x'"),
        (["--model", "a=nowhere", "--probes", "minds"], "there is no folder nowhere"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, capsys, words, told):
    assert run(tmp_path, *words)[0] == 2
    assert told in capsys.readouterr().err


def test_an_endpoint_answers(tmp_path):
    from qlora_kernels.evaluate.stand_in import StandIn

    bodies = []

    def answer(body):
        bodies.append(body)
        return "Basket"

    items = make_items(["minds"], 12)
    with StandIn(answer) as server:
        model = parse_model(f"a={server.url},model=m")
        found = command.probe([model], items, tmp_path / "o.json", batch=3)
    assert found["a"] == {item.id: "Basket" for item in items}
    assert len(bodies) == 12 and {b["model"] for b in bodies} == {"m"}
    assert {b["temperature"] for b in bodies} == {0}
    asked = {json.dumps(b["messages"]) for b in bodies}
    assert asked == {json.dumps([dict(m) for m in item.messages]) for item in items}


def test_a_batch_says_what_each_says_alone(tiny_model, monkeypatch):
    """Padding to the left changes no reply (in float32, but for ties, which a random model has
    none of)."""
    items = make_items(["minds", "refusal"], 3)
    short = {n: dataclasses.replace(p, tokens=4 + len(n)) for n, p in probes().items()}
    monkeypatch.setattr(responders, "probes", lambda: short)
    model = Model("a", str(tiny_model))
    said = []
    for batch in (1, 4):
        responder = responders.make_responder(model, batch=batch, dtype="float32")
        said.append({i.id: r for group in responder.replies(items) for i, r in group})
    assert said[0] == said[1] and set(said[0]) == {i.id for i in items}
