"""What a sweep is told: read, checked, planned; the data sets that it makes."""

from __future__ import annotations

import json

import pytest

from qlora_kernels.finetune.errors import BadInput
from qlora_kernels.sweep.datasets import Library
from qlora_kernels.sweep.plan import draw_points, make_plan
from qlora_kernels.sweep.questions import CHAT, QUALITY, Sources, preset
from qlora_kernels.sweep.spec import Range, read_spec


@pytest.mark.parametrize(
    "values, told",
    [
        ({"vari": {"r": [1]}}, "'vari'; the nearest name is vary"),
        ({}, "varies nothing"),
        ({"vary": {"r": []}}, "vary: r is an empty list"),
        ({"vary": {"r": 8}}, "vary: r must be a list of values, it is a int (8)"),
        ({"vary": ["r"]}, "vary must hold `name: value` lines, it is a list"),
        ({"vary": {"r": [8, 8]}}, "holds 8 twice"),
        ({"vary": {"rank_of": [8]}}, "no option rank_of"),
        ({"vary": {"leraning_rate": [8]}}, "nearest name is learning_rate"),
        ({"settings": {"max_step": 3}, "vary": {"r": [1]}}, "nearest name is max_steps"),
        ({"settings": {"r": 3}, "vary": {"r": [1]}}, "r is in settings and in vary"),
        ({"settings": {"output_dir": "x"}, "vary": {"r": [1]}}, "output_dir cannot be given"),
        ({"vary": {"dataset": ["a"]}}, "dataset needs `datasets`"),
        ({"datasets": {"all": "a.jsonl"}, "vary": {"dataset": ["al"]}}, "nearest name is all"),
        ({"datasets": {"a": {"sorce": "x"}}}, "nearest name is source"),
        ({"datasets": {"a": {"source": "x", "noise": 1.5}}}, "noise is 1.5; it is a share"),
        ({"datasets": {"a": {"source": "x", "size": 1}}}, "size is 1; it must be a whole number"),
        ({"datasets": {"a": {"source": "x", "noise_from": "y"}}}, "noise is 0"),
        ({"datasets": {"a": {"size": 3}}}, "source is missing"),
        ({"datasets": {"a": "x"}, "settings": {"dataset_name": "y"}}, "contradict each other"),
        ({"search": "gird", "vary": {"r": [1]}}, "nearest name is grid"),
        ({"search": "random", "vary": {"r": [1]}}, "needs `trials`"),
        ({"trials": 3, "vary": {"r": [1]}}, "trials belongs to `search: random`"),
        ({"vary": {"learning_rate": {"low": 1, "high": 2}}}, "`search: random` only"),
        (
            {"search": "random", "trials": 1, "vary": {"learning_rate": {"low": 2, "high": 1}}},
            "low must be below high",
        ),
        ({"evaluations": {"a": "x"}, "objective": "b", "vary": {"r": [1]}}, "no evaluation 'b'"),
        (
            {"evaluations": {"a": {"source": "x", "kind": "los"}}, "vary": {"r": [1]}},
            "loss or mmlu",
        ),
        ({"retries": -1, "vary": {"r": [1]}}, "retries is -1"),
        ({"question": "quality", "vary": {"r": [1]}}, "nearest name is quality-or-quantity"),
        ({"keep": "all", "vary": {"r": [1]}}, "keep is 'all'"),
    ],
)
def test_what_is_wrong_is_named(values, told):
    with pytest.raises(BadInput) as caught:
        read_spec(values, "s.yaml")
    assert told in str(caught.value) and "s.yaml" in str(caught.value)


def test_a_grid_has_every_point_once_in_an_order_of_its_seed():
    spec = read_spec({"vary": {"r": [4, 8], "quant_type": ["nf4", "fp4"], "seed": [0, 1, 2]}})
    points = draw_points(spec)
    assert len(points) == 12 == len({json.dumps(p, sort_keys=True) for p in points})
    assert points == draw_points(spec)
    # Not a product in order: a sweep that is stopped half way has seen all corners.
    assert {p["r"] for p in points[:6]} == {4, 8}


def test_a_random_search_draws_as_many_as_it_is_told():
    vary = {
        "r": [4, 8],
        "learning_rate": {"low": 1e-5, "high": 1e-3, "log": True},
        "max_steps": {"low": 5, "high": 9, "whole": True},
    }
    values = {"search": "random", "trials": 20, "vary": vary}
    spec = read_spec(values)
    assert isinstance(spec.vary["learning_rate"], Range)
    points = draw_points(spec)
    assert len(points) == 20 and points == draw_points(spec)
    assert {p["r"] for p in points} == {4, 8}
    assert all(1e-5 <= p["learning_rate"] <= 1e-3 for p in points)
    assert {type(p["max_steps"]) for p in points} == {int}
    assert points != draw_points(read_spec({**values, "seed": 1}))


def test_a_random_search_without_enough_points():
    spec = read_spec({"search": "random", "trials": 9, "vary": {"r": [4, 8]}})
    with pytest.raises(BadInput, match="only 2 different points"):
        draw_points(spec)


# --- data sets ----------------------------------------------------------------------------------


def lines(made) -> list[dict]:
    return [json.loads(line) for line in made.path.read_text().splitlines()]


@pytest.fixture
def library(conversations, tmp_path):
    def make(datasets, evaluations=None):
        source = str(conversations("clean.jsonl", 60))
        noise = str(conversations("noise.jsonl", 40, "junk"))
        fill = {"CLEAN": source, "NOISE": noise}
        text = json.dumps({"datasets": datasets, "evaluations": evaluations or {}})
        for word, path in fill.items():
            text = text.replace(word, path)
        return Library(read_spec(json.loads(text)), tmp_path / "data")

    return make


def test_subsets_are_nested_and_drawn_by_the_seed(library):
    sets = library(
        {"few": {"source": "CLEAN", "size": 10}, "more": {"source": "CLEAN", "size": 30}}
    )
    few, more = lines(sets.training("few", 3)), lines(sets.training("more", 3))
    assert len(few) == 10 and len(more) == 30
    assert all(record in more for record in few)
    assert sorted(map(str, few)) != sorted(map(str, lines(sets.training("few", 4))))
    assert sets.training("few", 3) == sets.training("few", 3)


def test_a_whole_set_is_one_file_for_all_seeds(library):
    sets = library({"all": {"source": "CLEAN"}})
    assert sets.training("all", 1).path == sets.training("all", 2).path
    assert len(lines(sets.training("all", 1))) == 60


def test_noise_is_mixed_in_beside_the_same_clean_samples(library):
    sets = library({
        "few": {"source": "CLEAN", "size": 10},
        "noisy": {"source": "CLEAN", "size": 40, "noise": 0.75, "noise_from": "NOISE"},
        "own": {"source": "CLEAN", "size": 40, "noise": 0.75},
    })  # fmt: skip
    few = lines(sets.training("few", 1))
    made = sets.training("noisy", 1)
    noisy = lines(made)
    assert (made.samples, made.noise) == (40, 30)
    assert all(record in noisy for record in few)
    assert sum(record["prompt"].startswith("junk") for record in noisy) == 30
    own = lines(sets.training("own", 1))
    right = [r for r in own if r["prompt"].split()[2].rstrip("?") == r["completion"].split()[2]]
    assert len(own) == 40 and sorted(map(str, right)) == sorted(map(str, few))


def test_shuffled_replies_are_all_elsewhere_and_none_is_lost(library):
    sets = library({"x": {"source": "CLEAN", "shuffle_replies": True}})
    found = lines(sets.training("x", 0))
    assert not [
        r for r in found if r["prompt"].split()[2].rstrip("?") == r["completion"].split()[2]
    ]
    assert len({r["completion"] for r in found}) == len({r["prompt"] for r in found}) == 60


def test_conversations_lend_their_replies_turn_by_turn(library, tmp_path):
    path = tmp_path / "turns.jsonl"
    records = []
    for i in range(6):
        turns = [[("user", f"q{i}{t}"), ("assistant", f"a{i}{t}")] for t in range(1 + i % 3)]
        records.append({"messages": [{"role": r, "content": c} for turn in turns for r, c in turn]})
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    sets = library({"x": {"source": str(path), "shuffle_replies": True}})
    for record in lines(sets.training("x", 0)):
        said = [m["content"] for m in record["messages"]]
        assert {w[0] for w in said[::2]} == {"q"} and {w[0] for w in said[1::2]} == {"a"}
        assert len({w[1] for w in said[1::2]}) == 1 and said[1][1] != said[0][1]


def test_what_is_held_out_is_in_no_training_set(library, conversations):
    sets = library(
        {"all": {"source": "CLEAN"}, "x": {"source": "CLEAN", "shuffle_replies": True}},
        {"chat": {"source": "CLEAN", "held_out": 12}},
    )
    held = {record["prompt"] for record in lines(sets.evaluation("chat"))}
    assert len(held) == 12
    for name in ("all", "x"):
        trained = {record["prompt"] for record in lines(sets.training(name, 0))}
        assert len(trained) == 48 and not trained & held
    assert sets.available("all") == 48


def test_plain_texts_have_no_replies_to_shuffle(library, tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"some text {i}"}) + "\n" for i in range(9)))
    mixed = {"source": "CLEAN", "noise": 0.5, "size": 8, "noise_from": str(path)}
    sets = library({"x": {"source": str(path), "shuffle_replies": True}, "y": mixed})
    with pytest.raises(BadInput, match="no reply to shuffle"):
        sets.training("x", 0)
    with pytest.raises(BadInput, match="data set y.*cannot be mixed"):
        sets.training("y", 0)


def test_too_few_samples_and_missing_files(library):
    sets = library({"x": {"source": "CLEAN", "size": 61}, "y": {"source": "gone.jsonl"}})
    with pytest.raises(BadInput, match="data set x: 61 samples are asked for.* has 60"):
        sets.training("x", 0)
    with pytest.raises(BadInput, match="data set y: gone.jsonl does not exist"):
        sets.training("y", 0)


# --- the plan -----------------------------------------------------------------------------------


def plan_of(folder, source, **changes):
    values = {
        "settings": {"model_name_or_path": "m", "max_steps": 3},
        "vary": {"seed": [0, 1]},
        "datasets": {"few": {"source": str(source), "size": 10}, "all": {"source": str(source)}},
        "evaluations": {"chat": {"source": str(source), "held_out": 8}},
        **changes,
    }
    return make_plan(read_spec(values), folder)


def test_a_plan_is_finetunes_that_can_be_run_alone(conversations, tmp_path):
    from qlora_kernels.finetune.config import resolve

    source = conversations("a.jsonl", 40)
    plan = plan_of(tmp_path / "one", source)
    assert len(plan) == 4 == len({p.key for p in plan})
    for p in plan:
        config = resolve({**p.settings, "output_dir": "x"})
        assert config.eval_split == 0 and config.save_steps == 0.2
        assert config.dataset_name == p.settings["dataset_name"]
    few = [p for p in plan if p.point["dataset"] == "few"]
    assert len({p.settings["dataset_name"] for p in few}) == 2  # each seed draws its own
    # The same sweep elsewhere has the same names; other data have others.
    assert {p.key for p in plan} == {p.key for p in plan_of(tmp_path / "two", source)}
    other = conversations("b.jsonl", 41)
    assert not {p.key for p in plan} & {p.key for p in plan_of(tmp_path / "x", other)}


def test_a_twin_has_the_same_samples_and_other_seeds(conversations, tmp_path):
    source = str(conversations("a.jsonl", 40))
    plan = plan_of(tmp_path, source, evaluations={}, datasets={
        "set": {"source": source, "size": 10},
        "again": {"source": source, "size": 10, "seed_shift": 1000},
    })  # fmt: skip
    by = {(p.point["dataset"], p.point["seed"]): p for p in plan}
    for seed in (0, 1):
        first, twin = by["set", seed], by["again", seed]
        assert first.data["digest"] == twin.data["digest"] and first.key != twin.key
        assert (first.settings["seed"], twin.settings["seed"]) == (seed, 1000 + seed)


def test_settings_that_a_finetune_refuses_are_refused_at_once(conversations, tmp_path):
    from qlora_kernels.sweep.command import _check

    source = str(conversations("a.jsonl", 40))
    values = {"settings": {"model_name_or_path": "m", "dataset_name": source},
              "vary": {"quant_type": ["nf4", "nf5"]}}  # fmt: skip
    with pytest.raises(BadInput, match="nf5"):
        make_plan(read_spec(values), tmp_path, _check)
    del values["settings"]["dataset_name"]
    values["vary"] = {"dataset_name": [source, source.replace("a.jsonl", "aa.jsonl")]}
    with pytest.raises(BadInput, match="did you mean .*a.jsonl"):
        make_plan(read_spec(values), tmp_path, _check)


# --- presets ------------------------------------------------------------------------------------


def test_quality_or_quantity_as_a_sweep(conversations, tmp_path):
    source = {"source": str(conversations("a.jsonl", 100))}
    values = preset(
        QUALITY, Sources(data=source, held_out=10, seeds=2), {"model_name_or_path": "m"}
    )
    spec = read_spec(values)
    plan = make_plan(spec, tmp_path)
    assert len(plan) == 14
    sizes = {p.data["name"]: (p.data["samples"], p.data["noise"]) for p in plan}
    assert sizes == {
        "small": (20, 0), "half": (40, 0), "large": (80, 0), "large-half-noise": (80, 40),
        "large-noise": (80, 60), "large-again": (80, 0), "large-shuffled": (80, 0),
    }  # fmt: skip
    assert {p.settings["max_steps"] for p in plan} == {60}  # equal steps


def test_chat_or_knowledge_as_a_sweep(conversations, tmp_path):
    sources = Sources(
        chat={"source": str(conversations("a.jsonl", 60))},
        knowledge={"source": str(conversations("b.jsonl", 80, "fact"))},
        held_out=10,
        seeds=2,
    )
    spec = read_spec(preset(CHAT, sources, {"model_name_or_path": "m", "max_steps": 7}))
    plan = make_plan(spec, tmp_path)
    both = next(p for p in plan if p.data["name"] == "both")
    words = open(both.settings["dataset_name"]).read()
    assert words.count("is question") == words.count("fact question") == both.data["samples"] // 2
    assert list(spec.evaluations) == ["chat", "knowledge"] and spec.objective == "chat"


def test_presets_that_cannot_be(conversations):
    with pytest.raises(BadInput, match="needs --chat"):
        preset(CHAT, Sources(), {})
    with pytest.raises(BadInput, match="at least 2"):
        preset(QUALITY, Sources(seeds=1), {})
    few = {"source": str(conversations("a.jsonl", 30))}
    with pytest.raises(BadInput, match="too few samples"):
        preset(QUALITY, Sources(data=few, held_out=15), {})
