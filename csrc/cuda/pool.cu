// Average of 3x3 pixels beside a unit's branch, as ShuffleNet v1 has it: planes to planes.
//
// A thread has one pixel of the result's padded rows, and lanes have neighbouring ones, so that
// stores are whole sectors; what neighbours read twice is in L1. Pixels are added row by row, as in
// PyTorch.
#include <stdexcept>
#include <vector>

#include "cuda/activation.h"
#include "cuda/dispatch.h"
#include "cuda/launch.h"
#include "cuda/network.h"
#include "cuda/span.h"

namespace snv2::SNV2_GPU {
namespace {

template <class T>
struct PoolParams {
  const T* in;
  T* out;
  int64_t in_pitch, out_pitch;  // elements between planes
  const int32_t *in_table, *out_table;
  int height, width, row;  // row: elements from one to the next
  int out_height, out_width, out_row;
  int stride;
  int64_t pixels;  // of all images' results, with padding
  bool inside;     // the average of those inside the map
  After after;
};

template <class T>
__global__ void __launch_bounds__(kThreads) pool_kernel(PoolParams<T> params) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int channel = static_cast<int>(blockIdx.y);
  grid_dependents_launch();
  grid_dependency_wait();
  if (index >= params.pixels) return;
  const int out_plane = params.out_height * params.out_row;
  const int64_t image = index / out_plane;
  const int pixel = static_cast<int>(index - image * out_plane);
  const int row = pixel / params.out_row * params.stride;
  const int column = pixel % params.out_row * params.stride;
  const int64_t in_plane = load(Global<const int32_t>{params.in_table} + channel);
  const int64_t to_plane = load(Global<const int32_t>{params.out_table} + channel);
  const Global<const T> in =
      Global<const T>{params.in} +
      (in_plane * params.in_pitch + image * (int64_t{params.height} * params.row));
  float sum = 0.0f;
  int count = 0;
  for (int y = row - 1; y <= row + 1; ++y) {
    for (int x = column - 1; x <= column + 1; ++x) {
      if (y < 0 || y >= params.height || x < 0 || x >= params.width) continue;
      sum += to_float(load(in + (int64_t{y} * params.row + x)));
      ++count;
    }
  }
  const float average = sum / static_cast<float>(params.inside ? count : 9);
  T result;
  from_float(activated(params.after.kind, average, slope_of(params.after, channel)), result);
  store(Global<T>{params.out} + (to_plane * params.out_pitch + index), result);
}

}  // namespace

void run_pool(const StepCall& call, LaunchInfo* info) {
  with_type(call.plan->dtype(), [&](auto zero) {
    using T = decltype(zero);
    const GpuStep& step = *call.step;
    const GpuActivation& act = step.dw_activation;
    PoolParams<T> params{};
    params.in = static_cast<const T*>(call.in.data);
    params.out = static_cast<T*>(call.out.data);
    params.in_pitch = call.in.channel;
    params.out_pitch = call.out.channel;
    params.in_table = call.arrays.tables + step.in_table;
    params.out_table = call.arrays.tables + step.out_table;
    params.height = static_cast<int>(call.height);
    params.width = static_cast<int>(call.width);
    params.row = static_cast<int>(call.in.row);
    params.out_row = static_cast<int>(call.out.row);
    params.out_height = static_cast<int>(conv3x3_extent(call.height, step.stride));
    params.out_width = static_cast<int>(conv3x3_extent(call.width, step.stride));
    params.stride = static_cast<int>(step.stride);
    params.pixels = call.batch * call.out.image;
    params.inside = (step.parts & kPoolInside) != 0;
    params.after = {act.kind, call.arrays.parameters + act.slopes};
    const int64_t ctas = ceil_div(params.pixels, kThreads);
    if (ctas > kMaxGrid) throw std::invalid_argument("x: too many pixels for a pool");
    if (step.in_channels > 65535) throw std::invalid_argument("plan: too many channels for a pool");
    const int64_t channels = step.in_channels, size = sizeof(T);
    const int64_t read = channels * call.batch * call.height * call.width * size;
    const int64_t written = channels * params.pixels * size;
    Launch config;
    config.grid_x = static_cast<uint32_t>(ctas);
    config.grid_y = static_cast<uint32_t>(channels);
    config.threads = kThreads;
    config.overlaps = call.overlaps;
    config.stream = call.stream;
    if (info != nullptr) {
      info->kernel = "pool";
      info->ctas = ctas * channels;
      info->threads = kThreads;
      info->cluster = info->launches = 1;
      info->read_bytes = read;
      info->written_bytes = written;
      return;
    }
    std::vector<Buffer> buffers{constants(params.in_table, channels * 4),
                                constants(params.out_table, channels * 4)};
    if (act.kind == Activation::kPrelu) {
      buffers.push_back(constants(params.after.slopes, channels * 4));
    }
    const int64_t in_bytes = call.in.channels * call.in.channel * size;
    const int64_t out_bytes = call.out.channels * call.out.channel * size;
    if (step.in_buffer == step.out_buffer) {
      buffers.push_back(updates(call.out.data, out_bytes, read, written));
    } else {
      buffers.push_back(reads(call.in.data, in_bytes));
      buffers.push_back(updates(call.out.data, out_bytes, 0, written));
    }
    launch(config, buffers, pool_kernel<T>, params);
  });
}

}  // namespace snv2::SNV2_GPU
