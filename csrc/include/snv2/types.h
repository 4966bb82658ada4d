// Plain types shared by all backends. Nothing here knows PyTorch.
#pragma once

#include <cstdint>

#if defined(__GNUC__)
#define SNV2_API __attribute__((visibility("default")))
#else
#define SNV2_API
#endif

namespace snv2 {

// kUint8 is for maps inside a plan of integers, and for images as such a plan takes them.
enum class DType : int64_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kUint8 = 3 };

// Order of a dense [N, C, H, W] feature map in memory.
enum class Layout : int64_t { kContiguous = 0, kChannelsLast = 1 };

// torch.nn.functional's of that name; the order is that of snv2_kernels.packing.units.ACTIVATIONS.
enum class Activation : int64_t {
  kRelu = 0,
  kIdentity,
  kRelu6,
  kLeakyRelu,
  kPrelu,
  kSilu,
  kHardswish,
  kSigmoid,
  kHardsigmoid,
};

// Layers of a unit's branch that a step of a plan has: pw1, dw and pw2 in the paper.
inline constexpr int64_t kExpand = 1, kDepthwise = 2, kProject = 4;
// An average over 3x3 pixels, beside the others: of all nine, or of those inside the map.
inline constexpr int64_t kPool = 8, kPoolInside = 16;

constexpr int64_t size_of(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : dtype == DType::kUint8 ? 1 : 2;
}

// A dense 4-D tensor in the caller's memory.
struct FeatureMap {
  void* data;  // [N, C, H, W] elements of `dtype`, ordered by `layout`
  DType dtype;
  Layout layout;
  int64_t batch;
  int64_t channels;
  int64_t height;
  int64_t width;

  int64_t plane() const { return height * width; }
  int64_t numel() const { return batch * channels * plane(); }
  // Strides in elements. One image is channels * plane() elements in both layouts.
  int64_t channel_stride() const { return layout == Layout::kContiguous ? plane() : 1; }
  int64_t pixel_stride() const { return layout == Layout::kContiguous ? 1 : channels; }
};

// Depthwise 3x3, padding 1, then * scale + shift for each channel, then ReLU if asked.
struct Depthwise3x3 {
  const float* weight;  // [C, 3, 3]
  const float* scale;   // [C]
  const float* shift;   // [C]
  int64_t stride;       // 1 or 2
  bool relu;
};

// Gradients of a Depthwise3x3's parameters: what is written.
struct Depthwise3x3Gradients {
  float* weight;  // [C, 3, 3]
  float* scale;   // [C]
  float* shift;   // [C]
};

// What they are made of, for each channel: the sums over all pixels of gradient x input at each
// tap, and of the gradient, both where the ReLU let it through. With the sums at the taps s,
//   weight = scale s,  scale = sum of weight s,  shift = the last sum.
inline constexpr int64_t kDepthwiseSums = 10;

// A thread pool: the library's (snv2/pool.h) or the caller's. `run` calls body(arg, i) once for
// each i in [0, count), in any order, on any threads, and returns when all calls have.
struct ParallelFor {
  using Body = void (*)(void* arg, int64_t i);

  int64_t threads = 1;
  void (*run)(void* context, int64_t count, Body body, void* arg) = nullptr;
  void* context = nullptr;

  template <class F>
  void operator()(int64_t count, const F& f) const {
    if (count <= 1 || run == nullptr) {
      for (int64_t i = 0; i < count; ++i) f(i);
      return;
    }
    run(
        context, count, [](void* arg, int64_t i) { (*static_cast<const F*>(arg))(i); },
        const_cast<void*>(static_cast<const void*>(&f)));
  }
};

// Part `i` of `parts` of [0, count), sizes differing by at most one.
struct Range {
  int64_t begin;
  int64_t end;
  int64_t size() const { return end - begin; }
};

constexpr Range part_of(int64_t count, int64_t parts, int64_t i) {
  return {count * i / parts, count * (i + 1) / parts};
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Output extent of a 3x3 window with padding 1.
constexpr int64_t conv3x3_extent(int64_t extent, int64_t stride) {
  return (extent - 1) / stride + 1;
}

// Height or width behind a number of halvings.
constexpr int64_t halved(int64_t extent, int64_t halvings) {
  for (int64_t i = 0; i < halvings; ++i) extent = conv3x3_extent(extent, 2);
  return extent;
}

// A result of a plan: a map whose extents are the input's after some halvings, or scores.
struct PlanResult {
  int64_t channels;
  int64_t halvings;  // rounding up
};

}  // namespace snv2
