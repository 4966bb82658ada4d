// Matrix product of gathered words, four planes of bytes each, with packed weights of int8.
//
// As in cpu/tile.h a tile holds P pixels x V vectors of outputs in registers, here of int32; its
// results leave four pixels at a time, packed. Exact sums need no blocks, and a second chain only
// where there are too few to hide the latency of a product.
#pragma once

#include <algorithm>

#include "cpu/int8/vectors.h"
#include "cpu/tile.h"

namespace snv2::cpu::SNV2_ISA::int8 {

// One row of work for a fixed group of panels.
struct Row {
  const uint8_t* x;        // first pixel
  const int32_t* offsets;  // [depth]
  int64_t depth;           // in words
  const float* weights;    // first panel of the group
};

inline int64_t packed_panel(int64_t depth) { return (depth + kRowsBefore) * kPanel; }

// Where results go: put<P, O>(values, first pixel), `values` of P pixels as Sums<P, O>.

// Bytes as maps have them.
struct ToMap {
  uint8_t* y;
  int64_t y_panel;

  template <int kTilePixels, class O>
  SNV2_INLINE void put(Sums<kTilePixels, O>& values, int64_t pixel) const;
};

// Bytes in quads of pixels, for the depthwise convolution; a last quad is filled with zeros.
struct ToQuads {
  uint8_t* y;
  int64_t y_panel;

  template <int kTilePixels, class O>
  SNV2_INLINE void put(Sums<kTilePixels, O>& values, int64_t pixel) const;
};

struct ToFloats {
  float* y;
  int64_t y_panel;

  template <int kTilePixels, class O>
  SNV2_INLINE void put(Sums<kTilePixels, O>& values, int64_t pixel) const;
};

// Sums over pixels of what is behind a ReLU.
struct ToSums {
  float* y;
  int64_t y_panel;

  template <int kTilePixels, class O>
  SNV2_INLINE void put(Sums<kTilePixels, O>& values, int64_t pixel) const;
};

template <int kTilePixels, class O>
using IntSums = Sums<kTilePixels, O, Ints, HalfInts>;

SNV2_INLINE Vec whole(Vec v) { return v; }
#if defined(__AVX512F__)
SNV2_INLINE Vec whole(HalfVec v) { return _mm512_zextps256_ps512(v); }
#endif

// f(vector, first pixel, its four pixels) of each vector of each quad; pixels beyond the tile are
// zero.
template <int kTilePixels, class O, class F>
SNV2_INLINE void each_quad(Sums<kTilePixels, O>& values, const F& f) {
  unroll<(kTilePixels + kQuad - 1) / kQuad>([&](auto quad) SNV2_INLINED {
    constexpr int kFirst = quad * kQuad;
    unroll<O::kCount>([&](auto v) SNV2_INLINED {
      Vec pixels[kQuad] = {};
      unroll<std::min(kQuad, kTilePixels - kFirst)>(
          [&](auto p) SNV2_INLINED { pixels[p] = whole(values.template at<kFirst + p, v>()); });
      f(v, std::integral_constant<int, kFirst>{}, pixels);
    });
  });
}

template <int kTilePixels, class O>
SNV2_INLINE void ToMap::put(Sums<kTilePixels, O>& values, int64_t pixel) const {
  each_quad(values, [&](auto v, auto first, auto& pixels) SNV2_INLINED {
    store_pixels(y + (pixel + first) * kPanel + O::at(v, y_panel), pixels,
                 std::min<int>(kQuad, kTilePixels - first));
  });
}

template <int kTilePixels, class O>
SNV2_INLINE void ToQuads::put(Sums<kTilePixels, O>& values, int64_t pixel) const {
  each_quad(values, [&](auto v, auto first, auto& pixels) SNV2_INLINED {
    store_quad(y + (pixel + first) * kPanel + O::panel_of(v) * y_panel + O::at(v, 0) * kQuad,
               pixels);
  });
}

template <int kTilePixels, class O>
SNV2_INLINE void ToFloats::put(Sums<kTilePixels, O>& values, int64_t pixel) const {
  values.each([&](auto& value, auto p, auto v) SNV2_INLINED {
    float* const to = y + (pixel + p) * kPanel + O::at(v, y_panel);
    if constexpr (v < O::kFull) {
      store(to, value);
    } else {
      store_half(to, value);
    }
  });
}

template <int kTilePixels, class O>
SNV2_INLINE void ToSums::put(Sums<kTilePixels, O>& values, int64_t) const {
  unroll<O::kCount>([&](auto v) SNV2_INLINED {
    float* const to = y + O::at(v, y_panel);
    auto total = load<std::decay_t<decltype(values.template at<0, v>())>>(to);
    unroll<kTilePixels>([&](auto p) SNV2_INLINED {
      const auto value = values.template at<p, v>();
      total += value > 0.0f ? value : decltype(total){};
    });
    store(to, total);
  });
}

template <int kTilePixels, class O, int kXStride, class To>
SNV2_INLINE void tile(const Row& row, const uint8_t* x, const To& to, int64_t pixel) {
  constexpr int kChains = kTilePixels * O::kCount < 8 ? 2 : 1;
  const int64_t panel = packed_panel(row.depth);
  IntSums<kTilePixels, O> chains[kChains];
  chains[0].each([&](auto& sum, auto, auto v) SNV2_INLINED {
    sum = first_sums<std::decay_t<decltype(sum)>>(row.weights + 2 * kPanel + O::at(v, panel));
  });
  const auto multiply_add = [&](auto& sums, const float* w, int32_t offset) SNV2_INLINED {
    const uint8_t* const xk = x + offset;
    if constexpr (kXStride == kPanel) {
      unroll<O::kPanels>(
          [&](auto p) SNV2_INLINED { __builtin_prefetch(w + (O::kPanels + p) * panel, 0, 2); });
    }
    Weights<Ints> full[O::kFull + 1];
    Weights<HalfInts> half[O::kCount - O::kFull + 1];
    unroll<O::kCount>([&](auto v) SNV2_INLINED {
      if constexpr (v < O::kFull) {
        full[v] = weights(load_ints<Ints>(w + O::at(v, panel)));
      } else {
        half[v - O::kFull] = weights(load_ints<HalfInts>(w + O::at(v, panel)));
      }
    });
    unroll<kTilePixels>([&](auto p) SNV2_INLINED {
      const auto word = word_at<Ints>(xk + p * kXStride);
      unroll<O::kCount>([&](auto v) SNV2_INLINED {
        auto& sum = sums.template at<p, v>();
        if constexpr (v < O::kFull) {
          dot(word, full[v], sum);
        } else {
#if defined(__AVX512VNNI__)
          dot(half_of(word), half[v - O::kFull], sum);
#elif defined(__AVX512F__)
          dot<HalfInts>(word_at<HalfInts>(xk + p * kXStride), half[v - O::kFull], sum);
#else
          dot(word, half[v - O::kFull], sum);
#endif
        }
      });
    });
  };
  const float* w = row.weights + kRowsBefore * kPanel;
  const int32_t* offset = row.offsets;
  const int32_t* const last = offset + row.depth;
#pragma GCC unroll 1
  for (; offset + kChains <= last; offset += kChains, w += kChains * kPanel) {
    unroll<kChains>([&](auto c)
                        SNV2_INLINED { multiply_add(chains[c], w + c * kPanel, offset[c]); });
  }
  if constexpr (kChains > 1) {
    for (; offset < last; ++offset, w += kPanel) multiply_add(chains[0], w, *offset);
    chains[0].add(chains[1]);
  }

  Sums<1, O> multipliers, offsets;
  multipliers.each([&](auto& value, auto, auto v) SNV2_INLINED {
    value = load<std::decay_t<decltype(value)>>(row.weights + O::at(v, panel));
  });
  offsets.each([&](auto& value, auto, auto v) SNV2_INLINED {
    value = load<std::decay_t<decltype(value)>>(row.weights + kPanel + O::at(v, panel));
  });
  Sums<kTilePixels, O> values;
  values.each([&](auto& value, auto p, auto v) SNV2_INLINED {
    value = floats_of(chains[0].template at<p, v>()) * multipliers.template at<0, v>() +
            offsets.template at<0, v>();
  });
  to.put(values, pixel);
}

// Pixels of the largest tile: whole quads, so that each tile begins at one.
template <class O>
constexpr int max_pixels() {
#if defined(__AVX512F__)
  constexpr int kLargest = 12;
#else
  constexpr int kLargest = 4;
#endif
  return std::clamp(kAccumulators / O::kCount / kQuad * kQuad, kQuad, kLargest);
}

template <int kTilePixels, class O, int kXStride, class To>
void tiles(const Row& row, const To& to, int64_t first, int64_t count) {
  const uint8_t* x = row.x + first * kXStride;
  for (int64_t i = 0; i < count; ++i, first += kTilePixels, x += kTilePixels * kXStride) {
    tile<kTilePixels, O, kXStride>(row, x, to, first);
  }
}

// Tiles of equal height, up to one quad, the last of which may end within a quad: a short one
// leaves the multiplier idle.
template <class O, int kXStride, class To, int... kPixelsMinus1>
void run_tiles(const Row& row, const To& to, int64_t pixels,
               std::integer_sequence<int, kPixelsMinus1...>) {
  using Tiles = void (*)(const Row&, const To&, int64_t, int64_t);
  static constexpr Tiles kTiles[] = {&tiles<kPixelsMinus1 + 1, O, kXStride, To>...};
  const auto run = [&](int64_t size, int64_t first, int64_t count) {
    if (count > 0) kTiles[size - 1](row, to, first, count);
  };
  const int64_t quads = ceil_div(pixels, kQuad);
  const int64_t count = ceil_div(quads * kQuad, sizeof...(kPixelsMinus1));
  const int64_t size = quads / count * kQuad, larger = quads % count;
  const int64_t cut = quads * kQuad - pixels;  // from the last tile
  const int64_t whole = cut > 0 ? count - 1 : count;
  const int64_t whole_larger = std::min(larger, whole);
  run(size + kQuad, 0, whole_larger);
  const int64_t first = whole_larger * (size + kQuad);
  run(size, first, whole - whole_larger);
  if (cut > 0) {
    const int64_t last = first + (whole - whole_larger) * size;
    run(pixels - last, last, 1);
  }
}

// `pixels` outputs of a group, whose pixels of x are kXStride bytes apart.
template <int kXStride, class To>
void product_row(const Row& row, Group group, int64_t pixels, const To& to) {
  if (pixels == 0) return;
  with_outputs(group, [&](auto outputs) {
    using O = decltype(outputs);
    run_tiles<O, kXStride>(row, to, pixels, std::make_integer_sequence<int, max_pixels<O>()>{});
  });
}

// The rows of a group of a layer's panels, from `panel` on.
inline Row row_of(const float* weights, int64_t panel, const int32_t* offsets, int64_t depth,
                  const uint8_t* x) {
  return {x, offsets, depth, weights + panel * packed_panel(depth)};
}

}  // namespace snv2::cpu::SNV2_ISA::int8
