// The CPU side of RMSNorm and SwiGLU on torch's stable ABI: checks arguments, allocates results,
// hands ranges to the kernels on torch's own threads. Schemas stand in
// qlora_kernels/activations.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "cpu/dispatch.h"
#include "torch_args.h"

namespace qlk {
namespace {

// What one task should have at least: 64 KiB of fp32.
constexpr int64_t kGrain = 16384;

bool same(const Tensor& a, const Tensor& b) {
  if (a.scalar_type() != b.scalar_type() || a.dim() != b.dim()) return false;
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) != b.size(d)) return false;
  return true;
}

struct Rows {
  int64_t m, k;
};
Rows rows_of(const Tensor& x, const Tensor& weight) {
  STD_TORCH_CHECK(x.dim() > 0 && weight.dim() == 1 && weight.numel() > 0 &&
                      x.size(x.dim() - 1) == weight.numel(),
                  "weight must be [", x.dim() ? x.size(x.dim() - 1) : 0,
                  "], the last dimension of x, got ", weight.numel(), " values");
  STD_TORCH_CHECK(x.scalar_type() == weight.scalar_type(), "x and weight must have one dtype");
  return {x.numel() / weight.numel(), weight.numel()};
}

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x_in, const Tensor& weight_in, double eps) {
  const DType dtype = dtype_of(x_in, "x");
  const Rows r = rows_of(x_in, weight_in);
  const Tensor x = torch::stable::contiguous(x_in), weight = torch::stable::contiguous(weight_in);
  Tensor y = torch::stable::empty_like(x);
  Tensor rstd = torch::stable::empty({r.m}, ScalarType::Float);
  const void *from = x.const_data_ptr(), *by = weight.const_data_ptr();
  void* to = y.mutable_data_ptr();
  float* scales = static_cast<float*>(rstd.mutable_data_ptr());
  const Kernels& k = kernels();
  torch::stable::parallel_for(0, r.m, ceil_div(kGrain, r.k), [&](int64_t begin, int64_t end) {
    k.rms_norm(from, by, dtype, static_cast<float>(eps), r.k, begin, end, to, scales);
  });
  return {y, rstd};
}

Tensor rms_norm_backward(const Tensor& dy_in, const Tensor& x_in, const Tensor& weight_in,
                         const Tensor& rstd) {
  const DType dtype = dtype_of(x_in, "x");
  const Rows r = rows_of(x_in, weight_in);
  STD_TORCH_CHECK(same(dy_in, x_in), "dy must have the shape and dtype of x");
  const float* scales = floats(rstd, r.m, "rstd");
  const Tensor dy = torch::stable::contiguous(dy_in), x = torch::stable::contiguous(x_in);
  const Tensor weight = torch::stable::contiguous(weight_in);
  Tensor dx = torch::stable::empty_like(x);
  const void *d = dy.const_data_ptr(), *from = x.const_data_ptr(), *by = weight.const_data_ptr();
  void* to = dx.mutable_data_ptr();
  const Kernels& k = kernels();
  torch::stable::parallel_for(0, r.m, ceil_div(kGrain, r.k), [&](int64_t begin, int64_t end) {
    k.rms_norm_backward(d, from, by, dtype, scales, r.k, begin, end, to);
  });
  return dx;
}

Tensor swiglu(const Tensor& gate_in, const Tensor& up_in) {
  const DType dtype = dtype_of(gate_in, "gate");
  STD_TORCH_CHECK(same(gate_in, up_in), "gate and up must have one shape and dtype");
  const Tensor gate = torch::stable::contiguous(gate_in), up = torch::stable::contiguous(up_in);
  Tensor y = torch::stable::empty_like(gate);
  const void *g = gate.const_data_ptr(), *u = up.const_data_ptr();
  void* to = y.mutable_data_ptr();
  const Kernels& k = kernels();
  torch::stable::parallel_for(0, gate.numel(), kGrain, [&](int64_t begin, int64_t end) {
    k.swiglu(g, u, dtype, begin, end, to);
  });
  return y;
}

std::tuple<Tensor, Tensor> swiglu_backward(const Tensor& dy_in, const Tensor& gate_in,
                                           const Tensor& up_in) {
  const DType dtype = dtype_of(gate_in, "gate");
  STD_TORCH_CHECK(same(gate_in, up_in) && same(dy_in, gate_in),
                  "dy, gate and up must have one shape and dtype");
  const Tensor dy = torch::stable::contiguous(dy_in);
  const Tensor gate = torch::stable::contiguous(gate_in), up = torch::stable::contiguous(up_in);
  Tensor dgate = torch::stable::empty_like(gate), dup = torch::stable::empty_like(gate);
  const void *d = dy.const_data_ptr(), *g = gate.const_data_ptr(), *u = up.const_data_ptr();
  void *to_gate = dgate.mutable_data_ptr(), *to_up = dup.mutable_data_ptr();
  const Kernels& k = kernels();
  torch::stable::parallel_for(0, gate.numel(), kGrain, [&](int64_t begin, int64_t end) {
    k.swiglu_backward(d, g, u, dtype, begin, end, to_gate, to_up);
  });
  return {dgate, dup};
}

}  // namespace
}  // namespace qlk

STABLE_TORCH_LIBRARY_IMPL(qlora_kernels, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&qlk::rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&qlk::rms_norm_backward));
  m.impl("swiglu", TORCH_BOX(&qlk::swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&qlk::swiglu_backward));
}
