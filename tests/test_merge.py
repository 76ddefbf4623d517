"""``qlora merge``: the sum that PEFT makes, in a folder that opens without this package.

The judge is PEFT in memory: the base (dequantized, or as it was) dense in fp32, the adapter on it,
``merge_and_unload()``. What is written differs from that by one rounding to the output's format.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402

import qlora_kernels  # noqa: E402
from qlora_kernels import functional as F4  # noqa: E402
from qlora_kernels import tensor_files  # noqa: E402
from qlora_kernels.finetune.errors import BadInput, RunError  # noqa: E402
from qlora_kernels.integrations.transformers import load_quantized_model  # noqa: E402

AutoModel = transformers.AutoModelForCausalLM
IDS = torch.arange(3, 27).view(2, 12)


@pytest.fixture(autouse=True)
def _quiet():
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
        warnings.filterwarnings("ignore", message=".*ensure_weight_tying.*")
        yield


@pytest.fixture(scope="module")
def base(make_tiny_model, tmp_path_factory) -> Path:
    """Tied words, biases in every layer, bf16, with generation settings."""
    folder = tmp_path_factory.mktemp("base")
    return make_base(make_tiny_model, folder)


@pytest.fixture(scope="module")
def untied(make_tiny_model, tmp_path_factory) -> Path:
    return make_base(make_tiny_model, tmp_path_factory.mktemp("untied"), tie_word_embeddings=False)


def make_base(make_tiny_model, folder: Path, **changes) -> Path:
    make_tiny_model(folder, attention_bias=True, mlp_bias=True, **changes)
    model = AutoModel.from_pretrained(folder, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            p.data.normal_(std=0.1, generator=generator)
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(folder)
    return folder


def dense(base: Path, which: str) -> torch.nn.Module:
    if which == "original":
        return AutoModel.from_pretrained(base, dtype=torch.float32)
    return load_quantized_model(base, dtype=torch.float32).dequantize(torch.float32)


def randomized(model: torch.nn.Module, std: float = 0.05) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(2)
    for p in model.parameters():
        if p.requires_grad:
            p.data += std * torch.randn(p.shape, generator=generator)
    return model.eval()


def make_adapter(base: Path, folder: Path, grow: int = 0, **config) -> Path:
    model = load_quantized_model(base, dtype=torch.float32)
    if grow:
        model.resize_token_embeddings(272 + grow)
    model.name_or_path = str(base)
    config = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **config}
    tuned = randomized(get_peft_model(model, LoraConfig(**config)))
    tuned.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory) -> Path:
    return make_adapter(base, tmp_path_factory.mktemp("adapter"))


def in_memory(base: Path, adapter: Path, which: str, grow: int = 0) -> torch.nn.Module:
    model = dense(base, which)
    if grow:
        model.resize_token_embeddings(272 + grow)
    return PeftModel.from_pretrained(model, adapter).eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


ADAPTERS = {
    "plain": {},
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "dora": {"use_dora": True},
    "lora-bias": {"lora_bias": True},
    "bias": {"bias": "lora_only"},
    "patterns": {
        "rank_pattern": {"q_proj": 2, r"layers\.1\..*up_proj": 3},
        "alpha_pattern": {"q_proj": 32},
    },
    "some-layers": {
        "target_modules": ["v_proj", "up_proj", "down_proj"],
        "layers_to_transform": [1],
        "lora_alpha": 64,
    },
    "trained-head": {"modules_to_save": ["lm_head"]},
    "trained-embeddings": {"modules_to_save": ["embed_tokens"]},
    "lora-head": {"target_modules": ["q_proj", "lm_head"]},
    "lora-embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "tokens": {"trainable_token_indices": [5, 9, 11]},
    "tied-embeddings": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
}
QUICK = ("plain", "dora", "trained-embeddings", "tokens")


@pytest.mark.parametrize("which", ["dequantized", "original"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[] if k in QUICK else pytest.mark.full) for k in ADAPTERS]
)
def test_it_is_the_sum_that_peft_makes(kind, tied, which, request, tmp_path) -> None:
    base = request.getfixturevalue("base" if tied else "untied")
    adapter = make_adapter(base, tmp_path / "adapter", **ADAPTERS[kind])
    figures = qlora_kernels.merge(adapter, tmp_path / "out", base=which)
    # Unmerged: merging in memory changes both of two tied words, the adapter changed one.
    want = logits(in_memory(base, adapter, which))
    merged = AutoModel.from_pretrained(tmp_path / "out", dtype=torch.float32)
    # bf16 keeps 8 bits: each weight is off by at most 2^-9 of itself.
    torch.testing.assert_close(logits(merged), want, rtol=0.02, atol=0.02 * float(want.abs().max()))
    assert (logits(merged) - logits(dense(base, which))).norm() > 0.02 * want.norm()
    stays = tied and kind not in (
        "trained-head", "trained-embeddings", "lora-head", "lora-embeddings"
    )  # fmt: skip
    assert figures["tied_embeddings"] == stays == merged.config.tie_word_embeddings
    assert ("lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")) is not stays


def test_every_weight_is_the_exact_sum_rounded_once(base, adapter, tmp_path) -> None:
    qlora_kernels.merge(adapter, tmp_path / "out")
    want = in_memory(base, adapter, "dequantized").merge_and_unload().state_dict()
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert got.keys() == want.keys() - {"lm_head.weight"}
    for name, value in got.items():
        exact = want[name].to(torch.bfloat16)
        # PEFT's product may be summed otherwise than there: a rounding goes the other way then.
        assert value.dtype == torch.bfloat16
        assert (value != exact).float().mean() < 1e-3, name
        torch.testing.assert_close(value, exact, rtol=2**-7, atol=1e-6)


def test_the_folders_open_without_this_package(base, adapter, tmp_path) -> None:
    """16 bits by transformers alone, NF4 by bitsandbytes; with all that lay beside the weights."""
    pytest.importorskip("bitsandbytes")
    want = {}
    for to in ("16bit", "nf4"):
        out = tmp_path / to
        figures = qlora_kernels.merge(adapter, out, base="dequantized", to=to)
        assert sorted(p.name for p in out.iterdir()) == [
            "chat_template.jinja", "config.json", "generation_config.json", "merge.json",
            "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        ]  # fmt: skip
        assert json.loads((out / "merge.json").read_text()) == figures
        want[to] = logits(AutoModel.from_pretrained(out, dtype=torch.float32))
    assert "qlora" not in (tmp_path / "16bit" / "config.json").read_text()
    torch.save(want, tmp_path / "want.pt")
    code = """
import sys; sys.modules["qlora_kernels"] = None
import bitsandbytes, torch, transformers
want, ids = torch.load("want.pt"), torch.arange(3, 27).view(2, 12)

def load(folder):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True)
    keys = ("missing_keys", "unexpected_keys", "mismatched_keys")
    assert not any(info[k] for k in keys), info
    assert model.generation_config.max_new_tokens == 7
    assert model.lm_head.weight is model.model.embed_tokens.weight
    return model.eval()

with torch.no_grad():
    assert torch.equal(load("16bit")(ids).logits, want["16bit"])
    model = load("nf4")
    layers = [m for m in model.modules() if type(m) is bitsandbytes.nn.Linear4bit]
    assert len(layers) == 14
    for layer in layers:
        layer.compute_dtype = torch.float32  # the folder says bf16, of which it was made
    got = model(ids).logits
    assert (got - want["nf4"]).abs().max() < 0.02 * got.abs().max()
tokenizer = transformers.AutoTokenizer.from_pretrained("nf4")
text = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
assert text.startswith("<|im_start|>user"), text
assert not any(m.startswith("qlora_kernels.") for m in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def test_nf4_is_the_sum_quantized_once(base, adapter, tmp_path) -> None:
    figures = qlora_kernels.merge(adapter, tmp_path / "out", base="dequantized", to="nf4")
    assert 0 < figures["rounding_over_weight"] < 0.2
    exact = in_memory(base, adapter, "dequantized").merge_and_unload().state_dict()
    got = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    packed, state = F4.quantize_4bit(exact[name], quant_type="nf4", compress_statistics=True)
    assert (got[name] != packed).float().mean() < 1e-3
    torch.testing.assert_close(got[f"{name}.nested_absmax"], state.state2.absmax)


@pytest.mark.parametrize("kind", ["dense", "packed"])
def test_layers_that_nothing_changes_keep_their_bytes_in_nf4(base, kind, tmp_path) -> None:
    packed = tmp_path / "packed"
    load_quantized_model(base, dtype=torch.bfloat16).save_pretrained(packed)
    want = load_file(packed / "model.safetensors")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    model = base if kind == "dense" else packed
    given = {"model": model, "base": "dequantized", "to": "nf4"}
    qlora_kernels.merge(adapter, tmp_path / "out", **given)
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert got.keys() == want.keys()
    for name, value in want.items():
        if "q_proj.weight" not in name:
            assert torch.equal(got[name], value), name
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(got[name], want[name])


def test_a_4_bit_base_is_dequantized_from_its_own_bytes(base, adapter, tmp_path) -> None:
    """Whatever made them; and ``original`` is not to be had from it."""
    packed = tmp_path / "packed"
    quantized = load_quantized_model(base, dtype=torch.bfloat16, quant_type="fp4")
    quantized.save_pretrained(packed)
    qlora_kernels.merge(adapter, tmp_path / "out", model=packed)
    model = load_quantized_model(packed, dtype=torch.float32).dequantize(torch.float32)
    want = logits(PeftModel.from_pretrained(model, adapter).eval())
    got = logits(AutoModel.from_pretrained(tmp_path / "out", dtype=torch.float32))
    torch.testing.assert_close(got, want, rtol=0.02, atol=0.02 * float(want.abs().max()))
    with pytest.raises(BadInput, match="is 4-bit: give the model it was made from"):
        qlora_kernels.merge(adapter, tmp_path / "other", model=packed, base="original")


def test_how_the_base_was_quantized_is_asked_or_read_from_the_run(base, adapter, tmp_path) -> None:
    asked = {"quant_type": "fp4", "blocksize": 128, "double_quant": False}
    figures = qlora_kernels.merge(adapter, tmp_path / "asked", **asked)
    assert figures["quantization"] == "fp4, blocks of 128 (as asked)"
    run = shutil.copytree(adapter, tmp_path / "run")
    (run / "config.yaml").write_text("quant_type: fp4\nblocksize: 128\ndouble_quant: false\n")
    figures = qlora_kernels.merge(run, tmp_path / "read")
    assert figures["quantization"] == "fp4, blocks of 128 (config.yaml of the run)"
    files = [tmp_path / n / "model.safetensors" for n in ("asked", "read")]
    assert files[0].read_bytes() == files[1].read_bytes()
    (run / "config.yaml").write_text("quant_type: none\n")
    with pytest.raises(BadInput, match="in 16 bits, so base is original"):
        qlora_kernels.merge(run, tmp_path / "none", base="dequantized")
    assert qlora_kernels.merge(run, tmp_path / "none")["base"] == "original"


def test_a_small_update_survives_nf4_in_the_original_base(base, tmp_path) -> None:
    """On the grid it is rounded away; off it, it decides some roundings, and is kept on average."""
    adapter = make_adapter(base, tmp_path / "adapter", lora_alpha=0.05)
    name = "model.layers.1.mlp.up_proj.weight"
    kept, said = {}, []
    for which in (None, "dequantized"):
        out = tmp_path / str(which)
        figures = qlora_kernels.merge(adapter, out, base=which, to="nf4", say=said.append)
        assert figures["base"] == (which or "original")
        start = dense(base, figures["base"]).state_dict()[name]
        exact = in_memory(base, adapter, figures["base"]).merge_and_unload().state_dict()[name]
        update = exact - start
        assert update.norm() < 0.03 * start.norm()
        got = load_quantized_model(out, dtype=torch.float32).get_submodule(name[:-7])
        plain = load_quantized_model(base, dtype=torch.float32).get_submodule(name[:-7])
        moved = got.dequantize_weight(torch.float32) - plain.dequantize_weight(torch.float32)
        kept[which] = float((moved * update).sum() / update.square().sum())
    assert kept["dequantized"] < 0.3 < 0.6 < kept[None] < 1.4, kept
    assert sum("base original keeps it" in line for line in said) == 1


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("how", ["modules_to_save", "trainable_token_indices"])
def test_new_words_grow_the_model(how, tied, request, tmp_path) -> None:
    base = request.getfixturevalue("base" if tied else "untied")
    words = ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]
    extra = {
        "modules_to_save": {"modules_to_save": words, "ensure_weight_tying": tied},
        "trainable_token_indices": {"trainable_token_indices": [270, 272, 274]},
    }[how]
    adapter = make_adapter(base, tmp_path / "adapter", grow=3, **extra)
    qlora_kernels.merge(adapter, tmp_path / "out")
    merged = AutoModel.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert merged.config.vocab_size == 275 == merged.lm_head.out_features
    want = logits(in_memory(base, adapter, "dequantized", grow=3))
    torch.testing.assert_close(logits(merged), want, rtol=0.02, atol=0.02 * float(want.abs().max()))


def test_shards(base, adapter, tmp_path) -> None:
    qlora_kernels.merge(adapter, tmp_path / "one")
    qlora_kernels.merge(adapter, tmp_path / "many", max_shard_size=60_000)
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    whole = load_file(tmp_path / "one" / "model.safetensors")
    parts = {k: v for f in files for k, v in load_file(f).items()}
    assert all(torch.equal(whole[k], v) for k, v in parts.items()) and whole.keys() == parts.keys()
    one = AutoModel.from_pretrained(tmp_path / "one", dtype=torch.float32)
    many = AutoModel.from_pretrained(tmp_path / "many", dtype=torch.float32)
    assert torch.equal(logits(one), logits(many))
    again = qlora_kernels.merge(adapter, tmp_path / "again", model=tmp_path / "many")  # read them
    assert again["modules_changed"] == 14


def test_conv1d_layers_are_turned_as_their_files_have_them(tmp_path) -> None:
    config = transformers.GPT2Config(vocab_size=96, n_embd=64, n_layer=1, n_head=4, n_positions=32)
    torch.manual_seed(0)
    base = tmp_path / "base"
    transformers.GPT2LMHeadModel(config).to(torch.bfloat16).save_pretrained(base)
    packed = tmp_path / "packed"
    load_quantized_model(base, dtype=torch.bfloat16).save_pretrained(packed)
    targets = ["c_attn", "c_fc"]
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=targets)
    for name, model, which in (
        ("a", base, "dequantized"), ("b", base, "original"), ("c", packed, "dequantized"),
    ):  # fmt: skip
        want = logits(in_memory(model, adapter, which))
        for to in ("16bit", "nf4"):
            out = tmp_path / f"{name}-{to}"
            qlora_kernels.merge(adapter, out, model=model, base=which, to=to)
            got = logits(AutoModel.from_pretrained(out, dtype=torch.float32))
            assert (got - want).norm() < (0.02 if to == "16bit" else 0.4) * want.norm(), out.name


def test_what_memory_it_takes(adapter, tmp_path, monkeypatch) -> None:
    """What torch allocates never exceeds some copies of the largest weight that is changed: counted
    by the allocator, whose own account tells also of what was freed."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        qlora_kernels.merge(adapter, tmp_path / "out")
    live = peak = 0
    for event in sorted(record.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    largest = 4 * 64 * 128
    whole = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert largest < peak < 6 * largest < 2 * whole  # twice: in fp32


# --- held-out losses ------------------------------------------------------------------------------


def test_held_out_losses_of_all_on_the_way(base, adapter, tiny_data, tmp_path, capsys) -> None:
    from qlora_kernels.cli import main

    out = tmp_path / "out"
    words = ["merge", str(adapter), "--output", str(out), "--eval", str(tiny_data)]
    assert main([*words, "--json", str(tmp_path / "figures.json")]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures == json.loads((out / "merge.json").read_text())
    losses = figures["losses"]
    assert list(losses) == [
        "base, 4-bit", "adapter on it, unmerged", "merged in memory, fp32", "the folder, reopened"
    ]  # fmt: skip
    a, b, c, d = losses.values()
    assert abs(a - b) > 0.005 and abs(b - c) < 1e-4 and abs(c - d) < 5e-3
    said = capsys.readouterr().out
    assert f"{d:.4f}" in said and "the folder, reopened" in said
    again = ["--base", "original", "--to", "nf4", "--overwrite"]
    assert main([*words, *again]) == 0
    losses = json.loads((out / "merge.json").read_text())["losses"]
    assert "base, original" in losses and losses["the folder, reopened"] != d


def test_the_loss_is_the_mean_over_trained_tokens(base, adapter, tiny_data, tmp_path) -> None:
    figures = qlora_kernels.merge(adapter, tmp_path / "out", evaluate=tiny_data)
    from qlora_kernels.finetune.data import DataOptions, prepare

    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    rows = prepare(DataOptions(str(tiny_data), eval_split=0), tokenizer).train
    model = AutoModel.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    total, count = 0.0, 0
    for row in rows:
        ids, labels = (torch.as_tensor(row[k])[None] for k in ("input_ids", "labels"))
        with torch.no_grad():
            z = model(ids).logits[0, :-1]
        want = labels[0, 1:]
        loss = torch.nn.functional.cross_entropy(z, want, ignore_index=-100, reduction="sum")
        total, count = total + float(loss), count + int((want != -100).sum())
    got = figures["losses"]["the folder, reopened"]
    if qlora_kernels.integrations.transformers.default_dtype() == torch.float32:
        assert got == pytest.approx(total / count, rel=1e-5)


@pytest.mark.full
def test_a_finetune_s_own_held_out_samples(base, tiny_data, tmp_path) -> None:
    from qlora_kernels.finetune.config import resolve
    from qlora_kernels.finetune.trainer import finetune

    run = {
        "model_name_or_path": str(base), "dataset_name": str(tiny_data), "max_steps": 2,
        "output_dir": str(tmp_path / "run"), "max_length": 96, "eval_split": 8,
        "save_strategy": "no", "learning_rate": 1e-2, "dtype": "float32", "disable_tqdm": True,
    }  # fmt: skip
    trained = finetune(resolve(run))
    losses = qlora_kernels.merge(tmp_path / "run", tmp_path / "out", evaluate="held-out")["losses"]
    if qlora_kernels.integrations.transformers.default_dtype() == torch.float32:
        assert losses["base, 4-bit"] == pytest.approx(trained["eval_loss_before"], rel=1e-5)
        unmerged = losses["adapter on it, unmerged"]
        assert unmerged == pytest.approx(trained["eval_loss_after"], rel=1e-4)
    with pytest.raises(BadInput, match=r"no config\.yaml of `qlora finetune`"):
        shutil.copytree(tmp_path / "run", tmp_path / "bare")
        (tmp_path / "bare" / "config.yaml").unlink()
        qlora_kernels.merge(tmp_path / "bare", tmp_path / "out2", evaluate="held-out")


# --- what is wrong with what is given -------------------------------------------------------------


def edit_config(**changes):
    def change(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def edit_tensors(change):
    def apply(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    return apply


UP = "base_model.model.model.layers.0.mlp.up_proj"
BAD_ADAPTERS = {
    "no-config": (
        lambda f: (f / "adapter_config.json").unlink(), "holds no adapter_config.json"
    ),
    "no-weights": (
        lambda f: (f / "adapter_model.safetensors").unlink(),
        r"holds no adapter_model\.safetensors",
    ),
    "half-a-file": (
        lambda f: os.truncate(f / "adapter_model.safetensors", 900), "truncated|cut off"
    ),
    "rank": (edit_config(r=8), r"A \[4, \d+\] and B \[\d+, 4\], but .*says rank 8"),
    "another-type": (edit_config(peft_type="IA3"), "type IA3; LORA is what is merged"),
    "pissa": (edit_config(init_lora_weights="pissa"), "'pissa', which also changes the base"),
    "another-model": (
        edit_tensors(lambda t: t.update({k.replace("layers.1", "layers.7"): t.pop(k)
                                         for k in list(t) if "layers.1" in k})),
        r"not an adapter of .*model\.layers\.7\.\S+ and 6 more, which LlamaForCausalLM does not",
    ),
    "another-width": (
        edit_tensors(lambda t: t.update({f"{UP}.lora_A.weight": torch.zeros(4, 80)})),
        r"up_proj has A \[4, 80\] and B \[128, 4\], its layer takes 64 values and gives 128",
    ),
    "half-a-pair": (
        edit_tensors(lambda t: t.pop(f"{UP}.lora_B.weight")), r"lacks lora_B\.weight of .*up_proj"
    ),
    "strange-tensor": (
        edit_tensors(lambda t: t.update({f"{UP}.vera_d": torch.zeros(4)})), "nothing that is merged"
    ),
    "not-finite": (
        edit_tensors(lambda t: t[f"{UP}.lora_A.weight"].fill_(torch.nan)), "up_proj is not finite"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_ADAPTERS)
def test_a_bad_adapter_is_named_and_nothing_is_written(case, adapter, tmp_path) -> None:
    damage, message = BAD_ADAPTERS[case]
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    damage(folder)
    with pytest.raises(BadInput, match=message):
        qlora_kernels.merge(folder, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize(
    "given, message",
    [
        ({"base": "dense"}, "base is 'dense'; it may be 'dequantized' or 'original'"),
        ({"to": "fp8"}, "to is 'fp8'; it may be '16bit' or 'nf4'"),
        ({"dtype": "float64"}, "dtype is 'float64'; it may be"),
        ({"quant_type": "nf5"}, "did you mean 'nf4'"),
        ({"blocksize": 100}, "blocksize must be one of"),
        ({"max_shard_size": 0}, "max_shard_size is 0"),
        ({"model": "/nowhere/model"}, "there is no folder /nowhere/model"),
        ({"evaluate": "/nowhere/data.jsonl"}, "data: .*/nowhere/data.jsonl"),
    ],
)
def test_bad_values_are_named_and_nothing_is_written(given, message, adapter, tmp_path) -> None:
    with pytest.raises(BadInput, match=message):
        qlora_kernels.merge(adapter, tmp_path / "out", **given)
    assert not list(tmp_path.iterdir())


def test_a_base_that_lacks_weights(base, adapter, tmp_path) -> None:
    model = shutil.copytree(base, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(BadInput, match=r"holds no model\.norm\.weight, which LlamaForCausalLM has"):
        qlora_kernels.merge(adapter, tmp_path / "out", model=model)
    shutil.copyfile(base / "model.safetensors", model / "model.safetensors")
    os.truncate(model / "model.safetensors", 100_000)
    with pytest.raises(BadInput, match="truncated"):
        qlora_kernels.merge(adapter, tmp_path / "out", model=model)
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_there_stays(base, adapter, tmp_path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(BadInput, match="is not empty: give another output, or overwrite"):
        qlora_kernels.merge(adapter, out)
    assert (out / "mine.txt").read_text() == "mine"
    qlora_kernels.merge(adapter, out, overwrite=True)
    assert not (out / "mine.txt").exists() and (out / "model.safetensors").is_file()
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(BadInput, match="is a file"):
        qlora_kernels.merge(adapter, file, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "out"]
    empty = tmp_path / "empty"
    empty.mkdir()
    qlora_kernels.merge(adapter, empty)


@pytest.mark.parametrize("there", [False, True])
def test_a_full_disk_leaves_nothing_or_what_was(there, adapter, tmp_path, monkeypatch) -> None:
    out = tmp_path / "out"
    if there:
        qlora_kernels.merge(adapter, out)
        want = (out / "model.safetensors").read_bytes()
    put, count = tensor_files.TensorWriter.put, [0]

    def full(self, name, tensor):
        count[0] += 1
        if count[0] == 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        put(self, name, tensor)

    monkeypatch.setattr(tensor_files.TensorWriter, "put", full)
    with pytest.raises(RunError, match=r"out could not be written: the disk is full"):
        qlora_kernels.merge(adapter, out, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == (["out"] if there else [])
    if there:
        assert (out / "model.safetensors").read_bytes() == want


def test_the_command_says_what_is_wrong_in_a_line(adapter, tmp_path, capsys) -> None:
    from qlora_kernels.cli import main

    assert main(["merge", str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("qlora merge: ")
    with pytest.raises(SystemExit):
        main(["merge", str(adapter)])
