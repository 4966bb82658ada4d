// What emulated instructions call: the thread that runs, memory accesses, collectives.
#pragma once

#include <cstdint>

#include "emulator/emulator.h"

namespace snv2::emulator {

struct Site {
  const char* file;
  int line;
};

struct Dim3 {
  uint32_t x = 1, y = 1, z = 1;
};

// The built-in variables of the running thread.
struct Builtins {
  Dim3 thread_index{0, 0, 0};
  Dim3 block_index{0, 0, 0};
  Dim3 block_dim;
  Dim3 grid_dim;
};

SNV2_API const Builtins& builtins();

SNV2_API unsigned char* shared_memory();
// The same place in the shared memory of CTA `rank` of the cluster.
SNV2_API unsigned char* remote_shared_memory(const void* address, int rank, Site site);
SNV2_API int cluster_rank();

// Checks and counts an access; the caller makes it.
SNV2_API void access_global(const void* address, int bytes, bool write, Site site);
SNV2_API void access_shared(const void* address, int bytes, bool write, Site site);

SNV2_API void cp_async(void* to, const void* from, int bytes, Site site);
SNV2_API void cp_async_commit();
SNV2_API void cp_async_wait(int pending);

SNV2_API void grid_dependency_wait();

enum class Scope { kCta, kCluster, kGrid };
SNV2_API void barrier(Scope scope, Site site);

// Waits until all lanes of `mask` are in the same collective at the same place, and has the last
// of them run combine(payloads), with each lane's payload.
using Combine = void (*)(void* const* payloads, uint32_t mask);
SNV2_API void collective(const char* name, uint32_t mask, void* payload, Combine combine,
                         Site site);
SNV2_API int lane();
SNV2_API void count_mma();

struct LaunchShape {
  Dim3 grid;
  uint32_t threads;
  uint32_t cluster;
  int64_t shared_bytes;
  bool cooperative;
  bool overlaps;  // the launch before it
};
struct Region {
  unsigned char* address;
  int64_t bytes;
  int64_t read_bytes, written_bytes;  // at least
  bool written;                       // may be written
  bool undefined;                     // until written
  bool constant;                      // to all kernels
};

// Runs kernel(params) on all threads. Undefined regions are filled with NaN first. Throws Fault for
// what no kernel may do, and std::invalid_argument for a shape that no GPU takes or for written
// regions that overlap.
SNV2_API void run(const LaunchShape& shape, const Region* regions, int region_count,
                  void (*kernel)(const void* params), const void* params);

}  // namespace snv2::emulator
