// Vectors of elements of a map, and of floats made of them: the conversions of convert.h on whole
// vectors.
#pragma once

#include <cstring>
#include <type_traits>

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
// As many elements T, unconverted.
template <class T, class V>
using Raw = std::conditional_t<std::is_same_v<T, float>, V, Shorts<V>>;

template <class V>
SNV2_INLINE V floats_of(V v, float) {
  return v;
}
template <class V>
SNV2_INLINE V floats_of(Shorts<V> v, BFloat16) {
  return reinterpret_cast<V>(__builtin_convertvector(v, Words<V>) << 16);
}
template <class V>
SNV2_INLINE V floats_of(Shorts<V> v, Half) {
#if defined(__F16C__)
#if defined(__AVX512F__)
  if constexpr (kLanesOf<V> == 16) return _mm512_cvtph_ps(reinterpret_cast<__m256i>(v));
#endif
  if constexpr (kLanesOf<V> == 8) return _mm256_cvtph_ps(reinterpret_cast<__m128i>(v));
#else
  const auto bits = __builtin_convertvector(v, Words<V>);
  const Words<V> sign = (bits & 0x8000u) << 16, magnitude = (bits & 0x7fffu) << 13;
  const auto scaled = reinterpret_cast<Words<V>>(reinterpret_cast<V>(magnitude) * 0x1p112f);
  const Words<V> special = magnitude | 0x7f800000u;
  return reinterpret_cast<V>(sign | (magnitude >= 0x0f800000u ? special : scaled));
#endif
}

template <class V>
SNV2_INLINE V raw_of(V v, float) {
  return v;
}
// Rounded, the high halves of words.
template <class V>
SNV2_INLINE Words<V> high_halves(V v, BFloat16) {
  const auto bits = reinterpret_cast<Words<V>>(v);
  const Words<V> rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  return v != v ? bits | 0x400000u : rounded;
}
template <class V>
SNV2_INLINE Shorts<V> raw_of(V v, BFloat16) {
  return __builtin_convertvector(high_halves(v, BFloat16{}) >> 16, Shorts<V>);
}
template <class V>
SNV2_INLINE Shorts<V> raw_of(V v, Half) {
#if defined(__F16C__)
#if defined(__AVX512F__)
  if constexpr (kLanesOf<V> == 16) {
    return reinterpret_cast<Shorts<V>>(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
#endif
  if constexpr (kLanesOf<V> == 8) {
    return reinterpret_cast<Shorts<V>>(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
#else
  const auto bits = reinterpret_cast<Words<V>>(v);
  const Words<V> sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  const auto subnormal = reinterpret_cast<Words<V>>(reinterpret_cast<V>(magnitude) + 0.5f);
  Words<V> half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  half = magnitude < 0x38800000u ? subnormal - 0x3f000000u : half;
  half = magnitude >= 0x477ff000u ? Words<V>{} + 0x7c00u : half;
  half = magnitude > 0x7f800000u ? Words<V>{} + 0x7e00u : half;
  return __builtin_convertvector(sign | half, Shorts<V>);
#endif
}

// From and to any address.
template <class V, class T>
SNV2_INLINE Raw<T, V> load_raw(const T* p) {
  Raw<T, V> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class R, class T>
SNV2_INLINE void store_raw(T* p, R v) {
  std::memcpy(p, &v, sizeof v);
}
template <class V, class T>
SNV2_INLINE V load_floats(const T* p) {
  return floats_of<V>(load_raw<V>(p), T{});
}
template <class V, class T>
SNV2_INLINE void store_floats(T* p, V v) {
  store_raw(p, raw_of(v, T{}));
}

// The first `count` lanes, the others zero.
template <class V, class T>
SNV2_INLINE V load_floats(const T* p, int64_t count) {
  if (count == kLanesOf<V>) return load_floats<V>(p);
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
  if (count == kLanesOf<V>) return store_floats(p, v);
  T lanes[kLanesOf<V>];
  store_floats(lanes, v);
  std::memcpy(p, lanes, static_cast<size_t>(count) * sizeof(T));
}

template <class V>
SNV2_INLINE Words<V> lane_numbers() {
  Words<V> numbers;
  for (int i = 0; i < kLanesOf<V>; ++i) numbers[i] = static_cast<uint32_t>(i);
  return numbers;
}

// kFirst + kStep * i for each i
template <int kFirst, int kStep, int... kIndices>
constexpr auto places(std::integer_sequence<int, kIndices...>) {
  return std::integer_sequence<int, (kFirst + kStep * kIndices)...>{};
}
// kFirst + i / 2 at even places, kCount more at odd ones
template <int kFirst, int kCount, int... kIndices>
constexpr auto paired_places(std::integer_sequence<int, kIndices...>) {
  return std::integer_sequence<int, (kFirst + kIndices / 2 + kIndices % 2 * kCount)...>{};
}
template <class V, int... kIndices>
SNV2_INLINE V shuffle(V a, V b, std::integer_sequence<int, kIndices...>) {
  return __builtin_shufflevector(a, b, kIndices...);
}
template <class V>
using LaneSequence = std::make_integer_sequence<int, kLanesOf<V>>;

// v[i - 1] and v[i + 1], zero where there is none.
template <class V>
SNV2_INLINE V lane_before(V v) {
  return shuffle(V{}, v, places<kLanesOf<V> - 1, 1>(LaneSequence<V>{}));
}
template <class V>
SNV2_INLINE V lane_after(V v) {
  return shuffle(v, V{}, places<1, 1>(LaneSequence<V>{}));
}

// p[2 * i] = even[i], p[2 * i + 1] = odd[i]
template <class V, class T>
SNV2_INLINE void store_pairs(T* p, Raw<T, V> even, Raw<T, V> odd) {
  constexpr int kCount = kLanesOf<V>;
  if constexpr (sizeof(T) == 4) {
    store_raw(p, shuffle(even, odd, paired_places<0, kCount>(LaneSequence<V>{})));
    store_raw(p + kCount, shuffle(even, odd, paired_places<kCount / 2, kCount>(LaneSequence<V>{})));
  } else {
    store_raw(p, __builtin_convertvector(even, Words<V>) | __builtin_convertvector(odd, Words<V>)
                                                               << 16);
  }
}
// The same, of floats at odd places.
template <class T, class V>
SNV2_INLINE void store_pairs_of(T* p, Raw<T, V> even, V odd) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    store_raw(p, __builtin_convertvector(even, Words<V>) | (high_halves(odd, T{}) & 0xffff0000u));
  } else {
    store_pairs<V>(p, even, raw_of(odd, T{}));
  }
}
template <class V, class T>
SNV2_INLINE void load_pairs(const T* p, Raw<T, V>& even, Raw<T, V>& odd) {
  if constexpr (sizeof(T) == 4) {
    const V low = load_raw<V>(p), high = load_raw<V>(p + kLanesOf<V>);
    even = shuffle(low, high, places<0, 2>(LaneSequence<V>{}));
    odd = shuffle(low, high, places<1, 2>(LaneSequence<V>{}));
  } else {
    Words<V> pairs;
    std::memcpy(&pairs, p, sizeof pairs);
    even = __builtin_convertvector(pairs & 0xffffu, Shorts<V>);
    odd = __builtin_convertvector(pairs >> 16, Shorts<V>);
  }
}

// The larger of two; a v that does not compare, which is NaN, passes through.
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

// Calls f(V{}, first) for vectors that together cover [0, extent), the last of which may overlap
// the one before; for an extent below all vectors once, for the shortest.
template <class Longest = Vec, class F>
SNV2_INLINE void for_each_strip(int64_t extent, const F& f) {
  const auto cover = [&](auto v) SNV2_INLINED {
    constexpr int64_t kCount = kLanesOf<decltype(v)>;
    int64_t i = 0;
    for (; i + kCount < extent; i += kCount) f(v, i);
    f(v, extent > kCount ? extent - kCount : 0);
  };
  if (extent >= kLanesOf<Longest>) {
    cover(Longest{});
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
