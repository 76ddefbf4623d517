// A stand-in for the CUDA runtime's shared library, under its name (soname libcudart.so.13, with
// its version node): a library whose launchers were linked with `-cudart shared` binds to whichever
// of the two is loaded first.
//
// It holds only what must exist before anyone asks: the functions and variables that a library
// registers while it is being loaded, and each thread's launch configuration and last error. Every
// other call is packed into 64-bit words and handed to one handler (qlora_kernels/emulator/
// runtime.py), by name. Without a handler it is a machine without a GPU: every call returns
// cudaErrorNoDevice.
//
// The types are declared here as the ABI has them, so that no CUDA header is needed to build this;
// tests/emulator/test_runtime.py compares them with the real headers. Compiled with CUDART_MAJOR=12
// it is CUDA 12's runtime: the same but for the calls that changed their signature or the layout of
// what they fill in.

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#ifndef CUDART_MAJOR
#define CUDART_MAJOR 13
#endif

#define API extern "C" __attribute__((visibility("default")))

namespace {

using Error = int;
constexpr Error kSuccess = 0, kInvalidValue = 1, kNoDevice = 100, kInvalidDeviceFunction = 98;

struct Dim3 {
  unsigned x, y, z;
};
static_assert(sizeof(Dim3) == 12);

struct LaunchConfig {  // cudaLaunchConfig_t
  Dim3 grid, block;
  size_t shared;
  void* stream;
  void* attributes;
  unsigned count;
};

// name, arguments as words -> cudaError_t
using Handler = Error (*)(const char*, const uint64_t*);

struct Function {
  void** module;
  std::string name;
};

struct Variable {
  void** module;
  std::string name;
  uint64_t size;
};

struct Module {
  const void* fatbin;
};

// Never destroyed: libraries unregister from their own destructors, in any order.
struct State {
  std::mutex mutex;
  std::map<const void*, Function> functions;  // by the address of the host stub
  std::map<const void*, Variable> variables;  // by the address of the host's shadow
  Handler handler = nullptr;
};

State& state() {
  static State* const s = new State;
  return *s;
}

thread_local Error last_error = kSuccess;
thread_local struct {
  Dim3 grid, block;
  size_t shared;
  void* stream;
} pending;

Error note(Error error) {
  if (error != kSuccess) last_error = error;
  return error;
}

uint64_t word(const void* p) { return reinterpret_cast<uint64_t>(p); }
uint64_t word(uint64_t v) { return v; }
uint64_t word(int v) { return static_cast<uint64_t>(static_cast<int64_t>(v)); }
uint64_t word(unsigned v) { return v; }

template <class... T>
Error forward(const char* name, T... values) {
  const uint64_t words[] = {word(values)..., 0};
  Handler handler = state().handler;
  return note(handler ? handler(name, words) : kNoDevice);
}

Error launch(const char* how, const void* function, Dim3 grid, Dim3 block, void** args,
             size_t shared, void* stream) {
  return forward(how, function, grid.x, grid.y, grid.z, block.x, block.y, block.z, args,
                 uint64_t{shared}, stream);
}

}  // namespace

// --- For runtime.py -----------------------------------------------------------------------------

// A new handler is a new process's runtime: no error is left over from the last one.
API void cudart_stub_set_handler(Handler handler) {
  state().handler = handler;
  last_error = kSuccess;
}

// The mangled name that was registered for a host stub, its module's fatbin; null for a stranger.
API const char* cudart_stub_function(const void* host, const void** fatbin) {
  std::lock_guard<std::mutex> lock(state().mutex);
  auto found = state().functions.find(host);
  if (found == state().functions.end()) return nullptr;
  if (fatbin) *fatbin = reinterpret_cast<Module*>(found->second.module)->fatbin;
  return found->second.name.c_str();
}

API const char* cudart_stub_variable(const void* host, uint64_t* size, const void** fatbin) {
  std::lock_guard<std::mutex> lock(state().mutex);
  auto found = state().variables.find(host);
  if (found == state().variables.end()) return nullptr;
  if (size) *size = found->second.size;
  if (fatbin) *fatbin = reinterpret_cast<Module*>(found->second.module)->fatbin;
  return found->second.name.c_str();
}

// For tests: memory that was registered (cudaHostRegister) counts as never written from now on.
API Error cudart_stub_uninitialized(void* address, uint64_t bytes) {
  return forward("cudart_stub_uninitialized", address, bytes);
}

// --- Registration -------------------------------------------------------------------------------

API void** __cudaRegisterFatBinary(void* fatbin) {
  return reinterpret_cast<void**>(new Module{fatbin});
}

API void __cudaRegisterFatBinaryEnd(void**) {}

API void __cudaUnregisterFatBinary(void** module) {
  {
    std::lock_guard<std::mutex> lock(state().mutex);
    for (auto it = state().functions.begin(); it != state().functions.end();)
      it = it->second.module == module ? state().functions.erase(it) : std::next(it);
    for (auto it = state().variables.begin(); it != state().variables.end();)
      it = it->second.module == module ? state().variables.erase(it) : std::next(it);
  }
  delete reinterpret_cast<Module*>(module);
}

API void __cudaRegisterFunction(void** module, const char* host, char*, const char* name, int,
                                void*, void*, void*, void*, int*) {
  std::lock_guard<std::mutex> lock(state().mutex);
  state().functions[host] = {module, name};
}

API void __cudaRegisterVar(void** module, char* host, char*, const char* name, int, size_t size,
                           int, int) {
  std::lock_guard<std::mutex> lock(state().mutex);
  state().variables[host] = {module, name, size};
}

API void __cudaRegisterManagedVar(void** module, void** host, char*, const char* name, int,
                                  size_t size, int, int) {
  std::lock_guard<std::mutex> lock(state().mutex);
  state().variables[host] = {module, name, size};
}

API char __cudaInitModule(void**) { return 1; }

// --- Launches -----------------------------------------------------------------------------------

API unsigned __cudaPushCallConfiguration(Dim3 grid, Dim3 block, size_t shared, void* stream) {
  pending = {grid, block, shared, stream};
  return 0;
}

API Error __cudaPopCallConfiguration(Dim3* grid, Dim3* block, size_t* shared, void* stream) {
  *grid = pending.grid;
  *block = pending.block;
  *shared = pending.shared;
  *static_cast<void**>(stream) = pending.stream;
  return kSuccess;
}

// A kernel's handle is the address of its host stub.
API Error __cudaGetKernel(const void** kernel, const void* host) {
  *kernel = host;
  return kSuccess;
}
API Error cudaGetKernel(const void** kernel, const void* host) {
  return __cudaGetKernel(kernel, host);
}
API Error cudaGetFuncBySymbol(const void** function, const void* host) {
  return __cudaGetKernel(function, host);
}
API Error cudaFuncGetName(const char** name, const void* host) {
  *name = cudart_stub_function(host, nullptr);
  return note(*name ? kSuccess : kInvalidDeviceFunction);
}

API Error cudaLaunchKernel(const void* f, Dim3 grid, Dim3 block, void** args, size_t shared,
                           void* stream) {
  return launch("launch", f, grid, block, args, shared, stream);
}
API Error __cudaLaunchKernel(const void* f, Dim3 grid, Dim3 block, void** args, size_t shared,
                             void* stream) {
  return launch("launch", f, grid, block, args, shared, stream);
}
API Error cudaLaunchCooperativeKernel(const void* f, Dim3 grid, Dim3 block, void** args,
                                      size_t shared, void* stream) {
  return launch("launch_cooperative", f, grid, block, args, shared, stream);
}
API Error cudaLaunchKernelExC(const LaunchConfig* c, const void* f, void** args) {
  if (!c) return note(kInvalidValue);
  return forward("launch_ex", f, c->grid.x, c->grid.y, c->grid.z, c->block.x, c->block.y,
                 c->block.z, args, uint64_t{c->shared}, c->stream, c->attributes, c->count);
}

// --- Errors -------------------------------------------------------------------------------------

API Error cudaGetLastError() {
  Error error = last_error;
  last_error = kSuccess;
  return error;
}
API Error cudaPeekAtLastError() { return last_error; }

namespace {
struct Name {
  Error code;
  const char *name, *text;
};
const Name kNames[] = {
    {0, "cudaSuccess", "no error"},
    {1, "cudaErrorInvalidValue", "invalid argument"},
    {2, "cudaErrorMemoryAllocation", "out of memory"},
    {9, "cudaErrorInvalidConfiguration", "invalid configuration argument"},
    {13, "cudaErrorInvalidSymbol", "invalid device symbol"},
    {98, "cudaErrorInvalidDeviceFunction", "invalid device function"},
    {100, "cudaErrorNoDevice", "no CUDA-capable device is detected"},
    {101, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {209, "cudaErrorNoKernelImageForDevice",
     "no kernel image is available for execution on the device"},
    {400, "cudaErrorInvalidResourceHandle", "invalid resource handle"},
    {600, "cudaErrorNotReady", "device not ready"},
    {700, "cudaErrorIllegalAddress", "an illegal memory access was encountered"},
    {701, "cudaErrorLaunchOutOfResources", "too many resources requested for launch"},
    {719, "cudaErrorLaunchFailure", "unspecified launch failure"},
    {720, "cudaErrorCooperativeLaunchTooLarge", "too many blocks in cooperative launch"},
    {801, "cudaErrorNotSupported", "operation not supported"},
    {900, "cudaErrorStreamCaptureUnsupported", "operation not permitted when stream is capturing"},
    {901, "cudaErrorStreamCaptureInvalidated",
     "operation failed due to a previous error during capture"},
    {903, "cudaErrorStreamCaptureUnmatched", "this capture sequence cannot be ended here"},
    {904, "cudaErrorStreamCaptureUnjoined",
     "the capture sequence contains a fork that was not joined to the primary stream"},
    {906, "cudaErrorStreamCaptureImplicit",
     "a dependency on the legacy default stream is not allowed during capture"},
    {999, "cudaErrorUnknown", "unknown error"},
};
}  // namespace

API const char* cudaGetErrorName(Error error) {
  for (const Name& n : kNames)
    if (n.code == error) return n.name;
  return "unrecognized error code";
}
API const char* cudaGetErrorString(Error error) {
  for (const Name& n : kNames)
    if (n.code == error) return n.text;
  return "unrecognized error code";
}

// --- Everything else is the handler's ------------------------------------------------------------
// The names after `forward` are methods of runtime.EmulatedRuntime's handler.

using P = void*;
using CP = const void*;
using U64 = uint64_t;
#define CALL0(name) \
  API Error name() { return forward(#name); }
#define CALL1(name, A) \
  API Error name(A a) { return forward(#name, a); }
#define CALL2(name, A, B) \
  API Error name(A a, B b) { return forward(#name, a, b); }
#define CALL3(name, A, B, C) \
  API Error name(A a, B b, C c) { return forward(#name, a, b, c); }
#define CALL4(name, A, B, C, D) \
  API Error name(A a, B b, C c, D d) { return forward(#name, a, b, c, d); }
#define CALL5(name, A, B, C, D, E) \
  API Error name(A a, B b, C c, D d, E e) { return forward(#name, a, b, c, d, e); }
#define CALL6(name, A, B, C, D, E, F) \
  API Error name(A a, B b, C c, D d, E e, F f) { return forward(#name, a, b, c, d, e, f); }
#define CALL7(name, A, B, C, D, E, F, G) \
  API Error name(A a, B b, C c, D d, E e, F f, G g) { return forward(#name, a, b, c, d, e, f, g); }
#define CALL8(name, A, B, C, D, E, F, G, H)                \
  API Error name(A a, B b, C c, D d, E e, F f, G g, H h) { \
    return forward(#name, a, b, c, d, e, f, g, h);         \
  }

// Devices
CALL1(cudaGetDeviceCount, P)
CALL1(cudaGetDevice, P)
CALL1(cudaSetDevice, int)
CALL3(cudaDeviceGetAttribute, P, int, int)
#if CUDART_MAJOR == 12
API Error cudaGetDeviceProperties_v2(P to, int device) {
  return forward("cudaGetDeviceProperties_12", to, device);
}
#else
CALL2(cudaGetDeviceProperties, P, int)
#endif
CALL0(cudaDeviceSynchronize)
CALL0(cudaDeviceReset)
CALL1(cudaDriverGetVersion, P)
#if CUDART_MAJOR == 12
API Error cudaRuntimeGetVersion(P to) { return forward("cudaRuntimeGetVersion_12", to); }
#else
CALL1(cudaRuntimeGetVersion, P)
#endif
CALL2(cudaMemGetInfo, P, P)
CALL2(cudaDeviceGetStreamPriorityRange, P, P)
CALL2(cudaDeviceSetLimit, int, U64)
CALL2(cudaDeviceGetLimit, P, int)
CALL1(cudaDeviceSetCacheConfig, int)
CALL3(cudaDeviceCanAccessPeer, P, int, int)

// Memory
CALL2(cudaMalloc, P, U64)
CALL1(cudaFree, P)
CALL3(cudaMallocAsync, P, U64, P)
CALL2(cudaFreeAsync, P, P)
CALL2(cudaMallocHost, P, U64)
CALL3(cudaHostAlloc, P, U64, unsigned)
CALL1(cudaFreeHost, P)
CALL3(cudaMallocManaged, P, U64, unsigned)
CALL4(cudaMallocPitch, P, P, U64, U64)
CALL3(cudaHostRegister, P, U64, unsigned)
CALL1(cudaHostUnregister, P)
CALL3(cudaHostGetDevicePointer, P, P, unsigned)
#if CUDART_MAJOR == 12
API Error cudaPointerGetAttributes(P to, CP p) {
  return forward("cudaPointerGetAttributes_12", to, p);
}
#else
CALL2(cudaPointerGetAttributes, P, CP)
#endif
CALL4(cudaMemcpy, P, CP, U64, int)
CALL5(cudaMemcpyAsync, P, CP, U64, int, P)
CALL7(cudaMemcpy2D, P, U64, CP, U64, U64, U64, int)
CALL8(cudaMemcpy2DAsync, P, U64, CP, U64, U64, U64, int, P)
CALL3(cudaMemset, P, int, U64)
CALL4(cudaMemsetAsync, P, int, U64, P)
CALL5(cudaMemcpyToSymbol, CP, CP, U64, U64, int)
CALL6(cudaMemcpyToSymbolAsync, CP, CP, U64, U64, int, P)
CALL5(cudaMemcpyFromSymbol, P, CP, U64, U64, int)
CALL6(cudaMemcpyFromSymbolAsync, P, CP, U64, U64, int, P)
CALL2(cudaGetSymbolAddress, P, CP)
CALL2(cudaGetSymbolSize, P, CP)
// cudaMemLocation is two ints: one word in a register.
#if CUDART_MAJOR == 12
namespace {
// A device's number as a location: cudaMemLocationTypeDevice, or the host for cudaCpuDeviceId.
U64 location(int device) { return device < 0 ? 2 : 1 | U64(unsigned(device)) << 32; }
}  // namespace
API Error cudaMemPrefetchAsync(CP p, U64 count, int device, P stream) {
  return forward("cudaMemPrefetchAsync", p, count, location(device), 0u, stream);
}
API Error cudaMemPrefetchAsync_v2(CP p, U64 count, U64 to, unsigned flags, P stream) {
  return forward("cudaMemPrefetchAsync", p, count, to, flags, stream);
}
API Error cudaMemAdvise(CP p, U64 count, int advice, int device) {
  return forward("cudaMemAdvise", p, count, advice, location(device));
}
API Error cudaMemAdvise_v2(CP p, U64 count, int advice, U64 to) {
  return forward("cudaMemAdvise", p, count, advice, to);
}
#else
CALL5(cudaMemPrefetchAsync, CP, U64, U64, unsigned, P)
CALL4(cudaMemAdvise, CP, U64, int, U64)
#endif

// Streams and events
CALL1(cudaStreamCreate, P)
CALL2(cudaStreamCreateWithFlags, P, unsigned)
CALL3(cudaStreamCreateWithPriority, P, unsigned, int)
CALL1(cudaStreamDestroy, P)
CALL1(cudaStreamSynchronize, P)
CALL1(cudaStreamQuery, P)
CALL3(cudaStreamWaitEvent, P, P, unsigned)
CALL2(cudaStreamGetFlags, P, P)
CALL2(cudaStreamGetPriority, P, P)
CALL3(cudaLaunchHostFunc, P, P, P)
CALL4(cudaStreamAddCallback, P, P, P, unsigned)
CALL1(cudaEventCreate, P)
CALL2(cudaEventCreateWithFlags, P, unsigned)
CALL2(cudaEventRecord, P, P)
CALL3(cudaEventRecordWithFlags, P, P, unsigned)
CALL1(cudaEventSynchronize, P)
CALL1(cudaEventQuery, P)
CALL3(cudaEventElapsedTime, P, P, P)
CALL1(cudaEventDestroy, P)

// Capture and graphs
CALL2(cudaStreamBeginCapture, P, int)
CALL2(cudaStreamEndCapture, P, P)
CALL2(cudaStreamIsCapturing, P, P)
#if CUDART_MAJOR == 12
CALL3(cudaStreamGetCaptureInfo, P, P, P)
API Error cudaEventElapsedTime_v2(P to, P start, P end) {
  return forward("cudaEventElapsedTime", to, start, end);
}
API Error cudaStreamGetCaptureInfo_v2(P stream, P status, P id, P graph, P nodes, P count) {
  return forward("cudaStreamGetCaptureInfo", stream, status, id, graph, nodes, P{}, count);
}
API Error cudaStreamGetCaptureInfo_v3(P stream, P status, P id, P graph, P nodes, P edges,
                                      P count) {
  return forward("cudaStreamGetCaptureInfo", stream, status, id, graph, nodes, edges, count);
}
#else
CALL7(cudaStreamGetCaptureInfo, P, P, P, P, P, P, P)
#endif
CALL1(cudaThreadExchangeStreamCaptureMode, P)
CALL3(cudaGraphInstantiate, P, P, U64)
CALL3(cudaGraphInstantiateWithFlags, P, P, U64)
CALL2(cudaGraphUpload, P, P)
CALL2(cudaGraphLaunch, P, P)
CALL1(cudaGraphDestroy, P)
CALL1(cudaGraphExecDestroy, P)
CALL3(cudaGraphGetNodes, P, P, P)

// Functions
CALL2(cudaFuncGetAttributes, P, CP)
CALL3(cudaFuncSetAttribute, CP, int, int)
CALL2(cudaFuncSetCacheConfig, CP, int)
CALL4(cudaOccupancyMaxActiveBlocksPerMultiprocessor, P, CP, int, U64)
CALL5(cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags, P, CP, int, U64, unsigned)
CALL4(cudaOccupancyAvailableDynamicSMemPerBlock, P, CP, int, int)
