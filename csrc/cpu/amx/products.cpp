// The products of networks in bfloat16, in tiles.
#include "cpu/amx/kernels.h"
#include "cpu/amx/results.h"
#include "cpu/amx/tiles.h"

namespace snv2::cpu::SNV2_ISA {
namespace {

template <class Out>
void block_product(const Pointwise<Element, Out>& op, Range panels, Range pixels) {
  const int64_t weight_panel = (op.depth + 1) * kPanel;
  for_tiles(op, 1, panels, pixels,
            [&](float* sums, int64_t panel, int64_t group, int64_t first, int64_t count) {
              const Element* added[kTilePanels];
              for (int64_t g = 0; op.added != nullptr && g < group; ++g) {
                added[g] = op.map + (op.added[panel + g] * op.pixels + first) * kPanel;
              }
              finish_tile(sums, group, count, op.weights + panel * weight_panel, weight_panel,
                          op.act.from_panel(panel), op.added != nullptr ? added : nullptr,
                          op.y + panel * op.y_panel + first * kPanel, op.y_panel);
            });
}

template <class Out>
bool fits_tiles(const Pointwise<Element, Out>& op) {
  if (op.block_count == 0) return op.depth <= kMaxTileDepth;
  return std::all_of(op.blocks, op.blocks + op.block_count,
                     [](const Block& block) { return block.depth <= kMaxTileDepth; });
}

template <class Out>
void product(const Pointwise<Element, Out>& op, Range panels, Range pixels) {
  for_blocks(op, panels, [&](const Pointwise<Element, Out>& block, Range taken, int64_t) {
    block_product(block, taken, pixels);
  });
}

}  // namespace

void pointwise(const Pointwise<Element, Element>& op, Range panels, Range pixels) {
  if (pixels.size() == 0) return;
  if (!fits_tiles(op)) return avx512_bf16::kMapKernels.pointwise(op, panels, pixels);
  product(op, panels, pixels);
}

void linear(const Pointwise<Element, float>& op, Range panels, Range pixels) {
  if (pixels.size() == 0) return;
  if (!fits_tiles(op)) return avx512_bf16::kMapKernels.linear(op, panels, pixels);
  product(op, panels, pixels);
}

void pointwise_mean(const Pointwise<Element, Element>& op, Range panels) {
  if (!fits_tiles(op)) return avx512_bf16::kMapKernels.pointwise_mean(op, panels);
  const float scale = 1.0f / static_cast<float>(op.pixels);
  const int64_t weight_panel = (op.depth + 1) * kPanel;
  constexpr int64_t kSummedPanels = 64;  // at a time
  alignas(64) float totals[kSummedPanels * kPanel];
  for (int64_t begin = panels.begin; begin < panels.end; begin += kSummedPanels) {
    const Range taken{begin, std::min(begin + kSummedPanels, panels.end)};
    std::fill(totals, totals + taken.size() * kPanel, 0.0f);
    for_tiles(op, 1, taken, {0, op.pixels},
              [&](float* sums, int64_t panel, int64_t group, int64_t, int64_t count) {
                finish_tile(sums, group, count, op.weights + panel * weight_panel, weight_panel,
                            op.act.from_panel(panel), nullptr, sums, kTileFloats);
                for (int64_t g = 0; g < group; ++g) {
                  Vec sum = {};
                  for (int64_t p = 0; p < count; ++p) {
                    sum += load(sums + g * kTileFloats + p * kPanel);
                  }
                  float* const total = totals + (panel + g - taken.begin) * kPanel;
                  store(total, load(total) + sum);
                }
              });
    for (int64_t panel = taken.begin; panel < taken.end; ++panel) {
      store(op.y + panel * op.y_panel, load(totals + (panel - taken.begin) * kPanel) * scale);
    }
  }
}

}  // namespace snv2::cpu::SNV2_ISA
