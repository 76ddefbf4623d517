// Kernels of the kinds that everybody writes, correct: they must compute what they say, silently, in
// any order of warps and blocks.
#include <cooperative_groups.h>

namespace cg = cooperative_groups;
constexpr unsigned kFull = 0xffffffffu;

__device__ float warp_sum(float v) {
  for (int step = 16; step; step /= 2) v += __shfl_down_sync(kFull, v, step);
  return v;
}

// A grid's sum in one launch: the block that comes last adds up what the others left.
extern "C" __global__ void sum_last_block(const float* x, float* partial, float* out,
                                          unsigned* arrived, int n) {
  __shared__ float warp[32];
  __shared__ bool last;
  float v = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) v += x[i];
  v = warp_sum(v);
  if (threadIdx.x % 32 == 0) warp[threadIdx.x / 32] = v;
  __syncthreads();
  if (threadIdx.x < 32) {
    v = warp_sum(threadIdx.x < blockDim.x / 32 ? warp[threadIdx.x] : 0);
    if (threadIdx.x == 0) {
      partial[blockIdx.x] = v;
      __threadfence();
      last = atomicAdd(arrived, 1) == gridDim.x - 1;
      if (last) __threadfence();
    }
  }
  __syncthreads();
  if (!last || threadIdx.x >= 32) return;
  v = 0;
  for (int b = threadIdx.x; b < gridDim.x; b += 32) v += partial[b];
  v = warp_sum(v);
  if (threadIdx.x == 0) *out = v;
}

// Inclusive scan of a block by doubling, in shared memory.
extern "C" __global__ void scan_block(const int* x, int* y) {
  extern __shared__ int s[];
  int t = threadIdx.x, n = blockDim.x;
  s[t] = x[blockIdx.x * n + t];
  __syncthreads();
  for (int step = 1; step < n; step *= 2) {
    int add = t >= step ? s[t - step] : 0;
    __syncthreads();
    s[t] += add;
    __syncthreads();
  }
  y[blockIdx.x * n + t] = s[t];
}

// Inclusive scan of a grid in one pass: a block looks back over its predecessors' flags. Blocks take
// their places in the order in which they start. state: 0 nothing, 1 own sum, 2 sum of all so far.
extern "C" __global__ void scan_look_back(const int* x, int* y, unsigned* ticket,
                                          unsigned long long* state) {
  __shared__ int warp[32], place, before;
  int t = threadIdx.x, lane = t % 32;
  if (t == 0) place = atomicAdd(ticket, 1);
  __syncthreads();
  int i = place * blockDim.x + t, v = x[i];
  for (int step = 1; step < 32; step *= 2) {
    int other = __shfl_up_sync(kFull, v, step);
    if (lane >= step) v += other;
  }
  if (lane == 31) warp[t / 32] = v;
  __syncthreads();
  int own = 0, all = 0;
  for (int w = 0; w < blockDim.x / 32; w++) {
    if (w < t / 32) own += warp[w];
    all += warp[w];
  }
  if (t == 0) {
    auto tell = [&](unsigned kind, int sum) {
      unsigned long long both = (unsigned long long)kind << 32 | unsigned(sum);
      asm volatile("st.release.gpu.u64 [%0], %1;" ::"l"(state + place), "l"(both) : "memory");
    };
    if (place) tell(1, all);
    int sum = 0;
    for (int b = place - 1; b >= 0; b--) {
      unsigned long long both;
      do {
        asm volatile("ld.acquire.gpu.u64 %0, [%1];" : "=l"(both) : "l"(state + b) : "memory");
      } while (!(both >> 32));
      sum += int(both);
      if (both >> 32 == 2) break;
    }
    tell(2, sum + all);
    before = sum;
  }
  __syncthreads();
  y[i] = v + own + before;
}

// Transpose by tiles with a padded pitch.
extern "C" __global__ void transpose(const float* x, float* y, int rows, int columns) {
  __shared__ float tile[32][33];
  int c = blockIdx.x * 32 + threadIdx.x, r = blockIdx.y * 32;
  for (int k = threadIdx.y; k < 32; k += blockDim.y)
    if (r + k < rows && c < columns) tile[k][threadIdx.x] = x[(r + k) * columns + c];
  __syncthreads();
  c = blockIdx.x * 32;
  r = blockIdx.y * 32 + threadIdx.x;
  for (int k = threadIdx.y; k < 32; k += blockDim.y)
    if (c + k < columns && r < rows) y[(c + k) * rows + r] = tile[threadIdx.x][k];
}

// Jacobi steps on a ring: the whole grid meets between them.
extern "C" __global__ void ring(float* x, float* y, int n, int steps) {
  cg::grid_group grid = cg::this_grid();
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  for (int s = 0; s < steps; s++) {
    y[i] = 0.5f * (x[(i + 1) % n] + x[(i + n - 1) % n]);
    grid.sync();
    float* t = x;
    x = y;
    y = t;
  }
}

// Rows of shared memory that were never filled are read and thrown away: nothing to report.
extern "C" __global__ void reads_too_much(const float* x, float* y, int rows) {
  __shared__ float s[4][32];
  int lane = threadIdx.x % 32, row = threadIdx.x / 32;
  if (row < rows) s[row][lane] = x[row * 32 + lane];
  __syncthreads();
  float v[4], *at = y + lane;
  for (int r = 0; r < 4; r++) v[r] = 2 * s[r][lane];
  for (int r = 0; r < 4; r++)
    if (r < rows && row == 0) at[32 * r] = v[r];
}

// A lock that its last holder resets by a plain store, which is ordered by what it acquired.
extern "C" __global__ void locked(int* lock, int* total) {
  if (threadIdx.x == 0) {
    int seen;
    do {
      asm volatile("ld.global.acquire.gpu.b32 %0, [%1];" : "=r"(seen) : "l"(lock) : "memory");
    } while (seen != int(blockIdx.x));
  }
  __syncthreads();
  total[threadIdx.x] += blockIdx.x;
  __syncthreads();
  if (threadIdx.x == 0) {
    if (blockIdx.x == gridDim.x - 1) {
      *lock = 0;
    } else {
      asm volatile("fence.acq_rel.gpu;" ::: "memory");
      asm volatile("red.relaxed.gpu.global.add.s32 [%0], 1;" ::"l"(lock) : "memory");
    }
  }
}
