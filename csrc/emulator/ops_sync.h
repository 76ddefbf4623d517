// What lanes, warps and blocks do together: shuffles, votes, barriers, fences, mbarriers; and
// branches.
#pragma once

#include "ops_memory.h"

namespace emu::EMU_ISA {

// For an operation of the lanes in `members`: true if all that are alive are here. If not, the
// split waits until the others come, or nobody else can run (then `stuck` is set, and it goes on
// without).
constexpr u32 kForce = 1u << 31;

inline bool together(Ctx& c, const Inst& i, u32 members) {
  u32 missing = members & c.warp->live & ~c.mask;
  if (!missing) {
    if (!(c.mask & ~members)) return true;
    if (c.machine->checks & kSync)
      if (Report* r = c.machine->report(c, i, kNotConverged, lowest(c.mask & ~members)))
        r->extra = members;
    return true;
  }
  if (c.warp->step & kForce) {
    c.warp->step &= ~kForce;
    if (c.machine->checks & kSync)
      if (Report* r = c.machine->report(c, i, kNotConverged, lowest(missing))) {
        r->extra = members;
        r->other_thread = c.warp->index * 32 + u32(lowest(c.mask));
        r->other_block = c.block->linear;
      }
    return true;
  }
  // Lanes that this instruction's own guard turned off never come.
  if (c.active & missing & ~c.mask) {
    if (c.machine->checks & kSync)
      if (Report* r = c.machine->report(c, i, kNotConverged, lowest(c.active & missing)))
        r->extra = members;
    return true;
  }
  return false;
}

inline u32 members_of(Ctx& c, s32 o) { return o == -1 ? kFull : reg<u32>(c, o)[lowest(c.mask)]; }

// shfl: o[0] d, o[1] predicate or -1, o[2] a, o[3] b, o[4] c, o[5] membermask; imm the mode
template <int Mode>  // 0 up, 1 down, 2 bfly, 3 idx
int op_shfl(Ctx& c, const Inst& i) {
  u32 members = members_of(c, i.o[5]);
  if (!together(c, i, members)) return kRetry;
  const u32 *a = reg<u32>(c, i.o[2]), *b = reg<u32>(c, i.o[3]), *e = reg<u32>(c, i.o[4]);
  u32 t[32], p = 0, bad = 0, from_[32];
  for (int l = 0; l < 32; l++) {
    u32 lane = u32(l), bval = b[l] & 31, cval = e[l] & 31, seg = (e[l] >> 8) & 31;
    u32 most = (lane & seg) | (cval & ~seg), least = lane & seg, j;
    bool in;
    if (Mode == 0)
      j = lane - bval, in = s32(j) >= s32(most);
    else if (Mode == 1)
      j = lane + bval, in = j <= most;
    else if (Mode == 2)
      j = lane ^ bval, in = j <= most;
    else
      j = least | (bval & ~seg), in = j <= most;
    if (!in) j = lane;
    from_[l] = j;
    t[l] = a[j & 31];
    p |= u32(in) << l;
    if (((c.mask >> l) & 1) && !((c.mask >> j) & 1)) bad |= 1u << l, t[l] = a[l];
  }
  if (bad && (c.machine->checks & kSync))
    if (Report* r = c.machine->report(c, i, kShuffleInactive, lowest(bad)))
      r->extra = from_[lowest(bad)];
  if ((i.flags & kTaint) && c.machine->program.lists[i.taint] == kTaintShuffle) {
    TaintView v = taint_view(c, i);
    u32 old = c.warp->taint[v.s[0]], now = 0;
    for (int l = 0; l < 32; l++) now |= ((old >> (from_[l] & 31)) & 1) << l;
    for (s32 k = 0; k < v.nd; k++) {
      forget_bytes(*c.warp, v.d[k]);
      u32& d = c.warp->taint[v.d[k]];
      d = (d & ~c.mask) | (k == 0 ? now & c.mask : 0);
    }
  }
  if (i.o[0] != -1) blend(reg<u32>(c, i.o[0]), t, c.mask);
  set_pred(c, i.o[1], p);
  return kGo;
}

// vote: o[0] predicate or register, o[1] source predicate (imm & 1 negates), o[2] membermask
template <int Mode>  // 0 all, 1 any, 2 uni, 3 ballot
int op_vote(Ctx& c, const Inst& i) {
  u32 members = members_of(c, i.o[2]);
  if (!together(c, i, members)) return kRetry;
  u32 p = (get_pred(c, i.o[1]) ^ (i.imm & 1 ? kFull : 0)) & c.mask;
  if (Mode == 3) return map_lanes<u32>(c, i.o[0], [=](int) { return p; });
  bool r = Mode == 0 ? p == c.mask : Mode == 1 ? p != 0 : p == 0 || p == c.mask;
  set_pred(c, i.o[0], r ? kFull : 0);
  return kGo;
}
template <class T, bool All>
int op_match(Ctx& c, const Inst& i) {  // o[0] d, o[1] predicate, o[2] a, o[3] membermask
  u32 members = members_of(c, i.o[3]);
  if (!together(c, i, members)) return kRetry;
  const Slot<T>* a = reg<Slot<T>>(c, i.o[2]);
  u32 t[32] = {};
  bool same = true;
  for (u32 m = c.mask; m; m &= m - 1) {
    int l = lowest(m);
    for (u32 k = c.mask; k; k &= k - 1)
      if (a[lowest(k)] == a[l]) t[l] |= 1u << lowest(k);
    same = same && t[l] == c.mask;
  }
  if (All) {
    for (int l = 0; l < 32; l++) t[l] = same ? c.mask : 0;
    set_pred(c, i.o[1], same ? kFull : 0);
  }
  blend(reg<u32>(c, i.o[0]), t, c.mask);
  return kGo;
}
template <class T, auto F>
int op_redux(Ctx& c, const Inst& i) {  // o[0] d, o[1] a, o[2] membermask
  u32 members = members_of(c, i.o[2]);
  if (!together(c, i, members)) return kRetry;
  const Slot<T>* a = reg<Slot<T>>(c, i.o[1]);
  T r = get<T>(a[lowest(c.mask)]);
  for (u32 m = c.mask & (c.mask - 1); m; m &= m - 1) r = F(r, get<T>(a[lowest(m)]));
  Slot<T> v = put<T>(r);
  return map_lanes<T>(c, i.o[0], [=](int) { return v; });
}
inline int op_elect(Ctx& c, const Inst& i) {  // o[0] d or -1, o[1] p, o[2] membermask
  u32 members = members_of(c, i.o[2]);
  if (!together(c, i, members)) return kRetry;
  u32 leader = u32(lowest(c.mask));
  if (i.o[0] != -1) map_lanes<u32>(c, i.o[0], [=](int) { return leader; });
  set_pred(c, i.o[1], 1u << leader);
  return kGo;
}
inline int op_activemask(Ctx& c, const Inst& i) {
  u32 m = c.active;
  return map_lanes<u32>(c, i.o[0], [=](int) { return m; });
}
inline int op_bar_warp(Ctx& c, const Inst& i) {
  if (!together(c, i, members_of(c, i.o[0]))) return kRetry;
  c.warp->clock++;
  return kGo;
}
// Matrix instructions and the like need the whole warp.
inline bool converged(Ctx& c, const Inst& i) { return c.mask == kFull || together(c, i, kFull); }

// ------------------------------------------------------------------------------------------------
// Barriers of a block. o[0] number, o[1] threads (-1: all); imm: bit 0 arrive only, bit 1 aligned,
// bits 4-5 reduction (1 and, 2 or, 3 popc), o[2] its source predicate, o[3] its destination.

inline void finish_barrier(Machine& m, ThreadBlock& b, Barrier& r, u32 number) {
  if (m.checks & kRaces) {
    Clock all{std::vector<u32>(b.warp.size(), 0), {}, nullptr};
    join(all, r.joined);
    for (u32 w = 0; w < b.warp.size(); w++)
      if (r.warps.size() > w && r.warps[w]) {
        join(b.warp[w].seen, all);
        b.warp[w].clock++;
        // What each had fenced before the barrier, any of them may publish after it.
        if (r.has_fenced) {
          if (!b.warp[w].has_fenced)
            b.warp[w].fenced = Clock{std::vector<u32>(b.warp.size(), 0), {}, nullptr};
          join(b.warp[w].fenced, r.fenced);
          b.warp[w].has_fenced = true;
        }
      }
  }
  for (u32 w = 0; w < b.warp.size(); w++)
    if (r.warps.size() > w && r.warps[w])
      for (Split& s : b.warp[w].split)
        if (s.wait == kAtBarrier && s.barrier == number) s.wait = kReady;
  m.woken = true;
  m.launch.totals[2]++;
  r = Barrier{};
}

inline void barrier_results(Machine& m, ThreadBlock& b, Barrier& r, u32 number);

inline bool barrier_complete(Machine& m, const ThreadBlock& b, const Barrier& r) {
  (void)m;
  return r.arrived && r.arrived >= (r.expected ? r.expected : b.live_threads);
}

inline int op_barrier(Ctx& c, const Inst& i) {
  Machine& m = *c.machine;
  ThreadBlock& b = *c.block;
  Warp& w = *c.warp;
  u32 number = reg<u32>(c, i.o[0])[lowest(c.mask)];
  u32 threads = i.o[1] == -1 ? 0 : reg<u32>(c, i.o[1])[lowest(c.mask)];
  if (number > 15 || threads % 32) {
    if (Report* r = m.report(c, i, kBadBarrier, lowest(c.mask), number)) r->extra = threads;
    m.stopped = true;
    return kStop;
  }
  bool aligned = i.imm & 2;
  if (aligned && c.mask != w.live) {
    // Others of the warp may be a few steps behind: an aligned barrier waits for them.
    if (!(w.step & kForce) && !(c.active & w.live & ~c.mask)) return kRetry;
    w.step &= ~kForce;
    if (m.checks & kSync) m.report(c, i, kBarrierDivergent, lowest(w.live & ~c.mask));
  }
  Barrier& r = b.barrier[number];
  if (r.warps.empty()) r.warps.assign(b.warp.size(), 0);
  if (threads) r.expected = threads;
  r.inst = i.id;
  u32 n = u32(std::popcount(c.mask));
  if (c.mask == w.live && aligned && threads) n = 32;  // a partial warp counts as a whole one
  r.arrived += n;
  if (m.checks & kRaces) {
    join(r.joined, m.snapshot(c));
    if (w.has_fenced) join(r.fenced, w.fenced);
    r.has_fenced |= w.has_fenced;
  }
  u32 kind = u32(i.imm >> 4) & 3;
  if (kind) {
    u32 p = (get_pred(c, i.o[2]) ^ (i.imm & 4 ? kFull : 0)) & c.mask;
    r.red_and &= p == c.mask;
    r.red_or |= p != 0;
    r.red_count += u32(std::popcount(p));
    b.red.push_back({&w, &i, c.mask, number});
  }
  if (i.imm & 1) {
    if (m.checks & kRaces) w.clock++;
  } else {
    r.warps[w.index] |= c.mask;
  }
  if (!barrier_complete(m, b, r)) return i.imm & 1 ? kGo : kWaitBarrier;
  bool missing = !r.expected && b.live_threads < m.threads_per_block;
  if (missing && (m.checks & kSync))
    if (Report* q = m.report(c, i, kBarrierMissing, lowest(c.mask)))
      q->extra = m.threads_per_block - b.live_threads;
  barrier_results(m, b, r, number);
  finish_barrier(m, b, r, number);
  return kGo;
}

inline void barrier_results(Machine& m, ThreadBlock& b, Barrier& r, u32 number) {
  for (auto& q : b.red) {
    if (q.number != number) continue;
    const Inst& i = *q.inst;
    u32 kind = u32(i.imm >> 4) & 3;
    u32 v = kind == 1 ? r.red_and : kind == 2 ? r.red_or : r.red_count;
    if (kind == 3) {
      u32 t[32];
      for (u32& x : t) x = v;
      blend(reinterpret_cast<u32*>(q.warp->registers + i.o[3]), t, q.mask);
    } else {
      u32& p = q.warp->pred[i.o[3]];
      p = (p & ~q.mask) | (v ? q.mask : 0);
    }
  }
  std::erase_if(b.red, [&](auto& q) { return q.number == number; });
  (void)m;
}

inline int op_fence_proxy(Ctx& c, const Inst&) {  // fence.proxy.async
  if (!(c.machine->checks & kRaces)) return kGo;
  Warp& w = *c.warp;
  const Clock now = c.machine->snapshot(c);
  w.seen.proxied.resize(now.own.size(), 0);
  for (size_t k = 0; k < now.own.size(); k++)
    w.seen.proxied[k] = std::max(w.seen.proxied[k], now.own[k]);
  w.clock++;
  return kGo;
}

inline int op_fence(Ctx& c, const Inst& i) {  // imm: 0 the block's scope, 1 wider
  Machine& m = *c.machine;
  if (!(m.checks & kRaces)) return kGo;
  if (i.imm) {
    m.fence(c);
  } else {
    // Seen only inside the block: what is published to other blocks stays as it was.
    Warp& w = *c.warp;
    if (w.has_pending) {
      join(w.seen, w.pending);
      w.has_pending = false;
    }
  }
  return kGo;
}

// ------------------------------------------------------------------------------------------------
// wgmma's order. It runs by itself until wgmma.wait_group: meanwhile nobody may touch its registers
// or write to the shared memory that it reads; and a wgmma.fence must lie between other accesses of
// its registers and it. The decoder finds where registers could be touched too early, and puts the
// checks below there and only there: in a program without a doubt none of them is run.

inline AsyncMatrix& begin_matrix(Ctx& c, const Inst& i) {
  Warp& w = *c.warp;
  if (w.matrices_pending == w.matrices.size()) w.matrices.emplace_back();
  AsyncMatrix& x = w.matrices[w.matrices_pending++];
  x.inst = &i;
  x.group = w.matrix_commits;
  x.clock = w.clock++;
  x.seen = w.seen.own;
  x.proxied = w.seen.proxied;
  x.chunk.clear();
  return x;
}

// The groups but the last `keep` are done; `all`: the warp has ended.
inline void land_matrices(Ctx& c, u32 keep, bool all) {
  Warp& w = *c.warp;
  w.matrix_landed = std::max(w.matrix_landed, w.matrix_commits - std::min(keep, w.matrix_commits));
  size_t left = 0;
  for (size_t k = 0; k < w.matrices_pending; k++) {
    if (all || w.matrices[k].group < w.matrix_landed)
      c.machine->race_matrix(c, w.matrices[k]);
    else
      std::swap(w.matrices[left++], w.matrices[k]);
  }
  if (left != w.matrices_pending) w.clock++;
  w.matrices_pending = left;
}

inline int op_wgmma_commit(Ctx& c, const Inst&) {
  c.warp->matrix_commits++;
  return kGo;
}
inline int op_wgmma_wait(Ctx& c, const Inst& i) {
  land_matrices(c, u32(i.imm), false);
  return kGo;
}
inline int op_wgmma_fence(Ctx& c, const Inst&) {
  c.warp->matrix_fence = ++c.warp->matrix_step;
  return kGo;
}
// list: the numbers of n registers
inline u32& register_state(std::vector<u32>& v, s32 number) {
  if (size_t(number) >= v.size()) v.resize(size_t(number) + 1, 0);
  return v[size_t(number)];
}
inline int op_wgmma_issue(Ctx& c, const Inst& i) {
  for (u32 k = 0; k < i.n; k++)
    register_state(c.warp->matrix_flight, c.machine->program.lists[i.list + s32(k)]) =
        c.warp->matrix_commits + 1;
  return kGo;
}
inline int op_wgmma_touch(Ctx& c, const Inst& i) {
  c.warp->matrix_step++;
  for (u32 k = 0; k < i.n; k++)
    register_state(c.warp->matrix_touched, c.machine->program.lists[i.list + s32(k)]) =
        c.warp->matrix_step;
  return kGo;
}
inline int op_wgmma_check_wait(Ctx& c, const Inst& i) {
  if (!(c.machine->checks & kRaces)) return kGo;
  for (u32 k = 0; k < i.n; k++)
    if (register_state(c.warp->matrix_flight, c.machine->program.lists[i.list + s32(k)]) >
        c.warp->matrix_landed) {
      c.machine->report(c, i, kMatrixPending, lowest(c.mask));
      break;
    }
  return kGo;
}
inline int op_wgmma_check_fence(Ctx& c, const Inst& i) {
  if (!(c.machine->checks & kRaces)) return kGo;
  bool bad = !c.warp->matrix_fence;
  for (u32 k = 0; k < i.n; k++)
    bad |= register_state(c.warp->matrix_touched, c.machine->program.lists[i.list + s32(k)]) >
           c.warp->matrix_fence;
  if (bad) c.machine->report(c, i, kMatrixFence, lowest(c.mask));
  return kGo;
}

// ------------------------------------------------------------------------------------------------
// mbarrier: 8 bytes of shared memory. Ours: bit 63 the phase, 20 bits of expected arrivals, 20 of
// pending ones, 22 of pending bytes (signed).

struct Mbar {
  u32 phase, expected, pending;
  s32 tx;
  static Mbar unpack(u64 x) {
    return {u32(x >> 63), u32(x >> 42) & 0xfffff, u32(x >> 22) & 0xfffff, s32(u32(x) << 10) >> 10};
  }
  u64 pack() const {
    return u64(phase) << 63 | u64(expected & 0xfffff) << 42 | u64(pending & 0xfffff) << 22 |
           (u32(tx) & 0x3fffff);
  }
  void settle() {
    if (pending == 0 && tx == 0) {
      phase ^= 1;
      pending = expected;
    }
  }
};

// imm the offset, n the operation; o[0] result, o[1] address, o[2], o[3] operands. Bits of o[5]: 1
// no completion result (sink)
enum MbarOp : u32 {
  kInit,
  kInval,
  kArrive,
  kArriveDrop,
  kTest,
  kTry,
  kTestParity,
  kTryParity,
  kExpect,
  kArriveExpect,
  kComplete,
  kPendingCount,
  kAsyncArrive
};

inline int op_mbarrier(Ctx& c, const Inst& i) {
  Machine& m = *c.machine;
  if (i.n == kPendingCount) {
    const u64* s = reg<u64>(c, i.o[1]);
    return map_lanes<u32>(c, i.o[0], [=](int l) { return Mbar::unpack(s[l]).pending; });
  }
  int next = kGo;
  u64 a[32];
  addresses(c, i, i.o[1], a);
  u32 b[32];
  for (int l = 0; l < 32; l++)
    b[l] = a[l] >> 32 ? (a[l] & kWindowMask) == kSharedWindow ? u32(a[l]) : kFull - 64 : u32(a[l]);
  if (i.n == kAsyncArrive) land_copies(c, 0, true);
  Inst j = i;
  bool waits = i.n >= kTest && i.n <= kTryParity;
  j.flags |= u32(kStrong) | (i.n == kInit ? 0u : waits ? u32(kAcquire) : u32(kRelease));
  Access32 out;
  if (i.n == kInit || i.n == kInval) {
    // Set up by one thread; others must be kept off by a barrier, as for any write.
    j.flags &= ~u32(kStrong);
    touch_shared(c, j, b, 8, c.mask, kWrite, 0, out);
    if (m.checks & kRaces)
      for (u32 k = out.mask; k; k &= k - 1) c.block->locations.erase(b[lowest(k)]);
  } else {
    u32 saved = m.checks;
    touch_shared(c, j, b, 8, c.mask, waits ? kRead : kAtomic, 0, out);
    m.checks = saved;
  }
  u32 p = 0;
  for (u32 k = out.mask; k; k &= k - 1) {
    int l = lowest(k);
    u64 x;
    std::memcpy(&x, out.ptr[l], 8);
    Mbar s = Mbar::unpack(x);
    u64 state = x;
    u32 count = i.o[2] == -1 ? 1 : reg<u32>(c, i.o[2])[l];
    switch (i.n) {
      case kInit:
        s = {0, count, count, 0};
        break;
      case kInval:
        s = {0, 0, 0, 0};
        break;
      case kAsyncArrive:
        // .noinc was accounted for in the barrier's count; without it this adds one first
        if (!i.o[4]) s.pending++;
        s.pending--, s.settle();
        break;
      case kArrive:
        s.pending -= count, s.settle();
        break;
      case kArriveDrop:
        s.pending -= count, s.expected -= count, s.settle();
        break;
      case kExpect:
        s.tx += s32(count);
        break;
      case kArriveExpect:
        s.tx += s32(count), s.pending--, s.settle();
        break;
      case kComplete:
        s.tx -= s32(count), s.settle();
        break;
      case kTest:
      case kTry:
        if (Mbar::unpack(reg<u64>(c, i.o[2])[l]).phase != s.phase) p |= 1u << l;
        break;
      case kTestParity:
      case kTryParity:
        if ((reg<u32>(c, i.o[2])[l] & 1) != s.phase) p |= 1u << l;
        break;
    }
    if (!waits) {
      x = s.pack();
      std::memcpy(out.ptr[l], &x, 8);
      if (i.o[0] != -1 && i.n != kInit && i.n != kInval && i.n != kAsyncArrive)
        reg<u64>(c, i.o[0])[l] = state;
    }
  }
  if (waits) {
    set_pred(c, i.o[0], p);
    if (p != c.mask) next = kYield;
  }
  return next;
}

// ------------------------------------------------------------------------------------------------
// Control

inline int op_bra(Ctx& c, const Inst&) {
  c.taken = c.mask;
  return kBranch;
}
inline int op_brx(Ctx& c, const Inst&) {
  c.taken = c.mask;
  return kMultiway;
}
inline int op_exit(Ctx& c, const Inst&) {
  c.taken = c.mask;
  return kExit;
}
inline int op_trap(Ctx& c, const Inst& i) {
  c.machine->report(c, i, kTrap, lowest(c.mask));
  c.machine->stopped = true;
  return kStop;
}
inline int op_yield(Ctx&, const Inst&) { return kYield; }
inline int op_clock(Ctx& c, const Inst& i) {  // deterministic: instructions so far
  u32 v = u32(c.machine->executed);
  return map_lanes<u32>(c, i.o[0], [=](int) { return v; });
}
inline int op_clock64(Ctx& c, const Inst& i) {
  u64 v = c.machine->executed;
  return map_lanes<u64>(c, i.o[0], [=](int) { return v; });
}

inline void read_local_or_global(Ctx& c, const Inst& i, int lane, u64 address, void* to, u32 size) {
  if ((address & kWindowMask) == kLocalWindow) {
    u32 at = u32(address);
    if (at + u64(size) <= u32(c.machine->program.local_bytes))
      std::memcpy(to, c.warp->local + size_t(lane) * size_t(c.machine->program.local_bytes) + at,
                  size);
    return;
  }
  int r = c.machine->find_region(address, i.id);
  if (r < 0) return;
  const Region& g = c.machine->launch.regions[r];
  if (address - g.base + size <= g.size) std::memcpy(to, g.host + (address - g.base), size);
}

// vprintf: o[0] result, o[1] format, o[2] argument buffer (generic addresses). Understands what
// printf on a device does.
inline int op_printf(Ctx& c, const Inst& i) {
  Machine& m = *c.machine;
  for (u32 k = c.mask; k; k &= k - 1) {
    int l = lowest(k);
    std::string format, text;
    u64 f = reg<u64>(c, i.o[1])[l], args = reg<u64>(c, i.o[2])[l];
    for (char ch = 1; format.size() < 4096;) {
      ch = 0;
      read_local_or_global(c, i, l, f++, &ch, 1);
      if (!ch) break;
      format += ch;
    }
    u64 at = args;
    for (size_t q = 0; q < format.size(); q++) {
      if (format[q] != '%') {
        text += format[q];
        continue;
      }
      size_t end = format.find_first_of("diouxXcsfFeEgGaAp%", q + 1);
      if (end == std::string::npos) break;
      std::string spec = format.substr(q, end - q + 1);
      q = end;
      char conv = spec.back(), out[256];
      if (conv == '%') {
        text += '%';
        continue;
      }
      bool wide = spec.find("ll") != std::string::npos || spec.find('l') != std::string::npos ||
                  spec.find('z') != std::string::npos || conv == 'p' || conv == 's' ||
                  std::strchr("fFeEgGaA", conv);
      u32 size = wide ? 8 : 4;
      at = (at + size - 1) & ~u64(size - 1);
      u64 x = 0;
      read_local_or_global(c, i, l, at, &x, size);
      at += size;
      if (conv == 's') {
        std::string s;
        for (char ch; s.size() < 4096; s += ch) {
          ch = 0;
          read_local_or_global(c, i, l, x++, &ch, 1);
          if (!ch) break;
        }
        std::snprintf(out, sizeof out, spec.c_str(), s.c_str());
      } else if (std::strchr("fFeEgGaA", conv)) {
        std::snprintf(out, sizeof out, spec.c_str(), as_double(x));
      } else if (wide) {
        std::snprintf(out, sizeof out, spec.c_str(), x);
      } else {
        std::snprintf(out, sizeof out, spec.c_str(), u32(x));
      }
      text += out;
    }
    Launch& g = m.launch;
    u64 room = g.print_size - g.print_used, n = std::min<u64>(room, text.size());
    std::memcpy(g.print + g.print_used, text.data(), n);
    g.print_used += n;
  }
  if (i.o[0] != -1) map_lanes<u32>(c, i.o[0], [](int) { return 1u; });
  return kGo;
}
inline int op_assertfail(Ctx& c, const Inst& i) {
  c.machine->report(c, i, kAssert, lowest(c.mask));
  c.machine->stopped = true;
  return kStop;
}

}  // namespace emu::EMU_ISA
