// How both GEMMs read a packed weight: a tile of it in shared memory, a lane's run of one row, its
// scale, and the 16 values that codes stand for there.
//
// A lane (g, t) of a warp takes run t of a row: kRun = tile_k / 4 neighbouring weights, which lie
// in one block and so share a scale. It rounds the 16 products codebook * scale once (32
// instructions), splits them into byte planes, and decodes 8 weights by 14 byte permutes
// (codebook.cuh). With kRun = 64 the table is 4 of some 25 instructions for 8 weights.
//
// Values are round_to_dtype(codebook[q] * scale): variant (a), the bits that dequantize gives.
#pragma once
#include "codebook.cuh"
#include "copy.cuh"
#include "element.h"
#include "fragments.cuh"
#include "launchers.h"
#include "scales.h"

namespace qlk::cuda {

constexpr int kWarp = 32;

__host__ __device__ constexpr int log2_of(int x) { return x <= 1 ? 0 : 1 + log2_of(x / 2); }

// The nested code stays in L1: 1 KB, read once for 64 weights. In shared memory it would cost the
// tall tiles their second CTA, and its random banks would be the only conflicts in the kernel.
template <ScaleKind kind>
__device__ __forceinline__ ScaleReader<kind> cached_scales(const Weight& w) {
  return {w.absmax, w.nested_absmax, w.nested_code, kind == ScaleKind::nested ? *w.offset : 0.0f};
}

// A scale's bytes are asked for at the beginning of the step before its own; in that step's middle
// a nested one's code, which takes the byte's place; and its value when the step begins.
template <ScaleKind kind>
__device__ __forceinline__ void look_up(PendingScale<kind>& scale, const ScaleReader<kind>& r) {
  if constexpr (kind == ScaleKind::nested) scale.byte = __float_as_uint(__ldg(r.code + scale.byte));
}
template <ScaleKind kind>
__device__ __forceinline__ float looked_up(const PendingScale<kind>& scale,
                                           const ScaleReader<kind>& r) {
  if constexpr (kind == ScaleKind::fp32) return scale.absmax;
  if constexpr (kind == ScaleKind::nested)
    return __fadd_rn(__fmul_rn(__uint_as_float(scale.byte), scale.group), r.scalar);
}

// A run outside of the weight has no bytes, which stand for 0 or the offset: what it decodes to is
// finite, and meets zeros of x, or is not stored.
template <ScaleKind kind>
__device__ __forceinline__ PendingScale<kind> load_scale_early(const ScaleReader<kind>& r,
                                                               uint32_t block, bool inside) {
  if (!inside) return {};
  PendingScale<kind> scale;
  scale.load(r, block);
  return scale;
}

// A tile of packed weights in shared memory: kRows rows of kColumns / 2 bytes.
template <int kRows, int kColumns>
struct PackedTile {
  static constexpr int kRun = kColumns / 4;
  static constexpr int kBytes = kRows * kColumns / 2;
  static constexpr int kChunks = kColumns / 2 / kChunkBytes;  // a row
  static constexpr int kReads = kRun == 16 ? 1 : kRun / 32;   // of a lane's run
  static constexpr int kWords = kRun == 16 ? 2 : 4;           // of 8 weights, a read

  // Where in a tile (aligned to 128 bytes) a lane finds its run of row `row`; read i of it is at
  // that address ^ (i * 16): the swizzle keeps a run's reads together.
  static __device__ __forceinline__ uint32_t address(uint32_t tile, int row, int run) {
    if constexpr (kRun == 16) {
      return tile + tile_chunk<kChunks>(row, run / 2) * kChunkBytes + run % 2 * 8;
    } else {
      return tile + tile_chunk<kChunks>(row, run * kReads) * kChunkBytes;
    }
  }
  static __device__ __forceinline__ void read(uint32_t (&words)[kWords], uint32_t address, int i) {
    if constexpr (kRun == 16) {
      const uint2 v = load_shared_8(address);
      words[0] = v.x, words[1] = v.y;
    } else {
      const uint4 v = load_shared(address ^ (i * kChunkBytes));
      words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
    }
  }
};

// Eight weights of one row, one by one: any k, any alignment, blocks that begin anywhere.
template <class T, ScaleKind kind>
__device__ __forceinline__ void gather_weights(uint32_t (&out)[4], const Weight& w,
                                               const ScaleReader<kind>& scales,
                                               const float* codebook, int64_t row, int64_t column) {
#pragma unroll
  for (int pair = 0; pair < 4; ++pair) {
    float v[2] = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t c = column + 2 * pair + i;
      if (row < w.n && c < w.k) {
        const int64_t at = row * w.k + c;
        const uint8_t byte = w.packed[at / 2];
        v[i] = __fmul_rn(codebook[at % 2 ? later_code(byte) : earlier_code(byte)],
                         scales(at >> w.block_log2));
      }
    }
    out[pair] = round_pair<T>(v[0], v[1]);
  }
}

// Eight elements, from `column` of a row of a row-major matrix of any dtype, as four registers of
// T; zero outside. `whole`: rows start at multiples of 16 bytes.
template <class T>
__device__ __forceinline__ void eight_elements(uint32_t (&out)[4], const Matrix& a, int64_t row,
                                               int64_t column, int64_t rows, int64_t columns,
                                               bool whole) {
  float v[8] = {};
  if (row < rows && column < columns) {
    const int64_t at = row * columns + column;
    if (whole) {
      if (a.dtype == DType::f32) {
        const float4* from =
            reinterpret_cast<const float4*>(static_cast<const float*>(a.data) + at);
        const float4 x = __ldg(from), y = __ldg(from + 1);
        v[0] = x.x, v[1] = x.y, v[2] = x.z, v[3] = x.w;
        v[4] = y.x, v[5] = y.y, v[6] = y.z, v[7] = y.w;
      } else {
        const uint4 x =
            __ldg(reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(a.data) + at));
        const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const uint16_t bits = static_cast<uint16_t>(words[i / 2] >> (16 * (i % 2)));
          v[i] = a.dtype == DType::bf16 ? to_float(__ushort_as_bfloat16(bits))
                                        : to_float(__ushort_as_half(bits));
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (column + i < columns) v[i] = load_element(a, at + i);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) out[i] = round_pair<T>(v[2 * i], v[2 * i + 1]);
}

// Whether a row-major matrix's rows of `columns` start at multiples of 16 bytes.
inline bool rows_aligned(const void* data, int64_t columns) {
  return is_aligned_16(reinterpret_cast<uint64_t>(data)) && columns % 8 == 0;
}

}  // namespace qlk::cuda
