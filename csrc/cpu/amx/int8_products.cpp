// The products of networks of integers, in tiles.
#include "cpu/amx/int8_results.h"
#include "cpu/amx/kernels.h"

namespace snv2::cpu::SNV2_ISA::int8 {
namespace {

// Puts all results; to(panel) says where those of a panel go.
template <class Out, class To>
void product(const Pointwise<UInt8, Out>& op, Range panels, Range pixels, const To& to) {
  const int64_t weight_panel = packed_panel(op.depth);
  for_tiles(op, kRowsBefore, panels, pixels,
            [&](const float* sums, int64_t panel, int64_t group, int64_t first, int64_t count) {
              put_tile(sums, group, first, count, op.weights + panel * weight_panel, op.depth,
                       [&](int64_t g) SNV2_INLINED { return to(panel + g); });
            });
}

}  // namespace

void pointwise(const Pointwise<UInt8, UInt8>& op, Range panels, Range pixels) {
  if (pixels.size() == 0) return;
  if (op.depth > kMaxTileDepth) return avx512_vnni::kInt8Kernels.pointwise(op, panels, pixels);
  product(op, panels, pixels, [&](int64_t panel) SNV2_INLINED {
    return ToMap{bytes(op.y) + panel * op.y_panel, op.y_panel};
  });
}

void linear(const Pointwise<UInt8, float>& op, Range panels, Range pixels) {
  if (pixels.size() == 0) return;
  if (op.depth > kMaxTileDepth) return avx512_vnni::kInt8Kernels.linear(op, panels, pixels);
  product(op, panels, pixels, [&](int64_t panel) SNV2_INLINED {
    return ToFloats{op.y + panel * op.y_panel, op.y_panel};
  });
}

void pointwise_mean(const Pointwise<UInt8, UInt8>& op, Range panels) {
  if (op.depth > kMaxTileDepth) return avx512_vnni::kInt8Kernels.pointwise_mean(op, panels);
  const float scale = 1.0f / static_cast<float>(op.pixels);
  constexpr int64_t kSummedPanels = 64;  // at a time
  alignas(64) float totals[kSummedPanels * kPanel];
  for (int64_t begin = panels.begin; begin < panels.end; begin += kSummedPanels) {
    const Range taken{begin, std::min(begin + kSummedPanels, panels.end)};
    std::fill(totals, totals + taken.size() * kPanel, 0.0f);
    product(op, taken, {0, op.pixels}, [&](int64_t panel) SNV2_INLINED {
      return ToSums{totals + (panel - begin) * kPanel, kPanel};
    });
    for (int64_t panel = taken.begin; panel < taken.end; ++panel) {
      const Vec means[kQuad] = {load(totals + (panel - begin) * kPanel) * scale};
      store_pixels(bytes(op.y) + panel * op.y_panel, means, 1);
    }
  }
}

}  // namespace snv2::cpu::SNV2_ISA::int8
