"""``optim.GlobalOptimManager``: hyperparameters of single parameters, by bitsandbytes' names.

::

    manager = GlobalOptimManager.get_instance()
    manager.override_config(model.embed.weight, "optim_bits", 32)
    manager.override_config([model.head.weight], key_value_dict={"lr": 1e-5, "weight_decay": 0.0})
    manager.register_module_override(model.embed, "weight", {"optim_bits": 32})

What is overridden counts in every optimizer of this package, before or after it was constructed,
over what its groups say; states that exist keep their kind.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["GlobalOptimManager"]

KNOWN = ("lr", "betas", "eps", "weight_decay", "optim_bits", "min_8bit_size")


class GlobalOptimManager:
    """The one collection of overrides; :meth:`get_instance` gives it."""

    _instance: GlobalOptimManager | None = None

    def __init__(self) -> None:
        raise RuntimeError("Call get_instance() instead")

    def initialize(self) -> None:
        """Forgets all overrides."""
        self._configs: Any = WeakIdKeyDictionary()
        self._modules: list[tuple[weakref.ref[nn.Module], str, dict[str, Any]]] = []

    @classmethod
    def get_instance(cls) -> GlobalOptimManager:
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
            cls._instance.initialize()
        return cls._instance

    def register_parameters(self, params: Iterable[Any]) -> None:
        """Taken as in bitsandbytes; parameters are known by themselves here, moved or not."""

    def override_config(
        self,
        parameters: Tensor | Iterable[Tensor],
        key: str | None = None,
        value: Any = None,
        key_value_dict: dict[str, Any] | None = None,
    ) -> None:
        """Sets one hyperparameter, or several, for one parameter, or several.

        Args:
            key, value: ``lr``, ``betas``, ``eps``, ``weight_decay``, ``optim_bits`` or
                ``min_8bit_size``.
            key_value_dict: the same, several at once.

        Raises:
            ValueError: an unknown hyperparameter, or both or neither of the two ways to say one.
        """
        if (key is None) == (key_value_dict is None):
            raise ValueError("override_config takes either key and value, or key_value_dict")
        config = _checked({key: value} if key is not None else key_value_dict)
        for p in [parameters] if isinstance(parameters, Tensor) else parameters:
            self._configs[p] = {**self._configs.get(p, {}), **config}

    def register_module_override(
        self, module: nn.Module, param_name: str, config: dict[str, Any]
    ) -> None:
        """The same for whatever parameter ``module`` has by that name at an optimizer's step.

        Raises:
            ValueError: an unknown hyperparameter.
        """
        self._modules.append((weakref.ref(module), param_name, _checked(config)))

    def configs(self) -> Any:
        """By parameter: what is overridden. Empty, and cheap, where nothing is."""
        self._modules = [m for m in self._modules if m[0]() is not None]
        if not self._modules:
            return self._configs
        found = WeakIdKeyDictionary()
        for ref, name, config in self._modules:
            p = getattr(ref(), name, None)
            if isinstance(p, Tensor):
                found[p] = {**found.get(p, {}), **config}
        for p, config in self._configs.items():
            found[p] = {**found.get(p, {}), **config}
        return found


def _checked(config: Any) -> dict[str, Any]:
    unknown = [k for k in config if k not in KNOWN]
    if unknown:
        raise ValueError(
            f"{', '.join(map(str, unknown))} cannot be overridden for a parameter: "
            f"{', '.join(KNOWN)} can"
        )
    if config.get("optim_bits", 32) not in (8, 32):
        raise ValueError(f"optim_bits must be 8 or 32, got {config['optim_bits']}")
    return dict(config)
