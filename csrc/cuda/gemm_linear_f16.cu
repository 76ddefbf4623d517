// y's fused GEMM for fp16.
#include "gemm_linear.cuh"

namespace qlk::cuda {

template cudaError_t run_gemm_linear<__half>(const GemmLinearArguments&, const GemmTile&, int,
                                             cudaStream_t);

}  // namespace qlk::cuda
