// Processors that a thread may use.
#pragma once

#include <cstdint>
#include <string>

#if defined(__linux__)
#include <sched.h>
#endif

namespace snv2::cpu {

// The set that a thread is bound to; the same one for all threads where there is no such thing.
class Affinity {
 public:
  static Affinity of_this_thread();

  bool operator==(const Affinity& other) const;
  // At least 1.
  int64_t cores() const;

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
