// The emulator finds the faults it is there to find: kernels with one fault each, beside twins
// without it that pass. Races are in test_emulator_races.cpp.
#include <vector>

#include "emulator_testing.h"

namespace snv2::SNV2_GPU {
namespace {

// A message names the source line.
constexpr const char* kFile = "test_emulator_faults.cpp:";

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
__global__ void __launch_bounds__(32) cp_async_past_the_end(Params p) {
  cp_async<1>(shared_words() + thread(), p.in + (thread() + (Faulty ? 33 : 32)));
  cp_async_commit();
  cp_async_wait<0>();
}
TEST(cp_async_from_past_the_end) {
  expect_fault([] { run(cp_async_past_the_end<true>, {32}); }, "outside", kFile);
  expect_none([] { run(cp_async_past_the_end<false>, {32}); });
}

// Each CTA reads what the other one has, which ends with it.
template <bool Faulty>
__global__ void __launch_bounds__(64) end_of_a_cluster(Params p) {
  store(shared_words() + thread(), load(p.in + thread()));
  sync_cluster();
  const uint32_t value = load(remote(shared_words(), 1 - cluster_rank()) + thread());
  store(p.out + (64 * cta() + thread()), value);
  if (!Faulty) {
    sync_cluster_reads();
  }
}
// The second CTA has been read from when it ends.
__global__ void __launch_bounds__(64) end_of_the_other_cta(Params p) {
  store(shared_words() + thread(), load(p.in + thread()));
  sync_cluster();
  if (cluster_rank() == 0) {
    store(p.out + thread(), load(remote(shared_words(), 1) + thread()));
  }
}
TEST(shared_memory_of_a_cta_that_ends) {
  const Shape shape{64, 256, 2, 2};
  expect_fault([&] { run(end_of_a_cluster<true>, shape, 128); }, "sync_cluster", "end", kFile);
  expect_none([&] { run(end_of_a_cluster<false>, shape, 128); });
  expect_fault([&] { run(end_of_the_other_cta, shape, 128); }, "CTA (1, 0)", "ends while thread",
               "sync_cluster", kFile);
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
    mma_f16(d, a, b, d);
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
    expect_none([] { run(missing_wait<false>); });
    for (int t = 0; t < 64; ++t) {
      CHECK(output[t] == static_cast<uint32_t>(t), "output[%d] = %u", t, output[t]);
    }
  }
}

}  // namespace
}  // namespace snv2::SNV2_GPU
