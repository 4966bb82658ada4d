// Products by pmaddubsw, for x86 without an instruction that sums four products of bytes.
//
// It adds products of two neighbouring bytes in 16 bits, and saturates beyond: where the two
// weights have one sign and together are above 128, as one pair in fifty. So a word of a vector of
// outputs, one of which has such a pair, is taken twice, with half of its weights each time: exact
// sums, of a sixth more words. A word takes three instructions for a pixel and a vector (pmaddubsw,
// pmaddwd by ones, paddd); as two pairs of 16 bits, which were made in the product's loop, it took
// nearly six, and without making them four.
//
// Weights are sorted out once for all pixels of a panel, into a buffer that the L1 cache holds.
#pragma once

#include <algorithm>
#include <cstring>

#include "cpu/int8/tile.h"

namespace snv2::cpu::SNV2_ISA::int8 {

// A vector of outputs: a panel, or half of one.
using OneVector = Outputs<1, (kVecs > 1)>;
static_assert(OneVector::kCount == 1);

// Words of a vector of outputs, in which no two products of neighbours saturate.
struct PairWords {
  int64_t count;
  const int32_t* offsets;  // of the map's words, in bytes
  const int8_t* weights;   // a vector for each
};

// The words of some panels.
class PairWeights {
 public:
  // Returns how many panels fit, of which 0 is none.
  static int64_t most(int64_t depth) { return kWords / depth; }

  // Sorts out the weights of vector `v` of a panel, whose place is one of those that fit. It may
  // write to the first place behind, so vectors are filled in their order.
  void fill(const Row& row, int64_t place, int64_t v) {
    const int64_t at = 2 * (place * kVecs + v) * row.depth;  // of the first of them
    int32_t* const offsets = offsets_ + at;
    int8_t* const weights = weights_ + at * kVectorBytes;
    int64_t count = 0;
    const float* w = row.weights + kRowsBefore * kPanel + v * kLanes;
    for (int64_t k = 0; k < row.depth; ++k, w += kPanel) {
      const Ints word = load_ints<Ints>(w);
      const Ints half = halved(word);
      const Ints rest = difference_of_bytes(word, half);
      // Without a branch, which would be foreseen five times of six: the word, if it fits, takes
      // the place of its first half, or else one that is written again.
      const int64_t twice = pairs_fit(word) ? 0 : 1;
      const auto put = [&](int64_t i, Ints weights_of_word) SNV2_INLINED {
        std::memcpy(weights + i * kVectorBytes, &weights_of_word, sizeof(Ints));
      };
      put(count, half);
      put(count + 1, rest);
      put(count + 2 * twice, word);
      offsets[count] = offsets[count + 1] = row.offsets[k];
      count += 1 + twice;
    }
    words_[place * kVecs + v] = {count, offsets, weights};
  }

  const PairWords& at(int64_t place, int64_t v) const { return words_[place * kVecs + v]; }

 private:
  static constexpr int64_t kWords = 256;

  PairWords words_[kMaxPanelGroup * kVecs];
  // As many as there are if all are taken twice, and one that nothing reads.
  static constexpr int64_t kPlaces = 2 * kWords * kVecs + 1;

  int32_t offsets_[kPlaces];
  alignas(64) int8_t weights_[kPlaces * kVectorBytes];
};

// Tiles of a vector of outputs, whose row and place begin at that vector.
template <int kXStride, class To>
struct Paired {
  const Row& row;
  const PairWords& words;
  const To& to;

  template <int kTilePixels>
  SNV2_INLINE void tile(int64_t pixel) const {
    IntSums<kTilePixels, OneVector> sums;
    const uint8_t* const x = row.x + pixel * kXStride;
    const int32_t* offset = words.offsets;
    const int32_t* const last = offset + words.count;
    const int8_t* w = words.weights;
#pragma GCC unroll 1
    for (; offset < last; ++offset, w += kVectorBytes) {
      const uint8_t* const word = x + *offset;
      const Ints weights = load_ints<Ints>(w);
      unroll<kTilePixels>([&](auto p) SNV2_INLINED {
        sums.template at<p, 0>() +=
            sum_of_bytes(broadcast_word<Ints>(word + p * kXStride), weights);
      });
    }
    finish<kTilePixels, OneVector>(row, sums, to, pixel);
  }

  // All of `pixels`, in tiles of equal height, up to one pixel.
  void run(int64_t pixels) const { run(pixels, std::make_integer_sequence<int, kMostPixels>{}); }

 private:
#if defined(SNV2_SMALL_TILES)
  static constexpr int kMostPixels = 4;
#elif defined(__AVX512F__)
  static constexpr int kMostPixels = 14;
#else
  static constexpr int kMostPixels = 8;
#endif

  template <int kTilePixels>
  static void tiles(const Paired& f, int64_t first, int64_t count) {
    for (int64_t i = 0; i < count; ++i) f.template tile<kTilePixels>(first + i * kTilePixels);
  }

  template <int... kPixelsMinus1>
  void run(int64_t pixels, std::integer_sequence<int, kPixelsMinus1...>) const {
    using Tiles = void (*)(const Paired&, int64_t, int64_t);
    static constexpr Tiles kTiles[] = {&tiles<kPixelsMinus1 + 1>...};
    const int64_t count = ceil_div(pixels, kMostPixels);
    const int64_t size = pixels / count, larger = pixels % count;
    if (larger > 0) kTiles[size](*this, 0, larger);
    kTiles[size - 1](*this, larger * (size + 1), count - larger);
  }
};

// Vectors of a panel that hold outputs.
inline int64_t live_vectors(int64_t panel, int64_t outputs) {
  return std::min<int64_t>(kVecs, ceil_div(outputs - panel * kPanel, kLanes));
}

// Outputs of a panel, of which `to` is the place, for `pixels` pixels.
template <int kXStride, class To>
void paired_panel(const Row& row, const PairWeights& weights, int64_t place, int64_t vectors,
                  const To& to, int64_t pixels) {
  for (int64_t v = 0; v < vectors; ++v) {
    Row moved = row;
    moved.weights += v * kLanes;
    To moved_to = to;
    moved_to.y += v * kLanes;
    Paired<kXStride, To>{moved, weights.at(place, v), moved_to}.run(pixels);
  }
}

}  // namespace snv2::cpu::SNV2_ISA::int8
