// The CPU side of the torch ops, on torch's stable ABI (2.10 and later): checks arguments,
// allocates results, hands ranges to the kernels on torch's own threads. Schemas stand in
// qlora_kernels/ops.py.
#include <exception>
#include <string>
#include <tuple>

#include "cpu/dispatch.h"
#include "huge_pages.h"
#include "linear_cpu.h"
#include "torch_args.h"

namespace qlk {
namespace {

Tensor new_tensor(std::vector<int64_t> sizes, ScalarType dtype) {
  return torch::stable::empty(sizes, dtype);
}

// A weight as the kernels take it. The one-byte scales for research become floats first, in memory
// that this object holds.
class CpuWeight {
 public:
  CpuWeight(const PackedWeight& w) : w_{w.packed, {}, w.codebook, w.block_log2} {
    const auto* bytes = static_cast<const uint8_t*>(w.absmax);
    switch (w.kind) {
      case ScaleKind::fp32:
        w_.scales.absmax = static_cast<const float*>(w.absmax);
        return;
      case ScaleKind::nested:
        w_.scales.absmax8 = bytes;
        w_.scales.nested_absmax = w.nested_absmax;
        w_.scales.nested_code = w.nested_code;
        w_.scales.offset = *w.offset;
        return;
      case ScaleKind::e8m0:
      case ScaleKind::e4m3:
        floats_.resize(w.blocks);
        for (int64_t i = 0; i < w.blocks; ++i)
          floats_[i] =
              w.kind == ScaleKind::e8m0 ? e8m0_value(bytes[i]) : e4m3_value(bytes[i]) * *w.offset;
        w_.scales.absmax = floats_.data();
    }
  }
  CpuWeight(const CpuWeight&) = delete;
  const Weight& get() const { return w_; }

 private:
  Weight w_;
  std::vector<float> floats_;
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

std::tuple<Tensor, Tensor> quantize_4bit(const Tensor& a, const Tensor& thresholds,
                                         const Tensor& codes, int64_t blocksize) {
  const QuantizeCall q = check_quantize(a, thresholds, codes, blocksize);
  Tensor packed = new_tensor({(q.count + 1) / 2}, ScalarType::Byte);
  Tensor absmax = new_tensor({q.blocks}, ScalarType::Float);
  const void* from = q.a.const_data_ptr();
  uint8_t* bytes = static_cast<uint8_t*>(packed.mutable_data_ptr());
  float* scales = static_cast<float*>(absmax.mutable_data_ptr());
  // In units of at least 4096 values, so that every range starts on a multiple of 32 values.
  const int64_t unit = 4096 >> q.block_log2;
  const Kernels& k = kernels();
  torch::stable::parallel_for(0, ceil_div(q.blocks, unit), 4, [&](int64_t begin, int64_t end) {
    const int64_t last = end * unit < q.blocks ? end * unit : q.blocks;
    k.quantize(from, q.dtype, q.count, q.thresholds, q.codes, q.block_log2, begin * unit, last,
               bytes, scales);
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
  const CpuWeight w(args.checked(count));
  const DType type = dtype_of(dtype, "dtype");
  Tensor out = new_tensor(shape, dtype);
  prefer_huge_pages(out.mutable_data_ptr(), count * (type == DType::f32 ? 4 : 2));
  dequantize_into(w.get(), count, type, out.mutable_data_ptr(), true);
  return out;
}

void dequantize_4bit_out(const Tensor& packed, const Tensor& absmax, const Tensor& codebook,
                         int64_t blocksize, std::optional<Tensor> nested_absmax,
                         std::optional<Tensor> nested_code, std::optional<Tensor> nested_offset,
                         Tensor out) {
  STD_TORCH_CHECK(out.is_contiguous(), "out must be contiguous");
  const WeightArgs args{packed,        absmax,      codebook,     blocksize,
                        nested_absmax, nested_code, nested_offset};
  const CpuWeight w(args.checked(out.numel()));
  dequantize_into(w.get(), out.numel(), dtype_of(out, "out"), out.mutable_data_ptr(), false);
}

Matrix matrix(const Tensor& t, const char* what) { return {t.const_data_ptr(), dtype_of(t, what)}; }

// As a matrix, or as none.
Matrix matrix(const std::optional<Tensor>& t, const char* what) {
  return t ? matrix(*t, what) : Matrix{};
}

std::tuple<Tensor, Tensor> linear_4bit(const Tensor& x, const Tensor& packed, const Tensor& absmax,
                                       const Tensor& codebook, int64_t blocksize,
                                       std::optional<Tensor> nested_absmax,
                                       std::optional<Tensor> nested_code,
                                       std::optional<Tensor> nested_offset, int64_t out_features,
                                       std::optional<Tensor> bias, std::optional<Tensor> lora_a,
                                       std::optional<Tensor> lora_b, std::optional<Tensor> lora_s,
                                       double scaling, ScalarType compute_dtype) {
  const WeightArgs weight{packed,        absmax,      codebook,     blocksize,
                          nested_absmax, nested_code, nested_offset};
  const LinearCall l =
      check_linear(x, weight, out_features, bias, lora_a, lora_b, lora_s, compute_dtype);
  const CpuWeight w(l.w);
  LinearProblem p{};
  p.w = w.get();
  p.m = l.m, p.n = l.n, p.k = l.k, p.rank = l.rank;
  p.x = matrix(l.x, "x");
  p.bias = matrix(l.bias, "bias");
  p.a = matrix(l.a, "lora_a"), p.b = matrix(l.b, "lora_b"), p.s = matrix(l.s, "lora_s");
  p.compute = l.compute;
  p.scaling = static_cast<float>(scaling);
  Tensor s_out =
      l.a ? new_tensor({l.m, l.rank}, ScalarType::Float) : new_tensor({0}, ScalarType::Float);
  if (l.a) p.s_out = static_cast<float*>(s_out.mutable_data_ptr());
  Tensor y = new_tensor(l.y_sizes, l.x.scalar_type());
  p.y = y.mutable_data_ptr();
  p.y_dtype = p.x.dtype;
  if (l.m > 0) linear_forward(p);
  return {y, s_out};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_4bit_backward(
    const Tensor& dy, const Tensor& packed, const Tensor& absmax, const Tensor& codebook,
    int64_t blocksize, std::optional<Tensor> nested_absmax, std::optional<Tensor> nested_code,
    std::optional<Tensor> nested_offset, int64_t in_features, std::optional<Tensor> x,
    std::optional<Tensor> lora_a, std::optional<Tensor> lora_b, std::optional<Tensor> s,
    double scaling, ScalarType compute_dtype, ScalarType dx_dtype, bool need_dx, bool need_da,
    bool need_db) {
  const WeightArgs weight{packed,        absmax,      codebook,     blocksize,
                          nested_absmax, nested_code, nested_offset};
  const GradCall g = check_linear_backward(dy, weight, in_features, x, lora_a, lora_b, s,
                                           compute_dtype, dx_dtype, need_da, need_db);
  const CpuWeight w(g.w);
  GradProblem p{};
  p.w = w.get();
  p.m = g.m, p.n = g.n, p.k = g.k, p.rank = g.rank;
  p.dy = matrix(g.dy, "dy"), p.x = matrix(g.x, "x"), p.s = matrix(g.s, "s");
  p.a = matrix(g.a, "lora_a"), p.b = matrix(g.b, "lora_b");
  p.compute = g.compute;
  p.scaling = static_cast<float>(scaling);

  // Results may not share storage with each other, empty ones included.
  const auto none = [&] { return new_tensor({0}, g.dy.scalar_type()); };
  Tensor dx = none(), da = none(), db = none(), ds = none();
  if (g.b) {
    ds = new_tensor({g.m, g.rank}, ScalarType::Float);
    p.ds = static_cast<float*>(ds.mutable_data_ptr());
  }
  if (g.b && need_da) {
    da = new_tensor({g.rank, g.k}, g.a->scalar_type());
    p.da = da.mutable_data_ptr();
  }
  if (g.b && need_db) {
    db = new_tensor({g.n, g.rank}, g.b->scalar_type());
    p.db = db.mutable_data_ptr();
  }
  if (need_dx) {
    dx = new_tensor(g.dx_sizes, dx_dtype);
    p.dx = dx.mutable_data_ptr();
    p.dx_dtype = g.dx_dtype;
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
