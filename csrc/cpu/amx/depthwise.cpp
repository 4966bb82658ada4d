// Depthwise convolutions behind the first product of a unit, which is made in tiles.
#include "cpu/amx/kernels.h"
#include "cpu/amx/results.h"
#include "cpu/amx/tiles.h"
#include "cpu/depthwise_ring.h"

namespace snv2::cpu::SNV2_ISA {

void expand_depthwise(const ExpandDepthwise<Element>& op, Range panels, Range out_rows,
                      float* scratch) {
  const DepthwiseShape& shape = op.dw.shape;
  const int64_t width = shape.width, reach = shape.reach();
  // Rows that the results read.
  const Range rows{std::max<int64_t>(0, out_rows.begin * shape.stride - reach),
                   std::min(shape.height, (out_rows.end - 1) * shape.stride + reach + 1)};
  const Cut cut(width);
  const int64_t row_tiles = cut.count * cut.pixels;  // pixels of a row, with those of a last tile
  const auto fits = [&](int64_t depth) {
    return row_tiles * gathered_stride(depth) <= kGatheredBytes;
  };
  const ExpandDepthwise<Element>& whole = op;
  bool all_fit = out_rows.size() > 0 && fits(op.pw1.depth);
  for (int64_t i = 0; i < op.pw1.block_count; ++i) {
    all_fit = (i > 0 ? all_fit : out_rows.size() > 0) && fits(op.pw1.blocks[i].depth);
  }
  if (!all_fit) {
    return avx512_bf16::kMapKernels.expand_depthwise(whole, panels, out_rows, scratch);
  }
  alignas(64) char x[kGatheredBytes];
  alignas(64) float sums[kTilePanels * kTileFloats];
  with_window(shape, [&](auto window) {
    for_blocks(
        op.pw1, panels, [&](const Pointwise<Element, float>& pw1, Range taken, int64_t first) {
          const int64_t stride = gathered_stride(pw1.depth),
                        weight_panel = (pw1.depth + 1) * kPanel;
          const Tiles tiles(cut.pixels, pw1.depth);
          // All rows at once, if there is room, else each for each group of panels.
          const bool at_once = (rows.size() * width + row_tiles) * stride <= kGatheredBytes;
          const auto gather_rows = [&](int64_t row, int64_t count) {
            gather(pw1.x + row * width * kPanel, pw1.offsets, pw1.depth, count * width, x, stride);
          };
          if (at_once) gather_rows(rows.begin, rows.size());
          for_tile_groups(taken, [&](int64_t panel, int64_t group) {
            const float* const weights = pw1.weights + panel * weight_panel;
            const Act act = pw1.act.from_panel(panel);
            roll_rows<window>(
                op.dw, first + panel, group, out_rows, scratch,
                [&](int64_t row, float* out, int64_t pitch) {
                  if (!at_once) gather_rows(row, 1);
                  const char* const from = at_once ? x + (row - rows.begin) * width * stride : x;
                  for (int64_t p = 0; p < width; p += cut.pixels) {
                    tile_product<Element>(group, {from + p * stride, stride, pw1.depth},
                                          weights + kPanel, weight_panel, sums);
                    finish_tile(sums, group, std::min(cut.pixels, width - p), weights, weight_panel,
                                act, nullptr, out + p * kPanel, pitch);
                  }
                });
          });
        });
  });
}

}  // namespace snv2::cpu::SNV2_ISA
