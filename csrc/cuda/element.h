// Elements of fp32, bf16 and f16 as the kernels move them: 16 bytes at a time, converted one by
// one; elements of a type that is known only when a kernel runs; launches by element type.
// Conversions round to nearest even and keep NaN a NaN; nothing here is contracted or flushed.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "launchers.h"

namespace qlk::cuda {

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) {  // a shift, on every architecture
  return __uint_as_float(static_cast<uint32_t>(__bfloat16_as_ushort(v)) << 16);
}

template <class T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

// 16 bytes of elements, read and written in one access.
template <class T>
struct alignas(16) Vec16 {
  static constexpr int kCount = 16 / sizeof(T);
  T at[kCount];
};

__host__ __device__ constexpr bool is_aligned_16(uint64_t address) { return address % 16 == 0; }

// --- of a type that is known only when the kernel runs -------------------------------------------

__device__ __forceinline__ float load_element(const Matrix& a, int64_t i) {
  switch (a.dtype) {
    case DType::f32:
      return __ldg(static_cast<const float*>(a.data) + i);
    case DType::bf16:
      return to_float(static_cast<const __nv_bfloat16*>(a.data)[i]);
    default:
      return to_float(static_cast<const __half*>(a.data)[i]);
  }
}

__device__ __forceinline__ void store_element(void* to, DType dtype, int64_t i, float v) {
  if (dtype == DType::f32) {
    static_cast<float*>(to)[i] = v;
  } else if (dtype == DType::bf16) {
    static_cast<__nv_bfloat16*>(to)[i] = from_float<__nv_bfloat16>(v);
  } else {
    static_cast<__half*>(to)[i] = from_float<__half>(v);
  }
}

// Calls `f` with the type as a constant: f.template operator()<float>() and so on.
template <class F>
cudaError_t with_element(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32:
      return f.template operator()<float>();
    case DType::bf16:
      return f.template operator()<__nv_bfloat16>();
    case DType::f16:
      return f.template operator()<__half>();
  }
  return cudaErrorInvalidValue;
}

// More than 48 KB of shared memory, a kernel's static share included, has to be asked for; the
// runtime remembers it for each device.
template <class Kernel>
cudaError_t allow_shared(Kernel kernel, int bytes) {
  if (bytes <= 47 * 1024) return cudaSuccess;
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                              cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

}  // namespace qlk::cuda
