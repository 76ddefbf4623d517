// The launcher of dx's fused GEMM, and its kernels for bf16 (gemm_input_grad.cuh).
#include "gemm_input_grad.cuh"

namespace qlk::cuda {

extern template cudaError_t run_gemm_input_grad<__half>(const GemmInputGradArguments&,
                                                        const GemmTile&, int, cudaStream_t);
template cudaError_t run_gemm_input_grad<__nv_bfloat16>(const GemmInputGradArguments&,
                                                        const GemmTile&, int, cudaStream_t);

cudaError_t launch_gemm_input_grad(const InputGradProblem& p, const Plan& plan,
                                   cudaStream_t stream) {
  const int64_t n = p.w.n, k = p.w.k;
  const Shape shape{Pass::input_grad, p.m, n, k, p.rank, false, p.dtype, p.w.block_log2, p.w.kind};
  if (!gemm_compiled(plan, shape)) return cudaErrorInvalidConfiguration;
  GemmTile tile = tile_of(plan);
  if (!rows_aligned(p.dy, n) || !rows_aligned(p.w.packed, k)) tile = kAnywhereInputGradTile;

  const GemmWorkspace space =
      gemm_workspace(Pass::input_grad, p.m, n, k, p.rank, false, plan.splits);
  auto* workspace = static_cast<uint8_t*>(p.workspace);
  GemmInputGradArguments a{};
  a.w = p.w, a.m = p.m, a.dy = p.dy, a.a = p.a, a.rank = p.rank;
  a.dx = p.dx, a.dx_dtype = p.dx_dtype;
  a.a_aligned = rows_aligned(p.a.data, k);
  a.lora_columns = ceil_div(p.rank, kLoraPad) * kLoraPad;
  if (p.rank > 0) {
    a.ds = workspace + space.lora;
    const LoraProblem lora{p.dy,
                           p.dtype,
                           p.m,
                           n,
                           p.b,
                           true,
                           Matrix{},
                           p.rank,
                           p.scaling,
                           p.scaling,
                           p.ds_out,
                           reinterpret_cast<float*>(workspace + space.lora_partial),
                           workspace + space.lora};
    if (cudaError_t e = launch_lora(lora, stream); e != cudaSuccess) return e;
  }
  a.weight_steps = ceil_div(n, tile.n);
  a.steps = a.weight_steps + ceil_div(p.rank, tile.n);
  const int splits = gemm_splits(plan.splits, a.steps);
  if (splits > 1) a.partial = reinterpret_cast<float*>(workspace + space.partial);

  const cudaError_t e = p.dtype == DType::bf16
                            ? run_gemm_input_grad<__nv_bfloat16>(a, tile, splits, stream)
                            : run_gemm_input_grad<__half>(a, tile, splits, stream);
  if (e != cudaSuccess || splits == 1) return e;
  return launch_sum_splits(a.partial, splits, p.m, k, Matrix{}, p.dx, p.dx_dtype, stream);
}

}  // namespace qlk::cuda
