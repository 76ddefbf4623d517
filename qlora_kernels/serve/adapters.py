"""Several LoRA adapters on one quantized base, mixed in a batch.

Continuous batching packs the tokens of all requests into one row ``[1, tokens, hidden]``. PEFT
mixes adapters along the first axis, so an adapted layer gets that row turned into
``[tokens, hidden]`` with the name of an adapter for each token: the base's weight is read once for
all of them, and each adapter's two small products are taken of its own tokens. A batch that wants
one adapter, or none, goes through the fused op as everywhere else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..chat import _base_of, load
from ..finetune.errors import BadInput, bad_input

__all__ = ["BASE", "Mixer", "Served", "load_served"]

BASE = "__base__"
"""PEFT's name for no adapter."""


class Served:
    """A base and its adapters, loaded.

    Attributes:
        model: what generates: the transformers model itself, PEFT's layers inside.
        adapters: PEFT's name of each adapter, by the name that clients ask for.
        tokenizers: by the same names, and by "" for the base.
        mixer: switches rows between adapters; None without adapters.
    """

    def __init__(
        self, model: Any, adapters: dict[str, str], tokenizers: dict[str, Any], mixer: Mixer | None
    ) -> None:
        self.model, self.adapters, self.tokenizers, self.mixer = model, adapters, tokenizers, mixer


def load_served(
    model: str | None,
    adapters: Mapping[str, str],
    quant_type: str = "nf4",
    dtype: str = "auto",
) -> Served:
    """Loads a base as ``qlora chat`` does, and every adapter onto it.

    Args:
        model: folder or hub id; the one that the first adapter was trained on if None.
        adapters: folder by name.
        quant_type, dtype: as in :func:`qlora_kernels.chat.load`.

    Raises:
        BadInput: files that are missing or do not fit each other; an adapter of a type whose rows
            cannot be mixed with others in a batch.
    """
    from peft import PeftModel

    from ..finetune.model import load_tokenizer
    from ..integrations.adapters import check_adapter

    names = list(adapters)
    inside = {name: f"adapter_{i}" for i, name in enumerate(names)}  # a ModuleDict takes no dots
    if model is None and not names:
        raise BadInput("give --model, --adapter, or both")
    if model is None:
        model = _base_of(Path(adapters[names[0]]).expanduser(), None)
    loaded, tokenizer = load(model, None, quant_type, dtype)
    tokenizers = {"": tokenizer}
    folders = {name: Path(adapters[name]).expanduser() for name in names}
    for name, folder in folders.items():  # all of them, while the base is as it was
        with bad_input(f"the adapter {name}"):
            check_adapter(loaded, folder)
    for name, folder in folders.items():
        with bad_input(f"the adapter {name} in {folder}"):
            try:
                if name == names[0]:
                    loaded = PeftModel.from_pretrained(loaded, folder, adapter_name=inside[name])
                else:
                    loaded.load_adapter(folder, adapter_name=inside[name])
            except RuntimeError as error:  # of a type that is not LoRA, in other shapes
                raise ValueError(str(error).splitlines()[0]) from error
        own = (folder / "tokenizer_config.json").is_file()
        tokenizers[name] = load_tokenizer(folder) if own else tokenizer
        if tokenizer.chat_template is None and tokenizers[name].chat_template is not None:
            # A base without a template answers in the one that its finetune learnt.
            tokenizer.chat_template = tokenizers[name].chat_template
    loaded.eval()
    if not names:
        return Served(loaded, {}, tokenizers, None)
    mixer = Mixer(loaded)
    return Served(loaded.get_base_model(), inside, tokenizers, mixer)


class Mixer:
    """Sends each row of the next forward pass through its adapter.

    Args:
        model: a PeftModel, its adapters loaded.

    Raises:
        BadInput: an adapter holds something that PEFT does not mix in a batch.
    """

    def __init__(self, model: Any) -> None:
        from peft.tuners.lora.layer import LoraLayer, ParamWrapper
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        self.layers: list[Any] = []
        self.rows: list[str] | None = None  # of a mixed batch
        self.uniform: str | None = None  # the adapter that all rows take now
        for path, module in model.get_base_model().named_modules():
            what = None
            if isinstance(module, AuxiliaryTrainingWrapper):
                what = "a module trained in full (modules_to_save, new tokens)"
            elif isinstance(module, ParamWrapper):
                what = "LoRA on experts"
            elif isinstance(module, BaseTunerLayer) and not isinstance(module, LoraLayer):
                what = f"{type(module).__name__}, which is not LoRA"
            elif isinstance(module, LoraLayer) and any(module.use_dora.values()):
                what = "DoRA"
            if what is not None:
                raise BadInput(
                    f"an adapter has {what} at {path}, and such cannot be mixed with others in a "
                    "batch: put it into its base by `qlora merge`, and serve that as --model"
                )
            if isinstance(module, LoraLayer):
                self.layers.append(module)
        for layer in self.layers:
            layer.register_forward_pre_hook(self._before, with_kwargs=True)
            layer.register_forward_hook(self._after)
        self._switch(BASE)

    def set_rows(self, names: Sequence[str]) -> None:
        """The adapter of each row (token) of the next forward pass; :data:`BASE` for none."""
        kinds = set(names)
        if len(kinds) == 1:
            self.rows = None
            self._switch(next(iter(kinds)))
            return
        if self.uniform is not None:
            self._switch(None)
        self.rows = list(names)

    def _switch(self, name: str | None) -> None:
        if name == self.uniform and self.layers:
            return
        self.uniform = name
        for layer in self.layers:
            layer.enable_adapters(name != BASE)
            if name not in (BASE, None):
                layer.set_adapter([name], inference_mode=True)

    def _before(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.rows is None:
            return None
        (x, *rest) = args
        return (x.squeeze(0), *rest), {**kwargs, "adapter_names": self.rows}

    def _after(self, layer: Any, args: Any, output: Any) -> Any:
        return None if self.rows is None else output.unsqueeze(0)
