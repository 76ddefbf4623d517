"""How fast the emulator is: thread instructions a second on one core, without and with its checks.

    python benchmarks/emulator_speed.py [--json out.json] [--repeat 5] [--plot out.png]

Real matmul kernels, compiled here by Triton (mma.sync for sm_80, wgmma for sm_90) and by nvcc (a
tiled fp32 kernel), each run with no checks, each check alone, and all. A thread instruction is one
lane of one PTX instruction; a matrix instruction counts as 32 of them though it does the work of
thousands, so GFLOP/s of the emulated matmul stand beside. Time is the processor time of the thread
that runs the engine, the least of the repeats.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from qlora_kernels.emulator import Module, emulate, engine, toolchain

CHECKS = {
    "none": False,
    "counts": ["counts"],
    "uninit": ["uninit"],
    "races": ["races"],
    "all": True,
}
GOALS = {"none": 100.0, "all": 20.0}  # million thread instructions a second

SIMT = """
// C = A B, row-major fp32, 64 x 64 tiles, 256 threads, 4 x 4 results each; sizes multiples of 64.
__global__ void __launch_bounds__(256)
sgemm(const float* A, const float* B, float* C, int N, int K) {
  __shared__ float a[16][64 + 4], b[16][64];
  int t = threadIdx.x, row = blockIdx.y * 64, col = blockIdx.x * 64;
  float acc[4][4] = {};
  for (int k0 = 0; k0 < K; k0 += 16) {
    for (int i = t; i < 1024; i += 256) {
      a[i % 16][i / 16] = A[(row + i / 16) * K + k0 + i % 16];
      b[i / 64][i % 64] = B[(k0 + i / 64) * N + col + i % 64];
    }
    __syncthreads();
    for (int k = 0; k < 16; k++)
      for (int i = 0; i < 4; i++)
        for (int j = 0; j < 4; j++) acc[i][j] += a[k][t / 16 * 4 + i] * b[k][t % 16 * 4 + j];
    __syncthreads();
  }
  for (int i = 0; i < 4; i++)
    for (int j = 0; j < 4; j++) C[(row + t / 16 * 4 + i) * N + col + t % 16 * 4 + j] = acc[i][j];
}
"""


def simt() -> tuple[Callable, float, Callable]:
    kernel = Module.from_cuda(SIMT, "sm_80").kernel("sgemm")
    n, depth = 128, 256
    rng = np.random.default_rng(0)
    a = rng.integers(-4, 5, (n, depth)).astype(np.float32)
    b = rng.integers(-4, 5, (depth, n)).astype(np.float32)
    c = np.zeros((n, n), np.float32)
    return (
        lambda checks: emulate(
            kernel, (2, 2), 256, [a, b, c, n, depth], device="a100", checks=checks
        ),
        2.0 * n * n * depth,
        lambda: np.array_equal(c, a @ b),
    )


def tensor_cores(target: int) -> tuple[Callable, float, Callable]:
    import torch
    import triton
    import triton.language as tl

    def matmul(a, b, c, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
        rm = tl.program_id(0) * BM + tl.arange(0, BM)
        rn = tl.program_id(1) * BN + tl.arange(0, BN)
        rk = tl.arange(0, BK)
        pa = a + rm[:, None] * K + rk[None, :]
        pb = b + rk[:, None] * N + rn[None, :]
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        for _ in range(0, K, BK):
            acc = tl.dot(tl.load(pa), tl.load(pb), acc)
            pa += BK
            pb += BK * N
        tl.store(c + rm[:, None] * N + rn[None, :], acc)

    matmul.__globals__["tl"] = tl
    module = Module.from_triton(
        triton.jit(matmul),
        {"a": "*bf16", "b": "*bf16", "c": "*fp32", "N": "i32", "K": "i32"},
        {"BM": 128, "BN": 128, "BK": 64},
        target,
        aligned=["a", "b", "c", "N", "K"],
        num_warps=4,
        num_stages=3,
    )
    n, depth = 256, 512
    a, b = torch.randint(-4, 5, (n, depth)).bfloat16(), torch.randint(-4, 5, (depth, n)).bfloat16()
    c = torch.zeros(n, n)
    device = {80: "a100", 90: "h100"}[target]
    return (
        lambda checks: emulate(
            module, (2, 2), args=[a, b, c, n, depth], device=device, checks=checks
        ),
        2.0 * n * n * depth,
        lambda: torch.equal(c, a.float() @ b.float()),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--plot", type=Path, help="also draw them here (PNG)")
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    kernels: dict[str, tuple[Callable, float, Callable]] = {}
    missing = toolchain.available("nvcc")
    if missing:
        print(f"no SIMT kernel: {missing}")
    else:
        kernels["sgemm, SIMT (nvcc, sm_80)"] = simt()
    try:
        kernels["matmul, mma.sync (Triton, sm_80)"] = tensor_cores(80)
        kernels["matmul, wgmma (Triton, sm_90)"] = tensor_cores(90)
    except ImportError:
        print("no tensor-core kernels: Triton is not installed")
    print(f"{platform.processor() or platform.machine()}, engine: {engine.isa()}, one core\n")
    print(f"{'kernel':34} {'checks':8} {'M thread instr/s':>17} {'GFLOP/s':>9} {'goal':>6}")
    rows = []
    for name, (run, flops, right) in kernels.items():
        best = dict.fromkeys(CHECKS, float("inf"))
        total = {}
        for _ in range(args.repeat):  # interleaved, so that a busy moment falls on all alike
            for what, checks in CHECKS.items():
                start = time.thread_time()
                result = run(checks)
                best[what] = min(best[what], time.thread_time() - start)
                total[what] = result.counts.total["thread_instructions"]
                if not right():
                    raise SystemExit(f"{name}: the result is wrong")
        for what, seconds in best.items():
            rate = total[what] / seconds / 1e6
            goal = GOALS.get(what)
            met = "" if goal is None else f"{goal:.0f} " + ("✓" if rate >= goal else "✗")
            print(f"{name:34} {what:8} {rate:17.1f} {flops / seconds / 1e9:9.2f} {met:>6}")
            rows.append({"kernel": name, "checks": what, "seconds": seconds, "flops": flops,
                         "thread_instructions": total[what], "isa": engine.isa()})  # fmt: skip
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(rows, indent=1))
    if args.plot:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(figsize=(8, 3.2))
        for k, name in enumerate(kernels):
            mine = [r for r in rows if r["kernel"] == name]
            speed = [r["thread_instructions"] / r["seconds"] / 1e6 for r in mine]
            axes.bar([j + 0.27 * k for j in range(len(mine))], speed, 0.25, label=name)
        axes.set_xticks([j + 0.27 for j in range(len(CHECKS))], list(CHECKS))
        axes.set_ylabel("M thread instructions/s")
        axes.legend(fontsize=7)
        figure.tight_layout()
        figure.savefig(args.plot, dpi=120)


if __name__ == "__main__":
    main()
