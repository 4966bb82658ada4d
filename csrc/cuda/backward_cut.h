// Parameters of the gradients' kernels, and how a launch is cut.
//
// A CTA has 64 threads as a rule, or 128, each with a piece of seven columns and up to 14 rows
// (backward_march.h). With seven rows twice as many threads would each do what is done once for a
// CTA: some 700 instructions, beside 1,600 for the piece.
#pragma once

#include <algorithm>

#include "cuda/backward_march.h"
#include "cuda/launch.h"

namespace snv2::SNV2_GPU {

template <class T>
struct BackwardParams {
  Strided<const T> grad, x;  // channel strides are from one of the convolution's to the next
  Strided<T> grad_x;
  float* sums;  // [parts][kDepthwiseSums][sums_pitch(channels)]
  const float* weight;
  const float* scale;
  const float* shift;
  bool relu;
  int64_t batch, channels;
  int height, width;
  int groups;           // CTAs: channels
  int64_t parts;        // times runs of tiles, of which the first `longer` have one more
  int64_t run, longer;  // tiles
  int group;            // channels of a CTA; channels-last a power of two, from kWarp on
  int step;             // threads of a channel
  bool planes;          // a tile is whole planes, read and written as spans
  bool whole;           // all pieces of it have kPieceColumns columns
  int rows, columns;    // of a tile, even where they are cut at stride 2
  int tiles_down, tiles_across;
  int copy_x, copy_grad;          // elements of a copy, where tiles are no spans
  bool stages_pass;               // planes that pass through are staged
  int unit;                       // bytes to which they are aligned
  int grad_at, pass_at, main_at;  // in shared memory; x is at 0, pass and main are of grad_x
  int parameters_at, zeros_at;
  int x_bytes, grad_bytes;  // of 32 channels, channels-last
};

// Threads of a CTA: a power of two. Few of them leave less to be done once for a CTA by each; of
// large planes there would be few on an SM.
constexpr int kLeastThreads = 64, kMostThreads = 128;
constexpr int kLeastCtas = 3;  // of an SM: with more, ptxas spills
constexpr int kSector = 32;    // bytes

// Elements from one sum of all channels to the next: whole sectors.
constexpr int64_t sums_pitch(int64_t channels) {
  constexpr int64_t kFloats = kSector / static_cast<int64_t>(sizeof(float));
  return ceil_div(channels, kFloats) * kFloats;
}

// Bytes in which store_sums() adds up.
constexpr int64_t sums_room(int64_t threads) {
  return kDepthwiseSums * (threads * 3 / 2 + threads / 8) * static_cast<int64_t>(sizeof(float));
}

// Fills in how a launch is cut. It depends on shapes alone, as the order of the sums does.
template <class T>
void cut_backward(BackwardParams<T>& params, bool channels_last, int stride, bool passthrough,
                  Launch& config) {
  constexpr int64_t kShared = 96 * 1024;  // two CTAs per SM
  constexpr int64_t kCtas = 2 * 132;
  constexpr int64_t kMostAdded = 256;  // to one sum by a thread: more would round too often
  constexpr int64_t kRows = 14;        // of a piece, about
  const int64_t size = sizeof(T), unit = passthrough ? 2 : 1;
  const int64_t height = params.height, width = params.width;
  const int64_t plane = height * width, out_width = conv3x3_extent(width, stride);
  const int64_t results = conv3x3_extent(height, stride) * out_width;
  const int64_t lanes = channels_last ? kWarp : 1;
  const auto pieces = [&](int64_t rows, int64_t columns) {
    return std::max<int64_t>(1, ceil_div(conv3x3_extent(rows, stride), kRows) *
                                    ceil_div(conv3x3_extent(columns, stride), kPieceColumns));
  };
  // Planes of whole sectors that pass through are not staged.
  params.stages_pass = passthrough && plane * size % kSector != 0;
  const int64_t staged = params.stages_pass ? 2 : 1;
  const auto plane_bytes = [&](int64_t channels) {
    return span_bytes(channels * plane * size) * (1 + staged) +
           span_bytes(channels * unit * results * size);
  };
  const auto x_bytes = [&](int64_t rows, int64_t columns) {
    return ceil_div(std::min(rows + 4, height) * std::min(columns + 4, width) * lanes * size, 16) *
           16;
  };
  const auto grad_bytes = [&](int64_t rows, int64_t columns) {
    const int64_t down = std::min(rows + 2, height) / stride + 1;
    const int64_t across = std::min(columns + 2, width) / stride + 1;
    return ceil_div(down * across * lanes * size * (channels_last ? unit : 1), 16) * 16;
  };
  const auto fits = [&](int64_t rows, int64_t columns, int64_t blocks) {
    return blocks * (x_bytes(rows, columns) + grad_bytes(rows, columns)) <= kShared;
  };

  int64_t rows = height, columns = width, group = 1, step = 0;
  int64_t threads = kLeastThreads, shared_bytes = 0;
  // As many threads as there are pieces.
  const auto grow = [&](int64_t count) {
    while (2 * threads <= std::min<int64_t>(kMostThreads, count)) threads *= 2;
  };
  params.planes = !channels_last && plane_bytes(1) <= kShared;
  if (params.planes) {
    grow(pieces(height, width));
    step = std::min(threads, pieces(height, width));
    group = std::min<int64_t>(threads / step, std::max<int64_t>(1, params.channels));
    while (plane_bytes(group) > kShared) --group;
    const int64_t maps = group * size;
    params.grad_at = static_cast<int>(span_bytes(maps * plane));
    params.main_at = params.grad_at + static_cast<int>(span_bytes(maps * unit * results));
    params.pass_at = params.main_at + static_cast<int>(span_bytes(maps * plane));
    shared_bytes = plane_bytes(group);
  } else {
    // Rows of a tile, of whole rows of the map if a few fit.
    constexpr int64_t kLeast = 4;
    const int64_t every = stride;
    const auto most_rows = [&] {
      int64_t most = std::min(height, every);
      while (most < height && fits(most + every, columns, 1)) most += every;
      return most;
    };
    if (!fits(std::min(kLeast, height), columns, 1)) {
      columns = std::min<int64_t>(columns, (channels_last ? 4 : 36) * kPieceColumns);
    }
    rows = most_rows();
    rows = ceil_div(ceil_div(height, ceil_div(height, rows)), every) * every;
    int64_t blocks = 1;
    if (channels_last) {
      constexpr int64_t kLeastWarps = 4;
      grow(kWarp * std::max(kLeastWarps, pieces(rows, columns)));
      const int64_t warps = threads / kWarp;
      while (2 * blocks * pieces(rows, columns) <= warps && kWarp * blocks < params.channels &&
             fits(rows, columns, 2 * blocks)) {
        blocks *= 2;
      }
      group = kWarp * blocks;
      step = warps / blocks;
    } else {
      grow(pieces(rows, columns));
      step = threads;
    }
    params.x_bytes = static_cast<int>(x_bytes(rows, columns));
    params.grad_bytes = static_cast<int>(grad_bytes(rows, columns));
    params.grad_at = static_cast<int>(blocks) * params.x_bytes;
    shared_bytes = blocks * (x_bytes(rows, columns) + grad_bytes(rows, columns));
  }
  params.rows = static_cast<int>(rows);
  params.columns = static_cast<int>(columns);
  params.group = static_cast<int>(group);
  params.step = static_cast<int>(step);
  params.whole = columns == width && out_width % kPieceColumns == 0 && width == stride * out_width;
  params.parameters_at = static_cast<int>(shared_bytes);
  shared_bytes += 11 * group * static_cast<int64_t>(sizeof(float));
  params.zeros_at = static_cast<int>(shared_bytes);
  shared_bytes += zeros_of(static_cast<int>(channels_last ? unit * lanes : 1)) * size;
  shared_bytes = std::max(shared_bytes, sums_room(threads));
  params.groups = static_cast<int>(ceil_div(params.channels, group));
  params.tiles_down = static_cast<int>(ceil_div(height, rows));
  params.tiles_across = static_cast<int>(ceil_div(width, columns));
  config.threads = static_cast<uint32_t>(threads);
  config.shared_bytes = shared_bytes;
  const int64_t tiles = params.batch * params.tiles_down * params.tiles_across;
  const int64_t pixels = ceil_div(rows * columns, step);
  params.parts = std::min(
      tiles, std::max(ceil_div(kCtas, params.groups), ceil_div(tiles * pixels, kMostAdded)));
  params.run = params.parts == 0 ? 0 : tiles / params.parts;
  params.longer = params.parts == 0 ? 0 : tiles % params.parts;
}

}  // namespace snv2::SNV2_GPU
