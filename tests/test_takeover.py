"""``enable()``: scripts for bitsandbytes, unchanged, on this package's layers and optimizers.

What is taken over is a process's, so most of it happens in processes of its own.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HIDE_PEER = "import sys; sys.modules['bitsandbytes'] = None\n"
LOAD = """
import torch, transformers
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
def load(path, **kwargs):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **kwargs)
def quantize(path, **kwargs):
    kwargs = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, **kwargs}
    return load(path, quantization_config=BitsAndBytesConfig(load_in_4bit=True, **kwargs))
def layer(model):
    return model.model.layers[0].mlp.up_proj
def kind(model):
    return type(layer(model)).__module__.split(".")[0]
def logits(model):
    with torch.no_grad():
        return model(torch.arange(24).view(2, 12)).logits
"""


def python(*words: str, code: str | None = None, **environment: str) -> str:
    """What a Python printed; the test fails where it failed."""
    command = [sys.executable, *words] if code is None else [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def taken(tiny_model, tmp_path_factory) -> Path:
    """A tiny model quantized by an untouched configuration under ``enable()`` and saved."""
    folder = tmp_path_factory.mktemp("taken")
    code = f"""{HIDE_PEER}
import qlora_kernels
taken = qlora_kernels.enable()
assert set(taken) == {{"transformers", "Trainer"}} and qlora_kernels.enabled()
{LOAD}
model = quantize({str(tiny_model)!r}, bnb_4bit_compute_dtype="float32")
assert kind(model) == "qlora_kernels", kind(model)
assert type(layer(model)).__name__ == "Linear4bit" and layer(model).compress_statistics
assert model.is_loaded_in_4bit and layer(model).compute_dtype == torch.float32
model.save_pretrained({str(folder)!r})
tokens = model.generate(torch.arange(6)[None], max_new_tokens=8, do_sample=False)
stored = quantize({str(tiny_model)!r}, bnb_4bit_quant_storage=torch.bfloat16)  # FSDP's way
assert kind(stored) == "qlora_kernels" and layer(stored).weight.dtype == torch.bfloat16
assert torch.equal(logits(stored), logits(model))
torch.save({{"logits": logits(model), "tokens": tokens}}, {str(folder / "want.pt")!r})
"""
    python(code=code)
    return folder


def test_what_it_saves_is_bitsandbytes(taken) -> None:
    config = json.loads((taken / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "bitsandbytes" and config["load_in_4bit"]
    pytest.importorskip("bitsandbytes")
    code = f"""{LOAD}
model = load({str(taken)!r})
assert kind(model) == "bitsandbytes" and "qlora_kernels" not in __import__("sys").modules
want = torch.load({str(taken / "want.pt")!r})
torch.testing.assert_close(logits(model), want["logits"], rtol=1e-4, atol=1e-4)
"""
    python(code=code)


@pytest.mark.parametrize("way", ["enable", pytest.param("named", marks=pytest.mark.full)])
def test_it_is_loaded_again_without_bitsandbytes(taken, way) -> None:
    """Taken over, or by our own reader, to the same logits bit for bit."""
    load = {
        "enable": f"import qlora_kernels.auto\n{LOAD}\nmodel = load({str(taken)!r})",
        "named": f"{LOAD}\nfrom qlora_kernels.integrations.transformers import load_quantized_model"
        f"\nmodel = load_quantized_model({str(taken)!r}, dtype=torch.float32,"
        " compute_dtype=torch.float32)",
    }[way]
    code = f"""{HIDE_PEER}{load}
want = torch.load({str(taken / "want.pt")!r})
assert kind(model) == "qlora_kernels"
assert torch.equal(logits(model), want["logits"])
tokens = model.generate(torch.arange(6)[None], max_new_tokens=8, do_sample=False)
assert torch.equal(tokens, want["tokens"])
"""
    python(code=code)


@pytest.mark.full
def test_what_bitsandbytes_cannot_read_is_refused_without_this_package(
    tiny_model, tmp_path
) -> None:
    """And not loaded with weights drawn anew."""
    code = f"""{LOAD}
from qlora_kernels.integrations.transformers import QLoRAKernelsConfig
model = load({str(tiny_model)!r}, quantization_config=QLoRAKernelsConfig(bnb_4bit_blocksize=16))
model.save_pretrained({str(tmp_path)!r})
"""
    python(code=code)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "qlora_kernels"
    code = f"""{LOAD}
try:
    load({str(tmp_path)!r})
except RuntimeError as error:
    print(error)
"""
    assert "ignore_mismatched_sizes" in python(code=code)


def test_a_checkpoint_of_theirs_is_taken_over(tiny_model, tmp_path) -> None:
    pytest.importorskip("bitsandbytes")
    theirs = f"""{LOAD}
model = quantize({str(tiny_model)!r})
assert kind(model) == "bitsandbytes"
model.save_pretrained({str(tmp_path)!r})
torch.save(logits(model), {str(tmp_path / "want.pt")!r})
"""
    python(code=theirs)
    ours = f"""{HIDE_PEER}import qlora_kernels; qlora_kernels.enable(verbose=False)
{LOAD}
model = load({str(tmp_path)!r})
assert kind(model) == "qlora_kernels"
want = torch.load({str(tmp_path / "want.pt")!r})
torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-4)
"""
    python(code=ours)


def test_a_plain_import_changes_nothing_and_disable_gives_back(tiny_model) -> None:
    pytest.importorskip("bitsandbytes")
    code = f"""import qlora_kernels
{LOAD}
path = {str(tiny_model)!r}
def optimizer():
    from transformers import Trainer, TrainingArguments
    args = TrainingArguments("out", optim="adamw_8bit", use_cpu=True)
    return Trainer.get_optimizer_cls_and_kwargs(args)[0].__module__.split(".")[0]
seen = [(kind(quantize(path)), optimizer())]
qlora_kernels.enable(); qlora_kernels.enable()
seen.append((kind(quantize(path)), optimizer()))
qlora_kernels.disable()
seen.append((kind(quantize(path)), optimizer()))
theirs, ours = ("bitsandbytes",) * 2, ("qlora_kernels",) * 2
assert seen == [theirs, ours, theirs], seen
"""
    python(code=code)


ORDERS = list(
    itertools.permutations(["bitsandbytes", "transformers", "peft", "qlora_kernels.auto"])
)


@pytest.mark.parametrize(
    "order",
    [
        pytest.param(o, marks=[] if i == 9 else pytest.mark.full, id="-".join(o))
        for i, o in enumerate(ORDERS)
    ],
)
def test_the_order_of_imports_does_not_matter(tiny_model, order) -> None:
    pytest.importorskip("bitsandbytes")
    code = (
        "\n".join(f"import {name}" for name in order)
        + f"""
{LOAD}
from peft import LoraConfig, get_peft_model
model = quantize({str(tiny_model)!r})
assert kind(model) == "qlora_kernels"
model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
assert type(model.base_model.model.model.layers[0].mlp.up_proj).__name__ == "FusedLoraLinear"
"""
    )
    python(code=code)


@pytest.mark.parametrize("peer", [True, False], ids=["with", "without"])
def test_trainers_optimizers_by_name(peer) -> None:
    """Taken over where bitsandbytes is there, and without asking where it is not."""
    code = (
        ("" if peer else HIDE_PEER)
        + f"""import qlora_kernels
{"qlora_kernels.enable()" if peer else ""}
from transformers import Trainer, TrainingArguments
for name, kind, bits in (
    ("paged_adamw_32bit", "PagedAdamW32bit", 32), ("paged_adamw_8bit", "PagedAdamW8bit", 8),
    ("adamw_8bit", "AdamW8bit", 8), ("adamw_bnb_8bit", "AdamW8bit", 8),
):
    args = TrainingArguments("out", optim=name, learning_rate=3e-3, adam_beta2=0.9, use_cpu=True)
    cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
    assert cls.__module__ == "qlora_kernels.optim" and cls.__name__ == kind, (name, cls)
    import torch
    made = cls([torch.nn.Parameter(torch.zeros(8))], **kwargs)
    assert made.bits == bits and made.paged == ("paged" in name)
    assert made.defaults["lr"] == 3e-3 and made.defaults["betas"] == (0.9, 0.9)
"""
    )
    python(code=code)


# --- python -m qlora_kernels ----------------------------------------------------------------------

SCRIPT = f"""
import subprocess, sys
{LOAD}
print(__name__, sys.argv[1:], kind(quantize(sys.argv[1])))
if "--child" in sys.argv:
    subprocess.run([sys.executable, __file__, sys.argv[1]], check=True)
"""


def test_a_script_and_the_processes_that_it_starts(tiny_model, tmp_path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    out = python("-m", "qlora_kernels", str(script), str(tiny_model), "--child").splitlines()
    assert out == [
        f"__main__ ['{tiny_model}', '--child'] qlora_kernels",
        f"__main__ ['{tiny_model}'] qlora_kernels",
    ]


def test_a_module_and_an_installed_command(tiny_model, tmp_path) -> None:
    (tmp_path / "their_tool.py").write_text(SCRIPT)
    command = tmp_path / "their-tool"
    command.write_text(f"#!{sys.executable}\n{SCRIPT}")
    command.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    for words in (("-m", "their_tool"), ("their-tool",)):
        out = python(
            "-m", "qlora_kernels", *words, str(tiny_model), PATH=path,
            PYTHONPATH=f"{ROOT}{os.pathsep}{tmp_path}",
        )  # fmt: skip
        assert out == f"__main__ ['{tiny_model}'] qlora_kernels\n"


def test_the_start_up_hook_runs_the_next_sitecustomize_and_imports_nothing(tmp_path) -> None:
    (tmp_path / "sitecustomize.py").write_text("print('theirs')")
    hooks = ROOT / "qlora_kernels" / "_startup"
    path = os.pathsep.join(map(str, (hooks, tmp_path, ROOT)))
    code = "import sys; print('qlora_kernels' in sys.modules)"
    assert python(code=code, PYTHONPATH=path, QLORA_KERNELS_ENABLE="1") == "theirs\nFalse\n"


@pytest.mark.parametrize(
    "words, said",
    [(["no-such-script.py"], "neither a file nor an installed command"), (["-m"], "which module?"),
     ([], "usage:")],
)  # fmt: skip
def test_what_cannot_be_run_is_named(words, said) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "qlora_kernels", *words], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2 and said in done.stderr + done.stdout
