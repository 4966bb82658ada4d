// Threads that help callers with their bodies.
//
// A caller hands one body each to workers that are idle, runs the first itself, and then every one
// that nobody has begun, taking back what it had handed to workers that have not come. So it waits
// for none but those in the middle of a body, and a machine with other work to do costs it helpers,
// not time. The same worker gets the same body from call to call, and finds its share of the
// weights in its caches.
//
// Workers are bound to the callers' processors but the one that their caller is on. A scheduler may
// wake a thread where its waker runs although others are idle: in a guest of KVM, Linux takes an
// idle processor that its host has put aside for a busy one. Two threads of a call then take turns
// on one processor until a tick, of up to 10 ms, finds them.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "cpu/cores.h"
#include "cpu/wait.h"
#include "snv2/types.h"

namespace snv2::cpu {

class Pool {
 public:
  // Threads are started when a call first needs them. `callers` is what threads that call are bound
  // to; if it is not said, workers are not bound.
  explicit Pool(int64_t cores, const Affinity& callers = {});
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
  bool hand_to(Worker& worker, Job& job, int64_t index) const;
  void keep_off(Worker& worker, int core) const;
  void lend_core(const Job& job) const;
  void take_core(Job& job) const;
  friend class CoreLent;
  int64_t start_workers(Job& job, int64_t handed, int64_t wanted);
  Job* next_job(Worker& worker) const;
  void work(Worker& worker) const;

  const int64_t cores_;
  const Affinity allowed_;
  inline static thread_local Job* calling_ = nullptr;  // of this thread
  std::atomic<int64_t> callers_{0};
  std::atomic<bool> stopped_{false};
  std::atomic<int64_t> started_{0};
  std::mutex starting_;
  std::vector<std::unique_ptr<Worker>> workers_;  // started_ of them; the others are null
};

}  // namespace snv2::cpu
