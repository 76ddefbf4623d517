// A block's scale, of each kind, as kernels read it (block_format.h has the layout).
//
//   fp32    the float itself
//   nested  float32(code[byte] * nested_absmax[block / 256]) + offset: two roundings, spelled out,
//   so
//           that no compiler flag can make an fma of them
//   e8m0    2^(byte - 127); 255 is NaN
//   e4m3    float32(e4m3(byte) * tensor_scale); 0x7f and 0xff are NaN
#pragma once
#include <cstdint>

#include "launchers.h"

namespace qlk::cuda {

// A magnitude, rounded to nearest even; 464 and more (and NaN) give NaN.
__device__ __forceinline__ uint32_t e4m3_byte(float magnitude) {
  if (!(magnitude < 464.0f)) return 0x7f;
  if (magnitude < 0x1p-6f) return __float2uint_rn(__fmul_rn(magnitude, 0x1p9f));
  const uint32_t bits = __float_as_uint(magnitude);
  const uint32_t rounded = bits + 0x7ffffu + ((bits >> 20) & 1u);
  return (rounded >> 20) - ((127u - 7u) << 3);
}

// What a kernel keeps for its scales: nested_code in shared memory, the scalar in a register.
template <ScaleKind kind>
struct ScaleReader {
  const void* absmax;
  const float* nested_absmax;
  const float* code;  // nested: 256 values in shared memory
  float scalar;       // nested: the offset; e4m3: the tensor's scale

  __device__ __forceinline__ float operator()(int64_t block) const {
    if constexpr (kind == ScaleKind::fp32) {
      return __ldg(static_cast<const float*>(absmax) + block);
    } else {
      const uint32_t byte = __ldg(static_cast<const uint8_t*>(absmax) + block);
      if constexpr (kind == ScaleKind::nested) {
        const float group = __ldg(nested_absmax + (block >> kNestedBlockLog2));
        return __fadd_rn(__fmul_rn(code[byte], group), scalar);
      } else if constexpr (kind == ScaleKind::e8m0) {
        return e8m0_value(byte);
      } else {
        return __fmul_rn(e4m3_value(byte), scalar);
      }
    }
  }
};

// Fills `code` (256 floats of shared memory, nested only) by all threads of the block; the caller
// synchronises before the first scale is read.
template <ScaleKind kind>
__device__ __forceinline__ ScaleReader<kind> scale_reader(const Weight& w, float* code) {
  float scalar = 0;
  if constexpr (kind == ScaleKind::nested) {
    for (int i = threadIdx.x; i < kNestedCodeSize; i += blockDim.x) code[i] = w.nested_code[i];
  }
  if constexpr (kind == ScaleKind::nested || kind == ScaleKind::e4m3) scalar = *w.offset;
  return {w.absmax, w.nested_absmax, code, scalar};
}

// A scale on its way: its bytes are asked for with the weights, a step early, and decoded when they
// are needed. All zero it stands for 0, or for the offset. `from`: a Weight or a ScaleReader.
template <ScaleKind kind>
struct PendingScale;

template <>
struct PendingScale<ScaleKind::fp32> {
  float absmax;
  template <class From>
  __device__ __forceinline__ void load(const From& from, uint32_t block) {
    absmax = __ldg(static_cast<const float*>(from.absmax) + block);
  }
  template <class Code>
  __device__ __forceinline__ float value(const Code&, float) const {
    return absmax;
  }
};

template <>
struct PendingScale<ScaleKind::nested> {
  uint32_t byte;
  float group;
  template <class From>
  __device__ __forceinline__ void load(const From& from, uint32_t block) {
    byte = __ldg(static_cast<const uint8_t*>(from.absmax) + block);
    group = __ldg(from.nested_absmax + (block >> kNestedBlockLog2));
  }
  // `code(byte)`: the nested code, wherever it lies.
  template <class Code>
  __device__ __forceinline__ float value(const Code& code, float offset) const {
    return __fadd_rn(__fmul_rn(code(byte), group), offset);
  }
};

// Calls `f` with the kind as a constant: f.template operator()<ScaleKind::fp32>() and so on.
template <class F>
cudaError_t with_scale_kind(ScaleKind kind, F&& f) {
  switch (kind) {
    case ScaleKind::fp32:
      return f.template operator()<ScaleKind::fp32>();
    case ScaleKind::nested:
      return f.template operator()<ScaleKind::nested>();
    case ScaleKind::e8m0:
      return f.template operator()<ScaleKind::e8m0>();
    case ScaleKind::e4m3:
      return f.template operator()<ScaleKind::e4m3>();
  }
  return cudaErrorInvalidValue;
}

}  // namespace qlk::cuda
