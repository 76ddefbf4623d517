// Matrix operations by name.
#include "ops_matrix.h"

namespace emu::EMU_ISA {

void matrix_ops(std::vector<Named>& t) {
  EMU_OP("mma", op_mma);
  EMU_OP("mma.f64", op_mma_f64);
  EMU_OP("wgmma", op_wgmma);
}

}  // namespace emu::EMU_ISA
