// The launcher of y's fused GEMM, and its kernels for bf16 (gemm_linear.cuh).
#include "gemm_linear.cuh"

namespace qlk::cuda {

extern template cudaError_t run_gemm_linear<__half>(const GemmLinearArguments&, const GemmTile&,
                                                    int, cudaStream_t);
template cudaError_t run_gemm_linear<__nv_bfloat16>(const GemmLinearArguments&, const GemmTile&,
                                                    int, cudaStream_t);

cudaError_t launch_gemm_linear(const LinearProblem& p, const Plan& plan, cudaStream_t stream) {
  const int64_t n = p.w.n, k = p.w.k;
  const Shape shape{Pass::forward,  p.m,     n, k, p.rank, p.s.data != nullptr, p.dtype,
                    p.w.block_log2, p.w.kind};
  if (!gemm_compiled(plan, shape)) return cudaErrorInvalidConfiguration;
  GemmTile tile = tile_of(plan);
  if (!rows_aligned(p.x, k) || !rows_aligned(p.w.packed, k)) tile = kAnywhereLinearTile;

  const GemmWorkspace space =
      gemm_workspace(Pass::forward, p.m, n, k, p.rank, shape.s_given, plan.splits);
  auto* workspace = static_cast<uint8_t*>(p.workspace);
  GemmLinearArguments a{};
  a.w = p.w, a.m = p.m, a.x = p.x, a.b = p.b, a.rank = p.rank, a.bias = p.bias;
  a.y = p.y, a.y_dtype = p.y_dtype;
  a.b_aligned = rows_aligned(p.b.data, p.rank);
  if (p.rank > 0) {
    a.lora_columns = ceil_div(p.rank, kLoraPad) * kLoraPad;
    a.s = workspace + space.lora;
    const LoraProblem lora{p.x,
                           p.dtype,
                           p.m,
                           k,
                           p.a,
                           false,
                           p.s,
                           p.rank,
                           p.scaling,
                           1.0f,
                           p.s_out,
                           reinterpret_cast<float*>(workspace + space.lora_partial),
                           workspace + space.lora};
    if (cudaError_t e = launch_lora(lora, stream); e != cudaSuccess) return e;
  }
  a.steps = ceil_div(k, tile.k);
  const int splits = gemm_splits(plan.splits, a.steps);
  if (splits > 1) a.partial = reinterpret_cast<float*>(workspace + space.partial);

  const cudaError_t e = p.dtype == DType::bf16
                            ? run_gemm_linear<__nv_bfloat16>(a, tile, splits, stream)
                            : run_gemm_linear<__half>(a, tile, splits, stream);
  if (e != cudaSuccess || splits == 1) return e;
  return launch_sum_splits(a.partial, splits, p.m, n, p.bias, p.y, p.y_dtype, stream);
}

}  // namespace qlk::cuda
