// The walk of the stem, act(conv3x3 stride 2) and maxpool3x3 stride 2, over strips of rows.
//
// The convolution's rows stay in scratch; only pooled rows are written.
#pragma once

#include <limits>

#include "cpu/simd.h"

namespace snv2::cpu::SNV2_ISA {

// Returns whether some results are below zero.
constexpr bool is_signed(Activation kind) {
  return kind != Activation::kRelu && kind != Activation::kRelu6;
}

// One pooled row of one panel from three rows with a pixel of padding at both ends.
template <bool kSigned>
void pool_row(const float* const (&rows)[3], int64_t width, Element* y) {
  const auto larger = [](Vec a, Vec b) { return kSigned ? max_any(a, b) : max_relu(a, b); };
  for (int v = 0; v < kVecs; ++v) {
    const int64_t lane = v * kLanes;
    const auto column = [&](int64_t x) {
      const int64_t at = x * kPanel + lane;
      return larger(larger(load(rows[0] + at), load(rows[1] + at)), load(rows[2] + at));
    };
    Vec left = column(0);
    for (int64_t x = 0; x < width; ++x) {
      const Vec right = column(2 * x + 2);
      store(y + x * kPanel + lane, larger(larger(left, column(2 * x + 1)), right));
      left = right;
    }
  }
}

// read(first, strip) fills the strip with rows [first, first + kStemInRows) of the input, and
// convolve(rows, out, panel pitch) makes a row of the convolution from the three input rows that
// begin at row `rows` of the strip.
template <class Read, class Convolve>
void run_stem(const Stem<Element>& op, Range out_rows, float* scratch, const Read& read,
              const Convolve& convolve) {
  const int64_t panels = panels_of(op.out_channels);
  const int64_t words = ceil_div(op.x.channels, kWordPlanes);
  const int64_t conv_pitch = (op.conv_width() + 2) * kPanel;  // one panel of one row
  const int64_t conv_row = panels * conv_pitch;
  const int64_t out_width = op.out_width();
  const bool with_sign = is_signed(op.act.kind);
  const float border = with_sign ? -std::numeric_limits<float>::infinity() : 0.0f;
  Element* const strip = reinterpret_cast<Element*>(scratch);
  float* const conv = scratch + stem_strip(words, op.x.width);

  for (int64_t begin = out_rows.begin; begin < out_rows.end; begin += kStemRows) {
    const int64_t end = begin + kStemRows < out_rows.end ? begin + kStemRows : out_rows.end;
    const int64_t first_conv = 2 * begin - 1;
    const int64_t conv_rows = 2 * (end - begin) + 1;

    // Read
    read(2 * first_conv - 1, strip);

    // Convolve; the last row of the strip before is the first of this one
    int64_t ready = 0;
    if (begin > out_rows.begin) {
      for (int64_t i = 0; i < conv_row; ++i) conv[i] = conv[2 * kStemRows * conv_row + i];
      ready = 1;
    }
    for (int64_t r = ready; r < conv_rows; ++r) {
      float* const out = conv + r * conv_row;
      const bool inside = first_conv + r >= 0 && first_conv + r < op.conv_height();
      for (int64_t panel = 0; panel < panels; ++panel) {
        float* const row = out + panel * conv_pitch;
        if (!inside) {
          for (int64_t i = 0; i < conv_pitch; ++i) row[i] = border;
          continue;
        }
        for (int64_t i = 0; i < kPanel; ++i) row[i] = row[conv_pitch - kPanel + i] = border;
      }
      if (inside) convolve(2 * r, out + kPanel, conv_pitch);
    }

    // Pool
    for (int64_t panel = 0; panel < panels; ++panel) {
      Element* const y = op.y + panel * op.out_height() * out_width * kPanel;
      for (int64_t row = begin; row < end; ++row) {
        const float* const top = conv + 2 * (row - begin) * conv_row + panel * conv_pitch;
        const float* const rows[3] = {top, top + conv_row, top + 2 * conv_row};
        if (with_sign) {
          pool_row<true>(rows, out_width, y + row * out_width * kPanel);
        } else {
          pool_row<false>(rows, out_width, y + row * out_width * kPanel);
        }
      }
    }
  }
}

}  // namespace snv2::cpu::SNV2_ISA
