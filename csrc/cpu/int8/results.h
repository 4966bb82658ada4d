// Results of tiles: from integer sums to bytes or floats, and where they go.
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

// The rows of a group of a layer's panels, from `panel` on.
inline Row row_of(const float* weights, int64_t panel, const int32_t* offsets, int64_t depth,
                  const uint8_t* x) {
  return {x, offsets, depth, weights + panel * packed_panel(depth)};
}

// Where results go: put<P, O>(values, first pixel), `values` of P pixels as Sums<P, O>.

// Bytes as maps have them.
struct ToMap {
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

// Multiplies sums by what stands before a panel's weights, and puts them where they go.
template <int kTilePixels, class O, class To>
SNV2_INLINE void finish(const Row& row, IntSums<kTilePixels, O>& sums, const To& to,
                        int64_t pixel) {
  const int64_t panel = packed_panel(row.depth);
  Sums<1, O> multipliers, offsets;
  multipliers.each([&](auto& value, auto, auto v) SNV2_INLINED {
    value = load<std::decay_t<decltype(value)>>(row.weights + O::at(v, panel));
  });
  offsets.each([&](auto& value, auto, auto v) SNV2_INLINED {
    value = load<std::decay_t<decltype(value)>>(row.weights + kPanel + O::at(v, panel));
  });
  Sums<kTilePixels, O> values;
  values.each([&](auto& value, auto p, auto v) SNV2_INLINED {
    value = floats_of(sums.template at<p, v>()) * multipliers.template at<0, v>() +
            offsets.template at<0, v>();
  });
  to.put(values, pixel);
}

}  // namespace snv2::cpu::SNV2_ISA::int8
