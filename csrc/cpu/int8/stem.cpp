// Stem on bytes: act(conv3x3 stride 2) and maxpool3x3 stride 2 in one pass, as cpu/stem.cpp.
//
// The image becomes words, the bytes of a pixel's channels, whatever the caller's dtype and layout;
// what pads it is the byte that stands for zero. Rounding keeps the order of numbers, so pooling is
// done on bytes.
#include <algorithm>
#include <cstring>

#include "cpu/convert.h"
#include "cpu/int8/kernels.h"
#include "cpu/int8/products.h"

namespace snv2::cpu::SNV2_ISA::int8 {
namespace {

constexpr int kChannels = 4;  // in a word

// The byte nearest to a value, halves to even.
SNV2_INLINE uint32_t rounded(float v) {
  const float positive = v > 0.0f ? v : 0.0f;
  const float clamped = positive < 255.0f ? positive : 255.0f;
  return bits_of(clamped + 8388608.0f) & 0xff;  // what 2^23 is added to is in the low bits
}

// The byte of each channel's value.
struct Conversion {
  const float* factors;
  const float* summands;

  SNV2_INLINE uint32_t operator()(float value, int64_t channel) const {
    return rounded(value * factors[channel] + summands[channel]);
  }

  // Returns whether the conversion leaves all bytes as they are.
  bool keeps(int64_t channels) const {
    for (int64_t c = 0; c < channels; ++c) {
      if (factors[c] != 1.0f || summands[c] != 0.0f) return false;
    }
    return true;
  }
};

SNV2_INLINE float to_float(uint8_t value) { return static_cast<float>(value); }
using SNV2_ISA::to_float;

template <class T>
SNV2_INLINE Vec load_floats(const T* x, int64_t stride) {
  if constexpr (std::is_same_v<T, float>) {
    if (stride == 1) return load(x);
  }
  Vec v;
  for (int i = 0; i < kLanes; ++i) v[i] = to_float(x[i * stride]);
  return v;
}

// Words of `count` pixels from the channels [first, first + live).
template <class T>
void read_words(const T* x, int64_t pixel_stride, int64_t channel_stride, int64_t count,
                int64_t first, int64_t live, const Conversion& convert_to, uint32_t* y) {
  const T* const planes = x + first * channel_stride;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    // As four pixels of each of some planes, with the channels for pixels.
    Vec channels[kQuad] = {};
    unroll<kChannels>([&](auto c) SNV2_INLINED {
      if (c < live) {
        const T* const from = planes + c * channel_stride + i * pixel_stride;
        channels[c] = bounded(load_floats(from, pixel_stride) * convert_to.factors[first + c] +
                              convert_to.summands[first + c]);
      }
    });
    store_quad(reinterpret_cast<uint8_t*>(y + i), channels);
  }
  for (; i < count; ++i) {
    y[i] = 0;
    for (int64_t c = 0; c < live; ++c) {
      const T value = planes[c * channel_stride + i * pixel_stride];
      y[i] |= convert_to(to_float(value), first + c) << (8 * c);
    }
  }
}

// Pixels of three bytes as they are; the fourth of a word is any, as its weight is zero.
void copy_words(const uint8_t* x, int64_t count, uint32_t* y) {
  using Bytes = uint8_t __attribute__((vector_size(16)));
  int64_t i = 0;
  // What is read ends with the row.
  for (; 3 * i + 16 <= 3 * count; i += 4) {
    const Bytes in = load_ints<Bytes>(x + 3 * i);
    const Bytes words =
        __builtin_shufflevector(in, in, 0, 1, 2, 2, 3, 4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11);
    std::memcpy(y + i, &words, sizeof words);
  }
  for (; i < count; ++i) {
    y[i] = 0;
    std::memcpy(y + i, x + 3 * i, 3);
  }
}

// Rows [first, first + kStemInRows) of all channels.
template <class T>
void read_strip(const Stem<UInt8>& op, int64_t first, uint32_t* strip) {
  const FeatureMap& x = op.x;
  const int64_t pitch = stem_pitch(x.width);
  const Conversion conversion{op.affine, op.affine + x.channels};
  const bool as_is = std::is_same_v<T, uint8_t> && x.channels == 3 && x.pixel_stride() == 3 &&
                     conversion.keeps(x.channels);
  const T* const image = static_cast<const T*>(x.data) + op.image * x.channels * x.plane();
  for (int64_t c = 0; c < x.channels; c += kChannels) {
    const int64_t live = std::min<int64_t>(kChannels, x.channels - c);
    uint32_t padding = 0;
    for (int64_t i = 0; i < live; ++i)
      padding |= rounded(op.affine[2 * x.channels + c + i]) << (8 * i);
    for (int64_t i = 0; i < kStemInRows; ++i) {
      uint32_t* const out = strip + (c / kChannels * kStemInRows + i) * pitch;
      const int64_t row = first + i;
      if (row < 0 || row >= x.height) {
        std::fill(out, out + pitch, padding);
        continue;
      }
      const T* const in = image + row * x.width * x.pixel_stride();
      out[0] = padding;
      if constexpr (std::is_same_v<T, uint8_t>) {
        if (as_is) copy_words(in, x.width, out + 1);
      }
      if (!as_is) {
        read_words(in, x.pixel_stride(), x.channel_stride(), x.width, c, live, conversion, out + 1);
      }
      std::fill(out + 1 + x.width, out + pitch, padding);
    }
  }
}

// The largest of three rows of 16 bytes at x, and of their neighbours.
using Pixel = uint8_t __attribute__((vector_size(kPanel)));

SNV2_INLINE Pixel larger(Pixel a, Pixel b) { return a > b ? a : b; }

// One pooled row of one panel from three rows with a pixel of padding at both ends.
void pool_row(const uint8_t* const (&rows)[3], int64_t width, uint8_t* y) {
  const auto column = [&](int64_t x) SNV2_INLINED {
    const auto at = [&](int row) SNV2_INLINED { return load_ints<Pixel>(rows[row] + x * kPanel); };
    return larger(larger(at(0), at(1)), at(2));
  };
  Pixel left = column(0);
  for (int64_t x = 0; x < width; ++x) {
    const Pixel right = column(2 * x + 2);
    const Pixel most = larger(larger(left, column(2 * x + 1)), right);
    std::memcpy(y + x * kPanel, &most, sizeof most);
    left = right;
  }
}

}  // namespace

void stem(const Stem<UInt8>& op, Range out_rows, float* scratch) {
  const int64_t panels = panels_of(op.out_channels);
  const int64_t words = ceil_div(op.x.channels, kChannels);
  const int64_t in_pitch = stem_pitch(op.x.width);
  const int64_t conv_width = op.conv_width(), out_width = op.out_width();
  const int64_t conv_pitch = (conv_width + 2) * kPanel;  // one panel of one row
  const int64_t conv_row = panels * conv_pitch;
  const Factors factors(op.weights, op.offsets, words * 9, op.out_channels);
  auto* const strip = reinterpret_cast<uint32_t*>(scratch);
  auto* const conv = reinterpret_cast<uint8_t*>(scratch + stem_strip(words, op.x.width));

  for (int64_t begin = out_rows.begin; begin < out_rows.end; begin += kStemRows) {
    const int64_t end = std::min(begin + kStemRows, out_rows.end);
    const int64_t first_conv = 2 * begin - 1;
    const int64_t conv_rows = 2 * (end - begin) + 1;
    if (op.x.dtype == DType::kUint8) {
      read_strip<uint8_t>(op, 2 * first_conv - 1, strip);
    } else {
      with_type(op.x.dtype,
                [&](auto type) { read_strip<decltype(type)>(op, 2 * first_conv - 1, strip); });
    }
    // The last row of the strip before is the first of this one.
    const int64_t ready = begin > out_rows.begin ? 1 : 0;
    if (ready == 1) std::memcpy(conv, conv + 2 * kStemRows * conv_row, conv_row);
    for (int64_t r = ready; r < conv_rows; ++r) {
      uint8_t* const out = conv + r * conv_row;
      if (first_conv + r < 0 || first_conv + r >= op.conv_height()) {
        std::memset(out, 0, conv_row);
        continue;
      }
      for (int64_t panel = 0; panel < panels; ++panel) {
        std::memset(out + panel * conv_pitch, 0, kPanel);
        std::memset(out + (panel + 1) * conv_pitch - kPanel, 0, kPanel);
      }
      const auto* const x = reinterpret_cast<const uint8_t*>(strip + 2 * r * in_pitch);
      product<2 * kChannels>(factors, {0, panels}, x, conv_width, [&](int64_t panel) {
        return ToMap{out + panel * conv_pitch + kPanel, conv_pitch};
      });
    }
    for (int64_t panel = 0; panel < panels; ++panel) {
      auto* const y = bytes(op.y) + panel * op.out_height() * out_width * kPanel;
      for (int64_t row = begin; row < end; ++row) {
        const uint8_t* const top = conv + 2 * (row - begin) * conv_row + panel * conv_pitch;
        pool_row({top, top + conv_row, top + 2 * conv_row}, out_width,
                 y + row * out_width * kPanel);
      }
    }
  }
}

}  // namespace snv2::cpu::SNV2_ISA::int8
