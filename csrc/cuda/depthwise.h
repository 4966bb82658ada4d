// Chooses among the tilings of planes.h and pixels.h, and the direct kernel for what fits neither.
#pragma once

#include <algorithm>
#include <array>

#include "cuda/columns.h"
#include "cuda/dispatch.h"
#include "cuda/launch.h"
#include "cuda/pixels.h"
#include "cuda/planes.h"
#include "cuda/strided.h"

namespace snv2::SNV2_GPU {

inline Launch launch_of(int64_t ctas, int64_t shared_bytes, Stream stream) {
  Launch config;
  config.grid_x = static_cast<uint32_t>(std::min(ctas, kMaxGrid));
  config.threads = kThreads;
  config.shared_bytes = shared_bytes;
  config.stream = stream;
  return config;
}

template <bool kPassthrough, Main kMain, class T>
void launch_direct(const Operands<T>& op, bool channels_last, const Buffers& buffers,
                   Stream stream) {
  const int64_t numel = op.batch * op.out_image;
  launch(launch_of(ceil_div(numel, kThreads), 0, stream), buffers,
         direct_kernel<T, kPassthrough, kMain>, DirectParams<T>{op, channels_last, numel});
}

// False where planes are too large for it.
template <bool kPassthrough, class Shape, class T>
bool launch_columns(const Operands<T>& op, const Buffers& buffers, Stream stream) {
  ColumnsParams<T> params{};
  params.op = op;
  int64_t shared_bytes = 0;
  if (!tile_columns<T, kPassthrough, Shape>(params, shared_bytes)) return false;
  const auto places =
      reinterpret_cast<uintptr_t>(op.pass) | reinterpret_cast<uintptr_t>(op.out) |
      static_cast<uintptr_t>(op.pass_image * static_cast<int64_t>(sizeof(T))) |
      static_cast<uintptr_t>(op.height * op.width * static_cast<int64_t>(sizeof(T)));
  params.unit = 16;
  while (places % static_cast<uintptr_t>(params.unit) != 0) params.unit /= 2;
  Launch config = launch_of(op.batch * params.tiles, shared_bytes, stream);
  config.threads = kColumnThreads;
  launch(config, buffers, columns_kernel<T, kPassthrough, Shape>, params);
  return true;
}

template <bool kPassthrough, class T>
bool launch_columns(const Operands<T>& op, const Buffers& buffers, Stream stream) {
  if constexpr (sizeof(T) == 2) {
    const auto places = reinterpret_cast<uintptr_t>(op.source) |
                        (kPassthrough ? 0 : reinterpret_cast<uintptr_t>(op.out));
    if (op.width % 14 == 0 && places % 4 == 0 && op.source_image % 2 == 0) {
      return op.width == 14 ? launch_columns<kPassthrough, Columns<14, true, false, false>>(
                                  op, buffers, stream)
                            : launch_columns<kPassthrough, Columns<14, true, true, false>>(
                                  op, buffers, stream);
    }
  } else if (op.width % 7 == 0 && op.width > 7) {
    return launch_columns<kPassthrough, Columns<7, false, true, false>>(op, buffers, stream);
  }
  if (op.width == 7) {
    return launch_columns<kPassthrough, Columns<7, false, false, false>>(op, buffers, stream);
  }
  return launch_columns<kPassthrough, Columns<8, false, true, true>>(op, buffers, stream);
}

// False where planes are too large for it.
template <class T>
bool launch_strided(const Operands<T>& op, const Buffers& buffers, Stream stream) {
  StridedParams<T> params{};
  params.op = op;
  int64_t shared_bytes = 0;
  if (!tile_strided<T>(params, shared_bytes)) return false;
  Launch config = launch_of(op.batch * params.tiles, shared_bytes, stream);
  config.threads = kColumnThreads;
  launch(config, buffers, strided_kernel<T>, params);
  return true;
}

template <bool kPassthrough, Main kMain, class T>
void launch_planes(const Operands<T>& op, const Buffers& buffers, Stream stream) {
  PlanesParams<T> params{};
  params.op = op;
  int64_t shared_bytes = 0;
  if (!tile_planes<T, kPassthrough, kMain>(params, shared_bytes)) {
    return launch_direct<kPassthrough, kMain>(op, false, buffers, stream);
  }
  launch(launch_of(params.tiles, shared_bytes, stream), buffers,
         planes_kernel<T, kPassthrough, kMain>, params);
}

// Lanes of kChannels channels.
template <bool kPassthrough, Main kMain, int kChannels, class T>
void launch_pixels(const Operands<T>& op, const Buffers& buffers, Stream stream) {
  int64_t shared_bytes = 0;
  const auto config = [&](int64_t tiles, int64_t jobs) {
    Launch config = launch_of(tiles, shared_bytes, stream);
    config.threads = static_cast<uint32_t>(pixel_threads<kChannels>(jobs));
    return config;
  };
  ImagesParams<T> images{};
  images.op = op;
  if (tile_images<T, kPassthrough, kMain, kChannels>(images, shared_bytes)) {
    const PixelJobs& jobs = images.jobs;
    launch(config(images.tiles, int64_t{jobs.lanes} * jobs.groups * images.strips * images.images),
           buffers, images_kernel<T, kPassthrough, kMain, kChannels>, images);
    return;
  }
  PixelsParams<T> params{};
  params.op = op;
  if (!tile_pixels<T, kPassthrough, kMain, kChannels>(params, shared_bytes)) {
    return launch_direct<kPassthrough, kMain>(op, true, buffers, stream);
  }
  launch(config(params.tiles, int64_t{params.jobs.lanes} * params.jobs.groups), buffers,
         pixels_kernel<T, kPassthrough, kMain, kChannels>, params);
}

template <bool kPassthrough, Main kMain, class T>
void launch_pixels(const Operands<T>& op, const Buffers& buffers, Stream stream) {
  if constexpr (sizeof(T) == 2) {
    // Pairs of channels are words, and a warp of them takes as long as 5 / 3 of one of channels.
    const bool words = op.channels % 2 == 0 && reinterpret_cast<uintptr_t>(op.source) % 4 == 0 &&
                       reinterpret_cast<uintptr_t>(op.out) % (kPassthrough ? 8 : 4) == 0;
    if (words && 5 * ceil_div(op.channels, 2 * kWarp) <= 3 * ceil_div(op.channels, kWarp)) {
      return launch_pixels<kPassthrough, kMain, 2>(op, buffers, stream);
    }
  }
  launch_pixels<kPassthrough, kMain, 1>(op, buffers, stream);
}

// The depthwise ops: x holds the main channels, and before them as many to pass through, if any.
template <bool kPassthrough, Main kMain, class T>
void launch_depthwise(const FeatureMap& x, const Depthwise3x3& dw, bool with_relu,
                      const FeatureMap& out, Stream stream) {
  const T* data = static_cast<const T*>(x.data);
  const int64_t channels = kPassthrough ? x.channels / 2 : x.channels;
  Operands<T> op{};
  op.pass = data;
  op.source = data + (x.channels - channels) * x.channel_stride();
  op.out = static_cast<T*>(out.data);
  op.pass_image = op.source_image = x.channels * x.plane();
  op.out_image = out.channels * out.plane();
  op.source_pixel = x.channels;
  op.batch = x.batch;
  op.channels = channels;
  op.height = x.height;
  op.width = x.width;
  op.out_height = out.height;
  op.out_width = out.width;
  op.weight = dw.weight;
  op.scale = dw.scale;
  op.shift = dw.shift;
  op.relu = with_relu;
  const int64_t floats = channels * static_cast<int64_t>(sizeof(float));
  const std::array buffers{reads(x), constants(dw.weight, 9 * floats), constants(dw.scale, floats),
                           constants(dw.shift, floats), writes(out)};
  if (x.layout == Layout::kContiguous) {
    if constexpr (kMain == Main::kStride1) {
      if (launch_columns<kPassthrough>(op, buffers, stream)) return;
    } else {
      if (launch_strided(op, buffers, stream)) return;
    }
    launch_planes<kPassthrough, kMain>(op, buffers, stream);
  } else {
    launch_pixels<kPassthrough, kMain>(op, buffers, stream);
  }
}

}  // namespace snv2::SNV2_GPU
