"""qlora-kernels: hand-written kernels for 4-bit finetuning (QLoRA, arXiv 2305.14314).

Layers, from the bottom: :mod:`~qlora_kernels.formats` (codebooks and scales as data),
:mod:`~qlora_kernels.reference` (the truth, in plain torch), :mod:`~qlora_kernels.ops` (torch ops),
:mod:`~qlora_kernels.functional` (bitsandbytes' names), ``nn`` (modules), ``optim``,
``integrations`` and the applications. Importing the package changes no model that holds none of its
layers.

``import qlora_kernels as bnb`` has the 4-bit API of bitsandbytes by its names (docs/bnb-api.md).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import backend, formats, functional, integrations, ops
from .backend import BackendError, backends, get_backend, set_backend
from .functional import matmul_4bit
from .takeover import disable, enable, enabled

if TYPE_CHECKING:
    from . import nn, optim
    from .integrations.bitsandbytes import swap
    from .integrations.loftq import loftq_init
    from .merging import merge
    from .nn.out_of_scope import MatmulLtState, matmul

# PEFT and transformers, when they are imported, learn of this package's layers and no others.
integrations.install()
backend.start()

__version__ = "0.1.0"

_LATER = {
    "nn": "nn",
    "optim": "optim",
    "MatmulLtState": "nn.out_of_scope",
    "loftq_init": "integrations.loftq",
    "matmul": "nn.out_of_scope",
    "merge": "merging",
    "swap": "integrations.bitsandbytes",
}


def __getattr__(name: str) -> Any:
    # What the package's own import does without: modules and optimizers, when they are asked for.
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_LATER[name]}")
    return module if name == _LATER[name] else getattr(module, name)


__all__ = [
    "BackendError",
    "MatmulLtState",
    "__version__",
    "backends",
    "disable",
    "enable",
    "enabled",
    "formats",
    "functional",
    "get_backend",
    "loftq_init",
    "matmul",
    "matmul_4bit",
    "merge",
    "nn",
    "ops",
    "optim",
    "set_backend",
    "swap",
]
