// Vectors of floats for one instruction set, and the three things that 4-bit kernels do with them:
// widen and round 16-bit floats, look 16 codes up in a codebook, find the rank of a value.
//
// Every kernel file is compiled once for each instruction set with -DQLK_ISA=<name>, all of it in
// the namespace qlk::<name>, and dispatch.cpp picks a set at run time. Nothing here may come from
// the C++ standard library: an inline function of it compiled for AVX-512 could be the copy that
// the linker keeps for everybody.
//
//   portable     GCC/Clang vectors of 8 floats (SSE2, NEON, ...), table lookups by scalar loads
//   avx2         8 floats; a lookup is four byte shuffles, one for each byte of the fp32 values
//   avx512       16 floats; a lookup is one permute of a register that holds the whole codebook
//   avx512_bf16  avx512, and dot products of bf16 pairs
#pragma once
#include <cstdint>
#include <cstring>

#include "../block_format.h"

#define QLK_LEVEL_portable 0
#define QLK_LEVEL_avx2 1
#define QLK_LEVEL_avx512 2
#define QLK_LEVEL_avx512_bf16 3
#define QLK_CAT_(a, b) a##b
#define QLK_CAT(a, b) QLK_CAT_(a, b)
#define QLK_LEVEL QLK_CAT(QLK_LEVEL_, QLK_ISA)

#if QLK_LEVEL >= 2 && defined(QLK_SIMDE)  // AVX-512 in software, for tests on machines without it
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#elif QLK_LEVEL >= 1
#include <immintrin.h>
#endif

namespace qlk {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

namespace QLK_ISA {

// --- one value at a time: tails, and the meaning of the vector code ----------------------------

QLK_INLINE float as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
QLK_INLINE uint32_t as_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

QLK_INLINE float to_float(float v) { return v; }
QLK_INLINE float to_float(bf16 v) { return as_float((uint32_t)v.bits << 16); }
QLK_INLINE float to_float(fp16 v) {
  const uint32_t sign = (uint32_t)(v.bits & 0x8000) << 16;
  const uint32_t magnitude = v.bits & 0x7fff;
  if (magnitude >= 0x7c00) return as_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  // Scaling by 2^112 rebiases the exponent and normalizes subnormals, exactly.
  return as_float(sign | as_bits(as_float(magnitude << 13) * as_float((127 + 112) << 23)));
}

QLK_INLINE void round_to(float v, float* out) { *out = v; }
QLK_INLINE void round_to(float v, bf16* out) {  // to nearest even; NaN becomes the quiet 0x7fc0
  const uint32_t bits = as_bits(v);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  out->bits = v != v ? 0x7fc0 : (uint16_t)rounded;
}
QLK_INLINE void round_to(float v, fp16* out) {  // to nearest even
  const uint32_t sign = as_bits(v) >> 16 & 0x8000, magnitude = as_bits(v) & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;
  } else if (magnitude >= 0x477ff000) {  // 65520 and above round to infinity
    half = 0x7c00;
  } else if (magnitude < 0x38800000) {  // subnormal: adding 0.5 leaves the rounded bits below it
    half = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000;
  } else {
    half = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  }
  out->bits = (uint16_t)(sign | half);
}

// --- vectors ------------------------------------------------------------------------------------

#if QLK_LEVEL >= 2
constexpr int kLanes = 16;
typedef __m512 Floats;
QLK_INLINE Floats zero() { return _mm512_setzero_ps(); }
QLK_INLINE Floats splat(float v) { return _mm512_set1_ps(v); }
QLK_INLINE Floats load(const float* p) { return _mm512_loadu_ps(p); }
QLK_INLINE Floats load(const bf16* p) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
QLK_INLINE Floats load(const fp16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}
QLK_INLINE void store(float* p, Floats v) { _mm512_storeu_ps(p, v); }
QLK_INLINE void store(fp16* p, Floats v) {
  _mm256_storeu_si256((__m256i*)p,
                      _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
// By integer arithmetic: vcvtneps2bf16 would flush denormals to zero.
QLK_INLINE void store(bf16* p, Floats v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  r = _mm512_srli_epi32(r, 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  r = _mm512_mask_mov_epi32(r, nan, _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(r));
}
QLK_INLINE Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
QLK_INLINE Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
QLK_INLINE Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
QLK_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
// NaN in v stays: min and max give their second operand when either is NaN.
QLK_INLINE Floats clamp1(Floats v) {
  return _mm512_min_ps(_mm512_set1_ps(1.f), _mm512_max_ps(_mm512_set1_ps(-1.f), v));
}
QLK_INLINE float sum(Floats v) {  // a halving tree, as everywhere
  const __m256 a = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  const __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(c, _mm_shuffle_ps(c, c, 1)));
}

typedef __m512i Bits;  // |v| as integers order like the values, and NaN comes last
QLK_INLINE Bits no_bits() { return _mm512_setzero_si512(); }
QLK_INLINE Bits max_magnitude(Bits m, Floats v) {
  return _mm512_max_epi32(m,
                          _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff)));
}
QLK_INLINE Bits max_bits(Bits a, Bits b) { return _mm512_max_epi32(a, b); }
QLK_INLINE float max_lane(Bits m) {
  int32_t lanes[16];
  _mm512_storeu_si512(lanes, m);
  int32_t best = 0;
  for (int i = 0; i < 16; ++i) best = lanes[i] > best ? lanes[i] : best;
  return as_float((uint32_t)best);
}

// The codebook in one register.
struct Codebook {
  __m512 values;
  static Codebook make(const float* book) { return Codebook{_mm512_loadu_ps(book)}; }
};
// 32 values in order from 16 bytes.
QLK_INLINE void lookup32(const Codebook& c, const uint8_t* bytes, Floats out[2]) {
  const __m128i b = _mm_loadu_si128((const __m128i*)bytes), low = _mm_set1_epi8(15);
  const __m128i early = _mm_and_si128(_mm_srli_epi16(b, 4), low), late = _mm_and_si128(b, low);
  out[0] = _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(_mm_unpacklo_epi8(early, late)), c.values);
  out[1] = _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(_mm_unpackhi_epi8(early, late)), c.values);
}
// 64 values from 32 bytes in the order that is cheapest here; pair_position says which that is.
constexpr int kPairVectors = 4;
QLK_INLINE void lookup64(const Codebook& c, const uint8_t* bytes, Floats out[4]) {
  for (int h = 0; h < 2; ++h) {
    const __m512i b = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(bytes + 16 * h)));
    out[2 * h] = _mm512_permutexvar_ps(_mm512_srli_epi32(b, 4), c.values);
    out[2 * h + 1] = _mm512_permutexvar_ps(b, c.values);  // the index is the low four bits
  }
}
QLK_INLINE int pair_position(int j) { return (j >> 5) * 32 + 2 * (j & 15) + ((j >> 4) & 1); }

// A block's 16 values in 16 bits, scaled and rounded once: 64 weights cost 16 products, not 64.
// Twice over, since the index of a word permute is five bits, of which four are the code.
struct Table16 {
  __m512i words;
};
template <typename T>
QLK_INLINE Table16 scaled_table(const Codebook& c, float scale) {
  alignas(32) T rounded[16];
  store(rounded, mul(c.values, splat(scale)));
  return {_mm512_broadcast_i64x4(_mm256_load_si256((const __m256i*)rounded))};
}
QLK_INLINE __m512i table_words(const Table16& t, const uint8_t* bytes) {
  const __m128i b = _mm_loadu_si128((const __m128i*)bytes), low = _mm_set1_epi8(15);
  const __m128i early = _mm_and_si128(_mm_srli_epi16(b, 4), low), late = _mm_and_si128(b, low);
  const __m256i codes =
      _mm256_set_m128i(_mm_unpackhi_epi8(early, late), _mm_unpacklo_epi8(early, late));
  return _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(codes), t.words);
}
// 32 values in order from 16 bytes.
QLK_INLINE void lookup32(const Table16& t, const uint8_t* bytes, void* out) {
  _mm512_storeu_si512(out, table_words(t, bytes));
}
QLK_INLINE void stream32(const Table16& t, const uint8_t* bytes, void* out) {
  const __m512i v = table_words(t, bytes);
  _mm256_stream_si256((__m256i*)out, _mm512_castsi512_si256(v));
  _mm256_stream_si256((__m256i*)out + 1, _mm512_extracti64x4_epi64(v, 1));
}
// The same, of a bf16 table, widened to fp32.
QLK_INLINE void widen32(const Table16& t, const uint8_t* bytes, float* out) {
  const __m512i v = table_words(t, bytes);
  const __m512i a = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(v));
  const __m512i b = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(v, 1));
  _mm512_storeu_si512(out, _mm512_slli_epi32(a, 16));
  _mm512_storeu_si512(out + 16, _mm512_slli_epi32(b, 16));
}

// Rank by binary search: level l compares with one of 2^l thresholds, picked by the bits so far.
struct Ranker {
  __m512 level[4];
  static Ranker make(const float* t) {
    Ranker r;
    for (int l = 0; l < 4; ++l) {
      float row[16] = {0};
      for (int i = 0; i < (1 << l); ++i) row[i] = t[(2 * i + 1) * (8 >> l) - 1];
      r.level[l] = _mm512_loadu_ps(row);
    }
    return r;
  }
};
typedef __m512i Ranks;
QLK_INLINE Ranks rank(const Ranker& r, Floats v) {
  __m512i i = _mm512_setzero_si512();
  const __m512i one = _mm512_set1_epi32(1);
  for (int l = 0; l < 4; ++l) {
    // "not below or equal", so that NaN goes up everywhere
    const __mmask16 up = _mm512_cmp_ps_mask(v, _mm512_permutexvar_ps(i, r.level[l]), _CMP_NLE_UQ);
    i = _mm512_add_epi32(i, i);
    i = _mm512_mask_add_epi32(i, up, i, one);
  }
  return i;
}
struct CodeOrder {
  __m128i codes;
  static CodeOrder make(const uint8_t* c) { return {_mm_loadu_si128((const __m128i*)c)}; }
};
// 16 bytes from 32 ranks in order.
QLK_INLINE void pack32(const CodeOrder& o, const Ranks r[2], uint8_t* out) {
  const __m128i a = _mm_shuffle_epi8(o.codes, _mm512_cvtepi32_epi8(r[0]));
  const __m128i b = _mm_shuffle_epi8(o.codes, _mm512_cvtepi32_epi8(r[1]));
  const __m128i shift = _mm_set1_epi16(0x0110);  // earlier * 16 + later
  const __m128i pa = _mm_maddubs_epi16(a, shift), pb = _mm_maddubs_epi16(b, shift);
  _mm_storeu_si128((__m128i*)out, _mm_packus_epi16(pa, pb));
}

#elif QLK_LEVEL == 1
constexpr int kLanes = 8;
typedef __m256 Floats;
QLK_INLINE Floats zero() { return _mm256_setzero_ps(); }
QLK_INLINE Floats splat(float v) { return _mm256_set1_ps(v); }
QLK_INLINE Floats load(const float* p) { return _mm256_loadu_ps(p); }
QLK_INLINE Floats load(const bf16* p) {
  return _mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
QLK_INLINE Floats load(const fp16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
}
QLK_INLINE void store(float* p, Floats v) { _mm256_storeu_ps(p, v); }
// Eight rounded values in a register; the pointer only names the type.
QLK_INLINE __m128i round8(const fp16*, Floats v) {
  return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
QLK_INLINE __m128i round8(const bf16*, Floats v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i r = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  r = _mm256_srli_epi32(r, 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  r = _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc0), nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
}
QLK_INLINE void store(fp16* p, Floats v) { _mm_storeu_si128((__m128i*)p, round8(p, v)); }
QLK_INLINE void store(bf16* p, Floats v) { _mm_storeu_si128((__m128i*)p, round8(p, v)); }
QLK_INLINE Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
QLK_INLINE Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
QLK_INLINE Floats div(Floats a, Floats b) { return _mm256_div_ps(a, b); }
QLK_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
// NaN in v stays: min and max give their second operand when either is NaN.
QLK_INLINE Floats clamp1(Floats v) {
  return _mm256_min_ps(_mm256_set1_ps(1.f), _mm256_max_ps(_mm256_set1_ps(-1.f), v));
}
QLK_INLINE float sum(Floats v) {
  const __m128 b = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(c, _mm_shuffle_ps(c, c, 1)));
}

typedef __m256i Bits;  // |v| as integers order like the values, and NaN comes last
QLK_INLINE Bits no_bits() { return _mm256_setzero_si256(); }
QLK_INLINE Bits max_magnitude(Bits m, Floats v) {
  return _mm256_max_epi32(m,
                          _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7fffffff)));
}
QLK_INLINE Bits max_bits(Bits a, Bits b) { return _mm256_max_epi32(a, b); }
QLK_INLINE float max_lane(Bits m) {
  __m128i b = _mm_max_epi32(_mm256_castsi256_si128(m), _mm256_extracti128_si256(m, 1));
  b = _mm_max_epi32(b, _mm_shuffle_epi32(b, 0x4e));
  b = _mm_max_epi32(b, _mm_shuffle_epi32(b, 0xb1));
  return as_float((uint32_t)_mm_cvtsi128_si32(b));
}

// The codebook as four byte tables, one for each byte of its fp32 values: shuffles of 32 codes at
// once, where permutes of floats would take 8 codes at a time from each half of the table.
struct Codebook {
  __m256i plane[4];
  __m256 values[2];
  static Codebook make(const float* book) {
    Codebook c;
    c.values[0] = _mm256_loadu_ps(book);
    c.values[1] = _mm256_loadu_ps(book + 8);
    for (int p = 0; p < 4; ++p) {
      uint8_t bytes[16];
      for (int i = 0; i < 16; ++i) bytes[i] = (uint8_t)(as_bits(book[i]) >> (8 * p));
      c.plane[p] = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)bytes));
    }
    return c;
  }
};
// Byte i of each 128-bit half of `codes` becomes a float; see pair_position for where it lands.
QLK_INLINE void planes(const Codebook& c, __m256i codes, Floats out[4]) {
  const __m256i p0 = _mm256_shuffle_epi8(c.plane[0], codes);
  const __m256i p1 = _mm256_shuffle_epi8(c.plane[1], codes);
  const __m256i p2 = _mm256_shuffle_epi8(c.plane[2], codes);
  const __m256i p3 = _mm256_shuffle_epi8(c.plane[3], codes);
  const __m256i low_a = _mm256_unpacklo_epi8(p0, p1), high_a = _mm256_unpacklo_epi8(p2, p3);
  const __m256i low_b = _mm256_unpackhi_epi8(p0, p1), high_b = _mm256_unpackhi_epi8(p2, p3);
  out[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low_a, high_a));
  out[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low_a, high_a));
  out[2] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low_b, high_b));
  out[3] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low_b, high_b));
}
// 32 values in order from 16 bytes.
QLK_INLINE void lookup32(const Codebook& c, const uint8_t* bytes, Floats out[4]) {
  const __m128i b = _mm_loadu_si128((const __m128i*)bytes), low = _mm_set1_epi8(15);
  const __m128i early = _mm_and_si128(_mm_srli_epi16(b, 4), low), late = _mm_and_si128(b, low);
  const __m256i codes =
      _mm256_set_m128i(_mm_unpackhi_epi8(early, late), _mm_unpacklo_epi8(early, late));
  // Groups of four codes: the even ones to the low half, so that `planes` puts all in order.
  planes(c, _mm256_permutevar8x32_epi32(codes, _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7)), out);
}
// 64 values from 32 bytes in the order that is cheapest here; pair_position says which that is.
constexpr int kPairVectors = 8;
QLK_INLINE void lookup64(const Codebook& c, const uint8_t* bytes, Floats out[8]) {
  const __m256i b = _mm256_loadu_si256((const __m256i*)bytes), low = _mm256_set1_epi8(15);
  planes(c, _mm256_and_si256(_mm256_srli_epi16(b, 4), low), out);
  planes(c, _mm256_and_si256(b, low), out + 4);
}
QLK_INLINE int pair_position(int j) {
  const int vector = (j >> 3) & 3, lane = j & 7;
  return 2 * (4 * vector + (lane & 3) + 16 * (lane >> 2)) + (j >> 5);
}

// A block's 16 values in 16 bits, scaled and rounded once: 64 weights cost 16 products, not 64.
// As two byte tables, one for the low and one for the high bytes.
struct Table16 {
  __m256i low, high;
};
template <typename T>
QLK_INLINE Table16 scaled_table(const Codebook& c, float scale) {
  // In registers: two 16-byte stores read back as 32 bytes would wait for memory.
  const T* type = nullptr;
  const __m256i words = _mm256_set_m128i(round8(type, mul(c.values[1], splat(scale))),
                                         round8(type, mul(c.values[0], splat(scale))));
  const __m256i bytes = _mm256_packus_epi16(_mm256_and_si256(words, _mm256_set1_epi16(255)),
                                            _mm256_srli_epi16(words, 8));
  // quarters: low 0-7, high 0-7, low 8-15, high 8-15
  return {_mm256_permute4x64_epi64(bytes, 0x88), _mm256_permute4x64_epi64(bytes, 0xdd)};
}
// 32 values in order from 16 bytes.
QLK_INLINE void table_words(const Table16& t, const uint8_t* bytes, __m256i out[2]) {
  const __m128i b = _mm_loadu_si128((const __m128i*)bytes), low = _mm_set1_epi8(15);
  const __m128i early = _mm_and_si128(_mm_srli_epi16(b, 4), low), late = _mm_and_si128(b, low);
  const __m128i a = _mm_unpacklo_epi8(early, late), z = _mm_unpackhi_epi8(early, late);
  const __m256i codes = _mm256_set_m128i(_mm_unpackhi_epi64(a, z), _mm_unpacklo_epi64(a, z));
  const __m256i l = _mm256_shuffle_epi8(t.low, codes), h = _mm256_shuffle_epi8(t.high, codes);
  out[0] = _mm256_unpacklo_epi8(l, h);
  out[1] = _mm256_unpackhi_epi8(l, h);
}
QLK_INLINE void lookup32(const Table16& t, const uint8_t* bytes, void* out) {
  __m256i v[2];
  table_words(t, bytes, v);
  _mm256_storeu_si256((__m256i*)out, v[0]);
  _mm256_storeu_si256((__m256i*)out + 1, v[1]);
}
QLK_INLINE void stream32(const Table16& t, const uint8_t* bytes, void* out) {
  __m256i v[2];
  table_words(t, bytes, v);
  _mm256_stream_si256((__m256i*)out, v[0]);
  _mm256_stream_si256((__m256i*)out + 1, v[1]);
}
// The same, of a bf16 table, widened to fp32.
QLK_INLINE void widen32(const Table16& t, const uint8_t* bytes, float* out) {
  const __m128i b = _mm_loadu_si128((const __m128i*)bytes), low = _mm_set1_epi8(15);
  const __m128i early = _mm_and_si128(_mm_srli_epi16(b, 4), low), late = _mm_and_si128(b, low);
  __m256i codes = _mm256_set_m128i(_mm_unpackhi_epi8(early, late), _mm_unpacklo_epi8(early, late));
  codes = _mm256_permutevar8x32_epi32(codes, _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
  const __m256i l = _mm256_shuffle_epi8(t.low, codes), h = _mm256_shuffle_epi8(t.high, codes);
  const __m256i a = _mm256_unpacklo_epi8(l, h), c = _mm256_unpackhi_epi8(l, h);
  const __m256i none = _mm256_setzero_si256();
  _mm256_storeu_si256((__m256i*)out, _mm256_unpacklo_epi16(none, a));
  _mm256_storeu_si256((__m256i*)out + 1, _mm256_unpackhi_epi16(none, a));
  _mm256_storeu_si256((__m256i*)out + 2, _mm256_unpacklo_epi16(none, c));
  _mm256_storeu_si256((__m256i*)out + 3, _mm256_unpackhi_epi16(none, c));
}

// Rank by binary search: level l compares with one of 2^l thresholds, picked by the bits so far.
struct Ranker {
  __m256 level[4];
  static Ranker make(const float* t) {
    Ranker r;
    for (int l = 0; l < 4; ++l) {
      float row[8] = {0};
      for (int i = 0; i < (1 << l); ++i) row[i] = t[(2 * i + 1) * (8 >> l) - 1];
      r.level[l] = _mm256_loadu_ps(row);
    }
    return r;
  }
};
typedef __m256i Ranks;
QLK_INLINE Ranks rank(const Ranker& r, Floats v) {
  // "not below or equal", so that NaN goes up everywhere; a true comparison is -1
  __m256i i = _mm256_sub_epi32(
      _mm256_setzero_si256(),
      _mm256_castps_si256(_mm256_cmp_ps(
          v, _mm256_broadcastss_ps(_mm256_castps256_ps128(r.level[0])), _CMP_NLE_UQ)));
  for (int l = 1; l < 4; ++l) {
    const __m256 t = _mm256_permutevar8x32_ps(r.level[l], i);
    const __m256i up = _mm256_castps_si256(_mm256_cmp_ps(v, t, _CMP_NLE_UQ));
    i = _mm256_sub_epi32(_mm256_add_epi32(i, i), up);
  }
  return i;
}
struct CodeOrder {
  __m256i codes;
  static CodeOrder make(const uint8_t* c) {
    return {_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)c))};
  }
};
// 16 bytes from 32 ranks in order.
QLK_INLINE void pack32(const CodeOrder& o, const Ranks r[4], uint8_t* out) {
  const __m256i a = _mm256_packus_epi32(r[0], r[1]), b = _mm256_packus_epi32(r[2], r[3]);
  __m256i bytes = _mm256_packus_epi16(a, b);  // groups of four: 0 2 4 6 | 1 3 5 7
  bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  bytes = _mm256_shuffle_epi8(o.codes, bytes);
  const __m256i pairs = _mm256_maddubs_epi16(bytes, _mm256_set1_epi16(0x0110));
  const __m128i packed =
      _mm_packus_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
  _mm_storeu_si128((__m128i*)out, packed);
}

#else  // portable
constexpr int kLanes = 8;
typedef float Floats __attribute__((vector_size(32)));
typedef int32_t Bits __attribute__((vector_size(32)));
QLK_INLINE Floats zero() { return Floats{}; }
QLK_INLINE Floats splat(float v) { return Floats{v, v, v, v, v, v, v, v}; }
template <typename T>
QLK_INLINE Floats load(const T* p) {
  Floats v;
  for (int i = 0; i < 8; ++i) v[i] = to_float(p[i]);
  return v;
}
template <typename T>
QLK_INLINE void store(T* p, Floats v) {
  for (int i = 0; i < 8; ++i) round_to(v[i], p + i);
}
QLK_INLINE Floats mul(Floats a, Floats b) { return a * b; }
QLK_INLINE Floats add(Floats a, Floats b) { return a + b; }
QLK_INLINE Floats div(Floats a, Floats b) { return a / b; }
QLK_INLINE Floats fma(Floats a, Floats b, Floats c) { return a * b + c; }
QLK_INLINE Floats clamp1(Floats v) {  // NaN stays: it compares false
  Floats one = splat(1.f), minus = splat(-1.f);
  v = v < minus ? minus : v;
  return v > one ? one : v;
}
QLK_INLINE float sum(Floats v) {
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}
QLK_INLINE Bits no_bits() { return Bits{}; }
QLK_INLINE Bits max_bits(Bits a, Bits b) { return a > b ? a : b; }
QLK_INLINE Bits max_magnitude(Bits m, Floats v) { return max_bits(m, (Bits)v & 0x7fffffff); }
QLK_INLINE float max_lane(Bits m) {
  int32_t best = 0;
  for (int i = 0; i < 8; ++i) best = m[i] > best ? m[i] : best;
  return as_float((uint32_t)best);
}

struct Codebook {
  float values[16];
  static Codebook make(const float* book) {
    Codebook c;
    memcpy(c.values, book, sizeof c.values);
    return c;
  }
};
QLK_INLINE void lookup32(const Codebook& c, const uint8_t* bytes, Floats out[4]) {
  for (int i = 0; i < 16; ++i) {
    out[i / 4][2 * (i % 4)] = c.values[earlier_code(bytes[i])];
    out[i / 4][2 * (i % 4) + 1] = c.values[later_code(bytes[i])];
  }
}
constexpr int kPairVectors = 8;
QLK_INLINE void lookup64(const Codebook& c, const uint8_t* bytes, Floats out[8]) {
  lookup32(c, bytes, out);
  lookup32(c, bytes + 16, out + 4);
}
QLK_INLINE int pair_position(int j) { return j; }

// A block's 16 values in 16 bits, scaled and rounded once: 64 weights cost 16 products, not 64.
struct Table16 {
  uint16_t words[16];
};
template <typename T>
QLK_INLINE Table16 scaled_table(const Codebook& c, float scale) {
  Table16 t;
  for (int i = 0; i < 16; ++i) {
    T rounded;
    round_to(c.values[i] * scale, &rounded);
    t.words[i] = rounded.bits;
  }
  return t;
}
// 32 values in order from 16 bytes.
QLK_INLINE void lookup32(const Table16& t, const uint8_t* bytes, void* out) {
  uint16_t words[32];
  for (int i = 0; i < 16; ++i) {
    words[2 * i] = t.words[earlier_code(bytes[i])];
    words[2 * i + 1] = t.words[later_code(bytes[i])];
  }
  memcpy(out, words, sizeof words);
}
QLK_INLINE void stream32(const Table16& t, const uint8_t* bytes, void* out) {
  lookup32(t, bytes, out);
}
// The same, of a bf16 table, widened to fp32.
QLK_INLINE void widen32(const Table16& t, const uint8_t* bytes, float* out) {
  for (int i = 0; i < 16; ++i) {
    out[2 * i] = as_float((uint32_t)t.words[earlier_code(bytes[i])] << 16);
    out[2 * i + 1] = as_float((uint32_t)t.words[later_code(bytes[i])] << 16);
  }
}

struct Ranker {
  float thresholds[15];
  static Ranker make(const float* t) {
    Ranker r;
    memcpy(r.thresholds, t, sizeof r.thresholds);
    return r;
  }
};
typedef Bits Ranks;
QLK_INLINE Ranks rank(const Ranker& r, Floats v) {
  Bits i = {};
  for (int t = 0; t < 15; ++t) i -= ~(v <= splat(r.thresholds[t]));  // a true comparison is -1
  return i;
}
struct CodeOrder {
  uint8_t codes[16];
  static CodeOrder make(const uint8_t* c) {
    CodeOrder o;
    memcpy(o.codes, c, 16);
    return o;
  }
};
QLK_INLINE void pack32(const CodeOrder& o, const Ranks r[4], uint8_t* out) {
  for (int i = 0; i < 16; ++i) {
    const Ranks& v = r[i / 4];
    out[i] = pack_codes(o.codes[v[2 * (i % 4)]], o.codes[v[2 * (i % 4) + 1]]);
  }
}
#endif

constexpr int kVectors32 = 32 / kLanes;  // vectors that hold 32 floats

// One value, for tails: what lookup32 and rank do to a lane.
QLK_INLINE int rank1(const float* thresholds, float v) {
  int i = 0;
  for (int t = 0; t < kThresholds; ++t) i += !(v <= thresholds[t]);
  return i;
}

#if QLK_LEVEL == 3
// Pairs of bf16, summed in fp32. Denormals count as zero in these instructions.
typedef __m512bh Bf16s;  // 32 of them
QLK_INLINE Bf16s load_pairs(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
QLK_INLINE Floats dot_pairs(Bf16s a, Bf16s b, Floats sum) { return _mm512_dpbf16_ps(sum, a, b); }
QLK_INLINE void store_pairs(bf16* p, Floats first, Floats second) {
  _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(second, first));
}
// The codebook rounded to bf16, twice over: the index is five bits, of which four are the code.
struct Codebook16 {
  __m512i values;
  static Codebook16 make(const float* book) {
    bf16 twice[32];
    for (int i = 0; i < 32; ++i) round_to(book[i & 15], twice + i);
    return {_mm512_loadu_si512(twice)};
  }
};
// The block's values scaled and rounded to bf16 instead: exact weights, 16 products for 64 of them.
QLK_INLINE Codebook16 scaled_pairs(const Codebook& c, float scale) {
  const __m256i words = (__m256i)_mm512_cvtneps_pbh(mul(c.values, splat(scale)));
  return {_mm512_broadcast_i64x4(words)};
}
// 64 values from 32 bytes: the 32 earlier ones, then the 32 later ones.
QLK_INLINE void lookup64(const Codebook16& c, const uint8_t* bytes, Bf16s out[2]) {
  const __m512i b = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)bytes));
  out[0] = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(b, 4), c.values);
  out[1] = (__m512bh)_mm512_permutexvar_epi16(b, c.values);
}
QLK_INLINE int pair_position16(int j) { return 2 * (j & 31) + (j >> 5); }
#endif

}  // namespace QLK_ISA
}  // namespace qlk
