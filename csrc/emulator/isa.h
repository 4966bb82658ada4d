// Bodies of isa.h for the emulator.
#pragma once

#include <cmath>
#include <cstring>

#include "emulator/calls.h"
#include "emulator/convert.h"

#define SNV2_DEVICE inline
#define __global__
#define __launch_bounds__(...)
#define __grid_constant__
#define threadIdx (::snv2::emulator::builtins().thread_index)
#define blockIdx (::snv2::emulator::builtins().block_index)
#define blockDim (::snv2::emulator::builtins().block_dim)
#define gridDim (::snv2::emulator::builtins().grid_dim)

// Parameters that tell an instruction where in the source it stands.
#define SNV2_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define SNV2_SITE \
  emulator::Site { file, line }

namespace snv2::SNV2_GPU {

template <class T>
struct Global {
  T* address;
  Global operator+(int64_t i) const { return {address + i}; }
};

template <class T>
struct Shared {
  T* address;
  Shared operator+(int i) const { return {address + i}; }
  template <class U>
  Shared<U> as() const {
    return {reinterpret_cast<U*>(address)};
  }
};

template <class T>
Shared<T> earlier(Shared<T> a, Shared<T> b) {
  return a.address < b.address ? a : b;
}
template <class T>
struct Address : Shared<T> {
  Address() = default;
  explicit Address(Shared<T> row) : Shared<T>(row) {}
  template <class U>
  Address<U> as() const {
    return Address<U>(Shared<T>::template as<U>());
  }
  Address operator+(int i) const { return Address(Shared<T>::operator+(i)); }
};
template <class T>
bool is_before(Address<T> a, Address<T> b) {
  return a.address < b.address;
}
template <class T>
Address<T> earlier(Address<T> a, Address<T> b) {
  return a.address < b.address ? a : b;
}

template <class T>
using Remote = Shared<T>;

inline Shared<unsigned char> shared_memory() { return {emulator::shared_memory()}; }

// Global and shared memory ------------------------------------------------------------------

namespace detail {
template <class V>
V read(const void* p) {
  V value;
  std::memcpy(&value, p, sizeof value);
  return value;
}
}  // namespace detail

template <class T>
T load(Global<const T> p, SNV2_HERE) {
  emulator::access_global(p.address, sizeof(T), false, SNV2_SITE);
  return detail::read<T>(p.address);
}
template <class T>
void store(Global<T> p, T value, SNV2_HERE) {
  emulator::access_global(p.address, sizeof(T), true, SNV2_SITE);
  std::memcpy(p.address, &value, sizeof value);
}
template <class T>
T load(Shared<T> p, SNV2_HERE) {
  emulator::access_shared(p.address, sizeof(T), false, SNV2_SITE);
  return detail::read<T>(p.address);
}
template <class T>
void store(Shared<T> p, T value, SNV2_HERE) {
  emulator::access_shared(p.address, sizeof(T), true, SNV2_SITE);
  std::memcpy(p.address, &value, sizeof value);
}

template <class T>
void store_if(bool wanted, Shared<T> p, T value, SNV2_HERE) {
  if (wanted) {
    store(p, value, file, line);
  } else {
    emulator::skip_shared_store(sizeof(T), SNV2_SITE);
  }
}

template <int kOffset, class T>
void clear_unless_above_zero(float value, Address<T> p, SNV2_HERE) {
  store_if(value <= 0.0f, p + kOffset, T{}, file, line);
}

template <int N, class T>
Vector<T, N> load_vector(Global<const T> p, SNV2_HERE) {
  emulator::access_global(p.address, sizeof(T) * N, false, SNV2_SITE);
  return detail::read<Vector<T, N>>(p.address);
}
template <int N, int kOffset = 0, class T>
void store_vector(Global<T> p, const Vector<T, N>& value, SNV2_HERE) {
  emulator::access_global(p.address + kOffset, sizeof(T) * N, true, SNV2_SITE);
  std::memcpy(p.address + kOffset, &value, sizeof value);
}
template <int N, class T>
Vector<T, N> load_vector(Shared<T> p, SNV2_HERE) {
  emulator::access_shared(p.address, sizeof(T) * N, false, SNV2_SITE);
  return detail::read<Vector<T, N>>(p.address);
}
template <int N, class T>
void store_vector(Shared<T> p, const Vector<T, N>& value, SNV2_HERE) {
  emulator::access_shared(p.address, sizeof(T) * N, true, SNV2_SITE);
  std::memcpy(p.address, &value, sizeof value);
}

template <int N, int kOffset = 0, class T>
Vector<T, N> load_vector(Address<T> p, SNV2_HERE) {
  return load_vector<N>(static_cast<const Shared<T>&>(p + kOffset), file, line);
}
template <int N, int kOffset = 0, class T>
void store_vector(Address<T> p, const Vector<T, N>& value, SNV2_HERE) {
  store_vector<N>(static_cast<const Shared<T>&>(p + kOffset), value, file, line);
}

template <int N, class T>
void store_vector_if(bool wanted, Address<T> p, const Vector<T, N>& value, SNV2_HERE) {
  if (wanted) {
    store_vector<N>(static_cast<const Shared<T>&>(p), value, file, line);
  } else {
    emulator::skip_shared_store(sizeof value, SNV2_SITE);
  }
}

inline uint32_t word_of(uint16_t low, uint16_t high) { return low | uint32_t{high} << 16; }
inline uint32_t low_halves(uint32_t a, uint32_t b) { return (a & 0xffffu) | b << 16; }
inline uint32_t high_halves(uint32_t a, uint32_t b) { return a >> 16 | (b & 0xffff0000u); }

template <class T>
int misalignment(Global<T> p, int bytes) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(p.address) &
                          static_cast<uintptr_t>(bytes - 1));
}

// The copy is made at the wait, so that a missing wait shows.
template <int N, int kOffset = 0, class T>
void cp_async(Shared<T> to, Global<const T> from, SNV2_HERE) {
  constexpr int kBytes = N * sizeof(T);
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async copies 4, 8 or 16 bytes");
  emulator::cp_async(to.address + kOffset, from.address + kOffset, kBytes, SNV2_SITE);
}
inline void cp_async_commit() { emulator::cp_async_commit(); }
template <int Pending>
void cp_async_wait() {
  emulator::cp_async_wait(Pending);
}

// Barriers that count, and copies and stores that they wait for -----------------------------
//
// What is on its way arrives when its phase is complete, and is there for those who waited.

inline void barrier_init(Shared<uint64_t> barrier, int arrivals, SNV2_HERE) {
  emulator::barrier_init(barrier.address, arrivals, SNV2_SITE);
}
inline void fence_barrier_init() { emulator::fence_barrier_init(); }
inline void barrier_expect(Shared<uint64_t> barrier, int bytes, SNV2_HERE) {
  emulator::barrier_expect(barrier.address, bytes, SNV2_SITE);
}
inline void barrier_wait(Shared<uint64_t> barrier, int parity, SNV2_HERE) {
  emulator::barrier_wait(barrier.address, parity, SNV2_SITE);
}
inline void barrier_wait_cluster(Shared<uint64_t> barrier, int parity, SNV2_HERE) {
  emulator::barrier_wait(barrier.address, parity, SNV2_SITE);
}
inline void fence_bulk_copies() {}
template <class T>
void copy_bulk(Shared<T> to, Global<const T> from, int bytes, Shared<uint64_t> barrier, SNV2_HERE) {
  emulator::copy_bulk(to.address, from.address, bytes, barrier.address, SNV2_SITE);
}
template <int N, class T>
void store_async(Shared<T> to, Shared<uint64_t> barrier, int rank, const Vector<T, N>& value,
                 SNV2_HERE) {
  static_assert(sizeof value == 4 || sizeof value == 8 || sizeof value == 16,
                "st.async stores 4, 8 or 16 bytes");
  emulator::store_async(to.address, barrier.address, rank, &value, sizeof value, SNV2_SITE);
}

// Other threads ---------------------------------------------------------------------------

inline void sync_threads(SNV2_HERE) { emulator::barrier(emulator::Scope::kCta, SNV2_SITE); }
inline void sync_grid(SNV2_HERE) { emulator::barrier(emulator::Scope::kGrid, SNV2_SITE); }
inline void sync_cluster(SNV2_HERE) { emulator::barrier(emulator::Scope::kCluster, SNV2_SITE); }
inline void sync_cluster_reads(SNV2_HERE) {
  emulator::barrier(emulator::Scope::kClusterReads, SNV2_SITE);
}
inline void sync_warp(uint32_t mask = kFullMask, SNV2_HERE) {
  emulator::sync_warp(mask, SNV2_SITE);
}

namespace detail {
// A lane that is named as a source but is not in the mask has an undefined value: NaN.
template <class T>
T exchange(const char* name, T value, int source, uint32_t mask, emulator::Site site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  emulator::Exchange mine{0, source, 0};
  std::memcpy(&mine.value, &value, sizeof value);
  emulator::shuffle(name, mask, mine, site);
  return read<T>(&mine.result);
}
}  // namespace detail

template <class T>
T shuffle(T value, int lane, uint32_t mask = kFullMask, SNV2_HERE) {
  return detail::exchange("shuffle", value, lane & (kWarp - 1), mask, SNV2_SITE);
}
// All lanes ask, as where the first one is read.
inline float in_register(float value) { return value; }
inline int in_register(int value) { return value; }
inline int warp_uniform(int value, SNV2_HERE) { return shuffle(value, 0, kFullMask, file, line); }
template <class T>
T shuffle_xor(T value, int lanes, uint32_t mask = kFullMask, SNV2_HERE) {
  return detail::exchange("shuffle_xor", value, (emulator::lane() ^ lanes) & (kWarp - 1), mask,
                          SNV2_SITE);
}
template <class T>
T shuffle_up(T value, int lanes, uint32_t mask = kFullMask, SNV2_HERE) {
  const int source = emulator::lane() - lanes;
  return detail::exchange("shuffle_up", value, source < 0 ? emulator::lane() : source, mask,
                          SNV2_SITE);
}
template <class T>
T shuffle_down(T value, int lanes, uint32_t mask = kFullMask, SNV2_HERE) {
  const int source = emulator::lane() + lanes;
  return detail::exchange("shuffle_down", value, source >= kWarp ? emulator::lane() : source, mask,
                          SNV2_SITE);
}

inline void grid_dependency_wait() { emulator::grid_dependency_wait(); }
inline void grid_dependents_launch() {}

inline int cluster_rank() { return emulator::cluster_rank(); }

template <class T>
Shared<T> remote(Shared<T> p, int rank, SNV2_HERE) {
  return {reinterpret_cast<T*>(emulator::remote_shared_memory(p.address, rank, SNV2_SITE))};
}

// Conversions -----------------------------------------------------------------------------

inline float to_float(float value) { return value; }
inline float to_float(bfloat16_t value) { return emulator::bfloat16_to_float(value.bits); }
inline float to_float(half_t value) { return emulator::half_to_float(value.bits); }
inline void from_float(float value, float& out) { out = value; }
inline void from_float(float value, bfloat16_t& out) {
  out.bits = emulator::float_to_bfloat16(value);
}
inline void from_float(float value, half_t& out) { out.bits = emulator::float_to_half(value); }
template <class T>
void to_floats(uint32_t word, float (&values)[2]) {
  values[0] = to_float(T{static_cast<uint16_t>(word)});
  values[1] = to_float(T{static_cast<uint16_t>(word >> 16)});
}
template <class T>
float low_to_float(uint32_t word) {
  return to_float(T{static_cast<uint16_t>(word)});
}
template <class T>
float high_to_float(uint32_t word) {
  return to_float(T{static_cast<uint16_t>(word >> 16)});
}
template <class T>
Vector<T, 2> rounded_pair(float a, float b) {
  Vector<T, 2> pair;
  from_float(a, pair.values[0]);
  from_float(b, pair.values[1]);
  return pair;
}
inline uint32_t to_tf32(float value) { return emulator::float_to_tf32(value); }

inline float exponential(float x) { return std::exp(x); }
inline float reciprocal(float x) { return 1.0f / x; }

inline float max_nan(float a, float b) { return emulator::max_nan(a, b); }
inline float relu(float value) { return value < 0.0f ? 0.0f : value; }
template <class T>
Vector<T, 2> max_nan(const Vector<T, 2>& a, const Vector<T, 2>& b) {
  Vector<T, 2> out;
  for (int i = 0; i < 2; ++i) {
    from_float(max_nan(to_float(a.values[i]), to_float(b.values[i])), out.values[i]);
  }
  return out;
}

inline float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }

// Tensor cores ----------------------------------------------------------------------------

template <int Matrices, bool Transposed = false, int kOffset = 0, class T>
void ldmatrix(uint32_t (&d)[Matrices], Shared<T> row, SNV2_HERE) {
  static_assert(Matrices == 1 || Matrices == 2 || Matrices == 4);
  row = row + kOffset;
  emulator::MatrixRows mine{row.address, {}};
  if (emulator::lane() < 8 * Matrices) {
    emulator::access_shared(row.address, 16, false, SNV2_SITE);
  }
  emulator::ldmatrix(Matrices, Transposed, mine, SNV2_SITE);
  for (int m = 0; m < Matrices; ++m) d[m] = mine.d[m];
}

inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                    const float (&c)[4], SNV2_HERE) {
  for (int i = 0; i < 4; ++i) d[i] = c[i];
  emulator::Fragments mine{a, b, d};
  emulator::mma_f16(mine, SNV2_SITE);
}
inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                     const float (&c)[4], SNV2_HERE) {
  for (int i = 0; i < 4; ++i) d[i] = c[i];
  emulator::Fragments mine{a, b, d};
  emulator::mma_bf16(mine, SNV2_SITE);
}
inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                     const float (&c)[4], SNV2_HERE) {
  for (int i = 0; i < 4; ++i) d[i] = c[i];
  emulator::Fragments mine{a, b, d};
  emulator::mma_tf32(mine, SNV2_SITE);
}

}  // namespace snv2::SNV2_GPU
