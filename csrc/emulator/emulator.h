// Runs CUDA kernels on a CPU, checks every memory access and collective they make, and counts
// what they move. docs/emulator.md tells how to work with it.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <vector>

#include "snv2/types.h"

namespace snv2::emulator {

// A kernel did what no kernel may. The message names the fault, the thread and the source line.
class SNV2_API Fault : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// What launches of the calling thread did. A *sector* is 32 aligned bytes, counted once for each
// instruction of a warp that touches it, as GPUs move them. A *wavefront* is one cycle of shared
// memory.
struct Counters {
  int64_t launches = 0;
  int64_t ctas = 0;
  int64_t global_load_bytes = 0;
  int64_t global_store_bytes = 0;
  int64_t global_load_sectors = 0;
  int64_t global_store_sectors = 0;
  int64_t minimum_load_bytes = 0;   // of all buffers that the launch declared as read
  int64_t minimum_store_bytes = 0;  // of all buffers that the launch declared as written
  int64_t shared_accesses = 0;      // instructions of a warp
  int64_t shared_wavefronts = 0;
  int64_t bank_conflicts = 0;  // wavefronts beyond those that an access of its width needs
  int64_t mma = 0;             // instructions of a warp
  int64_t barriers = 0;        // of a CTA, cluster or grid, counted once for each CTA
  int64_t shared_bytes = 0;    // of one CTA: the largest launch
};

SNV2_API Counters counters();
SNV2_API void reset_counters();

// Threads of a CTA and the parameters of a launch, which in CUDA are bytes of constant memory.
struct LaunchParameters {
  uint32_t threads;
  std::vector<unsigned char> bytes;
};
// Returns the parameters of the calling thread's latest launches, some dozens, in their order.
SNV2_API std::vector<LaunchParameters> latest_parameters();

// Whether launches of the calling thread look at the order of accesses, which they do: false is for
// tests of another detector.
SNV2_API void check_races(bool on);

// Has launches of the calling thread run only their last CTAs, as many clusters as `ctas` take, and
// leave what is undefined in buffers as it is: for buffers too large to be filled. 0 is for all.
SNV2_API void run_last_ctas(int64_t ctas);

}  // namespace snv2::emulator
