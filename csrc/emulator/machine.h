// One launch as it runs: its CTAs (launch.cpp), its threads (scheduler.cpp) and what they make
// together (collectives.cpp), its memory (access.cpp), and what is on its way (transactions.cpp).
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "emulator/calls.h"
#include "emulator/counting.h"
#include "emulator/fiber.h"
#include "emulator/shadow.h"
#include "emulator/sites.h"
#include "emulator/transactions.h"
#include "emulator/tsan.h"

namespace snv2::emulator {

constexpr uint32_t kLanes = 32;

struct Copy {
  unsigned char* to;
  const unsigned char* from;
  int bytes;
};

// The cp.async of a thread that are under way, oldest first.
struct Copies {
  std::vector<Copy> copies;
  std::vector<size_t> groups;  // how many copies each committed group has; the rest is open
};

enum class State { kReady, kWaiting, kDone };

// A CUDA thread.
struct Fiber {
  Context context;
  Builtins builtins;
  uint32_t cta = 0;     // of the group
  uint32_t thread = 0;  // of the CTA
  State state = State::kReady;
  // What it waits for; a barrier has no mask.
  const char* waits_for = nullptr;
  Site site{nullptr, 0};
  uint32_t mask = 0;
  void* payload = nullptr;
  uint32_t waits_on = 0;  // in barrier_wait
  int64_t collectives = 0;
  bool waited_for_grid = false;  // for the launch before
  View view;
  Copies under_way;
};

struct Warp {
  uint32_t first = 0;  // its threads, of the group
  uint32_t threads = 0;
  uint32_t ready = 0;          // lanes
  uint32_t in_collective = 0;  // lanes
};

struct Cta {
  unsigned char* shared = nullptr;
  uint32_t waiting[kScopes] = {};        // threads at a barrier
  bool ended = false;                    // one of its threads, at least
  Stamp remote{0, 0, 0};                 // the latest access by another CTA of the cluster
  uint32_t live = 0;                     // threads
  std::map<int64_t, uint32_t> barriers;  // that count: where they lie, which they are
};

// A buffer of the launch.
struct Memory {
  Region region;
  std::unique_ptr<Shadow> shadow;  // if it may be written
  bool alone = true;               // overlaps with no other

  bool has(const unsigned char* p, int bytes) const {
    return p >= region.address && p + bytes <= region.address + region.bytes;
  }
};

// Has the last lane to arrive make the results in all payloads.
using Combine = void (*)(void* const* payloads, uint32_t mask);

class Machine {
 public:
  Machine(const LaunchShape& shape, void (*kernel)(const void*), const void* params,
          Counters& counters, Sites& sites, Stacks& stacks, tsan::Order& order);
  ~Machine();

  // `fill`: with NaN, if its contents are undefined.
  void add(const Region& region, bool fill);
  void run_group(uint64_t first_cta, uint32_t ctas);
  void finish() const;

  // Ends the running thread, and with it the launch.
  [[noreturn]] void fault(const std::string& what) const;
  // The same where no exception may be thrown.
  [[noreturn]] void abandon(const char* what);
  bool in_kernel() const { return fiber_ != nullptr && owner_ == std::this_thread::get_id(); }
  void access_global(const void* address, int bytes, bool write, Site site);
  void access_shared(const void* address, int bytes, bool write, Site site);
  void skip_shared_store(int bytes, Site site);
  void begin_copy(void* to, const void* from, int bytes, Site site);
  void commit();
  void wait_copies(int pending);
  void barrier_init(const void* barrier, int arrivals, Site site);
  void fence_barrier_init();
  void barrier_expect(const void* barrier, int bytes, Site site);
  void barrier_wait(const void* barrier, int parity, Site site);
  void copy_bulk(const void* to, const void* from, int bytes, const void* barrier, Site site);
  void store_async(const void* to, const void* barrier, int rank, const void* value, int bytes,
                   Site site);
  void wait_for_grid() { fiber_->waited_for_grid = any_waited_ = true; }
  void barrier(Scope scope, Site site);
  // Without `combine` it orders memory, and does nothing else.
  void collective(const char* name, uint32_t mask, void* payload, Combine combine, Site site);
  unsigned char* shared() { return ctas_[fiber_->cta].shared; }
  unsigned char* remote(const void* address, int rank, Site site);
  uint32_t rank() const { return fiber_->cta % shape_.cluster; }
  void count_mma() { ++counters_.mma; }
  uint32_t lane() const { return fiber_->thread % kLanes; }
  void enter();

 private:
  // All of a load or store of global memory but what it costs; returns the place in the source.
  uint32_t check_global(const unsigned char* p, int bytes, bool write, Site site);
  uint32_t find_barrier(const char* what, uint32_t cta, int64_t offset, Site site);
  int64_t offset_of(const void* address, int bytes, Site site);
  void check_no_barrier(uint32_t cta, int64_t offset, int bytes, uint32_t site) const;
  void begin_transfer(const char* what, uint32_t barrier, const Transfer& transfer, Site site);
  void release_to(TransactionBarrier& barrier);
  void advance(const char* what, uint32_t barrier, Site site);
  void complete_phase(uint32_t barrier);
  void learn(View& view, const Knowledge& more);
  // What any of so many threads learned all of them know; of 32 at most those in the mask.
  void share_learned(Fiber* first, uint32_t mask, uint32_t threads);
  std::string lacking(const Fiber& fiber) const;

  Memory& find(const unsigned char* p, int bytes, bool write, Site site, uint32_t id);
  void check_aligned(const void* address, int bytes, Site site) {
    if ((reinterpret_cast<uintptr_t>(address) & static_cast<uintptr_t>(bytes - 1)) != 0) {
      refuse_unaligned(bytes, site);
    }
  }
  [[noreturn]] void refuse_unaligned(int bytes, Site site);
  void check_end() const;
  void check_transfers() const;
  bool access_shared_of(uint32_t cta, const void* address, int bytes, bool write, uint32_t site);
  Stamp now(uint32_t site) const { return {fiber_->view.thread, clock_, site}; }
  void tick();

  void begin_group(uint64_t first_cta, uint32_t ctas);
  void end_group();
  size_t stack_of(size_t thread) const { return thread * tsan::Order::kTurns + order_.turn(); }
  void run_warp(Warp& warp);
  void resume(uint32_t lane);
  void wait(const char* what, uint32_t mask, Site site);
  void count_collective();
  void complete(uint32_t mask, Combine combine);
  void order_lanes(Fiber* first, uint32_t mask);
  bool complete_barriers();
  void release(Scope scope, uint32_t first, uint32_t threads);
  std::string describe(const Fiber& fiber) const;
  std::string stuck() const;

  const LaunchShape shape_;
  Counters& counters_;
  Sites& sites_;
  Stacks& stacks_;
  void (*const kernel_)(const void*);
  const void* const params_;

  std::vector<Memory> memory_;
  static constexpr size_t kRecent = 64;
  Memory* recent_[kRecent] = {};  // where a place in the source last accessed
  Pages shared_memory_;           // of the CTAs of a group
  std::vector<std::unique_ptr<Shadow>> shared_shadows_;

  std::vector<Cta> ctas_;
  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  uint32_t clock_ = 1;                            // counts barriers of the group
  bool any_waited_ = false;                       // for the launch before
  std::vector<TransactionBarrier> transactions_;  // of the group
  bool woken_ = false;                            // a thread, by the phase it waits for
  Knowledge joined_[3];                           // the last two that were, and what became of them
  const std::thread::id owner_ = std::this_thread::get_id();
  Context scheduler_;
  Warp* warp_ = nullptr;  // that runs
  Fiber* fiber_ = nullptr;
  std::vector<Access> accesses_[kLanes];  // of the warp that runs, not yet counted
  std::string report_;
  tsan::Order& order_;
};

// The one that runs.
extern Machine* machine;

const char* name_of(Scope scope);
extern const char* const kBarrierWait;  // what a thread waits for in it

// Steps that the running CUDA thread may still take before its next collective.
extern int64_t steps_left;
void out_of_steps();

inline void take_steps(int64_t steps) {
  if ((steps_left -= steps) < 0) out_of_steps();
}

}  // namespace snv2::emulator
