// The boundary between the caller's tensors (any dtype and layout) and panels of float32.
#include "cpu/convert.h"

namespace snv2::cpu::SNV2_ISA {
namespace {

template <class T>
void import_typed(const FeatureMap& x, int64_t image, float* y, Range pixels) {
  const T* in = static_cast<const T*>(x.data) + image * x.channels * x.plane();
  const int64_t channel_stride = x.channel_stride();
  const int64_t pixel_stride = x.pixel_stride();
  for (int64_t c = 0; c < x.channels; c += kPanel) {
    const int64_t live = x.channels - c < kPanel ? x.channels - c : kPanel;
    float* panel = y + c * x.plane();
    for (int64_t p = pixels.begin; p < pixels.end; ++p) {
      float* out = panel + p * kPanel;
      read_floats(in + c * channel_stride + p * pixel_stride, channel_stride, live, out);
      for (int64_t i = live; i < kPanel; ++i) out[i] = 0.0f;
    }
  }
}

// Pixels are taken in blocks whose lines of all panels fit L1, since neighbouring logical
// channels lie in different panels.
constexpr int64_t kBlock = 32;

template <class T>
void export_typed(const float* x, const int32_t* offsets, const FeatureMap& y, int64_t image,
                  Range pixels) {
  T* out = static_cast<T*>(y.data) + image * y.channels * y.plane();
  const int64_t channel_stride = y.channel_stride();
  const int64_t pixel_stride = y.pixel_stride();
  for (int64_t begin = pixels.begin; begin < pixels.end; begin += kBlock) {
    const int64_t end = begin + kBlock < pixels.end ? begin + kBlock : pixels.end;
    for (int64_t c = 0; c < y.channels; ++c) {
      const float* in = x + offsets[c];
      T* plane = out + c * channel_stride;
      for (int64_t p = begin; p < end; ++p) from_float(in[p * kPanel], plane[p * pixel_stride]);
    }
  }
}

}  // namespace

void import_planes(const FeatureMap& x, int64_t image, float* y, Range pixels) {
  with_type(x.dtype, [&](auto type) { import_typed<decltype(type)>(x, image, y, pixels); });
}

void export_planes(const float* x, const int32_t* offsets, const FeatureMap& y, int64_t image,
                   Range pixels) {
  with_type(y.dtype,
            [&](auto type) { export_typed<decltype(type)>(x, offsets, y, image, pixels); });
}

}  // namespace snv2::cpu::SNV2_ISA
