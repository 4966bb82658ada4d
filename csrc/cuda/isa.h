// The one place that knows instructions of the GPU. Kernels reach memory, other threads and
// tensor cores through these functions only; each has a body in PTX or CUDA C++ (here) and one
// for the emulator (csrc/emulator/isa.h).
//
// Global<T>, Shared<T> and Remote<T> (shared memory of another CTA) are pointers that cannot be
// dereferenced: load() and store() say which instruction is meant and let the emulator see it. A
// Vector<T, N> of 2, 4, 8 or 16 bytes moves in one instruction and must be aligned to its size.
// Address<T> is a place in shared memory that is worked out once.
//
// A Shared<TransactionBarrier> (PTX: mbarrier) counts arrivals of threads and bytes that are on
// their way. A phase is complete when it has all of both, and the next one begins; parities of
// phases alternate, from 0. What copy_bulk() and store_async() write is there for those who waited
// for the phase that counts its bytes: barrier_wait().
#pragma once

#include <cstdint>

#include "snv2/cuda.h"

namespace snv2::SNV2_GPU {

// Storage types; arithmetic is in float.
struct half_t {
  uint16_t bits;
};
struct bfloat16_t {
  uint16_t bits;
};

template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
  static_assert(sizeof(T) * N <= 16, "no instruction moves more than 16 bytes");
  T values[N];
};

using TransactionBarrier = uint64_t;

constexpr int kWarp = 32;
constexpr uint32_t kFullMask = 0xffffffffu;

}  // namespace snv2::SNV2_GPU

#ifdef SNV2_EMULATED
#include "emulator/isa.h"
#else
#include "cuda/isa_nvidia.h"
#endif
