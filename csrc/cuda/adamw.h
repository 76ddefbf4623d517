// The launcher of the AdamW kernel (adamw.cu), as launchers.h has those of a layer's kernels.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "../dtype.h"

namespace qlk::cuda {

// One tensor of an AdamW step, updated in place. States are fp32 [count], or one byte a value with
// an absmax for each 256 of them.
struct AdamWTensor {
  void* p;
  const void* grad;
  void *state1, *state2;
  float *absmax1, *absmax2;  // null: states are fp32
  int64_t count;
  unsigned first_tile;  // launch_adamw() fills in these
  unsigned wide;
};

// The scalars of a step, each rounded to fp32 once: see qlora_kernels/optim.py.
struct AdamWStep {
  float beta1, rest1;  // rest: 1 - beta
  float beta2, rest2;
  float decay;      // 1 - lr weight_decay
  float step_size;  // lr / (1 - beta1^t)
  float scale_v;    // 1 / sqrt(1 - beta2^t)
  float eps;
};

// As many tensors as one launch takes: they travel as kernel parameters, of which there are 4 KB.
constexpr int kAdamWTensors = 60;
constexpr int kStateBlock = 256;  // values of an 8-bit state that share one absmax

// The tables of the 8-bit states (optim.state_maps): for each state the 256 values of its codes,
// then how to find the nearest of them.
constexpr int kStateCodes = 256;
constexpr int kStateSearch = 2948;
constexpr int kStateMap = kStateCodes + kStateSearch;  // 32-bit words

struct AdamWGroup {
  AdamWTensor tensors[kAdamWTensors];
  int count;    // of them
  DType dtype;  // of p and grad, in all of them
  bool eight;   // 8-bit states, in all of them
  AdamWStep step;
  const uint32_t* maps;  // [2][kStateMap], aligned to 16 bytes; null unless `eight`
};
cudaError_t launch_adamw(AdamWGroup group, int sms, cudaStream_t stream);

// --- steps that a graph replays: t, and with it the scalars, belong to the device
// -----------------

// What the scalars are made of. `lr` is read when the kernel runs; null: lr_value, for all replays.
struct AdamWClock {
  float* t[kAdamWTensors];  // of each tensor: the steps that it has taken, counted up here
  int count;
  const float* lr;
  double lr_value, beta1, beta2, eps, weight_decay;
};
// Counts up each t, and writes the scalars of that step, those of optim.py's _scalars() to the bit.
cudaError_t launch_adamw_clock(const AdamWClock& clock, AdamWStep* steps, cudaStream_t stream);
// launch_adamw() with scalars in device memory, of each tensor its own; group.step is not read.
cudaError_t launch_adamw_captured(AdamWGroup group, const AdamWStep* steps, int sms,
                                  cudaStream_t stream);

}  // namespace qlk::cuda
