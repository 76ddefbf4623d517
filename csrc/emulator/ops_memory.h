// Loads, stores, atomics, asynchronous copies and matrix loads: every access is checked here.
#pragma once

#include "machine.h"

namespace emu::EMU_ISA {

// The address operand: a register (32 or 64 bits wide: bit 0 of imm2) plus imm.
inline void addresses(Ctx& c, const Inst& i, s32 o, u64* a) {
  if (i.imm2 & 1) {
    const u64* r = reg<u64>(c, o);
    for (int l = 0; l < 32; l++) a[l] = r[l] + u64(i.imm);
  } else {
    const u32* r = reg<u32>(c, o);
    for (int l = 0; l < 32; l++) a[l] = u32(r[l] + u32(i.imm));
  }
}

// Lanes whose address register, guard or (written to global memory) value is undefined.
// Of a value, the third entry and the following, only the bytes that are written.
inline void check_defined(Ctx& c, const Inst& i, const s32* taint, s32 n, u32 bytes = 4) {
  for (s32 k = 0; k < n; k++) {
    if (taint[k] < 0) continue;
    u32 bad = undefined_lanes(*c.warp, taint[k], k < 2 ? 4 : bytes) & c.mask;
    if (bad) {
      if (Report* r = c.machine->report(c, i, kUninitRegister, lowest(bad))) r->extra = u64(k);
      return;
    }
  }
}

// State of shared and local bytes: 1 never written, 2 written, 3 written with an undefined value, 4
// a cp.async is on its way. `undefined`: lanes by word of four bytes, or null.
inline void write_state(u8* s, u32 bytes, int lane, const u32* undefined) {
  std::memset(s, 2, bytes);
  if (!undefined) return;
  for (u32 b = 0; b < bytes; b += 4)
    if ((undefined[b / 4] >> lane) & 1) std::memset(s + b, 3, std::min(4u, bytes - b));
}

struct Access32 {
  u32 mask;       // lanes that may go ahead
  u32 twice;      // lanes that write where an earlier lane of the instruction wrote
  u32 undefined;  // lanes that read something undefined; and by word of the access
  u32 words[8];
  u64 address[32];  // of those in `twice`
  char* ptr[32];
  void mark(int lane, u32 byte) {
    if (!undefined) std::memset(words, 0, sizeof words);
    undefined |= 1u << lane;
    words[byte / 4] |= 1u << lane;
  }
};

inline int highest(u32 m) { return 31 - std::countl_zero(m); }

[[gnu::noinline]] inline void fault(Ctx& c, const Inst& i, u32 kind, int lane, u64 address,
                                    u32 space, u32 size, Access how) {
  c.machine->report(c, i, kind, lane, address, space, size, how != kRead);
}

inline void touch_global(Ctx& c, const Inst& i, const u64* a, u32 bytes, u32 mask, Access how,
                         const u32* undefined, Access32& out) {
  Machine& m = *c.machine;
  out.twice = out.undefined = 0;
  u64 or_all = 0, lo = ~0ull, hi = 0;
  if (mask == kFull) {
    for (int l = 0; l < 32; l++) {
      or_all |= a[l];
      lo = a[l] < lo ? a[l] : lo;
      hi = a[l] > hi ? a[l] : hi;
    }
  } else {
    for (u32 k = mask; k; k &= k - 1) {
      u64 x = a[lowest(k)];
      or_all |= x;
      lo = std::min(lo, x);
      hi = std::max(hi, x);
    }
  }
  u32 ok = mask;
  if (or_all & (bytes - 1)) [[unlikely]]
    for (u32 k = mask; k; k &= k - 1) {
      int l = lowest(k);
      if (a[l] & (bytes - 1)) {
        fault(c, i, kMisaligned, l, a[l], kGlobal, bytes, how);
        ok &= ~(1u << l);
      }
    }
  int at = m.find_region(lo, i.id);
  bool simple = false;
  if (at >= 0) {
    const Region& r = m.launch.regions[at];
    if (hi - r.base + bytes <= r.size && (r.writable || how == kRead)) {
      simple = true;
      char* host = r.host - r.base;
      for (int l = 0; l < 32; l++) out.ptr[l] = host + a[l];
    }
  }
  if (!simple) [[unlikely]]
    for (u32 k = ok; k; k &= k - 1) {
      int l = lowest(k);
      int which = m.find_region(a[l], i.id);
      const Region* r = which < 0 ? nullptr : &m.launch.regions[which];
      if (!r || a[l] - r->base + bytes > r->size) {
        fault(c, i, kOutOfBounds, l, a[l], kGlobal, bytes, how);
        ok &= ~(1u << l);
      } else if (!r->writable && how != kRead) {
        fault(c, i, kReadOnly, l, a[l], kGlobal, bytes, how);
        ok &= ~(1u << l);
      } else {
        out.ptr[l] = r->host + (a[l] - r->base);
      }
    }
  out.mask = ok;
  if (!ok) return;
  if (m.checks) [[unlikely]] {
    if ((m.checks & kCounts) && !(i.flags & kConst)) m.count_global(c, i, a, bytes, ok, how);
    if (m.checks & kUninit)
      for (u32 k = ok; k; k &= k - 1) {
        int l = lowest(k);
        Region& r = m.launch.regions[m.find_region(a[l], i.id)];
        if (!r.initialized) {
          if (simple) break;
          continue;
        }
        u8* s = r.initialized + (a[l] - r.base);
        if (how != kWrite)
          for (u32 b = 0; b < bytes; b++)
            if (!s[b]) {
              fault(c, i, kUninitGlobal, l, a[l], kGlobal, bytes, how);
              std::memset(s, 1, bytes);
              break;
            }
        if (how != kRead) std::memset(s, 1, bytes);
      }
    if ((m.checks & kRaces) && !(i.flags & kConst)) {
      out.twice = m.race_global(c, i, a, bytes, ok, how);
      for (u32 k = out.twice; k; k &= k - 1) out.address[lowest(k)] = a[lowest(k)];
      if (how == kAtomic || (i.flags & kStrong))
        for (u32 k = ok; k; k &= k - 1) m.synchronise(c, i, a[lowest(k)], false, how);
    }
  }
  (void)undefined;
}

inline void touch_shared(Ctx& c, const Inst& i, const u32* a, u32 bytes, u32 mask, Access how,
                         const u32* undefined, Access32& out) {
  Machine& m = *c.machine;
  out.twice = out.undefined = 0;
  u32 ok = mask, total = m.launch.shared_total;
  const u8* map = m.launch.shared_map;
  for (u32 k = mask; k; k &= k - 1) {
    int l = lowest(k);
    u32 x = a[l];
    if (x + u64(bytes) > total || !map[x] || !map[x + bytes - 1]) [[unlikely]] {
      fault(c, i, kOutOfBounds, l, x, kShared, bytes, how);
      ok &= ~(1u << l);
    } else if (x & (bytes - 1)) [[unlikely]] {
      fault(c, i, kMisaligned, l, x, kShared, bytes, how);
      ok &= ~(1u << l);
    } else {
      out.ptr[l] = c.block->shared + x;
    }
  }
  out.mask = ok;
  if (!m.checks || !ok) return;
  if (m.checks & kCounts) m.count_shared(c, i, a, bytes, ok);
  if (m.checks & kRaces) {
    out.twice = m.race_shared(c, i, a, bytes, ok, how);
    for (u32 k = out.twice; k; k &= k - 1) out.address[lowest(k)] = a[lowest(k)];
    if (how == kAtomic || (i.flags & kStrong))
      for (u32 k = ok; k; k &= k - 1) m.synchronise(c, i, a[lowest(k)], true, how);
  }
  if (m.checks & kUninit)
    for (u32 k = ok; k; k &= k - 1) {
      int l = lowest(k);
      u8* s = c.block->shared_state + a[l];
      if (how != kWrite)
        for (u32 b = 0; b < bytes; b++)
          if (s[b] != 2) {
            if (s[b] == 3)
              out.mark(l, b);
            else if (s[b] == 4)
              fault(c, i, kAsyncRead, l, a[l], kShared, bytes, how);
            else if (how == kRead && m.program.followed)
              m.suspect(c, i, l, a[l], bytes), out.mark(l, b);
            else
              fault(c, i, kUninitShared, l, a[l], kShared, bytes, how);
          }
      if (how != kRead) {
        if (s[0] == 4) fault(c, i, kRaceAsync, l, a[l], kShared, bytes, how);
        write_state(s, bytes, l, undefined);
      }
    }
}

inline void touch_local(Ctx& c, const Inst& i, const u32* a, u32 bytes, u32 mask, Access how,
                        const u32* undefined, Access32& out) {
  Machine& m = *c.machine;
  out.twice = out.undefined = 0;
  u32 ok = mask, total = u32(m.program.local_bytes);
  for (u32 k = mask; k; k &= k - 1) {
    int l = lowest(k);
    if (a[l] + u64(bytes) > total) [[unlikely]] {
      fault(c, i, kOutOfBounds, l, a[l], kLocal, bytes, how);
      ok &= ~(1u << l);
    } else if (a[l] & (bytes - 1)) [[unlikely]] {
      fault(c, i, kMisaligned, l, a[l], kLocal, bytes, how);
      ok &= ~(1u << l);
    } else {
      out.ptr[l] = c.warp->local + size_t(l) * total + a[l];
    }
  }
  out.mask = ok;
  if (!m.checks) return;
  if (m.checks & kCounts) {
    Count& n = m.count(i);
    n.requests++;
    n.bytes += u64(std::popcount(ok)) * bytes;
  }
  if (m.checks & kUninit)
    for (u32 k = ok; k; k &= k - 1) {
      int l = lowest(k);
      u8* s = c.warp->local_state + size_t(l) * total + a[l];
      if (how != kWrite)
        for (u32 b = 0; b < bytes; b++) {
          if (s[b] == 3)
            out.mark(l, b);
          else if (s[b] != 2) {
            fault(c, i, kUninitLocal, l, a[l], kLocal, bytes, how);
            break;
          }
        }
      if (how != kRead) write_state(s, bytes, l, undefined);
    }
}

// imm2: bit 0 a 64-bit address register, bits 1-2 the space (0 global, 1 shared, 2 local, 3
// generic). Calls f(Access32&) once for each space that the lanes' addresses are in.
template <class F>
inline void access(Ctx& c, const Inst& i, s32 o, u32 bytes, Access how, const u32* undefined, F f) {
  alignas(64) u64 a[32];
  addresses(c, i, o, a);
  Access32 out;
  u32 space = u32(i.imm2 >> 1) & 3;
  if (space == 0) {
    touch_global(c, i, a, bytes, c.mask, how, undefined, out);
    f(out);
    return;
  }
  alignas(64) u32 b[32];
  if (space == 1 || space == 2) {
    for (int l = 0; l < 32; l++) b[l] = a[l] >> 32 ? kFull - 64 : u32(a[l]);
    if (space == 1)
      touch_shared(c, i, b, bytes, c.mask, how, undefined, out);
    else
      touch_local(c, i, b, bytes, c.mask, how, undefined, out);
    f(out);
    return;
  }
  u32 in[3] = {0, 0, 0};
  for (u32 k = c.mask; k; k &= k - 1) {
    int l = lowest(k);
    u64 w = a[l] & kWindowMask;
    in[w == kSharedWindow ? 1 : w == kLocalWindow ? 2 : 0] |= 1u << l;
    b[l] = u32(a[l]);
  }
  for (int s = 0; s < 3; s++) {
    if (!in[s]) continue;
    if (s == 0)
      touch_global(c, i, a, bytes, in[0], how, undefined, out);
    else if (s == 1)
      touch_shared(c, i, b, bytes, in[1], how, undefined, out);
    else
      touch_local(c, i, b, bytes, in[2], how, undefined, out);
    f(out);
  }
}

// Undefined lanes of registers listed for taint: lists + taint is [kind, nd, d..., ns, s...]; for
// loads s are (address, guard); for stores (address, guard, values...).
struct TaintView {
  const s32 *d, *s;
  s32 nd, ns;
};
inline TaintView taint_view(Ctx& c, const Inst& i) {
  const s32* p = c.machine->program.lists + i.taint;
  TaintView v;
  v.nd = p[1];
  v.d = p + 2;
  v.ns = p[2 + v.nd];
  v.s = v.d + v.nd + 1;
  return v;
}

template <class T, class S>
inline S extend(T x) {
  if constexpr (std::is_signed_v<T>)
    return S(std::make_signed_t<S>(x));
  else
    return S(x);
}

// ld: list holds the n destinations.
template <class T, class S>
int op_ld(Ctx& c, const Inst& i) {
  const s32* list = c.machine->program.lists + i.list;
  u32 n = i.n;
  bool taint = i.flags & kTaint;
  if (taint) {
    TaintView v = taint_view(c, i);
    check_defined(c, i, v.s, v.ns);
    for (s32 k = 0; k < v.nd; k++)
      if (v.d[k] >= 0) c.warp->taint[v.d[k]] &= ~c.mask;
  }
  access(c, i, i.o[1], sizeof(T) * n, kRead, 0, [&](const Access32& a) {
    for (u32 k = 0; k < n; k++) {
      if (list[k] < 0) continue;  // the sink "_"
      S* d = reg<S>(c, list[k]);
      if (a.mask == kFull) {
        for (int l = 0; l < 32; l++) {
          T x;
          std::memcpy(&x, a.ptr[l] + k * sizeof(T), sizeof(T));
          d[l] = extend<T, S>(x);
        }
      } else {
        for (u32 m = a.mask; m; m &= m - 1) {
          int l = lowest(m);
          T x;
          std::memcpy(&x, a.ptr[l] + k * sizeof(T), sizeof(T));
          d[l] = extend<T, S>(x);
        }
      }
    }
    const Inst& f = c.machine->as_followed(i);
    if (a.undefined && (f.flags & kTaint)) {
      TaintView v = taint_view(c, f);  // an entry a destination, two for 64 bits
      constexpr u32 per = sizeof(S) / 4;
      for (s32 k = 0; k < v.nd; k++)
        if (v.d[k] >= 0) {
          forget_bytes(*c.warp, v.d[k]);
          c.warp->taint[v.d[k]] |= a.words[(u32(k) / per * sizeof(T) + u32(k) % per * 4) / 4 %
                                           (sizeof(T) * n > 4 ? 8 : 1)];
        }
    }
  });
  return kGo;
}

template <class T, class S>
int op_st(Ctx& c, const Inst& i) {
  const s32* list = c.machine->program.lists + i.list;
  u32 n = i.n, words[8] = {};
  const u32* undefined = nullptr;
  if (i.flags & kTaint) {
    TaintView v = taint_view(c, i);
    bool global = ((i.imm2 >> 1) & 3) == 0;
    check_defined(c, i, v.s, global ? v.ns : 2, sizeof(T));
    if (!global) {
      constexpr u32 per = sizeof(Slot<S>) / 4;  // entries a value
      for (s32 k = 2; k < v.ns; k++)
        if (v.s[k] >= 0) {
          words[(u32(k - 2) / per * sizeof(T) + u32(k - 2) % per * 4) / 4] |=
              undefined_lanes(*c.warp, v.s[k], sizeof(T));
          undefined = words;
        }
    }
  }
  const Slot<S>* src[8];
  for (u32 k = 0; k < n; k++) src[k] = reg<Slot<S>>(c, list[k]);
  Machine& machine = *c.machine;
  machine.comparing = !(i.flags & kStrong);
  access(c, i, i.o[1], sizeof(T) * n, kWrite, undefined, [&](const Access32& a) {
    machine.comparing = false;
    for (u32 m = a.mask; m; m &= m - 1) {
      int l = lowest(m);
      for (u32 k = 0; k < n; k++) {
        T x = T(src[k][l]);
        if (a.twice >> l & 1) [[unlikely]] {
          T old;
          std::memcpy(&old, a.ptr[l] + k * sizeof(T), sizeof(T));
          if (old != x) {
            u32 size = u32(sizeof(T)) * n;
            u32 space = (i.imm2 >> 1 & 3) == 1 ? kShared : kGlobal, rival = machine.rival[l];
            if (space == kShared && rival != 0) {
              machine.shared_race(c, i, l, u32(a.address[l]), size, true, kRaceShared,
                                  (rival - 1) / 32, (rival - 1) % 32, i.id);
            } else if (Report* r =
                           machine.report(c, i, kRaceWarp, l, a.address[l], space, size, true)) {
              r->other_inst = i.id, r->extra = 1;
            }
          }
        }
        std::memcpy(a.ptr[l] + k * sizeof(T), &x, sizeof(T));
      }
    }
  });
  return kGo;
}

// Parameters of the kernel, the same for all lanes: imm is the offset.
template <class T, class S>
int op_ld_param(Ctx& c, const Inst& i) {
  T x;
  std::memcpy(&x, c.machine->launch.params + i.imm, sizeof(T));
  S v = extend<T, S>(x);
  return map_lanes<S>(c, i.o[0], [=](int) { return v; });
}

// ------------------------------------------------------------------------------------------------
// Atomics: o[0] destination (-1: red), o[1] address, o[2], o[3] operands; lanes go in order.

template <class T>
inline T value_of(Slot<T> x) {
  return get<T>(x);
}

template <class T, auto F>
int op_atom(Ctx& c, const Inst& i) {
  const Slot<T>* b = reg<Slot<T>>(c, i.o[2]);
  Slot<T>* d = i.o[0] == -1 ? nullptr : reg<Slot<T>>(c, i.o[0]);
  if (i.flags & kTaint) {
    TaintView v = taint_view(c, i);
    check_defined(c, i, v.s, v.ns);
    for (s32 k = 0; k < v.nd; k++) c.warp->taint[v.d[k]] &= ~c.mask;
  }
  access(c, i, i.o[1], sizeof(T), kAtomic, 0, [&](const Access32& a) {
    for (u32 m = a.mask; m; m &= m - 1) {
      int l = lowest(m);
      T old;
      std::memcpy(&old, a.ptr[l], sizeof(T));
      T x = F(old, get<T>(b[l]));
      std::memcpy(a.ptr[l], &x, sizeof(T));
      if (d) d[l] = put<T>(old);
    }
  });
  return kGo;
}
template <class T>
int op_atom_cas(Ctx& c, const Inst& i) {
  const Slot<T>*b = reg<Slot<T>>(c, i.o[2]), *e = reg<Slot<T>>(c, i.o[3]);
  Slot<T>* d = i.o[0] == -1 ? nullptr : reg<Slot<T>>(c, i.o[0]);
  if (i.flags & kTaint) {
    TaintView v = taint_view(c, i);
    check_defined(c, i, v.s, v.ns);
    for (s32 k = 0; k < v.nd; k++) c.warp->taint[v.d[k]] &= ~c.mask;
  }
  bool failed = false;
  access(c, i, i.o[1], sizeof(T), kAtomic, 0, [&](const Access32& a) {
    for (u32 m = a.mask; m; m &= m - 1) {
      int l = lowest(m);
      T old, want = T(b[l]), x = T(e[l]);
      std::memcpy(&old, a.ptr[l], sizeof(T));
      if (old == want)
        std::memcpy(a.ptr[l], &x, sizeof(T));
      else
        failed = true;
      if (d) d[l] = put<T>(old);
    }
  });
  return kGo;
}

// Vector reductions (red.global.v2.f32 and kin): list holds the n operands.
template <class T, auto F>
int op_red_vector(Ctx& c, const Inst& i) {
  const s32* list = c.machine->program.lists + i.list;
  u32 n = i.n;
  access(c, i, i.o[1], sizeof(T) * n, kAtomic, 0, [&](const Access32& a) {
    for (u32 m = a.mask; m; m &= m - 1) {
      int l = lowest(m);
      for (u32 k = 0; k < n; k++) {
        T old, b = get<T>(reg<Slot<T>>(c, list[k])[l]);
        std::memcpy(&old, a.ptr[l] + k * sizeof(T), sizeof(T));
        T x = F(old, b);
        std::memcpy(a.ptr[l] + k * sizeof(T), &x, sizeof(T));
      }
    }
  });
  return kGo;
}

template <class H>
inline u32 add2(u32 a, u32 b) {
  return h_add<H>(a & 0xffff, b & 0xffff) | h_add<H>(a >> 16, b >> 16) << 16;
}
template <class H, bool Max>
inline u32 minmax2(u32 a, u32 b) {
  return h_minmax<H, Max, false>(a & 0xffff, b & 0xffff) | h_minmax<H, Max, false>(a >> 16, b >> 16)
                                                               << 16;
}

// ------------------------------------------------------------------------------------------------
// Address spaces

// cvta: imm is added in the lanes whose address is not null (to generic) or taken away (from it)
inline int op_cvta(Ctx& c, const Inst& i) {
  const u64* a = reg<u64>(c, i.o[1]);
  u64 w = u64(i.imm);
  return map_lanes<u64>(c, i.o[0], [=](int l) { return a[l] + w; });
}
inline int op_cvta32(Ctx& c, const Inst& i) {
  const u32* a = reg<u32>(c, i.o[1]);
  u64 w = u64(i.imm);
  return map_lanes<u64>(c, i.o[0], [=](int l) { return a[l] + w; });
}
inline int op_isspacep(Ctx& c, const Inst& i) {  // imm: the window, 0 for global
  const u64* a = reg<u64>(c, i.o[1]);
  u32 r = 0;
  for (int l = 0; l < 32; l++) r |= u32((a[l] & kWindowMask) == u64(i.imm)) << l;
  set_pred(c, i.o[0], r);
  return kGo;
}
// mapa, for a cluster of one block: the same address
// ------------------------------------------------------------------------------------------------
// cp.async: o[1] shared address, o[2] global address, o[3] bytes to read (-1: all), n the size.
// imm offset of the shared address, imm2 as in access() for it; o[4] low: offset of the global one.

inline void read_source(Ctx& c, const Inst& i, AsyncCopy& e, s32 o_global, s64 offset,
                        const u32* take, u32 mask) {
  // Lanes by how much they read: usually all, or nothing.
  for (u32 left = mask; left;) {
    u32 size = take[lowest(left)], same = 0;
    for (u32 m = left; m; m &= m - 1)
      if (take[lowest(m)] == size) same |= 1u << lowest(m);
    left &= ~same;
    if (size == 0) continue;
    Inst j = i;
    j.imm = offset;
    j.imm2 = 1;
    u64 a[32];
    addresses(c, j, o_global, a);
    u32 step = size & (0 - size);  // the widest access that is aligned for a partial read
    if (size == i.n) step = size;
    for (u32 at = 0; at < size; at += step) {
      Access32 out;
      u64 b[32];
      for (int l = 0; l < 32; l++) b[l] = a[l] + at;
      touch_global(c, j, b, step, same, kRead, 0, out);
      for (u32 m = out.mask; m; m &= m - 1)
        std::memcpy(e.data[lowest(m)] + at, out.ptr[lowest(m)], step);
    }
  }
}

inline int op_cp_async(Ctx& c, const Inst& i) {
  Warp& w = *c.warp;
  Machine& m = *c.machine;
  if (i.flags & kTaint) {
    TaintView v = taint_view(c, i);
    check_defined(c, i, v.s, v.ns);
  }
  AsyncCopy e;
  e.mask = c.mask;
  e.size = i.n;
  e.id = i.id;
  std::memset(e.data, 0, sizeof e.data);
  u64 a[32];
  addresses(c, i, i.o[1], a);
  for (int l = 0; l < 32; l++) {
    e.address[l] =
        a[l] >> 32 ? (a[l] & kWindowMask) == kSharedWindow ? u32(a[l]) : kFull - 64 : u32(a[l]);
    e.group[l] = w.commit[l];
  }
  u32 take[32];
  const u32* given = i.o[3] == -1 ? nullptr : reg<u32>(c, i.o[3]);
  for (int l = 0; l < 32; l++) take[l] = given ? std::min(given[l], i.n) : i.n;
  if (i.o[5] != -1) {  // ignore-src
    u32 p = get_pred(c, i.o[5]);
    for (int l = 0; l < 32; l++)
      if ((p >> l) & 1) take[l] = 0;
  }
  read_source(c, i, e, i.o[2], m.program.lists[i.list], take, c.mask);
  Access32 out;
  u32 saved = m.checks;
  m.checks &= ~u32(kUninit);
  touch_shared(c, i, e.address, i.n, c.mask, kWrite, 0, out);
  m.checks = saved;
  e.mask = out.mask;
  if (m.checks & kUninit)
    for (u32 k = out.mask; k; k &= k - 1) {
      u8* s = c.block->shared_state + e.address[lowest(k)];
      if (s[0] == 4) fault(c, i, kRaceAsync, lowest(k), e.address[lowest(k)], kShared, i.n, kWrite);
      std::memset(s, 4, i.n);
    }
  if (e.mask) w.copies.push_back(e);
  return kGo;
}

// Lets the copies land whose group is at least `keep` commits old, in the lanes of the mask.
inline void land_copies(Ctx& c, u32 keep, bool all) {
  Warp& w = *c.warp;
  Machine& m = *c.machine;
  size_t kept = 0;
  for (size_t k = 0; k < w.copies.size(); k++) {
    AsyncCopy& e = w.copies[k];
    u32 now = 0;
    for (u32 b = e.mask & c.mask; b; b &= b - 1) {
      int l = lowest(b);
      if (all || e.group[l] + keep < w.commit[l]) now |= 1u << l;
    }
    for (u32 b = now; b; b &= b - 1) {
      int l = lowest(b);
      std::memcpy(c.block->shared + e.address[l], e.data[l], e.size);
      if (m.checks & kUninit) std::memset(c.block->shared_state + e.address[l], 2, e.size);
    }
    if (now && (m.checks & kRaces)) {
      const u32 g = u32(m.program.shared_granule);
      for (u32 b = now; b; b &= b - 1) {
        int l = lowest(b);
        for (u32 q = e.address[l] / g; q <= (e.address[l] + e.size - 1) / g; q++) {
          SharedRecord& r = c.block->records[q];
          r.write_clock = w.clock, r.write_warp = u16(w.index), r.write_lane = u8(l);
          r.write_inst = e.id, r.strong = kWrittenAsync;
        }
      }
    }
    e.mask &= ~now;
    if (e.mask) {
      if (kept != k) w.copies[kept] = e;
      kept++;
    }
  }
  w.copies.resize(kept);
}
inline int op_cp_async_commit(Ctx& c, const Inst&) {
  for (u32 k = c.mask; k; k &= k - 1) c.warp->commit[lowest(k)]++;
  return kGo;
}
inline int op_cp_async_wait(Ctx& c, const Inst& i) {
  if (!c.warp->copies.empty()) land_copies(c, u32(i.imm), false);
  return kGo;
}
inline int op_cp_async_wait_all(Ctx& c, const Inst&) {
  if (!c.warp->copies.empty()) land_copies(c, 0, true);
  return kGo;
}

// ------------------------------------------------------------------------------------------------
// ldmatrix, stmatrix: n matrices of 8 x 8 halves; lanes 8k .. 8k + 7 hold the row addresses of
// matrix k. list: the registers. imm bit 62: transposed (kept in o[5]).

template <bool Store>
int op_matrix(Ctx& c, const Inst& i) {
  Machine& m = *c.machine;
  const s32* list = m.program.lists + i.list;
  u32 n = i.n;
  bool trans = i.o[5];
  u64 a[32];
  addresses(c, i, i.o[1], a);
  u32 b[32], rows = n == 4 ? kFull : (1u << (8 * n)) - 1;
  if (c.mask != c.warp->lanes || c.mask != kFull) {
    if (m.checks & kSync) m.report(c, i, kNotConverged, lowest(c.mask));
  }
  for (int l = 0; l < 32; l++)
    b[l] = a[l] >> 32 ? (a[l] & kWindowMask) == kSharedWindow ? u32(a[l]) : kFull - 64 : u32(a[l]);
  u32 mis = 0;
  for (u32 k = rows; k; k &= k - 1)
    if (b[lowest(k)] & 15) mis |= 1u << lowest(k);
  if (mis) {
    m.report(c, i, kMatrixRow, lowest(mis), b[lowest(mis)], kShared, 16, Store);
    rows &= ~mis;
  }
  Access32 out{};
  u32 undefined = 0;
  if (i.flags & kTaint) {
    TaintView v = taint_view(c, i);
    check_defined(c, i, v.s, 2);
    if (Store)
      for (s32 k = 2; k < v.ns; k++)
        if (v.s[k] >= 0) undefined |= c.warp->taint[v.s[k]];
    for (s32 k = 0; k < v.nd; k++)
      if (v.d[k] >= 0) c.warp->taint[v.d[k]] &= ~c.mask;
  }
  // For undefinedness all that stmatrix stores is taken as a whole.
  const u32 whole[4] = {kFull, kFull, kFull, kFull};
  touch_shared(c, i, b, 16, rows, Store ? kWrite : kRead, undefined ? whole : nullptr, out);
  for (u32 k = 0; k < n; k++) {
    u16 tile[8][8];
    u32* r = reg<u32>(c, list[k]);
    if (Store) {
      for (int l = 0; l < 32; l++)
        for (int h = 0; h < 2; h++) {
          u16 x = u16(r[l] >> (16 * h));
          if (trans)
            tile[2 * (l & 3) + h][l >> 2] = x;
          else
            tile[l >> 2][2 * (l & 3) + h] = x;
        }
      for (int row = 0; row < 8; row++)
        if ((out.mask >> (8 * k + row)) & 1) std::memcpy(out.ptr[8 * k + row], tile[row], 16);
    } else {
      for (int row = 0; row < 8; row++) {
        if ((out.mask >> (8 * k + row)) & 1)
          std::memcpy(tile[row], out.ptr[8 * k + row], 16);
        else
          std::memset(tile[row], 0, 16);
      }
      u32 t[32];
      for (int l = 0; l < 32; l++)
        t[l] = trans ? u32(tile[2 * (l & 3)][l >> 2]) | u32(tile[2 * (l & 3) + 1][l >> 2]) << 16
                     : u32(tile[l >> 2][2 * (l & 3)]) | u32(tile[l >> 2][2 * (l & 3) + 1]) << 16;
      blend(r, t, c.mask);
      const Inst& f = m.as_followed(i);
      if (out.undefined && (f.flags & kTaint)) {
        TaintView v = taint_view(c, f);
        u32 bits = 0;
        for (int row = 0; row < 8; row++)
          for (int word = 0; word < 4; word++)  // columns 2 word and the next
            if ((out.words[word] >> (8 * k + row)) & 1)
              bits |= trans ? 0x11u << (row / 2 + 8 * word) : 1u << (4 * row + word);
        if (v.d[k] >= 0) {
          forget_bytes(*c.warp, v.d[k]);
          c.warp->taint[v.d[k]] |= bits;
        }
      }
    }
  }
  return kGo;
}

// Prefetches and the like name an address and touch nothing.

}  // namespace emu::EMU_ISA
