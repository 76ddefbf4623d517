"""The form of one 4-bit weight in a state dict, checked and taken apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import functional as F4
from ..formats import (
    NESTED_BLOCKSIZE,
    SCALES,
    Format,
    FormatError,
    ScaleCode,
    blocks,
    check_blocksize,
    get_format,
    scale_dtype,
)
from ..ops import FLOATS

__all__ = ["CheckpointError", "read_checkpoint_entries"]

COMPUTE_DTYPES = FLOATS


class CheckpointError(ValueError):
    """A state dict whose packed weight, scales and JSON do not agree."""


_TENSOR_KEYS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


def read_checkpoint_entries(
    packed: Tensor, entries: dict[str, Tensor], shape: Sequence[int] | None, where: str
) -> tuple[Tensor, F4.QuantState, Format]:
    """What :func:`~.functional.checkpoint_entries` or bitsandbytes wrote, checked and taken apart.

    Args:
        packed: the packed weight, of any shape and storage dtype: its bytes are what counts.
        entries: tensors by key, without the ``weight.`` in front.
        shape: ``(out_features, in_features)`` of the layer, or None to take the JSON's word.
        where: the weight's full name, for the errors.

    Returns:
        ``(packed uint8 [(n + 1) // 2, 1], state, format)``; tensors stay where they are.

    Raises:
        CheckpointError: an entry is missing, surplus, of the wrong dtype or size, or the JSON is
            not JSON, lies about the shape, or names what is not offered.
    """

    def fail(message: str) -> CheckpointError:
        return CheckpointError(f"{where}: {message}")

    keys = [k for k in entries if k.startswith((F4.PEER_STATE, F4.OWN_STATE))]
    if len(keys) != 1:
        found = ", ".join(keys) if keys else "none"
        raise fail(f"needs exactly one entry 'weight.quant_state.<kind>__<format>', found {found}")
    surplus = sorted(set(entries) - {*_TENSOR_KEYS, *keys})
    if surplus:
        raise fail(f"has entries that belong to no 4-bit weight: {', '.join(surplus)}")
    key = keys[0]
    try:
        info = F4.read_json_entry(f"weight.{key}", entries[key])
    except ValueError as error:
        raise fail(str(error)) from None

    nested = "nested_absmax" in entries
    if "nested_offset" in info and not nested:
        raise fail("weight.nested_absmax is missing, the JSON tells of nested scales")
    if "nested_quant_map" in entries and not nested:
        raise fail("weight.nested_quant_map is there without weight.nested_absmax")
    needed: dict[str, Any] = {"quant_type": str, "blocksize": int, "dtype": str, "shape": list}
    if nested:
        needed |= {"nested_blocksize": int, "nested_dtype": str, "nested_offset": (int, float)}
    for name, kind in needed.items():
        if not isinstance(info.get(name), kind) or isinstance(info.get(name), bool):
            raise fail(f"the JSON of weight.{key} has {name} = {info.get(name)!r}")
    scale = info.get("scale", "fp32")
    if scale not in SCALES or (nested and scale != "fp32"):
        raise fail(
            f"the JSON of weight.{key} has scale = {scale!r}{' and nested' if nested else ''}"
        )
    if scale == "e4m3" and not isinstance(info.get("tensor_scale"), float):
        raise fail(f"the JSON of weight.{key} has tensor_scale = {info.get('tensor_scale')!r}")
    if nested and isinstance(info["nested_offset"], int) and abs(info["nested_offset"]) > 2**127:
        raise fail(f"the JSON of weight.{key} has a nested_offset beyond fp32")
    for name in ("absmax", "quant_map", *(("nested_quant_map",) if nested else ())):
        if name not in entries:
            raise fail(f"weight.{name} is missing")

    name = info["quant_type"]
    if name != key.partition("__")[2]:
        raise fail(f"the JSON says quant_type {name!r}, its key says {key.partition('__')[2]!r}")
    try:
        blocksize = check_blocksize(info["blocksize"])
    except ValueError as error:
        raise fail(str(error)) from None
    dtype = getattr(torch, info["dtype"], None)
    if dtype not in COMPUTE_DTYPES:
        raise fail(f"the JSON has dtype {info['dtype']!r}; offered: float32, bfloat16, float16")
    told = info["shape"]
    if len(told) != 2 or not all(isinstance(n, int) and n > 0 for n in told):
        raise fail(f"the JSON has shape {told}, not two positive integers")
    if shape is not None and tuple(told) != tuple(shape):
        raise fail(f"holds a weight of shape {tuple(told)}, the layer needs {tuple(shape)}")

    count = told[0] * told[1]
    if packed.numel() * packed.element_size() != (count + 1) // 2:
        raise fail(
            f"{packed.numel() * packed.element_size()} packed bytes; shape {tuple(told)} needs "
            f"{(count + 1) // 2}"
        )
    n_blocks = blocks(count, blocksize)
    sizes = {
        "absmax": (scale_dtype(scale, nested), n_blocks),
        "quant_map": (torch.float32, 16),
    }
    if nested:
        sizes["nested_absmax"] = (torch.float32, blocks(n_blocks, NESTED_BLOCKSIZE))
        sizes["nested_quant_map"] = (torch.float32, 256)
        if info["nested_blocksize"] != NESTED_BLOCKSIZE or info["nested_dtype"] != "float32":
            raise fail(
                f"nested scales in blocks of {info['nested_blocksize']} as {info['nested_dtype']}; "
                f"offered: {NESTED_BLOCKSIZE}, float32"
            )
    for entry, (want, size) in sizes.items():
        got = entries[entry]
        if got.dtype != want or got.numel() != size:
            raise fail(
                f"weight.{entry} is {got.numel()} x {got.dtype}; {tuple(told)} at a blocksize of "
                f"{blocksize} needs {size} x {want}"
            )

    scale_code = None
    if nested and "scale_code" in info:
        values = entries["nested_quant_map"].reshape(-1).tolist()
        try:
            scale_code = ScaleCode(
                str(info["scale_code"]), values, bool(info.get("scale_code_centered", True))
            )
        except FormatError as error:
            raise fail(str(error)) from None
    fmt = _read_format(
        name, key, entries["quant_map"], info.get("thresholds"), scale, scale_code, fail
    )
    device = packed.device
    # bitsandbytes computes with its own table, whatever quant_map's last bit says: so do we.
    code = fmt.tensors(device)[0] if device.type != "meta" else entries["quant_map"]
    state2 = offset = None
    if nested:
        state2 = F4.QuantState(
            absmax=entries["nested_absmax"].reshape(-1),
            code=entries["nested_quant_map"].reshape(-1),
            blocksize=NESTED_BLOCKSIZE,
            dtype=torch.float32,
        )
        offset = torch.tensor(float(info["nested_offset"]), dtype=torch.float32, device=device)
    elif scale == "e4m3":
        offset = torch.tensor(info["tensor_scale"], dtype=torch.float32, device=device)
    state = F4.QuantState(
        absmax=entries["absmax"].reshape(-1),
        shape=torch.Size(told),
        code=code,
        blocksize=blocksize,
        quant_type=fmt.name,
        dtype=dtype,
        offset=offset,
        state2=state2,
    )
    return packed.contiguous().view(torch.uint8).reshape(-1, 1), state, fmt


def _read_format(
    name: str,
    key: str,
    quant_map: Tensor,
    thresholds: Any,
    scale: str,
    scale_code: ScaleCode | None,
    fail: Any,
) -> Format:
    book = quant_map.cpu().reshape(-1)
    try:
        fmt = get_format(name)
    except ValueError:
        if key.startswith(F4.PEER_STATE):
            raise fail(f"bitsandbytes has no 4-bit format {name!r}") from None
        try:
            return Format(name, book.tolist(), thresholds, scale=scale, scale_code=scale_code)
        except (ValueError, TypeError) as error:
            raise fail(str(error)) from None
    if not torch.allclose(book, torch.from_numpy(fmt.tables[0]), rtol=0, atol=1e-5):
        raise fail(f"weight.quant_map is not the codebook of {name!r} that is known here")
    if scale != fmt.scale:
        raise fail(f"has {scale} scales, but {name!r} is known here with {fmt.scale}")
    if scale_code is not None and not scale_code.same(fmt.scale_code):
        raise fail(
            f"its scales are of the code {scale_code.name!r}, which is not the one that {name!r} "
            "is known with here"
        )
    return fmt
