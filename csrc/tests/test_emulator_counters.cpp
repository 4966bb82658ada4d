// The emulator's counters, against numbers worked out by hand.
#include "emulator_testing.h"

namespace snv2::SNV2_GPU {
namespace {

// Counters --------------------------------------------------------------------------------

emulator::Counters counted(Kernel kernel, const Shape& shape = {}, int words = 64) {
  emulator::reset_counters();
  const std::string message = fault_of([&] { run(kernel, shape, words); });
  CHECK(message.empty(), "%s", message.c_str());
  return emulator::counters();
}

#define CHECK_COUNT(actual, expected)                                                   \
  CHECK((actual) == (expected), "%lld instead of %lld", static_cast<long long>(actual), \
        static_cast<long long>(expected))

template <int Stride>
__global__ void __launch_bounds__(32) strided_load(Params p) {
  store(p.out + thread(), load(p.in + Stride * thread()));
}
TEST(sectors) {
  const auto coalesced = counted(strided_load<1>, {32, 0}, 32);
  CHECK_COUNT(coalesced.launches, 1);
  CHECK_COUNT(coalesced.ctas, 1);
  CHECK_COUNT(coalesced.global_load_bytes, 128);
  CHECK_COUNT(coalesced.global_store_bytes, 128);
  CHECK_COUNT(coalesced.global_load_sectors, 4);
  CHECK_COUNT(coalesced.global_store_sectors, 4);
  CHECK_COUNT(coalesced.minimum_load_bytes, 128);
  CHECK_COUNT(coalesced.minimum_store_bytes, 128);
  CHECK_COUNT(coalesced.shared_accesses, 0);
  CHECK_COUNT(coalesced.barriers, 0);
  CHECK_COUNT(coalesced.mma, 0);

  const auto strided = counted(strided_load<8>, {32, 0}, 256);
  CHECK_COUNT(strided.global_load_bytes, 128);
  CHECK_COUNT(strided.global_load_sectors, 32);
  CHECK_COUNT(strided.global_store_sectors, 4);
  CHECK_COUNT(strided.minimum_load_bytes, 1024);

  const auto broadcast = counted(strided_load<0>, {32, 0}, 32);
  CHECK_COUNT(broadcast.global_load_sectors, 1);
}

// One more sector where a row starts in the middle of one.
__global__ void __launch_bounds__(32) shifted_load(Params p) {
  store(p.out + thread(), load(p.in + (thread() + 1)));
}
TEST(sectors_of_a_shifted_row) {
  CHECK_COUNT(counted(shifted_load, {32, 0}).global_load_sectors, 5);
}

// Each pass of a loop is another instruction.
__global__ void __launch_bounds__(32) looped_load(Params p) {
  uint32_t sum = 0;
  for (int i = 0; i < 3; ++i) {
    sum += load(p.in + thread());
  }
  store(p.out + thread(), sum);
}
TEST(sectors_of_a_loop) {
  const auto counters = counted(looped_load, {32, 0});
  CHECK_COUNT(counters.global_load_sectors, 12);
  CHECK_COUNT(counters.global_load_bytes, 384);
}

__global__ void __launch_bounds__(32) vector_copy(Params p) {
  store_vector<4>(p.out + 4 * thread(), load_vector<4>(p.in + 4 * thread()));
}
TEST(sectors_of_vectors) {
  const auto counters = counted(vector_copy, {32, 0}, 128);
  CHECK_COUNT(counters.global_load_bytes, 512);
  CHECK_COUNT(counters.global_load_sectors, 16);
  CHECK_COUNT(counters.global_store_sectors, 16);
}

template <int Stride>
__global__ void __launch_bounds__(32) strided_shared(Params) {
  store(shared_words() + Stride * thread(), uint32_t{1});
}
TEST(bank_conflicts) {
  const auto conflicts = [](Kernel kernel, int wavefronts, int more) {
    const auto counters = counted(kernel, {32, 4096});
    CHECK_COUNT(counters.shared_accesses, 1);
    CHECK_COUNT(counters.shared_wavefronts, wavefronts);
    CHECK_COUNT(counters.bank_conflicts, more);
    CHECK_COUNT(counters.shared_bytes, 4096);
  };
  conflicts(strided_shared<1>, 1, 0);
  conflicts(strided_shared<2>, 2, 1);
  conflicts(strided_shared<3>, 1, 0);
  conflicts(strided_shared<4>, 4, 3);
  conflicts(strided_shared<32>, 32, 31);
}

// All lanes read one word: a broadcast, in one wavefront.
__global__ void __launch_bounds__(32) shared_broadcast(Params p) {
  if (thread() == 0) {
    store(shared_words(), uint32_t{1});
  }
  sync_threads();
  store(p.out + thread(), load(shared_words()));
}
TEST(broadcast_from_shared_memory) {
  const auto counters = counted(shared_broadcast, {32});
  CHECK_COUNT(counters.shared_accesses, 2);
  CHECK_COUNT(counters.shared_wavefronts, 2);
  CHECK_COUNT(counters.bank_conflicts, 0);
  CHECK_COUNT(counters.barriers, 1);
}

// 512 bytes need four wavefronts of 128, which is no conflict.
__global__ void __launch_bounds__(32) shared_vectors(Params) {
  store_vector<4>(shared_words() + 4 * thread(), Vector<uint32_t, 4>{{1, 2, 3, 4}});
}
TEST(vectors_to_shared_memory) {
  const auto counters = counted(shared_vectors, {32, 512});
  CHECK_COUNT(counters.shared_accesses, 1);
  CHECK_COUNT(counters.shared_wavefronts, 4);
  CHECK_COUNT(counters.bank_conflicts, 0);
}

__global__ void __launch_bounds__(64) multiplications(Params p) {
  float d[4] = {0, 0, 0, 0};
  const uint32_t a[4] = {0, 0, 0, 0};
  const uint32_t b[2] = {0, 0};
  mma_f16(d, a, b, d);
  mma_bf16(d, a, b, d);
  mma_tf32(d, a, b, d);
  sync_threads();
  sync_threads();
  store(p.out + (64 * cta() + thread()), static_cast<uint32_t>(d[0]));
}
TEST(counts_of_warps_and_ctas) {
  const auto counters = counted(multiplications, {64, 0, 3}, 192);
  CHECK_COUNT(counters.mma, 18);
  CHECK_COUNT(counters.barriers, 6);
  CHECK_COUNT(counters.ctas, 3);
  CHECK_COUNT(counters.launches, 1);
}

TEST(counters_add_up_until_reset) {
  emulator::reset_counters();
  run(strided_shared<1>, {32, 4096});
  run(strided_shared<1>, {32, 128});
  CHECK_COUNT(emulator::counters().launches, 2);
  CHECK_COUNT(emulator::counters().shared_accesses, 2);
  CHECK_COUNT(emulator::counters().shared_bytes, 4096);
  CHECK_COUNT(emulator::counters().minimum_load_bytes, 512);
  emulator::reset_counters();
  CHECK_COUNT(emulator::counters().launches, 0);
  CHECK_COUNT(emulator::counters().shared_bytes, 0);
}

}  // namespace
}  // namespace snv2::SNV2_GPU
