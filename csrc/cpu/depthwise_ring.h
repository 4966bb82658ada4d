// Depthwise convolutions on rows of panels that roll through a ring.
//
// The middle map of a unit is never written: for each group of panels, rows are made one at a
// time in a ring as high as the window, with zeros at both ends, and each new row completes one
// row of the depthwise result. Ring, weights and the row being read stay in L1.
#pragma once

#include <algorithm>

#include "cpu/activation.h"
#include "cpu/simd.h"

namespace snv2::cpu::SNV2_ISA {

// Pixels that keep the multiplier busy while an input is loaded once for its taps in a row.
#if defined(SNV2_SMALL_TILES)
inline constexpr int kRowPixels = 3;
#elif defined(__AVX512F__) || defined(__aarch64__)
inline constexpr int kRowPixels = 7;  // of 32 registers
#else
inline constexpr int kRowPixels = 4;
#endif

// A window known at compile time, or any that `shape` tells.
inline constexpr int kAnyWindow = 0;

// Pixels [x, x + kCount) of an output row from padded input rows, one vector of channels.
template <int kWindow, int kStride, int kCount, class Out>
SNV2_INLINE void dw_pixels(const float* const* rows, const float* weights, const DepthwiseShape&,
                           int64_t x, Out* y) {
  Vec sums[kCount] = {};
  unroll<kWindow>([&](auto row) SNV2_INLINED {
    Vec weight[kWindow];
    unroll<kWindow>([&](auto tap) SNV2_INLINED {
      weight[tap] = load(weights + (row * kWindow + tap + 1) * kPanel);
    });
    unroll<(kCount - 1) * kStride + kWindow>([&](auto column) SNV2_INLINED {
      const Vec in = load(rows[row] + (x * kStride + column) * kPanel);
      unroll<kWindow>([&](auto tap) SNV2_INLINED {
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

// The same for any window and dilation.
template <int kStride, int kCount, class Out>
SNV2_INLINE void dw_pixels_any(const float* const* rows, const float* weights,
                               const DepthwiseShape& shape, int64_t x, Out* y) {
  Vec sums[kCount] = {};
  const float* w = weights + kPanel;
  for (int64_t row = 0; row < shape.window; ++row) {
    const float* in = rows[row] + x * kStride * kPanel;
    for (int64_t tap = 0; tap < shape.window; ++tap) {
      const Vec weight = load(w);
      unroll<kCount>([&](auto p)
                         SNV2_INLINED { sums[p] += load(in + p * kStride * kPanel) * weight; });
      w += kPanel;
      in += shape.dilation * kPanel;
    }
  }
  const Vec bias = load(weights);
  unroll<kCount>([&](auto p) SNV2_INLINED { store(y + (x + p) * kPanel, sums[p] + bias); });
}

template <int kWindow, int kStride, class Out>
void dw_row(const float* const* panel_rows, const float* weights, const DepthwiseShape& shape,
            int64_t width, Out* y) {
  constexpr int kRows = kWindow == kAnyWindow ? kMaxWindow : kWindow;
  const int64_t window = kWindow == kAnyWindow ? shape.window : kWindow;
  for (int64_t lane = 0; lane < kPanel; lane += kLanes) {
    const float* rows[kRows];
    for (int64_t i = 0; i < window; ++i) rows[i] = panel_rows[i] + lane;
    const auto pixels = [&](auto count, int64_t x) SNV2_INLINED {
      if constexpr (kWindow == kAnyWindow) {
        dw_pixels_any<kStride, count>(rows, weights + lane, shape, x, y + lane);
      } else {
        dw_pixels<kWindow, kStride, count>(rows, weights + lane, shape, x, y + lane);
      }
    };
    int64_t x = 0;
    for (; x + kRowPixels <= width; x += kRowPixels)
      pixels(std::integral_constant<int, kRowPixels>{}, x);
    for (; x + 2 <= width; x += 2) pixels(std::integral_constant<int, 2>{}, x);
    if (x < width) pixels(std::integral_constant<int, 1>{}, x);
  }
}

inline void fill_zero(float* p, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = 0.0f;
}

// Rolls `group` panels of rows, from `panel` on, through the ring. make_row(row, out, panel pitch)
// writes input row `row` without its padding.
template <int kWindow, class F>
void roll_rows(const Depthwise<Element>& op, int64_t panel, int64_t group, Range out_rows,
               float* scratch, const F& make_row) {
  constexpr int kRows = kWindow == kAnyWindow ? kMaxWindow : kWindow;
  const DepthwiseShape& shape = op.shape;
  const int64_t window = kWindow == kAnyWindow ? shape.window : kWindow;
  const int64_t dilation = kWindow == kAnyWindow ? shape.dilation : 1;
  const int64_t reach = kWindow == kAnyWindow ? shape.reach() : kWindow / 2;
  const int64_t ring = kWindow == kAnyWindow ? depthwise_rows(shape) : kWindow;
  const int64_t pitch = (shape.width + 2 * reach) * kPanel;  // one panel of one row
  const int64_t out_width = shape.out_width();
  const int64_t y_panel = shape.out_height() * out_width * kPanel;
  const float* const dw_weights = op.weights + panel * (window * window + 1) * kPanel;
  Element* const y = op.y + panel * y_panel;
  float* const zeros = scratch + ring * group * pitch;
  fill_zero(zeros, pitch);
  for (int64_t i = 0; i < ring * group; ++i) {
    fill_zero(scratch + i * pitch, reach * kPanel);
    fill_zero(scratch + (i + 1) * pitch - reach * kPanel, reach * kPanel);
  }

  int64_t made = out_rows.begin * shape.stride - reach;  // next row to make
  if (made < 0) made = 0;
  for (int64_t out_row = out_rows.begin; out_row < out_rows.end; ++out_row) {
    const int64_t top = out_row * shape.stride - reach;
    for (; made <= top + 2 * reach && made < shape.height; ++made) {
      make_row(made, scratch + (made % ring) * group * pitch + reach * kPanel, pitch);
    }
    for (int64_t g = 0; g < group; ++g) {
      const float* rows[kRows];
      for (int64_t i = 0; i < window; ++i) {
        const int64_t row = top + i * dilation;
        const bool inside = row >= 0 && row < shape.height;
        rows[i] = inside ? scratch + ((row % ring) * group + g) * pitch : zeros;
      }
      const float* weights = dw_weights + g * (window * window + 1) * kPanel;
      const auto run = [&](auto* out) {
        if (shape.stride == 1) {
          dw_row<kWindow, 1>(rows, weights, shape, out_width, out);
        } else {
          dw_row<kWindow, 2>(rows, weights, shape, out_width, out);
        }
      };
      Element* out = y + g * y_panel + out_row * out_width * kPanel;
      if (op.act.kind == Activation::kIdentity) {
        run(out);
      } else {
        float* const raw = zeros + pitch;
        run(raw);
        activate(op.act.from_panel(panel + g), 1, raw, 0, out_width, out, 0);
      }
    }
  }
}

// f(constant) of the window, if it is one of those that are compiled.
template <class F>
SNV2_INLINE void with_window(const DepthwiseShape& shape, const F& f) {
  switch (shape.dilation == 1 ? shape.window : kAnyWindow) {
    case 3:
      return f(std::integral_constant<int, 3>{});
    case 5:
      return f(std::integral_constant<int, 5>{});
    case 7:
      return f(std::integral_constant<int, 7>{});
    default:
      return f(std::integral_constant<int, kAnyWindow>{});
  }
}

}  // namespace snv2::cpu::SNV2_ISA
