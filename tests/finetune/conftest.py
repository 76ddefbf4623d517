"""Finetunes of the tiny model, short enough for many of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest


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
