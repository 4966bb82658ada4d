// Epilogue of products in tiles of bytes: from sums to bytes, or floats.
#pragma once

#include "cpu/amx/tiles.h"
#include "cpu/int8/results.h"

namespace snv2::cpu::SNV2_ISA::int8 {

// Puts the results of a tile's pixels, the first of which is `first`, panel g to `to(g)`. `weights`
// are those of the first panel, with what a result is multiplied by before them.
template <class To>
SNV2_INLINE void put_tile(const float* sums, int64_t panels, int64_t first, int64_t pixels,
                          const float* weights, int64_t depth, const To& to) {
  using O = Outputs<1, false>;
  for (int64_t g = 0; g < panels; ++g) {
    const float* const rows = weights + g * packed_panel(depth);
    const Vec multiplier = load(rows), offset = load(rows + kPanel);
    const auto target = to(g);
    const auto put = [&](auto count, int64_t p) SNV2_INLINED {
      Sums<count, O> values;
      unroll<count>([&](auto i) SNV2_INLINED {
        const auto sum = load_ints<Ints>(sums + g * kTileFloats + (p + i) * kPanel);
        values.template at<i, 0>() = floats_of(sum) * multiplier + offset;
      });
      target.put(values, first + p);
    };
    int64_t p = 0;
    for (; p + kQuad <= pixels; p += kQuad) put(std::integral_constant<int, kQuad>{}, p);
    switch (pixels - p) {
      case 1:
        put(std::integral_constant<int, 1>{}, p);
        break;
      case 2:
        put(std::integral_constant<int, 2>{}, p);
        break;
      case 3:
        put(std::integral_constant<int, 3>{}, p);
        break;
      default:
        break;
    }
  }
}

}  // namespace snv2::cpu::SNV2_ISA::int8
