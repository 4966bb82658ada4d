// Vectors of integers, for the kernels of networks whose maps are bytes: products of four planes
// for each lane, and the way from sums back to bytes.
//
// Sums are exact, so all instruction sets give the same ones, in any order.
#pragma once

#include "cpu/simd.h"

namespace snv2::cpu::SNV2_ISA::int8 {

// A vector of T as long as V.
template <class T, class V>
struct AsLong {
  typedef T type __attribute__((vector_size(sizeof(V))));
};

using Ints = int32_t __attribute__((vector_size(kVectorBytes)));
using HalfInts = int32_t __attribute__((vector_size(kHalfLanes * 4)));

// Rows of a panel of packed weights before the weights: multipliers, offsets, sums of weights.
inline constexpr int64_t kRowsBefore = rows_before_weights(DType::kUint8);

inline constexpr int kQuad = 4;  // pixels whose bytes are packed at a time
inline constexpr int64_t kQuadBytes = kQuad * kPanel;

SNV2_INLINE const uint8_t* bytes(const UInt8* x) { return reinterpret_cast<const uint8_t*>(x); }
SNV2_INLINE uint8_t* bytes(UInt8* y) { return reinterpret_cast<uint8_t*>(y); }

template <class V>
SNV2_INLINE V load_ints(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}

// Products -----------------------------------------------------------------------------------

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__) || defined(__aarch64__)

// Four planes of each lane, and four weights.
template <class V>
using Planes = V;
template <class V>
using Weights = V;

template <class V>
SNV2_INLINE Weights<V> weights(V w) {
  return w;
}

#if defined(__aarch64__)

// Less 128, since both factors are signed here: sums start with 128 times the sums of weights.
template <class V>
SNV2_INLINE Planes<V> planes(V x) {
  return (V)((VecBits)x ^ 0x80808080u);
}
inline constexpr int kPlaneShift = 7;

#if defined(__ARM_FEATURE_DOTPROD)
SNV2_INLINE void dot(Ints x, Ints w, Ints& sum) {
  sum = (Ints)vdotq_s32((int32x4_t)sum, (int8x16_t)x, (int8x16_t)w);
}
// The same of a word that is in the first lane alone.
SNV2_INLINE void dot(int8x8_t x, Ints w, Ints& sum) {
  sum = (Ints)vdotq_lane_s32((int32x4_t)sum, (int8x16_t)w, x, 0);
}
#else
// Sums of two products fit 16 bits, since no weight is below -127.
SNV2_INLINE void dot(Ints x, Ints w, Ints& sum) {
  const int8x16_t a = (int8x16_t)x, b = (int8x16_t)w;
  const int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b)), high = vmull_high_s8(a, b);
  sum = (Ints)vpadalq_s16((int32x4_t)sum, vpaddq_s16(low, high));
}
#endif

#else

template <class V>
SNV2_INLINE Planes<V> planes(V x) {
  return x;
}

#if defined(__AVX512VNNI__)
SNV2_INLINE void dot(Ints x, Ints w, Ints& sum) {
  sum = (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, (__m512i)w);
}
SNV2_INLINE void dot(HalfInts x, HalfInts w, HalfInts& sum) {
  sum = (HalfInts)_mm256_dpbusd_epi32((__m256i)sum, (__m256i)x, (__m256i)w);
}
#else
SNV2_INLINE void dot(Ints x, Ints w, Ints& sum) {
  sum = (Ints)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)x, (__m256i)w);
}
#endif

#endif

#else

// The same as two pairs of 16 bits, since sums of two products of bytes would saturate.
template <class V>
struct Pairs {
  V even;
  V odd;
};
template <class V>
using Planes = Pairs<V>;
template <class V>
using Weights = Pairs<V>;

template <class V>
SNV2_INLINE Planes<V> planes(V x) {
  using Shorts = typename AsLong<uint16_t, V>::type;
  return {x & 0x00ff00ff, (V)((Shorts)x >> 8)};
}
template <class V>
SNV2_INLINE Weights<V> weights(V w) {
  using Shorts = typename AsLong<int16_t, V>::type;
  const Shorts s = (Shorts)w;
  return {(V)((s << 8) >> 8), (V)(s >> 8)};
}

// Sums of products of the two 16-bit integers in each lane.
template <class V>
SNV2_INLINE V sum_of_pairs(V a, V b) {
#if defined(__AVX512BW__)
  if constexpr (sizeof(V) == 64) return (V)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(V) == 32) return (V)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#endif
#if defined(__SSE2__)
  if constexpr (sizeof(V) == 16) return (V)_mm_madd_epi16((__m128i)a, (__m128i)b);
#endif
  return ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
}

template <class V>
SNV2_INLINE void dot(const Planes<V>& x, const Weights<V>& w, V& sum) {
  sum += sum_of_pairs(x.even, w.even) + sum_of_pairs(x.odd, w.odd);
}

#endif

// What the sums of an output start with, by its row of sums of weights.
template <class V>
SNV2_INLINE V first_sums([[maybe_unused]] const float* sums_of_weights) {
#if defined(__aarch64__)
  return load_ints<V>(sums_of_weights) << kPlaneShift;
#else
  return V{};
#endif
}

#if defined(__ARM_FEATURE_DOTPROD)
// A word of a map in the first lane, from which a product takes it.
template <class V>
SNV2_INLINE int8x8_t word_at(const uint8_t* x) {
  uint32_t word;
  __builtin_memcpy(&word, x, sizeof word);
  return veor_s8(vcreate_s8(word), vdup_n_s8(-128));
}
#else
// A word of a map in all lanes. As an integer it would pass through general registers on its way.
template <class V>
SNV2_INLINE Planes<V> word_at(const uint8_t* x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) {
    return planes<V>((V)_mm512_broadcastss_ps(_mm_load_ss(reinterpret_cast<const float*>(x))));
  }
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(V) == 32) {
    return planes<V>((V)_mm256_broadcast_ss(reinterpret_cast<const float*>(x)));
  }
#endif
#if defined(__SSE2__)
  if constexpr (sizeof(V) == 16) {
    return planes<V>((V)_mm_load1_ps(reinterpret_cast<const float*>(x)));
  }
#endif
  int32_t word;
  __builtin_memcpy(&word, x, sizeof word);
  return planes<V>(V{} + word);
}
#endif
#if defined(__AVX512VNNI__)
// The lower half of a word that is in all lanes.
SNV2_INLINE HalfInts half_of(Ints word) { return (HalfInts)_mm512_castsi512_si256((__m512i)word); }
#endif

// Bytes --------------------------------------------------------------------------------------

template <class V>
SNV2_INLINE auto floats_of(V sum) {
  using Floats = typename AsLong<float, V>::type;
  return __builtin_convertvector(sum, Floats);
}

// round(v) in [0, 255], halves to even; of a NaN 0. What is added to it leaves it in the low bits.
template <class V>
SNV2_INLINE auto byte_values(V v) {
  using I = typename AsLong<int32_t, V>::type;
  constexpr float kRounder = 8388608.0f;  // 2^23
  const V positive = v > 0.0f ? v : V{};
  const V clamped = positive < 255.0f ? positive : V{} + 255.0f;
  return reinterpret_cast<I>(clamped + kRounder) & 0xff;
}

// Numbers of any size, as they come from a caller, where integers still tell them apart. A NaN
// stays.
SNV2_INLINE Vec bounded(Vec v) {
  const Vec most = Vec{} + 255.0f;
  return most < v ? most : v;
}

#if defined(__AVX512F__)

// Bytes of four pixels of a panel, of values below 2^31: in each 16 bytes those of four planes of
// all four pixels.
SNV2_INLINE __m512i packed(const Vec (&pixels)[kQuad]) {
  const auto rounded = [&](int p) SNV2_INLINED { return _mm512_cvtps_epi32(pixels[p]); };
  const __m512i low = _mm512_packs_epi32(rounded(0), rounded(1));
  const __m512i high = _mm512_packs_epi32(rounded(2), rounded(3));
  return _mm512_packus_epi16(low, high);
}

// A vector of each of the first `count` of four pixels, to y and every panel's width from there.
SNV2_INLINE void store_pixels(uint8_t* y, const Vec (&pixels)[kQuad], int count) {
  const __m512i by_pixel = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i bytes = _mm512_permutexvar_epi32(by_pixel, packed(pixels));
  if (count == kQuad) return _mm512_storeu_si512(y, bytes);
  _mm512_mask_storeu_epi32(y, static_cast<__mmask16>((1u << (4 * count)) - 1), bytes);
}

// In each 16 bytes a transposition of 4 x 4.
SNV2_INLINE __m512i transposed(__m512i bytes) {
  return _mm512_shuffle_epi8(bytes, _mm512_broadcast_i32x4(_mm_setr_epi8(
                                        0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15)));
}

// Four pixels of each plane of a vector.
SNV2_INLINE void store_quad(uint8_t* y, const Vec (&pixels)[kQuad]) {
  _mm512_storeu_si512(y, transposed(packed(pixels)));
}

// A panel of four pixels from a map; those from `count` on are zero.
SNV2_INLINE void copy_quad(uint8_t* y, const uint8_t* x, int64_t count) {
  const __mmask16 live = count >= kQuad ? 0xffff : static_cast<__mmask16>((1u << (4 * count)) - 1);
  const __m512i by_plane = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i bytes = _mm512_maskz_loadu_epi32(live, x);
  _mm512_storeu_si512(y, transposed(_mm512_permutexvar_epi32(by_plane, bytes)));
}

#else

SNV2_INLINE void store_pixels(uint8_t* y, const Vec (&pixels)[kQuad], int count) {
  using Bytes = uint8_t __attribute__((vector_size(kLanes)));
  for (int p = 0; p < count; ++p) {
    const Bytes bytes = __builtin_convertvector(byte_values(pixels[p]), Bytes);
    __builtin_memcpy(y + p * kPanel, &bytes, sizeof bytes);
  }
}

SNV2_INLINE void store_quad(uint8_t* y, const Vec (&pixels)[kQuad]) {
  const Ints quad = byte_values(pixels[0]) | byte_values(pixels[1]) << 8 |
                    byte_values(pixels[2]) << 16 | byte_values(pixels[3]) << 24;
  __builtin_memcpy(y, &quad, sizeof quad);
}

SNV2_INLINE void copy_quad(uint8_t* y, const uint8_t* x, int64_t count) {
  for (int64_t plane = 0; plane < kPanel; ++plane) {
    for (int64_t p = 0; p < kQuad; ++p) {
      y[plane * kQuad + p] = p < count ? x[p * kPanel + plane] : 0;
    }
  }
}

#endif

}  // namespace snv2::cpu::SNV2_ISA::int8
