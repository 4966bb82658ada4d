// The SIMD kernels as one table of functions for each instruction set. Every .cpp that includes
// simd.h is compiled once for each set, in a namespace of its own (SNV2_ISA).
//
// Inside a network a feature map lies in panels: element (plane, pixel) of one image is
// buffer[(plane / 16) * pixels * 16 + pixel * 16 + plane % 16]. A pixel step is always 16 elements,
// so a gather of arbitrary words is one offset for each of them. A word is 32 bits of one pixel: a
// plane of float, two neighbouring ones of BFloat16, or four of UInt8. Sums, biases, depthwise
// weights and all that is not a map are float, but in a network of integers.
#pragma once

#include <cstdint>
#include <type_traits>

#include "snv2/cpu.h"
#include "snv2/plan.h"
#include "snv2/types.h"

namespace snv2::cpu {

struct BFloat16 {
  uint16_t bits;
};

// Of maps in a network of integers; int8/ has its kernels.
struct UInt8 {
  uint8_t bits;
};

template <class T>
constexpr DType element_of() {
  return std::is_same_v<T, UInt8>      ? DType::kUint8
         : std::is_same_v<T, BFloat16> ? DType::kBFloat16
                                       : DType::kFloat32;
}

// What a layer does to its result.
struct Act {
  Activation kind;
  const float* slopes;  // [panels of outputs * 16], of kLeakyRelu and kPrelu

  Act from_panel(int64_t panel) const { return {kind, slopes + panel * kPanel}; }
};

// y[o][p] = act(bias[o] + sum_k weights[o][k] * x[offsets[k] + p * 16]), k counting words
template <class In, class Out>
struct Pointwise {
  const In* x;
  const int32_t* offsets;  // [depth], in elements from x
  int64_t depth;
  int64_t outputs;
  const float* weights;  // packed [outputs, depth]
  Out* y;                // first output panel
  int64_t y_panel;       // elements between output panels
  int64_t pixels;
  Act act;
  const Block* blocks = nullptr;  // with their own outputs and words, one after the other
  int64_t block_count = 0;        // 0: one product
  // The map, and [panels of outputs] panel of it that is added to each of y's before the
  // activation.
  const In* map = nullptr;
  const int64_t* added = nullptr;  // null: nothing is
};

// The input of a depthwise convolution, one image, and its window, which is odd.
struct DepthwiseShape {
  int64_t height;
  int64_t width;
  int64_t stride;
  int64_t window = 3;
  int64_t dilation = 1;

  int64_t out_height() const { return conv3x3_extent(height, stride); }
  int64_t out_width() const { return conv3x3_extent(width, stride); }
  // Of the window to each side, which is also the padding.
  int64_t reach() const { return window / 2 * dilation; }
};

// y = act(dw(.))
template <class T>
struct Depthwise {
  const float* weights;  // packed [panels * 16, window * window]
  Act act;
  DepthwiseShape shape;
  T* y;  // [panels][out pixels][16]
};

// y = dw(pw1(x)) with the middle map kept in a few rows of scratch.
template <class T>
struct ExpandDepthwise {
  Pointwise<T, float> pw1;  // its y, y_panel and pixels are not used
  Depthwise<T> dw;
};

// y = dw(x) on the listed panels.
template <class T>
struct PanelDepthwise {
  const T* x;
  const int64_t* panels;  // [panel count] panel of x for each output panel
  Depthwise<T> dw;
};

// y = act(average of the 3x3 pixels around each of x) on the listed panels.
template <class T>
struct AveragePool {
  const T* x;
  const int64_t* panels;  // [panel count] panel of x for each output panel
  DepthwiseShape shape;
  bool inside;  // of the pixels inside the map alone
  Act act;
  T* y;  // [panels][out pixels][16]
};

// scales = pw2(pw1(means)), of one image
struct Gate {
  const float* means;
  const int64_t* planes;  // [depth] of the means that are read
  int64_t depth;
  const float* pw1_weights;  // packed [mid, depth]
  Act pw1_act;
  int64_t mid;
  const float* pw2_weights;  // packed [outputs, mid]
  Act pw2_act;
  int64_t outputs;
  float* reduced;  // [panels of mid * 16]
  float* scales;   // [panels of outputs * 16]
};

// y = act(y * scales + x), of one image
template <class T>
struct Scale {
  T* y;  // first panel
  int64_t pixels;
  int64_t outputs;
  const float* scales;     // [panels of outputs * 16]; null: by nothing
  const T* x;              // null: nothing is added
  const int32_t* offsets;  // [outputs] of the plane that is added to each, in elements from x
  Act act;
};

template <class T>
struct Stem {
  FeatureMap x;  // the user's tensor
  int64_t image;
  const float* weights;  // packed [out, words of in * 9]
  int64_t out_channels;
  const int32_t* offsets;  // [words of in * 9] into a strip of padded rows, see stem_offsets
  T* y;                    // [panels][pooled pixels][16]
  Act act;
  const float* affine = nullptr;  // UInt8: [3][channels] factors and summands that make bytes of x,
                                  // and the byte that pads it

  int64_t conv_height() const { return conv3x3_extent(x.height, 2); }
  int64_t conv_width() const { return conv3x3_extent(x.width, 2); }
  int64_t out_height() const { return conv3x3_extent(conv_height(), 2); }
  int64_t out_width() const { return conv3x3_extent(conv_width(), 2); }
};

// The kernels of networks whose maps have elements T. All take ranges, so that the caller may split
// them over threads as it likes.
template <class T>
struct MapKernels {
  void (*pointwise)(const Pointwise<T, T>&, Range panels, Range pixels);
  // y[o] = mean over pixels of act(...)
  void (*pointwise_mean)(const Pointwise<T, T>&, Range panels);
  void (*linear)(const Pointwise<T, float>&, Range panels, Range pixels);
  void (*expand_depthwise)(const ExpandDepthwise<T>&, Range panels, Range out_rows, float* scratch);
  void (*panel_depthwise)(const PanelDepthwise<T>&, Range panels, Range out_rows, float* scratch);
  void (*average_pool)(const AveragePool<T>&, Range panels, Range out_rows);
  void (*stem)(const Stem<T>&, Range out_rows, float* scratch);

  // Mean over pixels of each plane, and what follows them.
  void (*means)(const T* x, int64_t pixels, Range panels, float* means);
  // The means of some planes as features: y[i] of panels that are y_panel elements apart.
  void (*mean_features)(const float* means, const int64_t* planes, int64_t count, T* y,
                        int64_t y_panel);
  void (*gate)(const Gate&);
  void (*scale)(const Scale<T>&, Range panels);

  // User's tensor <-> panels, pixels in `pixels` of one image. Plane i is the user's channels[i].
  // `affine` is for UInt8: [2][the user's channels] factors and summands of the conversion.
  void (*import_planes)(const FeatureMap& x, int64_t image, const int64_t* channels, int64_t planes,
                        const float* affine, T* y, Range pixels);
  void (*export_planes)(const T* x, const int32_t* offsets, const float* affine,
                        const FeatureMap& y, int64_t image, Range pixels);

  // At least `count` multiply-adds; returns how many.
  int64_t (*multiply_adds)(int64_t count);
};

// Gradients of dw_conv3x3, or of split_dw_cat_shuffle, where as many channels pass through.
struct DepthwiseBackward {
  FeatureMap grad;
  FeatureMap x;
  Depthwise3x3 dw;
  FeatureMap grad_x;
  float* sums;  // [parts][channels][kDepthwiseSums]
  int64_t channels;

  bool passthrough() const { return x.channels != channels; }
  // A part is some rows of some images, a work item some channels of a part. In the contiguous
  // layout it is one channel of whole images.
  int64_t images() const;
  int64_t row_blocks() const;
  int64_t channel_groups() const;
  int64_t parts() const { return ceil_div(x.batch, images()) * row_blocks(); }
  int64_t items() const { return parts() * channel_groups(); }
};

struct Kernels {
  const char* name;
  const MapKernels<float>* float32;
  const MapKernels<BFloat16>* bfloat16;  // null where the set cannot multiply them
  const MapKernels<UInt8>* uint8;

  // Whole-tensor ops: one plane (contiguous) or one row (channels last) for each work item.
  void (*cat_shuffle)(const FeatureMap& a, const FeatureMap& b, const FeatureMap& y, Range items);
  void (*dw_conv3x3)(const FeatureMap& x, const Depthwise3x3&, const FeatureMap& y, Range items,
                     float* scratch);
  void (*split_dw_cat_shuffle)(const FeatureMap& x, const Depthwise3x3&, const FeatureMap& y,
                               Range items, float* scratch);

  void (*cat_shuffle_backward)(const FeatureMap& grad, const FeatureMap& grad_a,
                               const FeatureMap& grad_b, Range items);
  void (*depthwise_backward)(const DepthwiseBackward&, Range items, float* scratch);
};

// Floats of scratch for one thread.
constexpr int64_t kMaxPanelGroup = 4;

// Rows of the input that lie in scratch at a time. Wide windows need no more than there are.
inline int64_t depthwise_rows(const DepthwiseShape& shape) {
  const int64_t rows = 2 * shape.reach() + 1;
  return rows <= 7 || rows < shape.height ? rows : shape.height;
}

// They and a row of zeros, each with padding at both ends, and a row of the result.
inline int64_t depthwise_scratch(const DepthwiseShape& shape) {
  const int64_t pitch = (shape.width + 2 * shape.reach()) * kPanel;
  return (depthwise_rows(shape) + 1) * kMaxPanelGroup * pitch + shape.width * kPanel;
}

// Pooled rows of the stem computed at a time, and the rows of the convolution and of the
// padded input that they need.
inline constexpr int64_t kStemRows = 4;
inline constexpr int64_t kStemConvRows = 2 * kStemRows + 1;
inline constexpr int64_t kStemInRows = 2 * kStemConvRows + 1;
constexpr int64_t stem_pitch(int64_t width) { return ceil_div(width + 2, 16) * 16; }
constexpr int64_t stem_strip(int64_t words, int64_t width) {
  return words * kStemInRows * stem_pitch(width);
}
constexpr int64_t stem_scratch(int64_t words, int64_t width, int64_t out_channels) {
  const int64_t conv_width = conv3x3_extent(width, 2);
  return stem_strip(words, width) +
         kStemConvRows * panels_of(out_channels) * (conv_width + 2) * kPanel;
}

// Offsets in elements of the 9 taps of each word of input channels in a strip.
inline void stem_offsets(int64_t words, int64_t planes, int64_t width, int32_t* offsets) {
  const int64_t pitch = stem_pitch(width);
  for (int64_t word = 0; word < words; ++word) {
    for (int64_t tap = 0; tap < 9; ++tap) {
      const int64_t row = word * kStemInRows + tap / 3;
      offsets[word * 9 + tap] = static_cast<int32_t>((row * pitch + tap % 3) * planes);
    }
  }
}

// Output rows of one plane that a whole-tensor op computes at a time: about 16 KB of input.
constexpr int64_t plane_strip_rows(int64_t width) { return width < 1024 ? 2048 / (width + 2) : 1; }

// Floats of scratch of the whole-tensor ops. Contiguous: a strip of padded input rows (at stride
// 2 two for each output row, and one) and one of results, each with a vector to spare. Channels
// last: weights and one result for each channel, three padded rows and a row of zeros.
constexpr int64_t plane_op_scratch(const FeatureMap& x) {
  const int64_t pitch = x.width + 2;
  if (x.layout == Layout::kChannelsLast) return (10 + 4 * pitch) * x.channels;
  const int64_t rows = plane_strip_rows(x.width);
  return (2 * rows + 1) * pitch + rows * pitch + 2 * kPanel;
}

template <class T>
const MapKernels<T>* maps_of(const Kernels& kernels) {
  if constexpr (std::is_same_v<T, float>) {
    return kernels.float32;
  } else if constexpr (std::is_same_v<T, UInt8>) {
    return kernels.uint8;
  } else {
    return kernels.bfloat16;
  }
}

// Elements that are worth a work item of their own.
inline constexpr int64_t kItemElements = 16 * 1024;

// Rows of grad_x that a thread computes at a time, from about 32 KB of gradients, one channel
// (contiguous layout) or a panel of them (channels-last).
constexpr int64_t backward_rows(const FeatureMap& x) {
  const int64_t rows = 8192 / (x.width * (x.layout == Layout::kContiguous ? 1 : kPanel) + 1);
  return rows < 1 ? 1 : rows < x.height ? rows : x.height;
}

// Floats of scratch. Contiguous: for a block of rows and four more the gradient, and once more that
// of stride 2, each with a vector to spare. Channels last: the weights, and two more rows.
constexpr int64_t backward_scratch(const FeatureMap& x, int64_t channels) {
  const int64_t rows = backward_rows(x);
  if (x.layout == Layout::kChannelsLast) return 9 * channels + (rows + 2) * x.width * kPanel;
  return 2 * ((rows + 4) * x.width + kPanel);
}

inline constexpr int64_t kGroupChannels = 64;
inline int64_t DepthwiseBackward::channel_groups() const {
  return x.layout == Layout::kContiguous ? channels : ceil_div(channels, kGroupChannels);
}
inline int64_t DepthwiseBackward::row_blocks() const {
  return x.layout == Layout::kContiguous ? 1 : ceil_div(x.height, backward_rows(x));
}
inline int64_t DepthwiseBackward::images() const {
  const int64_t most = x.layout == Layout::kContiguous ? 1 : kGroupChannels;
  return 1 + kItemElements / (x.plane() * (channels < most ? channels : most) + 1);
}

const Kernels& kernels();  // of the instruction set in use
void use_kernels(const Kernels& table);

}  // namespace snv2::cpu
