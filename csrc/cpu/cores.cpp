#include "cpu/cores.h"

#include <algorithm>
#include <fstream>
#include <iterator>
#include <sstream>
#include <thread>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace snv2::cpu {
namespace {

constexpr int64_t kUnlimited = INT64_MAX;

std::string text_of(const std::string& path) {
  std::ifstream file(path);
  return {std::istreambuf_iterator<char>(file), {}};
}

// Returns the cores of text like "150000 100000", the time in each period; "max" or -1 is no limit.
int64_t cores_of(const std::string& quota_and_period) {
  std::istringstream text(quota_and_period);
  int64_t quota = 0, period = 0;
  if (!(text >> quota >> period) || quota <= 0 || period <= 0) return kUnlimited;
  return std::max<int64_t>(1, quota / period + (quota % period != 0));
}

// A group and those around it, of which each has a limit. What a container does not see of them is
// left out: it has its own at the root.
template <class Limit>
int64_t least_upwards(std::string group, const Limit& limit) {
  int64_t least = kUnlimited;
  for (;;) {
    least = std::min(least, limit(group));
    if (group.empty() || group == "/") return least;
    group.resize(group.rfind('/') == std::string::npos ? 0 : group.rfind('/'));
  }
}

bool names_cpu(const std::string& controllers) {
  return ("," + controllers + ",").find(",cpu,") != std::string::npos;
}

}  // namespace

// Lines are number:controllers:group; those of version 2 name no controllers.
int64_t cgroup_cores(const std::string& groups, const std::string& root) {
  int64_t least = kUnlimited;
  std::istringstream lines(groups);
  for (std::string line; std::getline(lines, line);) {
    const size_t first = line.find(':');
    const size_t second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const std::string group = line.substr(second + 1);
    if (controllers.empty()) {
      for (const char* const mount : {"", "/unified"}) {
        least = std::min(least, least_upwards(group, [&](const std::string& path) {
                           return cores_of(text_of(root + mount + path + "/cpu.max"));
                         }));
      }
    } else if (names_cpu(controllers)) {
      for (const std::string& mount : {std::string("cpu"), controllers}) {
        least =
            std::min(least, least_upwards(group, [&](const std::string& path) {
                       const std::string at = root + "/" + mount + path + "/cpu.cfs_";
                       return cores_of(text_of(at + "quota_us") + " " + text_of(at + "period_us"));
                     }));
      }
    }
  }
  return least;
}

int64_t cgroup_cores() {
  static const int64_t cores = cgroup_cores(text_of("/proc/self/cgroup"), "/sys/fs/cgroup");
  return cores;
}

#if defined(__linux__)

ThreadId this_thread() { return static_cast<ThreadId>(syscall(SYS_gettid)); }

int current_core() { return sched_getcpu(); }

Affinity Affinity::of_this_thread() {
  Affinity affinity;
  CPU_ZERO(&affinity.set_);
  affinity.known_ = sched_getaffinity(0, sizeof affinity.set_, &affinity.set_) == 0;
  return affinity;
}

bool Affinity::operator==(const Affinity& other) const {
  return known_ == other.known_ && CPU_EQUAL(&set_, &other.set_);
}

int64_t Affinity::cores() const {
  return std::max<int64_t>(1, known_ ? CPU_COUNT(&set_) : std::thread::hardware_concurrency());
}

void Affinity::bind(ThreadId thread) const {
  if (known_ && thread > 0) sched_setaffinity(thread, sizeof set_, &set_);
}

void Affinity::bind_without(int core, ThreadId thread) const {
  if (!known_ || core < 0 || core >= CPU_SETSIZE || thread <= 0) return;
  cpu_set_t others = set_;
  CPU_CLR(static_cast<size_t>(core), &others);
  if (CPU_COUNT(&others) > 0) sched_setaffinity(thread, sizeof others, &others);
}

#else

ThreadId this_thread() { return 0; }
int current_core() { return -1; }

Affinity Affinity::of_this_thread() { return {}; }
bool Affinity::operator==(const Affinity&) const { return true; }
int64_t Affinity::cores() const {
  return std::max<int64_t>(1, std::thread::hardware_concurrency());
}
void Affinity::bind(ThreadId) const {}
void Affinity::bind_without(int, ThreadId) const {}

#endif

}  // namespace snv2::cpu
