// One op call on a CUDA device: its guard, its stream, its allocator. The emulated twin of this
// file is call_emulated.h; torch_ops_cuda.cpp knows neither torch's stream nor its allocator but by
// them.
#pragma once
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#define QLK_TORCH_NAMESPACE qlora_kernels
#define QLK_TORCH_KEY CUDA
#define QLK_SHIM(op) aoti_torch_cuda_##op

// Declared by torch's header only where that torch was built for CUDA; the library is not.
extern "C" {
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
AOTITorchError aoti_torch_cuda_addmm_out(AtenTensorHandle out, AtenTensorHandle self,
                                         AtenTensorHandle mat1, AtenTensorHandle mat2, double beta,
                                         double alpha);
}

namespace qlk::cuda {

class Call {
 public:
  explicit Call(const torch::stable::Tensor& on) : device_(device_of(on)), guard_(device_) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  int device() const { return device_; }
  cudaStream_t stream() const { return stream_; }

  // Pointers as kernels take them: of this device, whose kernels would fail on another's only later
  // and elsewhere.
  const void* in(const torch::stable::Tensor& t) {
    check(t);
    return t.const_data_ptr();
  }
  void* out(torch::stable::Tensor& t) {
    check(t);
    return t.mutable_data_ptr();
  }

 private:
  static int device_of(const torch::stable::Tensor& t) {
    STD_TORCH_CHECK(t.is_cuda(), "a tensor is not on the GPU that the others are on");
    return t.get_device();
  }
  void check(const torch::stable::Tensor& t) const {
    STD_TORCH_CHECK(device_of(t) == device_, "a tensor is on GPU ", t.get_device(),
                    ", the others are on GPU ", device_);
  }

  int device_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

}  // namespace qlk::cuda
