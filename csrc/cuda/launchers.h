// What the CUDA kernels offer to whoever launches them: plain pointers and sizes, neither torch nor
// Python. A launcher checks nothing that the op has checked, allocates nothing, never synchronises,
// launches on the stream that it is given, and returns the runtime's error. All pointers are the
// device's, the nested offset and the codebook too: reading them on the host would synchronise.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "../block_format.h"
#include "../dtype.h"
#include "dispatch.h"

namespace qlk::cuda {

// A packed weight [n, k] (n = 1 for a plain run of k values); see block_format.h.
struct Weight {
  const uint8_t* packed;
  const float* codebook;  // [16]
  ScaleKind kind;
  const void* absmax;          // [blocks]: float, or bytes (nested, e8m0, e4m3)
  const float* nested_absmax;  // nested: [ceil(blocks / 256)]
  const float* nested_code;    // nested: [256]
  const float* offset;         // nested: the mean; e4m3: the tensor's scale
  int block_log2;
  int64_t n, k;
};

struct Matrix {
  const void* data;  // null: not given
  DType dtype;
};

// y [m, n] = x W^T + bias + scaling S B^T, rounded once; S = x A^T, or given. Row-major throughout.
struct LinearProblem {
  Weight w;
  int64_t m, rank;
  const void* x;  // [m, k] in `dtype`
  DType dtype;    // bf16 or f16: the elements of x and of the tensor cores (the compute dtype)
  Matrix bias;    // [n]
  Matrix a;       // [rank, k], any dtype; or
  Matrix s;       // [m, rank], any dtype
  Matrix b;       // [n, rank], any dtype
  float scaling;
  float* s_out;  // [m, rank] fp32, x A^T unscaled; null unless a is given
  void* y;       // [m, n]
  DType y_dtype;
  void* workspace;  // what linear_workspace() asked for; its contents do not matter
};

// dx [m, k] = dy W + dS A, dS = scaling dy B computed inside (and written out, fp32, unless null).
struct InputGradProblem {
  Weight w;
  int64_t m, rank;
  const void* dy;  // [m, n] in `dtype`
  DType dtype;     // bf16 or f16: of dy and of the tensor cores' elements
  Matrix a;        // [rank, k]
  Matrix b;        // [n, rank]
  float scaling;
  float* ds_out;  // [m, rank] or null
  void* dx;       // [m, k]
  DType dx_dtype;
  void* workspace;
};

// Launchers of the matmuls; each takes a Plan (dispatch.h) of its own route, and problems of any
// m, n, k >= 1 and rank >= 0 (0: neither a, s nor b is given). Pointers to x, y, packed ... may be
// aligned to their elements only (a view with a storage offset): where a kernel needs 16 bytes, its
// launcher falls back to a narrower one and not to an error.
cudaError_t launch_decode_linear(const LinearProblem& p, const Plan& plan, cudaStream_t stream);
cudaError_t launch_decode_input_grad(const InputGradProblem& p, const Plan& plan,
                                     cudaStream_t stream);
cudaError_t launch_gemm_linear(const LinearProblem& p, const Plan& plan, cudaStream_t stream);
cudaError_t launch_gemm_input_grad(const InputGradProblem& p, const Plan& plan,
                                   cudaStream_t stream);

// Blockwise 4-bit quantization of `count` values, bit-identical to reference.quantize.
struct QuantizeProblem {
  const void* values;
  DType dtype;
  int64_t count;
  const float* thresholds;  // [15]
  const uint8_t* codes;     // [16]
  int block_log2;
  ScaleKind kind;             // fp32, e8m0 or e4m3; nested: fp32, then launch_quantize_absmax
  const float* tensor_scale;  // e4m3: [1]
  uint8_t* packed;            // [ceil(count / 2)]
  void* absmax;               // [blocks]: float, or bytes (e8m0, e4m3)
};
cudaError_t launch_quantize(const QuantizeProblem& p, cudaStream_t stream);

// Double quantization of fp32 scales: codes, nested absmax, and the mean unless it is given.
struct QuantizeAbsmaxProblem {
  const float* absmax;
  int64_t count;
  const float* thresholds;    // [255]
  const float* given_offset;  // [1], or null: the mean in reference.mean_in_order's order
  uint8_t* codes;             // [count]
  float* nested_absmax;       // [ceil(count / 256)]
  float* offset;              // [1]
  void* workspace;            // quantize_absmax_workspace(count) bytes
};
int64_t quantize_absmax_workspace(int64_t count);
cudaError_t launch_quantize_absmax(const QuantizeAbsmaxProblem& p, cudaStream_t stream);

// Values [begin, begin + count) of the weight's run to `out`, bit-identical to
// reference.dequantize.
cudaError_t launch_dequantize(const Weight& w, int64_t begin, int64_t count, void* out, DType dtype,
                              cudaStream_t stream);

}  // namespace qlk::cuda
