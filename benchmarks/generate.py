"""One token at a time through the whole of SmolLM2-135M: what is the kernels' and what Python's.

    python benchmarks/generate.py --model <folder of SmolLM2-135M-Instruct in safetensors>

Printed are tokens/s of transformers' generate (greedy, one sequence) with this package's layers,
with bitsandbytes' (as eval() leaves them) and dense; and for ours where the time of a step goes:

    kernels       linear_4bit, all layers called one after another with nothing around them
    output layer  the dense matmul with all words, as long as it takes alone
    the rest      attention, norms, and the Python of transformers and of the layers

The same by torch.profiler, whose own cost falls on the rest. Bytes that a token must read, over
the bandwidth of this machine, are the limit.
"""

from __future__ import annotations

import argparse
import inspect
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import finetune as models
import harness
from harness import Contender


def load(kind: str, folder: Path, dtype: Any) -> Any:
    """The model with ``kind`` ("ours", "bnb", "dense") of linear layers."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from qlora_kernels.integrations.transformers import load_quantized_model

    if kind == "ours":
        model = load_quantized_model(folder, dtype=dtype)
    elif kind == "bnb":
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, quantization_config=config, device_map={"": "cpu"}
        )
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    torch.set_grad_enabled(False)
    return model.eval()


class Step:
    """One token through a model whose cache holds a prompt, again and again."""

    def __init__(self, model: Any, prompt: Any) -> None:
        names = inspect.signature(model.forward).parameters
        self.name = "cache" if "cache" in names else "past_key_values"  # before transformers 5.24
        self.model, self.token = model, prompt[:, -1:]
        output = model(prompt, use_cache=True)
        self.cache = output["cache"] if "cache" in output else output["past_key_values"]

    def __call__(self, _: int = 0) -> Any:
        logits = self.model(self.token, use_cache=True, **{self.name: self.cache}).logits
        self.cache.crop(-1)
        return logits


def near(want: Any, tolerance: float) -> Any:
    """A check of logits: relative error by norms."""

    def check(got: Any) -> str | None:
        error = ((got.float() - want.float()).norm() / want.float().norm()).item()
        return None if error <= tolerance else f"logits differ by {error:.3f} > {tolerance}"

    return check


def kernels_alone(model: Any) -> Any:
    """Every 4-bit layer's op once, on one row, with nothing around it."""
    import torch

    from qlora_kernels import functional as F4
    from qlora_kernels.nn import Linear4bit

    calls = []
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            x = torch.randn(1, layer.in_features).to(model.dtype)
            state = layer.quant_state
            weight = (layer.weight.view(-1), *state.weight_args())
            calls.append((x, weight, layer.out_features, layer.compute_dtype or x.dtype))

    def run(_: int) -> None:
        for x, weight, out_features, compute in calls:
            F4.run_linear(x, weight, out_features, None, (None, None, None), 1.0, compute)

    return run, len(calls)


def profiled(step: Step, steps: int) -> dict[str, float]:
    """Seconds a step by torch.profiler: in 4-bit ops, in other ops, and altogether."""
    from torch.profiler import ProfilerActivity, profile

    step()
    begun = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(steps):
            step()
    wall = (time.perf_counter() - begun) / steps
    ours = others = 0.0
    for event in found.key_averages():
        seconds = event.self_cpu_time_total / 1e6 / steps
        if "qlora_kernels" in event.key:
            ours += seconds
        elif "::" in event.key:
            others += seconds
    return {"kernels": ours, "other_ops": others, "wall": wall}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="folder; the demo's model unless given")
    parser.add_argument("--tokens", type=int, default=32, help="new tokens of a generate call")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="by hardware unless given")
    parser.add_argument("--no-peer", action="store_true", help="leave bitsandbytes out")
    harness.add_arguments(parser)
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    harness.begin(args)
    import torch

    machine = harness.describe_machine(args.threads)
    if args.dtype is None:
        args.dtype = "bfloat16" if harness.has_bf16_products(machine) else "float32"
    dtype = getattr(torch, args.dtype)
    with tempfile.TemporaryDirectory() as folder:
        if args.quick:
            args.model, args.tokens = Path(folder), 4
            models.make_tiny_model(args.model)
        args.model = models.find_model(args)
        kinds = ["ours", *([] if args.no_peer else ["bnb"]), "dense"]
        all_models = {kind: load(kind, args.model, dtype) for kind in kinds}
    words = all_models["ours"].config.get_text_config().vocab_size
    prompt = torch.randint(1, min(words, 40000), (1, 16))

    steps = {kind: Step(model, prompt) for kind, model in all_models.items()}
    want = steps["ours"]()
    tolerance = {"ours": 0.0, "bnb": 1e-3 if dtype == torch.float32 else 0.05, "dense": 0.5}
    forward = harness.race(
        [Contender(k, step, near(want, tolerance[k])) for k, step in steps.items()], args, turn=0.1
    )
    options = {"max_new_tokens": args.tokens, "min_new_tokens": args.tokens, "do_sample": False}

    def generate(kind: str) -> Contender:
        model = all_models[kind]
        mask = torch.ones_like(prompt)
        return Contender(kind, lambda _: model.generate(prompt, attention_mask=mask, **options))

    whole = harness.race([generate(k) for k in kinds if forward.has(k)], args)

    ours = all_models["ours"]
    run, layers = kernels_alone(ours)
    head, hidden = ours.get_output_embeddings(), torch.randn(1, 1, ours.config.hidden_size)
    hidden = hidden.to(dtype)
    alone = harness.race(
        [Contender("step", steps["ours"]), Contender("kernels", run),
         Contender("output layer", lambda _: head(hidden))], args,
    )  # fmt: skip
    profile = profiled(steps["ours"], 2 if args.quick else 30)
    size = sum(
        t.numel() * t.element_size()
        for t in {t.data_ptr(): t for t in [*ours.parameters(), *ours.buffers()]}.values()
    )
    limit = harness.read_bandwidth(args) / size

    print(f"\n{harness.machine_line(machine)}")
    print(f"{args.dtype}, {args.tokens} tokens after {prompt.shape[1]}, clock: {args.clock}\n")
    harness.print_table(
        ["contender", "step, ms", "generate, tokens/s", "step: ours is faster by"],
        [
            [k, f"{1e3 * forward.time(k).median:.2f}", f"{args.tokens / whole.time(k).median:.1f}",
             forward.ratio("ours", k).text()]
            for k in kinds if forward.has(k)
        ],
    )  # fmt: skip
    time_of = {k: alone.time(k).median for k in alone.samples}
    rest = time_of["step"] - time_of["kernels"] - time_of["output layer"]
    shares = {"kernels": time_of["kernels"], "output layer": time_of["output layer"], "rest": rest}
    print(f"\na step of ours: {1e3 * time_of['step']:.2f} ms, {layers} 4-bit layers")
    print(f"reading its {size / 1e6:.0f} MB: {1e3 / limit:.2f} ms at this machine's bandwidth\n")
    harness.print_table(
        ["part", "ms", "share", "by the profiler"],
        [
            ["kernels", f"{1e3 * shares['kernels']:.2f}",
             f"{100 * shares['kernels'] / time_of['step']:.0f}%",
             f"{100 * profile['kernels'] / profile['wall']:.0f}%"],
            ["output layer", f"{1e3 * shares['output layer']:.2f}",
             f"{100 * shares['output layer'] / time_of['step']:.0f}%", "in other ops"],
            ["the rest", f"{1e3 * rest:.2f}", f"{100 * rest / time_of['step']:.0f}%",
             f"{100 * profile['other_ops'] / profile['wall']:.0f}% other ops, "
             f"{100 - 100 * (profile['kernels'] + profile['other_ops']) / profile['wall']:.0f}% "
             "Python"],
        ],
    )  # fmt: skip
    failed = {**forward.failed, **whole.failed}
    for name, why in failed.items():
        print(f"FAILED: {name}: {why.splitlines()[0][:200]}")
    harness.write_json(args, {
        "dtype": args.dtype,
        "forward": forward.as_json(),
        "generate": whole.as_json(),
        "alone": alone.as_json(),
        "shares": {k: v / time_of["step"] for k, v in shares.items()},
        "profiler": profile,
        "bytes": size,
        "limit_tokens_per_second": limit,
    })  # fmt: skip
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
