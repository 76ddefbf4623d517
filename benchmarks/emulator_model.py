"""How far is the emulator's cost model from what others have measured?

Known kernels, written again here after their published descriptions, are emulated for a few
representative blocks, and the modelled time is compared with the published measurement. Nothing in
the model is fitted to this table; it is printed again whenever the model changes::

    python benchmarks/emulator_model.py             # the table
    python benchmarks/emulator_model.py --terms     # and what each modelled time is made of
    python benchmarks/emulator_model.py --json out.json

Rows marked * are where a figure of the device table was read off, and no check of it; they are left
out of the summary. All others combine figures that were measured apart. Sources, and what differs:

[B] github.com/te42kyfo/gpu-benches, the results recorded there (gpu-stream: doubles, two blocks a
multiprocessor, the block's size sets the occupancy; gpu-small-kernels: a graph of kernels over a
buffer that fits in L2). The device table takes DRAM and L2 read bandwidths, latencies, launch
overheads and the turnaround of blocks from the same machines.
[S] github.com/siboehm/SGEMM_CUDA, 4096³ on an RTX A6000.
[L] github.com/leimao/CUDA-GEMM-Optimization, 4096³ on an RTX 3090.
[M] spatters.ca/mma-matmul, 4096³ on an RTX 4090 with its boost clock locked.
[P] the benchmark summary of github.com/Pupking's 03_parallel_reduction, an RTX 3050 Laptop (it does
not state the block's size: 256 here).
[G] github.com/gau-nernst/learn-cuda: 02b_matmul_sm80, v2 to v4, on an A100-SXM4-40GB and an RTX
5090 held to 400 W, and 07_attention, v1 and v2, on that RTX 5090 (whose clock is not stated: 181
TFLOP/s of these blocks need 2.76 GHz at the least, the table has the sheet's 2.41). The same tiles,
copies and instructions; the order within a step is ours.
[V] github.com/simveit/effective_reduction, kernels 2 and 4, an H100 that moves 3,300 GB/s at most.
[R] github.com/simveit/effective_rms_norm, naive and warp_float4, by the same; it names no device,
its percentages are of 3,300 GB/s.
[Q] github.com/HydraQYH/hp_rms_norm, fused with its residual, an H200 and a B200 (where its loads
are of 32 bytes, and two of 16 here); how it is timed is not said: a kernel's duration is assumed.
[A] github.com/abideenml/llama3.cuda, dev/cuda/rmsnorm_forward.cu, kernels 1 and 2 on an L4; before
each launch a memset fills L2 with dirty lines, whose way to DRAM is in the time but not modelled.
[C] github.com/annanyapr/Fast-CUDA-Kernels, products and softmax by shuffles, an RTX 4090; one
launch, not warmed up.
[T] github.com/ayush-os/transpose, 4096² floats on an A100 of 1.55 TB/s (SXM4-40GB assumed),
launches timed one by one; what one left in L2 the next finds, which the model does not know.
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
from qlora_kernels.emulator.sass import Dynamic

SOURCE = r"""
#include <cuda_bf16.h>
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

// Sums of ints, a block of 512: one int a thread, or three vectors of four.
template <int VECTORS> __device__ __forceinline__ void reduce_ints(const int* x, int* sum, int n) {
  __shared__ int s[512];
  const int t = threadIdx.x, i = blockIdx.x * 512 + t;
  int v = 0;
  if constexpr (VECTORS == 0) {
    if (i < n) v = x[i];
  } else {
    for (int k = 0; k < VECTORS; ++k) {
      if ((i * VECTORS + k) * 4 < n) {
        int4 four = reinterpret_cast<const int4*>(x)[i * VECTORS + k];
        v += four.x + four.y + four.z + four.w;
      }
    }
  }
  s[t] = v;
  __syncthreads();
#pragma unroll
  for (int o = 256; o > 32; o /= 2) {
    if (t < o) s[t] += s[t + o];
    __syncthreads();
  }
  volatile int* last = s;
#pragma unroll
  for (int o = 32; o > 0; o /= 2) {
    if (t < o) last[t] += last[t + o];
    __syncwarp();
  }
  if (t == 0) atomicAdd(sum, last[0]);
}
extern "C" __global__ void reduce_ints_single(const int* x, int* sum, int n) {
  reduce_ints<0>(x, sum, n);
}
extern "C" __global__ void reduce_ints_vector(const int* x, int* sum, int n) {
  reduce_ints<3>(x, sum, n);
}

// --- transposes of a square matrix ---------------------------------------------------------------
// Blocks of 32 x 8 threads and tiles of 32 x 32, four elements a thread.
extern "C" __global__ void transpose_copy(float* y, const float* x, int n) {
  int c = blockIdx.x * 32 + threadIdx.x, r = blockIdx.y * 32 + threadIdx.y;
  for (int k = 0; k < 32; k += 8) y[(r + k) * n + c] = x[(r + k) * n + c];
}
extern "C" __global__ void transpose_naive(float* y, const float* x, int n) {
  int c = blockIdx.x * 32 + threadIdx.x, r = blockIdx.y * 32 + threadIdx.y;
  for (int k = 0; k < 32; k += 8) y[c * n + r + k] = x[(r + k) * n + c];
}
template <int PAD>
__device__ __forceinline__ void transpose_tile(float* y, const float* x, int n) {
  __shared__ float tile[32][32 + PAD];
  int c = blockIdx.x * 32 + threadIdx.x, r = blockIdx.y * 32 + threadIdx.y;
  for (int k = 0; k < 32; k += 8) tile[threadIdx.y + k][threadIdx.x] = x[(r + k) * n + c];
  __syncthreads();
  c = blockIdx.y * 32 + threadIdx.x, r = blockIdx.x * 32 + threadIdx.y;
  for (int k = 0; k < 32; k += 8) y[(r + k) * n + c] = tile[threadIdx.x][threadIdx.y + k];
}
extern "C" __global__ void transpose_shared(float* y, const float* x, int n) {
  transpose_tile<0>(y, x, n);
}
extern "C" __global__ void transpose_padded(float* y, const float* x, int n) {
  transpose_tile<1>(y, x, n);
}
// Blocks of 16 x 16, one element a thread: stores that scatter, or loads that do.
extern "C" __global__ void transpose_scatter(float* y, const float* x, int n) {
  int c = blockIdx.x * 16 + threadIdx.x, r = blockIdx.y * 16 + threadIdx.y;
  if (c < n && r < n) y[c * n + r] = x[r * n + c];
}
extern "C" __global__ void transpose_gather(float* y, const float* x, int n) {
  int c = blockIdx.x * 16 + threadIdx.x, r = blockIdx.y * 16 + threadIdx.y;
  if (c < n && r < n) y[r * n + c] = x[c * n + r];
}

// --- norms: y = x / rms(x) * w -------------------------------------------------------------------
// A block of 512 a row of 4,096, which it reads again for the second pass.
extern "C" __global__ void rmsnorm_block(const float* x, const float* w, float* y, float eps) {
  constexpr int N = 4096, THREADS = 512;
  __shared__ float s[THREADS], scale;
  const int t = threadIdx.x;
  x += static_cast<size_t>(blockIdx.x) * N;
  y += static_cast<size_t>(blockIdx.x) * N;
  float sum = 0;
  for (int i = t; i < N; i += THREADS) sum += x[i] * x[i];
  s[t] = sum;
  __syncthreads();
  for (int o = THREADS / 2; o > 0; o /= 2) {
    if (t < o) s[t] += s[t + o];
    __syncthreads();
  }
  if (t == 0) scale = rsqrtf(s[0] / N + eps);
  __syncthreads();
  for (int i = t; i < N; i += THREADS) y[i] = x[i] * scale * w[i];
}
// The same in vectors of four; the row waits in shared memory, warps add by shuffles.
extern "C" __global__ void rmsnorm_block_vector(const float4* x, const float4* w, float4* y,
                                                float eps) {
  constexpr int N = 4096, THREADS = 512, WARPS = THREADS / 32;
  __shared__ float4 row[N / 4];
  __shared__ float s[WARPS], scale;
  const int t = threadIdx.x;
  x += static_cast<size_t>(blockIdx.x) * (N / 4);
  y += static_cast<size_t>(blockIdx.x) * (N / 4);
  float sum = 0;
  for (int i = t; i < N / 4; i += THREADS) {
    float4 v = x[i];
    row[i] = v;
    sum += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
  }
  for (int o = 16; o > 0; o /= 2) sum += __shfl_xor_sync(~0u, sum, o);
  if (t % 32 == 0) s[t / 32] = sum;
  __syncthreads();
  if (t < 32) {
    sum = t < WARPS ? s[t] : 0.0f;
    for (int o = 16; o > 0; o /= 2) sum += __shfl_xor_sync(~0u, sum, o);
    if (t == 0) scale = rsqrtf(sum / N + eps);
  }
  __syncthreads();
  for (int i = t; i < N / 4; i += THREADS) {
    float4 v = row[i], g = w[i];
    y[i] = make_float4(v.x * scale * g.x, v.y * scale * g.y, v.z * scale * g.z,
                       v.w * scale * g.w);
  }
}
// With a bias: a thread a row, or a warp a row with stores that bypass the caches.
extern "C" __global__ void rmsnorm_thread(float* y, const float* x, const float* w, const float* b,
                                          int rows, int n) {
  int row = blockIdx.x * blockDim.x + threadIdx.x;
  if (row >= rows) return;
  x += row * n, y += row * n;
  float sum = 0;
  for (int i = 0; i < n; ++i) sum += x[i] * x[i];
  float rms = __fsqrt_rn(__fdividef(sum, n) + 1e-5f);
  for (int i = 0; i < n; ++i) y[i] = __fdividef(x[i], rms) * w[i] + b[i];
}
extern "C" __global__ void rmsnorm_warp(float* __restrict__ y, const float* __restrict__ x,
                                        const float* __restrict__ w, const float* __restrict__ b,
                                        int rows, int n) {
  int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= rows) return;
  x += row * n, y += row * n;
  float sum = 0;
  for (int i = lane; i < n; i += 32) sum += x[i] * x[i];
  for (int o = 16; o > 0; o /= 2) sum += __shfl_xor_sync(~0u, sum, o);
  float rms = __fsqrt_rn(__fdividef(sum, n) + 1e-5f);
  for (int i = lane; i < n; i += 32)
    __stcs(y + i, __fdividef(__ldcs(x + i), rms) * w[i] + b[i]);
}

// In bf16 and in place, after a residual: r += x, x = norm(r). A block a row, which stays in
// registers, in one or two vectors of 16 bytes a thread.
template <int EACH>
__device__ __forceinline__ void rmsnorm_residual(uint4* x, const uint4* w, uint4* r, float eps) {
  __shared__ float s[32];
  const int t = threadIdx.x, n = EACH * blockDim.x;
  x += static_cast<size_t>(blockIdx.x) * n;
  r += static_cast<size_t>(blockIdx.x) * n;
  float v[EACH][8], sum = 0;
  for (int k = 0; k < EACH; ++k) {
    uint4 a = x[t + k * blockDim.x], b = r[t + k * blockDim.x];
    __nv_bfloat162 *more = reinterpret_cast<__nv_bfloat162*>(&a),
                   *both = reinterpret_cast<__nv_bfloat162*>(&b);
    for (int i = 0; i < 4; ++i) {
      float2 f = __bfloat1622float2(both[i]), g = __bfloat1622float2(more[i]);
      v[k][2 * i] = f.x + g.x, v[k][2 * i + 1] = f.y + g.y;
      sum += v[k][2 * i] * v[k][2 * i] + v[k][2 * i + 1] * v[k][2 * i + 1];
      both[i] = __floats2bfloat162_rn(v[k][2 * i], v[k][2 * i + 1]);
    }
    r[t + k * blockDim.x] = b;
  }
  for (int o = 16; o > 0; o /= 2) sum += __shfl_xor_sync(~0u, sum, o);
  if (t % 32 == 0) s[t / 32] = sum;
  __syncthreads();
  if (t < 32) {
    sum = t < blockDim.x / 32 ? s[t] : 0.0f;
    for (int o = 16; o > 0; o /= 2) sum += __shfl_xor_sync(~0u, sum, o);
    s[t] = rsqrtf(sum / (n * 8) + eps);
  }
  __syncthreads();
  const float scale = s[t / 32];
  for (int k = 0; k < EACH; ++k) {
    uint4 a = w[t + k * blockDim.x];
    __nv_bfloat162* g = reinterpret_cast<__nv_bfloat162*>(&a);
    for (int i = 0; i < 4; ++i) {
      float2 f = __bfloat1622float2(g[i]);
      g[i] = __floats2bfloat162_rn(v[k][2 * i] * f.x * scale, v[k][2 * i + 1] * f.y * scale);
    }
    x[t + k * blockDim.x] = a;
  }
}
extern "C" __global__ void rmsnorm_residual_1(uint4* x, const uint4* w, uint4* r, float eps) {
  rmsnorm_residual<1>(x, w, r, eps);
}
extern "C" __global__ void rmsnorm_residual_2(uint4* x, const uint4* w, uint4* r, float eps) {
  rmsnorm_residual<2>(x, w, r, eps);
}

// --- softmax of rows, online: the running maximum rescales the running sum -----------------------
__device__ __forceinline__ void softmax_join(float& top, float& sum) {
  for (int o = 16; o > 0; o /= 2) {
    float other = __shfl_xor_sync(~0u, top, o), more = __shfl_xor_sync(~0u, sum, o);
    float both = fmaxf(top, other);
    sum = sum * expf(top - both) + more * expf(other - both);
    top = both;
  }
}
// A block of 256 a row, which is read twice.
extern "C" __global__ void softmax_block(const float* x, float* y, int n) {
  __shared__ float tops[32], sums[32];
  const int t = threadIdx.x, lane = t % 32, warps = blockDim.x / 32;
  x += static_cast<size_t>(blockIdx.x) * n;
  y += static_cast<size_t>(blockIdx.x) * n;
  float top = x[t], sum = 1.0f;
  for (int i = t + blockDim.x; i < n; i += blockDim.x) {
    float both = fmaxf(top, x[i]);
    sum = sum * expf(top - both) + expf(x[i] - both);
    top = both;
  }
  softmax_join(top, sum);
  if (lane == 0) tops[t / 32] = top, sums[t / 32] = sum;
  __syncthreads();
  top = lane < warps ? tops[lane] : -3.4e38f;
  sum = lane < warps ? sums[lane] : 0.0f;
  softmax_join(top, sum);
  for (int i = t; i < n; i += blockDim.x) y[i] = expf(x[i] - top) / sum;
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

"""

TENSOR_SOURCE = r"""
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <float.h>

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

__device__ __forceinline__ void copies_are_here() {
  asm volatile("cp.async.commit_group;\ncp.async.wait_group 0;");
  __syncthreads();
}
__device__ __forceinline__ void load_a(unsigned (&a)[4], unsigned address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(address));
}
__device__ __forceinline__ void load_b(unsigned (&b)[2], unsigned address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(b[0]), "=r"(b[1])
               : "r"(address));
}
__device__ __forceinline__ void load_b_turned(unsigned (&b)[2], unsigned address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(b[0]), "=r"(b[1])
               : "r"(address));
}
__device__ __forceinline__ void multiply(float (&d)[4], const unsigned (&a)[4],
                                         const unsigned (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
      "{%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// --- bf16 matrix product without a pipeline ------------------------------------------------------
// D[m, n] = A[m, k] B[n, k]^T; tiles 128 x 128 x 64, four warps of 64 x 64. Each step copies, waits
// and computes; rows of 128 bytes lie as they are (conflicts), padded, or swizzled.
enum Layout { PLAIN, PADDED, SWIZZLED };
template <Layout LAYOUT> __device__ __forceinline__ unsigned place(int row, int piece) {
  constexpr int STRIDE = LAYOUT == PADDED ? 144 : 128;
  return row * STRIDE + (LAYOUT == SWIZZLED ? piece ^ (row & 7) : piece) * 16;
}
template <Layout LAYOUT>
__device__ __forceinline__ void product(int N, int K, const __nv_bfloat16* A,
                                        const __nv_bfloat16* B, __nv_bfloat16* D) {
  extern __shared__ char tiles[];
  const int t = threadIdx.x, lane = t % 32, wm = t / 64 * 64, wn = t / 32 % 2 * 64;
  const unsigned a_tile = address_of(tiles), b_tile = a_tile + place<LAYOUT>(128, 0);
  A += static_cast<size_t>(blockIdx.y) * 128 * K;
  B += static_cast<size_t>(blockIdx.x) * 128 * K;
  float d[4][8][4] = {};
  for (int k = 0; k < K; k += 64) {
    for (int i = 0; i < 8; ++i) {
      const int row = i * 16 + t / 8, piece = t % 8;
      const size_t from = static_cast<size_t>(row) * K + k + piece * 8;
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                       a_tile + place<LAYOUT>(row, piece)),
                   "l"(A + from));
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                       b_tile + place<LAYOUT>(row, piece)),
                   "l"(B + from));
    }
    copies_are_here();
#pragma unroll
    for (int kk = 0; kk < 4; ++kk) {
      unsigned b[8][2];
      for (int j = 0; j < 8; ++j)
        load_b(b[j], b_tile + place<LAYOUT>(wn + j * 8 + lane % 8, kk * 2 + lane / 8 % 2));
      for (int i = 0; i < 4; ++i) {
        unsigned a[4];
        load_a(a, a_tile + place<LAYOUT>(wm + i * 16 + lane % 16, kk * 2 + lane / 16));
        for (int j = 0; j < 8; ++j) multiply(d[i][j], a, b[j]);
      }
    }
    __syncthreads();
  }
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 8; ++j) {
      const size_t row = blockIdx.y * 128 + wm + i * 16 + lane / 4;
      const int col = blockIdx.x * 128 + wn + j * 8 + lane % 4 * 2;
      auto store = [&](size_t r, float x, float y) {
        *reinterpret_cast<__nv_bfloat162*>(&D[r * N + col]) = __floats2bfloat162_rn(x, y);
      };
      store(row, d[i][j][0], d[i][j][1]);
      store(row + 8, d[i][j][2], d[i][j][3]);
    }
}
#define PRODUCT(NAME, LAYOUT)                                                                    \
  extern "C" __global__ void __launch_bounds__(128)                                              \
      NAME(int, int N, int K, const __nv_bfloat16* A, const __nv_bfloat16* B, __nv_bfloat16* D) { \
    product<LAYOUT>(N, K, A, B, D);                                                              \
  }
PRODUCT(bgemm_plain, PLAIN)
PRODUCT(bgemm_padded, PADDED)
PRODUCT(bgemm_swizzled, SWIZZLED)

// --- attention: softmax(Q K^T / sqrt(128)) V, one head a blockIdx.y ------------------------------
// A block has 128 queries, each of its four warps 32 of them, kept in registers; 64 keys, then
// their values, are copied, waited for and used. Rows of 256 bytes lie as they are, or swizzled.
template <bool SWIZZLE> __device__ __forceinline__ unsigned spot(int row, int piece) {
  return row * 256 + (SWIZZLE ? piece ^ (row & 7) : piece) * 16;
}
template <bool SWIZZLE, int ROWS>
__device__ __forceinline__ void fetch(unsigned to, const __nv_bfloat16* from) {
#pragma unroll
  for (int i = 0; i < ROWS / 8; ++i) {
    const int row = i * 8 + threadIdx.x / 16, piece = threadIdx.x % 16;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + spot<SWIZZLE>(row, piece)),
                 "l"(from + row * 128 + piece * 8));
  }
}
template <bool SWIZZLE>
__device__ __forceinline__ void attention(const __nv_bfloat16* Q, const __nv_bfloat16* K,
                                          const __nv_bfloat16* V, __nv_bfloat16* O, int queries,
                                          int keys) {
  extern __shared__ char tiles[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const unsigned k_tile = address_of(tiles), v_tile = k_tile + 64 * 256;
  const size_t own = (static_cast<size_t>(blockIdx.y) * queries + blockIdx.x * 128) * 128;
  K += static_cast<size_t>(blockIdx.y) * keys * 128;
  V += static_cast<size_t>(blockIdx.y) * keys * 128;
  unsigned q[2][8][4];
  fetch<SWIZZLE, 128>(k_tile, Q + own);
  copies_are_here();
  for (int i = 0; i < 2; ++i)
    for (int kk = 0; kk < 8; ++kk)
      load_a(q[i][kk],
             k_tile + spot<SWIZZLE>(warp * 32 + i * 16 + lane % 16, kk * 2 + lane / 16));
  __syncthreads();
  const float scale = rsqrtf(128.0f);
  float o[2][16][4] = {}, top[2][2] = {{-FLT_MAX, -FLT_MAX}, {-FLT_MAX, -FLT_MAX}}, sum[2][2] = {};
  for (int start = 0; start < keys; start += 64) {
    float s[2][8][4] = {};
    fetch<SWIZZLE, 64>(k_tile, K + static_cast<size_t>(start) * 128);
    copies_are_here();
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int kk = 0; kk < 8; ++kk) {
        unsigned b[2];
        load_b(b, k_tile + spot<SWIZZLE>(j * 8 + lane % 8, kk * 2 + lane / 8 % 2));
        for (int i = 0; i < 2; ++i) multiply(s[i][j], q[i][kk], b);
      }
    unsigned p[2][4][4];
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {  // a lane has two rows of each product
        float now = top[i][half];
        for (int j = 0; j < 8; ++j)
          for (int e = 2 * half; e < 2 * half + 2; ++e) {
            s[i][j][e] *= scale;
            now = fmaxf(now, s[i][j][e]);
          }
        now = fmaxf(now, __shfl_xor_sync(~0u, now, 1));
        now = fmaxf(now, __shfl_xor_sync(~0u, now, 2));
        const float shrink = __expf(top[i][half] - now);
        top[i][half] = now;
        for (int j = 0; j < 16; ++j)
          for (int e = 2 * half; e < 2 * half + 2; ++e) o[i][j][e] *= shrink;
        float more = 0;
        for (int j = 0; j < 8; ++j) {
          const float x = __expf(s[i][j][2 * half] - now), y = __expf(s[i][j][2 * half + 1] - now);
          more += x + y;
          __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
          p[i][j / 2][j % 2 * 2 + half] = reinterpret_cast<unsigned&>(pair);
        }
        more += __shfl_xor_sync(~0u, more, 1);
        more += __shfl_xor_sync(~0u, more, 2);
        sum[i][half] = sum[i][half] * shrink + more;
      }
    fetch<SWIZZLE, 64>(v_tile, V + static_cast<size_t>(start) * 128);
    copies_are_here();
#pragma unroll
    for (int kk = 0; kk < 4; ++kk)
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        unsigned b[2];
        load_b_turned(b, v_tile + spot<SWIZZLE>(kk * 16 + lane % 16, j));
        for (int i = 0; i < 2; ++i) multiply(o[i][j], p[i][kk], b);
      }
  }
  for (int i = 0; i < 2; ++i)
    for (int j = 0; j < 16; ++j)
      for (int half = 0; half < 2; ++half) {
        const int row = warp * 32 + i * 16 + half * 8 + lane / 4;
        *reinterpret_cast<__nv_bfloat162*>(&O[own + row * 128 + j * 8 + lane % 4 * 2]) =
            __floats2bfloat162_rn(o[i][j][2 * half] / sum[i][half],
                                  o[i][j][2 * half + 1] / sum[i][half]);
      }
}
extern "C" __global__ void __launch_bounds__(128)
    attention_plain(const __nv_bfloat16* Q, const __nv_bfloat16* K, const __nv_bfloat16* V,
                    __nv_bfloat16* O, int queries, int keys) {
  attention<false>(Q, K, V, O, queries, keys);
}
extern "C" __global__ void __launch_bounds__(128)
    attention_swizzled(const __nv_bfloat16* Q, const __nv_bfloat16* K, const __nv_bfloat16* V,
                       __nv_bfloat16* O, int queries, int keys) {
  attention<true>(Q, K, V, O, queries, keys);
}
"""


@dataclass
class Row:
    """One published measurement: ``value`` in ``unit`` ("GB/s", "TFLOP/s", "µs")."""

    kernel: str
    device: str
    value: float
    unit: str
    source: str
    block: int
    what: str
    launch: float = 0.0  # of the device's, for queues of short kernels


Case = tuple[model.Work, Dynamic, float]  # what a launch does, its SASS, and bytes or FLOP to count


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


def _products_in_bf16() -> list[Row]:
    measured = [  # kernel, TFLOP/s of an A100-SXM4-40GB and of an RTX 5090 held to 400 W, [G]
        ("bgemm_plain", 64.94, 152.91),
        ("bgemm_padded", 166.78, 160.47),
        ("bgemm_swizzled", 190.94, 177.42),
    ]
    return [
        Row(kernel, device, value, "TFLOP/s", "[G]", 128, "4096³, tensor cores, no pipeline")
        for kernel, *values in measured
        for device, value in zip(("a100-40", "rtx5090"), values, strict=True)
    ]


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
    Row("sgemm_naive", "rtx4090", 0.6353, "TFLOP/s", "[C]", 1024, "4096³"),
    Row("sgemm_coalesced", "rtx4090", 4.8874, "TFLOP/s", "[C]", 1024, "4096³"),
    Row("sgemm_shared", "rtx4090", 6.5920, "TFLOP/s", "[C]", 1024, "4096³, 32×32 tiles"),
    Row("hgemm_mma", "rtx4090", 153.6, "TFLOP/s", "[M]", 128, "4096³, tensor cores, 3 stages"),
    *_products_in_bf16(),
    *(
        Row(kernel, "rtx5090", value, "TFLOP/s", "[G]", 128, "8 heads, 4096×8192, 128 wide")
        for kernel, value in (("attention_plain", 142.87), ("attention_swizzled", 181.11))
    ),
    Row("reduce_ints_single", "h100", 882.823, "GB/s", "[V]", 512, "1 Gi ints, one a thread"),
    Row("reduce_ints_vector", "h100", 3229.98, "GB/s", "[V]", 512, "1 Gi ints, 12 a thread *"),
    Row("rmsnorm_block", "h100", 3015.30, "GB/s", "[R]", 512, "262,144 rows of 4,096"),
    Row("rmsnorm_block_vector", "h100", 3062.63, "GB/s", "[R]", 512, "262,144 rows of 4,096"),
    Row("rmsnorm_residual_1", "h200", 33.09, "µs", "[Q]", 512, "4,096 rows of 4,096, in bf16"),
    Row("rmsnorm_residual_1", "h200", 65.38, "µs", "[Q]", 1024, "4,096 rows of 8,192, in bf16"),
    Row("rmsnorm_residual_2", "b200", 20.61, "µs", "[Q]", 256, "4,096 rows of 4,096, in bf16"),
    Row("rmsnorm_residual_2", "b200", 42.46, "µs", "[Q]", 512, "4,096 rows of 8,192, in bf16"),
    Row("rmsnorm_thread", "l4", 560.7, "µs", "[A]", 32, "8,192 rows of 768, blocks of 32", 1),
    Row("rmsnorm_thread", "l4", 678.6, "µs", "[A]", 256, "8,192 rows of 768, blocks of 256", 1),
    Row("rmsnorm_warp", "l4", 238.0, "µs", "[A]", 32, "8,192 rows of 768, blocks of 32", 1),
    Row("rmsnorm_warp", "l4", 243.4, "µs", "[A]", 256, "8,192 rows of 768, blocks of 256", 1),
    Row("softmax_block", "rtx4090", 908.45, "µs", "[C]", 256, "1,024 rows of 65,536", 1),
    Row("transpose_copy", "a100-40", 66.0, "µs", "[T]", 256, "4096², a launch at a time", 1),
    Row("transpose_scatter", "a100-40", 161.143, "µs", "[T]", 256, "4096², blocks of 16×16", 1),
    Row("transpose_gather", "a100-40", 143.597, "µs", "[T]", 256, "4096², blocks of 16×16", 1),
    Row("transpose_naive", "a100-40", 686.513, "µs", "[T]", 256, "4096², blocks of 32×8", 1),
    Row("transpose_shared", "a100-40", 180.476, "µs", "[T]", 256, "4096², 32×32 tiles", 1),
    Row("transpose_padded", "a100-40", 108.857, "µs", "[T]", 256, "4096², 32×33 tiles", 1),
]  # fmt: skip


def stream_case(row: Row, module: Module) -> Case:
    """A stream over 128 Mi doubles (16 MB in all if it is said to be in L2)."""
    device = get_device(row.device)
    in_l2 = "L2" in row.what
    n = 2**20 if in_l2 else 2**27
    blocks = math.ceil(n / row.block)
    arrays = [np.zeros(4 * row.block) for _ in range(3)]  # what the representative blocks touch
    work, dynamic = model.profile(
        module.kernel(row.kernel), blocks, row.block, [*arrays, 4 * row.block], device
    )
    streams = {"init": 1, "read": 1, "scale": 2, "triad": 3}[row.kernel.split("_")[1]]
    if in_l2:  # from one replay to the next everything stays
        work.dram_read = work.dram_write = 0.0
    elif "2 blocks" in row.what:
        # What the original's spoiler does: no more than two blocks of this size are resident.
        work.shared = device.sm.shared // 2 - device.sm.shared_reserved
    return work, dynamic, streams * 8.0 * n


def reduce_case(row: Row, module: Module) -> Case:
    n = 2**30 if "ints" in row.kernel else 2**24
    each = {"reduce_interleaved": 256, "reduce_ints_single": 512, "reduce_ints_vector": 6144}
    block = each.get(row.kernel, 512)
    dtype = np.int32 if "ints" in row.kernel else np.float32
    args = [np.ones(2 * block, dtype), np.zeros(1, dtype), n]  # two blocks are emulated
    work, dynamic = model.profile(
        module.kernel(row.kernel), math.ceil(n / block), row.block, args, row.device
    )
    return work, dynamic, 4.0 * n


def transpose_case(row: Row, module: Module) -> Case:
    n = 4096
    side, block = (16, (16, 16)) if row.kernel.endswith(("scatter", "gather")) else (32, (32, 8))
    args = [np.zeros((n, n), np.float32), np.zeros((n, n), np.float32), n]
    kernel = module.kernel(row.kernel)
    work, dynamic = model.profile(kernel, (n // side, n // side), block, args, row.device)
    return work, dynamic, 8.0 * n * n


def rmsnorm_case(row: Row, module: Module) -> Case:
    kernel = module.kernel(row.kernel)
    if row.kernel.startswith("rmsnorm_block"):
        rows, n = 2**18, 4096
        x, y, w = np.zeros((2, n), np.float32), np.zeros((2, n), np.float32), np.ones(n, np.float32)
        work, dynamic = model.profile(kernel, rows, row.block, [x, w, y, 1e-5], row.device)
    elif row.kernel.startswith("rmsnorm_residual"):
        rows, n = 4096, row.block * (8 if row.kernel.endswith("1") else 16)
        x, r, w = np.zeros((2, n), np.uint16), np.zeros((2, n), np.uint16), np.zeros(n, np.uint16)
        work, dynamic = model.profile(kernel, rows, row.block, [x, w, r, 1e-5], row.device)
    else:
        rows, n = 8192, 768
        x, y = (np.zeros((rows, n), np.float32) for _ in range(2))
        w, b = (np.ones(n, np.float32) for _ in range(2))
        blocks = rows // row.block * (32 if row.kernel == "rmsnorm_warp" else 1)
        work, dynamic = model.profile(kernel, blocks, row.block, [y, x, w, b, rows, n], row.device)
    return work, dynamic, 8.0 * rows * n


def softmax_case(row: Row, module: Module) -> Case:
    rows, n = 1024, 65536
    args = [np.zeros((2, n), np.float32), np.zeros((2, n), np.float32), n]
    work, dynamic = model.profile(module.kernel(row.kernel), rows, row.block, args, row.device)
    return work, dynamic, 8.0 * rows * n


def attention_case(row: Row, module: Module) -> Case:
    heads, queries, keys, wide = 8, 4096, 8192, 128
    q, o = (np.zeros((heads, queries, wide), np.uint16) for _ in range(2))
    k, v = (np.zeros((heads, keys, wide), np.uint16) for _ in range(2))
    work, dynamic = model.profile(
        module.kernel(row.kernel), (queries // 128, heads), row.block,
        [q, k, v, o, queries, keys], row.device, shared_bytes=2 * 64 * wide * 2,
    )  # fmt: skip
    return work, dynamic, 4.0 * heads * queries * keys * wide


def gemm_case(row: Row, module: Module) -> Case:
    size = 4096
    blocks = {
        "sgemm_naive": (128, 128), "sgemm_coalesced": (128, 128), "sgemm_shared": (128, 128),
        "sgemm_tile_1d": (64, 64),
    }.get(row.kernel, (32, 32))  # fmt: skip
    block = (32, 32, 1) if row.kernel == "sgemm_naive" else (row.block, 1, 1)
    kernel = module.kernel(row.kernel)
    if row.kernel == "hgemm_mma":
        a, b = (np.zeros((size, size), np.float16) for _ in range(2))
        args = [size, size, size, a, b, np.zeros((size, size), np.float32)]
        shared = 3 * 2 * 128 * 32 * 2
    elif row.kernel.startswith("bgemm"):
        args = [size, size, size, *(np.zeros((size, size), np.uint16) for _ in range(3))]
        shared = 2 * 128 * (144 if row.kernel == "bgemm_padded" else 128)
    else:
        a, b, c = (np.zeros((size, size), np.float32) for _ in range(3))
        args = [size, size, size, 1.0, a, b, 0.0, c]
        shared = 0
    work, dynamic = model.profile(
        kernel, (*blocks, 1), block, args, row.device, shared_bytes=shared
    )
    return work, dynamic, 2.0 * size**3


CASES: dict[str, Callable[[Row, Module], Case]] = {
    "stream": stream_case, "reduce": reduce_case, "transpose": transpose_case,
    "rmsnorm": rmsnorm_case, "softmax": softmax_case, "attention": attention_case,
    "sgemm": gemm_case, "hgemm": gemm_case, "bgemm": gemm_case,
}  # fmt: skip


def evaluate(rows: list[Row], report: Callable[[str], None], terms: bool = False) -> list[dict]:
    modules: dict[tuple[str, str], Module] = {}
    results = []
    for row in rows:
        target = get_device(row.device).target
        family = row.kernel.split("_")[0]
        source = TENSOR_SOURCE if family in ("hgemm", "bgemm", "attention") else SOURCE
        if (source, target) not in modules:
            modules[source, target] = Module.from_cuda(source, target)
        work, dynamic, quantity = CASES[family](row, modules[source, target])
        modelled = model.model(work, row.device, launch=row.launch)
        scale = {"GB/s": 1e9, "TFLOP/s": 1e12, "µs": 1e-6}[row.unit]
        if row.unit == "µs":
            measured, value = row.value * scale, modelled.time / scale
        else:
            measured, value = quantity / (row.value * scale), quantity / modelled.time / scale
        error = modelled.time / measured - 1
        results.append(
            {
                "kernel": row.kernel, "device": row.device, "what": row.what, "source": row.source,
                "measured_us": measured * 1e6, "modelled_us": modelled.time * 1e6, "error": error,
                "measured": row.value, "modelled": value,
                "unit": row.unit, "bottleneck": modelled.bottleneck,
                "unexplained": dynamic.unexplained,
            }
        )  # fmt: skip
        report(
            f"{row.kernel:20} {get_device(row.device).name:18.18} {row.what:32} {row.value:8.4g} "
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
        f"{'kernel':20} {'device':18} {'case':32} {'measured':>8} {'modelled':>8} {'':8} "
        f"{'time':>7}  {'modelled bottleneck':22} source"
    )
    rows = [row for row in ROWS if options.only in row.kernel]
    everything = evaluate(rows, print, options.terms)
    results = [r for r in everything if not r["what"].endswith("*")]

    def summary(chosen: list[dict]) -> str:
        errors = np.array([abs(r["error"]) for r in chosen])
        return (
            f"{len(chosen)} measurements of {len({r['kernel'] for r in chosen})} kernels on "
            f"{len({r['device'] for r in chosen})} devices: median {np.median(errors):.0%}, mean "
            f"{errors.mean():.0%}, worst {errors.max():.0%}"
        )

    streams = [r for r in results if r["kernel"].startswith("stream")]
    others = [r for r in results if not r["kernel"].startswith("stream")]
    print(f"\n|error| of the modelled time, without *, in {time.time() - started:.0f} s:")
    for name, chosen in (("all", results), ("streams", streams), ("others", others)):
        if chosen:
            print(f"  {name:8} {summary(chosen)}")
    print("mean error of a kernel:")
    for kernel in sorted({r["kernel"] for r in results}):
        own = [r["error"] for r in results if r["kernel"] == kernel]
        print(f"  {kernel:20} {np.mean(own):+.0%} over {len(own)}")
    for r in everything:
        if r["unexplained"] > 0.02:
            print(
                f"{r['kernel']} on {r['device']}: {r['unexplained']:.0%} of what was counted line "
                "by line is elsewhere, or joined, in SASS"
            )
    if options.json:
        options.json.write_text(json.dumps(everything, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
