// One namespace for each instruction set that the engine is compiled for.
#pragma once

#include "engine.h"

namespace emu {
#define EMU_VARIANT(isa)                   \
  namespace isa {                          \
  int launch(const Program& p, Launch& l); \
  int op_count();                          \
  const char* op_name(int k);              \
  }
EMU_VARIANT(portable)
EMU_VARIANT(avx2)
EMU_VARIANT(avx512)
#undef EMU_VARIANT
}  // namespace emu
