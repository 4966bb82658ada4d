// Depthwise 3x3 on bytes, of rows that roll through a ring.
//
// As in cpu/depthwise_ring.h, rows of the middle map roll through a ring and are never written. In
// it four pixels of a plane are one word, so a product of four bytes takes the three taps of a row.
// Of four neighbouring results two have their taps in one word and two in two words; each has its
// own weights, shifted so that they meet their pixels:
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
#include <cstring>

#include "cpu/int8/tile.h"

namespace snv2::cpu::SNV2_ISA::int8 {

inline constexpr int kRows = 3;
inline constexpr int64_t kDepth = kRows * tap_words(kRows);  // words of a packed row of taps

// Quads of a row of the ring, with one of zeros at both ends.
constexpr int64_t quads_of(int64_t width) { return ceil_div(width, kQuad); }
constexpr int64_t ring_pitch(int64_t width) { return (quads_of(width) + 2) * kQuadBytes; }

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

// A row of results of a panel from three rows of the ring, which begin at their first quad.
template <int kStride>
void dw_row(const uint8_t* const* panel_rows, const float* packed, int64_t width, uint8_t* y) {
  for (int64_t lane = 0; lane < kPanel; lane += kLanes) {
    const uint8_t* const rows[kRows] = {panel_rows[0] + lane * kQuad, panel_rows[1] + lane * kQuad,
                                        panel_rows[2] + lane * kQuad};
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

// Rolls `group` panels of rows through the ring. make_row(row, out, panel pitch) writes the quads
// of input row `row`.
template <class F>
void roll_rows(const Depthwise<UInt8>& op, int64_t panel, int64_t group, Range out_rows,
               uint8_t* scratch, const F& make_row) {
  const DepthwiseShape& shape = op.shape;
  const int64_t pitch = ring_pitch(shape.width);  // one panel of one row
  const int64_t out_width = shape.out_width();
  const int64_t y_panel = shape.out_height() * out_width * kPanel;
  uint8_t* const zeros = scratch + kRows * group * pitch;
  std::memset(zeros, 0, pitch);
  for (int64_t i = 0; i < kRows * group; ++i) {
    std::memset(scratch + i * pitch, 0, kQuadBytes);
    std::memset(scratch + (i + 1) * pitch - kQuadBytes, 0, kQuadBytes);
  }
  int64_t made = std::max<int64_t>(0, out_rows.begin * shape.stride - 1);  // next row to make
  for (int64_t out_row = out_rows.begin; out_row < out_rows.end; ++out_row) {
    const int64_t top = out_row * shape.stride - 1;
    for (; made <= top + 2 && made < shape.height; ++made) {
      make_row(made, scratch + made % kRows * group * pitch + kQuadBytes, pitch);
    }
    for (int64_t g = 0; g < group; ++g) {
      const uint8_t* rows[kRows];
      for (int64_t i = 0; i < kRows; ++i) {
        const int64_t row = top + i;
        const bool inside = row >= 0 && row < shape.height;
        rows[i] = (inside ? scratch + (row % kRows * group + g) * pitch : zeros) + kQuadBytes;
      }
      const float* const packed = op.weights + (panel + g) * packed_panel(kDepth);
      auto* const y = bytes(op.y) + (panel + g) * y_panel + out_row * out_width * kPanel;
      if (shape.stride == 1) {
        dw_row<1>(rows, packed, out_width, y);
      } else {
        dw_row<2>(rows, packed, out_width, y);
      }
    }
  }
}

}  // namespace snv2::cpu::SNV2_ISA::int8
