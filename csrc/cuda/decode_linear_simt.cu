// y = x W^T + bias + scaling S B^T for 1 to 3 rows of x by fp32 multiplies: for fp32 x, whose
// precision tensor cores would drop, for sm_75, and wherever issue slots are plenty.
//
//   grid    one CTA of 16 warps an SM, with `rows` consecutive rows of W and all of K
//   CTA     K is cut into chunks, 32 lanes' loads wide, and those into up to 16 runs (a power of
//           two). The warps of a run share out the rows, in turn: 16 (m = 1) or 8 each a pass.
//   lane    m = 1: 16 bytes, 32 consecutive values of a row, 512 contiguous bytes a warp. m = 2, 3:
//           8 bytes, for x's sake: a lane's values of x stay in registers, as floats, for a pass.
//   sums    a register a row. Then lanes' sums are added by halving: at each step a lane gives away
//           half of its rows and takes the other half's, 16 shuffles and not 80. Runs of K meet in
//           shared memory, in order.
//   shared  all in the codebook's table and its gaps: 64 KB, which is what Turing has
//
// Numerics, variant (b) by blocks: fp32 codes times x, fp32 sums of a lane's values, times the
// block's scale, added up in fp32: |y - exact| <= (K + 80) 2^-24 sum |x w| + LoRA's as in
// decode_linear_mma.cu (A and x as they are) + ulp(y) / 2. An identity matrix gives the dequantized
// values exactly.
//
// Issue slots for 8 weights a lane, m = 1: 4 ALU and 4 LDS.64 decode, 8 FFMA, and some 8 for loads,
// scales, sums and bounds (benchmarks/cuda_decode.py). Shared memory passes 8 times for 4 bytes a
// lane, which is more than HBM parts have time for: m = 1 is better off with tensor cores there.
#include <type_traits>

#include "decode_common.cuh"

namespace qlk::cuda {
namespace {

constexpr int kWarps = kDecodeWarps;
constexpr int kThreads = 32 * kWarps;

template <ScaleKind kind, int kWords>
struct RowPart {
  uint32_t words[kWords];
  PendingScale<kind> scale;
};

template <class T, int kCount>
__device__ __forceinline__ void load_floats(const T* from, float (&to)[kCount]) {
  constexpr int kEach = 16 / sizeof(T);
#pragma unroll
  for (int i = 0; i < kCount; i += kEach) {
    const uint4 raw = __ldg(reinterpret_cast<const uint4*>(from + i));
    const T* const values = reinterpret_cast<const T*>(&raw);
#pragma unroll
    for (int j = 0; j < kEach; ++j) to[i + j] = to_float(values[j]);
  }
}

// kCount sums a lane to one: lane l ends with row l * kCount / 32's, over all lanes. A step leaves
// each lane with the upper or the lower half of its rows, the last ones add what is left.
template <int kCount, int kStep = 16>
__device__ __forceinline__ float add_lanes(const float (&sum)[kCount], int lane) {
  if constexpr (kStep == 0) {
    return sum[0];
  } else if constexpr (kCount == 1) {
    const float both[1] = {sum[0] + __shfl_xor_sync(~0u, sum[0], kStep)};
    return add_lanes<1, kStep / 2>(both, lane);
  } else {
    constexpr int kHalf = kCount / 2;
    const bool upper = lane & kStep;
    float kept[kHalf];
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const float give = upper ? sum[i] : sum[i + kHalf];
      kept[i] = (upper ? sum[i + kHalf] : sum[i]) + __shfl_xor_sync(~0u, give, kStep);
    }
    return add_lanes<kHalf, kStep / 2>(kept, lane);
  }
}

template <class T, int kRows, ScaleKind kind>
__global__ void __launch_bounds__(kThreads, 1) decode_linear(const DecodeLinear p) {
  constexpr int kWords = kRows == 1 ? 4 : 2;
  constexpr int kWarpRows = kRows == 1 ? 16 : 8;  // a pass
  constexpr int kAtOnce = kRows == 1 ? 4 : 2;     // whose loads are on their way together
  constexpr int kValues = 8 * kWords;             // a lane's
  constexpr int kChunk = 32 * kValues;
  using Words = std::conditional_t<kRows == 1, uint4, uint2>;

  extern __shared__ __align__(16) char shared[];
  // All else is in the table's gaps, by lines: the nested code, sums of warps, S.
  constexpr int kSumsLine = kNestedCodeSize / kGapFloats;
  constexpr int kSLine = kSumsLine + kWarps * kWarpRows * kRows / kGapFloats;
  static_assert(kSLine + kRows * (kDecodeStagedRank / kGapFloats) <= kPairs, "gaps of one table");
  auto gap = [&](int line, int i) {
    return table_gap(shared, line + i / kGapFloats) + i % kGapFloats;
  };
  auto sum_at = [&](int warp, int row, int m) {
    return gap(kSumsLine, (warp * kRows + m) * kWarpRows + row);
  };
  const GapS staged_s{shared, kSLine, p.s.rank};

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first_row = blockIdx.x * p.rows;
  const int end_row = min(first_row + p.rows, static_cast<int>(p.w.n));
  const int blocks = static_cast<int>(p.w.k / kDecodeChunk);
  const int block_shift = p.w.block_log2 - 6;
  const int chunks = static_cast<int>((p.w.k + kChunk - 1) / kChunk);
  int runs = kWarps;
  while (runs > chunks) runs /= 2;
  const int run = warp % runs, shelf = warp / runs, shelves = kWarps / runs;
  const int first_chunk = static_cast<int64_t>(chunks) * run / runs;
  const int end_chunk = static_cast<int64_t>(chunks) * (run + 1) / runs;
  const int pass_rows = shelves * kWarpRows;  // the warp's are `shelves` apart

  // The lane's part of a row and chunk; what lies past the row's end is read as its start, and
  // meets an x of zero.
  constexpr int kLanesOfBlock = kDecodeChunk / kValues;
  auto block_of = [&](int chunk) {
    const int block = chunk * (kChunk / kDecodeChunk) + lane / kLanesOfBlock;
    return block < blocks ? block : 0;
  };
  const uint8_t* const packed = p.w.packed + lane % kLanesOfBlock * (kValues / 2);
  auto load = [&](RowPart<kind, kWords>& part, int row, int block) {
    const uint32_t at = static_cast<uint32_t>(row) * blocks + block;
    const Words words = __ldg(
        reinterpret_cast<const Words*>(packed + static_cast<uint64_t>(at) * (kDecodeChunk / 2)));
    part.words[0] = words.x, part.words[1] = words.y;
    if constexpr (kRows == 1) part.words[2] = words.z, part.words[3] = words.w;
    part.scale.load(p.w, at >> block_shift);
  };

  RowPart<kind, kWords> ahead[kAtOnce] = {};
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i) {
    const int row = first_row + shelf + i * shelves;
    if (row < end_row) load(ahead[i], row, block_of(first_chunk));
  }

  FloatPairTable::fill(shared, p.w.codebook);
  float offset = 0;
  if constexpr (kind == ScaleKind::nested) {
    for (int i = threadIdx.x; i < kNestedCodeSize; i += kThreads) *gap(0, i) = p.w.nested_code[i];
    offset = *p.w.offset;
  }
  if (p.s.rank > 0) stage_projected(p.s, staged_s, p.s_out);
  __syncthreads();
  const FloatPairTable table(shared);

  for (int pass = first_row; pass < end_row; pass += pass_rows) {
    float sum[kRows][kWarpRows] = {};
    for (int chunk = first_chunk; chunk < end_chunk; ++chunk) {
      const int64_t column = static_cast<int64_t>(chunk) * kChunk + lane * kValues;
      float x[kRows][kValues] = {};
#pragma unroll
      for (int m = 0; m < kRows; ++m)
        if (column < p.w.k && m < p.m)
          load_floats(static_cast<const T*>(p.x) + m * p.w.k + column, x[m]);
      // After the last rows of this chunk come the first of the next one, or of the next pass.
      const bool last = chunk + 1 == end_chunk;
      const int block = block_of(chunk), next_block = block_of(last ? first_chunk : chunk + 1);
      const int next_pass = last ? pass + pass_rows : pass;

#pragma unroll
      for (int i = 0; i < kWarpRows; ++i) {
        RowPart<kind, kWords>& part = ahead[i % kAtOnce];
        if (pass + shelf + i * shelves < end_row) {
          const float scale =
              part.scale.value([&](uint32_t byte) { return *gap(0, byte); }, offset);
          float dot[kRows] = {};
#pragma unroll
          for (int w = 0; w < kWords; ++w) {
            float2 pairs[4];
            table.decode(part.words[w], pairs);
#pragma unroll
            for (int m = 0; m < kRows; ++m) {
#pragma unroll
              for (int j = 0; j < 4; ++j) {
                dot[m] = fmaf(pairs[j].x, x[m][8 * w + 2 * j], dot[m]);
                dot[m] = fmaf(pairs[j].y, x[m][8 * w + 2 * j + 1], dot[m]);
              }
            }
          }
#pragma unroll
          for (int m = 0; m < kRows; ++m) sum[m][i] = fmaf(scale, dot[m], sum[m][i]);
        }
        const bool here = i + kAtOnce < kWarpRows;
        const int row = (here ? pass : next_pass) + shelf + (i + kAtOnce) % kWarpRows * shelves;
        if (row < end_row) load(part, row, here ? block : next_block);
      }
    }

    if (pass > first_row) __syncthreads();
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
      const float all = add_lanes(sum[m], lane);
      constexpr int kLanes = 32 / kWarpRows;  // with the same sum
      if (lane % kLanes == 0) *sum_at(warp, lane / kLanes, m) = all;
    }
    __syncthreads();
    const int out = threadIdx.x;
    if (out < pass_rows * kRows) {
      const int m = out / pass_rows, own = out % pass_rows, n = pass + own;
      if (m < p.m && n < end_row) {
        float y = 0;
        for (int r = 0; r < runs; ++r) y += *sum_at(own % shelves * runs + r, own / shelves, m);
        store_y(p, staged_s, m, n, y);
      }
    }
  }
}

template <class T, int kRows, ScaleKind kind>
cudaError_t launch(const DecodeLinear& p, int shared, cudaStream_t stream) {
  const auto kernel = decode_linear<T, kRows, kind>;
  if (cudaError_t e = allow_shared(kernel, shared); e != cudaSuccess) return e;
  const auto grid = static_cast<unsigned>(ceil_div(p.w.n, p.rows));
  kernel<<<grid, kThreads, shared, stream>>>(p);
  return cudaGetLastError();
}

template <class T>
cudaError_t launch(const DecodeLinear& p, int shared, cudaStream_t stream) {
  const bool nested = p.w.kind == ScaleKind::nested;
  if (p.m == 1)
    return nested ? launch<T, 1, ScaleKind::nested>(p, shared, stream)
                  : launch<T, 1, ScaleKind::fp32>(p, shared, stream);
  return nested ? launch<T, kDecodeSimtRows, ScaleKind::nested>(p, shared, stream)
                : launch<T, kDecodeSimtRows, ScaleKind::fp32>(p, shared, stream);
}

}  // namespace

cudaError_t decode_linear_simt(const DecodeLinear& p, DType x_dtype, int shared,
                               cudaStream_t stream) {
  return with_element(x_dtype, [&]<class T>() { return launch<T>(p, shared, stream); });
}

}  // namespace qlk::cuda
