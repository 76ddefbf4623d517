"""What is compared: formats by name, block sizes, double quantization, and two controls.

A :class:`Contender` gives a :class:`~qlora_kernels.formats.Format` for a weight, and is quantized
and multiplied by the same ops as every other: nothing here imitates quantization in floating point.

Two controls keep a table honest. ``two_bits`` has four different levels and must lose; ``repeat``
is NF4 with its codes in another order, other bytes for the same values, and must tie in every
digit.

NVFP4 and MXFP4 are their *values*. A checkpoint of either as others write it holds the earlier
value in the low nibble, ours in the high one, and no loader here reads it. NVFP4's tensor scale is
ours over 6, so values agree to fp32 rounding. MXFP4's scale is ``2 ** ceil(log2(absmax))`` over 8,
which is OCP's for every block whose absmax is not itself a power of two (there OCP's is twice
that).
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..finetune.errors import BadInput, bad_input
from ..formats import FORMATS, FP4_E2M1, NF4, Format, check_blocksize, register_format
from .codebooks import derive_af4, derive_bof4, derive_levels, learn_codebook

__all__ = ["Contender", "Design", "designs", "find_design", "grid"]

Learn = Callable[[torch.Tensor, int, "torch.Tensor | None"], Any]
"""``learn(weights [N, K], blocksize, energy [K] or None)``: 16 values, or a Format."""


@dataclass(frozen=True)
class Design:
    """A format before its block size is chosen.

    Attributes:
        name: in tables and on the command line.
        about: one line.
        of_blocksize: the format of a block size, where weights do not matter.
        learn: the format of a weight, where they do. Either this or ``of_blocksize``.
        scale: the kind of its blocks' scales; one-byte kinds are not double-quantized.
        blocksizes: the only ones that it is defined for; None: any.
        index_bits: what a code carries; below 4 the code is still stored in 4.
        digest: of the user's file that it came from.
    """

    name: str
    about: str
    of_blocksize: Callable[[int], Format] | None = None
    learn: Learn | None = None
    scale: str = "fp32"
    blocksizes: tuple[int, ...] | None = None
    index_bits: int = 4
    digest: str = ""


@dataclass(frozen=True)
class Contender:
    """A design with a block size, its scales double-quantized or not."""

    design: Design
    blocksize: int
    nested: bool

    @property
    def name(self) -> str:
        """``nf4-64``, ``nf4-64-dq``."""
        return f"{self.design.name}-{self.blocksize}{'-dq' if self.nested else ''}"

    @property
    def bits(self) -> float:
        """Bits a weight that the format needs, scales included. A control's two bits count as two,
        though the bytes that the kernels read have four."""
        like = Format("like", NF4.codebook, scale=self.design.scale)
        return like.bits_per_weight(self.blocksize, self.nested) - 4 + self.design.index_bits

    def format_for(self, weights: torch.Tensor, energy: torch.Tensor | None = None) -> Format:
        """The format that ``weights`` ``[N, K]`` get.

        Args:
            energy: the mean square of each of the K inputs, for designs that learn.

        Raises:
            BadInput: a user's function gave something that is no codebook.
        """
        if self.design.of_blocksize is not None:
            return self.design.of_blocksize(self.blocksize)
        assert self.design.learn is not None
        with bad_input(f"what {self.design.name} learned"):
            try:
                found = self.design.learn(weights, self.blocksize, energy)
            except BadInput:
                raise
            except Exception as error:
                raise BadInput(
                    f"{self.design.name} failed on a weight of {tuple(weights.shape)}: "
                    f"{type(error).__name__}: {error}"
                ) from error
            return found if isinstance(found, Format) else named_by_content(self.design, found)


def named_by_content(design: Design, codebook: Sequence[float]) -> Format:
    """A format for one weight's own codebook: kernels take the table, registries want one name for
    each, so the name has a digest of the values."""
    plain = Format(design.name, codebook, scale=design.scale)
    digest = hashlib.sha256(plain.tables[0].tobytes()).hexdigest()[:12]
    name = f"{design.name}.{digest}"
    known = FORMATS.get(name)
    return known or register_format(Format(name, codebook, scale=design.scale))


# --- the designs that there are ------------------------------------------------------------------


def _constant(fmt: Format) -> Callable[[int], Format]:
    return lambda blocksize: fmt


def _registered(name: str) -> Design:
    fmt = FORMATS[name]
    return Design(name, fmt.description or "registered", _constant(fmt), scale=fmt.scale)


def _derived(name: str, values: Callable[[int], Sequence[float]]) -> Callable[[int], Format]:
    def make(blocksize: int) -> Format:
        full = f"{name}.{blocksize}"
        return FORMATS.get(full) or register_format(Format(full, values(blocksize)))

    return make


def _two_bits(blocksize: int) -> list[float]:
    return [level for level in derive_levels(4, blocksize) for _ in range(4)]


# E2M1 as the standards write it, 0 to 6: over 8 for a power of two that is not below the absmax.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
MXFP4 = Format(
    "mxfp4",
    [v / 8 for v in _E2M1] + [-v / 8 for v in _E2M1],
    description="OCP: E2M1, blocks of 32, E8M0",
    scale="e8m0",
)
NVFP4 = Format(
    "nvfp4",
    FP4_E2M1.codebook,
    description="E2M1, blocks of 16, E4M3 and a tensor's fp32",
    scale="e4m3",
)
_ORDER = [5, 12, 0, 9, 15, 3, 7, 10, 1, 14, 6, 2, 11, 8, 4, 13]
REPEAT = Format(
    "repeat", [NF4.codebook[i] for i in _ORDER], description="control: NF4 by other codes, must tie"
)


def designs() -> dict[str, Design]:
    """Every design by name: what is registered, and what is computed here."""
    found = {
        name: _registered(name) for name in FORMATS if "." not in name and name not in _OWN_NAMES
    }
    own = [
        Design("af4", "least absolute error of normalized values", _derived("af4", derive_af4)),
        Design("bof4", "least squared error of normal weights", _derived("bof4", derive_bof4)),
        Design(
            "bof4_mae",
            "least absolute error of normal weights",
            _derived("bof4_mae", lambda b: derive_bof4(b, absolute=True)),
        ),
        Design("learned", "k-means of each weight, one codebook a layer", learn=learn_codebook),
        Design("mxfp4", MXFP4.description, _constant(MXFP4), scale="e8m0", blocksizes=(32,)),
        Design("nvfp4", NVFP4.description, _constant(NVFP4), scale="e4m3", blocksizes=(16,)),
        Design(
            "two_bits",
            "control: four levels, must lose",
            _derived("two_bits", _two_bits),
            index_bits=2,
        ),
        Design("repeat", REPEAT.description, _constant(REPEAT)),
    ]
    return found | {design.name: design for design in own}


_OWN_NAMES = frozenset(
    ("af4", "bof4", "bof4_mae", "learned", "mxfp4", "nvfp4", "two_bits", "repeat")
)
CONTROLS = ("two_bits", "repeat")


def find_design(name: str, known: dict[str, Design] | None = None) -> Design:
    """A design by name.

    Raises:
        BadInput: there is none of that name; the nearest is suggested.
    """
    known = designs() if known is None else known
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else "."
    raise BadInput(
        f"unknown format {name!r}{hint} There are {', '.join(known)}, and files ending in .py, "
        ".json, .yaml"
    )


def grid(
    chosen: Iterable[Design], blocksizes: Sequence[int] = (64,), double_quant: str = "both"
) -> list[Contender]:
    """Every design at every block size, with and without double quantization where that applies.

    A design that is defined for certain block sizes runs at those and no others; the 2-bit control
    and the repeat run without double quantization only, as what they are compared with.

    Args:
        double_quant: "both", "yes" or "no".

    Raises:
        BadInput: a block size that is not offered, nothing left to compare, a word for
            ``double_quant`` that is none of the three.
    """
    if double_quant not in ("both", "yes", "no"):
        raise BadInput(f"double quantization may be both, yes or no, not {double_quant!r}")
    ways = {"both": (False, True), "yes": (True,), "no": (False,)}[double_quant]
    found: dict[str, Contender] = {}
    for design in chosen:
        for blocksize in design.blocksizes or blocksizes:
            with bad_input("block size"):
                check_blocksize(blocksize)
            once = design.scale != "fp32" or design.name in CONTROLS
            for nested in (False,) if once else ways:
                contender = Contender(design, blocksize, nested)
                found[contender.name] = contender
    if not found:
        raise BadInput("no format is given: name one with --formats")
    return list(found.values())
