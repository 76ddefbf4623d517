// Integer, bit and predicate operations by name.
#include "ops_integer.h"

namespace emu::EMU_ISA {

template <class U, class S>
void integer_type(std::vector<Named>& t, const char* bits) {
  auto name = [&](const char* op, char kind) { return std::string(op) + "." + kind + bits; };
  EMU_OP(name("add", 'u'), op2<U, U, U, [](U a, U b) { return U(a + b); }>);
  EMU_OP(name("sub", 'u'), op2<U, U, U, [](U a, U b) { return U(a - b); }>);
  EMU_OP(name("mul.lo", 'u'), op2<U, U, U, [](U a, U b) { return U(u64(a) * b); }>);
  EMU_OP(name("mad.lo", 'u'), op3<U, U, U, U, [](U a, U b, U d) { return U(u64(a) * b + d); }>);
  EMU_OP(name("mul.hi", 'u'), op2<U, U, U, [](U a, U b) { return mul_hi<U>(a, b); }>);
  EMU_OP(name("mul.hi", 's'), op2<S, S, S, [](S a, S b) { return mul_hi<S>(a, b); }>);
  EMU_OP(name("mad.hi", 'u'),
         op3<U, U, U, U, [](U a, U b, U d) { return U(mul_hi<U>(a, b) + d); }>);
  EMU_OP(name("mad.hi", 's'),
         op3<S, S, S, S, [](S a, S b, S d) { return S(U(mul_hi<S>(a, b)) + U(d)); }>);
  EMU_OP(name("div", 'u'), op2<U, U, U, [](U a, U b) { return div_int<U>(a, b); }>);
  EMU_OP(name("div", 's'), op2<S, S, S, [](S a, S b) { return div_int<S>(a, b); }>);
  EMU_OP(name("rem", 'u'), op2<U, U, U, [](U a, U b) { return rem_int<U>(a, b); }>);
  EMU_OP(name("rem", 's'), op2<S, S, S, [](S a, S b) { return rem_int<S>(a, b); }>);
  EMU_OP(name("min", 'u'), op2<U, U, U, [](U a, U b) { return a < b ? a : b; }>);
  EMU_OP(name("min", 's'), op2<S, S, S, [](S a, S b) { return a < b ? a : b; }>);
  EMU_OP(name("max", 'u'), op2<U, U, U, [](U a, U b) { return b < a ? a : b; }>);
  EMU_OP(name("max", 's'), op2<S, S, S, [](S a, S b) { return b < a ? a : b; }>);
  EMU_OP(name("abs", 's'), op1<S, S, [](S a) { return a < 0 ? S(0 - U(a)) : a; }>);
  EMU_OP(name("neg", 's'), op1<S, S, [](S a) { return S(0 - U(a)); }>);
  EMU_OP(name("and", 'b'), op2<U, U, U, [](U a, U b) { return U(a & b); }>);
  EMU_OP(name("or", 'b'), op2<U, U, U, [](U a, U b) { return U(a | b); }>);
  EMU_OP(name("xor", 'b'), op2<U, U, U, [](U a, U b) { return U(a ^ b); }>);
  EMU_OP(name("not", 'b'), op1<U, U, [](U a) { return U(~a); }>);
  EMU_OP(name("cnot", 'b'), op1<U, U, [](U a) { return U(a == 0); }>);
  EMU_OP(name("shl", 'b'), op2<U, U, u32, [](U a, u32 n) { return shl<U>(a, n); }>);
  EMU_OP(name("shr", 'u'), op2<U, U, u32, [](U a, u32 n) { return shr<U>(a, n); }>);
  EMU_OP(name("shr", 's'), op2<S, S, u32, [](S a, u32 n) { return shr<S>(a, n); }>);
  EMU_OP(name("sad", 'u'),
         op3<U, U, U, U, [](U a, U b, U d) { return U((a < b ? b - a : a - b) + d); }>);
  EMU_OP(name("sad", 's'),
         op3<S, S, S, U, [](S a, S b, U d) { return S((a < b ? U(b) - U(a) : U(a) - U(b)) + d); }>);
#define SETP(cmp, k)                                      \
  EMU_OP(name("setp." cmp, 'u'), (op_setp<U, k, false>)); \
  EMU_OP(name("setp." cmp, 's'), (op_setp<S, k, false>))
  SETP("eq", 0);
  SETP("ne", 1);
  SETP("lt", 2);
  SETP("le", 3);
  SETP("gt", 4);
  SETP("ge", 5);
#undef SETP
}

void integer_ops(std::vector<Named>& t) {
  integer_type<u16, s16>(t, "16");
  integer_type<u32, s32>(t, "32");
  integer_type<u64, s64>(t, "64");
  EMU_OP("mul.wide.u16", op2<u32, u16, u16, [](u16 a, u16 b) { return u32(a) * b; }>);
  EMU_OP("mul.wide.s16", op2<s32, s16, s16, [](s16 a, s16 b) { return s32(a) * b; }>);
  EMU_OP("mul.wide.u32", op2<u64, u32, u32, [](u32 a, u32 b) { return u64(a) * b; }>);
  EMU_OP("mul.wide.s32", op2<s64, s32, s32, [](s32 a, s32 b) { return s64(a) * b; }>);
  EMU_OP("mad.wide.u16",
         op3<u32, u16, u16, u32, [](u16 a, u16 b, u32 d) { return u32(a) * b + d; }>);
  EMU_OP("mad.wide.s16",
         op3<u32, s16, s16, u32, [](s16 a, s16 b, u32 d) { return u32(s32(a) * b) + d; }>);
  EMU_OP("mad.wide.u32",
         op3<u64, u32, u32, u64, [](u32 a, u32 b, u64 d) { return u64(a) * b + d; }>);
  EMU_OP("mad.wide.s32",
         op3<u64, s32, s32, u64, [](s32 a, s32 b, u64 d) { return u64(s64(a) * b) + d; }>);
  EMU_OP("mul24.lo.u32",
         op2<u32, u32, u32, [](u32 a, u32 b) { return u32(u64(a & 0xffffff) * (b & 0xffffff)); }>);
  EMU_OP("mul24.lo.s32", op2<u32, u32, u32, [](u32 a, u32 b) {
           return u32(s64(s32(a << 8) >> 8) * (s32(b << 8) >> 8));
         }>);
  EMU_OP("bfe.u32", op3<u32, u32, u32, u32, [](u32 a, u32 b, u32 d) { return bfe<u32>(a, b, d); }>);
  EMU_OP("bfe.s32", op3<s32, s32, u32, u32, [](s32 a, u32 b, u32 d) { return bfe<s32>(a, b, d); }>);
  EMU_OP("bfe.u64", op3<u64, u64, u32, u32, [](u64 a, u32 b, u32 d) { return bfe<u64>(a, b, d); }>);
  EMU_OP("bfe.s64", op3<s64, s64, u32, u32, [](s64 a, u32 b, u32 d) { return bfe<s64>(a, b, d); }>);
  EMU_OP("bfi.b32", op4<u32, u32, u32, u32, u32,
                        [](u32 a, u32 b, u32 d, u32 e) { return bfi<u32>(a, b, d, e); }>);
  EMU_OP("bfi.b64", op4<u64, u64, u64, u32, u32,
                        [](u64 a, u64 b, u32 d, u32 e) { return bfi<u64>(a, b, d, e); }>);
  EMU_OP("bfind.u32", op1<u32, u32, [](u32 a) { return bfind<u32>(a, false); }>);
  EMU_OP("bfind.s32", op1<u32, s32, [](s32 a) { return bfind<s32>(a, false); }>);
  EMU_OP("bfind.u64", op1<u32, u64, [](u64 a) { return bfind<u64>(a, false); }>);
  EMU_OP("bfind.s64", op1<u32, s64, [](s64 a) { return bfind<s64>(a, false); }>);
  EMU_OP("bfind.shiftamt.u32", op1<u32, u32, [](u32 a) { return bfind<u32>(a, true); }>);
  EMU_OP("bfind.shiftamt.s32", op1<u32, s32, [](s32 a) { return bfind<s32>(a, true); }>);
  EMU_OP("bfind.shiftamt.u64", op1<u32, u64, [](u64 a) { return bfind<u64>(a, true); }>);
  EMU_OP("bfind.shiftamt.s64", op1<u32, s64, [](s64 a) { return bfind<s64>(a, true); }>);
  EMU_OP("popc.b32", op1<u32, u32, [](u32 a) { return u32(std::popcount(a)); }>);
  EMU_OP("popc.b64", op1<u32, u64, [](u64 a) { return u32(std::popcount(a)); }>);
  EMU_OP("clz.b32", op1<u32, u32, [](u32 a) { return u32(std::countl_zero(a)); }>);
  EMU_OP("clz.b64", op1<u32, u64, [](u64 a) { return u32(std::countl_zero(a)); }>);
  EMU_OP("brev.b32", op1<u32, u32, [](u32 a) { return brev(a); }>);
  EMU_OP("brev.b64", op1<u64, u64, [](u64 a) { return brev(a); }>);
  EMU_OP("shf.l.wrap.b32",
         op3<u32, u32, u32, u32, [](u32 a, u32 b, u32 n) { return funnel_left(a, b, n & 31); }>);
  EMU_OP("shf.l.clamp.b32", op3<u32, u32, u32, u32, [](u32 a, u32 b, u32 n) {
           return funnel_left(a, b, n > 32 ? 32 : n);
         }>);
  EMU_OP("shf.r.wrap.b32",
         op3<u32, u32, u32, u32, [](u32 a, u32 b, u32 n) { return funnel_right(a, b, n & 31); }>);
  EMU_OP("shf.r.clamp.b32", op3<u32, u32, u32, u32, [](u32 a, u32 b, u32 n) {
           return funnel_right(a, b, n > 32 ? 32 : n);
         }>);
  EMU_OP("lop3.b32", op_lop3);
  EMU_OP("lop3.bool.b32", op_lop3_bool);
  EMU_OP("prmt.b32", op3<u32, u32, u32, u32, [](u32 a, u32 b, u32 s) { return prmt(a, b, s); }>);
  EMU_OP("prmt.b32.f4e", op3<u32, u32, u32, u32, prmt_mode<0>>);
  EMU_OP("prmt.b32.b4e", op3<u32, u32, u32, u32, prmt_mode<1>>);
  EMU_OP("prmt.b32.rc8", op3<u32, u32, u32, u32, prmt_mode<2>>);
  EMU_OP("prmt.b32.ecl", op3<u32, u32, u32, u32, prmt_mode<3>>);
  EMU_OP("prmt.b32.ecr", op3<u32, u32, u32, u32, prmt_mode<4>>);
  EMU_OP("prmt.b32.rc16", op3<u32, u32, u32, u32, prmt_mode<5>>);
#define DP4A(ta, tb, sa, sb)                                                                     \
  EMU_OP(                                                                                        \
      "dp4a." ta "." tb,                                                                         \
      op3<u32, u32, u32, u32, [](u32 a, u32 b, u32 d) { return u32(dot4(a, b, sa, sb)) + d; }>); \
  EMU_OP("dp2a.lo." ta "." tb, op3<u32, u32, u32, u32, [](u32 a, u32 b, u32 d) {                 \
           return u32(dot2(a, b, sa, sb, false)) + d;                                            \
         }>);                                                                                    \
  EMU_OP("dp2a.hi." ta "." tb, op3<u32, u32, u32, u32, [](u32 a, u32 b, u32 d) {                 \
           return u32(dot2(a, b, sa, sb, true)) + d;                                             \
         }>)
  DP4A("u32", "u32", false, false);
  DP4A("u32", "s32", false, true);
  DP4A("s32", "u32", true, false);
  DP4A("s32", "s32", true, true);
#undef DP4A
  EMU_OP("add.sat.s32", op2<s32, s32, s32, [](s32 a, s32 b) {
           s64 r = s64(a) + b;
           return s32(r > 0x7fffffff ? 0x7fffffff : r < -0x80000000ll ? -0x80000000ll : r);
         }>);
  EMU_OP("sub.sat.s32", op2<s32, s32, s32, [](s32 a, s32 b) {
           s64 r = s64(a) - b;
           return s32(r > 0x7fffffff ? 0x7fffffff : r < -0x80000000ll ? -0x80000000ll : r);
         }>);
  EMU_OP("add.u16x2", op2<u32, u32, u32, [](u32 a, u32 b) {
           return ((a + b) & 0xffff) | ((a & 0xffff0000u) + (b & 0xffff0000u));
         }>);
#define MM2(name, T, cmp)                                               \
  EMU_OP(name, op2<u32, u32, u32, [](u32 a, u32 b) {                    \
           u32 lo = u16(T(a) cmp T(b) ? a : b);                         \
           u32 hi = u16(T(a >> 16) cmp T(b >> 16) ? a >> 16 : b >> 16); \
           return lo | hi << 16;                                        \
         }>)
  MM2("min.u16x2", u16, <);
  MM2("min.s16x2", s16, <);
  MM2("max.u16x2", u16, >);
  MM2("max.s16x2", s16, >);
#undef MM2
  EMU_OP("addc.32", op_add_carry<u32>);
  EMU_OP("addc.64", op_add_carry<u64>);
  EMU_OP("selp.32", op_selp<u32>);
  EMU_OP("selp.64", op_selp<u64>);
  EMU_OP("set.pred", op_pred_to_reg);
  EMU_OP("mov.pred", op_pred<0>);
  EMU_OP("and.pred", op_pred<1>);
  EMU_OP("or.pred", op_pred<2>);
  EMU_OP("xor.pred", op_pred<3>);
  EMU_OP("not.pred", op_pred<4>);
  EMU_OP("slct.32.s32",
         op3<u32, u32, u32, s32, [](u32 a, u32 b, s32 d) { return d >= 0 ? a : b; }>);
  EMU_OP("slct.64.s32",
         op3<u64, u64, u64, s32, [](u64 a, u64 b, s32 d) { return d >= 0 ? a : b; }>);
  EMU_OP("slct.32.f32",
         op3<u32, u32, u32, float, [](u32 a, u32 b, float d) { return d >= 0 ? a : b; }>);
  EMU_OP("slct.64.f32",
         op3<u64, u64, u64, float, [](u64 a, u64 b, float d) { return d >= 0 ? a : b; }>);
  EMU_OP("mov.32", op_mov<u32>);
  EMU_OP("mov.64", op_mov<u64>);
  EMU_OP("pack.32", op_pack_32);
  EMU_OP("pack.64", op_pack_64);
  EMU_OP("pack.bytes", op_pack_bytes);
  EMU_OP("pack.64.16", op_pack_64_16);
  EMU_OP("extract.32", op_extract<u32>);
  EMU_OP("extract.64", op_extract<u64>);
  EMU_OP("nop", op_nop);
  EMU_OP("bmsk.clamp.b32", op2<u32, u32, u32, [](u32 a, u32 b) {
           if (a >= 32) return 0u;
           u32 n = std::min(b, 32 - a);
           return n == 0 ? 0u : (n >= 32 ? kFull : ((1u << n) - 1)) << a;
         }>);
  EMU_OP("bmsk.wrap.b32", op2<u32, u32, u32, [](u32 a, u32 b) {
           a &= 31;
           b &= 31;
           return ((1u << b) - 1) << a;
         }>);
  EMU_OP("fns.b32", op3<u32, u32, u32, s32, fns>);
}

}  // namespace emu::EMU_ISA
