// What the binding needs of a device besides kernels: its limits, the plan of a shape on it, words
// for its errors, and the route's launcher. Kept apart from torch, as the kernels are.
#pragma once
#include <string>

#include "launchers.h"

namespace qlk::cuda {

DeviceLimits limits_of(int device);

// choose() for this device: with what is switched off on it, and what `qlora tune` found.
Plan plan_for(int device, const Shape& shape);

cudaError_t launch_linear(const LinearProblem& p, const Plan& plan, cudaStream_t stream);
cudaError_t launch_input_grad(const InputGradProblem& p, const Plan& plan, cudaStream_t stream);

// What an error means and what to do about it; the driver's age above all.
std::string explain(cudaError_t error);

}  // namespace qlk::cuda
