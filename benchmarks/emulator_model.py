"""How far is the emulator's cost model from what others have measured?

Known kernels, written again here after their published descriptions, are emulated for a few
representative blocks, and the modelled time is compared with the published measurement. Nothing in
the model is fitted to this table; it is printed again whenever the model changes::

    python benchmarks/emulator_model.py             # the table
    python benchmarks/emulator_model.py --terms     # and what each modelled time is made of
    python benchmarks/emulator_model.py --json out.json

Sources: [B] github.com/te42kyfo/gpu-benches, the results recorded there (gpu-stream: doubles, two
blocks a multiprocessor, the block's size sets the occupancy; gpu-small-kernels: a graph of kernels
over a buffer that fits in L2). The device table takes DRAM and L2 read bandwidths, latencies,
launch overheads and the turnaround of blocks from the same machines. Rows marked * are where a
figure of the table was read off, and no check of it; they are left out of the summary. All others
combine figures that were measured apart. [S] github.com/siboehm/SGEMM_CUDA, 4096³ on an RTX A6000.
[L] github.com/leimao/CUDA-GEMM-Optimization, 4096³ on an RTX 3090. [M] spatters.ca/mma-matmul,
4096³ on an RTX 4090 with its boost clock locked. [P] the benchmark summary of
github.com/Pupking's 03_parallel_reduction, an RTX 3050 Laptop (it does not state the block's size:
256 here).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qlora_kernels.emulator import Module, model
from qlora_kernels.emulator.devices import get_device

SOURCE = r"""
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// --- streams over doubles ------------------------------------------------------------------------
// Six kilobytes of shared memory a block, as the original has them, let exactly two blocks be
// resident at the carve-out it asks for; here the launch says so (see `resident`).
extern "C" __global__ void stream_init(double* a, const double* b, const double* c, int n) {
  int i = threadIdx.x + blockIdx.x * blockDim.x;
  if (i < n) a[i] = 0.23;
}
extern "C" __global__ void stream_read(double* a, const double* b, const double* c, int n) {
  int i = threadIdx.x + blockIdx.x * blockDim.x;
  if (i < n) {
    double v = b[i];
    if (v == 123.0) a[i] = v;
  }
}
extern "C" __global__ void stream_scale(double* a, const double* b, const double* c, int n) {
  int i = threadIdx.x + blockIdx.x * blockDim.x;
  if (i < n) a[i] = b[i] * 1.2;
}
extern "C" __global__ void stream_triad(double* a, const double* b, const double* c, int n) {
  int i = threadIdx.x + blockIdx.x * blockDim.x;
  if (i < n) a[i] = b[i] * 1.2 + c[i];
}

// --- sums of floats, one atomic a block ----------------------------------------------------------
extern "C" __global__ void reduce_interleaved(const float* x, float* sum, int n) {
  __shared__ float s[256];
  int i = blockIdx.x * 256 + threadIdx.x;
  s[threadIdx.x] = i < n ? x[i] : 0.0f;
  __syncthreads();
  for (int o = 1; o < 256; o *= 2) {
    if (threadIdx.x % (2 * o) == 0) s[threadIdx.x] += s[threadIdx.x + o];
    __syncthreads();
  }
  if (threadIdx.x == 0) atomicAdd(sum, s[0]);
}
extern "C" __global__ void reduce_sequential(const float* x, float* sum, int n) {
  __shared__ float s[256];
  int i = blockIdx.x * 512 + threadIdx.x;
  s[threadIdx.x] = (i < n ? x[i] : 0.0f) + (i + 256 < n ? x[i + 256] : 0.0f);
  __syncthreads();
  for (int o = 128; o > 0; o /= 2) {
    if (threadIdx.x < o) s[threadIdx.x] += s[threadIdx.x + o];
    __syncthreads();
  }
  if (threadIdx.x == 0) atomicAdd(sum, s[0]);
}
extern "C" __global__ void reduce_shuffle(const float* x, float* sum, int n) {
  __shared__ float s[8];
  int i = blockIdx.x * 512 + threadIdx.x;
  float v = (i < n ? x[i] : 0.0f) + (i + 256 < n ? x[i + 256] : 0.0f);
  for (int o = 16; o > 0; o /= 2) v += __shfl_xor_sync(~0u, v, o);
  if (threadIdx.x % 32 == 0) s[threadIdx.x / 32] = v;
  __syncthreads();
  if (threadIdx.x < 32) {
    v = threadIdx.x < 8 ? s[threadIdx.x] : 0.0f;
    for (int o = 4; o > 0; o /= 2) v += __shfl_xor_sync(~0u, v, o);
    if (threadIdx.x == 0) atomicAdd(sum, v);
  }
}

// --- fp32 matrix products, from the plainest to register tiles -----------------------------------
// C[m, n] = alpha A[m, k] B[k, n] + beta C
extern "C" __global__ void sgemm_naive(int M, int N, int K, float alpha, const float* A,
                                       const float* B, float beta, float* C) {
  unsigned row = blockIdx.x * blockDim.x + threadIdx.x;  // neighbours in rows: not coalesced
  unsigned col = blockIdx.y * blockDim.y + threadIdx.y;
  if (row < M && col < N) {
    float sum = 0;
    for (int k = 0; k < K; ++k) sum += A[row * K + k] * B[k * N + col];
    C[row * N + col] = alpha * sum + beta * C[row * N + col];
  }
}

extern "C" __global__ void sgemm_coalesced(int M, int N, int K, float alpha, const float* A,
                                           const float* B, float beta, float* C) {
  int row = blockIdx.x * 32 + threadIdx.x / 32;
  int col = blockIdx.y * 32 + threadIdx.x % 32;
  if (row < M && col < N) {
    float sum = 0;
    for (int k = 0; k < K; ++k) sum += A[row * K + k] * B[k * N + col];
    C[row * N + col] = alpha * sum + beta * C[row * N + col];
  }
}

extern "C" __global__ void sgemm_shared(int M, int N, int K, float alpha, const float* A,
                                        const float* B, float beta, float* C) {
  __shared__ float As[32 * 32], Bs[32 * 32];
  const int row = threadIdx.x / 32, col = threadIdx.x % 32;
  A += blockIdx.x * 32 * K;
  B += blockIdx.y * 32;
  C += blockIdx.x * 32 * N + blockIdx.y * 32;
  float sum = 0;
  for (int k = 0; k < K; k += 32) {
    As[row * 32 + col] = A[row * K + col];
    Bs[row * 32 + col] = B[row * N + col];
    __syncthreads();
    A += 32;
    B += 32 * N;
    for (int j = 0; j < 32; ++j) sum += As[row * 32 + j] * Bs[j * 32 + col];
    __syncthreads();
  }
  C[row * N + col] = alpha * sum + beta * C[row * N + col];
}

// Each thread a column of 8 results; tiles 64 x 64 x 8.
extern "C" __global__ void sgemm_tile_1d(int M, int N, int K, float alpha, const float* A,
                                         const float* B, float beta, float* C) {
  constexpr int BM = 64, BN = 64, BK = 8, TM = 8;
  __shared__ float As[BM * BK], Bs[BK * BN];
  const int col = threadIdx.x % BN, row = threadIdx.x / BN;
  A += blockIdx.y * BM * K;
  B += blockIdx.x * BN;
  C += blockIdx.y * BM * N + blockIdx.x * BN;
  const int a_col = threadIdx.x % BK, a_row = threadIdx.x / BK;
  const int b_col = threadIdx.x % BN, b_row = threadIdx.x / BN;
  float sum[TM] = {};
  for (int k = 0; k < K; k += BK) {
    As[a_row * BK + a_col] = A[a_row * K + a_col];
    Bs[b_row * BN + b_col] = B[b_row * N + b_col];
    __syncthreads();
    A += BK;
    B += BK * N;
    for (int j = 0; j < BK; ++j) {
      float b = Bs[j * BN + col];
      for (int i = 0; i < TM; ++i) sum[i] += As[(row * TM + i) * BK + j] * b;
    }
    __syncthreads();
  }
  for (int i = 0; i < TM; ++i) {
    float* c = &C[(row * TM + i) * N + col];
    *c = alpha * sum[i] + beta * *c;
  }
}

// Each thread 8 x 8 results; tiles 128 x 128 x 8, loaded a float at a time.
extern "C" __global__ void __launch_bounds__(256, 1)
    sgemm_tile_2d(int M, int N, int K, float alpha, const float* A, const float* B, float beta,
                  float* C) {
  constexpr int BM = 128, BN = 128, BK = 8, TM = 8, TN = 8;
  __shared__ float As[BM * BK], Bs[BK * BN];
  const int col = threadIdx.x % (BN / TN), row = threadIdx.x / (BN / TN);
  A += blockIdx.y * BM * K;
  B += blockIdx.x * BN;
  C += blockIdx.y * BM * N + blockIdx.x * BN;
  const int a_row = threadIdx.x / BK, a_col = threadIdx.x % BK;
  const int b_row = threadIdx.x / BN, b_col = threadIdx.x % BN;
  float sum[TM * TN] = {}, m[TM], n[TN];
  for (int k = 0; k < K; k += BK) {
    for (int o = 0; o < BM; o += 256 / BK)
      As[(a_row + o) * BK + a_col] = A[(a_row + o) * K + a_col];
    for (int o = 0; o < BK; o += 256 / BN)
      Bs[(b_row + o) * BN + b_col] = B[(b_row + o) * N + b_col];
    __syncthreads();
    A += BK;
    B += BK * N;
    for (int j = 0; j < BK; ++j) {
      for (int i = 0; i < TM; ++i) m[i] = As[(row * TM + i) * BK + j];
      for (int i = 0; i < TN; ++i) n[i] = Bs[j * BN + col * TN + i];
      for (int y = 0; y < TM; ++y)
        for (int x = 0; x < TN; ++x) sum[y * TN + x] += m[y] * n[x];
    }
    __syncthreads();
  }
  for (int y = 0; y < TM; ++y)
    for (int x = 0; x < TN; ++x) {
      float* c = &C[(row * TM + y) * N + col * TN + x];
      *c = alpha * sum[y * TN + x] + beta * *c;
    }
}

// The same with 16-byte accesses of global and shared memory, A transposed on its way.
extern "C" __global__ void sgemm_vectorised(int M, int N, int K, float alpha, float* A, float* B,
                                            float beta, float* C) {
  constexpr int BM = 128, BN = 128, BK = 8, TM = 8, TN = 8;
  __shared__ float As[BM * BK], Bs[BK * BN];
  const int col = threadIdx.x % (BN / TN), row = threadIdx.x / (BN / TN);
  A += blockIdx.y * BM * K;
  B += blockIdx.x * BN;
  C += blockIdx.y * BM * N + blockIdx.x * BN;
  const int a_row = threadIdx.x / (BK / 4), a_col = threadIdx.x % (BK / 4);
  const int b_row = threadIdx.x / (BN / 4), b_col = threadIdx.x % (BN / 4);
  float sum[TM * TN] = {}, m[TM], n[TN];
  for (int k = 0; k < K; k += BK) {
    float4 a = reinterpret_cast<float4*>(&A[a_row * K + a_col * 4])[0];
    As[(a_col * 4 + 0) * BM + a_row] = a.x;
    As[(a_col * 4 + 1) * BM + a_row] = a.y;
    As[(a_col * 4 + 2) * BM + a_row] = a.z;
    As[(a_col * 4 + 3) * BM + a_row] = a.w;
    reinterpret_cast<float4*>(&Bs[b_row * BN + b_col * 4])[0] =
        reinterpret_cast<float4*>(&B[b_row * N + b_col * 4])[0];
    __syncthreads();
    A += BK;
    B += BK * N;
    for (int j = 0; j < BK; ++j) {
      for (int i = 0; i < TM; ++i) m[i] = As[j * BM + row * TM + i];
      for (int i = 0; i < TN; ++i) n[i] = Bs[j * BN + col * TN + i];
      for (int y = 0; y < TM; ++y)
        for (int x = 0; x < TN; ++x) sum[y * TN + x] += m[y] * n[x];
    }
    __syncthreads();
  }
  for (int y = 0; y < TM; ++y)
    for (int x = 0; x < TN; x += 4) {
      float4 c = reinterpret_cast<float4*>(&C[(row * TM + y) * N + col * TN + x])[0];
      c.x = alpha * sum[y * TN + x + 0] + beta * c.x;
      c.y = alpha * sum[y * TN + x + 1] + beta * c.y;
      c.z = alpha * sum[y * TN + x + 2] + beta * c.z;
      c.w = alpha * sum[y * TN + x + 3] + beta * c.w;
      reinterpret_cast<float4*>(&C[(row * TM + y) * N + col * TN + x])[0] = c;
    }
}

// --- fp16 matrix product on tensor cores ---------------------------------------------------------
// D[m, n] = A[m, k] B[n, k]^T, fp32 accumulation; tiles 128 x 128 x 32, four warps of 64 x 64,
// three stages of cp.async, rows of 64 bytes swizzled in 16-byte pieces.
__device__ __forceinline__ unsigned address_of(const void* p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
}
__device__ __forceinline__ void copy16(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address_of(to)), "l"(from));
}
__device__ __forceinline__ int piece(int row, int at) {
  return row * 32 + ((at ^ (row >> 1)) & 3) * 8;
}

extern "C" __global__ void __launch_bounds__(128)
    hgemm_mma(int M, int N, int K, const __half* A, const __half* B, float* D) {
  constexpr int STAGES = 3, TILE = 128 * 32;
  extern __shared__ __half shared[];
  __half *As = shared, *Bs = shared + STAGES * TILE;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int wm = (warp / 2) * 64, wn = (warp % 2) * 64;
  A += static_cast<size_t>(blockIdx.y) * 128 * K;
  B += static_cast<size_t>(blockIdx.x) * 128 * K;
  auto load = [&](int stage, int k) {
    for (int i = 0; i < 4; ++i) {
      int row = i * 32 + threadIdx.x / 4, at = threadIdx.x % 4;
      copy16(&As[stage * TILE + piece(row, at)], A + static_cast<size_t>(row) * K + k + at * 8);
      copy16(&Bs[stage * TILE + piece(row, at)], B + static_cast<size_t>(row) * K + k + at * 8);
    }
    asm volatile("cp.async.commit_group;");
  };
  float d[4][8][4] = {};
  for (int s = 0; s < STAGES - 1; ++s) load(s, s * 32);
  for (int k = 0; k < K / 32; ++k) {
    asm volatile("cp.async.wait_group 1;");
    __syncthreads();
    const int next = k + STAGES - 1;
    if (next < K / 32)
      load(next % STAGES, next * 32);
    else
      asm volatile("cp.async.commit_group;");
    const __half *a_tile = As + (k % STAGES) * TILE, *b_tile = Bs + (k % STAGES) * TILE;
#pragma unroll
    for (int kk = 0; kk < 2; ++kk) {
      unsigned a[4][4], b[8][2];
      for (int i = 0; i < 4; ++i) {
        const __half* p = a_tile + piece(wm + i * 16 + lane % 16, kk * 2 + lane / 16);
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(a[i][0]), "=r"(a[i][1]), "=r"(a[i][2]), "=r"(a[i][3])
                     : "r"(address_of(p)));
      }
      for (int j = 0; j < 4; ++j) {
        const __half* p =
            b_tile + piece(wn + j * 16 + lane % 8 + (lane / 16) * 8, kk * 2 + (lane / 8) % 2);
        unsigned *low = b[2 * j], *high = b[2 * j + 1];
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(low[0]), "=r"(low[1]), "=r"(high[0]), "=r"(high[1])
                     : "r"(address_of(p)));
      }
      for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 8; ++j)
          asm volatile(
              "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
              "{%8,%9}, {%0,%1,%2,%3};"
              : "+f"(d[i][j][0]), "+f"(d[i][j][1]), "+f"(d[i][j][2]), "+f"(d[i][j][3])
              : "r"(a[i][0]), "r"(a[i][1]), "r"(a[i][2]), "r"(a[i][3]), "r"(b[j][0]), "r"(b[j][1]));
    }
  }
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 8; ++j) {
      size_t row = blockIdx.y * 128 + wm + i * 16 + lane / 4;
      int col = blockIdx.x * 128 + wn + j * 8 + (lane % 4) * 2;
      *reinterpret_cast<float2*>(&D[row * N + col]) = make_float2(d[i][j][0], d[i][j][1]);
      *reinterpret_cast<float2*>(&D[(row + 8) * N + col]) = make_float2(d[i][j][2], d[i][j][3]);
    }
}
"""


@dataclass
class Row:
    """One published measurement: ``value`` in ``unit`` ("GB/s", "TFLOP/s")."""

    kernel: str
    device: str
    value: float
    unit: str
    source: str
    block: int
    what: str
    launch: float = 0.0  # of the device's, for queues of short kernels


def _streams() -> list[Row]:
    measured = [  # device, block, (init, read, scale, triad) in GB/s, [B] gpu-stream
        ("a100-40", 64, (407, 158, 291, 403)),
        ("a100-40", 256, (1473, 579, 954, 1231)),
        ("a100-40", 1024, (1503, 1490, 1381, 1360)),
        ("a100-80", 64, (414, 167, 305, 427)),
        ("a100-80", 256, (1506, 619, 1026, 1372)),
        ("a100-80", 1024, (1880, 1769, 1732, 1759)),
        ("h100-pcie", 64, (452, 189, 341, 459)),
        ("h100-pcie", 256, (1686, 702, 1037, 1399)),
        ("h100-pcie", 1024, (2016, 1942, 1704, 1832)),
        ("h200", 64, (590, 244, 463, 638)),
        ("h200", 256, (2196, 935, 1395, 1905)),
        ("h200", 1024, (3884, 2756, 3165, 3534)),
        ("l40", 64, (643, 320, 549, 702)),
        ("l40", 512, (846, 844, 778, 798)),
        ("a40", 64, (397, 160, 290, 400)),
        ("a40", 512, (679, 679, 655, 655)),
    ]
    rows = []
    for device, block, values in measured:
        for name, value in zip(("init", "read", "scale", "triad"), values, strict=True):
            # What the device table took from these very rows is no check of it.
            known = (name == "read" and block >= 512) or (name == "init" and block == 64)
            what = f"2 blocks of {block} an SM{' *' if known else ''}"
            rows.append(Row(f"stream_{name}", device, value, "GB/s", "[B]", block, what))
    for device, value in (("a100-80", 2860), ("h200", 4135), ("l40", 3310)):
        # 16 MB in all, in L2, blocks of 1,024, graphs.
        what = "16 MB in L2, graph"
        rows.append(Row("stream_scale", device, value, "GB/s", "[B]", 1024, what, 0.45))
    return rows


ROWS = [
    *_streams(),
    Row("reduce_interleaved", "rtx3050-laptop", 32.6, "GB/s", "[P]", 256, "16 Mi floats"),
    Row("reduce_sequential", "rtx3050-laptop", 103.9, "GB/s", "[P]", 256, "16 Mi floats"),
    Row("reduce_shuffle", "rtx3050-laptop", 186.5, "GB/s", "[P]", 256, "16 Mi floats"),
    Row("sgemm_naive", "a6000", 0.3090, "TFLOP/s", "[S]", 1024, "4096³"),
    Row("sgemm_coalesced", "a6000", 1.9865, "TFLOP/s", "[S]", 1024, "4096³"),
    Row("sgemm_shared", "a6000", 2.9803, "TFLOP/s", "[S]", 1024, "4096³, 32×32 tiles"),
    Row("sgemm_tile_1d", "a6000", 8.4747, "TFLOP/s", "[S]", 512, "4096³, 64×64×8, 8 a thread"),
    Row("sgemm_tile_2d", "a6000", 15.9717, "TFLOP/s", "[S]", 256, "4096³, 128×128×8, 8×8 a thread"),
    Row("sgemm_vectorised", "a6000", 18.2373, "TFLOP/s", "[S]", 256, "4096³, 16-byte accesses"),
    Row("sgemm_naive", "rtx3090", 0.2781, "TFLOP/s", "[L]", 1024, "4096³"),
    Row("sgemm_coalesced", "rtx3090", 1.7218, "TFLOP/s", "[L]", 1024, "4096³"),
    Row("sgemm_shared", "rtx3090", 2.6616, "TFLOP/s", "[L]", 1024, "4096³, 32×32 tiles"),
    Row("hgemm_mma", "rtx4090", 153.6, "TFLOP/s", "[M]", 128, "4096³, tensor cores, 3 stages"),
]  # fmt: skip


def stream_case(row: Row, module: Module) -> tuple[model.Work, float]:
    """A stream over 128 Mi doubles (16 MB in all if it is said to be in L2)."""
    device = get_device(row.device)
    in_l2 = "L2" in row.what
    n = 2**20 if in_l2 else 2**27
    blocks = math.ceil(n / row.block)
    arrays = [np.zeros(4 * row.block) for _ in range(3)]  # what the representative blocks touch
    work, _ = model.profile(
        module.kernel(row.kernel), blocks, row.block, [*arrays, 4 * row.block], device
    )
    streams = {"init": 1, "read": 1, "scale": 2, "triad": 3}[row.kernel.split("_")[1]]
    if in_l2:  # from one replay to the next everything stays
        work.dram_read = work.dram_write = 0.0
    elif "2 blocks" in row.what:
        # What the original's spoiler does: no more than two blocks of this size are resident.
        work.shared = device.sm.shared // 2 - device.sm.shared_reserved
    return work, streams * 8.0 * n


def reduce_case(row: Row, module: Module) -> tuple[model.Work, float]:
    n = 2**24
    each = 256 if row.kernel == "reduce_interleaved" else 512
    args = [np.ones(n, np.float32), np.zeros(1, np.float32), n]
    work, _ = model.profile(module.kernel(row.kernel), n // each, 256, args, row.device)
    return work, 4.0 * n


def gemm_case(row: Row, module: Module) -> tuple[model.Work, float]:
    size = 4096
    blocks = {
        "sgemm_naive": (128, 128), "sgemm_coalesced": (128, 128), "sgemm_shared": (128, 128),
        "sgemm_tile_1d": (64, 64), "sgemm_tile_2d": (32, 32), "sgemm_vectorised": (32, 32),
        "hgemm_mma": (32, 32),
    }[row.kernel]  # fmt: skip
    block = (32, 32, 1) if row.kernel == "sgemm_naive" else (row.block, 1, 1)
    kernel = module.kernel(row.kernel)
    if row.kernel == "hgemm_mma":
        a, b = (np.zeros((size, size), np.float16) for _ in range(2))
        args = [size, size, size, a, b, np.zeros((size, size), np.float32)]
        shared = 3 * 2 * 128 * 32 * 2
    else:
        a, b, c = (np.zeros((size, size), np.float32) for _ in range(3))
        args = [size, size, size, 1.0, a, b, 0.0, c]
        shared = 0
    work, _ = model.profile(kernel, (*blocks, 1), block, args, row.device, shared_bytes=shared)
    return work, 2.0 * size**3


def evaluate(rows: list[Row], report: Callable[[str], None], terms: bool = False) -> list[dict]:
    modules: dict[str, Module] = {}
    results = []
    for row in rows:
        target = get_device(row.device).target
        if target not in modules:
            modules[target] = Module.from_cuda(SOURCE, target)
        case = {"stream": stream_case, "reduce": reduce_case}.get(row.kernel[:6], gemm_case)
        work, quantity = case(row, modules[target])
        scale = 1e9 if row.unit == "GB/s" else 1e12
        modelled = model.model(work, row.device, launch=row.launch)
        measured = quantity / (row.value * scale)
        error = modelled.time / measured - 1
        results.append(
            {
                "kernel": row.kernel, "device": row.device, "what": row.what, "source": row.source,
                "measured_us": measured * 1e6, "modelled_us": modelled.time * 1e6, "error": error,
                "measured": row.value, "modelled": quantity / modelled.time / scale,
                "unit": row.unit, "bottleneck": modelled.bottleneck,
            }
        )  # fmt: skip
        report(
            f"{row.kernel:18} {get_device(row.device).name:18.18} {row.what:32} {row.value:8.4g} "
            f"{results[-1]['modelled']:8.4g} {row.unit:8} {error:+7.1%}  "
            f"{modelled.bottleneck:22} {row.source}"
        )
        if terms:
            report(str(modelled))
    return results


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--terms", action="store_true", help="what each modelled time is made of")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    options = parser.parse_args()
    started = time.time()
    print(
        f"{'kernel':18} {'device':18} {'case':32} {'measured':>8} {'modelled':>8} {'':8} "
        f"{'time':>7}  {'modelled bottleneck':22} source"
    )
    rows = [row for row in ROWS if options.only in row.kernel]
    everything = evaluate(rows, print, options.terms)
    results = [r for r in everything if not r["what"].endswith("*")]
    kernels = sorted({r["kernel"] for r in results})
    errors = np.array([abs(r["error"]) for r in results])
    print(
        f"\n{len(results)} measurements of {len(kernels)} kernels; |error| of the modelled time: "
        f"median {np.median(errors):.0%}, mean {errors.mean():.0%}, worst {errors.max():.0%} "
        f"({time.time() - started:.0f} s)"
    )
    for kernel in kernels:
        own = [r["error"] for r in results if r["kernel"] == kernel]
        print(f"  {kernel:18} mean error {np.mean(own):+.0%} over {len(own)}")
    if options.json:
        options.json.write_text(json.dumps(everything, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
