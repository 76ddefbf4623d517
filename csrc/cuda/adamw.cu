// AdamW on a group of tensors: one launch updates up to 60 of them, parameters and both states in
// place. The formulas, and their order, are the head's of qlora_kernels/optim.py; every operation
// is rounded once, so that states, codes and constants are bit-identical to the torch version.
//
//   a tile: 4096 values of one tensor, 256 a warp, 8 a lane, the same for both kinds of states
//
//   kernel parameters   pointers and first tile of each tensor: a CTA finds its tile's tensor by
//     |                 binary search, all its threads alike (uniform), once for 4096 values
//     v
//   DRAM   p, grad      16 bytes a lane (fp32 twice); beside fp32 states 16-bit ones by 8 bytes
//     |    fp32 states  2 x 16 bytes a lane, each warp's accesses consecutive
//     |    8-bit states 8 (fp32 parameters: 2 x 4) bytes a lane, and one absmax a warp
//     v
//   registers           the update; nothing passes between lanes but, for 8-bit states, the largest
//     |                 magnitude of the warp's 256 values: five shuffles a state
//     v
//   DRAM                the same bytes back, and the new absmax
//
// 8-bit states are decoded through a table of 256 values in shared memory, and rounded to the
// nearest code by one look into another: the upper bits of a normalized value, its exponent and the
// first 6 or 7 bits of its mantissa, name a bucket so narrow that at most one boundary between two
// codes lies in it. The bucket's word holds the code below the boundary in its top byte, and below
// that what carries into the code where the value's remaining bits are beyond the boundary: load,
// add, shift. (Eight steps of a binary search a state would exceed shared memory's bandwidth.) 25
// KB of tables a CTA, so the grid is what resides at once, and each CTA walks over tiles.
//
// Bytes a value, 32-bit states: 28 (fp32), 22 (16 bits); 8-bit: 16.06 and 10.06; no sector is moved
// that holds none of them. Counted (benchmarks/cuda_adamw.py): 42 and 47 SASS a value with 32-bit
// states, 68 and 72 with 8-bit ones (sm_80; some more on sm_90): of the issue slots that there are
// while those bytes stream, 16, 22, 44 and 75% on an A100, 19, 26, 51 and 85% on an H100. On an
// H200 16-bit parameters with 8-bit states are bound by issue (122%), the rest (27, 37, 73%) by
// memory. Tensors whose pointers are not aligned, and the last values of each, go by single
// elements.
//
// A step that a graph captures and replays (the kernels with `captured`) cannot bring its scalars
// as kernel parameters: they would be those of the captured step for ever. There a kernel of one
// small block before it, adamw_clock, counts each tensor's t up in device memory and makes the
// scalars of it, in fp64 and in the order of optim.py: 32 bytes a tensor, which all its CTAs read.
//
// Numerics: with fp32 states everything is IEEE's, and p too is bit-identical to the formulas. With
// 8-bit states the root and the reciprocal under m are the hardware's approximations (an ulp each),
// so that the issue slots keep up with memory: where v is no denormal, p differs by at most 2^-21
// of m's part of its change, and the rounding of p itself.
#include "adamw.h"

#include "element.h"

namespace qlk::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kTile = kWarps * kStateBlock;
constexpr int kLaneValues = kStateBlock / 32;
constexpr int kResident = 2;  // CTAs a multiprocessor that registers allow for: 64 a thread

static_assert(sizeof(AdamWGroup) + 16 <= 4096, "kernel parameters");
static_assert(kStateMap % 4 == 0, "maps are copied by 16 bytes");

// Elements that move in one access.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T at[kCount];
};

// A lane's values of a warp's 256: kUnits runs of kRun, lanes side by side.
template <class T, bool eight>
constexpr int kRunOf = eight && sizeof(T) == 2 ? 8 : 4;

template <int kBytes>
struct Word;
template <>
struct Word<4> {
  using type = uint32_t;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

// Reads or writes one run: `whole` in one access, else by elements, of which `left` are in the
// tensor. (__stwb is an ordinary store; plain ones of both kinds would be merged, into elements.)
template <bool whole, int kRun, class T>
__device__ __forceinline__ Pack<T, kRun> load(const T* from, int left, T nothing) {
  Pack<T, kRun> run;
  if constexpr (whole) {
    using W = typename Word<sizeof(run)>::type;
    const W word = *reinterpret_cast<const W*>(from);
    memcpy(&run, &word, sizeof(run));
  } else {
#pragma unroll
    for (int i = 0; i < kRun; ++i) run.at[i] = i < left ? from[i] : nothing;
  }
  return run;
}
template <bool whole, int kRun, class T>
__device__ __forceinline__ void store(T* to, const Pack<T, kRun>& run, int left) {
  if constexpr (whole) {
    using W = typename Word<sizeof(run)>::type;
    W word;
    memcpy(&word, &run, sizeof(run));
    __stwb(reinterpret_cast<W*>(to), word);
  } else {
#pragma unroll
    for (int i = 0; i < kRun; ++i)
      if (i < left) to[i] = run.at[i];
  }
}

// Which tensor has the tile: the last one that begins at or before it. (Empty ones begin where the
// next does.)
__device__ __forceinline__ int tensor_of(const AdamWGroup& g, unsigned tile) {
  int low = 0, high = g.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (g.tensors[middle].first_tile <= tile) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

__device__ __forceinline__ float next_m(const AdamWStep& s, float m, float g) {
  return __fadd_rn(__fmul_rn(m, s.beta1), __fmul_rn(g, s.rest1));
}
__device__ __forceinline__ float next_v(const AdamWStep& s, float v, float g2) {
  return __fadd_rn(__fmul_rn(v, s.beta2), __fmul_rn(g2, s.rest2));
}

// The hardware's root and reciprocal, an instruction each: they take denormals for zero, which
// neither the bounded v nor a root of it is.
constexpr float kSmallestNormal = 1.17549435e-38f;
__device__ __forceinline__ float sqrt_approx(float v) {
  float root;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(fmaxf(v, kSmallestNormal)));
  return root;
}
__device__ __forceinline__ float reciprocal_approx(float v) {
  float reciprocal;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(v));
  return reciprocal;
}

template <bool exact>
__device__ __forceinline__ float next_p(const AdamWStep& s, float p, float m, float v) {
  const float root = exact ? __fsqrt_rn(v) : sqrt_approx(v);
  const float denominator = __fadd_rn(__fmul_rn(root, s.scale_v), s.eps);
  const float ratio =
      exact ? __fdiv_rn(m, denominator) : __fmul_rn(m, reciprocal_approx(denominator));
  return __fsub_rn(__fmul_rn(p, s.decay), __fmul_rn(ratio, s.step_size));
}

// A warp's 256 values from `first` on, of which `count` are in the tensor (whole: all).
template <class T, bool whole>
__device__ __forceinline__ void update_32(const AdamWStep& s, const AdamWTensor& t, int64_t first,
                                          int count, int lane) {
  constexpr int kRun = kRunOf<T, false>;
#pragma unroll
  for (int j = 0; j < kLaneValues / kRun; ++j) {
    const int in_block = (j * 32 + lane) * kRun, left = count - in_block;
    const int64_t at = first + in_block;
    auto p = load<whole, kRun>(static_cast<T*>(t.p) + at, left, from_float<T>(0));
    const auto grad = load<whole, kRun>(static_cast<const T*>(t.grad) + at, left, p.at[0]);
    auto m = load<whole, kRun>(static_cast<float*>(t.state1) + at, left, 0.0f);
    auto v = load<whole, kRun>(static_cast<float*>(t.state2) + at, left, 0.0f);
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const float gradient = to_float(grad.at[i]);
      m.at[i] = next_m(s, m.at[i], gradient);
      v.at[i] = next_v(s, v.at[i], __fmul_rn(gradient, gradient));
      p.at[i] = from_float<T>(next_p<true>(s, to_float(p.at[i]), m.at[i], v.at[i]));
    }
    store<whole>(static_cast<T*>(t.p) + at, p, left);
    store<whole>(static_cast<float*>(t.state1) + at, m, left);
    store<whole>(static_cast<float*>(t.state2) + at, v, left);
  }
}

// --- 8-bit states --------------------------------------------------------------------------------

constexpr float kSmallest = 1.1920928955078125e-7f;  // 2^-23: below it all have zero's code, or the
                                                     // negative code next to it
// Buckets of the signed map drop 17 bits of a value, those of the unsigned map 16.
constexpr int kDropped1 = 17, kDropped2 = 16;
constexpr uint32_t kFirst1 = 0x34000000u >> kDropped1, kFirst2 = 0x34000000u >> kDropped2;
constexpr int kNegative1 = kStateSearch / 2;  // where the buckets of negative values begin

// The code of m / absmax. Not of m * (1 / absmax) rounded first: -0 must become +0, and a negative
// value too small for a float stay negative.
__device__ __forceinline__ uint32_t encode_1(const uint32_t* search, float m, float reciprocal) {
  const float x = __fmaf_rn(m, reciprocal, 0.0f);
  const uint32_t size = __float_as_uint(fminf(fmaxf(fabsf(x), kSmallest), 1.0f));
  const int sign = static_cast<int>(__float_as_uint(x)) >> 31;  // 0 or -1
  // Complemented, negative values too grow with their code; their buckets follow the others.
  const uint32_t bucket = (size >> kDropped1) - kFirst1 + (sign & kNegative1);
  return (search[bucket] + ((size ^ static_cast<uint32_t>(sign)) << (24 - kDropped1))) >> 24;
}
__device__ __forceinline__ uint32_t encode_2(const uint32_t* search, float v, float reciprocal) {
  const float x = __fmul_rn(v, reciprocal);
  const uint32_t size = __float_as_uint(fminf(fmaxf(x, kSmallest), 1.0f));
  return (search[(size >> kDropped2) - kFirst2] + (size << (24 - kDropped2))) >> 24;
}

__device__ __forceinline__ float largest_of_warp(float largest) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2)
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, lanes));
  return largest;
}
__device__ __forceinline__ float reciprocal_of(float absmax) {
  return __frcp_rn(fmaxf(absmax, kSmallestNormal));
}

template <class T, bool whole>
__device__ __forceinline__ void update_8(const AdamWStep& s, const AdamWTensor& t, int64_t first,
                                         int count, int lane, const uint32_t* maps) {
  constexpr int kRun = kRunOf<T, true>;
  constexpr int kRuns = kLaneValues / kRun;
  const float* const values1 = reinterpret_cast<const float*>(maps);
  const float* const values2 = reinterpret_cast<const float*>(maps + kStateMap);
  uint8_t *const codes1 = static_cast<uint8_t*>(t.state1), *const codes2 =
                                                               static_cast<uint8_t*>(t.state2);
  const int64_t block = first / kStateBlock;
  const float absmax1 = t.absmax1[block], absmax2 = t.absmax2[block];

  float m[kLaneValues], v[kLaneValues];
  float largest_m = 0, largest_v = 0;
#pragma unroll
  for (int j = 0; j < kRuns; ++j) {
    const int in_block = (j * 32 + lane) * kRun, left = count - in_block;
    const int64_t at = first + in_block;
    auto p = load<whole, kRun>(static_cast<T*>(t.p) + at, left, from_float<T>(0));
    const auto grad = load<whole, kRun>(static_cast<const T*>(t.grad) + at, left, from_float<T>(0));
    const auto m_codes = load<whole, kRun>(codes1 + at, left, uint8_t{0});
    const auto v_codes = load<whole, kRun>(codes2 + at, left, uint8_t{0});
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const float gradient = to_float(grad.at[i]), g2 = __fmul_rn(gradient, gradient);
      const bool finite = g2 < __uint_as_float(0x7f800000u) && (whole || i < left);
      const float old_m = __fmul_rn(values1[m_codes.at[i]], absmax1);
      const float old_v = __fmul_rn(values2[v_codes.at[i]], absmax2);
      const float new_m = finite ? next_m(s, old_m, gradient) : 0.0f;
      const float new_v = finite ? next_v(s, old_v, g2) : 0.0f;
      const float old_p = to_float(p.at[i]);
      const float new_p = next_p<false>(s, old_p, new_m, new_v);
      p.at[i] = from_float<T>(finite ? new_p : old_p);
      largest_m = fmaxf(largest_m, fabsf(new_m));
      largest_v = fmaxf(largest_v, new_v);
      m[j * kRun + i] = new_m, v[j * kRun + i] = new_v;
    }
    store<whole>(static_cast<T*>(t.p) + at, p, left);
  }
  largest_m = largest_of_warp(largest_m);
  largest_v = largest_of_warp(largest_v);
  __syncwarp();  // all lanes have read the old ones
  if (lane == 0) t.absmax1[block] = largest_m, t.absmax2[block] = largest_v;

  const float reciprocal1 = reciprocal_of(largest_m), reciprocal2 = reciprocal_of(largest_v);
  const uint32_t *const search1 = maps + kStateCodes, *const search2 = search1 + kStateMap;
#pragma unroll
  for (int j = 0; j < kRuns; ++j) {
    const int in_block = (j * 32 + lane) * kRun, left = count - in_block;
    const int64_t at = first + in_block;
    Pack<uint8_t, kRun> m_codes, v_codes;
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      m_codes.at[i] = static_cast<uint8_t>(encode_1(search1, m[j * kRun + i], reciprocal1));
      v_codes.at[i] = static_cast<uint8_t>(encode_2(search2, v[j * kRun + i], reciprocal2));
    }
    store<whole>(codes1 + at, m_codes, left);
    store<whole>(codes2 + at, v_codes, left);
  }
}

template <class T, bool eight, bool captured>
__global__ void __launch_bounds__(kThreads, kResident)
    adamw(const __grid_constant__ AdamWGroup g, const AdamWStep* steps, unsigned tiles) {
  __shared__ __align__(16) uint32_t maps[eight ? 2 * kStateMap : 4];
  if constexpr (eight) {
    for (int i = threadIdx.x; i < 2 * kStateMap / 4; i += kThreads)
      reinterpret_cast<uint4*>(maps)[i] = reinterpret_cast<const uint4*>(g.maps)[i];
    __syncthreads();
  }
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (unsigned tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int which = tensor_of(g, tile);
    const AdamWTensor& t = g.tensors[which];
    const AdamWStep& s = captured ? steps[which] : g.step;
    const int64_t first = static_cast<int64_t>(tile - t.first_tile) * kTile + warp * kStateBlock;
    const int64_t left = t.count - first;
    if (left <= 0) continue;  // all lanes of the warp alike
    const bool whole = t.wide && left >= kStateBlock;
    const int count = left < kStateBlock ? static_cast<int>(left) : kStateBlock;
    if constexpr (eight) {
      whole ? update_8<T, true>(s, t, first, count, lane, maps)
            : update_8<T, false>(s, t, first, count, lane, maps);
    } else {
      whole ? update_32<T, true>(s, t, first, count, lane)
            : update_32<T, false>(s, t, first, count, lane);
    }
  }
}

// --- the clock of captured steps -----------------------------------------------------------------

constexpr int kClockThreads = (kAdamWTensors + 31) / 32 * 32;

// optim.power(): the same products in the same order.
__device__ __forceinline__ double power(double base, unsigned n) {
  double result = 1;
  for (; n > 0; n /= 2) {
    if (n % 2 == 1) result = __dmul_rn(result, base);
    base = __dmul_rn(base, base);
  }
  return result;
}

__global__ void __launch_bounds__(kClockThreads)
    adamw_clock(const __grid_constant__ AdamWClock c, AdamWStep* steps) {
  const int i = threadIdx.x;
  if (i >= c.count) return;
  const float t = *c.t[i] + 1;
  *c.t[i] = t;
  const unsigned n = static_cast<unsigned>(t);
  const double lr = c.lr != nullptr ? static_cast<double>(*c.lr) : c.lr_value;
  const double corrected1 = __dsub_rn(1, power(c.beta1, n));
  const double corrected2 = __dsub_rn(1, power(c.beta2, n));
  const auto rounded = [](double v) { return __double2float_rn(v); };
  steps[i] = {
      rounded(c.beta1),
      rounded(__dsub_rn(1, c.beta1)),
      rounded(c.beta2),
      rounded(__dsub_rn(1, c.beta2)),
      rounded(__dsub_rn(1, __dmul_rn(lr, c.weight_decay))),
      rounded(__ddiv_rn(lr, corrected1)),
      rounded(__ddiv_rn(1, __dsqrt_rn(corrected2))),
      rounded(c.eps),
  };
}

template <bool captured>
cudaError_t launch(AdamWGroup& g, const AdamWStep* steps, int sms, cudaStream_t stream) {
  unsigned tiles = 0;
  for (int i = 0; i < g.count; ++i) {
    AdamWTensor& t = g.tensors[i];
    t.first_tile = tiles;
    tiles += static_cast<unsigned>((t.count + kTile - 1) / kTile);
    const uint64_t all = reinterpret_cast<uint64_t>(t.p) | reinterpret_cast<uint64_t>(t.grad) |
                         reinterpret_cast<uint64_t>(t.state1) |
                         reinterpret_cast<uint64_t>(t.state2);
    t.wide = is_aligned_16(all);
  }
  if (tiles == 0) return cudaSuccess;
  const unsigned resident = static_cast<unsigned>(sms > 0 ? sms * kResident : 1);
  const unsigned grid = tiles < resident ? tiles : resident;
  return with_element(g.dtype, [&]<class T>() {
    if (g.eight) {
      adamw<T, true, captured><<<grid, kThreads, 0, stream>>>(g, steps, tiles);
    } else {
      adamw<T, false, captured><<<grid, kThreads, 0, stream>>>(g, steps, tiles);
    }
    return cudaGetLastError();
  });
}

}  // namespace

cudaError_t launch_adamw(AdamWGroup g, int sms, cudaStream_t stream) {
  return launch<false>(g, nullptr, sms, stream);
}

cudaError_t launch_adamw_captured(AdamWGroup g, const AdamWStep* steps, int sms,
                                  cudaStream_t stream) {
  return launch<true>(g, steps, sms, stream);
}

cudaError_t launch_adamw_clock(const AdamWClock& clock, AdamWStep* steps, cudaStream_t stream) {
  adamw_clock<<<1, kClockThreads, 0, stream>>>(clock, steps);
  return cudaGetLastError();
}

}  // namespace qlk::cuda
