#include "emulator/machine.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "emulator/fiber.h"
#include "emulator/memory.h"

namespace snv2::emulator {
namespace {

constexpr uint32_t kLanes = 32;
constexpr uint32_t kMaxThreads = 1024;
constexpr int64_t kMaxShared = 227 * 1024;
constexpr uint32_t kMaxCluster = 8;
constexpr uint64_t kMaxGroupThreads = 64 * 1024;  // resident at once: a cooperative grid
// A thread may take so many steps between two collectives; an access counts as many of them.
constexpr int64_t kStepLimit = int64_t{1} << 27;
constexpr int64_t kStepsPerAccess = 256;
// And be in so many barriers and collectives in all.
constexpr int64_t kCollectiveLimit = int64_t{1} << 18;

thread_local Counters counters_of_thread;
thread_local Stacks stacks;

enum class State { kReady, kWaiting, kDone };

struct Copy {
  unsigned char* to;
  const unsigned char* from;
  int bytes;
};

struct Fiber {
  Context context;
  Builtins builtins;
  uint32_t cta = 0;     // of the group
  uint32_t thread = 0;  // of the CTA
  State state = State::kReady;
  const char* waits_for = nullptr;
  Site site{nullptr, 0};
  uint32_t mask = 0;
  void* payload = nullptr;
  int64_t steps = 0;
  int64_t collectives = 0;
  bool waited_for_grid = false;  // for the launch before
  Stamp stamp;
  uint32_t seen_lanes[kLanes] = {};
  std::deque<std::vector<Copy>> groups;  // committed cp.async groups
  std::vector<Copy> group;               // the open one
};

struct Cta {
  std::unique_ptr<unsigned char[]> storage;
  unsigned char* shared = nullptr;
  std::unique_ptr<Shadow> shadow;
};

struct Memory {
  Region region;
  std::unique_ptr<Shadow> shadow;  // of written regions
};

class Machine {
 public:
  Machine(const LaunchShape& shape, void (*kernel)(const void*), const void* params)
      : shape_(shape), kernel_(kernel), params_(params) {}

  void add(const Region& region);
  void run_group(uint64_t first_cta, uint32_t ctas);
  void finish() const;

  [[noreturn]] void fault(const std::string& what);
  Fiber& fiber() { return *fiber_; }
  bool in_thread() const { return fiber_ != nullptr; }
  void step(int64_t steps);
  void count_collective();
  void access_global(const void* address, int bytes, bool write, Site site);
  void access_shared(const void* address, int bytes, bool write, Site site);
  void begin_copy(void* to, const void* from, int bytes, Site site);
  void commit();
  void wait_copies(int pending);
  void wait_for_grid() { fiber_->waited_for_grid = any_waited_ = true; }
  void barrier(Scope scope, Site site);
  void collective(const char* name, uint32_t mask, void* payload, Combine combine, Site site);
  unsigned char* shared() { return ctas_[fiber_->cta].shared; }
  unsigned char* remote(const void* address, int rank, Site site);
  uint32_t rank() const { return fiber_->cta % shape_.cluster; }
  void entry();

 private:
  Stamp now(Site site) {
    Stamp stamp = fiber_->stamp;
    stamp.site = site;
    stamp.seen_lanes = fiber_->seen_lanes;
    return stamp;
  }
  void wait(const char* what, uint32_t mask, Site site);
  static void order_lanes(Fiber* first, uint32_t mask);
  void run_warp(uint32_t cta, uint32_t warp);
  bool complete_barriers();
  void release(uint32_t first, uint32_t last, uint32_t Stamp::* epoch);
  std::string stuck() const;
  std::string describe(const Fiber& fiber) const;
  void aligned(const void* address, int bytes, Site site);
  void count_warp(uint32_t cta, uint32_t warp);

  LaunchShape shape_;
  void (*kernel_)(const void*);
  const void* params_;
  std::vector<Memory> memory_;
  std::vector<Cta> ctas_;
  std::vector<Fiber> fibers_;
  std::vector<std::vector<Access>> accesses_;  // of each fiber, since its warp was last counted
  Fiber* fiber_ = nullptr;
  bool any_waited_ = false;  // for the launch before
  Context scheduler_;
  std::string report_;
};

thread_local Machine* machine = nullptr;

const char* name_of(Scope scope) {
  switch (scope) {
    case Scope::kCta:
      return "sync_threads";
    case Scope::kCluster:
      return "sync_cluster";
    case Scope::kGrid:
      return "sync_grid";
  }
  return "";
}

void Machine::add(const Region& region) {
  for (const Memory& other : memory_) {
    const Region& r = other.region;
    const bool overlap = region.bytes > 0 && r.bytes > 0 && region.address < r.address + r.bytes &&
                         r.address < region.address + region.bytes;
    const bool both_written = region.written && r.written;
    const bool constant_written = (region.constant && r.written) || (region.written && r.constant);
    if (overlap && (both_written || constant_written)) {
      throw std::invalid_argument(
          std::string("launch: a buffer that is written overlaps with another that is ") +
          (both_written ? "written" : "constant"));
    }
  }
  if (region.undefined) std::memset(region.address, 0xff, static_cast<size_t>(region.bytes));
  counters_of_thread.minimum_load_bytes += region.read_bytes;
  counters_of_thread.minimum_store_bytes += region.written_bytes;
  memory_.push_back({region, region.written
                                 ? std::make_unique<Shadow>(region.bytes, !region.undefined)
                                 : std::unique_ptr<Shadow>()});
}

std::string Machine::describe(const Fiber& fiber) const {
  const Builtins& b = fiber.builtins;
  return "thread " + std::to_string(fiber.thread) + " of CTA (" + std::to_string(b.block_index.x) +
         ", " + std::to_string(b.block_index.y) + ")";
}

void Machine::fault(const std::string& what) {
  report_ = describe(*fiber_) + ": " + what;
  switch_context(fiber_->context, scheduler_);
  __builtin_unreachable();
}

void Machine::step(int64_t steps) {
  fiber_->steps += steps;
  if (fiber_->steps > kStepLimit) {
    fiber_->steps = 0;  // library code that writes the message may count steps too
    fault("never ends: too many steps without reaching a barrier or the end of the kernel");
  }
}

void Machine::count_collective() {
  if (++fiber_->collectives > kCollectiveLimit) {
    fault("never ends: too many barriers or collectives");
  }
}

void Machine::aligned(const void* address, int bytes, Site site) {
  if (reinterpret_cast<uintptr_t>(address) % static_cast<uintptr_t>(bytes) != 0) {
    fault("access of " + std::to_string(bytes) + " bytes at " + emulator::name_of(site) +
          " is not aligned to its size");
  }
}

void Machine::access_global(const void* address, int bytes, bool write, Site site) {
  step(kStepsPerAccess);
  aligned(address, bytes, site);
  const auto* p = static_cast<const unsigned char*>(address);
  const std::string what = write ? "global store" : "global load";
  Memory* found = nullptr;
  bool read_only = false;
  for (Memory& memory : memory_) {
    const Region& r = memory.region;
    if (p < r.address || p + bytes > r.address + r.bytes) continue;
    if (write && !r.written) {
      read_only = true;
      continue;
    }
    if (found == nullptr || !r.constant) found = &memory;
    if (r.written) break;
  }
  if (found == nullptr && read_only) {
    fault(what + " at " + emulator::name_of(site) +
          " to a buffer that the launch declared as read");
  }
  if (found == nullptr) {
    std::string where;
    int64_t nearest = INT64_MAX;
    for (size_t i = 0; i < memory_.size(); ++i) {
      const Region& r = memory_[i].region;
      const int64_t offset = p - r.address;
      const int64_t distance = offset < 0 ? -offset : offset - r.bytes;
      if (distance >= nearest) continue;
      nearest = distance;
      where = "; nearest is byte " + std::to_string(offset) + " of buffer " + std::to_string(i) +
              ", which has " + std::to_string(r.bytes);
    }
    fault(what + " of " + std::to_string(bytes) + " bytes at " + emulator::name_of(site) +
          " is outside all buffers of the launch" + where);
  }
  if (shape_.overlaps && !found->region.constant && !fiber_->waited_for_grid) {
    fault(what + " at " + emulator::name_of(site) +
          " before grid_dependency_wait, in a launch that overlaps with the one before it");
  }
  if (found->shadow != nullptr) {
    const int64_t offset = p - found->region.address;
    const std::string report = write ? found->shadow->write(offset, bytes, now(site))
                                     : found->shadow->read(offset, bytes, now(site));
    if (!report.empty()) fault("global memory: " + report);
  }
  accesses_[static_cast<size_t>(fiber_ - fibers_.data())].push_back(
      {reinterpret_cast<uintptr_t>(address), site, static_cast<int16_t>(bytes), false, write});
}

void Machine::access_shared(const void* address, int bytes, bool write, Site site) {
  step(kStepsPerAccess);
  aligned(address, bytes, site);
  const auto* p = static_cast<const unsigned char*>(address);
  const uint32_t first = fiber_->cta / shape_.cluster * shape_.cluster;
  for (uint32_t i = 0; i < shape_.cluster; ++i) {
    // This CTA's own first.
    Cta& cta = ctas_[first + (fiber_->cta - first + i) % shape_.cluster];
    const int64_t offset = p - cta.shared;
    if (offset < 0 || offset + bytes > shape_.shared_bytes) continue;
    const std::string report = write ? cta.shadow->write(offset, bytes, now(site))
                                     : cta.shadow->read(offset, bytes, now(site));
    if (!report.empty()) fault("shared memory: " + report);
    accesses_[static_cast<size_t>(fiber_ - fibers_.data())].push_back(
        {static_cast<uintptr_t>(offset), site, static_cast<int16_t>(bytes), true, write});
    return;
  }
  fault(std::string(write ? "shared store" : "shared load") + " of " + std::to_string(bytes) +
        " bytes at " + emulator::name_of(site) + " is outside: byte " +
        std::to_string(p - ctas_[fiber_->cta].shared) + " of " +
        std::to_string(shape_.shared_bytes));
}

void Machine::begin_copy(void* to, const void* from, int bytes, Site site) {
  access_global(from, bytes, false, site);
  access_shared(to, bytes, true, site);
  Cta& cta = ctas_[fiber_->cta];
  cta.shadow->begin_copy(static_cast<unsigned char*>(to) - cta.shared, bytes);
  fiber_->group.push_back(
      {static_cast<unsigned char*>(to), static_cast<const unsigned char*>(from), bytes});
}

void Machine::commit() {
  fiber_->groups.push_back(std::move(fiber_->group));
  fiber_->group.clear();
}

void Machine::wait_copies(int pending) {
  Cta& cta = ctas_[fiber_->cta];
  while (fiber_->groups.size() > static_cast<size_t>(pending)) {
    for (const Copy& copy : fiber_->groups.front()) {
      std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
      cta.shadow->end_copy(copy.to - cta.shared, copy.bytes, now({nullptr, 0}));
    }
    fiber_->groups.pop_front();
  }
}

void Machine::wait(const char* what, uint32_t mask, Site site) {
  fiber_->waits_for = what;
  fiber_->mask = mask;
  fiber_->site = site;
  fiber_->state = State::kWaiting;
  fiber_->steps = 0;
  switch_context(fiber_->context, scheduler_);
}

void Machine::barrier(Scope scope, Site site) {
  count_collective();
  if (scope == Scope::kGrid && !shape_.cooperative) {
    fault("sync_grid at " + emulator::name_of(site) + " in a launch that is not cooperative");
  }
  wait(name_of(scope), 0, site);
}

void Machine::collective(const char* name, uint32_t mask, void* payload, Combine combine,
                         Site site) {
  count_collective();
  const uint32_t lane = fiber_->thread % kLanes;
  if ((mask >> lane & 1) == 0) {
    fault(std::string(name) + " at " + emulator::name_of(site) + " by lane " +
          std::to_string(lane) + ", which is not in its mask");
  }
  Fiber* const first = fiber_ - lane;
  const uint32_t present = std::min(kLanes, shape_.threads - (fiber_->thread - lane));
  void* payloads[kLanes] = {};
  bool all = true;
  for (uint32_t i = 0; i < kLanes && all; ++i) {
    if ((mask >> i & 1) == 0) continue;
    if (i == lane) {
      payloads[i] = payload;
      continue;
    }
    all = i < present && first[i].state == State::kWaiting && first[i].waits_for == name &&
          first[i].mask == mask && first[i].site.line == site.line &&
          first[i].site.file == site.file;
    if (all) payloads[i] = first[i].payload;
  }
  if (!all) {
    fiber_->payload = payload;
    wait(name, mask, site);
    return;
  }
  combine(payloads, mask);
  for (uint32_t i = 0; i < present; ++i) {
    if ((mask >> i & 1) == 0) continue;
    first[i].state = State::kReady;
    first[i].steps = 0;
  }
  if (mask == ~0u) count_warp(fiber_->cta, fiber_->thread / kLanes);  // all lanes are here
  // A shuffle orders no memory.
  if (std::strcmp(name, "sync_warp") == 0) order_lanes(first, mask);
}

// What any lane of the mask did or saw, all of them see.
void Machine::order_lanes(Fiber* first, uint32_t mask) {
  uint32_t seen[kLanes] = {};
  for (uint32_t i = 0; i < kLanes; ++i) {
    if ((mask >> i & 1) == 0) continue;
    for (uint32_t j = 0; j < kLanes; ++j) seen[j] = std::max(seen[j], first[i].seen_lanes[j]);
    seen[i] = ++first[i].stamp.lane_epoch;
  }
  for (uint32_t i = 0; i < kLanes; ++i) {
    if ((mask >> i & 1) != 0) std::copy(seen, seen + kLanes, first[i].seen_lanes);
  }
}

unsigned char* Machine::remote(const void* address, int rank, Site site) {
  if (rank < 0 || static_cast<uint32_t>(rank) >= shape_.cluster) {
    fault("remote at " + emulator::name_of(site) + ": rank " + std::to_string(rank) +
          " is outside the cluster of " + std::to_string(shape_.cluster));
  }
  const uint32_t first = fiber_->cta / shape_.cluster * shape_.cluster;
  return ctas_[first + static_cast<uint32_t>(rank)].shared +
         (static_cast<const unsigned char*>(address) - shared());
}

void Machine::entry() {
  kernel_(params_);
  if (!fiber_->groups.empty() || !fiber_->group.empty()) {
    fault("the kernel ends with a cp.async under way: cp_async_wait is missing");
  }
  fiber_->state = State::kDone;
  switch_context(fiber_->context, scheduler_);
  __builtin_unreachable();
}

// Runs the warp's threads until all of them wait for other warps or are done.
void Machine::run_warp(uint32_t cta, uint32_t warp) {
  const uint32_t begin = cta * shape_.threads + warp * kLanes;
  const uint32_t end = std::min(begin + kLanes, (cta + 1) * shape_.threads);
  for (bool progress = true; progress;) {
    progress = false;
    for (uint32_t i = begin; i < end; ++i) {
      if (fibers_[i].state != State::kReady) continue;
      progress = true;
      fiber_ = &fibers_[i];
      switch_context(scheduler_, fiber_->context);
      fiber_ = nullptr;
      if (!report_.empty()) throw Fault(report_);
    }
  }
}

void Machine::count_warp(uint32_t cta, uint32_t warp) {
  const uint32_t begin = cta * shape_.threads + warp * kLanes;
  const uint32_t end = std::min(begin + kLanes, (cta + 1) * shape_.threads);
  count_accesses(&accesses_[begin], static_cast<int>(end - begin), counters_of_thread);
}

void Machine::release(uint32_t first, uint32_t last, uint32_t Stamp::* epoch) {
  for (uint32_t i = first; i < last; ++i) {
    fibers_[i].state = State::kReady;
    ++(fibers_[i].stamp.*epoch);
  }
  counters_of_thread.barriers += (last - first) / shape_.threads;
}

// True if a barrier had all its threads.
bool Machine::complete_barriers() {
  bool any = false;
  const auto all = static_cast<uint32_t>(fibers_.size());
  const struct {
    Scope scope;
    uint32_t threads;
    uint32_t Stamp::* epoch;
  } barriers[] = {{Scope::kCta, shape_.threads, &Stamp::cta_epoch},
                  {Scope::kCluster, shape_.threads * shape_.cluster, &Stamp::cluster_epoch},
                  {Scope::kGrid, all, &Stamp::grid_epoch}};
  for (const auto& b : barriers) {
    const char* const name = name_of(b.scope);
    for (uint32_t first = 0; first < all; first += b.threads) {
      const Fiber& leader = fibers_[first];
      bool arrived = true;
      for (uint32_t i = first; i < first + b.threads && arrived; ++i) {
        const Fiber& f = fibers_[i];
        arrived = f.state == State::kWaiting && f.waits_for == name &&
                  f.site.line == leader.site.line && f.site.file == leader.site.file;
      }
      if (!arrived) continue;
      release(first, first + b.threads, b.epoch);
      any = true;
    }
  }
  return any;
}

// Why nobody can go on: who waits, and who is missing.
std::string Machine::stuck() const {
  const auto waiting = std::find_if(fibers_.begin(), fibers_.end(),
                                    [](const Fiber& f) { return f.state == State::kWaiting; });
  const auto here = [&](const Fiber& f) {
    return f.state == State::kWaiting && f.waits_for == waiting->waits_for &&
           f.site.line == waiting->site.line && f.site.file == waiting->site.file &&
           f.mask == waiting->mask;
  };
  const bool warp_wide = waiting->mask != 0;
  std::string report = describe(*waiting) + " waits in " + waiting->waits_for + " at " +
                       emulator::name_of(waiting->site) + " for ";
  const auto index = static_cast<uint32_t>(waiting - fibers_.begin());
  uint32_t first = 0, last = static_cast<uint32_t>(fibers_.size());
  if (warp_wide) {
    first = index - waiting->thread % kLanes, last = first + kLanes;
  } else if (waiting->waits_for == name_of(Scope::kCta)) {
    first = index - waiting->thread, last = first + shape_.threads;
  }
  for (uint32_t i = first; i < last; ++i) {
    if (warp_wide && (waiting->mask >> (i - first) & 1) == 0) continue;
    const bool exists = i < fibers_.size() && fibers_[i].cta == waiting->cta;
    if (warp_wide && !exists) {
      return report + "lane " + std::to_string(i - first) + ", which the CTA does not have";
    }
    const Fiber& f = fibers_[i];
    if (here(f)) continue;
    report +=
        (warp_wide ? "lane " + std::to_string(i - first) + ", " : "") + describe(f) + ", which ";
    if (f.state == State::kDone) return report + "has ended";
    return report + "waits in " + f.waits_for + " at " + emulator::name_of(f.site);
  }
  return report + "nobody";
}

void entry_of_thread() { machine->entry(); }

void Machine::run_group(uint64_t first_cta, uint32_t ctas) {
  ctas_.clear();
  ctas_.resize(ctas);
  fibers_.clear();
  fibers_.resize(size_t{ctas} * shape_.threads);
  accesses_.resize(fibers_.size());
  const uint32_t warps = (shape_.threads + kLanes - 1) / kLanes;
  for (uint32_t c = 0; c < ctas; ++c) {
    Cta& cta = ctas_[c];
    // To the byte, aligned as the GPU's is.
    cta.storage = std::make_unique<unsigned char[]>(static_cast<size_t>(shape_.shared_bytes) + 128);
    void* memory = cta.storage.get();
    size_t space = static_cast<size_t>(shape_.shared_bytes) + 128;
    cta.shared = static_cast<unsigned char*>(
        std::align(128, static_cast<size_t>(shape_.shared_bytes), memory, space));
    std::memset(cta.shared, 0xff, static_cast<size_t>(shape_.shared_bytes));
    cta.shadow = std::make_unique<Shadow>(shape_.shared_bytes, false);
    const uint64_t index = first_cta + c;
    for (uint32_t t = 0; t < shape_.threads; ++t) {
      const size_t i = size_t{c} * shape_.threads + t;
      Fiber& f = fibers_[i];
      f.context = stacks.start(i, entry_of_thread);
      f.cta = c;
      f.thread = t;
      f.builtins.thread_index = {t, 0, 0};
      f.builtins.block_index = {static_cast<uint32_t>(index % shape_.grid.x),
                                static_cast<uint32_t>(index / shape_.grid.x), 0};
      f.builtins.block_dim = {shape_.threads, 1, 1};
      f.builtins.grid_dim = shape_.grid;
      f.stamp.thread = static_cast<uint32_t>(index * shape_.threads + t + 1);
      f.stamp.cta = static_cast<uint32_t>(index);
      f.stamp.cluster = static_cast<uint32_t>(index / shape_.cluster);
      f.stamp.warp = static_cast<uint32_t>(index * warps + t / kLanes);
      f.stamp.lane = t % kLanes;
    }
  }
  const auto done = [&] {
    return std::all_of(fibers_.begin(), fibers_.end(),
                       [](const Fiber& f) { return f.state == State::kDone; });
  };
  do {
    for (uint32_t c = 0; c < ctas; ++c) {
      for (uint32_t w = 0; w < warps; ++w) {
        run_warp(c, w);
        count_warp(c, w);
      }
    }
  } while (complete_barriers());
  if (!done()) throw Fault(stuck());
  counters_of_thread.ctas += ctas;
}

// What waits for a launch that waited for none might begin before the launches before that end.
void Machine::finish() const {
  if (shape_.overlaps && !any_waited_) {
    throw Fault("a launch that overlaps with the one before it never calls grid_dependency_wait");
  }
}

}  // namespace

const Builtins& builtins() { return machine->fiber().builtins; }
unsigned char* shared_memory() { return machine->shared(); }
unsigned char* remote_shared_memory(const void* address, int rank, Site site) {
  return machine->remote(address, rank, site);
}
int cluster_rank() { return static_cast<int>(machine->rank()); }
int lane() { return static_cast<int>(machine->fiber().thread % kLanes); }
void access_global(const void* address, int bytes, bool write, Site site) {
  machine->access_global(address, bytes, write, site);
}
void access_shared(const void* address, int bytes, bool write, Site site) {
  machine->access_shared(address, bytes, write, site);
}
void cp_async(void* to, const void* from, int bytes, Site site) {
  machine->begin_copy(to, from, bytes, site);
}
void cp_async_commit() { machine->commit(); }
void cp_async_wait(int pending) { machine->wait_copies(pending); }
void grid_dependency_wait() { machine->wait_for_grid(); }
void barrier(Scope scope, Site site) { machine->barrier(scope, site); }
void collective(const char* name, uint32_t mask, void* payload, Combine combine, Site site) {
  machine->collective(name, mask, payload, combine, site);
}
void count_mma() {
  if (lane() == 0) ++counters_of_thread.mma;
}

Counters counters() { return counters_of_thread; }
void reset_counters() { counters_of_thread = {}; }

void run(const LaunchShape& shape, const Region* regions, int region_count,
         void (*kernel)(const void*), const void* params) {
  const uint64_t ctas = uint64_t{shape.grid.x} * shape.grid.y;
  const auto require = [](bool ok, const char* message) {
    if (!ok) throw std::invalid_argument(std::string("launch: ") + message);
  };
  require(machine == nullptr, "a kernel cannot launch kernels");
  require(shape.threads >= 1 && shape.threads <= kMaxThreads, "threads must be 1 to 1024");
  require(shape.grid.x >= 1 && shape.grid.x <= 0x7fffffffu, "grid_x must be 1 to 2^31 - 1");
  require(shape.grid.y >= 1 && shape.grid.y <= 65535, "grid_y must be 1 to 65535");
  require(shape.shared_bytes >= 0 && shape.shared_bytes <= kMaxShared,
          "shared_bytes must be 0 to 227 KiB");
  require(shape.cluster >= 1 && shape.cluster <= kMaxCluster && shape.grid.x % shape.cluster == 0,
          "cluster must be 1 to 8 and divide grid_x");
  const uint64_t group = shape.cooperative ? ctas : shape.cluster;
  require(group * shape.threads <= kMaxGroupThreads, "a cooperative grid must fit the GPU at once");

  Counters& c = counters_of_thread;
  ++c.launches;
  c.shared_bytes = std::max(c.shared_bytes, shape.shared_bytes);
  Machine running(shape, kernel, params);
  for (int i = 0; i < region_count; ++i) running.add(regions[i]);
  const struct Entered {
    explicit Entered(Machine* m) { machine = m; }
    ~Entered() { machine = nullptr; }
  } entered(&running);
  for (uint64_t first = 0; first < ctas; first += group) {
    running.run_group(first, static_cast<uint32_t>(group));
  }
  running.finish();
}

}  // namespace snv2::emulator

// Called by the kernels' code in every basic block, so that a loop which never ends can be stopped.
extern "C" SNV2_API void __sanitizer_cov_trace_pc() {
  snv2::emulator::Machine* const machine = snv2::emulator::machine;
  if (machine != nullptr && machine->in_thread()) machine->step(1);
}
