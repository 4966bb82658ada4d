// Vectors of floats from a map's elements, and back: the conversions of convert.h on whole vectors.
#pragma once

#include <cstring>

#include "cpu/convert.h"

namespace snv2::cpu::SNV2_ISA {

template <class V>
inline constexpr int kLanesOf = sizeof(V) / sizeof(float);

// As many elements U as V has floats.
template <class U, class V>
struct LanesLike {
  typedef U type __attribute__((vector_size(kLanesOf<V> * sizeof(U))));
};
template <class V>
using Words = typename LanesLike<uint32_t, V>::type;
template <class V>
using Shorts = typename LanesLike<uint16_t, V>::type;

template <class V, class T>
SNV2_INLINE V load_raw(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// The larger of two; a v that does not compare, as NaN, passes through.
template <class V>
SNV2_INLINE V at_least(V lowest, V v) {
#if defined(__AVX512F__)
  if constexpr (kLanesOf<V> == 16) return _mm512_max_ps(lowest, v);
#endif
#if defined(__AVX2__)
  if constexpr (kLanesOf<V> == 8) return _mm256_max_ps(lowest, v);
#elif defined(__SSE2__)
  return _mm_max_ps(lowest, v);
#endif
  return lowest > v ? lowest : v;
}

// The bits of 16-bit elements, in the low halves of words.
template <class V>
SNV2_INLINE Words<V> words_of(V v, BFloat16) {
  const auto bits = reinterpret_cast<Words<V>>(v);
  const Words<V> rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return v != v ? (bits >> 16) | 0x40u : rounded;
}

template <class V>
SNV2_INLINE V floats_of(Shorts<V> v, BFloat16) {
  return reinterpret_cast<V>(__builtin_convertvector(v, Words<V>) << 16);
}

template <class V>
SNV2_INLINE Words<V> words_of(V v, Half) {
#if defined(__F16C__)
  Shorts<V> half;
#if defined(__AVX512F__)
  if constexpr (kLanesOf<V> == 16) {
    half = reinterpret_cast<Shorts<V>>(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  } else
#endif
    half = reinterpret_cast<Shorts<V>>(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  return __builtin_convertvector(half, Words<V>);
#else
  const auto bits = reinterpret_cast<Words<V>>(v);
  const Words<V> sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  const auto small = reinterpret_cast<Words<V>>(reinterpret_cast<V>(magnitude) + 0.5f);
  Words<V> half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  half = magnitude < 0x38800000u ? small - 0x3f000000u : half;
  half = magnitude >= 0x477ff000u ? Words<V>{} + 0x7c00u : half;
  half = magnitude > 0x7f800000u ? Words<V>{} + 0x7e00u : half;
  return sign | half;
#endif
}

template <class V>
SNV2_INLINE V floats_of(Shorts<V> v, Half) {
#if defined(__F16C__)
#if defined(__AVX512F__)
  if constexpr (kLanesOf<V> == 16)
    return _mm512_cvtph_ps(reinterpret_cast<__m256i>(v));
  else
#endif
    return _mm256_cvtph_ps(reinterpret_cast<__m128i>(v));
#else
  const Words<V> bits = __builtin_convertvector(v, Words<V>);
  const Words<V> sign = (bits & 0x8000u) << 16, magnitude = (bits & 0x7fffu) << 13;
  const auto scaled = reinterpret_cast<Words<V>>(reinterpret_cast<V>(magnitude) * 0x1p112f);
  return reinterpret_cast<V>(sign | (magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : scaled));
#endif
}

template <class V, class T>
SNV2_INLINE V load_floats(const T* p) {
  if constexpr (std::is_same_v<T, float>) {
    return load<V>(p);
  } else {
    return floats_of<V>(load_raw<Shorts<V>>(p), T{});
  }
}

template <class V, class T>
SNV2_INLINE void store_floats(T* p, V v) {
  if constexpr (std::is_same_v<T, float>) {
    store(p, v);
  } else {
    const auto shorts = __builtin_convertvector(words_of(v, T{}), Shorts<V>);
    std::memcpy(p, &shorts, sizeof shorts);
  }
}

// The first `count` lanes, the others zero.
template <class V, class T>
SNV2_INLINE V load_floats(const T* p, int64_t count) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  const uint32_t mask = (1u << count) - 1;
  constexpr bool kWide = kLanesOf<V> == 16;
  if constexpr (kWide && sizeof(T) == 4) return _mm512_maskz_loadu_ps(mask, p);
  if constexpr (!kWide && sizeof(T) == 4) return _mm256_maskz_loadu_ps(mask, p);
  if constexpr (kWide && sizeof(T) == 2) {
    return floats_of<V>(reinterpret_cast<Shorts<V>>(_mm256_maskz_loadu_epi16(mask, p)), T{});
  }
  if constexpr (!kWide && sizeof(T) == 2) {
    return floats_of<V>(reinterpret_cast<Shorts<V>>(_mm_maskz_loadu_epi16(mask, p)), T{});
  }
#endif
  T lanes[kLanesOf<V>] = {};
  std::memcpy(lanes, p, static_cast<size_t>(count) * sizeof(T));
  return load_floats<V>(lanes);
}

template <class V, class T>
SNV2_INLINE void store_floats(T* p, V v, int64_t count) {
  T lanes[kLanesOf<V>];
  store_floats(lanes, v);
  std::memcpy(p, lanes, static_cast<size_t>(count) * sizeof(T));
}

template <class V, int... kIndices>
SNV2_INLINE V shuffle(V a, V b, std::integer_sequence<int, kIndices...>) {
  return __builtin_shufflevector(a, b, kIndices...);
}
template <int kFirst, int... kIndices>
constexpr auto plus(std::integer_sequence<int, kIndices...>) {
  return std::integer_sequence<int, kFirst + kIndices...>{};
}
// a[i / 2] at even places, b[i / 2] at odd ones.
template <int kCount, int... kIndices>
constexpr auto zipped(std::integer_sequence<int, kIndices...>) {
  return std::integer_sequence<int, (kIndices / 2 + kIndices % 2 * kCount)...>{};
}

template <class V>
SNV2_INLINE Words<V> lane_numbers() {
  Words<V> numbers;
  for (int i = 0; i < kLanesOf<V>; ++i) numbers[i] = static_cast<uint32_t>(i);
  return numbers;
}

// out[2 * i] = a[i], out[2 * i + 1] = b[i]
template <class T, class V>
SNV2_INLINE void store_zipped(T* out, const T* a, V b) {
  if constexpr (std::is_same_v<T, float>) {
    const V v = load<V>(a);
    constexpr auto kPlaces = std::make_integer_sequence<int, kLanesOf<V>>{};
    constexpr auto kPairs = zipped<kLanesOf<V>>(kPlaces);
    store(out, shuffle(v, b, kPairs));
    store(out + kLanesOf<V>, shuffle(v, b, plus<kLanesOf<V> / 2>(kPairs)));
  } else {
    const auto low = __builtin_convertvector(load_raw<Shorts<V>>(a), Words<V>);
    const Words<V> pairs = low | words_of(b, T{}) << 16;
    std::memcpy(out, &pairs, sizeof pairs);
  }
}

// v[i - 1], v[i + 1], zeros where there are none.
template <class V>
SNV2_INLINE V lane_before(V v) {
  return shuffle(V{}, v, plus<kLanesOf<V> - 1>(std::make_integer_sequence<int, kLanesOf<V>>{}));
}
template <class V>
SNV2_INLINE V lane_after(V v) {
  return shuffle(v, V{}, plus<1>(std::make_integer_sequence<int, kLanesOf<V>>{}));
}

// Calls f(V{}, first) for vectors that together cover [0, extent), the last of which may overlap
// the one before; for an extent below all vectors once, for the shortest.
template <class F>
SNV2_INLINE void for_each_strip(int64_t extent, const F& f) {
  const auto cover = [&](auto v) SNV2_INLINED {
    constexpr int64_t kCount = kLanesOf<decltype(v)>;
    int64_t i = 0;
    for (; i + kCount < extent; i += kCount) f(v, i);
    f(v, extent > kCount ? extent - kCount : 0);
  };
  if (extent >= kLanes) {
    cover(Vec{});
  } else {
    cover(HalfVec{});
  }
}

// Consecutive elements as floats, and back.
template <class T>
SNV2_INLINE void read_floats(const T* x, int64_t n, float* y) {
  if (n < kHalfLanes) {
    for (int64_t i = 0; i < n; ++i) y[i] = to_float(x[i]);
    return;
  }
  for_each_strip(
      n, [&](auto v, int64_t i) SNV2_INLINED { store(y + i, load_floats<decltype(v)>(x + i)); });
}
template <class T>
SNV2_INLINE void write_floats(const float* x, int64_t n, T* y) {
  if (n < kHalfLanes) {
    for (int64_t i = 0; i < n; ++i) from_float(x[i], y[i]);
    return;
  }
  for_each_strip(
      n, [&](auto v, int64_t i) SNV2_INLINED { store_floats(y + i, load<decltype(v)>(x + i)); });
}

}  // namespace snv2::cpu::SNV2_ISA
