// A launch: regions, reports, what the checkers remember, and what is counted.
#pragma once

#include "ops_float.h"
#include "ops_integer.h"

namespace emu::EMU_ISA {

struct GlobalRecord {
  u32 write_warp, write_clock, write_inst, serial;  // warps of the whole grid, from 1
  u32 read_warp[2], read_clock[2], read_inst[2];
  u8 write_lane, read_lane[2], strong;
};

struct Page {
  u32 granule;  // bytes a record stands for: 4, or 1 once something narrower was accessed
  std::vector<GlobalRecord> record;
};

enum Access : u32 { kRead = 0, kWrite = 1, kAtomic = 2 };
enum Space : u32 { kGlobal = 0, kShared = 1, kLocal = 2, kParam = 3 };

// Sets of a few addresses, emptied in one step.
struct SmallSet {
  u64 key[256];
  u32 stamp[256] = {};
  u32 now = 0;
  void clear() {
    if (++now == 0) {
      std::memset(stamp, 0, sizeof stamp);
      now = 1;
    }
  }
  bool add(u64 k) {
    u32 h = u32((k * 0x9e3779b97f4a7c15ull) >> 56);
    while (stamp[h] == now) {
      if (key[h] == k) return false;
      h = (h + 1) & 255;
    }
    stamp[h] = now;
    key[h] = k;
    return true;
  }
};

struct Machine {
  const Program& program;
  Launch& launch;
  std::vector<Fn> fn;
  u32 checks;
  u32 warps_per_block = 0, threads_per_block = 0;
  u32 serial = 0;
  u64 rng;
  u64 executed = 0;  // warp instructions
  bool stopped = false;
  std::vector<u64> entries, lanes;                        // by basic block
  std::vector<u32> region_hint;                           // by instruction row
  std::vector<std::vector<std::unique_ptr<Page>>> pages;  // by region
  std::unordered_map<u64, std::shared_ptr<const Foreign>> locations;
  std::unordered_map<u64, u64> reported;
  SmallSet set, set2;
  u64 alarm = ~0ull;  // instructions at which half, then all of the budget is spent
  std::vector<u64> entries_at_half;
  const Inst* inst;       // what runs: program.inst, or program.followed once that matters
  bool suspects = false;  // shared memory was read that nobody had written
  bool woken = false;     // a barrier let warps go on

  Machine(const Program& p, Launch& l)
      : program(p), launch(l), checks(l.checks), rng(l.seed * 2 + 1), inst(p.inst) {
    for (int k = 0; k < 8; k++) random();
  }

  u64 random() {
    rng ^= rng << 13;
    rng ^= rng >> 7;
    rng ^= rng << 17;
    return rng * 0x2545f4914f6cdd1dull;
  }
  u32 below(u32 n) { return u32(((random() >> 32) * n) >> 32); }

  Count& count(const Inst& i) { return launch.counts[i.id]; }

  Report* report(Ctx& c, const Inst& i, u32 kind, int lane, u64 address = 0, u32 space = 0,
                 u32 size = 0, bool write = false) {
    if (kind == kUninitRegister && suspects) {
      for (u64 k = 0; k < launch.n_reports; k++)
        if (launch.reports[k].kind == kUninitShared) launch.reports[k].extra = 0;
      if (!program.n_taint_init) return nullptr;
    }
    u64 key = u64(kind) << 32 | i.id;
    auto it = reported.find(key);
    if (it != reported.end()) {
      if (it->second < launch.max_reports) launch.reports[it->second].count++;
      return nullptr;
    }
    u64 at = launch.n_reports;
    reported[key] = at;
    if (at >= launch.max_reports) return nullptr;
    launch.n_reports++;
    Report& r = launch.reports[at];
    r = {kind,
         i.id,
         c.block->linear,
         c.warp->index * 32 + u32(lane < 0 ? 0 : lane),
         address,
         space,
         size,
         write,
         kFull,
         kFull,
         kFull,
         1,
         0};
    return &r;
  }

  // Shared memory that nobody has written is read. Kernels do that on purpose (a row beyond the
  // last, a stage beyond the end) and throw away what they made of it: so the read is only noted,
  // and from here on undefined values are followed. If one of them decides anything, the read is
  // reported.
  void suspect(Ctx& c, const Inst& i, int lane, u32 address, u32 size) {
    if (Report* r = report(c, i, kUninitShared, lane, address, kShared, size, false)) r->extra = 1;
    suspects = true;
    inst = program.followed;
  }
  const Inst& as_followed(const Inst& i) const {
    const u64 offset =
        reinterpret_cast<const char*>(&i) - reinterpret_cast<const char*>(program.inst);
    const u64 k = offset / sizeof(Inst);  // `i` may be of another array, or a copy
    return program.followed && k < u64(program.n_inst) ? program.followed[k] : i;
  }

  int find_region(u64 address, u32 row) {
    u32 hint = region_hint[row];
    if (hint < launch.n_regions && address - launch.regions[hint].base < launch.regions[hint].size)
      return int(hint);
    int lo = 0, hi = int(launch.n_regions) - 1;
    while (lo <= hi) {
      int mid = (lo + hi) / 2;
      const Region& r = launch.regions[mid];
      if (address < r.base)
        hi = mid - 1;
      else if (address - r.base >= r.size)
        lo = mid + 1;
      else {
        region_hint[row] = u32(mid);
        return mid;
      }
    }
    return -1;
  }

  // --- clocks ---------------------------------------------------------------------------------

  u32 global_id(const Ctx& c) const {
    return c.block->linear * warps_per_block + c.warp->index + 1;
  }

  bool happened(Ctx& c, u32 warp, u32 clock) const {  // a warp of the grid, from 1
    u32 first = c.block->linear * warps_per_block + 1;
    if (warp - first < warps_per_block) {
      u32 w = warp - first;
      return w == c.warp->index || c.warp->seen.own[w] >= clock;
    }
    if (!c.warp->seen.foreign) return false;
    auto it = c.warp->seen.foreign->find(warp);
    return it != c.warp->seen.foreign->end() && it->second >= clock;
  }

  Clock snapshot(Ctx& c) const {
    Clock k = c.warp->seen;
    k.own[c.warp->index] = c.warp->clock;
    return k;
  }
  std::shared_ptr<const Foreign> globally(Ctx& c, const Clock& k) const {
    auto f = k.foreign ? std::make_shared<Foreign>(*k.foreign) : std::make_shared<Foreign>();
    u32 first = c.block->linear * warps_per_block + 1;
    for (u32 w = 0; w < k.own.size(); w++)
      if (k.own[w]) {
        u32& x = (*f)[first + w];
        x = std::max(x, k.own[w]);
      }
    return f;
  }
  Clock locally(Ctx& c, const std::shared_ptr<const Foreign>& f) const {
    Clock k;
    k.own.assign(warps_per_block, 0);
    u32 first = c.block->linear * warps_per_block + 1;
    for (u32 w = 0; w < warps_per_block; w++) {
      auto it = f->find(first + w);
      if (it != f->end()) k.own[w] = it->second;
    }
    k.foreign = f;
    return k;
  }

  // A strong access of a location that others synchronise on.
  void synchronise(Ctx& c, const Inst& i, u64 address, bool shared, Access kind) {
    Warp& w = *c.warp;
    bool reads = kind != kWrite, writes = kind != kRead;
    if (shared) {
      auto it = c.block->locations.find(u32(address));
      if (reads && it != c.block->locations.end()) take(w, it->second, i.flags & kAcquire);
      if (writes && ((i.flags & kRelease) || w.has_fenced)) {
        Clock k = published(c, i);
        join(c.block->locations[u32(address)], k);
      }
    } else {
      auto it = locations.find(address);
      if (reads && it != locations.end()) take(w, locally(c, it->second), i.flags & kAcquire);
      if (writes && ((i.flags & kRelease) || w.has_fenced)) {
        auto f = globally(c, published(c, i));
        if (it != locations.end()) {
          auto merged = std::make_shared<Foreign>(*f);
          for (auto& [k, v] : *it->second) {
            u32& x = (*merged)[k];
            x = std::max(x, v);
          }
          f = merged;
        }
        locations[address] = f;
      }
    }
    if (writes && ((i.flags & kRelease) || w.has_fenced)) w.clock++;
  }
  // What a strong write tells those who read it: all up to the last fence, and itself; which is to
  // say, all of this warp's up to now, unless it wrote anything else since the fence.
  Clock published(Ctx& c, const Inst& i) const {
    const Warp& w = *c.warp;
    if (i.flags & kRelease) return snapshot(c);
    Clock k = w.fenced;
    if (!w.written) k.own[w.index] = w.clock;
    return k;
  }
  static void take(Warp& w, const Clock& k, bool now) {
    if (now) {
      join(w.seen, k);
    } else {
      if (!w.has_pending) w.pending = Clock{std::vector<u32>(w.seen.own.size(), 0), {}, nullptr};
      join(w.pending, k);
      w.has_pending = true;
    }
  }
  void fence(Ctx& c) {
    Warp& w = *c.warp;
    if (w.has_pending) {
      join(w.seen, w.pending);
      w.has_pending = false;
    }
    w.fenced = snapshot(c);
    w.has_fenced = true;
    w.written = false;
    w.clock++;
  }

  // --- races ----------------------------------------------------------------------------------

  bool comparing = false;  // a plain store is under way, which compares what is written twice
  u32 rival[32] = {};

  void shared_race(Ctx& c, const Inst& i, int lane, u32 address, u32 size, bool write, u32 kind,
                   u32 other_warp, u32 other_lane, u32 other_inst) {
    if (Report* r = report(c, i, kind, lane, address, kShared, size, write)) {
      r->other_inst = other_inst;
      r->other_block = c.block->linear;
      r->other_thread = other_warp * 32 + other_lane;
    }
  }

  // The shared memory that a wgmma read, once it was waited for: whatever was written meanwhile, or
  // before without an order, races. Reads count as of now, since until now they went on. What was
  // written by st must have been shown to the async proxy; cp.async's data is used without, by
  // everybody's practice if not by PTX's letter.
  void race_matrix(Ctx& c, const AsyncMatrix& x) {
    const u32 g = u32(program.shared_granule), me = c.warp->index, now = c.warp->clock;
    const Inst& i = *x.inst;
    for (u32 address : x.chunk)
      for (u32 k = address / g; k < (address + 16) / g; k++) {
        SharedRecord& r = c.block->records[k];
        if (r.write_clock) {
          const u32 w = r.write_warp;
          if (r.write_clock > (w == me ? x.clock : x.seen[w])) {
            shared_race(c, i, 0, address, 16, false, kRaceShared, w, r.write_lane, r.write_inst);
          } else if (!(r.strong & kWrittenAsync) &&
                     (w >= x.proxied.size() || r.write_clock > x.proxied[w])) {
            shared_race(c, i, 0, address, 16, false, kMatrixProxy, w, r.write_lane, r.write_inst);
          }
        }
        int s = 0;
        if (r.read_clock[0] && r.read_warp[0] != me) s = 1;
        if (s == 1 && r.read_clock[1] && r.read_warp[1] != me) s = int(now & 1);
        r.read_clock[s] = now, r.read_inst[s] = i.id, r.read_warp[s] = u16(me);
        r.read_lane[s] = 0;
        r.strong = u8(r.strong & ~(2 << s));
      }
  }

  // Returns the lanes that write where another lane of this instruction writes as well, and where,
  // with `comparing`, this instruction of another warp has written without an order: compilers that
  // lay elements out over fewer threads than there are have all their copies stored. `rival` has
  // that thread's number and one, or 0; whoever stores reports it if the values differ.
  u32 race_shared(Ctx& c, const Inst& i, const u32* address, u32 bytes, u32 mask, Access kind) {
    const u32 g = u32(program.shared_granule), me = c.warp->index, now = c.warp->clock;
    const bool strong = kind == kAtomic || (i.flags & kStrong), write = kind != kRead;
    if (write && !strong) c.warp->written = true;
    const std::vector<u32>& seen = c.warp->seen.own;
    std::vector<SharedRecord>& records = c.block->records;
    u32 twice = 0;
    for (u32 m = mask; m; m &= m - 1) {
      int l = lowest(m);
      u32 first = address[l] / g, last = (address[l] + bytes - 1) / g;
      rival[l] = 0;
      for (u32 k = first; k <= last; k++) {
        SharedRecord& r = records[k];
        if (r.write_clock && !(strong && (r.strong & 1))) {
          if (r.write_warp != me) {
            if (seen[r.write_warp] >= r.write_clock) {
            } else if (comparing && r.write_inst == i.id) {
              twice |= 1u << l;
              rival[l] = 1 + r.write_warp * 32u + r.write_lane;
            } else {
              shared_race(c, i, l, address[l], bytes, write, kRaceShared, r.write_warp,
                          r.write_lane, r.write_inst);
            }
          } else if (r.write_clock == now && r.write_lane != l) {
            shared_race(c, i, l, address[l], bytes, write, kRaceWarp, me, r.write_lane,
                        r.write_inst);
          }
        }
        if (write)
          for (int s = 0; s < 2; s++)
            if (r.read_clock[s] && !(strong && (r.strong & (2 << s)))) {
              if (r.read_warp[s] != me) {
                if (seen[r.read_warp[s]] < r.read_clock[s])
                  shared_race(c, i, l, address[l], bytes, true, kRaceShared, r.read_warp[s],
                              r.read_lane[s], r.read_inst[s]);
              } else if (r.read_clock[s] == now && r.read_lane[s] != l) {
                shared_race(c, i, l, address[l], bytes, true, kRaceWarp, me, r.read_lane[s],
                            r.read_inst[s]);
              }
            }
      }
    }
    if (write) set2.clear();
    for (u32 m = mask; m; m &= m - 1) {
      int l = lowest(m);
      u32 first = address[l] / g, last = (address[l] + bytes - 1) / g;
      for (u32 k = first; k <= last; k++) {
        SharedRecord& r = records[k];
        if (write) {
          if (r.write_clock == now && r.write_warp == me && r.write_lane != l &&
              r.write_inst == i.id)
            twice |= 1u << l;
          r.write_clock = now, r.write_inst = i.id, r.write_warp = u16(me), r.write_lane = u8(l);
          r.strong = u8(strong);
          r.read_clock[0] = r.read_clock[1] = 0;
        } else {
          int s = 0;
          if (r.read_clock[0] && r.read_warp[0] != me) s = 1;
          if (s == 1 && r.read_clock[1] && r.read_warp[1] != me) s = int(now & 1);
          // of one warp's lanes keep one that is not the last reader, so that its own write shows
          r.read_clock[s] = now, r.read_inst[s] = i.id, r.read_warp[s] = u16(me);
          r.read_lane[s] = u8(l);
          r.strong = u8((r.strong & ~(2 << s)) | (strong ? 2 << s : 0));
        }
      }
    }
    return twice;
  }

  void global_race(Ctx& c, const Inst& i, int lane, u64 address, u32 size, bool write, u32 other,
                   u32 other_lane, u32 other_inst) {
    u32 kind = other == global_id(c) ? kRaceWarp : kRaceGlobal;
    if (Report* r = report(c, i, kind, lane, address, kGlobal, size, write)) {
      r->other_inst = other_inst;
      r->other_block = (other - 1) / warps_per_block;
      r->other_thread = (other - 1) % warps_per_block * 32 + other_lane;
    }
  }

  u32 race_global(Ctx& c, const Inst& i, const u64* address, u32 bytes, u32 mask, Access kind) {
    const u32 me = global_id(c), now = c.warp->clock;
    const bool strong = kind == kAtomic || (i.flags & kStrong), write = kind != kRead;
    if (write && !strong) c.warp->written = true;
    u32 twice = 0;
    serial++;
    for (u32 m = mask; m; m &= m - 1) {
      int l = lowest(m);
      int at = find_region(address[l], i.id);
      if (at < 0 || !launch.regions[at].tracked) continue;
      const Region& region = launch.regions[at];
      auto& table = pages[size_t(at)];
      if (table.empty()) table.resize((region.size + (region.base & 4095) + 4095) / 4096 + 1);
      u64 origin = region.base & ~4095ull;
      for (u64 byte = address[l]; byte < address[l] + bytes;) {
        auto& slot = table[(byte - origin) >> 12];
        if (!slot) {
          slot = std::make_unique<Page>();
          slot->granule = bytes < 4 ? 1 : 4;
          slot->record.resize(4096 / slot->granule);
        } else if (bytes < 4 && slot->granule == 4) {
          std::vector<GlobalRecord> fine(4096);
          for (u32 k = 0; k < 4096; k++) fine[k] = slot->record[k / 4];
          slot->record.swap(fine);
          slot->granule = 1;
        }
        GlobalRecord& r = slot->record[(byte & 4095) / slot->granule];
        if (r.write_warp && !(strong && (r.strong & 1)) && r.serial != serial) {
          if (r.write_warp == me) {
            if (r.write_clock == now && r.write_lane != l)
              global_race(c, i, l, byte, bytes, write, me, r.write_lane, r.write_inst);
          } else if (!happened(c, r.write_warp, r.write_clock)) {
            global_race(c, i, l, byte, bytes, write, r.write_warp, r.write_lane, r.write_inst);
          }
        }
        if (write) {
          for (int s = 0; s < 2; s++)
            if (r.read_warp[s] && !(strong && (r.strong & (2 << s)))) {
              if (r.read_warp[s] == me) {
                if (r.read_clock[s] == now && r.read_lane[s] != l)
                  global_race(c, i, l, byte, bytes, true, me, r.read_lane[s], r.read_inst[s]);
              } else if (!happened(c, r.read_warp[s], r.read_clock[s])) {
                global_race(c, i, l, byte, bytes, true, r.read_warp[s], r.read_lane[s],
                            r.read_inst[s]);
              }
            }
          if (r.serial == serial && r.write_lane != l) twice |= 1u << l;
          r.write_warp = me, r.write_clock = now, r.write_inst = i.id, r.write_lane = u8(l);
          r.serial = serial;
          r.strong = u8(strong);
          r.read_warp[0] = r.read_warp[1] = 0;
        } else {
          int s = r.read_warp[0] && r.read_warp[0] != me;
          if (s && r.read_warp[1] && r.read_warp[1] != me) s = int(serial & 1);
          r.read_warp[s] = me, r.read_clock[s] = now, r.read_inst[s] = i.id, r.read_lane[s] = u8(l);
          r.strong = u8((r.strong & ~(2 << s)) | (strong ? 2 << s : 0));
        }
        byte = (byte / slot->granule + 1) * slot->granule;
      }
    }
    return twice;
  }

  // --- counts ---------------------------------------------------------------------------------

  void count_global(Ctx& c, const Inst& i, const u64* address, u32 bytes, u32 mask, Access kind) {
    Count& n = count(i);
    n.requests++;
    u32 active = u32(std::popcount(mask));
    n.bytes += u64(active) * bytes;
    set.clear();
    set2.clear();
    u64 sectors = 0, distinct = 0;
    int at = -1;
    for (u32 m = mask; m; m &= m - 1) {
      int l = lowest(m);
      if (set2.add(address[l])) distinct++;
      for (u64 s = address[l] >> 5; s <= (address[l] + bytes - 1) >> 5; s++) {
        if (!set.add(s)) continue;
        sectors++;
        at = find_region(std::max(s << 5, address[l]), i.id);
        if (at < 0) continue;
        Region& r = launch.regions[at];
        u64 bit = s - (r.base >> 5);
        if (kind != kWrite) {
          r.sectors_read++;
          if (r.read_sectors) r.read_sectors[bit >> 6] |= 1ull << (bit & 63);
        }
        if (kind != kRead) {
          r.sectors_written++;
          if (r.written_sectors) r.written_sectors[bit >> 6] |= 1ull << (bit & 63);
        }
      }
    }
    n.sectors += sectors;
    n.sectors_ideal += (distinct * bytes + 31) / 32;
    (void)c;
  }

  // Wavefronts of a shared access: lanes go 32, 16 or 8 at a time for 4, 8 or 16 bytes, and each
  // group takes as many passes as its most wanted bank has distinct words.
  u32 wavefronts(const u32* address, u32 bytes, u32 mask, u32* ideal) {
    u32 group = bytes <= 4 ? 32 : bytes == 8 ? 16 : 8, total = 0, fewest = 0;
    u32 words = (bytes + 3) / 4;
    for (u32 g = 0; g < 32; g += group) {
      u32 part = mask & u32(((1ull << group) - 1) << g);
      if (!part) continue;
      set.clear();
      u8 per_bank[32] = {};
      u32 worst = 1;
      for (u32 m = part; m; m &= m - 1) {
        int l = lowest(m);
        for (u32 k = 0; k < words; k++) {
          u32 word = address[l] / 4 + k;
          if (set.add(word)) worst = std::max<u32>(worst, ++per_bank[word & 31]);
        }
      }
      total += worst;
      fewest++;
    }
    *ideal = fewest;
    return total;
  }
  void count_shared(Ctx&, const Inst& i, const u32* address, u32 bytes, u32 mask) {
    Count& n = count(i);
    u32 ideal;
    n.requests++;
    n.bytes += u64(std::popcount(mask)) * bytes;
    n.wavefronts += wavefronts(address, bytes, mask, &ideal);
    n.wavefronts_ideal += ideal;
  }
};

// ------------------------------------------------------------------------------------------------
// Undefined registers
//
// A register that may be read before it is written carries a bit for each lane, as does everything
// computed from it. Only what matters is reported: a branch or a guard of a memory access, an
// address, or a value written to global memory. The description in the operand lists is
// [kind, destinations, d..., sources, s...].
//
// Arrays of bytes and halves live in registers, filled part by part: `and` a hole into what is not
// defined yet, `or` a byte into the hole. So a register with its bit set also knows which of its
// bytes are defined (Warp::known). Operations that move bits about keep track of that
// (kTaintBytes); for all others a register is undefined as a whole.

enum TaintKind : s32 {
  kTaintMerge = 0,
  kTaintSelect = 1,
  kTaintClear = 2,
  kTaintMatrix = 3,
  kTaintWarp = 4,
  kTaintShuffle = 5,
  kTaintAccumulate = 6,
  kTaintHalves = 7,
  kTaintBytes = 8
};

// What a kTaintBytes does; decode.py has the same names.
enum ByteOp : s32 {
  kByteLogic = 0,
  kByteShl,
  kByteShr,
  kByteSar,
  kBytePermute,
  kByteInsert,
  kByteField,
  kByteFieldSigned,
  kBytePack,
  kByteExtract,
  kByteCarry
};

inline void forget_bytes(Warp& w, s32 k) { std::memset(w.known + 4 * k, 0, 4 * sizeof(u32)); }

// Lanes in which one of the first `bytes` bytes of a register is undefined.
inline u32 undefined_lanes(const Warp& w, s32 k, u32 bytes) {
  u32 known = bytes < 4 ? kFull : 0;
  for (u32 b = 0; b < bytes && bytes < 4; b++) known &= w.known[4 * k + s32(b)];
  return w.taint[k] & ~known;
}

// The undefined bits of one lane's register.
inline u64 undefined_bits(const Warp& w, s32 k, int lane) {
  if (k < 0 || !(w.taint[k] >> lane & 1)) return 0;
  u64 r = 0;
  for (int b = 0; b < 4; b++)
    if (!(w.known[4 * k + b] >> lane & 1)) r |= 0xffull << (8 * b);
  return r;
}

// A bit of a table's result is undefined if the undefined bits among its inputs can change it.
inline u64 undefined_logic(u32 table, const u64* u, const u64* x) {
  u64 zero = 0, one = 0;
  for (int k = 0; k < 8; k++) {
    u64 can = ((k & 4 ? x[0] : ~x[0]) | u[0]) & ((k & 2 ? x[1] : ~x[1]) | u[1]) &
              ((k & 1 ? x[2] : ~x[2]) | u[2]);
    ((table >> k) & 1 ? one : zero) |= can;
  }
  return zero & one;
}

// u: undefined bits of the operands, x: their values, n: shift amounts, positions, selectors.
inline u64 undefined_result(const Inst& i, s32 what, u32 table, bool wide, const u64* u,
                            const u64* x, const u32* n) {
  switch (what) {
    case kByteLogic:
      return undefined_logic(table, u, x);
    case kByteShl:
      return wide ? shl<u64>(u[0], n[0]) : shl<u32>(u32(u[0]), n[0]);
    case kByteShr:
      return wide ? shr<u64>(u[0], n[0]) : shr<u32>(u32(u[0]), n[0]);
    case kByteSar:
      return wide ? u64(shr<s64>(s64(u[0]), n[0])) : u32(shr<s32>(s32(u[0]), n[0]));
    case kBytePermute:
      return prmt(u32(u[0]), u32(u[1]), n[0]);
    case kByteInsert:
      return wide ? bfi<u64>(u[0], u[1], n[0], n[1]) : bfi<u32>(u32(u[0]), u32(u[1]), n[0], n[1]);
    case kByteField:
      return wide ? bfe<u64>(u[0], n[0], n[1]) : bfe<u32>(u32(u[0]), n[0], n[1]);
    case kByteFieldSigned:
      return wide ? u64(bfe<s64>(s64(u[0]), n[0], n[1])) : u32(bfe<s32>(s32(u[0]), n[0], n[1]));
    case kBytePack:  // of two registers with so many bits each
      return (u[0] & ((1ull << table) - 1)) | u[1] << table;
    case kByteExtract:
      return (u[0] >> i.imm) & u64(i.imm2);
    default: {  // a carry goes upwards
      u64 some = u[0] | u[1] | u[2];
      return some | (0 - some);
    }
  }
}

// Sources: low and high word of three operands, then of two amounts the one word. What follows:
// the operation, its width in bits, its table, the first of `o` that is an amount.
inline void taint_bytes(Ctx& c, const Inst& i, const s32* dst, s32 nd, const s32* s, u32 doubt) {
  Warp& w = *c.warp;
  const s32 what = s[8], width = s[9], table = s[10], amount = s[11];
  const bool wide = width == 64;
  const u64 keep = wide ? ~0ull : (1ull << width) - 1;
  u32 some = 0;
  for (s32 k = 0; k < 8; k++)
    if (s[k] >= 0) some |= w.taint[s[k]];
  some &= c.mask;
  u64 r[32] = {};
  for (u32 m = some; m; m &= m - 1) {
    const int l = lowest(m);
    u64 u[3], x[3] = {};
    u32 n[2] = {};
    for (int k = 0; k < 3; k++) {
      u[k] = undefined_bits(w, s[2 * k], l) | undefined_bits(w, s[2 * k + 1], l) << 32;
      if (what != kBytePack && what != kByteExtract) u[k] &= keep;
      if (what == kByteLogic && i.o[k + 1] != -1)
        x[k] = wide ? reg<u64>(c, i.o[k + 1])[l] : reg<u32>(c, i.o[k + 1])[l];
    }
    for (int k = 0; k < 2 && amount + k < 6; k++)
      if (i.o[amount + k] != -1) n[k] = reg<u32>(c, i.o[amount + k])[l];
    r[l] = undefined_bits(w, s[6], l) | undefined_bits(w, s[7], l)
               ? keep
               : undefined_result(i, what, u32(table), wide, u, x, n) & keep;
  }
  for (s32 k = 0; k < nd; k++) {
    if (dst[k] < 0) continue;
    u32 bits[4] = {};
    for (u32 m = some; m; m &= m - 1) {
      const int l = lowest(m);
      for (int b = 0; b < 4; b++) bits[b] |= u32(((r[l] >> (32 * k + 8 * b)) & 0xff) != 0) << l;
    }
    w.taint[dst[k]] = (w.taint[dst[k]] & ~c.mask) | bits[0] | bits[1] | bits[2] | bits[3] | doubt;
    for (int b = 0; b < 4; b++) {
      u32& known = w.known[4 * dst[k] + b];
      known = ((known & ~c.mask) | (~bits[b] & c.mask)) & ~doubt;
    }
  }
}

inline void taint_step(Ctx& c, const Inst& i) {
  const s32* d = c.machine->program.lists + i.taint;
  u32* t = c.warp->taint;
  s32 kind = *d++, nd = *d++;
  const s32* dst = d;
  d += nd;
  s32 ns = *d++;
  u32 bits = 0;
  if (kind == kTaintShuffle) return;  // op_shfl moves the bits along with the values
  if (kind == kTaintBytes) {
    u32 doubt = i.guard >= 0 ? t[c.machine->program.register_bytes / 128 + i.guard] & c.active : 0;
    return taint_bytes(c, i, dst, nd, d, doubt);
  }
  for (s32 k = 0; k < nd; k++)
    if (dst[k] >= 0 && kind != kTaintSelect) forget_bytes(*c.warp, dst[k]);
  if (kind == kTaintAccumulate) {  // wgmma: D counts only if it is added to
    for (s32 k = 0; k < ns; k++) bits |= t[d[k]];
    u32 keep = get_pred(c, i.o[3]) ^ (i.imm & 0x10000 ? kFull : 0);
    for (s32 k = 0; k < nd; k++) t[dst[k]] = (t[dst[k]] & (keep | ~c.mask)) | (bits & c.mask);
    return;
  }
  auto at = [&](s32 k) { return d[k] >= 0 ? t[d[k]] : 0; };
  u32 doubt = 0;
  if (i.guard >= 0) doubt = t[c.machine->program.register_bytes / 128 + i.guard] & c.active;
  if (kind == kTaintHalves || kind == kTaintSelect) {
    u32 half[2] = {0, 0};
    if (kind == kTaintHalves) {  // 64-bit registers, low and high half in turn
      for (s32 k = 0; k < ns; k++) half[k & 1] |= at(k);
    } else {  // d, (a, b, predicate), and the high halves of a and b
      const u32 p = get_pred(c, i.o[3]) ^ (i.imm ? kFull : 0);
      half[0] = (p & at(0)) | (~p & at(1)) | at(2);
      if (ns > 3) half[1] = (p & at(3)) | (~p & at(4)) | at(2);
      for (s32 k = 0; k < nd; k++) {
        if (dst[k] < 0) continue;
        const s32 a = d[3 * k], b = d[3 * k + 1];  // bytes go along with the value
        for (int q = 0; q < 4; q++) {
          u32 of_a = a < 0 ? kFull : ~t[a] | c.warp->known[4 * a + q];
          u32 of_b = b < 0 ? kFull : ~t[b] | c.warp->known[4 * b + q];
          u32& known = c.warp->known[4 * dst[k] + q];
          known = ((known & ~c.mask) | (((p & of_a) | (~p & of_b)) & ~at(2) & c.mask)) & ~doubt;
        }
      }
    }
    for (s32 k = 0; k < nd; k++)
      if (dst[k] >= 0) t[dst[k]] = (t[dst[k]] & ~c.mask) | (half[k & 1] & c.mask) | doubt;
    return;
  }
  if (kind != kTaintClear) {
    for (s32 k = 0; k < ns; k++) bits |= t[d[k]];
    if (kind == kTaintWarp) bits = bits & c.mask ? kFull : 0;
  }
  if (kind == kTaintMatrix) {
    // D = A B + C: row r of D is as undefined as row r of A, column n as column n of B. A register
    // holds row lane / 4, or that plus 8 (odd ones of A; the second half of C and D).
    s32 na = d[ns], nb = d[ns + 1], nc = ns - na - nb;
    u32 row[2] = {0, 0}, column = 0;
    for (s32 k = 0; k < na; k++) row[k & 1] |= t[d[k]];
    for (s32 k = na; k < na + nb; k++) column |= t[d[k]];
    if (!(bits | row[0] | row[1] | column)) {
      for (s32 k = 0; k < nd; k++) t[dst[k]] = 0;
      return;
    }
    u32 rows[2] = {0, 0};
    for (int h = 0; h < 2; h++)
      for (int g = 0; g < 8; g++)
        if ((row[h] >> (4 * g)) & 15) rows[h] |= 15u << (4 * g);
    for (s32 k = 0; k < nd; k++) {
      u32 r = rows[nd == 4 ? k / 2 : k & 1];
      for (int g = 0; g < 8; g++)
        if ((column >> (4 * g)) & 15 && (nd != 4 || (g & 1) == (k & 1)))
          r |= 0x11111111u << (g / 2);
      if (k < nc) r |= t[d[na + nb + k]];
      t[dst[k]] = r;
    }
    return;
  }
  for (s32 k = 0; k < nd; k++) t[dst[k]] = (t[dst[k]] & ~c.mask) | (bits & c.mask) | doubt;
}

}  // namespace emu::EMU_ISA
