#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>

namespace qlk {

namespace portable {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512_bf16 {
extern const Kernels kernels;
}

namespace {

std::vector<const Kernels*> available() {
  std::vector<const Kernels*> sets = {&portable::kernels};
#if defined(__x86_64__) || defined(__i386__)
  __builtin_cpu_init();
#ifdef QLK_HAVE_AVX2
  const bool avx2_here = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                         __builtin_cpu_supports("f16c");
  if (avx2_here) sets.push_back(&avx2::kernels);
#endif
#ifdef QLK_EMULATE_AVX512  // the AVX-512 files in software, on any machine with AVX2
  const bool avx512_here = true, bf16_here = true;
#else
  const bool avx512_here = __builtin_cpu_supports("avx512f") &&
                           __builtin_cpu_supports("avx512bw") &&
                           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool bf16_here = avx512_here && __builtin_cpu_supports("avx512bf16");
#endif
#ifdef QLK_HAVE_AVX512
  if (avx512_here) sets.push_back(&avx512::kernels);
#endif
#ifdef QLK_HAVE_AVX512_BF16
  if (bf16_here) sets.push_back(&avx512_bf16::kernels);
#endif
  (void)avx512_here;
  (void)bf16_here;
#endif
  return sets;
}

const Kernels* find(const std::string& name) {
  const std::vector<const Kernels*> sets = available();
  if (name.empty()) return sets.back();
  std::string known;
  for (const Kernels* set : sets) {
    if (name == set->name) return set;
    known += (known.empty() ? "" : ", ") + std::string(set->name);
  }
  throw std::runtime_error("QLORA_KERNELS_ISA is '" + name +
                           "'; this machine and build have: " + known);
}

const Kernels*& current() {
  static const Kernels* chosen = [] {
    const char* name = std::getenv("QLORA_KERNELS_ISA");
    return find(name != nullptr ? name : "");
  }();
  return chosen;
}

}  // namespace

const Kernels& kernels() { return *current(); }

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Kernels* set : available()) names.push_back(set->name);
  return names;
}

void choose_isa(const std::string& name) {
  std::string wanted = name;
  if (wanted.empty() && std::getenv("QLORA_KERNELS_ISA") != nullptr)
    wanted = std::getenv("QLORA_KERNELS_ISA");
  current() = find(wanted);
}

Route linear_route(int64_t m, int64_t n, int64_t k, int block_log2, bool bf16) {
  (void)n;
  // Decoding needs groups of 64 codes that share a scale and start on a byte.
  if (m <= kMaxDecodeRows && k % 64 == 0 && block_log2 >= 6) return Route::decode;
  // Measured: beyond this torch's blocked matmul makes up for writing the panels (benchmarks/).
  (void)bf16;
  return m <= kMaxTileRows ? Route::tile : Route::panel;
}

const char* route_name(Route route) {
  switch (route) {
    case Route::decode:
      return "decode";
    case Route::tile:
      return "tile";
    default:
      return "panel";
  }
}

}  // namespace qlk
