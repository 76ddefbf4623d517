// The CUDA side of the torch ops, on torch's stable ABI (2.10 and later): checks arguments as the
// CPU's half does (torch_args.h), asks dispatch.h which kernel runs, allocates from torch, launches
// on torch's stream. Nothing here synchronises.
//
// Many rows are torch's matmul's ("large"): the weight is dequantized at memory speed into a
// workspace, at most kWorkspaceCap at a time, and multiplied. The workspace is the op's own, from
// torch's allocator, so that neither streams, nor backward threads, nor replays of a graph share
// it. LoRA joins by addmm into the same output: y is rounded to the compute dtype before it is
// added.
//
// A, B, bias and S in another dtype than the compute dtype (PEFT keeps A and B in fp32) are
// converted each time: (n + k) * rank elements read and written, 0.4% of the weight's bf16 bytes at
// rank 16 and 4096 x 4096, 1.6% at rank 64. The fused kernels convert as they load and write
// nothing.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <mutex>
#include <string>
#include <tuple>

#if defined(QLK_CUDA_EMULATED)
#include "cuda/call_emulated.h"
#else
#include "cuda/call_cuda.h"
#endif
#include "cuda/device.h"
#include "cuda/gemm_tiles.h"
#include "cuda/launchers.h"
#include "torch_args.h"

namespace qlk::cuda {
namespace {

constexpr int64_t kWorkspaceCap = int64_t{512} << 20;
std::atomic<int64_t> workspace_cap{kWorkspaceCap};

void check(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, what, ": ", explain(error));
}

ScalarType torch_type(DType t) {
  return t == DType::f32 ? ScalarType::Float
                         : (t == DType::bf16 ? ScalarType::BFloat16 : ScalarType::Half);
}

Tensor new_tensor(const Tensor& like, std::vector<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

// The tensor itself where it is of that dtype already.
Tensor cast(const Tensor& t, DType dtype) {
  return t.scalar_type() == torch_type(dtype) ? t : torch::stable::to(t, torch_type(dtype));
}

Tensor as_matrix(const Tensor& t, int64_t rows, int64_t cols) {
  return torch::stable::view(t, std::vector<int64_t>{rows, cols});
}
Tensor transposed(const Tensor& t) { return torch::stable::transpose(t, 0, 1); }

// out = beta self + alpha a b; `self` is not read where beta is 0.
void addmm(Tensor& out, const Tensor& self, const Tensor& a, const Tensor& b, double beta,
           double alpha) {
  STABLE_TORCH_ERROR_CODE_CHECK(
      QLK_SHIM(addmm_out)(out.get(), self.get(), a.get(), b.get(), beta, alpha));
}
void multiply(Tensor& out, const Tensor& a, const Tensor& b, double alpha = 1) {
  addmm(out, out, a, b, 0, alpha);
}

// --- the pieces of a problem ---------------------------------------------------------------------

// Names the weight's tensors to the call, and gives them as the launchers take them.
Weight weight_of(Call& call, const WeightArgs& args, const PackedWeight& w, int64_t n, int64_t k) {
  call.in(args.packed), call.in(args.absmax), call.in(args.codebook);
  for (const std::optional<Tensor>* t :
       {&args.nested_absmax, &args.nested_code, &args.nested_offset})
    if (*t) call.in(**t);
  return {w.packed,      w.codebook, w.kind,       w.absmax, w.nested_absmax,
          w.nested_code, w.offset,   w.block_log2, n,        k};
}

Matrix matrix(Call& call, const std::optional<Tensor>& t) {
  return t ? Matrix{call.in(*t), dtype_of(*t, "a matrix")} : Matrix{};
}

Shape shape_of(Pass pass, const Weight& w, int64_t m, int64_t rank, bool s_given, DType compute) {
  return {pass, m, w.n, w.k, rank, s_given, compute, w.block_log2, w.kind};
}

// --- quantize and dequantize ---------------------------------------------------------------------

std::tuple<Tensor, Tensor> quantize(const Tensor& a, const Tensor& thresholds, const Tensor& codes,
                                    int64_t blocksize, ScaleKind kind,
                                    const std::optional<Tensor>& tensor_scale) {
  const QuantizeCall q = check_quantize(a, thresholds, codes, blocksize);
  Call call(q.a);
  Tensor packed = new_tensor(q.a, {(q.count + 1) / 2}, ScalarType::Byte);
  Tensor absmax =
      new_tensor(q.a, {q.blocks}, kind == ScaleKind::fp32 ? ScalarType::Float : ScalarType::Char);
  QuantizeProblem p{};
  p.values = call.in(q.a);
  p.dtype = q.dtype;
  p.count = q.count;
  p.thresholds = q.thresholds, p.codes = q.codes;
  call.in(thresholds), call.in(codes);
  p.block_log2 = q.block_log2;
  p.kind = kind;
  if (tensor_scale) {
    p.tensor_scale = floats(*tensor_scale, 1, "tensor_scale");
    call.in(*tensor_scale);
  }
  p.packed = static_cast<uint8_t*>(call.out(packed));
  p.absmax = call.out(absmax);
  check(launch_quantize(p, call.stream()), "quantize_4bit");
  return {packed, absmax};
}

std::tuple<Tensor, Tensor> quantize_4bit(const Tensor& a, const Tensor& thresholds,
                                         const Tensor& codes, int64_t blocksize) {
  return quantize(a, thresholds, codes, blocksize, ScaleKind::fp32, std::nullopt);
}

std::tuple<Tensor, Tensor> quantize_4bit_scaled(const Tensor& a, const Tensor& thresholds,
                                                const Tensor& codes, int64_t blocksize,
                                                std::optional<Tensor> tensor_scale) {
  const ScaleKind kind = tensor_scale ? ScaleKind::e4m3 : ScaleKind::e8m0;
  return quantize(a, thresholds, codes, blocksize, kind, tensor_scale);
}

std::tuple<Tensor, Tensor, Tensor> quantize_absmax(const Tensor& absmax_in,
                                                   const Tensor& thresholds,
                                                   std::optional<Tensor> offset) {
  const Tensor absmax = torch::stable::contiguous(absmax_in);
  const int64_t count = absmax.numel();
  STD_TORCH_CHECK(absmax.dim() == 1 && count > 0, "absmax must be [blocks], not empty");
  Call call(absmax);
  Tensor codes = new_tensor(absmax, {count}, ScalarType::Byte);
  Tensor nested = new_tensor(absmax, {ceil_div(count, kNestedBlock)}, ScalarType::Float);
  Tensor mean = new_tensor(absmax, {}, ScalarType::Float);
  Tensor workspace = new_tensor(absmax, {quantize_absmax_workspace(count)}, ScalarType::Byte);
  QuantizeAbsmaxProblem p{};
  p.absmax = floats(absmax, count, "absmax");
  p.count = count;
  p.thresholds = floats(thresholds, kNestedCodeSize - 1, "thresholds");
  call.in(absmax), call.in(thresholds);
  if (offset) {
    p.given_offset = floats(*offset, 1, "offset");
    call.in(*offset);
  }
  p.codes = static_cast<uint8_t*>(call.out(codes));
  p.nested_absmax = static_cast<float*>(call.out(nested));
  p.offset = static_cast<float*>(call.out(mean));
  p.workspace = call.out(workspace);
  check(launch_quantize_absmax(p, call.stream()), "quantize_absmax");
  return {codes, nested, mean};
}

void dequantize_into(Call& call, const WeightArgs& args, const PackedWeight& w, Tensor& out) {
  if (out.numel() == 0) return;
  const Weight weight = weight_of(call, args, w, 1, out.numel());
  check(
      launch_dequantize(weight, 0, out.numel(), call.out(out), dtype_of(out, "out"), call.stream()),
      "dequantize_4bit");
}

Tensor dequantize_4bit(const Tensor& packed, const Tensor& absmax, const Tensor& codebook,
                       int64_t blocksize, std::optional<Tensor> nested_absmax,
                       std::optional<Tensor> nested_code, std::optional<Tensor> nested_offset,
                       std::vector<int64_t> shape, ScalarType dtype) {
  int64_t count = 1;
  for (int64_t s : shape) count *= s;
  const WeightArgs args{packed,        absmax,      codebook,     blocksize,
                        nested_absmax, nested_code, nested_offset};
  const PackedWeight w = args.checked(count);
  dtype_of(dtype, "dtype");
  Tensor out = new_tensor(packed, shape, dtype);
  Call call(packed);
  dequantize_into(call, args, w, out);
  return out;
}

void dequantize_4bit_out(const Tensor& packed, const Tensor& absmax, const Tensor& codebook,
                         int64_t blocksize, std::optional<Tensor> nested_absmax,
                         std::optional<Tensor> nested_code, std::optional<Tensor> nested_offset,
                         Tensor out) {
  STD_TORCH_CHECK(out.is_contiguous(), "out must be contiguous");
  const WeightArgs args{packed,        absmax,      codebook,     blocksize,
                        nested_absmax, nested_code, nested_offset};
  const PackedWeight w = args.checked(out.numel());
  Call call(packed);
  dequantize_into(call, args, w, out);
}

// --- many rows: torch's matmul on the dequantized weight -----------------------------------------

// Calls f(first row, rows, their dequantized [rows, k] values) for all of the weight, as many rows
// at a time as the cap allows.
template <class F>
void for_each_panel(Call& call, const Weight& w, DType dtype, const Tensor& like, F&& f) {
  const int64_t row_bytes = w.k * size_of(dtype);
  const int64_t rows = std::clamp<int64_t>(workspace_cap / row_bytes, 1, w.n);
  Tensor workspace = new_tensor(like, {rows, w.k}, torch_type(dtype));
  void* const into = call.out(workspace);
  for (int64_t first = 0; first < w.n; first += rows) {
    const int64_t count = std::min(rows, w.n - first);
    check(launch_dequantize(w, first * w.k, count * w.k, into, dtype, call.stream()),
          "dequantize_4bit");
    f(first, count, torch::stable::narrow(workspace, 0, 0, count));
  }
}

// y [m, n] in the compute dtype; s [m, rank] fp32 is filled where lora_a is given.
Tensor large_linear(Call& call, const LinearCall& l, const Weight& w, double scaling, Tensor& s) {
  const Tensor x = as_matrix(cast(l.x, l.compute), l.m, l.k);
  Tensor y = new_tensor(x, {l.m, l.n}, torch_type(l.compute));
  std::optional<Tensor> bias;
  if (l.bias) bias = cast(*l.bias, l.compute);
  for_each_panel(call, w, l.compute, x, [&](int64_t first, int64_t rows, const Tensor& panel) {
    Tensor part = torch::stable::narrow(y, 1, first, rows);
    if (bias) {
      addmm(part, torch::stable::narrow(*bias, 0, first, rows), x, transposed(panel), 1, 1);
    } else {
      multiply(part, x, transposed(panel));
    }
  });
  if (l.rank > 0) {
    Tensor lora_s;
    if (l.a) {
      lora_s = new_tensor(x, {l.m, l.rank}, torch_type(l.compute));
      multiply(lora_s, x, transposed(cast(*l.a, l.compute)));
      torch::stable::copy_(s, lora_s);
    } else {
      lora_s = as_matrix(cast(*l.s, l.compute), l.m, l.rank);
    }
    addmm(y, y, lora_s, transposed(cast(*l.b, l.compute)), 1, scaling);
  }
  return y;
}

// dx [m, k] in the compute dtype, without LoRA's part. Of a weight larger than the cap, panels are
// summed in the compute dtype, a rounding a panel.
Tensor large_input_grad(Call& call, const Weight& w, int64_t m, const Tensor& dy, DType compute) {
  Tensor dx = new_tensor(dy, {m, w.k}, torch_type(compute));
  Tensor all_dy = dy;
  for_each_panel(call, w, compute, dy, [&](int64_t first, int64_t rows, const Tensor& panel) {
    const Tensor part = torch::stable::narrow(all_dy, 1, first, rows);
    addmm(dx, dx, part, panel, first == 0 ? 0 : 1, 1);
  });
  return dx;
}

// round(dS) [m, rank], which the GEMM of dx has left in its workspace (elements of the compute
// dtype): dA's product takes it from there, and dS is not converted a second time.
Tensor ds_of_workspace(Tensor& workspace, const Plan& plan, const Shape& shape) {
  const GemmWorkspace space =
      gemm_workspace(shape.pass, shape.m, shape.n, shape.k, shape.rank, false, plan.splits);
  const int64_t columns = ceil_div(shape.rank, kLoraPad) * kLoraPad;
  const int64_t first = space.lora / kElementBytes;
  const Tensor flat = torch::stable::narrow(workspace, 0, first, shape.m * columns);
  Tensor padded = as_matrix(flat, shape.m, columns);
  return torch::stable::narrow(padded, 1, 0, shape.rank);
}

// --- linear --------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> linear_4bit(const Tensor& x, const Tensor& packed, const Tensor& absmax,
                                       const Tensor& codebook, int64_t blocksize,
                                       std::optional<Tensor> nested_absmax,
                                       std::optional<Tensor> nested_code,
                                       std::optional<Tensor> nested_offset, int64_t out_features,
                                       std::optional<Tensor> bias, std::optional<Tensor> lora_a,
                                       std::optional<Tensor> lora_b, std::optional<Tensor> lora_s,
                                       double scaling, ScalarType compute_dtype) {
  const WeightArgs args{packed,        absmax,      codebook,     blocksize,
                        nested_absmax, nested_code, nested_offset};
  const LinearCall l =
      check_linear(x, args, out_features, bias, lora_a, lora_b, lora_s, compute_dtype);
  Call call(l.x);
  Tensor s = l.a ? new_tensor(l.x, {l.m, l.rank}, ScalarType::Float)
                 : new_tensor(l.x, {0}, ScalarType::Float);
  if (l.m == 0) return {new_tensor(l.x, l.y_sizes, l.x.scalar_type()), s};

  const Weight w = weight_of(call, args, l.w, l.n, l.k);
  const Plan plan =
      plan_for(call.device(), shape_of(Pass::forward, w, l.m, l.rank, l.s.has_value(), l.compute));
  if (plan.route == Route::large) {
    const Tensor y = cast(large_linear(call, l, w, scaling, s), dtype_of(l.x, "x"));
    return {torch::stable::view(y, l.y_sizes), s};
  }

  const Tensor rounded = cast(l.x, l.compute);
  Tensor y = new_tensor(l.x, l.y_sizes, l.x.scalar_type());
  Tensor workspace = new_tensor(l.x, {plan.workspace_bytes}, ScalarType::Byte);
  LinearProblem p{};
  p.w = w;
  p.m = l.m, p.rank = l.rank;
  p.x = call.in(rounded);
  p.dtype = l.compute;
  p.bias = matrix(call, l.bias);
  p.a = matrix(call, l.a), p.s = matrix(call, l.s), p.b = matrix(call, l.b);
  p.scaling = static_cast<float>(scaling);
  p.s_out = l.a && l.rank > 0 ? static_cast<float*>(call.out(s)) : nullptr;
  p.y = call.out(y);
  p.y_dtype = dtype_of(y, "y");
  p.workspace = call.out(workspace);
  check(launch_linear(p, plan, call.stream()), route_name(plan.route));
  return {y, s};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_4bit_backward(
    const Tensor& dy_in, const Tensor& packed, const Tensor& absmax, const Tensor& codebook,
    int64_t blocksize, std::optional<Tensor> nested_absmax, std::optional<Tensor> nested_code,
    std::optional<Tensor> nested_offset, int64_t in_features, std::optional<Tensor> x,
    std::optional<Tensor> lora_a, std::optional<Tensor> lora_b, std::optional<Tensor> s,
    double scaling, ScalarType compute_dtype, ScalarType dx_dtype, bool need_dx, bool need_da,
    bool need_db) {
  const WeightArgs args{packed,        absmax,      codebook,     blocksize,
                        nested_absmax, nested_code, nested_offset};
  const GradCall g = check_linear_backward(dy_in, args, in_features, x, lora_a, lora_b, s,
                                           compute_dtype, dx_dtype, need_da, need_db);
  Call call(g.dy);
  const ScalarType compute = torch_type(g.compute);
  // Results may not share storage with each other, empty ones included.
  const auto none = [&] { return new_tensor(g.dy, {0}, g.dy.scalar_type()); };
  Tensor dx = none(), da = none(), db = none(), ds = none();
  const Tensor dy = as_matrix(cast(g.dy, g.compute), g.m, g.n);
  const bool lora = g.rank > 0, lora_in_dx = lora && g.a.has_value();
  if (g.b) ds = new_tensor(dy, {g.m, g.rank}, ScalarType::Float);
  std::optional<Tensor> rounded_ds;  // ds in the compute dtype

  const auto multiply_ds = [&] {
    rounded_ds = new_tensor(dy, {g.m, g.rank}, compute);
    multiply(*rounded_ds, dy, cast(*g.b, g.compute), scaling);
    torch::stable::copy_(ds, *rounded_ds);
  };

  if (need_dx && g.m > 0) {
    const Weight w = weight_of(call, args, g.w, g.n, g.k);
    const int64_t rank = lora_in_dx ? g.rank : 0;
    const Shape shape = shape_of(Pass::input_grad, w, g.m, rank, false, g.compute);
    const Plan plan = plan_for(call.device(), shape);
    if (plan.route == Route::large) {
      dx = large_input_grad(call, w, g.m, dy, g.compute);
      if (lora) multiply_ds();
      if (lora_in_dx) addmm(dx, dx, *rounded_ds, cast(*g.a, g.compute), 1, 1);
      dx = torch::stable::view(cast(dx, g.dx_dtype), g.dx_sizes);
    } else {
      dx = new_tensor(dy, g.dx_sizes, dx_dtype);
      Tensor workspace =
          new_tensor(dy, {ceil_div(plan.workspace_bytes, size_of(g.compute))}, compute);
      InputGradProblem p{};
      p.w = w;
      p.m = g.m, p.rank = rank;
      p.dy = call.in(dy);
      p.dtype = g.compute;
      if (lora_in_dx) {
        p.a = matrix(call, g.a), p.b = matrix(call, g.b);
        p.scaling = static_cast<float>(scaling);
        p.ds_out = static_cast<float*>(call.out(ds));
      }
      p.dx = call.out(dx);
      p.dx_dtype = g.dx_dtype;
      p.workspace = call.out(workspace);
      check(launch_input_grad(p, plan, call.stream()), route_name(plan.route));
      if (lora && !lora_in_dx) multiply_ds();
      if (lora_in_dx && plan.route == Route::gemm)
        rounded_ds = ds_of_workspace(workspace, plan, shape);
    }
  } else {
    if (need_dx) dx = new_tensor(dy, g.dx_sizes, dx_dtype);
    if (lora) multiply_ds();
  }

  if (g.b && need_da) {  // dS^T x
    Tensor product = new_tensor(dy, {g.rank, g.k}, compute);
    const Tensor left = rounded_ds ? *rounded_ds : cast(ds, g.compute);
    if (lora) multiply(product, transposed(left), as_matrix(cast(*g.x, g.compute), g.m, g.k));
    da = cast(product, dtype_of(*g.a, "lora_a"));
  }
  if (g.b && need_db) {  // scaling dy^T S
    Tensor product = new_tensor(dy, {g.n, g.rank}, compute);
    if (lora)
      multiply(product, transposed(dy), as_matrix(cast(*g.s, g.compute), g.m, g.rank), scaling);
    db = cast(product, dtype_of(*g.b, "lora_b"));
  }
  return {dx, da, db, ds};
}

}  // namespace
}  // namespace qlk::cuda

STABLE_TORCH_LIBRARY_IMPL(QLK_TORCH_NAMESPACE, QLK_TORCH_KEY, m) {
  m.impl("quantize_4bit", TORCH_BOX(&qlk::cuda::quantize_4bit));
  m.impl("quantize_4bit_scaled", TORCH_BOX(&qlk::cuda::quantize_4bit_scaled));
  m.impl("quantize_absmax", TORCH_BOX(&qlk::cuda::quantize_absmax));
  m.impl("dequantize_4bit", TORCH_BOX(&qlk::cuda::dequantize_4bit));
  m.impl("dequantize_4bit.out", TORCH_BOX(&qlk::cuda::dequantize_4bit_out));
  m.impl("linear_4bit", TORCH_BOX(&qlk::cuda::linear_4bit));
  m.impl("linear_4bit_backward", TORCH_BOX(&qlk::cuda::linear_4bit_backward));
}

// For qlora_kernels/cuda.py, through ctypes. A cap of 0 is the default.
extern "C" __attribute__((visibility("default"))) void qlk_cuda_workspace_cap(int64_t bytes) {
  qlk::cuda::workspace_cap = bytes > 0 ? bytes : qlk::cuda::kWorkspaceCap;
}
