// Which CUDA kernel a linear layer gets: a pure function of device and shape. Plain C++, no CUDA
// header, so that the host module can say anywhere what would run where (`qlora kernels`).
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "../block_format.h"
#include "../dtype.h"

namespace qlk::cuda {

enum class Pass : int { forward, input_grad };

// The kernels of a linear layer, cheapest launch first. `large` is no kernel of its own: the weight
// is dequantized into a workspace and torch multiplies.
enum class Route : int { decode_simt, decode_mma, gemm, large };
constexpr int kRoutes = 4;

// What a choice depends on. `rank` is 0 without LoRA; `s_given` says that S = dropout(x) A^T came
// from outside (forward only).
struct Shape {
  Pass pass;
  int64_t m, n, k;  // rows, out features, in features
  int64_t rank;
  bool s_given;
  DType dtype;  // bf16 or f16: elements of the tensor cores
  int block_log2;
  ScaleKind scales;
};

// cudaDeviceProp, as far as a choice depends on it.
struct DeviceLimits {
  int major, minor;  // compute capability
  int sms;
  int shared_optin;    // bytes of shared memory a block may ask for
  int shared_per_sm;   // bytes
  int threads_per_sm;  // resident
  int64_t l2_bytes;

  int capability() const { return 10 * major + minor; }
};

// How a matmul runs. A launcher takes the fields that its kernel has and refuses (with
// cudaErrorInvalidConfiguration) a combination that was not compiled.
struct Plan {
  Route route;
  int tile_m, tile_n, tile_k;  // of one CTA's step; decode: tile_n output features, tile_k weights
  int warps;                   // a CTA
  int stages;                  // cp.async buffers; 1: none
  int splits;                  // parts that the contraction is cut into
  int shared_bytes;            // dynamic, a CTA
  int64_t workspace_bytes;     // device memory: partial sums, S, counters; contents do not matter
};

// Each kernel family lists in a plain header of its own what it compiled and what that costs
// (decode_tiles.h, gemm_tiles.h); dispatch.cpp picks among them:
//
//   bool  <family>_compiled(const Plan&, const Shape&)    whether a launcher would take this plan
//   int   <family>_shared_bytes(const Plan&, const Shape&)
//   int64_t <family>_workspace_bytes(const Plan&, const Shape&)
//   constexpr int <family>_registers                      at most, a thread; a test holds it

// Routes that are switched off, a bit each (1 << Route): by QLORA_KERNELS_DISABLE, by the check at
// first use, or because they were not built.
using RouteMask = unsigned;
constexpr RouteMask bit(Route route) { return 1u << static_cast<int>(route); }

struct Choice {
  Plan plan;
  std::string why;  // one line
};

// What is compiled into this version; the rest is as if it were disabled.
constexpr RouteMask kBuilt =
    bit(Route::decode_simt) | bit(Route::decode_mma) | bit(Route::gemm) | bit(Route::large);

Choice choose(const DeviceLimits& device, const Shape& shape, RouteMask disabled = 0);

// Every plan that was compiled and fits, `large` last: what `qlora tune` tries.
std::vector<Plan> candidates(const DeviceLimits& device, const Shape& shape);

// Fills in shared_bytes and workspace_bytes of a plan of whose tile the rest is set; false where no
// kernel was compiled for it or the device cannot hold it.
bool complete(const DeviceLimits& device, const Shape& shape, Plan* plan);

const char* route_name(Route route);

}  // namespace qlk::cuda
