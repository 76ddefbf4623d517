// The emulator's engine: what Python hands over, and the state of a launch.
//
// Python (qlora_kernels/emulator/decode.py) turns a kernel into a flat program: one Inst for each
// PTX instruction, operands resolved to byte offsets into a warp's register file. A register is 32
// lanes side by side, 4 or 8 bytes each, so that an instruction is a loop over lanes that the
// compiler vectorises; a predicate is one 32-bit word. The same files are compiled once for each
// instruction set (EMU_ISA names the namespace), and api.cpp picks one at run time.
#pragma once

#include <cstdint>

namespace emu {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;

constexpr u32 kFull = 0xffffffffu;

// Generic addresses: these windows stand for shared and local memory, everything else is global.
constexpr u64 kSharedWindow = 1ull << 56;
constexpr u64 kLocalWindow = 2ull << 56;
constexpr u64 kWindowMask = 0xffull << 56;

enum Check : u32 { kUninit = 1, kRaces = 2, kSync = 4, kCounts = 8 };

enum Flag : u32 {
  kTaint = 1,    // registers that may be undefined take part: see taint_step
  kControl = 2,  // runs even if its guard leaves no lane (branches)
  kStrong = 4,   // volatile, relaxed or stronger: does not race with its like
  kAcquire = 8,
  kRelease = 16,
  kConst = 32,  // reads of constant or parameter memory
  kCheckAddress = 64,
  kUncounted = 128,  // a part of another instruction, or a check
};

// One decoded instruction as Python writes it (numpy dtype INST in decode.py).
struct Inst {
  u32 op;         // index into the table of operations
  s32 guard;      // predicate, or -1
  u32 guard_xor;  // all ones for @!p
  u32 flags;
  s32 o[6];   // operands: byte offset of a register, | 1 for the constant pool; or a predicate
  u32 id;     // row of the kernel's instruction table
  u32 n;      // vector length, operand count
  s32 list;   // first entry in the operand lists
  s32 taint;  // first entry of the taint description in the operand lists, or -1
  s64 imm;
  s64 imm2;
};

struct Block {
  s32 first, last;  // instructions [first, last)
  s32 next;         // block that follows if no branch is taken, -1 if none
  s32 sync;         // starts with an operation of several lanes
};

struct Special {
  s32 kind, offset;  // special register, byte offset in the register file
};

struct Region {
  u64 base, size;
  char* host;
  u8* initialized;    // a byte for each byte, or null: all of it
  u64* read_sectors;  // a bit for each 32 bytes, or null
  u64* written_sectors;
  u32 writable;
  u32 tracked;  // races are looked for
  u64 sectors_read, sectors_written;
};

struct Count {
  u64 warps, threads, bytes, requests, sectors, sectors_ideal, wavefronts, wavefronts_ideal, flops,
      taken;
};

enum Kind : u32 {
  kOutOfBounds = 1,
  kMisaligned,
  kReadOnly,
  kUninitGlobal,
  kUninitShared,
  kUninitLocal,
  kUninitRegister,
  kRaceShared,
  kRaceGlobal,
  kRaceWarp,
  kAsyncRead,
  kBarrierDivergent,
  kBarrierMissing,
  kDeadlock,
  kShuffleInactive,
  kNotConverged,
  kBudget,
  kTrap,
  kMatrixRow,
  kBadBarrier,
  kAssert,
  kBadOperand,
  kRaceAsync,
  kMatrixPending,
  kMatrixFence,
  kMatrixProxy,
};

struct Report {
  u32 kind, inst, block, thread;
  u64 address;
  u32 space, size;        // 0 global, 1 shared, 2 local, 3 const or param
  u32 write, other_inst;  // other_inst, other_block, other_thread: the second party, ~0 if none
  u32 other_block, other_thread;
  u64 count;  // how often, all lanes and blocks
  u64 extra;
};

struct Program {
  const Inst* inst;
  const Block* block;
  const s32* lists;
  const char* constants;
  const Special* special;
  s32 n_inst, n_block, n_special, n_lists;
  s32 register_bytes, n_pred, n_rows;
  s32 local_bytes, shared_granule, constant_bytes;
  s32 has_taint, n_taint_init;
  const s32* taint_init;  // taint indices that start undefined
  const Inst* followed;   // inst, but undefined values are followed from shared memory on; or null
};

struct Launch {
  u32 grid[3], block[3];
  u32 cluster[3];
  u32 checks;
  const char* params;
  u64 param_bytes, param_base;
  Region* regions;  // sorted by base, disjoint
  u64 n_regions;
  u32 static_shared, dynamic_shared;  // laid out: see shared_map
  const u8* shared_map;               // a byte for each byte of shared memory: 0 a gap, 1 valid
  u32 shared_total, max_resident;     // the device's limit on blocks at once
  u64 seed;
  u64 budget;   // warp instructions, 0: none
  u8* late;     // a byte for each basic block: entered after half of a budget that was exceeded
  u32 quantum;  // most basic blocks a warp runs at a stretch
  u32 cooperative;
  const u32* block_list;  // blocks to run, or null for all
  u64 n_blocks;
  Count* counts;  // a row for each PTX instruction
  Report* reports;
  u64 max_reports, n_reports;
  char* print;
  u64 print_size, print_used;
  u64 totals[8];  // blocks, threads, barriers, thread instructions, warp instructions, 3 spare
  u32 window;     // blocks kept resident at first, 0: chosen
  u32 smid_count;
};

enum Status : int { kDone = 0, kStopped = 1 };

// Operations are found by name, so Python holds no copy of their numbering.
struct Op;
}  // namespace emu
