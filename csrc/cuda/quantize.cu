// Blockwise 4-bit quantization, and the double quantization of its scales. Bit-identical to
// reference.quantize and reference.quantize_absmax, for every input.
//
//   a CTA's tile: 8 warps x 1024 values, so that a block of any size (16 ... 4096) lies in one CTA
//
//   DRAM    values in 16-byte loads (8 of 16 bits, 4 of fp32), a warp's 512 bytes consecutive; they
//           stay in registers, so that each is read once
//     |     the largest magnitude: within the unit, across the lanes of the block by shuffles, from
//     |     1024 values on across warps by shared memory. Magnitudes are compared as integers: a
//     NaN |     is then larger than infinity, and a block with a NaN in it has a NaN for its scale
//     v
//   codes   v * (1 / absmax), clamped, then four steps of a binary search in 15 thresholds
//     |     (shared memory); "not v <= t" goes up, so that a NaN takes the last rank
//     v
//   DRAM    4 (2) packed bytes a unit pass through shared memory to 16-byte stores
//
// The last block, if it is ragged, is divided by its scale instead of multiplied by the reciprocal,
// as the format says. Unaligned tensors take loads and stores of single elements in the same
// kernel.
#include "element.h"
#include "launchers.h"
#include "scales.h"

namespace qlk::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kWarpLog2 = 10;  // values of a warp's tile
constexpr int kWarpValues = 1 << kWarpLog2;
constexpr int kBlockValues = kWarps * kWarpValues;
static_assert((1 << kMaxBlockLog2) <= kBlockValues, "a quantization block lies in one CTA");

constexpr uint32_t kMagnitude = 0x7fffffffu;

// The scale of a block from the largest magnitude in it, and what is stored.
struct BlockScale {
  float scale;
  uint32_t stored;  // the float's bits, or a byte
};
template <ScaleKind kind>
__device__ __forceinline__ BlockScale block_scale(uint32_t magnitude, float tensor_scale,
                                                  bool ragged) {
  const float absmax = __uint_as_float(magnitude);
  if constexpr (kind == ScaleKind::e8m0) {  // the smallest power of two that is not below absmax
    uint32_t byte = (magnitude >> 23) + ((magnitude & 0x7fffffu) != 0);
    if (magnitude <= 0x00400000u) byte = 0;  // 2^-127 and below
    if (byte > 254) byte = magnitude < 0x7f800000u ? 254 : 255;
    return {e8m0_value(byte), byte};
  } else if constexpr (kind == ScaleKind::e4m3) {
    const uint32_t byte = e4m3_byte(__fdiv_rn(absmax, tensor_scale));
    return {__fmul_rn(e4m3_value(byte), tensor_scale), byte};
  } else {
    const float kept = ragged && absmax < kMinAbsmax ? kMinAbsmax : absmax;
    return {kept, __float_as_uint(kept)};
  }
}

// torch.clamp(-1, 1): a NaN stays one.
__device__ __forceinline__ float clamp_unit(float v) {
  return v < -1.0f ? -1.0f : (v > 1.0f ? 1.0f : v);
}

// How many of `thresholds` (ascending; 2^kLog2 - 1) v is above; a NaN is above all.
template <int kLog2>
__device__ __forceinline__ int rank_of(const float* thresholds, float v) {
  int rank = 0;
#pragma unroll
  for (int step = 1 << (kLog2 - 1); step > 0; step /= 2)
    if (!(v <= thresholds[rank + step - 1])) rank += step;
  return rank;
}

template <class T, ScaleKind kind>
__global__ void __launch_bounds__(kThreads)
    quantize(const QuantizeProblem p, bool wide_loads, bool wide_stores) {
  constexpr int kUnit = Vec16<T>::kCount;
  constexpr int kUnitLog2 = kUnit == 8 ? 3 : 2;
  constexpr int kSteps = kWarpValues / (32 * kUnit);
  constexpr int kStepLog2 = kUnitLog2 + 5;
  __shared__ float thresholds[kThresholds];
  __shared__ uint32_t codes[kCodebookSize];
  __shared__ uint32_t maxima[kWarps];
  __shared__ __align__(16) uint8_t packed[kWarps][kWarpValues / 2];

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kBlockValues + warp * kWarpValues;
  const int64_t left = p.count - first;  // values, from the warp's first; may be negative
  if (threadIdx.x < kThresholds) thresholds[threadIdx.x] = p.thresholds[threadIdx.x];
  if (threadIdx.x < kCodebookSize) codes[threadIdx.x] = p.codes[threadIdx.x];

  const T* values = static_cast<const T*>(p.values) + first;
  Vec16<T> unit[kSteps];
#pragma unroll
  for (int j = 0; j < kSteps; ++j) {
    const int value = (j * 32 + lane) * kUnit;
    if (wide_loads && value + kUnit <= left) {
      unit[j] = *reinterpret_cast<const Vec16<T>*>(values + value);
    } else {
#pragma unroll
      for (int i = 0; i < kUnit; ++i)
        unit[j].at[i] = value + i < left ? values[value + i] : from_float<T>(0.0f);
    }
  }

  // The largest magnitude of each step's block, in every lane that holds a part of it.
  uint32_t largest[kSteps];
  const int lanes = 1 << min(p.block_log2 - kUnitLog2, 5);
#pragma unroll
  for (int j = 0; j < kSteps; ++j) {
    largest[j] = 0;
#pragma unroll
    for (int i = 0; i < kUnit; ++i)
      largest[j] = max(largest[j], __float_as_uint(to_float(unit[j].at[i])) & kMagnitude);
    for (int offset = 1; offset < lanes; offset *= 2)
      largest[j] = max(largest[j], __shfl_xor_sync(~0u, largest[j], offset));
  }
#pragma unroll
  for (int log2 = 1; (1 << log2) <= kSteps; ++log2) {  // blocks of several steps: a butterfly
    if (p.block_log2 < kStepLog2 + log2) break;
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      const int half = 1 << (log2 - 1);
      if (j % (2 * half) < half) {
        largest[j] = max(largest[j], largest[j + half]);
        largest[j + half] = largest[j];
      }
    }
  }
  if (p.block_log2 > kWarpLog2) {
    if (lane == 0) maxima[warp] = largest[0];
    __syncthreads();
    const int warps = 1 << (p.block_log2 - kWarpLog2), begin = warp & -warps;
    uint32_t all = 0;
    for (int i = 0; i < warps; ++i) all = max(all, maxima[begin + i]);
#pragma unroll
    for (int j = 0; j < kSteps; ++j) largest[j] = all;
  }
  __syncthreads();

  const int64_t ragged_block = p.count >> p.block_log2;  // its index, where the last one is ragged
  const int64_t in_block = (int64_t{1} << p.block_log2) - 1;
  float tensor_scale = 0;
  if constexpr (kind == ScaleKind::e4m3) tensor_scale = *p.tensor_scale;
#pragma unroll
  for (int j = 0; j < kSteps; ++j) {
    const int value = (j * 32 + lane) * kUnit;
    if (value >= left) break;
    const int64_t block = (first + value) >> p.block_log2;
    const bool ragged = block == ragged_block;
    const BlockScale s = block_scale<kind>(largest[j], tensor_scale, ragged);
    if (((first + value) & in_block) == 0) {
      if constexpr (kind == ScaleKind::fp32) {
        static_cast<uint32_t*>(p.absmax)[block] = s.stored;
      } else {
        static_cast<uint8_t*>(p.absmax)[block] = static_cast<uint8_t>(s.stored);
      }
    }
    const float divisor = s.scale < kMinAbsmax ? kMinAbsmax : s.scale;
    const float reciprocal = __frcp_rn(divisor);
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      const float v = to_float(unit[j].at[i]);
      float normalized = ragged ? __fdiv_rn(v, divisor) : __fmul_rn(v, reciprocal);
      if (value + i >= left) normalized = 0;  // the unused nibble of an odd count
      const uint32_t code = codes[rank_of<4>(thresholds, clamp_unit(normalized))];
      word |= code << (8 * (i / 2) + (i % 2 ? 0 : 4));
    }
    if constexpr (kUnit == 8) {
      reinterpret_cast<uint32_t*>(packed[warp])[value / 8] = word;
    } else {
      reinterpret_cast<uint16_t*>(packed[warp])[value / 4] = static_cast<uint16_t>(word);
    }
  }
  __syncwarp();

  uint8_t* out = p.packed + first / 2;
  const int64_t bytes = (left + 1) / 2;
  if (wide_stores && lane * 16 + 16 <= bytes) {
    reinterpret_cast<uint4*>(out)[lane] = reinterpret_cast<const uint4*>(packed[warp])[lane];
  } else {
    for (int i = lane * 16; i < lane * 16 + 16 && i < bytes; ++i) out[i] = packed[warp][i];
  }
}

template <class T>
cudaError_t launch(const QuantizeProblem& p, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((p.count + kBlockValues - 1) / kBlockValues);
  const bool wide_loads = is_aligned_16(reinterpret_cast<uint64_t>(p.values));
  const bool wide_stores = is_aligned_16(reinterpret_cast<uint64_t>(p.packed));
  return with_scale_kind(p.kind, [&]<ScaleKind kind>() {
    // Nested scales are fp32 first; launch_quantize_absmax has the rest.
    constexpr ScaleKind first = kind == ScaleKind::nested ? ScaleKind::fp32 : kind;
    quantize<T, first><<<blocks, kThreads, 0, stream>>>(p, wide_loads, wide_stores);
    return cudaGetLastError();
  });
}

// --- double quantization -------------------------------------------------------------------------

// reference.mean_in_order: groups of 256 values, each summed as a halving tree in double; then
// their sums in the same way. A warp a group: lane l holds values l, l + 32, ... so that the first
// three halvings stay in the lane and the last five are shuffles. `mean` is null but at the last
// level.
template <class T>
__global__ void __launch_bounds__(kThreads)
    sum_groups(const T* values, int64_t count, double* sums, float* mean, double divisor) {
  const int64_t group = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int64_t first = group * kNestedBlock + threadIdx.x % 32;
  if (group * kNestedBlock >= count) return;
  double s[kNestedBlock / 32];
#pragma unroll
  for (int i = 0; i < kNestedBlock / 32; ++i)
    s[i] = first + 32 * i < count ? static_cast<double>(values[first + 32 * i]) : 0.0;
#pragma unroll
  for (int half = kNestedBlock / 64; half > 0; half /= 2)
#pragma unroll
    for (int i = 0; i < half; ++i) s[i] = __dadd_rn(s[i], s[i + half]);
  double sum = s[0];
  for (int half = 16; half > 0; half /= 2) sum = __dadd_rn(sum, __shfl_down_sync(~0u, sum, half));
  if (threadIdx.x % 32 != 0) return;
  if (mean != nullptr) {
    *mean = __double2float_rn(__ddiv_rn(sum, divisor));
  } else {
    sums[group] = sum;
  }
}

// A warp a group of 256 scales.
__global__ void __launch_bounds__(kThreads) quantize_absmax(const QuantizeAbsmaxProblem p) {
  __shared__ float thresholds[kNestedCodeSize - 1];
  if (threadIdx.x < kNestedCodeSize - 1) thresholds[threadIdx.x] = p.thresholds[threadIdx.x];
  __syncthreads();
  const int64_t group = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int64_t first = group * kNestedBlock + threadIdx.x % 32;
  if (group * kNestedBlock >= p.count) return;
  const float offset = *(p.given_offset != nullptr ? p.given_offset : p.offset);
  float centred[kNestedBlock / 32];
  float nested = 0;
#pragma unroll
  for (int i = 0; i < kNestedBlock / 32; ++i) {
    const int64_t at = first + 32 * i;
    centred[i] = at < p.count ? __fsub_rn(p.absmax[at], offset) : 0.0f;
    nested = fmaxf(nested, fabsf(centred[i]));  // passes over a NaN, as torch.fmax
  }
  for (int half = 16; half > 0; half /= 2)
    nested = fmaxf(nested, __shfl_xor_sync(~0u, nested, half));
  if (threadIdx.x % 32 == 0) p.nested_absmax[group] = nested;
  const float reciprocal = __frcp_rn(nested);
#pragma unroll
  for (int i = 0; i < kNestedBlock / 32; ++i) {
    const int64_t at = first + 32 * i;
    const float v = clamp_unit(__fmul_rn(centred[i], reciprocal));
    const bool nothing = nested == 0 || v != v;  // a group of zeros, a NaN: code 0
    if (at < p.count) p.codes[at] = nothing ? 0 : rank_of<8>(thresholds, v);
  }
}

unsigned warps_grid(int64_t groups) {
  return static_cast<unsigned>((groups + kWarps - 1) / kWarps);
}
int64_t groups_of(int64_t count) { return (count + kNestedBlock - 1) / kNestedBlock; }

}  // namespace

cudaError_t launch_quantize(const QuantizeProblem& p, cudaStream_t stream) {
  return with_element(p.dtype, [&]<class T>() { return launch<T>(p, stream); });
}

int64_t quantize_absmax_workspace(int64_t count) {
  const int64_t sums = groups_of(count);
  return static_cast<int64_t>(sizeof(double)) * (sums + groups_of(sums));
}

cudaError_t launch_quantize_absmax(const QuantizeAbsmaxProblem& p, cudaStream_t stream) {
  const double divisor = static_cast<double>(p.count);
  int64_t groups = groups_of(p.count);
  if (p.given_offset != nullptr) {  // what was subtracted is part of the result
    const cudaError_t error =
        cudaMemcpyAsync(p.offset, p.given_offset, sizeof(float), cudaMemcpyDeviceToDevice, stream);
    if (error != cudaSuccess) return error;
  } else {
    double* sums = static_cast<double*>(p.workspace);
    double* next = sums + groups;
    float* mean = groups == 1 ? p.offset : nullptr;
    sum_groups<<<warps_grid(groups), kThreads, 0, stream>>>(p.absmax, p.count, sums, mean, divisor);
    while (groups > 1) {
      const int64_t count = groups;
      groups = groups_of(count);
      mean = groups == 1 ? p.offset : nullptr;
      sum_groups<<<warps_grid(groups), kThreads, 0, stream>>>(sums, count, next, mean, divisor);
      double* const used = sums;
      sums = next, next = used;
    }
  }
  quantize_absmax<<<warps_grid(groups_of(p.count)), kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace qlk::cuda
