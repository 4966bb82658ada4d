// Rows of the stem's convolution, and what pools them: the arithmetic of one warp.
//
// In 16 bits the right operand is made from the image's lines themselves: lane (g, t) reads for
// column g what rows 2t, 2t + 1 of a tile are. Depth may be summed in any order, so those are
// neighbours in memory where that can be: of the three taps in a line of a plane, two are a word;
// of the nine in a line of pixels, eight. 27 taps are 9 words and 9 halves, or 12 and 3: they fit
// the 32 rows that 27 need anyway, in 8 and 7 loads instead of the 27 of a copy made for ldmatrix
// (and its 27 stores). The left operand, gathered in the same order, stays in registers.
//
// In float32 a lane takes 6 channels of 2 x 2 pixels, so that a weight read from shared memory is
// used four times.
//
// Rounding and ReLU never decrease, so the maximum may come between them: in 16 bits two channels
// of a pixel are one word then. Other activations may decrease, and come before the maximum, at the
// price of four for each result instead of one.
#pragma once

#include <cstdint>

#include "cuda/activation.h"
#include "cuda/mma.h"

namespace snv2::SNV2_GPU {

constexpr int kStemColumns = 7;  // pooled, of a warp: 8 need the convolution's columns 16 and 17
constexpr int kStemWarps = 8;
// Pixels of a line before its tile: three are needed, whole sectors are loaded.
constexpr int stem_halo(bool bytes) { return bytes ? 32 : 16; }

// Where the taps of a pixel lie: in three planes, in pixels of three channels, or in any planes.
enum class Taps { kPlanes3, kPixels3, kAny };

constexpr int64_t stem_lines(int64_t rows) { return 4 * rows + 3; }
template <Taps kTaps>
constexpr int kPixel = kTaps == Taps::kPixels3 ? 3 : 1;  // elements of a line's pixel

template <class T>
struct StemParams {
  const void* in;     // [N, C, H, W] or [N, H, W, C] of T, or bytes
  const T* weights;   // packed [out, C * 9]
  const float* bias;  // [out], padded
  After after;
  const int32_t* out_table;  // [out] planes
  T* out;
  int64_t out_pitch;
  int channels, height, width;
  int out_channels, conv_height, conv_width, out_height, out_width;
  int rows, columns;            // of a tile
  int out_row;                  // elements of a row of the result's planes, padding included
  int strips, panes;            // tiles of an image, down and across
  int line_pitch, plane_pitch;  // of the lines in shared memory
  int stage_pitch, stage_row;   // of the result
  int stage_at, weights_at;     // bytes
  bool channels_last, bytes;
  int copy;  // elements that are copied at once
  float scale[4], shift[4];
};

struct StemTile {
  int64_t image;
  int row, rows, column, columns;  // pooled
  int y, x;                        // of the first line's first pixel

  template <class T>
  SNV2_DEVICE explicit StemTile(const StemParams<T>& params) {
    const int tiles = params.strips * params.panes;
    image = static_cast<int>(blockIdx.x) / tiles;
    const int tile = static_cast<int>(blockIdx.x) % tiles;
    row = tile / params.panes * params.rows;
    column = tile % params.panes * params.columns;
    rows = params.out_height - row < params.rows ? params.out_height - row : params.rows;
    columns =
        params.out_width - column < params.columns ? params.out_width - column : params.columns;
    y = 4 * row - 3;
    x = 4 * column - stem_halo(params.bytes);
  }
};

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
  static constexpr int kTiles = kTaps == Taps::kAny ? 1 : 2;  // of 16 channels; registers bound it
  static constexpr int kChannels = 16 * kTiles;
  // [tile of 16 channels][block of 8 columns][column 2t, 2t + 1]: channels g and g + 8.
  using Values = Row<Vector<T, 2>, 4 * kTiles>;
  static constexpr int kWeightPitch = kChannels + 8;  // elements of a tap in shared memory

  // Starts with the channels from `channel` on: weights go to shared memory, [tap][channel].
  SNV2_DEVICE void share_weights(const StemParams<T>& params, int channel) {
    weights_ = (shared_memory() + params.weights_at).template as<T>();
    const int taps = params.channels * 9, deep = (taps + 15) / 16;
    const int there = static_cast<int>(padded_rows(params.out_channels)) - channel;
    const Global<const T> matrix = Global<const T>{params.weights} + channel * deep * 16;
    for (int i = static_cast<int>(threadIdx.x); i < kTiles * deep * kWarp;
         i += static_cast<int>(blockDim.x)) {
      const int tile = i / kWarp, g = i % kWarp / 4, t = i % 4;
      Vector<T, 8> v{};
      if (tile / deep * 16 < there) v = load_vector<8>(matrix + i * 8);
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        const int tap = tile % deep * 16 + k / 4 * 8 + 2 * t + k % 2;
        const int row = tile / deep * 16 + k / 2 % 2 * 8 + g;
        if (tap < taps) store(weights_ + (weights_of(tap) + row), v.values[k]);
      }
    }
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) {
      const int row = channel + i * 8 + lane_of_warp() / 4;
      const float bias =
          row < params.out_channels ? load(Global<const float>{params.bias} + row) : 0.0f;
      bias_[i / 2][i % 2 * 2] = bias_[i / 2][i % 2 * 2 + 1] = bias;
      if constexpr (Act::kAny)
        slopes_[i] = row < params.out_channels ? slope_of(params.after, row) : 0.0f;
    }
    kind_ = params.after.kind;
  }
  // After a barrier.
  SNV2_DEVICE void load_weights(const StemParams<T>& params) {
    const int g = lane_of_warp() / 4, t = lane_of_warp() % 4, taps = params.channels * 9;
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      int tap[2], any[2];
      pair_of(slot, t, taps, tap[0], tap[1]);
      pair_of(slot, 0, 9, any[0], any[1]);  // for lanes that have none
      low_[slot] = place_of(params, tap[0] >= 0 ? tap[0] : any[0] >= 0 ? any[0] : 0) * kSize;
      high_[slot] = place_of(params, tap[1] >= 0 ? tap[1] : any[1] >= 0 ? any[1] : 0) * kSize;
      mask_[slot] = (tap[0] < 0 ? 0u : 0xffffu) | (tap[1] < 0 ? 0u : 0xffff0000u);
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i) {
        uint32_t word = 0;
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          if (tap[k] < 0) continue;
          const T w = load(weights_ + (weights_of(tap[k]) + i * 8 + g));
          word |= static_cast<uint32_t>(w.bits) << (16 * k);
        }
        a_[slot / 2][i / 2].a[slot % 2 * 2 + i % 2] = word;
      }
    }
  }

  // The columns for pooled columns from `first` on.
  SNV2_DEVICE void place(const StemParams<T>& params, const StemTile& tile, int first) {
    const int end = 2 * (tile.column + tile.columns);
    const int last = (end < params.conv_width ? end : params.conv_width) - 1;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      int column = 2 * first - 1 + 8 * j + lane_of_warp() / 4;
      column = column < 0 ? 0 : column < last ? column : last;
      columns_[j] = (2 * column - tile.x) * kPixel<kTaps> * kSize;
    }
  }

  // The rows whose taps begin at lines[0] and lines[1]; the second one if `both`.
  SNV2_DEVICE void rows(const StemParams<T>&, const Shared<T> (&lines)[2], bool both, Values& first,
                        Values& second) const {
    row(lines[0], first);
    if (both) row(lines[1], second);
  }

  // Calls put(channel of the block, pooled column, value) for what this lane makes of the maxima
  // of three rows.
  template <class Put>
  SNV2_DEVICE void pool(const StemParams<T>& params, const Values& most, int first,
                        const Put& put) const;

 private:
  static constexpr int kSize = static_cast<int>(sizeof(T));
  static constexpr int kSlots = kTaps == Taps::kAny ? 6 : 4;  // registers of the right operand
  static constexpr int kWords = kTaps == Taps::kPlanes3 ? 2 : kTaps == Taps::kPixels3 ? 3 : 0;

  // Taps [c][dy][dx] of rows 2t and 2t + 1 of a slot, negative for none.
  SNV2_DEVICE static void pair_of(int slot, int t, int taps, int& low, int& high);
  SNV2_DEVICE static int place_of(const StemParams<T>& params, int tap) {
    const int c = tap / 9, dy = tap % 9 / 3, dx = tap % 3;
    const int pixels = (dx - 1) * kPixel<kTaps>;
    return dy * params.line_pitch + pixels + (kTaps == Taps::kPixels3 ? c : c * params.plane_pitch);
  }
  // Weights of a tap in shared memory: those of four lanes, taps that differ modulo 8, are apart.
  SNV2_DEVICE static int weights_of(int tap) {
    const int order = kTaps == Taps::kPixels3 ? tap % 9 * 3 + tap / 9 : tap;
    return order * kWeightPitch;
  }
  SNV2_DEVICE void row(Shared<T> line, Values& out) const;

  Shared<T> weights_;
  Tile<T> a_[kSlots / 2][kTiles];
  float bias_[kTiles][4];  // what a block begins with
  Activation kind_;        // this and the slopes: not for ReLU
  float slopes_[2 * kTiles];
  int low_[kSlots], high_[kSlots];  // where a lane's taps lie, in bytes
  uint32_t mask_[kSlots];
  int columns_[2];
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
      low = t == 1 ? 3 * row : -1;
      high = -1;
    }
  } else if constexpr (kTaps == Taps::kPixels3) {
    // Three rows of nine elements [dx][c]; the first is alone.
    const auto tap = [](int dy, int element) { return element % 3 * 9 + dy * 3 + element / 3; };
    if (slot < 3) {
      low = tap(slot, 1 + 2 * t);
      high = tap(slot, 2 + 2 * t);
    } else {
      low = t == 0 ? tap(0, 0) : t == 1 ? tap(2, 0) : -1;
      high = t == 0 ? tap(1, 0) : -1;
    }
  } else {
    low = slot * 8 + 2 * t;
    high = low + 1;
    if (low >= taps) low = -1;
    if (high >= taps) high = -1;
  }
}

template <class T, Taps kTaps, class Act>
SNV2_DEVICE void Convolution<T, kTaps, Act>::row(Shared<T> line, Values& out) const {
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const Shared<unsigned char> pixel = line.template as<unsigned char>() + columns_[j];
    uint32_t b[kSlots];
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      if (slot < kWords) {
        b[slot] = load((pixel + low_[slot]).template as<uint32_t>());
      } else {
        b[slot] = load((pixel + low_[slot]).template as<T>()).bits |
                  static_cast<uint32_t>(load((pixel + high_[slot]).template as<T>()).bits) << 16;
        if (kTaps == Taps::kAny || slot == kSlots - 1) b[slot] &= mask_[slot];
      }
    }
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      float v[4];
#pragma unroll
      for (int s = 0; s < kSlots / 2; ++s) {
        const uint32_t step[2] = {b[2 * s], b[2 * s + 1]};
        if (s == 0) {
          mma(v, a_[s][i], step, bias_[i]);
        } else {
          mma(v, a_[s][i], step);
        }
      }
      if constexpr (Act::kAny) {
        with_activation(kind_, [&](const auto& act) {
#pragma unroll
          for (int c = 0; c < 4; ++c) v[c] = act(v[c], slopes_[2 * i + c / 2]);
        });
      }
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        out.values[(i * 2 + j) * 2 + c] = rounded_pair<T>(v[c], v[c + 2]);
      }
    }
  }
}

// Lane (g, t) has columns 2p - 1 and 2p of pooled columns p = first + t, first + 4 + t; column
// 2p + 1 is the next lane's. Where one does not exist, place() chose another of the three.
template <class T, Taps kTaps, class Act>
template <class Put>
SNV2_DEVICE void Convolution<T, kTaps, Act>::pool(const StemParams<T>&, const Values& most,
                                                  int first, const Put& put) const {
  const int lane = lane_of_warp(), t = lane % 4;
  const int next = (lane & ~3) | ((t + 1) & 3);
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const int column = first + 4 * j + t;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const Vector<T, 2> left = most.values[(i * 2 + j) * 2];
      uint32_t word = word_of(left);
      if (j == 0 && t == 0) word = word_of(most.values[(i * 2 + 1) * 2]);
      const uint32_t got = shuffle(word, next);
      const Vector<T, 2> right{{{static_cast<uint16_t>(got)}, {static_cast<uint16_t>(got >> 16)}}};
      Vector<T, 2> y = max_nan(max_nan(left, most.values[(i * 2 + j) * 2 + 1]), right);
      if constexpr (!Act::kAny) y = max_nan(y, Vector<T, 2>{});  // ReLU
      if (4 * j + t >= kStemColumns) continue;
      for (int half = 0; half < 2; ++half) {
        put(i * 16 + half * 8 + lane / 4, column, y.values[half]);
      }
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
  SNV2_DEVICE void load_weights(const StemParams<float>&) {}

  SNV2_DEVICE void place(const StemParams<float>&, const StemTile& tile, int first) {
    const int last = tile.column + tile.columns - 1;
    int column = first - 1 + lane_of_warp() % 8;
    column = column < 0 ? 0 : column < last ? column : last;
    column_ = (4 * column - tile.x) * kPixel<kTaps>;
  }

  SNV2_DEVICE void rows(const StemParams<float>& params, const Shared<float> (&lines)[2], bool,
                        Values& first, Values& second) const {
    constexpr int kSize = kPixel<kTaps>;
    float v[2][2][kLaneChannels];
#pragma unroll
    for (int i = 0; i < kLaneChannels; ++i) {
      v[0][0][i] = v[0][1][i] = v[1][0][i] = v[1][1][i] = bias_[i];
    }
    for (int c = 0; c < params.channels; ++c) {
      const int plane = kTaps == Taps::kPixels3 ? c : c * params.plane_pitch;
#pragma unroll
      for (int dy = 0; dy < 3; ++dy) {
        // The taps of two columns are five pixels.
        float x[2][5];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
#pragma unroll
          for (int i = 0; i < 5; ++i) {
            x[r][i] = load(lines[r] + (plane + dy * params.line_pitch + column_ + (i - 1) * kSize));
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
  // the lane's before it.
  template <class Put>
  SNV2_DEVICE void pool(const StemParams<float>& params, const Values& most, int first,
                        const Put& put) const {
    const int lane = lane_of_warp(), column = first - 1 + lane % 8;
    const bool no_left = column == 0, no_right = 2 * column + 1 == params.conv_width;
#pragma unroll
    for (int i = 0; i < kLaneChannels; ++i) {
      const float own = most.values[i];
      const float right = most.values[kLaneChannels + i];
      const float left = shuffle_up(right, 1);
      const float y = max_nan(max_nan(no_left ? own : left, own), no_right ? own : right);
      if (lane % 8 > 0) put(lane / 8 * kLaneChannels + i, column, Act::apply(y));
    }
  }

 private:
  Shared<float> weights_;
  float bias_[kLaneChannels];
  Activation kind_;  // this and the slopes: not for ReLU
  float slopes_[kLaneChannels];
  int column_;
};

}  // namespace snv2::SNV2_GPU
