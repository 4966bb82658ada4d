// dw_conv3x3_backward and split_dw_cat_shuffle_backward: the gradients of their ops.
#include <array>

#include "checks.h"
#include "cuda/depthwise_backward.h"
#include "cuda/dispatch.h"
#include "cuda/launch.h"

namespace snv2::SNV2_GPU {
namespace {

// The sums of all parts as gradients; kDepthwiseSums says how.
struct FinishParams {
  const float* sums;  // [parts][kDepthwiseSums][sums_pitch(channels)]
  const float* weight;
  const float* scale;
  Depthwise3x3Gradients grads;
  int64_t parts, channels;
};

constexpr int kFinishChannels = 24;  // three sectors of floats
constexpr int kFinishWeights = 9 * kFinishChannels;
constexpr int64_t kFinishShared = (kThreads + kFinishWeights) * sizeof(float);

__global__ void __launch_bounds__(kThreads) finish_kernel(FinishParams params) {
  constexpr int kSums = static_cast<int>(kDepthwiseSums), kChains = 4;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kFinishChannels;
  const int64_t left = params.channels - first;
  const int channels = left < kFinishChannels ? static_cast<int>(left) : kFinishChannels;
  // Sums [kDepthwiseSums][kFinishChannels], then weights as they lie in memory.
  const Shared<float> sums = shared_memory().template as<float>(), weights = sums + kThreads;
  if (thread < channels * 9) {
    store(weights + thread, load(Global<const float>{params.weight} + (first * 9 + thread)));
  }

  // Add up.
  const int which = static_cast<int>(threadIdx.x / unsigned{kFinishChannels});
  const int own = thread - which * kFinishChannels;
  if (which < kSums && own < channels) {
    const int64_t pitch = sums_pitch(params.channels), row = pitch * kSums;
    Global<const float> from = Global<const float>{params.sums} + (which * pitch + first + own);
    float chains[kChains] = {};
    int64_t part = 0;
#pragma unroll 1
    for (; part + kChains <= params.parts; part += kChains) {
#pragma unroll
      for (int i = 0; i < kChains; ++i) {
        chains[i] += load(from);
        from = from + row;
      }
    }
#pragma unroll
    for (int i = 0; i < kChains - 1; ++i) {
      if (part + i < params.parts) chains[i] += load(from + i * row);
    }
    store(sums + thread, (chains[0] + chains[1]) + (chains[2] + chains[3]));
  }
  sync_threads();

  // Store.
  if (thread < channels * 9) {
    const int channel = static_cast<int>(threadIdx.x / 9u), tap = thread - channel * 9;
    store(Global<float>{params.grads.weight} + (first * 9 + thread),
          load(sums + (tap * kFinishChannels + channel)) *
              load(Global<const float>{params.scale} + (first + channel)));
  }
  if (thread >= channels) return;
  store(Global<float>{params.grads.shift} + (first + thread),
        load(sums + (9 * kFinishChannels + thread)));
  float rows[3] = {};
  for (int tap = 0; tap < 9; ++tap) {
    rows[tap / 3] = multiply_add(load(sums + (tap * kFinishChannels + thread)),
                                 load(weights + (thread * 9 + tap)), rows[tap / 3]);
  }
  store(Global<float>{params.grads.scale} + (first + thread), (rows[0] + rows[1]) + rows[2]);
}

// `map` from its channel `main` on, of which every `every`th is the convolution's.
template <class T>
Strided<T> strided(const FeatureMap& map, int64_t main, int64_t every) {
  const int64_t channel = map.channel_stride(), pixel = map.pixel_stride();
  return {static_cast<T*>(map.data), main * channel,    map.channels * map.plane(),
          every * channel,           map.width * pixel, pixel};
}

template <class T>
BackwardParams<T> params_of(const FeatureMap& x, int64_t channels, int stride, Launch& config) {
  require(x.height < kMostPixels && x.width < kMostPixels,
          "x must have fewer than 2^20 rows and columns");
  BackwardParams<T> params{};
  params.batch = x.batch;
  params.channels = channels;
  params.height = static_cast<int>(x.height);
  params.width = static_cast<int>(x.width);
  cut_backward(params, x.layout == Layout::kChannelsLast, stride, x.channels != channels, config);
  return params;
}

template <bool kPassthrough, int kStride, class T>
void launch_backward(const FeatureMap& grad, const FeatureMap& x, const Depthwise3x3& dw,
                     const FeatureMap& grad_x, const Depthwise3x3Gradients& grads, float* workspace,
                     Stream stream) {
  const int64_t channels = kPassthrough ? x.channels / 2 : x.channels;
  const auto floats = [&](int64_t count) {
    return channels * count * static_cast<int64_t>(sizeof(float));
  };
  Launch config;
  BackwardParams<T> params = params_of<T>(x, channels, kStride, config);
  const int64_t sums_bytes =
      params.parts * kDepthwiseSums * sums_pitch(channels) * static_cast<int64_t>(sizeof(float));
  if (grad_x.numel() > 0) {
    params.grad = strided<const T>(grad, kPassthrough ? 1 : 0, kPassthrough ? 2 : 1);
    params.x = strided<const T>(x, x.channels - channels, 1);
    params.grad_x = strided<T>(grad_x, x.channels - channels, 1);
    params.sums = workspace;
    params.weight = dw.weight;
    params.scale = dw.scale;
    params.shift = dw.shift;
    params.relu = dw.relu;
    const bool whole_rows = params.tiles_across == 1;
    const bool last = x.layout == Layout::kChannelsLast;
    const T* x_main = params.x.data + params.x.main;
    params.copy_x = last ? std::min(pixel_copy(x_main, x.channels), pixel_copy(x_main, channels))
                    : whole_rows ? copy_width(x_main, x.width)
                                 : 1;
    const T* grad_main = params.grad.data + (last ? 0 : params.grad.main);
    params.copy_grad = last         ? pixel_copy(grad_main, grad.channels)
                       : whole_rows ? copy_width(grad_main, grad.width)
                                    : 1;
    const auto places = reinterpret_cast<uintptr_t>(grad.data) |
                        reinterpret_cast<uintptr_t>(grad_x.data) |
                        static_cast<uintptr_t>(x.plane() * static_cast<int64_t>(sizeof(T)));
    params.unit = kSector;
    while (places % static_cast<uintptr_t>(params.unit) != 0) params.unit /= 2;
    // Of x only the convolution's channels are read.
    Buffer x_buffer = reads(x);
    x_buffer.read_bytes = x_buffer.read_bytes / x.channels * channels;
    const std::array buffers{reads(grad),
                             x_buffer,
                             constants(dw.weight, floats(9)),
                             constants(dw.scale, floats(1)),
                             constants(dw.shift, floats(1)),
                             writes(grad_x),
                             writes(workspace, sums_bytes)};
    config.grid_x = static_cast<uint32_t>(params.groups * params.parts);
    config.stream = stream;
    if (last) {
      launch(config, buffers, backward_kernel<T, kPassthrough, kStride, true>, params);
    } else {
      launch(config, buffers, backward_kernel<T, kPassthrough, kStride, false>, params);
    }
  }
  if (channels == 0) return;
  const std::array buffers{reads(workspace, sums_bytes),   constants(dw.weight, floats(9)),
                           constants(dw.scale, floats(1)), writes(grads.weight, floats(9)),
                           writes(grads.scale, floats(1)), writes(grads.shift, floats(1))};
  Launch finish;
  finish.grid_x = static_cast<uint32_t>(ceil_div(channels, kFinishChannels));
  finish.threads = kThreads;
  finish.shared_bytes = kFinishShared;
  finish.stream = stream;
  launch(finish, buffers, finish_kernel,
         FinishParams{workspace, dw.weight, dw.scale, grads, params.parts, channels});
}

}  // namespace

int64_t depthwise_backward_workspace(const FeatureMap& x, int64_t channels) {
  int64_t most = 0;
  with_type(x.dtype, [&](auto zero) {
    for (const int stride : {1, 2}) {
      Launch config;
      const auto params = params_of<decltype(zero)>(x, channels, stride, config);
      most = std::max(most, params.parts * kDepthwiseSums * sums_pitch(channels));
    }
  });
  return most;
}

void dw_conv3x3_backward(const FeatureMap& grad, const FeatureMap& x, const Depthwise3x3& dw,
                         const FeatureMap& grad_x, const Depthwise3x3Gradients& grads,
                         float* workspace, Stream stream) {
  check_dw_conv3x3(x, dw, grad);
  check_gradient_of(x, grad_x);
  with_type(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (dw.stride == 1) {
      launch_backward<false, 1, T>(grad, x, dw, grad_x, grads, workspace, stream);
    } else {
      launch_backward<false, 2, T>(grad, x, dw, grad_x, grads, workspace, stream);
    }
  });
}

void split_dw_cat_shuffle_backward(const FeatureMap& grad, const FeatureMap& x,
                                   const Depthwise3x3& dw, const FeatureMap& grad_x,
                                   const Depthwise3x3Gradients& grads, float* workspace,
                                   Stream stream) {
  check_split_dw_cat_shuffle(x, dw, grad);
  check_gradient_of(x, grad_x);
  with_type(x.dtype, [&](auto zero) {
    launch_backward<true, 1, decltype(zero)>(grad, x, dw, grad_x, grads, workspace, stream);
  });
}

}  // namespace snv2::SNV2_GPU
