// Matrix products in Intel's tiles (AMX): 16 pixels x 16 outputs, 16 words at a time.
//
// A panel of packed weights is a tile of weights already: a row for each word, 16 outputs in it.
// The other factor, rows of words, has to be made, since a gather of planes has them apart:
// `gather` copies it, a panel's words at a time, to rows of whole cache lines; a row that crosses
// lines would take a tile six times as long to load.
//
// A product of tiles takes 16 cycles for 16 pixels, 9 for 8 or fewer, whatever the words, and loads
// and stores of tiles run beside it. In a cycle that is 32 times the products of vdpbf16ps, or 8
// times those of two vpdpbusd. So what is around it takes the longer: the copies, the epilogue and
// the depthwise layer.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/amx/instructions.h"
#include "cpu/pointwise.h"

namespace snv2::cpu::SNV2_ISA {

inline constexpr int64_t kTileHeight = 16;
inline constexpr int64_t kTileWords = 16;
inline constexpr int64_t kTileFloats = kTileHeight * kPanel;
inline constexpr int kTilePanels = 4;  // of outputs at a time, each with a tile of sums
static_assert(kTilePanels <= kMaxPanelGroup);

// Rows of gathered words that are in a buffer at a time; in more words a pixel is not run in tiles.
inline constexpr int64_t kGatheredBytes = 64 * 1024;
inline constexpr int64_t kMaxTileDepth = kGatheredBytes / 4 / kTileHeight;

// Bytes of a row of gathered words.
constexpr int64_t gathered_stride(int64_t depth) {
  return ceil_div(depth, kTileWords) * kTileWords * 4;
}

// Shapes of the tiles while it lives: 0 to 3 are sums, 4 and 5 factors, 6 and 7 those of the words
// that are left over.
class Tiles {
 public:
  // `pixels` of each tile, and the words of a product of that `depth`.
  Tiles(int64_t pixels, int64_t depth) {
    const auto tail = static_cast<uint8_t>(depth % kTileWords);
    const auto rows = static_cast<uint8_t>(pixels);
    TileShapes config;
    const auto set = [&](int tile, uint8_t height, int64_t words) {
      config.rows[tile] = height;
      config.row_bytes[tile] = static_cast<uint16_t>(words * 4);
    };
    for (int i = 0; i < kTilePanels; ++i) set(i, rows, kPanel);
    set(4, rows, kTileWords);
    set(5, kTileWords, kPanel);
    if (tail > 0) {
      set(6, rows, tail);
      set(7, tail, kPanel);
    }
    SNV2_TILE_CONFIGURE(&config);
  }
  ~Tiles() { SNV2_TILE_RELEASE(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// How many tiles some pixels are cut into, of equal height, and that height.
struct Cut {
  int64_t count;
  int64_t pixels;

  // `multiple` divides the height.
  explicit Cut(int64_t all, int64_t multiple = 1)
      : count(ceil_div(all, kTileHeight)),
        pixels(ceil_div(ceil_div(all, count), multiple) * multiple) {
    count = ceil_div(all, pixels);
  }
};

// y[p][k] = the word of pixel p at x + offsets[k], for rows y that are `stride` bytes apart.
template <class In>
void gather_block(const In* x, const int32_t* offsets, int64_t depth, int64_t pixels, char* y,
                  int64_t stride) {
  constexpr int kPlanes = sizeof(float) / sizeof(In);
  constexpr int kWords = kPanel / kPlanes;  // of a pixel of a panel
  for (int64_t k = 0; k < depth;) {
    // Words of one panel
    const int32_t panel = offsets[k] & ~(kPanel - 1);
    alignas(32) int32_t index[kWords] = {};
    int count = 0;
    do {
      index[count] = (offsets[k + count] - panel) / kPlanes;
      ++count;
    } while (count < kWords && k + count < depth && (offsets[k + count] & ~(kPanel - 1)) == panel);
    const auto live = static_cast<__mmask8>((1u << count) - 1);
    const In* from = x + panel;
    char* to = y + k * 4;
    if constexpr (kWords == 8) {
      const __m256i order = _mm256_load_si256(reinterpret_cast<const __m256i*>(index));
#pragma GCC unroll 4
      for (int64_t p = 0; p < pixels; ++p, from += kPanel, to += stride) {
        const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
        _mm256_mask_storeu_epi32(to, live, _mm256_permutevar8x32_epi32(words, order));
      }
    } else {
      const __m128i order = _mm_load_si128(reinterpret_cast<const __m128i*>(index));
#pragma GCC unroll 4
      for (int64_t p = 0; p < pixels; ++p, from += kPanel, to += stride) {
        const __m128 words = _mm_loadu_ps(reinterpret_cast<const float*>(from));
        _mm_mask_storeu_ps(to, live, _mm_permutevar_ps(words, order));
      }
    }
    k += count;
  }
}

// The same in blocks whose rows stay in L1 while each panel adds its words to them.
template <class In>
void gather(const In* x, const int32_t* offsets, int64_t depth, int64_t pixels, char* y,
            int64_t stride) {
  const int64_t block = std::max<int64_t>(8, kGatheredBytes / 8 / stride);
  for (int64_t p = 0; p < pixels; p += block) {
    gather_block(x + p * kPanel, offsets, depth, std::min(block, pixels - p), y + p * stride,
                 stride);
  }
}

// Words of a pixel: `runs` of `depth` words each, that are `pitch` bytes apart.
struct TileRows {
  const char* x;   // first pixel
  int64_t stride;  // bytes between pixels
  int64_t depth;
  int64_t runs = 1;
  int64_t pitch = 0;
};

// sums[panel][pixel][output] of the products of a tile of pixels with the weights of so many
// panels, whose words begin at `weights` and are `panel` floats apart.
template <class In, int kPanels>
SNV2_INLINE void tile_product(const TileRows& rows, const float* weights, int64_t panel,
                              float* sums) {
  SNV2_TILE_ZERO(0);
  if constexpr (kPanels > 1) SNV2_TILE_ZERO(1);
  if constexpr (kPanels > 2) SNV2_TILE_ZERO(2);
  if constexpr (kPanels > 3) SNV2_TILE_ZERO(3);
  const int64_t tail = rows.depth % kTileWords;
  const float* w = weights;
#define SNV2_PANEL(index, x_tile, w_tile)          \
  if constexpr (kPanels > index) {                 \
    SNV2_TILE_LOAD(w_tile, w + index * panel, 64); \
    SNV2_TILE_DOT(In, index, x_tile, w_tile);      \
  }
#pragma GCC unroll 1
  for (int64_t run = 0; run < rows.runs; ++run) {
    const char* x = rows.x + run * rows.pitch;
    const char* const end = x + (rows.depth - tail) * 4;
#pragma GCC unroll 1
    for (; x != end; x += kTileWords * 4, w += kTileWords * kPanel) {
      SNV2_TILE_LOAD(4, x, rows.stride);
      SNV2_PANEL(0, 4, 5)
      SNV2_PANEL(1, 4, 5)
      SNV2_PANEL(2, 4, 5)
      SNV2_PANEL(3, 4, 5)
    }
    if (tail != 0) {
      SNV2_TILE_LOAD(6, x, rows.stride);
      SNV2_PANEL(0, 6, 7)
      SNV2_PANEL(1, 6, 7)
      SNV2_PANEL(2, 6, 7)
      SNV2_PANEL(3, 6, 7)
      w += tail * kPanel;
    }
  }
#undef SNV2_PANEL
  SNV2_TILE_STORE(0, sums);
  if constexpr (kPanels > 1) SNV2_TILE_STORE(1, sums + kTileFloats);
  if constexpr (kPanels > 2) SNV2_TILE_STORE(2, sums + 2 * kTileFloats);
  if constexpr (kPanels > 3) SNV2_TILE_STORE(3, sums + 3 * kTileFloats);
}

template <class In>
SNV2_INLINE void tile_product(int64_t panels, const TileRows& rows, const float* weights,
                              int64_t panel, float* sums) {
  switch (panels) {
    case 1:
      return tile_product<In, 1>(rows, weights, panel, sums);
    case 2:
      return tile_product<In, 2>(rows, weights, panel, sums);
    case 3:
      return tile_product<In, 3>(rows, weights, panel, sums);
    default:
      return tile_product<In, 4>(rows, weights, panel, sums);
  }
}

// f(first panel, panels) of groups that have their sums in tiles at a time, of equal size.
template <class F>
SNV2_INLINE void for_tile_groups(Range panels, const F& f) {
  const int64_t groups = ceil_div(panels.size(), int64_t{kTilePanels});
  for (int64_t i = 0; i < groups; ++i) {
    const Range taken = part_of(panels.size(), groups, i);
    f(panels.begin + taken.begin, taken.size());
  }
}

// Sums of two tiles: one of which the product is under way, and the one before.
class Pipeline {
 public:
  // Starts product(sums) of the next tile, and returns the sums of the one before.
  template <class F>
  SNV2_INLINE float* next(const F& product) {
    float* const before = sums_[at_];
    at_ ^= 1;
    product(sums_[at_]);
    return before;
  }
  float* last() { return sums_[at_]; }

 private:
  alignas(64) float sums_[2][kTilePanels * kTileFloats];
  int at_ = 0;
};

// f(sums, first panel, panels, first pixel, pixels) of each group of a product's panels and each
// tile of its pixels; packed weights of a panel have so many rows before them.
template <class In, class Out, class F>
void for_tiles(const Pointwise<In, Out>& op, int64_t rows_before, Range panels, Range pixels,
               const F& f) {
  alignas(64) char x[kGatheredBytes];
  Pipeline pipeline;
  const Cut cut(pixels.size());
  const int64_t stride = gathered_stride(op.depth);
  const int64_t weight_panel = (op.depth + rows_before) * kPanel;
  const int64_t at_a_time = kGatheredBytes / stride / cut.pixels * cut.pixels;
  const Tiles tiles(cut.pixels, op.depth);
  for (int64_t first = pixels.begin; first < pixels.end; first += at_a_time) {
    const int64_t count = std::min(at_a_time, pixels.end - first);
    gather(op.x + first * kPanel, op.offsets, op.depth, count, x, stride);
    for_tile_groups(panels, [&](int64_t panel, int64_t group) {
      const float* const weights = op.weights + panel * weight_panel + rows_before * kPanel;
      const auto finish = [&](float* sums, int64_t p) SNV2_INLINED {
        f(sums, panel, group, first + p, std::min(cut.pixels, count - p));
      };
      for (int64_t p = 0; p < count; p += cut.pixels) {
        float* const sums = pipeline.next([&](float* to) SNV2_INLINED {
          tile_product<In>(group, {x + p * stride, stride, op.depth}, weights, weight_panel, to);
        });
        if (p > 0) finish(sums, p - cut.pixels);
      }
      finish(pipeline.last(), (ceil_div(count, cut.pixels) - 1) * cut.pixels);
    });
  }
}

// Rows of a unit's middle map that some rows of its depthwise result read.
struct MiddleRows {
  Range rows;
  int64_t width;
  Cut cut;  // of a row

  // `multiple` divides the pixels of a tile.
  MiddleRows(const DepthwiseShape& shape, Range out_rows, int64_t multiple = 1)
      : rows{std::max<int64_t>(0, out_rows.begin * shape.stride - shape.reach()),
             std::min(shape.height, (out_rows.end - 1) * shape.stride + shape.reach() + 1)},
        width(shape.width),
        cut(shape.width, multiple) {}

  // Returns whether one row's words have room; a last tile reads beyond its row.
  bool fits(int64_t depth) const {
    return cut.count * cut.pixels * gathered_stride(depth) <= kGatheredBytes;
  }
};

// Makes rows of a unit's middle map, which fit, in tiles: roll(first panel, panels, make_row) of
// each group of panels shall call make_row(row, put) for each row in turn, which calls put(sums,
// first pixel, pixels) for each of its tiles.
template <class In, class Roll>
void expand_rows(const Pointwise<In, float>& pw1, int64_t rows_before, Range panels,
                 const MiddleRows& middle, const Roll& roll) {
  alignas(64) char x[kGatheredBytes];
  Pipeline pipeline;
  const auto [rows, width, cut] = middle;
  const int64_t stride = gathered_stride(pw1.depth);
  const int64_t weight_panel = (pw1.depth + rows_before) * kPanel;
  const Tiles tiles(cut.pixels, pw1.depth);
  // All rows at once, if there is room, else each for each group of panels.
  const int64_t beyond = cut.count * cut.pixels - width;
  const bool at_once = (rows.size() * width + beyond) * stride <= kGatheredBytes;
  const auto gather_rows = [&](int64_t row, int64_t count) {
    gather(pw1.x + row * width * kPanel, pw1.offsets, pw1.depth, count * width, x, stride);
  };
  if (at_once) gather_rows(rows.begin, rows.size());
  for_tile_groups(panels, [&](int64_t panel, int64_t group) {
    const float* const weights = pw1.weights + panel * weight_panel + rows_before * kPanel;
    const auto product = [&](int64_t row, int64_t p) SNV2_INLINED {
      if (!at_once && p == 0) gather_rows(row, 1);
      const char* const from = at_once ? x + (row - rows.begin) * width * stride : x;
      return pipeline.next([&](float* sums) SNV2_INLINED {
        tile_product<In>(group, {from + p * stride, stride, pw1.depth}, weights, weight_panel,
                         sums);
      });
    };
    product(rows.begin, 0);
    roll(panel, group, [&](int64_t row, const auto& put) SNV2_INLINED {
      for (int64_t p = 0; p < width; p += cut.pixels) {
        const int64_t next = p + cut.pixels;
        float* const sums = next < width         ? product(row, next)
                            : row + 1 < rows.end ? product(row + 1, 0)
                                                 : pipeline.last();
        put(sums, p, std::min(cut.pixels, width - p));
      }
    });
  });
}

}  // namespace snv2::cpu::SNV2_ISA
