// Dequantization: a packed weight to fp32, bf16 or f16, nested constants decoded on the way, in one
// kernel. Bit-identical to reference.dequantize: round(float32(codebook[q] * scale)), rounded once.
//
//   a warp's tile: 1024 values = 512 packed bytes
//
//   DRAM   512 B in 16-byte loads, a lane 32 consecutive values
//            |  the warp's 512 bytes of shared memory turn that around:
//            v
//   lane     step j takes the values that its 16-byte store will hold: 8 (4 of fp32), the warp's
//            stores being 512 consecutive bytes
//   scales   one load a step, `ScaleReader`: at a blocksize of 64, 8 lanes read the same one
//   decode   codebook[q] from 16 floats of shared memory. 16 banks, one value each: lanes never
//            conflict, whatever the codes
//
// It moves 20.1 bytes for 8 values (bf16, nested, blocks of 64), four fifths of it the result, so a
// simple decoder is quick enough: benchmarks count its SASS against the issue slots at full
// bandwidth.
//
// What is not aligned to 16 bytes (a view with an odd storage offset, a row of odd length to start
// from) goes value by value through `dequantize_unaligned`; a tail through the same code in the
// tile.
#include "element.h"
#include "launchers.h"
#include "scales.h"

namespace qlk::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kTileBytes = 32 * 16;          // packed, a warp
constexpr int kTileValues = 2 * kTileBytes;  // 1024
constexpr int kTiles = 2;                    // a warp's, both loads in flight
constexpr int kBlockValues = kWarps * kTiles * kTileValues;

struct Range {
  int64_t begin, count;  // values of the weight's run
};

__device__ __forceinline__ uint4 load_packed(const uint8_t* from, int64_t bytes) {
  if (bytes >= 16) return __ldg(reinterpret_cast<const uint4*>(from));
  uint32_t words[4] = {};
  for (int i = 0; i < bytes; ++i) words[i / 4] |= static_cast<uint32_t>(from[i]) << (8 * (i % 4));
  return {words[0], words[1], words[2], words[3]};
}

// `out`, w.packed and range.begin / 2 are multiples of 16 bytes.
template <class T, ScaleKind kind>
__global__ void __launch_bounds__(kThreads) dequantize(const Weight w, const Range range, T* out) {
  constexpr int kStep = Vec16<T>::kCount;  // values a lane decodes at a time
  constexpr int kSteps = kTileValues / (32 * kStep);
  __shared__ float codebook[kCodebookSize];
  __shared__ float nested_code[kind == ScaleKind::nested ? kNestedCodeSize : 1];
  __shared__ __align__(16) uint8_t staged[kWarps][kTiles][kTileBytes];

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kWarps + warp) * (kTiles * kTileValues);
  const int64_t bytes = (range.count + 1) / 2;
  const uint8_t* packed = w.packed + range.begin / 2;
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    const int64_t at = (first + t * kTileValues) / 2 + lane * 16;
    reinterpret_cast<uint4*>(staged[warp][t])[lane] =
        at < bytes ? load_packed(packed + at, bytes - at) : uint4{};
  }
  const ScaleReader<kind> scale_of = scale_reader<kind>(w, nested_code);
  if (threadIdx.x < kCodebookSize) codebook[threadIdx.x] = w.codebook[threadIdx.x];
  __syncthreads();

#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    const int64_t tile = first + t * kTileValues;
    const int64_t left = range.count - tile;  // values, from the tile's first
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      const int value = (j * 32 + lane) * kStep;
      if (value >= left) break;
      const float scale = scale_of((range.begin + tile + value) >> w.block_log2);
      uint32_t codes;
      if constexpr (kStep == 8) {
        codes = reinterpret_cast<const uint32_t*>(staged[warp][t])[value / 8];
      } else {
        codes = reinterpret_cast<const uint16_t*>(staged[warp][t])[value / 4];
      }
      Vec16<T> result;
#pragma unroll
      for (int i = 0; i < kStep; ++i) {  // byte i / 2, the earlier value in the high nibble
        const int shift = 8 * (i / 2) + (i % 2 ? 0 : 4);
        result.at[i] = from_float<T>(__fmul_rn(codebook[(codes >> shift) & 15], scale));
      }
      if (value + kStep <= left) {
        reinterpret_cast<Vec16<T>*>(out + tile)[value / kStep] = result;
      } else {
#pragma unroll
        for (int i = 0; i < kStep; ++i)
          if (value + i < left) out[tile + value + i] = result.at[i];
      }
    }
  }
}

template <class T, ScaleKind kind>
__global__ void __launch_bounds__(kThreads)
    dequantize_unaligned(const Weight w, const Range range, T* out) {
  __shared__ float codebook[kCodebookSize];
  __shared__ float nested_code[kind == ScaleKind::nested ? kNestedCodeSize : 1];
  const ScaleReader<kind> scale_of = scale_reader<kind>(w, nested_code);
  if (threadIdx.x < kCodebookSize) codebook[threadIdx.x] = w.codebook[threadIdx.x];
  __syncthreads();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kBlockValues;
  for (int i = threadIdx.x; i < kBlockValues && first + i < range.count; i += kThreads) {
    const int64_t value = range.begin + first + i;
    const uint8_t byte = w.packed[value / 2];
    const int code = value % 2 ? later_code(byte) : earlier_code(byte);
    out[first + i] = from_float<T>(__fmul_rn(codebook[code], scale_of(value >> w.block_log2)));
  }
}

template <class T>
cudaError_t launch(const Weight& w, Range range, void* out, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((range.count + kBlockValues - 1) / kBlockValues);
  const bool aligned = range.begin % 32 == 0 &&
                       is_aligned_16(reinterpret_cast<uint64_t>(w.packed)) &&
                       is_aligned_16(reinterpret_cast<uint64_t>(out));
  return with_scale_kind(w.kind, [&]<ScaleKind kind>() {
    const auto kernel = aligned ? dequantize<T, kind> : dequantize_unaligned<T, kind>;
    kernel<<<blocks, kThreads, 0, stream>>>(w, range, static_cast<T*>(out));
    return cudaGetLastError();
  });
}

}  // namespace

cudaError_t launch_dequantize(const Weight& w, int64_t begin, int64_t count, void* out, DType dtype,
                              cudaStream_t stream) {
  const Range range{begin, count};
  return with_element(dtype, [&]<class T>() { return launch<T>(w, range, out, stream); });
}

}  // namespace qlk::cuda
