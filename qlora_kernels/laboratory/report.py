"""The results of ``qlora formats``: as JSON with a schema, as tables in Markdown, with verdicts."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..finetune.checkpoint import replace_file, write_json
from ..finetune.errors import BadInput
from ..statistics import detectable_difference, mean_interval, paired_difference
from . import language
from .weights import WeightError, summarize

__all__ = [
    "SCHEMA",
    "finetune_rows",
    "finetune_verdicts",
    "markdown",
    "read_results",
    "source_rows",
    "verdicts",
    "write",
]

SCHEMA = 1
REFERENCE = "nf4"


def read_results(path: str | Path) -> dict[str, Any]:
    """Results that :func:`write` wrote.

    Raises:
        BadInput: no such file, no JSON, not of this command, of another schema.
    """
    path = Path(path).expanduser()
    try:
        results = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise BadInput(f"{path} is not JSON: {error}") from error
    if not isinstance(results, dict) or results.get("kind") != "qlora formats":
        raise BadInput(f"{path} does not hold results of `qlora formats`")
    if results.get("schema") != SCHEMA:
        raise BadInput(
            f"{path} is of schema {results.get('schema')!r}; this version reads schema {SCHEMA}: "
            "read it with the version that wrote it, or run the command again"
        )
    return results


# --- from measurements to rows -------------------------------------------------------------------


def _errors(cells: Sequence[Mapping[str, Any]]) -> list[WeightError]:
    return [WeightError(**cell) for cell in cells]


def source_rows(
    contenders: Sequence[Mapping[str, Any]], base_losses: Sequence[float] | None = None
) -> list[dict[str, Any]]:
    """One row a contender: what it loses of weights, outputs and language.

    Args:
        contenders: ``name``, ``design``, ``bits``, ``blocksize``, ``nested`` and what was measured:
            ``weights`` and, of models, ``outputs``, ``losses``, ``divergence``.
        base_losses: the 16-bit model's loss of each window.

    What rows are compared with is NF4 without double quantization, at the smallest block size of
    at least 64 that there is; the first contender where NF4 is not among them.
    """
    reference = _reference(contenders)
    against = _errors(reference["weights"])
    rows = []
    for found in contenders:
        errors = _errors(found["weights"])
        row: dict[str, Any] = {
            k: found[k] for k in ("name", "design", "bits", "blocksize", "nested")
        }
        row["weights"] = summarize(errors, against)
        row["layers"] = {e.layer: e.sqnr for e in errors}
        if "outputs" in found:
            row["outputs"] = summarize(_errors(found["outputs"]), _errors(reference["outputs"]))
        if "losses" in found and base_losses is not None:
            row["perplexity"] = language.perplexity(found["losses"])
            row["loss"] = language.versus(found["losses"], base_losses)
            row["divergence"] = language.mean_of(found["divergence"])
            row["divergence_versus"] = language.versus(found["divergence"], reference["divergence"])
        rows.append(row)
    return rows


def _reference(contenders: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    plain = [c for c in contenders if c["design"] == REFERENCE and not c["nested"]]
    plain.sort(key=lambda c: (c["blocksize"] < 64, c["blocksize"]))
    return (plain or list(contenders))[0]


def finetune_rows(
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    before: Mapping[str, Sequence[float]],
    reference: str,
) -> list[dict[str, Any]]:
    """One row a method: held-out loss before and after, of seeds, and against ``reference``.

    The unit of the intervals is the seed: the mean loss of all held-out windows of a run. A second
    one, of windows, is of each window's mean over the seeds; it says how much the choice of text
    matters, given these seeds.
    """
    theirs = np.array([r["after"] for r in runs[reference]])
    rows = []
    for name, results in runs.items():
        after = np.array([r["after"] for r in results])
        seeds = after.mean(1)
        low, high = mean_interval(seeds)
        differences = seeds - theirs.mean(1)
        by_window = paired_difference(after.mean(0), theirs.mean(0))
        rows.append(
            {
                "name": name,
                "trained": results[0]["trained"],
                "learning_rate": results[0]["learning_rate"],
                "before": float(np.mean(before[name])),
                "after": {"value": float(seeds.mean()), "low": low, "high": high},
                "versus": dict(
                    zip(("mean", "low", "high"), _paired(seeds, theirs.mean(1)), strict=True)
                )
                | {"detectable": detectable_difference(differences)},
                "versus_windows": by_window._asdict(),
                "seeds": seeds.tolist(),
                "history": [r["history"] for r in results],
            }
        )
    return rows


def _paired(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    found = paired_difference(a, b)
    return found.mean, found.low, found.high


def verdicts(rows: Sequence[Mapping[str, Any]]) -> dict[str, bool]:
    """What the paper says, and what the controls must do, asked of a source's rows (of weights)."""
    by_name = {row["name"]: row for row in rows}
    said: dict[str, bool] = {}

    def mse(name: str) -> float:
        return by_name[name]["weights"]["mse"]

    for size in sorted({row["blocksize"] for row in rows}):
        chain = [f"{design}-{size}" for design in ("int4", "fp4_e2m1", "nf4")]
        if all(name in by_name for name in chain):
            said[f"error of {' > '.join(chain)}"] = mse(chain[0]) > mse(chain[1]) > mse(chain[2])
        nf4, nested = f"nf4-{size}", f"nf4-{size}-dq"
        if nf4 in by_name and nested in by_name:
            lost = by_name[nf4]["weights"]["sqnr"] - by_name[nested]["weights"]["sqnr"]
            said[f"double quantization costs {nf4} less than 0.1 dB"] = abs(lost) < 0.1
        control, repeat = f"two_bits-{size}", f"repeat-{size}"
        if control in by_name:
            others = [mse(r["name"]) for r in rows if r["design"] != "two_bits"]
            said[f"control {control} loses"] = mse(control) > max(others)
        if repeat in by_name and nf4 in by_name:
            same = mse(repeat) == mse(nf4)
            if "perplexity" in by_name[nf4]:
                same &= by_name[repeat]["perplexity"] == by_name[nf4]["perplexity"]
            said[f"control {repeat} ties with {nf4} in every digit"] = same
    return said


def finetune_verdicts(rows: Sequence[Mapping[str, Any]]) -> dict[str, bool]:
    """What the controls must do after a finetune, and what the paper says of NF4."""
    by_name = {row["name"]: row for row in rows}
    said: dict[str, bool] = {}
    control = next((row for name, row in by_name.items() if name.startswith("two_bits-")), None)
    if control is not None:
        others = [row["after"]["value"] for row in rows if row is not control]
        said[f"control {control['name']} loses"] = control["after"]["value"] > max(others)
    for name, row in by_name.items():
        like = by_name.get(name.replace("repeat-", "nf4-"))
        if name.startswith("repeat-") and like is not None:
            tie = row["seeds"] == like["seeds"] and row["history"] == like["history"]
            said[f"control {name} ties with {like['name']} in every digit"] = tie
        if name.startswith("nf4-"):
            found = row["versus"]
            said[f"{name} within the noise of 16-bit"] = found["low"] <= 0 <= found["high"]
    return said


# --- Markdown ------------------------------------------------------------------------------------


def _number(value: float, digits: int = 2) -> str:
    if value is None or math.isnan(value):
        return "–"
    return f"{value:.{digits}f}" if math.isfinite(value) else "∞"


def _span(found: Mapping[str, float], digits: int, key: str = "value", sign: str = "") -> str:
    value, low, high = found[key], found["low"], found["high"]
    if math.isnan(low):
        return f"{value:{sign}.{digits}f}"
    return f"{value:{sign}.{digits}f} [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    line = "| " + " | ".join(head) + " |\n|" + "|".join(["---"] + ["--:"] * (len(head) - 1)) + "|\n"
    return line + "".join("| " + " | ".join(row) + " |\n" for row in rows)


def markdown(results: Mapping[str, Any]) -> str:
    """The tables, with the command that gave them."""
    parts = [f"`{results['command']}`\n"]
    for source in results["sources"]:
        parts += [f"### {source['name']}\n", source["about"] + "\n", _source_table(source["rows"])]
        if source.get("base"):
            base = source["base"]
            parts.append(f"The 16-bit model's perplexity: {_span(base['perplexity'], 3)}.\n")
        parts.append(_detectable(source["rows"]))
        parts.append(_list(source["verdicts"]))
    for key, title in (("finetune", "After a finetune"), ("where", "LoRA where?")):
        if key in results:
            part = results[key]
            parts += [f"### {title}\n", part["about"] + "\n", _finetune_table(part)]
            parts.append(_list(part["verdicts"]))
    return "\n".join(parts)


def _list(verdicts: Mapping[str, bool]) -> str:
    return "".join(f"- {what}: {'yes' if so else '**no**'}\n" for what, so in verdicts.items())


def _source_table(rows: Sequence[Mapping[str, Any]]) -> str:
    head = ["format", "bits", "SQNR dB", "MSE", "MAE", "largest", "SQNR against NF4's, dB"]
    outputs, language_ = "outputs" in rows[0], "perplexity" in rows[0]
    if outputs:
        head.append("outputs' SQNR dB")
    if language_:
        head += ["perplexity", "loss above 16-bit, nats", "KL from 16-bit, nats"]
    lines = []
    for row in rows:
        w = row["weights"]
        line = [
            row["name"], _number(row["bits"], 3), _number(w["sqnr"]), f"{w['mse']:.3g}",
            f"{w['mae']:.3g}", f"{w['largest']:.3g}",
            _span(w["versus"], 3, "mean", "+") if "versus" in w else "–",
        ]  # fmt: skip
        if outputs:
            line.append(_number(row["outputs"]["sqnr"]))
        if language_:
            line += [
                _span(row["perplexity"], 2),
                _span(row["loss"], 4, "mean", "+"),
                _span(row["divergence"], 4),
            ]
        lines.append(line)
    return _table(head, lines)


def _detectable(rows: Sequence[Mapping[str, Any]]) -> str:
    def worst(key: str) -> float:
        found = [row[key]["versus"]["detectable"] for row in rows if "versus" in row.get(key, {})]
        return max(found, default=math.nan)

    said = [f"SQNR by {_number(worst('weights'), 3)} dB"]
    if "perplexity" in rows[0]:
        seen = max(row["loss"]["detectable"] for row in rows if row["design"] != "two_bits")
        said.append(f"the loss by {_number(seen, 4)} nats (the 2-bit control aside)")
    return (
        "Intervals are of 95%. What is seen with a power of 80% for every format: a change of "
        f"{' or of '.join(said)}.\n"
    )


def _finetune_table(part: Mapping[str, Any]) -> str:
    head = [
        "method", "trained", "learning rate", "loss before", "loss after",
        f"against {part['reference']}",
        "to be seen", "... by windows",
    ]  # fmt: skip
    lines = [
        [
            row["name"], f"{row['trained']:,}", f"{row['learning_rate']:g}", _number(row["before"],
            4), _span(row["after"], 4), _span(row["versus"], 4, "mean", "+"),
            _number(row["versus"]["detectable"], 4), _span(row["versus_windows"], 4, "mean", "+"),
        ]
        for row in part["rows"]
    ]  # fmt: skip
    return _table(head, lines)


def write(results: Mapping[str, Any], folder: Path) -> None:
    """``results.json`` and ``table.md``, each whole or as it was."""
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / "results.json", lambda p: write_json(p, results))
    replace_file(folder / "table.md", lambda p: p.write_text(markdown(results), "utf-8"))
