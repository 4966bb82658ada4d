// An estimate of what some units take in one launch (stages.h), for the choice between that and a
// launch each.
//
// As in unit_cost.h a warp's job is counted in instructions and in cycles that it takes alone; the
// constants are read off the machine code of sm_90 (benchmarks/sass_path.py walks through it), and
// were not fitted to a clock.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cuda/stages_cut.h"
#include "cuda/unit_cost.h"

namespace snv2::SNV2_GPU {

struct StagesModel {
  static constexpr double kStart = 3000,
                          kEnd = 1600;        // cycles before the first unit, after the last
  static constexpr double kPhase = 60;        // instructions of a warp, whatever its jobs
  static constexpr double kNeighbours = 250;  // cycles until their rows are there
  static constexpr double kJob = 190, kJobCycles = 620;
  // Instructions and cycles of a tile along the depth, and of each block of columns in it.
  static constexpr double kTile = 6, kTileCycles = 20, kBlock = 2.1, kBlockCycles = 7;
  static constexpr double kQuad = 40, kQuadCycles = 450;  // of one that makes place for another
  static constexpr double kTask = 230, kRow = 122, kOfTwoRows = 1.43, kAlone = 1.75;
};

struct StagesCost {
  double instructions;  // of all warps
  double cycles;        // from the first to the last, of clusters one after another
  double weight_bytes;  // that CTAs read
  double multiply_adds;
};

template <class T>
StagesCost cost_of(const StagesParams<T>& params, const StagesCut& cut, int64_t batch,
                   const Device& device) {
  using M = StagesModel;
  Work work(kStagesThreads);
  double bytes = 0, products = 0;
  work.wait(M::kStart + M::kEnd);
  const auto phase = [&] { work.spread(M::kPhase * kStagesWarps); };
  const auto product = [&](const StagedMatrix& m) {
    const double deep = m.deep, wide = m.wide, quads = std::ceil(deep / kQuadTiles);
    const double passed = m.deep > kRingTiles ? quads - kRingQuads : 0;
    work.jobs(
        m.jobs, M::kJob + deep * (M::kTile + M::kBlock * wide) + passed * M::kQuad,
        M::kJobCycles + deep * (M::kTileCycles + M::kBlockCycles * wide) + passed * M::kQuadCycles);
    bytes += m.jobs * deep * kTileElements<T> * sizeof(T);
    products += m.jobs * deep * wide * kTileRows * 16 * kBlock;
  };
  for (int i = 0; i < params.units; ++i) {
    const StagedUnit& unit = params.unit[i];
    const StagedMap& out = params.maps[unit.out];
    const double before = work.cycles, bytes_before = bytes;
    phase();
    product(params.matrix[unit.pw1]);
    phase();
    work.wait(M::kNeighbours);
    const auto convolve = [&](const StagedConvolution& c) {
      const double row = M::kRow * (unit.stride == 2 ? M::kOfTwoRows : 1);
      const double each = M::kTask + row * out.rows / (1 << c.shift);
      work.jobs(c.tasks << c.shift, each, each * M::kAlone);
      products += 9.0 * c.channels * out.columns();
    };
    convolve(unit.dw);
    if (unit.stride == 2) convolve(unit.proj_dw);
    phase();
    product(params.matrix[unit.pw2]);
    if (unit.stride == 2) product(params.matrix[unit.pw2 + 1]);
    bytes += unit.floats * 4;
    // An SM gets no more of L2 than that.
    const double least = (bytes - bytes_before) / CostModel::kSmBytes;
    work.wait(std::max(least - (work.cycles - before), 0.0));
  }
  const auto ctas = static_cast<double>(cut.cluster * batch);
  const int64_t known = device.clusters_at_once[1][0];
  const int64_t slots = std::max<int64_t>(known > 0 ? known : device.sms * 7 / 8 / cut.cluster, 1);
  return {work.instructions * ctas, work.cycles * static_cast<double>(ceil_div(batch, slots)),
          bytes * ctas, products * ctas};
}

}  // namespace snv2::SNV2_GPU
