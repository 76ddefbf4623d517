#include "paging.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <mutex>

namespace qlk::cuda {
namespace {

constexpr int kMaxDevices = 64;

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  cudaDeviceGetAttribute(&value, which, device);
  return value;
}

// A hint: what it could not do is no error of the step's.
void prefetch_hint(const void* address, size_t bytes, int device, cudaStream_t stream) {
#if CUDART_VERSION >= 13000
  const cudaMemLocation to{cudaMemLocationTypeDevice, {device}};
  const cudaError_t error = cudaMemPrefetchAsync(address, bytes, to, 0, stream);
#else
  const cudaError_t error = cudaMemPrefetchAsync(address, bytes, device, stream);
#endif
  if (error != cudaSuccess) cudaGetLastError();
}

// A parameter's states: those that lie close to each other in one allocation are one range. Never
// joined with another's, whose allocation may be the next in memory: a fetch is of one allocation.
class Ranges {
 public:
  void add(const void* address, int64_t bytes) {
    if (address == nullptr || bytes == 0) return;
    const auto begin = reinterpret_cast<uintptr_t>(address);
    all_.push_back({begin, begin + static_cast<uintptr_t>(bytes)});
  }
  void prefetch(int device, cudaStream_t stream) {
    std::sort(all_.begin(), all_.end(), [](Range a, Range b) { return a.begin < b.begin; });
    for (size_t i = 0; i < all_.size();) {
      Range range = all_[i++];
      while (i < all_.size() && all_[i].begin < range.end + kApart)
        range.end = std::max(range.end, all_[i++].end);
      prefetch_hint(reinterpret_cast<const void*>(range.begin), range.end - range.begin, device,
                    stream);
    }
  }

 private:
  struct Range {
    uintptr_t begin, end;
  };
  static constexpr uintptr_t kApart = 257;  // paging.py's alignment, at most
  std::vector<Range> all_;
};

// A device's stream for fetching, and the events that order it; made once.
struct Fetcher {
  std::mutex mutex;  // held while one step is submitted
  cudaStream_t stream = nullptr;
  cudaEvent_t ran = nullptr;
  cudaEvent_t fetched[2] = {};

  bool ready() {
    if (stream != nullptr) return true;
    const auto event = [](cudaEvent_t* e) {
      return cudaEventCreateWithFlags(e, cudaEventDisableTiming) == cudaSuccess;
    };
    if (event(&ran) && event(&fetched[0]) && event(&fetched[1]) &&
        cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) == cudaSuccess)
      return true;
    stream = nullptr;
    forget();
    return false;
  }
  void forget() {
    if (stream != nullptr) cudaStreamDestroy(stream);
    for (cudaEvent_t event : {ran, fetched[0], fetched[1]})
      if (event != nullptr) cudaEventDestroy(event);
    stream = nullptr;
    ran = fetched[0] = fetched[1] = nullptr;
    cudaGetLastError();
  }
};
std::array<Fetcher, kMaxDevices> fetchers;

bool may_prefetch(int device, cudaStream_t stream) {
  if (device >= kMaxDevices) return false;
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusActive;
  if (cudaStreamIsCapturing(stream, &capture) != cudaSuccess) cudaGetLastError();
  return capture == cudaStreamCaptureStatusNone &&
         attribute(cudaDevAttrConcurrentManagedAccess, device);
}

}  // namespace

cudaError_t run_adamw(AdamWGroup group, const std::vector<AdamWTensor>& tensors,
                      const AdamWCaptured* captured, bool prefetch, int device,
                      cudaStream_t stream) {
  const int sms = attribute(cudaDevAttrMultiProcessorCount, device);
  const size_t launches = (tensors.size() + kAdamWTensors - 1) / kAdamWTensors;
  const auto part = [&](size_t launch) {
    const size_t begin = launch * kAdamWTensors;
    return std::pair{begin, std::min(begin + kAdamWTensors, tensors.size())};
  };

  std::unique_lock<std::mutex> lock;
  Fetcher* fetcher = nullptr;
  if (prefetch && may_prefetch(device, stream)) {
    Fetcher& of_device = fetchers[device];
    lock = std::unique_lock(of_device.mutex);
    if (of_device.ready()) fetcher = &of_device;
  }
  // Behind everything that `stream` has been given so far: pages that come must not push out those
  // that the launch before the current one still uses.
  const auto fetch = [&](size_t launch) -> cudaError_t {
    if (fetcher == nullptr || launch >= launches) return cudaSuccess;
    cudaError_t error = cudaEventRecord(fetcher->ran, stream);
    if (error == cudaSuccess) error = cudaStreamWaitEvent(fetcher->stream, fetcher->ran, 0);
    if (error != cudaSuccess) return error;
    const auto [begin, end] = part(launch);
    for (size_t i = begin; i < end; ++i) {
      const AdamWTensor& t = tensors[i];
      Ranges ranges;
      const int64_t bytes = t.count * (group.eight ? 1 : int64_t{sizeof(float)});
      const int64_t blocks = (t.count + kStateBlock - 1) / kStateBlock;
      ranges.add(t.state1, bytes), ranges.add(t.state2, bytes);
      ranges.add(t.absmax1, blocks * int64_t{sizeof(float)});
      ranges.add(t.absmax2, blocks * int64_t{sizeof(float)});
      ranges.prefetch(device, fetcher->stream);
    }
    return cudaEventRecord(fetcher->fetched[launch % 2], fetcher->stream);
  };

  cudaError_t error = fetch(0);
  for (size_t launch = 0; launch < launches && error == cudaSuccess; ++launch) {
    error = fetch(launch + 1);
    if (error == cudaSuccess && fetcher != nullptr)
      error = cudaStreamWaitEvent(stream, fetcher->fetched[launch % 2], 0);
    if (error != cudaSuccess) break;
    const auto [begin, end] = part(launch);
    group.count = static_cast<int>(end - begin);
    std::copy(tensors.begin() + begin, tensors.begin() + end, group.tensors);
    if (captured == nullptr) {
      error = launch_adamw(group, sms, stream);
      continue;
    }
    AdamWClock clock = captured->clock;
    clock.count = group.count;
    std::copy(captured->t.begin() + begin, captured->t.begin() + end, clock.t);
    error = launch_adamw_clock(clock, captured->steps + begin, stream);
    if (error == cudaSuccess)
      error = launch_adamw_captured(group, captured->steps + begin, sms, stream);
  }
  return error;
}

}  // namespace qlk::cuda

// --- for qlora_kernels/paging.py, through ctypes -------------------------------------------------

#define QLK_API extern "C" __attribute__((visibility("default")))

namespace {

// Makes a device current for as long as it lives.
class Current {
 public:
  explicit Current(int device) {
    cudaGetDevice(&before_);
    error = cudaSetDevice(device);
  }
  ~Current() { cudaSetDevice(before_); }
  cudaError_t error;

 private:
  int before_ = 0;
};

}  // namespace

// What paging.choose() asks: whether host and device may touch managed memory at once, and the
// bytes that are free on the device.
QLK_API int qlk_cuda_managed_limits(int device, int* managed, int* concurrent, int64_t* free) {
  const Current current(device);
  if (current.error != cudaSuccess) return static_cast<int>(current.error);
  *managed = qlk::cuda::attribute(cudaDevAttrManagedMemory, device);
  *concurrent = qlk::cuda::attribute(cudaDevAttrConcurrentManagedAccess, device);
  size_t available = 0, total = 0;
  const cudaError_t error = cudaMemGetInfo(&available, &total);
  *free = static_cast<int64_t>(available);
  return static_cast<int>(error);
}

// Managed memory of zeros, which are written on `stream`. On an error there is none.
QLK_API int qlk_cuda_managed_allocate(int device, int64_t bytes, void** address, void* stream) {
  const Current current(device);
  *address = nullptr;
  cudaError_t error = current.error;
  if (error == cudaSuccess)
    error = cudaMallocManaged(address, static_cast<size_t>(bytes), cudaMemAttachGlobal);
  if (error == cudaSuccess) {
    error =
        cudaMemsetAsync(*address, 0, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream));
    if (error != cudaSuccess) cudaFree(*address);
  }
  if (error != cudaSuccess) {
    *address = nullptr;
    cudaGetLastError();  // told by the result
  }
  return static_cast<int>(error);
}

// Waits for the device, as cudaFree does: nothing that runs may still use it.
QLK_API int qlk_cuda_managed_free(int device, void* address) {
  const Current current(device);
  const cudaError_t error = cudaFree(address);
  if (error != cudaSuccess) cudaGetLastError();
  return static_cast<int>(error);
}

// Lets go of the streams and events that were made for fetching: before the device is reset.
QLK_API void qlk_cuda_paging_forget() {
  for (auto& fetcher : qlk::cuda::fetchers) {
    const std::lock_guard<std::mutex> lock(fetcher.mutex);
    fetcher.forget();
  }
}
