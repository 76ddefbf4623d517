// S = x A^T, and dS = dy B, for up to 32 rows of x, on tensor cores: LoRA's narrow side of a decode
// step.
//
//   grid   (tiles of 16 of rank, parts of the contraction). S is left as its parts, fp32, and
//          whoever uses it adds them in order: no CTA waits for another.
//   warp   8 a CTA, each every eighth step of 16 of the contraction. Lane (g, t) has, of rows g and
//          g + 8 of A and of rows g (and g + 8) of x, the 4 neighbouring elements 4t ...: where the
//          fragments say 2t, 2t + 1, 2t + 8, 2t + 9, in both, which is the same sum.
//   sums   of the warps meet in shared memory, in their order.
//
// Numerics: A (PEFT keeps it in fp32) is rounded to x's type, once, in registers; x as it is; fp32
// sums that are not rounded on. |S - exact| <= (u + (length + 80) 2^-24) sum |x a|, u = 2^-8 (bf16)
// or 2^-11 (f16), and none where A has x's type already.
//
// Loads are single elements, of any type and alignment: the whole kernel is rank / n of the layer's
// work, and A is read once.
#include "decode_common.cuh"
#include "fragments.cuh"

namespace qlk::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kStep = 16;
constexpr int kTile = 16;  // of rank
constexpr int kTileSums = kTile * 8;

template <class T, int kColumns>
__global__ void __launch_bounds__(kThreads) decode_project_tiles(const Projection p) {
  __shared__ float sums[kWarps][kColumns][kTileSums];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int first_r = blockIdx.x * kTile, part = blockIdx.y;
  const int64_t steps = (p.length + kStep - 1) / kStep;
  const int64_t end = steps * (part + 1) / p.parts;
  const int64_t down = p.columns ? p.rank : 1, across = p.columns ? 1 : p.length;  // strides in A

  FragC sum[kColumns] = {};
#pragma unroll 2
  for (int64_t step = steps * part / p.parts + warp; step < end; step += kWarps) {
    const int64_t l = step * kStep + 4 * t;
    float a[2][4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = first_r + g + 8 * half;
#pragma unroll
      for (int i = 0; i < 4; ++i)
        a[half][i] =
            r < p.rank && l + i < p.length ? load_element(p.a, r * across + (l + i) * down) : 0.0f;
    }
    const FragA rows = {{round_pair<T>(a[0][0], a[0][1]), round_pair<T>(a[1][0], a[1][1]),
                         round_pair<T>(a[0][2], a[0][3]), round_pair<T>(a[1][2], a[1][3])}};
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int m = g + 8 * c;
      float x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        x[i] = m < p.m && l + i < p.length
                   ? to_float(static_cast<const T*>(p.x)[m * p.length + l + i])
                   : 0.0f;
      multiply_add<T>(sum[c], rows, FragB{{round_pair<T>(x[0], x[1]), round_pair<T>(x[2], x[3])}});
    }
  }
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    float* const to = sums[warp][c] + g * 8 + 2 * t;
    *reinterpret_cast<float2*>(to) = {sum[c].c[0], sum[c].c[1]};
    *reinterpret_cast<float2*>(to + 8 * 8) = {sum[c].c[2], sum[c].c[3]};
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kColumns * kTileSums; i += kThreads) {
    const int c = i / kTileSums, r = first_r + i % kTileSums / 8, m = i % 8 + 8 * c;
    if (m < p.m && r < p.rank) {
      float all = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) all += sums[w][c][i % kTileSums];
      p.out[(static_cast<int64_t>(part) * p.m + m) * p.rank + r] = all;
    }
  }
}

template <class T>
void launch(const Projection& p, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(p.rank, kTile)), p.parts);
  if (p.m <= 8)
    decode_project_tiles<T, 1><<<grid, kThreads, 0, stream>>>(p);
  else if (p.m <= 16)
    decode_project_tiles<T, 2><<<grid, kThreads, 0, stream>>>(p);
  else
    decode_project_tiles<T, 4><<<grid, kThreads, 0, stream>>>(p);
}

}  // namespace

cudaError_t decode_project_mma(const Projection& p, cudaStream_t stream) {
  if (p.x_dtype == DType::bf16)
    launch<__nv_bfloat16>(p, stream);
  else
    launch<__half>(p, stream);
  return cudaGetLastError();
}

}  // namespace qlk::cuda
