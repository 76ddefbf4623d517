"""The blocks of docs/migrate.md, as they stand there; of a diff both sides."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

for name in ("bitsandbytes", "peft", "trl", "datasets", "transformers"):
    pytest.importorskip(name)

import transformers  # noqa: E402

import qlora_kernels  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "migrate.md"
SECTIONS = {
    part.partition("\n")[0]: part for part in re.split(r"^## ", PAGE.read_text(), flags=re.M)[1:]
}
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
BLOCKS = [
    (f"{title.partition('.')[0]}-{kind}-{i}", kind, text)
    for title, section in SECTIONS.items()
    for i, (kind, text) in enumerate(FENCE.findall(section))
]


def side(diff: str, sign: str) -> str:
    """One side of a diff."""
    lines = diff.splitlines()
    assert all(line[:2] in ("  ", "- ", "+ ", "", "+", "-") for line in lines), diff
    return "\n".join(line[2:] for line in lines if line[:1] in (" ", sign, ""))


@pytest.fixture(scope="module")
def folders(tiny_model, tiny_data, tmp_path_factory) -> dict[str, Path]:
    """What the page's paths stand for."""
    from peft import LoraConfig, get_peft_model

    from qlora_kernels.integrations.transformers import load_quantized_model

    root = tmp_path_factory.mktemp("migrate")
    model = load_quantized_model(tiny_model, dtype=torch.float32)
    model.save_pretrained(root / "packed")
    model.name_or_path = str(tiny_model)
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    for p in tuned.parameters():
        if p.requires_grad:
            p.data.normal_(std=0.05)
    tuned.save_pretrained(root / "adapter")
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tiny_model, quantization_config=config
    )
    theirs.save_pretrained(root / "theirs")
    assert "qlora" not in (root / "theirs" / "config.json").read_text()
    return {
        "path/to/model": tiny_model,
        "path/to/4bit-checkpoint": root / "theirs",
        "path/to/adapter": root / "adapter",
        "train.jsonl": tiny_data,
    }


@pytest.fixture(autouse=True)
def _as_before(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    transformers.logging.set_verbosity_error()
    sys.modules.pop("qlora_kernels.auto", None)
    yield
    qlora_kernels.disable()
    sys.modules.pop("qlora_kernels.auto", None)


def run(text: str, folders: dict[str, Path], tmp_path: Path) -> dict:
    for name, path in folders.items():
        text = text.replace(f'"{name}"', repr(str(path)))
    text = text.replace("max_steps=100", "max_steps=2, disable_tqdm=True")
    if not torch.cuda.is_available():
        text = text.replace("max_length=256", "max_length=64, bf16=False")
    assert "path/to" not in text
    names: dict = {"__name__": "migrate"}
    exec(compile(text, str(PAGE), "exec"), names)
    return names


def makers(model: torch.nn.Module) -> set[str]:
    """Whose 4-bit layers are in it."""
    return {
        type(m).__module__.partition(".")[0]
        for m in model.modules()
        if type(m).__name__ in ("Linear4bit", "LinearNF4")
        and not type(m).__module__.startswith("peft.")
    }


DIFFS = [pytest.param(text, id=name) for name, kind, text in BLOCKS if kind == "diff"]
PYTHON = [pytest.param(text, id=name) for name, kind, text in BLOCKS if kind == "python"]


def test_the_page_has_these_blocks_and_no_others() -> None:
    kinds = [kind for _, kind, _ in BLOCKS]
    assert {k: kinds.count(k) for k in kinds} == {"diff": 7, "python": 8, "sh": 1, "yaml": 2}
    assert len(SECTIONS) == 13


@pytest.mark.parametrize("text", DIFFS)
@pytest.mark.filterwarnings("ignore")
def test_both_sides_of_a_change(text, folders, tmp_path) -> None:
    before = run(side(text, "-"), folders, tmp_path)
    assert makers(before["model"]) == {"bitsandbytes"} and not qlora_kernels.enabled()
    after = run(side(text, "+"), folders, tmp_path)
    assert makers(after["model"]) == {"qlora_kernels"}
    if "loss" in after:
        assert after["loss"].calls >= 2 and not after["loss"].fallbacks
    x = after.get("y")
    if x is not None:
        assert torch.isfinite(x).all() and x.shape == before["y"].shape


@pytest.mark.parametrize("text", PYTHON)
@pytest.mark.filterwarnings("ignore")
def test_the_other_blocks(text, folders, tmp_path, capsys) -> None:
    names = run(text, folders, tmp_path)
    if "model" in names:
        assert makers(names["model"]) == {"qlora_kernels"}
    if "swap" in text:
        assert "14 4-bit layers are qlora_kernels' now" in capsys.readouterr().out
    if "trainer" in names:
        inner = getattr(names["trainer"].optimizer, "optimizer", names["trainer"].optimizer)
        assert type(inner) is qlora_kernels.optim.PagedAdamW8bit
    if "save_pretrained" in text:
        assert '"quant_method": "bitsandbytes"' in (tmp_path / "out" / "config.json").read_text()
    if "figures" in names:
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    if "Linear8bitLt" in text:
        assert "8-bit" in capsys.readouterr().out


# What a tool does with such a file, in the calls that reach bitsandbytes.
STAND_IN = """
import sys
import torch, yaml
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

def main():
    told = yaml.safe_load(open(sys.argv[-1]))
    bits = told.get("load_in_4bit") or told.get("quantization_bit") == 4
    config = BitsAndBytesConfig(
        load_in_4bit=bits, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    name = told.get("base_model") or told["model_name_or_path"]
    model = AutoModelForCausalLM.from_pretrained(name, quantization_config=config)
    model = prepare_model_for_kbit_training(model)
    r = told.get("lora_r", 8)
    model = get_peft_model(model, LoraConfig(r=r, target_modules="all-linear"))
    optim = told.get("optimizer", "adamw_torch")
    args = TrainingArguments("out", optim=optim, use_cpu=True)
    made = Trainer.get_optimizer_cls_and_kwargs(args)[0]
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    print(type(layer).__name__, type(layer.base_layer).__module__, made.__module__)

if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize(
    "tool", ["axolotl", *(pytest.param(t, marks=pytest.mark.full) for t in ("train.py", "llama"))]
)
def test_tools_that_are_driven_by_yaml(tool, folders, tmp_path) -> None:
    (section,) = (s for t, s in SECTIONS.items() if t.startswith("2."))
    blocks = FENCE.findall(section)
    (commands,) = (text for kind, text in blocks if kind == "sh")
    files = [text for kind, text in blocks if kind == "yaml"]
    lines = dict(zip(("train.py", "axolotl", "llama"), commands.splitlines(), strict=True))
    file = dict(zip(("axolotl", "llama"), files, strict=True)).get(tool, "")
    # The tools, by the names that the page calls them by.
    package = tmp_path / "axolotl" / "cli"
    package.mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").write_text("")
    (package / "train.py").write_text(STAND_IN)
    command = tmp_path / "llamafactory-cli"
    command.write_text(f"#!{sys.executable}\n{STAND_IN}")
    command.chmod(0o755)
    told = "{'base_model': sys.argv[-1], 'load_in_4bit': True}"
    script = STAND_IN.replace("yaml.safe_load(open(sys.argv[-1]))", told)
    (tmp_path / "train.py").write_text(script)
    model = str(folders["path/to/model"])
    (tmp_path / "config.yml").write_text(file.replace("path/to/model", model))
    words = lines[tool].replace("path/to/model", model).split()
    assert words[0] == "python"
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}",
    }
    done = subprocess.run(
        [sys.executable, *words[1:]], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    layer, base, optimizer = done.stdout.split()
    assert layer == "FusedLoraLinear" and base.startswith("qlora_kernels."), done.stdout
    want = "qlora_kernels.optim" if "paged" in file else "torch.optim.adamw"
    assert optimizer == want


def test_the_page_s_links_are_there() -> None:
    for target in re.findall(r"\]\(([\w.-]+\.md)\)", PAGE.read_text()):
        assert (PAGE.parent / target).is_file(), target
    anchors = {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in SECTIONS}
    for anchor in re.findall(r"\]\(#([^)]+)\)", PAGE.read_text()):
        assert anchor in anchors, (anchor, anchors)


def test_what_it_imports_is_there() -> None:
    for name in set(re.findall(r"(?:from|import) (qlora_kernels[\w.]*)", PAGE.read_text())):
        importlib.import_module(name)
