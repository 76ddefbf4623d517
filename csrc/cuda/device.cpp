#include "device.h"

#include <algorithm>
#include <array>
#include <iterator>
#include <map>
#include <mutex>
#include <tuple>

namespace qlk::cuda {
namespace {

constexpr int kMaxDevices = 64;

using ShapeKey = std::tuple<int, int64_t, int64_t, int64_t, int64_t>;
ShapeKey key_of(Pass pass, int64_t m, int64_t n, int64_t k, int64_t rank) {
  return {static_cast<int>(pass), m, n, k, rank};
}

// All that a choice depends on.
auto fields_of(const Shape& s) {
  return std::tuple(s.pass, s.m, s.n, s.k, s.rank, s.s_given, s.dtype, s.block_log2, s.scales);
}
auto fields_of(const DeviceLimits& d) {
  return std::tuple(d.major, d.minor, d.sms, d.shared_optin, d.shared_per_sm, d.threads_per_sm,
                    d.l2_bytes);
}

// Plans that are kept: a choice prices hundreds of tiles and splits. A model has a few shapes;
// sequences of any length have no end of them, so a full cache begins again.
constexpr size_t kKeptPlans = 1024;

// What is known of a device beyond its limits; written from Python (qlora_kernels/cuda.py).
struct Settings {
  bool seen = false;
  RouteMask disabled = 0;
  std::map<ShapeKey, Plan> tuned;
  // Of these limits and settings: whoever changes one clears the other.
  DeviceLimits limits{};
  std::map<decltype(fields_of(Shape{})), Plan> kept;
  int64_t kept_hits = 0;

  void disable(RouteMask mask) { disabled = mask, kept.clear(); }
  void tune(const ShapeKey& key, const Plan& plan) { tuned[key] = plan, kept.clear(); }
  void forget_tuned() { tuned.clear(), kept.clear(); }

  Plan choose_plan(const Shape& shape) const {
    const auto found = tuned.find(key_of(shape.pass, shape.m, shape.n, shape.k, shape.rank));
    if (found != tuned.end()) {
      Plan plan = found->second;
      if (!(disabled & bit(plan.route)) && complete(limits, shape, &plan)) return plan;
    }
    return choose(limits, shape, disabled).plan;
  }
  Plan plan(const DeviceLimits& now, const Shape& shape) {
    if (fields_of(now) != fields_of(limits)) limits = now, kept.clear();
    if (const auto found = kept.find(fields_of(shape)); found != kept.end()) {
      ++kept_hits;
      return found->second;
    }
    if (kept.size() >= kKeptPlans) kept.clear();
    return kept[fields_of(shape)] = choose_plan(shape);
  }
};

// Called once for each device, before the first linear layer on it; true: do not call again.
// Python's check of the kernels, which runs them, so calls made meanwhile on the device go by.
using FirstUse = int (*)(int device);
FirstUse first_use = nullptr;

std::mutex mutex;
std::array<Settings, kMaxDevices> settings;

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  cudaDeviceGetAttribute(&value, which, device);
  return value;
}

std::string version(int v) {
  return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10);
}

}  // namespace

DeviceLimits limits_of(int device) {
  return {attribute(cudaDevAttrComputeCapabilityMajor, device),
          attribute(cudaDevAttrComputeCapabilityMinor, device),
          attribute(cudaDevAttrMultiProcessorCount, device),
          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
          attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device),
          attribute(cudaDevAttrMaxThreadsPerMultiProcessor, device),
          attribute(cudaDevAttrL2CacheSize, device)};
}

static void see(int device) {
  if (first_use == nullptr || device >= kMaxDevices) return;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    if (settings[device].seen) return;
    settings[device].seen = true;
  }
  if (!first_use(device)) {  // not now: a graph is being captured
    const std::lock_guard<std::mutex> lock(mutex);
    settings[device].seen = false;
  }
}

Plan plan_for(int device, const Shape& shape) {
  see(device);
  const DeviceLimits limits = limits_of(device);  // the driver's own cache: tens of nanoseconds
  if (device >= kMaxDevices) return choose(limits, shape).plan;
  const std::lock_guard<std::mutex> lock(mutex);
  return settings[device].plan(limits, shape);
}

cudaError_t launch_linear(const LinearProblem& p, const Plan& plan, cudaStream_t stream) {
  switch (plan.route) {
    case Route::decode_simt:
    case Route::decode_mma:
      return launch_decode_linear(p, plan, stream);
    case Route::gemm:
      return launch_gemm_linear(p, plan, stream);
    default:
      return cudaErrorInvalidConfiguration;  // `large` is the caller's
  }
}

cudaError_t launch_input_grad(const InputGradProblem& p, const Plan& plan, cudaStream_t stream) {
  switch (plan.route) {
    case Route::decode_simt:
    case Route::decode_mma:
      return launch_decode_input_grad(p, plan, stream);
    case Route::gemm:
      return launch_gemm_input_grad(p, plan, stream);
    default:
      return cudaErrorInvalidConfiguration;
  }
}

std::string explain(cudaError_t error) {
  std::string words = cudaGetErrorString(error);
  int device = 0, driver = 0, runtime = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  if (error == cudaErrorInsufficientDriver || error == cudaErrorUnsupportedPtxVersion ||
      (driver > 0 && driver / 1000 < runtime / 1000)) {
    words += ". The driver here supports CUDA " + version(driver) +
             ", and qlora-kernels was built " + "with CUDA " + version(runtime) +
             ": update NVIDIA's driver (CUDA 13 needs 580 or " +
             "later), or build with an older toolkit (CUDA_HOME=... QLORA_KERNELS_CUDA=1 pip " +
             "install .), or set QLORA_KERNELS_DISABLE=all";
  } else if (error == cudaErrorNoKernelImageForDevice && cudaGetDevice(&device) == cudaSuccess) {
    const DeviceLimits d = limits_of(device);
    words += ". This GPU has compute capability " + std::to_string(d.major) + "." +
             std::to_string(d.minor) + "; build for it with QLORA_KERNELS_CUDA_ARCHITECTURES=" +
             std::to_string(d.capability()) +
             ". 7.5 (Turing) is the oldest that can run these "
             "kernels";
  } else if (error == cudaErrorInvalidConfiguration) {
    words +=
        ". The plan was not compiled or does not fit; please report it with the output of "
        "`qlora kernels`";
  }
  return words;
}

}  // namespace qlk::cuda

// --- for qlora_kernels/cuda.py, through ctypes ---------------------------------------------------

#define QLK_API extern "C" __attribute__((visibility("default")))

// What to call before the first linear layer on a device; null: nothing. Devices count as new
// again.
QLK_API void qlk_cuda_on_first_use(int (*callback)(int device)) {
  const std::lock_guard<std::mutex> lock(qlk::cuda::mutex);
  qlk::cuda::first_use = callback;
  for (auto& s : qlk::cuda::settings) s.seen = false;
}

// Routes that are off on a device, a bit each.
QLK_API void qlk_cuda_disable(int device, unsigned mask) {
  if (device < 0 || device >= qlk::cuda::kMaxDevices) return;
  const std::lock_guard<std::mutex> lock(qlk::cuda::mutex);
  qlk::cuda::settings[device].disable(mask);
}

// From now on this shape runs so on this device: fields in Plan's order, from `route` to `splits`.
QLK_API void qlk_cuda_tuned(int device, int pass, int64_t m, int64_t n, int64_t k, int64_t rank,
                            const int* plan) {
  using namespace qlk::cuda;
  if (device < 0 || device >= kMaxDevices) return;
  Plan p{};
  p.route = static_cast<Route>(plan[0]);
  p.tile_m = plan[1], p.tile_n = plan[2], p.tile_k = plan[3];
  p.warps = plan[4], p.stages = plan[5], p.splits = plan[6];
  const std::lock_guard<std::mutex> lock(mutex);
  settings[device].tune(key_of(static_cast<Pass>(pass), m, n, k, rank), p);
}
QLK_API void qlk_cuda_forget_tuned(int device) {
  if (device < 0 || device >= qlk::cuda::kMaxDevices) return;
  const std::lock_guard<std::mutex> lock(qlk::cuda::mutex);
  qlk::cuda::settings[device].forget_tuned();
}

// How many plans are kept for a device; `hits`: how often one of them was asked for again.
QLK_API int64_t qlk_cuda_kept_plans(int device, int64_t* hits) {
  if (device < 0 || device >= qlk::cuda::kMaxDevices) return 0;
  const std::lock_guard<std::mutex> lock(qlk::cuda::mutex);
  *hits = qlk::cuda::settings[device].kept_hits;
  return static_cast<int64_t>(qlk::cuda::settings[device].kept.size());
}

// The plan that a layer of a bf16 weight with nested scales gets, in qlk_cuda_tuned's order.
QLK_API void qlk_cuda_plan(int device, int pass, int64_t m, int64_t n, int64_t k, int64_t rank,
                           int* plan) {
  using namespace qlk::cuda;
  const Shape shape{static_cast<Pass>(pass), m, n, k, rank, false, qlk::DType::bf16, 6,
                    qlk::ScaleKind::nested};
  const Plan p = plan_for(device, shape);
  const int fields[] = {
      static_cast<int>(p.route), p.tile_m, p.tile_n, p.tile_k, p.warps, p.stages, p.splits};
  std::copy(std::begin(fields), std::end(fields), plan);
}

// The toolkit that this was built with and the driver here, as CUDA numbers them.
QLK_API int qlk_cuda_versions(int* runtime, int* driver) {
  cudaRuntimeGetVersion(runtime);
  return static_cast<int>(cudaDriverGetVersion(driver));
}
