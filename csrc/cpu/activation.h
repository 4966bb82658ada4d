// Activations other than ReLU: a pass over results that are still in L1.
//
// ReLU is a part of the product's tile (tile.h). One for each activation would make the tiles as
// many times larger, for a load and a store of each result beside the multiply-adds that it took.
#pragma once

#include "cpu/pointwise.h"

namespace snv2::cpu::SNV2_ISA {

constexpr bool is_pass(Activation kind) {
  return kind != Activation::kRelu && kind != Activation::kIdentity;
}

// y = act(x) on a panel or more, `pixels` of each; y may be x.
void activate(const Act& act, int64_t panels, const float* x, int64_t x_panel, int64_t pixels,
              float* y, int64_t y_panel);
#if defined(SNV2_BFLOAT16_MAPS)
void activate(const Act& act, int64_t panels, const float* x, int64_t x_panel, int64_t pixels,
              BFloat16* y, int64_t y_panel);
#endif

// tile_row with the activation, whichever it is.
template <int kXStride>
SNV2_INLINE void activated_row(const TileRow<Element, float>& row, Group group, int64_t pixels,
                               const Act& act) {
  const bool relu = act.kind == Activation::kRelu;
  tile_row<kXStride>(row, group, pixels, relu ? Epilogue::kStoreRelu : Epilogue::kStore);
  if (is_pass(act.kind)) {
    activate(act, group.panels, row.y, row.y_panel, pixels, row.y, row.y_panel);
  }
}

}  // namespace snv2::cpu::SNV2_ISA
