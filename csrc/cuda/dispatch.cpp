#include "dispatch.h"

namespace qlk::cuda {

const char* route_name(Route route) {
  switch (route) {
    case Route::decode_simt:
      return "decode_simt";
    case Route::decode_mma:
      return "decode_mma";
    case Route::gemm:
      return "gemm";
    case Route::large:
      return "large";
  }
  return "?";
}

bool complete(const DeviceLimits&, const Shape&, Plan* plan) {
  plan->shared_bytes = 0, plan->workspace_bytes = 0;
  return plan->route == Route::large;
}

std::vector<Plan> candidates(const DeviceLimits&, const Shape&) {
  Plan large{};
  large.route = Route::large;
  return {large};
}

Choice choose(const DeviceLimits& device, const Shape& shape, RouteMask) {
  return {candidates(device, shape).back(), "no fused kernel is compiled in"};
}

}  // namespace qlk::cuda
