// The gradients of the depthwise ops as loops in double, for the tests of all kernels.
#pragma once

#include <cstddef>
#include <vector>

#include "snv2/types.h"

// Of a convolution of `channels` on planes of height x width.
struct GradientLoops {
  std::vector<double> x, weight, scale, shift;  // grad_x is [N, C, H, W]

  // at(n, c, y, x) and grad(n, c, y, x) are of the convolution's own channels.
  template <class At, class Grad>
  GradientLoops(int64_t batch, int64_t channels, int64_t height, int64_t width,
                const snv2::Depthwise3x3& dw, const At& at, const Grad& grad)
      : x(static_cast<size_t>(batch * channels * height * width)),
        weight(static_cast<size_t>(9 * channels)),
        scale(static_cast<size_t>(channels)),
        shift(static_cast<size_t>(channels)) {
    for (int64_t i = 0; i < batch * channels; ++i) {
      const int64_t n = i / channels, c = i % channels;
      for (int64_t y = 0; y < snv2::conv3x3_extent(height, dw.stride); ++y) {
        for (int64_t z = 0; z < snv2::conv3x3_extent(width, dw.stride); ++z) {
          const auto for_each_tap = [&](const auto& f) {
            for (int64_t tap = 0; tap < 9; ++tap) {
              const int64_t row = y * dw.stride + tap / 3 - 1, column = z * dw.stride + tap % 3 - 1;
              if (row < 0 || row >= height || column < 0 || column >= width) continue;
              f(static_cast<size_t>(c * 9 + tap), row, column);
            }
          };
          double sum = 0;
          for_each_tap([&](size_t tap, int64_t row, int64_t column) {
            sum += double{dw.weight[tap]} * at(n, c, row, column);
          });
          const double g = dw.relu && sum * dw.scale[c] + dw.shift[c] <= 0 ? 0 : grad(n, c, y, z);
          scale[static_cast<size_t>(c)] += g * sum;
          shift[static_cast<size_t>(c)] += g;
          for_each_tap([&](size_t tap, int64_t row, int64_t column) {
            weight[tap] += g * dw.scale[c] * at(n, c, row, column);
            x[static_cast<size_t>((i * height + row) * width + column)] +=
                g * dw.scale[c] * dw.weight[tap];
          });
        }
      }
    }
  }
};
