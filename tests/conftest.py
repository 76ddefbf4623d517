"""What every test has: seeded randomness, its own number of threads, shared data, a tiny model."""

from __future__ import annotations

import functools
import json
import os
import random
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from qlora_kernels import cpu, ops

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test waits for a network
if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores already
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """The same random numbers whatever ran before, and torch's settings put back afterwards."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)


# --- where the kernels run ------------------------------------------------------------------------
#
# What has no test of its own kernels under tests/cuda is tested on every device by the same code:
# tests make their tensors on `device`, or on the one that `kernels` yields. The GPU joins where
# there is one and its library loads. QLORA_KERNELS_TEST_DEVICES says which instead ("cuda" alone
# is what `make test-gpu` runs); a device that is named and not there is a failure, not a skip.
# "emulated", alone: the CPU's ops are replaced by CUDA's in the emulator (tests/cuda/test_ops.py).

_DEVICES = os.environ.get("QLORA_KERNELS_TEST_DEVICES", "").split() or [
    "cpu",
    *(["cuda"] if torch.cuda.is_available() and ops.CUDA_LIBRARY_ERROR is None else []),
]
_CPU_KERNELS = [f"cpu-{isa}" for isa in cpu.available_isas()] or ["cpu-torch"]


def runs_cuda(device: torch.device) -> bool:
    """Whether CUDA's kernels run on it, whose bounds are wider."""
    return device.type == "cuda" or _DEVICES == ["emulated"]


@pytest.fixture(params=_DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device that there is."""
    if request.param == "emulated":
        request.getfixturevalue("_cuda_ops_on_the_cpu")
        return torch.device("cpu")
    return torch.device(request.param)


@pytest.fixture(
    params=[k for d in _DEVICES for k in (_CPU_KERNELS if d == "cpu" else [d])],
)
def kernels(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Each set of kernels, the device they are for: the CPU's by instruction set, and the GPU's."""
    kind, _, isa = request.param.partition("-")
    if kind == "emulated":
        request.getfixturevalue("_cuda_ops_on_the_cpu")
        kind = "cpu"
    if isa not in ("", "torch"):
        with cpu.use_isa(isa):
            yield torch.device(kind)
    else:
        yield torch.device(kind)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Data that lies beside the repository, where it does."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    return folder


@functools.cache
def _build_variant(kind: str, architectures: str | None) -> tuple[Path | None, str]:
    # One architecture in full, and its PTX, which is what the emulator runs.
    given = os.environ.get("QLORA_KERNELS_CUDA_ARCHITECTURES", "80")
    environment = {**os.environ, "QLORA_KERNELS_CUDA_ARCHITECTURES": architectures or given}
    command = [sys.executable, "setup.py", "--quiet", "build_variant", f"--kind={kind}"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if result.returncode != 0:
        return None, result.stdout + result.stderr
    name = {
        "sanitize": "_ops.abi3.so",
        "emulated": "_ops_emulated.so",
        "cuda": "_ops_cuda_emulated.so",
    }[kind]
    if kind == "cuda":
        kind += "-".join((architectures or given).split())
    return ROOT / "build" / f"{kind}-{sysconfig.get_config_var('SOABI')}" / name, ""


@pytest.fixture(scope="session")
def native_variant() -> Callable[..., Path]:
    """``native_variant("emulated" | "sanitize")``: that build of ``_ops``, made first if need be;
    ``"cuda"``: ``_ops_cuda_emulated.so``, beside it the ``_ops_cuda.abi3.so`` of the same objects,
    for the compute capabilities given second ("75 80"), else the environment's, else 80.

    Load a build of ``_ops`` in a process of its own, through ``QLORA_KERNELS_OPS``. Skips where the
    machine cannot build it; a compile error is a failure.
    """

    def build(kind: str, architectures: str | None = None) -> Path:
        library, words = _build_variant(kind, architectures)
        missing = (
            "needs SIMDe",
            "needs an x86",
            "nvcc was found neither",
            "nvcc is installed without",
        )
        if library is None and any(reason in words for reason in missing):
            pytest.skip(words.strip().splitlines()[-1])
        assert library is not None, words[-4000:]
        return library

    return build


# --- the emulated GPU -----------------------------------------------------------------------------

EMULATED = "qlora_kernels_emulated"  # the namespace of call_emulated.h


@pytest.fixture(scope="session")
def emulated_library(native_variant: Callable[..., Path]) -> Iterator[Path]:
    """``_ops_cuda_emulated.so``, with its schemas defined; built first, unless
    ``QLORA_KERNELS_CUDA_EMULATED`` names one."""
    chosen = os.environ.get("QLORA_KERNELS_CUDA_EMULATED")
    path = Path(chosen) if chosen else native_variant("cuda")
    library = torch.library.Library(EMULATED, "DEF")
    for schema in ops.SCHEMAS:
        library.define(schema)
    yield path


@pytest.fixture
def _cuda_ops_on_the_cpu(emulated_library: Path) -> Iterator[None]:
    from qlora_kernels.emulator.runtime import EmulatedRuntime

    override = torch.library.Library(ops.NAMESPACE, "IMPL")
    with EmulatedRuntime("h100", emulated_library, checks=()) as runtime:
        for schema in ops.SCHEMAS:
            name = schema.partition("(")[0]
            base, _, overload = name.partition(".")
            op = getattr(getattr(getattr(torch.ops, EMULATED), base), overload or "default")
            override.impl(name, op, "CPU", allow_override=True)
        yield
        override._destroy()
    assert runtime.launches, "the ops went elsewhere"


# --- a tiny model: two layers with random weights, a tokenizer of bytes with ChatML ---------------

_CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _make_tokenizer():
    """256 bytes and the special tokens; ``<|im_end|>`` ends a text and pads it as well."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(special + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        additional_special_tokens=special,
    )
    fast.chat_template = _CHATML
    return fast


def _make_model(**changes):
    """A random LLaMA: hidden 64, two layers, four heads over two key-value heads, tied words."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": 272,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        **changes,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**settings))


@pytest.fixture(scope="session")
def make_tiny_model() -> Callable[..., Path]:
    """``make_tiny_model(folder, **changes)``: a tiny model and its tokenizer into a folder."""

    def make(folder: Path, **changes) -> Path:
        _make_model(**changes).save_pretrained(folder)
        _make_tokenizer().save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_model(make_tiny_model, tmp_path_factory) -> Path:
    """The folder of a tiny model with its tokenizer. Not to be written to."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """A JSONL file of 40 questions with replies of unequal length."""
    path = tmp_path_factory.mktemp("data") / "questions.jsonl"
    with path.open("w") as file:
        for i in range(40):
            record = {
                "prompt": f"What is {i} plus {i % 7}?",
                "completion": f"It is {i + i % 7}." + " Really." * (i % 5),
            }
            file.write(json.dumps(record) + "\n")
    return path
