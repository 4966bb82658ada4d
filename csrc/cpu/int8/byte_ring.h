// Rows of bytes for depthwise 3x3, where an instruction multiplies four bytes with four others.
//
// Four pixels of a plane are one word, so a product of four bytes takes the three taps of a row. Of
// four neighbouring results two have their taps in one word and two in two words; each has its own
// weights, shifted so that they meet their pixels:
//
//   word b - 1   word b       word b + 1
//   0 0 0 w0     w1 w2 0 0                  pixel 4b
//                w0 w1 w2 0                 pixel 4b + 1
//                0 w0 w1 w2                 pixel 4b + 2
//                0 0 w0 w1    w2 0 0 0      pixel 4b + 3
//
// At stride 2 results 2b and 2b + 1 are those of pixels 4b and 4b + 2.
#pragma once

#include <algorithm>

#include "cpu/int8/results.h"

namespace snv2::cpu::SNV2_ISA::int8 {

// Bytes in quads of pixels; a last quad is filled with zeros.
struct ToQuads {
  uint8_t* y;
  int64_t y_panel;

  template <int kTilePixels, class O>
  SNV2_INLINE void put(Sums<kTilePixels, O>& values, int64_t pixel) const {
    each_quad(values, [&](auto v, auto first, auto& pixels) SNV2_INLINED {
      store_quad(y + (pixel + first) * kPanel + O::panel_of(v) * y_panel + O::at(v, 0) * kQuad,
                 pixels);
    });
  }
};

inline constexpr int kRows = 3;

// Taps of a row, moved `kPixels` pixels to the right in their word, or to the left.
template <int kPixels>
SNV2_INLINE Ints moved(Ints taps) {
  if constexpr (kPixels < 0) {
    return (Ints)((VecBits)taps >> (-8 * kPixels));
  } else {
    return (Ints)((VecBits)taps << (8 * kPixels));
  }
}

// Weights of a row for each place of a result in its word.
struct RowTaps {
  Weights<Ints> before[2];  // of pixel 0: in the word before, and in its own
  Weights<Ints> inside[2];  // of pixels 1 and 2
  Weights<Ints> after[2];   // of pixel 3: in its own word, and in the next
};

template <int kStride>
SNV2_INLINE void load_taps(const float* words, RowTaps& taps) {
  const Ints w = load_ints<Ints>(words);
  taps.before[0] = weights(moved<3>(w));
  taps.before[1] = weights(moved<-1>(w));
  taps.inside[1] = weights(moved<1>(w));
  if constexpr (kStride == 1) {
    taps.inside[0] = weights(w);
    taps.after[0] = weights(moved<2>(w));
    taps.after[1] = weights(moved<-2>(w));
  }
}

SNV2_INLINE Planes<Ints> quad_at(const uint8_t* row, int64_t quad) {
  return planes(load_ints<Ints>(row + quad * kQuadBytes));
}

// Sums of the results of quad `quad`, four at stride 1 and two at stride 2.
template <int kStride>
SNV2_INLINE void quad_sums(const uint8_t* const (&rows)[kRows], const RowTaps (&taps)[kRows],
                           int64_t quad, Ints* sums) {
  unroll<kRows>([&](auto r) SNV2_INLINED {
    const auto own = quad_at(rows[r], quad);
    dot(quad_at(rows[r], quad - 1), taps[r].before[0], sums[0]);
    dot(own, taps[r].before[1], sums[0]);
    if constexpr (kStride == 1) {
      dot(own, taps[r].inside[0], sums[1]);
      dot(own, taps[r].inside[1], sums[2]);
      dot(own, taps[r].after[0], sums[3]);
      dot(quad_at(rows[r], quad + 1), taps[r].after[1], sums[3]);
    } else {
      dot(own, taps[r].inside[1], sums[1]);
    }
  });
}

// Rows of depthwise_ring.h as words of four pixels, and the convolution on them.
struct Ring {
  using Place = uint8_t;
  using To = ToQuads;
  static constexpr int64_t kPadding = kQuadBytes;  // zeros at both ends of a row

  static constexpr int64_t pitch(int64_t width) {
    return ceil_div(width, kQuad) * kQuadBytes + 2 * kPadding;
  }

  static void copy_row(const uint8_t* x, int64_t width, uint8_t* y) {
    for (int64_t i = 0; i < width; i += kQuad) {
      copy_quad(y + i * kPanel, x + i * kPanel, width - i);
    }
  }

  // The packed weights of a panel.
  struct Filter {
    const float* packed = nullptr;

    void fill(const float* panel) { packed = panel; }
  };

  // A row of results of the first `lanes` planes of a panel, from three rows that begin at their
  // first quad.
  template <int kStride>
  static void dw_row(const uint8_t* const (&panel_rows)[kRows], const Filter& filter, int64_t lanes,
                     int64_t width, uint8_t* y) {
    const float* const packed = filter.packed;
    for (int64_t lane = 0; lane < lanes; lane += kLanes) {
      const uint8_t* const rows[kRows] = {
          panel_rows[0] + lane * kQuad, panel_rows[1] + lane * kQuad, panel_rows[2] + lane * kQuad};
      RowTaps taps[kRows];
      unroll<kRows>([&](auto r) SNV2_INLINED {
        load_taps<kStride>(packed + lane + (kRowsBefore + r) * kPanel, taps[r]);
      });
      const Vec multiplier = load(packed + lane), offset = load(packed + kPanel + lane);
      const Ints first = first_sums<Ints>(packed + 2 * kPanel + lane);
      for (int64_t x = 0; x < width; x += kQuad) {
        Ints sums[kQuad] = {first, first, first, first};
        if constexpr (kStride == 1) {
          quad_sums<1>(rows, taps, x / kQuad, sums);
        } else {
          quad_sums<2>(rows, taps, x / 2, sums);
          // There is no second quad where its results are beyond the row.
          if (x + 2 < width) quad_sums<2>(rows, taps, x / 2 + 1, sums + 2);
        }
        Vec values[kQuad];
        unroll<kQuad>([&](auto p)
                          SNV2_INLINED { values[p] = floats_of(sums[p]) * multiplier + offset; });
        store_pixels(y + x * kPanel + lane, values,
                     static_cast<int>(std::min<int64_t>(kQuad, width - x)));
      }
    }
  }
};

}  // namespace snv2::cpu::SNV2_ISA::int8
