// The pools of this process, one for each set of processors that callers are bound to: a thread is
// bound as the one that starts it.
#include <algorithm>
#include <atomic>

#include "cpu/cores.h"
#include "cpu/pool.h"
#include "snv2/pool.h"

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace snv2 {
namespace {

using cpu::Affinity;

int64_t usable(const Affinity& affinity) { return std::min(affinity.cores(), cpu::cgroup_cores()); }

struct BoundPool {
  const Affinity affinity;
  cpu::Pool pool;
  BoundPool* next = nullptr;
};

// Pools are never freed: threads may be inside while the process ends.
class Pools {
 public:
  Pools() {
#if defined(__unix__) || defined(__APPLE__)
    pthread_atfork(nullptr, nullptr, forget);
#endif
  }

  ~Pools() {
    for (BoundPool* bound = first_.load(); bound != nullptr; bound = bound->next) {
      bound->pool.stop();
    }
    ended_.store(true);
  }

  // Null when the library's static objects have been destroyed.
  static cpu::Pool* of_this_thread() {
    const Affinity affinity = Affinity::of_this_thread();
    BoundPool* first = first_.load(std::memory_order_acquire);
    for (BoundPool* bound = first; bound != nullptr; bound = bound->next) {
      if (bound->affinity == affinity) return &bound->pool;
    }
    if (ended_.load()) return nullptr;
    auto* const made = new BoundPool{affinity, cpu::Pool(usable(affinity), affinity), first};
    if (first_.compare_exchange_strong(first, made)) return &made->pool;
    delete made;  // another thread was here, perhaps for the same processors
    return of_this_thread();
  }

 private:
  // A child has none of its parent's threads, and locks as they were.
  static void forget() {
    first_.store(nullptr);
    cpu::renew_sleepers();
  }

  inline static std::atomic<BoundPool*> first_{nullptr};
  inline static std::atomic<bool> ended_{false};
};

Pools pools;

void run(void*, int64_t count, ParallelFor::Body body, void* arg) {
  if (cpu::Pool* const pool = Pools::of_this_thread()) return pool->run(count, body, arg);
  for (int64_t i = 0; i < count; ++i) body(arg, i);
}

}  // namespace

int64_t usable_cores() { return usable(Affinity::of_this_thread()); }

ParallelFor shared_pool(int64_t threads) {
  ParallelFor pool;
  pool.threads = std::max<int64_t>(threads, 1);
  pool.run = run;
  return pool;
}

}  // namespace snv2
