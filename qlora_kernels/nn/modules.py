"""bitsandbytes' path to its layers: ``from qlora_kernels.nn.modules import Linear4bit``."""

from .embedding import Embedding4bit, EmbeddingFP4, EmbeddingNF4
from .linear import Linear4bit, LinearFP4, LinearNF4
from .out_of_scope import Embedding8bit, Int8Params, Linear8bitLt
from .params import Params4bit

__all__ = [
    "Embedding4bit",
    "Embedding8bit",
    "EmbeddingFP4",
    "EmbeddingNF4",
    "Int8Params",
    "Linear4bit",
    "Linear8bitLt",
    "LinearFP4",
    "LinearNF4",
    "Params4bit",
]
