// The stand-alone ops on the caller's own tensors: cat_shuffle, dw_conv3x3 and
// split_dw_cat_shuffle, each one read and one write.
//
// A work item is one output plane (pair) in the contiguous layout, and one output row of one
// image in channels-last. The depthwise ops turn three input rows at a time into float rows
// with a border of zeros, so that neither dtype nor border is seen in the arithmetic.
#include <cstring>

#include "cpu/convert.h"

namespace snv2::cpu::SNV2_ISA {
namespace {

// Contiguous ----------------------------------------------------------------------------------

template <class T>
const T* plane_of(const FeatureMap& x, int64_t image, int64_t channel) {
  return static_cast<const T*>(x.data) + (image * x.channels + channel) * x.plane();
}

template <class T>
T* output_plane(const FeatureMap& y, int64_t image, int64_t channel) {
  return static_cast<T*>(y.data) + (image * y.channels + channel) * y.plane();
}

template <int kStride>
void dw_plane_row(const float* const (&rows)[3], const float* w, float scale, float shift,
                  bool relu, int64_t width, float* y) {
#pragma GCC ivdep
  for (int64_t x = 0; x < width; ++x) {
    float acc = 0.0f;
    for (int tap = 0; tap < 9; ++tap) acc += rows[tap / 3][x * kStride + tap % 3] * w[tap];
    acc = acc * scale + shift;
    y[x] = relu && 0.0f >= acc ? 0.0f : acc;
  }
}

template <class T>
void dw_plane(const T* x, const FeatureMap& shape, const Depthwise3x3& dw, int64_t channel, T* y,
              float* scratch) {
  const int64_t height = shape.height, width = shape.width;
  const int64_t pitch = width + 2;
  const int64_t out_height = conv3x3_extent(height, dw.stride);
  const int64_t out_width = conv3x3_extent(width, dw.stride);
  float* const zeros = scratch + 3 * pitch;
  float* const out = scratch + 4 * pitch;
  for (int64_t i = 0; i < pitch; ++i) zeros[i] = 0.0f;
  for (int64_t r = 0; r < 3; ++r) scratch[r * pitch] = scratch[(r + 1) * pitch - 1] = 0.0f;

  int64_t made = 0;
  for (int64_t out_row = 0; out_row < out_height; ++out_row) {
    const int64_t top = out_row * dw.stride - 1;
    for (; made <= top + 2 && made < height; ++made) {
      read_floats(x + made * width, 1, width, scratch + (made % 3) * pitch + 1);
    }
    const float* rows[3];
    for (int64_t i = 0; i < 3; ++i) {
      const int64_t row = top + i;
      rows[i] = row >= 0 && row < height ? scratch + (row % 3) * pitch : zeros;
    }
    const float* w = dw.weight + channel * 9;
    const float scale = dw.scale[channel], shift = dw.shift[channel];
    if (dw.stride == 1) {
      dw_plane_row<1>(rows, w, scale, shift, dw.relu, out_width, out);
    } else {
      dw_plane_row<2>(rows, w, scale, shift, dw.relu, out_width, out);
    }
    write_floats(out, out_width, y + out_row * out_width, 1);
  }
}

// Channels last -------------------------------------------------------------------------------

template <class T>
const T* row_of(const FeatureMap& x, int64_t image, int64_t row) {
  return static_cast<const T*>(x.data) + (image * x.height + row) * x.width * x.channels;
}

template <class T>
T* output_row(const FeatureMap& y, int64_t image, int64_t row) {
  return static_cast<T*>(y.data) + (image * y.height + row) * y.width * y.channels;
}

// Scratch: [9][channels] weights, [3][width + 2][channels] rows, [channels] result.
struct RowScratch {
  float* weights;
  float* rows;
  float* result;
  int64_t pitch;

  RowScratch(float* scratch, int64_t width, int64_t channels)
      : weights(scratch),
        rows(scratch + 9 * channels),
        result(rows + 3 * (width + 2) * channels),
        pitch((width + 2) * channels) {}
};

void transpose_weights(const Depthwise3x3& dw, int64_t channels, float* out) {
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t tap = 0; tap < 9; ++tap) out[tap * channels + c] = dw.weight[c * 9 + tap];
  }
}

// Channels [first, first + channels) of output row `out_row`; emit(pixel, values) gets each
// pixel's result. Rows are made anew for each item, as items may run on any thread.
template <class T, class F>
void dw_channels_last_row(const FeatureMap& x, int64_t image, int64_t first, int64_t channels,
                          const Depthwise3x3& dw, int64_t out_row, const RowScratch& scratch,
                          const F& emit) {
  for (int64_t i = 0; i < 3; ++i) {
    float* out = scratch.rows + i * scratch.pitch;
    const int64_t row = out_row * dw.stride - 1 + i;
    if (row < 0 || row >= x.height) {
      for (int64_t j = 0; j < scratch.pitch; ++j) out[j] = 0.0f;
      continue;
    }
    const T* in = row_of<T>(x, image, row) + first;
    for (int64_t j = 0; j < channels; ++j) out[j] = out[scratch.pitch - channels + j] = 0.0f;
    for (int64_t p = 0; p < x.width; ++p) {
      read_floats(in + p * x.channels, 1, channels, out + (p + 1) * channels);
    }
  }
  const int64_t out_width = conv3x3_extent(x.width, dw.stride);
  for (int64_t p = 0; p < out_width; ++p) {
    const float* in = scratch.rows + p * dw.stride * channels;
#pragma GCC ivdep
    for (int64_t c = 0; c < channels; ++c) {
      float acc = 0.0f;
      for (int tap = 0; tap < 9; ++tap) {
        acc += in[(tap / 3) * scratch.pitch + (tap % 3) * channels + c] *
               scratch.weights[tap * channels + c];
      }
      acc = acc * dw.scale[c] + dw.shift[c];
      scratch.result[c] = dw.relu && 0.0f >= acc ? 0.0f : acc;
    }
    emit(p, scratch.result);
  }
}

}  // namespace

void cat_shuffle(const FeatureMap& a, const FeatureMap& b, const FeatureMap& y, Range items) {
  with_type(y.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t channels = a.channels;
    for (int64_t item = items.begin; item < items.end; ++item) {
      if (y.layout == Layout::kContiguous) {
        const int64_t image = item / channels, c = item % channels;
        const size_t bytes = static_cast<size_t>(y.plane()) * sizeof(T);
        std::memcpy(output_plane<T>(y, image, 2 * c), plane_of<T>(a, image, c), bytes);
        std::memcpy(output_plane<T>(y, image, 2 * c + 1), plane_of<T>(b, image, c), bytes);
      } else {
        const int64_t image = item / y.height, row = item % y.height;
        const T* left = row_of<T>(a, image, row);
        const T* right = row_of<T>(b, image, row);
        T* out = output_row<T>(y, image, row);
#pragma GCC ivdep
        for (int64_t i = 0; i < y.width * channels; ++i) {
          out[2 * i] = left[i];
          out[2 * i + 1] = right[i];
        }
      }
    }
  });
}

void dw_conv3x3(const FeatureMap& x, const Depthwise3x3& dw, const FeatureMap& y, Range items,
                float* scratch) {
  with_type(y.dtype, [&](auto type) {
    using T = decltype(type);
    if (y.layout == Layout::kContiguous) {
      for (int64_t item = items.begin; item < items.end; ++item) {
        const int64_t image = item / y.channels, c = item % y.channels;
        dw_plane(plane_of<T>(x, image, c), x, dw, c, output_plane<T>(y, image, c), scratch);
      }
      return;
    }
    const RowScratch rows(scratch, x.width, x.channels);
    transpose_weights(dw, x.channels, rows.weights);
    for (int64_t item = items.begin; item < items.end; ++item) {
      const int64_t image = item / y.height, row = item % y.height;
      T* out = output_row<T>(y, image, row);
      dw_channels_last_row<T>(x, image, 0, x.channels, dw, row, rows,
                              [&](int64_t p, const float* values) {
                                write_floats(values, y.channels, out + p * y.channels, 1);
                              });
    }
  });
}

void split_dw_cat_shuffle(const FeatureMap& x, const Depthwise3x3& dw, const FeatureMap& y,
                          Range items, float* scratch) {
  with_type(y.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t half = x.channels / 2;
    if (y.layout == Layout::kContiguous) {
      for (int64_t item = items.begin; item < items.end; ++item) {
        const int64_t image = item / half, c = item % half;
        std::memcpy(output_plane<T>(y, image, 2 * c), plane_of<T>(x, image, c),
                    static_cast<size_t>(x.plane()) * sizeof(T));
        dw_plane(plane_of<T>(x, image, half + c), x, dw, c, output_plane<T>(y, image, 2 * c + 1),
                 scratch);
      }
      return;
    }
    const RowScratch rows(scratch, x.width, half);
    transpose_weights(dw, half, rows.weights);
    for (int64_t item = items.begin; item < items.end; ++item) {
      const int64_t image = item / y.height, row = item % y.height;
      const T* in = row_of<T>(x, image, row);
      T* out = output_row<T>(y, image, row);
      dw_channels_last_row<T>(x, image, half, half, dw, row, rows,
                              [&](int64_t p, const float* values) {
                                const T* passthrough = in + p * x.channels;
                                T* pixel = out + p * x.channels;
                                for (int64_t c = 0; c < half; ++c) {
                                  pixel[2 * c] = passthrough[c];
                                  from_float(values[c], pixel[2 * c + 1]);
                                }
                              });
    }
  });
}

}  // namespace snv2::cpu::SNV2_ISA
