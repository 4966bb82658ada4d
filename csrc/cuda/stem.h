// The stem in one launch: conv 3x3 stride 2, activation, maxpool 3x3 stride 2.
//
// A CTA makes a tile of `rows` x `columns` pooled pixels of one image. Its input, 4 rows + 3 lines
// of 4 columns + 16 pixels with zeros where the image ends, lies in shared memory in the order in
// which the caller has it: planes, or pixels of three channels. At 224 x 224 a tile is 8 x 56: 35
// lines for 32, less at the top, so that an image is read 1.08 times. In 16 bits that takes 50 KB
// for the lines and 22 KB for the result: two CTAs of an SM, which is what registers allow.
//
// A warp takes 7 pooled columns and marches down the tile, two rows of the convolution at a time:
//   products      [16 columns][channels] of each, in registers (stem_rows.h)
//   maximum       with the last row of the step before: down, then across by shuffles
//   result        of all channels, in shared memory, to be stored as runs of planes.
// The convolution's own result never leaves registers: 602 KB of an image in 16 bits, beside 301 KB
// that are read and 150 KB written. The row that two tiles share is computed by both.
#pragma once

#include <cstdint>

#include "cuda/line.h"
#include "cuda/stem_rows.h"

namespace snv2::SNV2_GPU {

// Load ------------------------------------------------------------------------------------------

// Four elements of a line of pixels from bytes, from element i on.
template <class T>
SNV2_DEVICE Vector<T, 4> from_bytes(const StemParams<T>& params, const Vector<uint8_t, 4>& raw,
                                    int i, int begin, int end) {
  const auto pick = [&](const float (&of)[4], int c) {
    return c == 0 ? of[0] : c == 1 ? of[1] : of[2];
  };
  Vector<T, 4> values;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int c = (i + k) % 3;
    const float value =
        static_cast<float>(raw.values[k]) * pick(params.scale, c) + pick(params.shift, c);
    values.values[k] = rounded<T>(i + k >= begin && i + k < end ? value : 0.0f);
  }
  return values;
}

// A line of pixels of three bytes: loads first, so that they are under way together.
template <class T>
SNV2_DEVICE void load_bytes(const StemParams<T>& params, Shared<T> to, Global<const uint8_t> from,
                            int begin, int end, int length) {
  constexpr int kTogether = 3;
  for (int first = lane_of_warp() * 4; first < length; first += kTogether * kWarp * 4) {
    Vector<uint8_t, 4> raw[kTogether];
#pragma unroll
    for (int n = 0; n < kTogether; ++n) {
      const int i = first + n * kWarp * 4;
      raw[n] = {};
      if (params.copy > 1) {
        if (i >= begin && i < end) raw[n] = load_vector<4>(from + i);
      } else {
        for (int k = 0; k < 4; ++k) {
          if (i + k >= begin && i + k < end) raw[n].values[k] = load(from + (i + k));
        }
      }
    }
#pragma unroll
    for (int n = 0; n < kTogether; ++n) {
      const int i = first + n * kWarp * 4;
      if (i < length) store_vector<4>(to + i, from_bytes(params, raw[n], i, begin, end));
    }
  }
}

// A line of one plane from an image in any order.
template <class T>
SNV2_DEVICE void load_any(const StemParams<T>& params, Shared<T> to, int64_t image, int c, int y,
                          int x, int begin, int end, int length) {
  const bool apart = params.channels_last || params.bytes;
  const int64_t plane = int64_t{params.height} * params.width;
  const int64_t channel = apart ? 1 : plane, pixel = apart ? params.channels : 1;
  const int64_t line =
      image * params.channels * plane + c * channel + (int64_t{y} * params.width + x) * pixel;
  for (int i = lane_of_warp(); i < length; i += kWarp) {
    T value = rounded<T>(0.0f);
    if (i >= begin && i < end) {
      if (params.bytes) {
        const Global<const uint8_t> in{static_cast<const uint8_t*>(params.in)};
        value = rounded<T>(static_cast<float>(load(in + (line + i * pixel))) * params.scale[c] +
                           params.shift[c]);
      } else {
        value = load(Global<const T>{static_cast<const T*>(params.in)} + (line + i * pixel));
      }
    }
    store(to + i, value);
  }
}

// Lines that a tile reads of a plane: from y on, `pitch` elements apart in the image, of which
// elements [left, right) exist.
struct StemLines {
  int y, count, height;
  int left, right, length;
  int64_t pitch;

  SNV2_DEVICE bool has(int line) const {
    const int row = y + line;
    return row >= 0 && row < height;
  }
};

// Loads a plane's lines one by one, from bytes or from an image in any order.
template <class T, Taps kTaps>
SNV2_DEVICE void load_converted(const StemParams<T>& params, const StemTile& tile, Shared<T> plane,
                                int c, const StemLines& of, int64_t at) {
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  for (int line = warp_of_cta(); line < of.count; line += warps) {
    const bool exists = of.has(line);
    const int begin = exists ? of.left : 0, end = exists ? of.right : 0;
    const Shared<T> to = plane + line * params.line_pitch;
    if constexpr (kTaps == Taps::kPixels3) {
      const Global<const uint8_t> in{static_cast<const uint8_t*>(params.in)};
      load_bytes(params, to, in + (at + line * of.pitch), begin, end, of.length);
    } else {
      load_any(params, to, tile.image, c, of.y + line, tile.x, begin, end, of.length);
    }
  }
}

// Starts the copy of a plane's lines, N elements at once, and fills what does not exist with zeros.
// A lane keeps to its columns.
template <int N, class T>
SNV2_DEVICE void copy_lines(Shared<T> to, int pitch, Global<const T> from, const StemLines& of) {
  const int warps = static_cast<int>(blockDim.x) / kWarp, first = warp_of_cta();
  for (int i = lane_of_warp() * N; i < of.length; i += kWarp * N) {
    const bool exists = i >= of.left && i < of.right;
    Address<T> at(to + (first * pitch + i));
    Global<const T> source = from + (first * of.pitch + i);
    for (int line = first; line < of.count; line += warps) {
      const bool inside = of.has(line);
      if constexpr (N * sizeof(T) >= 4) {
        if (exists && inside) {
          cp_async<N>(at, source);
        } else {
          store_vector<N>(at, Vector<T, N>{});
        }
      } else {
        store_vector(at, Vector<T, 1>{{exists && inside ? load(source) : T{}}});
      }
      at = at + warps * pitch;
      source = source + warps * of.pitch;
    }
  }
}

// The lines of a tile.
template <class T, Taps kTaps>
SNV2_DEVICE void load_lines(const StemParams<T>& params, const StemTile& tile, Shared<T> lines) {
  constexpr int kSize = kPixel<kTaps>;
  constexpr int kWide = 16 / static_cast<int>(sizeof(T)), kWord = 4 / static_cast<int>(sizeof(T));
  const int planes = kTaps == Taps::kPixels3 ? 1 : params.channels;
  StemLines of{};
  of.y = tile.y;
  of.count = static_cast<int>(stem_lines(tile.rows));
  of.height = params.height;
  of.length = (4 * params.columns + stem_halo(params.bytes)) * kSize;
  of.left = tile.x < 0 ? -tile.x * kSize : 0;
  const int right = (params.width - tile.x) * kSize;
  of.right = right < of.length ? right : of.length;
  of.pitch = int64_t{params.width} * kSize;
  for (int c = 0; c < planes; ++c) {
    const Shared<T> to = lines + c * params.plane_pitch;
    const int64_t first = (tile.image * planes + c) * params.height + tile.y;
    const int64_t at = first * of.pitch + int64_t{tile.x} * kSize;
    const Global<const T> in = Global<const T>{static_cast<const T*>(params.in)};
    if (kTaps == Taps::kAny || params.bytes) {
      load_converted<T, kTaps>(params, tile, to, c, of, at);
    } else if (params.copy == kWide) {
      copy_lines<kWide>(to, params.line_pitch, in + at, of);
    } else if (params.copy == kWord) {
      copy_lines<kWord>(to, params.line_pitch, in + at, of);
    } else {
      copy_lines<1>(to, params.line_pitch, in + at, of);
    }
  }
}

// The march -------------------------------------------------------------------------------------

// Every channel of the block has a place in `stage`, also those that do not exist.
template <class T, class Act, Taps kTaps>
SNV2_DEVICE void march(const StemParams<T>& params, const StemTile& tile, Shared<T> lines,
                       Shared<T> stage, const Convolution<T, kTaps, Act>& convolution) {
  const int column = convolution.column() - tile.column;
  const bool pools = convolution.pools() && column < tile.columns;
  Address<T> to(stage + (convolution.first_channel() * params.stage_pitch + (pools ? column : 0)));
  // A pooled row is rows 2p - 1 to 2p + 1 of the convolution; the last begins the next one. Where
  // the first or the last does not exist its neighbour, which does, stands for it.
  const int step = 2 * params.line_pitch;  // from a row's taps to the next one's
  Shared<T> line = lines + step;           // row 2p's
  typename Convolution<T, kTaps, Act>::Values before, middle, after;
  convolution.row(lines + (tile.row > 0 ? 0 : step), before);
#pragma unroll 1
  for (int next = 2 * tile.row + 1; next < 2 * (tile.row + tile.rows); next += 2) {
    convolution.rows(line, line + (next < params.conv_height ? step : 0), middle, after);
    convolution.pool(larger(larger(before, middle), after), [&](int channel, T value) {
      store_vector_if(pools, to + channel * params.stage_pitch, Vector<T, 1>{{value}});
    });
    before = after;
    line = line + 2 * step;
    to = to + params.stage_row;
  }
}

// Columns of a tile's rows with the padding of the last ones.
template <class T>
SNV2_DEVICE int stored_columns(const StemParams<T>& params, const StemTile& tile) {
  const int left = params.out_row - tile.column;
  return left < params.stage_row ? left : params.stage_row;
}

template <class T>
SNV2_DEVICE void pad_stage(const StemParams<T>& params, const StemTile& tile, Shared<T> stage,
                           int channels) {
  const int padding = stored_columns(params, tile) - tile.columns;
  if (padding == 0) return;
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  for (int i = warp_of_cta(); i < channels * tile.rows; i += warps) {
    const int channel = i / tile.rows, row = i - channel * tile.rows;
    const Shared<T> end =
        stage + (channel * params.stage_pitch + row * params.stage_row + tile.columns);
    for (int k = lane_of_warp(); k < padding; k += kWarp) store(end + k, rounded<T>(0.0f));
  }
}

template <class T>
SNV2_DEVICE void store_planes(const StemParams<T>& params, const StemTile& tile, Shared<T> stage,
                              int channel0, int channels) {
  // Rows of a tile as wide as the image are one run.
  const bool whole = params.panes == 1;
  const int runs = whole ? 1 : tile.rows;
  const int columns = stored_columns(params, tile);
  const int count = whole ? tile.rows * columns : columns;
  const int64_t first =
      (tile.image * params.out_height + tile.row) * int64_t{params.out_row} + tile.column;
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  for (int i = warp_of_cta(); i < channels * runs; i += warps) {
    const int channel = whole ? i : i / runs, row = whole ? 0 : i - channel * runs;
    const int64_t plane = load(Global<const int32_t>{params.out_table} + (channel0 + channel));
    store_line(Global<T>{params.out} + (plane * params.out_pitch + first + row * params.out_row),
               stage + (channel * params.stage_pitch + row * params.stage_row), count);
  }
}

// Threads for which a kernel's registers suffice, twice on an SM. Taps in any planes would take
// more than the others without being faster.
template <Taps kTaps>
constexpr int kStemThreads = (kTaps == Taps::kAny ? kStemWarps + 2 : kStemWarps) * kWarp;

template <class T, class Act, Taps kTaps>
__global__ void __launch_bounds__((kStemThreads<kTaps>), 2) stem_kernel(StemParams<T> params) {
  constexpr int kChannels = Convolution<T, kTaps, Act>::kChannels;
  const StemTile tile(params);
  const Shared<T> lines = shared_memory().template as<T>();
  const Shared<T> stage = (shared_memory() + params.stage_at).template as<T>();
  const int channel = static_cast<int>(blockIdx.y) * kChannels;
  const int left = params.out_channels - channel;
  const int channels = left < kChannels ? left : kChannels;

  // Load.
  Convolution<T, kTaps, Act> convolution;
  convolution.share_weights(params, channel);
  grid_dependents_launch();
  grid_dependency_wait();
  load_lines<T, kTaps>(params, tile, lines);
  cp_async_commit();
  cp_async_wait<0>();
  sync_threads();

  // Compute. There are as many warps as a tile has groups of columns.
  const int first = tile.column + warp_of_cta() * kStemColumns;
  if (first < tile.column + tile.columns) {
    convolution.place(params, tile, first);
    convolution.load_weights();
    march<T, Act>(params, tile, lines, stage, convolution);
  }
  pad_stage(params, tile, stage, channels);
  sync_threads();

  // Store.
  store_planes(params, tile, stage, channel, channels);
}

}  // namespace snv2::SNV2_GPU
