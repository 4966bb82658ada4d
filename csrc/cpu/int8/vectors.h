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
#define SNV2_DOTS_OF_BYTES

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
  V first;
  V second;
};
template <class V>
using Planes = Pairs<V>;
template <class V>
using Weights = Pairs<V>;

// Planes and weights at even places, and those at odd ones.
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
  sum += sum_of_pairs(x.first, w.first) + sum_of_pairs(x.second, w.second);
}

#if defined(__AVX2__)
#define SNV2_PAIRS_OF_BYTES

// Sums of products of four unsigned and four signed bytes in each lane, where those of neighbours
// fit 16 bits, and whether they do whatever the unsigned bytes are: it saturates beyond, and with
// 255 first.
#if defined(__AVX512BW__)
SNV2_INLINE Ints sum_of_bytes(Ints x, Ints w) {
  return (Ints)_mm512_madd_epi16(_mm512_maddubs_epi16((__m512i)x, (__m512i)w),
                                 _mm512_set1_epi16(1));
}
SNV2_INLINE bool pairs_fit(Ints w) {
  const __m512i most = _mm512_maddubs_epi16(_mm512_set1_epi8(-1), (__m512i)w);
  return (_mm512_cmpeq_epi16_mask(most, _mm512_set1_epi16(32767)) |
          _mm512_cmpeq_epi16_mask(most, _mm512_set1_epi16(-32768))) == 0;
}
#else
SNV2_INLINE Ints sum_of_bytes(Ints x, Ints w) {
  return (Ints)_mm256_madd_epi16(_mm256_maddubs_epi16((__m256i)x, (__m256i)w),
                                 _mm256_set1_epi16(1));
}
SNV2_INLINE bool pairs_fit(Ints w) {
  const __m256i most = _mm256_maddubs_epi16(_mm256_set1_epi8(-1), (__m256i)w);
  const __m256i high = _mm256_cmpeq_epi16(most, _mm256_set1_epi16(32767));
  const __m256i low = _mm256_cmpeq_epi16(most, _mm256_set1_epi16(-32768));
  const __m256i beyond = _mm256_or_si256(high, low);
  return _mm256_testz_si256(beyond, beyond) != 0;
}
#endif

// Half of each signed byte, rounded down. It and the rest are in [-64, 64], so pairs of them fit.
SNV2_INLINE Ints halved(Ints w) {
  using Bits = typename AsLong<uint32_t, Ints>::type;
  using Bytes = typename AsLong<int8_t, Ints>::type;
  const Bits above = ((Bits)w ^ 0x80808080u) >> 1 & 0x7f7f7f7fu;  // 64 more
  return (Ints)((Bytes)above - 64);
}
SNV2_INLINE Ints difference_of_bytes(Ints a, Ints b) {
  using Bytes = typename AsLong<int8_t, Ints>::type;
  return (Ints)((Bytes)a - (Bytes)b);
}
#endif

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

// Bytes as floats.
SNV2_INLINE Vec floats_of_bytes(const uint8_t* x) {
#if defined(__AVX512F__)
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(load_ints<__m128i>(x)));
#elif defined(__AVX2__)
  return _mm256_cvtepi32_ps(
      _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x))));
#else
  using Bytes = uint8_t __attribute__((vector_size(kLanes)));
  return __builtin_convertvector(__builtin_convertvector(load_ints<Bytes>(x), Ints), Vec);
#endif
}

// A word in all lanes. As an integer it would pass through general registers on its way.
template <class V>
SNV2_INLINE V broadcast_word(const uint8_t* x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) {
    return (V)_mm512_broadcastss_ps(_mm_load_ss(reinterpret_cast<const float*>(x)));
  }
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(V) == 32) return (V)_mm256_broadcast_ss(reinterpret_cast<const float*>(x));
#endif
#if defined(__SSE2__)
  if constexpr (sizeof(V) == 16) return (V)_mm_load1_ps(reinterpret_cast<const float*>(x));
#endif
  int32_t word;
  __builtin_memcpy(&word, x, sizeof word);
  return V{} + word;
}

// A word of a map as a product takes it.
#if defined(__ARM_FEATURE_DOTPROD)
template <class V>
SNV2_INLINE int8x8_t word_at(const uint8_t* x) {  // in the first lane
  uint32_t word;
  __builtin_memcpy(&word, x, sizeof word);
  return veor_s8(vcreate_s8(word), vdup_n_s8(-128));
}
#else
template <class V>
SNV2_INLINE Planes<V> word_at(const uint8_t* x) {
  return planes<V>(broadcast_word<V>(x));
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

inline constexpr float kRounder = 8388608.0f;  // 2^23: what is added to it is in the low bits

// In [0, 255]; of a NaN 0.
template <class V>
SNV2_INLINE V clamped_to_bytes(V v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) return _mm512_min_ps(_mm512_max_ps(v, V{}), V{} + 255.0f);
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(V) == 32) return _mm256_min_ps(_mm256_max_ps(v, V{}), V{} + 255.0f);
#elif defined(__SSE2__)
  if constexpr (sizeof(V) == 16) return _mm_min_ps(_mm_max_ps(v, V{}), V{} + 255.0f);
#endif
  const V positive = v > 0.0f ? v : V{};
  return positive < 255.0f ? positive : V{} + 255.0f;
}

// round(v) in [0, 255], halves to even, as integers and as floats.
template <class V>
SNV2_INLINE auto byte_values(V v) {
  using I = typename AsLong<int32_t, V>::type;
  return reinterpret_cast<I>(clamped_to_bytes(v) + kRounder) & 0xff;
}
template <class V>
SNV2_INLINE V rounded_bytes(V v) {
  return clamped_to_bytes(v) + kRounder - kRounder;
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

#elif defined(__AVX2__)

// As above, of eight lanes in halves.
SNV2_INLINE __m256i packed(const Vec (&pixels)[kQuad]) {
  const auto rounded = [&](int p) SNV2_INLINED { return _mm256_cvtps_epi32(pixels[p]); };
  const __m256i low = _mm256_packs_epi32(rounded(0), rounded(1));
  const __m256i high = _mm256_packs_epi32(rounded(2), rounded(3));
  return _mm256_packus_epi16(low, high);
}

SNV2_INLINE void store_pixels(uint8_t* y, const Vec (&pixels)[kQuad], int count) {
  using Bytes = int64_t __attribute__((vector_size(32)));  // a pixel's in each
  const Bytes by_pixel =
      (Bytes)_mm256_permutevar8x32_epi32(packed(pixels), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  const auto put = [&](int p) SNV2_INLINED {
    const int64_t bytes = by_pixel[p];
    __builtin_memcpy(y + p * kPanel, &bytes, sizeof bytes);
  };
  put(0);
  if (count > 1) put(1);
  if (count > 2) put(2);
  if (count > 3) put(3);
}

SNV2_INLINE __m256i transposed(__m256i bytes) {
  return _mm256_shuffle_epi8(bytes, _mm256_broadcastsi128_si256(_mm_setr_epi8(
                                        0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15)));
}

SNV2_INLINE void store_quad(uint8_t* y, const Vec (&pixels)[kQuad]) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(y), transposed(packed(pixels)));
}

SNV2_INLINE void copy_quad(uint8_t* y, const uint8_t* x, int64_t count) {
  using Words = int32_t __attribute__((vector_size(16)));  // four planes of a pixel in each
  const auto pixel = [&](int64_t p) SNV2_INLINED {
    return p < count ? load_ints<Words>(x + p * kPanel) : Words{};
  };
  const Words a = pixel(0), b = pixel(1), c = pixel(2), d = pixel(3);
  const Words ab = __builtin_shufflevector(a, b, 0, 4, 1, 5);
  const Words cd = __builtin_shufflevector(c, d, 0, 4, 1, 5);
  const Words ab2 = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const Words cd2 = __builtin_shufflevector(c, d, 2, 6, 3, 7);
  const auto put = [&](int i, Words low, Words high) SNV2_INLINED {
    const __m256i words = _mm256_set_m128i((__m128i)high, (__m128i)low);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(y + i), transposed(words));
  };
  put(0, __builtin_shufflevector(ab, cd, 0, 1, 4, 5), __builtin_shufflevector(ab, cd, 2, 3, 6, 7));
  put(32, __builtin_shufflevector(ab2, cd2, 0, 1, 4, 5),
      __builtin_shufflevector(ab2, cd2, 2, 3, 6, 7));
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
