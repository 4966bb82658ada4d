// What a unit loads, and what the CTAs of a cluster hand each other. unit.h puts it together.
#pragma once

#include <cstdint>

#include "cuda/unit_params.h"

namespace snv2::SNV2_GPU {

// Starts the copy of a packed matrix, by all threads.
template <class T>
SNV2_DEVICE void load_matrix(Shared<T> to, const T* from, int elements) {
  constexpr int kVector = 16 / sizeof(T);
  for (int i = static_cast<int>(threadIdx.x) * kVector; i < elements; i += kUnitThreads * kVector) {
    cp_async<kVector>(to + i, Global<const T>{from} + i);
  }
}

template <class T>
SNV2_DEVICE void load_words(Shared<T> to, const T* from, int count) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kUnitThreads) {
    store(to + i, load(Global<const T>{from} + i));
  }
}

template <class T>
SNV2_DEVICE void zero_row(Shared<T> row, int count) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kUnitThreads) {
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
  return (rows + kGroupChannels<T> - 1) / kGroupChannels<T> * blocks * 8;
}

// Starts the copy of `blocks` blocks of pixels of the planes in `table`, from element `from` of the
// planes on, to columns `at`, at + 1, ... of X. In a ring a block is never cut.
template <class T>
SNV2_DEVICE void load_planes(const UnitParams<T>& params, const Memory<T>& m, Shared<int32_t> table,
                             int rows, int64_t from, int blocks, int at, int wrap) {
  constexpr int kVector = 16 / static_cast<int>(sizeof(T));
  const Global<const T> pixels = Global<const T>{params.in} + from;
  const int all = params.columns / kBlock, places = places_of<T>(rows, all);
  for (int i = static_cast<int>(threadIdx.x); i < places; i += kUnitThreads) {
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
  for (int o = warp_of_cta(); o < outer; o += kUnitWarps) {
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

// A CTA's share of X on its way from memory to all CTAs: a run of rows.
template <class T>
constexpr int kHeld = sizeof(T) == 4 ? 6 : 8;  // vectors of a thread

template <class T>
struct Held {
  Vector<T, 16 / sizeof(T)> vectors[kHeld<T>];
};

// Calls f(n, row, first column) for the vectors that this thread has of its CTA's share of X.
template <class T, class F>
SNV2_DEVICE void for_each_held(const UnitParams<T>& params, int blocks, int rank, const F& f) {
  const int begin = params.in_channels * rank / params.cluster;
  const int end = params.in_channels * (rank + 1) / params.cluster;
#pragma unroll
  for (int n = 0; n < kHeld<T>; ++n) {
    const int i = static_cast<int>(threadIdx.x) + n * kUnitThreads;
    const Place place = place_of<T>(i, params.by_blocks.divide(i / 8), params.columns / kBlock);
    if (begin + place.row < end && place.column < blocks * kBlock) {
      f(n, begin + place.row, place.column);
    }
  }
}

template <class T>
SNV2_DEVICE void fetch(const UnitParams<T>& params, const Memory<T>& m, int64_t from, int blocks,
                       int rank, Held<T>& held) {
  const Global<const T> pixels = Global<const T>{params.in} + from;
  for_each_held(params, blocks, rank, [&](int n, int row, int column) {
    held.vectors[n] =
        load_vector<16 / sizeof(T)>(pixels + (load(m.in_table + row) * params.in_channel + column));
  });
}

template <class T>
SNV2_DEVICE void hand_out(const UnitParams<T>& params, const Memory<T>& m, int blocks, int rank,
                          const Held<T>& held) {
  for (int r = 0; r < params.cluster; ++r) {
    const Shared<T> x = remote(m.x, r);
    for_each_held(params, blocks, rank, [&](int n, int row, int column) {
      store_vector<16 / sizeof(T)>(x + (row * m.x_pitch + column), held.vectors[n]);
    });
  }
}

// Copies this CTA's rows of DW to the others.
template <class T>
SNV2_DEVICE void hand_out_dw(const UnitParams<T>& params, const Memory<T>& m,
                             const Branch<T>& branch, int blocks, int rank) {
  constexpr int kVector = 16 / static_cast<int>(sizeof(T));
  const int places = places_of<T>(branch.mid, blocks);
  for (int i = static_cast<int>(threadIdx.x); i < places; i += kUnitThreads) {
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
