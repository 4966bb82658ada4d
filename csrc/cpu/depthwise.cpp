// Depthwise convolutions on panels, alone or behind the first product of a unit.
#include "cpu/depthwise_ring.h"

namespace snv2::cpu::SNV2_ISA {

void expand_depthwise(const ExpandDepthwise<Element>& op, Range panels, Range out_rows,
                      float* scratch) {
  const int64_t width = op.dw.shape.width;
  with_window(op.dw.shape, [&](auto window) {
    const auto block = [&](const Pointwise<Element, float>& pw1, Range taken, int64_t first) {
      for_groups(taken, pw1.outputs, [&](int64_t panel, Group group) {
        TileRow<Element, float> row{nullptr,   pw1.offsets,
                                    pw1.depth, pw1.weights + panel * (pw1.depth + 1) * kPanel,
                                    nullptr,   0};
        const Act act = pw1.act.from_panel(panel);
        roll_rows<window>(op.dw, first + panel, group.panels, out_rows, scratch,
                          [&](int64_t index, float* out, int64_t pitch) {
                            row.x = pw1.x + index * width * kPanel;
                            row.y = out;
                            row.y_panel = pitch;
                            activated_row<kPanel>(row, group, width, act);
                          });
      });
    };
    for_blocks(op.pw1, panels, block);
  });
}

void panel_depthwise(const PanelDepthwise<Element>& op, Range panels, Range out_rows,
                     float* scratch) {
  const DepthwiseShape& shape = op.dw.shape;
  const int64_t x_panel = shape.height * shape.width * kPanel;
  with_window(shape, [&](auto window) {
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      const Element* x = op.x + op.panels[panel] * x_panel;
      roll_rows<window>(op.dw, panel, 1, out_rows, scratch,
                        [&](int64_t index, float* out, int64_t) {
                          const Element* in = x + index * shape.width * kPanel;
                          for (int64_t i = 0; i < shape.width * kPanel; i += kLanes) {
                            store(out + i, load(in + i));
                          }
                        });
    }
  });
}

}  // namespace snv2::cpu::SNV2_ISA
