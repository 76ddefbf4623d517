// The decode regime for every shape: any k (odd ones too, rows that start within a byte), blocks
// that cross rows, every blocksize, any alignment, fp32 x. Slower than the kernels for k of whole
// blocks, by some 3 times in instructions: loads are single bytes and elements.
//
//   forward   a warp a row of W, the lanes 32 groups of 8 values at a time. Groups start at
//             multiples of 8 of the whole run of values, not of the row: 4 bytes each, and one
//             scale, since a block holds at least 16. Values of a group that belong to other rows
//             meet an x of zero. The codebook lies in 16 banks: lanes never conflict. Rows of x
//             beyond kRows, which come from decode_linear_mma.cu's plans where pointers are not
//             aligned, have the weight's row read again.
//   dx        a thread a column, 256 columns and ceil(n / layers) rows of W a CTA, all of m at
//   once.
//             The layers are added by decode_finish.
//
// Numerics, variant (b): fp32 codes. Forward: fp32 sums of 8 products, times the scale in fp32,
// added up in fp32: |y - exact| <= (K + 80) 2^-24 sum |x w| + LoRA's as in decode_linear_mma.cu +
// ulp(y) / 2. dx: code times scale in fp32, times dy: (N + 80) 2^-24 likewise. An identity matrix
// gives the dequantized values exactly.
#include "decode_common.cuh"

namespace qlk::cuda {
namespace {

constexpr int kWarps = kDecodeWarps;
constexpr int kThreads = 32 * kWarps;
constexpr int kGroup = 8;

template <class T, int kRows, ScaleKind kind>
__global__ void __launch_bounds__(kThreads, 1) decode_linear_groups(const DecodeLinear p) {
  extern __shared__ __align__(16) float shared[];
  __shared__ float codebook[kCodebookSize];
  __shared__ float code[kind == ScaleKind::nested ? kNestedCodeSize : 1];
  const PlainS staged_s{shared, p.s.rank};
  const ScaleReader<kind> scale_of = scale_reader<kind>(p.w, code);
  if (threadIdx.x < kCodebookSize) codebook[threadIdx.x] = p.w.codebook[threadIdx.x];
  if (p.s.rank > 0) stage_projected(p.s, staged_s, p.s_out);
  __syncthreads();

  const int lane = threadIdx.x % 32;
  const int64_t k = p.w.k, bytes = (p.w.n * k + 1) / 2;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * p.rows;
  const int64_t end_row = min(first_row + p.rows, p.w.n);
  for (int64_t n = first_row + threadIdx.x / 32; n < end_row; n += kWarps) {
    const int64_t begin = n * k;
    float own = 0;  // lane m keeps row m's
    for (int first = 0; first < p.m; first += kRows) {
      float sum[kRows] = {};
      for (int64_t group = begin / kGroup + lane; group * kGroup < begin + k; group += 32) {
        uint32_t word = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (group * 4 + i < bytes)
            word |= static_cast<uint32_t>(p.w.packed[group * 4 + i]) << 8 * i;
        const float scale = scale_of(group * kGroup >> p.w.block_log2);
        float value[kGroup];  // byte i / 2, the earlier value in the high nibble
#pragma unroll
        for (int i = 0; i < kGroup; ++i)
          value[i] = codebook[word >> (8 * (i / 2) + (i % 2 ? 0 : 4)) & 15];
        const int64_t at = group * kGroup - begin;  // in x's rows
#pragma unroll
        for (int m = 0; m < kRows; ++m) {
          if (first + m < p.m) {
            const T* const x = static_cast<const T*>(p.x) + (first + m) * k + at;
            float part = 0;
#pragma unroll
            for (int i = 0; i < kGroup; ++i) {
              const float v = at + i >= 0 && at + i < k ? to_float(x[i]) : 0.0f;
              part = fmaf(v, value[i], part);
            }
            sum[m] = fmaf(scale, part, sum[m]);
          }
        }
      }
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        for (int step = 16; step > 0; step /= 2) sum[m] += __shfl_xor_sync(~0u, sum[m], step);
        if (lane == first + m) own = sum[m];
      }
    }
    if (lane < p.m) {
      store_y(p, staged_s, lane, n, own);
    }
  }
}

template <class T, int kRows, ScaleKind kind>
__global__ void __launch_bounds__(kDecodeSimtBand, 2)
    decode_input_grad_columns(const DecodeInputGrad p) {
  __shared__ float codebook[kCodebookSize];
  __shared__ float code[kind == ScaleKind::nested ? kNestedCodeSize : 1];
  const ScaleReader<kind> scale_of = scale_reader<kind>(p.w, code);
  if (threadIdx.x < kCodebookSize) codebook[threadIdx.x] = p.w.codebook[threadIdx.x];
  __syncthreads();
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kDecodeSimtBand + threadIdx.x;
  if (column >= p.w.k) return;
  const int64_t layer = blockIdx.y;
  const int64_t begin = p.w.n * layer / p.count, end = p.w.n * (layer + 1) / p.count;
  float sum[kRows] = {};
#pragma unroll 4
  for (int64_t n = begin; n < end; ++n) {
    const int64_t value = n * p.w.k + column;
    const uint8_t byte = p.w.packed[value / 2];
    const int q = value % 2 ? later_code(byte) : earlier_code(byte);
    const float w = __fmul_rn(codebook[q], scale_of(value >> p.w.block_log2));
#pragma unroll
    for (int m = 0; m < kRows; ++m)
      if (m < p.m) sum[m] = fmaf(to_float(static_cast<const T*>(p.dy)[m * p.w.n + n]), w, sum[m]);
  }
#pragma unroll
  for (int m = 0; m < kRows; ++m)
    if (m < p.m) p.layers[(layer * p.m + m) * p.w.k + column] = sum[m];
}

template <class T, int kRows, ScaleKind kind>
cudaError_t launch(const DecodeLinear& p, int shared, cudaStream_t stream) {
  const auto kernel = decode_linear_groups<T, kRows, kind>;
  const auto grid = static_cast<unsigned>(ceil_div(p.w.n, p.rows));
  kernel<<<grid, kThreads, shared, stream>>>(p);
  return cudaGetLastError();
}

template <class T, int kRows, ScaleKind kind>
cudaError_t launch(const DecodeInputGrad& p, int, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(p.w.k, kDecodeSimtBand)), p.count);
  decode_input_grad_columns<T, kRows, kind><<<grid, kDecodeSimtBand, 0, stream>>>(p);
  return cudaGetLastError();
}

template <class T, class Problem>
cudaError_t launch(const Problem& p, int shared, cudaStream_t stream) {
  const bool nested = p.w.kind == ScaleKind::nested;
  if (p.m <= 4)
    return nested ? launch<T, 4, ScaleKind::nested>(p, shared, stream)
                  : launch<T, 4, ScaleKind::fp32>(p, shared, stream);
  return nested ? launch<T, kDecodeFewRows, ScaleKind::nested>(p, shared, stream)
                : launch<T, kDecodeFewRows, ScaleKind::fp32>(p, shared, stream);
}

template <class Problem>
cudaError_t launch(const Problem& p, DType dtype, int shared, cudaStream_t stream) {
  return with_element(dtype, [&]<class T>() { return launch<T>(p, shared, stream); });
}

}  // namespace

cudaError_t decode_linear_any(const DecodeLinear& p, DType x_dtype, int shared,
                              cudaStream_t stream) {
  return launch(p, x_dtype, shared, stream);
}

cudaError_t decode_input_grad_any(const DecodeInputGrad& p, DType dy_dtype, cudaStream_t stream) {
  return launch(p, dy_dtype, 0, stream);
}

}  // namespace qlk::cuda
