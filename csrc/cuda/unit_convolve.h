// The depthwise convolutions of a unit, between ring and DW. unit.h puts them together.
//
// With a window of 3x3 a lane takes a vector of neighbouring results of a channel down the rows:
// eight, in float32 four. It reads a row of the ring once, as whole vectors, and adds it to the
// three rows of results that it is part of, which stay in registers. Eight lanes are eight channels
// (float32: four of two vectors), which lie in different banks. Where a row of pixels begins and
// ends, zeros come from masks, so that no lane branches. At stride 2 a row of an even number of
// pixels ends with the last window.
//
// Larger windows have no room in registers (5x5 would take the second CTA of an SM away), and rows
// of a dilated one do not follow each other: a lane takes two neighbouring results (one) and reads
// every tap and every input where it needs it.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda/unit_params.h"

namespace snv2::SNV2_GPU {

// The output rows that are convolved in one go.
struct Rows {
  int count;
  int local;  // the first one's row in its image
  int place;  // in the ring, of the input row that it is centred on
};

// The ring of MID, or of X. It has whole rows.
struct Ring {
  int size, row, width, height;  // elements of all and of a row; pixels of an image

  // `at` moved by rows, as many as it holds at most.
  SNV2_DEVICE int after(int at, int rows) const {
    const int there = at + rows * row;
    return there < size ? there : there - size;
  }
  SNV2_DEVICE int before(int at, int rows) const {
    const int there = at - rows * row;
    return there < 0 ? there + size : there;
  }
};

template <class T>
SNV2_DEVICE void unpack(uint32_t word, float (&values)[4 / sizeof(T)]) {
  if constexpr (sizeof(T) == 4) {
    std::memcpy(values, &word, sizeof word);
  } else {
    to_floats<T>(word, values);
  }
}

// The first and the last pixel of a word.
template <class T>
SNV2_DEVICE float first_of(uint32_t word) {
  if constexpr (sizeof(T) == 4) {
    float values[1];
    unpack<T>(word, values);
    return values[0];
  } else {
    return low_to_float<T>(word);
  }
}
template <class T>
SNV2_DEVICE float last_of(uint32_t word) {
  if constexpr (sizeof(T) == 4) {
    return first_of<T>(word);
  } else {
    return high_to_float<T>(word);
  }
}

// 3x3, not dilated. kEnds: windows reach beyond the last pixel of a row.
template <class T, int kStride, bool kEnds>
class Sliding {
 public:
  static constexpr int kPixels = 16 / static_cast<int>(sizeof(T));  // of a lane
  static constexpr int kGroupLanes = 8;                             // that take a group of channels

  // Starts with the results from column `first` on of the channel whose ring is `line`.
  SNV2_DEVICE void start(const Branch<T>&, Shared<float> weights, const Ring& ring, Shared<T> line,
                         int first) {
    // In pairs, which lie in different banks for all channels of a warp.
#pragma unroll
    for (int i = 0; i < kTaps + 1; i += 2) {
      const Vector<float, 2> pair = load_vector<2>(weights + i);
      taps_[i] = pair.values[0];
      taps_[i + 1] = pair.values[1];
    }
    // Results that are padding may lie beyond the row.
    const int at = first * kStride, there = at < ring.row ? at : 0;
    line_ = Address<T>(line + there);
    left_ = there > 0 ? -kPixels : 0;
    right_ = there + kPixels < ring.row ? kPixels : 0;
    left_mask_ = at > 0 ? ~0u : 0u;
    row_ = ring.row;
    size_ = ring.size;
    end_ = line_ + size_;
    if constexpr (kEnds) {
      right_mask_ = at + kPixels < ring.width ? ~0u : 0u;
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        const int left = ring.width - (at + w * kOfWord);  // pixels from this word on
        mask_[w] = left >= kOfWord ? ~0u : left > 0 ? kFirst : 0u;
      }
    }
  }

  // Calls emit(results) for `count` output rows of an image. The first one is centred on input row
  // `center` of the image, at `place`.
  template <class Emit>
  SNV2_DEVICE void rows(const Ring& ring, int center, int place, int count, const Emit& emit) {
    begin_upper();
    if (center > 0) {
      read(line_ + ring.before(place, 1));
      add<0>(upper_, upper_);
    }
    Address<T> at = line_ + place;
    read(at);
    add<1>(middle_, upper_);
#pragma unroll 1
    for (int left = count; left > 1; --left) {
      // The row that was read is the upper one of the next results: at stride 2 the one below.
      if constexpr (kStride == 1) next_upper();
      at = below(ring, at);
      read(at);
      add<2>(middle_, middle_);
      emit(middle_);
      if constexpr (kStride == 2) {
        next_upper();
        at = below(ring, at);
        read(at);
      }
      add<1>(middle_, upper_);
    }
    if (center + (count - 1) * kStride + 1 < ring.height) {
      read(below(ring, at));
      add<2>(middle_, middle_);
    }
    emit(middle_);
  }

 private:
  static constexpr int kTaps = 9;
  static constexpr int kOfWord = 4 / static_cast<int>(sizeof(T));  // pixels
  static constexpr int kWords = 4 * kStride;
  static constexpr uint32_t kFirst = 0xffffu;  // mask of the first of two pixels
  // Whether what the ring is stays in registers, which in float32 are few.
  static constexpr bool kHolds = sizeof(T) == 2;

  // Returns where the next row of the ring has the lane's pixels.
  SNV2_DEVICE Address<T> below(const Ring& ring, Address<T> row) const {
    const int size = kHolds ? size_ : ring.size;
    const Address<T> there = row + (kHolds ? row_ : ring.row);
    return is_before(there, kHolds ? end_ : line_ + size) ? there : there + -size;
  }
  // Reads a row, from the pixel left of the lane's on.
  SNV2_DEVICE void read(Address<T> row) {
    const auto at = row.template as<uint32_t>();
    const int left = left_ / kOfWord, right = right_ / kOfWord;
    // Whole vectors, of which a word is wanted: words of so many channels would lie in few banks.
    const Vector<uint32_t, 4> own = load_vector<4>(at), before = load_vector<4>(at + left);
    const Vector<uint32_t, 4> after = load_vector<4>(at + right);
    x_[0] = last_of<T>(before.values[3] & left_mask_);
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      float values[kOfWord];
      const uint32_t word = w < 4 ? own.values[w % 4] : after.values[w % 4];
      unpack<T>(kEnds ? word & mask_[w] : word, values);
#pragma unroll
      for (int i = 0; i < kOfWord; ++i) x_[1 + w * kOfWord + i] = values[i];
    }
    if constexpr (kStride == 1) x_[1 + kPixels] = first_of<T>(after.values[0] & right_mask_);
  }
  // to = from + row kRow of the window times what was read.
  template <int kRow>
  SNV2_DEVICE void add(float (&to)[kPixels], const float (&from)[kPixels]) const {
#pragma unroll
    for (int p = 0; p < kPixels; ++p) {
      float sum = from[p];
#pragma unroll
      for (int tap = 0; tap < 3; ++tap) {
        sum = multiply_add(taps_[kRow * 3 + tap], x_[p * kStride + tap], sum);
      }
      to[p] = sum;
    }
  }
  // Sums begin with the shift.
  SNV2_DEVICE void begin_upper() {
#pragma unroll
    for (int p = 0; p < kPixels; ++p) upper_[p] = taps_[kTaps];
  }
  SNV2_DEVICE void next_upper() {
    begin_upper();
    add<0>(upper_, upper_);
  }

  float taps_[kTaps + 1];
  Address<T> line_, end_;  // of the ring, for this lane
  int row_, size_;
  int left_, right_;  // elements from the lane's vector to its neighbours', or 0
  uint32_t left_mask_, right_mask_, mask_[kWords];
  float x_[kPixels * kStride + 2];
  float upper_[kPixels], middle_[kPixels];  // sums of two rows of results
};

// Any window and dilation.
template <class T, int kStride>
class Dilated {
 public:
  static constexpr int kPixels = 4 / static_cast<int>(sizeof(T));
  static constexpr int kGroupLanes = kWarp;

  SNV2_DEVICE void start(const Branch<T>& branch, Shared<float> weights, const Ring&,
                         Shared<T> line, int first) {
    window_ = branch.window;
    dilation_ = branch.dilation;
    weights_ = weights;
    line_ = line;
    first_ = first;
  }
  template <class Emit>
  SNV2_DEVICE void rows(const Ring& ring, int center, int place, int count, const Emit& emit) {
    for (int left = count; left > 0; --left) {
      row(ring, center, place, emit);
      center += kStride;
      place = ring.after(place, kStride);
    }
  }

 private:
  template <class Emit>
  SNV2_DEVICE void row(const Ring& ring, int center, int place, const Emit& emit) {
    const int half = window_ / 2;
    float sums[kPixels] = {};
    for (int ky = 0; ky < window_; ++ky) {
      const int by = (ky - half) * dilation_;
      if (center + by < 0 || center + by >= ring.height) continue;
      const Shared<T> line = line_ + (by < 0 ? ring.before(place, -by) : ring.after(place, by));
      for (int kx = 0; kx < window_; ++kx) {
        const float tap = load(weights_ + (ky * window_ + kx));
#pragma unroll
        for (int p = 0; p < kPixels; ++p) {
          const int column = (first_ + p) * kStride + (kx - half) * dilation_;
          const int clamped = column < 0 ? 0 : column < ring.width ? column : ring.width - 1;
          const float value = to_float(load(line + clamped));
          sums[p] = multiply_add(tap, column == clamped ? value : 0.0f, sums[p]);
        }
      }
    }
    const float shift = load(weights_ + window_ * window_);
#pragma unroll
    for (int p = 0; p < kPixels; ++p) sums[p] += shift;
    emit(sums);
  }

  int window_, dilation_, first_;
  Shared<float> weights_;
  Shared<T> line_;
};

// No window: the pixel itself.
template <class T, int kStride>
class Point {
 public:
  static constexpr int kPixels = 16 / static_cast<int>(sizeof(T));
  static constexpr int kGroupLanes = 8;

  SNV2_DEVICE void start(const Branch<T>&, Shared<float>, const Ring& ring, Shared<T> line,
                         int first) {
    const int there = first * kStride < ring.row ? first * kStride : 0;
    line_ = line + there;
    next_ = there + kPixels < ring.row ? kPixels : 0;
  }
  template <class Emit>
  SNV2_DEVICE void rows(const Ring& ring, int, int place, int count, const Emit& emit) {
    for (int left = count; left > 0; --left) {
      Vector<T, kPixels> vectors[kStride];
      vectors[0] = load_vector<kPixels>(line_ + place);
      if constexpr (kStride == 2) vectors[1] = load_vector<kPixels>(line_ + (place + next_));
      float pixels[kPixels];
#pragma unroll
      for (int p = 0; p < kPixels; ++p) {
        pixels[p] = to_float(vectors[p * kStride / kPixels].values[p * kStride % kPixels]);
      }
      emit(pixels);
      place = ring.after(place, kStride);
    }
  }

 private:
  Shared<T> line_;
  int next_;  // elements to the second vector, or 0
};

template <class T, int N>
SNV2_DEVICE Vector<T, N> rounded_vector(const float (&values)[N]) {
  Vector<T, N> out;
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < N; ++i) out.values[i] = values[i];
  } else {
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      const Vector<T, 2> pair = rounded_pair<T>(values[i], values[i + 1]);
      out.values[i] = pair.values[0];
      out.values[i + 1] = pair.values[1];
    }
  }
  return out;
}

template <class Window, class T, int kStride, class Act>
SNV2_DEVICE void convolve(const UnitParams<T>& params, const Branch<T>& branch, Shared<T> x,
                          int x_pitch, Shared<T> out, int out_pitch, Shared<float> weights,
                          const Rows& rows) {
  constexpr int kPixels = Window::kPixels, kAcross = kBlock / kPixels;  // lanes of a block
  constexpr int kLanes = Window::kGroupLanes, kGroups = kWarp / kLanes;
  static_assert(kLanes / kAcross == kGroupChannels<T>);
  const Ring ring{params.ring, params.row, params.width, params.heights.in};
  // A CTA of a cluster may have less than most, or nothing.
  const int items = branch.mid > 0 ? branch.groups * (params.out_row / kBlock) : 0;
  const int tasks = units_of<kGroups>(items);
  // Warps without a task of their own share those of others by rows.
  int shift = 0;
  while ((tasks << (shift + 1)) <= unit_warps() && (2 << shift) <= rows.count) ++shift;

  const int lane = lane_of_warp() % kLanes;
  for (int job = warp_of_cta(); job < tasks << shift; job += unit_warps()) {
    const int wanted_item = (job >> shift) * kGroups + lane_of_warp() / kLanes;
    const int item = wanted_item < items ? wanted_item : items - 1;
    const int block = branch.by_groups.divide(item);
    const int wanted = (item - block * branch.groups) * kGroupChannels<T> + lane / kAcross;
    const bool stores = wanted_item < items && wanted < branch.mid;
    const int channel = wanted < branch.mid ? wanted : branch.mid - 1;
    const int first = block * kBlock + lane % kAcross * kPixels;
    Window window;
    window.start(branch, weights + channel * branch.template dw_floats<Act>(), ring,
                 x + channel * x_pitch, first);
    [[maybe_unused]] const float slope = Act::kAny ? slope_of(branch.dw_after, channel) : 0.0f;
    // Rows that come before this warp's.
    const int part = job & ((1 << shift) - 1);
    const int begin = (rows.count * part) >> shift, end = (rows.count * (part + 1)) >> shift;
    int local = rows.local, place = rows.place;
    const auto move = [&](int count) {
      if (local + count < params.heights.out) {
        local += count;
        place = ring.after(place, count * kStride);
      } else {
        place = ring.after(place, params.heights.in - local * kStride);
        local = 0;
      }
    };
    const auto of_image = [&](int left) {
      return left < params.heights.out - local ? left : params.heights.out - local;
    };
    for (int left = begin; left > 0;) {
      const int count = of_image(left);
      move(count);
      left -= count;
    }

    Address<T> to(out + (channel * out_pitch + begin * params.out_row + first));
    for (int left = end - begin;;) {
      const int count = of_image(left);
      window.rows(ring, local * kStride, place, count, [&](const float (&results)[kPixels]) {
        float y[kPixels];
#pragma unroll
        for (int p = 0; p < kPixels; ++p) {
          y[p] = results[p];
          if constexpr (Act::kAny) y[p] = activated(branch.dw_after.kind, y[p], slope);
        }
        store_vector_if(stores, to, rounded_vector<T>(y));
        to = to + params.out_row;
      });
      left -= count;
      if (left == 0) break;
      move(count);
    }
  }
}

// All channels of a branch. kPoints: it may have no window. kEvenRows: rows of an even number of
// pixels have a loop of their own at stride 2, which takes registers.
template <class T, int kStride, class Act, bool kPoints, bool kEvenRows>
SNV2_DEVICE void convolve_rows(const UnitParams<T>& params, const Branch<T>& branch, Shared<T> x,
                               int x_pitch, Shared<T> out, int out_pitch, Shared<float> weights,
                               const Rows& rows) {
  const auto with = [&](auto window) {
    convolve<decltype(window), T, kStride, Act>(params, branch, x, x_pitch, out, out_pitch, weights,
                                                rows);
  };
  if constexpr (kPoints) {
    if (branch.window == 1) return with(Point<T, kStride>{});
  }
  if constexpr (Act::kAny) {
    if (branch.window > 3 || branch.dilation > 1) return with(Dilated<T, kStride>{});
  }
  if constexpr (kStride == 2 && kEvenRows) {
    if (params.width % 2 == 0) return with(Sliding<T, kStride, false>{});
  }
  with(Sliding<T, kStride, true>{});
}

}  // namespace snv2::SNV2_GPU
