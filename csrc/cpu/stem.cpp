// Stem: act(conv3x3 stride 2) and maxpool3x3 stride 2 in one pass.
//
// A strip of input rows is copied to rows of words with a border of zeros, which also takes care of
// the caller's dtype and layout; a channel that is left over fills a word alone. On it the
// convolution is a pointwise product: its taps are words at constant offsets, and neighbouring
// outputs are two of them apart.
// The convolution's rows stay in scratch; only pooled rows are written.
#include <limits>

#include "cpu/activation.h"
#include "cpu/convert.h"
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

// Whether some results are below zero.
constexpr bool is_signed(Activation kind) {
  return kind != Activation::kRelu && kind != Activation::kRelu6;
}

// One pooled row of one panel from three rows with a pixel of padding at both ends.
template <bool kSigned>
void pool_row(const float* const (&rows)[3], int64_t width, Element* y) {
  const auto larger = [](Vec a, Vec b) { return kSigned ? max_any(a, b) : max_relu(a, b); };
  for (int v = 0; v < kVecs; ++v) {
    const int64_t lane = v * kLanes;
    const auto column = [&](int64_t x) {
      const int64_t at = x * kPanel + lane;
      return larger(larger(load(rows[0] + at), load(rows[1] + at)), load(rows[2] + at));
    };
    Vec left = column(0);
    for (int64_t x = 0; x < width; ++x) {
      const Vec right = column(2 * x + 2);
      store(y + x * kPanel + lane, larger(larger(left, column(2 * x + 1)), right));
      left = right;
    }
  }
}

}  // namespace

void stem(const Stem<Element>& op, Range out_rows, float* scratch) {
  const int64_t panels = panels_of(op.out_channels);
  const int64_t words = ceil_div(op.x.channels, kWordPlanes);
  const int64_t depth = words * 9;
  const int64_t in_pitch = stem_pitch(op.x.width) * kWordPlanes;
  const int64_t conv_width = op.conv_width();
  const int64_t conv_pitch = (conv_width + 2) * kPanel;  // one panel of one row
  const int64_t conv_row = panels * conv_pitch;
  const int64_t out_width = op.out_width();
  const bool with_sign = is_signed(op.act.kind);
  const float border = with_sign ? -std::numeric_limits<float>::infinity() : 0.0f;
  Element* const strip = reinterpret_cast<Element*>(scratch);
  float* const conv = scratch + stem_strip(words, op.x.width);

  for (int64_t begin = out_rows.begin; begin < out_rows.end; begin += kStemRows) {
    const int64_t end = begin + kStemRows < out_rows.end ? begin + kStemRows : out_rows.end;
    const int64_t first_conv = 2 * begin - 1;
    const int64_t conv_rows = 2 * (end - begin) + 1;

    // Read
    with_type(op.x.dtype,
              [&](auto type) { read_strip<decltype(type)>(op, 2 * first_conv - 1, strip); });

    // Convolve; the last row of the strip before is the first of this one
    int64_t ready = 0;
    if (begin > out_rows.begin) {
      for (int64_t i = 0; i < conv_row; ++i) conv[i] = conv[2 * kStemRows * conv_row + i];
      ready = 1;
    }
    for (int64_t r = ready; r < conv_rows; ++r) {
      float* out = conv + r * conv_row;
      const bool inside = first_conv + r >= 0 && first_conv + r < op.conv_height();
      for (int64_t panel = 0; panel < panels; ++panel) {
        float* row = out + panel * conv_pitch;
        if (!inside) {
          for (int64_t i = 0; i < conv_pitch; ++i) row[i] = border;
          continue;
        }
        for (int64_t i = 0; i < kPanel; ++i) row[i] = row[conv_pitch - kPanel + i] = border;
      }
      if (!inside) continue;
      for_groups({0, panels}, op.out_channels, [&](int64_t panel, Group group) {
        const TileRow<Element, float> row{strip + 2 * r * in_pitch,
                                          op.offsets,
                                          depth,
                                          op.weights + panel * (depth + 1) * kPanel,
                                          out + panel * conv_pitch + kPanel,
                                          conv_pitch};
        activated_row<2 * kWordPlanes>(row, group, conv_width, op.act.from_panel(panel));
      });
    }

    // Pool
    for (int64_t panel = 0; panel < panels; ++panel) {
      Element* y = op.y + panel * op.out_height() * out_width * kPanel;
      for (int64_t row = begin; row < end; ++row) {
        const float* top = conv + 2 * (row - begin) * conv_row + panel * conv_pitch;
        const float* rows[3] = {top, top + conv_row, top + 2 * conv_row};
        if (with_sign) {
          pool_row<true>(rows, out_width, y + row * out_width * kPanel);
        } else {
          pool_row<false>(rows, out_width, y + row * out_width * kPanel);
        }
      }
    }
  }
}

}  // namespace snv2::cpu::SNV2_ISA
