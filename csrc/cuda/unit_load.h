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

// Starts the copy of a packed matrix, by all threads: a warp takes runs of 2 KB.
template <class T>
SNV2_DEVICE void load_matrix(Shared<T> to, const T* from, int elements) {
  constexpr int kVector = 16 / static_cast<int>(sizeof(T)), kOfWarp = kWarp * kVector;
  constexpr int kRun = 4 * kOfWarp;
  const int runs = static_cast<int>(static_cast<unsigned>(elements) / unsigned{kRun});
  const int stride = unit_warps() * kRun;
  int at = warp_of_cta() * kRun + lane_of_warp() * kVector;
  for (int run = warp_of_cta(); run < runs; run += unit_warps(), at += stride) {
    const Shared<T> there = to + at;
    const Global<const T> source = Global<const T>{from} + at;
    cp_async<kVector, 0 * kOfWarp>(there, source);
    cp_async<kVector, 1 * kOfWarp>(there, source);
    cp_async<kVector, 2 * kOfWarp>(there, source);
    cp_async<kVector, 3 * kOfWarp>(there, source);
  }
  at = runs * kRun + static_cast<int>(threadIdx.x) * kVector;
  if (at < elements) cp_async<kVector>(to + at, Global<const T>{from} + at);
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

// Starts the copy of a table of rows. Entries of rows that a tile has beyond the last one are any
// that may be read.
SNV2_DEVICE void load_table(Shared<int32_t> to, const int32_t* from, int rows) {
  const int padded = units_of<16>(rows) * 16;
  for (int i = static_cast<int>(threadIdx.x); i < padded; i += unit_threads()) {
    if (i < rows) {
      cp_async<1>(to + i, Global<const int32_t>{from} + i);
    } else {
      store(to + i, 0);
    }
  }
}

template <class T>
SNV2_DEVICE void zero_row(Shared<T> row, int count) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += unit_threads()) {
    store(row + i, rounded<T>(0.0f));
  }
}

// Load ------------------------------------------------------------------------------------------

// How warps share the 16-byte vectors of rows of pixels: a part is eight rows (float32: four) of a
// quad of blocks, where lanes 0 to 7 have the first block of each row (float32: two vectors of it),
// and so on. What eight lanes store lies in different banks, and what a warp loads are whole
// sectors of each plane.
constexpr int kQuad = 4;

constexpr int64_t quads_of(int64_t blocks) { return ceil_div(blocks, kQuad); }

template <class T>
struct LaneOfPart {
  static constexpr int kRows = kGroupChannels<T>, kVector = 16 / static_cast<int>(sizeof(T));
  int row = lane_of_warp() % 8 % kRows;
  int column = lane_of_warp() / 8 * kBlock + lane_of_warp() % 8 / kRows * kVector;
};

// Calls begin(row) and then with(column) for this lane's vectors of that row. A warp takes all of
// eight rows.
template <class T, class Begin, class With>
SNV2_DEVICE void for_vectors(int rows, int blocks, const Begin& begin, const With& with) {
  const LaneOfPart<T> lane;
  for (int first = warp_of_cta() * lane.kRows; first < rows; first += unit_warps() * lane.kRows) {
    if (first + lane.row >= rows) continue;
    begin(first + lane.row);
    for (int column = lane.column; column < blocks * kBlock; column += kQuad * kBlock) {
      with(column);
    }
  }
}

// Starts copies of planes to X, of two rows of a lane at a time. kHolds: the planes of the first
// two stay in registers, where nothing waits for the table.
template <class T, bool kHolds>
class PlaneLoads {
 public:
  SNV2_DEVICE PlaneLoads(Shared<int32_t> table, int rows) : table_(table), rows_(rows) {
    if constexpr (kHolds) look_up(held_, warp_of_cta());
  }
  // Starts the copy of `blocks` blocks of pixels, from element `from` of the planes on, to columns
  // `at`, at + 1, ... of X. In a ring a block is never cut.
  SNV2_DEVICE void start(const UnitParams<T>& params, const Memory<T>& m, int64_t from, int blocks,
                         int at, int wrap) const {
    const Global<const T> pixels = Global<const T>{params.in} + from;
    int group = warp_of_cta();
    if constexpr (kHolds) {
      start_rows(params, m, pixels, blocks, at, wrap, group, held_);
      group += 2 * unit_warps();
    }
    for (; group * kGroup < rows_; group += 2 * unit_warps()) {
      int32_t planes[2];
      look_up(planes, group);
      start_rows(params, m, pixels, blocks, at, wrap, group, planes);
    }
  }

 private:
  static constexpr int kGroup = LaneOfPart<T>::kRows, kVector = 16 / static_cast<int>(sizeof(T));

  // This lane's row of a group, and of the one that the warp takes after it.
  SNV2_DEVICE int row_of(int group, int k) const {
    return (group + k * unit_warps()) * kGroup + lane_.row;
  }
  SNV2_DEVICE void look_up(int32_t (&planes)[2], int group) const {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int row = row_of(group, k);
      planes[k] = row < rows_ ? load(table_ + row) : 0;
    }
  }
  SNV2_DEVICE void start_rows(const UnitParams<T>& params, const Memory<T>& m,
                              Global<const T> pixels, int blocks, int at, int wrap, int group,
                              const int32_t (&planes)[2]) const {
    Global<const T> source[2] = {pixels, pixels};
    Address<T> to[2] = {Address<T>(m.x), Address<T>(m.x)};
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      source[k] = pixels + (static_cast<uint32_t>(planes[k]) * params.in_channel + lane_.column);
      to[k] = to[k] + row_of(group, k) * m.x_pitch;
    }
    const int end = row_of(group, 0) < rows_ ? blocks * kBlock : 0;
    const bool second = row_of(group, 1) < rows_;
#pragma unroll 1
    for (int column = lane_.column; column < end; column += kQuad * kBlock) {
      const int there = at + column < wrap ? at + column : at + column - wrap;
      cp_async<kVector>(to[0] + there, source[0]);
      if (second) cp_async<kVector>(to[1] + there, source[1]);
#pragma unroll
      for (int k = 0; k < 2; ++k) source[k] = source[k] + kQuad * kBlock;
    }
  }

  Shared<int32_t> table_;
  int rows_;
  LaneOfPart<T> lane_;
  int32_t held_[2];
};

// Between the CTAs of a cluster -----------------------------------------------------------------

// A CTA's share of X, a run of rows, on its way from memory to all CTAs. A warp has up to kMost
// parts of it in registers.
template <class T>
class Held {
 public:
  static constexpr int kMost = 3;

  static constexpr int64_t parts(int64_t rows, int64_t columns) {
    return ceil_div(rows, kGroupChannels<T>) * quads_of(columns / kBlock);
  }

  SNV2_DEVICE Held(const UnitParams<T>& params, int rank) {
    const int begin = (params.in_channels * rank) >> params.cluster_log2;
    const int end = (params.in_channels * (rank + 1)) >> params.cluster_log2;
    const LaneOfPart<T> lane;
    const int quads = units_of<kQuad>(params.columns / kBlock);
#pragma unroll
    for (int n = 0; n < kMost; ++n) {
      const int part = warp_of_cta() + n * unit_warps();
      const int group = params.by_quads.divide(part);
      const int row = begin + group * lane.kRows + lane.row;
      row_[n] = row;
      column_[n] = row < end ? (part - group * quads) * kQuad * kBlock + lane.column : kNever;
    }
  }
  // Starts the loads of `blocks` blocks of columns, from element `from` of the planes on.
  SNV2_DEVICE void fetch(const UnitParams<T>& params, const Memory<T>& m, int64_t from,
                         int blocks) {
    const Global<const T> pixels = Global<const T>{params.in} + from;
#pragma unroll
    for (int n = 0; n < kMost; ++n) {
      if (column_[n] >= blocks * kBlock) continue;
      const int64_t plane = load(m.in_table + row_[n]);
      vectors_[n] = load_vector<kVector>(pixels + (plane * params.in_channel + column_[n]));
    }
  }
  SNV2_DEVICE void hand_out(const UnitParams<T>& params, const Memory<T>& m, int blocks) const {
#pragma unroll
    for (int n = 0; n < kMost; ++n) {
      if (column_[n] >= blocks * kBlock) continue;
      const int at = row_[n] * m.x_pitch + column_[n];
      for (int r = 0; r < params.cluster; ++r) {
        store_vector<kVector>(remote(m.x, r) + at, vectors_[n]);
      }
    }
  }

 private:
  static constexpr int kVector = 16 / static_cast<int>(sizeof(T)), kNever = 1 << 30;

  int row_[kMost], column_[kMost];  // of X; the column is kNever beyond the share
  Vector<T, kVector> vectors_[kMost];
};

// Copies this CTA's rows of DW to the others.
template <class T>
SNV2_DEVICE void hand_out_dw(const UnitParams<T>& params, const Memory<T>& m,
                             const Branch<T>& branch, int blocks, int rank) {
  constexpr int kVector = 16 / static_cast<int>(sizeof(T));
  int line = 0;
  for_vectors<T>(
      branch.mid, blocks, [&](int row) { line = (branch.first_depth + row) * m.dw_pitch; },
      [&](int column) {
        const Vector<T, kVector> v = load_vector<kVector>(m.dw + (line + column));
        for (int r = 1; r < params.cluster; ++r) {
          const int other = (rank + r) & (params.cluster - 1);
          store_vector<kVector>(remote(m.dw, other) + (line + column), v);
        }
      });
}

}  // namespace snv2::SNV2_GPU
