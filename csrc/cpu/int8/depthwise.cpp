// Depthwise 3x3 on bytes, alone or behind the first product of a unit.
#include "cpu/int8/depthwise_ring.h"
#include "cpu/int8/kernels.h"
#include "cpu/int8/products.h"

namespace snv2::cpu::SNV2_ISA::int8 {

void expand_depthwise(const ExpandDepthwise<UInt8>& op, Range panels, Range out_rows,
                      float* scratch) {
  const int64_t width = op.dw.shape.width;
  const auto* const x = bytes(op.pw1.x);
  RowProduct product{Factors(op.pw1)};
  product.for_each_group(panels, [&](int64_t first, Group group) {
    roll_rows(op.dw, first, group, out_rows, scratch,
              [&](int64_t index, Place* out, int64_t pitch) {
                product.run<kPanel>(x + index * width * kPanel, width, [&](int64_t panel) {
                  return Ring::To{out + (panel - first) * pitch, pitch};
                });
              });
  });
}

void panel_depthwise(const PanelDepthwise<UInt8>& op, Range panels, Range out_rows,
                     float* scratch) {
  const DepthwiseShape& shape = op.dw.shape;
  const int64_t x_panel = shape.height * shape.width * kPanel;
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    const auto* const x = bytes(op.x) + op.panels[panel] * x_panel;
    roll_rows(op.dw, panel, Group{1, false}, out_rows, scratch,
              [&](int64_t index, Place* out, int64_t) {
                Ring::copy_row(x + index * shape.width * kPanel, shape.width, out);
              });
  }
}

}  // namespace snv2::cpu::SNV2_ISA::int8
