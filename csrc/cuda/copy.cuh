// Moving tiles: asynchronous copies from global to shared memory, matrices of 8x8 from shared
// memory into fragments, and the swizzle that keeps both free of bank conflicts.
//
// A tile in shared memory is rows of 16-byte chunks. Shared memory serves a 16-byte access 8 lanes
// at a time, one from each of 8 groups of 4 banks; chunk c of a row lies in group c % 8 of its line
// of 128 bytes. `tile_chunk` moves a chunk within its line, so that all three ways in which kernels
// touch a tile find their 8 chunks in 8 different groups:
//
//   along a row      8 lanes copy 8 neighbouring chunks of a row            (cp.async)
//   down a column    8 lanes read chunk c of 8 neighbouring rows            (ldmatrix)
//   lanes' runs      lane (g, t) of a warp reads chunk t * run + w of row g, run = chunks / 4: the
//                    k-permuted fragments of gemm_weight.cuh; 8 lanes are 2 rows x 4 runs
#pragma once
#include <cstdint>

namespace qlk::cuda {

// A shared-memory address as instructions take it.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

constexpr int kChunkBytes = 16;

// Where chunk `chunk` of row `row` lies, in chunks from the tile's start.
template <int kChunks>
__host__ __device__ __forceinline__ constexpr int tile_chunk(int row, int chunk) {
  static_assert(kChunks >= 2 && (kChunks & (kChunks - 1)) == 0, "rows of 32, 64, 128, ... bytes");
  if constexpr (kChunks == 2) {
    return row * 2 + chunk;  // read 8 bytes at a time, 16 lanes from 4 rows: one line
  } else if constexpr (kChunks == 4) {
    // Two rows share a line; the rows of a column of 8 are told apart by row / 2.
    return row * 4 + (chunk ^ ((row >> 1) & 3));
  } else {
    return row * kChunks + (chunk ^ (row & 7) ^ (((chunk >> 3) & 3) << 1));
  }
}

// 16 bytes to shared memory without passing registers or L1; `bytes` of them are read (16 or 0),
// the rest is zero. Lands at the latest when wait_async() says so, for the issuing thread; a
// barrier makes it everyone's.
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(from), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void commit_async() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}

// Until no more than kPending of this thread's committed groups are under way.
template <int kPending>
__device__ __forceinline__ void wait_async() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// Four 8x8 matrices of 16-bit elements. Lane l gives the address of row l % 8 of matrix l / 8; of
// each matrix, lane (g, t) = (l / 4, l % 4) gets the elements (g, 2t) and (g, 2t + 1).
__device__ __forceinline__ void load_matrices(uint32_t (&out)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address)
               : "memory");
}

// The same, transposed: lane (g, t) gets the elements (2t, g) and (2t + 1, g).
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&out)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address)
               : "memory");
}

// Copies tiles of kRows rows of kChunks chunks, one after the other along a row-major matrix, by
// all threads of a CTA. Rows past the matrix's last are copies of it, for which results are not
// stored; bytes past a row's end are zeros.
template <int kThreads, int kRows, int kChunks>
class TileCopy {
 public:
  static constexpr int kRowsAtOnce = kThreads / kChunks;

 private:
  static constexpr int kPasses = kRows < kRowsAtOnce ? 1 : kRows / kRowsAtOnce;
  static_assert(kThreads % kChunks == 0 && (kRows < kRowsAtOnce || kRows % kRowsAtOnce == 0),
                "whole passes, or a part of one");
  static constexpr int kRowBytes = kChunks * kChunkBytes;
  // The swizzle repeats every 8 rows, a warp's order of them every 32: passes have addresses of
  // their own until then.
  static constexpr int kPeriod = kRowsAtOnce >= 32 ? 1 : kRowsAtOnce == 16 ? 2 : 8 / kRowsAtOnce;
  static_assert(kRowsAtOnce >= 16 || kRowsAtOnce <= 8);

  const uint8_t* from_;  // this thread's chunk of the first row, first tile
  int tiles_;            // of this thread's chunk that lie in the row
  uint32_t to_[kPeriod];
  // Bytes from from_ to the rows that this thread copies: kept where they are few, else worked out
  // in each step.
  static constexpr bool kKept = kPasses <= 8;
  uint32_t source_[kKept ? kPasses : 1], step_, last_;

 public:
  // The matrix's rows `row0` ... and bytes `byte0` ... of each. Pass i copies row `row` + i
  // kRowsAtOnce (from row0) to the tile's row place_at(i). A tile's rows must lie within 4 GB.
  template <class PlaceAt>
  __device__ __forceinline__ TileCopy(const void* matrix, int64_t rows, int64_t row_bytes,
                                      int64_t row0, int64_t byte0, int row, PlaceAt place_at) {
    const int chunk = threadIdx.x % kChunks;
    from_ = static_cast<const uint8_t*>(matrix) + row0 * row_bytes + byte0 + chunk * kChunkBytes;
    tiles_ =
        static_cast<int>((row_bytes - byte0 - chunk * kChunkBytes + kRowBytes - 1) / kRowBytes);
    asm("" : "+l"(from_));  // one sum, made once: else its terms are added up for each copy
    const auto bytes = static_cast<uint32_t>(row_bytes);
    step_ = kRowsAtOnce * bytes;
    last_ = static_cast<uint32_t>(min(rows - row0, int64_t{kRows}) - 1) * bytes;
#pragma unroll
    for (int i = 0; i < (kKept ? kPasses : 1); ++i)
      source_[i] = kKept ? min(row * bytes + i * step_, last_) : row * bytes;
#pragma unroll
    for (int i = 0; i < kPeriod; ++i)
      to_[i] = tile_chunk<kChunks>(place_at(i), chunk) * kChunkBytes;
  }
  // Rows in the matrix's order.
  __device__ __forceinline__ TileCopy(const void* matrix, int64_t rows, int64_t row_bytes,
                                      int64_t row0, int64_t byte0)
      : TileCopy(matrix, rows, row_bytes, row0, byte0, threadIdx.x / kChunks,
                 [](int i) { return threadIdx.x / kChunks + i * kRowsAtOnce; }) {}
  // Starts on tile `index`, which goes to shared memory at `tile`.
  __device__ __forceinline__ void start(uint32_t tile, int index) const {
    if (kRows < kRowsAtOnce && threadIdx.x / kChunks >= kRows) return;
    const bool inside = index < tiles_;
    const uint8_t* from = from_ + (inside ? int64_t{index} * kRowBytes : 0);
    uint32_t source = source_[0];
    // Opaque: the compiler would keep what it adds up below, a register for each pass.
    asm volatile("" : "+l"(from), "+r"(source));
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const int block = i / kPeriod * kPeriod * kRowsAtOnce * kRowBytes;
      copy_async(tile + to_[i % kPeriod] + block,
                 from + (kKept ? source_[kKept ? i : 0] : min(source, last_)),
                 inside ? kChunkBytes : 0);
      source += step_;
    }
  }
};

// The same, tiles one below the other: rows `first` ... of the matrix, the same bytes of each.
template <int kThreads, int kRows, int kChunks>
class RowCopy {
  static constexpr int kRowsAtOnce = kThreads / kChunks;
  static constexpr int kPasses = kRows < kRowsAtOnce ? 1 : kRows / kRowsAtOnce;
  static_assert(kThreads % kChunks == 0 && (kRows < kRowsAtOnce || kRows % kRowsAtOnce == 0),
                "whole passes, or a part of one");

  const uint8_t* from_;  // this thread's chunk of row 0
  int last_;             // row
  uint32_t row_bytes_;
  int bytes_;

 public:
  __device__ __forceinline__ RowCopy(const void* matrix, int64_t rows, int64_t row_bytes,
                                     int64_t byte0)
      : last_(static_cast<int>(rows - 1)), row_bytes_(static_cast<uint32_t>(row_bytes)) {
    const int64_t byte = byte0 + threadIdx.x % kChunks * kChunkBytes;
    bytes_ = byte < row_bytes ? kChunkBytes : 0;
    from_ = static_cast<const uint8_t*>(matrix) + (byte < row_bytes ? byte : 0);
    asm("" : "+l"(from_));  // as in TileCopy
  }
  __device__ __forceinline__ void start(uint32_t tile, int first) const {
    const int chunk = threadIdx.x % kChunks, row = threadIdx.x / kChunks;
    if (kRows < kRowsAtOnce && row >= kRows) return;
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const int at = row + i * kRowsAtOnce;
      const auto source = static_cast<uint32_t>(min(first + at, last_));
      copy_async(tile + tile_chunk<kChunks>(at, chunk) * kChunkBytes,
                 from_ + uint64_t{source} * row_bytes_, bytes_);
    }
  }
};

__device__ __forceinline__ uint4 load_shared(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

__device__ __forceinline__ uint2 load_shared_8(uint32_t address) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];\n"
               : "=r"(v.x), "=r"(v.y)
               : "r"(address)
               : "memory");
  return v;
}

__device__ __forceinline__ void store_shared(uint32_t address, const uint32_t (&v)[4]) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};\n" ::"r"(address), "r"(v[0]), "r"(v[1]),
               "r"(v[2]), "r"(v[3])
               : "memory");
}

}  // namespace qlk::cuda
