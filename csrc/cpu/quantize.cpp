// Blockwise 4-bit quantization and the 8-bit quantization of its scales.
//
// One pass over memory: a block (64 values by default) is read twice, the second time from L1.
//   1. the largest magnitude, by an integer maximum of the bit patterns (so that NaN wins)
//   2. w * (1 / absmax), clamped, ranked by four vector comparisons, coded, packed 32 at a time
// Cost on AVX2: about 30 instructions for 8 values; on two cores faster than the memory delivers
// them only with AVX-512.
//
// Exact: every step rounds as reference.quantize does, so the bytes agree bit for bit.
#include "functions.h"

namespace qlk {
namespace QLK_ISA {

template <typename T>
static float block_absmax(const T* a, int64_t count) {
  Bits best = no_bits();
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) best = max_magnitude(best, load(a + i));
  uint32_t tail = 0;
  for (; i < count; ++i) {
    const uint32_t bits = as_bits(to_float(a[i])) & 0x7fffffff;
    tail = bits > tail ? bits : tail;
  }
  const float vector = max_lane(best);
  return as_bits(vector) > tail ? vector : as_float(tail);
}

QLK_INLINE float at_least_min(float absmax) {  // NaN stays
  return absmax < kMinAbsmax ? kMinAbsmax : absmax;
}

template <typename T>
static void quantize_block(const Ranker& ranker, const CodeOrder& order, const T* a, int64_t count,
                           float reciprocal, uint8_t* packed) {
  const Floats factor = splat(reciprocal);
  for (int64_t i = 0; i < count; i += 32) {
    Ranks r[kVectors32];
    for (int j = 0; j < kVectors32; ++j)
      r[j] = rank(ranker, clamp1(mul(load(a + i + j * kLanes), factor)));
    pack32(order, r, packed + i / 2);
  }
}

template <typename T>
static void quantize_typed(const T* a, int64_t count, const float* thresholds, const uint8_t* codes,
                           int block_log2, int64_t begin, int64_t end, uint8_t* packed,
                           float* absmax) {
  const Ranker ranker = Ranker::make(thresholds);
  const CodeOrder order = CodeOrder::make(codes);
  const int64_t blocksize = int64_t{1} << block_log2;
  int64_t block = begin;
  if (block_log2 == 4) {  // two blocks to a group of 32
    for (; block + 2 <= end && (block + 2) * 16 <= count; block += 2) {
      const T* first = a + block * 16;
      float factor[2];
      for (int h = 0; h < 2; ++h) {
        absmax[block + h] = block_absmax(first + 16 * h, 16);
        factor[h] = 1.0f / at_least_min(absmax[block + h]);
      }
      Ranks r[kVectors32];
      for (int j = 0; j < kVectors32; ++j) {
        const Floats f = splat(factor[j * kLanes / 16]);
        r[j] = rank(ranker, clamp1(mul(load(first + j * kLanes), f)));
      }
      pack32(order, r, packed + block * 8);
    }
  } else {
    for (; block < end && (block + 1) * blocksize <= count; ++block) {
      const T* first = a + block * blocksize;
      absmax[block] = block_absmax(first, blocksize);
      quantize_block(ranker, order, first, blocksize, 1.0f / at_least_min(absmax[block]),
                     packed + block * blocksize / 2);
    }
  }
  // What is left: a single block of 16, and a ragged block, which is divided and not multiplied.
  const int zero_code = codes[rank1(thresholds, 0.0f)];
  for (; block < end; ++block) {
    const int64_t start = block * blocksize;
    const int64_t size = count - start < blocksize ? count - start : blocksize;
    const bool ragged = size < blocksize;
    const float largest = block_absmax(a + start, size);
    const float divisor = at_least_min(largest);
    absmax[block] = ragged ? divisor : largest;
    const float reciprocal = 1.0f / divisor;
    for (int64_t i = 0; i < size; i += 2) {
      int code[2] = {zero_code, zero_code};
      for (int h = 0; h < 2 && i + h < size; ++h) {
        const float w = to_float(a[start + i + h]);
        float v = ragged ? w / divisor : w * reciprocal;
        v = v < -1.0f ? -1.0f : v;
        v = v > 1.0f ? 1.0f : v;
        code[h] = codes[rank1(thresholds, v)];
      }
      packed[(start + i) / 2] = pack_codes(code[0], code[1]);
    }
  }
}

void quantize(const void* a, DType dtype, int64_t count, const float* thresholds,
              const uint8_t* codes, int block_log2, int64_t begin, int64_t end, uint8_t* packed,
              float* absmax) {
  switch (dtype) {
    case DType::f32:
      return quantize_typed((const float*)a, count, thresholds, codes, block_log2, begin, end,
                            packed, absmax);
    case DType::bf16:
      return quantize_typed((const bf16*)a, count, thresholds, codes, block_log2, begin, end,
                            packed, absmax);
    case DType::f16:
      return quantize_typed((const fp16*)a, count, thresholds, codes, block_log2, begin, end,
                            packed, absmax);
  }
}

void quantize_absmax(const float* absmax, int64_t count, float offset, const float* thresholds,
                     int64_t begin, int64_t end, uint8_t* codes, float* nested_absmax) {
  for (int64_t group = begin; group < end; ++group) {
    const int64_t start = group * kNestedBlock;
    const int64_t size = count - start < kNestedBlock ? count - start : kNestedBlock;
    float largest = 0.0f;  // a NaN scale compares false and is passed over
    for (int64_t i = 0; i < size; ++i) {
      const float v = as_float(as_bits(absmax[start + i] - offset) & 0x7fffffff);
      largest = largest < v ? v : largest;
    }
    nested_absmax[group] = largest;
    const float reciprocal = 1.0f / largest;
    for (int64_t i = 0; i < size; ++i) {
      float v = (absmax[start + i] - offset) * reciprocal;
      v = v < -1.0f ? -1.0f : v;
      v = v > 1.0f ? 1.0f : v;
      int rank = 0;  // how many of the 255 thresholds lie below v, by halving
      for (int step = 128; step > 0; step >>= 1) rank += v > thresholds[rank + step - 1] ? step : 0;
      codes[start + i] = largest == 0.0f || v != v ? 0 : (uint8_t)rank;
    }
  }
}

}  // namespace QLK_ISA
}  // namespace qlk
