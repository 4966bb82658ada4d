// An estimate of what a cut of a unit costs, for the choice among cuts (unit_cut.h).
//
// A warp's job is counted in PTX instructions, as the interpreter of PTX counts them
// (docs/ptx.md), and in cycles that it takes alone: in loops of products about as many as ptxas
// wrote into machine code (docs/arithmetic.md), elsewhere what a warp waits for an instruction. An
// SM that is full issues one from each of its schedulers, now and then none. Whichever takes longer
// is what a phase takes, and phases are apart by barriers. Beside that stands what a launch asks of
// L2. The constants are read off PTX and SASS, and were not fitted to a clock.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cuda/unit_shape.h"

namespace snv2::SNV2_GPU {

struct CostModel {
  static constexpr double kAlone = 3.0;   // cycles of an instruction of a warp that is alone
  static constexpr double kIssue = 3.2;   // instructions of an SM in a cycle
  static constexpr double kBarrier = 40;  // cycles
  static constexpr double kClusterBarrier = 400;
  static constexpr double kLatency = 800;      // of L2, with what is asked of it at once
  static constexpr double kWeightsOfL2 = 700;  // cycles of a step of a product that waits for L2
  // Bytes of L2 in a cycle: of an SM that has it to itself, and of each where all are busy.
  static constexpr double kSmBytes = 40, kSharedBytes = 19;
  static constexpr double kDoubt = 1.5;  // about inner loops that wait for L2
  // Instructions of each warp, in all, in a cluster, and in each step, whatever its jobs.
  static constexpr double kFixed = 280, kOfCluster = 80, kStep = 90;
  static constexpr double kCopy = 4, kLoad = 14;  // of 32 vectors of weights, of planes
  // Of 32 vectors of the caller's tensor, and of 32 vectors of its result.
  static constexpr double kTensorLoad = 12, kTensorStore = 30;
};

// Instructions of a CTA, and its cycles if it has an SM to itself.
class Work {
 public:
  explicit Work(int64_t threads) : warps_(static_cast<double>(threads / kWarp)) {}

  // Jobs that warps take in turn, of `each` instructions and `alone` cycles.
  void jobs(double count, double each, double alone, double times = 1) {
    const double turns = std::ceil(count / warps_);
    instructions += times * count * each;
    cycles += times * std::max(turns * alone, count * each / CostModel::kIssue);
  }
  // Instructions that all warps have an equal part of.
  void spread(double count, double times = 1) {
    jobs(warps_, count / warps_, count / warps_ * CostModel::kAlone, times);
  }
  void wait(double of, double times = 1) { cycles += of * times; }

  int warps() const { return static_cast<int>(warps_); }

  double instructions = 0, cycles = 0, l2_bytes = 0;

 private:
  double warps_;
};

// Adds a product of `rows` x `depth` with `blocks` blocks of columns, `store` instructions for each
// block of results.
template <class Mode, class T>
void add_product(Work& work, double rows, double depth, double blocks, double store, double times) {
  // Instructions, and cycles, for 16 x 8 x 16, which in float32 are a lane's multiply-adds, and
  // for each step.
  constexpr double kProduct = sizeof(T) == 4 ? 80 : 1.4, kTile = sizeof(T) == 4 ? 75 : 9;
  constexpr double kProductCycles = sizeof(T) == 4 ? 70 : 7;
  constexpr double kTileCycles = sizeof(T) == 4 ? 375 : 10;
  constexpr double kOneTileCycles = 16;  // of a step with one row of tiles
  const double tiles = std::ceil(rows / kTileRows), deep = std::ceil(depth / 16);
  const double tall = std::min<double>(Mode::kTiles, tiles);
  const double row_blocks = std::ceil(tiles / Mode::kTiles);
  const double most = blocks_of_job<Mode>(static_cast<int>(row_blocks),
                                          static_cast<int>(std::ceil(blocks)), work.warps());
  const double wide = std::min(most, blocks);
  const double count = row_blocks * std::ceil(blocks / most);
  const double around = 100 + store * tall * wide;
  const double step = sizeof(T) == 2 && Mode::kTiles == 1 ? kOneTileCycles : kTileCycles;
  const double multiplied = step + kProductCycles * tall * wide;
  const double waited = Mode::kResident ? 0 : CostModel::kWeightsOfL2 / Mode::kAhead;
  work.jobs(count, around + deep * (kTile + kProduct * tall * wide),
            around * CostModel::kAlone + deep * std::max(multiplied, waited), times);
  work.wait(CostModel::kBarrier, times);
}

// Returns the work of a CTA of one of the two branches; in a cluster, of its share.
template <class T, int kStride, class Mode>
Work work_of(const Shape& s, const Cut& c, bool projection) {
  const bool bare = projection || !s.expand, projects = projection || s.project;
  const double vector = 16.0 / sizeof(T), ranks = static_cast<double>(c.cluster);
  const auto share = [&](int64_t rows) { return static_cast<double>(share_rows(rows, c.cluster)); };
  const auto in = static_cast<double>(s.in);
  const double depth = static_cast<double>(projection ? s.in : s.mid);
  const double mid = share(projection ? s.in : s.mid), out = share(projection ? s.proj : s.out);
  const double warps = static_cast<double>(c.threads) / kWarp;

  // Rows that are read and computed; steps; and the times that rows are complete.
  const auto rows = static_cast<double>(c.rows_per_cta);
  const auto height = static_cast<double>(s.height), out_height = static_cast<double>(s.out_height);
  const double halo = static_cast<double>(2 * s.reach + 1 - kStride);
  // Ranges that begin and end with images, or lie within one, and those that lie across.
  const bool across = s.out_height % c.rows_per_cta != 0 && c.rows_per_cta % s.out_height != 0;
  const double images = std::max(rows / out_height, 1.0);
  const double in_rows =
      across ? std::min(rows * kStride + halo, std::ceil(images + 1) * height)
             : images * std::min(std::min(rows, out_height) * kStride + halo, height);
  const auto stretch = static_cast<double>(stretch_rows(s, c.columns));
  const double per_stretch =
      std::ceil(stretch * static_cast<double>(s.row) / static_cast<double>(c.columns));
  const double steps = std::ceil(in_rows / stretch) * per_stretch;
  const double blocks = in_rows * static_cast<double>(s.row) / kBlock / steps;
  const double times = std::ceil(rows / static_cast<double>(c.step_rows));
  const double at_once = rows / times;
  const double out_blocks = at_once * static_cast<double>(s.out_row) / kBlock;

  Work work(c.threads);
  work.spread((CostModel::kFixed + (Mode::kCluster ? CostModel::kOfCluster : 0)) * warps);
  double weights = 0;
  if (Mode::kResident) {
    if (!bare) weights += mid * in * sizeof(T);
    if (projects) weights += out * depth * sizeof(T);
  }
  const double parameters = mid * static_cast<double>(s.dw_floats[projection]) * 4;
  work.spread((weights + parameters) / (16 * kWarp) * CostModel::kCopy);
  work.wait(CostModel::kLatency);
  work.spread(CostModel::kStep * warps, steps);

  // X. What is not loaded ahead is waited for.
  const double loaded = bare ? mid : in, elements = loaded * blocks * kBlock;
  work.l2_bytes = weights + parameters + elements * sizeof(T) * steps;
  if (Mode::kCluster && !bare) {
    const double vectors = elements / ranks / vector;
    work.spread(std::ceil(vectors / kWarp) * (12 + 5 * ranks), steps);
    work.l2_bytes -= elements * sizeof(T) * steps * (1 - 1 / ranks);
    work.wait(CostModel::kClusterBarrier, c.prefetch ? 2 : 2 * steps);
  } else if (s.in_planes) {
    work.spread(elements / vector / kWarp * CostModel::kLoad, steps);
  } else {
    work.spread(elements / static_cast<double>(s.vector) / kWarp * CostModel::kTensorLoad, steps);
  }
  if (!c.prefetch) work.wait(CostModel::kLatency, steps - 1);
  if (!bare) {
    add_product<Mode, T>(work, mid, in, blocks, 9, steps);
    if (!Mode::kResident) work.l2_bytes += mid * in * sizeof(T) * steps;
  }

  // Depthwise: a lane has a vector of each row, and for larger windows one word.
  constexpr double kGroups = 4;  // of channels that a warp takes
  const double taps = static_cast<double>(std::max<int64_t>(s.dw_floats[projection], 10)) / 10;
  double tasks =
      std::ceil(std::ceil(mid / vector) * (static_cast<double>(s.out_row) / kBlock) / kGroups);
  double rows_each = at_once;
  for (; 2 * tasks <= warps && rows_each >= 2; tasks *= 2) rows_each /= 2;
  const double slower = s.reach > 1 ? 4 * taps : 1;
  // Instructions for a row of results of a warp, and how many times those at stride 2.
  constexpr double kRow = sizeof(T) == 4 ? 70 : 122, kOfTwoRows = 1.43;
  const double each = 230 + slower * (kStride == 2 ? kOfTwoRows : 1) * kRow * rows_each;
  work.jobs(tasks, each, each * CostModel::kAlone, times);
  work.wait(CostModel::kBarrier, times);
  if (Mode::kCluster) {
    const double vectors = mid * out_blocks * kBlock / vector;
    if (projects) work.spread(std::ceil(vectors / kWarp) * (6 + 4 * ranks), times);
    work.wait(2 * CostModel::kClusterBarrier, times);
  }
  if (projects) {
    add_product<Mode, T>(work, out, depth, out_blocks, 34, times);
    if (!Mode::kResident) work.l2_bytes += out * depth * sizeof(T) * times;
  }
  work.l2_bytes += out * out_blocks * kBlock * sizeof(T) * times;
  if (s.result) {
    const double results = static_cast<double>(s.passed) + out;
    work.spread(results * out_blocks * kBlock / static_cast<double>(s.vector) / kWarp *
                    CostModel::kTensorStore,
                times);
    work.wait(CostModel::kBarrier, times);
  }
  return work;
}

// The cost of a launch: its cycles, and those of the whole GPU that its instructions and bytes
// take; its instructions, and the cycles of CTAs that only wait for themselves.
struct Cost {
  double cycles, work, instructions, chain;
};

template <class T, int kStride>
Cost cost_of(const Shape& s, const Device& device, const Cut& c) {
  double alone = 0, instructions = 0, bytes = 0;
  for (int64_t b = 0; b < s.branches(); ++b) {
    const Work work =
        c.weights == Weights::kDirect      ? work_of<T, kStride, Direct<T, kStride>>(s, c, b == 1)
        : c.weights == Weights::kClustered ? work_of<T, kStride, Clustered>(s, c, b == 1)
                                           : work_of<T, kStride, Resident>(s, c, b == 1);
    const auto ctas = static_cast<double>(c.ctas * c.cluster);
    alone = std::max(alone, work.cycles);
    instructions += work.instructions * ctas;
    bytes += work.l2_bytes * ctas;
  }
  const auto sms = static_cast<double>(device.sms);
  const auto all = static_cast<double>(c.ctas * c.cluster * s.branches());
  const double busy = std::min(all, sms);
  const auto slots = static_cast<double>(slots_of(s, device, c, c.ctas_per_sm));
  const double waves = std::ceil(static_cast<double>(c.ctas) / slots);
  const double issued = instructions / CostModel::kIssue;
  const double all_of_l2 = sms * CostModel::kSharedBytes;
  const double l2 = bytes / std::min(all_of_l2, busy * CostModel::kSmBytes);
  // An inner loop that waits for L2 is at the mercy of all SMs.
  const double doubt = c.weights == Weights::kDirect ? CostModel::kDoubt : 1;
  return {std::max({waves * alone, issued / busy, l2}) * doubt,
          (issued / sms + bytes / all_of_l2) * doubt, instructions, waves * alone};
}

}  // namespace snv2::SNV2_GPU
