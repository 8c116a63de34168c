// Large buffers on huge pages: the first touch of a 4 KB page often costs more than what is
// computed on it. Only advice; without effect outside Linux.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace quark {

constexpr std::size_t kHugePage = std::size_t{1} << 21;

// Advise the kernel to back what whole huge pages there are in a buffer, not yet written.
inline void prefer_huge_pages(void* data, std::size_t bytes) {
#ifdef __linux__
  const auto begin = reinterpret_cast<std::uintptr_t>(data);
  const std::uintptr_t first = (begin + kHugePage - 1) & ~(kHugePage - 1);
  const std::uintptr_t last = (begin + bytes) & ~(kHugePage - 1);
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

}  // namespace quark
