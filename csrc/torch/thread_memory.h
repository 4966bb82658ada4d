// Memory for one call of an op, taken from what the calling thread keeps.
//
// Pages fresh from the kernel cost as much as a small network, and freed memory of this size goes
// back to it at once. Huge pages save the walks of page tables.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>
#include <cstdlib>
#include <memory>

#include "tensors.h"

namespace snv2::binding {

class ThreadMemory {
 public:
  explicit ThreadMemory(int64_t bytes) {
    if (bytes > kMostKept) {
      own_ = allocate(bytes);
      data_ = own_.get();
      return;
    }
    thread_local Block kept;
    thread_local int64_t kept_bytes = 0;
    if (bytes > kept_bytes) {
      kept.reset();
      kept_bytes = 0;
      kept = allocate(bytes);
      kept_bytes = bytes;
    }
    data_ = kept.get();
  }

  void* data() const { return data_; }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  using Block = std::unique_ptr<void, Free>;

  static constexpr int64_t kMostKept = int64_t{64} << 20;
  static constexpr int64_t kHugePage = int64_t{2} << 20;

  static Block allocate(int64_t bytes) {
    const int64_t align = bytes < kHugePage ? 64 : kHugePage;
    const int64_t size = ceil_div(bytes, align) * align;
    Block block(std::aligned_alloc(static_cast<size_t>(align), static_cast<size_t>(size)));
    STD_TORCH_CHECK(block != nullptr, "cannot allocate memory for the workspace: ", size, " bytes");
#if defined(MADV_HUGEPAGE)
    madvise(block.get(), static_cast<size_t>(size), MADV_HUGEPAGE);
#endif
    return block;
  }

  Block own_;
  void* data_ = nullptr;
};

}  // namespace snv2::binding
