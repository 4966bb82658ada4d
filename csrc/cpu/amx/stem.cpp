// Stem in bfloat16: act(conv3x3 stride 2) in tiles and maxpool3x3 stride 2 in one pass.
//
// A strip of input rows has the words of a pixel's channels beside each other, so the taps of a row
// of the window are one run of words, which the next output's run overlaps: a tile of them is
// loaded from where they lie. Three products of tiles make a row of outputs, one for each row of
// the window.
#include "cpu/activation.h"
#include "cpu/amx/kernels.h"
#include "cpu/amx/results.h"
#include "cpu/amx/tiles.h"
#include "cpu/convert.h"
#include "cpu/lanes.h"
#include "cpu/stem_strips.h"

namespace snv2::cpu::SNV2_ISA {
namespace {

constexpr int64_t kMaxWords = 5;  // of a pixel: the taps of a row are in one tile
constexpr int64_t kMaxPanels = 8;

using Pairs = uint32_t __attribute__((vector_size(64)));

template <class T>
SNV2_INLINE Pairs bfloat16_bits(const T* x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return __builtin_convertvector(load_raw<Vec>(x), Pairs);
  } else {
    return high_halves(load_floats<Vec>(x), BFloat16{}) >> 16;
  }
}

// Words of a row of pixels, one for each two channels; a last channel without a neighbour is twice
// in its word.
template <class T>
void read_row(const FeatureMap& x, const T* row, Element* y) {
  const int64_t words = ceil_div(x.channels, 2), step = x.pixel_stride();
  for (int64_t word = 0; word < words; ++word) {
    const int64_t second = std::min(2 * word + 1, x.channels - 1);
    const T* const a = row + 2 * word * x.channel_stride();
    const T* const b = row + second * x.channel_stride();
    uint32_t* const to = reinterpret_cast<uint32_t*>(y) + word;
    int64_t i = 0;
    if (step == 1) {
      for (; i + kLanes <= x.width; i += kLanes) {
        const Pairs pairs = bfloat16_bits(a + i) | bfloat16_bits(b + i) << 16;
        if (words == 1) {
          std::memcpy(to + i, &pairs, sizeof pairs);
        } else {
          for (int lane = 0; lane < kLanes; ++lane) to[(i + lane) * words] = pairs[lane];
        }
      }
    }
    for (; i < x.width; ++i) {
      Element pair[2];
      convert(a[i * step], pair[0]);
      convert(b[i * step], pair[1]);
      std::memcpy(to + i * words, pair, sizeof pair);
    }
  }
}

// Rows [first, first + kStemInRows), zero outside the image.
template <class T>
void read_strip(const Stem<Element>& op, int64_t first, Element* strip) {
  const FeatureMap& x = op.x;
  const int64_t pixel = ceil_div(x.channels, 2) * 2;  // elements
  const int64_t pitch = stem_pitch(x.width) * pixel;
  const T* const image = static_cast<const T*>(x.data) + op.image * x.channels * x.plane();
  for (int64_t i = 0; i < kStemInRows; ++i) {
    Element* const out = strip + i * pitch;
    const int64_t row = first + i;
    if (row < 0 || row >= x.height) {
      std::fill(out, out + pitch, Element{});
      continue;
    }
    std::fill(out, out + pixel, Element{});
    read_row(x, image + row * x.width * x.pixel_stride(), out + pixel);
    std::fill(out + (x.width + 1) * pixel, out + pitch, Element{});
  }
}

}  // namespace

void stem(const Stem<Element>& op, Range out_rows, float* scratch) {
  const int64_t words = ceil_div(op.x.channels, 2), panels = panels_of(op.out_channels);
  if (words > kMaxWords || panels > kMaxPanels) {
    return avx512_bf16::kMapKernels.stem(op, out_rows, scratch);
  }
  const int64_t depth = words * 9, weight_panel = (depth + 1) * kPanel, run = 3 * words;

  // Weights in the order of a run's words: [panel][row of the window][tap][word][output].
  alignas(64) float weights[kMaxPanels * 9 * kMaxWords * kPanel];
  float* to = weights;
  for (int64_t panel = 0; panel < panels; ++panel) {
    for (int64_t tap = 0; tap < 9; ++tap) {
      for (int64_t word = 0; word < words; ++word, to += kPanel) {
        const int64_t row = 1 + word * 9 + tap;
        std::memcpy(to, op.weights + panel * weight_panel + row * kPanel, kPanel * sizeof(float));
      }
    }
  }

  Pipeline pipeline;
  const int64_t width = op.conv_width();
  const Cut cut(width);
  const Tiles tiles(cut.pixels, run);
  const int64_t pixel_bytes = words * 4, pitch_bytes = stem_pitch(op.x.width) * pixel_bytes;
  const char* const strip = reinterpret_cast<const char*>(scratch);
  run_stem(
      op, out_rows, scratch,
      [&](int64_t first, Element* rows) {
        with_type(op.x.dtype, [&](auto type) { read_strip<decltype(type)>(op, first, rows); });
      },
      [&](int64_t rows, float* out, int64_t pitch) {
        for_tile_groups({0, panels}, [&](int64_t panel, int64_t group) {
          const auto finish = [&](float* sums, int64_t p) SNV2_INLINED {
            finish_tile(sums, group, std::min(cut.pixels, width - p),
                        op.weights + panel * weight_panel, weight_panel, op.act.from_panel(panel),
                        nullptr, out + panel * pitch + p * kPanel, pitch);
          };
          for (int64_t p = 0; p < width; p += cut.pixels) {
            const char* const x = strip + rows * pitch_bytes + 2 * p * pixel_bytes;
            float* const sums = pipeline.next([&](float* next) SNV2_INLINED {
              tile_product<Element>(group, {x, 2 * pixel_bytes, run, 3, pitch_bytes},
                                    weights + panel * depth * kPanel, depth * kPanel, next);
            });
            if (p > 0) finish(sums, p - cut.pixels);
          }
          finish(pipeline.last(), (cut.count - 1) * cut.pixels);
        });
      });
}

}  // namespace snv2::cpu::SNV2_ISA
