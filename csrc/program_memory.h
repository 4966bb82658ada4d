// Memory for weights and workspaces: aligned, and in huge pages where it is large and the system
// has them, which save the walks of page tables.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>

namespace snv2 {

// At least `bytes`, uninitialized; throws std::runtime_error naming what they are for.
inline std::shared_ptr<void> allocate(size_t bytes, const char* what) {
  constexpr size_t kLine = 64, kHugePage = size_t{2} << 20;
  const size_t align = bytes < kHugePage ? kLine : kHugePage;
  const size_t size = bytes > SIZE_MAX - align ? 0 : (bytes / align + 1) * align;
  void* const memory = size == 0 ? nullptr : std::aligned_alloc(align, size);
  if (memory == nullptr) {
    throw std::runtime_error(std::string("cannot allocate memory for ") + what + ": " +
                             std::to_string(bytes) + " bytes");
  }
#if defined(MADV_HUGEPAGE)
  if (align == kHugePage) madvise(memory, size, MADV_HUGEPAGE);
#endif
  return {memory, std::free};
}

}  // namespace snv2
