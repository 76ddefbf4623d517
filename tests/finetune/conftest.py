"""A LLaMA of two small layers with random weights, and a byte-level tokenizer with ChatML."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tokenizer():
    """256 bytes and the special tokens; ``<|im_end|>`` ends a text and pads it as well."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(special + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        additional_special_tokens=special,
    )
    fast.chat_template = CHATML
    return fast


def make_model(**changes):
    """A random LLaMA: hidden 64, two layers, four heads over two key-value heads, tied words."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": 272,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        **changes,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**settings))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """The folder of a tiny model with its tokenizer. Not to be written to."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """A JSONL file of 40 questions with replies of unequal length."""
    path = tmp_path_factory.mktemp("data") / "questions.jsonl"
    with path.open("w") as file:
        for i in range(40):
            record = {
                "prompt": f"What is {i} plus {i % 7}?",
                "completion": f"It is {i + i % 7}." + " Really." * (i % 5),
            }
            file.write(json.dumps(record) + "\n")
    return path


# --- small runs, in this process ------------------------------------------------------------------


@dataclass
class Run:
    """A finetune that ended: its figures, its folder, what it said."""

    figures: dict
    folder: Path
    text: str

    @property
    def losses(self) -> list[float]:
        return [line["loss"] for line in self.figures["history"]]

    def adapter(self) -> dict:
        from safetensors.torch import load_file

        return load_file(self.folder / "adapter_model.safetensors")


@pytest.fixture
def no_plan(monkeypatch):
    """An empty memory plan: tracing one takes longer than the runs here."""
    from qlora_kernels.finetune import trainer

    empty = trainer.MemoryPlan({"trained parameters": 1, "optimizer states": 1}, {"now": 1})
    monkeypatch.setattr(trainer, "plan_memory", lambda *args, **kwargs: empty)
    monkeypatch.setattr(trainer, "draw_curves", lambda path, *args: path.write_bytes(b"PNG"))


@pytest.fixture(scope="session")
def _imported():
    """What a run imports, out of the garbage collector's sight: a run collects garbage twice, and
    going through all of torch each time would be half of it."""
    import gc

    import peft.utils.save_and_load  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import qlora_kernels.finetune.trainer  # noqa: F401

    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def train(_imported, tmp_path, tiny_model, tiny_data):
    """``train(output="out", **settings)``: a short finetune of the tiny model; a :class:`Run`.

    What a run that fails has said is in ``train.text``.
    """
    import io

    from rich.console import Console

    from qlora_kernels.finetune.config import resolve
    from qlora_kernels.finetune.trainer import finetune

    def run(output: str = "out", **settings) -> Run:
        settings = {
            "model_name_or_path": str(tiny_model),
            "dataset_name": str(tiny_data),
            "output_dir": str(tmp_path / output),
            "max_steps": 3,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "eval_split": 4,
            "max_length": 64,
            "dtype": "float32",
            "activation_checkpointing": False,
            "learning_rate": 1e-2,
            **settings,
        }
        said = io.StringIO()
        try:
            figures = finetune(resolve(settings), Console(file=said, width=200))
        finally:
            run.text = said.getvalue()
        return Run(figures, tmp_path / output, run.text)

    run.text = ""
    return run
