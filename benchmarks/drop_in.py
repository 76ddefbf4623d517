"""One script, once with bitsandbytes + PEFT and once with the changed line, on SmolLM2-135M.

    python benchmarks/drop_in.py --model <folder of SmolLM2-135M-Instruct in safetensors>

The script is what the documentation of transformers, PEFT and bitsandbytes builds
(``qlora_kernels.finetune.peer``): a ``BitsAndBytesConfig`` of NF4 with double quantization, LoRA of
rank 16 on all linear layers, a trainer.

    bnb        as it stands
    line       after ``qlora_kernels.enable()``, nothing else changed
    with loss  ... and ``qlora_kernels.loss.install(trainer)``
    compiled   (generation) the line, and ``compile_generation(model)``

**train**: batch 4 x 256 tokens under transformers' Trainer and under TRL's SFTTrainer with its
default, chunked loss. Each way in a process of its own, whose largest resident set is its peak;
all take turns step by step, so that the machine's other work falls on all. **generate**: through
transformers' own ``generate``, greedy, in turns too. **losses**: the same rows, weights and order,
no dropout; how far each step's loss is from bitsandbytes', and bitsandbytes' at one thread from its
own at more. Every bar is printed with what was measured.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import finetune as models
import harness
from finetune import RANK, SKIPPED, Process

TRAINERS = {"trainer": "Trainer", "sft": "SFTTrainer"}
TRAIN_WAYS = ("bnb", "line", "with loss")
GENERATE_WAYS = ("bnb", "line", "compiled")
PROMPT = 16
WARM_UP = 2  # calls of generate: the first compiles


# --- a way's process ----------------------------------------------------------------------------


def take_over(way: str) -> None:
    """The changed line."""
    if way != "bnb":
        import qlora_kernels

        qlora_kernels.enable(verbose=False)


def prepared(way: str) -> Any:
    if way != "with loss":
        return None
    from qlora_kernels import loss

    return loss.install


def run_training(args: argparse.Namespace, way: str, trainer: str) -> dict[str, Any]:
    take_over(way)
    return models.run_peer(args, args.dtype, True, trainer == "sft", prepared(way))


def run_generation(args: argparse.Namespace, way: str) -> dict[str, Any]:
    """A call of ``generate`` at each turn."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    take_over(way)
    dtype = getattr(torch, args.dtype)
    model = AutoModelForCausalLM.from_pretrained(
        args.model,
        dtype=dtype,
        device_map={"": "cpu"},
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        ),
    )
    if way == "compiled":
        from qlora_kernels.integrations.generation import compile_generation

        compile_generation(model, max_cache_len=PROMPT + args.length)
    torch.manual_seed(0)
    prompt = torch.randint(1, min(model.config.vocab_size, 40000), (1, PROMPT))
    tokens, seconds = None, []
    for _ in range(args.steps):
        if not os.read(args.turn, 1):  # the other end is gone
            raise SystemExit(1)
        wall, cpu = time.perf_counter(), time.process_time()
        tokens = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=args.length,
            min_new_tokens=args.length,
            do_sample=False,
        )
        taken = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        seconds.append(taken["wall"])
        os.write(args.done, (json.dumps(taken) + "\n").encode())
    return {"tokens": tokens[0, PROMPT:].tolist(), "first_call": seconds[0]}


def child(args: argparse.Namespace, name: str) -> None:
    what, way, *trainer = name.split(":")
    if what == "generate":
        figures = run_generation(args, way)
    else:
        figures = run_training(args, way, trainer[0])
    figures["peak"] = harness.peak_resident()
    os.write(args.done, (json.dumps(figures) + "\n").encode())


# --- turns --------------------------------------------------------------------------------------


def take_turns(
    args: argparse.Namespace, names: list[str], skipped: int
) -> tuple[harness.Race, dict[str, dict[str, Any]]]:
    """``args.steps`` turns of each process; what they took, and what they told at the end."""
    race = harness.Race(args.clock, {name: [] for name in names})
    processes = [Process(args, name, __file__) for name in names]
    for step in range(args.steps):
        for process in processes:
            taken: harness.Sample = process.step()
            if step >= skipped:
                race.samples[process.name].append(taken)
    return race, {process.name: process.end() for process in processes}


def with_settings(args: argparse.Namespace, **changes: Any) -> argparse.Namespace:
    changed = copy.copy(args)
    for name, value in changes.items():
        setattr(changed, name, value)
    return changed


class Report:
    """Rows for the tables, and everything for the JSON."""

    def __init__(self) -> None:
        self.figures: dict[str, Any] = {}
        self.bars: list[list[str]] = []
        self.failed = 0

    def judge(self, name: str, bar: str, value: float, met: bool, digits: str = ".2f") -> None:
        self.bars.append([name, bar, format(value, digits), "met" if met else "missed"])

    def fail(self, name: str, why: str) -> None:
        self.failed += 1
        print(f"FAILED: {name}: {why}")


def train(args: argparse.Namespace, report: Report) -> None:
    steps = with_settings(args, steps=SKIPPED + args.pairs)
    rows = []
    for trainer, title in TRAINERS.items():
        names = {way: f"train:{way}:{trainer}" for way in TRAIN_WAYS}
        race, ends = take_turns(steps, list(names.values()), SKIPPED)
        peer = names["bnb"]
        for way, name in names.items():
            best = race.time(name).low
            rows.append([
                f"{title}, {way}", f"{args.batch * args.length / best:.1f}",
                race.ratio(name, peer).text() if way != "bnb" else "",
                f"{ends[name]['peak'] / 1e6:.0f}",
                f"{ends[name]['peak'] / ends[peer]['peak']:.2f}" if way != "bnb" else "",
                f"{ends[name]['losses'][0]:.4f}",
            ])  # fmt: skip
            if abs(ends[name]["losses"][0] / ends[peer]["losses"][0] - 1) > 0.02:
                report.fail(name, "its first loss is not the peer's")
        line, loss = (race.ratio(names[way], peer).median for way in ("line", "with loss"))
        share = ends[names["with loss"]]["peak"] / ends[peer]["peak"]
        report.judge(title, "the line alone: tokens/s >= 1.3 x", line, line >= 1.3)
        report.judge(title, "with the loss: tokens/s >= 1.5 x", loss, loss >= 1.5)
        report.judge(title, "with the loss: peak <= 0.65 x", share, share <= 0.65)
        report.figures[trainer] = {"ends": ends, **race.as_json()}
    print(f"\ntraining, {args.batch} x {args.length} tokens a step, LoRA r = {RANK}\n")
    harness.print_table(["way", "tokens/s", "times bnb's", "peak, MB", "share", "first loss"], rows)


def generate(args: argparse.Namespace, report: Report) -> None:
    steps = with_settings(args, steps=WARM_UP + args.pairs, length=args.tokens)
    names = {way: f"generate:{way}" for way in GENERATE_WAYS}
    race, ends = take_turns(steps, list(names.values()), WARM_UP)
    peer, rows = names["bnb"], []
    for way, name in names.items():
        same = sum(a == b for a, b in zip(ends[name]["tokens"], ends[peer]["tokens"], strict=True))
        rows.append([
            way, f"{args.tokens / race.time(name).low:.1f}",
            race.ratio(name, peer).text() if way != "bnb" else "",
            f"{ends[name]['first_call']:.1f}", f"{same}/{args.tokens}",
        ])  # fmt: skip
        ratio = race.ratio(name, peer).median
        if way != "bnb":
            report.judge(f"generate, {way}", "tokens/s >= 3 x", ratio, ratio >= 3)
    report.figures["generate"] = {"ends": ends, **race.as_json()}
    print(f"\ngenerate, {args.tokens} tokens after {PROMPT}\n")
    harness.print_table(
        ["way", "tokens/s", "times bnb's", "first call, s", "tokens as bnb's"], rows
    )


def losses(args: argparse.Namespace, report: Report) -> None:
    """Loss by loss: ours from the peer's, the peer's from its own at another number of threads."""
    other = max(2, args.threads)
    settings = {"steps": args.loss_steps, "batch": 1, "length": args.loss_length}
    rows = []
    for dtype in ("float32", "bfloat16"):
        found: dict[str, list[float]] = {}
        runs = {"peer": ("bnb", other), "ours": ("line", other), "peer, 1 thread": ("bnb", 1)}
        for run, (way, threads) in runs.items():
            name = f"losses:{way}:trainer"
            run_args = with_settings(args, **settings, dtype=dtype, threads=threads)
            found[run] = take_turns(run_args, [name], 0)[1][name]["losses"]

        def apart(a: str, b: str, found: dict[str, list[float]] = found) -> list[float]:
            return [abs(x - y) / y for x, y in zip(found[a], found[b], strict=True)]

        ours, own = max(apart("ours", "peer")), max(apart("peer, 1 thread", "peer"))
        rows.append([dtype, str(args.loss_steps), f"{ours:.1e}", f"{own:.1e}"])
        if dtype == "float32":
            report.judge("losses, fp32", "apart by <= 1e-4", ours, ours <= 1e-4, ".1e")
        else:
            bar = f"apart by <= 2 x {own:.1e}"
            report.judge("losses, bf16", bar, ours, ours <= 2 * own, ".1e")
        report.figures[f"losses_{dtype}"] = found
    print(f"\nlosses of {args.loss_steps} steps of {args.loss_length} tokens, the largest apart\n")
    harness.print_table(["dtype", "steps", "ours, bnb", f"bnb, 1 and {other} threads"], rows)


PARTS = {"train": train, "generate": generate, "losses": losses}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="folder; the demo's model unless given")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=48, help="new tokens of a generate call")
    parser.add_argument("--loss-steps", type=int, default=100)
    parser.add_argument("--loss-length", type=int, default=64, help="tokens of such a step")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="by hardware unless given")
    harness.add_child_arguments(parser)
    harness.add_arguments(parser)
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    harness.begin(args)
    if args.child:
        with contextlib.suppress(BrokenPipeError):
            child(args, args.child)
        return 0
    machine = harness.describe_machine(args.threads)
    if args.dtype is None:
        args.dtype = "bfloat16" if harness.has_bf16_products(machine) else "float32"
    report = Report()
    with tempfile.TemporaryDirectory() as folder:
        args.data = Path(folder) / "texts.jsonl"
        if args.quick:
            args.batch, args.length, args.tokens = 2, 32, 8
            args.loss_steps, args.loss_length, args.model = 3, 32, Path(folder) / "model"
            models.make_tiny_model(args.model)
        args.model = models.find_model(args)
        rows = max(args.batch * (SKIPPED + args.pairs), args.loss_steps)
        models.write_data(args.data, rows, 8 * max(args.length, args.loss_length))
        print(f"{harness.machine_line(machine)}\n{args.dtype}, clock: {args.clock}")
        for part in args.parts:
            PARTS[part](args, report)
    print()
    harness.print_table(["what", "bar", "measured", "verdict"], report.bars)
    harness.write_json(args, {"dtype": args.dtype, "bars": report.bars, **report.figures})
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
