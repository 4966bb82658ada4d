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
  SNV2_DEVICE WeightStream(const StagesParams<T>& params, int warp) : params_(params), warp_(warp) {
    const Shared<T> ring = shared_memory().template as<T>() + warp_ * kRingTiles * kTileElements<T>;
    ring_ = ring;
    lane_ = Address<T>(ring + lane_of_warp() * 8);
    barriers_ = (shared_memory() + params.barriers_at).template as<uint64_t>() + warp_ * kRingQuads;
    if (lane_of_warp() == 0) {
      for (int i = 0; i < kRingQuads; ++i) barrier_init(barriers_ + i, 1);
    }
    fence_barrier_init();
    sync_warp();
    begin(params.start[warp_]);
    for (int i = 0; i < kRingQuads; ++i) refill();
    turn_ = 0;
  }

  // Waits for the quad in use, or for the one after it.
  SNV2_DEVICE void wait() const { barrier_wait(barriers_ + slot(), parity(turn_)); }
  SNV2_DEVICE void wait_next() const { barrier_wait(barriers_ + (slot() ^ 1), parity(turn_ + 1)); }
  // The lane's part of the quad in use, or of the one after it.
  SNV2_DEVICE Address<T> quad() const { return lane_ + slot() * kQuad; }
  SNV2_DEVICE Address<T> next_quad() const { return lane_ + (slot() ^ 1) * kQuad; }
  // Has quads in use replaced, after all lanes have loaded their tiles, and goes to the next one.
  SNV2_DEVICE void release(int quads = 1) {
    if (quads == 0) return;
    sync_warp();
    refill();
    if (quads > 1) refill();
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
    if (job_ >= m.jobs) return begin(m.after[warp_]);
    const int tile = job_ - m.column_of(job_) * m.tiles;
    start(m.weights + tile * m.deep * kTileElements<T>, m.deep);
  }
  SNV2_DEVICE void begin(int matrix) {
    const StagedMatrix& m = params_.matrix[matrix];
    matrix_ = matrix;
    job_ = m.first_job(warp_);
    start(m.begin[warp_], m.deep);
  }
  SNV2_DEVICE void start(int weights, int deep) {
    next_ = Global<const T>{params_.weights} + weights;
    left_ = deep;
  }

  const StagesParams<T>& params_;
  int warp_;
  Shared<T> ring_;
  Address<T> lane_;
  Shared<uint64_t> barriers_;
  unsigned turn_ = 0;     // quads before the one in use
  Global<const T> next_;  // to be copied next
  int left_ = 0;          // tiles from there on, of a row of tiles
  int matrix_ = 0, job_ = 0;
};

// The right operand of a product, of which a lane names a row of each tile: rows that follow each
// other, or planes that a table names.
template <class T>
class StraightRows {
 public:
  SNV2_DEVICE StraightRows(Shared<T> rows, int pitch)
      : line_(rows + (lane_of_warp() % 16 * pitch + lane_of_warp() / 16 * kBlock)),
        step_(16 * pitch) {}
  // Returns the lane's row of tile `at` of a quad.
  SNV2_DEVICE Address<T> row(int at) const { return line_ + at * step_; }
  SNV2_DEVICE void next_quad() { line_ = line_ + kQuadTiles * step_; }

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
  SNV2_DEVICE void next_quad() { table_ = table_ + kQuadTiles * 16; }

 private:
  Address<int32_t> table_;
  Address<T> planes_;
  int pitch_;
};

// acc = start + a row of tiles of the stream's matrix x rows[all][kBlocks blocks of columns]. While
// a tile is multiplied, the next one is loaded. Up to two quads are used where they are, and
// released by who calls; of more each makes place for another one.
template <int kBlocks, class T, class Rows>
class StreamedProduct {
 public:
  SNV2_DEVICE StreamedProduct(WeightStream<T>& weights, const Rows& rows)
      : weights_(weights), rows_(rows) {}

  SNV2_DEVICE void run(float (&acc)[kBlocks][4], const Start<1>& start, int deep) {
    const bool stays = deep <= kRingTiles;
    load_rows<0>(0);
    weights_.wait();
    Address<T> quad = weights_.quad();
    load_lane<0>(a_[0], quad);
    if (deep > 1) load<1>(quad);
#pragma unroll
    for (int j = 0; j < kBlocks; ++j) mma(acc[j], a_[0], b_[0][j], start.rows[0]);
    // The first tile of the quad is done, and the second one, if there is one, loaded.
#pragma unroll 1
    for (; deep > kQuadTiles; deep -= kQuadTiles) {
      load<2>(quad);
      multiply<1>(acc);
      load<3>(quad);
      multiply<0>(acc);
      rows_.next_quad();
      load_rows<0>(0);
      weights_.wait_next();
      quad = weights_.next_quad();
      load_lane<0>(a_[0], quad);
      multiply<1>(acc);
      if (deep > kQuadTiles + 1) load<1>(quad);
      multiply<0>(acc);
      if (!stays) weights_.release();
    }
    if (deep > 2) load<2>(quad);
    if (deep > 1) multiply<1>(acc);
    if (deep > 3) load<3>(quad);
    if (deep > 2) multiply<0>(acc);
    if (deep > 3) multiply<1>(acc);
  }

 private:
  template <int kTile>
  SNV2_DEVICE void load(Address<T> quad) {
    load_lane<kTile * kTileElements<T>>(a_[kTile % 2], quad);
    load_rows<kTile % 2>(kTile);
  }
  template <int kTo>
  SNV2_DEVICE void load_rows(int at) {
    const Address<T> row = rows_.row(at);
    if constexpr (kBlocks == 1) {
      ldmatrix<2, true>(b_[kTo][0], row);
    } else {
      load_pair<kTo, 0>(row);
      if constexpr (kBlocks == 4) load_pair<kTo, 2>(row);
    }
  }
  template <int kTo, int kFirst>
  SNV2_DEVICE void load_pair(Address<T> row) {
    uint32_t pair[4];
    ldmatrix<4, true, kFirst * kBlock>(pair, row);
#pragma unroll
    for (int i = 0; i < 4; ++i) b_[kTo][kFirst + i / 2][i % 2] = pair[i];
  }
  template <int kFrom>
  SNV2_DEVICE void multiply(float (&acc)[kBlocks][4]) {
#pragma unroll
    for (int j = 0; j < kBlocks; ++j) mma(acc[j], a_[kFrom], b_[kFrom][j]);
  }

  WeightStream<T>& weights_;
  Rows rows_;
  Tile<T> a_[2];
  uint32_t b_[2][kBlocks][2];
};

}  // namespace snv2::SNV2_GPU
