// The products of networks of integers, on the tile of int8/tile.h.
#include "cpu/int8/kernels.h"
#include "cpu/int8/tile.h"

namespace snv2::cpu::SNV2_ISA::int8 {

void pointwise(const Pointwise<UInt8, UInt8>& op, Range panels, Range pixels) {
  for_groups(panels, op.outputs, [&](int64_t panel, Group group) {
    const Row row =
        row_of(op.weights, panel, op.offsets, op.depth, bytes(op.x) + pixels.begin * kPanel);
    const ToMap to{bytes(op.y) + panel * op.y_panel + pixels.begin * kPanel, op.y_panel};
    product_row<kPanel>(row, group, pixels.size(), to);
  });
}

void linear(const Pointwise<UInt8, float>& op, Range panels, Range pixels) {
  for_groups(panels, op.outputs, [&](int64_t panel, Group group) {
    const Row row =
        row_of(op.weights, panel, op.offsets, op.depth, bytes(op.x) + pixels.begin * kPanel);
    const ToFloats to{op.y + panel * op.y_panel + pixels.begin * kPanel, op.y_panel};
    product_row<kPanel>(row, group, pixels.size(), to);
  });
}

void pointwise_mean(const Pointwise<UInt8, UInt8>& op, Range panels) {
  const float scale = 1.0f / static_cast<float>(op.pixels);
  for_groups(panels, op.outputs, [&](int64_t panel, Group group) {
    float sums[kMaxPanelGroup * kPanel] = {};
    const Row row = row_of(op.weights, panel, op.offsets, op.depth, bytes(op.x));
    product_row<kPanel>(row, group, op.pixels, ToSums{sums, kPanel});
    for (int64_t g = 0; g < group.panels; ++g) {
      for (int64_t lane = 0; lane < kPanel; lane += kLanes) {
        const Vec means[kQuad] = {load(sums + g * kPanel + lane) * scale};
        store_pixels(bytes(op.y) + (panel + g) * op.y_panel + lane, means, 1);
      }
    }
  });
}

}  // namespace snv2::cpu::SNV2_ISA::int8
