// The one matrix product of the CPU backend, a register tile of pixels x panels of outputs.
// See pointwise.cpp for its design.
#pragma once

#include "cpu/simd.h"

namespace snv2::cpu::SNV2_ISA {

// One row of work for a fixed group of panels.
struct TileRow {
  const float* x;          // first pixel
  const int32_t* offsets;  // [depth]
  int64_t depth;
  const float* weights;  // first panel of the group
  float* y;              // first pixel of the first panel
  int64_t y_panel;
};

enum class Epilogue {
  kStore,      // y[p] = v
  kStoreRelu,  // y[p] = relu(v)
  kSumRelu,    // y += relu(v), all pixels into one
};

// Panels that one call of tile_row takes from `count` that are left: 1, 2 or 3.
constexpr int64_t panel_group(int64_t count) {
  if (kMaxPixels3 > 0 && count == 3) return 3;
  return count < kMaxPanels ? count : kMaxPanels;
}

// `pixels` outputs of a group of panels; pixels of x are `x_stride` (2 or 16) floats apart,
// pixels of y 16.
void tile_row(const TileRow& row, int64_t panels, int64_t pixels, Epilogue epilogue, int x_stride);

}  // namespace snv2::cpu::SNV2_ISA
