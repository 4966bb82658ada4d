// Squeeze-and-excite: means of planes, the two small products behind them, planes times the result,
// and the shortcut and activation that may follow.
//
// Sums run in the order of pixels in one thread for each panel, so that they do not depend on how
// many threads there are, and in blocks, which keeps the rounding error of large planes small.
#include <algorithm>

#include "cpu/activation.h"

namespace snv2::cpu::SNV2_ISA {
namespace {

constexpr int64_t kBlock = 128;
constexpr int kChains = 4;
constexpr int64_t kStrip = 64;  // pixels

// Of x(0) to x(count - 1).
template <class F>
SNV2_INLINE Vec sum_of(int64_t count, const F& x) {
  Vec total = {};
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = std::min(count, begin + kBlock);
    Vec sums[kChains] = {};
    int64_t i = begin;
    for (; i + kChains <= end; i += kChains) {
      unroll<kChains>([&](auto c) SNV2_INLINED { sums[c] += x(i + c); });
    }
    for (; i < end; ++i) sums[0] += x(i);
    total += (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }
  return total;
}

// One pixel of a product in float32, x(k) being its input.
template <class F>
void product(const float* weights, int64_t depth, int64_t outputs, const Act& act, float* y,
             const F& x) {
  const int64_t panels = panels_of(outputs);
  for (int64_t panel = 0; panel < panels; ++panel) {
    for (int64_t lane = 0; lane < kPanel; lane += kLanes) {
      const float* const bias = weights + panel * (depth + 1) * kPanel + lane;
      const float* const first = bias + kPanel;
      const Vec sum =
          sum_of(depth, [&](int64_t k) SNV2_INLINED { return x(k) * load(first + k * kPanel); });
      store(y + panel * kPanel + lane, sum + load(bias));
    }
  }
  activate(act, panels, y, kPanel, 1, y, kPanel);
}

#if defined(__AVX512F__)

// Planes from anywhere as a panel. Neighbours in it that are neighbours in their own panel come
// with one load of each pixel.
class Gathered {
 public:
  Gathered(const Element* x, const int32_t* offsets, int64_t planes) {
    for (int64_t lane = 0; lane < planes; ++lane) {
      const Element* const from = x + offsets[lane] - lane;
      if (lane == 0 || from != runs_[count_ - 1].from) runs_[count_++] = {from, 0};
      runs_[count_ - 1].lanes |= static_cast<__mmask16>(1u << lane);
    }
  }

  SNV2_INLINE Vec at(int64_t i) const {
    Vec all = {};
    for (int64_t r = 0; r < count_; ++r) all = load_lanes(all, runs_[r].lanes, runs_[r].from + i);
    return all;
  }

 private:
  // Returns the lanes of a mask from memory, and the others as they were. Memory of the others is
  // not touched: it may lie outside of all buffers.
  static SNV2_INLINE Vec load_lanes(Vec others, __mmask16 lanes, const float* p) {
    return _mm512_mask_loadu_ps(others, lanes, p);
  }
#if defined(__AVX512BF16__)
  static SNV2_INLINE Vec load_lanes(Vec others, __mmask16 lanes, const BFloat16* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, p));
    return _mm512_mask_mov_ps(others, lanes, _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16)));
  }
#endif

  struct Run {
    const Element* from;  // the first lane's place
    __mmask16 lanes;
  };
  Run runs_[kPanel];
  int64_t count_ = 0;
};

#endif

// Planes from anywhere as a panel, one after the other: elements of a pixel that were stored one by
// one would make a load of the whole pixel wait for all of them.
void gather(const Element* x, const int32_t* offsets, int64_t planes, int64_t pixels, Element* y) {
#if defined(__AVX512F__)
  const Gathered panel(x, offsets, planes);
  for (int64_t i = 0; i < pixels * kPanel; i += kPanel) store(y + i, panel.at(i));
#else
  for (int64_t plane = 0; plane < planes; ++plane) {
    const Element* const in = x + offsets[plane];
    for (int64_t i = 0; i < pixels * kPanel; i += kPanel) y[i + plane] = in[i];
  }
#endif
}

}  // namespace

void means(const Element* x, int64_t pixels, Range panels, float* means) {
  const float scale = 1.0f / static_cast<float>(pixels);
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    for (int64_t lane = 0; lane < kPanel; lane += kLanes) {
      const Element* const in = x + panel * pixels * kPanel + lane;
      const Vec sum = sum_of(pixels, [&](int64_t p) SNV2_INLINED { return load(in + p * kPanel); });
      store(means + panel * kPanel + lane, sum * scale);
    }
  }
}

void mean_features(const float* means, const int64_t* planes, int64_t count, Element* y,
                   int64_t y_panel) {
  for (int64_t first = 0; first < count; first += kPanel, y += y_panel) {
    float panel[kPanel] = {};
    for (int64_t i = first; i < std::min(first + kPanel, count); ++i) {
      panel[i - first] = means[planes[i]];
    }
    for (int64_t lane = 0; lane < kPanel; lane += kLanes) store(y + lane, load(panel + lane));
  }
}

void gate(const Gate& op) {
  product(op.pw1_weights, op.depth, op.mid, op.pw1_act, op.reduced,
          [&](int64_t k) SNV2_INLINED { return op.means[op.planes[k]]; });
  product(op.pw2_weights, op.mid, op.outputs, op.pw2_act, op.scales,
          [&](int64_t k) SNV2_INLINED { return op.reduced[k]; });
}

void scale(const Scale<Element>& op, Range panels) {
  Element added[kStrip * kPanel] = {};  // beyond the last output it is what nobody reads
  float rows[kStrip * kPanel];
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    const int64_t outputs = std::min(kPanel, op.outputs - panel * kPanel);
    for (int64_t begin = 0; begin < op.pixels; begin += kStrip) {
      const int64_t count = std::min(kStrip, op.pixels - begin);
      Element* const y = op.y + (panel * op.pixels + begin) * kPanel;
      if (op.x != nullptr) {
        gather(op.x + begin * kPanel, op.offsets + panel * kPanel, outputs, count, added);
      }
      for (int64_t lane = 0; lane < kPanel; lane += kLanes) {
        const Vec factor =
            op.scales != nullptr ? load(op.scales + panel * kPanel + lane) : Vec{} + 1.0f;
        for (int64_t i = lane; i < count * kPanel; i += kPanel) {
          store(rows + i, load(y + i) * factor + load(added + i));
        }
      }
      activate(op.act.from_panel(panel), 1, rows, 0, count, y, 0);
    }
  }
}

}  // namespace snv2::cpu::SNV2_ISA
