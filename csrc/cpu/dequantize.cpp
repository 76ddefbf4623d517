// Dequantization, nested scales decoded on the way, and the conversions around the matmuls.
//
// fp32: 32 values at a time, 16 bytes in, one codebook lookup (simd.h), one product with the
// block's scale. 16 bits: a block's 16 possible values are scaled and rounded once into a table,
// and 64 weights are 64 lookups. Half a byte and 1/64 of a scale are read for each value and 2 or 4
// bytes written, so the write is what it costs; results larger than the cache are streamed past it,
// which saves reading the lines that are about to be overwritten.
//
// Exact: one fp32 product, rounded once to nearest even, denormals kept.
#include "decode_run.h"
#include "functions.h"

namespace qlk {
namespace QLK_ISA {

template <typename T>
static void dequantize_typed(const Weight& w, int64_t begin, int64_t end, T* out, bool stream) {
  const Codebook book = Codebook::make(w.codebook);
#if QLK_LEVEL >= 1
  if (stream && ((uintptr_t)out & 63) == 0 && (begin & 31) == 0) {
    decode_run(w, book, begin, end, out, true);
    _mm_sfence();
    return;
  }
#endif
  (void)stream;
  decode_run(w, book, begin, end, out);
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

void decode_panel(const Weight& w, int64_t row_length, int64_t col, int64_t begin, int64_t end,
                  int64_t cols, DType round, void* out, DType element, int64_t ld) {
  const Codebook book = Codebook::make(w.codebook);
  for (int64_t r = begin; r < end; ++r) {
    const int64_t at = r * row_length + col, last = at + cols, to = (r - begin) * ld;
    if (element == DType::bf16) {
      decode_run(w, book, at, last, (bf16*)out + to);
    } else if (round == DType::bf16) {
      decode_run<float, Rounding::through_bf16>(w, book, at, last, (float*)out + to);
    } else {
      float* row = (float*)out + to;
      decode_run(w, book, at, last, row);
      if (round == DType::f16)
        convert(row, DType::f32, cols, round, row, DType::f32, cols, 1, cols, false, 1.0f);
    }
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
    if (scale == 1.0f && sizeof(In) >= sizeof(Out) &&
        round == DType::f32) {  // one rounding at most
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
  const int64_t acc_size = acc_dtype == DType::f32 ? 4 : 2,
                out_size = out_dtype == DType::f32 ? 4 : 2;
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
