"""One layer of experts: dense through transformers, and in 4 bits; LoRA on it through PEFT.

    python benchmarks/experts.py --threads 1 --clock cpu

The layer is Qwen3-MoE's at half the width: 32 experts of 1024 x 512, 4 for a token, fp32. Timed are
transformers' ``grouped_mm`` on the dequantized weights and our experts, forward and with backward,
and a training step with LoRA of rank 16 on both weights (``target_parameters``): PEFT's own wrapper
on the dense stack, ours on the packed one. ``peak`` is the most that torch's allocator holds more
during such a step than before it, every allocation counted.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from typing import Any

import harness
from harness import Contender

EXPERTS, HIDDEN, INNER, EACH, RANK = 32, 1024, 512, 4, 16
TOKENS = (1, 64, 512)
TARGETS = ["experts.gate_up_proj", "experts.down_proj"]


def layers(quick: bool) -> tuple[Any, Any]:
    """``(dense, packed)``: the same weights."""
    import torch
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    from qlora_kernels.nn import Experts4bit

    torch.manual_seed(0)
    size = 8 if quick else 1
    config = Qwen3MoeConfig(
        hidden_size=HIDDEN // size,
        moe_intermediate_size=INNER // size,
        num_experts=EXPERTS,
        num_experts_per_tok=EACH,
        experts_implementation="grouped_mm",
    )
    config._experts_implementation = "grouped_mm"
    drawn = Qwen3MoeExperts(config).requires_grad_(False)
    for parameter in drawn.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    packed = Experts4bit.from_experts(drawn)
    return packed.dequantize(), packed


def with_lora(experts: Any) -> Any:
    """``experts`` in a model of nothing else, with a plain ``LoraConfig``."""
    import peft
    import torch

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = experts

        def forward(self, *args: Any) -> Any:
            return self.experts(*args)

    config = peft.LoraConfig(r=RANK, target_modules=[], target_parameters=TARGETS)
    return peft.get_peft_model(Model(), config)


def peak(run: Callable[[], object]) -> int:
    """Bytes that ``run`` holds at most, above what is held before it."""
    import torch

    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run()
    events = profile.profiler.kineto_results.events()
    return max(itertools.accumulate(e.nbytes() for e in events if e.name() == "[memory]"))


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    import copy

    import torch

    dense, packed = layers(args.quick)
    lora = {"dense": with_lora(copy.deepcopy(dense)), "4-bit": with_lora(copy.deepcopy(packed))}
    rows = []
    for tokens in TOKENS[:2] if args.quick else TOKENS:
        x = torch.randn(tokens, packed.shapes["down_proj"].out_features, requires_grad=True)
        index = torch.stack([torch.randperm(EXPERTS)[:EACH] for _ in range(tokens)])
        routed = (x, index, torch.rand(tokens, EACH))

        @torch.no_grad()
        def forward(model: Any, routed: Any = routed) -> Any:
            return model(*routed)

        def step(model: Any, routed: Any = routed) -> Any:
            return model(*routed).sum().backward()

        with torch.no_grad():
            want = dense(*routed)
        assert torch.allclose(packed(*routed), want, rtol=1e-4, atol=1e-6)
        models = {"dense": dense, "4-bit": packed}
        row: dict[str, Any] = {"tokens": tokens}
        for what, run, who in (
            ("forward", forward, models),
            ("forward and backward", step, models),
            ("LoRA step", step, lora),
        ):
            contenders = [
                Contender(name, lambda i, run=run, model=model: run(model))
                for name, model in who.items()
            ]
            race = harness.race(contenders, args)
            row[what] = race.as_json()
            row[f"{what}: ms"] = {name: 1e3 * race.time(name).median for name in who}
        row["peak of a LoRA step"] = {name: peak(lambda m=m: step(m)) for name, m in lora.items()}
        rows.append(row)
    sizes = {
        "dense": sum(p.numel() * p.element_size() for p in dense.parameters()),
        "4-bit": packed.packed_bytes(),
    }
    rows[0]["bytes of the layer"] = sizes
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    harness.add_arguments(parser)
    args = parser.parse_args()
    harness.begin(args)
    rows = measure(args)
    timed = ("forward", "forward and backward", "LoRA step")
    table = [
        [
            str(row["tokens"]),
            *(
                f"{row[f'{what}: ms']['dense']:.1f} / {row[f'{what}: ms']['4-bit']:.1f}"
                for what in timed
            ),
            " / ".join(f"{n / 1e6:.1f}" for n in row["peak of a LoRA step"].values()),
        ]
        for row in rows
    ]
    harness.print_table(["tokens", *(f"{w}, ms" for w in timed), "peak of it, MB"], table)
    sizes = rows[0]["bytes of the layer"]
    print(
        f"the layer: {sizes['dense'] / 1e6:.1f} MB dense, {sizes['4-bit'] / 1e6:.1f} MB in 4 bits"
    )
    harness.write_json(args, {"rows": rows})


if __name__ == "__main__":
    main()
