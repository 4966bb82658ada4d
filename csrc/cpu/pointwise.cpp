// Matrix product of gathered planes with packed weights.
//
// A tile holds P pixels x G panels of 16 outputs in registers. For each input plane it loads G
// panels of weights, then broadcasts one input of each pixel: an input is addressed as
// x + offsets[k] + pixel * 16, so any gather of planes costs one load of an offset for each k,
// shared by P * G * 16 multiply-adds. Rows are cut into tiles of equal height (up to one pixel),
// because a short last tile leaves the multiplier idle.
//
// Bytes for each multiply-add vector: (G * 64 + P * 4) / (P * G), 13 at P = 7, G = 2, from L1.
#include "cpu/pointwise.h"

#include <utility>

namespace snv2::cpu::SNV2_ISA {
namespace {

// Sums over k run in as many chains as fit the registers, which hides the latency of the
// multiply-add in small tiles, and in blocks: both keep the rounding error of long sums small.
constexpr int64_t kDepthBlock = 128;

constexpr int chains_of(int pixels, int panels) {
  const int fit = kAccumulators / (pixels * panels * kVecs);
  return fit >= 4 ? 4 : fit >= 2 ? 2 : 1;
}

template <int kPixels, int kPanels, int kXStride, Epilogue kEpilogue>
void tile(const TileRow& row, int64_t first_pixel) {
  constexpr int kWide = kPanels * kVecs;
  constexpr int kChains = chains_of(kPixels, kPanels);
  const int64_t depth = row.depth;
  const int64_t weight_panel = (depth + 1) * kPanel;
  const float* x = row.x + first_pixel * kXStride;
  const int32_t* offsets = row.offsets;
  const auto panel_vec = [&](const float* panels, int v) {
    return load(panels + (v / kVecs) * weight_panel + (v % kVecs) * kLanes);
  };

  // Multiply-add, from zero: with the bias in from the start, every rounding would be of its size
  const float* w = row.weights + kPanel;
  const auto multiply_add = [&](Vec(&sum)[kPixels][kWide], int64_t k) {
    Vec weight[kWide];
    for (int v = 0; v < kWide; ++v) weight[v] = panel_vec(w + k * kPanel, v);
    const float* xk = x + offsets[k];
#pragma GCC unroll 16
    for (int p = 0; p < kPixels; ++p) {
      const float value = xk[p * kXStride];
#pragma GCC unroll 8
      for (int v = 0; v < kWide; ++v) sum[p][v] += value * weight[v];
    }
  };
  Vec acc[kPixels][kWide] = {};
  for (int64_t begin = 0; begin < depth; begin += kDepthBlock) {
    const int64_t end = begin + kDepthBlock < depth ? begin + kDepthBlock : depth;
    Vec chain[kChains][kPixels][kWide] = {};
    int64_t k = begin;
#pragma GCC unroll 1
    for (; k + kChains <= end; k += kChains) {
#pragma GCC unroll 4
      for (int c = 0; c < kChains; ++c) multiply_add(chain[c], k + c);
    }
    if constexpr (kChains > 1) {
      for (; k < end; ++k) multiply_add(chain[0], k);
    }
    for (int c = 0; c < kChains; ++c) {
      for (int p = 0; p < kPixels; ++p) {
        for (int v = 0; v < kWide; ++v) acc[p][v] += chain[c][p][v];
      }
    }
  }

  // Bias
  for (int v = 0; v < kWide; ++v) {
    const Vec bias = panel_vec(row.weights, v);
    for (int p = 0; p < kPixels; ++p) acc[p][v] += bias;
  }

  // Store
  if constexpr (kEpilogue == Epilogue::kSumRelu) {
    for (int v = 0; v < kWide; ++v) {
      float* y = row.y + (v / kVecs) * row.y_panel + (v % kVecs) * kLanes;
      Vec sum = load(y);
      for (int p = 0; p < kPixels; ++p) sum += relu(acc[p][v]);
      store(y, sum);
    }
  } else {
    float* y = row.y + first_pixel * kPanel;
    for (int p = 0; p < kPixels; ++p) {
      for (int v = 0; v < kWide; ++v) {
        const Vec value = kEpilogue == Epilogue::kStoreRelu ? relu(acc[p][v]) : acc[p][v];
        store(y + p * kPanel + (v / kVecs) * row.y_panel + (v % kVecs) * kLanes, value);
      }
    }
  }
}

using TileFunction = void (*)(const TileRow&, int64_t);

// Tiles of 1 to kLimit pixels.
template <int kLimit>
struct TileTable {
  TileFunction of_pixels[kLimit];
};

template <int kPanels, int kXStride, Epilogue kEpilogue, int... kPixelsMinus1>
constexpr TileTable<sizeof...(kPixelsMinus1)> make_tiles(
    std::integer_sequence<int, kPixelsMinus1...>) {
  return {{&tile<kPixelsMinus1 + 1, kPanels, kXStride, kEpilogue>...}};
}

template <int kPanels, int kLimit, int kXStride, Epilogue kEpilogue>
void run_tiles(const TileRow& row, int64_t pixels) {
  static constexpr auto kTiles =
      make_tiles<kPanels, kXStride, kEpilogue>(std::make_integer_sequence<int, kLimit>());
  const int64_t count = ceil_div(pixels, kLimit);
  for (int64_t i = 0; i < count; ++i) {
    const Range range = part_of(pixels, count, i);
    kTiles.of_pixels[range.size() - 1](row, range.begin);
  }
}

template <int kXStride, Epilogue kEpilogue>
void run_group(const TileRow& row, int64_t panels, int64_t pixels) {
  if constexpr (kMaxPixels3 > 0) {
    if (panels == 3) return run_tiles<3, kMaxPixels3, kXStride, kEpilogue>(row, pixels);
  }
  if constexpr (kMaxPanels > 1) {
    if (panels == 2) return run_tiles<2, kMaxPixels, kXStride, kEpilogue>(row, pixels);
  }
  run_tiles<1, kMaxPixels, kXStride, kEpilogue>(row, pixels);
}

// Weights of one group stay in L1 while all pixels pass by.
template <class F>
void for_groups(const Pointwise& op, Range panels, const F& f) {
  TileRow row{op.x, op.offsets, op.depth, nullptr, nullptr, op.y_panel};
  for (int64_t panel = panels.begin; panel < panels.end;) {
    const int64_t group = panel_group(panels.end - panel);
    row.weights = op.weights + panel * (op.depth + 1) * kPanel;
    row.y = op.y + panel * op.y_panel;
    f(row, group);
    panel += group;
  }
}

}  // namespace

void tile_row(const TileRow& row, int64_t panels, int64_t pixels, Epilogue epilogue, int x_stride) {
  if (x_stride == 2) return run_group<2, Epilogue::kStoreRelu>(row, panels, pixels);
  switch (epilogue) {
    case Epilogue::kStore:
      return run_group<kPanel, Epilogue::kStore>(row, panels, pixels);
    case Epilogue::kStoreRelu:
      return run_group<kPanel, Epilogue::kStoreRelu>(row, panels, pixels);
    case Epilogue::kSumRelu:
      return run_group<kPanel, Epilogue::kSumRelu>(row, panels, pixels);
  }
}

void pointwise(const Pointwise& op, bool relu, Range panels, Range pixels) {
  const Epilogue epilogue = relu ? Epilogue::kStoreRelu : Epilogue::kStore;
  for_groups(op, panels, [&](TileRow& row, int64_t group) {
    row.x = op.x + pixels.begin * kPanel;
    row.y += pixels.begin * kPanel;
    tile_row(row, group, pixels.size(), epilogue, kPanel);
  });
}

void pointwise_mean(const Pointwise& op, Range panels) {
  const float scale = 1.0f / static_cast<float>(op.pixels);
  for_groups(op, panels, [&](TileRow& row, int64_t group) {
    for (int64_t g = 0; g < group; ++g) {
      for (int64_t i = 0; i < kPanel; ++i) row.y[g * op.y_panel + i] = 0.0f;
    }
    tile_row(row, group, op.pixels, Epilogue::kSumRelu, kPanel);
    for (int64_t g = 0; g < group; ++g) {
      for (int64_t i = 0; i < kPanel; ++i) row.y[g * op.y_panel + i] *= scale;
    }
  });
}

}  // namespace snv2::cpu::SNV2_ISA
