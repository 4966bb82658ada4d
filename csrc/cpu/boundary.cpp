// The boundary between the caller's tensors (any dtype and layout) and panels.
#include "cpu/convert.h"

namespace snv2::cpu::SNV2_ISA {
namespace {

template <class T>
void import_typed(const FeatureMap& x, int64_t image, const int64_t* channels, int64_t planes,
                  Element* y, Range pixels) {
  const T* in = static_cast<const T*>(x.data) + image * x.channels * x.plane();
  const int64_t channel_stride = x.channel_stride();
  const int64_t pixel_stride = x.pixel_stride();
  for (int64_t plane = 0; plane < planes; plane += kPanel) {
    const int64_t live = planes - plane < kPanel ? planes - plane : kPanel;
    const int64_t* from = channels + plane;
    bool in_order = true;
    for (int64_t i = 0; i < live; ++i) in_order &= from[i] == from[0] + i;
    Element* panel = y + plane * x.plane();
    for (int64_t p = pixels.begin; p < pixels.end; ++p) {
      const T* pixel = in + p * pixel_stride;
      Element* out = panel + p * kPanel;
      if (in_order) {
        read_elements(pixel + from[0] * channel_stride, channel_stride, live, out);
      } else {
        for (int64_t i = 0; i < live; ++i) convert(pixel[from[i] * channel_stride], out[i]);
      }
      for (int64_t i = live; i < kPanel; ++i) out[i] = Element{};
    }
  }
}

// Pixels are taken in blocks whose lines of all panels fit L1, since neighbouring logical
// channels lie in different panels.
constexpr int64_t kBlock = 32;

template <class T>
void export_typed(const Element* x, const int32_t* offsets, const FeatureMap& y, int64_t image,
                  Range pixels) {
  T* out = static_cast<T*>(y.data) + image * y.channels * y.plane();
  const int64_t channel_stride = y.channel_stride();
  const int64_t pixel_stride = y.pixel_stride();
  for (int64_t begin = pixels.begin; begin < pixels.end; begin += kBlock) {
    const int64_t end = begin + kBlock < pixels.end ? begin + kBlock : pixels.end;
    for (int64_t c = 0; c < y.channels; ++c) {
      const Element* in = x + offsets[c];
      T* plane = out + c * channel_stride;
      for (int64_t p = begin; p < end; ++p) convert(in[p * kPanel], plane[p * pixel_stride]);
    }
  }
}

}  // namespace

void import_planes(const FeatureMap& x, int64_t image, const int64_t* channels, int64_t planes,
                   const float*, Element* y, Range pixels) {
  with_type(x.dtype, [&](auto type) {
    import_typed<decltype(type)>(x, image, channels, planes, y, pixels);
  });
}

void export_planes(const Element* x, const int32_t* offsets, const float*, const FeatureMap& y,
                   int64_t image, Range pixels) {
  with_type(y.dtype,
            [&](auto type) { export_typed<decltype(type)>(x, offsets, y, image, pixels); });
}

}  // namespace snv2::cpu::SNV2_ISA
