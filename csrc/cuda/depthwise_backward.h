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
#include "cuda/mma.h"
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
  int group;              // channels of a CTA, a power of two up to kWarp
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

// Calls f(column, begin, end) for every step-th piece of a block: some rows of a column. There are
// as many pieces to a column as make good use of the threads.
template <class F>
SNV2_DEVICE void for_pieces(int first, int step, const Extent& rows, const Extent& columns,
                            const F& f) {
  const int width = columns.size(), height = rows.size();
  const int most = step / width < 1 ? 1 : step / width;
  const int each = (height + most - 1) / most, pieces = (height + each - 1) / each;
#pragma unroll 1
  for (int i = first; i < width * pieces; i += step) {
    const int piece = i / width, begin = piece * each;
    f(columns.begin + i - piece * width, rows.begin + begin,
      rows.begin + (begin + each < height ? begin + each : height));
  }
}

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

// Starts the copy of a block of pixels whose first channel is at `from`, N of kRoom channels by a
// thread. `channels` is a multiple of N.
template <int kRoom, int N, class T>
SNV2_DEVICE void load_pixels(const Block<T>& to, const Strided<const T>& map, Global<const T> from,
                             int channels) {
  constexpr int kEach = kRoom / N, kStep = kThreads / kEach;
  const int thread = static_cast<int>(threadIdx.x);
  const int first = thread / kEach, channel = thread % kEach * N;
  if (channel >= channels) return;
  const int across = to.columns.size(), pixels = to.rows.size() * across;
  const int step_row = kStep / across, step_column = kStep % across;
  const int64_t step = step_row * map.row + step_column * map.pixel;
  const int64_t wrap = map.row - across * map.pixel;
  int column = first % across;
  Global<const T> source =
      from + (map.at(0, 0, to.rows.begin + first / across, to.columns.begin + column) + channel);
  Shared<T> result = to.data + (first * kRoom + channel);
#pragma unroll 1
  for (int i = first; i < pixels; i += kStep) {
    if constexpr (N * sizeof(T) >= 4) {
      cp_async<N>(result, source);
    } else {
      store(result, load(source));
    }
    result = result + kStep * kRoom;
    column += step_column;
    source = source + (column < across ? step : step + wrap);
    column = column < across ? column : column - across;
  }
}
template <int kRoom, class T>
SNV2_DEVICE void load_pixels(const Block<T>& to, const Strided<const T>& map, Global<const T> from,
                             int channels, int copy) {
  constexpr int kWide = 16 / static_cast<int>(sizeof(T)), kWord = 4 / static_cast<int>(sizeof(T));
  if (copy == kWide) {
    load_pixels<kRoom, kWide>(to, map, from, channels);
  } else if (copy == kWord) {
    load_pixels<kRoom, kWord>(to, map, from, channels);
  } else {
    load_pixels<kRoom, 1>(to, map, from, channels);
  }
}

// The same of one channel of a contiguous map: a warp takes a row.
template <class T>
SNV2_DEVICE void load_rows(const Block<T>& to, const Strided<const T>& map, Global<const T> from,
                           int copy) {
  const int width = to.columns.size();
  for (int row = static_cast<int>(threadIdx.x) / kWarp; row < to.rows.size();
       row += kThreads / kWarp) {
    load_line(to.data + row * width, from + map.at(0, 0, to.rows.begin + row, to.columns.begin), 0,
              width, width, copy);
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

// Three neighbouring columns of a channel of a block, row by row; zero outside of the map. The
// columns beside it are read as the middle one, so that the lanes stay together. The one before it
// may not be wanted.
template <class T, bool kBefore = true>
class ThreeColumns {
 public:
  SNV2_DEVICE ThreeColumns(const Block<T>& block, int channel, int column, int row, int height,
                           int width)
      : at_(block.at(channel, row, column)),
        pitch_(block.columns.size() * block.pixel),
        row_(row),
        height_(height),
        left_(column > 0),
        right_(column + 1 < width),
        before_(left_ ? -block.pixel : 0),
        after_(right_ ? block.pixel : 0) {}
  SNV2_DEVICE bool left() const { return left_; }
  SNV2_DEVICE bool right() const { return right_; }
  SNV2_DEVICE void read_next(float (&values)[3]) {
#pragma unroll
    for (int i = 0; i < 3; ++i) values[i] = 0.0f;
    if (static_cast<unsigned>(row_) < static_cast<unsigned>(height_)) {
      float before = 0.0f;
      if constexpr (kBefore) before = to_float(load(at_ + before_));
      const float after = to_float(load(at_ + after_));
      values[0] = left_ ? before : 0.0f;
      values[1] = to_float(load(at_));
      values[2] = right_ ? after : 0.0f;
    }
    at_ = at_ + pitch_;
    ++row_;
  }

 private:
  Shared<T> at_;
  int pitch_, row_, height_;
  bool left_, right_;
  int before_, after_;
};

// Three rows of three columns, of which one or two are new in each step.
template <int kStride, class T>
class Window {
 public:
  float values[3][3];

  // That of the result `row` comes first.
  SNV2_DEVICE Window(const Block<T>& block, int channel, int column, int row, int height, int width)
      : columns(block, channel, column, row * kStride - 1, height, width) {
    columns.read_next(values[kStride == 1 ? 1 : 2]);
    if constexpr (kStride == 1) columns.read_next(values[2]);
  }
  SNV2_DEVICE void next() {
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      values[0][i] = values[kStride][i];
      if constexpr (kStride == 1) values[1][i] = values[2][i];
    }
    if constexpr (kStride == 2) columns.read_next(values[1]);
    columns.read_next(values[2]);
  }

  ThreeColumns<T> columns;
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

// Where the gradient of x goes, and what passes through comes from: pixels of a channel. Whole
// planes are staged in shared memory.
template <class T, bool kPassthrough>
struct Results {
  bool planes, pass_is_shared;
  Shared<T> staged_main, staged_pass, shared_pass;
  Global<T> main, pass;
  Global<const T> global_pass;
  int width, shared_row, shared_pixel;  // strides in shared memory: staged, and of the pass
  int64_t row, pixel, global_row, global_pixel;  // in global memory: of the results, of the pass

  // The same from another pixel on, given from where this begins.
  SNV2_DEVICE Results at(int y, int x) const {
    Results r = *this;
    r.move(y, x);
    return r;
  }
  SNV2_DEVICE void move(int y, int x) {
    if (planes) {
      staged_main = staged_main + (y * width + x);
      staged_pass = staged_pass + (y * width + x);
    } else {
      main = main + (y * row + x * pixel);
      pass = pass + (y * row + x * pixel);
    }
    if constexpr (kPassthrough) {
      if (pass_is_shared) {
        shared_pass = shared_pass + (y * shared_row + x * shared_pixel);
      } else {
        global_pass = global_pass + (y * global_row + x * global_pixel);
      }
    }
  }
  SNV2_DEVICE void put(int y, int x, T value) const {
    T passed{};
    if constexpr (kPassthrough) {
      passed = pass_is_shared ? load(shared_pass) : load(global_pass);
    }
    if (planes) {
      store(staged_main + (y * width + x), value);
      if constexpr (kPassthrough) store(staged_pass + (y * width + x), passed);
    } else {
      store(main + (y * row + x * pixel), value);
      if constexpr (kPassthrough) store(pass + (y * row + x * pixel), passed);
    }
  }
};

// Writes the convolution turned round: the gradient of x. At stride 2 a result is part of two rows
// and columns, and of one more after each.
template <int kStride, class T, bool kPassthrough>
SNV2_DEVICE void turn_round(const BackwardTile<T>& tile, const ChannelGradient& of,
                            const Results<T, kPassthrough>& results) {
  const auto scaled = [&](float sum) { return rounded<T>(sum * of.scale); };
  if constexpr (kStride == 1) {
    for_pieces(tile.first, tile.step, tile.rows, tile.columns, [&](int x, int begin, int end) {
      Window<1, T> window(tile.grad, tile.channel, x, begin, tile.height, tile.width);
      auto to = results.at(begin, x);
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
    // Of the gradient there is no more than the tile needs.
    const int down = tile.grad.rows.end, across = tile.grad.columns.end;
    for_pieces(tile.first, tile.step, halves(tile.rows), halves(tile.columns),
               [&](int x, int begin, int end) {
                 ThreeColumns<T, false> columns(tile.grad, tile.channel, x, begin, down, across);
                 float above[3], below[3];
                 columns.read_next(below);
                 auto to = results.at(2 * begin, 2 * x);
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
    Results<T, kPassthrough> results{};
    results.planes = planes;
    results.pass_is_shared = kChannelLanes || planes;
    const int channel_at = tile.channel * tile.x.channel;
    results.width = tile.width;
    results.staged_main = staged_main + channel_at;
    results.staged_pass = staged_pass + channel_at;
    results.shared_row = pass.columns.size() * pass.pixel;
    results.shared_pixel = pass.pixel;
    results.shared_pass =
        pass.data + (tile.channel * pass.channel - pass.rows.begin * results.shared_row -
                     pass.columns.begin * pass.pixel);
    results.main = out_main + params.grad_x.at(0, tile.channel, 0, 0);
    results.pass = out_pass + params.grad_x.at(0, tile.channel, 0, 0);
    results.row = params.grad_x.row;
    results.pixel = kChannelLanes ? params.grad_x.pixel : 1;
    results.global_pass = grad_pass + params.grad.at(0, tile.channel, 0, 0);
    results.global_row = params.grad.row;
    results.global_pixel = params.grad.pixel;
    if (!idle) turn_round<kStride>(tile, of, results);
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
