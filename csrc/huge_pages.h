// Fresh memory in large pages where the system offers them.
//
// The allocator hands large results out as untouched pages, and the first write to each traps: for
// 32 MiB of 4 KiB pages that took seven times as long as decoding a weight into them. One trap for
// 2 MiB takes most of that away.
#pragma once
#include <cstdint>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace qlk {

// Says so for the whole huge pages inside [data, data + bytes); nothing outside is touched, so no
// memory is held that was not asked for. A system that does not know how ignores it.
inline void prefer_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t{2} << 20;
  if (bytes < static_cast<int64_t>(4 * kHuge)) return;
  const auto begin = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) & ~(kHuge - 1);
  const auto end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kHuge - 1);
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace qlk
