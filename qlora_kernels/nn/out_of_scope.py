"""Names of bitsandbytes' 8-bit layers, for ``isinstance``; constructing one is an error.

This package is about 4-bit weights. 8-bit *optimizer states* are another matter: see ``optim``.
"""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn

__all__ = [
    "Embedding8bit",
    "Int8Params",
    "Linear8bitLt",
    "MatmulLtState",
    "OutOfScopeError",
    "matmul",
]


class OutOfScopeError(NotImplementedError):
    """What bitsandbytes has and this package leaves to it."""


def refuse(name: str, instead: str) -> NoReturn:
    raise OutOfScopeError(
        f"{name}: 8-bit matrix products (LLM.int8) are out of qlora_kernels' scope. Use {instead}, "
        "or bitsandbytes itself for this layer: the two can be in one model"
    )


class Linear8bitLt(nn.Linear):
    """bitsandbytes' 8-bit linear layer. Not one of them can be made here.

    Raises:
        OutOfScopeError: always.
    """

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        has_fp16_weights: bool = True,
        threshold: float = 0.0,
        index: Any = None,
        device: Any = None,
    ) -> None:
        refuse("Linear8bitLt", "nn.Linear4bit (load_in_4bit=True)")


class Embedding8bit(nn.Embedding):
    """bitsandbytes' 8-bit embedding. Not one of them can be made here.

    Raises:
        OutOfScopeError: always.
    """

    def __init__(
        self, num_embeddings: int, embedding_dim: int, device: Any = None, dtype: Any = None
    ) -> None:
        refuse("Embedding8bit", "nn.Embedding4bit")


class Int8Params(nn.Parameter):
    """bitsandbytes' 8-bit parameter. Not one of them can be made here.

    Raises:
        OutOfScopeError: always.
    """

    def __new__(
        cls,
        data: Any = None,
        requires_grad: bool = True,
        has_fp16_weights: bool = False,
        CB: Any = None,
        SCB: Any = None,
        **kwargs: Any,
    ) -> Int8Params:
        refuse("Int8Params", "nn.Params4bit")


class MatmulLtState:
    """What an 8-bit product of bitsandbytes keeps. Not one of them can be made here.

    Raises:
        OutOfScopeError: always.
    """

    def __init__(self) -> None:
        refuse("MatmulLtState", "matmul_4bit")


def matmul(
    A: Any, B: Any, out: Any = None, state: Any = None, threshold: float = 0.0, bias: Any = None
) -> NoReturn:
    """bitsandbytes' 8-bit product.

    Raises:
        OutOfScopeError: always.
    """
    refuse("matmul", "matmul_4bit")
