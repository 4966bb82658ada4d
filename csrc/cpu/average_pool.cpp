// Average of 3x3 pixels on panels, as it stands beside a unit's branch in ShuffleNet v1.
//
// Pixels are added row by row and the sum is divided once, as in PyTorch.
#include <algorithm>

#include "cpu/activation.h"

namespace snv2::cpu::SNV2_ISA {
namespace {

constexpr int64_t kStrip = 64;  // pixels of a row between the sums and their activation

}  // namespace

void average_pool(const AveragePool<Element>& op, Range panels, Range out_rows) {
  const DepthwiseShape& shape = op.shape;
  const int64_t width = shape.width, out_width = shape.out_width();
  float averages[kStrip * kPanel];
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    const Element* const x = op.x + op.panels[panel] * shape.height * width * kPanel;
    Element* const y = op.y + panel * shape.out_height() * out_width * kPanel;
    const Act act = op.act.from_panel(panel);
    for (int64_t row = out_rows.begin; row < out_rows.end; ++row) {
      const int64_t top = std::max<int64_t>(0, row * shape.stride - 1);
      const int64_t bottom = std::min(shape.height, row * shape.stride + 2);
      for (int64_t begin = 0; begin < out_width; begin += kStrip) {
        const int64_t count = std::min(kStrip, out_width - begin);
        for (int64_t i = 0; i < count; ++i) {
          const int64_t centre = (begin + i) * shape.stride;
          const int64_t left = std::max<int64_t>(0, centre - 1);
          const int64_t right = std::min(width, centre + 2);
          const int64_t pixels = op.inside ? (bottom - top) * (right - left) : 9;
          const bool whole = bottom - top == 3 && right - left == 3;
          for (int64_t lane = 0; lane < kPanel; lane += kLanes) {
            const Element* const first = x + (top * width + left) * kPanel + lane;
            const auto at = [&](int64_t row, int64_t column) SNV2_INLINED {
              return load(first + (row * width + column) * kPanel);
            };
            Vec sum = {};
            if (whole) {
              unroll<3>([&](auto row) SNV2_INLINED {
                unroll<3>([&](auto column) SNV2_INLINED { sum += at(row, column); });
              });
            } else {
              for (int64_t row = 0; row < bottom - top; ++row) {
                for (int64_t column = 0; column < right - left; ++column) sum += at(row, column);
              }
            }
            store(averages + i * kPanel + lane, sum / static_cast<float>(pixels));
          }
        }
        activate(act, 1, averages, 0, count, y + (row * out_width + begin) * kPanel, 0);
      }
    }
  }
}

}  // namespace snv2::cpu::SNV2_ISA
