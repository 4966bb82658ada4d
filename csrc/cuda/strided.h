// Contiguous (NCHW) planes at stride 2: dw_conv3x3.
//
// A tile is some planes, one span of the input and one of the result, and goes through shared
// memory. A lane marches down one column of results: of each input row it reads the two columns
// that are its own, has the one to the left from its neighbour, and adds the row to the results
// that it is part of, so taps come in their order. Lanes of one row read neighbouring words; rows
// are shorter than a warp, which takes as many planes as there is room for (spread_strided: such
// that lanes hit different banks).
#pragma once

#include <algorithm>

#include "cuda/columns.h"

namespace snv2::SNV2_GPU {

template <class T>
struct StridedParams {
  Operands<T> op;
  int columns;       // of results that a warp takes, a power of two: its other lanes have planes
  int skip;          // from one plane of a warp to the next
  int tile;          // planes
  int tiles;         // of an image
  int rows, strips;  // of a plane; rows of results of a strip
  bool pairs;        // two columns of the input can be read at once
  bool halves;       // of a warp store in turn, which otherwise hit the same banks
  int result_at, parameters_at;  // in shared memory; source is at 0
};

// A lane that has no result of its own reads what its neighbour reads. kPairs: the lane's two
// columns are read at once. kShuffles: it has the one to the left from the lane before, where
// reading it would hit banks twice; no row is then longer than a warp.
template <class T, bool kPairs, bool kShuffles>
class StridedMarch {
 public:
  SNV2_DEVICE StridedMarch(Shared<float> weights, Shared<float> scales, Shared<float> shifts,
                           int channel, bool with_relu, int column, int width, bool late)
      : late_(kShuffles && late),
        least_(with_relu ? 0.0f : -__builtin_inff()),
        left_(column > 0),
        right_(2 * column + 1 < width) {
    const int at = channel + static_cast<int>(static_cast<unsigned>(channel) / kWarp);
    const Shared<float> taps = weights + (at + 8 * channel);
#pragma unroll
    for (int tap = 0; tap < 9; ++tap) taps_[tap] = load(taps + tap);
    scale_ = load(scales + at);
    shift_ = load(shifts + at);
  }

  // Computes `rows` results, `out_line` bytes apart, of which the first has its middle tap at
  // `source`, where lines are `line` bytes.
  SNV2_DEVICE void run(bool wanted, Shared<T> result, Shared<T> source, int line, int out_line,
                       int rows, bool above, bool below) const {
    float x[3], sum = 0.0f;
    if (above) {
      read(x, advance(source, -line));
      sum = add<0>(sum, x);
    }
    const auto finish = [&] {
      const T y = rounded<T>(max_nan(sum * scale_ + shift_, least_));
      store_if(wanted && !late_, result, y);
      if constexpr (kShuffles) store_if(wanted && late_, result, y);
    };
#pragma unroll 1
    for (int row = 1; row < rows; ++row) {
      read(x, source);
      sum = add<3>(sum, x);
      read(x, advance(source, line));
      sum = add<6>(sum, x);
      source = advance(source, 2 * line);
      finish();
      sum = add<0>(0.0f, x);
      result = advance(result, out_line);
    }
    read(x, source);
    sum = add<3>(sum, x);
    if (below) {
      read(x, advance(source, line));
      sum = add<6>(sum, x);
    }
    finish();
  }

 private:
  // The columns of the taps; all lanes of a warp do so together.
  SNV2_DEVICE void read(float (&x)[3], Shared<T> at) const {
    if constexpr (kPairs) {
      const Vector<T, 2> pair = load_vector<2>(at);
      x[1] = to_float(pair.values[0]);
      x[2] = to_float(pair.values[1]);
    } else {
      x[1] = to_float(load(at));
      const float after = to_float(load(at + (right_ ? 1 : 0)));
      x[2] = right_ ? after : 0.0f;
    }
    float before;
    if constexpr (kShuffles) {
      before = shuffle_up(x[2], 1);
    } else {
      before = to_float(load(at + -1));
    }
    x[0] = left_ ? before : 0.0f;
  }
  template <int kTap>
  SNV2_DEVICE float add(float sum, const float (&x)[3]) const {
#pragma unroll
    for (int k = 0; k < 3; ++k) sum += taps_[kTap + k] * x[k];
    return sum;
  }

  bool late_;
  float taps_[9], scale_, shift_, least_;
  bool left_, right_;
};

constexpr int kStridedGuard = 16;  // bytes before source, of what is read and is not there

template <class T>
__global__ void __launch_bounds__(kColumnThreads) strided_kernel(StridedParams<T> params) {
  const Operands<T>& op = params.op;
  const int lane = lane_of_warp();
  const int warp = warp_uniform(static_cast<int>(threadIdx.x) / kWarp);
  const int width = static_cast<int>(op.width), height = static_cast<int>(op.height);
  const int out_width = static_cast<int>(op.out_width);
  const int out_height = static_cast<int>(op.out_height);
  const int plane = height * width, out_plane = out_height * out_width;
  const int64_t image = blockIdx.x / static_cast<uint32_t>(params.tiles);
  const int channel0 =
      static_cast<int>(blockIdx.x % static_cast<uint32_t>(params.tiles)) * params.tile;
  const int left_over = static_cast<int>(op.channels) - channel0;
  const int planes = left_over < params.tile ? left_over : params.tile;
  const Shared<unsigned char> memory = shared_memory();

  // Load.
  const Shared<T> source = load_span<kColumnThreads>(
      memory + kStridedGuard,
      Global<const T>{op.source} +
          (image * op.source_image + static_cast<int64_t>(channel0) * plane),
      planes * plane);
  if (threadIdx.x == 0) store(source + -1, T{});
  const Shared<float> weight = (memory + params.parameters_at).template as<float>();
  const Shared<float> scale = weight + (9 * planes + 1), shift = scale + (planes + 1);
  load_of_planes(weight, op.weight + channel0 * 9, 9, planes);
  load_of_planes(scale, op.scale + channel0, 1, planes);
  load_of_planes(shift, op.shift + channel0, 1, planes);
  cp_async_commit();
  cp_async_wait<0>();
  sync_threads();

  // Compute.
  const Global<T> out =
      Global<T>{op.out} + (image * op.out_image + static_cast<int64_t>(channel0) * out_plane);
  const Shared<T> result = (memory + (params.result_at + misalignment(out, 16))).template as<T>();
  const bool late = params.halves && lane >= kWarp / 2;
  const int lane_column = lane % params.columns;
  const int lane_plane = lane / params.columns * params.skip;
  // Told by another lane, so that no loop works them out again.
  const int line = warp_uniform(width * static_cast<int>(sizeof(T)));
  const int out_line = warp_uniform(out_width * static_cast<int>(sizeof(T)));
  const int together = kWarp / params.columns * params.skip;  // planes
  const auto march = [&](auto pairs, auto shuffles) {
    int turn = warp;  // the warps take turns
    for (int plane0 = 0; plane0 < planes; plane0 += together) {
      for (int skipped = 0; skipped < params.skip && plane0 + skipped < planes; ++skipped) {
        const int plane_of_lane = plane0 + lane_plane + skipped;
        const bool has_plane = plane_of_lane < planes;
        int channel = plane_of_lane;  // else, what the lanes beside it read
        while (channel >= planes) channel -= params.skip;
        for (int column0 = 0; column0 < out_width; column0 += params.columns) {
          const bool wanted = has_plane && column0 + lane_column < out_width;
          const int column =
              column0 + lane_column < out_width ? column0 + lane_column : out_width - 1;
          for (int strip = 0; strip < params.strips; ++strip) {
            if (turn++ % 2 != 0) continue;
            const int row = strip * params.rows;
            const int rows = out_height - row < params.rows ? out_height - row : params.rows;
            const StridedMarch<T, pairs.value, shuffles.value> lane_march(
                weight, scale, shift, channel, op.relu, column, width, late);
            lane_march.run(wanted, result + (channel * out_plane + row * out_width + column),
                           source + (channel * plane + (row * width + column) * 2), line, out_line,
                           rows, row > 0, 2 * (row + rows) - 1 < height);
          }
        }
      }
    }
  };
  if (!params.pairs) {
    march(std::false_type{}, std::false_type{});
  } else if (sizeof(T) == 4 && out_width <= kWarp) {
    march(std::true_type{}, std::bool_constant<sizeof(T) == 4>{});
  } else {
    march(std::true_type{}, std::false_type{});
  }
  sync_threads();

  // Store.
  store_span<kColumnThreads>(out, result, planes * out_plane);
}

// Passes that a warp's access takes beyond the least: lane l reads or writes `bytes` bytes at
// column `step` * (l % columns) of a plane, planes being `plane` elements of `size` bytes apart.
inline int64_t strided_conflicts(int64_t columns, int64_t width, int64_t plane, int64_t step,
                                 int64_t first, int64_t size, int64_t bytes, int64_t lanes) {
  int64_t conflicts = 0;
  for (int64_t lane0 = 0; lane0 < kWarp; lane0 += lanes) {
    int64_t words[kWarp][kWarp], most = 1;  // of a bank
    int64_t count[kWarp] = {};
    for (int64_t lane = lane0; lane < lane0 + lanes; ++lane) {
      const int64_t column = std::min(lane % columns, width - 1);
      const int64_t at = (first + lane / columns * plane + column * step) * size / 4;
      for (int64_t word = at; word < at + std::max<int64_t>(1, bytes / 4); ++word) {
        int64_t& n = count[word % kWarp];
        int64_t* const of_bank = words[word % kWarp];
        if (std::find(of_bank, of_bank + n, word) == of_bank + n) of_bank[n++] = word;
        most = std::max(most, n);
      }
    }
    conflicts += most - 1;
  }
  return conflicts;
}

// Chooses the planes that a warp takes at once.
template <class T>
void spread_strided(StridedParams<T>& params) {
  const Operands<T>& op = params.op;
  const int64_t size = sizeof(T), columns = params.columns, width = op.out_width;
  const int64_t plane = op.height * op.width, out_plane = op.out_height * width;
  int64_t least = int64_t{1} << 40;
  for (int skip = 1; skip <= kWarp / 2; ++skip) {
    int64_t loads = 0, stores = 0, turns = 0;  // conflicts; those where half-warps take turns
    const auto conflicts = [&](int64_t distance, int64_t step, int64_t first, int64_t bytes,
                               int64_t lanes) {
      return strided_conflicts(columns, width, skip * distance, step, first, size, bytes, lanes);
    };
    for (int64_t first = 0; first < (size == 2 ? 2 : 1); ++first) {
      loads += params.pairs ? conflicts(plane, 2, 0, 2 * size, kWarp * 2 / size)
                            : conflicts(plane, 2, first, size, kWarp);
      stores += conflicts(out_plane, 1, first, size, kWarp);
      turns += conflicts(out_plane, 1, first, size, kWarp / 2);
    }
    // Lanes idle where planes are no multiple of those that a warp takes.
    const int64_t together = kWarp / columns * skip;
    const int64_t idle = ceil_div(op.channels, together) * together - op.channels;
    const int64_t cost = 1024 * (8 * loads + stores + turns) + 128 * idle / op.channels + skip;
    if (cost < least) {
      least = cost;
      params.skip = skip;
      params.halves = stores > 0;
    }
  }
}

// Fills in the tiling; false if not one plane fits.
template <class T>
bool tile_strided(StridedParams<T>& params, int64_t& shared_bytes) {
  constexpr int64_t kShared = 50 * 1024;  // four CTAs per SM
  constexpr int64_t kResults = 3072;      // of a tile: what is done once for it is little beside
  constexpr int64_t kParameters = 11 * sizeof(float);
  const Operands<T>& op = params.op;
  const int64_t size = sizeof(T);
  const int64_t plane = op.height * op.width, out_plane = op.out_height * op.out_width;
  const auto lay_out = [&](int64_t planes) {
    params.result_at = static_cast<int>(kStridedGuard + span_bytes(planes * plane * size));
    params.parameters_at =
        params.result_at + static_cast<int>(span_bytes(planes * out_plane * size));
    return params.parameters_at + (planes + 1) * kParameters;
  };
  if (plane * size > kShared || lay_out(1) > kShared) return false;
  const auto places = reinterpret_cast<uintptr_t>(op.source) |
                      static_cast<uintptr_t>((op.source_image | op.width) * size);
  params.pairs = places % static_cast<uintptr_t>(2 * size) == 0;
  params.columns = 1;
  while (params.columns < kWarp && params.columns < op.out_width) params.columns *= 2;
  spread_strided(params);
  const int64_t together = kWarp / params.columns * params.skip;
  constexpr int64_t kMost = 2 * kWarp;  // as load_of_planes has them
  int64_t planes = std::min(ceil_div(kResults, out_plane), kMost);
  planes = std::min({op.channels, kMost, std::max<int64_t>(1, planes / together) * together});
  while (lay_out(planes) > kShared)
    planes = planes > together ? planes - together : ceil_div(planes, 2);
  params.tile = static_cast<int>(planes);
  params.tiles = static_cast<int>(ceil_div(op.channels, planes));
  // Both warps have something to do.
  const int64_t turns = ceil_div(planes, together) * params.skip;
  params.strips =
      turns * ceil_div(op.out_width, params.columns) % 2 == 0 || op.out_height < 4 ? 1 : 2;
  params.rows = static_cast<int>(ceil_div(op.out_height, params.strips));
  params.strips = static_cast<int>(ceil_div(op.out_height, params.rows));
  shared_bytes = lay_out(planes);
  return op.batch * params.tiles <= kMaxGrid;
}

}  // namespace snv2::SNV2_GPU
