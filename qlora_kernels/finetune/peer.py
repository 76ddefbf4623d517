"""bitsandbytes + PEFT, put together as their documentation does: what the demo and the benchmarks
compare with.

Nothing of this package's own runs in it; that the package is there costs the peer's process some
4 MB, three thousandths of the peaks that are compared.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["peer_model", "peer_settings"]


def peer_model(
    folder: str | Path, dtype: Any, *, rank: int, alpha: int, quantized: bool = True
) -> Any:
    """A model with LoRA on all linear layers, ready to train.

    Args:
        folder: of the base model.
        dtype: torch's, of what is not quantized and of what is computed.
        rank, alpha: LoRA's.
        quantized: NF4 with double quantization by bitsandbytes; else dense.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": "sdpa"}
    if quantized:
        if not torch.cuda.is_available():
            options["device_map"] = {"": "cpu"}
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    model.requires_grad_(False)
    torch.manual_seed(0)
    lora = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, lora)


def peer_settings(output_dir: str, steps: int, batch: int, learning_rate: float) -> dict[str, Any]:
    """TrainingArguments of a few plain steps: no checkpoints, no reports, no autocast."""
    return {
        "output_dir": output_dir,
        "max_steps": steps,
        "per_device_train_batch_size": batch,
        "learning_rate": learning_rate,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
