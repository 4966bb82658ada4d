// What a unit loads, and what the CTAs of a cluster hand each other. unit.h puts it together.
#pragma once

#include <cstdint>

#include "cuda/unit_params.h"

namespace snv2::SNV2_GPU {

// Elements of a packed matrix.
template <class T>
SNV2_DEVICE int packed_count(int rows, int depth) {
  return units_of<16>(rows) * units_of<kTileDepth<T>>(depth) * kTileElements<T>;
}

// Starts the copy of a packed matrix, by all threads.
template <class T>
SNV2_DEVICE void load_matrix(Shared<T> to, const T* from, int elements) {
  constexpr int kVector = 16 / sizeof(T);
  for (int i = static_cast<int>(threadIdx.x) * kVector; i < elements;
       i += unit_threads() * kVector) {
    cp_async<kVector>(to + i, Global<const T>{from} + i);
  }
}

// The same of words; those of kVector are aligned together on both sides.
template <int kVector, class T>
SNV2_DEVICE void load_words(Shared<T> to, const T* from, int count) {
  static_assert(sizeof(T) == 4);
  const int whole = count / kVector * kVector, thread = static_cast<int>(threadIdx.x);
  for (int i = thread * kVector; i < whole; i += unit_threads() * kVector) {
    cp_async<kVector>(to + i, Global<const T>{from} + i);
  }
  if (kVector > 1 && whole + thread < count) {
    cp_async<1>(to + (whole + thread), Global<const T>{from} + (whole + thread));
  }
}

template <class T>
SNV2_DEVICE void zero_row(Shared<T> row, int count) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += unit_threads()) {
    store(row + i, rounded<T>(0.0f));
  }
}

// Load ------------------------------------------------------------------------------------------

// Which 16-byte vector of rows x `blocks` blocks of pixels item `i` is. Eight items are 8 rows
// (float32: 4) of a vector (of two): what their lanes store lies in different banks, and the blocks
// that a warp loads are whole sectors of each plane.
struct Place {
  int row, column;
};
template <class T>
SNV2_DEVICE Place place_of(int i, int group, int blocks) {
  constexpr int kRows = kGroupChannels<T>, kVector = 16 / static_cast<int>(sizeof(T));
  const int block = i / 8 - group * blocks;
  return {group * kRows + i % 8 % kRows, block * kBlock + i % 8 / kRows * kVector};
}
template <class T>
SNV2_DEVICE int places_of(int rows, int blocks) {
  return units_of<kGroupChannels<T>>(rows) * blocks * 8;
}

// Starts the copy of `blocks` blocks of pixels of the planes in `table`, from element `from` of the
// planes on, to columns `at`, at + 1, ... of X. In a ring a block is never cut.
template <class T>
SNV2_DEVICE void load_planes(const UnitParams<T>& params, const Memory<T>& m, Shared<int32_t> table,
                             int rows, int64_t from, int blocks, int at, int wrap) {
  constexpr int kVector = 16 / static_cast<int>(sizeof(T));
  const Global<const T> pixels = Global<const T>{params.in} + from;
  const int all = params.columns / kBlock, places = places_of<T>(rows, all);
  for (int i = static_cast<int>(threadIdx.x); i < places; i += unit_threads()) {
    const Place place = place_of<T>(i, params.by_blocks.divide(i / 8), all);
    if (place.row >= rows || place.column >= blocks * kBlock) continue;
    int column = at + place.column;
    if (column >= wrap) column -= wrap;
    cp_async<kVector>(m.x + (place.row * m.x_pitch + column),
                      pixels + (load(table + place.row) * params.in_channel + place.column));
  }
}

// The same from the caller's tensor, whatever its strides, from column `column0` of row `row0` of
// all images on; padding is zero.
template <class T>
SNV2_DEVICE void load_tensor(const UnitParams<T>& params, const Memory<T>& m, int row0, int column0,
                             int blocks, int at, int wrap) {
  const int columns = blocks * kBlock;
  const int image0 = row0 / params.height, y0 = row0 - image0 * params.height;
  const bool along_pixels = params.in_pixel == 1;
  const int outer = along_pixels ? params.in_channels : columns;
  const int inner = along_pixels ? columns : params.in_channels;
  for (int o = warp_of_cta(); o < outer; o += unit_warps()) {
    for (int i = lane_of_warp(); i < inner; i += kWarp) {
      const int row = along_pixels ? o : i, pixel = along_pixels ? i : o;
      const int rows = params.by_row.divide(column0 + pixel);
      const int x_of_pixel = column0 + pixel - rows * params.row;
      int64_t image = image0;
      int y = y0 + rows;
      while (y >= params.height) y -= params.height, ++image;
      T value = rounded<T>(0.0f);
      if (x_of_pixel < params.width) {
        value = load(Global<const T>{params.in} +
                     (load(m.in_table + row) * params.in_channel + image * params.in_image +
                      y * params.in_row + x_of_pixel * params.in_pixel));
      }
      int column = at + pixel;
      if (column >= wrap) column -= wrap;
      store(m.x + (row * m.x_pitch + column), value);
    }
  }
}

// Between the CTAs of a cluster -----------------------------------------------------------------

// A CTA's share of X, a run of rows, on its way from memory to all CTAs.
template <class T>
class Held {
 public:
  static constexpr int kMost = 3;  // vectors of a thread
  static constexpr int kVector = 16 / static_cast<int>(sizeof(T));

  SNV2_DEVICE Held(const UnitParams<T>& params, int rank) {
    const int begin = params.in_channels * rank / params.cluster;
    const int end = params.in_channels * (rank + 1) / params.cluster;
#pragma unroll
    for (int n = 0; n < kMost; ++n) {
      const int i = static_cast<int>(threadIdx.x) + n * unit_threads();
      const Place place = place_of<T>(i, params.by_blocks.divide(i / 8), params.columns / kBlock);
      const int row = begin + place.row;
      places_[n] = row << kBits | (row < end ? place.column : kNever);
    }
  }
  // Starts the loads of `blocks` blocks of columns, from element `from` of the planes on.
  SNV2_DEVICE void fetch(const UnitParams<T>& params, const Memory<T>& m, int64_t from,
                         int blocks) {
    const Global<const T> pixels = Global<const T>{params.in} + from;
#pragma unroll
    for (int n = 0; n < kMost; ++n) {
      if (column(n) >= blocks * kBlock) continue;
      const int64_t plane = load(m.in_table + (places_[n] >> kBits));
      vectors_[n] = load_vector<kVector>(pixels + (plane * params.in_channel + column(n)));
    }
  }
  SNV2_DEVICE void hand_out(const UnitParams<T>& params, const Memory<T>& m, int blocks) const {
    for (int r = 0; r < params.cluster; ++r) {
      const Remote<T> x = remote(m.x, r);
#pragma unroll
      for (int n = 0; n < kMost; ++n) {
        if (column(n) < blocks * kBlock)
          store_vector<kVector>(x + ((places_[n] >> kBits) * m.x_pitch + column(n)), vectors_[n]);
      }
    }
  }

 private:
  static constexpr int kBits = 12, kNever = (1 << kBits) - 1;  // more than a step's columns

  SNV2_DEVICE int column(int n) const { return places_[n] & kNever; }

  int places_[kMost];  // row and column of X; the column is kNever beyond the share
  Vector<T, kVector> vectors_[kMost];
};

// Copies this CTA's rows of DW to the others.
template <class T>
SNV2_DEVICE void hand_out_dw(const UnitParams<T>& params, const Memory<T>& m,
                             const Branch<T>& branch, int blocks, int rank) {
  constexpr int kVector = 16 / static_cast<int>(sizeof(T));
  const int places = places_of<T>(branch.mid, blocks);
  for (int i = static_cast<int>(threadIdx.x); i < places; i += unit_threads()) {
    const Place place = place_of<T>(i, i / 8 / blocks, blocks);
    if (place.row >= branch.mid) continue;
    const int at = (branch.first_depth + place.row) * m.dw_pitch + place.column;
    const Vector<T, kVector> v = load_vector<kVector>(m.dw + at);
    for (int r = 1; r < params.cluster; ++r) {
      const int other = rank + r < params.cluster ? rank + r : rank + r - params.cluster;
      store_vector<kVector>(remote(m.dw, other) + at, v);
    }
  }
}

}  // namespace snv2::SNV2_GPU
