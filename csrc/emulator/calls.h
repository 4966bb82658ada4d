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

// One launch runs at a time in a process, so that this is no thread-local variable, which from a
// library takes a call to find.
extern SNV2_API const Builtins* running_builtins;

inline const Builtins& builtins() { return *running_builtins; }
inline int lane() { return static_cast<int>(builtins().thread_index.x % 32); }

SNV2_API unsigned char* shared_memory();
// The same place in the shared memory of CTA `rank` of the cluster.
SNV2_API unsigned char* remote_shared_memory(const void* address, int rank, Site site);
SNV2_API int cluster_rank();

// Checks and counts an access; the caller makes it.
SNV2_API void access_global(const void* address, int bytes, bool write, Site site);
SNV2_API void access_shared(const void* address, int bytes, bool write, Site site);
// A store to shared memory that this lane's predicate turns off, while the warp executes it.
SNV2_API void skip_shared_store(int bytes, Site site);

SNV2_API void cp_async(void* to, const void* from, int bytes, Site site);
SNV2_API void cp_async_commit();
SNV2_API void cp_async_wait(int pending);

// Barriers that count arrivals and bytes, and what they wait for.
SNV2_API void barrier_init(const void* barrier, int arrivals, Site site);
SNV2_API void fence_barrier_init();
SNV2_API void barrier_expect(const void* barrier, int bytes, Site site);
SNV2_API void barrier_wait(const void* barrier, int parity, Site site);
SNV2_API void copy_bulk(void* to, const void* from, int bytes, const void* barrier, Site site);
// `to` and `barrier` as they lie in this CTA.
SNV2_API void store_async(const void* to, const void* barrier, int rank, const void* value,
                          int bytes, Site site);

SNV2_API void grid_dependency_wait();

SNV2_API void remember_parameters(uint32_t threads, const void* params, size_t bytes);

// kClusterReads: what a thread of the cluster read may be overwritten, but what it wrote need not
// be there for other CTAs.
enum class Scope { kCta, kCluster, kClusterReads, kGrid };
constexpr int kScopes = 4;
SNV2_API void barrier(Scope scope, Site site);

// Collectives: each waits until all lanes of `mask`, or all of the warp, are in the same one at the
// same place, and gives each lane its result. None but sync_warp orders memory.
SNV2_API void sync_warp(uint32_t mask, Site site);

struct Exchange {
  uint64_t value;
  int source;       // the lane whose value is the result
  uint64_t result;  // all ones if that lane is not in the mask
};
SNV2_API void shuffle(const char* name, uint32_t mask, Exchange& mine, Site site);

struct MatrixRows {
  const void* row;
  uint32_t d[4];
};
SNV2_API void ldmatrix(int matrices, bool transposed, MatrixRows& mine, Site site);

struct Fragments {
  const uint32_t* a;
  const uint32_t* b;
  float* d;
};
SNV2_API void mma_f16(Fragments& mine, Site site);
SNV2_API void mma_bf16(Fragments& mine, Site site);
SNV2_API void mma_tf32(Fragments& mine, Site site);

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
