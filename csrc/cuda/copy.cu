// The caller's map to planes, where a stage begins with a unit that passes channels through, and
// planes to the caller's map, where it ends with a unit that is taken in pieces.
//
// A CTA takes 32 channels x 64 pixels of the padded rows of planes through shared memory, so that
// it moves along whatever is contiguous on either side.
#include <stdexcept>
#include <vector>

#include "cuda/dispatch.h"
#include "cuda/launch.h"
#include "cuda/network.h"
#include "cuda/span.h"

namespace snv2::SNV2_GPU {
namespace {

constexpr int kCopyThreads = 256;
constexpr int kCopyWarps = kCopyThreads / kWarp;
constexpr int kTileChannels = 32, kTilePixels = 64;
constexpr int kTilePitch = kTilePixels + 2;  // words of neighbouring channels in different banks

// One side of a copy. T may be const.
template <class T>
struct Side {
  T* data;
  int64_t channel, image, row, pixel;  // strides
  const int32_t* table;                // [channels], or null: all in order

  SNV2_DEVICE Global<T> at(int c, int64_t n, int y, int x) const {
    const int64_t where = table != nullptr ? load(Global<const int32_t>{table} + c) : c;
    return Global<T>{data} + (where * channel + n * image + y * row + x * pixel);
  }
};

template <class T>
struct CopyParams {
  Side<const T> in;
  Side<T> out;
  int channels, height, width, row;  // row: pixels of one, with the padding of planes
  int64_t rows;                      // of all images
  bool pads;                         // padding is written
};

template <class T>
__global__ void __launch_bounds__(kCopyThreads) copy_kernel(CopyParams<T> params) {
  const Shared<T> tile = shared_memory().template as<T>();
  const int warp = warp_of_cta(), lane = lane_of_warp();
  const int64_t pixel0 = static_cast<int64_t>(blockIdx.x) * kTilePixels;
  const int channel0 = static_cast<int>(blockIdx.y) * kTileChannels;
  const int64_t row0 = pixel0 / params.row, end = params.rows * params.row;
  const int column0 = static_cast<int>(pixel0 - row0 * params.row);
  const int pixels = static_cast<int>(end - pixel0 < kTilePixels ? end - pixel0 : kTilePixels);
  const int channels =
      params.channels - channel0 < kTileChannels ? params.channels - channel0 : kTileChannels;
  grid_dependents_launch();
  grid_dependency_wait();

  // Calls f(channel and pixel of the tile, place on that side, whether it is a pixel or padding),
  // along what is contiguous there.
  const auto for_each = [&](const auto& side, const auto& f) {
    const bool along_pixels = side.pixel == 1;
    const int outer = along_pixels ? channels : pixels, inner = along_pixels ? pixels : channels;
    for (int o = warp; o < outer; o += kCopyWarps) {
      for (int i = lane; i < inner; i += kWarp) {
        const int c = along_pixels ? o : i, p = along_pixels ? i : o;
        const int64_t y = row0 + (column0 + p) / params.row, image = y / params.height;
        const int x = (column0 + p) % params.row;
        f(tile + (c * kTilePitch + p),
          side.at(channel0 + c, image, static_cast<int>(y - image * params.height), x),
          x < params.width);
      }
    }
  };
  for_each(params.in, [](Shared<T> to, Global<const T> from, bool there) {
    store(to, there ? load(from) : T{});
  });
  sync_threads();
  for_each(params.out, [&](Shared<T> from, Global<T> to, bool there) {
    if (there || params.pads) store(to, load(from));
  });
}

}  // namespace

void run_copy(const StepCall& call, LaunchInfo* info) {
  with_type(call.plan->dtype(), [&](auto zero) {
    using T = decltype(zero);
    const GpuStep& step = *call.step;
    const bool exports = step.kind == GpuStepKind::kExport;
    const MapView& to = exports ? call.result : call.out;
    const int32_t* const in_table = call.arrays.tables + step.in_table;
    const int32_t* const out_table = exports ? nullptr : call.arrays.tables + step.out_table;
    CopyParams<T> params{};
    params.in = {static_cast<const T*>(call.in.data),
                 call.in.channel,
                 call.in.image,
                 call.in.row,
                 call.in.pixel,
                 in_table};
    params.out = {static_cast<T*>(to.data), to.channel, to.image, to.row, to.pixel, out_table};
    params.channels = static_cast<int>(step.in_channels);
    params.height = static_cast<int>(call.height);
    params.width = static_cast<int>(call.width);
    params.row = static_cast<int>(exports ? call.in.row : to.row);
    params.rows = call.batch * call.height;
    params.pads = !exports;
    const int64_t size = sizeof(T), bytes = step.in_channels * params.rows * call.width * size;
    const int64_t planes_bytes = step.in_channels * params.rows * params.row * size;
    const int64_t tiles = ceil_div(params.rows * params.row, kTilePixels);
    if (tiles > kMaxGrid) throw std::invalid_argument("x: too many pixels for a copy");
    Launch config;
    config.grid_x = static_cast<uint32_t>(tiles);
    config.grid_y = static_cast<uint32_t>(ceil_div(step.in_channels, kTileChannels));
    config.threads = kCopyThreads;
    config.shared_bytes = kTileChannels * kTilePitch * size;
    config.overlaps = call.overlaps;
    config.stream = call.stream;
    if (info != nullptr) {
      info->kernel = exports ? "export" : "copy";
      info->ctas = int64_t{config.grid_x} * config.grid_y;
      info->threads = kCopyThreads;
      info->shared_bytes = config.shared_bytes;
      info->columns = kTilePixels;
      info->cluster = info->launches = 1;
      info->read_bytes = bytes;
      info->written_bytes = exports ? bytes : planes_bytes;
      return;
    }
    std::vector<Buffer> buffers{constants(in_table, step.in_channels * 4)};
    if (exports) {
      buffers.push_back(updates(call.in.data, call.in.channels * call.in.channel * size, bytes, 0));
      buffers.push_back(writes(to.data, bytes));
    } else {
      buffers.push_back(constants(out_table, step.in_channels * 4));
      buffers.push_back(reads(call.in.data, bytes));
      buffers.push_back(updates(to.data, to.channels * to.channel * size, 0, planes_bytes));
    }
    launch(config, buffers, copy_kernel<T>, params);
  });
}

}  // namespace snv2::SNV2_GPU
