// Depthwise 3x3 on rows of bytes that roll through a ring.
//
// As in cpu/depthwise_ring.h, rows of the middle map are never written. What the ring holds is what
// the instruction set multiplies best: words of four pixels, or floats.
#pragma once

#include <algorithm>

#include "cpu/int8/results.h"

#if defined(SNV2_DOTS_OF_BYTES)
#include "cpu/int8/byte_ring.h"
#else
#include "cpu/int8/float_ring.h"
#endif

namespace snv2::cpu::SNV2_ISA::int8 {

// Words of a packed row of taps.
inline constexpr int64_t kTapDepth = kRows * tap_words(kRows);

using Place = Ring::Place;

// Rolls a group of panels of rows through the ring. make_row(row, out, panel pitch) writes input
// row `row` without its padding.
template <class F>
void roll_rows(const Depthwise<UInt8>& op, int64_t panel, Group group, Range out_rows,
               float* scratch, const F& make_row) {
  const DepthwiseShape& shape = op.shape;
  const int64_t pitch = Ring::pitch(shape.width);  // one panel of one row
  const int64_t row_pitch = group.panels * pitch;
  const int64_t out_width = shape.out_width();
  const int64_t y_panel = shape.out_height() * out_width * kPanel;
  Place* const ring = reinterpret_cast<Place*>(scratch);
  Place* const zeros = ring + kRows * row_pitch;
  std::fill_n(zeros, pitch, Place{});
  for (int64_t i = 0; i < kRows * group.panels; ++i) {
    std::fill_n(ring + i * pitch, Ring::kPadding, Place{});
    std::fill_n(ring + (i + 1) * pitch - Ring::kPadding, Ring::kPadding, Place{});
  }
  Ring::Filter filters[kMaxPanelGroup];
  for (int64_t g = 0; g < group.panels; ++g) {
    filters[g].fill(op.weights + (panel + g) * packed_panel(kTapDepth));
  }
  int64_t made = std::max<int64_t>(0, out_rows.begin * shape.stride - 1);  // next row to make
  for (int64_t out_row = out_rows.begin; out_row < out_rows.end; ++out_row) {
    const int64_t top = out_row * shape.stride - 1;
    for (; made <= top + 2 && made < shape.height; ++made) {
      make_row(made, ring + made % kRows * row_pitch + Ring::kPadding, pitch);
    }
    for (int64_t g = 0; g < group.panels; ++g) {
      const auto row_at = [&](int64_t row) {
        const bool inside = row >= 0 && row < shape.height;
        return (inside ? ring + row % kRows * row_pitch + g * pitch : zeros) + Ring::kPadding;
      };
      const Place* const rows[kRows] = {row_at(top), row_at(top + 1), row_at(top + 2)};
      const int64_t lanes = group.half && g + 1 == group.panels ? kPanel / 2 : kPanel;
      auto* const y = bytes(op.y) + (panel + g) * y_panel + out_row * out_width * kPanel;
      if (shape.stride == 1) {
        Ring::dw_row<1>(rows, filters[g], lanes, out_width, y);
      } else {
        Ring::dw_row<2>(rows, filters[g], lanes, out_width, y);
      }
    }
  }
}

}  // namespace snv2::cpu::SNV2_ISA::int8
