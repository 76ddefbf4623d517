// dx = dy W for 1 to 15 rows of dy, on tensor cores, from the same bytes as the forward pass. Now
// rows of W are summed over and its columns are the result's, so the matrix of 16 rows is W
// transposed, and a block's scale, which varies along the sum, goes into dy.
//
//   grid    one CTA of 16 warps an SM. Work is units of 16 rows of W by a band of 128 columns (64
//           bytes a row), band after band. A CTA has a run of `run` units, which may end one band
//           and start the next. What it sums of a band goes to the band's next free layer [m, k] of
//           the workspace, counted from the band's first CTA; decode_finish adds the layers in that
//           order. (K has too few bands to fill a device without cutting the sum.)
//   warp    a unit: lane (g, t) reads 4 bytes, the g-th, of rows 4t ... 4t + 3 in both blocks of 64
//           columns: 8 loads, each of 4 whole sectors for the warp. n is a multiple of 4.
//
//             a block, one sector:  |g=0    |g=1    | ...         |g=7    |
//                                    v0..7   8..15                 56..63
//
//           Instruction j of a block has as its row g the column 8g + 2j, as row g + 8 the column
//           after it, and the 4 rows of lane t as indices 2t, 2t + 1, 2t + 8, 2t + 9 of the sum.
//   decode  a fragment's register pairs two rows of one column. Nibbles of two rows are merged into
//           bytes first, 2 instructions for 8 weights, which then go through the forward's table.
//   dy      of the 4 rows, from L2 to registers; times the block's scale, rounded to T, it is the
//           other operand of all 4 instructions of a block.
//
// Numerics: codes in T, dy * scale rounded to T, each u = 2^-8 (bf16) or 2^-11 (f16) at most; exact
// products, fp32 sums over n in hardware's and then in layers' order. Against float64:
//
//     |dx - exact| <= (2u + u^2 + (N + 80) 2^-24) sum |dy w| + sum |d(dS) A|
//                     + (rank + 8) 2^-24 sum |dS A| + ulp(dx) / 2
//
// with d(dS) the error of dS (decode_lora_mma.cu; fp32), and in f16 2^-25 of the largest code times
// scale times |dy|, and 2^-25 of the largest code, more for each term whose code or dy * scale is
// below 2^-14: they lose bits there, as f16's results do.
//
// Issue slots for 8 weights a lane, m <= 8: 6 ALU and 4 LDS decode, 1 LDG, 1 HMMA, 1.5 scale dy, 2
// for its scales, 1 for dy, and the loop (benchmarks/cuda_decode.py).
#include "decode_common.cuh"
#include "fragments.cuh"

namespace qlk::cuda {
namespace {

constexpr int kWarps = kDecodeWarps;
constexpr int kThreads = 32 * kWarps;
constexpr int kUnitRows = kDecodeTileRows;
constexpr int kBlocks = kDecodeBand / kDecodeChunk;         // of a band: 2
constexpr int kBlockLines = 8 * kDecodeChunk / kGapFloats;  // a warp's sums of a block, 8 rows

// What a lane holds of one unit: words of rows 4t + i, the scale of row lane % 16 and block lane /
// 16, and 4 values of dy's row g (and g + 8).
template <ScaleKind kind, int kColumns>
struct Unit {
  uint32_t words[kBlocks][4];
  PendingScale<kind> scale;
  uint2 dy[kColumns];
};

template <class T>
__device__ __forceinline__ float2 unpack(uint32_t pair) {
  const T* const at = reinterpret_cast<const T*>(&pair);
  return {to_float(at[0]), to_float(at[1])};
}

template <class T, int kColumns, int kUnits, ScaleKind kind>
__global__ void __launch_bounds__(kThreads, 1) decode_input_grad(const DecodeInputGrad p) {
  extern __shared__ __align__(16) char shared[];
  float* const nested_code = reinterpret_cast<float*>(shared + kDecodeTableBytes);

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int g = lane / 4, t = lane % 4;
  const int n_rows = static_cast<int>(p.w.n);
  const int row_blocks = static_cast<int>(p.w.k / kDecodeChunk);
  const int block_shift = p.w.block_log2 - 6;
  const uint32_t row_bytes = row_blocks * (kDecodeChunk / 2);
  const int units = (n_rows + kUnitRows - 1) / kUnitRows;  // of a band
  const int bands = (row_blocks + kBlocks - 1) / kBlocks;
  const int64_t first_unit = static_cast<int64_t>(blockIdx.x) * p.run;
  const int64_t end_unit = min(first_unit + p.run, static_cast<int64_t>(units) * bands);

  auto load = [&](Unit<kind, kColumns>& to, int band, int unit) {
    // Rows past the end stay as they were, and meet a dy of zero; a missing block is read as the
    // one before it, and is not stored. n is a multiple of 4: lane t's rows are all there, or none.
    const int row = unit * kUnitRows;
    const bool pair = band * kBlocks + 1 < row_blocks;
    auto chunk = [&](int n) { return static_cast<uint32_t>(n) * row_blocks + band * kBlocks; };
    if (row + 4 * t < n_rows) {
      const uint8_t* from = p.w.packed + 32 * static_cast<uint64_t>(chunk(row + 4 * t)) + 4 * g;
      const int across = pair ? kDecodeChunk / 2 : 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint8_t* const at = from + static_cast<uint64_t>(row_bytes) * i;
        to.words[0][i] = __ldg(reinterpret_cast<const uint32_t*>(at));
        to.words[1][i] = __ldg(reinterpret_cast<const uint32_t*>(at + across));
      }
    }
    if (row + lane % 16 < n_rows)
      to.scale.load(p.w, (chunk(row + lane % 16) + (pair ? lane / 16 : 0)) >> block_shift);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int m = g + 8 * c, n = row + 4 * t;
      const T* const dy = static_cast<const T*>(p.dy) + m * p.w.n + n;
      to.dy[c] = {};
      if (m < p.m && n < n_rows) to.dy[c] = __ldg(reinterpret_cast<const uint2*>(dy));
    }
  };

  int band = static_cast<int>(first_unit / units);
  int begin = static_cast<int>(first_unit % units);  // of this band's units
  auto end_of = [&](int b) {
    return static_cast<int>(
        min(static_cast<int64_t>(units), end_unit - static_cast<int64_t>(b) * units));
  };
  Unit<kind, kColumns> ahead[kUnits] = {};
  auto load_all = [&](int b, int unit, int end) {
#pragma unroll
    for (int u = 0; u < kUnits; ++u)
      if (unit + u < end) load(ahead[u], b, unit + u);
  };
  bool ready = begin + warp * kUnits < end_of(band);  // `ahead` holds this warp's first of the band
  if (ready) load_all(band, begin + warp * kUnits, end_of(band));

  const float code_unit = codebook_unit(p.w.codebook);
  PairTable<T>::fill(shared, p.w.codebook, code_unit);
  float offset = 0;
  if constexpr (kind == ScaleKind::nested) {
    for (int i = threadIdx.x; i < kNestedCodeSize; i += kThreads)
      nested_code[i] = p.w.nested_code[i];
    offset = *p.w.offset;
  }
  __syncthreads();
  const PairTable<T> table(shared);

  for (; static_cast<int64_t>(band) * units + begin < end_unit; ++band, begin = 0) {
    const int end = end_of(band);
    FragC sum[kBlocks][4][kColumns] = {};
    int unit = begin + warp * kUnits;
    if (unit < end && !ready) load_all(band, unit, end);
    ready = false;
    for (; unit < end; unit += kWarps * kUnits) {
      // What comes next: of this band, or of the CTA's next one.
      int next_band = band, next = unit + kWarps * kUnits, next_end = end;
      if (next >= end) {
        ++next_band, next = warp * kUnits, next_end = end_of(next_band);
        ready = next < next_end;
      }
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        if (unit + u < end) {
          Unit<kind, kColumns>& now = ahead[u];
          const float own =
              now.scale.value([&](uint32_t byte) { return nested_code[byte]; }, offset);
          float dy[kColumns][4];
#pragma unroll
          for (int c = 0; c < kColumns; ++c) {
            const float2 first = unpack<T>(now.dy[c].x), second = unpack<T>(now.dy[c].y);
            dy[c][0] = first.x, dy[c][1] = first.y, dy[c][2] = second.x, dy[c][3] = second.y;
          }
#pragma unroll
          for (int b = 0; b < kBlocks; ++b) {
            float scale[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) scale[i] = __shfl_sync(~0u, own, 16 * b + 4 * t + i);
            FragB scaled[kColumns];
#pragma unroll
            for (int c = 0; c < kColumns; ++c)
              scaled[c] = {{round_pair<T>(dy[c][0] * scale[0], dy[c][1] * scale[1]),
                            round_pair<T>(dy[c][2] * scale[2], dy[c][3] * scale[3])}};
            // [rows 4t, 4t + 1 or 4t + 2, 4t + 3]: byte j has column 2j of both, the earlier row on
            // top.
            uint32_t even[2][4], odd[2][4];
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              constexpr uint32_t kHigh = 0xf0f0f0f0u;
              const uint32_t upper = now.words[b][2 * h], lower = now.words[b][2 * h + 1];
              table.decode((upper & kHigh) | ((lower >> 4) & ~kHigh), even[h]);
              table.decode(((upper << 4) & kHigh) | (lower & ~kHigh), odd[h]);
            }
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              const FragA a = {{even[0][j], odd[0][j], even[1][j], odd[1][j]}};
#pragma unroll
              for (int c = 0; c < kColumns; ++c) multiply_add<T>(sum[b][j][c], a, scaled[c]);
            }
          }
        }
        if (next + u < next_end) load(ahead[u], next_band, next + u);
      }
    }

    // Sums of the warps, 64 columns by 8 rows of dx at a time, in the gaps of the table: two lines
    // a row. Lines of rows 2t are turned by 2t floats, so that neither fragments nor rows conflict.
    const int64_t layer =
        blockIdx.x - static_cast<int64_t>(band) * units / p.run;  // from the band's first CTA
    auto place = [&](int w, int m, int column) {
      return table_gap(shared, w * kBlockLines + m * 2 + column / kGapFloats) +
             (column + m / 2 * 2) % kGapFloats;
    };
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        __syncthreads();
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float* const v = sum[b][j][c].c;
          *reinterpret_cast<float2*>(place(warp, 2 * t, 8 * g + 2 * j)) = {v[0], v[2]};
          *reinterpret_cast<float2*>(place(warp, 2 * t + 1, 8 * g + 2 * j)) = {v[1], v[3]};
        }
        __syncthreads();
        const int own = threadIdx.x / kDecodeChunk, column = threadIdx.x % kDecodeChunk;
        const int m = 8 * c + own;
        const int64_t block = static_cast<int64_t>(band) * kBlocks + b;
        if (m < p.m && block < row_blocks) {
          const float* const from = place(0, own, column);
          float v = 0;
#pragma unroll
          for (int w = 0; w < kWarps; ++w) v += from[w * kBlockLines * (kPairRow / 4)];
          p.layers[(layer * p.m + m) * p.w.k + block * kDecodeChunk + column] =
              v * inverse_of_unit(code_unit);
        }
      }
    }
  }
}

template <class T, int kColumns, int kUnits, ScaleKind kind>
cudaError_t launch(const DecodeInputGrad& p, int shared, cudaStream_t stream) {
  const auto kernel = decode_input_grad<T, kColumns, kUnits, kind>;
  if (cudaError_t e = allow_shared(kernel, shared); e != cudaSuccess) return e;
  const int64_t units = ceil_div(p.w.n, kUnitRows) * ceil_div(p.w.k, kDecodeBand);
  const auto grid = static_cast<unsigned>(ceil_div(units, p.run));
  kernel<<<grid, kThreads, shared, stream>>>(p);
  return cudaGetLastError();
}

template <class T>
cudaError_t launch(const DecodeInputGrad& p, int shared, cudaStream_t stream) {
  const bool nested = p.w.kind == ScaleKind::nested;
  if (p.m <= 8)
    return nested ? launch<T, 1, 2, ScaleKind::nested>(p, shared, stream)
                  : launch<T, 1, 2, ScaleKind::fp32>(p, shared, stream);
  return nested ? launch<T, 2, 1, ScaleKind::nested>(p, shared, stream)
                : launch<T, 2, 1, ScaleKind::fp32>(p, shared, stream);
}

}  // namespace

cudaError_t decode_input_grad_mma(const DecodeInputGrad& p, DType dy_dtype, int shared,
                                  cudaStream_t stream) {
  return dy_dtype == DType::bf16 ? launch<__nv_bfloat16>(p, shared, stream)
                                 : launch<__half>(p, shared, stream);
}

}  // namespace qlk::cuda
