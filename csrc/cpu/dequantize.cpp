// Dequantization, nested scales decoded on the way, and the conversions around the matmuls.
//
// 32 values at a time: 16 bytes in, one codebook lookup (simd.h), one multiplication by the block's
// fp32 scale, one rounding. Half a byte and 1/64 of a scale are read for each value and 2 or 4
// bytes written, so the write is what it costs; results larger than the cache are streamed past it,
// which saves reading the lines that are about to be overwritten.
//
// Exact: one fp32 product, rounded once to nearest even, denormals kept.
#include "kernels.h"
#include "simd.h"

namespace qlk {
namespace QLK_ISA {

template <typename T>
QLK_INLINE void dequantize_tail(const Weight& w, int64_t begin, int64_t end, T* out) {
  for (int64_t i = begin; i < end; ++i) {
    const uint8_t byte = w.packed[i >> 1];
    const int code = i & 1 ? later_code(byte) : earlier_code(byte);
    round_to(w.codebook[code] * load_scale(w.scales, i >> w.block_log2), out + (i - begin));
  }
}

template <typename T>
QLK_INLINE void stream32(T* out, const Floats v[kVectors32]) {
#if QLK_LEVEL >= 1
  alignas(64) T line[32];
  for (int j = 0; j < kVectors32; ++j) store(line + j * kLanes, v[j]);
  for (int j = 0; j < (int)(32 * sizeof(T) / 32); ++j)
    _mm256_stream_si256((__m256i*)out + j, _mm256_load_si256((const __m256i*)line + j));
#else
  for (int j = 0; j < kVectors32; ++j) store(out + j * kLanes, v[j]);
#endif
}

template <typename T>
static void dequantize_typed(const Weight& w, int64_t begin, int64_t end, T* out, bool stream) {
  const Codebook book = Codebook::make(w.codebook);
  const int64_t aligned = (begin + 31) & ~int64_t{31};
  int64_t i = aligned < end ? aligned : end;
  dequantize_tail(w, begin, i, out);
  out += i - begin;
  stream = stream && ((uintptr_t)out & 31) == 0;
  const int64_t per_scale = w.block_log2 == 4 ? 16 : 32;
  for (; i + 32 <= end;) {
    // All groups of 32 up to the block's end share its scale (blocks of 16: two scales a group).
    int64_t stop = w.block_log2 <= 5 ? i + 32 : ((i >> w.block_log2) + 1) << w.block_log2;
    stop = stop < end ? stop : end;
    Floats scale[2];
    scale[0] = splat(load_scale(w.scales, i >> w.block_log2));
    scale[1] = per_scale == 16 ? splat(load_scale(w.scales, (i >> 4) + 1)) : scale[0];
    for (; i + 32 <= stop; i += 32, out += 32) {
      Floats v[kVectors32];
      lookup32(book, w.packed + i / 2, v);
      for (int j = 0; j < kVectors32; ++j) v[j] = mul(v[j], scale[j * kLanes / 16]);
      if (stream)
        stream32(out, v);
      else
        for (int j = 0; j < kVectors32; ++j) store(out + j * kLanes, v[j]);
    }
  }
  dequantize_tail(w, i, end, out);
#if QLK_LEVEL >= 1
  if (stream) _mm_sfence();
#endif
}

void dequantize(const Weight& w, int64_t begin, int64_t end, DType dtype, void* out, bool stream) {
  switch (dtype) {
    case DType::f32:
      return dequantize_typed(w, begin, end, (float*)out, stream);
    case DType::bf16:
      return dequantize_typed(w, begin, end, (bf16*)out, stream);
    case DType::f16:
      return dequantize_typed(w, begin, end, (fp16*)out, stream);
  }
}

// --- conversions --------------------------------------------------------------------------------

QLK_INLINE Floats rounded(Floats v, DType round) {
  if (round == DType::bf16) {
    bf16 t[kLanes];
    store(t, v);
    return load(t);
  }
  if (round == DType::f16) {
    fp16 t[kLanes];
    store(t, v);
    return load(t);
  }
  return v;
}
QLK_INLINE float rounded1(float v, DType round) {
  if (round == DType::bf16) {
    bf16 t;
    round_to(v, &t);
    return to_float(t);
  }
  if (round == DType::f16) {
    fp16 t;
    round_to(v, &t);
    return to_float(t);
  }
  return v;
}

template <typename In, typename Out>
static void convert_typed(const In* in, int64_t ld_in, DType round, Out* out, int64_t ld_out,
                          int64_t rows, int64_t cols, bool pad, float scale) {
  const Floats factor = splat(scale);
  for (int64_t r = 0; r < rows; ++r, in += ld_in, out += ld_out) {
    int64_t c = 0;
    if (scale == 1.0f && sizeof(In) >= sizeof(Out) && round == DType::f32) {  // one rounding at most
      for (; c + kLanes <= cols; c += kLanes) store(out + c, load(in + c));
    }
    for (; c + kLanes <= cols; c += kLanes)
      store(out + c, mul(rounded(load(in + c), round), factor));
    for (; c < cols; ++c) round_to(rounded1(to_float(in[c]), round) * scale, out + c);
    if (pad)
      for (; c < ld_out; ++c) round_to(0.0f, out + c);
  }
}

template <typename In>
static void convert_from(const In* in, int64_t ld_in, DType round, void* out, DType out_dtype,
                         int64_t ld_out, int64_t rows, int64_t cols, bool pad, float scale) {
  switch (out_dtype) {
    case DType::f32:
      return convert_typed(in, ld_in, round, (float*)out, ld_out, rows, cols, pad, scale);
    case DType::bf16:
      return convert_typed(in, ld_in, round, (bf16*)out, ld_out, rows, cols, pad, scale);
    case DType::f16:
      return convert_typed(in, ld_in, round, (fp16*)out, ld_out, rows, cols, pad, scale);
  }
}

void convert(const void* in, DType in_dtype, int64_t ld_in, DType round, void* out, DType out_dtype,
             int64_t ld_out, int64_t rows, int64_t cols, bool pad, float scale) {
  switch (in_dtype) {
    case DType::f32:
      return convert_from((const float*)in, ld_in, round, out, out_dtype, ld_out, rows, cols, pad,
                          scale);
    case DType::bf16:
      return convert_from((const bf16*)in, ld_in, round, out, out_dtype, ld_out, rows, cols, pad,
                          scale);
    case DType::f16:
      return convert_from((const fp16*)in, ld_in, round, out, out_dtype, ld_out, rows, cols, pad,
                          scale);
  }
}

template <typename Acc, typename Out>
static void finish_typed(const Acc* acc, int64_t ld_acc, const float* bias, Out* out,
                         int64_t ld_out, int64_t rows, int64_t cols) {
  for (int64_t r = 0; r < rows; ++r, acc += ld_acc, out += ld_out) {
    int64_t c = 0;
    if (bias == nullptr) {
      for (; c + kLanes <= cols; c += kLanes) store(out + c, load(acc + c));
      for (; c < cols; ++c) round_to(to_float(acc[c]), out + c);
    } else {
      for (; c + kLanes <= cols; c += kLanes) store(out + c, add(load(acc + c), load(bias + c)));
      for (; c < cols; ++c) round_to(to_float(acc[c]) + bias[c], out + c);
    }
  }
}

template <typename Acc>
static void finish_from(const Acc* acc, int64_t ld_acc, const float* bias, void* out,
                        DType out_dtype, int64_t ld_out, int64_t rows, int64_t cols) {
  switch (out_dtype) {
    case DType::f32:
      return finish_typed(acc, ld_acc, bias, (float*)out, ld_out, rows, cols);
    case DType::bf16:
      return finish_typed(acc, ld_acc, bias, (bf16*)out, ld_out, rows, cols);
    case DType::f16:
      return finish_typed(acc, ld_acc, bias, (fp16*)out, ld_out, rows, cols);
  }
}

void finish(const void* acc, DType acc_dtype, int64_t ld_acc, const void* bias, DType bias_dtype,
            DType bias_round, void* out, DType out_dtype, int64_t ld_out, int64_t rows,
            int64_t cols) {
  // In strips, so that the converted bias fits on the stack.
  constexpr int64_t kStrip = 1024;
  float strip[kStrip];
  const int64_t acc_size = acc_dtype == DType::f32 ? 4 : 2, out_size = out_dtype == DType::f32 ? 4 : 2;
  const int64_t bias_size = bias_dtype == DType::f32 ? 4 : 2;
  for (int64_t c = 0; c < cols; c += kStrip) {
    const int64_t width = cols - c < kStrip ? cols - c : kStrip;
    if (bias != nullptr)
      convert((const char*)bias + c * bias_size, bias_dtype, 0, bias_round, strip, DType::f32, 0, 1,
              width, false, 1.0f);
    const float* b = bias != nullptr ? strip : nullptr;
    const char* from = (const char*)acc + c * acc_size;
    char* to = (char*)out + c * out_size;
    if (acc_dtype == DType::f32)
      finish_from((const float*)from, ld_acc, b, to, out_dtype, ld_out, rows, width);
    else
      finish_from((const bf16*)from, ld_acc, b, to, out_dtype, ld_out, rows, width);
  }
}

template <typename T>
static float dot_typed(const T* a, DType round, const float* x, int64_t count) {
  Floats acc[2] = {zero(), zero()};
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes)
    for (int j = 0; j < 2; ++j)
      acc[j] = fma(rounded(load(a + i + j * kLanes), round), load(x + i + j * kLanes), acc[j]);
  float total = sum(add(acc[0], acc[1]));
  for (; i < count; ++i) total += rounded1(to_float(a[i]), round) * x[i];
  return total;
}

float dot(const void* a, DType dtype, DType round, const float* x, int64_t count) {
  switch (dtype) {
    case DType::f32:
      return dot_typed((const float*)a, round, x, count);
    case DType::bf16:
      return dot_typed((const bf16*)a, round, x, count);
    default:
      return dot_typed((const fp16*)a, round, x, count);
  }
}

}  // namespace QLK_ISA
}  // namespace qlk
