// Gradients of dw_conv3x3 and split_dw_cat_shuffle, in one pass over the gradient and x.
//
// A strip of rows is turned into floats with a border of zeros, and computed on as one long row in
// which a pixel is kStep floats: 1 in the contiguous layout, where a work item is a channel and
// vectors run along its pixels, or a panel of channels in channels-last. A tap is then an offset,
// and parameters are the same vectors all along. On a strip there are three passes:
//   the convolution again, to clear the gradient where the ReLU cut off,
//   the sums that the parameters' gradients are made of,
//   grad_x, the same convolution turned round, over x, which nobody needs any more.
// The gradient of stride 2 is spread over the pixels of x, with zeros between.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/dw_rows.h"

namespace snv2::cpu::SNV2_ISA {
namespace {

// Calls f(tap, offset) with the places of the taps around a pixel.
template <class F>
SNV2_INLINE void for_each_tap(int64_t pitch, int64_t step, const F& f) {
#pragma GCC unroll 9
  for (int tap = 0; tap < 9; ++tap) f(tap, (tap / 3 - 1) * pitch + (tap % 3 - 1) * step);
}

SNV2_INLINE Vec first_lanes(Vec v, int64_t count) {
  float lanes[kLanes] = {};
  std::memcpy(lanes, &v, static_cast<size_t>(count) * sizeof(float));
  return load(lanes);
}

template <class T, int kStep>
class Backward {
  static constexpr int kVectors = kStep == 1 ? 1 : kVecs;  // side by side
  static constexpr int kStride = kStep == 1 ? kLanes : kPanel;

 public:
  Backward(const DepthwiseBackward& op, float* scratch)
      : op_(op),
        pitch_((op.x.width + 2) * kStep),
        x_(scratch + kBackwardMargin),
        grad_(x_ + (backward_strip_rows(op.x, kStep) + 4) * pitch_ + kBackwardMargin) {}

  void run(int64_t item) {
    const int64_t panels = ceil_div(op_.channels, kStep);
    const int64_t group = item / panels, end = std::min((group + 1) * op_.images(), op_.x.batch);
    take_channels(item % panels * kStep);
    for (image_ = group * op_.images(); image_ < end; ++image_) {
      if (op_.passthrough()) pass();
      for (row_ = 0; row_ < op_.x.height; row_ += rows_) {
        rows_ = std::min(backward_strip_rows(op_.x, kStep), op_.x.height - row_);
        load_strip();
        if (op_.dw.relu) mask();
        add();
        compute_grad_x();
      }
    }
    store_sums(op_.sums + (group * op_.channels + channel_) * kDepthwiseSums);
  }

 private:
  void take_channels(int64_t channel) {
    channel_ = channel;
    channels_ = std::min<int64_t>(kStep, op_.channels - channel);
    const Depthwise3x3& dw = op_.dw;
    for (int64_t lane = 0; lane < kPanel; ++lane) {
      const int64_t c = kStep == 1 ? channel : channel + lane;
      const bool inside = c < op_.channels;
      for (int tap = 0; tap < 9; ++tap) weight_[tap][lane] = inside ? dw.weight[c * 9 + tap] : 0;
      scale_[lane] = inside ? dw.scale[c] : 0;
      shift_[lane] = inside ? dw.shift[c] : 0;
      for (auto& sums : sums_) sums[lane] = 0;
    }
  }

  // First channel of this item in a map of the op's channels, of which every `every`th is meant.
  template <class U>
  U* first_of(const FeatureMap& map, int64_t first, int64_t every) const {
    return static_cast<U*>(map.data) + image_ * map.channels * map.plane() +
           (first + channel_ * every) * map.channel_stride();
  }
  int64_t every() const { return op_.passthrough() ? 2 : 1; }
  int64_t main() const { return op_.x.channels - op_.channels; }

  // Copies what passes through.
  void pass() const {
    const T* from = first_of<const T>(op_.grad, 0, 2);
    T* to = first_of<T>(op_.grad_x, 0, 1);
    if (kStep == 1) {
      std::memcpy(to, from, static_cast<size_t>(op_.x.plane()) * sizeof(T));
      return;
    }
    for (int64_t p = 0; p < op_.x.plane(); ++p) {
      for (int64_t c = 0; c < channels_; ++c) {
        to[p * op_.x.channels + c] = from[p * op_.x.channels + 2 * c];
      }
    }
  }

  // A padded row of x's width from pixels that come `spread` apart.
  void load_row(const T* from, const FeatureMap& map, int64_t every, int64_t spread,
                float* to) const {
    for (int64_t i = 0; i < kStep; ++i) to[i] = to[pitch_ - kStep + i] = 0.0f;
    to += kStep;
    if (spread > 1) std::fill_n(to, pitch_ - 2 * kStep, 0.0f);
    if (kStep == 1 && spread == 1) return read_elements(from, 1, map.width, to);
    for (int64_t p = 0; p < map.width; ++p) {
      const T* pixel = from + p * map.pixel_stride();
      float* lanes = to + p * spread * kStep;
      if (channels_ == kPanel) {
        read_elements(pixel, every, kPanel, lanes);
      } else {
        read_elements(pixel, every, channels_, lanes);
        std::fill(lanes + channels_, lanes + kStep, 0.0f);
      }
    }
  }

  void load_strip() const {
    const T* x = first_of<const T>(op_.x, main(), 1);
    const T* grad = first_of<const T>(op_.grad, every() - 1, every());
    const auto load_rows = [&](const T* from, const FeatureMap& map, int64_t stride, int64_t halo,
                               int64_t channel_step, float* to) {
      for (int64_t row = row_ - halo; row < row_ + rows_ + halo; ++row, to += pitch_) {
        if (row < 0 || row >= op_.x.height || row % stride != 0) {
          std::fill_n(to, pitch_, 0.0f);
        } else {
          load_row(from + row / stride * map.width * map.pixel_stride(), map, channel_step, stride,
                   to);
        }
      }
    };
    load_rows(x, op_.x, 1, 2, 1, x_);
    load_rows(grad, op_.grad, op_.dw.stride, 1, every(), grad_);
  }

  // The taps around floats [begin, end) of the gradient's strip, at the same places of x's.
  const float* x_around(int64_t i) const { return x_ + pitch_ + i; }

  void mask() const {
    for (int v = 0; v < kVectors; ++v) {
      Vec w[9];
      for (int tap = 0; tap < 9; ++tap) w[tap] = load(weight_[tap] + v * kLanes);
      const Vec scale = load(scale_ + v * kLanes), shift = load(shift_ + v * kLanes);
      for (int64_t i = v * kLanes; i < (rows_ + 2) * pitch_; i += kStride) {
        const float* x = x_around(i);
        Vec y = {};
        for_each_tap(pitch_, kStep, [&](int tap, int64_t at) { y += load(x + at) * w[tap]; });
        y = y * scale + shift;
        store(grad_ + i, Vec{} >= y ? Vec{} : load(grad_ + i));  // NaN lets it through
      }
    }
  }

  // A few vectors at a time in float, so that no chain of roundings is long.
  void add() {
    constexpr int64_t kRun = kLanes * kStride;
    const int64_t end = (rows_ + 1) * pitch_;
    double strip[kDepthwiseSums][kPanel] = {};
    for (int v = 0; v < kVectors; ++v) {
      for (int64_t begin = pitch_ + v * kLanes; begin < end; begin += kRun) {
        Vec sum[kDepthwiseSums] = {};
        for (int64_t i = begin; i < std::min(begin + kRun, end); i += kStride) {
          Vec g = load(grad_ + i);
          if (kStep == 1 && i + kLanes > end) g = first_lanes(g, end - i);
          const float* x = x_around(i);
          for_each_tap(pitch_, kStep, [&](int tap, int64_t at) { sum[tap] += g * load(x + at); });
          sum[9] += g;
        }
        for (int i = 0; i < kDepthwiseSums; ++i) {
          float lanes[kLanes];
          store(lanes, sum[i]);
          for (int lane = 0; lane < kLanes; ++lane) {
            strip[i][v * kLanes + lane] += double{lanes[lane]};
          }
        }
      }
    }
    bool finite = true;
    for (const auto& sums : strip) {
      for (const double sum : sums) finite &= std::isfinite(sum);
    }
    if (!finite) return add_without_padding();
    for (int64_t i = 0; i < kDepthwiseSums; ++i) {
      for (int64_t lane = 0; lane < kPanel; ++lane) sums_[i][lane] += strip[i][lane];
    }
  }

  // The border's zeros times infinity are NaN, and no part of the sums.
  void add_without_padding() {
    const int64_t stride = op_.dw.stride;
    for (int64_t row = 0; row < rows_; ++row) {
      if ((row_ + row) % stride != 0) continue;
      for (int64_t column = 0; column < op_.x.width; column += stride) {
        for (int64_t lane = 0; lane < channels_; ++lane) {
          const int64_t i = (row + 1) * pitch_ + (column + 1) * kStep + lane;
          for_each_tap(pitch_, kStep, [&](int tap, int64_t at) {
            const int64_t y = row_ + row + tap / 3 - 1, x = column + tap % 3 - 1;
            if (y < 0 || y >= op_.x.height || x < 0 || x >= op_.x.width) return;
            sums_[tap][lane] += double{grad_[i] * x_around(i)[at]};
          });
          sums_[9][lane] += double{grad_[i]};
        }
      }
    }
  }

  void compute_grad_x() const {
    for (int v = 0; v < kVectors; ++v) {
      Vec w[9];
      for (int tap = 0; tap < 9; ++tap) w[tap] = load(weight_[8 - tap] + v * kLanes);
      const Vec scale = load(scale_ + v * kLanes);
      for (int64_t i = v * kLanes; i < rows_ * pitch_; i += kStride) {
        const float* grad = grad_ + pitch_ + i;
        Vec sum = {};
        for_each_tap(pitch_, kStep, [&](int tap, int64_t at) { sum += load(grad + at) * w[tap]; });
        store(x_ + i, sum * scale);
      }
    }
    T* to = first_of<T>(op_.grad_x, main(), 1) + row_ * op_.x.width * op_.x.pixel_stride();
    for (int64_t row = 0; row < rows_; ++row) {
      const float* from = x_ + row * pitch_ + kStep;
      if (kStep == 1) {
        write_floats(from, op_.x.width, to + row * op_.x.width, 1);
        continue;
      }
      for (int64_t p = 0; p < op_.x.width; ++p) {
        T* pixel = to + (row * op_.x.width + p) * op_.x.channels;
        if (channels_ == kPanel) {
          write_floats(from + p * kStep, kPanel, pixel, 1);
        } else {
          write_floats(from + p * kStep, channels_, pixel, 1);
        }
      }
    }
  }

  void store_sums(float* to) const {
    for (int64_t i = 0; i < kDepthwiseSums; ++i) {
      if (kStep == 1) {
        double sum = 0;
        for (int lane = 0; lane < kLanes; ++lane) sum += sums_[i][lane];
        to[i] = static_cast<float>(sum);
        continue;
      }
      for (int64_t c = 0; c < channels_; ++c) {
        to[c * kDepthwiseSums + i] = static_cast<float>(sums_[i][c]);
      }
    }
  }

  const DepthwiseBackward& op_;
  const int64_t pitch_;
  float* const x_;     // [rows + 4][pitch], from two rows above the strip on; then grad_x
  float* const grad_;  // [rows + 2][pitch], from one row above the strip on

  int64_t channel_ = 0, channels_ = 0;      // of the item
  int64_t image_ = 0, row_ = 0, rows_ = 0;  // of the strip
  float weight_[9][kPanel], scale_[kPanel], shift_[kPanel];
  double sums_[kDepthwiseSums][kPanel];
};

}  // namespace

void depthwise_backward(const DepthwiseBackward& op, Range items, float* scratch) {
  with_type(op.x.dtype, [&](auto type) {
    using T = decltype(type);
    const auto run = [&](auto backward) {
      for (int64_t item = items.begin; item < items.end; ++item) backward.run(item);
    };
    if (op.x.layout == Layout::kContiguous) {
      run(Backward<T, 1>(op, scratch));
    } else {
      run(Backward<T, kPanel>(op, scratch));
    }
  });
}

}  // namespace snv2::cpu::SNV2_ISA
