// dx = dy W + dS A for M = 16 rows of dy and more (dispatch.cpp says how many): the
// forward's bytes, read along the other axis.
//
// The contraction runs along N, across rows of W, and a row's scale changes every block of columns:
// a lane that decodes what its fragment needs (a few columns of many rows) would round 16 values of
// a table for each 8 weights. So weights are decoded as the forward does it, a run of one row by
// one lane, and turned around in shared memory:
//
//   CTA    dx tile [tile_m, tile_k]; for each step of tile_n rows of W (a row of dy's columns):
//            packed  [tile_n, tile_k / 2]  cp.async, steps ahead
//            dy      [tile_m, tile_n]      cp.async, steps ahead
//   decode step i + 1: warp w has rows 8w ... 8w + 7, lane (g, t) run t of row g: table, 8 weights
//   at a
//          time, one 16-byte store to the decoded tile [tile_n, tile_k]. Each weight by one lane.
//   mma    step i: warp w has tile_k / warps columns and all rows of dy: A = dy by ldmatrix, B =
//   the
//          decoded tile by ldmatrix.trans, which pairs rows of W as the contraction wants them.
//   one barrier a step; two decoded tiles, so that one half of a warp's work fills the other's gaps
//
// LoRA is `rank` more rows of W, A's, rounded to the compute dtype on their way to the decoded
// tile, with dS (scaled, rounded once by gemm_lora.cu) for dy. Splits of the contraction as in the
// forward.
//
// Cost (sm_80) beyond the forward's: a 16-byte store and a ldmatrix for 8 weights, each 4 passes of
// shared memory. benchmarks/cuda_gemm.py counts them.
//
// Numerics: variant (a), weights round_to_dtype(codebook[q] * scale); products exact, sums in fp32.
// Against float64 on the same rounded operands |error| <= (N + rank + splits + 2) 2^-23 sum |dy w|
// before the one rounding to dx's dtype; dS itself is rounded once to the compute dtype.
#pragma once
#include <iterator>

#include "gemm_lora.cuh"
#include "gemm_tiles.h"
#include "gemm_weight.cuh"

namespace qlk::cuda {
struct GemmInputGradArguments {
  Weight w;
  int64_t m;
  const void* dy;
  const void* ds;  // [m, lora_columns] of T, scaled; zero beyond the rank
  Matrix a;
  int64_t rank, lora_columns;
  bool a_aligned;
  void* dx;
  DType dx_dtype;
  float* partial;               // [splits, m, k], or null: dx is written
  int64_t weight_steps, steps;  // of tile_n rows: of W, and with A's; cut evenly
};

// Launches the kernel that was compiled for T, the scales' kind and the tile; in a source file for
// each T, so that they compile side by side.
template <class T>
cudaError_t run_gemm_input_grad(const GemmInputGradArguments& a, const GemmTile& tile, int splits,
                                cudaStream_t stream);

namespace {

template <class T, ScaleKind kind, int kTileM, int kTileN, int kTileK, int kWarps, int kStages>
struct InputGrad {
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr bool kAnywhere = kStages == 1;  // any k, any alignment
  using Packed = PackedTile<kTileN, kTileK>;
  static constexpr int kRun = Packed::kRun;
  static constexpr int kRunWords = kRun / 8;
  static constexpr int kDyChunks = kTileN / 8, kChunks = kTileK / 8;
  static constexpr int kDyBytes = kTileM * kTileN * kElementBytes;
  static constexpr int kDecodedBytes = kTileN * kTileK * kElementBytes;
  static constexpr int kStageBytes = kDyBytes + (kAnywhere ? 0 : Packed::kBytes);
  // A warp's part of dx: 64 columns of 64 rows, where the tile has as many. Half the rows and twice
  // the columns, or the reverse, would read a quarter more of shared memory.
  static constexpr int kRowWarps = kTileM > 64 ? kTileM / 64 : 1, kColumnWarps = kWarps / kRowWarps;
  static constexpr int kRows = kTileM / kRowWarps, kColumns = kTileK / kColumnWarps;
  static constexpr int kTilesM = kRows / 16, kSteps = kTileN / 16;
  static constexpr int kPairs = kColumns / 16;  // of B tiles
  static_assert(kTileN == 8 * kWarps && kColumns % 16 == 0,
                "8 rows and 16 columns a warp, at least");
  using Accumulators = FragC[kTilesM][2 * kPairs];

  static __device__ __forceinline__ int first_row(int warp) { return warp / kColumnWarps * kRows; }
  static __device__ __forceinline__ int first_column(int warp) {
    return warp % kColumnWarps * kColumns;
  }

  // acc += 16 rows of the step: ldmatrix takes the address of row `in_matrix` of matrix `matrix`.
  static __device__ __forceinline__ void multiply(Accumulators& acc, uint32_t dy, uint32_t decoded,
                                                  int step) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int matrix = lane / 8, in_matrix = lane % 8;
    const int row16 = in_matrix + matrix % 2 * 8, side = matrix / 2;
    FragA a[kTilesM];
#pragma unroll
    for (int m = 0; m < kTilesM; ++m)
      load_matrices(a[m].a, dy + tile_chunk<kDyChunks>(row16, step * 2 + side) * kChunkBytes +
                                (first_row(warp) + m * 16) * kTileN * kElementBytes);
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      uint32_t b[4];
      const int chunk = first_column(warp) / 8 + pair * 2 + side;
      load_matrices_transposed(b, decoded + step * 16 * kTileK * kElementBytes +
                                      tile_chunk<kChunks>(row16, chunk) * kChunkBytes);
#pragma unroll
      for (int m = 0; m < kTilesM; ++m) {
        multiply_add<T>(acc[m][2 * pair], a[m], FragB{{b[0], b[1]}});
        multiply_add<T>(acc[m][2 * pair + 1], a[m], FragB{{b[2], b[3]}});
      }
    }
  }

  // A lane's run of A's rows, for the steps after W's.
  static __device__ __forceinline__ void convert_lora(const GemmInputGradArguments& p, uint32_t to,
                                                      int64_t row, int64_t column) {
#pragma unroll 1
    for (int word = 0; word < kRunWords; ++word) {
      uint32_t eight[4];
      eight_elements<T>(eight, p.a, row, column + word * 8, p.rank, p.w.k, p.a_aligned);
      store_shared(to ^ (word * kChunkBytes), eight);
    }
  }

  static __device__ __forceinline__ void copy_dy_anywhere(T* tile, const void* from, int64_t rows,
                                                          int64_t columns, int64_t m0, int64_t n0) {
    for (int i = threadIdx.x; i < kTileM * kTileN; i += kThreads) {
      const int row = i / kTileN, column = i % kTileN;
      const int64_t source = min(m0 + row, rows - 1), n = n0 + column;
      const T value = n < columns ? static_cast<const T*>(from)[source * columns + n] : T(0.0f);
      tile[tile_chunk<kDyChunks>(row, column / 8) * 8 + column % 8] = value;
    }
  }

  static __device__ __forceinline__ void sum_anywhere(Accumulators& acc,
                                                      const GemmInputGradArguments& p,
                                                      uint8_t* shared, const float* codebook,
                                                      const ScaleReader<kind>& scales, int64_t m0,
                                                      int64_t k0, int64_t first, int count) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    T* const dy = reinterpret_cast<T*>(shared);
    const uint32_t decoded = shared_address(shared) + kDyBytes;
    const int row = warp * 8 + g;
    const uint32_t to = decoded + tile_chunk<kChunks>(row, t * kRunWords) * kChunkBytes;
    for (int64_t step = first; step < first + count; ++step) {
      __syncthreads();
      if (step < p.weight_steps) {
        copy_dy_anywhere(dy, p.dy, p.m, p.w.n, m0, step * kTileN);
#pragma unroll 1
        for (int word = 0; word < kRunWords; ++word) {
          uint32_t eight[4];
          gather_weights<T>(eight, p.w, scales, codebook, step * kTileN + row,
                            k0 + t * kRun + word * 8);
          store_shared(to ^ (word * kChunkBytes), eight);
        }
      } else {
        const int64_t r0 = (step - p.weight_steps) * kTileN;
        copy_dy_anywhere(dy, p.ds, p.m, p.lora_columns, m0, r0);
        convert_lora(p, to, r0 + row, k0 + t * kRun);
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kSteps; ++i) multiply(acc, shared_address(shared), decoded, i);
    }
  }

  static __device__ __forceinline__ void sum(Accumulators& acc, const GemmInputGradArguments& p,
                                             uint8_t* shared, const float* codebook,
                                             const ScaleReader<kind>& scales, int64_t m0,
                                             int64_t k0, int64_t first, int count) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    const uint32_t decoded = shared_address(shared), stages = decoded + 2 * kDecodedBytes;
    const int weight_steps = static_cast<int>(p.weight_steps - first);  // of this split; any sign
    const TileCopy<kThreads, kTileM, kDyChunks> dy_copy(p.dy, p.m, p.w.n * kElementBytes, m0, 0);
    const TileCopy<kThreads, kTileM, kDyChunks> ds_copy(p.ds, p.m, p.lora_columns * kElementBytes,
                                                        m0, 0);
    const RowCopy<kThreads, kTileN, Packed::kChunks> packed_copy(p.w.packed, p.w.n, p.w.k / 2,
                                                                 k0 / 2);
    const auto copy = [&](int step) {
      const uint32_t stage = stages + step % kStages * kStageBytes;
      if (step < weight_steps) {
        dy_copy.start(stage, static_cast<int>(first) + step);
        packed_copy.start(stage + kDyBytes, (static_cast<int>(first) + step) * kTileN);
      } else {
        ds_copy.start(stage, step - weight_steps);
      }
    };
    const uint32_t runs_a_row = static_cast<uint32_t>(p.w.k / kRun);
    const int to_block = p.w.block_log2 - log2_of(kRun);
    const uint32_t run = static_cast<uint32_t>(k0 / kRun) + t;
    const int row = warp * 8 + g;
    const int last_row = static_cast<int>(p.w.n - 1), row0 = static_cast<int>(first) * kTileN + row;
    const auto load_scale = [&](int step) {
      const auto r = static_cast<uint32_t>(min(row0 + step * kTileN, last_row));
      return load_scale_early(scales, (r * runs_a_row + run) >> to_block,
                              run < runs_a_row && step < weight_steps);
    };
    const uint32_t codes_at = Packed::address(stages + kDyBytes, row, t);
    const uint32_t to_at = decoded + tile_chunk<kChunks>(row, t * kRunWords) * kChunkBytes;

    PendingScale<kind> scale = load_scale(0);
    look_up(scale, scales);
    RegisterTable<T> table;
    // Weights [begin, end) of step `step`, in reads of the packed tile.
    const auto decode_reads = [&](int step, int begin, int end) {
      const uint32_t from = codes_at + step % kStages * kStageBytes;
      const uint32_t to = to_at + step % 2 * kDecodedBytes;
#pragma unroll
      for (int read = 0; read < Packed::kReads; ++read) {
        if (read < begin || read >= end) continue;
        uint32_t codes[Packed::kWords];
        Packed::read(codes, from, read);
#pragma unroll
        for (int word = 0; word < Packed::kWords; ++word) {
          uint32_t eight[4];
          table.decode(codes[word], eight);
          store_shared(to ^ ((read * Packed::kWords + word) * kChunkBytes), eight);
        }
      }
    };
    const auto lora_rows = [&](int step) {
      convert_lora(p, to_at + step % 2 * kDecodedBytes, int64_t{step - weight_steps} * kTileN + row,
                   k0 + t * kRun);
    };

#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) {
      if (s < count) copy(s);
      commit_async();
    }
    wait_async<kStages - 2>();
    __syncthreads();
    if (0 < weight_steps) {
      table.build(codebook, looked_up(scale, scales));
      decode_reads(0, 0, Packed::kReads);
    } else {
      lora_rows(0);
    }
    scale = load_scale(1);
    look_up(scale, scales);

#pragma unroll 1
    for (int step = 0; step < count; ++step) {
      wait_async<kStages - 3>();
      // This step's decoded tile and the next one's copies are there; the last step's were read by
      // all.
      __syncthreads();
      if (step + kStages - 1 < count) copy(step + kStages - 1);
      commit_async();
      const uint32_t dy = stages + step % kStages * kStageBytes;
      const uint32_t from = decoded + step % 2 * kDecodedBytes;
      if (step + 1 < weight_steps && step + 1 < count) {
        table.build(codebook, looked_up(scale, scales));
        scale = load_scale(step + 2);
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
          multiply(acc, dy, from, i);
          decode_reads(step + 1, i * Packed::kReads / kSteps, (i + 1) * Packed::kReads / kSteps);
          if (i == kSteps / 2) look_up(scale, scales);
        }
      } else {
        if (step + 1 < count) lora_rows(step + 1);
#pragma unroll
        for (int i = 0; i < kSteps; ++i) multiply(acc, dy, from, i);
      }
    }
  }

  static __device__ __forceinline__ void run(const GemmInputGradArguments& p, uint8_t* shared,
                                             float* codebook) {
    const int64_t m0 = int64_t{blockIdx.x} * kTileM, k0 = int64_t{blockIdx.y} * kTileK;
    const int64_t first = blockIdx.z * p.steps / gridDim.z;
    const int count = static_cast<int>((blockIdx.z + 1) * p.steps / gridDim.z - first);
    const ScaleReader<kind> scales = cached_scales<kind>(p.w);
    if (threadIdx.x < kCodebookSize) codebook[threadIdx.x] = p.w.codebook[threadIdx.x];
    __syncthreads();
    Accumulators acc = {};
    if constexpr (kAnywhere) {
      sum_anywhere(acc, p, shared, codebook, scales, m0, k0, first, count);
    } else {
      sum(acc, p, shared, codebook, scales, m0, k0, first, count);
    }
    if (p.partial != nullptr) {
      store(acc, m0, k0, p.m, p.w.k, p.partial + blockIdx.z * p.m * p.w.k, DType::f32);
    } else {
      store(acc, m0, k0, p.m, p.w.k, p.dx, p.dx_dtype);
    }
  }

  // A lane has 2 neighbouring columns of each B tile; neighbours in a quad trade, so that it has 4
  // of every second one.
  static __device__ __forceinline__ void store(const Accumulators& acc, int64_t m0, int64_t k0,
                                               int64_t rows, int64_t columns, void* out,
                                               DType dtype) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    const bool odd = t % 2 != 0;
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float* first = acc[m][2 * pair].c + 2 * half;
          const float* second = acc[m][2 * pair + 1].c + 2 * half;
          float got[2], v[4];
#pragma unroll
          for (int i = 0; i < 2; ++i) got[i] = __shfl_xor_sync(~0u, odd ? first[i] : second[i], 1);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            v[i] = odd ? got[i] : first[i];
            v[2 + i] = odd ? second[i] : got[i];
          }
          const int64_t row = m0 + first_row(warp) + m * 16 + g + half * 8;
          const int64_t column = k0 + first_column(warp) + pair * 16 + (odd ? 8 : 0) + t / 2 * 4;
          if (row < rows) store_four(v, out, dtype, row * columns + column, column, columns);
        }
      }
    }
  }
};

template <class T, ScaleKind kind, int kTileM, int kTileN, int kTileK, int kWarps, int kStages>
__global__ void __launch_bounds__(kWarps* kWarp, kTileM <= 32 ? 3 : 1)
    gemm_input_grad(const GemmInputGradArguments p) {
  extern __shared__ __align__(128) uint8_t shared[];
  __shared__ __align__(16) float codebook[kCodebookSize];
  InputGrad<T, kind, kTileM, kTileN, kTileK, kWarps, kStages>::run(p, shared, codebook);
}

template <class T, ScaleKind kind, int index>
cudaError_t launch(const GemmInputGradArguments& a, int splits, cudaStream_t stream) {
  constexpr GemmTile tile = kInputGradTiles[index];
  const auto kernel = gemm_input_grad<T, kind, tile.m, tile.n, tile.k, tile.warps, tile.stages>;
  constexpr int shared = gemm_shared_bytes(tile, Pass::input_grad);
  if (cudaError_t e = allow_shared(kernel, shared); e != cudaSuccess) return e;
  const dim3 grid(ceil_div(a.m, tile.m), ceil_div(a.w.k, tile.k), splits);
  kernel<<<grid, tile.warps * kWarp, shared, stream>>>(a);
  return cudaGetLastError();
}

}  // namespace

template <class T>
cudaError_t run_gemm_input_grad(const GemmInputGradArguments& a, const GemmTile& tile, int splits,
                                cudaStream_t stream) {
  return with_tile<kInputGradTiles>(tile, [&]<int index>() {
    return a.w.kind == ScaleKind::fp32 ? launch<T, ScaleKind::fp32, index>(a, splits, stream)
                                       : launch<T, ScaleKind::nested, index>(a, splits, stream);
  });
}

}  // namespace qlk::cuda
