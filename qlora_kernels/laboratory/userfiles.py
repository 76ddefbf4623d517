"""Formats from a user's file: a codebook and a scale kind, or a function that learns a codebook.

JSON and YAML hold one format or a list of them::

    {"schema": 1, "formats": [{"name": "mine", "codebook": [16 numbers], "scale": "fp32"}]}

with, optionally, ``thresholds``, ``blocksizes``, ``about``. A Python file defines ``FORMAT`` (a
:class:`~qlora_kernels.formats.Format`), ``FORMATS`` (a list of them), or ``learn(weights,
blocksize, energy)``, which is called for each weight and gives 16 values or a Format; the format is
then called as the file is, unless ``NAME`` says otherwise. The file is run: give only what you
would run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..finetune.errors import BadInput, bad_input
from ..formats import BLOCKSIZES, SCALES, Format, register_format
from .contenders import Design

__all__ = ["SCHEMA", "SUFFIXES", "read_designs"]

SCHEMA = 1
SUFFIXES = (".py", ".json", ".yaml", ".yml")
_KEYS = ("name", "codebook", "scale", "thresholds", "blocksizes", "about")


def read_designs(path: str | Path) -> list[Design]:
    """The designs in a file.

    Raises:
        BadInput: no such file, another kind of file, a schema that is not 1, unknown keys; NaN, a
            wrong number of values, all values alike (which value, what was expected).
    """
    path = Path(path).expanduser()
    if path.suffix not in SUFFIXES:
        raise BadInput(f"{path}: a format's file ends in {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise BadInput(f"there is no file {path}")
    found = _from_python(path) if path.suffix == ".py" else _from_data(path)
    if not found:
        raise BadInput(f"{path} holds no format")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return [dataclasses.replace(design, digest=digest) for design in found]


def _from_data(path: Path) -> list[Design]:
    import yaml

    try:
        text = path.read_text("utf-8")
        data = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        kind = "JSON" if path.suffix == ".json" else "YAML"
        raise BadInput(f"{path} is not {kind}: {error}") from error
    if isinstance(data, Mapping) and data.get("schema", SCHEMA) != SCHEMA:
        raise BadInput(
            f"{path} is of schema {data['schema']!r}; this version reads schema {SCHEMA}"
        )
    entries = data.get("formats", [data]) if isinstance(data, Mapping) else data
    if not isinstance(entries, list) or not all(isinstance(e, Mapping) for e in entries):
        raise BadInput(f"{path} must hold a format or a list of formats")
    return [_one(path, entry) for entry in entries]


def _one(path: Path, entry: Mapping[str, Any]) -> Design:
    entry = {key: value for key, value in entry.items() if key != "schema"}
    unknown = [key for key in entry if key not in _KEYS]
    if unknown:
        raise BadInput(f"{path}: unknown {', '.join(unknown)}; a format has {', '.join(_KEYS)}")
    if "codebook" not in entry:
        raise BadInput(f"{path}: codebook is missing (16 numbers, the largest magnitude 1)")
    name, scale = str(entry.get("name", path.stem)), entry.get("scale", "fp32")
    if scale not in SCALES:
        raise BadInput(f"{path}: scale is {scale!r}; it may be {', '.join(SCALES)}")
    with bad_input(str(path)):
        try:
            fmt = Format(name, entry["codebook"], entry.get("thresholds"), scale=scale)
        except TypeError as error:
            raise ValueError(f"the values of {name!r} must be numbers: {error}") from error
    sizes = entry.get("blocksizes")
    if sizes is not None and (
        not isinstance(sizes, list) or not sizes or any(size not in BLOCKSIZES for size in sizes)
    ):
        raise BadInput(
            f"{path}: blocksizes must be a list out of {', '.join(map(str, BLOCKSIZES))}"
        )
    return _design(path, fmt, None if sizes is None else tuple(sizes), entry.get("about", ""))


def _design(
    path: Path, fmt: Format, sizes: tuple[int, ...] | None = None, about: str = ""
) -> Design:
    with bad_input(str(path)):
        fmt = register_format(fmt)
    about = about or fmt.description or f"from {path.name}"
    return Design(fmt.name, about, lambda blocksize: fmt, scale=fmt.scale, blocksizes=sizes)


def _from_python(path: Path) -> list[Design]:
    try:
        names = runpy.run_path(str(path))
    except Exception as error:
        raise BadInput(f"{path}: {type(error).__name__}: {error}") from error
    formats = [*names.get("FORMATS", []), *([names["FORMAT"]] if "FORMAT" in names else [])]
    if not all(isinstance(fmt, Format) for fmt in formats):
        raise BadInput(f"{path}: FORMAT and FORMATS hold qlora_kernels.formats.Format objects")
    found = [_design(path, fmt) for fmt in formats]
    learn = names.get("learn")
    if learn is not None:
        if not callable(learn):
            raise BadInput(f"{path}: learn must be a function (weights, blocksize, energy)")
        scale = names.get("SCALE", "fp32")
        if scale not in SCALES:
            raise BadInput(f"{path}: SCALE is {scale!r}; it may be {', '.join(SCALES)}")
        name = str(names.get("NAME", path.stem))
        found.append(Design(name, f"learned, {path.name}", learn=learn, scale=scale))
    if not found:
        raise BadInput(
            f"{path} defines neither FORMAT, FORMATS nor learn(weights, blocksize, energy)"
        )
    return found
