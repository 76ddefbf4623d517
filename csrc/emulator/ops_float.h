// Floating point: fp32, fp64, fp16, bf16, packed pairs, and every conversion.
//
// fp32 results that are NaN become PTX's 0x7fffffff, fp16 and bf16 ones 0x7fff; fp64 keeps x86's
// payloads. .ftz flushes subnormal inputs and results to zeros of their sign. Rounding other than
// to nearest runs the same loops under the processor's rounding mode.
#pragma once

#include <cfenv>

#include "ops_integer.h"

namespace emu::EMU_ISA {

struct RoundScope {
  int saved;
  explicit RoundScope(int mode) : saved(std::fegetround()) { std::fesetround(mode); }
  ~RoundScope() { std::fesetround(saved); }
};

template <Fn F, int Mode>
[[gnu::noinline]] int rounded(Ctx& c, const Inst& i) {
  RoundScope scope(Mode);
  return F(c, i);
}

inline u32 saturate(float x) { return as_bits(x > 0.f ? (x < 1.f ? x : 1.f) : 0.f); }  // NaN is +0

template <bool Ftz>
inline float in32(u32 x) {
  return as_float(Ftz ? flush(x) : x);
}
template <bool Ftz, bool Sat>
inline u32 out32(float x) {
  if constexpr (Sat) {
    u32 r = saturate(x);
    return Ftz ? flush(r) : r;
  }
  u32 r = canonical(x);
  return Ftz ? flush(r) : r;
}

template <auto F, bool Ftz, bool Sat>
int op1f(Ctx& c, const Inst& i) {
  const u32* a = reg<u32>(c, i.o[1]);
  return map_lanes<u32>(c, i.o[0], [=](int l) { return out32<Ftz, Sat>(F(in32<Ftz>(a[l]))); });
}
template <auto F, bool Ftz, bool Sat>
int op2f(Ctx& c, const Inst& i) {
  const u32 *a = reg<u32>(c, i.o[1]), *b = reg<u32>(c, i.o[2]);
  return map_lanes<u32>(
      c, i.o[0], [=](int l) { return out32<Ftz, Sat>(F(in32<Ftz>(a[l]), in32<Ftz>(b[l]))); });
}
template <auto F, bool Ftz, bool Sat>
int op3f(Ctx& c, const Inst& i) {
  const u32 *a = reg<u32>(c, i.o[1]), *b = reg<u32>(c, i.o[2]), *e = reg<u32>(c, i.o[3]);
  return map_lanes<u32>(c, i.o[0], [=](int l) {
    return out32<Ftz, Sat>(F(in32<Ftz>(a[l]), in32<Ftz>(b[l]), in32<Ftz>(e[l])));
  });
}

inline float f_add(float a, float b) { return a + b; }
inline float f_sub(float a, float b) { return a - b; }
inline float f_mul(float a, float b) { return a * b; }
inline float f_fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float f_div(float a, float b) { return a / b; }
inline float f_rcp(float a) { return 1.0f / a; }
inline float f_sqrt(float a) { return __builtin_sqrtf(a); }
inline float f_rsqrt(float a) { return float(1.0 / __builtin_sqrt(double(a))); }
inline float f_div_approx(float a,
                          float b) {  // PTX: for 2^126 < |b| < 2^128 the result is 0 or NaN
  float m = b < 0 ? -b : b;
  return m > 0x1p126f && m < __builtin_inff() ? a * (b < 0 ? -0.0f : 0.0f) : a / b;
}

// 2^x: the exponent split off, the rest by a polynomial in fp64 whose error is below fp32's
// rounding.
inline float f_ex2(float x) {
  double v = x;
  v = v > 200.0 ? 200.0 : v;
  v = v < -200.0 ? -200.0 : v;
  double k = (v + 0x1.8p52) - 0x1.8p52, f = (v - k) * 0.693147180559945309417;
  double p = 1.0 / 3628800;
  p = p * f + 1.0 / 362880;
  p = p * f + 1.0 / 40320;
  p = p * f + 1.0 / 5040;
  p = p * f + 1.0 / 720;
  p = p * f + 1.0 / 120;
  p = p * f + 1.0 / 24;
  p = p * f + 1.0 / 6;
  p = p * f + 0.5;
  p = p * f + 1.0;
  p = p * f + 1.0;
  double scale = as_double((as_bits(k + 0x1.8p52) << 52) + (1023ull << 52));
  float r = float(p * scale);
  return x != x ? x : r;
}
inline float f_lg2(float x) { return float(std::log2(double(x))); }
inline float f_sin(float x) { return float(std::sin(double(x))); }
inline float f_cos(float x) { return float(std::cos(double(x))); }
inline float f_tanh(float x) { return float(std::tanh(double(x))); }

// PTX's minimum: -0 below +0; the other operand if one is NaN, unless NaN is asked for.
template <bool Nan>
inline float f_min(float a, float b) {
  u32 x = as_bits(a), y = as_bits(b);
  float r = a < b || (a == b && x >> 31) ? a : b;
  r = b != b ? a : r;
  if (Nan) r = a != a ? a : b != b ? b : r;
  (void)y;
  return r;
}
template <bool Nan>
inline float f_max(float a, float b) {
  u32 x = as_bits(a);
  float r = a > b || (a == b && !(x >> 31)) ? a : b;
  r = b != b ? a : r;
  if (Nan) r = a != a ? a : b != b ? b : r;
  return r;
}
template <bool Max, bool Nan>
inline float f_minmax_xor(float a, float b) {
  u32 sign = (as_bits(a) ^ as_bits(b)) & 0x80000000u;
  float x = as_float(as_bits(a) & 0x7fffffffu), y = as_float(as_bits(b) & 0x7fffffffu);
  float r = Max ? f_max<Nan>(x, y) : f_min<Nan>(x, y);
  return r != r ? r : as_float(as_bits(r) | sign);
}

inline double d_fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
template <bool Max>
inline double d_minmax(double a, double b) {
  if (a != a) return b;
  if (b != b) return a;
  if (a == b) return (std::signbit(a) != Max) ? a : b;
  return (Max ? a > b : a < b) ? a : b;
}

// ------------------------------------------------------------------------------------------------
// fp16 and bf16, single and in pairs

struct Half {
  static float up(u32 x) { return half_to_float(x); }
  static u32 down(float x) { return float_to_half(as_bits(x)); }
  static u32 once(double x) { return round_half(x); }
  static constexpr u32 one = 0x3c00, inf = 0x7c00, top = 0x0400;
};
struct Brain {
  static float up(u32 x) { return bf16_to_float(x); }
  static u32 down(float x) { return float_to_bf16(as_bits(x)); }
  static u32 once(double x) { return round_bf16(x); }
  static constexpr u32 one = 0x3f80, inf = 0x7f80, top = 0x0080;
};
template <class H>
inline u32 sat16(u32 x) {
  return (x & 0x7fff) > H::inf || x & 0x8000 ? 0 : x > H::one ? H::one : x;
}
template <class H, bool Ftz>
inline u32 flush16(u32 x) {
  return Ftz && (x & 0x7fff) < H::top ? x & 0x8000 : x;
}

// Sums of two fp16 or bf16 values are rounded once to fp32's 24 bits and again to 11 or 8:
// harmless, 24 >= 2 * 11 + 2. Products and fma go through fp64, rounded to odd.
template <class H>
inline u32 h_add(u32 a, u32 b) {
  return H::down(H::up(a) + H::up(b));
}
template <class H>
inline u32 h_sub(u32 a, u32 b) {
  return H::down(H::up(a) - H::up(b));
}
template <class H>
inline u32 h_mul(u32 a, u32 b) {
  if constexpr (std::is_same_v<H, Half>)
    return H::down(H::up(a) * H::up(b));
  else
    return H::once(double(H::up(a)) * double(H::up(b)));
}
template <class H>
inline u32 h_fma(u32 a, u32 b, u32 c) {
  return H::once(fma_odd(double(H::up(a)), double(H::up(b)), double(H::up(c))));
}
template <class H>
inline u32 h_relu(u32 x) {
  return (x & 0x7fff) > H::inf ? x : x & 0x8000 ? 0 : x;
}
template <class H, bool Max, bool Nan>
inline u32 h_minmax(u32 a, u32 b) {
  float x = H::up(a), y = H::up(b);
  float r = Max ? f_max<Nan>(x, y) : f_min<Nan>(x, y);
  return r != r ? kNan16 : as_bits(r) == as_bits(x) ? a : b;
}
inline u32 h_neg(u32 a) { return a ^ 0x8000; }
inline u32 h_abs(u32 a) { return a & 0x7fff; }

// F on 16-bit values, in one or both halves.
template <class H, int N, bool Two, bool Ftz, bool Sat, bool Relu, auto F>
int op16(Ctx& c, const Inst& i) {
  const u32* a = reg<u32>(c, i.o[1]);
  const u32* b = reg<u32>(c, i.o[N > 1 ? 2 : 1]);
  const u32* e = reg<u32>(c, i.o[N > 2 ? 3 : 1]);
  auto one = [](u32 x, u32 y, u32 z) -> u32 {
    x = flush16<H, Ftz>(x), y = flush16<H, Ftz>(y), z = flush16<H, Ftz>(z);
    u32 r;
    if constexpr (N == 1)
      r = F(x);
    else if constexpr (N == 2)
      r = F(x, y);
    else
      r = F(x, y, z);
    r = flush16<H, Ftz>(r);
    if constexpr (Sat) r = sat16<H>(r);
    if constexpr (Relu) r = h_relu<H>(r);
    return r;
  };
  return map_lanes<u32>(c, i.o[0], [=](int l) {
    u32 lo = one(a[l] & 0xffff, b[l] & 0xffff, e[l] & 0xffff);
    if constexpr (Two) lo |= one(a[l] >> 16, b[l] >> 16, e[l] >> 16) << 16;
    return lo;
  });
}

// Comparisons of halves; o as in op_setp. Of pairs: p is the lower half's, q the upper's.
template <class H, bool Two, u32 K, bool Ftz>
int op_setp16(Ctx& c, const Inst& i) {
  const u32 *a = reg<u32>(c, i.o[2]), *b = reg<u32>(c, i.o[3]);
  auto part = [=](int shift) {
    return test_lanes([=](int l) {
      return compare_float(K, H::up(flush16<H, Ftz>((a[l] >> shift) & 0xffff)),
                           H::up(flush16<H, Ftz>((b[l] >> shift) & 0xffff)));
    });
  };
  u32 r = part(0), second = Two ? part(16) : ~r;
  if (i.imm) {
    u32 q = get_pred(c, i.o[4]) ^ (i.imm & 4 ? kFull : 0);
    auto with = [&](u32 x) { return (i.imm & 3) == 1 ? x & q : (i.imm & 3) == 2 ? x | q : x ^ q; };
    r = with(r), second = with(second);
  }
  set_pred(c, i.o[0], r);
  if (i.o[1] >= 0) set_pred(c, i.o[1], second);
  return kGo;
}
// set.f16x2 and kin: imm2 is the value of true in each half
template <class H, bool Two, u32 K, bool Ftz>
int op_set16(Ctx& c, const Inst& i) {
  const u32 *a = reg<u32>(c, i.o[1]), *b = reg<u32>(c, i.o[2]);
  u32 v = u32(i.imm2);
  return map_lanes<u32>(c, i.o[0], [=](int l) {
    u32 r = 0;
    for (int s = 0; s < (Two ? 32 : 16); s += 16)
      if (compare_float(K, H::up(flush16<H, Ftz>((a[l] >> s) & 0xffff)),
                        H::up(flush16<H, Ftz>((b[l] >> s) & 0xffff))))
        r |= Two ? v << s : v;
    return r;
  });
}

// ------------------------------------------------------------------------------------------------
// Conversions

// To an integer, saturating; NaN gives 0 (fp64 to 64 bits: the most negative, as the hardware
// does).
template <class T>
inline T to_int(double x, Round mode) {
  if (x != x) return T(0);
  switch (mode) {
    case kNearest:
      x = std::nearbyint(x);
      break;
    case kZero:
      x = std::trunc(x);
      break;
    case kDown:
      x = std::floor(x);
      break;
    default:
      x = std::ceil(x);
      break;
  }
  constexpr double lo = double(std::numeric_limits<T>::min());
  constexpr double hi = double(std::numeric_limits<T>::max());
  if (x <= lo) return std::numeric_limits<T>::min();
  if (x >= hi) return std::numeric_limits<T>::max();
  return T(x);
}
inline double to_integral(double x, Round mode) {
  switch (mode) {
    case kNearest:
      return std::nearbyint(x);
    case kZero:
      return std::trunc(x);
    case kDown:
      return std::floor(x);
    default:
      return std::ceil(x);
  }
}

// imm: rounding (0 nearest even, 1 zero, 2 down, 3 up, 4 away), | 16 ftz, | 32 sat, | 64 relu,
// | 128 to an integral value
template <class T>
int op_f32_to_int(Ctx& c, const Inst& i) {
  const u32* a = reg<u32>(c, i.o[1]);
  Round mode = Round(i.imm & 15);
  bool ftz = i.imm & 16;
  return map_lanes<T>(c, i.o[0], [=](int l) {
    return put<T>(to_int<T>(as_float(ftz ? flush(a[l]) : a[l]), mode));
  });
}
template <class T>
int op_f64_to_int(Ctx& c, const Inst& i) {
  const u64* a = reg<u64>(c, i.o[1]);
  Round mode = Round(i.imm & 15);
  return map_lanes<T>(c, i.o[0], [=](int l) {
    double x = as_double(a[l]);
    return put<T>(to_int<T>(x, mode));
  });
}
template <class T, class H>
int op_half_to_int(Ctx& c, const Inst& i) {
  const u32* a = reg<u32>(c, i.o[1]);
  Round mode = Round(i.imm & 15);
  return map_lanes<T>(c, i.o[0],
                      [=](int l) { return put<T>(to_int<T>(H::up(a[l] & 0xffff), mode)); });
}
template <class T>
int op_int_to_f32(Ctx& c, const Inst& i) {
  const Slot<T>* a = reg<Slot<T>>(c, i.o[1]);
  bool sat = i.imm & 32;
  if ((i.imm & 15) == 0 && !sat)
    return map_lanes<u32>(c, i.o[0], [=](int l) { return as_bits(float(get<T>(a[l]))); });
  static constexpr int modes[4] = {FE_TONEAREST, FE_TOWARDZERO, FE_DOWNWARD, FE_UPWARD};
  RoundScope scope(modes[i.imm & 3]);
  volatile float v;
  u32 t[32];
  for (int l = 0; l < 32; l++) {
    v = float(get<T>(a[l]));
    t[l] = sat ? saturate(v) : as_bits(float(v));
  }
  blend(reg<u32>(c, i.o[0]), t, c.mask);
  return kGo;
}
template <class T>
int op_int_to_f64(Ctx& c, const Inst& i) {
  const Slot<T>* a = reg<Slot<T>>(c, i.o[1]);
  static constexpr int modes[4] = {FE_TONEAREST, FE_TOWARDZERO, FE_DOWNWARD, FE_UPWARD};
  RoundScope scope(modes[i.imm & 3]);
  u64 t[32];
  for (int l = 0; l < 32; l++) {
    volatile double v = double(get<T>(a[l]));
    t[l] = as_bits(double(v));
  }
  blend(reg<u64>(c, i.o[0]), t, c.mask);
  return kGo;
}
// A 64-bit integer as a double rounded to odd: narrower formats then round once.
template <class T>
inline double int_odd(T x) {
  if constexpr (sizeof(T) < 8) {
    return double(x);
  } else {
    bool negative = std::is_signed_v<T> && x < 0;
    u64 m = negative ? 0 - u64(x) : u64(x);
    int drop = std::max(0, 11 - std::countl_zero(m | 1));
    u64 kept = (m >> drop) << drop;
    if (kept != m) kept |= 1ull << drop;
    double r = double(kept);
    return negative ? -r : r;
  }
}
template <class T, bool Bf16>
int op_int_to_half(Ctx& c, const Inst& i) {
  const Slot<T>* a = reg<Slot<T>>(c, i.o[1]);
  Round mode = Round(i.imm & 15);
  return map_lanes<u32>(c, i.o[0], [=](int l) {
    double x = int_odd(get<T>(a[l]));
    return Bf16 ? round_bf16(x, mode) : round_half(x, mode);
  });
}
template <class D, class S>
int op_int_to_int(Ctx& c, const Inst& i) {
  const Slot<S>* a = reg<Slot<S>>(c, i.o[1]);
  if (i.imm & 32)
    return map_lanes<D>(c, i.o[0], [=](int l) {
      __int128 x = get<S>(a[l]), lo = std::numeric_limits<D>::min(),
               hi = std::numeric_limits<D>::max();
      return put<D>(D(x < lo ? lo : x > hi ? hi : x));
    });
  return map_lanes<D>(c, i.o[0], [=](int l) { return put<D>(D(get<S>(a[l]))); });
}
inline int op_f32_to_f32(Ctx& c, const Inst& i) {
  const u32* a = reg<u32>(c, i.o[1]);
  bool ftz = i.imm & 16, sat = i.imm & 32, integral = i.imm & 128;
  Round mode = Round(i.imm & 15);
  return map_lanes<u32>(c, i.o[0], [=](int l) {
    float x = as_float(ftz ? flush(a[l]) : a[l]);
    if (integral) x = float(to_integral(x, mode));
    return sat ? saturate(x) : canonical(x);
  });
}
inline int op_f64_to_f64(Ctx& c, const Inst& i) {
  const u64* a = reg<u64>(c, i.o[1]);
  Round mode = Round(i.imm & 15);
  return map_lanes<u64>(c, i.o[0], [=, &i](int l) {
    double x = as_double(a[l]);
    if (i.imm & 128) x = to_integral(x, mode);
    if (i.imm & 32) x = x > 0 ? (x < 1 ? x : 1.0) : 0.0;
    return as_bits(x);
  });
}
inline int op_f32_to_f64(Ctx& c, const Inst& i) {
  const u32* a = reg<u32>(c, i.o[1]);
  return map_lanes<u64>(c, i.o[0], [=, &i](int l) {
    double x = as_float(i.imm & 16 ? flush(a[l]) : a[l]);
    if (i.imm & 32) x = x > 0 ? (x < 1 ? x : 1.0) : 0.0;
    return as_bits(x);
  });
}
inline int op_f64_to_f32(Ctx& c, const Inst& i) {
  const u64* a = reg<u64>(c, i.o[1]);
  Round mode = Round(i.imm & 15);
  return map_lanes<u32>(c, i.o[0], [=, &i](int l) {
    double x = as_double(a[l]);
    u32 r = u32(round_ieee(x, kF32, 32, mode, false, kNan32));
    if (i.imm & 32) r = saturate(as_float(r));
    return i.imm & 16 ? flush(r) : r;
  });
}
template <bool Bf16>
inline u32 narrow(float x, s64 imm) {
  Round mode = Round(imm & 15);
  u32 r = Bf16 ? round_bf16(x, mode, imm & 256) : round_half(x, mode, imm & 256);
  if (imm & 64) r = Bf16 ? h_relu<Brain>(r) : h_relu<Half>(r);
  if (imm & 32) r = Bf16 ? sat16<Brain>(r) : sat16<Half>(r);
  return r;
}
template <bool Bf16>
int op_f32_to_half(Ctx& c, const Inst& i) {
  const u32* a = reg<u32>(c, i.o[1]);
  if ((i.imm & ~16) == 0) {
    bool ftz = i.imm & 16;
    return map_lanes<u32>(c, i.o[0], [=](int l) {
      u32 x = ftz ? flush(a[l]) : a[l];
      return Bf16 ? float_to_bf16(x) : float_to_half(x);
    });
  }
  return map_lanes<u32>(c, i.o[0], [=, &i](int l) {
    return narrow<Bf16>(as_float(i.imm & 16 ? flush(a[l]) : a[l]), i.imm);
  });
}
template <bool Bf16>
int op_f32_to_half2(Ctx& c, const Inst& i) {  // o[1] becomes the upper half
  const u32 *a = reg<u32>(c, i.o[1]), *b = reg<u32>(c, i.o[2]);
  if (i.imm == 0)
    return map_lanes<u32>(c, i.o[0], [=](int l) {
      u32 hi = Bf16 ? float_to_bf16(a[l]) : float_to_half(a[l]);
      u32 lo = Bf16 ? float_to_bf16(b[l]) : float_to_half(b[l]);
      return hi << 16 | lo;
    });
  return map_lanes<u32>(c, i.o[0], [=, &i](int l) {
    return narrow<Bf16>(as_float(a[l]), i.imm) << 16 | narrow<Bf16>(as_float(b[l]), i.imm);
  });
}
template <bool Bf16>
int op_f64_to_half(Ctx& c, const Inst& i) {
  const u64* a = reg<u64>(c, i.o[1]);
  Round mode = Round(i.imm & 15);
  return map_lanes<u32>(c, i.o[0], [=](int l) {
    double x = as_double(a[l]);
    return Bf16 ? round_bf16(x, mode) : round_half(x, mode);
  });
}
template <bool Bf16>
int op_half_to_f32(Ctx& c, const Inst& i) {
  const u32* a = reg<u32>(c, i.o[1]);
  bool sat = i.imm & 32, ftz = i.imm & 16;
  return map_lanes<u32>(c, i.o[0], [=](int l) {
    float x = Bf16 ? bf16_to_float(a[l] & 0xffff) : half_to_float(a[l] & 0xffff);
    u32 r = sat ? saturate(x) : canonical(x);
    return ftz ? flush(r) : r;
  });
}
template <bool Bf16>
int op_half_to_f64(Ctx& c, const Inst& i) {
  const u32* a = reg<u32>(c, i.o[1]);
  return map_lanes<u64>(c, i.o[0], [=](int l) {
    return as_bits(double(Bf16 ? bf16_to_float(a[l] & 0xffff) : half_to_float(a[l] & 0xffff)));
  });
}
template <bool From, bool To>  // between fp16 and bf16, or to an integral value of the same
int op_half_to_half(Ctx& c, const Inst& i) {
  const u32* a = reg<u32>(c, i.o[1]);
  Round mode = Round(i.imm & 15);
  return map_lanes<u32>(c, i.o[0], [=, &i](int l) {
    float x = From ? bf16_to_float(a[l] & 0xffff) : half_to_float(a[l] & 0xffff);
    if (i.imm & 128) return narrow<To>(float(to_integral(x, mode)), i.imm & ~s64(15));
    return narrow<To>(x, i.imm);
  });
}
inline int op_f32_to_tf32(Ctx& c, const Inst& i) {
  const u32* a = reg<u32>(c, i.o[1]);
  Round mode = Round(i.imm & 15);
  return map_lanes<u32>(c, i.o[0], [=, &i](int l) {
    u32 r = u32(round_ieee(as_float(a[l]), kTF32, 19, mode, i.imm & 256, 0x3ffff)) << 13;
    return i.imm & 64 && r >> 31 && (r & 0x7fffffff) <= 0x7f800000 ? 0u : r;
  });
}
// Pairs of 8-bit floats. imm bit 64: relu
template <bool E5>
inline u32 to_fp8(float x, s64 imm) {
  if (imm & 64 && x < 0) x = 0;
  return E5 ? round_e5m2(x) : round_e4m3(x);
}
template <bool E5>
int op_f32_to_fp8x2(Ctx& c, const Inst& i) {
  const u32 *a = reg<u32>(c, i.o[1]), *b = reg<u32>(c, i.o[2]);
  return map_lanes<u32>(c, i.o[0], [=, &i](int l) {
    return to_fp8<E5>(as_float(a[l]), i.imm) << 8 | to_fp8<E5>(as_float(b[l]), i.imm);
  });
}
template <bool E5, bool Bf16>
int op_half2_to_fp8x2(Ctx& c, const Inst& i) {
  const u32* a = reg<u32>(c, i.o[1]);
  return map_lanes<u32>(c, i.o[0], [=, &i](int l) {
    float hi = Bf16 ? bf16_to_float(a[l] >> 16) : half_to_float(a[l] >> 16);
    float lo = Bf16 ? bf16_to_float(a[l] & 0xffff) : half_to_float(a[l] & 0xffff);
    return to_fp8<E5>(hi, i.imm) << 8 | to_fp8<E5>(lo, i.imm);
  });
}
template <bool E5>
int op_fp8x2_to_half2(Ctx& c, const Inst& i) {
  const u32* a = reg<u32>(c, i.o[1]);
  return map_lanes<u32>(c, i.o[0], [=, &i](int l) {
    auto one = [&](u32 x) {
      u32 r = float_to_half(as_bits(E5 ? e5m2_to_float(x) : e4m3_to_float(x)));
      return i.imm & 64 ? h_relu<Half>(r) : r;
    };
    return one((a[l] >> 8) & 0xff) << 16 | one(a[l] & 0xff);
  });
}
// fp4 and fp6 pairs: e2m1x2 in 8 bits, e2m3x2 and e3m2x2 in 16
template <int K>
inline constexpr Format kSmall = K == 0   ? kE2M1
                                 : K == 1 ? kE2M3
                                          : kE3M2;
template <int K>
int op_f32_to_small(Ctx& c, const Inst& i) {
  const u32 *a = reg<u32>(c, i.o[1]), *b = reg<u32>(c, i.o[2]);
  constexpr int step = K == 0 ? 4 : 8;
  return map_lanes<u32>(c, i.o[0], [=, &i](int l) {
    auto one = [&](float x) { return round_small(i.imm & 64 && x < 0 ? 0.f : x, kSmall<K>); };
    return one(as_float(a[l])) << step | one(as_float(b[l]));
  });
}
template <int K>
int op_small_to_half2(Ctx& c, const Inst& i) {
  const u32* a = reg<u32>(c, i.o[1]);
  constexpr int step = K == 0 ? 4 : 8;
  return map_lanes<u32>(c, i.o[0], [=, &i](int l) {
    auto one = [&](u32 x) {
      u32 r = float_to_half(as_bits(small_to_float(x, kSmall<K>)));
      return i.imm & 64 ? h_relu<Half>(r) : r;
    };
    return one((a[l] >> step) & ((1 << step) - 1)) << 16 | one(a[l] & ((1 << step) - 1));
  });
}
// ue8m0x2: powers of two. Rounding: 1 towards zero, 3 up
inline u32 round_ue8m0(float x, bool up) {
  if (x != x) return 0xff;
  u32 b = as_bits(x) & 0x7fffffff, e = b >> 23, m = b & 0x7fffff;
  if (e == 255) return 0xfe;
  if (up && m && !(e == 0 && m <= 0x400000)) e++;
  return e > 0xfe ? 0xfe : e;
}
inline int op_f32_to_ue8m0(Ctx& c, const Inst& i) {
  const u32 *a = reg<u32>(c, i.o[1]), *b = reg<u32>(c, i.o[2]);
  bool up = (i.imm & 15) == 3;
  return map_lanes<u32>(c, i.o[0], [=](int l) {
    return round_ue8m0(as_float(a[l]), up) << 8 | round_ue8m0(as_float(b[l]), up);
  });
}
inline int op_ue8m0_to_bf16(Ctx& c, const Inst& i) {
  const u32* a = reg<u32>(c, i.o[1]);
  return map_lanes<u32>(c, i.o[0], [=](int l) {
    auto one = [](u32 e) -> u32 { return e == 0xff ? kNan16 : e == 0 ? 0x0040 : e << 7; };
    return one((a[l] >> 8) & 0xff) << 16 | one(a[l] & 0xff);
  });
}

template <bool Add, bool Mul>
int op_f32x2(Ctx& c, const Inst& i) {
  const u64 *a = reg<u64>(c, i.o[1]), *b = reg<u64>(c, i.o[2]);
  const u64* e = reg<u64>(c, i.o[Add && Mul ? 3 : 1]);
  bool ftz = i.imm & 16;
  return map_lanes<u64>(c, i.o[0], [=](int l) {
    auto one = [=](u32 x, u32 y, u32 z) {
      if (ftz) x = flush(x), y = flush(y), z = flush(z);
      float r = Add && Mul ? f_fma(as_float(x), as_float(y), as_float(z))
                : Add      ? as_float(x) + as_float(y)
                : Mul      ? as_float(x) * as_float(y)
                           : as_float(x) - as_float(y);
      u32 q = canonical(r);
      return ftz ? flush(q) : q;
    };
    return u64(one(u32(a[l]), u32(b[l]), u32(e[l]))) |
           u64(one(u32(a[l] >> 32), u32(b[l] >> 32), u32(e[l] >> 32))) << 32;
  });
}

inline int op_testp(Ctx& c,
                    const Inst& i) {  // imm: finite infinite number notanumber normal subnormal
  u32 r = 0;
  for (int l = 0; l < 32; l++) {
    double x;
    bool sub, zero;
    if (i.imm2 == 64) {
      u64 b = reg<u64>(c, i.o[1])[l];
      x = as_double(b);
      sub = ((b >> 52) & 0x7ff) == 0, zero = (b << 1) == 0;
    } else {
      u32 b = reg<u32>(c, i.o[1])[l];
      x = as_float(b);
      sub = ((b >> 23) & 0xff) == 0, zero = (b << 1) == 0;
    }
    bool nan = x != x, inf = std::isinf(x), v = false;
    switch (i.imm) {
      case 0:
        v = !nan && !inf;
        break;
      case 1:
        v = inf;
        break;
      case 2:
        v = !nan;
        break;
      case 3:
        v = nan;
        break;
      case 4:
        v = !nan && !inf && !sub;
        break;
      case 5:
        v = sub && !zero;
        break;
    }
    r |= u32(v) << l;
  }
  set_pred(c, i.o[0], r);
  return kGo;
}

}  // namespace emu::EMU_ISA
