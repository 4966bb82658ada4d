// Depthwise convolutions behind the first product of a unit, which is made in tiles.
#include "cpu/amx/kernels.h"
#include "cpu/amx/results.h"
#include "cpu/amx/tiles.h"
#include "cpu/depthwise_ring.h"

namespace snv2::cpu::SNV2_ISA {

void expand_depthwise(const ExpandDepthwise<Element>& op, Range panels, Range out_rows,
                      float* scratch) {
  const MiddleRows rows(op.dw.shape, out_rows);
  if (out_rows.size() == 0) return;
  bool fits = true;
  for_blocks(op.pw1, panels, [&](const Pointwise<Element, float>& pw1, Range, int64_t) {
    fits = fits && rows.fits(pw1.depth);
  });
  if (!fits) return avx512_bf16::kMapKernels.expand_depthwise(op, panels, out_rows, scratch);
  with_window(op.dw.shape, [&](auto window) {
    for_blocks(
        op.pw1, panels, [&](const Pointwise<Element, float>& pw1, Range taken, int64_t first) {
          const int64_t weight_panel = (pw1.depth + 1) * kPanel;
          expand_rows(pw1, 1, taken, rows,
                      [&](int64_t panel, int64_t group, const auto& make_row) SNV2_INLINED {
                        const float* const bias = pw1.weights + panel * weight_panel;
                        const Act act = pw1.act.from_panel(panel);
                        roll_rows<window>(op.dw, first + panel, group, out_rows, scratch,
                                          [&](int64_t row, float* out, int64_t pitch) {
                                            make_row(row, [&](float* sums, int64_t p,
                                                              int64_t count) SNV2_INLINED {
                                              finish_tile(sums, group, count, bias, weight_panel,
                                                          act, nullptr, out + p * kPanel, pitch);
                                            });
                                          });
                      });
        });
  });
}

}  // namespace snv2::cpu::SNV2_ISA
