// Integer, bit, predicate and select operations.
#pragma once

#include "core.h"

namespace emu::EMU_ISA {

template <class T>
inline T div_int(T a, T b) {
  if (b == 0) return T(-1);  // PTX leaves it open; this is what the hardware gives for unsigned
  if constexpr (std::is_signed_v<T>)
    if (b == T(-1)) return T(0 - std::make_unsigned_t<T>(a));
  return T(a / b);
}
template <class T>
inline T rem_int(T a, T b) {
  if (b == 0) return a;
  if constexpr (std::is_signed_v<T>)
    if (b == T(-1)) return 0;
  return T(a % b);
}
template <class T>
inline T mul_hi(T a, T b) {
  if constexpr (sizeof(T) == 8) {
    if constexpr (std::is_signed_v<T>)
      return T((__int128(a) * b) >> 64);
    else
      return T(((unsigned __int128)a * b) >> 64);
  } else {
    using W = std::conditional_t<std::is_signed_v<T>, s64, u64>;
    return T((W(a) * W(b)) >> (8 * sizeof(T)));
  }
}
template <class T>
inline T shl(T a, u32 n) {
  return n >= 8 * sizeof(T) ? T(0) : T(a << n);
}
template <class T>
inline T shr(T a, u32 n) {
  constexpr u32 w = 8 * sizeof(T);
  if constexpr (std::is_signed_v<T>)
    return T(a >> (n >= w ? w - 1 : n));
  else
    return n >= w ? T(0) : T(a >> n);
}
template <class T>
inline T bfe(T a, u32 b, u32 c) {
  constexpr u32 w = 8 * sizeof(T);
  u32 pos = b & 0xff, len = c & 0xff;
  if (len == 0) return 0;
  u32 top = std::min(pos + len - 1, w - 1);
  T fill = 0;
  if constexpr (std::is_signed_v<T>) fill = (a >> top) & 1 ? T(-1) : T(0);
  std::make_unsigned_t<T> u = std::make_unsigned_t<T>(a);
  if (pos >= w) return fill;
  u >>= pos;
  if (len < w) {
    std::make_unsigned_t<T> keep = (std::make_unsigned_t<T>(1) << len) - 1;
    if (pos + len > w) keep = std::make_unsigned_t<T>(-1) >> pos;
    u = (u & keep) | (std::make_unsigned_t<T>(fill) & ~keep);
  } else if (pos) {
    std::make_unsigned_t<T> keep = std::make_unsigned_t<T>(-1) >> pos;
    u = (u & keep) | (std::make_unsigned_t<T>(fill) & ~keep);
  }
  return T(u);
}
template <class T>
inline T bfi(T a, T b, u32 c, u32 d) {
  constexpr u32 w = 8 * sizeof(T);
  u32 pos = c & 0xff, len = d & 0xff;
  if (len == 0 || pos >= w) return b;
  T ones = len >= w ? T(-1) : T((T(1) << len) - 1);
  T keep = T(ones << pos);
  return T((b & ~keep) | ((a << pos) & keep));
}
template <class T>
inline u32 bfind(T a, bool shift) {
  using U = std::make_unsigned_t<T>;
  U u = U(a);
  if constexpr (std::is_signed_v<T>)
    if (a < 0) u = ~u;
  if (u == 0) return kFull;
  u32 msb = 8 * sizeof(T) - 1 - std::countl_zero(u);
  return shift ? 8 * sizeof(T) - 1 - msb : msb;
}
template <class T>
inline T brev(T a) {
  T r = 0;
  for (u32 k = 0; k < 8 * sizeof(T); k++) r = T(r | (((a >> k) & 1) << (8 * sizeof(T) - 1 - k)));
  return r;
}
inline u32 funnel_left(u32 a, u32 b, u32 n) {  // n in 0 .. 32
  u64 x = (u64(b) << 32) | a;
  return u32((x << n) >> 32);
}
inline u32 funnel_right(u32 a, u32 b, u32 n) {
  u64 x = (u64(b) << 32) | a;
  return u32(x >> n);
}

inline u32 lop3(u32 a, u32 b, u32 c, u32 t) {
  u32 r = 0;
  for (int k = 0; k < 8; k++)
    r |= (t >> k) & 1 ? (k & 4 ? a : ~a) & (k & 2 ? b : ~b) & (k & 1 ? c : ~c) : 0;
  return r;
}
// All lanes at once: the table's eight bits spread to words, then chosen by c, b and a in turn.
inline int op_lop3(Ctx& c, const Inst& i) {
  const u32 *x = reg<u32>(c, i.o[1]), *y = reg<u32>(c, i.o[2]), *z = reg<u32>(c, i.o[3]);
  u32 low[4], flip[4];
  for (int k = 0; k < 4; k++) {
    low[k] = (i.imm >> (2 * k)) & 1 ? kFull : 0;
    flip[k] = low[k] ^ ((i.imm >> (2 * k + 1)) & 1 ? kFull : 0);
  }
  const u32 p0 = low[0], p1 = low[1], p2 = low[2], p3 = low[3];
  const u32 q0 = flip[0], q1 = flip[1], q2 = flip[2], q3 = flip[3];
  return map_lanes<u32>(c, i.o[0], [=](int l) {
    u32 c0 = p0 ^ (z[l] & q0), c1 = p1 ^ (z[l] & q1), c2 = p2 ^ (z[l] & q2), c3 = p3 ^ (z[l] & q3);
    u32 b0 = c0 ^ (y[l] & (c0 ^ c1)), b1 = c2 ^ (y[l] & (c2 ^ c3));
    return b0 ^ (x[l] & (b0 ^ b1));
  });
}
// lop3.BoolOp: the result's truth combined with a predicate
inline int op_lop3_bool(Ctx& c, const Inst& i) {
  const u32 *a = reg<u32>(c, i.o[1]), *b = reg<u32>(c, i.o[2]), *e = reg<u32>(c, i.o[3]);
  u32 t[32], q = get_pred(c, i.o[5]) ^ (i.imm & 0x200 ? kFull : 0), some = 0;
  for (int l = 0; l < 32; l++) {
    t[l] = lop3(a[l], b[l], e[l], u32(i.imm) & 255);
    some |= u32(t[l] != 0) << l;
  }
  if (i.o[0] >= 0) blend(reg<u32>(c, i.o[0]), t, c.mask);
  set_pred(c, i.o[4], i.imm & 0x100 ? some & q : some | q);
  return kGo;
}

inline u32 prmt(u32 a, u32 b, u32 s) {
  u64 x = (u64(b) << 32) | a;
  u32 r = 0;
  for (int k = 0; k < 4; k++) {
    u32 n = (s >> (4 * k)) & 15, byte = u32(x >> (8 * (n & 7))) & 0xff;
    if (n & 8) byte = byte & 0x80 ? 0xff : 0;
    r |= byte << (8 * k);
  }
  return r;
}
template <int Mode>
inline u32 prmt_mode(u32 a, u32 b, u32 s) {
  static constexpr u8 table[6][4][4] = {
      {{3, 2, 1, 0}, {4, 3, 2, 1}, {5, 4, 3, 2}, {6, 5, 4, 3}},  // f4e
      {{5, 6, 7, 0}, {6, 7, 0, 1}, {7, 0, 1, 2}, {0, 1, 2, 3}},  // b4e
      {{0, 0, 0, 0}, {1, 1, 1, 1}, {2, 2, 2, 2}, {3, 3, 3, 3}},  // rc8
      {{3, 2, 1, 0}, {3, 2, 1, 1}, {3, 2, 2, 2}, {3, 3, 3, 3}},  // ecl
      {{0, 0, 0, 0}, {1, 1, 1, 0}, {2, 2, 1, 0}, {3, 2, 1, 0}},  // ecr
      {{1, 0, 1, 0}, {3, 2, 3, 2}, {1, 0, 1, 0}, {3, 2, 3, 2}},  // rc16
  };
  u64 x = (u64(b) << 32) | a;
  u32 r = 0;
  for (int k = 0; k < 4; k++) r |= (u32(x >> (8 * table[Mode][s & 3][k])) & 0xff) << (8 * (3 - k));
  return r;
}

inline u32 fns(u32 m, u32 base, s32 off) {
  base &= 31;
  if (off == 0) return (m >> base) & 1 ? base : kFull;
  int step = off > 0 ? 1 : -1, left = off > 0 ? off : -off;
  for (int p = int(base); p >= 0 && p < 32; p += step)
    if ((m >> p) & 1 && --left == 0) return u32(p);
  return kFull;
}

inline s32 dot4(u32 a, u32 b, bool sa, bool sb) {
  s32 r = 0;
  for (int k = 0; k < 4; k++) {
    s32 x = sa ? s32(s8(a >> (8 * k))) : s32(u8(a >> (8 * k)));
    s32 y = sb ? s32(s8(b >> (8 * k))) : s32(u8(b >> (8 * k)));
    r += x * y;
  }
  return r;
}
inline s32 dot2(u32 a, u32 b, bool sa, bool sb, bool hi) {
  s32 r = 0;
  for (int k = 0; k < 2; k++) {
    s32 x = sa ? s32(s16(a >> (16 * k))) : s32(u16(a >> (16 * k)));
    int sh = 8 * (k + (hi ? 2 : 0));
    s32 y = sb ? s32(s8(b >> sh)) : s32(u8(b >> sh));
    r = s32(u32(r) + u32(x) * u32(y));
  }
  return r;
}

template <class T>
inline bool compare(u32 k, T a, T b) {
  switch (k) {
    case 0:
      return a == b;
    case 1:
      return a != b;
    case 2:
      return a < b;
    case 3:
      return a <= b;
    case 4:
      return a > b;
    default:
      return a >= b;
  }
}
// Floating comparisons 6 .. 13: equ neu ltu leu gtu geu num nan
template <class T>
inline bool compare_float(u32 k, T a, T b) {
  bool nan = a != a || b != b;
  switch (k) {
    case 0:
      return a == b;
    case 1:
      return !nan && a != b;
    case 2:
      return a < b;
    case 3:
      return a <= b;
    case 4:
      return a > b;
    case 5:
      return a >= b;
    case 6:
      return nan || a == b;
    case 7:
      return a != b;
    case 8:
      return nan || a < b;
    case 9:
      return nan || a <= b;
    case 10:
      return nan || a > b;
    case 11:
      return nan || a >= b;
    case 12:
      return !nan;
    default:
      return nan;
  }
}

// setp: o[0] = p, o[1] = q (or -1), o[2], o[3] the operands, o[4] a predicate to combine with.
// imm: bits 0-1 how (0 none, 1 and, 2 or, 3 xor), bit 2 negates that predicate.
template <class T, u32 K, bool Ftz>
int op_setp(Ctx& c, const Inst& i) {
  const Slot<T>*a = reg<Slot<T>>(c, i.o[2]), *b = reg<Slot<T>>(c, i.o[3]);
  u32 r;
  if constexpr (std::is_floating_point_v<T>)
    r = test_lanes([=](int l) {
      if constexpr (Ftz)
        return compare_float(K, as_float(flush(u32(a[l]))), as_float(flush(u32(b[l]))));
      else
        return compare_float(K, get<T>(a[l]), get<T>(b[l]));
    });
  else
    r = test_lanes([=](int l) { return compare(K, get<T>(a[l]), get<T>(b[l])); });
  u32 no = ~r;
  if (i.imm) {
    u32 q = get_pred(c, i.o[4]) ^ (i.imm & 4 ? kFull : 0);
    switch (i.imm & 3) {
      case 1:
        r &= q, no &= q;
        break;
      case 2:
        r |= q, no |= q;
        break;
      case 3:
        r ^= q, no ^= q;
        break;
    }
  }
  set_pred(c, i.o[0], r);
  if (i.o[1] >= 0) set_pred(c, i.o[1], no);
  return kGo;
}

template <class S>
int op_selp(Ctx& c, const Inst& i) {
  const S *a = reg<S>(c, i.o[1]), *b = reg<S>(c, i.o[2]);
  u32 p = get_pred(c, i.o[3]) ^ (i.imm ? kFull : 0);
  S* d = reg<S>(c, i.o[0]);
  if (c.mask == kFull) {
#pragma GCC ivdep
    for (int l = 0; l < 32; l++) d[l] = (p >> l) & 1 ? a[l] : b[l];
  } else {
    S t[32];
    for (int l = 0; l < 32; l++) t[l] = (p >> l) & 1 ? a[l] : b[l];
    blend(d, t, c.mask);
  }
  return kGo;
}
// set: a register instead of a predicate; imm2 is the value for true
inline int op_pred_to_reg(Ctx& c, const Inst& i) {
  u32 p = get_pred(c, i.o[1]), v = u32(i.imm2);
  return map_lanes<u32>(c, i.o[0], [=](int l) { return (p >> l) & 1 ? v : 0u; });
}

template <int K>
int op_pred(Ctx& c, const Inst& i) {
  u32 a = get_pred(c, i.o[1]) ^ (i.imm & 1 ? kFull : 0);
  u32 b = get_pred(c, i.o[2]) ^ (i.imm & 2 ? kFull : 0);
  set_pred(c, i.o[0], K == 0 ? a : K == 1 ? a & b : K == 2 ? a | b : K == 3 ? a ^ b : ~a);
  return kGo;
}

// add.cc and its kin: the carry of each lane is a bit of warp->carry.
// imm: bit 0 takes the carry in, bit 1 sets it, bit 2 subtracts.
template <class T>
int op_add_carry(Ctx& c, const Inst& i) {
  const T *a = reg<T>(c, i.o[1]), *b = reg<T>(c, i.o[2]);
  T* d = reg<T>(c, i.o[0]);
  u32 out = 0;
  T t[32];
  for (int l = 0; l < 32; l++) {
    bool in = (i.imm & 1) && ((c.warp->carry >> l) & 1);
    bool carry;
    if (i.imm & 4) {
      t[l] = T(a[l] - b[l] - in);
      carry = in ? a[l] <= b[l] : a[l] < b[l];
    } else {
      t[l] = T(a[l] + b[l] + in);
      carry = in ? t[l] <= a[l] : t[l] < a[l];
    }
    out |= u32(carry) << l;
  }
  blend(d, t, c.mask);
  if (i.imm & 2) c.warp->carry = (c.warp->carry & ~c.mask) | (out & c.mask);
  return kGo;
}

inline int op_nop(Ctx&, const Inst&) { return kGo; }

// mov between registers of one size, and the packing and unpacking forms of mov.
template <class S>
int op_mov(Ctx& c, const Inst& i) {
  const S* a = reg<S>(c, i.o[1]);
  return map_lanes<S>(c, i.o[0], [=](int l) { return a[l]; });
}
inline int op_pack_32(Ctx& c, const Inst& i) {  // {16, 16} -> 32
  const u32 *a = reg<u32>(c, i.o[1]), *b = reg<u32>(c, i.o[2]);
  return map_lanes<u32>(c, i.o[0], [=](int l) { return (a[l] & 0xffff) | (b[l] << 16); });
}
inline int op_pack_64(Ctx& c, const Inst& i) {  // {32, 32} -> 64
  const u32 *a = reg<u32>(c, i.o[1]), *b = reg<u32>(c, i.o[2]);
  return map_lanes<u64>(c, i.o[0], [=](int l) { return u64(a[l]) | (u64(b[l]) << 32); });
}
inline int op_pack_bytes(Ctx& c, const Inst& i) {  // {8, 8} -> 16, {8 x 4} -> 32; n parts
  const u32* p[4];
  for (u32 k = 0; k < i.n; k++) p[k] = reg<u32>(c, i.o[1 + k]);
  return map_lanes<u32>(c, i.o[0], [=, &i](int l) {
    u32 r = 0;
    for (u32 k = 0; k < i.n; k++) r |= (p[k][l] & 0xff) << (8 * k);
    return r;
  });
}
inline int op_pack_64_16(Ctx& c, const Inst& i) {  // {16 x 4} -> 64
  const u32* p[4];
  for (u32 k = 0; k < 4; k++) p[k] = reg<u32>(c, i.o[1 + k]);
  return map_lanes<u64>(c, i.o[0], [=](int l) {
    u64 r = 0;
    for (u32 k = 0; k < 4; k++) r |= u64(p[k][l] & 0xffff) << (16 * k);
    return r;
  });
}
// Part of a register: shifted right by imm, masked by imm2. S is the source's slot.
template <class S>
int op_extract(Ctx& c, const Inst& i) {
  const S* a = reg<S>(c, i.o[1]);
  u32 shift = u32(i.imm), mask = u32(i.imm2);
  return map_lanes<u32>(c, i.o[0], [=](int l) { return u32(a[l] >> shift) & mask; });
}

}  // namespace emu::EMU_ISA
