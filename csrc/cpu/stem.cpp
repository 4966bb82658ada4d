// Stem: act(conv3x3 stride 2) and maxpool3x3 stride 2 in one pass.
//
// A strip of input rows is copied to rows of words with a border of zeros, which also takes care of
// the caller's dtype and layout; a channel that is left over fills a word alone. On it the
// convolution is a pointwise product: its taps are words at constant offsets, and neighbouring
// outputs are two of them apart.
#include "cpu/activation.h"
#include "cpu/convert.h"
#include "cpu/stem_strips.h"
#include "cpu/tile.h"

namespace snv2::cpu::SNV2_ISA {
namespace {

// n words of pixels `stride` apart.
template <class T>
void read_words(const T* const (&x)[kWordPlanes], int64_t stride, int64_t n, Element* y) {
  if (stride == 1) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
      for (int plane = 0; plane < kWordPlanes; ++plane) {
        convert(x[plane][i], y[i * kWordPlanes + plane]);
      }
    }
  } else {
    for (int64_t i = 0; i < n; ++i) {
      for (int plane = 0; plane < kWordPlanes; ++plane) {
        convert(x[plane][i * stride], y[i * kWordPlanes + plane]);
      }
    }
  }
}

// Rows [first, first + kStemInRows) of all channels, zero outside the image.
template <class T>
void read_strip(const Stem<Element>& op, int64_t first, Element* strip) {
  const FeatureMap& x = op.x;
  const int64_t pitch = stem_pitch(x.width) * kWordPlanes;
  const T* image = static_cast<const T*>(x.data) + op.image * x.channels * x.plane();
  for (int64_t c = 0; c < x.channels; c += kWordPlanes) {
    for (int64_t i = 0; i < kStemInRows; ++i) {
      Element* out = strip + (c / kWordPlanes * kStemInRows + i) * pitch;
      const int64_t row = first + i;
      if (row < 0 || row >= x.height) {
        for (int64_t j = 0; j < pitch; ++j) out[j] = Element{};
        continue;
      }
      const T* planes[kWordPlanes];
      for (int plane = 0; plane < kWordPlanes; ++plane) {
        const int64_t channel = c + plane < x.channels ? c + plane : c;
        planes[plane] = image + channel * x.channel_stride() + row * x.width * x.pixel_stride();
      }
      for (int64_t j = 0; j < kWordPlanes; ++j) out[j] = Element{};
      read_words(planes, x.pixel_stride(), x.width, out + kWordPlanes);
      for (int64_t j = (x.width + 1) * kWordPlanes; j < pitch; ++j) out[j] = Element{};
    }
  }
}

}  // namespace

void stem(const Stem<Element>& op, Range out_rows, float* scratch) {
  const int64_t panels = panels_of(op.out_channels);
  const int64_t depth = ceil_div(op.x.channels, kWordPlanes) * 9;
  const int64_t in_pitch = stem_pitch(op.x.width) * kWordPlanes;
  const Element* const strip = reinterpret_cast<const Element*>(scratch);
  run_stem(
      op, out_rows, scratch,
      [&](int64_t first, Element* to) {
        with_type(op.x.dtype, [&](auto type) { read_strip<decltype(type)>(op, first, to); });
      },
      [&](int64_t rows, float* out, int64_t pitch) {
        for_groups({0, panels}, op.out_channels, [&](int64_t panel, Group group) {
          const TileRow<Element, float> row{
              strip + rows * in_pitch, op.offsets, depth, op.weights + panel * (depth + 1) * kPanel,
              out + panel * pitch,     pitch};
          activated_row<2 * kWordPlanes>(row, group, op.conv_width(), op.act.from_panel(panel));
        });
      });
}

}  // namespace snv2::cpu::SNV2_ISA
