// What the decode kernels share: LoRA's small products, and the kernels of each route as
// decode_launch.cu calls them.
#pragma once
#include <cstdint>

#include "codebook.cuh"
#include "decode_tiles.h"
#include "element.h"
#include "launchers.h"
#include "scales.h"

namespace qlk::cuda {

// --- LoRA ----------------------------------------------------------------------------------------

// S [m, rank] as its kernel left it: `parts` partial sums, fp32, one after the other.
struct Projected {
  const float* parts;
  int count;
  int rows, rank;
};

// An element of S: its parts added in order, so that it is the same whoever asks.
__device__ __forceinline__ float projected_at(const Projected& s, int i) {
  float sum = 0;
  const float* from = s.parts + i;
#pragma unroll 4
  for (int part = 0; part < s.count; ++part, from += s.rows * s.rank) sum += __ldg(from);
  return sum;
}

// Where S lies: 4 neighbouring ranks of a row, from a multiple of 4, are 16 aligned bytes.
struct PlainS {
  float* first;
  int rank;
  __device__ __forceinline__ float* at(int m, int r) const { return first + m * rank + r; }
  __device__ __forceinline__ float* element(int i) const { return first + i; }
};
struct GapS {  // kDecodeStagedRank / kGapFloats lines of a table's gaps a row
  void* table;
  int line, rank;
  __device__ __forceinline__ float* element(int i) const { return at(i / rank, i % rank); }
  __device__ __forceinline__ float* at(int m, int r) const {
    return table_gap(table, line + m * (kDecodeStagedRank / kGapFloats) + r / kGapFloats) +
           r % kGapFloats;
  }
};

// S to shared memory (rank <= kDecodeStagedRank), by all threads of the block, who synchronise
// after. `out`: the caller's S, written by one block.
template <class Place>
__device__ __forceinline__ void stage_projected(const Projected& s, const Place& place,
                                                float* out) {
  for (int i = threadIdx.x; i < s.rows * s.rank; i += blockDim.x) {
    const float v = projected_at(s, i);
    if (s.rank <= kDecodeStagedRank) *place.element(i) = v;
    if (out != nullptr && blockIdx.x == 0) out[i] = v;
  }
}

template <class T>
__device__ __forceinline__ void load_4(const T* from, float (&v)[4]) {
  if constexpr (sizeof(T) == 4) {
    const float4 four = __ldg(reinterpret_cast<const float4*>(from));
    v[0] = four.x, v[1] = four.y, v[2] = four.z, v[3] = four.w;
  } else {
    const uint2 four = __ldg(reinterpret_cast<const uint2*>(from));
    const T* const at = reinterpret_cast<const T*>(&four);
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = to_float(at[i]);
  }
}

// S's row m . row[0 ... rank), fp32, in order.
template <class T, class Place>
__device__ __forceinline__ float dot_row(const Place& s, int m, const T* row, int rank,
                                         bool vectors) {
  float sum = 0;
  int r = 0;
  if (vectors) {
#pragma unroll 2
    for (; r + 4 <= rank; r += 4) {
      float b[4];
      load_4(row + r, b);
      const float4 a = *reinterpret_cast<const float4*>(s.at(m, r));
      sum = fmaf(a.x, b[0], sum), sum = fmaf(a.y, b[1], sum);
      sum = fmaf(a.z, b[2], sum), sum = fmaf(a.w, b[3], sum);
    }
  }
  for (; r < rank; ++r) sum = fmaf(*s.at(m, r), to_float(row[r]), sum);
  return sum;
}

template <class Place>
__device__ __forceinline__ float lora_term(const Place& s, int m, const Matrix& b, int64_t n,
                                           int rank) {
  const bool vectors = rank % 4 == 0 && is_aligned_16(reinterpret_cast<uint64_t>(b.data));
  switch (b.dtype) {
    case DType::f32:
      return dot_row(s, m, static_cast<const float*>(b.data) + n * rank, rank, vectors);
    case DType::bf16:
      return dot_row(s, m, static_cast<const __nv_bfloat16*>(b.data) + n * rank, rank, vectors);
    default:
      return dot_row(s, m, static_cast<const __half*>(b.data) + n * rank, rank, vectors);
  }
}

// S's row m times B's row n; `staged` holds S unless the rank is too large: then its one part does.
template <class Place>
__device__ __forceinline__ float lora_term(const Projected& s, const Place& staged, int m,
                                           const Matrix& b, int64_t n) {
  if (s.rank <= kDecodeStagedRank) return lora_term(staged, m, b, n, s.rank);
  return lora_term(PlainS{const_cast<float*>(s.parts), s.rank}, m, b, n, s.rank);
}

// --- kernels by route ----------------------------------------------------------------------------

// Everything of a forward launch once S is there.
struct DecodeLinear {
  Weight w;
  const void* x;
  int m;
  Matrix bias, b;
  float scaling;
  Projected s;
  float* s_out;
  void* y;
  DType y_dtype;
  int rows;  // of W, a CTA
};

// y[m, n] from its part of x W^T: bias and LoRA's part added, rounded once.
template <class Place>
__device__ __forceinline__ void store_y(const DecodeLinear& p, const Place& staged_s, int m,
                                        int64_t n, float y) {
  if (p.bias.data != nullptr) y += load_element(p.bias, n);
  if (p.s.rank > 0) y = fmaf(p.scaling, lora_term(p.s, staged_s, m, p.b, n), y);
  store_element(p.y, p.y_dtype, m * p.w.n + n, y);
}

cudaError_t decode_linear_mma(const DecodeLinear& p, DType x_dtype, int shared,
                              cudaStream_t stream);
cudaError_t decode_linear_simt(const DecodeLinear& p, DType x_dtype, int shared,
                               cudaStream_t stream);
cudaError_t decode_linear_any(const DecodeLinear& p, DType x_dtype, int shared,
                              cudaStream_t stream);

// dy W, summed over rows in as many layers as CTAs share a column; decode_finish adds them up.
struct DecodeInputGrad {
  Weight w;
  const void* dy;
  int m;
  float* layers;  // [count, m, k]
  int count;
  int run;  // mma: units of 16 rows by one band, a CTA; else 0: a layer is rows of W, ceil(n /
            // count)
};
cudaError_t decode_input_grad_mma(const DecodeInputGrad& p, DType dy_dtype, int shared,
                                  cudaStream_t stream);
cudaError_t decode_input_grad_any(const DecodeInputGrad& p, DType dy_dtype, cudaStream_t stream);

// dx = the layers in order + dS A.
struct DecodeFinish {
  const float* layers;
  int count, run;
  int64_t n, k;
  int m;
  Projected ds;   // dy B, unscaled
  float scaling;  // dS = scaling dy B
  Matrix a;       // [rank, k]
  float* ds_out;
  void* dx;
  DType dx_dtype;
};
cudaError_t decode_finish(const DecodeFinish& p, cudaStream_t stream);

// S = x A^T (or dy B, whose matrix is read down its columns), cut into parts of the contraction.
struct Projection {
  const void* x;  // [m, length]
  DType x_dtype;
  Matrix a;      // [rank, length], or [length, rank]
  bool columns;  // the latter
  int64_t length;
  int m, rank, parts;
  float* out;  // [parts, m, rank]
};
cudaError_t decode_project_mma(const Projection& p, cudaStream_t stream);
cudaError_t decode_project_simt(const Projection& p, cudaStream_t stream);

// `count` elements of a given S as floats.
cudaError_t decode_to_float(const Matrix& from, int64_t count, float* to, cudaStream_t stream);

}  // namespace qlk::cuda
