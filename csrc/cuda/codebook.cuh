// Turning 4-bit codes into values. The codebook is data (16 floats in any order), so decoding is
// looking up; what differs is where the table lies, and what it costs in issue slots and in passes
// of shared memory for the 8 codes of a 32-bit word:
//
//   PairTable<T>      a byte's two values as one bf16x2 or f16x2 in shared memory, 32 copies, so
//                     that lane l reads bank l whatever the codes. 4 ALU, 4 LDS, 4 passes; unscaled
//   FloatPairTable    a byte's two values as two floats, 16 copies: an 8-byte access is served by
//                     half warps. 4 ALU, 4 LDS.64, 8 passes; unscaled
//   RegisterTable<T>  one block's values in 8 registers, scaled and rounded, as two planes of bytes
//                     that PRMT picks from. 21 ALU, no shared memory, and 32 to build
//
// A word holds 8 consecutive values, byte i the values 2i (its high nibble) and 2i + 1; a pair has
// the earlier value in its low half, as matrix fragments want it. Which of these rounds what:
//
//   PairTable         codebook[q] to T. The codebook is first scaled by a power of two, its unit,
//                     that brings the largest magnitude into [1, 2): whatever its range, f16 does
//                     not overflow, and loses no more than 2^-25 of the largest below 2^-14 of it.
//                     Sums are divided by the unit (exactly, short of fp32's own limits); it is 1
//                     for the usual codebooks.
//   FloatPairTable    nothing
//   RegisterTable     codebook[q] * scale to T, once: bit for bit what dequantize gives
#pragma once
#include <cstdint>

#include "../block_format.h"
#include "element.h"

namespace qlk::cuda {

// Either table in shared memory has a row of 256 bytes for each byte of codes, so that one PRMT
// makes an offset: the lane's column below, the byte above. The copies are the first half of a row;
// the other half, the gap, is the kernel's to use: 32 KB in lines of 32 floats.
constexpr int kPairs = 256;
constexpr int kPairRow = 256;
constexpr int kPairTableBytes = kPairs * kPairRow;
constexpr int kGapFloats = 32;

__device__ __forceinline__ float* table_gap(void* table, int line) {
  return static_cast<float*>(table) + line * (kPairRow / 4) + kGapFloats;
}

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

// 2^-floor(log2(max |codebook|)), the power of two that codes are multiplied by. All lanes of a
// warp must call it.
__device__ __forceinline__ float codebook_unit(const float* codebook) {
  float largest = fabsf(codebook[threadIdx.x % kCodebookSize]);
#pragma unroll
  for (int step = kCodebookSize / 2; step > 0; step /= 2)
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
  const uint32_t exponent = __float_as_uint(largest) >> 23;  // biased; 0: all denormal
  return __uint_as_float((254u - min(max(exponent, 1u), 253u)) << 23);
}

// 1 / unit, for a power of two whose inverse is a normal number.
__device__ __forceinline__ float inverse_of_unit(float unit) {
  return __uint_as_float((254u << 23) - __float_as_uint(unit));
}

// The byte offset of byte `i`'s row, with the lane's own column (below 256) in it.
template <int i>
__device__ __forceinline__ uint32_t pair_offset(uint32_t word, uint32_t column) {
  return __byte_perm(word, column, 0x5504 | i << 4);
}

// `entry(byte)` is the 16 bytes that fill the row of a byte. Two threads a row; a row's vectors are
// stored in turn, each row beginning with another one, so that 8 lanes never meet in a bank.
template <class Entry>
__device__ __forceinline__ void fill_pair_table(void* shared, const Entry& entry) {
  for (int i = threadIdx.x; i < 2 * kPairs; i += blockDim.x) {
    const int row = i / 2, half = i % 2;
    const uint4 vector = entry(static_cast<uint8_t>(row));
    uint4* const out = static_cast<uint4*>(shared) + row * (kPairRow / 16) + 4 * half;
#pragma unroll
    for (int j = 0; j < 4; ++j) out[(j + row) % 4] = vector;
  }
}

template <class T>
struct PairTable {
  const char* rows;  // shared memory, kPairTableBytes of it, aligned to 16
  uint32_t column;   // of this lane

  __device__ __forceinline__ explicit PairTable(const void* shared)
      : rows(static_cast<const char*>(shared)), column(threadIdx.x % 32 * 4) {}

  // Filled by all threads of the block, who synchronise before the first look-up.
  static __device__ __forceinline__ void fill(void* shared, const float* codebook, float unit) {
    fill_pair_table(shared, [&](uint8_t byte) {
      const uint32_t pair = round_pair<T>(__fmul_rn(codebook[earlier_code(byte)], unit),
                                          __fmul_rn(codebook[later_code(byte)], unit));
      return uint4{pair, pair, pair, pair};
    });
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
    fill_pair_table(shared, [&](uint8_t byte) {
      const uint32_t first = __float_as_uint(codebook[earlier_code(byte)]);
      const uint32_t second = __float_as_uint(codebook[later_code(byte)]);
      return uint4{first, second, first, second};
    });
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

// Four bytes of the eight in `a` and `b`, by four selectors: bits 0 ... 2 of a nibble; bit 3 fills
// the byte with its top bit. (__byte_perm clears bit 3 first, an instruction for each.)
__device__ __forceinline__ uint32_t pick_bytes(uint32_t a, uint32_t b, uint32_t selectors) {
  uint32_t bytes;
  asm("prmt.b32 %0, %1, %2, %3;\n" : "=r"(bytes) : "r"(a), "r"(b), "r"(selectors));
  return bytes;
}

// One block's 16 values in registers: low[j] and high[j] are the low and high bytes of values 4j
// ... PRMT picks 4 bytes out of 8 by 4 selectors of 3 bits, so a plane takes two of them for a
// code's three low bits, and the code's top bit chooses between them.
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

  // A mask from the codes' top bits, instead of selectors, tells which half of the table a byte
  // comes from: 20 instructions of the ALU and a shift.
  __device__ __forceinline__ void decode(uint32_t word, uint32_t (&pairs)[4]) const {
    const uint32_t low_bits = word & 0x77777777u, shifted = word << 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // PRMT reads 16 bits of selectors
      const uint32_t bits = half == 0 ? low_bits : low_bits >> 16;
      const uint32_t top = pick_bytes(word, shifted, half == 0 ? 0x9d8c : 0xbfae);
      const uint32_t l =
          (pick_bytes(low[2], low[3], bits) & top) | (pick_bytes(low[0], low[1], bits) & ~top);
      const uint32_t h =
          (pick_bytes(high[2], high[3], bits) & top) | (pick_bytes(high[0], high[1], bits) & ~top);
      pairs[2 * half] = pick_bytes(l, h, 0x4051);  // a byte's high nibble is the earlier value
      pairs[2 * half + 1] = pick_bytes(l, h, 0x6273);
    }
  }
};

}  // namespace qlk::cuda
