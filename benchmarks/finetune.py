"""A finetune step of SmolLM2-135M: this package, bitsandbytes + PEFT, and a dense control.

    python benchmarks/finetune.py --model <folder of SmolLM2-135M-Instruct in safetensors>

Batch 4 x 256 tokens, LoRA of rank 16 on all linear layers, AdamW, no activation checkpointing, all
tokens trained; everybody gets the same rows in the same order and one dtype: bf16 where the
processor multiplies it, else fp32.

    ours           qlora finetune: its model, its loss, its trainer
    dense, ours    the control: qlora finetune on the dense model (quant_type none)
    bnb, Trainer   bitsandbytes + PEFT under transformers' Trainer
    bnb, TRL       the same under TRL's SFTTrainer with its default, chunked loss

Each contender runs in a process of its own, whose largest resident set is its peak. Ours and one
other run at a time and take turns step by step, so that the machine's other work falls on both.
A contender is right when its first loss equals ours within 2%: same weights, same tokens. Of a
dense one, whose weights were not rounded to 4 bits, within 10%: NF4 costs so small a model 7%.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness

CONTENDERS = {
    "bnb-trainer": "bnb, Trainer",
    "bnb-trl": "bnb, TRL",
    "dense-ours": "dense, ours",
    "dense-trainer": "dense, Trainer",
}
SKIPPED = 2  # first steps, which allocate
RANK = 16


# --- data and a small model ---------------------------------------------------------------------


def write_data(path: Path, rows: int, characters: int) -> None:
    """Texts from Python's standard library, each longer than a row."""
    import sysconfig

    text = ""
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            text += file.read_text("utf-8")
        if len(text) >= rows * characters:
            break
    with path.open("w") as out:
        for i in range(rows):
            out.write(json.dumps({"text": text[i * characters : (i + 1) * characters]}) + "\n")


def make_tiny_model(folder: Path) -> None:
    """A random LLaMA with a byte-level tokenizer, for quick runs."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(["<end>", *letters])},
                                   merges=[]))  # fmt: skip
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<end>", pad_token="<end>", bos_token="<end>"
    )
    config = LlamaConfig(
        vocab_size=272,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def find_model(args: argparse.Namespace) -> Path:
    """``--model``, or the demo's converted model, which is made if need be."""
    if args.model is not None:
        return args.model
    from qlora_kernels import demo

    return demo.converted_model(None)


# --- a contender's process ----------------------------------------------------------------------


def turns(args: argparse.Namespace) -> Any:
    """A Trainer callback that waits for its turn before each step and tells how long it took."""
    from transformers import TrainerCallback

    class Turns(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if not os.read(args.turn, 1):  # the other end is gone
                raise SystemExit(1)
            self.wall, self.cpu = time.perf_counter(), time.process_time()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            wall, cpu = time.perf_counter() - self.wall, time.process_time() - self.cpu
            os.write(args.done, (json.dumps({"wall": wall, "cpu": cpu}) + "\n").encode())

    return Turns()


def run_ours(args: argparse.Namespace, dtype: str, dense: bool) -> dict[str, Any]:
    """``qlora finetune`` with a callback put into its trainer."""
    from rich.console import Console

    from qlora_kernels.finetune import trainer as application
    from qlora_kernels.finetune.config import resolve
    from qlora_kernels.nn import Linear4bit

    layers: dict[str, int] = {}

    class TakesTurns(application.QLoraTrainer):
        def __init__(self, *positional: Any, **named: Any) -> None:
            super().__init__(*positional, **named)
            self.add_callback(turns(args))
            for module in self.model.modules():
                if isinstance(module, Linear4bit):
                    layers["weights"] = layers.get("weights", 0) + (
                        module.in_features * module.out_features
                    )

    application.QLoraTrainer = TakesTurns  # type: ignore[misc]
    with tempfile.TemporaryDirectory() as folder:
        config = resolve(
            {
                "model_name_or_path": str(args.model),
                "dataset_name": str(args.data),
                "output_dir": folder,
                "dtype": dtype,
                "quant_type": "none" if dense else "nf4",
                "train_on": "all",
                "max_length": args.length,
                "eval_split": 0,
                "max_steps": args.steps,
                "per_device_train_batch_size": args.batch,
                "gradient_accumulation_steps": 1,
                "train_sampling_strategy": "sequential",
                "activation_checkpointing": False,
                "learning_rate": 1e-4,
                "max_grad_norm": 1.0,
                "warmup_steps": 0,
                "r": RANK,
                "lora_alpha": RANK,
                "lora_dropout": 0.0,
                "save_strategy": "no",
                "disable_tqdm": True,
                "force": True,
            }
        )
        figures = application.finetune(config, Console(file=sys.stderr))
    history = figures["history"]
    return {
        "tokens": [h["tokens"] for h in history],
        "losses": [h["loss"] for h in history],
        "quantized_weights": layers.get("weights", 0),
        "bits_per_weight": figures["bits_per_weight"],
    }


def run_peer(
    args: argparse.Namespace, dtype: str, quantized: bool, trl: bool, prepare: Any = None
) -> dict[str, Any]:
    """The model that bitsandbytes' and PEFT's documentation builds, under Trainer or TRL.

    ``prepare`` gets the trainer once it is made.
    """
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer

    from qlora_kernels.finetune.peer import peer_model, peer_settings

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = []
    for line in args.data.read_text().splitlines():
        ids = tokenizer(json.loads(line)["text"])["input_ids"][: args.length]
        rows.append({"input_ids": ids, "labels": list(ids)})
    model = peer_model(
        args.model, getattr(torch, dtype), rank=RANK, alpha=RANK, quantized=quantized
    )
    with tempfile.TemporaryDirectory() as folder:
        common: dict[str, Any] = {
            **peer_settings(folder, args.steps, args.batch, 1e-4),
            "train_sampling_strategy": "sequential",
            "logging_steps": 1,
            "use_cpu": True,
            "bf16": False,  # TRL would set autocast; the model is in its dtype already
            "gradient_checkpointing": False,
        }
        if trl:
            from trl import SFTConfig, SFTTrainer

            trainer = SFTTrainer(
                model,
                SFTConfig(max_length=args.length, **common),
                train_dataset=Dataset.from_list(rows),
                processing_class=tokenizer,
                callbacks=[turns(args)],
            )
        else:
            from transformers import Trainer, TrainingArguments

            trainer = Trainer(
                model,
                TrainingArguments(**common),
                train_dataset=rows,
                data_collator=lambda batch: {
                    key: torch.tensor([row[key] for row in batch]) for key in batch[0]
                },
                callbacks=[turns(args)],
            )
        if prepare is not None:
            prepare(trainer)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"losses": losses}


def child(args: argparse.Namespace, name: str) -> None:
    dtype = args.dtype
    if name in ("ours", "dense-ours"):
        figures = run_ours(args, dtype, dense=name == "dense-ours")
    else:
        kind, trainer = name.split("-")
        figures = run_peer(args, dtype, quantized=kind == "bnb", trl=trainer == "trl")
    figures["peak"] = harness.peak_resident()
    os.write(args.done, (json.dumps(figures) + "\n").encode())


# --- the duel -----------------------------------------------------------------------------------


class Process:
    """A contender in a process of its own, that takes a step when it is told to."""

    def __init__(self, args: argparse.Namespace, name: str, script: str = __file__) -> None:
        self.name = name
        turn, self._turn = os.pipe()
        done, write = os.pipe()
        self._done = os.fdopen(done)
        self._log = tempfile.TemporaryFile("w+")
        command = [
            sys.executable, script, "--child", name, "--turn", str(turn), "--done", str(write),
            "--model", str(args.model), "--data", str(args.data), "--steps", str(args.steps),
            "--batch", str(args.batch), "--length", str(args.length), "--dtype", args.dtype,
            "--threads", str(args.threads),
        ]  # fmt: skip
        self._process = subprocess.Popen(
            command, pass_fds=(turn, write), stdout=self._log, stderr=self._log
        )
        os.close(turn)
        os.close(write)

    def _read(self) -> dict[str, Any]:
        line = self._done.readline()
        if not line:
            self._process.wait()
            self._log.seek(0)
            raise RuntimeError(f"{self.name} ended early:\n{self._log.read()[-3000:]}")
        return json.loads(line)

    def step(self) -> harness.Sample:
        os.write(self._turn, b".")
        return harness.Sample(**self._read())

    def end(self) -> dict[str, Any]:
        figures = self._read()
        self.close()
        return figures

    def close(self) -> None:
        self._process.wait(60)
        os.close(self._turn)
        self._done.close()
        self._log.close()


def duel(args: argparse.Namespace, other: str) -> tuple[harness.Race, dict[str, dict[str, Any]]]:
    """Steps of ours and of another in turn; what both told at their end."""
    race = harness.Race(args.clock, {"ours": [], other: []})
    processes = [Process(args, "ours"), Process(args, other)]
    for step in range(args.steps):
        for process in processes:
            taken = process.step()
            if step >= SKIPPED:
                race.samples[process.name].append(taken)
    ends = {process.name: process.end() for process in processes}
    ours, theirs = ends["ours"]["losses"][0], ends[other]["losses"][0]
    if abs(theirs - ours) > (0.1 if other.startswith("dense") else 0.02) * ours:
        race.failed[other] = f"its first loss is {theirs:.4f}, ours {ours:.4f}"
    return race, ends


def verdicts(results: dict[str, dict[str, Any]], weight_bytes: int) -> list[list[str]]:
    """Each bar, what was measured, held or missed."""
    rows = []

    def judge(name: str, text: str, value: float, held: bool) -> None:
        rows.append([CONTENDERS[name], text, f"{value:.2f}", "held" if held else "missed"])

    for name in ("bnb-trainer", "bnb-trl"):
        if name in results:
            speed, share = results[name]["speed"].median, results[name]["memory"]
            judge(name, "tokens/s >= 1.5 x", speed, speed >= 1.5)
            judge(name, "peak memory <= 0.65 x", share, share <= 0.65)
    if "dense-ours" in results:
        speed = results["dense-ours"]["speed"].median
        judge("dense-ours", "tokens/s >= 1.05 x", speed, speed >= 1.05)
        saved = results["dense-ours"]["saved"] / weight_bytes
        judge("dense-ours", "memory saved >= 0.9 x weights saved", saved, saved >= 0.9)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="folder; the demo's model unless given")
    parser.add_argument("--against", nargs="+", choices=CONTENDERS,
                        default=["bnb-trainer", "bnb-trl", "dense-ours"])  # fmt: skip
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="by hardware unless given")
    harness.add_child_arguments(parser)
    harness.add_arguments(parser)
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    harness.begin(args)
    if args.child:
        child(args, args.child)
        return 0
    machine = harness.describe_machine(args.threads)
    if args.dtype is None:
        args.dtype = "bfloat16" if harness.has_bf16_products(machine) else "float32"
    args.steps = SKIPPED + args.pairs
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        args.data = Path(folder) / "texts.jsonl"
        if args.quick:
            args.batch, args.length, args.model = 2, 32, Path(folder) / "model"
            make_tiny_model(args.model)
        args.model = find_model(args)
        write_data(args.data, args.batch * args.steps, 8 * args.length)
        for name in args.against:
            race, ends = duel(args, name)
            ours, other = ends["ours"], ends[name]
            results[name] = {
                "race": race,
                "speed": race.ratio("ours", name),
                "tokens_per_second": {
                    n: args.batch * args.length / race.time(n).median for n in race.samples
                },
                "memory": ours["peak"] / other["peak"],
                "saved": other["peak"] - ours["peak"],
                "ends": ends,
            }
            if set(ours["tokens"]) != {args.batch * args.length}:
                raise RuntimeError(f"rows are not full: {ours['tokens']}")
    return report(args, machine, results)


def report(args: argparse.Namespace, machine: dict, results: dict[str, dict[str, Any]]) -> int:
    ends = next(iter(results.values()))["ends"]["ours"]
    width = 2 if args.dtype == "bfloat16" else 4
    weight_bytes = ends["quantized_weights"] * (width - (ends["bits_per_weight"] or 0) / 8)
    rows = []
    for name, found in results.items():
        speed, told = found["tokens_per_second"], found["ends"]
        rows.append(
            [
                CONTENDERS[name],
                f"{speed['ours']:.1f}",
                f"{speed[name]:.1f}",
                found["speed"].text(),
                f"{told['ours']['peak'] / 1e6:.0f}",
                f"{told[name]['peak'] / 1e6:.0f}",
                f"{found['memory']:.2f}",
                f"{told['ours']['losses'][0]:.4f}",
                f"{told[name]['losses'][0]:.4f}",
            ]
        )
    print(f"\n{harness.machine_line(machine)}")
    shape = f"{args.batch} x {args.length} tokens a step, LoRA r = {RANK}"
    print(f"{args.model}, {args.dtype}, {shape}, clock: {args.clock}\n")
    head = ["against", "ours, tokens/s", "its", "times as fast", "ours, peak MB", "its",
            "share", "first loss", "its"]  # fmt: skip
    harness.print_table(head, rows)
    print()
    judged = verdicts(results, weight_bytes)
    harness.print_table(["against", "bar", "measured", "verdict"], judged)
    failed = {n: found["race"].failed for n, found in results.items() if found["race"].failed}
    for name, why in failed.items():
        print(f"FAILED: {name}: {why}")
    harness.write_json(args, {
        "dtype": args.dtype,
        "weight_bytes_saved": weight_bytes,
        "results": {
            name: {
                "tokens_per_second": found["tokens_per_second"],
                "memory": found["memory"],
                "saved": found["saved"],
                "ends": found["ends"],
                **found["race"].as_json(),
            }
            for name, found in results.items()
        },
        "verdicts": judged,
    })  # fmt: skip
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
