// The functions of one instruction set, which table.cpp collects; kernels.h says what each does.
#pragma once
#include "kernels.h"
#include "simd.h"

namespace qlk {
namespace QLK_ISA {

void quantize(const void*, DType, int64_t, const float*, const uint8_t*, int, int64_t, int64_t,
              uint8_t*, float*);
void quantize_absmax(const float*, int64_t, float, const float*, int64_t, int64_t, uint8_t*,
                     float*);
void dequantize(const Weight&, int64_t, int64_t, DType, void*, bool);
void decode_panel(const Weight&, int64_t, int64_t, int64_t, int64_t, int64_t, DType, void*, DType,
                  int64_t);
void convert(const void*, DType, int64_t, DType, void*, DType, int64_t, int64_t, int64_t, bool,
             float);
void finish(const void*, DType, int64_t, const void*, DType, DType, void*, DType, int64_t, int64_t,
            int64_t);
float dot(const void*, DType, DType, const float*, int64_t);
void pair_order(const void*, DType, DType, int64_t, int64_t, void*, bool);
void decode(const LinearArgs&, int64_t, int64_t);
void tile(const LinearArgs&, int64_t, int64_t);
void rms_norm(const void*, const void*, DType, float, int64_t, int64_t, int64_t, void*, float*);
void rms_norm_backward(const void*, const void*, const void*, DType, const float*, int64_t, int64_t,
                       int64_t, void*);
void swiglu(const void*, const void*, DType, int64_t, int64_t, void*);
void swiglu_backward(const void*, const void*, const void*, DType, int64_t, int64_t, void*, void*);
#if QLK_LEVEL == 3
void decode_bf16(const LinearArgs&, int64_t, int64_t);
void tile_bf16(const LinearArgs&, int64_t, int64_t);
#endif

}  // namespace QLK_ISA
}  // namespace qlk
