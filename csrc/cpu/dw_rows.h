// Depthwise 3x3 on the caller's own tensors, for dw_conv3x3, split_dw_cat_shuffle and gradients.
//
// A vector marches along a line of its map: down the columns of a plane (contiguous layout), along
// the pixels of a row with a vector of channels (channels-last). At each place it reads its three
// neighbours across the line once, and adds them to the three sums that they belong to; those stay
// in registers. So an output takes three loads, and the ends of the line need no padding.
#pragma once

#include <limits>

#include "cpu/lanes.h"

namespace snv2::cpu::SNV2_ISA {

template <class T>
T* plane_of(const FeatureMap& x, int64_t image, int64_t channel) {
  return static_cast<T*>(x.data) + (image * x.channels + channel) * x.plane();
}

template <class T>
T* row_of(const FeatureMap& x, int64_t image, int64_t row) {
  return static_cast<T*>(x.data) + (image * x.height + row) * x.width * x.channels;
}

// A convolution and what follows it, as a march takes it.
template <class V>
struct Taps {
  V weight[3][3];  // [place along the line][neighbour across it]
  V scale, shift;
  V lowest;  // of the result

  SNV2_INLINE V finish(V sum) const { return at_least(lowest, sum * scale + shift); }
};

template <class V>
SNV2_INLINE V lowest_of(bool relu) {
  return V{} - (relu ? 0.0f : std::numeric_limits<float>::infinity());
}

// Marches kCount lines that lie beside each other. load(i, in) gives the neighbours at place i, one
// more to either side than there are lines; emit(i, line, result).
template <int kCount, class V, class Load, class Emit>
SNV2_INLINE void march(const Taps<V>& taps, int64_t count, const Load& load, const Emit& emit) {
  V before[kCount] = {}, here[kCount] = {};
  for (int64_t i = 0; i < count; ++i) {
    V in[kCount + 2], after[kCount] = {};
    load(i, in);
    unroll<kCount * 3>([&](auto k) SNV2_INLINED {
      constexpr int kLine = k % kCount, kTap = k / kCount;
      const V v = in[kLine + kTap];
      before[kLine] += v * taps.weight[2][kTap];
      here[kLine] += v * taps.weight[1][kTap];
      after[kLine] += v * taps.weight[0][kTap];
    });
    unroll<kCount>([&](auto line) SNV2_INLINED {
      if (i > 0) emit(i - 1, line, taps.finish(before[line]));
      before[line] = here[line];
      here[line] = after[line];
    });
  }
  unroll<kCount>([&](auto line) SNV2_INLINED { emit(count - 1, line, taps.finish(before[line])); });
}

// One line at stride 2, of `count` places.
template <class V, class Load, class Emit>
SNV2_INLINE void march_stride2(const Taps<V>& taps, int64_t count, const Load& load,
                               const Emit& emit) {
  V here = {};
  for (int64_t i = 0; i < count; i += 2) {
    V in[3], after = {};
    load(i, in);
    unroll<3>([&](auto j) SNV2_INLINED { here += in[j] * taps.weight[1][j]; });
    if (i + 1 < count) {
      load(i + 1, in);
      unroll<3>([&](auto j) SNV2_INLINED {
        here += in[j] * taps.weight[2][j];
        after += in[j] * taps.weight[0][j];
      });
    }
    emit(i / 2, 0, taps.finish(here));
    here = after;
  }
}

// Planes -----------------------------------------------------------------------------------------

// A vector of columns of one plane, marched down: the plane's first columns, its last, both, or
// neither.
template <class T, class V, bool kFirst, bool kLast>
struct Columns {
  const T* x;  // first of the columns
  int64_t width;

  static constexpr int64_t count(int64_t) { return kLanesOf<V>; }
  SNV2_INLINE void operator()(int64_t row, V (&in)[3]) const {
    const T* const p = x + row * width;
    in[1] = load_floats<V>(p);
    in[0] = kFirst ? lane_before(in[1]) : load_floats<V>(p - 1);
    in[2] = kLast ? lane_after(in[1]) : load_floats<V>(p + 1);
  }
};

// All columns, fewer than the vector has lanes. Beside a row lie the next ones, which are written
// after it; only vectors that would end outside of the plane are cut.
template <class T, class V>
struct NarrowColumns {
  const T* x;
  int64_t height, width;

  SNV2_INLINE int64_t count(int64_t row) const {
    return (height - row) * width < kLanesOf<V> ? width : kLanesOf<V>;
  }
  SNV2_INLINE void operator()(int64_t row, V (&in)[3]) const {
    const V v = load_floats<V>(x + row * width, count(row));
    in[1] = lane_numbers<V>() < static_cast<uint32_t>(width) ? v : V{};
    in[0] = lane_before(in[1]);
    in[2] = lane_after(in[1]);
  }
};

// f(V{}, first column, columns) for vectors that cover a plane. columns(row, in) gives the
// neighbours in a row, columns.count(row) how many lanes may be read and written there.
template <class T, class F>
SNV2_INLINE void for_each_columns(const T* x, int64_t height, int64_t width, const F& f) {
  for_each_strip(width, [&](auto v, int64_t i) SNV2_INLINED {
    using V = decltype(v);
    const bool last = i + kLanesOf<V> == width;
    if (width < kLanesOf<V>) {
      f(v, i, NarrowColumns<T, V>{x, height, width});
    } else if (i == 0 && last) {
      f(v, i, Columns<T, V, true, true>{x, width});
    } else if (i == 0) {
      f(v, i, Columns<T, V, true, false>{x, width});
    } else if (last) {
      f(v, i, Columns<T, V, false, true>{x + i, width});
    } else {
      f(v, i, Columns<T, V, false, false>{x + i, width});
    }
  });
}

// A convolution of one channel.
struct Filter {
  float weight[9];
  float scale, shift;
  bool relu;

  Filter(const Depthwise3x3& dw, int64_t channel)
      : scale(dw.scale[channel]), shift(dw.shift[channel]), relu(dw.relu) {
    for (int i = 0; i < 9; ++i) weight[i] = dw.weight[channel * 9 + i];
  }

  template <class V>
  SNV2_INLINE Taps<V> taps() const {
    Taps<V> taps;
    unroll<9>([&](auto i) SNV2_INLINED { taps.weight[i / 3][i % 3] = V{} + weight[i]; });
    taps.scale = V{} + scale;
    taps.shift = V{} + shift;
    taps.lowest = lowest_of<V>(relu);
    return taps;
  }
};

// emit(row, column, count, result) gets vectors of results, of which `count` lanes may be written.
template <class T, class Emit>
SNV2_INLINE void dw_plane(const T* x, int64_t height, int64_t width, const Filter& filter,
                          const Emit& emit) {
  for_each_columns(x, height, width, [&](auto v, int64_t i, const auto& columns) SNV2_INLINED {
    using V = decltype(v);
    march<1>(filter.taps<V>(), height, columns, [&](int64_t row, int, V result) SNV2_INLINED {
      emit(row, i, columns.count(row), result);
    });
  });
}

SNV2_INLINE void dw_row_stride2(const float* x, int64_t pitch, Filter filter, int64_t width,
                                float* y) {
#pragma GCC ivdep
  for (int64_t i = 0; i < width; ++i) {
    float acc = 0.0f;
    for (int tap = 0; tap < 9; ++tap) {
      acc += x[2 * i + tap / 3 * pitch + tap % 3] * filter.weight[tap];
    }
    acc = acc * filter.scale + filter.shift;
    y[i] = filter.relu && 0.0f >= acc ? 0.0f : acc;
  }
}

// A strip of rows at a time, padded with zeros; see plane_op_scratch for what scratch holds.
template <class T>
void dw_plane_stride2(const T* x, int64_t height, int64_t width, const Filter& filter, T* y,
                      float* scratch) {
  const int64_t pitch = width + 2;
  const int64_t out_height = conv3x3_extent(height, 2), out_width = conv3x3_extent(width, 2);
  float* const out = scratch + (2 * plane_strip_rows(width) + 1) * pitch + kPanel;

  for (int64_t begin = 0; begin < out_height; begin += plane_strip_rows(width)) {
    const int64_t left = out_height - begin;
    const int64_t rows = left < plane_strip_rows(width) ? left : plane_strip_rows(width);
    for (int64_t i = 0; i < 2 * rows + 1; ++i) {
      const int64_t row = 2 * begin - 1 + i;
      float* padded = scratch + i * pitch;
      if (row < 0 || row >= height) {
        for (int64_t j = 0; j < pitch; ++j) padded[j] = 0.0f;
        continue;
      }
      padded[0] = padded[pitch - 1] = 0.0f;
      read_floats(x + row * width, width, padded + 1);
    }
    for (int64_t r = 0; r < rows; ++r) {
      dw_row_stride2(scratch + 2 * r * pitch, pitch, filter, out_width, out);
      write_floats(out, out_width, y + (begin + r) * out_width);
    }
  }
}

// Copies a plane a vector at a time, while another is convolved: the arithmetic hides the copy.
template <class T>
class PlaneCopy {
 public:
  PlaneCopy(const T* from, T* to, int64_t count) : from_(from), to_(to), count_(count) {
    if (count >= kLanes) return;
    std::memcpy(to, from, static_cast<size_t>(count) * sizeof(T));
    count_ = 0;
  }

  template <class V>
  SNV2_INLINE void step() {
    if (at_ >= count_) return;
    const int64_t at = at_ < count_ - kLanesOf<V> ? at_ : count_ - kLanesOf<V>;
    store_raw(to_ + at, load_raw<V>(from_ + at));
    at_ += kLanesOf<V>;
  }

 private:
  const T* from_;
  T* to_;
  int64_t count_;
  int64_t at_ = 0;
};

// Rows of pixels ---------------------------------------------------------------------------------

// Rows that are marched along together: they share most of what they read.
inline constexpr int kLines = 2;

// The vectors of a march along pixels. Pixels begin anywhere in a cache line, so all loads and
// stores of 64 bytes would meet two lines each.
using RowVec = std::conditional_t<kVectorBytes == 64, HalfVec, Vec>;

// Into the L2 cache: the lines of a strip of channels lie too far apart for the processor to
// foresee them. Any address will do.
template <class T>
SNV2_INLINE void prefetch(const T* p) {
  __builtin_prefetch(p, 0, 2);
}
// The lines that a vector of T, or two, will be written to.
template <int kBytes, class T>
SNV2_INLINE void prefetch_to_write(const T* p) {
  const char* const bytes = reinterpret_cast<const char*>(p);
  __builtin_prefetch(bytes, 1, 2);
  if constexpr (kBytes > 64) __builtin_prefetch(bytes + 64, 1, 2);
}

// kCount rows from `first` on, of which those outside of the map are zeros.
template <class T, int kCount>
struct Rows {
  const T* at[kCount];
  int64_t step[kCount];  // from pixel to pixel

  // x: the map's first pixel; pitch: from row to row.
  SNV2_INLINE Rows(const T* x, int64_t first, int64_t height, int64_t pitch, int64_t pixel_step) {
    static constexpr T kZeros[kLanes] = {};
    for (int64_t i = 0; i < kCount; ++i) {
      const bool inside = first + i >= 0 && first + i < height;
      at[i] = inside ? x + (first + i) * pitch : kZeros;
      step[i] = inside ? pixel_step : 0;
    }
  }

  template <class V>
  SNV2_INLINE void load(int64_t pixel, int64_t count, V (&in)[kCount]) const {
    unroll<kCount>([&](auto i)
                       SNV2_INLINED { in[i] = load_floats<V>(at[i] + pixel * step[i], count); });
  }
};

// The weights of a depthwise convolution, in the order that vectors of channels need them.
class PackedTaps {
 public:
  PackedTaps(const Depthwise3x3& dw, int64_t channels, float* scratch)
      : dw_(dw), channels_(channels), weights_(scratch) {
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t tap = 0; tap < 9; ++tap) weights_[tap * channels + c] = dw.weight[c * 9 + tap];
    }
  }

  // Returns the taps of channels [c, c + count).
  template <class V>
  SNV2_INLINE Taps<V> taps(int64_t c, int64_t count) const {
    Taps<V> taps;
    unroll<9>([&](auto i) SNV2_INLINED {
      taps.weight[i % 3][i / 3] = load_floats<V>(weights_ + i * channels_ + c, count);
    });
    taps.scale = load_floats<V>(dw_.scale + c, count);
    taps.shift = load_floats<V>(dw_.shift + c, count);
    taps.lowest = lowest_of<V>(dw_.relu);
    return taps;
  }

 private:
  const Depthwise3x3& dw_;
  int64_t channels_;
  float* weights_;  // [9][channels]
};

// Output rows, counted over all images, of channels [first, first + channels). emit(pixel, channel,
// count, result) gets vectors of results, of which `count` lanes are meant; pixels are counted over
// all images.
template <class T, class Emit>
SNV2_INLINE void dw_rows(const FeatureMap& x, int64_t first, int64_t channels,
                         const Depthwise3x3& dw, Range out_rows, float* scratch, const Emit& emit) {
  const PackedTaps packed(dw, channels, scratch);
  const int64_t height = conv3x3_extent(x.height, dw.stride);
  const int64_t width = conv3x3_extent(x.width, dw.stride);
  for (int64_t i = out_rows.begin; i < out_rows.end;) {
    const int64_t image = i / height, row = i % height;
    const bool together = row + kLines <= height && i + kLines <= out_rows.end;
    const int64_t lines = dw.stride == 1 && together ? kLines : 1;
    for_each_strip<RowVec>(channels, [&](auto v, int64_t c) SNV2_INLINED {
      using V = decltype(v);
      const int64_t count = channels < kLanesOf<V> ? channels : kLanesOf<V>;
      const Taps<V> taps = packed.taps<V>(c, count);
      const T* const from = row_of<const T>(x, image, 0) + first + c;
      const auto run = [&](auto line_count, const auto& along) SNV2_INLINED {
        const int64_t step = x.channels, pitch = x.width * step;
        const Rows<T, line_count + 2> rows(from, row * dw.stride - 1, x.height, pitch, step);
        const T* const next = from + (row * dw.stride + line_count + 1) * pitch;
        along(
            taps, x.width,
            [=, &rows](int64_t pixel, V(&in)[line_count + 2]) SNV2_INLINED {
              rows.load(pixel, count, in);
              unroll<kLines>([&](auto line)
                                 SNV2_INLINED { prefetch(next + line * pitch + pixel * step); });
            },
            [&](int64_t pixel, int line, V result)
                SNV2_INLINED { emit((i + line) * width + pixel, c, count, result); });
      };
      using One = std::integral_constant<int, 1>;
      using All = std::integral_constant<int, kLines>;
      if (dw.stride == 2) {
        run(One{}, [](const auto&... args) SNV2_INLINED { march_stride2(args...); });
      } else if (lines == kLines) {
        run(All{}, [](const auto&... args) SNV2_INLINED { march<kLines>(args...); });
      } else {
        run(One{}, [](const auto&... args) SNV2_INLINED { march<1>(args...); });
      }
    });
    i += lines;
  }
}

}  // namespace snv2::cpu::SNV2_ISA
