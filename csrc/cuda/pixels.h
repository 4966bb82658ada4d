// Channels-last (NHWC) maps.
//
// Whole rows of pixels are contiguous, channels of a pixel need not even be whole sectors, so all
// channels stay together. Images that fit in shared memory are tiles: one run of memory in, one
// out. Of larger ones a tile is a strip of rows. A CTA marches down its strip with a ring of input
// rows in shared memory; while one output row is computed, the rows that the next one adds are on
// their way. Each row is read once; two strips of one image both read the rows around the cut, and
// each reads 44 bytes of parameters per channel: 5 % for two strips of 28 x 28, so images are cut
// only where the batch cannot feed the GPU otherwise.
#pragma once

#include <algorithm>

#include "cuda/span.h"

namespace snv2::SNV2_GPU {

// Stores (even, odd) at to[0], to[1]: in one instruction where `paired` says that to is aligned for
// it, as two would conflict.
template <class T>
SNV2_DEVICE void store_pair(Shared<T> to, T even, T odd, bool paired) {
  if (paired) {
    store_vector<2>(to, Vector<T, 2>{{even, odd}});
  } else {
    store(to, even);
    store(to + 1, odd);
  }
}

// Of one channel, in registers.
struct ChannelParameters {
  float weight[9];
  float scale, shift;

  SNV2_DEVICE ChannelParameters(Shared<float> weights, Shared<float> scales, Shared<float> shifts,
                                int c)
      : scale(load(scales + c)), shift(load(shifts + c)) {
    for (int tap = 0; tap < 9; ++tap) weight[tap] = load(weights + (c * 9 + tap));
  }
};

// The rows of input that a row of output reads, if the image has them.
template <class T>
struct Lines {
  Shared<T> at[3];
  bool have[3];
};

// Computes columns [column0, column1) of a row of outputs of channel c, while a window of 3 x 3
// inputs slides along, and passes through its neighbours.
template <class T, bool kPassthrough, int kStride>
SNV2_DEVICE void slide(Shared<T> staged, const Lines<T>& lines, const ChannelParameters& of,
                       const Operands<T>& op, int c, int column0, int column1, bool paired) {
  const int channels = static_cast<int>(op.channels), pixel = static_cast<int>(op.source_pixel);
  const int width = static_cast<int>(op.width);
  const int main = kPassthrough ? channels + c : c;
  float window[3][3] = {};  // [column][row]
  const auto read = [&](float (&column)[3], int at) {
    for (int dy = 0; dy < 3; ++dy) {
      column[dy] = lines.have[dy] && static_cast<unsigned>(at) < static_cast<unsigned>(width)
                       ? to_float(load(lines.at[dy] + (at * pixel + main)))
                       : 0.0f;
    }
  };
  read(window[2], column0 * kStride - 1);
  if constexpr (kStride == 1) {
    for (int dy = 0; dy < 3; ++dy) window[1][dy] = window[2][dy];
    read(window[2], column0);
  }
  for (int column = column0; column < column1; ++column) {
    for (int dy = 0; dy < 3; ++dy) {
      window[0][dy] = window[kStride][dy];
      window[1][dy] = window[2][dy];
    }
    if constexpr (kStride == 2) read(window[1], column * 2);
    read(window[2], column * kStride + 1);
    float sum = 0.0f;
    for (int tap = 0; tap < 9; ++tap) sum += of.weight[tap] * window[tap % 3][tap / 3];
    const T y = finish<T>(sum, of.scale, of.shift, op.relu);
    if constexpr (kPassthrough) {
      const T passed = load(lines.at[1] + (column * pixel + c));
      store_pair(staged + (column * channels + c) * 2, passed, y, paired);
    } else {
      store(staged + (column * channels + c), y);
    }
  }
}

// Strips -------------------------------------------------------------------------------------

template <class T>
struct PixelsParams {
  Operands<T> op;
  int64_t strips;             // of one image
  int64_t tiles;              // in all
  int rows;                   // output rows of a strip
  int row_bytes;              // of shared memory, for an input row
  int out_at, parameters_at;  // in shared memory; the ring is at 0
};

// Rows that one output row reads, and rows that the next one adds.
constexpr int ring_rows(int stride) { return 3 + stride; }

template <class T, bool kPassthrough, Main kMain>
__global__ void __launch_bounds__(kThreads, 2) pixels_kernel(PixelsParams<T> params) {
  constexpr int kStride = stride_of(kMain);
  constexpr int kRing = ring_rows(kStride);
  constexpr int kUnit = kPassthrough ? 2 : 1;
  static_assert(!kPassthrough || kStride == 1, "passed-through pixels keep their place");
  const Operands<T>& op = params.op;
  const int thread = static_cast<int>(threadIdx.x);
  const int channels = static_cast<int>(op.channels), pixel = static_cast<int>(op.source_pixel);
  const int width = static_cast<int>(op.width), out_width = static_cast<int>(op.out_width);
  const int height = static_cast<int>(op.height), out_height = static_cast<int>(op.out_height);
  const int row_elements = width * pixel, out_elements = out_width * kUnit * channels;
  const Shared<unsigned char> memory = shared_memory();
  const Shared<float> weight = (memory + params.parameters_at).template as<float>();
  const Shared<float> scale = weight + 9 * channels, shift = scale + channels;

  // Lanes take neighbouring channels, warps also parts of the row.
  const int lanes = (channels + kWarp - 1) / kWarp * kWarp;
  const int block = lanes < kThreads ? lanes : kThreads;
  const int parts = kThreads / block;
  const int part = thread / block;
  const int column0 = part < parts ? out_width * part / parts : 0;
  const int column1 = part < parts ? out_width * (part + 1) / parts : 0;

  load_parameters(weight, op.weight, channels * 9);
  load_parameters(scale, op.scale, channels);
  load_parameters(shift, op.shift, channels);

  for (int64_t tile = blockIdx.x; tile < params.tiles; tile += gridDim.x) {
    const int64_t image = tile / params.strips;
    const int row0 = static_cast<int>(tile % params.strips) * params.rows;
    const int row1 = row0 + params.rows < out_height ? row0 + params.rows : out_height;
    const Global<const T> x =
        Global<const T>{kPassthrough ? op.pass : op.source} + image * op.source_image;
    const Global<T> out = Global<T>{op.out} + image * op.out_image;

    // Load the rows of the first output row.
    int next = row0 * kStride > 0 ? row0 * kStride - 1 : 0;  // input row not yet asked for
    for (; next <= row0 * kStride + 1 && next < height; ++next) {
      load_span(memory + next % kRing * params.row_bytes,
                x + static_cast<int64_t>(next) * row_elements, row_elements);
    }
    cp_async_commit();
    cp_async_wait<0>();
    sync_threads();

    for (int row = row0; row < row1; ++row) {
      // Load what the next output row adds.
      if (row + 1 < row1) {
        for (; next <= (row + 1) * kStride + 1 && next < height; ++next) {
          load_span(memory + next % kRing * params.row_bytes,
                    x + static_cast<int64_t>(next) * row_elements, row_elements);
        }
      }
      cp_async_commit();

      // Compute, with a window of 3 x 3 inputs sliding along the row.
      const Global<T> out_row = out + static_cast<int64_t>(row) * out_elements;
      const int out_phase = misalignment(out_row, 16);
      const Shared<T> staged = (memory + (params.out_at + out_phase)).template as<T>();
      const bool paired = out_phase % (2 * static_cast<int>(sizeof(T))) == 0;
      Lines<T> lines{{staged, staged, staged}, {}};
      for (int dy = 0; dy < 3; ++dy) {
        const int y = row * kStride + dy - 1;
        lines.have[dy] = y >= 0 && y < height;
        if (lines.have[dy]) {
          const int phase = misalignment(x + static_cast<int64_t>(y) * row_elements, 16);
          lines.at[dy] = (memory + (y % kRing * params.row_bytes + phase)).template as<T>();
        }
      }
      for (int c = thread % block; c < channels; c += block) {
        if (column0 == column1) break;
        const ChannelParameters of(weight, scale, shift, c);
        slide<T, kPassthrough, kStride>(staged, lines, of, op, c, column0, column1, paired);
      }
      cp_async_wait<0>();
      sync_threads();

      // Store.
      store_span(out_row, staged, out_elements);
      sync_threads();
    }
  }
}

// Output rows of a strip. Halo rows and parameters cost memory traffic, so an image is cut only
// if there are few of them, or if it is long.
inline int64_t strip_rows(int64_t batch, int64_t out_height) {
  constexpr int64_t kLong = 28, kShort = 7, kCtas = 132;
  if (batch >= 8) return std::min(out_height, kLong);
  return std::min(out_height, std::max(kShort, ceil_div(batch * out_height, kCtas)));
}

// Fills in the tiling; false if the rows do not fit.
template <class T, bool kPassthrough, Main kMain>
bool tile_pixels(PixelsParams<T>& params, int64_t& shared_bytes) {
  constexpr int64_t kShared = 96 * 1024;  // two CTAs per SM
  const Operands<T>& op = params.op;
  const int64_t size = sizeof(T);
  const int64_t row = span_bytes(op.width * op.source_pixel * size);
  const int64_t out_row = span_bytes(op.out_width * op.channels * (kPassthrough ? 2 : 1) * size);
  const int64_t out_at = ring_rows(stride_of(kMain)) * row;
  shared_bytes = out_at + out_row + op.channels * 11 * static_cast<int64_t>(sizeof(float));
  if (shared_bytes > kShared || op.height > (1 << 28)) return false;
  params.rows = static_cast<int>(strip_rows(op.batch, op.out_height));
  params.strips = ceil_div(op.out_height, params.rows);
  params.tiles = op.batch * params.strips;
  params.row_bytes = static_cast<int>(row);
  params.out_at = static_cast<int>(out_at);
  params.parameters_at = static_cast<int>(out_at + out_row);
  return true;
}

// Whole images -------------------------------------------------------------------------------

template <class T>
struct ImagesParams {
  Operands<T> op;
  int images;                 // of a tile
  int64_t tiles;              // in all
  int out_at, parameters_at;  // in shared memory; the input is at 0
};

template <class T, bool kPassthrough, Main kMain>
__global__ void __launch_bounds__(kThreads, 2) images_kernel(ImagesParams<T> params) {
  constexpr int kStride = stride_of(kMain);
  const Operands<T>& op = params.op;
  const int thread = static_cast<int>(threadIdx.x);
  const int channels = static_cast<int>(op.channels);
  const int height = static_cast<int>(op.height), out_height = static_cast<int>(op.out_height);
  const int row_elements = static_cast<int>(op.width * op.source_pixel);
  const int out_elements = static_cast<int>(op.out_image / op.out_height);
  const int out_width = static_cast<int>(op.out_width);
  const Shared<unsigned char> memory = shared_memory();
  const Shared<float> weight = (memory + params.parameters_at).template as<float>();
  const Shared<float> scale = weight + 9 * channels, shift = scale + channels;

  // Lanes take neighbouring channels, warps also rows.
  const int lanes = (channels + kWarp - 1) / kWarp * kWarp;
  const int block = lanes < kThreads ? lanes : kThreads;
  const int parts = kThreads / block;

  load_parameters(weight, op.weight, channels * 9);
  load_parameters(scale, op.scale, channels);
  load_parameters(shift, op.shift, channels);

  for (int64_t tile = blockIdx.x; tile < params.tiles; tile += gridDim.x) {
    const int64_t image0 = tile * params.images;
    const int images =
        static_cast<int>(op.batch - image0 < params.images ? op.batch - image0 : params.images);
    // Load.
    const Shared<T> x = load_span(
        memory, Global<const T>{kPassthrough ? op.pass : op.source} + image0 * op.source_image,
        images * height * row_elements);
    cp_async_commit();
    cp_async_wait<0>();
    sync_threads();

    // Compute.
    const Global<T> out = Global<T>{op.out} + image0 * op.out_image;
    const int phase = misalignment(out, 16);
    const Shared<T> staged = (memory + (params.out_at + phase)).template as<T>();
    const bool paired = phase % (2 * static_cast<int>(sizeof(T))) == 0;
    const int part = thread / block;
    for (int c = thread % block; c < channels && part < parts; c += block) {
      const ChannelParameters of(weight, scale, shift, c);
      for (int line = part; line < images * out_height; line += parts) {
        const int image = line / out_height, row = line % out_height;
        Lines<T> lines;
        for (int dy = 0; dy < 3; ++dy) {
          const int y = row * kStride + dy - 1;
          lines.have[dy] = y >= 0 && y < height;
          lines.at[dy] = x + (image * height + y) * row_elements;
        }
        slide<T, kPassthrough, kStride>(staged + line * out_elements, lines, of, op, c, 0,
                                        out_width, paired);
      }
    }
    sync_threads();

    // Store.
    store_span(out, staged, images * out_height * out_elements);
    if (tile + gridDim.x < params.tiles) sync_threads();
  }
}

// Fills in the tiling; false if not even one image fits.
template <class T, bool kPassthrough, Main kMain>
bool tile_images(ImagesParams<T>& params, int64_t& shared_bytes) {
  constexpr int64_t kShared = 96 * 1024;  // two CTAs per SM
  constexpr int64_t kCtas = 2 * 132;
  const Operands<T>& op = params.op;
  const int64_t size = sizeof(T);
  const int64_t in = op.height * op.width * op.source_pixel * size, out = op.out_image * size;
  const int64_t parameters = op.channels * 11 * static_cast<int64_t>(sizeof(float));
  const int64_t fit = (kShared - parameters - 2 * span_bytes(0) - 32) / (in + out);
  if (fit < 1) return false;
  const int64_t images = std::max<int64_t>(1, std::min(fit, op.batch / kCtas));
  params.images = static_cast<int>(images);
  params.tiles = ceil_div(op.batch, images);
  params.out_at = static_cast<int>(span_bytes(images * in));
  params.parameters_at = params.out_at + static_cast<int>(span_bytes(images * out));
  shared_bytes = params.parameters_at + parameters;
  return true;
}

}  // namespace snv2::SNV2_GPU
