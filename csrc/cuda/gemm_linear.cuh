// y = x W^T + bias + scaling S B^T for M = 16 rows of x and more (dispatch.cpp says how
// many): tensor cores, the weight decoded once a CTA.
//
//   CTA    y tile [tile_m, tile_n]; for each step of tile_k columns, several steps ahead of their
//   use:
//            x       [tile_m, tile_k]      cp.async, 16-byte chunks, swizzled (copy.cuh)
//            packed  [tile_n, tile_k / 2]  cp.async, the same
//            scales                        straight to registers, one step ahead
//   warp   32 rows of W and all of x's tile: warps share the N side alone, so each weight is
//   decoded
//          by one lane of the CTA, in the registers that mma wants it in, and never stored
//   lane   (g, t): run t of rows 4g ... 4g + 3, tile_k / 4 weights of each. The codes of 4 x 8
//   weights
//          give mma's A (two tiles of 16 rows, two k-steps); 16 bytes of a row of x, at the same 8
//          columns, are its B for both k-steps: the contraction is permuted alike on both sides.
//
//            mma's index of the contraction   2t  2t+1  2t+8  2t+9     (k-step 0), again (k-step 1)
//            column of W and of x             c   c+1   c+2   c+3      c+4 ... c+7;  c = t run + 8
//            w
//
//          W is A, not B: A's registers may be any four, while B's pair has to come out of a
//          16-byte load as neighbours, which x's do. Which row of W is which row of A is free, too:
//          a lane's results for a row of x are 4 neighbouring outputs, and a warp's 32 are stored
//          whole.
//
// LoRA is `rank` more columns of the contraction: S, scaled and rounded once to the compute dtype
// by gemm_lora.cu, and B, rounded once here, from L2 in 16-byte loads straight into fragments. Bias
// and rounding follow once. With splits > 1 a CTA sums a part of the contraction into the workspace
// (fp32), and `sum_splits` adds the parts in the order of the splits: no atomics, the same bits in
// every run.
//
// Cost (sm_80): 21 instructions to decode 8 weights, 4 for the table (run 64), 2 mma and half a
// load for each 16 rows of x; benchmarks/cuda_gemm.py counts them.
//
// Numerics: variant (a), weights round_to_dtype(codebook[q] * scale); products exact, sums in fp32.
// Against float64 on the same rounded operands |error| <= (K + rank + splits + 2) 2^-23 sum |x w|
// before the one rounding to y's dtype; S itself is rounded once to the compute dtype (2^-8 or
// 2^-11 of it).
#pragma once
#include <iterator>

#include "gemm_lora.cuh"
#include "gemm_tiles.h"
#include "gemm_weight.cuh"

namespace qlk::cuda {
struct GemmLinearArguments {
  Weight w;
  int64_t m;
  const void* x;
  const void* s;  // [m, lora_columns] of T, scaled; zero beyond the rank
  Matrix b;
  int64_t rank, lora_columns;
  bool b_aligned;
  Matrix bias;
  void* y;
  DType y_dtype;
  float* partial;  // [splits, m, n], or null: y is written
  int64_t steps;   // of tile_k columns, cut evenly among the splits
};

// Launches the kernel that was compiled for T, the scales' kind and the tile; in a source file for
// each T, so that they compile side by side.
template <class T>
cudaError_t run_gemm_linear(const GemmLinearArguments& a, const GemmTile& tile, int splits,
                            cudaStream_t stream);

namespace {

constexpr int kWarpRows = 32;  // of W
constexpr int kGroups = 4;     // of 8 rows; two are one A tile of mma

template <class T, ScaleKind kind, int kTileM, int kTileN, int kTileK, int kStages>
struct Linear {
  static constexpr int kWarps = kTileN / kWarpRows;
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr bool kAnywhere = kStages == 1;  // any k, any alignment
  using Packed = PackedTile<kTileN, kTileK>;
  static constexpr int kRun = Packed::kRun;
  static constexpr int kXChunks = kTileK / 8;
  static constexpr int kXBytes = kTileM * kTileK * kElementBytes;
  static constexpr int kStageBytes = kXBytes + (kAnywhere ? 0 : Packed::kBytes);
  static constexpr int kTilesM = kTileM / 8;  // mma's n
  using Accumulators = FragC[kTilesM][kGroups / 2];

  // Group j of a warp is its rows j, j + 4, j + 8 ..., so that lane g finds its four rows, 4g ...
  // 4g + 3, in the four groups; the tile holds a warp's groups one below the other. Of the rows
  // that the CTA copies at once these are the one that a thread takes, and its place in the tile in
  // pass i.
  template <int kAtOnce>
  static __device__ __forceinline__ int row_of(int at) {
    if constexpr (kAtOnce == 16) return at % 4 * kGroups + at / 4;
    return at / kWarpRows * kWarpRows + at % 8 * kGroups + at % kWarpRows / 8;
  }
  template <int kAtOnce>
  static __device__ __forceinline__ int place_of(int at, int i) {
    static_assert(kAtOnce >= 16);
    if constexpr (kAtOnce == 16) return at / 4 * 8 + at % 4 + i * 4;  // half of each group
    return at + i * kAtOnce;
  }

  // x's tile, element by element.
  static __device__ __forceinline__ void copy_x_anywhere(T* tile, const GemmLinearArguments& p,
                                                         int64_t m0, int64_t k0) {
    for (int i = threadIdx.x; i < kTileM * kTileK; i += kThreads) {
      const int row = i / kTileK, column = i % kTileK;
      const int64_t source = min(m0 + row, p.m - 1), k = k0 + column;
      const T value = k < p.w.k ? static_cast<const T*>(p.x)[source * p.w.k + k] : T(0.0f);
      tile[tile_chunk<kXChunks>(row, column / 8) * 8 + column % 8] = value;
    }
  }

  // How many times 8 rows of x are multiplied together: with 4 or more matrix instructions between
  // the two that add to one accumulator, none waits for another.
  static constexpr int kTogether = 2;

  // acc += 8 columns of W (4 groups of rows) times the same columns of kTogether x 8 rows of x.
  static __device__ __forceinline__ void multiply(FragC (*acc)[kGroups / 2],
                                                  const uint32_t (&w)[kGroups][4],
                                                  const uint4 (&x)[kTogether]) {
#pragma unroll
    for (int m = 0; m < kTogether; ++m)
#pragma unroll
      for (int i = 0; i < kGroups / 2; ++i) {
        const auto &low = w[2 * i], &high = w[2 * i + 1];
        multiply_add<T>(acc[m][i], FragA{{low[0], high[0], low[1], high[1]}},
                        FragB{{x[m].x, x[m].y}});
      }
#pragma unroll
    for (int m = 0; m < kTogether; ++m)
#pragma unroll
      for (int i = 0; i < kGroups / 2; ++i) {
        const auto &low = w[2 * i], &high = w[2 * i + 1];
        multiply_add<T>(acc[m][i], FragA{{low[2], high[2], low[3], high[3]}},
                        FragB{{x[m].z, x[m].w}});
      }
  }
  // The same for all of x's tile, from the address of the lane's run in it and the word in the run.
  static __device__ __forceinline__ void multiply(Accumulators& acc,
                                                  const uint32_t (&w)[kGroups][4], uint32_t x_run,
                                                  int word) {
    const uint32_t at = x_run ^ (word * kChunkBytes);
#pragma unroll
    for (int m = 0; m < kTilesM; m += kTogether) {
      uint4 x[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i)  // 8 rows on, the swizzle is the same
        x[i] = load_shared(at + (m + i) * 8 * kTileK * kElementBytes);
      multiply(acc + m, w, x);
    }
  }
  static __device__ __forceinline__ uint32_t x_run(uint32_t x_tile, int g, int t) {
    return x_tile + tile_chunk<kXChunks>(g, t * (kRun / 8)) * kChunkBytes;
  }

  static __device__ __forceinline__ void sum_anywhere(Accumulators& acc,
                                                      const GemmLinearArguments& p, uint8_t* shared,
                                                      const float* codebook,
                                                      const ScaleReader<kind>& scales, int64_t m0,
                                                      int64_t row, int64_t first, int count) {
    const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    for (int step = 0; step < count; ++step) {
      const int64_t k0 = (first + step) * kTileK;
      __syncthreads();
      copy_x_anywhere(reinterpret_cast<T*>(shared), p, m0, k0);
      __syncthreads();
#pragma unroll 1
      for (int word = 0; word < kRun / 8; ++word) {
        uint32_t w[kGroups][4];
#pragma unroll 1
        for (int j = 0; j < kGroups; ++j) {
          uint32_t eight[4];
          gather_weights<T>(eight, p.w, scales, codebook, row + j, k0 + t * kRun + word * 8);
#pragma unroll
          for (int to = 0; to < kGroups; ++to)  // registers have no index
#pragma unroll
            for (int i = 0; i < 4; ++i) w[to][i] = to == j ? eight[i] : w[to][i];
        }
        multiply(acc, w, x_run(shared_address(shared), g, t), word);
      }
    }
  }

  static __device__ __forceinline__ void sum(Accumulators& acc, const GemmLinearArguments& p,
                                             uint8_t* shared, const float* codebook,
                                             const ScaleReader<kind>& scales, int64_t m0,
                                             int64_t n0, int64_t first, int count) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    const uint32_t tiles = shared_address(shared);
    const TileCopy<kThreads, kTileM, kXChunks> x_copy(p.x, p.m, p.w.k * kElementBytes, m0,
                                                      first * kTileK * kElementBytes);
    using PackedCopy = TileCopy<kThreads, kTileN, Packed::kChunks>;
    constexpr int kAtOnce = PackedCopy::kRowsAtOnce;
    const int at = threadIdx.x / Packed::kChunks;
    const PackedCopy packed_copy(p.w.packed, p.w.n, p.w.k / 2, n0, first * (kTileK / 2),
                                 row_of<kAtOnce>(at),
                                 [&](int i) { return place_of<kAtOnce>(at, i); });
    const auto copy = [&](int step) {
      const uint32_t stage = tiles + step % kStages * kStageBytes;
      x_copy.start(stage, step);
      packed_copy.start(stage + kXBytes, step);
    };
    // Runs are counted through the whole weight.
    const auto runs_a_row = static_cast<uint32_t>(p.w.k / kRun);
    const int to_block = p.w.block_log2 - log2_of(kRun);
    const auto lane_row = static_cast<uint32_t>(n0 + warp * kWarpRows + g * kGroups);
    const auto load_scales = [&](PendingScale<kind>(&out)[kGroups], int step) {
      const uint32_t run = static_cast<uint32_t>(first + step) * 4 + t;
      // Each row's first run is worked out here each time: four registers less are four spilled
      // less on sm_90 (96 rows of x).
      uint32_t row = lane_row;
      asm volatile("" : "+r"(row));
#pragma unroll
      for (int j = 0; j < kGroups; ++j) {
        const uint32_t first_run = min(row + j, static_cast<uint32_t>(p.w.n - 1)) * runs_a_row;
        out[j] = load_scale_early(scales, (first_run + run) >> to_block, run < runs_a_row);
      }
    };
    const uint32_t x_first = x_run(tiles, g, t);
    const uint32_t codes_first = Packed::address(tiles + kXBytes, warp * kWarpRows + g, t);

    PendingScale<kind> next[kGroups];
    load_scales(next, 0);
    const auto look_up_codes = [&] {
#pragma unroll
      for (int j = 0; j < kGroups; ++j) look_up(next[j], scales);
    };
    look_up_codes();
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) {
      if (s < count) copy(s);
      commit_async();
    }
#pragma unroll 1
    for (int step = 0; step < count; ++step) {
      wait_async<kStages - 2>();
      __syncthreads();  // this step's tiles are there, and the last one's were read by all
      if (step + kStages - 1 < count) copy(step + kStages - 1);
      commit_async();
      RegisterTable<T> table[kGroups];
#pragma unroll
      for (int j = 0; j < kGroups; ++j) table[j].build(codebook, looked_up(next[j], scales));
      load_scales(next, step + 1);  // beyond the last step: of no row, or never used

      const uint32_t stage = step % kStages * kStageBytes;
#pragma unroll
      for (int read = 0; read < Packed::kReads; ++read) {
        uint32_t codes[kGroups][Packed::kWords];
#pragma unroll
        for (int j = 0; j < kGroups; ++j)  // 8 rows on, the swizzle is the same
          Packed::read(codes[j], codes_first + stage + j * 8 * (kTileK / 2), read);
#pragma unroll
        for (int word = 0; word < Packed::kWords; ++word) {
          uint32_t w[kGroups][4];
#pragma unroll
          for (int j = 0; j < kGroups; ++j) table[j].decode(codes[j][word], w[j]);
          multiply(acc, w, x_first + stage, read * Packed::kWords + word);
          if (read * Packed::kWords + word == kRun / 16) look_up_codes();
        }
      }
    }
  }

  static __device__ __forceinline__ void run(const GemmLinearArguments& p, uint8_t* shared,
                                             float* codebook) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    const int64_t m0 = int64_t{blockIdx.x} * kTileM, n0 = int64_t{blockIdx.y} * kTileN;
    const int64_t first = blockIdx.z * p.steps / gridDim.z;
    const int count = static_cast<int>((blockIdx.z + 1) * p.steps / gridDim.z - first);
    const int64_t row = n0 + warp * kWarpRows + g * kGroups;  // the lane's first of W

    const ScaleReader<kind> scales = cached_scales<kind>(p.w);
    if (threadIdx.x < kCodebookSize) codebook[threadIdx.x] = p.w.codebook[threadIdx.x];
    __syncthreads();

    Accumulators acc = {};
    if constexpr (kAnywhere) {
      sum_anywhere(acc, p, shared, codebook, scales, m0, row, first, count);
    } else {
      sum(acc, p, shared, codebook, scales, m0, n0, first, count);
    }
    if (blockIdx.z == 0 && p.rank > 0) add_lora(acc, p, m0 + g, row, t);
    if (p.partial != nullptr) {
      float* out = p.partial + blockIdx.z * p.m * p.w.n;
      store(acc, m0 + 2 * t, row, p.m, p.w.n, out, DType::f32, Matrix{nullptr, DType::f32});
    } else {
      store(acc, m0 + 2 * t, row, p.m, p.w.n, p.y, p.y_dtype, p.bias);
    }
  }

  // acc += B (4 rows from `row`) times S (every 8th row from m).
  static __device__ __forceinline__ void add_lora(Accumulators& acc, const GemmLinearArguments& p,
                                                  int64_t m, int64_t row, int t) {
#pragma unroll 1
    for (int64_t r = 8 * t; r < p.lora_columns; r += 32) {
      uint32_t b[kGroups][4];
#pragma unroll
      for (int j = 0; j < kGroups; ++j)
        eight_elements<T>(b[j], p.b, row + j, r, p.w.n, p.rank, p.b_aligned);
      const T* s = static_cast<const T*>(p.s) + r;
#pragma unroll
      for (int i = 0; i < kTilesM; i += kTogether) {
        uint4 x[kTogether];
#pragma unroll
        for (int j = 0; j < kTogether; ++j) {
          const int64_t from = min(m + (i + j) * 8, p.m - 1) * p.lora_columns;
          x[j] = __ldg(reinterpret_cast<const uint4*>(s + from));
        }
        multiply(acc + i, b, x);
      }
    }
  }

  // Outputs row ... row + 3 of two rows of y for each 8, from row m.
  static __device__ __forceinline__ void store(const Accumulators& acc, int64_t m, int64_t row,
                                               int64_t rows, int64_t columns, void* out,
                                               DType dtype, const Matrix& bias) {
    float add[4] = {};
    if (bias.data != nullptr) {
#pragma unroll
      for (int j = 0; j < kGroups; ++j)
        if (row + j < columns) add[j] = load_element(bias, row + j);
    }
#pragma unroll
    for (int i = 0; i < 2 * kTilesM; ++i) {
      const int64_t at = m + i / 2 * 8 + i % 2;
      const auto& c = acc[i / 2];
      const int odd = i % 2;
      const float v[4] = {c[0].c[odd] + add[0], c[0].c[2 + odd] + add[1], c[1].c[odd] + add[2],
                          c[1].c[2 + odd] + add[3]};
      if (at < rows) store_four(v, out, dtype, at * columns + row, row, columns);
    }
  }
};

template <class T, ScaleKind kind, int kTileM, int kTileN, int kTileK, int kStages>
__global__ void __launch_bounds__(kTileN / kWarpRows * kWarp, kTileM <= 32 ? 3 : 1)
    gemm_linear(const GemmLinearArguments p) {
  extern __shared__ __align__(128) uint8_t shared[];
  __shared__ __align__(16) float codebook[kCodebookSize];
  Linear<T, kind, kTileM, kTileN, kTileK, kStages>::run(p, shared, codebook);
}

template <class T, ScaleKind kind, int index>
cudaError_t launch(const GemmLinearArguments& a, int splits, cudaStream_t stream) {
  constexpr GemmTile tile = kLinearTiles[index];
  const auto kernel = gemm_linear<T, kind, tile.m, tile.n, tile.k, tile.stages>;
  constexpr int shared = gemm_shared_bytes(tile, Pass::forward);
  if (cudaError_t e = allow_shared(kernel, shared); e != cudaSuccess) return e;
  const dim3 grid(ceil_div(a.m, tile.m), ceil_div(a.w.n, tile.n), splits);
  kernel<<<grid, tile.warps * kWarp, shared, stream>>>(a);
  return cudaGetLastError();
}

}  // namespace

template <class T>
cudaError_t run_gemm_linear(const GemmLinearArguments& a, const GemmTile& tile, int splits,
                            cudaStream_t stream) {
  return with_tile<kLinearTiles>(tile, [&]<int index>() {
    return a.w.kind == ScaleKind::fp32 ? launch<T, ScaleKind::fp32, index>(a, splits, stream)
                                       : launch<T, ScaleKind::nested, index>(a, splits, stream);
  });
}

}  // namespace qlk::cuda
