// A launch as it runs: its warps, how their instructions reach registers and memory.
#pragma once

#include <array>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "ptx/kernel.h"

namespace snv2::ptx {

// Where shared memory begins: GPUs keep the first KiB for themselves.
constexpr uint32_t kSharedBase = 1024;
// Generic addresses of shared memory: no host pointer, which global addresses are, is that high.
// Below them lies the rank of the CTA, plus one where mapa made the address.
constexpr uint64_t kSharedWindow = uint64_t{1} << 56;
constexpr uint64_t kWindows = ~(kSharedWindow - 1);
constexpr uint32_t kRankShift = 24;

struct Buffer {
  uint64_t begin, end;
  bool written;   // a kernel may store there
  bool constant;  // no kernel in flight stores there
};

struct LaunchShape {
  uint32_t grid_x = 1, grid_y = 1;
  uint32_t threads = 1;
  uint32_t cluster = 1;  // CTAs, along x
  uint32_t shared_bytes = 0;
  bool cooperative = false;
  bool overlaps = false;  // with the launch before
};

// What the hardware leaves open, drawn from a seed; 0 is everything in order.
class Random {
 public:
  Random(uint32_t seed, uint64_t stream)
      : seed(seed), state_((uint64_t{seed} + 1) * 0x9e3779b97f4a7c15u ^ (stream << 1 | 1)) {}

  uint32_t next() {  // xorshift64
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return static_cast<uint32_t>(state_ >> 16);
  }

  const uint32_t seed;

 private:
  uint64_t state_;
};

struct Launch {
  Kernel& kernel;
  LaunchShape shape;
  const std::vector<uint8_t>& parameters;
  std::vector<Buffer> buffers;
  Random random;
  uint64_t instructions = 0;               // of warps
  bool any_waited = false;                 // for the launch before
  std::array<uint64_t, 8> grid_barrier{};  // cooperative groups count arrivals there
};

// Who touched two bytes of shared memory last, and how many barriers it had passed.
struct Stamp {
  static constexpr uint8_t kNobody = 0xff, kSeveral = 0xfe;
  // A copy or store that a barrier waits for: number `barriers` of the cluster, in phase `time`.
  static constexpr uint8_t kTransfer = 0xfd;

  uint32_t barriers = 0;  // of its CTA or cluster
  uint32_t time = 0;      // Cluster::clock
  uint16_t cluster_barriers = 0;
  uint8_t rank = 0;
  uint8_t warp = kNobody;
};

struct Cluster;
struct Cta;

// What a warp knows by barriers that count: what each warp of the cluster did before that time, and
// how many phases of each such barrier are complete.
struct Knowledge {
  std::vector<uint32_t> warps, phases;
};

// A bulk copy, or an asynchronous store, which has its value with it.
struct Transfer {
  Cta* cta;
  uint32_t address, bytes;
  const uint8_t* from;
  uint8_t value[16];
};

// An mbarrier.
struct TransactionBarrier {
  uint32_t maker = 0;  // warp of the cluster
  bool fenced = false;
  uint32_t arrivals = 0, missing = 0;  // of each phase, in this one
  int64_t missing_bytes = 0;           // fewer than none where they came before they were expected
  uint32_t phase = 0;
  std::vector<Transfer> transfers;
  bool unwaited = false;          // a complete phase that nobody has waited for
  Knowledge collected, complete;  // of who arrived; of who waits
};

struct Cta {
  std::vector<uint8_t> shared;   // from address 0
  std::vector<uint8_t> written;  // 1 for each byte that holds something
  std::vector<Stamp> writers, readers;
  Cluster* cluster = nullptr;
  uint32_t x = 0, y = 0, rank = 0;
  uint32_t warps = 0, live_warps = 0, arrived_warps = 0;
  uint32_t barriers = 0;
  std::map<uint32_t, uint32_t> transaction_barriers;  // by address
  // When each warp read two bytes last; kept where there are such barriers.
  std::vector<std::vector<uint32_t>> read_times;
};

struct Cluster {
  std::vector<Cta*> ctas;
  uint32_t live_threads = 0, arrived_threads = 0;
  uint32_t barriers = 0;
  std::vector<TransactionBarrier> transactions;
  uint32_t clock = 1;  // counts what orders warps
  bool woken = false;  // who waits for such a barrier may ask again
};

// A cp.async of some lanes, under way.
struct Copy {
  uint64_t from[kLanes];
  uint32_t to[kLanes];
  uint32_t group[kLanes];
  uint32_t mask;
  uint32_t bytes;
};

// Lanes at another place than the current ones.
struct LaneGroup {
  uint32_t pc, mask;
  bool waits;  // for other lanes of the warp
};

struct Warp {
  enum class State : uint8_t { kReady, kAtBarrier, kAtClusterBarrier, kAtTransaction, kDone };

  Kernel* kernel = nullptr;
  Launch* launch = nullptr;
  Cta* cta = nullptr;
  uint8_t* registers = nullptr;
  uint8_t* constants = nullptr;
  uint32_t index = 0;  // in its CTA
  State state = State::kReady;
  uint32_t pc = 0, mask = 0;      // of the current lanes
  uint32_t live = 0;              // lanes that have not returned
  std::vector<LaneGroup> others;  // than the current ones
  uint32_t next_pc = 0;           // the lowest of those that do not wait
  bool waited = false;            // for the launch before
  bool arrived = false;           // at the cluster's barrier
  uint32_t arrived_at = 0;        // Cluster::barriers then
  std::vector<Copy> copies;
  uint32_t committed[kLanes] = {};  // groups of copies
  Knowledge learned;
};

// Of a special register, by special_index() of statements.h.
uint32_t special_value(int index, const Warp& w, uint32_t lane);

// Throws Fault with the thread and the source line.
[[noreturn]] void fault(const Warp& w, const Instruction& i, uint32_t lane,
                        const std::string& what);

// Registers ----------------------------------------------------------------------------------

template <class T>
T* lanes_at(Warp& w, Place place) {
  uint8_t* const base = place < 0 ? w.constants : w.registers;
  return reinterpret_cast<T*>(base + (place & ~kConstantBit));
}

template <class T>
void put(Warp& w, Place place, const T (&values)[kLanes], uint32_t mask) {
  T* const to = lanes_at<T>(w, place);
  if (mask == kAllLanes) {
    std::memcpy(to, values, sizeof values);
  } else {
    for (uint32_t l = 0; l < kLanes; ++l) to[l] = (mask >> l & 1) != 0 ? values[l] : to[l];
  }
}

inline uint32_t predicate_at(Warp& w, Place place) { return *lanes_at<uint32_t>(w, place); }
inline void put_predicate(Warp& w, Place place, uint32_t bits, uint32_t mask) {
  uint32_t& to = *lanes_at<uint32_t>(w, place);
  to = (to & ~mask) | (bits & mask);
}
inline Place operand_of(const Warp& w, const Instruction& i, size_t index) {
  return w.kernel->operands[static_cast<size_t>(i.list) + index];
}

template <class F>
void for_lanes(uint32_t mask, const F& f) {
  for (; mask != 0; mask &= mask - 1) f(static_cast<uint32_t>(__builtin_ctz(mask)));
}

// Memory -------------------------------------------------------------------------------------

// What `bytes` at an address are, after all checks of an access.
uint8_t* checked_global(Warp& w, const Instruction& i, uint32_t lane, uint64_t address,
                        uint32_t bytes, bool write);
uint8_t* checked_shared(Warp& w, const Instruction& i, uint32_t lane, uint64_t address,
                        uint32_t bytes, bool write);
// The same of the memory instruction's address in each lane of the mask.
void checked_addresses(Warp& w, const Instruction& i, uint32_t mask, uint32_t bytes, bool write,
                       uint8_t* (&pointers)[kLanes]);

// cp.async of i.element_bytes from b, plus i.immediate, to shared memory at a, plus the immediate.
void begin_copies(Warp& w, const Instruction& i, uint32_t mask);
// Makes the copies of all groups but the latest `pending`.
void complete_copies(Warp& w, const Instruction& i, uint32_t mask, uint32_t pending);

// Warps of the cluster meet in a barrier of all of them.
void learn_of_barrier(Cluster& cluster, const std::vector<Warp*>& warps);
// The last warp of a CTA ends.
void check_transfers(const Warp& w, const Instruction& i);

}  // namespace snv2::ptx
