#include "dispatch.h"

#include <iterator>
#include <limits>

#include "decode_tiles.h"
#include "gemm_tiles.h"

namespace qlk::cuda {
namespace {

// --- the table -----------------------------------------------------------------------------------

// By compute capability (the nearest one that is not above). Rows of x up to which a kernel is
// taken, forward and dx; between them the next one. From the ranking of benchmarks/cuda_dispatch.py
// (benchmarks/results/cuda_dispatch.json, best_us_by_route):
//
//   simt        fp32 multiplies cost 8 m instructions for 8 weights. On HBM parts that exceeds the
//               issue slots at full bandwidth (36 on H100, 39 on A100) from two rows on, and at one
//               shared memory is busier than with tensor cores: they have none of it. GDDR parts
//               have 169 slots and take three. (simt_alone: fp32 x, or decode_mma
//               switched off.)
//   mma         until the GEMM, whose x is read once for 128 rows of W and not for 64, has repaid a
//               second launch and barriers in its steps.
//   gemm        until dequantization, whose cost does not grow with m, is repaid by torch's matmul
//               (at 0.8 of the tensor cores' data sheet). Never on an A100 forward, where mma.sync
//               has the sheet's rate; early for its dx, which shared memory and barriers hold to
//               0.75 of it, and where wgmma (90: 1.6 x) or tcgen05 (100: about 4 x) is out of
//               reach. 86 is set by its professional parts, with 6 MB of L2 for x and twice a
//               GeForce's tensor cores; 89 and 120 end forward where x is beyond L2.
//   unaligned   rows up to which one thread a weight is still cheaper than writing the weight out
constexpr int kAll = std::numeric_limits<int>::max();
struct Row {
  int capability;
  int simt, simt_alone;
  int mma[2], gemm[2];  // by Pass
  int unaligned;
};
constexpr Row kTable[] = {
    // clang-format off
    //   simt alone      mma           gemm  unaligned
    { 75,   3,   3, { 0,  0}, {   0,    0}, 4},
    { 80,   0,   1, {32, 16}, {kAll,  256}, 4},
    { 86,   3,   3, {16, 16}, { 384,  512}, 4},
    { 89,   3,   3, {16, 16}, {2048, kAll}, 4},
    { 90,   0,   1, {32, 16}, { 192,  128}, 4},
    {100,   0,   1, {32, 16}, {  64,   64}, 4},
    {120,   3,   3, {16, 16}, {2048, kAll}, 4},
    // clang-format on
};

const Row& row_of(int capability) {
  const Row* found = &kTable[0];
  for (const Row& row : kTable)
    if (row.capability <= capability) found = &row;
  return *found;
}

// --- GEMM tiles ----------------------------------------------------------------------------------

// A step of a CTA in cycles of its multiprocessor: shared with others of its kind, and alone there,
// when nothing hides what its warps wait for. By the emulator's counts and model
// (`benchmarks/cuda_dispatch.py --tiles` of a100, h100 and rtx4090), in the lists' order; forward
// on 80 and 90, the tiles of 64 and 96 rows by what they take at 64 to 256 rows in the ranking,
// where short splits never reach their pace. A GeForce part's tensor cores have a quarter of an
// A100's rate a multiprocessor, so that short tiles are as quick there; they are priced a quarter
// higher, for they read x more often from L2, and the professional parts' cores wait for them.
struct StepCycles {
  int shared, alone;
};
struct Prices {
  StepCycles linear[std::size(kLinearTiles)], input_grad[std::size(kInputGradTiles)];
};
constexpr StepCycles kOneByOne = {9000, 9000};
// clang-format off
constexpr Prices kPrices80 = {
    {{1640, 1990}, {1710, 2170}, {920, 1310}, {1750, 2710}, {2000, 2900}, {1170, 1770}, kOneByOne},
    {{490, 750}, {540, 930}, {1010, 1750}, {2680, 2680}, {850, 1400}, {525, 1080}, {400, 800},
     kOneByOne}};
constexpr Prices kPrices86 = {  // and 89, 120
    {{2900, 3700}, {5000, 5600}, {1500, 2300}, {4300, 4820}, {6300, 6910}, {2300, 2710}, kOneByOne},
    {{1210, 1210}, {1810, 1810}, {2650, 2650}, {5500, 5500}, {2100, 2470}, {1120, 1480}, {700, 1000},
     kOneByOne}};
constexpr Prices kPrices90 = {  // and 100
    {{1640, 1990}, {1710, 2170}, {920, 1310}, {1750, 2710}, {2000, 2900}, {1170, 1770}, kOneByOne},
    {{490, 840}, {540, 950}, {990, 1710}, {3090, 3090}, {840, 1400}, {570, 1240}, {430, 900},
     kOneByOne}};
// clang-format on

const Prices& prices_of(int capability) {
  switch (capability / 10) {
    case 8:
      return capability == 80 ? kPrices80 : kPrices86;
    case 12:
      return kPrices86;
    default:
      return kPrices90;
  }
}

constexpr int kMaxSplits = 32;
constexpr int kMinSteps = 2;       // of a split
constexpr int kRampCycles = 1000;  // a CTA's start and end
constexpr int kSumCycles = 2200;   // a second launch, sum_splits
constexpr int kBytesACycle = 45;   // between a multiprocessor and L2

int64_t steps_of(const GemmTile& t, const Shape& s) {
  return s.pass == Pass::forward ? ceil_div(s.k, t.k) : ceil_div(s.n, t.n);
}
int64_t tiles_of(const GemmTile& t, const Shape& s) {
  return ceil_div(s.m, t.m) * (s.pass == Pass::forward ? ceil_div(s.n, t.n) : ceil_div(s.k, t.k));
}

// Cycles of the multiprocessor with the most CTAs, and of adding up the splits.
double price(const DeviceLimits& d, const GemmTile& t, StepCycles cycles, int splits,
             const Shape& s) {
  const auto busiest = static_cast<double>(ceil_div(tiles_of(t, s) * splits, d.sms));
  const double steps = static_cast<double>(steps_of(t, s)) / splits;
  // Two run at a time, mostly; the last of an odd number is alone.
  const auto alone = static_cast<double>(static_cast<int64_t>(busiest) % 2);
  const double a_step = (busiest - alone) * cycles.shared + alone * cycles.alone;
  const double all = steps * a_step + busiest * kRampCycles;
  if (splits == 1) return all;
  const int64_t outs = s.m * (s.pass == Pass::forward ? s.n : s.k);
  const double moved = 2.0 * 4 * static_cast<double>(splits * outs) / d.sms;  // written and read
  return all + kSumCycles + moved / kBytesACycle;
}

bool sums_stay_in_l2(const DeviceLimits& d, int splits, const Shape& s) {
  return 4 * splits * s.m * (s.pass == Pass::forward ? s.n : s.k) <= d.l2_bytes / 2;
}

// The cheapest tile and number of splits of those that fit.
Plan gemm_plan(const DeviceLimits& d, const Shape& s) {
  const Prices& prices = prices_of(d.capability());
  Plan best{};
  best.route = Route::large;
  double least = 0;
  const auto consider = [&](const GemmTile& t, StepCycles cycles) {
    for (int splits = 1; splits <= kMaxSplits; ++splits) {
      if (splits > 1 && (steps_of(t, s) < splits * kMinSteps || !sums_stay_in_l2(d, splits, s)))
        break;
      Plan p{};
      p.route = Route::gemm;
      p.tile_m = t.m, p.tile_n = t.n, p.tile_k = t.k, p.warps = t.warps, p.stages = t.stages;
      p.splits = splits;
      if (!complete(d, s, &p)) return;
      const double cost = price(d, t, cycles, splits, s);
      if (best.route == Route::large || cost < least) best = p, least = cost;
    }
  };
  if (s.pass == Pass::forward) {
    for (size_t i = 0; i < std::size(kLinearTiles); ++i)
      consider(kLinearTiles[i], prices.linear[i]);
  } else {
    for (size_t i = 0; i < std::size(kInputGradTiles); ++i)
      consider(kInputGradTiles[i], prices.input_grad[i]);
  }
  return best;
}

Plan large_plan() {
  Plan p{};
  p.route = Route::large;
  return p;
}

std::string text(int64_t n) { return std::to_string(n); }

// A grid's y and z end at 65535: tiles of outputs, and of 64 rows of x where LoRA's S is formed.
constexpr int64_t kGridEnd = 65535, kLoraRows = 64;
bool gemm_grid_fits(const GemmTile& t, const Shape& s) {
  const int64_t across = s.pass == Pass::forward ? ceil_div(s.n, t.n) : ceil_div(s.k, t.k);
  return across <= kGridEnd && ceil_div(s.m, kLoraRows) <= kGridEnd;
}

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
      if (!gemm_grid_fits(tile_of(*p), s)) return false;
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
    for (const int splits : {1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32}) {
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
  const bool no_mma = s.dtype == DType::f32 || !on(Route::decode_mma);
  const int simt = no_mma ? row.simt_alone : row.simt;
  const int mma = row.mma[static_cast<int>(s.pass)], gemm = row.gemm[static_cast<int>(s.pass)];
  if (s.dtype == DType::f32 && s.m > simt)
    return large("tensor cores take no fp32; one thread a weight pays up to " + text(simt) +
                 " rows");

  const bool aligned = decode_aligned(s.n, s.k, s.block_log2);
  const auto decode = [&](Route route) {
    Plan p = decode_plan(route, s, d.sms);
    return complete(d, s, &p) ? p : large_plan();
  };
  if (s.m <= (aligned ? simt : row.unaligned) && take(Route::decode_simt)) {
    const Plan p = decode(Route::decode_simt);
    if (p.route != Route::large)
      return {p, off + (aligned ? "few rows: bound by reading the weight, fp32 multiplies fit the "
                                  "issue slots of " +
                                      sm + " up to " + text(simt) + " rows"
                                : "k is no multiple of 64 or blocks are below 64: one thread a "
                                  "weight, up to " +
                                      text(row.unaligned) + " rows")};
  }
  if (s.dtype == DType::f32) return large("fp32: torch's matmul");
  if (aligned && s.m <= mma && take(Route::decode_mma)) {
    const Plan p = decode(Route::decode_mma);
    if (p.route != Route::large)
      return {p, off + "up to " + text(mma) +
                     " rows: bound by reading the weight, which is "
                     "the matrix instruction's A so that 8 rows of x cost what one does"};
  }
  if (s.m <= gemm && take(Route::gemm)) {
    const Plan p = gemm_plan(d, s);
    if (p.route != Route::large)
      return {p, off + (gemm == kAll ? "any number of" : "up to " + text(gemm)) + " rows on " + sm +
                     ": a weight is decoded once for " + text(p.tile_m) +
                     " rows, and is never written out"};
    off += "no gemm tile fits; ";
  }
  if (gemm == 0) return large(sm + " has no mma.sync for it");
  if (s.m <= gemm) return large("the next best");
  return large("more than " + text(gemm) + " rows on " + sm +
               ": dequantization is repaid by torch's matmul");
}

}  // namespace qlk::cuda
