"""Which formats there are, by name and from files, and what is refused."""

from __future__ import annotations

import json
import math

import pytest
import torch

from qlora_kernels import functional as F4
from qlora_kernels import reference
from qlora_kernels.finetune.errors import BadInput
from qlora_kernels.formats import FP4_E2M1, NF4
from qlora_kernels.laboratory.contenders import Contender, designs, find_design, grid
from qlora_kernels.laboratory.study import finetune_contenders
from qlora_kernels.laboratory.userfiles import read_designs
from qlora_kernels.laboratory.weights import measure, summarize


def restored(contender: Contender, weights: torch.Tensor) -> torch.Tensor:
    packed, state = F4.quantize_4bit(
        weights,
        blocksize=contender.blocksize,
        compress_statistics=contender.nested,
        quant_type=contender.format_for(weights),
    )
    return F4.dequantize_4bit(packed, state, dtype=torch.float32)


def test_the_grid_has_each_block_size_with_and_without_double_quantization() -> None:
    known = designs()
    names = [c.name for c in grid([known[n] for n in ("nf4", "mxfp4", "nvfp4")], (64, 128))]
    assert names == ["nf4-64", "nf4-64-dq", "nf4-128", "nf4-128-dq", "mxfp4-32", "nvfp4-16"]
    assert [c.name for c in grid([known["nf4"]], (64,), "yes")] == ["nf4-64-dq"]


@pytest.mark.parametrize(
    ("name", "bits"),
    [("nf4", 4.5), ("nf4-dq", 4.126953125), ("mxfp4", 4.25), ("nvfp4", 4.5), ("two_bits", 2.5)],
)
def test_bits_a_weight(name: str, bits: float) -> None:
    (contender,) = finetune_contenders([name], designs())
    assert contender.bits == bits


def test_every_design_runs_on_the_kernels_as_the_reference_says() -> None:
    weights = torch.randn(24, 96) * 0.02
    for contender in grid(designs().values(), (32,), "no"):
        fmt = contender.format_for(weights)
        packed, state = F4.quantize_4bit(weights, blocksize=contender.blocksize, quant_type=fmt)
        if fmt.scale == "fp32":
            plain, absmax = reference.quantize(weights, fmt, contender.blocksize)
            assert torch.equal(packed.view(-1), plain) and torch.equal(state.absmax, absmax)
        x = torch.randn(3, 96)
        dense = F4.dequantize_4bit(packed, state, dtype=torch.float32)
        assert torch.allclose(F4.linear_4bit(x, packed, state), x @ dense.T, atol=1e-5), fmt.name


def test_the_repeat_has_other_bytes_and_the_same_values() -> None:
    weights = torch.randn(16, 128)
    found = {}
    for name in ("nf4", "repeat"):
        (contender,) = grid([find_design(name)], double_quant="no")
        packed, state = F4.quantize_4bit(weights, quant_type=contender.format_for(weights))
        found[name] = packed, F4.dequantize_4bit(packed, state, dtype=torch.float32)
    assert not torch.equal(found["nf4"][0], found["repeat"][0])
    assert torch.equal(found["nf4"][1], found["repeat"][1])


def test_mxfp4_has_the_standards_values() -> None:
    weights = torch.randn(8, 64)
    (contender,) = grid([find_design("mxfp4")])
    got = restored(contender, weights).view(-1, 32)
    absmax = weights.view(-1, 32).abs().amax(1, keepdim=True)
    scale = 2.0 ** (absmax.log2().floor() - 2)  # OCP Microscaling 1.0: emax of E2M1 is 2
    levels = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    levels = torch.cat([-levels.flip(0), levels])
    assert torch.isin(got / scale, levels).all()
    best = (weights.view(-1, 32)[..., None] - levels * scale[..., None]).abs().amin(-1)
    assert torch.allclose((got - weights.view(-1, 32)).abs(), best, atol=1e-6)


def test_nvfp4_has_the_standards_values() -> None:
    weights = torch.randn(8, 64)
    (contender,) = grid([find_design("nvfp4")])
    got = restored(contender, weights).view(-1, 16)
    blocks = weights.view(-1, 16)
    tensor = weights.abs().max() / (448 * 6)
    scale = (blocks.abs().amax(1, keepdim=True) / 6 / tensor).to(
        torch.float8_e4m3fn
    ).float() * tensor
    levels = FP4_E2M1.tensors()[0].unique() * 6
    distance = (got[..., None] - levels * scale[..., None]).abs().amin(-1)
    assert distance.max() < 1e-6 * weights.abs().max()


def test_one_learned_codebook_a_weight_and_one_name_each() -> None:
    (contender,) = grid([find_design("learned")], double_quant="no")
    first, second = (contender.format_for(torch.randn(8, 128)) for _ in range(2))
    assert first.name != second.name and first.name.startswith("learned.")
    weights = torch.randn(8, 128)
    assert contender.format_for(weights) is contender.format_for(weights)


@pytest.mark.parametrize(("name", "near"), [("nf5", "nf4"), ("boff4", "bof4"), ("mxpf4", "mxfp4")])
def test_unknown_formats_suggest_the_nearest(name: str, near: str) -> None:
    with pytest.raises(BadInput, match=f"did you mean {near}"):
        find_design(name)


@pytest.mark.parametrize(
    ("names", "words"),
    [(["mxfp4-dq"], "not double-quantized"), (["nf4-65"], "65"), (["zzzz"], "unknown format")],
)
def test_bases_that_cannot_be_are_named(names, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        finetune_contenders(names, designs())


# --- from files ----------------------------------------------------------------------------------


def test_a_codebook_from_json_and_yaml(tmp_path) -> None:
    entry = {"name": "mine", "codebook": list(NF4.codebook), "blocksizes": [32], "scale": "e8m0"}
    (tmp_path / "f.json").write_text(json.dumps({"schema": 1, "formats": [entry]}))
    (tmp_path / "g.yaml").write_text("codebook: [" + ", ".join(map(str, NF4.codebook)) + "]\n")
    (mine,) = read_designs(tmp_path / "f.json")
    assert [c.name for c in grid([mine], (64, 128))] == ["mine-32"] and mine.scale == "e8m0"
    (same,) = read_designs(tmp_path / "g.yaml")
    weights = torch.randn(8, 128)
    contenders = grid([same, find_design("nf4")], double_quant="no")
    first, second = (measure(c, [("w", weights)]) for c in contenders)
    assert same.name == "g" and first == second


def test_formats_and_a_learner_from_python(tmp_path) -> None:
    path = tmp_path / "ideas.py"
    path.write_text(
        "from qlora_kernels.formats import Format\n"
        "import torch\n"
        "FORMAT = Format('even', [(2 * i - 15) / 15 for i in range(16)])\n"
        "NAME = 'quantiles'\n"
        "def learn(weights, blocksize, energy):\n"
        "    blocks = weights.reshape(-1, blocksize)\n"
        "    values = (blocks / blocks.abs().amax(1, keepdim=True)).flatten()\n"
        "    return torch.quantile(values, (torch.arange(16) + 0.5) / 16).tolist()\n"
    )
    even, learned = read_designs(path)
    assert (even.name, learned.name) == ("even", "quantiles") and even.digest == learned.digest
    weights = [("w", torch.randn(64, 256))]
    rows = [summarize(measure(c, weights)) for c in grid([even, learned], double_quant="no")]
    assert all(15 < row["sqnr"] < 22 for row in rows) and rows[0]["sqnr"] != rows[1]["sqnr"]


GOOD = [i / 15 for i in range(-15, 1)]


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"codebook": [*GOOD[:-1], math.nan]}, "finite"),
        ({"codebook": GOOD[:-1]}, "16 values, got 15"),
        ({"codebook": [0.5] * 16}, "16 equal values"),
        ({"codebook": ["a"] * 16}, "could not convert|must be numbers"),
        ({"codebook": GOOD, "scale": "e5m2"}, "scale is 'e5m2'"),
        ({"codebook": GOOD, "blocksizes": [48]}, "blocksizes must be"),
        ({"codebook": GOOD, "colour": "red"}, "unknown colour"),
        ({"codebook": GOOD, "schema": 2}, "schema 2; this version reads schema 1"),
        ({"name": "x"}, "codebook is missing"),
        ({"name": "nf4", "codebook": GOOD}, "already registered as 'nf4'"),
        ([1, 2], "list of formats"),
    ],
)
def test_bad_files_are_named(tmp_path, entry, words: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(entry))
    with pytest.raises(BadInput, match=words):
        read_designs(path)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("x.py", "1 / 0", "ZeroDivisionError"),
        ("x.py", "y = 1", "neither FORMAT"),
        ("x.py", "learn = 3", "must be a function"),
        ("x.py", "FORMAT = 3", "Format objects"),
        ("x.json", "{", "not JSON"),
        ("x.yaml", "a: [", "not YAML"),
        ("x.toml", "", "ends in .py"),
        ("x.json", None, "no file"),
    ],
)
def test_files_that_are_none_are_named(tmp_path, name: str, text: str | None, words: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(BadInput, match=words):
        read_designs(tmp_path / name)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return [0.0] * 16", "16 equal values"),
        ("return [float('nan')] * 16", "finite"),
        ("return weights.nothing", "AttributeError"),
    ],
)
def test_a_learner_that_fails_is_named(tmp_path, body: str, words: str) -> None:
    (tmp_path / "idea.py").write_text(f"def learn(weights, blocksize, energy):\n    {body}\n")
    (design,) = read_designs(tmp_path / "idea.py")
    with pytest.raises(BadInput, match=f"idea.*{words}"):
        Contender(design, 64, False).format_for(torch.randn(4, 64))
