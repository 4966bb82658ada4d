// Matrix product of gathered words, four planes of bytes each, with packed weights of int8.
//
// As in cpu/tile.h a tile holds P pixels x V vectors of outputs in registers, here of int32; its
// results leave four pixels at a time, packed. Exact sums need no blocks, and a second chain only
// where there are too few to hide the latency of a product.
#pragma once

#include <algorithm>

#include "cpu/int8/results.h"

namespace snv2::cpu::SNV2_ISA::int8 {

template <int kTilePixels, class O, int kXStride, class To>
SNV2_INLINE void gathered_tile(const Row& row, const uint8_t* x, const To& to, int64_t pixel) {
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

  finish<kTilePixels, O>(row, chains[0], to, pixel);
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

// `count` tiles, one after the other, of f.tile<kTilePixels, O>(first pixel).
template <int kTilePixels, class O, class F>
void tiles(const F& f, int64_t first, int64_t count) {
  for (int64_t i = 0; i < count; ++i, first += kTilePixels) f.template tile<kTilePixels, O>(first);
}

// Tiles of equal height, up to one quad, the last of which may end within a quad: a short one
// leaves the multiplier idle.
template <class O, class F, int... kPixelsMinus1>
void run_tiles(const F& f, int64_t pixels, std::integer_sequence<int, kPixelsMinus1...>) {
  using Tiles = void (*)(const F&, int64_t, int64_t);
  static constexpr Tiles kTiles[] = {&tiles<kPixelsMinus1 + 1, O, F>...};
  const auto run = [&](int64_t size, int64_t first, int64_t count) {
    if (count > 0) kTiles[size - 1](f, first, count);
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

// All tiles of `pixels` outputs of a group.
template <class F>
void run_group(const F& f, Group group, int64_t pixels) {
  if (pixels == 0) return;
  with_outputs(group, [&](auto outputs) {
    using O = decltype(outputs);
    run_tiles<O>(f, pixels, std::make_integer_sequence<int, max_pixels<O>()>{});
  });
}

// Tiles that gather their words from pixels of x that are kXStride bytes apart.
template <int kXStride, class To>
struct Gathered {
  const Row& row;
  const To& to;

  template <int kTilePixels, class O>
  SNV2_INLINE void tile(int64_t pixel) const {
    gathered_tile<kTilePixels, O, kXStride>(row, row.x + pixel * kXStride, to, pixel);
  }
};

}  // namespace snv2::cpu::SNV2_ISA::int8
