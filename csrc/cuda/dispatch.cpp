#include "dispatch.h"

#include <algorithm>

#include "decode_tiles.h"
#include "gemm_tiles.h"

namespace qlk::cuda {
namespace {

// --- the table -----------------------------------------------------------------------------------

// By compute capability (the nearest one that is not above). Rows of x up to which a kernel is
// taken; between them the next one. Where they come from: benchmarks/ counts each kernel's work and
// models its time on each device; docs/kernels.md has the ranking.
//
//   simt        fp32 multiplies cost 8 m instructions for 8 weights. On HBM parts that exceeds the
//               issue slots at full bandwidth (36 on H100, 39 on A100) from two rows on; GDDR parts
//               have 169 and take three.
//   gemm        until dequantization, whose cost does not grow with m, is repaid by torch's matmul:
//               late where mma.sync reaches the peak (80, 86, 89, 120), earlier where wgmma
//               (90: 1.6 x) or tcgen05 (100: about 4 x) is out of its reach.
//   unaligned   rows up to which one thread a weight is still cheaper than writing the weight out
struct Row {
  int capability;
  int simt, mma, gemm, unaligned;
};
constexpr Row kTable[] = {
    //   simt mma  gemm  unaligned
    {75, 3, 0, 0, 4},    {80, 1, 15, 256, 4}, {86, 3, 15, 256, 4},
    {90, 1, 15, 256, 4}, {100, 1, 15, 64, 4}, {120, 3, 15, 256, 4},
};

const Row& row_of(int capability) {
  const Row* found = &kTable[0];
  for (const Row& row : kTable)
    if (row.capability <= capability) found = &row;
  return *found;
}

// --- GEMM tiles ----------------------------------------------------------------------------------

// Splits double until the CTAs fill the device or a split would have less than this many steps.
constexpr int kMinSteps = 8;
constexpr int kMaxSplits = 16;

int64_t steps_of(const GemmTile& t, const Shape& s) {
  return s.pass == Pass::forward ? ceil_div(s.k, t.k) : ceil_div(s.n, t.n);
}
int64_t tiles_of(const GemmTile& t, const Shape& s) {
  return ceil_div(s.m, t.m) * (s.pass == Pass::forward ? ceil_div(s.n, t.n) : ceil_div(s.k, t.k));
}

int splits_of(const DeviceLimits& d, const GemmTile& t, const Shape& s) {
  int splits = 1;
  while (2 * splits <= kMaxSplits && 2 * splits * tiles_of(t, s) <= d.sms &&
         steps_of(t, s) >= 2 * splits * kMinSteps)
    splits *= 2;
  return splits;
}

// Lists are in the order of preference for few rows: the widest k (the cheapest decoding) and the
// smallest m first. The first tile that covers all rows is taken, else the tallest that fits: every
// row of tiles decodes the weight once more.
Plan gemm_plan(const DeviceLimits& d, const Shape& s) {
  Plan best{};
  best.route = Route::large;
  const auto consider = [&](const GemmTile& t) {
    Plan p{};
    p.route = Route::gemm;
    p.tile_m = t.m, p.tile_n = t.n, p.tile_k = t.k, p.warps = t.warps, p.stages = t.stages;
    p.splits = splits_of(d, t, s);
    if (!complete(d, s, &p)) return;
    const bool first = best.route == Route::large;
    const bool taller = best.tile_m < std::min<int64_t>(s.m, 128) && p.tile_m > best.tile_m;
    const bool no_worse_decoding = p.stages > 1 || best.stages == 1;
    if (first || (taller && no_worse_decoding)) best = p;
  };
  if (s.pass == Pass::forward) {
    for (const GemmTile& t : kLinearTiles) consider(t);
  } else {
    for (const GemmTile& t : kInputGradTiles) consider(t);
  }
  return best;
}

Plan large_plan() {
  Plan p{};
  p.route = Route::large;
  return p;
}

std::string text(int64_t n) { return std::to_string(n); }

}  // namespace

const char* route_name(Route route) {
  switch (route) {
    case Route::decode_simt:
      return "decode_simt";
    case Route::decode_mma:
      return "decode_mma";
    case Route::gemm:
      return "gemm";
    case Route::large:
      return "large";
  }
  return "?";
}

bool complete(const DeviceLimits& d, const Shape& s, Plan* p) {
  p->shared_bytes = 0, p->workspace_bytes = 0;
  switch (p->route) {
    case Route::large:
      return true;
    case Route::gemm:
      if (d.capability() < 80 || !gemm_compiled(*p, s)) return false;
      p->shared_bytes = gemm_shared_bytes(*p, s);
      p->workspace_bytes = gemm_workspace_bytes(*p, s);
      break;
    case Route::decode_mma:
      if (d.capability() < 80) return false;
      [[fallthrough]];
    case Route::decode_simt:
      if (!decode_compiled(*p, s)) return false;
      p->shared_bytes = decode_shared_bytes(*p, s);
      p->workspace_bytes = decode_workspace_bytes(*p, s);
      break;
  }
  return p->shared_bytes <= d.shared_optin;
}

std::vector<Plan> candidates(const DeviceLimits& d, const Shape& s) {
  std::vector<Plan> found;
  const auto add = [&](Plan p) {
    if ((kBuilt & bit(p.route)) && complete(d, s, &p)) found.push_back(p);
  };
  for (const Route route : {Route::decode_simt, Route::decode_mma})
    if (s.m <= kDecodeRows) add(decode_plan(route, s, d.sms));
  const auto add_gemm = [&](const GemmTile& t) {
    for (int splits = 1; splits <= kMaxSplits; splits *= 2) {
      Plan p{};
      p.route = Route::gemm;
      p.tile_m = t.m, p.tile_n = t.n, p.tile_k = t.k, p.warps = t.warps, p.stages = t.stages;
      p.splits = splits;
      if (splits == 1 || steps_of(t, s) >= splits) add(p);
    }
  };
  if (s.pass == Pass::forward) {
    for (const GemmTile& t : kLinearTiles) add_gemm(t);
  } else {
    for (const GemmTile& t : kInputGradTiles) add_gemm(t);
  }
  found.push_back(large_plan());
  return found;
}

Choice choose(const DeviceLimits& d, const Shape& s, RouteMask disabled) {
  const Row& row = row_of(d.capability());
  const std::string sm = "sm_" + text(d.capability());
  const auto on = [&](Route route) { return (kBuilt & ~disabled & bit(route)) != 0; };
  std::string off;  // what would have been taken
  const auto take = [&](Route route) {
    if (!on(route) && off.empty()) off = std::string(route_name(route)) + " is switched off; ";
    return on(route);
  };
  const auto large = [&](const std::string& why) { return Choice{large_plan(), off + why}; };

  if (s.scales != ScaleKind::fp32 && s.scales != ScaleKind::nested)
    return large("scales of one byte, for research, have no fused kernel");
  if (s.dtype == DType::bf16 && d.capability() < 80)
    return large("bf16 on " + sm + " is not in hardware, whatever torch says: use fp16");
  if (s.dtype == DType::f32 && s.m > row.simt)
    return large("tensor cores take no fp32; one thread a weight pays up to " + text(row.simt) +
                 " rows");

  const bool aligned = decode_aligned(s.n, s.k, s.block_log2);
  const auto decode = [&](Route route) {
    Plan p = decode_plan(route, s, d.sms);
    return complete(d, s, &p) ? p : large_plan();
  };
  if (s.m <= (aligned ? row.simt : row.unaligned) && take(Route::decode_simt)) {
    const Plan p = decode(Route::decode_simt);
    if (p.route != Route::large)
      return {p, off + (aligned ? "few rows: bound by reading the weight, fp32 multiplies fit the "
                                  "issue slots of " +
                                      sm + " up to " + text(row.simt) + " rows"
                                : "k is no multiple of 64 or blocks are below 64: one thread a "
                                  "weight, up to " +
                                      text(row.unaligned) + " rows")};
  }
  if (s.dtype == DType::f32) return large("fp32: torch's matmul");
  if (aligned && s.m <= row.mma && take(Route::decode_mma)) {
    const Plan p = decode(Route::decode_mma);
    if (p.route != Route::large)
      return {p, off + "up to " + text(row.mma) +
                     " rows: bound by reading the weight, which is "
                     "the matrix instruction's A so that 8 rows of x cost what one does"};
  }
  if (s.m <= row.gemm && take(Route::gemm)) {
    const Plan p = gemm_plan(d, s);
    if (p.route != Route::large)
      return {p, off + "up to " + text(row.gemm) + " rows on " + sm +
                     ": a weight is decoded once for " + text(p.tile_m) +
                     " rows, and is never written out"};
    off += "no gemm tile fits; ";
  }
  return large(row.gemm == 0 ? sm + " has no mma.sync for it"
                             : "more than " + text(row.gemm) + " rows on " + sm +
                                   ": dequantization is repaid by torch's matmul");
}

}  // namespace qlk::cuda
