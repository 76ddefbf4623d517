// adamw_ and adamw_capturable_ on CUDA: they check the lists of tensors against each other and hand
// them to the kernels (cuda/adamw.cu) by cuda/paging.h. Neither allocates nor waits.
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

using Tensors = std::vector<Tensor>;

// The lists of an op, whose checked contents are what the launchers take.
struct Lists {
  const Tensors &p, &grad, &state1, &state2, &absmax1, &absmax2;
  const std::optional<Tensor>& maps;
};

AdamWGroup group_of(Call& call, const Lists& lists) {
  const size_t n = lists.p.size();
  STD_TORCH_CHECK(lists.grad.size() == n && lists.state1.size() == n && lists.state2.size() == n,
                  "grads, state1 and state2 must be lists of ", n, " tensors, as many as p");
  AdamWGroup group{};
  group.dtype = dtype_of(lists.p[0].scalar_type(), "p");
  group.eight = lists.maps.has_value();
  const size_t scales = group.eight ? n : 0;
  STD_TORCH_CHECK(lists.absmax1.size() == scales && lists.absmax2.size() == scales,
                  "absmax1 and absmax2 must be lists of ", scales,
                  " tensors: one for each p with 8-bit states (with maps), none without");
  if (group.eight) {
    const Tensor& m = checked(*lists.maps, ScalarType::Int, 2 * kStateMap, "maps");
    group.maps = static_cast<const uint32_t*>(call.in(m));
    STD_TORCH_CHECK(reinterpret_cast<uint64_t>(group.maps) % 16 == 0,
                    "maps must be aligned to 16 bytes");
  }
  return group;
}

std::vector<AdamWTensor> tensors_of(Call& call, const Lists& lists) {
  const bool eight = lists.maps.has_value();
  const ScalarType dtype = lists.p[0].scalar_type();
  const ScalarType state_dtype = eight ? ScalarType::Byte : ScalarType::Float;
  std::vector<AdamWTensor> tensors;
  tensors.reserve(lists.p.size());
  for (size_t i = 0; i < lists.p.size(); ++i) {
    const int64_t count = lists.p[i].numel(), blocks = ceil_div(count, int64_t{kStateBlock});
    checked(lists.p[i], dtype, count, "p");
    checked(lists.grad[i], dtype, count, "grad");
    checked(lists.state1[i], state_dtype, count, "state1");
    checked(lists.state2[i], state_dtype, count, "state2");
    AdamWTensor t{};
    t.p = in_place(call, lists.p[i]);
    t.grad = call.in(lists.grad[i]);
    t.state1 = in_place(call, lists.state1[i]), t.state2 = in_place(call, lists.state2[i]);
    if (eight) {
      checked(lists.absmax1[i], ScalarType::Float, blocks, "absmax1");
      checked(lists.absmax2[i], ScalarType::Float, blocks, "absmax2");
      t.absmax1 = static_cast<float*>(in_place(call, lists.absmax1[i]));
      t.absmax2 = static_cast<float*>(in_place(call, lists.absmax2[i]));
    }
    t.count = count;
    tensors.push_back(t);
  }
  return tensors;
}

void adamw(Tensors ps, Tensors grads, Tensors state1, Tensors state2, Tensors absmax1,
           Tensors absmax2, std::optional<Tensor> maps, std::vector<double> scalars, bool paged) {
  if (ps.empty()) return;
  STD_TORCH_CHECK(scalars.size() == 8,
                  "scalars must be beta1, 1 - beta1, beta2, 1 - beta2, decay, step_size, scale_v, "
                  "eps; got ",
                  scalars.size(), " values");
  Call call(ps[0]);
  const Lists lists{ps, grads, state1, state2, absmax1, absmax2, maps};
  AdamWGroup group = group_of(call, lists);
  const auto scalar = [&](int i) { return static_cast<float>(scalars[i]); };
  group.step = {scalar(0), scalar(1), scalar(2), scalar(3),
                scalar(4), scalar(5), scalar(6), scalar(7)};
  const cudaError_t error =
      run_adamw(group, tensors_of(call, lists), nullptr, paged, call.device(), call.stream());
  STD_TORCH_CHECK(error == cudaSuccess, "adamw_: ", explain(error));
}

// The scalars are made on the device, into `scratch`, of each tensor's t, which is counted up.
void adamw_capturable(Tensors ps, Tensors grads, Tensors state1, Tensors state2, Tensors absmax1,
                      Tensors absmax2, std::optional<Tensor> maps, Tensors t,
                      std::optional<Tensor> lr, std::vector<double> options, Tensor scratch,
                      bool paged) {
  if (ps.empty()) return;
  STD_TORCH_CHECK(options.size() == 5, "options must be lr, beta1, beta2, eps, weight_decay; got ",
                  options.size(), " values");
  STD_TORCH_CHECK(t.size() == ps.size(), "t must be a list of ", ps.size(),
                  " tensors, as many as p");
  Call call(ps[0]);
  const Lists lists{ps, grads, state1, state2, absmax1, absmax2, maps};
  const AdamWGroup group = group_of(call, lists);
  AdamWCaptured captured{};
  AdamWClock& clock = captured.clock;
  clock.lr_value = options[0], clock.beta1 = options[1], clock.beta2 = options[2];
  clock.eps = options[3], clock.weight_decay = options[4];
  if (lr.has_value())
    clock.lr = static_cast<const float*>(call.in(checked(*lr, ScalarType::Float, 1, "lr")));
  for (const Tensor& one : t)
    captured.t.push_back(
        static_cast<float*>(in_place(call, checked(one, ScalarType::Float, 1, "t"))));
  const auto floats = static_cast<int64_t>(ps.size() * sizeof(AdamWStep) / sizeof(float));
  checked(scratch, ScalarType::Float, floats, "scratch");
  captured.steps = static_cast<AdamWStep*>(call.out(scratch));
  const cudaError_t error =
      run_adamw(group, tensors_of(call, lists), &captured, paged, call.device(), call.stream());
  STD_TORCH_CHECK(error == cudaSuccess, "adamw_capturable_: ", explain(error));
}

}  // namespace
}  // namespace qlk::cuda

STABLE_TORCH_LIBRARY_IMPL(QLK_TORCH_NAMESPACE, QLK_TORCH_KEY, m) {
  m.impl("adamw_", TORCH_BOX(&qlk::cuda::adamw));
  m.impl("adamw_capturable_", TORCH_BOX(&qlk::cuda::adamw_capturable));
}
