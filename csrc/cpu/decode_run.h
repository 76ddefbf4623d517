// A run of consecutive values decoded in order, for whoever needs them: dequantization, panels for
// a matmul, strips of a tile kernel.
#pragma once
#include "kernels.h"
#include "simd.h"

namespace qlk {
namespace QLK_ISA {

// How a value becomes a T: rounded to T (as dequantize says), or rounded to bf16 and widened to
// fp32, for matmuls in fp32 whose weights are bf16.
enum class Rounding { once, through_bf16 };

template <typename T>
struct IsFloat {
  static constexpr bool value = false;
};
template <>
struct IsFloat<float> {
  static constexpr bool value = true;
};

template <typename T, Rounding kRounding>
QLK_INLINE void decode_scalar(const Weight& w, int64_t begin, int64_t end, T* out) {
  for (int64_t i = begin; i < end; ++i) {
    const uint8_t byte = w.packed[i >> 1];
    const int code = i & 1 ? later_code(byte) : earlier_code(byte);
    float v = w.codebook[code] * load_scale(w.scales, i >> w.block_log2);
    if (kRounding == Rounding::through_bf16) {
      bf16 rounded;
      round_to(v, &rounded);
      v = to_float(rounded);
    }
    round_to(v, out + (i - begin));
  }
}

QLK_INLINE void stream_floats(float* out, Floats v) {
#if QLK_LEVEL >= 2
  _mm512_stream_ps(out, v);
#elif QLK_LEVEL == 1
  _mm256_stream_ps(out, v);
#else
  store(out, v);
#endif
}

// Values [begin, end) to out[0 ...]. `stream`: out is aligned to 64 bytes and written past the
// cache.
template <typename T, Rounding kRounding = Rounding::once>
QLK_INLINE void decode_run(const Weight& w, const Codebook& book, int64_t begin, int64_t end,
                           T* out, bool stream = false) {
  const int64_t aligned = (begin + 31) & ~int64_t{31};
  int64_t i = aligned < end ? aligned : end;
  decode_scalar<T, kRounding>(w, begin, i, out);
  out += i - begin;
  constexpr bool kTable = !IsFloat<T>::value || kRounding == Rounding::through_bf16;
  while (i + 32 <= end) {
    if (kTable && w.block_log2 >= 6) {
      // To the end of the block: its values are rounded once, in a table of 16.
      const int64_t block = i >> w.block_log2;
      const int64_t block_end = (block + 1) << w.block_log2;
      const int64_t stop = block_end < end ? block_end : end;
      const float scale = load_scale(w.scales, block);
      if constexpr (IsFloat<T>::value) {
        const Table16 t = scaled_table<bf16>(book, scale);
        for (; i + 32 <= stop; i += 32, out += 32) widen32(t, w.packed + i / 2, out);
      } else {
        const Table16 t = scaled_table<T>(book, scale);
        if (stream)
          for (; i + 32 <= stop; i += 32, out += 32) stream32(t, w.packed + i / 2, out);
        else
          for (; i + 32 <= stop; i += 32, out += 32) lookup32(t, w.packed + i / 2, out);
      }
      if (i < stop) break;
      continue;
    }
    // Blocks of 16 give a group of 32 two scales, all others one.
    const Floats first = splat(load_scale(w.scales, i >> w.block_log2));
    const Floats second = w.block_log2 == 4 ? splat(load_scale(w.scales, (i >> 4) + 1)) : first;
    const int64_t block_end = ((i >> w.block_log2) + 1) << w.block_log2;
    const int64_t stop = w.block_log2 <= 5 ? i + 32 : block_end < end ? block_end : end;
    for (; i + 32 <= stop; i += 32, out += 32) {
      Floats v[kVectors32];
      lookup32(book, w.packed + i / 2, v);
      for (int j = 0; j < kVectors32; ++j) {
        v[j] = mul(v[j], j * kLanes < 16 ? first : second);
        if constexpr (IsFloat<T>::value) {
          if (kRounding == Rounding::through_bf16) {
            bf16 t[kLanes];
            store(t, v[j]);
            v[j] = load(t);
          }
          if (stream)
            stream_floats(out + j * kLanes, v[j]);
          else
            store(out + j * kLanes, v[j]);
        } else {
          store(out + j * kLanes, v[j]);
        }
      }
    }
    if (i < stop) break;
  }
  decode_scalar<T, kRounding>(w, i, end, out);
}

}  // namespace QLK_ISA
}  // namespace qlk
