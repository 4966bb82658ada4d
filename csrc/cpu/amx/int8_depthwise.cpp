// Depthwise 3x3 on bytes behind the first product of a unit, which is made in tiles.
#include "cpu/amx/int8_results.h"
#include "cpu/amx/kernels.h"
#include "cpu/int8/depthwise_ring.h"

namespace snv2::cpu::SNV2_ISA::int8 {

void expand_depthwise(const ExpandDepthwise<UInt8>& op, Range panels, Range out_rows,
                      float* scratch) {
  const MiddleRows rows(op.dw.shape, out_rows, kQuad);
  if (out_rows.size() == 0) return;
  if (!rows.fits(op.pw1.depth)) {
    return avx512_vnni::kInt8Kernels.expand_depthwise(op, panels, out_rows, scratch);
  }
  expand_rows(op.pw1, kRowsBefore, panels, rows,
              [&](int64_t panel, int64_t group, const auto& make_row) SNV2_INLINED {
                const float* const weights = op.pw1.weights + panel * packed_panel(op.pw1.depth);
                roll_rows(
                    op.dw, panel, Group{group, false}, out_rows, scratch,
                    [&](int64_t row, Place* out, int64_t pitch) {
                      make_row(row, [&](const float* sums, int64_t p, int64_t count) SNV2_INLINED {
                        put_tile(sums, group, p, count, weights, op.pw1.depth,
                                 [&](int64_t g)
                                     SNV2_INLINED { return Ring::To{out + g * pitch, pitch}; });
                      });
                    });
              });
}

}  // namespace snv2::cpu::SNV2_ISA::int8
