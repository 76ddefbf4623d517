"""``qlora merge``: an adapter put into its base; a plain transformers folder comes out.

What is read and written goes tensor by tensor, through files that are never mapped::

    base folder --(one module)--> fp32 W --(PEFT's own layer)--> W + dW --> bf16 or NF4 --> output

so the peak is the program and a few fp32 copies of the largest *changed* weight (an unchanged one
is copied as it is); docs/merge.md has it measured. The update is PEFT's: each layer is merged by
the class that trained it, so that DoRA, rsLoRA, biases and patterns of ranks mean here what they
mean there. The sum is formed in fp32 and rounded once.

The output folder is written under another name and renamed when it is whole, so what stops a merge
leaves nothing. Nothing in it needs this package: 16-bit safetensors, or bitsandbytes' 4-bit form.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import functional as F4
from .finetune.errors import BadInput, bad_input
from .nn import Linear4bit, read_checkpoint_entries
from .tensor_files import DTYPES, TensorReader, TensorWriter, weight_files

__all__ = ["add_arguments", "merge", "run"]

BASES = ("dequantized", "original")
TARGETS = ("16bit", "nf4")
HELD_OUT = "held-out"

_HALVES = (torch.bfloat16, torch.float16)

# What an adapter's tensors are called after the module that they change.
_LORA = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_A\.bias|lora_B\.weight|lora_B\.bias"
    r"|lora_embedding_A|lora_embedding_B|lora_magnitude_vector(\.weight)?)"
)
_TOKENS = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta")
# Wrappers of a weight that is trained whole, or lies under an adapter.
_WRAPPED = re.compile(r"(\.token_adapter)?\.base_layer(?=\.)|\.modules_to_save(\.default)?(?=\.)")
_STATE_ENTRY = re.compile(
    r"(?P<weight>.+)\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..+)"
)
# Initialisations that leave the base as it is; an adapter of another is not to be read alone.
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")

_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model",
)  # fmt: skip
_TEMPLATES = ("chat_template.jinja", "chat_template.json")
_SIDE_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.py", "LICENSE*", "NOTICE*")


# --- the base -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Quant:
    """How the base was quantized when the adapter was trained."""

    quant_type: str = "nf4"
    blocksize: int = 64
    double_quant: bool = True
    skip_modules: list[str] | None = None
    told_by: str = "assumed"

    def __str__(self) -> str:
        nested = ", double quantization" if self.double_quant else ""
        return f"{self.quant_type}, blocks of {self.blocksize}{nested} ({self.told_by})"

    def config(self) -> Any:
        from .integrations.transformers import QLoRAKernelsConfig

        return QLoRAKernelsConfig(
            bnb_4bit_quant_type=self.quant_type,
            bnb_4bit_blocksize=self.blocksize,
            bnb_4bit_use_double_quant=self.double_quant,
            llm_int8_skip_modules=self.skip_modules,
        )


@dataclass
class _Base:
    """The base's folder, and the model that it is, without weights."""

    folder: Path
    config: dict[str, Any]
    tensors: TensorReader
    model: Any  # on meta, its 4-bit layers swapped in where `quant` says so
    packed: bool  # the files are 4-bit already
    conv1d: frozenset[str]  # modules whose dense weight is [in, out]
    quant: _Quant | None
    dtype: torch.dtype  # of most of what is dense

    def modules(self) -> dict[str, nn.Module]:
        return dict(self.model.named_modules())


def _empty_model(config: dict[str, Any], folder: Path, trust_remote_code: bool) -> Any:
    """The model of a configuration, on meta."""
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    plain = {k: v for k, v in config.items() if k != "quantization_config"}
    with torch.device("meta"):
        if config.get("auto_map"):
            made = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
            made.update(plain)
            return AutoModelForCausalLM.from_config(made, trust_remote_code=trust_remote_code)
        made = AutoConfig.for_model(**plain)
        kind = getattr(transformers, (config.get("architectures") or [""])[0], None)
        return kind(made) if kind is not None else AutoModelForCausalLM.from_config(made)


def _swap_layers(model: Any, quant: _Quant, packed: bool = False) -> None:
    """Puts Linear4bit where loading with this quantization would, by the same code."""
    from .integrations.transformers import QLoRAKernelsQuantizer

    quantizer = QLoRAKernelsQuantizer(quant.config(), pre_quantized=packed)
    quantizer._process_model_before_weight_loading(model)


def _open_base(folder: Path, quant: _Quant | None, trust_remote_code: bool) -> _Base:
    from .integrations.checkpoint_files import check_weight_files
    from .integrations.transformers import _found_config

    check_weight_files(folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    told = config.get("quantization_config")
    if told is not None:
        found = _found_config(argparse.Namespace(quantization_config=told), folder)
        assert found is not None
        quant = _Quant(
            found.bnb_4bit_quant_type, found.bnb_4bit_blocksize, found.bnb_4bit_use_double_quant,
            found.llm_int8_skip_modules, "the checkpoint",
        )  # fmt: skip
    tensors = TensorReader(weight_files(folder))
    model = _empty_model(config, folder, trust_remote_code)
    names = set(model.state_dict())
    conv1d = frozenset(n for n, m in model.named_modules() if isinstance(m, _conv1d()))
    if quant is not None:
        _swap_layers(model, quant, packed=told is not None)
    tied = model.all_tied_weights_keys
    lacking = sorted(n for n in names - tensors.header.keys() if n not in tied)
    if lacking:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise BadInput(
            f"{folder} holds no {lacking[0]}{more}, which {type(model).__name__} has: a merge goes "
            "by names, and these differ. PEFT merges such a model in memory: merge_and_unload()"
        )
    sizes: dict[torch.dtype, int] = {}
    for name, entry in tensors.header.items():
        dtype = DTYPES.get(entry["dtype"])
        if dtype in (*_HALVES, torch.float32) and not _STATE_ENTRY.fullmatch(name):
            sizes[dtype] = sizes.get(dtype, 0) + math.prod(entry["shape"])
    main = max(sizes, key=sizes.__getitem__) if sizes else torch.bfloat16
    return _Base(folder, config, tensors, model, told is not None, conv1d, quant, main)


# --- the adapter ----------------------------------------------------------------------------------


@dataclass
class _Change:
    """What an adapter does to one module; names are those of its tensors."""

    lora: dict[str, str] = field(default_factory=dict)  # part ("lora_A.weight") to name
    full: dict[str, str] = field(default_factory=dict)  # "weight" or "bias" to name
    tokens: str | None = None


class _Adapter:
    """An adapter's folder: its configuration, and what it changes, by module."""

    def __init__(self, folder: Path) -> None:
        from peft import LoraConfig

        from .chat import _base_of

        self.folder = folder
        self.base = _base_of(folder, None)  # says what is missing
        told = json.loads((folder / "adapter_config.json").read_text("utf-8"))
        kind = told.get("peft_type")
        if kind != "LORA":
            raise BadInput(f"{folder} is an adapter of PEFT's type {kind}; LORA is what is merged")
        with bad_input(f"{folder}/adapter_config.json"):
            try:
                self.config = LoraConfig.from_pretrained(str(folder))
            except TypeError as error:
                raise ValueError(str(error)) from error
        init = self.config.init_lora_weights
        if init not in _PLAIN_INITS:
            raise BadInput(
                f"{folder} was initialised by {init!r}, which also changes the base: its A and B "
                "alone are not the update. Save it as a plain adapter first: PEFT's "
                "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
            )
        for name in ("layer_replication", "target_parameters", "alora_invocation_tokens"):
            if getattr(self.config, name, None):
                raise BadInput(f"{folder} has {name}, which is not merged here")
        files = [folder / "adapter_model.safetensors"]
        besides = folder / "trained_besides.safetensors"  # of `qlora finetune`
        if besides.is_file():
            files.append(besides)
        self.tensors = TensorReader(files)
        self.changes: dict[str, _Change] = {}
        for name in self.tensors.header:
            self._file_change(name)
        if not self.changes:
            raise BadInput(f"{folder} holds an adapter without tensors")

    def _file_change(self, name: str) -> None:
        plain = _WRAPPED.sub("", name.removeprefix("base_model.model."))
        if ".original_module." in plain:  # the base's own, beside what was trained
            return
        if ".lora_" in plain:
            plain = plain.replace(".default.", ".").removesuffix(".default")
        if found := _LORA.fullmatch(plain):
            change = self.changes.setdefault(found["module"], _Change())
            change.lora[found["part"]] = name
        elif found := _TOKENS.fullmatch(plain):
            self.changes.setdefault(found["module"], _Change()).tokens = name
        else:
            module, _, leaf = plain.rpartition(".")
            if leaf not in ("weight", "bias"):
                raise BadInput(f"{self.folder}: {name} is nothing that is merged here")
            self.changes.setdefault(module, _Change()).full[leaf] = name

    def rank(self, module: str) -> int:
        from peft.utils.other import get_pattern_key

        pattern = self.config.rank_pattern
        return pattern.get(get_pattern_key(pattern.keys(), module), self.config.r)

    def token_indices(self, module: str) -> list[int]:
        told = self.config.trainable_token_indices
        if isinstance(told, dict):
            return next(v for k, v in told.items() if module == k or module.endswith(f".{k}"))
        return list(told or ())

    def check(self, base: _Base) -> None:
        """Raises BadInput where it does not fit the base."""
        modules = base.modules()
        strange = sorted(m for m in self.changes if m not in modules)
        if strange:
            more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
            raise BadInput(
                f"{self.folder} is not an adapter of {base.folder}: it changes {strange[0]}{more}, "
                f"which {type(base.model).__name__} does not have"
            )
        for path, change in self.changes.items():
            if change.lora:
                self._check_lora(path, change, modules[path])
            for leaf, name in change.full.items():
                self._check_full(path, leaf, name, modules[path])
            if change.tokens is not None:
                rows = self.tensors.shape(change.tokens)[0]
                if rows != len(self.token_indices(path)):
                    raise BadInput(
                        f"{self.folder} trained {rows} tokens, and adapter_config.json names "
                        f"{len(self.token_indices(path))} (trainable_token_indices)"
                    )

    def _check_lora(self, path: str, change: _Change, module: nn.Module) -> None:
        embedding = isinstance(module, nn.Embedding)
        if not embedding and type(module) not in (nn.Linear, Linear4bit, _conv1d()):
            raise BadInput(f"{path} is a {type(module).__name__}, whose LoRA is not merged here")
        a, b = ("lora_embedding_A", "lora_embedding_B") if embedding else _AB
        for part in (a, b):
            if part not in change.lora:
                raise BadInput(f"{self.folder} lacks {part} of {path}")
        if self.config.use_dora and not any("magnitude" in part for part in change.lora):
            raise BadInput(f"{self.folder} is DoRA and lacks lora_magnitude_vector of {path}")
        got_a, got_b = self.tensors.shape(change.lora[a]), self.tensors.shape(change.lora[b])
        size_in, size_out = _sizes(module)
        rank = self.rank(path)
        if len(got_a) != 2 or len(got_b) != 2 or got_a[0] != rank or got_b[1] != rank:
            raise BadInput(
                f"{self.folder}: {path} has A {got_a} and B {got_b}, but adapter_config.json says "
                f"rank {rank}"
            )
        if (got_a[1], got_b[0]) != (size_in, size_out):
            raise BadInput(
                f"{self.folder} is not an adapter of this base: {path} has A {got_a} and "
                f"B {got_b}, its layer takes {size_in} values and gives {size_out}"
            )

    def _check_full(self, path: str, leaf: str, name: str, module: nn.Module) -> None:
        got, own = self.tensors.shape(name), getattr(module, leaf, None)
        if own is None:
            raise BadInput(f"{self.folder} has {path}.{leaf}, which the base does not have")
        want = list(own.shape)
        if isinstance(module, Linear4bit) and leaf == "weight":
            want = [module.out_features, module.in_features]
        grown = leaf == "weight" and got[1:] == want[1:]  # words were added, or taken away
        if got != want and not grown:
            raise BadInput(
                f"{self.folder} is not an adapter of this base: its {path}.{leaf} is {got}, the "
                f"base's {want}"
            )


_AB = ("lora_A.weight", "lora_B.weight")


def _conv1d() -> type:
    from transformers.pytorch_utils import Conv1D

    return Conv1D


def _sizes(module: Any) -> tuple[int, int]:
    """What A takes and B gives."""
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return tuple(module.weight.shape)  # type: ignore[return-value]  # Conv1D: [in, out]


# --- one module -----------------------------------------------------------------------------------


@torch.no_grad()
def _apply_lora(
    module: nn.Module, tensors: dict[str, Tensor], path: str, parts: dict[str, Tensor], config: Any
) -> None:
    """Adds LoRA to a module's fp32 tensors, in place, by PEFT's own layer for it.

    Args:
        module: of the empty model: says of which kind it is.
        tensors: "weight" and, if there is one, "bias".
        parts: the adapter's, by PEFT's names.
    """
    from peft import PeftModel, set_peft_model_state_dict

    layer: Any
    weight = tensors["weight"]
    if isinstance(module, nn.Embedding):
        layer = nn.Embedding(1, 1, device="meta")
        layer.num_embeddings, layer.embedding_dim = weight.shape
    elif isinstance(module, nn.Linear):
        layer = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
    else:
        layer = copy.deepcopy(module)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if "bias" in tensors:
        layer.bias = nn.Parameter(tensors["bias"], requires_grad=False)
    # A model of this one layer, under its own name: patterns of ranks and alphas go by that.
    root = parent = nn.Module()
    *parents, leaf = path.split(".")
    for name in parents:
        parent.add_module(name, nn.Module())
        parent = getattr(parent, name)
    parent.add_module(leaf, layer)
    alone = copy.copy(config)
    alone.target_modules, alone.exclude_modules = [path], None
    alone.layers_to_transform = alone.layers_pattern = None
    alone.modules_to_save = alone.trainable_token_indices = None
    alone.init_lora_weights, alone.task_type, alone.bias = True, None, "none"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = PeftModel(root, alone)
        state = {f"base_model.model.{path}.{part}": t.float() for part, t in parts.items()}
        missed = set_peft_model_state_dict(wrapped, state)
    assert not missed.unexpected_keys, missed.unexpected_keys
    tuned: Any = wrapped.base_model.model.get_submodule(path)
    tuned.merge()
    base = tuned.get_base_layer()
    tensors["weight"] = base.weight.detach()
    if "bias" in tensors:
        tensors["bias"] = base.bias.detach()


@dataclass
class _Norms:
    """Sums of squares over all changed weights."""

    weight: float = 0.0
    update: float = 0.0
    rounding: float = 0.0
    modules: int = 0

    def figures(self) -> dict[str, Any]:
        root = math.sqrt
        return {
            "modules_changed": self.modules,
            "update_over_weight": root(self.update / self.weight) if self.weight else None,
            "rounding_over_update": root(self.rounding / self.update) if self.update else None,
            "rounding_over_weight": root(self.rounding / self.weight) if self.weight else None,
        }


def _square(t: Tensor) -> float:
    return float(torch.linalg.vector_norm(t)) ** 2


class _Merge:
    """One merge: what each output tensor is made of, and how it is written."""

    def __init__(
        self, base: _Base, adapter: _Adapter, which: str, to: str, dtype: torch.dtype,
        trust_remote_code: bool,
    ) -> None:  # fmt: skip
        self.base, self.adapter, self.which, self.to, self.dtype = base, adapter, which, to, dtype
        self.norms = _Norms()
        self.modules = base.modules()
        self.config = self._output_config()
        self.sources = self._output_names()
        self.packed_out: dict[str, Linear4bit] = {}
        if to == "nf4":
            skip = base.quant.skip_modules if base.quant is not None else None
            quant = _Quant(skip_modules=skip)
            empty = _empty_model(self.config, base.folder, trust_remote_code)
            _swap_layers(empty, quant)
            self.packed_out = {n: m for n, m in empty.named_modules() if isinstance(m, Linear4bit)}
            name = str(dtype).removeprefix("torch.")
            told = quant.config()
            told.bnb_4bit_compute_dtype = name
            self.config["quantization_config"] = told.to_dict()

    # -- names and configuration --

    def _output_config(self) -> dict[str, Any]:
        config = copy.deepcopy(self.base.config)
        config.pop("quantization_config", None)
        config.pop("torch_dtype", None)
        inner = [config, *(v for k, v in config.items() if k == "text_config")]
        for each in inner:
            each.pop("torch_dtype", None)
            each["dtype"] = str(self.dtype).removeprefix("torch.")
        embeddings = self.base.model.get_input_embeddings()
        path = next(n for n, m in self.modules.items() if m is embeddings)
        full = self.adapter.changes.get(path, _Change()).full.get("weight")
        if full is not None:
            rows = self.adapter.tensors.shape(full)[0]
            for each in inner:
                if "vocab_size" in each:
                    each["vocab_size"] = rows
        self.tied = self._stays_tied()
        if self.tied is False:
            for each in inner:
                if "tie_word_embeddings" in each or each is config:
                    each["tie_word_embeddings"] = False
        return config

    def _tied_pairs(self) -> list[tuple[str, str]]:
        """Weights that are another's in the base: ``(lm_head.weight, embed_tokens.weight)``."""
        pairs = dict(self.base.model.all_tied_weights_keys)
        return [(a, b) if b in self.base.tensors else (b, a) for a, b in pairs.items()]

    def _stays_tied(self) -> bool | None:
        """None: the base's are not tied; False: an adapter has made them differ."""
        pairs = self._tied_pairs()
        if not pairs:
            return None
        if getattr(self.adapter.config, "ensure_weight_tying", False):
            return True
        for pair in pairs:
            a, b = (self.adapter.changes.get(n.rpartition(".")[0], _Change()) for n in pair)
            if a.lora or b.lora:
                return False
            if bool(a.full) != bool(b.full):
                return False
            if a.full and not torch.equal(
                self.adapter.tensors[a.full["weight"]], self.adapter.tensors[b.full["weight"]]
            ):
                return False
        return True

    def _output_names(self) -> dict[str, str]:
        """By name in the output: where in the base it comes from. In the base's order."""
        names = {n: n for n in self.base.tensors.header if not _STATE_ENTRY.fullmatch(n)}
        for a, b in self._tied_pairs():
            names.pop(a, None)
            if not self.tied:
                names[a] = b
        return names

    # -- values --

    def _change(self, path: str) -> _Change:
        change = self.adapter.changes.get(path, _Change())
        if self.tied:
            # One weight under two names: what is said of either is said of both.
            for pair in self._tied_pairs():
                paths = [n.rpartition(".")[0] for n in pair]
                if path in paths:
                    for other in paths:
                        theirs = self.adapter.changes.get(other)
                        if theirs is not None and (theirs.full or theirs.tokens or theirs.lora):
                            return theirs
        return change

    def _dense(self, path: str, source: str) -> Tensor:
        """A weight as it is merged into: dequantized, or as the base has it; of a 4-bit layer
        ``[out, in]``, whatever the files have."""
        tensors, module, quant = self.base.tensors, self.modules.get(path), self.base.quant
        raw = tensors[source]
        if not isinstance(module, Linear4bit):
            return raw
        if self.base.packed:
            with bad_input(str(self.base.folder)):
                shape = (module.out_features, module.in_features)
                entries = self._scales(source)
                packed, state, _ = read_checkpoint_entries(raw, entries, shape, source)
            return F4.dequantize_4bit(packed, state, dtype=torch.float32)
        if path in self.base.conv1d:
            raw = raw.T.contiguous()
        if self.which == "original" or (path in self.packed_out and self._keeps_bytes(path)):
            return raw
        assert quant is not None
        packed, state = F4.quantize_4bit(
            raw, blocksize=quant.blocksize, quant_type=quant.quant_type,
            compress_statistics=quant.double_quant,
        )  # fmt: skip
        return F4.dequantize_4bit(packed, state, dtype=torch.float32)

    def _scales(self, source: str) -> dict[str, Tensor]:
        start, tensors = f"{source}.", self.base.tensors
        return {n.removeprefix(start): tensors[n] for n in tensors.header if n.startswith(start)}

    def _keeps_bytes(self, path: str) -> bool:
        """Whether a 4-bit weight goes into the output as the very bytes of the base: nothing
        changes it, and the formats are one. (Quantizing dequantized values again would keep the
        codes, and move the scales of double quantization by a rounding.)"""
        change, quant = self._change(path), self.base.quant
        same = quant is not None and (quant.quant_type, quant.blocksize) == ("nf4", 64)
        return bool(same and quant.double_quant and not (change.lora or change.full))  # type: ignore[union-attr]

    def _module(self, path: str, leaves: dict[str, str]) -> dict[str, Tensor]:
        """The module's tensors, changed; those that are not keep their dtype."""
        change, adapter = self._change(path), self.adapter.tensors
        tensors: dict[str, Tensor] = {}
        for leaf, source in leaves.items():
            if leaf in change.full:
                tensors[leaf] = adapter[change.full[leaf]]
            elif leaf == "weight":
                tensors[leaf] = self._dense(path, source)
            else:
                tensors[leaf] = self.base.tensors[source]
        if change.tokens is not None:
            index = torch.tensor(self.adapter.token_indices(path) or self._tied_indices(path))
            weight = tensors["weight"]
            tensors["weight"] = weight.index_copy(0, index, adapter[change.tokens].to(weight.dtype))
        if change.lora:
            parts = {part: adapter[name] for part, name in change.lora.items()}
            if not all(bool(t.isfinite().all()) for t in parts.values()):
                raise BadInput(f"{self.adapter.folder}: the adapter of {path} is not finite")
            used = {leaf: t.float() for leaf, t in tensors.items() if leaf in ("weight", "bias")}
            before = used["weight"].clone()
            _apply_lora(self.modules[path], used, path, parts, self.adapter.config)
            self.norms.weight += _square(before)
            self.norms.update += _square(before.sub_(used["weight"]))
            tensors.update(used)
        if change.lora or change.full or change.tokens:
            self.norms.modules += 1
        return tensors

    def _tied_indices(self, path: str) -> list[int]:
        told = self.adapter.config.trainable_token_indices
        return next(iter(told.values())) if isinstance(told, dict) else list(told or ())

    def _out_dtype(self, source: str) -> torch.dtype:
        own = self.base.tensors.dtype(source)
        packed = source.endswith(".weight") and isinstance(
            self.modules.get(source.removesuffix(".weight")), Linear4bit
        )
        # What is of another dtype than the rest of its checkpoint is so for a reason.
        return self.dtype if packed or own == self.base.dtype else own

    # -- the plan and the files --

    def _entries(self, name: str, source: str) -> dict[str, tuple[torch.dtype, list[int]]]:
        """Every tensor that one output parameter becomes, with dtype and shape."""
        path, _, leaf = name.rpartition(".")
        shape = self.base.tensors.shape(source)
        module = self.modules.get(path)
        if leaf == "weight" and isinstance(module, Linear4bit) and self.base.packed:
            shape = [module.out_features, module.in_features]
            shape = shape[::-1] if path in self.base.conv1d else shape
        full = self._change(path).full.get(leaf)
        if full is not None:
            shape = self.adapter.tensors.shape(full)
        if leaf == "weight" and path in self.packed_out:
            found = self.packed_out[path]
            # As a quantization gives them; the JSON's length comes with its values.
            entries = {name: (torch.uint8, [found.weight.numel(), 1])}
            for key, buffer in (
                ("absmax", found.absmax), ("quant_map", found.quant_map),
                ("nested_absmax", found.nested_absmax),
                ("nested_quant_map", found.nested_quant_map),
            ):  # fmt: skip
                assert buffer is not None
                entries[f"{name}.{key}"] = (buffer.dtype, list(buffer.shape))
            entries[f"{name}.quant_state.bitsandbytes__nf4"] = (torch.uint8, [0])
            return entries
        return {name: (self._out_dtype(source), shape)}

    def write(self, folder: Path, max_shard_size: int) -> int:
        """Every tensor into ``folder``; returns their bytes."""
        groups: dict[str, dict[str, str]] = {}  # a module's tensors stay together
        for name, source in self.sources.items():
            path, _, leaf = name.rpartition(".")
            groups.setdefault(path, {})[leaf] = source
        shards: list[dict[str, dict[str, str]]] = [{}]
        sizes = [0]
        plans: list[dict[str, tuple[torch.dtype, list[int]]]] = [{}]
        for path, leaves in groups.items():
            entries: dict[str, tuple[torch.dtype, list[int]]] = {}
            for leaf, source in leaves.items():
                entries |= self._entries(f"{path}.{leaf}" if path else leaf, source)
            size = sum(math.prod(shape) * dtype.itemsize for dtype, shape in entries.values())
            if shards[-1] and sizes[-1] + size > max_shard_size:
                shards.append({})
                sizes.append(0)
                plans.append({})
            shards[-1][path] = leaves
            sizes[-1] += size
            plans[-1] |= entries
        weight_map: dict[str, str] = {}
        for i, (shard, plan) in enumerate(zip(shards, plans, strict=True)):
            file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
            file = "model.safetensors" if len(shards) == 1 else file
            writer = TensorWriter(folder / file, plan)
            try:
                for path, leaves in shard.items():
                    self._write_module(writer, path, leaves)
                writer.close()
            except BaseException:
                writer.abandon()
                raise
            weight_map |= dict.fromkeys(plan, file)
        total = sum(sizes)
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (folder / "model.safetensors.index.json").write_text(text, "utf-8")
        return total

    def _write_module(self, writer: TensorWriter, path: str, leaves: dict[str, str]) -> None:
        if path in self.packed_out and self.base.packed and self._keeps_bytes(path):
            source = leaves["weight"]
            writer.put(f"{path}.weight", self.base.tensors[source].reshape(-1, 1))
            for key, entry in self._scales(source).items():
                writer.put(f"{path}.weight.{key}", entry)
            leaves = {leaf: s for leaf, s in leaves.items() if leaf != "weight"}
        lora = bool(self._change(path).lora)
        # [in, out] in the files, and [out, in] here, or the other way round.
        mine = isinstance(self.modules.get(path), Linear4bit)
        for leaf, value in self._module(path, leaves).items():
            name = f"{path}.{leaf}" if path else leaf
            turned = leaf == "weight" and path in self.base.conv1d
            if leaf == "weight" and path in self.packed_out:
                value = value.T.contiguous() if turned and not mine else value
                written = self._write_packed(writer, name, value)
            else:
                value = value.T.contiguous() if turned and mine else value
                written = value.to(self._out_dtype(leaves[leaf]))
                writer.put(name, written)
            if lora and leaf == "weight":
                self.norms.rounding += _square(written.float() - value.float())

    def _write_packed(self, writer: TensorWriter, name: str, value: Tensor) -> Tensor:
        """Quantizes and writes a weight ``[out, in]``; what it became, in fp32."""
        packed, state = F4.quantize_4bit(
            value, blocksize=64, quant_type="nf4", compress_statistics=True
        )
        state.dtype = self.dtype
        writer.put(name, packed)
        for key, entry in F4.checkpoint_entries(state).items():
            writer.put(f"{name}.{key}", entry)
        return F4.dequantize_4bit(packed, state, dtype=torch.float32)


# --- the folder -----------------------------------------------------------------------------------


@contextmanager
def _new_folder(output: Path, overwrite: bool) -> Iterator[Path]:
    """A folder beside ``output`` that becomes it at the end, or goes away.

    Raises:
        BadInput: ``output`` is there, with something in it, and is not to be replaced.
        RunError: it could not be written.
    """
    from .finetune.checkpoint import _sync, _writing

    if output.exists() and not output.is_dir():
        raise BadInput(f"{output} is a file")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise BadInput(f"{output} is not empty: give another output, or overwrite")
    with _writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        aside = output.with_name(f".writing-{os.getpid()}-{output.name}")
        old = output.with_name(f".deleting-{os.getpid()}-{output.name}")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        try:
            yield aside
            for path in [*(p for p in aside.rglob("*")), aside]:
                _sync(path)
            if output.is_dir():
                os.rename(output, old)
            os.rename(aside, output)
            _sync(output.parent)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            if old.exists() and not output.exists():
                os.rename(old, output)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _copy_side_files(base: Path, adapter: Path, folder: Path) -> None:
    """Tokenizer (the adapter's if it has one), generation settings, templates, code, licences."""
    own_tokenizer = (adapter / "tokenizer_config.json").is_file()
    for pattern in _SIDE_FILES:
        for file in sorted(base.glob(pattern)):
            if file.name == "config.json" or file.name.endswith(".index.json"):
                continue
            if not (own_tokenizer and file.name in _TOKENIZER):
                shutil.copyfile(file, folder / file.name)
    if own_tokenizer:
        for name in (*_TOKENIZER, *_TEMPLATES):
            if (adapter / name).is_file():
                shutil.copyfile(adapter / name, folder / name)


# --- the function ---------------------------------------------------------------------------------


def merge(
    adapter: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str] | None = None,
    base: str | None = None,
    to: str = "16bit",
    dtype: torch.dtype | str = "auto",
    quant_type: str | None = None,
    blocksize: int | None = None,
    double_quant: bool | None = None,
    skip_modules: list[str] | None = None,
    evaluate: str | os.PathLike[str] | None = None,
    max_length: int = 1024,
    max_shard_size: int = 5 * 10**9,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    say: Callable[[str], object] | None = None,
) -> dict[str, Any]:
    """Merges a LoRA adapter into its base and writes a plain transformers folder.

    Args:
        adapter: folder of a PEFT adapter.
        output: the folder to write. It appears whole, or not at all.
        model: the base: a folder, or a name on the hub; what the adapter names if None. Dense, or
            4-bit already (bitsandbytes' checkpoints, or this package's).
        base: what the update is added to: "dequantized", the values of the 4-bit weights, which the
            adapter was trained on, or "original", the weights before quantization. By default
            dequantized for 16 bits; for NF4 original, where the base is not 4-bit itself: in values
            that lie on NF4's grid a small update would be rounded away.
        to: "16bit", or "nf4": bitsandbytes' 4-bit form, which rounds the sum again.
        dtype: of what is 16-bit in the output; the base's own by default, bf16 if that is fp32.
        quant_type, blocksize, double_quant, skip_modules: how the base was quantized in training.
            The run's own ``config.yaml`` says it where `qlora finetune` left one, a 4-bit base says
            it itself; else NF4 in blocks of 64, double quantization.
        evaluate: a file of samples for held-out losses, in any form that `qlora finetune` reads, or
            "held-out" for the samples that the run itself held out.
        max_length: tokens a sample of ``evaluate`` is cut to.
        max_shard_size: bytes a file.
        overwrite: replace ``output`` if it is there.
        trust_remote_code: as in transformers.
        say: is told what is done, a line each; nothing is printed by default.

    Returns:
        The figures that ``merge.json`` in the output holds: ``bytes``, ``update_over_weight``
        (norms over all changed weights), ``rounding_over_update`` (what writing in 16 or 4 bits
        lost of the update), and with ``evaluate`` ``losses``, by what was evaluated.

    Raises:
        BadInput: files that are missing, damaged, or not of one another; values that are not
            offered; an output that is there. Nothing was written.
        RunError: the output could not be written (a full disk); nothing of it is left.
    """
    say = say or (lambda text: None)
    for name, value, offered in (("base", base, (None, *BASES)), ("to", to, TARGETS)):
        if value not in offered:
            words = " or ".join(repr(o) for o in offered if o)
            raise BadInput(f"{name} is {value!r}; it may be {words}")
    if max_shard_size < 1:
        raise BadInput(f"max_shard_size is {max_shard_size}; it must be above 0")
    adapter, output = Path(adapter).expanduser(), Path(output).expanduser()
    with bad_input():
        found = _Adapter(adapter)
    run = _run_settings(adapter)
    asked = {
        "quant_type": quant_type, "blocksize": blocksize, "double_quant": double_quant,
        "skip_modules": skip_modules,
    }  # fmt: skip
    quant = _quant_of(run, asked)
    if quant is None and base == "dequantized":
        raise BadInput(f"{adapter} was trained on a base in 16 bits, so base is original")
    from .integrations.transformers import _local_folder

    with bad_input("model"):
        folder = _local_folder(model or _named_base(found), None, None)
        opened = _open_base(folder, quant, trust_remote_code)
    if base is None:
        dense = not opened.packed and (quant is None or to == "nf4")
        base = "original" if dense else "dequantized"
    if opened.packed and base == "original":
        raise BadInput(f"{folder} is 4-bit: give the model it was made from, or base dequantized")
    found.check(opened)
    out_dtype = _output_dtype(dtype, opened)
    rows = None
    if evaluate is not None:
        rows = _evaluation_rows(evaluate, run, adapter, folder, max_length, trust_remote_code)
    if base == "dequantized":
        say(f"base: {folder}, dequantized from {opened.quant}")
    else:
        say(f"base: {folder}, as it was before it was quantized")
    job = _Merge(opened, found, base, to, out_dtype, trust_remote_code)
    with bad_input(), _new_folder(output, overwrite) as aside:
        size = job.write(aside, max_shard_size)
        _copy_side_files(folder, adapter, aside)
        text = json.dumps(job.config, indent=2, sort_keys=True) + "\n"
        (aside / "config.json").write_text(text, "utf-8")
        figures: dict[str, Any] = {
            "base": base,
            "to": to,
            "dtype": str(out_dtype).removeprefix("torch."),
            "quantization": None if opened.quant is None else str(opened.quant),
            "bytes": size,
            "tied_embeddings": job.tied is True,
            **job.norms.figures(),
        }
        _write_figures(aside, figures)
    say(_summary(output, figures))
    if to == "nf4" and base == "dequantized":
        say(
            "note: values that lie on NF4's grid are rounded back onto it, and a small update with "
            "them; base original keeps it (docs/merge.md)"
        )
    if rows is not None:
        figures["losses"] = _losses(rows, found, opened, base, output, say)
        from .finetune.checkpoint import replace_file, write_json

        replace_file(output / "merge.json", lambda p: write_json(p, figures))
    return figures


def _write_figures(folder: Path, figures: dict[str, Any]) -> None:
    from .finetune.checkpoint import write_json

    write_json(folder / "merge.json", figures)


def _summary(output: Path, figures: dict[str, Any]) -> str:
    size = f"{figures['bytes'] / 1e6:,.1f} MB"
    text = f"{output}: {size}, {figures['modules_changed']} modules changed"
    if figures["update_over_weight"]:
        text += (
            f"; the update is {figures['update_over_weight']:.2%} of the weights, and writing it "
            f"rounded by {figures['rounding_over_update']:.2f} of the update"
        )
    return text


def _named_base(adapter: _Adapter) -> str:
    if not adapter.base:
        raise BadInput(f"{adapter.folder} does not name its base: give model")
    return adapter.base


def _run_settings(adapter: Path) -> dict[str, Any] | None:
    """The settings of the finetune that left the adapter, if they lie beside it."""
    file = adapter / "config.yaml"
    if not file.is_file():
        return None
    from .finetune.config import read_yaml

    settings = read_yaml(file)
    return settings if "quant_type" in settings else None


def _quant_of(run: dict[str, Any] | None, asked: dict[str, Any]) -> _Quant | None:
    from .formats import check_blocksize, get_format

    told = {k: v for k, v in asked.items() if v is not None}
    names = tuple(asked)
    if run is not None and not told:
        if run["quant_type"] == "none":
            return None
        told = {n: run[n] for n in names if run.get(n) is not None}
        return _Quant(**told, told_by="config.yaml of the run")
    with bad_input():
        quant = _Quant(**told, told_by="as asked" if told else "assumed")
        get_format(quant.quant_type)
        check_blocksize(quant.blocksize)
    return quant


def _output_dtype(dtype: torch.dtype | str, base: _Base) -> torch.dtype:
    if dtype == "auto":
        told = base.config.get("dtype") or base.config.get("torch_dtype")
        for guess in (base.dtype, getattr(torch, str(told), None)):
            if guess in _HALVES:
                return guess
        return torch.bfloat16
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in _HALVES:
        raise BadInput(f"dtype is {dtype!r}; it may be 'auto', 'bfloat16' or 'float16'")
    return found


# --- held-out losses ------------------------------------------------------------------------------


@dataclass
class _Rows:
    """Samples to evaluate on, and how they are put together."""

    samples: Any
    tokenizer: Any


def _evaluation_rows(
    source: str | os.PathLike[str], run: dict[str, Any] | None, adapter: Path, base: Path,
    max_length: int, trust_remote_code: bool,
) -> _Rows:  # fmt: skip
    from .finetune.config import resolve
    from .finetune.data import DataOptions, prepare
    from .finetune.model import load_tokenizer

    tokens = adapter if (adapter / "tokenizer_config.json").is_file() else base
    tokenizer = load_tokenizer(tokens, trust_remote_code)
    if os.fspath(source) == HELD_OUT:
        if run is None:
            raise BadInput(
                f"{adapter} has no config.yaml of `qlora finetune` to say what was held out: give "
                "a file"
            )
        options = resolve({}, run).data_options(max_length)
        with bad_input("data"):
            samples = prepare(options, tokenizer).eval
    else:
        options = DataOptions(
            os.fspath(source), eval_split=0, max_length=max_length, too_long="truncate"
        )
        with bad_input("data"):
            samples = prepare(options, tokenizer).train
    if not len(samples):
        raise BadInput(f"{source}: there is no sample to evaluate on")
    return _Rows(samples, tokenizer)


@torch.no_grad()
def _loss(model: Any, rows: _Rows, batch: int = 8) -> float:
    """The mean loss of all trained tokens."""
    from .finetune.data import IGNORE, Collator
    from .loss import install, uninstall

    collate = Collator(rows.tokenizer)
    model.eval()
    install(model)
    order = sorted(range(len(rows.samples)), key=lambda i: -len(rows.samples[i]["input_ids"]))
    total, count = 0.0, 0
    for start in range(0, len(order), batch):
        inputs = collate([rows.samples[i] for i in order[start : start + batch]])
        inputs = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
        trained = int((inputs["labels"][..., 1:] != IGNORE).sum())
        if trained:
            total += float(model(**inputs).loss) * trained
            count += trained
    uninstall(model)
    if not count:
        raise BadInput("the samples to evaluate on have no token to predict")
    return total / count


def _losses(
    rows: _Rows, adapter: _Adapter, base: _Base, which: str, output: Path,
    say: Callable[[str], object],
) -> dict[str, float]:  # fmt: skip
    """Held-out losses of everything on the way from the base to the folder that was written."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from .integrations.transformers import default_dtype, load_quantized_model

    dtype = default_dtype()
    losses: dict[str, float] = {}

    def quantized(**kwargs: Any) -> Any:
        quant = base.quant
        assert quant is not None
        given = {} if base.packed else {
            "quant_type": quant.quant_type, "blocksize": quant.blocksize,
            "double_quant": quant.double_quant, "skip_modules": quant.skip_modules,
        }  # fmt: skip
        return load_quantized_model(base.folder, **given, **kwargs)

    def dense(folder: Path, dtype: torch.dtype) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)

    def note(what: str, model: Any) -> None:
        losses[what] = _loss(model, rows)
        say(f"held-out loss, {what}: {losses[what]:.4f}")

    grown = _grown_rows(adapter, base)

    def with_adapter(model: Any) -> Any:
        if grown is not None:
            model.resize_token_embeddings(grown)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return PeftModel.from_pretrained(model, str(adapter.folder))

    if base.quant is not None:
        model = quantized(dtype=dtype)
        note("base, 4-bit", model)
        note("adapter on it, unmerged", with_adapter(model))
        del model
    if which == "original":
        note("base, original", dense(base.folder, dtype))
        merged = dense(base.folder, torch.float32)
    else:
        merged = quantized(dtype=torch.float32).dequantize(torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied words, which the folder accounts for
        merged = with_adapter(merged).merge_and_unload()
    note("merged in memory, fp32", merged)
    del merged
    note("the folder, reopened", dense(output, dtype))
    return losses


def _grown_rows(adapter: _Adapter, base: _Base) -> int | None:
    """How many words the adapter's embedding has, where that is not the base's number."""
    embeddings = base.model.get_input_embeddings()
    path = next(n for n, m in base.modules().items() if m is embeddings)
    full = adapter.changes.get(path, _Change()).full.get("weight")
    rows = adapter.tensors.shape(full)[0] if full else embeddings.num_embeddings
    return rows if rows != embeddings.num_embeddings else None


# --- the command ----------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``qlora merge``."""
    add = parser.add_argument
    add("adapter", help="folder of a PEFT adapter, as `qlora finetune` leaves it")
    add("--output", required=True, help="the folder to write")
    add("--model", help="the base: folder or hub id (what the adapter names if left out)")
    add(
        "--base", choices=BASES,
        help="merge into the dequantized 4-bit weights, which the adapter was trained on, or into "
        "the original ones [dequantized; to nf4 original]",
    )  # fmt: skip
    add("--to", choices=TARGETS, default="16bit", help="what is written [%(default)s]")
    add("--dtype", default="auto", help="bfloat16 or float16; the base's own by default")
    add("--quant_type", help="how the base was quantized in training [as the run says, or nf4]")
    add("--blocksize", type=int, help="... in blocks of [as the run says, or 64]")
    add("--no-double-quant", action="store_true", help="... without double quantization")
    add("--skip_modules", nargs="*", help="... but for these modules [the output layer]")
    add(
        "--eval", metavar="FILE",
        help="held-out losses on the samples of FILE, or of the run's own held-out ones: held-out",
    )  # fmt: skip
    add("--max_length", type=int, default=1024, help="of a sample of --eval [%(default)s]")
    add("--max_shard_size", type=float, default=5.0, help="GB a file [%(default)s]")
    add("--overwrite", action="store_true", help="replace the output folder if it is there")
    add("--trust_remote_code", action="store_true", help="as in transformers")
    add("--json", metavar="FILE", help="write the figures there too")


def run(arguments: argparse.Namespace) -> int:
    """Runs ``qlora merge``; returns the exit code."""
    import transformers
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    transformers.utils.logging.disable_progress_bar()
    figures = merge(
        arguments.adapter,
        arguments.output,
        model=arguments.model,
        base=arguments.base,
        to=arguments.to,
        dtype=arguments.dtype,
        quant_type=arguments.quant_type,
        blocksize=arguments.blocksize,
        double_quant=False if arguments.no_double_quant else None,
        skip_modules=arguments.skip_modules,
        evaluate=arguments.eval,
        max_length=arguments.max_length,
        max_shard_size=round(arguments.max_shard_size * 1e9),
        overwrite=arguments.overwrite,
        trust_remote_code=arguments.trust_remote_code,
        say=lambda text: console.print(text, markup=False, soft_wrap=True),
    )
    if "losses" in figures:
        table = Table("", "held-out loss")
        for what, loss in figures["losses"].items():
            table.add_row(what, f"{loss:.4f}")
        console.print(table)
    if arguments.json:
        from .finetune.checkpoint import replace_file, write_json

        replace_file(Path(arguments.json), lambda p: write_json(p, figures))
    return 0
