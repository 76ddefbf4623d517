// Number formats: exact conversions and one rounding, for the formats narrower than fp32.
#pragma once

#include <bit>
#include <cmath>
#include <cstring>

#include "engine.h"

namespace emu::EMU_ISA {

enum Round { kNearest, kZero, kDown, kUp, kAway };  // kAway: to nearest, ties away from zero

inline float as_float(u32 x) { return std::bit_cast<float>(x); }
inline u32 as_bits(float x) { return std::bit_cast<u32>(x); }
inline double as_double(u64 x) { return std::bit_cast<double>(x); }
inline u64 as_bits(double x) { return std::bit_cast<u64>(x); }

constexpr u32 kNan32 = 0x7fffffffu;  // PTX's NaN of fp32 results
constexpr u32 kNan16 = 0x7fffu;      // of fp16 and bf16 results

inline u32 canonical(float x) { return x != x ? kNan32 : as_bits(x); }
inline u32 flush(u32 x) { return (x & 0x7f800000u) == 0 ? x & 0x80000000u : x; }

inline float half_to_float(u32 h) {
  u32 m = h & 0x7fffu, s = (h & 0x8000u) << 16;
  u32 finite = as_bits(as_float(m << 13) * 0x1p112f);
  return as_float((m >= 0x7c00u ? (m << 13) | 0x7f800000u : finite) | s);
}

inline u32 float_to_half(u32 x) {
  u32 s = (x >> 16) & 0x8000u, a = x & 0x7fffffffu;
  u32 big = a > 0x7f800000u ? kNan16 : 0x7c00u;
  u32 small = as_bits(as_float(a) + 0.5f) - 0x3f000000u;
  u32 normal = (a + 0xc8000fffu + ((a >> 13) & 1)) >> 13;
  u32 r = a >= 0x47800000u ? big : a < 0x38800000u ? small : normal;
  return a > 0x7f800000u ? kNan16 : r | s;
}

inline float bf16_to_float(u32 h) { return as_float(h << 16); }

inline u32 float_to_bf16(u32 x) {
  u32 r = (x + 0x7fffu + ((x >> 16) & 1)) >> 16;
  return (x & 0x7fffffffu) > 0x7f800000u ? kNan16 : r;
}

// A finite format: p significant bits, exponents from emin to emax.
struct Format {
  int p, emin, emax;
};
constexpr Format kF16{11, -14, 15}, kBF16{8, -126, 127}, kTF32{11, -126, 127}, kF32{24, -126, 127},
    kE5M2{3, -14, 15}, kE4M3{4, -6, 8}, kE2M1{2, 0, 2}, kE2M3{4, 0, 2}, kE3M2{3, -2, 4};

// Magnitude bits of |v| in the format; `sticky` says that v's last bit stands for bits below it as
// well (v was rounded to odd). Overflow gives one past the largest finite value.
inline u64 round_magnitude(double v, Format f, Round mode, bool negative) {
  u64 bits = as_bits(v) & 0x7fffffffffffffffull;
  int e = int(bits >> 52) - 1023;
  u64 m = bits & 0xfffffffffffffull;
  if (e == -1023) {
    if (m == 0) return 0;
    e = -1022;  // subnormal doubles: far below every format here, only their being there counts
  } else {
    m |= 1ull << 52;
  }
  int shift = 53 - f.p + (e < f.emin ? f.emin - e : 0);
  if (shift > 62) {
    m = 1;
    shift = 62;
  }
  u64 q = m >> shift, rest = m & ((1ull << shift) - 1), half = 1ull << (shift - 1);
  bool up = false;
  switch (mode) {
    case kNearest:
      up = rest > half || (rest == half && (q & 1));
      break;
    case kAway:
      up = rest >= half;
      break;
    case kZero:
      break;
    case kDown:
      up = negative && rest;
      break;
    case kUp:
      up = !negative && rest;
      break;
  }
  q += up;
  if (e < f.emin) return q;
  return (u64(e - f.emin + 1) << (f.p - 1)) + q - (1ull << (f.p - 1));
}

// IEEE-like formats with infinities, of `width` bits. saturate: the largest finite value instead of
// an infinity (PTX's .satfinite).
inline u64 round_ieee(double v, Format f, int width, Round mode, bool saturate, u64 nan) {
  if (v != v) return nan;
  bool negative = std::signbit(v);
  u64 sign = u64(negative) << (width - 1);
  u64 infinity = u64(f.emax - f.emin + 2) << (f.p - 1);
  if (std::isinf(v)) return sign | (saturate ? infinity - 1 : infinity);
  u64 r = round_magnitude(v, f, mode, negative);
  if (r >= infinity) {
    bool clamp =
        saturate || mode == kZero || (mode == kDown && !negative) || (mode == kUp && negative);
    r = clamp ? infinity - 1 : infinity;
  }
  return sign | r;
}

inline u32 round_half(double v, Round mode = kNearest, bool sat = false) {
  return u32(round_ieee(v, kF16, 16, mode, sat, kNan16));
}
inline u32 round_bf16(double v, Round mode = kNearest, bool sat = false) {
  return u32(round_ieee(v, kBF16, 16, mode, sat, kNan16));
}

// fp8: always saturating in PTX. e4m3 has no infinity and one NaN.
inline u32 round_e4m3(double v) {
  if (v != v) return 0x7f;
  u64 r = std::isinf(v) ? 0x7e : round_magnitude(v, kE4M3, kNearest, std::signbit(v));
  return u32(r > 0x7e ? 0x7e : r) | (std::signbit(v) ? 0x80u : 0u);
}
inline u32 round_e5m2(double v) { return u32(round_ieee(v, kE5M2, 8, kNearest, true, 0x7f)); }
// fp4 and fp6: saturating, without NaN or infinity (NaN becomes the largest positive value).
inline u32 round_small(double v, Format f) {
  int bits = f.p - 1 + (f.p == 2 ? 2 : f.p == 4 ? 2 : 3);
  u64 most = (1ull << bits) - 1;
  if (v != v) return u32(most);
  u64 r = std::isinf(v) ? most : round_magnitude(v, f, kNearest, std::signbit(v));
  return u32((r > most ? most : r) | (std::signbit(v) ? 1ull << bits : 0));
}
inline float small_to_float(u32 x, Format f) {
  int bits = f.p - 1 + (f.p == 2 ? 2 : f.p == 4 ? 2 : 3);
  u32 m = x & ((1u << bits) - 1), frac = m & ((1u << (f.p - 1)) - 1);
  int e = int(m >> (f.p - 1));
  float r = e == 0 ? std::ldexp(float(frac), f.emin - (f.p - 1))
                   : std::ldexp(float(frac | (1u << (f.p - 1))), e - 1 + f.emin - (f.p - 1));
  return (x >> bits) & 1 ? -r : r;
}
inline float e4m3_to_float(u32 x) {
  u32 m = x & 0x7f;
  if (m == 0x7f) return as_float(kNan32);
  float r =
      (m >> 3) == 0 ? std::ldexp(float(m), -9) : std::ldexp(float((m & 7) | 8), int(m >> 3) - 10);
  return x & 0x80 ? -r : r;
}
inline float e5m2_to_float(u32 x) { return half_to_float((x & 0xff) << 8); }

// a * b + c rounded to odd in fp64, for a, b and c of at most 24 significant bits each: rounding
// the result again to a narrower format is then rounding the exact value once.
inline double fma_odd(double a, double b, double c) {
  double p = a * b;  // exact
  double s = p + c;
  if (!(std::fabs(s) <= 1.7e308)) return s;
  double t = s - p;
  double error = (p - (s - t)) + (c - t);
  if (error == 0) return s;
  u64 bits = as_bits(s);
  bool away = (error < 0) != (s < 0);  // s was rounded away from zero
  return as_double((away ? bits - 1 : bits) | 1);
}

inline Round round_of(u32 code) { return Round(code); }

}  // namespace emu::EMU_ISA
