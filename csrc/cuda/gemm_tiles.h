// What the GEMM kernels were compiled for, and what each costs: plain C++, so that the choice among
// them can be read, printed and tested anywhere.
//
// `run`, the weights of one row that a lane decodes with one table, is a quarter of the columns of
// the weight that a CTA holds at a time (tile_k). A table is one block's, so a tile is taken only
// where a run lies in one block: run <= blocksize and run divides k. The longer the run, the
// cheaper the decoding; 64, 32 and 16 are compiled. stages = 1 names the kernel without any of
// that: any k, any alignment, one weight at a time.
//
//   forward      y tile  [tile_m, tile_n], tile_k columns of W a step; a warp has 32 rows of W
//   input_grad   dx tile [tile_m, tile_k], tile_n rows of W a step; a warp decodes 8 of them
#pragma once
#include <cstdint>

#include "dispatch.h"

namespace qlk::cuda {

struct GemmTile {
  int m, n, k;  // Plan's tile_m, tile_n, tile_k
  int warps, stages;
};

// Any k, any alignment, one weight at a time.
constexpr GemmTile kAnywhereLinearTile = {64, 128, 64, 4, 1};
constexpr GemmTile kAnywhereInputGradTile = {64, 32, 64, 4, 1};

constexpr GemmTile kLinearTiles[] = {
    {16, 128, 256, 4, 2}, {32, 128, 256, 4, 2}, {16, 128, 128, 4, 3}, {64, 128, 128, 4, 3},
    {96, 128, 128, 4, 2}, {64, 128, 64, 4, 3},  kAnywhereLinearTile,
};
constexpr GemmTile kInputGradTiles[] = {
    {16, 32, 256, 4, 4},  {32, 32, 256, 4, 3}, {64, 32, 256, 4, 4}, {128, 64, 256, 8, 3},
    {128, 32, 128, 4, 3}, {64, 32, 128, 4, 3}, {64, 32, 64, 4, 3},  kAnywhereInputGradTile,
};

constexpr int kGemmRegisters = 255;  // a thread may have; a test holds the compiled ones below it
constexpr int kElementBytes = 2;     // bf16, f16
constexpr int kLoraPad = 64;         // S and dS are padded to columns of this
constexpr int kLoraSpan = 256;       // contraction that one CTA of the S kernel takes

constexpr bool operator==(const GemmTile& a, const GemmTile& b) {
  return a.m == b.m && a.n == b.n && a.k == b.k && a.warps == b.warps && a.stages == b.stages;
}
constexpr GemmTile tile_of(const Plan& p) {
  return {p.tile_m, p.tile_n, p.tile_k, p.warps, p.stages};
}

// One stage's activations [m, contraction] and packed weights, and for dx the decoded tile, twice.
constexpr int gemm_shared_bytes(const GemmTile& t, Pass pass) {
  const int activations = t.m * (pass == Pass::forward ? t.k : t.n) * kElementBytes;
  const int packed = t.n * t.k / 2;
  const int decoded = pass == Pass::forward ? 0 : 2 * t.n * t.k * kElementBytes;
  if (t.stages == 1) return activations + decoded;  // no packed tile: weights one by one
  return t.stages * (activations + packed) + decoded;
}
constexpr int gemm_shared_bytes(const Plan& p, const Shape& s) {
  return gemm_shared_bytes(tile_of(p), s.pass);
}

// Whether the tile's run of weights lies in one block wherever it starts, and 16-byte copies of
// rows are aligned (a launcher falls back to stages = 1 where the pointers themselves are not).
constexpr bool gemm_tile_fits(const GemmTile& t, const Shape& s) {
  if (t.stages == 1) return true;
  const int64_t run = t.k / 4;
  const int64_t row = s.pass == Pass::forward ? s.k : s.n;  // of the activations
  return s.k % 32 == 0 && s.k % run == 0 && (int64_t{1} << s.block_log2) >= run && row % 8 == 0;
}

constexpr bool gemm_compiled(const Plan& p, const Shape& s) {
  if (p.route != Route::gemm || p.splits < 1 || s.dtype == DType::f32) return false;
  if (s.scales != ScaleKind::fp32 && s.scales != ScaleKind::nested) return false;
  const GemmTile t = tile_of(p);
  bool listed = false;
  if (s.pass == Pass::forward) {
    for (const GemmTile& x : kLinearTiles) listed = listed || x == t;
  } else {
    for (const GemmTile& x : kInputGradTiles) listed = listed || x == t;
  }
  return listed && gemm_tile_fits(t, s);
}

// Splits that a launcher makes of `splits`, given the contraction's steps: none is empty.
constexpr int gemm_splits(int splits, int64_t steps) {
  return static_cast<int>(splits < steps ? splits : steps);
}

// Device memory, each part from a multiple of 256 bytes: partial y (fp32, a split each), partial S,
// and S as the tensor cores take it.
struct GemmWorkspace {
  int64_t partial, lora_partial, lora, bytes;  // offsets, and the end
};
constexpr int64_t align_256(int64_t x) { return ceil_div(x, 256) * 256; }
constexpr GemmWorkspace gemm_workspace(Pass pass, int64_t m, int64_t n, int64_t k, int64_t rank,
                                       bool s_given, int splits) {
  const int64_t out = pass == Pass::forward ? n : k, contraction = pass == Pass::forward ? k : n;
  GemmWorkspace w{};
  w.lora_partial = splits > 1 ? align_256(splits * m * out * 4) : 0;
  w.lora = w.lora_partial;
  if (rank > 0 && !s_given) w.lora += align_256(ceil_div(contraction, kLoraSpan) * m * rank * 4);
  w.bytes = w.lora;
  if (rank > 0) w.bytes += align_256(m * ceil_div(rank, kLoraPad) * kLoraPad * kElementBytes);
  return w;
}
constexpr int64_t gemm_workspace_bytes(const Plan& p, const Shape& s) {
  return gemm_workspace(s.pass, s.m, s.n, s.k, s.rank, s.s_given, p.splits).bytes;
}

}  // namespace qlk::cuda
