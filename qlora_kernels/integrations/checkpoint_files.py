"""A checkpoint's files: whole, what their headers say, and the bytes that were saved.

A safetensors file is checked before any of its tensors is read: a header of JSON that fits, with
dtypes, shapes and offsets that agree and cover the data without a gap or an overlap. A pickle in
its place is refused and never opened as one.

What this package saves through transformers carries a **checksum of each tensor**: in the file's
``__metadata__``, under :data:`CHECKSUMS`, JSON of name to CRC-32 (8 hexadecimal digits) of the
tensor's dtype, shape and bytes. Whoever does not know the key passes over it. On load they are
verified before the model is built, at some 2 GB/s a core, files read in parallel. So a checkpoint
of ours either loads to the tensors that were saved, or not at all. Others' checkpoints have no
checksums: there a tensor is intact when it equals what the file's bytes say, and a changed byte of
packed weights or of scales is as good a weight as any other.
"""

from __future__ import annotations

import functools
import json
import os
import re
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..nn import CheckpointError

__all__ = [
    "CHECKSUMS",
    "check_safetensors",
    "checksums_of",
    "read_json_object",
    "verify_files",
    "with_checksums",
]

CHECKSUMS = "qlora_kernels_crc32"
"""The key of ``__metadata__`` that holds a file's checksums."""

_MAX_HEADER = 100_000_000  # safetensors' own limit
_CHUNK = 1 << 20
# Bits an element, by the format's names. The widths of those below a byte are the format's too.
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E5M2FNUZ", "F8_E4M3FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}
_NAMES = {  # of what torch has; the others are saved without a checksum
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8",
    torch.uint16: "U16", torch.int16: "I16", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.uint32: "U32", torch.int32: "I32", torch.float32: "F32",
    torch.uint64: "U64", torch.int64: "I64", torch.float64: "F64", torch.complex64: "C64",
    torch.float8_e5m2: "F8_E5M2", torch.float8_e4m3fn: "F8_E4M3",
}  # fmt: skip
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


# --- headers ------------------------------------------------------------------------------------


def check_safetensors(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The header of a safetensors file, if the file is whole.

    Returns:
        name to ``{"dtype", "shape", "data_offsets"}``.

    Raises:
        CheckpointError: a pickle; no header, a header that is not JSON, is longer than the file, or
            contradicts itself; data that are shorter or longer than the header says.
    """
    return _read_header(Path(path))[0]


def _read_header(path: Path) -> tuple[dict[str, Any], dict[str, str], int]:
    """Tensors, ``__metadata__``, and where the data begin."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start.startswith(_PICKLES):
            raise CheckpointError(
                f"{path} is no safetensors file but a pickle (torch.save), which can run code: it "
                "is not read. Save the model once with save_pretrained, which writes safetensors"
            )
        length = int.from_bytes(start, "little") if len(start) == 8 else 0
        if not 2 <= length <= size - 8:
            raise CheckpointError(
                f"{path} is not a safetensors file, or was cut off in its header ({size} bytes)"
            )
        if length > _MAX_HEADER:
            raise CheckpointError(
                f"{path}: a header of {length} bytes; safetensors has {_MAX_HEADER} at most"
            )
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_no_duplicates)
        metadata = header.pop("__metadata__", {})
        if not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError("__metadata__ must have texts alone")
        header = {name: _entry(name, entry) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: its header is not safetensors' JSON ({error})") from None
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, stop = entry["data_offsets"]
        if begin != end:
            kind = "overlaps the one before" if begin < end else "leaves a gap before it"
            raise CheckpointError(f"{path}: {name} at {begin} {kind}, which ends at {end}")
        end = stop
    want = 8 + length + end
    if size != want:
        kind = "truncated" if size < want else "too long"
        raise CheckpointError(f"{path} is {kind}: its header needs {want} bytes, it has {size}")
    return header, metadata, 8 + length


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} stands there twice")
    return found


def _entry(name: str, entry: Any) -> dict[str, Any]:
    """One tensor of a header, checked."""

    def counts(value: Any) -> bool:
        return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)

    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in _BITS:
        raise ValueError(f"{name} has dtype {dtype!r}, which is none of safetensors'")
    if not counts(shape) or not counts(offsets) or len(offsets) != 2:
        raise ValueError(f"{name} has shape {shape} and data_offsets {offsets}")
    bits = _BITS[dtype]
    for n in shape:
        bits *= n
    begin, end = offsets
    if bits != 8 * (end - begin):
        raise ValueError(
            f"{name} is {dtype} {shape}, {bits / 8:g} bytes; its data_offsets {offsets} hold "
            f"{end - begin}"
        )
    return entry


# --- checksums ----------------------------------------------------------------------------------


def _start(dtype: str, shape: Iterable[int]) -> int:
    return zlib.crc32(f"{dtype} {list(shape)}".encode())


def checksums_of(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Name to checksum, as they are saved.

    Args:
        tensors: of any dtype and device; those of dtypes that safetensors lacks are left out.
    """

    def one(tensor: Tensor) -> str:
        flat = tensor.detach().contiguous().cpu().reshape(-1)
        data = flat.view(torch.uint8).numpy().data if flat.numel() else b""
        return f"{zlib.crc32(data, _start(_NAMES[tensor.dtype], tensor.shape)):08x}"

    known = {name: t for name, t in tensors.items() if t.dtype in _NAMES}
    with ThreadPoolExecutor(_workers()) as pool:
        return dict(zip(known, pool.map(one, known.values()), strict=True))


def _workers() -> int:
    return min(8, os.cpu_count() or 1)  # zlib lets others run while it sums


def verify_files(paths: Iterable[str | os.PathLike[str]], packed: bool) -> None:
    """Checks the headers of safetensors files, and their data where they have checksums.

    Args:
        packed: whether the checkpoint is 4-bit, which is read from safetensors alone; dense ones of
            other kinds are passed over.

    Raises:
        CheckpointError: see :func:`check_safetensors`; a tensor that is not the one that was saved.
    """
    for path in map(Path, paths):
        # Of a link into the hub's cache, the name is what tells.
        if path.suffix == ".safetensors":
            _verify(path)
        elif packed and path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
            raise CheckpointError(
                f"{path} is a pickle, which can run code; 4-bit checkpoints are read from "
                "safetensors: load it once where it was made, and save it with save_pretrained"
            )


def _verify(path: Path) -> None:
    header, metadata, data = _read_header(path)
    for name, entry in header.items():
        if entry["shape"][:1] == [0]:  # safetensors' own slices of such end in an error without it
            raise CheckpointError(
                f"{path}: {name} has shape {entry['shape']}, and no tensor of a model is empty"
            )
    if CHECKSUMS not in metadata:
        return
    try:
        wanted = json.loads(metadata[CHECKSUMS])
        wanted = {str(name): int(value, 16) for name, value in wanted.items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: its checksums cannot be read ({error})") from None
    names = {name for name, entry in header.items() if entry["dtype"] in _NAMES.values()}
    if names != wanted.keys():
        odd = sorted(names ^ wanted.keys())
        raise CheckpointError(
            f"{path} was changed since it was saved: {', '.join(odd[:3])} "
            f"{'has a checksum and is' if odd[0] in wanted else 'is there and has'} "
            f"{'not there' if odd[0] in wanted else 'no checksum'}. Load a fresh copy"
        )

    def matches(name: str) -> bool:
        entry = header[name]
        begin, end = entry["data_offsets"]
        value = _start(entry["dtype"], entry["shape"])
        with path.open("rb", buffering=0) as file:
            file.seek(data + begin)
            buffer = memoryview(bytearray(min(_CHUNK, end - begin)))
            left = end - begin
            while left:
                count = file.readinto(buffer[: min(len(buffer), left)])
                if not count:
                    return False
                value = zlib.crc32(buffer[:count], value)
                left -= count
        return value == wanted[name]

    with ThreadPoolExecutor(_workers()) as pool:
        bad = [n for n, good in zip(names, pool.map(matches, names), strict=True) if not good]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise CheckpointError(
            f"{path} was changed since it was saved: the checksums of {', '.join(sorted(bad)[:3])}"
            f"{more} do not agree. Load a fresh copy"
        )


def with_checksums() -> dict[str, str]:
    """Metadata that asks for checksums: those of each file are put in as transformers writes it."""
    import transformers.modeling_utils

    modeling_utils: Any = transformers.modeling_utils
    save = getattr(modeling_utils, "safe_save_file", None)
    if save is None:  # another version of transformers: saved without
        return {}
    if not getattr(save, "_qlora_kernels", False):

        @functools.wraps(save)
        def save_file(tensors: Any, filename: Any, metadata: Any = None, **kwargs: Any) -> Any:
            if metadata and CHECKSUMS in metadata:
                metadata = {**metadata, CHECKSUMS: json.dumps(checksums_of(tensors))}
            return save(tensors, filename, metadata=metadata, **kwargs)

        save_file._qlora_kernels = True  # type: ignore[attr-defined]
        modeling_utils.safe_save_file = save_file
    return {CHECKSUMS: ""}


# --- a folder -----------------------------------------------------------------------------------

_FILE_NAME = re.compile(r"[^/\\\0]+\.safetensors")


def check_weight_files(folder: Path) -> None:
    """Config, safetensors and shards of a model's folder are there, whole, and what the index says.

    Raises:
        FileNotFoundError: config, weights or shards are missing.
        CheckpointError: one of them cannot be read, or does not agree with the others.
    """
    _check_config(folder)
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    placed: dict[str, str] | None = None
    if single.is_file():
        files = [single]
    elif index.is_file():
        placed = _read_index(index)
        files = [folder / shard for shard in sorted(set(placed.values()))]
        missing = [f.name for f in files if not f.is_file()]
        if missing:
            raise FileNotFoundError(
                f"{folder} lacks {len(missing)} of {len(files)} shards: {', '.join(missing[:5])}"
            )
    else:
        others = [
            f.name
            for f in folder.iterdir()
            if f.suffix in (".bin", ".pt", ".pth", ".gguf", ".ckpt")
        ]
        hint = ""
        if others:
            hint = (
                f"; it has {', '.join(sorted(others)[:3])}, not read here (a pickle can run code): "
                "save the model once with save_pretrained, which writes safetensors"
            )
        raise FileNotFoundError(
            f"{folder} holds no weights (model.safetensors or its shards){hint}"
        )
    names: dict[str, str] = {}
    for file in files:
        for name in check_safetensors(file):
            if name in names:
                raise CheckpointError(f"{name} is in {names[name]} and in {file.name}")
            names[name] = file.name
    for name, file_name in (placed or {}).items():
        if names.get(name) != file_name:
            raise CheckpointError(
                f"{index} says that {name} is in {file_name}; it is in "
                f"{names.get(name, 'no shard')}: shards of another checkpoint, or swapped"
            )


def read_json_object(path: Path) -> dict[str, Any]:
    """A configuration's file.

    Raises:
        CheckpointError: it is not JSON, or no object.
    """
    try:
        found = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds {type(found).__name__}, not a JSON object")
    return found


def _check_config(folder: Path) -> None:
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no config.json: not a transformers model's folder")
    read_json_object(path)


def _read_index(index: Path) -> dict[str, str]:
    """Tensor to file, of ``model.safetensors.index.json``."""
    try:
        placed = json.loads(index.read_text("utf-8"))["weight_map"]
        if not placed or not all(_FILE_NAME.fullmatch(file) for file in placed.values()):
            raise ValueError("weight_map must name safetensors files of the same folder")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index} is not an index of shards ({error!r})") from None
    return placed
