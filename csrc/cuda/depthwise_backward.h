// Gradients of dw_conv3x3, and of split_dw_cat_shuffle, where as many channels pass through.
//
// A CTA keeps to some channels, a thread to one, and marches through tiles of some images. Its sums
// for the parameters' gradients stay in registers all the way; at the end each CTA writes one set,
// and a second kernel adds the sets up in their order. On a tile there are two phases:
//   the convolution again, for the pixels of the gradient in and around the tile: it clears them,
//   in shared memory, where the ReLU cut off; the inputs it has read are multiplied with the rest,
//   grad_x, the same convolution turned round.
// In both a thread marches down some rows of a column, and has three rows of three columns in
// registers.
//
// Contiguous: lanes take neighbouring columns, and a tile is the planes of one to 32 channels: one
// span of x, one of the gradient and two of grad_x. Channels-last: lanes take 32 neighbouring
// channels. A tile is an image if that fits, else, as in contiguous planes that do
// not fit, a block of pixels; it reads two rows and columns of x around it, and one of the
// gradient, which its neighbours read too, from L2 as a rule.
#pragma once

#include <algorithm>
#include <array>
#include <type_traits>

#include "cuda/backward_block.h"
#include "cuda/mma.h"
#include "cuda/span.h"

namespace snv2::SNV2_GPU {

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
  int group;              // channels of a CTA, a power of two up to kWarp
  bool planes;            // a tile is whole planes, read and written as spans
  int rows, columns;      // of a tile
  int64_t tiles_down, tiles_across;
  int copy_x, copy_grad;          // elements of a copy, where tiles are no spans
  int grad_at, pass_at, main_at;  // in shared memory; x is at 0, pass and main are of grad_x
};

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

// Adds up the CTA's sums of each channel, which has every kWarp-th thread, or `step` neighbouring
// ones, and writes them, [channels][kDepthwiseSums].
template <bool kChannelLanes>
SNV2_DEVICE void store_sums(Shared<float> room, const ChannelGradient& of, Global<float> to,
                            int channels, int step) {
  constexpr int kSums = static_cast<int>(kDepthwiseSums);
  const int thread = static_cast<int>(threadIdx.x);
  sync_threads();  // room may be where the last tile lay
#pragma unroll
  for (int i = 0; i < kSums; ++i) store(room + (i * kThreads + thread), of.sums[i]);
  sync_threads();
  if constexpr (kChannelLanes) {
    for (int i = thread; i < channels * kSums; i += kThreads) {
      const int channel = i / kSums, which = i % kSums;
      float sum = 0.0f;
#pragma unroll
      for (int at = 0; at < kThreads; at += kWarp) {
        sum += load(room + (which * kThreads + at + channel));
      }
      store(to + i, sum);
    }
  } else {
    // Up to 32 of them by a thread, each beginning elsewhere, as they would conflict.
    const int part = step < kWarp ? step : kWarp, parts = kThreads / part;
    const Shared<float> added = room + kSums * kThreads;
    for (int i = thread; i < parts * kSums; i += kThreads) {
      const Shared<float> from = room + (i % kSums * kThreads + i / kSums * part);
      float sums[4] = {};  // shorter chains round less often
#pragma unroll 2
      for (int k = 0; k < part; k += 4) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[j] += load(from + ((k + j + i) & (part - 1)));
      }
      const float sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
      store(added + i, sum);
    }
    sync_threads();
    for (int i = thread; i < channels * kSums; i += kThreads) {
      float sum = 0.0f;
      for (int k = 0; k < step / part; ++k) {
        sum += load(added + ((i / kSums * (step / part) + k) * kSums + i % kSums));
      }
      store(to + i, sum);
    }
  }
}
constexpr int64_t kSumsRoom = kDepthwiseSums * (kThreads + kThreads / 8) * sizeof(float);

// A tile, and what this thread takes of it: every step-th pixel of one channel.
template <class T>
struct BackwardTile {
  Extent rows, columns;
  Block<T> x, grad;  // of the convolution's channels
  int height, width;
  int channel, first, step;
};

// Clears the gradient where the ReLU cut off, and adds up.
template <int kStride, class T>
SNV2_DEVICE void cut_and_add(const BackwardTile<T>& tile, ChannelGradient& of, bool relu) {
  const Block<T>& grad = tile.grad;
  for_pieces(tile.first, tile.step, grad.rows, grad.columns, [&](int x, int begin, int end) {
    const int column = x * kStride;
    const bool mine = tile.columns.has(column);
    const int pitch = grad.columns.size() * grad.pixel;
    Shared<T> at = grad.at(tile.channel, begin, x);
    Window<kStride, T> window(tile.x, tile.channel, column, begin, tile.height, tile.width);
    float sums[kDepthwiseSums] = {};  // of the piece: short chains round less often
#pragma unroll 1
    for (int y = begin; y < end; ++y) {
      window.next();
      float sum = 0.0f;
#pragma unroll
      for (int tap = 0; tap < 9; ++tap) sum += of.weight[tap] * window.values[tap / 3][tap % 3];
      const bool cut = relu && sum * of.scale + of.shift <= 0.0f;  // not for NaN
      const float g = cut ? 0.0f : to_float(load(at));
      store_if(cut, at, T{});
      at = at + pitch;
      const int row = y * kStride;
      if (!mine || !tile.rows.has(row)) continue;
      // Zeros would not silence an infinite gradient.
      const float gs[3] = {window.columns.left() ? g : 0.0f, g, window.columns.right() ? g : 0.0f};
#pragma unroll
      for (int dy = 0; dy < 3; ++dy) {
        if ((dy == 0 && row == 0) || (dy == 2 && row + 1 == tile.height)) continue;
#pragma unroll
        for (int dx = 0; dx < 3; ++dx) {
          float& total = sums[dy * 3 + dx];
          total = multiply_add(gs[dx], window.values[dy][dx], total);
        }
      }
      sums[9] += g;
    }
#pragma unroll
    for (int k = 0; k < static_cast<int>(kDepthwiseSums); ++k) of.sums[k] += sums[k];
  });
}

// Where the gradient of x goes, and where what passes through comes from: staged in shared memory
// or not, and from there or not.
template <class T, bool kPassthrough, bool kStaged, bool kSharedPass>
class Results {
 public:
  template <class P>
  struct Place {  // Shared or Global, and its strides
    P at;
    int64_t row, pixel;

    SNV2_DEVICE auto to(int y, int x) const {
      if constexpr (kIsShared<P>) {
        return at + (y * static_cast<int>(row) + x * static_cast<int>(pixel));
      } else {
        return at + (y * row + x * pixel);
      }
    }
    SNV2_DEVICE void move(int y, int x) { at = to(y, x); }
  };
  template <class P>
  static constexpr bool kIsShared = std::is_same_v<P, Shared<T>>;
  using To = std::conditional_t<kStaged, Shared<T>, Global<T>>;
  using From = std::conditional_t<kSharedPass, Shared<T>, Global<const T>>;

  Place<To> main, pass;
  Place<From> passed;

  SNV2_DEVICE void move(int y, int x) {
    main.move(y, x);
    if constexpr (kPassthrough) {
      pass.move(y, x);
      passed.move(y, x);
    }
  }
  SNV2_DEVICE void put(int y, int x, T value) const {
    store(main.to(y, x), value);
    if constexpr (kPassthrough) store(pass.to(y, x), load(passed.to(y, x)));
  }
};

// Writes the convolution turned round: the gradient of x. At stride 2 a result is part of two rows
// and columns, and of one more after each.
template <int kStride, class T, class To>
SNV2_DEVICE void turn_round(const BackwardTile<T>& tile, const ChannelGradient& of,
                            const To& results) {
  const auto scaled = [&](float sum) { return rounded<T>(sum * of.scale); };
  if constexpr (kStride == 1) {
    for_pieces(tile.first, tile.step, tile.rows, tile.columns, [&](int x, int begin, int end) {
      Window<1, T> window(tile.grad, tile.channel, x, begin, tile.height, tile.width);
      To to = results;
      to.move(begin, x);
#pragma unroll 1
      for (int y = begin; y < end; ++y) {
        window.next();
        float sum = 0.0f;
#pragma unroll
        for (int tap = 0; tap < 9; ++tap) {
          sum += of.weight[8 - tap] * window.values[tap / 3][tap % 3];
        }
        to.put(0, 0, scaled(sum));
        to.move(1, 0);
      }
    });
  } else {
    const auto halves = [](const Extent& e) { return Extent{e.begin / 2, (e.end + 1) / 2}; };
    // The gradient's tile ends with what is needed of it.
    const int down = tile.grad.rows.end, across = tile.grad.columns.end;
    for_pieces(tile.first, tile.step, halves(tile.rows), halves(tile.columns),
               [&](int x, int begin, int end) {
                 ThreeColumns<T, false> columns(tile.grad, tile.channel, x, begin, down, across);
                 float above[3], below[3];
                 columns.read_next(below);
                 To to = results;
                 to.move(2 * begin, 2 * x);
#pragma unroll 1
                 for (int y = begin; y < end; ++y) {
#pragma unroll
                   for (int i = 0; i < 3; ++i) above[i] = below[i];
                   columns.read_next(below);
                   const float* const w = of.weight;
                   float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};  // of taps in their order
                   sums[0] += w[4] * above[1];
                   sums[1] += w[5] * above[1];
                   sums[1] += w[3] * above[2];
                   sums[2] += w[7] * above[1];
                   sums[2] += w[1] * below[1];
                   sums[3] += w[8] * above[1];
                   sums[3] += w[6] * above[2];
                   sums[3] += w[2] * below[1];
                   sums[3] += w[0] * below[2];
#pragma unroll
                   for (int i = 0; i < 4; ++i) {
                     const int row = 2 * y + i / 2, column = 2 * x + i % 2;
                     if (tile.rows.has(row) && tile.columns.has(column)) {
                       to.put(i / 2, i % 2, scaled(sums[i]));
                     }
                   }
                   to.move(2, 0);
                 }
               });
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
      load_pixels<kWarp>(tile.x, params.x, x, channels, params.copy_x);
      load_pixels<kUnit * kWarp>(tile.grad, params.grad, grad_pass, kUnit * channels,
                                 params.copy_grad);
      tile.grad.channel = pass.channel = kUnit;
      tile.grad.data = pass.data + (kUnit - 1);
    } else {
      load_rows(tile.x, params.x, x, params.copy_x);
      load_rows(tile.grad, params.grad, grad_main, params.copy_grad);
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
    const int pass_row = pass.columns.size() * pass.pixel;
    const Shared<T> passed = pass.data + (tile.channel * pass.channel - pass.rows.begin * pass_row -
                                          pass.columns.begin * pass.pixel);
    const auto global = [&](Global<T> to) { return to + params.grad_x.at(0, tile.channel, 0, 0); };
    const int64_t row_to = params.grad_x.row, pixel_to = kChannelLanes ? params.grad_x.pixel : 1;
    if (!idle && planes) {
      const int at = tile.channel * tile.x.channel;
      turn_round<kStride>(tile, of,
                          Results<T, kPassthrough, true, true>{{staged_main + at, tile.width, 1},
                                                               {staged_pass + at, tile.width, 1},
                                                               {passed, pass_row, pass.pixel}});
    } else if (!idle) {
      if constexpr (kChannelLanes) {
        turn_round<kStride>(
            tile, of,
            Results<T, kPassthrough, false, true>{{global(out_main), row_to, pixel_to},
                                                  {global(out_pass), row_to, pixel_to},
                                                  {passed, pass_row, pass.pixel}});
      } else {
        turn_round<kStride>(
            tile, of,
            Results<T, kPassthrough, false, false>{
                {global(out_main), row_to, pixel_to},
                {global(out_pass), row_to, pixel_to},
                {grad_pass + params.grad.at(0, tile.channel, 0, 0), params.grad.row, 1}});
      }
    }
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
      tile.step);
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
    // A row for the threads of each.
    for (int group = kWarp; group > 1 && params.group == 1; group /= 2) {
      if (plane_bytes(group) <= kShared && kThreads / group >= params.width) params.group = group;
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
  shared_bytes = std::max(shared_bytes, kSumsRoom);
  params.groups = ceil_div(params.channels, params.group);
  params.tiles_down = ceil_div(params.height, params.rows);
  params.tiles_across = ceil_div(params.width, params.columns);
  const int64_t tiles = params.batch * params.tiles_down * params.tiles_across;
  const int64_t pixels = ceil_div(int64_t{params.rows} * params.columns * params.group, kThreads);
  params.parts = std::min(
      tiles, std::max(ceil_div(kCtas, params.groups), ceil_div(tiles * pixels, kMostAdded)));
}

}  // namespace snv2::SNV2_GPU
