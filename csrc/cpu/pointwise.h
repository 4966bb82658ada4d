// The one matrix product of the CPU backend, a register tile of pixels x panels of outputs.
// See tile.h for its design.
#pragma once

#include "cpu/simd.h"

namespace snv2::cpu::SNV2_ISA {

// One row of work for a fixed group of panels.
template <class In, class Out>
struct TileRow {
  const In* x;             // first pixel
  const int32_t* offsets;  // [depth]
  int64_t depth;           // in words
  const float* weights;    // first panel of the group
  Out* y;                  // first pixel of the first panel
  int64_t y_panel;
  // First pixel of the panel that is added to each panel of y; all are null or none.
  const In* added[kMaxPanelGroup] = {};
};

enum class Epilogue {
  kStore,      // y[p] = v
  kStoreRelu,  // y[p] = relu(v)
  kSumRelu,    // y += relu(v), all pixels into one
};

// Panels of outputs, the last of which may be live in its first half only: the other half is
// then not computed, and its results are zero.
struct Group {
  int64_t panels;
  bool half;

  int64_t halves() const { return 2 * panels - half; }
};

// Cuts a range of panels of `outputs` channels into groups for tile_row: f(first panel, group).
template <class F>
void for_groups(Range panels, int64_t outputs, const F& f) {
  constexpr int64_t kUsual = kVecs == 1 ? 2 : 1;
  constexpr int64_t kLargest = kVecs == 1 ? 3 : 1;
  const bool half = panels.end == panels_of(outputs) && panels.end * kPanel - outputs >= kPanel / 2;
  for (int64_t panel = panels.begin; panel < panels.end;) {
    const int64_t left = panels.end - panel;
    const int64_t taken = left <= kLargest ? left : kUsual;
    f(panel, Group{taken, half && taken == left});
    panel += taken;
  }
}

// f(product, its panels, first of them) of the blocks of a layer that have some of its panels.
template <class In, class Out, class F>
void for_blocks(const Pointwise<In, Out>& op, Range panels, const F& f) {
  if (op.block_count == 0) return f(op, panels, int64_t{0});
  Pointwise<In, Out> block = op;
  block.block_count = 0;
  int64_t first = 0;
  for (const Block* it = op.blocks; it != op.blocks + op.block_count; ++it) {
    const int64_t count = panels_of(it->outputs);
    const Range taken{panels.begin > first ? panels.begin - first : 0,
                      panels.end < first + count ? panels.end - first : count};
    if (taken.begin < taken.end) {
      block.offsets = op.offsets + it->first;
      block.depth = it->depth;
      block.outputs = it->outputs;
      block.y = op.y + first * op.y_panel;
      block.act = op.act.from_panel(first);
      if (op.added != nullptr) block.added = op.added + first;
      f(block, taken, first);
    }
    block.weights += packed_floats(it->outputs, it->depth, element_of<In>());
    first += count;
  }
}

// `pixels` outputs of a group; pixels of x are kXStride elements apart, two words or a panel, and
// pixels of y a panel.
template <int kXStride, class In, class Out>
void tile_row(const TileRow<In, Out>& row, Group group, int64_t pixels, Epilogue epilogue);

}  // namespace snv2::cpu::SNV2_ISA
