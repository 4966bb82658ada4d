// The units of some stages in one launch: an image lies in the shared memory of a cluster from the
// first unit, which halves it, to the last.
//
// Each CTA of the cluster has some rows of the image, of all channels, so that both products of a
// unit need nothing of another CTA, and a depthwise convolution the row above and the one below. A
// unit is three phases between barriers of the CTA:
//   1. first product: planes that a table names  x  pw1           MID  [mid][row above, own, below]
//      Its first and last rows go to the neighbours' MID as well. At stride 2 the last row of the
//      planes goes to the CTA below, for the projection.
//   2. depthwise convolution of MID, at stride 2 also of the planes  DW   [mid][own]
//   3. second product, and that of the projection                 planes that a table names
//
// Neighbours wait for each other's rows and for nothing else: stores to them count their bytes at a
// barrier of the receiver, which knows how many will come. It may be a unit behind, so that
// barriers alternate, and MID has a place of its own from the unit before on (stages_cut.h). At
// stride 2, where no row goes up, a word does, or the CTA above could be two units ahead.
//
// Split, concat and shuffle are the tables of the plan, as between launches (snv2/gpu_plan.h).
// Matrices come from L2 when they are used, to the warps that use them (stages_weights.h); biases,
// depthwise convolutions and tables of a unit are copied while the one before it runs.
//
// At the end the cluster turns the map around, so that a CTA has some planes of all rows: what it
// writes are whole sectors.
#pragma once

#include <cstdint>

#include "cuda/stages_load.h"
#include "cuda/stages_weights.h"
#include "cuda/unit_convolve.h"
#include "cuda/unit_product.h"

namespace snv2::SNV2_GPU {

// Products --------------------------------------------------------------------------------------

// Has the warps compute a product, and hands each block of results to use(acc, row of tiles, first
// block of columns). rows(block) is the operand from a block of columns on. Returns how many quads
// of the last job the warp still holds.
template <class T, class RowsOf, class Use>
SNV2_DEVICE int product(const StagedMatrix& m, int bias_at, WeightStream<T>& weights, int warp,
                        const RowsOf& rows, const Use& use) {
  int job = m.first_job(warp);
  if (job >= m.jobs) return 0;
  const int held = m.deep > kRingTiles ? 1 : m.deep > kQuadTiles ? 2 : 1;
  int tile = m.tile[warp], block = m.block[warp];
#pragma unroll 1
  for (;;) {
    const Shared<float> bias = shared_at<float>(bias_at) + (tile * 16 + lane_of_warp() / 4);
    Start<1> start;
    start.set(0, load(bias), load(bias + 8));
    const auto run = [&](auto blocks) {
      constexpr int kBlocks = decltype(blocks)::value;
      float acc[kBlocks][4];
      StreamedProduct<kBlocks, T, decltype(rows(0))>(weights, rows(block)).run(acc, start, m.deep);
      use(acc, tile, block);
    };
    if (m.wide == 4) {
      run(std::integral_constant<int, 4>{});
    } else if (m.wide == 2) {
      run(std::integral_constant<int, 2>{});
    } else {
      run(std::integral_constant<int, 1>{});
    }
    job += kStagesWarps;
    if (job >= m.jobs) return held;
    weights.release(held);
    const int column = m.column_of(job);
    tile = job - column * m.tiles, block = column * m.wide;
  }
}

// A lane's results of rows g and g + 8 of a tile, finished: neighbouring pixels, as many as there
// are in two of each block.
template <class T, int kBlocks>
struct FinishedRows {
  Vector<T, 2 * kBlocks> of[2];

  SNV2_DEVICE explicit FinishedRows(const float (&acc)[kBlocks][4]) {
    uint32_t words[2][kBlocks];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int j = 0; j < kBlocks; ++j) {
        words[half][j] = word_of(finished_pair<T, Relu>(acc[j][half * 2], acc[j][half * 2 + 1]));
      }
#pragma unroll
      for (int j = 0; j + 1 < kBlocks; j += 2) exchange<1>(words[half][j], words[half][j + 1]);
    }
    if constexpr (kBlocks == 4) {
#pragma unroll
      for (int j = 0; j < 4; ++j) exchange<2>(words[j / 2][j % 2], words[j / 2][j % 2 + 2]);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) of[half] = pixels_of<T>(words[half]);
  }
};
// Returns the column of a lane's first pixel, counted from the first block on.
template <int kBlocks>
SNV2_DEVICE int finished_column() {
  const int t = lane_of_warp() % 4;
  return kBlocks == 4 ? t * kBlock : kBlocks == 2 ? t % 2 * kBlock + t / 2 * 4 : 2 * t;
}

// Stores rows of MID, also to the neighbours that convolve them.
template <class T>
class MidRows {
 public:
  SNV2_DEVICE MidRows(const StagedUnit& unit, const StagedMap& map, int rank, int cluster,
                      Shared<uint64_t> barrier)
      : mid_(shared_at<T>(unit.mid_at) + lane_of_warp() / 4 * unit.mid_pitch),
        barrier_(barrier),
        pitch_(unit.mid_pitch),
        row_(map.row),
        rank_(rank),
        above_(unit.stride == 1 && rank > 0 ? (1 + map.rows) * map.row : -1),
        last_(rank + 1 < cluster ? (map.rows - 1) * map.row : kNever) {}
  template <int kBlocks>
  SNV2_DEVICE void store(const float (&acc)[kBlocks][4], int tile, int block) const {
    const int column = block * kBlock + finished_column<kBlocks>();
    const Shared<T> upper = mid_ + tile * 16 * pitch_, lower = upper + 8 * pitch_;
    const FinishedRows<T, kBlocks> done(acc);
    store_vector<2 * kBlocks>(upper + (row_ + column), done.of[0]);
    store_vector<2 * kBlocks>(lower + (row_ + column), done.of[1]);
    const auto hand = [&](int at, int rank) {
      store_async(upper + at, barrier_, rank, done.of[0]);
      store_async(lower + at, barrier_, rank, done.of[1]);
    };
    if (above_ >= 0 && column < row_) hand(above_ + column, rank_ - 1);
    if (column >= last_) hand(column - last_, rank_ + 1);
  }

 private:
  static constexpr int kNever = 1 << 30;

  Shared<T> mid_;
  Shared<uint64_t> barrier_;
  int pitch_, row_, rank_;
  int above_;  // where the first row goes in the MID of the CTA above, or -1
  int last_;   // the column that the last row begins with, if there is a CTA below
};

// Stores rows of results to planes.
template <class T>
class PlaneRows {
 public:
  SNV2_DEVICE PlaneRows(const StagedMap& map, const StagedArray& table)
      : planes_(shared_at<T>(map.at) + map.top),
        table_(shared_at<int32_t>(table.at) + lane_of_warp() / 4),
        pitch_(map.pitch),
        left_(table.count - lane_of_warp() / 4) {}
  template <int kBlocks>
  SNV2_DEVICE void store(const float (&acc)[kBlocks][4], int tile, int block) const {
    const Shared<T> planes = planes_ + (block * kBlock + finished_column<kBlocks>());
    const FinishedRows<T, kBlocks> done(acc);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = tile * 16 + half * 8;
      if (row < left_)
        store_vector<2 * kBlocks>(planes + load(table_ + row) * pitch_, done.of[half]);
    }
  }

 private:
  Shared<T> planes_;
  Shared<int32_t> table_;
  int pitch_;
  int left_;  // rows from the lane's first one on
};

// Depthwise convolutions ------------------------------------------------------------------------

// Convolves the CTA's rows of all channels, of which line(channel) is the row above them.
template <class T, int kStride, class Line>
SNV2_DEVICE void convolve_own(const StagedConvolution& c, const StagedMap& in, const StagedMap& to,
                              int rank, int warp, int out_pitch, const Line& line) {
  using Window = Sliding<T, kStride, true>;
  constexpr int kLanes = Window::kGroupLanes, kItems = kWarp / kLanes;
  const Shared<T> out = shared_at<T>(c.out_at);
  const Shared<float> weights = shared_at<float>(c.weights.at);
  const int rows = to.own(rank);
  if (rows < to.rows) {
    for (int channel = warp; channel < c.channels; channel += kStagesWarps) {
      zero_missing(out + channel * out_pitch, to, rank);
    }
  }
  const Ring ring{(in.rows + 2) * in.row, in.row, in.width, in.height};
#pragma unroll 1
  for (int job = (warp - c.first_warp) & (kStagesWarps - 1); job < c.tasks << c.shift;
       job += kStagesWarps) {
    const int wanted = (job >> c.shift) * kItems + lane_of_warp() / kLanes;
    const int item = wanted < c.items ? wanted : c.items - 1;
    const int block = static_cast<int>((static_cast<float>(item) + 0.5f) * c.by_groups);
    const int row_of_group =
        (item - block * c.groups) * kGroupChannels<T> + lane_of_warp() % kLanes;
    const bool stores = wanted < c.items && row_of_group < c.channels;
    const int channel = row_of_group < c.channels ? row_of_group : c.channels - 1;
    const int part = job & ((1 << c.shift) - 1);
    const int begin = (rows * part) >> c.shift, end = (rows * (part + 1)) >> c.shift;
    if (begin == end) continue;
    const int first = block * kBlock;
    Window window;
    window.start(Branch<T>{}, weights + channel * static_cast<int>(kDepthwiseFloats), ring,
                 line(channel), first);
    Address<T> at(out + (channel * out_pitch + begin * to.row + first));
    window.rows(ring, (to.first(rank) + begin) * kStride, (1 + begin * kStride) * in.row,
                end - begin, [&](const float (&results)[Window::kPixels]) {
                  store_vector_if(stores, at, rounded_vector<T>(results));
                  at = at + to.row;
                });
  }
}

// Stores the last row of the planes that a unit of stride 2 reads to the CTA below, which convolves
// it for the projection.
template <class T>
SNV2_DEVICE void hand_down(const StagedMap& map, Shared<int32_t> table, int channels,
                           Shared<uint64_t> barrier, int rank) {
  constexpr int kVector = 16 / static_cast<int>(sizeof(T));
  const Shared<T> planes = shared_at<T>(map.at);
  const int across = map.row / kVector;
  const float by_across = reciprocal(static_cast<float>(across));
  for (int i = static_cast<int>(threadIdx.x); i < channels * across; i += kStagesThreads) {
    const int c = static_cast<int>((static_cast<float>(i) + 0.5f) * by_across);
    const Shared<T> line = planes + (load(table + c) * map.pitch + (i - c * across) * kVector);
    store_async(line, barrier, rank + 1, load_vector<kVector>(line + map.columns()));
  }
}

// A unit -----------------------------------------------------------------------------------------

// Returns how many quads the warp still holds, as it is told how many it does: they are released
// where other warps are at work.
template <class T>
SNV2_DEVICE int run_unit(const StagesParams<T>& params, int number, int rank, int warp, int held,
                         WeightStream<T>& weights) {
  const StagedUnit& unit = params.unit[number];
  const StagedMap& in = params.maps[unit.in];
  const StagedMap& out = params.maps[unit.out];
  const Shared<int32_t> in_table = shared_at<int32_t>(unit.in_table.at);
  const Shared<T> planes = shared_at<T>(in.at);
  const StageBarriers barriers(params.barriers_at);
  const Shared<uint64_t> rows_barrier = barriers.rows(number);
  const bool above = rank > 0, below = rank + 1 < params.cluster;

  // 1. First product.
  if (threadIdx.x == 0) {
    barrier_expect(rows_barrier, (above ? unit.from_above : 0) + (below ? unit.from_below : 0));
  }
  barriers.wait_for_parameters(number);
  if (unit.stride == 2 && number > 0 && below) {
    hand_down<T>(in, in_table, unit.in_channels, rows_barrier, rank);
  }
  weights.release(held);
  const MidRows<T> mid_rows(unit, in, rank, params.cluster, rows_barrier);
  held = product(
      params.matrix[unit.pw1], unit.pw1_bias.at, weights, warp,
      [&](int block) {
        return GatheredRows<T>(planes + (in.top + block * kBlock), in.pitch, in_table);
      },
      [&](const auto& acc, int tile, int block) { mid_rows.store(acc, tile, block); });
  fence_bulk_copies();  // of the next unit's parameters
  sync_threads();
  if (unit.stride == 2 && above && threadIdx.x == 0) {
    store_async(shared_at<uint32_t>(params.tokens_at) + (number & 1), rows_barrier, rank - 1,
                Vector<uint32_t, 1>{});
  }

  // While the neighbours' rows come: the next matrices, and, by idle warps, parameters of the
  // next unit, which may not come before all have seen this one's.
  weights.release(held);
  const int duty = (warp - unit.idle) & (kStagesWarps - 1);
  if (number + 1 < params.units) load_unit(params, params.unit[number + 1], duty);
  cp_async_commit();
  if (duty == 3) {
    const auto zero_tail = [&](int at, int depth) {
      zero(shared_at<T>(at) + depth * unit.dw_pitch,
           (units_of<16>(depth) * 16 - depth) * unit.dw_pitch);
    };
    zero_tail(unit.dw.out_at, unit.mid);
    if (unit.stride == 2) zero_tail(unit.proj_dw.out_at, unit.in_channels);
  }

  // 2. Depthwise convolutions.
  barriers.wait_for_rows(number);
  const Shared<T> mid = shared_at<T>(unit.mid_at);
  const auto mid_line = [&](int channel) { return mid + channel * unit.mid_pitch; };
  if (unit.stride == 1) {
    convolve_own<T, 1>(unit.dw, in, out, rank, warp, unit.dw_pitch, mid_line);
  } else {
    convolve_own<T, 2>(unit.dw, in, out, rank, warp, unit.dw_pitch, mid_line);
    convolve_own<T, 2>(unit.proj_dw, in, out, rank, warp, unit.dw_pitch,
                       [&](int channel) { return planes + load(in_table + channel) * in.pitch; });
  }
  sync_threads();

  // 3. Second product, and the projection's.
  if (unit.stride == 2 && warp == kStagesWarps - 1) {
    zero(shared_at<T>(out.at) + (out.planes * out.pitch + out.top), out.columns());
  }
#pragma unroll 1
  for (int i = 0; i < unit.stride; ++i) {
    const PlaneRows<T> rows(out, i == 0 ? unit.out_table : unit.proj_table);
    const Shared<T> from = shared_at<T>(i == 0 ? unit.dw.out_at : unit.proj_dw.out_at);
    held = product(
        params.matrix[unit.pw2 + i], i == 0 ? unit.pw2_bias.at : unit.proj_bias.at, weights, warp,
        [&](int block) { return StraightRows<T>(from + block * kBlock, unit.dw_pitch); },
        [&](const auto& acc, int tile, int block) { rows.store(acc, tile, block); });
    if (unit.apart) break;
    weights.release(held);
    held = 0;
  }
  cp_async_wait<0>();  // the next unit's tables
  sync_threads();
  return held;
}

// Result -----------------------------------------------------------------------------------------

// Writes planes of the last map: each CTA those of its share, whose rows the others hand it.
template <class T>
SNV2_DEVICE void write_result(const StagesParams<T>& params, int rank, int image) {
  constexpr int kVector = 16 / static_cast<int>(sizeof(T));
  const StagedMap& map = params.maps[params.unit[params.units - 1].out];
  const Shared<T> result = shared_at<T>(params.result_at);
  const Global<const int32_t> table = Global<const int32_t>{params.tables} + params.result_table;
  const int plane = map.height * map.row, across = map.own(rank) * map.row / kVector;
  const float by_across = reciprocal(static_cast<float>(across > 0 ? across : 1));
  const float by_share = reciprocal(static_cast<float>(params.result_share));
  sync_cluster();  // the others have no use for what lies there
  for (int i = static_cast<int>(threadIdx.x); i < params.results * across; i += kStagesThreads) {
    const int n = static_cast<int>((static_cast<float>(i) + 0.5f) * by_across);
    const int column = (i - n * across) * kVector;
    const int owner = static_cast<int>((static_cast<float>(n) + 0.5f) * by_share);
    const Vector<T, kVector> pixels = load_vector<kVector>(
        shared_at<T>(map.at) + (load(table + n) * map.pitch + map.top + column));
    const int at = (n - owner * params.result_share) * plane + map.first(rank) * map.row + column;
    store_vector<kVector>(remote(result, owner) + at, pixels);
  }
  sync_cluster();

  const int first = rank * params.result_share, left = params.results - first;
  const int mine = left < params.result_share ? left : params.result_share;
  const int vectors = plane / kVector;
  const float by_vectors = reciprocal(static_cast<float>(vectors));
  const Global<T> out = Global<T>{params.out} + image * params.out_image;
  for (int i = static_cast<int>(threadIdx.x); i < mine * vectors; i += kStagesThreads) {
    const int n = static_cast<int>((static_cast<float>(i) + 0.5f) * by_vectors);
    const int at = (i - n * vectors) * kVector;
    store_vector<kVector>(out + (load(table + (first + n)) * params.out_pitch + at),
                          load_vector<kVector>(result + (n * plane + at)));
  }
}

template <class T>
__global__ void __launch_bounds__(kStagesThreads, 1)
    stages_kernel(const __grid_constant__ StagesParams<T> params) {
  const int rank = cluster_rank(), image = static_cast<int>(blockIdx.y), warp = warp_of_cta();

  // The next kernel's CTAs may wait beside these: all wait for what others write.
  grid_dependents_launch();

  // Load what is constant, and then the map.
  const StageBarriers barriers(params.barriers_at);
  barriers.init();
  WeightStream<T> weights(params, warp);
  sync_threads();
  const StagedUnit& first = params.unit[0];
  const StagedMap& map = params.maps[first.in];
  load_unit(params, first, warp);
  if (warp == 0) {
    zero(shared_at<T>(map.at) + (map.planes * map.pitch + map.top), map.columns());
  }
  cp_async_commit();
  cp_async_wait<0>();
  sync_cluster();  // the others have begun, too, and their barriers are there
  grid_dependency_wait();
  load_map(params, first, rank, image);
  cp_async_commit();
  cp_async_wait<0>();
  sync_threads();

  int held = 0;
#pragma unroll 1
  for (int number = 0; number < params.units; ++number) {
    held = run_unit(params, number, rank, warp, held, weights);
  }
  write_result(params, rank, image);
}

}  // namespace snv2::SNV2_GPU
