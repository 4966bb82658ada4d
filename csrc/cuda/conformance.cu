// One small kernel for each function of isa.h. python_tests/test_conformance.py knows what each
// must answer; a GPU and the emulator are fed the same bits.
#include <array>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/isa.h"
#include "cuda/launch.h"
#include "snv2/cuda.h"

namespace snv2::SNV2_GPU {
namespace {

struct Params {
  Global<const uint32_t> in;
  Global<uint32_t> out;
};

template <class U, class T>
SNV2_DEVICE Global<U> as(Global<T> p) {
  return {reinterpret_cast<U*>(p.address)};
}

SNV2_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
SNV2_DEVICE int cta() { return static_cast<int>(blockIdx.x); }

SNV2_DEVICE float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
SNV2_DEVICE uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

// Memory ----------------------------------------------------------------------------------
//
// N elements of 16 bits each move in one instruction, all else in instructions of one element.
// Thread t reads what lies at 31 - t, or writes there.

template <int N>
SNV2_DEVICE void store_words(Global<uint32_t> out, const Vector<uint16_t, N>& value) {
  if constexpr (N == 1) {
    store(out + thread(), static_cast<uint32_t>(value.values[0]));
  } else {
    for (int j = 0; j < N / 2; ++j) {
      const uint32_t low = value.values[2 * j];
      const uint32_t high = value.values[2 * j + 1];
      store(out + (thread() * (N / 2) + j), low | high << 16);
    }
  }
}

template <int N>
__global__ void __launch_bounds__(32) load_global(Params p) {
  store_words<N>(p.out, load_vector<N>(as<const uint16_t>(p.in) + (31 - thread()) * N));
}

template <int N>
__global__ void __launch_bounds__(32) store_global(Params p) {
  const Global<const uint16_t> in = as<const uint16_t>(p.in) + thread() * N;
  Vector<uint16_t, N> value;
  for (int j = 0; j < N; ++j) {
    value.values[j] = load(in + j);
  }
  store_vector<N>(as<uint16_t>(p.out) + (31 - thread()) * N, value);
}

template <int N>
__global__ void __launch_bounds__(32) load_shared(Params p) {
  const Global<const uint16_t> in = as<const uint16_t>(p.in) + thread() * N;
  const Shared<uint16_t> shared = shared_memory().as<uint16_t>();
  for (int j = 0; j < N; ++j) {
    store(shared + (thread() * N + j), load(in + j));
  }
  sync_threads();
  store_words<N>(p.out, load_vector<N>(shared + (31 - thread()) * N));
}

template <int N>
__global__ void __launch_bounds__(32) store_shared(Params p) {
  const Global<const uint16_t> in = as<const uint16_t>(p.in) + thread() * N;
  const Shared<uint16_t> shared = shared_memory().as<uint16_t>();
  Vector<uint16_t, N> value;
  for (int j = 0; j < N; ++j) {
    value.values[j] = load(in + j);
  }
  store_vector<N>(shared + (31 - thread()) * N, value);
  sync_threads();
  for (int j = 0; j < N; ++j) {
    value.values[j] = load(shared + (thread() * N + j));
  }
  store_words<N>(p.out, value);
}

__global__ void __launch_bounds__(32) misalignments(Params p) {
  const Global<const uint16_t> in = as<const uint16_t>(p.in) + thread();
  store(p.out + thread(), static_cast<uint32_t>(misalignment(in, 16)));
  store(p.out + (32 + thread()), static_cast<uint32_t>(misalignment(in, 4)));
}

// Two groups of copies of N words, the first read while the second may be under way.
template <int N>
__global__ void __launch_bounds__(32) cp_async_words(Params p) {
  const Shared<uint32_t> shared = shared_memory().as<uint32_t>();
  for (int group = 0; group < 2; ++group) {
    const int at = (32 * group + thread()) * N;
    cp_async<N>(shared + at, p.in + at);
    cp_async_commit();
  }
  const int at = thread() * N;
  const int from = (31 - thread()) * N;
  cp_async_wait<1>();
  sync_threads();
  for (int j = 0; j < N; ++j) {
    store(p.out + (at + j), load(shared + (from + j)));
  }
  cp_async_wait<0>();
  sync_threads();
  for (int j = 0; j < N; ++j) {
    store(p.out + (32 * N + at + j), load(shared + (32 * N + from + j)));
  }
}

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

// Lane l names row 5 l + 3, modulo as many as there are.
template <int Matrices, bool Transposed>
__global__ void __launch_bounds__(32) ldmatrix_rows(Params p) {
  const Shared<uint32_t> shared = shared_memory().as<uint32_t>();
  for (int j = 0; j < Matrices; ++j) {
    store(shared + (32 * j + thread()), load(p.in + (32 * j + thread())));
  }
  sync_threads();
  uint32_t d[Matrices];
  const int row = (5 * thread() + 3) % (8 * Matrices);
  ldmatrix<Matrices, Transposed>(d, shared_memory().as<uint16_t>() + 8 * row);
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

// Conversions -----------------------------------------------------------------------------

template <class T>
__global__ void __launch_bounds__(128) to_float_all(Params p) {
  const T value = load(as<const T>(p.in) + thread());
  store(p.out + thread(), bits_of(to_float(value)));
}

// One result in the low half of each word.
template <class T>
__global__ void __launch_bounds__(128) from_float_all(Params p) {
  T value;
  from_float(float_of(load(p.in + thread())), value);
  store(p.out + thread(), static_cast<uint32_t>(value.bits));
}

__global__ void __launch_bounds__(128) to_tf32_all(Params p) {
  store(p.out + thread(), to_tf32(float_of(load(p.in + thread()))));
}

__global__ void __launch_bounds__(128) relu_all(Params p) {
  store(p.out + thread(), bits_of(relu(float_of(load(p.in + thread())))));
}

// Each thread has two elements, of which the second may be cleared.
template <class T>
__global__ void __launch_bounds__(128) clear_all(Params p) {
  const uint32_t word = load(p.in + thread());
  const Shared<T> own = shared_memory().as<T>() + 2 * thread();
  for (int j = 0; j < 2; ++j) store(own + j, static_cast<T>(word));
  clear_unless_above_zero<1>(float_of(word), Address<T>(own));
  for (int j = 0; j < 2; ++j) {
    store(p.out + (2 * thread() + j), static_cast<uint32_t>(load(own + j)));
  }
}

__global__ void __launch_bounds__(128) max_nan_float(Params p) {
  const Global<const uint32_t> in = p.in + 2 * thread();
  store(p.out + thread(), bits_of(max_nan(float_of(load(in)), float_of(load(in + 1)))));
}

// One result in the low half of each word.
template <class T>
__global__ void __launch_bounds__(64) max_nan_pairs(Params p) {
  const Global<const T> in = as<const T>(p.in) + 4 * thread();
  const Vector<T, 2> larger = max_nan(load_vector<2>(in), load_vector<2>(in + 2));
  for (int j = 0; j < 2; ++j) {
    store(p.out + (2 * thread() + j), static_cast<uint32_t>(larger.values[j].bits));
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
      {{"cluster_load", 128, 256}, cluster_load, shape(64, 256, 2, 2)},
      {{"cluster_store", 128, 128}, cluster_store, shape(64, 256, 2, 2)},
      {{"sync_grid", 128, 256}, sync_grid_all, shape(64, 0, 2, 1, true)},
      {{"grid_dependency", 32, 32}, grid_dependency, overlapping(shape(32))},
      {{"ldmatrix_x1", 32, 32}, ldmatrix_rows<1, false>, shape(32, 128)},
      {{"ldmatrix_x2", 64, 64}, ldmatrix_rows<2, false>, shape(32, 256)},
      {{"ldmatrix_x4", 128, 128}, ldmatrix_rows<4, false>, shape(32, 512)},
      {{"ldmatrix_x1_trans", 32, 32}, ldmatrix_rows<1, true>, shape(32, 128)},
      {{"ldmatrix_x2_trans", 64, 64}, ldmatrix_rows<2, true>, shape(32, 256)},
      {{"ldmatrix_x4_trans", 128, 128}, ldmatrix_rows<4, true>, shape(32, 512)},
      {{"mma_f16", 320, 128}, mma<Mma::kF16>, shape(32)},
      {{"mma_bf16", 320, 128}, mma<Mma::kBf16>, shape(32)},
      {{"mma_tf32", 320, 128}, mma<Mma::kTf32>, shape(32)},
      {{"to_float_float", 128, 128}, to_float_all<float>, shape(128)},
      {{"to_float_half", 64, 128}, to_float_all<half_t>, shape(128)},
      {{"to_float_bfloat16", 64, 128}, to_float_all<bfloat16_t>, shape(128)},
      {{"from_float_half", 128, 128}, from_float_all<half_t>, shape(128)},
      {{"from_float_bfloat16", 128, 128}, from_float_all<bfloat16_t>, shape(128)},
      {{"to_tf32", 128, 128}, to_tf32_all, shape(128)},
      {{"relu", 128, 128}, relu_all, shape(128)},
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
