// The small parts around the decode kernels: S = x A^T and dS = dy B by fp32 multiplies (for fp32
// x, and for devices without bf16's matrix instructions), a given S as floats, and the end of dx.
//
//   project   grid (rank, parts): a CTA has one row of A (column of B) and one part of the
//             contraction; fp32 throughout, x and A as they are. Sums of 128 threads, each in
//             order, meet in a tree.
//   finish    a CTA has 128 columns of dx and 4 rows: the layers that CTAs of dy W left, in order,
//             then dS A, fp32, 256 of rank at a time; rounded once.
#include "decode_common.cuh"

namespace qlk::cuda {
namespace {

constexpr int kProjectThreads = 128;
constexpr int kFinishThreads = 128;
constexpr int kFinishRows = 4;

template <class T>
__global__ void __launch_bounds__(kProjectThreads) decode_project(const Projection p) {
  __shared__ float sums[kProjectThreads / 32][kDecodeFewRows];
  const int r = blockIdx.x, part = blockIdx.y;
  const int64_t begin = p.length * part / p.parts, end = p.length * (part + 1) / p.parts;
  float sum[kDecodeFewRows] = {};
  for (int64_t l = begin + threadIdx.x; l < end; l += kProjectThreads) {
    const float a = load_element(p.a, p.columns ? l * p.rank + r : r * p.length + l);
#pragma unroll
    for (int m = 0; m < kDecodeFewRows; ++m)
      if (m < p.m) sum[m] = fmaf(a, to_float(static_cast<const T*>(p.x)[m * p.length + l]), sum[m]);
  }
#pragma unroll
  for (int m = 0; m < kDecodeFewRows; ++m) {
    for (int step = 16; step > 0; step /= 2) sum[m] += __shfl_xor_sync(~0u, sum[m], step);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32][m] = sum[m];
  }
  __syncthreads();
  const int m = threadIdx.x;
  if (m < p.m) {
    float all = 0;
    for (int warp = 0; warp < kProjectThreads / 32; ++warp) all += sums[warp][m];
    p.out[(part * p.m + m) * static_cast<int64_t>(p.rank) + r] = all;
  }
}

__global__ void to_floats(const Matrix from, int64_t count, float* to) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < count) to[i] = load_element(from, i);
}

__global__ void __launch_bounds__(kFinishThreads) finish(const DecodeFinish p) {
  __shared__ float ds[kFinishRows][kDecodeStagedRank];
  const int64_t k = static_cast<int64_t>(blockIdx.x) * kFinishThreads + threadIdx.x;
  const int first_m = blockIdx.y * kFinishRows;
  const int rows = min(kFinishRows, p.m - first_m);

  float sum[kFinishRows] = {};
  int count = p.count;
  if (p.run > 0) {  // the CTAs whose runs touch this band, the first of them in layer 0
    const int64_t units = (p.n + kDecodeTileRows - 1) / kDecodeTileRows, band = k / kDecodeBand;
    count = static_cast<int>(((band + 1) * units - 1) / p.run - band * units / p.run) + 1;
  }
  if (k < p.k) {
    for (int layer = 0; layer < count; ++layer)
#pragma unroll
      for (int i = 0; i < kFinishRows; ++i)
        if (i < rows)
          sum[i] += p.layers[(static_cast<int64_t>(layer) * p.m + first_m + i) * p.k + k];
  }
  for (int first = 0; first < p.ds.rank; first += kDecodeStagedRank) {
    const int ranks = min(kDecodeStagedRank, p.ds.rank - first);
    if (first > 0) __syncthreads();
    for (int i = threadIdx.x; i < rows * ranks; i += kFinishThreads) {
      const int at = (first_m + i / ranks) * p.ds.rank + first + i % ranks;
      const float v = p.scaling * projected_at(p.ds, at);
      ds[i / ranks][i % ranks] = v;
      if (p.ds_out != nullptr && blockIdx.x == 0) p.ds_out[at] = v;
    }
    __syncthreads();
    if (k < p.k) {
#pragma unroll 4
      for (int r = 0; r < ranks; ++r) {
        const float a = load_element(p.a, (first + r) * p.k + k);
#pragma unroll
        for (int i = 0; i < kFinishRows; ++i)
          if (i < rows) sum[i] = fmaf(ds[i][r], a, sum[i]);
      }
    }
  }
  if (k < p.k) {
#pragma unroll
    for (int i = 0; i < kFinishRows; ++i)
      if (i < rows) store_element(p.dx, p.dx_dtype, (first_m + i) * p.k + k, sum[i]);
  }
}

}  // namespace

cudaError_t decode_project_simt(const Projection& p, cudaStream_t stream) {
  const dim3 grid(p.rank, p.parts);
  return with_element(p.x_dtype, [&]<class T>() {
    decode_project<T><<<grid, kProjectThreads, 0, stream>>>(p);
    return cudaGetLastError();
  });
}

cudaError_t decode_to_float(const Matrix& from, int64_t count, float* to, cudaStream_t stream) {
  to_floats<<<static_cast<unsigned>(ceil_div(count, 256)), 256, 0, stream>>>(from, count, to);
  return cudaGetLastError();
}

cudaError_t decode_finish(const DecodeFinish& p, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(p.k, kFinishThreads)),
                  static_cast<unsigned>(ceil_div(p.m, kFinishRows)));
  finish<<<grid, kFinishThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace qlk::cuda
