// dx's fused GEMM for fp16.
#include "gemm_input_grad.cuh"

namespace qlk::cuda {

template cudaError_t run_gemm_input_grad<__half>(const GemmInputGradArguments&, const GemmTile&,
                                                 int, cudaStream_t);

}  // namespace qlk::cuda
