// Factors of products as 16-bit integers, for instruction sets that multiply no bytes.
//
// pmaddwd adds products of two pairs of 16 bits. Made of bytes inside the product's loop, such
// pairs took 14 of 46 instructions for a word of a tile of 4 pixels x 16 outputs. Here a panel's
// weights are widened once for all its pixels, and a row's words once for all panels, into buffers
// of the L1 cache: 32 instructions are left, a product and an addition for each pair of planes.
#pragma once

#include <algorithm>
#include <cstring>

#include "cpu/int8/tile.h"

namespace snv2::cpu::SNV2_ISA::int8 {

// Words [0, depth) of some pixels, each four integers.
class WidePixels {
 public:
  // Returns how many pixels fit, whole quads.
  static int64_t most(int64_t depth) {
    return std::max<int64_t>(kWords / depth / kQuad * kQuad, kQuad);
  }

  // From pixels of x that are kXStride bytes apart.
  template <int kXStride>
  void fill(const uint8_t* x, const int32_t* offsets, int64_t depth, int64_t pixels) {
    depth_ = depth;
    for (int64_t k = 0; k < depth;) {
      const int32_t* const at = offsets + k;
      const auto follows = [&](int64_t i) { return at[i] == at[0] + 4 * i; };
      if (k + 4 <= depth && follows(1) && follows(2) && follows(3)) {
        widen<4, kXStride>(x + at[0], k, pixels), k += 4;
      } else if (k + 2 <= depth && follows(1)) {
        widen<2, kXStride>(x + at[0], k, pixels), k += 2;
      } else {
        widen<1, kXStride>(x + at[0], k, pixels), k += 1;
      }
    }
  }

  const int16_t* at(int64_t pixel) const { return values_ + pixel * pitch(); }
  int64_t pitch() const { return 4 * depth_; }

 private:
  static constexpr int64_t kWords = 4096;

  template <int kCount, int kXStride>
  void widen(const uint8_t* x, int64_t k, int64_t pixels) {
    using Bytes = typename VectorOf<uint8_t, 4 * kCount>::type;
    using Integers = typename VectorOf<int16_t, 4 * kCount>::type;
    int16_t* y = values_ + 4 * k;
    for (int64_t i = 0; i < pixels; ++i, x += kXStride, y += pitch()) {
      const auto wide = __builtin_convertvector(load_ints<Bytes>(x), Integers);
      std::memcpy(y, &wide, sizeof wide);
    }
  }

  int64_t depth_ = 0;
  alignas(64) int16_t values_[4 * kWords];
};

// The weights of some panels: for each word and vector of outputs those of its first two planes,
// then those of its last two.
class WideWeights {
 public:
  // Returns how many panels fit, of which 0 is none.
  static int64_t most(int64_t depth) { return kWords / depth; }

  // Puts those of a group in the place of a panel, and of as many behind it.
  void fill(const Row& row, Group group, int64_t place) {
    with_outputs(group, [&](auto outputs) {
      using O = decltype(outputs);
      const int64_t panel = packed_panel(row.depth);
      const float* w = row.weights + kRowsBefore * kPanel;
      int16_t* y = values_ + place * row.depth * kPlace;
      for (int64_t k = 0; k < row.depth; ++k, w += kPanel) {
        unroll<O::kCount>([&](auto v) SNV2_INLINED {
          using V = std::conditional_t<(v < O::kFull), Ints, HalfInts>;
          const auto pairs = neighbours(load_ints<V>(w + O::at(v, panel)));
          std::memcpy(y + v * kStep, &pairs.first, sizeof(V));
          std::memcpy(y + v * kStep + kStep / 2, &pairs.second, sizeof(V));
        });
        y += O::kCount * kStep;
      }
    });
  }

  const int16_t* at(int64_t place, int64_t depth) const { return values_ + place * depth * kPlace; }

  static constexpr int64_t kStep = 2 * kVectorBytes / sizeof(int16_t);  // from vector to vector

 private:
  static constexpr int64_t kWords = 256;
  static constexpr int64_t kPlace = 4 * kPanel;  // of a word and a panel

  alignas(64) int16_t values_[kWords * kPlace];
};

// Panels of a tile: with a third one's weights its sums would not fit the registers.
inline constexpr int64_t kWidePanels = kVecs == 1 ? 2 : 1;

// As for_groups, of up to kWidePanels panels.
template <class F>
void for_wide_groups(Range panels, int64_t outputs, const F& f) {
  for (int64_t panel = panels.begin; panel < panels.end; panel += kWidePanels) {
    for_groups({panel, std::min(panel + kWidePanels, panels.end)}, outputs, f);
  }
}

// Two neighbouring integers in all lanes.
template <class V>
SNV2_INLINE V broadcast_pair(const int16_t* x) {
  return broadcast_word<V>(reinterpret_cast<const uint8_t*>(x));
}

// Tiles of a group whose factors are wide.
template <class To>
struct Widened {
  const Row& row;
  const int16_t* weights;
  const WidePixels& x;
  int64_t begin;  // the row's pixel that is x's first
  const To& to;

  template <int kTilePixels, class O>
  SNV2_INLINE void tile(int64_t pixel) const {
    IntSums<kTilePixels, O> sums;
    const int64_t pitch = x.pitch();
    const int16_t* w = weights;
    const int16_t* in = x.at(pixel);
    const int16_t* const last = in + pitch;
#pragma GCC unroll 1
    for (; in < last; in += 4, w += O::kCount * WideWeights::kStep) {
      unroll<kTilePixels>([&](auto p) SNV2_INLINED {
        unroll<O::kCount>([&](auto v) SNV2_INLINED {
          auto& sum = sums.template at<p, v>();
          using V = std::decay_t<decltype(sum)>;
          const int16_t* const at = w + v * WideWeights::kStep;
          sum += sum_of_pairs(broadcast_pair<V>(in + p * pitch), load_ints<V>(at)) +
                 sum_of_pairs(broadcast_pair<V>(in + p * pitch + 2),
                              load_ints<V>(at + WideWeights::kStep / 2));
        });
      });
    }
    finish<kTilePixels, O>(row, sums, to, begin + pixel);
  }
};

}  // namespace snv2::cpu::SNV2_ISA::int8
