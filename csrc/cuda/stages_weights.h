// Matrices on their way from L2 to the warps of stages.h.
//
// Each tile of a matrix is used by few warps once (a CTA has some rows of an image, and all
// channels), so it is not loaded for all: a warp copies its own tiles, in the order in which it
// will use them, to a ring of its own, always kRingPairs pairs ahead. Copies go on while other
// phases run, from one unit to the next, and nobody else waits for them: lane l reads the 16 bytes
// that lane l copied.
#pragma once

#include "cuda/stages_params.h"

namespace snv2::SNV2_GPU {

template <class T>
class WeightStream {
 public:
  static constexpr int kPair = 2 * kTileElements<T>, kRing = kRingPairs * kPair;

  // Starts the copies of the first pairs.
  SNV2_DEVICE explicit WeightStream(const StagesParams<T>& params) : params_(params) {
    const Shared<T> ring = shared_memory().template as<T>() + warp_of_cta() * kRing;
    lane_ = Address<T>(ring + lane_of_warp() * 8);
    begin(0, 0, -kStagesWarps);
    next_job();
    for (int i = 0; i < kRingPairs; ++i) refill();
    at_ = 0;
  }

  // Waits for the first pair of a job.
  SNV2_DEVICE void wait_first() const { cp_async_wait<kRingPairs - 1>(); }
  // Waits for the pair after the one in use.
  SNV2_DEVICE void wait_next() const { cp_async_wait<kRingPairs - 2>(); }
  // Loads a tile of the pair in use, and the first one of the pair after it.
  template <int kTile>
  SNV2_DEVICE void load(Tile<T>& tile) const {
    load_lane<kTile * kTileElements<T>>(tile, lane_ + at_);
  }
  SNV2_DEVICE void load_next(Tile<T>& tile) const {
    load_lane<0>(tile, lane_ + ((at_ + kPair) & (kRing - 1)));
  }
  // Starts the copy of a pair into the place of the one in use, and goes to the next one.
  SNV2_DEVICE void refill() {
    if (left_ > 0) {
      cp_async<8>(lane_ + at_, next_);
      if (left_ > 1) cp_async<8, kTileElements<T>>(lane_ + at_, next_);
      next_ = next_ + kPair;
      left_ -= 2;
      if (left_ <= 0) next_job();
    }
    cp_async_commit();
    at_ = (at_ + kPair) & (kRing - 1);
  }

 private:
  static_assert((kRing & (kRing - 1)) == 0);

  SNV2_DEVICE const StagedMatrix& matrix() const {
    const StagedUnit& unit = params_.unit[unit_];
    return which_ == 0 ? unit.pw1 : which_ == 1 ? unit.pw2 : unit.projection;
  }
  SNV2_DEVICE void begin(int unit, int which, int before) {
    unit_ = unit, which_ = which;
    job_ = (warp_of_cta() - matrix().first + kStagesWarps) % kStagesWarps + before;
  }
  // Finds this warp's next job, of this matrix or of one after it; left_ stays 0 after the last.
  SNV2_DEVICE void next_job() {
    left_ = 0;
    job_ += kStagesWarps;
    while (job_ >= matrix().jobs) {
      const bool last = which_ == 2;
      if (last && unit_ + 1 == params_.units) return;
      begin(unit_ + (last ? 1 : 0), last ? 0 : which_ + 1, 0);
    }
    const StagedMatrix& m = matrix();
    const int tile = job_ - m.column_of(job_) * m.tiles;
    next_ = Global<const T>{params_.weights} +
            (m.weights + tile * m.deep * kTileElements<T> + lane_of_warp() * 8);
    left_ = m.deep;
  }

  const StagesParams<T>& params_;
  Address<T> lane_;
  int at_ = 0;  // elements of the ring to the pair in use
  Global<const T> next_;
  int left_ = 0;  // tiles of the row of tiles that is being copied
  int unit_ = 0, which_ = 0, job_ = 0;
};

// The right operand of a product, of which a lane names a row of each tile: rows that follow each
// other, or planes that a table names.
template <class T>
class StraightRows {
 public:
  SNV2_DEVICE StraightRows(Shared<T> rows, int pitch)
      : line_(rows + (lane_of_warp() % 16 * pitch + lane_of_warp() / 16 * kBlock)),
        step_(16 * pitch) {}
  template <int kTile>
  SNV2_DEVICE Address<T> next() {
    const Address<T> here = line_;
    line_ = line_ + step_;
    return here;
  }

 private:
  Address<T> line_;
  int step_;
};

template <class T>
class GatheredRows {
 public:
  SNV2_DEVICE GatheredRows(Shared<T> planes, int pitch, Shared<int32_t> table)
      : table_(table + lane_of_warp() % 16),
        lane_(planes + lane_of_warp() / 16 * kBlock),
        pitch_(pitch) {
    plane_[0] = load_vector<1, 0>(table_).values[0];
    plane_[1] = load_vector<1, 16>(table_).values[0];
  }
  // Of an even tile or an odd one. The plane of the one after the next is looked up.
  template <int kTile>
  SNV2_DEVICE Address<T> next() {
    const Address<T> here = lane_ + plane_[kTile] * pitch_;
    if constexpr (kTile == 0) {
      table_ = table_ + 32;
      plane_[0] = load_vector<1, 0>(table_).values[0];
    } else {
      plane_[1] = load_vector<1, 16>(table_).values[0];
    }
    return here;
  }

 private:
  Address<int32_t> table_;
  Address<T> lane_;
  int pitch_;
  int32_t plane_[2];
};

// acc = start + a row of tiles of the stream's matrix x rows[all][kBlocks blocks of columns].
template <int kBlocks, class T, class Rows>
SNV2_DEVICE void multiply_streamed(float (&acc)[1][kBlocks][4], WeightStream<T>& weights, Rows rows,
                                   const Start<1>& start, int deep) {
  constexpr int kPairs = (kBlocks + 1) / 2;
  Tile<T> a[2][1];
  uint32_t b[2][kPairs][4];
  const auto load_rows = [&](auto which) {
    constexpr int kTile = decltype(which)::value;
    const Address<T> row = rows.template next<kTile>();
    if constexpr (kBlocks == 1) {
      uint32_t block[2];
      ldmatrix<2, true>(block, row);
      b[kTile][0][0] = block[0], b[kTile][0][1] = block[1];
    } else {
      ldmatrix<4, true>(b[kTile][0], row);
      if constexpr (kPairs == 2) ldmatrix<4, true, 2 * kBlock>(b[kTile][1], row);
    }
  };
  const auto multiply = [&](auto which) {
    constexpr int kTile = decltype(which)::value;
#pragma unroll
    for (int j = 0; j < kBlocks; ++j) {
      const uint32_t block[2] = {b[kTile][j / 2][j % 2 * 2], b[kTile][j / 2][j % 2 * 2 + 1]};
      mma(acc[0][j], a[kTile][0], block);
    }
  };
  constexpr std::integral_constant<int, 0> kEven{};
  constexpr std::integral_constant<int, 1> kOdd{};
  begin(acc, start);
  weights.wait_first();
  weights.template load<0>(a[0][0]);
  load_rows(kEven);
#pragma unroll 1
  for (; deep > 2; deep -= 2) {
    weights.template load<1>(a[1][0]);
    load_rows(kOdd);
    multiply(kEven);
    weights.wait_next();
    weights.load_next(a[0][0]);
    load_rows(kEven);
    multiply(kOdd);
    weights.refill();
  }
  if (deep == 2) {
    weights.template load<1>(a[1][0]);
    load_rows(kOdd);
    multiply(kEven);
    multiply(kOdd);
  } else {
    multiply(kEven);
  }
  weights.refill();
}

}  // namespace snv2::SNV2_GPU
