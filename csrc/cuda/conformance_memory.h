// Cases of memory (conformance.cu), and what all cases need.
#pragma once

#include <cstring>

#include "cuda/isa.h"

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

// Places that are parts of the instruction: 16 threads move two vectors each, N elements
// apart.

template <class T, int N>
SNV2_DEVICE Vector<T, N> vector_of(Global<const T> in) {
  Vector<T, N> value;
  for (int j = 0; j < N; ++j) {
    value.values[j] = load(in + j);
  }
  return value;
}

template <class T, int N>
SNV2_DEVICE void store_pair(Global<uint32_t> out, const Vector<T, N>& first,
                            const Vector<T, N>& second) {
  store_vector<N>(as<T>(out) + 2 * thread() * N, first);
  store_vector<N>(as<T>(out) + (2 * thread() + 1) * N, second);
}

template <class T, int N>
__global__ void __launch_bounds__(16) store_global_pair(Params p) {
  const Global<const T> in = as<const T>(p.in) + 2 * thread() * N;
  const Global<T> out = as<T>(p.out) + 2 * (15 - thread()) * N;
  store_vector<N>(out, vector_of<T, N>(in));
  store_vector<N, N>(out, vector_of<T, N>(in + N));
}

template <class T, int N>
__global__ void __launch_bounds__(16) load_address_pair(Params p) {
  const Global<const T> in = as<const T>(p.in) + 2 * thread() * N;
  const Shared<T> shared = shared_memory().as<T>();
  for (int j = 0; j < 2 * N; ++j) {
    store(shared + (2 * thread() * N + j), load(in + j));
  }
  sync_threads();
  const Address<T> there(shared + 2 * (15 - thread()) * N);
  store_pair<T, N>(p.out, load_vector<N>(there), load_vector<N, N>(there));
}

template <class T, int N>
__global__ void __launch_bounds__(16) store_address_pair(Params p) {
  const Global<const T> in = as<const T>(p.in) + 2 * thread() * N;
  const Shared<T> shared = shared_memory().as<T>();
  const Address<T> there(shared + 2 * (15 - thread()) * N);
  store_vector<N>(there, vector_of<T, N>(in));
  store_vector<N, N>(there, vector_of<T, N>(in + N));
  sync_threads();
  const Shared<T> own = shared + 2 * thread() * N;
  store_pair<T, N>(p.out, load_vector<N>(own), load_vector<N>(own + N));
}

template <class T, int N>
__global__ void __launch_bounds__(16) cp_async_pair(Params p) {
  const Global<const T> in = as<const T>(p.in) + 2 * thread() * N;
  const Shared<T> shared = shared_memory().as<T>();
  cp_async<N>(shared + 2 * thread() * N, in);
  cp_async<N, N>(shared + 2 * thread() * N, in);
  cp_async_commit();
  cp_async_wait<0>();
  sync_threads();
  const Shared<T> there = shared + 2 * (15 - thread()) * N;
  store_pair<T, N>(p.out, load_vector<N>(there), load_vector<N>(there + N));
}

// Over what is there, where a third word is odd.
template <class T>
__global__ void __launch_bounds__(32) store_if_odd(Params p) {
  const Shared<T> shared = shared_memory().as<T>();
  const auto value = static_cast<T>(load(p.in + (32 + thread())));
  const bool wanted = load(p.in + (64 + thread())) % 2 != 0;
  store(shared + thread(), static_cast<T>(load(p.in + thread())));
  sync_threads();
  store_if(wanted, shared + (31 - thread()), value);
  sync_threads();
  store(p.out + thread(), static_cast<uint32_t>(load(shared + thread())));
}

// The same of N words, where the N-th of three times as many is odd.
template <int N>
__global__ void __launch_bounds__(32) store_vector_if_odd(Params p) {
  const Shared<uint32_t> own = shared_memory().as<uint32_t>() + N * thread();
  const Shared<uint32_t> other = shared_memory().as<uint32_t>() + N * (31 - thread());
  const bool wanted = load(p.in + N * (64 + thread())) % 2 != 0;
  store_vector(own, load_vector<N>(p.in + N * thread()));
  sync_threads();
  store_vector_if(wanted, Address<uint32_t>(other), load_vector<N>(p.in + N * (32 + thread())));
  sync_threads();
  store_vector(p.out + N * thread(), load_vector<N>(own));
}

// Compares two places, as either kind of pointer has them.
__global__ void __launch_bounds__(32) earlier_place(Params p) {
  const Shared<uint32_t> shared = shared_memory().as<uint32_t>();
  store(shared + thread(), static_cast<uint32_t>(thread()));
  sync_threads();
  const Shared<uint32_t> a = shared + static_cast<int>(load(p.in + thread()) % 32);
  const Shared<uint32_t> b = shared + static_cast<int>(load(p.in + (32 + thread())) % 32);
  const Address<uint32_t> place = earlier(Address<uint32_t>(a), Address<uint32_t>(b));
  store(p.out + thread(), load(earlier(a, b)));
  store(p.out + (32 + thread()), load_vector<1>(place).values[0]);
  store(p.out + (64 + thread()), is_before(Address<uint32_t>(a), Address<uint32_t>(b)) ? 1u : 0u);
}

__global__ void __launch_bounds__(32) halves_of_words(Params p) {
  const uint32_t a = load(p.in + thread()), b = load(p.in + (32 + thread()));
  store(p.out + thread(), word_of(static_cast<uint16_t>(a), static_cast<uint16_t>(b)));
  store(p.out + (32 + thread()), low_halves(a, b));
  store(p.out + (64 + thread()), high_halves(a, b));
}

}  // namespace
}  // namespace snv2::SNV2_GPU
