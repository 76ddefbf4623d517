"""`qlora plan`: names of models and places, advice that was planned, files, bad input."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from qlora_kernels import cli
from qlora_kernels.finetune.errors import BadInput
from qlora_kernels.planning import command
from qlora_kernels.planning.advice import what_makes_it_fit, what_to_change
from qlora_kernels.planning.memory import LOADING, MemoryPlan
from qlora_kernels.planning.models import MODELS, find_model, linear_shapes, parameters_of
from qlora_kernels.planning.recipe import Recipe
from qlora_kernels.planning.speed import gpu_forecast

TINY = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 272,
}  # fmt: skip


@pytest.fixture
def tiny(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(TINY))
    return file


# --- models -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "said, name",
    [
        ("llama-13b", "llama-13b"), ("13b", "llama-13b"), ("30B", "llama-33b"),
        ("8b", "llama-3-8b"), ("70b", "llama-2-70b"), ("meta-llama/Llama-2-70b-hf", "llama-2-70b"),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama-3-8b"), ("Qwen/Qwen3-8B", "qwen3-8b"),
        ("mistralai/Mistral-7B-v0.1", "mistral-7b"), ("google/gemma-2-9b-it", "gemma-2-9b"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-135m"), ("135m", "smollm2-135m"),
        ("1.1b", "tinyllama-1.1b"), ("huggyllama/llama-65b", "llama-65b"),
    ],
)  # fmt: skip
def test_models_are_found_by_what_people_call_them(said, name):
    assert find_model(said)[0] == name


def test_the_table_has_the_sizes_that_the_names_say():
    """Published parameter counts, in billions."""
    known = {
        "llama-7b": 6.74, "llama-13b": 13.02, "llama-33b": 32.53, "llama-65b": 65.29,
        "llama-2-70b": 68.98, "llama-3-8b": 8.03, "llama-3-70b": 70.55, "llama-3.2-1b": 1.24,
        "mistral-7b": 7.24, "qwen2.5-7b": 7.62, "qwen2.5-72b": 72.7, "qwen3-8b": 8.19,
        "qwen3-32b": 32.8, "gemma-2-9b": 9.24, "gemma-2-27b": 27.2, "gemma-7b": 8.54,
        "smollm2-135m": 0.1345, "tinyllama-1.1b": 1.10,
    }  # fmt: skip
    for name, billions in known.items():
        assert parameters_of(MODELS[name]) / 1e9 == pytest.approx(billions, rel=0.005), name


@pytest.mark.parametrize("name", ["llama-2-70b", "qwen2.5-0.5b", "qwen3-0.6b", "gemma-2-2b"])
def test_configurations_make_the_layers_of_the_table(name):
    m, config = MODELS[name], find_model(name)[1]
    size = m.head_size or m.hidden // m.heads
    shapes = {what: (n, k) for what, n, k in linear_shapes(config)}
    assert shapes["k_proj"] == (m.kv_heads * size, m.hidden)
    assert shapes["q_proj"] == (m.heads * size, m.hidden)
    assert shapes["down_proj"] == (m.hidden, m.inner)
    assert (
        sum(n * k for n, k in shapes.values())
        == (parameters_of(m) - (1 if m.tied else 2) * m.words * m.hidden) // m.layers
    )


def test_a_model_of_a_file_or_folder(tiny):
    assert find_model(str(tiny))[1].hidden_size == 64
    assert find_model(str(tiny.parent))[0] == tiny.parent.name


@pytest.mark.parametrize(
    "content, told",
    [
        ("{", "not JSON"), ("[]", "not a JSON object"), ("{}", "model_type"),
        ('{"model_type": "nonsense"}', "no configuration"),
        ('{"model_type": "llama", "num_hidden_layers": 0}', "num_hidden_layers is 0"),
    ],
)  # fmt: skip
def test_broken_configurations_are_told(tmp_path, content, told):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(BadInput, match=told):
        find_model(str(tmp_path))


@pytest.mark.parametrize("said, nearest", [("lama-13b", "llama-13b"), ("mistral-8b", "mistral-7b")])
def test_an_unknown_model_names_the_nearest(said, nearest):
    with pytest.raises(BadInput, match=f"did you mean .*{nearest}"):
        find_model(said)


def test_a_file_that_is_not_there():
    with pytest.raises(BadInput, match="no file or folder"):
        find_model("./nowhere/config.json")


# --- places -------------------------------------------------------------------------------------


def test_amounts_of_memory():
    assert command.memory_size("24GB") == 24 * 10**9
    assert command.memory_size("24GiB") == command.memory_size("24 gib") == 24 * 2**30
    assert command.memory_size("1.5g") == 1_500_000_000
    for wrong in ("", "lots", "-3GB", "0", "24 XB"):
        with pytest.raises(BadInput, match="--memory"):
            command.memory_size(wrong)


def test_places():
    assert command.find_place("RTX 4090", None).limit == 24 * 2**30
    assert not command.find_place("cpu", None).gpu
    assert command.find_place(None, "10GB").limit == 10**10
    with pytest.raises(BadInput, match="rtx4090"):
        command.find_place("rtx4091", None)


# --- advice -------------------------------------------------------------------------------------


def size_of(recipe: Recipe) -> MemoryPlan:
    """A plan by a formula, with the signs that matter here."""
    taken = (
        1000 + recipe.r * (2 if "8bit" in recipe.optim else 8)
        + recipe.max_length * recipe.per_device_train_batch_size
        * (1 if recipe.activation_checkpointing else 10)
    )  # fmt: skip
    found = MemoryPlan({"x": taken}, {"a step": taken}, limit=2000, limit_from="here")
    found.compositions = {"a step": {"x": taken}, LOADING: {"packed 4-bit weights": 1000}}
    return found


def test_one_change_that_fits_is_told_first_and_each_was_planned():
    recipe = Recipe(max_length=200, per_device_train_batch_size=4, r=16)
    found = what_to_change(replace(recipe, activation_checkpointing=False), size_of)
    assert found[0].flags == "--activation_checkpointing true" and found[0].fits
    assert found[0].plan.peak == size_of(found[0].recipe).peak
    # Before it, one row alone was tried, and did not do.
    assert found[1].flags.startswith("--per_device_train_batch_size 1") and not found[1].fits


def test_changes_add_up_until_they_fit():
    recipe = Recipe(max_length=4096, r=128, optim="adamw_torch")
    found = what_to_change(recipe, size_of)
    assert found[-1].fits and "--max_length" in found[-1].flags
    assert found[-1].flags.count("--max_length") == 1


def test_nothing_is_told_where_the_weights_alone_are_too_much():
    def plan(recipe):
        found = size_of(recipe)
        found.limit = 900
        return found

    assert what_to_change(Recipe(), plan) == []


def test_what_makes_it_fit_takes_each_saving_away():
    found = {one.flags: one for one in what_makes_it_fit(Recipe(), size_of)}
    assert not found["no activation checkpointing"].fits
    assert found["no activation checkpointing"].recipe.activation_checkpointing is False
    assert any("not paged" in flags for flags in found)


# --- speed --------------------------------------------------------------------------------------


def test_a_modelled_speed_follows_the_device_and_the_model():
    from qlora_kernels.emulator.devices import get_device

    seven, thirteen = find_model("7b")[1], find_model("13b")[1]
    a100, h100 = get_device("a100"), get_device("h100")
    recipe = Recipe(per_device_train_batch_size=4)
    one = gpu_forecast(seven, recipe, a100)
    assert "modelled" in one.source
    assert one.seconds == pytest.approx(sum(one.parts.values()))
    assert gpu_forecast(seven, recipe, h100).tokens_per_second > one.tokens_per_second
    assert gpu_forecast(thirteen, recipe, a100).tokens_per_second < one.tokens_per_second
    kept = gpu_forecast(seven, replace(recipe, activation_checkpointing=False), a100)
    assert kept.tokens_per_second > one.tokens_per_second
    # Not more than the tensor cores could, were there nothing else: 2 FLOPs a weight and pass.
    weights = parameters_of(MODELS["llama-7b"]) - 2 * 32000 * 4096
    assert one.tokens_per_second < a100.tensor["bf16"] / (3 * 2 * weights)
    assert one.hours(one.tokens_per_second * 7200) == pytest.approx(2)


# --- the command --------------------------------------------------------------------------------


def test_a_plan_is_drawn_written_and_read_again(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    out, png = tmp_path / "plan.json", tmp_path / "plan.png"
    words = ["plan", str(tiny), "--device", "rtx4090", "--max_length", "32", "--r", "4",
             "--json", str(out), "--plot", str(png)]  # fmt: skip
    assert cli.main(words) == 0
    text = " ".join(capsys.readouterr().out.split())
    for word in (
        "packed 4-bit weights",
        "fits",
        "while loading",
        "modelled",
        "tokens/s",
        "a night",
    ):
        assert word in text
    data = json.loads(out.read_text())
    memory = data["memory"]
    assert data["schema"] == 1 and memory["peak"] == sum(memory["parts"].values())
    assert {"workspace", "holes of the allocator", "gradients"} <= memory["parts"].keys()
    assert png.read_bytes().startswith(b"\x89PNG")
    assert cli.main(["plan", "--from", str(out)]) == 0
    assert " ".join(capsys.readouterr().out.split()) == text


@pytest.mark.parametrize(
    "content, told",
    [
        ("{", "not JSON"), ('{"kind": "other"}', "not a plan"),
        ('{"kind": "plan", "schema": 99}', "schema 99"), ('{"kind": "plan", "schema": 1}', "lacks"),
    ],
)  # fmt: skip
def test_a_saved_plan_that_cannot_be_read(tmp_path, capsys, content, told):
    file = tmp_path / "p.json"
    file.write_text(content)
    assert cli.main(["plan", "--from", str(file)]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, told",
    [
        ([], "which model"), (["7b", "--device", "rtx409"], "did you mean"),
        (["7b", "--memory", "much"], "--memory"), (["7b", "--optim", "adamw8"], "adamw_8bit"),
        (["7b", "--dtype", "int3"], "bf16"), (["7b", "--quant_type", "nf5"], "nf4"),
        (["7b", "--target_modules", "q_prj"], "did you mean q_proj"),
        (["7b", "--tokens", "-1"], "--tokens"),
    ],
)  # fmt: skip
def test_bad_arguments_end_in_a_line(capsys, words, told):
    assert cli.main(["plan", *words]) == 2
    assert told in capsys.readouterr().err


def test_the_article_on_request(capsys):
    assert cli.main(["plan", "--article", "--json", "-"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["article_base_mb"] for row in rows] == [5046, 8476, 19302, 37074]
