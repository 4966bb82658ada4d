// Depthwise 3x3 on the caller's own tensors, for dw_conv3x3 and split_dw_cat_shuffle.
//
// Input rows are turned into float rows with a border of zeros, so that neither dtype nor border is
// seen in the arithmetic: a strip of them for a work item of one plane (contiguous layout), a ring
// of three for work items of one output row of one image (channels-last).
#pragma once

#include "cpu/convert.h"

namespace snv2::cpu::SNV2_ISA {

template <class T>
T* plane_of(const FeatureMap& x, int64_t image, int64_t channel) {
  return static_cast<T*>(x.data) + (image * x.channels + channel) * x.plane();
}

template <class T>
T* row_of(const FeatureMap& x, int64_t image, int64_t row) {
  return static_cast<T*>(x.data) + (image * x.height + row) * x.width * x.channels;
}

// Three rows and a row of zeros, `pitch` floats each.
struct RowRing {
  float* rows;
  int64_t pitch;
  int64_t held[3] = {-1, -1, -1};  // global index of the row in each place

  RowRing(float* scratch, int64_t row_pitch) : rows(scratch), pitch(row_pitch) {
    for (int64_t i = 0; i < pitch; ++i) rows[3 * pitch + i] = 0.0f;
  }

  // Row `row` of the image whose first row has the global index `base`; make(row, out) fills it
  // unless it is still there.
  template <class F>
  const float* get(int64_t base, int64_t row, int64_t height, const F& make) {
    if (row < 0 || row >= height) return rows + 3 * pitch;
    float* out = rows + (row % 3) * pitch;
    if (held[row % 3] != base + row) {
      make(row, out);
      held[row % 3] = base + row;
    }
    return out;
  }
};

// All channels of one output pixel from three padded rows.
template <int kStride>
SNV2_INLINE void dw_pixel(const float* const (&rows)[3], const float* weights,
                          const Depthwise3x3& dw, int64_t channels, int64_t x, float* y) {
#pragma GCC ivdep
  for (int64_t c = 0; c < channels; ++c) {
    float acc = 0.0f;
    for (int tap = 0; tap < 9; ++tap) {
      acc += rows[tap / 3][(x * kStride + tap % 3) * channels + c] * weights[tap * channels + c];
    }
    acc = acc * dw.scale[c] + dw.shift[c];
    y[c] = dw.relu && 0.0f >= acc ? 0.0f : acc;
  }
}

// `count` outputs of stride 1, as if the padded rows were one long row: the few sums that mix the
// end of a row with the start of the next are never copied out, and narrow planes still fill
// whole vectors. Reads and writes up to a vector past the end.
SNV2_INLINE void dw_flat(const float* x, int64_t pitch, const float* w, float scale, float shift,
                         bool with_relu, int64_t count, float* y) {
  for (int64_t i = 0; i < count; i += kLanes) {
    Vec acc = {};
#pragma GCC unroll 9
    for (int tap = 0; tap < 9; ++tap) acc += load(x + i + tap / 3 * pitch + tap % 3) * w[tap];
    acc = acc * scale + shift;
    store(y + i, with_relu ? relu(acc) : acc);
  }
}

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

// One plane, a strip of rows at a time; see plane_op_scratch for what scratch holds.
template <class T>
void dw_plane(const T* x, const FeatureMap& shape, const Depthwise3x3& dw, int64_t channel, T* y,
              float* scratch) {
  const int64_t height = shape.height, width = shape.width, pitch = width + 2;
  const int64_t out_height = conv3x3_extent(height, dw.stride);
  const int64_t out_width = conv3x3_extent(width, dw.stride);
  float* const out = scratch + (2 * plane_strip_rows(width) + 1) * pitch + kPanel;
  float w[9];
  for (int tap = 0; tap < 9; ++tap) w[tap] = dw.weight[channel * 9 + tap];
  const float scale = dw.scale[channel], shift = dw.shift[channel];

  for (int64_t begin = 0; begin < out_height; begin += plane_strip_rows(width)) {
    const int64_t left = out_height - begin;
    const int64_t rows = left < plane_strip_rows(width) ? left : plane_strip_rows(width);
    const int64_t in_rows = (rows - 1) * dw.stride + 3;
    for (int64_t i = 0; i < in_rows; ++i) {
      const int64_t row = begin * dw.stride - 1 + i;
      float* padded = scratch + i * pitch;
      if (row < 0 || row >= height) {
        for (int64_t j = 0; j < pitch; ++j) padded[j] = 0.0f;
        continue;
      }
      padded[0] = padded[pitch - 1] = 0.0f;
      read_elements(x + row * width, 1, width, padded + 1);
    }
    if (dw.stride == 1) {
      dw_flat(scratch, pitch, w, scale, shift, dw.relu, rows * pitch - 2, out);
    } else {
      for (int64_t r = 0; r < rows; ++r) {
        dw_row_stride2(scratch + 2 * r * pitch, pitch, w, scale, shift, dw.relu, out_width,
                       out + r * pitch);
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      write_floats(out + r * pitch, out_width, y + (begin + r) * out_width, 1);
    }
  }
}

// Channels [first, first + channels) of channels-last rows. The ring lives as long as the
// object, so rows asked for in order are converted once.
template <class T>
class ChannelsLastRows {
 public:
  ChannelsLastRows(const FeatureMap& x, int64_t first, int64_t channels, const Depthwise3x3& dw,
                   float* scratch)
      : x_(x),
        first_(first),
        channels_(channels),
        dw_(dw),
        weights_(scratch),
        result_(scratch + 9 * channels),
        ring_(scratch + 10 * channels, (x.width + 2) * channels) {
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t tap = 0; tap < 9; ++tap) weights_[tap * channels + c] = dw.weight[c * 9 + tap];
    }
  }

  // emit(pixel, values) gets each pixel's result.
  template <class F>
  void run(int64_t image, int64_t out_row, const F& emit) {
    const auto make = [&](int64_t row, float* padded) {
      const T* in = row_of<const T>(x_, image, row) + first_;
      for (int64_t c = 0; c < channels_; ++c) {
        padded[c] = padded[ring_.pitch - channels_ + c] = 0.0f;
      }
      for (int64_t p = 0; p < x_.width; ++p) {
        read_elements(in + p * x_.channels, 1, channels_, padded + (p + 1) * channels_);
      }
    };
    const float* rows[3];
    for (int64_t i = 0; i < 3; ++i) {
      rows[i] = ring_.get(image * x_.height, out_row * dw_.stride - 1 + i, x_.height, make);
    }
    for (int64_t p = 0; p < conv3x3_extent(x_.width, dw_.stride); ++p) {
      if (dw_.stride == 1) {
        dw_pixel<1>(rows, weights_, dw_, channels_, p, result_);
      } else {
        dw_pixel<2>(rows, weights_, dw_, channels_, p, result_);
      }
      emit(p, result_);
    }
  }

 private:
  const FeatureMap& x_;
  int64_t first_;
  int64_t channels_;
  const Depthwise3x3& dw_;
  float* weights_;  // [9][channels]
  float* result_;   // [channels]
  RowRing ring_;
};

}  // namespace snv2::cpu::SNV2_ISA
