"""One run of ``qlora formats``, cell by cell: sources, contenders, finetunes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import __version__
from ..finetune.errors import BadInput, bad_input
from . import language, outputs
from .cells import Cells
from .contenders import Contender, find_design, grid
from .models import in_format, linear_layers, load_dense, pack, save_model
from .plots import normalized_histogram
from .recover import Method, Recipe, finetune_methods, run_cell
from .report import finetune_rows, finetune_verdicts, source_rows, verdicts
from .text import Windows, read_windows
from .weights import SYNTHETIC, errors_of, measure, q4_1_sqnr, synthetic
from .where import FULL, best_rates, where_methods

__all__ = ["ModelStudy", "study_synthetic"]

Say = Callable[[str], None]


def _contender_key(contender: Contender) -> dict[str, Any]:
    return {"contender": contender.name, "file": contender.design.digest, "version": __version__}


def _described(contender: Contender, cell: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": contender.name,
        "design": contender.design.name,
        "bits": contender.bits,
        "blocksize": contender.blocksize,
        "nested": contender.nested,
        **cell,
    }


def _source(
    name: str,
    about: str,
    contenders: Sequence[Contender],
    cells: Sequence[Mapping[str, Any]],
    weight: torch.Tensor,
    base: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    described = [_described(c, cell) for c, cell in zip(contenders, cells, strict=True)]
    rows = source_rows(described, None if base is None else base["losses"])
    codebooks = {}
    for contender in contenders:  # one line a design in the plot
        fmt = contender.format_for(weight)
        codebooks.setdefault(contender.design.name, sorted(set(fmt.tables[0].tolist())))
    source = {
        "name": name,
        "about": about,
        "rows": rows,
        "verdicts": verdicts(rows),
        "histogram": normalized_histogram(weight),
        "codebooks": codebooks,
    }
    if base is not None:
        source["base"] = {
            "perplexity": language.perplexity(base["losses"]),
            "losses": base["losses"],
        }
    return source


def study_synthetic(
    kind: str, contenders: Sequence[Contender], cells: Cells, layers: int, say: Say
) -> dict[str, Any]:
    """Every contender on drawn weights of a kind."""
    weights = synthetic(kind, layers)
    shape = tuple(next(iter(weights.values())).shape)
    found = []
    for contender in contenders:
        key = {"stage": "weights", "source": kind, "layers": layers, **_contender_key(contender)}
        found.append(
            cells.get(
                key,
                lambda c=contender: {"weights": [asdict(e) for e in measure(c, weights.items())]},
            )
        )
    say(f"{kind} weights: {len(contenders)} contenders")
    about = f"{layers} drawn weights of {shape[0]}×{shape[1]}, fp32, {_KINDS[kind]}."
    return _source(f"{kind} weights", about, contenders, found, next(iter(weights.values())))


_KINDS = {
    "normal": "normal",
    "student-t": "Student's t with 5 degrees of freedom",
    "outliers": "normal, one value in a thousand ten times as large",
}
assert set(_KINDS) == set(SYNTHETIC)


class ModelStudy:
    """Contenders on a model: its weights, its layers' outputs, its language, its finetunes.

    Args:
        folder: of the model, 16-bit weights.
        name: in tables.
        text: what :func:`~.text.read_windows` reads.
        length, test, validation: of the windows.
        tokens: inputs of each layer on which outputs are compared.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        cells: Cells,
        say: Say,
        *,
        text: str = "python-docs",
        length: int = 128,
        test: int = 16,
        validation: int = 8,
        tokens: int = 256,
    ) -> None:
        from ..finetune.model import load_tokenizer
        from ..finetune.trainer import _fingerprint_model

        self.folder, self.name, self.cells, self.say = folder, name, cells, say
        self.tokenizer = load_tokenizer(folder)
        self.windows: Windows = read_windows(text, self.tokenizer, length, test, validation)
        self.tokens = tokens
        with bad_input("model"):
            fingerprint = _fingerprint_model(folder)[:16]
        self._key = {"model": fingerprint, "text": self.windows.digest}

    def load(self) -> Any:
        return load_dense(self.folder)

    # -- formats --

    def formats(self, contenders: Sequence[Contender]) -> dict[str, Any]:
        """A source for the report: every contender on weights, outputs and language."""
        model = self.load()
        layers = linear_layers(model)
        calibration = self.windows.train[: max(4, len(self.windows.test) // 2)]
        recorded: list[Any] = []  # made when the first cell needs it
        key = {"stage": "formats", "tokens": self.tokens, **self._key}
        base = self.cells.get(
            {**key, "contender": None, "version": __version__},
            lambda: {"losses": language.losses(model, self.windows.test)},
        )
        found = []
        try:
            for contender in contenders:

                def cell(contender: Contender = contender) -> dict[str, Any]:
                    if not recorded:
                        self.say("running the 16-bit model ...")
                        activations = outputs.record(model, layers, calibration, self.tokens)
                        reference = language.Reference(model, self.windows.test)
                        recorded.extend((activations, reference))
                    return self._measure(contender, model, layers, *recorded)

                found.append(self.cells.get({**key, **_contender_key(contender)}, cell))
                self.say(f"{self.name}: {contender.name}")
        finally:
            if recorded:
                recorded[1].close()
        grids = [q4_1_sqnr(layer.weight) for layer in layers.values()]
        weight = max((layer.weight for layer in layers.values()), key=torch.Tensor.numel)
        source = _source(self.name, self._about(model, grids), contenders, found, weight, base)
        source["q4_1_sqnr"] = float(np.median(grids))
        return source

    def _measure(
        self, contender: Contender, model: Any, layers: Any, activations: Any, reference: Any
    ) -> dict[str, Any]:
        packed = pack(contender, layers, activations.energies)
        weights = [
            errors_of(name, layer.weight.detach(), packed[name].dequantize_weight(torch.float32))
            for name, layer in layers.items()
        ]
        products = outputs.output_errors(packed, layers, activations)
        with in_format(model, packed):
            losses, divergence = reference.compare(model)
        return {
            "weights": [asdict(e) for e in weights],
            "outputs": [asdict(e) for e in products],
            "losses": losses,
            "divergence": divergence,
        }

    def _about(self, model: Any, grids: Sequence[float]) -> str:
        dtype = str(model.dtype).removeprefix("torch.")
        windows = self.windows
        said = (
            f"{len(grids)} linear layers, computed in {dtype}; {len(windows.test)} windows of "
            f"{windows.length} tokens of {windows.source} for the language, "
            f"{self.tokens} tokens for the outputs. "
        )
        middle = float(np.median(grids))
        if middle > _FROM_Q4_1:
            return said + (
                "These weights lie on a Q4_1 grid, blocks of 32 of 16 even levels (to "
                f"{middle:.0f} dB): they were 4-bit before, so the order of formats here is "
                "reported and proves nothing about weights that were not."
            )
        return said + f"The weights are off the Q4_1 grid ({middle:.1f} dB; normal ones: 22)."

    # -- finetunes --

    def _before(self, base: Contender | None, model: Any = None) -> list[float]:
        key = {"stage": "before", "base": None, "version": __version__, **self._key}
        if base is not None:
            key |= {"base": base.name, "file": base.design.digest}

        def cell() -> dict[str, Any]:
            dense = self.load()
            if base is not None:
                packed = pack(base, linear_layers(dense))
                with in_format(dense, packed):
                    return {"losses": language.losses(dense, self.windows.test)}
            return {"losses": language.losses(dense, self.windows.test)}

        return self.cells.get(key, cell)["losses"]

    def _run(
        self, method: Method, recipe: Recipe, seed: int, keep: Any = None, validate: bool = False
    ) -> dict[str, Any]:
        base = method.base
        key = {
            "stage": "finetune",
            "seed": seed,
            "validate": validate,
            "version": __version__,
            "file": "" if base is None else base.design.digest,
            **method.key(),
            **asdict(recipe),
            **self._key,
        }
        result = self.cells.get(
            key,
            lambda: run_cell(
                self.load, method, recipe, self.windows, seed, keep=keep, validate=validate
            ),
        )
        mean = np.mean(result["after"])
        self.say(f"{self.name}: {method.name}, seed {seed}: loss {mean:.4f}")
        return {**result, "learning_rate": method.learning_rate}

    def _table(
        self,
        methods: Sequence[Method],
        recipe: Recipe,
        seeds: int,
        reference: str,
        keep: Any = None,
    ) -> list[dict[str, Any]]:
        runs: dict[str, list[dict[str, Any]]] = {m.name: [] for m in methods}
        # A seed at a time: what there is of an unfinished run is balanced.
        for seed in range(seeds):
            for method in methods:
                keeps = keep if seed == 0 else None
                runs[method.name].append(self._run(method, recipe, seed, keeps))
        before = {method.name: self._before(method.base) for method in methods}
        return finetune_rows(runs, before, reference)

    def finetune(
        self, contenders: Sequence[Contender], recipe: Recipe, seeds: int, rank: int, rate: float
    ) -> dict[str, Any]:
        """LoRA on all linear layers of the 16-bit model and of each contender."""
        methods = finetune_methods(contenders, rank, rate)
        rows = self._table(methods, recipe, seeds, "16-bit")
        return {
            "about": f"{self._recipe(recipe, seeds)} LoRA of rank {rank} on all linear layers.",
            "reference": "16-bit",
            "rows": rows,
            "verdicts": finetune_verdicts(rows),
        }

    def where(
        self,
        base: Contender | None,
        recipe: Recipe,
        seeds: int,
        rank: int,
        ranks: Sequence[int],
        rates: Sequence[float],
        full_rates: Sequence[float],
        keep_in: Path,
    ) -> dict[str, Any]:
        """Full finetuning and LoRA in several places; the fully finetuned model is kept."""

        def keep(model: Any) -> None:
            save_model(model.to(torch.bfloat16), self.tokenizer, keep_in)

        methods = where_methods(base, ranks, rank)
        methods = best_rates(
            methods, rates, full_rates, lambda m, seed: self._run(m, recipe, seed, validate=True)
        )
        rows = self._table(methods, recipe, seeds, FULL, keep)
        if not keep_in.is_dir():  # its cell is there from before, its model is not
            run_cell(self.load, methods[0], recipe, self.windows, 0, keep=keep)
        under = "16 bits" if base is None else base.name
        about = f"{self._recipe(recipe, seeds)} Adapters are on a base in {under}."
        if max(len(rates), len(full_rates)) > 1:
            about += " Learning rates: for each method the best of those tried, on other windows."
        return {"about": about, "reference": FULL, "rows": rows, "verdicts": {}}

    def _recipe(self, recipe: Recipe, seeds: int) -> str:
        return (
            f"{self.name}, {recipe.steps} steps of {recipe.batch} windows of {self.windows.length} "
            f"tokens of {self.windows.source}, {seeds} seeds. Losses are of "
            f"{len(self.windows.test)} held-out windows, in nats a token; intervals of 95% "
            "(Student's t over seeds); 'to be seen' is the smallest true difference found with a "
            "power of 80%."
        )


_FROM_Q4_1 = 40.0  # dB: what 16-bit rounding leaves of weights that lie on the grid


def finetune_contenders(names: Sequence[str], known: Mapping[str, Any]) -> list[Contender]:
    """``nf4``, ``nf4-dq``, ``nf4-128-dq``: a design, and how.

    Raises:
        BadInput: no such design, block size or way.
    """
    found = []
    for name in names:
        parts = name.split("-")
        nested = parts[-1] == "dq"
        parts = parts[:-1] if nested else parts
        size = parts.pop() if len(parts) > 1 and parts[-1].isdigit() else None
        design = find_design("-".join(parts), dict(known))
        sizes = [int(size)] if size else list(design.blocksizes or (64,))
        made = grid([design], sizes, "yes" if nested else "no")
        if nested and not made[0].nested:
            raise BadInput(f"{name}: the scales of {design.name} are not double-quantized")
        found += made
    return found
