// The small products around the fused GEMMs.
//
//   lora_partial   a CTA: 64 rows of x, 64 columns of S, 256 of the contraction. Both operands go
//   to
//                  shared memory in one sweep (every load in flight at once), A or B rounded to x's
//                  dtype on the way; 4 warps of 16 rows; fp32 partial sums to the workspace.
//   lora_finish    adds the partial sums of a row in order, writes S (fp32) where it is asked for,
//                  and round(scaling S), padded with zeros, as the GEMM's next columns.
//   sum_splits     adds a GEMM's splits in order, the bias, and rounds once.
//
// Each sum has one order: no atomics, the same bits in every run. Cost: A or B and x once more from
// DRAM or L2 (a GEMM reads x anyway); rank / N of the GEMM's products.
//
// Numerics: A and B are rounded to the compute dtype (reference.linear does the same), products are
// exact, sums fp32: |error| <= (columns + columns / 256) 2^-23 sum |x f|.
#include "copy.cuh"
#include "gemm_lora.cuh"
#include "gemm_weight.cuh"

namespace qlk::cuda {
namespace {

constexpr int kTile = 64;  // rows of x, columns of S
constexpr int kThreads = kTile / 16 * kWarp;
constexpr int kSpanChunks = kLoraSpan / 8;
constexpr int kTileChunks = kTile / 8;
constexpr int kLoraShared = 2 * kTile * kLoraSpan * kElementBytes;

// Eight elements of F, as they come.
template <class F>
struct Eight {
  uint4 raw[sizeof(F) / 2];

  __device__ __forceinline__ void load(const F* from, int64_t left, bool aligned) {
    if (aligned && left >= 8) {
#pragma unroll
      for (int i = 0; i < int{sizeof(F) / 2}; ++i)
        raw[i] = __ldg(reinterpret_cast<const uint4*>(from) + i);
    } else {
      F each[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) each[i] = i < left ? from[i] : F(0.0f);
      memcpy(raw, each, sizeof(raw));
    }
  }
  template <class T>
  __device__ __forceinline__ void convert(uint32_t (&out)[4]) const {
    F each[8];
    memcpy(each, raw, sizeof(raw));
#pragma unroll
    for (int i = 0; i < 4; ++i)
      out[i] = round_pair<T>(to_float(each[2 * i]), to_float(each[2 * i + 1]));
  }
};

// A tile [kRows, 8 kChunks] of a row-major matrix [rows, columns] to shared memory, as T.
template <class T, class F, int kRows, int kChunks>
__device__ __forceinline__ void load_tile(uint32_t tile, const F* from, int64_t row0,
                                          int64_t column0, int64_t rows, int64_t columns,
                                          bool aligned) {
  constexpr int kBatch = 4;
  for (int i = threadIdx.x; i < kRows * kChunks; i += kBatch * kThreads) {
    Eight<F> batch[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int at = i + b * kThreads;
      const int64_t row = row0 + at / kChunks, column = column0 + at % kChunks * 8;
      const bool inside = row < rows && column < columns;
      batch[b].load(from + (inside ? row * columns + column : 0), inside ? columns - column : 0,
                    aligned);
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int at = i + b * kThreads;
      uint32_t eight[4];
      batch[b].template convert<T>(eight);
      store_shared(tile + tile_chunk<kChunks>(at / kChunks, at % kChunks) * kChunkBytes, eight);
    }
  }
}

template <class T, class F, bool kTransposed>
__global__ void __launch_bounds__(kThreads)
    lora_partial(const LoraProblem p, const bool x_aligned, const bool f_aligned) {
  extern __shared__ __align__(128) uint8_t shared[];
  const uint32_t x_tile = shared_address(shared);
  const uint32_t f_tile = x_tile + kTile * kLoraSpan * kElementBytes;
  const int64_t m0 = int64_t{blockIdx.z} * kTile, r0 = int64_t{blockIdx.y} * kTile;
  const int64_t c0 = int64_t{blockIdx.x} * kLoraSpan;
  const F* factor = static_cast<const F*>(p.factor.data);
  load_tile<T, T, kTile, kSpanChunks>(x_tile, static_cast<const T*>(p.x), m0, c0, p.m, p.columns,
                                      x_aligned);
  if constexpr (kTransposed) {
    load_tile<T, F, kLoraSpan, kTileChunks>(f_tile, factor, c0, r0, p.columns, p.rank, f_aligned);
  } else {
    load_tile<T, F, kTile, kSpanChunks>(f_tile, factor, r0, c0, p.rank, p.columns, f_aligned);
  }
  __syncthreads();

  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int matrix = lane / 8, in_matrix = lane % 8;  // ldmatrix: whose row this lane names
  FragC acc[kTile / 8] = {};
#pragma unroll 4
  for (int step = 0; step < kLoraSpan / 16; ++step) {
    FragA a;
    load_matrices(a.a, x_tile + tile_chunk<kSpanChunks>(warp * 16 + in_matrix + matrix % 2 * 8,
                                                        step * 2 + matrix / 2) *
                                    kChunkBytes);
#pragma unroll
    for (int pair = 0; pair < kTile / 16; ++pair) {
      uint32_t b[4];
      if constexpr (kTransposed) {
        const int row = step * 16 + in_matrix + matrix % 2 * 8, chunk = pair * 2 + matrix / 2;
        load_matrices_transposed(b, f_tile + tile_chunk<kTileChunks>(row, chunk) * kChunkBytes);
      } else {
        const int row = pair * 16 + in_matrix + matrix / 2 * 8, chunk = step * 2 + matrix % 2;
        load_matrices(b, f_tile + tile_chunk<kSpanChunks>(row, chunk) * kChunkBytes);
      }
      multiply_add<T>(acc[2 * pair], a, FragB{{b[0], b[1]}});
      multiply_add<T>(acc[2 * pair + 1], a, FragB{{b[2], b[3]}});
    }
  }
  float* out = p.partial + blockIdx.x * p.m * p.rank;
#pragma unroll
  for (int j = 0; j < kTile / 8; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t row = m0 + warp * 16 + lane / 4 + i / 2 * 8;
      const int64_t column = r0 + j * 8 + lane % 4 * 2 + i % 2;
      if (row < p.m && column < p.rank) out[row * p.rank + column] = acc[j].c[i];
    }
}

__global__ void lora_finish(const LoraProblem p, const int64_t columns) {
  const int64_t at = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (at >= p.m * columns) return;
  const int64_t row = at / columns, r = at % columns;
  float sum = 0;
  if (r < p.rank) {
    const int64_t from = row * p.rank + r;
    if (p.given.data != nullptr) {
      sum = load_element(p.given, from);
    } else {
      const int64_t spans = (p.columns + kLoraSpan - 1) / kLoraSpan;
#pragma unroll 8
      for (int64_t s = 0; s < spans; ++s) sum += p.partial[s * p.m * p.rank + from];
    }
    if (p.out != nullptr) p.out[from] = __fmul_rn(p.out_scale, sum);
  }
  store_element(p.rounded, p.dtype, at, __fmul_rn(p.scaling, sum));
}

// kWidth neighbouring outputs a thread: 4 where columns and pointers allow it, else 1.
template <int kWidth>
__global__ void sum_splits(const float* partial, int splits, int64_t m, int64_t n,
                           const Matrix bias, void* y, DType dtype) {
  const int64_t at = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * kWidth;
  if (at >= m * n) return;
  float sum[kWidth] = {};
  constexpr int kAtOnce = 8;  // loads in flight; most launches have no more splits
  for (int s = 0; s < splits; s += kAtOnce) {
    float part[kAtOnce][kWidth];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      if (s + j >= splits) continue;
      const float* from = partial + (s + j) * m * n + at;
      if constexpr (kWidth == 4) {
        const float4 v = *reinterpret_cast<const float4*>(from);
        part[j][0] = v.x, part[j][1] = v.y, part[j][2] = v.z, part[j][3] = v.w;
      } else {
        part[j][0] = *from;
      }
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j)
#pragma unroll
      for (int i = 0; i < kWidth; ++i)
        if (s + j < splits) sum[i] += part[j][i];
  }
  if (bias.data != nullptr) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sum[i] += load_element(bias, at % n + i);
  }
  if (kWidth == 4 && dtype == DType::f32) {
    *reinterpret_cast<float4*>(static_cast<float*>(y) + at) = {sum[0], sum[kWidth / 4],
                                                               sum[kWidth / 2], sum[kWidth - 1]};
  } else if (kWidth == 4) {
    const bool bf16 = dtype == DType::bf16;
    const float last[2] = {sum[kWidth / 2], sum[kWidth - 1]};
    const uint2 v = bf16 ? uint2{round_pair<__nv_bfloat16>(sum[0], sum[kWidth / 4]),
                                 round_pair<__nv_bfloat16>(last[0], last[1])}
                         : uint2{round_pair<__half>(sum[0], sum[kWidth / 4]),
                                 round_pair<__half>(last[0], last[1])};
    *reinterpret_cast<uint2*>(static_cast<uint16_t*>(y) + at) = v;
  } else {
    store_element(y, dtype, at, sum[0]);
  }
}

template <class T, class F, bool kTransposed>
cudaError_t launch_partial(const LoraProblem& p, cudaStream_t stream) {
  const auto kernel = lora_partial<T, F, kTransposed>;
  if (cudaError_t e = allow_shared(kernel, kLoraShared); e != cudaSuccess) return e;
  const dim3 grid(ceil_div(p.columns, kLoraSpan), ceil_div(p.rank, kTile), ceil_div(p.m, kTile));
  const int64_t factor_columns = kTransposed ? p.rank : p.columns;
  kernel<<<grid, kThreads, kLoraShared, stream>>>(p, rows_aligned(p.x, p.columns),
                                                  rows_aligned(p.factor.data, factor_columns));
  return cudaGetLastError();
}

template <class T, class F>
cudaError_t launch_partial(const LoraProblem& p, cudaStream_t stream) {
  return p.transposed ? launch_partial<T, F, true>(p, stream)
                      : launch_partial<T, F, false>(p, stream);
}

template <class T>
cudaError_t launch_partial(const LoraProblem& p, cudaStream_t stream) {
  return with_element(p.factor.dtype, [&]<class F>() { return launch_partial<T, F>(p, stream); });
}

}  // namespace

cudaError_t launch_lora(const LoraProblem& p, cudaStream_t stream) {
  if (p.given.data == nullptr) {
    const cudaError_t e = p.dtype == DType::bf16 ? launch_partial<__nv_bfloat16>(p, stream)
                                                 : launch_partial<__half>(p, stream);
    if (e != cudaSuccess) return e;
  }
  constexpr int kFinishThreads = 128;
  const int64_t columns = ceil_div(p.rank, kLoraPad) * kLoraPad;
  const auto blocks = static_cast<unsigned>(ceil_div(p.m * columns, kFinishThreads));
  lora_finish<<<blocks, kFinishThreads, 0, stream>>>(p, columns);
  return cudaGetLastError();
}

cudaError_t launch_sum_splits(const float* partial, int splits, int64_t m, int64_t n,
                              const Matrix& bias, void* y, DType dtype, cudaStream_t stream) {
  constexpr int kSumThreads = 256;
  const bool wide = n % 4 == 0 && is_aligned_16(reinterpret_cast<uint64_t>(y));
  const auto blocks = static_cast<unsigned>(ceil_div(m * n, kSumThreads * (wide ? 4 : 1)));
  const auto kernel = wide ? sum_splits<4> : sum_splits<1>;
  kernel<<<blocks, kSumThreads, 0, stream>>>(partial, splits, m, n, bias, y, dtype);
  return cudaGetLastError();
}

}  // namespace qlk::cuda
