// Depthwise 3x3 on the caller's own tensors, for dw_conv3x3 and split_dw_cat_shuffle.
//
// A vector marches along a line of its map: down the columns of a plane (contiguous layout), along
// the pixels of a row with a vector of channels (channels-last). At each place it reads its three
// neighbours across the line once, and adds them to the three sums that they belong to; those stay
// in registers. So an output takes three loads, and the ends of the line need no padding.
#pragma once

#include <limits>

#include "cpu/lanes.h"

namespace snv2::cpu::SNV2_ISA {

template <class T>
T* plane_of(const FeatureMap& x, int64_t image, int64_t channel) {
  return static_cast<T*>(x.data) + (image * x.channels + channel) * x.plane();
}

template <class T>
T* row_of(const FeatureMap& x, int64_t image, int64_t row) {
  return static_cast<T*>(x.data) + (image * x.height + row) * x.width * x.channels;
}

// Convolution with what follows it, of some channels.
template <class V>
struct Taps {
  V weight[3][3];  // [place along the line][neighbour across it]
  V scale, shift;
  V lowest;  // of the result

  SNV2_INLINE V finish(V sum) const { return at_least(lowest, sum * scale + shift); }
};

template <class V>
SNV2_INLINE V lowest_of(const Depthwise3x3& dw) {
  return V{} - (dw.relu ? 0.0f : std::numeric_limits<float>::infinity());
}

// Marches kLines lines that lie beside each other. load(i, in) gives the neighbours at place i, one
// more to either side than there are lines; emit(i, line, result).
template <int kLines, class V, class Load, class Emit>
SNV2_INLINE void march(const Taps<V>& taps, int64_t count, const Load& load, const Emit& emit) {
  V before[kLines] = {}, here[kLines] = {};
  for (int64_t i = 0; i < count; ++i) {
    V in[kLines + 2], after[kLines] = {};
    load(i, in);
    unroll<kLines * 3>([&](auto k) SNV2_INLINED {
      constexpr int kLine = k % kLines, kTap = k / kLines;
      const V v = in[kLine + kTap];
      before[kLine] += v * taps.weight[2][kTap];
      here[kLine] += v * taps.weight[1][kTap];
      after[kLine] += v * taps.weight[0][kTap];
    });
    unroll<kLines>([&](auto line) SNV2_INLINED {
      if (i > 0) emit(i - 1, line, taps.finish(before[line]));
      before[line] = here[line];
      here[line] = after[line];
    });
  }
  unroll<kLines>([&](auto line) SNV2_INLINED { emit(count - 1, line, taps.finish(before[line])); });
}

// The same at stride 2, for `count` places.
template <class V, class Load, class Emit>
SNV2_INLINE void march_stride2(const Taps<V>& taps, int64_t count, const Load& load,
                               const Emit& emit) {
  V here = {};
  for (int64_t i = 0; i < count; i += 2) {
    V in[3], after = {};
    load(i, in);
    unroll<3>([&](auto j) SNV2_INLINED { here += in[j] * taps.weight[1][j]; });
    if (i + 1 < count) {
      load(i + 1, in);
      unroll<3>([&](auto j) SNV2_INLINED {
        here += in[j] * taps.weight[2][j];
        after += in[j] * taps.weight[0][j];
      });
    }
    emit(i / 2, 0, taps.finish(here));
    here = after;
  }
}

template <class V>
SNV2_INLINE Taps<V> taps_of(const Depthwise3x3& dw, int64_t channel) {
  Taps<V> taps;
  unroll<9>([&](auto i)
                SNV2_INLINED { taps.weight[i / 3][i % 3] = V{} + dw.weight[channel * 9 + i]; });
  taps.scale = V{} + dw.scale[channel];
  taps.shift = V{} + dw.shift[channel];
  taps.lowest = lowest_of<V>(dw);
  return taps;
}

// A vector of columns of one plane, which are its first, its last, both, or neither. Calls also()
// once a row.
template <class V, bool kFirst, bool kLast, class T, class Also>
SNV2_INLINE void dw_columns(const Taps<V>& taps, const T* x, int64_t height, int64_t width, T* y,
                            const Also& also) {
  march<1>(
      taps, height,
      [&](int64_t row, V(&in)[3]) SNV2_INLINED {
        const T* const p = x + row * width;
        in[1] = load_floats<V>(p);
        in[0] = kFirst ? lane_before(in[1]) : load_floats<V>(p - 1);
        in[2] = kLast ? lane_after(in[1]) : load_floats<V>(p + 1);
        also(V{});
      },
      [&](int64_t row, int, V result) SNV2_INLINED { store_floats(y + row * width, result); });
}

// A plane that is narrower than the vector. What lies beside a row is the next rows, which are
// written after it; vectors that would end outside of the plane are cut.
template <class V, class T, class Also>
SNV2_INLINE void dw_narrow(const Taps<V>& taps, const T* x, int64_t height, int64_t width, T* y,
                           const Also& also) {
  const int64_t whole = height * width - kLanesOf<V>;  // vectors behind here are cut
  const auto inside = lane_numbers<V>() < static_cast<uint32_t>(width);
  march<1>(
      taps, height,
      [&](int64_t row, V(&in)[3]) SNV2_INLINED {
        const int64_t at = row * width;
        in[1] = at <= whole ? load_floats<V>(x + at) : load_floats<V>(x + at, width);
        in[1] = inside ? in[1] : V{};
        in[0] = lane_before(in[1]);
        in[2] = lane_after(in[1]);
        also(V{});
      },
      [&](int64_t row, int, V result) SNV2_INLINED {
        const int64_t at = row * width;
        if (at <= whole) {
          store_floats(y + at, result);
        } else {
          store_floats(y + at, result, width);
        }
      });
}

template <class T, class Also>
void dw_plane_stride1(const T* x, int64_t height, int64_t width, const Depthwise3x3& dw,
                      int64_t channel, T* y, const Also& also) {
  for_each_strip(width, [&](auto v, int64_t i) SNV2_INLINED {
    using V = decltype(v);
    const bool last = i + kLanesOf<V> == width;
    const Taps<V> taps = taps_of<V>(dw, channel);
    if (width < kLanesOf<V>) {
      dw_narrow(taps, x, height, width, y, also);
    } else if (i == 0 && last) {
      dw_columns<V, true, true>(taps, x, height, width, y, also);
    } else if (i == 0) {
      dw_columns<V, true, false>(taps, x, height, width, y, also);
    } else if (last) {
      dw_columns<V, false, true>(taps, x + i, height, width, y + i, also);
    } else {
      dw_columns<V, false, false>(taps, x + i, height, width, y + i, also);
    }
  });
}

// Copies a plane a vector at a time, while another is convolved: the arithmetic hides the copy.
template <class T>
class PlaneCopy {
 public:
  PlaneCopy(const T* from, T* to, int64_t count) : from_(from), to_(to), count_(count) {
    if (count >= kLanes) return;
    std::memcpy(to, from, static_cast<size_t>(count) * sizeof(T));
    count_ = 0;
  }

  template <class V>
  SNV2_INLINE void step(V) {
    using Elements = std::conditional_t<sizeof(T) == 2, Shorts<V>, V>;
    if (at_ >= count_) return;
    const int64_t at = at_ < count_ - kLanesOf<V> ? at_ : count_ - kLanesOf<V>;
    const auto v = load_raw<Elements>(from_ + at);
    std::memcpy(to_ + at, &v, sizeof v);
    at_ += kLanesOf<V>;
  }

 private:
  const T* from_;
  T* to_;
  int64_t count_;
  int64_t at_ = 0;
};

SNV2_INLINE void dw_row_stride2(const float* x, int64_t pitch, const float* w, float scale,
                                float shift, bool with_relu, int64_t width, float* y) {
#pragma GCC ivdep
  for (int64_t i = 0; i < width; ++i) {
    float acc = 0.0f;
    for (int tap = 0; tap < 9; ++tap) acc += x[2 * i + tap / 3 * pitch + tap % 3] * w[tap];
    acc = acc * scale + shift;
    y[i] = with_relu && 0.0f >= acc ? 0.0f : acc;
  }
}

// A strip of rows at a time, padded with zeros; see plane_op_scratch for what scratch holds.
template <class T>
void dw_plane_stride2(const T* x, int64_t height, int64_t width, const Depthwise3x3& dw,
                      int64_t channel, T* y, float* scratch) {
  const int64_t pitch = width + 2;
  const int64_t out_height = conv3x3_extent(height, 2), out_width = conv3x3_extent(width, 2);
  float* const out = scratch + (2 * plane_strip_rows(width) + 1) * pitch + kPanel;
  float w[9];
  for (int tap = 0; tap < 9; ++tap) w[tap] = dw.weight[channel * 9 + tap];

  for (int64_t begin = 0; begin < out_height; begin += plane_strip_rows(width)) {
    const int64_t left = out_height - begin;
    const int64_t rows = left < plane_strip_rows(width) ? left : plane_strip_rows(width);
    for (int64_t i = 0; i < 2 * rows + 1; ++i) {
      const int64_t row = 2 * begin - 1 + i;
      float* padded = scratch + i * pitch;
      if (row < 0 || row >= height) {
        for (int64_t j = 0; j < pitch; ++j) padded[j] = 0.0f;
        continue;
      }
      padded[0] = padded[pitch - 1] = 0.0f;
      read_floats(x + row * width, width, padded + 1);
    }
    for (int64_t r = 0; r < rows; ++r) {
      dw_row_stride2(scratch + 2 * r * pitch, pitch, w, dw.scale[channel], dw.shift[channel],
                     dw.relu, out_width, out);
      write_floats(out, out_width, y + (begin + r) * out_width);
    }
  }
}

// Channels [first, first + channels) of channels-last rows.
template <class T>
class ChannelsLastRows {
 public:
  ChannelsLastRows(const FeatureMap& x, int64_t first, int64_t channels, const Depthwise3x3& dw,
                   float* scratch)
      : x_(x), first_(first), channels_(channels), dw_(dw), weights_(scratch) {
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t tap = 0; tap < 9; ++tap) weights_[tap * channels + c] = dw.weight[c * 9 + tap];
    }
  }

  // Output rows of all images one after the other. emit(pixel, channel, count, result) gets
  // vectors of results, of which `count` lanes are meant; pixels are counted over all images.
  template <class Emit>
  SNV2_INLINE void run(Range out_rows, const Emit& emit) const {
    const int64_t height = conv3x3_extent(x_.height, dw_.stride);
    for (int64_t row = out_rows.begin; row < out_rows.end;) {
      const int64_t left = height - row % height;
      const int64_t lines = dw_.stride == 1 && left > 1 && row + 1 < out_rows.end ? 2 : 1;
      for_each_strip(channels_, [&](auto v, int64_t c) SNV2_INLINED {
        using V = decltype(v);
        if (dw_.stride == 2) {
          run_lines<V, 1, 2>(row / height, row % height, c, emit);
        } else if (lines == 2) {
          run_lines<V, 2, 1>(row / height, row % height, c, emit);
        } else {
          run_lines<V, 1, 1>(row / height, row % height, c, emit);
        }
      });
      row += lines;
    }
  }

 private:
  template <class V, int kLines, int kStride, class Emit>
  SNV2_INLINE void run_lines(int64_t image, int64_t out_row, int64_t c, const Emit& emit) const {
    static constexpr T kZeros[kLanes] = {};
    const int64_t count = channels_ < kLanesOf<V> ? channels_ : kLanesOf<V>;
    const auto lanes = [&](const auto* p) SNV2_INLINED {
      return count == kLanesOf<V> ? load_floats<V>(p) : load_floats<V>(p, count);
    };
    Taps<V> taps;
    unroll<9>([&](auto i) SNV2_INLINED {
      taps.weight[i % 3][i / 3] = lanes(weights_ + i * channels_ + c);
    });
    taps.scale = lanes(dw_.scale + c);
    taps.shift = lanes(dw_.shift + c);
    taps.lowest = lowest_of<V>(dw_);
    const int64_t channel_step = x_.channels;
    const T* rows[kLines + 2];
    int64_t step[kLines + 2];
    for (int64_t i = 0; i < kLines + 2; ++i) {
      const int64_t row = out_row * kStride - 1 + i;
      const bool inside = row >= 0 && row < x_.height;
      rows[i] = inside ? row_of<const T>(x_, image, row) + first_ + c : kZeros;
      step[i] = inside ? channel_step : 0;
    }
    const auto read = [&](int64_t pixel, V(&in)[kLines + 2]) SNV2_INLINED {
      unroll<kLines + 2>([&](auto i) SNV2_INLINED { in[i] = lanes(rows[i] + pixel * step[i]); });
    };
    const int64_t height = conv3x3_extent(x_.height, kStride);
    const int64_t width = conv3x3_extent(x_.width, kStride);
    const int64_t first_pixel = (image * height + out_row) * width;
    const auto write = [&](int64_t pixel, int line, V result) SNV2_INLINED {
      emit(first_pixel + line * width + pixel, c, count, result);
    };
    if constexpr (kStride == 1) {
      march<kLines>(taps, x_.width, read, write);
    } else {
      march_stride2(taps, x_.width, read, write);
    }
  }

  const FeatureMap& x_;
  int64_t first_;
  int64_t channels_;
  const Depthwise3x3& dw_;
  float* weights_;  // [9][channels]
};

}  // namespace snv2::cpu::SNV2_ISA
