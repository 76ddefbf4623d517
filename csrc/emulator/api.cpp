// The C interface, loaded by qlora_kernels/emulator/engine.py through ctypes.
#include <cstdlib>
#include <cstring>

#include "variants.h"

#define EMU_API extern "C" __attribute__((visibility("default")))

namespace {

// 0 portable, 1 AVX2, 2 AVX-512: the widest that the machine has, or what EMULATOR_ISA names.
int choose() {
  int best = 0;
#if defined(EMU_HAVE_AVX2)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2"))
    best = 1;
#endif
#if defined(EMU_HAVE_AVX512)
  if (best == 1 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    best = 2;
#endif
  const char* names[] = {"portable", "avx2", "avx512"};
  if (const char* asked = std::getenv("EMULATOR_ISA"))
    for (int k = 0; k <= best; k++)
      if (!std::strcmp(asked, names[k])) return k;
  return best;
}

int isa() {
  static const int k = choose();
  return k;
}

}  // namespace

EMU_API int emu_abi() { return 1; }
EMU_API const char* emu_isa() { return isa() == 2 ? "avx512" : isa() == 1 ? "avx2" : "portable"; }
EMU_API int emu_op_count() { return emu::portable::op_count(); }
EMU_API const char* emu_op_name(int k) { return emu::portable::op_name(k); }
EMU_API int emu_sizes(int k) {
  const int sizes[] = {sizeof(emu::Inst),  sizeof(emu::Block),  sizeof(emu::Region),
                       sizeof(emu::Count), sizeof(emu::Report), sizeof(emu::Program),
                       sizeof(emu::Launch)};
  return k >= 0 && k < 7 ? sizes[k] : -1;
}
// Runs a launch to its end; 0, or 1 if it was stopped (the reports say why).
EMU_API int emu_launch(const emu::Program* p, emu::Launch* l) {
#if defined(EMU_HAVE_AVX512)
  if (isa() == 2) return emu::avx512::launch(*p, *l);
#endif
#if defined(EMU_HAVE_AVX2)
  if (isa() == 1) return emu::avx2::launch(*p, *l);
#endif
  return emu::portable::launch(*p, *l);
}
