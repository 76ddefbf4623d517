// One bug a kernel, and its corrected twin. A comment "FOUND: kind" stands on the line that a report
// of that kind must name; `ok_` kernels must be silent. All take (float* x, float* y, int n), both
// arrays of n elements, n = 1000 unless the test says otherwise.
#include <cuda_fp16.h>
#include <cuda_pipeline.h>
#include <mma.h>

#define KERNEL extern "C" __global__ void
#define I (blockIdx.x * blockDim.x + threadIdx.x)

// --- out of bounds -----------------------------------------------------------------------------

KERNEL bug_read_past_end(float* x, float* y, int n) {
  if (I < 1024) y[I % n] = x[I];  // FOUND: out of bounds
}
KERNEL ok_read_past_end(float* x, float* y, int n) {
  if (I < n) y[I] = x[I];
}

KERNEL bug_write_past_end(float* x, float* y, int n) {
  if (I <= n) y[I] = 1;  // FOUND: out of bounds
}
KERNEL ok_write_past_end(float* x, float* y, int n) {
  if (I < n) y[I] = 1;
}

KERNEL bug_before_start(float* x, float* y, int n) {
  int i = I;
  if (i < n) y[i] = x[i - 1];  // FOUND: out of bounds
}
KERNEL ok_before_start(float* x, float* y, int n) {
  int i = I;
  if (i < n) y[i] = i ? x[i - 1] : 0;
}

KERNEL bug_int_overflow(float* x, float* y, int n) {
  int i = I;
  if (i == 5) y[0] = x[i * 500000000];  // FOUND: out of bounds
}
KERNEL ok_int_overflow(float* x, float* y, int n) {
  int i = I;
  if (i == 5) y[0] = x[(i * 500000000ll) % n];
}

KERNEL bug_vector_tail(float* x, float* y, int n) {
  int i = 4 * I;
  if (i < n + 3) reinterpret_cast<float4*>(y)[I] = make_float4(1, 2, 3, 4);  // FOUND: out of bounds
}
KERNEL ok_vector_tail(float* x, float* y, int n) {
  int i = 4 * I;
  if (i + 3 < n) reinterpret_cast<float4*>(y)[I] = make_float4(1, 2, 3, 4);
}

KERNEL bug_null(float* x, float* y, int n) {
  float* p = reinterpret_cast<float*>(static_cast<unsigned long long>(n - 1000));
  if (I < 1) y[0] = *p;  // FOUND: out of bounds
}
KERNEL ok_null(float* x, float* y, int n) {
  float* p = x + (n - 1000);
  if (I < 1) y[0] = *p;
}

KERNEL bug_atomic_out(float* x, float* y, int n) {
  if (I == 0) atomicAdd(y + n, 1.f);  // FOUND: out of bounds
}
KERNEL ok_atomic_out(float* x, float* y, int n) {
  if (I == 0) atomicAdd(y + n - 1, 1.f);
}

KERNEL bug_shared_past_end(float* x, float* y, int n) {
  __shared__ float s[256], t[256];
  t[threadIdx.x] = 0;
  s[threadIdx.x + 1] = x[threadIdx.x];  // FOUND: out of bounds
  __syncthreads();
  y[threadIdx.x] = s[255 - threadIdx.x ? 255 - threadIdx.x : 1] + t[threadIdx.x];
}
KERNEL ok_shared_past_end(float* x, float* y, int n) {
  __shared__ float s[257], t[256];
  t[threadIdx.x] = 0;
  s[threadIdx.x + 1] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = s[255 - threadIdx.x ? 255 - threadIdx.x : 1] + t[threadIdx.x];
}

KERNEL bug_dynamic_too_small(float* x, float* y, int n) {
  extern __shared__ float dynamic[];
  dynamic[threadIdx.x] = x[threadIdx.x];  // FOUND: out of bounds
  __syncthreads();
  y[threadIdx.x] = dynamic[threadIdx.x ^ 1];
}
KERNEL ok_dynamic_too_small(float* x, float* y, int n) {
  extern __shared__ float dynamic[];
  if (threadIdx.x < 128) dynamic[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  if (threadIdx.x < 128) y[threadIdx.x] = dynamic[threadIdx.x ^ 1];
}

KERNEL bug_local_index(float* x, float* y, int n) {
  float a[8];
  for (int i = 0; i < 8; i++) a[i] = i;
  if (I < n) y[I] = a[n - 990 + I % 3];  // FOUND: out of bounds
}
KERNEL ok_local_index(float* x, float* y, int n) {
  float a[8];
  for (int i = 0; i < 8; i++) a[i] = i;
  if (I < n) y[I] = a[n - 1000 + I % 3];
}

KERNEL bug_constant_written(const float* x, float* y, int n) {
  if (I == 3) const_cast<float*>(x)[I] = 1;  // FOUND: read-only memory written
}
KERNEL ok_constant_written(const float* x, float* y, int n) {
  if (I == 3) y[I] = x[I];
}

// --- alignment ---------------------------------------------------------------------------------

KERNEL bug_float4_misaligned(float* x, float* y, int n) {
  if (I == 0) *reinterpret_cast<float4*>(y + 2) = make_float4(1, 2, 3, 4);  // FOUND: misaligned
}
KERNEL ok_float4_misaligned(float* x, float* y, int n) {
  if (I == 0) *reinterpret_cast<float4*>(y + 4) = make_float4(1, 2, 3, 4);
}

KERNEL bug_half_pair_misaligned(float* x, float* y, int n) {
  __half* h = reinterpret_cast<__half*>(x);
  if (I == 0) y[0] = __low2float(*reinterpret_cast<__half2*>(h + 7));  // FOUND: misaligned
}
KERNEL ok_half_pair_misaligned(float* x, float* y, int n) {
  __half* h = reinterpret_cast<__half*>(x);
  if (I == 0) y[0] = __low2float(*reinterpret_cast<__half2*>(h + 6));
}

KERNEL bug_shared_misaligned(float* x, float* y, int n) {
  __shared__ alignas(16) float s[64];
  if (threadIdx.x < 64) s[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  if (threadIdx.x < 30) reinterpret_cast<float2*>(y)[threadIdx.x] = reinterpret_cast<float2*>(s + 1)[threadIdx.x];  // FOUND: misaligned
}
KERNEL ok_shared_misaligned(float* x, float* y, int n) {
  __shared__ alignas(16) float s[64];
  if (threadIdx.x < 64) s[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  if (threadIdx.x < 30) reinterpret_cast<float2*>(y)[threadIdx.x] = reinterpret_cast<float2*>(s + 2)[threadIdx.x];
}

__device__ void ldmatrix(unsigned* r, const void* p) {
  unsigned a = static_cast<unsigned>(__cvta_generic_to_shared(p));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(a) : "memory");
}
KERNEL bug_ldmatrix_row(float* x, float* y, int n) {
  __shared__ alignas(16) __half s[32 * 20];
  for (int i = threadIdx.x; i < 640; i += blockDim.x) s[i] = __float2half(x[i]);
  __syncthreads();
  unsigned r[4];
  ldmatrix(r, s + threadIdx.x % 32 * 20);  // FOUND: ldmatrix row misaligned
  if (threadIdx.x < 32) y[threadIdx.x] = r[0] + r[3];
}
KERNEL ok_ldmatrix_row(float* x, float* y, int n) {
  __shared__ alignas(16) __half s[32 * 24];
  for (int i = threadIdx.x; i < 768; i += blockDim.x) s[i] = __float2half(x[i]);
  __syncthreads();
  unsigned r[4];
  ldmatrix(r, s + threadIdx.x % 32 * 24);
  if (threadIdx.x < 32) y[threadIdx.x] = r[0] + r[3];
}

// --- uninitialised -----------------------------------------------------------------------------

KERNEL bug_output_read(float* x, float* y, int n) {  // y is passed as never written
  if (I < n) y[I] += x[I];  // FOUND: uninitialised global memory read
}
KERNEL ok_output_read(float* x, float* y, int n) {
  if (I < n) y[I] = x[I];
  if (I < n) y[I] += x[I];
}

KERNEL bug_shared_never_written(float* x, float* y, int n) {
  __shared__ float s[256];
  if (threadIdx.x < 255) s[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = s[255 - threadIdx.x];  // FOUND: uninitialised shared memory read
}
KERNEL ok_shared_never_written(float* x, float* y, int n) {
  __shared__ float s[256];
  s[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = s[255 - threadIdx.x];
}

KERNEL bug_shared_accumulator(float* x, float* y, int n) {
  __shared__ float sum;
  atomicAdd(&sum, x[threadIdx.x]);  // FOUND: uninitialised shared memory read
  __syncthreads();
  if (threadIdx.x == 0) y[0] = sum;
}
KERNEL ok_shared_accumulator(float* x, float* y, int n) {
  __shared__ float sum;
  if (threadIdx.x == 0) sum = 0;
  __syncthreads();
  atomicAdd(&sum, x[threadIdx.x]);
  __syncthreads();
  if (threadIdx.x == 0) y[0] = sum;
}

KERNEL bug_local_never_written(float* x, float* y, int n) {
  volatile float a[8];
  for (int i = 0; i < 7; i++) a[i] = i;
  if (I < n) y[I] = a[I % 8];  // FOUND: uninitialised local memory read
}
KERNEL ok_local_never_written(float* x, float* y, int n) {
  volatile float a[8];
  for (int i = 0; i < 8; i++) a[i] = i;
  if (I < n) y[I] = a[I % 8];
}

KERNEL bug_register_never_written(float* x, float* y, int n) {
  float v;
  asm volatile("{ .reg .pred p; setp.lt.u32 p, %1, 100; @p mov.f32 %0, 0f3F800000; }" : "=f"(v) : "r"(I));
  if (I < n) y[I] = v;  // FOUND: uninitialised register
}
KERNEL ok_register_never_written(float* x, float* y, int n) {
  float v;
  asm volatile("{ .reg .pred p; setp.lt.u32 p, %1, 100; mov.f32 %0, 0f00000000; @p mov.f32 %0, 0f3F800000; }"
               : "=f"(v) : "r"(I));
  if (I < n) y[I] = v;
}

// --- races on shared memory ----------------------------------------------------------------------

KERNEL bug_no_barrier(float* x, float* y, int n) {
  __shared__ float s[256];
  s[threadIdx.x] = x[threadIdx.x];
  y[threadIdx.x] = s[255 - threadIdx.x];  // FOUND: race on shared memory
}
KERNEL ok_no_barrier(float* x, float* y, int n) {
  __shared__ float s[256];
  s[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = s[255 - threadIdx.x];
}

KERNEL bug_no_second_barrier(float* x, float* y, int n) {
  __shared__ float s[256];
  float v = 0;
  for (int i = 0; i < 3; i++) {
    s[threadIdx.x] = x[threadIdx.x + 256 * i];  // FOUND: race on shared memory
    __syncthreads();
    v += s[255 - threadIdx.x];
  }
  y[threadIdx.x] = v;
}
KERNEL ok_no_second_barrier(float* x, float* y, int n) {
  __shared__ float s[256];
  float v = 0;
  for (int i = 0; i < 3; i++) {
    s[threadIdx.x] = x[threadIdx.x + 256 * i];
    __syncthreads();
    v += s[255 - threadIdx.x];
    __syncthreads();
  }
  y[threadIdx.x] = v;
}

KERNEL bug_reduction_step(float* x, float* y, int n) {
  __shared__ float s[256];
  s[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  for (int d = 128; d > 0; d /= 2)
    if (threadIdx.x < d) s[threadIdx.x] += s[threadIdx.x + d];  // FOUND: race on shared memory
  if (threadIdx.x == 0) y[0] = s[0];
}
KERNEL ok_reduction_step(float* x, float* y, int n) {
  __shared__ float s[256];
  s[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  for (int d = 128; d > 0; d /= 2) {
    if (threadIdx.x < d) s[threadIdx.x] += s[threadIdx.x + d];
    __syncthreads();
  }
  if (threadIdx.x == 0) y[0] = s[0];
}

KERNEL bug_warp_exchange(float* x, float* y, int n) {
  __shared__ float s[32];
  if (threadIdx.x < 32) {
    s[threadIdx.x] = x[threadIdx.x];
    y[threadIdx.x] = s[31 - threadIdx.x];  // FOUND: race within a warp
  }
}
KERNEL ok_warp_exchange(float* x, float* y, int n) {
  __shared__ float s[32];
  if (threadIdx.x < 32) {
    s[threadIdx.x] = x[threadIdx.x];
    __syncwarp();
    y[threadIdx.x] = s[31 - threadIdx.x];
  }
}

KERNEL bug_same_slot(float* x, float* y, int n) {
  __shared__ float s[16];
  if (threadIdx.x < 32) s[threadIdx.x / 2] = x[threadIdx.x];  // FOUND: race within a warp
  __syncthreads();
  if (threadIdx.x < 16) y[threadIdx.x] = s[threadIdx.x];
}
KERNEL ok_same_slot(float* x, float* y, int n) {
  __shared__ float s[32];
  if (threadIdx.x < 32) s[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  if (threadIdx.x < 16) y[threadIdx.x] = s[2 * threadIdx.x];
}

KERNEL bug_shared_copies(float* x, float* y, int n) {
  __shared__ float s[32];
  s[threadIdx.x % 32] = x[threadIdx.x];  // FOUND: race on shared memory
  __syncthreads();
  if (threadIdx.x < 32) y[threadIdx.x] = s[threadIdx.x];
}
KERNEL ok_shared_copies(float* x, float* y, int n) {  // every warp writes the same
  __shared__ float s[32];
  s[threadIdx.x % 32] = x[threadIdx.x % 32];
  __syncthreads();
  if (threadIdx.x < 32) y[threadIdx.x] = s[threadIdx.x];
}

KERNEL bug_plain_count(float* x, float* y, int n) {
  __shared__ int count;
  if (threadIdx.x == 0) count = 0;
  __syncthreads();
  if (x[threadIdx.x] > 0 && threadIdx.x % 32 == 0) count++;  // FOUND: race on shared memory
  __syncthreads();
  if (threadIdx.x == 0) y[0] = count;
}
KERNEL ok_plain_count(float* x, float* y, int n) {
  __shared__ int count;
  if (threadIdx.x == 0) count = 0;
  __syncthreads();
  if (x[threadIdx.x] > 0 && threadIdx.x % 32 == 0) atomicAdd(&count, 1);
  __syncthreads();
  if (threadIdx.x == 0) y[0] = count;
}

KERNEL bug_named_barrier(float* x, float* y, int n) {
  __shared__ float s[64];
  int half = threadIdx.x / 128;
  if (threadIdx.x == 128) s[0] = x[0];
  asm volatile("bar.sync %0, 128;" ::"r"(half + 1) : "memory");
  if (threadIdx.x == 0) y[0] = s[0];  // FOUND: race on shared memory
}
KERNEL ok_named_barrier(float* x, float* y, int n) {
  __shared__ float s[64];
  if (threadIdx.x == 128) s[0] = x[0];
  asm volatile("bar.sync 1, 256;" ::: "memory");
  if (threadIdx.x == 0) y[0] = s[0];
}

KERNEL bug_bytes(float* x, float* y, int n) {
  __shared__ unsigned char s[256];
  s[threadIdx.x] = threadIdx.x;
  s[(threadIdx.x + 64) % 256] = 1;  // FOUND: race on shared memory
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x];
}
KERNEL ok_bytes(float* x, float* y, int n) {  // neighbours in one word are not a race
  __shared__ unsigned char s[256];
  s[threadIdx.x] = threadIdx.x;
  __syncthreads();
  s[(threadIdx.x + 64) % 256] = 1;
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x];
}

// --- races on global memory ----------------------------------------------------------------------

KERNEL bug_blocks_add(float* x, float* y, int n) {
  if (threadIdx.x == 0) y[0] += x[blockIdx.x];  // FOUND: race on global memory
}
KERNEL ok_blocks_add(float* x, float* y, int n) {
  if (threadIdx.x == 0) atomicAdd(y, x[blockIdx.x]);
}

KERNEL bug_neighbour_block(float* x, float* y, int n) {
  int i = I;
  if (i < n) y[i] = x[i];
  __syncthreads();
  if (i + 256 < n) x[i] = y[i + 256];  // FOUND: race on global memory
}
KERNEL ok_neighbour_block(float* x, float* y, int n) {
  int i = I;
  if (i < n) y[i] = x[i];
  __syncthreads();
  if (i < n) x[i] = y[i - threadIdx.x + min(255 - threadIdx.x, n - 1 - (i - threadIdx.x))];
}

// The last block adds up what all wrote. x[n - 1] counts arrivals, as an integer.
__device__ void last_block(float* x, float* y, int n, bool fence, bool barrier, bool fence_after) {
  __shared__ bool last;
  if (threadIdx.x < 64) y[blockIdx.x * 64 + threadIdx.x] = x[threadIdx.x];
  if (fence) __threadfence();
  if (barrier) __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(reinterpret_cast<int*>(x) + n - 1, 1) == gridDim.x - 1;
  __syncthreads();
  if (last && fence_after) __threadfence();
  if (last && threadIdx.x == 0) {
    float v = 0;
    for (int i = 0; i < 64 * gridDim.x; i++) v += y[i];
    x[0] = v;
  }
}
KERNEL bug_flag_without_fence(float* x, float* y, int n) {
  last_block(x, y, n, false, true, true);  // FOUND: race on global memory
}
KERNEL ok_flag_without_fence(float* x, float* y, int n) {
  last_block(x + 1, y, n - 1, true, true, true);
}
KERNEL bug_flag_without_barrier(float* x, float* y, int n) {
  last_block(x + 1, y, n - 1, true, false, true);  // FOUND: race on global memory
}

KERNEL bug_global_within_block(float* x, float* y, int n) {
  y[I % n] = x[I % n];
  if (I + 32 < n && threadIdx.x < 200) x[I] = y[I + 32];  // FOUND: race on global memory
}
KERNEL ok_global_within_block(float* x, float* y, int n) {
  if (I < n) y[I] = x[I];
  __syncthreads();
  if (I + 32 < n && threadIdx.x < 200) x[I] = y[I + 32];
}

// --- asynchronous copies ---------------------------------------------------------------------------

KERNEL bug_copy_without_wait(float* x, float* y, int n) {
  __shared__ alignas(16) float s[1024];
  __pipeline_memcpy_async(s + 4 * threadIdx.x, x + 4 * (threadIdx.x % 128), 16);
  __pipeline_commit();
  y[threadIdx.x] = s[4 * threadIdx.x];  // FOUND: cp.async data read before its wait
}
KERNEL ok_copy_without_wait(float* x, float* y, int n) {
  __shared__ alignas(16) float s[1024];
  __pipeline_memcpy_async(s + 4 * threadIdx.x, x + 4 * (threadIdx.x % 128), 16);
  __pipeline_commit();
  __pipeline_wait_prior(0);
  y[threadIdx.x] = s[4 * threadIdx.x];
}

KERNEL bug_copy_without_barrier(float* x, float* y, int n) {
  __shared__ alignas(16) float s[1024];
  __pipeline_memcpy_async(s + 4 * threadIdx.x, x + 4 * (threadIdx.x % 128), 16);
  __pipeline_commit();
  __pipeline_wait_prior(0);
  y[threadIdx.x] = s[(4 * threadIdx.x + 512) % 1024];  // FOUND: race on shared memory
}
KERNEL ok_copy_without_barrier(float* x, float* y, int n) {
  __shared__ alignas(16) float s[1024];
  __pipeline_memcpy_async(s + 4 * threadIdx.x, x + 4 * (threadIdx.x % 128), 16);
  __pipeline_commit();
  __pipeline_wait_prior(0);
  __syncthreads();
  y[threadIdx.x] = s[(4 * threadIdx.x + 512) % 1024];
}

__device__ void pipeline(float* x, float* y, int keep) {
  __shared__ alignas(16) float s[2][256];
  float v = 0;
  for (int i = 0; i < 4; i++) {
    if (i < 3) {
      if (threadIdx.x < 64) __pipeline_memcpy_async(s[(i + 1) % 2] + 4 * threadIdx.x, x + 4 * threadIdx.x, 16);
    }
    __pipeline_commit();
    __pipeline_wait_prior(keep);
    __syncthreads();
    if (i > 0) v += s[i % 2][threadIdx.x];
    __syncthreads();
  }
  y[threadIdx.x] = v;
}
KERNEL bug_waits_for_too_few(float* x, float* y, int n) {
  pipeline(x, y, 2);  // FOUND: cp.async data read before its wait
}
KERNEL ok_waits_for_too_few(float* x, float* y, int n) {
  pipeline(x, y, 1);
}

KERNEL bug_copy_overwritten(float* x, float* y, int n) {
  __shared__ alignas(16) float s[1024];
  __pipeline_memcpy_async(s + 4 * threadIdx.x, x + 4 * (threadIdx.x % 128), 16);
  s[4 * threadIdx.x] = 0;  // FOUND: cp.async data overwritten before its wait
  __pipeline_commit();
  __pipeline_wait_prior(0);
  y[threadIdx.x] = s[4 * threadIdx.x];
}
KERNEL ok_copy_overwritten(float* x, float* y, int n) {
  __shared__ alignas(16) float s[1024];
  s[4 * threadIdx.x] = 0;
  __pipeline_memcpy_async(s + 4 * threadIdx.x, x + 4 * (threadIdx.x % 128), 16);
  __pipeline_commit();
  __pipeline_wait_prior(0);
  y[threadIdx.x] = s[4 * threadIdx.x];
}

// --- barriers, warps ---------------------------------------------------------------------------------

KERNEL bug_early_exit(float* x, float* y, int n) {
  if (I >= n) return;
  y[I] = x[I];
  __syncthreads();  // FOUND: barrier not reached by all threads
  y[I] += 1;
}
KERNEL ok_early_exit(float* x, float* y, int n) {
  if (I < n) y[I] = x[I];
  __syncthreads();
  if (I < n) y[I] += 1;
}

KERNEL bug_barrier_in_branch(float* x, float* y, int n) {
  if (x[threadIdx.x] > 0) {
    y[threadIdx.x] = 1;
    __syncthreads();  // FOUND: barrier in divergent code
  } else {
    y[threadIdx.x] = 2;
    __syncthreads();
  }
}
KERNEL ok_barrier_in_branch(float* x, float* y, int n) {
  if (x[threadIdx.x] > 0) y[threadIdx.x] = 1;
  else y[threadIdx.x] = 2;
  __syncthreads();
}

KERNEL bug_half_at_barrier(float* x, float* y, int n) {
  if (threadIdx.x < 128)
    asm volatile("bar.sync 1, 256;" ::: "memory");  // FOUND: deadlock
  y[threadIdx.x] = x[threadIdx.x];
}
KERNEL ok_half_at_barrier(float* x, float* y, int n) {
  if (threadIdx.x < 128) asm volatile("bar.sync 1, 128;" ::: "memory");
  y[threadIdx.x] = x[threadIdx.x];
}

KERNEL bug_flag_never_set(float* x, float* y, int n) {
  volatile int* flag = reinterpret_cast<int*>(y);
  while (*flag != 12345) {  // FOUND: budget exceeded
  }
  y[1] = x[1];
}
KERNEL ok_flag_never_set(float* x, float* y, int n) {
  volatile int* flag = reinterpret_cast<int*>(y);
  if (I == gridDim.x * blockDim.x - 1) atomicExch(reinterpret_cast<int*>(y), 12345);
  while (*flag != 12345) {
  }
}

KERNEL bug_shuffle_in_branch(float* x, float* y, int n) {
  if (threadIdx.x % 32 < 16) y[threadIdx.x] = __shfl_down_sync(0xffff, x[threadIdx.x], 8);  // FOUND: shuffle from an inactive lane
}
KERNEL ok_shuffle_in_branch(float* x, float* y, int n) {
  if (threadIdx.x % 32 < 16) y[threadIdx.x] = __shfl_down_sync(0xffff, x[threadIdx.x], 8, 16);
}

KERNEL bug_full_mask_in_branch(float* x, float* y, int n) {
  float v = x[threadIdx.x];
  if (threadIdx.x % 32 < 16)
    v += __shfl_xor_sync(0xffffffff, v, 1);  // FOUND: lanes missing at a warp-wide instruction
  else
    v = v * v + y[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = v;
}
KERNEL ok_full_mask_in_branch(float* x, float* y, int n) {
  float v = x[threadIdx.x];
  float w = __shfl_xor_sync(0xffffffff, v, 1);
  if (threadIdx.x % 32 < 16)
    v += w;
  else
    v = v * v + y[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = v;
}

KERNEL bug_ballot_mask(float* x, float* y, int n) {
  if (threadIdx.x % 32 < 8) y[threadIdx.x] = __ballot_sync(0x7f, x[threadIdx.x] > 0);  // FOUND: lanes missing at a warp-wide instruction
}
KERNEL ok_ballot_mask(float* x, float* y, int n) {
  if (threadIdx.x % 32 < 8) y[threadIdx.x] = __ballot_sync(0xff, x[threadIdx.x] > 0);
}

KERNEL bug_trap(float* x, float* y, int n) {
  if (I == 7) __trap();  // FOUND: trap
}
