// The boundary between the caller's tensors and panels of bytes.
#include <algorithm>

#include "cpu/convert.h"
#include "cpu/int8/kernels.h"
#include "cpu/int8/vectors.h"

namespace snv2::cpu::SNV2_ISA::int8 {
namespace {

constexpr int64_t kBlock = 32;  // pixels, of which L1 holds the lines of all panels

template <class T>
void import_typed(const FeatureMap& x, int64_t image, const int64_t* channels, int64_t planes,
                  const float* affine, uint8_t* y, Range pixels) {
  const T* const in = static_cast<const T*>(x.data) + image * x.channels * x.plane();
  for (int64_t first = 0; first < planes; first += kPanel) {
    const int64_t live = std::min(kPanel, planes - first);
    uint8_t* const panel = y + first * x.plane();
    for (int64_t p = pixels.begin; p < pixels.end; ++p) {
      float values[kPanel] = {};
      for (int64_t i = 0; i < live; ++i) {
        const int64_t channel = channels[first + i];
        const float value = to_float(in[channel * x.channel_stride() + p * x.pixel_stride()]);
        values[i] = value * affine[channel] + affine[x.channels + channel];
      }
      for (int64_t lane = 0; lane < kPanel; lane += kLanes) {
        const Vec pixel[kQuad] = {bounded(load(values + lane))};
        store_pixels(panel + p * kPanel + lane, pixel, 1);
      }
    }
  }
}

template <class T>
void export_typed(const uint8_t* x, const int32_t* offsets, const float* affine,
                  const FeatureMap& y, int64_t image, Range pixels) {
  T* const out = static_cast<T*>(y.data) + image * y.channels * y.plane();
  for (int64_t begin = pixels.begin; begin < pixels.end; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, pixels.end);
    for (int64_t c = 0; c < y.channels; ++c) {
      const uint8_t* const in = x + offsets[c];
      T* const plane = out + c * y.channel_stride();
      const float factor = affine[c], summand = affine[y.channels + c];
      for (int64_t p = begin; p < end; ++p) {
        from_float(static_cast<float>(in[p * kPanel]) * factor + summand,
                   plane[p * y.pixel_stride()]);
      }
    }
  }
}

}  // namespace

void import_planes(const FeatureMap& x, int64_t image, const int64_t* channels, int64_t planes,
                   const float* affine, UInt8* y, Range pixels) {
  with_type(x.dtype, [&](auto type) {
    import_typed<decltype(type)>(x, image, channels, planes, affine, bytes(y), pixels);
  });
}

void export_planes(const UInt8* x, const int32_t* offsets, const float* affine, const FeatureMap& y,
                   int64_t image, Range pixels) {
  with_type(y.dtype, [&](auto type) {
    export_typed<decltype(type)>(bytes(x), offsets, affine, y, image, pixels);
  });
}

}  // namespace snv2::cpu::SNV2_ISA::int8
