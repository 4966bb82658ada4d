// The products of networks of integers.
#include "cpu/int8/products.h"

#include <algorithm>

#include "cpu/int8/kernels.h"

namespace snv2::cpu::SNV2_ISA::int8 {

void pointwise(const Pointwise<UInt8, UInt8>& op, Range panels, Range pixels) {
  product<kPanel>(
      Factors(op), panels, bytes(op.x) + pixels.begin * kPanel, pixels.size(), [&](int64_t panel) {
        return ToMap{bytes(op.y) + panel * op.y_panel + pixels.begin * kPanel, op.y_panel};
      });
}

void linear(const Pointwise<UInt8, float>& op, Range panels, Range pixels) {
  gathered_product<kPanel>(
      Factors(op), panels, bytes(op.x) + pixels.begin * kPanel, pixels.size(), [&](int64_t panel) {
        return ToFloats{op.y + panel * op.y_panel + pixels.begin * kPanel, op.y_panel};
      });
}

void pointwise_mean(const Pointwise<UInt8, UInt8>& op, Range panels) {
  constexpr int64_t kTogether = 12;  // panels, whose sums lie on the stack
  const float scale = 1.0f / static_cast<float>(op.pixels);
  for (int64_t first = panels.begin; first < panels.end; first += kTogether) {
    const Range taken{first, std::min(first + kTogether, panels.end)};
    float sums[kTogether * kPanel] = {};
    product<kPanel>(Factors(op), taken, bytes(op.x), op.pixels,
                    [&](int64_t panel) { return ToSums{sums + (panel - first) * kPanel, kPanel}; });
    for (int64_t panel = taken.begin; panel < taken.end; ++panel) {
      for (int64_t lane = 0; lane < kPanel; lane += kLanes) {
        const Vec means[kQuad] = {load(sums + (panel - first) * kPanel + lane) * scale};
        store_pixels(bytes(op.y) + panel * op.y_panel + lane, means, 1);
      }
    }
  }
}

}  // namespace snv2::cpu::SNV2_ISA::int8
