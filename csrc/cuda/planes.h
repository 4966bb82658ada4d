// Contiguous (NCHW) maps at stride 2, and at stride 1 of planes too large for columns.h.
//
// Neighbouring channels of one image are neighbours in memory, so a tile of some output planes is
// one span of the output, one of the passed-through channels and one of the main channels: all is
// read once and written once. The ends of a span may share a sector with the next tile, and a tile
// reads its 11 parameters per channel: 8 KB per tile keep both below 4 % (28 x 28, 14 x 14).
//
// Eight channels are whole sectors of parameters, and of any plane whose pixels are a multiple
// of 4.
//
// A plane too large for shared memory is cut into strips of rows, one output plane per tile; each
// strip then reads up to two halo rows again.
#pragma once

#include <algorithm>

#include "cuda/span.h"

namespace snv2::SNV2_GPU {

template <class T>
struct PlanesParams {
  Operands<T> op;
  int64_t out_planes;                    // of one image
  int64_t plane_tiles;                   // of one image
  int64_t strips;                        // of one plane
  int64_t tiles;                         // in all
  int planes;                            // output planes of a tile; 1 if there are several strips
  int rows;                              // output rows of a strip
  int guard;                             // bytes around source, of the taps of its outermost pixels
  int source_at, out_at, parameters_at;  // in shared memory; pass is at 0
  Divisor by_tile_plane, by_width;
};

// Rows of source that output rows [begin, end) read.
template <Main kMain>
SNV2_DEVICE int first_source_row(int64_t begin) {
  return static_cast<int>(begin == 0 ? begin : begin * stride_of(kMain) - 1);
}
template <Main kMain>
SNV2_DEVICE int end_source_row(int64_t end, int64_t height) {
  const int64_t last = (end - 1) * stride_of(kMain) + 2;
  return static_cast<int>(last < height ? last : height);
}

template <class T, bool kPassthrough, Main kMain>
__global__ void __launch_bounds__(kThreads) planes_kernel(PlanesParams<T> params) {
  constexpr int kStride = stride_of(kMain);
  static_assert(!kPassthrough || kStride == 1, "passed-through planes keep their size");
  const Operands<T>& op = params.op;
  const int thread = static_cast<int>(threadIdx.x);
  const int width = static_cast<int>(op.width), out_width = static_cast<int>(op.out_width);
  const int64_t plane = op.height * op.width, out_plane = op.out_height * op.out_width;
  const Shared<unsigned char> memory = shared_memory();
  const int margin = kMain == Main::kStride1 ? width + 1 : 0;  // elements of guard that are read

  for (int64_t tile = blockIdx.x; tile < params.tiles; tile += gridDim.x) {
    const int64_t strip = tile % params.strips;
    const int64_t group = tile / params.strips % params.plane_tiles;
    const int64_t image = tile / params.strips / params.plane_tiles;
    const int64_t q0 = group * params.planes;
    const int64_t q1 =
        q0 + params.planes < params.out_planes ? q0 + params.planes : params.out_planes;
    const int planes = static_cast<int>(q1 - q0);
    const int64_t row0 = strip * params.rows;
    const int64_t row1 = row0 + params.rows < op.out_height ? row0 + params.rows : op.out_height;
    const int rows = static_cast<int>(row1 - row0);
    const int64_t pass0 = kPassthrough ? (q0 + 1) / 2 : 0, main0 = kPassthrough ? q0 / 2 : q0;
    const int pass_planes = kPassthrough ? static_cast<int>((q1 + 1) / 2 - pass0) : 0;
    const int main_planes = kPassthrough ? static_cast<int>(q1 / 2 - main0) : planes;
    const int source0 = first_source_row<kMain>(row0);
    const int source_rows = end_source_row<kMain>(row1, op.height) - source0;

    // Load.
    Shared<T> pass = memory.template as<T>();
    if (pass_planes > 0) {
      pass = load_span(
          memory,
          Global<const T>{op.pass} + (image * op.pass_image + pass0 * plane + row0 * op.width),
          pass_planes * rows * width);
    }
    Shared<T> source = memory.template as<T>();
    const Shared<float> weight = (memory + params.parameters_at).template as<float>();
    const Shared<float> scale = weight + 9 * main_planes, shift = scale + main_planes;
    if (main_planes > 0) {
      const int elements = main_planes * source_rows * width;
      source = load_span(memory + (params.source_at + params.guard),
                         Global<const T>{op.source} +
                             (image * op.source_image + main0 * plane + source0 * op.width),
                         elements);
      for (int i = thread; i < margin; i += kThreads) {
        store(source + (-1 - i), T{});
        store(source + (elements + i), T{});
      }
      load_parameters(weight, op.weight + main0 * 9, main_planes * 9);
      load_parameters(scale, op.scale + main0, main_planes);
      load_parameters(shift, op.shift + main0, main_planes);
    }
    cp_async_commit();
    cp_async_wait<0>();
    sync_threads();

    // Compute. Lanes take neighbouring pixels, so neither loads nor stores conflict. A tap outside
    // the plane is loaded as well, from what lies there, so that the lanes stay together.
    const Global<T> out =
        Global<T>{op.out} + (image * op.out_image + q0 * out_plane + row0 * op.out_width);
    const Shared<T> staged = (memory + (params.out_at + misalignment(out, 16))).template as<T>();
    const int tile_plane = rows * out_width;
    const int count = planes * tile_plane;
    if constexpr (kStride == 1) {
      for (int o = thread; o < count; o += kThreads) {
        const int q = planes == 1 ? 0 : params.by_tile_plane.divide(o);
        const int pixel = o - q * tile_plane;
        T value;
        if (kPassthrough && (q0 + q) % 2 == 0) {
          value = load(pass + (static_cast<int>((q0 + q) / 2 - pass0) * tile_plane + pixel));
        } else {
          const int channel = static_cast<int>((kPassthrough ? (q0 + q) / 2 : q0 + q) - main0);
          const int row = params.by_width.divide(pixel);
          const int column = pixel - row * out_width;
          const int y = static_cast<int>(row0) + row - source0;  // of source_rows
          const Shared<T> center = source + ((channel * source_rows + y) * width + column);
          float sum = 0.0f;
          for (int tap = 0; tap < 9; ++tap) {
            const int dy = tap / 3 - 1, dx = tap % 3 - 1;
            const float w = load(weight + (channel * 9 + tap));
            const float x = to_float(load(center + (dy * width + dx)));
            if (static_cast<unsigned>(y + dy) < static_cast<unsigned>(source_rows) &&
                static_cast<unsigned>(column + dx) < static_cast<unsigned>(width)) {
              sum += w * x;
            }
          }
          value = finish<T>(sum, load(scale + channel), load(shift + channel), op.relu);
        }
        store(staged + o, value);
      }
    } else {
      // A warp takes 15 outputs of a row. Were each lane to read its own taps, they would lie two
      // apart and conflict; so lane l reads the column of input pixel 2 column - 1 + l, and the
      // three columns of an output meet by shuffles.
      constexpr int kOutputs = 15;
      const int lane = thread % kWarp;
      const int chunks = (out_width + kOutputs - 1) / kOutputs;
      const int jobs = planes * rows * chunks;
      for (int job = thread / kWarp; job < jobs; job += kThreads / kWarp) {
        const int line = job / chunks, column = job % chunks * kOutputs;
        const int channel = line / rows, row = line % rows;
        const int y = static_cast<int>(row0 + row) * 2 - source0;
        const int x = 2 * column - 1 + lane;
        float sums[3] = {0.0f, 0.0f, 0.0f};
        for (int dy = -1; dy <= 1; ++dy) {
          float value = 0.0f;
          if (static_cast<unsigned>(y + dy) < static_cast<unsigned>(source_rows) &&
              static_cast<unsigned>(x) < static_cast<unsigned>(width)) {
            value = to_float(load(source + ((channel * source_rows + y + dy) * width + x)));
          }
          for (int dx = 0; dx < 3; ++dx) {
            sums[dx] += load(weight + (channel * 9 + (dy + 1) * 3 + dx)) * value;
          }
        }
        float sum = shuffle(sums[0], 2 * lane % kWarp);
        sum += shuffle(sums[1], (2 * lane + 1) % kWarp);
        sum += shuffle(sums[2], (2 * lane + 2) % kWarp);
        if (lane < kOutputs && column + lane < out_width) {
          store(staged + (line * out_width + column + lane),
                finish<T>(sum, load(scale + channel), load(shift + channel), op.relu));
        }
      }
    }
    sync_threads();

    // Store.
    store_span(out, staged, count);
    if (tile + gridDim.x < params.tiles) sync_threads();
  }
}

// Fills in the tiling; false if not even one row fits.
template <class T, bool kPassthrough, Main kMain>
bool tile_planes(PlanesParams<T>& params, int64_t& shared_bytes) {
  constexpr int64_t kShared = 44 * 1024;  // four or five CTAs per SM
  constexpr int64_t kLeast = 8 * 1024;    // moved by a tile; amortises ends and parameters
  constexpr int64_t kCtas = 2 * 132;
  constexpr int64_t kUnit = kPassthrough ? 2 : 1;  // output planes per channel
  constexpr int64_t kParameters = 11 * sizeof(float);
  const Operands<T>& op = params.op;
  const int64_t size = sizeof(T);
  const int64_t plane = op.height * op.width * size;
  const int64_t out_plane = op.out_height * op.out_width * size;
  const int64_t guard = kMain == Main::kStride1 ? ceil_div((op.width + 1) * size, 16) * 16 : 0;
  params.guard = static_cast<int>(guard);
  const auto lay_out = [&](int64_t pass, int64_t source, int64_t out, int64_t channels) {
    const int64_t source_at = pass > 0 ? span_bytes(pass) : 0;
    const int64_t out_at = source_at + span_bytes(source) + 2 * guard;
    const int64_t parameters_at = out_at + span_bytes(out);
    params.source_at = static_cast<int>(source_at);
    params.out_at = static_cast<int>(out_at);
    params.parameters_at = static_cast<int>(parameters_at);
    shared_bytes = parameters_at + channels * kParameters;
  };

  params.out_planes = op.channels * kUnit;
  const int64_t per_channel = (kPassthrough ? plane : 0) + plane + kUnit * out_plane;
  const int64_t fixed = 96 + 2 * guard;
  if (per_channel + kParameters + fixed <= kShared) {
    const int64_t fit = (kShared - fixed) / (per_channel + kParameters);
    const int64_t least = ceil_div(kLeast, per_channel);
    int64_t k = std::max(least, op.batch * op.channels / kCtas);
    if (k > 4) k = ceil_div(k, 8) * 8;
    if (k > fit) k = fit >= 8 ? fit / 8 * 8 : fit >= 4 ? 4 : fit;
    k = std::min(k, op.channels);
    params.planes = static_cast<int>(k * kUnit);
    params.rows = static_cast<int>(op.out_height);
    lay_out(kPassthrough ? k * plane : 0, k * plane, k * kUnit * out_plane, k);
  } else {
    // A tile of one plane is either passed through or computed.
    const int64_t row = op.width * size, out_row = op.out_width * size;
    constexpr int64_t halo = 2;
    const int64_t per_strip_row = stride_of(kMain) * row + (kPassthrough ? row : 0) + out_row;
    const int64_t rows =
        std::min((kShared - kParameters - fixed - halo * row) / per_strip_row, op.out_height);
    if (rows < 1 || fixed + halo * row > kShared) return false;
    params.planes = 1;
    params.rows = static_cast<int>(rows);
    lay_out(kPassthrough ? rows * row : 0, (rows * stride_of(kMain) + halo) * row, rows * out_row,
            1);
  }
  params.strips = ceil_div(op.out_height, params.rows);
  params.plane_tiles = ceil_div(params.out_planes, params.planes);
  params.tiles = op.batch * params.plane_tiles * params.strips;
  params.by_tile_plane = Divisor(params.rows * op.out_width);
  params.by_width = Divisor(op.out_width);
  static_assert(kShared < kMaxDividend, "Divisor");
  return true;
}

}  // namespace snv2::SNV2_GPU
