"""``qlora tune``: measures the compiled kernels on the GPU that is here and keeps the quickest.

What it finds is kept for this GPU, driver and build (``tuned.json`` in ``QLORA_KERNELS_CACHE``),
and used from the next start on. Without it the table of ``csrc/cuda/dispatch.cpp`` decides, which
comes from a model of the device.
"""

from __future__ import annotations

import argparse
import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import cuda, functional, ops
from .finetune.errors import BadInput, RunError

_REPEATS = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shapes",
        nargs="+",
        default=["4096x4096", "11008x4096", "4096x11008"],
        help="weights, out x in features; LLaMA-7B's by default",
    )
    parser.add_argument("-M", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128, 256])
    parser.add_argument("--rank", type=int, default=16, help="LoRA's rank; 0: without")


def parse_shape(text: str) -> tuple[int, int]:
    """``"11008x4096"`` as numbers. Raises BadInput for anything else."""
    n, _, k = text.lower().partition("x")
    if not (n.isdigit() and k.isdigit() and int(n) > 0 and int(k) > 0):
        raise BadInput(f"--shapes: {text!r} is not OUTxIN, such as 11008x4096")
    return int(n), int(k)


def quickest(
    plans: Sequence[cuda.Plan], time: Callable[[cuda.Plan], float]
) -> tuple[cuda.Plan, float]:
    """The plan with the least time; one that fails is passed over."""
    best: tuple[cuda.Plan, float] | None = None
    for plan in plans:
        try:
            seconds = time(plan)
        except RuntimeError:
            continue
        if best is None or seconds < best[1]:
            best = plan, seconds
    if best is None:
        raise RunError("no kernel ran")
    return best


class Layer:
    """A random layer on a device, to be run forward or backward."""

    def __init__(self, namespace: Any, device: torch.device, n: int, k: int, rank: int) -> None:
        self.namespace, self.n, self.k = namespace, n, k
        packed, state = functional.quantize_4bit(
            torch.randn(n, k), quant_type="nf4", compress_statistics=True
        )
        weight = (packed.reshape(-1), *state.weight_args())
        self.weight = tuple(t.to(device) if isinstance(t, torch.Tensor) else t for t in weight)
        self.lora: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
        if rank:
            self.lora = (torch.randn(rank, k).to(device), torch.randn(n, rank).to(device))

    def run(self, x: torch.Tensor, backward: bool) -> None:
        a, b = self.lora
        if backward:
            self.namespace.linear_4bit_backward(
                x, *self.weight, self.k, None, a, b, None, 1.0, x.dtype, x.dtype, True, False, False
            )
        else:
            self.namespace.linear_4bit(x, *self.weight, self.n, None, a, b, None, 1.0, x.dtype)


def tune(
    lib: ctypes.CDLL,
    layer: Layer,
    plans: Callable[..., Sequence[cuda.Plan]],
    clock: Callable[[Callable[[], None]], float],
    rows: Sequence[int],
    rank: int,
    device: torch.device,
) -> list[dict[str, Any]]:
    """The quickest plan of each number of rows, forward and backward, as lines of tuned.json."""
    index = device.index or 0
    found = []
    for backward in (False, True):
        for m in rows:
            x = torch.randn(m, layer.n if backward else layer.k).to(device, torch.bfloat16)

            def time(plan: cuda.Plan, x=x, m=m, backward=backward) -> float:
                entry = cuda.tuned_entry(backward, m, layer.n, layer.k, rank, plan, 0.0)
                cuda.apply_entry(lib, index, entry)
                return clock(lambda: layer.run(x, backward))

            options = plans(m, layer.n, layer.k, rank=rank, backward=backward)
            plan, seconds = quickest(options, time)
            entry = cuda.tuned_entry(backward, m, layer.n, layer.k, rank, plan, seconds)
            cuda.apply_entry(lib, index, entry)
            found.append(entry)
    return found


def _clock(work: Callable[[], None]) -> float:
    """Seconds of one run, the least of several, by the GPU's own clock."""
    work()
    least = float("inf")
    for _ in range(_REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        least = min(least, begin.elapsed_time(end) / 1e3)
    return least


def run(arguments: argparse.Namespace) -> int:
    """Measures, prints and keeps."""
    shapes = [parse_shape(text) for text in arguments.shapes]
    lib = cuda.library() if torch.cuda.is_available() else None
    if lib is None:
        raise RunError(
            "there is nothing to measure: "
            + ("no GPU is here" if not torch.cuda.is_available() else str(ops.CUDA_LIBRARY_ERROR))
        )
    device = torch.device("cuda", torch.cuda.current_device())
    who = cuda.identity_of(lib, device.index or 0)
    entries = []
    for n, k in shapes:
        layer = Layer(torch.ops.qlora_kernels, device, n, k, arguments.rank)

        def plans(m: int, n: int, k: int, **options: Any) -> list[cuda.Plan]:
            return cuda.candidates(device.index or 0, m, n, k, **options)

        for entry in tune(lib, layer, plans, _clock, arguments.M, arguments.rank, device):
            way = "dx" if entry["backward"] else "y "
            plan = cuda.Plan(**entry["plan"], shared_bytes=0, workspace_bytes=0)
            print(f"[{n}, {k}] {way} M={entry['m']:<5} {1e6 * entry['seconds']:8.1f} us  {plan}")
            entries.append(entry)
    cuda.write_cache("tuned.json", {**cuda.read_cache("tuned.json"), who: entries})
    print(f"kept in {cuda.cache_folder() / 'tuned.json'}")
    return 0
