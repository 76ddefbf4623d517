// The arguments of the torch ops, checked: one truth for the CPU's half and the CUDA half. What is
// here reads sizes and dtypes only, never a tensor's memory, which may be a GPU's.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <vector>

#include "block_format.h"
#include "dtype.h"

namespace qlk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(ScalarType t, const char* what) {
  switch (t) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    default:
      STD_TORCH_CHECK(false, what, " must be float32, bfloat16 or float16");
      return DType::f32;
  }
}
inline DType dtype_of(const Tensor& t, const char* what) { return dtype_of(t.scalar_type(), what); }

inline int block_log2(int64_t blocksize) {
  for (int log2 = kMinBlockLog2; log2 <= kMaxBlockLog2; ++log2)
    if (blocksize == int64_t{1} << log2) return log2;
  STD_TORCH_CHECK(false, "blocksize must be a power of two from 16 to 4096, got ", blocksize);
  return 0;
}

inline const float* floats(const Tensor& t, int64_t count, const char* what) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.numel() == count && t.is_contiguous(),
                  what, " must be contiguous float32 with ", count, " values");
  return static_cast<const float*>(t.const_data_ptr());
}

// A packed weight's arguments as pointers, wherever they point. `offset` is the nested scales' mean
// or the e4m3 scales' factor.
struct PackedWeight {
  const uint8_t* packed;
  const float* codebook;
  ScaleKind kind;
  const void* absmax;
  const float* nested_absmax;
  const float* nested_code;
  const float* offset;
  int64_t blocks;
  int block_log2;
};

// Checks them against each other. Holds references to what the result points into.
struct WeightArgs {
  const Tensor& packed;
  const Tensor& absmax;
  const Tensor& codebook;
  int64_t blocksize;
  const std::optional<Tensor>& nested_absmax;
  const std::optional<Tensor>& nested_code;
  const std::optional<Tensor>& nested_offset;

  PackedWeight checked(int64_t count) const {
    PackedWeight w{};
    w.block_log2 = block_log2(blocksize);
    STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Byte && packed.is_contiguous(),
                    "packed must be contiguous uint8");
    STD_TORCH_CHECK(packed.numel() == (count + 1) / 2, "packed holds ", packed.numel(),
                    " bytes, but ", count, " values need ", (count + 1) / 2);
    w.packed = static_cast<const uint8_t*>(packed.const_data_ptr());
    w.codebook = floats(codebook, kCodebookSize, "codebook");
    w.blocks = ceil_div(count, blocksize);
    STD_TORCH_CHECK(absmax.numel() == w.blocks, "absmax holds ", absmax.numel(), " scales, but ",
                    count, " values in blocks of ", blocksize, " need ", w.blocks);
    STD_TORCH_CHECK(absmax.is_contiguous(), "absmax must be contiguous");
    w.absmax = absmax.const_data_ptr();
    switch (absmax.scalar_type()) {
      case ScalarType::Float:
        w.kind = ScaleKind::fp32;
        break;
      case ScalarType::Char:  // torch 2.10's stable ABI has no word for float8_e8m0fnu
        w.kind = nested_offset ? ScaleKind::e4m3 : ScaleKind::e8m0;
        if (nested_offset) w.offset = floats(*nested_offset, 1, "nested_offset");
        break;
      case ScalarType::Byte:
        w.kind = ScaleKind::nested;
        STD_TORCH_CHECK(
            nested_absmax && nested_code && nested_offset,
            "absmax is uint8, so nested_absmax, nested_code and nested_offset must be given");
        w.nested_absmax = floats(*nested_absmax, ceil_div(w.blocks, kNestedBlock), "nested_absmax");
        w.nested_code = floats(*nested_code, kNestedCodeSize, "nested_code");
        w.offset = floats(*nested_offset, 1, "nested_offset");
        break;
      default:
        STD_TORCH_CHECK(
            false,
            "absmax must be float32, uint8 with nested scales, or int8 (E8M0 bytes; E4M3 "
            "bytes with nested_offset)");
    }
    return w;
  }
};

// What quantize_4bit was given.
struct QuantizeCall {
  Tensor a;  // contiguous
  DType dtype;
  int block_log2;
  int64_t count, blocks;
  const float* thresholds;
  const uint8_t* codes;
};

inline QuantizeCall check_quantize(const Tensor& a, const Tensor& thresholds, const Tensor& codes,
                                   int64_t blocksize) {
  QuantizeCall q{};
  q.dtype = dtype_of(a, "A");
  q.block_log2 = block_log2(blocksize);
  q.count = a.numel();
  STD_TORCH_CHECK(q.count > 0, "A is empty: nothing to quantize");
  q.blocks = ceil_div(q.count, blocksize);
  q.thresholds = floats(thresholds, kThresholds, "thresholds");
  STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Byte && codes.numel() == kCodebookSize &&
                      codes.is_contiguous(),
                  "codes must be contiguous uint8 with 16 values");
  q.codes = static_cast<const uint8_t*>(codes.const_data_ptr());
  q.a = torch::stable::contiguous(a);
  return q;
}

// What linear_4bit was given; the tensors are contiguous and live as long as this does.
struct LinearCall {
  Tensor x;
  std::optional<Tensor> bias, a, b, s;
  int64_t m, n, k, rank;
  PackedWeight w;
  DType compute;
  std::vector<int64_t> y_sizes;
};

inline LinearCall check_linear(const Tensor& x_in, const WeightArgs& weight, int64_t n,
                               const std::optional<Tensor>& bias,
                               const std::optional<Tensor>& lora_a,
                               const std::optional<Tensor>& lora_b,
                               const std::optional<Tensor>& lora_s, ScalarType compute_dtype) {
  LinearCall l{};
  l.x = torch::stable::contiguous(x_in);
  l.k = l.x.dim() > 0 ? l.x.size(l.x.dim() - 1) : 0;
  l.n = n;
  STD_TORCH_CHECK(l.k > 0 && n > 0, "x must have a last dimension of in_features");
  l.m = l.x.numel() / l.k;
  l.w = weight.checked(n * l.k);
  dtype_of(l.x, "x");
  l.compute = dtype_of(compute_dtype, "compute_dtype");
  if (bias) {
    l.bias = torch::stable::contiguous(*bias);
    STD_TORCH_CHECK(l.bias->dim() == 1 && l.bias->numel() == n, "bias must be [", n, "]");
    dtype_of(*l.bias, "bias");
  }
  if (lora_b) {
    l.b = torch::stable::contiguous(*lora_b);
    STD_TORCH_CHECK(l.b->dim() == 2 && l.b->size(0) == n, "lora_b must be [", n, ", rank]");
    dtype_of(*l.b, "lora_b");
    l.rank = l.b->size(1);
    STD_TORCH_CHECK(lora_a.has_value() != lora_s.has_value(),
                    "with lora_b, give exactly one of lora_a and lora_s");
    if (lora_a) {
      l.a = torch::stable::contiguous(*lora_a);
      STD_TORCH_CHECK(l.a->dim() == 2 && l.a->size(0) == l.rank && l.a->size(1) == l.k,
                      "lora_a must be [", l.rank, ", ", l.k, "] (rank of lora_b, in_features)");
      dtype_of(*l.a, "lora_a");
    } else {
      l.s = torch::stable::contiguous(*lora_s);
      STD_TORCH_CHECK(l.s->numel() == l.m * l.rank,
                      "lora_s must be x's leading dimensions and rank ", l.rank);
      dtype_of(*l.s, "lora_s");
    }
  } else {
    STD_TORCH_CHECK(!lora_a && !lora_s, "lora_a or lora_s was given without lora_b");
  }
  l.y_sizes.assign(l.x.sizes().begin(), l.x.sizes().end());
  l.y_sizes.back() = n;
  return l;
}

// What linear_4bit_backward was given.
struct GradCall {
  Tensor dy;
  std::optional<Tensor> x, a, b, s;
  int64_t m, n, k, rank;
  PackedWeight w;
  DType compute, dx_dtype;
  std::vector<int64_t> dx_sizes;
};

inline GradCall check_linear_backward(const Tensor& dy_in, const WeightArgs& weight, int64_t k,
                                      const std::optional<Tensor>& x,
                                      const std::optional<Tensor>& lora_a,
                                      const std::optional<Tensor>& lora_b,
                                      const std::optional<Tensor>& s, ScalarType compute_dtype,
                                      ScalarType dx_dtype, bool need_da, bool need_db) {
  GradCall g{};
  g.dy = torch::stable::contiguous(dy_in);
  STD_TORCH_CHECK(g.dy.dim() > 0 && g.dy.size(g.dy.dim() - 1) > 0 && k > 0,
                  "dy must have a last dimension of out_features");
  g.n = g.dy.size(g.dy.dim() - 1), g.k = k;
  g.m = g.dy.numel() / g.n;
  g.w = weight.checked(g.n * k);
  dtype_of(g.dy, "dy");
  g.compute = dtype_of(compute_dtype, "compute_dtype");
  g.dx_dtype = dtype_of(dx_dtype, "dx_dtype");
  if (lora_b) {
    g.b = torch::stable::contiguous(*lora_b);
    STD_TORCH_CHECK(g.b->dim() == 2 && g.b->size(0) == g.n, "lora_b must be [", g.n, ", rank]");
    dtype_of(*g.b, "lora_b");
    g.rank = g.b->size(1);
    if (lora_a) {
      g.a = torch::stable::contiguous(*lora_a);
      STD_TORCH_CHECK(g.a->dim() == 2 && g.a->size(0) == g.rank && g.a->size(1) == k,
                      "lora_a must be [", g.rank, ", ", k, "]");
      dtype_of(*g.a, "lora_a");
    }
    if (need_da) {
      STD_TORCH_CHECK(x.has_value() && g.a.has_value(),
                      "the gradient of lora_a needs x and lora_a");
      g.x = torch::stable::contiguous(*x);
      STD_TORCH_CHECK(g.x->numel() == g.m * k, "x must be [..., ", k, "] like dy");
      dtype_of(*g.x, "x");
    }
    if (need_db) {
      STD_TORCH_CHECK(s.has_value() && s->numel() == g.m * g.rank,
                      "the gradient of lora_b needs s [rows, ", g.rank, "]");
      g.s = torch::stable::contiguous(*s);
      dtype_of(*g.s, "s");
    }
  }
  g.dx_sizes.assign(g.dy.sizes().begin(), g.dy.sizes().end());
  g.dx_sizes.back() = k;
  return g;
}

}  // namespace qlk
