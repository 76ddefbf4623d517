// y = x W^T + bias + scaling S B^T for 1 to 32 rows of x, on tensor cores. The weights are the
// matrix of 16 rows (of W) and x the one of 8 columns (rows of x), so that 8 weights cost one
// instruction's share whatever m is; what is left to pay is turning 4 bits into a value.
//
//   grid    one CTA an SM, of 16 warps (12 or 8 for m > 8, for their registers). It has `rows`
//           consecutive rows of W and all of K. Rows are cut one by one, so SMs get the same number
//           of bytes, nobody shares a row and nothing is summed across CTAs.
//   CTA     passes of 64 rows. Its warps cut K into as many runs of pairs of blocks of 64 values.
//   At
//           the end of a pass their sums meet in shared memory, added in the order of the warps.
//   warp    a step is 2 blocks of K by up to 4 tiles of 16 rows. Of a tile, lane (g, t) reads 8
//           bytes of rows g and g + 8 in both blocks: the 16 values 16t ... of the block.
//
//             a block, 32 bytes, one sector:  |t=0     |t=1     |t=2     |t=3     |
//                                              v0 .. 15 16 .. 31 32 .. 47 48 .. 63
//
//           Four instructions contract the block. Which value of K goes by which index of the
//           instruction is free, as long as x agrees: in instruction j, lane t has 4j ... 4j + 3 of
//           its 16 values where the fragment says 2t, 2t + 1, 2t + 8, 2t + 9. So both operands are
//           what a lane's natural loads hold: bytes, through the table, and 32 bytes of x.
//   x       goes from L2 to registers once a pass, by the one warp whose run of K it is, for all
//           tiles of the pass: no staging, no barrier in the loop.
//   ahead   weights and scales of two tiles (2 KB a warp, 32 KB an SM) are always on their way,
//   also
//           across the ends of passes.
//
// Numerics, variant (c): codes in T (bf16 or f16), exact products with x, fp32 sums within a block
// of 64, times the block's scale in fp32 (decoded as block_format.h says), added up in fp32. LoRA's
// term: S and B in fp32. Rounded once, when y is stored. With u = 2^-8 (bf16) or 2^-11 (f16),
// against float64 on the same x and exact weights w:
//
//     |y - exact| <= (u + (K + 80) 2^-24) sum |x w| + scaling sum |dS B|
//                    + (rank + 8) 2^-24 scaling sum |S B| + ulp(y) / 2
//
// with dS the error of S (decode_lora_mma.cu), and in f16 2^-25 of the largest code times scale
// times |x| more for each weight whose code is below 2^-14 of the largest. A codebook that T holds
// exactly has no u. An identity matrix gives the rounded code times the scale, exactly.
//
// Issue slots: benchmarks/cuda_decode.py counts them. For 8 weights a lane and m <= 8, 4 PRMT and 4
// LDS decode, 1 HMMA and 1 FFMA multiply, 0.5 LDG loads, and the rest, as many again, is addresses,
// scales, x and bounds; m > 8 adds one HMMA and FFMA. The table's 4 passes through shared memory
// for 128 bytes of weights are what comes next after DRAM.
#include "decode_common.cuh"
#include "fragments.cuh"

namespace qlk::cuda {
namespace {

template <int kColumns>
constexpr int kWarpsFor = decode_linear_warps(8 * kColumns);
constexpr int kTileRows = kDecodeTileRows;
constexpr int kTiles = kDecodePassTiles;
constexpr int kPassRows = kTiles * kTileRows;
constexpr int kStep = 2;                           // blocks of 64
constexpr int kAhead = 2;                          // tiles
constexpr int kTileSums = kTileRows * 8;           // of one column block of y
constexpr int kSumLines = kTileSums / kGapFloats;  // of the table's gaps

// The weights of one tile and step that a lane decodes, and one of its four scales: lane t has that
// of row g + 8 (t / 2) and block t % 2.
template <ScaleKind kind>
struct Tile {
  uint2 row[2][kStep];  // [g or g + 8][block]
  PendingScale<kind> scale;
};

template <class T, int kColumns, ScaleKind kind>
__global__ void __launch_bounds__(32 * kWarpsFor<kColumns>, 1) decode_linear(const DecodeLinear p) {
  constexpr int kWarps = kWarpsFor<kColumns>;
  constexpr int kThreads = 32 * kWarps;
  extern __shared__ __align__(16) char shared[];
  float* const nested_code = reinterpret_cast<float*>(shared + kDecodeTableBytes);
  float& code_unit = nested_code[kNestedCodeSize];
  const PlainS staged_s{nested_code + kDecodeCodeBytes / 4, p.s.rank};

  // From one lane, so that the compiler knows: a warp goes through all that follows together.
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const int g = lane / 4, t = lane % 4;
  const int first_row = blockIdx.x * p.rows;
  const int end_row = min(first_row + p.rows, static_cast<int>(p.w.n));
  // Pairs of blocks are the steps. Where a row has an odd number of blocks, the last pair is the
  // last two, of which the first was the pair's before: its sum is not added again.
  const int blocks = static_cast<int>(p.w.k / kDecodeChunk);
  const int steps = (blocks + 1) / kStep;
  const int first_step = steps * warp / kWarps, end_step = steps * (warp + 1) / kWarps;
  const int block_shift = p.w.block_log2 - 6;
  const uint32_t row_bytes = blocks * (kDecodeChunk / 2);
  const int scale_row = g + 8 * (t / 2);
  auto block_of = [&](int step) { return min(step * kStep, blocks - kStep); };

  // Tile `index` (0 or 1) of those that begin at `row`. What lies past the end stays as it was:
  // such rows' sums are never stored.
  auto load = [&](Tile<kind>& tile, int index, int row, int step) {
    const int left = end_row - row, block = block_of(step);
    const uint8_t* const from =
        p.w.packed + 32 * static_cast<uint64_t>(static_cast<uint32_t>(row + g) * blocks + block) +
        8 * t;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int down = index * kTileRows + 8 * half;
      if (g + down < left) {
        const uint2* const chunk =
            reinterpret_cast<const uint2*>(from + static_cast<uint64_t>(row_bytes) * down);
        tile.row[half][0] = __ldg(chunk);
        tile.row[half][1] = __ldg(chunk + 4);
      }
    }
    const int down = index * kTileRows + scale_row;
    if (down < left)
      tile.scale.load(p.w,
                      (static_cast<uint32_t>(row + down) * blocks + block + t % 2) >> block_shift);
  };

  Tile<kind> ahead[kAhead] = {};
  if (first_step < end_step) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) load(ahead[i], i, first_row, first_step);
  }

  const float unit = codebook_unit(p.w.codebook);
  PairTable<T>::fill(shared, p.w.codebook, unit);
  if (threadIdx.x == 0) code_unit = unit;
  float offset = 0;
  if constexpr (kind == ScaleKind::nested) {
    for (int i = threadIdx.x; i < kNestedCodeSize; i += kThreads)
      nested_code[i] = p.w.nested_code[i];
    offset = *p.w.offset;
  }
  if (p.s.rank > 0) stage_projected(p.s, staged_s, p.s_out);
  __syncthreads();
  const PairTable<T> table(shared);

  // Rows past x's last are read as that one, and what comes of them is not stored.
  const T* x_row[kColumns];
#pragma unroll
  for (int c = 0; c < kColumns; ++c)
    x_row[c] = static_cast<const T*>(p.x) + min(g + 8 * c, p.m - 1) * p.w.k + 16 * t;

  for (int row = first_row; row < end_row; row += kPassRows) {
    const int tiles = min(kTiles, (end_row - row + kTileRows - 1) / kTileRows);
    FragC sum[kTiles][kColumns] = {};

    for (int step = first_step; step < end_step; ++step) {
      // x of both blocks: row g (and g + 8), the lane's 16 values of each.
      uint32_t x[kColumns][kStep][8];
      const int block = block_of(step);
      const bool first_again = block < step * kStep;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const uint4* const from = reinterpret_cast<const uint4*>(x_row[c] + block * kDecodeChunk);
#pragma unroll
        for (int i = 0; i < kStep; ++i) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const uint4 v = __ldg(from + i * (kDecodeChunk / 8) + h);
            x[c][i][4 * h] = v.x, x[c][i][4 * h + 1] = v.y;
            x[c][i][4 * h + 2] = v.z, x[c][i][4 * h + 3] = v.w;
          }
        }
      }

      // Adds a tile's part to its sums; `full`: it has more than 8 rows, else what is decoded of
      // rows g stands for rows g + 8, too.
      auto contract = [&]<bool full>(const Tile<kind>& tile, FragC(&out)[kColumns]) {
        const float own =
            tile.scale.value([&](uint32_t byte) { return nested_code[byte]; }, offset);
        FragC part[kStep][kColumns] = {};
        auto scaled = [&](int i) {
          const float scale = __shfl_sync(~0u, own, i, 4);
          const float scale_8 = __shfl_sync(~0u, own, 2 + i, 4);
          if (i == 0 && first_again) return;
#pragma unroll
          for (int c = 0; c < kColumns; ++c) {
            const FragC& add = part[i][c];
            out[c].c[0] = fmaf(scale, add.c[0], out[c].c[0]);
            out[c].c[1] = fmaf(scale, add.c[1], out[c].c[1]);
            out[c].c[2] = fmaf(scale_8, add.c[2], out[c].c[2]);
            out[c].c[3] = fmaf(scale_8, add.c[3], out[c].c[3]);
          }
        };
        // One column block of x: both blocks of K in turn, so that instructions that wait for each
        // other are apart. Two: the columns are that, and a block's sums make way for the next
        // one's.
#pragma unroll
        for (int s = 0; s < 2 * kStep; ++s) {
          const int i = kColumns == 1 ? s % 2 : s / 2, word = kColumns == 1 ? s / 2 : s % 2;
          uint32_t low[4], high[4];
          table.decode(word == 0 ? tile.row[0][i].x : tile.row[0][i].y, low);
          if constexpr (full) table.decode(word == 0 ? tile.row[1][i].x : tile.row[1][i].y, high);
#pragma unroll
          for (int j = 0; j < 4; j += 2) {
            FragA a = {{low[j], low[j], low[j + 1], low[j + 1]}};
            if constexpr (full) a.a[1] = high[j], a.a[3] = high[j + 1];
#pragma unroll
            for (int c = 0; c < kColumns; ++c)
              multiply_add<T>(part[i][c], a,
                              FragB{{x[c][i][4 * word + j], x[c][i][4 * word + j + 1]}});
          }
          if (kColumns > 1 && word == 1) scaled(i);
        }
        if (kColumns == 1) scaled(0), scaled(1);
      };

#pragma unroll
      for (int first = 0; first < kTiles; first += kAhead) {
        if (first < tiles) {
          // What the registers get once they are free: the step's other tiles, the next step's
          // first ones, or the next pass's.
          int next_row = row, next_step = step;
          if (first + kAhead < tiles) {
            next_row += (first + kAhead) * kTileRows;
          } else if (++next_step == end_step) {
            next_row += kPassRows, next_step = first_step;
          }
#pragma unroll
          for (int i = 0; i < kAhead; ++i) {
            const int left = end_row - row - (first + i) * kTileRows;
            if (left > 8) {
              contract.template operator()<true>(ahead[i], sum[first + i]);
            } else if (left > 0) {
              contract.template operator()<false>(ahead[i], sum[first + i]);
            }
            load(ahead[i], i, next_row, next_step);
          }
        }
      }
    }

    // Sums of the warps, two tiles at a time, in the gaps of the table: of each tile and column
    // block 16 x 8 floats in the order of rows, 4 lines.
#pragma unroll
    for (int pair = 0; pair < kTiles; pair += 2) {
      if (pair < tiles) {
        if (pair > 0 || row > first_row) __syncthreads();
#pragma unroll
        for (int index = 0; index < 2; ++index) {
#pragma unroll
          for (int c = 0; c < kColumns; ++c) {
            const int line = ((warp * 2 + index) * kColumns + c) * kSumLines + g / 4;
            float* const to = table_gap(shared, line) + g % 4 * 8 + 2 * t;
            const float* const v = sum[pair + index][c].c;
            *reinterpret_cast<float2*>(to) = {v[0], v[1]};
            *reinterpret_cast<float2*>(to + 2 * (kPairRow / 4)) = {v[2], v[3]};
          }
        }
        __syncthreads();
        for (int out = threadIdx.x; out < 2 * kColumns * kTileSums; out += kThreads) {
          const int m = out % 8 + out / kTileSums % kColumns * 8;
          const int n =
              row + (pair + out / (kTileSums * kColumns)) * kTileRows + out % kTileSums / 8;
          if (m < p.m && n < end_row) {
            const float* const from = table_gap(shared, out / kGapFloats) + out % kGapFloats;
            float y = 0;
#pragma unroll
            for (int v = 0; v < kWarps; ++v)
              y += from[v * 2 * kColumns * kSumLines * (kPairRow / 4)];
            y *= inverse_of_unit(code_unit);
            store_y(p, staged_s, m, n, y);
          }
        }
      }
    }
  }
}

template <class T, int kColumns, ScaleKind kind>
cudaError_t launch(const DecodeLinear& p, int shared, cudaStream_t stream) {
  const auto kernel = decode_linear<T, kColumns, kind>;
  if (cudaError_t e = allow_shared(kernel, shared); e != cudaSuccess) return e;
  const auto grid = static_cast<unsigned>(ceil_div(p.w.n, p.rows));
  kernel<<<grid, 32 * kWarpsFor<kColumns>, shared, stream>>>(p);
  return cudaGetLastError();
}

template <class T>
cudaError_t launch(const DecodeLinear& p, int shared, cudaStream_t stream) {
  const bool nested = p.w.kind == ScaleKind::nested;
  if (p.m <= 8)
    return nested ? launch<T, 1, ScaleKind::nested>(p, shared, stream)
                  : launch<T, 1, ScaleKind::fp32>(p, shared, stream);
  if (p.m <= 16)
    return nested ? launch<T, 2, ScaleKind::nested>(p, shared, stream)
                  : launch<T, 2, ScaleKind::fp32>(p, shared, stream);
  if (p.m <= 24)
    return nested ? launch<T, 3, ScaleKind::nested>(p, shared, stream)
                  : launch<T, 3, ScaleKind::fp32>(p, shared, stream);
  return nested ? launch<T, 4, ScaleKind::nested>(p, shared, stream)
                : launch<T, 4, ScaleKind::fp32>(p, shared, stream);
}

}  // namespace

cudaError_t decode_linear_mma(const DecodeLinear& p, DType dtype, int shared, cudaStream_t stream) {
  return dtype == DType::bf16 ? launch<__nv_bfloat16>(p, shared, stream)
                              : launch<__half>(p, shared, stream);
}

}  // namespace qlk::cuda
