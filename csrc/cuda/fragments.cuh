// What a warp's matrix instruction takes and gives, typed: mma.sync.m16n8k16, fp32 accumulators.
//
// With lane (g, t) = (lane / 4, lane % 4), and pairs in one register, the lower index in its low
// half:
//
//   FragA  16 x 16  a[0] = (g, 2t..)   a[1] = (g + 8, 2t..)   a[2] = (g, 2t + 8..)   a[3] = (g + 8,
//   2t + 8..) FragB  16 x 8   b[0] = (2t.., g)   b[1] = (2t + 8.., g) FragC  16 x 8   c[0], c[1] =
//   (g, 2t..)   c[2], c[3] = (g + 8, 2t..)
//
// The contraction's index is a name only: any permutation of it is as good, if A and B agree. The
// forward GEMM lets lane t hold 4 neighbouring values where the table says 2t, 2t + 1, 2t + 8 and
// 2t + 9, and so reads 16 bytes where ldmatrix would gather them.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace qlk::cuda {

struct FragA {
  uint32_t a[4];
};
struct FragB {
  uint32_t b[2];
};
struct FragC {
  float c[4];
};

// c += a b. Products are exact; how the sums of 16 round is the hardware's (at least as well as
// fp32 truncated: docs of the PTX ISA leave the order open), so bounds take one rounding for each
// product.
template <class T>
__device__ __forceinline__ void multiply_add(FragC& c, const FragA& a, const FragB& b);

#define QLK_MMA(kind)                                                                   \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." kind "." kind                   \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n" \
               : "+f"(c.c[0]), "+f"(c.c[1]), "+f"(c.c[2]), "+f"(c.c[3])                 \
               : "r"(a.a[0]), "r"(a.a[1]), "r"(a.a[2]), "r"(a.a[3]), "r"(b.b[0]), "r"(b.b[1]))

template <>
__device__ __forceinline__ void multiply_add<__nv_bfloat16>(FragC& c, const FragA& a,
                                                            const FragB& b) {
  QLK_MMA("bf16");
}
template <>
__device__ __forceinline__ void multiply_add<__half>(FragC& c, const FragA& a, const FragB& b) {
  QLK_MMA("f16");
}
#undef QLK_MMA

}  // namespace qlk::cuda
