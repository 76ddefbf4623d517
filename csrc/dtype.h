// The three element types that kernels read and write.
#pragma once
#include "block_format.h"

namespace qlk {

enum class DType : int { f32, bf16, f16 };

QLK_INLINE constexpr int size_of(DType t) { return t == DType::f32 ? 4 : 2; }

}  // namespace qlk
