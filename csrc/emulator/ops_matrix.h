// Matrix instructions. Products are exact; sums are fp32, rounded to nearest after each product, in
// the order of k (hardware sums several products at once and truncates: results differ in the last
// bits, and PTX leaves the order open).
#pragma once

#include "ops_sync.h"

namespace emu::EMU_ISA {

enum Element : u32 { kElF16, kElBF16, kElTF32, kElE4M3, kElE5M2, kElS8, kElU8, kElF64, kElF32 };

inline float element(Element e, u32 x) {
  switch (e) {
    case kElF16:
      return half_to_float(x & 0xffff);
    case kElBF16:
      return bf16_to_float(x & 0xffff);
    case kElTF32:
      return as_float(x & 0xffffe000u);
    case kElE4M3:
      return e4m3_to_float(x & 0xff);
    case kElE5M2:
      return e5m2_to_float(x & 0xff);
    case kElS8:
      return float(s8(x));
    default:
      return float(u8(x));
  }
}

typedef float Vec4 __attribute__((vector_size(16), aligned(4)));
typedef float Vec8 __attribute__((vector_size(32), aligned(4)));
typedef int Int4 __attribute__((vector_size(16)));

// A register of 32 lanes to floats: v[h][lane] is value h of the lane's `per` values.
inline int per_register(Element e) { return e == kElTF32 ? 1 : e <= kElBF16 ? 2 : 4; }

inline void widen(const u32* r, Element e, float (*v)[32]) {
  switch (e) {
    case kElF16:
      for (int h = 0; h < 2; h++)
#pragma GCC ivdep
        for (int l = 0; l < 32; l++) v[h][l] = half_to_float((r[l] >> (16 * h)) & 0xffff);
      break;
    case kElBF16:
#pragma GCC ivdep
      for (int l = 0; l < 32; l++) v[0][l] = as_float(r[l] << 16);
#pragma GCC ivdep
      for (int l = 0; l < 32; l++) v[1][l] = as_float(r[l] & 0xffff0000u);
      break;
    case kElTF32:
#pragma GCC ivdep
      for (int l = 0; l < 32; l++) v[0][l] = as_float(r[l] & 0xffffe000u);
      break;
    case kElS8:
      for (int h = 0; h < 4; h++)
#pragma GCC ivdep
        for (int l = 0; l < 32; l++) v[h][l] = float(s32(r[l] << (24 - 8 * h)) >> 24);
      break;
    case kElU8:
      for (int h = 0; h < 4; h++)
#pragma GCC ivdep
        for (int l = 0; l < 32; l++) v[h][l] = float(s32((r[l] >> (8 * h)) & 0xff));
      break;
    default:
      for (int h = 0; h < 4; h++)
        for (int l = 0; l < 32; l++) v[h][l] = element(e, r[l] >> (8 * h));
  }
}

inline void transpose4(Vec4& a, Vec4& b, Vec4& c, Vec4& d) {
  Vec4 p = __builtin_shuffle(a, b, Int4{0, 4, 1, 5}), q = __builtin_shuffle(a, b, Int4{2, 6, 3, 7});
  Vec4 r = __builtin_shuffle(c, d, Int4{0, 4, 1, 5}), s = __builtin_shuffle(c, d, Int4{2, 6, 3, 7});
  a = __builtin_shuffle(p, r, Int4{0, 1, 4, 5});
  b = __builtin_shuffle(p, r, Int4{2, 3, 6, 7});
  c = __builtin_shuffle(q, s, Int4{0, 1, 4, 5});
  d = __builtin_shuffle(q, s, Int4{2, 3, 6, 7});
}
inline Vec4 load4(const float* p) {
  Vec4 v;
  std::memcpy(&v, p, 16);
  return v;
}
inline Vec8 both(Vec4 a, Vec4 b) {
  Vec8 v;
  std::memcpy(&v, &a, 16);
  std::memcpy(reinterpret_cast<char*>(&v) + 16, &b, 16);
  return v;
}

// mma.m16n8kK: list holds D, A, B, C registers; n = K; imm: element types of A (bits 0-3) and B
// (4-7), of C and D (8: 0 fp32, 1 fp16, 2 s32), bit 12 satfinite.
//
// A lane 4g + t holds rows g (and g + 8) of A and C and column g of B; a row of C is kept as one
// vector, even columns then odd ones, which is how the lanes 4g .. 4g + 3 hold it.
inline int op_mma(Ctx& c, const Inst& i) {
  if (c.mask != kFull && (c.machine->checks & kSync))
    c.machine->report(c, i, kNotConverged, lowest(c.mask));
  Machine& m = *c.machine;
  const s32* o = m.program.lists + i.list;
  const Element ea = Element(i.imm & 15), eb = Element((i.imm >> 4) & 15);
  const int acc = int(i.imm >> 8) & 15, depth = int(i.n);
  const int per = per_register(ea), span = 4 * per;  // k values in one register's fragment
  const int steps = depth / span, na = 2 * steps, nb = steps, nd = acc == 1 ? 2 : 4;
  const s32 *d = o, *a = o + nd, *b = a + na, *e = b + nb;
  alignas(32) float A[4][4][32], B[32][8], C[4][32];
  for (int q = 0; q < na; q++) widen(reg<u32>(c, a[q]), ea, A[q]);
  for (int q = 0; q < nb; q++) {
    alignas(32) float v[4][32];
    widen(reg<u32>(c, b[q]), eb, v);
    for (int h = 0; h < per; h++)
      for (int odd = 0; odd < 2; odd++) {
        Vec4 r0 = load4(v[h] + 4 * odd), r1 = load4(v[h] + 8 + 4 * odd);
        Vec4 r2 = load4(v[h] + 16 + 4 * odd), r3 = load4(v[h] + 24 + 4 * odd);
        transpose4(r0, r1, r2, r3);
        const Vec4 r[4] = {r0, r1, r2, r3};
        for (int t = 0; t < 4; t++) std::memcpy(&B[q * span + t * per + h][4 * odd], &r[t], 16);
      }
  }
  if (m.checks & kCounts) m.count(i).flops += 2ull * 16 * 8 * u64(depth);
  if (acc == 0)
    for (int h = 0; h < 4; h++) std::memcpy(C[h], reg<u32>(c, e[h]), 128);
  else if (acc == 1)
    for (int h = 0; h < 2; h++)
      for (int l = 0; l < 32; l++) {
        u32 x = reg<u32>(c, e[h])[l];
        C[2 * h][l] = half_to_float(x & 0xffff);
        C[2 * h + 1][l] = half_to_float(x >> 16);
      }
  else
    std::memset(C, 0,
                sizeof C);  // integers are added at the end: sums of products are exact in fp32
  for (int half = 0; half < 2; half++)
    for (int g0 = 0; g0 < 8; g0 += 4) {
      Vec8 s[4];
      for (int g = 0; g < 4; g++)
        s[g] = both(load4(C[2 * half] + 4 * (g0 + g)), load4(C[2 * half + 1] + 4 * (g0 + g)));
      for (int q = 0; q < steps; q++)
        for (int t = 0; t < 4; t++)
          for (int h = 0; h < per; h++) {
            Vec8 y;
            std::memcpy(&y, B[q * span + t * per + h], 32);
            const float* x = A[2 * q + half][h] + 4 * g0 + t;
            for (int g = 0; g < 4; g++) s[g] = s[g] + x[4 * g] * y;
          }
      for (int g = 0; g < 4; g++) {
        std::memcpy(C[2 * half] + 4 * (g0 + g), &s[g], 16);
        std::memcpy(C[2 * half + 1] + 4 * (g0 + g), reinterpret_cast<char*>(&s[g]) + 16, 16);
      }
    }
  for (int h = 0; h < nd; h++) {
    u32 t[32];
    const u32* x = reg<u32>(c, e[h]);
    if (acc == 0) {
#pragma GCC ivdep
      for (int l = 0; l < 32; l++) t[l] = canonical(C[h][l]);
    } else if (acc == 1) {
#pragma GCC ivdep
      for (int l = 0; l < 32; l++)
        t[l] = Half::down(C[2 * h][l]) | Half::down(C[2 * h + 1][l]) << 16;
    } else {
      for (int l = 0; l < 32; l++) {
        s64 r = s64(C[h][l]) + s32(x[l]);
        t[l] =
            i.imm & 0x1000 ? u32(s32(std::clamp<s64>(r, -0x80000000ll, 0x7fffffff))) : u32(u64(r));
      }
    }
    blend(reg<u32>(c, d[h]), t, c.mask);
  }
  return kGo;
}

inline int op_mma_f64(Ctx& c,
                      const Inst& i) {  // m8n8k4; list: D (2), A, B, C (2), 64-bit registers
  if (!converged(c, i)) return kRetry;
  const s32* o = c.machine->program.lists + i.list;
  const u64 *a = reg<u64>(c, o[2]), *b = reg<u64>(c, o[3]);
  u64 t[2][32];
  for (int h = 0; h < 2; h++)
    for (int l = 0; l < 32; l++) {
      int row = l >> 2, col = 2 * (l & 3) + h;
      double s = as_double(reg<u64>(c, o[4 + h])[l]);
      for (int k = 0; k < 4; k++)
        s = __builtin_fma(as_double(a[row * 4 + k]), as_double(b[col * 4 + k]), s);
      t[h][l] = as_bits(s);
    }
  for (int h = 0; h < 2; h++) blend(reg<u64>(c, o[h]), t[h], c.mask);
  if (c.machine->checks & kCounts) c.machine->count(i).flops += 2 * 8 * 8 * 4;
  return kGo;
}

// ------------------------------------------------------------------------------------------------
// wgmma: this warp's 16 rows of the 64. Operands in shared memory by descriptor: start address,
// leading and stride byte offsets (each >> 4), swizzle mode (0 none, 1 128, 2 64, 3 32 bytes).

struct Tile {
  u32 start, lead, stride, swizzle, bytes;
  bool mn;  // the contiguous axis is M or N, not K

  static Tile from(u64 d, u32 element_bytes, bool mn) {
    return {u32(d & 0x3fff) << 4,
            u32((d >> 16) & 0x3fff) << 4,
            u32((d >> 32) & 0x3fff) << 4,
            u32(d >> 62),
            element_bytes,
            mn};
  }
  u32 at(u32 r, u32 k) const {  // address of element (row r of M or N, k)
    u32 width = swizzle == 1 ? 128 : swizzle == 2 ? 64 : swizzle == 3 ? 32 : 16, x;
    if (!mn) {
      u32 byte = k * bytes;
      x = swizzle ? start + (r / 8) * stride + (r % 8) * width + byte
                  : start + (r / 8) * stride + (r % 8) * 16 + (byte / 16) * lead + byte % 16;
    } else {
      u32 per = width / bytes;
      x = swizzle
              ? start + (r / per) * lead + (k / 8) * stride + (k % 8) * width + (r % per) * bytes
              : start + (r / per) * stride + (k / 8) * lead + (k % 8) * 16 + (r % per) * bytes;
    }
    u32 mask = swizzle == 1 ? 7 : swizzle == 2 ? 3 : swizzle == 3 ? 1 : 0;
    return x ^ (((x >> 7) & mask) << 4);
  }
};

// Reads rows r0 .. r0 + rows of a tile, 16 bytes at a time (a swizzle keeps those together), into
// out[k * stride_k + r * stride_r]; each chunk goes through the checks.
inline void read_tile(Ctx& c, const Inst& i, const Tile& t, Element e, u32 r0, u32 rows, u32 depth,
                      float* out, u32 stride_r, u32 stride_k) {
  Machine& m = *c.machine;
  const u32 total = m.launch.shared_total, per = 16 / t.bytes;
  const u32 dr = t.mn ? per : 1, dk = t.mn ? 1 : per;
  u32 pending[32], n = 0;
  bool told = false;
  for (u32 r = 0; r < rows; r += dr)
    for (u32 k = 0; k < depth; k += dk) {
      u32 a = t.at(r0 + r, k);
      u32 raw[4] = {0, 0, 0, 0};
      if (a + 16 > total || !m.launch.shared_map[a] || !m.launch.shared_map[a + 15]) {
        if (!told) fault(c, i, kOutOfBounds, 0, a, kShared, 16, kRead);
        told = true;
      } else {
        std::memcpy(raw, c.block->shared + a, 16);
        if ((m.checks & kUninit) && !told)
          for (u32 b = 0; b < 16; b++) {
            u8 s = c.block->shared_state[a + b];
            if (s == 2 || s == 3) continue;
            fault(c, i, s == 4 ? kAsyncRead : kUninitShared, 0, a, kShared, 16, kRead);
            told = true;
            break;
          }
        if (m.checks & kRaces) {
          pending[n++] = a;
          if (n == 32) m.race_shared(c, i, pending, 16, kFull, kRead), n = 0;
        }
      }
      float* to = out + size_t(r) * stride_r + size_t(k) * stride_k;
      const u32 step = t.mn ? stride_r : stride_k;
      if (e == kElBF16)
        for (u32 q = 0; q < 8; q++) to[q * step] = as_float((raw[q >> 1] >> (16 * (q & 1))) << 16);
      else if (e == kElF16)
        for (u32 q = 0; q < 8; q++)
          to[q * step] = half_to_float((raw[q >> 1] >> (16 * (q & 1))) & 0xffff);
      else
        for (u32 q = 0; q < per; q++)
          to[q * step] = element(e, raw[q * t.bytes / 4] >> (8 * t.bytes * q % 32));
    }
  if (n) m.race_shared(c, i, pending, 16, (1u << n) - 1, kRead);
}

// list: D registers, then A registers (4) if A is in registers. o[1] A's descriptor (or -1), o[2]
// B's, o[3] scale-d predicate. n = N. imm: element (0-3), accumulator (8: 0 fp32, 1 fp16, 2 s32),
// bit 12 negate A, 13 negate B, 14 A is M-major, 15 B is N-major, bit 16 scale-d negated. imm2:
// element of B
inline int op_wgmma(Ctx& c, const Inst& i) {
  Machine& m = *c.machine;
  if (c.mask != kFull && (m.checks & kSync)) m.report(c, i, kNotConverged, lowest(c.mask));
  const s32* o = m.program.lists + i.list;
  const Element ea = Element(i.imm & 15), eb = Element(i.imm2 & 15);
  const int acc = int(i.imm >> 8) & 15;
  const u32 n = i.n, bytes = ea == kElTF32 ? 4 : ea <= kElBF16 ? 2 : 1, depth = 32 / bytes;
  const u32 nd = acc == 1 ? n / 4 : n / 2;
  alignas(32) float A[16][32], B[32][256];
  const int per = per_register(ea), span = 4 * per;
  if (i.o[1] == -1) {
    for (int q = 0; q < 4; q++) {
      float v[4][32];
      widen(reg<u32>(c, o[nd + u32(q)]), ea, v);
      for (int h = 0; h < per; h++)
        for (int l = 0; l < 32; l++)
          A[(l >> 2) + 8 * (q & 1)][(q >> 1) * span + (l & 3) * per + h] = v[h][l];
    }
  } else {
    Tile t = Tile::from(reg<u64>(c, i.o[1])[lowest(c.mask)], bytes, i.imm & 0x4000);
    read_tile(c, i, t, ea, (c.warp->index & 3) * 16, 16, depth, A[0], 32, 1);
  }
  Tile t = Tile::from(reg<u64>(c, i.o[2])[lowest(c.mask)], bytes, i.imm & 0x8000);
  read_tile(c, i, t, eb, 0, n, depth, B[0], 1, 256);
  const u32 keep = get_pred(c, i.o[3]) ^ (i.imm & 0x10000 ? kFull : 0);
  const bool scale = (keep >> lowest(c.mask)) & 1;
  const float sign = (i.imm & 0x1000 ? -1.f : 1.f) * (i.imm & 0x2000 ? -1.f : 1.f);
  if (m.checks & kCounts) m.count(i).flops += 2ull * 16 * n * depth;
  for (u32 q = 0; q < n; q += 8)  // eight columns, of which a lane holds two
    for (int half = 0; half < 2; half++) {
      u32 *even, *odd = nullptr;
      if (acc == 1) {
        even = reg<u32>(c, o[q / 4 + u32(half)]);
      } else {
        even = reg<u32>(c, o[q / 2 + 2 * u32(half)]);
        odd = reg<u32>(c, o[q / 2 + 2 * u32(half) + 1]);
      }
      for (int g = 0; g < 8; g++) {
        alignas(32) float s[8] = {};
        u32 *x = even + 4 * g, *y = odd ? odd + 4 * g : nullptr;
        if (scale && acc != 2)
          for (int t4 = 0; t4 < 4; t4++) {
            s[2 * t4] = acc == 1 ? half_to_float(x[t4] & 0xffff) : as_float(x[t4]);
            s[2 * t4 + 1] = acc == 1 ? half_to_float(x[t4] >> 16) : as_float(y[t4]);
          }
        Vec8 v;
        std::memcpy(&v, s, 32);
        const float* w = A[g + 8 * half];
        for (u32 k = 0; k < depth; k++) {
          Vec8 z;
          std::memcpy(&z, &B[k][q], 32);
          v = v + (w[k] * sign) * z;
        }
        std::memcpy(s, &v, 32);
        for (int t4 = 0; t4 < 4; t4++) {
          if (acc == 0) {
            x[t4] = canonical(s[2 * t4]), y[t4] = canonical(s[2 * t4 + 1]);
          } else if (acc == 1) {
            x[t4] = Half::down(s[2 * t4]) | Half::down(s[2 * t4 + 1]) << 16;
          } else {
            x[t4] = u32(s32(s[2 * t4])) + (scale ? x[t4] : 0);
            y[t4] = u32(s32(s[2 * t4 + 1])) + (scale ? y[t4] : 0);
          }
        }
      }
    }
  return kGo;
}

}  // namespace emu::EMU_ISA
