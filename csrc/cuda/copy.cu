// The caller's map to planes, where a stage begins with a unit that passes channels through.
//
// A CTA takes 32 channels x 64 pixels through shared memory, so that it reads along whatever is
// contiguous in the caller's tensor and writes along pixels.
#include <array>

#include "cuda/dispatch.h"
#include "cuda/launch.h"
#include "cuda/network.h"

namespace snv2::SNV2_GPU {
namespace {

constexpr int kCopyThreads = 256;
constexpr int kCopyWarps = kCopyThreads / kWarp;
constexpr int kTileChannels = 32, kTilePixels = 64;
constexpr int kTilePitch = kTilePixels + 2;  // words of neighbouring channels in different banks

template <class T>
struct CopyParams {
  const T* in;
  int64_t in_channel, in_image, in_pixel;
  const int32_t* in_table;   // [channels]
  const int32_t* out_table;  // [channels]
  T* out;
  int64_t out_pitch;
  int channels;
  int64_t plane, pixels;  // of one image, of all
};

template <class T>
__global__ void __launch_bounds__(kCopyThreads) copy_kernel(CopyParams<T> params) {
  const Shared<T> tile = shared_memory().template as<T>();
  const int warp = warp_of_cta(), lane = lane_of_warp();
  const int64_t pixel0 = static_cast<int64_t>(blockIdx.x) * kTilePixels;
  const int channel0 = static_cast<int>(blockIdx.y) * kTileChannels;
  grid_dependents_launch();
  grid_dependency_wait();

  // Load.
  const bool along_pixels = params.in_pixel == 1;
  const int outer = along_pixels ? kTileChannels : kTilePixels;
  const int inner = along_pixels ? kTilePixels : kTileChannels;
  for (int o = warp; o < outer; o += kCopyWarps) {
    for (int i = lane; i < inner; i += kWarp) {
      const int c = along_pixels ? o : i, p = along_pixels ? i : o;
      if (channel0 + c >= params.channels || pixel0 + p >= params.pixels) continue;
      const int64_t channel = load(Global<const int32_t>{params.in_table} + (channel0 + c));
      const int64_t image = (pixel0 + p) / params.plane;
      const int64_t place = pixel0 + p - image * params.plane;
      store(tile + (c * kTilePitch + p),
            load(Global<const T>{params.in} + (channel * params.in_channel +
                                               image * params.in_image + place * params.in_pixel)));
    }
  }
  sync_threads();

  // Store.
  for (int c = warp; c < kTileChannels; c += kCopyWarps) {
    if (channel0 + c >= params.channels) break;
    const int64_t plane = load(Global<const int32_t>{params.out_table} + (channel0 + c));
    for (int p = lane; p < kTilePixels; p += kWarp) {
      if (pixel0 + p >= params.pixels) break;
      store(Global<T>{params.out} + (plane * params.out_pitch + pixel0 + p),
            load(tile + (c * kTilePitch + p)));
    }
  }
}

}  // namespace

void run_copy(const StepCall& call, LaunchInfo* info) {
  with_type(call.plan->dtype(), [&](auto zero) {
    using T = decltype(zero);
    const GpuStep& step = *call.step;
    CopyParams<T> params{};
    params.in = static_cast<const T*>(call.in.data);
    params.in_channel = call.in.channel;
    params.in_image = call.in.image;
    params.in_pixel = call.in.pixel;
    params.in_table = call.arrays.tables + step.in_table;
    params.out_table = call.arrays.tables + step.out_table;
    params.out = static_cast<T*>(call.out.data);
    params.out_pitch = call.out.channel;
    params.channels = static_cast<int>(step.in_channels);
    params.plane = call.height * call.width;
    params.pixels = call.batch * params.plane;
    const int64_t bytes = step.in_channels * params.pixels * static_cast<int64_t>(sizeof(T));
    Launch config;
    config.grid_x = static_cast<uint32_t>(ceil_div(params.pixels, kTilePixels));
    config.grid_y = static_cast<uint32_t>(ceil_div(step.in_channels, kTileChannels));
    config.threads = kCopyThreads;
    config.shared_bytes = kTileChannels * kTilePitch * static_cast<int64_t>(sizeof(T));
    config.overlaps = call.overlaps;
    config.stream = call.stream;
    if (info != nullptr) {
      info->kernel = "copy";
      info->ctas = int64_t{config.grid_x} * config.grid_y;
      info->threads = kCopyThreads;
      info->shared_bytes = config.shared_bytes;
      info->columns = kTilePixels;
      info->cluster = info->launches = 1;
      info->read_bytes = info->written_bytes = bytes;
      return;
    }
    const std::array buffers{
        constants(params.in_table, step.in_channels * 4),
        constants(params.out_table, step.in_channels * 4), reads(call.in.data, bytes),
        updates(call.out.data, call.out.channels * call.out.channel * int64_t{sizeof(T)}, 0,
                bytes)};
    launch(config, buffers, copy_kernel<T>, params);
  });
}

}  // namespace snv2::SNV2_GPU
