// Launchers of every kind that the stand-in CUDA runtime has to serve: what test_runtime.py drives.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#define TRY(call)                                   \
  do {                                              \
    cudaError_t e_ = (call);                        \
    if (e_ != cudaSuccess) return static_cast<int>(e_); \
  } while (0)

struct Affine {
  float scale, shift;
  long long tag;
};

__device__ float device_gain = 3.0f;
__constant__ float constant_gain[4];

__global__ void scale(const float* x, float* y, float a, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = a * x[i];
}

__global__ void affine(const float* x, float* y, Affine f, short n, bool twice) {
  int i = threadIdx.x;
  if (i < n) y[i] = (f.scale * x[i] + f.shift) * (twice ? 2.0f : 1.0f);
}

__global__ void gain(float* y, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] *= device_gain * constant_gain[1];
}

__global__ void reverse_block(float* y) {
  extern __shared__ float line[];
  line[threadIdx.x] = y[blockIdx.x * blockDim.x + threadIdx.x];
  __syncthreads();
  y[blockIdx.x * blockDim.x + threadIdx.x] = line[blockDim.x - 1 - threadIdx.x];
}

__global__ void __launch_bounds__(128) bounded(float* y) { y[threadIdx.x] = threadIdx.x; }

__global__ void grid_sum(const float* x, float* partial, float* out, int n) {
  auto grid = cooperative_groups::this_grid();
  float sum = 0;
  for (int i = grid.thread_rank(); i < n; i += grid.size()) sum += x[i];
  partial[grid.thread_rank()] = sum;
  grid.sync();
  if (grid.thread_rank() == 0) {
    float total = 0;
    for (int i = 0; i < static_cast<int>(grid.size()); ++i) total += partial[i];
    *out = total;
  }
}

extern "C" {

int launch_scale(const float* x, float* y, float a, int n, cudaStream_t stream) {
  scale<<<(n + 127) / 128, 128, 0, stream>>>(x, y, a, n);
  return cudaGetLastError();
}

int launch_affine(const float* x, float* y, short n) {
  affine<<<1, dim3(8, 4, 1)>>>(x, y, Affine{2.0f, 0.5f, 7}, n, true);
  return cudaGetLastError();
}

int launch_gain(float* y, int n) {
  const float host[4] = {1.0f, 10.0f, 100.0f, 1000.0f};
  TRY(cudaMemcpyToSymbol(constant_gain, host, sizeof host));
  const float two = 2.0f;
  TRY(cudaMemcpyToSymbol(device_gain, &two, sizeof two));
  gain<<<1, 64>>>(y, n);
  TRY(cudaGetLastError());
  float back = 0;
  TRY(cudaMemcpyFromSymbol(&back, device_gain, sizeof back));
  return back == 2.0f ? 0 : -1;
}

int launch_reverse(float* y, int blocks, int threads, int shared, int opt_in) {
  if (opt_in >= 0)
    TRY(cudaFuncSetAttribute(reverse_block, cudaFuncAttributeMaxDynamicSharedMemorySize, opt_in));
  reverse_block<<<blocks, threads, shared>>>(y);
  return cudaGetLastError();
}

int launch_bounded(float* y, int threads) {
  bounded<<<1, threads>>>(y);
  return cudaGetLastError();
}

// Last errors stick until they are read, and are read once.
int last_error_twice(float* y) {
  bounded<<<1, 2000>>>(y);
  int first = cudaPeekAtLastError(), second = cudaGetLastError(), third = cudaGetLastError();
  return first * 10000 + second * 100 + third;
}

int launch_cooperative(const float* x, float* partial, float* out, int n, int blocks) {
  void* args[] = {&x, &partial, &out, &n};
  cudaLaunchCooperativeKernel(reinterpret_cast<void*>(grid_sum), dim3(blocks), dim3(32), args, 0, nullptr);
  return cudaGetLastError();
}

int launch_ex(const float* x, float* y, float a, int n, cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3((n + 63) / 64);
  config.blockDim = dim3(64);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, scale, x, y, a, n);
}

// Host memory up, a kernel, and back down, all by the runtime's own calls.
int round_trip(const float* in, float* out, int n) {
  float *a, *b;
  TRY(cudaMalloc(&a, n * sizeof(float)));
  TRY(cudaMalloc(&b, n * sizeof(float)));
  TRY(cudaMemset(b, 0, n * sizeof(float)));
  TRY(cudaMemcpy(a, in, n * sizeof(float), cudaMemcpyHostToDevice));
  scale<<<(n + 127) / 128, 128>>>(a, b, 2.0f, n);
  TRY(cudaGetLastError());
  TRY(cudaMemcpy(out, b, n * sizeof(float), cudaMemcpyDeviceToHost));
  TRY(cudaFree(a));
  return cudaFree(b);
}

int copy_too_much(const float* in, int n) {
  float* a;
  TRY(cudaMalloc(&a, n * sizeof(float)));
  int status = cudaMemcpy(a, in, (n + 1) * sizeof(float), cudaMemcpyHostToDevice);
  cudaFree(a);
  return status;
}

// y = 2 x in one stream, z = 3 y in another; `ordered` says whether an event stands between.
int two_streams(const float* x, float* y, float* z, int n, int ordered) {
  cudaStream_t first, second;
  cudaEvent_t ready;
  TRY(cudaStreamCreateWithFlags(&first, cudaStreamNonBlocking));
  TRY(cudaStreamCreateWithFlags(&second, cudaStreamNonBlocking));
  TRY(cudaEventCreateWithFlags(&ready, cudaEventDisableTiming));
  scale<<<(n + 127) / 128, 128, 0, first>>>(x, y, 2.0f, n);
  TRY(cudaEventRecord(ready, first));
  if (ordered) TRY(cudaStreamWaitEvent(second, ready, 0));
  scale<<<(n + 127) / 128, 128, 0, second>>>(y, z, 3.0f, n);
  TRY(cudaStreamSynchronize(second));
  TRY(cudaStreamSynchronize(first));
  TRY(cudaEventDestroy(ready));
  TRY(cudaStreamDestroy(first));
  return cudaStreamDestroy(second);
}

// A graph of two kernels, captured once and replayed.
int capture_and_replay(const float* x, float* y, float* z, int n, int times, int allocate) {
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t instance;
  TRY(cudaStreamCreate(&stream));
  TRY(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  if (allocate) {
    float* scratch;
    int status = cudaMalloc(&scratch, 64);
    cudaStreamEndCapture(stream, &graph);
    return status;
  }
  scale<<<(n + 127) / 128, 128, 0, stream>>>(x, y, 2.0f, n);
  scale<<<(n + 127) / 128, 128, 0, stream>>>(y, z, 5.0f, n);
  TRY(cudaStreamEndCapture(stream, &graph));
  size_t nodes = 0;
  TRY(cudaGraphGetNodes(graph, nullptr, &nodes));
  if (nodes != 2) return -1;
  TRY(cudaGraphInstantiate(&instance, graph, 0));
  for (int i = 0; i < times; ++i) TRY(cudaGraphLaunch(instance, stream));
  TRY(cudaStreamSynchronize(stream));
  TRY(cudaGraphExecDestroy(instance));
  TRY(cudaGraphDestroy(graph));
  return cudaStreamDestroy(stream);
}

struct Facts {
  int major, minor, sms, shared_optin, shared_sm, regs_sm, threads_sm, l2, count, warp;
  int attribute_major, attribute_sms, attribute_optin;
  int registers, static_shared, dynamic_limit, max_threads, blocks;
  unsigned long long memory;
  char name[64];
};

int device_facts(Facts* f) {
  cudaDeviceProp p;
  TRY(cudaGetDeviceProperties(&p, 0));
  *f = {};
  f->major = p.major;
  f->minor = p.minor;
  f->sms = p.multiProcessorCount;
  f->shared_optin = static_cast<int>(p.sharedMemPerBlockOptin);
  f->shared_sm = static_cast<int>(p.sharedMemPerMultiprocessor);
  f->regs_sm = p.regsPerMultiprocessor;
  f->threads_sm = p.maxThreadsPerMultiProcessor;
  f->l2 = p.l2CacheSize;
  f->warp = p.warpSize;
  f->memory = p.totalGlobalMem;
  for (int i = 0; i < 63 && p.name[i]; ++i) f->name[i] = p.name[i];
  TRY(cudaGetDeviceCount(&f->count));
  TRY(cudaDeviceGetAttribute(&f->attribute_major, cudaDevAttrComputeCapabilityMajor, 0));
  TRY(cudaDeviceGetAttribute(&f->attribute_sms, cudaDevAttrMultiProcessorCount, 0));
  TRY(cudaDeviceGetAttribute(&f->attribute_optin, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0));
  cudaFuncAttributes a;
  TRY(cudaFuncGetAttributes(&a, bounded));
  f->registers = a.numRegs;
  f->static_shared = static_cast<int>(a.sharedSizeBytes);
  f->dynamic_limit = a.maxDynamicSharedSizeBytes;
  f->max_threads = a.maxThreadsPerBlock;
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(&f->blocks, reverse_block, 256, 16384);
}

int set_device(int number) { return cudaSetDevice(number); }

const char* error_name(int code) { return cudaGetErrorName(static_cast<cudaError_t>(code)); }

}  // extern "C"
