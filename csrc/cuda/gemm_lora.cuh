// What both GEMMs need around them: S = x A^T or dS = dy B before, the sum of the splits after.
#pragma once
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

// More than 48 KB of shared memory, a kernel's static share included, has to be asked for; the
// runtime remembers it for each device.
template <class Kernel>
cudaError_t allow_shared(Kernel kernel, int bytes) {
  if (bytes <= 47 * 1024) return cudaSuccess;
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                              cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

__device__ __forceinline__ void store_element(void* out, DType dtype, int64_t at, float v) {
  if (dtype == DType::f32) {
    static_cast<float*>(out)[at] = v;
  } else if (dtype == DType::bf16) {
    static_cast<__nv_bfloat16*>(out)[at] = from_float<__nv_bfloat16>(v);
  } else {
    static_cast<__half*>(out)[at] = from_float<__half>(v);
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
