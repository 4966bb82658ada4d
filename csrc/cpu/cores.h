// Processors that a thread may use.
#pragma once

#include <cstdint>
#include <string>

#if defined(__linux__)
#include <sched.h>
#include <sys/types.h>
#endif

namespace snv2::cpu {

#if defined(__linux__)
using ThreadId = pid_t;
#else
using ThreadId = int;
#endif

// Returns this thread's number for Affinity::bind(), 0 where threads cannot be bound.
ThreadId this_thread();

// Returns the processor that this thread runs on at the moment, negative where that is not known.
int current_core();

// The set that a thread is bound to; the same one for all threads where there is no such thing.
class Affinity {
 public:
  static Affinity of_this_thread();

  bool operator==(const Affinity& other) const;
  // At least 1.
  int64_t cores() const;
  // Binds a thread to the set.
  void bind(ThreadId thread) const;
  // Binds a thread to all processors of the set but one, if there is another.
  void bind_without(int core, ThreadId thread) const;

 private:
#if defined(__linux__)
  cpu_set_t set_;
  bool known_ = false;  // a machine may have more processors than the set has room for
#endif
};

// Processors that this process's cgroup has time for, rounded up; INT64_MAX if it is not limited.
// `groups` is the text of /proc/self/cgroup, `root` the directory where cgroups are mounted.
int64_t cgroup_cores(const std::string& groups, const std::string& root);

// The same of this process, read once.
int64_t cgroup_cores();

}  // namespace snv2::cpu
