"""``replace_linear_layers``: a model's linear layers, and a mixture's experts, to 4 bits, in place,
and a report."""

from __future__ import annotations

import difflib
import fnmatch
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..formats import Format, check_blocksize, get_format
from .checkpoint import COMPUTE_DTYPES
from .experts import Experts4bit, expert_parameters
from .linear import Linear4bit
from .lora import LoraLinear4bit, LoraSpec

__all__ = ["DEFAULT_SKIP", "ReplacementReport", "replace_linear_layers"]

DEFAULT_SKIP: tuple[str, ...] = ("lm_head", "embed_out", "score", "classifier")
"""Output layers by their usual names; the one that a model itself names is skipped as well."""


@dataclass
class ReplacementReport:
    """What :func:`replace_linear_layers` did; ``print`` it."""

    quant_type: str
    blocksize: int
    compress_statistics: bool
    replaced: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Name to ``(out_features, in_features)``, in the model's order; a layer that appears under
    two names, or two layers of one weight, are listed under both."""
    experts: dict[str, dict[str, tuple[int, int, int]]] = field(default_factory=dict)
    """Name of a stack of experts to its weights, ``(experts, out_features, in_features)`` each."""
    adapters: list[str] = field(default_factory=list)
    """Names of the layers that got LoRA."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Name to reason, for every linear layer that stays as it was."""
    unmatched: list[str] = field(default_factory=list)
    """Patterns given as ``skip`` that matched nothing."""
    weights: int = 0
    """Weights that are 4-bit now."""
    bytes_before: int = 0
    """Bytes of those weights before."""
    bytes_after: int = 0
    """... and after, scales included (the two tables of 16 and 256 values, which layers share, are
    not)."""
    bytes_kept: int = 0
    """Bytes of all other parameters, adapters included."""

    @property
    def bits_per_weight(self) -> float:
        """Bits a replaced weight, measured: packed bytes and scales over weights."""
        return 8 * self.bytes_after / self.weights if self.weights else 0.0

    def __str__(self) -> str:
        nested = ", double quantization" if self.compress_statistics else ""
        lines = []
        if self.weights:
            stacks = f" and {len(self.experts)} layers of experts" if self.experts else ""
            lines.append(
                f"{len(self.replaced)} linear layers{stacks} to {self.quant_type}, blocks of "
                f"{self.blocksize}{nested}: {self.bytes_before / 1e6:.1f} MB to "
                f"{self.bytes_after / 1e6:.1f} MB ({self.bits_per_weight:.3f} bits a weight); "
                f"other parameters {self.bytes_kept / 1e6:.1f} MB"
            )
        if self.adapters:
            lines.append(f"LoRA on {len(self.adapters)} layers")
        reasons: dict[str, list[str]] = {}
        for name, reason in self.skipped.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"kept as it is: {', '.join(names[:3])}{more} ({reason})")
        return "\n".join(lines)


def replace_linear_layers(
    model: nn.Module,
    *,
    include: str | Iterable[str] | None = None,
    skip: str | Iterable[str] | None = None,
    quant_type: str | Format = "nf4",
    blocksize: int = 64,
    compress_statistics: bool = True,
    compute_dtype: torch.dtype | None = None,
    lora: LoraSpec | None = None,
    verbose: bool = True,
) -> ReplacementReport:
    """Quantizes the linear layers of ``model`` in place and says what it did.

    One layer at a time, each dense weight freed before the next is read. Layers that appear twice
    are quantized once and stay one; two layers of one weight share the packed one. Layers that
    this package quantized already are kept, and get adapters with ``lora``. Stacks of experts as
    transformers has them become :class:`~qlora_kernels.nn.Experts4bit`; they get no adapters here
    (PEFT gives them, by ``target_parameters``).

    Args:
        include: which layers; all by default. A pattern matches whole components anywhere in the
            dotted name ("q_proj", "layers.0.mlp"), with ``*`` and ``?`` as in shells.
        skip: which not. By default the output layer: what ``get_output_embeddings()`` names, and
            :data:`DEFAULT_SKIP`. An empty list quantizes it too, unless its weight is tied to an
            embedding, which reads it as it is.
        lora: adapters for the new layers, as :class:`LoraLinear4bit`. Nothing else is frozen or
            thawed here: see :func:`mark_only_lora_as_trainable`.
        quant_type, blocksize, compress_statistics, compute_dtype: as in :class:`Linear4bit`.
        verbose: prints the report.

    Raises:
        TypeError: ``model`` is a linear layer itself.
        ValueError: no layer is left to replace, or an ``include`` or ``target_modules`` pattern
            matches none (the nearest names are told), or a block size is not offered.
    """
    fmt = get_format(quant_type)
    report = ReplacementReport(fmt.name, check_blocksize(blocksize), compress_statistics)
    if isinstance(model, nn.Linear):
        raise TypeError("the model is a linear layer itself: use Linear4bit.from_linear")
    modules = _linear_modules(model)
    stacks = [name for name, module in model.named_modules() if _is_dense_stack(module)]
    linears = [name for group in modules for name in group]
    every_name = linears + stacks
    wanted = _patterns(include)
    unwanted = _patterns(DEFAULT_SKIP if skip is None else skip)
    targets = _patterns(lora.target_modules) if lora else []
    _check_patterns("include", wanted, every_name)
    _check_patterns("target_modules", targets, linears)
    if skip is not None:
        report.unmatched = [p for p in unwanted if not _matched(every_name, p)]
        if report.unmatched:
            warnings.warn(
                f"skip patterns that match no linear layer: {', '.join(report.unmatched)}",
                stacklevel=2,
            )
    output = getattr(model, "get_output_embeddings", lambda: None)() if skip is None else None
    owners = _weight_owners(model)

    chosen: list[tuple[list[str], bool]] = []
    for names in modules:
        adapted = lora is not None and (not targets or any(_matched(names, t) for t in targets))
        module = model.get_submodule(names[0])
        reason = _reason_to_skip(names, module, wanted, unwanted, output, owners, adapted)
        if reason is None:
            chosen.append((names, adapted))
        else:
            report.skipped.update(dict.fromkeys(names, reason))
    report.skipped.update(
        {name: reason for name in stacks if (reason := _reason_by_name([name], wanted, unwanted))}
    )
    stacks = [name for name in stacks if name not in report.skipped]
    if not chosen and not stacks:
        told = "; ".join(f"{n}: {r}" for n, r in list(report.skipped.items())[:5])
        raise ValueError(
            f"no linear layer to quantize in {type(model).__name__}: {told or 'it has none'}"
        )

    kwargs: dict[str, Any] = {
        "compute_dtype": compute_dtype,
        "quant_type": fmt,
        "blocksize": blocksize,
        "compress_statistics": compress_statistics,
    }
    # Names, not modules: a reference kept here would keep a dense weight alive.
    first_of_weight = {
        names[0]: owners[id(model.get_submodule(names[0]).weight)][0][0] for names, _ in chosen
    }
    del module
    output = None
    for names, adapted in chosen:
        linear: Any = model.get_submodule(names[0])
        extra = lora.layer_kwargs() if lora is not None and adapted else {}
        cls = LoraLinear4bit if extra else Linear4bit
        owner = model.get_submodule(first_of_weight[names[0]])
        if isinstance(owner, Linear4bit):  # its weight is packed already, here or before
            new = cls.from_quantized(owner, **extra)
            new.bias = linear.bias
        else:
            new = cls.from_linear(linear, **kwargs, **extra)
            report.weights += linear.weight.numel()
            report.bytes_before += linear.weight.numel() * linear.weight.element_size()
            report.bytes_after += _packed_bytes(new)
        for name in names:
            model.set_submodule(name, new)
            report.replaced[name] = (new.out_features, new.in_features)
            if extra:
                report.adapters.append(name)
        del linear, owner, new
    for name in stacks:
        _replace_stack(model, name, kwargs, report)
    if stacks and hasattr(model, "save_pretrained"):
        # transformers would take the stacks apart to save them, as it put dense ones together.
        model._weight_conversions = []  # type: ignore[assignment]
    report.bytes_kept = sum(
        p.numel() * p.element_size() for p in model.parameters() if p.dtype != torch.uint8
    )
    if verbose:
        print(report)
    return report


def _is_dense_stack(module: nn.Module) -> bool:
    return not isinstance(module, Experts4bit) and bool(expert_parameters(module))


def _replace_stack(
    model: nn.Module, name: str, kwargs: dict[str, Any], report: ReplacementReport
) -> None:
    dense = model.get_submodule(name)
    new = Experts4bit.from_experts(dense, **kwargs)
    for key in new.shapes:
        weight = dense._parameters[key]
        assert weight is not None
        report.weights += weight.numel()
        report.bytes_before += weight.numel() * weight.element_size()
    report.bytes_after += new.packed_bytes()
    report.experts[name] = {key: tuple(shape) for key, shape in new.shapes.items()}  # type: ignore[misc]
    model.set_submodule(name, new)


def _linear_modules(model: nn.Module) -> list[list[str]]:
    """Every linear layer once, with all names that it has, in the model's order."""
    by_module: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear):
            by_module.setdefault(id(module), []).append(name)
    return list(by_module.values())


def _weight_owners(model: nn.Module) -> dict[int, list[tuple[str, bool]]]:
    """By a parameter's id: the modules that hold it, and whether each is a linear layer."""
    owners: dict[int, list[tuple[str, bool]]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                held = owners.setdefault(id(parameter), [])
                held.append((name, isinstance(module, nn.Linear)))
    return owners


def _reason_to_skip(
    names: list[str],
    module: Any,
    wanted: list[str],
    unwanted: list[str],
    output: nn.Module | None,
    owners: dict[int, list[tuple[str, bool]]],
    adapted: bool,
) -> str | None:
    reason = _reason_by_name(names, wanted, unwanted)
    if module is output and (reason is None or reason == _NOT_INCLUDED):
        return "the output layer"
    if reason is not None:
        return reason
    components = names[0].split(".")
    if any(c.startswith("lora_") or c == "modules_to_save" for c in components):
        return "belongs to an adapter"
    if isinstance(module, Linear4bit):
        return None if adapted and type(module) is Linear4bit else "4-bit already"
    if type(module) is not nn.Linear:
        return f"a {type(module).__name__}, not a plain nn.Linear"
    if module.weight.dtype not in COMPUTE_DTYPES:
        return f"its weight is {module.weight.dtype}"
    if module.weight.numel() == 0:
        return "its weight is empty"
    others = [owner for owner, linear in owners[id(module.weight)] if not linear]
    if others:
        return f"its weight is tied to {others[0]}"
    return None


_NOT_INCLUDED = "not in include"


def _reason_by_name(names: list[str], wanted: list[str], unwanted: list[str]) -> str | None:
    for pattern in unwanted:
        if _matched(names, pattern):
            return f"skip {pattern!r}"
    if wanted and not any(_matched(names, pattern) for pattern in wanted):
        return _NOT_INCLUDED
    return None


def _patterns(given: str | Iterable[str] | None) -> list[str]:
    return [given] if isinstance(given, str) else list(given or ())


def _matched(names: Iterable[str], pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(f".{name}.", f"*.{pattern}.*") for name in names)


def _check_patterns(argument: str, patterns: list[str], names: list[str]) -> None:
    for pattern in patterns:
        if not _matched(names, pattern):
            known = dict.fromkeys(part for name in names for part in (name.split(".")[-1], name))
            near = difflib.get_close_matches(pattern, known, n=3, cutoff=0.5)
            hint = f"; nearest: {', '.join(near)}" if near else ""
            raise ValueError(f"{argument} pattern {pattern!r} matches no linear layer{hint}")


def _packed_bytes(layer: Linear4bit) -> int:
    tensors = [layer.weight, layer.absmax, layer.nested_absmax, layer.nested_offset]
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
