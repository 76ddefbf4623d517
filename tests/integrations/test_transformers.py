"""transformers: quantized while loading, saved, loaded again by name; errors that name what is."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from qlora_kernels import formats  # noqa: E402
from qlora_kernels.integrations.transformers import (  # noqa: E402
    QLoRAKernelsConfig,
    check_safetensors,
    default_dtype,
    install,
    load_quantized_model,
)
from qlora_kernels.nn import CheckpointError, Linear4bit, replace_linear_layers  # noqa: E402

ROOT = Path(__file__).parents[2]


def tiny(**changes: object) -> nn.Module:
    torch.manual_seed(0)
    shape: dict[str, object] = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    }
    config = transformers.LlamaConfig(**{**shape, **changes})
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    return tiny()


@pytest.fixture(scope="module")
def folder(dense: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dense")
    dense.save_pretrained(path)
    return path


@pytest.fixture
def ids() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randint(0, 96, (2, 7))


def layers(model: nn.Module) -> dict[str, Linear4bit]:
    return {n: m for n, m in model.named_modules() if isinstance(m, Linear4bit)}


def load(path: Path, **kwargs: object) -> nn.Module:
    return load_quantized_model(path, dtype=torch.float32, **kwargs)  # type: ignore[arg-type]


# --- quantized while loading --------------------------------------------------------------------


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("shards", [None, "100KB"])
def test_loading_is_replacing(tie: bool, shards: str | None, tmp_path: Path, ids) -> None:  # type: ignore[no-untyped-def]
    """The same bits as quantizing the loaded model's layers, the output layer left alone."""
    dense = tiny(tie_word_embeddings=tie)
    dense.save_pretrained(tmp_path, **({"max_shard_size": shards} if shards else {}))
    assert (tmp_path / "model.safetensors.index.json").exists() == bool(shards)
    model = load(tmp_path)
    want = copy.deepcopy(dense)
    replace_linear_layers(want, verbose=False)
    assert list(layers(model)) == list(layers(want))
    assert len(layers(model)) == 14
    theirs = want.state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(value, theirs[key]), key
    assert torch.equal(model(ids).logits, want(ids).logits)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie
    assert not model.training
    assert model.config.name_or_path == str(tmp_path)


def test_the_official_way_gives_the_same(folder: Path, ids) -> None:  # type: ignore[no-untyped-def]
    config = QLoRAKernelsConfig(bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=False)
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32
    )
    same = load(folder, quant_type="fp4", double_quant=False)
    assert torch.equal(model(ids).logits, same(ids).logits)
    for layer in layers(model).values():
        assert (layer.quant_type, layer.compress_statistics) == ("fp4", False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, "bfloat16"])
def test_dtype_is_that_of_all_that_stays_dense(folder: Path, dtype: torch.dtype | str) -> None:
    model = load_quantized_model(folder, dtype=dtype, compute_dtype="float32")
    want = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert {p.dtype for p in model.parameters()} == {want, torch.uint8}
    for layer in layers(model).values():
        assert layer.nested_absmax is not None
        assert layer.nested_absmax.dtype == torch.float32
        assert layer.dequantize_weight().dtype == want
        assert layer.compute_dtype == torch.float32
        assert not layer.weight.requires_grad


def test_auto_is_bf16_only_where_the_hardware_has_it(folder: Path) -> None:
    assert load_quantized_model(folder).dtype == default_dtype()
    has = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if not torch.cuda.is_available():
        assert default_dtype() == (torch.bfloat16 if has else torch.float32)


@pytest.mark.parametrize("capability, want", [((7, 5), torch.float16), ((8, 0), torch.bfloat16)])
def test_auto_on_a_gpu_goes_by_its_capability(monkeypatch, capability, want) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    assert default_dtype() == want


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}], ids=str)
def test_device_maps(folder: Path, device_map, ids) -> None:  # type: ignore[no-untyped-def]
    if device_map == "auto" and torch.cuda.is_available():
        pytest.skip("would go to the GPU")
    model = load(folder, device_map=device_map)
    assert torch.equal(model(ids).logits, load(folder)(ids).logits)


def test_a_format_of_your_own(folder: Path, tmp_path: Path, ids) -> None:  # type: ignore[no-untyped-def]
    fmt = formats.Format("cubes", [((i - 7.5) / 7.5) ** 3 for i in range(16)])
    model = load(folder, quant_type=fmt, blocksize=32)
    model.save_pretrained(tmp_path)
    y = model(ids).logits
    assert torch.equal(load(tmp_path)(ids).logits, y)
    del formats.FORMATS["cubes"]  # as in another process, which does not know it
    try:
        model = load(tmp_path)
        assert torch.equal(model(ids).logits, y)
        assert {m.quant_type for m in layers(model).values()} == {"cubes"}
    finally:
        formats.FORMATS.pop("cubes", None)


@pytest.mark.parametrize("skip", [["lm_head", "q_proj"], ["model.layers.0", "lm_head"], []])
def test_skipped_modules_by_transformers_rules(folder: Path, skip: list[str], ids) -> None:  # type: ignore[no-untyped-def]
    model = load(folder, skip_modules=skip)
    want = 15 if not skip else 12 if "q_proj" in skip else 7
    assert len(layers(model)) == want
    model(ids)


def test_a_tied_output_layer_stays_dense_whatever_is_skipped(tmp_path: Path) -> None:
    tiny(tie_word_embeddings=True).save_pretrained(tmp_path)
    model = load(tmp_path, skip_modules=[])
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(layers(model)) == 14


def test_conv1d_layers_are_turned_around(tmp_path: Path, ids) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=96, n_embd=64, n_layer=1, n_head=2, n_positions=16)
    dense = transformers.GPT2LMHeadModel(config).eval()
    dense.save_pretrained(tmp_path)
    model = load(tmp_path)
    assert set(layers(model)) == {
        f"transformer.h.0.{name}"
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    layer = model.transformer.h[0].mlp.c_fc
    want = Linear4bit(64, 256, quant_type="nf4")
    want.set_weight(dense.transformer.h[0].mlp.c_fc.weight.T.contiguous())
    assert torch.equal(layer.weight, want.weight)
    y = model(ids).logits
    assert (y - dense(ids).logits).norm() < 0.2 * y.norm()
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(load(tmp_path / "again")(ids).logits, y)


MEASURE = """
import sys, threading, time
import torch
from pathlib import Path
from qlora_kernels.integrations.transformers import load_quantized_model
def status(key):
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(key))
    return int(line.split()[1]) * 1024
load_quantized_model(sys.argv[1], dtype=torch.float32)  # code and allocator are there now
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
before = status("VmRSS")
model = load_quantized_model(sys.argv[2], dtype=torch.float32)
print(status("VmHWM") - before, model.get_memory_footprint())
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_the_peak_is_the_quantized_model_and_a_tensor_or_two(folder: Path, tmp_path: Path) -> None:
    big = tiny(hidden_size=512, intermediate_size=2048, num_hidden_layers=6)
    big.save_pretrained(tmp_path)
    dense = sum(p.numel() * 4 for p in big.parameters())
    largest = 4 * 512 * 2048
    del big
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEASURE, str(folder), str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    peak, footprint = map(int, done.stdout.split())
    assert dense > 80e6
    # Beside the dense tensor quantize holds its scales, or in plain torch copies of the tensor.
    assert peak < footprint + 8 * largest < 0.6 * dense


# --- saved and loaded again ---------------------------------------------------------------------


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("how", ["from_pretrained", "load_quantized_model"])
def test_save_and_reload_by_name(
    folder: Path,
    tmp_path: Path,
    ids,  # type: ignore[no-untyped-def]
    double_quant: bool,
    how: str,
) -> None:
    model = load(folder, double_quant=double_quant, blocksize=128, compute_dtype=torch.float32)
    y = model(ids).logits
    for i in range(2):  # what was loaded is saved just the same
        model.save_pretrained(tmp_path / str(i), max_shard_size="60KB")
        told = json.loads((tmp_path / str(i) / "config.json").read_text())["quantization_config"]
        assert (
            told
            == QLoRAKernelsConfig(
                bnb_4bit_blocksize=128,
                bnb_4bit_use_double_quant=double_quant,
                bnb_4bit_compute_dtype="float32",
            ).to_dict()
        )
        again = AutoModelForCausalLM.from_pretrained if how == "from_pretrained" else load
        model = again(tmp_path / str(i))
        assert torch.equal(model(ids).logits, y)
        assert {m.compute_dtype for m in layers(model).values()} == {torch.float32}
    first = load_file(next((tmp_path / "0").glob("model-00001*")))
    assert first.keys() == load_file(next((tmp_path / "1").glob("model-00001*"))).keys()


def test_a_later_dtype_casts_what_is_dense_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    load(folder).save_pretrained(tmp_path)
    model = load_quantized_model(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16, torch.uint8}
    assert {m.absmax.dtype for m in layers(model).values()} == {torch.uint8}
    assert {m.nested_offset.dtype for m in layers(model).values()} == {torch.float32}


def test_the_packed_tensors_are_readable_by_bitsandbytes(folder: Path, tmp_path: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model = load(folder)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    start = "model.layers.1.mlp.up_proj.weight"
    stats = {k.removeprefix(start + "."): v for k, v in state.items() if k.startswith(start + ".")}
    theirs = bnb.nn.Params4bit.from_prequantized(state[start], stats, device="cpu")
    got = bnb.functional.dequantize_4bit(theirs.data, theirs.quant_state)
    assert torch.equal(got, model.model.layers[1].mlp.up_proj.dequantize_weight())


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_checkpoints_load_and_save_the_same_bits(
    folder: Path,
    tmp_path: Path,
    ids,  # type: ignore[no-untyped-def]
    quant_type: str,
    nested: bool,
) -> None:
    pytest.importorskip("bitsandbytes")
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=torch.float32,
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32
    )
    want = theirs(ids).logits
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load(tmp_path / "theirs")
    assert len(layers(ours)) == 14
    assert {m.quant_type for m in layers(ours).values()} == {quant_type}
    torch.testing.assert_close(ours(ids).logits, want, rtol=1e-5, atol=1e-5)
    ours.save_pretrained(tmp_path / "ours")
    a, b = (load_file(tmp_path / d / "model.safetensors") for d in ("theirs", "ours"))
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert torch.equal(value, b[key]), key


def test_dense_weights_under_a_quantization_config_are_quantized_as_it_says(
    folder: Path,
    tmp_path: Path,
    ids,  # type: ignore[no-untyped-def]
) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    told = QLoRAKernelsConfig(bnb_4bit_blocksize=32).to_dict()
    configured(quantization_config=told)(tmp_path)
    assert torch.equal(load(tmp_path)(ids).logits, load(folder, blocksize=32)(ids).logits)


def test_dequantize_gives_a_plain_model(folder: Path, tmp_path: Path, ids) -> None:  # type: ignore[no-untyped-def]
    model = load(folder)
    y = model(ids).logits
    model.save_pretrained(tmp_path / "quantized")  # turns config.dtype into a name
    plain = model.dequantize()
    assert not layers(plain)
    torch.testing.assert_close(plain(ids).logits, y, rtol=1e-4, atol=1e-5)
    plain.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain/config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    assert torch.equal(again(ids).logits, plain(ids).logits)


# --- what else transformers does with a quantized model -----------------------------------------


def test_counting_parameters_needs_no_bitsandbytes(
    dense: nn.Module, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(folder)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # importing it would raise
    assert model.is_loaded_in_4bit
    assert model.num_parameters() == dense.num_parameters()
    embeddings = dense.get_input_embeddings().weight.numel()
    assert model.num_parameters(exclude_embeddings=True) == dense.num_parameters() - embeddings
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert model.num_parameters(only_trainable=True) == trainable
    assert dense.num_parameters() == sum(p.numel() for p in dense.parameters())
    assert model.get_memory_footprint() < 0.4 * dense.get_memory_footprint()


def test_installing_again_is_nothing() -> None:
    install()
    install()


def test_deepcopy_and_generation(folder: Path, ids) -> None:  # type: ignore[no-untyped-def]
    model = load(folder)
    kwargs = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    tokens = model.generate(ids, **kwargs)
    assert tokens.shape == (2, 12)
    assert torch.equal(copy.deepcopy(model).generate(ids, **kwargs), tokens)
    uncached = model.generate(ids, **kwargs, use_cache=False)
    assert torch.equal(uncached, tokens)


def test_the_trainer_wants_an_adapter_and_trains_it(folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    import qlora_kernels.integrations.peft  # noqa: F401

    model = load(folder)
    data = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 4
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=8,
        per_device_train_batch_size=2,
        learning_rate=0.02,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    with pytest.raises(ValueError, match="adapters"):
        transformers.Trainer(model, arguments, train_dataset=data)
    model = peft.prepare_model_for_kbit_training(
        model, gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    frozen = {n: p.clone() for n, p in model.named_parameters()}
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    trainer = transformers.Trainer(tuned, arguments, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.85 * losses[0]
    now = {n.replace(".base_layer", ""): p for n, p in tuned.base_model.model.named_parameters()}
    for name, parameter in frozen.items():
        assert torch.equal(parameter, now[name]), name


# --- bad input ----------------------------------------------------------------------------------


def truncated(path: Path) -> None:
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[:-100])


def longer(path: Path) -> None:
    with (path / "model.safetensors").open("ab") as file:
        file.write(b"more")


def edited(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        state = load_file(path / "model.safetensors")
        change(state)
        save_file(state, path / "model.safetensors", {"format": "pt"})

    return edit


def configured(**changes: object) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        config = json.loads((path / "config.json").read_text())
        config.update(changes)
        (path / "config.json").write_text(json.dumps(config))

    return edit


def pickled(path: Path) -> None:
    state = load_file(path / "model.safetensors")
    torch.save(state, path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()


def indexed(text: str) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        (path / "model.safetensors").unlink()
        (path / "model.safetensors.index.json").write_text(text)

    return edit


UP = "model.layers.1.mlp.up_proj.weight"

BAD_FOLDERS: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "no-config": (lambda p: (p / "config.json").unlink(), FileNotFoundError, "no config.json"),
    "no-weights": (
        lambda p: (p / "model.safetensors").unlink(), FileNotFoundError, "holds no weights",
    ),
    "pickle": (pickled, FileNotFoundError, "pytorch_model.bin, not read here .a pickle can run"),
    "truncated": (truncated, CheckpointError, r"is truncated: its header needs \d+ bytes"),
    "longer": (longer, CheckpointError, "is too long"),
    "cut-in-header": (
        lambda p: (p / "model.safetensors").write_bytes(b"\x00\x10\x00\x00\x00\x00\x00\x00{"),
        CheckpointError, "cut off in its header",
    ),
    "empty": (
        lambda p: (p / "model.safetensors").write_bytes(b""), CheckpointError, "not a safetensors",
    ),
    "not-safetensors": (
        lambda p: (p / "model.safetensors").write_bytes(b"\x02\x00\x00\x00\x00\x00\x00\x00no"),
        CheckpointError, "not safetensors' JSON",
    ),
    "index-is-no-json": (indexed("{"), CheckpointError, "not an index of shards"),
    "index-of-nothing": (indexed('{"a": 1}'), CheckpointError, "not an index of shards"),
    "shard-missing": (
        indexed('{"weight_map": {"a": "model-1.safetensors"}}'), FileNotFoundError,
        "lacks 1 of 1 shards: model-1.safetensors",
    ),
    "weight-missing": (edited(lambda s: s.pop(UP)), CheckpointError, f"lacks {re.escape(UP)}"),
    "norm-missing": (
        edited(lambda s: s.pop("model.norm.weight")), CheckpointError, "model.norm.weight",
    ),
    "weight-transposed": (
        edited(lambda s: s.update({UP: s[UP].T.contiguous()})), CheckpointError,
        rf"{re.escape(UP)}: the weight must have shape \(160, 64\), got \(64, 160\)",
    ),
    "other-method": (
        configured(quantization_config={"quant_method": "gptq"}), ValueError,
        "quantized by 'gptq' already",
    ),
    "eight-bit": (
        configured(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}),
        ValueError, "8-bit bitsandbytes checkpoint",
    ),
    "later-version": (
        configured(quantization_config={"quant_method": "qlora_kernels", "version": 99}),
        ValueError, "written by a later qlora_kernels",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_a_bad_folder_is_named(case: str, folder: Path, tmp_path: Path) -> None:
    damage, error, message = BAD_FOLDERS[case]
    path = tmp_path / "model"
    shutil.copytree(folder, path)
    damage(path)
    with pytest.raises(error, match=message):
        load(path)


BAD_PACKED: dict[str, tuple[Callable[[Path], object], str]] = {
    "absmax-missing": (edited(lambda s: s.pop(UP + ".absmax")), "weight.absmax is missing"),
    "json-missing": (
        edited(lambda s: s.pop(UP + ".quant_state.bitsandbytes__nf4")), "needs exactly one entry",
    ),
    "scales-missing": (
        edited(lambda s: [s.pop(k) for k in list(s) if k.startswith(UP + ".")]),
        "uint8 without its scales",
    ),
    "packed-missing": (edited(lambda s: s.pop(UP)), "is missing, its scales are there"),
    "packed-short": (edited(lambda s: s.update({UP: s[UP][:-1].clone()})), "packed bytes"),
    "swapped": (
        edited(lambda s: s.update({
            UP + ".quant_state.bitsandbytes__nf4":
                s[UP.replace("up", "down") + ".quant_state.bitsandbytes__nf4"].clone(),
        })),
        r"holds a weight of shape \(64, 160\), the layer needs \(160, 64\)",
    ),
    "skipped-but-packed": (
        configured(quantization_config=QLoRAKernelsConfig(
            llm_int8_skip_modules=["up_proj", "lm_head"]
        ).to_dict()),
        "takes a dense weight: llm_int8_skip_modules",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_PACKED)
def test_a_bad_4_bit_checkpoint_is_named(case: str, folder: Path, tmp_path: Path) -> None:
    damage, message = BAD_PACKED[case]
    load(folder).save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"quant_type": "nf5"}, ValueError, "did you mean 'nf4'"),
        ({"blocksize": 100}, ValueError, "blocksize must be one of"),
        ({"dtype": torch.float64}, ValueError, "dtype must be float32, bfloat16 or float16"),
        ({"dtype": "bf16"}, ValueError, "dtype must be float32, bfloat16 or float16, got 'bf16'"),
        ({"compute_dtype": torch.int8}, ValueError, "compute_dtype must be"),
        ({"skip_modules": ["model", "lm_head"]}, ValueError, "no linear layer to quantize"),
        (
            {"device_map": {"": "cpu", "model.layers.1": "disk"}},
            ValueError,
            r"device_map puts model\.layers\.1 on disk",
        ),
    ],
)
def test_bad_values_are_named(folder: Path, kwargs, error, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        load_quantized_model(folder, **kwargs)


def test_bad_places_are_named(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no folder /nowhere/model"):
        load_quantized_model("/nowhere/model")
    with pytest.raises(FileNotFoundError, match=r"there is no folder \./model"):
        load_quantized_model("./model")
    with pytest.raises(NotADirectoryError, match="give the folder"):
        load_quantized_model(folder / "config.json")


def test_a_name_that_the_hub_does_not_give(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*args: object, **kwargs: object) -> str:
        raise LocalEntryNotFoundError("outgoing traffic has been disabled")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match="no folder 'some/model', and the hub did not"):
        load_quantized_model("some/model")


def test_a_quantized_checkpoint_is_not_quantized_anew(folder: Path, tmp_path: Path) -> None:
    load(folder).save_pretrained(tmp_path)
    load(tmp_path, quant_type="nf4", blocksize=64, double_quant=True)
    with pytest.raises(ValueError, match=r"quant_type='fp4' was asked for.*already with 'nf4'"):
        load(tmp_path, quant_type="fp4")
    with pytest.raises(ValueError, match="blocksize=128 was asked for"):
        load(tmp_path, blocksize=128)


def test_configuration_errors() -> None:
    with pytest.raises(TypeError, match=r"takes no 'bnb_4bit_quant_typ'; did you mean 'bnb_4bit_q"):
        QLoRAKernelsConfig(bnb_4bit_quant_typ="nf4")
    with pytest.raises(ValueError, match="bnb_4bit_compute_dtype must be"):
        QLoRAKernelsConfig(bnb_4bit_compute_dtype="int8")
    with pytest.raises(ValueError, match="load_in_4bit=False"):
        QLoRAKernelsConfig(load_in_4bit=False)
    with pytest.raises(ValueError, match="quant_method is 'awq'"):
        QLoRAKernelsConfig(quant_method="awq")
    config = QLoRAKernelsConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    assert QLoRAKernelsConfig.from_dict(json.loads(config.to_json_string())).to_dict() == (
        config.to_dict()
    )


def test_a_whole_file_s_header_is_returned(folder: Path) -> None:
    header = check_safetensors(folder / "model.safetensors")
    assert header[UP] == {
        "dtype": "F32",
        "shape": [160, 64],
        "data_offsets": header[UP]["data_offsets"],
    }


# --- the dtype under which packed bytes are held ------------------------------------------------


@pytest.mark.parametrize("storage", [torch.bfloat16, "float32"], ids=str)
def test_quant_storage_is_kept_and_read_by_bitsandbytes(  # type: ignore[no-untyped-def]
    folder: Path, tmp_path: Path, ids, storage
) -> None:
    """Loaded, saved, reloaded: the bytes of uint8 under another dtype, frozen, never cast."""
    want = layers(load_quantized_model(folder, dtype=torch.float16))
    dtype = storage if isinstance(storage, torch.dtype) else getattr(torch, storage)
    config = QLoRAKernelsConfig(bnb_4bit_quant_storage=storage)
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float16
    )
    model.save_pretrained(tmp_path)
    for again in (model, load(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        for name, layer in layers(again).items():
            assert layer.weight.dtype == layer.quant_storage == dtype, name
            assert not layer.weight.requires_grad and type(layer.weight).__name__ == "Params4bit"
            got = layer.weight.view(torch.uint8).reshape(-1, 1)
            assert torch.equal(got, want[name].weight), name
        assert torch.isfinite(again(ids).logits).all()
    told = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert told["bnb_4bit_quant_storage"] == str(dtype).removeprefix("torch.")
    bnb = pytest.importorskip("bitsandbytes")
    state = load_file(tmp_path / "model.safetensors")
    stats = {k.removeprefix(UP + "."): v for k, v in state.items() if k.startswith(UP + ".")}
    theirs = bnb.nn.Params4bit.from_prequantized(state[UP], stats, device="cpu")
    got = bnb.functional.dequantize_4bit(theirs.data, theirs.quant_state)
    assert torch.equal(got, model.model.layers[1].mlp.up_proj.dequantize_weight())


def test_a_quant_storage_that_is_none_is_named(folder: Path) -> None:
    for storage in ("float64", "bits", torch.complex64):
        with pytest.raises(ValueError, match="bnb_4bit_quant_storage must be a dtype of 1, 2 or 4"):
            QLoRAKernelsConfig(bnb_4bit_quant_storage=storage)
