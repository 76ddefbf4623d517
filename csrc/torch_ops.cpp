// The CPU side of the torch ops, on torch's stable ABI (2.10 and later): checks arguments,
// allocates results, hands ranges to the kernels on torch's own threads. Schemas stand in
// qlora_kernels/ops.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <exception>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/dispatch.h"
#include "linear_cpu.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace qlk {
namespace {

DType dtype_of(ScalarType t, const char* what) {
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
DType dtype_of(const Tensor& t, const char* what) { return dtype_of(t.scalar_type(), what); }

int block_log2(int64_t blocksize) {
  for (int log2 = kMinBlockLog2; log2 <= kMaxBlockLog2; ++log2)
    if (blocksize == int64_t{1} << log2) return log2;
  STD_TORCH_CHECK(false, "blocksize must be a power of two from 16 to 4096, got ", blocksize);
  return 0;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

Tensor new_tensor(std::vector<int64_t> sizes, ScalarType dtype) {
  return torch::stable::empty(sizes, dtype);
}

const float* floats(const Tensor& t, int64_t count, const char* what) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.numel() == count && t.is_contiguous(),
                  what, " must be contiguous float32 with ", count, " values");
  return static_cast<const float*>(t.const_data_ptr());
}

// A packed weight's arguments, checked against each other. Holds references to what it points into.
struct WeightArgs {
  const Tensor& packed;
  const Tensor& absmax;
  const Tensor& codebook;
  int64_t blocksize;
  const std::optional<Tensor>& nested_absmax;
  const std::optional<Tensor>& nested_code;
  const std::optional<Tensor>& nested_offset;

  Weight checked(int64_t count) const {
    Weight w{};
    w.block_log2 = block_log2(blocksize);
    STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Byte && packed.is_contiguous(),
                    "packed must be contiguous uint8");
    STD_TORCH_CHECK(packed.numel() == (count + 1) / 2, "packed holds ", packed.numel(),
                    " bytes, but ", count, " values need ", (count + 1) / 2);
    w.packed = static_cast<const uint8_t*>(packed.const_data_ptr());
    w.codebook = floats(codebook, kCodebookSize, "codebook");
    const int64_t blocks = ceil_div(count, blocksize);
    STD_TORCH_CHECK(absmax.numel() == blocks, "absmax holds ", absmax.numel(), " scales, but ",
                    count, " values in blocks of ", blocksize, " need ", blocks);
    if (absmax.scalar_type() == ScalarType::Float) {
      w.scales.absmax = floats(absmax, blocks, "absmax");
      return w;
    }
    STD_TORCH_CHECK(absmax.scalar_type() == ScalarType::Byte && absmax.is_contiguous(),
                    "absmax must be contiguous float32, or uint8 with nested scales");
    STD_TORCH_CHECK(
        nested_absmax && nested_code && nested_offset,
        "absmax is uint8, so nested_absmax, nested_code and nested_offset must be given");
    w.scales.absmax8 = static_cast<const uint8_t*>(absmax.const_data_ptr());
    w.scales.nested_absmax =
        floats(*nested_absmax, ceil_div(blocks, kNestedBlock), "nested_absmax");
    w.scales.nested_code = floats(*nested_code, kNestedCodeSize, "nested_code");
    w.scales.offset = *floats(*nested_offset, 1, "nested_offset");
    return w;
  }
};

// The mean in this project's one order of summation: reference.mean_in_order.
float mean_in_order(const float* values, int64_t count) {
  auto halve = [](double* s) {
    for (int half = kNestedBlock / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) s[i] += s[i + half];
    return s[0];
  };
  const int64_t groups = ceil_div(count, kNestedBlock);
  std::vector<double> sums(groups);
  torch::stable::parallel_for(0, groups, 64, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      double tree[kNestedBlock];
      for (int i = 0; i < kNestedBlock; ++i) {
        const int64_t at = g * kNestedBlock + i;
        tree[i] = at < count ? values[at] : 0.0;
      }
      sums[g] = halve(tree);
    }
  });
  while (sums.size() > 1) {
    std::vector<double> next;
    for (size_t g = 0; g < sums.size(); g += kNestedBlock) {
      double tree[kNestedBlock];
      for (size_t i = 0; i < kNestedBlock; ++i) tree[i] = g + i < sums.size() ? sums[g + i] : 0.0;
      next.push_back(halve(tree));
    }
    sums = next;
  }
  return static_cast<float>(sums[0] / static_cast<double>(count));
}

std::tuple<Tensor, Tensor> quantize_4bit(const Tensor& a_in, const Tensor& thresholds,
                                         const Tensor& codes, int64_t blocksize) {
  const DType dtype = dtype_of(a_in, "A");
  const int log2 = block_log2(blocksize);
  const int64_t count = a_in.numel();
  STD_TORCH_CHECK(count > 0, "A is empty: nothing to quantize");
  const float* limits = floats(thresholds, kThresholds, "thresholds");
  STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Byte && codes.numel() == kCodebookSize &&
                      codes.is_contiguous(),
                  "codes must be contiguous uint8 with 16 values");
  const Tensor a = torch::stable::contiguous(a_in);
  const int64_t blocks = ceil_div(count, blocksize);
  Tensor packed = new_tensor({(count + 1) / 2}, ScalarType::Byte);
  Tensor absmax = new_tensor({blocks}, ScalarType::Float);
  const void* from = a.const_data_ptr();
  const uint8_t* order = static_cast<const uint8_t*>(codes.const_data_ptr());
  uint8_t* bytes = static_cast<uint8_t*>(packed.mutable_data_ptr());
  float* scales = static_cast<float*>(absmax.mutable_data_ptr());
  // In units of at least 4096 values, so that every range starts on a multiple of 32 values.
  const int64_t unit = 4096 >> log2;
  const Kernels& k = kernels();
  torch::stable::parallel_for(0, ceil_div(blocks, unit), 4, [&](int64_t begin, int64_t end) {
    const int64_t last = end * unit < blocks ? end * unit : blocks;
    k.quantize(from, dtype, count, limits, order, log2, begin * unit, last, bytes, scales);
  });
  return {packed, absmax};
}

std::tuple<Tensor, Tensor, Tensor> quantize_absmax(const Tensor& absmax_in,
                                                   const Tensor& thresholds,
                                                   std::optional<Tensor> offset) {
  const Tensor absmax = torch::stable::contiguous(absmax_in);
  const int64_t count = absmax.numel();
  STD_TORCH_CHECK(absmax.dim() == 1 && count > 0, "absmax must be [blocks], not empty");
  const float* values = floats(absmax, count, "absmax");
  const float* limits = floats(thresholds, kNestedCodeSize - 1, "thresholds");
  const int64_t groups = ceil_div(count, kNestedBlock);
  Tensor codes = new_tensor({count}, ScalarType::Byte);
  Tensor nested = new_tensor({groups}, ScalarType::Float);
  Tensor mean = new_tensor({}, ScalarType::Float);
  const float taken = offset ? *floats(*offset, 1, "offset") : mean_in_order(values, count);
  *static_cast<float*>(mean.mutable_data_ptr()) = taken;
  uint8_t* out = static_cast<uint8_t*>(codes.mutable_data_ptr());
  float* out_nested = static_cast<float*>(nested.mutable_data_ptr());
  const Kernels& k = kernels();
  torch::stable::parallel_for(0, groups, 16, [&](int64_t begin, int64_t end) {
    k.quantize_absmax(values, count, taken, limits, begin, end, out, out_nested);
  });
  return {codes, nested, mean};
}

// `fresh` memory is not streamed past the cache: the kernel has just zeroed its pages there.
void dequantize_into(const Weight& w, int64_t count, DType dtype, void* out, bool fresh) {
  const int64_t size = dtype == DType::f32 ? 4 : 2;
  const bool stream = !fresh && count * size > (int64_t{16} << 20);
  const int64_t unit = 4096;
  const Kernels& k = kernels();
  torch::stable::parallel_for(0, ceil_div(count, unit), 8, [&](int64_t begin, int64_t end) {
    const int64_t last = end * unit < count ? end * unit : count;
    k.dequantize(w, begin * unit, last, dtype, static_cast<char*>(out) + begin * unit * size,
                 stream);
  });
}

Tensor dequantize_4bit(const Tensor& packed, const Tensor& absmax, const Tensor& codebook,
                       int64_t blocksize, std::optional<Tensor> nested_absmax,
                       std::optional<Tensor> nested_code, std::optional<Tensor> nested_offset,
                       std::vector<int64_t> shape, ScalarType dtype) {
  int64_t count = 1;
  for (int64_t s : shape) count *= s;
  const WeightArgs args{packed,        absmax,      codebook,     blocksize,
                        nested_absmax, nested_code, nested_offset};
  const Weight w = args.checked(count);
  const DType type = dtype_of(dtype, "dtype");
  Tensor out = new_tensor(shape, dtype);
  dequantize_into(w, count, type, out.mutable_data_ptr(), true);
  return out;
}

void dequantize_4bit_out(const Tensor& packed, const Tensor& absmax, const Tensor& codebook,
                         int64_t blocksize, std::optional<Tensor> nested_absmax,
                         std::optional<Tensor> nested_code, std::optional<Tensor> nested_offset,
                         Tensor out) {
  STD_TORCH_CHECK(out.is_contiguous(), "out must be contiguous");
  const WeightArgs args{packed,        absmax,      codebook,     blocksize,
                        nested_absmax, nested_code, nested_offset};
  const Weight w = args.checked(out.numel());
  dequantize_into(w, out.numel(), dtype_of(out, "out"), out.mutable_data_ptr(), false);
}

Matrix matrix(const Tensor& t, const char* what) { return {t.const_data_ptr(), dtype_of(t, what)}; }

std::tuple<Tensor, Tensor> linear_4bit(
    const Tensor& x_in, const Tensor& packed, const Tensor& absmax, const Tensor& codebook,
    int64_t blocksize, std::optional<Tensor> nested_absmax, std::optional<Tensor> nested_code,
    std::optional<Tensor> nested_offset, int64_t out_features, std::optional<Tensor> bias_in,
    std::optional<Tensor> lora_a_in, std::optional<Tensor> lora_b_in,
    std::optional<Tensor> lora_s_in, double scaling, ScalarType compute_dtype) {
  const Tensor x = torch::stable::contiguous(x_in);
  const int64_t k = x.dim() > 0 ? x.size(x.dim() - 1) : 0;
  STD_TORCH_CHECK(k > 0 && out_features > 0, "x must have a last dimension of in_features");
  const int64_t m = x.numel() / k;
  const WeightArgs args{packed,        absmax,      codebook,     blocksize,
                        nested_absmax, nested_code, nested_offset};
  LinearProblem p{};
  p.w = args.checked(out_features * k);
  p.m = m, p.n = out_features, p.k = k;
  p.x = matrix(x, "x");
  p.compute = dtype_of(compute_dtype, "compute_dtype");
  p.scaling = static_cast<float>(scaling);

  // These live until the kernels are done; p points into them.
  std::optional<Tensor> bias, a, b, s;
  if (bias_in) {
    bias = torch::stable::contiguous(*bias_in);
    STD_TORCH_CHECK(bias->dim() == 1 && bias->numel() == out_features, "bias must be [",
                    out_features, "]");
    p.bias = matrix(*bias, "bias");
  }
  Tensor kept_s = new_tensor({0}, ScalarType::Float);
  if (lora_b_in) {
    b = torch::stable::contiguous(*lora_b_in);
    STD_TORCH_CHECK(b->dim() == 2 && b->size(0) == out_features, "lora_b must be [", out_features,
                    ", rank]");
    p.rank = b->size(1);
    p.b = matrix(*b, "lora_b");
    STD_TORCH_CHECK(lora_a_in.has_value() != lora_s_in.has_value(),
                    "with lora_b, give exactly one of lora_a and lora_s");
    if (lora_a_in) {
      a = torch::stable::contiguous(*lora_a_in);
      STD_TORCH_CHECK(a->dim() == 2 && a->size(0) == p.rank && a->size(1) == k, "lora_a must be [",
                      p.rank, ", ", k, "] (rank of lora_b, in_features)");
      p.a = matrix(*a, "lora_a");
      kept_s = new_tensor({m, p.rank}, ScalarType::Float);
      p.s_out = static_cast<float*>(kept_s.mutable_data_ptr());
    } else {
      s = torch::stable::contiguous(*lora_s_in);
      STD_TORCH_CHECK(s->numel() == m * p.rank, "lora_s must be x's leading dimensions and rank ",
                      p.rank);
      p.s = matrix(*s, "lora_s");
    }
  } else {
    STD_TORCH_CHECK(!lora_a_in && !lora_s_in, "lora_a or lora_s was given without lora_b");
  }

  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = out_features;
  Tensor y = new_tensor(sizes, x.scalar_type());
  p.y = y.mutable_data_ptr();
  p.y_dtype = p.x.dtype;
  if (m > 0) linear_forward(p);
  return {y, kept_s};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_4bit_backward(
    const Tensor& dy_in, const Tensor& packed, const Tensor& absmax, const Tensor& codebook,
    int64_t blocksize, std::optional<Tensor> nested_absmax, std::optional<Tensor> nested_code,
    std::optional<Tensor> nested_offset, int64_t in_features, std::optional<Tensor> x_in,
    std::optional<Tensor> lora_a_in, std::optional<Tensor> lora_b_in, std::optional<Tensor> s_in,
    double scaling, ScalarType compute_dtype, ScalarType dx_dtype, bool need_dx, bool need_da,
    bool need_db) {
  const Tensor dy = torch::stable::contiguous(dy_in);
  STD_TORCH_CHECK(dy.dim() > 0 && dy.size(dy.dim() - 1) > 0 && in_features > 0,
                  "dy must have a last dimension of out_features");
  const int64_t n = dy.size(dy.dim() - 1), m = dy.numel() / n;
  const WeightArgs args{packed,        absmax,      codebook,     blocksize,
                        nested_absmax, nested_code, nested_offset};
  GradProblem p{};
  p.w = args.checked(n * in_features);
  p.m = m, p.n = n, p.k = in_features;
  p.dy = matrix(dy, "dy");
  p.compute = dtype_of(compute_dtype, "compute_dtype");
  p.scaling = static_cast<float>(scaling);

  // Results may not share storage with each other, empty ones included.
  const auto none = [&] { return new_tensor({0}, dy.scalar_type()); };
  Tensor dx = none(), da = none(), db = none(), ds = none();
  std::optional<Tensor> x, a, b, s;
  if (lora_b_in) {
    b = torch::stable::contiguous(*lora_b_in);
    STD_TORCH_CHECK(b->dim() == 2 && b->size(0) == n, "lora_b must be [", n, ", rank]");
    p.rank = b->size(1);
    p.b = matrix(*b, "lora_b");
    ds = new_tensor({m, p.rank}, ScalarType::Float);
    p.ds = static_cast<float*>(ds.mutable_data_ptr());
    if (lora_a_in) {
      a = torch::stable::contiguous(*lora_a_in);
      STD_TORCH_CHECK(a->dim() == 2 && a->size(0) == p.rank && a->size(1) == in_features,
                      "lora_a must be [", p.rank, ", ", in_features, "]");
      p.a = matrix(*a, "lora_a");
    }
    if (need_da) {
      STD_TORCH_CHECK(x_in.has_value() && a.has_value(),
                      "the gradient of lora_a needs x and lora_a");
      x = torch::stable::contiguous(*x_in);
      STD_TORCH_CHECK(x->numel() == m * in_features, "x must be [..., ", in_features, "] like dy");
      p.x = matrix(*x, "x");
      da = new_tensor({p.rank, in_features}, a->scalar_type());
      p.da = da.mutable_data_ptr();
    }
    if (need_db) {
      STD_TORCH_CHECK(s_in.has_value() && s_in->numel() == m * p.rank,
                      "the gradient of lora_b needs s [rows, ", p.rank, "]");
      s = torch::stable::contiguous(*s_in);
      p.s = matrix(*s, "s");
      db = new_tensor({n, p.rank}, b->scalar_type());
      p.db = db.mutable_data_ptr();
    }
  }
  if (need_dx) {
    std::vector<int64_t> sizes(dy.sizes().begin(), dy.sizes().end());
    sizes.back() = in_features;
    dx = new_tensor(sizes, dx_dtype);
    p.dx = dx.mutable_data_ptr();
    p.dx_dtype = dtype_of(dx_dtype, "dx_dtype");
  }
  linear_backward(p);
  return {dx, da, db, ds};
}

}  // namespace
}  // namespace qlk

STABLE_TORCH_LIBRARY_IMPL(qlora_kernels, CPU, m) {
  m.impl("quantize_4bit", TORCH_BOX(&qlk::quantize_4bit));
  m.impl("quantize_absmax", TORCH_BOX(&qlk::quantize_absmax));
  m.impl("dequantize_4bit", TORCH_BOX(&qlk::dequantize_4bit));
  m.impl("dequantize_4bit.out", TORCH_BOX(&qlk::dequantize_4bit_out));
  m.impl("linear_4bit", TORCH_BOX(&qlk::linear_4bit));
  m.impl("linear_4bit_backward", TORCH_BOX(&qlk::linear_4bit_backward));
}

// For qlora_kernels/cpu.py, through ctypes: the instruction set of *this* library.
extern "C" __attribute__((visibility("default"))) const char* qlk_isa() {
  return qlk::kernels().name;
}
// Null on success, else what was wrong (valid until the next call).
extern "C" __attribute__((visibility("default"))) const char* qlk_choose_isa(const char* name) {
  static std::string error;
  try {
    qlk::choose_isa(name);
    return nullptr;
  } catch (const std::exception& e) {
    error = e.what();
    return error.c_str();
  }
}
// Comma-separated names, lowest first.
extern "C" __attribute__((visibility("default"))) const char* qlk_available_isas() {
  static std::string names;
  names.clear();
  for (const std::string& name : qlk::available_isas()) names += (names.empty() ? "" : ",") + name;
  return names.c_str();
}
