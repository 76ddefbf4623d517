"""What the CUDA kernels cost on each GPU, counted once, for `qlora bench --device` to model from.

Runs launchers in the emulator (a few CTAs of each grid) and writes
`qlora_kernels/bench/gpu_counts.json`, a part of the package, so that a modelled time needs neither
a GPU nor a compiler afterwards:

    gemm     each tile's CTA at two lengths of the contraction: a line, which holds for any layer
    decode   the modelled time on each layer of LLaMA 7B to 70B; layers of other sizes by --shapes
    adamw    of results/cuda_adamw.json

What was counted before is kept, and what has been asked of the same kernels and emulator is
remembered, so that a run that was broken off goes on.

    python benchmarks/gpu_counts.py [--devices a100 h100 ...] [--shapes 7b 5120x5120]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import cuda_common
import cuda_decode
from cuda_dispatch import PASSES, Gemm
from cuda_gemm import FORWARD, INPUT_GRAD

from qlora_kernels import cuda
from qlora_kernels.bench import gpu_model, shapes
from qlora_kernels.emulator import toolchain

DEVICES = ("a100", "h100", "h200", "rtx4090")
SAME_SM = {"h200": "h100"}  # whose GEMM is counted for it
OUT = Path(gpu_model.__file__).with_name("gpu_counts.json")
# (rows, LoRA's rank): the most rows of each group of 8 that one matrix instruction takes
ROWS = {
    FORWARD: ((1, 0), (8, 0), (16, 0), (32, 0), (1, 16), (8, 16), (16, 16)),
    INPUT_GRAD: ((1, 0), (8, 0), (16, 0)),
}


def decode_entries(device: str, layer: shapes.Layer, weight: Any) -> list[dict[str, Any]]:
    """The layer's decode kernels as the dispatch chooses them."""
    found = []
    for pass_, cases in ROWS.items():
        backward = pass_ == INPUT_GRAD
        for m, rank in cases:
            plan, _ = cuda.choose(device, m, layer.n, layer.k, rank=rank, backward=backward)
            simple = backward and plan.route == "decode_simt"  # the kernel for any shape
            if simple or not plan.route.startswith("decode"):
                continue
            route = cuda_decode.SIMT if plan.route == "decode_simt" else cuda_decode.MMA
            f = cuda_decode.remembered(weight, device, m, route, backward, rank)
            found.append({
                "device": device, "pass": PASSES[pass_], "route": plan.route, "m": m,
                "n": layer.n, "k": layer.k, "rank": rank, "us": f["microseconds"],
                "bound": f["bound"],
            })  # fmt: skip
    return found


def gemm_entries(device: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    gemm, lines = Gemm(device), []
    for pass_, name in PASSES.items():
        for tile in gemm.tiles(pass_):
            line = gemm.line(pass_, tile).as_json()
            lines.append({"device": device, "pass": name, "tile": list(tile), **line})
            print(f"  {name} {tile}", flush=True)
    return lines, {"device": device, **gemm.sum_line().as_json()}


def adamw_entries() -> list[dict[str, Any]]:
    figures = json.loads((cuda_common.HERE / "results" / "cuda_adamw.json").read_text())["figures"]
    return [
        {key: f[key] for key in ("device", "bits", "bytes", "slots")}
        for f in figures
        if f["dtype"] == "torch.float32"
    ]


def merged(old: list[dict], new: list[dict], keys: tuple[str, ...]) -> list[dict]:
    """Entries by what they are of; new ones take the place of old ones."""
    found = {json.dumps([e[k] for k in keys]): e for e in [*old, *new]}
    return [found[key] for key in sorted(found)]


def write(counts: dict[str, Any]) -> None:
    """An entry a line; whole or not at all."""
    parts = []
    for key, value in counts.items():
        value = cuda_common._short(value)
        if isinstance(value, list):
            value_text = "[\n  " + ",\n  ".join(json.dumps(v) for v in value) + "\n ]"
        else:
            value_text = json.dumps(value)
        parts.append(f" {json.dumps(key)}: {value_text}")
    with tempfile.NamedTemporaryFile("w", dir=OUT.parent, delete=False) as file:
        file.write("{\n" + ",\n".join(parts) + "\n}\n")
    os.chmod(file.name, 0o644)
    os.replace(file.name, OUT)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", nargs="+", default=list(DEVICES), metavar="DEVICE")
    parser.add_argument("--shapes", nargs="+", default=list(shapes.LLAMA), metavar="SHAPE")
    args = parser.parse_args()
    if missing := toolchain.available():
        print(missing)
        return 0
    layers = shapes.layers(args.shapes)
    counts = {
        "schema": gpu_model.SCHEMA,
        "what": "counted by the emulator, modelled from that; no GPU was there",
        "nvcc": toolchain.tool_version("nvcc"),
        "gemm": [],
        "sums": [],
        "decode": [],
        "adamw": adamw_entries(),
    }
    if OUT.exists():
        old = json.loads(OUT.read_text())
        counts.update({key: old[key] for key in ("gemm", "sums", "decode")})
    for device in args.devices:
        print(device, flush=True)
        if device not in SAME_SM:
            lines, sums = gemm_entries(device)
            counts["gemm"] = merged(counts["gemm"], lines, ("device", "pass", "tile"))
            counts["sums"] = merged(counts["sums"], [sums], ("device",))
            write(counts)
    keys = ("device", "pass", "route", "n", "k", "rank", "m")
    for layer in layers:
        weight = cuda_decode.weight(layer.n, layer.k)
        for device in args.devices:
            print(f"{layer.name} {layer.size} {device}", flush=True)
            counts["decode"] = merged(counts["decode"], decode_entries(device, layer, weight), keys)
            write(counts)
    print(f"wrote {OUT}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
