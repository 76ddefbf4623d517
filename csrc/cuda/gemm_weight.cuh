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

// A scale on its way: loaded a step before it is used, so that nothing waits for DRAM.
template <ScaleKind kind>
struct PendingScale;

template <>
struct PendingScale<ScaleKind::fp32> {
  float value;
  __device__ __forceinline__ float get(const ScaleReader<ScaleKind::fp32>&) const { return value; }
};
template <>
struct PendingScale<ScaleKind::nested> {
  uint32_t byte;
  float group;
  __device__ __forceinline__ float get(const ScaleReader<ScaleKind::nested>& r) const {
    return __fadd_rn(__fmul_rn(__ldg(r.code + byte), group), r.scalar);
  }
};

// A run outside of the weight has the scale `outside`, which get() turns into 0 or the offset: what
// it decodes to is finite, and meets zeros of x, or is not stored.
template <ScaleKind kind>
__device__ __forceinline__ PendingScale<kind> load_scale_early(const ScaleReader<kind>& r,
                                                               uint32_t block, bool inside) {
  if constexpr (kind == ScaleKind::fp32) {
    return {inside ? __ldg(static_cast<const float*>(r.absmax) + block) : 0.0f};
  } else {
    if (!inside) return {0u, 0.0f};
    return {__ldg(static_cast<const uint8_t*>(r.absmax) + block),
            __ldg(r.nested_absmax + (block >> kNestedBlockLog2))};
  }
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

// Four bytes of the eight in `a` and `b`, by four selectors: bits 0 ... 2 of a nibble; bit 3 fills
// the byte with its top bit. (__byte_perm clears bit 3 first, an instruction for each.)
__device__ __forceinline__ uint32_t pick_bytes(uint32_t a, uint32_t b, uint32_t selectors) {
  uint32_t bytes;
  asm("prmt.b32 %0, %1, %2, %3;\n" : "=r"(bytes) : "r"(a), "r"(b), "r"(selectors));
  return bytes;
}

// RegisterTable::decode in 20 instructions of the ALU and a shift: a mask from the codes' top bits,
// instead of selectors, tells which half of the table a byte comes from.
template <class T>
__device__ __forceinline__ void decode(uint32_t (&pairs)[4], const RegisterTable<T>& table,
                                       uint32_t word) {
  const uint32_t low_bits = word & 0x77777777u, shifted = word << 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {  // PRMT reads 16 bits of selectors
    const uint32_t bits = half == 0 ? low_bits : low_bits >> 16;
    const uint32_t top = pick_bytes(word, shifted, half == 0 ? 0x9d8c : 0xbfae);
    const uint32_t low = (pick_bytes(table.low[2], table.low[3], bits) & top) |
                         (pick_bytes(table.low[0], table.low[1], bits) & ~top);
    const uint32_t high = (pick_bytes(table.high[2], table.high[3], bits) & top) |
                          (pick_bytes(table.high[0], table.high[1], bits) & ~top);
    pairs[2 * half] = pick_bytes(low, high, 0x4051);  // a byte's high nibble is the earlier value
    pairs[2 * half + 1] = pick_bytes(low, high, 0x6273);
  }
}

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

// Elements `column` ... of a row-major matrix of any dtype, as floats, zero outside.
__device__ __forceinline__ float element(const Matrix& a, int64_t at) {
  switch (a.dtype) {
    case DType::f32:
      return static_cast<const float*>(a.data)[at];
    case DType::bf16:
      return to_float(static_cast<const __nv_bfloat16*>(a.data)[at]);
    default:
      return to_float(static_cast<const __half*>(a.data)[at]);
  }
}

// Eight of them as four registers of T. `whole`: rows start at multiples of 16 bytes.
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
        if (column + i < columns) v[i] = element(a, at + i);
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
