// Races, each in a kernel beside its twin without it.
#include "emulator_testing.h"

namespace snv2::SNV2_GPU {
namespace {

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
  expect_race("missing_barrier", missing_barrier<true>, missing_barrier<false>, {}, 64);
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
  expect_race("missing_second_barrier", missing_second_barrier<true>, missing_second_barrier<false>,
              {}, 64);
}

// Warps run in turn here: the first has read what the second writes, and nobody reads it after.
template <bool Faulty>
__global__ void __launch_bounds__(64) write_after_read(Params p) {
  store(shared_words() + thread(), load(p.in + thread()));
  sync_threads();
  if (thread() < 32) {
    store(p.out + thread(), load(shared_words() + (31 - thread())));
  }
  if (!Faulty) {
    sync_threads();
  }
  if (thread() >= 32) {
    store(shared_words() + (thread() - 32), uint32_t{0});
  }
}
TEST(write_after_read) {
  expect_race("write_after_read", write_after_read<true>, write_after_read<false>, {}, 64, "read");
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
  expect_race("missing_sync_warp", missing_sync_warp<true>, missing_sync_warp<false>, {32}, 64);
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
  expect_race("sync_warp_between_warps", sync_warp_between_warps<true>,
              sync_warp_between_warps<false>, {}, 64);
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
  expect_race("sync_half_a_warp", sync_half_a_warp<true>, sync_half_a_warp<false>, {32}, 64);
}

template <bool Faulty>
__global__ void __launch_bounds__(64) two_ctas(Params p) {
  store(p.out + (thread() + (Faulty ? 0 : 64 * cta())), static_cast<uint32_t>(cta()));
}
TEST(two_ctas_write_the_same_word) {
  expect_race("two_ctas", two_ctas<true>, two_ctas<false>, {64, 0, 2}, 128);
}

template <bool Faulty>
__global__ void __launch_bounds__(64) missing_sync_grid(Params p) {
  store(p.out + (64 * cta() + thread()), uint32_t{0});
  sync_grid();
  store(p.out + (64 * cta() + thread()), uint32_t{1});
  if (!Faulty) {
    sync_grid();
  }
  const uint32_t value = load(readable(p.out) + (64 * (1 - cta()) + thread()));
  store(p.out + (128 + 64 * cta() + thread()), value);
}
TEST(missing_sync_grid) {
  expect_race("missing_sync_grid", missing_sync_grid<true>, missing_sync_grid<false>,
              {64, 0, 2, 1, true}, 256);
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
  expect_race("missing_sync_cluster", missing_sync_cluster<true>, missing_sync_cluster<false>,
              {64, 256, 2, 2}, 128);
}

// What others have read may be overwritten; what they have written is not there yet.
template <bool Faulty>
__global__ void __launch_bounds__(64) sync_of_reads(Params p) {
  store(shared_words() + thread(), load(p.in + thread()));
  sync_cluster();
  const auto theirs = remote(shared_words(), 1 - cluster_rank());
  const uint32_t value = load(theirs + thread());
  sync_cluster_reads();
  store(theirs + (63 - thread()), value);
  if (Faulty) {
    sync_cluster_reads();
  } else {
    sync_cluster();
  }
  store(p.out + (64 * cta() + thread()), load(shared_words() + thread()));
}
TEST(barrier_for_reads_before_a_read) {
  const Shape shape{64, 256, 2, 2};
  expect_fault([&] { run(sync_of_reads<true>, shape, 128); }, "race: read", "written by",
               "test_emulator_races.cpp:");
  expect_none([&] { run(sync_of_reads<false>, shape, 128); });
  CHECK(output[0] == 63, "output[0] = %u", output[0]);
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
  expect_race("wait_without_barrier", wait_without_barrier<true>, wait_without_barrier<false>, {},
              64);
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
  expect_race("wait_after_the_barrier", wait_after_the_barrier<true>, wait_after_the_barrier<false>,
              {}, 64);
}

}  // namespace
}  // namespace snv2::SNV2_GPU
