// Contiguous (NCHW) planes at stride 1: dw_conv3x3 and split_dw_cat_shuffle.
//
// A tile is some planes, one span of the input, and goes through shared memory. A lane marches down
// a strip of rows of a few columns; it reads each input row once and adds it to the three results
// that it is part of, of which two stay in registers: taps come in their order. Columns and rows of
// the network are multiples of 7, and so are the lane's: no lane idles, and where its columns are
// the whole row it reads nothing of others.
//
// Which planes, strips and columns the lanes of a warp take is the host's choice (spread_lanes):
// such that they lie in different banks. What passes through, and the results, then alternate as
// cat_shuffle's planes do (alternate.h).
#pragma once

#include <algorithm>

#include "cuda/alternate.h"

namespace snv2::SNV2_GPU {

// How many planes, strips and groups of columns the lanes of a warp take: powers of two, of which
// the product is a warp. The planes are `skip` apart.
struct Lanes {
  int planes, strips, groups, skip;
};

template <class T>
struct ColumnsParams {
  Operands<T> op;
  Lanes lanes;
  int tile;          // planes
  int tiles;         // of an image
  int rows, strips;  // of a plane; rows of a strip
  int groups;        // of columns
  int guard;         // bytes around source, of what is read and is not there
  int unit;          // bytes to which all that alternates is aligned
  int source_at, result_at, staged_at, parameters_at;  // in shared memory; pass is at 0
};

// Columns of a lane. kPairs: two move at once. kHalo: there are neighbours. kMasked: the row's last
// lane may have less.
template <int kColumnsOfLane, bool kInPairs, bool kWithHalo, bool kWithMask>
struct Columns {
  static constexpr int kColumns = kColumnsOfLane;
  static constexpr bool kPairs = kInPairs, kHalo = kWithHalo, kMasked = kWithMask;
};

template <class T, class Shape>
class March {
 public:
  SNV2_DEVICE March(Shared<float> weights, Shared<float> scales, Shared<float> shifts, int channel,
                    bool with_relu)
      : scale_(load(scales + (channel + channel / kWarp))),
        shift_(load(shifts + (channel + channel / kWarp))),
        least_(with_relu ? 0.0f : -kInfinity) {
#pragma unroll
    for (int tap = 0; tap < 9; ++tap)
      taps_[tap] = load(weights + (channel * 9 + channel / kWarp + tap));
  }

  // Computes `rows` rows of results, `width` apart, of `columns` columns. Where planes are cut into
  // strips, all lanes read a row above and one below, whether the plane has it or not, so that they
  // stay together.
  SNV2_DEVICE void run(Shared<T> result, Shared<T> source, int width, int columns, int rows,
                       bool left, bool right, bool cut, bool above, bool below) {
    float x[kColumns + 2], first[kColumns], second[kColumns], none[kColumns];
#pragma unroll
    for (int i = 0; i < kColumns; ++i) first[i] = none[i] = 0.0f;
    const auto read = [&](Shared<T> at) { read_row(x, at, columns, left, right); };
    const auto read_if = [&](bool inside, Shared<T> at) {
      read(at);
#pragma unroll
      for (int i = 0; i < kColumns + 2; ++i) x[i] = inside ? x[i] : 0.0f;
    };
    if (cut) {
      read_if(above, source + -width);
      add<0>(first, none, x);
    }
    read(source);
    add<3>(second, first, x);
    add<0>(first, none, x);
#pragma unroll 1
    for (int row = 1; row < rows; ++row) {
      source = source + width;
      read(source);
      float sums[kColumns];
      add<6>(sums, second, x);
      write_row(result, sums, columns);
      add<3>(second, first, x);
      add<0>(first, none, x);
      result = result + width;
    }
    if (cut) {
      read_if(below, source + width);
      add<6>(second, second, x);
    }
    write_row(result, second, columns);
  }

 private:
  static constexpr int kColumns = Shape::kColumns;
  static constexpr float kInfinity = __builtin_inff();

  SNV2_DEVICE static void read_row(float (&x)[kColumns + 2], Shared<T> at, int columns, bool left,
                                   bool right) {
    if constexpr (Shape::kPairs) {
#pragma unroll
      for (int i = 0; i < kColumns; i += 2) {
        const Vector<T, 2> pair = load_vector<2>(at + i);
        x[i + 1] = to_float(pair.values[0]);
        x[i + 2] = to_float(pair.values[1]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        const bool has = !Shape::kMasked || i < columns;
        const float value = to_float(load(at + (has ? i : 0)));
        x[i + 1] = has ? value : 0.0f;
      }
    }
    x[0] = x[kColumns + 1] = 0.0f;
    if constexpr (Shape::kHalo) {
      // Lanes at the edge read what lies there, so that all keep their distances.
      const float before = to_float(load(at + -1));
      const float after = to_float(load(at + (Shape::kMasked && !right ? 0 : kColumns)));
      x[0] = left ? before : 0.0f;
      x[kColumns + 1] = right ? after : 0.0f;
    }
  }
  // out = in and three taps from kTap on.
  template <int kTap>
  SNV2_DEVICE void add(float (&out)[kColumns], const float (&in)[kColumns],
                       const float (&x)[kColumns + 2]) const {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      float sum = in[i];
#pragma unroll
      for (int k = 0; k < 3; ++k) sum += taps_[kTap + k] * x[i + k];
      out[i] = sum;
    }
  }
  SNV2_DEVICE void write_row(Shared<T> at, const float (&sums)[kColumns], int columns) const {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const float y = sums[i] * scale_ + shift_;
      if constexpr (Shape::kPairs) {
        if (i % 2 == 0) continue;
        const Vector<T, 2> least = rounded_pair<T>(least_, least_);
        const Vector<T, 2> pair = rounded_pair<T>(sums[i - 1] * scale_ + shift_, y);
        store_vector<2>(at + (i - 1), max_nan(pair, least));
      } else {
        if (!Shape::kMasked || i < columns) store(at + i, rounded<T>(max_nan(y, least_)));
      }
    }
  }

  float taps_[9], scale_, shift_, least_;
};

constexpr int kColumnThreads = 2 * kWarp, kColumnCtas = 10;  // of an SM: below, ptxas spills

// Loads `each` parameters of each plane. Those of plane 32 and on lie a word further, so that lanes
// whose planes are two apart read different banks.
SNV2_DEVICE void load_of_planes(Shared<float> to, const float* from, int each, int planes) {
  load_parameters<kColumnThreads>(to, from, (planes < kWarp ? planes : kWarp) * each);
  if (planes > kWarp) {
    load_parameters<kColumnThreads>(to + (kWarp * each + 1), from + kWarp * each,
                                    (planes - kWarp) * each);
  }
}

template <class T, bool kPassthrough, class Shape>
__global__ void __launch_bounds__(kColumnThreads, kColumnCtas)
    columns_kernel(ColumnsParams<T> params) {
  const Operands<T>& op = params.op;
  const int thread = static_cast<int>(threadIdx.x), lane = lane_of_warp();
  const int warp = warp_uniform(thread / kWarp);
  const int width = static_cast<int>(op.width), height = static_cast<int>(op.height);
  const int plane = height * width;
  const int64_t image = blockIdx.x / static_cast<uint32_t>(params.tiles);
  const int channel0 =
      static_cast<int>(blockIdx.x % static_cast<uint32_t>(params.tiles)) * params.tile;
  const int left_over = static_cast<int>(op.channels) - channel0;
  const int planes = left_over < params.tile ? left_over : params.tile;
  const Shared<unsigned char> memory = shared_memory();

  // Load.
  const int64_t from = static_cast<int64_t>(channel0) * plane;
  const Shared<T> source = load_span<kColumnThreads>(
      memory + (params.source_at + params.guard),
      Global<const T>{op.source} + (image * op.source_image + from), planes * plane);
  for (int i = thread; i <= width; i += kColumnThreads) {
    store(source + (-1 - i), T{});
    store(source + (planes * plane + i), T{});
  }
  const Global<const T> passed =
      Global<const T>{op.pass} + (kPassthrough ? image * op.pass_image + from : 0);
  if constexpr (kPassthrough) load_span<kColumnThreads>(memory, passed, planes * plane);
  const Shared<float> weight = (memory + params.parameters_at).template as<float>();
  const Shared<float> scale = weight + (9 * planes + 1), shift = scale + (planes + 1);
  load_of_planes(weight, op.weight + channel0 * 9, 9, planes);
  load_of_planes(scale, op.scale + channel0, 1, planes);
  load_of_planes(shift, op.shift + channel0, 1, planes);
  cp_async_commit();
  cp_async_wait<0>();
  sync_threads();

  // Compute.
  constexpr int kUnit = kPassthrough ? 2 : 1;
  const Global<T> out = Global<T>{op.out} + (image * op.out_image + kUnit * from);
  const int phase = misalignment(out, 16);
  const Shared<T> result =
      (memory + (params.result_at + (kPassthrough ? 0 : phase))).template as<T>();
  const Lanes& lanes = params.lanes;
  const int lane_group = lane % lanes.groups, rest = lane / lanes.groups;
  const int lane_strip = rest % lanes.strips, lane_plane = rest / lanes.strips * lanes.skip;
  int turn = warp;  // the warps take turns
  for (int plane0 = 0; plane0 < planes; plane0 += lanes.planes * lanes.skip) {
    for (int skipped = 0; skipped < lanes.skip; ++skipped) {
      const int channel = plane0 + lane_plane + skipped;
      for (int strip0 = 0; strip0 < params.strips; strip0 += lanes.strips) {
        for (int group0 = 0; group0 < params.groups; group0 += lanes.groups) {
          const int strip = strip0 + lane_strip, group = group0 + lane_group;
          if (turn++ % 2 != 0) continue;
          if (channel >= planes || strip >= params.strips || group >= params.groups) continue;
          const int row = strip * params.rows, column = group * Shape::kColumns;
          const int rows = height - row < params.rows ? height - row : params.rows;
          March<T, Shape> march(weight, scale, shift, channel, op.relu);
          const int at = channel * plane + row * width + column;
          march.run(result + at, source + at, width, width - column, rows, column > 0,
                    column + Shape::kColumns < width, params.strips > 1, row > 0,
                    row + rows < height);
        }
      }
    }
  }
  sync_threads();

  // Store.
  Shared<T> staged = result;
  if constexpr (kPassthrough) {
    staged = (memory + (params.staged_at + phase)).template as<T>();
    const int half = warp == 0 ? 0 : plane;
    const int half_at = warp == 0 ? misalignment(passed, 16) : params.result_at;
    spread_planes(staged + half, (memory + half_at).template as<T>(), plane, planes, params.unit);
    sync_threads();
  }
  store_span<kColumnThreads>(out, staged, kUnit * planes * plane);
}

// Lanes of which none reads or writes the bank of another, if there are such: `plane`, `strip` and
// `group` are the distances of what they begin with, of elements of `bytes` bytes.
inline Lanes spread_lanes(int64_t plane, int64_t strip, int64_t group, int64_t bytes,
                          int64_t planes, int64_t strips, int64_t groups) {
  Lanes best{kWarp, 1, 1, 1};
  int64_t least = 1 << 20;
  for (int g = 1; g <= kWarp && g < 2 * groups; g *= 2) {
    for (int s = 1; s * g <= kWarp && s < 2 * strips; s *= 2) {
      for (int skip = 1; skip <= 2; ++skip) {
        const Lanes lanes{kWarp / (g * s), s, g, skip};
        // Lanes idle where there are too few planes, strips or groups.
        int64_t cost = 4 * (ceil_div(planes, lanes.planes * skip) * lanes.planes * skip - planes) *
                           32 / planes +
                       (ceil_div(strips, s) * s - strips) * 32 / strips +
                       (ceil_div(groups, g) * g - groups) * 32 / groups;
        for (int64_t first = 0; first < (bytes == 2 ? 2 : 1); ++first) {
          uint32_t used = 0;
          for (int lane = 0; lane < kWarp; ++lane) {
            const int64_t at = first + lane % g * group + lane / g % s * strip +
                               int64_t{lane / g / s} * skip * plane;
            const uint32_t bank = uint32_t{1} << (at * bytes / 4 % kWarp);
            cost += (used & bank) != 0 ? 1024 : 0;
            used |= bank;
          }
        }
        if (cost < least) {
          least = cost;
          best = lanes;
        }
      }
    }
  }
  return best;
}

// Fills in the tiling; false if not one plane fits.
template <class T, bool kPassthrough, class Shape>
bool tile_columns(ColumnsParams<T>& params, int64_t& shared_bytes) {
  constexpr int64_t kShared = 96 * 1024;  // two CTAs per SM
  constexpr int64_t kRows = 7, kParameters = 11 * sizeof(float);
  const Operands<T>& op = params.op;
  const int64_t size = sizeof(T), plane = op.height * op.width;
  const int64_t strips = ceil_div(op.height, kRows), rows = ceil_div(op.height, strips);
  const int64_t groups = ceil_div(op.width, Shape::kColumns);
  const int64_t guard = ceil_div((op.width + 1) * size, 16) * 16;
  params.guard = static_cast<int>(guard);
  const auto lay_out = [&](int64_t planes) {
    const int64_t span = span_bytes(planes * plane * size);
    const int64_t source = span + 2 * guard;
    const int64_t staged = span_bytes(2 * planes * plane * size);
    params.result_at = static_cast<int>(kPassthrough ? span : source);
    params.source_at = params.staged_at = kPassthrough ? static_cast<int>(2 * span) : 0;
    params.parameters_at =
        static_cast<int>(kPassthrough ? 2 * span + std::max(source, staged) : source + span);
    return params.parameters_at + (planes + 1) * kParameters;
  };
  if (plane * size > kShared || lay_out(1) > kShared) return false;
  params.strips = static_cast<int>(strips);
  params.rows = static_cast<int>(rows);
  params.groups = static_cast<int>(groups);
  params.lanes =
      spread_lanes(plane, rows * op.width, Shape::kColumns, size, op.channels, strips, groups);
  const Lanes& lanes = params.lanes;
  // Whole turns of both warps.
  const int64_t turns =
      lanes.skip * ceil_div(strips, lanes.strips) * ceil_div(groups, lanes.groups);
  int64_t planes = lanes.planes * lanes.skip * (turns > 1 ? 1 : 2);
  planes = std::min(planes, op.channels);
  while (lay_out(planes) > kShared) planes = ceil_div(planes, 2);
  params.tile = static_cast<int>(planes);
  params.tiles = static_cast<int>(ceil_div(op.channels, planes));
  shared_bytes = lay_out(planes);
  return op.batch * params.tiles <= kMaxGrid;
}

}  // namespace snv2::SNV2_GPU
