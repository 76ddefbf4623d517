// The table of one instruction set; see kernels.h.
#include "functions.h"

namespace qlk {
namespace QLK_ISA {

#define QLK_STRING_(s) #s
#define QLK_STRING(s) QLK_STRING_(s)

extern const Kernels kernels;
const Kernels kernels = {
    QLK_STRING(QLK_ISA),
    QLK_LEVEL == 3,
    quantize,
    quantize_absmax,
    dequantize,
    decode_panel,
    convert,
    finish,
    dot,
    pair_order,
    decode,
#if QLK_LEVEL == 3
    decode_bf16,
#else
    nullptr,
#endif
    tile,
#if QLK_LEVEL == 3
    tile_bf16,
#else
    nullptr,
#endif
    rms_norm,
    rms_norm_backward,
    swiglu,
    swiglu_backward,
};

}  // namespace QLK_ISA
}  // namespace qlk
