// The scheduler: blocks come and go, warps take turns, lanes part and meet again.
//
// A warp is a set of splits: lanes that are at the same basic block. Of those that can run, the one
// at the earliest block does (the decoder orders blocks so that a loop's body comes before what
// follows the loop): lanes that wait at a later block are met there by the others, which is the
// reconvergence of a stack at immediate post-dominators for structured code, and right for any
// other. A split that is passed over for long gets its turn regardless, so lanes may wait for each
// other in a spin.
#include "ops_sync.h"

#include "variants.h"

namespace emu::EMU_ISA {

namespace {

const std::vector<Named>& table() {
  static const std::vector<Named> t = [] {
    std::vector<Named> v;
    integer_ops(v);
    float_ops(v);
    memory_ops(v);
    sync_ops(v);
    matrix_ops(v);
    return v;
  }();
  return t;
}

enum SpecialKind : s32 {
  kTidX,
  kTidY,
  kTidZ,
  kNtidX,
  kNtidY,
  kNtidZ,
  kCtaidX,
  kCtaidY,
  kCtaidZ,
  kNctaidX,
  kNctaidY,
  kNctaidZ,
  kLaneId,
  kWarpId,
  kNwarpId,
  kSmId,
  kNsmId,
  kGridId,
  kLaneEq,
  kLaneLt,
  kLaneLe,
  kLaneGt,
  kLaneGe,
  kDynamicShared,
  kTotalShared,
  kZero64,
};

struct Engine {
  Machine m;
  std::vector<std::unique_ptr<ThreadBlock>> resident, spare;
  std::vector<std::pair<ThreadBlock*, u32>> ready;
  std::vector<u32> order;  // of blocks
  u64 next_block = 0, n_blocks = 0, finished = 0;
  u32 window = 0;

  Engine(const Program& p, Launch& l) : m(p, l) {}

  void fill(Warp& w, const ThreadBlock& b) {
    const Launch& g = m.launch;
    for (s32 k = 0; k < m.program.n_special; k++) {
      const Special& s = m.program.special[k];
      u32* r = reinterpret_cast<u32*>(w.registers + s.offset);
      for (u32 l = 0; l < 32; l++) {
        u32 t = w.index * 32 + l, v = 0;
        switch (s.kind) {
          case kTidX:
            v = t % g.block[0];
            break;
          case kTidY:
            v = t / g.block[0] % g.block[1];
            break;
          case kTidZ:
            v = t / (g.block[0] * g.block[1]);
            break;
          case kNtidX:
            v = g.block[0];
            break;
          case kNtidY:
            v = g.block[1];
            break;
          case kNtidZ:
            v = g.block[2];
            break;
          case kCtaidX:
            v = b.id[0];
            break;
          case kCtaidY:
            v = b.id[1];
            break;
          case kCtaidZ:
            v = b.id[2];
            break;
          case kNctaidX:
            v = g.grid[0];
            break;
          case kNctaidY:
            v = g.grid[1];
            break;
          case kNctaidZ:
            v = g.grid[2];
            break;
          case kLaneId:
            v = l;
            break;
          case kWarpId:
            v = w.index;
            break;
          case kNwarpId:
            v = m.warps_per_block;
            break;
          case kSmId:
            v = b.linear % std::max(1u, g.smid_count);
            break;
          case kNsmId:
            v = g.smid_count;
            break;
          case kGridId:
            v = 1;
            break;
          case kLaneEq:
            v = 1u << l;
            break;
          case kLaneLt:
            v = (1u << l) - 1;
            break;
          case kLaneLe:
            v = (2u << l) - 1;
            break;
          case kLaneGt:
            v = ~((2u << l) - 1);
            break;
          case kLaneGe:
            v = ~((1u << l) - 1);
            break;
          case kDynamicShared:
            v = g.dynamic_shared;
            break;
          case kTotalShared:
            v = g.static_shared + g.dynamic_shared;
            break;
        }
        if (s.kind == kZero64 || s.kind == kGridId)
          reinterpret_cast<u64*>(r)[l] = v;
        else
          r[l] = v;
      }
    }
  }

  void admit() {
    std::unique_ptr<ThreadBlock> owned;
    if (!spare.empty()) {
      owned = std::move(spare.back());
      spare.pop_back();
    } else {
      owned = std::make_unique<ThreadBlock>();
    }
    ThreadBlock& b = *owned;
    const Launch& g = m.launch;
    const Program& p = m.program;
    u32 n = m.warps_per_block;
    b.linear = order.empty() ? (g.block_list ? g.block_list[next_block] : u32(next_block))
                             : order[next_block];
    next_block++;
    b.id[0] = b.linear % g.grid[0];
    b.id[1] = b.linear / g.grid[0] % g.grid[1];
    b.id[2] = b.linear / (g.grid[0] * g.grid[1]);
    b.live_threads = m.threads_per_block;
    b.live_warps = n;
    b.done = false;
    b.locations.clear();
    b.red.clear();
    for (Barrier& r : b.barrier) r = Barrier{};
    size_t taint = size_t(p.register_bytes) / 128 + size_t(p.n_pred);
    b.registers.resize(size_t(p.register_bytes) * n + 64);
    b.preds.assign(size_t(p.n_pred) * n + 1, 0);
    if (p.has_taint) {
      b.taints.assign(taint * n, 0);
      b.knowns.assign(4 * taint * n, 0);
      for (u32 w = 0; w < n; w++)
        for (s32 k = 0; k < p.n_taint_init; k++)
          b.taints[w * taint + size_t(p.taint_init[k])] = kFull;
    }
    b.shared_memory.resize(g.shared_total + 16);
    b.shared = b.shared_memory.data();
    // Shared memory starts as a pattern that a kernel relying on zeros trips over.
    std::memset(b.shared, 0xcd, g.shared_total);
    if (m.checks & kUninit) {
      b.shared_states.assign(g.shared_total + 16, 1);
      b.shared_state = b.shared_states.data();
    }
    if (m.checks & kRaces) {
      b.records.resize(g.shared_total / size_t(p.shared_granule) + 4);
      std::memset(static_cast<void*>(b.records.data()), 0, b.records.size() * sizeof(SharedRecord));
    }
    if (p.local_bytes) {
      b.locals.resize(size_t(p.local_bytes) * 32 * n);
      if (m.checks & kUninit) b.local_states.assign(size_t(p.local_bytes) * 32 * n, 1);
    }
    b.warp.resize(n);
    char* registers = b.registers.data();
    registers += (64 - (reinterpret_cast<uintptr_t>(registers) & 63)) & 63;
    for (u32 k = 0; k < n; k++) {
      Warp& w = b.warp[k];
      w.index = k;
      u32 count = std::min(32u, m.threads_per_block - 32 * k);
      w.lanes = w.live = count == 32 ? kFull : (1u << count) - 1;
      w.split.assign(1, Split{0, w.live, kReady, 0});
      w.current = 0;
      w.stuck = w.step = w.carry = 0;
      w.registers = registers + size_t(p.register_bytes) * k;
      w.pred = b.preds.data() + size_t(p.n_pred) * k;
      w.taint = p.has_taint ? b.taints.data() + taint * k : nullptr;
      w.known = p.has_taint ? b.knowns.data() + 4 * taint * k : nullptr;
      w.local = p.local_bytes ? b.locals.data() + size_t(p.local_bytes) * 32 * k : nullptr;
      w.local_state =
          b.local_states.empty() ? nullptr : b.local_states.data() + size_t(p.local_bytes) * 32 * k;
      std::memset(w.commit, 0, sizeof w.commit);
      w.copies.clear();
      w.matrices_pending = 0;
      w.matrix_commits = w.matrix_landed = w.matrix_step = w.matrix_fence = 0;
      w.matrix_touched.clear();
      w.matrix_flight.clear();
      w.clock = 1;
      w.has_fenced = w.has_pending = w.written = false;
      if (m.checks & kRaces) w.seen = Clock{std::vector<u32>(n, 0), {}, nullptr};
      fill(w, b);
    }
    for (u32 k = 0; k < n; k++) ready.push_back({&b, k});
    resident.push_back(std::move(owned));
    m.launch.totals[0]++;
    m.launch.totals[1] += m.threads_per_block;
  }

  // Which split of the warp runs next; -1 if none can.
  s32 choose(Warp& w) {
    // Merge splits at the same place.
    for (size_t k = 0; k < w.split.size(); k++)
      for (size_t j = k + 1; j < w.split.size();) {
        if (w.split[j].at == w.split[k].at && w.split[j].wait != kAtBarrier &&
            w.split[k].wait != kAtBarrier) {
          w.split[k].mask |= w.split[j].mask;
          w.split[k].wait = kReady;
          w.split.erase(w.split.begin() + s64(j));
          w.stuck = 0;
        } else {
          j++;
        }
      }
    s32 best = -1;
    size_t n_ready = 0;
    for (size_t k = 0; k < w.split.size(); k++)
      if (w.split[k].wait == kReady) {
        n_ready++;
        if (best < 0 || w.split[k].at < w.split[size_t(best)].at) best = s32(k);
      }
    if (n_ready > 1 && ++w.stuck > 4096) {  // another than the first has waited long enough
      w.stuck = 3072;
      u32 pick = m.below(u32(n_ready));
      for (size_t k = 0; k < w.split.size(); k++)
        if (w.split[k].wait == kReady && pick-- == 0) best = s32(k);
    }
    return best;
  }

  void exit_lanes(Ctx& c, u32 mask) {
    Warp& w = *c.warp;
    ThreadBlock& b = *c.block;
    w.live &= ~mask;
    b.live_threads -= u32(std::popcount(mask));
    if (!w.live) {
      b.live_warps--;
      land_matrices(c, 0, true);
    }
    // Those that wait at a barrier of the whole block may now be all that are left.
    if (b.live_threads)
      for (u32 k = 0; k < 16; k++) {
        Barrier& r = b.barrier[k];
        if (!r.arrived || r.expected || !barrier_complete(m, b, r)) continue;
        if (m.checks & kSync) {
          Inst i{};
          i.id = r.inst;
          if (Report* q = m.report(c, i, kBarrierMissing, lowest(mask)))
            q->extra = m.threads_per_block - b.live_threads;
        }
        barrier_results(m, b, r, k);
        finish_barrier(m, b, r, k);
        wake(b);
      }
  }

  void wake(ThreadBlock& b) {
    for (u32 k = 0; k < b.warp.size(); k++) {
      Warp& w = b.warp[k];
      if (w.current != -2) continue;  // not asleep
      for (Split& s : w.split)
        if (s.wait == kReady) {
          w.current = 0;
          ready.push_back({&b, k});
          break;
        }
    }
  }

  void branch_target(const Inst& last, u32 lane, Ctx& c, s32& to) {
    const s32* list = m.program.lists + last.list;
    u32 v = reg<u32>(c, last.o[0])[lane];
    to = v < last.n ? list[v] : list[0];
  }

  // Runs a warp for up to `quantum` basic blocks. True: it may go on; false: it waits, or is done.
  bool run(ThreadBlock& b, Warp& w, u32 quantum) {
    const Program& p = m.program;
    Ctx c;
    c.base[0] = w.registers;
    c.base[1] = const_cast<char*>(p.constants);
    c.pred = w.pred;
    c.warp = &w;
    c.block = &b;
    c.machine = &m;
    c.taken = 0;
    const Fn* const fn = m.fn.data();
    while (quantum--) {
      s32 at;
      if (w.split.size() == 1 && w.split[0].wait == kReady)
        at = 0;
      else
        at = choose(w);
      if (at < 0) {
        // Nobody can go on. Lanes that wait for others of the warp which wait elsewhere: let one
        // pass.
        s32 first = -1;
        bool barrier = false;
        for (size_t k = 0; k < w.split.size(); k++) {
          if (w.split[k].wait == kAtSync &&
              (first < 0 || w.split[k].at < w.split[size_t(first)].at))
            first = s32(k);
          if (w.split[k].wait == kAtBarrier) barrier = true;
        }
        if (first < 0) return false;
        (void)barrier;
        w.split[size_t(first)].wait = kReady;
        w.step |= kForce;
        at = first;
      }
      Split* s = &w.split[size_t(at)];
      const u32 active = s->mask;
      const Block& block = p.block[s->at];
      m.entries[size_t(s->at)]++;
      m.lanes[size_t(s->at)] += u32(std::popcount(active));
      m.executed += u64(block.last - block.first);
      c.active = active;
      int r = kGo;
      s32 k = block.first;
      for (; k < block.last; k++) {
        const Inst& i = m.inst[k];
        u32 mask = active;
        if (i.guard >= 0) {
          mask &= w.pred[i.guard] ^ i.guard_xor;
          if ((m.checks & kCounts) && !(i.flags & kUncounted))
            m.count(i).threads += u32(std::popcount(mask));
          if (!mask) {
            if ((i.flags & kTaint) && i.taint >= 0) {
              c.mask = 0;
              taint_guard(c, i);
            }
            continue;
          }
        }
        c.mask = mask;
        if (i.flags & kTaint) [[unlikely]] {
          if (i.taint >= 0 && !(i.flags & kCheckAddress))
            taint_step(c, i);
          else if (i.flags & kControl)
            check_branch(c, i);
        }
        r = fn[k](c, i);
        if (r != kGo) break;
      }
      switch (r) {
        case kGo:
          s->at = block.next;
          if (block.next < 0) finish_lanes(c, w, size_t(at), active);
          break;
        case kBranch: {
          u32 taken = c.taken, rest = active & ~taken;
          s32 to = s32(m.inst[k].imm);
          if (m.checks & kCounts) m.count(m.inst[k]).taken += u32(std::popcount(taken));
          if (!rest) {
            s->at = to;
          } else {
            s->mask = taken;
            s->at = to;
            if (block.next >= 0) {
              w.split.push_back({block.next, rest, kReady, 0});
            }
          }
          break;
        }
        case kMultiway: {
          u32 left = c.taken, rest = active & ~left;
          std::vector<Split> more;
          while (left) {
            s32 to, other;
            branch_target(m.inst[k], u32(lowest(left)), c, to);
            u32 same = 0;
            for (u32 q = left; q; q &= q - 1) {
              branch_target(m.inst[k], u32(lowest(q)), c, other);
              if (other == to) same |= 1u << lowest(q);
            }
            left &= ~same;
            more.push_back({to, same, kReady, 0});
          }
          if (rest) more.push_back({block.next, rest, kReady, 0});
          *s = more[0];
          w.split.insert(w.split.end(), more.begin() + 1, more.end());
          break;
        }
        case kExit: {
          u32 gone = c.taken;
          if (gone == active) {
            finish_lanes(c, w, size_t(at), active);
          } else {
            s->mask = active & ~gone;
            s->at = block.next;
            exit_lanes(c, gone);
          }
          break;
        }
        case kWaitBarrier:
          s->wait = kAtBarrier;
          s->barrier = u8(reg<u32>(c, m.inst[k].o[0])[lowest(c.mask)]);
          if (c.mask != active) {  // a guard kept some lanes from it
            s->mask = c.mask;
            s32 next = block.next;
            s->at = next;
            w.split.push_back({next, active & ~c.mask, kReady, 0});
          } else {
            s->at = block.next;
          }
          break;
        case kRetry:
          m.entries[size_t(s->at)]--;
          m.lanes[size_t(s->at)] -= u32(std::popcount(active));
          m.executed -= u64(block.last - block.first);
          s->wait = kAtSync;
          break;
        case kYield:
          s->at = block.next;
          if (block.next < 0) finish_lanes(c, w, size_t(at), active);
          quantum = 0;
          break;
        case kStop:
          return false;
      }
      if (m.woken) {
        m.woken = false;
        wake(b);
      }
      if (!w.live) return false;
      if (m.executed > m.alarm) [[unlikely]] {
        if (m.alarm < m.launch.budget) {
          half_time();
          continue;
        }
        for (s32 q = 0; q < p.n_block; q++)
          m.launch.late[q] = m.entries[size_t(q)] != m.entries_at_half[size_t(q)];
        Inst i{};
        i.id = m.inst[block.first].id;
        m.report(c, i, kBudget, lowest(active));
        m.stopped = true;
        return false;
      }
    }
    return true;
  }

  void finish_lanes(Ctx& c, Warp& w, size_t at, u32 mask) {
    w.split.erase(w.split.begin() + s64(at));
    exit_lanes(c, mask);
  }

  // Half of the budget is spent: blocks that are entered from here on are where a kernel loops that
  // spends the other half, too.
  void half_time() {
    m.entries_at_half = m.entries;
    m.alarm = m.launch.budget;
  }

  void taint_guard(Ctx& c, const Inst& i) {
    if (!(i.flags & kCheckAddress)) taint_step(c, i);
  }
  void check_branch(Ctx& c, const Inst& i) {
    if (i.guard < 0) return;
    u32 bad = c.warp->taint[m.program.register_bytes / 128 + i.guard] & c.active;
    if (bad) m.report(c, i, kUninitRegister, lowest(bad));
  }

  void deadlock() {
    for (auto& b : resident) {
      if (b->done) continue;
      for (Warp& w : b->warp)
        for (Split& s : w.split) {
          Ctx c{};
          c.block = b.get();
          c.warp = &w;
          c.machine = &m;
          Inst i{};
          // The barrier is the last instruction of a block that leads here.
          i.id = s.wait == kAtBarrier ? b->barrier[s.barrier].inst
                                      : m.program.inst[m.program.block[s.at].first].id;
          if (Report* r = m.report(c, i, kDeadlock, lowest(s.mask))) {
            const Barrier& q = b->barrier[s.barrier];
            r->extra = s.wait == kAtBarrier ? u64(s.barrier) << 40 | u64(q.arrived) << 20 |
                                                  (q.expected ? q.expected : b->live_threads)
                                            : ~0ull;
          }
        }
    }
    m.stopped = true;
  }

  int go() {
    Launch& g = m.launch;
    const Program& p = m.program;
    m.threads_per_block = g.block[0] * g.block[1] * g.block[2];
    m.warps_per_block = (m.threads_per_block + 31) / 32;
    n_blocks = g.block_list ? g.n_blocks : u64(g.grid[0]) * g.grid[1] * g.grid[2];
    const auto& ops = table();
    m.fn.resize(size_t(p.n_inst));
    for (s32 k = 0; k < p.n_inst; k++) m.fn[size_t(k)] = ops[p.inst[k].op].fn;
    m.entries.assign(size_t(p.n_block), 0);
    m.entries_at_half = m.entries;
    m.alarm = g.budget ? g.budget / 2 : ~0ull;
    m.lanes.assign(size_t(p.n_block), 0);
    m.region_hint.assign(size_t(p.n_rows) + 1, 0);
    m.pages.resize(g.n_regions);
    // Blocks start in the order of their number with seed 0, in a shuffled one with any other.
    if (g.seed) {
      order.resize(n_blocks);
      for (u64 k = 0; k < n_blocks; k++) order[k] = g.block_list ? g.block_list[k] : u32(k);
      for (u64 k = n_blocks; k > 1; k--) std::swap(order[k - 1], order[m.below(u32(k))]);
    }
    u32 most =
        g.cooperative ? u32(std::min<u64>(n_blocks, 0xffffffffu)) : std::max(1u, g.max_resident);
    window = g.window ? g.window : (m.checks & kRaces ? 6u : 12u);
    if (g.cooperative) window = most;
    window = std::min(window, most);
    u64 last_progress = 0, spins = 0;
    while (!m.stopped) {
      while (next_block < n_blocks && resident.size() < window) admit();
      if (ready.empty()) {
        if (resident.empty()) break;
        if (next_block < n_blocks && window < most) {
          window = std::min(most, window * 2);
          continue;
        }
        deadlock();
        break;
      }
      size_t k = m.below(u32(ready.size()));
      auto [b, index] = ready[k];
      Warp& w = b->warp[index];
      w.current = 0;
      u32 quantum = 1 + m.below(g.quantum);
      bool on = run(*b, w, quantum);
      if (m.stopped) break;
      if (!on) {
        ready[k] = ready.back();
        ready.pop_back();
        w.current = -2;
        if (!w.live && !b->live_warps && !b->done) {
          b->done = true;
          finished++;
          for (size_t q = 0; q < resident.size(); q++)
            if (resident[q].get() == b) {
              spare.push_back(std::move(resident[q]));
              resident[q] = std::move(resident.back());
              resident.pop_back();
              break;
            }
          last_progress = m.executed;
        } else if (w.live) {
          wake_if_ready(*b, index);
        }
      }
      // Blocks that spin may be waiting for one that has not started yet.
      if (m.executed - last_progress > 200000 && window < most && next_block < n_blocks) {
        if (++spins % 64 == 0) {
          window = std::min(most, window + 1);
          last_progress = m.executed;
        }
      }
    }
    finish_counts();
    return m.stopped ? kStopped : kDone;
  }

  void wake_if_ready(ThreadBlock& b, u32 index) {
    Warp& w = b.warp[index];
    for (Split& s : w.split)
      if (s.wait == kReady) {
        w.current = 0;
        ready.push_back({&b, index});
        return;
      }
  }

  void finish_counts() {
    Launch& g = m.launch;
    const Program& p = m.program;
    for (s32 k = 0; k < p.n_block; k++) {
      const Block& b = p.block[k];
      for (s32 q = b.first; q < b.last; q++) {
        const Inst& i = p.inst[q];
        if (i.n == 0xfffffffeu) continue;  // an auxiliary of another instruction
        Count& n = g.counts[i.id];
        if (i.flags & kUncounted) continue;
        n.warps += m.entries[size_t(k)];
        if (i.guard < 0)
          n.threads += m.lanes[size_t(k)];
        else if (!(m.checks & kCounts))
          n.threads += m.lanes[size_t(k)];
        g.totals[4] += m.entries[size_t(k)];
        g.totals[3] += m.lanes[size_t(k)];
      }
    }
  }
};

}  // namespace

int launch(const Program& p, Launch& l) { return Engine(p, l).go(); }
int op_count() { return int(table().size()); }
const char* op_name(int k) { return table()[size_t(k)].name.c_str(); }

}  // namespace emu::EMU_ISA
