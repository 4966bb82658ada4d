// The depthwise convolutions of a unit, between ring and DW. unit.h puts them together.
//
// A warp takes 8 columns of 8 (float32: 4) channels down the rows, a lane two neighbouring columns
// (one) of a channel. With windows of 3x3 it has its window of inputs and the taps in registers,
// and reads each input once for all rows. Larger windows have no room there (5x5 would take the
// second CTA of an SM away), and rows of a dilated one do not follow each other: both read every
// tap and every input where they need it.
//
// At stride 2 lanes are two words apart in 16 bits, and channels four times an odd number: odd
// channels begin one column earlier, so that they read the words between.
#pragma once

#include <cstdint>

#include "cuda/unit_params.h"

namespace snv2::SNV2_GPU {

// The rows of MID (the projection's: of X) that a CTA has, and those that it convolves.
struct Rows {
  int start, lead;   // input row and column of place 0
  int first, count;  // output rows
  int column0;       // of DW, where the first one begins
};

template <class T, int kStride>
struct LaneColumns {
  static constexpr int kPixels = 4 / static_cast<int>(sizeof(T));
  static constexpr int kAcross = kBlock / kPixels, kChannels = kWarp / kAcross;
  static constexpr bool kShifted = kStride == 2 && sizeof(T) == 2;
};

// Places in the ring: `at` moved by rows, as many as it holds at most.
struct Ring {
  int size, width;

  SNV2_DEVICE int moved(int at, int rows) const {
    const int there = at + rows * width;
    return there < 0 ? there + size : there < size ? there : there - size;
  }
  // The pixel of a column in the row at `at`, zero beyond the row's ends.
  template <class T>
  SNV2_DEVICE float pixel(Shared<T> line, int at, int column) const {
    const int clamped = column < 0 ? 0 : column < width ? column : width - 1;
    int there = at + clamped;
    if (there >= size) there -= size;
    const float value = to_float(load(line + there));
    return column == clamped ? value : 0.0f;
  }
};

// 3x3, not dilated.
template <class T, int kStride>
class Sliding {
 public:
  SNV2_DEVICE void start(const Branch<T>&, Shared<float> weights) {
    for (int i = 0; i < kTaps + 1; ++i) taps_[i] = load(weights + i);
  }
  SNV2_DEVICE float shift() const { return taps_[kTaps]; }

  // Moves to an output row: the next one, or any if `fresh`. It is centred on input row `center` of
  // its image, at `place`.
  SNV2_DEVICE void row(const Ring& ring, Shared<T> line, int first, int center, int place,
                       int height, bool fresh) {
    const auto read = [&](int k) {
      const int row = center + k - kReach;
      const bool inside = k == kReach || (row >= 0 && row < height);
      const int at = inside ? ring.moved(place, k - kReach) : place;
#pragma unroll
      for (int i = 0; i < kSpan; ++i) {
        const float value = ring.pixel(line, at, first * kStride - kReach + i);
        window_[k][i] = inside ? value : 0.0f;
      }
    };
#pragma unroll
    for (int k = 0; k < kWindow - kStride; ++k) {
      if (fresh) {
        read(k);
      } else {
#pragma unroll
        for (int i = 0; i < kSpan; ++i) window_[k][i] = window_[k + kStride][i];
      }
    }
#pragma unroll
    for (int k = kWindow - kStride; k < kWindow; ++k) read(k);
  }
  // The sum of pixel p of the lane's.
  SNV2_DEVICE float sum(int p) const {
    float sum = 0.0f;
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) {
      sum = multiply_add(taps_[tap], window_[tap / kWindow][p * kStride + tap % kWindow], sum);
    }
    return sum;
  }

 private:
  static constexpr int kPixels = LaneColumns<T, kStride>::kPixels;
  static constexpr int kWindow = 3, kTaps = kWindow * kWindow, kReach = kWindow / 2;
  static constexpr int kSpan = (kPixels - 1) * kStride + kWindow;

  float taps_[kTaps + 1];
  float window_[kWindow][kSpan];
};

// Any window and dilation.
template <class T, int kStride>
class Dilated {
 public:
  SNV2_DEVICE void start(const Branch<T>& branch, Shared<float> weights) {
    window_ = branch.window;
    dilation_ = branch.dilation;
    weights_ = weights;
  }
  SNV2_DEVICE float shift() const { return load(weights_ + window_ * window_); }

  SNV2_DEVICE void row(const Ring& ring, Shared<T> line, int first, int center, int place,
                       int height, bool) {
    const int half = window_ / 2;
#pragma unroll
    for (int p = 0; p < kPixels; ++p) sums_[p] = 0.0f;
    for (int ky = 0; ky < window_; ++ky) {
      const int by = (ky - half) * dilation_;
      if (center + by < 0 || center + by >= height) continue;
      const int at = ring.moved(place, by);
      for (int kx = 0; kx < window_; ++kx) {
        const float tap = load(weights_ + (ky * window_ + kx));
#pragma unroll
        for (int p = 0; p < kPixels; ++p) {
          const int column = (first + p) * kStride + (kx - half) * dilation_;
          sums_[p] = multiply_add(tap, ring.pixel(line, at, column), sums_[p]);
        }
      }
    }
  }
  SNV2_DEVICE float sum(int p) const { return sums_[p]; }

 private:
  static constexpr int kPixels = LaneColumns<T, kStride>::kPixels;

  int window_, dilation_;
  Shared<float> weights_;
  float sums_[kPixels];
};

// No window: the pixel itself.
template <class T, int kStride>
class Point {
 public:
  SNV2_DEVICE void start(const Branch<T>&, Shared<float>) {}
  SNV2_DEVICE float shift() const { return 0.0f; }

  SNV2_DEVICE void row(const Ring& ring, Shared<T> line, int first, int, int place, int, bool) {
#pragma unroll
    for (int p = 0; p < kPixels; ++p) pixels_[p] = ring.pixel(line, place, (first + p) * kStride);
  }
  SNV2_DEVICE float sum(int p) const { return pixels_[p]; }

 private:
  static constexpr int kPixels = LaneColumns<T, kStride>::kPixels;

  float pixels_[kPixels];
};

template <class Window, class T, int kStride, class Act>
SNV2_DEVICE void convolve(const UnitParams<T>& params, const Branch<T>& branch, Shared<T> x,
                          int x_pitch, Shared<T> out, int out_pitch, Shared<float> weights,
                          const Rows& rows) {
  using Lane = LaneColumns<T, kStride>;
  const int height = params.height, channels = branch.mid;
  const Ring ring{params.ring, params.width};
  const int groups = (channels + Lane::kChannels - 1) / Lane::kChannels;
  const int strips = (params.out_width + kBlock - 1 + Lane::kShifted) / kBlock;
  const int image0 = rows.first / params.out_height;
  const int local0 = rows.first - image0 * params.out_height;
  // Place in the ring of the input row that the first output row is centred on.
  const int place0 =
      ((image0 * height + local0 * kStride - rows.start) * params.width + rows.lead) % ring.size;

  for (int task = warp_of_cta(); task < groups * strips; task += kUnitWarps) {
    const int wanted = task % groups * Lane::kChannels + lane_of_warp() / Lane::kAcross;
    const int channel = wanted < channels ? wanted : channels - 1;
    const int first = task / groups * kBlock + lane_of_warp() % Lane::kAcross * Lane::kPixels -
                      (Lane::kShifted ? channel % 2 : 0);
    const Shared<T> line = x + channel * x_pitch;
    Window window;
    window.start(branch, weights + channel * branch.template dw_floats<Act>());
    [[maybe_unused]] const float slope = Act::kAny ? slope_of(branch.dw_after, channel) : 0.0f;

    int local = local0, place = place0;
    for (int r = 0; r < rows.count; ++r) {
      window.row(ring, line, first, local * kStride, place, height, r == 0 || local == 0);
#pragma unroll
      for (int p = 0; p < Lane::kPixels; ++p) {
        float y = window.sum(p) + window.shift();
        if constexpr (Act::kAny) y = activated(branch.dw_after.kind, y, slope);
        const int column = first + p;
        store_if(wanted < channels && column >= 0 && column < params.out_width,
                 out + (channel * out_pitch + rows.column0 + r * params.out_width + column),
                 rounded<T>(y));
      }
      if (++local < params.out_height) {
        place = ring.moved(place, kStride);
      } else {
        local = 0;
        place = ring.moved(place, height - (params.out_height - 1) * kStride);
      }
    }
  }
}

// All channels of a branch. kPoints: it may have no window.
template <class T, int kStride, class Act, bool kPoints>
SNV2_DEVICE void convolve_rows(const UnitParams<T>& params, const Branch<T>& branch, Shared<T> x,
                               int x_pitch, Shared<T> out, int out_pitch, Shared<float> weights,
                               const Rows& rows) {
  const auto with = [&](auto window) {
    convolve<decltype(window), T, kStride, Act>(params, branch, x, x_pitch, out, out_pitch, weights,
                                                rows);
  };
  if constexpr (kPoints) {
    if (branch.window == 1) return with(Point<T, kStride>{});
  }
  if constexpr (Act::kAny) {
    if (branch.window > 3 || branch.dilation > 1) return with(Dilated<T, kStride>{});
  }
  with(Sliding<T, kStride>{});
}

}  // namespace snv2::SNV2_GPU
