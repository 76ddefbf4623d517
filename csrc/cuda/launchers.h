// What the CUDA kernels offer to whoever launches them: plain pointers and sizes, neither torch nor
// Python. A launcher checks nothing that the op has checked, allocates nothing, never synchronises,
// launches on the stream that it is given, and returns the runtime's error. All pointers are the
// device's, the nested offset and the codebook too: reading them on the host would synchronise.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "../block_format.h"
#include "../dtype.h"

namespace qlk::cuda {

// fp32 and nested in every kernel; the last two, for research, in quantize and dequantize.
enum class ScaleKind : int { fp32, nested, e8m0, e4m3 };

// A packed weight [n, k] (n = 1 for a plain run of k values); see block_format.h.
struct Weight {
  const uint8_t* packed;
  const float* codebook;       // [16]
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
  float* s_out;     // [m, rank] fp32, x A^T unscaled; null unless a is given
  void* y;          // [m, n]
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

// How a matmul runs: picked by dispatch.h, or by `qlora tune`.
struct Plan;

}  // namespace qlk::cuda
