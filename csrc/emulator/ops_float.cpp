// Floating-point operations and conversions by name.
#include "ops_float.h"

namespace emu::EMU_ISA {

#define EMU_ROUNDED(name, type, ...)                            \
  EMU_OP(name ".rn" type, __VA_ARGS__);                         \
  EMU_OP(name ".rz" type, rounded<__VA_ARGS__, FE_TOWARDZERO>); \
  EMU_OP(name ".rm" type, rounded<__VA_ARGS__, FE_DOWNWARD>);   \
  EMU_OP(name ".rp" type, rounded<__VA_ARGS__, FE_UPWARD>)
#define EMU_FTZ_SAT(name, H, f)                       \
  EMU_ROUNDED(name, ".f32", (H<f, false, false>));    \
  EMU_ROUNDED(name, ".ftz.f32", (H<f, true, false>)); \
  EMU_ROUNDED(name, ".sat.f32", (H<f, false, true>)); \
  EMU_ROUNDED(name, ".ftz.sat.f32", (H<f, true, true>))
#define EMU_FTZ(name, H, f)                  \
  EMU_OP(name ".f32", (H<f, false, false>)); \
  EMU_OP(name ".ftz.f32", (H<f, true, false>))

template <class H, bool Two>
void half_type(std::vector<Named>& t, const std::string& type) {
#define H3(name, N, F)                                                   \
  EMU_OP(name "." + type, (op16<H, N, Two, false, false, false, F>));    \
  EMU_OP(name ".ftz." + type, (op16<H, N, Two, true, false, false, F>)); \
  EMU_OP(name ".sat." + type, (op16<H, N, Two, false, true, false, F>)); \
  EMU_OP(name ".ftz.sat." + type, (op16<H, N, Two, true, true, false, F>))
  H3("add", 2, h_add<H>);
  H3("sub", 2, h_sub<H>);
  H3("mul", 2, h_mul<H>);
  H3("fma", 3, h_fma<H>);
#undef H3
  EMU_OP("fma.relu." + type, (op16<H, 3, Two, false, false, true, h_fma<H>>));
  EMU_OP("fma.ftz.relu." + type, (op16<H, 3, Two, true, false, true, h_fma<H>>));
#define H1(name, N, F)                                                \
  EMU_OP(name "." + type, (op16<H, N, Two, false, false, false, F>)); \
  EMU_OP(name ".ftz." + type, (op16<H, N, Two, true, false, false, F>))
  H1("neg", 1, h_neg);
  H1("abs", 1, h_abs);
  H1("min", 2, (h_minmax<H, false, false>));
  H1("max", 2, (h_minmax<H, true, false>));
  H1("min.nan", 2, (h_minmax<H, false, true>));
  H1("max.nan", 2, (h_minmax<H, true, true>));
  H1("ex2", 1, [](u32 a) { return H::down(f_ex2(H::up(a))); });
  H1("tanh", 1, [](u32 a) { return H::down(f_tanh(H::up(a))); });
#undef H1
}

constexpr const char* kCompare[14] = {"eq",  "ne",  "lt",  "le",  "gt",  "ge",  "equ",
                                      "neu", "ltu", "leu", "gtu", "geu", "num", "nan"};
template <u32 K>
void float_comparison(std::vector<Named>& t) {
  std::string k = kCompare[K];
  EMU_OP("setp." + k + ".f32", (op_setp<float, K, false>));
  EMU_OP("setp." + k + ".ftz.f32", (op_setp<float, K, true>));
  EMU_OP("setp." + k + ".f64", (op_setp<double, K, false>));
  EMU_OP("setp." + k + ".f16", (op_setp16<Half, false, K, false>));
  EMU_OP("setp." + k + ".ftz.f16", (op_setp16<Half, false, K, true>));
  EMU_OP("setp." + k + ".f16x2", (op_setp16<Half, true, K, false>));
  EMU_OP("setp." + k + ".ftz.f16x2", (op_setp16<Half, true, K, true>));
  EMU_OP("setp." + k + ".bf16", (op_setp16<Brain, false, K, false>));
  EMU_OP("setp." + k + ".bf16x2", (op_setp16<Brain, true, K, false>));
  EMU_OP("set." + k + ".f16", (op_set16<Half, false, K, false>));
  EMU_OP("set." + k + ".ftz.f16", (op_set16<Half, false, K, true>));
  EMU_OP("set." + k + ".f16x2", (op_set16<Half, true, K, false>));
  EMU_OP("set." + k + ".ftz.f16x2", (op_set16<Half, true, K, true>));
  EMU_OP("set." + k + ".bf16", (op_set16<Brain, false, K, false>));
  EMU_OP("set." + k + ".bf16x2", (op_set16<Brain, true, K, false>));
}

template <class D>
void int_conversions(std::vector<Named>& t, const std::string& d) {
  std::string to = "cvt." + d + ".";
  EMU_OP(to + "u8", (op_int_to_int<D, u8>));
  EMU_OP(to + "s8", (op_int_to_int<D, s8>));
  EMU_OP(to + "u16", (op_int_to_int<D, u16>));
  EMU_OP(to + "s16", (op_int_to_int<D, s16>));
  EMU_OP(to + "u32", (op_int_to_int<D, u32>));
  EMU_OP(to + "s32", (op_int_to_int<D, s32>));
  EMU_OP(to + "u64", (op_int_to_int<D, u64>));
  EMU_OP(to + "s64", (op_int_to_int<D, s64>));
  EMU_OP(to + "f32", op_f32_to_int<D>);
  EMU_OP(to + "f64", op_f64_to_int<D>);
  EMU_OP(to + "f16", (op_half_to_int<D, Half>));
  EMU_OP(to + "bf16", (op_half_to_int<D, Brain>));
  std::string from = "." + d;
  EMU_OP("cvt.f32" + from, op_int_to_f32<D>);
  EMU_OP("cvt.f64" + from, op_int_to_f64<D>);
  EMU_OP("cvt.f16" + from, (op_int_to_half<D, false>));
  EMU_OP("cvt.bf16" + from, (op_int_to_half<D, true>));
}

void float_ops(std::vector<Named>& t) {
  EMU_FTZ_SAT("add", op2f, f_add);
  EMU_FTZ_SAT("sub", op2f, f_sub);
  EMU_FTZ_SAT("mul", op2f, f_mul);
  EMU_FTZ_SAT("fma", op3f, f_fma);
  EMU_ROUNDED("div", ".f32", (op2f<f_div, false, false>));
  EMU_ROUNDED("div", ".ftz.f32", (op2f<f_div, true, false>));
  EMU_ROUNDED("rcp", ".f32", (op1f<f_rcp, false, false>));
  EMU_ROUNDED("rcp", ".ftz.f32", (op1f<f_rcp, true, false>));
  EMU_ROUNDED("sqrt", ".f32", (op1f<f_sqrt, false, false>));
  EMU_ROUNDED("sqrt", ".ftz.f32", (op1f<f_sqrt, true, false>));
  EMU_FTZ("div.full", op2f, f_div);
  EMU_FTZ("div.approx", op2f, f_div_approx);
  EMU_FTZ("rcp.approx", op1f, f_rcp);
  EMU_FTZ("sqrt.approx", op1f, f_sqrt);
  EMU_FTZ("rsqrt.approx", op1f, f_rsqrt);
  EMU_FTZ("ex2.approx", op1f, f_ex2);
  EMU_FTZ("lg2.approx", op1f, f_lg2);
  EMU_FTZ("sin.approx", op1f, f_sin);
  EMU_FTZ("cos.approx", op1f, f_cos);
  EMU_FTZ("tanh.approx", op1f, f_tanh);
  EMU_FTZ("min", op2f, f_min<false>);
  EMU_FTZ("max", op2f, f_max<false>);
  EMU_FTZ("min.nan", op2f, f_min<true>);
  EMU_FTZ("max.nan", op2f, f_max<true>);
  EMU_FTZ("min.xorsign.abs", op2f, (f_minmax_xor<false, false>));
  EMU_FTZ("max.xorsign.abs", op2f, (f_minmax_xor<true, false>));
  EMU_FTZ("min.nan.xorsign.abs", op2f, (f_minmax_xor<false, true>));
  EMU_FTZ("max.nan.xorsign.abs", op2f, (f_minmax_xor<true, true>));
  EMU_FTZ("min3", op3f,
          [](float a, float b, float d) { return f_min<false>(f_min<false>(a, b), d); });
  EMU_FTZ("max3", op3f,
          [](float a, float b, float d) { return f_max<false>(f_max<false>(a, b), d); });
  EMU_FTZ("min3.nan", op3f,
          [](float a, float b, float d) { return f_min<true>(f_min<true>(a, b), d); });
  EMU_FTZ("max3.nan", op3f,
          [](float a, float b, float d) { return f_max<true>(f_max<true>(a, b), d); });
  EMU_FTZ("neg", op1f, [](float a) { return as_float(as_bits(a) ^ 0x80000000u); });
  EMU_FTZ("abs", op1f, [](float a) { return as_float(as_bits(a) & 0x7fffffffu); });
  EMU_OP("copysign.f32",
         op2<u32, u32, u32, [](u32 a, u32 b) { return (a & 0x80000000u) | (b & 0x7fffffffu); }>);
  EMU_OP("copysign.f64",
         op2<u64, u64, u64, [](u64 a, u64 b) { return (a & (1ull << 63)) | (b & ~(1ull << 63)); }>);
  EMU_OP("testp", op_testp);

  EMU_ROUNDED("add", ".f64",
              (op2<double, double, double, [](double a, double b) { return a + b; }>));
  EMU_ROUNDED("sub", ".f64",
              (op2<double, double, double, [](double a, double b) { return a - b; }>));
  EMU_ROUNDED("mul", ".f64",
              (op2<double, double, double, [](double a, double b) { return a * b; }>));
  EMU_ROUNDED("div", ".f64",
              (op2<double, double, double, [](double a, double b) { return a / b; }>));
  EMU_ROUNDED("fma", ".f64", (op3<double, double, double, double, d_fma>));
  EMU_ROUNDED("rcp", ".f64", (op1<double, double, [](double a) { return 1.0 / a; }>));
  EMU_ROUNDED("sqrt", ".f64", (op1<double, double, [](double a) { return __builtin_sqrt(a); }>));
  // 20 bits of the result, the rest zero, as PTX describes it
  EMU_OP("rcp.approx.ftz.f64", op1<double, double, [](double a) {
           return as_double(as_bits(1.0 / a) & 0xffffffff00000000ull);
         }>);
  EMU_OP("rsqrt.approx.f64", op1<double, double, [](double a) { return 1.0 / __builtin_sqrt(a); }>);
  EMU_OP("rsqrt.approx.ftz.f64", op1<double, double, [](double a) {
           return as_double(as_bits(1.0 / __builtin_sqrt(a)) & 0xffffffff00000000ull);
         }>);
  EMU_OP("min.f64", op2<double, double, double, d_minmax<false>>);
  EMU_OP("max.f64", op2<double, double, double, d_minmax<true>>);
  EMU_OP("neg.f64", op1<u64, u64, [](u64 a) { return a ^ (1ull << 63); }>);
  EMU_OP("abs.f64", op1<u64, u64, [](u64 a) { return a & ~(1ull << 63); }>);
  EMU_ROUNDED("add", ".f32x2", (op_f32x2<true, false>));
  EMU_ROUNDED("mul", ".f32x2", (op_f32x2<false, true>));
  EMU_ROUNDED("fma", ".f32x2", (op_f32x2<true, true>));
  EMU_ROUNDED("sub", ".f32x2", (op_f32x2<false, false>));

  half_type<Half, false>(t, "f16");
  half_type<Half, true>(t, "f16x2");
  half_type<Brain, false>(t, "bf16");
  half_type<Brain, true>(t, "bf16x2");
  [&]<u32... K>(std::integer_sequence<u32, K...>) {
    (float_comparison<K>(t), ...);
  }(std::make_integer_sequence<u32, 14>());

  int_conversions<u8>(t, "u8");
  int_conversions<s8>(t, "s8");
  int_conversions<u16>(t, "u16");
  int_conversions<s16>(t, "s16");
  int_conversions<u32>(t, "u32");
  int_conversions<s32>(t, "s32");
  int_conversions<u64>(t, "u64");
  int_conversions<s64>(t, "s64");
  EMU_OP("cvt.f32.f32", op_f32_to_f32);
  EMU_OP("cvt.f64.f64", op_f64_to_f64);
  EMU_OP("cvt.f64.f32", op_f32_to_f64);
  EMU_OP("cvt.f32.f64", op_f64_to_f32);
  EMU_OP("cvt.f16.f32", op_f32_to_half<false>);
  EMU_OP("cvt.bf16.f32", op_f32_to_half<true>);
  EMU_OP("cvt.f16.f64", op_f64_to_half<false>);
  EMU_OP("cvt.bf16.f64", op_f64_to_half<true>);
  EMU_OP("cvt.f32.f16", op_half_to_f32<false>);
  EMU_OP("cvt.f32.bf16", op_half_to_f32<true>);
  EMU_OP("cvt.f64.f16", op_half_to_f64<false>);
  EMU_OP("cvt.f64.bf16", op_half_to_f64<true>);
  EMU_OP("cvt.f16.f16", (op_half_to_half<false, false>));
  EMU_OP("cvt.bf16.bf16", (op_half_to_half<true, true>));
  EMU_OP("cvt.bf16.f16", (op_half_to_half<false, true>));
  EMU_OP("cvt.f16.bf16", (op_half_to_half<true, false>));
  EMU_OP("cvt.f16x2.f32", op_f32_to_half2<false>);
  EMU_OP("cvt.bf16x2.f32", op_f32_to_half2<true>);
  EMU_OP("cvt.tf32.f32", op_f32_to_tf32);
  EMU_OP("cvt.e4m3x2.f32", op_f32_to_fp8x2<false>);
  EMU_OP("cvt.e5m2x2.f32", op_f32_to_fp8x2<true>);
  EMU_OP("cvt.e4m3x2.f16x2", (op_half2_to_fp8x2<false, false>));
  EMU_OP("cvt.e5m2x2.f16x2", (op_half2_to_fp8x2<true, false>));
  EMU_OP("cvt.e4m3x2.bf16x2", (op_half2_to_fp8x2<false, true>));
  EMU_OP("cvt.e5m2x2.bf16x2", (op_half2_to_fp8x2<true, true>));
  EMU_OP("cvt.f16x2.e4m3x2", op_fp8x2_to_half2<false>);
  EMU_OP("cvt.f16x2.e5m2x2", op_fp8x2_to_half2<true>);
  EMU_OP("cvt.e2m1x2.f32", op_f32_to_small<0>);
  EMU_OP("cvt.f16x2.e2m1x2", op_small_to_half2<0>);
  EMU_OP("cvt.e2m3x2.f32", op_f32_to_small<1>);
  EMU_OP("cvt.f16x2.e2m3x2", op_small_to_half2<1>);
  EMU_OP("cvt.e3m2x2.f32", op_f32_to_small<2>);
  EMU_OP("cvt.f16x2.e3m2x2", op_small_to_half2<2>);
  EMU_OP("cvt.ue8m0x2.f32", op_f32_to_ue8m0);
  EMU_OP("cvt.bf16x2.ue8m0x2", op_ue8m0_to_bf16);
}

}  // namespace emu::EMU_ISA
