// The memory layout of a packed weight, written down once; every kernel includes it.
//
//   W [N, K] row-major is one run of n = N * K values, cut into blocks of `blocksize` consecutive
//   values (a power of two, 16 ... 4096); blocks may cross rows.
//
//   packed   byte i holds value 2i in its HIGH nibble and value 2i + 1 in its low nibble
//   scales   one a block: fp32 absmax, or nested (double quantization):
//
//            scale[b] = float32(code[absmax8[b]] * nested_absmax[b / 256]) + offset
//
//            two roundings, never an fma: all backends agree bit for bit.
//
//            For research, a byte a block: e8m0, 2^(byte - 127) and 255 for NaN; e4m3 (four bits of
//            exponent, three of mantissa, 0x7f for NaN) times one float a tensor, a single
//            rounding.
//
// A value is round_to_dtype(codebook[q] * scale), rounded once.
#pragma once
#include <cstdint>
#include <cstring>

// Always inlined, internal linkage: the same header is compiled for several instruction sets, and a
// shared out-of-line copy could be the one that the machine cannot run.
#if defined(__CUDACC__)
#define QLK_INLINE static __host__ __device__ __forceinline__
#else
#define QLK_INLINE static inline __attribute__((always_inline))
#endif

namespace qlk {

constexpr int kCodebookSize = 16;
constexpr int kThresholds = 15;
constexpr int kNestedBlockLog2 = 8;
constexpr int kNestedBlock = 1 << kNestedBlockLog2;
constexpr int kNestedCodeSize = 256;
constexpr int kMinBlockLog2 = 4;
constexpr int kMaxBlockLog2 = 12;
constexpr float kMinAbsmax = 1e-38f;  // formats.MIN_ABSMAX

QLK_INLINE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

QLK_INLINE int earlier_code(uint8_t byte) { return byte >> 4; }
QLK_INLINE int later_code(uint8_t byte) { return byte & 15; }
QLK_INLINE uint8_t pack_codes(int earlier, int later) { return (uint8_t)((earlier << 4) | later); }

// Every kernel has the first two; quantize and dequantize have all.
enum class ScaleKind : int { fp32, nested, e8m0, e4m3 };

QLK_INLINE float float_of_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
QLK_INLINE float e8m0_value(uint32_t byte) {
  if (byte == 255) return float_of_bits(0x7fc00000u);
  return float_of_bits(byte == 0 ? 0x00400000u : byte << 23);
}
QLK_INLINE float e4m3_value(uint32_t byte) {
  const uint32_t sign = (byte & 0x80u) << 24, magnitude = byte & 0x7fu;
  if (magnitude == 0x7fu) return float_of_bits(0x7fc00000u);
  if (magnitude < 8) {  // denormals: multiples of 2^-9
    const float value = (float)magnitude * 0x1p-9f;
    return sign != 0 ? -value : value;
  }
  return float_of_bits(sign | ((magnitude << 20) + ((127u - 7u) << 23)));
}

// The scales of a weight, fp32 or nested; `absmax` is null when they are nested.
struct Scales {
  const float* absmax;
  const uint8_t* absmax8;
  const float* nested_absmax;
  const float* nested_code;
  float offset;
};

QLK_INLINE float load_scale(const Scales& s, int64_t block) {
  if (s.absmax != nullptr) return s.absmax[block];
  const float product =
      s.nested_code[s.absmax8[block]] * s.nested_absmax[block >> kNestedBlockLog2];
  return product + s.offset;  // two roundings: built with contraction off (-ffp-contract, -fmad)
}

}  // namespace qlk
