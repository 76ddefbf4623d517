"""transformers: models quantized while they load, saved and loaded again by name.

Two ways in, one machinery (a quantizer registered with transformers under ``qlora_kernels``)::

    model = load_quantized_model("path or hub id", quant_type="nf4")

    model = AutoModelForCausalLM.from_pretrained(..., quantization_config=QLoRAKernelsConfig())

While loading, one dense tensor at a time is in memory beside the quantized model.
:func:`load_quantized_model` also checks the files first, reads them without mapping them (a mapped
file counts as resident), and takes bitsandbytes' 4-bit checkpoints without bitsandbytes.

What bitsandbytes can read is saved as its checkpoint (``quant_method: bitsandbytes``), with a mark
by which this module knows its own: with this package it gives our layers, without it bitsandbytes'.
Other formats and block sizes are saved under ``qlora_kernels``, which ``import qlora_kernels``
makes known to transformers. One that has not imported this package refuses them: it warns of an
unknown quantization type, and packed weights have not the shapes of the layers.
"""

from __future__ import annotations

import copy
import difflib
import functools
import json
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module
from transformers.utils import logging
from transformers.utils.quantization_config import BitsAndBytesConfig, QuantizationConfigMixin

from .. import functional as F4
from .. import takeover
from ..formats import FORMATS, Format, check_blocksize, get_format, register_format
from ..functional import PEER_BLOCKSIZES, PEER_FORMATS
from ..nn import COMPUTE_DTYPES, CheckpointError, Experts4bit, Linear4bit, footprint
from . import experts
from .checkpoint_files import (
    check_safetensors,
    check_weight_files,
    verify_files,
    with_checksums,
)

__all__ = [
    "QLoRAKernelsConfig",
    "QLoRAKernelsQuantizer",
    "check_safetensors",
    "default_dtype",
    "install",
    "load_quantized_model",
]

METHOD = "qlora_kernels"
PEER_METHOD = "bitsandbytes"
VERSION = 1
# What both configurations call the same; what bitsandbytes' has no name for, or another meaning.
_SHARED = (
    "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_quant_storage",
    "llm_int8_skip_modules",
)  # fmt: skip
_OURS_ALONE = ("bnb_4bit_blocksize", "bnb_4bit_compute_dtype")


def default_dtype() -> torch.dtype:
    """What ``dtype="auto"`` means: bf16 where the hardware multiplies in it, else fp32."""
    if torch.cuda.is_available():
        # By capability: torch calls bf16 supported on Turing too, where it is emulated.
        ampere = torch.cuda.get_device_capability() >= (8, 0)
        return torch.bfloat16 if ampere else torch.float16
    cpu = torch.cpu
    if cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported():
        return torch.bfloat16
    return torch.float32


def _dtype(dtype: torch.dtype | str | None, argument: str) -> torch.dtype | None:
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if dtype is not None and found not in COMPUTE_DTYPES:
        raise ValueError(f"{argument} must be float32, bfloat16 or float16, got {dtype!r}")
    return found


def _storage(dtype: torch.dtype | str | None) -> torch.dtype:
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if found is None and dtype is None:
        return torch.uint8
    if not isinstance(found, torch.dtype) or found.itemsize not in (1, 2, 4) or found.is_complex:
        raise ValueError(
            f"bnb_4bit_quant_storage must be a dtype of 1, 2 or 4 bytes, got {dtype!r}"
        )
    return found


# --- configuration ------------------------------------------------------------------------------


class QLoRAKernelsConfig(QuantizationConfigMixin):
    """``quantization_config`` of ``from_pretrained``; names are those of ``BitsAndBytesConfig``.

    Args:
        bnb_4bit_quant_type: a format's name, or a ``Format`` of your own.
        bnb_4bit_blocksize: values a scale, 16 to 4096.
        bnb_4bit_use_double_quant: quantizes the scales as well.
        bnb_4bit_compute_dtype: fp32, bf16, fp16 or their names; None computes in x's dtype.
        bnb_4bit_quant_storage: dtype under which the packed bytes are held, uint8 or another of 1,
            2 or 4 bytes, or its name: FSDP1 wants the dtype of the model's other parameters.
        llm_int8_skip_modules: names of modules to leave as they are, by transformers' rules: where
            they are given they replace the default, which is the output layer.
        quantize_experts: a mixture's experts as well, which are no linear layers (docs/experts.md).
            None: when a dense model is quantized; of a checkpoint, it says whether they are.
        load_in_4bit: taken, so that a ``BitsAndBytesConfig`` is changed by its name alone.

    Raises:
        ValueError: a value that is not offered, or a configuration of a later version.
        TypeError: an unknown name; the nearest one is told.
    """

    def __init__(
        self,
        bnb_4bit_quant_type: str | Format = "nf4",
        bnb_4bit_blocksize: int = 64,
        bnb_4bit_use_double_quant: bool = True,
        bnb_4bit_compute_dtype: torch.dtype | str | None = None,
        llm_int8_skip_modules: list[str] | None = None,
        quantize_experts: bool | None = None,
        bnb_4bit_quant_storage: torch.dtype | str | None = None,
        load_in_4bit: bool = True,
        version: int = VERSION,
        quant_method: str = METHOD,
        **unknown: Any,
    ) -> None:
        if unknown:
            name = next(iter(unknown))
            known = [k for k in type(self).__init__.__annotations__ if k[:4] in ("bnb_", "llm_")]
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"QLoRAKernelsConfig takes no {name!r}{hint}")
        if quant_method != METHOD:
            raise ValueError(f"quant_method is {quant_method!r}, expected {METHOD!r}")
        if version > VERSION:
            raise ValueError(
                f"the checkpoint was written by a later qlora_kernels (quantization_config version "
                f"{version}, this one reads {VERSION}): upgrade the package"
            )
        if not load_in_4bit:
            raise ValueError("load_in_4bit=False: leave quantization_config out instead")
        if isinstance(bnb_4bit_quant_type, Format):
            bnb_4bit_quant_type = register_format(bnb_4bit_quant_type).name
        compute = _dtype(bnb_4bit_compute_dtype, "bnb_4bit_compute_dtype")
        self.quant_method = METHOD  # type: ignore[assignment]
        self.version = version
        self.bnb_4bit_quant_type = bnb_4bit_quant_type
        self.bnb_4bit_blocksize = check_blocksize(bnb_4bit_blocksize)
        self.bnb_4bit_use_double_quant = bool(bnb_4bit_use_double_quant)
        # A name: torch.dtype is not JSON.
        self.bnb_4bit_compute_dtype = str(compute).removeprefix("torch.") if compute else None
        self.bnb_4bit_quant_storage = str(_storage(bnb_4bit_quant_storage)).removeprefix("torch.")
        if isinstance(llm_int8_skip_modules, str):
            raise ValueError(
                f"llm_int8_skip_modules must be a list of names, got {llm_int8_skip_modules!r}"
            )
        self.llm_int8_skip_modules = (
            None if llm_int8_skip_modules is None else list(llm_int8_skip_modules)
        )
        self.quantize_experts = quantize_experts

    @property
    def is_quantizable(self) -> bool:
        return True

    def to_dict(self) -> dict[str, Any]:
        """For JSON; as bitsandbytes' configuration where that can say it, with our mark: for NF4
        and FP4, of models without experts in 4 bits, which it does not load."""
        own = super().to_dict()
        if own["bnb_4bit_quant_storage"] == "uint8":  # as it was before there was a choice
            del own["bnb_4bit_quant_storage"]
        if own["quantize_experts"] is None:
            del own["quantize_experts"]
        names = [f.name for f in PEER_FORMATS]
        theirs = self.bnb_4bit_quant_type in names and self.bnb_4bit_blocksize in PEER_BLOCKSIZES
        if self.quantize_experts or not theirs:
            return own
        return {
            "quant_method": PEER_METHOD,
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_compute_dtype": self.bnb_4bit_compute_dtype or "float32",
            **{name: getattr(self, name) for name in _SHARED},
            METHOD: {"version": self.version, **{name: own[name] for name in _OURS_ALONE}},
        }

    @classmethod
    def from_dict(  # type: ignore[override]
        cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """From :meth:`to_dict`'s, of either form."""
        told = dict(config_dict)
        mark = told.pop(METHOD, None)
        if mark is not None:
            told = {**{n: told[n] for n in _SHARED if n in told}, **mark}
        own = {n: kwargs.pop(n) for n in list(kwargs) if n in cls.__init__.__annotations__}
        config = cls(**{**told, **own})
        return (config, kwargs) if return_unused_kwargs else config

    @classmethod
    def from_bitsandbytes(cls, config: Mapping[str, Any]) -> QLoRAKernelsConfig:
        """The same as a ``BitsAndBytesConfig``'s dict says, for reading its checkpoints.

        Raises:
            ValueError: an 8-bit configuration.
        """
        if not config.get("load_in_4bit"):
            raise ValueError("an 8-bit bitsandbytes checkpoint cannot be read: only 4-bit ones are")
        names = (
            "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype",
            "bnb_4bit_quant_storage",
        )  # fmt: skip
        kwargs = {name: config[name] for name in names if config.get(name) is not None}
        return cls(llm_int8_skip_modules=config.get("llm_int8_skip_modules"), **kwargs)


# --- what runs while a checkpoint loads ---------------------------------------------------------

_conversion_errors: list[str] = []  # transformers logs them and raises without their text


@contextmanager
def _reported() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        _conversion_errors.append(str(error))
        raise


def _only(value: Any) -> Tensor:
    return value[0] if isinstance(value, list) else value


class _Quantize(ConversionOps):
    """A dense weight of a checkpoint into its layer."""

    def __init__(self, hf_quantizer: HfQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], model: nn.Module | None = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        result = {}
        for name in list(input_dict):
            value = _only(input_dict.pop(name))
            module, _ = get_module_from_name(model, name)
            with _reported():
                if isinstance(module, Experts4bit):
                    result[name] = experts.fill(module, value, name, kwargs.get("missing_keys"))
                    continue
                if getattr(module, "_is_transposed_in_checkpoint", False):
                    value = value.T.contiguous()
                result[name] = _fill(module, value, {}, name)
        return result


class _Deserialize(ConversionOps):
    """A packed weight and its scales into their layer; all other weights as they are."""

    def __init__(self, hf_quantizer: HfQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(  # type: ignore[override]
        self,
        input_dict: dict[str, Any],
        full_layer_name: str | None = None,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        assert full_layer_name is not None
        module, _ = get_module_from_name(model, full_layer_name)
        tensors = {key.removeprefix("weight."): _only(v) for key, v in input_dict.items()}
        weight = tensors.pop("weight", None)
        # A pattern stands for every format; the JSON inside says which one it is.
        for key in [k for k in tensors if k.startswith("quant_state.")]:
            blob = tensors.pop(key)
            tensors[_state_key(blob, key)] = blob
        with _reported():
            if weight is None:
                raise CheckpointError(f"{full_layer_name} is missing, its scales are there")
            if isinstance(module, Linear4bit):
                return {"weight": _fill(module, weight, tensors, full_layer_name)}
            if tensors:
                raise CheckpointError(
                    f"{full_layer_name} is 4-bit in the checkpoint, but {type(module).__name__} "
                    "takes a dense weight: llm_int8_skip_modules of the config does not agree"
                )
        parameter = getattr(module, "weight", None)
        if parameter is not None and weight.is_floating_point():
            weight = weight.to(parameter.dtype)
        return {"weight": weight}


_ANY_OWN_FORMAT = r"weight.quant_state.qlora_kernels__[A-Za-z0-9_.\-]+"


def _state_key(blob: Tensor, key: str) -> str:
    if "[" not in key:
        return key
    try:
        name = json.loads(blob.numpy().tobytes().decode())["quant_type"]
    except (ValueError, KeyError, TypeError):
        name = "unknown"  # the reader will say what is wrong with the JSON
    return f"quant_state.qlora_kernels__{name}"


def _fill(module: Any, weight: Tensor, entries: dict[str, Tensor], name: str) -> Tensor:
    """Sets scales and layout of a Linear4bit on meta; returns the packed weight to be set."""
    packed, state, fmt = module._read(weight, entries, name)
    module.__dict__["_was_packed"] = bool(entries)
    module._adopt(state, fmt, packed.device)
    try:
        packed = F4.as_storage(packed, module.quant_storage)
    except ValueError as error:
        raise CheckpointError(f"{name}: {error}") from None
    # transformers would have every parameter of a floating-point dtype trained.
    return nn.Parameter(packed, requires_grad=False)


class QLoRAKernelsQuantizer(HfQuantizer):
    """Swaps linear layers on the meta model and says how a checkpoint's tensors fill them."""

    requires_calibration = False
    quantization_config: QLoRAKernelsConfig

    # What a "weight" of ours is made of in a checkpoint; one key more for every format.
    serialized_names = {  # noqa: RUF012 (as the base class has it)
        "weight": [
            "weight",
            "weight.absmax",
            "weight.quant_map",
            "weight.nested_absmax",
            "weight.nested_quant_map",
            "weight.quant_state.bitsandbytes__nf4",
            "weight.quant_state.bitsandbytes__fp4",
            _ANY_OWN_FORMAT,
        ]
    }

    def is_serializable(self) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, str]]:
        return None, with_checksums()

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        conversions = super().update_weight_conversions(weight_conversions, model)
        return conversions if self.pre_quantized else experts.expert_by_expert(conversions, model)

    def get_load_operations(self) -> dict[str, type[ConversionOps]]:
        return {"deserialize": _Deserialize}

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        module, name = get_module_from_name(model, param_name)
        if isinstance(module, Experts4bit):
            return not self.pre_quantized and name in module.shapes
        return isinstance(module, Linear4bit) and name == "weight"

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        device_map = kwargs.get("device_map")
        if isinstance(device_map, dict) and "disk" in device_map.values():
            where = [name for name, device in device_map.items() if device == "disk"]
            raise ValueError(
                f"device_map puts {', '.join(where[:3])} on disk, where 4-bit layers cannot be: "
                "give them a device, or raise max_memory"
            )

    def update_device_map(self, device_map: Any) -> Any:
        # As bitsandbytes: quantize where the model will run.
        if device_map is None:
            gpu = torch.cuda.is_available()
            device_map = {"": torch.cuda.current_device() if gpu else "cpu"}
        return device_map

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        verify_files(kwargs.get("checkpoint_files") or (), packed=self.pre_quantized)
        config = self.quantization_config
        skipped = self.get_modules_to_not_convert(
            model, config.llm_int8_skip_modules, model._keep_in_fp32_modules
        )
        # A tied weight is read by an embedding as it is, whatever the user skips.
        tied = model.all_tied_weights_keys
        skipped += [key.removesuffix(".weight") for key in {*tied.keys(), *tied.values()}]
        fmt: str | Format = config.bnb_4bit_quant_type
        if self.pre_quantized and fmt not in FORMATS:
            fmt = "nf4"  # a format of the checkpoint's own: its codebook comes with the tensors
        fmt = get_format(fmt)
        how: dict[str, Any] = {
            "compute_dtype": _dtype(config.bnb_4bit_compute_dtype, "bnb_4bit_compute_dtype"),
            "quant_type": fmt,
            "blocksize": getattr(config, "bnb_4bit_blocksize", 64),  # bitsandbytes' has none
            "compress_statistics": config.bnb_4bit_use_double_quant,
        }
        linears = [
            (name, module)
            for name, module in model.named_modules()
            if type(module) is nn.Linear or isinstance(module, Conv1D)
            if should_convert_module(name, skipped)
        ]
        if not linears:
            raise ValueError(
                f"{type(model).__name__} has no linear layer to quantize (skipped: "
                f"{', '.join(sorted(set(skipped))) or 'none'})"
            )
        if not self.pre_quantized:
            names = [name for name, _ in linears]
            _warn_of_skips_in_vain(config.llm_int8_skip_modules or (), names)
        for name, module in linears:
            conv1d = isinstance(module, Conv1D)
            k, n = module.weight.shape if conv1d else reversed(module.weight.shape)
            bias = module.bias
            new = Linear4bit(
                k,
                n,
                bias is not None,
                device="meta",
                dtype=module.weight.dtype,
                quant_storage=_storage(config.bnb_4bit_quant_storage),
                **how,
            )
            marks = new.__dict__
            marks["_is_transposed_in_checkpoint"] = conv1d and not self.pre_quantized
            # transformers would draw what a checkpoint lacks; here that is an error, below.
            marks["_is_hf_initialized"] = True
            new.requires_grad_(False)
            model.set_submodule(name, new)
        # bitsandbytes' checkpoints hold dense experts; ours say what they hold.
        told = getattr(config, "quantize_experts", None)
        if told or (told is None and not self.pre_quantized):
            experts.swap(model, skipped, how)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        lacking = [
            f"{name}.{key}"
            for name, module in model.named_modules()
            if isinstance(module, Linear4bit)
            for key, parameter in module.named_parameters(recurse=False)
            if module.absmax.is_meta or not getattr(parameter, "_is_hf_initialized", False)
        ]
        lacking += experts.check_loaded(model, self.pre_quantized)
        if lacking:
            raise CheckpointError(f"the checkpoint lacks {_first(lacking)}")
        if self.pre_quantized:
            _check_nothing_was_drawn(model)
            _check_all_or_none_was_packed(model)
        # Saving writes our modules' state dict as it is: nothing is to be converted back.
        conversions = getattr(model, "_weight_conversions", None) or []
        model._weight_conversions = [
            c
            for c in conversions
            if not any(isinstance(op, _Deserialize) for op in getattr(c, "operations", ()))
            if not experts.makes_experts(c, model)
        ]
        self._settle_config(model)
        # The flag turns on gradient checkpointing in prepare_model_for_kbit_training and keeps
        # DataParallel away, and makes num_parameters() import bitsandbytes: so that is ours.
        _count_packed_weights()
        model.is_loaded_in_4bit = True
        if logging.get_verbosity() <= logging.WARNING:
            for line in str(footprint(model)).splitlines():
                print(f"qlora_kernels: {line}", file=sys.stderr)
        return model

    def _settle_config(self, model: Any) -> None:
        """The configuration that the model keeps and saves says whether its experts are in 4 bits.

        It is this package's then, whatever was given: bitsandbytes has no word for them, and loads
        no such checkpoint.
        """
        config: Any = self.quantization_config
        have = any(isinstance(module, Experts4bit) for module in model.modules())
        if not have and getattr(config, "quantize_experts", None) is None:
            return
        if isinstance(config, QLoRAKernelsConfig):
            config = copy.copy(config)
            config.quantize_experts = have
        elif have:
            told = {name: getattr(config, name) for name in (*_SHARED, "bnb_4bit_compute_dtype")}
            config = QLoRAKernelsConfig(**told, quantize_experts=True)
        self.quantization_config = model.config.quantization_config = config

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        dtype = _dtype(dtype, "dtype")  # config.dtype is a name once the model was saved
        for name, module in list(model.named_modules()):
            if isinstance(module, (Linear4bit, Experts4bit)):
                model.set_submodule(name, module.dequantize(dtype))
        model.is_loaded_in_4bit = False
        return model


def _first(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{', '.join(names[:5])}{more}"


def _check_nothing_was_drawn(model: Any) -> None:
    """A 4-bit checkpoint has all weights of the model that was saved, but a head put on later.

    transformers draws what is missing and goes on with a warning.
    """
    inside = "" if type(model).__name__ in (model.config.architectures or ()) else (
        f"{model.base_model_prefix}."
    )  # fmt: skip
    expected = model._keys_to_ignore_on_load_missing or ()
    drawn = [
        name
        for name, parameter in model.named_parameters()
        if not (parameter.is_meta or getattr(parameter, "_is_hf_initialized", False))
        if name.startswith(inside) and not any(re.search(p, name) for p in expected)
    ]
    if drawn:
        raise CheckpointError(
            f"the checkpoint lacks {_first(drawn)}, which {type(model).__name__} had when it was "
            "saved, or has them in another shape: its files are not whole, or config.json is "
            "another model's"
        )


def _check_all_or_none_was_packed(model: nn.Module) -> None:
    """Dense weights of a checkpoint are quantized where its config says so: all, or none."""
    found: dict[bool, list[str]] = {True: [], False: []}
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            found[module.__dict__.pop("_was_packed", True)].append(name)
    if found[True] and found[False]:
        raise CheckpointError(
            f"{_first(found[False])} are dense in the checkpoint, whose other layers are 4-bit: "
            "llm_int8_skip_modules of its config does not agree"
        )


def _warn_of_skips_in_vain(patterns: Iterable[str], quantized: list[str]) -> None:
    """A vision tower, say, that is named without what stands before it is not skipped."""
    for pattern in patterns:
        inside = [name for name in quantized if f".{pattern}." in f".{name}."]
        if inside:
            whole = f".{inside[0]}.".partition(f".{pattern}.")[0][1:]
            whole = f"{whole}.{pattern}" if whole else pattern
            warnings.warn(
                f"llm_int8_skip_modules has {pattern!r}, and {len(inside)} linear layers in it are "
                f"quantized ({inside[0]}): by transformers' rules a pattern is the start of a "
                f"name or its end, so say {whole!r}",
                stacklevel=2,
            )


class BitsAndBytesQuantizer(QLoRAKernelsQuantizer):
    """The same for a ``BitsAndBytesConfig``, which the model keeps and saves."""


class _PeerConfig(BitsAndBytesConfig):
    """Reads a checkpoint's configuration: ours by its mark, else bitsandbytes'."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        reader = QLoRAKernelsConfig if METHOD in config_dict else BitsAndBytesConfig
        return reader.from_dict(config_dict, *args, **kwargs)


class _PeerQuantizer(HfQuantizer):
    """What serves a ``BitsAndBytesConfig`` of 4 bits: bitsandbytes, unless ``enable()`` holds."""

    def __new__(cls, config: Any, **kwargs: Any) -> Any:
        chosen = BitsAndBytesQuantizer if takeover.enabled() else _THEIR_QUANTIZER
        return chosen(config, **kwargs)


_THEIR_QUANTIZER = AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"]


def _count_packed_weights() -> None:
    """Makes ``num_parameters()`` count a packed byte as two weights; other models are not touched.

    transformers imports bitsandbytes there for every model that says ``is_loaded_in_4bit``.
    """
    from transformers.modeling_utils import ModuleUtilsMixin

    original = ModuleUtilsMixin.num_parameters
    if getattr(original, "_qlora_kernels", False):
        return

    @functools.wraps(original)
    def num_parameters(
        self: Any, only_trainable: bool = False, exclude_embeddings: bool = False
    ) -> int:
        packed = {
            id(m.weight): m.in_features * m.out_features
            for m in self.modules()
            if isinstance(m, Linear4bit)
        }
        for m in self.modules():
            if isinstance(m, Experts4bit):
                for key, shape in m.shapes.items():
                    packed[id(m._parameters[key])] = shape.experts * shape.size
        if not packed:
            return original(self, only_trainable, exclude_embeddings)
        embeddings = {
            f"{name}.weight" for name, m in self.named_modules() if isinstance(m, nn.Embedding)
        }
        return sum(
            packed.get(id(p), p.numel())
            for name, p in self.named_parameters()
            if (p.requires_grad or not only_trainable)
            and not (exclude_embeddings and name in embeddings)
        )

    num_parameters._qlora_kernels = True  # type: ignore[attr-defined]
    ModuleUtilsMixin.num_parameters = num_parameters  # type: ignore[method-assign]


def install() -> None:
    """Registers configuration and quantizer with transformers. Idempotent."""
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(QLoRAKernelsConfig)
        register_quantizer(METHOD)(QLoRAKernelsQuantizer)
        AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] = _PeerQuantizer
        AUTO_QUANTIZATION_CONFIG_MAPPING["bitsandbytes_4bit"] = _PeerConfig


install()


# --- loading, with its files checked ------------------------------------------------------------


def _local_folder(model: str | os.PathLike[str], revision: str | None, token: Any) -> Path:
    """``model`` if it is a folder, else the hub's files for it, downloaded to the cache."""
    name = os.path.expanduser(os.fspath(model))
    folder = Path(name)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise NotADirectoryError(f"{name} is a file; give the folder that holds config.json")
    if folder.is_absolute() or name.startswith(".") or name.count("/") > 1 or "\\" in name:
        raise FileNotFoundError(f"there is no folder {name}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                token=token,
                allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"],
                ignore_patterns=["consolidated*", "*/*"],
            )
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"there is no folder {name!r}, and the hub did not give a model of that name: {reason}"
        ) from error


@contextmanager
def _read_not_mapped() -> Iterator[None]:
    """Lets transformers read safetensors by ``pread``, as it does on Windows, and not map them.

    A mapped page counts as resident until the file is closed, which adds the whole dense checkpoint
    to the peak. Without the hook (another version) loading works all the same.
    """
    import transformers.modeling_utils

    modeling_utils: Any = transformers.modeling_utils
    original = getattr(modeling_utils, "safe_open", None)
    if original is None:
        yield
        return

    def opened(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **{**kwargs, "backend": "pread"})

    modeling_utils.safe_open = opened
    try:
        yield
    finally:
        modeling_utils.safe_open = original


def load_quantized_model(
    model: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str = "auto",
    quant_type: str | Format | None = None,
    blocksize: int | None = None,
    double_quant: bool | None = None,
    compute_dtype: torch.dtype | str | None = None,
    skip_modules: list[str] | None = None,
    device_map: Any = None,
    model_class: Any = None,
    revision: str | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> Any:
    """A transformers model with its linear layers in 4 bits.

    A dense checkpoint is quantized as it is read: the peak is the quantized model and about one
    dense tensor. A checkpoint that is 4-bit already (ours, or bitsandbytes') is loaded as it is.

    Args:
        model: a local folder, or a name on the hub. Weights must be safetensors.
        dtype: of everything that is not quantized; "auto" is :func:`default_dtype`.
        quant_type, blocksize, double_quant: as in :class:`~qlora_kernels.nn.Linear4bit`; NF4 in
            blocks of 64 with double quantization by default.
        compute_dtype: what the 4-bit layers compute in; their input's dtype by default.
        skip_modules: layers to leave dense, by transformers' rules; the output layer by default.
        device_map: as in ``from_pretrained``; the current GPU by default, else the CPU.
        model_class: whose ``from_pretrained`` is called; ``AutoModelForCausalLM`` by default, for
            which a checkpoint that lacks weights is an error.
        kwargs: to ``from_pretrained`` (``attn_implementation``, ...).

    Raises:
        FileNotFoundError: no such folder or hub model, or a folder without config or weights.
        CheckpointError: truncated or inconsistent files, weights that are missing.
        ValueError: values that are not offered, a checkpoint of another quantization method, or a
            4-bit checkpoint that is not of the format asked for.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    model_class = model_class or AutoModelForCausalLM
    dense_dtype = default_dtype() if dtype == "auto" else _dtype(dtype, "dtype")
    compute_dtype = _dtype(compute_dtype, "compute_dtype")
    asked: dict[str, Any] = {
        "bnb_4bit_quant_type": quant_type,
        "bnb_4bit_blocksize": blocksize,
        "bnb_4bit_use_double_quant": double_quant,
        "bnb_4bit_compute_dtype": compute_dtype,
        "llm_int8_skip_modules": skip_modules,
    }
    asked = {name: value for name, value in asked.items() if value is not None}
    wanted = QLoRAKernelsConfig(**asked)  # checks the values before anything is read
    get_format(wanted.bnb_4bit_quant_type)

    folder = _local_folder(model, revision, token)
    check_weight_files(folder)
    with _config_named(folder):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    found = _found_config(config, folder)
    if found is not None:
        config.quantization_config = found.to_dict()
    _conversion_errors.clear()
    try:
        with _read_not_mapped(), _config_named(folder):
            loaded, info = model_class.from_pretrained(
                folder,
                config=config,
                dtype=dense_dtype,
                quantization_config=None if found is not None else wanted,
                device_map=device_map,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                **{"ignore_mismatched_sizes": True, **kwargs},  # it is an error below, with names
            )
    except RuntimeError as error:
        if _conversion_errors:
            raise CheckpointError("\n".join(_conversion_errors)) from error
        raise
    finally:
        _conversion_errors.clear()
    if info["mismatched_keys"] and not kwargs.get("ignore_mismatched_sizes"):
        name, found_shape, shape = min(info["mismatched_keys"])
        raise CheckpointError(
            f"{folder} holds {name} of shape {tuple(found_shape)}, the model of its config.json "
            f"takes {tuple(shape)} ({len(info['mismatched_keys'])} such tensors)"
        )
    if model_class is AutoModelForCausalLM and info["missing_keys"]:
        raise CheckpointError(f"{folder} has no weights for {_first(sorted(info['missing_keys']))}")
    if found is not None:
        surplus = [n for n in sorted(info["unexpected_keys"]) if _has_its_place(loaded, n)]
        if surplus:
            raise CheckpointError(
                f"{folder} has weights that its config.json knows nothing of: {_first(surplus)}"
            )
        _check_asked(loaded, quant_type, blocksize, double_quant, folder)
        if compute_dtype is not None:
            for module in loaded.modules():
                if isinstance(module, Linear4bit):
                    module.compute_dtype = compute_dtype
    return loaded


@contextmanager
def _config_named(folder: Path) -> Iterator[None]:
    """What transformers stumbles over in a config.json that lies, with the file named."""
    try:
        yield
    except (
        ArithmeticError, AssertionError, AttributeError, LookupError, TypeError,
        StrictDataclassError,
    ) as error:  # fmt: skip
        frames = [frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__)]
        if any(name.startswith("qlora_kernels") for name in frames[2:]):  # not this and its caller
            raise
        raise CheckpointError(
            f"transformers builds no model of {folder / 'config.json'} and what was asked for: "
            f"{type(error).__name__}: {error}"
        ) from error


def _has_its_place(model: nn.Module, name: str) -> bool:
    """Whether the tensor ``name``, which the model lacks, belongs in the midst of its modules: to a
    4-bit layer, or to one more in a list of layers. (What hangs off elsewhere, such as a vision
    tower, is another model's part.)"""
    path = name.split(".")
    while path:
        path.pop()
        try:
            module = model.get_submodule(".".join(path))
        except AttributeError:
            continue
        return isinstance(module, (Linear4bit, nn.ModuleList))
    return False


def _found_config(config: Any, folder: Path) -> QLoRAKernelsConfig | None:
    """The quantization that a checkpoint's config tells of, as ours; None for a dense one."""
    told = getattr(config, "quantization_config", None)
    if told is None:
        return None
    told = told if isinstance(told, dict) else told.to_dict()
    method = told.get("quant_method")
    if method == METHOD or METHOD in told:
        try:
            return QLoRAKernelsConfig.from_dict(told)
        except TypeError as error:
            raise CheckpointError(
                f"quantization_config of {folder / 'config.json'}: {error}"
            ) from None
    if method == "bitsandbytes" or told.get("load_in_4bit") or told.get("load_in_8bit"):
        return QLoRAKernelsConfig.from_bitsandbytes(told)
    raise ValueError(
        f"{folder} is quantized by {method!r} already: give the model that it was made from"
    )


def _check_asked(
    model: nn.Module,
    quant_type: str | Format | None,
    blocksize: int | None,
    double_quant: bool | None,
    folder: Path,
) -> None:
    layer = next(m for m in model.modules() if isinstance(m, Linear4bit))
    name = get_format(quant_type).name if quant_type is not None else None
    for argument, want, got in (
        ("quant_type", name, layer.quant_type),
        ("blocksize", blocksize, layer.blocksize),
        ("double_quant", double_quant, layer.compress_statistics),
    ):
        if want is not None and want != got:
            raise ValueError(
                f"{argument}={want!r} was asked for, but {folder} is quantized already with {got!r}"
            )
