"""Damaged checkpoints: an error that names what is wrong, or a model whose every tensor is intact.

*Intact* means, of a checkpoint of ours, which has checksums: equal to what was saved. Of one
without them, as bitsandbytes writes it: equal to what the file's bytes say, by another reader.

Every damage is drawn from a seed, done to a copy of a small checkpoint, and loaded three ways.
"""

from __future__ import annotations

import json
import pickle
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from qlora_kernels import takeover  # noqa: E402
from qlora_kernels.integrations import checkpoint_files as files  # noqa: E402
from qlora_kernels.integrations.transformers import (  # noqa: E402
    load_quantized_model,
)
from qlora_kernels.nn import CheckpointError  # noqa: E402

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


# --- a small checkpoint, in each form -----------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """``ours`` (with checksums), ``sharded`` (the same in shards), ``own`` (blocks of 16, which
    bitsandbytes lacks), and ``theirs``: ours without checksums, which is what bitsandbytes writes
    (held against it in test_transformers.py)."""
    root = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=False,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(root / "dense")
    model = load_quantized_model(root / "dense", dtype=torch.float32)
    model.save_pretrained(root / "ours")
    model.save_pretrained(root / "sharded", max_shard_size="12KB")
    assert len(list((root / "sharded").glob("*.safetensors"))) > 2
    model = load_quantized_model(root / "dense", dtype=torch.float32, blocksize=16)
    model.save_pretrained(root / "own")
    shutil.copytree(root / "ours", root / "theirs")
    save_file(load_file(root / "ours" / WEIGHTS), root / "theirs" / WEIGHTS, {"format": "pt"})
    return {name: root / name for name in ("ours", "sharded", "own", "theirs")}


def read(folder: Path) -> torch.nn.Module:
    return load_quantized_model(folder, dtype=torch.float32)


def from_pretrained(folder: Path) -> torch.nn.Module:
    """The official way: the configuration of the checkpoint leads to our quantizer."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def taken_over(folder: Path) -> torch.nn.Module:
    """A script for bitsandbytes, under ``enable()``."""
    takeover.enable(verbose=False)
    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    finally:
        takeover.disable()


WAYS = {"ours": (read, from_pretrained), "sharded": (read, from_pretrained),
        "own": (read, from_pretrained), "theirs": (read, taken_over)}  # fmt: skip


# --- damage -------------------------------------------------------------------------------------


def flip(data: bytes, rng: random.Random, begin: int, end: int) -> bytes:
    at = rng.randrange(begin, end)
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def header_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(header: dict[str, Any], tensors: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + tensors


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in load_file(path).items()}  # the file may be written to


def a_shard(folder: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(folder.glob("*.safetensors")))


def on_bytes(damage: Callable[[bytes, random.Random], bytes]) -> Callable[..., None]:
    def do(folder: Path, rng: random.Random) -> None:
        path = a_shard(folder, rng)
        path.write_bytes(damage(path.read_bytes(), rng))

    return do


def flip_in_header(data: bytes, rng: random.Random) -> bytes:
    return flip(data, rng, 0, 8 + struct.unpack("<Q", data[:8])[0])


def flip_in_data(data: bytes, rng: random.Random) -> bytes:
    return flip(data, rng, 8 + struct.unpack("<Q", data[:8])[0], len(data))


def noise(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + rng.randbytes(rng.randrange(1, 64)) + data[at + rng.randrange(64) :]


STRANGE: list[Any] = [
    None, True, -1, 0, 1, 3, 2**31, 2**63, 2**64 - 1, 2**64, 10**40, 1.5, float("nan"), "", "nf4",
    "float32", [], [0], [2**62, 4], [-1, 4], {}, {"a": 1}, "U8", "F32", "BF16", "I64", "../x",
]  # fmt: skip


def lie_in_header(data: bytes, rng: random.Random) -> bytes:
    """Another dtype, shape or offsets, an entry more, less or by another name."""
    header, tensors = header_of(data)
    names = sorted(header)
    name = rng.choice([n for n in names if n != "__metadata__"])
    kind = rng.randrange(6)
    if kind == 0:
        del header[name]
    elif kind == 1:
        header[name + rng.choice(["x", ".absmax", ".weight"])] = header[name]
    elif kind == 2:
        header[rng.choice(names) + "y"] = header.pop(name)
    elif kind == 3:
        header[name][rng.choice(["dtype", "shape", "data_offsets"])] = rng.choice(STRANGE)
    elif kind == 4:
        field = header[name][rng.choice(["shape", "data_offsets"])]
        field[rng.randrange(len(field))] = rng.choice([v for v in STRANGE if type(v) is int])
    else:
        header["__metadata__"] = rng.choice(STRANGE)
    return with_header(header, tensors)


def swap_tensors(data: bytes, rng: random.Random) -> bytes:
    """Two entries change places: what each name stands for is the other's."""
    header, tensors = header_of(data)
    names = [n for n in sorted(header) if n != "__metadata__"]
    a, b = rng.choice(names), rng.choice(names)
    header[a], header[b] = header[b], header[a]
    return with_header(header, tensors)


def edit_state(folder: Path, rng: random.Random) -> None:
    """The JSON of a packed weight says something else (and, saved so, has no checksums)."""
    path = a_shard(folder, rng)
    state = tensors_of(path)
    keys = [k for k in sorted(state) if ".quant_state." in k]
    if not keys:
        return
    key = rng.choice(keys)
    info = json.loads(bytes(state[key].tolist()))
    name = rng.choice([*info, "scale", "thresholds", "tensor_scale", "x"])
    if name in info and rng.random() < 0.3:
        del info[name]
    else:
        info[name] = rng.choice(STRANGE)
    text = json.dumps(info).encode()
    state[key] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    save_file(state, path, {"format": "pt"})


def edit_tensors(folder: Path, rng: random.Random) -> None:
    """A tensor less, one more, one cut, cast or reshaped, two swapped (without checksums)."""
    path = a_shard(folder, rng)
    state = tensors_of(path)
    a, b = rng.choice(sorted(state)), rng.choice(sorted(state))
    kind = rng.randrange(6)
    if kind == 0:
        del state[a]
    elif kind == 1:
        state[a + rng.choice([".absmax", ".SCB", ".quant_map", ".nested_quant_map"])] = torch.zeros(
            4
        )
    elif kind == 2:
        state[a] = state[a].reshape(-1)[: rng.randrange(state[a].numel())].clone()
    elif kind == 3:
        state[a] = state[a].to(rng.choice([torch.int8, torch.float16, torch.float64, torch.bool]))
    elif kind == 4:
        state[a] = state[a].reshape(1, -1).repeat(rng.choice([1, 2]), 1).contiguous()
    else:
        state[a], state[b] = state[b].clone(), state[a].clone()
    if state:
        save_file(state, path, {"format": "pt"})


def edit_json(name: str) -> Callable[..., None]:
    """config.json or the index: a byte, a value, a name."""

    def do(folder: Path, rng: random.Random) -> None:
        path = folder / name
        if not path.exists():
            path = folder / "config.json"
        if rng.random() < 0.5:
            path.write_bytes(flip(path.read_bytes(), rng, 0, path.stat().st_size))
            return
        whole = json.loads(path.read_text())
        part: Any = whole
        inner = [k for k, v in whole.items() if isinstance(v, dict)]
        if inner and rng.random() < 0.6:
            part = whole[rng.choice(inner)]
        key = rng.choice(sorted(part))
        if rng.random() < 0.4:
            del part[key]
        else:  # sizes beyond what can be drawn in a test are another matter
            part[key] = rng.choice([v for v in STRANGE if type(v) is not int or abs(v) < 4])
        path.write_text(json.dumps(whole))

    return do


def mix_files(folder: Path, rng: random.Random) -> None:
    """Shards that change names, one that is gone, empty or a pickle."""
    shards = sorted(folder.glob("*.safetensors"))
    a, b = rng.choice(shards), rng.choice(shards)
    kind = rng.randrange(4)
    if kind == 0:
        a.rename(folder / "aside")
        if a != b:
            b.rename(a)
            (folder / "aside").rename(b)
    elif kind == 1:
        a.unlink()
    elif kind == 2:
        a.write_bytes(rng.choice([b"", b"\0" * 8, b"\xff" * 64, b"\0" * 6 + b"\0\x80" + b"{}"]))
    else:
        state = tensors_of(a)
        torch.save(state, a) if rng.random() < 0.5 else a.write_bytes(pickle.dumps([1, 2]))


DAMAGES: dict[str, Callable[..., None]] = {
    "flip-header": on_bytes(flip_in_header),
    "flip-data": on_bytes(flip_in_data),
    "flip-anywhere": on_bytes(lambda d, rng: flip(d, rng, 0, len(d))),
    "noise": on_bytes(noise),
    "truncate": on_bytes(lambda d, rng: d[: rng.randrange(len(d))]),
    "append": on_bytes(lambda d, rng: d + rng.randbytes(rng.randrange(1, 100))),
    "lie-in-header": on_bytes(lie_in_header),
    "swap-tensors": on_bytes(swap_tensors),
    "edit-state": edit_state,
    "edit-tensors": edit_tensors,
    "edit-config": edit_json("config.json"),
    "edit-index": edit_json(INDEX),
    "mix-files": mix_files,
}


# --- what came of it ----------------------------------------------------------------------------


def bytes_of(t: torch.Tensor) -> bytes:
    return t.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()


def told_by(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the folder's files, by safetensors' own reader."""
    return {k: v for p in folder.glob("*.safetensors") for k, v in tensors_of(p).items()}


def check_intact(model: torch.nn.Module, want: dict[str, torch.Tensor]) -> None:
    """Every tensor of the model has the bytes of ``want``; JSON says the same; quant_map is the
    format's table, whatever the last bits of the file's were."""
    state = model.state_dict()
    tied = getattr(model, "all_tied_weights_keys", {})
    for key, value in state.items():
        if ".quant_state." in key:
            theirs = json.loads(bytes_of(want[key]))
            for name, told in json.loads(bytes_of(value)).items():
                if name == "nested_offset":
                    assert told == torch.tensor(float(theirs[name])).item(), key
                else:
                    assert told == theirs[name], (key, name)
        elif key.endswith(".quant_map"):
            torch.testing.assert_close(value, want[key].reshape(-1), rtol=0, atol=1e-5)
        elif key not in tied:
            wanted = want[key]
            if wanted.is_floating_point() and wanted.dtype != value.dtype:
                wanted = wanted.to(value.dtype)  # the dtype that was asked for
            assert bytes_of(value) == bytes_of(wanted), key


def has_checksums(folder: Path) -> bool:
    return all(
        files.CHECKSUMS in header_of(p.read_bytes())[0].get("__metadata__", {})
        for p in folder.glob("*.safetensors")
    )


def corrupt_and_load(form: str, seed: int, source: Path, folder: Path) -> str:
    """One damage and one load: ``error`` or ``intact``; asserts that it is either."""
    rng = random.Random(f"{form} {seed}")
    kind = sorted(DAMAGES)[seed % len(DAMAGES)]
    way = WAYS[form][seed // len(DAMAGES) % 2]
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    DAMAGES[kind](folder, rng)
    what = f"{form} seed {seed}: {kind}, {way.__name__}"
    try:
        model = way(folder)
    except Exception as error:
        assert str(error).strip(), f"{what}: {type(error)} without a word"
        if way is read:
            named = (CheckpointError, ValueError, OSError, NotImplementedError)
            assert isinstance(error, named), f"{what}: {error!r}"
        return "error"
    # (Without our mark a configuration is bitsandbytes', and so are the layers.)
    assert any(type(m).__name__ == "Linear4bit" for m in model.modules()), f"{what}: dense"
    want = told_by(source if has_checksums(folder) else folder)
    try:
        check_intact(model, want)
    except (AssertionError, KeyError, ValueError) as error:
        raise AssertionError(f"{what}: loaded, and is not intact: {error}") from error
    return "intact"


def corruptions(form: str, seeds: range, checkpoints: dict[str, Path], folder: Path) -> None:
    transformers.utils.logging.set_verbosity(transformers.utils.logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    try:
        got = [corrupt_and_load(form, s, checkpoints[form], folder) for s in seeds]
    finally:
        transformers.utils.logging.set_verbosity_warning()
    assert got.count("error") > len(got) // 3, "damage that damages nothing proves nothing"


@pytest.mark.parametrize("form", WAYS)
def test_a_hundred_corruptions(form, checkpoints, tmp_path) -> None:
    corruptions(form, range(26), checkpoints, tmp_path / "model")


@pytest.mark.full
@pytest.mark.parametrize("form", WAYS)
def test_a_thousand_corruptions(form, checkpoints, tmp_path) -> None:
    """Of each form."""
    corruptions(form, range(26, 1026), checkpoints, tmp_path / "model")


# --- pickles, and nothing of them is executed ---------------------------------------------------


class Evil:
    """What an unpickler that trusts its file would do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", [WEIGHTS, "pytorch_model.bin"])
@pytest.mark.parametrize("archive", [True, False], ids=["zip", "bare"])
def test_a_pickle_is_refused_and_not_executed(name, archive, checkpoints, tmp_path) -> None:
    trap = tmp_path / "executed"
    folder = tmp_path / "model"
    for form, ways in WAYS.items():
        if form == "sharded":
            continue
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(checkpoints[form], folder)
        (folder / WEIGHTS).unlink()
        if archive:
            torch.save({"weight": Evil(trap)}, folder / name)
        else:
            (folder / name).write_bytes(pickle.dumps({"weight": Evil(trap)}))
        for way in ways:
            with pytest.raises(
                Exception, match=r"pickle|safetensors|[Hh]eader|Unpickl|Weights only"
            ):
                way(folder)
    assert not trap.exists()


def test_what_is_said_of_a_pickle(checkpoints, tmp_path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoints["ours"], folder)
    torch.save(tensors_of(folder / WEIGHTS), folder / "aside")
    (folder / "aside").replace(folder / WEIGHTS)
    with pytest.raises(CheckpointError, match="but a pickle .*which can run code: it is not read"):
        read(folder)
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="4-bit checkpoints are read from safetensors"):
        from_pretrained(folder)


# --- headers that overflow, and what is said of checksums ---------------------------------------


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 4]}, "data_offsets .* hold"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [0, 2**64]}, "data_offsets .* hold"),
        ({"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}, r"has shape \[-1\]"),
        ({"dtype": "F33", "shape": [1], "data_offsets": [0, 4]}, "none of safetensors'"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [8, 12]}, "leaves a gap"),
        ({"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}, "has shape"),
        ([], "not safetensors' JSON"),
    ],
)
def test_a_header_that_lies_is_named(entry, said, tmp_path) -> None:
    path = tmp_path / WEIGHTS
    path.write_bytes(with_header({"x": entry}, b"\0" * 4))
    with pytest.raises(CheckpointError, match=said) as error:
        files.check_safetensors(path)
    assert str(path) in str(error.value)


def test_headers_that_overlap_repeat_or_nest_without_end(tmp_path) -> None:
    path = tmp_path / WEIGHTS
    one = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}
    path.write_bytes(with_header({"a": one, "b": one}, b"\0" * 4))
    with pytest.raises(CheckpointError, match="overlaps"):
        files.check_safetensors(path)
    text = f'{{"a": {json.dumps(one)}, "a": {json.dumps(one)}}}'.encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 4)
    with pytest.raises(CheckpointError, match="'a' stands there twice"):
        files.check_safetensors(path)
    text = b"[" * 100_000
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(CheckpointError, match="not safetensors' JSON"):
        files.check_safetensors(path)
    path.write_bytes(struct.pack("<Q", 2**63) + b"{}")
    with pytest.raises(CheckpointError, match="cut off in its header"):
        files.check_safetensors(path)


def test_checksums_are_of_dtype_shape_and_bytes_and_others_read_past_them(checkpoints) -> None:
    path = checkpoints["ours"] / WEIGHTS
    state = load_file(path)
    told = json.loads(header_of(path.read_bytes())[0]["__metadata__"][files.CHECKSUMS])
    assert told == files.checksums_of(state)
    x = torch.zeros(4, 4)
    assert len({files.checksums_of({"x": t})["x"] for t in (x, x.view(2, 8), x.int(), x + 1)}) == 4
    assert files.checksums_of({"x": torch.zeros(0)})["x"]


def test_a_changed_byte_is_named_by_its_tensor(checkpoints, tmp_path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoints["ours"], folder)
    data = (folder / WEIGHTS).read_bytes()
    header, tensors = header_of(data)
    name = "model.layers.1.mlp.up_proj.weight"
    at = len(data) - len(tensors) + header[name]["data_offsets"][0]
    (folder / WEIGHTS).write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    for way in WAYS["ours"]:
        with pytest.raises(CheckpointError, match=f"checksums of {name} do not agree"):
            way(folder)


def test_an_empty_tensor_is_named(checkpoints, tmp_path) -> None:
    """safetensors' own readers end in an error that names no tensor."""
    for form, ways in WAYS.items():
        folder = tmp_path / form
        shutil.copytree(checkpoints[form], folder)
        path = sorted(folder.glob("*.safetensors"))[0]
        state = load_file(path)
        name = sorted(state)[0]
        save_file({**state, name: torch.zeros(0, dtype=state[name].dtype)}, path)
        for way in ways:
            with pytest.raises(CheckpointError, match=rf"{name} has shape \[0\]"):
                way(folder)


def test_a_config_of_later_or_that_lies(checkpoints, tmp_path) -> None:
    for change, said in (
        ({"num_hidden_layers": 1}, "weights that its config.json knows nothing of"),
        ({"num_hidden_layers": 3}, "lacks model.layers.2"),
        ({"hidden_size": 64}, r"the layer needs \("),
        ({"vocab_size": 50}, "lacks model.embed_tokens.weight, .* or has them in another shape"),
        ({"num_attention_heads": 0}, "transformers builds no model of"),
    ):
        folder = tmp_path / said[:8]
        shutil.copytree(checkpoints["ours"], folder, dirs_exist_ok=True)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(CheckpointError, match=said):
            read(folder)
    config["quantization_config"]["qlora_kernels"]["version"] = 99
    (folder / "config.json").write_text(json.dumps(config))
    for way in WAYS["ours"]:
        with pytest.raises(ValueError, match="later qlora_kernels"):
            way(folder)


# --- adapters -----------------------------------------------------------------------------------


def test_an_adapter_of_another_model_or_rank(checkpoints, tmp_path) -> None:
    peft = pytest.importorskip("peft")
    from qlora_kernels.integrations.adapters import load_adapter

    def model() -> torch.nn.Module:
        return read(checkpoints["ours"])

    tuned = peft.get_peft_model(model(), peft.LoraConfig(r=4, target_modules=["up_proj", "q_proj"]))
    tuned.save_pretrained(tmp_path / "good")
    assert load_adapter(model(), tmp_path / "good").peft_config["default"].r == 4
    weights, config = "adapter_model.safetensors", "adapter_config.json"
    up = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"

    def configured(**changes: Any) -> Callable[[Path], None]:
        def edit(folder: Path) -> None:
            told = json.loads((folder / config).read_text())
            (folder / config).write_text(json.dumps({**told, **changes}))

        return edit

    def edited(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
        def edit(folder: Path) -> None:
            state = tensors_of(folder / weights)
            change(state)
            save_file(state, folder / weights, {"format": "pt"})

        return edit

    def pickled(folder: Path) -> None:
        (folder / weights).unlink()
        torch.save({"x": Evil(tmp_path / "executed")}, folder / "adapter_model.bin")

    bad: list[tuple[Callable[[Path], Any], str]] = [
        (configured(r=8), "rank 4; adapter_config.json says 8"),
        (edited(lambda s: s.update({up: torch.zeros(4, 64)})), "layer takes .4, 32.*another model"),
        (
            edited(lambda s: [s.update({k.replace("s.1.", "s.9."): s.pop(k)}) for k in list(s)]),
            r"layers.9.* which the model does not have: it is of another model",
        ),
        (edited(lambda s: s.pop(up)), "lacks lora_A of model.layers.1.mlp.up_proj"),
        (
            edited(lambda s: [s.pop(k) for k in list(s) if "layers.1" in k]),
            r"no tensors for them \(2 modules\): it is of a model with fewer layers",
        ),
        (pickled, "adapter_model.bin, not read here"),
        (lambda f: (f / weights).write_bytes((f / weights).read_bytes()[:-3]), "is truncated"),
        (lambda f: (f / config).write_text("{"), "is not JSON"),
        (lambda f: (f / config).unlink(), "not a PEFT adapter"),
    ]
    base = model()
    before = [name for name, _ in base.named_modules()]
    for i, (damage, said) in enumerate(bad):
        folder = tmp_path / str(i)
        shutil.copytree(tmp_path / "good", folder)
        damage(folder)
        with pytest.raises((CheckpointError, FileNotFoundError), match=said):
            load_adapter(base, folder)
    assert [name for name, _ in base.named_modules()] == before, "nothing was put into the model"
    assert not (tmp_path / "executed").exists()
