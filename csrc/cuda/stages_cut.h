// Which units of a plan may share a launch (stages.h), how a cluster divides them, and where
// everything lies in shared memory. All from a plan's steps, shapes and a description of the GPU.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cuda/network.h"
#include "cuda/stages_params.h"
#include "cuda/unit_shape.h"

namespace snv2::SNV2_GPU {

// Regions of shared memory that are needed at some times only: two may overlap where their times do
// not.
class SharedRegions {
 public:
  explicit SharedRegions(int64_t begin) : begin_(begin) {}

  // Asks for a region from phase `from` to phase `to`; its place will be in `at`.
  void ask(int& at, int64_t bytes, int from, int to) {
    if (bytes > 0) wanted_.push_back({&at, round_up(bytes, 16), from, to});
  }
  // Places all, and returns where the last one ends. The largest comes first, and each lies as low
  // as it can; as long as they take more than `most`, the one that ends last comes first instead.
  int64_t place(int64_t most) {
    std::stable_sort(wanted_.begin(), wanted_.end(),
                     [](const Region& a, const Region& b) { return a.bytes > b.bytes; });
    constexpr int kTries = 32;
    int64_t end = place_in_order();
    for (int i = 0; i < kTries && end > most; ++i) {
      const auto last = std::find_if(wanted_.begin(), wanted_.end(), [&](const Region& region) {
        return *region.at + region.bytes == end;
      });
      std::rotate(wanted_.begin(), last, last + 1);
      end = place_in_order();
    }
    return end;
  }

 private:
  struct Region {
    int* at;
    int64_t bytes;
    int from, to;
  };

  int64_t place_in_order() {
    int64_t end = begin_;
    for (auto region = wanted_.begin(); region != wanted_.end(); ++region) {
      int64_t at = begin_;
      // Each time that it is moved it is behind one more of the others.
      for (bool moved = true; moved;) {
        moved = false;
        for (auto other = wanted_.begin(); other != region; ++other) {
          const bool apart = other->to < region->from || region->to < other->from ||
                             *other->at + other->bytes <= at || at + region->bytes <= *other->at;
          if (apart) continue;
          at = *other->at + other->bytes;
          moved = true;
        }
      }
      *region->at = static_cast<int>(at);
      end = std::max(end, at + region->bytes);
    }
    return end;
  }

  int64_t begin_;
  std::vector<Region> wanted_;
};

// Some units of a plan in one launch.
struct StagesCut {
  int64_t steps = 0;  // 0: none
  int64_t cluster = 0, shared_bytes = 0;
};

// The paper's unit, between planes.
inline bool is_staged_unit(const GpuStep& step) {
  return step.kind == GpuStepKind::kUnit && step.parts == kWholeBranch &&
         step.in_buffer != kCallersMap && step.out_buffer != kNoBuffer &&
         step.result == kNoResult && (step.stride == 1 || step.proj_channels > 0) &&
         is_papers_unit(step);
}

// True if a step reads all planes that later ones need, and its table names them.
inline bool reads_all(const GpuStep& step) {
  return step.kind == GpuStepKind::kHead || (step.kind == GpuStepKind::kUnit && step.stride == 2 &&
                                             step.parts == kWholeBranch && step.proj_channels > 0);
}

// Fills in what the kernel needs for `steps` steps from `first` on, which begin with a unit of
// stride 2, but for memory outside. `in_planes` and `height` x `width` are of the map that it
// reads. Returns what it takes, or nothing (no steps) where it does not fit.
template <class T>
StagesCut cut_stages(StagesParams<T>& params, const GpuPlan& plan, const GpuStep* first,
                     int64_t steps, int64_t in_planes, int64_t height, int64_t width,
                     const Device& device) {
  constexpr int64_t kSize = sizeof(T), kFloats = kDepthwiseFloats;
  const auto halved = [](int64_t extent) { return conv3x3_extent(extent, 2); };
  constexpr int64_t kMostCluster = 8;
  // Offsets are 31 bits wide, and so are those of planes in shared memory, which others bound.
  constexpr int64_t kMostElements = int64_t{1} << 31, kMostExtent = 4096;
  const GpuPlanHeader& header = plan.header();
  if (steps > kMostStagedUnits || header.weight_count >= kMostElements ||
      header.parameter_count >= kMostElements || plan.table_count() >= kMostElements ||
      height > kMostExtent || width > kMostExtent) {
    return {};
  }

  // Maps, and the rows of a CTA: some of the last map, twice as many before each stage.
  int64_t stages = 0, last_height = height;
  for (const GpuStep* step = first; step < first + steps; ++step) {
    if (step->stride == 2) ++stages, last_height = halved(last_height);
  }
  if (stages + 1 > kMostStages) return {};
  const int64_t last_rows = ceil_div(last_height, std::min(device.cluster, kMostCluster));
  StagesCut cut;
  cut.steps = steps;
  cut.cluster = ceil_div(last_height, last_rows);
  params.cluster = static_cast<int>(cut.cluster);
  params.units = static_cast<int>(steps);

  // Times: three phases of each unit, and the end.
  const auto phase = [](int64_t unit, int at) { return static_cast<int>(unit * 3 + at); };
  const int end = phase(steps, 0);
  constexpr int64_t kRings = int64_t{kStagesWarps} * kRingTiles * kTileElements<T> * kSize;
  params.barriers_at = static_cast<int>(kRings);
  params.tokens_at =
      static_cast<int>(kRings + (int64_t{kStagesWarps} * kRingQuads + kStageBarriers) * 8);
  SharedRegions regions(round_up(params.tokens_at + 2 * kTokenBytes, 16));

  int64_t map_count = 0;
  const auto add_map = [&](int64_t planes, int64_t h, int64_t w, bool halves) {
    StagedMap& map = params.maps[map_count];
    map.planes = static_cast<int>(planes);
    map.height = static_cast<int>(h);
    map.width = static_cast<int>(w);
    map.row = static_cast<int>(row_pitch(w));
    map.rows = static_cast<int>(last_rows << (stages - map_count));
    map.top = halves ? map.row : 0;
    map.pitch = static_cast<int>(shared_pitch(map.top + int64_t{map.rows} * map.row));
    ++map_count;
  };
  const auto bytes_of = [&](const StagedMap& map) { return (map.planes + 1) * map.pitch * kSize; };
  add_map(in_planes, height, width, true);
  int64_t born = 0;
  const auto ask_for_map = [&](int64_t until) {
    StagedMap& map = params.maps[map_count - 1];
    // The CTA above may hand down a row a unit ahead.
    const int from = map_count == 1 ? 0 : phase(born, until - born > 1 ? 2 : 0);
    regions.ask(map.at, bytes_of(map), from, until == steps ? end : phase(until, 1));
  };

  int matrices = 0;
  bool inside = true;  // copies of whole vectors
  for (int64_t i = 0; i < steps; ++i) {
    const GpuStep& step = first[i];
    StagedUnit& unit = params.unit[i];
    unit = {};
    unit.stride = static_cast<int>(step.stride);
    unit.in = static_cast<int>(map_count - 1);
    if (step.stride == 2) {
      ask_for_map(i);
      born = i;
      const StagedMap& before = params.maps[map_count - 1];
      int64_t planes = step.out_planes;  // units may ask for more than the one before
      for (int64_t j = i + 1; j < steps && first[j].stride == 1; ++j) {
        planes = std::max(planes, first[j].out_planes);
      }
      add_map(planes, halved(before.height), halved(before.width), map_count < stages);
    }
    unit.out = static_cast<int>(map_count - 1);
    const StagedMap& in = params.maps[unit.in];
    const StagedMap& out = params.maps[unit.out];
    unit.in_channels = static_cast<int>(step.in_channels);
    unit.mid = static_cast<int>(step.mid_channels);
    unit.main = static_cast<int>(step.out_channels);
    unit.proj = static_cast<int>(step.proj_channels);

    const int64_t own = int64_t{in.rows} * in.row, own_out = int64_t{out.rows} * out.row;
    unit.mid_pitch = static_cast<int>(shared_pitch(own + (step.stride == 2 ? 1 : 2) * in.row));
    unit.dw_pitch = static_cast<int>(shared_pitch(own_out));
    // A neighbour may be a unit ahead.
    regions.ask(unit.mid_at, padded_rows(step.mid_channels) * unit.mid_pitch * kSize,
                i == 0 ? 0 : phase(i - 1, 0), phase(i, 1));
    regions.ask(unit.dw.out_at, padded_rows(step.mid_channels) * unit.dw_pitch * kSize, phase(i, 1),
                phase(i, 2));
    if (step.stride == 2) {
      regions.ask(unit.proj_dw.out_at, padded_rows(step.in_channels) * unit.dw_pitch * kSize,
                  phase(i, 1), phase(i, 2));
    }

    // Matrices. Jobs of phase 3 follow each other through the warps. Where there are warps enough,
    // other ones than in phase 1: what these have used is replaced while those go on.
    const auto matrix = [&](int64_t weights, int64_t rows, int64_t depth, int64_t columns,
                            int first_warp) {
      StagedMatrix& m = params.matrix[matrices];
      m.weights = static_cast<int>(weights);
      m.tiles = static_cast<int>(ceil_div(rows, kTileRows));
      m.deep = static_cast<int>(ceil_div(depth, tile_depth(dtype_of<T>())));
      const int64_t blocks = columns / kBlock;
      m.wide = blocks % 4 == 0 ? 4 : blocks % 2 == 0 ? 2 : 1;
      m.jobs = static_cast<int>(m.tiles * (blocks / m.wide));
      m.first = first_warp;
      m.by_tiles = 1.0f / static_cast<float>(m.tiles);
      return matrices++;
    };
    unit.pw1 = matrix(step.pw1_weights, step.mid_channels, step.in_channels, own, 0);
    const int jobs = params.matrix[unit.pw1].jobs;
    unit.pw2 = matrix(step.pw2_weights, step.out_channels, step.mid_channels, own_out, 0);
    StagedMatrix& pw2 = params.matrix[unit.pw2];
    unit.apart = step.stride == 1 && jobs + pw2.jobs <= kStagesWarps;
    if (unit.apart) pw2.first = jobs;
    if (step.stride == 2) {
      matrix(step.proj_weights, step.proj_channels, step.in_channels, own_out,
             params.matrix[unit.pw2].jobs % kStagesWarps);
    }

    // Parameters, from the unit before on.
    const int from = i == 0 ? 0 : phase(i - 1, 1), to = phase(i, 2);
    const auto array = [&](StagedArray& a, int64_t offset, int64_t count, int64_t room) {
      a = {static_cast<int>(offset), 0, static_cast<int>(count)};
      regions.ask(a.at, room * 4, from, to);
    };
    const auto floats = [&](StagedArray& a, int64_t offset, int64_t count) {
      inside = inside && offset + round_up(count, 4) <= header.parameter_count;
      array(a, offset, round_up(count, 4), round_up(count, 4));
      unit.floats += a.count;
    };
    floats(unit.pw1_bias, step.pw1_bias, padded_rows(step.mid_channels));
    floats(unit.pw2_bias, step.pw2_bias, padded_rows(step.out_channels));
    floats(unit.dw.weights, step.dw, step.mid_channels * kFloats);
    if (step.stride == 2) {
      floats(unit.proj_bias, step.proj_bias, padded_rows(step.proj_channels));
      floats(unit.proj_dw.weights, step.proj_dw, step.in_channels * kFloats);
    }
    array(unit.in_table, step.in_table, step.in_channels, padded_rows(step.in_channels));
    array(unit.proj_table, step.out_table, step.proj_channels, padded_rows(step.proj_channels));
    array(unit.out_table, step.out_table + step.proj_channels, step.out_channels,
          padded_rows(step.out_channels));

    const auto convolution = [&](StagedConvolution& c, int channels, int first_warp) {
      c.first_warp = first_warp % kStagesWarps;
      constexpr int kItems = 4, kEnough = kStagesWarps / 2;
      c.channels = channels;
      c.groups = static_cast<int>(ceil_div(channels, kGroupChannels<T>));
      c.items = c.groups * (out.row / kBlock);
      c.tasks = static_cast<int>(ceil_div(c.items, kItems));
      c.by_groups = 1.0f / static_cast<float>(c.groups);
      // Two warps of each scheduler hide what they wait for; fewer share their tasks.
      while ((c.tasks << (c.shift + 1)) <= kEnough && (2 << c.shift) <= out.rows) ++c.shift;
    };
    convolution(unit.dw, unit.mid, 0);
    const int tasks = unit.dw.tasks << unit.dw.shift;
    if (jobs + tasks <= kStagesWarps) unit.dw.first_warp = jobs % kStagesWarps;
    unit.idle = (unit.dw.first_warp + tasks) % kStagesWarps;
    if (step.stride == 2) {
      convolution(unit.proj_dw, unit.in_channels, unit.idle);
      unit.idle = (unit.idle + (unit.proj_dw.tasks << unit.proj_dw.shift)) % kStagesWarps;
    }

    // Rows of MID, as many as rows of tiles have, and at stride 2 one of the planes.
    const auto row = static_cast<int>(in.row * kSize);
    const int mid_row = static_cast<int>(padded_rows(step.mid_channels)) * row;
    unit.from_above = mid_row + (step.stride == 2 && i > 0 ? unit.in_channels * row : 0);
    unit.from_below = step.stride == 1 ? mid_row : kTokenBytes;
  }
  ask_for_map(steps);

  // The way of each warp through the matrices.
  params.matrix[matrices] = {};
  for (int warp = 0; warp < kStagesWarps; ++warp) {
    int next = matrices;
    for (int i = matrices; i >= 0; --i) {
      StagedMatrix& m = params.matrix[i];
      const int job = (warp - m.first + kStagesWarps) % kStagesWarps;
      m.after[warp] = static_cast<unsigned char>(next);
      if (job >= m.jobs) continue;
      m.begin[warp] = m.weights + job % m.tiles * m.deep * kTileElements<T>;
      m.tile[warp] = static_cast<int16_t>(job % m.tiles);
      m.block[warp] = static_cast<int16_t>(job / m.tiles * m.wide);
      next = i;
    }
    params.start[warp] = static_cast<unsigned char>(next);
  }

  // The result, which the cluster turns around at the end.
  const StagedMap& last = params.maps[map_count - 1];
  const GpuStep& next = first[steps];
  params.results = static_cast<int>(next.in_channels);
  params.result_table = static_cast<int>(next.in_table);
  params.result_share = static_cast<int>(ceil_div(next.in_channels, cut.cluster));
  regions.ask(params.result_at, int64_t{params.result_share} * last.height * last.row * kSize, end,
              end);
  cut.shared_bytes = regions.place(device.shared_per_cta);
  return inside && cut.shared_bytes <= device.shared_per_cta ? cut : StagesCut{};
}

}  // namespace snv2::SNV2_GPU
