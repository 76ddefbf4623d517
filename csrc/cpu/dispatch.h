// Which instruction set runs, and which kernel a shape gets.
#pragma once
#include <string>
#include <vector>

#include "kernels.h"

namespace qlk {

// The best set that this machine has, or the one that QLORA_KERNELS_ISA names. Throws
// std::runtime_error when it names one that is unknown or that the machine lacks.
const Kernels& kernels();
// Names that `kernels` can give here, lowest first.
std::vector<std::string> available_isas();
// Chooses again, by name; an empty name: the environment variable or the best.
void choose_isa(const std::string& name);

// How a linear layer runs on m rows of x.
enum class Route {
  decode,  // 1 ... 4 rows, groups of 64 aligned with rows and within blocks
  tile,    // few rows: own tile kernel
  panel,   // many rows: panels decoded into cache, torch's matmul
};
// A pure function of its arguments. `bf16`: sums are of bf16 pairs in hardware.
Route linear_route(int64_t m, int64_t n, int64_t k, int block_log2, bool bf16);
const char* route_name(Route route);

constexpr int64_t kMaxDecodeRows = 4;
constexpr int64_t kMaxTileRows = 64;  // what the tile kernel has accumulators for

}  // namespace qlk
