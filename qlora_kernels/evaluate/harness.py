"""``qlora harness``: lm-evaluation-harness with this package's models, for every task that it has.

A model type ``qlora`` is registered with it: a base model, quantized as it loads on these kernels,
and an adapter. The command is the harness's own, with that type there::

    qlora harness --model_args pretrained=FOLDER,adapter=FOLDER --tasks crows_pairs_english

All else (tasks, prompts, metrics, options) is the harness's.
"""

from __future__ import annotations

import difflib
import logging
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from ..finetune.errors import BadInput

__all__ = ["QLoraLM", "run"]

# Of the harness's own arguments for models, those that mean something once a model is loaded.
_PASSED_ON = (
    "add_bos_token",
    "chat_template_args",
    "enable_thinking",
    "logits_cache",
    "max_batch_size",
    "max_length",
    "prefix_token_id",
    "softmax_dtype",
    "think_end_token",
    "truncation",
)
_OWN = ("pretrained", "adapter", "quant_type", "dtype", "batch_size", "device")


@register_model("qlora")
class QLoraLM(HFLM):
    """A model of this package for the harness.

    Args:
        pretrained: folder or hub id of the base model; that of the adapter if left out.
        adapter: folder of a PEFT adapter, as ``qlora finetune`` leaves it.
        quant_type: 4-bit format, or ``none`` for 16 bits; a checkpoint that is quantized already
            keeps its own unless another than nf4 is asked for.
        dtype: of what is not quantized.
        batch_size: requests of one forward pass; ``auto`` finds the largest.
        device: the model goes where `qlora chat` puts it, and another place is an error; the
            harness's default, cuda, is taken for none where there is no GPU.

    Raises:
        BadInput: a model or adapter that cannot be loaded, an argument that has no meaning here.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        adapter: str | None = None,
        quant_type: str = "nf4",
        dtype: str = "auto",
        batch_size: int | str = 8,
        device: str | None = None,
        **others: Any,
    ) -> None:
        from ..chat import load

        for name in others:
            if name not in _PASSED_ON:
                near = difflib.get_close_matches(name, [*_OWN, *_PASSED_ON], n=1)
                hint = f"; the nearest is {near[0]}" if near else ""
                raise BadInput(f"model_args: {name} has no meaning for the model type qlora{hint}")
        model, tokenizer = load(pretrained, adapter, quant_type, dtype)
        default = str(device).startswith("cuda") and not torch.cuda.is_available()
        if device and not default and torch.device(device).type != model.device.type:
            raise BadInput(f"device is {device}, but the model is on {model.device}: leave it out")
        with _without_advice():
            super().__init__(
                pretrained=model,
                tokenizer=tokenizer,
                backend="causal",
                batch_size=batch_size,
                **others,
            )
        # What the results name; the model itself is there already.
        self.pretrained = pretrained or model.peft_config["default"].base_model_name_or_path
        self.adapter = adapter

    def get_model_info(self) -> dict[str, Any]:
        """What the results say of the model: our formats have no revision on a hub."""
        from ..nn import Linear4bit

        layers = [m for m in self.model.modules() if isinstance(m, Linear4bit)]
        weights = sum(m.in_features * m.out_features for m in layers)
        bits = sum(m.bits_per_weight * m.in_features * m.out_features for m in layers)
        return {
            "model_num_parameters": self.model.num_parameters(),
            "model_dtype": str(self.model.dtype),
            "adapter": self.adapter,
            "quant_types": sorted({str(m.quant_type) for m in layers}) or ["none"],
            "bits_per_weight": bits / weights if weights else None,
        }


@contextmanager
def _without_advice() -> Any:
    """The harness warns of what a loaded model makes it ignore: that is refused above instead."""
    logger = logging.getLogger("lm_eval.models.huggingface")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def run(arguments: Sequence[str]) -> int:
    """Runs the harness with the words of its own command line; returns the exit code.

    ``run`` (in place of ``ls`` and ``validate``) and ``--model qlora`` may be left out.
    """
    from lm_eval._cli import HarnessCLI
    from lm_eval.utils import setup_logging

    words = list(arguments)
    if not words or words[0] in ("-h", "--help"):
        from ..cli import COMMANDS

        print(f"qlora harness: {COMMANDS['harness'].what}; the words are the harness's own.\n"
              f"example: {COMMANDS['harness'].example}\n")  # fmt: skip
        words = ["--help"]
    elif words[0].startswith("-"):
        words = ["run", *words]
    if words[0] == "run" and not any(w.partition("=")[0] in ("--model", "-M") for w in words):
        words += ["--model", "qlora"]
    setup_logging()
    before, sys.argv = sys.argv, ["qlora harness", *words]
    try:
        cli = HarnessCLI()
        cli.execute(cli.parse_args())
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    finally:
        sys.argv = before
    return 0
