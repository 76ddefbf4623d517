// The inner loops of csrc/cpu, each in a function of its own, for avx512_model.py: compiled to
// assembly with the flags that CMakeLists.txt compiles the kernels with, never linked or run.
//
// The bodies are the kernels' own inline functions; only what surrounds them (row loops, tails) is
// left out. Each function holds one loop, and a comment says how many weights a trip takes.
// Blocks are of 64 with nested scales, as QLoRA has them.
#include "../csrc/cpu/dequantize.cpp"
#include "../csrc/cpu/linear.cpp"

namespace qlk {
namespace QLK_ISA {

template <typename Pairs, int M>
QLK_INLINE void decode_loop(const Pairs& pairs, const uint8_t* bytes, const float* scales,
                            const typename Pairs::Element* x, int64_t ldx, int64_t groups,
                            Floats* out) {
  Floats total[M];
  for (int m = 0; m < M; ++m) total[m] = zero();
  for (int64_t g = 0; g < groups; ++g)
    pairs.template add64<M>(bytes + g * 32, scales[g], x + g * 64, ldx, total);
  for (int m = 0; m < M; ++m) out[m] = total[m];
}

#define LOOP extern "C" __attribute__((visibility("default"), noinline)) void

// --- decode: 64 weights a trip ---
LOOP decode_f32_1(const PairsF32& p, const uint8_t* b, const float* s, const float* x, int64_t ldx,
                  int64_t n, Floats* out) {
  decode_loop<PairsF32, 1>(p, b, s, x, ldx, n, out);
}
LOOP decode_f32_4(const PairsF32& p, const uint8_t* b, const float* s, const float* x, int64_t ldx,
                  int64_t n, Floats* out) {
  decode_loop<PairsF32, 4>(p, b, s, x, ldx, n, out);
}
#if QLK_LEVEL == 3
LOOP decode_bf16_1(const PairsBf16& p, const uint8_t* b, const float* s, const bf16* x, int64_t ldx,
                   int64_t n, Floats* out) {
  decode_loop<PairsBf16, 1>(p, b, s, x, ldx, n, out);
}
LOOP decode_bf16_4(const PairsBf16& p, const uint8_t* b, const float* s, const bf16* x, int64_t ldx,
                   int64_t n, Floats* out) {
  decode_loop<PairsBf16, 4>(p, b, s, x, ldx, n, out);
}
#endif

// --- nested scales of consecutive groups: 64 weights a trip ---
LOOP scales(const Weight& w, int64_t first, int64_t count, float* out) {
  const Scales s = w.scales;
  if (s.absmax != nullptr) return;
  for (int64_t g = 0; g < count; ++g) out[g] = load_scale(s, first + g);
}

// A block's scale, known to be nested.
QLK_INLINE float nested_scale(const Weight& w, int64_t block) {
  if (w.scales.absmax != nullptr) __builtin_unreachable();
  return load_scale(w.scales, block);
}

// --- the strips of the tile kernel, and dequantization: 64 weights a trip, scale included ---
LOOP strip_f32(const Weight& w, const Codebook& book, int64_t blocks, float* out) {
  for (int64_t b = 0; b < blocks; ++b) {
    const Floats scale = splat(nested_scale(w, b));
    for (int half = 0; half < 2; ++half) {
      Floats v[kVectors32];
      lookup32(book, w.packed + b * 32 + half * 16, v);
      for (int j = 0; j < kVectors32; ++j)
        store(out + b * 64 + half * 32 + j * kLanes, mul(v[j], scale));
    }
  }
}
LOOP strip_bf16(const Weight& w, const Codebook& book, int64_t blocks, bf16* out) {
  for (int64_t b = 0; b < blocks; ++b) {
    const Table16 t = scaled_table<bf16>(book, nested_scale(w, b));
    lookup32(t, w.packed + b * 32, out + b * 64);
    lookup32(t, w.packed + b * 32 + 16, out + b * 64 + 32);
  }
}
LOOP dequantize_bf16(const Weight& w, const Codebook& book, int64_t blocks, bf16* out) {
  for (int64_t b = 0; b < blocks; ++b) {
    const Table16 t = scaled_table<bf16>(book, nested_scale(w, b));
    stream32(t, w.packed + b * 32, out + b * 64);
    stream32(t, w.packed + b * 32 + 16, out + b * 64 + 32);
  }
}

// --- 4 rows of decoded weights times M rows of x: 4 * Dot::kWidth weights a trip ---
LOOP dot_f32_full(const float* w, const float* x, int64_t ldx, int64_t n, Floats* acc) {
  dot_tile<DotF32, kXRows>(w, x, ldx, n, acc);
}
LOOP dot_f32_2(const float* w, const float* x, int64_t ldx, int64_t n, Floats* acc) {
  dot_tile<DotF32, 2>(w, x, ldx, n, acc);
}
LOOP dot_f32_1(const float* w, const float* x, int64_t ldx, int64_t n, Floats* acc) {
  dot_tile<DotF32, 1>(w, x, ldx, n, acc);
}
#if QLK_LEVEL >= 2
LOOP dot_f32_4(const float* w, const float* x, int64_t ldx, int64_t n, Floats* acc) {
  dot_tile<DotF32, 4>(w, x, ldx, n, acc);
}
#endif
#if QLK_LEVEL == 3
LOOP dot_bf16_full(const bf16* w, const bf16* x, int64_t ldx, int64_t n, Floats* acc) {
  dot_tile<DotBf16, kXRows>(w, x, ldx, n, acc);
}
LOOP dot_bf16_4(const bf16* w, const bf16* x, int64_t ldx, int64_t n, Floats* acc) {
  dot_tile<DotBf16, 4>(w, x, ldx, n, acc);
}
#endif

}  // namespace QLK_ISA
}  // namespace qlk
