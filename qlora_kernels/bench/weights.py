"""The contenders of quantize and dequantize, and what their results must be."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from .. import backend as backends_module
from .. import functional as F4
from .. import reference
from .contenders import Weight, _torchao, attempt
from .race import Contender

__all__ = ["contenders"]

_SAMPLE = 1 << 18  # values at each end that are quantized again by the reference


def _same_bytes(weight: Weight) -> Callable[[Any], str | None]:
    """The packed bytes are the reference's, at both ends of the weight; scales go with them."""
    count, step = weight.n * weight.k, max(weight.blocksize, 2)
    part = min(_SAMPLE // step * step or step, count)
    begin = max(0, (count - part) // step * step)
    values = weight.original.cpu().reshape(-1)

    def check(result: Any) -> str | None:
        packed, state = result
        packed = packed.cpu().view(torch.uint8).reshape(-1)
        for first, last in {(0, part), (begin, count)}:
            want, absmax = reference.quantize(values[first:last], weight.format, weight.blocksize)
            got = packed[first // 2 : (last + 1) // 2]
            if not torch.equal(got, want):
                wrong = int((got != want).sum())
                return f"{wrong} of {want.numel()} bytes are not the reference's"
            if isinstance(state, F4.QuantState):
                blocks = slice(first // weight.blocksize, first // weight.blocksize + len(absmax))
                scales = state.moved("cpu").scales()[blocks]
                # The 8-bit code's steps are at most 1/64 of a group's largest scale.
                if (scales - absmax).abs().max() > absmax.max() / 64:
                    return "scales are not those of the blocks"
        return None

    return check


def _same_values(weight: Weight, dtype: torch.dtype, exact: bool) -> Callable[[Any], str | None]:
    """The dequantized values, rounded once; the last bit may differ where a peer's offset does."""
    want = weight.values.to(dtype)

    def check(got: Tensor) -> str | None:
        got = got.cpu()
        if got.shape != want.shape or got.dtype != want.dtype:
            return f"{got.dtype} {list(got.shape)}, not {want.dtype} {list(want.shape)}"
        if exact:
            wrong = int((got != want).sum())
            return f"{wrong} values are not the reference's" if wrong else None
        error = (got.float() - want.float()).abs()
        bound = torch.finfo(dtype).eps * want.float().abs() + 1e-6 * want.float().abs().max()
        wrong = int((~(error <= bound)).sum())
        return f"{wrong} values are more than a last bit away" if wrong else None

    return check


def contenders(
    op: str, weight: Weight, backends: Sequence[str], peers: Sequence[str]
) -> Iterator[Contender]:
    """Who quantizes to (of bf16), or dequantizes (to bf16)."""
    original, dtype = weight.original, torch.bfloat16
    packed, state, out = weight.packed, weight.state, torch.empty_like(weight.original)
    options: dict[str, Any] = {
        "blocksize": weight.blocksize, "quant_type": weight.format,
        "compress_statistics": weight.nested,
    }  # fmt: skip
    own: list[tuple[str, Callable[[int], Any], Callable[[Any], str | None]]]
    if op == "quantize":
        own = [("", lambda _: F4.quantize_4bit(original, **options), _same_bytes(weight))]
    else:
        exact = _same_values(weight, dtype, exact=True)
        own = [
            ("", lambda _: F4.dequantize_4bit(packed, state, dtype=dtype), exact),
            (" out=", lambda _: F4.dequantize_4bit(packed, state, out=out), exact),
        ]
    for backend in backends:
        around: Callable[[], Any] = nullcontext
        if backend != "cpu":
            around = functools.partial(backends_module.set_backend, backend)
        for what, run, check in own:
            yield Contender(f"qlora {backend}{what}", run, check, around)

    def bitsandbytes() -> Contender:
        import bitsandbytes.functional as peer

        if op == "quantize":
            return Contender(
                "bitsandbytes", lambda _: peer.quantize_4bit(original, **options),
                _same_bytes(weight),
            )  # fmt: skip
        theirs = peer.quantize_4bit(original, **options)
        check = _same_values(weight, dtype, exact=False)
        return Contender("bitsandbytes", lambda _: peer.dequantize_4bit(*theirs), check)

    def torchao() -> Contender:
        nf4 = _torchao()
        if op == "quantize":
            return Contender(
                "torchao", lambda _: nf4.to_nf4(original, weight.blocksize, 256),
                lambda kept: weight.as_near(kept.get_original_weight()),
            )  # fmt: skip
        kept = nf4.to_nf4(original, weight.blocksize, 256)
        return Contender("torchao", lambda _: kept.get_original_weight(), weight.as_near)

    if "bitsandbytes" in peers:
        yield attempt("bitsandbytes", bitsandbytes)
    if "torchao" in peers and weight.format == "nf4" and weight.nested:
        yield attempt("torchao", torchao)
