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
  if (lane == 0) {
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
    if (lane == 0 && step + kSlots < kSteps) fill(step + kSlots);
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
  expect_fault([] { run(ring<Ring::kNoSyncWarp>, kRing, kRingWords); }, "copy_bulk", kFile);
}

}  // namespace
}  // namespace snv2::SNV2_GPU
