// Barriers that count arrivals and bytes, and what they wait for: correct uses, and kernels with
// one fault each beside their twins without it.
#include "emulator_testing.h"

namespace snv2::SNV2_GPU {
namespace {

constexpr const char* kFile = "test_emulator_async.cpp:";

// Barriers lie before all else in shared memory.
constexpr int kBarriers = 16;
Shared<TransactionBarrier> barriers() { return shared_memory().as<TransactionBarrier>(); }
Shared<uint32_t> words() { return shared_words() + 2 * kBarriers; }
constexpr int64_t kBarrierBytes = 8 * kBarriers;

// The first thread makes so many barriers.
void make_barriers(int count, int arrivals) {
  if (thread() == 0) {
    for (int i = 0; i < count; ++i) barrier_init(barriers() + i, arrivals);
    fence_barrier_init();
  }
}

// Each warp of two has a ring of three slots of 32 words, which its first lane fills ahead.
enum class Ring { kFine, kNoWait, kWrongParity, kNoSyncWarp, kTooFewBytes, kTooManyBytes };

constexpr int kSlots = 3, kSteps = 8;

template <Ring Kind>
__global__ void __launch_bounds__(64) ring(Params p) {
  make_barriers(2 * kSlots, 1);
  sync_threads();
  const int warp = thread() / 32, lane = thread() % 32;
  const auto full = barriers() + kSlots * warp;
  const Address<uint32_t> slots(words() + 32 * kSlots * warp);
  const auto fill = [&](int step) {
    const int slot = step % kSlots;
    barrier_expect(full + slot, 128 + (Kind == Ring::kTooFewBytes    ? 16
                                       : Kind == Ring::kTooManyBytes ? -16
                                                                     : 0));
    copy_bulk(slots + 32 * slot, p.in + (64 * step + 32 * warp), 128, full + slot);
  };
  // Where it is the last, it goes on before the others.
  const bool fills = lane == (Kind == Ring::kNoSyncWarp ? 31 : 0);
  if (fills) {
    for (int step = 0; step < kSlots; ++step) fill(step);
  }
  uint32_t sum = 0;
  for (int step = 0; step < kSteps; ++step) {
    const int slot = step % kSlots, parity = step / kSlots % 2;
    if (Kind != Ring::kNoWait || step != 4) {
      barrier_wait(full + slot, Kind == Ring::kWrongParity ? 1 - parity : parity);
    }
    sum += (step + 1) * load(slots + (32 * slot + (31 - lane)));
    if (Kind != Ring::kNoSyncWarp) sync_warp();
    if (fills && step + kSlots < kSteps) fill(step + kSlots);
  }
  store(p.out + thread(), sum);
}
constexpr Shape kRing{64, kBarrierBytes + 2 * kSlots * 128};
constexpr int kRingWords = 64 * kSteps;

TEST(ring_of_bulk_copies) {
  emulator::reset_counters();
  expect_none([] { run(ring<Ring::kFine>, kRing, kRingWords); });
  for (int t = 0; t < 64; ++t) {
    uint32_t sum = 0;
    for (int step = 0; step < kSteps; ++step) {
      sum += static_cast<uint32_t>((step + 1) * (64 * step + t / 32 * 32 + 31 - t % 32));
    }
    CHECK(output[t] == sum, "output[%d] = %u", t, output[t]);
  }
  CHECK(emulator::counters().global_load_bytes == 4 * kRingWords);
  CHECK(emulator::counters().global_load_sectors == 4 * kRingWords / 32);
}
TEST(ring_of_bulk_copies_with_faults) {
  const auto faulty = [](Kernel kernel, auto... words) {
    expect_fault([&] { run(kernel, kRing, kRingWords); }, words..., kFile);
  };
  faulty(ring<Ring::kNoWait>, "read", "copy_bulk", "barrier_wait");
  faulty(ring<Ring::kWrongParity>, "read", "copy_bulk", "barrier_wait");
  faulty(ring<Ring::kTooFewBytes>, "waits in barrier_wait", "16 bytes are missing");
  faulty(ring<Ring::kTooManyBytes>, "copy_bulk", "16 bytes more than expected");
}
TEST(ring_of_bulk_copies_without_a_barrier_before_the_next) {
  expect_fault([] { run(ring<Ring::kNoSyncWarp>, kRing, kRingWords); }, "read", "copy_bulk", kFile);
}

// One copy of 64 words by the first thread, which all threads read.
enum class Copy {
  kFine,
  kNoInit,
  kNoBarrierAfterInit,
  kNoFence,
  kInitTwice,
  kNoArrivals,
  kBarrierNotAligned,
  kNotAligned,
  kSourceNotAligned,
  kNotOf16Bytes,
  kSourceOutside,
  kOutside,
  kBarrierOutside,
  kOverBarrier,
  kStoreToBarrier,
  kParityOfTwo,
  kNoExpect,
  kTwoExpects,
  kExpectsTooMuch,
  kTooManyBytes,
  kStoreUnderWay,
  kCopyUnderWay,
  kNobodyWaits,
};

template <Copy Kind>
__global__ void __launch_bounds__(64) copy(Params p) {
  using C = Copy;
  if (thread() == 0) {
    const auto odd = shared_words() + (Kind == C::kBarrierNotAligned ? 1 : 0);
    if (Kind != C::kNoInit) {
      barrier_init(odd.as<TransactionBarrier>(), Kind == C::kNoArrivals ? 0 : 1);
    }
    if (Kind == C::kInitTwice) barrier_init(barriers(), 1);
    if (Kind != C::kNoFence) fence_barrier_init();
    if (Kind == C::kStoreToBarrier) store(shared_words() + 1, uint32_t{1});
  }
  if (Kind != C::kNoBarrierAfterInit) sync_threads();
  const auto to = Kind == C::kOutside       ? words() + 4
                  : Kind == C::kNotAligned  ? words() + 2
                  : Kind == C::kOverBarrier ? shared_words()
                                            : words();
  const auto from = p.in + (Kind == C::kSourceOutside ? 4 : Kind == C::kSourceNotAligned ? 2 : 0);
  if (thread() == 33) {
    const auto barrier = barriers() + (Kind == C::kBarrierOutside ? 4096 : 0);
    if (Kind != C::kNoExpect) barrier_expect(barrier, Kind == C::kExpectsTooMuch ? 1 << 20 : 256);
    if (Kind == C::kTwoExpects) barrier_expect(barrier, 0);
    if (Kind == C::kTooManyBytes) copy_bulk(words() + 64, p.in, 16, barrier);
    copy_bulk(to, from, Kind == C::kNotOf16Bytes ? 248 : 256, barrier);
    if (Kind == C::kStoreUnderWay) store(words() + 1, uint32_t{1});
    if (Kind == C::kCopyUnderWay) copy_bulk(words() + 60, p.in, 16, barrier);
  }
  if (Kind == C::kNobodyWaits) return;
  barrier_wait(barriers(), Kind == C::kParityOfTwo ? 2 : 0);
  store(p.out + thread(), load(words() + (63 - thread())));
}
constexpr Shape kCopy{64, kBarrierBytes + 256};

TEST(bulk_copy_that_all_threads_wait_for) {
  expect_none([] { run(copy<Copy::kFine>, kCopy); });
  for (int t = 0; t < 64; ++t) CHECK(output[t] == 63u - static_cast<uint32_t>(t));
}
TEST(bulk_copy_with_faults) {
  using C = Copy;
  const auto faulty = [](Kernel kernel, auto... words) {
    const Shape larger{64, kBarrierBytes + 272};
    expect_fault([&] { run(kernel, larger); }, words..., kFile);
  };
  faulty(copy<C::kNoInit>, "of a barrier that nobody initialised");
  faulty(copy<C::kNoFence>, "copy_bulk", "fence_barrier_init after it is missing");
  faulty(copy<C::kInitTwice>, "barrier_init", "in use");
  faulty(copy<C::kNoArrivals>, "barrier_init", "0 arrivals");
  faulty(copy<C::kBarrierNotAligned>, "8 bytes", "aligned");
  faulty(copy<C::kNotAligned>, "16 bytes", "aligned");
  faulty(copy<C::kSourceNotAligned>, "16 bytes", "aligned");
  faulty(copy<C::kNotOf16Bytes>, "248 bytes", "no multiple of 16");
  faulty(copy<C::kSourceOutside>, "global load", "outside");
  expect_fault([] { run(copy<C::kOutside>, kCopy); }, "256 bytes", "outside", kFile);
  faulty(copy<C::kBarrierOutside>, "8 bytes", "outside");
  faulty(copy<C::kOverBarrier>, "bytes of a barrier");
  faulty(copy<C::kStoreToBarrier>, "bytes of a barrier");
  faulty(copy<C::kParityOfTwo>, "parity 2");
  faulty(copy<C::kNoExpect>, "waits in barrier_wait", "1 of 1 arrivals and -256 bytes");
  faulty(copy<C::kTwoExpects>, "barrier_expect", "once more than the 1 arrivals");
  faulty(copy<C::kExpectsTooMuch>, "barrier_expect", "1048576 bytes");
  faulty(copy<C::kTooManyBytes>, "copy_bulk", "16 bytes more than expected");
  faulty(copy<C::kStoreUnderWay>, "write", "copy_bulk", "under way");
  faulty(copy<C::kCopyUnderWay>, "write", "copy_bulk", "under way");
  faulty(copy<C::kNobodyWaits>, "the CTA ends with a copy_bulk", "barrier_wait is missing");
}
TEST(barrier_that_another_thread_has_just_made) {
  expect_fault([] { run(copy<Copy::kNoBarrierAfterInit>, kCopy); }, "race: read", "written", kFile);
}

// Bytes may come before they are expected.
__global__ void __launch_bounds__(32) copies_before_expect(Params p) {
  make_barriers(1, 1);
  sync_threads();
  if (thread() == 0) {
    copy_bulk(words(), p.in + 4, 128, barriers());
    copy_bulk(words() + 32, p.in + 36, 16, barriers());
    barrier_expect(barriers(), 144);
  }
  barrier_wait(barriers(), 0);
  store(p.out + thread(), load(words() + (thread() + 4)));
}
TEST(bulk_copies_before_they_are_expected) {
  expect_none([] { run(copies_before_expect, {32, kBarrierBytes + 144}); });
  CHECK(output[0] == 8 && output[31] == 39);
}

template <bool Faulty>
__global__ void __launch_bounds__(32) count_that_runs_over(Params) {
  make_barriers(1, 2);
  sync_threads();
  if (thread() < 2) {
    barrier_expect(barriers(), Faulty || thread() == 0 ? (1 << 20) - 1 : 0);
  }
}
TEST(count_of_bytes_that_runs_over) {
  expect_fault([] { run(count_that_runs_over<true>, {32, kBarrierBytes}); }, "runs over", kFile);
  expect_none([] { run(count_that_runs_over<false>, {32, kBarrierBytes}); });
}

// The first warp waits, the second reads.
template <bool Faulty>
__global__ void __launch_bounds__(64) wait_of_another_warp(Params p) {
  make_barriers(1, 1);
  store(words() + thread(), uint32_t{0});
  sync_threads();
  if (thread() == 0) {
    barrier_expect(barriers(), 128);
    copy_bulk(words(), p.in, 128, barriers());
    barrier_wait(barriers(), 0);
  }
  if (!Faulty) sync_threads();
  if (thread() >= 32) store(p.out + thread(), load(words() + (thread() - 32)));
}
TEST(barrier_wait_of_another_warp) {
  const Shape shape{64, kBarrierBytes + 256};
  expect_fault([&] { run(wait_of_another_warp<true>, shape); }, "read", "copy_bulk",
               "or a barrier after", kFile);
  expect_none([&] { run(wait_of_another_warp<false>, shape); });
}

// The second warp reads what the first one has copied over, which an arrival of each of its lanes
// at the second barrier tells.
template <bool Faulty>
__global__ void __launch_bounds__(64) copy_over_what_is_read(Params p) {
  if (thread() == 0) {
    barrier_init(barriers(), 1);
    barrier_init(barriers() + 1, 32);
    fence_barrier_init();
  }
  store(words() + thread(), load(p.in + thread()));
  sync_threads();
  if (thread() >= 32) {
    store(p.out + thread(), load(words() + (thread() - 32)));
    barrier_expect(barriers() + 1, 0);
  }
  if (thread() == 0) {
    if (!Faulty) barrier_wait(barriers() + 1, 0);
    barrier_expect(barriers(), 128);
    copy_bulk(words(), p.in + 32, 128, barriers());
  }
  if (thread() < 32) {
    barrier_wait(barriers(), 0);
    store(p.out + thread(), load(words() + thread()));
  }
}
// The same with the order of warps changed: the copy begins after the reads.
template <bool Faulty>
__global__ void __launch_bounds__(64) copy_after_reads(Params p) {
  if (thread() == 0) {
    barrier_init(barriers(), 1);
    barrier_init(barriers() + 1, 32);
    fence_barrier_init();
  }
  store(words() + thread(), load(p.in + thread()));
  sync_threads();
  if (thread() < 32) {
    store(p.out + thread(), load(words() + thread()));
    barrier_expect(barriers() + 1, 0);
  }
  if (thread() == 32) {
    if (!Faulty) barrier_wait(barriers() + 1, 0);
    barrier_expect(barriers(), 128);
    copy_bulk(words(), p.in + 32, 128, barriers());
  }
  if (thread() >= 32) {
    barrier_wait(barriers(), 0);
    store(p.out + thread(), load(words() + (thread() - 32)));
  }
}
TEST(bulk_copy_over_what_others_read) {
  const Shape shape{64, kBarrierBytes + 256};
  expect_fault([&] { run(copy_over_what_is_read<true>, shape); }, "read", "copy_bulk", kFile);
  expect_none([&] { run(copy_over_what_is_read<false>, shape); });
  expect_race("copy_after_reads", copy_after_reads<true>, copy_after_reads<false>, shape, 64,
              "write", "read by thread");
}

// CTAs in a ring give each other a word of each thread in every step, by two barriers in turn.
enum class Exchange { kFine, kOneBarrier, kNoWait, kWrongPlace, kTooFewBytes, kNoBegin, kNoEnd };

template <Exchange Kind>
__global__ void __launch_bounds__(64) exchange(Params p) {
  using E = Exchange;
  make_barriers(2, 1);
  if (Kind == E::kNoBegin) {
    sync_threads();
  } else {
    sync_cluster();
  }
  const int next = (cluster_rank() + 1) % 2;
  uint32_t value = load(p.in + (64 * cta() + thread()));
  for (int step = 0; step < 6; ++step) {
    const int slot = Kind == E::kOneBarrier ? 0 : step % 2;
    const int parity = (Kind == E::kOneBarrier ? step : step / 2) % 2;
    const auto place = words() + 64 * slot;
    if (thread() == 0) {
      barrier_expect(barriers() + slot, Kind == E::kTooFewBytes && step == 3 ? 252 : 256);
    }
    if (Kind == E::kNoEnd && step == 5 && cluster_rank() == 1) return;
    store_async(place + (thread() + (Kind == E::kWrongPlace ? 64 : 0)), barriers() + slot, next,
                Vector<uint32_t, 1>{{value + 1}});
    if (Kind != E::kNoWait || step != 2) barrier_wait(barriers() + slot, parity);
    value = load(place + (63 - thread()));
  }
  store(p.out + (64 * cta() + thread()), value);
}
constexpr Shape kExchange{64, kBarrierBytes + 512, 2, 2};

TEST(exchange_by_asynchronous_stores) {
  emulator::reset_counters();
  expect_none([] { run(exchange<Exchange::kFine>, kExchange, 128); });
  for (int t = 0; t < 128; ++t) {
    CHECK(output[t] == static_cast<uint32_t>(t) + 6, "output[%d] = %u", t, output[t]);
  }
  // Each warp stores once in a step, and loads once.
  CHECK(emulator::counters().shared_accesses == 2 * 6 * 4);
}
TEST(exchange_with_faults) {
  using E = Exchange;
  const auto faulty = [](Kernel kernel, auto... words) {
    expect_fault([&] { run(kernel, kExchange, 128); }, words..., kFile);
  };
  faulty(exchange<E::kOneBarrier>, "store_async");
  faulty(exchange<E::kNoWait>, "read", "store_async", "barrier_wait");
  faulty(exchange<E::kWrongPlace>, "nobody wrote");
  faulty(exchange<E::kTooFewBytes>, "4 bytes more than expected");
  faulty(exchange<E::kNoBegin>, "store_async", "may not have begun");
  faulty(exchange<E::kNoEnd>, "store_async");
}

enum class Remote { kFine, kEnded, kNobodyWaits, kNoSuchRank, kNotAligned, kUnseenBarrier };

// The first CTA stores to the second.
template <Remote Kind>
__global__ void __launch_bounds__(32) to_the_other_cta(Params p) {
  using R = Remote;
  if (Kind == R::kUnseenBarrier) sync_cluster();
  make_barriers(1, 1);
  if (Kind == R::kUnseenBarrier) {
    sync_threads();
  } else {
    sync_cluster();
  }
  const bool sends = cluster_rank() == (Kind == R::kEnded ? 1 : 0);
  if (sends && thread() == 0) {
    store_async(words() + (Kind == R::kNotAligned ? 1 : 0), barriers(),
                Kind == R::kNoSuchRank ? 2 : 1 - cluster_rank(), Vector<uint32_t, 2>{{3, 5}});
  }
  if (Kind == R::kEnded || sends) return;
  if (thread() == 0) barrier_expect(barriers(), 8);
  if (Kind == R::kNobodyWaits) return;
  barrier_wait(barriers(), 0);
  store(p.out + thread(), load(words() + thread() % 2));
}
TEST(asynchronous_stores_with_faults) {
  using R = Remote;
  const Shape shape{32, kBarrierBytes + 64, 2, 2};
  const auto faulty = [&](Kernel kernel, auto... words) {
    expect_fault([&] { run(kernel, shape); }, words..., kFile);
  };
  expect_none([&] { run(to_the_other_cta<R::kFine>, shape); });
  CHECK(output[0] == 3 && output[1] == 5);
  faulty(to_the_other_cta<R::kEnded>, "store_async", "may have ended");
  faulty(to_the_other_cta<R::kNobodyWaits>, "the CTA ends with", "barrier_wait is missing");
  faulty(to_the_other_cta<R::kNoSuchRank>, "rank 2", "outside the cluster of 2");
  faulty(to_the_other_cta<R::kNotAligned>, "8 bytes", "aligned");
  faulty(to_the_other_cta<R::kUnseenBarrier>, "store_async");
}

// Of constants a copy may begin before the launch before is done.
template <bool Waits>
__global__ void __launch_bounds__(32) dependent_copy(Params p) {
  make_barriers(1, 1);
  sync_threads();
  if (Waits) grid_dependency_wait();
  if (thread() == 0) {
    barrier_expect(barriers(), 128);
    copy_bulk(words(), p.in, 128, barriers());
  }
  if (!Waits) grid_dependency_wait();
  barrier_wait(barriers(), 0);
  store(p.out + thread(), load(words() + thread()));
}
TEST(bulk_copy_in_a_launch_that_overlaps) {
  const auto overlapping = [](Kernel kernel, const Buffer& in) {
    Launch config;
    config.threads = 32;
    config.shared_bytes = kBarrierBytes + 128;
    config.overlaps = true;
    launch(config, std::array{in, writes(output, 128)}, kernel, Params{{input}, {output}});
  };
  expect_none([&] { overlapping(dependent_copy<false>, constants(input, 128)); });
  expect_none([&] { overlapping(dependent_copy<true>, reads(input, 128)); });
  expect_fault([&] { overlapping(dependent_copy<false>, reads(input, 128)); }, "global load",
               "grid_dependency_wait", kFile);
}

}  // namespace
}  // namespace snv2::SNV2_GPU
