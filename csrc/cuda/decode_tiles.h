// What the decode kernels (few rows of x) were compiled for, and what each costs: plain C++, so
// that the choice among them can be read, printed and tested anywhere.
//
//   decode_mma   forward   a CTA has tile_n rows of W and all of K, 64 rows at a time; its warps
//   cut
//                          K among themselves. Nothing is split over CTAs: rows are cut as finely
//                          as SMs ask.
//                dx        a CTA has tile_n rows of W in one band of 128 columns (or the end of one
//                          band and the start of the next); `splits` CTAs at most share a band.
//                          Taken where decode_aligned() and, for dx, n is a multiple of 4; the
//                          launcher goes on to the kernels for any shape where not.
//   decode_simt  forward   m <= 3 and decode_aligned(): fp32 multiplies.
//                any       a thread a weight, whatever m, k, blocksize and alignment.
#pragma once
#include <cstdint>

#include "dispatch.h"

namespace qlk::cuda {

constexpr int kDecodeRows = 32;     // of x, at most: decode_mma, forward
constexpr int kDecodeFewRows = 16;  // and everything else
constexpr int kDecodeSimtRows = 3;  // that the fp32 kernel keeps in registers
constexpr int kDecodeWarps = 16;    // a CTA; one CTA a multiprocessor
// decode_mma, forward: fewer for more rows, for their registers.
constexpr int decode_linear_warps(int64_t m) { return m > 16 ? 8 : m > 8 ? 12 : kDecodeWarps; }
constexpr int kDecodeChunk = 64;     // values of a row of W that four lanes hold
constexpr int kDecodeTileRows = 16;  // of W in a matrix instruction
constexpr int kDecodePassTiles = 4;  // whose sums a warp holds
constexpr int kDecodeBand = 128;     // columns of dx a CTA has at a time
constexpr int kDecodeSimtBand = 256;
constexpr int kDecodeRegisters = 255;   // a thread may have; what the warps leave it, 128 with 16
constexpr int kDecodeStagedRank = 256;  // up to here S lies in shared memory

constexpr int kDecodeTableBytes = 64 << 10;       // the codebook's pairs; sums lie in its gaps
constexpr int kDecodeCodeBytes = (1 << 10) + 16;  // the nested code, the codes' unit

constexpr int64_t decode_align(int64_t bytes) { return ceil_div(bytes, 256) * 256; }

// What the mma and fp32 kernels ask of a weight (launchers also look at pointers).
constexpr bool decode_aligned(int64_t n, int64_t k, int block_log2) {
  return k % kDecodeChunk == 0 && k >= 2 * kDecodeChunk && block_log2 >= 6 &&
         k < (int64_t{1} << 26) && n * (k / kDecodeChunk) < (int64_t{1} << 31);
}

// Parts of the contraction of S or dS, summed where S is used.
constexpr int decode_lora_splits(int64_t contraction, int64_t rank) {
  if (rank > kDecodeStagedRank) return 1;
  const int64_t tiles = ceil_div(rank, 16);
  const int64_t want = ceil_div(16, tiles), most = ceil_div(contraction, 512);
  return static_cast<int>(want < most ? want : most);
}

// S in shared memory, where it fits; for the fp32 kernel it lies in the table's gaps, so that
// Turing's 64 KB are enough.
constexpr int decode_staged_bytes(int64_t m, int64_t rank) {
  return rank <= kDecodeStagedRank ? static_cast<int>(4 * m * rank) : 0;
}
constexpr int decode_shared_bytes(Route route, Pass pass, int64_t m, int64_t rank) {
  const int staged = pass == Pass::forward ? decode_staged_bytes(m, rank) : 0;
  if (route == Route::decode_mma) return kDecodeTableBytes + kDecodeCodeBytes + staged;
  if (pass == Pass::input_grad) return 0;
  return m <= kDecodeSimtRows ? kDecodeTableBytes : staged;
}
constexpr int decode_shared_bytes(const Plan& p, const Shape& s) {
  return decode_shared_bytes(p.route, s.pass, s.m, s.rank);
}

// Device memory, each part from a multiple of 256 bytes: partial dx (fp32), partial S or dS (fp32).
struct DecodeWorkspace {
  int64_t lora, bytes;  // offset of S, and the end
};
constexpr DecodeWorkspace decode_workspace(Pass pass, int64_t m, int64_t n, int64_t k, int64_t rank,
                                           bool s_given, int splits) {
  DecodeWorkspace w{};
  if (pass == Pass::input_grad) w.lora = decode_align(4 * splits * m * k);
  w.bytes = w.lora;
  if (rank > 0) {
    const int64_t contraction = pass == Pass::forward ? k : n;
    const int parts = s_given ? 1 : decode_lora_splits(contraction, rank);
    w.bytes += decode_align(4 * parts * m * rank);
  }
  return w;
}
constexpr int64_t decode_workspace_bytes(const Plan& p, const Shape& s) {
  return decode_workspace(s.pass, s.m, s.n, s.k, s.rank, s.s_given, p.splits).bytes;
}

constexpr int decode_rows(Route route, Pass pass) {
  return route == Route::decode_mma && pass == Pass::forward ? kDecodeRows : kDecodeFewRows;
}

constexpr bool decode_compiled(const Plan& p, const Shape& s) {
  if (p.route != Route::decode_mma && p.route != Route::decode_simt) return false;
  if (s.m < 1 || s.m > decode_rows(p.route, s.pass) || p.tile_n < 1 || p.splits < 1) return false;
  if (s.scales != ScaleKind::fp32 && s.scales != ScaleKind::nested) return false;
  return p.route == Route::decode_simt || s.dtype != DType::f32;
}

// The plan of a decode kernel on a device with `sms` multiprocessors: one CTA each.
constexpr Plan decode_plan(Route route, const Shape& s, int sms) {
  Plan p{};
  p.route = route;
  p.tile_m = static_cast<int>(ceil_div(s.m, 8)) * 8;
  p.warps = route == Route::decode_mma && s.pass == Pass::forward ? decode_linear_warps(s.m)
                                                                  : kDecodeWarps;
  p.stages = 1;
  p.splits = 1;
  if (s.pass == Pass::forward) {
    p.tile_n = static_cast<int>(ceil_div(s.n, sms));
    p.tile_k = static_cast<int>(s.k);
  } else if (route == Route::decode_simt) {  // bands of 256 columns, rows cut to fill the device
    const int64_t bands = ceil_div(s.k, kDecodeSimtBand);
    const int64_t want = ceil_div(int64_t{4} * sms, bands);
    const int64_t most = ceil_div(s.n, 64);
    p.splits = static_cast<int>(want < most ? want : most);
    p.tile_n = static_cast<int>(ceil_div(s.n, p.splits));
    p.tile_k = kDecodeSimtBand;
  } else {  // units of 16 rows by one band, band after band, cut into equal runs
    const int64_t units = ceil_div(s.n, kDecodeTileRows);
    const int64_t run = ceil_div(units * ceil_div(s.k, kDecodeBand), sms);
    p.tile_n = static_cast<int>(run * kDecodeTileRows);
    p.tile_k = kDecodeBand;
    p.splits = static_cast<int>(ceil_div(units, run) + 1);
  }
  p.shared_bytes = decode_shared_bytes(p, s);
  p.workspace_bytes = decode_workspace_bytes(p, s);
  return p;
}

}  // namespace qlk::cuda
