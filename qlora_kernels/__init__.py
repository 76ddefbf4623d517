"""qlora-kernels: hand-written kernels for 4-bit finetuning (QLoRA, arXiv 2305.14314).

Layers, from the bottom: :mod:`~qlora_kernels.formats` (codebooks and scales as data),
:mod:`~qlora_kernels.reference` (the truth, in plain torch), :mod:`~qlora_kernels.ops` (torch ops),
:mod:`~qlora_kernels.functional` (bitsandbytes' names), ``nn`` (modules), ``integrations`` and the
applications. Importing the package changes no model that holds none of its layers.
"""

from . import backend, formats, functional, integrations, ops
from .backend import BackendError, backends, get_backend, set_backend
from .takeover import disable, enable, enabled

# PEFT and transformers, when they are imported, learn of this package's layers and no others.
integrations.install()
backend.start()

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "__version__",
    "backends",
    "disable",
    "enable",
    "enabled",
    "formats",
    "functional",
    "get_backend",
    "ops",
    "set_backend",
]
