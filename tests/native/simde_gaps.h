// AVX-512 intrinsics that SIMDe 0.8.2 does not have, in plain loops, for the build that runs the
// AVX-512 kernels on machines without AVX-512 (QLK_EMULATE_AVX512 in CMakeLists.txt). Included
// before everything else in that build alone. An intrinsic that neither has is a compile error that
// names it.
//
// Meanings: Intel's Software Developer's Manual, volume 2, the instruction in each comment.
#pragma once
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>

#include <stdint.h>
#include <string.h>

namespace simde_gaps {

// Internal linkage throughout: nothing compiled here may be the copy that other files use.
template <class To, class From>
static inline To cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
template <class T, int n>
struct Lanes {
  T v[n];
};

// Narrows or widens lane by lane; narrowing keeps the low bits.
template <class To, class Out, class In, int n, class From>
static inline To convert(const From& from) {
  const auto in = cast<Lanes<In, n>>(from);
  Lanes<Out, n> out;
  for (int i = 0; i < n; i++) out.v[i] = (Out)in.v[i];
  return cast<To>(out);
}

// VCVTPS2PH with imm8's rounding, by AVX2's own instruction on each half.
template <int imm>
static inline __m256i cvtps_ph(__m512 a) {
  const auto halves = cast<Lanes<__m256, 2>>(a);
  const Lanes<__m128i, 2> out = {_mm256_cvtps_ph(halves.v[0], imm),
                                 _mm256_cvtps_ph(halves.v[1], imm)};
  return cast<__m256i>(out);
}

// VCVTNEPS2BF16: to nearest even; denormals become zero; a NaN is cut and made quiet. MXCSR plays
// no part.
static inline uint16_t to_bf16(uint32_t bits) {
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40);
  if (magnitude < 0x00800000) return (uint16_t)(bits >> 16 & 0x8000);
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
static inline __m256i cvtneps_pbh(__m512 a) {
  const auto in = cast<Lanes<uint32_t, 16>>(a);
  Lanes<uint16_t, 16> out;
  for (int i = 0; i < 16; i++) out.v[i] = to_bf16(in.v[i]);
  return cast<__m256i>(out);
}
static inline __m512bh cvtne2ps_pbh(__m512 high, __m512 low) {  // VCVTNE2PS2BF16
  const Lanes<__m256i, 2> out = {cvtneps_pbh(low), cvtneps_pbh(high)};
  return cast<__m512bh>(out);
}

// VDPBF16PS: the odd pair's product first, then the even one's, each a fused multiply-add;
// denormals are zero going in and coming out.
static inline float flushed(float v) {
  const uint32_t bits = cast<uint32_t>(v);
  return (bits & 0x7f800000) == 0 ? cast<float>(bits & 0x80000000) : v;
}
static inline float from_bf16(uint16_t v) { return flushed(cast<float>((uint32_t)v << 16)); }
static inline __m512 dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  auto s = cast<Lanes<float, 16>>(sum);
  const auto x = cast<Lanes<uint16_t, 32>>(a), y = cast<Lanes<uint16_t, 32>>(b);
  for (int i = 0; i < 16; i++) {
    const float odd = flushed(
        __builtin_fmaf(from_bf16(x.v[2 * i + 1]), from_bf16(y.v[2 * i + 1]), flushed(s.v[i])));
    s.v[i] = flushed(__builtin_fmaf(from_bf16(x.v[2 * i]), from_bf16(y.v[2 * i]), odd));
  }
  return cast<__m512>(s);
}

// VMOVNTPS, VMOVNTDQ: a misaligned address faults, here too.
template <class T>
static inline void stream(void* to, const T& from) {
  if ((uintptr_t)to % sizeof(T) != 0) __builtin_trap();
  memcpy(to, &from, sizeof from);
}

}  // namespace simde_gaps

// GCC declares the real ones whatever the target is; these names stand in front of them.
#define _mm512_cvtepu8_epi16(a) (simde_gaps::convert<__m512i, uint16_t, uint8_t, 32>((__m256i)(a)))
#define _mm512_cvtepu8_epi32(a) (simde_gaps::convert<__m512i, uint32_t, uint8_t, 16>((__m128i)(a)))
#define _mm512_cvtepi32_epi16(a) \
  (simde_gaps::convert<__m256i, uint16_t, uint32_t, 16>((__m512i)(a)))
#define _mm512_cvtepi32_epi8(a) (simde_gaps::convert<__m128i, uint8_t, uint32_t, 16>((__m512i)(a)))
#define _mm512_cvtepi16_epi8(a) (simde_gaps::convert<__m256i, uint8_t, uint16_t, 32>((__m512i)(a)))
#define _mm512_cvtps_ph(a, imm) (simde_gaps::cvtps_ph<(imm) & 7>(a))
#define _mm512_cvtneps_pbh(a) ((__m256bh)simde_gaps::cvtneps_pbh(a))
#define _mm512_cvtne2ps_pbh(a, b) (simde_gaps::cvtne2ps_pbh(a, b))
#define _mm512_stream_ps(to, a) (simde_gaps::stream<__m512>(to, a))
#define _mm512_stream_si512(to, a) (simde_gaps::stream<__m512i>(to, a))
#undef _mm512_dpbf16_ps
#define _mm512_dpbf16_ps(s, a, b) (simde_gaps::dpbf16_ps(s, a, b))
