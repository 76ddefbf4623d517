// The launchers of the decode kernels: at most 32 rows of x, 16 of dy.
//
//   forward   [S = x A^T in parts]  y           one launch without LoRA, two with
//   dx        [dS = dy B in parts]  dy W  dx    the last one adds up what CTAs share, and dS A
//
// S goes first and by itself because every CTA needs all of it: a CTA that computed it for others
// to wait for could wait for one that has no SM yet. It is 2 x rank / n of the work.
//
// Pointers and shapes that the mma and fp32 kernels cannot take (decode_aligned, 16 bytes) go to
// the kernels in decode_any.cu, which take everything.
#include "decode_common.cuh"

namespace qlk::cuda {
namespace {

bool aligned(const void* pointer) { return is_aligned_16(reinterpret_cast<uint64_t>(pointer)); }

bool supported(const Weight& w, const Plan& plan, Pass pass, int64_t m, int64_t rank) {
  return (plan.route == Route::decode_mma || plan.route == Route::decode_simt) && m >= 1 &&
         m <= decode_rows(plan.route, pass) &&
         (w.kind == ScaleKind::fp32 || w.kind == ScaleKind::nested) && plan.tile_n >= 1 &&
         plan.splits >= 1 && rank >= 0;
}

}  // namespace

cudaError_t launch_decode_linear(const LinearProblem& p, const Plan& plan, cudaStream_t stream) {
  if (!supported(p.w, plan, Pass::forward, p.m, p.rank)) return cudaErrorInvalidConfiguration;
  const bool mma = plan.route == Route::decode_mma;
  if (mma && p.dtype == DType::f32) return cudaErrorInvalidConfiguration;
  const int m = static_cast<int>(p.m), rank = static_cast<int>(p.rank);

  Projected s{nullptr, 1, m, rank};
  if (rank > 0) {
    float* const space = static_cast<float*>(p.workspace);
    if (p.s.data != nullptr) {
      s.parts = static_cast<const float*>(p.s.data);
      if (p.s.dtype != DType::f32 || !aligned(p.s.data)) {
        s.parts = space;
        const cudaError_t error = decode_to_float(p.s, p.m * rank, space, stream);
        if (error != cudaSuccess) return error;
      }
    } else {
      s.parts = space;
      s.count = decode_lora_splits(p.w.k, rank);
      const Projection projection{p.x, p.dtype, p.a, false, p.w.k, m, rank, s.count, space};
      const cudaError_t error =
          mma ? decode_project_mma(projection, stream) : decode_project_simt(projection, stream);
      if (error != cudaSuccess) return error;
    }
  }

  const DecodeLinear linear{p.w, p.x,     m,   p.bias,    p.b,        p.scaling,
                            s,   p.s_out, p.y, p.y_dtype, plan.tile_n};
  const int shared = decode_shared_bytes(plan.route, Pass::forward, m, rank);
  const bool fast =
      decode_aligned(p.w.n, p.w.k, p.w.block_log2) && aligned(p.w.packed) && aligned(p.x);
  if (fast && mma) return decode_linear_mma(linear, p.dtype, shared, stream);
  if (fast && m <= kDecodeSimtRows) return decode_linear_simt(linear, p.dtype, shared, stream);
  return decode_linear_any(linear, p.dtype, decode_staged_bytes(m, rank), stream);
}

cudaError_t launch_decode_input_grad(const InputGradProblem& p, const Plan& plan,
                                     cudaStream_t stream) {
  if (!supported(p.w, plan, Pass::input_grad, p.m, p.rank)) return cudaErrorInvalidConfiguration;
  const bool mma = plan.route == Route::decode_mma;
  if (mma && p.dtype == DType::f32) return cudaErrorInvalidConfiguration;
  const int m = static_cast<int>(p.m), rank = static_cast<int>(p.rank);
  char* const space = static_cast<char*>(p.workspace);
  const DecodeWorkspace parts =
      decode_workspace(Pass::input_grad, p.m, p.w.n, p.w.k, p.rank, false, plan.splits);

  Projected ds{reinterpret_cast<float*>(space + parts.lora), 1, m, rank};
  if (rank > 0) {
    ds.count = decode_lora_splits(p.w.n, rank);
    const Projection projection{p.dy, p.dtype,  p.b,
                                true, p.w.n,    m,
                                rank, ds.count, reinterpret_cast<float*>(space + parts.lora)};
    const cudaError_t error =
        mma ? decode_project_mma(projection, stream) : decode_project_simt(projection, stream);
    if (error != cudaSuccess) return error;
  }

  const bool fast = mma && decode_aligned(p.w.n, p.w.k, p.w.block_log2) && aligned(p.w.packed) &&
                    p.w.n % 4 == 0 && reinterpret_cast<uint64_t>(p.dy) % 8 == 0;
  const int run = plan.tile_n / kDecodeTileRows;
  float* const layers = reinterpret_cast<float*>(space);
  const DecodeInputGrad grad{p.w, p.dy, m, layers, plan.splits, fast ? run : 0};
  const cudaError_t error =
      fast ? decode_input_grad_mma(
                 grad, p.dtype, decode_shared_bytes(plan.route, Pass::input_grad, m, rank), stream)
           : decode_input_grad_any(grad, p.dtype, stream);
  if (error != cudaSuccess) return error;
  return decode_finish({layers, plan.splits, fast ? run : 0, p.w.n, p.w.k, m, ds, p.scaling, p.a,
                        p.ds_out, p.dx, p.dx_dtype},
                       stream);
}

}  // namespace qlk::cuda
