// Cases of barriers that count, and of what they wait for (conformance.cu).
#pragma once

#include "cuda/conformance_memory.h"

namespace snv2::SNV2_GPU {
namespace {

// Two barriers lie before all else.
constexpr int kAsyncBytes = 16;
SNV2_DEVICE Shared<TransactionBarrier> barrier_of(int i) {
  return shared_memory().as<TransactionBarrier>() + i;
}
SNV2_DEVICE Shared<uint32_t> async_words() {
  return shared_memory().as<uint32_t>() + kAsyncBytes / 4;
}

SNV2_DEVICE void make_two_barriers(int arrivals) {
  if (thread() == 0) {
    for (int i = 0; i < 2; ++i) barrier_init(barrier_of(i), arrivals);
    fence_barrier_init();
  }
}

// A ring of two slots of 32 words, which the first lane fills eight times.
__global__ void __launch_bounds__(32) copy_bulk_ring(Params p) {
  constexpr int kSlots = 2, kSteps = 8;
  make_two_barriers(1);
  sync_threads();
  const Shared<uint32_t> words = async_words();
  for (int step = -kSlots; step < kSteps; ++step) {
    if (step >= 0) {
      const int slot = step % kSlots;
      barrier_wait(barrier_of(slot), step / kSlots % 2);
      store(p.out + (32 * step + thread()), load(words + (32 * slot + 31 - thread())));
      sync_warp();
    }
    const int next = step + kSlots;
    if (thread() == 0 && next < kSteps) {
      const Shared<TransactionBarrier> full = barrier_of(next % kSlots);
      barrier_expect(full, 128);
      copy_bulk(words + 32 * (next % kSlots), p.in + 32 * next, 128, full);
    }
  }
}

// Each lane copies 16 bytes and expects them, some after they may have come.
__global__ void __launch_bounds__(32) copy_bulk_lanes(Params p) {
  make_two_barriers(32);
  sync_threads();
  const Address<TransactionBarrier> barrier(barrier_of(1));
  const Address<uint32_t> words(async_words());
  const bool before = thread() % 3 == 0;
  if (before) barrier_expect(barrier, 16);
  copy_bulk(words + 4 * thread(), p.in + 4 * (31 - thread()), 16, barrier);
  if (!before) barrier_expect(barrier, 16);
  barrier_wait(barrier, cta());  // of parity 0, which test_ptx.py makes 1
  store_vector<4>(p.out + 4 * thread(), load_vector<4>(words + 4 * ((thread() + 7) % 32)));
}

// All threads arrive, without bytes: each phase is a barrier of the CTA.
__global__ void __launch_bounds__(96) barrier_of_threads(Params p) {
  make_two_barriers(96);
  sync_threads();
  const Shared<uint32_t> words = async_words();
  uint32_t value = load(p.in + thread());
  for (int step = 0; step < 3; ++step) {
    store(words + (96 * (step % 2) + thread()), value);
    barrier_expect(barrier_of(0), 0);
    barrier_wait(barrier_of(0), step % 2);
    value = load(words + (96 * (step % 2) + (thread() + 33) % 96));
  }
  store(p.out + thread(), value);
}

// Two CTAs, or one with itself, give each other N words of each thread in five steps, to the thread
// five places on, by two barriers in turn.
template <int N, int Ctas = 2>
__global__ void __launch_bounds__(64) store_async_steps(Params p) {
  make_two_barriers(1);
  sync_cluster();
  const int other = Ctas - 1 - cluster_rank();
  const Shared<uint32_t> words = async_words();
  Vector<uint32_t, N> value = load_vector<N>(p.in + N * (64 * cta() + thread()));
  for (int step = 0; step < 5; ++step) {
    const int slot = step % 2;
    const Shared<uint32_t> place = words + 64 * N * slot;
    if (thread() == 0) barrier_expect(barrier_of(slot), 64 * N * 4);
    const Shared<uint32_t> there = place + N * ((thread() + 5) % 64);
    if (N == 4) {
      store_async(Address<uint32_t>(there), Address<TransactionBarrier>(barrier_of(slot)), other,
                  value);
    } else {
      store_async<N>(there, barrier_of(slot), other, value);
    }
    barrier_wait(barrier_of(slot), step / 2 % 2);
    value = load_vector<N>(place + N * thread());
  }
  store_vector<N>(p.out + N * (64 * cta() + thread()), value);
}

}  // namespace
}  // namespace snv2::SNV2_GPU
