// One op call on the emulated device: the same ops in a namespace of their own, on CPU tensors,
// whose memory stands for the device's. Tests load this library beside the runtime's stand-in
// (docs/emulator_runtime.md), so that they run from the op through the binding and the launcher to
// the PTX that ships. What call_cuda.h takes from torch, this takes from the stand-in.
//
// The runtime is told of every tensor that a kernel gets: results count as uninitialised, and what
// was not named is out of bounds. On the default stream an op is done, and its memory forgotten,
// when it returns. On a stream of the test's (qlk_emulated_stream) everything stays until the test
// calls qlk_emulated_release(): as torch's allocator does not give memory away that a stream still
// uses.
#pragma once
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

#define QLK_TORCH_NAMESPACE qlora_kernels_emulated
#define QLK_TORCH_KEY CPU
#define QLK_SHIM(op) aoti_torch_cpu_##op

extern "C" {
AOTITorchError aoti_torch_cpu_addmm_out(AtenTensorHandle out, AtenTensorHandle self,
                                        AtenTensorHandle mat1, AtenTensorHandle mat2, double beta,
                                        double alpha);
int cudart_stub_uninitialized(void* address, uint64_t bytes);
}

namespace qlk::cuda {

// Memory that the runtime knows, and the tensors that keep it.
struct Span {
  char *begin, *end;
};
struct Emulated {
  cudaStream_t stream = nullptr;
  std::vector<Span> spans;  // disjoint
  std::vector<torch::stable::Tensor> held;
  int depth = 0;  // ops within ops: the check at first use runs layers inside one

  void see(const torch::stable::Tensor& t) {
    if (t.numel() == 0) return;
    held.push_back(t);
    char* const data = static_cast<char*>(const_cast<void*>(t.const_data_ptr()));
    Span span{data, data + t.numel() * t.element_size()};
    cudaPointerAttributes known{};
    cudaPointerGetAttributes(&known, data);
    if (known.type == cudaMemoryTypeManaged) return;  // the runtime's own
    for (size_t i = 0; i < spans.size(); ++i) {
      const Span old = spans[i];
      if (old.end <= span.begin || span.end <= old.begin) continue;
      if (old.begin <= span.begin && span.end <= old.end) return;
      cudaHostUnregister(old.begin);  // two views of one memory: it is known as a whole
      span = {std::min(old.begin, span.begin), std::max(old.end, span.end)};
      spans.erase(spans.begin() + i--);
    }
    cudaHostRegister(span.begin, span.end - span.begin, cudaHostRegisterDefault);
    spans.push_back(span);
  }
  void release() {
    cudaDeviceSynchronize();
    for (const Span& span : spans) cudaHostUnregister(span.begin);
    spans.clear(), held.clear();
  }
};
inline Emulated& emulated() {
  static Emulated e;
  return e;
}

class Call {
 public:
  explicit Call(const torch::stable::Tensor&) { ++emulated().depth; }
  ~Call() {
    if (--emulated().depth == 0 && emulated().stream == nullptr) emulated().release();
  }
  Call(const Call&) = delete;
  // Tensors on the CPU do not say: the one that the test has made current.
  int device() const {
    int index = 0;
    cudaGetDevice(&index);
    return index;
  }
  cudaStream_t stream() const { return emulated().stream; }

  const void* in(const torch::stable::Tensor& t) {
    emulated().see(t);
    return t.const_data_ptr();
  }
  void* out(torch::stable::Tensor& t) {
    emulated().see(t);
    if (t.numel() > 0)
      cudart_stub_uninitialized(t.mutable_data_ptr(), t.numel() * t.element_size());
    return t.mutable_data_ptr();
  }
};

}  // namespace qlk::cuda

// Weak: several files include this.
#define QLK_EMULATED_API __attribute__((visibility("default"), weak))

extern "C" QLK_EMULATED_API void qlk_emulated_stream(void* stream) {
  qlk::cuda::emulated().stream = static_cast<cudaStream_t>(stream);
}
extern "C" QLK_EMULATED_API void qlk_emulated_release() { qlk::cuda::emulated().release(); }
