// One small kernel for each function of isa.h. python_tests/_conformance.py knows what each
// must answer; a GPU and the emulator are fed the same bits.
#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/conformance_async.h"
#include "cuda/conformance_memory.h"
#include "cuda/conformance_numbers.h"
#include "cuda/launch.h"
#include "snv2/cuda.h"

namespace snv2::SNV2_GPU {
namespace {

// Other threads ---------------------------------------------------------------------------

enum class Shuffle { kLane, kXor, kUp, kDown };

template <Shuffle Kind>
SNV2_DEVICE uint32_t shuffled(uint32_t value, int lane, uint32_t mask) {
  if constexpr (Kind == Shuffle::kLane) {
    return shuffle(value, lane, mask);
  } else if constexpr (Kind == Shuffle::kXor) {
    return shuffle_xor(value, lane, mask);
  } else if constexpr (Kind == Shuffle::kUp) {
    return shuffle_up(value, lane, mask);
  } else {
    return shuffle_down(value, lane, mask);
  }
}

// The lanes that other lanes read, or how far they lie, are random too where lanes may differ.
template <Shuffle Kind>
__global__ void __launch_bounds__(32) shuffle_all(Params p) {
  const uint32_t value = load(p.in + thread());
  for (int i = 0; i < 6; ++i) {
    const int lane = Kind == Shuffle::kLane ? static_cast<int>(load(p.in + (32 + thread()))) + i
                     : i < 5                ? 1 << i
                                            : 31;
    store(p.out + (32 * i + thread()), shuffled<Kind>(value, lane & 31, kFullMask));
  }
}

// Lanes outside Mask keep their own.
template <Shuffle Kind, uint32_t Mask, int Lane>
__global__ void __launch_bounds__(32) shuffle_partial(Params p) {
  uint32_t value = load(p.in + thread());
  if ((Mask >> thread() & 1) != 0) {
    value = shuffled<Kind>(value, Lane, Mask);
  }
  store(p.out + thread(), value);
}

__global__ void __launch_bounds__(32) sync_warp_all(Params p) {
  const Shared<uint32_t> shared = shared_memory().as<uint32_t>();
  store(shared + thread(), load(p.in + thread()));
  sync_warp();
  store(p.out + thread(), load(shared + (31 - thread())));
}

// Half a warp exchanges; the other half sleeps.
__global__ void __launch_bounds__(32) sync_warp_partial(Params p) {
  const Shared<uint32_t> shared = shared_memory().as<uint32_t>();
  uint32_t value = load(p.in + thread());
  if (thread() >= 16) {
    store(shared + thread(), value);
    sync_warp(0xffff0000u);
    value = load(shared + (47 - thread()));
  }
  store(p.out + thread(), value);
}

__global__ void __launch_bounds__(96) sync_threads_all(Params p) {
  const Shared<uint32_t> shared = shared_memory().as<uint32_t>();
  store(shared + thread(), load(p.in + thread()));
  sync_threads();
  const uint32_t value = load(shared + (95 - thread()));
  store(p.out + thread(), value);
  sync_threads();
  store(shared + thread(), value);
  sync_threads();
  store(p.out + (96 + thread()), load(shared + (thread() + 33) % 96));
}

// Each warp has a word of its own.
__global__ void __launch_bounds__(96) warp_uniform_all(Params p) {
  const int word = warp_uniform(static_cast<int>(load(p.in + thread() / 32)));
  store(p.out + thread(), static_cast<uint32_t>(word));
}

// Each CTA reads what the other one has, and its rank.
__global__ void __launch_bounds__(64) cluster_load(Params p) {
  const Shared<uint32_t> shared = shared_memory().as<uint32_t>();
  const int rank = cluster_rank();
  store(shared + thread(), load(p.in + (64 * cta() + thread())));
  sync_cluster();
  const uint32_t value = load(remote(shared, 1 - rank) + (63 - thread()));
  store(p.out + (64 * cta() + thread()), value);
  store(p.out + (128 + 64 * cta() + thread()), static_cast<uint32_t>(rank));
  sync_cluster_reads();  // shared memory lives until the other CTA has read it
}

__global__ void __launch_bounds__(64) cluster_store(Params p) {
  const Shared<uint32_t> shared = shared_memory().as<uint32_t>();
  const uint32_t value = load(p.in + (64 * cta() + thread()));
  sync_cluster();  // the other CTA has begun
  store(remote(shared, 1 - cluster_rank()) + (63 - thread()), value);
  sync_cluster();
  store(p.out + (64 * cta() + thread()), load(shared + thread()));
}

__global__ void __launch_bounds__(64) cluster_store_vectors(Params p) {
  const Shared<uint32_t> shared = shared_memory().as<uint32_t>();
  const Vector<uint32_t, 4> value = load_vector<4>(p.in + 4 * (64 * cta() + thread()));
  sync_cluster();  // the other CTA has begun
  store_vector<4>(remote(shared, 1 - cluster_rank()) + 4 * (63 - thread()), value);
  sync_cluster();
  store_vector<4>(p.out + 4 * (64 * cta() + thread()), load_vector<4>(shared + 4 * thread()));
}

// The first half of `out` is what the CTAs exchange, the second what they got.
__global__ void __launch_bounds__(64) sync_grid_all(Params p) {
  store(p.out + (64 * cta() + thread()), load(p.in + (64 * cta() + thread())));
  sync_grid();
  const uint32_t value = load(as<const uint32_t>(p.out) + (64 * (1 - cta()) + 63 - thread()));
  store(p.out + (128 + 64 * cta() + thread()), value);
}

// Begins perhaps before its input is there.
__global__ void __launch_bounds__(32) grid_dependency(Params p) {
  grid_dependency_wait();
  const uint32_t value = load(p.in + (31 - thread()));
  grid_dependents_launch();
  store(p.out + thread(), value);
}

// Tensor cores ----------------------------------------------------------------------------

// Lane l names row 5 l + 3, modulo as many as there are, kOffset elements before it.
template <int Matrices, bool Transposed, int kOffset = 0>
__global__ void __launch_bounds__(32) ldmatrix_rows(Params p) {
  const Shared<uint32_t> shared = shared_memory().as<uint32_t>();
  for (int j = 0; j < Matrices; ++j) {
    store(shared + (kOffset / 2 + 32 * j + thread()), load(p.in + (32 * j + thread())));
  }
  sync_threads();
  uint32_t d[Matrices];
  const Shared<uint16_t> row =
      shared_memory().as<uint16_t>() + (5 * thread() + 3) % (8 * Matrices) * 8;
  if constexpr (kOffset == 0) {
    ldmatrix<Matrices, Transposed>(d, row);
  } else {
    ldmatrix<Matrices, Transposed, kOffset>(d, Address<uint16_t>(row));
  }
  for (int j = 0; j < Matrices; ++j) {
    store(p.out + (Matrices * thread() + j), d[j]);
  }
}

enum class Mma { kF16, kBf16, kTf32 };

// For each lane a[4], b[2], c[4] in, d[4] out.
template <Mma Kind>
__global__ void __launch_bounds__(32) mma(Params p) {
  const Global<const uint32_t> in = p.in + 10 * thread();
  uint32_t a[4];
  uint32_t b[2];
  float d[4];
  for (int j = 0; j < 4; ++j) {
    a[j] = load(in + j);
  }
  for (int j = 0; j < 2; ++j) {
    b[j] = load(in + (4 + j));
  }
  for (int j = 0; j < 4; ++j) {
    d[j] = float_of(load(in + (6 + j)));
  }
  if constexpr (Kind == Mma::kF16) {
    mma_f16(d, a, b, d);
  } else if constexpr (Kind == Mma::kBf16) {
    mma_bf16(d, a, b, d);
  } else {
    mma_tf32(d, a, b, d);
  }
  for (int j = 0; j < 4; ++j) {
    store(p.out + (4 * thread() + j), bits_of(d[j]));
  }
}

// The table -------------------------------------------------------------------------------

struct Entry {
  ConformanceCase described;
  void (*kernel)(Params);
  Launch launch;
};

Launch shape(uint32_t threads, int64_t shared_bytes = 0, uint32_t ctas = 1, uint32_t cluster = 1,
             bool cooperative = false) {
  Launch launch;
  launch.grid_x = ctas;
  launch.threads = threads;
  launch.cluster = cluster;
  launch.shared_bytes = shared_bytes;
  launch.cooperative = cooperative;
  return launch;
}

Launch overlapping(Launch launch) {
  launch.overlaps = true;
  return launch;
}

const std::vector<Entry>& entries() {
  using S = Shuffle;
  static const std::vector<Entry> table = {
      {{"load_global_2", 16, 32}, load_global<1>, shape(32)},
      {{"load_global_4", 32, 32}, load_global<2>, shape(32)},
      {{"load_global_8", 64, 64}, load_global<4>, shape(32)},
      {{"load_global_16", 128, 128}, load_global<8>, shape(32)},
      {{"store_global_2", 16, 16}, store_global<1>, shape(32)},
      {{"store_global_4", 32, 32}, store_global<2>, shape(32)},
      {{"store_global_8", 64, 64}, store_global<4>, shape(32)},
      {{"store_global_16", 128, 128}, store_global<8>, shape(32)},
      {{"load_shared_2", 16, 32}, load_shared<1>, shape(32, 64)},
      {{"load_shared_4", 32, 32}, load_shared<2>, shape(32, 128)},
      {{"load_shared_8", 64, 64}, load_shared<4>, shape(32, 256)},
      {{"load_shared_16", 128, 128}, load_shared<8>, shape(32, 512)},
      {{"store_shared_2", 16, 32}, store_shared<1>, shape(32, 64)},
      {{"store_shared_4", 32, 32}, store_shared<2>, shape(32, 128)},
      {{"store_shared_8", 64, 64}, store_shared<4>, shape(32, 256)},
      {{"store_shared_16", 128, 128}, store_shared<8>, shape(32, 512)},
      {{"store_global_pair_4", 32, 32}, store_global_pair<uint16_t, 2>, shape(16)},
      {{"store_global_pair_8", 64, 64}, store_global_pair<uint16_t, 4>, shape(16)},
      {{"store_global_pair_16", 128, 128}, store_global_pair<uint16_t, 8>, shape(16)},
      {{"load_address_pair_4", 32, 32}, load_address_pair<uint16_t, 2>, shape(16, 128)},
      {{"load_address_pair_8", 64, 64}, load_address_pair<uint16_t, 4>, shape(16, 256)},
      {{"load_address_pair_16", 128, 128}, load_address_pair<uint16_t, 8>, shape(16, 512)},
      {{"load_address_pair_4_float", 32, 32}, load_address_pair<float, 1>, shape(16, 128)},
      {{"load_address_pair_8_float", 64, 64}, load_address_pair<float, 2>, shape(16, 256)},
      {{"load_address_pair_16_float", 128, 128}, load_address_pair<float, 4>, shape(16, 512)},
      {{"store_address_pair_4", 32, 32}, store_address_pair<uint16_t, 2>, shape(16, 128)},
      {{"store_address_pair_8", 64, 64}, store_address_pair<uint16_t, 4>, shape(16, 256)},
      {{"store_address_pair_16", 128, 128}, store_address_pair<uint16_t, 8>, shape(16, 512)},
      {{"store_address_pair_4_float", 32, 32}, store_address_pair<float, 1>, shape(16, 128)},
      {{"store_address_pair_8_float", 64, 64}, store_address_pair<float, 2>, shape(16, 256)},
      {{"store_address_pair_16_float", 128, 128}, store_address_pair<float, 4>, shape(16, 512)},
      {{"cp_async_pair_4", 32, 32}, cp_async_pair<uint16_t, 2>, shape(16, 128)},
      {{"cp_async_pair_8", 64, 64}, cp_async_pair<uint16_t, 4>, shape(16, 256)},
      {{"cp_async_pair_16", 128, 128}, cp_async_pair<uint16_t, 8>, shape(16, 512)},
      {{"store_if_2", 96, 32}, store_if_odd<uint16_t>, shape(32, 64)},
      {{"store_if_4", 96, 32}, store_if_odd<uint32_t>, shape(32, 128)},
      {{"store_vector_if_4", 96, 32}, store_vector_if_odd<1>, shape(32, 128)},
      {{"store_vector_if_16", 384, 128}, store_vector_if_odd<4>, shape(32, 512)},
      {{"earlier", 64, 96}, earlier_place, shape(32, 128)},
      {{"halves", 64, 96}, halves_of_words, shape(32)},
      {{"misalignment", 16, 64}, misalignments, shape(32)},
      {{"cp_async_4", 64, 64}, cp_async_words<1>, shape(32, 256)},
      {{"cp_async_8", 128, 128}, cp_async_words<2>, shape(32, 512)},
      {{"cp_async_16", 256, 256}, cp_async_words<4>, shape(32, 1024)},
      {{"shuffle", 64, 192}, shuffle_all<S::kLane>, shape(32)},
      {{"shuffle_xor", 32, 192}, shuffle_all<S::kXor>, shape(32)},
      {{"shuffle_up", 32, 192}, shuffle_all<S::kUp>, shape(32)},
      {{"shuffle_down", 32, 192}, shuffle_all<S::kDown>, shape(32)},
      {{"shuffle_partial", 32, 32}, shuffle_partial<S::kLane, 0x0000fff0u, 9>, shape(32)},
      {{"shuffle_xor_partial", 32, 32}, shuffle_partial<S::kXor, 0x33333333u, 1>, shape(32)},
      {{"shuffle_up_partial", 32, 32}, shuffle_partial<S::kUp, 0x0000ffffu, 3>, shape(32)},
      {{"shuffle_down_partial", 32, 32}, shuffle_partial<S::kDown, 0xffff0000u, 3>, shape(32)},
      {{"sync_warp", 32, 32}, sync_warp_all, shape(32, 128)},
      {{"sync_warp_partial", 32, 32}, sync_warp_partial, shape(32, 128)},
      {{"sync_threads", 96, 192}, sync_threads_all, shape(96, 384)},
      {{"warp_uniform", 32, 96}, warp_uniform_all, shape(96)},
      {{"cluster_load", 128, 256}, cluster_load, shape(64, 256, 2, 2)},
      {{"cluster_store", 128, 128}, cluster_store, shape(64, 256, 2, 2)},
      {{"cluster_store_vector", 512, 512}, cluster_store_vectors, shape(64, 1024, 2, 2)},
      {{"copy_bulk", 256, 256}, copy_bulk_ring, shape(32, kAsyncBytes + 256)},
      {{"copy_bulk_16", 128, 128}, copy_bulk_lanes, shape(32, kAsyncBytes + 512)},
      {{"barrier_arrivals", 96, 96}, barrier_of_threads, shape(96, kAsyncBytes + 768)},
      {{"store_async_4", 128, 128}, store_async_steps<1>, shape(64, kAsyncBytes + 512, 2, 2)},
      {{"store_async_8", 256, 256}, store_async_steps<2>, shape(64, kAsyncBytes + 1024, 2, 2)},
      {{"store_async_16", 512, 512}, store_async_steps<4>, shape(64, kAsyncBytes + 2048, 2, 2)},
      {{"store_async_own", 64, 64}, store_async_steps<1, 1>, shape(64, kAsyncBytes + 512)},
      {{"sync_grid", 128, 256}, sync_grid_all, shape(64, 0, 2, 1, true)},
      {{"grid_dependency", 32, 32}, grid_dependency, overlapping(shape(32))},
      {{"ldmatrix_x1", 32, 32}, ldmatrix_rows<1, false>, shape(32, 128)},
      {{"ldmatrix_x2", 64, 64}, ldmatrix_rows<2, false>, shape(32, 256)},
      {{"ldmatrix_x4", 128, 128}, ldmatrix_rows<4, false>, shape(32, 512)},
      {{"ldmatrix_x1_trans", 32, 32}, ldmatrix_rows<1, true>, shape(32, 128)},
      {{"ldmatrix_x2_trans", 64, 64}, ldmatrix_rows<2, true>, shape(32, 256)},
      {{"ldmatrix_x4_trans", 128, 128}, ldmatrix_rows<4, true>, shape(32, 512)},
      {{"ldmatrix_x4_offset", 128, 128}, ldmatrix_rows<4, false, 8>, shape(32, 528)},
      {{"ldmatrix_x4_trans_offset", 128, 128}, ldmatrix_rows<4, true, 8>, shape(32, 528)},
      {{"mma_f16", 320, 128}, mma<Mma::kF16>, shape(32)},
      {{"mma_bf16", 320, 128}, mma<Mma::kBf16>, shape(32)},
      {{"mma_tf32", 320, 128}, mma<Mma::kTf32>, shape(32)},
      {{"to_float_float", 128, 128}, to_float_all<float>, shape(128)},
      {{"to_float_half", 64, 128}, to_float_all<half_t>, shape(128)},
      {{"to_float_bfloat16", 64, 128}, to_float_all<bfloat16_t>, shape(128)},
      {{"from_float_half", 128, 128}, from_float_all<half_t>, shape(128)},
      {{"from_float_bfloat16", 128, 128}, from_float_all<bfloat16_t>, shape(128)},
      {{"to_floats_half", 64, 256}, to_floats_all<half_t>, shape(64)},
      {{"to_floats_bfloat16", 64, 256}, to_floats_all<bfloat16_t>, shape(64)},
      {{"rounded_pair_half", 128, 128}, rounded_pairs<half_t>, shape(64)},
      {{"rounded_pair_bfloat16", 128, 128}, rounded_pairs<bfloat16_t>, shape(64)},
      {{"to_tf32", 128, 128}, to_tf32_all, shape(128)},
      {{"relu", 128, 128}, relu_all, shape(128)},
      {{"multiply_add", 384, 128}, multiply_add_all, shape(128)},
      {{"exponential", 128, 128}, exponential_all, shape(128)},
      {{"reciprocal", 128, 128}, reciprocal_all, shape(128)},
      {{"clear_unless_above_zero_2", 128, 256}, clear_all<uint16_t>, shape(128, 512)},
      {{"clear_unless_above_zero_4", 128, 256}, clear_all<uint32_t>, shape(128, 1024)},
      {{"max_nan_float", 256, 128}, max_nan_float, shape(128)},
      {{"max_nan_half", 128, 128}, max_nan_pairs<half_t>, shape(64)},
      {{"max_nan_bfloat16", 128, 128}, max_nan_pairs<bfloat16_t>, shape(64)},
  };
  return table;
}

}  // namespace

const ConformanceCase* conformance_cases() {
  static const std::vector<ConformanceCase> cases = [] {
    std::vector<ConformanceCase> result;
    for (const Entry& entry : entries()) {
      result.push_back(entry.described);
    }
    result.push_back({nullptr, 0, 0});
    return result;
  }();
  return cases.data();
}

void run_conformance(int64_t index, const void* in, void* out, Stream stream) {
  const std::vector<Entry>& table = entries();
  if (index < 0 || index >= static_cast<int64_t>(table.size())) {
    throw std::out_of_range("no conformance case " + std::to_string(index));
  }
  const Entry& entry = table[static_cast<size_t>(index)];
  Launch config = entry.launch;
  config.stream = stream;
  launch(config,
         std::array{reads(in, 4 * entry.described.in_words),
                    writes(out, 4 * entry.described.out_words)},
         entry.kernel, Params{{static_cast<const uint32_t*>(in)}, {static_cast<uint32_t*>(out)}});
}

}  // namespace snv2::SNV2_GPU
