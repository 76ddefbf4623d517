"""``qlora kernels``: which CUDA kernel a linear layer gets on a device, and why; needs no GPU."""

from __future__ import annotations

import argparse

import torch

from . import cuda
from .emulator.devices import DEVICES
from .finetune.errors import BadInput

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_ROWS = [1, 2, 4, 8, 15, 16, 32, 64, 128, 256, 512, 2048]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", default=None, help=f"one of {', '.join(DEVICES)}; or the GPU here"
    )
    parser.add_argument("-M", type=int, nargs="+", default=_ROWS, help="rows of x")
    parser.add_argument("-N", type=int, default=4096, help="out features")
    parser.add_argument("-K", type=int, default=4096, help="in features")
    parser.add_argument("--rank", type=int, default=0, help="LoRA's rank; 0: without")
    parser.add_argument("--dtype", choices=_DTYPES, default="bf16", help="the compute dtype")
    parser.add_argument("--blocksize", type=int, default=64)
    parser.add_argument("--scales", choices=cuda.SCALES, default="nested")
    parser.add_argument("--backward", action="store_true", help="the gradient of x instead of y")


def lines(arguments: argparse.Namespace) -> list[str]:
    """What is printed; see ``run``."""
    device: str | int = arguments.device or 0
    if arguments.device is None and not torch.cuda.is_available():
        raise BadInput(f"there is no GPU here: name one with --device ({', '.join(DEVICES)})")
    out = []
    for m in arguments.M:
        try:
            plan, why = cuda.choose(
                device,
                m,
                arguments.N,
                arguments.K,
                rank=arguments.rank,
                dtype=_DTYPES[arguments.dtype],
                blocksize=arguments.blocksize,
                scales=arguments.scales,
                backward=arguments.backward,
            )
        except ValueError as error:
            raise BadInput(str(error)) from None
        out.append(f"M={m:<5} {plan}")
        if plan.route != "large":
            out.append(
                f"        {plan.shared_bytes / 1024:.0f} KiB of shared memory a CTA, "
                f"{plan.workspace_bytes / 1024:.0f} KiB of workspace"
            )
        out.append(f"        {why}")
    return out


def run(arguments: argparse.Namespace) -> int:
    """Prints the plan of each number of rows."""
    print("\n".join(lines(arguments)))
    return 0
