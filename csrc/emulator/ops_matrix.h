// Matrix instructions. Products are exact and sums are fp32: each product is added in the order of
// k with one rounding to nearest, an fma. (Hardware sums several products at once and truncates:
// last bits differ, and PTX leaves the order open.) Without FMA instructions the product is rounded
// on its own, which changes nothing: products of two operands of at most 12 bits are exact in fp32
// unless they leave its range.
//
// What takes the time is not the arithmetic but getting at it, so each operand is converted to
// floats once, and eight columns of a result's row are one vector: even columns, then odd ones,
// which is how the lanes 4g .. 4g + 3 of a fragment hold the row. Eight rows are summed side by
// side in registers.
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

typedef float Vec4 __attribute__((vector_size(16), aligned(4), may_alias));
typedef float Vec8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef int Int4 __attribute__((vector_size(16)));
typedef u32 Word4 __attribute__((vector_size(16), aligned(4), may_alias));
typedef int Int8 __attribute__((vector_size(32), aligned(4), may_alias));

// By dereference, not memcpy: GCC copies in halves through the stack, and a load of the whole then
// waits for both stores.
inline Vec4 load4(const void* p) { return *static_cast<const Vec4*>(p); }
inline Vec8 load8(const void* p) { return *static_cast<const Vec8*>(p); }
inline void store4(void* p, Vec4 v) { *static_cast<Vec4*>(p) = v; }
inline void store8(void* p, Vec8 v) { *static_cast<Vec8*>(p) = v; }
inline Vec8 both(Vec4 a, Vec4 b) { return Vec8{a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3]}; }
inline Vec4 low(Vec8 v) { return Vec4{v[0], v[1], v[2], v[3]}; }
inline Vec4 high(Vec8 v) { return Vec4{v[4], v[5], v[6], v[7]}; }
inline Vec8 canonical(Vec8 v) {
  Int8 nan = v != v;
  return (Vec8)(((Int8)v & ~nan) | (int(kNan32) & nan));
}

inline Vec8 madd(float a, Vec8 b, Vec8 c) {
#if defined(__FMA__)
  return (Vec8)_mm256_fmadd_ps(_mm256_set1_ps(a), (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}
// s[r] += a[r][k] b[k], for `depth` values of k: eight rows, each of eight columns. Eight sums are
// as many as an fma's latency needs, and they stay in registers.
struct Walk {
  const float* at;
  int row, k;  // how far apart
};
template <int Depth>
inline void multiply(Vec8 (&s)[8], Walk a, const float* b, int b_k) {
#pragma GCC unroll 4
  for (int k = 0; k < Depth; k++) {
    const Vec8 y = load8(b + k * b_k);
#pragma GCC unroll 8
    for (int r = 0; r < 8; r++) s[r] = madd(a.at[r * a.row + k * a.k], y, s[r]);
  }
}

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
// Four lanes' pairs of fp16 as eight floats, even ones first; and back, with one rounding.
inline Vec8 halves(const u32* x) {
#if defined(__F16C__)
  const __m256 v = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
  return __builtin_shuffle((Vec8)v, Int8{0, 2, 4, 6, 1, 3, 5, 7});
#else
  Vec8 v;
  for (int t = 0; t < 4; t++)
    v[t] = half_to_float(x[t] & 0xffff), v[4 + t] = half_to_float(x[t] >> 16);
  return v;
#endif
}
inline void narrow(Vec8 v, u32* to) {
  for (int t = 0; t < 4; t++) to[t] = Half::down(v[t]) | Half::down(v[4 + t]) << 16;
}
// Integers: the sum of a row's products is exact in fp32; s32 wraps, or saturates with .satfinite.
inline u32 accumulate(float sum, u32 old, bool saturate) {
  s64 r = s64(sum) + s32(old);
  return saturate ? u32(s32(std::clamp<s64>(r, -0x80000000ll, 0x7fffffff))) : u32(u64(r));
}

// mma.m16n8kK: list holds D, A, B, C registers; n = K; imm: element types of A (bits 0-3) and B
// (4-7), of C and D (8: 0 fp32, 1 fp16, 2 s32), bit 12 satfinite.
//
// A lane 4g + t holds rows g (and g + 8) of A and C and column g of B.
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
  alignas(32) float A[4][4][32], B[32][8];
  for (int q = 0; q < na; q++) widen(reg<u32>(c, a[q]), ea, A[q]);
  for (int q = 0; q < nb; q++) {
    alignas(32) float v[4][32];
    widen(reg<u32>(c, b[q]), eb, v);
    for (int h = 0; h < per; h++)
      for (int odd = 0; odd < 2; odd++) {
        Vec4 r[4];
        for (int t = 0; t < 4; t++) r[t] = load4(v[h] + 8 * t + 4 * odd);
        transpose4(r[0], r[1], r[2], r[3]);
        for (int t = 0; t < 4; t++) store4(&B[q * span + t * per + h][4 * odd], r[t]);
      }
  }
  if (m.checks & kCounts) m.count(i).flops += 2ull * 16 * 8 * u64(depth);
  alignas(32) u32 D[4][32];
  for (int half = 0; half < 2; half++) {
    Vec8 s[8];
    const u32* x = reg<u32>(c, e[acc == 1 ? half : 2 * half]);
    const u32* y = acc == 1 ? nullptr : reg<u32>(c, e[2 * half + 1]);
    for (int g = 0; g < 8; g++)
      if (acc == 0)
        s[g] = both(load4(x + 4 * g), load4(y + 4 * g));
      else if (acc == 1)
        s[g] = halves(x + 4 * g);
      else
        s[g] = Vec8{};  // integers are added at the end: sums of products are exact in fp32
    for (int q = 0; q < steps; q++)
      for (int t = 0; t < 4; t++) {
        const float* w = &A[2 * q + half][0][t];
        const float* z = B[q * span + t * per];
        if (per == 2)
          multiply<2>(s, {w, 4, 32}, z, 8);
        else if (per == 1)
          multiply<1>(s, {w, 4, 32}, z, 8);
        else
          multiply<4>(s, {w, 4, 32}, z, 8);
      }
    for (int g = 0; g < 8; g++) {
      if (acc == 0) {
        const Vec8 v = canonical(s[g]);
        store4(&D[2 * half][4 * g], low(v)), store4(&D[2 * half + 1][4 * g], high(v));
      } else if (acc == 1) {
        narrow(s[g], &D[half][4 * g]);
      } else {
        for (int t = 0; t < 4; t++) {
          D[2 * half][4 * g + t] = accumulate(s[g][t], x[4 * g + t], i.imm & 0x1000);
          D[2 * half + 1][4 * g + t] = accumulate(s[g][4 + t], y[4 * g + t], i.imm & 0x1000);
        }
      }
    }
  }
  for (int h = 0; h < nd; h++)
    if (c.mask == kFull) [[likely]]
      std::memcpy(reg<u32>(c, d[h]), D[h], 128);
    else
      blend(reg<u32>(c, d[h]), D[h], c.mask);
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
  bool mn;                       // the contiguous axis is M or N, not K
  u32 width, per_log2;           // of a swizzled row, in bytes; its elements
  u32 step_r, step_k, xor_mask;  // from one such row to the next along r; from 8 k's to the next

  static Tile from(u64 d, u32 element_bytes, bool mn) {
    Tile t{};
    t.start = u32(d & 0x3fff) << 4;
    t.lead = u32((d >> 16) & 0x3fff) << 4;
    t.stride = u32((d >> 32) & 0x3fff) << 4;
    t.swizzle = u32(d >> 62);
    t.bytes = element_bytes;
    t.mn = mn;
    constexpr u32 widths[] = {16, 128, 64, 32}, masks[] = {0, 7, 3, 1};
    t.width = widths[t.swizzle], t.xor_mask = masks[t.swizzle];
    t.per_log2 = u32(std::countr_zero(t.width / t.bytes));
    t.step_r = t.swizzle ? t.lead : t.stride;
    t.step_k = t.swizzle ? t.stride : t.lead;
    return t;
  }
  u32 at(u32 r, u32 k) const {  // address of element (row r of M or N, k)
    u32 x = start;
    if (!mn) {
      const u32 byte = k * bytes;
      x += (r / 8) * stride + (r % 8) * width;
      x += swizzle ? byte : (byte / 16) * lead + byte % 16;
    } else {
      const u32 rest = r & ((1u << per_log2) - 1);
      x += (r >> per_log2) * step_r + (k / 8) * step_k + (k % 8) * width + rest * bytes;
    }
    return x ^ (((x >> 7) & xor_mask) << 4);
  }
};

// Eight bf16 or fp16 values that lie side by side as floats: even ones, then odd ones.
inline Vec8 evens_first(const char* p, Element e) {
  if (e == kElBF16) {
    const Word4 raw = *reinterpret_cast<const Word4*>(p);
    return both((Vec4)(raw << 16), (Vec4)(raw & 0xffff0000u));
  }
  u32 raw[4];
  std::memcpy(raw, p, 16);
  return halves(raw);
}

// Sixteen bytes of a tile as floats: 4, 8 or 16 of them.
inline void widen_chunk(const char* p, Element e, float* v) {
  u32 raw[4];
  std::memcpy(raw, p, 16);
  switch (e) {
    case kElBF16:
#pragma GCC ivdep
      for (int q = 0; q < 8; q++) v[q] = as_float(u32(reinterpret_cast<const u16*>(raw)[q]) << 16);
      break;
    case kElF16:
#if defined(__F16C__)
      store8(v, (Vec8)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
      for (int q = 0; q < 8; q++) v[q] = half_to_float(reinterpret_cast<const u16*>(raw)[q]);
#endif
      break;
    case kElTF32:
      for (int q = 0; q < 4; q++) v[q] = as_float(raw[q] & 0xffffe000u);
      break;
    default:
      for (int q = 0; q < 16; q++) v[q] = element(e, raw[q / 4] >> (8 * (q & 3)));
  }
}

// Where the sixteen-byte chunk lies, or null after a report. Checks what can be checked at once;
// races are looked for when the instruction is waited for, so its chunks are remembered.
inline const char* tile_chunk(Ctx& c, const Inst& i, u32 a, bool& told, AsyncMatrix* later) {
  Machine& m = *c.machine;
  if (a + 16 > m.launch.shared_total || !m.launch.shared_map[a] || !m.launch.shared_map[a + 15])
      [[unlikely]] {
    if (!told) fault(c, i, kOutOfBounds, 0, a, kShared, 16, kRead);
    told = true;
    return nullptr;
  }
  if ((m.checks & kUninit) && !told) {
    u64 s[2];
    std::memcpy(s, c.block->shared_state + a, 16);
    constexpr u64 kWritten = 0x0202020202020202ull;  // or 3: with an undefined value
    if (((s[0] ^ kWritten) | (s[1] ^ kWritten)) & 0xfefefefefefefefeull) [[unlikely]]
      for (u32 b = 0; b < 16; b++) {
        u8 state = c.block->shared_state[a + b];
        if (state == 2 || state == 3) continue;
        fault(c, i, state == 4 ? kAsyncRead : kUninitShared, 0, a, kShared, 16, kRead);
        told = true;
        break;
      }
  }
  if (later) later->chunk.push_back(a);
  return c.block->shared + a;
}

// A's sixteen rows from r0 on, to out[row][k].
inline void read_a(Ctx& c, const Inst& i, const Tile& t, Element e, u32 r0, u32 depth,
                   float (*out)[32], AsyncMatrix* later) {
  const u32 per = 16 / t.bytes;
  bool told = false;
  for (u32 r = 0; r < 16; r += t.mn ? per : 1)
    for (u32 k = 0; k < depth; k += t.mn ? 1 : per) {
      float v[16];
      float* to = t.mn ? v : &out[r][k];
      if (const char* p = tile_chunk(c, i, t.at(r0 + r, k), told, later))
        widen_chunk(p, e, to);
      else
        std::fill(to, to + per, 0.f);
      for (u32 q = 0; t.mn && q < per; q++) out[r + q][k] = v[q];
    }
}

// B by eight columns, even ones first: [column / 8][k][those].
using Columns = float[32][32][8];

inline void read_b(Ctx& c, const Inst& i, const Tile& t, Element e, u32 n, u32 depth, Columns& out,
                   AsyncMatrix* later) {
  const u32 per = 16 / t.bytes;
  bool told = false;
  if (t.mn) {
    for (u32 k = 0; k < depth; k++)
      for (u32 r = 0; r < n; r += per) {
        const char* p = tile_chunk(c, i, t.at(r, k), told, later);
        if (per == 8) {
          store8(out[r / 8][k], p ? evens_first(p, e) : Vec8{});
          continue;
        }
        float v[16] = {};
        if (p) widen_chunk(p, e, v);
        for (u32 q = 0; q < per; q++) out[(r + q) / 8][k][(q & 1) * 4 + ((r + q) & 7) / 2] = v[q];
      }
    return;
  }
  for (u32 r = 0; r < n; r += 8)
    for (u32 k = 0; k < depth; k += per) {
      alignas(32) float v[8][16];
      for (u32 q = 0; q < 8; q++) {
        if (const char* p = tile_chunk(c, i, t.at(r + q, k), told, later))
          widen_chunk(p, e, v[q]);
        else
          std::memset(v[q], 0, sizeof v[q]);
      }
      for (u32 odd = 0; odd < 2; odd++)
        for (u32 q = 0; q < per; q += 4) {
          Vec4 x[4];
          for (u32 j = 0; j < 4; j++) x[j] = load4(&v[2 * j + odd][q]);
          transpose4(x[0], x[1], x[2], x[3]);
          for (u32 j = 0; j < 4; j++) store4(&out[r / 8][k + q + j][4 * odd], x[j]);
        }
    }
}

// D = A B (+ D), eight rows and eight columns of it: x holds the even ones of these, y the odd ones
// (fp16: x pairs of them). Kind: 0 fp32, 1 fp16, 2 s32.
template <int Kind, int Depth>
[[gnu::noinline]] void wgmma_part(u32* x, u32* y, const float (*a)[32], const float (*b)[8],
                                  bool add, bool saturate) {
  Vec8 s[8];
  for (int g = 0; g < 8; g++)
    if (!add || Kind == 2)
      s[g] = Vec8{};
    else if constexpr (Kind == 1)
      s[g] = halves(x + 4 * g);
    else
      s[g] = both(load4(x + 4 * g), load4(y + 4 * g));
  multiply<Depth>(s, {a[0], 32, 1}, b[0], 8);
  for (int g = 0; g < 8; g++)
    if constexpr (Kind == 0) {
      const Vec8 v = canonical(s[g]);
      store4(x + 4 * g, low(v)), store4(y + 4 * g, high(v));
    } else if constexpr (Kind == 1) {
      narrow(s[g], x + 4 * g);
    } else {
      for (int t = 0; t < 4; t++) {
        u32 &even = x[4 * g + t], &odd = y[4 * g + t];
        even = accumulate(s[g][t], add ? even : 0, saturate);
        odd = accumulate(s[g][4 + t], add ? odd : 0, saturate);
      }
    }
}

// list: D registers, then A registers (4) if A is in registers. o[1] A's descriptor (or -1), o[2]
// B's, o[3] scale-d predicate. n = N. imm: element (0-3), accumulator (8: 0 fp32, 1 fp16, 2 s32),
// bit 12 negate A, 13 negate B, 14 A is M-major, 15 B is N-major, bit 16 scale-d negated, bit 17
// satfinite. imm2: element of B
inline int op_wgmma(Ctx& c, const Inst& i) {
  Machine& m = *c.machine;
  if (c.mask != kFull && (m.checks & kSync)) m.report(c, i, kNotConverged, lowest(c.mask));
  const s32* o = m.program.lists + i.list;
  const Element ea = Element(i.imm & 15), eb = Element(i.imm2 & 15);
  const int acc = int(i.imm >> 8) & 15;
  const u32 n = i.n, bytes = ea == kElTF32 ? 4 : ea <= kElBF16 ? 2 : 1, depth = 32 / bytes;
  const u32 nd = acc == 1 ? n / 4 : n / 2;
  AsyncMatrix* later = m.checks & kRaces ? &begin_matrix(c, i) : nullptr;
  alignas(32) float A[16][32];
  alignas(32) Columns B;
  const int per = per_register(ea), span = 4 * per;
  if (i.o[1] == -1) {
    for (int q = 0; q < 4; q++) {
      alignas(32) float v[4][32];
      widen(reg<u32>(c, o[nd + u32(q)]), ea, v);
      for (int h = 0; h < per; h++)
        for (int l = 0; l < 32; l++)
          A[(l >> 2) + 8 * (q & 1)][(q >> 1) * span + (l & 3) * per + h] = v[h][l];
    }
  } else {
    Tile t = Tile::from(reg<u64>(c, i.o[1])[lowest(c.mask)], bytes, i.imm & 0x4000);
    read_a(c, i, t, ea, (c.warp->index & 3) * 16, depth, A, later);
  }
  Tile t = Tile::from(reg<u64>(c, i.o[2])[lowest(c.mask)], bytes, i.imm & 0x8000);
  read_b(c, i, t, eb, n, depth, B, later);
  const u32 keep = get_pred(c, i.o[3]) ^ (i.imm & 0x10000 ? kFull : 0);
  const bool scale = (keep >> lowest(c.mask)) & 1;
  if (((i.imm >> 12) ^ (i.imm >> 13)) & 1)
    for (auto& row : A)
      for (float& x : row) x = -x;
  if (m.checks & kCounts) m.count(i).flops += 2ull * 16 * n * depth;
  const auto part = acc == 2      ? wgmma_part<2, 32>
                    : acc == 1    ? depth == 16 ? wgmma_part<1, 16> : wgmma_part<1, 32>
                    : depth == 8  ? wgmma_part<0, 8>
                    : depth == 16 ? wgmma_part<0, 16>
                                  : wgmma_part<0, 32>;
  for (u32 q = 0; q < n; q += 8)
    for (u32 half = 0; half < 2; half++) {
      u32* x = reg<u32>(c, o[acc == 1 ? q / 4 + half : q / 2 + 2 * half]);
      u32* y = acc == 1 ? nullptr : reg<u32>(c, o[q / 2 + 2 * half + 1]);
      part(x, y, A + 8 * half, B[q / 8], scale, i.imm & 0x20000);
    }
  return kGo;
}

}  // namespace emu::EMU_ISA
