// State of a running launch, and the loops over lanes that operations are made of.
#pragma once

#include <algorithm>
#include <array>
#include <cstring>
#include <deque>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "engine.h"
#include "numeric.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace emu::EMU_ISA {

struct Machine;
struct ThreadBlock;
struct Warp;

// What an operation sees. base[0] is the warp's registers, base[1] the constant pool.
struct Ctx {
  char* base[2];
  u32* pred;
  u32 mask;    // lanes that execute this instruction: active lanes whose guard holds
  u32 active;  // lanes of the warp that are together here
  Warp* warp;
  ThreadBlock* block;
  Machine* machine;
  u32 taken;  // a branch's lanes
};

// Results of an operation: go on, or why not.
enum Next : int { kGo = 0, kBranch, kExit, kWaitBarrier, kRetry, kYield, kStop, kMultiway };

using Fn = int (*)(Ctx&, const Inst&);

struct Named {
  std::string name;
  Fn fn;
};

// Operations register themselves under the name by which Python asks for them.
#define EMU_OP(name, ...) t.push_back({name, __VA_ARGS__})
void integer_ops(std::vector<Named>& t);
void float_ops(std::vector<Named>& t);
void memory_ops(std::vector<Named>& t);
void sync_ops(std::vector<Named>& t);
void matrix_ops(std::vector<Named>& t);

template <class T>
inline T* reg(Ctx& c, s32 o) {
  return reinterpret_cast<T*>(c.base[o & 1] + (o & ~1));
}

// How a type lies in a register: 64-bit lanes for 64-bit types, else 32-bit ones, zero-extended.
template <class T>
using Slot = std::conditional_t<sizeof(T) == 8, u64, u32>;

template <class T>
inline T get(Slot<T> x) {
  if constexpr (std::is_same_v<T, float>)
    return as_float(x);
  else if constexpr (std::is_same_v<T, double>)
    return as_double(x);
  else
    return T(x);
}
template <class T>
inline Slot<T> put(T x) {
  if constexpr (std::is_same_v<T, float>)
    return as_bits(x);
  else if constexpr (std::is_same_v<T, double>)
    return as_bits(x);
  else
    return Slot<T>(std::make_unsigned_t<T>(x));
}

template <class S>
inline void blend(S* d, const S* t, u32 mask) {
#pragma GCC ivdep
  for (int l = 0; l < 32; l++) d[l] = (mask >> l) & 1 ? t[l] : d[l];
}

// d = f(a, b, c) in the lanes of the mask. f maps values to a register's lane.
template <class D, class F>
inline int map_lanes(Ctx& c, s32 od, F f) {
  Slot<D>* d = reg<Slot<D>>(c, od);
  if (c.mask == kFull) [[likely]] {
#pragma GCC ivdep
    for (int l = 0; l < 32; l++) d[l] = f(l);
  } else {
    Slot<D> t[32];
#pragma GCC ivdep
    for (int l = 0; l < 32; l++) t[l] = f(l);
    blend(d, t, c.mask);
  }
  return kGo;
}

template <class D, class A, auto F>
int op1(Ctx& c, const Inst& i) {
  const Slot<A>* a = reg<Slot<A>>(c, i.o[1]);
  return map_lanes<D>(c, i.o[0], [=](int l) -> Slot<D> { return put<D>(F(get<A>(a[l]))); });
}
template <class D, class A, class B, auto F>
int op2(Ctx& c, const Inst& i) {
  const Slot<A>* a = reg<Slot<A>>(c, i.o[1]);
  const Slot<B>* b = reg<Slot<B>>(c, i.o[2]);
  return map_lanes<D>(c, i.o[0],
                      [=](int l) -> Slot<D> { return put<D>(F(get<A>(a[l]), get<B>(b[l]))); });
}
template <class D, class A, class B, class E, auto F>
int op3(Ctx& c, const Inst& i) {
  const Slot<A>* a = reg<Slot<A>>(c, i.o[1]);
  const Slot<B>* b = reg<Slot<B>>(c, i.o[2]);
  const Slot<E>* e = reg<Slot<E>>(c, i.o[3]);
  return map_lanes<D>(c, i.o[0], [=](int l) -> Slot<D> {
    return put<D>(F(get<A>(a[l]), get<B>(b[l]), get<E>(e[l])));
  });
}
template <class D, class A, class B, class E, class G, auto F>
int op4(Ctx& c, const Inst& i) {
  const Slot<A>* a = reg<Slot<A>>(c, i.o[1]);
  const Slot<B>* b = reg<Slot<B>>(c, i.o[2]);
  const Slot<E>* e = reg<Slot<E>>(c, i.o[3]);
  const Slot<G>* g = reg<Slot<G>>(c, i.o[4]);
  return map_lanes<D>(c, i.o[0], [=](int l) -> Slot<D> {
    return put<D>(F(get<A>(a[l]), get<B>(b[l]), get<E>(e[l]), get<G>(g[l])));
  });
}

// A bit for each lane, from 32 words that are 0 or all ones.
inline u32 movemask(const u32* x) {
#if defined(__AVX2__)
  u32 r = 0;
  for (int k = 0; k < 4; k++) {
    __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + 8 * k));
    r |= u32(_mm256_movemask_ps(_mm256_castsi256_ps(v))) << (8 * k);
  }
  return r;
#else
  u32 r = 0;
  for (int l = 0; l < 32; l++) r |= (x[l] >> 31) << l;
  return r;
#endif
}

template <class F>
inline u32 test_lanes(F f) {
  u32 t[32];
#pragma GCC ivdep
  for (int l = 0; l < 32; l++) t[l] = f(l) ? kFull : 0;
  return movemask(t);
}

inline void set_pred(Ctx& c, s32 p, u32 value) {
  if (p >= 0) c.pred[p] = (c.pred[p] & ~c.mask) | (value & c.mask);
}
// A predicate operand: index, or -1 for true, -2 for false; imm bit k negates operand k.
inline u32 get_pred(const Ctx& c, s32 p) { return p >= 0 ? c.pred[p] : p == -1 ? kFull : 0; }

inline int lowest(u32 m) { return std::countr_zero(m); }

// ------------------------------------------------------------------------------------------------
// Warps and blocks

// Lanes that are at the same place. `at` is a basic block; `wait` says what for.
enum Wait : u8 { kReady, kAtBarrier, kAtSync, kDone_ };

struct Split {
  s32 at;
  u32 mask;
  Wait wait;
  u8 barrier;
};

// The pending copies of cp.async: data is kept here until the wait that makes it visible.
struct AsyncCopy {
  u32 mask;
  u32 size;
  u32 id;
  u32 group[32];
  u32 address[32];
  alignas(16) char data[32][16];
};

// Knowledge of other warps' clocks: own block's densely, others' in a shared, immutable map.
using Foreign = std::unordered_map<u32, u32>;
struct Clock {
  std::vector<u32> own;
  std::vector<u32> proxied;  // of own, what a fence.proxy.async shows to wgmma; empty: nothing
  std::shared_ptr<const Foreign> foreign;
};

// A wgmma that was not waited for. Its results are there, but nobody may touch its registers yet,
// and the shared memory that it reads (by chunks of sixteen bytes) is still to be left alone.
struct AsyncMatrix {
  const Inst* inst;
  u32 group, clock;                // of wgmma.commit_group; the warp's when it was issued
  std::vector<u32> seen, proxied;  // what the warp knew then
  std::vector<u32> chunk;
};

struct Warp {
  u32 index = 0;  // in its block
  u32 lanes = 0;  // that exist
  u32 live = 0;   // that have not exited
  std::vector<Split> split;
  s32 current = -1;
  u32 stuck = 0;  // blocks run since splits last met
  u32 step = 0;   // instructions that a Retry has already counted
  char* registers = nullptr;
  u32* pred = nullptr;
  u32* taint = nullptr;
  u32* known = nullptr;  // of each of `taint`, four words: its bytes that are defined all the same
  char* local = nullptr;
  u8* local_state = nullptr;
  u32 carry = 0;
  u32 commit[32] = {};
  std::vector<AsyncCopy> copies;
  std::vector<AsyncMatrix> matrices;  // the first `matrices_pending` are in flight, the rest spare
  size_t matrices_pending = 0;
  u32 matrix_commits = 0, matrix_landed = 0;       // groups of wgmma committed, and waited for
  u32 matrix_step = 0, matrix_fence = 0;           // order of register accesses and wgmma.fence
  std::vector<u32> matrix_touched, matrix_flight;  // by register that some wgmma uses
  // race detection
  u32 clock = 1;
  Clock seen;    // what happened before this warp's next instruction
  Clock fenced;  // as of its last fence: what a relaxed write publishes
  bool has_fenced = false;
  bool written = false;  // a plain write since then
  Clock pending;         // what relaxed reads saw, taken in at the next fence
  bool has_pending = false;
  std::vector<u8> waits;  // scratch
};

struct Barrier {
  u32 arrived = 0;
  u32 expected = 0;  // threads, 0: all of the block
  u32 red_and = 1, red_or = 0, red_count = 0;
  std::vector<u32> warps;  // lanes that wait, by warp
  Clock joined, fenced;
  bool has_fenced = false;
  u32 inst = 0;
};

struct PendingReduction {
  Warp* warp;
  const Inst* inst;
  u32 mask, number;
};

struct SharedRecord {
  u32 write_clock, write_inst;
  u32 read_clock[2], read_inst[2];
  u16 write_warp, read_warp[2];
  u8 write_lane, read_lane[2];
  u8 strong;  // bit 0: the write, 1 and 2: the reads; bit 3: cp.async wrote
};
constexpr u8 kWrittenAsync = 8;

struct ThreadBlock {
  u32 linear = 0, id[3] = {};
  std::vector<Warp> warp;
  char* shared = nullptr;
  u8* shared_state = nullptr;
  std::vector<SharedRecord> records;
  std::vector<char> registers, locals;
  std::vector<u8> local_states;
  std::vector<u32> preds, taints, knowns;
  std::vector<char> shared_memory;
  std::vector<u8> shared_states;
  Barrier barrier[16];
  std::vector<PendingReduction> red;
  std::unordered_map<u32, Clock> locations;  // shared memory used to synchronise
  u32 live_threads = 0, live_warps = 0, exited_unsynced = 0;
  bool done = false;
};

inline void join(Clock& a, const Clock& b) {
  if (a.own.size() < b.own.size()) a.own.resize(b.own.size(), 0);
  for (size_t k = 0; k < b.own.size(); k++) a.own[k] = std::max(a.own[k], b.own[k]);
  if (a.proxied.size() < b.proxied.size()) a.proxied.resize(b.proxied.size(), 0);
  for (size_t k = 0; k < b.proxied.size(); k++) a.proxied[k] = std::max(a.proxied[k], b.proxied[k]);
  if (b.foreign && a.foreign != b.foreign) {
    if (!a.foreign) {
      a.foreign = b.foreign;
    } else {
      const Foreign *big = a.foreign.get(), *small = b.foreign.get();
      bool news = false;
      for (auto& [w, t] : *small) {
        auto it = big->find(w);
        if (it == big->end() || it->second < t) {
          news = true;
          break;
        }
      }
      if (news) {
        auto merged = std::make_shared<Foreign>(*big);
        for (auto& [w, t] : *small) {
          u32& x = (*merged)[w];
          x = std::max(x, t);
        }
        a.foreign = merged;
      }
    }
  }
}

}  // namespace emu::EMU_ISA
