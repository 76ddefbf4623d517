// y = x W^T + bias + S B^T for few rows of x, straight from the packed weight.
//
// decode  (1 ... 4 rows): a row of W is streamed once from memory, 64 codes at a time, looked up
// and
//         multiplied with x, which was put in the order that the lookup produces, so that nothing
//         is ever interleaved. Codes are summed unscaled, a block's sum is scaled by its absmax:
//         one multiplication for 64 weights. Bound by DRAM (4.127 bits a weight) with AVX-512, by
//         the lookups with AVX2.
//
//             bytes b0 b1 ... b31  ->  earlier codes [w0 w2 w4 ...]   later codes [w1 w3 w5 ...]
//             x in pair order      ->          [x0 x2 x4 ...]                [x1 x3 x5 ...]
//
//         Variant (c) of the numerics. fp32: exact codes. bf16, one row: codes rounded to bf16 (a
//         relative error of at most 2^-8 each); more rows: variant (a), a block's 16 values scaled
//         and rounded. Against float64, with u = 2^-24:
//         |error| <= (K/lanes + 12) u sum|x w| (+ 2^-8 sum|x w| for bf16).
//
// tile    (5 ... 64 rows, and fewer where groups of 64 do not fit the rows): 16 rows of W at a time
// are decoded in strips of 256 columns into L1,
//         scaled and in order, and multiplied with all rows of x by a register tile of 4 x 3 (AVX2)
//         or 4 x 6 (AVX-512) dot products. A weight is decoded once whatever the number of rows.
//         Variant (b): fp32 code x fp32 scale; bf16 rounds that product once, variant (a).
//         |error| <= (K/lanes + 12) u sum|x w|, plus that rounding.
//
// LoRA and bias go into the same accumulators: S B^T is one more strip of columns.
#include "decode_run.h"
#include "functions.h"

namespace qlk {
namespace QLK_ISA {

QLK_INLINE float load1(const void* p, DType dtype, DType round, int64_t i) {
  float v;
  convert((const char*)p + i * size_of(dtype), dtype, 0, round, &v, DType::f32, 0, 1, 1, false,
          1.0f);
  return v;
}

QLK_INLINE void store1(void* p, DType dtype, int64_t i, float v) {
  switch (dtype) {
    case DType::f32:
      return round_to(v, (float*)p + i);
    case DType::bf16:
      return round_to(v, (bf16*)p + i);
    case DType::f16:
      return round_to(v, (fp16*)p + i);
  }
}

// --- decode: one row ----------------------------------------------------------------------------

void pair_order(const void* x, DType dtype, DType round, int64_t rows, int64_t k, void* out,
                bool as_bf16) {
  (void)as_bf16;
  for (int64_t c = 0; c < rows * k; c += 64) {  // k is a multiple of 64: groups stay within rows
    float values[64];
    convert((const char*)x + c * size_of(dtype), dtype, 0, round, values, DType::f32, 0, 1, 64,
            false, 1.0f);
#if QLK_LEVEL == 3
    if (as_bf16) {
      for (int j = 0; j < 64; ++j) round_to(values[pair_position16(j)], (bf16*)out + c + j);
      continue;
    }
#endif
    for (int j = 0; j < 64; ++j) ((float*)out)[c + j] = values[pair_position(j)];
  }
}

// fp32 scales of `count` consecutive groups of 64 values that start at group `first`.
QLK_INLINE void group_scales(const Weight& w, int64_t first, int64_t count, float* out) {
  const int shift = w.block_log2 - 6;
  const Scales s = w.scales;
  if (s.absmax != nullptr) {
    for (int64_t g = 0; g < count; ++g) out[g] = s.absmax[(first + g) >> shift];
  } else {
    for (int64_t g = 0; g < count; ++g) out[g] = load_scale(s, (first + g) >> shift);
  }
}

// Adds a group's 64 products to M running sums, one for each row of x.
struct PairsF32 {
  typedef float Element;
  Codebook book;
  static PairsF32 make(const float* b) { return {Codebook::make(b)}; }
  template <int M>
  inline __attribute__((always_inline)) void add64(const uint8_t* bytes, float scale,
                                                   const float* x, int64_t ldx,
                                                   Floats total[M]) const {
    Floats v[kPairVectors];
    lookup64(book, bytes, v);
    const Floats factor = splat(scale);
    for (int m = 0; m < M; ++m, x += ldx) {
      Floats first = mul(v[0], load(x)), second = mul(v[1], load(x + kLanes));
      for (int j = 2; j < kPairVectors; j += 2) {
        first = fma(v[j], load(x + j * kLanes), first);
        second = fma(v[j + 1], load(x + (j + 1) * kLanes), second);
      }
      total[m] = fma(factor, add(first, second), total[m]);
    }
  }
};
#if QLK_LEVEL == 3
struct PairsBf16 {
  typedef bf16 Element;
  Codebook book;
  Codebook16 codes;
  static PairsBf16 make(const float* b) { return {Codebook::make(b), Codebook16::make(b)}; }
  template <int M>
  inline __attribute__((always_inline)) void add64(const uint8_t* bytes, float scale, const bf16* x,
                                                   int64_t ldx, Floats total[M]) const {
    Bf16s v[2];
    if (M == 1) {  // unscaled codes: one product for the block
      lookup64(codes, bytes, v);
      const Floats dot =
          dot_pairs(v[1], load_pairs(x + 32), dot_pairs(v[0], load_pairs(x), zero()));
      total[0] = fma(splat(scale), dot, total[0]);
      return;
    }
    lookup64(scaled_pairs(book, scale), bytes, v);  // exact weights: 16 products for the block
    for (int m = 0; m < M; ++m, x += ldx)
      total[m] = dot_pairs(v[1], load_pairs(x + 32), dot_pairs(v[0], load_pairs(x), total[m]));
  }
};
#endif

template <typename Pairs, int M>
static void decode_rows(const LinearArgs& a, int64_t begin, int64_t end) {
  const Pairs pairs = Pairs::make(a.w.codebook);
  const typename Pairs::Element* x = (const typename Pairs::Element*)a.x;
  const int64_t groups = a.k / 64;
  constexpr int64_t kGroups = 256;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t first = row * groups;
    Floats total[M];
    for (int m = 0; m < M; ++m) total[m] = zero();
    for (int64_t g0 = 0; g0 < groups; g0 += kGroups) {
      float scales[kGroups];
      const int64_t count = groups - g0 < kGroups ? groups - g0 : kGroups;
      group_scales(a.w, first + g0, count, scales);
      const uint8_t* bytes = a.w.packed + (first + g0) * 32;
      for (int64_t g = 0; g < count; ++g)
        pairs.template add64<M>(bytes + g * 32, scales[g], x + (g0 + g) * 64, a.ldx, total);
    }
    float lora[M] = {0};
    if (a.s != nullptr) {
      constexpr int64_t kWidth = 512;
      float b[kWidth];
      for (int64_t r = 0; r < a.rank; r += kWidth) {
        const int64_t width = a.rank - r < kWidth ? a.rank - r : kWidth;
        convert((const char*)a.b + (row * a.rank + r) * size_of(a.b_dtype), a.b_dtype, 0, a.b_round,
                b, DType::f32, 0, 1, width, false, 1.0f);
        for (int m = 0; m < M; ++m) {
          const float* s = a.s + m * a.rank + r;
          Floats dot = zero();
          int64_t i = 0;
          for (; i + kLanes <= width; i += kLanes) dot = fma(load(b + i), load(s + i), dot);
          lora[m] += sum(dot);
          for (; i < width; ++i) lora[m] += b[i] * s[i];
        }
      }
    }
    const float bias = a.bias != nullptr ? load1(a.bias, a.bias_dtype, a.bias_round, row) : 0.0f;
    for (int m = 0; m < M; ++m)
      store1(a.y, a.y_dtype, m * a.n + row, sum(total[m]) + lora[m] + bias);
  }
}

template <typename Pairs>
static void decode_any(const LinearArgs& a, int64_t begin, int64_t end) {
  switch (a.m) {
    case 1:
      return decode_rows<Pairs, 1>(a, begin, end);
    case 2:
      return decode_rows<Pairs, 2>(a, begin, end);
    case 3:
      return decode_rows<Pairs, 3>(a, begin, end);
    case 4:
      return decode_rows<Pairs, 4>(a, begin, end);
  }
}

void decode(const LinearArgs& a, int64_t begin, int64_t end) {
  decode_any<PairsF32>(a, begin, end);
}

// --- tile: a few rows ---------------------------------------------------------------------------

constexpr int kRows = 16;    // rows of W decoded together
constexpr int kStrip = 256;  // columns decoded at a time: 16 x 256 fp32 is half an L1
#if QLK_LEVEL >= 2
constexpr int kXRows = 6;
#else
constexpr int kXRows = 3;
#endif

struct DotF32 {
  typedef float Element;
  typedef Floats Vector;
  static constexpr int kWidth = kLanes;
  static constexpr DType kDType = DType::f32;
  QLK_INLINE Vector get(const float* p) { return load(p); }
  QLK_INLINE Floats dot(Vector w, Vector x, Floats sum) { return fma(w, x, sum); }
};
#if QLK_LEVEL == 3
struct DotBf16 {
  typedef bf16 Element;
  typedef Bf16s Vector;
  static constexpr int kWidth = 32;
  static constexpr DType kDType = DType::bf16;
  QLK_INLINE Vector get(const bf16* p) { return load_pairs(p); }
  QLK_INLINE Floats dot(Vector w, Vector x, Floats sum) { return dot_pairs(w, x, sum); }
};
#endif

// acc[m][r] += x[m] . w[r] for 4 rows of w and M rows of x.
template <typename Dot, int M>
QLK_INLINE void dot_tile(const typename Dot::Element* w, const typename Dot::Element* x,
                         int64_t ldx, int64_t width, Floats* acc) {
  Floats sum[M][4];
  for (int m = 0; m < M; ++m)
    for (int r = 0; r < 4; ++r) sum[m][r] = acc[m * 4 + r];
  for (int64_t c = 0; c < width; c += Dot::kWidth) {
    typename Dot::Vector xv[M];
    for (int m = 0; m < M; ++m) xv[m] = Dot::get(x + m * ldx + c);
    for (int r = 0; r < 4; ++r) {
      const typename Dot::Vector wv = Dot::get(w + r * kStrip + c);
      for (int m = 0; m < M; ++m) sum[m][r] = Dot::dot(wv, xv[m], sum[m][r]);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int r = 0; r < 4; ++r) acc[m * 4 + r] = sum[m][r];
}

template <typename Dot>
static void dot_strip(const typename Dot::Element* w, const typename Dot::Element* x, int64_t ldx,
                      int64_t m, int64_t width, Floats* acc) {
  for (int group = 0; group < kRows / 4; ++group, w += 4 * kStrip, acc += 4 * m) {
    int64_t i = 0;
    for (; i + kXRows <= m; i += kXRows)
      dot_tile<Dot, kXRows>(w, x + i * ldx, ldx, width, acc + 4 * i);
#if QLK_LEVEL >= 2
    if (i + 4 <= m) {
      dot_tile<Dot, 4>(w, x + i * ldx, ldx, width, acc + 4 * i);
      i += 4;
    }
#endif
    if (i + 2 <= m) {
      dot_tile<Dot, 2>(w, x + i * ldx, ldx, width, acc + 4 * i);
      i += 2;
    }
    if (i < m) dot_tile<Dot, 1>(w, x + i * ldx, ldx, width, acc + 4 * i);
  }
}

template <typename Dot>
static void tile_rows(const LinearArgs& a, int64_t begin, int64_t end) {
  typedef typename Dot::Element Element;
  constexpr int64_t kMaxRows = 64;
  alignas(64) static thread_local Floats acc[kMaxRows * kRows];
  alignas(64) static thread_local Element strip[kRows * kStrip];
  const Element* x = (const Element*)a.x;
  const Codebook book = Codebook::make(a.w.codebook);
  for (int64_t row = begin; row < end; row += kRows) {
    const int64_t rows = end - row < kRows ? end - row : kRows;
    for (int64_t i = 0; i < a.m * kRows; ++i) acc[i] = zero();
    for (int64_t i = rows * kStrip; i < kRows * kStrip; ++i) strip[i] = Element{};
    for (int64_t c = 0; c < a.k; c += kStrip) {
      const int64_t width = a.k - c < kStrip ? a.k - c : kStrip;
      const int64_t padded = (width + Dot::kWidth - 1) / Dot::kWidth * Dot::kWidth;
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t at = (row + r) * a.k + c;
        Element* out = strip + r * kStrip;
        decode_run(a.w, book, at, at + width, out);
        for (int64_t i = width; i < padded; ++i) out[i] = Element{};
      }
      dot_strip<Dot>(strip, x + c, a.ldx, a.m, padded, acc);
    }
    if (a.s != nullptr) {  // S follows x in each of its rows
      const Element* s = x + (a.ldx - a.lds);
      for (int64_t c = 0; c < a.rank; c += kStrip) {
        const int64_t width = a.rank - c < kStrip ? a.rank - c : kStrip;
        const int64_t padded = (width + Dot::kWidth - 1) / Dot::kWidth * Dot::kWidth;
        for (int64_t r = 0; r < rows; ++r)
          convert((const char*)a.b + ((row + r) * a.rank + c) * size_of(a.b_dtype), a.b_dtype, 0,
                  a.b_round, strip + r * kStrip, Dot::kDType, padded, 1, width, true, 1.0f);
        dot_strip<Dot>(strip, s + c, a.ldx, a.m, padded, acc);
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      const float bias =
          a.bias != nullptr ? load1(a.bias, a.bias_dtype, a.bias_round, row + r) : 0.0f;
      for (int64_t m = 0; m < a.m; ++m)
        store1(a.y, a.y_dtype, m * a.n + row + r, sum(acc[((r / 4) * a.m + m) * 4 + r % 4]) + bias);
    }
  }
}

void tile(const LinearArgs& a, int64_t begin, int64_t end) { tile_rows<DotF32>(a, begin, end); }

#if QLK_LEVEL == 3
void decode_bf16(const LinearArgs& a, int64_t begin, int64_t end) {
  decode_any<PairsBf16>(a, begin, end);
}
void tile_bf16(const LinearArgs& a, int64_t begin, int64_t end) {
  tile_rows<DotBf16>(a, begin, end);
}
#endif

}  // namespace QLK_ISA
}  // namespace qlk
