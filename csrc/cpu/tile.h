// Matrix product of gathered words (planes of float, pairs of planes of BFloat16) with packed
// weights.
//
// A tile holds P pixels x V vectors of outputs in registers. For each word it loads V vectors of
// weights, then broadcasts that word of each pixel: it is addressed as x + offsets[k] + pixel * 16,
// so any gather costs one load of an offset for each k, shared by P * V multiply-adds. Rows are cut
// into tiles of equal height (up to one pixel), because a short last tile leaves the multiplier
// idle.
//
// Bytes from L1 for each multiply-add of vectors: (V * 64 + P * 4) / (P * V), 11 at P = 7, V = 2.
#pragma once

#include <algorithm>

#include "cpu/pointwise.h"

namespace snv2::cpu::SNV2_ISA {

// Sums that leave registers for the weights and one input, and the pixels of a tile.
#if defined(SNV2_SMALL_TILES)
inline constexpr int kAccumulators = 6;
inline constexpr int kPixels = 2;
#elif defined(__AVX512F__)
inline constexpr int kAccumulators = 28;
inline constexpr int kPixels = 7;
#elif defined(__AVX2__)
inline constexpr int kAccumulators = 12;
inline constexpr int kPixels = 6;
#elif defined(__aarch64__)
inline constexpr int kAccumulators = 24;
inline constexpr int kPixels = 6;
#else
inline constexpr int kAccumulators = 12;  // the weights come from memory
inline constexpr int kPixels = 3;
#endif

// How a word of a map is multiplied with vectors of weights, as many outputs' as there are lanes.
template <class In>
struct Product;

template <>
struct Product<float> {
  static SNV2_INLINE float word(const float* x) { return *x; }

  template <class V>
  static SNV2_INLINE void multiply_add(float word, V weights, V& sum) {
    sum += word * weights;
  }
};

#if defined(__AVX512BF16__)
template <>
struct Product<BFloat16> {
  // Broadcast here: as an integer it would pass through a general register on its way to vectors of
  // two sizes.
  static SNV2_INLINE Vec word(const BFloat16* x) {
    int32_t pair;
    __builtin_memcpy(&pair, x, sizeof pair);
    return _mm512_castsi512_ps(_mm512_set1_epi32(pair));
  }

  static SNV2_INLINE void multiply_add(Vec word, Vec weights, Vec& sum) {
    sum = _mm512_dpbf16_ps(sum, (__m512bh)weights, (__m512bh)word);
  }
  static SNV2_INLINE void multiply_add(Vec word, HalfVec weights, HalfVec& sum) {
    sum = _mm256_dpbf16_ps(sum, (__m256bh)weights, (__m256bh)_mm512_castps512_ps256(word));
  }
};
#elif defined(SNV2_BFLOAT16_MAPS)
template <>
struct Product<BFloat16> {
  // Not broadcast: a product takes one lane of its last factor. What a load of four bytes leaves in
  // the others is zero.
  static SNV2_INLINE bfloat16x4_t word(const BFloat16* x) {
    float pair;
    __builtin_memcpy(&pair, x, sizeof pair);
    return vreinterpret_bf16_f32(vset_lane_f32(pair, vdup_n_f32(0), 0));
  }

  static SNV2_INLINE void multiply_add(bfloat16x4_t word, Vec weights, Vec& sum) {
    sum = (Vec)vbfdotq_lane_f32((float32x4_t)sum, (bfloat16x8_t)weights, word, 0);
  }
  // The same of a word that is in all lanes.
  static SNV2_INLINE void multiply_add(Vec word, Vec weights, Vec& sum) {
    sum = (Vec)vbfdotq_f32((float32x4_t)sum, (bfloat16x8_t)weights, (bfloat16x8_t)word);
  }
};
#endif

// Words that are loaded before those of earlier pixels are multiplied. Small processors of ARM run
// instructions in their order, and a load takes them as long as the products of one or two words.
#if defined(__aarch64__)
inline constexpr int kWordsAhead = 2;
#else
inline constexpr int kWordsAhead = 0;
#endif

// Sums over k run in as many chains as fit the registers, which hides the latency of the
// multiply-add in small tiles, and in blocks: both keep the rounding error of long sums small.
inline constexpr int64_t kChainLength = 128;

constexpr int chains_of(int sums) {
  const int fit = kAccumulators / sums;
  return fit >= 4 ? 4 : fit >= 2 ? 2 : 1;
}

constexpr int64_t depth_block(int sums) { return std::min(chains_of(sums), 2) * kChainLength; }

// Vectors of outputs: those of whole panels, then those of half a panel.
template <int kPanelCount, bool kHalf>
struct Outputs {
  static constexpr int kPanels = kPanelCount;
  static constexpr int kFull = (kPanels - kHalf) * kVecs;
  static constexpr int kCount = kFull + (kHalf ? kHalfVecs : 0);

  // Few taps, as the stem's, need no second chain.
  static constexpr int max_pixels(int x_stride) {
    const int most = x_stride < kPanel ? 2 * kPixels : kCount > 2 ? kPixels + 2 : kPixels;
    return std::min(most, kAccumulators / kCount);
  }

  static constexpr int panel_of(int v) { return v < kFull ? v / kVecs : kFull / kVecs; }
  // The place of vector v in a panelled array whose panels are `panel` elements apart.
  static constexpr int64_t at(int v, int64_t panel) {
    return v < kFull ? v / kVecs * panel + v % kVecs * kLanes
                     : kFull / kVecs * panel + (v - kFull) * kHalfLanes;
  }
};

// The sums of a tile, or one chain of them.
template <int kTilePixels, class O, class V = Vec, class H = HalfVec>
struct Sums {
  V full[kTilePixels][O::kFull + 1] = {};
  H half[kTilePixels][O::kCount - O::kFull + 1] = {};

  template <int p, int v>
  SNV2_INLINE auto& at() {
    if constexpr (v < O::kFull) {
      return full[p][v];
    } else {
      return half[p][v - O::kFull];
    }
  }

  // f(sum, pixel, vector) of each.
  template <class F>
  SNV2_INLINE void each(const F& f) {
    unroll<kTilePixels>([&](auto p) SNV2_INLINED {
      unroll<O::kCount>([&](auto v) SNV2_INLINED { f(at<p, v>(), p, v); });
    });
  }

  SNV2_INLINE void add(Sums& others) {
    each([&](auto& sum, auto p, auto v) SNV2_INLINED { sum += others.template at<p, v>(); });
  }
};

// Words [begin, end) of a tile, from zero: with the bias in from the start, every rounding would be
// of its size.
template <int kTilePixels, class O, int kXStride, class In, class Out>
SNV2_INLINE Sums<kTilePixels, O> sum_block(const TileRow<In, Out>& row, const In* x, int64_t begin,
                                           int64_t end) {
  constexpr int kChains = chains_of(kTilePixels * O::kCount);
  const int64_t weight_panel = (row.depth + 1) * kPanel;
  Sums<kTilePixels, O> chains[kChains];
  const auto multiply_add = [&](auto& sums, const float* w, int32_t offset) SNV2_INLINED {
    Sums<1, O> weights;
    weights.each([&](auto& weight, auto, auto v) SNV2_INLINED {
      weight = load<std::decay_t<decltype(weight)>>(w + O::at(v, weight_panel));
    });
    // The next group's weights come from L3 or memory, which is too far for one tile to hide.
    if constexpr (kXStride == kPanel) {
      unroll<O::kPanels>([&](auto panel) SNV2_INLINED {
        __builtin_prefetch(w + (O::kPanels + panel) * weight_panel, 0, 2);
      });
    }
    const In* xk = x + offset;
    decltype(Product<In>::word(xk)) words[kTilePixels];
    unroll<kTilePixels + kWordsAhead>([&](auto i) SNV2_INLINED {
      if constexpr (i < kTilePixels) words[i] = Product<In>::word(xk + i * kXStride);
      constexpr int p = i - kWordsAhead;
      if constexpr (p >= 0) {
        unroll<O::kCount>([&](auto v) SNV2_INLINED {
          Product<In>::multiply_add(words[p], weights.template at<0, v>(),
                                    sums.template at<p, v>());
        });
      }
    });
  };
  const float* w = row.weights + (begin + 1) * kPanel;
  const int32_t* offset = row.offsets + begin;
  const int32_t* const last = row.offsets + end;
#pragma GCC unroll 1
  for (; offset + kChains <= last; offset += kChains, w += kChains * kPanel) {
    unroll<kChains>([&](auto c)
                        SNV2_INLINED { multiply_add(chains[c], w + c * kPanel, offset[c]); });
  }
  if constexpr (kChains > 1) {
#pragma GCC unroll 1
    for (; offset < last; ++offset, w += kPanel) multiply_add(chains[0], w, *offset);
  }
  unroll<kChains - 1>([&](auto c) SNV2_INLINED { chains[0].add(chains[c + 1]); });
  return chains[0];
}

// Bias, activation and store of a tile whose first pixel is at y.
template <int kTilePixels, class O, class In, class Out>
SNV2_INLINE void finish(const TileRow<In, Out>& row, Epilogue epilogue, Sums<kTilePixels, O>& sums,
                        Out* y) {
  Sums<1, O> bias;
  bias.each([&](auto& b, auto, auto v) SNV2_INLINED {
    const float* at = row.weights + O::at(v, (row.depth + 1) * kPanel);
    b = load<std::decay_t<decltype(b)>>(at) + 0.0f;  // not -0, see relu
  });
  sums.each([&](auto& sum, auto, auto v) SNV2_INLINED { sum += bias.template at<0, v>(); });
  if (row.added[0] != nullptr) {
    const int64_t pixel = y - row.y;
    sums.each([&](auto& sum, auto p, auto v) SNV2_INLINED {
      const In* const panel = row.added[O::panel_of(v)] + pixel + p * kPanel;
      sum += load_as<std::decay_t<decltype(sum)>>(panel + O::at(v, 0));
    });
  }
  if (epilogue != Epilogue::kStore) {
    sums.each([&](auto& sum, auto, auto) SNV2_INLINED { sum = relu(sum); });
  }
  const int64_t y_panel = row.y_panel;
  if constexpr (std::is_same_v<Out, float>) {
    if (epilogue == Epilogue::kSumRelu) {
      unroll<O::kCount>([&](auto v) SNV2_INLINED {
        auto& total = sums.template at<0, v>();
        unroll<kTilePixels - 1>([&](auto p)
                                    SNV2_INLINED { total += sums.template at<p + 1, v>(); });
        float* to = y + O::at(v, y_panel);
        store(to, total + load<std::decay_t<decltype(total)>>(to));
      });
      return;
    }
  }
  sums.each([&](auto& sum, auto p, auto v) SNV2_INLINED {
    Out* to = y + p * kPanel + O::at(v, y_panel);
    if constexpr (v < O::kFull) {
      store(to, sum);
    } else {
      store_half(to, sum);
    }
  });
}

// A tile whose sums, beside the chains of a block, do not fit the registers.
template <int kTilePixels, class O, int kXStride, class In, class Out>
__attribute__((noinline)) void deep_tile(const TileRow<In, Out>& row, Epilogue epilogue,
                                         const In* x, Out* y) {
  constexpr int64_t kBlock = depth_block(kTilePixels * O::kCount);
  auto sums = sum_block<kTilePixels, O, kXStride>(row, x, 0, kBlock);
  for (int64_t begin = kBlock; begin < row.depth; begin += kBlock) {
    const int64_t end = std::min(row.depth, begin + kBlock);
    auto block = sum_block<kTilePixels, O, kXStride>(row, x, begin, end);
    sums.add(block);
  }
  finish(row, epilogue, sums, y);
}

// `count` tiles, one after the other.
template <int kTilePixels, class O, int kXStride, class In, class Out>
void tiles(const TileRow<In, Out>& row, Epilogue epilogue, int64_t first_pixel, int64_t count) {
  const int64_t y_step = epilogue == Epilogue::kSumRelu ? 0 : kPanel;
  const In* x = row.x + first_pixel * kXStride;
  Out* y = row.y + first_pixel * y_step;
  for (int64_t i = 0; i < count; ++i, x += kTilePixels * kXStride, y += kTilePixels * y_step) {
    if (row.depth > depth_block(kTilePixels * O::kCount)) {
      deep_tile<kTilePixels, O, kXStride>(row, epilogue, x, y);
    } else {
      auto sums = sum_block<kTilePixels, O, kXStride>(row, x, 0, row.depth);
      finish(row, epilogue, sums, y);
    }
  }
}

template <class O, int kXStride, class In, class Out, int... kPixelsMinus1>
void run_tiles(const TileRow<In, Out>& row, Epilogue epilogue, int64_t pixels,
               std::integer_sequence<int, kPixelsMinus1...>) {
  using Tiles = void (*)(const TileRow<In, Out>&, Epilogue, int64_t, int64_t);
  static constexpr Tiles kTiles[] = {&tiles<kPixelsMinus1 + 1, O, kXStride, In, Out>...};
  const int64_t count = ceil_div(pixels, sizeof...(kPixelsMinus1));
  const int64_t size = pixels / count, larger = pixels % count;
  if (larger > 0) kTiles[size](row, epilogue, 0, larger);
  kTiles[size - 1](row, epilogue, larger * (size + 1), count - larger);
}

// Calls run(Outputs<...>{}) with the outputs of a group.
template <class F>
void with_outputs(Group group, const F& run) {
  switch (group.halves()) {
    case 1:
      return run(Outputs<1, true>{});
    case 2:
      return run(Outputs<1, false>{});
#if defined(__AVX512F__)
    case 3:
      return run(Outputs<2, true>{});
    case 4:
      return run(Outputs<2, false>{});
    case 5:
      return run(Outputs<3, true>{});
    case 6:
      return run(Outputs<3, false>{});
#endif
    default:
      __builtin_unreachable();
  }
}

template <int kXStride, class In, class Out>
void tile_row(const TileRow<In, Out>& row, Group group, int64_t pixels, Epilogue epilogue) {
  if (pixels == 0) return;
  with_outputs(group, [&](auto outputs) {
    using O = decltype(outputs);
    run_tiles<O, kXStride>(row, epilogue, pixels,
                           std::make_integer_sequence<int, O::max_pixels(kXStride)>{});
  });
}

}  // namespace snv2::cpu::SNV2_ISA
