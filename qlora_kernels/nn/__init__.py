"""Modules: linear layers whose weight is 4-bit, the same with LoRA in one op, and their way in.

==================  ===============================================================================
``linear``          :class:`Linear4bit`, ``LinearNF4``, ``LinearFP4``
``params``          :class:`Params4bit`, the parameter that they hold
``embedding``       :class:`Embedding4bit` and kin
``experts``         :class:`Experts4bit`, a mixture's experts
``lora``            :class:`LoraLinear4bit`, adapters in the same op
``footprint``       :func:`footprint`, what of a model is in 4 bits
``replace``         :func:`replace_linear_layers`, for a model that is in memory
``parametrize``     any other parameter in 4 bits
``checkpoint``      the form of a 4-bit weight in a state dict
``out_of_scope``    8-bit layers, by name only
==================  ===============================================================================

Names, signatures and semantics of the layers are bitsandbytes'; docs/bnb-api.md says what differs.
"""

from .. import functional as F4  # noqa: F401
from . import modules, parametrize
from .checkpoint import COMPUTE_DTYPES, CheckpointError, read_checkpoint_entries
from .embedding import Embedding4bit, EmbeddingFP4, EmbeddingNF4
from .experts import Experts4bit, expert_parameters
from .footprint import Footprint, footprint
from .linear import Linear4bit, LinearFP4, LinearNF4, _Group  # noqa: F401
from .lora import (
    LoraLinear4bit,
    LoraSpec,
    MergeReport,
    lora_projection,
    lora_state_dict,
    mark_only_lora_as_trainable,
)
from .out_of_scope import Embedding8bit, Int8Params, Linear8bitLt, OutOfScopeError
from .params import Params4bit
from .replace import DEFAULT_SKIP, ReplacementReport, replace_linear_layers

__all__ = [
    "COMPUTE_DTYPES",
    "DEFAULT_SKIP",
    "CheckpointError",
    "Embedding4bit",
    "Embedding8bit",
    "EmbeddingFP4",
    "EmbeddingNF4",
    "Experts4bit",
    "Footprint",
    "Int8Params",
    "Linear4bit",
    "Linear8bitLt",
    "LinearFP4",
    "LinearNF4",
    "LoraLinear4bit",
    "LoraSpec",
    "MergeReport",
    "OutOfScopeError",
    "Params4bit",
    "ReplacementReport",
    "expert_parameters",
    "footprint",
    "lora_projection",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
    "modules",
    "parametrize",
    "read_checkpoint_entries",
    "replace_linear_layers",
]
