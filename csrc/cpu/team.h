// Threads that take a network's steps together, inside one call of the caller's parallel_for: a
// step then waits for an atomic counter, not for a pool's fork and join.
//
// All members run the same steps in the same order. A step is cut into parts; part i is member i's
// unless another gets to it first, so that a thread finds in its caches what it made in the step
// before, and a member that has not started yet, or lost its core, does not hold up the others.
// Nobody waits for a part that nobody has begun: should the pool run the members one after the
// other, the first one does everything.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>

#include "snv2/types.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace snv2::cpu {

// What the members share: for each part the last step for which it has been taken, then the number
// of parts that are finished, of all steps. Zero at the start.
struct TeamCounter {
  std::atomic<int64_t> value{0};
  char rest_of_cache_line[56];
};
constexpr int64_t team_counters(int64_t threads) { return threads + 1; }

class Team {
 public:
  const int64_t threads;
  const int64_t member = 0;

  // Alone.
  Team() : threads(1) {}
  Team(TeamCounter* counters, int64_t count, int64_t number)
      : threads(count), member(number), counters_(counters) {}

  // One step: f(i) once for each i in [0, count), count <= threads, by some member; returns when
  // all are done.
  template <class F>
  void operator()(int64_t count, const F& f) {
    if (threads == 1) {
      for (int64_t i = 0; i < count; ++i) f(i);
      return;
    }
    ++step_;
    finished_ += count;
    std::atomic<int64_t>& done = counters_[threads].value;
    for (int64_t k = 0; k < count; ++k) {
      const int64_t i = (member + k) % count;
      if (!claim(counters_[i].value)) continue;
      f(i);
      done.fetch_add(1, std::memory_order_acq_rel);
    }
    for (int64_t tries = 0; done.load(std::memory_order_acquire) < finished_; ++tries) {
      if (tries < kSpins) {
        pause();
      } else {
        std::this_thread::yield();  // to the one whose part it is
      }
    }
  }

 private:
  static constexpr int64_t kSpins = 256;  // about ten microseconds

  bool claim(std::atomic<int64_t>& last) const {
    int64_t seen = last.load(std::memory_order_relaxed);
    return seen < step_ && last.compare_exchange_strong(seen, step_, std::memory_order_acq_rel);
  }

  static void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  TeamCounter* counters_ = nullptr;
  int64_t step_ = 0;
  int64_t finished_ = 0;  // parts of this step and all before
};

}  // namespace snv2::cpu
