#include "emulator/tsan.h"

#ifdef SNV2_TSAN

#include <sanitizer/tsan_interface.h>

#include <cstddef>

extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}

namespace snv2::emulator::tsan {
namespace {

constexpr uint32_t kLanes = 32;
constexpr uint32_t kMaxThreads = 64 * 1024;  // of a group
// Of a warp. Used again in turn: one that a lane has yet to leave is not filled in meanwhile.
constexpr uint32_t kMeetings = 64;
// Kinds of objects: a thread; two barriers of each scope; barriers that count; the meetings of a
// warp, which begins with some thread.
constexpr uint32_t kOfBarriers = 1, kOfTransactions = kOfBarriers + 2 * kScopes,
                   kOfMeetings = kOfTransactions + 1;
constexpr size_t kObject = 8;

// Runs f() as the thread.
template <class F>
void as(const Context& thread, const F& f) {
  void* const caller = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(thread.tsan_fiber, __tsan_switch_to_fiber_no_sync);
  f();
  __tsan_switch_to_fiber(caller, __tsan_switch_to_fiber_no_sync);
}

}  // namespace

Unobserved::Unobserved() {
  AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
  AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
}
Unobserved::~Unobserved() {
  AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
  AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
}

Order::Order() {
  for (uint32_t i = 0; i < kTurns; ++i) {
    objects_.emplace_back(size_t{kMaxThreads} * (kOfMeetings + kMeetings) * kObject);
  }
}

void Order::end_launch() { __tsan_acquire(&end_); }

void Order::begin_group(uint32_t threads) {
  __tsan_release(&start_);
  turn_ = (turn_ + 1) % kTurns;
  for (auto& odd : odd_) odd.assign(threads, 0);
  meetings_.assign(threads, 0);
  meeting_of_.assign(threads, nullptr);
}

void Order::begin(const Context& thread) {
  as(thread, [&] {
    __tsan_acquire(&start_);
    __tsan_acquire(&ended_[turn_]);
  });
}

void Order::end(const Context& thread) {
  as(thread, [&] {
    __tsan_release(&ended_[turn_]);
    __tsan_release(&end_);
  });
}

void* Order::object(uint32_t kind, uint32_t i) {
  return objects_[turn_].data() + (size_t{kind} * kMaxThreads + i) * kObject;
}

// Two for each circle of threads, in turn: some threads arrive at the next one while others have
// still to leave this one.
void* Order::barrier(Scope scope, uint32_t thread, uint32_t circle) {
  const auto kind = static_cast<uint32_t>(scope);
  return object(kOfBarriers + 2 * kind + odd_[kind][thread], circle);
}

// A barrier for reads alone is like any other here: ThreadSanitizer has no such thing.
void Order::arrive(Scope scope, uint32_t thread, uint32_t circle) {
  __tsan_release(barrier(scope, thread, circle));
}

void Order::leave(Scope scope, uint32_t thread, uint32_t circle) {
  __tsan_acquire(barrier(scope, thread, circle));
  odd_[static_cast<uint32_t>(scope)][thread] ^= 1;
}

void Order::arrive_lane(uint32_t thread) { __tsan_release(object(0, thread)); }

void Order::complete_lanes(uint32_t thread, uint32_t first, uint32_t mask) {
  void* const met = object(kOfMeetings + meetings_[first]++ % kMeetings, first);
  for (uint32_t i = 0; i < kLanes; ++i) {
    if ((mask >> i & 1) == 0) continue;
    if (first + i != thread) __tsan_acquire(object(0, first + i));
    meeting_of_[first + i] = met;
  }
  __tsan_release(met);
}

void Order::release_transactions(uint32_t barrier) {
  __tsan_release(object(kOfTransactions, barrier % kMaxThreads));
}
void Order::acquire_transactions(uint32_t barrier) {
  __tsan_acquire(object(kOfTransactions, barrier % kMaxThreads));
}

void Order::leave_lane(uint32_t thread) { __tsan_acquire(meeting_of_[thread]); }

}  // namespace snv2::emulator::tsan

#endif
