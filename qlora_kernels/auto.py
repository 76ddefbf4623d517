"""``import qlora_kernels.auto`` is ``qlora_kernels.enable()``; see ``takeover.py``."""

from .takeover import enable

enable()
