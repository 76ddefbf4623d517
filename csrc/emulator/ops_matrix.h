// Matrix instructions. Products are exact; sums are fp32, rounded to nearest after each product, in
// the order of k (hardware sums several products at once and truncates: results differ in the last
// bits, and PTX leaves the order open).
#pragma once

#include "ops_sync.h"

namespace emu::EMU_ISA {

enum Element : u32 { kElF16, kElBF16, kElTF32, kElE4M3, kElE5M2, kElS8, kElU8, kElF64, kElF32 };

inline float element(Element e, u32 x) {
  switch (e) {
    case kElF16: return half_to_float(x & 0xffff);
    case kElBF16: return bf16_to_float(x & 0xffff);
    case kElTF32: return as_float(x & 0xffffe000u);
    case kElE4M3: return e4m3_to_float(x & 0xff);
    case kElE5M2: return e5m2_to_float(x & 0xff);
    case kElS8: return float(s8(x));
    default: return float(u8(x));
  }
}

// Registers of 32 lanes to a matrix: each register holds `per` values of consecutive k in row (or
// column) lane / 4.
template <class T, int W>
inline void unpack_fragment(const u32* r, Element e, T (*out)[W], int row0, int k0, bool transposed) {
  const int per = e == kElTF32 ? 1 : e <= kElBF16 ? 2 : 4, bits = 32 / per;
  float v[4][32];
  for (int h = 0; h < per; h++) {
    if (e == kElF16) for (int l = 0; l < 32; l++) v[h][l] = half_to_float((r[l] >> (16 * h)) & 0xffff);
    else if (e == kElBF16) for (int l = 0; l < 32; l++) v[h][l] = as_float((r[l] >> (16 * h)) << 16);
    else for (int l = 0; l < 32; l++) v[h][l] = element(e, r[l] >> (bits * h));
  }
  for (int h = 0; h < per; h++)
    for (int l = 0; l < 32; l++) {
      int row = row0 + (l >> 2), k = k0 + (l & 3) * per + h;
      if (transposed) out[k][row] = T(v[h][l]);
      else out[row][k] = T(v[h][l]);
    }
}

// mma.m16n8kK: list holds D, A, B, C registers; n = K; imm: element types of A (bits 0-3) and B (4-7),
// of C and D (8: 0 fp32, 1 fp16, 2 s32), bit 12 satfinite.
inline int op_mma(Ctx& c, const Inst& i) {
  if (!converged(c, i)) return kRetry;
  Machine& m = *c.machine;
  const s32* o = m.program.lists + i.list;
  Element ea = Element(i.imm & 15), eb = Element((i.imm >> 4) & 15);
  int acc = int(i.imm >> 8) & 15, k = int(i.n);
  const int per = ea == kElTF32 ? 1 : ea <= kElBF16 ? 2 : 4;
  const int span = 4 * per;              // k values in one register's fragment
  const int na = 2 * (k / span), nb = k / span, nd = acc == 1 ? 2 : 4;
  const s32 *d = o, *a = o + nd, *b = a + na, *e = b + nb;
  alignas(64) float A[16][32], B[32][8], C[16][8];
  for (int q = 0; q < na; q++)
    unpack_fragment<float, 32>(reg<u32>(c, a[q]), ea, A, (q & 1) * 8, (q >> 1) * span, false);
  for (int q = 0; q < nb; q++)
    unpack_fragment<float, 8>(reg<u32>(c, b[q]), eb, B, 0, q * span, true);
  if (m.checks & kCounts) m.count(i).flops += 2ull * 16 * 8 * u64(k);
  if (acc == 2) {
    alignas(64) s32 R[16][8];
    for (int h = 0; h < 4; h++) {
      const u32* x = reg<u32>(c, e[h]);
      for (int l = 0; l < 32; l++) R[(l >> 2) + 8 * (h >> 1)][2 * (l & 3) + (h & 1)] = s32(x[l]);
    }
    for (int r = 0; r < 16; r++)
      for (int n = 0; n < 8; n++) {
        s64 s = R[r][n];
        for (int q = 0; q < k; q++) s += s64(A[r][q]) * s64(B[q][n]);
        R[r][n] = i.imm & 0x1000 ? s32(std::clamp<s64>(s, -0x80000000ll, 0x7fffffff)) : s32(u32(u64(s)));
      }
    for (int h = 0; h < 4; h++) {
      u32 t[32];
      for (int l = 0; l < 32; l++) t[l] = u32(R[(l >> 2) + 8 * (h >> 1)][2 * (l & 3) + (h & 1)]);
      blend(reg<u32>(c, d[h]), t, c.mask);
    }
    return kGo;
  }
  for (int h = 0; h < nd; h++) {
    const u32* x = reg<u32>(c, e[h]);
    for (int l = 0; l < 32; l++) {
      if (acc == 1) {
        C[(l >> 2) + 8 * h][2 * (l & 3)] = half_to_float(x[l] & 0xffff);
        C[(l >> 2) + 8 * h][2 * (l & 3) + 1] = half_to_float(x[l] >> 16);
      } else {
        C[(l >> 2) + 8 * (h >> 1)][2 * (l & 3) + (h & 1)] = as_float(x[l]);
      }
    }
  }
  for (int r = 0; r < 16; r++) {
    float s[8];
    for (int n = 0; n < 8; n++) s[n] = C[r][n];
    for (int q = 0; q < k; q++) {
      float x = A[r][q];
      for (int n = 0; n < 8; n++) s[n] += x * B[q][n];
    }
    for (int n = 0; n < 8; n++) C[r][n] = s[n];
  }
  for (int h = 0; h < nd; h++) {
    u32 t[32];
    for (int l = 0; l < 32; l++)
      t[l] = acc == 1 ? Half::down(C[(l >> 2) + 8 * h][2 * (l & 3)]) |
                            Half::down(C[(l >> 2) + 8 * h][2 * (l & 3) + 1]) << 16
                      : canonical(C[(l >> 2) + 8 * (h >> 1)][2 * (l & 3) + (h & 1)]);
    blend(reg<u32>(c, d[h]), t, c.mask);
  }
  return kGo;
}

inline int op_mma_f64(Ctx& c, const Inst& i) {  // m8n8k4; list: D (2), A, B, C (2), 64-bit registers
  if (!converged(c, i)) return kRetry;
  const s32* o = c.machine->program.lists + i.list;
  const u64 *a = reg<u64>(c, o[2]), *b = reg<u64>(c, o[3]);
  u64 t[2][32];
  for (int h = 0; h < 2; h++)
    for (int l = 0; l < 32; l++) {
      int row = l >> 2, col = 2 * (l & 3) + h;
      double s = as_double(reg<u64>(c, o[4 + h])[l]);
      for (int k = 0; k < 4; k++) s = __builtin_fma(as_double(a[row * 4 + k]), as_double(b[col * 4 + k]), s);
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
    return {u32(d & 0x3fff) << 4, u32((d >> 16) & 0x3fff) << 4, u32((d >> 32) & 0x3fff) << 4,
            u32(d >> 62), element_bytes, mn};
  }
  u32 at(u32 r, u32 k) const {  // address of element (row r of M or N, k)
    u32 width = swizzle == 1 ? 128 : swizzle == 2 ? 64 : swizzle == 3 ? 32 : 16, x;
    if (!mn) {
      u32 byte = k * bytes;
      x = swizzle ? start + (r / 8) * stride + (r % 8) * width + byte
                  : start + (r / 8) * stride + (r % 8) * 16 + (byte / 16) * lead + byte % 16;
    } else {
      u32 per = width / bytes;
      x = swizzle ? start + (r / per) * lead + (k / 8) * stride + (k % 8) * width + (r % per) * bytes
                  : start + (r / per) * stride + (k / 8) * lead + (k % 8) * 16 + (r % per) * bytes;
    }
    u32 mask = swizzle == 1 ? 7 : swizzle == 2 ? 3 : swizzle == 3 ? 1 : 0;
    return x ^ (((x >> 7) & mask) << 4);
  }
};

// Reads rows r0 .. r0 + rows of a tile as T; each row's bytes go through the checks.
template <class T>
inline void read_tile(Ctx& c, const Inst& i, const Tile& t, Element e, u32 r0, u32 rows, u32 depth,
                      std::vector<T>& out) {
  Machine& m = *c.machine;
  out.resize(size_t(rows) * depth);
  const u32 total = m.launch.shared_total;
  bool told = false;
  for (u32 r = 0; r < rows; r++)
    for (u32 k = 0; k < depth; k++) {
      u32 a = t.at(r0 + r, k);
      if (a + t.bytes > total || !m.launch.shared_map[a]) {
        if (!told) fault(c, i, kOutOfBounds, 0, a, kShared, t.bytes, kRead);
        told = true;
        out[size_t(r) * depth + k] = 0;
        continue;
      }
      if ((m.checks & kUninit) && c.block->shared_state[a] != 2 && !told) {
        u8 s = c.block->shared_state[a];
        if (s != 3) fault(c, i, s == 4 ? kAsyncRead : kUninitShared, 0, a, kShared, t.bytes, kRead);
        told = true;
      }
      u32 x = 0;
      std::memcpy(&x, c.block->shared + a, t.bytes);
      out[size_t(r) * depth + k] = T(element(e, x));
    }
  if (m.checks & kRaces) {
    // One access for each 16 bytes is enough: a row of a core matrix is written as one.
    u32 a[32], n = 0;
    u32 step = t.mn ? 1 : std::max(1u, 16 / t.bytes), rstep = t.mn ? 16 / t.bytes : 1;
    for (u32 r = 0; r < rows; r += rstep)
      for (u32 k = 0; k < depth; k += step) {
        a[n++] = std::min(t.at(r0 + r, k) & ~15u, total - 16);
        if (n == 32) {
          m.race_shared(c, i, a, 16, kFull, kRead);
          n = 0;
        }
      }
    if (n) m.race_shared(c, i, a, 16, (1u << n) - 1, kRead);
  }
}

// list: D registers, then A registers (4) if A is in registers. o[1] A's descriptor (or -1), o[2] B's,
// o[3] scale-d predicate. n = N. imm: element (0-3), accumulator (8: 0 fp32, 1 fp16, 2 s32), bit 12
// negate A, 13 negate B, 14 A is M-major, 15 B is N-major, bit 16 scale-d negated. imm2: element of B
inline int op_wgmma(Ctx& c, const Inst& i) {
  if (!converged(c, i)) return kRetry;
  Machine& m = *c.machine;
  const s32* o = m.program.lists + i.list;
  Element ea = Element(i.imm & 15), eb = Element(i.imm2 & 15);
  int acc = int(i.imm >> 8) & 15;
  u32 n = i.n, bytes = ea == kElTF32 ? 4 : ea <= kElBF16 ? 2 : 1, depth = 32 / bytes;
  u32 nd = acc == 1 ? n / 4 : n / 2;
  static thread_local std::vector<float> A, B;
  u32 row0 = (c.warp->index & 3) * 16;
  if (i.o[1] == -1) {
    float frag[16][32];
    const int span = 4 * int(4 / bytes);
    for (int q = 0; q < 4; q++)
      unpack_fragment<float, 32>(reg<u32>(c, o[nd + u32(q)]), ea, frag, (q & 1) * 8, (q >> 1) * span, false);
    A.resize(16 * depth);
    for (u32 r = 0; r < 16; r++)
      for (u32 k = 0; k < depth; k++) A[r * depth + k] = frag[r][k];
  } else {
    Tile t = Tile::from(reg<u64>(c, i.o[1])[lowest(c.mask)], bytes, i.imm & 0x4000);
    read_tile<float>(c, i, t, ea, row0, 16, depth, A);
  }
  Tile t = Tile::from(reg<u64>(c, i.o[2])[lowest(c.mask)], bytes, i.imm & 0x8000);
  read_tile<float>(c, i, t, eb, 0, n, depth, B);
  u32 keep = get_pred(c, i.o[3]) ^ (i.imm & 0x10000 ? kFull : 0);
  bool scale = (keep >> lowest(c.mask)) & 1;
  float sa = i.imm & 0x1000 ? -1.f : 1.f, sb = i.imm & 0x2000 ? -1.f : 1.f, sign = sa * sb;
  if (m.checks & kCounts) m.count(i).flops += 2ull * 16 * n * depth;
  // Transposed B: the inner loop runs over columns.
  static thread_local std::vector<float> T;
  T.resize(size_t(n) * depth);
  for (u32 k = 0; k < depth; k++)
    for (u32 q = 0; q < n; q++) T[size_t(k) * n + q] = B[size_t(q) * depth + k];
  static thread_local std::vector<float> S;
  static thread_local std::vector<s64> I;
  for (int r = 0; r < 16; r++) {
    int group = (r & 7) * 4, half = r >> 3;
    if (acc == 2) {
      I.assign(n, 0);
      for (u32 k = 0; k < depth; k++)
        for (u32 q = 0; q < n; q++) I[q] += s64(A[r * depth + k]) * s64(T[size_t(k) * n + q]);
      for (u32 q = 0; q < n; q++) {
        u32& x = reg<u32>(c, o[(q / 8) * 4 + u32(half) * 2 + (q & 1)])[group + int(q % 8) / 2];
        x = u32(u64(I[q] + (scale ? s64(s32(x)) : 0)));
      }
      continue;
    }
    S.assign(n, 0.f);
    if (scale)
      for (u32 q = 0; q < n; q++) {
        int lane = group + int(q % 8) / 2;
        S[q] = acc == 1 ? half_to_float((reg<u32>(c, o[(q / 8) * 2 + u32(half)])[lane] >> (16 * (q & 1))) & 0xffff)
                        : as_float(reg<u32>(c, o[(q / 8) * 4 + u32(half) * 2 + (q & 1)])[lane]);
      }
    for (u32 k = 0; k < depth; k++) {
      float x = A[r * depth + k] * sign;
      const float* y = &T[size_t(k) * n];
      float* s = S.data();
      for (u32 q = 0; q < n; q++) s[q] += x * y[q];
    }
    for (u32 q = 0; q < n; q++) {
      int lane = group + int(q % 8) / 2;
      if (acc == 1) {
        u32& x = reg<u32>(c, o[(q / 8) * 2 + u32(half)])[lane];
        u32 h = Half::down(S[q]);
        x = q & 1 ? (x & 0xffff) | h << 16 : (x & 0xffff0000u) | h;
      } else {
        reg<u32>(c, o[(q / 8) * 4 + u32(half) * 2 + (q & 1)])[lane] = canonical(S[q]);
      }
    }
  }
  return kGo;
}

}  // namespace emu::EMU_ISA
