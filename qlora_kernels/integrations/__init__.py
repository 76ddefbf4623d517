"""Bridges to transformers and PEFT. Nothing here is imported before the library that it bridges to.

:func:`install` makes the order of imports not matter: what is loaded already is extended now, what
is loaded later is extended at the end of its import. It is idempotent, costs no import of its own,
and changes nothing for models that hold no layer of this package.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

__all__ = ["install", "when_imported"]


class _AfterImport(importlib.abc.MetaPathFinder):
    """Runs a callback once, right after the module of one name was executed."""

    def __init__(self, name: str, callback: Callable[[], object]) -> None:
        self.name, self.callback = name, callback

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name:
            return None
        # Off the path first: the real finders are asked next, and the callback may import.
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        load, callback = spec.loader.exec_module, self.callback

        def exec_module(module: ModuleType) -> None:
            load(module)
            callback()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def when_imported(name: str, callback: Callable[[], object]) -> None:
    """Calls ``callback()`` now if module ``name`` is loaded, else right after it will have been.

    The callback runs inside that import: its package may be half loaded, so it takes what it needs
    from submodules and not from the package.
    """
    if name in sys.modules:
        callback()
    else:
        sys.meta_path.insert(0, _AfterImport(name, callback))


_installed = False


def install() -> None:
    """Gives PEFT our fused LoRA layer, which keeps its dtype when it is loaded again, transformers
    our quantizer, and Trainer our optimizers where there are no others; now or when they come."""
    global _installed
    if _installed:
        return
    _installed = True
    # Each bridge installs itself at the end of its import; it may be the one that is going on.
    for library, bridge in (
        ("peft.tuners.lora.model", "peft"),
        ("peft.peft_model", "peft_reload"),
        ("peft.optimizers.loraplus", "peft_loraplus"),
        ("transformers.quantizers.auto", "transformers"),
        ("transformers.trainer_optimizer", "optimizers"),
    ):
        name = f"{__name__}.{bridge}"
        when_imported(library, functools.partial(importlib.import_module, name))
