// What ThreadSanitizer is told. In a build for it (SNV2_TSAN) the kernels are compiled with it and
// the emulator without, so that it sees what the kernels do, each CUDA thread as a fiber of its
// own. What orders these threads it learns here. In other builds nothing here does anything.
#pragma once

#include <cstdint>
#include <vector>

#include "emulator/calls.h"
#include "emulator/fiber.h"

namespace snv2::emulator::tsan {

#ifdef SNV2_TSAN

// While one lives, accesses of the thread that runs are not looked at.
struct Unobserved {
  Unobserved();
  ~Unobserved();
};

// What comes before what. A fiber costs half a millisecond, so there are two for each thread of a
// group, to take turns: a group is ordered with the last but one, as if all threads of both met in
// a barrier, and with neither of its neighbours.
class Order {
 public:
  static constexpr uint32_t kTurns = 2;

  Order();
  uint32_t turn() const { return turn_; }
  void begin_group(uint32_t threads);
  void end_launch();
  // For each thread of the group.
  void begin(const Context& thread);
  void end(const Context& thread);

  void arrive(Scope scope, uint32_t thread, uint32_t circle);
  void leave(Scope scope, uint32_t thread, uint32_t circle);
  // A barrier of the lanes in `mask` from thread `first` on: each arrives, the last one completes
  // it, the others leave.
  void arrive_lane(uint32_t thread);
  void complete_lanes(uint32_t thread, uint32_t first, uint32_t mask);
  void leave_lane(uint32_t thread);
  // Barriers that count: who arrives or sends, and who waited or writes what was sent.
  void release_transactions(uint32_t barrier);
  void acquire_transactions(uint32_t barrier);

 private:
  void* object(uint32_t kind, uint32_t i);
  void* barrier(Scope scope, uint32_t thread, uint32_t circle);

  uint32_t turn_ = 0;
  char start_ = 0, end_ = 0;    // of what the host does before, and after
  char ended_[kTurns] = {};     // groups
  std::vector<Pages> objects_;  // of each turn: addresses that stand for threads and barriers
  std::vector<uint8_t> odd_[kScopes];  // of each thread: barriers passed, modulo two
  std::vector<uint32_t> meetings_;     // of each warp
  std::vector<void*> meeting_of_;      // that a thread is to leave
};

#else

struct Unobserved {
  Unobserved() {}
};

struct Order {
  static constexpr uint32_t kTurns = 1;

  uint32_t turn() const { return 0; }
  void begin_group(uint32_t) {}
  void end_launch() {}
  void begin(const Context&) {}
  void end(const Context&) {}
  void arrive(Scope, uint32_t, uint32_t) {}
  void leave(Scope, uint32_t, uint32_t) {}
  void arrive_lane(uint32_t) {}
  void complete_lanes(uint32_t, uint32_t, uint32_t) {}
  void leave_lane(uint32_t) {}
  void release_transactions(uint32_t) {}
  void acquire_transactions(uint32_t) {}
};

#endif

}  // namespace snv2::emulator::tsan
