// Bodies of isa.h for the emulator.
#pragma once

#include <cmath>
#include <cstring>

#include "emulator/machine.h"

#define SNV2_DEVICE inline
#define __global__
#define __launch_bounds__(...)
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

template <int N, class T>
Vector<T, N> load_vector(Global<const T> p, SNV2_HERE) {
  emulator::access_global(p.address, sizeof(T) * N, false, SNV2_SITE);
  return detail::read<Vector<T, N>>(p.address);
}
template <int N, class T>
void store_vector(Global<T> p, const Vector<T, N>& value, SNV2_HERE) {
  emulator::access_global(p.address, sizeof(T) * N, true, SNV2_SITE);
  std::memcpy(p.address, &value, sizeof value);
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

template <class T>
int misalignment(Global<T> p, int bytes) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(p.address) &
                          static_cast<uintptr_t>(bytes - 1));
}

// The copy is made at the wait, so that a missing wait shows.
template <int N, class T>
void cp_async(Shared<T> to, Global<const T> from, SNV2_HERE) {
  constexpr int kBytes = N * sizeof(T);
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async copies 4, 8 or 16 bytes");
  emulator::cp_async(to.address, from.address, kBytes, SNV2_SITE);
}
inline void cp_async_commit() { emulator::cp_async_commit(); }
template <int Pending>
void cp_async_wait() {
  emulator::cp_async_wait(Pending);
}

// Other threads ---------------------------------------------------------------------------

inline void sync_threads(SNV2_HERE) { emulator::barrier(emulator::Scope::kCta, SNV2_SITE); }
inline void sync_grid(SNV2_HERE) { emulator::barrier(emulator::Scope::kGrid, SNV2_SITE); }
inline void sync_cluster(SNV2_HERE) { emulator::barrier(emulator::Scope::kCluster, SNV2_SITE); }
inline void sync_warp(uint32_t mask = kFullMask, SNV2_HERE) {
  emulator::collective("sync_warp", mask, nullptr, [](void* const*, uint32_t) {}, SNV2_SITE);
}

namespace detail {
template <class T>
struct Exchange {
  T value;
  int source;
  T result;
};
// A lane that is named as a source but is not in the mask has an undefined value: NaN.
template <class T>
T exchange(const char* name, T value, int source, uint32_t mask, emulator::Site site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  Exchange<T> mine{value, source, {}};
  emulator::collective(
      name, mask, &mine,
      [](void* const* payloads, uint32_t mask) {
        for (int lane = 0; lane < kWarp; ++lane) {
          if (!(mask >> lane & 1)) continue;
          auto& to = *static_cast<Exchange<T>*>(payloads[lane]);
          if (mask >> to.source & 1) {
            to.result = static_cast<Exchange<T>*>(payloads[to.source])->value;
          } else {
            std::memset(&to.result, 0xff, sizeof(T));
          }
        }
      },
      site);
  return mine.result;
}
}  // namespace detail

template <class T>
T shuffle(T value, int lane, uint32_t mask = kFullMask, SNV2_HERE) {
  return detail::exchange("shuffle", value, lane & (kWarp - 1), mask, SNV2_SITE);
}
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

namespace detail {
inline uint32_t bits_of(float value) { return read<uint32_t>(&value); }
inline float from_bits(uint32_t bits) { return read<float>(&bits); }
}  // namespace detail

inline float to_float(float value) { return value; }
inline float to_float(bfloat16_t value) { return detail::from_bits(uint32_t{value.bits} << 16); }
inline float to_float(half_t value) {
  const uint32_t sign = uint32_t{value.bits & 0x8000u} << 16;
  const uint32_t magnitude = uint32_t{value.bits & 0x7fffu} << 13;
  if (magnitude >= 0x0f800000u) return detail::from_bits(sign | magnitude | 0x7f800000u);
  return detail::from_bits(sign | detail::bits_of(std::ldexp(detail::from_bits(magnitude), 112)));
}
inline void from_float(float value, float& out) { out = value; }
// The GPU gives one NaN for all NaNs.
inline void from_float(float value, bfloat16_t& out) {
  const uint32_t bits = detail::bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out.bits = static_cast<uint16_t>(value != value ? 0x7fffu : rounded);
}
inline void from_float(float value, half_t& out) {
  const uint32_t sign = (detail::bits_of(value) >> 16) & 0x8000u;
  const uint32_t magnitude = detail::bits_of(value) & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    out.bits = 0x7fffu;
    return;
  }
  uint32_t half;
  if (magnitude >= 0x477ff000u) {  // rounds past 65504
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: let the FPU round at 2^-24
    half = detail::bits_of(detail::from_bits(magnitude) + 0.5f) - detail::bits_of(0.5f);
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  out.bits = static_cast<uint16_t>(sign | half);
}
inline uint32_t to_tf32(float value) {
  const uint32_t bits = detail::bits_of(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffffffu;
  if ((bits & 0x7fffffffu) == 0x7f800000u) return bits;
  return (bits + 0x1000u) & 0xffffe000u;
}

inline float relu(float value) { return value < 0.0f ? 0.0f : value; }

// Tensor cores ----------------------------------------------------------------------------

namespace detail {

struct MatrixRows {
  const unsigned char* row;
  uint32_t d[4];
};

template <int Matrices, bool Transposed>
void ldmatrix(void* const* payloads, uint32_t) {
  for (int m = 0; m < Matrices; ++m) {
    uint16_t matrix[8][8];
    for (int r = 0; r < 8; ++r) {
      std::memcpy(matrix[r], static_cast<MatrixRows*>(payloads[8 * m + r])->row, 16);
    }
    for (int lane = 0; lane < kWarp; ++lane) {
      const int i = lane / 4, j = lane % 4 * 2;
      const uint32_t low = Transposed ? matrix[j][i] : matrix[i][j];
      const uint32_t high = Transposed ? matrix[j + 1][i] : matrix[i][j + 1];
      static_cast<MatrixRows*>(payloads[lane])->d[m] = low | high << 16;
    }
  }
}

struct Fragments {
  const uint32_t* a;
  const uint32_t* b;
  float* d;
};

template <class T>
float element(uint32_t word, int i) {
  return to_float(T{static_cast<uint16_t>(word >> (16 * i))});
}

// D[16][8] += A[16][K] B[K][8]; products are exact in double, and the sum is rounded once.
template <int K>
void multiply(const float (&a)[16][K], const float (&b)[K][8], void* const* payloads) {
  for (int lane = 0; lane < kWarp; ++lane) {
    float* d = static_cast<Fragments*>(payloads[lane])->d;
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      double sum = d[i];
      for (int k = 0; k < K; ++k) sum += double{a[row][k]} * b[k][column];
      d[i] = static_cast<float>(sum);
    }
  }
}

template <class T>
void mma_16(void* const* payloads, uint32_t) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const Fragments& f = *static_cast<Fragments*>(payloads[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 2; ++i) {
      for (int r = 0; r < 4; ++r) {
        a[g + r % 2 * 8][2 * t + i + r / 2 * 8] = element<T>(f.a[r], i);
      }
      for (int r = 0; r < 2; ++r) b[2 * t + i + r * 8][g] = element<T>(f.b[r], i);
    }
  }
  multiply(a, b, payloads);
}

inline void mma_tf32(void* const* payloads, uint32_t) {
  float a[16][8], b[8][8];
  const auto tf32 = [](uint32_t bits) { return from_bits(bits & 0xffffe000u); };
  for (int lane = 0; lane < kWarp; ++lane) {
    const Fragments& f = *static_cast<Fragments*>(payloads[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int r = 0; r < 4; ++r) a[g + r % 2 * 8][t + r / 2 * 4] = tf32(f.a[r]);
    for (int r = 0; r < 2; ++r) b[t + r * 4][g] = tf32(f.b[r]);
  }
  multiply(a, b, payloads);
}

inline void mma(const char* name, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                emulator::Combine combine, emulator::Site site) {
  Fragments mine{a, b, d};
  emulator::collective(name, kFullMask, &mine, combine, site);
  emulator::count_mma();
}

}  // namespace detail

template <int Matrices, bool Transposed = false, class T>
void ldmatrix(uint32_t (&d)[Matrices], Shared<T> row, SNV2_HERE) {
  detail::MatrixRows mine{reinterpret_cast<const unsigned char*>(row.address), {}};
  if (emulator::lane() < 8 * Matrices) {
    emulator::access_shared(row.address, 16, false, SNV2_SITE);
  }
  emulator::collective("ldmatrix", kFullMask, &mine, detail::ldmatrix<Matrices, Transposed>,
                       SNV2_SITE);
  for (int m = 0; m < Matrices; ++m) d[m] = mine.d[m];
}

inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], SNV2_HERE) {
  detail::mma("mma_f16", d, a, b, detail::mma_16<half_t>, SNV2_SITE);
}
inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], SNV2_HERE) {
  detail::mma("mma_bf16", d, a, b, detail::mma_16<bfloat16_t>, SNV2_SITE);
}
inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], SNV2_HERE) {
  detail::mma("mma_tf32", d, a, b, detail::mma_tf32, SNV2_SITE);
}

}  // namespace snv2::SNV2_GPU
