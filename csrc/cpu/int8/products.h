// Products of rows of pixels with a layer's panels.
#pragma once

#include "cpu/int8/tile.h"

#if defined(SNV2_PAIRS_OF_BYTES)
#include "cpu/int8/pairs.h"
#endif

namespace snv2::cpu::SNV2_ISA::int8 {

// Packed weights of a layer, and the words that they multiply.
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

#if !defined(SNV2_PAIRS_OF_BYTES)

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
  // For a few pixels sorting weights out costs more than it saves.
  if (pixels <= kQuad || PairWeights::most(factors.depth) == 0) {
    return gathered_product<kXStride>(factors, panels, x, pixels, to_of);
  }
  PairWeights weights;
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    const Row row = factors.row(panel, x);
    const int64_t vectors = live_vectors(panel, factors.outputs);
    for (int64_t v = 0; v < vectors; ++v) weights.fill(row, 0, v);
    paired_panel<kXStride>(row, weights, 0, vectors, to_of(panel), pixels);
  }
}

// The product of row after row with a group of panels, whose weights are sorted out once.
class RowProduct {
 public:
  explicit RowProduct(const Factors& factors) : factors_(factors) {}

  // f(first panel, group) of groups that together are `panels`. In it `run` is for that group.
  template <class F>
  void for_each_group(Range panels, const F& f) {
    const int64_t most = std::clamp<int64_t>(fit(), 1, kMaxPanelGroup);
    for (int64_t first = panels.begin; first < panels.end; first += most) {
      panels_ = {first, std::min(first + most, panels.end)};
      int64_t vectors = kVecs;  // of the last panel
      for (int64_t panel = first; panel < panels_.end; ++panel) {
        vectors = live_vectors(panel, factors_.outputs);
        if (fit() == 0) continue;
        for (int64_t v = 0; v < vectors; ++v) {
          weights_.fill(factors_.row(panel, nullptr), panel - first, v);
        }
      }
      f(first, Group{panels_.size(), vectors < kVecs});
    }
  }

  template <int kXStride, class F>
  void run(const uint8_t* x, int64_t pixels, const F& to_of) {
    if (fit() == 0) return gathered_product<kXStride>(factors_, panels_, x, pixels, to_of);
    for (int64_t panel = panels_.begin; panel < panels_.end; ++panel) {
      paired_panel<kXStride>(factors_.row(panel, x), weights_, panel - panels_.begin,
                             live_vectors(panel, factors_.outputs), to_of(panel), pixels);
    }
  }

 private:
  int64_t fit() const { return PairWeights::most(factors_.depth); }

  const Factors factors_;
  Range panels_{};
  PairWeights weights_;
};

#endif

}  // namespace snv2::cpu::SNV2_ISA::int8
