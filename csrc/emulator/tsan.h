// What ThreadSanitizer is told. In a build for it (SNV2_TSAN) the kernels are compiled with it and
// the emulator without, so that it sees what the kernels do, each CUDA thread as a fiber of its
// own. What orders these threads it learns here. In other builds nothing here does anything.
#pragma once

#include <cstddef>
#include <cstdint>

#include "emulator/calls.h"

#ifdef SNV2_TSAN
#include <vector>

#include "emulator/fiber.h"
#endif

namespace snv2::emulator::tsan {

#ifdef SNV2_TSAN

// While one lives, accesses of the CUDA thread are not looked at.
struct Unobserved {
  Unobserved();
  ~Unobserved();
};

// Forgets who accessed this, which is whole pages, and what was in it.
void forget(void* memory, size_t bytes);

// The threads of a group, by index, and the barriers they meet in.
class Order {
 public:
  // Threads of earlier groups are not ordered with those of the next one.
  void begin_group(uint32_t threads);
  void arrive(Scope scope, uint32_t thread, uint32_t circle);
  void leave(Scope scope, uint32_t thread, uint32_t circle);
  // A barrier of the lanes in `mask` from thread `first` on: each arrives, the last one completes
  // it, the others leave.
  void arrive_lane(uint32_t thread);
  void complete_lanes(uint32_t thread, uint32_t first, uint32_t mask);
  void leave_lane(uint32_t thread);
  // Nothing comes after this thread but the end of the launch.
  void end(const Context& thread);
  void end_launch();

 private:
  void* barrier(Scope scope, uint32_t thread, uint32_t circle);

  // An address for each: thread, barrier of one kind, meeting of a warp.
  std::vector<Pages> objects_;
  std::vector<uint8_t> odd_[3];     // of each thread: barriers passed, modulo two
  std::vector<uint32_t> meetings_;  // of each warp
  std::vector<void*> meeting_of_;   // that a thread is to leave
  char end_ = 0;
};

#else

struct Unobserved {
  Unobserved() {}
};
inline void forget(void*, size_t) {}

struct Order {
  void begin_group(uint32_t) {}
  void arrive(Scope, uint32_t, uint32_t) {}
  void leave(Scope, uint32_t, uint32_t) {}
  void arrive_lane(uint32_t) {}
  void complete_lanes(uint32_t, uint32_t, uint32_t) {}
  void leave_lane(uint32_t) {}
  template <class Context>
  void end(const Context&) {}
  void end_launch() {}
};

#endif

}  // namespace snv2::emulator::tsan
