// Depthwise 3x3 on bytes, alone or behind the first product of a unit.
#include "cpu/int8/depthwise_ring.h"
#include "cpu/int8/kernels.h"

namespace snv2::cpu::SNV2_ISA::int8 {

void expand_depthwise(const ExpandDepthwise<UInt8>& op, Range panels, Range out_rows,
                      float* scratch) {
  const int64_t width = op.dw.shape.width;
  const auto* const x = bytes(op.pw1.x);
  for_groups(panels, op.pw1.outputs, [&](int64_t panel, Group group) {
    roll_rows(op.dw, panel, group.panels, out_rows, reinterpret_cast<uint8_t*>(scratch),
              [&](int64_t index, uint8_t* out, int64_t pitch) {
                const Row row = row_of(op.pw1.weights, panel, op.pw1.offsets, op.pw1.depth,
                                       x + index * width * kPanel);
                product_row<kPanel>(row, group, width, ToQuads{out, pitch});
              });
  });
}

void panel_depthwise(const PanelDepthwise<UInt8>& op, Range panels, Range out_rows,
                     float* scratch) {
  const DepthwiseShape& shape = op.dw.shape;
  const int64_t x_panel = shape.height * shape.width * kPanel;
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    const auto* const x = bytes(op.x) + op.panels[panel] * x_panel;
    roll_rows(op.dw, panel, 1, out_rows, reinterpret_cast<uint8_t*>(scratch),
              [&](int64_t index, uint8_t* out, int64_t) {
                const uint8_t* const in = x + index * shape.width * kPanel;
                for (int64_t i = 0; i < shape.width; i += kQuad) {
                  copy_quad(out + i * kPanel, in + i * kPanel, shape.width - i);
                }
              });
  }
}

}  // namespace snv2::cpu::SNV2_ISA::int8
