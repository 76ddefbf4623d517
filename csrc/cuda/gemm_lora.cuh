// What both GEMMs need around them: S = x A^T or dS = dy B before, the sum of the splits after.
#pragma once
#include <iterator>

#include "codebook.cuh"
#include "element.h"
#include "gemm_tiles.h"
#include "launchers.h"

namespace qlk::cuda {

// S [m, rank] = x F^T, F [rank, columns] (A), or x F, F [columns, rank] (B: `transposed`). Rounded:
// round(scaling S), [m, kLoraPad ...], zero beyond the rank. `out` (fp32, or null) gets out_scale
// S. With `given` only the rounding is left.
struct LoraProblem {
  const void* x;  // [m, columns]
  DType dtype;    // of x, and of `rounded`
  int64_t m, columns;
  Matrix factor;
  bool transposed;
  Matrix given;
  int64_t rank;
  float scaling, out_scale;
  float* out;
  float* partial;  // [ceil(columns / kLoraSpan), m, rank]
  void* rounded;
};
cudaError_t launch_lora(const LoraProblem& p, cudaStream_t stream);

// y = round(sum over splits of partial[split] + bias), in the order of the splits.
cudaError_t launch_sum_splits(const float* partial, int splits, int64_t m, int64_t n,
                              const Matrix& bias, void* y, DType dtype, cudaStream_t stream);

// Calls `f` with the index of `tile` in a list as a constant: f.template operator()<0>() and so on.
template <const auto& kTiles, int kIndex = 0, class F>
cudaError_t with_tile(const GemmTile& tile, F&& f) {
  if constexpr (kIndex == std::size(kTiles)) {
    return cudaErrorInvalidConfiguration;
  } else {
    if (tile == kTiles[kIndex]) return f.template operator()<kIndex>();
    return with_tile<kTiles, kIndex + 1>(tile, f);
  }
}

// Four neighbouring results from element `at` (column `column` of `columns`), each rounded once.
__device__ __forceinline__ void store_four(const float (&v)[4], void* out, DType dtype, int64_t at,
                                           int64_t column, int64_t columns) {
  const int bytes = dtype == DType::f32 ? 4 : 2;
  uint8_t* to = static_cast<uint8_t*>(out) + at * bytes;
  if (column + 4 > columns || reinterpret_cast<uint64_t>(to) % (4 * bytes) != 0) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (column + i < columns) store_element(out, dtype, at + i, v[i]);
  } else if (dtype == DType::f32) {
    *reinterpret_cast<float4*>(to) = {v[0], v[1], v[2], v[3]};
  } else if (dtype == DType::bf16) {
    using T = __nv_bfloat16;
    *reinterpret_cast<uint2*>(to) = {round_pair<T>(v[0], v[1]), round_pair<T>(v[2], v[3])};
  } else {
    using T = __half;
    *reinterpret_cast<uint2*>(to) = {round_pair<T>(v[0], v[1]), round_pair<T>(v[2], v[3])};
  }
}

}  // namespace qlk::cuda
