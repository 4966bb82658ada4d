// The products of networks, on the tile of tile.h.
#include "cpu/tile.h"

namespace snv2::cpu::SNV2_ISA {
namespace {

template <class Out>
void product(const Pointwise<Element, Out>& op, Epilogue epilogue, Range panels, Range pixels) {
  for_groups(panels, op.outputs, [&](int64_t panel, Group group) {
    const TileRow<Element, Out> row{op.x + pixels.begin * kPanel,
                                    op.offsets,
                                    op.depth,
                                    op.weights + panel * (op.depth + 1) * kPanel,
                                    op.y + panel * op.y_panel + pixels.begin * kPanel,
                                    op.y_panel};
    tile_row<kPanel>(row, group, pixels.size(), epilogue);
  });
}

}  // namespace

// For depthwise.cpp.
template void tile_row<kPanel>(const TileRow<Element, float>&, Group, int64_t, Epilogue);

void pointwise(const Pointwise<Element, Element>& op, Range panels, Range pixels) {
  product(op, Epilogue::kStoreRelu, panels, pixels);
}

void linear(const Pointwise<Element, float>& op, Range panels, Range pixels) {
  product(op, Epilogue::kStore, panels, pixels);
}

void pointwise_mean(const Pointwise<Element, Element>& op, Range panels) {
  const float scale = 1.0f / static_cast<float>(op.pixels);
  for_groups(panels, op.outputs, [&](int64_t panel, Group group) {
    float sums[kMaxPanelGroup * kPanel] = {};
    const TileRow<Element, float> row{
        op.x, op.offsets, op.depth, op.weights + panel * (op.depth + 1) * kPanel, sums, kPanel};
    tile_row<kPanel>(row, group, op.pixels, Epilogue::kSumRelu);
    for (int64_t g = 0; g < group.panels; ++g) {
      Element* const y = op.y + (panel + g) * op.y_panel;
      for (int64_t i = 0; i < kPanel; i += kLanes) {
        store(y + i, load(sums + g * kPanel + i) * scale);
      }
    }
  });
}

}  // namespace snv2::cpu::SNV2_ISA
