// Matrices on their way from L2 to the warps of stages.h, and their products.
//
// A CTA has some rows of an image and all channels, so that few of its warps use a tile of a
// matrix, and once. It is not loaded for all then: a warp has its own tiles copied to a ring of its
// own, in the order in which it will use them. Copies run while other phases do, from one unit to
// the next, and no other warp waits for them. A quad, up to four tiles of a row of tiles, is one
// copy.
#pragma once

#include <type_traits>

#include "cuda/stages_params.h"

namespace snv2::SNV2_GPU {

template <class T>
class WeightStream {
 public:
  static constexpr int kQuad = kQuadTiles * kTileElements<T>;

  // Starts the first copies, after a barrier that all threads of the CTA have to pass before.
  SNV2_DEVICE explicit WeightStream(const StagesParams<T>& params) : params_(params) {
    const Shared<T> ring =
        shared_memory().template as<T>() + warp_of_cta() * kRingTiles * kTileElements<T>;
    ring_ = ring;
    lane_ = Address<T>(ring + lane_of_warp() * 8);
    barriers_ =
        (shared_memory() + params.barriers_at).template as<uint64_t>() + warp_of_cta() * kRingQuads;
    if (lane_of_warp() == 0) {
      for (int i = 0; i < kRingQuads; ++i) barrier_init(barriers_ + i, 1);
    }
    fence_barrier_init();
    sync_warp();
    begin(params.start[warp_of_cta()]);
    for (int i = 0; i < kRingQuads; ++i) refill();
    turn_ = 0;
  }

  // Waits until the quad in use is there, or the one after it.
  SNV2_DEVICE void wait() const { barrier_wait(barriers_ + slot(), parity(turn_)); }
  SNV2_DEVICE void wait_next() const { barrier_wait(barriers_ + (slot() ^ 1), parity(turn_ + 1)); }
  // Loads a tile of the quad in use, or the first one of the quad after it.
  template <int kTile>
  SNV2_DEVICE void load(Tile<T>& tile) const {
    load_lane<kTile * kTileElements<T>>(tile, lane_ + slot() * kQuad);
  }
  SNV2_DEVICE void load_next(Tile<T>& tile) const {
    load_lane<0>(tile, lane_ + (slot() ^ 1) * kQuad);
  }
  // Has the quad in use replaced, after all lanes have loaded its tiles, and goes to the next one.
  SNV2_DEVICE void release() {
    sync_warp();
    refill();
  }

 private:
  static_assert(kRingQuads == 2);

  SNV2_DEVICE int slot() const { return static_cast<int>(turn_ & 1u); }
  SNV2_DEVICE static int parity(unsigned turn) { return static_cast<int>(turn >> 1 & 1u); }
  SNV2_DEVICE void refill() {
    const int tiles = left_ < kQuadTiles ? left_ : kQuadTiles;
    if (tiles > 0 && lane_of_warp() == 0) {
      const Shared<uint64_t> barrier = barriers_ + slot();
      const int bytes = tiles * static_cast<int>(kTileElements<T> * sizeof(T));
      barrier_expect(barrier, bytes);
      copy_bulk(ring_ + slot() * kQuad, next_, bytes, barrier);
    }
    ++turn_;
    left_ -= kQuadTiles;
    next_ = next_ + kQuad;
    if (left_ <= 0) next_job();
  }
  SNV2_DEVICE void next_job() {
    const StagedMatrix& m = params_.matrix[matrix_];
    job_ += kStagesWarps;
    if (job_ >= m.jobs) return begin(m.after[warp_of_cta()]);
    const int tile = job_ - m.column_of(job_) * m.tiles;
    start(m.weights + tile * m.deep * kTileElements<T>, m.deep);
  }
  SNV2_DEVICE void begin(int matrix) {
    const StagedMatrix& m = params_.matrix[matrix];
    matrix_ = matrix;
    job_ = m.first_job(warp_of_cta());
    start(m.begin[warp_of_cta()], m.deep);
  }
  SNV2_DEVICE void start(int weights, int deep) {
    next_ = Global<const T>{params_.weights} + weights;
    left_ = deep;
  }

  const StagesParams<T>& params_;
  Shared<T> ring_;
  Address<T> lane_;
  Shared<uint64_t> barriers_;
  unsigned turn_ = 0;     // quads before the one in use
  Global<const T> next_;  // to be copied next
  int left_ = 0;          // tiles from there on, of a row of tiles
  int matrix_ = 0, job_ = 0;
};

// The right operand of a product, of which a lane names a row of each tile: rows that follow each
// other, or planes that a table names. After the last tile there may be one more, which is not
// used.
template <class T>
class StraightRows {
 public:
  SNV2_DEVICE StraightRows(Shared<T> rows, int pitch)
      : line_(rows + (lane_of_warp() % 16 * pitch + lane_of_warp() / 16 * kBlock)),
        step_(16 * pitch) {}
  // Of tile `at` after the ones that were passed.
  SNV2_DEVICE Address<T> row(int at) const { return line_ + at * step_; }
  SNV2_DEVICE void pass(int tiles, bool more) {
    line_ = line_ + (more ? tiles : tiles - 1) * step_;
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
        planes_(planes + lane_of_warp() / 16 * kBlock),
        pitch_(pitch) {}
  SNV2_DEVICE Address<T> row(int at) const {
    return planes_ + load_vector<1>(table_ + at * 16).values[0] * pitch_;
  }
  SNV2_DEVICE void pass(int tiles, bool) { table_ = table_ + tiles * 16; }

 private:
  Address<int32_t> table_;
  Address<T> planes_;
  int pitch_;
};

// acc = start + a row of tiles of the stream's matrix x rows[all][kBlocks blocks of columns]. While
// a tile is multiplied, the next one is loaded.
template <int kBlocks, class T, class Rows>
SNV2_DEVICE void multiply_streamed(float (&acc)[1][kBlocks][4], WeightStream<T>& weights, Rows rows,
                                   const Start<1>& start, int deep) {
  Tile<T> a[2];
  uint32_t b[2][kBlocks][2];
  const auto load_rows = [&](auto to, int at) {
    constexpr int kTo = decltype(to)::value;
    const Address<T> row = rows.row(at);
    if constexpr (kBlocks == 1) {
      ldmatrix<2, true>(b[kTo][0], row);
    } else {
      const auto load_pair = [&](auto first) {
        constexpr int kFirst = decltype(first)::value;
        uint32_t pair[4];
        ldmatrix<4, true, kFirst * kBlock>(pair, row);
#pragma unroll
        for (int i = 0; i < 4; ++i) b[kTo][kFirst + i / 2][i % 2] = pair[i];
      };
      load_pair(std::integral_constant<int, 0>{});
      if constexpr (kBlocks == 4) load_pair(std::integral_constant<int, 2>{});
    }
  };
  const auto multiply = [&](auto from) {
    constexpr int kFrom = decltype(from)::value;
#pragma unroll
    for (int j = 0; j < kBlocks; ++j) mma(acc[0][j], a[kFrom], b[kFrom][j]);
  };
  constexpr std::integral_constant<int, 0> kEven{};
  constexpr std::integral_constant<int, 1> kOdd{};
  begin(acc, start);
  load_rows(kEven, 0);
  weights.wait();
  weights.template load<0>(a[0]);
#pragma unroll 1
  for (; deep >= kQuadTiles; deep -= kQuadTiles) {
    const bool more = deep > kQuadTiles;
    weights.template load<1>(a[1]);
    load_rows(kOdd, 1);
    multiply(kEven);
    weights.template load<2>(a[0]);
    load_rows(kEven, 2);
    multiply(kOdd);
    weights.template load<3>(a[1]);
    load_rows(kOdd, 3);
    multiply(kEven);
    rows.pass(kQuadTiles, more);
    load_rows(kEven, 0);
    if (more) {
      weights.wait_next();
      weights.load_next(a[0]);
    }
    multiply(kOdd);
    weights.release();
  }
  if (deep == 0) return;
  if (deep > 1) {
    weights.template load<1>(a[1]);
    load_rows(kOdd, 1);
  }
  multiply(kEven);
  if (deep > 2) {
    weights.template load<2>(a[0]);
    load_rows(kEven, 2);
  }
  if (deep > 1) multiply(kOdd);
  if (deep > 2) multiply(kEven);
  weights.release();
}

}  // namespace snv2::SNV2_GPU
