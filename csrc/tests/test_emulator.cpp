// The emulator finds the faults it is there to find: kernels with one fault each, beside twins
// without it that pass. Then its counters, against numbers worked out by hand.
#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "check.h"
#include "cuda/isa.h"
#include "cuda/launch.h"
#include "emulator/emulator.h"
#include "snv2/cuda.h"

namespace snv2::SNV2_GPU {
namespace {

constexpr int kWords = 4096;
alignas(128) uint32_t input[kWords];
alignas(128) uint32_t output[kWords];

struct Params {
  Global<const uint32_t> in;
  Global<uint32_t> out;
};

int thread() { return static_cast<int>(threadIdx.x); }
int cta() { return static_cast<int>(blockIdx.x); }
Shared<uint32_t> shared_words() { return shared_memory().as<uint32_t>(); }
// What a kernel was given to write, or may only read, seen as the other.
Global<const uint32_t> readable(Global<uint32_t> p) { return {p.address}; }
Global<uint32_t> writable(Global<const uint32_t> p) { return {const_cast<uint32_t*>(p.address)}; }

struct Shape {
  uint32_t threads = 64;
  int64_t shared_bytes = 256;
  uint32_t ctas = 1;
  uint32_t cluster = 1;
  bool cooperative = false;
};

using Kernel = void (*)(Params);

// The kernel may read and write `words` words.
void run(Kernel kernel, const Shape& shape = {}, int words = 64) {
  for (int i = 0; i < kWords; ++i) {
    input[i] = static_cast<uint32_t>(i);
  }
  Launch config;
  config.grid_x = shape.ctas;
  config.threads = shape.threads;
  config.cluster = shape.cluster;
  config.shared_bytes = shape.shared_bytes;
  config.cooperative = shape.cooperative;
  launch(config, std::array{reads(input, 4 * words), writes(output, 4 * words)}, kernel,
         Params{{input}, {output}});
}

template <class F>
std::string fault_of(F&& f) {
  try {
    f();
  } catch (const emulator::Fault& fault) {
    return fault.what();
  } catch (const std::exception& error) {
    return std::string("no Fault: ") + error.what();
  }
  return "";
}

template <class F, class... Words>
void expect_fault(F&& f, Words... words) {
  const std::string message = fault_of(f);
  CHECK(!message.empty(), "nothing thrown");
  CHECK(message.rfind("no Fault: ", 0) != 0, "%s", message.c_str());
  for (const char* word : {words...}) {
    CHECK(message.find(word) != std::string::npos, "no \"%s\" in \"%s\"", word, message.c_str());
  }
}

template <class F>
void expect_none(F&& f) {
  const std::string message = fault_of(f);
  CHECK(message.empty(), "%s", message.c_str());
}

// A message names the source line.
constexpr const char* kFile = "test_emulator.cpp:";

// Memory ----------------------------------------------------------------------------------

template <bool Faulty>
__global__ void __launch_bounds__(64) load_past_the_end(Params p) {
  store(p.out + thread(), load(p.in + (thread() + (Faulty ? 1 : 0))));
}
TEST(global_load_past_the_end) {
  expect_fault([] { run(load_past_the_end<true>); }, "outside", kFile);
  expect_none([] { run(load_past_the_end<false>); });
}

template <bool Faulty>
__global__ void __launch_bounds__(64) store_past_the_end(Params p) {
  store(p.out + (thread() + (Faulty ? 1 : 0)), load(p.in + thread()));
}
TEST(global_store_past_the_end) {
  expect_fault([] { run(store_past_the_end<true>); }, "outside", kFile);
  expect_none([] { run(store_past_the_end<false>); });
  output[64] = 77;
  CHECK(fault_of([] { run(store_past_the_end<true>); }) != "");
  CHECK(output[64] == 77, "the store was made");
}

template <bool Faulty>
__global__ void __launch_bounds__(64) load_before_the_start(Params p) {
  store(p.out + thread(), load(p.in + (thread() - (Faulty ? 1 : 0))));
}
TEST(global_load_before_the_start) {
  const auto from_second_word = [](Kernel kernel) {
    Launch config;
    config.threads = 64;
    launch(config, std::array{reads(input + 1, 4 * 64), writes(output, 4 * 64)}, kernel,
           Params{{input + 1}, {output}});
  };
  expect_fault([&] { from_second_word(load_before_the_start<true>); }, "outside", kFile);
  expect_none([&] { from_second_word(load_before_the_start<false>); });
}

// The first half of a vector is inside.
template <bool Faulty>
__global__ void __launch_bounds__(32) vector_past_the_end(Params p) {
  const auto value = load_vector<4>(p.in + (Faulty && thread() == 15 ? 64 : 4 * (thread() % 16)));
  store(p.out + thread(), value.values[0]);
}
TEST(vector_past_the_end) {
  expect_fault([] { run(vector_past_the_end<true>, {32}, 66); }, "outside", kFile);
  expect_none([] { run(vector_past_the_end<false>, {32}, 66); });
}

template <bool Faulty>
__global__ void __launch_bounds__(64) store_to_input(Params p) {
  store((Faulty ? writable(p.in) : p.out) + thread(), uint32_t{1});
}
TEST(store_to_a_buffer_that_is_only_read) {
  expect_fault([] { run(store_to_input<true>); }, kFile);
  expect_none([] { run(store_to_input<false>); });
}

template <bool Faulty>
__global__ void __launch_bounds__(32) misaligned_vector(Params p) {
  const auto value = load_vector<4>(p.in + (Faulty ? 1 : 4));
  store(p.out + thread(), value.values[0]);
}
TEST(misaligned_vector) {
  expect_fault([] { run(misaligned_vector<true>, {32}); }, "aligned", kFile);
  expect_none([] { run(misaligned_vector<false>, {32}); });
}

template <bool Faulty>
__global__ void __launch_bounds__(32) misaligned_shared_vector(Params) {
  if (thread() == 0) {
    store_vector<2>(shared_words() + (Faulty ? 1 : 2), Vector<uint32_t, 2>{{1, 2}});
  }
}
TEST(misaligned_shared_vector) {
  expect_fault([] { run(misaligned_shared_vector<true>, {32}); }, "aligned", kFile);
  expect_none([] { run(misaligned_shared_vector<false>, {32}); });
}

template <bool Faulty>
__global__ void __launch_bounds__(64) shared_past_the_end(Params) {
  store(shared_words() + (thread() + (Faulty ? 1 : 0)), uint32_t{1});
}
TEST(shared_index_past_the_end) {
  expect_fault([] { run(shared_past_the_end<true>); }, "outside", kFile);
  expect_none([] { run(shared_past_the_end<false>); });
}

template <bool Faulty>
__global__ void __launch_bounds__(64) shared_unwritten(Params p) {
  if (!Faulty || thread() != 13) {
    store(shared_words() + thread(), uint32_t{1});
  }
  sync_threads();
  store(p.out + thread(), load(shared_words() + (63 - thread())));
}
TEST(shared_memory_that_nobody_wrote) {
  expect_fault([] { run(shared_unwritten<true>); }, "nobody wrote", kFile);
  expect_none([] { run(shared_unwritten<false>); });
}

// Shared memory does not outlive its CTA.
__global__ void __launch_bounds__(64) shared_of_the_last_cta(Params p) {
  if (cta() == 0) {
    store(shared_words() + thread(), uint32_t{1});
  }
  sync_threads();
  store(p.out + (64 * cta() + thread()), load(shared_words() + thread()));
}
TEST(shared_memory_of_another_cta) {
  expect_fault([] { run(shared_of_the_last_cta, {64, 256, 2}, 128); }, "nobody wrote", kFile);
}

// Races -----------------------------------------------------------------------------------

// Words are written before, so that only the order of threads can be wrong.
template <bool Faulty>
__global__ void __launch_bounds__(64) missing_barrier(Params p) {
  store(shared_words() + thread(), uint32_t{0});
  sync_threads();
  store(shared_words() + thread(), load(p.in + thread()));
  if (!Faulty) {
    sync_threads();
  }
  store(p.out + thread(), load(shared_words() + (63 - thread())));
}
TEST(missing_sync_threads) {
  expect_fault([] { run(missing_barrier<true>); }, "race", kFile);
  expect_none([] { run(missing_barrier<false>); });
}

// What others still read is written again.
template <bool Faulty>
__global__ void __launch_bounds__(64) missing_second_barrier(Params p) {
  store(shared_words() + thread(), load(p.in + thread()));
  sync_threads();
  const uint32_t value = load(shared_words() + (63 - thread()));
  if (!Faulty) {
    sync_threads();
  }
  store(shared_words() + thread(), value);
  sync_threads();
  store(p.out + thread(), load(shared_words() + thread()));
}
TEST(missing_sync_threads_before_writing_again) {
  expect_fault([] { run(missing_second_barrier<true>); }, "race", kFile);
  expect_none([] { run(missing_second_barrier<false>); });
}

// Warps run in turn here: the first has read what the second writes, and nobody reads it after.
template <bool Faulty>
__global__ void __launch_bounds__(64) write_after_read(Params p) {
  store(shared_words() + thread(), load(p.in + thread()));
  sync_threads();
  if (thread() < 32) {
    store(p.out + thread(), load(shared_words() + thread()));
  }
  if (!Faulty) {
    sync_threads();
  }
  if (thread() >= 32) {
    store(shared_words() + (thread() - 32), uint32_t{0});
  }
}
TEST(write_after_read) {
  expect_fault([] { run(write_after_read<true>); }, "race", "read", kFile);
  expect_none([] { run(write_after_read<false>); });
}

template <bool Faulty>
__global__ void __launch_bounds__(32) missing_sync_warp(Params p) {
  store(shared_words() + thread(), uint32_t{0});
  sync_warp();
  store(shared_words() + thread(), load(p.in + thread()));
  if (!Faulty) {
    sync_warp();
  }
  store(p.out + thread(), load(shared_words() + (31 - thread())));
}
TEST(missing_sync_warp) {
  expect_fault([] { run(missing_sync_warp<true>, {32}); }, "race", kFile);
  expect_none([] { run(missing_sync_warp<false>, {32}); });
}

// A barrier of a warp is none between warps.
template <bool Faulty>
__global__ void __launch_bounds__(64) sync_warp_between_warps(Params p) {
  store(shared_words() + thread(), uint32_t{0});
  sync_threads();
  store(shared_words() + thread(), load(p.in + thread()));
  sync_warp();
  store(p.out + thread(), load(shared_words() + (Faulty ? 63 - thread() : thread() ^ 31)));
}
TEST(sync_warp_between_warps) {
  expect_fault([] { run(sync_warp_between_warps<true>); }, "race", kFile);
  expect_none([] { run(sync_warp_between_warps<false>); });
}

// Lanes outside the mask are not part of the barrier.
template <bool Faulty>
__global__ void __launch_bounds__(32) sync_half_a_warp(Params p) {
  store(shared_words() + thread(), uint32_t{0});
  sync_warp();
  if (thread() >= 16) {
    store(shared_words() + thread(), load(p.in + thread()));
    sync_warp(0xffff0000u);
    store(p.out + thread(), load(shared_words() + (47 - thread())));
  } else if (Faulty) {
    store(p.out + thread(), load(shared_words() + (31 - thread())));
  }
}
TEST(sync_warp_of_half_a_warp) {
  expect_fault([] { run(sync_half_a_warp<true>, {32}); }, "race", kFile);
  expect_none([] { run(sync_half_a_warp<false>, {32}); });
}

template <bool Faulty>
__global__ void __launch_bounds__(64) two_ctas(Params p) {
  store(p.out + (thread() + (Faulty ? 0 : 64 * cta())), static_cast<uint32_t>(cta()));
}
TEST(two_ctas_write_the_same_word) {
  expect_fault([] { run(two_ctas<true>, {64, 0, 2}, 128); }, "race", kFile);
  expect_none([] { run(two_ctas<false>, {64, 0, 2}, 128); });
}

template <bool Faulty>
__global__ void __launch_bounds__(64) missing_sync_grid(Params p) {
  store(p.out + (64 * cta() + thread()), uint32_t{1});
  if (!Faulty) {
    sync_grid();
  }
  const uint32_t value = load(readable(p.out) + (64 * (1 - cta()) + thread()));
  store(p.out + (128 + 64 * cta() + thread()), value);
}
TEST(missing_sync_grid) {
  expect_fault([] { run(missing_sync_grid<true>, {64, 0, 2, 1, true}, 256); }, kFile);
  expect_none([] { run(missing_sync_grid<false>, {64, 0, 2, 1, true}, 256); });
}

template <bool Faulty>
__global__ void __launch_bounds__(64) missing_sync_cluster(Params p) {
  store(shared_words() + thread(), uint32_t{0});
  sync_cluster();
  store(shared_words() + thread(), load(p.in + thread()));
  if (!Faulty) {
    sync_cluster();
  }
  const uint32_t value = load(remote(shared_words(), 1 - cluster_rank()) + thread());
  store(p.out + (64 * cta() + thread()), value);
  sync_cluster();
}
TEST(missing_sync_cluster) {
  expect_fault([] { run(missing_sync_cluster<true>, {64, 256, 2, 2}, 128); }, "race", kFile);
  expect_none([] { run(missing_sync_cluster<false>, {64, 256, 2, 2}, 128); });
}

// cp.async --------------------------------------------------------------------------------

template <bool Faulty>
__global__ void __launch_bounds__(64) missing_wait(Params p) {
  cp_async<1>(shared_words() + thread(), p.in + thread());
  cp_async_commit();
  if (!Faulty) {
    cp_async_wait<0>();
  }
  store(p.out + thread(), load(shared_words() + thread()));
}
TEST(missing_cp_async_wait) {
  expect_fault([] { run(missing_wait<true>); }, "cp.async", kFile);
  expect_none([] { run(missing_wait<false>); });
}

// Waiting for all but the latest group leaves that one under way.
template <bool Faulty>
__global__ void __launch_bounds__(32) wait_for_too_few(Params p) {
  for (int group = 0; group < 2; ++group) {
    cp_async<1>(shared_words() + (32 * group + thread()), p.in + thread());
    cp_async_commit();
  }
  cp_async_wait<1>();
  store(p.out + thread(), load(shared_words() + ((Faulty ? 32 : 0) + thread())));
  cp_async_wait<0>();
}
TEST(cp_async_wait_for_too_few) {
  expect_fault([] { run(wait_for_too_few<true>, {32}); }, "cp.async", kFile);
  expect_none([] { run(wait_for_too_few<false>, {32}); });
}

template <bool Faulty>
__global__ void __launch_bounds__(64) wait_without_barrier(Params p) {
  store(shared_words() + thread(), uint32_t{0});
  sync_threads();
  cp_async<1>(shared_words() + thread(), p.in + thread());
  cp_async_commit();
  cp_async_wait<0>();
  if (!Faulty) {
    sync_threads();
  }
  store(p.out + thread(), load(shared_words() + (63 - thread())));
}
TEST(cp_async_waited_for_without_a_barrier) {
  expect_fault([] { run(wait_without_barrier<true>); }, "race", kFile);
  expect_none([] { run(wait_without_barrier<false>); });
}

// The second warp reads what the first one copied, with the barrier on the wrong side of the wait.
template <bool Faulty>
__global__ void __launch_bounds__(64) wait_after_the_barrier(Params p) {
  if (thread() < 32) {
    cp_async<1>(shared_words() + thread(), p.in + thread());
    cp_async_commit();
    if (!Faulty) {
      cp_async_wait<0>();
    }
  }
  sync_threads();
  if (Faulty && thread() < 32) {
    cp_async_wait<0>();
  }
  if (thread() >= 32) {
    store(p.out + thread(), load(shared_words() + (thread() - 32)));
  }
}
TEST(cp_async_waited_for_after_the_barrier) {
  expect_fault([] { run(wait_after_the_barrier<true>); }, "race", kFile);
  expect_none([] { run(wait_after_the_barrier<false>); });
}

template <bool Faulty>
__global__ void __launch_bounds__(32) cp_async_past_the_end(Params p) {
  cp_async<1>(shared_words() + thread(), p.in + (thread() + (Faulty ? 33 : 32)));
  cp_async_commit();
  cp_async_wait<0>();
}
TEST(cp_async_from_past_the_end) {
  expect_fault([] { run(cp_async_past_the_end<true>, {32}); }, "outside", kFile);
  expect_none([] { run(cp_async_past_the_end<false>, {32}); });
}

// Workspaces and launches that overlap ----------------------------------------------------

// The kernel reads the first half of `output`, and writes the second.
template <bool Faulty>
__global__ void __launch_bounds__(64) update(Params p) {
  const uint32_t value = load(readable(p.out) + thread());
  store(p.out + ((Faulty ? 63 : 64) + thread()), value + 1);
}
TEST(buffer_that_is_read_and_written) {
  const auto on_output = [](Kernel kernel) {
    for (int i = 0; i < 128; ++i) output[i] = static_cast<uint32_t>(i);
    Launch config;
    config.threads = 64;
    // What is read may be declared again; in a vector here.
    launch(config, std::vector<Buffer>{reads(output, 4 * 64), updates(output, 4 * 128, 100, 200)},
           kernel, Params{{output}, {output}});
  };
  expect_fault([&] { on_output(update<true>); }, "race", kFile);
  emulator::reset_counters();
  expect_none([&] { on_output(update<false>); });
  CHECK(emulator::counters().minimum_load_bytes == 4 * 64 + 100);
  CHECK(emulator::counters().minimum_store_bytes == 200);
  for (int i = 0; i < 128; ++i) {
    CHECK(output[i] == static_cast<uint32_t>(i < 64 ? i : i - 63), "output[%d] = %u", i, output[i]);
  }
}

TEST(buffers_that_contradict_each_other) {
  const auto with = [](const Buffer& first, const Buffer& second) {
    CHECK_THROWS(launch({}, std::array{first, second}, update<false>, Params{{input}, {output}}));
  };
  with(writes(output, 8), updates(output + 1, 8, 8, 8));
  with(constants(output, 8), writes(output + 1, 8));
}

enum class Dependency { kWaits, kLoadsFirst, kStoresFirst, kNever, kConstantsOnly };

// Loads a constant before the wait, an input and an output after it.
template <Dependency Kind>
__global__ void __launch_bounds__(64) dependent(Params p) {
  uint32_t value = load(p.in + thread());
  if (Kind == Dependency::kLoadsFirst && thread() == 40) value = load(p.in + 64);
  if (Kind == Dependency::kStoresFirst && thread() == 40) store(p.out + 40, value);
  if (Kind < Dependency::kNever) grid_dependency_wait();
  grid_dependents_launch();
  if (Kind == Dependency::kConstantsOnly) return;
  value += load(p.in + (64 + thread()));
  store(p.out + thread(), value);
}
TEST(launch_that_overlaps) {
  const auto overlapping = [](Kernel kernel, bool overlaps = true) {
    Launch config;
    config.threads = 64;
    config.overlaps = overlaps;
    launch(config,
           std::array{constants(input, 4 * 64), reads(input + 64, 4 * 64), writes(output, 4 * 64)},
           kernel, Params{{input}, {output}});
  };
  using D = Dependency;
  expect_fault([&] { overlapping(dependent<D::kLoadsFirst>); }, "thread 40", "global load",
               "grid_dependency_wait", kFile);
  expect_fault([&] { overlapping(dependent<D::kStoresFirst>); }, "thread 40", "global store",
               "grid_dependency_wait", kFile);
  expect_fault([&] { overlapping(dependent<D::kNever>); }, "grid_dependency_wait", kFile);
  expect_fault([&] { overlapping(dependent<D::kConstantsOnly>); }, "grid_dependency_wait");
  expect_none([&] { overlapping(dependent<D::kWaits>); });
  expect_none([&] { overlapping(dependent<D::kNever>, false); });
}

// Barriers and collectives ----------------------------------------------------------------

template <bool Faulty>
__global__ void __launch_bounds__(64) divergent_barrier(Params p) {
  if (!Faulty || thread() != 40) {
    sync_threads();
  } else {
    store(p.out, uint32_t{1});
  }
  sync_threads();
}
TEST(barrier_in_a_divergent_branch) {
  expect_fault([] { run(divergent_barrier<true>); }, "sync_threads", "40", kFile);
  expect_none([] { run(divergent_barrier<false>); });
}

template <bool Faulty>
__global__ void __launch_bounds__(64) early_exit(Params p) {
  if (thread() == 40) {
    if (Faulty) {
      return;
    }
  } else {
    store(p.out + thread(), uint32_t{1});
  }
  sync_threads();
}
TEST(early_exit_before_a_barrier) {
  expect_fault([] { run(early_exit<true>); }, "sync_threads", "40", kFile);
  expect_none([] { run(early_exit<false>); });
}

template <bool Faulty>
__global__ void __launch_bounds__(32) missing_lane(Params p) {
  const uint32_t value = load(p.in + thread());
  if (thread() != 5) {
    store(p.out + thread(), shuffle(value, 0, Faulty ? kFullMask : kFullMask & ~(1u << 5)));
  }
}
TEST(shuffle_with_a_lane_missing) {
  expect_fault([] { run(missing_lane<true>, {32}); }, "shuffle", "lane", kFile);
  expect_none([] { run(missing_lane<false>, {32}); });
}

template <bool Faulty>
__global__ void __launch_bounds__(32) caller_outside_mask(Params p) {
  const uint32_t value = load(p.in + thread());
  store(p.out + thread(), shuffle_xor(value, 1, Faulty ? 0x0000ffffu : kFullMask));
}
TEST(shuffle_of_a_lane_outside_the_mask) {
  expect_fault([] { run(caller_outside_mask<true>, {32}); }, "shuffle", "lane", kFile);
  expect_none([] { run(caller_outside_mask<false>, {32}); });
}

template <bool Faulty>
__global__ void __launch_bounds__(32) mma_of_half_a_warp(Params p) {
  float d[4] = {0, 0, 0, 0};
  const uint32_t a[4] = {0, 0, 0, 0};
  const uint32_t b[2] = {0, 0};
  if (!Faulty || thread() < 16) {
    mma_f16(d, a, b);
  }
  store(p.out + thread(), static_cast<uint32_t>(d[0]));
}
TEST(mma_with_lanes_missing) {
  expect_fault([] { run(mma_of_half_a_warp<true>, {32}); }, "mma_f16", "lane", kFile);
  expect_none([] { run(mma_of_half_a_warp<false>, {32}); });
}

// Kernels that never end ------------------------------------------------------------------

template <bool Faulty>
__global__ void __launch_bounds__(32) endless_arithmetic(Params p) {
  volatile uint32_t count = 0;
  while (Faulty || count < 1000) {
    count = Faulty ? count ^ 1 : count + 1;
  }
  store(p.out + thread(), static_cast<uint32_t>(count));
}
TEST(endless_arithmetic) {
  expect_fault([] { run(endless_arithmetic<true>, {32}); }, "never ends");
  expect_none([] { run(endless_arithmetic<false>, {32}); });
}

// The words of `in` are their own indices.
template <bool Faulty>
__global__ void __launch_bounds__(32) spin_on_a_flag(Params p) {
  while (load(p.in + (Faulty ? 0 : 1)) == 0) {
  }
  store(p.out + thread(), uint32_t{1});
}
TEST(spin_on_a_flag_that_nobody_sets) {
  expect_fault([] { run(spin_on_a_flag<true>, {32}); }, "never ends");
  expect_none([] { run(spin_on_a_flag<false>, {32}); });
}

template <bool Faulty>
__global__ void __launch_bounds__(32) endless_barriers(Params p) {
  do {
    sync_threads();
  } while (Faulty || load(p.in + 1) == 0);
}
TEST(endless_barriers) {
  expect_fault([] { run(endless_barriers<true>, {32}); }, "never ends");
  expect_none([] { run(endless_barriers<false>, {32}); });
}

template <bool Faulty>
__global__ void __launch_bounds__(32) endless_shuffles(Params p) {
  uint32_t value = load(p.in + 1);
  do {
    value = shuffle_xor(value, 1);
  } while (Faulty || value == 0);
  store(p.out + thread(), value);
}
TEST(endless_shuffles) {
  expect_fault([] { run(endless_shuffles<true>, {32}); }, "never ends");
  expect_none([] { run(endless_shuffles<false>, {32}); });
}

TEST(a_fault_leaves_the_emulator_fit_for_use) {
  for (int i = 0; i < 3; ++i) {
    expect_fault([] { run(divergent_barrier<true>); }, "sync_threads");
    expect_none([] { run(missing_barrier<false>); });
    for (int t = 0; t < 64; ++t) {
      CHECK(output[t] == static_cast<uint32_t>(63 - t), "output[%d] = %u", t, output[t]);
    }
  }
}

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
  mma_f16(d, a, b);
  mma_bf16(d, a, b);
  mma_tf32(d, a, b);
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

int main() { return run_all_tests(); }
