// Barriers of a CTA of stages.h, and its loads of parameters and of the first map.
#pragma once

#include <cstdint>

#include "cuda/stages_params.h"
#include "cuda/unit_load.h"

namespace snv2::SNV2_GPU {

template <class T>
SNV2_DEVICE Shared<T> shared_at(int bytes) {
  return (shared_memory() + bytes).template as<T>();
}

// Barriers --------------------------------------------------------------------------------------

// Barriers of a CTA, which follow those of the warps' rings.
class StageBarriers {
 public:
  SNV2_DEVICE explicit StageBarriers(int rings_at)
      : first_(shared_at<uint64_t>(rings_at) + kStagesWarps * kRingQuads) {}

  SNV2_DEVICE void init() const {
    if (threadIdx.x == 0) {
      for (int i = 0; i < kStageBarriers; ++i) barrier_init(first_ + i, 1);
    }
  }
  // Returns the barrier of the rows that neighbours store for a unit.
  SNV2_DEVICE Shared<uint64_t> rows(int unit) const { return first_ + (unit & 1); }
  SNV2_DEVICE void wait_for_rows(int unit) const {
    barrier_wait_cluster(rows(unit), unit >> 1 & 1);
  }
  // Returns the barrier of a unit's biases and depthwise convolutions.
  SNV2_DEVICE Shared<uint64_t> parameters() const { return first_ + 2; }
  SNV2_DEVICE void wait_for_parameters(int unit) const { barrier_wait(parameters(), unit & 1); }

 private:
  Shared<uint64_t> first_;
};

// Parameters ------------------------------------------------------------------------------------

// Starts the copy of a table, by a warp, and fills it up to `room` entries.
SNV2_DEVICE void load_table_of_warp(const int32_t* tables, const StagedArray& table, int room,
                                    int filler) {
  const Shared<int32_t> to = shared_at<int32_t>(table.at);
  for (int i = lane_of_warp(); i < room; i += kWarp) {
    if (i < table.count) {
      cp_async<1>(to + i, Global<const int32_t>{tables} + (table.from + i));
    } else {
      store(to + i, filler);
    }
  }
}

// Starts the copies of a unit's parameters, by the warps of duties 0 to 2. Numbers are counted at a
// barrier; tables are there after cp_async_wait and a barrier of the CTA.
template <class T>
SNV2_DEVICE void load_unit(const StagesParams<T>& params, const StagedUnit& unit, int duty) {
  switch (duty) {
    case 0:
      // What a tile has beyond the last plane is zeros.
      load_table_of_warp(params.tables, unit.in_table, units_of<16>(unit.in_channels) * 16,
                         params.maps[unit.in].planes);
      return;
    case 1:
      load_table_of_warp(params.tables, unit.out_table, units_of<16>(unit.main) * 16, 0);
      load_table_of_warp(params.tables, unit.proj_table, units_of<16>(unit.proj) * 16, 0);
      return;
    case 2:
      if (lane_of_warp() == 0) {
        const Shared<uint64_t> barrier = StageBarriers(params.barriers_at).parameters();
        const auto copy = [&](const StagedArray& array) {
          copy_bulk(shared_at<float>(array.at), Global<const float>{params.parameters} + array.from,
                    array.count * 4, barrier);
        };
        barrier_expect(barrier, unit.floats * 4);
        copy(unit.pw1_bias);
        copy(unit.dw.weights);
        copy(unit.pw2_bias);
        if (unit.stride == 2) {
          copy(unit.proj_dw.weights);
          copy(unit.proj_bias);
        }
      }
      return;
    default:
      return;
  }
}

// Stores zeros, by a warp.
template <class T>
SNV2_DEVICE void zero(Shared<T> to, int count) {
  constexpr int kVector = 16 / static_cast<int>(sizeof(T));
  for (int i = lane_of_warp() * kVector; i < count; i += kWarp * kVector) {
    store_vector<kVector>(to + i, Vector<T, kVector>{});
  }
}
// Stores zeros in the rows that a CTA would have if the image had more: products take all.
template <class T>
SNV2_DEVICE void zero_missing(Shared<T> own, const StagedMap& map, int rank) {
  const int rows = map.own(rank);
  zero(own + rows * map.row, (map.rows - rows) * map.row);
}

// Starts the copy of the planes of the first unit, the row above the CTA's with them.
template <class T>
SNV2_DEVICE void load_map(const StagesParams<T>& params, const StagedUnit& unit, int rank,
                          int image) {
  constexpr int kVector = 16 / static_cast<int>(sizeof(T));
  const StagedMap& map = params.maps[unit.in];
  const int first = map.first(rank), above = first > 0 ? 1 : 0;
  const int elements = (map.own(rank) + above) * map.row;
  const Shared<T> to = shared_at<T>(map.at) + (map.top - above * map.row);
  const Global<const T> from =
      Global<const T>{params.in} + (image * params.in_image + (first - above) * map.row);
  const Shared<int32_t> table = shared_at<int32_t>(unit.in_table.at);
  for (int c = warp_of_cta(); c < unit.in_channels; c += kStagesWarps) {
    const int plane = load(table + c);
    zero_missing(shared_at<T>(map.at) + (plane * map.pitch + map.top), map, rank);
    for (int i = lane_of_warp() * kVector; i < elements; i += kWarp * kVector) {
      cp_async<kVector>(to + (plane * map.pitch + i), from + (plane * params.in_pitch + i));
    }
  }
}

}  // namespace snv2::SNV2_GPU
