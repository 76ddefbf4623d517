// What lies between a block's linear layers: RMSNorm, and SwiGLU = silu(gate) * up. One pass over
// memory forward, one backward, where a chain of torch ops takes five to ten and keeps each result
// for the backward pass. Bound by memory: 2 to 5 streams of m * k elements.
//
// Numerics are those of the chains that transformers writes (LlamaRMSNorm, LlamaMLP): fp32 inside,
// rounded to the element type where the chain rounds what it hands on, so that the forward values
// agree to the sum's order. The backward pass rounds its results once.
//
// Element i of a row is computed alike wherever it stands, vectors and tails by the same formulas;
// a row's sums run over kLanes partial sums and a tail. The same bits for any number of threads.
#include "functions.h"

namespace qlk {
namespace QLK_ISA {

constexpr int kChunk = 256;  // elements widened to fp32 at a time, in L1

template <typename T>
QLK_INLINE void widen(const T* in, int count, float* out) {
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, load(in + i));
  for (; i < count; ++i) out[i] = to_float(in[i]);
}
template <typename T>
QLK_INLINE void narrow(const float* in, int count, T* out) {
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, load(in + i));
  for (; i < count; ++i) round_to(in[i], out + i);
}
// Rounded to T, still as fp32.
template <typename T>
QLK_INLINE void round_all(float* values, int count) {
  if constexpr (sizeof(T) < sizeof(float)) {
    T rounded[kChunk];
    narrow(values, count, rounded);
    widen(rounded, count, values);
  }
}

// e^x within 2 units in the last place for |x| <= 88, saturating beyond; the compiler vectorises
// it. x = n ln 2 + f; e^f by its series; 2^n by the exponent's bits.
QLK_INLINE float exp_clamped(float x) {
  x = x < 88.f ? x : 88.f;  // NaN becomes 88: the caller's own product still carries it
  x = x > -87.f ? x : -87.f;
  const float shifted = x * 1.44269504f + 12582912.f;  // 1.5 * 2^23: rounds to an integer
  const float n = shifted - 12582912.f;
  const float f = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.f / 5040;
  p = p * f + 1.f / 720;
  p = p * f + 1.f / 120;
  p = p * f + 1.f / 24;
  p = p * f + 1.f / 6;
  p = p * f + 0.5f;
  p = p * f + 1.f;
  p = p * f + 1.f;
  return as_float(as_bits(p) + (as_bits(shifted) << 23));
}
QLK_INLINE float sigmoid(float x) { return 1.f / (1.f + exp_clamped(-x)); }

// sum(a * b): kLanes partial sums, their halving tree, then the tail.
QLK_INLINE float dot_row(const float* a, const float* b, int count, float start) {
  Floats sums = zero();
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) sums = fma(load(a + i), load(b + i), sums);
  float total = start + sum(sums);
  for (; i < count; ++i) total += a[i] * b[i];
  return total;
}

QLK_INLINE int chunk(int64_t left) { return left < kChunk ? (int)left : kChunk; }

// --- RMSNorm ------------------------------------------------------------------------------------

template <typename T>
static void rms_norm_typed(const T* x, const T* weight, float eps, int64_t k, int64_t begin,
                           int64_t end, T* y, float* rstd) {
  float v[kChunk], w[kChunk];
  for (int64_t r = begin; r < end; ++r) {
    const T* row = x + r * k;
    float squares = 0.f;
    for (int64_t c = 0; c < k; c += kChunk) {
      const int count = chunk(k - c);
      widen(row + c, count, v);
      squares = dot_row(v, v, count, squares);
    }
    const float scale = 1.f / __builtin_sqrtf(squares / (float)k + eps);
    rstd[r] = scale;
    for (int64_t c = 0; c < k; c += kChunk) {
      const int count = chunk(k - c);
      widen(row + c, count, v);
      for (int i = 0; i < count; ++i) v[i] *= scale;
      round_all<T>(v, count);
      widen(weight + c, count, w);
      for (int i = 0; i < count; ++i) v[i] *= w[i];
      narrow(v, count, y + r * k + c);
    }
  }
}

// With h = x * rstd and g = dy * weight: dx = rstd * (g - h * mean(g * h)).
template <typename T>
static void rms_norm_backward_typed(const T* dy, const T* x, const T* weight, const float* rstd,
                                    int64_t k, int64_t begin, int64_t end, T* dx) {
  float v[kChunk], g[kChunk], w[kChunk];
  for (int64_t r = begin; r < end; ++r) {
    const float scale = rstd[r];
    float along = 0.f;
    for (int64_t c = 0; c < k; c += kChunk) {
      const int count = chunk(k - c);
      widen(x + r * k + c, count, v);
      widen(dy + r * k + c, count, g);
      widen(weight + c, count, w);
      for (int i = 0; i < count; ++i) g[i] *= w[i];
      along = dot_row(g, v, count, along);
    }
    const float pull = along * scale * scale / (float)k;  // mean(g * h) * rstd, a unit of x
    for (int64_t c = 0; c < k; c += kChunk) {
      const int count = chunk(k - c);
      widen(x + r * k + c, count, v);
      widen(dy + r * k + c, count, g);
      widen(weight + c, count, w);
      for (int i = 0; i < count; ++i) v[i] = scale * (g[i] * w[i] - v[i] * pull);
      narrow(v, count, dx + r * k + c);
    }
  }
}

// --- SwiGLU -------------------------------------------------------------------------------------

template <typename T>
static void swiglu_typed(const T* gate, const T* up, int64_t begin, int64_t end, T* y) {
  float g[kChunk], u[kChunk];
  for (int64_t c = begin; c < end; c += kChunk) {
    const int count = chunk(end - c);
    widen(gate + c, count, g);
    for (int i = 0; i < count; ++i) g[i] *= sigmoid(g[i]);
    round_all<T>(g, count);
    widen(up + c, count, u);
    for (int i = 0; i < count; ++i) g[i] *= u[i];
    narrow(g, count, y + c);
  }
}

// With s = sigmoid(gate): dup = dy * gate * s, dgate = dy * up * s * (1 + gate * (1 - s)).
template <typename T>
static void swiglu_backward_typed(const T* dy, const T* gate, const T* up, int64_t begin,
                                  int64_t end, T* dgate, T* dup) {
  float d[kChunk], g[kChunk], u[kChunk];
  for (int64_t c = begin; c < end; c += kChunk) {
    const int count = chunk(end - c);
    widen(dy + c, count, d);
    widen(gate + c, count, g);
    widen(up + c, count, u);
    for (int i = 0; i < count; ++i) {
      const float s = sigmoid(g[i]);
      u[i] *= d[i] * (s * (1.f + g[i] * (1.f - s)));
      d[i] *= g[i] * s;
    }
    narrow(u, count, dgate + c);
    narrow(d, count, dup + c);
  }
}

// --- by element type ----------------------------------------------------------------------------

#define QLK_BY_DTYPE(dtype, CALL) \
  switch (dtype) {                \
    case DType::f32: {            \
      using T = float;            \
      return CALL;                \
    }                             \
    case DType::bf16: {           \
      using T = bf16;             \
      return CALL;                \
    }                             \
    case DType::f16: {            \
      using T = fp16;             \
      return CALL;                \
    }                             \
  }

void rms_norm(const void* x, const void* weight, DType dtype, float eps, int64_t k, int64_t begin,
              int64_t end, void* y, float* rstd) {
  QLK_BY_DTYPE(dtype,
               rms_norm_typed((const T*)x, (const T*)weight, eps, k, begin, end, (T*)y, rstd))
}
void rms_norm_backward(const void* dy, const void* x, const void* weight, DType dtype,
                       const float* rstd, int64_t k, int64_t begin, int64_t end, void* dx) {
  QLK_BY_DTYPE(dtype, rms_norm_backward_typed((const T*)dy, (const T*)x, (const T*)weight, rstd, k,
                                              begin, end, (T*)dx))
}
void swiglu(const void* gate, const void* up, DType dtype, int64_t begin, int64_t end, void* y) {
  QLK_BY_DTYPE(dtype, swiglu_typed((const T*)gate, (const T*)up, begin, end, (T*)y))
}
void swiglu_backward(const void* dy, const void* gate, const void* up, DType dtype, int64_t begin,
                     int64_t end, void* dgate, void* dup) {
  QLK_BY_DTYPE(dtype, swiglu_backward_typed((const T*)dy, (const T*)gate, (const T*)up, begin, end,
                                            (T*)dgate, (T*)dup))
}

}  // namespace QLK_ISA
}  // namespace qlk
