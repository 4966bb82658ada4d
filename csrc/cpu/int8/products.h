// Products of rows of pixels with a layer's panels: tiles of bytes, or of factors that are widened
// first where no instruction multiplies bytes.
#pragma once

#include "cpu/int8/tile.h"

#if !defined(SNV2_DOTS_OF_BYTES)
#include "cpu/int8/wide.h"
#endif

namespace snv2::cpu::SNV2_ISA::int8 {

// What a layer multiplies its words with.
struct Factors {
  const float* weights;
  const int32_t* offsets;
  int64_t depth;
  int64_t outputs;

  template <class Out>
  explicit Factors(const Pointwise<UInt8, Out>& op)
      : Factors(op.weights, op.offsets, op.depth, op.outputs) {}
  Factors(const float* weights, const int32_t* offsets, int64_t depth, int64_t outputs)
      : weights(weights), offsets(offsets), depth(depth), outputs(outputs) {}

  Row row(int64_t panel, const uint8_t* x) const {
    return row_of(weights, panel, offsets, depth, x);
  }
};

// Outputs of all panels for `pixels` pixels of x, which are kXStride bytes apart; to_of(panel) says
// where a panel's go, and those of the ones behind it.
template <int kXStride, class F>
void gathered_product(const Factors& factors, Range panels, const uint8_t* x, int64_t pixels,
                      const F& to_of) {
  for_groups(panels, factors.outputs, [&](int64_t panel, Group group) {
    const Row row = factors.row(panel, x);
    const auto to = to_of(panel);
    run_group(Gathered<kXStride, decltype(to)>{row, to}, group, pixels);
  });
}

#if defined(SNV2_DOTS_OF_BYTES)

template <int kXStride, class F>
void product(const Factors& factors, Range panels, const uint8_t* x, int64_t pixels,
             const F& to_of) {
  gathered_product<kXStride>(factors, panels, x, pixels, to_of);
}

// The product of row after row with a group of panels.
class RowProduct {
 public:
  explicit RowProduct(const Factors& factors) : factors_(factors) {}

  // f(first panel, group) of groups that together are `panels`. In it `run` is for that group.
  template <class F>
  void for_each_group(Range panels, const F& f) {
    for_groups(panels, factors_.outputs, [&](int64_t panel, Group group) {
      panels_ = {panel, panel + group.panels};
      f(panel, group);
    });
  }

  template <int kXStride, class F>
  void run(const uint8_t* x, int64_t pixels, const F& to_of) {
    gathered_product<kXStride>(factors_, panels_, x, pixels, to_of);
  }

 private:
  const Factors factors_;
  Range panels_{};
};

#else

template <int kXStride, class F>
void product(const Factors& factors, Range panels, const uint8_t* x, int64_t pixels,
             const F& to_of) {
  // For a few pixels widening costs more than it saves.
  if (pixels <= kQuad || WideWeights::most(factors.depth) < kWidePanels) {
    return gathered_product<kXStride>(factors, panels, x, pixels, to_of);
  }
  WidePixels wide;
  WideWeights weights;
  const int64_t chunks = ceil_div(pixels, WidePixels::most(factors.depth));
  const int64_t chunk = ceil_div(ceil_div(pixels, chunks), kQuad) * kQuad;
  for (int64_t begin = 0; begin < pixels; begin += chunk) {
    const int64_t count = std::min(chunk, pixels - begin);
    wide.fill<kXStride>(x + begin * kXStride, factors.offsets, factors.depth, count);
    for_wide_groups(panels, factors.outputs, [&](int64_t panel, Group group) {
      const Row row = factors.row(panel, x);
      const auto to = to_of(panel);
      weights.fill(row, group, 0);
      const int16_t* const w = weights.at(0, row.depth);
      run_group(Widened<decltype(to)>{row, w, wide, begin, to}, group, count);
    });
  }
}

// The product of row after row with a group of panels, whose weights are widened once.
class RowProduct {
 public:
  explicit RowProduct(const Factors& factors)
      : factors_(factors), widens_(WideWeights::most(factors.depth) >= kWidePanels) {}

  // f(first panel, group) of groups that together are `panels`. In it `run` is for that group.
  template <class F>
  void for_each_group(Range panels, const F& f) {
    const int64_t fit = WideWeights::most(factors_.depth) / kWidePanels * kWidePanels;
    const int64_t most = std::clamp(fit, kWidePanels, kMaxPanelGroup);
    for (int64_t first = panels.begin; first < panels.end; first += most) {
      panels_ = {first, std::min(first + most, panels.end)};
      bool half = false;
      for_wide_groups(panels_, factors_.outputs, [&](int64_t panel, Group group) {
        half = group.half;
        if (widens_) weights_.fill(factors_.row(panel, nullptr), group, panel - first);
      });
      f(first, Group{panels_.size(), half});
    }
  }

  template <int kXStride, class F>
  void run(const uint8_t* x, int64_t pixels, const F& to_of) {
    if (!widens_) return gathered_product<kXStride>(factors_, panels_, x, pixels, to_of);
    const int64_t most = WidePixels::most(factors_.depth);
    for (int64_t begin = 0; begin < pixels; begin += most) {
      const int64_t count = std::min(most, pixels - begin);
      pixels_.fill<kXStride>(x + begin * kXStride, factors_.offsets, factors_.depth, count);
      for_wide_groups(panels_, factors_.outputs, [&](int64_t panel, Group group) {
        const Row row = factors_.row(panel, x);
        const auto to = to_of(panel);
        const int16_t* const w = weights_.at(panel - panels_.begin, row.depth);
        run_group(Widened<decltype(to)>{row, w, pixels_, begin, to}, group, count);
      });
    }
  }

 private:
  const Factors factors_;
  const bool widens_;
  Range panels_{};
  WidePixels pixels_;
  WideWeights weights_;
};

#endif

}  // namespace snv2::cpu::SNV2_ISA::int8
