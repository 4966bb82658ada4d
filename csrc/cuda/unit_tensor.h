// The caller's tensors on their way to X and from the result, whatever their strides. unit.h puts
// it together.
//
// In both directions lanes first find out where their pixels or channels are, and then go along the
// other: an element costs no division. Of contiguous rows a lane takes as many neighbouring pixels
// as divide a row and are aligned in every one. Of pixels of channels, in 16 bits, it takes two
// channels of two pixels, which change places in registers: both sides are words.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda/unit_params.h"

namespace snv2::SNV2_GPU {

// A pixel of the caller's tensors: that of column `x` in row `row` of all images.
struct Pixel {
  int64_t image;
  int y, x;

  // `row` rows after row `y0` of image `image0`.
  SNV2_DEVICE Pixel(int64_t image0, int y0, int rows, int column, int height)
      : image(image0), y(y0 + rows), x(column) {
    while (y >= height) y -= height, ++image;
  }
};
template <class T>
SNV2_DEVICE Global<const T> at_in(const UnitParams<T>& params, const Pixel& p) {
  return Global<const T>{params.in} +
         (p.image * params.in_image + p.y * params.in_row + p.x * params.in_pixel);
}
template <class T>
SNV2_DEVICE Global<T> at_result(const UnitParams<T>& params, const Pixel& p) {
  return Global<T>{params.result} +
         (p.image * params.result_image + p.y * params.result_row + p.x * params.result_pixel);
}

// How warps share rows of `vectors` each: eight, 16 or 32 lanes take one.
struct LanesOfRows {
  int across;  // log2 of a row's lanes

  SNV2_DEVICE explicit LanesOfRows(int vectors) : across(vectors > 16 ? 5 : vectors > 8 ? 4 : 3) {}
  SNV2_DEVICE int vector() const { return lane_of_warp() & ((1 << across) - 1); }
  SNV2_DEVICE int vectors() const { return 1 << across; }
  SNV2_DEVICE int row() const {
    return (warp_of_cta() << (5 - across)) + (lane_of_warp() >> across);
  }
  SNV2_DEVICE int rows() const { return unit_warps() << (5 - across); }
};

// Load ------------------------------------------------------------------------------------------

// Columns of X that are loaded, from column `column0` of row `row0` of all images on, to columns
// `at`, at + 1, ... of X. In a ring a block is never cut.
struct TensorStep {
  int row0, column0, columns, at, wrap;

  SNV2_DEVICE int place(int column) const {
    return at + column < wrap ? at + column : at + column - wrap;
  }
};

// Starts the copy, N pixels at once. Padding is a copy of a row's last pixels: it must be there,
// but nobody looks at it.
template <int N, class T>
SNV2_DEVICE void load_contiguous(const UnitParams<T>& params, const Memory<T>& m,
                                 const TensorStep& step) {
  const int64_t image0 = params.heights.by_in.divide(step.row0);
  const int y0 = step.row0 - static_cast<int>(image0) * params.heights.in;
  const int vectors = step.columns / N;
  const LanesOfRows lanes(vectors);
  for (int v = lanes.vector(); v < vectors; v += lanes.vectors()) {
    const int column = step.column0 + v * N, rows = params.by_row.divide(column);
    const int x = column - rows * params.row, last = params.width - N;
    const Global<const T> from =
        at_in(params, Pixel(image0, y0, rows, x < last ? x : last, params.heights.in));
    Address<T> to(m.x + (lanes.row() * m.x_pitch + step.place(v * N)));
#pragma unroll 2
    for (int row = lanes.row(); row < params.in_channels; row += lanes.rows()) {
      const Global<const T> source = from + load(m.in_table + row) * params.in_channel;
      if constexpr (N * sizeof(T) >= 4) {
        cp_async<N>(to, source);
      } else {
        store_vector(to, Vector<T, 1>{{load(source)}});
      }
      to = to + lanes.rows() * m.x_pitch;
    }
  }
}

// Loads pixels whose channels lie side by side.
template <class T>
SNV2_DEVICE void load_pixels(const UnitParams<T>& params, const Memory<T>& m,
                             const TensorStep& step) {
  constexpr int kPair = sizeof(T) == 4 ? 1 : 2;  // channels, and pixels, of a lane
  constexpr int kLanes = kWarp / kPair;          // of a pixel
  const int64_t image0 = params.heights.by_in.divide(step.row0);
  const int y0 = step.row0 - static_cast<int>(image0) * params.heights.in;
  const int first = (warp_of_cta() * kPair + lane_of_warp() / kLanes) * kPair;
  for (int p = first; p < step.columns; p += unit_warps() * kPair * kPair) {
    const int column = step.column0 + p, rows = params.by_row.divide(column);
    const auto from = [&](int i) {
      const int x = column + i - rows * params.row, last = params.width - 1;
      return at_in(params, Pixel(image0, y0, rows, x < last ? x : last, params.heights.in));
    };
    const Shared<T> to = m.x + step.place(p);
    const Global<const T> here = from(0);
    if constexpr (kPair == 1) {
#pragma unroll 2
      for (int row = lane_of_warp(); row < params.in_channels; row += kWarp) {
        cp_async<1>(to + row * m.x_pitch, here + load(m.in_table + row));
      }
    } else {
      const Global<const T> next = from(1);
#pragma unroll 2
      for (int row = lane_of_warp() % kLanes * 2; row < params.in_channels; row += kWarp) {
        const bool both = row + 1 < params.in_channels;
        const int32_t a = load(m.in_table + row), b = load(m.in_table + (both ? row + 1 : row));
        uint32_t words[2];
        if (params.in_pairs && a % 2 == 0 && b == a + 1) {
          words[0] = word_of(load_vector<2>(here + a));
          words[1] = word_of(load_vector<2>(next + a));
        } else {
          words[0] = word_of(load(here + a).bits, load(here + b).bits);
          words[1] = word_of(load(next + a).bits, load(next + b).bits);
        }
        const auto line = (to + row * m.x_pitch).template as<uint32_t>();
        store(line, low_halves(words[0], words[1]));
        if (both) store(line + m.x_pitch / 2, high_halves(words[0], words[1]));
      }
    }
  }
}

template <class T>
SNV2_DEVICE void load_tensor(const UnitParams<T>& params, const Memory<T>& m,
                             const TensorStep& step) {
  if (params.in_channel == 1 && params.in_pixel != 1) {
    load_pixels(params, m, step);
  } else if (params.in_vector == 4) {
    load_contiguous<4>(params, m, step);
  } else if (params.in_vector == 2) {
    load_contiguous<2>(params, m, step);
  } else {
    load_contiguous<1>(params, m, step);
  }
}

// Store -----------------------------------------------------------------------------------------

// Where a channel of the result comes from, and whether this CTA writes it: a row of this branch's
// result that lies in shared memory, or what passes through, which is written with the channel
// beside it. Nothing passes through beside a projection.
template <class T>
struct Source {
  bool exists = false, passes = false;
  int row = 0;         // of the result
  int64_t passed = 0;  // channel of the input

  SNV2_DEVICE Source(const UnitParams<T>& params, const Branch<T>& branch, int channel, int rank) {
    if (channel >= params.result_channels) return;
    const Global<const int32_t> table{params.result_table};
    const int32_t entry = load(table + channel);
    const auto computed = [&](int32_t other) {
      return other >= branch.first_result && other < branch.first_result + branch.out;
    };
    row = entry - branch.first_result;
    passes = entry < 0;
    passed = -1 - int64_t{entry};
    exists = computed(entry);
    if (passes) {
      const int beside = channel ^ 1;
      const int32_t other = beside < params.result_channels ? load(table + beside) : entry;
      exists = other >= 0 ? computed(other) : channel / 2 % params.cluster == rank;
    }
  }
};

// What is stored: `rows` rows from row `local0` of an image on.
struct ResultStep {
  int64_t image0;
  int local0, rows, rank;
};

// Stores rows of pixels, N at once.
template <int N, class T>
SNV2_DEVICE void store_contiguous(const UnitParams<T>& params, const Memory<T>& m,
                                  const Branch<T>& branch, const ResultStep& step) {
  const int vectors = step.rows * params.out_row / N;
  const LanesOfRows lanes(vectors);
  for (int v = lanes.vector(); v < vectors; v += lanes.vectors()) {
    const int line = params.by_out_row.divide(v * N), x = v * N - line * params.out_row;
    if (x >= params.out_width) continue;
    const Pixel pixel(step.image0, step.local0, line, x, params.heights.out);
    const Global<const T> in = at_in(params, pixel);
    const Global<T> to = at_result(params, pixel);
    const Shared<T> from = m.result + v * N;
#pragma unroll 2
    for (int channel = lanes.row(); channel < params.result_channels; channel += lanes.rows()) {
      const Source<T> source(params, branch, channel, step.rank);
      if (!source.exists) continue;
      const Vector<T, N> value = source.passes
                                     ? load_vector<N>(in + source.passed * params.in_channel)
                                     : load_vector<N>(from + source.row * m.dw_pitch);
      store_vector<N>(to + channel * params.result_channel, value);
    }
  }
}

// Stores pixels whose channels lie side by side.
template <class T>
SNV2_DEVICE void store_pixels(const UnitParams<T>& params, const Memory<T>& m,
                              const Branch<T>& branch, const ResultStep& step) {
  constexpr int kPair = sizeof(T) == 4 ? 1 : 2;  // channels, and pixels, of a lane
  const int end = step.rows * params.out_row;
  for (int channel = lane_of_warp() * kPair; channel < params.result_channels;
       channel += kWarp * kPair) {
    const Source<T> source(params, branch, channel, step.rank);
    const Source<T> second(params, branch, kPair == 2 ? channel + 1 : channel, step.rank);
    for (int p = warp_of_cta() * kPair; p < end; p += unit_warps() * kPair) {
      const int line = params.by_out_row.divide(p), x = p - line * params.out_row;
      if (x >= params.out_width) continue;
      const Pixel pixel(step.image0, step.local0, line, x, params.heights.out);
      const Global<const T> in = at_in(params, pixel);
      const Global<T> to = at_result(params, pixel) + channel * params.result_channel;
      const auto value_of = [&](const Source<T>& of, auto zero) {
        using Value = decltype(zero);
        if (!of.exists) return Value{};
        if (!of.passes) {
          return load((m.result + (of.row * m.dw_pitch + p)).template as<Value>());
        }
        const Global<const T> passed = in + of.passed * params.in_channel;
        if constexpr (kPair == 1) {
          return load(passed);
        } else {
          const bool two = x + 1 < params.out_width;
          const uint16_t low = load(passed).bits;
          return word_of(low, two ? load(passed + params.in_pixel).bits : low);
        }
      };
      if constexpr (kPair == 1) {
        if (source.exists) store(to, value_of(source, T{}));
      } else {
        const uint32_t a = value_of(source, 0u), b = value_of(second, 0u);
        const uint32_t words[2] = {low_halves(a, b), high_halves(a, b)};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (x + i >= params.out_width) break;
          const Global<T> there = to + i * params.result_pixel;
          Vector<T, 2> pair;
          std::memcpy(&pair, &words[i], sizeof pair);
          if (params.result_pairs && source.exists && second.exists) {
            store_vector<2>(there, pair);
          } else {
            if (source.exists) store(there, pair.values[0]);
            if (second.exists) store(there + params.result_channel, pair.values[1]);
          }
        }
      }
    }
  }
}

// Writes rows of the caller's tensor, in logical order.
template <class T>
SNV2_DEVICE void store_result(const UnitParams<T>& params, const Memory<T>& m,
                              const Branch<T>& branch, const ResultStep& step) {
  if (params.result_channel == 1 && params.result_pixel != 1) {
    store_pixels(params, m, branch, step);
  } else if (params.result_vector == 4) {
    store_contiguous<4>(params, m, branch, step);
  } else if (params.result_vector == 2) {
    store_contiguous<2>(params, m, branch, step);
  } else {
    store_contiguous<1>(params, m, branch, step);
  }
}

}  // namespace snv2::SNV2_GPU
