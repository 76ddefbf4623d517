// adamw_ on CUDA: checks the lists of tensors against each other and hands them to the kernel
// (cuda/adamw.cu) by cuda/paging.h. Neither allocates nor waits.
#include <cuda_runtime_api.h>

#include <vector>

#if defined(QLK_CUDA_EMULATED)
#include "cuda/call_emulated.h"
#else
#include "cuda/call_cuda.h"
#endif
#include "cuda/device.h"
#include "cuda/paging.h"
#include "torch_args.h"

namespace qlk::cuda {
namespace {

// The tensor's memory, to be read and written.
void* in_place(Call& call, const Tensor& t) {
  call.in(t);  // known, and on the device; its contents count
  return const_cast<Tensor&>(t).mutable_data_ptr();
}

const Tensor& checked(const Tensor& t, ScalarType dtype, int64_t count, const char* what) {
  STD_TORCH_CHECK(t.scalar_type() == dtype && t.numel() == count && t.is_contiguous(), what,
                  " must be contiguous with ", count, " values, and of the dtype that goes with p");
  return t;
}

void adamw(std::vector<Tensor> ps, std::vector<Tensor> grads, std::vector<Tensor> state1,
           std::vector<Tensor> state2, std::vector<Tensor> absmax1, std::vector<Tensor> absmax2,
           std::optional<Tensor> maps, std::vector<double> scalars, bool paged) {
  if (ps.empty()) return;
  const size_t n = ps.size();
  STD_TORCH_CHECK(grads.size() == n && state1.size() == n && state2.size() == n,
                  "grads, state1 and state2 must be lists of ", n, " tensors, as many as p");
  const bool eight = maps.has_value();
  const size_t scales = eight ? n : 0;
  STD_TORCH_CHECK(absmax1.size() == scales && absmax2.size() == scales,
                  "absmax1 and absmax2 must be lists of ", scales,
                  " tensors: one for each p with 8-bit states (with maps), none without");
  STD_TORCH_CHECK(scalars.size() == 8,
                  "scalars must be beta1, 1 - beta1, beta2, 1 - beta2, decay, step_size, scale_v, "
                  "eps; got ",
                  scalars.size(), " values");
  const ScalarType dtype = ps[0].scalar_type();
  const ScalarType state_dtype = eight ? ScalarType::Byte : ScalarType::Float;

  Call call(ps[0]);
  AdamWGroup group{};
  group.dtype = dtype_of(dtype, "p");
  group.eight = eight;
  if (eight) {
    const Tensor& m = checked(*maps, ScalarType::Int, 2 * kStateMap, "maps");
    group.maps = static_cast<const uint32_t*>(call.in(m));
    STD_TORCH_CHECK(reinterpret_cast<uint64_t>(group.maps) % 16 == 0,
                    "maps must be aligned to 16 bytes");
  }
  const auto scalar = [&](int i) { return static_cast<float>(scalars[i]); };
  group.step = {scalar(0), scalar(1), scalar(2), scalar(3),
                scalar(4), scalar(5), scalar(6), scalar(7)};

  std::vector<AdamWTensor> tensors;
  tensors.reserve(n);
  for (size_t i = 0; i < n; ++i) {
    const int64_t count = ps[i].numel(), blocks = ceil_div(count, int64_t{kStateBlock});
    checked(ps[i], dtype, count, "p");
    checked(grads[i], dtype, count, "grad");
    checked(state1[i], state_dtype, count, "state1");
    checked(state2[i], state_dtype, count, "state2");
    if (eight) {
      checked(absmax1[i], ScalarType::Float, blocks, "absmax1");
      checked(absmax2[i], ScalarType::Float, blocks, "absmax2");
    }
    if (count == 0) continue;
    AdamWTensor t{};
    t.p = in_place(call, ps[i]);
    t.grad = call.in(grads[i]);
    t.state1 = in_place(call, state1[i]), t.state2 = in_place(call, state2[i]);
    if (eight) {
      t.absmax1 = static_cast<float*>(in_place(call, absmax1[i]));
      t.absmax2 = static_cast<float*>(in_place(call, absmax2[i]));
    }
    t.count = count;
    tensors.push_back(t);
  }
  const cudaError_t error = run_adamw(group, tensors, paged, call.device(), call.stream());
  STD_TORCH_CHECK(error == cudaSuccess, "adamw_: ", explain(error));
}

}  // namespace
}  // namespace qlk::cuda

STABLE_TORCH_LIBRARY_IMPL(QLK_TORCH_NAMESPACE, QLK_TORCH_KEY, m) {
  m.impl("adamw_", TORCH_BOX(&qlk::cuda::adamw));
}
