// Turning 4-bit codes into values. The codebook is data (16 floats in any order), so decoding is
// looking up; what differs is where the table lies, and what it costs in issue slots and in passes
// of shared memory for the 8 codes of a 32-bit word:
//
//   PairTable<T>      shared, 32 KB: a byte's two values as one bf16x2 or f16x2, 32 copies, so that
//   lane
//                     l reads bank l whatever the codes.      8 ALU + 4 LDS, 4 passes, values
//                     unscaled
//   FloatPairTable    shared, 32 KB: a byte's two values as two floats, 16 copies: an 8-byte access
//   is
//                     served by half warps.                   8 ALU + 4 LDS.64, 8 passes, unscaled
//   RegisterTable<T>  8 registers: the values of one block, scaled and rounded, as two planes of
//   bytes
//                     that PRMT picks from.                   21 ALU, no shared memory, and 32 to
//                     build
//
// A word holds 8 consecutive values, byte i the values 2i (its high nibble) and 2i + 1; a pair has
// the earlier value in its low half, as matrix fragments want it. Which of these rounds what:
//
//   PairTable       codebook[q] to T, at most half an ulp of T. The codebook is first scaled by a
//   power
//                   of two, `unit`, that brings its largest magnitude into [1, 2): whatever its
//                   range, f16 neither overflows nor loses more than 2^-25 of the largest. Scales
//                   are divided by it (exactly, short of fp32's own limits). For a codebook in [-1,
//                   1], unit is 1.
//   FloatPairTable  nothing.
//   RegisterTable   codebook[q] * scale to T, once: bit for bit what dequantize gives.
#pragma once
#include <cstdint>

#include "../block_format.h"
#include "element.h"

namespace qlk::cuda {

constexpr int kPairs = 256;
constexpr int kPairTableBytes = 32 << 10;  // of either table in shared memory
constexpr int kPairRowLog2 = 7;            // 128 bytes: one entry, all its copies

// Two values, rounded to nearest even, as one register: the first in the low half.
template <class T>
__device__ __forceinline__ uint32_t round_pair(float first, float second);
template <>
__device__ __forceinline__ uint32_t round_pair<__nv_bfloat16>(float first, float second) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
template <>
__device__ __forceinline__ uint32_t round_pair<__half>(float first, float second) {
  const __half2 pair = __floats2half2_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// 2^-floor(log2(max |codebook|)), the power of two that codes are multiplied by (and scales
// divided). All lanes of a warp must call it.
__device__ __forceinline__ float codebook_unit(const float* codebook) {
  float largest = fabsf(codebook[threadIdx.x % kCodebookSize]);
#pragma unroll
  for (int step = kCodebookSize / 2; step > 0; step /= 2)
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
  const uint32_t exponent = __float_as_uint(largest) >> 23;  // biased; 0: all denormal
  return __uint_as_float((254u - min(max(exponent, 1u), 253u)) << 23);
}

// The byte offset of byte `i` of a word in a table of 128-byte rows, with the lane's own column in
// it.
template <int i>
__device__ __forceinline__ uint32_t pair_offset(uint32_t word, uint32_t column) {
  constexpr int shift = 8 * i - kPairRowLog2;
  constexpr uint32_t mask = (kPairs - 1) << kPairRowLog2;
  return ((shift < 0 ? word << -shift : word >> shift) & mask) | column;
}

template <class T>
struct PairTable {
  const char* rows;  // shared memory, kPairTableBytes of it, aligned to 16
  uint32_t column;   // of this lane

  __device__ __forceinline__ explicit PairTable(const void* shared)
      : rows(static_cast<const char*>(shared)), column(threadIdx.x % 32 * 4) {}

  // Filled by all threads of the block, who synchronise before the first look-up; the unit's
  // inverse is what scales are multiplied by.
  static __device__ __forceinline__ void fill(void* shared, const float* codebook, float unit) {
    uint4* const out = static_cast<uint4*>(shared);
    for (int i = threadIdx.x; i < kPairTableBytes / 16; i += blockDim.x) {
      const uint8_t byte = i / 8;  // 8 vectors of 16 bytes hold one entry's copies
      const uint32_t pair = round_pair<T>(__fmul_rn(codebook[earlier_code(byte)], unit),
                                          __fmul_rn(codebook[later_code(byte)], unit));
      out[i] = {pair, pair, pair, pair};
    }
  }

  template <int i>
  __device__ __forceinline__ uint32_t pair(uint32_t word) const {
    return *reinterpret_cast<const uint32_t*>(rows + pair_offset<i>(word, column));
  }
  __device__ __forceinline__ void decode(uint32_t word, uint32_t (&pairs)[4]) const {
    pairs[0] = pair<0>(word), pairs[1] = pair<1>(word);
    pairs[2] = pair<2>(word), pairs[3] = pair<3>(word);
  }
};

struct FloatPairTable {
  const char* rows;
  uint32_t column;

  __device__ __forceinline__ explicit FloatPairTable(const void* shared)
      : rows(static_cast<const char*>(shared)), column(threadIdx.x % 16 * 8) {}

  static __device__ __forceinline__ void fill(void* shared, const float* codebook) {
    float4* const out = static_cast<float4*>(shared);
    for (int i = threadIdx.x; i < kPairTableBytes / 16; i += blockDim.x) {
      const uint8_t byte = i / 8;
      const float first = codebook[earlier_code(byte)], second = codebook[later_code(byte)];
      out[i] = {first, second, first, second};
    }
  }

  template <int i>
  __device__ __forceinline__ float2 pair(uint32_t word) const {
    return *reinterpret_cast<const float2*>(rows + pair_offset<i>(word, column));
  }
  __device__ __forceinline__ void decode(uint32_t word, float2 (&pairs)[4]) const {
    pairs[0] = pair<0>(word), pairs[1] = pair<1>(word);
    pairs[2] = pair<2>(word), pairs[3] = pair<3>(word);
  }
};

// One block's 16 values in registers: low[j] and high[j] are the low and high bytes of values 4j
// ... PRMT picks 4 bytes out of 8 by 4 selectors of 3 bits, so a plane takes two of them for a
// code's three low bits and a third one for its top bit.
template <class T>
struct RegisterTable {
  uint32_t low[4], high[4];

  // `codebook` may lie in shared memory, read alike by all lanes.
  __device__ __forceinline__ void build(const float* codebook, float scale) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t first =
          round_pair<T>(__fmul_rn(codebook[4 * j], scale), __fmul_rn(codebook[4 * j + 1], scale));
      const uint32_t second = round_pair<T>(__fmul_rn(codebook[4 * j + 2], scale),
                                            __fmul_rn(codebook[4 * j + 3], scale));
      low[j] = __byte_perm(first, second, 0x6420);
      high[j] = __byte_perm(first, second, 0x7531);
    }
  }

  __device__ __forceinline__ void decode(uint32_t word, uint32_t (&pairs)[4]) const {
    const uint32_t low_bits = word & 0x77777777u;
    const uint32_t top_bits = ((word >> 1) & 0x44444444u) | 0x32103210u;
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // PRMT reads 16 bits of selectors
      const uint32_t bits = low_bits >> (16 * half), top = top_bits >> (16 * half);
      const uint32_t l =
          __byte_perm(__byte_perm(low[0], low[1], bits), __byte_perm(low[2], low[3], bits), top);
      const uint32_t h = __byte_perm(__byte_perm(high[0], high[1], bits),
                                     __byte_perm(high[2], high[3], bits), top);
      pairs[2 * half] = __byte_perm(l, h, 0x4051);  // a byte's high nibble is the earlier value
      pairs[2 * half + 1] = __byte_perm(l, h, 0x6273);
    }
  }
};

}  // namespace qlk::cuda
