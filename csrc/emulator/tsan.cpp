#include "emulator/tsan.h"

#ifdef SNV2_TSAN

#include <sanitizer/tsan_interface.h>
#include <sys/mman.h>

extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}

namespace snv2::emulator::tsan {
namespace {

constexpr uint32_t kLanes = 32;
constexpr size_t kObject = 8;
// Of a warp. Used again in turn: one that a lane has yet to leave is not filled in meanwhile.
constexpr uint32_t kMeetings = 64;

}  // namespace

Unobserved::Unobserved() {
  AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
  AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
}
Unobserved::~Unobserved() {
  AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
  AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
}

void forget(void* memory, size_t bytes) {
  // Unmapping forgets what was ordered by these addresses, mapping forgets accesses.
  munmap(memory, bytes);
  mmap(memory, bytes, PROT_READ | PROT_WRITE,
       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
}

void Order::begin_group(uint32_t threads) {
  const uint32_t warps = threads;  // at most
  const size_t bytes = (threads * (1 + 2 * 3) + size_t{warps} * kMeetings) * kObject;
  objects_.clear();
  objects_.emplace_back(bytes);
  for (auto& odd : odd_) odd.assign(threads, 0);
  meetings_.assign(warps, 0);
  meeting_of_.assign(threads, nullptr);
}

// Two for each circle of threads, in turn: some threads arrive at the next one while others have
// still to leave this one.
void* Order::barrier(Scope scope, uint32_t thread, uint32_t circle) {
  const auto kind = static_cast<uint32_t>(scope);
  const size_t threads = meeting_of_.size();
  const size_t i = threads + 2 * (kind * threads + circle) + odd_[kind][thread];
  return objects_[0].data() + i * kObject;
}

void Order::arrive(Scope scope, uint32_t thread, uint32_t circle) {
  __tsan_release(barrier(scope, thread, circle));
}

void Order::leave(Scope scope, uint32_t thread, uint32_t circle) {
  __tsan_acquire(barrier(scope, thread, circle));
  odd_[static_cast<uint32_t>(scope)][thread] ^= 1;
}

void Order::arrive_lane(uint32_t thread) { __tsan_release(objects_[0].data() + thread * kObject); }

void Order::complete_lanes(uint32_t thread, uint32_t first, uint32_t mask) {
  const size_t threads = meeting_of_.size();
  const size_t meeting = first * size_t{kMeetings} + meetings_[first]++ % kMeetings;
  void* const met = objects_[0].data() + (7 * threads + meeting) * kObject;
  for (uint32_t i = 0; i < kLanes; ++i) {
    if ((mask >> i & 1) == 0) continue;
    if (first + i != thread) __tsan_acquire(objects_[0].data() + (first + i) * kObject);
    meeting_of_[first + i] = met;
  }
  __tsan_release(met);
}

void Order::leave_lane(uint32_t thread) { __tsan_acquire(meeting_of_[thread]); }

void Order::end(const Context& thread) {
  if (thread.tsan_fiber == nullptr) return;
  void* const caller = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(thread.tsan_fiber, __tsan_switch_to_fiber_no_sync);
  __tsan_release(&end_);
  __tsan_switch_to_fiber(caller, __tsan_switch_to_fiber_no_sync);
}

void Order::end_launch() { __tsan_acquire(&end_); }

}  // namespace snv2::emulator::tsan

#endif
