"""How good a finetuned model is on held-out samples, sample by sample.

Sample by sample, because samples are what intervals are over: two models are compared on each, and
what they share (a reply that is hard for every model) falls out of the difference.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..finetune.checkpoint import replace_file, write_json
from ..finetune.config import FinetuneConfig, read_yaml, resolve
from ..finetune.data import IGNORE, Collator, DataOptions, Samples, prepare
from ..finetune.errors import RunError, bad_input
from ..finetune.model import load_tokenizer

__all__ = ["measure", "sample_losses"]

_LONGEST = 1024  # tokens of a held-out sample, however long training's may be
_BATCH_TOKENS = 2048  # in one forward pass, padding counted


def measure(
    run: Path, evaluations: Sequence[Mapping[str, Any]], cache: Path
) -> dict[str, dict[str, Any]]:
    """Every evaluation of the model that the finetune in ``run`` made, and of its base.

    Args:
        run: a finished ``output_dir`` of ``qlora finetune``.
        evaluations: as in :class:`.plan.Planned`.
        cache: where the base model's figures are kept, for the other finetunes of the sweep.

    Returns:
        name -> kind, digest, values and base: one number a sample.
    """
    from peft import get_peft_model

    from ..finetune.trainer import load_adapter
    from ..nn import Linear4bit

    config = resolve({}, read_yaml(run / "config.yaml"))
    tokenizer = load_tokenizer(run if (run / "tokenizer_config.json").is_file() else _base(config))
    model = _load_base(config)
    assert config.quant_type == "none" or any(isinstance(m, Linear4bit) for m in model.modules())
    found = {}
    for entry in evaluations:
        name = hashlib.sha256(_told(config, entry).encode()).hexdigest()[:16]
        found[entry["name"]] = {
            "kind": entry["kind"],
            "digest": entry["digest"],
            "base": _cached(cache / f"{name}.json", lambda e=entry: _values(model, tokenizer, e)),
        }
    model = get_peft_model(model, config.lora_config())
    load_adapter(model, run)
    model.eval()
    for entry in evaluations:
        values = _values(model, tokenizer, entry)
        base = found[entry["name"]]["base"]
        if len(base) != len(values):
            raise RunError(
                f"{entry['name']}: {len(values)} values, and {len(base)} of the base model: delete "
                f"{cache}, which is of other samples"
            )
        found[entry["name"]]["values"] = values
    return found


def _base(config: FinetuneConfig) -> Path:
    from ..integrations.transformers import _local_folder

    with bad_input("model"):
        return Path(_local_folder(config.model_name_or_path, config.model_revision, None))


def _load_base(config: FinetuneConfig) -> Any:
    """The model as the finetune had it, without its adapter."""
    from ..integrations.transformers import default_dtype, load_quantized_model

    dtype = default_dtype() if config.dtype == "auto" else getattr(torch, config.dtype)
    common: dict[str, Any] = {
        "dtype": dtype,
        "attn_implementation": config.attn_implementation,
        "trust_remote_code": config.trust_remote_code,
        "device_map": {"": "cuda:0" if torch.cuda.is_available() else "cpu"},
    }
    with bad_input("model"):
        if config.quant_type == "none":
            from transformers import AutoModelForCausalLM

            model = AutoModelForCausalLM.from_pretrained(_base(config), **common)
        else:
            model = load_quantized_model(
                _base(config),
                compute_dtype=config.compute_dtype,
                skip_modules=config.skip_modules,
                quant_type=config.quant_type,
                blocksize=config.blocksize,
                double_quant=config.double_quant,
                **common,
            )
    return model.eval()


def _told(config: FinetuneConfig, entry: Mapping[str, Any]) -> str:
    """Everything that the base model's figures depend on."""
    names = (
        "model_name_or_path model_revision dtype attn_implementation quant_type blocksize "
        "double_quant compute_dtype skip_modules chat_template_path"
    )
    settings = {name: config.values.get(name) for name in names.split()}
    return json.dumps([settings, entry["kind"], entry["digest"]], sort_keys=True, default=str)


def _cached(path: Path, compute: Any) -> list[float]:
    if path.is_file():
        return json.loads(path.read_text("utf-8"))
    values = compute()
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda aside: write_json(aside, values))
    return values


def _values(model: Any, tokenizer: Any, entry: Mapping[str, Any]) -> list[float]:
    if entry["kind"] == "mmlu":
        return _mmlu(model, tokenizer, entry)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or _LONGEST
    options = DataOptions(
        source=entry["source"],
        eval_split=0,
        train_on="replies",
        max_length=min(context, _LONGEST),
        chat_template=tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None,
    )
    with bad_input(f"evaluation {entry['name']}"):
        samples = prepare(options, tokenizer).train
    return sample_losses(model, samples, tokenizer).tolist()


def sample_losses(
    model: Any, samples: Samples, tokenizer: Any, batch_tokens: int = _BATCH_TOKENS
) -> np.ndarray:
    """The mean loss of each sample's trained tokens, in nats: float64 ``[len(samples)]``.

    Args:
        model: a causal language model in evaluation mode.
        samples: not packed; each has a trained token.
        batch_tokens: of one forward pass, padding counted; its logits are held at once.
    """
    collate = Collator(tokenizer)
    order = np.argsort(-np.asarray(samples.lengths), kind="stable")
    losses = np.empty(len(samples))
    device = next(model.parameters()).device
    at = 0
    while at < len(order):
        length = int(samples.lengths[order[at]])
        batch = order[at : at + max(1, batch_tokens // length)]
        at += len(batch)
        inputs = {k: v.to(device) for k, v in collate([samples[int(i)] for i in batch]).items()
                  if isinstance(v, torch.Tensor)}  # fmt: skip
        labels = inputs.pop("labels")[:, 1:]
        with torch.inference_mode():
            logits = model(**inputs, use_cache=False).logits[:, :-1]
            chosen = labels != IGNORE
            each = torch.nn.functional.cross_entropy(
                logits[chosen].float(), labels[chosen], reduction="none"
            ).double()
        rows = torch.arange(len(batch), device=device)[:, None].expand_as(labels)[chosen]
        sums = torch.zeros(len(batch), dtype=torch.float64, device=device).index_add_(0, rows, each)
        losses[batch] = (sums / chosen.sum(1)).cpu().numpy()
    if not np.isfinite(losses).all():
        raise RunError("the loss of a held-out sample is not finite")
    return losses


def _mmlu(model: Any, tokenizer: Any, entry: Mapping[str, Any]) -> list[float]:
    """1 for each right answer, 0 for each wrong one, by subject and place."""
    from ..evaluate.mmlu import measure as answers
    from ..evaluate.mmlu_data import read_mmlu

    data = read_mmlu(entry["source"], entry["split"], entry["shots"], limit=entry["limit"])
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2048
    found = answers(model, tokenizer, data, max_length=min(context, 2048))
    return [float(answer.correct) for answer in found]
