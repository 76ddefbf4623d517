// The three element types that kernels read and write.
#pragma once

namespace qlk {

enum class DType : int { f32, bf16, f16 };

constexpr int size_of(DType t) { return t == DType::f32 ? 4 : 2; }

}  // namespace qlk
