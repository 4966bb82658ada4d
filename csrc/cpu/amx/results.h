// Epilogue of products in tiles of bfloat16: bias, added map and activation.
#pragma once

#include "cpu/activation.h"
#include "cpu/amx/tiles.h"

namespace snv2::cpu::SNV2_ISA {

// Sums of a tile's pixels as results: panel g of pixel p at y + g * y_panel + p * 16. `bias` is the
// first panel's, and those of others are `weight_panel` floats apart. `added` holds the map's panel
// that is added to each panel, or nulls.
template <class Out>
SNV2_INLINE void finish_tile(float* sums, int64_t panels, int64_t pixels, const float* bias,
                             int64_t weight_panel, const Act& act, const Element* const* added,
                             Out* y, int64_t y_panel) {
  const bool passes = is_pass(act.kind);
  const bool rectified = act.kind == Activation::kRelu;
  for (int64_t g = 0; g < panels; ++g) {
    const Vec b = load(bias + g * weight_panel) + 0.0f;  // not -0, see relu
    float* const from = sums + g * kTileFloats;
    Out* const to = y + g * y_panel;
    const auto each = [&](const auto& result) SNV2_INLINED {
      for (int64_t p = 0; p < pixels; ++p) {
        Vec v = load(from + p * kPanel) + b;
        if (added != nullptr) v += load(added[g] + p * kPanel);
        result(p, v);
      }
    };
    if (passes) {
      each([&](int64_t p, Vec v) SNV2_INLINED { store(from + p * kPanel, v); });
    } else if (rectified) {
      each([&](int64_t p, Vec v) SNV2_INLINED { store(to + p * kPanel, relu(v)); });
    } else {
      each([&](int64_t p, Vec v) SNV2_INLINED { store(to + p * kPanel, v); });
    }
  }
  if (passes) activate(act, panels, sums, kTileFloats, pixels, y, y_panel);
}

}  // namespace snv2::cpu::SNV2_ISA
