"""Safetensors files read and written one tensor at a time: what is not asked for is not in memory.

``safetensors`` itself maps files (a mapped page counts as resident until the file is closed) and
writes from a dict that holds everything.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .nn import CheckpointError

__all__ = ["DTYPES", "TensorReader", "TensorWriter", "weight_files"]

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


# --- reading: one tensor at a time ----------------------------------------------------------------


class TensorReader:
    """The tensors of safetensors files by name, read when they are asked for, not mapped."""

    def __init__(self, files: list[Path]) -> None:
        from .integrations.checkpoint_files import check_safetensors

        self.header: dict[str, dict[str, Any]] = {}
        self._file: dict[str, Path] = {}
        for file in files:
            header = check_safetensors(file)
            self.header.update(header)
            self._file.update(dict.fromkeys(header, file))

    def __contains__(self, name: str) -> bool:
        return name in self.header

    def shape(self, name: str) -> list[int]:
        return list(self.header[name]["shape"])

    def dtype(self, name: str) -> torch.dtype:
        told = self.header[name]["dtype"]
        if told not in DTYPES:
            raise CheckpointError(f"{self._file[name]}: {name} is {told}, not one of {[*DTYPES]}")
        return DTYPES[told]

    def __getitem__(self, name: str) -> Tensor:
        start, end = self.header[name]["data_offsets"]
        with self._file[name].open("rb") as file:
            begin = 8 + int.from_bytes(file.read(8), "little")
            data = torch.empty(end - start, dtype=torch.uint8)
            file.seek(begin + start)
            if file.readinto(data.numpy().data) != end - start:
                raise CheckpointError(f"{self._file[name]} ends within {name}")
        return data.view(self.dtype(name)).reshape(self.shape(name))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a transformers folder: one, or its shards."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    return [folder / f for f in sorted(set(json.loads(index.read_text())["weight_map"].values()))]


# --- writing: one tensor at a time ----------------------------------------------------------------


class TensorWriter:
    """One safetensors file whose tensors come in any order and are not kept.

    Every offset follows from names, dtypes and shapes, but for the JSON of 4-bit weights, of which
    the length is known only then: those are put last. The header stands in front; room is left for
    it, and what it does not need is filled with spaces, as the format allows.
    """

    _JSON_ROOM = 64  # digits of its offsets and of its length

    def __init__(self, path: Path, entries: Mapping[str, tuple[torch.dtype, list[int]]]) -> None:
        self._header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._end = 0
        jsons = {name for name in entries if ".quant_state." in name}
        # Wide dtypes first keeps each of them aligned, without holes, which are not allowed.
        for name in sorted(entries.keys() - jsons, key=lambda n: (-entries[n][0].itemsize, n)):
            dtype, shape = entries[name]
            self._add(name, dtype, shape)
        self._missing = set(entries)
        guess = {name: {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for name in jsons}
        room = len(json.dumps({**self._header, **guess})) + self._JSON_ROOM * len(jsons)
        self._room = -(-room // 8) * 8
        self._file = path.open("wb")

    def _add(self, name: str, dtype: torch.dtype, shape: list[int]) -> None:
        begin, self._end = self._end, self._end + math.prod(shape) * dtype.itemsize
        self._header[name] = {
            "dtype": _NAMES[dtype], "shape": shape, "data_offsets": [begin, self._end]
        }  # fmt: skip

    def put(self, name: str, tensor: Tensor) -> None:
        if name not in self._header:
            self._add(name, tensor.dtype, list(tensor.shape))
        told = self._header[name]
        assert _NAMES[tensor.dtype] == told["dtype"] and list(tensor.shape) == told["shape"], name
        self._missing.remove(name)
        self._file.seek(8 + self._room + told["data_offsets"][0])
        data = tensor.contiguous().reshape(-1)
        self._file.write(data.view(torch.uint8).numpy().data)

    def close(self) -> None:
        assert not self._missing, self._missing
        text = json.dumps(self._header).encode()
        assert len(text) <= self._room
        self._file.seek(0)
        self._file.write(self._room.to_bytes(8, "little") + text.ljust(self._room))
        self._file.close()

    def abandon(self) -> None:
        self._file.close()
