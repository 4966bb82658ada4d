// Contiguous (NCHW) planes that are too large for the tiles of columns.h and strided.h.
//
// A plane is cut into strips of rows, one output plane a tile: one span of the output, and one of
// the channels that pass through or of those that are convolved. Each strip reads up to two halo
// rows again.
#pragma once

#include <algorithm>

#include "cuda/span.h"

namespace snv2::SNV2_GPU {

template <class T>
struct PlanesParams {
  Operands<T> op;
  int64_t out_planes;                    // of one image
  int64_t strips;                        // of one plane
  int64_t tiles;                         // in all
  int rows;                              // output rows of a strip
  int guard;                             // bytes around source, of the taps of its outermost pixels
  int source_at, out_at, parameters_at;  // in shared memory; pass is at 0
  Divisor by_width;
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
    const int64_t q = tile / params.strips % params.out_planes;
    const int64_t image = tile / params.strips / params.out_planes;
    const int64_t channel = kPassthrough ? q / 2 : q;
    const bool passes = kPassthrough && q % 2 == 0;
    const int64_t row0 = strip * params.rows;
    const int64_t row1 = row0 + params.rows < op.out_height ? row0 + params.rows : op.out_height;
    const int rows = static_cast<int>(row1 - row0);
    const int source0 = first_source_row<kMain>(row0);
    const int source_rows = end_source_row<kMain>(row1, op.height) - source0;

    // Load.
    Shared<T> pass = memory.template as<T>();
    Shared<T> source = memory.template as<T>();
    const Shared<float> weight = (memory + params.parameters_at).template as<float>();
    const Shared<float> scale = weight + 9, shift = scale + 1;
    if (passes) {
      pass = load_span(
          memory,
          Global<const T>{op.pass} + (image * op.pass_image + channel * plane + row0 * op.width),
          rows * width);
    } else {
      const int elements = source_rows * width;
      source = load_span(memory + (params.source_at + params.guard),
                         Global<const T>{op.source} +
                             (image * op.source_image + channel * plane + source0 * op.width),
                         elements);
      for (int i = thread; i < margin; i += kThreads) {
        store(source + (-1 - i), T{});
        store(source + (elements + i), T{});
      }
      load_parameters(weight, op.weight + channel * 9, 9);
      load_parameters(scale, op.scale + channel, 1);
      load_parameters(shift, op.shift + channel, 1);
    }
    cp_async_commit();
    cp_async_wait<0>();
    sync_threads();

    // Compute. Lanes take neighbouring pixels, so neither loads nor stores conflict. A tap outside
    // the plane is loaded as well, from what lies there, so that the lanes stay together.
    const Global<T> out =
        Global<T>{op.out} + (image * op.out_image + q * out_plane + row0 * op.out_width);
    const Shared<T> staged = (memory + (params.out_at + misalignment(out, 16))).template as<T>();
    const int count = rows * out_width;
    if (passes) {
      for (int o = thread; o < count; o += kThreads) store(staged + o, load(pass + o));
    } else if constexpr (kStride == 1) {
      for (int o = thread; o < count; o += kThreads) {
        const int row = params.by_width.divide(o);
        const int column = o - row * out_width;
        const int y = static_cast<int>(row0) + row - source0;  // of source_rows
        const Shared<T> center = source + (y * width + column);
        float sum = 0.0f;
        for (int tap = 0; tap < 9; ++tap) {
          const int dy = tap / 3 - 1, dx = tap % 3 - 1;
          const float w = load(weight + tap);
          const float x = to_float(load(center + (dy * width + dx)));
          if (static_cast<unsigned>(y + dy) < static_cast<unsigned>(source_rows) &&
              static_cast<unsigned>(column + dx) < static_cast<unsigned>(width)) {
            sum += w * x;
          }
        }
        store(staged + o, finish<T>(sum, load(scale), load(shift), op.relu));
      }
    } else {
      // A warp takes 15 outputs of a row. Were each lane to read its own taps, they would lie two
      // apart and conflict; so lane l reads the column of input pixel 2 column - 1 + l, and the
      // three columns of an output meet by shuffles.
      constexpr int kOutputs = 15;
      const int lane = thread % kWarp;
      const int chunks = (out_width + kOutputs - 1) / kOutputs;
      for (int job = thread / kWarp; job < rows * chunks; job += kThreads / kWarp) {
        const int row = job / chunks, column = job % chunks * kOutputs;
        const int y = static_cast<int>(row0 + row) * 2 - source0;
        const int x = 2 * column - 1 + lane;
        float sums[3] = {0.0f, 0.0f, 0.0f};
        for (int dy = -1; dy <= 1; ++dy) {
          float value = 0.0f;
          if (static_cast<unsigned>(y + dy) < static_cast<unsigned>(source_rows) &&
              static_cast<unsigned>(x) < static_cast<unsigned>(width)) {
            value = to_float(load(source + ((y + dy) * width + x)));
          }
          for (int dx = 0; dx < 3; ++dx) sums[dx] += load(weight + ((dy + 1) * 3 + dx)) * value;
        }
        float sum = shuffle(sums[0], 2 * lane % kWarp);
        sum += shuffle(sums[1], (2 * lane + 1) % kWarp);
        sum += shuffle(sums[2], (2 * lane + 2) % kWarp);
        if (lane < kOutputs && column + lane < out_width) {
          store(staged + (row * out_width + column + lane),
                finish<T>(sum, load(scale), load(shift), op.relu));
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
  constexpr int64_t kParameters = 11 * sizeof(float), kHalo = 2;
  const Operands<T>& op = params.op;
  const int64_t size = sizeof(T);
  const int64_t guard = kMain == Main::kStride1 ? ceil_div((op.width + 1) * size, 16) * 16 : 0;
  const int64_t row = op.width * size, out_row = op.out_width * size;
  const int64_t per_row = stride_of(kMain) * row + (kPassthrough ? row : 0) + out_row;
  const int64_t fixed = 96 + 2 * guard + kHalo * row;
  const int64_t rows = std::min((kShared - kParameters - fixed) / per_row, op.out_height);
  if (rows < 1 || fixed > kShared) return false;
  const int64_t source_at = kPassthrough ? span_bytes(rows * row) : 0;
  const int64_t source = span_bytes((rows * stride_of(kMain) + kHalo) * row);
  params.guard = static_cast<int>(guard);
  params.source_at = static_cast<int>(source_at);
  params.out_at = static_cast<int>(source_at + source + 2 * guard);
  params.parameters_at = params.out_at + static_cast<int>(span_bytes(rows * out_row));
  shared_bytes = params.parameters_at + kParameters;
  params.rows = static_cast<int>(rows);
  params.out_planes = op.channels * (kPassthrough ? 2 : 1);
  params.strips = ceil_div(op.out_height, params.rows);
  params.tiles = op.batch * params.out_planes * params.strips;
  params.by_width = Divisor(op.out_width);
  return true;
}

}  // namespace snv2::SNV2_GPU
