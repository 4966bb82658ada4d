// Matrix product of gathered planes with packed weights.
//
// A tile holds P pixels x V vectors of outputs in registers. For each input plane it loads V
// vectors of weights, then broadcasts one input of each pixel: an input is addressed as
// x + offsets[k] + pixel * 16, so any gather of planes costs one load of an offset for each k,
// shared by P * V multiply-adds. Rows are cut into tiles of equal height (up to one pixel),
// because a short last tile leaves the multiplier idle.
//
// Bytes from L1 for each multiply-add: (V * 64 + P * 4) / (P * V), 11 at P = 7, V = 2.
#include "cpu/pointwise.h"

#include <algorithm>

namespace snv2::cpu::SNV2_ISA {
namespace {

// Sums that leave registers for the weights and one input, and the pixels of a tile.
#if defined(__AVX512F__)
constexpr int kAccumulators = 28;
constexpr int kPixels = 7;
#elif defined(__AVX2__)
constexpr int kAccumulators = 12;
constexpr int kPixels = 6;
#elif defined(__aarch64__)
constexpr int kAccumulators = 24;
constexpr int kPixels = 6;
#else
constexpr int kAccumulators = 12;  // the weights come from memory
constexpr int kPixels = 3;
#endif

// Sums over k run in as many chains as fit the registers, which hides the latency of the
// multiply-add in small tiles, and in blocks: both keep the rounding error of long sums small.
constexpr int64_t kChainLength = 128;

constexpr int chains_of(int sums) {
  const int fit = kAccumulators / sums;
  return fit >= 4 ? 4 : fit >= 2 ? 2 : 1;
}

constexpr int64_t depth_block(int sums) { return std::min(chains_of(sums), 2) * kChainLength; }

// Vectors of outputs: those of whole panels, then those of half a panel.
template <int kPanelCount, bool kHalf>
struct Outputs {
  static constexpr int kPanels = kPanelCount;
  static constexpr int kFull = (kPanels - kHalf) * kVecs;
  static constexpr int kCount = kFull + (kHalf ? kHalfVecs : 0);

  // Few taps, as the stem's, need no second chain.
  static constexpr int max_pixels(int x_stride) {
    const int most = x_stride < kPanel ? 2 * kPixels : kCount > 2 ? kPixels + 2 : kPixels;
    return std::min(most, kAccumulators / kCount);
  }

  // The place of vector v in a panelled array whose panels are `panel` floats apart.
  static constexpr int64_t at(int v, int64_t panel) {
    return v < kFull ? v / kVecs * panel + v % kVecs * kLanes
                     : kFull / kVecs * panel + (v - kFull) * kHalfLanes;
  }
};

// The sums of a tile, or one chain of them.
template <int kTilePixels, class O>
struct Sums {
  Vec full[kTilePixels][O::kFull + 1] = {};
  HalfVec half[kTilePixels][O::kCount - O::kFull + 1] = {};

  template <int p, int v>
  SNV2_INLINE auto& at() {
    if constexpr (v < O::kFull) {
      return full[p][v];
    } else {
      return half[p][v - O::kFull];
    }
  }

  // f(sum, pixel, vector) of each.
  template <class F>
  SNV2_INLINE void each(const F& f) {
    unroll<kTilePixels>([&](auto p) SNV2_INLINED {
      unroll<O::kCount>([&](auto v) SNV2_INLINED { f(at<p, v>(), p, v); });
    });
  }

  SNV2_INLINE void add(Sums& others) {
    each([&](auto& sum, auto p, auto v) SNV2_INLINED { sum += others.template at<p, v>(); });
  }
};

// Planes [begin, end) of a tile, from zero: with the bias in from the start, every rounding would
// be of its size.
template <int kTilePixels, class O, int kXStride>
SNV2_INLINE Sums<kTilePixels, O> sum_block(const TileRow& row, const float* x, int64_t begin,
                                           int64_t end) {
  constexpr int kChains = chains_of(kTilePixels * O::kCount);
  const int64_t weight_panel = (row.depth + 1) * kPanel;
  Sums<kTilePixels, O> chains[kChains];
  const auto multiply_add = [&](auto& sums, const float* w, int32_t offset) SNV2_INLINED {
    Sums<1, O> weights;
    weights.each([&](auto& weight, auto, auto v) SNV2_INLINED {
      weight = load<std::decay_t<decltype(weight)>>(w + O::at(v, weight_panel));
    });
    // The next group's weights come from L3 or memory, which is too far for one tile to hide.
    if constexpr (kXStride == kPanel) {
      unroll<O::kPanels>([&](auto panel) SNV2_INLINED {
        __builtin_prefetch(w + (O::kPanels + panel) * weight_panel, 0, 2);
      });
    }
    const float* xk = x + offset;
    unroll<kTilePixels>([&](auto p) SNV2_INLINED {
      const float value = xk[p * kXStride];
      unroll<O::kCount>([&](auto v) SNV2_INLINED {
        sums.template at<p, v>() += value * weights.template at<0, v>();
      });
    });
  };
  const float* w = row.weights + (begin + 1) * kPanel;
  const int32_t* offset = row.offsets + begin;
  const int32_t* const last = row.offsets + end;
#pragma GCC unroll 1
  for (; offset + kChains <= last; offset += kChains, w += kChains * kPanel) {
    unroll<kChains>([&](auto c)
                        SNV2_INLINED { multiply_add(chains[c], w + c * kPanel, offset[c]); });
  }
  if constexpr (kChains > 1) {
#pragma GCC unroll 1
    for (; offset < last; ++offset, w += kPanel) multiply_add(chains[0], w, *offset);
  }
  unroll<kChains - 1>([&](auto c) SNV2_INLINED { chains[0].add(chains[c + 1]); });
  return chains[0];
}

// Bias, activation and store of a tile whose first pixel is at y.
template <int kTilePixels, class O>
SNV2_INLINE void finish(const TileRow& row, Epilogue epilogue, Sums<kTilePixels, O>& sums,
                        float* y) {
  Sums<1, O> bias;
  bias.each([&](auto& b, auto, auto v) SNV2_INLINED {
    const float* at = row.weights + O::at(v, (row.depth + 1) * kPanel);
    b = load<std::decay_t<decltype(b)>>(at) + 0.0f;  // not -0, see relu
  });
  sums.each([&](auto& sum, auto, auto v) SNV2_INLINED { sum += bias.template at<0, v>(); });
  if (epilogue != Epilogue::kStore) {
    sums.each([&](auto& sum, auto, auto) SNV2_INLINED { sum = relu(sum); });
  }
  const int64_t y_panel = row.y_panel;
  if (epilogue == Epilogue::kSumRelu) {
    unroll<O::kCount>([&](auto v) SNV2_INLINED {
      auto& total = sums.template at<0, v>();
      unroll<kTilePixels - 1>([&](auto p) SNV2_INLINED { total += sums.template at<p + 1, v>(); });
      float* to = y + O::at(v, y_panel);
      store(to, total + load<std::decay_t<decltype(total)>>(to));
    });
    return;
  }
  sums.each([&](auto& sum, auto p, auto v) SNV2_INLINED {
    float* to = y + p * kPanel + O::at(v, y_panel);
    if constexpr (v < O::kFull) {
      store(to, sum);
    } else {
      store_half(to, sum);
    }
  });
}

// A tile whose sums, beside the chains of a block, do not fit the registers.
template <int kTilePixels, class O, int kXStride>
__attribute__((noinline)) void deep_tile(const TileRow& row, Epilogue epilogue, const float* x,
                                         float* y) {
  constexpr int64_t kBlock = depth_block(kTilePixels * O::kCount);
  auto sums = sum_block<kTilePixels, O, kXStride>(row, x, 0, kBlock);
  for (int64_t begin = kBlock; begin < row.depth; begin += kBlock) {
    const int64_t end = std::min(row.depth, begin + kBlock);
    auto block = sum_block<kTilePixels, O, kXStride>(row, x, begin, end);
    sums.add(block);
  }
  finish(row, epilogue, sums, y);
}

// `count` tiles, one after the other.
template <int kTilePixels, class O, int kXStride>
void tiles(const TileRow& row, Epilogue epilogue, int64_t first_pixel, int64_t count) {
  const int64_t y_step = epilogue == Epilogue::kSumRelu ? 0 : kPanel;
  const float* x = row.x + first_pixel * kXStride;
  float* y = row.y + first_pixel * y_step;
  for (int64_t i = 0; i < count; ++i, x += kTilePixels * kXStride, y += kTilePixels * y_step) {
    if (row.depth > depth_block(kTilePixels * O::kCount)) {
      deep_tile<kTilePixels, O, kXStride>(row, epilogue, x, y);
    } else {
      auto sums = sum_block<kTilePixels, O, kXStride>(row, x, 0, row.depth);
      finish(row, epilogue, sums, y);
    }
  }
}

using TilesFunction = void (*)(const TileRow&, Epilogue, int64_t, int64_t);

template <class O, int kXStride, int... kPixelsMinus1>
void run_tiles(const TileRow& row, Epilogue epilogue, int64_t pixels,
               std::integer_sequence<int, kPixelsMinus1...>) {
  static constexpr TilesFunction kTiles[] = {&tiles<kPixelsMinus1 + 1, O, kXStride>...};
  const int64_t count = ceil_div(pixels, sizeof...(kPixelsMinus1));
  const int64_t size = pixels / count, larger = pixels % count;
  if (larger > 0) kTiles[size](row, epilogue, 0, larger);
  kTiles[size - 1](row, epilogue, larger * (size + 1), count - larger);
}

template <int kPanels, bool kHalf>
void run_group(const TileRow& row, int64_t pixels, Epilogue epilogue, int x_stride) {
  using O = Outputs<kPanels, kHalf>;
  if (x_stride == 2) {
    return run_tiles<O, 2>(row, epilogue, pixels,
                           std::make_integer_sequence<int, O::max_pixels(2)>{});
  }
  run_tiles<O, kPanel>(row, epilogue, pixels,
                       std::make_integer_sequence<int, O::max_pixels(kPanel)>{});
}

}  // namespace

void tile_row(const TileRow& row, Group group, int64_t pixels, Epilogue epilogue, int x_stride) {
  if (pixels == 0) return;
  switch (group.halves()) {
    case 1:
      return run_group<1, true>(row, pixels, epilogue, x_stride);
    case 2:
      return run_group<1, false>(row, pixels, epilogue, x_stride);
#if defined(__AVX512F__)
    case 3:
      return run_group<2, true>(row, pixels, epilogue, x_stride);
    case 4:
      return run_group<2, false>(row, pixels, epilogue, x_stride);
    case 5:
      return run_group<3, true>(row, pixels, epilogue, x_stride);
    case 6:
      return run_group<3, false>(row, pixels, epilogue, x_stride);
#endif
    default:
      __builtin_unreachable();
  }
}

void pointwise(const Pointwise& op, bool relu, Range panels, Range pixels) {
  const Epilogue epilogue = relu ? Epilogue::kStoreRelu : Epilogue::kStore;
  for_groups(panels, op.outputs, [&](int64_t panel, Group group) {
    const TileRow row{op.x + pixels.begin * kPanel,
                      op.offsets,
                      op.depth,
                      op.weights + panel * (op.depth + 1) * kPanel,
                      op.y + panel * op.y_panel + pixels.begin * kPanel,
                      op.y_panel};
    tile_row(row, group, pixels.size(), epilogue, kPanel);
  });
}

void pointwise_mean(const Pointwise& op, Range panels) {
  const float scale = 1.0f / static_cast<float>(op.pixels);
  for_groups(panels, op.outputs, [&](int64_t panel, Group group) {
    float* const y = op.y + panel * op.y_panel;
    for (int64_t g = 0; g < group.panels; ++g) {
      for (int64_t i = 0; i < kPanel; ++i) y[g * op.y_panel + i] = 0.0f;
    }
    const TileRow row{op.x, op.offsets, op.depth, op.weights + panel * (op.depth + 1) * kPanel,
                      y,    op.y_panel};
    tile_row(row, group, op.pixels, Epilogue::kSumRelu, kPanel);
    for (int64_t g = 0; g < group.panels; ++g) {
      for (int64_t i = 0; i < kPanel; ++i) y[g * op.y_panel + i] *= scale;
    }
  });
}

}  // namespace snv2::cpu::SNV2_ISA
