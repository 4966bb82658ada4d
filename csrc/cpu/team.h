// Threads that take a network's steps together, inside one call of the caller's parallel_for: a
// step then waits for an atomic counter, not for a pool's fork and join.
//
// All members run the same steps in the same order. A step is cut into parts; part i is member i's
// unless another gets to it first, so that a thread finds in its caches what it made in the step
// before, and a member that has not started yet, or lost its core, does not hold up the others.
// Nobody waits for a part that nobody has begun: should the pool run the members one after the
// other, the first one does everything.
#pragma once

#include <chrono>
#include <cstdint>

#include "cpu/wait.h"
#include "snv2/types.h"

namespace snv2::cpu {

// What the members share: for each part the last step for which it has been taken, then the number
// of parts that are finished, of all steps. Zero at the start.
struct TeamCounter {
  Word value{0};
  Word sleepers{0};  // members that wait for it asleep
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
    for (int64_t k = 0; k < count; ++k) {
      const int64_t i = (member + k) % count;
      if (!claim(counters_[i].value)) continue;
      const Finish when_done{*this};
      f(i);
    }
    wait();
  }

 private:
  // Long enough for what parts differ in time.
  static constexpr std::chrono::microseconds kLastPart{100};

  // Counts a part as finished when it ends, also by throwing: the others would wait for ever.
  struct Finish {
    const Team& team;
    ~Finish() { team.finish(); }
  };

  bool claim(Word& last) const {
    uint32_t seen = last.load(std::memory_order_relaxed);
    return seen < step_ && last.compare_exchange_strong(seen, step_, std::memory_order_acq_rel);
  }

  void finish() const {
    TeamCounter& done = counters_[threads];
    if (done.value.fetch_add(1) + 1 == finished_ && done.sleepers.load() != 0) {
      wake_all(done.value);
    }
  }

  // The count wraps around.
  bool is_finished(uint32_t done) const { return static_cast<int32_t>(done - finished_) >= 0; }

  void wait() const {
    TeamCounter& done = counters_[threads];
    for (Spin spin(kLastPart); !is_finished(done.value.load(std::memory_order_acquire));) {
      if (spin.again()) continue;
      const CoreLent lent;
      done.sleepers.fetch_add(1);
      const uint32_t seen = done.value.load();
      if (!is_finished(seen)) sleep_while(done.value, seen);
      done.sleepers.fetch_sub(1);
    }
  }

  TeamCounter* counters_ = nullptr;
  uint32_t step_ = 0;
  uint32_t finished_ = 0;  // parts of this step and all before
};

}  // namespace snv2::cpu
