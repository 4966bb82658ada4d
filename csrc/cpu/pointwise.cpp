// The products of networks, on the tile of tile.h.
#include <algorithm>
#include <iterator>

#include "cpu/activation.h"
#include "cpu/tile.h"

namespace snv2::cpu::SNV2_ISA {
namespace {

// Pixels between a product and the pass of its activation: whole tiles, of which L1 holds all
// panels of a group.
constexpr int64_t kPassPixels = 42;

// f(first, count) of the chunks of a range of pixels.
template <class F>
SNV2_INLINE void for_chunks(Range pixels, const F& f) {
  for (int64_t first = pixels.begin; first < pixels.end; first += kPassPixels) {
    f(first, std::min(kPassPixels, pixels.end - first));
  }
}

template <class Out>
TileRow<Element, Out> row_of(const Pointwise<Element, Out>& op, int64_t panel, int64_t pixel) {
  TileRow<Element, Out> row{op.x + pixel * kPanel,
                            op.offsets,
                            op.depth,
                            op.weights + panel * (op.depth + 1) * kPanel,
                            op.y + panel * op.y_panel + pixel * kPanel,
                            op.y_panel};
  if (op.added != nullptr) {
    const int64_t panels = std::min(kMaxPanelGroup, panels_of(op.outputs) - panel);
    for (int64_t i = 0; i < panels; ++i) {
      row.added[i] = op.map + (op.added[panel + i] * op.pixels + pixel) * kPanel;
    }
  }
  return row;
}

// The same row with its result in floats elsewhere.
template <class Out>
TileRow<Element, float> raw_row_of(const Pointwise<Element, Out>& op, int64_t panel, int64_t pixel,
                                   float* raw) {
  const TileRow<Element, Out> row = row_of(op, panel, pixel);
  TileRow<Element, float> result{row.x,       row.offsets, row.depth,
                                 row.weights, raw,         kPassPixels * kPanel};
  std::copy(std::begin(row.added), std::end(row.added), result.added);
  return result;
}

template <class Out>
void block_product(const Pointwise<Element, Out>& op, Range panels, Range pixels) {
  if (!is_pass(op.act.kind)) {
    const Epilogue epilogue =
        op.act.kind == Activation::kRelu ? Epilogue::kStoreRelu : Epilogue::kStore;
    for_groups(panels, op.outputs, [&](int64_t panel, Group group) {
      tile_row<kPanel>(row_of(op, panel, pixels.begin), group, pixels.size(), epilogue);
    });
    return;
  }
  float raw[kMaxPanelGroup * kPassPixels * kPanel];
  for_groups(panels, op.outputs, [&](int64_t panel, Group group) {
    const Act act = op.act.from_panel(panel);
    for_chunks(pixels, [&](int64_t first, int64_t count) {
      const TileRow<Element, float> row = raw_row_of(op, panel, first, raw);
      tile_row<kPanel>(row, group, count, Epilogue::kStore);
      activate(act, group.panels, raw, row.y_panel, count, row_of(op, panel, first).y, op.y_panel);
    });
  });
}

template <class Out>
void product(const Pointwise<Element, Out>& op, Range panels, Range pixels) {
  for_blocks(op, panels, [&](const Pointwise<Element, Out>& block, Range taken, int64_t) {
    block_product(block, taken, pixels);
  });
}

}  // namespace

// For depthwise.cpp.
template void tile_row<kPanel>(const TileRow<Element, float>&, Group, int64_t, Epilogue);

void pointwise(const Pointwise<Element, Element>& op, Range panels, Range pixels) {
  product(op, panels, pixels);
}

void linear(const Pointwise<Element, float>& op, Range panels, Range pixels) {
  product(op, panels, pixels);
}

void pointwise_mean(const Pointwise<Element, Element>& op, Range panels) {
  const float scale = 1.0f / static_cast<float>(op.pixels);
  float raw[kMaxPanelGroup * kPassPixels * kPanel];
  for_groups(panels, op.outputs, [&](int64_t panel, Group group) {
    float sums[kMaxPanelGroup * kPanel] = {};
    if (op.act.kind == Activation::kRelu) {
      TileRow<Element, float> row = raw_row_of(op, panel, 0, sums);
      row.y_panel = kPanel;
      tile_row<kPanel>(row, group, op.pixels, Epilogue::kSumRelu);
    } else {
      const Act act = op.act.from_panel(panel);
      for_chunks({0, op.pixels}, [&](int64_t first, int64_t count) {
        const TileRow<Element, float> row = raw_row_of(op, panel, first, raw);
        activated_row<kPanel>(row, group, count, act);
        for (int64_t g = 0; g < group.panels; ++g) {
          for (int64_t i = 0; i < kPanel; i += kLanes) {
            Vec sum = {};
            for (int64_t p = 0; p < count; ++p) sum += load(raw + g * row.y_panel + p * kPanel + i);
            float* const to = sums + g * kPanel + i;
            store(to, load(to) + sum);
          }
        }
      });
    }
    for (int64_t g = 0; g < group.panels; ++g) {
      Element* const y = op.y + (panel + g) * op.y_panel;
      for (int64_t i = 0; i < kPanel; i += kLanes) {
        store(y + i, load(sums + g * kPanel + i) * scale);
      }
    }
  });
}

}  // namespace snv2::cpu::SNV2_ISA
