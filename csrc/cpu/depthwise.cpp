// Depthwise 3x3 on panels, alone or behind the first product of a unit.
//
// The middle map of a unit is never written: for each group of panels, rows are made one at a
// time in a ring of three, with a pixel of zeros at both ends, and each new row completes one
// row of the depthwise result. Ring, weights and the row being read stay in L1.
#include "cpu/pointwise.h"
#include "cpu/simd.h"

namespace snv2::cpu::SNV2_ISA {
namespace {

// Pixels that keep the multiplier busy while an input is loaded once for its three taps.
constexpr int kPixels = kVectorBytes == 64 ? 7 : 4;

// Pixels [x, x + kCount) of an output row from three padded input rows, one vector of channels.
template <int kStride, int kCount>
SNV2_INLINE void dw_pixels(const float* const (&rows)[3], const float* weights, int64_t x,
                           Element* y) {
  Vec sums[kCount] = {};
  unroll<3>([&](auto row) SNV2_INLINED {
    Vec weight[3];
    unroll<3>([&](auto tap)
                  SNV2_INLINED { weight[tap] = load(weights + (row * 3 + tap + 1) * kPanel); });
    unroll<(kCount - 1) * kStride + 3>([&](auto column) SNV2_INLINED {
      const Vec in = load(rows[row] + (x * kStride + column) * kPanel);
      unroll<3>([&](auto tap) SNV2_INLINED {
        constexpr int kPixel = (column - tap) / kStride;
        if constexpr (column >= tap && (column - tap) % kStride == 0 && kPixel < kCount) {
          sums[kPixel] += in * weight[tap];
        }
      });
    });
  });
  const Vec bias = load(weights);
  unroll<kCount>([&](auto p) SNV2_INLINED { store(y + (x + p) * kPanel, sums[p] + bias); });
}

template <int kStride>
void dw_row(const float* const (&panel_rows)[3], const float* weights, int64_t width, Element* y) {
  for (int64_t lane = 0; lane < kPanel; lane += kLanes) {
    const float* rows[3] = {panel_rows[0] + lane, panel_rows[1] + lane, panel_rows[2] + lane};
    int64_t x = 0;
    for (; x + kPixels <= width; x += kPixels) {
      dw_pixels<kStride, kPixels>(rows, weights + lane, x, y + lane);
    }
    for (; x + 2 <= width; x += 2) dw_pixels<kStride, 2>(rows, weights + lane, x, y + lane);
    if (x < width) dw_pixels<kStride, 1>(rows, weights + lane, x, y + lane);
  }
}

void fill_zero(float* p, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = 0.0f;
}

// Rolls `group` panels of rows through the ring. make_row(row, out, panel pitch) writes input
// row `row` without its padding.
template <class F>
void roll_rows(const DepthwiseShape& shape, int64_t group, const float* dw_weights, Element* y,
               Range out_rows, float* scratch, const F& make_row) {
  const int64_t pitch = (shape.width + 2) * kPanel;  // one panel of one row
  const int64_t out_width = shape.out_width();
  const int64_t y_panel = shape.out_height() * out_width * kPanel;
  float* const zeros = scratch + 3 * group * pitch;
  fill_zero(zeros, pitch);
  for (int64_t i = 0; i < 3 * group; ++i) {
    fill_zero(scratch + i * pitch, kPanel);
    fill_zero(scratch + (i + 1) * pitch - kPanel, kPanel);
  }

  int64_t made = out_rows.begin * shape.stride - 1;  // next row to make
  if (made < 0) made = 0;
  for (int64_t out_row = out_rows.begin; out_row < out_rows.end; ++out_row) {
    const int64_t top = out_row * shape.stride - 1;
    for (; made <= top + 2 && made < shape.height; ++made) {
      make_row(made, scratch + (made % 3) * group * pitch + kPanel, pitch);
    }
    for (int64_t g = 0; g < group; ++g) {
      const float* rows[3];
      for (int64_t i = 0; i < 3; ++i) {
        const int64_t row = top + i;
        const bool inside = row >= 0 && row < shape.height;
        rows[i] = inside ? scratch + ((row % 3) * group + g) * pitch : zeros;
      }
      const float* weights = dw_weights + g * 10 * kPanel;
      Element* out = y + g * y_panel + out_row * out_width * kPanel;
      if (shape.stride == 1) {
        dw_row<1>(rows, weights, out_width, out);
      } else {
        dw_row<2>(rows, weights, out_width, out);
      }
    }
  }
}

}  // namespace

void expand_depthwise(const ExpandDepthwise<Element>& op, Range panels, Range out_rows,
                      float* scratch) {
  const DepthwiseShape& shape = op.shape;
  const int64_t y_panel = shape.out_height() * shape.out_width() * kPanel;
  for_groups(panels, op.pw1.outputs, [&](int64_t panel, Group group) {
    TileRow<Element, float> row{nullptr,      op.pw1.offsets,
                                op.pw1.depth, op.pw1.weights + panel * (op.pw1.depth + 1) * kPanel,
                                nullptr,      0};
    roll_rows(shape, group.panels, op.dw_weights + panel * 10 * kPanel, op.y + panel * y_panel,
              out_rows, scratch, [&](int64_t index, float* out, int64_t pitch) {
                row.x = op.pw1.x + index * shape.width * kPanel;
                row.y = out;
                row.y_panel = pitch;
                tile_row<kPanel>(row, group, shape.width, Epilogue::kStoreRelu);
              });
  });
}

void panel_depthwise(const PanelDepthwise<Element>& op, Range panels, Range out_rows,
                     float* scratch) {
  const DepthwiseShape& shape = op.shape;
  const int64_t x_panel = shape.height * shape.width * kPanel;
  const int64_t y_panel = shape.out_height() * shape.out_width() * kPanel;
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    const Element* x = op.x + op.panels[panel] * x_panel;
    roll_rows(shape, 1, op.dw_weights + panel * 10 * kPanel, op.y + panel * y_panel, out_rows,
              scratch, [&](int64_t index, float* out, int64_t) {
                const Element* in = x + index * shape.width * kPanel;
                for (int64_t i = 0; i < shape.width * kPanel; i += kLanes) {
                  store(out + i, load(in + i));
                }
              });
  }
}

}  // namespace snv2::cpu::SNV2_ISA
