// Rows of floats for depthwise 3x3, where no instruction multiplies bytes.
//
// Bytes are exact as floats, and so are sums of nine products (below 2^19), in any order. A
// multiply-add of floats takes one instruction for each tap; one pair of 16-bit products takes two,
// and both factors would have to be brought together first.
#pragma once

#include <cstring>

#include "cpu/int8/results.h"

namespace snv2::cpu::SNV2_ISA::int8 {

inline constexpr int kRows = 3;

// The numbers that bytes would hold.
struct ToRounded {
  float* y;
  int64_t y_panel;

  template <int kTilePixels, class O>
  SNV2_INLINE void put(Sums<kTilePixels, O>& values, int64_t pixel) const {
    values.each([&](auto& value, auto p, auto v) SNV2_INLINED {
      store(y + (pixel + p) * kPanel + O::at(v, y_panel), rounded_bytes(value));
    });
  }
};

// Rows of depthwise_ring.h as floats, and the convolution on them.
struct Ring {
  using Place = float;
  using To = ToRounded;
  static constexpr int64_t kPadding = kPanel;  // zeros at both ends of a row

  static constexpr int64_t pitch(int64_t width) { return (width + 2) * kPanel; }

  static void copy_row(const uint8_t* x, int64_t width, float* y) {
    for (int64_t i = 0; i < width * kPanel; i += kLanes) store(y + i, floats_of_bytes(x + i));
  }

  // The weights of a panel, tap by tap, and what follows them.
  struct Filter {
    alignas(64) float taps[kRows * kRows][kPanel];
    alignas(64) float multipliers[kPanel], offsets[kPanel];

    void fill(const float* packed) {
      std::memcpy(multipliers, packed, sizeof multipliers);
      std::memcpy(offsets, packed + kPanel, sizeof offsets);
      for (int64_t lane = 0; lane < kPanel; lane += kLanes) {
        unroll<kRows>([&](auto row) SNV2_INLINED {
          const Ints word = load_ints<Ints>(packed + (kRowsBefore + row) * kPanel + lane);
          unroll<kRows>([&](auto tap) SNV2_INLINED {
            store(taps[row * kRows + tap] + lane, floats_of(word << (24 - 8 * tap) >> 24));
          });
        });
      }
    }
  };

  // A row of results of the first `lanes` planes of a panel, from three rows that begin at their
  // first pixel.
  template <int kStride>
  static void dw_row(const float* const (&rows)[kRows], const Filter& filter, int64_t lanes,
                     int64_t width, uint8_t* y) {
    for (int64_t lane = 0; lane < lanes; lane += kLanes) {
      int64_t x = 0;
      for (; x + kQuad <= width; x += kQuad) {
        pixels<kStride, kQuad>(rows, filter, lane, x, y);
      }
      if (x == width) continue;
      // The last quad overlaps the one before.
      if (width >= kQuad) {
        pixels<kStride, kQuad>(rows, filter, lane, width - kQuad, y);
      } else {
        for (; x < width; ++x) pixels<kStride, 1>(rows, filter, lane, x, y);
      }
    }
  }

 private:
  template <int kStride, int kCount>
  static SNV2_INLINE void pixels(const float* const (&rows)[kRows], const Filter& filter,
                                 int64_t lane, int64_t x, uint8_t* y) {
    Vec sums[kCount] = {};
    unroll<kRows>([&](auto row) SNV2_INLINED {
      Vec weight[kRows];
      unroll<kRows>([&](auto tap) SNV2_INLINED {
        weight[tap] = load(filter.taps[row * kRows + tap] + lane);
      });
      const float* const first = rows[row] + (x * kStride - 1) * kPanel + lane;
      unroll<(kCount - 1) * kStride + kRows>([&](auto column) SNV2_INLINED {
        const Vec in = load(first + column * kPanel);
        unroll<kRows>([&](auto tap) SNV2_INLINED {
          constexpr int kPixel = (column - tap) / kStride;
          if constexpr (column >= tap && (column - tap) % kStride == 0 && kPixel < kCount) {
            sums[kPixel] += in * weight[tap];
          }
        });
      });
    });
    const Vec multiplier = load(filter.multipliers + lane), offset = load(filter.offsets + lane);
    Vec values[kQuad] = {};
    unroll<kCount>([&](auto p) SNV2_INLINED { values[p] = sums[p] * multiplier + offset; });
    store_pixels(y + x * kPanel + lane, values, kCount);
  }
};

}  // namespace snv2::cpu::SNV2_ISA::int8
