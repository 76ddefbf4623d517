"""The lines of a run for a GPU that is not here: **modelled**, never measured.

Ours is what the dispatch chooses, priced by the emulator's counts (``gpu_model``). ``torch bf16``
is a dense product at the data sheet's pace (0.8 of its tensor cores), ``dequantize + torch`` the
plan of libraries that decode to memory first. What nobody counted has no time, and says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..emulator.devices import Device, get_device
from ..finetune.errors import BadInput
from . import gpu_model
from .gpu_model import FOLLOWS, NotCounted, Time
from .work import Case

__all__ = ["device_of", "limits", "line"]


def device_of(name: str) -> Device:
    """The GPU of that name in the emulator's table.

    Raises:
        BadInput: none; the nearest are suggested.
    """
    try:
        return get_device(name)
    except ValueError as error:
        raise BadInput(str(error)) from None


def limits(device: Device) -> dict[str, Any]:
    """What a second of the device gives: DRAM as others measured it, tensor cores by the sheet."""
    found = {"read": device.dram_read, "copy": device.dram_read}
    found |= {f"matmul {name}": device.tensor[kind]
              for kind, name in (("bf16", "bfloat16"), ("fp16", "float16"))
              if device.tensor.get(kind)}  # fmt: skip
    return {name: {"amount": amount, "rounds": [[1.0]]} for name, amount in found.items()}


def _plans(case: Case, device: Device) -> Iterator[tuple[str, Any]]:
    """``(contender, what gives its time)``."""
    n, k, m, r = case.layer.n, case.layer.k, case.m, case.rank
    if case.op == "optimizer":
        for bits in (32, 8):
            yield f"qlora {bits}-bit", lambda bits=bits: gpu_model.adamw(device, r * (n + k), bits)
        return
    if case.op == "quantize":
        yield "qlora cuda", lambda: _missing("quantize has no counts")
        return
    if case.op == "dequantize":
        yield "qlora cuda", lambda: gpu_model.dequantize(device, n, k, case.nested)
        return

    def dense(outs: int, ins: int) -> Time:
        """A product and, with LoRA, what PEFT makes of it: S, S B^T, times s, plus."""
        found = gpu_model.dense(device, m, outs, ins)
        if not r:
            return found
        moved = 2.0 * (m * ins + r * ins + m * r) + 2.0 * (m * r + r * outs + m * outs)
        moved += 2.0 * m * outs * (2 + 3)  # scaled, then added
        return found.then(
            Time(moved / device.dram_read + 4 * FOLLOWS * device.launch, "DRAM", "LoRA")
        )

    def first(time: Time) -> Time:
        return gpu_model.dequantize(device, n, k, case.nested).then(time)

    def ours(backward: bool) -> Time:
        return gpu_model.linear(device, m, n, k, rank=r, backward=backward, nested=case.nested)

    def grads() -> Time:
        """dA and dB, everybody's."""
        da, db = (gpu_model.dense(device, r, outs, m, launch=FOLLOWS) for outs in (k, n))
        return da.then(db)

    if case.op in ("forward", "lora"):
        yield "qlora cuda", lambda: ours(False)
        yield "dequantize + torch", lambda: first(dense(n, k))
        yield "torch bf16", lambda: dense(n, k)
    elif case.op == "dx":
        yield "qlora cuda", lambda: ours(True)
        yield "dequantize + torch", lambda: first(dense(k, n))
        yield "torch bf16", lambda: dense(k, n)
    else:
        yield "qlora cuda", lambda: ours(False).then(ours(True)).then(grads())
        yield (
            "dequantize + torch",
            lambda: first(dense(n, k)).then(first(dense(k, n))).then(grads()),
        )
        yield "torch bf16", lambda: dense(n, k).then(dense(k, n)).then(grads())


def _missing(what: str) -> Time:
    raise NotCounted(what)


def line(case: Case, device: Device) -> tuple[dict[str, Any], dict[str, str]]:
    """``(contenders, failed)`` of a line, as results have them.

    A modelled time has no spread: its one sample is the model's figure.
    """
    found: dict[str, Any] = {}
    failed: dict[str, str] = {}
    for name, price in _plans(case, device):
        try:
            if (
                case.op != "optimizer"
                and case.op != "dequantize"
                and (case.dtype != "bf16" or case.blocksize != 64 or case.format != "nf4")
            ):
                _missing("counted in bf16, NF4, blocks of 64")
            if not device.tensor.get("bf16"):
                _missing(f"{device} has no bf16")
            time = price()
        except NotCounted as error:
            failed[name] = f"not counted: {error}"
            continue
        found[name] = {"rounds": [[time.seconds]], "bound": time.bound, "route": time.route}
    return found, failed
