// Vectors of float in the compiler's own vector types: the same source gives AVX-512, AVX2 and
// SSE2 or NEON code, depending on the flags it is compiled with.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "cpu/kernels.h"

#ifndef SNV2_ISA
#error "SNV2_ISA names the namespace of this instruction set"
#endif

// Of the maps inside networks.
#ifndef SNV2_ELEMENT
#define SNV2_ELEMENT float
#endif

// Maps may have bfloat16 where it is multiplied, a pair for each lane.
#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define SNV2_BFLOAT16_MAPS
#endif

#define SNV2_INLINE inline __attribute__((always_inline))
#define SNV2_INLINED __attribute__((always_inline))  // of a lambda

namespace snv2::cpu::SNV2_ISA {

using Element = SNV2_ELEMENT;
inline constexpr int kWordPlanes = sizeof(float) / sizeof(Element);

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

inline constexpr int kLanes = kVectorBytes / 4;
inline constexpr int kVecs = kPanel / kLanes;  // vectors in a panel
static_assert(kVecs * kLanes == kPanel);

using Vec = float __attribute__((vector_size(kVectorBytes)));

// Half a panel: of the widest vectors a half one, else half as many.
inline constexpr int kHalfVecs = kVecs == 1 ? 1 : kVecs / 2;
inline constexpr int kHalfLanes = kPanel / 2 / kHalfVecs;
using HalfVec = float __attribute__((vector_size(kHalfLanes * 4)));

// From and to any address.
template <class V = Vec>
SNV2_INLINE V load(const float* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}
template <class V>
SNV2_INLINE void store(float* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}

template <class V>
SNV2_INLINE V load_as(const float* p) {
  return load<V>(p);
}

// One of kHalfVecs vectors of half a panel, and zeros in its place in the other half.
SNV2_INLINE void store_half(float* p, HalfVec v) {
#if defined(__AVX512F__)
  store(p, _mm512_zextps256_ps512(v));
#else
  store(p, v);
  store(p + kPanel / 2, HalfVec{});
#endif
}

#if defined(__AVX512BF16__)
SNV2_INLINE Vec load(const BFloat16* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
template <class V>
SNV2_INLINE V load_as(const BFloat16* p) {
  if constexpr (std::is_same_v<V, Vec>) {
    return load(p);
  } else {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
}
// Round to nearest even; a NaN stays one.
SNV2_INLINE void store(BFloat16* p, Vec v) {
  const __m256bh rounded = _mm512_cvtneps_pbh(v);
  __builtin_memcpy(p, &rounded, sizeof rounded);
}
SNV2_INLINE void store_half(BFloat16* p, HalfVec v) { store(p, _mm512_zextps256_ps512(v)); }
#elif defined(SNV2_BFLOAT16_MAPS)
SNV2_INLINE Vec load(const BFloat16* p) {
  bfloat16x4_t narrow;
  __builtin_memcpy(&narrow, p, sizeof narrow);
  return (Vec)vcvt_f32_bf16(narrow);
}
template <class V>
SNV2_INLINE V load_as(const BFloat16* p) {
  return load(p);
}
// Round to nearest even; a NaN stays one.
SNV2_INLINE void store(BFloat16* p, Vec v) {
  const bfloat16x4_t rounded = vcvt_bf16_f32((float32x4_t)v);
  __builtin_memcpy(p, &rounded, sizeof rounded);
}
SNV2_INLINE void store_half(BFloat16* p, HalfVec v) {
  store(p, v);
  store(p + kPanel / 2, HalfVec{});
}
#endif

// For v that is never -0, which max_relu relies on. A NaN passes through, as in torch.relu: the
// maximum of x86 is its second operand where the two do not compare.
SNV2_INLINE Vec relu(Vec v) {
#if defined(__AVX512F__)
  return _mm512_max_ps(Vec{}, v);
#elif defined(__AVX2__)
  return _mm256_max_ps(Vec{}, v);
#elif defined(__SSE2__)
  return _mm_max_ps(Vec{}, v);
#else
  return Vec{} >= v ? Vec{} : v;
#endif
}
#if defined(__AVX512F__)
SNV2_INLINE HalfVec relu(HalfVec v) { return _mm256_max_ps(HalfVec{}, v); }
#endif

// f(0), ..., f(n - 1), each index a constant: arrays that only such indices reach are registers.
template <int... kIndices, class F>
SNV2_INLINE void unroll(std::integer_sequence<int, kIndices...>, const F& f) {
  (f(std::integral_constant<int, kIndices>{}), ...);
}
template <int kCount, class F>
SNV2_INLINE void unroll(const F& f) {
  unroll(std::make_integer_sequence<int, kCount>{}, f);
}

using VecBits = uint32_t __attribute__((vector_size(kVectorBytes)));

// Larger of two results of relu. As unsigned integers they order like floats, and a NaN of
// either sign is above all numbers, so that it passes through as in torch's max pooling.
SNV2_INLINE Vec max_relu(Vec a, Vec b) {
  const VecBits x = reinterpret_cast<VecBits>(a);
  const VecBits y = reinterpret_cast<VecBits>(b);
  return reinterpret_cast<Vec>(x > y ? x : y);
}

// Larger of any two; a NaN passes through.
SNV2_INLINE Vec max_any(Vec a, Vec b) { return ((a > b) | (a != a)) ? a : b; }

// e^v for v that is not above zero, to about an ulp, or zero where that is no normal number. A NaN
// passes through.
SNV2_INLINE Vec exp_negative(Vec v) {
  constexpr float kLowest = -87.33f;
  // 2^23 * 1.5: what is added to it is rounded to an integer, in the low bits.
  constexpr float kRounder = 12582912.0f;
  const Vec x = v < kLowest ? Vec{} + kLowest : v;
  const Vec shifted = x * 1.44269504f + kRounder;
  const Vec n = shifted - kRounder;
  // ln 2 in two parts, of which n times the first is exact
  const Vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const VecBits exponent = reinterpret_cast<VecBits>(shifted) + 127u;
  const Vec power = reinterpret_cast<Vec>(exponent << 23);
  return v < kLowest ? Vec{} : p * power;
}

}  // namespace snv2::cpu::SNV2_ISA
