// Threads that help callers with their bodies.
//
// A caller hands one body each to workers that are idle, runs the first itself, and then every one
// that nobody has begun, taking back what it had handed to workers that have not come. So it waits
// for none but those in the middle of a body, and a machine with other work to do costs it helpers,
// not time. The same worker gets the same body from call to call, and finds its share of the
// weights in its caches.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "cpu/wait.h"
#include "snv2/types.h"

namespace snv2::cpu {

class Pool {
 public:
  // Threads are started when a call first needs them.
  explicit Pool(int64_t cores);
  Pool(const Pool&) = delete;
  ~Pool();

  // Several threads may call at once: each takes up a core, and workers run on those that are left.
  // A body that calls again, of whatever pool, runs alone.
  void run(int64_t count, ParallelFor::Body body, void* arg);

  // Ends all workers; later calls run alone.
  void stop();

  // Workers that have been started.
  int64_t workers() const { return started_.load(); }

 private:
  struct Job;
  struct Worker;

  int64_t hand_out(Job& job, int64_t wanted);
  static bool hand_to(Worker& worker, Job& job, int64_t index);
  int64_t start_workers(Job& job, int64_t handed, int64_t wanted);
  Job* next_job(Worker& worker) const;
  void work(Worker& worker) const;

  const int64_t cores_;
  std::atomic<int64_t> callers_{0};
  std::atomic<bool> stopped_{false};
  std::atomic<int64_t> started_{0};
  std::mutex starting_;
  std::vector<std::unique_ptr<Worker>> workers_;  // started_ of them; the others are null
};

}  // namespace snv2::cpu
