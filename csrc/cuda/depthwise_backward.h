// Gradients of dw_conv3x3, and of split_dw_cat_shuffle, where as many channels pass through.
//
// A CTA keeps to some channels, a thread to one, and marches through tiles of some images. Its sums
// for the parameters' gradients stay in registers all the way; at the end each CTA writes one set,
// and a second kernel adds the sets up in their order. On a tile there are two phases:
//   the convolution again, for the pixels of the gradient in and around the tile: it clears them,
//   in shared memory, where the ReLU cut off; the inputs it has read are multiplied with the rest,
//   grad_x, the same convolution turned round.
//
// Contiguous: lanes take neighbouring pixels, and a tile is the planes of one to eight channels:
// one span of x, one of the gradient and two of grad_x, as in planes.h. Channels-last: lanes take
// 32 neighbouring channels. A tile is an image if that fits, else, as in contiguous planes that do
// not fit, a block of pixels; it reads two rows and columns of x around it, and one of the
// gradient, which its neighbours read too, from L2 as a rule.
#pragma once

#include <algorithm>
#include <array>

#include "cuda/line.h"
#include "cuda/span.h"

namespace snv2::SNV2_GPU {

constexpr int64_t kMostPixels = 1 << 20;  // of a row or column: with halos they are int

// Strides of a map in elements; main is where the convolution's channels begin.
template <class T>
struct Strided {
  T* data;
  int64_t main, image, channel, row, pixel;

  SNV2_DEVICE int64_t at(int64_t n, int64_t c, int64_t y, int64_t x) const {
    return n * image + c * channel + y * row + x * pixel;
  }
};

template <class T>
struct BackwardParams {
  Strided<const T> grad, x;  // channel strides are from one of the convolution's to the next
  Strided<T> grad_x;
  float* sums;  // [parts][channels][kDepthwiseSums]
  const float* weight;
  const float* scale;
  const float* shift;
  bool relu;
  int64_t batch, channels;
  int height, width;
  int64_t groups, parts;  // CTAs: channels, times runs of tiles
  int group;              // channels of a CTA: 1, 2, 4, 8 or kWarp
  bool planes;            // a tile is whole planes, read and written as spans
  int rows, columns;      // of a tile
  int64_t tiles_down, tiles_across;
  int copy_x, copy_grad;          // elements of a copy, where tiles are no spans
  int grad_at, pass_at, main_at;  // in shared memory; x is at 0, pass and main are of grad_x
};

struct Extent {
  int begin, end;

  SNV2_DEVICE int size() const { return end - begin; }
  SNV2_DEVICE bool has(int i) const { return i >= begin && i < end; }
  SNV2_DEVICE int nearest(int i) const { return i < begin ? begin : i < end ? i : end - 1; }
  SNV2_DEVICE Extent with_halo(int halo, int limit) const {
    return {begin > halo ? begin - halo : 0, end + halo < limit ? end + halo : limit};
  }
  // Results of that stride whose middle tap is inside.
  SNV2_DEVICE Extent results(int stride) const {
    return {(begin + stride - 1) / stride, (end - 1) / stride + 1};
  }
};

// Every step-th pixel of a block, row by row.
struct Walk {
  int y, x;
  int step_y, step_x, width;

  SNV2_DEVICE Walk(int first, int step, int block_width)
      : y(first / block_width),
        x(first % block_width),
        step_y(step / block_width),
        step_x(step % block_width),
        width(block_width) {}
  SNV2_DEVICE void next() {
    y += step_y;
    x += step_x;
    if (x >= width) {
      x -= width;
      ++y;
    }
  }
};

// A block of a map in shared memory.
template <class T>
struct Block {
  Shared<T> data;
  Extent rows, columns;
  int channel, pixel;  // strides

  SNV2_DEVICE Shared<T> at(int c, int y, int x) const {
    return data + (c * channel + ((y - rows.begin) * columns.size() + x - columns.begin) * pixel);
  }
};

// Starts the copy of a block whose first channel is at `from`: a warp takes a line, which is
// `elements` channels of a pixel, or the pixels of a row.
template <bool kChannelLanes, class T>
SNV2_DEVICE void load_block(const Block<T>& to, const Strided<const T>& map, Global<const T> from,
                            int elements, int copy) {
  const int across = kChannelLanes ? to.columns.size() : 1;
  const int lines = to.rows.size() * across;
  for (int line = static_cast<int>(threadIdx.x) / kWarp; line < lines; line += kThreads / kWarp) {
    const int row = line / across, column = line % across;
    const int length = kChannelLanes ? elements : to.columns.size();
    load_line(to.data + (row * to.columns.size() + column) * to.pixel,
              from + map.at(0, 0, to.rows.begin + row, to.columns.begin + column), 0, length,
              length, copy);
  }
}

// What a thread knows of its channel, the `channel`-th of the CTA. All threads call it.
struct ChannelGradient {
  float weight[9], scale, shift;
  float sums[kDepthwiseSums] = {};

  template <class T>
  SNV2_DEVICE ChannelGradient(Shared<float> room, const BackwardParams<T>& params, int64_t channel0,
                              int channels, int channel) {
    const Shared<float> scales = room + 9 * params.group, shifts = scales + params.group;
    load_parameters(room, params.weight + channel0 * 9, channels * 9);
    load_parameters(scales, params.scale + channel0, channels);
    load_parameters(shifts, params.shift + channel0, channels);
    sync_threads();
    const int c = channel < channels ? channel : 0;
    for (int tap = 0; tap < 9; ++tap) weight[tap] = load(room + (c * 9 + tap));
    scale = load(scales + c);
    shift = load(shifts + c);
    sync_threads();
  }
};

// Adds up the CTA's sums of each channel and writes them, [channels][kDepthwiseSums].
template <bool kChannelLanes>
SNV2_DEVICE void store_sums(Shared<float> room, ChannelGradient& of, Global<float> to, int channels,
                            int group) {
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  constexpr int kWarps = kThreads / kWarp;
  constexpr int kSums = static_cast<int>(kDepthwiseSums);
  sync_threads();  // room may be where the last tile lay
  for (int i = 0; i < kSums; ++i) {
    float sum = of.sums[i];
    if constexpr (kChannelLanes) {
      store(room + ((warp * kSums + i) * kWarp + lane), sum);
    } else {
      for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) sum += shuffle_xor(sum, lanes);
      if (lane == 0) store(room + (warp * kSums + i), sum);
    }
  }
  sync_threads();
  const int warps = kChannelLanes ? kWarps : kWarps / group;
  for (int i = thread; i < channels * kSums; i += kThreads) {
    const int channel = i / kSums, which = i % kSums;
    float sum = 0.0f;
    for (int w = 0; w < warps; ++w) {
      sum += load(kChannelLanes ? room + ((w * kSums + which) * kWarp + channel)
                                : room + ((channel * warps + w) * kSums + which));
    }
    store(to + i, sum);
  }
}

// A tile, and what this thread takes of it: every step-th pixel of one channel.
template <class T>
struct BackwardTile {
  Extent rows, columns;
  Block<T> x, grad;  // of the convolution's channels
  int height, width;
  int channel, first, step;

  // Whether a tap of the pixel is inside of the map.
  SNV2_DEVICE bool has(int row, int column, int tap) const {
    return static_cast<unsigned>(row + tap / 3 - 1) < static_cast<unsigned>(height) &&
           static_cast<unsigned>(column + tap % 3 - 1) < static_cast<unsigned>(width);
  }
};

// Clears the gradient where the ReLU cut off, and adds up. A tap outside of the map reads the
// nearest pixel, so that the lanes stay together.
template <int kStride, class T>
SNV2_DEVICE void cut_and_add(const BackwardTile<T>& tile, ChannelGradient& of, bool relu) {
  const Block<T>&x = tile.x, &grad = tile.grad;
  for (Walk p(tile.first, tile.step, grad.columns.size()); p.y < grad.rows.size(); p.next()) {
    const int row = (grad.rows.begin + p.y) * kStride;
    const int column = (grad.columns.begin + p.x) * kStride;
    float values[9];
    float sum = 0.0f;
    for (int tap = 0; tap < 9; ++tap) {
      values[tap] = to_float(load(x.at(tile.channel, x.rows.nearest(row + tap / 3 - 1),
                                       x.columns.nearest(column + tap % 3 - 1))));
      if (tile.has(row, column, tap)) sum += of.weight[tap] * values[tap];
    }
    const Shared<T> at = grad.at(tile.channel, grad.rows.begin + p.y, grad.columns.begin + p.x);
    const bool cut = relu && sum * of.scale + of.shift <= 0.0f;  // not for NaN
    const float g = cut ? 0.0f : to_float(load(at));
    store_if(cut, at, T{});
    if (!tile.rows.has(row) || !tile.columns.has(column)) continue;
    for (int tap = 0; tap < 9; ++tap) {
      if (tile.has(row, column, tap)) of.sums[tap] += g * values[tap];
    }
    of.sums[9] += g;
  }
}

// Calls put(row, column, value) with the convolution turned round: the gradient of x.
template <int kStride, class T, class Put>
SNV2_DEVICE void turn_round(const BackwardTile<T>& tile, const ChannelGradient& of,
                            const Put& put) {
  const Block<T>& grad = tile.grad;
  for (Walk p(tile.first, tile.step, tile.columns.size()); p.y < tile.rows.size(); p.next()) {
    const int row = tile.rows.begin + p.y, column = tile.columns.begin + p.x;
    float sum = 0.0f;
    for (int tap = 0; tap < 9; ++tap) {
      const int y = row + tap / 3 - 1, x = column + tap % 3 - 1;
      const float g = to_float(load(grad.at(tile.channel, grad.rows.nearest(y / kStride),
                                            grad.columns.nearest(x / kStride))));
      if (tile.has(row, column, tap) && y % kStride == 0 && x % kStride == 0) {
        sum += of.weight[8 - tap] * g;
      }
    }
    T value;
    from_float(sum * of.scale, value);
    put(row, column, value);
  }
}

template <class T, bool kPassthrough, int kStride, bool kChannelLanes>
__global__ void __launch_bounds__(kThreads, 2) backward_kernel(BackwardParams<T> params) {
  constexpr int kUnit = kPassthrough ? 2 : 1;  // channels of grad for each of the convolution's
  const int thread = static_cast<int>(threadIdx.x);
  const Shared<unsigned char> memory = shared_memory();
  const int64_t channel0 = blockIdx.x % params.groups * params.group;
  const int64_t part = blockIdx.x / params.groups;
  const int channels = static_cast<int>(
      params.channels - channel0 < params.group ? params.channels - channel0 : params.group);
  const bool planes = !kChannelLanes && params.planes;

  BackwardTile<T> tile{};
  tile.height = params.height;
  tile.width = params.width;
  tile.step = kThreads / params.group;
  tile.channel = kChannelLanes ? thread % kWarp : thread / tile.step;
  tile.first = kChannelLanes ? thread / kWarp : thread % tile.step;
  tile.x.channel = kChannelLanes ? 1 : tile.height * tile.width;
  tile.x.pixel = kChannelLanes ? kWarp : 1;
  tile.grad.pixel = kChannelLanes ? kUnit * kWarp : 1;
  const bool idle = tile.channel >= channels;
  ChannelGradient of(memory.template as<float>(), params, channel0, channels, tile.channel);

  const int64_t tiles = params.batch * params.tiles_down * params.tiles_across;
  const int64_t end = tiles * (part + 1) / params.parts;
  for (int64_t i = tiles * part / params.parts; i < end; ++i) {
    const int64_t image = i / params.tiles_across / params.tiles_down;
    const int row = static_cast<int>(i / params.tiles_across % params.tiles_down) * params.rows;
    const int column = static_cast<int>(i % params.tiles_across) * params.columns;
    tile.rows = Extent{row, row + params.rows}.with_halo(0, tile.height);
    tile.columns = Extent{column, column + params.columns}.with_halo(0, tile.width);
    tile.x.rows = tile.rows.with_halo(2, tile.height);
    tile.x.columns = tile.columns.with_halo(2, tile.width);
    tile.grad.rows = tile.rows.with_halo(1, tile.height).results(kStride);
    tile.grad.columns = tile.columns.with_halo(1, tile.width).results(kStride);
    const Global<const T> grad_pass =
        Global<const T>{params.grad.data} + params.grad.at(image, channel0, 0, 0);
    const Global<const T> grad_main = grad_pass + params.grad.main;
    const Global<const T> x =
        Global<const T>{params.x.data} + (params.x.at(image, channel0, 0, 0) + params.x.main);
    const Global<T> out_pass =
        Global<T>{params.grad_x.data} + params.grad_x.at(image, channel0, 0, 0);
    const Global<T> out_main = out_pass + params.grad_x.main;

    // Load. What passes through comes along, but for blocks of contiguous planes.
    tile.x.data = memory.template as<T>();
    tile.grad.data = (memory + params.grad_at).template as<T>();
    Block<T> pass = tile.grad;
    if (planes) {
      const int plane = tile.grad.rows.size() * tile.grad.columns.size();
      tile.grad.channel = pass.channel = kUnit * plane;
      tile.x.data = load_span(memory, x, channels * tile.x.channel);
      pass.data = load_span(memory + params.grad_at, grad_pass, channels * kUnit * plane);
      tile.grad.data = pass.data + (kUnit - 1) * plane;
    } else if (kChannelLanes) {
      load_block<true>(tile.x, params.x, x, channels, params.copy_x);
      load_block<true>(tile.grad, params.grad, grad_pass, kUnit * channels, params.copy_grad);
      tile.grad.channel = pass.channel = kUnit;
      tile.grad.data = pass.data + (kUnit - 1);
    } else {
      load_block<false>(tile.x, params.x, x, 1, params.copy_x);
      load_block<false>(tile.grad, params.grad, grad_main, 1, params.copy_grad);
    }
    cp_async_commit();
    cp_async_wait<0>();
    sync_threads();

    // Compute.
    if (!idle) cut_and_add<kStride>(tile, of, params.relu);
    sync_threads();
    const Shared<T> staged_pass =
        (memory + (params.pass_at + misalignment(out_pass, 16))).template as<T>();
    const Shared<T> staged_main =
        (memory + (params.main_at + misalignment(out_main, 16))).template as<T>();
    const auto put = [&](int y, int x, T value) {
      T passed{};
      if constexpr (kPassthrough) {
        passed = kChannelLanes || planes ? load(pass.at(tile.channel, y, x))
                                         : load(grad_pass + params.grad.at(0, tile.channel, y, x));
      }
      if (planes) {
        const int pixel = tile.channel * tile.x.channel + y * tile.width + x;
        store(staged_main + pixel, value);
        if constexpr (kPassthrough) store(staged_pass + pixel, passed);
      } else {
        const int64_t pixel = params.grad_x.at(0, tile.channel, y, x);
        store(out_main + pixel, value);
        if constexpr (kPassthrough) store(out_pass + pixel, passed);
      }
    };
    if (!idle) turn_round<kStride>(tile, of, put);
    sync_threads();

    // Store.
    if (planes) {
      if constexpr (kPassthrough) store_span(out_pass, staged_pass, channels * tile.x.channel);
      store_span(out_main, staged_main, channels * tile.x.channel);
    }
  }
  store_sums<kChannelLanes>(
      memory.template as<float>(), of,
      Global<float>{params.sums} + (part * params.channels + channel0) * kDepthwiseSums, channels,
      params.group);
}

// Fills in how a launch is cut. It depends on shapes alone, as the order of the sums does.
template <class T>
void cut_backward(BackwardParams<T>& params, bool channels_last, int stride, bool passthrough,
                  int64_t& shared_bytes) {
  constexpr int64_t kShared = 96 * 1024;  // two CTAs per SM, which is what registers are there for
  constexpr int64_t kCtas = 2 * 132;
  constexpr int64_t kMostAdded = 256;  // to one sum by a thread: more would round too often
  const int64_t size = sizeof(T), unit = passthrough ? 2 : 1;
  const int64_t plane = static_cast<int64_t>(params.height) * params.width;
  const int64_t results =
      conv3x3_extent(params.height, stride) * conv3x3_extent(params.width, stride);
  const auto plane_bytes = [&](int64_t channels) {
    return span_bytes(channels * plane * size) * (1 + unit) +
           span_bytes(channels * unit * results * size);
  };
  const int64_t lanes = channels_last ? kWarp : 1;
  const auto x_bytes = [&](int64_t rows, int64_t columns) {
    return ceil_div((std::min<int64_t>(rows + 4, params.height)) *
                        std::min<int64_t>(columns + 4, params.width) * lanes * size,
                    16) *
           16;
  };
  const auto block_bytes = [&](int64_t rows, int64_t columns) {
    const int64_t down = std::min<int64_t>(rows + 2, params.height) / stride + 1;
    const int64_t across = std::min<int64_t>(columns + 2, params.width) / stride + 1;
    return x_bytes(rows, columns) + down * across * lanes * size * (channels_last ? unit : 1);
  };

  params.planes = !channels_last && plane_bytes(1) <= kShared;
  params.group = channels_last ? kWarp : 1;
  if (params.planes) {
    for (int group = 8; group > 1 && params.group == 1; group /= 2) {
      if (plane_bytes(group) <= kShared) params.group = group;
    }
    const int64_t maps = params.group * size;
    params.rows = params.height;
    params.columns = params.width;
    params.grad_at = static_cast<int>(span_bytes(maps * plane));
    params.main_at = params.grad_at + static_cast<int>(span_bytes(maps * unit * results));
    params.pass_at = params.main_at + static_cast<int>(span_bytes(maps * plane));
    shared_bytes = plane_bytes(params.group);
  } else {
    int64_t rows = params.height, columns = params.width;
    if (block_bytes(rows, columns) > kShared) {
      columns = std::min<int64_t>(columns, channels_last ? kWarp : kThreads);
      rows = 1;
      while (rows < params.height && block_bytes(rows + 1, columns) <= kShared) ++rows;
    }
    params.rows = static_cast<int>(rows);
    params.columns = static_cast<int>(columns);
    params.grad_at = static_cast<int>(x_bytes(rows, columns));
    shared_bytes = block_bytes(rows, columns);
  }
  constexpr int64_t kSums = kDepthwiseSums * kThreads * sizeof(float);
  shared_bytes = std::max(shared_bytes, kSums);
  params.groups = ceil_div(params.channels, params.group);
  params.tiles_down = ceil_div(params.height, params.rows);
  params.tiles_across = ceil_div(params.width, params.columns);
  const int64_t tiles = params.batch * params.tiles_down * params.tiles_across;
  const int64_t pixels = ceil_div(int64_t{params.rows} * params.columns * params.group, kThreads);
  params.parts = std::min(
      tiles, std::max(ceil_div(kCtas, params.groups), ceil_div(tiles * pixels, kMostAdded)));
}

}  // namespace snv2::SNV2_GPU
