// What follows a layer. A kernel is compiled for ReLU after its products and nothing after its
// depthwise convolutions, which is what nearly all networks have, and once more for anything: there
// the kind of each layer is looked up when the kernel runs. The two are the classes that kernels
// are templates of. One kernel for each combination of kinds would be hundreds.
#pragma once

#include <cstdint>

#include "cuda/isa.h"

namespace snv2::SNV2_GPU {

struct Relu {
  static constexpr bool kAny = false;
  SNV2_DEVICE static float apply(float x) { return relu(x); }
};
// activate() and activated() have been there before.
struct AnyActivation {
  static constexpr bool kAny = true;
  SNV2_DEVICE static float apply(float done) { return done; }
};

// A layer's activation: one of GpuActivation's kinds.
struct After {
  Activation kind;
  const float* slopes;  // kPrelu: [rows]
};

// x / (1 + exp(-x)) without an exponential that overflows.
SNV2_DEVICE float silu(float x) {
  const float e = exponential(x < 0.0f ? x : -x);
  return (x < 0.0f ? x * e : x) * reciprocal(1.0f + e);
}
SNV2_DEVICE float relu6(float x) { return x > 6.0f ? 6.0f : relu(x); }

SNV2_DEVICE float sigmoid(float x) {
  const float e = exponential(x < 0.0f ? x : -x);
  return (x < 0.0f ? e : 1.0f) * reciprocal(1.0f + e);
}
SNV2_DEVICE float hardsigmoid(float x) { return relu6(x + 3.0f) * (1.0f / 6.0f); }
SNV2_DEVICE float hardswish(float x) { return x * hardsigmoid(x); }

// Calls f(activation), a function of x and the slope of its row.
template <class F>
SNV2_DEVICE void with_activation(Activation kind, const F& f) {
  switch (kind) {
    case Activation::kRelu:
      return f([](float x, float) { return relu(x); });
    case Activation::kRelu6:
      return f([](float x, float) { return relu6(x); });
    case Activation::kPrelu:
      return f([](float x, float slope) { return x > 0.0f ? x : x * slope; });
    case Activation::kSilu:
      return f([](float x, float) { return silu(x); });
    case Activation::kHardswish:
      return f([](float x, float) { return hardswish(x); });
    default:
      return f([](float x, float) { return x; });
  }
}

SNV2_DEVICE float activated(Activation kind, float x, float slope) {
  float y = x;
  with_activation(kind, [&](const auto& act) { y = act(x, slope); });
  return y;
}

// The slope of a row, if there are slopes.
SNV2_DEVICE float slope_of(const After& after, int row) {
  return after.kind == Activation::kPrelu ? load(Global<const float>{after.slopes} + row) : 0.0f;
}

// A warp's results (mma.h) with their activation, in place: one look at the kind for all.
template <class Act, int kTiles, int kBlocks>
SNV2_DEVICE void activate(float (&acc)[kTiles][kBlocks][4], const After& after, int rows,
                          int tile) {
  if constexpr (Act::kAny) {
    with_activation(after.kind, [&](const auto& act) {
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i) {
        const int row = tile * 16 + i * 8 + static_cast<int>(threadIdx.x) % kWarp / 4;
        const float slope = row < rows ? slope_of(after, row) : 0.0f;
#pragma unroll
        for (int j = 0; j < kBlocks; ++j) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            float& value = acc[i / 2][j][i % 2 * 2 + c];
            value = act(value, slope);
          }
        }
      }
    });
  }
}

}  // namespace snv2::SNV2_GPU
