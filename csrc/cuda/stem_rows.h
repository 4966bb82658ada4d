// Rows of the stem's convolution, and what pools them: the arithmetic of one warp.
//
// In 16 bits the left operand, 16 columns of the convolution, is made from the image's lines
// themselves: lane (g, t) reads, for the two columns 2p and 2p + 1 of a pooled one, what columns 2t
// and 2t + 1 of a tile are. Depth may be summed in any order, so those are neighbours in memory
// where that can be: of the three taps in a line of a plane, two are a word, and the two columns'
// words are neighbours again; the tap that is alone in the second column is in the first one's
// word, and that of the first in its neighbour's. Of the nine taps in a line of pixels eight are
// words. 27 taps fit the depth of 32 that they need anyway, in 4 and 10 loads for both columns. The
// right operand, weights of 8 channels gathered in the same order, stays in registers.
//
// In float32 a lane takes 6 channels of 2 x 2 pixels, so that a weight read from shared memory is
// used four times.
//
// Rounding and ReLU never decrease, so the maximum may come between them: in 16 bits two channels
// of a pixel are one word then. Other activations may decrease, and come before the maximum, at the
// price of four for each result instead of one.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda/mma.h"
#include "cuda/stem_params.h"

namespace snv2::SNV2_GPU {

// The convolution of a warp: two rows of 16 columns and kChannels channels at a time --------------

// What a lane has of a row of the convolution, before ReLU or after another activation.
template <class Value, int kValues>
struct Row {
  Value values[kValues];
};
// As torch's max_pool2d: NaN wins.
template <class Value, int kValues>
SNV2_DEVICE Row<Value, kValues> larger(const Row<Value, kValues>& a, const Row<Value, kValues>& b) {
  Row<Value, kValues> out;
#pragma unroll
  for (int i = 0; i < kValues; ++i) out.values[i] = max_nan(a.values[i], b.values[i]);
  return out;
}

template <class T, Taps kTaps, class Act>
class Convolution {
 public:
  static constexpr int kBlocks = kTaps == Taps::kAny ? 2 : 3;  // of 8 channels; registers bound it
  static constexpr int kChannels = 8 * kBlocks;
  // [block of 8 channels][column 2p, 2p + 1]: channels 2t and 2t + 1.
  using Values = Row<Vector<T, 2>, 2 * kBlocks>;
  static constexpr int kTiles = (kChannels + 15) / 16;  // of the packed matrix
  static constexpr int kWeightPitch = 16 * kTiles + 8;  // elements of a tap in shared memory

  // Starts with the channels from `channel` on: weights go to shared memory, [tap][channel].
  SNV2_DEVICE void share_weights(const StemParams<T>& params, int channel) {
    weights_ = (shared_memory() + params.weights_at).template as<T>();
    const int taps = params.channels * 9, deep = (taps + 15) / 16;
    const int there = static_cast<int>(padded_rows(params.out_channels));
    for (int i = static_cast<int>(threadIdx.x); i < kTiles * deep * kWarp;
         i += static_cast<int>(blockDim.x)) {
      // A block of channels may begin within a tile.
      const int tile = channel / 16 + i / kWarp / deep, step = i / kWarp % deep;
      const int g = i % kWarp / 4, t = i % 4;
      Vector<T, 8> v{};
      if (tile * 16 < there) {
        v = load_vector<8>(Global<const T>{params.weights} +
                           ((tile * deep + step) * 256 + i % kWarp * 8));
      }
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        const int tap = step * 16 + k / 4 * 8 + 2 * t + k % 2;
        const int row = tile * 16 + k / 2 % 2 * 8 + g - channel;
        if (tap < taps && row >= 0 && row < kChannels) {
          store(weights_ + (weights_of(tap) + row), v.values[k]);
        }
      }
    }
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      const int row = channel + block * 8 + 2 * (lane_of_warp() % 4);
      const bool exists = row < params.out_channels;
      Vector<float, 2> bias{};  // padded to an even number
      if (exists) bias = load_vector<2>(Global<const float>{params.bias} + row);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        bias_[block][i] = bias_[block][2 + i] = bias.values[i];
        if constexpr (Act::kAny) {
          slopes_[2 * block + i] = exists ? slope_of(params.after, row + i) : 0.0f;
        }
      }
    }
    kind_ = params.after.kind;
  }
  // After a barrier.
  SNV2_DEVICE void load_weights() {
    const int g = lane_of_warp() / 4, t = lane_of_warp() % 4;
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      int tap[2];
      pair_of(slot, t, taps_, tap[0], tap[1]);
      mask_[slot] = (tap[0] < 0 ? 0u : 0xffffu) | (tap[1] < 0 ? 0u : 0xffff0000u);
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        T w[2];
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          w[k] = load(weights_ + (weights_of(tap[k] < 0 ? 0 : tap[k]) + block * 8 + g));
        }
        b_[block][slot / 2][slot % 2] = word_of(w[0].bits, w[1].bits) & mask_[slot];
      }
    }
  }

  // The columns for pooled columns from `first` on: a lane has 2p and 2p + 1 of p = first - 1 + g.
  SNV2_DEVICE void place(const StemParams<T>& params, const StemTile& tile, int first);

  // The row whose taps begin at `line`.
  SNV2_DEVICE void row(Shared<T> line, Values& out) const;
  SNV2_DEVICE void rows(Shared<T> line, Shared<T> next, Values& first, Values& second) const {
    row(line, first);
    row(next, second);
  }

  // Calls put(i, value) for pooled column column() of channel first_channel() + i, made of the
  // maxima of three rows. Column 2p - 1 is the lane's before it.
  template <class Put>
  SNV2_DEVICE void pool(const Values& most, const Put& put) const {
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      // As words, which are chosen whole.
      const uint32_t even = word_of(most.values[2 * block]);
      const uint32_t odd = no_right_ ? even : word_of(most.values[2 * block + 1]);
      Vector<T, 2> y = max_nan(max_nan(pair_of_word(even), pair_of_word(odd)),
                               pair_of_word(shuffle(odd, left_)));
      if constexpr (!Act::kAny) y = max_nan(y, Vector<T, 2>{});  // ReLU
#pragma unroll
      for (int half = 0; half < 2; ++half) put(block * 8 + half, y.values[half]);
    }
  }

  // Returns the column that a lane pools, of channels from first_channel() on.
  SNV2_DEVICE int column() const { return column_; }
  SNV2_DEVICE bool pools() const { return lane_of_warp() >= 4; }
  SNV2_DEVICE static int first_channel() { return 2 * (lane_of_warp() % 4); }

 private:
  static constexpr int kSize = static_cast<int>(sizeof(T));
  static constexpr int kSlots = kTaps == Taps::kAny ? 6 : 4;  // registers of a column's operand
  static constexpr int kPlaces = kTaps == Taps::kPlanes3 ? 3 : kTaps == Taps::kPixels3 ? 5 : 12;
  // Elements from a column to the next one.
  static constexpr int kNext = 2 * kPixel<kTaps>;

  // Taps [c][dy][dx] of rows 2t and 2t + 1 of a slot, negative for none.
  SNV2_DEVICE static void pair_of(int slot, int t, int taps, int& low, int& high);
  // Weights of a tap in shared memory: those of four lanes, taps that differ modulo 8, are apart.
  SNV2_DEVICE static int weights_of(int tap) {
    const int order = kTaps == Taps::kPixels3 ? tap % 9 * 3 + tap / 9 : tap;
    return order * kWeightPitch;
  }
  SNV2_DEVICE static Vector<T, 2> pair_of_word(uint32_t word) {
    Vector<T, 2> pair;
    std::memcpy(&pair, &word, sizeof pair);
    return pair;
  }
  // Returns true for lanes that read the last row's pixels for their second column first (stem.cu).
  SNV2_DEVICE static bool turned() { return (lane_of_warp() / 16 + lane_of_warp()) % 2 != 0; }
  // Reads two slots of both columns from a line.
  SNV2_DEVICE void read(Shared<T> line, int step, uint32_t (&even)[kSlots],
                        uint32_t (&odd)[kSlots]) const;

  Shared<T> weights_;
  uint32_t b_[kBlocks][kSlots / 2][2];
  float bias_[kBlocks][4];  // what a block begins with
  Activation kind_;         // this and the slopes: not for ReLU
  float slopes_[2 * kBlocks];
  int places_[kPlaces];  // where a lane's taps lie, in bytes
  uint32_t mask_[kSlots];
  int taps_, column_;
  int left_;       // the lane of column 2p - 1
  bool no_right_;  // column 2p + 1 is none of the convolution's
};

template <class T, Taps kTaps, class Act>
SNV2_DEVICE void Convolution<T, kTaps, Act>::pair_of(int slot, int t, int taps, int& low,
                                                     int& high) {
  if constexpr (kTaps == Taps::kPlanes3) {
    // Nine rows [c][dy] of three taps; the first of a row is alone. Rows of a slot differ modulo
    // four, and so do their banks (stem.cu).
    const int row = slot == 0 ? t : slot == 1 ? 4 + t : 8;
    low = slot == 2 ? 3 * t : 3 * row + 1;
    high = slot == 2 ? 3 * (4 + t) : 3 * row + 2;
    if (slot == 3 && t > 0) {
      low = -1;
      high = t == 1 ? 3 * row : -1;
    }
  } else if constexpr (kTaps == Taps::kPixels3) {
    // Three rows of nine elements [dx][c]; the first is alone.
    const auto tap = [](int dy, int element) { return element % 3 * 9 + dy * 3 + element / 3; };
    if (slot < 3) {
      const int dy = slot < 2 ? t / 2 : 2, word = slot < 2 ? 2 * slot + t % 2 : t;
      low = tap(dy, 1 + 2 * word);
      high = tap(dy, 2 + 2 * word);
    } else {
      low = t == 0 ? tap(0, 0) : -1;
      high = t < 2 ? tap(1 + t, 0) : -1;
    }
  } else {
    low = slot * 8 + 2 * t;
    high = low + 1;
    if (low >= taps) low = -1;
    if (high >= taps) high = -1;
  }
}

template <class T, Taps kTaps, class Act>
SNV2_DEVICE void Convolution<T, kTaps, Act>::place(const StemParams<T>& params,
                                                   const StemTile& tile, int first) {
  const int t = lane_of_warp() % 4, last = tile.column + tile.columns - 1;
  taps_ = params.channels * 9;
  column_ = first - 1 + lane_of_warp() / 4;
  const int p = column_ < last ? column_ : last;
  // Where column 2p - 1 is none of the convolution's, its own 2p + 1 is in the same window.
  left_ = lane_of_warp() - (p > 0 && lane_of_warp() >= 4 ? 4 : 0);
  no_right_ = 2 * p + 1 == params.conv_width;
  const int middle = (4 * p - tile.x) * kPixel<kTaps>;  // the tap in the middle of column 2p
  const auto put = [&](int i, int c, int dy, int element) {
    places_[i] = (c * params.plane_pitch + dy * params.line_pitch + middle + element) * kSize;
  };
  if constexpr (kTaps == Taps::kPlanes3) {
    put(0, t / 3, t % 3, 0);
    put(1, (4 + t) / 3, (4 + t) % 3, 0);
    put(2, 2, 2, t == 1 ? -2 : 0);
  } else if constexpr (kTaps == Taps::kPixels3) {
    put(0, 0, t / 2, 2 * (t % 2) - 2);
    put(1, 0, 2, 2 * t - 2 + (turned() ? kNext : 0));
    put(2, 0, 2, 2 * t - 2 + (turned() ? 0 : kNext));
    put(3, 0, 0, -3);
    put(4, 0, t == 1 ? 2 : 1, -3);
  } else {
#pragma unroll
    for (int i = 0; i < kPlaces; ++i) {
      int tap[2];
      pair_of(i / 2, t, taps_, tap[0], tap[1]);
      const int there = tap[i % 2] < 0 ? 0 : tap[i % 2];
      put(i, there / 9, there % 9 / 3, there % 3 - 1);
    }
  }
}

template <class T, Taps kTaps, class Act>
SNV2_DEVICE void Convolution<T, kTaps, Act>::read(Shared<T> line, int step,
                                                  uint32_t (&even)[kSlots],
                                                  uint32_t (&odd)[kSlots]) const {
  const auto bytes = Address<T>(line).template as<unsigned char>();
  const auto at = [&](int i) { return (bytes + places_[i]).template as<T>(); };
  const auto word = [](Address<T> low, Address<T> high, auto offset) {
    constexpr int kOffset = decltype(offset)::value;
    return word_of(load_vector<1, kOffset>(low).values[0].bits,
                   load_vector<1, kOffset>(high).values[0].bits);
  };
  const auto pair = [](Address<T> p, auto offset) {
    return word_of(load_vector<2, decltype(offset)::value>(p));
  };
  using This = std::integral_constant<int, 0>;
  using Next = std::integral_constant<int, kNext>;
  if constexpr (kTaps == Taps::kPlanes3) {
    if (step == 0) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const Vector<uint32_t, 2> pairs = load_vector<2>(at(row).template as<uint32_t>());
        even[row] = pairs.values[0];
        odd[row] = pairs.values[1];
      }
    } else {
      odd[2] = high_halves(even[0], even[1]);
      even[2] = shuffle_up(high_halves(odd[0], odd[1]), 4);  // the first lanes' are not wanted
      even[3] = pair(at(2), This()) & mask_[3];
      odd[3] = pair(at(2), Next()) & mask_[3];
    }
  } else if constexpr (kTaps == Taps::kPixels3) {
    if (step == 0) {
      even[0] = pair(at(0), This());
      odd[0] = pair(at(0), Next());
      even[1] = pair(at(0), std::integral_constant<int, 4>());
      odd[1] = pair(at(0), std::integral_constant<int, 4 + kNext>());
    } else {
      const uint32_t first = pair(at(1), This()), second = pair(at(2), This());
      even[2] = turned() ? second : first;
      odd[2] = turned() ? first : second;
      even[3] = word(at(3), at(4), This()) & mask_[3];
      odd[3] = word(at(3), at(4), Next()) & mask_[3];
    }
  } else {
#pragma unroll
    for (int slot = 2 * step; slot < 2 * step + 2; ++slot) {
      even[slot] = word(at(2 * slot), at(2 * slot + 1), This()) & mask_[slot];
      odd[slot] = word(at(2 * slot), at(2 * slot + 1), Next()) & mask_[slot];
    }
  }
}

template <class T, Taps kTaps, class Act>
SNV2_DEVICE void Convolution<T, kTaps, Act>::row(Shared<T> line, Values& out) const {
  uint32_t even[kSlots], odd[kSlots];
  float sums[kBlocks][4];
#pragma unroll
  for (int step = 0; step < kSlots / 2; ++step) {
    read(line, step, even, odd);
    const int slot = 2 * step;
    const Tile<T> a{{even[slot], odd[slot], even[slot + 1], odd[slot + 1]}};
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      if (step == 0) {
        mma(sums[block], a, b_[block][step], bias_[block]);
      } else {
        mma(sums[block], a, b_[block][step]);
      }
    }
  }
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
    float (&v)[4] = sums[block];
    if constexpr (Act::kAny) {
      with_activation(kind_, [&](const auto& act) {
#pragma unroll
        for (int c = 0; c < 4; ++c) v[c] = act(v[c], slopes_[2 * block + c % 2]);
      });
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      out.values[2 * block + i] = rounded_pair<T>(v[2 * i], v[2 * i + 1]);
    }
  }
}

template <Taps kTaps, class Act>
class Convolution<float, kTaps, Act> {
 public:
  static constexpr int kChannels = 24;
  // [column 2p, 2p + 1][channel].
  static constexpr int kLaneChannels = 6;
  using Values = Row<float, 2 * kLaneChannels>;
  static constexpr int kWeightPitch = kWarp;

  // To shared memory: [tap][4][6 channels, 2 unused].
  SNV2_DEVICE void share_weights(const StemParams<float>& params, int channel) {
    weights_ = (shared_memory() + params.weights_at).as<float>();
    const int taps = params.channels * 9, deep = (taps + 3) / 4;
    const int there = static_cast<int>(padded_rows(params.out_channels));
    for (int i = static_cast<int>(threadIdx.x); i < 2 * deep * 16;
         i += static_cast<int>(blockDim.x)) {
      // Two columns of rows r and r + 8. A block of channels may begin within a tile.
      const int tile = channel / 16 + i / 16 / deep;
      const int r = tile * 16 + i % 16 / 2, tap = i / 16 % deep * 4 + i % 2 * 2;
      Vector<float, 4> v{};
      if (tile * 16 < there) {
        v = load_vector<4>(Global<const float>{params.weights} +
                           ((tile * deep + tap / 4) * 64 + i % 16 * 4));
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int c = r + k % 2 * 8 - channel;
        if (c < 0 || c >= kChannels || tap + k / 2 >= taps) continue;
        store(weights_ + ((tap + k / 2) * kWeightPitch + c / kLaneChannels * 8 + c % kLaneChannels),
              v.values[k]);
      }
    }
#pragma unroll
    for (int i = 0; i < kLaneChannels; ++i) {
      const int row = channel + lane_of_warp() / 8 * kLaneChannels + i;
      bias_[i] = row < params.out_channels ? load(Global<const float>{params.bias} + row) : 0.0f;
      if constexpr (Act::kAny)
        slopes_[i] = row < params.out_channels ? slope_of(params.after, row) : 0.0f;
    }
    kind_ = params.after.kind;
  }
  SNV2_DEVICE void load_weights() {}

  SNV2_DEVICE void place(const StemParams<float>& params, const StemTile& tile, int first) {
    const int last = tile.column + tile.columns - 1;
    column_ = first - 1 + lane_of_warp() % 8;
    const int p = column_ < 0 ? 0 : column_ < last ? column_ : last;
    no_right_ = 2 * p + 1 == params.conv_width;
    taps_at_ = (4 * p - tile.x) * kPixel<kTaps>;
    channels_ = params.channels;
    plane_pitch_ = kTaps == Taps::kPixels3 ? 1 : params.plane_pitch;
    line_pitch_ = params.line_pitch;
  }

  SNV2_DEVICE void row(Shared<float> line, Values& out) const {
    Values same;
    rows(line, line, out, same);
  }
  SNV2_DEVICE void rows(Shared<float> line, Shared<float> next, Values& first,
                        Values& second) const {
    constexpr int kSize = kPixel<kTaps>;
    const Shared<float> lines[2] = {line + taps_at_, next + taps_at_};
    float v[2][2][kLaneChannels];
#pragma unroll
    for (int i = 0; i < kLaneChannels; ++i) {
      v[0][0][i] = v[0][1][i] = v[1][0][i] = v[1][1][i] = bias_[i];
    }
    for (int c = 0; c < channels_; ++c) {
#pragma unroll
      for (int dy = 0; dy < 3; ++dy) {
        // The taps of two columns are five pixels.
        float x[2][5];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
#pragma unroll
          for (int i = 0; i < 5; ++i) {
            x[r][i] = load(lines[r] + (c * plane_pitch_ + dy * line_pitch_ + (i - 1) * kSize));
          }
        }
#pragma unroll
        for (int dx = 0; dx < 3; ++dx) {
          const Shared<float> at =
              weights_ + ((c * 9 + dy * 3 + dx) * kWeightPitch + lane_of_warp() / 8 * 8);
          const Vector<float, 4> four = load_vector<4>(at);
          const Vector<float, 2> rest = load_vector<2>(at + 4);
#pragma unroll
          for (int i = 0; i < kLaneChannels; ++i) {
            const float w = i < 4 ? four.values[i % 4] : rest.values[i % 2];
#pragma unroll
            for (int r = 0; r < 2; ++r) {
              v[r][0][i] += w * x[r][dx];
              v[r][1][i] += w * x[r][dx + 2];
            }
          }
        }
      }
    }
    if constexpr (Act::kAny) {
      with_activation(kind_, [&](const auto& act) {
#pragma unroll
        for (int i = 0; i < 4 * kLaneChannels; ++i) {
          float& value = v[i / (2 * kLaneChannels)][i / kLaneChannels % 2][i % kLaneChannels];
          value = act(value, slopes_[i % kLaneChannels]);
        }
      });
    }
#pragma unroll
    for (int i = 0; i < 2 * kLaneChannels; ++i) {
      first.values[i] = v[0][i / kLaneChannels][i % kLaneChannels];
      second.values[i] = v[1][i / kLaneChannels][i % kLaneChannels];
    }
  }

  // A lane has columns 2p and 2p + 1 of pooled column p = first - 1 + lane % 8; column 2p - 1 is
  // the lane's before it, or, where there is none, that lane's own 2p + 1: place() gave it p = 0.
  template <class Put>
  SNV2_DEVICE void pool(const Values& most, const Put& put) const {
#pragma unroll
    for (int i = 0; i < kLaneChannels; ++i) {
      const float even = most.values[i];
      const float odd = no_right_ ? even : most.values[kLaneChannels + i];
      put(i, Act::apply(max_nan(max_nan(even, odd), shuffle_up(odd, 1))));
    }
  }

  SNV2_DEVICE int column() const { return column_; }
  SNV2_DEVICE bool pools() const { return lane_of_warp() % 8 > 0; }
  SNV2_DEVICE static int first_channel() { return lane_of_warp() / 8 * kLaneChannels; }

 private:
  Shared<float> weights_;
  float bias_[kLaneChannels];
  Activation kind_;  // this and the slopes: not for ReLU
  float slopes_[kLaneChannels];
  int taps_at_, channels_, plane_pitch_, line_pitch_, column_;
  bool no_right_;
};

}  // namespace snv2::SNV2_GPU
